package packet

import (
	"slices"
	"strconv"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/pyjson"
	"github.com/trustd/trustd/signature"
)

// IssueSkew is how far a given issued_at may lie from the issuer's clock, TrustHandoff's own tolerance.
const IssueSkew = 30 * time.Second

// A TTLPolicy bounds how long packets live: by their risk level, and Default for those that have none. Whole
// seconds count, and a bound below one second is no policy.
type TTLPolicy struct {
	Write, Read, Default time.Duration
}

// DefaultTTL returns TrustHandoff's lifetimes, and the longer one as the bound for packets without a risk level.
func DefaultTTL() TTLPolicy {
	return TTLPolicy{Write: 120 * time.Second, Read: 900 * time.Second, Default: 900 * time.Second}
}

// Cap returns the bound for a risk level, as Task.RiskLevel holds it. An unknown one is unsupported_risk_level.
func (p TTLPolicy) Cap(risk Optional[string]) (time.Duration, error) {
	switch {
	case !risk.Set:
		return p.Default.Truncate(time.Second), nil
	case risk.Value == RiskWrite:
		return p.Write.Truncate(time.Second), nil
	case risk.Value == RiskRead:
		return p.Read.Truncate(time.Second), nil
	}
	return 0, &fault.Error{Code: fault.UnsupportedRiskLevel, Field: "risk_level"}
}

// CheckTTL checks what TrustHandoff checks of a packet's own lifetime: a known risk level, and an expires_at that is
// issued_at and ttl_seconds, where there is a risk level or ttl_seconds. It returns unsupported_risk_level or
// ttl_policy_mismatch. How long a verifier lets a packet live is the verifier's own TTLPolicy.
func (t *Task) CheckTTL() error {
	if !t.RiskLevel.Set {
		return nil
	}
	if _, known := formatTTL(t.RiskLevel); !known {
		return &fault.Error{Code: fault.UnsupportedRiskLevel, Field: "risk_level"}
	}
	ttl := time.Duration(t.TTLSeconds.Value) * time.Second
	if !t.ExpiresAt.Instant.Equal(t.IssuedAt.Instant.Add(ttl)) {
		return ttlMismatch("expires_at", "expires_at is not issued_at and ttl_seconds")
	}
	return nil
}

// CheckAIProvenance returns invalid_ai_provenance for an ai_provenance that names no source.
func (t *Task) CheckAIProvenance() error {
	if t.AIProvenance.Present && t.AIProvenance.Source == "" {
		return &fault.Error{Code: fault.InvalidAIProvenance, Field: "ai_provenance.source"}
	}
	return nil
}

func ttlMismatch(field, text string) error {
	return &fault.Error{Code: fault.TTLPolicyMismatch, Field: field, Text: text}
}

// A Draft is a packet that a caller wants to have signed. Fields that Complete can fill in may be absent.
type Draft struct {
	task Task
	vals string
	at   [fieldCount]span
	set  uint32
}

// ParseDraft reads a packet that is to be signed, as strictly as Parse. task_id, to_agent, intent and permissions
// must be there, signature must not.
func ParseDraft(b []byte) (*Draft, error) {
	if len(b) > MaxTask {
		return nil, fault.New(fault.TooLarge, "a packet has at most %d bytes", MaxTask)
	}
	p := parsers.Get().(*parser)
	defer p.release()
	t, err := p.parse(b, draft)
	if err != nil {
		return nil, err
	}
	return &Draft{task: *t, vals: string(p.vals), at: p.at, set: p.set}, nil
}

// FromAgent returns the alias that the caller wants to sign as, "" where it leaves that open.
func (d *Draft) FromAgent() string { return d.task.FromAgent }

// ToAgent returns the alias of the receiver.
func (d *Draft) ToAgent() string { return d.task.ToAgent }

// Fill is what the signer's side knows. FromAgent, Nonce and PacketID are used where the draft has none; Nonce and
// PacketID must be fresh random values.
type Fill struct {
	FromAgent   string
	AllowedFrom func(alias string) bool // which from_agent the caller may use; nil: FromAgent alone
	PublicKey   ident.PublicKey
	Nonce       string
	PacketID    string
	Now         time.Time
	TTL         TTLPolicy
}

// An Unsigned is a complete packet without its signature. It was parsed again from its own signed bytes by the
// parser that its receiver uses, so that nothing is signed which would be refused for its form.
type Unsigned struct {
	*Task
	alg ident.Algorithm
}

// Complete fills in what the draft leaves open and checks what it does not: no key is used for a packet that
// disagrees. It returns
//
//   - denied for a from_agent that the caller may not use,
//   - public_key_mismatch or algorithm_mismatch for a key or an algorithm that is not that of f.PublicKey,
//   - unsupported_risk_level, invalid_ai_provenance,
//   - issued_in_future for an issued_at more than IssueSkew ahead, malformed for one as far behind,
//   - ttl_policy_mismatch for an expires_at or ttl_seconds over the policy or at odds with each other, also for a
//     packet without risk_level that would live longer than f.TTL.Default,
//   - malformed for allowed_actions that repeat one,
//   - too_large where the signed text would exceed MaxTask.
//
// As in TrustHandoff, ttl_seconds without risk_level means read, and ttl_seconds may be shorter than the policy.
func (d *Draft) Complete(f Fill) (*Unsigned, error) {
	if f.PublicKey.IsZero() {
		return nil, fault.New(fault.Internal, "no key to complete the packet with")
	}
	c := completion{draft: d, fill: f}
	for _, step := range []func() error{c.sender, c.content, c.issued, c.lifetime} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	text := c.assemble()
	t, err := parse(text, unsigned)
	if err != nil {
		return nil, err
	}
	if string(t.signing) != string(text) {
		return nil, fault.New(fault.Internal, "the completed packet is not in canonical form")
	}
	u := &Unsigned{Task: t, alg: f.PublicKey.Algorithm()}
	if len(u.Seal(signature.NewDirect(make([]byte, u.alg.SignatureSize())))) > MaxTask {
		return nil, fault.New(fault.TooLarge, "the signed packet would exceed %d bytes", MaxTask)
	}
	return u, nil
}

// Seal returns the complete packet with its signature, in canonical form.
func (u *Unsigned) Seal(sig signature.Signature) []byte {
	const head, tail = `,"signature":"`, `"`
	text, at := sig.Text(), u.at[fieldSignature].lo
	out := make([]byte, 0, len(u.signing)+len(head)+len(text)+len(tail))
	out = append(append(append(append(out, u.signing[:at]...), head...), text...), tail...)
	return append(out, u.signing[at:]...)
}

// A completion is one run of Complete.
type completion struct {
	draft    *Draft
	fill     Fill
	issuedAt Time
	fresh    [fieldCount][]byte // canonical values that replace or complete the draft's
}

func (c *completion) text(f field, v string) {
	c.fresh[f] = pyjson.AppendString(nil, v, pyjson.Sorted)
}

// sender fills in who signs.
func (c *completion) sender() error {
	t, f := &c.draft.task, c.fill
	switch {
	case t.FromAgent == "":
		c.text(fieldFromAgent, f.FromAgent)
	case f.AllowedFrom != nil && !f.AllowedFrom(t.FromAgent), f.AllowedFrom == nil && t.FromAgent != f.FromAgent:
		return &fault.Error{Code: fault.Denied, Field: "from_agent", Text: "the caller may not sign as this agent"}
	}
	switch pem := f.PublicKey.PEM(); t.PublicKeyPEM {
	case "":
		c.text(fieldPublicKey, pem)
	case pem:
	default:
		return &fault.Error{Code: fault.PublicKeyMismatch, Field: "public_key", Text: "not the key that would sign"}
	}
	switch alg := f.PublicKey.Algorithm().Wire(); t.SignatureAlgo {
	case "":
		c.text(fieldSignatureAlgo, alg)
	case alg:
	default:
		return &fault.Error{Code: fault.AlgorithmMismatch, Field: "signature_algo", Text: "not the key's algorithm"}
	}
	if t.Nonce == "" {
		c.text(fieldNonce, f.Nonce)
	}
	if t.PacketID == "" {
		c.text(fieldPacketID, f.PacketID)
	}
	return nil
}

// content checks what an issuer must not put into a packet although a reader takes it.
func (c *completion) content() error {
	t := &c.draft.task
	actions := slices.Clone(t.Permissions.AllowedActions)
	slices.Sort(actions)
	if len(slices.Compact(actions)) != len(t.Permissions.AllowedActions) {
		return fault.BadField("permissions.allowed_actions", "an action occurs twice")
	}
	return t.CheckAIProvenance()
}

// issued fills in issued_at.
func (c *completion) issued() error {
	now := c.fill.Now.UTC().Truncate(time.Microsecond)
	c.issuedAt = c.draft.task.IssuedAt
	if !c.issuedAt.Present {
		c.issuedAt = Time{Instant: now, Present: true}
		c.text(fieldIssuedAt, c.issuedAt.String())
		return nil
	}
	switch ahead := c.issuedAt.Instant.Sub(now); {
	case ahead > IssueSkew:
		return &fault.Error{Code: fault.IssuedInFuture, Field: "issued_at"}
	case ahead < -IssueSkew:
		return fault.BadField("issued_at", "more than %v in the past; leave it out", IssueSkew)
	}
	return nil
}

// lifetime fills in risk_level, ttl_seconds and expires_at.
func (c *completion) lifetime() error {
	t := &c.draft.task
	risk := t.RiskLevel
	if !risk.Set && t.TTLSeconds.Set {
		risk = Optional[string]{RiskRead, true}
		c.text(fieldRiskLevel, RiskRead)
	}
	limit, err := c.fill.TTL.Cap(risk)
	if err != nil {
		return err
	}
	if limit < time.Second {
		return fault.New(fault.Internal, "the policy sets no lifetime")
	}
	ttl := limit
	if t.TTLSeconds.Set {
		ttl = time.Duration(t.TTLSeconds.Value) * time.Second
		if ttl <= 0 || ttl > limit {
			return ttlMismatch("ttl_seconds", "ttl_seconds is not between 1 and the policy's bound")
		}
	}
	switch left := t.ExpiresAt.Instant.Sub(c.issuedAt.Instant); {
	case !t.ExpiresAt.Present:
		expires := Time{Instant: c.issuedAt.Instant.Add(ttl), Offset: c.issuedAt.Offset, Present: true}
		c.text(fieldExpiresAt, expires.String())
	case risk.Set && left != ttl:
		return ttlMismatch("expires_at", "expires_at is not issued_at and the lifetime by the policy; leave it out")
	case left <= 0 || left > limit:
		return ttlMismatch("expires_at", "a packet without risk_level lives no longer than the policy's bound")
	}
	if risk.Set && !t.TTLSeconds.Set {
		c.fresh[fieldTTLSeconds] = strconv.AppendInt(nil, int64(ttl/time.Second), 10)
	}
	return nil
}

// assemble builds the signed bytes of the draft with what was filled in.
func (c *completion) assemble() []byte {
	d := c.draft
	p := parser{vals: []byte(d.vals), at: d.at, seen: d.set}
	for f, v := range c.fresh {
		if v != nil {
			p.put(field(f), string(v))
		}
	}
	var t Task
	p.assemble(&t)
	return t.signing
}
