package tpm

import (
	"context"
	"log/slog"

	"github.com/google/go-tpm/tpm2"

	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signer"
)

// Classify returns the class of a command's error.
func Classify(err error) signer.Class { return classify(err) }

// TryOut judges the first signature of a new key, and reports whether RSA is offered afterwards.
func TryOut(pub ident.PublicKey, msg, sig []byte) (rsa bool, err error) {
	b := &Backend{log: slog.New(slog.DiscardHandler), notes: newNotes(slog.New(slog.DiscardHandler))}
	err = (&key{backend: b, pub: pub}).tryOut(msg, sig)
	offered := b.offered(&facts{algorithms: []ident.Algorithm{ident.ECDSAP256, ident.RSA2048}})
	return len(offered) == 2, err
}

// ParseKey reads the files of a key, and returns its public key.
func ParseKey(public, private, record []byte) (ident.PublicKey, error) {
	k, err := parseKey(public, private, record)
	return k.pub, err
}

// MaxSaved is how many contexts are kept.
const MaxSaved = maxSaved

// Tamper has the chip prove the next n signatures, and then give out others.
func Tamper(b *Backend, n int) error {
	return b.do(context.Background(), func(ch *chip) error {
		if err := ch.startSession(); err != nil {
			return err
		}
		ch.session = &tampered{Session: ch.session, times: n}
		return nil
	})
}

type tampered struct {
	tpm2.Session
	times int
}

func (s *tampered) Validate(
	rc tpm2.TPMRC, cc tpm2.TPMCC, params []byte, names []tpm2.TPM2BName, i int, a *tpm2.TPMSAuthResponse,
) error {
	err := s.Session.Validate(rc, cc, params, names, i, a)
	if err == nil && cc == tpm2.TPMCCSign && s.times > 0 {
		s.times--
		params[len(params)-1] ^= 1
	}
	return err
}

// SplitResponse takes a response apart and returns its parameters and the nonce and HMAC that prove them.
func SplitResponse(rsp []byte) (params, nonce, mac []byte, err error) {
	params, proof, err := splitResponse(rsp)
	if err != nil {
		return nil, nil, nil, err
	}
	return params, proof.Nonce.Buffer, proof.Authorization.Buffer, nil
}
