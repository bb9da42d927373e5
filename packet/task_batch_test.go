package packet_test

import (
	"strings"
	"testing"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/packet"
	"github.com/trustd/trustd/signature"
)

// TestBatchedSignatureText: a batched signature stands where a direct one does, outside the signed bytes, and in its one
// canonical text.
func TestBatchedSignatureText(t *testing.T) {
	good := signature.NewTree(make([]signature.Hash, 5)).Sign(4, signature.Salt{1}, make([]byte, 64)).Text()
	direct := string(vectors(t).signed(1))
	at := strings.Index(direct, `"signature":"`) + len(`"signature":"`)
	end := at + strings.IndexByte(direct[at:], '"')
	with := func(text string) string { return direct[:at] + text + direct[end:] }
	plain, err := packet.Parse([]byte(direct))
	if err != nil {
		t.Fatal(err)
	}
	p, err := packet.Parse([]byte(with(good)))
	if err != nil {
		t.Fatal(err)
	}
	if p.SignatureText != good || string(p.SigningBytes()) != string(plain.SigningBytes()) {
		t.Error("the signature is part of what is signed")
	}
	for name, text := range map[string]string{
		"prefix alone":    signature.BatchPrefix,
		"padded":          good + "=",
		"standard base64": strings.NewReplacer("-", "+", "_", "/").Replace(good) + "+/",
		"line break":      good[:40] + `\n` + good[40:],
		"space":           good[:40] + " " + good[40:],
		"loose last bits": good[:len(good)-1] + "B",
		"other version":   strings.Replace(good, ".v1:", ".v2:", 1),
		"upper-case":      strings.Replace(good, "trustd", "Trustd", 1),
		"longer than any": signature.BatchPrefix + strings.Repeat("AAAA", signature.MaxText/4),
	} {
		if _, err := packet.Parse([]byte(with(text))); fault.CodeOf(err) != fault.Malformed {
			t.Errorf("%s: %v", name, err)
		}
	}
}
