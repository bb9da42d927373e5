package signer

import (
	"net/url"
	"slices"
	"strings"

	"github.com/trustd/trustd/fault"
)

// A URI is the address of a key or a token, in the manner of RFC 7512: scheme, then attributes separated by ';',
// then query attributes after '?' separated by '&'. Values are percent-encoded. The schemes are pkcs11, tpm, soft and
// plugin; the attributes:
//
//	pkcs11:token=LABEL;serial=SERIAL;id=%00%01...       a key by CKA_ID on the token with that label and serial
//	tpm:id=HEX                                          a key of the TPM backend
//	soft:id=HEX                                         a key of the software backend
//	plugin:id=HEX                                       a key of another plugin
//
// A token is chosen by label and serial, never by slot.
type URI struct {
	Scheme string
	Token  string
	Serial string
	Object string // CKA_LABEL: printed, and refused as the only way to name a key
	ID     ID
}

const maxURI = 1024

// ParseURI reads a key URI. Unknown attributes are refused, as is an attribute that stands twice.
func ParseURI(s string) (URI, error) {
	bad := func(format string, args ...any) (URI, error) {
		return URI{}, fault.BadField("key_uri", format, args...)
	}
	if len(s) > maxURI {
		return bad("a key URI has at most %d bytes", maxURI)
	}
	scheme, rest, ok := strings.Cut(s, ":")
	if !ok || !slices.Contains([]string{"pkcs11", "tpm", "soft", "plugin"}, scheme) {
		return bad("a key URI starts with pkcs11:, tpm:, soft: or plugin:")
	}
	if strings.Contains(rest, "?") {
		return bad("a key URI holds no query attributes; module and PIN stand in the configuration")
	}
	u := URI{Scheme: scheme}
	seen := map[string]bool{}
	for part := range strings.SplitSeq(rest, ";") {
		name, enc, ok := strings.Cut(part, "=")
		if !ok || seen[name] {
			return bad("an attribute is name=value and stands once")
		}
		seen[name] = true
		val, err := url.PathUnescape(enc)
		if err != nil || val == "" {
			return bad("the value of an attribute is percent-encoded and not empty")
		}
		pkcs11 := scheme == "pkcs11"
		switch {
		case name == "id" && pkcs11:
			u.ID, err = NewID([]byte(val))
		case name == "id":
			u.ID, err = ParseID(val)
		case name == "token" && pkcs11:
			u.Token = val
		case name == "serial" && pkcs11:
			u.Serial = val
		case name == "object" && pkcs11:
			u.Object = val
		default:
			return bad("an attribute is not known for this scheme")
		}
		if err != nil {
			return URI{}, err
		}
	}
	if u.ID == "" {
		return bad("a key is named by its id; a label alone names none")
	}
	return u, nil
}

// String returns the URI's text, attributes in a fixed order.
func (u URI) String() string {
	var b strings.Builder
	b.WriteString(u.Scheme + ":")
	sep := ""
	add := func(name, val string) {
		if val != "" {
			b.WriteString(sep + name + "=" + val)
			sep = ";"
		}
	}
	add("token", escape(u.Token))
	add("serial", escape(u.Serial))
	add("object", escape(u.Object))
	if u.Scheme == "pkcs11" {
		var id strings.Builder
		for _, c := range u.ID.Bytes() {
			id.WriteString("%" + hexByte(c))
		}
		add("id", id.String())
	} else {
		add("id", u.ID.String())
	}
	return b.String()
}

// escape leaves the characters that RFC 7512 leaves unreserved.
func escape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("-._~", c) >= 0 {
			b.WriteByte(c)
		} else {
			b.WriteString("%" + hexByte(c))
		}
	}
	return b.String()
}

func hexByte(c byte) string {
	const digits = "0123456789ABCDEF"
	return string([]byte{digits[c>>4], digits[c&15]})
}
