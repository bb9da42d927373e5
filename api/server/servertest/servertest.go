package servertest

import (
	"context"
	"errors"
	"net/http"
	"path/filepath"
	"testing"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/api/server"
	"github.com/trustd/trustd/caller"
	"github.com/trustd/trustd/internal/clock"
)

// A Socket is a served Unix socket.
type Socket struct {
	Path   string
	Server *http.Server
}

// Start serves a socket in a folder of the test's own until the test ends. c.Clock is the machine's where it is not
// set, c.Agent and c.Admin are a fresh Memory where both are not set.
func Start(t testing.TB, c server.Config) *Socket {
	t.Helper()
	if c.Clock == nil {
		c.Clock = clock.System()
	}
	if c.Agent == nil && c.Admin == nil {
		m := NewMemory(c.Clock)
		c.Agent, c.Admin = m, m
	}
	s, stop, err := Serve(filepath.Join(t.TempDir(), "s"), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// Serve serves a socket at path until stop is called, which cuts off what is in flight.
func Serve(path string, c server.Config) (s *Socket, stop func() error, err error) {
	l, err := caller.Listen(path, 0o600, -1)
	if err != nil {
		return nil, nil, err
	}
	s = &Socket{Path: path, Server: server.HTTPServer(server.New(c))}
	served := make(chan error, 1)
	go func() { served <- s.Server.Serve(l) }()
	return s, func() error {
		err := s.Server.Close()
		if e := <-served; !errors.Is(e, http.ErrServerClosed) {
			return e
		}
		return err
	}, nil
}

// MustAdd registers an agent and returns its derived alias.
func MustAdd(t testing.TB, m api.Admin, id string, aliases ...string) string {
	t.Helper()
	d, err := m.AddAgent(context.Background(), api.AddAgentRequest{AgentID: id, Aliases: aliases})
	if err != nil {
		t.Fatal(err)
	}
	return d.Aliases[0]
}
