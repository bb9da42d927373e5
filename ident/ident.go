// Package ident holds the names of agents and keys: fixed-size or validated values with one text form each and
// strict parsers. Equality of two values is equality of what they name; nothing here is ever truncated.
package ident

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"strings"

	"github.com/trustd/trustd/fault"
)

// MaxAgentID bounds the text of an agent id, in bytes.
const MaxAgentID = 128

// An AgentID names an agent of this authority: 1 to 128 bytes of a-z, A-Z, 0-9, '.', '_' and '-', starting and ending with a
// letter or digit. A local id holds no ':', which separates namespaces. Only ParseAgentID makes one; the zero
// value names nobody.
type AgentID struct{ s string }

// ParseAgentID checks and returns an agent id.
func ParseAgentID(s string) (AgentID, error) {
	if s == "" || len(s) > MaxAgentID {
		return AgentID{}, fault.BadField("agent_id", "an agent id has 1 to %d bytes", MaxAgentID)
	}
	for i := 0; i < len(s); i++ {
		c := s[i]
		if alnum(c) || (i > 0 && i < len(s)-1 && (c == '.' || c == '_' || c == '-')) {
			continue
		}
		return AgentID{}, fault.BadField("agent_id",
			"an agent id is made of letters, digits, '.', '_' and '-', and starts and ends with a letter or digit")
	}
	return AgentID{s}, nil
}

func alnum(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
}

// String returns the id's text.
func (a AgentID) String() string { return a.s }

// IsZero reports whether a names nobody.
func (a AgentID) IsZero() bool { return a.s == "" }

// MarshalText returns the id's text.
func (a AgentID) MarshalText() ([]byte, error) { return []byte(a.s), nil }

// UnmarshalText parses an id; the empty text is the zero value.
func (a *AgentID) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		*a = AgentID{}
		return nil
	}
	v, err := ParseAgentID(string(b))
	*a = v
	return err
}

// An Alias is a TrustHandoff agent name: "agent:" and either 16 characters of standard base64 (derived from a key,
// specification packet.md 1.2) or <role>[:<instance>], role and instance each in the grammar of an AgentID.
type Alias struct{ s string }

// aliasPrefix is the namespace of aliases; no issuer may take it.
const aliasPrefix = "agent:"

// ParseAlias checks and returns an alias.
func ParseAlias(s string) (Alias, error) {
	rest, ok := strings.CutPrefix(s, aliasPrefix)
	if !ok || len(s) > MaxAgentID {
		return Alias{}, fault.BadField("alias", "an alias starts with %q and has at most %d bytes", aliasPrefix, MaxAgentID)
	}
	if derivedForm(rest) {
		return Alias{s}, nil
	}
	role, instance, two := strings.Cut(rest, ":")
	if _, err := ParseAgentID(role); err != nil {
		return Alias{}, fault.BadField("alias", "an alias is agent:<16 base64 characters> or agent:<role>[:<instance>]")
	}
	if two {
		if _, err := ParseAgentID(instance); err != nil {
			return Alias{}, fault.BadField("alias", "an alias is agent:<16 base64 characters> or agent:<role>[:<instance>]")
		}
	}
	return Alias{s}, nil
}

// derivedForm reports whether s can be the first 16 characters of a base64 SHA-256.
func derivedForm(s string) bool {
	if len(s) != 16 {
		return false
	}
	for i := 0; i < len(s); i++ {
		if c := s[i]; !alnum(c) && c != '+' && c != '/' {
			return false
		}
	}
	return true
}

// Derived reports whether the alias has the form that only a key can derive: 16 base64 characters. Such an alias
// is granted with its key and never by request.
func (a Alias) Derived() bool { return derivedForm(strings.TrimPrefix(a.s, aliasPrefix)) }

// String returns the alias's text.
func (a Alias) String() string { return a.s }

// IsZero reports whether a is empty.
func (a Alias) IsZero() bool { return a.s == "" }

// MarshalText returns the alias's text.
func (a Alias) MarshalText() ([]byte, error) { return []byte(a.s), nil }

// UnmarshalText parses an alias.
func (a *Alias) UnmarshalText(b []byte) error {
	v, err := ParseAlias(string(b))
	*a = v
	return err
}

// A KeyID is a key's fingerprint: the SHA-256 of its DER SubjectPublicKeyInfo, written "sha256:" and 64 lower-case
// hexadecimal digits. The first key of an agent also names its lineage.
type KeyID [sha256.Size]byte

const keyIDPrefix = "sha256:"

// ParseKeyID checks and returns a fingerprint.
func ParseKeyID(s string) (KeyID, error) {
	var id KeyID
	rest, ok := strings.CutPrefix(s, keyIDPrefix)
	if !ok || len(rest) != 2*len(id) || strings.ToLower(rest) != rest {
		return KeyID{}, fault.BadField("fingerprint", "a fingerprint is %q and 64 lower-case hexadecimal digits", keyIDPrefix)
	}
	if _, err := hex.Decode(id[:], []byte(rest)); err != nil {
		return KeyID{}, fault.BadField("fingerprint", "a fingerprint is %q and 64 lower-case hexadecimal digits", keyIDPrefix)
	}
	return id, nil
}

// String returns the fingerprint's text.
func (k KeyID) String() string { return keyIDPrefix + hex.EncodeToString(k[:]) }

// Short returns the first 12 hexadecimal digits, for tables that people read; never for comparison.
func (k KeyID) Short() string { return hex.EncodeToString(k[:6]) }

// IsZero reports whether k is the zero value.
func (k KeyID) IsZero() bool { return k == KeyID{} }

// MarshalText returns the fingerprint's text.
func (k KeyID) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText parses a fingerprint.
func (k *KeyID) UnmarshalText(b []byte) error {
	v, err := ParseKeyID(string(b))
	*k = v
	return err
}

var _ json.Marshaler = (*PublicKey)(nil)

// DerivedAlias returns TrustHandoff's name for a key: "agent:" and the first 16 characters of the base64 of the
// SHA-256 of its PEM text (packet.md 1.2).
func DerivedAlias(p PublicKey) Alias {
	sum := sha256.Sum256([]byte(p.PEM()))
	return Alias{aliasPrefix + base64.StdEncoding.EncodeToString(sum[:])[:16]}
}
