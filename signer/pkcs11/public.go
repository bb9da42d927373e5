package pkcs11

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/asn1"
	"math/big"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
)

// Key types as PKCS#11 numbers them.
const (
	keyTypeRSA     = 0x00
	keyTypeEC      = 0x03
	keyTypeEdwards = 0x40
)

// rawPublic is what a token says of a public key.
type rawPublic struct {
	keyType  uint
	params   []byte // CKA_EC_PARAMS
	point    []byte // CKA_EC_POINT
	modulus  []byte
	exponent []byte
	spki     []byte // CKA_PUBLIC_KEY_INFO, which few tokens have
}

// CKA_EC_PARAMS of the curves in use. For Ed25519 the OID of RFC 8410 and the curve name are both found on tokens.
var (
	paramsP256     = []byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07}
	paramsP384     = []byte{0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22}
	paramsEd25519  = []byte{0x06, 0x03, 0x2b, 0x65, 0x70}
	paramsEdwards  = append([]byte{0x13, 0x0c}, "edwards25519"...)
	pointTagOctets = byte(0x04)
)

// parse returns the key, or an error of code algorithm_unsupported or malformed that holds no bytes of the token.
func (r rawPublic) parse() (ident.PublicKey, error) {
	switch r.keyType {
	case keyTypeRSA:
		return r.parseRSA()
	case keyTypeEC:
		return r.parseEC()
	case keyTypeEdwards:
		return r.parseEdwards()
	}
	return ident.PublicKey{}, fault.New(fault.AlgorithmUnsupported, "a key of a type that trustd does not use")
}

func (r rawPublic) parseRSA() (ident.PublicKey, error) {
	if len(r.modulus) == 0 || len(r.exponent) == 0 || len(r.exponent) > 8 || len(r.modulus) > 4096 {
		return r.parseSPKI()
	}
	e := new(big.Int).SetBytes(r.exponent)
	if !e.IsInt64() || e.Int64() > 1<<31-1 {
		return ident.PublicKey{}, fault.New(fault.AlgorithmUnsupported, "an RSA key with a large exponent")
	}
	return ident.NewPublicKey(&rsa.PublicKey{N: new(big.Int).SetBytes(r.modulus), E: int(e.Int64())})
}

func (r rawPublic) parseEC() (ident.PublicKey, error) {
	var curve elliptic.Curve
	switch {
	case bytes.Equal(r.params, paramsP256):
		curve = elliptic.P256()
	case bytes.Equal(r.params, paramsP384):
		curve = elliptic.P384()
	default:
		return ident.PublicKey{}, fault.New(fault.AlgorithmUnsupported, "an elliptic curve that trustd does not use")
	}
	if len(r.point) == 0 {
		return r.parseSPKI()
	}
	size := 1 + 2*((curve.Params().BitSize+7)/8)
	point, ok := unwrapPoint(r.point, size)
	if !ok {
		return ident.PublicKey{}, fault.New(fault.Malformed, "a public point of the wrong length")
	}
	k, err := ecdsa.ParseUncompressedPublicKey(curve, point)
	if err != nil {
		return ident.PublicKey{}, fault.Wrap(fault.Malformed, err, "a public point that is not on its curve")
	}
	return ident.NewPublicKey(k)
}

func (r rawPublic) parseEdwards() (ident.PublicKey, error) {
	if !bytes.Equal(r.params, paramsEd25519) && !bytes.Equal(r.params, paramsEdwards) {
		return ident.PublicKey{}, fault.New(fault.AlgorithmUnsupported, "an Edwards curve that trustd does not use")
	}
	if len(r.point) == 0 {
		return r.parseSPKI()
	}
	point, ok := unwrapPoint(r.point, ed25519.PublicKeySize)
	if !ok {
		return ident.PublicKey{}, fault.New(fault.Malformed, "a public point of the wrong length")
	}
	return ident.NewPublicKey(ed25519.PublicKey(point))
}

func (r rawPublic) parseSPKI() (ident.PublicKey, error) {
	if len(r.spki) == 0 {
		return ident.PublicKey{}, fault.New(fault.Malformed, "the token holds no public key for it")
	}
	return ident.ParseSPKI(r.spki)
}

// unwrapPoint returns the point of exactly size bytes: as it stands, or inside a DER OCTET STRING or BIT STRING.
// The length decides first, because a raw point may begin like a tag.
func unwrapPoint(b []byte, size int) ([]byte, bool) {
	if len(b) == size {
		return bytes.Clone(b), true
	}
	if b[0] == pointTagOctets {
		var octets []byte
		rest, err := asn1.Unmarshal(b, &octets)
		return octets, err == nil && len(rest) == 0 && len(octets) == size
	}
	var bits asn1.BitString
	rest, err := asn1.Unmarshal(b, &bits)
	return bits.Bytes, err == nil && len(rest) == 0 && bits.BitLength == 8*size
}
