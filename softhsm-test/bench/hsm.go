//go:build cgo

package main

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/client"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/secret"
	"github.com/trustd/trustd/plugins"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/pkcs11"
	"github.com/trustd/trustd/softhsm-test/lab"
)

// perCall is how many requests a batch over the socket holds.
const perCall = 64

// An hsmBench is a token that four parties use at once: raw calls, the Signer in this process, the Signer across a
// plugin, and the daemon.
type hsmBench struct {
	*bench
	lab    *lab.Lab
	inside *pkcs11.Backend
	across *plugins.Host
	agent  *client.Client
	admin  *client.Admin
	first  map[ident.Algorithm]float64 // p50 of a single request at one key
}

// hsm measures signing on SoftHSM at 1, 100 and 1,000 agents, and what the daemon weighs with them.
func (b *bench) hsm() error {
	l, err := b.lab(lab.Options{NoTPM: true})
	if err != nil {
		return err
	}
	defer l.Close()
	conf := filepath.Join(l.Dir, "softhsm2.conf")
	if err := os.Setenv("SOFTHSM2_CONF", conf); err != nil {
		return err
	}
	h := &hsmBench{bench: b, lab: l, agent: client.New(l.AgentSocket), admin: client.NewAdmin(l.AdminSocket), first: map[ident.Algorithm]float64{}}
	pin := secret.Source{File: filepath.Join(l.Dir, "pin")}.Read
	h.inside = pkcs11.New(pkcs11.Config{Module: l.Module, TokenLabel: "lab", PIN: pin})
	defer h.inside.Close()
	ctx, stop := context.WithCancel(b.ctx)
	defer stop()
	h.across = plugins.NewPKCS11(plugins.PKCS11Config{Name: "bench", Binary: filepath.Join(l.Dir, "trustd-pkcs11"), Module: l.Module,
		TokenLabel: "lab", PIN: pin, Env: map[string]string{"SOFTHSM2_CONF": conf}})
	go func() { _ = h.across.Run(ctx) }()
	defer h.across.Close()

	have := 0
	for _, n := range []int{1, 100, 1000} {
		if n > b.agents {
			break
		}
		for ; have < n; have++ {
			if have > 0 && have%200 == 0 {
				fmt.Fprintf(os.Stderr, "  %d agents registered\n", have)
			}
			if err := h.add(have); err != nil {
				return err
			}
		}
		for _, alg := range []ident.Algorithm{ident.Ed25519, ident.ECDSAP256} {
			if err := h.sign(alg, n); err != nil {
				return err
			}
		}
	}
	if err := h.verify(); err != nil {
		return err
	}
	return h.memory()
}

// add registers the nth agent: the first is one of each algorithm, which is signed with.
func (h *hsmBench) add(n int) error {
	uid := uint32(os.Getuid())
	bind := []api.Binding{{Selector: api.Selector{UID: &uid}}}
	reqs := []api.AddAgentRequest{{AgentID: fmt.Sprintf("filler-%d", n), Algorithm: "ecdsa-p256"}}
	if n == 0 {
		reqs = []api.AddAgentRequest{{AgentID: "ed25519", Algorithm: "ed25519", Bindings: bind}, {AgentID: "ecdsa-p256", Algorithm: "ecdsa-p256", Bindings: bind}}
	}
	for _, r := range reqs {
		if _, err := h.admin.AddAgent(h.ctx, r); err != nil {
			return fmt.Errorf("registering %s: %w", r.AgentID, err)
		}
	}
	return nil
}

// A subject is one agent's key as each party sees it.
type subject struct {
	id     string
	alias  string
	inside signer.Key
	across signer.Key
	raws   []*pkcs11.Raw
	msg    []byte // what the device signs: the signing bytes of a packet
	draft  json.RawMessage
}

func (h *hsmBench) subject(alg ident.Algorithm) (*subject, error) {
	d, err := h.admin.ShowAgent(h.ctx, alg.String())
	if err != nil {
		return nil, err
	}
	u, err := signer.ParseURI(d.KeyURI)
	if err != nil {
		return nil, err
	}
	pub, err := ident.ParsePublicKey(d.PublicKey)
	if err != nil {
		return nil, err
	}
	s := &subject{id: d.AgentID, alias: d.Aliases[0], draft: task(d.Aliases[0]), msg: make([]byte, 800)}
	if s.inside, err = h.inside.Open(h.ctx, u.ID, pub); err != nil {
		return nil, err
	}
	if s.across, err = h.across.Open(h.ctx, u.ID, pub); err != nil {
		return nil, err
	}
	for range 2 {
		r, err := h.inside.OpenRaw(h.ctx, u.ID)
		if err != nil {
			return nil, err
		}
		s.raws = append(s.raws, r)
	}
	return s, nil
}

func task(to string) json.RawMessage {
	return fmt.Appendf(nil, `{"task_id":"task-001","to_agent":%q,"intent":"Research company background","context":{"company":"Example Corp"},`+
		`"permissions":{"allowed_actions":["read","search"],"max_tool_calls":5},"risk_level":"read"}`, to)
}

// sign measures one algorithm with n agents on the token.
func (h *hsmBench) sign(alg ident.Algorithm, n int) error {
	s, err := h.subject(alg)
	if err != nil {
		return err
	}
	pub := s.inside.Public()
	sig, err := s.raws[0].Sign(s.msg)
	if err != nil {
		return err
	}
	c := newContest()
	c.enter("raw", func() error { _, err := s.raws[0].Sign(s.msg); return err })
	c.enter("verify", func() error { return signature.Verify(pub, s.msg, sig) })
	c.enter("inside", func() error { _, err := s.inside.Sign(h.ctx, s.msg); return err })
	c.enter("across", func() error { _, err := s.across.Sign(h.ctx, s.msg); return err })
	c.enter("socket", func() error {
		_, err := h.agent.SignPacket(h.ctx, api.SignPacketRequest{Agent: s.id, Packet: s.draft})
		return err
	})
	if err := c.run(600, 1); err != nil {
		return err
	}
	at := func(what string) string { return fmt.Sprintf("%s/%s/%d-keys", what, alg, n) }
	raw, ver, one := c.p50("raw"), c.p50("verify"), c.p50("socket")
	b := h.bench
	b.add(at("hsm/raw-sign")+"/p50", raw, "us", "itself", raw, "", nil)
	b.add(at("hsm/raw-verify")+"/p50", ver, "us", "raw C_Sign", raw, "", nil)
	b.add(at("hsm/signer-in-plugin")+"/p50", c.p50("inside"), "us", "raw C_Sign + verify", raw+ver, "", nil)
	b.add(at("hsm/signer-across-plugin")+"/p50", c.p50("across"), "us", "raw C_Sign + verify", raw+ver, "", nil)
	b.add(at("socket/sign")+"/single/p50", one, "us", "raw C_Sign + verify", raw+ver, "<= raw sign + raw verify + 120 us", met(one <= raw+ver+120))
	if n == 1 {
		h.first[alg] = one
	} else if first := h.first[alg]; first > 0 && n == 1000 {
		b.add(at("socket/sign")+"/single/flat", one, "us", "the same at 1 key", first, "within 20 %", met(one <= 1.2*first))
	}
	return h.throughput(s, alg, at)
}

// throughput measures whole batches in turns: the loop that everything is held against, and the daemon's ways in.
func (h *hsmBench) throughput(s *subject, alg ident.Algorithm, at func(string) string) error {
	pub := s.inside.Public()
	loop := func(r *pkcs11.Raw, n int) error {
		for range n {
			sig, err := r.Sign(s.msg)
			if err == nil {
				err = signature.Verify(pub, s.msg, sig)
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
	reqs := make([]api.SignPacketRequest, perCall)
	for i := range reqs {
		reqs[i] = api.SignPacketRequest{Agent: s.id, Packet: s.draft}
	}
	stream, err := h.agent.SignStream(h.ctx)
	if err != nil {
		return err
	}
	defer stream.Close()
	c := newContest()
	c.enter("loop1", func() error { return loop(s.raws[0], perCall) })
	c.enter("loop2", func() error {
		var wg sync.WaitGroup
		errs := make([]error, 2)
		for i := range errs {
			wg.Go(func() { errs[i] = loop(s.raws[i], perCall/2) })
		}
		wg.Wait()
		if errs[0] != nil {
			return errs[0]
		}
		return errs[1]
	})
	c.enter("batch", func() error {
		for _, r := range h.agent.SignPackets(h.ctx, reqs) {
			if r.Error != nil {
				return r.Error.Err()
			}
		}
		return nil
	})
	c.enter("stream", func() error {
		sent := make(chan error, 1)
		go func() {
			for _, r := range reqs {
				if err := stream.Send(r); err != nil {
					sent <- err
					return
				}
			}
			sent <- nil
		}()
		for range reqs {
			r, err := stream.Recv()
			if err != nil {
				return err
			}
			if r.Error != nil {
				return r.Error.Err()
			}
		}
		return <-sent
	})
	if err := c.run(12, 3); err != nil {
		return err
	}
	best := max(c.rate("loop1", perCall), c.rate("loop2", perCall))
	need := map[ident.Algorithm]float64{ident.Ed25519: 0.80, ident.ECDSAP256: 0.65}[alg]
	got := c.rate("batch", perCall)
	b := h.bench
	b.add(at("hsm/raw-sign-verify-loop")+"/rate", best, "1/s", "itself", best, "", nil)
	b.add(at("socket/sign")+"/batch64/rate", got, "1/s", "loop of C_Sign + verify", best, fmt.Sprintf(">= %.0f %% of the loop", need*100), met(got >= need*best))
	b.add(at("socket/sign")+"/stream/rate", c.rate("stream", perCall), "1/s", "loop of C_Sign + verify", best, "", nil)
	return nil
}

// verify measures verification over the socket, nonces spent durably, beside the public-key operation.
func (h *hsmBench) verify() error {
	s, err := h.subject(ident.Ed25519)
	if err != nil {
		return err
	}
	key, ok := s.inside.Public().Key().(ed25519.PublicKey)
	if !ok {
		return fmt.Errorf("not an Ed25519 key")
	}
	sig, err := s.raws[0].Sign(s.msg)
	if err != nil {
		return err
	}
	// Each packet can be accepted once, so they are made beforehand.
	const rounds, singles, batches = 10, 30, 2
	var packets []json.RawMessage
	reqs := make([]api.SignPacketRequest, perCall)
	for i := range reqs {
		reqs[i] = api.SignPacketRequest{Agent: s.id, Packet: s.draft}
	}
	for len(packets) < (rounds+1)*(singles+batches*perCall) {
		for _, r := range h.agent.SignPackets(h.ctx, reqs) {
			if r.Error != nil {
				return r.Error.Err()
			}
			packets = append(packets, r.Packet)
		}
	}
	next := func() json.RawMessage { p := packets[0]; packets = packets[1:]; return p }
	accepted := func(d *api.Decision, p *api.Problem) error {
		if p != nil {
			return p.Err()
		}
		if d.Decision != api.Accept {
			return fmt.Errorf("refused: %s", d.Reason)
		}
		return nil
	}
	one := newContest()
	one.enter("raw", func() error { ed25519.Verify(key, s.msg, sig); return nil })
	one.enter("socket", func() error {
		d, err := h.agent.VerifyPacket(h.ctx, api.VerifyPacketRequest{Packet: next()})
		if err != nil {
			return err
		}
		return accepted(&d, nil)
	})
	if err := one.run(rounds, singles); err != nil {
		return err
	}
	many := newContest()
	many.enter("raw", func() error {
		for range perCall {
			ed25519.Verify(key, s.msg, sig)
		}
		return nil
	})
	many.enter("socket", func() error {
		rs := make([]api.VerifyPacketRequest, perCall)
		for i := range rs {
			rs[i].Packet = next()
		}
		for _, r := range h.agent.VerifyPackets(h.ctx, rs) {
			if err := accepted(r.Decision, r.Error); err != nil {
				return err
			}
		}
		return nil
	})
	if err := many.run(rounds, batches); err != nil {
		return err
	}
	h.bench.add("socket/verify/ed25519/single/p50", one.p50("socket"), "us", "ed25519.Verify", one.p50("raw"), "", nil)
	h.bench.add("socket/verify/ed25519/batch64/rate", many.rate("socket", perCall), "1/s", "ed25519.Verify", many.rate("raw", perCall), "", nil)
	return nil
}

// memory reports what the daemon occupies with a thousand agents.
func (h *hsmBench) memory() error {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", h.lab.Daemon().Pid()))
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(data)) {
		var kb float64
		if _, err := fmt.Sscanf(line, "VmRSS: %f kB", &kb); err == nil {
			mb := kb * 1024 / 1e6
			h.bench.add(fmt.Sprintf("memory/daemon/%d-agents", min(1000, h.bench.agents)), mb, "MB", "limit", 50, "< 50 MB", met(mb < 50))
			return nil
		}
	}
	return fmt.Errorf("the kernel does not say how much memory the daemon occupies")
}
