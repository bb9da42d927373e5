package keyfile

import (
	"crypto"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"

	"github.com/trustd/trustd/fault"
	"github.com/youmark/pkcs8"
)

const pemType = "ENCRYPTED PRIVATE KEY"

// strength is what keys are written with: iterations of PBKDF2 for pem and jwk, the cost of scrypt for raw.
var strength = struct {
	pem, jwk int
	raw      Cost
}{600_000, 600_000, DefaultCost}

// Bounds on what a file may make the reader do: about a second of one core, 256 MiB.
const (
	maxIterations   = 5_000_000
	maxScryptMemory = 256 << 20
	maxScryptWork   = 1 << 22 // N * r * p
)

func encodePEM(key any, passphrase []byte) (string, error) {
	der, err := pkcs8.MarshalPrivateKey(key, passphrase, &pkcs8.Opts{
		Cipher:  pkcs8.AES256CBC,
		KDFOpts: pkcs8.PBKDF2Opts{SaltSize: 16, IterationCount: strength.pem, HMACHash: crypto.SHA256},
	})
	if err != nil {
		return "", fault.Wrap(fault.Internal, err, "")
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: der})), nil
}

func decodePEM(data string, passphrase []byte) (any, error) {
	der, err := parseBlock(data, pemType)
	if err != nil {
		return nil, err
	}
	if err := checkPBES2(der); err != nil {
		return nil, err
	}
	key, _, err := pkcs8.ParsePrivateKey(der, passphrase)
	if err != nil {
		return nil, refused(err)
	}
	return key, nil
}

var (
	oidPBES2      = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 13}
	oidPBKDF2     = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 12}
	oidScrypt     = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 11591, 4, 11}
	oidHMACSHA1   = asn1.ObjectIdentifier{1, 2, 840, 113549, 2, 7}
	oidHMACSHA256 = asn1.ObjectIdentifier{1, 2, 840, 113549, 2, 9}
	oidAES        = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1}
)

// checkPBES2 reads the parameters of an EncryptedPrivateKeyInfo (RFC 5958 section 3, RFC 8018) before any of
// them is acted on: the decoder behind it bounds nothing, and panics on a wrong IV or a partial block.
func checkPBES2(der []byte) error {
	bad := func(text string) error { return fault.BadField("private", "%s", text) }
	var info struct {
		Algorithm pkix.AlgorithmIdentifier
		Data      []byte
	}
	if rest, err := asn1.Unmarshal(der, &info); err != nil || len(rest) != 0 {
		return bad("not an EncryptedPrivateKeyInfo")
	}
	if !info.Algorithm.Algorithm.Equal(oidPBES2) {
		return bad("only PBES2 is supported")
	}
	var params struct{ KDF, Cipher pkix.AlgorithmIdentifier }
	if rest, err := asn1.Unmarshal(info.Algorithm.Parameters.FullBytes, &params); err != nil || len(rest) != 0 {
		return bad("the PBES2 parameters do not parse")
	}
	// aes128-CBC-PAD, aes192-CBC-PAD and aes256-CBC-PAD are the arcs 2, 22 and 42 under oidAES.
	c := params.Cipher.Algorithm
	if len(c) != len(oidAES)+1 || !c[:len(oidAES)].Equal(oidAES) {
		return bad("the cipher is not AES in CBC mode")
	}
	if arc := c[len(oidAES)]; arc != 2 && arc != 22 && arc != 42 {
		return bad("the cipher is not AES in CBC mode")
	}
	var iv []byte
	rest, err := asn1.Unmarshal(params.Cipher.Parameters.FullBytes, &iv)
	if err != nil || len(rest) != 0 || len(iv) != 16 || len(info.Data) == 0 || len(info.Data)%16 != 0 {
		return bad("the initialisation vector or the ciphertext has a wrong length")
	}
	switch {
	case params.KDF.Algorithm.Equal(oidPBKDF2):
		return checkPBKDF2(params.KDF.Parameters.FullBytes)
	case params.KDF.Algorithm.Equal(oidScrypt):
		return checkScrypt(params.KDF.Parameters.FullBytes)
	}
	return bad("the key derivation is neither PBKDF2 nor scrypt")
}

func checkPBKDF2(der []byte) error {
	var p struct {
		Salt       []byte
		Iterations int
		PRF        pkix.AlgorithmIdentifier `asn1:"optional"`
	}
	rest, err := asn1.Unmarshal(der, &p)
	if err != nil || len(rest) != 0 || p.Iterations < 1 {
		return fault.BadField("private", "the PBKDF2 parameters do not parse")
	}
	if len(p.PRF.Algorithm) != 0 && !p.PRF.Algorithm.Equal(oidHMACSHA1) && !p.PRF.Algorithm.Equal(oidHMACSHA256) {
		return fault.BadField("private", "the PRF of PBKDF2 is neither HMAC-SHA-256 nor HMAC-SHA-1")
	}
	if p.Iterations > maxIterations {
		return fault.New(fault.TooLarge, "the file asks for more than %d iterations of PBKDF2", maxIterations)
	}
	return nil
}

func checkScrypt(der []byte) error {
	var p struct {
		Salt    []byte
		N, R, P int
	}
	if rest, err := asn1.Unmarshal(der, &p); err != nil || len(rest) != 0 {
		return fault.BadField("private", "the scrypt parameters do not parse")
	}
	return boundScrypt(p.N, p.R, p.P)
}

// boundScrypt refuses parameters that make no sense or cost too much. No product in it can overflow.
func boundScrypt(n, r, p int) error {
	if n < 2 || n&(n-1) != 0 || r < 1 || p < 1 {
		return fault.BadField("private", "the scrypt parameters are out of range")
	}
	if n > 1<<21 || r > 64 || p > 64 || 128*n*r > maxScryptMemory || n*r*p > maxScryptWork {
		return fault.New(fault.TooLarge, "the file asks for more memory or time than scrypt may take")
	}
	return nil
}
