// Package monitor says whether a key backend can sign. Only a signature proves that: one that somebody has just asked
// for, or else one by a canary, a key of the monitor's own on the same device, which waits its turn like any other. What
// the backend says of itself only explains why there is no proof.
package monitor

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"strconv"
	"sync"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/clock"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/batch"
)

const (
	// A proof counts for proofAge; a canary signs when the last one is proofEvery old.
	proofEvery = 30 * time.Second
	proofAge   = 45 * time.Second
	// The pauses between canaries while there is no proof.
	firstPause   = 200 * time.Millisecond
	longestPause = 500 * time.Millisecond
	// lockedPause is how often a locked device is looked at; nothing is signed.
	lockedPause = 30 * time.Second

	describeLimit = 5 * time.Second
	describeEvery = time.Second // while there is no proof
	canaryLimit   = 10 * time.Second
	makeLimit     = time.Minute
)

// Config is what a Monitor stands on. Every field is needed.
type Config struct {
	Name    string // of the backend in the configuration
	Backend signer.Backend
	// Line puts a key into the queue of the backend's device.
	Line  func(batch.Target) *batch.Key
	Dir   string // of the records of canary keys, one file a backend
	Clock clock.Clock
	Log   *slog.Logger
}

// A Monitor watches one backend. It is safe for concurrent use. Until Run is called it signs nothing and knows only what
// it is told.
type Monitor struct {
	cfg    Config
	kick   chan struct{} // wakes Run; holds one
	judged chan struct{} // closed when Run has looked at the device once

	canary canary

	mu      sync.Mutex
	running bool

	proof    time.Duration // end of the last signature that was made, boot clock; 0: none yet
	proofAt  time.Time     // the same by the wall clock
	failed   time.Duration // the last sign that there is no device to sign with; 0: none yet
	cause    *fault.Error  // of that; nil where it was a Description
	refused  bool          // the device refused the canary, which does not ask again until an operator has acted
	suspect  bool          // somebody's authorisation was refused: the device must say whose
	seen     signer.Description
	asked    time.Duration // when the backend was asked for it
	seenAt   time.Duration // until when it is known to hold; 0: never asked
	asking   chan struct{} // closed when the Describe under way has ended; nil: none is
	gone     string        // why the canary key cannot be used, where only an operator can mend it; "" where it can
	hindered *fault.Error  // why the last canary did not sign

	state   signer.State // as of since
	since   time.Time
	logged  signer.State
	figures Figures
}

// Figures count what a monitor has seen since it was made.
type Figures struct {
	Failures       map[signer.Class]uint64 // of the device, by class; repaired ones too, where the backend counts them
	Changes        map[signer.State]uint64 // into this state
	Direct         uint64                  // direct signatures, those of canaries included
	Batches        uint64                  // batched signatures
	Batched        uint64                  // messages that those cover
	Canaries       uint64                  // signatures asked of the canary key
	CanariesFailed uint64                  // of those
	CanaryTook     time.Duration           // by the last one that was made, the wait for its turn included
	Restarts       uint64                  // of the backend's process
}

// A Status is how a backend fares.
type Status struct {
	State         signer.State
	Since         time.Time // State; zero where it was never judged
	Problem       string    // why State is not Ready: safe to show
	Remedy        string
	LastSignature time.Time // zero: none yet
	Device        signer.Description
	Described     bool   // Device holds an answer
	CanaryGone    bool   // an operator must act: the device was emptied or replaced
	CanaryKey     string // the canary key's id in hexadecimal digits; "" where there is none
	CanaryPublic  string // its fingerprint
	Figures
}

// New returns a monitor. It starts nothing.
func New(cfg Config) *Monitor {
	m := &Monitor{cfg: cfg, kick: make(chan struct{}, 1), judged: make(chan struct{})}
	m.cfg.Log = cfg.Log.With("backend", cfg.Name)
	m.canary = canary{m: m, turn: make(chan struct{}, 1)}
	m.figures.Failures, m.figures.Changes = map[signer.Class]uint64{}, map[signer.State]uint64{}
	return m
}

// Run watches the backend until ctx ends, and returns nil then. It may be called once.
func (m *Monitor) Run(ctx context.Context) error {
	m.mu.Lock()
	if m.running {
		m.mu.Unlock()
		return errors.New("monitor: it runs already")
	}
	m.running = true
	m.mu.Unlock()
	pause := firstPause
	timer := time.NewTimer(0)
	defer timer.Stop()
	first := true
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-m.kick:
			if !timer.Stop() {
				select {
				case <-timer.C:
				default:
				}
			}
		}
		next := m.round(ctx)
		if ctx.Err() != nil {
			return nil
		}
		m.report(ctx)
		if first {
			first = false
			close(m.judged)
		}
		if next == 0 {
			next, pause = pause, min(pause*3/2, longestPause)
		} else {
			pause = firstPause
		}
		timer.Reset(next)
	}
}

// Judged returns a channel that is closed when Run has looked at the device once.
func (m *Monitor) Judged() <-chan struct{} { return m.judged }

// Running reports whether Run was called.
func (m *Monitor) Running() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.running
}

// round looks after the backend once, and returns when to do so again: 0 for soon.
func (m *Monitor) round(ctx context.Context) time.Duration {
	m.mu.Lock()
	state, idle, began := m.judgeLocked(), m.cfg.Clock.Boot()-m.proof, m.canary.began
	accused := m.suspect
	suspect := accused || m.seenAt < m.failed || m.seenAt == 0
	m.mu.Unlock()
	switch {
	case state == signer.Ready && idle < proofEvery && !accused && began > 0: // the first makes the canary key
		return max(proofEvery-idle, firstPause)
	case state == signer.Locked && !suspect:
		m.Refresh(ctx, lockedPause)
		return lockedPause
	}
	// Whoever kicks cannot make the canary sign more often than it does by itself.
	if wait := firstPause - (m.cfg.Clock.Boot() - began); began > 0 && wait > 0 {
		return wait
	}
	if suspect || !m.canary.exists() {
		m.Refresh(ctx, describeEvery)
		if m.State() == signer.Locked {
			return lockedPause
		}
	}
	err := m.Prove(ctx)
	if ctx.Err() != nil {
		return 0
	}
	if err != nil {
		m.Refresh(ctx, describeEvery)
	}
	if m.State() == signer.Ready && err == nil {
		return proofEvery
	}
	return 0
}

// Wake has Run look at the device now.
func (m *Monitor) Wake() {
	select {
	case m.kick <- struct{}{}:
	default:
	}
}

// Observe is told of each turn of the device (batch.Config).
func (m *Monitor) Observe(t batch.Turn) {
	now := m.cfg.Clock.Boot()
	m.mu.Lock()
	defer m.mu.Unlock()
	if t.Err != nil {
		m.failureLocked(now, t.Err)
		return
	}
	if t.Batched {
		m.figures.Batches++
		m.figures.Batched += uint64(t.Messages)
	} else {
		m.figures.Direct += uint64(t.Messages)
	}
	// What began before the device was lost does not say that it is back.
	if began := now - t.Took; began >= m.failed {
		m.proof, m.proofAt, m.refused = max(now, m.failed+1), m.cfg.Clock.Now(), false
	}
	m.judgeLocked()
}

// Report is told of failures outside the queue: to open a key, or to make one.
func (m *Monitor) Report(err error) {
	if err == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.failureLocked(m.cfg.Clock.Boot(), err)
}

// failureLocked counts a failure. Those of the device end its proof at once; those of one key or one request do not.
func (m *Monitor) failureLocked(now time.Duration, err error) {
	class := classOf(err)
	if class == "" {
		return
	}
	m.figures.Failures[class]++
	switch class {
	case signer.TokenLost, signer.ModuleDead, signer.LoginLost, signer.SessionLost, signer.HandleLost:
		m.lostLocked(now, fault.From(err))
		m.judgeLocked()
	case signer.AuthorisationRefused: // of one key, or of the device
		if !m.suspect && m.state != signer.Locked {
			m.suspect = true
			m.Wake()
		}
	}
}

// lostLocked ends the proof. What happens at the same instant stands in the order in which it was told.
func (m *Monitor) lostLocked(now time.Duration, cause *fault.Error) {
	told := m.toldLocked() && m.proof <= m.failed
	if m.failed, m.cause = max(now, m.proof+1), cause; told {
		m.seenAt = m.failed // what the backend has said of its device says more than another failure
	}
}

// toldLocked reports whether the backend has said why its device does not sign.
func (m *Monitor) toldLocked() bool { return m.seenAt > 0 && m.seenAt >= m.failed && !answers(m.seen) }

// classOf returns the class of a failure. Where a backend names none, its code does.
func classOf(err error) signer.Class {
	if c := signer.ClassOf(err); c != "" {
		return c
	}
	code := fault.CodeOf(err)
	for _, c := range []signer.Class{signer.TokenLost, signer.ModuleDead, signer.AuthorisationRefused, signer.KeyGone,
		signer.TransientBusy, signer.ResourcesExhausted} {
		if c.Code() == code {
			return c
		}
	}
	return ""
}

// Gone reports whether an error says that one key is not on its device any more.
func Gone(err error) bool { return err != nil && classOf(err) == signer.KeyGone }

// Refresh asks the backend for its description, unless there is one that is younger than age and than the last failure.
// Calls at the same time share the answer. One that does not come within ctx counts for nothing.
func (m *Monitor) Refresh(ctx context.Context, age time.Duration) {
	m.mu.Lock()
	now := m.cfg.Clock.Boot()
	if m.seenAt > 0 && m.seenAt >= m.failed && !m.suspect && now-m.asked < age {
		m.mu.Unlock()
		return
	}
	if other := m.asking; other != nil {
		m.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
		}
		return
	}
	done := make(chan struct{})
	m.asking = done
	m.mu.Unlock()

	ctx, cancel := context.WithTimeout(ctx, describeLimit)
	defer cancel()
	d := m.cfg.Backend.Describe(ctx)
	valid := ctx.Err() == nil

	m.mu.Lock()
	defer m.mu.Unlock()
	m.asking = nil
	close(done)
	if !valid {
		return
	}
	m.seen, m.asked, m.seenAt, m.suspect = d, now, now, false
	if !answers(d) {
		m.refused = false // its own words say more
		if m.proof <= now && m.failed <= now {
			m.lostLocked(now, nil)
			m.seenAt = m.failed
		}
	}
	m.judgeLocked()
}

// answers reports whether a device does, so that it may sign.
func answers(d signer.Description) bool {
	return d.State == signer.Ready || d.State == signer.Recovering
}

// State returns the backend's state.
func (m *Monitor) State() signer.State {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.judgeLocked()
}

// judgeLocked says in which state the backend is, and notes when that changes.
func (m *Monitor) judgeLocked() signer.State {
	state, _, _ := m.verdictLocked()
	if state != m.state {
		m.state, m.since = state, m.cfg.Clock.Now()
		m.figures.Changes[state]++
		m.Wake()
	}
	return state
}

const (
	textUnproved   = "no signature has proved yet that it works"
	textStale      = "it has not signed for some time"
	remedyWait     = "None is needed unless it lasts."
	remedyGone     = "Put the device back that holds it. If this one is meant to replace it: trustd backend reset-canary "
	textDescribing = "the device answers, and does not sign"
)

// verdictLocked is the state machine: what has been seen, in the order of its weight.
func (m *Monitor) verdictLocked() (state signer.State, problem, remedy string) {
	now := m.cfg.Clock.Boot()
	proved := m.proof > 0 && m.proof > m.failed && now-m.proof <= proofAge
	switch {
	case m.refused:
		return signer.Locked, fault.AuthorisationRefused.Title(), fault.AuthorisationRefused.Hint()
	case m.gone != "" && (m.seenAt == 0 || answers(m.seen)):
		return signer.Degraded, m.gone, remedyGone + m.cfg.Name
	case proved:
		return signer.Ready, "", ""
	case m.toldLocked():
		return m.seen.State, m.seen.Problem, m.seen.Remedy
	case m.failed > 0 && m.seenAt < m.failed && m.cause != nil:
		return signer.Degraded, m.cause.Code.Title(), m.cause.Code.Hint()
	case m.hindered != nil && m.proof <= m.canary.began:
		problem = textDescribing + ": " + string(m.hindered.Code)
		if m.hindered.Text != "" {
			problem = textDescribing + ": " + m.hindered.Text
		}
		return signer.Recovering, problem, m.hindered.Code.Hint()
	case m.seen.Problem != "" && m.seenAt >= m.failed:
		return signer.Recovering, m.seen.Problem, m.seen.Remedy
	case m.proof > m.failed && m.proof > 0:
		return signer.Recovering, textStale, remedyWait
	}
	return signer.Recovering, textUnproved, remedyWait
}

// Status returns how the backend fares. It does not talk to the device.
func (m *Monitor) Status() Status {
	m.mu.Lock()
	m.judgeLocked()
	state, problem, remedy := m.verdictLocked()
	s := Status{State: state, Since: m.since, Problem: problem, Remedy: remedy, LastSignature: m.proofAt, Device: m.seen,
		Described: m.seenAt > 0, CanaryGone: m.gone != "", Figures: m.figures}
	if r := m.canary.record; r != nil && !r.Public.IsZero() {
		s.CanaryKey, s.CanaryPublic = r.KeyID, r.Public.ID().String()
	}
	s.Failures, s.Changes = maps.Clone(m.figures.Failures), maps.Clone(m.figures.Changes)
	m.mu.Unlock()
	if c, ok := m.cfg.Backend.(signer.FailureCounter); ok { // it also counts what it has repaired, perhaps not at once
		for class, n := range c.Failures() {
			s.Failures[class] = max(s.Failures[class], n)
		}
	}
	s.Restarts, _ = strconv.ParseUint(s.Device.Limits["plugin_restarts"], 10, 64)
	return s
}

// Described returns what the backend said of its device last; zero where it has not been asked.
func (m *Monitor) Described() signer.Description {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.seen
}

// CanaryGone reports whether the device answers and does not hold the canary key any more.
func (m *Monitor) CanaryGone() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.gone != ""
}

// report writes a change of state to the log, once.
func (m *Monitor) report(ctx context.Context) {
	m.mu.Lock()
	state, problem, remedy := m.verdictLocked()
	before := m.logged
	m.logged = state
	changes := m.figures.Changes[state]
	m.mu.Unlock()
	if state == before {
		return
	}
	level := slog.LevelWarn
	switch state {
	case signer.Ready:
		level = slog.LevelInfo
	case signer.Locked:
		level = slog.LevelError
	}
	attrs := []slog.Attr{slog.String("state", string(state)), slog.Uint64("times", changes)}
	if before != "" {
		attrs = append(attrs, slog.String("before", string(before)))
	}
	if problem != "" {
		attrs = append(attrs, slog.String("problem", problem), slog.String("remedy", remedy))
	}
	m.cfg.Log.LogAttrs(ctx, level, "backend state", attrs...)
}

// Unlock has the backend try the authorisation that its device refused once more: an operator's verb. A refusal stands.
func (m *Monitor) Unlock(ctx context.Context) error {
	u, ok := m.cfg.Backend.(signer.Unlocker)
	if !ok {
		return &fault.Error{Code: fault.Unsupported, Field: "backend", Text: "this backend has nothing to unlock"}
	}
	err := u.Unlock(ctx)
	m.mu.Lock()
	m.refused = false
	m.mu.Unlock()
	m.Refresh(ctx, 0)
	if err == nil && m.Running() && m.State() != signer.Locked {
		err = m.Prove(ctx)
	}
	m.Wake()
	return err
}
