package tpm

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"github.com/trustd/trustd/ident"
)

// errKeyRefused says that it was the key's own authorisation that the TPM refused.
var errKeyRefused = errors.New("the TPM refuses the key's authorisation")

// sign signs a digest with a key.
func (ch *chip) sign(o *object, alg ident.Algorithm, digest []byte) ([]byte, error) {
	if err := ch.startSession(); err != nil {
		return nil, err
	}
	if err := ch.load(o); err != nil {
		return nil, err
	}
	sig, err := ch.signCommand(o, alg, digest)
	if err != nil {
		return nil, ch.doubtRefusal(o, fmt.Errorf("signing: %w", err))
	}
	return rawSignature(alg, sig)
}

// signCommand is TPM2_Sign (TPM 2.0 Library, Part 3, 20.2) written out. It is the one command that counts, and go-tpm's
// reflection costs more than a tenth of what a fast TPM takes for the signature itself. The session remains go-tpm's.
func (ch *chip) signCommand(o *object, alg ident.Algorithm, digest []byte) (*tpm2.TPMTSignature, error) {
	if err := ch.session.NewNonceCaller(); err != nil {
		return nil, err
	}
	params := kinds[alg].signParameters(digest)
	names := []tpm2.TPM2BName{o.name}
	auth, err := ch.session.Authorize(tpm2.TPMCCSign, params, nil, names, 0)
	if err != nil {
		return nil, err
	}
	rsp, err := ch.conn.Send(signRequest(o.handle, auth, params))
	if err != nil {
		return nil, err
	}
	if rc := tpm2.TPMRC(binary.BigEndian.Uint32(rsp[6:])); rc != tpm2.TPMRCSuccess {
		return nil, rc
	}
	out, proof, err := splitResponse(rsp)
	if err != nil {
		return nil, err
	}
	if err := ch.session.Validate(tpm2.TPMRCSuccess, tpm2.TPMCCSign, out, names, 0, proof); err != nil {
		return nil, errors.Join(errProof, err)
	}
	sig, err := tpm2.Unmarshal[tpm2.TPMTSignature](out)
	if err != nil {
		return nil, errors.Join(errProof, err)
	}
	return sig, nil
}

// signParameters returns the parameters of TPM2_Sign: the digest, the scheme, and no ticket, which only restricted
// keys need.
func (k kind) signParameters(digest []byte) []byte {
	scheme := tpm2.TPMAlgECDSA
	if k.bits != 0 {
		scheme = tpm2.TPMAlgRSAPSS
	}
	p := make([]byte, 0, 2+len(digest)+4+8)
	p = appendSized(p, digest)
	p = binary.BigEndian.AppendUint16(p, uint16(scheme))
	p = binary.BigEndian.AppendUint16(p, uint16(k.hash))
	p = binary.BigEndian.AppendUint16(p, uint16(tpm2.TPMSTHashCheck))
	p = binary.BigEndian.AppendUint32(p, uint32(tpm2.TPMRHNull))
	return appendSized(p, nil)
}

// signRequest returns TPM2_Sign with its one authorisation.
func signRequest(key tpm2.TPMHandle, auth *tpm2.TPMSAuthCommand, params []byte) []byte {
	const fixed = headerSize + 4 + 4 // header, key, size of the authorisation
	area := 4 + 2 + len(auth.Nonce.Buffer) + 1 + 2 + len(auth.Authorization.Buffer)
	size := fixed + area + len(params)
	b := make([]byte, 0, size)
	b = binary.BigEndian.AppendUint16(b, uint16(tpm2.TPMSTSessions))
	b = binary.BigEndian.AppendUint32(b, uint32(size))
	b = binary.BigEndian.AppendUint32(b, uint32(tpm2.TPMCCSign))
	b = binary.BigEndian.AppendUint32(b, uint32(key))
	b = binary.BigEndian.AppendUint32(b, uint32(area))
	b = binary.BigEndian.AppendUint32(b, uint32(auth.Handle))
	b = appendSized(b, auth.Nonce.Buffer)
	b = append(b, continueSession) // all that a session of ours asks for
	b = appendSized(b, auth.Authorization.Buffer)
	return append(b, params...)
}

const (
	headerSize      = 10
	continueSession = 1 // TPMA_SESSION
)

func appendSized(b, data []byte) []byte {
	return append(binary.BigEndian.AppendUint16(b, uint16(len(data))), data...)
}

// splitResponse takes a successful response with one session apart: its parameters, and what proves them. Nothing
// may be left over.
func splitResponse(rsp []byte) (params []byte, proof *tpm2.TPMSAuthResponse, err error) {
	bad := func(what string) ([]byte, *tpm2.TPMSAuthResponse, error) {
		return nil, nil, fmt.Errorf("%w: %s", errProof, what)
	}
	if len(rsp) < headerSize+4 || binary.BigEndian.Uint16(rsp) != uint16(tpm2.TPMSTSessions) {
		return bad("no session in the response")
	}
	size := binary.BigEndian.Uint32(rsp[headerSize:])
	rest := rsp[headerSize+4:]
	if uint64(size) > uint64(len(rest)) {
		return bad("the response is too short")
	}
	params, rest = rest[:size], rest[size:]
	nonce, rest, ok := cutSized(rest)
	if !ok || len(rest) == 0 {
		return bad("the session's part is too short")
	}
	attrs := rest[0]
	mac, rest, ok := cutSized(rest[1:])
	if !ok || len(rest) != 0 || attrs != continueSession {
		return bad("the session's part is not that of our session")
	}
	return params, &tpm2.TPMSAuthResponse{
		Nonce:         tpm2.TPM2BNonce{Buffer: nonce},
		Attributes:    tpm2.TPMASession{ContinueSession: true},
		Authorization: tpm2.TPM2BData{Buffer: mac},
	}, nil
}

func cutSized(b []byte) (data, rest []byte, ok bool) {
	if len(b) < 2 {
		return nil, nil, false
	}
	n := int(binary.BigEndian.Uint16(b))
	if n > len(b)-2 {
		return nil, nil, false
	}
	return b[2 : 2+n], b[2+n:], true
}
