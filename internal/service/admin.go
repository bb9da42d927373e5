package service

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"slices"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/caller"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/keyring"
	"github.com/trustd/trustd/registry"
	"github.com/trustd/trustd/signer"
)

// A newcomer is an agent that is about to get a key and a place in the registry: all that can be checked before a
// device is asked for anything.
type newcomer struct {
	id       ident.AgentID
	role     registry.Role
	level    registry.Level
	aliases  []ident.Alias
	bindings []api.Binding
	backend  *Backend
	request  api.AddAgentRequest
}

// check turns a request into a newcomer.
func (s *Service) check(r api.AddAgentRequest) (newcomer, error) {
	st := s.cfg.Registry.State()
	if !st.Initialised() {
		return newcomer{}, fault.New(fault.NotInitialised, "")
	}
	n := newcomer{request: r, bindings: slices.Clone(r.Bindings)}
	var err error
	if n.id, err = ident.ParseAgentID(r.AgentID); err != nil {
		return newcomer{}, err
	}
	if _, taken := st.Agent(n.id); taken {
		return newcomer{}, &fault.Error{Code: fault.AlreadyExists, Field: "agent_id", Text: "an agent has, or had, this id"}
	}
	switch n.role = registry.Role(cmp.Or(r.Role, roleAgent)); n.role {
	case registry.RoleAgent:
		n.level = st.Policy().DefaultLevel
		if r.Level != "" {
			if n.level, err = registry.ParseLevel(r.Level); err != nil {
				return newcomer{}, err
			}
		}
	case registry.RoleOperator:
		if r.Level != "" && r.Level != registry.LevelAdmin.String() {
			return newcomer{}, fault.BadField("trust_level", "an operator has the level ADMIN")
		}
		n.level = registry.LevelAdmin
	default:
		return newcomer{}, fault.BadField("role", "a role is agent or operator")
	}
	for _, text := range r.Aliases {
		a, err := ident.ParseAlias(text)
		if err != nil {
			return newcomer{}, err
		}
		if _, taken := st.ByAlias(text); taken {
			return newcomer{}, &fault.Error{Code: fault.AlreadyExists, Field: "aliases", Text: "an agent has, or had, this alias"}
		}
		n.aliases = append(n.aliases, a)
	}
	if n.role == registry.RoleOperator {
		for i := range n.bindings { // there is nothing else that an operator's key is used for
			if len(n.bindings[i].Verbs) == 0 {
				n.bindings[i].Verbs = []string{api.VerbOperate}
			}
		}
	}
	if err := checkBindings(n.bindings, n.role); err != nil {
		return newcomer{}, err
	}
	return n, nil
}

// checkBindings demands that every binding rests on something that the caller cannot choose.
func checkBindings(bs []api.Binding, role registry.Role) error {
	for _, b := range bs {
		if err := caller.CheckSelector(b.Selector); err != nil {
			return err
		}
		for _, v := range b.Verbs {
			if v != api.VerbSign && v != api.VerbVerify && v != api.VerbOperate {
				return fault.BadField("bindings.verbs", "a verb is sign, verify or operate")
			}
			if v == api.VerbOperate != (role == registry.RoleOperator) {
				return fault.BadField("bindings.verbs", "the verb operate belongs to operators, the others to agents")
			}
		}
		if role == registry.RoleOperator && len(b.Verbs) == 0 {
			return fault.BadField("bindings.verbs", "a binding of an operator names the verb operate")
		}
	}
	return nil
}

// AddAgent makes a key, or adopts one, and registers an agent with it.
func (s *Service) AddAgent(ctx context.Context, r api.AddAgentRequest) (api.AgentDetail, error) {
	s.admin.Lock()
	defer s.admin.Unlock()
	n, err := s.check(r)
	if err != nil {
		return api.AgentDetail{}, err
	}
	if n.backend, err = s.backend(r.Backend); err != nil {
		return api.AgentDetail{}, err
	}
	if err := s.checkBackend(ctx, n.backend); err != nil {
		return api.AgentDetail{}, err
	}
	if r.KeyURI != "" {
		return s.adopt(ctx, n)
	}
	alg, err := s.algorithm(ctx, n)
	if err != nil {
		return api.AgentDetail{}, err
	}
	return s.join(ctx, n, func(id signer.ID) (signer.Key, error) { return n.backend.Generate(ctx, id, alg) })
}

// checkBackend refuses a backend whose keys would be of too low a grade, before a key is made on it.
func (s *Service) checkBackend(ctx context.Context, b *Backend) error {
	if s.cfg.MinGrade == "" {
		return nil
	}
	if d := b.Describe(ctx); d.State == signer.Ready || d.State == signer.Recovering {
		return s.checkGrade(d.Grade)
	}
	return nil // making the key says what is wrong
}

// checkGrade refuses a key of a grade below keys.min_grade.
func (s *Service) checkGrade(g signer.Grade) error {
	if s.cfg.MinGrade == "" || g.AtLeast(s.cfg.MinGrade) {
		return nil
	}
	return &fault.Error{Code: fault.AssuranceTooLow, Field: "backend",
		Text: "keys of this backend are " + gradeText(g) + ", and keys.min_grade is " + string(s.cfg.MinGrade),
		Hint: "Name a backend with better keys (trustd backend list), or change keys.min_grade."}
}

// algorithm returns the algorithm asked for, or the backend's default. It never puts another in its place.
func (s *Service) algorithm(ctx context.Context, n newcomer) (ident.Algorithm, error) {
	if n.request.Algorithm != "" {
		return ident.ParseAlgorithm(n.request.Algorithm)
	}
	d := n.backend.Describe(ctx)
	if len(d.Algorithms) == 0 {
		// A description only tells in words what is wrong; a request gets the device's own code.
		if _, err := n.backend.Keys(ctx); err != nil {
			return 0, err
		}
		return 0, &fault.Error{Code: fault.Unavailable, Text: cmp.Or(d.Problem, "the backend offers no algorithm"), Hint: d.Remedy}
	}
	return d.Algorithms[0], nil
}

// join makes a key and registers its agent. The order makes every crash harmless: the note that a key is begun is
// durable before the key is, the entry before the record that makes the agent known, and the note goes last. What a
// crash leaves, Settle finishes or undoes.
func (s *Service) join(ctx context.Context, n newcomer, make func(signer.ID) (signer.Key, error)) (api.AgentDetail, error) {
	raw := [16]byte{}
	_, _ = rand.Read(raw[:]) // never fails (crypto/rand)
	id, err := signer.NewID(raw[:])
	if err != nil {
		return api.AgentDetail{}, err
	}
	note := keyring.Staged{AgentID: n.id, Backend: n.backend.Name, KeyID: id.String()}
	if err := s.cfg.Keyring.Stage(note); err != nil {
		return api.AgentDetail{}, err
	}
	key, err := make(id)
	n.backend.monitor.Report(err)
	if err == nil {
		err = s.enrol(ctx, n, key, false)
	}
	if err != nil {
		return api.AgentDetail{}, errors.Join(err, s.settleStaged(context.WithoutCancel(ctx), note))
	}
	if err := s.cfg.Keyring.Unstage(note.KeyID); err != nil {
		s.cfg.Log.Warn("a note of a finished key stays until the next start", "agent", n.id, "error", err)
	}
	return s.detail(ctx, n.id)
}

// adopt registers an agent with a key that others made. It is not ours to destroy, so nothing is staged.
func (s *Service) adopt(ctx context.Context, n newcomer) (api.AgentDetail, error) {
	u, err := signer.ParseURI(n.request.KeyURI)
	if err != nil {
		return api.AgentDetail{}, err
	}
	if u.Scheme != n.backend.Kind {
		return api.AgentDetail{}, fault.BadField("key_uri", "the key is of another kind than the backend")
	}
	info, err := n.backend.Find(ctx, u.ID)
	if err != nil {
		return api.AgentDetail{}, err
	}
	if at, err := signer.ParseURI(info.URI); err != nil || u.Token != "" && u.Token != at.Token || u.Serial != "" && u.Serial != at.Serial {
		return api.AgentDetail{}, fault.New(fault.KeyNotFound, "the key is not on the token that the URI names")
	}
	if info.Problem != "" || info.Public.IsZero() {
		return api.AgentDetail{}, fault.New(fault.KeyNotFound, "the key on the device cannot be used")
	}
	if n.backend.monitor.IsCanary(u.ID) {
		return api.AgentDetail{}, &fault.Error{Code: fault.KeyReused, Field: "key_uri", Text: "this is the backend's canary key"}
	}
	key, err := n.backend.Open(ctx, u.ID, info.Public)
	if err != nil {
		return api.AgentDetail{}, err
	}
	if err := s.enrol(ctx, n, key, true); err != nil {
		if _, known := s.cfg.Registry.State().Agent(n.id); !known {
			err = errors.Join(err, s.cfg.Keyring.Delete(n.id))
		}
		return api.AgentDetail{}, err
	}
	return s.detail(ctx, n.id)
}

// enrol writes the entry of a key and registers its agent.
func (s *Service) enrol(ctx context.Context, n newcomer, key signer.Key, adopted bool) error {
	info, st := key.Info(), s.cfg.Registry.State()
	if _, _, taken := st.ByKey(info.Public.ID()); taken {
		return &fault.Error{Code: fault.KeyReused, Field: "public_key"}
	}
	if err := s.checkGrade(info.Grade); err != nil {
		return err
	}
	e := keyring.Entry{
		AgentID: n.id, Role: string(n.role), Backend: n.backend.Name, KeyID: info.ID.String(), URI: info.URI, Public: info.Public,
		Grade: string(info.Grade), Origin: string(info.Origin), Adopted: adopted, Bindings: n.bindings,
	}
	b := registry.Register{
		AgentID: n.id, Role: n.role, PublicKey: info.Public, Aliases: n.aliases, Metadata: n.request.Metadata, Level: n.level,
		Grade: e.Grade, Origin: e.Origin, CreatedAt: s.cfg.Clock.Now(),
	}
	if n.request.ExpiresAt != nil {
		b.ExpiresAt = *n.request.ExpiresAt
	}
	if n.role == registry.RoleAgent {
		node, err := s.node()
		if err != nil {
			return err
		}
		b.Node = node.Public.ID()
	}
	r, err := registry.NewRegister(b)
	if err != nil {
		return err
	}
	open := s.line(n.backend, key)
	proof, err := open.signRecord(ctx, r.PossessionBytes(st.ClusterID(), n.id, info.Public))
	if err != nil {
		return err
	}
	r.AddSignature(info.Public.ID(), proof)
	if err := s.endorse(ctx, &r, n.level > registry.LevelLow); err != nil {
		return err
	}
	if err := s.cfg.Keyring.Put(e); err != nil {
		return err
	}
	if err := s.submit(ctx, r); err != nil {
		return err
	}
	s.keep(n.id, open) // so that its first use need not look for it
	return nil
}

// ListAgents lists all agents, operators and nodes.
func (s *Service) ListAgents(ctx context.Context) ([]api.AgentDetail, error) {
	out := []api.AgentDetail{}
	states := s.keyStates(ctx)
	for a := range s.cfg.Views.Load().Registry.Agents() {
		out = append(out, s.detailOf(a, states))
	}
	return out, nil
}

// ShowAgent returns one agent, by id, alias or fingerprint.
func (s *Service) ShowAgent(ctx context.Context, name string) (api.AgentDetail, error) {
	a, err := resolve(s.cfg.Views.Load().Registry, name)
	if err != nil {
		return api.AgentDetail{}, err
	}
	return s.detailOf(a, s.keyStates(ctx)), nil
}

func (s *Service) detail(ctx context.Context, id ident.AgentID) (api.AgentDetail, error) {
	return s.ShowAgent(ctx, id.String())
}

// keyStates returns the state of each backend, by name.
func (s *Service) keyStates(ctx context.Context) map[string]string {
	out := map[string]string{}
	for _, b := range s.describeAll(ctx, adminPatience) {
		out[b.Name] = b.State
	}
	return out
}

func (s *Service) detailOf(a registry.Agent, states map[string]string) api.AgentDetail {
	d := api.AgentDetail{Identity: identity(a, s.cfg.Clock.Now())}
	e, held := s.cfg.Keyring.Get(a.ID)
	if !held {
		return d
	}
	d.Local, d.Backend, d.KeyURI, d.Bindings = true, e.Backend, e.URI, e.Bindings
	d.KeyState, d.Batching = cmp.Or(states[e.Backend], string(signer.Stopped)), cmp.Or(e.Batching, api.BatchingOnRequest)
	if e.Orphaned != nil {
		d.KeyState = stateOrphaned
	}
	if a.Role == registry.RoleAgent {
		if e.Public.Algorithm() != ident.Ed25519 {
			d.Warnings = append(d.Warnings, "TrustHandoff's Python package verifies Ed25519 alone: it cannot read this agent's packets")
		}
		if len(e.Bindings) == 0 {
			d.Warnings = append(d.Warnings, "no caller may use this agent: it has no bindings")
		}
	}
	if e.Grade == string(signer.Software) && a.Removed == nil {
		d.Warnings = append(d.Warnings, "the key is a software key")
	}
	for _, w := range s.alertsOf(e) {
		d.Warnings = append(d.Warnings, w.Text+" ("+w.Remedy+")")
	}
	return d
}

// RemoveAgent decommissions an agent: first the record, then its key.
func (s *Service) RemoveAgent(ctx context.Context, name string, r api.RemoveAgentRequest) (api.AgentDetail, error) {
	s.admin.Lock()
	defer s.admin.Unlock()
	a, err := resolve(s.cfg.Registry.State(), name)
	if err != nil {
		return api.AgentDetail{}, err
	}
	if a.Role == registry.RoleNode {
		return api.AgentDetail{}, fault.New(fault.Denied, "a node is not removed as an agent is")
	}
	rec, err := registry.NewRemove(registry.Remove{AgentID: a.ID, Reason: r.Reason, At: s.cfg.Clock.Now()})
	if err != nil {
		return api.AgentDetail{}, err
	}
	if err := s.endorse(ctx, &rec, s.needsOperator(a)); err != nil {
		return api.AgentDetail{}, err
	}
	before, held := s.cfg.Keyring.Get(a.ID)
	if held {
		_, err := s.cfg.Keyring.Update(a.ID, func(e *keyring.Entry) bool {
			e.Leaving, e.Adopted = true, e.Adopted || r.KeepKey
			return true
		})
		if err != nil {
			return api.AgentDetail{}, err
		}
	}
	if err := s.submit(ctx, rec); err != nil {
		if held {
			_, undone := s.cfg.Keyring.Update(a.ID, func(e *keyring.Entry) bool {
				e.Leaving, e.Adopted = before.Leaving, before.Adopted
				return true
			})
			err = errors.Join(err, undone)
		}
		return api.AgentDetail{}, err
	}
	s.forget(a.ID)
	var warning string
	if held {
		if err := s.bury(ctx, a.ID); err != nil {
			s.cfg.Log.Warn("a removed agent's key could not be destroyed yet", "agent", a.ID, "error", err)
			warning = "the key could not be destroyed yet; it will be when its device answers"
		}
	}
	d, err := s.detail(ctx, a.ID)
	if warning != "" {
		d.Warnings = append(d.Warnings, warning)
	}
	return d, err
}

// needsOperator reports whether this node's signature alone cannot change the agent.
func (s *Service) needsOperator(a registry.Agent) bool {
	n, err := s.node()
	return err != nil || a.Role != registry.RoleAgent || a.Level == registry.LevelAdmin || a.Node != n.Public.ID()
}

// RevokeAgent refuses an agent's messages from now on and keeps its key.
func (s *Service) RevokeAgent(ctx context.Context, name string, r api.RevokeAgentRequest) (api.AgentDetail, error) {
	s.admin.Lock()
	defer s.admin.Unlock()
	a, err := resolve(s.cfg.Registry.State(), name)
	if err != nil {
		return api.AgentDetail{}, err
	}
	if st := s.cfg.Registry.State(); a.Role == registry.RoleOperator && r.Code != string(registry.KeyCompromise) &&
		len(st.Operators()) <= st.Threshold() {
		return api.AgentDetail{}, &fault.Error{Code: fault.Denied, Text: "fewer operators would be left than must sign a change",
			Hint: "Register another operator first. A compromised key can be revoked all the same: --code key_compromise."}
	}
	rec, err := registry.NewRevoke(registry.Revoke{
		AgentID: a.ID, Code: registry.RevocationCode(cmp.Or(r.Code, string(registry.PrivilegeWithdrawn))), Reason: r.Reason, At: s.cfg.Clock.Now(),
	})
	if err != nil {
		return api.AgentDetail{}, err
	}
	if err := s.endorse(ctx, &rec, s.needsOperator(a)); err != nil {
		return api.AgentDetail{}, err
	}
	if err := s.submit(ctx, rec); err != nil {
		return api.AgentDetail{}, err
	}
	return s.detail(ctx, a.ID)
}

// SetAgent changes how this host treats one of its agents.
func (s *Service) SetAgent(ctx context.Context, name string, r api.SetAgentRequest) (api.AgentDetail, error) {
	switch r.Batching {
	case "", api.BatchingOnRequest, api.BatchingAlways, api.BatchingNever:
	default:
		return api.AgentDetail{}, fault.BadField("batching", "batching is on-request, always or never")
	}
	a, err := resolve(s.cfg.Views.Load().Registry, name)
	if err != nil {
		return api.AgentDetail{}, err
	}
	if a.Role != registry.RoleAgent {
		return api.AgentDetail{}, fault.BadField("name", "only agents have these settings")
	}
	_, err = s.cfg.Keyring.Update(a.ID, func(e *keyring.Entry) bool {
		to := r.Batching
		if to == api.BatchingOnRequest {
			to = ""
		}
		if r.Batching == "" || to == e.Batching {
			return false
		}
		e.Batching = to
		return true
	})
	if err != nil {
		return api.AgentDetail{}, err
	}
	return s.detail(ctx, a.ID)
}

// ListKeys lists the keys on all backends and those that a backend should hold and does not.
func (s *Service) ListKeys(ctx context.Context) ([]api.Key, error) {
	users := map[string]string{} // backend and key id, to agent
	orphans := map[string]bool{}
	for _, e := range s.cfg.Keyring.All() {
		at := e.Backend + "/" + e.KeyID
		users[at], orphans[at] = e.AgentID.String(), e.Orphaned != nil
	}
	out := []api.Key{}
	for i := range s.cfg.Backends {
		b := &s.cfg.Backends[i]
		keys, err := b.Keys(ctx)
		if err != nil {
			s.cfg.Log.Warn("the keys of a backend cannot be listed", "backend", b.Name, "error", err)
			b.monitor.Report(err)
			state := signer.Degraded
			if now := b.monitor.State(); b.monitor.Running() && now != signer.Ready {
				state = now
			}
			out = append(out, s.absent(b.Name, users, string(state))...)
			continue
		}
		for _, k := range keys {
			at := b.Name + "/" + k.ID.String()
			user := users[at]
			if user == "" && b.monitor.IsCanary(k.ID) {
				user = api.UsedByCanary
			}
			key := describeKey(b.Name, k, user)
			if orphans[at] {
				key.State = stateOrphaned
			}
			out = append(out, key)
			delete(users, at)
		}
		out = append(out, s.absent(b.Name, users, stateOrphaned)...)
	}
	return out, nil
}

// The states of a key beside those of its backend.
const (
	stateOrphaned   = "orphaned"
	stateUnused     = "unused"
	stateUnreadable = "unreadable"
)

// absent returns the keys of the keyring that a backend does not show.
func (s *Service) absent(backend string, users map[string]string, state string) []api.Key {
	var out []api.Key
	for _, e := range s.cfg.Keyring.All() {
		if e.Backend != backend || users[e.Backend+"/"+e.KeyID] == "" {
			continue
		}
		delete(users, e.Backend+"/"+e.KeyID)
		state := state
		if e.Orphaned != nil {
			state = stateOrphaned
		}
		out = append(out, api.Key{
			URI: e.URI, Backend: e.Backend, Fingerprint: e.Public.ID().String(), Algorithm: e.Public.Algorithm().String(), Grade: e.Grade,
			Origin: e.Origin, UsedBy: e.AgentID.String(), State: state,
		})
	}
	return out
}

func describeKey(backend string, k signer.KeyInfo, user string) api.Key {
	out := api.Key{
		URI: k.URI, Backend: backend, Label: k.Label, Grade: string(k.Grade), Origin: string(k.Origin), Sensitive: k.Sensitive,
		NeverLeft: k.Always, Extractable: k.Exported, UsedBy: user, Problem: k.Problem, State: string(signer.Ready),
	}
	switch {
	case k.Problem != "":
		out.State = stateUnreadable
	case user == "":
		out.State = stateUnused
	}
	if !k.Public.IsZero() {
		out.Fingerprint, out.Algorithm = k.Public.ID().String(), k.Public.Algorithm().String()
	}
	return out
}
