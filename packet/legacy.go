package packet

import (
	"bytes"

	"github.com/trustd/trustd/internal/pyjson"
)

// LegacySigningBytes returns the byte strings that TrustHandoff 0.3.3 and older may have signed for this packet,
// newest first (packet.md 1.3): its members in the order of their declaration, UTF-8 as it is, floats as 1e-7.
//
// There is no version on the wire, so a verifier can only try them. Two things vary: 0.3.2 and older do not know
// risk_level, ttl_seconds, ai_provenance and constraints.requires_human_review, and that form is a candidate only
// for a packet that has none of them on the wire, since it would leave them unsigned; and pydantic has printed large
// floats as 1e16 and as 1e+16. trustd never signs any of these.
func (t *Task) LegacySigningBytes() [][]byte {
	p := parsers.Get().(*parser)
	defer p.release()
	var all [][]byte
	add := func(b []byte) {
		for _, have := range all {
			if bytes.Equal(have, b) {
				return
			}
		}
		all = append(all, b)
	}
	for _, form := range []pyjson.Form{pyjson.Declared, pyjson.DeclaredOld} {
		again := &Task{wire: t.wire}
		if p.read(again, form) != nil {
			return nil // not reached: the text was parsed before
		}
		p.resolveTTL(again)
		add(p.legacy(nil, declared))
		if t.older {
			if c := again.Constraints; c.Set {
				p.put(fieldConstraints, string(appendOlderConstraints(nil, c.Value, form)))
			}
			add(p.legacy(nil, declared[:len(declared)-3]))
		}
	}
	return all
}

// legacy appends the given members to dst as one object.
func (p *parser) legacy(dst []byte, fields []field) []byte {
	for i, f := range fields {
		sep := byte(',')
		if i == 0 {
			sep = '{'
		}
		dst = append(append(append(dst, sep, '"'), fieldNames[f]...), `":`...)
		dst = p.appendValue(dst, f)
	}
	return append(dst, '}')
}

// appendOlderConstraints appends Constraints as they were before requires_human_review.
func appendOlderConstraints(dst []byte, v Constraints, form pyjson.Form) []byte {
	dst = appendInt(append(dst, `{"max_runtime_seconds":`...), v.MaxRuntimeSeconds)
	return append(appendText(append(dst, `,"data_boundary":`...), v.DataBoundary, form), '}')
}
