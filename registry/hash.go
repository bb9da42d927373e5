package registry

import (
	"crypto/sha256"
	"encoding/json"
	"time"

	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/jcs"
)

// The members of these types are part of what StateHash hashes: a change to them is a change of the format.
type (
	stateSummary struct {
		Cluster   string          `json:"cluster_id"`
		Origin    string          `json:"origin"`
		Policy    Policy          `json:"policy"`
		Threshold int             `json:"admin_threshold"`
		Size      uint64          `json:"size"`
		Root      []byte          `json:"root"`
		Refused   uint64          `json:"refused"`
		Operators []ident.AgentID `json:"operators"`
		Nodes     []ident.AgentID `json:"nodes"`
		Agents    int             `json:"agents"`
	}
	agentSummary struct {
		ID         ident.AgentID      `json:"agent_id"`
		Role       Role               `json:"role"`
		Level      Level              `json:"trust_level"`
		Keys       []keySummary       `json:"keys"`
		Aliases    []ident.Alias      `json:"aliases"`
		Metadata   map[string]string  `json:"metadata,omitempty"`
		Version    uint64             `json:"version"`
		CreatedAt  time.Time          `json:"created_at"`
		ExpiresAt  time.Time          `json:"expires_at,omitzero"`
		Revocation *revocationSummary `json:"revocation,omitempty"`
		Removed    *removalSummary    `json:"removed,omitempty"`
		Possession bool               `json:"possession"`
		Node       ident.KeyID        `json:"node,omitzero"`
		Lineage    ident.KeyID        `json:"lineage"`
	}
	keySummary struct {
		Epoch  uint64          `json:"epoch"`
		Public ident.PublicKey `json:"public_key"`
		From   time.Time       `json:"from"`
		Until  time.Time       `json:"until,omitzero"`
		Grade  string          `json:"grade"`
		Origin string          `json:"origin"`
	}
	revocationSummary struct {
		Code   RevocationCode `json:"code"`
		Reason string         `json:"reason"`
		At     time.Time      `json:"at"`
		By     ident.KeyID    `json:"by"`
	}
	removalSummary struct {
		Reason string      `json:"reason"`
		At     time.Time   `json:"at"`
		By     ident.KeyID `json:"by"`
	}
)

// StateHash returns a hash of everything that the state holds: two states with the same hash judge every record
// alike. It walks the whole state. The hash is the SHA-256 of a summary and of each agent in the order of their
// ids, each as canonical JSON and a newline.
func (s *State) StateHash() [32]byte {
	h := sha256.New()
	size, root := s.Head()
	h.Write(line(stateSummary{
		Cluster: s.cluster.String(), Origin: s.origin, Policy: s.policy, Threshold: s.threshold, Size: size, Root: root[:],
		Refused: s.refused, Operators: s.operators, Nodes: s.nodes, Agents: s.Len(),
	}))
	for a := range s.Agents() {
		h.Write(line(summarise(&a)))
	}
	return [32]byte(h.Sum(nil))
}

func summarise(a *Agent) agentSummary {
	out := agentSummary{
		ID: a.ID, Role: a.Role, Level: a.Level, Aliases: a.Aliases, Metadata: a.Metadata, Version: a.Version,
		CreatedAt: a.CreatedAt, ExpiresAt: a.ExpiresAt, Possession: a.Possession, Node: a.Node, Lineage: a.Lineage,
		Revocation: (*revocationSummary)(a.Revocation), Removed: (*removalSummary)(a.Removed),
	}
	for _, k := range a.Keys {
		out.Keys = append(out.Keys, keySummary(k))
	}
	return out
}

// line returns canonical JSON. The values come from records that were JSON once: they can be written.
func line(v any) []byte {
	b, err := json.Marshal(v)
	if err == nil {
		b, err = jcs.Transform(b)
	}
	if err != nil {
		panic("registry: a state that cannot be written: " + err.Error())
	}
	return append(b, '\n')
}
