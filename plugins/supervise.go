package plugins

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/plugins/signerpb"
	"github.com/trustd/trustd/signer"
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

func (h *Host) enter(p *phase) {
	p.over = make(chan struct{})
	close(h.phase.Swap(p).over)
}

const (
	firstPause   = 100 * time.Millisecond
	longestPause = 800 * time.Millisecond
	loopAfter    = 3                // deaths in a row are a crash loop
	lasting      = 10 * time.Second // a child that lived this long starts the pauses anew
	trial        = 2 * time.Second  // one that lived this long is ready, also without a signature to prove it
	lookAgain    = 200 * time.Millisecond
	secretAgain  = time.Second
	// unclearLimit is how many children in a row may die after they took a PIN that never worked, without a word on
	// it, before that counts as a refusal: a device that gives three tries must keep one.
	unclearLimit = 2
)

// unlocking is an operator's wish to have the authorisation tried once more.
type unlocking struct {
	was  *fault.Error // the refusal that it is about
	done chan error   // holds one
}

// Unlock implements signer.Unlocker: it forgets the refusal, reads the PIN anew, starts another child, and returns when
// that one has said how it fares. The device sees one attempt at most, also when calls come at the same time: these
// share it. Without a refusal Unlock only reports whether there is a child.
func (h *Host) Unlock(ctx context.Context) error {
	if err := h.begin(); err != nil {
		return err
	}
	defer h.end()
	was := h.refused.Load()
	if was == nil {
		_, err := h.child(ctx)
		return err
	}
	u := &unlocking{was: was, done: make(chan error, 1)}
	for {
		p := h.phase.Load()
		select {
		case h.unlocks <- u:
			select {
			case err := <-u.done:
				return err
			case <-ctx.Done():
				return fault.From(ctx.Err())
			}
		case <-p.over: // the supervisor may have ended
			if now := h.phase.Load(); now.conn == nil && now.state == signer.Stopped && !now.soon {
				return now.err
			}
		case <-ctx.Done():
			return fault.From(ctx.Err())
		}
	}
}

var errUnlock = errors.New("an operator has the authorisation tried again")

func (h *Host) supervise(ctx context.Context) {
	deaths := 0
	var wish *unlocking // whose outcome the next start is
	defer func() {
		if wish != nil {
			wish.done <- fault.New(fault.DeviceDead, "the plugin host has stopped")
		}
	}()
	for ctx.Err() == nil {
		starting := &phase{soon: true, err: fault.New(fault.DeviceDead, "the plugin is being started"),
			state: signer.Recovering, problem: "the plugin is being started", remedy: "none is needed unless it lasts"}
		if before := h.phase.Load(); before.state == signer.CrashLoop && wish == nil {
			starting.state, starting.problem, starting.remedy = before.state, before.problem, before.remedy
		}
		h.enter(starting)
		if wish != nil {
			h.refused.CompareAndSwap(wish.was, nil)
		}
		began := time.Now()
		c, err := h.start(ctx, wish != nil)
		if wish != nil {
			wish.done <- h.outcome(err)
			wish = nil
		}
		if err == nil {
			h.cfg.Log.Info("plugin started", "pid", c.pid)
			h.lastDown = ""
			c.since = time.Now()
			c.proved.Store(deaths == 0)
			h.enter(&phase{conn: c})
			wish, err = c.watch(ctx)
			if ctx.Err() == nil {
				h.restarts.Add(1)
			}
			h.enter(&phase{soon: true, err: fault.New(fault.DeviceDead, "the plugin process died"),
				state: signer.Recovering, problem: "the plugin process died and is being started again"})
			h.drain(ctx)
			c.stop(ctx.Err() != nil || wish != nil)
			h.bury(c, ctx.Err() == nil && wish == nil)
			err = c.reason(err)
		}
		if ctx.Err() != nil {
			return
		}
		if wish != nil {
			deaths = 0
			continue
		}
		if time.Since(began) > lasting {
			deaths = 0
		}
		if died(err) {
			deaths++
		}
		if wish = h.pause(ctx, deaths, err); wish != nil {
			deaths = 0
		}
	}
}

// outcome is what Unlock returns after a start that ended with err.
func (h *Host) outcome(err error) error {
	if e := h.refused.Load(); e != nil {
		return e
	}
	if err == nil {
		return nil
	}
	return down(err)
}

// bury counts a child's death unless it was asked to end, and notes what its life says of the PIN.
func (h *Host) bury(c *conn, death bool) {
	if death {
		h.failures.add(signer.ModuleDead)
	}
	if c.settled.Load() {
		h.pin.works()
	}
	if death && c.taken.Load() {
		h.dieWithPIN(c.operator)
	}
}

// dieWithPIN notes that a child died after it had taken the PIN and before it said how the device liked it.
func (h *Host) dieWithPIN(operator bool) {
	if h.pin.worked() {
		return
	}
	if h.pin.unclear++; h.pin.unclear < unclearLimit && !operator {
		return
	}
	h.pin.unclear = 0
	h.refuse(fault.New(fault.AuthorisationRefused,
		"the plugin died with the PIN in hand, and whether the device took it is not known"))
}

// pinState remembers which PIN has worked, as a keyed hash, and how many children died before one had.
type pinState struct {
	salt    []byte
	current [sha256.Size]byte // of the PIN that was given last
	good    [sha256.Size]byte // of the one with which a child was ready last
	unclear int
}

func newSalt() []byte {
	salt := make([]byte, sha256.Size)
	_, _ = rand.Read(salt) // never fails
	return salt
}

func (p *pinState) give(pin []byte) {
	mac := hmac.New(sha256.New, p.salt)
	_, _ = mac.Write(pin)
	mac.Sum(p.current[:0])
}

func (p *pinState) works() { p.good, p.unclear = p.current, 0 }

func (p *pinState) worked() bool { return hmac.Equal(p.good[:], p.current[:]) }

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

// pause waits before the next start: not at all after a first death, ever longer in a crash loop, for a change of the
// file after a wrong binary, and for an operator after a refused PIN. It returns the operator's wish.
func (h *Host) pause(ctx context.Context, deaths int, err error) *unlocking {
	p := &phase{err: down(err)}
	p.state, p.problem, p.remedy = diagnose(err)
	wait := time.Duration(0)
	var changed func() bool
	switch {
	case h.refused.Load() != nil:
		p.err, p.state, p.problem, p.remedy = h.refused.Load(), signer.Locked, problemLocked, h.remedyLocked()
		wait = -1
	case aboutBinary(err):
		changed, wait = func() bool { return look(h.cfg.Binary) != h.seen }, -1
	case p.state == signer.Stopped:
		wait = secretAgain // reading it again touches no device
	case err != nil && !died(err): // nothing died, so nothing is gained by haste
		wait = secretAgain
	case deaths > 1:
		wait = min(firstPause<<min(deaths-2, 10), longestPause)
		p.err.RetryAfter = wait
	}
	if deaths >= loopAfter && died(err) && p.state != signer.Locked {
		p.state = signer.CrashLoop
		p.problem = fmt.Sprintf("the plugin died %d times in a row; the last time %s", deaths, last(err))
		p.remedy = "it is started again by itself, at growing intervals; the log has what it wrote"
	}
	p.soon = wait >= 0 && wait <= patience && p.state != signer.Stopped
	level := slog.LevelWarn
	if what := string(p.state) + verbose(err); what == h.lastDown {
		level = slog.LevelDebug // said already
	} else {
		h.lastDown = what
	}
	h.cfg.Log.Log(ctx, level, "plugin down", "state", p.state, "err", verbose(err), "deaths", deaths,
		"restart_in", max(wait, 0))
	h.enter(p)
	var timer, poll <-chan time.Time
	if wait >= 0 {
		t := time.NewTimer(wait)
		defer t.Stop()
		timer = t.C
	}
	if changed != nil {
		t := time.NewTicker(lookAgain)
		defer t.Stop()
		poll = t.C
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer:
			return nil
		case <-poll:
			if changed() {
				return nil
			}
		case u := <-h.unlocks:
			if h.stands(u) {
				return u
			}
		}
	}
}

// stands reports whether the refusal that an operator wants to have forgotten still stands, and answers if not.
func (h *Host) stands(u *unlocking) bool {
	now := h.refused.Load()
	if now == u.was {
		return true
	}
	if now != nil { // refused anew meanwhile
		u.done <- now
	} else {
		u.done <- nil
	}
	return false
}

// down is what callers get while there is no child.
func down(err error) *fault.Error {
	var e *fault.Error
	if errors.As(err, &e) {
		own := *e // its RetryAfter is set for this phase
		return &own
	}
	return fault.Wrap(fault.DeviceDead, err, "the plugin process is down")
}

// unlock has the new child's backend try the authorisation that it declined to try by itself, such as the last before
// the PIN locks. It does nothing where an attempt was made.
func (h *Host) unlock(ctx context.Context, c *conn) {
	if h.refused.Load() == nil || c.taken.Load() {
		return
	}
	before := h.refused.Swap(nil)
	r, err := c.rpc.Unlock(ctx, &signerpb.UnlockRequest{})
	switch failed := decodeError(r.GetError()); {
	case err != nil || errors.Is(failed, fault.Unsupported):
		h.refused.CompareAndSwap(nil, before)
	case failed != nil && signer.ClassOf(failed) == signer.AuthorisationRefused:
		h.refuse(fault.From(failed))
	}
}
