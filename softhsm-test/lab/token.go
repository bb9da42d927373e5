package lab

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The backends of each lab: a SoftHSM token in the daemon's own plugin, and a TPM.
const (
	HSM = "hsm"
	TPM = "tpm"
)

// A Faulty is a backend in the plugin plugins/faulty, which wraps another and fails by a script.
type Faulty struct {
	Name     string
	Wraps    string        // pkcs11, over a SoftHSM token of its own; tpm, over Options.Proxy; or soft
	Script   string        // what fails from the start; see plugins/faulty/script.go
	Parallel int           // how many signatures at once; 0: as many as what it wraps
	Deadline time.Duration // of one operation; 0: the daemon's own bound
}

// faulty makes what the backends need and returns their part of the configuration.
func (l *Lab) faulty(ctx context.Context, all []Faulty) (string, error) {
	if len(all) == 0 {
		return "", nil
	}
	plugin := filepath.Join(l.Dir, "faulty")
	binary, err := os.ReadFile(plugin)
	if err != nil {
		return "", err
	}
	var conf strings.Builder
	for _, f := range all {
		if err := l.Script(f.Name, f.Script); err != nil {
			return "", err
		}
		settings := map[string]string{"wraps": f.Wraps, "script": l.scriptFile(f.Name), "notes": l.notesFile(f.Name)}
		switch f.Wraps {
		case "pkcs11":
			if err := l.makeToken(ctx, f.Name); err != nil {
				return "", err
			}
			settings["module"], settings["token"] = l.Module, "lab"
		case "tpm":
			settings["device"], settings["dir"] = l.Proxy.Device(), filepath.Join(l.Dir, "blobs-"+f.Name)
		default:
			settings["keys"] = filepath.Join(l.Dir, "keys-"+f.Name)
		}
		if f.Parallel > 0 {
			settings["parallel"] = strconv.Itoa(f.Parallel)
		}
		fmt.Fprintf(&conf, `
[[backend]]
name = %q
kind = "plugin"
plugin = %q
plugin_sha256 = "%x"
pin = { file = %q }
`, f.Name, plugin, sha256.Sum256(binary), l.PINFile(f.Name))
		if f.Deadline > 0 {
			fmt.Fprintf(&conf, "deadline = %q\n", f.Deadline)
		}
		fmt.Fprintf(&conf, "env = { SOFTHSM2_CONF = %q }\n[backend.settings]\n", l.softhsmConf(f.Name))
		for _, name := range slices.Sorted(maps.Keys(settings)) {
			fmt.Fprintf(&conf, "%s = %q\n", name, settings[name])
		}
	}
	return conf.String(), nil
}

func (l *Lab) scriptFile(backend string) string { return filepath.Join(l.Dir, "script-"+backend) }
func (l *Lab) notesFile(backend string) string  { return filepath.Join(l.Dir, "notes-"+backend) }

// Script puts a script in force on a Faulty: each of its calls that begins afterwards meets it.
func (l *Lab) Script(backend string, lines ...string) error {
	path := l.scriptFile(backend)
	err := os.WriteFile(path+".new", []byte(strings.Join(lines, "\n")+"\n"), 0o600)
	return errors.Join(err, os.Rename(path+".new", path))
}

// noteSize is the length of each line that the action "note" of a script writes.
const noteSize = 64

// Notes returns how often a Faulty's script has made a note.
func (l *Lab) Notes(backend string) int {
	info, err := os.Stat(l.notesFile(backend))
	if err != nil {
		return 0
	}
	return int(info.Size() / noteSize)
}

// makePIN writes one random PIN for all tokens, and a file for each backend that only root reads.
func (l *Lab) makePIN(all []Faulty) error {
	raw := make([]byte, 8)
	_, _ = rand.Read(raw)
	l.pin = hex.EncodeToString(raw)
	errs := []error{l.SetPIN(HSM, "")}
	for _, f := range all {
		errs = append(errs, l.SetPIN(f.Name, ""))
	}
	return errors.Join(errs...)
}

// SetPIN writes the PIN that the daemon is to use for a backend; "" is the right one.
func (l *Lab) SetPIN(backend, pin string) error {
	if pin == "" {
		pin = l.pin
	}
	return os.WriteFile(l.PINFile(backend), []byte(pin+"\n"), 0o600)
}

// PINFile returns the path of the file that holds a backend's PIN.
func (l *Lab) PINFile(backend string) string {
	if backend == HSM {
		return filepath.Join(l.Dir, "pin")
	}
	return filepath.Join(l.Dir, "pin-"+backend)
}

// softhsmConf returns the path of the configuration of a backend's SoftHSM.
func (l *Lab) softhsmConf(backend string) string {
	if backend == HSM {
		return filepath.Join(l.Dir, "softhsm2.conf")
	}
	return filepath.Join(l.Dir, "softhsm2-"+backend+".conf")
}

// TokenDir returns the folder in which a backend's SoftHSM keeps its tokens. While it is away, the token is unplugged.
func (l *Lab) TokenDir(backend string) string {
	if backend == HSM {
		return filepath.Join(l.Dir, "tokens")
	}
	return filepath.Join(l.Dir, "tokens-"+backend)
}

// makeToken makes the configuration and the token of a backend.
func (l *Lab) makeToken(ctx context.Context, backend string) error {
	text := fmt.Sprintf("directories.tokendir = %s\nobjectstore.backend = file\nlog.level = ERROR\n", l.TokenDir(backend))
	if err := os.WriteFile(l.softhsmConf(backend), []byte(text), 0o600); err != nil {
		return err
	}
	return l.NewToken(ctx, backend)
}

// NewToken puts a new token with the label and PIN of all others, and no key, into the backend's folder, which is not
// there.
func (l *Lab) NewToken(ctx context.Context, backend string) error {
	if err := os.Mkdir(l.TokenDir(backend), 0o700); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "softhsm2-util", "--init-token", "--free", "--label", "lab",
		"--pin", l.pin, "--so-pin", l.pin+"so")
	cmd.Env = append(os.Environ(), "SOFTHSM2_CONF="+l.softhsmConf(backend))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("making a SoftHSM token: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// Unplug takes a backend's token away until the returned function puts it back, in the place of whatever is there.
func (l *Lab) Unplug(backend string) (restore func() error, err error) {
	dir := l.TokenDir(backend)
	away := dir + ".away"
	if err := os.Rename(dir, away); err != nil {
		return nil, err
	}
	return func() error { return errors.Join(os.RemoveAll(dir), os.Rename(away, dir)) }, nil
}
