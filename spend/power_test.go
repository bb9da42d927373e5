package spend_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/clock"
	"github.com/trustd/trustd/internal/durable/durabletest"
	"github.com/trustd/trustd/spend"
)

// TestPowerLoss (T-PKT-3, T-DISK-1) cuts the power of a disk in memory at random moments while several callers
// spend. Whatever the disk had made of what was not synced, nothing acknowledged may be spent again.
func TestPowerLoss(t *testing.T) {
	for seed := range uint64(24) {
		r := rand.New(rand.NewPCG(seed, 1))
		dir, c := t.TempDir(), clock.NewFake(start)
		mem := durabletest.New()
		s := open(t, dir, spend.Config{Clock: c, FS: mem, SegmentSize: 6 << 10})
		acknowledged, after := spendUntilCut(t, s, mem, r, seed%2 == 1)
		next := t.TempDir()
		for _, name := range after.Names() {
			if err := os.WriteFile(filepath.Join(next, filepath.Base(name)), after.Content(name), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		c.Reboot("after the cut", start.Add(time.Duration(r.IntN(3000))*time.Second))
		again := open(t, next, spend.Config{Clock: c})
		for _, n := range acknowledged {
			commit(t, again, nonce(keyA, n, time.Hour), fault.ReplayDetected)
		}
		shut(t, s)
		shut(t, again)
	}
}

// spendUntilCut returns what was acknowledged before the cut, and the disk as the cut left it.
func spendUntilCut(t *testing.T, s *spend.Store, mem *durabletest.FS, r *rand.Rand, holes bool) ([]string,
	*durabletest.FS) {
	t.Helper()
	var mu sync.Mutex
	var acknowledged, atCut []string
	var after *durabletest.FS
	target := 1 + r.IntN(400)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				text := fmt.Sprint(w, "-", i)
				if s.Commit(context.Background(), []spend.Nonce{nonce(keyA, text, time.Hour)})[0] != nil {
					continue
				}
				mu.Lock()
				if acknowledged = append(acknowledged, text); len(acknowledged) == target {
					// What others are told from here on may be on the disk too; what they were told before must be.
					atCut = append(atCut, acknowledged...)
					after = mem.PowerLoss(r, holes)
					cancel()
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if after == nil || len(atCut) != target || !strings.Contains(strings.Join(after.Names(), " "), "spent-") {
		t.Fatalf("no cut after %d nonces: %v", len(acknowledged), after.Names())
	}
	return atCut, after
}
