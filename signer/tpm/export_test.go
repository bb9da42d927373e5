package tpm

import (
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signer"
)

// Classify returns the class of a command's error.
func Classify(err error) signer.Class { return classify(err) }

// TryOut judges the first signature of a new key, and reports whether RSA is offered afterwards.
func TryOut(pub ident.PublicKey, msg, sig []byte) (rsa bool, err error) {
	b := &Backend{}
	err = (&key{backend: b, pub: pub}).tryOut(msg, sig)
	offered := b.offered(&facts{algorithms: []ident.Algorithm{ident.ECDSAP256, ident.RSA2048}})
	return len(offered) == 2, err
}

// ParseKey reads the files of a key, and returns its public key.
func ParseKey(public, private, record []byte) (ident.PublicKey, error) {
	k, err := parseKey(public, private, record)
	return k.pub, err
}
