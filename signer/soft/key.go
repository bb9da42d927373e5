package soft

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"math/big"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
)

// A Key is a key of a Backend.
type Key struct {
	backend *Backend
	public  ident.PublicKey
	info    signer.KeyInfo
}

// Public implements signer.Signer.
func (k *Key) Public() ident.PublicKey { return k.public }

// Info implements signer.Key.
func (k *Key) Info() signer.KeyInfo { return k.info }

// Sign implements signer.Signer.
func (k *Key) Sign(ctx context.Context, msg []byte) ([]byte, error) {
	r := k.SignBatch(ctx, [][]byte{msg})[0]
	return r.Signature, r.Err
}

// SignBatch implements signer.BatchSigner. The file is looked at once: a key whose file is gone signs no more.
func (k *Key) SignBatch(ctx context.Context, msgs [][]byte) []signer.Result {
	out := make([]signer.Result, len(msgs))
	release, err := k.backend.begin(ctx)
	if err != nil {
		return failAll(out, err)
	}
	defer release()
	loaded, err := k.backend.loadAs(k.info.ID, k.public)
	if err != nil {
		return failAll(out, err)
	}
	for i, m := range msgs {
		if err := ctx.Err(); err != nil {
			failAll(out[i:], fault.From(err))
			break
		}
		out[i].Signature, out[i].Err = sign(loaded.private, k.public, m)
	}
	return out
}

func failAll(out []signer.Result, err error) []signer.Result {
	for i := range out {
		out[i].Err = err
	}
	return out
}

// sign signs and checks the result: a wrong signature may give the key away.
func sign(private crypto.Signer, pub ident.PublicKey, msg []byte) ([]byte, error) {
	sig, err := rawSignature(private, pub.Algorithm(), msg)
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "")
	}
	if err := signature.Verify(pub, msg, sig); err != nil {
		return nil, fault.Wrap(fault.Internal, err, "a signature that was just made does not verify")
	}
	return sig, nil
}

func rawSignature(private crypto.Signer, alg ident.Algorithm, msg []byte) ([]byte, error) {
	digest := signature.Digest(alg, msg)
	switch p := private.(type) {
	case ed25519.PrivateKey:
		return ed25519.Sign(p, digest), nil
	case *ecdsa.PrivateKey:
		r, s, err := ecdsa.Sign(rand.Reader, p, digest)
		if err != nil {
			return nil, err
		}
		return fixedWidth(alg.SignatureSize(), r, s), nil
	case *rsa.PrivateKey:
		opts := signature.PSSOptions()
		return rsa.SignPSS(rand.Reader, p, opts.Hash, digest, opts)
	}
	return nil, fault.New(fault.Internal, "a key of an unknown type")
}

// fixedWidth returns r||s, each in half of size bytes.
func fixedWidth(size int, r, s *big.Int) []byte {
	sig := make([]byte, size)
	r.FillBytes(sig[:size/2])
	s.FillBytes(sig[size/2:])
	return sig
}

// generate makes a private key. An RSA key takes seconds and cannot be interrupted: when the context ends first,
// the key is dropped once it is there.
func generate(ctx context.Context, alg ident.Algorithm) (crypto.Signer, error) {
	type made struct {
		key crypto.Signer
		err error
	}
	done := make(chan made, 1)
	go func() {
		key, err := newPrivate(alg)
		done <- made{key, err}
	}()
	select {
	case <-ctx.Done():
		return nil, fault.From(ctx.Err())
	case m := <-done:
		if m.err != nil {
			return nil, fault.Wrap(fault.Internal, m.err, "")
		}
		return m.key, nil
	}
}

func newPrivate(alg ident.Algorithm) (crypto.Signer, error) {
	switch alg {
	case ident.Ed25519:
		_, k, err := ed25519.GenerateKey(rand.Reader)
		return k, err
	case ident.ECDSAP256:
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case ident.ECDSAP384:
		return ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	}
	return rsa.GenerateKey(rand.Reader, 8*alg.SignatureSize())
}
