package history

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/bits"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/durable"
)

// The records of a segment. Each opens with its kind.
const (
	recSnapshot = 1 // boot id and every key: the first record, and there alone
	recKey      = 2 // a key, which gets the next number
	recReserve  = 3 // a block of numbers
	recLeaves   = 4 // signatures
	recGap      = 5 // numbers whose leaves may be lost
	recOpen     = 6 // a process took the file: boot id
	recClose    = 7 // and closed it
)

func keyRecord(key ident.KeyID) []byte { return append([]byte{recKey}, key[:]...) }

func reserveRecord(number uint32, b block) []byte {
	return rangeRecord(recReserve, number, b.from, b.to)
}

func rangeRecord(kind byte, number uint32, from, to uint64) []byte {
	r := binary.BigEndian.AppendUint32([]byte{kind}, number)
	r = binary.BigEndian.AppendUint64(r, from)
	return binary.BigEndian.AppendUint64(r, to)
}

const leafSize = 8 + 32

func leavesRecord(number uint32, leaves []Leaf) []byte {
	r := append(make([]byte, 0, 5+len(leaves)*leafSize), recLeaves)
	r = binary.BigEndian.AppendUint32(r, number)
	for _, l := range leaves {
		r = binary.BigEndian.AppendUint64(r, l.Seq)
		r = append(r, l.Digest[:]...)
	}
	return r
}

// A snapshot is kind, length of the boot id, boot id, and for each key: fingerprint, previous block, current
// block, whether the key was used in the present run, tree.
func (s *Store) snapshot() []byte {
	r := []byte{recSnapshot, byte(len(s.cfg.BootID))}
	r = append(r, s.cfg.BootID...)
	for _, l := range s.order {
		r = append(r, l.key[:]...)
		for _, n := range []uint64{l.prev.from, l.prev.to, l.cur.from, l.cur.to} {
			r = binary.BigEndian.AppendUint64(r, n)
		}
		r, _ = l.tree.AppendBinary(r) // never fails
	}
	return r
}

// A reader folds a segment into lines.
type reader struct {
	lines  map[ident.KeyID]*line
	order  []*line
	begun  bool   // the snapshot was there
	clean  bool   // the last process closed the file
	bootID string // of the last process
}

var errRecord = fault.New(fault.Corrupt, "the signature history holds a record that cannot be read")

// fold is called with each record of a segment.
func (r *reader) fold(rec []byte) error {
	kind, rest := rec[0], rec[1:]
	if r.begun == (kind == recSnapshot) {
		return errRecord
	}
	r.clean = kind == recClose
	switch kind {
	case recSnapshot:
		return r.foldSnapshot(rest)
	case recKey:
		if len(rest) != len(ident.KeyID{}) {
			return errRecord
		}
		return r.add(&line{key: ident.KeyID(rest), cur: block{from: 1, to: 1}})
	case recOpen:
		// Whatever the last process left unfinished has been dealt with behind this record; see Store.settle.
		r.bootID = string(rest)
		for _, l := range r.order {
			l.prev, l.cur = block{}, block{from: l.cur.to, to: l.cur.to}
		}
		return nil
	case recClose:
		return nil
	}
	return r.foldLine(kind, rest)
}

// foldLine takes a record that is about one key.
func (r *reader) foldLine(kind byte, rest []byte) error {
	if len(rest) < 4 || int64(binary.BigEndian.Uint32(rest)) >= int64(len(r.order)) {
		return errRecord
	}
	l := r.order[binary.BigEndian.Uint32(rest)]
	rest = rest[4:]
	if kind == recLeaves {
		if len(rest) == 0 || len(rest)%leafSize != 0 {
			return errRecord
		}
		for ; len(rest) > 0; rest = rest[leafSize:] {
			leaf := Leaf{Seq: binary.BigEndian.Uint64(rest), Digest: [32]byte(rest[8:])}
			l.tree.Append(leaf.hash())
		}
		return nil
	}
	if len(rest) != 16 {
		return errRecord
	}
	from, to := binary.BigEndian.Uint64(rest), binary.BigEndian.Uint64(rest[8:])
	switch {
	case kind == recReserve && from == l.cur.to && to > from:
		l.prev, l.cur = l.cur, block{from: from, to: to}
	case kind == recGap && to > from:
		l.tree.Append(gapHash(from, to))
	default:
		return errRecord
	}
	return nil
}

func (r *reader) foldSnapshot(b []byte) error {
	if len(b) < 1 || len(b) < 1+int(b[0]) {
		return errRecord
	}
	r.begun, r.bootID = true, string(b[1:1+int(b[0])])
	for b = b[1+int(b[0]):]; len(b) > 0; {
		const fixed = 32 + 4*8
		if len(b) < fixed+8 {
			return errRecord
		}
		n := func(i int) uint64 { return binary.BigEndian.Uint64(b[32+8*i:]) }
		l := &line{key: ident.KeyID(b), prev: block{from: n(0), to: n(1)}, cur: block{from: n(2), to: n(3)}}
		if l.cur.from < 1 || l.cur.to < l.cur.from || l.prev.to < l.prev.from {
			return errRecord
		}
		size := 8 + 32*bits.OnesCount64(n(4))
		if len(b) < fixed+size || l.tree.UnmarshalBinary(b[fixed:fixed+size]) != nil {
			return errRecord
		}
		if err := r.add(l); err != nil {
			return err
		}
		b = b[fixed+size:]
	}
	return nil
}

func (r *reader) add(l *line) error {
	if _, twice := r.lines[l.key]; twice {
		return errRecord
	}
	l.number = uint32(len(r.order))
	r.lines[l.key] = l
	r.order = append(r.order, l)
	return nil
}

// load opens the newest segment and goes on in it.
func (s *Store) load() error {
	if s.cfg.FS == durable.Disk {
		if err := durable.MkdirAll(s.dir); err != nil {
			return fmt.Errorf("making the folder of the signature history: %w", err)
		}
	}
	for range 8 { // another process may begin a segment between the listing and the lock
		number, err := s.newest()
		if err != nil {
			return err
		}
		r := &reader{lines: map[ident.KeyID]*line{}}
		log, err := s.openSegment(max(number, 1), r.fold)
		if err != nil {
			return err
		}
		again, err := s.newest()
		if err == nil && again == max(number, 1) {
			err = s.adopt(r, log, again)
			if err == nil {
				return nil
			}
		}
		if cerr := log.Close(); err != nil {
			return err
		} else if cerr != nil {
			return cerr
		}
	}
	return fault.New(fault.Unavailable, "another process writes the signature history")
}

// adopt takes over what the last process left. Numbers of its blocks that it did not use are skipped. Where the
// host was not shut down in between, the page cache has kept every leaf; where it was, and the process did not
// close the file, leaves may be missing.
func (s *Store) adopt(r *reader, log *durable.Log, number uint64) error {
	var recs [][]byte
	for _, l := range r.order {
		from := l.cur.from
		if l.prev.to > l.prev.from {
			from = l.prev.from
		}
		if from < l.cur.to && !r.clean && r.bootID != s.cfg.BootID {
			recs = append(recs, rangeRecord(recGap, l.number, from, l.cur.to))
		}
	}
	recs = append(recs, append([]byte{recOpen}, s.cfg.BootID...))
	// One write: after a crash in it all of this is done again.
	if err := log.Append(context.Background(), recs...); err != nil {
		return err
	}
	for _, rec := range recs {
		if err := r.fold(rec); err != nil {
			return err
		}
	}
	for _, l := range r.order {
		l.next = l.cur.to
	}
	s.log, s.segment, s.lines, s.order = log, number, r.lines, r.order
	s.limit.Store(max(s.cfg.SegmentSize, log.Size()))
	return nil
}

// openSegment opens a segment, which begins with the present state of all keys where it is made here.
func (s *Store) openSegment(number uint64, fold func(rec []byte) error) (*durable.Log, error) {
	return durable.LogConfig{
		Path: filepath.Join(s.dir, segmentName(number)), Purpose: "trustd signature history",
		Initial: [][]byte{s.snapshot()}, SyncInterval: s.cfg.SyncInterval, FS: s.cfg.FS,
	}.Open(fold)
}

// rollOver begins a segment. Where that cannot be done, the present one grows, and the next attempt is made a
// quarter of a segment later.
func (s *Store) rollOver() {
	s.turn.Lock()
	defer s.turn.Unlock()
	if s.failed != nil || s.log.Size() < s.limit.Load() {
		return // somebody else was quicker
	}
	// The snapshot must not know more than the disk: a crash could otherwise leave a segment whose trees hold leaves
	// that the segment before has lost.
	if s.log.Sync(context.Background()) != nil {
		return // the log says so to the next who writes
	}
	log, err := s.openSegment(s.segment+1, func([]byte) error { return nil })
	if err != nil {
		s.limit.Store(s.log.Size() + s.cfg.SegmentSize/4)
		s.failed = s.retract(s.segment + 1)
		return
	}
	// From here on Open would take the new segment.
	_ = s.log.Close() // synced above
	s.log, s.segment = log, s.segment+1
	s.limit.Store(max(s.cfg.SegmentSize, 2*log.Size()))
	s.prune()
}

// retract sees to it that a segment that could not be opened is not taken for the newest: it would repeat the
// numbers of the one in use.
func (s *Store) retract(number uint64) error {
	err := s.cfg.FS.Remove(filepath.Join(s.dir, segmentName(number)))
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		err = s.cfg.FS.SyncDir(s.dir)
	}
	if err != nil {
		return fault.Wrap(fault.Unavailable, err, "a segment of the signature history that failed cannot be removed")
	}
	return nil
}

// prune deletes the oldest segments. What cannot be deleted now is tried again with the next segment.
func (s *Store) prune() {
	if s.cfg.Segments < 0 {
		return
	}
	numbers, err := s.segments()
	if err != nil {
		return
	}
	for _, n := range numbers {
		if n+uint64(max(s.cfg.Segments, 2)) <= s.segment {
			_ = s.cfg.FS.Remove(filepath.Join(s.dir, segmentName(n)))
		}
	}
}

func (s *Store) newest() (uint64, error) {
	numbers, err := s.segments()
	if err != nil || len(numbers) == 0 {
		return 0, err
	}
	return slices.Max(numbers), nil
}

func segmentName(number uint64) string { return fmt.Sprintf("%012d.log", number) }

// segments returns the numbers of the segments that there are.
func (s *Store) segments() ([]uint64, error) {
	names, err := s.cfg.FS.ReadDir(s.dir)
	if err != nil {
		return nil, fault.Wrap(fault.Unavailable, err, "the folder of the signature history cannot be read")
	}
	var out []uint64
	for _, name := range names {
		digits, ok := strings.CutSuffix(name, ".log")
		n, err := strconv.ParseUint(digits, 10, 64)
		if ok && err == nil && name == segmentName(n) {
			out = append(out, n)
		}
	}
	return out, nil
}
