package service

import (
	"context"
	"errors"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/keyring"
	"github.com/trustd/trustd/signer"
)

// settleEvery is how often work that a lost device left over is tried again.
const settleEvery = 30 * time.Second

// Settle finishes or undoes, now and then, what a crash or a lost device left between a key and its registration, and
// logs which alerts have come and gone. It returns when ctx ends. It has one caller.
func (s *Service) Settle(ctx context.Context) error {
	tick := time.NewTicker(settleEvery)
	defer tick.Stop()
	for {
		if err := s.SettleOnce(ctx); err != nil && ctx.Err() == nil {
			s.cfg.Log.Warn("some keys could not be settled yet", "error", err)
		}
		s.noteAlerts()
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// SettleOnce does one round.
func (s *Service) SettleOnce(ctx context.Context) error {
	s.admin.Lock()
	defer s.admin.Unlock()
	notes, err := s.cfg.Keyring.Staged()
	if err != nil {
		return err
	}
	var errs []error
	for _, n := range notes {
		errs = append(errs, s.settleStaged(ctx, n))
	}
	st := s.cfg.Registry.State()
	for _, e := range s.cfg.Keyring.All() {
		switch a, known := st.Agent(e.AgentID); {
		case known && a.Removed != nil:
			errs = append(errs, s.bury(ctx, e.AgentID))
		case known && e.Leaving: // the crash came before the record
			_, err := s.cfg.Keyring.Update(e.AgentID, func(stay *keyring.Entry) bool {
				stay.Leaving = false
				return true
			})
			errs = append(errs, err)
		case !known && e.Adopted: // the crash came before the record, and the key is not ours
			errs = append(errs, s.cfg.Keyring.Delete(e.AgentID))
		}
	}
	return errors.Join(errs...)
}

// settleStaged keeps a key that the registry knows, and destroys one that it does not.
func (s *Service) settleStaged(ctx context.Context, n keyring.Staged) error {
	e, held := s.cfg.Keyring.Get(n.AgentID)
	held = held && e.KeyID == n.KeyID
	if a, known := s.cfg.Registry.State().Agent(n.AgentID); known && held && a.Current().Public.Equal(e.Public) {
		return s.cfg.Keyring.Unstage(n.KeyID)
	}
	if err := s.destroy(ctx, n.Backend, n.KeyID); err != nil {
		return err
	}
	s.cfg.Log.Info("destroyed a key that was begun and never registered", "agent", n.AgentID, "backend", n.Backend, "key_id", n.KeyID)
	if held {
		if err := s.cfg.Keyring.Delete(n.AgentID); err != nil {
			return err
		}
	}
	return s.cfg.Keyring.Unstage(n.KeyID)
}

// bury destroys the key of a removed agent, unless it is to be kept, and drops its entry.
func (s *Service) bury(ctx context.Context, id ident.AgentID) error {
	e, held := s.cfg.Keyring.Get(id)
	if !held {
		return nil
	}
	s.forget(id)
	if !e.Adopted {
		if err := s.destroy(ctx, e.Backend, e.KeyID); err != nil {
			return err
		}
	}
	return s.cfg.Keyring.Delete(id)
}

func (s *Service) destroy(ctx context.Context, backend, keyID string) error {
	b, err := s.backend(backend)
	if err != nil {
		return fault.Wrap(fault.Unavailable, err, "the backend of a key that must go is not in the configuration")
	}
	id, err := signer.ParseID(keyID)
	if err != nil {
		return err
	}
	return b.Destroy(ctx, id)
}
