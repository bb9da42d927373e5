package client_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/api/server"
	"github.com/trustd/trustd/api/server/servertest"
	"github.com/trustd/trustd/client"
	"github.com/trustd/trustd/fault"
)

func openSign(t *testing.T, c *client.Client) *client.SignStream {
	t.Helper()
	s, err := c.SignStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestStreamIsInOrder(t *testing.T) {
	_, c := newDaemon(t)
	s := openSign(t, c.Client)
	const n = 2000
	var sending sync.WaitGroup
	sending.Go(func() {
		for i := range n {
			if err := s.Send(numbered(i)); err != nil {
				t.Error(err)
				return
			}
		}
		if err := s.CloseSend(); err != nil {
			t.Error(err)
		}
	})
	for i := range n {
		r, err := s.Recv()
		if err != nil || r.Error != nil || taskID(t, r.Packet) != fmt.Sprint("t-", i) {
			t.Fatalf("line %d: %v, %+v", i, err, r.Error)
		}
	}
	sending.Wait()
	for range 2 {
		if _, err := s.Recv(); err != io.EOF {
			t.Errorf("after the last result: %v", err)
		}
	}
	if err := s.Send(numbered(0)); err == nil {
		t.Error("sent on a stream that has ended")
	}
}

// TestStreamKeepsWhatItGave: a result stays what it was when the next is read.
func TestStreamKeepsWhatItGave(t *testing.T) {
	_, c := newDaemon(t)
	s := openSign(t, c.Client)
	var got []api.SignPacketResult
	for i := range 20 {
		if err := s.Send(numbered(i)); err != nil {
			t.Fatal(err)
		}
		r, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, r)
	}
	for i, r := range got {
		if taskID(t, r.Packet) != fmt.Sprint("t-", i) {
			t.Errorf("result %d became %s", i, r.Packet)
		}
	}
}

// TestStreamTakesPacketsOfManyLines, and refuses what is no JSON without ending.
func TestStreamTakesPacketsOfManyLines(t *testing.T) {
	_, c := newDaemon(t)
	s := openSign(t, c.Client)
	wide := strings.NewReplacer(",", ",\r\n\t").Replace(task)
	if err := s.Send(api.SignPacketRequest{Agent: "planner", Packet: []byte(wide)}); err != nil {
		t.Fatal(err)
	}
	if err := s.Send(api.SignPacketRequest{Packet: []byte("{}\n{}")}); !errors.Is(err, fault.Malformed) {
		t.Errorf("%v", err)
	}
	if err := s.Send(api.SignPacketRequest{Agent: "planner", Packet: []byte("{}")}); err != nil {
		t.Fatal(err)
	}
	s.CloseSend()
	if r, err := s.Recv(); err != nil || r.Error != nil {
		t.Errorf("%v: %+v", err, r.Error)
	}
	if r, err := s.Recv(); err != nil || r.Error == nil || r.Error.Code != fault.Malformed {
		t.Errorf("%v: %+v", err, r.Error)
	}
	if _, err := s.Recv(); err != io.EOF {
		t.Errorf("%v", err)
	}
	if err := s.Send(numbered(0)); !errors.Is(err, fault.Usage) && !errors.Is(err, io.EOF) {
		t.Errorf("after CloseSend: %v", err)
	}
}

// stuck serves streams whose work does not end, and tells when it has begun.
func stuck(t *testing.T) (s *servertest.Socket, entered chan struct{}) {
	entered = make(chan struct{}, 16)
	return servertest.Start(t, server.Config{Agent: stub{
		sign: func(ctx context.Context, rs []api.SignPacketRequest) []api.SignPacketResult {
			entered <- struct{}{}
			<-ctx.Done()
			return make([]api.SignPacketResult, len(rs))
		},
	}}), entered
}

// TestStreamOfADaemonThatDies says how much is unanswered, and that a retry may help.
func TestStreamOfADaemonThatDies(t *testing.T) {
	d, entered := stuck(t)
	c := client.New(d.Path)
	s := openSign(t, c)
	for i := range 3 {
		if err := s.Send(numbered(i)); err != nil {
			t.Fatal(err)
		}
	}
	<-entered
	d.Server.Close()
	for range 2 {
		_, err := s.Recv()
		var e *fault.Error
		if !errors.As(err, &e) || e.Code != fault.Unreachable || !e.Code.Retryable() ||
			!strings.Contains(e.Text, "3 requests") {
			t.Errorf("%v", err)
		}
	}
	if err := s.Send(numbered(4)); err == nil {
		t.Error("sent to a daemon that is dead")
	}
}

// TestStreamOfADaemonThatStops is answered as far as it was read, and then says so.
func TestStreamOfADaemonThatStops(t *testing.T) {
	draining := make(chan struct{})
	m, _ := newDaemon(t)
	c := client.New(servertest.Start(t, server.Config{Agent: m, Draining: draining}).Path)
	s := openSign(t, c)
	if err := s.Send(numbered(0)); err != nil {
		t.Fatal(err)
	}
	if r, err := s.Recv(); err != nil || r.Error != nil {
		t.Fatalf("%v: %+v", err, r.Error)
	}
	close(draining)
	if _, err := s.Recv(); !errors.Is(err, fault.Stopping) {
		t.Errorf("%v", err)
	}
	if _, err := c.SignStream(t.Context()); !errors.Is(err, fault.Stopping) {
		t.Errorf("a new stream: %v", err)
	}
}

func TestStreamEndsWithItsContext(t *testing.T) {
	d, entered := stuck(t)
	c := client.New(d.Path)
	ctx, cancel := context.WithCancel(t.Context())
	s, err := c.SignStream(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Send(numbered(0)); err != nil {
		t.Fatal(err)
	}
	<-entered
	cancel()
	if _, err := s.Recv(); !errors.Is(err, fault.Canceled) {
		t.Errorf("%v", err)
	}
}

// TestCloseFreesWhoWaits: in Recv, and in Send on a stream whose results nobody reads.
func TestCloseFreesWhoWaits(t *testing.T) {
	d, _ := stuck(t)
	c := client.New(d.Path)
	s, err := c.SignStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	long := numbered(0)
	wide := `"context":{"x":"` + strings.Repeat("x", 100<<10) + `"},"intent"`
	long.Packet = []byte(strings.Replace(task, `"intent"`, wide, 1))
	sent, sendErr, recvErr := make(chan struct{}, 1000), make(chan error, 1), make(chan error, 1)
	go func() {
		for {
			if err := s.Send(long); err != nil {
				sendErr <- err
				return
			}
			sent <- struct{}{}
		}
	}()
	go func() {
		_, err := s.Recv()
		recvErr <- err
	}()
	for range 10 { // as much as the daemon takes without answering
		<-sent
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := <-recvErr; !errors.Is(err, fault.Canceled) {
		t.Errorf("Recv: %v", err)
	}
	if err := <-sendErr; err == nil {
		t.Error("Send goes on")
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
