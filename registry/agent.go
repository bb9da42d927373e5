package registry

import (
	"maps"
	"slices"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
)

// A Role says what a key is for. One key has one role, ever.
type Role string

const (
	RoleAgent    Role = "agent"    // signs messages
	RoleOperator Role = "operator" // signs records
	RoleNode     Role = "node"     // stands for a host
)

// A Level is how far an agent is trusted. Do not reorder: levels are compared as numbers.
type Level uint8

const (
	LevelNone Level = iota
	LevelLow
	LevelMedium
	LevelHigh
	LevelAdmin
)

var levels = [...]string{"NONE", "LOW", "MEDIUM", "HIGH", "ADMIN"}

// ParseLevel reads a level's name.
func ParseLevel(s string) (Level, error) {
	for i, name := range levels {
		if name == s {
			return Level(i), nil
		}
	}
	return 0, fault.BadField("trust_level", "a trust level is NONE, LOW, MEDIUM, HIGH or ADMIN")
}

// String returns the level's name.
func (l Level) String() string {
	if int(l) >= len(levels) {
		return "unknown"
	}
	return levels[l]
}

// MarshalText returns the level's name.
func (l Level) MarshalText() ([]byte, error) {
	if int(l) >= len(levels) {
		return nil, fault.BadField("trust_level", "no such trust level")
	}
	return []byte(l.String()), nil
}

// UnmarshalText parses a level's name.
func (l *Level) UnmarshalText(b []byte) error {
	v, err := ParseLevel(string(b))
	*l = v
	return err
}

// An Agent is an identity as the registry knows it: an agent, an operator or a node. What State returns is the
// caller's own copy.
type Agent struct {
	ID         ident.AgentID
	Role       Role
	Level      Level
	Keys       []KeyEpoch // oldest first, never empty
	Aliases    []ident.Alias
	Metadata   map[string]string
	Version    uint64 // counts the accepted records about this agent, from 1
	CreatedAt  time.Time
	ExpiresAt  time.Time // zero: never
	Revocation *Revocation
	Removed    *Removal
	Possession bool        // the holder of the key proved that it holds it
	Node       ident.KeyID // of the node that registered the agent; zero where an operator alone did
	Lineage    ident.KeyID // of the first key
}

// A KeyEpoch is a key and the time in which it was the agent's.
type KeyEpoch struct {
	Epoch  uint64 // from 1
	Public ident.PublicKey
	From   time.Time
	Until  time.Time // zero while the key is current
	Grade  string    // as signer.Grade, claimed by the registering host; "" where nobody claimed one
	Origin string    // as signer.Origin
}

// A Revocation says that an agent's keys must not be believed any more.
type Revocation struct {
	Code   RevocationCode
	Reason string
	At     time.Time
	By     ident.KeyID // the first of the keys with authority that signed it
}

// A RevocationCode says why. The codes stand in the order of their strength.
type RevocationCode string

const (
	Decommissioned     RevocationCode = "decommissioned"
	Superseded         RevocationCode = "superseded"
	PrivilegeWithdrawn RevocationCode = "privilege_withdrawn"
	KeyCompromise      RevocationCode = "key_compromise"
)

var revocationCodes = []RevocationCode{Decommissioned, Superseded, PrivilegeWithdrawn, KeyCompromise}

// strength is 0 for no code, else the code's rank.
func (c RevocationCode) strength() int { return slices.Index(revocationCodes, c) + 1 }

// A Removal says that an agent was decommissioned.
type Removal struct {
	Reason string
	At     time.Time
	By     ident.KeyID
}

// A Status says whether an agent may be believed.
type Status string

const (
	Active  Status = "active"
	Revoked Status = "revoked"
	Gone    Status = "removed"
	Expired Status = "expired"
)

// Status returns the agent's status at a time. Being revoked outweighs being removed, and that being expired; an
// agent is expired from ExpiresAt on.
func (a *Agent) Status(now time.Time) Status {
	switch {
	case a.Revocation != nil:
		return Revoked
	case a.Removed != nil:
		return Gone
	case !a.ExpiresAt.IsZero() && !now.Before(a.ExpiresAt):
		return Expired
	}
	return Active
}

// Current returns the key that the agent signs with.
func (a *Agent) Current() KeyEpoch { return a.Keys[len(a.Keys)-1] }

// clone returns a copy that shares nothing that can be written.
func (a *Agent) clone() Agent {
	c := *a
	c.Keys = slices.Clone(a.Keys)
	c.Aliases = slices.Clone(a.Aliases)
	c.Metadata = maps.Clone(a.Metadata)
	if a.Revocation != nil {
		r := *a.Revocation
		c.Revocation = &r
	}
	if a.Removed != nil {
		r := *a.Removed
		c.Removed = &r
	}
	return c
}
