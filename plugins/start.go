package plugins

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/hashicorp/go-plugin"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/plugins/signerpb"
	"github.com/trustd/trustd/signer"
)

var (
	errNoBinary  = errors.New("the plugin binary is not there")
	errUnsafe    = errors.New("the plugin binary can be changed by every user")
	errChanged   = errors.New("the plugin binary is not the one whose checksum is pinned")
	errBadSum    = errors.New("the configured checksum is not 64 hexadecimal digits")
	errPIN       = errors.New("the PIN cannot be read")
	errHandshake = errors.New("the plugin did not start")
)

// start makes one child and configures it. It is called by the supervisor's thread alone.
func (h *Host) start(ctx context.Context) (*conn, error) {
	pin, err := h.readPIN(ctx)
	if err != nil {
		return nil, err
	}
	defer clear(pin)
	binary, err := openBinary(h.cfg.Binary)
	if err != nil {
		return nil, err
	}
	defer binary.Close()
	sum, err := h.checksum(binary)
	if err != nil {
		return nil, err
	}
	dir, err := socketDir(h.cfg.SocketDir)
	if err != nil {
		return nil, fmt.Errorf("making the folder for the socket: %w", err)
	}
	c := newConn(h, dir)
	if err := c.launch(binary, sum, h); err != nil {
		c.stop(false)
		return nil, fmt.Errorf("%w: %w", errHandshake, err)
	}
	h.sum = sum // from the first start that succeeded: a file that was still being written is not pinned
	configured, cancel := context.WithTimeout(ctx, configureLimit)
	defer cancel()
	r, err := c.rpc.Configure(configured, &signerpb.ConfigureRequest{
		Module: h.cfg.Module, TokenLabel: h.cfg.TokenLabel, TokenSerial: h.cfg.TokenSerial, Pin: pin,
	})
	if err != nil {
		c.stop(false)
		return nil, fmt.Errorf("configuring the plugin: %w", err)
	}
	go c.receive()
	c.receiving = true
	if d := decodeDescription(r); d.State != signer.Ready {
		h.cfg.Log.Warn("the token is not ready", "state", d.State, "problem", d.Problem, "remedy", d.Remedy)
		if d.State == signer.Stopped && d.Limits[limitPIN] == pinRefused {
			h.refused.CompareAndSwap(nil, fault.New(fault.AuthorisationRefused, "the token refused the PIN"))
		}
	}
	return c, nil
}

// Describe's limit by which a backend says that the token refused its PIN.
const (
	limitPIN   = "pin"
	pinRefused = "refused"
)

func (h *Host) readPIN(ctx context.Context) ([]byte, error) {
	if h.cfg.PIN == nil {
		return nil, nil
	}
	pin, err := h.cfg.PIN(ctx)
	if err == nil {
		return pin, nil
	}
	var e *fault.Error
	if errors.As(err, &e) {
		return nil, e
	}
	return nil, fault.Wrap(fault.AuthorisationRefused, errors.Join(errPIN, err), "the PIN cannot be read")
}

// openBinary opens the binary. What is checked and what is executed is the open file, so that nothing can be put in
// its place in between.
func openBinary(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNoBinary, err)
	}
	info, err := f.Stat()
	switch {
	case err != nil:
		err = fmt.Errorf("%w: %w", errNoBinary, err)
	case !info.Mode().IsRegular():
		err = errNoBinary
	case info.Mode().Perm()&0o002 != 0:
		err = errUnsafe
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// checksum returns the sum that the binary must have: the configured one, that of the first start, or its own.
func (h *Host) checksum(binary io.Reader) ([]byte, error) {
	switch {
	case h.sum != nil:
		return h.sum, nil
	case h.cfg.SHA256 != "":
		sum, err := hex.DecodeString(h.cfg.SHA256)
		if err != nil || len(sum) != sha256.Size {
			return nil, errBadSum
		}
		return sum, nil
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, binary); err != nil {
		return nil, fmt.Errorf("%w: %w", errNoBinary, err)
	}
	return sum.Sum(nil), nil
}

// launch executes the binary and shakes hands.
func (c *conn) launch(binary *os.File, sum []byte, h *Host) error {
	theirs, err := c.pair()
	if err != nil {
		return err
	}
	defer theirs.Close()
	cmd := exec.CommandContext(c.ctx, fmt.Sprintf("/proc/self/fd/%d", binary.Fd()))
	cmd.Args = []string{filepath.Base(h.cfg.Binary)}
	cmd.Dir = "/"
	cmd.Env = childEnv(h.cfg.Env, c.dir)
	cmd.ExtraFiles = []*os.File{theirs} // requestsFD
	// Of a group of its own, so that a terminal's interrupt reaches the daemon first.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	c.client = plugin.NewClient(&plugin.ClientConfig{
		HandshakeConfig:  handshake,
		Plugins:          plugin.PluginSet{service: dialPlugin{}},
		Cmd:              cmd,
		SecureConfig:     &plugin.SecureConfig{Checksum: sum, Hash: sha256.New()},
		AutoMTLS:         true,
		SkipHostEnv:      true,
		StartTimeout:     startLimit,
		AllowedProtocols: []plugin.Protocol{plugin.ProtocolGRPC},
		Logger:           &hclogger{log: h.cfg.Log},
	})
	protocol, err := c.client.Client()
	if errors.Is(err, plugin.ErrChecksumsDoNotMatch) {
		return errors.Join(errChanged, err)
	}
	if err != nil {
		return err
	}
	c.pid = cmd.Process.Pid
	stub, err := protocol.Dispense(service)
	if err != nil {
		return err
	}
	c.rpc = stub.(signerpb.BackendClient)
	return nil
}

// pair makes the socket pair on which requests to sign travel, and returns the child's end. No other process can
// reach it, so that it needs no authentication; it spares each signature gRPC's goroutines.
func (c *conn) pair() (*os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("making the socket pair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "requests"), os.NewFile(uintptr(fds[1]), "requests")
	defer ours.Close()
	if c.requests, err = net.FileConn(ours); err != nil {
		theirs.Close()
		return nil, fmt.Errorf("making the socket pair: %w", err)
	}
	return theirs, nil
}

type dialPlugin struct{ plugin.NetRPCUnsupportedPlugin }

func (dialPlugin) GRPCServer(*plugin.GRPCBroker, *grpc.Server) error {
	return fault.New(fault.Unsupported, "this is the host's end")
}

func (dialPlugin) GRPCClient(_ context.Context, _ *plugin.GRPCBroker, cc *grpc.ClientConn) (any, error) {
	return signerpb.NewBackendClient(cc), nil
}

// childEnv returns the child's whole environment.
func childEnv(extra map[string]string, dir string) []string {
	env := []string{plugin.EnvUnixSocketDir + "=" + dir}
	for k, v := range extra {
		if !strings.HasPrefix(k, "PLUGIN_") && k != handshake.MagicCookieKey {
			env = append(env, k+"="+v)
		}
	}
	return env
}

// maxSocketDir leaves room for the name that go-plugin gives the socket: a Unix socket's path has 107 bytes.
const maxSocketDir = 107 - len("/plugin4294967295") - 1

// socketDir makes a private folder for the child's socket, under base where that gives a path that is short enough.
func socketDir(base string) (string, error) {
	const pattern = "trustd-plugin-*"
	for _, b := range []string{base, os.TempDir(), "/tmp"} {
		if b == "" || len(b)+len(pattern)+len("4294967295") > maxSocketDir {
			continue
		}
		return os.MkdirTemp(b, pattern) // mode 0700
	}
	return "", errors.New("no folder with a short enough path")
}

// diagnose says what it means that there is no child, and what to do.
func diagnose(err error) (signer.State, string, string) {
	for _, d := range diagnoses {
		if errors.Is(err, d.cause) {
			return d.state, d.cause.Error(), d.remedy
		}
	}
	e := fault.From(err)
	switch {
	case e == nil:
		return signer.Degraded, "the plugin process ended", "it is started again by itself"
	case e.Code == fault.AuthorisationRefused || e.Code == fault.InsecureSecret:
		return signer.Stopped, e.Error(), e.Code.Hint()
	case e.Code == fault.Internal:
		return signer.Degraded, "the plugin process died", "it is started again by itself; the log has the cause"
	}
	return signer.Degraded, e.Error(), e.Code.Hint()
}

var diagnoses = []struct {
	cause  error
	state  signer.State
	remedy string
}{
	{errNoBinary, signer.Stopped, "install trustd-pkcs11 or correct its path in the backend's configuration"},
	{errUnsafe, signer.Stopped, "chmod o-w the plugin binary"},
	{errChanged, signer.Stopped, "restore the binary, or correct the checksum and restart the daemon"},
	{errBadSum, signer.Stopped, "correct the checksum in the backend's configuration: sha256sum prints it"},
	{errPIN, signer.Stopped, "correct the PIN source in the backend's configuration"},
	{errHandshake, signer.Degraded, "check that the binary is trustd-pkcs11 of this release; the log has the cause"},
	{errHang, signer.Degraded, "it is started again by itself; if it hangs again, check the device"},
}
