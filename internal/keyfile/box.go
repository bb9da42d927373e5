package keyfile

import (
	"crypto/rand"
	"runtime/debug"

	"golang.org/x/crypto/chacha20poly1305"
	"golang.org/x/crypto/scrypt"

	"github.com/trustd/trustd/fault"
)

// KeySize is the length of the keys of SealWithKey, in bytes.
const KeySize = chacha20poly1305.KeySize

// A Cost is what deriving a key from a passphrase takes: 128 * 2^LogN * R bytes of memory, P times over.
type Cost struct {
	LogN int `json:"log_n"`
	R    int `json:"r"`
	P    int `json:"p"`
}

// DefaultCost takes 64 MiB and a few tenths of a second.
var DefaultCost = Cost{LogN: 16, R: 8, P: 2}

const saltSize = 16

// A Box is a secret under a passphrase: scrypt, then XChaCha20-Poly1305.
type Box struct {
	Cost
	Salt   []byte `json:"salt"`
	Sealed []byte `json:"sealed"` // nonce and ciphertext
}

// Seal closes plain in a Box. aad is authenticated with it and must be given again to open it.
func Seal(passphrase, aad, plain []byte, cost Cost) (Box, error) {
	b := Box{Cost: cost, Salt: random(saltSize)}
	key, err := b.key(passphrase)
	if err != nil {
		return Box{}, err
	}
	defer clear(key)
	b.Sealed, err = SealWithKey(key, aad, plain)
	return b, err
}

// Open returns what Seal closed in. A wrong passphrase, other aad and a damaged Box are all wrong_passphrase.
func (b Box) Open(passphrase, aad []byte) ([]byte, error) {
	key, err := b.key(passphrase)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	plain, err := OpenWithKey(key, aad, b.Sealed)
	if err != nil {
		return nil, refused(err)
	}
	return plain, nil
}

func (b Box) key(passphrase []byte) ([]byte, error) {
	if b.LogN < 1 || b.LogN > 30 || len(b.Salt) < 8 || len(b.Salt) > 64 {
		return nil, fault.BadField("private", "the scrypt parameters are out of range")
	}
	if err := boundScrypt(1<<b.LogN, b.R, b.P); err != nil {
		return nil, err
	}
	key, err := scrypt.Key(passphrase, b.Salt, 1<<b.LogN, b.R, b.P, KeySize)
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "")
	}
	// The table of scrypt is larger than all else that the daemon holds; give it back now, not in minutes.
	debug.FreeOSMemory()
	return key, nil
}

// SealWithKey encrypts plain under a random key of KeySize bytes and returns the nonce and the ciphertext.
func SealWithKey(key, aad, plain []byte) ([]byte, error) {
	aead, err := chacha20poly1305.NewX(key)
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "")
	}
	nonce := random(chacha20poly1305.NonceSizeX)
	return aead.Seal(nonce, nonce, plain, aad), nil
}

// OpenWithKey decrypts what SealWithKey returned; any other input is corrupt.
func OpenWithKey(key, aad, sealed []byte) ([]byte, error) {
	aead, err := chacha20poly1305.NewX(key)
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "")
	}
	if len(sealed) < chacha20poly1305.NonceSizeX {
		return nil, fault.New(fault.Corrupt, "the ciphertext is too short")
	}
	n := chacha20poly1305.NonceSizeX
	plain, err := aead.Open(nil, sealed[:n:n], sealed[n:], aad)
	if err != nil {
		return nil, fault.Wrap(fault.Corrupt, err, "the ciphertext does not authenticate")
	}
	return plain, nil
}

func random(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return b
}
