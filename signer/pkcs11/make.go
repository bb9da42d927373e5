//go:build cgo

package pkcs11

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"math/big"
	"strings"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signer"
)

var publicExponent = []byte{1, 0, 1}

// Generate implements signer.Backend.
func (b *Backend) Generate(ctx context.Context, id signer.ID, alg ident.Algorithm) (signer.Key, error) {
	unlock, err := b.maker(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	begun := false // the id was free: what has it now is a half of this call's work
	info, err := do(ctx, b, func(s *slot) (signer.KeyInfo, error) {
		l := s.link
		if !l.makes(alg) {
			return signer.KeyInfo{}, l.cannotMake()
		}
		if err := l.vacate(s, id, &begun); err != nil {
			return signer.KeyInfo{}, err
		}
		h, err := l.generate(s, id, alg, b)
		if err != nil {
			return signer.KeyInfo{}, err
		}
		return l.made(ctx, s, id, h)
	})
	if err != nil {
		return nil, err
	}
	if info.Public.Algorithm() != alg {
		return nil, fault.New(fault.DeviceDead, "the token made a key of another algorithm than asked for")
	}
	return b.key(info), nil
}

const (
	generateTries = 5
	loudTries     = 2 // that others may search beside
	quietLimit    = 100 * time.Millisecond
)

// generate makes a key pair. SoftHSM 2.6 fails at times while other sessions search: their refresh of the index
// takes the half-written object for a broken one, and the error blames the caller, or nobody. What is left of the
// pair is removed and the key made anew, at last with the other sessions held back.
func (l *link) generate(s *slot, id signer.ID, alg ident.Algorithm, b *Backend) (objectHandle, error) {
	for try := 1; ; try++ {
		resume := func() {}
		if try > loudTries {
			resume = b.quiet(quietLimit)
		}
		mech, pub := generation(alg)
		_, h, err := l.mod.GenerateKeyPair(s.session, mech, append(pub, publicObject(id)...), privateObject(id))
		if err != nil {
			_ = l.destroy(s, id)
		}
		resume()
		if err == nil {
			return h, nil
		}
		err = failed("C_GenerateKeyPair", err)
		again := classOf(err) == signer.CallerError || classOf(err) == signer.TokenLost && l.right() == nil
		if !again || try == generateTries {
			return 0, err
		}
		b.failures.add(err)
	}
}

func (l *link) cannotMake() error {
	can := make([]string, len(l.algorithms))
	for i, a := range l.algorithms {
		can[i] = a.String()
	}
	text := "this token makes no keys of that algorithm; it makes: " + strings.Join(can, ", ")
	return &fault.Error{Code: fault.AlgorithmUnsupported, Field: "algorithm", Text: text}
}

// unused refuses an id that any key on the token has.
func (l *link) unused(s *slot, id signer.ID) error {
	if _, err := signer.NewID(id.Bytes()); err != nil {
		return err
	}
	found, err := l.objects(s, id)
	if err != nil {
		return err
	}
	if len(found) > 0 {
		return fault.New(fault.AlreadyExists, "the token holds a key with this id")
	}
	if in, err := l.loggedIn(s); err != nil || in {
		return err
	}
	return failing(signer.LoginLost, "looking for the id", "the session is not logged in")
}

// vacate refuses an id that any key on the token has, and removes what an earlier try of the same call left under it.
func (l *link) vacate(s *slot, id signer.ID, begun *bool) error {
	if *begun {
		return failed("C_DestroyObject", l.destroy(s, id))
	}
	err := l.unused(s, id)
	*begun = err == nil
	return err
}

// made reads a new key back and remembers its handle. A key whose caller has left meanwhile is removed.
func (l *link) made(ctx context.Context, s *slot, id signer.ID, h objectHandle) (signer.KeyInfo, error) {
	e, err := l.describe(s, h)
	if err == nil {
		err = ctx.Err()
	}
	if err == nil && e.info.Problem != "" {
		err = failing(signer.CallerError, "reading the new key", "%s", e.info.Problem)
	}
	if err != nil {
		_ = l.destroy(s, id) // nothing refers to it yet
		return signer.KeyInfo{}, err
	}
	l.remember(refOf(e.info), e.handle)
	return e.info, nil
}

func (l *link) destroy(s *slot, id signer.ID) error {
	found, err := l.objects(s, id)
	for _, h := range found {
		err = errors.Join(err, l.mod.DestroyObject(s.session, h))
	}
	return err
}

func generation(alg ident.Algorithm) ([]*pkcs11.Mechanism, []*attribute) {
	mech := func(m uint) []*pkcs11.Mechanism { return []*pkcs11.Mechanism{pkcs11.NewMechanism(m, nil)} }
	params := func(p []byte) []*attribute { return []*attribute{pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, p)} }
	switch alg {
	case ident.Ed25519:
		return mech(ckmEdwardsKeyPairGen), params(paramsEd25519)
	case ident.ECDSAP256:
		return mech(pkcs11.CKM_EC_KEY_PAIR_GEN), params(paramsP256)
	case ident.ECDSAP384:
		return mech(pkcs11.CKM_EC_KEY_PAIR_GEN), params(paramsP384)
	}
	return mech(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN), []*attribute{
		pkcs11.NewAttribute(pkcs11.CKA_MODULUS_BITS, rsaBits[alg]),
		pkcs11.NewAttribute(pkcs11.CKA_PUBLIC_EXPONENT, publicExponent),
	}
}

func label(id signer.ID) string {
	s := id.String()
	return "trustd-" + s[:min(len(s), 12)]
}

func publicObject(id signer.ID) []*attribute {
	return []*attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, false),
		pkcs11.NewAttribute(pkcs11.CKA_VERIFY, true),
		pkcs11.NewAttribute(pkcs11.CKA_ID, id.Bytes()),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, label(id)),
	}
}

func privateObject(id signer.ID) []*attribute {
	return []*attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
		pkcs11.NewAttribute(pkcs11.CKA_SIGN, true),
		pkcs11.NewAttribute(pkcs11.CKA_ID, id.Bytes()),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, label(id)),
	}
}

// Import implements signer.Importer. The key is kept only if it signs what its public key verifies.
func (b *Backend) Import(ctx context.Context, id signer.ID, pkcs8 []byte) (signer.Key, error) {
	private, pub, err := parsePrivate(pkcs8)
	if err != nil {
		return nil, err
	}
	unlock, err := b.maker(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	begun := false
	info, err := do(ctx, b, func(s *slot) (signer.KeyInfo, error) {
		l := s.link
		if err := l.vacate(s, id, &begun); err != nil {
			return signer.KeyInfo{}, err
		}
		pubObject, privObject := importObjects(private, pub)
		h, err := l.mod.CreateObject(s.session, append(privObject, privateObject(id)...))
		if err == nil {
			_, err = l.mod.CreateObject(s.session, append(pubObject, publicObject(id)...))
		}
		if err != nil {
			_ = l.destroy(s, id)
			return signer.KeyInfo{}, failed("C_CreateObject", err)
		}
		info, err := l.made(ctx, s, id, h)
		if err != nil {
			return info, err
		}
		return info, l.proveImport(s, info, h)
	})
	if err != nil {
		return nil, err
	}
	return b.key(info), nil
}

func (l *link) proveImport(s *slot, info signer.KeyInfo, h objectHandle) error {
	good, err := l.proves(s, info.ID, h, info.Public)
	if err == nil && !good {
		err = failing(signer.CallerError, "proving the imported key", "its signature does not verify")
	}
	if err != nil {
		l.forget(info.ID)
		_ = l.destroy(s, info.ID)
	}
	return err
}

func parsePrivate(pkcs8 []byte) (any, ident.PublicKey, error) {
	bad := fault.BadField("private_key", "not a PKCS#8 private key of a supported algorithm")
	k, err := x509.ParsePKCS8PrivateKey(pkcs8)
	if err != nil {
		return nil, ident.PublicKey{}, bad
	}
	var pub ident.PublicKey
	switch k := k.(type) {
	case ed25519.PrivateKey:
		pub, err = ident.NewPublicKey(k.Public())
	case *ecdsa.PrivateKey:
		pub, err = ident.NewPublicKey(&k.PublicKey)
	case *rsa.PrivateKey:
		if len(k.Primes) != 2 || k.Validate() != nil {
			return nil, ident.PublicKey{}, bad
		}
		pub, err = ident.NewPublicKey(&k.PublicKey)
	default:
		return nil, ident.PublicKey{}, bad
	}
	return k, pub, err
}

// importObjects returns the attributes of the key material: of the public and of the private object.
func importObjects(private any, pub ident.PublicKey) (public, secret []*attribute) {
	attr := pkcs11.NewAttribute
	switch k := private.(type) {
	case ed25519.PrivateKey:
		params := []*attribute{attr(pkcs11.CKA_KEY_TYPE, keyTypeEdwards), attr(pkcs11.CKA_EC_PARAMS, paramsEd25519)}
		point := append([]byte{pointTagOctets, ed25519.PublicKeySize}, pub.Key().(ed25519.PublicKey)...)
		return with(params, attr(pkcs11.CKA_EC_POINT, point)), with(params, attr(pkcs11.CKA_VALUE, k.Seed()))
	case *ecdsa.PrivateKey:
		curve := paramsP256
		if pub.Algorithm() == ident.ECDSAP384 {
			curve = paramsP384
		}
		params := []*attribute{attr(pkcs11.CKA_KEY_TYPE, keyTypeEC), attr(pkcs11.CKA_EC_PARAMS, curve)}
		raw, _ := k.PublicKey.Bytes() // the point was checked when the key was parsed
		scalar, _ := k.Bytes()
		point := append([]byte{pointTagOctets, byte(len(raw))}, raw...)
		return with(params, attr(pkcs11.CKA_EC_POINT, point)), with(params, attr(pkcs11.CKA_VALUE, scalar))
	case *rsa.PrivateKey:
		k.Precompute()
		big := func(typ uint, n *big.Int) *attribute { return attr(typ, n.Bytes()) }
		public = []*attribute{
			attr(pkcs11.CKA_KEY_TYPE, keyTypeRSA), big(pkcs11.CKA_MODULUS, k.N),
			attr(pkcs11.CKA_PUBLIC_EXPONENT, publicExponent),
		}
		return public, with(public, big(pkcs11.CKA_PRIVATE_EXPONENT, k.D), big(pkcs11.CKA_PRIME_1, k.Primes[0]),
			big(pkcs11.CKA_PRIME_2, k.Primes[1]), big(pkcs11.CKA_EXPONENT_1, k.Precomputed.Dp),
			big(pkcs11.CKA_EXPONENT_2, k.Precomputed.Dq), big(pkcs11.CKA_COEFFICIENT, k.Precomputed.Qinv))
	}
	return nil, nil
}

func with(a []*attribute, more ...*attribute) []*attribute {
	return append(append(make([]*attribute, 0, len(a)+len(more)), a...), more...)
}
