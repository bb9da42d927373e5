package keyfile

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signature"
)

// rawType is the PEM type of the envelope. Its content is, in bytes: version 1, algorithm, log2 N, r, p, salt (16),
// nonce (24), ciphertext. The ciphertext holds the bare key: the seed of 32 bytes for ed25519, the scalar in fixed
// width for ECDSA, PKCS#1 DER for RSA, which has no barer form.
const rawType = "TRUSTD WRAPPED KEY"

const (
	rawVersion = 1
	rawHeader  = 5
)

func encodeRaw(key any, pub ident.PublicKey, passphrase []byte) (string, error) {
	bare, err := bareKey(key)
	if err != nil {
		return "", err
	}
	defer clear(bare)
	c := strength.raw
	head := []byte{rawVersion, byte(pub.Algorithm()), byte(c.LogN), byte(c.R), byte(c.P)}
	box, err := Seal(passphrase, rawAAD(head), bare, c)
	if err != nil {
		return "", err
	}
	body := append(append(head, box.Salt...), box.Sealed...)
	return string(pem.EncodeToMemory(&pem.Block{Type: rawType, Bytes: body})), nil
}

func decodeRaw(data string, passphrase []byte) (any, error) {
	body, err := parseBlock(data, rawType)
	if err != nil {
		return nil, err
	}
	if len(body) < rawHeader+saltSize {
		return nil, fault.BadField("private", "the wrapped key is too short")
	}
	head, rest := body[:rawHeader], body[rawHeader:]
	alg := ident.Algorithm(head[1])
	if head[0] != rawVersion || !alg.Valid() {
		return nil, fault.BadField("private", "the wrapped key has an unknown version or algorithm")
	}
	box := Box{Cost{int(head[2]), int(head[3]), int(head[4])}, rest[:saltSize], rest[saltSize:]}
	bare, err := box.Open(passphrase, rawAAD(head))
	if err != nil {
		return nil, err
	}
	defer clear(bare)
	return parseBare(alg, bare)
}

// rawAAD keeps a wrapped key from standing for anything else that is sealed under the same passphrase.
func rawAAD(head []byte) []byte { return signature.Encode(signature.Wrap, []byte("raw"), head) }

func bareKey(key any) ([]byte, error) {
	switch k := key.(type) {
	case ed25519.PrivateKey:
		return k.Seed(), nil
	case *ecdsa.PrivateKey:
		b, err := k.Bytes()
		if err != nil {
			return nil, fault.Wrap(fault.Malformed, err, "not a usable private key")
		}
		return b, nil
	case *rsa.PrivateKey:
		return x509.MarshalPKCS1PrivateKey(k), nil
	}
	return nil, fault.New(fault.AlgorithmUnsupported, "not a private key of a supported algorithm")
}

func parseBare(alg ident.Algorithm, bare []byte) (any, error) {
	var key any
	var err error
	switch alg {
	case ident.Ed25519:
		if len(bare) != ed25519.SeedSize {
			return nil, fault.BadField("private", "the wrapped key has a wrong length")
		}
		return ed25519.NewKeyFromSeed(bare), nil
	case ident.ECDSAP256:
		key, err = ecdsa.ParseRawPrivateKey(elliptic.P256(), bare)
	case ident.ECDSAP384:
		key, err = ecdsa.ParseRawPrivateKey(elliptic.P384(), bare)
	default:
		key, err = x509.ParsePKCS1PrivateKey(bare)
	}
	if err != nil {
		return nil, fault.Wrap(fault.Malformed, err, "the wrapped key is not usable")
	}
	if _, pub, err := Canonical(key); err != nil || pub.Algorithm() != alg {
		return nil, fault.BadField("private", "the wrapped key is not of the algorithm that it names")
	}
	return key, nil
}
