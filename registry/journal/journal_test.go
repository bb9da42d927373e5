package journal_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/durable"
	"github.com/trustd/trustd/internal/durable/durabletest"
	"github.com/trustd/trustd/registry"
	"github.com/trustd/trustd/registry/journal"
	"github.com/trustd/trustd/registry/registrytest"
)

const path = "/d/registry.log"

var ctx = context.Background()

func open(t testing.TB, m *durabletest.FS) *journal.Journal {
	t.Helper()
	j, err := journal.Config{Path: path, FS: m}.Open()
	if err != nil {
		t.Fatal(fault.From(err).Verbose())
	}
	return j
}

func submit(t testing.TB, j *journal.Journal, rec registry.Record) registry.Outcome {
	t.Helper()
	out, err := j.Submit(ctx, rec)
	if err != nil {
		t.Fatal(fault.From(err).Verbose())
	}
	return out
}

func agent(t testing.TB, j *journal.Journal, name string) registry.Record {
	t.Helper()
	return registrytest.Register(t, j.State().ClusterID(), name, nil)
}

func TestSubmit(t *testing.T) {
	m := durabletest.New()
	j := open(t, m)
	var seen []uint64
	j.OnChange(func(s *registry.State) {
		n, _ := s.Head()
		seen = append(seen, n)
	})
	if out := submit(t, j, registrytest.Genesis(t, "op-a")); !out.Accepted || out.Index != 0 {
		t.Errorf("outcome %+v", out)
	}
	x := agent(t, j, "x")
	if out := submit(t, j, x); out.Index != 1 {
		t.Errorf("outcome %+v", out)
	}
	size := len(m.Content(path))
	out, err := j.Submit(ctx, x)
	if !errors.Is(err, fault.AlreadyExists) || out.Accepted || out.Err == nil {
		t.Errorf("a second time: %+v, %v", out, err)
	}
	if len(m.Content(path)) != size {
		t.Error("a refused record was written")
	}
	if !slices.Equal(seen, []uint64{1, 2}) {
		t.Errorf("watchers saw the sizes %v", seen)
	}
	hash := j.State().StateHash()
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	if j.State().StateHash() != hash {
		t.Error("Close changed the state")
	}
	if _, err := j.Submit(ctx, agent(t, j, "y")); !errors.Is(err, fault.Stopping) {
		t.Errorf("after Close: %v", err)
	}
	if again := open(t, m); again.State().StateHash() != hash {
		t.Error("the state after opening again is another")
	}
}

func TestSecondProcess(t *testing.T) {
	m := durabletest.New()
	j := open(t, m)
	if _, err := (journal.Config{Path: path, FS: m}).Open(); !errors.Is(err, fault.Unavailable) {
		t.Errorf("a second opener got %v", err)
	}
	_ = j.Close()
}

// TestUndecodable: a journal whose records are whole and make no sense does not open.
func TestUndecodable(t *testing.T) {
	full := durabletest.New()
	j := open(t, full)
	submit(t, j, registrytest.Genesis(t, "op-a"))
	one := len(full.Content(path))
	submit(t, j, agent(t, j, "x"))
	_ = j.Close()
	whole := full.Content(path)
	for name, data := range map[string][]byte{
		"a byte is flipped":      flip(whole, one+40),
		"a record is cut out":    append(slices.Clone(whole[:4096]), whole[one:]...),
		"an end is cut off":      whole[:len(whole)-1],
		"all records are gone":   whole[:4096],
		"the file of another":    []byte("something else entirely"),
		"the file is empty":      {},
		"the last record is cut": whole[:one],
	} {
		m := durabletest.New()
		m.SetContent(path, data)
		_, err := journal.Config{Path: path, FS: m}.Open()
		if !errors.Is(err, fault.Corrupt) || !strings.Contains(err.Error(), "registry.log") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestForged is T-DISK-2: checksums can be made by anybody, so that every record is judged again by its signatures.
func TestForged(t *testing.T) {
	genesis := registrytest.Genesis(t, "op-a")
	honest := registrytest.Apply(t, registry.New(), genesis)
	good := registrytest.Register(t, honest.ClusterID(), "x", nil)
	swapped := good
	swapped.Body = []byte(strings.Replace(string(good.Body), `"trust_level":"LOW"`, `"trust_level":"NONE"`, 1))
	unsigned := good
	unsigned.Signatures = nil
	for name, rec := range map[string]registry.Record{"another body": swapped, "no signatures": unsigned} {
		m := durabletest.New()
		log, err := durable.LogConfig{Path: path, Purpose: "trustd registry", FS: m}.Open(func([]byte) error { return nil })
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range []registry.Record{genesis, rec} {
			b, err := r.Marshal()
			if err != nil {
				t.Fatal(err)
			}
			if err := log.Append(ctx, b); err != nil {
				t.Fatal(err)
			}
		}
		if err := log.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := (journal.Config{Path: path, FS: m}).Open(); !errors.Is(err, fault.Corrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func flip(b []byte, at int) []byte {
	b = slices.Clone(b)
	b[at] ^= 1
	return b
}

func TestDiskFaults(t *testing.T) {
	t.Run("full disk", func(t *testing.T) {
		m := durabletest.New()
		j := open(t, m)
		submit(t, j, registrytest.Genesis(t, "op-a"))
		m.Inject(durabletest.Fault{Op: durabletest.Write, Short: 7})
		rec := agent(t, j, "x")
		if _, err := j.Submit(ctx, rec); !errors.Is(err, fault.Unavailable) {
			t.Errorf("got %v", err)
		}
		if j.State().Len() != 2 || j.Err() != nil {
			t.Errorf("%d agents, %v", j.State().Len(), j.Err())
		}
		submit(t, j, rec) // there is room again
		if again := open(t, m.Kill()); again.State().Len() != 3 {
			t.Errorf("%d agents", again.State().Len())
		}
	})
	for _, persist := range []bool{false, true} {
		t.Run(fmt.Sprintf("failed sync, on the disk %v", persist), func(t *testing.T) {
			m := durabletest.New()
			j := open(t, m)
			submit(t, j, registrytest.Genesis(t, "op-a"))
			m.Inject(durabletest.Fault{Op: durabletest.Sync, Persist: persist})
			for range 2 { // the second time the disk is well, and the journal still closed
				if _, err := j.Submit(ctx, agent(t, j, "x")); !errors.Is(err, fault.Unavailable) {
					t.Errorf("got %v", err)
				}
			}
			if j.State().Len() != 2 || j.Err() == nil {
				t.Errorf("%d agents, %v", j.State().Len(), j.Err())
			}
			want := 2
			if persist {
				want = 3
			}
			if again := open(t, m.PowerLoss(rand.New(rand.NewPCG(1, 2)), false)); again.State().Len() != want {
				t.Errorf("%d agents, want %d", again.State().Len(), want)
			}
		})
	}
}

// TestPowerLoss: what Submit acknowledged is there, whenever the power goes.
func TestPowerLoss(t *testing.T) {
	genesis := registrytest.Genesis(t, "op-a")
	cluster := registrytest.Apply(t, registry.New(), genesis).ClusterID()
	var agents []registry.Record
	for i := range 4 {
		agents = append(agents, registrytest.Register(t, cluster, fmt.Sprintf("x%d", i), nil))
	}
	rapid.Check(t, func(rt *rapid.T) {
		r := rand.New(rand.NewPCG(rapid.Uint64().Draw(rt, "seed"), 0))
		m := durabletest.New()
		j := open(t, m)
		submit(t, j, genesis)
		for i := range rapid.IntRange(1, len(agents)).Draw(rt, "records") {
			before := j.State().StateHash()
			if rapid.IntRange(0, 3).Draw(rt, "fault") == 0 {
				m.Inject(durabletest.Fault{
					Op:      rapid.SampledFrom([]durabletest.Op{durabletest.Write, durabletest.Sync}).Draw(rt, "op"),
					Persist: rapid.Bool().Draw(rt, "persist"),
				})
			}
			rec := agents[i]
			next, _ := j.State().Apply(rec)
			_, err := j.Submit(ctx, rec)
			m.Heal()
			if !rapid.Bool().Draw(rt, "power") && j.Err() == nil {
				continue
			}
			m = m.PowerLoss(r, rapid.Bool().Draw(rt, "holes"))
			_ = j.Close()
			j = open(t, m)
			got := j.State().StateHash()
			if err == nil && got != next.StateHash() || got != before && got != next.StateHash() {
				rt.Fatalf("after %v the state is another", err)
			}
		}
	})
}

func TestConcurrentSubmit(t *testing.T) {
	m := durabletest.New()
	j := open(t, m)
	submit(t, j, registrytest.Genesis(t, "op-a"))
	const n = 16
	cluster := j.State().ClusterID()
	var recs []registry.Record
	for i := range n {
		recs = append(recs, registrytest.Register(t, cluster, fmt.Sprintf("x%d", i), nil))
	}
	accepted := make([]int, n)
	var mu sync.Mutex
	var wg sync.WaitGroup
	for k := range 2 * n { // each record twice
		wg.Go(func() {
			if _, err := j.Submit(ctx, recs[k%n]); err == nil {
				mu.Lock()
				accepted[k%n]++
				mu.Unlock()
			} else if !errors.Is(err, fault.AlreadyExists) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for i, times := range accepted {
		if times != 1 {
			t.Errorf("record %d was accepted %d times", i, times)
		}
	}
	if again := open(t, m.Kill()); again.State().StateHash() != j.State().StateHash() {
		t.Error("the file holds another state")
	}
}

func TestSubmitHonoursContext(t *testing.T) {
	j := open(t, durabletest.New())
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if out, err := j.Submit(ended, registrytest.Genesis(t, "op-a")); err != nil && (!errors.Is(err, fault.Canceled) || out.Accepted) {
		t.Errorf("outcome %+v, %v", out, err)
	}
	synctest.Test(t, func(t *testing.T) {
		j := open(t, durabletest.New())
		submit(t, j, registrytest.Genesis(t, "op-a"))
		x, y := agent(t, j, "x"), agent(t, j, "y")
		hold := make(chan struct{})
		j.OnChange(func(*registry.State) { <-hold })
		go func() { _, _ = j.Submit(ctx, x) }()
		synctest.Wait()
		short, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		if _, err := j.Submit(short, y); !errors.Is(err, fault.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		close(hold)
		synctest.Wait()
		if j.State().Len() != 3 {
			t.Errorf("%d agents", j.State().Len())
		}
	})
}

// TestSubmitIsSeenThrough: once a record is being written, its author learns what became of it.
func TestSubmitIsSeenThrough(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := durabletest.New()
		j := open(t, m)
		submit(t, j, registrytest.Genesis(t, "op-a"))
		short, cancel := context.WithCancel(ctx)
		m.OnSync = func() {
			cancel()
			time.Sleep(time.Second)
		}
		if out, err := j.Submit(short, agent(t, j, "x")); err != nil || !out.Accepted || j.State().Len() != 3 {
			t.Errorf("outcome %+v, %v", out, err)
		}
	})
}

// TestClock: a record's time must be near the host's, both ways.
func TestClock(t *testing.T) {
	now := registrytest.Start
	j, err := journal.Config{Path: path, FS: durabletest.New(), Now: func() time.Time { return now }}.Open()
	if err != nil {
		t.Fatal(err)
	}
	submit(t, j, registrytest.Genesis(t, "op-a"))
	rec := agent(t, j, "x") // of a minute later
	for _, tc := range []struct {
		offset time.Duration
		ok     bool
	}{{-6 * time.Minute, false}, {26 * time.Hour, false}, {-4 * time.Minute, true}} {
		now = registrytest.Start.Add(time.Minute + tc.offset)
		_, err := j.Submit(ctx, rec)
		if tc.ok != (err == nil) || err != nil && !errors.Is(err, fault.Malformed) {
			t.Errorf("%v later: %v", tc.offset, err)
		}
	}
	if _, err := j.Submit(ctx, registry.Record{Type: "x", Body: []byte("{}")}); !errors.Is(err, fault.Malformed) {
		t.Errorf("a record without a time: %v", err)
	}
}

// TestKill kills a process that registers agents in a journal on the disk: whatever it said is registered is.
func TestKill(t *testing.T) {
	if file := os.Getenv("TRUSTD_TEST_JOURNAL"); file != "" {
		registerForever(t, file)
		return
	}
	file := filepath.Join(t.TempDir(), "registry.log")
	said := map[string]bool{}
	for round := range 3 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKill$")
		cmd.Env = append(os.Environ(), "TRUSTD_TEST_JOURNAL="+file)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			name, ok := strings.CutPrefix(lines.Text(), "registered ")
			if !ok {
				t.Fatalf("the child says %q", lines.Text())
			}
			said[name] = true
			if len(said) == 10*(round+1) {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		_ = cmd.Wait()
		j, err := journal.Open(file, nil)
		if err != nil {
			t.Fatal(err)
		}
		for name := range said {
			if _, ok := j.State().Agent(registrytest.ID(t, name)); !ok {
				t.Errorf("round %d: %s was acknowledged and is gone", round, name)
			}
		}
		if err := j.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func registerForever(t *testing.T, file string) {
	j, err := journal.Open(file, nil)
	if err != nil {
		t.Fatal(err)
	}
	if !j.State().Initialised() {
		submit(t, j, registrytest.Genesis(t, "op-a"))
	}
	for i := j.State().Len(); ; i++ {
		name := fmt.Sprintf("x%d", i)
		submit(t, j, agent(t, j, name))
		fmt.Println("registered " + name)
	}
}
