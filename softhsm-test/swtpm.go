package softhsmtest

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
	"syscall"
	"testing"
	"time"
)

// swtpmStart bounds how long an emulator may take to answer its first command.
const swtpmStart = 20 * time.Second

// A Process is a running swtpm: a TPM 2.0 emulator on a Unix socket, with its state in a folder. The process dies
// with this one. A TPM serves one connection at a time; a second one hangs until the first is closed.
type Process struct {
	dir    string
	cmd    *exec.Cmd
	exited chan struct{} // closed when the process was waited for
	output bytes.Buffer  // swtpm's own messages; read after exited
}

// StartTPM starts swtpm with its state in dir, which it fills on first use, and waits until it answers. The socket
// is dir/tpm.sock, so dir has a short path: a socket's holds at most 107 bytes.
func StartTPM(dir string) (*Process, error) {
	path, err := exec.LookPath("swtpm")
	if err != nil {
		return nil, fmt.Errorf("looking for swtpm (apt-get install swtpm): %w", err)
	}
	p := &Process{dir: dir, exited: make(chan struct{})}
	for _, s := range []string{p.Path(), p.ControlPath()} {
		if err := os.Remove(s); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("removing a stale socket: %w", err)
		}
	}
	state := filepath.Join(dir, "state")
	if err := os.MkdirAll(state, 0o700); err != nil {
		return nil, fmt.Errorf("making the TPM's state folder: %w", err)
	}
	p.cmd = exec.Command(path, "socket", "--tpm2", "--tpmstate", "dir="+state+",mode=0600",
		"--server", "type=unixio,path="+p.Path()+",mode=0600",
		"--ctrl", "type=unixio,path="+p.ControlPath()+",mode=0600",
		"--flags", "not-need-init,startup-clear")
	p.cmd.Stdout, p.cmd.Stderr = &p.output, &p.output
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting swtpm: %w", err)
	}
	go func() {
		defer close(p.exited)
		_ = p.cmd.Wait() // a killed process is what Stop and Kill ask for
	}()
	if err := p.awaitReady(); err != nil {
		p.Kill()
		return nil, fmt.Errorf("waiting for swtpm: %w: %s", err, bytes.TrimSpace(p.output.Bytes()))
	}
	return p, nil
}

// Path returns the path of the TPM's socket.
func (p *Process) Path() string { return filepath.Join(p.dir, "tpm.sock") }

// ControlPath returns the path of the control socket, for swtpm_ioctl, where tpm2-tools look for it.
func (p *Process) ControlPath() string { return filepath.Join(p.dir, "tpm.sock.ctrl") }

// Device returns the TPM's address as trustd's configuration and tpm2-tools write it.
func (p *Process) Device() string { return "swtpm:path=" + p.Path() }

// Pid returns the emulator's process id.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Signal sends a signal: SIGSTOP hangs the TPM, SIGCONT frees it.
func (p *Process) Signal(s syscall.Signal) error { return p.cmd.Process.Signal(s) }

// Kill ends the emulator as a power cut would, and waits until it is gone.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill() // only fails when it has ended
	<-p.exited
}

// Stop ends the emulator with SIGTERM, or with SIGKILL when it does not follow.
func (p *Process) Stop() {
	_ = p.Signal(syscall.SIGTERM)
	select {
	case <-p.exited:
	case <-time.After(2 * time.Second):
		p.Kill()
	}
}

// awaitReady asks on the control socket until it is answered: the emulator is then in its main loop. The TPM's own
// socket may be in the hands of a client already, one that was waiting for it to come back.
func (p *Process) awaitReady() error {
	ctx, cancel := context.WithTimeout(context.Background(), swtpmStart)
	defer cancel()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		err := probeControl(p.ControlPath())
		if err == nil {
			return nil
		}
		select {
		case <-p.exited:
			return errors.New("it ended")
		case <-ctx.Done():
			return err
		case <-tick.C:
		}
	}
}

// probeControl sends CMD_GET_CAPABILITY to an emulator's control socket.
func probeControl(path string) error {
	conn, err := net.Dial("unix", path)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(swtpmStart)); err != nil {
		return err
	}
	if _, err := conn.Write([]byte{0, 0, 0, 1}); err != nil {
		return err
	}
	rsp := make([]byte, 8) // result, capabilities
	if _, err := io.ReadFull(conn, rsp); err != nil {
		return err
	}
	if !bytes.Equal(rsp[:4], make([]byte, 4)) {
		return errors.New("the emulator answers with an error")
	}
	return nil
}

// A TPM is a private TPM emulator of one test.
type TPM struct {
	t    testing.TB
	dir  string
	proc *Process
}

// NewTPM boots a TPM emulator on a Unix socket in a folder of its own, and removes both when the test ends.
func NewTPM(t testing.TB) *TPM {
	t.Helper()
	requireSwtpm(t)
	dir, err := os.MkdirTemp("", "tpm") // t.TempDir is too long for a socket's path
	if err != nil {
		t.Fatal(err)
	}
	tpm := &TPM{t: t, dir: dir}
	t.Cleanup(func() {
		tpm.Close()
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("removing the TPM's folder: %v", err)
		}
	})
	tpm.start()
	return tpm
}

func (m *TPM) start() {
	m.t.Helper()
	p, err := StartTPM(m.dir)
	if err != nil {
		m.t.Fatal(err)
	}
	m.proc = p
}

// Path returns the path of the TPM's socket, which stays the same over restarts.
func (m *TPM) Path() string { return filepath.Join(m.dir, "tpm.sock") }

// Device returns the TPM's address, swtpm:path=...
func (m *TPM) Device() string { return "swtpm:path=" + m.Path() }

// Process returns the running emulator; nil when there is none.
func (m *TPM) Process() *Process { return m.proc }

// Kill ends the emulator with SIGKILL. Its state stays.
func (m *TPM) Kill() {
	if m.proc != nil {
		m.proc.Kill()
		m.proc = nil
	}
}

// Restart power-cycles the TPM: the emulator is killed, if it runs, and started on the same state and socket.
func (m *TPM) Restart() {
	m.t.Helper()
	m.Kill()
	m.start()
}

// Reset resets the running TPM, as a reboot of the host does. It then waits for TPM2_Startup; connections stay open.
func (m *TPM) Reset() {
	m.t.Helper()
	out, err := exec.Command("swtpm_ioctl", "--unix", m.proc.ControlPath(), "-i").CombinedOutput()
	if err != nil {
		m.t.Fatalf("resetting the TPM: %v: %s", err, out)
	}
}

// Replace puts a new TPM, with other seeds, at the same socket.
func (m *TPM) Replace() {
	m.t.Helper()
	m.Kill()
	if err := os.RemoveAll(filepath.Join(m.dir, "state")); err != nil {
		m.t.Fatal(err)
	}
	m.start()
}

// Close ends the emulator. NewTPM has it called when the test ends.
func (m *TPM) Close() {
	if m.proc != nil {
		m.proc.Stop()
		m.proc = nil
	}
}

// requireSwtpm skips the test where swtpm is not installed, and fails it where that must not be.
func requireSwtpm(t testing.TB) {
	t.Helper()
	if _, err := exec.LookPath("swtpm"); err == nil {
		return
	}
	if os.Getenv("CI") != "" || os.Getenv("TRUSTD_REQUIRE_HSM") == "1" {
		t.Fatal("swtpm is not installed (apt-get install swtpm)")
	}
	t.Skip("swtpm is not installed (apt-get install swtpm)")
}
