package packet_test

import (
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/packet"
	"github.com/trustd/trustd/signature"
)

// legacyVector is what an old TrustHandoff sent and what it signed, with the pydantic it ran on.
type legacyVector struct {
	TrustHandoff string `json:"trusthandoff"`
	Pydantic     string `json:"pydantic"`
	Wire         string `json:"wire"`
	Signed       string `json:"signed"`
}

func legacyVectors(t testing.TB) []legacyVector {
	t.Helper()
	b, err := os.ReadFile("testdata/legacy.json")
	if err != nil {
		t.Fatal(err)
	}
	var v []legacyVector
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatal(err)
	}
	if len(v) != 4 {
		t.Fatal("the vectors are not complete")
	}
	return v
}

func TestLegacy(t *testing.T) {
	pub := vectors(t).key(t, 0)
	for _, v := range legacyVectors(t) {
		t.Run(v.TrustHandoff+"/"+v.Pydantic, func(t *testing.T) {
			p, err := packet.Parse([]byte(v.Wire))
			if err != nil {
				t.Fatal(err)
			}
			all := p.LegacySigningBytes()
			at := slices.IndexFunc(all, func(b []byte) bool { return string(b) == v.Signed })
			if at < 0 {
				t.Fatalf("not among the candidates:\n%s\n%s", v.Signed, all)
			}
			sig, err := signature.ParseText(ident.Ed25519, p.SignatureText)
			if err != nil {
				t.Fatal(err)
			}
			if err := signature.Verify(pub, all[at], sig); err != nil {
				t.Error(err)
			}
			if signature.Verify(pub, p.SigningBytes(), sig) == nil {
				t.Error("the signature covers the bytes of 0.4.0 too")
			}
		})
	}
}

// TestLegacyLeavesNothingUnsigned adds to a packet of 0.3.2 each member that 0.3.2 does not sign: the form without
// them is then no candidate.
func TestLegacyLeavesNothingUnsigned(t *testing.T) {
	var old legacyVector
	for _, v := range legacyVectors(t) {
		if v.TrustHandoff == "0.3.2" {
			old = v
		}
	}
	for _, add := range []string{
		`"risk_level": null`, `"risk_level": "read"`, `"ttl_seconds": null`, `"ttl_seconds": 900`,
		`"ai_provenance": null`,
		`"ai_provenance": {"source": "llm"}`,
	} {
		notCandidate(t, `{`+add+`, `+strings.TrimPrefix(old.Wire, "{"), old.Signed)
	}
	for _, value := range []string{"true", "false", "null"} {
		notCandidate(t, strings.Replace(old.Wire, `"max_runtime_seconds"`,
			`"requires_human_review": `+value+`, "max_runtime_seconds"`, 1),
			old.Signed)
	}
}

func notCandidate(t *testing.T, wire, signed string) {
	t.Helper()
	p, err := packet.Parse([]byte(wire))
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range p.LegacySigningBytes() {
		if string(b) == signed {
			t.Errorf("the old signature verifies a packet that was added to: %.60s", wire)
		}
	}
}
