// Package plugins runs key backends in processes of their own, because a vendor's module may crash, hang or leak,
// and because cgo would cost the daemon its static binary (DESIGN.md section 4).
//
// A Host is the daemon's end: a signer.Backend whose device lives in a child process that Run starts, watches,
// kills when it hangs and starts again. Serve is the child's end.
package plugins

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/plugins/signerpb"
	"github.com/trustd/trustd/signer"
)

// PKCS11Config names a plugin binary, a module and a token.
type PKCS11Config struct {
	Name   string // of the backend, for the log
	Binary string // path of trustd-pkcs11
	// SHA256 is the binary's checksum in hexadecimal digits. Where it is empty, the checksum at the first start is
	// the one that each restart demands.
	SHA256      string
	Module      string
	TokenLabel  string
	TokenSerial string
	// PIN returns the PIN; it is asked for at each start of the child and cleared after use.
	PIN func(context.Context) ([]byte, error)
	// Env is all of the child's environment that is the module's business, such as SOFTHSM2_CONF. Nothing of the
	// daemon's own environment reaches the child.
	Env map[string]string
	Log *slog.Logger
	// Deadline bounds one signing call to the device (0: 10 s). A child with an older one is killed.
	Deadline time.Duration
	// SocketDir is where the folder with the child's socket is made ("" or too long a path: the system's folder
	// for temporary files).
	SocketDir string
}

// A Host is a backend in a child process. Methods called before the child is up wait for it.
type Host struct {
	cfg PKCS11Config

	phase    atomic.Pointer[phase]
	restarts atomic.Int64
	refused  atomic.Pointer[fault.Error] // the token's refusal of the PIN: no child is configured again
	sum      []byte                      // of the binary, pinned; the supervisor's own
	lastDown string                      // what was logged last; the supervisor's own

	mu      sync.Mutex
	calls   int           // under way
	closing chan struct{} // closed by Close
	closed  bool
	idle    chan struct{} // closed when closed and no call is under way
	running chan struct{} // closed when Run has ended; nil before Run
}

var (
	_ signer.Backend  = (*Host)(nil)
	_ signer.Importer = (*Host)(nil)
)

// A phase is what the supervisor says of the child. Phases do not change; they are replaced.
type phase struct {
	conn    *conn // nil while there is no child
	soon    bool  // there will be another phase shortly: wait for it
	err     *fault.Error
	state   signer.State
	problem string
	remedy  string
	over    chan struct{} // closed when the next phase begins
}

const (
	defaultDeadline = 10 * time.Second
	startLimit      = 15 * time.Second // from exec to handshake
	configureLimit  = 60 * time.Second // C_Initialize and C_Login on a slow HSM
	slowLimit       = 3 * time.Minute  // making an RSA key on a slow HSM
	patience        = 2 * time.Second  // a restart within this is waited for
	firstPause      = 100 * time.Millisecond
	longestPause    = 10 * time.Second
	settled         = 10 * time.Second // a child that lived this long starts the pauses anew
)

// NewPKCS11 returns a host. It starts nothing; Run does.
func NewPKCS11(cfg PKCS11Config) *Host {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Deadline <= 0 {
		cfg.Deadline = defaultDeadline
	}
	cfg.Env = maps.Clone(cfg.Env)
	cfg.Log = cfg.Log.With("backend", cfg.Name)
	h := &Host{cfg: cfg, closing: make(chan struct{}), idle: make(chan struct{})}
	h.phase.Store(&phase{
		soon: true, err: fault.New(fault.DeviceDead, "the plugin is not running"), state: signer.Degraded,
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

func (h *Host) supervise(ctx context.Context) {
	failures := 0
	for ctx.Err() == nil {
		h.enter(&phase{soon: true, err: fault.New(fault.DeviceDead, "the plugin is being started"), state: signer.Degraded,
			problem: "the plugin is being started"})
		started := time.Now()
		c, err := h.start(ctx)
		if err == nil {
			h.cfg.Log.Info("plugin started", "pid", c.pid)
			h.lastDown = ""
			h.enter(&phase{conn: c})
			err = c.watch(ctx, h.cfg.Deadline)
			if ctx.Err() == nil {
				h.restarts.Add(1)
			}
			h.enter(&phase{soon: true, err: fault.New(fault.DeviceDead, "the plugin process died"), state: signer.Degraded,
				problem: "the plugin process died and is being started again"})
			h.drain(ctx)
			c.stop(ctx.Err() != nil)
		}
		if ctx.Err() != nil {
			return
		}
		if time.Since(started) > settled {
			failures = 0
		}
		if !h.pause(ctx, failures, err) {
			return
		}
		failures++
	}
}

// drain lets calls that are under way finish when the host is told to stop.
func (h *Host) drain(ctx context.Context) {
	if ctx.Err() == nil {
		return
	}
	h.mu.Lock()
	if !h.closed {
		h.closed = true
		close(h.closing)
		if h.calls == 0 {
			close(h.idle)
		}
	}
	h.mu.Unlock()
	select {
	case <-h.idle:
	case <-time.After(h.cfg.Deadline):
	}
}

// pause waits before the next start: not at all after a first failure, and for an operator after a refused PIN.
func (h *Host) pause(ctx context.Context, failures int, err error) bool {
	p := &phase{}
	wait := time.Duration(0)
	if failures > 0 {
		wait = min(firstPause<<min(failures-1, 10), longestPause)
	}
	p.state, p.problem, p.remedy = diagnose(err)
	p.err = fault.Wrap(fault.DeviceDead, err, "the plugin process is down")
	var e *fault.Error
	if errors.As(err, &e) {
		p.err = e
	}
	p.soon = wait <= patience && p.state != signer.Stopped
	p.err.RetryAfter = wait
	if refused := h.refused.Load(); refused != nil {
		p.err, p.state, p.soon = refused, signer.Stopped, false
		p.problem, p.remedy = "the token refused the PIN, which is not tried again", fault.AuthorisationRefused.Hint()
		h.enter(p)
		h.cfg.Log.Error("plugin not started again: the token refused the PIN")
		<-ctx.Done()
		return false
	}
	level := slog.LevelWarn
	if what := verbose(err); what == h.lastDown {
		level = slog.LevelDebug // said already
	} else {
		h.lastDown = what
	}
	h.cfg.Log.Log(ctx, level, "plugin down", "err", verbose(err), "restart_in", wait)
	h.enter(p)
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

func (h *Host) enter(p *phase) {
	p.over = make(chan struct{})
	close(h.phase.Swap(p).over)
}

// child returns the connection to the child, waiting for one that is about to come.
func (h *Host) child(ctx context.Context) (*conn, error) {
	p := h.phase.Load()
	if p.conn != nil {
		return p.conn, nil
	}
	limit := time.NewTimer(startLimit + configureLimit)
	defer limit.Stop()
	for p.conn == nil {
		if !p.soon {
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

// remote runs one unary call in the child. When the child dies meanwhile and repeating is safe, it is repeated
// once in the next child.
func remote[T any](ctx context.Context, h *Host, c callKind,
	f func(context.Context, *conn) (T, *signerpb.Error, error)) (T, error) {
	var zero T
	if err := ctx.Err(); err != nil {
		return zero, fault.From(err)
	}
	if err := h.begin(); err != nil {
		return zero, err
	}
	defer h.end()
	for try := 0; ; try++ {
		conn, err := h.child(ctx)
		if err != nil {
			return zero, err
		}
		limited, cancel := context.WithTimeoutCause(ctx, max(c.limit, h.cfg.Deadline), errHang)
		v, remoteErr, err := f(limited, conn)
		hung := errors.Is(context.Cause(limited), errHang)
		cancel()
		switch {
		case err == nil && remoteErr == nil:
			return v, nil
		case err == nil:
			return zero, h.noticed(decodeError(remoteErr))
		case ctx.Err() != nil:
			return zero, fault.From(ctx.Err())
		case hung:
			err = errHang
		}
		conn.suspect(err)
		// Also when the call is not repeated: the caller's next one must not meet the same child.
		waited := conn.gone(ctx)
		if hung || !c.repeat || try > 0 {
			return zero, fault.Wrap(fault.DeviceDead, err, "the plugin process died during the call")
		}
		if waited != nil {
			return zero, waited
		}
	}
}

// A callKind says how long a call may take and whether it may be made twice.
type callKind struct {
	limit  time.Duration
	repeat bool
}

var (
	quick  = callKind{0, true}
	slow   = callKind{slowLimit, true}
	making = callKind{slowLimit, false}

	errHang = errors.New("a call to the device does not come back")
)

// noticed remembers that the token refused the PIN: a next child must not try it again.
func (h *Host) noticed(err error) error {
	if ClassOf(err) == signer.AuthorisationRefused && fault.CodeOf(err) == fault.AuthorisationRefused {
		h.refused.CompareAndSwap(nil, fault.From(err))
	}
	return err
}

// Describe implements signer.Backend.
func (h *Host) Describe(ctx context.Context) signer.Description {
	d, err := remote(ctx, h, quick, func(ctx context.Context, c *conn) (signer.Description, *signerpb.Error, error) {
		r, err := c.rpc.Describe(ctx, &signerpb.DescribeRequest{})
		if err != nil {
			return signer.Description{}, nil, err
		}
		d := decodeDescription(r)
		d.Limits["plugin_pid"] = strconv.Itoa(c.pid)
		return d, r.GetError(), nil
	})
	if err != nil {
		d = signer.Description{
			Kind: "pkcs11", Device: h.cfg.TokenLabel, Grade: signer.HardwareClaimed, Limits: map[string]string{},
		}
		d.State, d.Problem, d.Remedy = diagnose(err)
		if p := h.phase.Load(); p.conn == nil {
			d.State, d.Problem, d.Remedy = p.state, p.problem, p.remedy
		}
	}
	d.Limits["plugin_restarts"] = strconv.FormatInt(h.restarts.Load(), 10)
	return d
}

// Generate implements signer.Backend.
func (h *Host) Generate(ctx context.Context, id signer.ID, alg ident.Algorithm) (signer.Key, error) {
	return h.made(ctx, making, func(ctx context.Context, c *conn) (*signerpb.KeyResponse, error) {
		return c.rpc.Generate(ctx, &signerpb.GenerateRequest{Id: id.Bytes(), Algorithm: uint32(alg)})
	})
}

// Import implements signer.Importer.
func (h *Host) Import(ctx context.Context, id signer.ID, pkcs8 []byte) (signer.Key, error) {
	return h.made(ctx, making, func(ctx context.Context, c *conn) (*signerpb.KeyResponse, error) {
		return c.rpc.Import(ctx, &signerpb.ImportRequest{Id: id.Bytes(), Pkcs8: pkcs8})
	})
}

// Open implements signer.Backend.
func (h *Host) Open(ctx context.Context, id signer.ID, pub ident.PublicKey) (signer.Key, error) {
	if pub.IsZero() {
		return nil, fault.BadField("public_key", "a key is opened together with its public key")
	}
	return h.made(ctx, quick, func(ctx context.Context, c *conn) (*signerpb.KeyResponse, error) {
		return c.rpc.Open(ctx, &signerpb.OpenRequest{Id: id.Bytes(), Spki: pub.SPKI()})
	})
}

// made runs a call that leaves a key open in the child.
func (h *Host) made(ctx context.Context, kind callKind,
	f func(context.Context, *conn) (*signerpb.KeyResponse, error)) (signer.Key, error) {
	return remote(ctx, h, kind, func(ctx context.Context, c *conn) (signer.Key, *signerpb.Error, error) {
		r, err := f(ctx, c)
		if err != nil || r.GetError() != nil {
			return nil, r.GetError(), err
		}
		info := decodeInfo(r.GetInfo())
		if info.Problem != "" || info.Public.IsZero() || r.GetRef() == 0 {
			return nil, encodeError(fault.New(fault.DeviceDead, "the plugin returned a key that cannot be used")), nil
		}
		k := &key{host: h, info: info}
		k.open.Store(&opened{c, r.GetRef()})
		return k, nil, nil
	})
}

// Find implements signer.Backend.
func (h *Host) Find(ctx context.Context, id signer.ID) (signer.KeyInfo, error) {
	return remote(ctx, h, quick, func(ctx context.Context, c *conn) (signer.KeyInfo, *signerpb.Error, error) {
		r, err := c.rpc.Find(ctx, &signerpb.FindRequest{Id: id.Bytes()})
		return decodeInfo(r.GetInfo()), r.GetError(), err
	})
}

// Keys implements signer.Backend.
func (h *Host) Keys(ctx context.Context) ([]signer.KeyInfo, error) {
	return remote(ctx, h, slow, func(ctx context.Context, c *conn) ([]signer.KeyInfo, *signerpb.Error, error) {
		r, err := c.rpc.Keys(ctx, &signerpb.KeysRequest{})
		var out []signer.KeyInfo
		for _, k := range r.GetKeys() {
			out = append(out, decodeInfo(k))
		}
		return out, r.GetError(), err
	})
}

// Destroy implements signer.Backend.
func (h *Host) Destroy(ctx context.Context, id signer.ID) error {
	_, err := remote(ctx, h, quick, func(ctx context.Context, c *conn) (struct{}, *signerpb.Error, error) {
		r, err := c.rpc.Destroy(ctx, &signerpb.DestroyRequest{Id: id.Bytes()})
		return struct{}{}, r.GetError(), err
	})
	return err
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

// Calls returns how many calls are under way.
func (h *Host) Calls() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.calls
}
