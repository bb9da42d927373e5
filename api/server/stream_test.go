package server_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/api/server"
	"github.com/trustd/trustd/caller"
	"github.com/trustd/trustd/fault"
)

type (
	requests = []api.SignPacketRequest
	results  = []api.SignPacketResult
)

// A stream is one open stream, by plain net/http.
type stream struct {
	t    *testing.T
	out  *io.PipeWriter
	resp *http.Response
	in   *bufio.Reader
}

func (s *socket) stream(path string) *stream {
	s.t.Helper()
	r, w := io.Pipe()
	req, err := http.NewRequestWithContext(s.t.Context(), "POST", "http://trustd"+path, r)
	if err != nil {
		s.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/x-ndjson")
	resp, err := s.http.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	if ct := resp.Header.Get("Content-Type"); resp.StatusCode != http.StatusOK || ct != "application/x-ndjson" {
		s.t.Fatalf("status %d, Content-Type %q", resp.StatusCode, ct)
	}
	s.t.Cleanup(func() { w.Close(); resp.Body.Close() })
	return &stream{s.t, w, resp, bufio.NewReader(resp.Body)}
}

func (s *stream) send(text string) error {
	_, err := io.WriteString(s.out, text)
	return err
}

func (s *stream) mustSend(text string) {
	s.t.Helper()
	if err := s.send(text); err != nil {
		s.t.Fatal(err)
	}
}

func (s *stream) next() api.SignPacketResult {
	s.t.Helper()
	line, err := s.in.ReadBytes('\n')
	if err != nil {
		s.t.Fatalf("%v after %q", err, line)
	}
	var r api.SignPacketResult
	if err := json.Unmarshal(line, &r); err != nil {
		s.t.Fatalf("%v: %s", err, line)
	}
	if (r.SignPacketReply == nil) == (r.Error == nil) {
		s.t.Fatalf("neither a reply nor an error, or both: %s", line)
	}
	return r
}

func (s *stream) wantsEOF() {
	s.t.Helper()
	if rest, err := io.ReadAll(s.in); err != nil || len(rest) > 0 {
		s.t.Errorf("the stream goes on: %q, %v", rest, err)
	}
}

// TestStreamAnswersInOrder, as many lines as are sent, while they are sent.
func TestStreamAnswersInOrder(t *testing.T) {
	const n = 1000
	st := newSocket(t, nil).stream("/v1/packets/sign-stream")
	go func() {
		for i := range n {
			if st.send(numbered(i)+"\n") != nil {
				return
			}
		}
		st.out.Close()
	}()
	last := uint64(0)
	for i := range n {
		r := st.next()
		if r.Error != nil {
			t.Fatalf("line %d: %+v", i, r.Error)
		}
		if got := taskID(t, r.Packet); got != fmt.Sprint("t-", i) || r.Sequence == last {
			t.Fatalf("line %d is answered by %s, sequence %d", i, got, r.Sequence)
		}
		last = r.Sequence
	}
	st.wantsEOF()
}

// TestStreamAnswersAtOnce: a lone line is not kept waiting for others.
func TestStreamAnswersAtOnce(t *testing.T) {
	st := newSocket(t, nil).stream("/v1/packets/sign-stream")
	for i := range 20 {
		st.mustSend(numbered(i) + "\n")
		if got := taskID(t, st.next().Packet); got != fmt.Sprint("t-", i) {
			t.Fatalf("line %d is answered by %s", i, got)
		}
	}
	st.out.Close()
	st.wantsEOF()
}

// TestStreamGathersWhatWaits: while lots are at work, lines gather into the next.
func TestStreamGathersWhatWaits(t *testing.T) {
	var lots atomic.Int64
	leave := make(chan struct{})
	s := newSocket(t, func(c *server.Config) {
		under := c.Agent
		c.Agent = override{Agent: under, sign: func(ctx context.Context, rs requests) results {
			lots.Add(1)
			<-leave
			return under.SignPackets(ctx, rs)
		}}
	})
	st := s.stream("/v1/packets/sign-stream")
	const n = 200
	for i := range n {
		st.mustSend(numbered(i) + "\n")
	}
	st.out.Close()
	poll(t, "the first lots", func() bool { return lots.Load() >= 4 })
	close(leave)
	for i := range n {
		if got := taskID(t, st.next().Packet); got != fmt.Sprint("t-", i) {
			t.Fatalf("line %d is answered by %s", i, got)
		}
	}
	st.wantsEOF()
	if got := lots.Load(); got > n/8 {
		t.Errorf("%d lines came in %d lots", n, got)
	}
}

// TestStreamStopsReading where nobody reads its results: the daemon holds a bounded number of them.
func TestStreamStopsReading(t *testing.T) {
	s := newSocket(t, nil)
	st := s.stream("/v1/packets/sign-stream")
	// Long lines, so that the socket's own buffers soon are full.
	long := `"context":{"x":"` + strings.Repeat("x", 64<<10) + `"},"intent"`
	line := strings.Replace(numbered(0), `"intent"`, long, 1) + "\n"
	const n = 120
	var sent atomic.Int64
	var sending sync.WaitGroup
	sending.Go(func() {
		for range n {
			if st.send(line) != nil {
				return
			}
			sent.Add(1)
		}
		st.out.Close()
	})
	before := int64(-1)
	stuck := 0
	poll(t, "a full stream", func() bool {
		if now := sent.Load(); now != before {
			before, stuck = now, 0
		} else if now > 0 {
			stuck++
		}
		return stuck > 300
	})
	if before >= 100 {
		t.Errorf("the daemon took %d long lines whose results nobody read", before)
	}
	for i := range n {
		if r := st.next(); r.Error != nil {
			t.Fatalf("line %d: %+v", i, r.Error)
		}
	}
	sending.Wait()
	st.wantsEOF()
}

func TestStreamGoesOnAfterABadLine(t *testing.T) {
	st := newSocket(t, nil).stream("/v1/packets/sign-stream")
	go func() {
		st.send(numbered(0) + "\n{\"packet\":\n" + signBody("{}") + "\n\n \t\r\n" + `{"packet":{},"x":1}` + "\n")
		st.send(numbered(4) + "\r\n" + numbered(5)) // the last line needs no end
		st.out.Close()
	}()
	want := []struct {
		code  fault.Code
		field string
	}{{"", ""}, {fault.Malformed, "packet"}, {fault.Malformed, "intent"}, {fault.Malformed, "x"}, {"", ""}, {"", ""}}
	for i, w := range want {
		r := st.next()
		switch {
		case w.code == "" && r.Error != nil:
			t.Errorf("line %d: %+v", i, r.Error)
		case w.code != "" && (r.Error == nil || r.Error.Code != w.code):
			t.Errorf("line %d: %+v, want %s", i, r.Error, w.code)
		}
	}
	st.wantsEOF()
}

func TestStreamEndsAfterALineThatIsTooLong(t *testing.T) {
	st := newSocket(t, nil).stream("/v1/packets/sign-stream")
	go func() {
		st.send(numbered(0) + "\n")
		st.send(`{"agent":"` + strings.Repeat("x", 2*api.MaxBody))
		st.send("\n" + numbered(2) + "\n")
		st.out.Close()
	}()
	if r := st.next(); r.Error != nil {
		t.Errorf("%+v", r.Error)
	}
	if r := st.next(); r.Error == nil || r.Error.Code != fault.TooLarge {
		t.Errorf("%+v", r)
	}
	st.wantsEOF()
}

func TestVerifyStream(t *testing.T) {
	s := newSocket(t, nil)
	signed, err := s.mem.SignPacket(t.Context(), api.SignPacketRequest{Agent: "planner", Packet: []byte(task)})
	if err != nil {
		t.Fatal(err)
	}
	st := s.stream("/v1/packets/verify-stream")
	st.mustSend(strings.Repeat(`{"packet":`+string(signed.Packet)+"}\n", 2))
	st.out.Close()
	for _, want := range []fault.Code{"", fault.ReplayDetected} {
		line, err := st.in.ReadBytes('\n')
		var r api.VerifyPacketResult
		if err != nil || json.Unmarshal(line, &r) != nil || r.Decision == nil || r.Reason != want {
			t.Errorf("%v: %s, want %q", err, line, want)
		}
	}
	st.wantsEOF()
}

// TestStreamSurvivesAPanic of the work on one of its lots.
func TestStreamSurvivesAPanic(t *testing.T) {
	var log journal
	var lots atomic.Int64
	s := newSocket(t, func(c *server.Config) {
		c.Log = log.logger(slog.LevelInfo)
		under := c.Agent
		c.Agent = override{Agent: under, sign: func(ctx context.Context, rs requests) results {
			switch lots.Add(1) {
			case 1:
				panic("a bug")
			case 2:
				return nil // another: not one result for each request
			}
			return under.SignPackets(ctx, rs)
		}}
	})
	st := s.stream("/v1/packets/sign-stream")
	for i, want := range []fault.Code{fault.Internal, fault.Internal, ""} {
		st.mustSend(numbered(i) + "\n")
		if r := st.next(); r.Error != nil && r.Error.Code != want || r.Error == nil && want != "" {
			t.Errorf("line %d: %+v", i, r.Error)
		}
	}
	if !strings.Contains(log.String(), "a bug") {
		t.Errorf("the log has\n%s", log.String())
	}
}

// TestStreamDrains: at a stop, what was read is answered, and the stream ends in good order.
func TestStreamDrains(t *testing.T) {
	for _, how := range []string{"draining", "shutdown"} {
		t.Run(how, func(t *testing.T) {
			draining, entered, leave := make(chan struct{}), make(chan struct{}, 9), make(chan struct{})
			s := newSocket(t, func(c *server.Config) {
				c.Draining = draining
				under := c.Agent
				c.Agent = override{Agent: under, sign: func(ctx context.Context, rs requests) results {
					entered <- struct{}{}
					<-leave
					return under.SignPackets(ctx, rs)
				}}
			})
			st := s.stream("/v1/packets/sign-stream")
			st.mustSend(numbered(0) + "\n")
			recv(t, "the work", entered)
			stopped := make(chan error, 1)
			if how == "draining" {
				close(draining)
				stopped <- nil
			} else {
				go func() { stopped <- s.Server.Shutdown(context.Background()) }()
			}
			close(leave)
			if r := st.next(); r.Error != nil {
				t.Errorf("%+v", r.Error)
			}
			st.wantsEOF()
			if err := recv(t, "the stop", stopped); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestStreamEndsWithItsCaller: the work on its lines is given up.
func TestStreamEndsWithItsCaller(t *testing.T) {
	entered, ended := make(chan struct{}), make(chan struct{})
	s := newSocket(t, func(c *server.Config) {
		c.Agent = override{Agent: c.Agent, sign: func(ctx context.Context, rs requests) results {
			close(entered)
			<-ctx.Done()
			close(ended)
			return make([]api.SignPacketResult, len(rs))
		}}
	})
	c := s.dial()
	line := numbered(0) + "\n"
	fmt.Fprintf(c, "POST /v1/packets/sign-stream HTTP/1.1\r\nHost: trustd\r\nTransfer-Encoding: chunked\r\n\r\n"+
		"%x\r\n%s\r\n", len(line), line)
	recv(t, "the work", entered)
	c.Close()
	recv(t, "its end", ended)
	poll(t, "the stream is no longer counted", func() bool {
		text := string(s.do("GET", "/metrics", "").body)
		return strings.Contains(text, `trustd_requests_in_flight{route="POST /v1/packets/sign-stream",socket="admin"} 0`) &&
			strings.Contains(text, `trustd_requests_total{code="canceled",route="POST /v1/packets/sign-stream",socket="admin"} 1`)
	})
}

// TestStreamIsSlowedDown by its user's limits, not refused, and other requests of the user go on.
func TestStreamIsSlowedDown(t *testing.T) {
	s := newSocket(t, func(c *server.Config) {
		c.Limiter = caller.NewLimiter(caller.Config{Rate: 500, Burst: 10, Concurrent: 1})
	})
	st := s.stream("/v1/packets/sign-stream")
	const n = 60
	go func() {
		for i := range n {
			if st.send(numbered(i)+"\n") != nil {
				return
			}
		}
		st.out.Close()
	}()
	for i := range n {
		if r := st.next(); r.Error != nil {
			t.Fatalf("line %d: %+v", i, r.Error)
		}
	}
	st.wantsEOF()
}

// TestStreamWaitsOnlySoLong.
func TestStreamWaitsOnlySoLong(t *testing.T) {
	s := newSocket(t, func(c *server.Config) {
		c.Timeout = time.Second
		c.Limiter = caller.NewLimiter(caller.Config{Rate: 0.001, Burst: 2})
	})
	st := s.stream("/v1/packets/sign-stream")
	st.mustSend(numbered(0) + "\n")
	if r := st.next(); r.Error != nil {
		t.Fatalf("%+v", r.Error)
	}
	st.mustSend(numbered(1) + "\n")
	if r := st.next(); r.Error == nil || r.Error.Code != fault.ResourceExhausted || r.Error.RetryAfter == 0 {
		t.Errorf("%+v", r)
	}
}

func TestStreamNeedsHTTP11(t *testing.T) {
	s := newSocket(t, nil)
	c := s.dial()
	fmt.Fprintf(c, "POST /v1/packets/sign-stream HTTP/1.0\r\nHost: trustd\r\nContent-Length: 2\r\n\r\n{}")
	s.readReply(bufio.NewReader(c)).wants(t, fault.Unsupported, "")
	s.do("POST", "/v1/packets/sign-stream", "{}", "Content-Type", "text/plain").wants(t, fault.Malformed, "Content-Type")
	s.do("POST", "/v1/packets/sign-stream?x=1", "{}").wants(t, fault.Malformed, "query.x")
}

// TestStreamTakesAWholeBody, as curl --data-binary sends it.
func TestStreamTakesAWholeBody(t *testing.T) {
	got := newSocket(t, nil).do("POST", "/v1/packets/sign-stream", numbered(0)+"\n"+numbered(1)+"\n")
	if n := strings.Count(string(got.body), "\n"); n != 2 || got.status != http.StatusOK {
		t.Errorf("status %d, %d lines: %s", got.status, n, got.body)
	}
}
