package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"syscall"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/config"
	"github.com/trustd/trustd/internal/service"
	"github.com/trustd/trustd/registry/journal"
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
	for _, b := range c.Backends {
		checkBackend(ctx, c, b, add)
	}
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

func checkBackend(ctx context.Context, c *config.Config, b config.Backend, add adder) {
	name := "backend " + b.Name
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	one := *c
	one.Backends = []config.Backend{b}
	err := with(ctx, &one, slog.New(slog.DiscardHandler), func(ctx context.Context, set *backendSet) error {
		d := service.DescribeBackend(ctx, &set.list[0])
		if d.State == "ready" {
			add(name, OK, d.Device, "")
		} else {
			add(name, Failure, d.Problem, d.Remedy)
		}
		return nil
	})
	if err != nil {
		add(name, Failure, err.Error(), "")
	}
}
