package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	sd "github.com/coreos/go-systemd/v22/daemon"

	"github.com/trustd/trustd/caller"
	"github.com/trustd/trustd/client"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/config"
)

// The names that socket units give the sockets they pass (FileDescriptorName=).
const (
	agentFD = "agent"
	adminFD = "admin"
)

type socketPair struct {
	agent, admin *caller.Listener
}

// listen takes the sockets that systemd passed, or makes them. Either both are passed or none is.
func listen(c *config.Config) (*socketPair, error) {
	passed, err := activation.ListenersWithNames()
	if err != nil {
		return nil, fmt.Errorf("taking the sockets that systemd passed: %w", err)
	}
	if len(passed) > 0 {
		if len(passed[agentFD]) != 1 || len(passed[adminFD]) != 1 {
			return nil, errors.New("systemd must pass one socket named agent and one named admin (FileDescriptorName=)")
		}
		var p socketPair
		if p.agent, err = caller.FromListener(passed[agentFD][0]); err != nil {
			return nil, err
		}
		if p.admin, err = caller.FromListener(passed[adminFD][0]); err != nil {
			return nil, err
		}
		return &p, nil
	}
	if err := os.MkdirAll(c.RunDir, 0o755); err != nil {
		return nil, fmt.Errorf("making the folder of the sockets: %w", err)
	}
	var p socketPair
	mode, gid, err := c.AgentSocketAccess()
	if err != nil {
		return nil, err
	}
	if p.agent, err = caller.Listen(c.AgentSocketPath(), mode, gid); err != nil {
		return nil, fmt.Errorf("making the agent socket: %w", err)
	}
	if p.admin, err = caller.Listen(c.AdminSocketPath(), 0o600, -1); err != nil {
		p.agent.Close()
		return nil, fmt.Errorf("making the admin socket: %w", err)
	}
	return &p, nil
}

// Close closes both sockets; the servers have closed them already in an orderly stop.
func (p *socketPair) Close() {
	p.agent.Close()
	p.admin.Close()
}

// notify tells the service manager, where there is one, how the daemon fares.
func notify(state string) { _, _ = sd.SdNotify(false, state) }

// watchdog tells the service manager that the daemon lives, for as long as it answers on its own socket. A daemon
// that hangs goes silent and is restarted.
func watchdog(ctx context.Context, socket string) error {
	every, err := sd.SdWatchdogEnabled(false)
	if err != nil || every == 0 {
		<-ctx.Done()
		return nil
	}
	self := client.New(socket)
	defer self.Close()
	tick := time.NewTicker(every / 3)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			ask, cancel := context.WithTimeout(ctx, every/3)
			_, err := self.Whoami(ask, false)
			cancel()
			// An answer of any kind is a sign of life; a full house is no hang.
			if err == nil || !errors.Is(err, fault.Unreachable) && ask.Err() == nil {
				notify("WATCHDOG=1")
			}
		}
	}
}
