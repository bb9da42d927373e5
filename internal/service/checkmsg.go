package service

import (
	"cmp"
	"context"
	"strings"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/caller"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/packet"
	"github.com/trustd/trustd/registry"
	"github.com/trustd/trustd/spend"
	"github.com/trustd/trustd/verify"
)

// VerifyMessage checks a SignedMessage in one of three modes.
func (s *Service) VerifyMessage(ctx context.Context, r api.VerifyMessageRequest) (api.MessageVerdict, error) {
	in, err := s.messageInput(ctx, r)
	if err != nil {
		return api.MessageVerdict{}, err
	}
	var receiver ident.AgentID
	if r.Once {
		if receiver, err = s.spender(ctx, in.Mode, r.Audience); err != nil {
			return api.MessageVerdict{}, err
		}
	}
	m, err := packet.ParseMessage(r.Message)
	if err != nil {
		return unread(err), nil
	}
	in.Message = m
	v, refusal := verify.CheckMessage(in)
	if refusal == nil && r.Once {
		if refusal, err = s.spendMessage(ctx, m, v, receiver); err != nil {
			return api.MessageVerdict{}, err
		}
	}
	return s.messageVerdict(m, v, refusal, r.Detail), nil
}

// messageInput turns a request into what the gate needs, but for the message itself.
func (s *Service) messageInput(ctx context.Context, r api.VerifyMessageRequest) (verify.MessageInput, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return verify.MessageInput{}, err
	}
	view := s.cfg.Views.Load()
	policy, err := s.tightened(r.Demands)
	if err != nil {
		return verify.MessageInput{}, err
	}
	in := verify.MessageInput{View: view, Policy: policy, Roots: s.roots, Now: s.cfg.Clock.Now()}
	switch cmp.Or(r.Mode, api.ModeRegistry) {
	case api.ModeRegistry:
	case api.ModeKey:
		in.Mode = verify.ModeKey
		if in.Key, err = parseKey(r.Key); err != nil {
			return verify.MessageInput{}, err
		}
	case api.ModeEmbedded:
		in.Mode = verify.ModeEmbedded
	default:
		return verify.MessageInput{}, fault.BadField("mode", "a mode is registry, key or embedded")
	}
	if r.Key != "" && in.Mode != verify.ModeKey {
		return verify.MessageInput{}, fault.BadField("key", "a key goes with the mode key alone")
	}
	in.Answers, err = s.answers(c, view.Registry, r.Audience)
	return in, err
}

// parseKey reads a fingerprint, or the fingerprint of a PEM or base64 public key.
func parseKey(text string) (ident.KeyID, error) {
	switch {
	case text == "":
		return ident.KeyID{}, fault.BadField("key", "the mode key needs a fingerprint, a PEM or a base64 public key")
	case strings.HasPrefix(text, "sha256:"):
		return ident.ParseKeyID(text)
	case strings.HasPrefix(text, "-----BEGIN"):
		p, err := ident.ParsePEM(strings.TrimRight(text, "\n") + "\n")
		return p.ID(), err
	}
	p, err := ident.ParsePublicKey(text)
	return p.ID(), err
}

// answers returns the test for the names that the caller answers to: the ids and aliases of the agents that it may
// verify for, or of the one that it names.
func (s *Service) answers(c *caller.Caller, st *registry.State, audience string) (func(string) bool, error) {
	receives, err := s.audience(c, st, audience)
	if err != nil {
		return nil, err
	}
	return func(name string) bool {
		a, err := resolve(st, name)
		return err == nil && receives(a.ID)
	}, nil
}

// maxOnce bounds how long the nonce of a message is kept: what can be spent must not fill the store for long.
const maxOnce = time.Hour

// spender returns the local agent in whose name a nonce is spent: the one that the caller names, or the only one that
// it may verify for. Nobody can spend another's, and only messages whose signer the registry vouches for are spent.
func (s *Service) spender(ctx context.Context, mode verify.Mode, audience string) (ident.AgentID, error) {
	if mode != verify.ModeRegistry {
		return ident.AgentID{}, fault.BadField("once", "a nonce is spent in the mode registry alone")
	}
	_, a, err := s.actor(ctx, audience, api.VerbVerify)
	if err != nil {
		return ident.AgentID{}, err
	}
	return a.ID, nil
}

// spendMessage spends the nonce of a message that is to count once for its receiver.
func (s *Service) spendMessage(ctx context.Context, m *packet.Message, v verify.Verdict, receiver ident.AgentID) (*fault.Error, error) {
	until, ends := v.Until()
	keep := until.Sub(s.cfg.Clock.Now())
	if !ends || keep > maxOnce {
		return nil, fault.BadField("once", "a message that is to count once must have been signed with a ttl of at most %d seconds", maxOnce/time.Second)
	}
	errs := s.cfg.Spend.Commit(ctx, []spend.Nonce{{
		Key: m.Header().Fingerprint, Nonce: "message\x00" + receiver.String() + "\x00" + m.Header().Nonce, Keep: keep,
	}})
	if errs[0] == nil {
		return nil, nil
	}
	e := fault.From(errs[0])
	if e.Code.Refusal() {
		return e, nil
	}
	return nil, e
}

// unread is the verdict on what is no message.
func unread(err error) api.MessageVerdict {
	e := fault.From(err)
	return api.MessageVerdict{Decision: api.Reject, TrustLevel: registry.LevelNone.String(), Reason: e.Code, Field: e.Field, Text: e.Text}
}

func (s *Service) messageVerdict(m *packet.Message, v verify.Verdict, refusal *fault.Error, detail bool) api.MessageVerdict {
	out := api.MessageVerdict{
		SignatureValid: v.SignatureValid, SignerChecked: v.SignerChecked, SignerTrusted: v.SignerTrusted,
		TrustLevel: registry.LevelNone.String(), Decision: api.Accept,
	}
	if a, known := v.Agent(); known && v.SignerTrusted {
		out.TrustLevel = a.Level.String()
	}
	if refusal != nil {
		out.Decision, out.Reason, out.Field, out.Text = api.Reject, refusal.Code, refusal.Field, refusal.Text
	}
	if !detail {
		return out
	}
	h := m.Header()
	size, root := s.cfg.Views.Load().Registry.Head()
	out.Details = &api.Details{
		Valid: v.SignatureValid, SignerID: h.SignerID.String(), Fingerprint: h.Fingerprint.String(),
		SignedAt: h.Timestamp.Format(packet.MessageTime), Algorithm: h.Algorithm.String(), PayloadHash: m.PayloadHash(),
		ReasonCode: out.Reason, KeyEpoch: v.Key().Epoch, TrustLevel: out.TrustLevel, Grade: h.Grade,
		ViewHead: digestText(root), ViewSize: size, Mode: string(m.Signature().Mode()),
	}
	return out
}

// VerifyChain checks that messages, oldest first, form a chain.
func (s *Service) VerifyChain(ctx context.Context, r api.VerifyChainRequest) (api.ChainVerdict, error) {
	in, err := s.messageInput(ctx, api.VerifyMessageRequest{})
	if err != nil {
		return api.ChainVerdict{}, err
	}
	if len(r.Messages) > verify.MaxChain { // before any is parsed
		return api.ChainVerdict{}, fault.BadField("messages", "a chain has at most %d messages", verify.MaxChain)
	}
	messages := make([]*packet.Message, 0, len(r.Messages))
	for i, raw := range r.Messages {
		m, err := packet.ParseMessage(raw)
		if err != nil {
			e := fault.From(err)
			return api.ChainVerdict{Reason: e.Code, At: i, Text: e.Text, Messages: []api.MessageVerdict{}}, nil
		}
		messages = append(messages, m)
	}
	verdicts, at, refusal := verify.CheckChain(verify.ChainInput{
		Messages: messages, Answers: in.Answers, View: in.View, Policy: in.Policy, Now: in.Now,
	})
	out := api.ChainVerdict{Valid: refusal == nil, Messages: make([]api.MessageVerdict, len(verdicts))}
	for i, v := range verdicts {
		var why *fault.Error
		if refusal != nil && i == at {
			why = refusal
		}
		out.Messages[i] = s.messageVerdict(messages[i], v, why, true)
	}
	if refusal != nil {
		out.Reason, out.At, out.Text = refusal.Code, at, refusal.Text
	}
	return out, nil
}
