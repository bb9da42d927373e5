package server_test

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/api/server"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/clock"
)

const idempotencyKey = "Idempotency-Key"

// counting counts registrations, and does first what before says.
type counting struct {
	api.Admin
	added  atomic.Int64
	before func(n int64) error
}

func (c *counting) AddAgent(ctx context.Context, r api.AddAgentRequest) (api.AgentDetail, error) {
	n := c.added.Add(1)
	if c.before != nil {
		if err := c.before(n); err != nil {
			return api.AgentDetail{}, err
		}
	}
	return c.Admin.AddAgent(ctx, r)
}

func countingSocket(t *testing.T, c clock.Clock, before func(n int64) error) (*socket, *counting) {
	var admin *counting
	s := newSocket(t, func(sc *server.Config) {
		admin = &counting{Admin: sc.Admin, before: before}
		sc.Admin, sc.Clock = admin, c
	})
	return s, admin
}

func TestKeyGivesTheSameReply(t *testing.T) {
	s, admin := countingSocket(t, clock.System(), nil)
	first := s.do("POST", "/v1/agents", `{"agent_id":"writer"}`, idempotencyKey, "k")
	again := s.do("POST", "/v1/agents", `{"agent_id":"writer"}`, idempotencyKey, "k")
	if first.status != http.StatusOK || again.status != first.status || string(again.body) != string(first.body) {
		t.Errorf("first %d: %s\nthen %d: %s", first.status, first.body, again.status, again.body)
	}
	if first.header.Get("Idempotency-Replayed") != "" || again.header.Get("Idempotency-Replayed") != "true" {
		t.Error("the second reply is not marked, or the first is")
	}
	if n := admin.added.Load(); n != 1 {
		t.Errorf("the agent was added %d times", n)
	}
	s.do("POST", "/v1/agents", `{"agent_id":"writer"}`).wants(t, fault.AlreadyExists, "")
	s.do("POST", "/v1/agents", `{"agent_id":"writer"}`, idempotencyKey, "k2").wants(t, fault.AlreadyExists, "")
}

// TestKeyKeepsRefusalsToo, which a second try would not change.
func TestKeyKeepsRefusalsToo(t *testing.T) {
	s, admin := countingSocket(t, clock.System(), nil)
	for range 2 {
		got := s.do("POST", "/v1/agents", `{"agent_id":"planner"}`, idempotencyKey, "k")
		if got.status != http.StatusConflict || !strings.Contains(string(got.body), string(fault.AlreadyExists)) {
			t.Errorf("%d: %s", got.status, got.body)
		}
	}
	if n := admin.added.Load(); n != 1 {
		t.Errorf("it was tried %d times", n)
	}
}

func TestKeyWithAnotherBodyIsAConflict(t *testing.T) {
	s, admin := countingSocket(t, clock.System(), nil)
	s.do("POST", "/v1/agents", `{"agent_id":"a"}`, idempotencyKey, "k").into(t, &api.AgentDetail{})
	s.do("POST", "/v1/agents", `{"agent_id":"b"}`, idempotencyKey, "k").wants(t, fault.Conflict, idempotencyKey)
	s.do("POST", "/v1/agents", `{"agent_id":"a"} `, idempotencyKey, "k").wants(t, fault.Conflict, idempotencyKey)
	if n := admin.added.Load(); n != 1 {
		t.Errorf("%d agents were added", n)
	}
}

// TestKeyBelongsToARoute: the same key elsewhere is another.
func TestKeyBelongsToARoute(t *testing.T) {
	s, _ := countingSocket(t, clock.System(), nil)
	s.do("POST", "/v1/agents", `{"agent_id":"a"}`, idempotencyKey, "k").into(t, &api.AgentDetail{})
	var d api.AgentDetail
	s.do("POST", "/v1/agents/a/revoke", `{}`, idempotencyKey, "k").into(t, &d)
	if d.AgentID != "a" || d.Status != "revoked" {
		t.Errorf("%+v", d)
	}
	s.do("POST", "/v1/agents/planner/revoke", `{}`, idempotencyKey, "k").into(t, &d)
	s.do("DELETE", "/v1/agents/planner", ``, idempotencyKey, "k").into(t, &d)
	if d.AgentID != "planner" || d.Status != "removed" {
		t.Errorf("%+v", d)
	}
}

func TestKeyDoesNotKeepWhatMayPass(t *testing.T) {
	s, admin := countingSocket(t, clock.System(), func(n int64) error {
		switch n {
		case 1:
			return fault.New(fault.DeviceBusy, "")
		case 2:
			return context.DeadlineExceeded
		case 3:
			panic("a bug")
		}
		return nil
	})
	for _, want := range []int{503, 504, 500, 200, 200} {
		if got := s.do("POST", "/v1/agents", `{"agent_id":"a"}`, idempotencyKey, "k"); got.status != want {
			t.Errorf("status %d, want %d: %s", got.status, want, got.body)
		}
	}
	if n := admin.added.Load(); n != 4 {
		t.Errorf("it was tried %d times", n)
	}
}

// TestSameKeyAtOnce has one effect, of which all hear.
func TestSameKeyAtOnce(t *testing.T) {
	leave := make(chan struct{})
	s, admin := countingSocket(t, clock.System(), func(int64) error { <-leave; return nil })
	const callers = 8
	var all sync.WaitGroup
	bodies := make([]string, callers)
	for i := range callers {
		all.Go(func() {
			r, err := s.try(t.Context(), "POST", "/v1/agents", strings.NewReader(`{"agent_id":"a"}`), idempotencyKey, "k")
			if err != nil {
				t.Error(err)
			}
			bodies[i] = string(r.body)
		})
	}
	poll(t, "the work", func() bool { return admin.added.Load() == 1 })
	close(leave)
	all.Wait()
	for _, b := range bodies {
		if b != bodies[0] || !strings.Contains(b, `"agent_id":"a"`) {
			t.Errorf("the replies are %q", bodies)
		}
	}
	if n := admin.added.Load(); n != 1 {
		t.Errorf("it was done %d times", n)
	}
}

// TestKeyOutlivesItsConnection: the work goes on without the caller, who comes back for the reply.
func TestKeyOutlivesItsConnection(t *testing.T) {
	leave := make(chan struct{})
	s, admin := countingSocket(t, clock.System(), func(int64) error { <-leave; return nil })
	ctx, cancel := context.WithCancel(t.Context())
	gone := make(chan error)
	go func() {
		_, err := s.try(ctx, "POST", "/v1/agents", strings.NewReader(`{"agent_id":"a"}`), idempotencyKey, "k")
		gone <- err
	}()
	poll(t, "the work", func() bool { return admin.added.Load() == 1 })
	cancel()
	if recv(t, "the caller's end", gone) == nil {
		t.Error("the caller was not cut off")
	}
	close(leave)
	var d api.AgentDetail
	s.do("POST", "/v1/agents", `{"agent_id":"a"}`, idempotencyKey, "k").into(t, &d)
	if n := admin.added.Load(); n != 1 || d.AgentID != "a" {
		t.Errorf("it was done %d times: %+v", n, d)
	}
}

func TestKeysAge(t *testing.T) {
	c := clock.NewFake(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC))
	s, admin := countingSocket(t, c, nil)
	s.do("POST", "/v1/agents", `{"agent_id":"a"}`, idempotencyKey, "k").into(t, &api.AgentDetail{})
	c.Advance(9 * time.Minute)
	s.do("POST", "/v1/agents", `{"agent_id":"a"}`, idempotencyKey, "k").into(t, &api.AgentDetail{})
	c.Advance(2 * time.Minute)
	s.do("POST", "/v1/agents", `{"agent_id":"a"}`, idempotencyKey, "k").wants(t, fault.AlreadyExists, "")
	if n := admin.added.Load(); n != 2 {
		t.Errorf("it was tried %d times", n)
	}
}

// TestKeysAreBounded: the oldest goes first.
func TestKeysAreBounded(t *testing.T) {
	s, admin := countingSocket(t, clock.System(), nil)
	for i := range 1025 {
		s.do("POST", "/v1/agents", `{"agent_id":"planner"}`, idempotencyKey, fmt.Sprint("k", i))
	}
	s.do("POST", "/v1/agents", `{"agent_id":"planner"}`, idempotencyKey, "k1024")
	if n := admin.added.Load(); n != 1025 {
		t.Errorf("the newest key is forgotten: tried %d times", n)
	}
	s.do("POST", "/v1/agents", `{"agent_id":"planner"}`, idempotencyKey, "k0")
	if n := admin.added.Load(); n != 1026 {
		t.Errorf("the oldest key is kept: tried %d times", n)
	}
}

func TestBadKeys(t *testing.T) {
	s, admin := countingSocket(t, clock.System(), nil)
	for _, header := range [][]string{
		{idempotencyKey, ""}, {idempotencyKey, strings.Repeat("k", 65)}, {idempotencyKey, "a b"}, {idempotencyKey, "é"},
		{idempotencyKey, "a", idempotencyKey, "a"},
	} {
		s.do("POST", "/v1/agents", `{"agent_id":"a"}`, header...).wants(t, fault.Malformed, idempotencyKey)
	}
	if n := admin.added.Load(); n != 0 {
		t.Errorf("%d agents were added", n)
	}
	s.do("GET", "/v1/agents", "", idempotencyKey, "a b").into(t, &api.AgentList{}) // nothing changes, so nothing to key
}
