package wire

import (
	"unicode/utf16"
	"unicode/utf8"

	"github.com/trustd/trustd/fault"
)

// MaxDepth bounds the nesting of a request or reply. The parsers of packets and messages set lower bounds of their
// own.
const MaxDepth = 256

// Valid reports whether b is one JSON value in UTF-8, not nested deeper than MaxDepth.
func Valid(b []byte) bool {
	s := scanner{data: b}
	if !utf8.Valid(b) || s.skip(0) != nil {
		return false
	}
	s.space()
	return s.pos == len(b)
}

// A scanner walks over JSON text that is known to be UTF-8.
type scanner struct {
	data   []byte
	pos    int
	strict bool // as requests are read
}

func (s *scanner) space() {
	for s.pos < len(s.data) {
		switch s.data[s.pos] {
		case ' ', '\t', '\n', '\r':
			s.pos++
		default:
			return
		}
	}
}

// peek returns the next byte, and 0 at the end.
func (s *scanner) peek() byte {
	if s.pos < len(s.data) {
		return s.data[s.pos]
	}
	return 0
}

func (s *scanner) take(c byte) bool {
	if s.peek() != c || s.pos == len(s.data) {
		return false
	}
	s.pos++
	return true
}

func (s *scanner) literal(word string) bool {
	if len(s.data)-s.pos < len(word) || string(s.data[s.pos:s.pos+len(word)]) != word {
		return false
	}
	s.pos += len(word)
	return true
}

// null passes over a null, if one stands here.
func (s *scanner) null() bool {
	s.space()
	return s.literal("null")
}

// object reads an object and calls each with every member's name, the scanner standing before its value.
func (s *scanner) object(each func(name []byte) error) error {
	s.space()
	if !s.take('{') {
		return fault.BadField("", "not an object")
	}
	if s.space(); s.take('}') {
		return nil
	}
	for {
		name, err := s.text()
		if err != nil {
			return err
		}
		if s.space(); !s.take(':') {
			return errSyntax()
		}
		if err := each(name); err != nil {
			return err
		}
		if s.space(); s.take('}') {
			return nil
		}
		if !s.take(',') {
			return errSyntax()
		}
	}
}

// array reads an array and calls each with every index, the scanner standing before the element.
func (s *scanner) array(each func(i int) error) error {
	s.space()
	if !s.take('[') {
		return fault.BadField("", "not an array")
	}
	if s.space(); s.take(']') {
		return nil
	}
	for i := 0; ; i++ {
		if err := each(i); err != nil {
			return err
		}
		if s.space(); s.take(']') {
			return nil
		}
		if !s.take(',') {
			return errSyntax()
		}
	}
}

// str reads a string.
func (s *scanner) str() (string, error) {
	t, err := s.text()
	return string(t), err
}

// text reads a string as bytes that may be the input's own.
func (s *scanner) text() ([]byte, error) {
	s.space()
	if s.peek() != '"' {
		return nil, fault.BadField("", "not a string")
	}
	start := s.pos + 1
	escaped, err := s.skipString()
	if err != nil {
		return nil, err
	}
	raw := s.data[start : s.pos-1]
	if !escaped {
		return raw, nil
	}
	return unescape(raw)
}

// skipString passes over a string and reports whether it holds an escape.
func (s *scanner) skipString() (escaped bool, err error) {
	for i := s.pos + 1; i < len(s.data); i++ {
		switch c := s.data[i]; {
		case c == '"':
			s.pos = i + 1
			return escaped, nil
		case c < 0x20:
			return escaped, errSyntax()
		case c == '\\':
			escaped = true
			n := escapeLen(s.data[i:])
			if n == 0 {
				return escaped, errSyntax()
			}
			i += n - 1
		}
	}
	return escaped, errSyntax()
}

// escapeLen returns the length of the escape at the start of b; 0 for none.
func escapeLen(b []byte) int {
	if len(b) < 2 {
		return 0
	}
	switch b[1] {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		return 2
	case 'u':
		if _, ok := hex4(b[2:]); ok {
			return 6
		}
	}
	return 0
}

func hex4(b []byte) (rune, bool) {
	if len(b) < 4 {
		return 0, false
	}
	var r rune
	for _, c := range b[:4] {
		switch {
		case c >= '0' && c <= '9':
			r = r<<4 | rune(c-'0')
		case c >= 'a' && c <= 'f':
			r = r<<4 | rune(c-'a'+10)
		case c >= 'A' && c <= 'F':
			r = r<<4 | rune(c-'A'+10)
		default:
			return 0, false
		}
	}
	return r, true
}

var shortEscapes = map[byte]byte{
	'"': '"', '\\': '\\', '/': '/', 'b': '\b', 'f': '\f', 'n': '\n', 'r': '\r', 't': '\t',
}

// unescape returns the text of a string that skipString has passed.
func unescape(raw []byte) ([]byte, error) {
	out := make([]byte, 0, len(raw))
	for i := 0; i < len(raw); {
		if raw[i] != '\\' {
			out = append(out, raw[i])
			i++
			continue
		}
		if c, short := shortEscapes[raw[i+1]]; short {
			out = append(out, c)
			i += 2
			continue
		}
		r, _ := hex4(raw[i+2:])
		i += 6
		if utf16.IsSurrogate(r) {
			if i+6 > len(raw) || raw[i] != '\\' || raw[i+1] != 'u' {
				return nil, fault.BadField("", "the string holds half a surrogate pair")
			}
			low, _ := hex4(raw[i+2:])
			if r = utf16.DecodeRune(r, low); r == utf8.RuneError {
				return nil, fault.BadField("", "the string holds half a surrogate pair")
			}
			i += 6
		}
		out = utf8.AppendRune(out, r)
	}
	return out, nil
}

// number reads a number and returns its text.
func (s *scanner) number() ([]byte, error) {
	s.space()
	if c := s.peek(); c != '-' && (c < '0' || c > '9') {
		return nil, fault.BadField("", "not a number")
	}
	start := s.pos
	if err := s.skipNumber(); err != nil {
		return nil, err
	}
	return s.data[start:s.pos], nil
}

func (s *scanner) skipNumber() error {
	s.take('-')
	if !s.take('0') && !s.digits() {
		return errSyntax()
	}
	if s.take('.') && !s.digits() {
		return errSyntax()
	}
	if s.take('e') || s.take('E') {
		if !s.take('+') {
			s.take('-')
		}
		if !s.digits() {
			return errSyntax()
		}
	}
	return nil
}

func (s *scanner) digits() bool {
	start := s.pos
	for c := s.peek(); c >= '0' && c <= '9'; c = s.peek() {
		s.pos++
	}
	return s.pos > start
}

// skip passes over one value of any type and checks its grammar. It allocates nothing.
func (s *scanner) skip(depth int) error {
	if depth == MaxDepth {
		return fault.BadField("", "nested more than %d deep", MaxDepth)
	}
	s.space()
	switch c := s.peek(); {
	case c == '{':
		return s.skipObject(depth + 1)
	case c == '[':
		return s.skipArray(depth + 1)
	case c == '"':
		_, err := s.skipString()
		return err
	case c == '-' || c >= '0' && c <= '9':
		return s.skipNumber()
	case s.literal("true") || s.literal("false") || s.literal("null"):
		return nil
	}
	return errSyntax()
}

func (s *scanner) skipObject(depth int) error {
	s.pos++
	if s.space(); s.take('}') {
		return nil
	}
	for {
		if s.space(); s.peek() != '"' {
			return errSyntax()
		}
		if _, err := s.skipString(); err != nil {
			return err
		}
		if s.space(); !s.take(':') {
			return errSyntax()
		}
		if err := s.skip(depth); err != nil {
			return err
		}
		if s.space(); s.take('}') {
			return nil
		}
		if !s.take(',') {
			return errSyntax()
		}
	}
}

func (s *scanner) skipArray(depth int) error {
	s.pos++
	if s.space(); s.take(']') {
		return nil
	}
	for {
		if err := s.skip(depth); err != nil {
			return err
		}
		if s.space(); s.take(']') {
			return nil
		}
		if !s.take(',') {
			return errSyntax()
		}
	}
}

func errSyntax() error { return fault.BadField("", "not JSON") }
