package caller_test

import (
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/trustd/trustd/caller"
	"github.com/trustd/trustd/fault"
)

// A fakeClock is a clock that the test turns.
type fakeClock struct {
	mu sync.Mutex
	at time.Time
}

func (c *fakeClock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *fakeClock) turn(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = c.at.Add(d)
}

func user(uid uint32) *caller.Caller { return &caller.Caller{UID: uid} }

func mustAcquire(t *testing.T, l *caller.Limiter, c *caller.Caller, n int) func() {
	t.Helper()
	release, err := l.Acquire(c, n)
	if err != nil {
		t.Fatalf("Acquire(%d, %d): %v", c.UID, n, err)
	}
	return release
}

// wantWait checks that a request is refused, and says when it would not be.
func wantWait(t *testing.T, l *caller.Limiter, c *caller.Caller, n int) time.Duration {
	t.Helper()
	_, err := l.Acquire(c, n)
	var e *fault.Error
	if !errors.As(err, &e) || e.Code != fault.ResourceExhausted || e.RetryAfter <= 0 {
		t.Fatalf("Acquire(%d, %d): %v", c.UID, n, err)
	}
	return e.RetryAfter
}

// TestRate is T-SOCK-6: a caller that floods is told to wait.
func TestRate(t *testing.T) {
	clock := &fakeClock{at: time.Unix(1e9, 0)}
	l := caller.NewLimiter(caller.Config{Rate: 10, Burst: 20, Now: clock.now})
	for range 20 {
		mustAcquire(t, l, user(1), 1)()
	}
	if wait := wantWait(t, l, user(1), 1); wait != 100*time.Millisecond {
		t.Errorf("the wait is %v", wait)
	}
	mustAcquire(t, l, user(2), 20)() // another user has a share of its own
	clock.turn(100 * time.Millisecond)
	mustAcquire(t, l, user(1), 1)()
	wantWait(t, l, user(1), 1)
	// What was refused was not charged.
	clock.turn(time.Hour)
	mustAcquire(t, l, user(1), 20)()
}

func TestLargeRequestsPayLater(t *testing.T) {
	clock := &fakeClock{at: time.Unix(1e9, 0)}
	l := caller.NewLimiter(caller.Config{Rate: 10, Burst: 10, Now: clock.now})
	mustAcquire(t, l, user(1), 50)()
	if wait := wantWait(t, l, user(1), 1); wait.Round(time.Millisecond) != 4100*time.Millisecond {
		t.Errorf("the wait is %v", wait)
	}
	clock.turn(4 * time.Second)
	wantWait(t, l, user(1), 1)
	clock.turn(100 * time.Millisecond)
	mustAcquire(t, l, user(1), 1)()
	wantWait(t, l, user(1), 50) // only with a full bucket
	clock.turn(time.Second)
	mustAcquire(t, l, user(1), 50)()
}

func TestConcurrent(t *testing.T) {
	l := caller.NewLimiter(caller.Config{Concurrent: 2})
	first := mustAcquire(t, l, user(1), 1)
	mustAcquire(t, l, user(1), 1)
	wantWait(t, l, user(1), 1)
	mustAcquire(t, l, user(2), 1)
	first()
	first() // once is enough
	mustAcquire(t, l, user(1), 1)
	wantWait(t, l, user(1), 1)
}

// TestConcurrentIsNotCharged covers a user that is refused for what runs: its bucket stays as it was.
func TestConcurrentIsNotCharged(t *testing.T) {
	clock := &fakeClock{at: time.Unix(1e9, 0)}
	l := caller.NewLimiter(caller.Config{Rate: 1, Burst: 2, Concurrent: 1, Now: clock.now})
	release := mustAcquire(t, l, user(1), 1)
	for range 5 {
		wantWait(t, l, user(1), 1)
	}
	release()
	mustAcquire(t, l, user(1), 1)()
}

func TestManyUsers(t *testing.T) {
	clock := &fakeClock{at: time.Unix(1e9, 0)}
	l := caller.NewLimiter(caller.Config{Rate: 1, Burst: 2, MaxCallers: 3, Now: clock.now})
	running := mustAcquire(t, l, user(1), 1)
	mustAcquire(t, l, user(2), 2)()
	mustAcquire(t, l, user(3), 2)()
	wantWait(t, l, user(4), 1) // nobody can be forgotten yet
	wantWait(t, l, user(2), 1)
	clock.turn(2 * time.Second)
	mustAcquire(t, l, user(4), 2)() // 2 and 3 owe nothing by now
	clock.turn(time.Hour)
	for uid := range uint32(100) {
		mustAcquire(t, l, user(uid+10), 1)()
		clock.turn(time.Hour)
	}
	running()
}

func TestNoLimits(t *testing.T) {
	for _, l := range []*caller.Limiter{nil, caller.NewLimiter(caller.Config{})} {
		for range 1000 {
			mustAcquire(t, l, user(1), 1000)
		}
	}
	if _, err := caller.NewLimiter(caller.Config{}).Acquire(nil, 1); !errors.Is(err, fault.CallerUnknown) {
		t.Errorf("nobody is admitted: %v", err)
	}
}

func TestLimiterUnderLoad(t *testing.T) {
	l := caller.NewLimiter(caller.Config{Concurrent: 3, MaxCallers: 2})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 500 {
				if release, err := l.Acquire(user(uint32(i%4)), 1); err == nil {
					release()
				}
			}
		})
	}
	wg.Wait()
	for range 3 {
		mustAcquire(t, l, user(0), 1)
	}
}

func BenchmarkAcquire(b *testing.B) {
	l := caller.NewLimiter(caller.Config{Rate: 1e9, Burst: 1e9, Concurrent: 10})
	b.ReportAllocs()
	for b.Loop() {
		release, err := l.Acquire(user(1), 1)
		if err != nil {
			b.Fatal(err)
		}
		release()
	}
}
