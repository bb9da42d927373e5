package verify_test

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/hex"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/packet"
	"github.com/trustd/trustd/registry"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/verify"
	"github.com/trustd/trustd/view"
)

// A vector is a packet in a registry that one row of the table refuses, and only that row.
type vector struct {
	reason fault.Code
	fields map[string]any            // that differ from a good packet's
	signer key                       // where it is not alice
	bytes  func(*packet.Task) []byte // where it is not the current form
	edit   func(*registry.Agent)     // what the registry says otherwise
	input  func(*verify.Input)
}

func onlyAlice(edit func(*registry.Agent)) func(*registry.Agent) {
	return func(a *registry.Agent) {
		if a.ID.String() == "alice" {
			edit(a)
		}
	}
}

func vectors(w *world) []vector {
	return []vector{
		{reason: fault.WrongAudience, fields: map[string]any{"to_agent": alias(w.carol)}},
		{reason: fault.UnknownAgent, fields: map[string]any{"from_agent": "agent:ghost"}},
		{reason: fault.AlgorithmMismatch, fields: map[string]any{"signature_algo": "ES256"}},
		{reason: fault.PublicKeyMismatch, fields: map[string]any{"public_key": w.bob.pub.PEM()}},
		{reason: fault.InvalidSignature, signer: w.bob},
		{reason: fault.LegacyRefused, bytes: legacy},
		{reason: fault.AgentRevoked, edit: onlyAlice(func(a *registry.Agent) {
			a.Revocation = &registry.Revocation{Code: registry.Superseded, At: now.Add(time.Hour)}
		})},
		{reason: fault.AgentRemoved,
			edit: onlyAlice(func(a *registry.Agent) { a.Removed = &registry.Removal{At: now} })},
		{reason: fault.AgentExpired, edit: onlyAlice(func(a *registry.Agent) { a.ExpiresAt = now })},
		{reason: fault.KeyRetired,
			edit: onlyAlice(func(a *registry.Agent) { a.Keys[0].Until = now.Add(-10 * time.Second) })},
		{reason: fault.MalformedTimeWindow, fields: map[string]any{
			"issued_at": "2026-03-08T12:00:20Z", "expires_at": "2026-03-08T12:00:19.999999Z",
		}},
		{reason: fault.IssuedInFuture, fields: map[string]any{"issued_at": "2026-03-08T12:00:30.000001Z"}},
		{reason: fault.UnsupportedRiskLevel, fields: map[string]any{"risk_level": "admin"}},
		{reason: fault.TTLPolicyMismatch, fields: map[string]any{
			"risk_level": "write", "ttl_seconds": 60, "expires_at": "2026-03-08T12:00:50.000001Z",
		}},
		{reason: fault.TTLTooLong, fields: map[string]any{
			"risk_level": "write", "ttl_seconds": 121, "expires_at": "2026-03-08T12:01:51Z",
		}},
		{reason: fault.Expired, fields: map[string]any{"expires_at": "2026-03-08T11:59:59.999999Z"}},
		{reason: fault.InvalidAIProvenance, fields: map[string]any{"ai_provenance": map[string]any{"model": "m"}}},
		{reason: fault.AssuranceTooLow, input: func(in *verify.Input) { in.Policy.MinGrade = signer.HardwareClaimed }},
	}
}

func (v vector) build(t testing.TB, w *world) (verify.Input, verify.Lookup) {
	t.Helper()
	fields := w.packetFields()
	for name, value := range v.fields {
		fields[name] = value
	}
	signer, bytesOf := w.alice, current
	if !v.signer.pub.IsZero() {
		signer = v.signer
	}
	if v.bytes != nil {
		bytesOf = v.bytes
	}
	in := w.input(sealed(t, fields, signer, bytesOf))
	if v.input != nil {
		v.input(&in)
	}
	return in, edited{w.state, v.edit}
}

// TestEachRowHasItsVector: every row refuses its vector, no other row does, and with the row switched off the
// vector is accepted. A row without a vector fails.
func TestEachRowHasItsVector(t *testing.T) {
	w := newWorld(t)
	var covered []fault.Code
	for _, v := range vectors(w) {
		covered = append(covered, v.reason)
		in, reg := v.build(t, w)
		_, err := verify.CheckWithout(in, reg, "")
		wantCode(t, "all rows on", err, v.reason)
		if err != nil && err.Field == "" {
			t.Errorf("%s names no field", v.reason)
		}
		for _, off := range verify.Rows() {
			_, err := verify.CheckWithout(in, reg, off)
			want := v.reason
			if off == v.reason {
				want = ""
			}
			wantCode(t, "vector "+string(v.reason)+" with "+string(off)+" off", err, want)
		}
	}
	if rows := verify.Rows(); !slices.Equal(rows, covered) {
		t.Errorf("rows %v\nvectors %v", rows, covered)
	}
}

func TestAccepted(t *testing.T) {
	w := newWorld(t)
	in := w.input(sealed(t, w.packetFields(), w.alice, current))
	in.Policy.Grace = 5 * time.Second
	acc, err := verify.Check(in)
	if err != nil {
		t.Fatal(err)
	}
	if acc.Agent().ID.String() != "alice" || acc.Key().Epoch != 1 || acc.KeyID() != w.alice.pub.ID() ||
		acc.Nonce() != "nonce-1" || acc.Receiver().String() != "bob" || acc.Legacy() {
		t.Errorf("accepted as %+v", acc)
	}
	if want := time.Date(2026, 3, 8, 12, 1, 50, 0, time.UTC).Add(35 * time.Second); !acc.Until().Equal(want) {
		t.Errorf("Until() = %v, want %v", acc.Until(), want)
	}
}

// TestForms accepts what differs from the plain packet and is still right.
func TestForms(t *testing.T) {
	w := newWorld(t)
	fields := func(changes map[string]any) map[string]any {
		f := w.packetFields()
		for k, v := range changes {
			f[k] = v
		}
		return f
	}
	carols := map[string]any{"from_agent": alias(w.carol), "public_key": w.carol.pub.PEM(), "signature_algo": "ES256"}
	cases := []struct {
		name   string
		packet *packet.Task
		policy func(*verify.Policy)
		legacy bool
	}{
		{name: "another alias", packet: sealed(t, fields(map[string]any{"from_agent": "agent:planner:1"}), w.alice,
			current)},
		{name: "ES256", packet: sealed(t, fields(carols), w.carol, current)},
		{name: "risk alone", packet: sealed(t, fields(map[string]any{"risk_level": "write"}), w.alice, current)},
		{name: "legacy", packet: sealed(t, fields(nil), w.alice, legacy), legacy: true,
			policy: func(p *verify.Policy) { p.LegacyTH033 = true }},
	}
	for _, c := range cases {
		in := w.input(c.packet)
		if c.policy != nil {
			c.policy(&in.Policy)
		}
		acc, err := verify.Check(in)
		if err != nil || acc.Legacy() != c.legacy {
			t.Errorf("%s: %v, legacy %v", c.name, err, acc.Legacy())
		}
	}
}

// TestBoundaries (T-PKT-5): on its boundary a packet is accepted, one microsecond past it is not (packet.md 1.10).
func TestBoundaries(t *testing.T) {
	w := newWorld(t)
	const tick = time.Microsecond
	cases := []struct {
		name   string
		vector vector
		want   fault.Code
	}{
		{"issued = expires", vector{fields: map[string]any{"issued_at": "2026-03-08T12:00:00Z",
			"expires_at": "2026-03-08T12:00:00Z"}}, ""},
		{"issued - skew = now", vector{fields: map[string]any{"issued_at": "2026-03-08T12:00:30Z"}}, ""},
		{"expires = now", vector{fields: map[string]any{"expires_at": "2026-03-08T12:00:00Z"}}, ""},
		{"expires + grace = now", vector{fields: map[string]any{"expires_at": "2026-03-08T11:59:55Z"},
			input: func(in *verify.Input) { in.Policy.Grace = 5 * time.Second }}, ""},
		{"past the grace", vector{fields: map[string]any{"expires_at": "2026-03-08T11:59:55Z"},
			input: func(in *verify.Input) { in.Policy.Grace, in.Now = 5*time.Second, now.Add(tick) }}, fault.Expired},
		{"cap for read", vector{fields: map[string]any{"risk_level": "read", "expires_at": "2026-03-08T12:14:50Z"}},
			""},
		{"cap without risk", vector{fields: map[string]any{"expires_at": "2026-03-08T12:14:50Z"}}, ""},
		{"past the cap without risk", vector{fields: map[string]any{"expires_at": "2026-03-08T12:14:50.000001Z"}},
			fault.TTLTooLong},
		{"ten years", vector{fields: map[string]any{"expires_at": "2036-03-08T12:00:00Z"}}, fault.TTLTooLong},
		{"a year by ttl_seconds", vector{fields: map[string]any{
			"risk_level": "write", "ttl_seconds": 31536000, "expires_at": "2027-03-08T11:59:50Z"}}, fault.TTLTooLong},
		{"skew is clamped", vector{fields: map[string]any{"issued_at": "2026-03-08T12:05:01Z",
			"expires_at": "2026-03-08T12:06:00Z"},
			input: func(in *verify.Input) { in.Policy.Skew = time.Hour }}, fault.IssuedInFuture},
		{"grace is clamped", vector{fields: map[string]any{"issued_at": "2026-03-08T11:58:00Z",
			"expires_at": "2026-03-08T11:58:59Z"},
			input: func(in *verify.Input) { in.Policy.Grace = time.Hour }}, fault.Expired},
		{"negative skew is none", vector{fields: map[string]any{"issued_at": "2026-03-08T12:00:00Z"},
			input: func(in *verify.Input) { in.Policy.Skew = -time.Hour }}, ""},
		{"no policy at all", vector{input: func(in *verify.Input) { in.Policy = verify.Policy{} }}, fault.TTLTooLong},
		{"no clock", vector{input: func(in *verify.Input) { in.Now = time.Time{} }}, fault.IssuedInFuture},
		{"registration ends later", vector{edit: onlyAlice(func(a *registry.Agent) { a.ExpiresAt = now.Add(tick) })},
			""},
		{"issued before its key was superseded", vector{edit: onlyAlice(func(a *registry.Agent) {
			a.Keys[0].Until = time.Date(2026, 3, 8, 11, 59, 50, 1000, time.UTC)
		})}, ""},
		{"nobody asks", vector{input: func(in *verify.Input) { in.MayReceive = nil }}, fault.WrongAudience},
		{"to nobody we know", vector{fields: map[string]any{"to_agent": "bob"}}, fault.WrongAudience},
	}
	for _, c := range cases {
		in, reg := c.vector.build(t, w)
		_, err := verify.CheckWithout(in, reg, "")
		wantCode(t, c.name, err, c.want)
	}
}

// TestWhoMayNotSign: operators and nodes have other work for their keys, and level NONE is no trust.
func TestWhoMayNotSign(t *testing.T) {
	w := newWorld(t)
	for name, k := range map[string]key{"operator": w.root, "node": w.host, "level NONE": w.none} {
		f := w.packetFields()
		f["from_agent"], f["public_key"] = alias(k), k.pub.PEM()
		_, err := verify.Check(w.input(sealed(t, f, k, current)))
		wantCode(t, name, err, fault.UnknownAgent)
	}
}

// TestRotatedKeys: after a rotation both keys count, each for what was issued in its time, and every alias of the
// lineage names the agent.
func TestRotatedKeys(t *testing.T) {
	w := newWorld(t)
	next := edKey(t, 9)
	rotated := onlyAlice(func(a *registry.Agent) {
		at := now.Add(-5 * time.Second)
		a.Keys[0].Until = at
		a.Keys = append(a.Keys, registry.KeyEpoch{Epoch: 2, Public: next.pub, From: at})
	})
	cases := []struct {
		name   string
		fields map[string]any
		signer key
		want   fault.Code
		epoch  uint64
	}{
		{"new key, old alias", map[string]any{"public_key": next.pub.PEM(), "issued_at": "2026-03-08T11:59:58Z"}, next,
			"", 2},
		{"old key, before", nil, w.alice, "", 1},
		{"old key, after", map[string]any{"issued_at": "2026-03-08T11:59:58Z"}, w.alice, fault.KeyRetired, 0},
		{"old key's text, new key", nil, next, fault.InvalidSignature, 0},
		{"new key's text, old key", map[string]any{"public_key": next.pub.PEM()}, w.alice, fault.InvalidSignature, 0},
	}
	for _, c := range cases {
		in, reg := vector{fields: c.fields, signer: c.signer, edit: rotated}.build(t, w)
		acc, err := verify.CheckWithout(in, reg, "")
		wantCode(t, c.name, err, c.want)
		if err == nil && acc.Key().Epoch != c.epoch {
			t.Errorf("%s: epoch %d", c.name, acc.Key().Epoch)
		}
	}
}

// TestForgeries (T-PKT-2, T-PKT-6): packets that TrustHandoff's own default path accepts (packet.md 1.9).
func TestForgeries(t *testing.T) {
	w := newWorld(t)
	mallory := edKey(t, 66)
	cases := []struct {
		name   string
		fields map[string]any
		signer key
		want   fault.Code
	}{
		{"as alice with an own key", map[string]any{"public_key": mallory.pub.PEM()}, mallory, fault.PublicKeyMismatch},
		{"as alice with bob's key", map[string]any{"public_key": w.bob.pub.PEM()}, w.bob, fault.PublicKeyMismatch},
		{"as herself, unregistered", map[string]any{"public_key": mallory.pub.PEM(), "from_agent": alias(mallory)},
			mallory, fault.UnknownAgent},
		{"under another's algorithm", map[string]any{"signature_algo": "PS256"}, w.alice, fault.AlgorithmMismatch},
		{"under no algorithm", map[string]any{"signature_algo": "none"}, w.alice, fault.AlgorithmMismatch},
		{"for another", map[string]any{"to_agent": "agent:planner:1"}, w.alice, fault.WrongAudience},
	}
	for _, c := range cases {
		in, reg := vector{fields: c.fields, signer: c.signer}.build(t, w)
		_, err := verify.CheckWithout(in, reg, "")
		wantCode(t, c.name, err, c.want)
	}
}

// TestTampered (T-PKT-1) flips each bit of the signature and changes each field.
func TestTampered(t *testing.T) {
	w := newWorld(t)
	good := w.packetFields()
	signed := sealed(t, good, w.alice, current)
	raw, err := base64.StdEncoding.DecodeString(signed.SignatureText)
	if err != nil {
		t.Fatal(err)
	}
	for bit := range 8 * len(raw) {
		forged := slices.Clone(raw)
		forged[bit/8] ^= 1 << (bit % 8)
		f := mapWith(good, "signature", base64.StdEncoding.EncodeToString(forged))
		_, err := verify.Check(w.input(parsed(t, f)))
		wantCode(t, "signature bit flipped", err, fault.InvalidSignature)
	}
	for name, value := range map[string]any{
		"packet_id": "pk-2", "task_id": "x", "nonce": "nonce-2", "intent": "other", "issued_at": "2026-03-08T11:59:51Z",
		"expires_at": "2026-03-08T12:01:51Z", "permissions": map[string]any{"allowed_actions": []string{"write"}},
		"context": map[string]any{"a": 1}, "memory_refs": []string{"m"}, "risk_level": "write", "ttl_seconds": 1,
		"constraints": map[string]any{}, "provenance": map[string]any{}, "ai_provenance": map[string]any{"source": "s"},
		"capability_token": "t", "task_type": "t", "goal": "g", "from_agent": "agent:planner:1",
	} {
		_, err := verify.Check(w.input(parsed(t, mapWith(good, name, value))))
		wantCode(t, name+" changed", err, fault.InvalidSignature)
	}
}

func mapWith(m map[string]any, name string, value any) map[string]any {
	out := map[string]any{name: value}
	for k, v := range m {
		if k != name {
			out[k] = v
		}
	}
	return out
}

func TestNothingToDecideBy(t *testing.T) {
	w := newWorld(t)
	p := sealed(t, w.packetFields(), w.alice, current)
	_, err := verify.Check(verify.Input{View: w.view()})
	wantCode(t, "no packet", err, fault.Malformed)
	_, err = verify.Check(verify.Input{Packet: p})
	wantCode(t, "no view", err, fault.NotInitialised)
	_, err = verify.Check(verify.Input{Packet: p, View: &view.View{}})
	wantCode(t, "no registry", err, fault.NotInitialised)
	_, err = verify.Check(verify.Input{Packet: p, View: &view.View{Registry: registry.New()}, Now: now,
		MayReceive: func(ident.AgentID) bool { return true }})
	wantCode(t, "empty registry", err, fault.WrongAudience)
}

// goldenPacket is TH-P1 of packet.md 4.2, signed by TrustHandoff itself.
const goldenPacket = "testdata/th-p1.json"

// goldenWorld registers the keys of the golden packet: RFC 8032 tests 1 and 2.
func goldenWorld(t testing.TB) (*world, []byte) {
	t.Helper()
	raw, err := os.ReadFile(goldenPacket)
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t)
	for name, k := range map[string]key{"golden-1": seedKey(t, seed1), "golden-2": seedKey(t, seed2)} {
		w.register(t, name, k, registry.LevelLow)
	}
	return w, raw
}

// The secret keys of RFC 8032 section 7.1, tests 1 and 2.
const (
	seed1 = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"
	seed2 = "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"
)

func seedKey(t testing.TB, seed string) key {
	t.Helper()
	raw, err := hex.DecodeString(seed)
	if err != nil {
		t.Fatal(err)
	}
	priv := ed25519.NewKeyFromSeed(raw)
	pub, err := ident.NewPublicKey(priv.Public())
	if err != nil {
		t.Fatal(err)
	}
	return key{pub, func(msg []byte) []byte { return ed25519.Sign(priv, msg) }}
}

func goldenInput(w *world, p *packet.Task) verify.Input {
	return verify.Input{
		Packet: p, View: w.view(), Policy: verify.DefaultPolicy(), Now: now.Add(time.Minute),
		MayReceive: func(id ident.AgentID) bool { return id.String() == "golden-2" },
	}
}

// FuzzGate: whatever the text, the gate neither fails nor accepts anything but the golden packet.
func FuzzGate(f *testing.F) {
	w, raw := goldenWorld(f)
	f.Add(raw)
	golden, err := packet.Parse(raw)
	if err != nil {
		f.Fatal(err)
	}
	for _, v := range vectors(w) {
		in, _ := v.build(f, w)
		f.Add(in.Packet.JSON())
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := packet.Parse(b)
		if err != nil {
			return
		}
		in := goldenInput(w, p)
		in.Policy.LegacyTH033 = true
		acc, refusal := verify.Check(in)
		switch {
		case refusal == nil && (!bytes.Equal(p.SigningBytes(), golden.SigningBytes()) || acc.Nonce() != golden.Nonce):
			t.Fatal("accepted another packet")
		case refusal != nil && !slices.Contains(verify.Reasons(), refusal.Code):
			t.Fatalf("refused for %s", refusal.Code)
		}
	})
}

func TestGoldenPacket(t *testing.T) {
	w, raw := goldenWorld(t)
	p, err := packet.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	acc, refusal := verify.Check(goldenInput(w, p))
	if refusal != nil {
		t.Fatal(refusal)
	}
	if acc.Agent().ID.String() != "golden-1" {
		t.Errorf("accepted as %v", acc.Agent().ID)
	}
}
