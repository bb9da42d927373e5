package tpm

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signer"
)

// Import takes in a private key that was made elsewhere. It is encrypted to the storage root key before it goes on
// its way to the chip.
func (b *Backend) Import(ctx context.Context, id signer.ID, pkcs8 []byte) (signer.Key, error) {
	private, err := x509.ParsePKCS8PrivateKey(pkcs8)
	if err != nil {
		return nil, fault.BadField("private_key", "not a PKCS#8 private key")
	}
	alg, err := algorithmOf(private)
	if err != nil {
		return nil, err
	}
	done, err := b.claim(ctx, id)
	if err != nil {
		return nil, err
	}
	defer done()
	return b.enrol(ctx, id, alg, func(ch *chip) (*object, error) { return ch.take(private, kinds[alg]) })
}

// algorithmOf returns the algorithm of a private key.
func algorithmOf(private any) (ident.Algorithm, error) {
	s, ok := private.(crypto.Signer)
	if !ok {
		return 0, fault.New(fault.AlgorithmUnsupported, "the private key is not one that signs")
	}
	pub, err := ident.NewPublicKey(s.Public())
	return pub.Algorithm(), err
}

// take imports a private key under the storage root key.
func (ch *chip) take(private any, k kind) (*object, error) {
	area, secret, err := k.foreign(private)
	if err != nil {
		return nil, err
	}
	defer clear(secret)
	if err := ch.startSession(); err != nil {
		return nil, err
	}
	parent, err := ch.parent(nil)
	if err != nil {
		return nil, err
	}
	if err := ch.room(parent); err != nil {
		return nil, err
	}
	name, err := tpm2.ObjectName(&area)
	if err != nil {
		return nil, err
	}
	to, err := tpm2.ImportEncapsulationKey(&parent.area)
	if err != nil {
		return nil, err
	}
	duplicate, seed, err := tpm2.CreateDuplicate(rand.Reader, to, name.Buffer, secret)
	if err != nil {
		return nil, err
	}
	rsp, err := command(tpm2.Import{
		ParentHandle: ch.authorised(parent),
		ObjectPublic: tpm2.New2B(area),
		Duplicate:    tpm2.TPM2BPrivate{Buffer: duplicate},
		InSymSeed:    tpm2.TPM2BEncryptedSecret{Buffer: seed},
		Symmetric:    tpm2.TPMTSymDef{Algorithm: tpm2.TPMAlgNull},
	}.Execute(ch.conn))
	if err != nil {
		return nil, ch.noteRefusal(fmt.Errorf("importing a key: %w", err))
	}
	return newObject(tpm2.Marshal(area), rsp.OutPrivate.Buffer, parent.name.Buffer)
}

// foreign returns the public area and the sensitive area of a key that was not made by the TPM. The attributes say
// so; without a policy nobody can duplicate it from here.
func (k kind) foreign(private any) (tpm2.TPMTPublic, []byte, error) {
	area := k.template()
	area.ObjectAttributes.FixedTPM, area.ObjectAttributes.FixedParent = false, false
	area.ObjectAttributes.SensitiveDataOrigin = false
	s := tpm2.TPMTSensitive{SensitiveType: area.Type}
	switch p := private.(type) {
	case *ecdsa.PrivateKey:
		d, err := p.Bytes()
		if err != nil {
			return area, nil, fault.BadField("private_key", "not a usable private key")
		}
		point, err := p.PublicKey.Bytes() // 4, x, y
		if err != nil {
			return area, nil, fault.BadField("private_key", "not a usable private key")
		}
		half := len(point) / 2
		area.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: point[1 : 1+half]}, Y: tpm2.TPM2BECCParameter{Buffer: point[1+half:]},
		})
		s.Sensitive = tpm2.NewTPMUSensitiveComposite(tpm2.TPMAlgECC, &tpm2.TPM2BECCParameter{Buffer: d})
	case *rsa.PrivateKey:
		if len(p.Primes) != 2 {
			return area, nil, fault.BadField("private_key", "an RSA key has two primes")
		}
		area.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: p.N.Bytes()})
		s.Sensitive = tpm2.NewTPMUSensitiveComposite(tpm2.TPMAlgRSA, &tpm2.TPM2BPrivateKeyRSA{Buffer: p.Primes[0].Bytes()})
	default:
		return area, nil, errors.New("no TPM takes such a key")
	}
	return area, tpm2.Marshal(s), nil
}

var _ signer.Importer = (*Backend)(nil)
