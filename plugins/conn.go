package plugins

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-plugin"
	"google.golang.org/protobuf/proto"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/plugins/signerpb"
	"github.com/trustd/trustd/signer"
)

// A conn is the connection to one child process, from its start to its end.
type conn struct {
	host   *Host
	dir    string
	proc   *process // nil before it was launched
	client *plugin.Client
	rpc    signerpb.BackendClient
	pid    int

	operator bool                               // this child is an operator's attempt at the authorisation
	since    time.Time                          // it is in service
	proved   atomic.Bool                        // a signature came back, or there is nothing to prove
	settled  atomic.Bool                        // it was ready once
	taken    atomic.Bool                        // it took the PIN and was not ready since
	said     atomic.Pointer[signer.Description] // of itself, last

	requests  net.Conn // our end of the socket pair
	receiving bool     // receive runs; the supervisor's own

	ctx   context.Context // of the calls that are the connection's own
	end   context.CancelFunc
	doubt chan error    // a caller's reason to believe that the child is lost; holds one
	ended chan struct{} // closed when the child closed its end and all pending calls have failed

	mu      sync.Mutex
	dead    bool
	last    uint64
	pending map[uint64]place // by request id
	bytes   int              // of the messages pending
}

// A place is where a result belongs.
type place struct {
	call *calling
	at   int
	size int
}

// calling is a caller that waits for results. Its fields are guarded by conn.mu until done is closed.
type calling struct {
	results []signer.Result
	lost    []int
	missing int
	done    chan struct{}
}

const (
	maxPending = 1 << 14
	// While no more than this is in flight, sending cannot block: it is less than a socket's buffer. Beyond, a
	// goroutine of its own sends, so that no caller is held past its context.
	inlineBytes = 32 << 10
	maxRequests = 8         // in one packet, so that the workers share a batch
	fullPacket  = 16 << 10  // a packet that is this large takes no more requests
	largest     = 64 << 10  // message in a packet; a larger one goes through gRPC
	maxPacket   = 128 << 10 // read at once; no end sends one that is as large
)

func newConn(h *Host, dir string) *conn {
	c := &conn{
		host: h, dir: dir, doubt: make(chan error, 1), ended: make(chan struct{}), pending: map[uint64]place{},
	}
	c.ctx, c.end = context.WithCancel(context.Background())
	return c
}

// watch returns when ctx ends, with an operator's wish to unlock the device, and with an error when the child has
// ended, does not answer, uses too much, or has a call to the device under way that is older than the deadline.
func (c *conn) watch(ctx context.Context) (*unlocking, error) {
	deadline := c.host.cfg.Deadline
	tick := time.NewTicker(min(max(deadline/4, 10*time.Millisecond), time.Second))
	defer tick.Stop()
	watched, cancel := context.WithCancel(ctx)
	var helpers sync.WaitGroup
	defer helpers.Wait()
	defer cancel()
	helpers.Go(func() { c.weigh(watched) })
	looking := make(chan struct{}, 1) // holds one while Describe runs
	for {
		select {
		case <-ctx.Done():
			return nil, nil
		case <-c.ended:
			return nil, c.doubted(errEnded)
		case err := <-c.doubt:
			return nil, err
		case u := <-c.host.unlocks:
			if c.host.stands(u) {
				return u, errUnlock
			}
			continue
		case <-tick.C:
		}
		pinged, cancel := context.WithTimeout(c.ctx, deadline)
		r, err := c.rpc.Ping(pinged, &signerpb.PingRequest{})
		cancel()
		if err != nil {
			return nil, c.doubted(fmt.Errorf("%w: %w", errSilent, err))
		}
		c.stand(r.GetStanding())
		oldest, slow := time.Duration(r.GetOldestCallMs())*time.Millisecond, time.Duration(r.GetOldestSlowMs())*time.Millisecond
		if oldest > deadline || slow > max(slowLimit, deadline) {
			return nil, fmt.Errorf("%w: %v", errHang, max(oldest, slow))
		}
		if !c.settled.Load() { // until it is known which token it found
			select {
			case looking <- struct{}{}:
				helpers.Go(func() {
					c.host.Describe(watched)
					<-looking
				})
			default:
			}
		}
	}
}

var (
	errEnded  = errors.New("it ended")
	errSilent = errors.New("it did not answer")
)

// doubted returns why somebody else gave the child up, and otherwise err.
func (c *conn) doubted(err error) error {
	select {
	case earlier := <-c.doubt:
		return earlier
	default:
		return err
	}
}

// weigh ends the child when it uses too much.
func (c *conn) weigh(ctx context.Context) {
	tick := time.NewTicker(weighEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := c.host.cfg.Limits.exceeded(c.pid); err != nil {
			c.suspect(err)
			c.proc.kill()
			return
		}
	}
}

// stand keeps what the child says of itself.
func (c *conn) stand(s *signerpb.Standing) {
	if s == nil {
		return
	}
	if n := s.GetParallel(); n > 0 {
		c.host.parallel.Store(int64(n))
	}
	counts := map[signer.Class]uint64{}
	for class, n := range s.GetFailures() {
		counts[signer.Class(class)] = n
	}
	c.host.failures.hear(c, counts)
}

// A death is why a child is no more.
type death struct {
	how string // what an operator may read
	err error
}

func (d *death) Error() string {
	if d.err == nil || d.err.Error() == d.how {
		return d.how
	}
	return d.how + ": " + d.err.Error()
}

func (d *death) Unwrap() error { return d.err }

// reason makes a death of what watch or a failed start returned. The child is stopped.
func (c *conn) reason(err error) error {
	how := ""
	if c.proc != nil {
		how = c.proc.reason()
	}
	var over *excess
	switch {
	case errors.As(err, &over):
		how = over.text
	case errors.Is(err, errHang):
		how = errHang.Error()
	case how != "": // it ended by itself
	case errors.Is(err, errSilent):
		how = errSilent.Error()
	default:
		how = "it did not work"
	}
	return &death{how, err}
}

// suspect tells the supervisor that the child does not work.
func (c *conn) suspect(err error) {
	select {
	case c.doubt <- err:
	default:
	}
}

// gone waits until the child is given up, so that the next call gets the next child.
func (c *conn) gone(ctx context.Context) error {
	for {
		p := c.host.phase.Load()
		if p.conn != c {
			return nil
		}
		select {
		case <-p.over:
		case <-ctx.Done():
			return fault.From(ctx.Err())
		}
	}
}

const (
	graceful = 3 * time.Second
	abrupt   = 3 * time.Second
)

// stop ends the child and waits until it is gone: gently if it still works, otherwise by SIGKILL.
func (c *conn) stop(gently bool) {
	defer os.RemoveAll(c.dir)
	defer c.end()
	if !gently {
		c.end()
		if c.proc != nil {
			c.proc.kill()
		}
	}
	if c.requests != nil {
		c.requests.Close()
	}
	if c.receiving {
		<-c.ended
	}
	if c.client == nil {
		return
	}
	done := make(chan struct{})
	go func() {
		c.client.Kill()
		close(done)
	}()
	select {
	case <-done:
		return
	case <-time.After(graceful):
	}
	c.proc.kill()
	select {
	case <-done:
	case <-time.After(abrupt): // something that the module started holds the pipes open
		c.host.cfg.Log.Warn("the plugin left processes behind", "pid", c.pid)
	}
}

// sign has msgs signed and fills out. It returns the places of the results that were lost with the child.
func (c *conn) sign(ctx context.Context, ref uint32, msgs [][]byte, out []signer.Result) []int {
	call := &calling{results: out, missing: len(msgs), done: make(chan struct{})}
	first, err := c.post(call, ref, msgs)
	if err != nil {
		failAll(out, err)
		if fault.CodeOf(err) == fault.DeviceDead {
			return all(len(out))
		}
		return nil
	}
	select {
	case <-call.done:
	case <-ctx.Done():
		c.abandon(call, first, len(msgs), ctx.Err())
	}
	for i := range out {
		if out[i].Err != nil {
			_ = c.host.noticed(out[i].Err)
		}
	}
	return call.lost
}

func all(n int) []int {
	out := make([]int, n)
	for i := range out {
		out[i] = i
	}
	return out
}

// post sends the requests of one call. It returns the first of their ids, which follow each other.
func (c *conn) post(call *calling, ref uint32, msgs [][]byte) (uint64, error) {
	requests := make([]signerpb.SignRequest, len(msgs))
	size := 0
	for _, m := range msgs {
		if len(m) > maxMessage {
			return 0, fault.New(fault.TooLarge, "a message has at most %d bytes", maxMessage)
		}
		size += len(m)
	}
	c.mu.Lock()
	if c.dead {
		c.mu.Unlock()
		return 0, fault.New(fault.DeviceDead, "the plugin process died")
	}
	if len(c.pending)+len(msgs) > maxPending {
		c.mu.Unlock()
		return 0, fault.New(fault.DeviceBusy, "too many requests wait for the device")
	}
	first := c.last + 1
	c.last += uint64(len(msgs))
	c.bytes += size
	inline := c.bytes <= inlineBytes
	for i, m := range msgs {
		id := first + uint64(i)
		c.pending[id] = place{call, i, len(m)}
		requests[i].Id, requests[i].Ref, requests[i].Message = id, ref, m
	}
	c.mu.Unlock()
	if inline {
		c.send(requests)
		return first, nil
	}
	for i := range requests { // the caller may be gone when they are sent
		requests[i].Message = bytes.Clone(requests[i].Message)
	}
	go c.send(requests)
	return first, nil
}

// send writes requests as packets, small enough that several workers share a batch.
func (c *conn) send(requests []signerpb.SignRequest) {
	frame := &signerpb.SignFrame{}
	size := 0
	flush := func() {
		if len(frame.Requests) > 0 {
			c.write(frame)
		}
		frame, size = &signerpb.SignFrame{}, 0
	}
	for i := range requests {
		r := &requests[i]
		if len(r.Message) > largest {
			go c.sendLarge(r)
			continue
		}
		if frame.Requests = append(frame.Requests, r); len(frame.Requests) == maxRequests {
			flush()
		} else if size += len(r.Message); size >= fullPacket {
			flush()
		}
	}
	flush()
}

func (c *conn) write(frame *signerpb.SignFrame) {
	b, err := proto.Marshal(frame)
	if err == nil {
		_, err = c.requests.Write(b)
	}
	if err != nil {
		c.suspect(err) // the supervisor closes the socket, which fails all that is pending
	}
}

// sendLarge has one large message signed through gRPC.
func (c *conn) sendLarge(r *signerpb.SignRequest) {
	out, err := c.rpc.SignLarge(c.ctx, &signerpb.SignFrame{Requests: []*signerpb.SignRequest{r}})
	if err != nil {
		c.suspect(err)
		return
	}
	c.deliver(out.GetResults())
}

// receive delivers results until the child closes its end, and then fails what is still pending.
func (c *conn) receive() {
	defer close(c.ended)
	buf := make([]byte, maxPacket)
	for {
		n, err := c.requests.Read(buf)
		var frame signerpb.ResultFrame
		if err == nil {
			err = proto.Unmarshal(buf[:n], &frame)
		}
		if err != nil {
			c.suspect(err)
			c.fail(err)
			return
		}
		if frame.GetPinTaken() {
			c.taken.Store(true)
		}
		c.deliver(frame.GetResults())
	}
}

func (c *conn) deliver(results []*signerpb.SignResult) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range results {
		p, ok := c.pending[r.GetId()]
		if !ok {
			continue // abandoned
		}
		delete(c.pending, r.GetId())
		c.bytes -= p.size
		p.call.results[p.at] = signer.Result{Signature: r.GetSignature(), Err: decodeError(r.GetError())}
		if r.Error == nil && !c.proved.Load() {
			c.proved.Store(true)
		}
		if p.call.missing--; p.call.missing == 0 {
			close(p.call.done)
		}
	}
}

func (c *conn) fail(cause error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dead = true
	for id, p := range c.pending {
		delete(c.pending, id)
		p.call.results[p.at].Err = fault.Wrap(fault.DeviceDead, cause, "the plugin process died during the call")
		p.call.lost = append(p.call.lost, p.at)
		if p.call.missing--; p.call.missing == 0 {
			close(p.call.done)
		}
	}
}

// abandon ends a call whose context ended; late results are dropped.
func (c *conn) abandon(call *calling, first uint64, n int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id := first; id < first+uint64(n); id++ {
		if p, ok := c.pending[id]; ok {
			delete(c.pending, id)
			c.bytes -= p.size
			call.results[p.at].Err = fault.From(err)
		}
	}
}
