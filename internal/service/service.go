// Package service is what a trustd does: it implements api.Agent and api.Admin over the registry, the keyring, the
// key backends, the signature history and the store of spent nonces. It owns no goroutine and no file; the daemon
// opens what it stands on.
package service

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/caller"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/clock"
	"github.com/trustd/trustd/internal/keyring"
	"github.com/trustd/trustd/registry"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/batch"
	"github.com/trustd/trustd/signer/history"
	"github.com/trustd/trustd/spend"
	"github.com/trustd/trustd/verify"
	"github.com/trustd/trustd/view"
)

// A Registry judges records and makes the accepted ones durable. The local journal is one; a replicated log will
// be another.
type Registry interface {
	State() *registry.State
	Submit(ctx context.Context, r registry.Record) (registry.Outcome, error)
}

// Config is what a Service stands on. Every field is needed, but MinGrade.
type Config struct {
	Version   string
	Registry  Registry
	Views     *view.Holder
	Keyring   *keyring.Keyring
	Backends  []Backend // in the configuration's order
	History   *history.Store
	Spend     *spend.Store
	MaxNonces int // what Spend holds at most
	Clock     clock.Clock
	Policy    verify.Policy
	Log       *slog.Logger
	Canaries  string       // folder of the records of canary keys
	MinGrade  signer.Grade // of keys of this host; "" is any
}

// A Service implements api.Agent and api.Admin. It is safe for concurrent use.
type Service struct {
	cfg     Config
	started time.Duration // boot clock

	keysMu sync.Mutex // guards keys; never held while a device works
	keys   map[ident.AgentID]*openKey
	roots  *signature.Roots

	admin sync.Mutex      // one change of agents at a time
	noted map[string]bool // alerts that were logged; the settler's own
}

// An openKey is a key that its backend has found and checked. Everything it signs enters its history first.
type openKey struct {
	id      signer.ID
	grade   signer.Grade
	history *history.Signer
	line    *batch.Key // over history
}

// signRecord signs a record, directly: records are never batched. It waits its turn like all that the device signs.
func (k *openKey) signRecord(ctx context.Context, msg []byte) ([]byte, error) {
	out := k.line.Sign(ctx, batch.Caller{}, []batch.Item{{Subject: signature.Subject{Message: msg}}})
	return out[0].Signature.Raw(), out[0].Err
}

// rootsKept bounds the batches whose signature is remembered to be good: about 200 bytes each.
const rootsKept = 16384

// New returns a service. It starts nothing.
func New(c Config) *Service {
	s := &Service{cfg: c, started: c.Clock.Boot(), keys: map[ident.AgentID]*openKey{}, roots: signature.NewRoots(rootsKept)}
	s.cfg.Backends = slices.Clone(c.Backends)
	for i := range s.cfg.Backends {
		s.attach(&s.cfg.Backends[i])
	}
	return s
}

// Close refuses further requests to sign and waits for the devices to finish those under way.
func (s *Service) Close() error {
	var errs []error
	for i := range s.cfg.Backends {
		errs = append(errs, s.cfg.Backends[i].device.Close())
	}
	return errors.Join(errs...)
}

var (
	_ api.Agent = (*Service)(nil)
	_ api.Admin = (*Service)(nil)
)

// backend returns the backend of that name, or the default one for "".
func (s *Service) backend(name string) (*Backend, error) {
	for i := range s.cfg.Backends {
		b := &s.cfg.Backends[i]
		if b.Name == name || name == "" && b.Default {
			return b, nil
		}
	}
	if name == "" {
		return nil, &fault.Error{Code: fault.NotFound, Field: "backend", Text: "no backend is the default",
			Hint: "Name one with --backend, or mark one default = true in the configuration."}
	}
	return nil, &fault.Error{Code: fault.NotFound, Field: "backend", Text: "no backend has that name",
		Hint: "See trustd backend list."}
}

// open returns the key of an entry, from the cache or from its backend. A key that its device lost is refused without
// asking the device.
func (s *Service) open(ctx context.Context, e *keyring.Entry) (*openKey, error) {
	if e.Orphaned != nil {
		return nil, fault.New(fault.KeyOrphaned, "")
	}
	id := e.ID()
	s.keysMu.Lock()
	k, ok := s.keys[e.AgentID]
	s.keysMu.Unlock()
	if ok && k.id == id {
		return k, nil
	}
	b, err := s.backend(e.Backend)
	if err != nil {
		return nil, fault.Wrap(fault.Unavailable, err, "the backend of this agent's key is not in the configuration")
	}
	device, err := b.Open(ctx, id, e.Public)
	if err != nil {
		b.monitor.Report(err)
		return nil, s.lost(ctx, e, err)
	}
	return s.keep(e.AgentID, s.line(b, device)), nil
}

// keep notes an open key, and returns the one to use: that of another request which was quicker.
func (s *Service) keep(id ident.AgentID, k *openKey) *openKey {
	s.keysMu.Lock()
	defer s.keysMu.Unlock()
	if now, ok := s.keys[id]; ok && now.id == k.id {
		return now
	}
	s.keys[id] = k
	return k
}

// line puts a key behind its history and into its device's queue.
func (s *Service) line(b *Backend, key signer.Key) *openKey {
	h := s.cfg.History.Wrap(key)
	return &openKey{id: key.Info().ID, grade: key.Info().Grade, history: h, line: b.device.Key(h)}
}

// forget drops a cached key, so that the next use finds it anew.
func (s *Service) forget(id ident.AgentID) {
	s.keysMu.Lock()
	delete(s.keys, id)
	s.keysMu.Unlock()
}

// callerOf returns who asks. A request that came over no socket has no caller and is refused.
func callerOf(ctx context.Context) (*caller.Caller, error) {
	c, ok := caller.FromContext(ctx)
	if !ok {
		return nil, fault.New(fault.CallerUnknown, "the request did not come over a socket")
	}
	return c, nil
}

// resolve finds an agent by id, alias or fingerprint.
func resolve(st *registry.State, name string) (registry.Agent, error) {
	if id, err := ident.ParseAgentID(name); err == nil {
		if a, ok := st.Agent(id); ok {
			return a, nil
		}
	} else if k, err := ident.ParseKeyID(name); err == nil {
		if a, _, ok := st.ByKey(k); ok {
			return a, nil
		}
	} else if _, err := ident.ParseAlias(name); err == nil {
		if a, ok := st.ByAlias(name); ok {
			return a, nil
		}
	} else {
		return registry.Agent{}, fault.BadField("name", "not an agent id, an alias or a fingerprint")
	}
	return registry.Agent{}, fault.New(fault.NotFound, "the registry knows no agent of that name")
}

// actor returns the local agent that the caller names, or the only one it may use, with its entry and its place
// in the registry. The verb is checked against the entry's bindings.
func (s *Service) actor(ctx context.Context, name, verb string) (*keyring.Entry, registry.Agent, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, registry.Agent{}, err
	}
	st := s.cfg.Views.Load().Registry
	if name == "" {
		return s.onlyActor(c, st, verb)
	}
	a, err := resolve(st, name)
	if err != nil {
		return nil, registry.Agent{}, err
	}
	e, held := s.cfg.Keyring.Get(a.ID)
	if !held {
		return nil, registry.Agent{}, fault.New(fault.NoPrivateKey, "")
	}
	if !caller.MatchAny(e.Bindings, c, verb) {
		return nil, registry.Agent{}, fault.New(fault.Denied, "this caller may not %s as that agent", verb)
	}
	return e, a, agree(e, a)
}

// agree refuses an entry that is not what the registry says of the agent: the registry's word counts, and a file
// that says otherwise was not written by this program.
func agree(e *keyring.Entry, a registry.Agent) error {
	if e.Role != string(a.Role) || !e.Public.Equal(a.Current().Public) {
		return fault.New(fault.Corrupt, "the keyring and the registry disagree about this agent")
	}
	return nil
}

func (s *Service) onlyActor(c *caller.Caller, st *registry.State, verb string) (*keyring.Entry, registry.Agent, error) {
	var found *keyring.Entry
	for _, e := range s.cfg.Keyring.All() {
		if e.Role != roleAgent || !caller.MatchAny(e.Bindings, c, verb) {
			continue
		}
		if found != nil {
			return nil, registry.Agent{}, &fault.Error{Code: fault.Malformed, Field: "agent",
				Text: "this caller may act as several agents; name one"}
		}
		found = e
	}
	if found == nil {
		return nil, registry.Agent{}, fault.New(fault.Denied, "this caller may not %s as any agent", verb)
	}
	a, ok := st.Agent(found.AgentID)
	if !ok {
		return nil, registry.Agent{}, fault.New(fault.UnknownAgent, "")
	}
	return found, a, agree(found, a)
}

// roleAgent is the role of an entry that packets are signed with.
const roleAgent = "agent"

// usable refuses an agent that others would refuse: signing for it would only mislead its caller.
func (s *Service) usable(a registry.Agent) error {
	switch a.Status(s.cfg.Clock.Now()) {
	case registry.Active:
		return nil
	case registry.Revoked:
		return fault.New(fault.AgentRevoked, "")
	case registry.Gone:
		return fault.New(fault.AgentRemoved, "")
	case registry.Expired:
		return fault.New(fault.AgentExpired, "")
	}
	return fault.New(fault.Internal, "")
}

// randomText returns n random bytes in base64url.
func randomText(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	return base64.RawURLEncoding.EncodeToString(b)
}

// digestText returns a digest as it is shown everywhere.
func digestText(d [32]byte) string { return "sha256:" + hex.EncodeToString(d[:]) }
