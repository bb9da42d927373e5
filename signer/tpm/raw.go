package tpm

import (
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// A Raw signs with TPM2_Sign alone, over a connection of its own and with one HMAC session that is used again: no
// queue, no deadline, no repair. It is what benchmarks compare a Signer with, and never signs for anybody. Use it
// from one goroutine.
type Raw struct {
	conn   net.Conn
	tpm    transport.TPM
	key    tpm2.AuthHandle
	public *ecdsa.PublicKey
}

// OpenRaw connects to a swtpm that nobody else uses and makes an ECDSA P-256 key that goes with the connection.
func OpenRaw(path string) (_ *Raw, err error) {
	conn, err := net.Dial("unix", path)
	if err != nil {
		return nil, fmt.Errorf("connecting to the TPM: %w", err)
	}
	defer func() {
		if err != nil {
			conn.Close()
		}
	}()
	r := &Raw{conn: conn, tpm: transport.FromReadWriter(struct {
		io.Reader
		io.Writer
	}{conn, conn})}
	srk, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(r.tpm)
	if err != nil {
		return nil, fmt.Errorf("deriving the storage key: %w", err)
	}
	parent := tpm2.NamedHandle{Handle: srk.ObjectHandle, Name: srk.Name}
	made, err := tpm2.Create{ParentHandle: parent, InPublic: tpm2.New2B(tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, SignEncrypt: true,
		},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{CurveID: tpm2.TPMECCNistP256}),
	})}.Execute(r.tpm)
	if err != nil {
		return nil, fmt.Errorf("making a key: %w", err)
	}
	loaded, err := tpm2.Load{ParentHandle: parent, InPrivate: made.OutPrivate, InPublic: made.OutPublic}.Execute(r.tpm)
	if err != nil {
		return nil, fmt.Errorf("loading the key: %w", err)
	}
	session, _, err := tpm2.HMACSession(r.tpm, tpm2.TPMAlgSHA256, 16)
	if err != nil {
		return nil, fmt.Errorf("starting a session: %w", err)
	}
	area, err := made.OutPublic.Contents()
	if err != nil {
		return nil, fmt.Errorf("reading the public key: %w", err)
	}
	pub, err := tpm2.Pub(*area)
	if err != nil {
		return nil, fmt.Errorf("reading the public key: %w", err)
	}
	ec, ok := pub.(*ecdsa.PublicKey)
	if !ok {
		return nil, errors.New("the TPM made a key of another kind")
	}
	r.public, r.key = ec, tpm2.AuthHandle{Handle: loaded.ObjectHandle, Name: loaded.Name, Auth: session}
	return r, nil
}

// SignAndVerify makes one signature of msg and verifies it.
func (r *Raw) SignAndVerify(msg []byte) error {
	digest := sha256.Sum256(msg)
	rsp, err := tpm2.Sign{
		KeyHandle: r.key,
		Digest:    tpm2.TPM2BDigest{Buffer: digest[:]},
		InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgECDSA,
			Details: tpm2.NewTPMUSigScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSchemeHash{HashAlg: tpm2.TPMAlgSHA256})},
		Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck},
	}.Execute(r.tpm)
	if err != nil {
		return fmt.Errorf("signing: %w", err)
	}
	s, err := rsp.Signature.Signature.ECDSA()
	if err != nil {
		return fmt.Errorf("reading the signature: %w", err)
	}
	sigR, sigS := new(big.Int).SetBytes(s.SignatureR.Buffer), new(big.Int).SetBytes(s.SignatureS.Buffer)
	if !ecdsa.Verify(r.public, digest[:], sigR, sigS) {
		return errors.New("the signature does not verify")
	}
	return nil
}

// Close closes the connection.
func (r *Raw) Close() error { return r.conn.Close() }
