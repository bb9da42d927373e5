package registry_test

import (
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/registry"
	"github.com/trustd/trustd/registry/registrytest"
)

var (
	key   = registrytest.NewKey
	start = registrytest.Start
	later = start.Add(time.Hour)
)

// A world is an authority with the operators op-a and op-b, the node node-1, and the agents planner (LOW, expires
// after a day) and admin (ADMIN), both registered by node-1.
type world struct {
	*registry.State
	t testing.TB
}

func newWorld(t testing.TB) *world {
	t.Helper()
	if built == nil { // states do not change: one serves all tests
		built = buildWorld(t)
	}
	return &world{built, t}
}

var built *registry.State

func buildWorld(t testing.TB) *registry.State {
	t.Helper()
	w := &world{registrytest.New(t, "op-a", "op-b"), t}
	w.must(registrytest.Register(t, w.ClusterID(), "planner", func(b *registry.Register) {
		b.Aliases = []ident.Alias{alias(t, "agent:planner"), alias(t, "agent:a:b")}
		b.Metadata = map[string]string{"department": "research <&> \u00e9"}
		b.ExpiresAt = start.Add(24 * time.Hour)
	}))
	rec := registrytest.Register(t, w.ClusterID(), "admin", func(b *registry.Register) { b.Level = registry.LevelAdmin })
	w.must(w.sign(rec, "op-a", "op-b"))
	return w.State
}

func (w *world) must(rec registry.Record) {
	w.t.Helper()
	w.State = registrytest.Apply(w.t, w.State, rec)
}

// sign adds the signatures of the keys with these names; a name after "!" proves possession of the key for the
// agent of that name.
func (w *world) sign(rec registry.Record, names ...string) registry.Record {
	w.t.Helper()
	for _, n := range names {
		if who, ok := strings.CutPrefix(n, "!"); ok {
			key(who).Prove(&rec, w.ClusterID(), registrytest.ID(w.t, who))
		} else {
			key(n).Sign(&rec, w.ClusterID())
		}
	}
	return rec
}

func alias(t testing.TB, s string) ident.Alias {
	t.Helper()
	a, err := ident.ParseAlias(s)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// draft returns the record or stops the test.
func draft(t testing.TB) func(registry.Record, error) registry.Record {
	return func(rec registry.Record, err error) registry.Record {
		t.Helper()
		if err != nil {
			t.Fatal(fault.From(err).Verbose())
		}
		return rec
	}
}

func (w *world) register(name string, change func(*registry.Register)) registry.Record {
	b := registry.Register{
		AgentID: registrytest.ID(w.t, name), Role: registry.RoleAgent, PublicKey: key(name).Public, Level: registry.LevelLow,
		Grade: "software", Origin: "generated_on_device", Node: key("node-1").ID(), CreatedAt: later,
	}
	if change != nil {
		change(&b)
	}
	return draft(w.t)(registry.NewRegister(b))
}

func (w *world) imported(name string, change func(*registry.Import)) registry.Record {
	b := registry.Import{
		AgentID: registrytest.ID(w.t, name), PublicKey: key(name).Public, Level: registry.LevelLow,
		Node: key("node-1").ID(), CreatedAt: later,
	}
	if change != nil {
		change(&b)
	}
	return draft(w.t)(registry.NewImport(b))
}

func (w *world) revoke(name string, code registry.RevocationCode) registry.Record {
	return draft(w.t)(registry.NewRevoke(registry.Revoke{AgentID: registrytest.ID(w.t, name), Code: code, At: later}))
}

func (w *world) remove(name string) registry.Record {
	return draft(w.t)(registry.NewRemove(registry.Remove{AgentID: registrytest.ID(w.t, name), Reason: "gone", At: later}))
}

func (w *world) alias(name, text string, version uint64) registry.Record {
	return draft(w.t)(registry.NewAddAlias(registry.AddAlias{
		AgentID: registrytest.ID(w.t, name), Alias: alias(w.t, text), Version: version, At: later,
	}))
}

func (w *world) update(name string, version uint64, expires time.Time) registry.Record {
	return draft(w.t)(registry.NewUpdate(registry.Update{
		AgentID: registrytest.ID(w.t, name), Version: version, ExpiresAt: expires, At: later,
		Metadata: map[string]string{"k": "v"},
	}))
}

func TestGenesis(t *testing.T) {
	s := registrytest.New(t, "op-a", "op-b")
	if s.ClusterID().IsZero() || s.Origin() != "test.example" || s.Threshold() != 2 || s.Len() != 3 {
		t.Errorf("cluster %s, origin %q, threshold %d, %d agents", s.ClusterID(), s.Origin(), s.Threshold(), s.Len())
	}
	if size, _ := s.Head(); size != 1 || !s.Initialised() {
		t.Errorf("size %d", size)
	}
	if id, err := registry.ParseClusterID(s.ClusterID().String()); err != nil || id != s.ClusterID() {
		t.Errorf("cluster id: %v, %v", id, err)
	}
	for _, bad := range []string{"", "sha256:", "sha256:" + strings.Repeat("AA", 32), strings.Repeat("a", 71)} {
		if _, err := registry.ParseClusterID(bad); err == nil {
			t.Errorf("the cluster id %q was taken", bad)
		}
	}
	ops, nodes := s.Operators(), s.Nodes()
	if len(ops) != 2 || len(nodes) != 1 || ops[0].Level != registry.LevelAdmin || nodes[0].ID.String() != "node-1" {
		t.Errorf("operators %v, nodes %v", ops, nodes)
	}
	if s.Policy().DefaultLevel != registry.LevelLow {
		t.Errorf("policy %v", s.Policy())
	}
	if other := registrytest.New(t, "op-a", "op-c"); other.ClusterID() == s.ClusterID() {
		t.Error("two authorities share an id")
	}
}

func TestGenesisRefused(t *testing.T) {
	good := registrytest.Genesis(t, "op-a", "op-b")
	without := func(name string) registry.Record {
		rec := good
		rec.Signatures = slices.DeleteFunc(slices.Clone(good.Signatures), func(s registry.Sig) bool {
			return s.Key == key(name).ID()
		})
		return rec
	}
	extra := good
	key("stranger").Sign(&extra, registry.ClusterID{})
	forged := good
	forged.AddSignature(key("op-a").ID(), make([]byte, 64))
	shared := func() registry.Record {
		f := registry.Founder{AgentID: registrytest.ID(t, "op-a"), PublicKey: key("op-a").Public, Grade: "x", Origin: "x"}
		n := f
		n.AgentID = registrytest.ID(t, "node-1")
		rec := draft(t)(registry.NewGenesis(registry.Genesis{
			Origin: "x", Operators: []registry.Founder{f}, Threshold: 1, Node: n, CreatedAt: start, Salt: make([]byte, 32),
		}))
		key("op-a").Sign(&rec, registry.ClusterID{})
		return rec
	}()
	for name, tc := range map[string]struct {
		rec  registry.Record
		code fault.Code
	}{
		"an operator has not signed": {without("op-b"), fault.NotAuthorised},
		"the node has not signed":    {without("node-1"), fault.NotAuthorised},
		"a stranger has signed":      {extra, fault.NotAuthorised},
		"a forged signature":         {forged, fault.InvalidSignature},
		"one key in two roles":       {shared, fault.KeyReused},
	} {
		s := registry.New()
		if next, out := s.Apply(tc.rec); out.Accepted || out.Err.Code != tc.code || next != s {
			t.Errorf("%s: %+v", name, out)
		}
	}
	s := registrytest.New(t, "op-a")
	if _, out := s.Apply(registrytest.Genesis(t, "op-a")); out.Accepted || out.Err.Code != fault.AlreadyExists {
		t.Errorf("a second genesis record: %+v", out)
	}
	if _, out := registry.New().Apply(registrytest.Register(t, s.ClusterID(), "x", nil)); out.Err.Code != fault.NotInitialised {
		t.Errorf("a record before genesis: %+v", out)
	}
}

func TestLookUp(t *testing.T) {
	w := newWorld(t)
	id, pub := registrytest.ID(t, "planner"), key("planner").Public
	a, ok := w.Agent(id)
	if !ok || a.ID != id || a.Role != registry.RoleAgent || a.Level != registry.LevelLow || a.Version != 1 || !a.Possession {
		t.Fatalf("agent %+v, %v", a, ok)
	}
	if a.Lineage != pub.ID() || a.Node != key("node-1").ID() || !a.Current().Public.Equal(pub) || a.Current().Epoch != 1 {
		t.Errorf("agent %+v", a)
	}
	for _, text := range []string{"agent:planner", "agent:a:b", ident.DerivedAlias(pub).String()} {
		if b, ok := w.ByAlias(text); !ok || b.ID != id {
			t.Errorf("alias %s: %v, %v", text, b.ID, ok)
		}
	}
	b, epoch, ok := w.ByKey(pub.ID())
	if !ok || b.ID != id || epoch.Epoch != 1 || !epoch.Public.Equal(pub) || !epoch.Until.IsZero() {
		t.Errorf("by key: %v, %+v, %v", b.ID, epoch, ok)
	}
	if _, ok := w.Agent(registrytest.ID(t, "nobody")); ok {
		t.Error("nobody is known by id")
	}
	if _, _, ok := w.ByKey(key("nobody").ID()); ok {
		t.Error("nobody is known by key")
	}
	for _, text := range []string{"", "planner", "agent:nobody", "agent:"} {
		if _, ok := w.ByAlias(text); ok {
			t.Errorf("the alias %q is known", text)
		}
	}
	var names []string
	for a := range w.Agents() {
		names = append(names, a.ID.String())
	}
	if want := []string{"admin", "node-1", "op-a", "op-b", "planner"}; !slices.Equal(names, want) {
		t.Errorf("agents %q", names)
	}
	for range w.Agents() {
		break
	}
}

func TestStatus(t *testing.T) {
	a := registry.Agent{ExpiresAt: later}
	for _, tc := range []struct {
		now  time.Time
		want registry.Status
	}{{later.Add(-time.Nanosecond), registry.Active}, {later, registry.Expired}, {later.Add(1), registry.Expired}} {
		if got := a.Status(tc.now); got != tc.want {
			t.Errorf("at %v: %s, want %s", tc.now, got, tc.want)
		}
	}
	a.Removed = &registry.Removal{}
	if got := a.Status(start); got != registry.Gone {
		t.Errorf("removed: %s", got)
	}
	a.Revocation = &registry.Revocation{}
	if got := a.Status(start); got != registry.Revoked {
		t.Errorf("revoked: %s", got)
	}
}

// TestAuthority has, for each kind of change, who may make it and who may not.
func TestAuthority(t *testing.T) {
	level := func(l registry.Level) func(*registry.Register) {
		return func(b *registry.Register) { b.Level = l }
	}
	operator := func(b *registry.Register) {
		b.Role, b.Level, b.Node = registry.RoleOperator, registry.LevelAdmin, ident.KeyID{}
	}
	node := func(b *registry.Register) { b.Role, b.Node = registry.RoleNode, ident.KeyID{} }
	noNode := func(b *registry.Import) { b.Node = ident.KeyID{} }
	ok := fault.Code("")
	for _, tc := range []struct {
		name string
		rec  func(*world) registry.Record
		code fault.Code
	}{
		{"register LOW: node and possession", func(w *world) registry.Record {
			return w.sign(w.register("x", nil), "node-1", "!x")
		}, ok},
		{"register LOW: no possession", func(w *world) registry.Record {
			return w.sign(w.register("x", nil), "node-1", "op-a", "op-b")
		}, fault.NotAuthorised},
		{"register LOW: no node", func(w *world) registry.Record {
			return w.sign(w.register("x", nil), "!x", "op-a", "op-b")
		}, fault.NotAuthorised},
		{"register LOW: nobody", func(w *world) registry.Record { return w.register("x", nil) }, fault.NotAuthorised},
		{"register LOW: an agent as node", func(w *world) registry.Record {
			return w.sign(w.register("x", func(b *registry.Register) { b.Node = key("planner").ID() }), "planner", "!x")
		}, fault.NotAuthorised},
		{"register LOW: an operator as node", func(w *world) registry.Record {
			return w.sign(w.register("x", func(b *registry.Register) { b.Node = key("op-a").ID() }), "op-a", "!x")
		}, fault.NotAuthorised},
		{"register LOW: a stranger signs too", func(w *world) registry.Record {
			return w.sign(w.register("x", nil), "node-1", "!x", "stranger")
		}, fault.NotAuthorised},
		{"register NONE: node and possession", func(w *world) registry.Record {
			return w.sign(w.register("x", level(registry.LevelNone)), "node-1", "!x")
		}, ok},
		{"register MEDIUM: no operator", func(w *world) registry.Record {
			return w.sign(w.register("x", level(registry.LevelMedium)), "node-1", "!x")
		}, fault.NotAuthorised},
		{"register MEDIUM: an agent of level ADMIN is no operator", func(w *world) registry.Record {
			return w.sign(w.register("x", level(registry.LevelMedium)), "node-1", "!x", "admin")
		}, fault.NotAuthorised},
		{"register HIGH: one operator", func(w *world) registry.Record {
			return w.sign(w.register("x", level(registry.LevelHigh)), "node-1", "!x", "op-a")
		}, ok},
		{"register ADMIN: one operator", func(w *world) registry.Record {
			return w.sign(w.register("x", level(registry.LevelAdmin)), "node-1", "!x", "op-a")
		}, fault.NotAuthorised},
		{"register ADMIN: two operators", func(w *world) registry.Record {
			return w.sign(w.register("x", level(registry.LevelAdmin)), "node-1", "!x", "op-a", "op-b")
		}, ok},
		{"register an operator: one operator", func(w *world) registry.Record {
			return w.sign(w.register("x", operator), "!x", "op-a")
		}, fault.NotAuthorised},
		{"register an operator: two operators", func(w *world) registry.Record {
			return w.sign(w.register("x", operator), "!x", "op-a", "op-b")
		}, ok},
		{"register a node: one operator", func(w *world) registry.Record {
			return w.sign(w.register("x", node), "!x", "op-a")
		}, fault.NotAuthorised},
		{"register a node: two operators", func(w *world) registry.Record {
			return w.sign(w.register("x", node), "!x", "op-a", "op-b")
		}, ok},

		{"import: node and possession", func(w *world) registry.Record {
			return w.sign(w.imported("x", nil), "node-1", "!x")
		}, ok},
		{"import: node alone", func(w *world) registry.Record {
			return w.sign(w.imported("x", nil), "node-1")
		}, fault.NotAuthorised},
		{"import: possession alone", func(w *world) registry.Record {
			return w.sign(w.imported("x", noNode), "!x")
		}, fault.NotAuthorised},
		{"import: operator and node", func(w *world) registry.Record {
			return w.sign(w.imported("x", nil), "node-1", "op-a")
		}, ok},
		{"import: operator alone", func(w *world) registry.Record {
			return w.sign(w.imported("x", noNode), "op-a")
		}, ok},
		{"import: the node that is named has not signed", func(w *world) registry.Record {
			return w.sign(w.imported("x", nil), "op-a")
		}, fault.NotAuthorised},
		{"import ADMIN: one operator", func(w *world) registry.Record {
			return w.sign(w.imported("x", func(b *registry.Import) { b.Level = registry.LevelAdmin }), "node-1", "op-a")
		}, fault.NotAuthorised},
		{"import HIGH: possession and node", func(w *world) registry.Record {
			return w.sign(w.imported("x", func(b *registry.Import) { b.Level = registry.LevelHigh }), "node-1", "!x")
		}, fault.NotAuthorised},

		{"revoke: own key", func(w *world) registry.Record {
			return w.sign(w.revoke("planner", registry.KeyCompromise), "planner")
		}, ok},
		{"revoke: node", func(w *world) registry.Record {
			return w.sign(w.revoke("planner", registry.KeyCompromise), "node-1")
		}, ok},
		{"revoke: operator", func(w *world) registry.Record {
			return w.sign(w.revoke("planner", registry.KeyCompromise), "op-b")
		}, ok},
		{"revoke: another agent", func(w *world) registry.Record {
			return w.sign(w.revoke("planner", registry.KeyCompromise), "admin")
		}, fault.NotAuthorised},
		{"revoke: nobody", func(w *world) registry.Record {
			return w.revoke("planner", registry.KeyCompromise)
		}, fault.NotAuthorised},
		{"revoke ADMIN: node", func(w *world) registry.Record {
			return w.sign(w.revoke("admin", registry.KeyCompromise), "node-1")
		}, fault.NotAuthorised},
		{"revoke ADMIN: one operator", func(w *world) registry.Record {
			return w.sign(w.revoke("admin", registry.KeyCompromise), "op-a")
		}, fault.NotAuthorised},
		{"revoke ADMIN: two operators", func(w *world) registry.Record {
			return w.sign(w.revoke("admin", registry.KeyCompromise), "op-a", "op-b")
		}, ok},
		{"revoke ADMIN: own key", func(w *world) registry.Record {
			return w.sign(w.revoke("admin", registry.KeyCompromise), "admin")
		}, ok},
		{"revoke an operator: another one", func(w *world) registry.Record {
			return w.sign(w.revoke("op-a", registry.KeyCompromise), "op-b")
		}, fault.NotAuthorised},
		{"revoke an operator: itself", func(w *world) registry.Record {
			return w.sign(w.revoke("op-a", registry.KeyCompromise), "op-a")
		}, ok},
		{"revoke an operator: root of the host", func(w *world) registry.Record {
			return w.sign(w.revoke("op-a", registry.KeyCompromise), "node-1")
		}, fault.NotAuthorised},
		{"revoke a node: one operator", func(w *world) registry.Record {
			return w.sign(w.revoke("node-1", registry.KeyCompromise), "op-a")
		}, ok},
		{"revoke a node: itself", func(w *world) registry.Record {
			return w.sign(w.revoke("node-1", registry.KeyCompromise), "node-1")
		}, ok},

		{"remove: node", func(w *world) registry.Record { return w.sign(w.remove("planner"), "node-1") }, ok},
		{"remove: operator", func(w *world) registry.Record { return w.sign(w.remove("planner"), "op-a") }, ok},
		{"remove: own key", func(w *world) registry.Record {
			return w.sign(w.remove("planner"), "planner")
		}, fault.NotAuthorised},
		{"remove a node: one operator", func(w *world) registry.Record {
			return w.sign(w.remove("node-1"), "op-a")
		}, fault.NotAuthorised},
		{"remove a node: two operators", func(w *world) registry.Record {
			return w.sign(w.remove("node-1"), "op-a", "op-b")
		}, ok},
		{"remove an operator: too few would be left", func(w *world) registry.Record {
			return w.sign(w.remove("op-a"), "op-a", "op-b")
		}, fault.Denied},

		{"alias: node", func(w *world) registry.Record {
			return w.sign(w.alias("planner", "agent:n", 1), "node-1")
		}, ok},
		{"alias: operator", func(w *world) registry.Record {
			return w.sign(w.alias("planner", "agent:n", 1), "op-a")
		}, ok},
		{"alias: own key", func(w *world) registry.Record {
			return w.sign(w.alias("planner", "agent:n", 1), "planner")
		}, fault.NotAuthorised},
		{"alias ADMIN: node", func(w *world) registry.Record {
			return w.sign(w.alias("admin", "agent:n", 1), "node-1")
		}, fault.NotAuthorised},

		{"update: node", func(w *world) registry.Record {
			return w.sign(w.update("planner", 1, later.Add(1e9)), "node-1")
		}, ok},
		{"update: own key", func(w *world) registry.Record {
			return w.sign(w.update("planner", 1, later.Add(1e9)), "planner")
		}, fault.NotAuthorised},
		{"update ADMIN: node", func(w *world) registry.Record {
			return w.sign(w.update("admin", 1, time.Time{}), "node-1")
		}, fault.NotAuthorised},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			rec := tc.rec(w)
			before, hash := w.State, w.State.StateHash()
			size, _ := before.Head()
			next, out := before.Apply(rec)
			if got := codeOf(out); got != tc.code || out.Accepted != (tc.code == "") || out.Index != size {
				t.Fatalf("outcome %+v, want %q", out, tc.code)
			}
			if before.StateHash() != hash {
				t.Fatal("Apply changed the state before it")
			}
			after, _ := next.Head()
			if after != size+1 {
				t.Errorf("the record is not a leaf: size %d", after)
			}
			if !out.Accepted {
				if next.Refused() != before.Refused()+1 || !sameAgents(before, next) {
					t.Error("a refused record is not counted, or changed an agent")
				}
				return
			}
			// The same record again is refused, with a code that says why.
			third, out := next.Apply(rec)
			if out.Accepted || out.Err.Code == fault.Internal || !sameAgents(next, third) {
				t.Errorf("the replay of an accepted record: %+v", out)
			}
		})
	}
}

func codeOf(out registry.Outcome) fault.Code {
	if out.Err == nil {
		return ""
	}
	return out.Err.Code
}

func sameAgents(a, b *registry.State) bool {
	return reflect.DeepEqual(slices.Collect(a.Agents()), slices.Collect(b.Agents())) &&
		reflect.DeepEqual(a.Operators(), b.Operators()) && reflect.DeepEqual(a.Nodes(), b.Nodes()) && a.Threshold() == b.Threshold()
}

// TestConflicts has, for each thing that can be taken or gone, the record that meets it.
func TestConflicts(t *testing.T) {
	reg := func(name string, change func(*registry.Register)) func(*world) registry.Record {
		return func(w *world) registry.Record { return w.sign(w.register(name, change), "node-1") }
	}
	withKey := func(k string) func(*registry.Register) {
		return func(b *registry.Register) { b.PublicKey = key(k).Public }
	}
	gone := func(then func(*world) registry.Record) func(*world) registry.Record {
		return func(w *world) registry.Record { w.must(w.sign(w.remove("planner"), "node-1")); return then(w) }
	}
	revoked := func(then func(*world) registry.Record) func(*world) registry.Record {
		return func(w *world) registry.Record {
			w.must(w.sign(w.revoke("planner", registry.Superseded), "node-1"))
			return then(w)
		}
	}
	prove := func(id, k string, make func(*world) registry.Record) func(*world) registry.Record {
		return func(w *world) registry.Record {
			rec := make(w)
			key(k).Prove(&rec, w.ClusterID(), registrytest.ID(t, id))
			return rec
		}
	}
	for _, tc := range []struct {
		name  string
		rec   func(*world) registry.Record
		code  fault.Code
		field string
	}{
		{"the id is taken", prove("planner", "x", reg("planner", withKey("x"))), fault.AlreadyExists, "agent_id"},
		{"the id was taken by one that is removed", gone(prove("planner", "x", reg("planner", withKey("x")))), fault.AlreadyExists, "agent_id"},
		{"the removed agent comes back", gone(prove("planner", "planner", reg("planner", nil))), fault.AlreadyExists, "agent_id"},
		{"the id was taken by one that is revoked", revoked(prove("planner", "x", reg("planner", withKey("x")))), fault.AlreadyExists, "agent_id"},
		{"the key is an agent's", prove("x", "planner", reg("x", withKey("planner"))), fault.KeyReused, "public_key"},
		{"the key is that of a removed agent", gone(prove("x", "planner", reg("x", withKey("planner")))), fault.KeyReused, "public_key"},
		{"the key is an operator's", prove("x", "op-a", reg("x", withKey("op-a"))), fault.KeyReused, "public_key"},
		{"the alias is taken", prove("x", "x", reg("x", func(b *registry.Register) {
			b.Aliases = []ident.Alias{alias(t, "agent:planner")}
		})), fault.AlreadyExists, "aliases"},
		{"the alias was a removed agent's", gone(prove("x", "x", reg("x", func(b *registry.Register) {
			b.Aliases = []ident.Alias{alias(t, "agent:planner")}
		}))), fault.AlreadyExists, "aliases"},
		{"add an alias that is taken", func(w *world) registry.Record {
			w.must(w.sign(w.register("x", nil), "node-1", "!x"))
			return w.sign(w.alias("x", "agent:planner", 1), "node-1")
		}, fault.AlreadyExists, "aliases"},
		{"add an alias that the agent has", func(w *world) registry.Record {
			return w.sign(w.alias("planner", "agent:planner", 1), "node-1")
		}, fault.AlreadyExists, "aliases"},
		{"alias: stale version", func(w *world) registry.Record {
			return w.sign(w.alias("planner", "agent:n", 2), "node-1")
		}, fault.StaleVersion, "version"},
		{"alias: unknown agent", func(w *world) registry.Record {
			return w.sign(w.alias("nobody", "agent:n", 1), "op-a")
		}, fault.NotFound, "agent_id"},
		{"alias: removed agent", gone(func(w *world) registry.Record {
			return w.sign(w.alias("planner", "agent:n", 2), "op-a")
		}), fault.AgentRemoved, ""},
		{"alias: revoked agent", revoked(func(w *world) registry.Record {
			return w.sign(w.alias("planner", "agent:n", 2), "op-a")
		}), fault.AgentRevoked, ""},
		{"update: stale version", func(w *world) registry.Record {
			return w.sign(w.update("planner", 7, later.Add(1e9)), "node-1")
		}, fault.StaleVersion, "version"},
		{"update: removed agent", gone(func(w *world) registry.Record {
			return w.sign(w.update("planner", 2, later.Add(1e9)), "op-a")
		}), fault.AgentRemoved, ""},
		{"remove: again", gone(func(w *world) registry.Record {
			return w.sign(w.remove("planner"), "op-a")
		}), fault.AgentRemoved, ""},
		{"remove: unknown agent", func(w *world) registry.Record {
			return w.sign(w.remove("nobody"), "op-a")
		}, fault.NotFound, "agent_id"},
		{"revoke: unknown agent", func(w *world) registry.Record {
			return w.sign(w.revoke("nobody", registry.Superseded), "op-a")
		}, fault.NotFound, "agent_id"},
		{"revoke: for the same reason", revoked(func(w *world) registry.Record {
			return w.sign(w.revoke("planner", registry.Superseded), "op-a")
		}), fault.AgentRevoked, ""},
		{"revoke: for a lesser reason", revoked(func(w *world) registry.Record {
			return w.sign(w.revoke("planner", registry.Decommissioned), "op-a")
		}), fault.AgentRevoked, ""},
		{"revoke: for a graver reason", revoked(func(w *world) registry.Record {
			return w.sign(w.revoke("planner", registry.KeyCompromise), "op-a")
		}), "", ""},
		{"revoke: removed agent", gone(func(w *world) registry.Record {
			return w.sign(w.revoke("planner", registry.KeyCompromise), "planner")
		}), "", ""},
		{"unknown type", func(w *world) registry.Record {
			rec := w.remove("planner")
			rec.Type = "agent.promote"
			return w.sign(rec, "op-a", "op-b")
		}, fault.Unsupported, ""},
		{"a body of another type", func(w *world) registry.Record {
			rec := w.remove("planner")
			rec.Type = registry.TypeUpdate
			return w.sign(rec, "op-a", "op-b")
		}, fault.Malformed, ""},
		{"a bad signature beside enough good ones", func(w *world) registry.Record {
			rec := w.sign(w.remove("planner"), "op-a", "node-1")
			rec.AddSignature(key("op-b").ID(), make([]byte, 64))
			return rec
		}, fault.InvalidSignature, "signatures"},
		{"signed for another cluster", func(w *world) registry.Record {
			rec := w.remove("planner")
			other := registrytest.New(t, "op-a").ClusterID()
			key("op-a").Sign(&rec, other)
			return rec
		}, fault.InvalidSignature, "signatures"},
		{"possession for another body", func(w *world) registry.Record {
			rec, other := w.register("x", nil), w.register("x", func(b *registry.Register) { b.Level = registry.LevelNone })
			key("x").Prove(&other, w.ClusterID(), registrytest.ID(t, "x"))
			rec.Signatures = other.Signatures
			return w.sign(rec, "node-1")
		}, fault.InvalidSignature, "signatures"},
		{"the new key signs as others do", func(w *world) registry.Record {
			return w.sign(w.register("x", nil), "node-1", "x")
		}, fault.InvalidSignature, "signatures"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			_, out := w.Apply(tc.rec(w))
			if codeOf(out) != tc.code {
				t.Fatalf("outcome %+v, want %q", out, tc.code)
			}
			if out.Err != nil && out.Err.Field != tc.field {
				t.Errorf("field %q, want %q", out.Err.Field, tc.field)
			}
		})
	}
}

// TestAuthorityEnds: who is revoked, removed or expired has no say any more.
func TestAuthorityEnds(t *testing.T) {
	t.Run("a revoked operator", func(t *testing.T) {
		w := newWorld(t)
		w.must(w.sign(w.revoke("op-a", registry.KeyCompromise), "op-a"))
		if ops := w.Operators(); len(ops) != 1 || ops[0].ID.String() != "op-b" || w.Threshold() != 2 {
			t.Errorf("operators %v, threshold %d", ops, w.Threshold())
		}
		if _, out := w.Apply(w.sign(w.remove("planner"), "op-a")); codeOf(out) != fault.NotAuthorised {
			t.Errorf("outcome %+v", out)
		}
	})
	t.Run("a revoked node", func(t *testing.T) {
		w := newWorld(t)
		w.must(w.sign(w.revoke("node-1", registry.KeyCompromise), "op-a"))
		if len(w.Nodes()) != 0 {
			t.Errorf("nodes %v", w.Nodes())
		}
		if _, out := w.Apply(w.sign(w.register("x", nil), "node-1", "!x")); codeOf(out) != fault.NotAuthorised {
			t.Errorf("outcome %+v", out)
		}
	})
	t.Run("an expired operator", func(t *testing.T) {
		w := newWorld(t)
		rec := w.register("op-c", func(b *registry.Register) {
			b.Role, b.Level, b.Node = registry.RoleOperator, registry.LevelAdmin, ident.KeyID{}
			b.CreatedAt, b.ExpiresAt = start, later
		})
		w.must(w.sign(rec, "!op-c", "op-a", "op-b"))
		if _, out := w.Apply(w.sign(w.remove("planner"), "op-c")); codeOf(out) != fault.NotAuthorised {
			t.Errorf("outcome %+v", out)
		}
	})
	t.Run("an expired agent denounces itself", func(t *testing.T) {
		w := newWorld(t)
		rec := draft(t)(registry.NewRevoke(registry.Revoke{
			AgentID: registrytest.ID(t, "planner"), Code: registry.KeyCompromise, At: start.Add(48 * time.Hour),
		}))
		w.must(w.sign(rec, "planner"))
	})
}

// TestThreshold: one operator decides alone until there are two; then two must agree, whatever happens.
func TestThreshold(t *testing.T) {
	w := &world{registrytest.New(t, "op-a"), t}
	operator := func(b *registry.Register) {
		b.Role, b.Level, b.Node = registry.RoleOperator, registry.LevelAdmin, ident.KeyID{}
	}
	if w.Threshold() != 1 {
		t.Fatalf("threshold %d", w.Threshold())
	}
	w.must(w.sign(w.register("op-b", operator), "!op-b", "op-a"))
	if w.Threshold() != 2 {
		t.Fatalf("threshold %d", w.Threshold())
	}
	if _, out := w.Apply(w.sign(w.register("op-c", operator), "!op-c", "op-a")); codeOf(out) != fault.NotAuthorised {
		t.Errorf("outcome %+v", out)
	}
	w.must(w.sign(w.register("op-c", operator), "!op-c", "op-a", "op-b"))
	w.must(w.sign(w.remove("op-c"), "op-a", "op-b"))
	w.must(w.sign(w.revoke("op-b", registry.KeyCompromise), "op-b"))
	if w.Threshold() != 2 || len(w.Operators()) != 1 {
		t.Errorf("threshold %d with %d operators", w.Threshold(), len(w.Operators()))
	}
}

// TestExtendingNeedsWhatGrantingNeeds: a node cannot prolong what an operator granted until a certain day.
func TestExtendingNeedsWhatGrantingNeeds(t *testing.T) {
	w := newWorld(t)
	w.must(w.sign(w.register("x", func(b *registry.Register) {
		b.Level, b.ExpiresAt = registry.LevelHigh, later.Add(time.Hour)
	}), "node-1", "!x", "op-a"))
	for _, expires := range []time.Time{{}, later.Add(2 * time.Hour)} {
		if _, out := w.Apply(w.sign(w.update("x", 1, expires), "node-1")); codeOf(out) != fault.NotAuthorised {
			t.Errorf("to %v by the node: %+v", expires, out)
		}
		if _, out := w.Apply(w.sign(w.update("x", 1, expires), "op-b")); !out.Accepted {
			t.Errorf("to %v by an operator: %+v", expires, out)
		}
	}
	w.must(w.sign(w.update("x", 1, later.Add(time.Minute)), "node-1"))
	if a, _ := w.Agent(registrytest.ID(t, "x")); !a.ExpiresAt.Equal(later.Add(time.Minute)) || a.Metadata["k"] != "v" || a.Version != 2 {
		t.Errorf("agent %+v", a)
	}
}

// TestAliasLimit: an agent has at most 16 aliases beside the one of its key.
func TestAliasLimit(t *testing.T) {
	w := newWorld(t)
	a, _ := w.Agent(registrytest.ID(t, "planner"))
	for n := len(a.Aliases) - 1; n < 16; n++ {
		w.must(w.sign(w.alias("planner", fmt.Sprintf("agent:n%d", n), a.Version), "node-1"))
		a, _ = w.Agent(a.ID)
	}
	if _, out := w.Apply(w.sign(w.alias("planner", "agent:more", a.Version), "node-1")); codeOf(out) != fault.Malformed {
		t.Errorf("outcome %+v", out)
	}
}

// TestRevocationOnlyGrows: a graver reason counts, an earlier time stays.
func TestRevocationOnlyGrows(t *testing.T) {
	w := newWorld(t)
	w.must(w.sign(w.revoke("planner", registry.Superseded), "planner"))
	rec := draft(t)(registry.NewRevoke(registry.Revoke{
		AgentID: registrytest.ID(t, "planner"), Code: registry.KeyCompromise, Reason: "stolen", At: later.Add(time.Hour),
	}))
	w.must(w.sign(rec, "op-a"))
	a, _ := w.Agent(registrytest.ID(t, "planner"))
	if r := a.Revocation; r == nil || r.Code != registry.KeyCompromise || !r.At.Equal(later) || r.Reason != "stolen" ||
		r.By != key("op-a").ID() {
		t.Errorf("revocation %+v", a.Revocation)
	}
}

// TestBuildersRefuse has one case for each rule on a body.
func TestBuildersRefuse(t *testing.T) {
	id := registrytest.ID(t, "x")
	derived := ident.DerivedAlias(key("y").Public)
	reg := func(change func(*registry.Register)) func() error {
		return func() error {
			b := registry.Register{
				AgentID: id, Role: registry.RoleAgent, PublicKey: key("x").Public, Level: registry.LevelLow,
				Grade: "software", Origin: "unknown", Node: key("node-1").ID(), CreatedAt: start,
			}
			change(&b)
			_, err := registry.NewRegister(b)
			return err
		}
	}
	gen := func(change func(*registry.Genesis)) func() error {
		return func() error {
			f := registry.Founder{AgentID: id, PublicKey: key("x").Public, Grade: "software", Origin: "unknown"}
			b := registry.Genesis{
				Origin: "x", Operators: []registry.Founder{f}, Threshold: 1, Node: f, CreatedAt: start, Salt: make([]byte, 32),
			}
			change(&b)
			_, err := registry.NewGenesis(b)
			return err
		}
	}
	many := func(n int) map[string]string {
		m := map[string]string{}
		for i := range n {
			m[string(rune('a'+i%26))+string(rune('a'+i/26))] = "v"
		}
		return m
	}
	for _, tc := range []struct {
		name, field string
		build       func() error
	}{
		{"good", "", reg(func(*registry.Register) {})},
		{"no id", "agent_id", reg(func(b *registry.Register) { b.AgentID = ident.AgentID{} })},
		{"no key", "public_key", reg(func(b *registry.Register) { b.PublicKey = ident.PublicKey{} })},
		{"unknown role", "role", reg(func(b *registry.Register) { b.Role = "root" })},
		{"agent without node", "node", reg(func(b *registry.Register) { b.Node = ident.KeyID{} })},
		{"node with node", "node", reg(func(b *registry.Register) { b.Role = registry.RoleNode })},
		{"node of another level", "trust_level", reg(func(b *registry.Register) {
			b.Role, b.Node, b.Level = registry.RoleNode, ident.KeyID{}, registry.LevelHigh
		})},
		{"operator of another level", "trust_level", reg(func(b *registry.Register) { b.Role = registry.RoleOperator })},
		{"no such level", "trust_level", reg(func(b *registry.Register) { b.Level = 9 })},
		{"derived alias", "aliases", reg(func(b *registry.Register) { b.Aliases = []ident.Alias{derived} })},
		{"alias twice", "aliases", reg(func(b *registry.Register) {
			b.Aliases = []ident.Alias{alias(t, "agent:a"), alias(t, "agent:a")}
		})},
		{"too many aliases", "aliases", reg(func(b *registry.Register) { b.Aliases = make([]ident.Alias, 17) })},
		{"no grade", "grade", reg(func(b *registry.Register) { b.Grade = "" })},
		{"no origin", "origin", reg(func(b *registry.Register) { b.Origin = "On The Device" })},
		{"no time", "created_at", reg(func(b *registry.Register) { b.CreatedAt = time.Time{} })},
		{"expired already", "expires_at", reg(func(b *registry.Register) { b.ExpiresAt = start })},
		{"empty name of metadata", "metadata", reg(func(b *registry.Register) { b.Metadata = map[string]string{"": "x"} })},
		{"control character", "metadata", reg(func(b *registry.Register) { b.Metadata = map[string]string{"a": "\x1b[2J"} })},
		{"invalid UTF-8", "metadata", reg(func(b *registry.Register) { b.Metadata = map[string]string{"a": "\xff"} })},
		{"long value", "metadata", reg(func(b *registry.Register) { b.Metadata = map[string]string{"a": strings.Repeat("x", 1025)} })},
		{"long name", "metadata", reg(func(b *registry.Register) { b.Metadata = map[string]string{strings.Repeat("x", 65): ""} })},
		{"too much metadata", "metadata", reg(func(b *registry.Register) { b.Metadata = many(65) })},
		{"genesis", "", gen(func(*registry.Genesis) {})},
		{"origin of an authority", "origin", gen(func(b *registry.Genesis) { b.Origin = "a b" })},
		{"no operators", "operators", gen(func(b *registry.Genesis) { b.Operators = nil })},
		{"operator twice", "operators", gen(func(b *registry.Genesis) { b.Operators = append(b.Operators, b.Operators[0]) })},
		{"threshold of none", "admin_threshold", gen(func(b *registry.Genesis) { b.Threshold = 0 })},
		{"threshold above the operators", "admin_threshold", gen(func(b *registry.Genesis) { b.Threshold = 2 })},
		{"threshold of one of two", "admin_threshold", gen(func(b *registry.Genesis) {
			two := b.Operators[0]
			two.AgentID = registrytest.ID(t, "y")
			b.Operators = append(b.Operators, two)
		})},
		{"high default level", "policy.default_level", gen(func(b *registry.Genesis) { b.Policy.DefaultLevel = registry.LevelMedium })},
		{"short salt", "salt", gen(func(b *registry.Genesis) { b.Salt = nil })},
		{"no node", "agent_id", gen(func(b *registry.Genesis) { b.Node = registry.Founder{} })},
		{"unknown code", "code", func() error {
			_, err := registry.NewRevoke(registry.Revoke{AgentID: id, Code: "hold", At: start})
			return err
		}},
		{"long reason", "reason", func() error {
			_, err := registry.NewRemove(registry.Remove{AgentID: id, Reason: strings.Repeat("x", 513), At: start})
			return err
		}},
		{"no alias", "alias", func() error {
			_, err := registry.NewAddAlias(registry.AddAlias{AgentID: id, At: start})
			return err
		}},
		{"no time of an update", "at", func() error {
			_, err := registry.NewUpdate(registry.Update{AgentID: id, Version: 1})
			return err
		}},
		{"no agent of a removal", "agent_id", func() error {
			_, err := registry.NewRemove(registry.Remove{At: start})
			return err
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := tc.build()
			if tc.field == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if e := fault.From(err); err == nil || e.Code != fault.Malformed || e.Field != tc.field {
				t.Errorf("error %v, want one that names %s", err, tc.field)
			}
		})
	}
}

// TestBodiesAreStrict: what a signer could write in two ways has one that counts. The signatures are good.
func TestBodiesAreStrict(t *testing.T) {
	w := newWorld(t)
	good := string(w.register("x", nil).Body)
	for name, body := range map[string]string{
		"other case":        strings.Replace(good, `"agent_id"`, `"Agent_id"`, 1),
		"unknown member":    strings.Replace(good, `{`, `{"aaa":1,`, 1),
		"missing member":    strings.Replace(good, `"grade":"software",`, ``, 1),
		"null aliases":      strings.Replace(good, `"created_at"`, `"aliases":null,"created_at"`, 1),
		"empty aliases":     strings.Replace(good, `"created_at"`, `"aliases":[],"created_at"`, 1),
		"empty metadata":    strings.Replace(good, `"node"`, `"metadata":{},"node"`, 1),
		"zone":              strings.Replace(good, `04:04:05Z`, `05:04:05+01:00`, 1),
		"zero zone":         strings.Replace(good, `04:04:05Z`, `04:04:05+00:00`, 1),
		"padded fraction":   strings.Replace(good, `04:04:05Z`, `04:04:05.000Z`, 1),
		"microseconds":      strings.Replace(good, `04:04:05Z`, `04:04:05.000001Z`, 1),
		"wrong type":        strings.Replace(good, `"software"`, `7`, 1),
		"level as a number": strings.Replace(good, `"LOW"`, `1`, 1),
		"raw key": strings.Replace(good, key("x").Public.Base64(),
			base64.StdEncoding.EncodeToString(key("x").Private.Public().(ed25519.PublicKey)), 1),
	} {
		if body == good {
			t.Fatalf("%s: nothing was changed", name)
		}
		rec := registry.Record{Type: registry.TypeRegister, Body: []byte(body)}
		_, out := w.Apply(w.sign(rec, "node-1", "!x"))
		if codeOf(out) != fault.Malformed {
			t.Errorf("%s: %+v", name, out)
		}
	}
	rec := registry.Record{Type: registry.TypeRegister, Body: []byte(good)}
	if _, out := w.Apply(w.sign(rec, "node-1", "!x")); !out.Accepted {
		t.Errorf("the body as it should be: %+v", out.Err.Verbose())
	}
}

// TestStateIsImmutable changes everything that a caller can reach.
func TestStateIsImmutable(t *testing.T) {
	w := newWorld(t)
	w.must(w.sign(w.revoke("planner", registry.Superseded), "planner"))
	w.must(w.sign(w.remove("planner"), "node-1"))
	hash := w.StateHash()
	for a := range w.Agents() {
		a.Keys[0] = registry.KeyEpoch{}
		a.Aliases[0] = ident.Alias{}
		if a.Metadata != nil {
			a.Metadata["new"] = "x"
		}
		if a.Revocation != nil {
			a.Revocation.Code = ""
			a.Removed.Reason = ""
		}
	}
	w.Operators()[0].Keys[0] = registry.KeyEpoch{}
	if w.StateHash() != hash {
		t.Error("a caller changed the state")
	}
}

// TestForks: two futures of one state do not see each other.
func TestForks(t *testing.T) {
	w := newWorld(t)
	base := w.State
	a := registrytest.Apply(t, base, w.sign(w.register("x", nil), "node-1", "!x"))
	b := registrytest.Apply(t, base, w.sign(w.register("y", nil), "node-1", "!y"))
	a2 := registrytest.Apply(t, base, w.sign(w.register("x", nil), "node-1", "!x"))
	if a.StateHash() != a2.StateHash() || a.StateHash() == b.StateHash() {
		t.Error("the state depends on more than its records")
	}
	_, ra := a.Head()
	_, rb := b.Head()
	if _, r := a2.Head(); r != ra || ra == rb {
		t.Error("the root depends on more than the records")
	}
	if _, ok := a.Agent(registrytest.ID(t, "y")); ok {
		t.Error("one future sees the other's agent")
	}
}

func TestRecordTime(t *testing.T) {
	w := newWorld(t)
	for _, rec := range []registry.Record{w.register("x", nil), w.remove("planner")} {
		if !rec.At().Equal(later) {
			t.Errorf("%s: %v", rec.Type, rec.At())
		}
	}
	rec := registry.Record{Body: []byte(`{"at":7}`)}
	if !rec.At().IsZero() {
		t.Errorf("a record without a time: %v", rec.At())
	}
}

func TestLevels(t *testing.T) {
	for l := registry.LevelNone; l <= registry.LevelAdmin; l++ {
		b, err := json.Marshal(l)
		if err != nil {
			t.Fatal(err)
		}
		var again registry.Level
		if err := json.Unmarshal(b, &again); err != nil || again != l {
			t.Errorf("%s became %v, %v", b, again, err)
		}
	}
	if _, err := registry.ParseLevel("low"); err == nil {
		t.Error("a level in lower case was taken")
	}
	if s := registry.Level(9).String(); s != "unknown" {
		t.Errorf("level 9 is %q", s)
	}
}
