package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"golang.org/x/sync/errgroup"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/internal/config"
	"github.com/trustd/trustd/internal/durable"
	"github.com/trustd/trustd/internal/service"
	"github.com/trustd/trustd/plugins"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/soft"
	"github.com/trustd/trustd/signer/tpm"
)

// A backendSet is the configured backends. Those that supervise something run until the set is closed.
type backendSet struct {
	list    []service.Backend
	runners []func(context.Context) error
}

// pluginDir is the folder, inside the state folder, of the plugins' sockets.
const pluginDir = "plugins"

// sweepPlugins empties that folder of what a killed daemon left in it. The caller holds the state folder.
func sweepPlugins(stateDir string) error {
	dir := filepath.Join(stateDir, pluginDir)
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("clearing the plugins' folder: %w", err)
	}
	return durable.MkdirAll(dir)
}

// socketDir returns that folder, or "" for the system's, where the state folder was never used: a diagnosis makes
// nothing there.
func socketDir(stateDir string) string {
	dir := filepath.Join(stateDir, pluginDir)
	if _, err := os.Stat(dir); err != nil {
		return ""
	}
	return dir
}

// openBackends makes the backends. None is opened here: a device that is missing is the backend's to report.
func openBackends(c *config.Config, log *slog.Logger) (*backendSet, error) {
	set := new(backendSet)
	for _, b := range c.Backends {
		be, run, err := openBackend(b, c.StateDir, log)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("backend %s: %w", b.Name, err), set.Close())
		}
		// An only backend needs no mark, unless it is a soft one: those are chosen by name alone.
		def := b.Default || len(c.Backends) == 1 && b.Kind != config.Soft
		set.list = append(set.list, service.Backend{Backend: be, Name: b.Name, Kind: b.Kind, Default: def})
		if run != nil {
			set.runners = append(set.runners, run)
		}
	}
	return set, nil
}

func openBackend(b config.Backend, stateDir string, log *slog.Logger) (signer.Backend, func(context.Context) error, error) {
	switch b.Kind {
	case config.PKCS11, config.Plugin:
		h, err := openPlugin(b, stateDir, log)
		if err != nil {
			return nil, nil, err
		}
		return h, h.Run, nil
	case config.TPM:
		dir := b.Dir
		if dir == "" {
			dir = filepath.Join(stateDir, "tpm", b.Name)
		}
		t, err := tpm.Open(tpm.Config{Device: b.Device, Dir: dir, Log: log.With("backend", b.Name), CommandTimeout: b.Deadline.Duration()})
		if err != nil {
			return nil, nil, err
		}
		return t, nil, nil
	case config.Soft:
		dir := b.Dir
		if dir == "" {
			dir = filepath.Join(stateDir, "soft", b.Name)
		}
		cfg := soft.Config{Dir: dir}
		if !b.Passphrase.IsZero() {
			cfg.Passphrase = b.Passphrase.Read
		}
		s, err := soft.Open(cfg)
		if err != nil {
			return nil, nil, err
		}
		return s, nil, nil
	}
	return nil, nil, fmt.Errorf("the kind %q is not known", b.Kind)
}

func openPlugin(b config.Backend, stateDir string, log *slog.Logger) (*plugins.Host, error) {
	bin, err := pluginPath(b.Plugin)
	if err != nil {
		return nil, err
	}
	c := plugins.Config{
		Name: b.Name, Binary: bin, SHA256: b.PluginSHA256, Dev: b.Dev, Kind: b.Kind, Settings: b.Settings, Env: b.Env, Log: log,
		Deadline: b.Deadline.Duration(), SocketDir: socketDir(stateDir),
		Limits: plugins.Limits{Memory: int64(b.MemoryLimit) << 20, OpenFiles: uint64(b.OpenFiles)},
	}
	if !b.PIN.IsZero() {
		c.PIN = b.PIN.Read
	}
	if b.Kind == config.PKCS11 {
		c.Settings = map[string]string{"module": b.Module, "token": b.Token, "serial": b.Serial}
		c.Verified = b.Plugin == "" // trustd-pkcs11 does it, in the same process as the module
	}
	if b.Dev {
		log.Warn("the plugin is started without a checksum; dev = true is for those who write one", "backend", b.Name)
	}
	return plugins.New(c), nil
}

// pluginPath finds the plugin: where it was told, or beside this program.
func pluginPath(path string) (string, error) {
	if path != "" {
		return path, nil
	}
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("finding this program: %w", err)
	}
	return filepath.Join(filepath.Dir(self), "trustd-pkcs11"), nil
}

// run starts what supervises the backends.
func (s *backendSet) run(ctx context.Context, g *errgroup.Group) {
	for _, r := range s.runners {
		g.Go(func() error { return r(ctx) })
	}
}

// Close closes every backend, last first.
func (s *backendSet) Close() error {
	var errs []error
	for i := len(s.list) - 1; i >= 0; i-- {
		errs = append(errs, s.list[i].Close())
	}
	return errors.Join(errs...)
}

// with opens the backends of a configuration for one piece of work without a daemon, such as trustd init.
func with(ctx context.Context, c *config.Config, log *slog.Logger, fn func(context.Context, *backendSet) error) (err error) {
	set, err := openBackends(c, log)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	g, ctx := errgroup.WithContext(ctx)
	set.run(ctx, g)
	err = fn(ctx, set)
	stop()
	if werr := g.Wait(); werr != nil && !errors.Is(werr, context.Canceled) {
		err = errors.Join(err, werr)
	}
	return errors.Join(err, set.Close())
}

// Probe opens one backend without a daemon and describes it.
func Probe(ctx context.Context, b config.Backend) (api.Backend, error) {
	dir, err := os.MkdirTemp("", "trustd-probe-")
	if err != nil {
		return api.Backend{}, fmt.Errorf("making a folder for the probe: %w", err)
	}
	defer os.RemoveAll(dir)
	c := config.Default()
	c.StateDir, c.Backends = dir, []config.Backend{b}
	var d api.Backend
	err = with(ctx, c, slog.New(slog.DiscardHandler), func(ctx context.Context, set *backendSet) error {
		d = service.DescribeBackend(ctx, &set.list[0])
		return nil
	})
	return d, err
}
