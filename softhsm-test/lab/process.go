package lab

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	softhsmtest "github.com/trustd/trustd/softhsm-test"
)

// TPM returns the running swtpm.
func (l *Lab) TPM() *softhsmtest.Process { return l.tpm }

// StopTPM shuts the TPM down as a host does (TPM2_Shutdown) and ends swtpm; its state stays.
func (l *Lab) StopTPM(ctx context.Context) error {
	if err := l.TPMTool(ctx, "tpm2_shutdown", "--clear"); err != nil {
		return err
	}
	l.tpm.Stop()
	return nil
}

// TPMTool runs one of tpm2-tools beside the daemon, through the Proxy.
func (l *Lab) TPMTool(ctx context.Context, name string, args ...string) error {
	_, err := l.TPMOutput(ctx, name, args...)
	return err
}

// TPMOutput is TPMTool that returns what the tool prints.
func (l *Lab) TPMOutput(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = l.Dir
	cmd.Env = append(os.Environ(), "TPM2TOOLS_TCTI="+l.Proxy.Device())
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(errs.Bytes()))
	}
	return out.String(), nil
}

// Child returns the process of a backend's plugin, 0 where none runs. It is known by its environment.
func (l *Lab) Child(backend string) int {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, s := range stats {
		b, err := os.ReadFile(s)
		if err != nil {
			continue // it has ended
		}
		rest := string(b[bytes.LastIndexByte(b, ')')+2:])
		var state string
		var parent, pid int
		_, err = fmt.Sscan(rest, &state, &parent)
		if err != nil || l.daemon == nil || parent != l.daemon.Pid() || state == "Z" {
			continue
		}
		env, err := os.ReadFile(filepath.Join(filepath.Dir(s), "environ"))
		if err != nil || !bytes.Contains(env, []byte("SOFTHSM2_CONF="+l.softhsmConf(backend)+"\x00")) {
			continue
		}
		if _, err := fmt.Sscan(filepath.Base(filepath.Dir(s)), &pid); err == nil {
			return pid
		}
	}
	return 0
}
