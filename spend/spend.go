// Package spend keeps what may be used once: nonces, durably. A nonce that Commit has taken stays spent through
// kill -9 and the loss of power for as long as its message could be accepted.
//
// A newcomer would get the clocks wrong. An entry ages by the boot clock, which no administrator sets and which
// counts sleep, and it is dropped only once the wall clock has passed its end too: a wall clock that is set back
// makes old messages valid again, and then their nonces are still here. Across a reboot the boot clock starts anew;
// the time between is what the wall clock has gained over the highest value it ever showed here, and never less
// than nothing. What remains: a wall clock that is far ahead while the machine boots and is set back later.
package spend

import (
	"context"
	"crypto/sha256"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/clock"
	"github.com/trustd/trustd/internal/durable"
)

// Defaults and bounds of Config.
const (
	DefaultMax         = 1 << 20 // nonces; 30 to 60 MB of memory and 24 MB of disk when full
	DefaultSegmentSize = 4 << 20 // bytes
	MaxKeep            = 366 * 24 * time.Hour
	maxBatch           = 8 << 20 / entrySize
)

// A Config says how to open a Store. The zero value but for Clock is useful.
type Config struct {
	Clock clock.Clock
	// Max is how many nonces the store holds. At Max it refuses new ones until old ones expire; it never evicts.
	Max int
	// SegmentSize is the length at which a new file is begun. A file is deleted once all that it holds has expired.
	SegmentSize int64
	// FS is where the files live. Default: durable.Disk.
	FS durable.FS
}

// A Nonce is what one message spends.
type Nonce struct {
	Key   ident.KeyID // of the key that signed the message
	Nonce string
	Keep  time.Duration // from now on: how long the message could still be accepted, skew and grace included
}

// A Store holds spent nonces. It is safe for concurrent use and has no goroutine of its own.
type Store struct {
	cfg   Config
	time  timeline
	lock  *durable.Log // never written; its lock keeps other processes out of the folder
	set   set
	count atomic.Int64 // nonces in set
	swept atomic.Int64 // timeline second of the last sweep for room

	mu       sync.RWMutex // held for reading while a batch is being written to active
	active   *segment
	retired  []*segment // closed files that hold something unexpired
	sequence uint64     // of active
	closed   bool
}

// Open opens the store in a folder, making the folder where it is missing. Damage to a file is fault.Corrupt, a
// folder in use by another process fault.Unavailable; in neither case is anything changed.
func Open(dir string, c Config) (*Store, error) {
	if c.Clock == nil {
		return nil, fault.New(fault.Internal, "a nonce store needs a clock")
	}
	if c.Max <= 0 {
		c.Max = DefaultMax
	}
	if c.SegmentSize <= 0 {
		c.SegmentSize = DefaultSegmentSize
	}
	if c.FS == nil {
		c.FS = durable.Disk
	}
	if err := durable.MkdirAll(dir); err != nil {
		return nil, fault.Wrap(fault.Unavailable, err, "the folder of spent nonces cannot be made")
	}
	lock, err := durable.LogConfig{Path: filepath.Join(dir, "lock"), Purpose: "spend/lock", FS: c.FS}.Open(
		func([]byte) error { return fault.New(fault.Corrupt, "the lock of the spent nonces holds a record") })
	if err != nil {
		return nil, err
	}
	s := &Store{cfg: c, lock: lock}
	s.swept.Store(-1)
	s.set.init()
	if err := s.load(dir); err != nil {
		_ = lock.Close()
		return nil, err
	}
	return s, nil
}

// load replays the files, settles where the timeline stands, and begins a new file.
func (s *Store) load(dir string) error {
	if err := durable.Sweep(dir); err != nil {
		return fault.Wrap(fault.Unavailable, err, "the folder of spent nonces cannot be read")
	}
	names, err := segments(dir)
	if err != nil {
		return fault.Wrap(fault.Unavailable, err, "the folder of spent nonces cannot be read")
	}
	var last mark
	for _, n := range names {
		seg, err := s.replay(n, &last)
		if err != nil {
			return err
		}
		s.retired = append(s.retired, seg)
		s.sequence = n.sequence
	}
	s.time = resume(s.cfg.Clock, last)
	now := s.time.now()
	s.count.Add(-s.set.sweep(now))
	active, err := s.begin(filepath.Join(dir, segmentName(s.sequence+1)), now)
	if err != nil {
		return err
	}
	s.active, s.sequence = active, s.sequence+1
	s.drop(now)
	return nil
}

// Commit spends nonces. For each it returns nil once the nonce is on disk, or why it is not spent by this call:
// replay_detected, replay_store_full, replay_store_failed. Each nonce stands for itself. Calls that overlap share
// one sync of the disk.
//
// Where it is not known whether the disk took a nonce (a sync failed, ctx ended), the nonce stays spent while the
// process lives and the error says that it was not accepted.
func (s *Store) Commit(ctx context.Context, nonces []Nonce) []error {
	errs := make([]error, len(nonces))
	for start := 0; start < len(nonces); start += maxBatch {
		end := min(start+maxBatch, len(nonces))
		s.commit(ctx, nonces[start:end], errs[start:end])
	}
	return errs
}

func (s *Store) commit(ctx context.Context, nonces []Nonce, errs []error) {
	if err := ctx.Err(); err != nil {
		fill(errs, fault.From(err))
		return
	}
	now := s.time.now()
	batch := make([]entry, 0, len(nonces))
	taken := make([]int, 0, len(nonces))
	for i, n := range nonces {
		e, err := s.reserve(n, now)
		if err != nil {
			errs[i] = err
			continue
		}
		batch, taken = append(batch, e), append(taken, i)
	}
	if len(batch) == 0 {
		return
	}
	keep, err := s.write(ctx, now, batch)
	if err == nil {
		return
	}
	for j, i := range taken {
		errs[i] = err
		if !keep {
			s.set.remove(batch[j])
			s.count.Add(-1)
		}
	}
}

func fill(errs []error, err error) {
	for i := range errs {
		errs[i] = err
	}
}

// reserve takes a nonce in memory.
func (s *Store) reserve(n Nonce, now instant) (entry, error) {
	if n.Nonce == "" || n.Key.IsZero() || n.Keep > MaxKeep {
		return entry{}, fault.New(fault.Internal, "a nonce without key, text or a bounded life")
	}
	if n.Keep < 0 {
		return entry{}, fault.New(fault.Expired, "")
	}
	e := entry{id: digest(n), until: now.add(n.Keep)}
	if s.count.Add(1) > int64(s.cfg.Max) {
		s.makeRoom(now)
		if s.count.Load() > int64(s.cfg.Max) {
			s.count.Add(-1)
			if s.set.holds(e.id, now) {
				return entry{}, fault.New(fault.ReplayDetected, "")
			}
			return entry{}, fault.New(fault.ReplayStoreFull, "")
		}
	}
	fresh, dropped := s.set.insert(e, now)
	s.count.Add(-dropped)
	if !fresh {
		s.count.Add(-1)
		return entry{}, fault.New(fault.ReplayDetected, "")
	}
	return e, nil
}

// makeRoom drops what has expired, at most once a second: a full store must not be slow as well.
func (s *Store) makeRoom(now instant) {
	last := s.swept.Load()
	if int64(now.second()) > last && s.swept.CompareAndSwap(last, int64(now.second())) {
		s.count.Add(-s.set.sweep(now))
	}
}

// digest names a nonce of a key: half of a SHA-256, so that nobody finds a second nonce of another's key.
func digest(n Nonce) id {
	h := sha256.New()
	h.Write(n.Key[:])
	h.Write([]byte(n.Nonce))
	var out id
	copy(out[:], h.Sum(nil))
	return out
}

// write makes a batch durable. keep says that the batch may be on disk although there is an error.
func (s *Store) write(ctx context.Context, now instant, batch []entry) (keep bool, err error) {
	if err := s.rotate(now); err != nil {
		return false, err
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return false, fault.New(fault.Stopping, "the nonce store is closed")
	}
	seg := s.active
	seg.note(batch)
	err = seg.log.Append(ctx, batchRecord(s.time.mark(now), batch))
	switch {
	case err == nil:
		return false, nil
	case ctx.Err() != nil:
		return true, fault.From(ctx.Err())
	}
	return seg.log.Err() != nil, fault.Wrap(fault.ReplayStoreFailed, err, "")
}

// Len returns how many nonces the store holds, expired ones that are not yet dropped among them.
func (s *Store) Len() int { return int(s.count.Load()) }

// Max returns how many it can hold.
func (s *Store) Max() int { return s.cfg.Max }

// Close notes the time and closes the files. It waits for what is being committed.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	now := s.time.now()
	err := s.active.log.Append(context.Background(), batchRecord(s.time.mark(now), nil))
	if cerr := s.active.log.Close(); err == nil {
		err = cerr
	}
	if cerr := s.lock.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("closing the nonce store: %w", err)
	}
	return nil
}
