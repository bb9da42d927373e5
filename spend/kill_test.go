package spend_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/clock"
	"github.com/trustd/trustd/spend"
)

// childDir makes this test binary the victim of TestKill.
const childDir = "TRUSTD_TEST_SPEND_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childDir); dir != "" {
		if err := spendForever(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// spendForever spends nonces from several goroutines and prints each once it is acknowledged.
func spendForever(dir string) error {
	c := clock.System()
	s, err := spend.Open(dir, spend.Config{Clock: c, SegmentSize: 32 << 10})
	if err != nil {
		return err
	}
	var out sync.Mutex
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := 0; ; i++ {
				text := fmt.Sprintf("%d-%d-%d", os.Getpid(), w, i)
				if err := s.Commit(context.Background(), []spend.Nonce{nonce(keyA, text, time.Hour)})[0]; err != nil {
					continue
				}
				out.Lock()
				_, err := fmt.Println(text) // unbuffered: what the parent reads was acknowledged
				out.Unlock()
				if err != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	return nil
}

// TestKill (T-PKT-3, T-DISK-1) kills a process that spends under load, again and again, with kill -9. Nothing that
// it acknowledged may be spent a second time.
func TestKill(t *testing.T) {
	dir := t.TempDir()
	c := clock.System()
	var acknowledged []string
	for round := range 5 {
		acknowledged = append(acknowledged, killOne(t, dir, 100+50*round)...)
		s := open(t, dir, spend.Config{Clock: c, SegmentSize: 32 << 10})
		if s.Len() < len(acknowledged) {
			t.Fatalf("round %d: %d nonces of %d acknowledged", round, s.Len(), len(acknowledged))
		}
		for _, n := range acknowledged {
			commit(t, s, nonce(keyA, n, time.Hour), fault.ReplayDetected)
		}
		shut(t, s)
	}
}

// killOne starts a child, kills it once it has acknowledged at least n nonces, and returns all it acknowledged.
func killOne(t *testing.T, dir string, n int) []string {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childDir+"="+dir)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var got []string
	lines := bufio.NewScanner(stdout)
	for killed := false; lines.Scan(); {
		got = append(got, lines.Text())
		if len(got) >= n && !killed {
			killed = true
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	_ = cmd.Wait() // killed
	if len(got) < n {
		t.Fatalf("the child ended after %d nonces: %s", len(got), &stderr)
	}
	// The last line may have been cut by the kill: then it is not a nonce of the child's.
	if last := got[len(got)-1]; strings.Count(last, "-") != 2 || strings.HasSuffix(last, "-") {
		got = got[:len(got)-1]
	}
	return got
}
