//go:build cgo

package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/api/wire"
)

// A recorder keeps what one worker saw while the clock ran.
type recorder struct {
	on   *atomic.Bool
	n    int
	took []time.Duration
}

// note counts n results that came so long after they were asked for.
func (r *recorder) note(n int, took time.Duration) {
	if r.on.Load() {
		r.n += n
		r.took = append(r.took, took)
	}
}

// A worker asks in a closed loop: step asks once more and notes what came, drain waits for what was asked and has not
// come. One goroutine drives it.
type worker interface {
	step(*recorder) error
	drain() error
}

// calls is a worker of which each step gets n results.
type calls struct {
	n  int
	fn func() error
}

func (c calls) step(r *recorder) error {
	start := time.Now()
	err := c.fn()
	if err == nil {
		r.note(c.n, time.Since(start))
	}
	return err
}

func (calls) drain() error { return nil }

// An entrant is a load of some workers, which are there before the clock starts and stay over the windows.
type entrant struct {
	name    string
	workers []worker
	crowd   []*member // or processes that ask with body
	body    []byte
	rates   []float64 // results a second, by window
	took    []time.Duration
}

// window runs the load and keeps the figures of the time d, after a time to warm up.
func (e *entrant) window(ctx context.Context, warm, d time.Duration) error {
	if len(e.crowd) > 0 {
		return e.order(warm, d)
	}
	var on, over atomic.Bool
	failed := make(chan error, len(e.workers))
	recs := make([]recorder, len(e.workers))
	var wg sync.WaitGroup
	for i, w := range e.workers {
		recs[i].on = &on
		wg.Go(func() {
			for !over.Load() {
				if err := w.step(&recs[i]); err != nil {
					failed <- err
					return
				}
			}
			if err := w.drain(); err != nil {
				failed <- err
			}
		})
	}
	err := wait(ctx, warm, failed)
	on.Store(true)
	start := time.Now()
	if err == nil {
		err = wait(ctx, d, failed)
	}
	on.Store(false)
	took := time.Since(start)
	over.Store(true)
	wg.Wait()
	select {
	case late := <-failed:
		err = errors.Join(err, late)
	default:
	}
	if err != nil {
		return fmt.Errorf("%s: %w", e.name, err)
	}
	n := 0
	for i := range recs {
		n += recs[i].n
		e.took = append(e.took, recs[i].took...)
	}
	e.rates = append(e.rates, float64(n)/took.Seconds())
	return nil
}

// wait waits for a time, or less where ctx ends or a worker fails.
func wait(ctx context.Context, d time.Duration, failed <-chan error) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case err := <-failed:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// rate returns the median of the windows' rates.
func (e *entrant) rate() float64 {
	if len(e.rates) == 0 {
		return 0
	}
	r := slices.Sorted(slices.Values(e.rates))
	return r[len(r)/2]
}

// quantile returns a quantile of all that was noted, in microseconds.
func (e *entrant) quantile(q float64) float64 {
	if len(e.took) == 0 {
		return 0
	}
	slices.Sort(e.took)
	return float64(e.took[min(int(q*float64(len(e.took))), len(e.took)-1)].Nanoseconds()) / 1e3
}

// turns runs each entrant for one window in turn, as often as said.
func turns(ctx context.Context, rounds int, warm, d time.Duration, es ...*entrant) error {
	for range rounds {
		for _, e := range es {
			if err := e.window(ctx, warm, d); err != nil {
				return err
			}
		}
	}
	return nil
}

// A wired is one connection on which requests go out as they were prepared, and of the replies no more is read than
// whether they are good: what the load costs is taken from the daemon.
type wired struct {
	net.Conn
	in   *bufio.Reader
	body []byte
}

func dial(socket string) (*wired, error) {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return nil, err
	}
	return &wired{Conn: c, in: bufio.NewReaderSize(c, 64<<10)}, nil
}

// prepare returns a whole request.
func prepare(path string, body []byte) []byte {
	const head = "POST %s HTTP/1.1\r\nHost: trustd\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
	return append(fmt.Appendf(nil, head, path, len(body)), body...)
}

var (
	contentLength = []byte("Content-Length: ")
	anError       = []byte(`"error":`)
	aSignature    = []byte(`"signature":`)
)

// call sends a prepared request and reads the reply, in which each result must be a signature.
func (w *wired) call(request []byte, results int) error {
	if _, err := w.Write(request); err != nil {
		return err
	}
	status, err := w.in.ReadSlice('\n')
	if err != nil {
		return err
	}
	good := bytes.HasPrefix(status, []byte("HTTP/1.1 200 "))
	size := -1
	for {
		line, err := w.in.ReadSlice('\n')
		if err != nil {
			return err
		}
		if len(line) <= 2 {
			break
		}
		if rest, ok := bytes.CutPrefix(line, contentLength); ok {
			if size, err = strconv.Atoi(string(bytes.TrimSpace(rest))); err != nil {
				return err
			}
		}
	}
	if size < 0 {
		return errors.New("a reply of unknown length")
	}
	w.body = slices.Grow(w.body[:0], size)[:size]
	if _, err := io.ReadFull(w.in, w.body); err != nil {
		return err
	}
	if !good || bytes.Contains(w.body, anError) || bytes.Count(w.body, aSignature) != results {
		return fmt.Errorf("a refusal: %.300s", w.body)
	}
	return nil
}

// A streamed is a worker that keeps a window of requests under way on one stream. Whatever comes is asked for anew in
// one write, as a client does that has much to send.
type streamed struct {
	conn   net.Conn
	in     io.Reader // the results, one to a line
	window int
	line   int    // bytes of one request
	lines  []byte // a window of requests
	out    []byte
	buf    []byte

	asked []time.Time // ring of the times at which requests went out
	first int         // place in it of the oldest that is under way
	under int         // how many are
	tail  [16]byte    // the end of what was read before
}

// openStream opens a stream on which the daemon signs.
func openStream(socket string, request []byte, window int) (*streamed, error) {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return nil, err
	}
	const head = "POST /v1/packets/sign-stream HTTP/1.1\r\nHost: trustd\r\n" +
		"Content-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
	if _, err := c.Write([]byte(head)); err != nil {
		c.Close()
		return nil, err
	}
	resp, err := http.ReadResponse(bufio.NewReaderSize(c, 64<<10), nil)
	if err != nil {
		c.Close()
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		c.Close()
		return nil, fmt.Errorf("the daemon opens no stream: %s", resp.Status)
	}
	line := append(bytes.Clone(request), '\n')
	return &streamed{conn: c, in: resp.Body, window: window, line: len(line), lines: bytes.Repeat(line, window),
		buf: make([]byte, 64<<10), asked: make([]time.Time, window)}, nil
}

// ask sends n requests in one chunk.
func (s *streamed) ask(n int) error {
	s.out = strconv.AppendInt(s.out[:0], int64(n*s.line), 16)
	s.out = append(append(append(s.out, "\r\n"...), s.lines[:n*s.line]...), "\r\n"...)
	now := time.Now()
	for i := range n {
		s.asked[(s.first+s.under+i)%s.window] = now
	}
	s.under += n
	_, err := s.conn.Write(s.out)
	return err
}

// come reads some results.
func (s *streamed) come(r *recorder) (int, error) {
	n, err := s.in.Read(s.buf[copy(s.buf, s.tail[:]):])
	if err != nil {
		return 0, err
	}
	read := s.buf[:len(s.tail)+n]
	if bytes.Contains(read, anError) {
		return 0, fmt.Errorf("a refusal: %.300s", read)
	}
	got := bytes.Count(read[len(s.tail):], []byte("\n"))
	copy(s.tail[:], read[len(read)-len(s.tail):])
	now := time.Now()
	for range got {
		if r != nil {
			r.note(1, now.Sub(s.asked[s.first]))
		}
		s.first = (s.first + 1) % s.window
	}
	s.under -= got
	return got, nil
}

func (s *streamed) step(r *recorder) error {
	if s.under < s.window {
		if err := s.ask(s.window - s.under); err != nil {
			return err
		}
	}
	for {
		got, err := s.come(r)
		if err != nil || got > 0 {
			return err
		}
	}
}

func (s *streamed) drain() error {
	for s.under > 0 {
		if _, err := s.come(nil); err != nil {
			return err
		}
	}
	return nil
}

// A traffic makes loads for one daemon, which run in turns, and closes their connections.
type traffic struct {
	socket string
	wires  []*wired // for requests one after the other: loads that take turns share them
	conns  []io.Closer
}

func (t *traffic) Close() {
	for _, c := range t.conns {
		c.Close()
	}
}

// signing returns the body of a request.
func signing(agent string, draft []byte, batchable bool) ([]byte, error) {
	return wire.AppendSign(nil, &api.SignPacketRequest{Agent: agent, Packet: draft, Batchable: &batchable})
}

// singles returns callers that each have a connection and ask for one signature after the other, of the requests in
// turn.
func (t *traffic) singles(name string, callers int, bodies ...[]byte) (*entrant, error) {
	requests := make([][]byte, len(bodies))
	for i, b := range bodies {
		requests[i] = prepare("/v1/packets/sign", b)
	}
	var next atomic.Int64
	e := &entrant{name: name}
	for i := range callers {
		w, err := t.wire(i)
		if err != nil {
			return nil, err
		}
		e.workers = append(e.workers, calls{1, func() error {
			return w.call(requests[int(next.Add(1)-1)%len(requests)], 1)
		}})
	}
	return e, nil
}

// batches returns callers that each have a connection and ask for so many signatures at a time.
func (t *traffic) batches(name string, callers, size int, body []byte) (*entrant, error) {
	whole := append([]byte(`{"requests":[`), bytes.Join(slices.Repeat([][]byte{body}, size), []byte(","))...)
	request := prepare("/v1/packets/sign-batch", append(whole, "]}"...))
	e := &entrant{name: name}
	for i := range callers {
		w, err := t.wire(i)
		if err != nil {
			return nil, err
		}
		e.workers = append(e.workers, calls{size, func() error { return w.call(request, size) }})
	}
	return e, nil
}

// streams returns callers that each have a stream with a window of requests under way.
func (t *traffic) streams(name string, callers, window int, body []byte) (*entrant, error) {
	e := &entrant{name: name}
	for range callers {
		s, err := openStream(t.socket, body, window)
		if err != nil {
			return nil, err
		}
		t.conns = append(t.conns, s.conn)
		e.workers = append(e.workers, s)
	}
	return e, nil
}

// wire returns the connection of that number, which it makes where there is none yet.
func (t *traffic) wire(i int) (*wired, error) {
	for len(t.wires) <= i {
		w, err := dial(t.socket)
		if err != nil {
			return nil, err
		}
		t.wires, t.conns = append(t.wires, w), append(t.conns, w)
	}
	return t.wires[i], nil
}
