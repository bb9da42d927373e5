package batch_test

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/batch"
)

// A target is a key of a device on which every signature takes its time.
type target struct {
	t    testing.TB
	priv ed25519.PrivateKey
	pub  ident.PublicKey
	took time.Duration
	err  error

	mu     sync.Mutex
	number uint64
	turns  []int    // messages of each turn
	over   []bool   // whether it was a batch
	order  []string // messages signed directly, in order
	active atomic.Int32
	most   atomic.Int32
}

func newTarget(t testing.TB, seed byte, took time.Duration) *target {
	t.Helper()
	priv := ed25519.NewKeyFromSeed(append(make([]byte, 31), seed))
	pub, err := ident.NewPublicKey(priv.Public())
	if err != nil {
		t.Fatal(err)
	}
	return &target{t: t, priv: priv, pub: pub, took: took}
}

func (k *target) Public() ident.PublicKey { return k.pub }

func (k *target) work(ctx context.Context, n int) error {
	now := k.active.Add(1)
	defer k.active.Add(-1)
	for most := k.most.Load(); now > most && !k.most.CompareAndSwap(most, now); most = k.most.Load() {
	}
	if k.took > 0 {
		select {
		case <-time.After(time.Duration(n) * k.took):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return k.err
}

func (k *target) note(n int, over bool, numbers []uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.turns, k.over = append(k.turns, n), append(k.over, over)
	for i := range numbers {
		if numbers[i] == 0 {
			k.number++
			numbers[i] = k.number
		}
	}
}

func (k *target) SignEach(ctx context.Context, msgs [][]byte, numbers []uint64) []signer.Result {
	k.note(len(msgs), false, numbers)
	err := k.work(ctx, len(msgs))
	out := make([]signer.Result, len(msgs))
	for i, m := range msgs {
		k.mu.Lock()
		k.order = append(k.order, string(m))
		k.mu.Unlock()
		if out[i].Err = err; err == nil {
			out[i].Signature = ed25519.Sign(k.priv, m)
		}
	}
	return out
}

func (k *target) SignOver(ctx context.Context, digests [][sha256.Size]byte, numbers []uint64, statement []byte) ([]byte, error) {
	if len(digests) != len(numbers) {
		k.t.Error("digests and numbers do not match")
	}
	k.note(len(digests), true, numbers)
	if err := k.work(ctx, 1); err != nil {
		return nil, err
	}
	return ed25519.Sign(k.priv, statement), nil
}

var agent = func() ident.AgentID {
	id, err := ident.ParseAgentID("planner")
	if err != nil {
		panic(err)
	}
	return id
}()

func item(text string, batchable bool) batch.Item {
	return batch.Item{Subject: signature.Subject{Kind: signature.KindPacket, Agent: agent, Message: []byte(text)}, Batchable: batchable}
}

func (k *target) check(t testing.TB, it batch.Item, r batch.Result) {
	t.Helper()
	if r.Err != nil {
		t.Errorf("%s: %v", it.Subject.Message, r.Err)
		return
	}
	if err := r.Signature.Verify(k.pub, it.Subject, nil); err != nil {
		t.Errorf("%s: %v", it.Subject.Message, err)
	}
	if !it.Batchable && r.Signature.Mode() != signature.Direct {
		t.Errorf("%s was batched without leave", it.Subject.Message)
	}
}

// sign signs one item in the bubble's background.
func (k *target) sign(t testing.TB, wg *sync.WaitGroup, key *batch.Key, who batch.Caller, it batch.Item) {
	wg.Go(func() { k.check(t, it, key.Sign(context.Background(), who, []batch.Item{it})[0]) })
}

// TestQueueBecomesABatch: what comes while the device signs is covered by its next signature.
func TestQueueBecomesABatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newTarget(t, 1, 200*time.Millisecond)
		key := batch.NewDevice(batch.Config{}).Key(k)
		var wg sync.WaitGroup
		start := time.Now()
		k.sign(t, &wg, key, batch.Caller{}, item("first", true))
		synctest.Wait()
		for i := range 1000 {
			k.sign(t, &wg, key, batch.Caller{UID: uint32(i % 7)}, item(fmt.Sprint(i), true))
		}
		synctest.Wait()
		k.sign(t, &wg, key, batch.Caller{}, item("plain", false))
		wg.Wait()
		if took := time.Since(start); took != 600*time.Millisecond {
			t.Errorf("took %v", took)
		}
		if !slices.Equal(k.turns, []int{1, 1000, 1}) && !slices.Equal(k.turns, []int{1, 1, 1000}) {
			t.Errorf("turns of %v messages", k.turns)
		}
		if k.most.Load() != 1 {
			t.Errorf("%d turns at once", k.most.Load())
		}
	})
}

// TestAloneIsDirect: with nobody else waiting, a signature is direct, though a batched one would do.
func TestAloneIsDirect(t *testing.T) {
	k := newTarget(t, 1, 0)
	key := batch.NewDevice(batch.Config{}).Key(k)
	for i := range 3 {
		it := item("alone", true)
		r := key.Sign(t.Context(), batch.Caller{}, []batch.Item{it})[0]
		k.check(t, it, r)
		if r.Signature.Mode() != signature.Direct || r.Number != uint64(i+1) {
			t.Errorf("%s, number %d", r.Signature.Mode(), r.Number)
		}
	}
	if out := key.Sign(t.Context(), batch.Caller{}, nil); len(out) != 0 {
		t.Errorf("results of nothing: %v", out)
	}
}

// TestListIsABatch: a list of one caller is signed at once where it may be, and each by itself where it may not.
func TestListIsABatch(t *testing.T) {
	k := newTarget(t, 1, 0)
	key := batch.NewDevice(batch.Config{}).Key(k)
	var items []batch.Item
	for i := range 100 {
		items = append(items, item(fmt.Sprint(i), i%10 != 0))
	}
	items[5].Number = 77 // stands in the history already
	for i, r := range key.Sign(t.Context(), batch.Caller{}, items) {
		k.check(t, items[i], r)
		if (r.Signature.Mode() == signature.Batched) != (i%10 != 0) {
			t.Errorf("item %d is %s", i, r.Signature.Mode())
		}
		if i == 5 && r.Number != 77 {
			t.Errorf("another number: %d", r.Number)
		}
	}
}

// TestSalts is T-SIG-5: the same message twice in a batch has two leaves, and so two proofs that share nothing but the
// nodes above both.
func TestSalts(t *testing.T) {
	k := newTarget(t, 1, 0)
	key := batch.NewDevice(batch.Config{}).Key(k)
	items := []batch.Item{item("same", true), item("same", true)}
	seen := map[string]bool{}
	for range 20 {
		for i, r := range key.Sign(t.Context(), batch.Caller{}, items) {
			k.check(t, items[i], r)
			salt := r.Signature.Text()[len(signature.BatchPrefix)+6:][:20] // of index, size and salt
			if seen[salt] {
				t.Error("a salt came twice")
			}
			seen[salt] = true
		}
	}
}

// TestCallersTakeTurns is T-DEV-4: a caller with a long list of direct signatures does not keep another waiting for its end.
func TestCallersTakeTurns(t *testing.T) {
	for _, batchable := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			const each = 20 * time.Millisecond // 50 a second
			k := newTarget(t, 1, each)
			key := batch.NewDevice(batch.Config{}).Key(k)
			var wg sync.WaitGroup
			flood := make([]batch.Item, 200)
			for i := range flood {
				flood[i] = item(fmt.Sprint("flood", i), false)
			}
			ctx, stop := context.WithCancel(t.Context())
			wg.Go(func() { key.Sign(ctx, batch.Caller{UID: 1}, flood) })
			for range 20 {
				time.Sleep(3*each + each/2) // virtual
				start := time.Now()
				it := item("victim", batchable)
				k.check(t, it, key.Sign(t.Context(), batch.Caller{UID: 2}, []batch.Item{it})[0])
				if took := time.Since(start); took > 2*each {
					t.Errorf("waited %v for a signature of %v", took, each)
				}
			}
			stop()
			wg.Wait()
		})
	}
}

// TestKeysTakeTurns: a key with many callers does not keep another key waiting.
func TestKeysTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const each = 20 * time.Millisecond
		d := batch.NewDevice(batch.Config{})
		busy, quiet := newTarget(t, 1, each), newTarget(t, 2, each)
		busyKey, quietKey := d.Key(busy), d.Key(quiet)
		ctx, stop := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for i := range 50 {
			wg.Go(func() {
				for ctx.Err() == nil {
					busyKey.Sign(ctx, batch.Caller{UID: uint32(i)}, []batch.Item{item("busy", false)})
				}
			})
		}
		time.Sleep(10*each + each/2) // virtual
		start := time.Now()
		it := item("quiet", false)
		quiet.check(t, it, quietKey.Sign(t.Context(), batch.Caller{UID: 99}, []batch.Item{it})[0])
		if took := time.Since(start); took > 2*each {
			t.Errorf("waited %v", took)
		}
		stop()
		wg.Wait()
	})
}

// TestOverfullBatchIsShared: where more wait than one batch holds, each caller gets its share of it.
func TestOverfullBatchIsShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newTarget(t, 1, time.Second)
		key := batch.NewDevice(batch.Config{MaxBatch: 100}).Key(k)
		var wg sync.WaitGroup
		k.sign(t, &wg, key, batch.Caller{}, item("first", true))
		synctest.Wait()
		many := make([]batch.Item, 1000)
		for i := range many {
			many[i] = item(fmt.Sprint(i), true)
		}
		wg.Go(func() {
			for i, r := range key.Sign(t.Context(), batch.Caller{UID: 1}, many) {
				k.check(t, many[i], r)
			}
		})
		synctest.Wait()
		start := time.Now()
		for i := range 50 {
			wg.Go(func() {
				it := item(fmt.Sprint("late", i), true)
				k.check(t, it, key.Sign(t.Context(), batch.Caller{UID: 2}, []batch.Item{it})[0])
				if took := time.Since(start); took > 2*time.Second {
					t.Errorf("waited %v", took)
				}
			})
		}
		wg.Wait()
		if slices.Max(k.turns) != 100 {
			t.Errorf("turns of %v messages", k.turns)
		}
	})
}

// TestMoreCallersThanABatchHolds: with more callers than places, each has its turn before anyone has a second.
func TestMoreCallersThanABatchHolds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const callers, places = 250, 100
		k := newTarget(t, 1, time.Second)
		key := batch.NewDevice(batch.Config{MaxBatch: places}).Key(k)
		var wg sync.WaitGroup
		k.sign(t, &wg, key, batch.Caller{}, item("first", true))
		synctest.Wait()
		start := time.Now()
		for c := range callers {
			wg.Go(func() {
				pair := []batch.Item{item("a", true), item("b", true), item("c", true)}
				for _, it := range pair {
					k.check(t, it, key.Sign(t.Context(), batch.Caller{UID: uint32(c + 1)}, []batch.Item{it})[0])
					if took := time.Since(start); it.Subject.Message[0] == 'a' && took > 4*time.Second {
						t.Errorf("caller %d waited %v for its first", c, took)
					}
				}
			})
		}
		wg.Wait()
		if took := time.Since(start); took > 10*time.Second { // 7.5 batches, the one under way, and stragglers
			t.Errorf("all took %v", took)
		}
	})
}

// TestContexts: who goes away gets its own error at once, is not signed for later, and costs the others nothing.
func TestContexts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newTarget(t, 1, time.Second)
		d := batch.NewDevice(batch.Config{})
		key := d.Key(k)
		var wg sync.WaitGroup
		k.sign(t, &wg, key, batch.Caller{}, item("first", true))
		synctest.Wait()
		short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		start := time.Now()
		out := key.Sign(short, batch.Caller{UID: 1}, []batch.Item{item("hasty", true), item("hasty too", false)})
		for _, r := range out {
			if !errors.Is(r.Err, fault.DeadlineExceeded) {
				t.Errorf("got %v", r.Err)
			}
		}
		if took := time.Since(start); took != 100*time.Millisecond {
			t.Errorf("came back after %v", took)
		}
		if n := d.Waiting(); n != 0 {
			t.Errorf("%d requests still wait", n)
		}
		patient := item("patient", false)
		k.check(t, patient, key.Sign(t.Context(), batch.Caller{UID: 1}, []batch.Item{patient})[0])
		wg.Wait()
		if slices.Contains(k.order, "hasty too") || len(k.turns) != 2 {
			t.Errorf("signed for nobody: %v in %v", k.order, k.turns)
		}
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		if r := key.Sign(gone, batch.Caller{}, []batch.Item{patient})[0]; !errors.Is(r.Err, fault.Canceled) {
			t.Errorf("got %v", r.Err)
		}
	})
}

// TestLeavingABatchUnderWay: a caller whose batch is being signed goes; the others of the batch get theirs.
func TestLeavingABatchUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newTarget(t, 1, time.Second)
		key := batch.NewDevice(batch.Config{}).Key(k)
		var wg sync.WaitGroup
		k.sign(t, &wg, key, batch.Caller{}, item("first", true))
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
		defer cancel()
		wg.Go(func() {
			if r := key.Sign(ctx, batch.Caller{UID: 1}, []batch.Item{item("leaves", true)})[0]; !errors.Is(r.Err, fault.DeadlineExceeded) {
				t.Errorf("got %v", r.Err)
			}
		})
		synctest.Wait()
		k.sign(t, &wg, key, batch.Caller{UID: 2}, item("stays", true))
		wg.Wait()
		if !slices.Equal(k.turns, []int{1, 2}) {
			t.Errorf("turns of %v messages", k.turns)
		}
	})
}

// TestBackPressure: a full queue refuses with a retryable code, and no caller fills it against the others.
func TestBackPressure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newTarget(t, 1, time.Second)
		d := batch.NewDevice(batch.Config{Queue: 1000})
		key := d.Key(k)
		var wg sync.WaitGroup
		k.sign(t, &wg, key, batch.Caller{}, item("first", true))
		synctest.Wait()
		var refused, greedy atomic.Int32
		for i := range 2000 {
			wg.Go(func() {
				r := key.Sign(t.Context(), batch.Caller{UID: 1, PID: int32(i % 50)}, []batch.Item{item("greedy", true)})[0]
				var e *fault.Error
				switch {
				case r.Err == nil:
					greedy.Add(1)
				case errors.As(r.Err, &e) && e.Code == fault.DeviceBusy && e.Code.Retryable() && e.RetryAfter > 0:
					refused.Add(1)
				default:
					t.Errorf("got %v", r.Err)
				}
			})
		}
		synctest.Wait()
		if n := d.Waiting(); n != 500 {
			t.Errorf("one user holds %d of 1000 places", n)
		}
		for uid := range 40 { // and forty who work together leave some to another
			wg.Go(func() { key.Sign(t.Context(), batch.Caller{UID: uint32(uid + 10)}, make([]batch.Item, 200)) })
		}
		synctest.Wait()
		k.sign(t, &wg, key, batch.Caller{UID: 2}, item("modest", true))
		k.sign(t, &wg, key, batch.Caller{}, item("the daemon's", false))
		wg.Wait()
		if greedy.Load() != 500 || refused.Load() != 1500 {
			t.Errorf("%d signed, %d refused", greedy.Load(), refused.Load())
		}
	})
}

// A flipping context ends when it has been looked at so many times: in the middle of whatever looks.
type flipping struct {
	context.Context
	looks *atomic.Int32
}

func (f flipping) Err() error {
	if f.looks.Add(-1) < 0 {
		return context.DeadlineExceeded
	}
	return nil
}

// TestContextEndsBetweenTwoLooks: wherever a caller's time runs out, the device goes on.
func TestContextEndsBetweenTwoLooks(t *testing.T) {
	for looks := range int32(12) {
		for _, batchable := range []bool{false, true} {
			k := newTarget(t, 1, 0)
			key := batch.NewDevice(batch.Config{}).Key(k)
			ctx := flipping{t.Context(), new(atomic.Int32)}
			ctx.looks.Store(looks)
			for range 2 {
				if r := key.Sign(ctx, batch.Caller{UID: 1}, []batch.Item{item("a", batchable), item("b", batchable)})[0]; r.Err != nil &&
					!errors.Is(r.Err, fault.DeadlineExceeded) {
					t.Errorf("got %v", r.Err)
				}
			}
			it := item("after", batchable)
			k.check(t, it, key.Sign(t.Context(), batch.Caller{UID: 2}, []batch.Item{it})[0])
		}
	}
}

// TestGoneCallersLeaveNothing: behind a turn that lasts, thousands come and go; what they asked for is not kept.
func TestGoneCallersLeaveNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newTarget(t, 1, time.Hour)
		key := batch.NewDevice(batch.Config{}).Key(k)
		var wg sync.WaitGroup
		ctx, stop := context.WithCancel(t.Context())
		for range 2 {
			wg.Go(func() { key.Sign(ctx, batch.Caller{UID: 1}, []batch.Item{item("stays", false)}) })
		}
		synctest.Wait()
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		for range 2000 {
			short, cancel := context.WithTimeout(t.Context(), time.Second)
			it := item("", false)
			it.Subject.Message = make([]byte, 100<<10)
			if r := key.Sign(short, batch.Caller{UID: 1}, []batch.Item{it})[0]; !errors.Is(r.Err, fault.DeadlineExceeded) {
				t.Errorf("got %v", r.Err)
			}
			cancel()
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 8<<20 {
			t.Errorf("%d MiB are kept", grown>>20)
		}
		stop()
		wg.Wait()
	})
}

// TestNewProcessesTakeNoPrecedence: a user who asks from a new process each time gets no more turns than one who does not.
func TestNewProcessesTakeNoPrecedence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const each = 200 * time.Millisecond
		k := newTarget(t, 1, each)
		key := batch.NewDevice(batch.Config{}).Key(k)
		ctx, stop := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			for pid := int32(1); ctx.Err() == nil; pid++ {
				wg.Go(func() { key.Sign(ctx, batch.Caller{UID: 1, PID: pid}, []batch.Item{item("new", false)}) })
				time.Sleep(each / 3) // virtual
			}
		})
		time.Sleep(5 * each)
		for range 10 {
			start := time.Now()
			it := item("victim", false)
			k.check(t, it, key.Sign(t.Context(), batch.Caller{UID: 2, PID: 1}, []batch.Item{it})[0])
			if took := time.Since(start); took > 3*each {
				t.Errorf("waited %v", took)
			}
		}
		stop()
		wg.Wait()
	})
}

// TestPanicCostsItsTurn: a backend that panics fails those whom it signed for, and no one after them.
func TestPanicCostsItsTurn(t *testing.T) {
	k := newTarget(t, 1, 0)
	key := batch.NewDevice(batch.Config{}).Key(panicking{k, new(atomic.Bool)})
	for _, batchable := range []bool{false, true} {
		for _, r := range key.Sign(t.Context(), batch.Caller{}, []batch.Item{item("panic", batchable), item("too", batchable)}) {
			if batchable == (r.Err == nil) && !errors.Is(r.Err, fault.Internal) {
				t.Errorf("got %v", r.Err)
			}
		}
	}
	it := item("after", true)
	k.check(t, it, key.Sign(t.Context(), batch.Caller{}, []batch.Item{it})[0])
}

// A panicking target panics on the first batch.
type panicking struct {
	*target
	done *atomic.Bool
}

func (p panicking) SignOver(ctx context.Context, digests [][sha256.Size]byte, numbers []uint64, statement []byte) ([]byte, error) {
	if !p.done.Swap(true) {
		panic("a module")
	}
	return p.target.SignOver(ctx, digests, numbers, statement)
}

// TestFailureReachesAll: what the device says reaches everyone whom the turn was for, and the next turn is new.
func TestFailureReachesAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newTarget(t, 1, time.Second)
		var seen []batch.Turn
		d := batch.NewDevice(batch.Config{Observe: func(turn batch.Turn) { seen = append(seen, turn) }})
		key := d.Key(k)
		var wg sync.WaitGroup
		k.err = fault.New(fault.DeviceLost, "")
		for i := range 10 {
			wg.Go(func() {
				r := key.Sign(t.Context(), batch.Caller{UID: uint32(i)}, []batch.Item{item("x", true)})[0]
				if !errors.Is(r.Err, fault.DeviceLost) || !r.Signature.IsZero() {
					t.Errorf("got %v", r.Err)
				}
			})
		}
		wg.Wait()
		k.err = nil
		it := item("after", true)
		k.check(t, it, key.Sign(t.Context(), batch.Caller{}, []batch.Item{it})[0])
		if len(seen) != 3 || seen[0].Err == nil || !seen[1].Batched || seen[1].Messages != 9 || seen[2].Err != nil || seen[2].Took != time.Second {
			t.Errorf("observed %+v", seen)
		}
	})
}

// TestClose: what waits is refused with the code stopping, what is under way is finished.
func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newTarget(t, 1, time.Second)
		d := batch.NewDevice(batch.Config{Parallel: func() int { return 2 }})
		key := d.Key(k)
		var wg sync.WaitGroup
		underWay := []batch.Item{item("under way", true), item("too", true)}
		wg.Go(func() {
			for i, r := range key.Sign(t.Context(), batch.Caller{}, underWay) {
				k.check(t, underWay[i], r)
			}
		})
		synctest.Wait()
		for i := range 5 {
			wg.Go(func() {
				if r := key.Sign(t.Context(), batch.Caller{UID: uint32(i)}, []batch.Item{item("waits", true)})[0]; !errors.Is(r.Err, fault.Stopping) {
					t.Errorf("got %v", r.Err)
				}
			})
		}
		synctest.Wait()
		start := time.Now()
		for range 2 {
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		}
		if took := time.Since(start); took != time.Second {
			t.Errorf("closed after %v", took)
		}
		if r := key.Sign(t.Context(), batch.Caller{}, []batch.Item{item("late", true)})[0]; !errors.Is(r.Err, fault.Stopping) {
			t.Errorf("got %v", r.Err)
		}
		wg.Wait()
	})
}

// TestParallel: a device that makes two signatures at once is given two.
func TestParallel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newTarget(t, 1, time.Second)
		key := batch.NewDevice(batch.Config{Parallel: func() int { return 2 }}).Key(k)
		var wg sync.WaitGroup
		start := time.Now()
		for i := range 8 {
			k.sign(t, &wg, key, batch.Caller{UID: uint32(i)}, item(fmt.Sprint(i), false))
		}
		wg.Wait()
		if took := time.Since(start); took != 4*time.Second || k.most.Load() != 2 {
			t.Errorf("8 signatures took %v, %d at once", took, k.most.Load())
		}
	})
}

// TestOneBatchAtATime: while a batch is being signed, the next one gathers, though the device could sign two at once; what
// may not be batched, and other keys, use the other place meanwhile.
func TestOneBatchAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k, other := newTarget(t, 1, time.Second), newTarget(t, 2, time.Second)
		d := batch.NewDevice(batch.Config{Parallel: func() int { return 2 }})
		key, otherKey := d.Key(k), d.Key(other)
		var wg sync.WaitGroup
		wg.Go(func() { key.Sign(t.Context(), batch.Caller{}, []batch.Item{item("a", true), item("b", true)}) })
		synctest.Wait()
		for i := range 10 {
			k.sign(t, &wg, key, batch.Caller{UID: uint32(i)}, item("gathers", true))
		}
		synctest.Wait()
		start := time.Now()
		k.sign(t, &wg, key, batch.Caller{UID: 1}, item("direct", false))
		synctest.Wait()
		other.sign(t, &wg, otherKey, batch.Caller{}, item("other", true))
		wg.Wait()
		if took := time.Since(start); took != 2*time.Second {
			t.Errorf("all took %v", took)
		}
		if !slices.Equal(k.turns, []int{2, 1, 10}) || !slices.Equal(other.turns, []int{1}) {
			t.Errorf("turns of %v and %v messages", k.turns, other.turns)
		}
	})
}

// TestStress: many callers, keys, kinds and impatient ones at once. Everything that comes back with a signature
// verifies, numbers are unique, and nothing is left in the queue.
func TestStress(t *testing.T) {
	d := batch.NewDevice(batch.Config{Parallel: func() int { return 2 }, MaxBatch: 64, Queue: 500})
	keys, targets := []*batch.Key{}, []*target{}
	for i := range 3 {
		k := newTarget(t, byte(i+1), 200*time.Microsecond)
		targets, keys = append(targets, k), append(keys, d.Key(k))
	}
	var mu sync.Mutex
	seen := map[[2]uint64]bool{}
	var wg sync.WaitGroup
	var signed atomic.Int64
	for c := range 24 {
		wg.Go(func() {
			for n := range 60 {
				at := (c + n) % len(keys)
				items := make([]batch.Item, 1+(c*n)%9)
				for i := range items {
					msg := binary.BigEndian.AppendUint32(nil, uint32(c<<16|n<<4|i))
					items[i] = item(string(msg), (c+n+i)%4 != 0)
				}
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				if n%7 == 0 {
					cancel()
					ctx, cancel = context.WithTimeout(t.Context(), time.Duration(n)*50*time.Microsecond)
				}
				for i, r := range keys[at].Sign(ctx, batch.Caller{UID: uint32(c % 5), PID: int32(c)}, items) {
					switch {
					case r.Err == nil:
						targets[at].check(t, items[i], r)
						signed.Add(1)
						mu.Lock()
						id := [2]uint64{uint64(at), r.Number}
						if r.Number == 0 || seen[id] {
							t.Errorf("number %d of key %d twice", r.Number, at)
						}
						seen[id] = true
						mu.Unlock()
					case !errors.Is(r.Err, fault.DeviceBusy) && !errors.Is(r.Err, fault.DeadlineExceeded) && !errors.Is(r.Err, fault.Canceled):
						t.Errorf("got %v", r.Err)
					}
				}
				cancel()
			}
		})
	}
	wg.Wait()
	if d.Waiting() != 0 {
		t.Errorf("%d still wait", d.Waiting())
	}
	if signed.Load() < 1000 {
		t.Errorf("only %d were signed", signed.Load())
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}
