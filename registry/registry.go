// Package registry says which key speaks for which agent. It is a pure fold over signed records: the same records
// in the same order give the same State on every host. It reads no clock and trusts no carrier: who may make a
// change is judged inside Apply, from the signatures on the record and the state before it.
//
// The formats are in docs/formats/records.md.
package registry

import (
	"encoding/hex"
	"iter"
	"slices"
	"strings"

	iradix "github.com/hashicorp/go-immutable-radix/v2"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/merkle"
)

// A ClusterID names an authority: the SHA-256 of what the signatures of its genesis record sign. Every other
// record is signed together with it, so that no record counts in two clusters.
type ClusterID [32]byte

const clusterPrefix = "sha256:"

var errClusterID = fault.BadField("cluster_id", "a cluster id is %q and 64 lower-case hexadecimal digits", clusterPrefix)

// ParseClusterID reads what String writes.
func ParseClusterID(s string) (ClusterID, error) {
	var id ClusterID
	rest, ok := strings.CutPrefix(s, clusterPrefix)
	if !ok || len(rest) != 2*len(id) || strings.ToLower(rest) != rest {
		return ClusterID{}, errClusterID
	}
	if _, err := hex.Decode(id[:], []byte(rest)); err != nil {
		return ClusterID{}, errClusterID
	}
	return id, nil
}

// String returns "sha256:" and 64 hexadecimal digits.
func (c ClusterID) String() string { return clusterPrefix + hex.EncodeToString(c[:]) }

// IsZero reports whether c names no cluster.
func (c ClusterID) IsZero() bool { return c == ClusterID{} }

// A State is what a sequence of records amounts to. It never changes: Apply returns another one, which shares what
// is equal. All methods may be called from any goroutine.
type State struct {
	cluster   ClusterID
	origin    string
	policy    Policy
	threshold int

	tree    merkle.Tree // over the leaves of all records; cloned before it grows
	refused uint64

	// The trees hold no pointer that a caller can reach; an *Agent in them is never written again.
	agents  *iradix.Tree[*Agent]        // by id
	keys    *iradix.Tree[keyRef]        // by fingerprint: every key that ever had a role
	aliases *iradix.Tree[ident.AgentID] // by text: every alias ever given

	operators, nodes []ident.AgentID // neither revoked nor removed, in the order of their registration; never written
}

// A keyRef says whose key it is.
type keyRef struct {
	agent ident.AgentID
	epoch uint64
}

// New returns the state before any record. It takes a genesis record and nothing else.
func New() *State {
	return &State{
		agents:  iradix.New[*Agent](),
		keys:    iradix.New[keyRef](),
		aliases: iradix.New[ident.AgentID](),
	}
}

// Initialised reports whether there was a genesis record.
func (s *State) Initialised() bool { return s.tree.Size() > 0 }

// ClusterID returns the authority's id; the zero value before genesis.
func (s *State) ClusterID() ClusterID { return s.cluster }

// Origin returns the authority's name.
func (s *State) Origin() string { return s.origin }

// Policy returns the defaults of the genesis record.
func (s *State) Policy() Policy { return s.policy }

// Threshold returns how many operators must sign what needs the threshold.
func (s *State) Threshold() int { return s.threshold }

// Head returns the number of leaves and the root of the Merkle tree over all records, accepted or refused.
func (s *State) Head() (size uint64, root [32]byte) { return s.tree.Size(), s.tree.Root() }

// Refused returns how many of the leaves are refused records.
func (s *State) Refused() uint64 { return s.refused }

// Len returns the number of agents, whatever their role and status.
func (s *State) Len() int { return s.agents.Len() }

// Agent returns the agent with this id.
func (s *State) Agent(id ident.AgentID) (Agent, bool) {
	a, ok := s.agents.Get([]byte(id.String()))
	if !ok {
		return Agent{}, false
	}
	return a.clone(), true
}

// ByAlias returns the agent that has, or had, this alias.
func (s *State) ByAlias(alias string) (Agent, bool) {
	id, ok := s.aliases.Get([]byte(alias))
	if !ok {
		return Agent{}, false
	}
	return s.Agent(id)
}

// ByKey returns the agent that has, or had, this key, and the epoch in which it did.
func (s *State) ByKey(key ident.KeyID) (Agent, KeyEpoch, bool) {
	a, e, ok := s.byKey(key)
	if !ok {
		return Agent{}, KeyEpoch{}, false
	}
	return a.clone(), e, true
}

// byKey returns the state's own agent, which the caller must not hand out.
func (s *State) byKey(key ident.KeyID) (*Agent, KeyEpoch, bool) {
	ref, ok := s.keys.Get(key[:])
	if !ok {
		return nil, KeyEpoch{}, false
	}
	a, ok := s.agents.Get([]byte(ref.agent.String()))
	if !ok {
		return nil, KeyEpoch{}, false
	}
	for _, e := range a.Keys {
		if e.Epoch == ref.epoch {
			return a, e, true
		}
	}
	return nil, KeyEpoch{}, false
}

// Agents yields all agents in the order of their ids.
func (s *State) Agents() iter.Seq[Agent] {
	return func(yield func(Agent) bool) {
		it := s.agents.Root().Iterator()
		for _, a, ok := it.Next(); ok; _, a, ok = it.Next() {
			if !yield(a.clone()) {
				return
			}
		}
	}
}

// Operators returns the operators that are neither revoked nor removed, in the order of their registration.
func (s *State) Operators() []Agent { return s.pick(s.operators) }

// Nodes returns the nodes that are neither revoked nor removed, in the order of their registration.
func (s *State) Nodes() []Agent { return s.pick(s.nodes) }

func (s *State) pick(ids []ident.AgentID) []Agent {
	out := make([]Agent, 0, len(ids))
	for _, id := range ids {
		if a, ok := s.Agent(id); ok {
			out = append(out, a)
		}
	}
	return out
}

// put stores an agent, which is the state's from then on, in a state that nobody else has seen yet.
func (s *State) put(a *Agent) {
	id := []byte(a.ID.String())
	old, had := s.agents.Get(id)
	s.agents, _, _ = s.agents.Insert(id, a)
	for _, e := range a.Keys {
		key := e.Public.ID()
		s.keys, _, _ = s.keys.Insert(key[:], keyRef{a.ID, e.Epoch})
	}
	for _, alias := range a.Aliases {
		if !had || !slices.Contains(old.Aliases, alias) {
			s.aliases, _, _ = s.aliases.Insert([]byte(alias.String()), a.ID)
		}
	}
	switch a.Role {
	case RoleOperator:
		s.operators = seat(s.operators, a)
	case RoleNode:
		s.nodes = seat(s.nodes, a)
	}
}

// seat returns the list with the agent in it while it is neither revoked nor removed, as a new list.
func seat(ids []ident.AgentID, a *Agent) []ident.AgentID {
	at := slices.Index(ids, a.ID)
	gone := a.Revocation != nil || a.Removed != nil
	switch {
	case at < 0 && !gone:
		return append(slices.Clone(ids), a.ID)
	case at >= 0 && gone:
		return slices.Delete(slices.Clone(ids), at, at+1)
	}
	return ids
}
