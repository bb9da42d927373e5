package registry

import (
	"bytes"
	"cmp"
	"encoding/json"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/jcs"
)

// The types of records.
const (
	TypeGenesis  = "genesis"
	TypeRegister = "agent.register"
	TypeImport   = "agent.import"
	TypeAlias    = "agent.alias"
	TypeRevoke   = "agent.revoke"
	TypeRemove   = "agent.remove"
	TypeUpdate   = "agent.update"
)

// Limits on what a body holds. They bound what one record can cost every host.
const (
	maxOperators     = 16 // in a genesis record; more can be registered
	maxAliases       = 16 // of one agent, beside those derived from its keys
	maxMetadata      = 64 // entries
	maxMetadataKey   = 64 // bytes
	maxMetadataValue = 1024
	maxReason        = 512
	maxOrigin        = 128
	saltSize         = 32
)

// A Genesis is the first record: it founds an authority. All operators that it names sign it, and the node.
type Genesis struct {
	Origin    string    `json:"origin"`    // the authority's name, in the grammar of a host name
	Operators []Founder `json:"operators"` // in ascending order of their ids
	Threshold int       `json:"admin_threshold"`
	Node      Founder   `json:"node"`
	Policy    Policy    `json:"policy"`
	CreatedAt time.Time `json:"created_at"`
	Salt      []byte    `json:"salt"` // 32 random bytes: no two authorities have the same id
}

// A Founder is an identity that a genesis record names.
type Founder struct {
	AgentID   ident.AgentID   `json:"agent_id"`
	PublicKey ident.PublicKey `json:"public_key"`
	Grade     string          `json:"grade"`
	Origin    string          `json:"origin"`
}

// A Policy holds an authority's defaults.
type Policy struct {
	DefaultLevel Level `json:"default_level"` // for agents that are registered with no level named; at most LOW
}

// A Register introduces an identity whose key a node holds. The key itself proves possession.
//
// Needed are: for a level up to LOW, the node; up to HIGH, the node and an operator; for ADMIN, operators and
// nodes, the threshold of operators, and the node where one is named.
type Register struct {
	AgentID   ident.AgentID     `json:"agent_id"`
	Role      Role              `json:"role"`
	PublicKey ident.PublicKey   `json:"public_key"`
	Aliases   []ident.Alias     `json:"aliases,omitempty"` // ascending; none of the derived form
	Metadata  map[string]string `json:"metadata,omitempty"`
	Level     Level             `json:"trust_level"`
	Grade     string            `json:"grade"`
	Origin    string            `json:"origin"`
	Node      ident.KeyID       `json:"node,omitzero"` // required for the role agent, absent for a node
	CreatedAt time.Time         `json:"created_at"`
	ExpiresAt time.Time         `json:"expires_at,omitzero"`
}

// An Import introduces an agent whose key is elsewhere. With proof of possession it is judged as a Register is;
// without one it needs an operator for any level.
type Import struct {
	AgentID   ident.AgentID     `json:"agent_id"`
	PublicKey ident.PublicKey   `json:"public_key"`
	Aliases   []ident.Alias     `json:"aliases,omitempty"`
	Metadata  map[string]string `json:"metadata,omitempty"`
	Level     Level             `json:"trust_level"`
	Node      ident.KeyID       `json:"node,omitzero"` // the node that imports, where it signs
	CreatedAt time.Time         `json:"created_at"`
	ExpiresAt time.Time         `json:"expires_at,omitzero"`
}

// An AddAlias gives an agent another name. The registering node signs it, or an operator.
type AddAlias struct {
	AgentID ident.AgentID `json:"agent_id"`
	Version uint64        `json:"version"` // that the agent has before
	Alias   ident.Alias   `json:"alias"`
	At      time.Time     `json:"at"`
}

// A Revoke withdraws belief in all keys of an agent. The agent's own key signs it, the registering node, or an
// operator; for an operator or an agent of level ADMIN, its own key or the threshold.
type Revoke struct {
	AgentID ident.AgentID  `json:"agent_id"`
	Code    RevocationCode `json:"code"`
	Reason  string         `json:"reason,omitempty"`
	At      time.Time      `json:"at"`
}

// A Remove decommissions an agent. Its id, keys and aliases are never given again.
type Remove struct {
	AgentID ident.AgentID `json:"agent_id"`
	Reason  string        `json:"reason,omitempty"`
	At      time.Time     `json:"at"`
}

// An Update replaces an agent's metadata and expiry. A later expiry of an agent above LOW needs what its
// registration needed.
type Update struct {
	AgentID   ident.AgentID     `json:"agent_id"`
	Version   uint64            `json:"version"` // that the agent has before
	Metadata  map[string]string `json:"metadata,omitempty"`
	ExpiresAt time.Time         `json:"expires_at,omitzero"`
	At        time.Time         `json:"at"`
}

// NewGenesis returns the unsigned record. Like its siblings it brings times to UTC and milliseconds and lists into
// their order, and refuses what Apply would.
func NewGenesis(g Genesis) (Record, error) {
	g.CreatedAt = stamp(g.CreatedAt)
	g.Operators = slices.SortedFunc(slices.Values(g.Operators), func(a, b Founder) int {
		return cmp.Compare(a.AgentID.String(), b.AgentID.String())
	})
	return newRecord(TypeGenesis, &g)
}

// NewRegister returns the unsigned record.
func NewRegister(b Register) (Record, error) {
	b.CreatedAt, b.ExpiresAt, b.Aliases = stamp(b.CreatedAt), stamp(b.ExpiresAt), sortAliases(b.Aliases)
	return newRecord(TypeRegister, &b)
}

// NewImport returns the unsigned record.
func NewImport(b Import) (Record, error) {
	b.CreatedAt, b.ExpiresAt, b.Aliases = stamp(b.CreatedAt), stamp(b.ExpiresAt), sortAliases(b.Aliases)
	return newRecord(TypeImport, &b)
}

// NewAddAlias returns the unsigned record.
func NewAddAlias(b AddAlias) (Record, error) {
	b.At = stamp(b.At)
	return newRecord(TypeAlias, &b)
}

// NewRevoke returns the unsigned record.
func NewRevoke(b Revoke) (Record, error) {
	b.At = stamp(b.At)
	return newRecord(TypeRevoke, &b)
}

// NewRemove returns the unsigned record.
func NewRemove(b Remove) (Record, error) {
	b.At = stamp(b.At)
	return newRecord(TypeRemove, &b)
}

// NewUpdate returns the unsigned record.
func NewUpdate(b Update) (Record, error) {
	b.At, b.ExpiresAt = stamp(b.At), stamp(b.ExpiresAt)
	return newRecord(TypeUpdate, &b)
}

// A body is one of the types above.
type body interface{ check() error }

func newRecord(typ string, b body) (Record, error) {
	if err := b.check(); err != nil {
		return Record{}, err
	}
	text, err := encode(b)
	if err != nil {
		return Record{}, err
	}
	r := Record{Type: typ, Body: text}
	if _, err := r.Marshal(); err != nil { // too large
		return Record{}, err
	}
	return r, nil
}

func encode(b body) ([]byte, error) {
	text, err := json.Marshal(b)
	if err == nil {
		text, err = jcs.Transform(text)
	}
	if err != nil {
		return nil, fault.Wrap(fault.Malformed, err, "the record cannot be written")
	}
	return text, nil
}

// decode reads a body and checks it. Encoding it again must give the same bytes, which refuses members that are
// unknown, absent, spelled in another case or written in another way.
func decode(text []byte, b body) error {
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(b); err != nil {
		return fault.Wrap(fault.Malformed, err, "the body is not that of its record type")
	}
	if err := b.check(); err != nil {
		return err
	}
	again, err := encode(b)
	if err != nil {
		return err
	}
	if !bytes.Equal(again, text) {
		return fault.BadField("body", "not the canonical form of its record type")
	}
	return nil
}

func (g *Genesis) check() error {
	if !validOrigin(g.Origin) {
		return fault.BadField("origin", "an origin is 1 to %d bytes of a-z, 0-9, '.' and '-'", maxOrigin)
	}
	if len(g.Operators) == 0 || len(g.Operators) > maxOperators {
		return fault.BadField("operators", "a genesis record names 1 to %d operators", maxOperators)
	}
	for i, f := range g.Operators {
		if i > 0 && g.Operators[i-1].AgentID.String() >= f.AgentID.String() {
			return fault.BadField("operators", "not in ascending order of their ids")
		}
		if err := f.check(); err != nil {
			return err
		}
	}
	if err := g.Node.check(); err != nil {
		return err
	}
	if g.Threshold < min(2, len(g.Operators)) || g.Threshold > len(g.Operators) {
		return fault.BadField("admin_threshold", "1 with one operator, else 2 up to the number of operators")
	}
	if g.Policy.DefaultLevel > LevelLow {
		return fault.BadField("policy.default_level", "the default level is NONE or LOW")
	}
	if len(g.Salt) != saltSize {
		return fault.BadField("salt", "the salt has %d bytes", saltSize)
	}
	return checkTime("created_at", g.CreatedAt)
}

func (f *Founder) check() error {
	if err := checkIdentity(f.AgentID, f.PublicKey); err != nil {
		return err
	}
	return checkProvenance(f.Grade, f.Origin)
}

func (b *Register) check() error {
	if b.Role != RoleAgent && b.Role != RoleOperator && b.Role != RoleNode {
		return fault.BadField("role", "a role is agent, operator or node")
	}
	if b.Role == RoleAgent && b.Node.IsZero() || b.Role == RoleNode && !b.Node.IsZero() {
		return fault.BadField("node", "the node that registers is named for an agent, and not for a node")
	}
	if b.Role == RoleOperator && b.Level != LevelAdmin || b.Role == RoleNode && b.Level != LevelLow {
		return fault.BadField("trust_level", "an operator has the level ADMIN, a node the level LOW")
	}
	if err := checkProvenance(b.Grade, b.Origin); err != nil {
		return err
	}
	return checkNewcomer(newcomer{b.AgentID, b.PublicKey, b.Aliases, b.Metadata, b.Level, b.CreatedAt, b.ExpiresAt})
}

func (b *Import) check() error {
	return checkNewcomer(newcomer{b.AgentID, b.PublicKey, b.Aliases, b.Metadata, b.Level, b.CreatedAt, b.ExpiresAt})
}

func (b *AddAlias) check() error {
	if err := checkTarget(b.AgentID, b.At); err != nil {
		return err
	}
	if b.Alias.IsZero() || b.Alias.Derived() {
		return fault.BadField("alias", "an alias of 16 base64 characters comes with its key only")
	}
	return nil
}

func (b *Revoke) check() error {
	if err := checkTarget(b.AgentID, b.At); err != nil {
		return err
	}
	if b.Code.strength() == 0 {
		return fault.BadField("code",
			"a revocation code is decommissioned, superseded, privilege_withdrawn or key_compromise")
	}
	return checkText("reason", b.Reason, maxReason)
}

func (b *Remove) check() error {
	if err := checkTarget(b.AgentID, b.At); err != nil {
		return err
	}
	return checkText("reason", b.Reason, maxReason)
}

func (b *Update) check() error {
	if err := checkTarget(b.AgentID, b.At); err != nil {
		return err
	}
	if err := checkExpiry(b.ExpiresAt, b.At); err != nil {
		return err
	}
	return checkMetadata(b.Metadata)
}

// A newcomer is what Register and Import have in common.
type newcomer struct {
	id        ident.AgentID
	key       ident.PublicKey
	aliases   []ident.Alias
	metadata  map[string]string
	level     Level
	createdAt time.Time
	expiresAt time.Time
}

func checkNewcomer(n newcomer) error {
	if err := checkIdentity(n.id, n.key); err != nil {
		return err
	}
	if len(n.aliases) > maxAliases {
		return fault.BadField("aliases", "an agent has at most %d aliases", maxAliases)
	}
	for i, a := range n.aliases {
		if a.IsZero() || a.Derived() {
			return fault.BadField("aliases", "an alias of 16 base64 characters comes with its key only")
		}
		if i > 0 && n.aliases[i-1].String() >= a.String() {
			return fault.BadField("aliases", "not in ascending order")
		}
	}
	if n.level > LevelAdmin {
		return fault.BadField("trust_level", "no such trust level")
	}
	if err := checkTime("created_at", n.createdAt); err != nil {
		return err
	}
	if err := checkExpiry(n.expiresAt, n.createdAt); err != nil {
		return err
	}
	return checkMetadata(n.metadata)
}

func checkIdentity(id ident.AgentID, key ident.PublicKey) error {
	if id.IsZero() {
		return fault.BadField("agent_id", "an agent id is required")
	}
	if key.IsZero() {
		return fault.BadField("public_key", "a public key is required")
	}
	return nil
}

func checkTarget(id ident.AgentID, at time.Time) error {
	if id.IsZero() {
		return fault.BadField("agent_id", "an agent id is required")
	}
	return checkTime("at", at)
}

func checkProvenance(grade, origin string) error {
	if !token(grade) {
		return fault.BadField("grade", "a grade is 1 to 32 bytes of a-z, 0-9, '_' and '-'")
	}
	if !token(origin) {
		return fault.BadField("origin", "the origin of a key is 1 to 32 bytes of a-z, 0-9, '_' and '-'")
	}
	return nil
}

func token(s string) bool {
	for i := 0; i < len(s); i++ {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '_' && c != '-' {
			return false
		}
	}
	return s != "" && len(s) <= 32
}

func validOrigin(s string) bool {
	for i := 0; i < len(s); i++ {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '.' && c != '-' {
			return false
		}
	}
	return s != "" && len(s) <= maxOrigin && !strings.HasPrefix(s, ".") && !strings.HasSuffix(s, ".")
}

// stamp brings a time into the form that records hold; the zero time stays.
func stamp(t time.Time) time.Time { return t.UTC().Truncate(time.Millisecond) }

// checkTime demands a time of the years 1970 to 9999 in UTC, with milliseconds at most.
func checkTime(field string, t time.Time) error {
	if t.Location() != time.UTC || t.Year() < 1970 || t.Year() > 9999 || !t.Truncate(time.Millisecond).Equal(t) {
		return fault.BadField(field, "not a time in UTC with at most milliseconds")
	}
	return nil
}

func checkExpiry(expires, from time.Time) error {
	if expires.IsZero() {
		return nil
	}
	if err := checkTime("expires_at", expires); err != nil {
		return err
	}
	if !expires.After(from) {
		return fault.BadField("expires_at", "the expiry lies in the past")
	}
	return nil
}

func checkMetadata(m map[string]string) error {
	if len(m) > maxMetadata {
		return fault.BadField("metadata", "there are at most %d entries of metadata", maxMetadata)
	}
	for k, v := range m {
		if k == "" {
			return fault.BadField("metadata", "a name of metadata is not empty")
		}
		if err := checkText("metadata", k, maxMetadataKey); err != nil {
			return err
		}
		if err := checkText("metadata", v, maxMetadataValue); err != nil {
			return err
		}
	}
	return nil
}

// checkText admits printable text: nothing that could move a terminal's cursor or hide in a log.
func checkText(field, s string, limit int) error {
	if len(s) > limit {
		return fault.BadField(field, "a text is longer than %d bytes", limit)
	}
	if !utf8.ValidString(s) {
		return fault.BadField(field, "a text is not valid UTF-8")
	}
	for _, c := range s {
		if c != ' ' && !unicode.IsPrint(c) {
			return fault.BadField(field, "a text holds a character that cannot be printed")
		}
	}
	return nil
}

func sortAliases(a []ident.Alias) []ident.Alias {
	return slices.SortedFunc(slices.Values(a), func(x, y ident.Alias) int { return cmp.Compare(x.String(), y.String()) })
}
