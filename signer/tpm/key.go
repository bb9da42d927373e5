package tpm

import (
	"context"
	"crypto"
	"crypto/rsa"
	"errors"
	"sync"
	"sync/atomic"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
)

// A key is one key of the backend. It implements signer.Key and signer.BatchSigner.
type key struct {
	backend *Backend
	id      signer.ID
	object  *object
	pub     ident.PublicKey
	grade   signer.Grade
	origin  signer.Origin

	destroyed atomic.Bool
	refused   atomic.Pointer[fault.Error] // the TPM refused our authorisation; asking again counts towards its lockout
}

// Public returns the public key.
func (k *key) Public() ident.PublicKey { return k.pub }

// Info describes the key.
func (k *key) Info() signer.KeyInfo { return info(k.id, k.object, k.pub, k.origin, k.grade) }

func info(id signer.ID, o *object, pub ident.PublicKey, origin signer.Origin, grade signer.Grade) signer.KeyInfo {
	a := o.area.ObjectAttributes
	return signer.KeyInfo{
		URI: uri(id), ID: id, Public: pub, Grade: grade, Origin: origin,
		Sensitive: a.FixedTPM,
		Always:    a.FixedTPM && a.SensitiveDataOrigin,
	}
}

func uri(id signer.ID) string { return signer.URI{Scheme: "tpm", ID: id}.String() }

// digest returns what the TPM is to sign.
func digest(alg ident.Algorithm, msg []byte) []byte { return signature.Digest(alg, msg) }

// Sign hashes the message, has the TPM sign the hash and verifies the result, outside the TPM's queue, so that the
// chip is at its next signature meanwhile. A wrong signature is made anew once, by the key loaded anew.
func (k *key) Sign(ctx context.Context, msg []byte) ([]byte, error) {
	d := digest(k.pub.Algorithm(), msg)
	sig, losses, err := k.signDigest(ctx, d, nil)
	if err != nil {
		return nil, err
	}
	if signature.Verify(k.pub, msg, sig) != nil {
		k.backend.wrongSignature(k.id)
		sig, losses, err = k.signDigest(ctx, d, func(ch *chip) error { return ch.forget(k.object) })
		if err != nil {
			return nil, err
		}
		if err := signature.Verify(k.pub, msg, sig); err != nil {
			return nil, k.backend.wrongSignature(k.id)
		}
	}
	k.backend.notes.prove(losses)
	return sig, nil
}

// wrongSignature counts a signature that does not verify and returns the error for it.
func (b *Backend) wrongSignature(id signer.ID) error {
	b.log.Error("the TPM returned a wrong signature", "key", id.String())
	b.notes.count(signer.ModuleDead)
	return fault.Wrap(fault.DeviceDead, &failure{class: signer.ModuleDead}, "the TPM returns wrong signatures")
}

// signDigest has the TPM sign, after it did first. losses is how often the TPM had gone until then.
func (k *key) signDigest(ctx context.Context, d []byte, first func(*chip) error) (sig []byte, losses uint64, err error) {
	if err := k.usable(); err != nil {
		return nil, 0, err
	}
	type made struct {
		sig    []byte
		losses uint64
	}
	out, err := ask(ctx, k.backend, func(ch *chip) (made, error) {
		if err := k.usable(); err != nil {
			return made{}, err
		}
		if first != nil {
			if err := first(ch); err != nil {
				return made{}, err
			}
		}
		s, err := ch.sign(k.object, k.pub.Algorithm(), d)
		if errors.Is(err, errKeyRefused) {
			k.backend.lock(k, err)
		}
		return made{s, k.backend.notes.losses.Load()}, err
	})
	return out.sig, out.losses, err
}

func (k *key) usable() error {
	if k.destroyed.Load() {
		return fault.New(fault.KeyGone, "the key was destroyed")
	}
	if e := k.refused.Load(); e != nil {
		return e
	}
	return nil
}

// inFlight is how many signatures of a batch are on their way: one in the TPM, one being verified, one ready to
// follow. The queue is fair, so a batch keeps nobody else waiting for more than these.
const inFlight = 3

// SignBatch signs each message. The TPM works on one while others are verified.
func (k *key) SignBatch(ctx context.Context, msgs [][]byte) []signer.Result {
	out := make([]signer.Result, len(msgs))
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(inFlight, len(msgs)) {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < len(msgs); i = int(next.Add(1)) - 1 {
				out[i].Signature, out[i].Err = k.Sign(ctx, msgs[i])
			}
		})
	}
	wg.Wait()
	return out
}

// tryOut verifies the first signature of a new key.
func (k *key) tryOut(msg, sig []byte) error {
	if signature.Verify(k.pub, msg, sig) == nil {
		return nil
	}
	if p, ok := k.pub.Key().(*rsa.PublicKey); ok {
		any := &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthAuto, Hash: crypto.SHA256}
		if rsa.VerifyPSS(p, crypto.SHA256, digest(k.pub.Algorithm(), msg), sig, any) == nil {
			k.backend.badPSS.Store(true)
			return fault.New(fault.AlgorithmUnsupported,
				"this TPM makes RSA-PSS signatures with another salt length than the hash's, which nobody here verifies; "+
					"use ecdsa-p256")
		}
	}
	return k.backend.wrongSignature(k.id)
}

var (
	_ signer.Key         = (*key)(nil)
	_ signer.BatchSigner = (*key)(nil)
)
