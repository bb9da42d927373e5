package service

import (
	"context"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/caller"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/keyring"
	"github.com/trustd/trustd/registry"
)

// Records are made and signed here, and judged by the registry alone: what this file gets wrong is refused there.

// node returns the entry of this host's own key.
func (s *Service) node() (*keyring.Entry, error) {
	for _, e := range s.cfg.Keyring.All() {
		if e.Role == string(registry.RoleNode) {
			return e, nil
		}
	}
	return nil, fault.New(fault.NotInitialised, "this host has no node key")
}

// operators returns the entries of the operators that the caller may act as.
func (s *Service) operators(ctx context.Context) []*keyring.Entry {
	c, ok := caller.FromContext(ctx)
	if !ok {
		return nil
	}
	var out []*keyring.Entry
	for _, e := range s.cfg.Keyring.All() {
		if e.Role == string(registry.RoleOperator) && caller.MatchAny(e.Bindings, c, api.VerbOperate) {
			out = append(out, e)
		}
	}
	return out
}

// endorse adds the signatures of this node and of the operators that the caller may act as.
func (s *Service) endorse(ctx context.Context, r *registry.Record, withOperators bool) error {
	entries := []*keyring.Entry{}
	if n, err := s.node(); err != nil {
		return err
	} else {
		entries = append(entries, n)
	}
	if withOperators {
		entries = append(entries, s.operators(ctx)...)
	}
	msg := r.SigningBytes(s.cfg.Registry.State().ClusterID())
	for _, e := range entries {
		key, err := s.open(ctx, e)
		if err != nil {
			return err
		}
		sig, err := key.signRecord(ctx, msg)
		if err != nil {
			s.forget(e.AgentID)
			return s.lost(ctx, e, err)
		}
		r.AddSignature(e.Public.ID(), sig)
	}
	return nil
}

// submit hands a record to the registry and returns why it was refused, if it was.
func (s *Service) submit(ctx context.Context, r registry.Record) error {
	if _, err := s.cfg.Registry.Submit(ctx, r); err != nil {
		return refusedRecord(err)
	}
	return nil
}

// refusedRecord says of a refusal for want of authority what the operator can do about it.
func refusedRecord(err error) error {
	e := fault.From(err)
	if e.Code != fault.NotAuthorised {
		return err
	}
	return &fault.Error{Code: e.Code, Field: e.Field, Text: e.Text, Err: e.Err,
		Hint: "Ask as a user who may act as an operator (trustd agent list shows them, trustd whoami what you may do)."}
}
