package plugins

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"
	"github.com/hashicorp/go-plugin/runner"
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

// A skew is a plugin that speaks another version of the protocol.
type skew struct{ theirs int }

func (s *skew) Error() string {
	return fmt.Sprintf("the plugin speaks version %d of the plugin protocol and this trustd version %d", s.theirs, Protocol)
}

// aboutBinary reports whether only another binary helps.
func aboutBinary(err error) bool {
	for _, cause := range []error{errNoBinary, errUnsafe, errChanged, errBadSum} {
		if errors.Is(err, cause) {
			return true
		}
	}
	return errors.As(err, new(*skew))
}

// died reports whether err is the end of a process.
func died(err error) bool { return errors.As(err, new(*death)) }

// last says how the process ended.
func last(err error) string {
	var d *death
	if errors.As(err, &d) {
		return d.how
	}
	return "it did not work"
}

// start makes one child and configures it. operator says that an operator wants the authorisation tried. It is called
// by the supervisor's thread alone.
func (h *Host) start(ctx context.Context, operator bool) (*conn, error) {
	h.seen = look(h.cfg.Binary)
	pin, err := h.readPIN(ctx)
	if err != nil {
		return nil, err
	}
	defer clear(pin)
	h.pin.give(pin)
	c, err := h.open()
	if err != nil {
		return nil, err
	}
	c.operator = operator
	if err := h.configure(ctx, c, pin); err != nil {
		c.stop(false)
		h.bury(c, ctx.Err() == nil)
		return nil, c.reason(err)
	}
	return c, nil
}

// open executes the binary and shakes hands.
func (h *Host) open() (*conn, error) {
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
	h.failures.follow(c)
	if err := c.launch(binary); err != nil {
		c.stop(false)
		if other := c.skew(); other != nil {
			return nil, other
		}
		h.failures.add(signer.ModuleDead)
		return nil, c.reason(fmt.Errorf("%w: %w", errHandshake, err))
	}
	if !h.cfg.Dev {
		h.sum = sum // from the first start that succeeded: a file that was still being written is not pinned
	}
	return c, nil
}

func (h *Host) configure(ctx context.Context, c *conn, pin []byte) error {
	go c.receive()
	c.receiving = true
	ctx, cancel := context.WithTimeoutCause(ctx, configureLimit, errHang)
	defer cancel()
	settings := maps.Clone(h.cfg.Settings)
	if serial := h.serial.Load(); serial != nil && settings[settingSerial] == "" {
		if settings == nil {
			settings = map[string]string{}
		}
		settings[settingSerial] = *serial
	}
	r, err := c.rpc.Configure(ctx, &signerpb.ConfigureRequest{
		Settings: settings, Pin: pin, Debug: h.cfg.Log.Enabled(ctx, slog.LevelDebug),
	})
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return fmt.Errorf("configuring the plugin: %w", err)
	}
	d := h.described(c, r)
	if c.operator {
		h.unlock(ctx, c)
	}
	if d.State != signer.Ready {
		h.cfg.Log.Warn("the device is not ready", "state", d.State, "problem", d.Problem, "remedy", d.Remedy)
	}
	return nil
}

func (h *Host) readPIN(ctx context.Context) ([]byte, error) {
	if h.cfg.PIN == nil {
		return nil, nil
	}
	pin, err := h.cfg.PIN(ctx)
	if err == nil {
		return pin, nil
	}
	var e *fault.Error
	switch {
	case errors.As(err, &e) && e.Code == fault.InsecureSecret:
		return nil, e
	case errors.As(err, &e):
		return nil, &fault.Error{Code: fault.Unavailable, Text: errPIN.Error() + ": " + cmp.Or(e.Text, e.Code.Title()),
			Hint: "Correct the PIN source in the backend's configuration; it is read again by itself.", Err: errors.Join(errPIN, err)}
	}
	return nil, fault.Wrap(fault.AuthorisationRefused, errors.Join(errPIN, err), "%s", errPIN)
}

// look returns what changes when a file does.
func look(path string) string {
	info, err := os.Stat(path)
	if err != nil {
		return err.Error()
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return info.ModTime().String()
	}
	return fmt.Sprint(stat.Dev, stat.Ino, stat.Size, stat.Mode, stat.Mtim, stat.Ctim)
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

// checksum returns the binary's sum, and an error where it is not the configured one or that of the first start.
func (h *Host) checksum(binary io.Reader) ([]byte, error) {
	want := h.sum
	if want == nil && h.cfg.SHA256 != "" {
		var err error
		if want, err = hex.DecodeString(h.cfg.SHA256); err != nil || len(want) != sha256.Size {
			return nil, errBadSum
		}
	}
	sum, err := sumOf(binary)
	if err == nil && want != nil && string(sum) != string(want) {
		err = errChanged
	}
	return sum, err
}

func sumOf(binary io.Reader) ([]byte, error) {
	sum := sha256.New()
	if _, err := io.Copy(sum, binary); err != nil {
		return nil, fmt.Errorf("%w: %w", errNoBinary, err)
	}
	return sum.Sum(nil), nil
}

// launch executes the binary and shakes hands.
func (c *conn) launch(binary *os.File) error {
	h := c.host
	theirs, err := c.pair()
	if err != nil {
		return err
	}
	defer theirs.Close()
	out := newOutput(h.cfg.Log)
	c.client = plugin.NewClient(&plugin.ClientConfig{
		HandshakeConfig:  handshake,
		VersionedPlugins: map[int]plugin.PluginSet{Protocol: {service: dialPlugin{}}},
		RunnerFunc: func(_ hclog.Logger, theirs2 *exec.Cmd, _ string) (runner.Runner, error) {
			cmd := exec.Command(fmt.Sprintf("/proc/self/fd/%d", binary.Fd()))
			cmd.Args = []string{filepath.Base(h.cfg.Binary)}
			cmd.Dir = "/"
			cmd.Env = append(childEnv(h.cfg.Env), theirs2.Env...)
			cmd.ExtraFiles = []*os.File{theirs} // requestsFD
			// Of a group of its own, so that a terminal's interrupt reaches the daemon first.
			cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
			c.proc = newProcess(cmd, out, h.cfg.Limits)
			return c.proc, nil
		},
		UnixSocketConfig: &plugin.UnixSocketConfig{TempDir: c.dir},
		SyncStdout:       out.writer("stdout"),
		SyncStderr:       out.writer("stderr"),
		AutoMTLS:         true,
		SkipHostEnv:      true,
		StartTimeout:     startLimit,
		AllowedProtocols: []plugin.Protocol{plugin.ProtocolGRPC},
		Logger:           &hclogger{log: h.cfg.Log, quiet: true},
	})
	protocol, err := c.client.Client()
	if err != nil {
		return err
	}
	c.pid = c.proc.cmd.Process.Pid
	if err := h.cfg.Limits.impose(c.pid); err != nil {
		return err
	}
	stub, err := protocol.Dispense(service)
	if err != nil {
		return err
	}
	c.rpc = stub.(signerpb.BackendClient)
	return nil
}

// skew returns an error where the child's handshake names another version of the protocol. Its form is
// CORE-VERSION|VERSION|NETWORK|ADDRESS|...
func (c *conn) skew() error {
	if c.proc == nil {
		return nil
	}
	parts := strings.Split(c.proc.handshake(), "|")
	if len(parts) < 4 || parts[0] != strconv.Itoa(plugin.CoreProtocolVersion) {
		return nil
	}
	if n, err := strconv.Atoi(parts[1]); err == nil && n != Protocol {
		return &skew{n}
	}
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

// childEnv returns what of the child's environment is the plugin's own.
func childEnv(extra map[string]string) []string {
	var env []string
	for k, v := range extra {
		if !strings.HasPrefix(k, "PLUGIN_") && k != handshake.MagicCookieKey {
			env = append(env, k+"="+v)
		}
	}
	return env
}

// maxSocketDir leaves room for the names that go-plugin gives to a folder and to the socket in it: a Unix socket's
// path has 107 bytes.
const maxSocketDir = 107 - len("/plugin-dir4294967295") - len("/plugin4294967295")

// socketDir makes a private folder for the child's socket, under base where that gives a path that is short enough.
func socketDir(base string) (string, error) {
	const pattern = "trustd-*"
	for _, b := range []string{base, os.TempDir(), "/tmp"} {
		if b == "" || len(b)+len("/")+len(pattern)+len("4294967295") > maxSocketDir {
			continue
		}
		return os.MkdirTemp(b, pattern) // mode 0700
	}
	return "", errors.New("no folder with a short enough path")
}

// diagnose says what it means that there is no child, and what to do.
func diagnose(err error) (signer.State, string, string) {
	var other *skew
	if errors.As(err, &other) {
		return signer.Stopped, other.Error(), "install the plugin and trustd of one release, or build the plugin anew"
	}
	for _, d := range diagnoses {
		if e := (*fault.Error)(nil); d.cause == errPIN && errors.Is(err, errPIN) && errors.As(err, &e) && e.Text != "" {
			return signer.Stopped, e.Text, d.remedy
		}
		if errors.Is(err, d.cause) {
			return signer.Stopped, d.cause.Error(), d.remedy
		}
	}
	if died(err) {
		return signer.Recovering, "the plugin died: " + last(err), "it is started again by itself; the log has what it wrote"
	}
	e := fault.From(err)
	switch {
	case e == nil:
		return signer.Recovering, "the plugin process ended", "it is started again by itself"
	case e.Code == fault.AuthorisationRefused && signer.ClassOf(err) == signer.AuthorisationRefused:
		return signer.Locked, e.Error(), e.Code.Hint()
	case e.Code == fault.AuthorisationRefused || e.Code == fault.InsecureSecret: // there is no PIN to show to the device
		return signer.Stopped, e.Error(), e.Code.Hint()
	case e.Code == fault.Internal:
		return signer.Recovering, "the plugin could not be started", "it is tried again by itself; the log has the cause"
	}
	return signer.Degraded, e.Error(), e.Code.Hint()
}

var diagnoses = []struct {
	cause  error
	remedy string
}{
	{errNoBinary, "install the plugin or correct its path in the backend's configuration"},
	{errUnsafe, "chmod o-w the plugin binary"},
	{errChanged, "restore the binary, or correct the checksum and restart the daemon"},
	{errBadSum, "correct the checksum in the backend's configuration: sha256sum prints it"},
	{errPIN, "correct the PIN source in the backend's configuration"},
}
