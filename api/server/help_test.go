package server_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/api/server"
	"github.com/trustd/trustd/api/server/servertest"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/clock"
)

const task = `{"task_id":"t-1","to_agent":"agent:researcher","intent":"search",` +
	`"permissions":{"allowed_actions":["web.search"]},"risk_level":"read"}`

// A socket is a served socket and an HTTP client of it.
type socket struct {
	*servertest.Socket
	t    *testing.T
	http *http.Client
	mem  *servertest.Memory
}

// newSocket serves admin.sock over a memory with the agents planner and researcher; change may alter what is served.
func newSocket(t *testing.T, change func(c *server.Config)) *socket {
	t.Helper()
	c := server.Config{Clock: clock.System(), Version: "1.2.3"}
	m := servertest.NewMemory(c.Clock)
	servertest.MustAdd(t, m, "planner", "agent:planner:1")
	servertest.MustAdd(t, m, "researcher", "agent:researcher")
	c.Agent, c.Admin = m, m
	if change != nil {
		change(&c)
	}
	s := servertest.Start(t, c)
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", s.Path)
	}}
	t.Cleanup(tr.CloseIdleConnections)
	return &socket{Socket: s, t: t, http: &http.Client{Transport: tr}, mem: m}
}

type reply struct {
	status int
	header http.Header
	body   []byte
}

func (s *socket) do(method, path, body string, header ...string) reply {
	s.t.Helper()
	r, err := s.try(s.t.Context(), method, path, strings.NewReader(body), header...)
	if err != nil {
		s.t.Fatalf("%s %s: %v", method, path, err)
	}
	return r
}

func (s *socket) try(ctx context.Context, method, path string, body io.Reader, header ...string) (reply, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://trustd"+path, body)
	if err != nil {
		return reply{}, err
	}
	for i := 0; i < len(header); i += 2 {
		if header[i] == "Host" {
			req.Host = header[i+1]
		} else {
			req.Header.Add(header[i], header[i+1])
		}
	}
	resp, err := s.http.Do(req)
	if err != nil {
		return reply{}, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return reply{resp.StatusCode, resp.Header, b}, err
}

// problem checks that the reply is a whole problem document and returns it.
func (r reply) problem(t *testing.T) api.Problem {
	t.Helper()
	var p api.Problem
	if ct := r.header.Get("Content-Type"); ct != "application/problem+json" {
		t.Fatalf("status %d, Content-Type %q: %s", r.status, ct, r.body)
	}
	if err := json.Unmarshal(r.body, &p); err != nil {
		t.Fatalf("%v: %s", err, r.body)
	}
	if p.Status != r.status || p.Type != api.ProblemType+string(p.Code) || p.RequestID != r.header.Get("X-Request-Id") {
		t.Errorf("status %d, request %q: %s", r.status, r.header.Get("X-Request-Id"), r.body)
	}
	return p
}

func (r reply) wants(t *testing.T, code fault.Code, field string) {
	t.Helper()
	if p := r.problem(t); p.Code != code || p.Field != field {
		t.Errorf("the problem is %s (%s): %s, want %s (%s)", p.Code, p.Field, p.Detail, code, field)
	}
}

func (r reply) into(t *testing.T, v any) {
	t.Helper()
	if r.status != http.StatusOK {
		t.Fatalf("status %d: %s", r.status, r.body)
	}
	if err := json.Unmarshal(r.body, v); err != nil {
		t.Fatalf("%v: %s", err, r.body)
	}
}

func signBody(packet string) string { return `{"agent":"planner","packet":` + packet + `}` }

// poll waits until ok, and fails the test where that never comes.
func poll(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	late := time.NewTimer(30 * time.Second)
	defer late.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-late.C:
			t.Fatalf("never came: %s", what)
		}
	}
}

// recv waits for a value, and fails the test where none comes.
func recv[T any](t *testing.T, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(30 * time.Second):
		t.Fatalf("never came: %s", what)
		panic("not reached")
	}
}

// A journal is a log that tests read.
type journal struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (j *journal) Write(b []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.buf.Write(b)
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.buf.String()
}

func (j *journal) logger(level slog.Level) *slog.Logger {
	return slog.New(slog.NewTextHandler(j, &slog.HandlerOptions{Level: level}))
}

// override is an agent of which single methods are replaced.
type override struct {
	api.Agent
	whoami func(ctx context.Context) (api.Whoami, error)
	health func(ctx context.Context) (api.Health, error)
	sign   func(ctx context.Context, rs []api.SignPacketRequest) []api.SignPacketResult
}

func (o override) Whoami(ctx context.Context, explain bool) (api.Whoami, error) {
	if o.whoami != nil {
		return o.whoami(ctx)
	}
	return o.Agent.Whoami(ctx, explain)
}

func (o override) Health(ctx context.Context) (api.Health, error) {
	if o.health != nil {
		return o.health(ctx)
	}
	return o.Agent.Health(ctx)
}

func (o override) SignPackets(ctx context.Context, rs []api.SignPacketRequest) []api.SignPacketResult {
	if o.sign != nil {
		return o.sign(ctx, rs)
	}
	return o.Agent.SignPackets(ctx, rs)
}

func numbered(i int) string {
	return fmt.Sprintf(`{"agent":"planner","packet":{"task_id":"t-%d","to_agent":"agent:researcher","intent":"search",`+
		`"permissions":{"allowed_actions":[]}}}`, i)
}

func taskID(t *testing.T, packet json.RawMessage) string {
	t.Helper()
	var p struct {
		TaskID string `json:"task_id"`
	}
	if err := json.Unmarshal(packet, &p); err != nil {
		t.Fatalf("%v: %s", err, packet)
	}
	return p.TaskID
}
