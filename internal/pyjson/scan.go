package pyjson

import (
	"errors"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/trustd/trustd/fault"
)

// A Scanner reads one JSON text from front to back. Reset makes it ready; it may be reused and is not safe for
// concurrent use. Its errors are *fault.Error with code malformed and a Field relative to the value being read; At
// completes the path. After an error the Scanner is of no further use until Reset.
type Scanner struct {
	src     string
	pos     int
	depth   int
	form    Form
	members []member // of the objects being read, innermost last
	spare   []byte
	decoded []byte
}

// A member is where one member of an object stands in the output.
type member struct {
	key    string
	lo, hi int
}

// Reset starts the Scanner on src. What Value appends has the given form.
func (s *Scanner) Reset(src string, form Form) {
	if cap(s.members) > keep {
		s.members = nil
	}
	if cap(s.spare) > keep {
		s.spare = nil
	}
	if cap(s.decoded) > keep {
		s.decoded = nil
	}
	clear(s.members[:cap(s.members)]) // the keys point into the previous text
	s.src, s.pos, s.depth, s.form = src, 0, 0, form
	s.members = s.members[:0]
}

// keep bounds what a Scanner holds on to after an unusually large text.
const keep = 4096

// Lookup returns the value of a member of an object in Sorted form, in that form.
func Lookup(object, key string) ([]byte, bool) {
	var s Scanner
	s.Reset(object, Sorted)
	if s.Open('{') != nil {
		return nil, false
	}
	for first := true; ; first = false {
		if more, err := s.Next(first, '}'); err != nil || !more {
			return nil, false
		}
		name, err := s.Key()
		if err != nil {
			return nil, false
		}
		value, err := s.Value(nil)
		if err != nil {
			return nil, false
		}
		if name == key {
			return value, true
		}
	}
}

// At puts name before the field of an error of this package. A name that is not a plain word becomes "*": what a
// sender chose as a key in its own data is not repeated unless it is harmless.
func At(err error, name string) error {
	var f *fault.Error
	if !errors.As(err, &f) {
		return err
	}
	if !word(name) {
		name = "*"
	}
	switch {
	case f.Field == "":
		f.Field = name
	case len(f.Field) < 256:
		f.Field = name + "." + f.Field
	}
	return f
}

func word(s string) bool {
	for i := 0; i < len(s); i++ {
		c := s[i]
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' || c == '-') {
			return false
		}
	}
	return len(s) > 0 && len(s) <= 64
}

// Peek skips white space and returns the byte that follows, 0 at the end.
func (s *Scanner) Peek() byte {
	for s.pos < len(s.src) {
		switch c := s.src[s.pos]; c {
		case ' ', '\t', '\n', '\r':
			s.pos++
		default:
			return c
		}
	}
	return 0
}

// End checks that nothing but white space is left.
func (s *Scanner) End() error {
	s.Peek()
	if s.pos != len(s.src) {
		return fault.BadField("", "text after the end of the JSON value")
	}
	return nil
}

// Open reads the start of an object or an array: c is '{' or '['.
func (s *Scanner) Open(c byte) error {
	if s.Peek() != c {
		if c == '{' {
			return fault.BadField("", "not an object")
		}
		return fault.BadField("", "not an array")
	}
	if s.depth++; s.depth > MaxDepth {
		return fault.BadField("", "nested deeper than %d levels", MaxDepth)
	}
	s.pos++
	return nil
}

// Next moves to the next member or element. It reads the comma, or the closing c, after which it returns false.
func (s *Scanner) Next(first bool, c byte) (bool, error) {
	switch got := s.Peek(); {
	case got == c:
		s.pos++
		s.depth--
		return false, nil
	case first && got != 0:
		return true, nil
	case got == ',':
		s.pos++
		if s.Peek() == c {
			return false, fault.BadField("", "a comma with nothing after it")
		}
		return true, nil
	case got == 0:
		return false, fault.BadField("", "the text ends too early")
	}
	return false, fault.BadField("", "a comma or the closing bracket is missing")
}

// Key reads a member's name and the colon.
func (s *Scanner) Key() (string, error) {
	key, _, err := s.key()
	return key, err
}

func (s *Scanner) key() (string, bool, error) {
	if s.Peek() != '"' {
		return "", false, fault.BadField("", "a member's name is missing")
	}
	key, same, err := s.text()
	if err != nil {
		return "", false, err
	}
	if s.Peek() != ':' {
		return "", false, fault.BadField("", "a colon is missing")
	}
	s.pos++
	return key, same, nil
}

// Null reads null and returns true where that is what comes next.
func (s *Scanner) Null() (bool, error) {
	if s.Peek() != 'n' {
		return false, nil
	}
	return true, s.literal("null")
}

// Bool reads true or false.
func (s *Scanner) Bool() (bool, error) {
	switch s.Peek() {
	case 't':
		return true, s.literal("true")
	case 'f':
		return false, s.literal("false")
	}
	return false, fault.BadField("", "not a boolean")
}

func (s *Scanner) literal(want string) error {
	if !strings.HasPrefix(s.src[s.pos:], want) {
		return fault.BadField("", "not a JSON value")
	}
	s.pos += len(want)
	return nil
}

// Int reads an integer from 0 to limit, written in digits alone.
func (s *Scanner) Int(limit int64) (int64, error) {
	c := s.Peek()
	if c != '-' && (c < '0' || c > '9') {
		return 0, fault.BadField("", "not an integer")
	}
	token, float, err := s.number()
	if err != nil {
		return 0, err
	}
	if float {
		return 0, fault.BadField("", "not an integer")
	}
	n, err := strconv.ParseInt(token, 10, 64)
	if err != nil || token[0] == '-' || n > limit {
		return 0, fault.BadField("", "not between 0 and %d", limit)
	}
	return n, nil
}

// Text reads a string. The result shares memory with the source where it holds no escape.
func (s *Scanner) Text() (string, error) {
	v, _, err := s.text()
	return v, err
}

// AppendText reads a string and appends it to dst in the Scanner's form.
func (s *Scanner) AppendText(dst []byte) ([]byte, string, error) {
	v, same, err := s.text()
	if err != nil {
		return dst, "", err
	}
	return s.appendText(dst, v, same), v, nil
}

func (s *Scanner) appendText(dst []byte, v string, same bool) []byte {
	if !same {
		return AppendString(dst, v, s.form)
	}
	return append(append(append(dst, '"'), v...), '"')
}

// text reads a string and reports whether it stands for itself in every form.
func (s *Scanner) text() (v string, same bool, err error) {
	if s.Peek() != '"' {
		return "", false, fault.BadField("", "not a string")
	}
	src, start := s.src, s.pos+1
	i := start
	for i < len(src) && plain[src[i]] {
		i++
	}
	if i < len(src) && src[i] == '"' {
		s.pos = i + 1
		return src[start:i], true, nil
	}
	return s.richText(start, i)
}

// richText goes on where text met an escape or a byte that some form escapes.
func (s *Scanner) richText(start, i int) (string, bool, error) {
	src := s.src
	buf, run := s.decoded[:0], start
	for ; i < len(src); i++ {
		switch c := src[i]; {
		case c == '"':
			v := src[start:i]
			if run != start {
				buf = append(buf, src[run:i]...)
				v = string(buf)
			}
			if s.decoded = buf; !utf8.ValidString(v) {
				return "", false, fault.BadField("", "malformed UTF-8")
			}
			s.pos = i + 1
			return v, false, nil
		case c < 0x20:
			return "", false, fault.BadField("", "a control character in a string")
		case c == '\\':
			var n int
			buf, n = unescape(append(buf, src[run:i]...), src[i:])
			if n == 0 {
				return "", false, fault.BadField("", "not a valid escape in a string")
			}
			run = i + n
			i = run - 1
		}
	}
	return "", false, fault.BadField("", "a string does not end")
}

var escapes = [256]byte{'"': '"', '\\': '\\', '/': '/', 'n': '\n', 'r': '\r', 't': '\t', 'b': '\b', 'f': '\f'}

// unescape appends what the escape at the start of src stands for and returns its length, 0 where it is none.
// Half of a surrogate pair stands for nothing.
func unescape(buf []byte, src string) ([]byte, int) {
	if len(src) < 2 {
		return buf, 0
	}
	if c := escapes[src[1]]; c != 0 {
		return append(buf, c), 2
	}
	r, ok := unit(src)
	if !ok || r >= 0xdc00 && r < 0xe000 {
		return buf, 0
	}
	if r < 0xd800 || r >= 0xe000 {
		return utf8.AppendRune(buf, r), 6
	}
	low, ok := unit(src[6:])
	if !ok || low < 0xdc00 || low >= 0xe000 {
		return buf, 0
	}
	return utf8.AppendRune(buf, 0x10000+(r-0xd800)<<10+(low-0xdc00)), 12
}

// unit reads \uXXXX.
func unit(src string) (rune, bool) {
	if len(src) < 6 || src[0] != '\\' || src[1] != 'u' {
		return 0, false
	}
	var r rune
	for i := 2; i < 6; i++ {
		c := src[i]
		switch {
		case c >= '0' && c <= '9':
			c -= '0'
		case c >= 'a' && c <= 'f':
			c -= 'a' - 10
		case c >= 'A' && c <= 'F':
			c -= 'A' - 10
		default:
			return 0, false
		}
		r = r<<4 | rune(c)
	}
	return r, true
}

// number reads a number token by the grammar of RFC 8259; float reports a point or an exponent.
func (s *Scanner) number() (token string, float bool, err error) {
	src, i := s.src, s.pos
	if src[i] == '-' {
		i++
	}
	whole := digits(src, i)
	if whole == i || src[i] == '0' && whole > i+1 {
		return "", false, fault.BadField("", "not a JSON number")
	}
	i = whole
	if i < len(src) && src[i] == '.' {
		end := digits(src, i+1)
		if end == i+1 {
			return "", false, fault.BadField("", "not a JSON number")
		}
		i, float = end, true
	}
	if i < len(src) && (src[i] == 'e' || src[i] == 'E') {
		i++
		if i < len(src) && (src[i] == '+' || src[i] == '-') {
			i++
		}
		end := digits(src, i)
		if end == i {
			return "", false, fault.BadField("", "not a JSON number")
		}
		i, float = end, true
	}
	token = src[s.pos:i]
	s.pos = i
	return token, float, nil
}

// digits returns where the digits from i on end.
func digits(src string, i int) int {
	for i < len(src) && src[i] >= '0' && src[i] <= '9' {
		i++
	}
	return i
}

// Value reads any JSON value and appends it to dst in the Scanner's form.
func (s *Scanner) Value(dst []byte) ([]byte, error) {
	switch c := s.Peek(); c {
	case '"':
		v, same, err := s.text()
		if err != nil {
			return dst, err
		}
		return s.appendText(dst, v, same), nil
	case '{':
		return s.Object(dst)
	case '[':
		return s.array(dst)
	case 't':
		return append(dst, "true"...), s.literal("true")
	case 'f':
		return append(dst, "false"...), s.literal("false")
	case 'n':
		return append(dst, "null"...), s.literal("null")
	default:
		if c != '-' && (c < '0' || c > '9') {
			return dst, fault.BadField("", "not a JSON value")
		}
		token, float, err := s.number()
		if err != nil {
			return dst, err
		}
		return appendNumber(dst, token, float, s.form)
	}
}

func (s *Scanner) array(dst []byte) ([]byte, error) {
	if err := s.Open('['); err != nil {
		return dst, err
	}
	dst = append(dst, '[')
	for n := 0; ; n++ {
		more, err := s.Next(n == 0, ']')
		if err != nil {
			return dst, err
		}
		if !more {
			return append(dst, ']'), nil
		}
		if n > 0 {
			dst = append(dst, ',')
		}
		if dst, err = s.Value(dst); err != nil {
			return dst, At(err, strconv.Itoa(n))
		}
	}
}

// Object reads an object and appends it to dst in the Scanner's form. A key that occurs twice is an error.
func (s *Scanner) Object(dst []byte) ([]byte, error) {
	if err := s.Open('{'); err != nil {
		return dst, err
	}
	dst = append(dst, '{')
	base, open, sorted := len(s.members), len(dst), true
	for {
		n := len(s.members)
		more, err := s.Next(n == base, '}')
		if err != nil {
			return dst, err
		}
		if !more {
			break
		}
		key, same, err := s.key()
		if err != nil {
			return dst, err
		}
		if n > base {
			dst = append(dst, ',')
			sorted = sorted && s.members[n-1].key < key
		}
		s.members = append(s.members, member{key: key, lo: len(dst)})
		dst = append(s.appendText(dst, key, same), ':')
		if dst, err = s.Value(dst); err != nil {
			return dst, At(err, key)
		}
		s.members[n].hi = len(dst)
	}
	if !sorted {
		if err := s.sort(dst[open:], open, s.members[base:]); err != nil {
			return dst, err
		}
	}
	s.members = s.members[:base]
	return append(dst, '}'), nil
}

// sort brings the members of one object, written in body from offset open on, into the order of their keys where
// the form asks for it, and finds keys that occur twice. Byte order of UTF-8 is the order of code points.
func (s *Scanner) sort(body []byte, open int, m []member) error {
	slices.SortFunc(m, func(a, b member) int { return strings.Compare(a.key, b.key) })
	for i := 1; i < len(m); i++ {
		if m[i].key == m[i-1].key {
			return At(fault.BadField("", "the key occurs twice"), m[i].key)
		}
	}
	if s.form != Sorted {
		return nil
	}
	out := s.spare[:0]
	for i, e := range m {
		if i > 0 {
			out = append(out, ',')
		}
		out = append(out, body[e.lo-open:e.hi-open]...)
	}
	copy(body, out)
	s.spare = out
	return nil
}
