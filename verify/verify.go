// Package verify is the acceptance gate: ordered tables of (reason, check) over a View. It is pure: no clock, no
// I/O. What it accepts has used nothing up yet; spending the nonce is package spend's, and comes last.
//
// A newcomer would get the key wrong. A key inside a packet or message is a claim: it says which of the signer's
// registered keys to try, and nothing else. The first check that fails decides, and until the signature holds, no
// field is used for more than finding the key.
package verify

import (
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/packet"
	"github.com/trustd/trustd/registry"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/view"
)

// Input is all that a decision on a packet rests on.
type Input struct {
	Packet *packet.Task
	// MayReceive says for which local agents the one who asks may receive. Without it nobody is the audience.
	MayReceive func(ident.AgentID) bool
	View       *view.View
	Policy     Policy
	Roots      *signature.Roots // batches whose signature is known to be good; may be nil
	Now        time.Time
}

// Accepted says that a packet passed every check; only Check makes one. The packet's nonce is still to be spent.
type Accepted struct {
	agent    registry.Agent
	key      registry.KeyEpoch
	receiver ident.AgentID
	nonce    string
	until    time.Time
	legacy   bool
	mode     signature.Mode
}

// Agent returns the sender.
func (a Accepted) Agent() registry.Agent { return a.agent }

// Key returns the sender's key that signed.
func (a Accepted) Key() registry.KeyEpoch { return a.key }

// KeyID returns that key's fingerprint.
func (a Accepted) KeyID() ident.KeyID { return a.key.Public.ID() }

// Receiver returns the local agent that the packet is addressed to.
func (a Accepted) Receiver() ident.AgentID { return a.receiver }

// Nonce returns the packet's nonce, unique to its key.
func (a Accepted) Nonce() string { return a.nonce }

// Until returns until when the nonce must be kept: the packet's end, the grace and the skew.
func (a Accepted) Until() time.Time { return a.until }

// Legacy reports whether the packet has the form of TrustHandoff 0.3.3 or older.
func (a Accepted) Legacy() bool { return a.legacy }

// Mode returns how the packet was signed.
func (a Accepted) Mode() signature.Mode { return a.mode }

// Check runs the table over a packet that packet.Parse has taken for well-formed. The error's code is the reason.
func Check(in Input) (Accepted, *fault.Error) {
	return run(in, registryOf(in.View), checks)
}

// lookup is the part of registry.State that a decision needs.
type lookup interface {
	Agent(ident.AgentID) (registry.Agent, bool)
	ByAlias(string) (registry.Agent, bool)
	ByKey(ident.KeyID) (registry.Agent, registry.KeyEpoch, bool)
}

// registryOf returns nil where there is no registry to ask.
func registryOf(v *view.View) lookup {
	if v == nil || v.Registry == nil {
		return nil
	}
	return v.Registry
}

// A check returns nil, or the refusal, whose code is the row's reason.
type check struct {
	reason fault.Code
	check  func(*gate) *fault.Error
}

// checks run in this order and stop at the first failure. docs/reasons.md is made from this table.
var checks = []check{
	{fault.WrongAudience, (*gate).checkAudience},
	{fault.UnknownAgent, (*gate).checkAgent},
	{fault.AlgorithmMismatch, (*gate).checkAlgorithm},
	{fault.PublicKeyMismatch, (*gate).checkPublicKey},
	{fault.InvalidSignature, (*gate).checkSignature},
	{fault.LegacyRefused, (*gate).checkLegacy},
	{fault.AgentRevoked, (*gate).checkRevoked},
	{fault.AgentRemoved, (*gate).checkRemoved},
	{fault.AgentExpired, (*gate).checkAgentExpired},
	{fault.KeyRetired, (*gate).checkKeyRetired},
	{fault.MalformedTimeWindow, (*gate).checkWindow},
	{fault.IssuedInFuture, (*gate).checkFuture},
	{fault.UnsupportedRiskLevel, (*gate).checkRiskLevel},
	{fault.TTLPolicyMismatch, (*gate).checkTTL},
	{fault.TTLTooLong, (*gate).checkTTLCap},
	{fault.Expired, (*gate).checkExpired},
	{fault.InvalidAIProvenance, (*gate).checkProvenance},
	{fault.AssuranceTooLow, (*gate).checkAssurance},
}

// Reasons returns every reason for which a packet may be refused, in the order in which it is checked: by the
// parser, by the table, by package spend.
func Reasons() []fault.Code {
	out := []fault.Code{fault.TooLarge, fault.Malformed}
	for _, c := range checks {
		out = append(out, c.reason)
	}
	return append(out, fault.ReplayDetected, fault.ReplayStoreFull, fault.ReplayStoreFailed)
}

func run(in Input, reg lookup, table []check) (Accepted, *fault.Error) {
	if in.Packet == nil {
		return Accepted{}, fault.BadField("packet", "missing")
	}
	if reg == nil {
		return Accepted{}, fault.New(fault.NotInitialised, "")
	}
	g := gate{in: in, t: in.Packet, policy: in.Policy, reg: reg}
	g.findAgent()
	g.findKey()
	for _, c := range table {
		if err := c.check(&g); err != nil {
			return Accepted{}, err
		}
	}
	return Accepted{
		agent: g.agent, key: g.key, receiver: g.receiver, nonce: g.t.Nonce,
		until:  g.t.ExpiresAt.Instant.Add(g.policy.grace() + g.policy.skew()),
		legacy: g.form() == formLegacy, mode: g.sig.Mode(),
	}, nil
}

// A gate is one run of the table.
type gate struct {
	in     Input
	t      *packet.Task
	policy Policy
	reg    lookup

	agent    registry.Agent    // who from_agent names; zero where nobody does
	named    bool              // from_agent itself named them
	key      registry.KeyEpoch // the key to try; zero where there is none
	claimed  bool              // public_key is the text of that key
	receiver ident.AgentID
	signed   form
	sig      signature.Signature // what signed was found with
}

// A form says which bytes the signature covers.
type form uint8

const (
	formUnknown form = iota // not looked at yet
	formNone                // none that we know
	formCurrent             // TrustHandoff 0.3.4 to 0.4.0
	formLegacy              // 0.3.3 and older
)

// findAgent resolves from_agent. Where it names nobody, the owner of the key stands in, so that the rest of the
// table has somebody to judge; checkAgent refuses that.
func (g *gate) findAgent() {
	if g.agent, g.named = g.reg.ByAlias(g.t.FromAgent); g.named {
		return
	}
	if pub, err := ident.ParsePEM(g.t.PublicKeyPEM); err == nil {
		g.agent, _, _ = g.reg.ByKey(pub.ID())
	}
}

// findKey picks the agent's key whose text the packet holds; else the current one, which checkPublicKey refuses.
func (g *gate) findKey() {
	keys := g.agent.Keys
	for i := len(keys) - 1; i >= 0; i-- {
		if keys[i].Public.PEM() == g.t.PublicKeyPEM {
			g.key, g.claimed = keys[i], true
			return
		}
	}
	if len(keys) > 0 {
		g.key = keys[len(keys)-1]
	}
}

// checkAudience: to_agent is an alias of an agent that the one who asks may receive for.
func (g *gate) checkAudience() *fault.Error {
	receiver, known := g.reg.ByAlias(g.t.ToAgent)
	if !known || g.in.MayReceive == nil || !g.in.MayReceive(receiver.ID) {
		return refuse(fault.WrongAudience, "to_agent")
	}
	g.receiver = receiver.ID
	return nil
}

// checkAgent: from_agent is an alias, of any of its keys, of an agent that is trusted at all.
func (g *gate) checkAgent() *fault.Error {
	if !g.named {
		return refuse(fault.UnknownAgent, "from_agent")
	}
	return trusted(&g.agent, "from_agent")
}

// trusted refuses who may not sign messages: operators and nodes, whose keys have other roles, and level NONE.
func trusted(a *registry.Agent, field string) *fault.Error {
	err := refuse(fault.UnknownAgent, field)
	switch {
	case a.Role != registry.RoleAgent:
		err.Text = "the signer is registered, but not as an agent"
	case a.Level == registry.LevelNone:
		err.Text = "the signer has the trust level NONE"
	default:
		return nil
	}
	return err
}

// checkAlgorithm: signature_algo names the registered key's algorithm. It selects nothing: the key does.
func (g *gate) checkAlgorithm() *fault.Error {
	if g.t.SignatureAlgo != g.key.Public.Algorithm().Wire() {
		return refuse(fault.AlgorithmMismatch, "signature_algo")
	}
	return nil
}

// checkPublicKey: public_key is, to the byte, the PEM text of one of the agent's registered keys.
func (g *gate) checkPublicKey() *fault.Error {
	if !g.claimed {
		return refuse(fault.PublicKeyMismatch, "public_key")
	}
	return nil
}

// checkSignature: the registered key signed the packet in one of the forms there are.
func (g *gate) checkSignature() *fault.Error {
	if g.form() == formNone {
		return refuse(fault.InvalidSignature, "signature")
	}
	return nil
}

func (g *gate) checkLegacy() *fault.Error {
	if g.form() == formLegacy && !g.policy.LegacyTH033 {
		return refuse(fault.LegacyRefused, "signature")
	}
	return nil
}

// form verifies the signature, once.
func (g *gate) form() form {
	if g.signed == formUnknown {
		g.signed = g.findForm()
	}
	return g.signed
}

func (g *gate) findForm() form {
	pub := g.key.Public
	if pub.IsZero() {
		return formNone
	}
	sig, err := signature.Parse(pub.Algorithm(), g.t.SignatureText)
	if err != nil {
		return formNone
	}
	g.sig = sig
	subject := signature.Subject{Kind: signature.KindPacket, Agent: g.agent.ID, Message: g.t.SigningBytes()}
	if sig.Verify(pub, subject, g.in.Roots) == nil {
		return formCurrent
	}
	if pub.Algorithm() != ident.Ed25519 || sig.Mode() != signature.Direct { // the old versions had no other
		return formNone
	}
	for _, msg := range g.t.LegacySigningBytes() {
		if signature.Verify(pub, msg, sig.Raw()) == nil {
			return formLegacy
		}
	}
	return formNone
}

func (g *gate) checkRevoked() *fault.Error {
	if g.agent.Revocation != nil {
		return refuse(fault.AgentRevoked, "from_agent")
	}
	return nil
}

func (g *gate) checkRemoved() *fault.Error {
	if g.agent.Removed != nil {
		return refuse(fault.AgentRemoved, "from_agent")
	}
	return nil
}

// checkAgentExpired: a registration ends at its expires_at, on the dot and without grace.
func (g *gate) checkAgentExpired() *fault.Error {
	if ended(g.agent.ExpiresAt, g.in.Now) {
		return refuse(fault.AgentExpired, "from_agent")
	}
	return nil
}

// checkKeyRetired: the key was the agent's when the packet was issued. A packet that was issued before its key was
// superseded stays good for the rest of its life.
func (g *gate) checkKeyRetired() *fault.Error {
	if ended(g.key.Until, g.t.IssuedAt.Instant) {
		return refuse(fault.KeyRetired, "public_key")
	}
	return nil
}

// ended reports whether something that ends before end has ended at t; the zero end never comes.
func ended(end, t time.Time) bool { return !end.IsZero() && !t.Before(end) }

func (g *gate) checkWindow() *fault.Error {
	t := g.t
	if !t.IssuedAt.Present || !t.ExpiresAt.Present || t.IssuedAt.Instant.After(t.ExpiresAt.Instant) {
		return refuse(fault.MalformedTimeWindow, "expires_at")
	}
	return nil
}

func (g *gate) checkFuture() *fault.Error {
	if g.t.IssuedAt.Instant.After(g.in.Now.Add(g.policy.skew())) {
		return refuse(fault.IssuedInFuture, "issued_at")
	}
	return nil
}

func (g *gate) checkRiskLevel() *fault.Error {
	if err := fault.From(g.t.CheckTTL()); err != nil && err.Code == fault.UnsupportedRiskLevel {
		return err
	}
	return nil
}

// checkTTL: the packet's end agrees with its own ttl_seconds and risk_level.
func (g *gate) checkTTL() *fault.Error {
	if err := fault.From(g.t.CheckTTL()); err != nil && err.Code != fault.UnsupportedRiskLevel {
		return err
	}
	return nil
}

// checkTTLCap: the packet lives no longer than the verifier lets packets of its risk level live. An unknown level,
// which checkRiskLevel refuses, has the bound of none.
func (g *gate) checkTTLCap() *fault.Error {
	limit, err := g.policy.TTL.Cap(g.t.RiskLevel)
	if err != nil {
		limit, _ = g.policy.TTL.Cap(packet.Optional[string]{})
	}
	if g.t.ExpiresAt.Instant.Sub(g.t.IssuedAt.Instant) > limit {
		return refuse(fault.TTLTooLong, "expires_at")
	}
	return nil
}

func (g *gate) checkExpired() *fault.Error {
	if g.in.Now.After(g.t.ExpiresAt.Instant.Add(g.policy.grace())) {
		return refuse(fault.Expired, "expires_at")
	}
	return nil
}

// checkProvenance: a packet that says that a model wrote it says which source it comes from.
func (g *gate) checkProvenance() *fault.Error { return fault.From(g.t.CheckAIProvenance()) }

// checkAssurance: the registered key has the grade that the verifier demands, and signed in a mode that it takes.
func (g *gate) checkAssurance() *fault.Error {
	g.form()
	return g.policy.assurance(g.key.Grade, g.sig.Mode(), "public_key")
}

func refuse(code fault.Code, field string) *fault.Error {
	return &fault.Error{Code: code, Field: field}
}
