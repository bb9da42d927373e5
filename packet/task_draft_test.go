package packet_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/packet"
	"github.com/trustd/trustd/signature"
)

const minimalDraft = `{"task_id":"task-001","to_agent":"agent:vwGcRV8F51znTKAq",` +
	`"intent":"Research company background","permissions":{"allowed_actions":["read","search"],"max_tool_calls":5},` +
	`"context":{"company":"Example Corp"}}`

var testNow = time.Date(2026, 3, 8, 12, 0, 0, 123456789, time.UTC)

func testFill(t testing.TB) packet.Fill {
	g := vectors(t)
	return packet.Fill{
		FromAgent:   g.Identities[0].AgentID,
		AllowedFrom: func(a string) bool { return a == "agent:planner" || a == g.Identities[0].AgentID },
		PublicKey:   g.key(t, 0),
		Nonce:       "fresh-nonce", PacketID: "fresh-packet",
		Now: testNow, TTL: packet.DefaultTTL(),
	}
}

// with puts members into the draft, before the others.
func with(members string) string {
	if members == "" {
		return minimalDraft
	}
	return "{" + members + "," + minimalDraft[1:]
}

func complete(draft string, f packet.Fill) (*packet.Unsigned, error) {
	d, err := packet.ParseDraft([]byte(draft))
	if err != nil {
		return nil, err
	}
	return d.Complete(f)
}

// TestCompleteFills shows the whole packet that a minimal draft becomes.
func TestCompleteFills(t *testing.T) {
	u, err := complete(minimalDraft, testFill(t))
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"ai_provenance":null,"capability_token":null,"constraints":null,` +
		`"context":{"company":"Example Corp"},"expires_at":"2026-03-08T12:15:00.123456Z","from_agent":"agent:fy2e0LcbjlpsXPMO","goal":null,` +
		`"intent":"Research company background","issued_at":"2026-03-08T12:00:00.123456Z","memory_refs":[],` +
		`"nonce":"fresh-nonce","packet_id":"fresh-packet","permissions":{"allowed_actions":["read","search"],` +
		`"max_tool_calls":5},"provenance":null,"public_key":"-----BEGIN PUBLIC KEY-----\n` +
		`MCowBQYDK2VwAyEA11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=\n-----END PUBLIC KEY-----\n","risk_level":null,` +
		`"signature_algo":"Ed25519","task_id":"task-001","task_type":null,"to_agent":"agent:vwGcRV8F51znTKAq",` +
		`"ttl_seconds":null}`
	if string(u.SigningBytes()) != want {
		t.Errorf("to be signed:\n%s\nwant\n%s", u.SigningBytes(), want)
	}
	sig := bytes.Repeat([]byte{0xa5}, 64)
	sealed := u.Seal(signature.NewDirect(sig))
	if at := strings.Replace(string(sealed), `"signature":"`+signature.EncodeText(sig)+`",`, "", 1); at != want {
		t.Errorf("sealed:\n%s", sealed)
	}
	p, err := packet.Parse(sealed)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(p.SigningBytes(), u.SigningBytes()) || p.SignatureText != signature.EncodeText(sig) {
		t.Error("the sealed packet does not read back")
	}
	if u.PacketID != "fresh-packet" || u.ExpiresAt.Instant.Sub(u.IssuedAt.Instant) != 900*time.Second {
		t.Error("the fields are not those of the packet")
	}
	if !json.Valid(sealed) {
		t.Error("not JSON")
	}
}

// TestCompleteLifetime is the TTL policy of an issuer, with issued_at at 12:00:00.123456.
func TestCompleteLifetime(t *testing.T) {
	const issued = `"issued_at":"2026-03-08T12:00:00Z",`
	usual := packet.DefaultTTL()
	strict := packet.TTLPolicy{Write: 60 * time.Second, Read: 300 * time.Second, Default: 100500 * time.Millisecond}
	for _, c := range []struct {
		name, members string
		policy        packet.TTLPolicy
		code          fault.Code
		field         string // of the refusal; else expires_at
		ttl           int64
	}{
		{"none", ``, usual, "", "2026-03-08T12:15:00.123456Z", 0},
		{"none-given", `"expires_at":"2026-03-08T12:00:30.123456Z"`, usual, "", "2026-03-08T12:00:30.123456Z", 0},
		{"none-most", `"expires_at":"2026-03-08T12:15:00.123456Z"`, usual, "", "2026-03-08T12:15:00.123456Z", 0},
		{"none-over", `"expires_at":"2026-03-08T12:15:00.123457Z"`, usual, fault.TTLPolicyMismatch, "expires_at", 0},
		{"none-years", `"expires_at":"2036-03-08T12:15:00Z"`, usual, fault.TTLPolicyMismatch, "expires_at", 0},
		{"none-at-once", `"expires_at":"2026-03-08T12:00:00.123456Z"`, usual, fault.TTLPolicyMismatch, "expires_at", 0},
		{"none-before", `"expires_at":"2026-03-08T11:00:00Z"`, usual, fault.TTLPolicyMismatch, "expires_at", 0},
		{"none-null", `"expires_at":null`, usual, "", "2026-03-08T12:15:00.123456Z", 0},
		{"none-strict", ``, strict, "", "2026-03-08T12:01:40.123456Z", 0},
		{"write", `"risk_level":"write"`, usual, "", "2026-03-08T12:02:00.123456Z", 120},
		{"read", `"risk_level":"read"`, usual, "", "2026-03-08T12:15:00.123456Z", 900},
		{"write-strict", `"risk_level":"write"`, strict, "", "2026-03-08T12:01:00.123456Z", 60},
		{"write-strict-120", `"risk_level":"write","ttl_seconds":120`, strict, fault.TTLPolicyMismatch,
			"ttl_seconds", 0},
		{"write-shorter", `"risk_level":"write","ttl_seconds":10`, usual, "", "2026-03-08T12:00:10.123456Z", 10},
		{"write-year", `"risk_level":"write","ttl_seconds":31536000`, usual, fault.TTLPolicyMismatch, "ttl_seconds", 0},
		{"write-over", `"risk_level":"write","ttl_seconds":121`, usual, fault.TTLPolicyMismatch, "ttl_seconds", 0},
		{"write-zero", `"risk_level":"write","ttl_seconds":0`, usual, fault.TTLPolicyMismatch, "ttl_seconds", 0},
		{"write-negative", `"risk_level":"write","ttl_seconds":-1`, usual, fault.Malformed, "ttl_seconds", 0},
		{"ttl-alone", `"ttl_seconds":300`, usual, "", "2026-03-08T12:05:00.123456Z", 300},
		{"ttl-alone-over", `"ttl_seconds":901`, usual, fault.TTLPolicyMismatch, "ttl_seconds", 0},
		{"agrees", issued + `"risk_level":"write","expires_at":"2026-03-08T12:02:00Z"`, usual, "",
			"2026-03-08T12:02:00Z", 120},
		{"agrees-offset", issued + `"risk_level":"write","expires_at":"2026-03-08T14:02:00+02:00"`, usual, "",
			"2026-03-08T14:02:00+02:00", 120},
		{"agrees-ttl", issued + `"risk_level":"write","ttl_seconds":7,"expires_at":"2026-03-08T12:00:07Z"`, usual, "",
			"2026-03-08T12:00:07Z", 7},
		{"off-by-a-microsecond", issued + `"risk_level":"write","expires_at":"2026-03-08T12:02:00.000001Z"`, usual,
			fault.TTLPolicyMismatch, "expires_at", 0},
		{"off", `"risk_level":"read","expires_at":"2026-03-08T13:00:00Z"`, usual, fault.TTLPolicyMismatch,
			"expires_at", 0},
		{"unknown", `"risk_level":"urgent"`, usual, fault.UnsupportedRiskLevel, "risk_level", 0},
		{"unknown-empty", `"risk_level":""`, usual, fault.UnsupportedRiskLevel, "risk_level", 0},
		{"no-policy", ``, packet.TTLPolicy{}, fault.Internal, "", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := testFill(t)
			f.TTL = c.policy
			u, err := complete(with(c.members), f)
			if c.code != "" {
				wantFault(t, err, c.code, c.field)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if u.ExpiresAt.String() != c.field || u.TTLSeconds.Value != c.ttl || u.TTLSeconds.Set != (c.ttl != 0) {
				t.Errorf("expires at %s, ttl %+v", u.ExpiresAt, u.TTLSeconds)
			}
			if err := u.CheckTTL(); err != nil {
				t.Errorf("what was issued is not what the format demands: %v", err)
			}
		})
	}
}

func wantFault(t *testing.T, err error, code fault.Code, field string) {
	t.Helper()
	var f *fault.Error
	if !errors.As(err, &f) || f.Code != code || f.Field != field {
		t.Errorf("%v, not %s of %q", err, code, field)
	}
}

func TestCompleteRefuses(t *testing.T) {
	other, _ := json.Marshal(vectors(t).Identities[1].PEM)
	own, _ := json.Marshal(vectors(t).Identities[0].PEM)
	for _, c := range []struct {
		name, members string
		code          fault.Code
		field         string
	}{
		{"own-alias", `"from_agent":"agent:fy2e0LcbjlpsXPMO"`, "", ""},
		{"second-alias", `"from_agent":"agent:planner"`, "", ""},
		{"other-alias", `"from_agent":"agent:vwGcRV8F51znTKAq"`, fault.Denied, "from_agent"},
		{"empty-alias", `"from_agent":""`, fault.Malformed, "from_agent"},
		{"own-key", `"public_key":` + string(own), "", ""},
		{"other-key", `"public_key":` + string(other), fault.PublicKeyMismatch, "public_key"},
		{"own-algorithm", `"signature_algo":"Ed25519"`, "", ""},
		{"other-algorithm", `"signature_algo":"ES256"`, fault.AlgorithmMismatch, "signature_algo"},
		{"algorithm-case", `"signature_algo":"ed25519"`, fault.AlgorithmMismatch, "signature_algo"},
		{"own-nonce", `"nonce":"mine","packet_id":"mine"`, "", ""},
		{"null-nonce", `"nonce":null`, fault.Malformed, "nonce"},
		{"signed", `"signature":"AAAA"`, fault.Malformed, "signature"},
		{"signature-empty", `"signature":""`, fault.Malformed, "signature"},
		{"issued-now", `"issued_at":"2026-03-08T12:00:00.5Z"`, "", ""},
		{"issued-elsewhere", `"issued_at":"2026-03-08T17:30:00+05:30"`, "", ""},
		{"issued-30s-ahead", `"issued_at":"2026-03-08T12:00:30.123456Z"`, "", ""},
		{"issued-ahead", `"issued_at":"2026-03-08T12:00:30.123457Z"`, fault.IssuedInFuture, "issued_at"},
		{"issued-30s-behind", `"issued_at":"2026-03-08T11:59:30.123456Z"`, "", ""},
		{"issued-behind", `"issued_at":"2026-03-08T11:59:30.123455Z"`, fault.Malformed, "issued_at"},
		{"provenance", `"ai_provenance":{"source":"llm"}`, "", ""},
		{"no-source", `"ai_provenance":{"model":"m"}`, fault.InvalidAIProvenance, "ai_provenance.source"},
		{"unknown", `"extra":1`, fault.Malformed, "extra"},
		{"lone-surrogate", `"goal":"\ud800"`, fault.Malformed, "goal"},
	} {
		t.Run(c.name, func(t *testing.T) {
			u, err := complete(with(c.members), testFill(t))
			if c.code != "" {
				wantFault(t, err, c.code, c.field)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if _, err := packet.Parse(u.Seal(signature.NewDirect(make([]byte, 64)))); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestCompleteRefusesRepeatedActions(t *testing.T) {
	draft := strings.Replace(minimalDraft, `["read","search"]`, `["read","search","read"]`, 1)
	_, err := complete(draft, testFill(t))
	wantFault(t, err, fault.Malformed, "permissions.allowed_actions")
}

func TestDraftNeeds(t *testing.T) {
	for _, member := range []string{
		`"task_id":"task-001",`, `"to_agent":"agent:vwGcRV8F51znTKAq",`, `"intent":"Research company background",`,
		`"permissions":{"allowed_actions":["read","search"],"max_tool_calls":5},`,
	} {
		_, err := packet.ParseDraft([]byte(strings.Replace(minimalDraft, member, "", 1)))
		field, _, _ := strings.Cut(strings.TrimPrefix(member, `"`), `"`)
		wantFault(t, err, fault.Malformed, field)
	}
	d, err := packet.ParseDraft([]byte(with(`"from_agent":"agent:planner"`)))
	if err != nil || d.FromAgent() != "agent:planner" || d.ToAgent() != "agent:vwGcRV8F51znTKAq" {
		t.Errorf("%v: from %q to %q", err, d.FromAgent(), d.ToAgent())
	}
}

// TestCompleteBoundsTheResult has a draft of allowed size whose escapes would make the packet too large.
func TestCompleteBoundsTheResult(t *testing.T) {
	draft := strings.Replace(minimalDraft, "Example Corp", strings.Repeat("é", 100_000), 1)
	_, err := complete(draft, testFill(t))
	wantFault(t, err, fault.TooLarge, "")

	base, err := complete(minimalDraft, testFill(t))
	if err != nil {
		t.Fatal(err)
	}
	room := packet.MaxTask - len(base.Seal(signature.NewDirect(make([]byte, 64))))
	for extra, code := range map[int]fault.Code{0: "", 1: fault.TooLarge} {
		draft := strings.Replace(minimalDraft, "Example Corp", "Example Corp"+strings.Repeat("x", room+extra), 1)
		u, err := complete(draft, testFill(t))
		if fault.CodeOf(err) != code {
			t.Errorf("%d bytes over the limit: %v", extra, err)
		}
		if err == nil && len(u.Seal(signature.NewDirect(make([]byte, 64)))) != packet.MaxTask {
			t.Error("the limit is not met exactly")
		}
	}
}

func TestCompleteWithoutKey(t *testing.T) {
	f := testFill(t)
	f.PublicKey = ident.PublicKey{}
	_, err := complete(minimalDraft, f)
	wantFault(t, err, fault.Internal, "")
}

// TestRoundTrip: whatever a caller sends, what is sealed parses, with the bytes that were signed.
func TestRoundTrip(t *testing.T) {
	fill := testFill(t)
	rapid.Check(t, func(t *rapid.T) {
		draft, err := json.Marshal(drawDraft(t))
		if err != nil {
			t.Fatal(err)
		}
		u, err := complete(string(draft), fill)
		if err != nil {
			t.Fatalf("%s: %v", draft, err)
		}
		sealed := u.Seal(signature.NewDirect(rapid.SliceOfN(rapid.Byte(), 64, 64).Draw(t, "signature")))
		p, err := packet.Parse(sealed)
		if err != nil {
			t.Fatalf("%s: %v", sealed, err)
		}
		if !bytes.Equal(p.SigningBytes(), u.SigningBytes()) {
			t.Fatalf("%s\n%s", u.SigningBytes(), p.SigningBytes())
		}
	})
}

func drawDraft(t *rapid.T) map[string]any {
	text := rapid.OneOf(rapid.String(), rapid.StringMatching(`[a-z\x00-\x1f"\\/\x7fé😀]{0,8}`))
	d := map[string]any{
		"task_id":     rapid.StringMatching(`[a-z😀é"]{1,20}`).Draw(t, "task"),
		"to_agent":    "agent:b",
		"intent":      text.Draw(t, "intent"),
		"permissions": map[string]any{"allowed_actions": rapid.SliceOfDistinct(text, rapid.ID).Draw(t, "actions")},
		"context":     drawObject(t, text, 3),
		"memory_refs": rapid.SliceOf(text).Draw(t, "refs"),
	}
	if rapid.Bool().Draw(t, "risk") {
		d["risk_level"] = rapid.SampledFrom([]string{"read", "write"}).Draw(t, "level")
		d["ttl_seconds"] = rapid.IntRange(1, 120).Draw(t, "ttl")
	}
	if rapid.Bool().Draw(t, "constraints") {
		d["constraints"] = map[string]any{"data_boundary": text.Draw(t, "boundary")}
	}
	if rapid.Bool().Draw(t, "ai") {
		o := drawObject(t, text, 2)
		o["source"] = "llm"
		d["ai_provenance"] = o
	}
	return d
}

func drawObject(t *rapid.T, text *rapid.Generator[string], depth int) map[string]any {
	o := map[string]any{}
	for range rapid.IntRange(0, 4).Draw(t, "members") {
		o[text.Draw(t, "key")] = drawValue(t, text, depth-1)
	}
	return o
}

func drawValue(t *rapid.T, text *rapid.Generator[string], depth int) any {
	kind := rapid.IntRange(0, 6).Draw(t, "kind")
	switch {
	case kind == 0 && depth > 0:
		return drawObject(t, text, depth)
	case kind == 1 && depth > 0:
		return []any{drawValue(t, text, depth-1), drawValue(t, text, depth-1)}
	case kind == 2:
		return rapid.Float64().Draw(t, "float")
	case kind == 3:
		return rapid.Int64().Draw(t, "int")
	case kind == 4:
		return rapid.Bool().Draw(t, "bool")
	case kind == 5:
		return nil
	}
	return text.Draw(t, "text")
}
