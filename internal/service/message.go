package service

import (
	"context"
	"errors"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/packet"
	"github.com/trustd/trustd/signer/batch"
	"github.com/trustd/trustd/signer/history"
)

// maxMessageTTL bounds how long a SignedMessage may be valid; one without a TTL does not expire.
const maxMessageTTL = 365 * 24 * time.Hour

// SignMessage signs arbitrary JSON with all that matters in its header.
func (s *Service) SignMessage(ctx context.Context, r api.SignMessageRequest) (api.SignMessageReply, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return api.SignMessageReply{}, err
	}
	e, a, err := s.actor(ctx, r.Agent, api.VerbSign)
	if err != nil {
		return api.SignMessageReply{}, err
	}
	if e.Role != roleAgent {
		return api.SignMessageReply{}, fault.New(fault.Denied, "only agents sign messages")
	}
	if err := s.usable(a); err != nil {
		return api.SignMessageReply{}, err
	}
	if r.TTL < 0 || time.Duration(r.TTL) > maxMessageTTL/time.Second {
		return api.SignMessageReply{}, fault.BadField("ttl_seconds", "a message is valid for at most %d seconds", maxMessageTTL/time.Second)
	}
	if r.Nonce == "" {
		r.Nonce = randomText(18)
	}
	size, root := s.cfg.Views.Load().Registry.Head()
	h := packet.MessageHeader{
		SignerID: a.ID, Fingerprint: e.Public.ID(), Algorithm: e.Public.Algorithm(), Timestamp: s.cfg.Clock.Now(), Seq: 1, Nonce: r.Nonce,
		Audience: r.Audience, Grade: e.Grade, KeyEpoch: a.Current().Epoch, ViewHead: digestText(root), ViewSize: size, Prev: r.Prev,
	}
	if r.TTL > 0 {
		h.ExpiresAt = h.Timestamp.Add(time.Duration(r.TTL) * time.Second)
	}
	// What is wrong with a message must not cost the key's history a number.
	if _, err := packet.NewMessage(h, r.Payload); err != nil {
		return api.SignMessageReply{}, err
	}
	key, err := s.open(ctx, e)
	if err != nil {
		return api.SignMessageReply{}, err
	}
	u, err := number(key.history, &h, r.Payload)
	if err != nil {
		return api.SignMessageReply{}, err
	}
	j := job{entry: e, agent: a}
	res := key.line.Sign(ctx, whose(c), []batch.Item{{Subject: u.Subject(), Batchable: batchable(r.Batchable, e), Number: h.Seq}})[0]
	if res.Err != nil {
		return api.SignMessageReply{}, s.signFailed(j, s.lost(ctx, e, res.Err))
	}
	m, err := u.Seal(res.Signature, e.Public)
	if err != nil {
		return api.SignMessageReply{}, err
	}
	text, err := m.JSON()
	if err != nil {
		return api.SignMessageReply{}, err
	}
	return api.SignMessageReply{Message: text, Digest: m.Digest(), Signed: j.signed(res)}, nil
}

// lapses bounds how often a message gets another number because others signed so much with the key meanwhile that
// its first one lapsed.
const lapses = 8

// number gives the message its number, which is part of what is signed, and puts it into the key's history, so that
// it may be signed alone or in a batch.
func number(key *history.Signer, h *packet.MessageHeader, payload []byte) (*packet.UnsignedMessage, error) {
	for range lapses {
		var err error
		if h.Seq, err = key.Reserve(); err != nil {
			return nil, err
		}
		u, err := packet.NewMessage(*h, payload)
		if err != nil {
			return nil, err
		}
		if err := key.Note(h.Seq, u.SigningBytes()); !errors.Is(err, history.ErrLapsed) {
			return u, err
		}
	}
	return nil, fault.New(fault.ResourceExhausted, "too many others sign with this key at the moment")
}
