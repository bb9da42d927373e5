// Package lab boots a whole trustd on one machine, for the demonstration, the benchmarks and the end-to-end tests: a
// private SoftHSM token, a private swtpm, a configuration, the daemon's real binaries, and commands run as other Unix
// users. Everything lives in one folder and ends with it.
package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	softhsmtest "github.com/trustd/trustd/softhsm-test"
	"github.com/trustd/trustd/softhsm-test/tpmproxy"
)

// A Lab is one private set-up. Its methods are not safe for concurrent use, but the commands it runs may overlap.
type Lab struct {
	Dir         string // 0755, so that other users reach the binary and the agent socket
	Config      string
	AgentSocket string
	AdminSocket string
	Module      string // of SoftHSM; the token's label is "lab"
	// Proxy stands before the TPM, where Options.Proxy asks for it: what fails is a script of its own, and tpm2-tools
	// reach the TPM beside the daemon.
	Proxy *tpmproxy.Proxy

	pin    string // of all tokens
	tpm    *softhsmtest.Process
	daemon *Process
	log    *os.File
}

// Options choose what a lab has.
type Options struct {
	Bin      string // folder that holds trustd and trustd-pkcs11
	Plugin   string // path of the plugin that Faulty needs, plugins/faulty built with cgo
	NoTPM    bool
	Proxy    bool          // a tpmproxy before the TPM
	Faulty   []Faulty      // more backends, each of which fails by a script
	Deadline time.Duration // of one operation of the HSM and of the TPM; 0: the daemon's own bounds
	Extra    string        // more configuration, TOML
	Stderr   io.Writer     // where the daemon's log goes besides the lab's own file; nil for nowhere
}

// New makes the folder, token, TPM and configuration and writes the genesis record. Close takes all away again.
func New(ctx context.Context, o Options) (_ *Lab, err error) {
	dir, err := os.MkdirTemp("", "trustd-lab-")
	if err != nil {
		return nil, fmt.Errorf("making the lab's folder: %w", err)
	}
	l := &Lab{Dir: dir, Config: filepath.Join(dir, "trustd.toml"),
		AgentSocket: filepath.Join(dir, "run", "agent.sock"), AdminSocket: filepath.Join(dir, "run", "admin.sock")}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	if err := os.Chmod(dir, 0o755); err != nil {
		return nil, fmt.Errorf("opening the lab's folder: %w", err)
	}
	binaries := map[string]string{
		"trustd": filepath.Join(o.Bin, "trustd"), "trustd-pkcs11": filepath.Join(o.Bin, "trustd-pkcs11"),
	}
	if len(o.Faulty) > 0 {
		binaries["faulty"] = o.Plugin
	}
	for b, from := range binaries {
		if err := CopyFile(from, filepath.Join(dir, b)); err != nil {
			return nil, fmt.Errorf("copying %s: %w", b, err)
		}
	}
	module, err := softhsmModule()
	if err != nil {
		return nil, err
	}
	l.Module = module
	if err := l.makePIN(o.Faulty); err != nil {
		return nil, err
	}
	if err := l.makeToken(ctx, HSM); err != nil {
		return nil, err
	}
	deadline := ""
	if o.Deadline > 0 {
		deadline = fmt.Sprintf("deadline = %q\n", o.Deadline)
	}
	tpm := ""
	if !o.NoTPM {
		state := l.tpmDir()
		if err := os.Mkdir(state, 0o700); err != nil {
			return nil, err
		}
		if l.tpm, err = softhsmtest.StartTPM(state); err != nil {
			return nil, fmt.Errorf("starting swtpm: %w", err)
		}
		path := l.tpm.Path()
		if o.Proxy {
			path = filepath.Join(dir, "proxy.sock")
			if l.Proxy, err = tpmproxy.Listen(path, l.tpm.Path()); err != nil {
				return nil, err
			}
			if err := os.Symlink(l.tpm.ControlPath(), path+".ctrl"); err != nil { // tpm2-tools look for it
				return nil, err
			}
		}
		tpm = fmt.Sprintf("\n[[backend]]\nname = \"tpm\"\nkind = \"tpm\"\ndevice = \"swtpm:path=%s\"\n%s", path, deadline)
	}
	faulty, err := l.faulty(ctx, o.Faulty)
	if err != nil {
		return nil, err
	}
	conf := fmt.Sprintf(`state_dir = %q
run_dir = %q

[[backend]]
name = "hsm"
kind = "pkcs11"
default = true
module = %q
token = "lab"
pin = { file = %q }
env = { SOFTHSM2_CONF = %q }
%s%s
%s
%s`, filepath.Join(dir, "state"), filepath.Join(dir, "run"), module, l.PINFile(HSM), l.softhsmConf(HSM), deadline,
		tpm, faulty, o.Extra)
	if err := os.WriteFile(l.Config, []byte(conf), 0o644); err != nil {
		return nil, fmt.Errorf("writing the configuration: %w", err)
	}
	if l.log, err = os.OpenFile(filepath.Join(dir, "daemon.log"), os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o600); err != nil {
		return nil, err
	}
	if r := l.Root(ctx, nil, "init", "--origin", "agents.lab.test"); r.Code != 0 {
		return nil, fmt.Errorf("trustd init: exit %d: %s", r.Code, r.Stderr)
	}
	return l, nil
}

// softhsmModule finds the module of Debian's softhsm2.
func softhsmModule() (string, error) {
	for _, p := range []string{"/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
		"/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so", "/usr/lib64/softhsm/libsofthsm2.so"} {
		if _, err := os.Stat(p); err == nil {
			return p, nil
		}
	}
	return "", errors.New("SoftHSM is not installed: install the package softhsm2")
}

// A Process is a running daemon.
type Process struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error
}

// Pid returns the process id.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Start starts the daemon and returns once it accepts connections.
func (l *Lab) Start(ctx context.Context, o Options) error {
	cmd := exec.Command(filepath.Join(l.Dir, "trustd"), "serve", "--config", l.Config)
	out := io.Writer(l.log)
	if o.Stderr != nil {
		out = io.MultiWriter(l.log, o.Stderr)
	}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting the daemon: %w", err)
	}
	p := &Process{cmd: cmd, done: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	l.daemon = p
	return poll(ctx, 60*time.Second, func() error {
		select {
		case <-p.done:
			return fatal{fmt.Errorf("the daemon ended: %w\n%s", p.err, l.Log())}
		default:
		}
		for _, s := range []string{l.AgentSocket, l.AdminSocket} {
			c, err := net.Dial("unix", s)
			if err != nil {
				return err
			}
			c.Close()
		}
		return nil
	})
}

type fatal struct{ error }

// poll calls fn until it returns nil, ctx ends or the time is up.
func poll(ctx context.Context, limit time.Duration, fn func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := fn()
		var f fatal
		if err == nil || errors.As(err, &f) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for the daemon: %w", err)
		case <-tick.C:
		}
	}
}

// Daemon returns the running daemon.
func (l *Lab) Daemon() *Process { return l.daemon }

// KillTPM ends swtpm with SIGKILL; its state stays.
func (l *Lab) KillTPM() { l.tpm.Kill() }

// RestartTPM starts swtpm again on the same state.
func (l *Lab) RestartTPM() (err error) {
	l.tpm, err = softhsmtest.StartTPM(l.tpmDir())
	return err
}

func (l *Lab) tpmDir() string { return filepath.Join(l.Dir, "tpm") }

// Kill ends the daemon with SIGKILL and waits for its end.
func (l *Lab) Kill() {
	if l.daemon == nil {
		return
	}
	_ = l.daemon.cmd.Process.Kill()
	<-l.daemon.done
	l.daemon = nil
}

// Stop asks the daemon to stop and waits for its end.
func (l *Lab) Stop() error {
	if l.daemon == nil {
		return nil
	}
	p := l.daemon
	l.daemon = nil
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
		return p.err
	case <-time.After(40 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.done
		return errors.New("the daemon did not stop in time")
	}
}

// Log returns the end of the daemon's log.
func (l *Lab) Log() string {
	b, err := os.ReadFile(filepath.Join(l.Dir, "daemon.log"))
	if err != nil {
		return ""
	}
	const most = 16 << 10
	return string(b[max(0, len(b)-most):])
}

// Close stops everything and removes the folder.
func (l *Lab) Close() error {
	err := l.Stop()
	if l.Proxy != nil {
		l.Proxy.Close()
	}
	if l.tpm != nil {
		l.tpm.Stop()
	}
	if l.log != nil {
		l.log.Close()
	}
	return errors.Join(err, os.RemoveAll(l.Dir))
}

// A Result is what a command did.
type Result struct {
	Code           int
	Stdout, Stderr string
}

// Root runs a trustd command as this process's user.
func (l *Lab) Root(ctx context.Context, in []byte, args ...string) Result {
	return l.command(ctx, nil, in, args)
}

// As runs a trustd command as another Unix user, which needs no entry in the user database.
func (l *Lab) As(ctx context.Context, uid uint32, in []byte, args ...string) Result {
	return l.command(ctx, &syscall.Credential{Uid: uid, Gid: uid, Groups: []uint32{}}, in, args)
}

func (l *Lab) command(ctx context.Context, cred *syscall.Credential, in []byte, args []string) Result {
	cmd := exec.CommandContext(ctx, filepath.Join(l.Dir, "trustd"), args...)
	cmd.Dir = l.Dir
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "TRUSTD_CONFIG=" + l.Config, "HOME=" + l.Dir}
	cmd.Stdin = bytes.NewReader(in)
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	if cred != nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred}
	}
	err := cmd.Run()
	r := Result{Stdout: out.String(), Stderr: errs.String(), Code: cmd.ProcessState.ExitCode()}
	if err != nil && r.Code <= 0 {
		r.Code, r.Stderr = -1, r.Stderr+err.Error()
	}
	return r
}

// CopyFile copies a program to a place where every user may run it.
func CopyFile(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Close())
}
