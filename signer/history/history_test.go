package history_test

import (
	"bufio"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/durable"
	"github.com/trustd/trustd/internal/durable/durabletest"
	"github.com/trustd/trustd/internal/merkle"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer/history"
)

const dir = "/d/history"

func keyID(n int) ident.KeyID { return sha256.Sum256([]byte{byte(n), byte(n >> 8)}) }

func digest(n uint64) [32]byte { return sha256.Sum256(binary.BigEndian.AppendUint64(nil, n)) }

func config(m *durabletest.FS) history.Config {
	return history.Config{FS: m, BootID: "boot-1", Block: 4}
}

func open(t testing.TB, c history.Config) *history.Store {
	t.Helper()
	s, err := history.Open(dir, c)
	if err != nil {
		t.Fatal(fault.From(err).Verbose())
	}
	return s
}

func reserve(t testing.TB, s *history.Store, key ident.KeyID) uint64 {
	t.Helper()
	seq, err := s.Reserve(key)
	if err != nil {
		t.Fatal(fault.From(err).Verbose())
	}
	return seq
}

func record(t testing.TB, s *history.Store, key ident.KeyID, seq uint64) {
	t.Helper()
	if err := s.Record(key, seq, digest(seq)); err != nil {
		t.Fatal(fault.From(err).Verbose())
	}
}

// leaf and gap are written down here once more, from docs/formats/history.md.
func leaf(seq uint64, digest [32]byte) merkle.Hash {
	return merkle.LeafHash(append(binary.BigEndian.AppendUint64([]byte{1}, seq), digest[:]...))
}

func gap(from, to uint64) merkle.Hash {
	return merkle.LeafHash(binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64([]byte{2}, from), to))
}

func root(leaves ...merkle.Hash) [32]byte {
	var tree merkle.Tree
	for _, l := range leaves {
		tree.Append(l)
	}
	return tree.Root()
}

func wantHead(t testing.TB, s *history.Store, key ident.KeyID, seq uint64, leaves ...merkle.Hash) {
	t.Helper()
	gotSeq, size, got := s.Head(key)
	if gotSeq != seq || size != uint64(len(leaves)) || got != root(leaves...) {
		t.Errorf("head %d, %d leaves, root %x; want %d, %d, %x", gotSeq, size, got[:4], seq, len(leaves), root(leaves...))
	}
}

func TestReserveAndRecord(t *testing.T) {
	m := durabletest.New()
	s := open(t, config(m))
	a, b := keyID(1), keyID(2)
	wantHead(t, s, a, 0)
	for want := uint64(1); want <= 10; want++ {
		if got := reserve(t, s, a); got != want {
			t.Fatalf("number %d, want %d", got, want)
		}
		record(t, s, a, want)
	}
	if got := reserve(t, s, b); got != 1 {
		t.Errorf("another key begins at %d", got)
	}
	var want []merkle.Hash
	for n := uint64(1); n <= 10; n++ {
		want = append(want, leaf(n, digest(n)))
	}
	wantHead(t, s, a, 10, want...)
	wantHead(t, s, b, 1)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Reserve(a); !errors.Is(err, fault.Stopping) {
		t.Errorf("after Close: %v", err)
	}
	if err := s.Record(b, 1, digest(1)); !errors.Is(err, fault.Stopping) {
		t.Errorf("after Close: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("closing twice: %v", err)
	}
	s = open(t, config(m))
	wantHead(t, s, a, 12, want...) // what was left of the block is skipped
	wantHead(t, s, b, 4)
	if got := reserve(t, s, a); got != 13 {
		t.Errorf("number %d, want 13", got)
	}
}

func TestRecordRefuses(t *testing.T) {
	s := open(t, config(durabletest.New()))
	a := keyID(1)
	one, two := reserve(t, s, a), reserve(t, s, a)
	record(t, s, a, two)
	for name, err := range map[string]error{
		"a number twice":        s.Record(a, two, digest(9)),
		"a number not reserved": s.Record(a, 3, digest(9)),
		"zero":                  s.Record(a, 0, digest(9)),
		"an unknown key":        s.Record(keyID(2), 1, digest(9)),
		"one bad among good":    s.RecordAll(a, []history.Leaf{{Seq: one}, {Seq: two}}),
		"one number twice":      s.RecordAll(a, []history.Leaf{{Seq: one}, {Seq: one}}),
	} {
		if err == nil {
			t.Errorf("%s was taken", name)
		}
	}
	record(t, s, a, one) // and is still free
	for range 4 + 4 {
		reserve(t, s, a)
	}
	if err := s.Record(a, 3, digest(3)); err != nil { // reserved as number 3, two blocks ago
		if fault.CodeOf(err) != fault.Internal {
			t.Error(err)
		}
	} else {
		t.Error("a number that has lapsed was taken")
	}
	wantHead(t, s, a, 10, leaf(two, digest(two)), leaf(one, digest(one)))
	if err := s.RecordAll(a, nil); err != nil {
		t.Error(err)
	}
}

// TestKilledProcess: every leaf is there, and no number comes twice; there is no gap, because nothing is missing.
func TestKilledProcess(t *testing.T) {
	m := durabletest.New()
	s := open(t, config(m))
	a := keyID(1)
	for range 3 {
		record(t, s, a, reserve(t, s, a))
	}
	s2 := open(t, config(m.Kill()))
	wantHead(t, s2, a, 4, leaf(1, digest(1)), leaf(2, digest(2)), leaf(3, digest(3)))
	if got := reserve(t, s2, a); got != 5 {
		t.Errorf("number %d, want 5", got)
	}
	_ = s.Close()
}

// TestPowerLoss: what was lost is covered by a gap leaf, once.
func TestPowerLoss(t *testing.T) {
	m := durabletest.New()
	c1 := config(m)
	c1.SyncInterval = time.Hour
	s := open(t, c1)
	a, b := keyID(1), keyID(2)
	reserve(t, s, b)
	for range 6 {
		record(t, s, a, reserve(t, s, a))
	}
	r := rand.New(rand.NewPCG(1, 1))
	var lost *durabletest.FS
	for range 50 {
		m2 := m.PowerLoss(r, false)
		c := config(m2)
		c.BootID = "boot-2"
		s2 := open(t, c)
		_, size, _ := s2.Head(a)
		if size < 5 || size > 7 { // 4 were synced with the second block; 5 and 6 may be lost; one gap
			t.Fatalf("%d leaves", size)
		}
		var want []merkle.Hash
		for n := uint64(1); n <= 6; n++ {
			want = append(want, leaf(n, digest(n)))
		}
		wantHead(t, s2, a, 8, append(want[:size-1], gap(1, 9))...)
		wantHead(t, s2, b, 4, gap(1, 5))
		if got := reserve(t, s2, a); got != 9 {
			t.Errorf("number %d, want 9", got)
		}
		if size == 5 {
			lost = m2.Kill()
		}
		_ = s2.Close()
	}
	if lost == nil {
		t.Fatal("power was lost 50 times, and never both leaves")
	}
	c := config(lost)
	c.BootID = "boot-2"
	s3 := open(t, c)
	if _, size, _ := s3.Head(a); size != 5 {
		t.Errorf("%d leaves: a killed process was taken for a loss of power", size)
	}
	if err := s3.Close(); err != nil {
		t.Fatal(err)
	}
	c.BootID = "boot-3"
	s4 := open(t, c)
	if _, size, _ := s4.Head(a); size != 5 {
		t.Errorf("%d leaves: a clean shutdown was taken for a loss of power", size)
	}
	_ = s4.Close()
	_ = s.Close()
}

func TestRequiredLosesNothing(t *testing.T) {
	m := durabletest.New()
	c := config(m)
	c.Required = true
	s := open(t, c)
	a := keyID(1)
	var want []merkle.Hash
	for n := uint64(1); n <= 6; n++ {
		record(t, s, a, reserve(t, s, a))
		want = append(want, leaf(n, digest(n)))
	}
	r := rand.New(rand.NewPCG(1, 1))
	for range 10 {
		c := config(m.PowerLoss(r, true))
		c.BootID = "boot-2"
		wantHead(t, open(t, c), a, 8, append(slices.Clone(want), gap(1, 9))...)
	}
	_ = s.Close()
}

// TestSegments: old segments go, heads stay, and a killed process is found as it was.
func TestSegments(t *testing.T) {
	m := durabletest.New()
	c := config(m)
	c.SegmentSize, c.Segments = 6000, 2
	s := open(t, c)
	var want []merkle.Hash
	a, b := keyID(1), keyID(2)
	record(t, s, b, reserve(t, s, b))
	for n := uint64(1); n <= 400; n++ {
		seq := reserve(t, s, a)
		record(t, s, a, seq)
		want = append(want, leaf(seq, digest(seq)))
		if n%97 == 0 {
			next := m.Kill()
			_ = s.Close()
			m, c.FS = next, next
			s = open(t, c)
		}
	}
	seq, _, _ := s.Head(a)
	wantHead(t, s, a, seq, want...)
	wantHead(t, s, b, 4, leaf(1, digest(1)))
	names, _ := m.ReadDir(dir)
	if len(names) != 2 || names[0] == "000000000001.log" {
		t.Errorf("segments %q", names)
	}
	if _, err := history.Open(dir, c); !errors.Is(err, fault.Unavailable) {
		t.Errorf("a second process got %v", err)
	}
}

// TestRollOverFaults: a segment that cannot be begun costs nothing; one that can neither be begun nor taken away
// stops the store, because the next process would take it for the newest.
func TestRollOverFaults(t *testing.T) {
	for _, tc := range []struct {
		name   string
		faults []durabletest.Fault
		stops  bool
	}{
		{"no room", []durabletest.Fault{{Op: durabletest.Write, Match: ".tmp-", Err: syscall.ENOSPC}}, false},
		{"no sync", []durabletest.Fault{{Op: durabletest.Sync, Match: ".tmp-"}}, false},
		{"no link", []durabletest.Fault{{Op: durabletest.Link}}, false},
		{"linked, but the folder fails", []durabletest.Fault{{Op: durabletest.SyncDir}}, false},
		{"linked, and cannot be removed", []durabletest.Fault{
			{Op: durabletest.SyncDir}, {Op: durabletest.Remove, Match: "2.log", After: 1}, {Op: durabletest.Remove, Match: "0002.log"},
		}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := durabletest.New()
			c := config(m)
			c.SegmentSize, c.Block = 6000, 1000
			s := open(t, c)
			a := keyID(1)
			for _, f := range tc.faults {
				m.Inject(f)
			}
			var want []merkle.Hash
			var stopped error
			for range 80 {
				seq, err := s.Reserve(a)
				if err == nil {
					err = s.Record(a, seq, digest(seq))
				}
				if err != nil {
					stopped = err
					break
				}
				want = append(want, leaf(seq, digest(seq)))
			}
			if tc.stops != (stopped != nil) || tc.stops != (s.Err() != nil) {
				t.Fatalf("stopped with %v, Err %v", stopped, s.Err())
			}
			wantHead(t, s, a, uint64(len(want)), want...)
			if !tc.stops {
				if names, _ := m.ReadDir(dir); len(names) != 2 {
					t.Errorf("segments %q: no later attempt was made", names)
				}
			}
			c = config(m.Kill())
			wantHead(t, open(t, c), a, 1000, want...)
		})
	}
}

func TestDiskFaults(t *testing.T) {
	m := durabletest.New()
	s := open(t, config(m))
	a := keyID(1)
	seq := reserve(t, s, a)
	m.Inject(durabletest.Fault{Op: durabletest.Write, Err: syscall.ENOSPC})
	if err := s.Record(a, seq, digest(seq)); !errors.Is(err, fault.Unavailable) {
		t.Errorf("a full disk: %v", err)
	}
	wantHead(t, s, a, 1)
	record(t, s, a, reserve(t, s, a)) // there is room again
	for range 2 {
		reserve(t, s, a)
	}
	m.Inject(durabletest.Fault{Op: durabletest.Sync})
	for range 2 { // the block must be durable; the disk is well the second time
		if _, err := s.Reserve(a); !errors.Is(err, fault.Unavailable) {
			t.Errorf("a disk that cannot sync: %v", err)
		}
	}
	if err := s.Record(a, 3, digest(3)); !errors.Is(err, fault.Unavailable) || s.Err() == nil {
		t.Errorf("a disk that could not sync: %v, %v", err, s.Err())
	}
	if err := s.Close(); err == nil {
		t.Error("Close says that all is well")
	}
}

func TestCorruptSegment(t *testing.T) {
	m := durabletest.New()
	s := open(t, config(m))
	record(t, s, keyID(1), reserve(t, s, keyID(1)))
	_ = s.Close()
	name := filepath.Join(dir, "000000000001.log")
	b := m.Content(name)
	b[len(b)-30] ^= 1
	m.SetContent(name, b)
	if _, err := history.Open(dir, config(m)); !errors.Is(err, fault.Corrupt) || !strings.Contains(err.Error(), "000000000001.log") {
		t.Errorf("got %v", err)
	}
}

// FuzzSegment: no records make the reader panic.
func FuzzSegment(f *testing.F) {
	f.Add([]byte{6, 'b'}, []byte{})
	f.Add(append([]byte{2}, make([]byte, 32)...), append([]byte{3, 0, 0, 0, 0}, make([]byte, 16)...))
	f.Add([]byte{4, 0, 0, 0, 0}, []byte{7})
	f.Add(append([]byte{1, 1, 'b'}, make([]byte, 72)...), []byte{5, 0, 0, 0, 1})
	f.Fuzz(func(t *testing.T, one, two []byte) {
		m := durabletest.New()
		recs := slices.DeleteFunc([][]byte{{1, 0}, one, two}, func(b []byte) bool { return len(b) == 0 })
		if len(one) > 0 && one[0] == 1 {
			recs = recs[1:]
		}
		l, err := durable.LogConfig{
			Path: filepath.Join(dir, "000000000001.log"), Purpose: "trustd signature history", FS: m, Initial: recs,
		}.Open(func([]byte) error { return nil })
		if err != nil {
			t.Fatal(err)
		}
		_ = l.Close()
		s, err := history.Open(dir, config(m))
		if err != nil {
			if fault.CodeOf(err) != fault.Corrupt {
				t.Fatal(err)
			}
			return
		}
		record(t, s, keyID(1), reserve(t, s, keyID(1)))
		_ = s.Close()
	})
}

// TestModel drives a store through signatures of two keys, roll-overs, kills and losses of power. No number ever
// comes twice; after a kill every leaf is there; after a loss of power the lost leaves are the latest, and a gap
// covers their numbers.
func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		m := durabletest.New()
		boot := 1
		cfg := func() history.Config {
			c := config(m)
			c.BootID, c.SegmentSize, c.Segments = fmt.Sprintf("boot-%d", boot), 4600, 2
			return c
		}
		s, err := history.Open(dir, cfg())
		if err != nil {
			t.Fatal(err)
		}
		last := map[int]uint64{}          // the highest number that was given out
		leaves := map[int][]merkle.Hash{} // what the tree must hold
		tail := map[int][]uint64{}        // numbers of the leaves at the end, since the process began
		reopen := func(power bool) {
			_ = s.Close()
			if s, err = history.Open(dir, cfg()); err != nil {
				t.Fatalf("opening: %s", fault.From(err).Verbose())
			}
			for k := range last {
				leaves[k] = survived(t, s, k, leaves[k], tail[k], power)
				tail[k] = nil
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"sign": func(t *rapid.T) {
				k := rapid.IntRange(1, 2).Draw(t, "key")
				for range rapid.IntRange(1, 6).Draw(t, "times") {
					seq, err := s.Reserve(keyID(k))
					if err != nil {
						t.Fatal(err)
					}
					if seq <= last[k] {
						t.Fatalf("number %d came after %d", seq, last[k])
					}
					last[k] = seq
					if rapid.IntRange(0, 4).Draw(t, "abandon") == 0 {
						continue
					}
					if err := s.Record(keyID(k), seq, digest(seq)); err != nil {
						t.Fatal(err)
					}
					leaves[k], tail[k] = append(leaves[k], leaf(seq, digest(seq))), append(tail[k], seq)
				}
			},
			"sync": func(*rapid.T) {
				if s.Sync(context.Background()) == nil {
					clear(tail) // nothing of it can be lost
				}
			},
			"kill": func(*rapid.T) {
				next := m.Kill()
				_ = s.Close()
				m = next
				reopen(false)
			},
			"power": func(t *rapid.T) {
				next := m.PowerLoss(r, rapid.Bool().Draw(t, "holes"))
				_ = s.Close()
				m, boot = next, boot+1
				reopen(true)
			},
			"": func(t *rapid.T) {
				for k := range last {
					if _, size, got := s.Head(keyID(k)); size != uint64(len(leaves[k])) || got != root(leaves[k]...) {
						t.Fatalf("key %d: %d leaves, want %d", k, size, len(leaves[k]))
					}
				}
			},
		})
		_ = s.Close()
	})
}

// survived returns the leaves of a key after its store was opened again. want are those before, of which the last
// len(tail), with those numbers, may be lost if the power was.
func survived(t *rapid.T, s *history.Store, k int, want []merkle.Hash, tail []uint64, power bool) []merkle.Hash {
	seq, size, got := s.Head(keyID(k))
	if size == uint64(len(want)) && got == root(want...) {
		return want
	}
	for lost := 0; power && lost <= len(tail); lost++ {
		kept := want[:len(want)-lost]
		from := seq
		if lost > 0 {
			from = slices.Min(tail[len(tail)-lost:])
		}
		for ; from > 0; from-- { // the gap covers all that is lost, and perhaps more
			if all := append(slices.Clone(kept), gap(from, seq+1)); size == uint64(len(all)) && got == root(all...) {
				return all
			}
		}
	}
	t.Fatalf("key %d: %d leaves; want %d, power lost: %v", k, size, len(want), power)
	return nil
}

func TestConcurrent(t *testing.T) {
	m := durabletest.New()
	c := config(m)
	c.Block, c.SegmentSize, c.Segments = 64, 8000, -1
	s := open(t, c)
	var mu sync.Mutex
	seen := map[string]bool{}
	var wg sync.WaitGroup
	const workers, each = 8, 100
	for w := range workers {
		wg.Go(func() {
			key := keyID(w % 3)
			for range each {
				seq, err := s.Reserve(key)
				if err == nil {
					err = s.Record(key, seq, digest(seq))
				}
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				name := fmt.Sprint(w%3, seq)
				if seen[name] {
					t.Errorf("number %d of key %d came twice", seq, w%3)
				}
				seen[name] = true
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	s2 := open(t, func() history.Config { c := c; c.FS = m.Kill(); return c }())
	total := uint64(0)
	for k := range 3 {
		_, size, r := s.Head(keyID(k))
		_, size2, r2 := s2.Head(keyID(k))
		if size != size2 || r != r2 {
			t.Errorf("key %d: %d leaves on the disk, %d in memory", k, size2, size)
		}
		total += size
	}
	if total != workers*each {
		t.Errorf("%d leaves, want %d", total, workers*each)
	}
	if names, _ := m.ReadDir(dir); len(names) < 3 {
		t.Errorf("segments %q", names)
	}
}

// TestManyKeys: a thousand keys need one open file and little memory.
func TestManyKeys(t *testing.T) {
	d := t.TempDir()
	s, err := history.Open(d, history.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	files := func() int {
		names, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(names)
	}
	before := files()
	var m1, m2 runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m1)
	const keys, limit = 1000, 3 << 10
	var wg sync.WaitGroup
	for w := range 20 {
		wg.Go(func() {
			for k := w; k < keys; k += 20 {
				seq, err := s.Reserve(keyID(k))
				if err == nil {
					err = s.Record(keyID(k), seq, digest(seq))
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	runtime.GC()
	runtime.ReadMemStats(&m2)
	if after := files(); after > before {
		t.Errorf("%d open files, %d before", after, before)
	}
	if each := (int64(m2.HeapAlloc) - int64(m1.HeapAlloc)) / keys; each > limit {
		t.Errorf("a key takes %d bytes", each)
	}
}

// A fake is a signer that fails on order, and checks that what it is asked to sign is in the history.
type fake struct {
	t     *testing.T
	priv  ed25519.PrivateKey
	pub   ident.PublicKey
	store *history.Store
	err   error
	calls int
}

func newFake(t *testing.T, s *history.Store) *fake {
	priv := ed25519.NewKeyFromSeed(make([]byte, 32))
	pub, err := ident.NewPublicKey(priv.Public())
	if err != nil {
		t.Fatal(err)
	}
	return &fake{t: t, priv: priv, pub: pub, store: s}
}

func (f *fake) Public() ident.PublicKey { return f.pub }

func (f *fake) Sign(_ context.Context, msg []byte) ([]byte, error) {
	f.calls++
	if _, size, _ := f.store.Head(f.pub.ID()); size < uint64(f.calls) {
		f.t.Error("a signature was asked for before its message was recorded")
	}
	if f.err != nil {
		return nil, f.err
	}
	return ed25519.Sign(f.priv, msg), nil
}

func TestSigner(t *testing.T) {
	m := durabletest.New()
	store := open(t, config(m))
	f := newFake(t, store)
	s := store.Wrap(f)
	ctx := context.Background()
	if !s.Public().Equal(f.pub) {
		t.Error("another public key")
	}
	sig, err := s.Sign(ctx, []byte("one"))
	if err != nil || signature.Verify(f.pub, []byte("one"), sig) != nil {
		t.Fatalf("signature %x, %v", sig, err)
	}
	seq, err := s.Reserve()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Note(seq, []byte("two")); err != nil {
		t.Error(err)
	}
	if out := s.SignEach(ctx, [][]byte{[]byte("two")}, []uint64{seq}); out[0].Err != nil {
		t.Error(out[0].Err)
	}
	if err := s.Note(seq, []byte("three")); !errors.Is(err, history.ErrLapsed) {
		t.Errorf("one number, two messages: %v", err)
	}
	want := []merkle.Hash{leaf(1, sha256.Sum256([]byte("one"))), leaf(2, sha256.Sum256([]byte("two")))}
	var msgs [][]byte
	for n := range uint64(9) { // more than two blocks
		msgs = append(msgs, []byte{byte(n)})
		want = append(want, leaf(n+3, sha256.Sum256(msgs[n])))
	}
	numbers := make([]uint64, len(msgs))
	for i, r := range s.SignEach(ctx, msgs, numbers) {
		if numbers[i] != uint64(i)+3 {
			t.Errorf("message %d has the number %d", i, numbers[i])
		}
		if r.Err != nil || signature.Verify(f.pub, msgs[i], r.Signature) != nil {
			t.Errorf("message %d: %v", i, r.Err)
		}
	}
	wantHead(t, store, f.pub.ID(), 11, want...)

	// One signature for three messages, of which one stands in the history already.
	seq, err = s.Reserve()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Note(seq, []byte("b")); err != nil {
		t.Error(err)
	}
	digests := [][sha256.Size]byte{sha256.Sum256([]byte("a")), {}, sha256.Sum256([]byte("c"))}
	numbers = []uint64{0, seq, 0}
	f.calls = 0
	sig, err = s.SignOver(ctx, digests, numbers, []byte("statement"))
	if err != nil || signature.Verify(f.pub, []byte("statement"), sig) != nil || f.calls != 1 {
		t.Errorf("%d calls, %v", f.calls, err)
	}
	if !slices.Equal(numbers, []uint64{13, 12, 14}) {
		t.Errorf("numbers %v", numbers)
	}
	want = append(want, leaf(12, sha256.Sum256([]byte("b"))), leaf(13, digests[0]), leaf(14, digests[2]))
	wantHead(t, store, f.pub.ID(), 14, want...)

	f.err = fault.New(fault.DeviceLost, "")
	if _, err := s.Sign(ctx, []byte("x")); !errors.Is(err, fault.DeviceLost) {
		t.Errorf("got %v", err)
	}
	if r := s.SignEach(ctx, nil, nil); len(r) != 0 {
		t.Errorf("results %v", r)
	}
}

// TestNumbersDoNotLapse: batches of many callers of one key, each a whole block, do not take each other's numbers.
func TestNumbersDoNotLapse(t *testing.T) {
	store := open(t, config(durabletest.New()))
	key := ident.KeyID{1}
	each := int(config(nil).Block)
	var mu sync.Mutex
	seen := map[uint64]bool{}
	var wg sync.WaitGroup
	const callers, rounds = 8, 10
	for range callers {
		wg.Go(func() {
			for range rounds {
				seqs, err := store.Enter(key, make([][sha256.Size]byte, each))
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				for _, n := range seqs {
					if seen[n] {
						t.Errorf("number %d twice", n)
					}
					seen[n] = true
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if _, size, _ := store.Head(key); size != uint64(callers*rounds*each) {
		t.Errorf("%d leaves after %d signatures", size, callers*rounds*each)
	}
	if _, err := store.Enter(key, make([][sha256.Size]byte, history.MaxEnter+1)); !errors.Is(err, fault.TooLarge) {
		t.Errorf("more than it takes: %v", err)
	}
}

// TestNothingIsSignedUnrecorded: where the history cannot be written, the device is not even asked.
func TestNothingIsSignedUnrecorded(t *testing.T) {
	m := durabletest.New()
	store := open(t, config(m))
	f := newFake(t, store)
	s := store.Wrap(f)
	reserve(t, store, f.pub.ID())
	m.Inject(durabletest.Fault{Op: durabletest.Write, Err: syscall.ENOSPC, Always: true})
	if _, err := s.Sign(context.Background(), []byte("x")); !errors.Is(err, fault.Unavailable) {
		t.Errorf("got %v", err)
	}
	for _, r := range s.SignEach(context.Background(), [][]byte{{1}, {2}, {3}, {4}, {5}}, make([]uint64, 5)) {
		if !errors.Is(r.Err, fault.Unavailable) {
			t.Errorf("got %v", r.Err)
		}
	}
	if _, err := s.SignOver(context.Background(), make([][sha256.Size]byte, 3), make([]uint64, 3), []byte("x")); !errors.Is(err, fault.Unavailable) {
		t.Errorf("got %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	m.Heal()
	if _, err := s.Sign(ctx, []byte("x")); err == nil {
		t.Error("signed for nobody")
	}
	if f.calls != 0 {
		t.Errorf("the device was asked %d times", f.calls)
	}
}

// TestKill kills a process that signs with three keys. Every message that it said it may release is a leaf, no
// number comes twice, and the trees are those of the leaves in the files, read here from the format's description.
func TestKill(t *testing.T) {
	if d := os.Getenv("TRUSTD_TEST_HISTORY"); d != "" {
		signForever(t, d)
		return
	}
	d := t.TempDir()
	said := map[string]bool{}
	for round := range 3 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKill$")
		cmd.Env = append(os.Environ(), "TRUSTD_TEST_HISTORY="+d)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			if said[lines.Text()] {
				t.Fatalf("%q came twice", lines.Text())
			}
			said[lines.Text()] = true
			if len(said) == 500*(round+1) {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		_ = cmd.Wait()
	}
	s, err := history.Open(d, killConfig)
	if err != nil {
		t.Fatal(err)
	}
	heads := map[ident.KeyID]string{}
	for k := range 3 {
		_, size, root := s.Head(keyID(k))
		heads[keyID(k)] = fmt.Sprintf("%d %x", size, root)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	found, trees := readAll(t, d)
	for line := range said {
		if !found[line] {
			t.Fatalf("%q may have been released and is not in the history", line)
		}
	}
	for k := range 3 {
		tree := trees[keyID(k)]
		if got := fmt.Sprintf("%d %x", tree.Size(), tree.Root()); got != heads[keyID(k)] {
			t.Errorf("key %d: the files hold %s, the store says %s", k, got, heads[keyID(k)])
		}
	}
}

var killConfig = history.Config{Block: 16, SegmentSize: 16 << 10, Segments: -1}

func signForever(t *testing.T, d string) {
	s, err := history.Open(d, killConfig)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for k := range 3 {
		wg.Go(func() {
			for {
				seq, err := s.Reserve(keyID(k))
				if err != nil {
					t.Error(err)
					return
				}
				if err := s.Record(keyID(k), seq, digest(seq)); err != nil {
					t.Error(err)
					return
				}
				fmt.Printf("%s %d\n", keyID(k), seq) // one write(2)
			}
		})
	}
	wg.Wait()
}

// readAll reads all segments as docs/formats/history.md describes them.
func readAll(t *testing.T, d string) (found map[string]bool, trees map[ident.KeyID]*merkle.Tree) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(d, "*.log"))
	if err != nil || len(names) < 2 {
		t.Fatalf("segments %q, %v", names, err)
	}
	found, trees = map[string]bool{}, map[ident.KeyID]*merkle.Tree{}
	var keys []ident.KeyID
	u64 := binary.BigEndian.Uint64
	for _, name := range names {
		l, err := durable.LogConfig{Path: name, Purpose: "trustd signature history"}.Open(func(b []byte) error {
			switch b[0] {
			case 1:
				keys = nil
				for b = b[2+int(b[1]):]; len(b) > 0; {
					key := ident.KeyID(b)
					keys = append(keys, key)
					n := 32 + 4*8 + 8 + 32*bits.OnesCount64(u64(b[64:]))
					var tree merkle.Tree
					if err := tree.UnmarshalBinary(b[64:n]); err != nil {
						return err
					}
					if old := trees[key]; old == nil || old.Root() != tree.Root() {
						return errors.New("a snapshot has another tree than the segment before")
					}
					b = b[n:]
				}
			case 2:
				keys = append(keys, ident.KeyID(b[1:]))
				trees[keys[len(keys)-1]] = &merkle.Tree{}
			case 4:
				key := keys[binary.BigEndian.Uint32(b[1:])]
				for b = b[5:]; len(b) > 0; b = b[40:] {
					trees[key].Append(leaf(u64(b), [32]byte(b[8:])))
					found[fmt.Sprintf("%s %d", key, u64(b))] = true
				}
			case 5:
				return errors.New("a gap without a loss of power")
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return found, trees
}

func BenchmarkSign(b *testing.B) {
	for _, keys := range []int{1, 1000} {
		b.Run(fmt.Sprintf("keys=%d", keys), func(b *testing.B) {
			s, err := history.Open(b.TempDir(), history.Config{})
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = s.Close() }()
			ids := make([]ident.KeyID, keys)
			for k := range ids {
				ids[k] = keyID(k)
				reserve(b, s, ids[k])
			}
			i := 0
			for b.Loop() {
				i++
				seq, err := s.Reserve(ids[i%keys])
				if err == nil {
					err = s.Record(ids[i%keys], seq, [32]byte{})
				}
				if err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkOpen(b *testing.B) {
	d := b.TempDir()
	s, err := history.Open(d, history.Config{})
	if err != nil {
		b.Fatal(err)
	}
	for range 200_000 {
		seq, err := s.Reserve(keyID(1))
		if err == nil {
			err = s.Record(keyID(1), seq, [32]byte{})
		}
		if err != nil {
			b.Fatal(err)
		}
	}
	_ = s.Close()
	for b.Loop() {
		s, err := history.Open(d, history.Config{})
		if err != nil {
			b.Fatal(err)
		}
		_ = s.Close()
	}
}
