package server_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/api/server"
	"github.com/trustd/trustd/caller"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/clock"
)

// TestErrorsCrossTheSocket with all that they may say, and their cause stays in the log, once, beside the id that
// the caller got.
func TestErrorsCrossTheSocket(t *testing.T) {
	for _, code := range fault.All() {
		t.Run(string(code), func(t *testing.T) {
			var log journal
			s := newSocket(t, func(c *server.Config) {
				c.Log = log.logger(slog.LevelDebug)
				c.Agent = override{Agent: c.Agent, whoami: func(context.Context) (api.Whoami, error) {
					return api.Whoami{}, &fault.Error{
						Code: code, Field: "a.b", Text: "a text", Hint: "a hint", RetryAfter: 1200 * time.Millisecond,
						Err: errors.New("CKR_GENERAL_ERROR in slot 3"),
					}
				}}
			})
			got := s.do("GET", "/v1/whoami", "")
			p := got.problem(t)
			if got.status != code.Status() || got.header.Get("Retry-After") != "2" {
				t.Errorf("status %d, Retry-After %q", got.status, got.header.Get("Retry-After"))
			}
			want := api.Problem{
				Type: api.ProblemType + string(code), Title: code.Title(), Status: code.Status(), Code: code, Detail: "a text",
				Field: "a.b", Hint: "a hint", Retryable: code.Retryable(), RetryAfter: 1200, RequestID: p.RequestID,
			}
			if p != want {
				t.Errorf("the problem is %+v", p)
			}
			if strings.Contains(string(got.body), "CKR_") {
				t.Errorf("the cause went out: %s", got.body)
			}
			if n := strings.Count(log.String(), "CKR_GENERAL_ERROR"); n != 1 || !strings.Contains(log.String(), p.RequestID) {
				t.Errorf("the cause is in the log %d times:\n%s", n, log.String())
			}
		})
	}
}

func TestUnforeseenErrorsSayNothing(t *testing.T) {
	s := newSocket(t, func(c *server.Config) {
		c.Agent = override{Agent: c.Agent, whoami: func(context.Context) (api.Whoami, error) {
			return api.Whoami{}, errors.New("open /etc/shadow: permission denied")
		}}
	})
	got := s.do("GET", "/v1/whoami", "")
	if p := got.problem(t); p.Code != fault.Internal || p.Detail != "" || got.status != 500 {
		t.Errorf("%s", got.body)
	}
}

func TestPanicsAreInternal(t *testing.T) {
	var log journal
	s := newSocket(t, func(c *server.Config) {
		c.Log = log.logger(slog.LevelInfo)
		c.Agent = override{Agent: c.Agent, whoami: func(context.Context) (api.Whoami, error) { panic("index out of range") }}
	})
	for range 2 { // and the connection serves on
		got := s.do("GET", "/v1/whoami", "")
		if p := got.problem(t); p.Code != fault.Internal || strings.Contains(string(got.body), "index") {
			t.Errorf("%s", got.body)
		}
	}
	if !strings.Contains(log.String(), "index out of range") || !strings.Contains(log.String(), "server_test.go") {
		t.Errorf("the log has no stack:\n%s", log.String())
	}
	s.do("GET", "/livez", "").into(t, &api.Liveness{})
}

// TestNoLogOfWhatGoesWell above debug, nor of what callers do wrong.
func TestNoLogOfWhatGoesWell(t *testing.T) {
	var log journal
	s := newSocket(t, func(c *server.Config) { c.Log = log.logger(slog.LevelInfo) })
	s.do("POST", "/v1/packets/sign", signBody(task))
	s.do("POST", "/v1/packets/sign", "{}").wants(t, fault.Malformed, "packet")
	s.do("GET", "/nowhere", "").wants(t, fault.NotFound, "")
	if log.String() != "" {
		t.Errorf("the log has\n%s", log.String())
	}
}

// TestSecretsStayOutOfTheLog, whatever is wrong with the request that holds one.
func TestSecretsStayOutOfTheLog(t *testing.T) {
	var log journal
	s := newSocket(t, func(c *server.Config) { c.Log = log.logger(slog.LevelDebug) })
	for _, body := range []string{
		`{"passphrase":"hunter2"}x`, `{"passphrase":"hunter2","format":1}`, `{"passphrase":"hunter2","passphrase":"hunter2"}`,
		`{"hunter2!":1}`, `{"passphrase":"hunter2"`,
	} {
		got := s.do("POST", "/v1/agents/planner/export-private", body)
		if got.status == http.StatusOK || strings.Contains(string(got.body), "hunter2") {
			t.Errorf("%s: %s", body, got.body)
		}
	}
	if strings.Contains(log.String(), "hunter2") {
		t.Errorf("the log has\n%s", log.String())
	}
}

func TestBrowsersAreRefused(t *testing.T) {
	s := newSocket(t, nil)
	for _, c := range []struct{ header, value string }{
		{"Origin", "https://evil.example"}, {"Origin", "null"}, {"Sec-Fetch-Site", "same-origin"},
		{"Host", "evil.example"}, {"Host", "localhost:8080"}, {"Host", "127.0.0.1"}, {"Host", "[::1]"},
	} {
		s.do("GET", "/v1/whoami", "", c.header, c.value).wants(t, fault.Denied, c.header)
		s.do("GET", "/livez", "", c.header, c.value).wants(t, fault.Denied, c.header)
	}
	for _, host := range []string{"localhost", "trustd", "d"} {
		s.do("GET", "/v1/whoami", "", "Host", host).into(t, &api.Whoami{})
	}
}

// TestRequestIDsAreOurOwn and never the caller's.
func TestRequestIDsAreOurOwn(t *testing.T) {
	s := newSocket(t, nil)
	seen := map[string]bool{}
	for range 100 {
		id := s.do("GET", "/livez", "", "X-Request-Id", "mine").header.Get("X-Request-Id")
		if id == "" || id == "mine" || seen[id] {
			t.Fatalf("the id is %q", id)
		}
		seen[id] = true
	}
}

func TestLimits(t *testing.T) {
	s := newSocket(t, func(c *server.Config) {
		c.Limiter = caller.NewLimiter(caller.Config{Rate: 0.001, Burst: 8, Concurrent: 1})
	})
	batch := func(n int) string {
		return `{"requests":[` + strings.TrimSuffix(strings.Repeat(signBody(task)+",", n), ",") + `]}`
	}
	var out api.SignPacketsReply
	s.do("POST", "/v1/packets/sign-batch", batch(6)).into(t, &out) // a batch costs what it holds
	if len(out.Results) != 6 || out.Results[5].Error != nil {
		t.Fatalf("%+v", out.Results)
	}
	s.do("POST", "/v1/packets/sign", signBody(task)).into(t, &api.SignPacketReply{})
	s.do("POST", "/v1/packets/sign", signBody(task)).into(t, &api.SignPacketReply{})
	got := s.do("POST", "/v1/packets/sign", signBody(task))
	if p := got.problem(t); p.Code != fault.ResourceExhausted || !p.Retryable || p.RetryAfter <= 0 ||
		got.status != http.StatusTooManyRequests || got.header.Get("Retry-After") == "" {
		t.Errorf("%s", got.body)
	}
	s.do("GET", "/livez", "").into(t, &api.Liveness{})
}

// TestBatchOverTheLimitDoesNothing.
func TestBatchOverTheLimitDoesNothing(t *testing.T) {
	s := newSocket(t, func(c *server.Config) {
		c.Limiter = caller.NewLimiter(caller.Config{Rate: 0.001, Burst: 4})
	})
	s.do("GET", "/v1/whoami", "")
	s.do("GET", "/v1/whoami", "")
	s.do("POST", "/v1/packets/sign-batch", `{"requests":[`+signBody(task)+`,`+signBody(task)+`,`+signBody(task)+`]}`).
		wants(t, fault.ResourceExhausted, "")
	if h, err := s.mem.History(t.Context(), "planner"); err != nil || h.Sequence != 0 {
		t.Errorf("%d packets were signed, %v", h.Sequence, err)
	}
}

func TestConcurrencyIsLimited(t *testing.T) {
	entered, leave := make(chan struct{}), make(chan struct{})
	s := newSocket(t, func(c *server.Config) {
		c.Limiter = caller.NewLimiter(caller.Config{Concurrent: 1})
		c.Agent = override{Agent: c.Agent, whoami: func(context.Context) (api.Whoami, error) {
			entered <- struct{}{}
			<-leave
			return api.Whoami{}, nil
		}}
	})
	done := make(chan reply)
	go func() {
		r, _ := s.try(t.Context(), "GET", "/v1/whoami", nil)
		done <- r
	}()
	recv(t, "the first request", entered)
	s.do("GET", "/v1/capabilities", "").wants(t, fault.ResourceExhausted, "")
	close(leave)
	recv(t, "its reply", done).into(t, &api.Whoami{})
	s.do("GET", "/v1/capabilities", "").into(t, &api.Capabilities{})
}

// TestBodiesAreBounded is T-SOCK-6: one user cannot fill the daemon's memory with requests that never end.
func TestBodiesAreBounded(t *testing.T) {
	s := newSocket(t, func(c *server.Config) { c.Agent = override{Agent: c.Agent} })
	const half = 6 << 20
	var refused int
	var open []*net.UnixConn
	for range 12 {
		c := s.dial()
		_, _ = fmt.Fprintf(c, "POST /v1/packets/verify-batch HTTP/1.1\r\nHost: trustd\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n", half+1)
		if _, err := c.Write(make([]byte, half)); err == nil { // all of it was read, and is held
			open = append(open, c)
			continue
		}
		refused++ // the reply came and the connection was closed before all was read
	}
	if refused == 0 || len(open) == 0 {
		t.Errorf("%d bodies of %d MiB are held, %d refused", len(open), half>>20, refused)
	}
	for _, c := range open {
		c.Close()
	}
	body := `{"requests":[` + signBody(task) + `]}`
	poll(t, "the memory to be given back", func() bool {
		return s.do("POST", "/v1/packets/sign-batch", body+strings.Repeat(" ", 1<<20)).status == http.StatusOK
	})
}

// TestRefusalsDoNotFloodTheLog: what a caller can cause at will is logged some times a second.
func TestRefusalsDoNotFloodTheLog(t *testing.T) {
	var log bytes.Buffer
	var mu sync.Mutex
	s := newSocket(t, func(c *server.Config) {
		c.Clock = clock.NewFake(time.Now())
		c.Log = slog.New(slog.NewTextHandler(lockedWriter{&mu, &log}, nil))
		c.Agent = override{Agent: c.Agent, whoami: func(context.Context) (api.Whoami, error) {
			return api.Whoami{}, fault.New(fault.Denied, "")
		}}
	})
	for range 100 {
		s.do("GET", "/v1/whoami", "").wants(t, fault.Denied, "")
	}
	mu.Lock()
	defer mu.Unlock()
	if n := strings.Count(log.String(), "code=denied"); n == 0 || n > 20 {
		t.Errorf("%d of 100 refusals were logged", n)
	}
}

type lockedWriter struct {
	mu *sync.Mutex
	w  io.Writer
}

func (l lockedWriter) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(b)
}

// TestDisconnectEndsTheWork.
func TestDisconnectEndsTheWork(t *testing.T) {
	entered, ended := make(chan struct{}), make(chan error, 1)
	s := newSocket(t, func(c *server.Config) {
		c.Agent = override{Agent: c.Agent, sign: func(ctx context.Context, _ []api.SignPacketRequest) []api.SignPacketResult {
			close(entered)
			<-ctx.Done()
			ended <- ctx.Err()
			return nil
		}}
	})
	ctx, cancel := context.WithCancel(t.Context())
	go s.try(ctx, "POST", "/v1/packets/sign-batch", strings.NewReader(`{"requests":[`+signBody(task)+`]}`))
	recv(t, "the work", entered)
	cancel()
	if err := recv(t, "its end", ended); !errors.Is(err, context.Canceled) {
		t.Errorf("the work ended with %v", err)
	}
}

func TestWorkHasATimeLimit(t *testing.T) {
	s := newSocket(t, func(c *server.Config) {
		c.Timeout = 20 * time.Millisecond
		c.Agent = override{Agent: c.Agent, whoami: func(ctx context.Context) (api.Whoami, error) {
			<-ctx.Done()
			return api.Whoami{}, fmt.Errorf("waiting for the device: %w", ctx.Err())
		}}
	})
	s.do("GET", "/v1/whoami", "").wants(t, fault.DeadlineExceeded, "")
}

// dial opens a connection to write on by hand.
func (s *socket) dial() *net.UnixConn {
	s.t.Helper()
	c, err := net.Dial("unix", s.Path)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	return c.(*net.UnixConn)
}

func (s *socket) readReply(in *bufio.Reader) reply {
	s.t.Helper()
	resp, err := http.ReadResponse(in, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return reply{resp.StatusCode, resp.Header, b}
}

// TestSecondWriterIsRefused: a connection is its maker's alone, also where a child has it.
func TestSecondWriterIsRefused(t *testing.T) {
	s := newSocket(t, nil)
	c := s.dial()
	in := bufio.NewReader(c)
	fmt.Fprintf(c, "GET /v1/whoami HTTP/1.1\r\nHost: trustd\r\n\r\n")
	s.readReply(in).into(t, &api.Whoami{})

	f, err := c.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	child := exec.Command("sh", "-c", `printf 'GET /v1/whoami HTTP/1.1\r\nHost: trustd\r\n\r\n' >&3`)
	child.ExtraFiles = []*os.File{f}
	if out, err := child.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	got := s.readReply(in)
	if got.status != http.StatusForbidden || !strings.Contains(string(got.body), string(fault.CallerChanged)) {
		t.Errorf("status %d: %s", got.status, got.body)
	}
	if _, err := in.ReadByte(); err == nil {
		t.Error("the connection is still open")
	}
}

// TestSecondWriterOfABody is refused before anything is signed.
func TestSecondWriterOfABody(t *testing.T) {
	s := newSocket(t, nil)
	c := s.dial()
	body := signBody(task)
	fmt.Fprintf(c, "POST /v1/packets/sign HTTP/1.1\r\nHost: trustd\r\nContent-Length: %d\r\n\r\n%s", len(body), body[:20])
	f, err := c.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	child := exec.Command("sh", "-c", `printf '%s' "$REST" >&3`)
	child.Env = []string{"REST=" + body[20:], "PATH=" + os.Getenv("PATH")}
	child.ExtraFiles = []*os.File{f}
	if out, err := child.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	reply, err := io.ReadAll(c)
	if err == nil && strings.Contains(string(reply), "HTTP/1.1 200") {
		t.Errorf("the reply is %q", reply)
	}
	if h, err := s.mem.History(t.Context(), "planner"); err != nil || h.Sequence != 0 {
		t.Errorf("%d packets were signed, %v", h.Sequence, err)
	}
}

// TestOtherConnectionsHaveNoCaller: the handler serves nobody whom the kernel did not name.
func TestOtherConnectionsHaveNoCaller(t *testing.T) {
	s := newSocket(t, nil)
	l, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	plain := server.HTTPServer(server.New(server.Config{Agent: s.mem, Admin: s.mem}))
	go plain.Serve(l)
	defer plain.Close()
	c, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprintf(c, "GET /v1/whoami HTTP/1.1\r\nHost: trustd\r\n\r\n")
	s.readReply(bufio.NewReader(c)).wants(t, fault.CallerUnknown, "")
}

// TestShutdownFinishesWhatIsInFlight and refuses what comes then.
func TestShutdownFinishesWhatIsInFlight(t *testing.T) {
	entered, leave := make(chan struct{}), make(chan struct{})
	s := newSocket(t, func(c *server.Config) {
		c.Agent = override{Agent: c.Agent, whoami: func(context.Context) (api.Whoami, error) {
			close(entered)
			<-leave
			return api.Whoami{UID: 7}, nil
		}}
	})
	done := make(chan reply)
	go func() {
		r, _ := s.try(context.Background(), "GET", "/v1/whoami", nil)
		done <- r
	}()
	recv(t, "the request", entered)
	stopped := make(chan error)
	go func() { stopped <- s.Server.Shutdown(context.Background()) }()
	poll(t, "the socket closes", func() bool {
		c, err := net.Dial("unix", s.Path)
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	close(leave)
	var w api.Whoami
	recv(t, "the reply", done).into(t, &w)
	if w.UID != 7 {
		t.Errorf("the reply is %+v", w)
	}
	if err := recv(t, "the stop", stopped); err != nil {
		t.Error(err)
	}
}

func TestDrainingRefusesNewRequests(t *testing.T) {
	draining := make(chan struct{})
	s := newSocket(t, func(c *server.Config) { c.Draining = draining })
	s.do("GET", "/v1/whoami", "").into(t, &api.Whoami{})
	close(draining)
	c := s.dial()
	fmt.Fprintf(c, "GET /v1/whoami HTTP/1.1\r\nHost: trustd\r\n\r\n")
	in := bufio.NewReader(c)
	got := s.readReply(in)
	if p := got.problem(t); p.Code != fault.Stopping || !p.Retryable {
		t.Errorf("%s", got.body)
	}
	if _, err := in.ReadByte(); err != io.EOF {
		t.Errorf("the connection goes on: %v", err)
	}
	s.do("GET", "/readyz", "").wants(t, fault.Stopping, "")
	s.do("GET", "/livez", "").into(t, &api.Liveness{})
}

func TestHealthOfADaemonThatCannotServe(t *testing.T) {
	s := newSocket(t, func(c *server.Config) {
		c.Agent = override{Agent: c.Agent, health: func(context.Context) (api.Health, error) {
			return api.Health{Checks: []api.HealthCheck{
				{Name: "token", Status: "failure", Remedy: "plug it in"}, {Name: "disk", Status: "ok"},
			}}, nil
		}}
	})
	got := s.do("GET", "/readyz", "")
	if p := got.problem(t); p.Code != fault.Unavailable || !strings.Contains(p.Detail, "token") ||
		strings.Contains(p.Detail, "disk") {
		t.Errorf("%s", got.body)
	}
	got = s.do("GET", "/healthz", "")
	if got.status != http.StatusServiceUnavailable || !strings.Contains(string(got.body), "plug it in") {
		t.Errorf("%d: %s", got.status, got.body)
	}
}

// TestMetrics counts by route and code, and no caller can add a label.
func TestMetrics(t *testing.T) {
	reg := prometheus.NewRegistry()
	s := newSocket(t, func(c *server.Config) { c.Metrics = reg })
	server.New(server.Config{Agent: s.mem, Metrics: reg}) // agent.sock shares the registry
	s.do("POST", "/v1/packets/sign", signBody(task))
	s.do("POST", "/v1/packets/sign", signBody(task))
	s.do("POST", "/v1/packets/sign", "x")
	s.do("POST", "/v1/packets/sign-batch", `{"requests":[`+signBody(task)+`,`+signBody("{}")+`]}`)
	s.do("GET", "/v1/whoami", "", "Origin", "x")
	for i := range 50 {
		s.do("GET", fmt.Sprintf("/nowhere/%d", i), "")
		s.do(fmt.Sprintf("M%d", i), "/v1/whoami", "")
		s.do("GET", fmt.Sprintf("/v1/identities/n%d", i), "")
	}
	text := string(s.do("GET", "/metrics", "").body)
	for _, want := range []string{
		`trustd_requests_total{code="ok",route="POST /v1/packets/sign",socket="admin"} 2`,
		`trustd_requests_total{code="malformed",route="POST /v1/packets/sign",socket="admin"} 1`,
		`trustd_requests_total{code="denied",route="GET /v1/whoami",socket="admin"} 1`,
		`trustd_requests_total{code="not_found",route="GET /v1/identities/{name}",socket="admin"} 50`,
		`trustd_requests_total{code="not_found",route="ANY other",socket="admin"} 50`,
		`trustd_requests_total{code="unsupported",route="ANY other",socket="admin"} 50`,
		`trustd_requests_total{code="ok",route="POST /v1/packets/sign",socket="agent"} 0`,
		`trustd_items_total{code="ok",route="POST /v1/packets/sign-batch",socket="admin"} 1`,
		`trustd_items_total{code="malformed",route="POST /v1/packets/sign-batch",socket="admin"} 1`,
		`trustd_callers_refused_total{code="denied",socket="admin"} 1`,
		`trustd_request_seconds_count{route="POST /v1/packets/sign",socket="admin"} 3`,
		`trustd_requests_in_flight{route="GET /metrics",socket="admin"} 1`,
	} {
		if !strings.Contains(text, want+"\n") {
			t.Errorf("there is no %s", want)
		}
	}
	if strings.Contains(text, "nowhere") || strings.Contains(text, "n49") || strings.Contains(text, "M49") {
		t.Error("a caller's text is a label")
	}
}

// TestServerHasLimits: nobody holds a connection for ever by sending slowly, or memory by a long header.
func TestServerHasLimits(t *testing.T) {
	s := server.HTTPServer(server.New(server.Config{Agent: newSocket(t, nil).mem}))
	if min(s.ReadHeaderTimeout, s.ReadTimeout, s.WriteTimeout, s.IdleTimeout) <= 0 || s.MaxHeaderBytes > 64<<10 {
		t.Errorf("%+v", s)
	}
	sock := newSocket(t, nil)
	got := sock.do("GET", "/v1/whoami", "", "X-Long", strings.Repeat("x", 64<<10))
	if got.status != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("status %d", got.status)
	}
}

// TestTooLargeIsSaidBeforeItIsSent: a caller that asks first (Expect) never sends the body.
func TestTooLargeIsSaidBeforeItIsSent(t *testing.T) {
	s := newSocket(t, nil)
	c := s.dial()
	fmt.Fprintf(c, "POST /v1/packets/sign HTTP/1.1\r\nHost: trustd\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n",
		api.MaxBody+1)
	s.readReply(bufio.NewReader(c)).wants(t, fault.TooLarge, "")
}

// TestChunkedBodies are bounded too.
func TestChunkedBodies(t *testing.T) {
	s := newSocket(t, nil)
	got, err := s.try(t.Context(), "POST", "/v1/packets/sign", io.MultiReader(strings.NewReader(signBody(task))))
	if err != nil {
		t.Fatal(err)
	}
	got.into(t, &api.SignPacketReply{})
	long := io.MultiReader(strings.NewReader(signBody(task)), strings.NewReader(strings.Repeat(" ", api.MaxBody)))
	if got, err = s.try(t.Context(), "POST", "/v1/packets/sign", long); err != nil {
		t.Fatal(err)
	}
	got.wants(t, fault.TooLarge, "")
}
