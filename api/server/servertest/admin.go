package servertest

import (
	"cmp"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ed25519"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"maps"
	"slices"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
)

// AddAgent makes a key and registers an agent.
func (m *Memory) AddAgent(_ context.Context, r api.AddAgentRequest) (api.AgentDetail, error) {
	if r.Algorithm != "" && r.Algorithm != ident.Ed25519.String() {
		return api.AgentDetail{}, fault.New(fault.AlgorithmUnsupported, "the memory makes ed25519 keys only")
	}
	if r.Backend != "" && r.Backend != backendName {
		return api.AgentDetail{}, fault.BadField("backend", "there is no such backend")
	}
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return api.AgentDetail{}, err
	}
	return m.add(r, private, private.Public().(ed25519.PublicKey), "generated_on_device")
}

func (m *Memory) add(
	r api.AddAgentRequest, private ed25519.PrivateKey, public ed25519.PublicKey, origin string,
) (api.AgentDetail, error) {
	id, err := ident.ParseAgentID(r.AgentID)
	if err != nil {
		return api.AgentDetail{}, err
	}
	pub, err := ident.NewPublicKey(public)
	if err != nil {
		return api.AgentDetail{}, err
	}
	aliases := []string{ident.DerivedAlias(pub).String()}
	for _, text := range r.Aliases {
		a, err := ident.ParseAlias(text)
		if err != nil || a.Derived() {
			return api.AgentDetail{}, fault.BadField("aliases", "not an alias that can be asked for")
		}
		aliases = append(aliases, text)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, name := range append(aliases, id.String()) {
		if _, err := m.findLocked(name); err == nil {
			return api.AgentDetail{}, fault.New(fault.AlreadyExists, "the name is taken")
		}
	}
	if r.Level == "" {
		r.Level = "LOW"
	}
	a := &agent{
		id: id, public: pub, private: private, origin: origin, aliases: aliases, metadata: maps.Clone(r.Metadata),
		bindings: slices.Clone(r.Bindings), level: r.Level, status: "active",
		at: m.clock.Now(), expires: r.ExpiresAt, version: 1,
	}
	m.agents[id.String()] = a
	return a.detail(), nil
}

func (a *agent) detail() api.AgentDetail {
	d := api.AgentDetail{Identity: a.identity(), Local: a.private != nil, Bindings: slices.Clone(a.bindings)}
	if d.Local {
		d.Backend, d.KeyURI, d.KeyState = backendName, a.uri(), "ready"
		d.Batching = cmp.Or(a.batching, api.BatchingOnRequest)
	}
	return d
}

func (a *agent) uri() string { return "soft:id=" + a.public.ID().Short() }

// ListAgents lists all agents by id.
func (m *Memory) ListAgents(context.Context) ([]api.AgentDetail, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []api.AgentDetail
	for _, id := range slices.Sorted(maps.Keys(m.agents)) {
		out = append(out, m.agents[id].detail())
	}
	return out, nil
}

// ShowAgent returns one agent.
func (m *Memory) ShowAgent(_ context.Context, name string) (api.AgentDetail, error) {
	return m.change(name, func(*agent) {})
}

// RemoveAgent destroys the key.
func (m *Memory) RemoveAgent(_ context.Context, name string, r api.RemoveAgentRequest) (api.AgentDetail, error) {
	return m.change(name, func(a *agent) {
		a.status, a.version = "removed", a.version+1
		if !r.KeepKey {
			a.private = nil
		}
	})
}

// RevokeAgent keeps the key.
func (m *Memory) RevokeAgent(_ context.Context, name string, r api.RevokeAgentRequest) (api.AgentDetail, error) {
	codes := []string{"", "key_compromise", "superseded", "decommissioned", "privilege_withdrawn"}
	if !slices.Contains(codes, r.Code) {
		return api.AgentDetail{}, fault.BadField("code", "there is no such code")
	}
	return m.change(name, func(a *agent) { a.status, a.version = "revoked", a.version+1 })
}

func (m *Memory) change(name string, f func(*agent)) (api.AgentDetail, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	a, err := m.findLocked(name)
	if err != nil {
		return api.AgentDetail{}, err
	}
	f(a)
	return a.detail(), nil
}

// ImportAgent takes in a public identity, or a key that ExportPrivate gave out.
func (m *Memory) ImportAgent(_ context.Context, r api.ImportAgentRequest) (api.AgentDetail, error) {
	add := api.AddAgentRequest{
		AgentID: r.AgentID, Aliases: r.Aliases, Metadata: r.Metadata, Level: r.Level, Bindings: r.Bindings,
	}
	if r.Private != "" {
		private, err := open(r.Private, r.Passphrase)
		if err != nil {
			return api.AgentDetail{}, err
		}
		return m.add(add, private, private.Public().(ed25519.PublicKey), "imported")
	}
	var public struct {
		AgentID     string `json:"agent_id"`
		PublicKey   string `json:"public_key"`
		Fingerprint string `json:"fingerprint"`
	}
	if err := json.Unmarshal(r.Public, &public); err != nil {
		return api.AgentDetail{}, fault.BadField("public", "not an exported identity")
	}
	key, err := ident.ParsePublicKey(public.PublicKey)
	if err != nil {
		return api.AgentDetail{}, err
	}
	if key.ID().String() != public.Fingerprint {
		return api.AgentDetail{}, fault.New(fault.FingerprintMismatch, "")
	}
	raw, ok := key.Key().(ed25519.PublicKey)
	if !ok {
		return api.AgentDetail{}, fault.New(fault.AlgorithmUnsupported, "the memory knows ed25519 keys only")
	}
	if add.AgentID == "" {
		add.AgentID = public.AgentID
	}
	return m.add(add, nil, raw, "unknown")
}

const sealedType = "TRUSTD TEST KEY"

// sealer returns the cipher that a passphrase opens.
func sealer(passphrase string, salt []byte) (cipher.AEAD, error) {
	key, err := pbkdf2.Key(sha256.New, passphrase, salt, 1000, 32)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

func open(text, passphrase string) (ed25519.PrivateKey, error) {
	block, _ := pem.Decode([]byte(text))
	if block == nil || block.Type != sealedType || len(block.Bytes) < 16 {
		return nil, fault.BadField("private", "not a key that was exported here")
	}
	aead, err := sealer(passphrase, block.Bytes[:16])
	if err != nil {
		return nil, err
	}
	der, err := aead.Open(nil, nil, block.Bytes[16:], nil)
	if err != nil {
		return nil, fault.Wrap(fault.WrongPassphrase, err, "")
	}
	key, err := x509.ParsePKCS8PrivateKey(der)
	private, ok := key.(ed25519.PrivateKey)
	if err != nil || !ok {
		return nil, fault.Wrap(fault.Malformed, err, "not an ed25519 key")
	}
	return private, nil
}

// ExportPrivate returns a key under a passphrase, in a form of this package's own.
func (m *Memory) ExportPrivate(
	_ context.Context, name string, r api.ExportPrivateRequest,
) (api.ExportPrivateReply, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	a, err := m.findLocked(name)
	if err != nil {
		return api.ExportPrivateReply{}, err
	}
	if a.private == nil {
		return api.ExportPrivateReply{}, fault.New(fault.NoPrivateKey, "")
	}
	der, err := x509.MarshalPKCS8PrivateKey(a.private)
	if err != nil {
		return api.ExportPrivateReply{}, err
	}
	salt := make([]byte, 16)
	rand.Read(salt)
	aead, err := sealer(r.Passphrase, salt)
	if err != nil {
		return api.ExportPrivateReply{}, err
	}
	sealed := pem.EncodeToMemory(&pem.Block{Type: sealedType, Bytes: aead.Seal(salt, nil, der, nil)})
	return api.ExportPrivateReply{Format: "pem", Data: string(sealed)}, nil
}

// ListKeys lists the keys in memory.
func (m *Memory) ListKeys(context.Context) ([]api.Key, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []api.Key
	for _, id := range slices.Sorted(maps.Keys(m.agents)) {
		if a := m.agents[id]; a.private != nil {
			out = append(out, api.Key{
				URI: a.uri(), Backend: backendName, Fingerprint: a.public.ID().String(),
				Algorithm: a.public.Algorithm().String(), Grade: "software", Origin: a.origin, Extractable: true, UsedBy: id,
				State: "ready",
			})
		}
	}
	return out, nil
}

// SetAgent keeps the setting.
func (m *Memory) SetAgent(_ context.Context, name string, r api.SetAgentRequest) (api.AgentDetail, error) {
	if !slices.Contains([]string{"", api.BatchingOnRequest, api.BatchingAlways, api.BatchingNever}, r.Batching) {
		return api.AgentDetail{}, fault.BadField("batching", "on-request, always or never")
	}
	return m.change(name, func(a *agent) {
		if r.Batching != "" {
			a.batching = r.Batching
		}
	})
}

// RecheckKey finds the key where it is.
func (m *Memory) RecheckKey(_ context.Context, name string) (api.AgentDetail, error) {
	d, err := m.change(name, func(*agent) {})
	if err == nil && !d.Local {
		err = fault.New(fault.NoPrivateKey, "")
	}
	return d, err
}

// ShowBackend shows the one backend.
func (m *Memory) ShowBackend(ctx context.Context, name string) (api.Backend, error) {
	if name != backendName {
		return api.Backend{}, fault.New(fault.NotFound, "there is no such backend")
	}
	all, err := m.Backends(ctx)
	return all[0], err
}

// UnlockBackend finds nothing locked.
func (m *Memory) UnlockBackend(ctx context.Context, name string) (api.Backend, error) {
	return m.ShowBackend(ctx, name)
}

// ResetCanary finds the canary key in its place.
func (m *Memory) ResetCanary(ctx context.Context, name string) (api.Backend, error) {
	return m.ShowBackend(ctx, name)
}

// Backends lists the one backend.
func (m *Memory) Backends(context.Context) ([]api.Backend, error) {
	return []api.Backend{{
		Name: backendName, Kind: "soft", Device: "memory", Default: true, State: "ready", Grade: "software",
		Algorithms: []string{ident.Ed25519.String()}, Failures: map[string]int64{"token_lost": 1},
		Signatures: &api.SignatureCounts{Direct: 2}, Canary: &api.Canary{KeyID: "00", Signed: 1},
	}}, nil
}
