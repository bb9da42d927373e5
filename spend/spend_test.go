package spend_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/clock"
	"github.com/trustd/trustd/internal/durable"
	"github.com/trustd/trustd/spend"
)

var start = time.Date(2026, 3, 8, 12, 0, 0, 0, time.UTC)

var keyA, keyB = ident.KeyID{1}, ident.KeyID{2}

func open(t *testing.T, dir string, c spend.Config) *spend.Store {
	t.Helper()
	s, err := spend.Open(dir, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func nonce(key ident.KeyID, text string, keep time.Duration) spend.Nonce {
	return spend.Nonce{Key: key, Nonce: text, Keep: keep}
}

// commit spends one nonce and demands the code: "" for success.
func commit(t *testing.T, s *spend.Store, n spend.Nonce, want fault.Code) {
	t.Helper()
	errs := s.Commit(t.Context(), []spend.Nonce{n})
	if len(errs) != 1 || fault.CodeOf(errs[0]) != want {
		t.Fatalf("Commit(%s) = %v, want code %q", n.Nonce, errs, want)
	}
}

func shut(t *testing.T, s *spend.Store) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestCommit(t *testing.T) {
	s := open(t, t.TempDir(), spend.Config{Clock: clock.NewFake(start)})
	errs := s.Commit(t.Context(), []spend.Nonce{
		nonce(keyA, "n1", time.Minute), nonce(keyA, "n2", time.Minute), nonce(keyA, "n1", time.Minute),
		nonce(keyB, "n1", time.Minute), nonce(keyA, "n1\x00", time.Minute), nonce(keyA, "", time.Minute),
		nonce(ident.KeyID{}, "n", time.Minute), nonce(keyA, "late", -1), nonce(keyA, "long", 2*spend.MaxKeep),
	})
	want := []fault.Code{"", "", fault.ReplayDetected, "", "", fault.Internal, fault.Internal, fault.Expired,
		fault.Internal}
	for i, w := range want {
		if fault.CodeOf(errs[i]) != w {
			t.Errorf("nonce %d: %v, want %q", i, errs[i], w)
		}
	}
	if s.Len() != 4 {
		t.Errorf("Len() = %d, want 4", s.Len())
	}
	if errs := s.Commit(t.Context(), nil); len(errs) != 0 {
		t.Errorf("nothing spent: %v", errs)
	}
	shut(t, s)
	commit(t, s, nonce(keyA, "n9", time.Minute), fault.Stopping)
	shut(t, s)
}

// TestExpiry moves the clocks over the last second of an entry.
func TestExpiry(t *testing.T) {
	c := clock.NewFake(start)
	s := open(t, t.TempDir(), spend.Config{Clock: c})
	n := nonce(keyA, "n1", 90*time.Second)
	commit(t, s, n, "")
	c.Advance(90 * time.Second)
	commit(t, s, n, fault.ReplayDetected)
	c.Advance(2 * time.Second)
	commit(t, s, n, "")
	if s.Len() != 1 {
		t.Errorf("Len() = %d, want 1", s.Len())
	}
}

// TestWallClockMoves: a wall clock that is set does not shorten an entry's life, and one that is set back keeps it
// for as long as its message is valid again.
func TestWallClockMoves(t *testing.T) {
	c := clock.NewFake(start)
	s := open(t, t.TempDir(), spend.Config{Clock: c})
	n := nonce(keyA, "n1", time.Minute)
	commit(t, s, n, "")
	c.SetWall(start.Add(240 * time.Hour))
	commit(t, s, n, fault.ReplayDetected)
	c.SetWall(start.Add(-time.Hour))
	c.Advance(10 * time.Minute)
	commit(t, s, n, fault.ReplayDetected)
	c.Advance(52 * time.Minute)
	commit(t, s, n, "")
}

// TestRestart closes and opens the store in the same boot and across reboots.
func TestRestart(t *testing.T) {
	cases := []struct {
		name string
		move func(c *clock.Fake)
		want fault.Code
	}{
		{"at once", func(*clock.Fake) {}, fault.ReplayDetected},
		{"same boot, before its end", func(c *clock.Fake) { c.Advance(10 * time.Minute) }, fault.ReplayDetected},
		{"same boot, after its end", func(c *clock.Fake) { c.Advance(10*time.Minute + 2*time.Second) }, ""},
		{"same boot, wall clock set ahead", func(c *clock.Fake) { c.SetWall(start.Add(time.Hour)) },
			fault.ReplayDetected},
		{"reboot, no time gone", func(c *clock.Fake) { c.Reboot("b2", start) }, fault.ReplayDetected},
		{"reboot, wall clock in 1970", func(c *clock.Fake) { c.Reboot("b2", time.Unix(0, 0)) }, fault.ReplayDetected},
		{"reboot, before its end", func(c *clock.Fake) { c.Reboot("b2", start.Add(10*time.Minute)) },
			fault.ReplayDetected},
		{"reboot, after its end", func(c *clock.Fake) { c.Reboot("b2", start.Add(10*time.Minute+2*time.Second)) }, ""},
		{"reboot, then uptime", func(c *clock.Fake) {
			c.Reboot("b2", start.Add(time.Minute))
			c.Advance(9 * time.Minute)
		}, fault.ReplayDetected},
		{"two reboots", func(c *clock.Fake) {
			c.Reboot("b2", start.Add(time.Minute))
			c.Reboot("b3", start.Add(10*time.Minute))
		}, fault.ReplayDetected},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			dir, c := t.TempDir(), clock.NewFake(start)
			n := nonce(keyA, "n1", 10*time.Minute)
			s := open(t, dir, spend.Config{Clock: c})
			commit(t, s, n, "")
			shut(t, s)
			tc.move(c)
			commit(t, open(t, dir, spend.Config{Clock: c}), n, tc.want)
		})
	}
}

// TestWallFloor: the wall clock was ahead once and set right again. Across a reboot the store counts from the
// highest reading it noted, so the entry stays.
func TestWallFloor(t *testing.T) {
	dir, c := t.TempDir(), clock.NewFake(start)
	s := open(t, dir, spend.Config{Clock: c})
	n := nonce(keyA, "n1", 10*time.Minute)
	commit(t, s, n, "")
	c.SetWall(start.Add(24 * time.Hour))
	commit(t, s, nonce(keyA, "n2", time.Second), "")
	c.SetWall(start)
	shut(t, s)
	for i, wall := range []time.Time{start.Add(5 * time.Minute), start.Add(23 * time.Hour)} {
		c.Reboot(fmt.Sprint("boot", i), wall)
		s := open(t, dir, spend.Config{Clock: c})
		commit(t, s, n, fault.ReplayDetected)
		shut(t, s)
	}
}

func TestFull(t *testing.T) {
	dir, c := t.TempDir(), clock.NewFake(start)
	s := open(t, dir, spend.Config{Clock: c, Max: 100})
	for i := range 100 {
		commit(t, s, nonce(keyA, fmt.Sprint(i), time.Minute), "")
	}
	commit(t, s, nonce(keyA, "one more", time.Minute), fault.ReplayStoreFull)
	commit(t, s, nonce(keyA, "7", time.Minute), fault.ReplayDetected)
	if s.Len() != 100 || s.Max() != 100 {
		t.Errorf("Len() = %d of %d", s.Len(), s.Max())
	}
	shut(t, s)
	s = open(t, dir, spend.Config{Clock: c, Max: 100})
	commit(t, s, nonce(keyA, "one more", time.Minute), fault.ReplayStoreFull)
	c.Advance(62 * time.Second)
	commit(t, s, nonce(keyA, "one more", time.Minute), "")
	if s.Len() != 1 {
		t.Errorf("Len() = %d after all but one expired", s.Len())
	}
}

// TestSegments spends for a long time: expired entries leave memory and disk, unexpired ones do not.
func TestSegments(t *testing.T) {
	dir, c := t.TempDir(), clock.NewFake(start)
	s := open(t, dir, spend.Config{Clock: c, SegmentSize: 16 << 10})
	long := nonce(keyB, "kept for a day", 24*time.Hour)
	commit(t, s, long, "")
	batch := make([]spend.Nonce, 200)
	for round := range 100 {
		for i := range batch {
			batch[i] = nonce(keyA, fmt.Sprint(round, "/", i), time.Minute)
		}
		for _, err := range s.Commit(t.Context(), batch) {
			if err != nil {
				t.Fatal(err)
			}
		}
		c.Advance(10 * time.Second)
		if s.Len() > 200*20 {
			t.Fatalf("round %d: %d nonces in memory", round, s.Len())
		}
	}
	files, err := filepath.Glob(filepath.Join(dir, "spent-*"))
	if err != nil {
		t.Fatal(err)
	}
	if len(files) < 2 || len(files) > 8 {
		t.Errorf("%d files: the one with the long entry and the recent ones were to stay", len(files))
	}
	shut(t, s)
	s = open(t, dir, spend.Config{Clock: c, SegmentSize: 16 << 10})
	commit(t, s, long, fault.ReplayDetected)
	commit(t, s, batch[0], fault.ReplayDetected)
	if s.Len() > 200*8 {
		t.Errorf("%d nonces after a restart", s.Len())
	}
	c.Advance(25 * time.Hour)
	shut(t, s)
	s = open(t, dir, spend.Config{Clock: c})
	if files, _ = filepath.Glob(filepath.Join(dir, "spent-*")); len(files) != 1 || s.Len() != 0 {
		t.Errorf("%d files and %d nonces after all expired", len(files), s.Len())
	}
}

// TestSameNonceOnce races 64 goroutines for each of 50 nonces.
func TestSameNonceOnce(t *testing.T) {
	s := open(t, t.TempDir(), spend.Config{Clock: clock.NewFake(start), SegmentSize: 8 << 10})
	for round := range 50 {
		var won, lost atomic.Int64
		var wg sync.WaitGroup
		for range 64 {
			wg.Go(func() {
				err := s.Commit(t.Context(), []spend.Nonce{nonce(keyA, fmt.Sprint(round), time.Minute)})[0]
				switch fault.CodeOf(err) {
				case "":
					won.Add(1)
				case fault.ReplayDetected:
					lost.Add(1)
				default:
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if won.Load() != 1 || lost.Load() != 63 {
			t.Fatalf("round %d: %d accepted, %d refused", round, won.Load(), lost.Load())
		}
	}
}

func TestOneOwner(t *testing.T) {
	dir, c := t.TempDir(), clock.NewFake(start)
	s := open(t, dir, spend.Config{Clock: c})
	if _, err := spend.Open(dir, spend.Config{Clock: c}); !errors.Is(err, fault.Unavailable) {
		t.Errorf("second owner: %v", err)
	}
	shut(t, s)
	open(t, dir, spend.Config{Clock: c})
	if _, err := spend.Open(t.TempDir(), spend.Config{}); err == nil {
		t.Error("opened without a clock")
	}
}

// TestDamage: a torn end is cut off; damage before it keeps the store shut.
func TestDamage(t *testing.T) {
	setup := func(t *testing.T) (dir, file string, c *clock.Fake) {
		dir, c = t.TempDir(), clock.NewFake(start)
		s := open(t, dir, spend.Config{Clock: c})
		for i := range 10 {
			commit(t, s, nonce(keyA, fmt.Sprint(i), time.Hour), "")
		}
		shut(t, s)
		files, err := filepath.Glob(filepath.Join(dir, "spent-*"))
		if err != nil || len(files) != 1 {
			t.Fatal(files, err)
		}
		return dir, files[0], c
	}
	t.Run("torn end", func(t *testing.T) {
		dir, file, c := setup(t)
		f, err := os.OpenFile(file, os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Write([]byte{0, 0, 0, 60, 1, 2, 3, 4, 'b', 0, 0}); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		s := open(t, dir, spend.Config{Clock: c})
		for i := range 10 {
			commit(t, s, nonce(keyA, fmt.Sprint(i), time.Hour), fault.ReplayDetected)
		}
	})
	t.Run("flipped bit", func(t *testing.T) {
		dir, file, c := setup(t)
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		b[4096+100] ^= 1
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if _, err := spend.Open(dir, spend.Config{Clock: c}); !errors.Is(err, fault.Corrupt) {
				t.Fatalf("Open = %v, want corrupt", err)
			}
		}
	})
	t.Run("foreign record", func(t *testing.T) {
		dir, file, c := setup(t)
		log, err := durable.LogConfig{Path: file, Purpose: "spend/nonces"}.Open(func([]byte) error { return nil })
		if err != nil {
			t.Fatal(err)
		}
		if err := log.Append(t.Context(), []byte("b too short")); err != nil {
			t.Fatal(err)
		}
		if err := log.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := spend.Open(dir, spend.Config{Clock: c}); !errors.Is(err, fault.Corrupt) {
			t.Fatalf("Open = %v, want corrupt", err)
		}
	})
}

// failingFS is the real disk with errors on order.
type failingFS struct {
	durable.FS
	write, sync, create, remove atomic.Pointer[error]

	held atomic.Pointer[chan struct{}] // Sync announces itself here, then waits for it to be closed
}

func (f *failingFS) OpenFile(name string, flag int, perm fs.FileMode) (durable.File, error) {
	if e := f.create.Load(); e != nil && flag&os.O_CREATE != 0 {
		return nil, *e
	}
	file, err := f.FS.OpenFile(name, flag, perm)
	if err != nil {
		return nil, err
	}
	return &failingFile{File: file, fs: f}, nil
}

type failingFile struct {
	durable.File
	fs *failingFS
}

func (f *failingFile) WriteAt(b []byte, off int64) (int, error) {
	if e := f.fs.write.Load(); e != nil {
		n, _ := f.File.WriteAt(b[:len(b)/2], off) // a full disk takes a part
		return n, *e
	}
	return f.File.WriteAt(b, off)
}

func (f *failingFS) Remove(name string) error {
	if e := f.remove.Load(); e != nil && strings.HasPrefix(filepath.Base(name), "spent-") {
		return *e
	}
	return f.FS.Remove(name)
}

func (f *failingFile) Sync() error {
	if held := f.fs.held.Load(); held != nil {
		*held <- struct{}{}
		<-*held
	}
	if e := f.fs.sync.Load(); e != nil {
		return *e
	}
	return f.File.Sync()
}

// TestDiskFull: nothing is spent while the disk is full, and everything works once it is not.
func TestDiskFull(t *testing.T) {
	dir, c := t.TempDir(), clock.NewFake(start)
	disk := &failingFS{FS: durable.Disk}
	s := open(t, dir, spend.Config{Clock: c, FS: disk})
	commit(t, s, nonce(keyA, "before", time.Minute), "")
	var full error = syscall.ENOSPC
	disk.write.Store(&full)
	for range 3 {
		errs := s.Commit(t.Context(), []spend.Nonce{nonce(keyA, "during", time.Minute)})
		if !errors.Is(errs[0], fault.ReplayStoreFailed) {
			t.Fatalf("on a full disk: %v", errs[0])
		}
		if text := fault.From(errs[0]).Error(); strings.Contains(text, "space") {
			t.Errorf("the text names the cause: %s", text)
		}
	}
	commit(t, s, nonce(keyA, "before", time.Minute), fault.ReplayDetected)
	if s.Len() != 1 {
		t.Errorf("Len() = %d, want 1", s.Len())
	}
	disk.write.Store(nil)
	commit(t, s, nonce(keyA, "during", time.Minute), "")
	shut(t, s)
	s = open(t, dir, spend.Config{Clock: c})
	commit(t, s, nonce(keyA, "before", time.Minute), fault.ReplayDetected)
	commit(t, s, nonce(keyA, "during", time.Minute), fault.ReplayDetected)
}

// TestSyncFails: whether the nonce is on disk is not known, so it is neither accepted nor free again. The store
// goes on in a new file.
func TestSyncFails(t *testing.T) {
	dir, c := t.TempDir(), clock.NewFake(start)
	disk := &failingFS{FS: durable.Disk}
	s := open(t, dir, spend.Config{Clock: c, FS: disk})
	commit(t, s, nonce(keyA, "before", time.Minute), "")
	var eio error = syscall.EIO
	disk.sync.Store(&eio)
	commit(t, s, nonce(keyA, "doubtful", time.Minute), fault.ReplayStoreFailed)
	commit(t, s, nonce(keyA, "doubtful", time.Minute), fault.ReplayDetected)
	disk.create.Store(&eio)
	commit(t, s, nonce(keyA, "next", time.Minute), fault.ReplayStoreFailed)
	disk.create.Store(nil)
	disk.sync.Store(nil)
	commit(t, s, nonce(keyA, "next", time.Minute), "")
	shut(t, s)
	s = open(t, dir, spend.Config{Clock: c})
	commit(t, s, nonce(keyA, "before", time.Minute), fault.ReplayDetected)
	commit(t, s, nonce(keyA, "next", time.Minute), fault.ReplayDetected)
}

func TestCanceled(t *testing.T) {
	s := open(t, t.TempDir(), spend.Config{Clock: clock.NewFake(start)})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if errs := s.Commit(ctx, []spend.Nonce{nonce(keyA, "n1", time.Minute)}); !errors.Is(errs[0], fault.Canceled) {
		t.Fatal(errs[0])
	}
	commit(t, s, nonce(keyA, "n1", time.Minute), "")
}

// TestCanceledInDoubt: the caller goes away while the disk works. Nobody was told that the nonce is spent, and nobody
// can spend it again.
func TestCanceledInDoubt(t *testing.T) {
	disk := &failingFS{FS: durable.Disk}
	s := open(t, t.TempDir(), spend.Config{Clock: clock.NewFake(start), FS: disk})
	commit(t, s, nonce(keyA, "before", time.Minute), "")
	held := make(chan struct{})
	disk.held.Store(&held)
	ctx, cancel := context.WithCancel(t.Context())
	answer := make(chan error)
	go func() { answer <- s.Commit(ctx, []spend.Nonce{nonce(keyA, "doubtful", time.Minute)})[0] }()
	<-held // the sync has begun
	cancel()
	if err := <-answer; !errors.Is(err, fault.Canceled) {
		t.Fatalf("canceled during the sync: %v", err)
	}
	disk.held.Store(nil)
	close(held)
	commit(t, s, nonce(keyA, "doubtful", time.Minute), fault.ReplayDetected)
	commit(t, s, nonce(keyA, "next", time.Minute), "")
}

// TestFolderFails: no new file can be begun and no old one deleted. The store goes on with what it has, and makes
// up for it later.
func TestFolderFails(t *testing.T) {
	dir, c := t.TempDir(), clock.NewFake(start)
	disk := &failingFS{FS: durable.Disk}
	s := open(t, dir, spend.Config{Clock: c, FS: disk, SegmentSize: 5 << 10})
	files := func() int {
		names, err := filepath.Glob(filepath.Join(dir, "spent-*"))
		if err != nil {
			t.Fatal(err)
		}
		return len(names)
	}
	spendSome := func(prefix string) {
		for i := range 40 {
			commit(t, s, nonce(keyA, fmt.Sprint(prefix, i), time.Minute), "")
		}
	}
	var eio error = syscall.EIO
	disk.create.Store(&eio)
	spendSome("a")
	if files() != 1 {
		t.Fatalf("%d files", files())
	}
	disk.create.Store(nil)
	disk.remove.Store(&eio)
	spendSome("b")
	c.Advance(2 * time.Minute)
	spendSome("c")
	before := files()
	if before < 3 {
		t.Fatalf("%d files were kept", before)
	}
	disk.remove.Store(nil)
	c.Advance(2 * time.Minute)
	spendSome("d")
	if files() >= before {
		t.Errorf("%d files, %d before the folder was whole again", files(), before)
	}
}

// BenchmarkMemory shows what a nonce costs while it is held.
func BenchmarkMemory(b *testing.B) {
	const n = 1 << 19
	batch := make([]spend.Nonce, 4096)
	for b.Loop() {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		s, err := spend.Open(b.TempDir(), spend.Config{Clock: clock.NewFake(start)})
		if err != nil {
			b.Fatal(err)
		}
		for i := 0; i < n; i += len(batch) {
			for j := range batch {
				batch[j] = nonce(keyA, strconv.Itoa(i+j), time.Hour)
			}
			for _, err := range s.Commit(b.Context(), batch) {
				if err != nil {
					b.Fatal(err)
				}
			}
		}
		clear(batch)
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/n, "B/nonce")
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkCommit shows what sharing a sync gives: compare one caller with many.
func BenchmarkCommit(b *testing.B) {
	sys := clock.System()
	for _, callers := range []int{1, 64} {
		b.Run(fmt.Sprint(callers), func(b *testing.B) {
			s, err := spend.Open(b.TempDir(), spend.Config{Clock: sys})
			if err != nil {
				b.Fatal(err)
			}
			defer s.Close()
			var n atomic.Int64
			var wg sync.WaitGroup
			for range callers {
				wg.Go(func() {
					for i := n.Add(1); i <= int64(b.N); i = n.Add(1) {
						if err := s.Commit(b.Context(), []spend.Nonce{nonce(keyA, fmt.Sprint(i),
							time.Minute)})[0]; err != nil {
							b.Error(err)
						}
					}
				})
			}
			wg.Wait()
		})
	}
}
