//go:build cgo

package main

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/secret"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/batch"
	"github.com/trustd/trustd/signer/history"
	"github.com/trustd/trustd/signer/pkcs11"
	"github.com/trustd/trustd/signer/tpm"
	softhsmtest "github.com/trustd/trustd/softhsm-test"
	"github.com/trustd/trustd/softhsm-test/lab"
)

// batchKeys are the keys that signing in batches is measured with.
var batchKeys = []struct {
	name, backend string
	alg           ident.Algorithm
	gain          float64 // that is asked for with 1,024 waiting
}{
	{"softhsm-ed25519", "hsm", ident.Ed25519, 40},
	{"softhsm-p256", "hsm", ident.ECDSAP256, 0},
	{"swtpm-p256", "tpm", ident.ECDSAP256, 100},
}

// A queue is a key behind queues in this process, with and without a history.
type queue struct {
	name     string
	device   signer.Key
	recorded *batch.Key // over its history: what the daemon uses
	plain    *batch.Key
}

// newQueue puts a key into queues of its own.
func newQueue(name string, backend any, store *history.Store, key signer.Key) *queue {
	cfg := batch.Config{}
	if p, ok := backend.(signer.Parallel); ok {
		cfg.Parallel = p.Parallel
	}
	return &queue{
		name: name, device: key,
		recorded: batch.NewDevice(cfg).Key(store.Wrap(key)), plain: batch.NewDevice(cfg).Key(batch.Plain(key)),
	}
}

// item is a packet of 1 KiB.
func item(batchable bool) batch.Item {
	agent, err := ident.ParseAgentID("agent")
	if err != nil {
		panic(err) // a constant
	}
	packet := signature.Subject{Kind: signature.KindPacket, Agent: agent, Message: make([]byte, 1024)}
	return batch.Item{Subject: packet, Batchable: batchable}
}

// callers is how many different callers those who wait belong to.
const callers = 64

// waiting returns so many requests that are asked for anew as soon as they are answered.
func waiting(ctx context.Context, name string, key *batch.Key, n int, batchable bool) *entrant {
	e := &entrant{name: name}
	items := []batch.Item{item(batchable)}
	for i := range n {
		who := batch.Caller{PID: int32(1 + i%callers)}
		e.workers = append(e.workers, calls{1, func() error { return key.Sign(ctx, who, items)[0].Err }})
	}
	return e
}

// batching measures batched signing in this process beside unbatched signing through the same queue.
func (b *bench) batching() error {
	l, err := lab.New(b.ctx, lab.Options{Bin: b.bin, NoTPM: true})
	if err != nil {
		return err
	}
	defer l.Close()
	if err := os.Setenv("SOFTHSM2_CONF", filepath.Join(l.Dir, "softhsm2.conf")); err != nil {
		return err
	}
	pin := secret.Source{File: filepath.Join(l.Dir, "pin")}.Read
	hsm := pkcs11.New(pkcs11.Config{Module: l.Module, TokenLabel: "lab", PIN: pin})
	defer hsm.Close()
	state := filepath.Join(l.Dir, "chip")
	if err := os.Mkdir(state, 0o700); err != nil {
		return err
	}
	device, err := softhsmtest.StartTPM(state)
	if err != nil {
		return err
	}
	defer device.Stop()
	chip, err := tpm.Open(tpm.Config{Device: device.Device(), Dir: filepath.Join(l.Dir, "blobs")})
	if err != nil {
		return err
	}
	defer chip.Close()
	store, err := history.Open(filepath.Join(l.Dir, "history"), history.Config{})
	if err != nil {
		return err
	}
	defer store.Close()
	backends := map[string]signer.Backend{"hsm": hsm, "tpm": chip}
	for _, k := range batchKeys {
		key, err := generate(b.ctx, backends[k.backend], k.alg)
		if err != nil {
			return err
		}
		q := newQueue(k.name, backends[k.backend], store, key)
		if b.wants("batch/one-caller/") {
			if err := b.oneCaller(q); err != nil {
				return err
			}
		}
		if b.wants("batch/inprocess/" + k.name) {
			if err := b.inQueue(q, k.gain); err != nil {
				return err
			}
		}
	}
	return nil
}

func generate(ctx context.Context, b signer.Backend, alg ident.Algorithm) (signer.Key, error) {
	raw := make([]byte, 16)
	_, _ = rand.Read(raw) // never fails (crypto/rand)
	id, err := signer.NewID(raw)
	if err != nil {
		return nil, err
	}
	g, ok := b.(interface {
		Generate(context.Context, signer.ID, ident.Algorithm) (signer.Key, error)
	})
	if !ok {
		return nil, fmt.Errorf("the backend makes no keys")
	}
	return g.Generate(ctx, id, alg)
}

// inQueue measures rates with 1, 64 and 1,024 requests waiting. What is asked for is held against the best unbatched
// rate of them all.
func (b *bench) inQueue(q *queue, gain float64) error {
	type pair struct {
		n               int
		single, batched *entrant
	}
	var pairs []pair
	var all []*entrant
	for _, n := range []int{1, 64, 1024} {
		p := pair{n, waiting(b.ctx, "unbatched", q.recorded, n, false), waiting(b.ctx, "batched", q.recorded, n, true)}
		pairs, all = append(pairs, p), append(all, p.single, p.batched)
	}
	bare := waiting(b.ctx, "batched without history", q.plain, 1024, true)
	bareSingle := waiting(b.ctx, "unbatched without history", q.plain, 1024, false)
	list := make([]batch.Item, signature.MaxBatch)
	for i := range list {
		list[i] = item(true)
	}
	whole := &entrant{name: "whole batches", workers: []worker{calls{len(list), func() error {
		for _, r := range q.recorded.Sign(b.ctx, batch.Caller{PID: 1}, list) {
			if r.Err != nil {
				return r.Err
			}
		}
		return nil
	}}}}
	if err := turns(b.ctx, 3, 200*time.Millisecond, 600*time.Millisecond, append(all, bare, bareSingle, whole)...); err != nil {
		return err
	}
	at := "batch/inprocess/" + q.name
	var best float64
	for _, p := range pairs {
		best = max(best, p.single.rate())
	}
	goal := func(rate, base float64) (string, *bool) {
		if gain == 0 {
			return "", nil
		}
		return fmt.Sprintf(">= %.0f x the best unbatched rate", gain), met(rate >= gain*base)
	}
	for _, p := range pairs {
		name := fmt.Sprintf("%s/%d-waiting", at, p.n)
		b.add(name+"/unbatched/rate", p.single.rate(), "1/s", "itself", p.single.rate(), "", nil)
		if p.n != 1024 {
			b.add(name+"/rate", p.batched.rate(), "1/s", "unbatched, as many waiting", p.single.rate(), "", nil)
		} else {
			target, ok := goal(p.batched.rate(), best)
			b.add(name+"/rate", p.batched.rate(), "1/s", "unbatched, at its best", best, target, ok)
		}
		b.add(name+"/p99", p.batched.quantile(0.99), "us", "unbatched, as many waiting", p.single.quantile(0.99), "", nil)
	}
	b.add(at+"/1024-waiting/no-history/rate", bare.rate(), "1/s", "unbatched, no history", bareSingle.rate(), "", nil)
	b.add(at+"/16384-list/rate", whole.rate(), "1/s", "unbatched, at its best", best, "", nil)
	return nil
}

// oneCaller measures what the queue costs a client that nobody competes with.
func (b *bench) oneCaller(q *queue) error {
	ctx, cancel := context.WithCancel(b.ctx) // requests have one that can end
	defer cancel()
	may := item(true)
	items := []batch.Item{may}
	through := func(k *batch.Key) func() error {
		return func() error { return k.Sign(ctx, batch.Caller{PID: 1}, items)[0].Err }
	}
	c := newContest()
	c.enter("direct", func() error { _, err := q.device.Sign(ctx, may.Subject.Message); return err })
	c.enter("queue", through(q.recorded))
	c.enter("plain", through(q.plain))
	if err := c.run(1500, 1); err != nil {
		return err
	}
	base := c.p50("direct")
	b.add("batch/one-caller/"+q.name+"/direct/p50", base, "us", "itself", base, "", nil)
	over := c.p50("queue") - base
	const what = "the same signer directly"
	b.add("batch/one-caller/overhead/"+q.name, over, "us", what, base, "<= 60 us", met(over <= 60))
	b.add("batch/one-caller/overhead/"+q.name+"/no-history", c.p50("plain")-base, "us", what, base, "", nil)
	return nil
}

// A throttled is a signer in software that takes its time over each signature, as a TPM or a card does.
type throttled struct {
	private ed25519.PrivateKey
	public  ident.PublicKey
	each    time.Duration
	one     sync.Mutex
}

func newThrottled(each time.Duration) (*throttled, error) {
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		return nil, err
	}
	pub, err := ident.NewPublicKey(public)
	return &throttled{private: private, public: pub, each: each}, err
}

func (t *throttled) Public() ident.PublicKey { return t.public }

func (t *throttled) Sign(ctx context.Context, msg []byte) ([]byte, error) {
	t.one.Lock()
	defer t.one.Unlock()
	done := time.NewTimer(t.each)
	defer done.Stop()
	sig := ed25519.Sign(t.private, msg)
	select {
	case <-done.C:
		return sig, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// throttled measures batching with signers that sign 5 and 50 times a second, in this process.
func (b *bench) throttled() error {
	dir, err := os.MkdirTemp("", "trustd-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	store, err := history.Open(dir, history.Config{})
	if err != nil {
		return err
	}
	defer store.Close()
	for _, r := range []struct {
		perSecond, waiting int
		warm, window       time.Duration
		enough             float64
	}{
		{5, 10240, 1200 * time.Millisecond, 6 * time.Second, 20000},
		{50, 1024, 300 * time.Millisecond, 3 * time.Second, 0},
	} {
		t, err := newThrottled(time.Second / time.Duration(r.perSecond))
		if err != nil {
			return err
		}
		key := batch.NewDevice(batch.Config{}).Key(store.Wrap(t))
		alone := waiting(b.ctx, "alone", key, 1, false)
		full := waiting(b.ctx, "batched", key, r.waiting, true)
		if err := turns(b.ctx, 2, r.warm, r.window/2, alone, full); err != nil {
			return err
		}
		b.slowRows(fmt.Sprintf("throttled/inprocess/%d-a-second", r.perSecond), t.each, alone, full, r.enough)
		b.note(len(b.rows)-3, fmt.Sprintf("%d requests waiting, of %d callers", r.waiting, callers))
	}
	return nil
}

// slowRows notes what a slow signer gives in batches beside the time of one of its signatures.
func (b *bench) slowRows(at string, each time.Duration, alone, full *entrant, enough float64) {
	one := float64(each.Microseconds())
	rate, p99 := full.rate(), full.quantile(0.99)
	var rateTarget, p99Target string
	var rateMet, p99Met *bool
	if enough > 0 {
		rateTarget, rateMet = fmt.Sprintf(">= %.0f", enough), met(rate >= enough)
		p99Target, p99Met = "<= 2.2 signature times", met(p99 <= 2.2*one)
	}
	b.add(at+"/rate", rate, "1/s", "one direct client", alone.rate(), rateTarget, rateMet)
	b.add(at+"/p50", full.quantile(0.5), "us", "one signature", one, "", nil)
	b.add(at+"/p99", p99, "us", "one signature", one, p99Target, p99Met)
}
