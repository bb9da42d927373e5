package tpm

import (
	"bytes"
	"strings"

	"github.com/google/go-tpm/tpm2"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
)

// srkHandle is where provisioning tools keep the storage root key (TCG TPM v2.0 Provisioning Guidance, 7.8).
const srkHandle = tpm2.TPMHandle(0x81000001)

// preferred lists the algorithms that a TPM may have, best default first. No TPM has Ed25519.
var preferred = []ident.Algorithm{ident.ECDSAP256, ident.ECDSAP384, ident.RSA3072, ident.RSA2048, ident.RSA4096}

// A kind is how one algorithm looks to a TPM.
type kind struct {
	hash  tpm2.TPMAlgID
	curve tpm2.TPMECCCurve    // of an ECC key
	bits  tpm2.TPMIRSAKeyBits // of an RSA key
}

var kinds = map[ident.Algorithm]kind{
	ident.ECDSAP256: {hash: tpm2.TPMAlgSHA256, curve: tpm2.TPMECCNistP256},
	ident.ECDSAP384: {hash: tpm2.TPMAlgSHA384, curve: tpm2.TPMECCNistP384},
	ident.RSA2048:   {hash: tpm2.TPMAlgSHA256, bits: 2048},
	ident.RSA3072:   {hash: tpm2.TPMAlgSHA256, bits: 3072},
	ident.RSA4096:   {hash: tpm2.TPMAlgSHA256, bits: 4096},
}

// parms returns the parameters of a key of the kind, with the scheme fixed in the key: the TPM itself then refuses
// any other padding or hash.
func (k kind) parms() tpm2.TPMTPublicParms {
	none := tpm2.TPMTSymDefObject{Algorithm: tpm2.TPMAlgNull}
	if k.bits != 0 {
		return tpm2.TPMTPublicParms{Type: tpm2.TPMAlgRSA, Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA,
			&tpm2.TPMSRSAParms{Symmetric: none, KeyBits: k.bits, Scheme: tpm2.TPMTRSAScheme{
				Scheme:  tpm2.TPMAlgRSAPSS,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgRSAPSS, &tpm2.TPMSSigSchemeRSAPSS{HashAlg: k.hash}),
			}})}
	}
	return tpm2.TPMTPublicParms{Type: tpm2.TPMAlgECC, Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC,
		&tpm2.TPMSECCParms{Symmetric: none, CurveID: k.curve, KDF: tpm2.TPMTKDFScheme{Scheme: tpm2.TPMAlgNull},
			Scheme: tpm2.TPMTECCScheme{
				Scheme:  tpm2.TPMAlgECDSA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: k.hash}),
			}})}
}

// template returns the public area of a new key. The key signs and does nothing else, was made by this TPM, and
// cannot leave it. Its authorisation value is empty: one that lies in the file beside the blob guards nothing that
// the file's mode does not, and noDA keeps a lockout that another program causes from stopping our signatures.
func (k kind) template() tpm2.TPMTPublic {
	p := k.parms()
	return tpm2.TPMTPublic{
		Type:    p.Type,
		NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true, SignEncrypt: true,
		},
		Parameters: p.Parameters,
	}
}

// publicKey reads a key's public area, and refuses a key that this backend cannot sign with.
func publicKey(area *tpm2.TPMTPublic) (ident.PublicKey, error) {
	a := area.ObjectAttributes
	if !a.SignEncrypt || a.Restricted || a.Decrypt || !a.UserWithAuth {
		return ident.PublicKey{}, fault.New(fault.Malformed, "not an unrestricted signing key used with its auth value")
	}
	key, err := tpm2.Pub(*area)
	if err != nil {
		return ident.PublicKey{}, fault.Wrap(fault.Malformed, err, "not a usable public key")
	}
	pub, err := ident.NewPublicKey(key)
	if err != nil {
		return ident.PublicKey{}, err
	}
	k, ok := kinds[pub.Algorithm()]
	if !ok || !k.admits(area) {
		return ident.PublicKey{}, fault.New(fault.AlgorithmUnsupported, "the key's scheme is not the one of its algorithm")
	}
	return pub, nil
}

// admits reports whether the scheme fixed in a key is ours, or none is.
func (k kind) admits(area *tpm2.TPMTPublic) bool {
	if parms, err := area.Parameters.RSADetail(); err == nil {
		if parms.Scheme.Scheme == tpm2.TPMAlgNull {
			return true
		}
		s, err := parms.Scheme.Details.RSAPSS()
		return err == nil && s.HashAlg == k.hash
	}
	parms, err := area.Parameters.ECCDetail()
	if err != nil {
		return false
	}
	if parms.Scheme.Scheme == tpm2.TPMAlgNull {
		return true
	}
	s, err := parms.Scheme.Details.ECDSA()
	return err == nil && s.HashAlg == k.hash
}

// isSRK reports whether a public area is that of an ECC storage key by the TCG's template, but for its point.
func isSRK(area tpm2.TPMTPublic) bool {
	area.Unique = tpm2.ECCSRKTemplate.Unique
	return bytes.Equal(tpm2.Marshal(area), tpm2.Marshal(tpm2.ECCSRKTemplate))
}

// rawSignature returns the signature as trustd's formats have it: r||s of fixed width, or the RSA block.
func rawSignature(alg ident.Algorithm, sig *tpm2.TPMTSignature) ([]byte, error) {
	size := alg.SignatureSize()
	if s, err := sig.Signature.RSAPSS(); err == nil {
		if len(s.Sig.Buffer) != size {
			return nil, errProof
		}
		return bytes.Clone(s.Sig.Buffer), nil
	}
	s, err := sig.Signature.ECDSA()
	if err != nil {
		return nil, errProof
	}
	r, v, half := s.SignatureR.Buffer, s.SignatureS.Buffer, size/2
	if len(r) > half || len(v) > half {
		return nil, errProof
	}
	out := make([]byte, size)
	copy(out[half-len(r):half], r)
	copy(out[size-len(v):], v)
	return out, nil
}

func names(algs []ident.Algorithm) string {
	all := make([]string, len(algs))
	for i, a := range algs {
		all[i] = a.String()
	}
	return strings.Join(all, ", ")
}
