package spend

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/durable"
)

// A file holds, as records of a durable.Log: first a head (version, boot id), then batches. A batch is the time at
// which it was written (boot clock, timeline, highest wall reading; 8 bytes each) and its entries (id, deadline on
// the timeline, deadline on the wall clock; 16, 4 and 4 bytes). All numbers are big-endian.
const (
	segmentPurpose = "spend/nonces"
	segmentVersion = 1
	recordHead     = 'h'
	recordBatch    = 'b'
	markSize       = 1 + 3*8
	entrySize      = len(id{}) + 4 + 4
)

// A segment is one file.
type segment struct {
	path string
	log  *durable.Log // nil once the file is closed

	mu   sync.Mutex
	last deadline // of everything in it
}

func (g *segment) note(batch []entry) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, e := range batch {
		g.last.extend(e.until)
	}
}

type segmentFile struct {
	path     string
	sequence uint64
}

func segmentName(sequence uint64) string { return fmt.Sprintf("spent-%016x.log", sequence) }

// segments lists the files of a folder, oldest first.
func segments(dir string) ([]segmentFile, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var out []segmentFile
	for _, e := range entries {
		digits, isLog := strings.CutSuffix(strings.TrimPrefix(e.Name(), "spent-"), ".log")
		n, err := strconv.ParseUint(digits, 16, 64)
		if isLog && err == nil && segmentName(n) == e.Name() {
			out = append(out, segmentFile{path: filepath.Join(dir, e.Name()), sequence: n})
		}
	}
	slices.SortFunc(out, func(a, b segmentFile) int { return cmp.Compare(a.sequence, b.sequence) })
	return out, nil
}

// replay takes in one file and closes it again.
func (s *Store) replay(f segmentFile, last *mark) (*segment, error) {
	seg := &segment{path: f.path}
	name := filepath.Base(f.path)
	bootID, headed := "", false
	log, err := durable.LogConfig{Path: f.path, Purpose: segmentPurpose, FS: s.cfg.FS}.Open(func(rec []byte) error {
		switch {
		case rec[0] == recordHead && len(rec) >= 2 && !headed:
			if rec[1] != segmentVersion {
				return fault.New(fault.Unsupported, "the file %s has version %d of its format", name, rec[1])
			}
			bootID, headed = string(rec[2:]), true
			return nil
		case rec[0] == recordBatch && len(rec) >= markSize && (len(rec)-markSize)%entrySize == 0 && headed:
			m, batch := parseBatch(rec)
			last.bootID, last.boot, last.age = bootID, m.boot, max(last.age, m.age)
			last.wall = max(last.wall, m.wall)
			seg.note(batch)
			for _, e := range batch {
				if s.set.put(e) {
					s.count.Add(1)
				}
			}
			return nil
		}
		return fault.New(fault.Corrupt, "the file %s holds a record of no known form", name)
	})
	if err != nil {
		return nil, err
	}
	if err := log.Close(); err != nil {
		return nil, fault.Wrap(fault.Unavailable, err, "the file %s cannot be closed", name)
	}
	return seg, nil
}

// begin makes a new file.
func (s *Store) begin(path string, now instant) (*segment, error) {
	log, err := durable.LogConfig{Path: path, Purpose: segmentPurpose, FS: s.cfg.FS}.Open(func([]byte) error {
		return fault.New(fault.Corrupt, "the file %s is not new", filepath.Base(path))
	})
	if err != nil {
		return nil, err
	}
	// AppendAsync: both are durable with the first batch behind them, and say nothing before.
	for _, rec := range [][]byte{
		append([]byte{recordHead, segmentVersion}, s.time.id...),
		batchRecord(s.time.mark(now), nil),
	} {
		if err := log.AppendAsync(rec); err != nil {
			_ = log.Close()
			return nil, err
		}
	}
	return &segment{path: path, log: log}, nil
}

// rotate begins a new file where the active one is long enough or its disk has failed it.
func (s *Store) rotate(now instant) error {
	if !s.due() {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return fault.New(fault.Stopping, "the nonce store is closed")
	}
	old := s.active
	broken := old.log.Err() != nil
	if !broken && old.log.Size() < s.cfg.SegmentSize {
		return nil // another call was first
	}
	dir := filepath.Dir(old.path)
	// The number is used up even if this fails, so that the next try does not meet a half-made file.
	s.sequence++
	next, err := s.begin(filepath.Join(dir, segmentName(s.sequence)), now)
	if err != nil {
		if !broken { // the old file can still take what comes
			return nil
		}
		return fault.Wrap(fault.ReplayStoreFailed, err, "")
	}
	_ = old.log.Close() // everything that was acknowledged is synced; what is not does not count
	old.log = nil
	s.retired = append(s.retired, old)
	s.active = next
	s.drop(now)
	return nil
}

func (s *Store) due() bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return !s.closed && (s.active.log.Size() >= s.cfg.SegmentSize || s.active.log.Err() != nil)
}

// drop deletes closed files that hold nothing unexpired. One that cannot be deleted is tried again.
func (s *Store) drop(now instant) {
	s.retired = slices.DeleteFunc(s.retired, func(g *segment) bool {
		return now.past(g.last) && s.remove(g.path) == nil
	})
}

func (s *Store) remove(path string) error {
	if err := s.cfg.FS.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return s.cfg.FS.SyncDir(filepath.Dir(path))
}

func batchRecord(m mark, batch []entry) []byte {
	b := make([]byte, 0, markSize+len(batch)*entrySize)
	b = append(b, recordBatch)
	b = binary.BigEndian.AppendUint64(b, uint64(m.boot))
	b = binary.BigEndian.AppendUint64(b, uint64(m.age))
	b = binary.BigEndian.AppendUint64(b, uint64(m.wall))
	for _, e := range batch {
		b = append(b, e.id[:]...)
		b = binary.BigEndian.AppendUint32(b, e.until.age)
		b = binary.BigEndian.AppendUint32(b, e.until.wall)
	}
	return b
}

// parseBatch reads a record whose length has been checked.
func parseBatch(rec []byte) (mark, []entry) {
	u64 := func(i int) uint64 { return binary.BigEndian.Uint64(rec[1+8*i:]) }
	m := mark{boot: time.Duration(u64(0)), age: time.Duration(u64(1)), wall: int64(u64(2))}
	rest := rec[markSize:]
	batch := make([]entry, 0, len(rest)/entrySize)
	for ; len(rest) > 0; rest = rest[entrySize:] {
		var e entry
		n := copy(e.id[:], rest)
		e.until = deadline{age: binary.BigEndian.Uint32(rest[n:]), wall: binary.BigEndian.Uint32(rest[n+4:])}
		batch = append(batch, e)
	}
	return m, batch
}
