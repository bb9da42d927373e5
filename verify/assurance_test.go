package verify_test

import (
	"testing"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/packet"
	"github.com/trustd/trustd/registry"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/verify"
)

// batched signs a subject as leaf n of a batch of five.
func batched(s signature.Subject, k key, n int) signature.Signature {
	leaves := make([]signature.Hash, 5)
	for i := range leaves {
		leaves[i] = signature.Leaf(signature.Subject{Kind: s.Kind, Agent: s.Agent, Message: []byte{byte(i)}}, signature.Salt{byte(i)})
	}
	salt := signature.Salt{7}
	leaves[n] = signature.Leaf(s, salt)
	tree := signature.NewTree(leaves)
	return tree.Sign(n, salt, k.sign(signature.Statement(k.pub, tree.Size(), tree.Root())))
}

// TestBatchedPackets: a packet from a batch is accepted for its own agent, kind and bytes, and for no others.
func TestBatchedPackets(t *testing.T) {
	w := newWorld(t)
	pack := func(kind signature.Kind, agent string, change func(map[string]any)) *packet.Task {
		fields := w.packetFields()
		fields["signature"] = signature.EncodeText(make([]byte, 64))
		msg := parsed(t, fields).SigningBytes()
		fields["signature"] = batched(signature.Subject{Kind: kind, Agent: agentID(t, agent), Message: msg}, w.alice, 2).Text()
		if change != nil {
			change(fields)
		}
		return parsed(t, fields)
	}
	for _, c := range []struct {
		name   string
		packet *packet.Task
		policy func(*verify.Policy)
		want   fault.Code
	}{
		{name: "whole", packet: pack(signature.KindPacket, "alice", nil)},
		{name: "as a message", packet: pack(signature.KindMessage, "alice", nil), want: fault.InvalidSignature},
		{name: "as another agent's", packet: pack(signature.KindPacket, "bob", nil), want: fault.InvalidSignature},
		{name: "altered", packet: pack(signature.KindPacket, "alice", func(f map[string]any) { f["intent"] = "other" }), want: fault.InvalidSignature},
		{name: "only direct ones", packet: pack(signature.KindPacket, "alice", nil),
			policy: func(p *verify.Policy) { p.DirectOnly = true }, want: fault.AssuranceTooLow},
		{name: "legacy admitted", packet: pack(signature.KindMessage, "alice", nil),
			policy: func(p *verify.Policy) { p.LegacyTH033 = true }, want: fault.InvalidSignature},
	} {
		in := w.input(c.packet)
		if c.policy != nil {
			c.policy(&in.Policy)
		}
		for _, roots := range []*signature.Roots{nil, signature.NewRoots(8)} {
			in.Roots = roots
			for range 2 {
				acc, err := verify.Check(in)
				wantCode(t, c.name, err, c.want)
				if err == nil && acc.Mode() != signature.Batched {
					t.Errorf("%s: mode %s", c.name, acc.Mode())
				}
			}
		}
	}
}

// TestCachedRootSparesNoStatusCheck is T-SIG-6: a batch that was verified before does not help an agent that was revoked since.
func TestCachedRootSparesNoStatusCheck(t *testing.T) {
	w := newWorld(t)
	h := header(t, "alice", w.alice)
	u, err := packet.NewMessage(h, []byte(`{"a":1}`))
	if err != nil {
		t.Fatal(err)
	}
	m, err := u.Seal(batched(u.Subject(), w.alice, 0), w.alice.pub)
	if err != nil {
		t.Fatal(err)
	}
	text, err := m.JSON()
	if err != nil {
		t.Fatal(err)
	}
	if m, err = packet.ParseMessage(text); err != nil {
		t.Fatal(err)
	}
	in := w.messageInput(m)
	in.Roots = signature.NewRoots(8)
	_, refusal := verify.CheckMessageWithout(in, edited{w.state, nil}, "")
	wantCode(t, "first", refusal, "")
	if in.Roots.Len() != 1 {
		t.Errorf("%d roots are remembered", in.Roots.Len())
	}
	revoked := onlyAlice(func(a *registry.Agent) { a.Revocation = &registry.Revocation{Code: registry.KeyCompromise, At: now} })
	_, refusal = verify.CheckMessageWithout(in, edited{w.state, revoked}, "")
	wantCode(t, "revoked since", refusal, fault.AgentRevoked)
	other := onlyAlice(func(a *registry.Agent) { a.Keys[0].Public = w.none.pub })
	in.Mode = verify.ModeKey
	in.Key = ident.KeyID{1}
	_, refusal = verify.CheckMessageWithout(in, edited{w.state, other}, "")
	wantCode(t, "another key expected", refusal, fault.PublicKeyMismatch)
}

// TestGrades: the lower of the registry's word and the signer's own counts, against policy and request together.
func TestGrades(t *testing.T) {
	w := newWorld(t)
	for _, c := range []struct {
		registry, claimed string
		policy, request   signer.Grade
		want              fault.Code
	}{
		{"software", "software", "", "", ""},
		{"", "software", "", "", ""},
		{"", "software", signer.Software, "", fault.AssuranceTooLow},
		{"hardware-claimed", "hardware-claimed", signer.HardwareClaimed, "", ""},
		{"hardware-claimed", "software", signer.HardwareClaimed, "", fault.AssuranceTooLow},
		{"software", "hardware-attested", signer.HardwareClaimed, "", fault.AssuranceTooLow},
		{"hardware-attested", "hardware-claimed", signer.Software, signer.HardwareAttested, fault.AssuranceTooLow},
		{"hardware-claimed", "hardware-claimed", signer.HardwareClaimed, signer.Software, ""},
		{"hardware-claimed", "hardware-claimed", signer.HardwareAttested, signer.Software, fault.AssuranceTooLow},
	} {
		h := header(t, "alice", w.alice)
		h.Grade = c.claimed
		in := w.messageInput(message(t, h, w.alice, `1`))
		in.Policy.MinGrade = c.policy
		in.Policy = in.Policy.Tightened(c.request, false)
		_, err := verify.CheckMessageWithout(in, edited{w.state, onlyAlice(func(a *registry.Agent) { a.Keys[0].Grade = c.registry })}, "")
		wantCode(t, c.registry+"/"+c.claimed+" for "+string(c.policy)+"+"+string(c.request), err, c.want)
	}
}
