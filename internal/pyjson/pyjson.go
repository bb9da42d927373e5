// Package pyjson reads JSON strictly, in one pass, and writes it as Python does, byte for byte.
//
// Two things make a signed text ambiguous: a reader that accepts several texts for one value, and a writer that is
// not the one that was signed. So the Scanner refuses what json.loads lets through (duplicate keys, NaN, lone
// surrogates, control characters, malformed UTF-8), keeps the token of a number (1 and 1.0 sign differently), and
// appends each value in one of the forms below while it reads. The rules are in packet.md 1.3.
package pyjson

import (
	"math"
	"strconv"
	"unicode/utf8"

	"github.com/trustd/trustd/fault"
)

// Limits. Python itself stops at integers of 4300 digits and at about 200 levels when it parses.
const (
	MaxDepth  = 100
	MaxDigits = 4300
)

// A Form is a way of writing JSON values.
type Form uint8

const (
	// Sorted is json.dumps(sort_keys=True, separators=(",", ":"), ensure_ascii=True).
	Sorted Form = iota
	// Declared is what pydantic's model_dump_json writes: members in their order, UTF-8 as it is, 1e+16 and 1e-7.
	Declared
	// DeclaredOld is Declared as pydantic wrote it while it had another float printer: 1e16.
	DeclaredOld
)

// plain marks the bytes that stand for themselves inside a string in every form.
var plain = func() (t [256]bool) {
	for c := 0x20; c < 0x7f; c++ {
		t[c] = c != '"' && c != '\\'
	}
	return t
}()

// short holds the letter of the two-character escapes.
var short = [256]byte{'"': '"', '\\': '\\', '\n': 'n', '\r': 'r', '\t': 't', '\b': 'b', '\f': 'f'}

const hexDigits = "0123456789abcdef"

// AppendString appends v as a JSON string. v must be valid UTF-8.
func AppendString(dst []byte, v string, form Form) []byte {
	dst = append(dst, '"')
	for i := 0; i < len(v); {
		run := i
		for i < len(v) && plain[v[i]] {
			i++
		}
		if dst = append(dst, v[run:i]...); i == len(v) {
			break
		}
		c := v[i]
		switch {
		case short[c] != 0:
			dst, i = append(dst, '\\', short[c]), i+1
		case c < 0x20:
			dst, i = appendUnit(dst, rune(c)), i+1
		case form != Sorted:
			dst, i = append(dst, c), i+1
		default:
			r, n := utf8.DecodeRuneInString(v[i:])
			dst, i = appendRune(dst, r), i+n
		}
	}
	return append(dst, '"')
}

func appendRune(dst []byte, r rune) []byte {
	if r < 0x10000 {
		return appendUnit(dst, r)
	}
	r -= 0x10000
	return appendUnit(appendUnit(dst, 0xd800+r>>10), 0xdc00+r&0x3ff)
}

func appendUnit(dst []byte, u rune) []byte {
	return append(dst, '\\', 'u', hexDigits[u>>12&15], hexDigits[u>>8&15], hexDigits[u>>4&15], hexDigits[u&15])
}

// AppendFloat appends a finite number with the fewest digits that read back as f. Sorted is Python's repr:
// exponent form below 1e-4 and from 1e16 on, with a sign and at least two digits (1e-07). The Declared forms write
// fixed digits down to 1e-5 and the bare exponent (1e-7).
func AppendFloat(dst []byte, f float64, form Form) []byte {
	var buf [32]byte
	e := strconv.AppendFloat(buf[:0], f, 'e', -1, 64) // [-]d[.ddd]e±dd[d]
	if e[0] == '-' {
		dst, e = append(dst, '-'), e[1:]
	}
	cut := len(e) - 1
	for e[cut] != 'e' {
		cut--
	}
	exp, _ := strconv.Atoi(string(e[cut+1:]))
	digits := e[:cut]
	if cut > 1 { // "d.ddd": the first digit takes the place of the point
		e[1] = e[0]
		digits = e[1:cut]
	}
	low := -4
	if form != Sorted {
		low = -5
	}
	if exp < low || exp >= 16 {
		return appendExponent(dst, digits, exp, form)
	}
	return appendFixed(dst, digits, exp)
}

func appendExponent(dst, digits []byte, exp int, form Form) []byte {
	dst = append(dst, digits[0])
	if len(digits) > 1 {
		dst = append(append(dst, '.'), digits[1:]...)
	}
	dst = append(dst, 'e')
	switch {
	case exp < 0:
		dst, exp = append(dst, '-'), -exp
	case form != DeclaredOld:
		dst = append(dst, '+')
	}
	if exp < 10 && form == Sorted {
		dst = append(dst, '0')
	}
	return strconv.AppendInt(dst, int64(exp), 10)
}

func appendFixed(dst, digits []byte, exp int) []byte {
	if exp < 0 {
		dst = append(dst, '0', '.')
		for i := exp + 1; i < 0; i++ {
			dst = append(dst, '0')
		}
		return append(dst, digits...)
	}
	if len(digits) > exp+1 {
		dst = append(append(dst, digits[:exp+1]...), '.')
		return append(dst, digits[exp+1:]...)
	}
	dst = append(dst, digits...)
	for i := len(digits); i <= exp; i++ {
		dst = append(dst, '0')
	}
	return append(dst, '.', '0')
}

// appendNumber appends a number token. Integers keep their digits, -0 is 0; a token with a point or an exponent
// is a float.
func appendNumber(dst []byte, token string, float bool, form Form) ([]byte, error) {
	if float {
		f, err := strconv.ParseFloat(token, 64)
		if err != nil || math.IsInf(f, 0) {
			return dst, fault.BadField("", "a number is too large for a float")
		}
		return AppendFloat(dst, f, form), nil
	}
	if token == "-0" {
		return append(dst, '0'), nil
	}
	if len(token) > MaxDigits && len(token)-sign(token) > MaxDigits {
		return dst, fault.BadField("", "an integer has more than %d digits", MaxDigits)
	}
	return append(dst, token...), nil
}

func sign(token string) int {
	if token[0] == '-' {
		return 1
	}
	return 0
}
