package ident

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"

	"github.com/trustd/trustd/fault"
)

// An Algorithm is a kind of key together with the one way in which trustd uses it.
// Do not reorder: records hold these numbers.
type Algorithm uint8

const (
	Ed25519   Algorithm = 1 // pure Ed25519, RFC 8032
	ECDSAP256 Algorithm = 2 // ECDSA on P-256 with SHA-256, r||s of 64 bytes
	ECDSAP384 Algorithm = 3 // ECDSA on P-384 with SHA-384, r||s of 96 bytes
	RSA2048   Algorithm = 4 // RSASSA-PSS with SHA-256, salt of 32 bytes
	RSA3072   Algorithm = 5
	RSA4096   Algorithm = 6
)

var algorithms = [...]struct {
	name, wire string
	size       int
}{
	Ed25519:   {"ed25519", "Ed25519", 64},
	ECDSAP256: {"ecdsa-p256", "ES256", 64},
	ECDSAP384: {"ecdsa-p384", "ES384", 96},
	RSA2048:   {"rsa-2048", "PS256", 256},
	RSA3072:   {"rsa-3072", "PS256", 384},
	RSA4096:   {"rsa-4096", "PS256", 512},
}

// Algorithms returns all algorithms, in the order of their numbers.
func Algorithms() []Algorithm {
	return []Algorithm{Ed25519, ECDSAP256, ECDSAP384, RSA2048, RSA3072, RSA4096}
}

// ParseAlgorithm reads an algorithm's name, such as "ed25519".
func ParseAlgorithm(s string) (Algorithm, error) {
	for _, a := range Algorithms() {
		if algorithms[a].name == s {
			return a, nil
		}
	}
	return 0, fault.BadField("algorithm", "an algorithm is ed25519, ecdsa-p256, ecdsa-p384, rsa-2048, rsa-3072 or rsa-4096")
}

// Valid reports whether a is one of the algorithms above.
func (a Algorithm) Valid() bool { return a >= Ed25519 && a <= RSA4096 }

// String returns the algorithm's name, such as "ecdsa-p256".
func (a Algorithm) String() string {
	if !a.Valid() {
		return "unknown"
	}
	return algorithms[a].name
}

// Wire returns the name used in signed messages: Ed25519, ES256, ES384 or PS256.
func (a Algorithm) Wire() string {
	if !a.Valid() {
		return "unknown"
	}
	return algorithms[a].wire
}

// SignatureSize returns the exact length of a signature in bytes.
func (a Algorithm) SignatureSize() int {
	if !a.Valid() {
		return 0
	}
	return algorithms[a].size
}

// MarshalText returns the algorithm's name.
func (a Algorithm) MarshalText() ([]byte, error) {
	if !a.Valid() {
		return nil, fault.New(fault.Internal, "unknown algorithm")
	}
	return []byte(a.String()), nil
}

// UnmarshalText parses an algorithm's name.
func (a *Algorithm) UnmarshalText(b []byte) error {
	v, err := ParseAlgorithm(string(b))
	*a = v
	return err
}

// A PublicKey is a checked public key with its algorithm, DER form and fingerprint. It is immutable; the zero
// value is no key.
type PublicKey struct {
	key  crypto.PublicKey
	spki string
	pem  string // kept, because every verification compares it
	alg  Algorithm
	id   KeyID
}

// NewPublicKey checks a key of the standard library. Points of small order and keys of other sizes are refused.
func NewPublicKey(k crypto.PublicKey) (PublicKey, error) {
	alg, err := algorithmOf(k)
	if err != nil {
		return PublicKey{}, err
	}
	der, err := x509.MarshalPKIXPublicKey(k)
	if err != nil {
		return PublicKey{}, fault.Wrap(fault.Malformed, err, "not a usable public key")
	}
	text := pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: der})
	return PublicKey{key: k, spki: string(der), pem: string(text), alg: alg, id: sha256.Sum256(der)}, nil
}

// ParseSPKI reads a DER SubjectPublicKeyInfo. Anything but the one canonical encoding is refused, so that a key
// has one fingerprint.
func ParseSPKI(der []byte) (PublicKey, error) {
	k, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return PublicKey{}, fault.BadField("public_key", "not a DER SubjectPublicKeyInfo of a supported key")
	}
	p, err := NewPublicKey(k)
	if err != nil {
		return PublicKey{}, err
	}
	if p.spki != string(der) {
		return PublicKey{}, fault.BadField("public_key", "the DER encoding is not canonical")
	}
	return p, nil
}

const pemType = "PUBLIC KEY"

// ParsePEM reads a PEM public key. The text must be exactly what PEM returns: TrustHandoff compares and hashes
// the text itself (packet.md 1.2), so another line length, CRLF or a missing final newline is another name.
func ParsePEM(text string) (PublicKey, error) {
	block, rest := pem.Decode([]byte(text))
	if block == nil || block.Type != pemType || len(rest) != 0 || len(block.Headers) != 0 {
		return PublicKey{}, fault.BadField("public_key", "not one PEM block of type PUBLIC KEY")
	}
	p, err := ParseSPKI(block.Bytes)
	if err != nil {
		return PublicKey{}, err
	}
	if p.PEM() != text {
		return PublicKey{}, fault.BadField("public_key", "the PEM text is not canonical")
	}
	return p, nil
}

// ParsePublicKey reads the base64 of a DER SubjectPublicKeyInfo or, for ed25519 alone, of the raw 32 bytes.
func ParsePublicKey(b64 string) (PublicKey, error) {
	der, err := decodeBase64(b64)
	if err != nil {
		return PublicKey{}, err
	}
	if len(der) == ed25519.PublicKeySize {
		return NewPublicKey(ed25519.PublicKey(der))
	}
	return ParseSPKI(der)
}

// decodeBase64 takes the one encoding: the decoder of the standard library skips line ends, strict or not.
func decodeBase64(s string) ([]byte, error) {
	b, err := base64.StdEncoding.DecodeString(s)
	if err != nil || base64.StdEncoding.EncodeToString(b) != s {
		return nil, fault.BadField("public_key", "not canonical base64")
	}
	return b, nil
}

func algorithmOf(k crypto.PublicKey) (Algorithm, error) {
	switch k := k.(type) {
	case ed25519.PublicKey:
		if len(k) != ed25519.PublicKeySize || !safeEdwardsPoint(k) {
			return 0, fault.BadField("public_key", "not a usable Ed25519 point")
		}
		return Ed25519, nil
	case *ecdsa.PublicKey:
		alg := map[elliptic.Curve]Algorithm{elliptic.P256(): ECDSAP256, elliptic.P384(): ECDSAP384}[k.Curve]
		if alg == 0 {
			break
		}
		if _, err := k.ECDH(); err != nil { // refuses the point at infinity and points off the curve
			return 0, fault.BadField("public_key", "not a point on the curve")
		}
		return alg, nil
	case *rsa.PublicKey:
		if k.E != 65537 {
			return 0, fault.BadField("public_key", "an RSA key must have the exponent 65537")
		}
		switch k.N.BitLen() {
		case 2048:
			return RSA2048, nil
		case 3072:
			return RSA3072, nil
		case 4096:
			return RSA4096, nil
		}
	}
	return 0, fault.New(fault.AlgorithmUnsupported, "keys are Ed25519, ECDSA on P-256 or P-384, or RSA of 2048, 3072 or 4096 bits")
}

// Key returns the key for the standard library's verifiers: ed25519.PublicKey, *ecdsa.PublicKey or *rsa.PublicKey.
// The caller must not change it.
func (p PublicKey) Key() crypto.PublicKey { return p.key }

// Algorithm returns the key's algorithm; 0 for the zero value.
func (p PublicKey) Algorithm() Algorithm { return p.alg }

// ID returns the key's fingerprint.
func (p PublicKey) ID() KeyID { return p.id }

// SPKI returns a copy of the DER SubjectPublicKeyInfo.
func (p PublicKey) SPKI() []byte { return []byte(p.spki) }

// Base64 returns the standard base64 of the SubjectPublicKeyInfo.
func (p PublicKey) Base64() string { return base64.StdEncoding.EncodeToString([]byte(p.spki)) }

// PEM returns the PEM text, with its final newline.
func (p PublicKey) PEM() string { return p.pem }

// IsZero reports whether p is no key.
func (p PublicKey) IsZero() bool { return p.alg == 0 }

// Equal reports whether p and q are the same key.
func (p PublicKey) Equal(q PublicKey) bool { return p.alg == q.alg && p.spki == q.spki }

// MarshalJSON writes the key as base64 SubjectPublicKeyInfo.
func (p PublicKey) MarshalJSON() ([]byte, error) { return json.Marshal(p.Base64()) }

// UnmarshalJSON reads what MarshalJSON writes.
func (p *PublicKey) UnmarshalJSON(b []byte) error {
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return fault.BadField("public_key", "not a string")
	}
	der, err := decodeBase64(s)
	if err != nil {
		return err
	}
	v, err := ParseSPKI(der)
	*p = v
	return err
}

// The y-coordinates of the points of small order, and their non-canonical encodings, with the sign bit cleared
// (RFC 8032 section 5.1.3 does not exclude them; a signature by such a key says nothing).
var smallOrder = [][]byte{
	unhex("0000000000000000000000000000000000000000000000000000000000000000"),
	unhex("0100000000000000000000000000000000000000000000000000000000000000"),
	unhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"),
	unhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"),
	unhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
	unhex("edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
	unhex("eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
}

// fieldPrime is 2^255-19, little endian.
var fieldPrime = unhex("edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f")

// safeEdwardsPoint refuses encodings of points of small order and y-coordinates that are not reduced. Whether
// the point is on the curve shows when a signature is verified.
func safeEdwardsPoint(k []byte) bool {
	y := bytes.Clone(k)
	y[31] &= 0x7f
	for _, s := range smallOrder {
		if bytes.Equal(y, s) {
			return false
		}
	}
	for i := 31; i >= 0; i-- {
		if y[i] != fieldPrime[i] {
			return y[i] < fieldPrime[i]
		}
	}
	return false
}

func unhex(s string) []byte {
	b := make([]byte, len(s)/2)
	for i := range b {
		b[i] = nibble(s[2*i])<<4 | nibble(s[2*i+1])
	}
	return b
}

func nibble(c byte) byte {
	if c >= 'a' {
		return c - 'a' + 10
	}
	return c - '0'
}
