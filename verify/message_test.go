package verify_test

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/packet"
	"github.com/trustd/trustd/registry"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/verify"
)

func header(t testing.TB, id string, k key) packet.MessageHeader {
	t.Helper()
	return packet.MessageHeader{
		SignerID: agentID(t, id), Fingerprint: k.pub.ID(), Algorithm: k.pub.Algorithm(),
		Timestamp: now.Add(-time.Minute),
		Seq:       1, Nonce: "n-1", Grade: "software", KeyEpoch: 1, ViewHead: "sha256:" + strings.Repeat("0", 64),
	}
}

// message signs with k what the header says.
func message(t testing.TB, h packet.MessageHeader, k key, payload string) *packet.Message {
	t.Helper()
	u, err := packet.NewMessage(h, json.RawMessage(payload))
	if err != nil {
		t.Fatal(err)
	}
	m, err := u.Seal(signature.NewDirect(k.sign(u.SigningBytes())), k.pub)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// unsigned returns a message whose signature is a row of zeros.
func unsigned(t testing.TB, h packet.MessageHeader, k key) *packet.Message {
	t.Helper()
	return message(t, h, key{k.pub, func([]byte) []byte { return make([]byte, k.pub.Algorithm().SignatureSize()) }},
		`1`)
}

// messageVector is a message in a registry that one row refuses, and only that row.
type messageVector struct {
	reason  fault.Code
	message *packet.Message
	edit    func(*registry.Agent)
	policy  func(*verify.Policy)
}

func messageVectors(t *testing.T, w *world) []messageVector {
	from := func(change func(*packet.MessageHeader)) *packet.Message {
		h := header(t, "alice", w.alice)
		if change != nil {
			change(&h)
		}
		return message(t, h, w.alice, `{"a":1}`)
	}
	return []messageVector{
		{reason: fault.WrongAudience, message: from(func(h *packet.MessageHeader) {
			h.Audience = []string{"carol",
				"dave"}
		})},
		{reason: fault.UnknownAgent, message: from(func(h *packet.MessageHeader) { h.SignerID = agentID(t, "ghost") })},
		{reason: fault.PublicKeyMismatch, message: message(t, header(t, "alice", w.bob), w.bob, `1`)},
		{reason: fault.InvalidSignature, message: unsigned(t, header(t, "alice", w.alice), w.alice)},
		{reason: fault.AgentRevoked, message: from(nil), edit: onlyAlice(func(a *registry.Agent) {
			a.Revocation = &registry.Revocation{Code: registry.Superseded, At: now.Add(time.Hour)}
		})},
		{reason: fault.AgentRemoved, message: from(nil), edit: onlyAlice(func(a *registry.Agent) {
			a.Removed = &registry.Removal{At: now}
		})},
		{reason: fault.AgentExpired, message: from(nil),
			edit: onlyAlice(func(a *registry.Agent) { a.ExpiresAt = now })},
		{reason: fault.KeyRetired, message: from(nil), edit: onlyAlice(func(a *registry.Agent) {
			a.Keys[0].Until = now.Add(-time.Minute)
		})},
		{reason: fault.MalformedTimeWindow, message: from(func(h *packet.MessageHeader) {
			h.Timestamp, h.ExpiresAt = now.Add(10*time.Second), now.Add(9*time.Second)
		})},
		{reason: fault.IssuedInFuture, message: from(func(h *packet.MessageHeader) {
			h.Timestamp = now.Add(30*time.Second + time.Microsecond)
		})},
		{reason: fault.Expired,
			message: from(func(h *packet.MessageHeader) { h.ExpiresAt = now.Add(-time.Microsecond) })},
		{reason: fault.AssuranceTooLow, message: from(nil), policy: func(p *verify.Policy) { p.MinGrade = signer.HardwareClaimed }},
	}
}

func (w *world) messageInput(m *packet.Message) verify.MessageInput {
	return verify.MessageInput{
		Message: m, Answers: func(name string) bool { return name == "bob" }, View: w.view(),
		Policy: verify.DefaultPolicy(), Now: now,
	}
}

func TestEachMessageRowHasItsVector(t *testing.T) {
	w := newWorld(t)
	var covered []fault.Code
	for _, v := range messageVectors(t, w) {
		covered = append(covered, v.reason)
		in, reg := w.messageInput(v.message), edited{w.state, v.edit}
		if v.policy != nil {
			v.policy(&in.Policy)
		}
		verdict, err := verify.CheckMessageWithout(in, reg, "")
		wantCode(t, "all rows on", err, v.reason)
		if valid := v.reason != fault.InvalidSignature; verdict.SignatureValid != valid {
			t.Errorf("%s: signature valid = %v", v.reason, verdict.SignatureValid)
		}
		for _, off := range verify.MessageRows() {
			_, err := verify.CheckMessageWithout(in, reg, off)
			want := v.reason
			if off == v.reason {
				want = ""
			}
			wantCode(t, "vector "+string(v.reason)+" with "+string(off)+" off", err, want)
		}
	}
	if rows := verify.MessageRows(); !slices.Equal(rows, covered) {
		t.Errorf("rows %v\nvectors %v", rows, covered)
	}
}

// TestModes: who vouches for the key decides what a valid signature is worth.
func TestModes(t *testing.T) {
	w := newWorld(t)
	stranger := edKey(t, 77)
	alices := message(t, header(t, "alice", w.alice), w.alice, `1`)
	strangers := message(t, header(t, "alice", stranger), stranger, `1`)
	revoked := onlyAlice(func(a *registry.Agent) {
		a.Revocation = &registry.Revocation{Code: registry.KeyCompromise,
			At: now}
	})
	type flags struct{ valid, checked, trusted bool }
	cases := []struct {
		name string
		in   verify.MessageInput
		edit func(*registry.Agent)
		want fault.Code
		flags
	}{
		{"registry", verify.MessageInput{Message: alices}, nil, "", flags{true, true, true}},
		{"registry, stranger as alice", verify.MessageInput{Message: strangers}, nil, fault.PublicKeyMismatch, flags{}},
		{"registry, revoked", verify.MessageInput{Message: alices}, revoked, fault.AgentRevoked, flags{true, true,
			false}},
		{"registry, level NONE", verify.MessageInput{Message: message(t, header(t, "none", w.none), w.none, `1`)}, nil,
			fault.UnknownAgent, flags{true, true, false}},
		{"registry, operator", verify.MessageInput{Message: message(t, header(t, "root", w.root), w.root, `1`)}, nil,
			fault.UnknownAgent, flags{true, true, false}},
		{"registry, other epoch", verify.MessageInput{Message: message(t, epoch2(header(t, "alice", w.alice)), w.alice,
			`1`)}, nil,
			fault.PublicKeyMismatch, flags{true, true, true}},
		{"registry, bob's key under alice's name", verify.MessageInput{Message: message(t, header(t, "alice", w.bob),
			w.bob, `1`)}, nil,
			fault.PublicKeyMismatch, flags{true, false, false}},
		{"key", verify.MessageInput{Message: alices, Mode: verify.ModeKey, Key: w.alice.pub.ID()}, nil, "", flags{true,
			true, true}},
		{"key, another", verify.MessageInput{Message: alices, Mode: verify.ModeKey, Key: w.bob.pub.ID()}, nil,
			fault.PublicKeyMismatch, flags{true, false, false}},
		{"key, none given", verify.MessageInput{Message: alices, Mode: verify.ModeKey}, nil,
			fault.PublicKeyMismatch, flags{true, false, false}},
		{"key, stranger", verify.MessageInput{Message: strangers, Mode: verify.ModeKey, Key: stranger.pub.ID()}, nil,
			"", flags{true, true, true}},
		{"key, revoked", verify.MessageInput{Message: alices, Mode: verify.ModeKey, Key: w.alice.pub.ID()}, revoked,
			fault.AgentRevoked, flags{true, true, false}},
		{"key, bob's under alice's name", verify.MessageInput{Message: message(t, header(t, "alice", w.bob), w.bob,
			`1`),
			Mode: verify.ModeKey, Key: w.bob.pub.ID()}, nil, fault.PublicKeyMismatch, flags{true, false, false}},
		{"embedded", verify.MessageInput{Message: alices, Mode: verify.ModeEmbedded}, nil, fault.UnknownAgent,
			flags{true, false, false}},
		{"embedded, stranger", verify.MessageInput{Message: strangers, Mode: verify.ModeEmbedded}, nil,
			fault.UnknownAgent, flags{true, false, false}},
		{"embedded, forged", verify.MessageInput{Message: unsigned(t, header(t, "alice", stranger), stranger),
			Mode: verify.ModeEmbedded}, nil, fault.InvalidSignature, flags{}},
	}
	for _, c := range cases {
		c.in.Policy, c.in.Now = verify.DefaultPolicy(), now
		v, err := verify.CheckMessageWithout(c.in, edited{w.state, c.edit}, "")
		wantCode(t, c.name, err, c.want)
		if got := (flags{v.SignatureValid, v.SignerChecked, v.SignerTrusted}); got != c.flags {
			t.Errorf("%s: valid, checked, trusted = %v, want %v", c.name, got, c.flags)
		}
	}
}

func epoch2(h packet.MessageHeader) packet.MessageHeader {
	h.KeyEpoch = 2
	return h
}

// TestWithoutRegistry: the modes that need no registry work without one, and the default refuses.
func TestWithoutRegistry(t *testing.T) {
	k := edKey(t, 3)
	m := message(t, header(t, "alice", k), k, `1`)
	in := verify.MessageInput{Message: m, Policy: verify.DefaultPolicy(), Now: now}
	_, err := verify.CheckMessage(in)
	wantCode(t, "registry", err, fault.NotInitialised)
	in.Mode, in.Key = verify.ModeKey, k.pub.ID()
	v, err := verify.CheckMessage(in)
	wantCode(t, "key", err, "")
	if _, known := v.Agent(); known || v.Key().Public.ID() != k.pub.ID() {
		t.Error("an agent out of nowhere, or another key")
	}
	in.Mode = verify.ModeEmbedded
	_, err = verify.CheckMessage(in)
	wantCode(t, "embedded", err, fault.UnknownAgent)
	_, err = verify.CheckMessage(verify.MessageInput{})
	wantCode(t, "no message", err, fault.Malformed)
}

func TestMessageTimes(t *testing.T) {
	w := newWorld(t)
	hour := time.Hour
	cases := []struct {
		name          string
		signed, ends  time.Duration // from now on; ends 0: never
		age           time.Duration
		want          fault.Code
		until         time.Duration
		grace         time.Duration
		withoutAnswer bool
	}{
		{name: "never ends", signed: -1000 * hour},
		{name: "ends now", signed: -hour, ends: -1, until: 30*time.Second - time.Microsecond, want: fault.Expired},
		{name: "in its grace", signed: -hour, ends: -1, grace: time.Second, until: 31*time.Second - time.Microsecond},
		{name: "ends later", signed: -hour, ends: hour, until: hour + 30*time.Second},
		{name: "too old for the policy", signed: -hour, age: hour - time.Microsecond, want: fault.Expired,
			until: 30*time.Second - time.Microsecond},
		{name: "as old as the policy allows", signed: -hour, age: hour, until: 30 * time.Second},
		{name: "policy before its own end", signed: -hour, ends: hour, age: 90 * time.Minute,
			until: 30*time.Minute + 30*time.Second},
		{name: "own end before the policy's", signed: -hour, ends: time.Minute, age: 90 * time.Minute,
			until: 90 * time.Second},
		{name: "signed at the skew", signed: 30 * time.Second},
	}
	for _, c := range cases {
		h := header(t, "alice", w.alice)
		h.Timestamp = now.Add(c.signed)
		switch {
		case c.ends == -1:
			h.ExpiresAt = now.Add(-time.Microsecond)
		case c.ends != 0:
			h.ExpiresAt = now.Add(c.ends)
		}
		in := w.messageInput(message(t, h, w.alice, `1`))
		in.Policy.MessageAge, in.Policy.Grace = c.age, c.grace
		v, err := verify.CheckMessage(in)
		wantCode(t, c.name, err, c.want)
		until, ends := v.Until()
		if ends != (c.until != 0) || ends && !until.Equal(now.Add(c.until)) {
			t.Errorf("%s: until %v, %v", c.name, until, ends)
		}
	}
}

func TestMessageAudience(t *testing.T) {
	w := newWorld(t)
	h := header(t, "alice", w.alice)
	h.Audience = []string{"carol", "bob"}
	in := w.messageInput(message(t, h, w.alice, `1`))
	_, err := verify.CheckMessage(in)
	wantCode(t, "one of two names", err, "")
	in.Answers = nil
	_, err = verify.CheckMessage(in)
	wantCode(t, "nobody answers", err, fault.WrongAudience)
	in.Message = message(t, header(t, "alice", w.alice), w.alice, `1`)
	_, err = verify.CheckMessage(in)
	wantCode(t, "for anyone", err, "")
}

// A step is one message of a chain under construction.
type step struct {
	id       string
	k        key
	change   func(*packet.MessageHeader)
	nested   bool // holds the message before; otherwise prev names it
	unlinked bool
}

// chain builds messages one second apart, the last one second before now.
func chain(t *testing.T, steps ...step) []*packet.Message {
	t.Helper()
	var out []*packet.Message
	for i, s := range steps {
		h := header(t, s.id, s.k)
		h.Timestamp = now.Add(time.Duration(i-len(steps)) * time.Second)
		h.Seq = uint64(i + 1)
		payload := `{"step":1}`
		if i > 0 && !s.unlinked {
			before := out[i-1]
			if s.nested {
				text, err := before.JSON()
				if err != nil {
					t.Fatal(err)
				}
				payload = `{"answer":true,"original_request":` + string(text) + `}`
			} else {
				h.Prev = before.Digest()
			}
		}
		if s.change != nil {
			s.change(&h)
		}
		out = append(out, message(t, h, s.k, payload))
	}
	return out
}

func TestChain(t *testing.T) {
	w := newWorld(t)
	alice := step{id: "alice", k: w.alice}
	bob := step{id: "bob", k: w.bob}
	carol := step{id: "carol", k: w.carol}
	nested := func(s step) step { s.nested = true; return s }
	with := func(s step, change func(*packet.MessageHeader)) step { s.change = change; return s }
	ago := func(d time.Duration) func(*packet.MessageHeader) {
		return func(h *packet.MessageHeader) { h.Timestamp = now.Add(-d) }
	}
	three := chain(t, alice, bob, carol)
	long := make([]step, verify.MaxChain+1)
	for i := range long {
		long[i] = alice
	}
	cases := []struct {
		name     string
		messages []*packet.Message
		edit     func(*registry.Agent)
		want     fault.Code
		field    string
		at       int
	}{
		{name: "one", messages: chain(t, alice)},
		{name: "by digest", messages: three},
		{name: "nested", messages: chain(t, alice, nested(bob), nested(carol))},
		{name: "mixed, one signer twice", messages: chain(t, alice, nested(bob), alice)},
		{name: "longest", messages: chain(t, long[:verify.MaxChain]...)},
		{name: "none", want: fault.BrokenChain, field: "messages"},
		{name: "too long", messages: chain(t, long...), want: fault.BrokenChain, field: "messages"},
		{name: "hole", messages: []*packet.Message{three[0], nil}, want: fault.Malformed, field: "messages", at: 1},
		{name: "head cut off", messages: three[1:], want: fault.BrokenChain, field: "prev"},
		{name: "middle cut out", messages: []*packet.Message{three[0], three[2]}, want: fault.BrokenChain,
			field: "prev", at: 1},
		{name: "order", messages: []*packet.Message{three[0], three[2], three[1]}, want: fault.BrokenChain,
			field: "prev", at: 1},
		{name: "same message twice", messages: []*packet.Message{three[0], three[0]}, want: fault.BrokenChain,
			field: "prev", at: 1},
		{name: "no link", messages: chain(t, alice, step{id: "bob", k: w.bob, unlinked: true}),
			want: fault.BrokenChain, field: "prev", at: 1},
		{name: "branch", messages: []*packet.Message{three[0], three[1], chain(t, alice, carol)[1]},
			want: fault.BrokenChain, field: "prev", at: 2},
		{name: "wrong digest outweighs nesting", messages: chain(t, alice, with(nested(bob),
			func(h *packet.MessageHeader) {
				h.Prev = "sha256:" + strings.Repeat("a", 64)
			})), want: fault.BrokenChain, field: "prev", at: 1},
		{name: "time runs back within the skew", messages: chain(t, alice, with(bob, ago(32*time.Second)))},
		{name: "time runs back", messages: chain(t, alice, with(bob, ago(33*time.Second))), want: fault.BrokenChain,
			field: "timestamp", at: 1},
		{name: "answered too late", messages: chain(t, with(alice, func(h *packet.MessageHeader) {
			h.Timestamp, h.ExpiresAt = now.Add(-time.Hour), now.Add(-time.Minute)
		}), bob), want: fault.BrokenChain, field: "timestamp", at: 1},
		{name: "expired since it was answered", messages: chain(t, with(alice, func(h *packet.MessageHeader) {
			h.Timestamp, h.ExpiresAt = now.Add(-2*time.Hour), now.Add(-time.Hour)
		}), with(bob, ago(90*time.Minute)))},
		{name: "last one expired", messages: chain(t, alice, with(bob, func(h *packet.MessageHeader) {
			h.ExpiresAt = now.Add(-time.Millisecond)
		})), want: fault.Expired, field: "expires_at", at: 1},
		{name: "sequence stands still", messages: chain(t, alice, with(alice,
			func(h *packet.MessageHeader) { h.Seq = 1 })),
			want: fault.BrokenChain, field: "seq", at: 1},
		{name: "only the last one's audience counts", messages: chain(t,
			with(alice, func(h *packet.MessageHeader) { h.Audience = []string{"carol"} }),
			with(carol, func(h *packet.MessageHeader) { h.Audience = []string{"bob"} }))},
		{name: "last one for another", messages: chain(t, alice,
			with(carol, func(h *packet.MessageHeader) { h.Audience = []string{"dave"} })), want: fault.WrongAudience,
			field: "aud", at: 1},
		{name: "forged link", messages: func() []*packet.Message {
			m := chain(t, alice, bob)
			h := m[1].Header()
			return []*packet.Message{m[0], unsigned(t, h, w.bob)}
		}(), want: fault.InvalidSignature, field: "signature", at: 1},
		{name: "stranger in front", messages: chain(t, step{id: "alice", k: edKey(t, 88)}, bob),
			want: fault.PublicKeyMismatch, field: "fingerprint"},
		{name: "first signer superseded since", messages: three, edit: revokedAlice(registry.Superseded, now)},
		{name: "first signer superseded before", messages: three, edit: revokedAlice(registry.Superseded,
			now.Add(-time.Minute)),
			want: fault.AgentRevoked, field: "signer_id"},
		{name: "first signer compromised since", messages: three, edit: revokedAlice(registry.KeyCompromise, now),
			want: fault.AgentRevoked, field: "signer_id"},
		{name: "first signer lost its privileges since", messages: three,
			edit: revokedAlice(registry.PrivilegeWithdrawn, now),
			want: fault.AgentRevoked, field: "signer_id"},
		{name: "last signer superseded since", messages: chain(t, bob, alice), edit: revokedAlice(registry.Superseded,
			now),
			want: fault.AgentRevoked, field: "signer_id", at: 1},
		{name: "first signer removed since", messages: three,
			edit: onlyAlice(func(a *registry.Agent) { a.Removed = &registry.Removal{At: now} })},
		{name: "last signer removed since", messages: chain(t, bob, alice), want: fault.AgentRemoved,
			field: "signer_id", at: 1,
			edit: onlyAlice(func(a *registry.Agent) { a.Removed = &registry.Removal{At: now} })},
		{name: "first signer's registration ended since", messages: three,
			edit: onlyAlice(func(a *registry.Agent) { a.ExpiresAt = now.Add(-time.Second) })},
		{name: "first signer's registration had ended", messages: three, want: fault.AgentExpired, field: "signer_id",
			edit: onlyAlice(func(a *registry.Agent) { a.ExpiresAt = now.Add(-3 * time.Second) })},
		{name: "first key retired since", messages: three,
			edit: onlyAlice(func(a *registry.Agent) { a.Keys[0].Until = now.Add(-2 * time.Second) })},
	}
	for _, c := range cases {
		in := verify.ChainInput{
			Messages: c.messages, Answers: func(name string) bool { return name == "bob" },
			Policy: verify.DefaultPolicy(), Now: now,
		}
		verdicts, at, err := verify.CheckChainWith(in, edited{w.state, c.edit})
		wantCode(t, c.name, err, c.want)
		if err != nil && (err.Field != c.field || at != c.at) {
			t.Errorf("%s: refused at %d for %s, want %d for %s", c.name, at, err.Field, c.at, c.field)
		}
		if err == nil && len(verdicts) != len(c.messages) {
			t.Errorf("%s: %d verdicts", c.name, len(verdicts))
		}
	}
	_, _, err := verify.CheckChain(verify.ChainInput{Messages: three, Now: now})
	wantCode(t, "no registry", err, fault.NotInitialised)
	_, _, err = verify.CheckChain(verify.ChainInput{Messages: three, View: w.view(), Now: now})
	wantCode(t, "through the view", err, "")
}

func revokedAlice(code registry.RevocationCode, at time.Time) func(*registry.Agent) {
	return onlyAlice(func(a *registry.Agent) {
		a.Revocation = &registry.Revocation{Code: code, At: at,
			By: ident.KeyID{1}}
	})
}
