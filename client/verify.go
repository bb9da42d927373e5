package client

import (
	"strings"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signature"
)

// verifierRoots is how many batches' roots a Verifier remembers.
const verifierRoots = 1024

// A Verifier verifies what one agent signed with one key, direct and batched, with no daemon at hand. It is safe for
// concurrent use. It reads what the daemon reads, and refuses what the daemon refuses to read.
//
// A signature that verifies says who signed, and nothing about whether to act on it. Time, audience, replay,
// revocation and the state of the key are for whoever asks; Client.VerifyPacket has the daemon check them all.
type Verifier struct {
	agent ident.AgentID
	pub   ident.PublicKey
	roots *signature.Roots
}

// NewVerifier returns a verifier of what the agent, by its id in the registry, signs with the key that the registry
// holds for it: PEM text, or the base64 of the DER SubjectPublicKeyInfo as in api.Identity. Neither may come from the
// message to be verified.
func NewVerifier(agent, publicKey string) (*Verifier, error) {
	id, err := ident.ParseAgentID(agent)
	if err != nil {
		return nil, err
	}
	parse := ident.ParsePublicKey
	if strings.HasPrefix(publicKey, "-----") {
		parse = ident.ParsePEM
	}
	pub, err := parse(publicKey)
	if err != nil {
		return nil, err
	}
	return &Verifier{agent: id, pub: pub, roots: signature.NewRoots(verifierRoots)}, nil
}

// VerifySignature checks the text of a signature of message, the signed bytes of the kind's own format, and says how it
// was made. The error has the code malformed or invalid_signature.
func (v *Verifier) VerifySignature(kind signature.Kind, message []byte, text string) (signature.Mode, error) {
	if kind != signature.KindPacket && kind != signature.KindMessage && kind != signature.KindAudit {
		return "", fault.BadField("kind", "not packet, message or audit")
	}
	sig, err := signature.Parse(v.pub.Algorithm(), text)
	if err != nil {
		return "", err
	}
	if err := sig.Verify(v.pub, signature.Subject{Kind: kind, Agent: v.agent, Message: message}, v.roots); err != nil {
		return "", err
	}
	return sig.Mode(), nil
}

// VerifyPacket checks the signature of a TrustHandoff task packet. That from_agent, an alias, names the agent is for
// the registry to say. The error has the code malformed, too_large, algorithm_mismatch, public_key_mismatch or
// invalid_signature.
func (v *Verifier) VerifyPacket(text []byte) (signature.Mode, error) {
	p, err := readPacket(text)
	if err != nil {
		return "", err
	}
	if p.algorithm != v.pub.Algorithm().Wire() {
		return "", &fault.Error{Code: fault.AlgorithmMismatch, Field: "signature_algo"}
	}
	if p.publicKey != v.pub.PEM() {
		return "", &fault.Error{Code: fault.PublicKeyMismatch, Field: "public_key"}
	}
	return v.VerifySignature(signature.KindPacket, p.signed, p.signature)
}

// VerifyMessage checks the signature of a SignedMessage, whose signer must be the agent. The error has the code
// malformed, too_large, unknown_agent, algorithm_mismatch, public_key_mismatch or invalid_signature.
func (v *Verifier) VerifyMessage(text []byte) (signature.Mode, error) {
	m, err := readMessage(text)
	if err != nil {
		return "", err
	}
	switch {
	case m.text("signer_id") != v.agent.String():
		return "", &fault.Error{Code: fault.UnknownAgent, Field: "signer_id"}
	case m.text("algorithm") != v.pub.Algorithm().String():
		return "", &fault.Error{Code: fault.AlgorithmMismatch, Field: "algorithm"}
	case m.text("public_key") != v.pub.Base64():
		return "", &fault.Error{Code: fault.PublicKeyMismatch, Field: "public_key"}
	case m.text("fingerprint") != v.pub.ID().String():
		return "", &fault.Error{Code: fault.PublicKeyMismatch, Field: "fingerprint"}
	}
	return v.VerifySignature(signature.KindMessage, m.signed, m.text("signature"))
}
