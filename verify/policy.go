package verify

import (
	"time"

	"github.com/trustd/trustd/packet"
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
}

// DefaultPolicy returns TrustHandoff's limits: a skew of 30 s, no grace, 120 s for write, 900 s for all else.
func DefaultPolicy() Policy { return Policy{Skew: DefaultSkew, TTL: packet.DefaultTTL()} }

func (p Policy) skew() time.Duration { return min(max(p.Skew, 0), MaxSkew) }

func (p Policy) grace() time.Duration { return min(max(p.Grace, 0), MaxGrace) }
