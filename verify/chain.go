package verify

import (
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/packet"
	"github.com/trustd/trustd/view"
)

// MaxChain bounds the messages of a chain: each costs a public-key operation.
const MaxChain = 64

// ChainInput is all that a decision on a chain rests on.
type ChainInput struct {
	Messages []*packet.Message      // oldest first
	Answers  func(name string) bool // as in MessageInput, for the last message
	View     *view.View
	Policy   Policy
	Now      time.Time
}

// CheckChain decides whether messages, oldest first, form a chain that may be acted on now:
//
//   - There are 1 to MaxChain of them. The first names no message before it: a chain with its head cut off is none.
//   - Each other names the digest of the one before it in prev or, where it has no prev, holds it whole as a member
//     of its payload. So there is no gap, and no second branch.
//   - Times do not run backwards by more than the skew, each message had not expired when the next one was signed,
//     and messages of one key stand in the order of their sequence numbers.
//   - Each was validly signed at its own time, by the registry; the last one passes all of CheckMessage now. To whom
//     the earlier ones were addressed does not matter.
//
// It returns the verdicts up to the first message refused, that message's index, and why.
func CheckChain(in ChainInput) (verdicts []Verdict, at int, refusal *fault.Error) {
	return checkChain(in, registryOf(in.View))
}

func checkChain(in ChainInput, reg lookup) (verdicts []Verdict, at int, refusal *fault.Error) {
	if reg == nil {
		return nil, 0, fault.New(fault.NotInitialised, "")
	}
	if len(in.Messages) == 0 || len(in.Messages) > MaxChain {
		return nil, 0, broken("messages", "a chain has 1 to 64 messages")
	}
	for i, m := range in.Messages {
		if m == nil {
			return verdicts, i, fault.BadField("messages", "a message is missing")
		}
		last := i == len(in.Messages)-1
		v, err := in.checkOne(m, reg, last)
		verdicts = append(verdicts, v)
		if err == nil {
			err = in.checkLink(i)
		}
		if err != nil {
			return verdicts, i, err
		}
	}
	return verdicts, 0, nil
}

func (in *ChainInput) checkOne(m *packet.Message, reg lookup, last bool) (Verdict, *fault.Error) {
	one := MessageInput{Message: m, Answers: in.Answers, View: in.View, Policy: in.Policy, Now: in.Now}
	g := newMessageGate(one, reg)
	if !last {
		g.at, g.past = g.header.Timestamp, true
	}
	return g.run(messageChecks, !last)
}

// checkLink checks that message i follows the one before it.
func (in *ChainInput) checkLink(i int) *fault.Error {
	m := in.Messages[i]
	h := m.Header()
	if i == 0 {
		if h.Prev != "" {
			return broken("prev", "the first message names one before it")
		}
		return nil
	}
	before := in.Messages[i-1]
	b := before.Header()
	switch {
	case h.Prev != "" && h.Prev != before.Digest():
		return broken("prev", "not the digest of the message before")
	case h.Prev == "" && !m.Holds(before):
		return broken("prev", "neither names the message before nor holds it")
	case h.Timestamp.Before(b.Timestamp.Add(-in.Policy.skew())):
		return broken("timestamp", "earlier than that of the message before")
	case !b.ExpiresAt.IsZero() && h.Timestamp.After(b.ExpiresAt.Add(in.Policy.grace()+in.Policy.skew())):
		return broken("timestamp", "the message before had expired")
	case h.Fingerprint == b.Fingerprint && h.Seq <= b.Seq:
		return broken("seq", "not after that of the message before")
	}
	return nil
}

func broken(field, text string) *fault.Error {
	return &fault.Error{Code: fault.BrokenChain, Field: field, Text: text}
}
