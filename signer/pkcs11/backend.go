//go:build cgo

package pkcs11

import (
	"context"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/signer"
)

// A Config names a module and a token, and how to log in.
type Config struct {
	Module     string // path of the shared object
	TokenLabel string
	// TokenSerial may be empty: then the first token with the label to which the Backend logs in is the one, and its
	// serial is asked for as long as the Backend lives.
	TokenSerial string
	// PIN returns the PIN. The Backend asks for it at each login and clears the bytes after use.
	PIN      func(ctx context.Context) ([]byte, error)
	Sessions int // 0: as many as there are cores
	Log      *slog.Logger
	// Wrap, where it is set, returns what stands between the Backend and the module: tests inject faults there. It is
	// called once, before the first C_Initialize.
	Wrap func(Cryptoki) Cryptoki
}

// A Backend is a signer.Backend and signer.Importer for one token.
//
// Every call into the module holds one of the Backend's slots, of which there are as many as sessions; a repair
// takes them all. A call that outlives its context is left alone with its slot, and another takes the slot's place
// unless there are too many of those.
//
// While the token is gone the Backend tries to connect by itself, at growing intervals of at most 400 ms. A request
// that comes during a try waits for its outcome, bounded by its context; between two tries it fails at once with
// device_lost, which is retryable. After a refused authorisation nothing is tried until Unlock.
type Backend struct {
	cfg  Config
	load func() (*library, error)

	slots    chan *slot    // those not in use
	size     atomic.Int32  // how many are in circulation
	fewer    chan struct{} // says that size has shrunk
	hung     atomic.Int32  // calls that outlived their context
	growAt   atomic.Int64  // when a slot that was given up is tried again, in ns since start
	growWait atomic.Int64  // ns
	repair   chan struct{} // holds one token: whoever has it may connect, repair or close
	making   chan struct{} // the same for those that make and destroy keys

	link       atomic.Pointer[link]    // nil while there is no connection
	trouble    atomic.Pointer[trouble] // why there is none; nil before the first attempt
	refused    atomic.Pointer[failure] // the token's refusal of the authorisation: final until Unlock
	connecting atomic.Bool             // someone is at it
	serial     atomic.Pointer[string]  // of the token that was logged in to first
	known      known
	failures   counter
	closed     atomic.Bool

	life       context.Context // ends with Close; attempts run under it, because a caller's haste must not cut them short
	end        context.CancelFunc
	background sync.WaitGroup

	// Guarded by repair.
	mod     *module     // made once
	inside  bool        // mod is entered
	current *link       // of the last attempt, whether or not it became a connection
	keeping bool        // keep is running
	unclear int         // logins in a row of which the token did not say whether it refused the PIN
	doubts  []time.Time // when it was connected anew for a key that was missing
}

// trouble is why there is no connection, and when to try again.
type trouble struct {
	err  error
	wait time.Duration
	next time.Time
}

const (
	firstWait   = 50 * time.Millisecond
	longestTry  = 400 * time.Millisecond // between two attempts to connect
	slowestTry  = 2 * time.Second        // the same while it takes a person to change anything
	drainLimit  = 2 * time.Second
	closeLimit  = 5 * time.Second
	pinLimit    = 10 * time.Second
	maxHung     = 8
	busyTries   = 5 // repetitions
	busyPause   = 10 * time.Millisecond
	firstGrow   = time.Second
	slowestGrow = 10 * time.Second
)

// start is what moments in atomic integers are counted from.
var start = time.Now()

// New returns a backend. It touches nothing: the first call connects.
func New(cfg Config) *Backend {
	b := newBackend(cfg)
	b.load = func() (*library, error) { return load(cfg.Module) }
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
		cfg:      cfg,
		slots:    make(chan *slot, cfg.Sessions),
		repair:   make(chan struct{}, 1),
		making:   make(chan struct{}, 1),
		fewer:    make(chan struct{}, 1),
		failures: newCounter(),
	}
	b.life, b.end = context.WithCancel(context.Background())
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
	b.end()
	<-b.repair
	err := b.disconnect(closeLimit)
	b.trouble.Store(&trouble{err: errClosed()})
	b.repair <- struct{}{}
	b.background.Wait()
	return public(err)
}

func errClosed() error { return fault.New(fault.DeviceLost, "the backend is closed") }

// Parallel implements signer.Parallel: the number of sessions, less those for which the token has no room now.
func (b *Backend) Parallel() int { return int(b.size.Load()) }

var _ signer.Parallel = (*Backend)(nil)

// A call is what one operation does on a session.
type call[T any] func(s *slot) (T, error)

// do runs f on a session, acts on what the module says is lost, and repeats f once for each kind of loss.
// Its errors are those that callers see.
func do[T any](ctx context.Context, b *Backend, f call[T]) (T, error) {
	var zero T
	var tried map[signer.Class]int
	renew := false
	for {
		if err := ctx.Err(); err != nil {
			return zero, public(err)
		}
		l, err := b.connected(ctx)
		if err != nil {
			return zero, public(err)
		}
		v, err := enter(ctx, b, l, renew, f)
		if err == nil {
			return v, nil
		}
		if err == errReplaced {
			continue
		}
		if tried == nil {
			tried = map[signer.Class]int{}
		}
		kind := classOf(err)
		if isEmpty(err) {
			kind += "/empty" // a token that answered wrongly before may still have to be connected anew
		}
		tried[kind]++
		renew = renew || kind == signer.SessionLost // a loss seldom strikes one session alone
		if err := b.mend(ctx, l, err, tried[kind]); err != nil {
			return zero, public(err)
		}
	}
}

// mend does what the class of a failure asks for. It returns nil when the call is worth repeating, and otherwise
// what the caller gets. times counts the call's failures of this class.
func (b *Backend) mend(ctx context.Context, l *link, err error, times int) error {
	switch class := classOf(err); class {
	case signer.TransientBusy, signer.ResourcesExhausted:
		if class == signer.ResourcesExhausted {
			b.makeRoom()
		}
		if times <= busyTries && wait(ctx, busyPause<<(times-1)) {
			return nil
		}
		return err
	case signer.AuthorisationRefused:
		b.refuse(err)
		return err
	}
	if times > 1 && (!isEmpty(err) || times > absences) {
		return err
	}
	switch classOf(err) {
	case signer.SessionLost, signer.HandleLost:
		return nil // the session was dropped with the error; the handle was forgotten
	case signer.KeyGone:
		if said(err) { // the search for the key, which follows, has the last word
			return nil
		}
	case signer.LoginLost:
		return b.detach(ctx, func() error { return b.relogin(ctx, l) })
	case signer.TokenLost, signer.ModuleDead:
		return b.detach(ctx, func() error { return b.reconnect(ctx, l, err) })
	}
	return err
}

// enter runs f with a slot whose session belongs to l, and is a new one where renew says so. If ctx ends first, f goes
// on by itself and its slot is replaced, so that a call that hangs blocks nobody else.
func enter[T any](ctx context.Context, b *Backend, l *link, renew bool, f call[T]) (T, error) {
	for {
		s, err := b.take(ctx)
		if err != nil {
			var zero T
			return zero, err
		}
		if renew {
			s.generation = neverUsed
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
			gone := err == errShrunk // and its place is filled already, unless it was kept
			b.hung.Add(-1)
			if kept && !gone {
				b.slots <- s
			} else if !kept && gone {
				<-b.slots
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
	err := b.open(l, s)
	if err == nil {
		var v T
		if v, err = f(s); err == nil {
			return v, nil
		}
	}
	b.failures.add(err)
	var zero T
	return zero, err
}

// detach runs f, which may block in the module, and stops waiting for it when ctx ends.
func (b *Backend) detach(ctx context.Context, f func() error) error {
	if ctx.Done() == nil {
		return f()
	}
	done := make(chan error, 1)
	go func() { done <- f() }()
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
