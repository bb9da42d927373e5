package verify_test

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"testing"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/packet"
	"github.com/trustd/trustd/registry"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/verify"
	"github.com/trustd/trustd/view"
)

var now = time.Date(2026, 3, 8, 12, 0, 0, 0, time.UTC)

// A key signs what tests need.
type key struct {
	pub  ident.PublicKey
	sign func(msg []byte) []byte
}

func edKey(t testing.TB, n byte) key {
	t.Helper()
	priv := ed25519.NewKeyFromSeed(append(make([]byte, 31), n))
	pub, err := ident.NewPublicKey(priv.Public())
	if err != nil {
		t.Fatal(err)
	}
	return key{pub, func(msg []byte) []byte { return ed25519.Sign(priv, msg) }}
}

func p256Key(t testing.TB) key {
	t.Helper()
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := ident.NewPublicKey(priv.Public())
	if err != nil {
		t.Fatal(err)
	}
	return key{pub, func(msg []byte) []byte {
		digest := sha256.Sum256(msg)
		r, s, err := ecdsa.Sign(rand.Reader, priv, digest[:])
		if err != nil {
			t.Fatal(err)
		}
		out := make([]byte, 64)
		r.FillBytes(out[:32])
		s.FillBytes(out[32:])
		return out
	}}
}

// A world is a registry that real records have made: operator root, node host, and the agents alice (ed25519, also
// agent:planner:1), bob (ed25519), carol (ecdsa-p256) and none (level NONE).
type world struct {
	state                               *registry.State
	root, host, alice, bob, carol, none key
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{
		root: edKey(t, 1), host: edKey(t, 2), alice: edKey(t, 3), bob: edKey(t, 4), carol: p256Key(t), none: edKey(t,
			5),
		state: registry.New(),
	}
	born := now.Add(-24 * time.Hour)
	rec, err := registry.NewGenesis(registry.Genesis{
		Origin: "test.example",
		Operators: []registry.Founder{{AgentID: agentID(t, "root"), PublicKey: w.root.pub, Grade: "software",
			Origin: "unknown"}},
		Threshold: 1, CreatedAt: born, Salt: make([]byte, 32), Policy: registry.Policy{DefaultLevel: registry.LevelLow},
		Node: registry.Founder{AgentID: agentID(t, "host"), PublicKey: w.host.pub, Grade: "software",
			Origin: "unknown"},
	})
	if err != nil {
		t.Fatal(err)
	}
	msg := rec.SigningBytes(registry.ClusterID{})
	rec.AddSignature(w.root.pub.ID(), w.root.sign(msg))
	rec.AddSignature(w.host.pub.ID(), w.host.sign(msg))
	w.apply(t, rec)
	planner, err := ident.ParseAlias("agent:planner:1")
	if err != nil {
		t.Fatal(err)
	}
	w.register(t, "alice", w.alice, registry.LevelLow, planner)
	w.register(t, "bob", w.bob, registry.LevelLow)
	w.register(t, "carol", w.carol, registry.LevelLow)
	w.register(t, "none", w.none, registry.LevelNone)
	return w
}

func (w *world) register(t testing.TB, id string, k key, level registry.Level, aliases ...ident.Alias) {
	t.Helper()
	rec, err := registry.NewRegister(registry.Register{
		AgentID: agentID(t, id), Role: registry.RoleAgent, PublicKey: k.pub, Aliases: aliases, Level: level,
		Grade: "software", Origin: "unknown", Node: w.host.pub.ID(), CreatedAt: now.Add(-time.Hour),
	})
	if err != nil {
		t.Fatal(err)
	}
	rec.AddSignature(w.host.pub.ID(), w.host.sign(rec.SigningBytes(w.state.ClusterID())))
	rec.AddSignature(k.pub.ID(), k.sign(rec.PossessionBytes(w.state.ClusterID(), agentID(t, id), k.pub)))
	w.apply(t, rec)
}

func (w *world) apply(t testing.TB, rec registry.Record) {
	t.Helper()
	next, out := w.state.Apply(rec)
	if !out.Accepted {
		t.Fatalf("%s: %v", rec.Type, out.Err)
	}
	w.state = next
}

func (w *world) view() *view.View { return &view.View{Registry: w.state} }

func agentID(t testing.TB, s string) ident.AgentID {
	t.Helper()
	id, err := ident.ParseAgentID(s)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func alias(k key) string { return ident.DerivedAlias(k.pub).String() }

// An edited registry shows its agents changed.
type edited struct {
	verify.Lookup
	edit func(*registry.Agent)
}

func (e edited) apply(a registry.Agent) registry.Agent {
	if e.edit != nil {
		e.edit(&a)
	}
	return a
}

func (e edited) Agent(id ident.AgentID) (registry.Agent, bool) {
	a, ok := e.Lookup.Agent(id)
	if ok {
		a = e.apply(a)
	}
	return a, ok
}

func (e edited) ByAlias(s string) (registry.Agent, bool) {
	a, ok := e.Lookup.ByAlias(s)
	if ok {
		a = e.apply(a)
	}
	return a, ok
}

func (e edited) ByKey(id ident.KeyID) (registry.Agent, registry.KeyEpoch, bool) {
	a, k, ok := e.Lookup.ByKey(id)
	if !ok {
		return a, k, false
	}
	a = e.apply(a)
	for _, k = range a.Keys {
		if k.Public.ID() == id {
			return a, k, true
		}
	}
	return a, k, true
}

// packetFields are those of a packet from alice to bob that is in order.
func (w *world) packetFields() map[string]any {
	return map[string]any{
		"packet_id": "pk-1", "task_id": "task-1", "from_agent": alias(w.alice), "to_agent": alias(w.bob),
		"issued_at": "2026-03-08T11:59:50Z", "expires_at": "2026-03-08T12:01:50Z", "nonce": "nonce-1",
		"intent": "test", "permissions": map[string]any{"allowed_actions": []string{"read"}},
		"signature_algo": "Ed25519", "public_key": w.alice.pub.PEM(),
	}
}

// sealed signs the fields with k and parses the result.
func sealed(t testing.TB, fields map[string]any, k key, bytesOf func(*packet.Task) []byte) *packet.Task {
	t.Helper()
	fields["signature"] = base64.StdEncoding.EncodeToString(make([]byte, k.pub.Algorithm().SignatureSize()))
	fields["signature"] = signature.EncodeText(k.sign(bytesOf(parsed(t, fields))))
	return parsed(t, fields)
}

func parsed(t testing.TB, fields map[string]any) *packet.Task {
	t.Helper()
	raw, err := json.Marshal(fields)
	if err != nil {
		t.Fatal(err)
	}
	p, err := packet.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func current(p *packet.Task) []byte { return p.SigningBytes() }

func legacy(p *packet.Task) []byte { return p.LegacySigningBytes()[0] }

func forBob(id ident.AgentID) bool { return id.String() == "bob" }

func (w *world) input(p *packet.Task) verify.Input {
	return verify.Input{Packet: p, MayReceive: forBob, View: w.view(), Policy: verify.DefaultPolicy(), Now: now}
}

func wantCode(t *testing.T, what string, err *fault.Error, want fault.Code) {
	t.Helper()
	var got fault.Code
	if err != nil {
		got = err.Code
	}
	if got != want {
		t.Errorf("%s: %q, want %q (%v)", what, got, want, err)
	}
}
