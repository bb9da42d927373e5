// Package keyfile reads and writes private keys that travel in files. There is no way to write one without a
// passphrase and none to read one that has none.
//
// Three formats are known:
//
//	pem   PKCS#8 under PBES2 (PBKDF2 with HMAC-SHA-256, AES-256-CBC), as OpenSSL reads and writes it
//	jwk   a JSON Web Key inside a compact JWE (PBES2-HS512+A256KW, A256GCM)
//	raw   the bare key bytes inside trustd's own armoured envelope (scrypt, XChaCha20-Poly1305)
//
// A wrong passphrase and a damaged file are one refusal, wrong_passphrase. PBES2 carries no integrity check:
// damage to a pem file shows only where the key no longer parses, so compare the fingerprint after an import. jwk
// and raw are authenticated.
package keyfile

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
)

// A Format names one of the file formats.
type Format string

const (
	PEM Format = "pem"
	JWK Format = "jwk"
	Raw Format = "raw"
)

// MinPassphrase is the shortest passphrase, in bytes, under which a key is written; MaxPassphrase the longest that
// is read.
const (
	MinPassphrase = 8
	MaxPassphrase = 1024
)

// MaxSize bounds a key file in bytes. An RSA key of 4096 bits takes about 5 KiB.
const MaxSize = 32 << 10

// Encode returns the PKCS#8 DER private key in the given format ("" is pem) under the passphrase.
func Encode(f Format, pkcs8, passphrase []byte) (string, error) {
	if len(passphrase) < MinPassphrase || len(passphrase) > MaxPassphrase {
		return "", fault.BadField("passphrase", "a passphrase has %d to %d bytes", MinPassphrase, MaxPassphrase)
	}
	key, pub, err := parsePrivate(pkcs8)
	if err != nil {
		return "", err
	}
	switch f {
	case PEM, "":
		return encodePEM(key, passphrase)
	case JWK:
		return encodeJWK(key, pub, passphrase)
	case Raw:
		return encodeRaw(key, pub, passphrase)
	}
	return "", unknownFormat()
}

// Decode returns the private key in data as PKCS#8 DER, and its public key. With the format "" the data shows
// which it is.
func Decode(f Format, data string, passphrase []byte) (pkcs8 []byte, pub ident.PublicKey, err error) {
	if len(data) > MaxSize {
		return nil, pub, fault.New(fault.TooLarge, "a key file has at most %d bytes", MaxSize)
	}
	if len(passphrase) == 0 || len(passphrase) > MaxPassphrase {
		return nil, pub, fault.BadField("passphrase", "a passphrase has 1 to %d bytes", MaxPassphrase)
	}
	var key any
	switch found := sniff(data); {
	case f != "" && f != PEM && f != JWK && f != Raw:
		return nil, pub, unknownFormat()
	case found == "" || f != "" && f != found:
		return nil, pub, fault.BadField("private", "not an encrypted private key in a known format")
	case found == PEM:
		key, err = decodePEM(data, passphrase)
	case found == JWK:
		key, err = decodeJWK(data, passphrase)
	default:
		key, err = decodeRaw(data, passphrase)
	}
	if err != nil {
		return nil, pub, err
	}
	return Canonical(key)
}

// Canonical returns the one PKCS#8 DER form of a private key of the standard library, and its public key.
func Canonical(key any) (pkcs8 []byte, pub ident.PublicKey, err error) {
	public := Public(key)
	if public == nil {
		return nil, pub, fault.New(fault.AlgorithmUnsupported, "not a private key for signatures of a supported algorithm")
	}
	if pub, err = ident.NewPublicKey(public); err != nil {
		return nil, ident.PublicKey{}, err
	}
	pkcs8, err = x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, ident.PublicKey{}, fault.Wrap(fault.Malformed, err, "not a usable private key")
	}
	return pkcs8, pub, nil
}

// Public returns the public half of a private key of the standard library, or nil where key is none that signs.
func Public(key any) any {
	switch k := key.(type) {
	case ed25519.PrivateKey:
		if len(k) == ed25519.PrivateKeySize {
			return k.Public()
		}
	case *ecdsa.PrivateKey:
		return k.Public()
	case *rsa.PrivateKey:
		return k.Public()
	}
	return nil
}

// ParsePKCS8 reads an unencrypted PKCS#8 DER private key of a supported algorithm, in any encoding that the
// standard library takes.
func ParsePKCS8(der []byte) (key any, pub ident.PublicKey, err error) { return parsePrivate(der) }

func parsePrivate(der []byte) (any, ident.PublicKey, error) {
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, ident.PublicKey{}, fault.BadField("private", "not a PKCS#8 private key")
	}
	_, pub, err := Canonical(key)
	if err != nil {
		return nil, ident.PublicKey{}, err
	}
	return key, pub, nil
}

func unknownFormat() error {
	return fault.BadField("format", "a format is pem, jwk or raw")
}

// sniff tells the formats apart by how they begin.
func sniff(data string) Format {
	data = string(bytes.TrimSpace([]byte(data)))
	block, _ := pem.Decode([]byte(data))
	switch {
	case block != nil && block.Type == rawType:
		return Raw
	case block != nil:
		return PEM // decodePEM refuses the types that are not encrypted, with a hint
	case len(data) > 2 && data[:2] == "ey":
		return JWK
	}
	return ""
}

// refused is what a wrong passphrase and a damaged file have in common.
func refused(cause error) error { return fault.Wrap(fault.WrongPassphrase, cause, "") }

// parseBlock returns the one PEM block of data.
func parseBlock(data, want string) ([]byte, error) {
	block, rest := pem.Decode([]byte(data))
	switch {
	case block == nil || len(bytes.TrimSpace(rest)) != 0:
		return nil, fault.BadField("private", "not exactly one PEM block")
	case len(block.Headers) != 0:
		return nil, &fault.Error{Code: fault.Malformed, Field: "private", Text: "PEM headers are not supported",
			Hint: "Convert the key: openssl pkcs8 -topk8 -v2 aes-256-cbc -v2prf hmacWithSHA256."}
	case block.Type != want:
		return nil, &fault.Error{Code: fault.Malformed, Field: "private", Text: "the private key is not encrypted",
			Hint: "Encrypt it: openssl pkcs8 -topk8 -v2 aes-256-cbc -v2prf hmacWithSHA256."}
	}
	return block.Bytes, nil
}
