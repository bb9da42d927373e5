package client_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/api/server"
	"github.com/trustd/trustd/api/server/servertest"
	"github.com/trustd/trustd/client"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/clock"
)

// newDaemon serves a memory with the agents planner and researcher, and returns both ways to ask it.
func newDaemon(t testing.TB, options ...client.Option) (*servertest.Memory, *client.Admin) {
	t.Helper()
	m := servertest.NewMemory(clock.System())
	servertest.MustAdd(t, m, "planner", "agent:planner")
	servertest.MustAdd(t, m, "researcher", "agent:researcher")
	return m, newClient(t, server.Config{Agent: m, Admin: m}, options...)
}

func newClient(t testing.TB, c server.Config, options ...client.Option) *client.Admin {
	t.Helper()
	a := client.NewAdmin(servertest.Start(t, c).Path, options...)
	t.Cleanup(a.Close)
	return a
}

func numbered(i int) api.SignPacketRequest {
	packet := strings.Replace(task, "t-1", fmt.Sprint("t-", i), 1)
	return api.SignPacketRequest{Agent: "planner", Packet: json.RawMessage(packet)}
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

// TestCallsMeanTheSame in process and over the socket: what does not change from call to call is equal.
func TestCallsMeanTheSame(t *testing.T) {
	m, c := newDaemon(t)
	ctx := t.Context()
	signed, err := m.SignPacket(ctx, numbered(1))
	if err != nil {
		t.Fatal(err)
	}
	msg, err := m.SignMessage(ctx, api.SignMessageRequest{Agent: "planner", Payload: []byte(`{"a":1}`)})
	if err != nil {
		t.Fatal(err)
	}
	alias, err := m.Identity(ctx, "planner")
	if err != nil {
		t.Fatal(err)
	}
	type both interface {
		api.Agent
		api.Admin
	}
	for name, call := range map[string]func(a both) (any, error){
		"verify malformed": func(a both) (any, error) {
			return a.VerifyPacket(ctx, api.VerifyPacketRequest{Packet: []byte(`{}`), Detail: true})
		},
		"wrong audience": func(a both) (any, error) {
			return a.VerifyPacket(ctx, api.VerifyPacketRequest{Packet: signed.Packet, Audience: "planner"})
		},
		"verify batch": func(a both) (any, error) {
			return a.VerifyPackets(ctx, []api.VerifyPacketRequest{{Packet: []byte(`1`)}, {Packet: []byte(`{"x":"é"}`)}}), nil
		},
		"sign refused": func(a both) (any, error) { return a.SignPacket(ctx, api.SignPacketRequest{Packet: []byte(`{}`)}) },
		"sign denied": func(a both) (any, error) {
			return a.SignPacket(ctx, api.SignPacketRequest{Agent: "x", Packet: []byte(task)})
		},
		"message": func(a both) (any, error) {
			return a.VerifyMessage(ctx, api.VerifyMessageRequest{Message: msg.Message, Detail: true})
		},
		"message mode": func(a both) (any, error) {
			return a.VerifyMessage(ctx, api.VerifyMessageRequest{Message: msg.Message, Mode: "x"})
		},
		"chain": func(a both) (any, error) {
			return a.VerifyChain(ctx, api.VerifyChainRequest{Messages: []json.RawMessage{msg.Message, msg.Message}})
		},
		"capabilities": func(a both) (any, error) { return a.Capabilities(ctx) },
		"identity":     func(a both) (any, error) { return a.Identity(ctx, alias.Aliases[0]) },
		"no identity":  func(a both) (any, error) { return a.Identity(ctx, "a/b +%2F?#") },
		"history":      func(a both) (any, error) { return a.History(ctx, "agent:planner") },
		"list":         func(a both) (any, error) { return a.ListAgents(ctx) },
		"show":         func(a both) (any, error) { return a.ShowAgent(ctx, "planner") },
		"add taken":    func(a both) (any, error) { return a.AddAgent(ctx, api.AddAgentRequest{AgentID: "planner"}) },
		"add rsa": func(a both) (any, error) {
			return a.AddAgent(ctx, api.AddAgentRequest{AgentID: "x", Algorithm: "rsa-4096"})
		},
		"import":      func(a both) (any, error) { return a.ImportAgent(ctx, api.ImportAgentRequest{Private: "x"}) },
		"remove none": func(a both) (any, error) { return a.RemoveAgent(ctx, "x", api.RemoveAgentRequest{Reason: "y"}) },
		"revoke code": func(a both) (any, error) { return a.RevokeAgent(ctx, "planner", api.RevokeAgentRequest{Code: "x"}) },
		"export none": func(a both) (any, error) { return a.ExportPrivate(ctx, "x", api.ExportPrivateRequest{}) },
		"keys":        func(a both) (any, error) { return a.ListKeys(ctx) },
		"backends":    func(a both) (any, error) { return a.Backends(ctx) },
		"backend":     func(a both) (any, error) { return a.ShowBackend(ctx, "memory") },
		"no backend":  func(a both) (any, error) { return a.ShowBackend(ctx, "x") },
		"unlock":      func(a both) (any, error) { return a.UnlockBackend(ctx, "memory") },
		"unlock none": func(a both) (any, error) { return a.UnlockBackend(ctx, "x") },
		"canary":      func(a both) (any, error) { return a.ResetCanary(ctx, "memory") },
		"recheck":     func(a both) (any, error) { return a.RecheckKey(ctx, "planner") },
		"set":         func(a both) (any, error) { return a.SetAgent(ctx, "planner", api.SetAgentRequest{Batching: "never"}) },
		"set wrong":   func(a both) (any, error) { return a.SetAgent(ctx, "planner", api.SetAgentRequest{Batching: "x"}) },
	} {
		t.Run(name, func(t *testing.T) {
			here, err1 := call(m)
			there, err2 := call(c)
			x, _ := json.Marshal(here)
			y, _ := json.Marshal(there)
			if err1 == nil && !sameJSON(t, x, y) {
				t.Errorf("in process\n%s\nover the socket\n%s", x, y)
			}
			e1, e2 := fault.From(err1), fault.From(err2)
			if (e1 == nil) != (e2 == nil) || e1 != nil && (e1.Code != e2.Code || e1.Field != e2.Field || e1.Text != e2.Text) {
				t.Errorf("in process %v, over the socket %v", err1, err2)
			}
		})
	}
}

// sameJSON compares two texts but for the lists that are null in process and empty over the socket.
func sameJSON(t *testing.T, a, b []byte) bool {
	t.Helper()
	var x, y any
	if err := errors.Join(json.Unmarshal(a, &x), json.Unmarshal(b, &y)); err != nil {
		t.Fatal(err)
	}
	return reflect.DeepEqual(prune(x), prune(y))
}

func prune(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k, e := range v {
			if e = prune(e); e == nil {
				delete(v, k)
			} else {
				v[k] = e
			}
		}
		if len(v) == 0 {
			return nil
		}
	case []any:
		for i := range v {
			v[i] = prune(v[i])
		}
		if len(v) == 0 {
			return nil
		}
	}
	return v
}

// TestLifeOfAnAgent takes an agent through all that operators do.
func TestLifeOfAnAgent(t *testing.T) {
	_, c := newDaemon(t)
	ctx := t.Context()
	d, err := c.AddAgent(ctx, api.AddAgentRequest{AgentID: "writer", Metadata: map[string]string{"team": "<a&b>"}})
	if err != nil || d.Metadata["team"] != "<a&b>" || !d.Local {
		t.Fatalf("%v: %+v", err, d)
	}
	private, err := c.ExportPrivate(ctx, "writer", api.ExportPrivateRequest{Passphrase: "sesame"})
	if err != nil {
		t.Fatal(err)
	}
	if keys, err := c.ListKeys(ctx); err != nil || len(keys) != 3 {
		t.Errorf("%v: %+v", err, keys)
	}
	d, err = c.RevokeAgent(ctx, "writer", api.RevokeAgentRequest{Code: "superseded"})
	if err != nil || d.Status != "revoked" {
		t.Errorf("%v: %+v", err, d)
	}
	d, err = c.RemoveAgent(ctx, d.Aliases[0], api.RemoveAgentRequest{})
	if err != nil || d.Status != "removed" || d.Local {
		t.Errorf("%v: %+v", err, d)
	}
	if _, err = c.Sign(ctx, "writer", task); !errors.Is(err, fault.AgentRevoked) {
		t.Errorf("signing as a removed agent: %v", err)
	}
	other := newClient(t, server.Config{})
	_, err = other.ImportAgent(ctx, api.ImportAgentRequest{AgentID: "w", Private: private.Data, Passphrase: "wrong"})
	if !errors.Is(err, fault.WrongPassphrase) {
		t.Errorf("%v", err)
	}
	i, err := other.ImportAgent(ctx, api.ImportAgentRequest{AgentID: "w", Private: private.Data, Passphrase: "sesame"})
	if err != nil || i.Fingerprint != d.Fingerprint || i.Origin != "imported" {
		t.Errorf("%v: %+v", err, i)
	}
	if agents, err := other.ListAgents(ctx); err != nil || len(agents) != 1 {
		t.Errorf("%v: %+v", err, agents)
	}
	if h, err := other.Health(ctx); err != nil || !h.Ready {
		t.Errorf("%v: %+v", err, h)
	}
}

// stub answers with what it is told to.
type stub struct {
	api.Agent
	whoami func(ctx context.Context) (api.Whoami, error)
	sign   func(ctx context.Context, rs []api.SignPacketRequest) []api.SignPacketResult
	verify func(ctx context.Context) (api.Decision, error)
	health func() (api.Health, error)
}

func (s stub) Whoami(ctx context.Context, _ bool) (api.Whoami, error) { return s.whoami(ctx) }
func (s stub) Health(context.Context) (api.Health, error)             { return s.health() }

func (s stub) VerifyPacket(ctx context.Context, _ api.VerifyPacketRequest) (api.Decision, error) {
	return s.verify(ctx)
}

func (s stub) SignPackets(ctx context.Context, rs []api.SignPacketRequest) []api.SignPacketResult {
	return s.sign(ctx, rs)
}

// TestEachCodeArrives, with its field, text, hint and time to wait; its cause does not.
func TestEachCodeArrives(t *testing.T) {
	cause := errors.New("CKR_GENERAL_ERROR")
	var next atomic.Pointer[fault.Error]
	c := newClient(t, server.Config{Agent: stub{whoami: func(context.Context) (api.Whoami, error) {
		return api.Whoami{}, next.Load()
	}}})
	for _, code := range fault.All() {
		next.Store(&fault.Error{
			Code: code, Field: "a.b", Text: "a text", Hint: "a hint", RetryAfter: 1500 * time.Millisecond, Err: cause,
		})
		_, err := c.Whoami(t.Context(), false)
		var e *fault.Error
		if !errors.Is(err, code) || errors.Is(err, cause) || !errors.As(err, &e) {
			t.Errorf("%s arrives as %v", code, err)
			continue
		}
		if e.Field != "a.b" || e.Text != "a text" || e.Hint != "a hint" || e.RetryAfter != 1500*time.Millisecond {
			t.Errorf("%s arrives as %+v", code, e)
		}
		if strings.Contains(e.Verbose(), "CKR_") || !strings.Contains(e.Verbose(), "request ") {
			t.Errorf("%s arrives as %s", code, e.Verbose())
		}
	}
}

func TestHealthOfADaemonThatCannotServe(t *testing.T) {
	c := newClient(t, server.Config{Agent: stub{health: func() (api.Health, error) {
		return api.Health{Checks: []api.HealthCheck{{Name: "token", Status: "failure"}}}, nil
	}}})
	if h, err := c.Health(t.Context()); err != nil || h.Ready || len(h.Checks) != 1 {
		t.Errorf("%v: %+v", err, h)
	}
}

func TestNoDaemon(t *testing.T) {
	c := client.New(filepath.Join(t.TempDir(), "none"))
	_, err := c.Whoami(t.Context(), false)
	var e *fault.Error
	if !errors.As(err, &e) || e.Code != fault.Unreachable || e.Hint == "" || !strings.Contains(e.Text, c.Socket()) {
		t.Errorf("%v", err)
	}
	if _, err := c.SignStream(t.Context()); !errors.Is(err, fault.Unreachable) {
		t.Errorf("%v", err)
	}
	for _, r := range c.SignPackets(t.Context(), []api.SignPacketRequest{numbered(1), numbered(2)}) {
		if r.Error == nil || r.Error.Code != fault.Unreachable || !r.Error.Retryable {
			t.Errorf("%+v", r.Error)
		}
	}
}

// script serves a socket that answers each connection's first request with the given bytes.
func script(t *testing.T, answer string) *client.Admin {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer nc.Close()
				if req, err := http.ReadRequest(bufio.NewReader(nc)); err == nil && req.Header.Get("Transfer-Encoding") == "" {
					io.WriteString(nc, answer)
				}
			}()
		}
	}()
	c := client.NewAdmin(l.Addr().String())
	t.Cleanup(c.Close)
	return c
}

// TestWhatIsNoDaemon, or one that dies while it answers.
func TestWhatIsNoDaemon(t *testing.T) {
	for name, answer := range map[string]string{
		"nothing":     "",
		"no HTTP":     "SSH-2.0-OpenSSH_9.2\r\n",
		"html":        "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>",
		"redirect":    "HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n",
		"empty":       "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 0\r\n\r\n",
		"list":        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n[]",
		"cut header":  "HTTP/1.1 200 OK\r\nContent-Ty",
		"cut body":    "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n{\"uid\":1",
		"bad problem": "HTTP/1.1 500 Oops\r\nContent-Type: application/problem+json\r\nContent-Length: 2\r\n\r\n{}",
		"too long":    "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n{}",
	} {
		c := script(t, answer)
		if _, err := c.Whoami(t.Context(), false); !errors.Is(err, fault.Unreachable) {
			t.Errorf("%s: %v", name, err)
		}
		if s, err := c.SignStream(t.Context()); !errors.Is(err, fault.Unreachable) {
			t.Errorf("%s: a stream: %v %v", name, s, err)
		}
	}
}

func TestProblemsOfNewerDaemons(t *testing.T) {
	body := `{"type":"urn:trustd:error:brand_new","status":418,"code":"brand_new","retryable":true,"more":{"x":[1]}}`
	c := script(t, fmt.Sprintf("HTTP/1.1 418 Teapot\r\nContent-Type: application/problem+json; charset=utf-8\r\n"+
		"Content-Length: %d\r\n\r\n%s", len(body), body))
	if _, err := c.Whoami(t.Context(), false); fault.CodeOf(err) != "brand_new" {
		t.Errorf("%v", err)
	}
}

// TestSocketsComeFromTheEnvironment where none is named.
func TestSocketsComeFromTheEnvironment(t *testing.T) {
	t.Setenv(client.EnvSocket, "")
	t.Setenv(client.EnvAdminSocket, "")
	a, b := client.New("").Socket(), client.NewAdmin("").Socket()
	if a != client.DefaultSocket || b != client.DefaultAdminSocket {
		t.Errorf("%s, %s", a, b)
	}
	t.Setenv(client.EnvSocket, "/a")
	t.Setenv(client.EnvAdminSocket, "/b")
	if a, b := client.New("").Socket(), client.NewAdmin("").Socket(); a != "/a" || b != "/b" {
		t.Errorf("%s, %s", a, b)
	}
	if a, b := client.New("/c").Socket(), client.NewAdmin("/d").Socket(); a != "/c" || b != "/d" {
		t.Errorf("%s, %s", a, b)
	}
}

func TestContextsEndCalls(t *testing.T) {
	entered := make(chan struct{}, 2)
	c := newClient(t, server.Config{Agent: stub{whoami: func(ctx context.Context) (api.Whoami, error) {
		entered <- struct{}{}
		<-ctx.Done()
		return api.Whoami{}, ctx.Err()
	}}})
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-entered; cancel() }()
	if _, err := c.Whoami(ctx, false); !errors.Is(err, fault.Canceled) {
		t.Errorf("%v", err)
	}
	if _, err := c.Whoami(ctx, false); !errors.Is(err, fault.Canceled) {
		t.Errorf("before the call: %v", err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := c.Whoami(ctx, false); !errors.Is(err, fault.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
}

// TestCallsAreRepeatedOnlyWhenAsked, and only for what may pass.
func TestCallsAreRepeatedOnlyWhenAsked(t *testing.T) {
	for _, c := range []struct {
		retries int
		fails   []error
		tries   int64
		code    fault.Code
	}{
		{0, []error{fault.DeviceBusy}, 1, fault.DeviceBusy},
		{3, []error{fault.DeviceBusy, fault.Unavailable}, 3, ""},
		{2, []error{fault.DeviceBusy, fault.DeviceBusy, fault.DeviceLost}, 3, fault.DeviceLost},
		{3, []error{fault.Denied}, 1, fault.Denied},
		{3, []error{fault.DeviceBusy, fault.Internal}, 2, fault.Internal},
	} {
		var tries atomic.Int64
		a := newClient(t, server.Config{Agent: stub{verify: func(context.Context) (api.Decision, error) {
			if n := tries.Add(1); int(n) <= len(c.fails) {
				return api.Decision{}, c.fails[n-1]
			}
			return api.Decision{Decision: api.Accept}, nil
		}}}, client.WithRetry(c.retries))
		_, err := a.Verify(t.Context(), "", "{}")
		if fault.CodeOf(err) != c.code || tries.Load() != c.tries {
			t.Errorf("%+v: %d tries, %v", c, tries.Load(), err)
		}
	}
}

// A breaker is a proxy of a socket that cuts the first connections off once their request has gone through.
func breaker(t *testing.T, socket string, cuts int64) *net.UnixListener {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "p"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	var n atomic.Int64
	go func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer in.Close()
				out, err := net.Dial("unix", socket)
				if err != nil {
					return
				}
				defer out.Close()
				go io.Copy(out, in)
				if n.Add(1) <= cuts {
					out.Read(make([]byte, 1)) // the reply has begun, so the work is done
					return
				}
				io.Copy(in, out)
			}()
		}
	}()
	return l
}

// TestLostRepliesAreRepeatedWhereThatDoesNoHarm: a signature may be made twice, an agent is added once, and a
// verification is not tried again, because it may have spent the nonce.
func TestLostRepliesAreRepeatedWhereThatDoesNoHarm(t *testing.T) {
	m, direct := newDaemon(t)
	via := func(options ...client.Option) *client.Admin {
		a := client.NewAdmin(breaker(t, direct.Socket(), 1).Addr().String(), options...)
		t.Cleanup(a.Close)
		return a
	}
	ctx := t.Context()
	signed, err := via(client.WithRetry(2)).Sign(ctx, "planner", task)
	if err != nil || signed.Sequence != 2 {
		t.Errorf("sign: %v, %+v", err, signed.Sequence)
	}
	if d, err := via(client.WithRetry(2)).Verify(ctx, "", signed.Packet); !errors.Is(err, fault.Unreachable) {
		t.Errorf("verify: %v, %+v", err, d)
	}
	d, err := via(client.WithRetry(2)).AddAgent(ctx, api.AddAgentRequest{AgentID: "w"})
	if err != nil || d.AgentID != "w" {
		t.Errorf("add: %v, %+v", err, d)
	}
	if _, err := via().AddAgent(ctx, api.AddAgentRequest{AgentID: "v"}); !errors.Is(err, fault.Unreachable) {
		t.Errorf("add without retry: %v", err)
	}
	if agents, err := m.ListAgents(ctx); err != nil || len(agents) != 4 {
		t.Errorf("%v: there are %d agents", err, len(agents))
	}
}

func TestIdempotencyKeysAreTheCallers(t *testing.T) {
	_, c := newDaemon(t)
	ctx := api.IdempotencyKey(t.Context(), "k-1")
	first, err := c.AddAgent(ctx, api.AddAgentRequest{AgentID: "w"})
	if err != nil {
		t.Fatal(err)
	}
	again, err := c.AddAgent(ctx, api.AddAgentRequest{AgentID: "w"})
	if err != nil || again.Fingerprint != first.Fingerprint {
		t.Errorf("%v: %+v", err, again)
	}
	if _, err := c.AddAgent(ctx, api.AddAgentRequest{AgentID: "x"}); !errors.Is(err, fault.Conflict) {
		t.Errorf("%v", err)
	}
	for _, key := range []string{"a\r\nX: y", "a b", strings.Repeat("k", 65)} {
		_, err := c.AddAgent(api.IdempotencyKey(t.Context(), key), api.AddAgentRequest{AgentID: "y"})
		if !errors.Is(err, fault.Malformed) {
			t.Errorf("%q: %v", key, err)
		}
	}
}

// TestRestartIsNotNoticed between two calls: dead connections are not used.
func TestRestartIsNotNoticed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	m := servertest.NewMemory(clock.System())
	servertest.MustAdd(t, m, "planner")
	c := client.New(path)
	defer c.Close()
	for range 3 {
		_, stop, err := servertest.Serve(path, server.Config{Agent: m})
		if err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if _, err := c.Sign(t.Context(), "", task); err != nil {
				t.Errorf("%v", err)
			}
		}
		if err := stop(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Sign(t.Context(), "", task); !errors.Is(err, fault.Unreachable) {
		t.Errorf("after the stop: %v", err)
	}
}

// TestDeathInTheMiddleOfACall is a clear error that says to try again.
func TestDeathInTheMiddleOfACall(t *testing.T) {
	entered := make(chan struct{})
	s := servertest.Start(t, server.Config{Agent: stub{whoami: func(ctx context.Context) (api.Whoami, error) {
		close(entered)
		<-ctx.Done()
		return api.Whoami{}, nil
	}}})
	c := client.New(s.Path)
	defer c.Close()
	go func() { <-entered; s.Server.Close() }()
	_, err := c.Whoami(t.Context(), false)
	if !errors.Is(err, fault.Unreachable) || !fault.CodeOf(err).Retryable() || fault.From(err).Hint == "" {
		t.Errorf("%v", err)
	}
}

// TestRefusalsOfLongBodiesArrive although the daemon does not read what it refuses.
func TestRefusalsOfLongBodiesArrive(t *testing.T) {
	_, c := newDaemon(t)
	long := `{"context":{"x":"` + strings.Repeat("x", 4<<20) + `"}}`
	for range 5 {
		if _, err := c.Sign(t.Context(), "planner", long); !errors.Is(err, fault.TooLarge) {
			t.Fatalf("%v", err)
		}
		if _, err := c.Sign(t.Context(), "planner", task); err != nil {
			t.Fatalf("and then: %v", err)
		}
	}
}

func TestBatchesOfAnySize(t *testing.T) {
	_, c := newDaemon(t)
	for _, n := range []int{0, 1, api.MaxBatch + 3} {
		rs := make([]api.SignPacketRequest, n)
		for i := range rs {
			rs[i] = numbered(i)
		}
		if n > 2 {
			rs[1].Packet = json.RawMessage(`{}, "agent":"researcher"`) // which is no JSON, and stays here
			rs[n-1].Packet = nil
		}
		out := c.SignPackets(t.Context(), rs)
		if len(out) != n {
			t.Fatalf("%d results for %d requests", len(out), n)
		}
		for i, r := range out {
			switch {
			case n > 2 && (i == 1 || i == n-1):
				if r.Error == nil || r.Error.Code != fault.Malformed || r.Error.Field != "packet" {
					t.Errorf("request %d of %d: %+v", i, n, r.Error)
				}
			case r.Error != nil || taskID(t, r.Packet) != fmt.Sprint("t-", i):
				t.Fatalf("request %d of %d: %+v", i, n, r.Error)
			}
		}
	}
	// Long packets go in as many calls as the limit on bytes asks for.
	long := strings.Replace(task, `"intent"`, `"context":{"x":"`+strings.Repeat("x", 200<<10)+`"},"intent"`, 1)
	many := make([]any, 50)
	for i := range many {
		many[i] = long
	}
	out, err := c.SignBatch(t.Context(), "planner", many...)
	failed := func(r api.SignPacketResult) bool { return r.Error != nil }
	if err != nil || len(out) != len(many) || slices.ContainsFunc(out, failed) {
		t.Errorf("%v: %d results", err, len(out))
	}
}

func TestPacketsOfAnyType(t *testing.T) {
	_, c := newDaemon(t)
	var value map[string]any
	if err := json.Unmarshal([]byte(task), &value); err != nil {
		t.Fatal(err)
	}
	for _, p := range []any{task, []byte(task), json.RawMessage(task), value} {
		if _, err := c.Sign(t.Context(), "planner", p); err != nil {
			t.Errorf("%T: %v", p, err)
		}
	}
	if _, err := c.Sign(t.Context(), "planner", func() {}); !errors.Is(err, fault.Malformed) {
		t.Errorf("%v", err)
	}
	if _, err := c.SignBatch(t.Context(), "planner", task, make(chan int)); !errors.Is(err, fault.Malformed) {
		t.Errorf("%v", err)
	}
	if _, err := c.VerifyBatch(t.Context(), "", make(chan int)); !errors.Is(err, fault.Malformed) {
		t.Errorf("%v", err)
	}
}

func TestNamesStayInTheirSegment(t *testing.T) {
	_, c := newDaemon(t)
	for _, name := range []string{"", ".", ".."} {
		if _, err := c.Identity(t.Context(), name); !errors.Is(err, fault.Malformed) {
			t.Errorf("%q: %v", name, err)
		}
		if _, err := c.RemoveAgent(t.Context(), name, api.RemoveAgentRequest{}); !errors.Is(err, fault.Malformed) {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, name := range []string{
		"planner/revoke", "planner/../planner", "planner?x=1", "planner\r\nHost: x", "%70lanner",
	} {
		if _, err := c.ShowAgent(t.Context(), name); !errors.Is(err, fault.NotFound) {
			t.Errorf("%q: %v", name, err)
		}
	}
}

// TestManyClientsAtOnce: 200 clients sign and verify, each its own packets, and none gets another's reply.
func TestManyClientsAtOnce(t *testing.T) {
	m, _ := newDaemon(t)
	path := servertest.Start(t, server.Config{Agent: m}).Path
	var all sync.WaitGroup
	for i := range 200 {
		all.Go(func() {
			c := client.New(path)
			defer c.Close()
			for j := range 2 {
				n := 2*i + j
				signed, err := c.SignPacket(t.Context(), numbered(n))
				if err != nil || taskID(t, signed.Packet) != fmt.Sprint("t-", n) {
					t.Errorf("client %d: %v", i, err)
					return
				}
				d, err := c.Verify(t.Context(), "researcher", signed.Packet)
				if err != nil || d.Decision != api.Accept {
					t.Errorf("client %d: %v, %+v", i, err, d)
					return
				}
			}
		})
	}
	all.Wait()
	if h, err := m.History(t.Context(), "planner"); err != nil || h.Sequence != 400 {
		t.Errorf("%v: %+v", err, h)
	}
}

// TestOneClientAtOnce: many goroutines share a client, more than it keeps connections.
func TestOneClientAtOnce(t *testing.T) {
	_, c := newDaemon(t)
	var all sync.WaitGroup
	for i := range 150 {
		all.Go(func() {
			for j := range 2 {
				signed, err := c.SignPacket(t.Context(), numbered(2*i+j))
				if err != nil || taskID(t, signed.Packet) != fmt.Sprint("t-", 2*i+j) {
					t.Errorf("%v", err)
				}
			}
		})
	}
	all.Wait()
}
