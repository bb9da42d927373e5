package service

import (
	"context"
	"maps"
	"slices"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/caller"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/registry"
	"github.com/trustd/trustd/signature"
)

// Identity looks up an agent by id, alias or fingerprint.
func (s *Service) Identity(_ context.Context, name string) (api.Identity, error) {
	a, err := resolve(s.cfg.Views.Load().Registry, name)
	if err != nil {
		return api.Identity{}, err
	}
	return identity(a, s.cfg.Clock.Now()), nil
}

func identity(a registry.Agent, now time.Time) api.Identity {
	k := a.Current()
	out := api.Identity{
		AgentID: a.ID.String(), PublicKey: k.Public.Base64(), Fingerprint: k.Public.ID().String(), Metadata: a.Metadata,
		Algorithm: k.Public.Algorithm().String(), Lineage: a.Lineage.String(), Epoch: k.Epoch, TrustLevel: a.Level.String(),
		Status: string(a.Status(now)), Role: string(a.Role), Grade: k.Grade, Origin: k.Origin, Possession: a.Possession,
		CreatedAt: a.CreatedAt, Version: a.Version, PEM: k.Public.PEM(), Aliases: make([]string, len(a.Aliases)),
	}
	if out.Metadata == nil {
		out.Metadata = map[string]string{}
	}
	for i, alias := range a.Aliases {
		out.Aliases[i] = alias.String()
	}
	if !a.ExpiresAt.IsZero() {
		out.ExpiresAt = &a.ExpiresAt
	}
	return out
}

// hasAlias reports whether a packet may name the agent so.
func hasAlias(a registry.Agent) func(string) bool {
	return func(name string) bool {
		return slices.ContainsFunc(a.Aliases, func(al ident.Alias) bool { return al.String() == name })
	}
}

// History returns the state of an agent's signature history.
func (s *Service) History(_ context.Context, name string) (api.History, error) {
	a, err := resolve(s.cfg.Views.Load().Registry, name)
	if err != nil {
		return api.History{}, err
	}
	if _, held := s.cfg.Keyring.Get(a.ID); !held {
		return api.History{}, &fault.Error{Code: fault.NoPrivateKey, Text: "the history is kept on the host that holds the key"}
	}
	key := a.Current().Public.ID()
	seq, size, root := s.cfg.History.Head(key)
	return api.History{AgentID: a.ID.String(), Fingerprint: key.String(), Sequence: seq, Size: size, Root: digestText(root)}, nil
}

// Whoami says what the daemon sees of its caller.
func (s *Service) Whoami(ctx context.Context, explain bool) (api.Whoami, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return api.Whoami{}, err
	}
	w := c.Whoami(explain)
	w.Agents = []api.Grant{}
	for _, e := range s.cfg.Keyring.All() {
		var verbs []string
		for _, v := range []string{api.VerbSign, api.VerbVerify, api.VerbOperate} {
			if caller.MatchAny(e.Bindings, c, v) {
				verbs = append(verbs, v)
			}
		}
		if len(verbs) > 0 {
			w.Agents = append(w.Agents, api.Grant{AgentID: e.AgentID.String(), Verbs: verbs})
		}
	}
	return w, nil
}

// Capabilities says what this daemon can do.
func (s *Service) Capabilities(ctx context.Context) (api.Capabilities, error) {
	backends, err := s.Backends(ctx)
	if err != nil {
		return api.Capabilities{}, err
	}
	algs := map[string]bool{}
	for i := range backends {
		b := &backends[i] // the rest is for operators: Backends
		backends[i] = api.Backend{Name: b.Name, Kind: b.Kind, Device: b.Device, Default: b.Default, State: b.State, Since: b.Since,
			Grade: b.Grade, Algorithms: b.Algorithms, Problem: b.Problem, Remedy: b.Remedy}
		for _, a := range backends[i].Algorithms {
			algs[a] = true
		}
	}
	return api.Capabilities{
		Version: s.cfg.Version, ClusterID: s.cfg.Views.Load().Registry.ClusterID().String(), Algorithms: slices.Sorted(maps.Keys(algs)),
		Backends: backends,
		Formats:  []string{"trusthandoff-packet/0.4", "trustd-message/1", "trustd-batch/v1"},
		Limits: map[string]int64{"body_bytes": api.MaxBody, "batch": api.MaxBatch, "batch_bytes": api.MaxBatchBody, "signature_batch": signature.MaxBatch,
			"nonces": int64(s.cfg.MaxNonces), "nonces_held": int64(s.cfg.Spend.Len())},
	}, nil
}
