package verify

import (
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/packet"
	"github.com/trustd/trustd/registry"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/view"
)

// A Mode says who vouches for the key of a SignedMessage.
type Mode uint8

const (
	ModeRegistry Mode = iota // the registry
	ModeKey                  // the one who asks, by fingerprint; what the registry knows against the key still counts
	ModeEmbedded             // nobody: the message is never accepted
)

// MessageInput is all that a decision on a SignedMessage rests on.
type MessageInput struct {
	Message *packet.Message
	Mode    Mode
	Key     ident.KeyID // the expected key, in ModeKey
	// Answers says to which names of aud the one who asks answers. Without it a message with an audience is refused.
	Answers func(name string) bool
	View    *view.View // may be nil in the modes key and embedded
	Policy  Policy
	Roots   *signature.Roots // batches whose signature is known to be good; may be nil
	Now     time.Time
}

// A Verdict says what was found about a message, also where it was refused: what could be told safely is filled in.
type Verdict struct {
	SignatureValid bool // by the key of the mode
	SignerChecked  bool // the registry or the one who asks named that key
	SignerTrusted  bool // and nothing is known against it

	known bool
	agent registry.Agent
	key   registry.KeyEpoch
	until time.Time
}

// Agent returns the signer as the registry knows it, if it does.
func (v Verdict) Agent() (registry.Agent, bool) { return v.agent, v.known }

// Key returns the key that the signature was checked with. Its epoch is 0 where the registry does not know it.
func (v Verdict) Key() registry.KeyEpoch { return v.key }

// Until returns until when an accepted message's nonce must be kept; false where the message never ends, so that
// its nonce cannot be spent.
func (v Verdict) Until() (time.Time, bool) { return v.until, !v.until.IsZero() }

// CheckMessage runs the table for messages. A nil error means: accept. In ModeEmbedded there is always an error; a
// valid signature by somebody is unknown_agent there, with SignatureValid set.
func CheckMessage(in MessageInput) (Verdict, *fault.Error) {
	return checkMessage(in, registryOf(in.View), messageChecks)
}

func checkMessage(in MessageInput, reg lookup, table []messageCheck) (Verdict, *fault.Error) {
	if in.Message == nil {
		return Verdict{}, fault.BadField("message", "missing")
	}
	if in.Mode == ModeRegistry && reg == nil {
		return Verdict{}, fault.New(fault.NotInitialised, "")
	}
	g := newMessageGate(in, reg)
	return g.run(table, false)
}

// A messageCheck is a row of the table for messages.
type messageCheck struct {
	reason fault.Code
	check  func(*messageGate) *fault.Error
	// final rows are about acting on the message now; of a chain they judge the last message alone.
	final bool
}

// messageChecks run in this order and stop at the first failure.
var messageChecks = []messageCheck{
	{reason: fault.WrongAudience, check: (*messageGate).checkAudience, final: true},
	{reason: fault.UnknownAgent, check: (*messageGate).checkAgent},
	{reason: fault.PublicKeyMismatch, check: (*messageGate).checkKey},
	{reason: fault.InvalidSignature, check: (*messageGate).checkSignature},
	{reason: fault.AgentRevoked, check: (*messageGate).checkRevoked},
	{reason: fault.AgentRemoved, check: (*messageGate).checkRemoved},
	{reason: fault.AgentExpired, check: (*messageGate).checkAgentExpired},
	{reason: fault.KeyRetired, check: (*messageGate).checkKeyRetired},
	{reason: fault.MalformedTimeWindow, check: (*messageGate).checkWindow},
	{reason: fault.IssuedInFuture, check: (*messageGate).checkFuture},
	{reason: fault.Expired, check: (*messageGate).checkExpired, final: true},
	{reason: fault.AssuranceTooLow, check: (*messageGate).checkAssurance},
}

// MessageReasons returns every reason for which a SignedMessage may be refused, in the order in which it is checked.
func MessageReasons() []fault.Code {
	out := []fault.Code{fault.TooLarge, fault.Malformed}
	for _, c := range messageChecks {
		out = append(out, c.reason)
	}
	return append(out, fault.BrokenChain, fault.ReplayDetected, fault.ReplayStoreFull, fault.ReplayStoreFailed)
}

// A messageGate is one run of that table.
type messageGate struct {
	in     MessageInput
	header packet.MessageHeader
	at     time.Time // the moment for which the signer's status is judged
	past   bool      // that moment is the message's own time, not now

	agent    registry.Agent    // who signer_id names, or else whose key it is; zero where nobody
	named    bool              // signer_id itself named them
	key      registry.KeyEpoch // the key to try
	claimed  bool              // the mode names that key
	sigKnown bool
	sigValid bool
}

func newMessageGate(in MessageInput, reg lookup) *messageGate {
	g := &messageGate{in: in, header: in.Message.Header(), at: in.Now}
	var owner registry.Agent
	known := false
	if reg != nil {
		owner, g.key, known = reg.ByKey(g.header.Fingerprint)
	}
	// A key that the registry does not know is of another authority, for the modes that take such: so is the name.
	if reg != nil && (known || in.Mode == ModeRegistry) {
		g.agent, g.named = reg.Agent(g.header.SignerID)
	}
	if known && !g.named {
		g.agent = owner
	}
	if !known && in.Mode != ModeRegistry {
		g.key = registry.KeyEpoch{Public: in.Message.PublicKey()}
	}
	ours := known && owner.ID == g.agent.ID
	switch in.Mode {
	case ModeRegistry:
		g.claimed = ours
	case ModeKey:
		g.claimed = in.Key == g.header.Fingerprint && (ours || !known)
	}
	return g
}

// run walks the table. notFinal leaves out the rows that judge acting on the message now.
func (g *messageGate) run(table []messageCheck, notFinal bool) (Verdict, *fault.Error) {
	var refusal *fault.Error
	for _, c := range table {
		if c.final && notFinal {
			continue
		}
		if refusal = c.check(g); refusal != nil {
			break
		}
	}
	if refusal == nil && g.in.Mode == ModeEmbedded {
		refusal = &fault.Error{Code: fault.UnknownAgent, Field: "signer_id",
			Text: "the signature is valid, but nobody has said whose key it is"}
	}
	v := Verdict{
		SignatureValid: g.valid(), SignerChecked: g.claimed,
		known: len(g.agent.Keys) > 0, agent: g.agent, key: g.key, until: g.until(),
	}
	v.SignerTrusted = v.SignerChecked && g.standing() == nil
	return v, refusal
}

// until returns when the message can no longer be accepted; zero where it always can.
func (g *messageGate) until() time.Time {
	end := g.end()
	if end.IsZero() {
		return end
	}
	return end.Add(g.in.Policy.grace() + g.in.Policy.skew())
}

// end returns the last moment of the message: its own, or that of the verifier's policy where that is earlier.
func (g *messageGate) end() time.Time {
	end := g.header.ExpiresAt
	if age := g.in.Policy.MessageAge; age > 0 {
		if byAge := g.header.Timestamp.Add(age); end.IsZero() || byAge.Before(end) {
			end = byAge
		}
	}
	return end
}

// standing returns what is known against the signer itself.
func (g *messageGate) standing() *fault.Error {
	for _, check := range []func(*messageGate) *fault.Error{
		(*messageGate).checkAgent, (*messageGate).checkRevoked, (*messageGate).checkRemoved,
		(*messageGate).checkAgentExpired, (*messageGate).checkKeyRetired,
	} {
		if err := check(g); err != nil {
			return err
		}
	}
	return nil
}

// checkAudience: a message with an audience is for one of the names in it.
func (g *messageGate) checkAudience() *fault.Error {
	if len(g.header.Audience) == 0 {
		return nil
	}
	for _, name := range g.header.Audience {
		if g.in.Answers != nil && g.in.Answers(name) {
			return nil
		}
	}
	return refuse(fault.WrongAudience, "aud")
}

// checkAgent: signer_id names an agent that is trusted at all. Without the registry's word, in the modes key and
// embedded, a stranger's name is what the message says and no more.
func (g *messageGate) checkAgent() *fault.Error {
	if g.named {
		return trusted(&g.agent, "signer_id")
	}
	if g.in.Mode == ModeRegistry || len(g.agent.Keys) > 0 {
		return refuse(fault.UnknownAgent, "signer_id")
	}
	return nil
}

// checkKey: the key is the one that the mode names, in the epoch that the message names.
func (g *messageGate) checkKey() *fault.Error {
	switch {
	case g.in.Mode == ModeEmbedded:
		return nil
	case !g.claimed:
		return refuse(fault.PublicKeyMismatch, "fingerprint")
	case g.key.Epoch != 0 && g.key.Epoch != g.header.KeyEpoch:
		return refuse(fault.PublicKeyMismatch, "key_epoch")
	}
	return nil
}

func (g *messageGate) checkSignature() *fault.Error {
	if !g.valid() {
		return refuse(fault.InvalidSignature, "signature")
	}
	return nil
}

// valid verifies the signature, once.
func (g *messageGate) valid() bool {
	if !g.sigKnown {
		g.sigKnown = true
		g.sigValid = !g.key.Public.IsZero() && g.in.Message.VerifySignature(g.key.Public, g.in.Roots) == nil
	}
	return g.sigValid
}

// checkRevoked: no revocation counts against the message. Of a chain, a message that was signed before its signer
// was superseded or decommissioned stands; one by a key that was compromised, or by an agent that lost its
// privileges, does not, because such a signer dates its messages as it likes.
func (g *messageGate) checkRevoked() *fault.Error {
	r := g.agent.Revocation
	if r == nil {
		return nil
	}
	orderly := r.Code == registry.Superseded || r.Code == registry.Decommissioned
	if g.past && orderly && g.at.Before(r.At) {
		return nil
	}
	return refuse(fault.AgentRevoked, "signer_id")
}

func (g *messageGate) checkRemoved() *fault.Error {
	r := g.agent.Removed
	if r == nil || g.past && g.at.Before(r.At) {
		return nil
	}
	return refuse(fault.AgentRemoved, "signer_id")
}

func (g *messageGate) checkAgentExpired() *fault.Error {
	if ended(g.agent.ExpiresAt, g.at) {
		return refuse(fault.AgentExpired, "signer_id")
	}
	return nil
}

func (g *messageGate) checkKeyRetired() *fault.Error {
	if ended(g.key.Until, g.header.Timestamp) {
		return refuse(fault.KeyRetired, "fingerprint")
	}
	return nil
}

func (g *messageGate) checkWindow() *fault.Error {
	if end := g.header.ExpiresAt; !end.IsZero() && g.header.Timestamp.After(end) {
		return refuse(fault.MalformedTimeWindow, "expires_at")
	}
	return nil
}

func (g *messageGate) checkFuture() *fault.Error {
	if g.header.Timestamp.After(g.in.Now.Add(g.in.Policy.skew())) {
		return refuse(fault.IssuedInFuture, "timestamp")
	}
	return nil
}

func (g *messageGate) checkExpired() *fault.Error {
	if end := g.end(); !end.IsZero() && g.in.Now.After(end.Add(g.in.Policy.grace())) {
		return refuse(fault.Expired, "expires_at")
	}
	return nil
}

// checkAssurance: key and mode of the signature give what the verifier demands. Of the two grades, the registry's and
// the one that the signer put into the message, the lower counts; for a key that the registry does not know there is
// only the signer's word, which is none.
func (g *messageGate) checkAssurance() *fault.Error {
	grade := g.key.Grade
	if !signer.Grade(g.header.Grade).AtLeast(signer.Grade(grade)) {
		grade = g.header.Grade
	}
	return g.in.Policy.assurance(grade, g.in.Message.Signature().Mode(), "grade")
}
