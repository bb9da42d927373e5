//go:build cgo

package main

import (
	"fmt"
	"os"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/client"
	"github.com/trustd/trustd/softhsm-test/lab"
)

// enrol registers an agent that this process, and processes of more users, may sign as, and returns the draft of a packet
// to itself.
func enrol(b *bench, l *lab.Lab, id, backend, alg string, more ...uint32) ([]byte, error) {
	var bind []api.Binding
	for _, uid := range append(more, uint32(os.Getuid())) {
		bind = append(bind, api.Binding{Selector: api.Selector{UID: &uid}})
	}
	r := api.AddAgentRequest{AgentID: id, Backend: backend, Algorithm: alg, Bindings: bind}
	d, err := client.NewAdmin(l.AdminSocket).AddAgent(b.ctx, r)
	if err != nil {
		return nil, fmt.Errorf("registering %s: %w", id, err)
	}
	return task(d.Aliases[0]), nil
}

// How the best client would ask: the daemon works on 256 requests of one stream at once.
const (
	batchConns   = 16
	streamConns  = 8
	streamWindow = 256
)

// The rates of a well-known secrets server's transit engine with ed25519 keys in software memory
// (facts/measured.md section 7b).
const (
	transitOne   = 2308
	transitMany  = 6831
	transitBatch = 36881
)

// batchSocket measures signing through the daemon, in batches and not, one at a time and many at once.
func (b *bench) batchSocket() error {
	l, err := b.boot(lab.Options{})
	if err != nil {
		return err
	}
	defer l.Close()
	many, stop, err := startCrowd(b.ctx, l, 1024/crowdUsers)
	if err != nil {
		return err
	}
	defer stop()
	for _, k := range batchKeys {
		if !b.wants("batch/socket/" + k.name) {
			continue
		}
		draft, err := enrol(b, l, k.name, k.backend, k.alg.String(), crowdUIDs()...)
		if err != nil {
			return err
		}
		t := &traffic{socket: l.AgentSocket}
		err = b.socketRates(t, many, k.name, draft)
		t.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) socketRates(t *traffic, many []*member, name string, draft []byte) error {
	type shape struct {
		path          string
		make          func(body []byte) (*entrant, error)
		direct, batch *entrant
	}
	single := func(n int) func([]byte) (*entrant, error) {
		return func(body []byte) (*entrant, error) { return t.singles(fmt.Sprint(n, " callers"), n, body) }
	}
	shapes := []*shape{
		{path: "1-caller", make: single(1)},
		{path: "32-callers", make: single(32)},
		{path: "1024-callers", make: func(body []byte) (*entrant, error) {
			return &entrant{name: "crowd", crowd: many, body: body}, nil
		}},
		{path: "batch64", make: func(body []byte) (*entrant, error) {
			return t.batches("batches", batchConns, perCall, body)
		}},
		{path: "stream", make: func(body []byte) (*entrant, error) {
			return t.streams("streams", streamConns, streamWindow, body)
		}},
	}
	var all []*entrant
	for _, s := range shapes {
		for _, batchable := range []bool{false, true} {
			body, err := signing(name, draft, batchable)
			if err != nil {
				return err
			}
			e, err := s.make(body)
			if err != nil {
				return err
			}
			if all = append(all, e); batchable {
				s.batch = e
			} else {
				s.direct = e
			}
		}
	}
	if err := turns(b.ctx, 3, 200*time.Millisecond, 800*time.Millisecond, all...); err != nil {
		return err
	}
	// What a batch is asked to reach: on the TPM a number, and everywhere more than keys in memory do elsewhere.
	goals := map[string]float64{"32-callers": transitMany, "batch64": transitBatch}
	if name == "swtpm-p256" {
		goals["batch64"], goals["stream"] = 40000, 25000
	} else {
		goals["1-caller"] = transitOne
	}
	for _, s := range shapes {
		at := fmt.Sprintf("batch/socket/%s/%s", name, s.path)
		since := len(b.rows)
		b.add(at+"/direct/rate", s.direct.rate(), "1/s", "itself", s.direct.rate(), "", nil)
		target, ok := "", (*bool)(nil)
		if goal := goals[s.path]; goal > 0 {
			target, ok = fmt.Sprintf(">= %.0f", goal), met(s.batch.rate() >= goal)
		}
		b.add(at+"/batchable/rate", s.batch.rate(), "1/s", "not batchable", s.direct.rate(), target, ok)
		b.add(at+"/batchable/p50", s.batch.quantile(0.5), "us", "not batchable", s.direct.quantile(0.5), "", nil)
		b.add(at+"/batchable/p99", s.batch.quantile(0.99), "us", "not batchable", s.direct.quantile(0.99), "", nil)
		switch s.path {
		case "1024-callers":
			b.note(since, fmt.Sprintf("%d processes of as many users: the daemon takes 256 connections of one user", crowdUsers))
		case "batch64":
			b.note(since, fmt.Sprintf("%d connections", batchConns))
		case "stream":
			b.note(since, fmt.Sprintf("%d connections with %d requests under way each; latencies are from sending to receiving",
				streamConns, streamWindow))
		}
	}
	return nil
}
