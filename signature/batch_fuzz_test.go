package signature_test

import (
	"strings"
	"testing"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signature"
)

// FuzzParse reads any text as a signature of any algorithm: what parses has this one text and the place that its bytes
// say, and is no signature by a key of its algorithm.
func FuzzParse(f *testing.F) {
	for alg := range ident.Algorithm(8) {
		raw := make([]byte, alg.SignatureSize())
		f.Add(uint8(alg), signature.EncodeText(raw))
		for _, n := range []int{2, 3, 5, 300} {
			f.Add(uint8(alg), signature.NewTree(benchLeaves(n)).Sign(n-1, signature.Salt{1}, raw).Text())
		}
	}
	subject := subjectOf(f, "message")
	f.Fuzz(func(t *testing.T, alg uint8, text string) {
		sig, err := signature.Parse(ident.Algorithm(alg), text)
		if err != nil {
			if fault.CodeOf(err) != fault.Malformed || !sig.IsZero() || strings.Contains(err.Error(), text) && len(text) > 40 {
				t.Errorf("%q: %v", text, err)
			}
			return
		}
		if sig.Text() != text || len(text) > signature.MaxText {
			t.Errorf("%q is another text of %q", text, sig.Text())
		}
		at, size := sig.Place()
		batched := strings.HasPrefix(text, signature.BatchPrefix)
		if batched != (sig.Mode() == signature.Batched) || batched != (size >= signature.MinBatch) || size > signature.MaxBatch ||
			at < 0 || at > 0 && at >= size {
			t.Errorf("%q: %v, %d of %d", text, sig.Mode(), at, size)
		}
		if len(sig.Raw()) != ident.Algorithm(alg).SignatureSize() {
			t.Errorf("%q has a signature of %d bytes", text, len(sig.Raw()))
		}
		for _, name := range []string{"ed25519", "p256"} {
			if sig.Verify(pairs()[name].public, subject, nil) == nil {
				t.Errorf("%q is a forged signature", text)
			}
		}
	})
}
