//go:build cgo

package main

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/client"
	"github.com/trustd/trustd/softhsm-test/lab"
)

// flatAt are the numbers of agents at which signing is measured, as far as -agents goes.
var flatAt = []int{100, 1000, 10000}

const (
	// inTurn is how many of SoftHSM's keys take turns: it looks at each of its objects to find one, so that the first use
	// of all keys would take longer than anybody waits for a benchmark. That price has rows of its own.
	inTurn = 100
	// tpmPlaces is more keys than a chip has places for: in turn, each is loaded for its signature, as with any larger
	// number.
	tpmPlaces = 8
)

// A household is a daemon with agents on one backend.
type household struct {
	lab     *lab.Lab
	traffic *traffic
	backend string
	batched []byte   // the request of the first agent
	direct  [][]byte // the requests of all
	used    map[int]bool
}

func (b *bench) household(backend string, agents int) (*household, error) {
	l, err := b.boot(lab.Options{NoTPM: backend != "tpm"})
	if err != nil {
		return nil, err
	}
	h := &household{lab: l, traffic: &traffic{socket: l.AgentSocket}, backend: backend, used: map[int]bool{}}
	if err := h.grow(b, agents); err != nil {
		h.Close()
		return nil, err
	}
	return h, nil
}

func (h *household) Close() error {
	h.traffic.Close()
	return h.lab.Close()
}

// grow registers agents until there are n.
func (h *household) grow(b *bench, n int) error {
	admin, uid := client.NewAdmin(h.lab.AdminSocket), uint32(os.Getuid())
	defer admin.Close()
	for len(h.direct) < n {
		d, err := admin.AddAgent(b.ctx, api.AddAgentRequest{AgentID: fmt.Sprintf("agent-%d", len(h.direct)), Backend: h.backend,
			Algorithm: "ecdsa-p256", Bindings: []api.Binding{{Selector: api.Selector{UID: &uid}}}})
		if err != nil {
			return fmt.Errorf("registering agent %d: %w", len(h.direct), err)
		}
		draft := task(d.Aliases[0])
		batched, err1 := signing(d.AgentID, draft, true)
		direct, err2 := signing(d.AgentID, draft, false)
		if err := errors.Join(err1, err2); err != nil {
			return err
		}
		if h.batched == nil {
			h.batched = batched
		}
		h.direct = append(h.direct, direct)
	}
	return nil
}

// open signs once with each key that takes turns. It returns their requests and what the first use of one costs.
func (h *household) open() (requests [][]byte, first *entrant, err error) {
	step := 1
	if h.backend == "hsm" {
		step = max(len(h.direct)/inTurn, 1)
	}
	w, err := h.traffic.wire(0)
	if err != nil {
		return nil, nil, err
	}
	first = &entrant{}
	for i := 0; i < len(h.direct); i += step {
		requests = append(requests, h.direct[i])
		if h.used[i] {
			continue
		}
		h.used[i] = true
		start := time.Now()
		if err := w.call(prepare("/v1/packets/sign", h.direct[i]), 1); err != nil {
			return nil, nil, fmt.Errorf("agent %d: %w", i, err)
		}
		first.took = append(first.took, time.Since(start))
	}
	return requests, first, nil
}

// loads returns what is compared: one key in batches, and keys in turn.
// The connections are new: the daemon closes those that were idle for long.
func (h *household) loads() (one, turn, first *entrant, err error) {
	h.traffic.Close()
	h.traffic = &traffic{socket: h.lab.AgentSocket}
	requests, first, err := h.open()
	if err != nil {
		return nil, nil, nil, err
	}
	if one, err = h.traffic.streams("one key in batches", 4, streamWindow, h.batched); err != nil {
		return nil, nil, nil, err
	}
	turn, err = h.traffic.singles("keys in turn", 4, requests...)
	return one, turn, first, err
}

// flatness compares signing with few and many agents registered, side by side. The keys of a TPM lie outside it as
// wrapped blobs.
func (b *bench) flatness(backend string) error {
	single, err := b.household(backend, 1)
	if err != nil {
		return err
	}
	defer single.Close()
	few, small := single, 1
	if backend == "tpm" {
		small = tpmPlaces
		if few, err = b.household(backend, small); err != nil {
			return err
		}
		defer few.Close()
	}
	many, err := b.household(backend, 1)
	if err != nil {
		return err
	}
	defer many.Close()
	_, alone, err := single.open()
	if err != nil {
		return err
	}
	start := time.Now()
	for _, n := range flatAt {
		if n > b.agents || backend == "hsm" && n > b.hsmAgents {
			break
		}
		since, before := time.Now(), len(many.direct)
		if err := many.grow(b, n); err != nil {
			return err
		}
		fmt.Fprintf(os.Stderr, "  %d agents registered in %v, %.0f a second at last\n", n, time.Since(start).Round(time.Second),
			float64(n-before)/time.Since(since).Seconds())
		if err := b.flatAt(n, small, single, few, many, alone); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) flatAt(n, small int, single, few, many *household, alone *entrant) error {
	oneBase, turnBase, _, err := single.loads()
	if err == nil && few != single {
		_, turnBase, _, err = few.loads()
	}
	if err != nil {
		return err
	}
	one, turn, first, err := many.loads()
	if err != nil {
		return err
	}
	if err := turns(b.ctx, 4, 200*time.Millisecond, 800*time.Millisecond, oneBase, one, turnBase, turn); err != nil {
		return err
	}
	at := func(path, what string) string {
		return fmt.Sprintf("flat/%s/%s/%d-keys/%s", many.backend, path, n, what)
	}
	pair := func(path string, now, base *entrant, what string) {
		rate, before := now.rate(), base.rate()
		b.add(at(path, "rate"), rate, "1/s", what, before, ">= 80 % of that", met(rate >= 0.8*before))
		p99, was := now.quantile(0.99), base.quantile(0.99)
		b.add(at(path, "p99"), p99, "us", what, was, "<= 2 x that", met(p99 <= 2*was))
	}
	pair("one-key-batched", one, oneBase, "1 key registered")
	since := len(b.rows)
	pair("in-turn", turn, turnBase, fmt.Sprintf("%d registered", small))
	switch {
	case many.backend == "tpm":
		b.note(since, fmt.Sprintf(
			"a chip has places for 3 keys, so that in turn each is loaded for its signature, %d as well as more", small))
	case n > inTurn:
		b.note(since, fmt.Sprintf("%d of the keys, evenly spread, each used once before", inTurn))
	}
	b.add(at("first-use", "p50"), first.quantile(0.5), "us", "1 key registered", alone.quantile(0.5), "", nil)
	return nil
}
