//go:build cgo

package pkcs11

import (
	"context"
	"log/slog"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/signer"
)

// A Config names a module and a token, and how to log in.
type Config struct {
	Module      string // path of the shared object
	TokenLabel  string
	TokenSerial string
	// PIN returns the PIN. The Backend asks for it at each login and clears the bytes after use.
	PIN      func(ctx context.Context) ([]byte, error)
	Sessions int // 0: as many as there are cores
	Log      *slog.Logger
}

// A Backend is a signer.Backend and signer.Importer for one token.
//
// Every call into the module holds one of the Backend's slots, of which there are as many as sessions; a repair
// takes them all. A call that outlives its context is left alone with its slot, and another takes the slot's place
// unless there are too many of those.
type Backend struct {
	cfg  Config
	load func() (*module, error)

	slots  chan *slot    // those not in use
	size   atomic.Int32  // how many are in circulation
	hung   atomic.Int32  // calls that outlived their context
	repair chan struct{} // holds one token: whoever has it may connect, repair or close
	making chan struct{} // the same for those that make and destroy keys

	link    atomic.Pointer[link]    // nil while there is no connection
	trouble atomic.Pointer[trouble] // why there is none; nil before the first attempt
	refused atomic.Pointer[failure] // the token's refusal of the PIN: final
	closed  atomic.Bool
	mod     *module // of the last connection; guarded by repair
}

// A slot is the right to call into the module, with a session that is opened when first needed.
type slot struct {
	link    *link // the connection that the session belongs to; nil: no session
	session sessionHandle
}

// trouble is why there is no connection, and when to try again.
type trouble struct {
	err  error
	wait time.Duration
	next time.Time
}

const (
	firstWait  = 50 * time.Millisecond
	longestTry = 5 * time.Second
	drainLimit = 5 * time.Second
	maxHung    = 8
)

// New returns a backend. It touches nothing: the first call connects.
func New(cfg Config) *Backend {
	b := newBackend(cfg)
	b.load = func() (*module, error) { return load(cfg.Module) }
	return b
}

func newBackend(cfg Config) *Backend {
	if cfg.Sessions <= 0 {
		cfg.Sessions = runtime.NumCPU()
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	b := &Backend{
		cfg:    cfg,
		slots:  make(chan *slot, cfg.Sessions),
		repair: make(chan struct{}, 1),
		making: make(chan struct{}, 1),
	}
	for range cfg.Sessions {
		b.slots <- new(slot)
	}
	b.size.Store(int32(cfg.Sessions))
	b.repair <- struct{}{}
	b.making <- struct{}{}
	return b
}

// Close waits for what is in flight, then logs out and finalises the module.
func (b *Backend) Close() error {
	if b.closed.Swap(true) {
		return nil
	}
	<-b.repair
	defer func() { b.repair <- struct{}{} }()
	err := b.disconnect(context.Background())
	b.trouble.Store(&trouble{err: errClosed()})
	return public(err)
}

func errClosed() error { return fault.New(fault.DeviceLost, "the backend is closed") }

// A call is what one operation does on a session.
type call[T any] func(s *slot) (T, error)

// do runs f on a session, acts on what the module says is lost, and repeats f once for each kind of loss.
// Its errors are those that callers see.
func do[T any](ctx context.Context, b *Backend, f call[T]) (T, error) {
	var zero T
	var tried map[signer.Class]int
	for {
		if err := ctx.Err(); err != nil {
			return zero, public(err)
		}
		l, err := b.connected(ctx)
		if err != nil {
			return zero, public(err)
		}
		v, err := enter(ctx, b, l, f)
		if err == nil {
			return v, nil
		}
		if tried == nil {
			tried = map[signer.Class]int{}
		}
		class := classOf(err)
		tried[class]++
		if err := b.mend(ctx, l, err, tried[class]); err != nil {
			return zero, public(err)
		}
	}
}

const busyTries = 4

// mend does what the class of a failure asks for. It returns nil when the call is worth repeating, and otherwise
// what the caller gets.
func (b *Backend) mend(ctx context.Context, l *link, err error, times int) error {
	class := classOf(err)
	if class == signer.TransientBusy {
		if times < busyTries && wait(ctx, firstWait/8<<times) {
			return nil
		}
		return err
	}
	if times > 1 {
		if isEmpty(err) { // a fresh connection to a healthy token does not show the key either
			return failing(signer.KeyGone, "finding the key", "no such object")
		}
		return err
	}
	switch class {
	case signer.SessionLost, signer.HandleLost:
		return nil // the session was dropped with the error; the handle was forgotten
	case signer.LoginLost:
		return b.detach(ctx, func(ctx context.Context) error { return b.relogin(ctx, l) })
	case signer.TokenLost, signer.ModuleDead:
		return b.detach(ctx, func(ctx context.Context) error { return b.reconnect(ctx, l, err) })
	}
	return err
}

// enter runs f with a slot whose session belongs to l. If ctx ends first, f goes on by itself and its slot is
// replaced, so that a call that hangs blocks nobody else.
func enter[T any](ctx context.Context, b *Backend, l *link, f call[T]) (T, error) {
	for {
		s, err := b.take(ctx)
		if err != nil {
			var zero T
			return zero, err
		}
		v, err := attempt(ctx, b, l, s, f)
		if err != errShrunk {
			return v, err
		}
	}
}

func attempt[T any](ctx context.Context, b *Backend, l *link, s *slot, f call[T]) (T, error) {
	if ctx.Done() == nil {
		v, err := run(b, l, s, f)
		b.put(s, err)
		return v, err
	}
	type outcome struct {
		v   T
		err error
	}
	var left atomic.Bool // set by whoever comes first: the call's end, or the context's
	var kept bool        // with the context first: the slot is not replaced, and goes back with the call
	done := make(chan outcome, 1)
	go func() {
		v, err := run(b, l, s, f)
		if left.Swap(true) {
			b.closeSession(s)
			b.hung.Add(-1)
			if kept {
				b.slots <- s
			}
			return
		}
		b.put(s, err)
		done <- outcome{v, err}
	}()
	select {
	case o := <-done:
		return o.v, o.err
	case <-ctx.Done():
	}
	kept = b.hung.Add(1) > maxHung
	if left.Swap(true) { // it ended just now
		b.hung.Add(-1)
		o := <-done
		return o.v, o.err
	}
	if !kept {
		b.slots <- new(slot)
	}
	var zero T
	return zero, ctx.Err()
}

func run[T any](b *Backend, l *link, s *slot, f call[T]) (T, error) {
	if err := b.open(l, s); err != nil {
		var zero T
		return zero, err
	}
	return f(s)
}

// take returns a slot, waiting for one until ctx ends.
func (b *Backend) take(ctx context.Context) (*slot, error) {
	select {
	case s := <-b.slots:
		return s, nil
	default:
	}
	select {
	case s := <-b.slots:
		return s, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// put gives a slot back, without its session when the session was lost or may be in an unknown state.
func (b *Backend) put(s *slot, err error) {
	if err == errShrunk {
		return
	}
	switch classOf(err) {
	case "", signer.CallerError, signer.KeyGone, signer.HandleLost:
	default:
		b.closeSession(s)
	}
	b.slots <- s
}

// detach runs f, which may block in the module, and stops waiting for it when ctx ends.
func (b *Backend) detach(ctx context.Context, f func(context.Context) error) error {
	if ctx.Done() == nil {
		return f(ctx)
	}
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// wait pauses for d and reports whether ctx is still alive.
func wait(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
