package service

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/keyring"
	"github.com/trustd/trustd/registry"
	"github.com/trustd/trustd/signer"
)

// A Founding is what the genesis record names.
type Founding struct {
	Origin   string
	Operator ident.AgentID
	Bindings []api.Binding // who may act as the operator
	Node     ident.AgentID
	Backend  string // "" for the default
}

// Found makes the keys of this node and of the first operator and writes the genesis record. A crash on the way is
// cleared up by the next call, or by Settle.
func (s *Service) Found(ctx context.Context, f Founding) error {
	if err := s.SettleOnce(ctx); err != nil {
		return err
	}
	s.admin.Lock()
	defer s.admin.Unlock()
	if s.cfg.Registry.State().Initialised() {
		return &fault.Error{Code: fault.AlreadyExists, Text: "there is a genesis record in this state folder",
			Hint: "trustd init runs once; trustd agent list shows who is known."}
	}
	if err := checkBindings(f.Bindings, registry.RoleOperator); err != nil {
		return err
	}
	b, err := s.backend(f.Backend)
	if err != nil {
		return err
	}
	d := b.Describe(ctx)
	if d.State != signer.Ready || len(d.Algorithms) == 0 {
		return &fault.Error{Code: fault.Unavailable, Text: cmp.Or(d.Problem, "the backend cannot make keys"), Hint: d.Remedy}
	}
	var notes []keyring.Staged
	if err := s.checkGrade(d.Grade); err != nil {
		return err
	}
	err = s.found(ctx, f, b, d.Algorithms[0], &notes)
	for _, n := range notes {
		if err == nil {
			err = s.cfg.Keyring.Unstage(n.KeyID)
		} else {
			err = errors.Join(err, s.settleStaged(context.WithoutCancel(ctx), n))
		}
	}
	return err
}

func (s *Service) found(ctx context.Context, f Founding, b *Backend, alg ident.Algorithm, notes *[]keyring.Staged) error {
	g := registry.Genesis{Origin: f.Origin, Threshold: 1, CreatedAt: s.cfg.Clock.Now(), Salt: make([]byte, 32),
		Policy: registry.Policy{DefaultLevel: registry.LevelLow}}
	_, _ = rand.Read(g.Salt) // never fails (crypto/rand)
	var founders [2]struct {
		entry keyring.Entry
		key   signer.Key
	}
	for i, who := range []struct {
		id       ident.AgentID
		role     registry.Role
		bindings []api.Binding
	}{{f.Operator, registry.RoleOperator, f.Bindings}, {f.Node, registry.RoleNode, nil}} {
		raw := [16]byte{}
		_, _ = rand.Read(raw[:])
		id, err := signer.NewID(raw[:])
		if err != nil {
			return err
		}
		note := keyring.Staged{AgentID: who.id, Backend: b.Name, KeyID: id.String()}
		if err := s.cfg.Keyring.Stage(note); err != nil {
			return err
		}
		*notes = append(*notes, note)
		key, err := b.Generate(ctx, id, alg)
		if err != nil {
			return err
		}
		info := key.Info()
		if err := s.checkGrade(info.Grade); err != nil {
			return err
		}
		e := keyring.Entry{AgentID: who.id, Role: string(who.role), Backend: b.Name, KeyID: id.String(), URI: info.URI, Public: info.Public,
			Grade: string(info.Grade), Origin: string(info.Origin), Bindings: who.bindings}
		if err := s.cfg.Keyring.Put(e); err != nil {
			return err
		}
		founders[i].entry, founders[i].key = e, key
		person := registry.Founder{AgentID: who.id, PublicKey: info.Public, Grade: e.Grade, Origin: e.Origin}
		if who.role == registry.RoleOperator {
			g.Operators = []registry.Founder{person}
		} else {
			g.Node = person
		}
	}
	r, err := registry.NewGenesis(g)
	if err != nil {
		return err
	}
	for _, p := range founders {
		sig, err := s.line(b, p.key).signRecord(ctx, r.SigningBytes(registry.ClusterID{}))
		if err != nil {
			return err
		}
		r.AddSignature(p.entry.Public.ID(), sig)
	}
	return s.submit(ctx, r)
}
