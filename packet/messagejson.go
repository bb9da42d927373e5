package packet

import (
	"bytes"
	"encoding/json"
	"strconv"
	"strings"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/jcs"
	"github.com/trustd/trustd/signature"
)

// maxExact is the largest integer that every JSON reader holds exactly (RFC 7493 section 2.2).
const maxExact = 1<<53 - 1

// maxNesting bounds arrays and objects inside each other, the message's own among them, so that no reader runs out
// of stack.
const maxNesting = 64

// messageMembers are the members of a message on the wire; the value says whether it must be there.
var messageMembers = map[string]bool{
	"v": true, "signer_id": true, "fingerprint": true, "algorithm": true, "timestamp": true, "expires_at": false,
	"seq": true, "nonce": true, "aud": true, "content_type": true, "payload": true, "grade": true, "key_epoch": true,
	"view_head": true, "view_size": true, "prev": false, "signature": true, "public_key": true,
}

// messageWire is the wire form, for writing.
type messageWire struct {
	V           int             `json:"v"`
	SignerID    string          `json:"signer_id"`
	Fingerprint string          `json:"fingerprint"`
	Algorithm   string          `json:"algorithm"`
	Timestamp   string          `json:"timestamp"`
	ExpiresAt   string          `json:"expires_at,omitempty"`
	Seq         uint64          `json:"seq"`
	Nonce       string          `json:"nonce"`
	Audience    []string        `json:"aud"`
	ContentType string          `json:"content_type"`
	Payload     json.RawMessage `json:"payload"`
	Grade       string          `json:"grade"`
	KeyEpoch    uint64          `json:"key_epoch"`
	ViewHead    string          `json:"view_head"`
	ViewSize    uint64          `json:"view_size"`
	Prev        string          `json:"prev,omitempty"`
	Signature   string          `json:"signature"`
	PublicKey   string          `json:"public_key"`
}

// JSON returns the message's text in canonical form (RFC 8785).
func (m *Message) JSON() ([]byte, error) {
	h := &m.header
	w := messageWire{
		V: MessageVersion, SignerID: h.SignerID.String(), Fingerprint: h.Fingerprint.String(),
		Algorithm: h.Algorithm.String(), Timestamp: h.Timestamp.Format(MessageTime), ExpiresAt: timeText(h.ExpiresAt),
		Seq: h.Seq, Nonce: h.Nonce, Audience: append([]string{}, h.Audience...), ContentType: h.ContentType,
		Payload: m.payload, Grade: h.Grade, KeyEpoch: h.KeyEpoch, ViewHead: h.ViewHead, ViewSize: h.ViewSize,
		Prev: h.Prev, Signature: m.sig.Text(), PublicKey: m.pub.Base64(),
	}
	raw, err := json.Marshal(w)
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "the message cannot be written")
	}
	out, err := jcs.Transform(raw)
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "the message cannot be written")
	}
	return out, nil
}

// MarshalJSON returns what JSON returns.
func (m *Message) MarshalJSON() ([]byte, error) { return m.JSON() }

// ParseMessage reads a SignedMessage. White space and the order of members are free; all else has one form:
// unknown and duplicate members, members that are null, numbers with a fraction or an exponent in the header, and
// base64 that is not canonical are refused. The public key must have the fingerprint that stands beside it.
func ParseMessage(b []byte) (*Message, error) {
	members, err := splitMessage(b)
	if err != nil {
		return nil, err
	}
	r := memberReader{members: members}
	if v := r.integer("v"); r.err == nil && v != MessageVersion {
		return nil, fault.BadField("v", "not version %d", MessageVersion)
	}
	h := MessageHeader{
		SignerID:    read(&r, "signer_id", ident.ParseAgentID),
		Fingerprint: read(&r, "fingerprint", ident.ParseKeyID),
		Algorithm:   read(&r, "algorithm", ident.ParseAlgorithm),
		Timestamp:   read(&r, "timestamp", parseMessageTime),
		ExpiresAt:   read(&r, "expires_at", parseMessageTime),
		Seq:         r.integer("seq"),
		Nonce:       r.text("nonce"),
		Audience:    r.texts("aud"),
		ContentType: r.text("content_type"),
		Grade:       r.text("grade"),
		KeyEpoch:    r.integer("key_epoch"),
		ViewHead:    r.text("view_head"),
		ViewSize:    r.integer("view_size"),
		Prev:        r.text("prev"),
	}
	pub := read(&r, "public_key", parseMessageKey)
	sigText := r.text("signature")
	if r.err != nil {
		return nil, r.err
	}
	if _, given := members["prev"]; given && h.Prev == "" {
		return nil, fault.BadField("prev", "empty; leave it out")
	}
	if _, given := members["expires_at"]; given && h.ExpiresAt.IsZero() {
		return nil, fault.BadField("expires_at", "not a time of the years 1970 to 9999")
	}
	if err := checkHeader(&h); err != nil {
		return nil, err
	}
	if pub.ID() != h.Fingerprint {
		return nil, fault.BadField("fingerprint", "not the fingerprint of public_key")
	}
	if pub.Algorithm() != h.Algorithm {
		return nil, fault.BadField("algorithm", "not the algorithm of public_key")
	}
	sig, err := signature.Parse(h.Algorithm, sigText)
	if err != nil {
		return nil, err
	}
	payload, err := canonicalPayload(members["payload"])
	if err != nil {
		return nil, err
	}
	return &Message{header: h, payload: payload, signed: signingBytes(&h, payload), sig: sig, pub: pub}, nil
}

// splitMessage checks the text as a whole and returns its members as they stand.
func splitMessage(b []byte) (map[string]json.RawMessage, error) {
	if len(b) > MaxMessage {
		return nil, fault.New(fault.TooLarge, "a message has at most %d bytes", MaxMessage)
	}
	if _, err := canonical("", b, maxNesting); err != nil {
		return nil, err
	}
	var members map[string]json.RawMessage
	if err := json.Unmarshal(b, &members); err != nil || members == nil {
		return nil, fault.BadField("", "not a JSON object")
	}
	for name, raw := range members {
		if _, known := messageMembers[name]; !known {
			return nil, fault.BadField("", "a member that the format does not have")
		}
		if name != "payload" && string(raw) == "null" {
			return nil, fault.BadField(name, "null")
		}
	}
	for name, required := range messageMembers {
		if _, there := members[name]; required && !there {
			return nil, fault.BadField(name, "missing")
		}
	}
	return members, nil
}

// canonicalPayload returns the canonical form of a JSON value that survives it.
func canonicalPayload(raw json.RawMessage) ([]byte, error) {
	if len(bytes.TrimSpace(raw)) == 0 {
		return nil, fault.BadField("payload", "empty")
	}
	if len(raw) > MaxMessage {
		return nil, fault.New(fault.TooLarge, "a payload has at most %d bytes", MaxPayload)
	}
	out, err := canonical("payload", raw, maxNesting-1)
	if err != nil {
		return nil, err
	}
	if len(out) > MaxPayload { // 1e15 becomes sixteen digits
		return nil, fault.New(fault.TooLarge, "a payload has at most %d bytes in canonical form", MaxPayload)
	}
	return out, nil
}

// canonical returns the RFC 8785 form of a JSON text. It refuses text that is not JSON, holds a member twice, a
// lone surrogate or a number that loses digits, or is nested too deeply.
func canonical(field string, b []byte, levels int) ([]byte, error) {
	if err := checkNesting(field, b, levels); err != nil { // first: what follows recurses
		return nil, err
	}
	if !json.Valid(b) {
		return nil, fault.BadField(field, "not JSON")
	}
	out, err := jcs.Transform(b)
	if err != nil {
		return nil, fault.BadField(field, "a member stands twice, or a string or number has no one meaning")
	}
	if err := checkNumbers(field, b); err != nil {
		return nil, err
	}
	return out, nil
}

// checkNesting counts brackets outside strings. It reads any bytes.
func checkNesting(field string, b []byte, levels int) error {
	depth := 0
	for i := 0; i < len(b); i++ {
		switch b[i] {
		case '"':
			i = endOfString(b, i)
		case '[', '{':
			if depth++; depth > levels {
				return fault.BadField(field, "nested more than %d levels deep", levels)
			}
		case ']', '}':
			depth--
		}
	}
	return nil
}

// endOfString returns the index of the quote that closes the string opened at i, or the last index.
func endOfString(b []byte, i int) int {
	for i++; i < len(b); i++ {
		switch b[i] {
		case '\\':
			i++
		case '"':
			return i
		}
	}
	return len(b) - 1
}

// checkNumbers looks at every number in valid JSON.
func checkNumbers(field string, b []byte) error {
	for i := 0; i < len(b); i++ {
		switch c := b[i]; {
		case c == '"':
			i = endOfString(b, i)
		case c == '-' || c >= '0' && c <= '9':
			start := i
			for i++; i < len(b) && strings.IndexByte("0123456789+-.eE", b[i]) >= 0; i++ {
			}
			if !exactNumber(string(b[start:i])) {
				return fault.BadField(field, "a number is beyond 2^53-1 or has more digits than a double holds")
			}
			i--
		}
	}
	return nil
}

// exactNumber reports whether a JSON number has the same value after a double and RFC 8785, and no reader has to
// round it.
func exactNumber(s string) bool {
	f, err := strconv.ParseFloat(s, 64)
	if err != nil || f > maxExact || f < -maxExact {
		return false
	}
	digits, exp, ok := decimal(s)
	d, e, _ := decimal(strconv.FormatFloat(f, 'e', -1, 64))
	return ok && digits == d && exp == e
}

// decimal returns a number's magnitude as its digits without zeros at either end and the power of ten of the last
// digit.
func decimal(s string) (digits string, exp int, ok bool) {
	s = strings.TrimPrefix(s, "-")
	if mant, e, found := strings.Cut(strings.ToLower(s), "e"); found {
		n, err := strconv.Atoi(e)
		if err != nil || n > 1<<20 || n < -1<<20 {
			return "", 0, false
		}
		s, exp = mant, n
	}
	whole, frac, _ := strings.Cut(s, ".")
	exp -= len(frac)
	digits = strings.TrimLeft(whole+frac, "0")
	if digits == "" {
		return "", 0, true
	}
	trimmed := strings.TrimRight(digits, "0")
	return trimmed, exp + len(digits) - len(trimmed), true
}

// memberReader reads members and keeps the first error.
type memberReader struct {
	members map[string]json.RawMessage
	err     error
}

func (r *memberReader) decode(name string, into any) {
	if raw, ok := r.members[name]; ok && r.err == nil && json.Unmarshal(raw, into) != nil {
		r.err = fault.BadField(name, "of the wrong type")
	}
}

func (r *memberReader) text(name string) (s string) {
	r.decode(name, &s)
	return s
}

func (r *memberReader) texts(name string) (s []string) {
	raw := r.members[name]
	r.decode(name, &s)
	if r.err == nil && nullIn(raw) {
		r.err = fault.BadField(name, "of the wrong type")
	}
	return s
}

// nullIn reports whether an array holds a null, which the decoder takes for an empty string.
func nullIn(raw json.RawMessage) bool {
	var items []*string
	if json.Unmarshal(raw, &items) != nil {
		return true
	}
	for _, p := range items {
		if p == nil {
			return true
		}
	}
	return false
}

func (r *memberReader) integer(name string) uint64 {
	raw := string(r.members[name])
	n, err := strconv.ParseUint(raw, 10, 64)
	if r.err == nil && (err != nil || n > maxExact) {
		r.err = fault.BadField(name, "not an integer from 0 to 2^53-1")
	}
	return n
}

// read returns a member that has a parser of its own; the zero value where it is absent.
func read[T any](r *memberReader, name string, parse func(string) (T, error)) (v T) {
	if _, ok := r.members[name]; !ok || r.err != nil {
		return v
	}
	s := r.text(name)
	if r.err != nil {
		return v
	}
	v, err := parse(s)
	if err != nil {
		e := *fault.From(err)
		e.Field = name
		r.err = &e
	}
	return v
}

func parseMessageTime(s string) (time.Time, error) {
	t, err := time.Parse(MessageTime, s)
	if err != nil || t.Format(MessageTime) != s {
		return time.Time{}, fault.New(fault.Malformed, "not of the form YYYY-MM-DDThh:mm:ss.ffffffZ")
	}
	return t, nil
}

// parseMessageKey takes the one form that Message.JSON writes; the raw form of an Ed25519 key is not it.
func parseMessageKey(s string) (ident.PublicKey, error) {
	var p ident.PublicKey
	for i := 0; i < len(s); i++ {
		if s[i] == '\r' || s[i] == '\n' { // the base64 decoder would skip these
			return p, fault.New(fault.Malformed, "not canonical base64")
		}
	}
	p, err := ident.ParsePublicKey(s)
	if err == nil && p.Base64() != s {
		return p, fault.New(fault.Malformed, "not a DER SubjectPublicKeyInfo")
	}
	return p, err
}
