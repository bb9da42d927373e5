package packet

import (
	"encoding/base64"
	"strconv"
	"strings"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/pyjson"
	"github.com/trustd/trustd/signature"
)

// object reads an object with fixed members: member reads the value of one that it knows and returns its bit, 0
// for a name that the format does not have.
func (p *parser) object(member func(name string) (bit uint8, err error)) error {
	if err := p.scan.Open('{'); err != nil {
		return err
	}
	var seen uint8
	for first := true; ; first = false {
		more, err := p.scan.Next(first, '}')
		if err != nil || !more {
			return err
		}
		name, err := p.scan.Key()
		if err != nil {
			return err
		}
		bit, err := member(name)
		if err != nil {
			return pyjson.At(err, name)
		}
		if bit == 0 {
			return pyjson.At(fault.BadField("", "the format has no such field"), name)
		}
		if seen&bit != 0 {
			return fault.BadField(name, "the field occurs twice")
		}
		seen |= bit
	}
}

func (p *parser) permissions(v *Permissions) error {
	err := p.object(func(name string) (uint8, error) {
		switch name {
		case "allowed_actions":
			v.AllowedActions = nil
			return 1, p.plainTexts(&v.AllowedActions)
		case "max_tool_calls":
			return 2, p.plainInt(&v.MaxToolCalls)
		}
		return 0, nil
	})
	if err != nil {
		return err
	}
	p.vals = append(p.vals, `{"allowed_actions":[`...)
	for i, a := range v.AllowedActions {
		if i > 0 {
			p.vals = append(p.vals, ',')
		}
		p.vals = pyjson.AppendString(p.vals, a, p.form)
	}
	p.vals = append(p.vals, `],"max_tool_calls":`...)
	p.vals = append(appendInt(p.vals, v.MaxToolCalls), '}')
	return nil
}

func (p *parser) constraints(t *Task) error {
	v := Constraints{RequiresHumanReview: Optional[bool]{Set: true}}
	err := p.object(func(name string) (uint8, error) {
		switch name {
		case "max_runtime_seconds":
			return 1, p.plainInt(&v.MaxRuntimeSeconds)
		case "data_boundary":
			return 2, p.plainText(&v.DataBoundary)
		case "requires_human_review":
			t.older = false
			return 4, p.plainBool(&v.RequiresHumanReview)
		}
		return 0, nil
	})
	if err != nil {
		return err
	}
	t.Constraints = Optional[Constraints]{v, true}
	p.vals = appendConstraints(p.vals, v, p.form)
	return nil
}

func appendConstraints(dst []byte, v Constraints, form pyjson.Form) []byte {
	if form == pyjson.Sorted {
		dst = appendText(append(dst, `{"data_boundary":`...), v.DataBoundary, form)
		dst = appendInt(append(dst, `,"max_runtime_seconds":`...), v.MaxRuntimeSeconds)
	} else {
		dst = appendInt(append(dst, `{"max_runtime_seconds":`...), v.MaxRuntimeSeconds)
		dst = appendText(append(dst, `,"data_boundary":`...), v.DataBoundary, form)
	}
	dst = append(dst, `,"requires_human_review":`...)
	if !v.RequiresHumanReview.Set {
		return append(dst, "null}"...)
	}
	return append(strconv.AppendBool(dst, v.RequiresHumanReview.Value), '}')
}

func (p *parser) provenance(t *Task) error {
	var v Provenance
	err := p.object(func(name string) (uint8, error) {
		switch name {
		case "origin_workflow":
			return 1, p.plainText(&v.OriginWorkflow)
		case "delegation_depth":
			return 2, p.plainInt(&v.DelegationDepth)
		}
		return 0, nil
	})
	if err != nil {
		return err
	}
	t.Provenance = Optional[Provenance]{v, true}
	if p.form == pyjson.Sorted {
		p.vals = appendInt(append(p.vals, `{"delegation_depth":`...), v.DelegationDepth)
		p.vals = appendText(append(p.vals, `,"origin_workflow":`...), v.OriginWorkflow, p.form)
	} else {
		p.vals = appendText(append(p.vals, `{"origin_workflow":`...), v.OriginWorkflow, p.form)
		p.vals = appendInt(append(p.vals, `,"delegation_depth":`...), v.DelegationDepth)
	}
	p.vals = append(p.vals, '}')
	return nil
}

// The plain readers read a value of a fixed object, whose canonical form is written once all of them are known.

func (p *parser) plainInt(v *Optional[int64]) error {
	null, err := p.scan.Null()
	if null || err != nil {
		return err
	}
	v.Set = true
	v.Value, err = p.scan.Int(maxInt)
	return err
}

func (p *parser) plainText(v *Optional[string]) error {
	null, err := p.scan.Null()
	if null || err != nil {
		return err
	}
	v.Set = true
	v.Value, err = p.scan.Text()
	return err
}

func (p *parser) plainBool(v *Optional[bool]) error {
	null, err := p.scan.Null()
	if null || err != nil {
		v.Set = false
		return err
	}
	v.Set = true
	v.Value, err = p.scan.Bool()
	return err
}

func (p *parser) plainTexts(v *[]string) error {
	if err := p.scan.Open('['); err != nil {
		return err
	}
	for {
		more, err := p.scan.Next(len(*v) == 0, ']')
		if err != nil || !more {
			return err
		}
		s, err := p.scan.Text()
		if err != nil {
			return pyjson.At(err, strconv.Itoa(len(*v)))
		}
		*v = append(*v, s)
	}
}

func appendInt(dst []byte, v Optional[int64]) []byte {
	if !v.Set {
		return append(dst, "null"...)
	}
	return strconv.AppendInt(dst, v.Value, 10)
}

func appendText(dst []byte, v Optional[string], form pyjson.Form) []byte {
	if !v.Set {
		return append(dst, "null"...)
	}
	return pyjson.AppendString(dst, v.Value, form)
}

const (
	pemHead = "-----BEGIN PUBLIC KEY-----\n"
	pemTail = "\n-----END PUBLIC KEY-----\n"
)

// publicKey reads the PEM text. Whether it holds a key is not looked at: the gate compares it with the registry's
// text, byte by byte. The shape is checked so that a text with other line ends is named as what it is.
func (p *parser) publicKey(t *Task) error {
	if err := p.text(&t.PublicKeyPEM); err != nil {
		return err
	}
	body, ok := strings.CutPrefix(t.PublicKeyPEM, pemHead)
	if ok {
		body, ok = strings.CutSuffix(body, pemTail)
	}
	ok = ok && len(body) > 0
	for i := 0; ok && i < len(body); i++ {
		c := body[i]
		ok = sextet[c] < 64 || c == '=' || c == '\n'
	}
	if !ok {
		return fault.BadField("", "not the PEM text of a public key, with line feeds and a final one")
	}
	return nil
}

// signature reads the signature. It stands outside the signed bytes.
func (p *parser) signature(t *Task) error {
	v, err := p.scan.Text()
	if err != nil {
		return err
	}
	if rest, batched := strings.CutPrefix(v, signature.BatchPrefix); batched {
		if len(v) > signature.MaxText || !canonicalBase64URL(rest) {
			return fault.BadField("", "not canonical base64url after %s", signature.BatchPrefix)
		}
	} else if !canonicalBase64(v) {
		return fault.BadField("", "not canonical padded base64")
	}
	t.SignatureText = v
	return nil
}

// sextet holds the value of each base64 character, 255 for other bytes.
var sextet = func() (t [256]byte) {
	for i := range t {
		t[i] = 255
	}
	for i, c := range []byte("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/") {
		t[c] = byte(i)
	}
	return t
}()

// canonicalBase64 reports whether s is the one text of some bytes in standard base64 with padding.
func canonicalBase64(s string) bool {
	if len(s) == 0 || len(s)%4 != 0 {
		return false
	}
	body, spare := s, byte(0) // the bits of the last character that say nothing
	switch {
	case strings.HasSuffix(s, "=="):
		body, spare = s[:len(s)-2], 0x0f
	case s[len(s)-1] == '=':
		body, spare = s[:len(s)-1], 0x03
	}
	for i := 0; i < len(body); i++ {
		if sextet[body[i]] > 63 {
			return false
		}
	}
	return sextet[body[len(body)-1]]&spare == 0
}

// canonicalBase64URL reports whether s is the one text of some bytes in base64url without padding.
func canonicalBase64URL(s string) bool {
	if strings.ContainsAny(s, "\r\n") { // the decoder would skip these
		return false
	}
	_, err := base64.RawURLEncoding.Strict().DecodeString(s)
	return err == nil && s != ""
}

// time reads a moment: RFC 3339 with "T", seconds, at most six digits of a fraction, and "Z" or an offset of hours
// and minutes. Its canonical form keeps the offset, writes a zero offset as Z, and microseconds only if there are any.
func (p *parser) time(v *Time) error {
	s, err := p.scan.Text()
	if err != nil {
		return err
	}
	if !v.parse(s) {
		return fault.BadField("", "not a time like 2026-03-08T12:00:00.000000Z or with an offset like +02:00")
	}
	p.vals = append(p.vals, '"')
	p.vals = append(v.appendTo(p.vals), '"')
	return nil
}

func (v *Time) parse(s string) bool {
	if len(s) < len("2026-03-08T12:00:00Z") ||
		s[4] != '-' || s[7] != '-' || s[10] != 'T' || s[13] != ':' || s[16] != ':' {
		return false
	}
	year, month, day := natural(s[:4]), natural(s[5:7]), natural(s[8:10])
	hour, minute, second := natural(s[11:13]), natural(s[14:16]), natural(s[17:19])
	if year < 1 || month < 1 || month > 12 || day < 1 || day > daysIn(year, month) ||
		uint(hour) > 23 || uint(minute) > 59 || uint(second) > 59 {
		return false
	}
	micros, rest, ok := fraction(s[19:])
	if !ok {
		return false
	}
	offset, ok := zone(rest)
	if !ok {
		return false
	}
	v.Offset, v.Present = offset, true
	v.Instant = time.Date(year, time.Month(month), day, hour, minute, second, micros*1000, time.UTC).Add(-offset)
	return true
}

// natural reads a number of digits alone, -1 where it is none.
func natural(s string) int {
	n := 0
	for i := 0; i < len(s); i++ {
		c := s[i] - '0'
		if c > 9 {
			return -1
		}
		n = n*10 + int(c)
	}
	return n
}

func daysIn(year, month int) int {
	switch month {
	case 2:
		if year%4 == 0 && (year%100 != 0 || year%400 == 0) {
			return 29
		}
		return 28
	case 4, 6, 9, 11:
		return 30
	}
	return 31
}

// fraction reads an optional fraction of a second and returns it in microseconds with what follows it.
func fraction(s string) (micros int, rest string, ok bool) {
	if s[0] != '.' {
		return 0, s, true
	}
	n := 1
	for n < len(s) && s[n] >= '0' && s[n] <= '9' {
		n++
	}
	if n == 1 || n > 7 || n == len(s) {
		return 0, "", false
	}
	micros = natural(s[1:n])
	for i := n; i < 7; i++ {
		micros *= 10
	}
	return micros, s[n:], true
}

func zone(s string) (time.Duration, bool) {
	if s == "Z" {
		return 0, true
	}
	if len(s) != len("+00:00") || s[0] != '+' && s[0] != '-' || s[3] != ':' {
		return 0, false
	}
	hours, minutes := natural(s[1:3]), natural(s[4:6])
	if uint(hours) > 23 || uint(minutes) > 59 {
		return 0, false
	}
	offset := time.Duration(hours)*time.Hour + time.Duration(minutes)*time.Minute
	if s[0] == '-' {
		offset = -offset
	}
	return offset, true
}

// String returns the time as it stands in the signed bytes; "" where there is none.
func (v Time) String() string {
	if !v.Present {
		return ""
	}
	return string(v.appendTo(nil))
}

func (v Time) appendTo(dst []byte) []byte {
	local := v.Instant.Add(v.Offset)
	year, month, day := local.Date()
	hour, minute, second := local.Clock()
	dst = append(appendPadded(dst, year, 4), '-')
	dst = append(appendPadded(dst, int(month), 2), '-')
	dst = append(appendPadded(dst, day, 2), 'T')
	dst = append(appendPadded(dst, hour, 2), ':')
	dst = append(appendPadded(dst, minute, 2), ':')
	dst = appendPadded(dst, second, 2)
	if micros := local.Nanosecond() / 1000; micros != 0 {
		dst = appendPadded(append(dst, '.'), micros, 6)
	}
	if v.Offset == 0 {
		return append(dst, 'Z')
	}
	offset, sign := int(v.Offset/time.Minute), byte('+')
	if offset < 0 {
		offset, sign = -offset, '-'
	}
	dst = append(appendPadded(append(dst, sign), offset/60, 2), ':')
	return appendPadded(dst, offset%60, 2)
}

func appendPadded(dst []byte, n, width int) []byte {
	for div := pow10[width-1]; div > 0; div /= 10 {
		dst = append(dst, byte('0'+n/div%10))
	}
	return dst
}

var pow10 = [...]int{1, 10, 100, 1000, 10000, 100000}
