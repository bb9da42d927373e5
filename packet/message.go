package packet

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"slices"
	"strings"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signature"
)

// The bounds of a SignedMessage. A header and what surrounds it never take more than MaxMessage - MaxPayload
// bytes, so that whatever NewMessage takes, ParseMessage reads.
const (
	MaxMessage  = 256 << 10               // the JSON text
	MaxPayload  = MaxMessage - (16 << 10) // the payload in canonical form
	MaxAudience = 16                      // names in aud
	maxToken    = 128                     // bytes of a nonce, a content type or a name in aud
)

// MessageVersion is the only version of the format there is.
const MessageVersion = 1

// MessageTime is the one text form of an instant in a SignedMessage: UTC, always six digits of a second.
const MessageTime = "2006-01-02T15:04:05.000000Z"

// ContentJSON is the content type of a message that names none.
const ContentJSON = "application/json"

// MessageHeader is all of a SignedMessage but its payload and signature. Every field is signed; see
// docs/formats/signed-message.md for the bytes.
type MessageHeader struct {
	SignerID    ident.AgentID
	Fingerprint ident.KeyID
	Algorithm   ident.Algorithm
	Timestamp   time.Time // whole microseconds
	ExpiresAt   time.Time // zero: never
	Seq         uint64    // of the key's signature history; at most 2^53-1, as JSON carries no more
	Nonce       string    // 1 to 128 visible ASCII characters
	Audience    []string  // at most 16 names of 1 to 128 visible ASCII characters; empty: anyone
	ContentType string    // application/json or a type that ends in +json; "" becomes application/json
	Grade       string    // of the key's backend: hardware-attested, hardware-claimed or software
	KeyEpoch    uint64    // of the key in its lineage
	ViewHead    string    // root of the signer's registry when it signed: "sha256:" and 64 hexadecimal digits
	ViewSize    uint64    // and its size
	Prev        string    // digest of the message that this one answers, or ""
}

// An UnsignedMessage is a checked message that waits for its signature.
type UnsignedMessage struct {
	header  MessageHeader
	payload []byte // canonical
	signed  []byte
}

// NewMessage checks the header and brings the payload into its canonical form (RFC 8785). A payload whose meaning
// that form would change is refused: duplicate members, lone surrogates, numbers beyond 2^53-1 or with more digits
// than a double holds.
func NewMessage(h MessageHeader, payload json.RawMessage) (*UnsignedMessage, error) {
	if h.ContentType == "" {
		h.ContentType = ContentJSON
	}
	h.Audience = slices.Clone(h.Audience)
	h.Timestamp = h.Timestamp.UTC()
	if !h.ExpiresAt.IsZero() {
		h.ExpiresAt = h.ExpiresAt.UTC()
	}
	if err := checkHeader(&h); err != nil {
		return nil, err
	}
	body, err := canonicalPayload(payload)
	if err != nil {
		return nil, err
	}
	return &UnsignedMessage{header: h, payload: body, signed: signingBytes(&h, body)}, nil
}

// SigningBytes returns what the key signs.
func (u *UnsignedMessage) SigningBytes() []byte { return bytes.Clone(u.signed) }

// Subject returns what the key signs as part of a batch may hold it. Its message must not be changed.
func (u *UnsignedMessage) Subject() signature.Subject {
	return signature.Subject{Kind: signature.KindMessage, Agent: u.header.SignerID, Message: u.signed}
}

// Digest returns the digest that the message will have.
func (u *UnsignedMessage) Digest() string { return digest(u.signed) }

// Seal joins the message with a signature that pub has made. It checks that pub is the key of the header and that
// the signature has the right length; the signer has verified the signature itself.
func (u *UnsignedMessage) Seal(sig signature.Signature, pub ident.PublicKey) (*Message, error) {
	if pub.ID() != u.header.Fingerprint || pub.Algorithm() != u.header.Algorithm {
		return nil, fault.New(fault.Internal, "the key is not the one that the message names")
	}
	if len(sig.Raw()) != pub.Algorithm().SignatureSize() {
		return nil, fault.New(fault.Internal, "the signature has the wrong length for its key")
	}
	return &Message{header: u.header, payload: u.payload, signed: u.signed, sig: sig, pub: pub}, nil
}

// A Message is a well-formed SignedMessage. Nothing about it is verified: not the signature, not the signer.
type Message struct {
	header  MessageHeader
	payload []byte // canonical
	signed  []byte
	sig     signature.Signature
	pub     ident.PublicKey
}

// Header returns the header. Its Audience must not be changed.
func (m *Message) Header() MessageHeader { return m.header }

// Payload returns a copy of the payload in canonical form.
func (m *Message) Payload() json.RawMessage { return bytes.Clone(m.payload) }

// PayloadHash returns "sha256:" and the hexadecimal SHA-256 of the canonical payload.
func (m *Message) PayloadHash() string { return digest(m.payload) }

// PublicKey returns the key inside the message: a claim, never an anchor. Its fingerprint is the header's.
func (m *Message) PublicKey() ident.PublicKey { return m.pub }

// Signature returns the signature, which is direct or batched.
func (m *Message) Signature() signature.Signature { return m.sig }

// SigningBytes returns a copy of what was signed.
func (m *Message) SigningBytes() []byte { return bytes.Clone(m.signed) }

// Digest returns the name by which a later message refers to this one: "sha256:" and the hexadecimal SHA-256 of
// the signed bytes. It does not cover the signature, which ECDSA and RSA make anew each time.
func (m *Message) Digest() string { return digest(m.signed) }

// VerifySignature checks the signature with a key. The key comes from the registry or the caller; with PublicKey
// it proves that the message agrees with itself, and nothing more. roots may be nil.
func (m *Message) VerifySignature(pub ident.PublicKey, roots *signature.Roots) error {
	return m.sig.Verify(pub, m.Subject(), roots)
}

// Subject returns what the signature speaks of.
func (m *Message) Subject() signature.Subject {
	return signature.Subject{Kind: signature.KindMessage, Agent: m.header.SignerID, Message: m.signed}
}

// Holds reports whether one top-level member of the payload is, as JSON, exactly the message other.
func (m *Message) Holds(other *Message) bool {
	var members map[string]json.RawMessage
	if json.Unmarshal(m.payload, &members) != nil {
		return false
	}
	want, err := other.JSON()
	if err != nil {
		return false
	}
	for _, raw := range members {
		if bytes.Equal(raw, want) {
			return true
		}
	}
	return false
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// signingBytes encodes a message for signing: docs/formats/signed-message.md, and vectors that do not change.
func signingBytes(h *MessageHeader, payload []byte) []byte {
	return signature.Encode(signature.Message,
		number(MessageVersion),
		[]byte(h.SignerID.String()),
		[]byte(h.Fingerprint.String()),
		[]byte(h.Algorithm.String()),
		[]byte(h.Timestamp.Format(MessageTime)),
		[]byte(timeText(h.ExpiresAt)),
		number(h.Seq),
		[]byte(h.Nonce),
		list(h.Audience),
		[]byte(h.ContentType),
		[]byte(h.Grade),
		number(h.KeyEpoch),
		[]byte(h.ViewHead),
		number(h.ViewSize),
		[]byte(h.Prev),
		payload,
	)
}

func number(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

// list encodes each item as a big-endian 32-bit length and its bytes.
func list(items []string) []byte {
	var out []byte
	for _, s := range items {
		out = binary.BigEndian.AppendUint32(out, uint32(len(s)))
		out = append(out, s...)
	}
	return out
}

func timeText(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.Format(MessageTime)
}

// checkHeader checks every field's own form. What fields mean for each other (expiry after signing) is for verify.
func checkHeader(h *MessageHeader) error {
	switch {
	case h.SignerID.IsZero():
		return fault.BadField("signer_id", "empty")
	case h.Fingerprint.IsZero():
		return fault.BadField("fingerprint", "empty")
	case !h.Algorithm.Valid():
		return fault.BadField("algorithm", "not a known algorithm")
	case !exactTime(h.Timestamp):
		return fault.BadField("timestamp", "not a time in whole microseconds of the years 1970 to 9999")
	case !h.ExpiresAt.IsZero() && !exactTime(h.ExpiresAt):
		return fault.BadField("expires_at", "not a time in whole microseconds of the years 1970 to 9999")
	case !validToken(h.Nonce):
		return fault.BadField("nonce", "not 1 to %d visible ASCII characters", maxToken)
	case !validContentType(h.ContentType):
		return fault.BadField("content_type", "not %s or a media type that ends in +json", ContentJSON)
	case h.Grade != "hardware-attested" && h.Grade != "hardware-claimed" && h.Grade != "software":
		return fault.BadField("grade", "not hardware-attested, hardware-claimed or software")
	case !validDigest(h.ViewHead):
		return fault.BadField("view_head", "not sha256: and 64 lower-case hexadecimal digits")
	case h.Prev != "" && !validDigest(h.Prev):
		return fault.BadField("prev", "not sha256: and 64 lower-case hexadecimal digits")
	}
	for _, n := range []struct {
		field string
		value uint64
	}{{"seq", h.Seq}, {"key_epoch", h.KeyEpoch}, {"view_size", h.ViewSize}} {
		if n.value > maxExact {
			return fault.BadField(n.field, "larger than 2^53-1")
		}
	}
	return checkAudience(h.Audience)
}

func checkAudience(aud []string) error {
	if len(aud) > MaxAudience {
		return fault.BadField("aud", "more than %d names", MaxAudience)
	}
	for i, a := range aud {
		if !validToken(a) {
			return fault.BadField("aud", "a name is not 1 to %d visible ASCII characters", maxToken)
		}
		if slices.Contains(aud[:i], a) {
			return fault.BadField("aud", "a name stands twice")
		}
	}
	return nil
}

func exactTime(t time.Time) bool {
	return t.Year() >= 1970 && t.Year() <= 9999 && t.Nanosecond()%1000 == 0
}

func validToken(s string) bool {
	if s == "" || len(s) > maxToken {
		return false
	}
	for i := 0; i < len(s); i++ {
		if s[i] <= ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

// validContentType takes a media type without parameters, in lower case, whose content is JSON.
func validContentType(s string) bool {
	kind, sub, ok := strings.Cut(s, "/")
	if !ok || len(s) > maxToken || kind == "" || sub == "" {
		return false
	}
	for _, c := range []byte(kind + sub) {
		if !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || strings.IndexByte(".+-_", c) >= 0) {
			return false
		}
	}
	return s == ContentJSON || strings.HasSuffix(sub, "+json") && sub != "+json"
}

func validDigest(s string) bool {
	_, err := ident.ParseKeyID(s)
	return err == nil
}
