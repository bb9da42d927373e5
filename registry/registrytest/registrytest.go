// Package registrytest makes registries for tests: keys that follow from their names, and records signed by them.
package registrytest

import (
	"crypto/ed25519"
	"crypto/sha256"
	"testing"
	"time"

	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/registry"
)

// A Key is an Ed25519 key that anybody can make: never use one outside of tests.
type Key struct {
	Private ed25519.PrivateKey
	Public  ident.PublicKey
}

// NewKey returns the key of a name, always the same.
func NewKey(name string) Key {
	if !testing.Testing() {
		panic("registrytest: used outside of a test")
	}
	seed := sha256.Sum256([]byte("registrytest " + name))
	priv := ed25519.NewKeyFromSeed(seed[:])
	pub, err := ident.NewPublicKey(priv.Public())
	if err != nil {
		panic(err)
	}
	return Key{priv, pub}
}

// ID returns the key's fingerprint.
func (k Key) ID() ident.KeyID { return k.Public.ID() }

// Sign adds the key's signature to a record.
func (k Key) Sign(rec *registry.Record, cluster registry.ClusterID) {
	rec.AddSignature(k.ID(), ed25519.Sign(k.Private, rec.SigningBytes(cluster)))
}

// Prove adds the key's proof of possession to the record that introduces it as the key of an agent.
func (k Key) Prove(rec *registry.Record, cluster registry.ClusterID, id ident.AgentID) {
	rec.AddSignature(k.ID(), ed25519.Sign(k.Private, rec.PossessionBytes(cluster, id, k.Public)))
}

// Start is the time of the genesis record.
var Start = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// NodeName is the id of the founding node, and the name of its key.
const NodeName = "node-1"

// Genesis returns the genesis record of an authority with these operators, each with the key of its name.
func Genesis(t testing.TB, operators ...string) registry.Record {
	t.Helper()
	salt := sha256.Sum256([]byte("salt"))
	g := registry.Genesis{
		Origin: "test.example", Threshold: min(2, len(operators)), Node: founder(t, NodeName),
		Policy: registry.Policy{DefaultLevel: registry.LevelLow}, CreatedAt: Start, Salt: salt[:],
	}
	for _, o := range operators {
		g.Operators = append(g.Operators, founder(t, o))
	}
	rec, err := registry.NewGenesis(g)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range append([]string{NodeName}, operators...) {
		NewKey(name).Sign(&rec, registry.ClusterID{})
	}
	return rec
}

func founder(t testing.TB, name string) registry.Founder {
	return registry.Founder{
		AgentID: ID(t, name), PublicKey: NewKey(name).Public, Grade: "software", Origin: "generated_on_device",
	}
}

// ID returns an agent id.
func ID(t testing.TB, name string) ident.AgentID {
	t.Helper()
	id, err := ident.ParseAgentID(name)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// New returns the state after the genesis record.
func New(t testing.TB, operators ...string) *registry.State {
	t.Helper()
	return Apply(t, registry.New(), Genesis(t, operators...))
}

// Apply returns the state after a record, which must be accepted.
func Apply(t testing.TB, s *registry.State, rec registry.Record) *registry.State {
	t.Helper()
	next, out := s.Apply(rec)
	if !out.Accepted {
		t.Fatalf("the record %s is refused: %s", rec.Type, out.Err.Verbose())
	}
	return next
}

// Register returns the registration of an agent of level LOW with the key of its name, signed by that key and by
// the founding node. change may alter it before it is signed.
func Register(t testing.TB, cluster registry.ClusterID, name string, change func(*registry.Register)) registry.Record {
	t.Helper()
	b := registry.Register{
		AgentID: ID(t, name), Role: registry.RoleAgent, PublicKey: NewKey(name).Public, Level: registry.LevelLow,
		Grade: "software", Origin: "generated_on_device", Node: NewKey(NodeName).ID(), CreatedAt: Start.Add(time.Minute),
	}
	if change != nil {
		change(&b)
	}
	rec, err := registry.NewRegister(b)
	if err != nil {
		t.Fatal(err)
	}
	NewKey(name).Prove(&rec, cluster, b.AgentID)
	NewKey(NodeName).Sign(&rec, cluster)
	return rec
}
