// Package plugins runs key backends in processes of their own, because a vendor's module may crash, hang or leak,
// and because cgo would cost the daemon its static binary (DESIGN.md section 4).
//
// A Host is the daemon's end: a signer.Backend whose device lives in a child process that Run starts, watches,
// kills when it hangs and starts again. Serve is the child's end; docs/plugins.md is the guide to writing one.
package plugins

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/signer"
)

// Config names a plugin binary and what it is given.
type Config struct {
	Name   string // of the backend, for the log and for what operators are told to do
	Binary string // path of the plugin
	// SHA256 is the binary's checksum in hexadecimal digits. Where it is empty, the checksum at the first start is
	// the one that each restart demands.
	SHA256 string
	// Dev lifts the demand on restarts: each start takes the binary as it is.
	Dev bool
	// Kind is the scheme of the keys' URIs. Where it is KindPlugin the host makes these itself, of the keys' ids.
	Kind string
	// Settings are passed to the plugin. They are no place for a secret.
	Settings map[string]string
	// PIN returns the PIN or other secret; it is asked for at each start of the child and cleared after use. nil: none.
	PIN func(context.Context) ([]byte, error)
	// Env is all of the child's environment that is the plugin's business, such as SOFTHSM2_CONF. Nothing of the
	// daemon's own environment reaches the child.
	Env map[string]string
	Log *slog.Logger
	// Deadline bounds one signing call to the device (0: 10 s). A child with an older one is killed.
	Deadline time.Duration
	// SocketDir is where the folder with the child's socket is made ("" or too long a path: the system's folder
	// for temporary files).
	SocketDir string
	Limits    Limits
	// Verified says that the plugin is known to verify each signature before it answers. Of any other the host does.
	Verified bool
}

// KindPlugin is the kind of a backend whose keys' URIs are the host's own business.
const KindPlugin = "plugin"

// The setting, and the entry of signer.Description.Limits, that hold a token's serial. What a plugin reports first is
// what each later child is given, so that a restart does not accept another token of the same label.
const settingSerial = "serial"

// PKCS11Config names a module and a token for trustd-pkcs11. The other fields are those of Config.
type PKCS11Config struct {
	Name        string
	Binary      string
	SHA256      string
	Dev         bool
	Module      string
	TokenLabel  string
	TokenSerial string
	PIN         func(context.Context) ([]byte, error)
	Env         map[string]string
	Log         *slog.Logger
	Deadline    time.Duration
	SocketDir   string
	Limits      Limits
}

// NewPKCS11 returns a host for a PKCS#11 token. Its plugin is trustd-pkcs11, which verifies each signature itself.
func NewPKCS11(c PKCS11Config) *Host {
	return New(Config{
		Name: c.Name, Binary: c.Binary, SHA256: c.SHA256, Dev: c.Dev, Kind: "pkcs11",
		Settings: map[string]string{"module": c.Module, "token": c.TokenLabel, settingSerial: c.TokenSerial},
		PIN:      c.PIN, Env: c.Env, Log: c.Log, Deadline: c.Deadline, SocketDir: c.SocketDir, Limits: c.Limits,
		Verified: true,
	})
}

// A Host is a backend in a child process. Methods called before the child is up wait for it.
type Host struct {
	cfg Config

	phase    atomic.Pointer[phase]
	restarts atomic.Int64
	refused  atomic.Pointer[fault.Error] // the device's refusal of the PIN: nothing reaches it until Unlock
	serial   atomic.Pointer[string]      // of the token, as the first child that knew it said
	parallel atomic.Int64
	failures tally // of all children, and their deaths
	unlocks  chan *unlocking

	// The supervisor's own.
	sum      []byte   // of the binary, pinned
	seen     string   // how the binary looked when it was last tried
	pin      pinState // what is known of the PIN
	lastDown string   // what was logged last

	mu      sync.Mutex
	calls   int           // under way
	closing chan struct{} // closed by Close
	closed  bool
	idle    chan struct{} // closed when closed and no call is under way
	running chan struct{} // closed when Run has ended; nil before Run
}

var (
	_ signer.Backend        = (*Host)(nil)
	_ signer.Importer       = (*Host)(nil)
	_ signer.Parallel       = (*Host)(nil)
	_ signer.FailureCounter = (*Host)(nil)
	_ signer.Unlocker       = (*Host)(nil)
)

const (
	defaultDeadline = 10 * time.Second
	startLimit      = 15 * time.Second // from exec to handshake
	configureLimit  = 60 * time.Second // C_Initialize and C_Login on a slow HSM
	slowLimit       = 3 * time.Minute  // making an RSA key on a slow HSM
	patience        = 2 * time.Second  // a restart within this is waited for
)

// New returns a host. It starts nothing; Run does.
func New(cfg Config) *Host {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Deadline <= 0 {
		cfg.Deadline = defaultDeadline
	}
	if cfg.Kind == "" {
		cfg.Kind = KindPlugin
	}
	cfg.Limits = cfg.Limits.orDefault()
	cfg.Env = maps.Clone(cfg.Env)
	cfg.Settings = maps.Clone(cfg.Settings)
	cfg.Log = cfg.Log.With("backend", cfg.Name)
	h := &Host{cfg: cfg, unlocks: make(chan *unlocking), closing: make(chan struct{}), idle: make(chan struct{})}
	h.pin.salt = newSalt()
	h.parallel.Store(int64(runtime.NumCPU()))
	h.phase.Store(&phase{
		soon: true, err: fault.New(fault.DeviceDead, "the plugin is not running"), state: signer.Recovering,
		problem: "the plugin has not been started yet", over: make(chan struct{}),
	})
	return h
}

// Run starts the child, watches it and starts it again until ctx ends or Close is called. It returns nil then, and
// leaves no process behind. It may be called once.
func (h *Host) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	h.mu.Lock()
	if h.running != nil {
		h.mu.Unlock()
		return fault.New(fault.Internal, "the plugin host runs already")
	}
	done := make(chan struct{})
	h.running = done
	h.mu.Unlock()
	defer close(done)
	go func() {
		select {
		case <-h.closing:
			cancel()
		case <-ctx.Done():
		}
	}()
	// The kernel sends the parent-death signal when the thread that forked ends, not the process: this thread
	// forks all children and ends after them.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	h.supervise(ctx)
	h.enter(&phase{err: fault.New(fault.DeviceDead, "the plugin host has stopped"), state: signer.Stopped,
		problem: "the plugin host has stopped"})
	return nil
}

// Parallel implements signer.Parallel: what the child says; before there was one, the number of processors.
func (h *Host) Parallel() int { return int(h.parallel.Load()) }

// Failures implements signer.FailureCounter: the children's counts, and as module_dead each child that died, hung or
// did not start.
func (h *Host) Failures() map[signer.Class]uint64 {
	return h.failures.counts()
}

// child returns the connection to the child, waiting for one that is about to come.
func (h *Host) child(ctx context.Context) (*conn, error) {
	c, err := h.await(ctx, func(p *phase) bool { return p.soon })
	if e := h.refused.Load(); e != nil {
		return nil, e
	}
	return c, err
}

// anyChild is child also where the device refused the PIN, and does not wait for the end of a crash loop.
func (h *Host) anyChild(ctx context.Context) (*conn, error) {
	return h.await(ctx, func(p *phase) bool { return p.soon && p.state != signer.CrashLoop })
}

// await returns the connection to the child once there is one, as long as the phases are worth waiting for.
func (h *Host) await(ctx context.Context, worthIt func(*phase) bool) (*conn, error) {
	p := h.phase.Load()
	if p.conn != nil {
		return p.conn, nil
	}
	limit := time.NewTimer(startLimit + configureLimit)
	defer limit.Stop()
	for p.conn == nil {
		if !worthIt(p) {
			return nil, p.err
		}
		select {
		case <-p.over:
		case <-ctx.Done():
			return nil, fault.From(ctx.Err())
		case <-limit.C:
			return nil, p.err
		}
		p = h.phase.Load()
	}
	return p.conn, nil
}

// begin counts a call in; the host stops after the last one.
func (h *Host) begin() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return fault.New(fault.DeviceLost, "the backend is closed")
	}
	h.calls++
	return nil
}

func (h *Host) end() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.calls--
	if h.closed && h.calls == 0 {
		close(h.idle)
	}
}

// Close waits for what is in flight and ends Run.
func (h *Host) Close() error {
	h.mu.Lock()
	first := !h.closed
	h.closed = true
	running := h.running
	if first && h.calls == 0 {
		close(h.idle)
	}
	h.mu.Unlock()
	<-h.idle
	if first {
		close(h.closing)
	}
	if running != nil {
		<-running
	}
	return nil
}

// Calls returns how many calls are under way.
func (h *Host) Calls() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.calls
}

func verbose(err error) string {
	if err == nil {
		return ""
	}
	var e *fault.Error
	if errors.As(err, &e) {
		return e.Verbose()
	}
	return err.Error()
}
