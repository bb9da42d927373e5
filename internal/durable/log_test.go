package durable_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/durable"
	"github.com/trustd/trustd/internal/durable/durabletest"
)

const name = "/d/test.log"

func config(m durable.FS) durable.LogConfig { return durable.LogConfig{Path: name, FS: m} }

// open opens a log and returns it with the records in it.
func open(c durable.LogConfig) (*durable.Log, []string, error) {
	var recs []string
	l, err := c.Open(func(rec []byte) error {
		recs = append(recs, string(rec))
		return nil
	})
	return l, recs, err
}

func mustOpen(t testing.TB, c durable.LogConfig) (*durable.Log, []string) {
	t.Helper()
	l, recs, err := open(c)
	if err != nil {
		t.Fatal(fault.From(err).Verbose())
	}
	return l, recs
}

func appendAll(t testing.TB, l *durable.Log, recs ...string) {
	t.Helper()
	for _, r := range recs {
		if err := l.Append(context.Background(), []byte(r)); err != nil {
			t.Fatal(err)
		}
	}
}

func wantCode(t testing.TB, err error, code fault.Code) {
	t.Helper()
	if fault.CodeOf(err) != code {
		t.Errorf("error %v, want %s", err, code)
	}
}

func TestLogOnDisk(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.log")
	l, recs := mustOpen(t, durable.LogConfig{Path: path})
	if len(recs) != 0 {
		t.Fatalf("a new log holds %q", recs)
	}
	appendAll(t, l, "one", "two")
	if err := l.Append(context.Background(), []byte("three"), bytes.Repeat([]byte("x"), 200_000)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := open(durable.LogConfig{Path: path}); !errors.Is(err, fault.Unavailable) {
		t.Errorf("a second opener got %v", err)
	}
	if err := l.AppendAsync([]byte("four")); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	wantCode(t, l.Append(context.Background(), []byte("five")), fault.Stopping)
	if err := l.Close(); err != nil {
		t.Errorf("closing twice: %v", err)
	}
	want := []string{"one", "two", "three", strings.Repeat("x", 200_000), "four"}
	l, recs = mustOpen(t, durable.LogConfig{Path: path})
	if !slices.Equal(recs, want) {
		t.Errorf("%d records, want %d", len(recs), len(want))
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	_, _, err := open(durable.LogConfig{Path: path, Purpose: "another"})
	wantCode(t, err, fault.Corrupt)
	if info, _ := os.Stat(path); info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
}

func TestLogRefuses(t *testing.T) {
	l, _ := mustOpen(t, config(durabletest.New()))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	wantCode(t, l.Append(ctx, []byte("x")), fault.Canceled)
	wantCode(t, l.Append(context.Background()), fault.TooLarge)
	wantCode(t, l.Append(context.Background(), make([]byte, durable.MaxRecord)), fault.TooLarge)
	if err := l.Append(context.Background(), []byte{}); err == nil {
		t.Error("an empty record was taken")
	}
	appendAll(t, l, "y")
	if _, recs := mustOpen(t, config(kill(l))); !slices.Equal(recs, []string{"y"}) {
		t.Errorf("the log holds %q", recs)
	}
}

// kill closes a log that lives on a durabletest.FS and returns what the next process finds.
func kill(l *durable.Log) durable.FS {
	m := fsOf(l)
	next := m.Kill()
	_ = l.Close()
	return next
}

func fsOf(l *durable.Log) *durabletest.FS { return durable.TestingFS(l).(*durabletest.FS) }

// TestReplayError: what the reader of the records says stops the opening.
func TestReplayError(t *testing.T) {
	l, _ := mustOpen(t, config(durabletest.New()))
	appendAll(t, l, "x")
	boom := errors.New("boom")
	if _, err := config(kill(l)).Open(func([]byte) error { return boom }); !errors.Is(err, boom) {
		t.Errorf("got %v", err)
	}
}

// TestTornTail: bytes behind what was synced are what a crash left of a write, and are cut off.
func TestTornTail(t *testing.T) {
	l, _ := mustOpen(t, config(durabletest.New()))
	appendAll(t, l, "one", "two")
	m := kill(l).(*durabletest.FS)
	whole := m.Content(name)
	l2, _ := mustOpen(t, config(m))
	appendAll(t, l2, "three")
	frame := m.Content(name)[len(whole):]
	_ = l2.Close()
	tails := map[string][]byte{"zeros": make([]byte, 5000), "garbage": bytes.Repeat([]byte{0xa5}, 100)}
	for n := 1; n < len(frame); n++ {
		tails[fmt.Sprintf("%d bytes of a frame", n)] = frame[:n]
	}
	damaged := slices.Clone(frame)
	damaged[len(damaged)-1]++
	tails["a frame with a wrong checksum"] = damaged
	tails["a frame of another place"] = append(slices.Clone(frame), frame...)
	for what, tail := range tails {
		m.SetContent(name, append(slices.Clone(whole), tail...))
		l, recs := mustOpen(t, config(m))
		want := []string{"one", "two"}
		if what == "a frame of another place" {
			want = append(want, "three")
		}
		if !slices.Equal(recs, want) {
			t.Errorf("%s: the log holds %q", what, recs)
		}
		appendAll(t, l, "next")
		if _, recs := mustOpen(t, config(kill(l))); !slices.Equal(recs, append(want, "next")) {
			t.Errorf("%s: then the log holds %q", what, recs)
		}
	}
}

// TestDamageIsNeverSilent flips each byte of a log and cuts it at each place: it opens with all records, or says
// that it is corrupt and stays as it is.
func TestDamageIsNeverSilent(t *testing.T) {
	l, _ := mustOpen(t, config(durabletest.New()))
	want := []string{"one", "two", "three"}
	appendAll(t, l, want...)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	whole := fsOf(l).Content(name)
	try := func(what string, data []byte) {
		t.Helper()
		m := durabletest.New()
		m.SetContent(name, data)
		l, recs, err := open(config(m))
		switch {
		case err == nil:
			if !slices.Equal(recs, want) {
				t.Fatalf("%s: the log holds %q", what, recs)
			}
			_ = l.Close()
		case fault.CodeOf(err) != fault.Corrupt && fault.CodeOf(err) != fault.Unsupported:
			t.Fatalf("%s: %v", what, err)
		case !strings.Contains(err.Error(), "test.log"):
			t.Fatalf("%s: the file is not named: %v", what, err)
		case !bytes.Equal(m.Content(name), data):
			t.Fatalf("%s: the file was changed", what)
		}
	}
	corrupt := 0
	for i := range whole {
		data := slices.Clone(whole)
		data[i] ^= 0x10
		try(fmt.Sprintf("byte %d of %d flipped", i, len(whole)), data)
		if i >= 4096 {
			corrupt++
		}
	}
	if corrupt == 0 {
		t.Fatal("no record was damaged")
	}
	for n := range whole {
		m := durabletest.New()
		m.SetContent(name, whole[:n])
		if _, _, err := open(config(m)); fault.CodeOf(err) != fault.Corrupt {
			t.Fatalf("cut at %d of %d: %v", n, len(whole), err)
		}
	}
}

func TestNewerFormatIsRefused(t *testing.T) {
	m := durabletest.New()
	m.SetContent(name, durable.TestingHeader("test.log", 2))
	_, _, err := open(config(m))
	wantCode(t, err, fault.Unsupported)
}

// gate is a file system whose syncs wait.
type gate struct {
	*durabletest.FS
	enter, leave chan struct{}
	on           bool
}

type gatedFile struct {
	durable.File
	g *gate
}

func (g *gate) OpenFile(name string, flag int, perm os.FileMode) (durable.File, error) {
	f, err := g.FS.OpenFile(name, flag, perm)
	if err != nil {
		return nil, err
	}
	return gatedFile{f, g}, nil
}

func (f gatedFile) Sync() error {
	if f.g.on {
		f.g.enter <- struct{}{}
		<-f.g.leave
	}
	return f.File.Sync()
}

// TestAppendersShareSyncs: all who come while one sync runs are served by the next.
func TestAppendersShareSyncs(t *testing.T) {
	g := &gate{FS: durabletest.New(), enter: make(chan struct{}), leave: make(chan struct{})}
	l, _ := mustOpen(t, config(g))
	g.on = true
	const n = 50
	var wg sync.WaitGroup
	empty := l.Size()
	add := func(i int) {
		wg.Go(func() {
			if err := l.Append(context.Background(), fmt.Appendf(nil, "%02d", i)); err != nil { // all of one size
				t.Error(err)
			}
		})
	}
	add(0)
	<-g.enter // the first sync is under way
	before, frame := g.Count(durabletest.Sync), l.Size()-empty
	for i := 1; i < n; i++ {
		add(i)
	}
	for l.Size() < empty+n*frame { // until all have written
		runtime.Gosched()
	}
	g.leave <- struct{}{}
	<-g.enter
	g.leave <- struct{}{}
	wg.Wait()
	if got := g.Count(durabletest.Sync) - before; got != 2 {
		t.Errorf("%d syncs for %d appenders", got, n)
	}
	g.on = false
	if _, recs := mustOpen(t, config(g.Kill())); len(recs) != n {
		t.Errorf("%d records, want %d", len(recs), n)
	}
}

// TestAppendHonoursContext: a caller with a deadline does not wait for a disk that hangs.
func TestAppendHonoursContext(t *testing.T) {
	g := &gate{FS: durabletest.New(), enter: make(chan struct{}), leave: make(chan struct{})}
	l, _ := mustOpen(t, config(g))
	g.on = true
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- l.Append(ctx, []byte("x")) }()
	<-g.enter
	cancel()
	wantCode(t, <-done, fault.Canceled)
	g.leave <- struct{}{}
	g.on = false
	appendAll(t, l, "y")
}

func TestAsyncIsSyncedWithinInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := durabletest.New()
		c := config(m)
		c.SyncInterval = time.Second
		l, _ := mustOpen(t, c)
		r := rand.New(rand.NewPCG(1, 2))
		if err := l.AppendAsync([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, recs := mustOpen(t, config(m.Kill())); !slices.Equal(recs, []string{"x"}) {
			t.Errorf("after a kill the log holds %q", recs)
		}
		lost := false
		for range 20 {
			_, recs := mustOpen(t, config(m.PowerLoss(r, false)))
			lost = lost || len(recs) == 0
		}
		if !lost {
			t.Error("power was lost 20 times, and no unsynced record")
		}
		time.Sleep(time.Second)
		synctest.Wait()
		for range 20 {
			if _, recs := mustOpen(t, config(m.PowerLoss(r, false))); !slices.Equal(recs, []string{"x"}) {
				t.Fatalf("after the interval the log holds %q", recs)
			}
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
}

func TestFailedSyncIsFinal(t *testing.T) {
	for _, persist := range []bool{false, true} {
		m := durabletest.New()
		l, _ := mustOpen(t, config(m))
		appendAll(t, l, "one")
		m.Inject(durabletest.Fault{Op: durabletest.Sync, Persist: persist})
		err := l.Append(context.Background(), []byte("two"))
		wantCode(t, err, fault.Unavailable)
		if !errors.Is(err, syscall.EIO) {
			t.Errorf("the cause is lost: %v", err)
		}
		for range 3 { // the disk is fine again, and still nothing is taken
			wantCode(t, l.Append(context.Background(), []byte("three")), fault.Unavailable)
			wantCode(t, l.AppendAsync([]byte("four")), fault.Unavailable)
			wantCode(t, l.Sync(context.Background()), fault.Unavailable)
			wantCode(t, l.Rewrite(func(func([]byte) bool) {}), fault.Unavailable)
		}
		if l.Err() == nil {
			t.Error("Err says that all is well")
		}
		_ = l.Close()
		want := []string{"one"}
		if persist {
			want = append(want, "two")
		}
		r := rand.New(rand.NewPCG(1, 2))
		if _, recs := mustOpen(t, config(m.PowerLoss(r, false))); !slices.Equal(recs, want) {
			t.Errorf("persist %v: the log holds %q, want %q", persist, recs, want)
		}
	}
}

func TestFailedBackgroundSyncShows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := durabletest.New()
		l, _ := mustOpen(t, config(m))
		m.Inject(durabletest.Fault{Op: durabletest.Sync})
		if err := l.AppendAsync([]byte("x")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(durable.DefaultSyncInterval)
		synctest.Wait()
		wantCode(t, l.AppendAsync([]byte("y")), fault.Unavailable)
		_ = l.Close()
	})
}

func TestFailedWriteIsTakenBack(t *testing.T) {
	for _, short := range []int{0, 1, 9, 14} {
		m := durabletest.New()
		l, _ := mustOpen(t, config(m))
		appendAll(t, l, "one")
		m.Inject(durabletest.Fault{Op: durabletest.Write, Err: syscall.ENOSPC, Short: short})
		err := l.Append(context.Background(), []byte("two"))
		wantCode(t, err, fault.Unavailable)
		if !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("the cause is lost: %v", err)
		}
		appendAll(t, l, "three") // there is room again
		if _, recs := mustOpen(t, config(kill(l))); !slices.Equal(recs, []string{"one", "three"}) {
			t.Errorf("short by %d: the log holds %q", short, recs)
		}
	}
}

func TestFailedWriteThatStaysIsFinal(t *testing.T) {
	m := durabletest.New()
	l, _ := mustOpen(t, config(m))
	appendAll(t, l, "one")
	m.Inject(durabletest.Fault{Op: durabletest.Write, Short: 3})
	m.Inject(durabletest.Fault{Op: durabletest.Truncate})
	wantCode(t, l.Append(context.Background(), []byte("two")), fault.Unavailable)
	wantCode(t, l.Append(context.Background(), []byte("three")), fault.Unavailable)
	if _, recs := mustOpen(t, config(kill(l))); !slices.Equal(recs, []string{"one"}) {
		t.Errorf("the log holds %q", recs)
	}
}

func TestOpenFaults(t *testing.T) {
	for _, f := range []durabletest.Fault{
		{Op: durabletest.Open, Always: true},
		{Op: durabletest.Write, Err: syscall.ENOSPC, Always: true},
		{Op: durabletest.Link},
		{Op: durabletest.Sync},
		{Op: durabletest.SyncDir},
		{Op: durabletest.Read},
	} {
		m := durabletest.New()
		m.Inject(f)
		if _, _, err := open(config(m)); fault.CodeOf(err) != fault.Unavailable {
			t.Errorf("%s: %v", f.Op, err)
		}
		m.Heal()
		if _, recs := mustOpen(t, config(m)); len(recs) != 0 {
			t.Errorf("%s: then the log holds %q", f.Op, recs)
		}
	}
}

func TestInitialRecords(t *testing.T) {
	m := durabletest.New()
	c := config(m)
	c.Initial = [][]byte{[]byte("first"), []byte("second")}
	l, recs := mustOpen(t, c)
	if want := []string{"first", "second"}; !slices.Equal(recs, want) {
		t.Errorf("a new log holds %q", recs)
	}
	appendAll(t, l, "third")
	if _, recs := mustOpen(t, durable.LogConfig{Path: name, FS: kill(l), Initial: [][]byte{{1}}}); len(recs) != 3 {
		t.Errorf("then the log holds %q", recs)
	}
}

func yieldAll(recs ...string) func(func([]byte) bool) {
	return func(yield func([]byte) bool) {
		for _, r := range recs {
			if !yield([]byte(r)) {
				return
			}
		}
	}
}

func TestRewrite(t *testing.T) {
	m := durabletest.New()
	l, _ := mustOpen(t, config(m))
	appendAll(t, l, "one", "two", "three")
	if err := l.Rewrite(yieldAll("two", strings.Repeat("x", 100_000))); err != nil {
		t.Fatal(err)
	}
	if _, _, err := open(config(m)); fault.CodeOf(err) != fault.Unavailable {
		t.Errorf("a second opener got %v", err)
	}
	appendAll(t, l, "four")
	want := []string{"two", strings.Repeat("x", 100_000), "four"}
	for range 10 {
		_, recs := mustOpen(t, config(m.PowerLoss(rand.New(rand.NewPCG(1, 2)), true)))
		if !slices.Equal(recs, want) {
			t.Errorf("%d records", len(recs))
		}
	}
	wantCode(t, l.Rewrite(yieldAll("")), fault.Unavailable)
	if err := l.Rewrite(yieldAll()); err != nil {
		t.Fatal(err)
	}
	if _, recs := mustOpen(t, config(kill(l))); len(recs) != 0 {
		t.Errorf("after rewriting to nothing the log holds %q", recs)
	}
}

// TestAsyncAfterRewrite: a log that has become shorter is still synced.
func TestAsyncAfterRewrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := durabletest.New()
		l, _ := mustOpen(t, config(m))
		appendAll(t, l, "one", "two", "three")
		if err := l.Rewrite(yieldAll("new")); err != nil {
			t.Fatal(err)
		}
		if err := l.AppendAsync([]byte("x")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(durable.DefaultSyncInterval)
		synctest.Wait()
		r := rand.New(rand.NewPCG(1, 2))
		for range 20 {
			if _, recs := mustOpen(t, config(m.PowerLoss(r, false))); !slices.Equal(recs, []string{"new", "x"}) {
				t.Fatalf("the log holds %q", recs)
			}
		}
		_ = l.Close()
	})
}

// TestRewriteFaults: whichever step fails, the log holds the old records or the new ones, and goes on or says that
// it does not.
func TestRewriteFaults(t *testing.T) {
	for _, op := range []durabletest.Op{
		durabletest.Open, durabletest.Write, durabletest.Sync, durabletest.Rename, durabletest.SyncDir,
	} {
		m := durabletest.New()
		l, _ := mustOpen(t, config(m))
		appendAll(t, l, "one", "two")
		m.Inject(durabletest.Fault{Op: op})
		wantCode(t, l.Rewrite(yieldAll("new")), fault.Unavailable)
		want := []string{"one", "two"}
		if op == durabletest.SyncDir {
			wantCode(t, l.Append(context.Background(), []byte("x")), fault.Unavailable)
			want = []string{"new"}
		} else {
			appendAll(t, l, "three")
			want = append(want, "three")
		}
		if len(m.Names()) != 1 {
			t.Errorf("%s: files left behind: %q", op, m.Names())
		}
		if _, recs := mustOpen(t, config(kill(l))); !slices.Equal(recs, want) {
			t.Errorf("%s: the log holds %q, want %q", op, recs, want)
		}
	}
}

// TestLogModel drives a log through appends, faults, kills and losses of power. Whatever Append acknowledged is
// there, in order and once; behind it at most what was written without being acknowledged.
func TestLogModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		m := durabletest.New()
		l, _, err := open(config(m))
		if err != nil {
			t.Fatal(err)
		}
		var sure, maybe []string // maybe may follow sure, up to some point
		next := 0
		reopen := func(fsys *durabletest.FS) {
			_ = l.Close()
			var recs []string
			m = fsys
			if l, recs, err = open(config(m)); err != nil {
				t.Fatalf("opening: %s", fault.From(err).Verbose())
			}
			all := append(slices.Clone(sure), maybe...)
			if len(recs) < len(sure) || len(recs) > len(all) || !slices.Equal(recs, all[:len(recs)]) {
				t.Fatalf("the log holds %q; want %q and perhaps %q", recs, sure, maybe)
			}
			sure, maybe = recs, nil
		}
		t.Repeat(map[string]func(*rapid.T){
			"append": func(t *rapid.T) {
				next++
				rec := strings.Repeat(strconv.Itoa(next)+" ", rapid.IntRange(1, 30).Draw(t, "size"))
				broken := l.Err() != nil
				switch err := l.Append(context.Background(), []byte(rec)); {
				case err == nil && broken:
					t.Fatal("a failed log took a record")
				case err == nil:
					sure, maybe = append(append(sure, maybe...), rec), nil
				case !broken && l.Err() != nil:
					maybe = append(maybe, rec)
				}
			},
			"async": func(t *rapid.T) {
				next++
				rec, broken := "async "+strconv.Itoa(next), l.Err() != nil
				switch err := l.AppendAsync([]byte(rec)); {
				case err == nil && broken:
					t.Fatal("a failed log took a record")
				case err == nil || !broken && l.Err() != nil:
					maybe = append(maybe, rec)
				}
			},
			"sync": func(*rapid.T) {
				if l.Sync(context.Background()) == nil {
					sure, maybe = append(sure, maybe...), nil
				}
			},
			"fault": func(t *rapid.T) {
				m.Inject(durabletest.Fault{
					Op:      rapid.SampledFrom([]durabletest.Op{durabletest.Write, durabletest.Sync, durabletest.Truncate}).Draw(t, "op"),
					Persist: rapid.Bool().Draw(t, "persist"), Short: rapid.IntRange(0, 10).Draw(t, "short"),
				})
			},
			"kill":  func(*rapid.T) { reopen(m.Kill()) },
			"power": func(t *rapid.T) { reopen(m.PowerLoss(r, rapid.Bool().Draw(t, "holes"))) },
		})
		_ = l.Close()
	})
}

// TestKill kills a process that appends to a log on the disk: whatever it said is durable is there.
func TestKill(t *testing.T) {
	if path := os.Getenv("TRUSTD_TEST_LOG"); path != "" {
		appendForever(path)
		return
	}
	path := filepath.Join(t.TempDir(), "x.log")
	for round := range 3 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKill$")
		cmd.Env = append(os.Environ(), "TRUSTD_TEST_LOG="+path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		said := map[string]bool{}
		for lines.Scan() {
			said[lines.Text()] = true
			if len(said) == 40*(round+1) {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		_ = cmd.Wait()
		l, recs := mustOpen(t, durable.LogConfig{Path: path})
		have := map[string]bool{}
		for _, r := range recs {
			have[r] = true
		}
		for s := range said {
			if !have[s] {
				t.Errorf("round %d: %q was acknowledged and is gone", round, s)
			}
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func appendForever(path string) {
	l, recs, err := open(durable.LogConfig{Path: path})
	if err != nil {
		os.Exit(1)
	}
	var mu sync.Mutex
	n := len(recs)
	for range 4 {
		go func() {
			for {
				mu.Lock()
				n++
				rec := "rec " + strconv.Itoa(n)
				mu.Unlock()
				if n%2 == 0 {
					err = l.Append(context.Background(), []byte(rec))
				} else {
					err = l.AppendAsync([]byte(rec))
				}
				if err == nil {
					fmt.Println(rec) // one write(2)
				}
			}
		}()
	}
	select {}
}

// FuzzOpenLog: no content of a file makes the reader panic, and what it takes it can extend.
func FuzzOpenLog(f *testing.F) {
	l, _ := mustOpen(f, config(durabletest.New()))
	appendAll(f, l, "one", "two")
	_ = l.Close()
	whole := fsOf(l).Content(name)
	f.Add(whole[4096:])
	f.Add(whole[4096 : len(whole)-3])
	f.Add([]byte{})
	f.Add(binary.BigEndian.AppendUint32(nil, 1<<31))
	f.Fuzz(func(t *testing.T, frames []byte) {
		m := durabletest.New()
		m.SetContent(name, append(durable.TestingHeader("test.log", 1), frames...))
		l, recs, err := open(config(m))
		if err != nil {
			if fault.CodeOf(err) != fault.Corrupt {
				t.Fatal(err)
			}
			return
		}
		appendAll(t, l, "more")
		if _, again := mustOpen(t, config(kill(l))); !slices.Equal(again, append(recs, "more")) {
			t.Fatalf("%q became %q", recs, again)
		}
	})
}

func BenchmarkAppend(b *testing.B) {
	for _, mode := range []string{"sync", "sync-8", "async"} {
		b.Run(mode, func(b *testing.B) {
			l, _ := mustOpen(b, durable.LogConfig{Path: filepath.Join(b.TempDir(), "x.log")})
			defer func() { _ = l.Close() }()
			rec := make([]byte, 45)
			b.ResetTimer()
			switch mode {
			case "sync":
				for b.Loop() {
					_ = l.Append(context.Background(), rec)
				}
			case "sync-8":
				b.SetParallelism(4)
				b.RunParallel(func(pb *testing.PB) {
					for pb.Next() {
						_ = l.Append(context.Background(), rec)
					}
				})
			default:
				for b.Loop() {
					_ = l.AppendAsync(rec)
				}
			}
		})
	}
}
