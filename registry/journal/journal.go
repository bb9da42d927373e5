// Package journal keeps a registry on one host: a durable log of the accepted records, and the state that they
// fold into.
//
// It is the seam at which a replicated registry takes over: that implements Registry too, over the same pure state
// machine, and nothing above this package notices.
package journal

import (
	"context"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/durable"
	"github.com/trustd/trustd/registry"
)

// A Registry takes records and says what they amount to. All methods are safe for concurrent use.
type Registry interface {
	// State returns the latest state. It never blocks, and never goes back.
	State() *registry.State
	// Submit has a record judged and, if it is accepted, returns once it is durable and State shows it; with a
	// replicated registry, once a majority holds it. A refusal is returned as the outcome's error.
	//
	// After any other error the record may still have become, or become later, part of the registry: look before
	// submitting it again. A second submission of the same record is refused, with a code that tells why.
	Submit(ctx context.Context, rec registry.Record) (registry.Outcome, error)
}

var _ Registry = (*Journal)(nil)

// How far the time in a submitted record may lie from this host's clock. Signatures of several operators are
// collected for up to a day.
const (
	maxAge  = 25 * time.Hour
	maxSkew = 5 * time.Minute
)

// A Config says where a journal lives. Path alone is enough.
type Config struct {
	Path string
	// Now is asked for the time when a record is submitted, and the time in the record compared with it: the state
	// machine itself has no clock. nil: not compared.
	Now func() time.Time
	// FS is where the file lives. Default: the host's.
	FS durable.FS
}

// A Journal is the registry of a single host. Records are judged before they are written, so that what is refused
// costs no disk: unlike that of a replicated registry, the log of a journal holds accepted records only.
type Journal struct {
	now   func() time.Time
	log   *durable.Log
	name  string
	state atomic.Pointer[registry.State]

	turn     chan struct{} // holds one token; who has it may write the log, the state and watchers
	watchers []func(*registry.State)
}

// Open opens the journal at path and folds it. now may be nil; see Config.
func Open(path string, now func() time.Time) (*Journal, error) {
	return Config{Path: path, Now: now}.Open()
}

// Open makes the file where it is missing. A file that cannot be read to its end is fault.Corrupt: a state that
// lacks a record would believe what it must not.
func (c Config) Open() (*Journal, error) {
	j := &Journal{now: c.Now, name: filepath.Base(c.Path), turn: make(chan struct{}, 1)}
	state := registry.New()
	log, err := durable.LogConfig{Path: c.Path, Purpose: "trustd registry", FS: c.FS}.Open(func(b []byte) error {
		rec, err := registry.UnmarshalRecord(b)
		if err != nil {
			return fault.Wrap(fault.Corrupt, err, "record %d of the file %s cannot be read", size(state), j.name)
		}
		next, out := state.Apply(rec)
		if !out.Accepted {
			return fault.Wrap(fault.Corrupt, out.Err, "record %d of the file %s was accepted and is refused now",
				out.Index, j.name)
		}
		state = next
		return nil
	})
	if err != nil {
		return nil, err
	}
	j.log = log
	j.state.Store(state)
	j.turn <- struct{}{}
	return j, nil
}

func size(s *registry.State) uint64 {
	n, _ := s.Head()
	return n
}

// State returns the latest state.
func (j *Journal) State() *registry.State { return j.state.Load() }

// Submit judges a record by the state that all records before it left, writes it if it is accepted, and publishes
// the state with it. ctx bounds the wait for records before it; once the write has begun it is seen through.
func (j *Journal) Submit(ctx context.Context, rec registry.Record) (registry.Outcome, error) {
	if err := j.timely(&rec); err != nil {
		return registry.Outcome{Err: fault.From(err)}, err
	}
	select {
	case <-j.turn:
	case <-ctx.Done():
		return registry.Outcome{}, fault.From(ctx.Err())
	}
	defer func() { j.turn <- struct{}{} }()

	next, out := j.State().Apply(rec)
	if !out.Accepted {
		return out, out.Err
	}
	b, err := rec.Marshal()
	if err != nil {
		return registry.Outcome{}, err
	}
	// A crash before this returns: the record is there when the log is opened again, or it is not. Nobody was told.
	if err := j.log.Append(context.WithoutCancel(ctx), b); err != nil {
		return registry.Outcome{}, err
	}
	j.state.Store(next)
	for _, fn := range j.watchers {
		fn(next)
	}
	return out, nil
}

// timely refuses records from the future, which would outlive every expiry, and from long ago, when a signer whose
// registration has expired since was still active.
func (j *Journal) timely(rec *registry.Record) error {
	if j.now == nil {
		return nil
	}
	if age := j.now().Sub(rec.At()); age > maxAge || age < -maxSkew {
		return fault.BadField("at", "the time in the record is not that of the last day; check the clock of its author")
	}
	return nil
}

// OnChange has fn called with every later state, in order, before the Submit that brought it about returns. fn must
// not call Submit or OnChange, and should be quick.
func (j *Journal) OnChange(fn func(*registry.State)) {
	<-j.turn
	j.watchers = append(j.watchers, fn)
	j.turn <- struct{}{}
}

// Err returns why no record can be written any more, or nil.
func (j *Journal) Err() error { return j.log.Err() }

// Close waits for the record that is being written and releases the file. State still answers.
func (j *Journal) Close() error {
	<-j.turn
	defer func() { j.turn <- struct{}{} }()
	return j.log.Close()
}
