package registry_test

import (
	"bytes"
	"encoding/hex"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/registry"
	"github.com/trustd/trustd/registry/registrytest"
)

var freeze = flag.Bool("freeze", false, "write testdata/frozen anew; only before the format is released")

// history returns one record of each type, in an order in which all are accepted.
func history(t testing.TB) (*world, []registry.Record) {
	t.Helper()
	w := &world{registry.New(), t}
	var recs []registry.Record
	add := func(rec registry.Record) {
		t.Helper()
		w.must(rec)
		recs = append(recs, rec)
	}
	add(registrytest.Genesis(t, "op-a", "op-b"))
	add(w.sign(w.register("planner", func(b *registry.Register) {
		b.Aliases = []ident.Alias{alias(t, "agent:planner:1"), alias(t, "agent:planner")}
		b.Metadata = map[string]string{
			"team": "caf\u00e9 <&>", "\U0001F600": "emoji sorts by UTF-16", "\uFB33": "before it by code point",
		}
		b.ExpiresAt = start.AddDate(1, 0, 0)
	}), "node-1", "!planner"))
	add(w.sign(w.imported("partner", func(b *registry.Import) { b.Level = registry.LevelHigh }), "node-1", "op-a"))
	add(w.sign(w.alias("planner", "agent:boss", 1), "node-1"))
	add(w.sign(w.update("planner", 2, later.Add(time.Hour)), "op-b"))
	add(w.sign(w.revoke("partner", registry.KeyCompromise), "op-a"))
	add(w.sign(w.remove("planner"), "node-1"))
	return w, recs
}

// TestFrozen: the bytes of every type of record, and what they fold into, never change. The files are what hosts
// have on their disks.
func TestFrozen(t *testing.T) {
	w, recs := history(t)
	_, root := w.Head()
	hash := w.StateHash()
	summary := fmt.Sprintf("cluster %s\nroot %x\nstate %x\n", w.ClusterID(), root, hash)
	files := map[string][]byte{"summary.txt": []byte(summary)}
	var names []string
	for i, rec := range recs {
		b, err := rec.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, fmt.Sprintf("%d-%s.json", i, rec.Type))
		files[names[i]] = b
	}
	if *freeze {
		for name, b := range files {
			if err := os.WriteFile(filepath.Join("testdata", "frozen", name), b, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	s := registry.New()
	for _, name := range names {
		b, err := os.ReadFile(filepath.Join("testdata", "frozen", name))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(b, files[name]) {
			t.Errorf("%s: the builder writes other bytes now", name)
		}
		rec, err := registry.UnmarshalRecord(b)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		s = registrytest.Apply(t, s, rec)
	}
	want, err := os.ReadFile(filepath.Join("testdata", "frozen", "summary.txt"))
	if err != nil {
		t.Fatal(err)
	}
	_, root = s.Head()
	if got := fmt.Sprintf("cluster %s\nroot %x\nstate %x\n", s.ClusterID(), root, s.StateHash()); got != string(want) {
		t.Errorf("the records fold into\n%swant\n%s", got, want)
	}
}

// TestUnmarshalIsStrict: a record has one text.
func TestUnmarshalIsStrict(t *testing.T) {
	_, recs := history(t)
	b, err := recs[1].Marshal()
	if err != nil {
		t.Fatal(err)
	}
	good := string(b)
	sig := strings.Index(good, `"sig":"`) + len(`"sig":"`)
	for name, text := range map[string]string{
		"empty":              "",
		"not JSON":           "{",
		"space":              strings.Replace(good, ":", ": ", 1),
		"final newline":      good + "\n",
		"two":                good + good,
		"unknown member":     strings.Replace(good, `"type"`, `"tyqe":1,"type"`, 1),
		"member twice":       strings.Replace(good, `"type"`, `"type":"x","type"`, 1),
		"other order":        `{"type":"x","signatures":[],"body":{}}`,
		"body is a list":     `{"body":[],"signatures":[],"type":"x"}`,
		"no body":            `{"signatures":[],"type":"x"}`,
		"null body":          `{"body":null,"signatures":[],"type":"x"}`,
		"null signatures":    `{"body":{},"signatures":null,"type":"x"}`,
		"rounded number":     `{"body":{"a":9007199254740993},"signatures":[],"type":"x"}`,
		"type in upper case": strings.Replace(good, registry.TypeRegister, "Agent.register", 1),
		"long type":          strings.Replace(good, registry.TypeRegister, strings.Repeat("a", 33), 1),
		"escaped":            strings.Replace(good, "planner", `\u0070lanner`, 1),
		"newline in base64":  good[:sig+8] + `\n` + good[sig+8:],
		"too large":          `{"body":{"a":"` + strings.Repeat("x", registry.MaxRecord) + `"},"signatures":[],"type":"x"}`,
		"signature of nothing": `{"body":{},"signatures":[{"key":"` + key("x").ID().String() +
			`","sig":""}],"type":"x"}`,
		"one key twice": `{"body":{},"signatures":[` + strings.Repeat(`{"key":"`+key("x").ID().String()+`","sig":"AAAA"},`, 2)[:2*89+1] +
			`],"type":"x"}`,
	} {
		if _, err := registry.UnmarshalRecord([]byte(text)); err == nil {
			t.Errorf("%s: taken", name)
		} else if c := fault.CodeOf(err); c != fault.Malformed && c != fault.TooLarge {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := registry.UnmarshalRecord(b); err != nil {
		t.Error(err)
	}
	if _, err := registry.UnmarshalRecord([]byte(`{"body":{},"signatures":[],"type":"x"}`)); err != nil {
		t.Errorf("a draft: %v", err)
	}
}

func TestAddSignature(t *testing.T) {
	var rec registry.Record
	for _, n := range []string{"a", "b", "c", "d", "a"} {
		rec.AddSignature(key(n).ID(), []byte(n))
	}
	before := rec
	rec.AddSignature(key("a").ID(), []byte("z"))
	if len(rec.Signatures) != 4 {
		t.Fatalf("%d signatures", len(rec.Signatures))
	}
	for i := range rec.Signatures {
		if i > 0 && bytes.Compare(rec.Signatures[i-1].Key[:], rec.Signatures[i].Key[:]) >= 0 {
			t.Error("the signatures are not in order")
		}
		if string(before.Signatures[i].Sig) == "z" {
			t.Error("a copy of the record changed")
		}
	}
}

// arbitrary draws records from the plausible to the absurd.
func arbitrary(w *world) *rapid.Generator[registry.Record] {
	names := []string{"op-a", "op-b", "node-1", "planner", "admin", "x", "y"}
	return rapid.Custom(func(t *rapid.T) registry.Record {
		name := rapid.SampledFrom(names).Draw(t, "name")
		version := rapid.Uint64Range(1, 3).Draw(t, "version")
		var rec registry.Record
		switch rapid.IntRange(0, 8).Draw(t, "kind") {
		case 0:
			rec = w.register(name, func(b *registry.Register) {
				b.Level = registry.Level(rapid.IntRange(0, 4).Draw(t, "level"))
				b.PublicKey = key(rapid.SampledFrom(names).Draw(t, "key")).Public
			})
		case 1:
			rec = w.imported(name, nil)
		case 2:
			rec = w.alias(name, "agent:"+rapid.StringMatching("[ab]{1,2}").Draw(t, "alias"), version)
		case 3:
			codes := []registry.RevocationCode{registry.Superseded, registry.KeyCompromise}
			rec = w.revoke(name, rapid.SampledFrom(codes).Draw(t, "code"))
		case 4:
			rec = w.remove(name)
		case 5:
			rec = w.update(name, version, later.Add(time.Duration(rapid.IntRange(1, 3).Draw(t, "expiry"))*time.Second))
		case 6:
			rec = registrytest.Genesis(w.t, name)
		case 7:
			rec.Type = rapid.SampledFrom([]string{registry.TypeRegister, registry.TypeGenesis, "x", ""}).Draw(t, "type")
			rec.Body = rapid.SliceOf(rapid.Byte()).Draw(t, "body")
		case 8:
			rec = w.register(name, nil)
			at := rapid.IntRange(0, len(rec.Body)-1).Draw(t, "at")
			rec.Body = bytes.Clone(rec.Body)
			rec.Body[at] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
		}
		for range rapid.IntRange(0, 4).Draw(t, "signatures") {
			n := rapid.SampledFrom(names).Draw(t, "signer")
			switch rapid.IntRange(0, 5).Draw(t, "how") {
			case 0:
				rec.Signatures = append(rec.Signatures, registry.Sig{Key: key(n).ID(), Sig: []byte("x")})
			case 1, 2:
				key(n).Prove(&rec, w.ClusterID(), registrytest.ID(w.t, name))
			default:
				key(n).Sign(&rec, w.ClusterID())
			}
		}
		return rec
	})
}

// TestReplayIsDeterministic: whatever the records, Apply does not panic, every record is a leaf, refusals change
// nothing, operators never fall below what the threshold demanded, and a second fold of the same records, through
// their bytes where they have any, ends in the same state.
func TestReplayIsDeterministic(t *testing.T) {
	base := newWorld(t)
	gen := arbitrary(base)
	rapid.Check(t, func(t *rapid.T) {
		recs := rapid.SliceOfN(gen, 1, 8).Draw(t, "records")
		s := base.State
		for _, rec := range recs {
			size, _ := s.Head()
			next, out := s.Apply(rec)
			if got, _ := next.Head(); got != size+1 || out.Index != size {
				t.Fatalf("size %d became %d", size, got)
			}
			if out.Accepted != (out.Err == nil) || !out.Accepted && !out.Err.Code.Known() {
				t.Fatalf("outcome %+v", out)
			}
			if !out.Accepted && !sameAgents(s, next) {
				t.Fatalf("a refused %s changed the registry", rec.Type)
			}
			if next.Threshold() < s.Threshold() || next.Len() < s.Len() {
				t.Fatalf("an accepted %s lowered the threshold or lost an agent", rec.Type)
			}
			checkIndexes(t, next)
			s = next
		}
		again := base.State
		for _, rec := range recs {
			if b, err := rec.Marshal(); err == nil {
				if rec, err = registry.UnmarshalRecord(b); err != nil {
					t.Fatalf("a record cannot be read back: %v", err)
				}
			}
			again, _ = again.Apply(rec)
		}
		if again.StateHash() != s.StateHash() {
			t.Fatal("the same records gave another state")
		}
	})
}

// checkIndexes walks all agents: keys and aliases lead back to them, and to nobody else.
func checkIndexes(t *rapid.T, s *registry.State) {
	keys := map[ident.KeyID]bool{}
	operators := 0
	for a := range s.Agents() {
		for _, e := range a.Keys {
			if b, epoch, ok := s.ByKey(e.Public.ID()); !ok || b.ID != a.ID || epoch.Epoch != e.Epoch || keys[e.Public.ID()] {
				t.Fatalf("a key of %s leads to %s", a.ID, b.ID)
			}
			keys[e.Public.ID()] = true
		}
		for _, text := range a.Aliases {
			if b, ok := s.ByAlias(text.String()); !ok || b.ID != a.ID {
				t.Fatalf("an alias of %s leads to %s", a.ID, b.ID)
			}
		}
		if a.Role == registry.RoleOperator && a.Revocation == nil && a.Removed == nil {
			operators++
		}
	}
	if operators != len(s.Operators()) {
		t.Fatalf("%d operators, and %d in the list", operators, len(s.Operators()))
	}
}

// TestMemory: an agent costs a few kilobytes, so that a thousand cost a few megabytes.
func TestMemory(t *testing.T) {
	const agents, limit = 200, 6 << 10 // bytes each
	w := &world{registrytest.New(t, "op-a"), t}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for i := range agents {
		w.must(registrytest.Register(t, w.ClusterID(), fmt.Sprintf("agent-%d", i), func(b *registry.Register) {
			b.Metadata = map[string]string{"role": "test", "department": "research", "created_by": "somebody"}
		}))
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if each := (int64(after.HeapAlloc) - int64(before.HeapAlloc)) / agents; each > limit {
		t.Errorf("an agent takes %d bytes", each)
	}
	runtime.KeepAlive(w.State)
}

func FuzzUnmarshalRecord(f *testing.F) {
	w, recs := history(f)
	for _, rec := range recs {
		b, err := rec.Marshal()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(`{"body":{},"signatures":[],"type":"x"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		rec, err := registry.UnmarshalRecord(b)
		if err != nil {
			return
		}
		again, err := rec.Marshal()
		if err != nil || !bytes.Equal(again, b) {
			t.Fatalf("%s became %s, %v", b, again, err)
		}
		for _, s := range []*registry.State{registry.New(), w.State} {
			if _, out := s.Apply(rec); out.Accepted != (out.Err == nil) {
				t.Fatalf("outcome %+v", out)
			}
		}
	})
}

// FuzzApply has arbitrary bodies, signed by all whose word counts, judged.
func FuzzApply(f *testing.F) {
	w, recs := history(f)
	for _, rec := range recs {
		f.Add(rec.Type, rec.Body)
	}
	f.Fuzz(func(t *testing.T, typ string, body []byte) {
		rec := registry.Record{Type: typ, Body: body}
		for _, n := range []string{"op-a", "op-b", "node-1"} {
			key(n).Sign(&rec, w.ClusterID())
		}
		_, out := w.Apply(rec)
		if out.Accepted != (out.Err == nil) || !out.Accepted && out.Err.Code == fault.Internal {
			t.Fatalf("outcome %+v of %s", out, hex.EncodeToString(body))
		}
	})
}

func BenchmarkApplyRegister(b *testing.B) {
	s := registrytest.New(b, "op-a")
	rec := registrytest.Register(b, s.ClusterID(), "x", nil)
	for b.Loop() {
		if _, out := s.Apply(rec); !out.Accepted {
			b.Fatal(out.Err)
		}
	}
}

func BenchmarkByAlias(b *testing.B) {
	s := registrytest.New(b, "op-a")
	s = registrytest.Apply(b, s, registrytest.Register(b, s.ClusterID(), "x", nil))
	name := ident.DerivedAlias(key("x").Public).String()
	for b.Loop() {
		if _, ok := s.ByAlias(name); !ok {
			b.Fatal("unknown")
		}
	}
}
