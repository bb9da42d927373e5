package client

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"
	"unicode/utf16"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/pyjson"
	"github.com/trustd/trustd/signature"
)

// The bounds of a SignedMessage, as in package packet, which depends on more than the standard library.
const (
	maxMessage      = 256 << 10
	maxPayload      = maxMessage - (16 << 10)
	maxMessageDepth = 64
	maxToken        = 128
	maxAudience     = 16
	maxExact        = 1<<53 - 1
	messageTime     = "2006-01-02T15:04:05.000000Z"
)

// A readableMessage is the members of a SignedMessage and what its signature covers.
type readableMessage struct {
	members map[string]any // as encoding/json reads them, with json.Number
	signed  []byte
}

func (m *readableMessage) text(name string) string {
	s, _ := m.members[name].(string)
	return s
}

// A messageForm is a member of a SignedMessage.
type messageForm struct {
	name     string
	has      func(any) bool
	optional bool
}

// The members of a SignedMessage and their forms, in the order in which they are signed; then what is signed in
// another way or not at all.
var messageForms = []messageForm{
	{"v", func(v any) bool { return v == json.Number("1") }, false},
	{"signer_id", parses(ident.ParseAgentID), false},
	{"fingerprint", parses(ident.ParseKeyID), false},
	{"algorithm", parses(ident.ParseAlgorithm), false},
	{"timestamp", isMoment, false},
	{"expires_at", isMoment, true},
	{"seq", isNatural, false},
	{"nonce", isToken, false},
	{"aud", isAudience, false},
	{"content_type", isContentType, false},
	{"grade", func(v any) bool { return v == "hardware-attested" || v == "hardware-claimed" || v == "software" }, false},
	{"key_epoch", isNatural, false},
	{"view_head", parses(ident.ParseKeyID), false},
	{"view_size", isNatural, false},
	{"prev", parses(ident.ParseKeyID), true},

	{"payload", func(any) bool { return true }, false},
	{"signature", isText, false},
	{"public_key", isText, false},
}

// signedMembers is how many of messageForms are signed as they stand.
const signedMembers = 15

func readMessage(text []byte) (*readableMessage, error) {
	if len(text) > maxMessage {
		return nil, fault.New(fault.TooLarge, "a message has at most %d bytes", maxMessage)
	}
	m := &readableMessage{}
	if err := m.read(text); err != nil {
		return nil, err
	}
	fields := make([][]byte, 0, signedMembers+1)
	for i, f := range messageForms {
		v, there := m.members[f.name]
		switch {
		case !there && !f.optional:
			return nil, fault.BadField(f.name, "missing")
		case there && !f.has(v):
			return nil, fault.BadField(f.name, "not of its form")
		}
		if i < signedMembers {
			fields = append(fields, signedField(v))
		}
	}
	for name := range m.members {
		if !slices.ContainsFunc(messageForms, func(f messageForm) bool { return f.name == name }) {
			return nil, fault.BadField("", "a member that the format does not have")
		}
	}
	payload := appendCanonical(nil, m.members["payload"])
	if len(payload) > maxPayload {
		return nil, fault.New(fault.TooLarge, "a payload has at most %d bytes in canonical form", maxPayload)
	}
	m.signed = signature.Encode(signature.Message, append(fields, payload)...)
	return m, nil
}

// read takes JSON in which each member stands once, no string holds a lone surrogate, and each number is a double's.
func (m *readableMessage) read(text []byte) error {
	if tooDeep(text) { // first: what follows recurses
		return fault.BadField("", "nested more than %d levels deep", maxMessageDepth)
	}
	var s pyjson.Scanner
	s.Reset(string(text), pyjson.Sorted)
	if _, err := s.Object(nil); err != nil {
		return err
	}
	if err := s.End(); err != nil {
		return err
	}
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.UseNumber()
	if err := dec.Decode(&m.members); err != nil {
		return fault.BadField("", "not a JSON object")
	}
	if !exactNumbers(m.members) {
		return fault.BadField("", "a number is beyond 2^53-1 or has more digits than a double holds")
	}
	return nil
}

// tooDeep counts brackets outside strings.
func tooDeep(b []byte) bool {
	depth, inside := 0, false
	for i := 0; i < len(b); i++ {
		switch c := b[i]; {
		case inside && c == '\\':
			i++
		case c == '"':
			inside = !inside
		case inside:
		case c == '[' || c == '{':
			if depth++; depth > maxMessageDepth {
				return true
			}
		case c == ']' || c == '}':
			depth--
		}
	}
	return false
}

func signedField(v any) []byte {
	switch v := v.(type) {
	case json.Number:
		n, _ := strconv.ParseUint(v.String(), 10, 64)
		return binary.BigEndian.AppendUint64(nil, n)
	case []any:
		var out []byte
		for _, item := range v {
			s, _ := item.(string)
			out = append(binary.BigEndian.AppendUint32(out, uint32(len(s))), s...)
		}
		return out
	case string:
		return []byte(v)
	}
	return nil // an optional member that is not there
}

func parses[T any](parse func(string) (T, error)) func(any) bool {
	return func(v any) bool {
		s, ok := v.(string)
		if ok {
			_, err := parse(s)
			ok = err == nil
		}
		return ok
	}
}

func isText(v any) bool { _, ok := v.(string); return ok }

func isMoment(v any) bool {
	s, _ := v.(string)
	t, err := time.Parse(messageTime, s)
	return err == nil && t.Format(messageTime) == s && t.Year() >= 1970
}

func isNatural(v any) bool {
	n, ok := v.(json.Number)
	if !ok {
		return false
	}
	u, err := strconv.ParseUint(n.String(), 10, 64)
	return err == nil && u <= maxExact
}

func isToken(v any) bool {
	s, _ := v.(string)
	return s != "" && len(s) <= maxToken && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' })
}

func isAudience(v any) bool {
	names, ok := v.([]any)
	if !ok || len(names) > maxAudience {
		return false
	}
	for i, n := range names {
		if !isToken(n) || slices.Contains(names[:i], n) {
			return false
		}
	}
	return true
}

// isContentType takes application/json, or a media type in lower case without parameters that ends in +json.
func isContentType(v any) bool {
	s, _ := v.(string)
	kind, sub, _ := strings.Cut(s, "/")
	other := strings.ContainsFunc(kind+sub, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || strings.ContainsRune(".+-_", r))
	})
	return s == "application/json" ||
		len(s) <= maxToken && !other && kind != "" && strings.HasSuffix(sub, "+json") && sub != "+json"
}

// appendCanonical appends the canonical form of RFC 8785 of a value that exactNumbers has taken.
func appendCanonical(dst []byte, v any) []byte {
	switch v := v.(type) {
	case map[string]any:
		names := make([]string, 0, len(v))
		for n := range v {
			names = append(names, n)
		}
		sort.Slice(names, func(i, j int) bool {
			return slices.Compare(utf16.Encode([]rune(names[i])), utf16.Encode([]rune(names[j]))) < 0
		})
		dst = append(dst, '{')
		for i, n := range names {
			if i > 0 {
				dst = append(dst, ',')
			}
			dst = appendCanonical(append(appendQuoted(dst, n), ':'), v[n])
		}
		return append(dst, '}')
	case []any:
		dst = append(dst, '[')
		for i, item := range v {
			if i > 0 {
				dst = append(dst, ',')
			}
			dst = appendCanonical(dst, item)
		}
		return append(dst, ']')
	case json.Number:
		f, _ := v.Float64()
		return appendNumber(dst, f)
	case string:
		return appendQuoted(dst, v)
	case bool:
		return strconv.AppendBool(dst, v)
	}
	return append(dst, null...)
}

func appendQuoted(dst []byte, s string) []byte {
	const short, letters = "\b\t\n\f\r\"\\", `btnfr"\`
	dst = append(dst, '"')
	for i := range len(s) {
		c := s[i]
		if at := strings.IndexByte(short, c); at >= 0 {
			dst = append(dst, '\\', letters[at])
		} else if c < ' ' {
			dst = append(dst, '\\', 'u', '0', '0', '0'+c>>4, "0123456789abcdef"[c&15])
		} else {
			dst = append(dst, c)
		}
	}
	return append(dst, '"')
}

// appendNumber is ECMAScript's Number.prototype.toString of a double up to 2^53-1.
func appendNumber(dst []byte, f float64) []byte {
	if f == 0 { // -0 too
		return append(dst, '0')
	}
	if f >= 1e-6 || f <= -1e-6 {
		return strconv.AppendFloat(dst, f, 'f', -1, 64)
	}
	text := strconv.FormatFloat(f, 'e', -1, 64) // e-07
	return append(dst, strings.Replace(text, "e-0", "e-", 1)...)
}

// exactNumbers reports whether each number in v has the same value as a double and is no larger than 2^53-1.
func exactNumbers(v any) bool {
	switch v := v.(type) {
	case map[string]any:
		for _, m := range v {
			if !exactNumbers(m) {
				return false
			}
		}
	case []any:
		for _, item := range v {
			if !exactNumbers(item) {
				return false
			}
		}
	case json.Number:
		f, err := strconv.ParseFloat(v.String(), 64)
		if err != nil || f > maxExact || f < -maxExact {
			return false
		}
		digits, exp, ok := magnitude(v.String())
		d, e, _ := magnitude(strconv.FormatFloat(f, 'e', -1, 64))
		return ok && digits == d && exp == e
	}
	return true
}

// magnitude returns a number's digits without zeros at either end and the power of ten of the last one.
func magnitude(s string) (digits string, exp int, ok bool) {
	s, e, found := strings.Cut(strings.ToLower(strings.TrimPrefix(s, "-")), "e")
	if found {
		n, err := strconv.Atoi(e)
		if err != nil || n > 1<<20 || n < -1<<20 {
			return "", 0, false
		}
		exp = n
	}
	whole, frac, _ := strings.Cut(s, ".")
	if digits = strings.TrimLeft(whole+frac, "0"); digits == "" {
		return "", 0, true
	}
	trimmed := strings.TrimRight(digits, "0")
	return trimmed, exp - len(frac) + len(digits) - len(trimmed), true
}
