package service

import (
	"context"
	"crypto/rand"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/keyring"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer/monitor"
)

const reasonGone = "the device does not hold it any more, or holds another in its place"

// lost is told why a key did not open or sign. A key that is gone from a device that still signs with its canary key is
// orphaned: its entry stays, and nobody asks the device for it until an operator has. Where the canary key is gone too, it
// is the device that was emptied or replaced, and all keys come back with it: device_lost. It returns what the caller
// is to be told.
func (s *Service) lost(ctx context.Context, e *keyring.Entry, err error) error {
	if !monitor.Gone(err) {
		return err
	}
	b, berr := s.backend(e.Backend)
	if berr != nil {
		return err
	}
	emptied := fault.Wrap(fault.DeviceLost, err, "the device does not hold its keys: it was emptied or replaced")
	if b.monitor.CanaryGone() {
		return emptied
	}
	if now, held := s.cfg.Keyring.Get(e.AgentID); !held || now.KeyID != e.KeyID || now.Orphaned != nil {
		return err
	}
	// The device may have come back since, or go while it is asked: only what is gone between two signatures of the canary
	// is lost.
	if b.monitor.Prove(ctx) != nil || !monitor.Gone(s.try(ctx, b, e)) || b.monitor.Prove(ctx) != nil {
		s.forget(e.AgentID) // the next use asks again
		return emptied
	}
	marked := false
	_, uerr := s.cfg.Keyring.Update(e.AgentID, func(now *keyring.Entry) bool {
		marked = now.KeyID == e.KeyID && now.Orphaned == nil && !now.Leaving
		if marked {
			now.Orphaned = &keyring.Orphan{Reason: reasonGone, At: s.cfg.Clock.Now()}
		}
		return marked
	})
	s.forget(e.AgentID)
	switch {
	case uerr != nil:
		s.cfg.Log.Error("a lost key could not be marked", "agent", e.AgentID, "error", uerr)
	case marked:
		s.cfg.Log.Error("a key is orphaned", "agent", e.AgentID, "backend", e.Backend, "key_uri", e.URI, "problem", reasonGone,
			"remedy", fault.KeyOrphaned.Hint())
	}
	return fault.Wrap(fault.KeyOrphaned, err, "")
}

// try has the device find a key and sign a test with it.
func (s *Service) try(ctx context.Context, b *Backend, e *keyring.Entry) error {
	key, err := b.Open(ctx, e.ID(), e.Public)
	if err != nil {
		b.monitor.Report(err)
		return err
	}
	var salt [16]byte
	_, _ = rand.Read(salt[:]) // never fails (crypto/rand)
	_, err = s.line(b, key).signRecord(ctx, signature.Encode(signature.Canary, []byte(e.AgentID.String()), salt[:]))
	return err
}

// RecheckKey has the key of an agent sign a test. If it does, the key is not orphaned any more.
func (s *Service) RecheckKey(ctx context.Context, name string) (api.AgentDetail, error) {
	a, err := resolve(s.cfg.Views.Load().Registry, name)
	if err != nil {
		return api.AgentDetail{}, err
	}
	e, held := s.cfg.Keyring.Get(a.ID)
	if !held {
		return api.AgentDetail{}, fault.New(fault.NoPrivateKey, "")
	}
	if err := agree(e, a); err != nil {
		return api.AgentDetail{}, err
	}
	b, err := s.backend(e.Backend)
	if err != nil {
		return api.AgentDetail{}, fault.Wrap(fault.Unavailable, err, "the backend of this agent's key is not in the configuration")
	}
	s.forget(a.ID) // so that its next use finds it anew
	if err := s.try(ctx, b, e); err != nil {
		s.lost(ctx, e, err)
		return api.AgentDetail{}, err
	}
	_, err = s.cfg.Keyring.Update(a.ID, func(now *keyring.Entry) bool {
		if now.KeyID != e.KeyID || now.Orphaned == nil {
			return false
		}
		now.Orphaned = nil
		s.cfg.Log.Info("an operator had a key checked: it is used again", "agent", a.ID, "backend", now.Backend)
		return true
	})
	if err != nil {
		return api.AgentDetail{}, err
	}
	return s.detail(ctx, a.ID)
}
