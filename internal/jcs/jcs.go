// Package jcs is the one door to RFC 8785, the canonical form of JSON that trustd's own records and messages are
// signed in. The library behind it rounds numbers that a double does not hold; who signs must refuse those first.
package jcs

import "github.com/gowebpki/jcs"

// Transform returns the canonical form of a JSON text. It refuses duplicate members, invalid UTF-8, lone surrogates
// and anything behind the value.
func Transform(text []byte) ([]byte, error) { return jcs.Transform(text) }
