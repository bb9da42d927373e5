// Package signature verifies signatures and holds their text forms and the domains that keep a signature made for
// one purpose from standing for another. It is pure.
package signature

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/binary"
	"math/big"
	"strings"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
)

// Verify checks a raw signature of msg. ECDSA signatures are r||s of fixed width; RSA is PSS with SHA-256 and a
// salt of 32 bytes. It returns an error with code invalid_signature, or nil.
func Verify(pub ident.PublicKey, msg, sig []byte) error {
	if len(sig) != pub.Algorithm().SignatureSize() || len(sig) == 0 {
		return fault.New(fault.InvalidSignature, "the signature has the wrong length for its key")
	}
	ok := false
	switch k := pub.Key().(type) {
	case ed25519.PublicKey:
		ok = ed25519.Verify(k, msg, sig)
	case *ecdsa.PublicKey:
		digest := Digest(pub.Algorithm(), msg)
		half := len(sig) / 2
		r, s := new(big.Int).SetBytes(sig[:half]), new(big.Int).SetBytes(sig[half:])
		ok = ecdsa.Verify(k, digest, r, s)
	case *rsa.PublicKey:
		ok = rsa.VerifyPSS(k, crypto.SHA256, Digest(pub.Algorithm(), msg), sig, PSSOptions()) == nil
	}
	if !ok {
		return fault.New(fault.InvalidSignature, "")
	}
	return nil
}

// Digest returns what the device signs for an algorithm that hashes first: SHA-384 for ecdsa-p384, SHA-256 for
// ecdsa-p256 and RSA. Ed25519 signs the message itself, and Digest returns it unchanged.
func Digest(alg ident.Algorithm, msg []byte) []byte {
	switch alg {
	case ident.Ed25519:
		return msg
	case ident.ECDSAP384:
		d := sha512.Sum384(msg)
		return d[:]
	default:
		d := sha256.Sum256(msg)
		return d[:]
	}
}

// PSSOptions returns the one set of PSS parameters in use.
func PSSOptions() *rsa.PSSOptions {
	return &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.SHA256}
}

// EncodeText returns the text of a plain (unbatched) signature: padded standard base64.
func EncodeText(sig []byte) string { return base64.StdEncoding.EncodeToString(sig) }

// base64std is the one encoding of a plain signature.
var base64std = base64.StdEncoding.Strict()

func hasLineEnd(s string) bool {
	return strings.IndexByte(s, '\n') >= 0 || strings.IndexByte(s, '\r') >= 0
}

// ParseText reads the text of a plain signature by a key of the given algorithm. Only the one canonical encoding
// of the exact length passes.
func ParseText(alg ident.Algorithm, text string) ([]byte, error) {
	if !alg.Valid() || len(text) != base64.StdEncoding.EncodedLen(alg.SignatureSize()) {
		return nil, fault.BadField("signature", "not the base64 of a signature of %d bytes", alg.SignatureSize())
	}
	if hasLineEnd(text) { // the decoder would skip these
		return nil, fault.BadField("signature", "not canonical base64")
	}
	sig, err := base64std.DecodeString(text)
	if err != nil || len(sig) != alg.SignatureSize() {
		return nil, fault.BadField("signature", "not canonical base64")
	}
	return sig, nil
}

// A Domain opens every byte string that trustd signs in a format of its own. Each domain ends in a NUL and none
// is a prefix of another, so that no two formats share a byte string. Formats of others that carry no tag are in
// docs/formats/domains.md.
type Domain string

// The domains. Append only.
const (
	Message    Domain = "trustd/msg/v1\x00"
	Record     Domain = "trustd/record/v1\x00"
	Possession Domain = "trustd/possession/v1\x00"
	Wrap       Domain = "trustd/wrap/v1\x00"
	Batch      Domain = "trustd-batch/v1\x00"
	Canary     Domain = "trustd/canary/v1\x00"
)

// Domains returns all domains.
func Domains() []Domain { return []Domain{Message, Record, Possession, Wrap, Batch, Canary} }

// Encode returns the domain, then each field as a big-endian 32-bit length and its bytes. The encoding is
// injective: no two lists of fields give the same bytes.
func Encode(d Domain, fields ...[]byte) []byte {
	n := len(d)
	for _, f := range fields {
		n += 4 + len(f)
	}
	out := append(make([]byte, 0, n), d...)
	for _, f := range fields {
		out = binary.BigEndian.AppendUint32(out, uint32(len(f)))
		out = append(out, f...)
	}
	return out
}
