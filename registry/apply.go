package registry

import (
	"bytes"
	"crypto/sha256"
	"maps"
	"slices"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signature"
)

// An Outcome is what became of a record.
type Outcome struct {
	Accepted bool
	Err      *fault.Error // why not; nil when accepted
	Index    uint64       // the record's leaf; 0 is the genesis record
}

// Apply judges a record by the state before it and returns the state after it. A refused record changes nothing
// but the head and the count of refused records; before genesis it changes nothing at all, because the genesis
// record is leaf 0. Apply never fails and never panics, whatever the record.
func (s *State) Apply(rec Record) (*State, Outcome) {
	next, err := s.judge(&rec)
	out := Outcome{Accepted: err == nil, Err: fault.From(err), Index: s.tree.Size()}
	if err != nil {
		if !s.Initialised() {
			return s, out
		}
		refused := *s
		refused.refused++
		next = &refused
	}
	next.tree = s.tree.Clone()
	next.tree.Append(rec.leaf(out.Accepted))
	return next, out
}

// judge returns the state with the record's change made.
func (s *State) judge(rec *Record) (*State, error) {
	if err := rec.check(); err != nil {
		return nil, err
	}
	if rec.Type == TypeGenesis {
		return s.judgeGenesis(rec)
	}
	if !s.Initialised() {
		return nil, fault.New(fault.NotInitialised, "")
	}
	switch rec.Type {
	case TypeRegister:
		return s.judgeRegister(rec)
	case TypeImport:
		return s.judgeImport(rec)
	case TypeAlias:
		return s.judgeAlias(rec)
	case TypeRevoke:
		return s.judgeRevoke(rec)
	case TypeRemove:
		return s.judgeRemove(rec)
	case TypeUpdate:
		return s.judgeUpdate(rec)
	}
	return nil, fault.New(fault.Unsupported, "this build does not know the record type")
}

func (s *State) judgeGenesis(rec *Record) (*State, error) {
	var g Genesis
	if err := decode(rec.Body, &g); err != nil {
		return nil, err
	}
	if s.Initialised() {
		return nil, fault.New(fault.AlreadyExists, "there is a genesis record")
	}
	next := New()
	next.cluster = sha256.Sum256(rec.SigningBytes(ClusterID{}))
	next.origin, next.policy, next.threshold = g.Origin, g.Policy, g.Threshold
	founders := append(slices.Clone(g.Operators), g.Node)
	msg := rec.SigningBytes(ClusterID{})
	for i, f := range founders {
		a := founder(f, g.CreatedAt)
		if i < len(g.Operators) {
			a.Role, a.Level = RoleOperator, LevelAdmin
		} else {
			a.Role, a.Level = RoleNode, LevelLow
		}
		if err := next.vacant(a); err != nil {
			return nil, err
		}
		if err := verifyBy(rec, f.PublicKey, msg); err != nil {
			return nil, err
		}
		next.put(a)
	}
	if len(rec.Signatures) != len(founders) {
		return nil, fault.New(fault.NotAuthorised, "a genesis record is signed by those that it names and nobody else")
	}
	return next, nil
}

func founder(f Founder, at time.Time) *Agent {
	a := newAgent(newcomer{id: f.AgentID, key: f.PublicKey, createdAt: at})
	a.Keys[0].Grade, a.Keys[0].Origin, a.Possession = f.Grade, f.Origin, true
	return a
}

// verifyBy checks the signature of one key, which must be there.
func verifyBy(rec *Record, key ident.PublicKey, msg []byte) error {
	id := key.ID()
	for _, sig := range rec.Signatures {
		if sig.Key == id {
			return signature.Verify(key, msg, sig.Sig)
		}
	}
	return fault.New(fault.NotAuthorised, "a genesis record is signed by those that it names and nobody else")
}

func newAgent(n newcomer) *Agent {
	aliases := append([]ident.Alias{ident.DerivedAlias(n.key)}, n.aliases...)
	return &Agent{
		ID: n.id, Level: n.level, Aliases: aliases, Metadata: maps.Clone(n.metadata), Version: 1,
		Keys:      []KeyEpoch{{Epoch: 1, Public: n.key, From: n.createdAt}},
		CreatedAt: n.createdAt, ExpiresAt: n.expiresAt, Lineage: n.key.ID(),
	}
}

// vacant says whether nobody has, or ever had, the id, the key and the aliases of an agent.
func (s *State) vacant(a *Agent) error {
	if _, taken := s.agents.Get([]byte(a.ID.String())); taken {
		return &fault.Error{Code: fault.AlreadyExists, Field: "agent_id", Text: "an agent has, or had, this id"}
	}
	key := a.Current().Public.ID()
	if _, taken := s.keys.Get(key[:]); taken {
		return &fault.Error{Code: fault.KeyReused, Field: "public_key"}
	}
	for _, alias := range a.Aliases {
		if err := s.free(alias); err != nil {
			return err
		}
	}
	return nil
}

func (s *State) free(alias ident.Alias) error {
	if _, taken := s.aliases.Get([]byte(alias.String())); taken {
		return &fault.Error{Code: fault.AlreadyExists, Field: "aliases", Text: "an agent has, or had, this alias"}
	}
	return nil
}

func (s *State) judgeRegister(rec *Record) (*State, error) {
	var b Register
	if err := decode(rec.Body, &b); err != nil {
		return nil, err
	}
	a := newAgent(newcomer{b.AgentID, b.PublicKey, b.Aliases, b.Metadata, b.Level, b.CreatedAt, b.ExpiresAt})
	a.Role, a.Node = b.Role, b.Node
	a.Keys[0].Grade, a.Keys[0].Origin = b.Grade, b.Origin
	by, err := s.verify(rec, a, b.CreatedAt)
	if err != nil {
		return nil, err
	}
	if !by.possession {
		return nil, fault.New(fault.NotAuthorised, "the new key has not proved that its holder holds it")
	}
	return s.admit(a, by, s.operatorsFor(a))
}

func (s *State) judgeImport(rec *Record) (*State, error) {
	var b Import
	if err := decode(rec.Body, &b); err != nil {
		return nil, err
	}
	a := newAgent(newcomer{b.AgentID, b.PublicKey, b.Aliases, b.Metadata, b.Level, b.CreatedAt, b.ExpiresAt})
	a.Role, a.Node = RoleAgent, b.Node
	a.Keys[0].Origin = "unknown"
	by, err := s.verify(rec, a, b.CreatedAt)
	if err != nil {
		return nil, err
	}
	need := s.operatorsFor(a)
	if !by.possession || b.Node.IsZero() {
		need = max(need, 1)
	}
	return s.admit(a, by, need)
}

// operatorsFor returns how many operators must sign to give an agent its role and level.
func (s *State) operatorsFor(a *Agent) int {
	switch {
	case s.guarded(a) || a.Role == RoleNode:
		return s.threshold
	case a.Level > LevelLow:
		return 1
	}
	return 0
}

// guarded reports whether an agent is one of those that can change the registry.
func (s *State) guarded(a *Agent) bool { return a.Role == RoleOperator || a.Level == LevelAdmin }

// admit returns the state with a new agent in it.
func (s *State) admit(a *Agent, by signers, operators int) (*State, error) {
	if !a.Node.IsZero() && !by.node(a.Node) {
		return nil, fault.New(fault.NotAuthorised, "the node that is named has not signed")
	}
	if err := by.operators(operators); err != nil {
		return nil, err
	}
	if err := s.vacant(a); err != nil {
		return nil, err
	}
	a.Possession = by.possession
	next := *s
	next.put(a)
	if len(next.operators) >= 2 {
		next.threshold = max(next.threshold, 2)
	}
	return &next, nil
}

func (s *State) judgeAlias(rec *Record) (*State, error) {
	var b AddAlias
	if err := decode(rec.Body, &b); err != nil {
		return nil, err
	}
	a, by, err := s.target(rec, b.AgentID, b.At)
	if err != nil {
		return nil, err
	}
	if err := s.keeper(a, by); err != nil {
		return nil, err
	}
	if err := standing(a, b.Version); err != nil {
		return nil, err
	}
	if err := s.free(b.Alias); err != nil {
		return nil, err
	}
	named := 0
	for _, alias := range a.Aliases {
		if !alias.Derived() {
			named++
		}
	}
	if named >= maxAliases {
		return nil, fault.BadField("alias", "an agent has at most %d aliases", maxAliases)
	}
	a.Aliases = append(a.Aliases, b.Alias)
	return s.with(a), nil
}

func (s *State) judgeUpdate(rec *Record) (*State, error) {
	var b Update
	if err := decode(rec.Body, &b); err != nil {
		return nil, err
	}
	a, by, err := s.target(rec, b.AgentID, b.At)
	if err != nil {
		return nil, err
	}
	if err := s.keeper(a, by); err != nil {
		return nil, err
	}
	if outlives(b.ExpiresAt, a.ExpiresAt) {
		if err := by.operators(s.operatorsFor(a)); err != nil {
			return nil, err
		}
	}
	if err := standing(a, b.Version); err != nil {
		return nil, err
	}
	a.Metadata, a.ExpiresAt = maps.Clone(b.Metadata), b.ExpiresAt
	return s.with(a), nil
}

// outlives reports whether an expiry lies behind another; the zero time is no expiry.
func outlives(expiry, other time.Time) bool {
	return !other.IsZero() && (expiry.IsZero() || expiry.After(other))
}

func (s *State) judgeRevoke(rec *Record) (*State, error) {
	var b Revoke
	if err := decode(rec.Body, &b); err != nil {
		return nil, err
	}
	a, by, err := s.target(rec, b.AgentID, b.At)
	if err != nil {
		return nil, err
	}
	who, own := by.self(a)
	if !own {
		if a.Role == RoleNode { // one operator can stop a host, the threshold alone removes it
			err = by.operators(1)
		} else {
			err = s.keeper(a, by)
		}
		if err != nil {
			return nil, err
		}
		who = by.first(a.Node)
	}
	r := Revocation{Code: b.Code, Reason: b.Reason, At: b.At, By: who}
	if old := a.Revocation; old != nil {
		if b.Code.strength() <= old.Code.strength() {
			return nil, fault.New(fault.AgentRevoked, "the agent is revoked for this reason or a graver one")
		}
		if old.At.Before(r.At) {
			r.At = old.At // a later record never makes a revocation younger
		}
	}
	a.Revocation = &r
	return s.with(a), nil
}

func (s *State) judgeRemove(rec *Record) (*State, error) {
	var b Remove
	if err := decode(rec.Body, &b); err != nil {
		return nil, err
	}
	a, by, err := s.target(rec, b.AgentID, b.At)
	if err != nil {
		return nil, err
	}
	if err := s.keeper(a, by); err != nil {
		return nil, err
	}
	if a.Removed != nil {
		return nil, fault.New(fault.AgentRemoved, "")
	}
	if a.Role == RoleOperator && a.Revocation == nil && len(s.operators) <= s.threshold {
		return nil, fault.New(fault.Denied, "fewer operators would be left than must sign a change")
	}
	a.Removed = &Removal{Reason: b.Reason, At: b.At, By: by.first(a.Node)}
	return s.with(a), nil
}

// target returns a copy of the agent that a record is about, to be changed, and who signed.
func (s *State) target(rec *Record, id ident.AgentID, at time.Time) (*Agent, signers, error) {
	by, err := s.verify(rec, nil, at)
	if err != nil {
		return nil, signers{}, err
	}
	a, ok := s.Agent(id)
	if !ok {
		return nil, signers{}, &fault.Error{
			Code: fault.NotFound, Field: "agent_id", Text: "the registry knows no such agent",
		}
	}
	return &a, by, nil
}

// keeper says whether those who signed may change an agent: the node that registered it, if it is a mere agent
// below ADMIN; an operator; the threshold of them for an operator, a node or an agent of level ADMIN.
func (s *State) keeper(a *Agent, by signers) error {
	if s.guarded(a) || a.Role == RoleNode {
		return by.operators(s.threshold)
	}
	if !a.Node.IsZero() && by.node(a.Node) {
		return nil
	}
	return by.operators(1)
}

// standing says whether an agent can still be changed, and is as the record's author saw it.
func standing(a *Agent, version uint64) error {
	switch {
	case a.Revocation != nil:
		return fault.New(fault.AgentRevoked, "")
	case a.Removed != nil:
		return fault.New(fault.AgentRemoved, "")
	case a.Version != version:
		return &fault.Error{Code: fault.StaleVersion, Field: "version"}
	}
	return nil
}

// with returns the state with a changed agent.
func (s *State) with(a *Agent) *State {
	a.Version++
	next := *s
	next.put(a)
	return &next
}

// signers are those whose signatures on a record are good.
type signers struct {
	possession bool
	all        []signedBy
}

type signedBy struct {
	key    ident.KeyID
	agent  *Agent // the state's own
	active bool   // with this key, at the time of the record
}

// verify checks every signature on a record; one bad signature refuses it. The key of a newcomer, where there is
// one, proves possession; all other keys must be known.
func (s *State) verify(rec *Record, newcomer *Agent, at time.Time) (signers, error) {
	var out signers
	msg := rec.SigningBytes(s.cluster)
	for _, sig := range rec.Signatures {
		if newcomer != nil && sig.Key == newcomer.Lineage {
			key := newcomer.Current().Public
			if err := signature.Verify(key, rec.PossessionBytes(s.cluster, newcomer.ID, key), sig.Sig); err != nil {
				return signers{}, badSignature(err)
			}
			out.possession = true
			continue
		}
		a, epoch, ok := s.byKey(sig.Key)
		if !ok {
			return signers{}, &fault.Error{
				Code: fault.NotAuthorised, Field: "signatures",
				Text: "a signature is by a key that the registry does not know",
			}
		}
		if err := signature.Verify(epoch.Public, msg, sig.Sig); err != nil {
			return signers{}, badSignature(err)
		}
		active := a.Status(at) == Active && epoch.Epoch == a.Current().Epoch
		out.all = append(out.all, signedBy{sig.Key, a, active})
	}
	return out, nil
}

func badSignature(err error) error {
	return &fault.Error{Code: fault.InvalidSignature, Field: "signatures", Err: err}
}

// node reports whether the active node with this key signed.
func (by signers) node(key ident.KeyID) bool {
	return slices.ContainsFunc(by.all, func(s signedBy) bool {
		return s.key == key && s.active && s.agent.Role == RoleNode
	})
}

// operators demands the signatures of n active operators.
func (by signers) operators(n int) error {
	have := 0
	for _, s := range by.all {
		if s.active && s.agent.Role == RoleOperator {
			have++
		}
	}
	if have < n {
		return fault.New(fault.NotAuthorised, "%d of the %d operators that must sign have signed", have, n)
	}
	return nil
}

// self returns the agent's own key, where it signed. An expired or removed agent may still denounce itself.
func (by signers) self(a *Agent) (ident.KeyID, bool) {
	for _, s := range by.all {
		if s.agent.ID == a.ID {
			return s.key, true
		}
	}
	return ident.KeyID{}, false
}

// first returns the node's key if it signed, else the lowest key of an operator that did.
func (by signers) first(node ident.KeyID) ident.KeyID {
	var out ident.KeyID
	for _, s := range by.all {
		if s.key == node {
			return s.key
		}
		if s.active && s.agent.Role == RoleOperator && (out.IsZero() || bytes.Compare(s.key[:], out[:]) < 0) {
			out = s.key
		}
	}
	return out
}
