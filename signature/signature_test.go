package signature_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/asn1"
	"encoding/base64"
	"encoding/hex"
	"math/big"
	"strings"
	"sync"
	"testing"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signature"
)

// A pair is a key and what signs with it.
type pair struct {
	public ident.PublicKey
	sign   func(msg []byte) []byte
}

// pairs returns a key of each kind; RSA with 2048 bits only.
var pairs = sync.OnceValue(func() map[string]pair {
	must := func(err error) {
		if err != nil {
			panic(err)
		}
	}
	public := func(k crypto.PublicKey) ident.PublicKey {
		p, err := ident.NewPublicKey(k)
		must(err)
		return p
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	must(err)
	out := map[string]pair{"ed25519": {public(ed.Public()), func(m []byte) []byte { return ed25519.Sign(ed, m) }}}
	for name, curve := range map[string]elliptic.Curve{"p256": elliptic.P256(), "p384": elliptic.P384()} {
		k, err := ecdsa.GenerateKey(curve, rand.Reader)
		must(err)
		p := public(&k.PublicKey)
		out[name] = pair{p, func(m []byte) []byte {
			r, s, err := ecdsa.Sign(rand.Reader, k, signature.Digest(p.Algorithm(), m))
			must(err)
			return fixed(p.Algorithm().SignatureSize(), r, s)
		}}
	}
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	must(err)
	out["rsa"] = pair{public(&k.PublicKey), func(m []byte) []byte {
		sig, err := rsa.SignPSS(rand.Reader, k, crypto.SHA256, signature.Digest(ident.RSA2048, m), signature.PSSOptions())
		must(err)
		return sig
	}}
	out["rsa, other salt"] = pair{public(&k.PublicKey), func(m []byte) []byte {
		sig, err := rsa.SignPSS(rand.Reader, k, crypto.SHA256, signature.Digest(ident.RSA2048, m),
			&rsa.PSSOptions{SaltLength: 20, Hash: crypto.SHA256})
		must(err)
		return sig
	}}
	out["rsa, PKCS#1 v1.5"] = pair{public(&k.PublicKey), func(m []byte) []byte {
		sig, err := rsa.SignPKCS1v15(rand.Reader, k, crypto.SHA256, signature.Digest(ident.RSA2048, m))
		must(err)
		return sig
	}}
	return out
})

func fixed(size int, r, s *big.Int) []byte {
	sig := make([]byte, size)
	r.FillBytes(sig[:size/2])
	s.FillBytes(sig[size/2:])
	return sig
}

func wantInvalid(t *testing.T, what string, err error) {
	t.Helper()
	if fault.CodeOf(err) != fault.InvalidSignature {
		t.Errorf("%s: %v, want invalid_signature", what, err)
	}
}

func TestVerify(t *testing.T) {
	msg := []byte("message")
	for _, name := range []string{"ed25519", "p256", "p384", "rsa"} {
		t.Run(name, func(t *testing.T) {
			k := pairs()[name]
			sig := k.sign(msg)
			if err := signature.Verify(k.public, msg, sig); err != nil {
				t.Fatal(err)
			}
			if err := signature.Verify(k.public, nil, k.sign(nil)); err != nil {
				t.Errorf("the empty message: %v", err)
			}
			for i := range sig {
				bent := bytes.Clone(sig)
				bent[i] ^= 1 << (i % 8)
				wantInvalid(t, "one bit changed", signature.Verify(k.public, msg, bent))
			}
			wantInvalid(t, "another message", signature.Verify(k.public, []byte("Message"), sig))
			wantInvalid(t, "truncated", signature.Verify(k.public, msg, sig[:len(sig)-1]))
			wantInvalid(t, "a byte more", signature.Verify(k.public, msg, append(bytes.Clone(sig), 0)))
			wantInvalid(t, "a zero before", signature.Verify(k.public, msg, append([]byte{0}, sig...)))
			wantInvalid(t, "nothing", signature.Verify(k.public, msg, nil))
			wantInvalid(t, "zeros", signature.Verify(k.public, msg, make([]byte, len(sig))))
			wantInvalid(t, "ones", signature.Verify(k.public, msg, bytes.Repeat([]byte{0xff}, len(sig))))
			wantInvalid(t, "no key", signature.Verify(ident.PublicKey{}, msg, sig))
			for other, o := range pairs() {
				if !o.public.Equal(k.public) {
					wantInvalid(t, "the key "+other, signature.Verify(o.public, msg, sig))
				}
			}
		})
	}
}

func TestVerifyRefusesOtherForms(t *testing.T) {
	msg := []byte("message")
	for _, name := range []string{"rsa, other salt", "rsa, PKCS#1 v1.5"} {
		k := pairs()[name]
		wantInvalid(t, name, signature.Verify(k.public, msg, k.sign(msg)))
	}
	for _, name := range []string{"p256", "p384"} {
		k := pairs()[name]
		size := k.public.Algorithm().SignatureSize()
		sig := k.sign(msg)
		r, s := new(big.Int).SetBytes(sig[:size/2]), new(big.Int).SetBytes(sig[size/2:])
		der, err := asn1.Marshal(struct{ R, S *big.Int }{r, s})
		if err != nil {
			t.Fatal(err)
		}
		wantInvalid(t, name+" DER", signature.Verify(k.public, msg, der))
		wantInvalid(t, name+" r and s swapped", signature.Verify(k.public, msg, fixed(size, s, r)))
		n := k.public.Key().(*ecdsa.PublicKey).Params().N
		wantInvalid(t, name+" r = 0", signature.Verify(k.public, msg, fixed(size, new(big.Int), s)))
		wantInvalid(t, name+" s = n", signature.Verify(k.public, msg, fixed(size, r, n)))
	}
	// A DER signature may be as long as the fixed width; it must fail all the same, not be taken for r||s.
	k := pairs()["p256"]
	der := append([]byte{0x30, 62, 2, 29}, bytes.Repeat([]byte{1}, 60)...)
	wantInvalid(t, "DER of 64 bytes", signature.Verify(k.public, msg, der[:64]))
	// s + L, the other scalar of an Ed25519 signature (RFC 8032 section 8.4).
	e := pairs()["ed25519"]
	sig := e.sign(msg)
	l, _ := new(big.Int).SetString("7237005577332262213973186563042994240857116359379907606001950938285454250989", 10)
	sum := new(big.Int).Add(new(big.Int).SetBytes(reversed(sig[32:])), l)
	wantInvalid(t, "ed25519 s + L", signature.Verify(e.public, msg, append(bytes.Clone(sig[:32]), reversed(sum.FillBytes(make([]byte, 32)))...)))
}

func reversed(b []byte) []byte {
	out := make([]byte, len(b))
	for i := range b {
		out[len(b)-1-i] = b[i]
	}
	return out
}

// TestKnownSignature is the second vector of RFC 8032 section 7.1.
func TestKnownSignature(t *testing.T) {
	unhex := func(s string) []byte {
		b, err := hex.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	pub, err := ident.NewPublicKey(ed25519.PublicKey(unhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")))
	if err != nil {
		t.Fatal(err)
	}
	sig := unhex("92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da" +
		"085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00")
	if err := signature.Verify(pub, []byte{0x72}, sig); err != nil {
		t.Error(err)
	}
}

func TestDigest(t *testing.T) {
	msg := []byte("message")
	for alg, size := range map[ident.Algorithm]int{ident.ECDSAP256: 32, ident.ECDSAP384: 48, ident.RSA2048: 32, ident.RSA4096: 32} {
		if got := len(signature.Digest(alg, msg)); got != size {
			t.Errorf("%v: a digest of %d bytes, want %d", alg, got, size)
		}
	}
	if !bytes.Equal(signature.Digest(ident.Ed25519, msg), msg) {
		t.Error("ed25519 signs a digest")
	}
}

func TestText(t *testing.T) {
	for _, alg := range ident.Algorithms() {
		sig := bytes.Repeat([]byte{0xa5}, alg.SignatureSize())
		text := signature.EncodeText(sig)
		got, err := signature.ParseText(alg, text)
		if err != nil || !bytes.Equal(got, sig) {
			t.Errorf("%v: %v", alg, err)
		}
		for name, bad := range map[string]string{
			"nothing":            "",
			"no padding":         strings.TrimRight(text, "="),
			"padding too many":   text + "=",
			"newline at the end": text + "\n",
			"newline for a byte": text[:4] + "\n" + text[5:],
			"CR for a byte":      text[:4] + "\r" + text[5:],
			"space":              text[:4] + " " + text[5:],
			"url alphabet":       strings.Repeat("_", len(text)-2) + text[len(text)-2:],
			"a byte less":        base64.StdEncoding.EncodeToString(sig[1:]),
			"a byte more":        base64.StdEncoding.EncodeToString(append(sig, 0)),
			"batched":            "trustd-batch.v1:" + text,
		} {
			// RSA of 3072 bits gives 384 bytes, a multiple of three: its text has no padding to drop.
			if got, err := signature.ParseText(alg, bad); bad != text && (fault.CodeOf(err) != fault.Malformed || got != nil) {
				t.Errorf("%v: %s passes", alg, name)
			}
		}
	}
	sig := bytes.Repeat([]byte{0}, 64)
	loose := strings.TrimSuffix(signature.EncodeText(sig), "A==") + "B=="
	if _, err := signature.ParseText(ident.Ed25519, loose); fault.CodeOf(err) != fault.Malformed {
		t.Error("loose last bits pass")
	}
	if _, err := signature.ParseText(0, ""); err == nil {
		t.Error("the empty text is a signature of an unknown algorithm")
	}
}

func TestDomainsArePrefixFree(t *testing.T) {
	all := signature.Domains()
	for i, a := range all {
		if !strings.HasPrefix(string(a), "trustd") || !strings.HasSuffix(string(a), "/v1\x00") || strings.Count(string(a), "\x00") != 1 {
			t.Errorf("%q is not a domain's form", a)
		}
		for j, b := range all {
			if i != j && strings.HasPrefix(string(a), string(b)) {
				t.Errorf("%q is a prefix of %q", b, a)
			}
		}
	}
}

func TestEncodeIsInjective(t *testing.T) {
	seen := map[string]string{}
	for _, d := range signature.Domains() {
		for name, fields := range map[string][][]byte{
			"none": {}, "empty": {{}}, "two empty": {{}, {}}, "ab": {[]byte("ab")}, "a b": {[]byte("a"), []byte("b")},
			"ab empty": {[]byte("ab"), {}}, "empty ab": {{}, []byte("ab")}, "a length": {{0, 0, 0, 0}},
			"length of one": {{0, 0, 0, 1, 'a'}}, "a": {[]byte("a")},
		} {
			b := string(signature.Encode(d, fields...))
			if !strings.HasPrefix(b, string(d)) {
				t.Errorf("%s does not begin with its domain", name)
			}
			if other, ok := seen[b]; ok {
				t.Errorf("%s and %s have one encoding", name, other)
			}
			seen[b] = name
		}
	}
}

func FuzzEncode(f *testing.F) {
	f.Add([]byte("a"), []byte("b"), []byte("ab"), []byte(""))
	f.Fuzz(func(t *testing.T, a, b, c, d []byte) {
		one := signature.Encode(signature.Message, a, b)
		two := signature.Encode(signature.Message, c, d)
		if bytes.Equal(one, two) != (bytes.Equal(a, c) && bytes.Equal(b, d)) {
			t.Errorf("(%x, %x) and (%x, %x) encode alike", a, b, c, d)
		}
		if bytes.Equal(one, signature.Encode(signature.Message, append(bytes.Clone(a), b...))) {
			t.Errorf("one field and two encode alike")
		}
	})
}

func FuzzVerify(f *testing.F) {
	for _, name := range []string{"ed25519", "p256", "p384", "rsa"} {
		f.Add(name, []byte("m"), pairs()[name].sign([]byte("m")))
	}
	f.Fuzz(func(t *testing.T, name string, msg, sig []byte) {
		k, ok := pairs()[name]
		if !ok || string(msg) == "m" {
			return
		}
		if signature.Verify(k.public, msg, sig) == nil {
			t.Error("a forged signature")
		}
	})
}

func FuzzParseText(f *testing.F) {
	f.Add(uint8(1), signature.EncodeText(make([]byte, 64)))
	f.Fuzz(func(t *testing.T, alg uint8, text string) {
		a := ident.Algorithm(alg)
		sig, err := signature.ParseText(a, text)
		if err == nil && (signature.EncodeText(sig) != text || len(sig) != a.SignatureSize()) {
			t.Errorf("%q is another text of a signature", text)
		}
	})
}
