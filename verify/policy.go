package verify

import (
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/packet"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
)

// The bounds of a Policy, TrustHandoff's own.
const (
	DefaultSkew = 30 * time.Second
	MaxSkew     = 300 * time.Second
	MaxGrace    = 60 * time.Second
)

// A Policy is what a verifier demands, whatever the sender says. Values outside their bounds are moved to the
// nearest bound when they are used.
type Policy struct {
	Skew  time.Duration    // how far ahead the sender's clock may be; 0 to MaxSkew
	Grace time.Duration    // how long after its end a packet is still taken; 0 to MaxGrace
	TTL   packet.TTLPolicy // the longest life of a packet, by its risk level
	// MessageAge is the longest life of a SignedMessage, from its timestamp on; 0 sets no limit beside the message's
	// own.
	MessageAge time.Duration
	// LegacyTH033 admits packets of TrustHandoff 0.3.3 and older, which sign other bytes (packet.md 1.3).
	LegacyTH033 bool
	// MinGrade is the lowest grade of a signer's key; "" takes any.
	MinGrade signer.Grade
	// DirectOnly refuses batched signatures.
	DirectOnly bool
}

// Tightened returns p with what one request demands on top: never less than p.
func (p Policy) Tightened(grade signer.Grade, directOnly bool) Policy {
	if !p.MinGrade.AtLeast(grade) {
		p.MinGrade = grade
	}
	p.DirectOnly = p.DirectOnly || directOnly
	return p
}

// assurance refuses a signature in a mode, by a key of a grade, that is less than the policy demands.
func (p Policy) assurance(grade string, mode signature.Mode, field string) *fault.Error {
	switch {
	case !signer.Grade(grade).AtLeast(p.MinGrade):
		return &fault.Error{Code: fault.AssuranceTooLow, Field: field, Text: "the key's grade is lower than " + string(p.MinGrade)}
	case p.DirectOnly && mode != signature.Direct:
		return &fault.Error{Code: fault.AssuranceTooLow, Field: "signature", Text: "the signature is batched, and only direct ones are taken"}
	}
	return nil
}

// DefaultPolicy returns TrustHandoff's limits: a skew of 30 s, no grace, 120 s for write, 900 s for all else.
func DefaultPolicy() Policy { return Policy{Skew: DefaultSkew, TTL: packet.DefaultTTL()} }

func (p Policy) skew() time.Duration { return min(max(p.Skew, 0), MaxSkew) }

func (p Policy) grace() time.Duration { return min(max(p.Grace, 0), MaxGrace) }
