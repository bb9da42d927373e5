package client

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/api/wire"
	"github.com/trustd/trustd/fault"
)

// A Stream sends requests and receives their results over one connection, in order and without waiting in between.
//
// One goroutine may send while another receives. The daemon reads some hundreds of requests ahead and then no more
// until results are received, so a caller that sends many must receive at the same time; Send blocks until then.
type Stream[Q, R any] struct {
	ctx   context.Context
	conn  *conn
	in    *bufio.Reader // the results
	write func([]byte, *Q) ([]byte, error)
	box   outbox
	wrote chan struct{} // closed when nothing is sent any more
	stop  func() bool   // of the watch over ctx

	sent     atomic.Int64
	received atomic.Int64
	closed   atomic.Bool // by Close
	broken   error       // what Recv returns from now on
}

type (
	// A SignStream signs packets: see Client.SignStream.
	SignStream = Stream[api.SignPacketRequest, api.SignPacketResult]
	// A VerifyStream decides on packets: see Client.VerifyStream.
	VerifyStream = Stream[api.VerifyPacketRequest, api.VerifyPacketResult]
)

// SignStream opens a stream on which packets are signed. The end of ctx breaks it off.
func (c *Client) SignStream(ctx context.Context) (*SignStream, error) {
	return openStream[api.SignPacketRequest, api.SignPacketResult](ctx, c, "/v1/packets/sign-stream", wire.AppendSign)
}

// VerifyStream opens a stream on which packets are verified. The end of ctx breaks it off.
func (c *Client) VerifyStream(ctx context.Context) (*VerifyStream, error) {
	return openStream[api.VerifyPacketRequest, api.VerifyPacketResult](
		ctx, c, "/v1/packets/verify-stream", wire.AppendVerify)
}

func openStream[Q, R any](
	ctx context.Context, c *Client, path string, write func([]byte, *Q) ([]byte, error),
) (*Stream[Q, R], error) {
	conn, err := c.pool.dial(ctx)
	if err != nil {
		err, _ = c.transportError(ctx, err)
		return nil, err
	}
	s := &Stream[Q, R]{ctx: ctx, conn: conn, write: write, wrote: make(chan struct{})}
	s.box.changed.L = &s.box.mu
	s.stop = context.AfterFunc(ctx, func() { conn.Close() })
	if err := s.open(c, path); err != nil {
		s.stop()
		conn.Close()
		return nil, err
	}
	go func() {
		defer close(s.wrote)
		s.box.drain(conn)
	}()
	return s, nil
}

func (s *Stream[Q, R]) open(c *Client, path string) error {
	const head = " HTTP/1.1\r\nHost: trustd\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
	_, werr := s.conn.Write([]byte("POST " + path + head))
	resp, err := s.conn.readHead()
	if err != nil {
		err, _ = c.transportError(s.ctx, errors.Join(werr, err))
		return err
	}
	if mediaType(resp) == "application/x-ndjson" {
		s.in = bufio.NewReaderSize(resp.Body, 32<<10)
		return nil
	}
	body, err := readReply(resp)
	if err != nil {
		return errGone(err)
	}
	if p, ok := problemIn(resp, body); ok {
		return problemError(p)
	}
	return errStranger(resp, nil)
}

// Send sends one request. It returns once the request is on its way. An error other than malformed means that the
// stream has ended; Recv says why.
func (s *Stream[Q, R]) Send(r Q) error {
	return s.box.add(func(b []byte) ([]byte, error) {
		start := len(b)
		b, err := s.write(b, &r)
		if err != nil {
			return b, err
		}
		flatten(b[start:])
		s.sent.Add(1)
		return append(b, '\n'), nil
	})
}

// flatten makes one line of JSON: between its tokens, and nowhere else, a line break is white space.
func flatten(b []byte) {
	for i, c := range b {
		if c == '\n' || c == '\r' {
			b[i] = ' '
		}
	}
}

// CloseSend says that no more requests come. Results go on until each request has one.
func (s *Stream[Q, R]) CloseSend() error { return s.box.finish() }

// Recv returns the next result, in the order of the requests; what is wrong with that one request is in its Error.
// It returns io.EOF after the last result once CloseSend was called. Any other error is a *fault.Error and ends the
// stream: the requests that have no result yet may or may not have been done.
func (s *Stream[Q, R]) Recv() (R, error) {
	var out R
	if s.broken != nil {
		return out, s.broken
	}
	text, err := s.readLine()
	if err == nil {
		if err = wire.DecodeReply(text, &out); err == nil {
			s.received.Add(1)
			return out, nil
		}
	}
	s.broken = s.ended(err)
	s.box.fail(s.broken)
	var none R
	return none, s.broken
}

// readLine returns the next line in memory of its own: what is decoded from it points into it.
func (s *Stream[Q, R]) readLine() ([]byte, error) {
	var text []byte
	for {
		part, err := s.in.ReadSlice('\n')
		text = append(text, part...)
		switch {
		case err != bufio.ErrBufferFull:
			return text, s.wholeLine(text, err)
		case len(text) > maxReply:
			return nil, errors.New("the line is too long")
		}
	}
}

func (s *Stream[Q, R]) wholeLine(text []byte, err error) error {
	if err == io.EOF && len(text) > 0 {
		return io.ErrUnexpectedEOF
	}
	return err
}

// ended returns the end of the stream as callers see it. The daemon ends a stream in an orderly way only when it
// stops, or after a line that is too long.
func (s *Stream[Q, R]) ended(err error) error {
	waiting := s.sent.Load() - s.received.Load()
	switch {
	case s.closed.Load():
		return fault.Wrap(fault.Canceled, err, "the stream was closed")
	case s.ctx.Err() != nil:
		return fault.From(context.Cause(s.ctx))
	case err == io.EOF && waiting == 0 && s.box.finished():
		return io.EOF
	case err == io.EOF:
		return fault.Wrap(fault.Stopping, err, "the daemon ended the stream with %d requests unanswered", waiting)
	}
	gone := *fault.From(errGone(err))
	gone.Text = fmt.Sprintf("the connection to the daemon broke with %d requests unanswered", waiting)
	return &gone
}

// Close breaks the stream off and frees its connection. It must be called, also after Recv has returned an error.
func (s *Stream[Q, R]) Close() error {
	s.closed.Store(true)
	s.stop()
	s.box.fail(fault.New(fault.Canceled, "the stream was closed"))
	s.conn.Close() // an error of it changes nothing for anybody
	<-s.wrote
	return nil
}

// maxBox bounds what waits to be written, in bytes.
const maxBox = 256 << 10

// An outbox holds the lines of a stream until they are written. While one write is under way, lines gather for the
// next, so that a caller in a hurry pays for few system calls and one who is not pays no wait.
type outbox struct {
	mu      sync.Mutex
	changed sync.Cond
	lines   []byte
	done    bool  // no more lines come
	err     error // none can be sent any more
}

// add appends what write does, once there is room.
func (o *outbox) add(write func([]byte) ([]byte, error)) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	for len(o.lines) > maxBox && o.err == nil && !o.done {
		o.changed.Wait()
	}
	switch {
	case o.err != nil:
		return o.err
	case o.done:
		return fault.New(fault.Usage, "sending on a stream that is closed for sending")
	}
	lines, err := write(o.lines)
	if err != nil {
		return err
	}
	o.lines = lines
	o.changed.Broadcast()
	return nil
}

func (o *outbox) finish() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.done = true
	o.changed.Broadcast()
	return o.err
}

func (o *outbox) finished() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.done
}

func (o *outbox) fail(err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.err == nil {
		o.err = err
	}
	o.changed.Broadcast()
}

// drain writes lines in chunks until there are no more or none can be written.
func (o *outbox) drain(w io.Writer) {
	var spare []byte
	for {
		lines, last, ok := o.swap(spare)
		if !ok {
			return
		}
		if err := writeChunk(w, lines, last); err != nil {
			o.fail(errGone(err)) // Recv finds out for itself what became of the connection
			return
		}
		if last {
			return
		}
		spare = lines[:0]
	}
}

// swap waits for lines and takes them.
func (o *outbox) swap(spare []byte) (lines []byte, last, ok bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for len(o.lines) == 0 && !o.done && o.err == nil {
		o.changed.Wait()
	}
	if o.err != nil {
		return nil, false, false
	}
	lines, o.lines = o.lines, spare
	o.changed.Broadcast()
	return lines, o.done, true
}

func writeChunk(w io.Writer, lines []byte, last bool) error {
	var parts net.Buffers
	if len(lines) > 0 {
		parts = append(parts, []byte(strconv.FormatInt(int64(len(lines)), 16)+"\r\n"), lines, []byte("\r\n"))
	}
	if last {
		parts = append(parts, []byte("0\r\n\r\n"))
	}
	_, err := parts.WriteTo(w)
	return err
}
