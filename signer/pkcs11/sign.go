//go:build cgo

package pkcs11

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"sync/atomic"

	"github.com/miekg/pkcs11"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
)

// A key signs with one private key of the token.
type key struct {
	b    *Backend
	info signer.KeyInfo
}

var _ signer.BatchSigner = (*key)(nil)

func (b *Backend) key(info signer.KeyInfo) *key { return &key{b: b, info: info} }

func (k *key) Public() ident.PublicKey { return k.info.Public }

func (k *key) Info() signer.KeyInfo { return k.info }

// Sign implements signer.Signer. A signature that does not verify is made once more, on a fresh session.
func (k *key) Sign(ctx context.Context, msg []byte) ([]byte, error) {
	input := signature.Digest(k.info.Public.Algorithm(), msg)
	if ctx.Done() != nil && k.info.Public.Algorithm() == ident.Ed25519 {
		input = bytes.Clone(msg) // a call that outlives ctx must not read the caller's memory
	}
	for again := false; ; again = true {
		made, err := do(ctx, k.b, func(s *slot) (made, error) { return k.raw(s, input) })
		if err != nil {
			return nil, err
		}
		// Outside the slot, so that the session signs the next message meanwhile.
		err = signature.Verify(k.info.Public, msg, made.signature)
		if err == nil {
			return made.signature, nil
		}
		wrong := &failure{class: signer.ModuleDead, op: "C_Sign", cause: err}
		k.b.failures.add(wrong)
		k.b.cfg.Log.Error("the token returned a signature that does not verify", "key", k.info.ID.String(), "again", again)
		if again {
			return nil, fault.Wrap(fault.DeviceDead, wrong, "the token returned a signature that does not verify")
		}
		made.link.distrust(k.info.ID, made.generation)
	}
}

// made is an unverified signature and where it comes from.
type made struct {
	signature  []byte
	link       *link
	generation uint32
}

// raw makes one signature, unverified.
func (k *key) raw(s *slot, input []byte) (made, error) {
	l := s.link
	h, ok := l.handle(refOf(k.info))
	if !ok {
		e, err := l.lookup(s, k.info.ID)
		if err != nil {
			return made{}, err
		}
		if err := l.belongs(s, e, k.info.Public); err != nil {
			return made{}, err
		}
		h = e.handle
		l.remember(refOf(k.info), h)
	}
	sig, err := l.sign(s, k.info.Public.Algorithm(), h, input)
	if ok && oddities[rvOf(err)] {
		err = &failure{class: signer.HandleLost, op: "C_SignInit", cause: errors.Unwrap(err)}
	}
	switch {
	case err == nil:
		if l.unwell.Load() > 0 {
			l.unwell.Store(0)
		}
	case classOf(err) == signer.HandleLost || classOf(err) == signer.KeyGone:
		l.forget(k.info.ID)
	}
	return made{sig, l, s.generation}, err
}

// oddities are what SoftHSM says of the handle of a key that is just being deleted, and what is believed only of one
// that was just found.
var oddities = map[pkcs11.Error]bool{
	pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED: true, pkcs11.CKR_KEY_TYPE_INCONSISTENT: true,
}

// sign makes one signature of a message (Ed25519) or digest.
func (l *link) sign(s *slot, alg ident.Algorithm, h objectHandle, input []byte) ([]byte, error) {
	mech := edDSA
	switch alg {
	case ident.Ed25519:
	case ident.ECDSAP256, ident.ECDSAP384:
		mech = ecDSA
	default:
		mech = rsaPSS
	}
	if err := l.mod.SignInit(s.session, mech, h); err != nil {
		return nil, failed("C_SignInit", err)
	}
	sig, err := l.mod.Sign(s.session, input)
	return sig, failed("C_Sign", err)
}

var (
	edDSA  = []*pkcs11.Mechanism{pkcs11.NewMechanism(ckmEdDSA, nil)}
	ecDSA  = []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil)}
	rsaPSS = []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_PSS,
		pkcs11.NewPSSParams(pkcs11.CKM_SHA256, pkcs11.CKG_MGF1_SHA256, 32))}
)

// SignBatch implements signer.BatchSigner: while one message is being verified, the sessions sign others.
func (k *key) SignBatch(ctx context.Context, msgs [][]byte) []signer.Result {
	out := make([]signer.Result, len(msgs))
	if len(msgs) == 1 {
		out[0].Signature, out[0].Err = k.Sign(ctx, msgs[0])
		return out
	}
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(len(msgs), 2*k.b.cfg.Sessions) {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= len(msgs) {
					return
				}
				out[i].Signature, out[i].Err = k.Sign(ctx, msgs[i])
			}
		})
	}
	wg.Wait()
	return out
}
