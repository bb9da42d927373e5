package packet_test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/packet"
	"github.com/trustd/trustd/signature"
)

// golden is testdata/trusthandoff-0.4.0.json, made by TrustHandoff 0.4.0 itself.
type golden struct {
	Identities []struct {
		PEM     string `json:"pub_pem"`
		AgentID string `json:"agent_id"`
		Seed    string `json:"seed"`
	} `json:"identities"`
	Packets []struct {
		Name         string `json:"name"`
		SigningBytes string `json:"signing_bytes"`
		SHA256       string `json:"sha256"`
		Len          int    `json:"len"`
		Signature    string `json:"signature"`
	} `json:"packets"`
	Dates   [][4]json.RawMessage `json:"datetime_forms"`
	Numbers [][2]string          `json:"number_forms"`
}

func vectors(t testing.TB) *golden {
	t.Helper()
	b, err := os.ReadFile("testdata/trusthandoff-0.4.0.json")
	if err != nil {
		t.Fatal(err)
	}
	var g golden
	if err := json.Unmarshal(b, &g); err != nil {
		t.Fatal(err)
	}
	if len(g.Packets) != 3 || len(g.Identities) != 2 || len(g.Dates) != 15 || len(g.Numbers) != 22 {
		t.Fatal("the vectors are not complete")
	}
	return &g
}

// signed returns the wire text of a packet: its signing bytes with the signature put in.
func (g *golden) signed(i int) []byte {
	return withSignature(g.Packets[i].SigningBytes, g.Packets[i].Signature)
}

func withSignature(signing, text string) []byte {
	return []byte(strings.TrimSuffix(signing, "}") + `,"signature":"` + text + `"}`)
}

func (g *golden) key(t testing.TB, i int) ident.PublicKey {
	t.Helper()
	k, err := ident.ParsePEM(g.Identities[i].PEM)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestGoldenPackets(t *testing.T) {
	g := vectors(t)
	for i, v := range g.Packets {
		t.Run(v.Name, func(t *testing.T) {
			p, err := packet.Parse(g.signed(i))
			if err != nil {
				t.Fatal(err)
			}
			got := p.SigningBytes()
			if string(got) != v.SigningBytes {
				t.Fatalf("signing bytes\n%s\nwant\n%s", got, v.SigningBytes)
			}
			if sum := sha256.Sum256(got); hex.EncodeToString(sum[:]) != v.SHA256 || len(got) != v.Len {
				t.Errorf("%d bytes of digest %x", len(got), sum)
			}
			if string(p.JSON()) != string(g.signed(i)) {
				t.Error("JSON is not the text that was parsed")
			}
			sig, err := signature.ParseText(ident.Ed25519, p.SignatureText)
			if err != nil {
				t.Fatal(err)
			}
			if p.PublicKeyPEM != g.Identities[0].PEM || p.FromAgent != g.Identities[0].AgentID {
				t.Error("not the key or the agent of the vector")
			}
			if err := signature.Verify(g.key(t, 0), got, sig); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestGoldenLegacy is TH-P1 as TrustHandoff 0.3.3 signed it.
func TestGoldenLegacy(t *testing.T) {
	const text = "i6ayYbqWm/zJ/Lj29i8RU5pzUK5jGRWNrbK9YuMzgoxLTwTWMWPvbaWzADWKOHcxS9WaK0vzuxRIENL4wXPaDg=="
	const sum = "8008952c6f388c2375fd8a3db4d91442995b705f22f0f5aea723f3da0e885327"
	g := vectors(t)
	p, err := packet.Parse(withSignature(g.Packets[0].SigningBytes, text))
	if err != nil {
		t.Fatal(err)
	}
	got := p.LegacySigningBytes()
	if len(got) != 1 {
		t.Fatalf("%d candidates: the newer members are on the wire, so that only 0.3.3 can have signed them", len(got))
	}
	if d := sha256.Sum256(got[0]); hex.EncodeToString(d[:]) != sum || len(got[0]) != 679 {
		t.Errorf("%d bytes of digest %x:\n%s", len(got[0]), d, got[0])
	}
	sig, err := signature.ParseText(ident.Ed25519, p.SignatureText)
	if err != nil {
		t.Fatal(err)
	}
	if err := signature.Verify(g.key(t, 0), got[0], sig); err != nil {
		t.Error(err)
	}
	if err := signature.Verify(g.key(t, 0), p.SigningBytes(), sig); err == nil {
		t.Error("the legacy signature verifies over the bytes of 0.4.0")
	}
}

func TestTaskFields(t *testing.T) {
	p, err := packet.Parse(vectors(t).signed(1))
	if err != nil {
		t.Fatal(err)
	}
	check := func(name string, got, want any) {
		t.Helper()
		if got != want {
			t.Errorf("%s is %v, not %v", name, got, want)
		}
	}
	check("packet_id", p.PacketID, "pk-002")
	check("task_id", p.TaskID, "task-002")
	check("to_agent", p.ToAgent, "agent:vwGcRV8F51znTKAq")
	check("nonce", p.Nonce, "n-é-😀")
	check("intent", p.Intent, "déploy \"x\"\n<&>/\u2028\x7f")
	check("signature_algo", p.SignatureAlgo, "Ed25519")
	check("issued_at", p.IssuedAt.Instant, time.Date(2026, 3, 8, 10, 0, 0, 123400000, time.UTC))
	check("expires_at", p.ExpiresAt.String(), "2026-03-08T12:02:00.123400+02:00")
	check("offset", p.ExpiresAt.Offset, 2*time.Hour)
	check("risk_level", p.RiskLevel, packet.Optional[string]{Value: "write", Set: true})
	check("ttl_seconds", p.TTLSeconds, packet.Optional[int64]{Value: 120, Set: true})
	check("actions", strings.Join(p.Permissions.AllowedActions, " "), "write deploy")
	check("max_tool_calls", p.Permissions.MaxToolCalls.Set, false)
	check("data_boundary", p.Constraints.Value.DataBoundary.Value, "eu")
	check("max_runtime_seconds", p.Constraints.Value.MaxRuntimeSeconds.Value, int64(30))
	check("requires_human_review", p.Constraints.Value.RequiresHumanReview.Value, true)
	check("origin_workflow", p.Provenance.Value.OriginWorkflow.Value, "wf")
	check("delegation_depth", p.Provenance.Value.DelegationDepth.Value, int64(1))
	check("ai_provenance", p.AIProvenance, packet.AIProvenance{Present: true, Source: "llm"})
	check("memory_refs", strings.Join(p.MemoryRefs, " "), "m1 m2")
	check("goal", p.Goal.Value, "g")
	check("task_type", p.TaskType.Value, "deploy")
	check("capability_token", p.CapabilityToken.Set, false)
	v, ok := p.ContextValue("a")
	check("context.a", string(v), `{"B":1e+16,"b":[1,2.5,true,null,"\u00fc"]}`)
	check("context.a", ok, true)
	_, ok = p.ContextValue("B")
	check("context.B", ok, false)
	if !json.Valid(p.Context()) || p.Context()[0] != '{' {
		t.Errorf("context is %s", p.Context())
	}
}
