// Package servertest is for tests of what talks over the sockets: a daemon's two interfaces in memory, with real
// keys, packets and signatures, and real Unix sockets in front of it. It has no policy: every caller may act as
// every agent.
package servertest

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/caller"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/clock"
	"github.com/trustd/trustd/packet"
	"github.com/trustd/trustd/signature"
)

// A Memory is an api.Agent and an api.Admin that forgets everything when it is gone. Its keys are Ed25519. It is
// safe for concurrent use.
type Memory struct {
	clock clock.Clock

	mu     sync.Mutex
	agents map[string]*agent // by id
	spent  map[string]bool   // fingerprint and nonce
}

var (
	_ api.Agent = (*Memory)(nil)
	_ api.Admin = (*Memory)(nil)
)

type agent struct {
	id       ident.AgentID
	public   ident.PublicKey
	private  ed25519.PrivateKey // nil for agents of other hosts, and once removed
	origin   string
	aliases  []string
	metadata map[string]string
	bindings []api.Binding
	level    string
	batching string
	status   string
	at       time.Time
	expires  *time.Time
	version  uint64
	seq      uint64
	leaves   [][sha256.Size]byte
}

// NewMemory returns a daemon without agents.
func NewMemory(c clock.Clock) *Memory {
	return &Memory{clock: c, agents: map[string]*agent{}, spent: map[string]bool{}}
}

const backendName = "memory"

// findLocked returns the agent of that id, alias or fingerprint.
func (m *Memory) findLocked(name string) (*agent, error) {
	if a, ok := m.agents[name]; ok {
		return a, nil
	}
	for _, a := range m.agents {
		if a.public.ID().String() == name || slices.Contains(a.aliases, name) {
			return a, nil
		}
	}
	return nil, fault.New(fault.NotFound, "there is no such agent")
}

// signerLocked returns the agent to sign as.
func (m *Memory) signerLocked(name string) (*agent, error) {
	if name == "" {
		var only *agent
		for _, a := range m.agents {
			if a.private == nil {
				continue
			}
			if only != nil {
				return nil, fault.BadField("agent", "the caller may act as more than one agent")
			}
			only = a
		}
		if only == nil {
			return nil, fault.New(fault.Denied, "the caller may act as no agent")
		}
		return only, nil
	}
	a, err := m.findLocked(name)
	switch {
	case err != nil:
		return nil, fault.New(fault.Denied, "the caller may not act as this agent")
	case a.status != "active":
		return nil, fault.New(fault.AgentRevoked, "")
	case a.private == nil:
		return nil, fault.New(fault.NoPrivateKey, "")
	}
	return a, nil
}

func (m *Memory) signLocked(a *agent, msg []byte) ([]byte, api.Signed) {
	sig := ed25519.Sign(a.private, msg)
	a.seq++
	a.leaves = append(a.leaves, leafHash(msg))
	return sig, api.Signed{
		AgentID: a.id.String(), Fingerprint: a.public.ID().String(), Algorithm: a.public.Algorithm().String(),
		Grade: "software", Mode: "direct", Epoch: 1, Sequence: a.seq,
	}
}

// SignPacket completes and signs one packet.
func (m *Memory) SignPacket(ctx context.Context, r api.SignPacketRequest) (api.SignPacketReply, error) {
	if err := ctx.Err(); err != nil {
		return api.SignPacketReply{}, err
	}
	d, err := packet.ParseDraft(r.Packet)
	if err != nil {
		return api.SignPacketReply{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	a, err := m.signerLocked(r.Agent)
	if err != nil {
		return api.SignPacketReply{}, err
	}
	u, err := d.Complete(packet.Fill{
		FromAgent: ident.DerivedAlias(a.public).String(), PublicKey: a.public, Now: m.clock.Now(), TTL: packet.DefaultTTL(),
		AllowedFrom: func(alias string) bool { return slices.Contains(a.aliases, alias) },
		Nonce:       rand.Text(), PacketID: rand.Text(),
	})
	if err != nil {
		return api.SignPacketReply{}, err
	}
	sig, how := m.signLocked(a, u.SigningBytes())
	return api.SignPacketReply{Packet: u.Seal(signature.NewDirect(sig)), Signed: how}, nil
}

// SignPackets signs many packets.
func (m *Memory) SignPackets(ctx context.Context, rs []api.SignPacketRequest) []api.SignPacketResult {
	out := make([]api.SignPacketResult, len(rs))
	for i, r := range rs {
		reply, err := m.SignPacket(ctx, r)
		if err != nil {
			out[i].Error = api.NewProblem(err)
		} else {
			out[i].SignPacketReply = &reply
		}
	}
	return out
}

// VerifyPacket decides on one packet: form, audience, key, signature, status, time, and replay last.
func (m *Memory) VerifyPacket(ctx context.Context, r api.VerifyPacketRequest) (api.Decision, error) {
	if err := ctx.Err(); err != nil {
		return api.Decision{}, err
	}
	t, err := packet.Parse(r.Packet)
	if err != nil {
		e := fault.From(err)
		return api.Decision{Decision: api.Reject, Reason: e.Code, Field: e.Field, Text: e.Text}, nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	d := api.Decision{PacketID: t.PacketID, Decision: api.Accept, Form: "th-0.4"}
	from, err := m.decideLocked(t, r.Audience)
	if err != nil {
		d.Decision, d.Reason = api.Reject, fault.CodeOf(err)
	}
	if r.Detail && from != nil {
		sum := sha256.Sum256(t.SigningBytes())
		d.Details = &api.Details{
			Valid: err == nil, SignerID: from.id.String(), Fingerprint: from.public.ID().String(),
			SignedAt: t.IssuedAt.String(), Algorithm: t.SignatureAlgo, PayloadHash: "sha256:" + hex.EncodeToString(sum[:]),
			ReasonCode: d.Reason, KeyEpoch: 1, TrustLevel: from.level, Mode: "direct", ViewSize: uint64(len(m.agents)),
		}
	}
	return d, nil
}

func (m *Memory) decideLocked(t *packet.Task, audience string) (*agent, error) {
	to, err := m.findLocked(t.ToAgent)
	if err != nil || to.private == nil {
		return nil, fault.WrongAudience
	}
	if audience != "" {
		if want, err := m.findLocked(audience); err != nil || want != to {
			return nil, fault.WrongAudience
		}
	}
	from, err := m.findLocked(t.FromAgent)
	if err != nil {
		return nil, fault.UnknownAgent
	}
	if t.PublicKeyPEM != from.public.PEM() {
		return from, fault.PublicKeyMismatch
	}
	sig, err := signature.ParseText(from.public.Algorithm(), t.SignatureText)
	if err != nil {
		return from, fault.InvalidSignature
	}
	if err := signature.Verify(from.public, t.SigningBytes(), sig); err != nil {
		return from, err
	}
	if from.status != "active" {
		return from, fault.AgentRevoked
	}
	if err := t.CheckTTL(); err != nil {
		return from, err
	}
	if now := m.clock.Now(); !t.ExpiresAt.Present || now.After(t.ExpiresAt.Instant) {
		return from, fault.Expired
	}
	nonce := from.public.ID().String() + " " + t.Nonce
	if m.spent[nonce] {
		return from, fault.ReplayDetected
	}
	m.spent[nonce] = true
	return from, nil
}

// VerifyPackets decides on many packets.
func (m *Memory) VerifyPackets(ctx context.Context, rs []api.VerifyPacketRequest) []api.VerifyPacketResult {
	out := make([]api.VerifyPacketResult, len(rs))
	for i, r := range rs {
		d, err := m.VerifyPacket(ctx, r)
		if err != nil {
			out[i].Error = api.NewProblem(err)
		} else {
			out[i].Decision = &d
		}
	}
	return out
}

// SignMessage signs arbitrary JSON.
func (m *Memory) SignMessage(_ context.Context, r api.SignMessageRequest) (api.SignMessageReply, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	a, err := m.signerLocked(r.Agent)
	if err != nil {
		return api.SignMessageReply{}, err
	}
	if r.Nonce == "" {
		r.Nonce = rand.Text()
	}
	now := m.clock.Now()
	h := packet.MessageHeader{
		SignerID: a.id, Fingerprint: a.public.ID(), Algorithm: a.public.Algorithm(), Timestamp: now, Seq: a.seq + 1,
		Nonce: r.Nonce, Audience: r.Audience, Grade: "software", KeyEpoch: 1, ViewHead: m.headLocked(),
		ViewSize: uint64(len(m.agents)), Prev: r.Prev,
	}
	if r.TTL > 0 {
		h.ExpiresAt = now.Add(time.Duration(r.TTL) * time.Second)
	}
	u, err := packet.NewMessage(h, r.Payload)
	if err != nil {
		return api.SignMessageReply{}, err
	}
	sig, how := m.signLocked(a, u.SigningBytes())
	msg, err := u.Seal(signature.NewDirect(sig), a.public)
	if err != nil {
		return api.SignMessageReply{}, err
	}
	text, err := msg.JSON()
	return api.SignMessageReply{Message: text, Digest: msg.Digest(), Signed: how}, err
}

// VerifyMessage checks a SignedMessage.
func (m *Memory) VerifyMessage(_ context.Context, r api.VerifyMessageRequest) (api.MessageVerdict, error) {
	msg, err := packet.ParseMessage(r.Message)
	if err != nil {
		e := fault.From(err)
		return api.MessageVerdict{Decision: api.Reject, Reason: e.Code, Field: e.Field, Text: e.Text}, nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.verdictLocked(msg, r)
}

func (m *Memory) verdictLocked(msg *packet.Message, r api.VerifyMessageRequest) (api.MessageVerdict, error) {
	v := api.MessageVerdict{Decision: api.Reject, TrustLevel: "NONE"}
	var key ident.PublicKey
	switch r.Mode {
	case "", api.ModeRegistry:
		a, ok := m.agents[msg.Header().SignerID.String()]
		if !ok {
			v.Reason = fault.UnknownAgent
			return v, nil
		}
		key, v.SignerChecked, v.SignerTrusted, v.TrustLevel = a.public, true, a.status == "active", a.level
	case api.ModeKey:
		k, err := ident.ParsePublicKey(r.Key)
		if err != nil {
			return v, err
		}
		key, v.SignerChecked, v.SignerTrusted = k, true, true
	case api.ModeEmbedded:
		key = msg.PublicKey()
	default:
		return v, fault.BadField("mode", "registry, key or embedded")
	}
	if err := msg.VerifySignature(key, nil); err != nil {
		v.Reason = fault.CodeOf(err)
		return v, nil
	}
	v.SignatureValid = true
	nonce := msg.Header().Fingerprint.String() + " " + msg.Header().Nonce
	switch {
	case v.SignerChecked && !v.SignerTrusted:
		v.Reason = fault.AgentRevoked
	case r.Once && m.spent[nonce]:
		v.Reason = fault.ReplayDetected
	case v.SignerChecked:
		v.Decision = api.Accept
		m.spent[nonce] = m.spent[nonce] || r.Once
	}
	return v, nil
}

// VerifyChain checks that each message names the one before.
func (m *Memory) VerifyChain(_ context.Context, r api.VerifyChainRequest) (api.ChainVerdict, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := api.ChainVerdict{Valid: true}
	var before *packet.Message
	for i, raw := range r.Messages {
		msg, err := packet.ParseMessage(raw)
		if err != nil {
			return api.ChainVerdict{Reason: fault.CodeOf(err), At: i, Messages: out.Messages}, nil
		}
		v, err := m.verdictLocked(msg, api.VerifyMessageRequest{})
		if err != nil {
			return out, err
		}
		out.Messages = append(out.Messages, v)
		if linked := before == nil || msg.Header().Prev == before.Digest() || msg.Holds(before); !linked {
			v.Decision, v.Reason = api.Reject, fault.BrokenChain
		}
		if v.Decision != api.Accept {
			out.Valid, out.Reason, out.At = false, v.Reason, i
			return out, nil
		}
		before = msg
	}
	return out, nil
}

// Whoami says what the socket knows of the caller.
func (m *Memory) Whoami(ctx context.Context, explain bool) (api.Whoami, error) {
	c, err := caller.Require(ctx)
	if err != nil {
		return api.Whoami{}, err
	}
	w := api.Whoami{
		UID: c.UID, GID: c.GID, Groups: c.Groups, PID: c.PID, Exe: c.Exe, Cgroup: c.Cgroup, SystemdUnit: c.Unit,
	}
	if explain {
		w.Explanation = []string{"uid: a boundary", "exe: only narrows"}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(m.agents)) {
		if m.agents[id].private != nil {
			w.Agents = append(w.Agents, api.Grant{AgentID: id, Verbs: []string{api.VerbSign, api.VerbVerify}})
		}
	}
	return w, nil
}

// Capabilities says what there is.
func (m *Memory) Capabilities(ctx context.Context) (api.Capabilities, error) {
	b, err := m.Backends(ctx)
	return api.Capabilities{
		Version: "test", Algorithms: []string{ident.Ed25519.String()}, Backends: b, Formats: []string{"th-0.4"},
		Limits: map[string]int64{"max_body": api.MaxBody, "max_batch": api.MaxBatch, "max_batch_body": api.MaxBatchBody},
	}, err
}

// Identity looks up an agent.
func (m *Memory) Identity(_ context.Context, name string) (api.Identity, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	a, err := m.findLocked(name)
	if err != nil {
		return api.Identity{}, err
	}
	return a.identity(), nil
}

func (a *agent) identity() api.Identity {
	id := a.public.ID().String()
	return api.Identity{
		AgentID: a.id.String(), PublicKey: a.public.Base64(), Fingerprint: id, Metadata: maps.Clone(a.metadata),
		Algorithm: a.public.Algorithm().String(), Aliases: slices.Clone(a.aliases), Lineage: id, Epoch: 1,
		TrustLevel: a.level, Status: a.status, Role: "agent", Grade: "software", Origin: a.origin,
		Possession: a.private != nil, CreatedAt: a.at, ExpiresAt: a.expires, Version: a.version, PEM: a.public.PEM(),
	}
}

// History returns the Merkle root over what the agent signed (RFC 6962).
func (m *Memory) History(_ context.Context, name string) (api.History, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	a, err := m.findLocked(name)
	if err != nil {
		return api.History{}, err
	}
	root := treeHash(a.leaves)
	return api.History{
		AgentID: a.id.String(), Fingerprint: a.public.ID().String(), Sequence: a.seq, Size: uint64(len(a.leaves)),
		Root: "sha256:" + hex.EncodeToString(root[:]),
	}, nil
}

func leafHash(b []byte) [sha256.Size]byte { return sha256.Sum256(append([]byte{0}, b...)) }

func treeHash(leaves [][sha256.Size]byte) [sha256.Size]byte {
	switch n := len(leaves); n {
	case 0:
		return sha256.Sum256(nil)
	case 1:
		return leaves[0]
	default:
		k := 1
		for k*2 < n {
			k *= 2
		}
		l, r := treeHash(leaves[:k]), treeHash(leaves[k:])
		return sha256.Sum256(append(append([]byte{1}, l[:]...), r[:]...))
	}
}

// headLocked names the state of the registry.
func (m *Memory) headLocked() string {
	h := sha256.New()
	for _, id := range slices.Sorted(maps.Keys(m.agents)) {
		h.Write([]byte(strings.Join([]string{id, m.agents[id].public.Base64(), m.agents[id].status, ""}, "\x00")))
	}
	return "sha256:" + hex.EncodeToString(h.Sum(nil))
}

// Health says that all is well.
func (m *Memory) Health(context.Context) (api.Health, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return api.Health{
		Ready: true, Version: "test", Uptime: int64(m.clock.Boot() / time.Second),
		Checks:   []api.HealthCheck{{Name: backendName, Status: "ok"}},
		Registry: api.RegistryHead{Size: uint64(len(m.agents)), Root: m.headLocked()},
	}, nil
}
