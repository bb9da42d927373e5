// Package daemon puts a trustd together: it opens each part after those it stands on, runs them, and closes them in
// the opposite order. It is the only package that sees all others, and it decides nothing.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/trustd/trustd/api/server"
	"github.com/trustd/trustd/caller"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/clock"
	"github.com/trustd/trustd/internal/config"
	"github.com/trustd/trustd/internal/durable"
	"github.com/trustd/trustd/internal/keyring"
	"github.com/trustd/trustd/internal/service"
	"github.com/trustd/trustd/registry"
	"github.com/trustd/trustd/registry/journal"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/history"
	"github.com/trustd/trustd/spend"
	"github.com/trustd/trustd/view"
)

// stopGrace bounds how long a stop waits for what is in flight.
const stopGrace = 20 * time.Second

// Options are what a run is told besides its configuration.
type Options struct {
	Version string
	Log     *slog.Logger
	// Ready, if set, is called once both sockets accept connections.
	Ready func()
}

// Run runs the daemon until ctx ends or a part of it fails. A backend that is missing or broken is neither: it is
// reported, and the others serve.
func Run(ctx context.Context, c *config.Config, o Options) (err error) {
	st, err := openState(c, clock.System())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, st.Close()) }()

	if !st.journal.State().Initialised() {
		return fault.New(fault.NotInitialised, "the state folder %s holds no genesis record", c.StateDir)
	}
	if err := pinned(c, st.journal.State()); err != nil {
		return err
	}
	backends, err := openBackends(c, o.Log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, backends.Close()) }()

	svc := service.New(service.Config{
		Version: o.Version, Registry: st.journal, Views: st.views, Keyring: st.keyring, Backends: backends.list,
		History: st.history, Spend: st.spend, Clock: st.clock, Policy: c.VerifyPolicy(), Log: o.Log, MaxNonces: c.Verify.MaxNonces,
		Canaries: canaryDir(c), MinGrade: signer.Grade(c.Keys.MinGrade),
	})
	defer func() { err = errors.Join(err, svc.Close()) }()
	sockets, err := listen(c)
	if err != nil {
		return err
	}
	defer sockets.Close()

	// The devices outlive the sockets: a stop first finishes what is in flight.
	work, stopWork := context.WithCancel(context.WithoutCancel(ctx))
	defer stopWork()
	g, work := errgroup.WithContext(work)
	backends.run(work, g)
	g.Go(func() error { return svc.Settle(work) })
	watch, stopWatch := context.WithCancel(work)
	defer stopWatch()
	watched := make(chan struct{})
	g.Go(func() error {
		defer close(watched)
		return svc.Watch(watch)
	})

	servers := newServers(ctx, svc, c, o)
	for i, l := range []net.Listener{sockets.agent, sockets.admin} {
		g.Go(func() error {
			if err := servers[i].Serve(l); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("serving %s: %w", l.Addr(), err)
			}
			return nil
		})
	}
	g.Go(func() error { return watchdog(work, c.AgentSocketPath()) })
	notify("READY=1")
	o.Log.Info("ready", "agent_socket", sockets.agent.Addr().String(), "admin_socket", sockets.admin.Addr().String(),
		"backends", len(backends.list))
	if o.Ready != nil {
		o.Ready()
	}

	select {
	case <-ctx.Done():
	case <-work.Done(): // a part failed; Wait returns why
	}
	notify("STOPPING=1")
	o.Log.Info("stopping")
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopGrace)
	defer cancel()
	for _, s := range servers {
		if err := s.Shutdown(grace); err != nil {
			o.Log.Warn("stop cut off requests in flight", "error", err)
			_ = s.Close()
		}
	}
	stopWatch() // before the devices: what was never asked for must not look like a failure
	<-watched
	stopWork()
	return g.Wait()
}

// newServers returns the servers of the agent and the admin socket.
func newServers(ctx context.Context, svc *service.Service, c *config.Config, o Options) []*http.Server {
	front := server.Config{
		Agent: svc, Log: o.Log, Limiter: caller.NewLimiter(c.Limits.Caller()), Metrics: newMetrics(svc), Version: o.Version,
		Draining: ctx.Done(), Budget: server.NewBudget(),
	}
	back := front
	back.Admin = svc
	return []*http.Server{server.HTTPServer(server.New(front)), server.HTTPServer(server.New(back))}
}

// canaryDir is where the records of the canary keys are.
func canaryDir(c *config.Config) string { return filepath.Join(c.StateDir, "canaries") }

func keyringDir(c *config.Config) string { return filepath.Join(c.StateDir, "keyring") }

// registryPath is where the registry's records are.
func registryPath(c *config.Config) string { return filepath.Join(c.StateDir, "registry.log") }

// pinned refuses a registry that is not the one that the configuration names: whoever could write in the state folder
// could have founded another.
func pinned(c *config.Config, r *registry.State) error {
	if c.ClusterID == "" || c.ClusterID == r.ClusterID().String() {
		return nil
	}
	return &fault.Error{Code: fault.Corrupt, Field: "cluster_id", Text: "the registry in the state folder is another authority's",
		Hint: "Restore the state folder, or correct cluster_id in the configuration."}
}

// A state is what the daemon keeps on disk.
type state struct {
	clock   clock.Clock
	views   *view.Holder
	keyring *keyring.Keyring
	journal *journal.Journal
	history *history.Store
	spend   *spend.Store
}

// openState opens the state folder. The journal is locked, so that two daemons cannot share one.
func openState(c *config.Config, clk clock.Clock) (*state, error) {
	if err := durable.MkdirAll(c.StateDir); err != nil {
		return nil, fmt.Errorf("making the state folder: %w", err)
	}
	s := &state{clock: clk, views: new(view.Holder)}
	var err error
	if s.journal, err = journal.Open(registryPath(c), clk.Now); err != nil {
		return nil, fmt.Errorf("opening the registry: %w", err)
	}
	if err := sweepPlugins(c.StateDir); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	publish := func(r *registry.State) { s.views.Store(&view.View{Registry: r}) }
	publish(s.journal.State())
	s.journal.OnChange(publish)
	if s.keyring, err = keyring.Open(keyringDir(c)); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	if s.history, err = history.Open(filepath.Join(c.StateDir, "history"), c.HistoryConfig()); err != nil {
		return nil, errors.Join(fmt.Errorf("opening the signature history: %w", err), s.Close())
	}
	if s.spend, err = spend.Open(filepath.Join(c.StateDir, "spend"), spend.Config{Clock: clk, Max: c.Verify.MaxNonces}); err != nil {
		return nil, errors.Join(fmt.Errorf("opening the store of spent nonces: %w", err), s.Close())
	}
	return s, nil
}

// Close closes what is open, in the opposite order.
func (s *state) Close() error {
	var errs []error
	if s.spend != nil {
		errs = append(errs, s.spend.Close())
	}
	if s.history != nil {
		errs = append(errs, s.history.Close())
	}
	if s.journal != nil {
		errs = append(errs, s.journal.Close())
	}
	return errors.Join(errs...)
}
