package service_test

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/caller"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/clock"
	"github.com/trustd/trustd/internal/keyring"
	"github.com/trustd/trustd/internal/service"
	"github.com/trustd/trustd/registry"
	"github.com/trustd/trustd/registry/journal"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/history"
	"github.com/trustd/trustd/signer/soft"
	"github.com/trustd/trustd/spend"
	"github.com/trustd/trustd/verify"
	"github.com/trustd/trustd/view"
)

// A host is a service over real stores in one folder, which can be opened again after a crash.
type host struct {
	t       testing.TB
	dir     string
	svc     *service.Service
	backend *crashing
	submit  *crashingRegistry
	keyring *keyring.Keyring
	close   func()

	hardware bool // the backend gives no key out and takes none in
	minGrade signer.Grade
	name     string            // of the backend; "" is laptop
	more     []service.Backend // beside it
}

// A crashing backend panics where a test tells it to, as a process that dies does: nothing after that line runs.
type crashing struct {
	*soft.Backend
	afterGenerate bool
	beforeDestroy bool
}

type crash struct{}

func (c *crashing) Generate(ctx context.Context, id signer.ID, alg ident.Algorithm) (signer.Key, error) {
	k, err := c.Backend.Generate(ctx, id, alg)
	if c.afterGenerate {
		panic(crash{})
	}
	return k, err
}

func (c *crashing) Destroy(ctx context.Context, id signer.ID) error {
	if c.beforeDestroy {
		panic(crash{})
	}
	return c.Backend.Destroy(ctx, id)
}

type crashingRegistry struct {
	service.Registry
	before, after bool
	fail          error
}

func (c *crashingRegistry) Submit(ctx context.Context, r registry.Record) (registry.Outcome, error) {
	if c.before {
		panic(crash{})
	}
	if c.fail != nil {
		return registry.Outcome{}, c.fail
	}
	out, err := c.Registry.Submit(ctx, r)
	if c.after {
		panic(crash{})
	}
	return out, err
}

// newHost returns a host with a genesis record, whose operator is this process's user.
func newHost(t testing.TB) *host {
	t.Helper()
	h := &host{t: t, dir: t.TempDir()}
	h.open()
	t.Cleanup(func() { h.close() })
	uid := uint32(os.Getuid())
	err := h.svc.Found(h.ctx(), service.Founding{
		Origin: "test.example", Operator: id(t, "operator"), Node: id(t, "node.test"),
		Bindings: []api.Binding{{Selector: api.Selector{UID: &uid}, Verbs: []string{api.VerbOperate}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func (h *host) open() {
	h.t.Helper()
	must := func(err error) {
		h.t.Helper()
		if err != nil {
			h.t.Fatal(err)
		}
	}
	b, err := soft.Open(soft.Config{Dir: filepath.Join(h.dir, "soft")})
	must(err)
	j, err := journal.Open(filepath.Join(h.dir, "registry.log"), clock.System().Now)
	must(err)
	views := new(view.Holder)
	publish := func(s *registry.State) { views.Store(&view.View{Registry: s}) }
	publish(j.State())
	j.OnChange(publish)
	h.keyring, err = keyring.Open(filepath.Join(h.dir, "keyring"))
	must(err)
	hist, err := history.Open(filepath.Join(h.dir, "history"), history.Config{})
	must(err)
	sp, err := spend.Open(filepath.Join(h.dir, "spend"), spend.Config{Clock: clock.System()})
	must(err)
	h.backend, h.submit = &crashing{Backend: b}, &crashingRegistry{Registry: j}
	var device signer.Backend = h.backend
	if h.hardware {
		device = struct{ signer.Backend }{h.backend}
	}
	h.svc = service.New(service.Config{
		Version: "test", Registry: h.submit, Views: views, Keyring: h.keyring, History: hist, Spend: sp, Clock: clock.System(),
		Policy: verify.DefaultPolicy(), Log: slog.New(slog.DiscardHandler), MaxNonces: spend.DefaultMax,
		Canaries: filepath.Join(h.dir, "canaries"), MinGrade: h.minGrade,
		Backends: append([]service.Backend{{Backend: device, Name: cmp.Or(h.name, "laptop"), Kind: "soft", Default: true}}, h.more...),
	})
	h.close = func() {
		if err := errors.Join(sp.Close(), hist.Close(), j.Close(), b.Close()); err != nil {
			h.t.Error(err)
		}
	}
}

// crashAndReopen runs fn, which must crash, and opens everything again as the next start would.
func (h *host) crashAndReopen(fn func()) {
	h.t.Helper()
	func() {
		defer func() {
			if _, ok := recover().(crash); !ok {
				h.t.Error("nothing crashed")
			}
		}()
		fn()
	}()
	h.close()
	h.open()
	if err := h.svc.SettleOnce(h.ctx()); err != nil {
		h.t.Fatal(err)
	}
}

// ctx returns the context of a call by this very process.
func (h *host) ctx() context.Context {
	c, err := caller.Self()
	if err != nil {
		h.t.Fatal(err)
	}
	return caller.NewContext(h.t.Context(), c)
}

// keys returns how many keys the device holds.
func (h *host) keys() int {
	ks, err := h.backend.Keys(h.t.Context())
	if err != nil {
		h.t.Fatal(err)
	}
	return len(ks)
}

func id(t testing.TB, s string) ident.AgentID {
	t.Helper()
	v, err := ident.ParseAgentID(s)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func mine() []api.Binding {
	uid := uint32(os.Getuid())
	return []api.Binding{{Selector: api.Selector{UID: &uid}}}
}

func (h *host) add(name string) api.AgentDetail {
	h.t.Helper()
	d, err := h.svc.AddAgent(h.ctx(), api.AddAgentRequest{AgentID: name, Bindings: mine()})
	if err != nil {
		h.t.Fatal(err)
	}
	return d
}

func draft(to string, more ...string) json.RawMessage {
	return json.RawMessage(fmt.Sprintf(`{"task_id":"t","to_agent":%q,"intent":"i","permissions":{"allowed_actions":["read"]}%s}`,
		to, strings.Join(more, "")))
}

func code(t testing.TB, err error, want fault.Code) {
	t.Helper()
	if fault.CodeOf(err) != want {
		t.Errorf("error %v, want %s", err, want)
	}
}

// TestNoOrphans is T-KEY-3: wherever a registration is cut off, no key is left that nobody owns, and no agent
// without its key.
func TestNoOrphans(t *testing.T) {
	for _, c := range []struct {
		name  string
		set   func(*host)
		alive bool
	}{
		{"after the key, before its entry", func(h *host) { h.backend.afterGenerate = true }, false},
		{"after the entry, before the record", func(h *host) { h.submit.before = true }, false},
		{"after the record", func(h *host) { h.submit.after = true }, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			before := h.keys()
			c.set(h)
			h.crashAndReopen(func() { h.add("a") })
			_, err := h.svc.Identity(h.ctx(), "a")
			if c.alive {
				if err != nil || h.keys() != before+1 {
					t.Fatalf("the agent that was registered is gone: %v, %d keys", err, h.keys())
				}
				if _, err := h.svc.SignPacket(h.ctx(), api.SignPacketRequest{Agent: "a", Packet: draft("agent:x")}); err != nil {
					t.Errorf("it cannot sign: %v", err)
				}
				return
			}
			code(t, err, fault.NotFound)
			if h.keys() != before {
				t.Errorf("%d keys, want %d: an orphan is left", h.keys(), before)
			}
			if _, held := h.keyring.Get(id(t, "a")); held {
				t.Error("an entry is left")
			}
			h.add("a") // the name is free again
		})
	}
}

// TestFailedRegistration: an error instead of a crash is undone at once.
func TestFailedRegistration(t *testing.T) {
	h := newHost(t)
	before := h.keys()
	h.submit.fail = fault.New(fault.Unavailable, "")
	_, err := h.svc.AddAgent(h.ctx(), api.AddAgentRequest{AgentID: "a"})
	code(t, err, fault.Unavailable)
	if h.keys() != before {
		t.Errorf("%d keys, want %d", h.keys(), before)
	}
}

// TestRemovalIsFinished: a crash between the record and the end of the key is made up for at the next start.
func TestRemovalIsFinished(t *testing.T) {
	for name, set := range map[string]func(*host){
		"after the record":            func(h *host) { h.submit.after = true },
		"before the key is destroyed": func(h *host) { h.backend.beforeDestroy = true },
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			before := h.keys()
			h.add("a")
			set(h)
			h.crashAndReopen(func() { _, _ = h.svc.RemoveAgent(h.ctx(), "a", api.RemoveAgentRequest{}) })
			if h.keys() != before {
				t.Errorf("%d keys, want %d", h.keys(), before)
			}
		})
	}
	t.Run("before the record", func(t *testing.T) {
		h := newHost(t)
		h.add("a")
		n := h.keys()
		h.submit.before = true
		h.crashAndReopen(func() { _, _ = h.svc.RemoveAgent(h.ctx(), "a", api.RemoveAgentRequest{}) })
		if h.keys() != n {
			t.Error("the key of an agent that is still registered is gone")
		}
		if _, err := h.svc.SignPacket(h.ctx(), api.SignPacketRequest{Agent: "a", Packet: draft("agent:x")}); err != nil {
			t.Errorf("it cannot sign: %v", err)
		}
	})
}

func TestAddAgentRefusals(t *testing.T) {
	h := newHost(t)
	h.add("taken")
	uid := uint32(os.Getuid())
	past := time.Now().Add(-time.Hour)
	before := h.keys()
	for _, c := range []struct {
		name string
		r    api.AddAgentRequest
		want fault.Code
	}{
		{"twice", api.AddAgentRequest{AgentID: "taken"}, fault.AlreadyExists},
		{"namespace", api.AddAgentRequest{AgentID: "partner:x"}, fault.Malformed},
		{"empty", api.AddAgentRequest{}, fault.Malformed},
		{"long", api.AddAgentRequest{AgentID: strings.Repeat("a", 129)}, fault.Malformed},
		{"confusable", api.AddAgentRequest{AgentID: "plаnner"}, fault.Malformed},
		{"derived alias by request", api.AddAgentRequest{AgentID: "x", Aliases: []string{"agent:fy2e0LcbjlpsXPMO"}}, fault.Malformed},
		{"foreign alias", api.AddAgentRequest{AgentID: "x", Aliases: []string{"issuer:x"}}, fault.Malformed},
		{"path alone", api.AddAgentRequest{AgentID: "x", Bindings: []api.Binding{{Selector: api.Selector{Exe: "/bin/sh"}}}}, fault.Malformed},
		{"nothing selected", api.AddAgentRequest{AgentID: "x", Bindings: []api.Binding{{}}}, fault.Malformed},
		{"unknown verb", api.AddAgentRequest{AgentID: "x", Bindings: []api.Binding{{Selector: api.Selector{UID: &uid}, Verbs: []string{"all"}}}}, fault.Malformed},
		{"operate as an agent", api.AddAgentRequest{AgentID: "x", Bindings: []api.Binding{{Selector: api.Selector{UID: &uid}, Verbs: []string{api.VerbOperate}}}}, fault.Malformed},
		{"level of nothing", api.AddAgentRequest{AgentID: "x", Level: "GOD"}, fault.Malformed},
		{"role of nothing", api.AddAgentRequest{AgentID: "x", Role: "node"}, fault.Malformed},
		{"no such backend", api.AddAgentRequest{AgentID: "x", Backend: "nope"}, fault.NotFound},
		{"no such algorithm", api.AddAgentRequest{AgentID: "x", Algorithm: "dsa"}, fault.Malformed},
		{"expired at birth", api.AddAgentRequest{AgentID: "x", ExpiresAt: &past}, fault.Malformed},
		{"key of another kind", api.AddAgentRequest{AgentID: "x", KeyURI: "tpm:id=00"}, fault.Malformed},
		{"key that is not there", api.AddAgentRequest{AgentID: "x", KeyURI: "soft:id=00"}, fault.KeyNotFound},
	} {
		_, err := h.svc.AddAgent(h.ctx(), c.r)
		if fault.CodeOf(err) != c.want {
			t.Errorf("%s: %v, want %s", c.name, err, c.want)
		}
	}
	if h.keys() != before {
		t.Errorf("%d keys, want %d: a refusal left a key behind", h.keys(), before)
	}
}

// TestLevels: this node alone registers up to LOW; more needs a caller who may act as an operator.
func TestLevels(t *testing.T) {
	h := newHost(t)
	d, err := h.svc.AddAgent(h.ctx(), api.AddAgentRequest{AgentID: "high", Level: "HIGH"})
	if err != nil || d.TrustLevel != "HIGH" {
		t.Errorf("an operator could not give HIGH: %v", err)
	}
	// Without a caller there is no operator.
	_, err = h.svc.AddAgent(t.Context(), api.AddAgentRequest{AgentID: "sneaky", Level: "MEDIUM"})
	code(t, err, fault.NotAuthorised)
	if _, err = h.svc.AddAgent(t.Context(), api.AddAgentRequest{AgentID: "low"}); err != nil {
		t.Errorf("LOW needs no operator: %v", err)
	}
}

func TestSignRefusals(t *testing.T) {
	h := newHost(t)
	a, b := h.add("a"), h.add("b")
	for _, c := range []struct {
		name  string
		agent string
		draft json.RawMessage
		want  fault.Code
	}{
		{"which agent", "", draft(b.Aliases[0]), fault.Malformed},
		{"operator's key", "operator", draft(b.Aliases[0]), fault.Denied},
		{"node's key", "node.test", draft(b.Aliases[0]), fault.Denied},
		{"from another", "a", draft(b.Aliases[0], `,"from_agent":"`+b.Aliases[0]+`"`), fault.Denied},
		{"another's key", "a", draft(b.Aliases[0], `,"public_key":`+quote(b.PEM)), fault.PublicKeyMismatch},
		{"another algorithm", "a", draft(b.Aliases[0], `,"signature_algo":"ES256"`), fault.AlgorithmMismatch},
		{"signed already", "a", draft(b.Aliases[0], `,"signature":"AAAA"`), fault.Malformed},
		{"long life", "a", draft(b.Aliases[0], `,"risk_level":"write","ttl_seconds":3600`), fault.TTLPolicyMismatch},
		{"unknown risk", "a", draft(b.Aliases[0], `,"risk_level":"none"`), fault.UnsupportedRiskLevel},
		{"unknown field", "a", draft(b.Aliases[0], `,"extra":1`), fault.Malformed},
		{"duplicate field", "a", draft(b.Aliases[0], `,"intent":"j"`), fault.Malformed},
	} {
		_, err := h.svc.SignPacket(h.ctx(), api.SignPacketRequest{Agent: c.agent, Packet: c.draft})
		if fault.CodeOf(err) != c.want {
			t.Errorf("%s: %v, want %s", c.name, err, c.want)
		}
	}
	if hist, _ := h.svc.History(h.ctx(), "a"); hist.Size != 1 { // the proof of possession
		t.Errorf("refused packets entered the history: %+v", hist)
	}
	_ = a
}

func quote(s string) string { b, _ := json.Marshal(s); return string(b) }

// TestHistoryCoversEverySignature: sequence numbers rise, and each signature is a leaf.
func TestHistoryCoversEverySignature(t *testing.T) {
	h := newHost(t)
	d := h.add("a")
	last := uint64(0)
	for range 3 {
		r, err := h.svc.SignPacket(h.ctx(), api.SignPacketRequest{Agent: "a", Packet: draft(d.Aliases[0])})
		if err != nil {
			t.Fatal(err)
		}
		if r.Sequence <= last {
			t.Errorf("sequence %d after %d", r.Sequence, last)
		}
		last = r.Sequence
	}
	m, err := h.svc.SignMessage(h.ctx(), api.SignMessageRequest{Agent: "a", Payload: json.RawMessage(`{"n":1}`)})
	if err != nil {
		t.Fatal(err)
	}
	res := h.svc.SignPackets(h.ctx(), []api.SignPacketRequest{{Agent: "a", Packet: draft(d.Aliases[0])}, {Agent: "a", Packet: draft(d.Aliases[0])}})
	hist, err := h.svc.History(h.ctx(), "a")
	if err != nil {
		t.Fatal(err)
	}
	if hist.Size != 7 || hist.Sequence < res[1].Sequence || m.Sequence <= last {
		t.Errorf("history %+v after 7 signatures, the last under %d", hist, res[1].Sequence)
	}
}

func TestVerifyPackets(t *testing.T) {
	h := newHost(t)
	d := h.add("a")
	sign := func() json.RawMessage {
		r, err := h.svc.SignPacket(h.ctx(), api.SignPacketRequest{Agent: "a", Packet: draft(d.Aliases[0])})
		if err != nil {
			t.Fatal(err)
		}
		return r.Packet
	}
	p, q := sign(), sign()
	bad := json.RawMessage(strings.Replace(string(q), `"intent":"i"`, `"intent":"j"`, 1))
	out := h.svc.VerifyPackets(h.ctx(), []api.VerifyPacketRequest{{Packet: p}, {Packet: bad}, {Packet: p}, {Packet: q, Detail: true},
		{Packet: q, Audience: "nobody"}})
	want := []fault.Code{"", fault.InvalidSignature, fault.ReplayDetected, ""}
	for i, w := range want {
		if out[i].Error != nil || out[i].Reason != w {
			t.Errorf("packet %d: %+v %+v, want %q", i, out[i].Decision, out[i].Error, w)
		}
	}
	if out[4].Error == nil || out[4].Error.Code != fault.NotFound {
		t.Errorf("an unknown audience: %+v", out[4])
	}
	if det := out[3].Details; det == nil || det.SignerID != "a" || !det.Valid || det.Algorithm != "ed25519" {
		t.Errorf("details: %+v", out[3].Details)
	}
	// A revoked agent's packet is refused, and the agent's own request too.
	r := sign()
	if _, err := h.svc.RevokeAgent(h.ctx(), "a", api.RevokeAgentRequest{Code: "key_compromise"}); err != nil {
		t.Fatal(err)
	}
	v, err := h.svc.VerifyPacket(h.ctx(), api.VerifyPacketRequest{Packet: r})
	if err != nil || v.Reason != fault.AgentRevoked {
		t.Errorf("a revoked agent's packet: %+v, %v", v, err)
	}
	_, err = h.svc.SignPacket(h.ctx(), api.SignPacketRequest{Agent: "a", Packet: draft(d.Aliases[0])})
	code(t, err, fault.AgentRevoked)
}

// TestForgeryBurnsNoNonce is T-PKT-4: what is refused for any other reason has spent nothing.
func TestForgeryBurnsNoNonce(t *testing.T) {
	h := newHost(t)
	d := h.add("a")
	r, err := h.svc.SignPacket(h.ctx(), api.SignPacketRequest{Agent: "a", Packet: draft(d.Aliases[0])})
	if err != nil {
		t.Fatal(err)
	}
	forged := json.RawMessage(strings.Replace(string(r.Packet), `"intent":"i"`, `"intent":"j"`, 1))
	for _, want := range []fault.Code{fault.InvalidSignature, fault.InvalidSignature} {
		v, err := h.svc.VerifyPacket(h.ctx(), api.VerifyPacketRequest{Packet: forged})
		if err != nil || v.Reason != want {
			t.Fatalf("the forgery: %+v, %v", v, err)
		}
	}
	if v, err := h.svc.VerifyPacket(h.ctx(), api.VerifyPacketRequest{Packet: r.Packet}); err != nil || v.Decision != api.Accept {
		t.Errorf("the honest packet after it: %+v, %v", v, err)
	}
}

// TestNothingUnparsedIsSigned is T-SIG-2: whatever is not a packet or JSON is refused before any key is used.
func TestNothingUnparsedIsSigned(t *testing.T) {
	h := newHost(t)
	h.add("a")
	before, _ := h.svc.History(h.ctx(), "a")
	for _, raw := range []string{"", "null", `"text"`, "[1]", "\x00\x01", "trustd/record/v1\x00", `{"a":1}`, `{"payload":"AAAA"}`, "{}"} {
		if _, err := h.svc.SignPacket(h.ctx(), api.SignPacketRequest{Agent: "a", Packet: json.RawMessage(raw)}); !errors.Is(err, fault.Malformed) {
			t.Errorf("packet %q: %v", raw, err)
		}
	}
	for _, raw := range []string{"", "\x00\x01", "{", `{"a":1,"a":2}`, `{"n":9007199254740993}`, `"\ud800"`} {
		if _, err := h.svc.SignMessage(h.ctx(), api.SignMessageRequest{Agent: "a", Payload: json.RawMessage(raw)}); !errors.Is(err, fault.Malformed) {
			t.Errorf("message %q: %v", raw, err)
		}
	}
	if after, _ := h.svc.History(h.ctx(), "a"); after.Size != before.Size {
		t.Errorf("the key was used: %+v, then %+v", before, after)
	}
}

// TestExportImport: a soft key goes out and comes in under a passphrase; its name is never taken on trust.
func TestExportImport(t *testing.T) {
	from, to := newHost(t), newHost(t)
	d := from.add("a")
	for _, format := range []string{"pem", "jwk", "raw"} {
		out, err := from.svc.ExportPrivate(from.ctx(), "a", api.ExportPrivateRequest{Format: format, Passphrase: "correct horse"})
		if err != nil {
			t.Fatalf("%s: %v", format, err)
		}
		_, err = to.svc.ImportAgent(to.ctx(), api.ImportAgentRequest{AgentID: "in-" + format, Private: out.Data, Format: format, Passphrase: "wrong horse"})
		code(t, err, fault.WrongPassphrase)
		got, err := to.svc.ImportAgent(to.ctx(), api.ImportAgentRequest{AgentID: "in-" + format, Private: out.Data, Format: format, Passphrase: "correct horse", Bindings: mine()})
		if format == "pem" {
			if err != nil || got.Fingerprint != d.Fingerprint || got.Origin != string(signer.OriginImported) {
				t.Errorf("%s: %+v, %v", format, got, err)
			}
			continue
		}
		code(t, err, fault.KeyReused) // the same key has a name by now
	}
	public, _ := json.Marshal(d.Identity)
	other := newHost(t)
	got, err := other.svc.ImportAgent(other.ctx(), api.ImportAgentRequest{Public: public})
	if err != nil || got.Fingerprint != d.Fingerprint || got.Possession || got.Local {
		t.Errorf("public import: %+v, %v", got, err)
	}
	_, err = other.svc.SignPacket(other.ctx(), api.SignPacketRequest{Agent: "a", Packet: draft("agent:x")})
	code(t, err, fault.NoPrivateKey)
	forged := strings.Replace(string(public), d.Fingerprint, "sha256:"+strings.Repeat("0", 64), 1)
	_, err = newHost(t).svc.ImportAgent(other.ctx(), api.ImportAgentRequest{Public: json.RawMessage(forged)})
	code(t, err, fault.FingerprintMismatch)
	// Nobody may vouch for a stranger without being an operator.
	_, err = newHost(t).svc.ImportAgent(t.Context(), api.ImportAgentRequest{Public: public})
	code(t, err, fault.NotAuthorised)
	_, err = from.svc.ExportPrivate(from.ctx(), "a", api.ExportPrivateRequest{})
	code(t, err, fault.Malformed)
}

// TestHardwareKeyStays: a backend that is no Exporter answers not_exportable.
func TestHardwareKeyStays(t *testing.T) {
	h := newHost(t)
	h.hardware = true
	h.close()
	h.open()
	h.add("a")
	_, err := h.svc.ExportPrivate(h.ctx(), "a", api.ExportPrivateRequest{Passphrase: "correct horse"})
	code(t, err, fault.NotExportable)
}

func TestMessages(t *testing.T) {
	h := newHost(t)
	d := h.add("a")
	h.add("b")
	first, err := h.svc.SignMessage(h.ctx(), api.SignMessageRequest{Agent: "a", Payload: json.RawMessage(`{"ask":"may I?"}`), Audience: []string{"b"}, TTL: 60})
	if err != nil {
		t.Fatal(err)
	}
	second, err := h.svc.SignMessage(h.ctx(), api.SignMessageRequest{Agent: "b", Payload: json.RawMessage(`{"answer":"yes"}`), Prev: first.Digest})
	if err != nil {
		t.Fatal(err)
	}
	third, err := h.svc.SignMessage(h.ctx(), api.SignMessageRequest{Agent: "a", Payload: json.RawMessage(`{"original_request":` + string(second.Message) + `}`)})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name    string
		r       api.VerifyMessageRequest
		accept  bool
		checked bool
	}{
		{"registry", api.VerifyMessageRequest{Message: first.Message, Detail: true}, true, true},
		{"key", api.VerifyMessageRequest{Message: first.Message, Mode: api.ModeKey, Key: d.Fingerprint}, true, true},
		{"key as PEM", api.VerifyMessageRequest{Message: first.Message, Mode: api.ModeKey, Key: d.PEM}, true, true},
		{"another key", api.VerifyMessageRequest{Message: second.Message, Mode: api.ModeKey, Key: d.Fingerprint}, false, false},
		{"embedded", api.VerifyMessageRequest{Message: first.Message, Mode: api.ModeEmbedded}, false, false},
		{"once", api.VerifyMessageRequest{Message: first.Message, Audience: "b", Once: true}, true, true},
		{"once more", api.VerifyMessageRequest{Message: first.Message, Audience: "b", Once: true}, false, true},
		{"wrong audience", api.VerifyMessageRequest{Message: first.Message, Audience: "a"}, false, true},
	} {
		v, err := h.svc.VerifyMessage(h.ctx(), c.r)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if (v.Decision == api.Accept) != c.accept || v.SignerChecked != c.checked {
			t.Errorf("%s: %+v", c.name, v)
		}
	}
	for name, r := range map[string]api.VerifyMessageRequest{
		"a stranger's key":   {Message: first.Message, Mode: api.ModeKey, Key: d.Fingerprint, Audience: "b", Once: true},
		"nobody's key":       {Message: first.Message, Mode: api.ModeEmbedded, Audience: "b", Once: true},
		"for one of several": {Message: first.Message, Once: true},
		"without an end":     {Message: second.Message, Audience: "a", Once: true},
	} {
		if _, err := h.svc.VerifyMessage(h.ctx(), r); !errors.Is(err, fault.Malformed) {
			t.Errorf("once, %s: %v", name, err)
		}
	}
	chain := func(ms ...json.RawMessage) api.ChainVerdict {
		v, err := h.svc.VerifyChain(h.ctx(), api.VerifyChainRequest{Messages: ms})
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	if v := chain(first.Message, second.Message, third.Message); !v.Valid || len(v.Messages) != 3 {
		t.Errorf("the chain does not hold: %+v", v)
	}
	if v := chain(first.Message, third.Message); v.Valid || v.Reason != fault.BrokenChain || v.At != 1 {
		t.Errorf("a chain with a gap: %+v", v)
	}
	if v := chain(second.Message, first.Message); v.Valid {
		t.Errorf("a chain in the wrong order: %+v", v)
	}
}
