package service

import (
	"cmp"
	"context"
	"sync"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/batch"
	"github.com/trustd/trustd/signer/monitor"
)

// A Backend is a key backend under its name in the configuration.
type Backend struct {
	signer.Backend
	Name    string
	Kind    string
	Default bool

	device  *batch.Device // where its requests to sign queue
	monitor *monitor.Monitor
}

// attach gives a backend its queue and its monitor.
func (s *Service) attach(b *Backend) {
	b.monitor = monitor.New(monitor.Config{
		Name: b.Name, Backend: b.Backend, Dir: s.cfg.Canaries, Clock: s.cfg.Clock, Log: s.cfg.Log,
		Line: func(t batch.Target) *batch.Key { return b.device.Key(t) },
	})
	cfg := batch.Config{Observe: b.monitor.Observe}
	if p, ok := b.Backend.(signer.Parallel); ok {
		cfg.Parallel = p.Parallel
	}
	b.device = batch.NewDevice(cfg)
}

// Watch watches the backends until ctx ends. It must have returned before Close.
func (s *Service) Watch(ctx context.Context) error {
	errs := make(chan error, len(s.cfg.Backends))
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for i := range s.cfg.Backends {
		go func() { errs <- s.cfg.Backends[i].monitor.Run(ctx) }()
	}
	var first error
	for range s.cfg.Backends {
		if err := <-errs; err != nil && first == nil {
			first = err
			cancel()
		}
	}
	<-ctx.Done()
	return first
}

// The times for which a device that hangs may keep its state from being told.
const (
	probePatience = 500 * time.Millisecond // of who only wants to know whether the daemon serves
	adminPatience = 2 * time.Second
	startPatience = 5 * time.Second // from the start, until the daemon has looked at its devices once
	freshFor      = time.Second     // a description that is younger is not asked for again
)

// describeAll describes all backends at once. One whose device hangs costs no more than the patience.
func (s *Service) describeAll(ctx context.Context, patience time.Duration) []api.Backend {
	out := make([]api.Backend, len(s.cfg.Backends))
	var wg sync.WaitGroup
	for i := range s.cfg.Backends {
		wg.Go(func() { out[i] = s.describe(ctx, &s.cfg.Backends[i], patience) })
	}
	wg.Wait()
	return out
}

// describe returns what is known of a backend, after asking it where that is some time ago.
func (s *Service) describe(ctx context.Context, b *Backend, patience time.Duration) api.Backend {
	if !b.monitor.Running() {
		return DescribeBackend(ctx, b)
	}
	start, cancel := context.WithTimeout(ctx, startPatience-(s.cfg.Clock.Boot()-s.started))
	select {
	case <-b.monitor.Judged():
	case <-start.Done():
	}
	cancel()
	ask, cancel := context.WithTimeout(ctx, patience)
	b.monitor.Refresh(ask, freshFor)
	cancel()
	st := b.monitor.Status()
	out := b.Explain(st.Device)
	out.State, out.Problem, out.Remedy = string(st.State), st.Problem, st.Remedy
	out.Since, out.LastSignature = timeOf(st.Since), timeOf(st.LastSignature)
	out.Waiting, out.Restarts = int64(b.device.Waiting()), int64(st.Restarts)
	out.Failures = map[string]int64{}
	for c, n := range st.Failures {
		if n > 0 {
			out.Failures[string(c)] = int64(n)
		}
	}
	out.Signatures = &api.SignatureCounts{Direct: int64(st.Direct), Batches: int64(st.Batches), Batched: int64(st.Batched)}
	out.Canary = &api.Canary{KeyID: st.CanaryKey, Fingerprint: st.CanaryPublic, Gone: st.CanaryGone,
		Signed: int64(st.Canaries - st.CanariesFailed), Failed: int64(st.CanariesFailed), Took: st.CanaryTook.Microseconds()}
	return out
}

func timeOf(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

// DescribeBackend asks a backend that nobody watches what it is and can do.
func DescribeBackend(ctx context.Context, b *Backend) api.Backend { return b.Explain(b.Describe(ctx)) }

// Explain returns a description as it is shown.
func (b *Backend) Explain(d signer.Description) api.Backend {
	out := api.Backend{
		Name: b.Name, Kind: cmp.Or(b.Kind, d.Kind), Device: d.Device, Default: b.Default, State: string(d.State),
		Grade: string(d.Grade), Mechanisms: d.Mechanisms, Limits: d.Limits, Problem: d.Problem, Remedy: d.Remedy,
		Algorithms: make([]string, len(d.Algorithms)),
	}
	for i, a := range d.Algorithms {
		out.Algorithms[i] = a.String()
	}
	return out
}

// Backends describes all backends.
func (s *Service) Backends(ctx context.Context) ([]api.Backend, error) {
	return s.describeAll(ctx, adminPatience), nil
}

// named returns the backend of that name.
func (s *Service) named(name string) (*Backend, error) {
	if name == "" {
		return nil, fault.BadField("name", "a backend is named")
	}
	return s.backend(name)
}

// ShowBackend describes one backend.
func (s *Service) ShowBackend(ctx context.Context, name string) (api.Backend, error) {
	b, err := s.named(name)
	if err != nil {
		return api.Backend{}, err
	}
	return s.describe(ctx, b, adminPatience), nil
}

// UnlockBackend has a backend try once more what its device has refused.
func (s *Service) UnlockBackend(ctx context.Context, name string) (api.Backend, error) {
	b, err := s.named(name)
	if err != nil {
		return api.Backend{}, err
	}
	if err := b.monitor.Unlock(ctx); err != nil {
		s.cfg.Log.Warn("a backend was not unlocked", "backend", b.Name, "error", fault.From(err).Verbose())
		return api.Backend{}, err
	}
	s.cfg.Log.Info("an operator unlocked a backend", "backend", b.Name)
	return s.describe(ctx, b, adminPatience), nil
}

// ResetCanary takes a backend's device as it is: where it does not hold the canary key any more, another is made.
func (s *Service) ResetCanary(ctx context.Context, name string) (api.Backend, error) {
	b, err := s.named(name)
	if err != nil {
		return api.Backend{}, err
	}
	if err := b.monitor.ResetCanary(ctx); err != nil {
		return api.Backend{}, err
	}
	// The operator has said that this device counts: what it does not hold is lost, and shown so from now on.
	for _, e := range s.cfg.Keyring.All() {
		if e.Backend != b.Name || e.Orphaned != nil {
			continue
		}
		if err := s.try(ctx, b, e); monitor.Gone(err) {
			_ = s.lost(ctx, e, err) // it logs what it marks
		}
	}
	return s.describe(ctx, b, adminPatience), nil
}

// BackendFigures are what the metrics show of a backend.
type BackendFigures struct {
	Name    string
	Waiting int
	monitor.Status
}

// Figures are what the metrics show of a service.
type Figures struct {
	Agents, Records, Keys, Nonces int
	Backends                      []BackendFigures
	Alerts                        map[string]int // by kind, every kind
}

// Figures returns the current figures. It talks to no device.
func (s *Service) Figures() Figures {
	st := s.cfg.Views.Load().Registry
	size, _ := st.Head()
	f := Figures{
		Agents: st.Len(), Records: int(size), Keys: len(s.cfg.Keyring.All()), Nonces: s.cfg.Spend.Len(), Alerts: map[string]int{},
	}
	for i := range s.cfg.Backends {
		b := &s.cfg.Backends[i]
		f.Backends = append(f.Backends, BackendFigures{Name: b.Name, Waiting: b.device.Waiting(), Status: b.monitor.Status()})
	}
	for _, kind := range alertKinds {
		f.Alerts[kind] = 0
	}
	for _, a := range s.alerts() {
		f.Alerts[a.Kind]++
	}
	return f
}
