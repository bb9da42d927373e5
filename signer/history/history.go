// Package history keeps, for every key, the hashes of all that it signed: a Merkle log, and the sequence numbers
// that go into what is signed. Rotation proofs and audits rest on it.
//
// The hash of a message is recorded before its signature is made, so that every signature that anybody can hold is
// covered; a recorded hash without a signature is no harm. Numbers are reserved in blocks that are durable before
// the first number of the block is given out: after a crash numbers are skipped, never repeated.
//
// What Record wrote survives the death of the process at once and the loss of power within Config.SyncInterval. When
// the host comes up again after losing power, each key that was in use gets one gap leaf, which names the numbers
// whose leaves may have been lost. With Config.Required there is nothing to lose.
//
// All keys share one file, cut into segments that each begin with the state of every key. The formats are in
// docs/formats/history.md.
package history

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/durable"
	"github.com/trustd/trustd/internal/merkle"
)

// A Config tunes a Store. The zero value is for production.
type Config struct {
	// SyncInterval bounds how long a leaf may be in the page cache alone. Default: 100 ms.
	SyncInterval time.Duration
	// Required makes Record return only once the leaf is on the disk.
	Required bool
	// Block is how many numbers are reserved at once, up to 16 times as many for a key that signs many at a time: one sync
	// for so many signatures, and at most so many numbers skipped by a crash. Default: 1024.
	Block uint64
	// SegmentSize is when a new segment is begun. It bounds what Open has to read. Default: 16 MiB.
	SegmentSize int64
	// Segments is how many segments are kept, the current one included. Heads do not need the old ones; proofs that
	// a certain message is in the log do. Default: 64, at least 2. Negative: all.
	Segments int
	// BootID tells one boot of the host from another. Default: the kernel's.
	BootID string
	// FS is where the files live. Default: the host's.
	FS durable.FS
}

const (
	defaultBlock       = 1024
	defaultSegmentSize = 16 << 20
	defaultSegments    = 64
	maxBlock           = 1 << 20
)

// A Store holds the histories of all keys. It is safe for concurrent use. A key that nothing was reserved for has
// an empty history and costs nothing.
type Store struct {
	dir string
	cfg Config

	// turn is held for reading across every write to the log together with the change in memory that goes with it,
	// and for writing while a new segment is begun, which must see the two agree. It is taken before any line's mu.
	turn    sync.RWMutex
	log     *durable.Log
	segment uint64
	failed  error        // final
	limit   atomic.Int64 // size of the log at which the next segment is due

	mu    sync.Mutex // guards the two below, and the order of keys in the log
	lines map[ident.KeyID]*line
	order []*line // by number
}

// A line is the history of one key.
type line struct {
	key    ident.KeyID
	number uint32

	mu   sync.Mutex // held across the write that makes a block or a leaf part of the log
	tree merkle.Tree
	next uint64 // the number to give out; numbers start at 1
	cur  block
	prev block
}

// A block is a range of reserved numbers, from..to-1, with a bit set for each that has its leaf.
type block struct {
	from, to uint64
	used     []uint64 // made when the first number is used
}

func (b *block) holds(seq uint64) bool { return seq >= b.from && seq < b.to }

// take notes that a number has its leaf, and reports false where it had it before.
func (b *block) take(seq uint64) bool {
	if b.used == nil {
		b.used = make([]uint64, (b.to-b.from+63)/64)
	}
	i := seq - b.from
	fresh := b.used[i/64]&(1<<(i%64)) == 0
	b.used[i/64] |= 1 << (i % 64)
	return fresh
}

// Open opens the histories in dir, a folder of their own, which it makes where it is missing. It starts no
// goroutine; Close must be called, or the next Open skips some numbers.
func Open(dir string, cfg Config) (*Store, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	s := &Store{dir: dir, cfg: cfg, lines: map[ident.KeyID]*line{}}
	if err := s.load(); err != nil {
		return nil, err
	}
	return s, nil
}

func (c Config) withDefaults() (Config, error) {
	if c.Block == 0 {
		c.Block = defaultBlock
	}
	if c.Block > maxBlock {
		return c, fault.New(fault.Usage, "a block has at most %d numbers", maxBlock)
	}
	if c.SegmentSize <= 0 {
		c.SegmentSize = defaultSegmentSize
	}
	if c.Segments == 0 {
		c.Segments = defaultSegments
	}
	if c.FS == nil {
		c.FS = durable.Disk
	}
	if c.BootID == "" {
		b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
		if err != nil {
			return c, fault.Wrap(fault.Unavailable, err, "the kernel does not tell the boot id")
		}
		c.BootID = strings.TrimSpace(string(b))
	}
	return c, nil
}

// Reserve returns the key's next sequence number. No number is ever returned twice, whatever happens to the host. A
// number may be recorded until Config.Block later ones have been reserved; then it lapses.
func (s *Store) Reserve(key ident.KeyID) (uint64, error) {
	s.turn.RLock()
	defer s.turn.RUnlock()
	if s.failed != nil {
		return 0, s.failed
	}
	l, err := s.line(key)
	if err != nil {
		return 0, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return s.reserveLocked(l, 1)
}

// ahead is how many calls as large as the one that needs a new block the block has numbers for, so that a key that
// signs thousands of messages at a time does not wait for the disk each time.
const ahead = 8

// reserveLocked gives out the line's next number, beginning a block where the last one is used up. n is how many the
// caller needs.
func (s *Store) reserveLocked(l *line, n int) (uint64, error) {
	if l.next == l.cur.to {
		size := max(s.cfg.Block, uint64(n))
		if n > 1 {
			size = max(size, min(uint64(n)*ahead, 16*s.cfg.Block))
		}
		b := block{from: l.cur.to, to: l.cur.to + size}
		if err := s.log.Append(context.Background(), reserveRecord(l.number, b)); err != nil {
			return 0, err
		}
		l.prev, l.cur, l.next = l.cur, b, b.from
	}
	seq := l.next
	l.next++
	return seq, nil
}

// MaxEnter bounds the digests of one call to Enter.
const MaxEnter = 1024

// Enter is Reserve and Record in one step, for messages that do not hold their number: the numbers cannot lapse in
// between, however many others sign with the key. It takes at most MaxEnter digests, all or none.
func (s *Store) Enter(key ident.KeyID, digests [][sha256.Size]byte) ([]uint64, error) {
	if len(digests) == 0 {
		return nil, nil
	}
	if len(digests) > MaxEnter {
		return nil, fault.New(fault.TooLarge, "at most %d messages at once", MaxEnter)
	}
	seqs, full, err := s.enter(key, digests)
	if err == nil && full {
		s.rollOver()
	}
	return seqs, err
}

func (s *Store) enter(key ident.KeyID, digests [][sha256.Size]byte) (seqs []uint64, full bool, err error) {
	s.turn.RLock()
	defer s.turn.RUnlock()
	if s.failed != nil {
		return nil, false, s.failed
	}
	l, err := s.line(key)
	if err != nil {
		return nil, false, err
	}
	if seqs, err = s.enterLine(l, digests); err != nil {
		return nil, false, err
	}
	if s.cfg.Required { // with no lock held that another signature of this key needs, so that they share the sync
		if err := s.log.Sync(context.Background()); err != nil {
			return nil, false, err
		}
	}
	return seqs, s.log.Size() >= s.limit.Load(), nil
}

func (s *Store) enterLine(l *line, digests [][sha256.Size]byte) ([]uint64, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	seqs, leaves := make([]uint64, len(digests)), make([]Leaf, len(digests))
	for i, d := range digests {
		seq, err := s.reserveLocked(l, len(digests))
		if err != nil {
			return nil, err
		}
		seqs[i], leaves[i] = seq, Leaf{Seq: seq, Digest: d}
	}
	return seqs, s.writeLocked(l, leaves)
}

// Record adds the SHA-256 of the signed bytes to the key's history, under a number from Reserve that was not used
// before. The signature must not be released before Record has returned nil.
func (s *Store) Record(key ident.KeyID, seq uint64, digest [sha256.Size]byte) error {
	return s.RecordAll(key, []Leaf{{Seq: seq, Digest: digest}})
}

// A Leaf is one signature of a history.
type Leaf struct {
	Seq    uint64
	Digest [sha256.Size]byte // SHA-256 of the signed bytes
}

// hash returns the leaf's hash in the Merkle tree.
func (l Leaf) hash() merkle.Hash {
	var room [41]byte
	b := append(room[:0], leafSignature)
	b = binary.BigEndian.AppendUint64(b, l.Seq)
	return merkle.LeafHash(append(b, l.Digest[:]...))
}

// gapHash returns the hash of a leaf that says: any number in from..to-1 without a leaf of its own may have been
// used.
func gapHash(from, to uint64) merkle.Hash {
	b := append(make([]byte, 0, 17), leafGap)
	b = binary.BigEndian.AppendUint64(b, from)
	return merkle.LeafHash(binary.BigEndian.AppendUint64(b, to))
}

// The first byte of what a leaf hashes.
const (
	leafSignature = 1
	leafGap       = 2
)

// RecordAll is Record for several signatures at once, in one write: all are recorded or none.
func (s *Store) RecordAll(key ident.KeyID, leaves []Leaf) error {
	if len(leaves) == 0 {
		return nil
	}
	full, err := s.record(key, leaves)
	if err == nil && full {
		s.rollOver()
	}
	return err
}

func (s *Store) record(key ident.KeyID, leaves []Leaf) (full bool, err error) {
	s.turn.RLock()
	defer s.turn.RUnlock()
	if s.failed != nil {
		return false, s.failed
	}
	s.mu.Lock()
	l := s.lines[key]
	s.mu.Unlock()
	if l == nil {
		return false, errNumber
	}
	if err := s.write(l, leaves); err != nil {
		return false, err
	}
	if s.cfg.Required { // with no lock held that another signature of this key needs, so that they share the sync
		if err := s.log.Sync(context.Background()); err != nil {
			return false, err
		}
	}
	return s.log.Size() >= s.limit.Load(), nil
}

// write puts leaves into the log and the tree.
func (s *Store) write(l *line, leaves []Leaf) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return s.writeLocked(l, leaves)
}

func (s *Store) writeLocked(l *line, leaves []Leaf) error {
	if err := l.take(leaves); err != nil {
		return err
	}
	if err := s.log.AppendAsync(leavesRecord(l.number, leaves)); err != nil {
		return err // the numbers stay taken
	}
	for _, leaf := range leaves {
		l.tree.Append(leaf.hash())
	}
	return nil
}

// ErrLapsed is what Record answers where so many later numbers were reserved that this one lapsed, or where the
// number was never reserved, or was used before.
var ErrLapsed error = errNumber

var errNumber = fault.New(fault.Internal, "a sequence number is not reserved, or has been used")

// take notes the numbers as used, or refuses them all.
func (l *line) take(leaves []Leaf) error {
	for i, leaf := range leaves {
		b := &l.cur
		if !b.holds(leaf.Seq) {
			b = &l.prev
		}
		if !b.holds(leaf.Seq) || leaf.Seq >= l.next || !b.take(leaf.Seq) {
			for _, undo := range leaves[:i] {
				l.untake(undo.Seq)
			}
			return errNumber
		}
	}
	return nil
}

func (l *line) untake(seq uint64) {
	b := &l.cur
	if !b.holds(seq) {
		b = &l.prev
	}
	i := seq - b.from
	b.used[i/64] &^= 1 << (i % 64)
}

// Head returns the last sequence number that was given out or skipped, and the size and root of the Merkle log.
func (s *Store) Head(key ident.KeyID) (seq, size uint64, root [sha256.Size]byte) {
	s.mu.Lock()
	l := s.lines[key]
	s.mu.Unlock()
	if l == nil {
		var empty merkle.Tree
		return 0, 0, empty.Root()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.next - 1, l.tree.Size(), l.tree.Root()
}

// Sync makes everything recorded so far durable.
func (s *Store) Sync(ctx context.Context) error {
	s.turn.RLock()
	defer s.turn.RUnlock()
	return s.log.Sync(ctx)
}

// Err returns why nothing can be recorded any more, or nil.
func (s *Store) Err() error {
	s.turn.RLock()
	defer s.turn.RUnlock()
	if s.failed != nil {
		return s.failed
	}
	return s.log.Err()
}

// Close makes everything durable and releases the files. The Store must not be used any more.
func (s *Store) Close() error {
	s.turn.Lock()
	defer s.turn.Unlock()
	if s.failed == nil {
		s.failed = fault.New(fault.Stopping, "the signature history is closed")
		if err := s.log.Append(context.Background(), []byte{recClose}); err != nil {
			_ = s.log.Close()
			return err
		}
	}
	return s.log.Close()
}

// line returns the key's history, begun if need be. The caller holds turn for reading.
func (s *Store) line(key ident.KeyID) (*line, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l, ok := s.lines[key]; ok {
		return l, nil
	}
	l := &line{key: key, number: uint32(len(s.order)), next: 1, cur: block{from: 1, to: 1}}
	// In the page cache first: the reservation that follows syncs it.
	if err := s.log.AppendAsync(keyRecord(key)); err != nil {
		return nil, err
	}
	s.lines[key] = l
	s.order = append(s.order, l)
	return l, nil
}
