//go:build cgo

package main

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	softhsmtest "github.com/trustd/trustd/softhsm-test"
	"github.com/trustd/trustd/softhsm-test/lab"
	"github.com/trustd/trustd/softhsm-test/tpmproxy"
)

// isolation measures signing on SoftHSM while the TPM beside it hangs, hangs up, dies and comes back again and again.
// The TPM has the same callers in both cases, and the two take turns.
func (b *bench) isolation() error {
	c, err := startChip()
	if err != nil {
		return err
	}
	defer c.stop()
	l, err := b.lab(lab.Options{NoTPM: true, Extra: c.backend("tpm")})
	if err != nil {
		return err
	}
	defer l.Close()
	t := &traffic{socket: l.AgentSocket}
	defer t.Close()
	draft, err := enrol(b, l, "steady", "hsm", "ed25519")
	if err != nil {
		return err
	}
	body, err := signing("steady", draft, false)
	if err != nil {
		return err
	}
	if draft, err = enrol(b, l, "troubled", "tpm", "ecdsa-p256"); err != nil {
		return err
	}
	troubled, err := signing("troubled", draft, true)
	if err != nil {
		return err
	}
	one, err := t.singles("one caller", 1, body)
	if err != nil {
		return err
	}
	some, err := t.singles("callers", 8, body)
	if err != nil {
		return err
	}
	calm := []*entrant{one, some}
	stormy := make([]*entrant, len(calm))
	for i, e := range calm {
		stormy[i] = &entrant{name: e.name + " in trouble", workers: e.workers}
	}
	ctx, stop := context.WithCancel(b.ctx)
	var asking sync.WaitGroup
	defer asking.Wait()
	defer stop()
	var signed, refused atomic.Int64
	for range 4 {
		asking.Go(func() { pester(ctx, l.AgentSocket, prepare("/v1/packets/sign", troubled), &signed, &refused) })
	}
	var faults atomic.Int64
	for range 8 {
		if err := turns(b.ctx, 1, 100*time.Millisecond, 500*time.Millisecond, calm...); err != nil {
			return err
		}
		trouble, end := context.WithCancel(ctx)
		var making sync.WaitGroup
		var failed error
		making.Go(func() { failed = c.trouble(trouble, &faults) })
		err := turns(b.ctx, 1, 100*time.Millisecond, 500*time.Millisecond, stormy...)
		end()
		making.Wait()
		if err == nil {
			err = failed
		}
		if err != nil {
			return err
		}
		if err := recovered(ctx, &signed); err != nil {
			return err
		}
	}
	since := len(b.rows)
	for i, at := range []string{"isolation/softhsm-ed25519/1-caller", "isolation/softhsm-ed25519/8-callers"} {
		for _, q := range []struct {
			name, target string
			q, most      float64
		}{{"p50", "within 20 % of quiet", 0.5, 1.2}, {"p99", "within 2 x quiet", 0.99, 2}} {
			got, base := stormy[i].quantile(q.q), calm[i].quantile(q.q)
			b.add(at+"/"+q.name, got, "us", "the TPM well", base, q.target, met(got <= q.most*base))
		}
	}
	b.note(since, "the TPM has 4 callers, each at most 50 times a second, well or not; in trouble it hangs, hangs up, dies "+
		"and restarts in turn")
	b.add("isolation/faults", float64(faults.Load()), "faults", "failed requests to it", float64(refused.Load()), "", nil)
	return nil
}

// pester asks for signatures 50 times a second until ctx ends, whatever the answers.
func pester(ctx context.Context, socket string, request []byte, signed, refused *atomic.Int64) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	var w *wired
	for {
		select {
		case <-ctx.Done():
			if w != nil {
				w.Close()
			}
			return
		case <-tick.C:
		}
		var err error
		if w == nil {
			if w, err = dial(socket); err != nil {
				continue
			}
		}
		release := context.AfterFunc(ctx, func() { w.Close() })
		err = w.call(request, 1)
		release()
		if err != nil {
			refused.Add(1)
			w.Close()
			w = nil
			continue
		}
		signed.Add(1)
	}
}

// trouble makes the TPM fail in one way after the other until ctx ends, and leaves it well.
func (c *chip) trouble(ctx context.Context, faults *atomic.Int64) (err error) {
	defer func() {
		c.proxy.Script()
		if c.tpm == nil && err == nil {
			c.tpm, err = softhsmtest.StartTPM(c.dir)
		}
	}()
	pause := func(d time.Duration) { _ = wait(ctx, d, nil) }
	for ctx.Err() == nil {
		faults.Add(1)
		c.proxy.Script(tpmproxy.Rule{Do: tpmproxy.Hang()})
		pause(150 * time.Millisecond)
		c.proxy.Script(tpmproxy.Rule{Do: tpmproxy.Drop()})
		pause(50 * time.Millisecond)
		c.proxy.Script()
		c.tpm.Kill()
		c.tpm = nil
		pause(100 * time.Millisecond)
		if c.tpm, err = softhsmtest.StartTPM(c.dir); err != nil {
			return err
		}
		pause(100 * time.Millisecond)
	}
	return nil
}

// recovered waits until the TPM has signed again.
func recovered(ctx context.Context, signed *atomic.Int64) error {
	before := signed.Load()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for signed.Load() < before+8 {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
	return nil
}
