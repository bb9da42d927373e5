package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/config"
	"github.com/trustd/trustd/internal/keyring"
	"github.com/trustd/trustd/internal/service"
	"github.com/trustd/trustd/registry/journal"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/monitor"
)

// The states of a check.
const (
	OK      = "ok"
	Warning = "warning"
	Failure = "failure"
)

// probeTime bounds how long a broken device may keep the diagnosis waiting.
const probeTime = 10 * time.Second

// Diagnose examines a set-up whose daemon is down: folders, secrets, programs, devices and the registry's log. It
// changes nothing.
func Diagnose(ctx context.Context, c *config.Config) []api.HealthCheck {
	var out []api.HealthCheck
	add := func(name, status, text, remedy string) {
		out = append(out, api.HealthCheck{Name: name, Status: status, Text: text, Remedy: remedy})
	}
	checkStateDir(c, add)
	checkRegistry(c, add)
	if _, _, err := c.AgentSocketAccess(); err != nil {
		add("agent socket", Failure, err.Error(), "Correct agent_socket_mode or agent_socket_group.")
	}
	if len(c.Backends) == 0 {
		add("backends", Failure, "no backend is configured", "Run trustd key probe --module, --device or --dir and paste the block it prints.")
	}
	held := checkKeyring(c, add)
	described := map[string]signer.Description{}
	for _, b := range c.Backends {
		if d, ok := checkBackend(ctx, c, b, held, add); ok {
			described[b.Name] = d
		}
	}
	held.checkAlerts(c, described, add)
	return out
}

type adder func(name, status, text, remedy string)

func checkStateDir(c *config.Config, add adder) {
	fi, err := os.Stat(c.StateDir)
	switch {
	case os.IsNotExist(err):
		add("state folder", Warning, c.StateDir+" does not exist yet", "trustd init makes it.")
	case err != nil:
		add("state folder", Failure, c.StateDir+" cannot be read", "Run this as the daemon's user.")
	case !fi.IsDir():
		add("state folder", Failure, c.StateDir+" is not a folder", "Move the file away.")
	case fi.Mode().Perm()&0o077 != 0:
		add("state folder", Failure, fmt.Sprintf("%s has mode %o", c.StateDir, fi.Mode().Perm()), "chmod 0700 "+c.StateDir)
	default:
		add("state folder", OK, c.StateDir, "")
	}
	var fs syscall.Statfs_t
	if err == nil && syscall.Statfs(c.StateDir, &fs) == nil {
		if free := fs.Bavail * uint64(fs.Bsize); free < 100<<20 {
			add("disk", Warning, fmt.Sprintf("%d MiB are free", free>>20), "Make room: a full disk refuses every packet.")
		} else {
			add("disk", OK, fmt.Sprintf("%d MiB are free", free>>20), "")
		}
	}
}

func checkRegistry(c *config.Config, add adder) {
	path := registryPath(c)
	if _, err := os.Stat(path); os.IsNotExist(err) {
		add("registry", Failure, "there is no genesis record", "Run trustd init.")
		return
	}
	if f, err := os.Open(path); os.IsPermission(err) {
		add("registry", Failure, path+" cannot be read by this user", "Run trustd doctor as the daemon's user, usually root.")
		return
	} else if err == nil {
		f.Close()
	}
	j, err := journal.Open(path, nil)
	if err != nil {
		add("registry", Failure, err.Error(), "Restore "+path+" from a backup; do not delete it.")
		return
	}
	defer j.Close()
	if !j.State().Initialised() {
		add("registry", Failure, "there is no genesis record", "Run trustd init.")
		return
	}
	if err := pinned(c, j.State()); err != nil {
		add("registry", Failure, err.Error(), fault.From(err).Hint)
		return
	}
	size, _ := j.State().Head()
	add("registry", OK, fmt.Sprintf("%d records, all checksums right", size), "")
}

// A ring is the keys of this host, as far as they can be read.
type ring struct {
	entries []*keyring.Entry
	unread  bool
}

// checkKeyring reads the keyring without changing it: a folder that is not there is not made.
func checkKeyring(c *config.Config, add adder) ring {
	dir := keyringDir(c)
	if _, err := os.Stat(dir); err != nil {
		return ring{unread: !os.IsNotExist(err)}
	}
	k, err := keyring.Open(dir)
	if err != nil {
		add("keys", Failure, fault.From(err).Error(), "Restore "+dir+" from a backup; do not delete it.")
		return ring{unread: true}
	}
	add("keys", OK, fmt.Sprintf("%d keys of this host", len(k.All())), "")
	return ring{entries: k.All()}
}

// uses reports whether a backend holds keys of this host.
func (r ring) uses(backend string) bool {
	return r.unread || slices.ContainsFunc(r.entries, func(e *keyring.Entry) bool { return e.Backend == backend })
}

// checkAlerts says which keys are not where or as they should be.
func (r ring) checkAlerts(c *config.Config, described map[string]signer.Description, add adder) {
	var alerts []service.Alert
	for _, e := range r.entries {
		var h *service.Holder
		if i := slices.IndexFunc(c.Backends, func(b config.Backend) bool { return b.Name == e.Backend }); i >= 0 {
			h = &service.Holder{Kind: c.Backends[i].Kind, Described: described[e.Backend]}
		}
		alerts = append(alerts, service.KeyAlerts(e, signer.Grade(e.Grade), signer.Grade(c.Keys.MinGrade), h)...)
	}
	service.SumUp(alerts, func(name, text, remedy string) { add(name, Failure, text, remedy) })
}

// checkBackend opens a backend and returns what it says of its device.
func checkBackend(
	ctx context.Context, c *config.Config, b config.Backend, held ring, add adder,
) (d signer.Description, ok bool) {
	name := "backend " + b.Name
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	one := *c
	one.Backends = []config.Backend{b}
	err := with(ctx, &one, slog.New(slog.DiscardHandler), func(ctx context.Context, set *backendSet) error {
		one := &set.list[0]
		d, ok = one.Describe(ctx), true
		check := service.BackendCheck(one.Explain(d), held.uses(b.Name))
		if d.State == signer.Ready {
			if problem, remedy := monitor.Inspect(ctx, canaryDir(c), b.Name, one.Backend); problem != "" {
				check.Status, check.Text, check.Remedy = Failure, problem, remedy
			}
		}
		add(check.Name, check.Status, check.Text, check.Remedy)
		return nil
	})
	if err != nil {
		add(name, Failure, err.Error(), "")
	}
	return d, ok
}
