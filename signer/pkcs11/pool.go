//go:build cgo

package pkcs11

import (
	"context"
	"errors"
	"time"

	"github.com/trustd/trustd/signer"
)

// A slot is the right to call into the module, with a session that is opened when first needed.
type slot struct {
	link       *link // the connection that the session belongs to; nil: no session
	session    sessionHandle
	generation uint32 // of the link's sessions
}

// neverUsed is the generation of a session that must not be used.
const neverUsed = ^uint32(0)

var (
	// errShrunk says that a slot left circulation, because the token has no session for it.
	errShrunk = errors.New("the token gives no more sessions")
	// errReplaced says that a repair came between choosing a connection and using it.
	errReplaced = errors.New("the connection was replaced")
)

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
	switch {
	case err == nil:
		if b.size.Load() < int32(b.cfg.Sessions) {
			b.grow()
		}
	case err == errShrunk:
		return
	default:
		switch classOf(err) {
		case "", signer.CallerError, signer.KeyGone, signer.HandleLost, signer.LoginLost:
		default:
			b.closeSession(s)
		}
	}
	b.slots <- s
}

// open gives the slot a session of l. While the caller holds the slot, l stands: a repair needs all slots.
func (b *Backend) open(l *link, s *slot) error {
	if b.link.Load() != l {
		return errReplaced
	}
	generation := l.generation.Load()
	if s.link == l && s.generation == generation {
		return nil
	}
	b.closeSession(s)
	h, err := l.mod.OpenSession(l.slot, sessionFlags)
	if err == nil {
		s.link, s.session, s.generation = l, h, generation
		l.sessions.Add(1)
		return nil
	}
	err = failed("C_OpenSession", err)
	if classOf(err) == signer.ResourcesExhausted && l.sessions.Load() > 0 && b.shrink() {
		b.failures.add(err)
		b.cfg.Log.Warn("the token gives no more sessions", "sessions", b.size.Load())
		return errShrunk
	}
	return err
}

// closeSession closes the slot's session. The caller holds the slot, so that the session's connection stands.
func (b *Backend) closeSession(s *slot) {
	if s.link != nil {
		_ = s.link.mod.CloseSession(s.session) // one that is lost cannot be closed
		s.link.sessions.Add(-1)
	}
	s.link = nil
}

// shrink takes one slot, the caller's, out of circulation, unless it is the last. It is missed again after a while.
func (b *Backend) shrink() bool {
	for {
		n := b.size.Load()
		if n <= 1 {
			return false
		}
		if b.size.CompareAndSwap(n, n-1) {
			pause := min(max(2*b.growWait.Load(), int64(firstGrow)), int64(slowestGrow))
			b.growWait.Store(pause)
			b.growAt.Store(int64(time.Since(start)) + pause)
			select {
			case b.fewer <- struct{}{}:
			default:
			}
			return true
		}
	}
}

// makeRoom gives up an idle slot and its session, where there is one, for the sake of the others.
func (b *Backend) makeRoom() {
	select {
	case s := <-b.slots:
		b.closeSession(s) // while the slot is still counted: a repair that waits for it must not overtake this
		if !b.shrink() {
			b.slots <- s
			return
		}
		b.cfg.Log.Warn("the token has no room: a session was given up", "sessions", b.size.Load())
	default:
	}
}

// quiet takes the other slots, as many as become free within limit, until the returned function is called.
func (b *Backend) quiet(limit time.Duration) (resume func()) {
	t := time.NewTimer(limit)
	defer t.Stop()
	var taken []*slot
	for late := false; !late && len(taken) < int(b.size.Load())-1; {
		select {
		case s := <-b.slots:
			taken = append(taken, s)
		case <-t.C:
			late = true
		}
	}
	return func() {
		for _, s := range taken {
			b.slots <- s
		}
	}
}

// grow brings one slot back into circulation when it is time to try.
func (b *Backend) grow() {
	now, at := int64(time.Since(start)), b.growAt.Load()
	if now < at || !b.growAt.CompareAndSwap(at, now+b.growWait.Load()) {
		return
	}
	n := b.size.Load()
	if n >= int32(b.cfg.Sessions) || !b.size.CompareAndSwap(n, n+1) {
		return
	}
	if n+1 == int32(b.cfg.Sessions) && now-at > b.growWait.Load() {
		b.growWait.Store(0)
	}
	b.slots <- new(slot)
}
