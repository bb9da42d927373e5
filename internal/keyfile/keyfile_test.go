package keyfile_test

import (
	"bytes"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/keyfile"
)

var pass = []byte("correct horse battery staple")

// The strength of the package as it is delivered; TestMain lowers it.
var fullPEM, fullJWK, fullRaw = keyfile.Strength()

func TestMain(m *testing.M) {
	keyfile.SetStrength(1000, 1000, keyfile.Cost{LogN: 4, R: 8, P: 1})
	os.Exit(m.Run())
}

func TestStrength(t *testing.T) {
	if fullPEM < 600_000 || fullJWK < 600_000 || fullRaw.LogN < 16 || fullRaw.R < 8 || fullRaw.P < 2 {
		t.Errorf("keys are written with %d, %d, %+v", fullPEM, fullJWK, fullRaw)
	}
}

// TestLongFullStrength writes and reads with the cost of production, which is within what is read.
func TestLongFullStrength(t *testing.T) {
	if os.Getenv("TRUSTD_LONG") == "" {
		t.Skip("set TRUSTD_LONG to derive keys at full cost")
	}
	keyfile.SetStrength(fullPEM, fullJWK, fullRaw)
	defer keyfile.SetStrength(1000, 1000, keyfile.Cost{LogN: 4, R: 8, P: 1})
	for _, f := range []keyfile.Format{keyfile.PEM, keyfile.JWK, keyfile.Raw} {
		text := encode(t, f, ident.Ed25519)
		if der, _, err := keyfile.Decode("", text, pass); err != nil || !bytes.Equal(der, private()[ident.Ed25519]) {
			t.Errorf("%s: %v", f, err)
		}
	}
	out := openssl(t, encode(t, keyfile.PEM, ident.Ed25519), "pkey", "-passin", "PASS", "-pubout")
	if out != publicOf(t, ident.Ed25519).PEM() {
		t.Errorf("openssl reads\n%s", out)
	}
}

// private holds a PKCS#8 key of each kind that differs in its handling.
var private = sync.OnceValue(func() map[ident.Algorithm][]byte {
	_, ed, err1 := ed25519.GenerateKey(rand.Reader)
	p256, err2 := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	p384, err3 := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	rsa2048, err4 := rsa.GenerateKey(rand.Reader, 2048)
	out := map[ident.Algorithm][]byte{}
	err := errors.Join(err1, err2, err3, err4)
	for alg, k := range map[ident.Algorithm]any{
		ident.Ed25519: ed, ident.ECDSAP256: p256, ident.ECDSAP384: p384, ident.RSA2048: rsa2048,
	} {
		der, e := x509.MarshalPKCS8PrivateKey(k)
		err = errors.Join(err, e)
		out[alg] = der
	}
	if err != nil {
		panic(err)
	}
	return out
})

func encode(t testing.TB, f keyfile.Format, alg ident.Algorithm) string {
	t.Helper()
	text, err := keyfile.Encode(f, private()[alg], pass)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func wantCode(t testing.TB, what string, err error, code fault.Code) {
	t.Helper()
	if fault.CodeOf(err) != code {
		t.Errorf("%s: %v, want %s", what, err, code)
	}
}

func TestRoundTrip(t *testing.T) {
	for _, f := range []keyfile.Format{keyfile.PEM, keyfile.JWK, keyfile.Raw} {
		for alg, der := range private() {
			t.Run(string(f)+"/"+alg.String(), func(t *testing.T) {
				text := encode(t, f, alg)
				if strings.Contains(text, base64.StdEncoding.EncodeToString(der[len(der)-24:])) {
					t.Error("the key stands in the clear")
				}
				for _, given := range []keyfile.Format{f, ""} {
					got, pub, err := keyfile.Decode(given, text, pass)
					if err != nil {
						t.Fatal(fault.From(err).Verbose())
					}
					if !bytes.Equal(got, der) || pub.Algorithm() != alg {
						t.Error("another key came back")
					}
				}
				_, _, err := keyfile.Decode(f, text, []byte("wrong horse"))
				wantCode(t, "wrong passphrase", err, fault.WrongPassphrase)
				if err != nil && fault.From(err).Text != "" {
					t.Errorf("the refusal says more than it should: %v", err)
				}
			})
		}
	}
}

// TestDamage checks that damage and a wrong passphrase look alike in the formats that are authenticated, and that
// a pem file that was damaged never gives the key back.
func TestDamage(t *testing.T) {
	raw := encode(t, keyfile.Raw, ident.Ed25519)
	block, _ := pem.Decode([]byte(raw))
	for _, at := range []int{5, 5 + 16, len(block.Bytes) - 1} { // salt, nonce, ciphertext
		b := bytes.Clone(block.Bytes)
		b[at] ^= 1
		_, _, err := keyfile.Decode("", string(pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: b})), pass)
		wantCode(t, "raw", err, fault.WrongPassphrase)
	}
	other := bytes.Clone(block.Bytes)
	other[1] = byte(ident.ECDSAP256) // also 32 bytes: the header must be authenticated
	_, _, err := keyfile.Decode("", string(pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: other})), pass)
	wantCode(t, "raw, another algorithm", err, fault.WrongPassphrase)

	jwe := encode(t, keyfile.JWK, ident.Ed25519)
	parts := strings.Split(jwe, ".")
	for i := 1; i < len(parts); i++ {
		bent := append([]string(nil), parts...)
		b, err := base64.RawURLEncoding.DecodeString(bent[i])
		if err != nil {
			t.Fatal(err)
		}
		b[0] ^= 1
		bent[i] = base64.RawURLEncoding.EncodeToString(b)
		_, _, err = keyfile.Decode("", strings.Join(bent, "."), pass)
		wantCode(t, "jwk", err, fault.WrongPassphrase)
	}

	text := encode(t, keyfile.PEM, ident.RSA2048)
	block, _ = pem.Decode([]byte(text))
	b := bytes.Clone(block.Bytes)
	b[len(b)-400] ^= 1
	_, _, err = keyfile.Decode("", string(pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: b})), pass)
	wantCode(t, "pem", err, fault.WrongPassphrase)
}

func TestEncodeRefuses(t *testing.T) {
	der := private()[ident.Ed25519]
	for name, p := range map[string][]byte{"none": nil, "short": []byte("1234567"), "huge": bytes.Repeat([]byte("x"), 1025)} {
		for _, f := range []keyfile.Format{keyfile.PEM, keyfile.JWK, keyfile.Raw, ""} {
			text, err := keyfile.Encode(f, der, p)
			wantCode(t, name, err, fault.Malformed)
			if fault.From(err).Field != "passphrase" || text != "" {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	_, err := keyfile.Encode("der", der, pass)
	wantCode(t, "unknown format", err, fault.Malformed)
	_, err = keyfile.Encode("", []byte("key"), pass)
	wantCode(t, "no key", err, fault.Malformed)
	x, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	agree, err := x509.MarshalPKCS8PrivateKey(x)
	if err != nil {
		t.Fatal(err)
	}
	_, err = keyfile.Encode("", agree, pass)
	wantCode(t, "a key that does not sign", err, fault.AlgorithmUnsupported)
}

func TestDecodeRefuses(t *testing.T) {
	der := private()[ident.Ed25519]
	plain := string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	sealed := encode(t, keyfile.PEM, ident.Ed25519)
	pub, err := keyfile.PublicJWK(publicOf(t, ident.Ed25519))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		format keyfile.Format
		data   string
		code   fault.Code
	}{
		"nothing":           {"", "", fault.Malformed},
		"noise":             {"", "noise", fault.Malformed},
		"unencrypted PEM":   {"", plain, fault.Malformed},
		"unencrypted JWK":   {"", string(pub), fault.Malformed},
		"bare key":          {"raw", string(der[16:]), fault.Malformed},
		"unknown format":    {"der", sealed, fault.Malformed},
		"not that format":   {"jwk", sealed, fault.Malformed},
		"two blocks":        {"", sealed + sealed, fault.Malformed},
		"text after":        {"", sealed + "x", fault.Malformed},
		"too large":         {"", sealed + strings.Repeat("\n", keyfile.MaxSize), fault.TooLarge},
		"legacy encryption": {"", legacyPEM, fault.Malformed},
		"raw, cut":          {"", string(pem.EncodeToMemory(&pem.Block{Type: "TRUSTD WRAPPED KEY", Bytes: []byte{1}})), fault.Malformed},
		"raw, version 2":    {"", rawWith(2, 1, 16, 8, 2), fault.Malformed},
		"raw, algorithm 9":  {"", rawWith(1, 9, 16, 8, 2), fault.Malformed},
		"raw, 1 GiB":        {"", rawWith(1, 1, 20, 8, 1), fault.TooLarge},
		"raw, forever":      {"", rawWith(1, 1, 16, 1, 255), fault.TooLarge},
		"raw, log N 63":     {"", rawWith(1, 1, 63, 8, 1), fault.Malformed},
		"raw, r = 0":        {"", rawWith(1, 1, 16, 0, 1), fault.Malformed},
		"jwe, 3 parts":      {"", "eyJhbGciOiJub25lIn0.e30.", fault.Malformed},
		"jwe, direct key":   {"", jwe(t, map[string]any{"alg": "dir", "enc": "A256GCM"}), fault.Malformed},
		"jwe, RSA":          {"", jwe(t, map[string]any{"alg": "RSA-OAEP", "enc": "A256GCM", "p2c": 1, "p2s": "AAAA"}), fault.Malformed},
		"jwe, p2c huge":     {"", jwe(t, map[string]any{"alg": "PBES2-HS512+A256KW", "enc": "A256GCM", "p2c": 2_000_000_000, "p2s": "AAAA"}), fault.TooLarge},
		"jwe, p2c negative": {"", jwe(t, map[string]any{"alg": "PBES2-HS512+A256KW", "enc": "A256GCM", "p2c": -1, "p2s": "AAAA"}), fault.Malformed},
		"jwe, p2c absent":   {"", jwe(t, map[string]any{"alg": "PBES2-HS512+A256KW", "enc": "A256GCM", "p2s": "AAAA"}), fault.Malformed},
		"jwe, compressed":   {"", jwe(t, map[string]any{"alg": "PBES2-HS512+A256KW", "enc": "A256GCM", "p2c": 1, "p2s": "AAAA", "zip": "DEF"}), fault.Malformed},
	} {
		got, pub, err := keyfile.Decode(c.format, c.data, pass)
		wantCode(t, name, err, c.code)
		if got != nil || !pub.IsZero() {
			t.Errorf("%s: refused and returned", name)
		}
	}
	for name, p := range map[string][]byte{"none": nil, "huge": bytes.Repeat([]byte("x"), 1025)} {
		_, _, err := keyfile.Decode("", sealed, p)
		wantCode(t, "passphrase "+name, err, fault.Malformed)
		_, _, err = keyfile.Decode("", plain, p)
		wantCode(t, "unencrypted, passphrase "+name, err, fault.Malformed)
	}
	_, _, err = keyfile.Decode("", plain, pass)
	if !strings.Contains(fault.From(err).Hint, "openssl pkcs8") {
		t.Errorf("the refusal of an unencrypted key has the hint %q", fault.From(err).Hint)
	}
}

const legacyPEM = `-----BEGIN EC PRIVATE KEY-----
Proc-Type: 4,ENCRYPTED
DEK-Info: AES-128-CBC,00000000000000000000000000000000

AAAA
-----END EC PRIVATE KEY-----
`

func rawWith(head ...byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "TRUSTD WRAPPED KEY", Bytes: append(head, make([]byte, 88)...)}))
}

func jwe(t testing.TB, header map[string]any) string {
	t.Helper()
	h, err := json.Marshal(header)
	if err != nil {
		t.Fatal(err)
	}
	return base64.RawURLEncoding.EncodeToString(h) + ".AAAA.AAAAAAAAAAAAAAAA.AAAA.AAAAAAAAAAAAAAAAAAAAAA"
}

func publicOf(t testing.TB, alg ident.Algorithm) ident.PublicKey {
	t.Helper()
	_, pub, err := keyfile.ParsePKCS8(private()[alg])
	if err != nil {
		t.Fatal(err)
	}
	return pub
}

// pbes2 builds an EncryptedPrivateKeyInfo out of its parts.
func pbes2(t testing.TB, scheme, kdf asn1.ObjectIdentifier, kdfParams any, cipher asn1.ObjectIdentifier, iv, data []byte) string {
	t.Helper()
	raw := func(v any) asn1.RawValue {
		b, err := asn1.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return asn1.RawValue{FullBytes: b}
	}
	params := struct{ KDF, Cipher pkix.AlgorithmIdentifier }{
		pkix.AlgorithmIdentifier{Algorithm: kdf, Parameters: raw(kdfParams)}, pkix.AlgorithmIdentifier{Algorithm: cipher, Parameters: raw(iv)},
	}
	der, err := asn1.Marshal(struct {
		Algorithm pkix.AlgorithmIdentifier
		Data      []byte
	}{pkix.AlgorithmIdentifier{Algorithm: scheme, Parameters: raw(params)}, data})
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: der}))
}

func TestPBES2Bounds(t *testing.T) {
	type pbkdf2 struct {
		Salt       []byte
		Iterations int
	}
	type scrypt struct {
		Salt    []byte
		N, R, P int
	}
	scheme := asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 13}
	kdf := asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 12}
	kdfScrypt := asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 11591, 4, 11}
	aes := asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 42}
	des := asn1.ObjectIdentifier{1, 2, 840, 113549, 3, 7}
	gcm := asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 46}
	salt, iv, data := make([]byte, 16), make([]byte, 16), make([]byte, 64)
	for name, c := range map[string]struct {
		text string
		code fault.Code
	}{
		"noise inside":        {pbes2(t, scheme, kdf, pbkdf2{salt, 1}, aes, iv, data), fault.WrongPassphrase},
		"5,000,001 rounds":    {pbes2(t, scheme, kdf, pbkdf2{salt, 5_000_001}, aes, iv, data), fault.TooLarge},
		"no rounds":           {pbes2(t, scheme, kdf, pbkdf2{salt, 0}, aes, iv, data), fault.Malformed},
		"minus one round":     {pbes2(t, scheme, kdf, pbkdf2{salt, -1}, aes, iv, data), fault.Malformed},
		"PBES1":               {pbes2(t, kdf, kdf, pbkdf2{salt, 1}, aes, iv, data), fault.Malformed},
		"3DES":                {pbes2(t, scheme, kdf, pbkdf2{salt, 1}, des, iv[:8], data), fault.Malformed},
		"GCM":                 {pbes2(t, scheme, kdf, pbkdf2{salt, 1}, gcm, iv, data), fault.Malformed},
		"short IV":            {pbes2(t, scheme, kdf, pbkdf2{salt, 1}, aes, iv[:15], data), fault.Malformed},
		"no IV":               {pbes2(t, scheme, kdf, pbkdf2{salt, 1}, aes, nil, data), fault.Malformed},
		"partial block":       {pbes2(t, scheme, kdf, pbkdf2{salt, 1}, aes, iv, data[:63]), fault.Malformed},
		"no data":             {pbes2(t, scheme, kdf, pbkdf2{salt, 1}, aes, iv, nil), fault.Malformed},
		"other KDF":           {pbes2(t, scheme, scheme, pbkdf2{salt, 1}, aes, iv, data), fault.Malformed},
		"scrypt, 1 GiB":       {pbes2(t, scheme, kdfScrypt, scrypt{salt, 1 << 20, 8, 1}, aes, iv, data), fault.TooLarge},
		"scrypt, forever":     {pbes2(t, scheme, kdfScrypt, scrypt{salt, 1 << 17, 8, 64}, aes, iv, data), fault.TooLarge},
		"scrypt, overflow":    {pbes2(t, scheme, kdfScrypt, scrypt{salt, 1 << 62, 1 << 62, 1 << 62}, aes, iv, data), fault.TooLarge},
		"scrypt, N = 3":       {pbes2(t, scheme, kdfScrypt, scrypt{salt, 3, 8, 1}, aes, iv, data), fault.Malformed},
		"scrypt, N negative":  {pbes2(t, scheme, kdfScrypt, scrypt{salt, -16, 8, 1}, aes, iv, data), fault.Malformed},
		"scrypt, r = 0":       {pbes2(t, scheme, kdfScrypt, scrypt{salt, 16, 0, 1}, aes, iv, data), fault.Malformed},
		"scrypt, in order":    {pbes2(t, scheme, kdfScrypt, scrypt{salt, 16, 8, 1}, aes, iv, data), fault.WrongPassphrase},
		"not ASN.1 at all":    {string(pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: []byte("x")})), fault.Malformed},
		"empty block":         {string(pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY"})), fault.Malformed},
		"KDF without a salt":  {pbes2(t, scheme, kdf, struct{ N int }{1}, aes, iv, data), fault.Malformed},
		"KDF is just a value": {pbes2(t, scheme, kdf, 1, aes, iv, data), fault.Malformed},
	} {
		_, _, err := keyfile.Decode("", c.text, pass)
		wantCode(t, name, err, c.code)
	}
}

// openssl runs the tool, which has to be there where the devices have to be.
func openssl(t *testing.T, stdin string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath("openssl")
	if err != nil {
		if os.Getenv("CI") != "" || os.Getenv("TRUSTD_REQUIRE_HSM") == "1" {
			t.Fatal("openssl is missing")
		}
		t.Skip("openssl is missing")
	}
	file := filepath.Join(t.TempDir(), "pass")
	if err := os.WriteFile(file, append(bytes.Clone(pass), '\n'), 0o600); err != nil {
		t.Fatal(err)
	}
	for i := range args {
		args[i] = strings.ReplaceAll(args[i], "PASS", "file:"+file)
	}
	cmd := exec.CommandContext(t.Context(), path, args...)
	cmd.Stdin = strings.NewReader(stdin)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, errs.String())
	}
	return out.String()
}

func TestOpenSSLReadsOurs(t *testing.T) {
	for alg := range private() {
		out := openssl(t, encode(t, keyfile.PEM, alg), "pkey", "-passin", "PASS", "-pubout")
		if out != publicOf(t, alg).PEM() {
			t.Errorf("%v: openssl reads\n%s", alg, out)
		}
	}
}

func TestWeReadOpenSSLs(t *testing.T) {
	for alg, der := range private() {
		plain := string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
		for name, args := range map[string][]string{
			"default":    {},
			"AES-256":    {"-v2", "aes-256-cbc", "-v2prf", "hmacWithSHA256", "-iter", "10000"},
			"AES-128":    {"-v2", "aes-128-cbc"},
			"HMAC-SHA-1": {"-v2", "aes-256-cbc", "-v2prf", "hmacWithSHA1"},
			"scrypt":     {"-scrypt"},
		} {
			text := openssl(t, plain, append([]string{"pkcs8", "-topk8", "-passout", "PASS"}, args...)...)
			got, pub, err := keyfile.Decode(keyfile.PEM, text, pass)
			if err != nil {
				t.Errorf("%v, %s: %s", alg, name, fault.From(err).Verbose())
				continue
			}
			if !bytes.Equal(got, der) || !pub.Equal(publicOf(t, alg)) {
				t.Errorf("%v, %s: another key", alg, name)
			}
		}
	}
}

func TestPublicJWK(t *testing.T) {
	for alg := range private() {
		pub := publicOf(t, alg)
		text, err := keyfile.PublicJWK(pub)
		if err != nil {
			t.Fatal(err)
		}
		var m map[string]string
		if err := json.Unmarshal(text, &m); err != nil {
			t.Fatal(err)
		}
		wire := alg.Wire()
		if alg == ident.Ed25519 {
			wire = "EdDSA"
		}
		if m["kid"] != pub.ID().String() || m["use"] != "sig" || m["alg"] != wire || m["d"] != "" {
			t.Errorf("%v: %s", alg, text)
		}
		got, err := keyfile.ParsePublicJWK(text)
		if err != nil || !got.Equal(pub) {
			t.Errorf("%v: %v", alg, err)
		}
	}
	if _, err := keyfile.PublicJWK(ident.PublicKey{}); err == nil {
		t.Error("no key has a JWK")
	}
}

// The key of RFC 8037 appendix A.2.
const rfc8037 = `"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"`

func TestParsePublicJWK(t *testing.T) {
	want, err := ident.ParsePublicKey("11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=")
	if err != nil {
		t.Fatal(err)
	}
	for _, extra := range []string{"", `,"kid":"sha256:0000"`, `,"alg":"EdDSA"`, `,"alg":"Ed25519"`, `,"use":"sig"`, `,"kid":"any name"`} {
		got, err := keyfile.ParsePublicJWK([]byte("{" + rfc8037 + extra + "}"))
		if err != nil || !got.Equal(want) {
			t.Errorf("%s: %v", extra, err)
		}
	}
	zero := base64.RawURLEncoding.EncodeToString(make([]byte, 32))
	for name, text := range map[string]string{
		"nothing":         "",
		"array":           "[]",
		"empty":           "{}",
		"text after":      "{" + rfc8037 + "}x",
		"object after":    "{" + rfc8037 + "}{}",
		"not closed":      "{" + rfc8037,
		"private":         "{" + rfc8037 + `,"d":"nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A"}`,
		"symmetric":       `{"kty":"oct","k":"AAAA"}`,
		"other algorithm": "{" + rfc8037 + `,"alg":"ES256"}`,
		"no signature":    "{" + rfc8037 + `,"alg":"none"}`,
		"for encryption":  "{" + rfc8037 + `,"use":"enc"}`,
		"certificate":     "{" + rfc8037 + `,"x5c":["AAAA"]}`,
		"URL":             "{" + rfc8037 + `,"x5u":"https://example.com"}`,
		"unknown member":  "{" + rfc8037 + `,"y2":1}`,
		"member twice":    "{" + rfc8037 + `,"x":"AAAA"}`,
		"small order":     `{"kty":"OKP","crv":"Ed25519","x":"` + zero + `"}`,
		"31 bytes":        `{"kty":"OKP","crv":"Ed25519","x":"` + base64.RawURLEncoding.EncodeToString(make([]byte, 31)) + `"}`,
		"X25519":          `{"kty":"OKP","crv":"X25519","x":"` + zero + `"}`,
		"off the curve":   `{"kty":"EC","crv":"P-256","x":"` + zero + `","y":"` + zero + `"}`,
		"tiny RSA":        `{"kty":"RSA","n":"AQAB","e":"AQAB"}`,
		"too large":       "{" + rfc8037 + strings.Repeat(" ", keyfile.MaxSize) + "}",
	} {
		pub, err := keyfile.ParsePublicJWK([]byte(text))
		if err == nil || fault.CodeOf(err) == fault.Internal || !pub.IsZero() {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestBox(t *testing.T) {
	cost := keyfile.Cost{LogN: 4, R: 8, P: 1}
	b, err := keyfile.Seal(pass, []byte("aad"), []byte("secret"), cost)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := b.Open(pass, []byte("aad")); err != nil || string(got) != "secret" {
		t.Errorf("%q, %v", got, err)
	}
	_, err = b.Open(pass, []byte("other"))
	wantCode(t, "other aad", err, fault.WrongPassphrase)
	_, err = b.Open([]byte("other"), []byte("aad"))
	wantCode(t, "other passphrase", err, fault.WrongPassphrase)
	again, err := keyfile.Seal(pass, []byte("aad"), []byte("secret"), cost)
	if err != nil || bytes.Equal(again.Salt, b.Salt) || bytes.Equal(again.Sealed, b.Sealed) {
		t.Errorf("sealing twice gives the same: %v", err)
	}
	key := make([]byte, keyfile.KeySize)
	_, err = keyfile.OpenWithKey(key, nil, make([]byte, 23))
	wantCode(t, "too short", err, fault.Corrupt)
	_, err = keyfile.SealWithKey(key[1:], nil, nil)
	wantCode(t, "short key", err, fault.Internal)
}

func FuzzDecode(f *testing.F) {
	for _, s := range []string{rawWith(1, 1, 2, 1, 1), jwe(f, map[string]any{"alg": "PBES2-HS512+A256KW", "enc": "A256GCM", "p2c": 1, "p2s": "AAAA"}),
		legacyPEM, "ey.", "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, data string) {
		der, pub, err := keyfile.Decode("", data, pass)
		switch fault.CodeOf(err) {
		case "", fault.Malformed, fault.TooLarge, fault.WrongPassphrase, fault.AlgorithmUnsupported:
		default:
			t.Errorf("%v", fault.From(err).Verbose())
		}
		if (err == nil) != (der != nil) || (err == nil) == pub.IsZero() {
			t.Error("refused and returned")
		}
	})
}

// FuzzPBES2 begins behind the armour.
func FuzzPBES2(f *testing.F) {
	for _, iterations := range []int{1, 2048, 5_000_001} {
		text := pbes2(f, asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 13}, asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 12},
			struct {
				Salt []byte
				N    int
			}{make([]byte, 16), iterations}, asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 42}, make([]byte, 16), make([]byte, 64))
		block, _ := pem.Decode([]byte(text))
		f.Add(block.Bytes)
	}
	f.Fuzz(func(t *testing.T, der []byte) {
		_, _, err := keyfile.Decode("", string(pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: der})), pass)
		if err == nil || fault.CodeOf(err) == fault.Internal {
			t.Errorf("%v", err)
		}
	})
}

func FuzzParsePublicJWK(f *testing.F) {
	f.Add([]byte("{" + rfc8037 + "}"))
	f.Add([]byte(`{"kty":"EC","crv":"P-256","x":"AA","y":"AA"}`))
	f.Add([]byte(`{"kty":"RSA","n":"AQAB","e":"AQAB","alg":"PS256"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		pub, err := keyfile.ParsePublicJWK(data)
		if err != nil {
			if fault.CodeOf(err) == fault.Internal || !pub.IsZero() {
				t.Errorf("%v", err)
			}
			return
		}
		text, err := keyfile.PublicJWK(pub)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := keyfile.ParsePublicJWK(text); err != nil || !again.Equal(pub) {
			t.Errorf("%s does not read back: %v", text, err)
		}
	})
}
