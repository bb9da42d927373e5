package ident_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"strings"
	"testing"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
)

// The key of the first vector of RFC 8032, and TrustHandoff's name for it, computed with OpenSSL.
const (
	rfc8032Key  = "11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="
	rfc8032SPKI = "MCowBQYDK2VwAyEA" + rfc8032Key
	rfc8032PEM  = "-----BEGIN PUBLIC KEY-----\n" + rfc8032SPKI + "\n-----END PUBLIC KEY-----\n"
)

func decode(t testing.TB, b64 string) []byte {
	t.Helper()
	b, err := base64.StdEncoding.DecodeString(b64)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func newKeys(t testing.TB) map[ident.Algorithm]crypto.PublicKey {
	t.Helper()
	ed, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return map[ident.Algorithm]crypto.PublicKey{
		ident.Ed25519: ed, ident.ECDSAP256: &p256.PublicKey, ident.ECDSAP384: &p384.PublicKey,
		ident.RSA2048: modulus(2048), ident.RSA3072: modulus(3072), ident.RSA4096: modulus(4096),
	}
}

// modulus returns an RSA public key of that many bits whose factors nobody needs.
func modulus(bits int) *rsa.PublicKey {
	n := new(big.Int).Lsh(big.NewInt(1), uint(bits)-1)
	return &rsa.PublicKey{N: n.Add(n, big.NewInt(0x10001)), E: 65537}
}

func TestKeyForms(t *testing.T) {
	for alg, k := range newKeys(t) {
		p, err := ident.NewPublicKey(k)
		if err != nil {
			t.Errorf("%v: %v", alg, err)
			continue
		}
		if p.Algorithm() != alg || p.IsZero() || p.ID() != sha256.Sum256(p.SPKI()) {
			t.Errorf("%v: algorithm %v, id %v", alg, p.Algorithm(), p.ID())
		}
		fromDER, err1 := ident.ParseSPKI(p.SPKI())
		fromPEM, err2 := ident.ParsePEM(p.PEM())
		fromB64, err3 := ident.ParsePublicKey(p.Base64())
		var fromJSON ident.PublicKey
		text, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		err4 := json.Unmarshal(text, &fromJSON)
		for i, q := range []ident.PublicKey{fromDER, fromPEM, fromB64, fromJSON} {
			if !q.Equal(p) || q.ID() != p.ID() {
				t.Errorf("%v: form %d reads back as another key (%v %v %v %v)", alg, i, err1, err2, err3, err4)
			}
		}
		clear(p.SPKI()) // a copy
		if p.ID() != sha256.Sum256(p.SPKI()) {
			t.Errorf("%v: the caller can change the key", alg)
		}
	}
	var none ident.PublicKey
	if !none.IsZero() || none.Equal(fixed(t)) || !none.Equal(ident.PublicKey{}) {
		t.Error("the zero key is a key")
	}
}

func fixed(t testing.TB) ident.PublicKey {
	t.Helper()
	p, err := ident.ParsePublicKey(rfc8032Key)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestKnownKey(t *testing.T) {
	p := fixed(t)
	if p.PEM() != rfc8032PEM || p.Base64() != rfc8032SPKI {
		t.Errorf("PEM %q, SPKI %q", p.PEM(), p.Base64())
	}
	if got := ident.DerivedAlias(p).String(); got != "agent:fy2e0LcbjlpsXPMO" || !ident.DerivedAlias(p).Derived() {
		t.Errorf("DerivedAlias = %s", got)
	}
}

func TestRefusedKeys(t *testing.T) {
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	e3 := modulus(2048)
	e3.E = 3
	for name, c := range map[string]struct {
		key  crypto.PublicKey
		code fault.Code
	}{
		"nil":        {nil, fault.AlgorithmUnsupported},
		"other type": {"key", fault.AlgorithmUnsupported},
		"P-224":      {&p224.PublicKey, fault.AlgorithmUnsupported},
		"P-521":      {&p521.PublicKey, fault.AlgorithmUnsupported},
		//lint:ignore SA1019 keys that no constructor makes are what this refuses
		"no curve": {&ecdsa.PublicKey{X: big.NewInt(1), Y: big.NewInt(1)}, fault.AlgorithmUnsupported},
		//lint:ignore SA1019 see above
		"off the curve": {&ecdsa.PublicKey{Curve: elliptic.P256(), X: big.NewInt(1), Y: big.NewInt(1)}, fault.Malformed},
		//lint:ignore SA1019 see above
		"infinity":       {&ecdsa.PublicKey{Curve: elliptic.P256(), X: new(big.Int), Y: new(big.Int)}, fault.Malformed},
		"RSA 1024":       {modulus(1024), fault.AlgorithmUnsupported},
		"RSA 2047":       {modulus(2047), fault.AlgorithmUnsupported},
		"RSA 8192":       {modulus(8192), fault.AlgorithmUnsupported},
		"RSA exponent 3": {e3, fault.Malformed},
		"3 bytes":        {ed25519.PublicKey{1, 2, 3}, fault.Malformed},
		"no bytes":       {ed25519.PublicKey(nil), fault.Malformed},
		"33 bytes":       {ed25519.PublicKey(make([]byte, 33)), fault.Malformed},
	} {
		p, err := ident.NewPublicKey(c.key)
		if fault.CodeOf(err) != c.code || !p.IsZero() {
			t.Errorf("%s: %v, want %s", name, err, c.code)
		}
	}
}

// smallOrder holds every encoding of the eight points whose order divides 8, canonical and not, with either sign
// bit; and one y-coordinate beyond the prime that is of no small order.
var smallOrder = []string{
	"0000000000000000000000000000000000000000000000000000000000000000",
	"0000000000000000000000000000000000000000000000000000000000000080",
	"0100000000000000000000000000000000000000000000000000000000000000",
	"0100000000000000000000000000000000000000000000000000000000000080",
	"26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
	"26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
	"c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
	"c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
	"ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	"ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
	"edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	"edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
	"eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
	"eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
	"f0ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
}

func TestSmallOrderPoints(t *testing.T) {
	for _, h := range smallOrder {
		raw, err := hex.DecodeString(h)
		if err != nil {
			t.Fatal(err)
		}
		_, err = ident.ParsePublicKey(base64.StdEncoding.EncodeToString(raw))
		wantMalformed(t, err, "public_key")
		_, err = ident.ParseSPKI(append(decode(t, rfc8032SPKI)[:12], raw...))
		wantMalformed(t, err, "public_key")
	}
}

func TestParseSPKIRefuses(t *testing.T) {
	good := decode(t, rfc8032SPKI)
	p384 := newKeys(t)[ident.ECDSAP384].(*ecdsa.PublicKey)
	ec, err := x509.MarshalPKIXPublicKey(p384)
	if err != nil {
		t.Fatal(err)
	}
	withNull := append([]byte{0x30, 0x2c, 0x30, 0x07, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x05, 0x00}, good[9:]...)
	longLength := append([]byte{0x30, 0x81, 0x2a}, good[2:]...)
	for name, der := range map[string][]byte{
		"nothing":             nil,
		"truncated":           good[:len(good)-1],
		"trailing byte":       append(bytes.Clone(good), 0),
		"trailing key":        append(bytes.Clone(good), good...),
		"long form of length": longLength,
		"NULL parameters":     withNull,
		"indefinite length":   append(append([]byte{0x30, 0x80}, good[2:]...), 0, 0),
		"compressed point":    compressed(t, ec, p384),
		"a private key":       privateDER(t),
	} {
		_, err := ident.ParseSPKI(der)
		wantMalformed(t, err, "public_key")
		if err == nil {
			t.Errorf("%s passes", name)
		}
	}
}

// compressed writes the point of an SPKI in its compressed form.
func compressed(t *testing.T, der []byte, k *ecdsa.PublicKey) []byte {
	t.Helper()
	full, err := k.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	size := (len(full) - 1) / 2
	point := append([]byte{2 + full[len(full)-1]&1}, full[1:1+size]...)
	head := bytes.Clone(der[:len(der)-len(full)])
	// The lengths of the outer SEQUENCE and of the BIT STRING shrink by what the point lost.
	head[1] -= byte(len(full) - len(point))
	head[len(head)-2] -= byte(len(full) - len(point))
	return append(head, point...)
}

func privateDER(t *testing.T) []byte {
	t.Helper()
	_, k, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestParsePEMRefuses(t *testing.T) {
	for name, text := range map[string]string{
		"nothing":          "",
		"no final newline": strings.TrimSuffix(rfc8032PEM, "\n"),
		"two newlines":     rfc8032PEM + "\n",
		"CRLF":             strings.ReplaceAll(rfc8032PEM, "\n", "\r\n"),
		"text before":      "x\n" + rfc8032PEM,
		"blank before":     "\n" + rfc8032PEM,
		"text after":       rfc8032PEM + "x",
		"two keys":         rfc8032PEM + rfc8032PEM,
		"header":           strings.Replace(rfc8032PEM, "KEY-----\n", "KEY-----\nA: b\n\n", 1),
		"short lines":      strings.Replace(rfc8032PEM, "MCow", "MCow\n", 1),
		"space":            strings.Replace(rfc8032PEM, "MCow", "MCow ", 1),
		"other type":       strings.ReplaceAll(rfc8032PEM, "PUBLIC KEY", "RSA PUBLIC KEY"),
		"private":          string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: privateDER(t)})),
	} {
		_, err := ident.ParsePEM(text)
		wantMalformed(t, err, "public_key")
		if err == nil {
			t.Errorf("%s passes", name)
		}
	}
}

func TestParsePublicKeyRefuses(t *testing.T) {
	raw := decode(t, rfc8032Key)
	for name, s := range map[string]string{
		"nothing":            "",
		"no padding":         strings.TrimRight(rfc8032Key, "="),
		"url alphabet":       base64.URLEncoding.EncodeToString(raw),
		"newline":            rfc8032Key + "\n",
		"newline inside":     rfc8032Key[:8] + "\n" + rfc8032Key[8:],
		"loose last bits":    strings.TrimSuffix(rfc8032Key, "o=") + "p=",
		"31 bytes":           base64.StdEncoding.EncodeToString(raw[:31]),
		"3 bytes":            base64.StdEncoding.EncodeToString(raw[:3]),
		"64 bytes":           base64.StdEncoding.EncodeToString(append(bytes.Clone(raw), raw...)),
		"PEM":                rfc8032PEM,
		"hexadecimal digits": hex.EncodeToString(raw),
	} {
		_, err := ident.ParsePublicKey(s)
		wantMalformed(t, err, "public_key")
		if err == nil {
			t.Errorf("%s passes", name)
		}
	}
	var p ident.PublicKey
	for _, s := range []string{`7`, `null`, `"x"`, `"` + rfc8032Key + `"`, `{}`} {
		if err := json.Unmarshal([]byte(s), &p); err == nil || !p.IsZero() {
			t.Errorf("the JSON %s is a key", s)
		}
	}
}

func TestAlgorithms(t *testing.T) {
	wire := map[ident.Algorithm]string{ident.Ed25519: "Ed25519", ident.ECDSAP256: "ES256", ident.ECDSAP384: "ES384",
		ident.RSA2048: "PS256", ident.RSA3072: "PS256", ident.RSA4096: "PS256"}
	for i, a := range ident.Algorithms() {
		if int(a) != i+1 {
			t.Errorf("%v has the number %d; records hold these", a, a)
		}
		b, err := ident.ParseAlgorithm(a.String())
		if err != nil || b != a || a.Wire() != wire[a] || !a.Valid() || a.SignatureSize() == 0 {
			t.Errorf("%v: %v, %v, wire %q", a, b, err, a.Wire())
		}
		var c ident.Algorithm
		text, err := a.MarshalText()
		if err != nil || c.UnmarshalText(text) != nil || c != a {
			t.Errorf("%v: the text %s does not read back", a, text)
		}
	}
	for _, a := range []ident.Algorithm{0, 7, 255} {
		if _, err := a.MarshalText(); err == nil || a.Valid() || a.SignatureSize() != 0 || a.String() != "unknown" || a.Wire() != "unknown" {
			t.Errorf("the algorithm %d is known", uint8(a))
		}
	}
	for _, s := range []string{"", "Ed25519", "ed25519 ", "rsa", "RSA-2048", "ES256", "unknown"} {
		_, err := ident.ParseAlgorithm(s)
		wantMalformed(t, err, "algorithm")
	}
}

func FuzzParseSPKI(f *testing.F) {
	for _, k := range newKeys(f) {
		p, err := ident.NewPublicKey(k)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(p.SPKI())
	}
	f.Fuzz(func(t *testing.T, der []byte) {
		p, err := ident.ParseSPKI(der)
		if err != nil {
			if !p.IsZero() {
				t.Error("refused and returned")
			}
			return
		}
		if !bytes.Equal(p.SPKI(), der) || p.ID() != sha256.Sum256(der) {
			t.Error("a key has two encodings")
		}
		if q, err := ident.ParsePEM(p.PEM()); err != nil || !q.Equal(p) {
			t.Errorf("the PEM does not read back: %v", err)
		}
		if q, err := ident.ParsePublicKey(p.Base64()); err != nil || !q.Equal(p) {
			t.Errorf("the base64 does not read back: %v", err)
		}
	})
}

func FuzzParsePEM(f *testing.F) {
	f.Add(rfc8032PEM)
	f.Add(strings.ReplaceAll(rfc8032PEM, "\n", "\r\n"))
	f.Fuzz(func(t *testing.T, text string) {
		if p, err := ident.ParsePEM(text); err == nil && p.PEM() != text {
			t.Error("a key has two PEM texts, and so two names")
		}
	})
}

func FuzzParsePublicKey(f *testing.F) {
	f.Add(rfc8032Key)
	f.Add(rfc8032SPKI)
	f.Fuzz(func(t *testing.T, s string) {
		p, err := ident.ParsePublicKey(s)
		if err != nil {
			return
		}
		raw, _ := p.Key().(ed25519.PublicKey)
		if p.Base64() != s && base64.StdEncoding.EncodeToString(raw) != s {
			t.Error("a key has a third text")
		}
	})
}
