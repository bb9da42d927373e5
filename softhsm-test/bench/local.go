//go:build cgo

package main

import (
	"crypto/ed25519"
	"debug/elf"
	"fmt"
	"time"

	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/packet"
	"github.com/trustd/trustd/registry"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/verify"
	"github.com/trustd/trustd/view"
)

// isStatic reports whether a binary asks for no interpreter and no library.
func isStatic(path string) (bool, error) {
	f, err := elf.Open(path)
	if err != nil {
		return false, fmt.Errorf("reading the binary: %w", err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return false, nil
		}
	}
	libs, err := f.ImportedLibraries()
	return err == nil && len(libs) == 0, nil
}

// inProcess measures parsing and all checks of one packet beside the public-key operation inside it.
func (b *bench) inProcess() error {
	pub, priv, err := ed25519.GenerateKey(nil)
	if err != nil {
		return err
	}
	key, err := ident.NewPublicKey(pub)
	if err != nil {
		return err
	}
	st, to, err := smallRegistry(key)
	if err != nil {
		return err
	}
	now := time.Now().UTC().Truncate(time.Microsecond)
	self := ident.DerivedAlias(key).String()
	d, err := packet.ParseDraft(fmt.Appendf(nil, `{"task_id":"task-001","to_agent":%q,"intent":"Research company background",
"context":{"company":"Example Corp"},"permissions":{"allowed_actions":["read","search"],"max_tool_calls":5},"risk_level":"read"}`, to))
	if err != nil {
		return err
	}
	u, err := d.Complete(packet.Fill{FromAgent: self, AllowedFrom: func(a string) bool { return a == self }, PublicKey: key,
		Nonce: "nonce-001", PacketID: "pk-001", Now: now, TTL: packet.DefaultTTL()})
	if err != nil {
		return err
	}
	sig := ed25519.Sign(priv, u.SigningBytes())
	wire, msg := u.Seal(signature.NewDirect(sig)), u.SigningBytes()
	v := &view.View{Registry: st}
	c := newContest()
	c.enter("raw", func() error {
		if !ed25519.Verify(pub, msg, sig) {
			return fmt.Errorf("the raw signature does not verify")
		}
		return nil
	})
	c.enter("packet", func() error {
		t, err := packet.Parse(wire)
		if err != nil {
			return err
		}
		if _, refusal := verify.Check(verify.Input{Packet: t, MayReceive: func(ident.AgentID) bool { return true }, View: v,
			Policy: verify.DefaultPolicy(), Now: now}); refusal != nil {
			return refusal
		}
		return nil
	})
	if err := c.run(60, 200); err != nil {
		return err
	}
	raw, ours := c.p50("raw"), c.p50("packet")
	b.add("inprocess/verify/ed25519/p50", ours, "us", "ed25519.Verify", raw, "<= 1.35 x ed25519.Verify", met(ours <= 1.35*raw))
	return nil
}

// smallRegistry returns a registry that knows the key as an agent's, and a name to address packets to.
func smallRegistry(key ident.PublicKey) (*registry.State, string, error) {
	type founder struct {
		pub  ident.PublicKey
		priv ed25519.PrivateKey
	}
	var f [2]founder
	for i := range f {
		pub, priv, err := ed25519.GenerateKey(nil)
		if err != nil {
			return nil, "", err
		}
		p, err := ident.NewPublicKey(pub)
		if err != nil {
			return nil, "", err
		}
		f[i] = founder{p, priv}
	}
	ids := make([]ident.AgentID, 3)
	for i, s := range []string{"operator", "node", "agent"} {
		id, err := ident.ParseAgentID(s)
		if err != nil {
			return nil, "", err
		}
		ids[i] = id
	}
	now := time.Now()
	g, err := registry.NewGenesis(registry.Genesis{
		Origin: "bench.test", Threshold: 1, CreatedAt: now, Salt: make([]byte, 32),
		Operators: []registry.Founder{{AgentID: ids[0], PublicKey: f[0].pub, Grade: "software", Origin: "unknown"}},
		Node:      registry.Founder{AgentID: ids[1], PublicKey: f[1].pub, Grade: "software", Origin: "unknown"},
	})
	if err != nil {
		return nil, "", err
	}
	for _, who := range f {
		g.AddSignature(who.pub.ID(), ed25519.Sign(who.priv, g.SigningBytes(registry.ClusterID{})))
	}
	st, out := registry.New().Apply(g)
	if !out.Accepted {
		return nil, "", out.Err
	}
	r, err := registry.NewImport(registry.Import{AgentID: ids[2], PublicKey: key, Level: registry.LevelLow, CreatedAt: now})
	if err != nil {
		return nil, "", err
	}
	r.AddSignature(f[0].pub.ID(), ed25519.Sign(f[0].priv, r.SigningBytes(st.ClusterID())))
	st, out = st.Apply(r)
	if !out.Accepted {
		return nil, "", out.Err
	}
	return st, ident.DerivedAlias(key).String(), nil
}
