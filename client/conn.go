package client

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// This file speaks HTTP/1.1 over connections of its own instead of net/http's Transport, whose two goroutines for
// each connection cost a call more than all that the daemon does with it. Replies are read by net/http.

const (
	maxIdle  = 64              // connections that are kept open
	keepIdle = 4 * time.Minute // for as long as this; the daemon closes them after five
)

// past is a deadline that wakes whoever waits on a connection.
var past = time.Unix(1, 0)

// A conn is one connection; one call at a time uses it.
type conn struct {
	*net.UnixConn
	in   *bufio.Reader
	out  []byte
	idle time.Time
}

// A pool keeps connections open between calls.
type pool struct {
	socket string

	mu   sync.Mutex
	idle []*conn // the longest idle first
}

// take returns a connection that was used before and still lives, or a new one.
func (p *pool) take(ctx context.Context) (*conn, error) {
	for {
		c := p.pop()
		if c == nil {
			return p.dial(ctx)
		}
		if c.alive() {
			return c, nil
		}
		c.Close()
	}
}

func (p *pool) pop() *conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := len(p.idle)
	if n == 0 {
		return nil
	}
	c := p.idle[n-1]
	p.idle = p.idle[:n-1]
	return c
}

func (p *pool) dial(ctx context.Context) (*conn, error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, "unix", p.socket)
	if err != nil {
		return nil, &dialError{err}
	}
	return &conn{UnixConn: nc.(*net.UnixConn), in: bufio.NewReaderSize(nc, 8<<10)}, nil
}

// alive reports whether an idle connection is still open: a daemon that was restarted has closed it. Whatever can
// be read where nothing was asked is no reply either.
func (c *conn) alive() bool {
	if time.Since(c.idle) > keepIdle || c.in.Buffered() > 0 {
		return false
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	open := false
	var b [1]byte
	err = raw.Read(func(fd uintptr) bool {
		_, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		open = err == syscall.EAGAIN
		return true
	})
	return err == nil && open
}

// put keeps a connection whose reply has been read to its end.
func (p *pool) put(c *conn) {
	c.idle = time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.idle) == maxIdle {
		p.idle[0].Close()
		p.idle = append(p.idle[:0], p.idle[1:]...)
	}
	p.idle = append(p.idle, c)
}

// close closes idle connections.
func (p *pool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.idle {
		c.Close()
	}
	p.idle = nil
}

// roundTrip makes a call and returns the header of the reply and its whole body.
func (p *pool) roundTrip(ctx context.Context, k call) (*http.Response, []byte, error) {
	c, err := p.take(ctx)
	if err != nil {
		return nil, nil, err
	}
	release := c.watch(ctx)
	resp, body, err := c.exchange(k)
	if ended := release(); err != nil || ended || resp.Close {
		c.Close()
	} else {
		p.put(c)
	}
	return resp, body, err
}

// watch wakes the connection when ctx ends. release reports whether it has.
func (c *conn) watch(ctx context.Context) (release func() (ended bool)) {
	if ctx.Done() == nil {
		return func() bool { return false }
	}
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(past) })
	return func() bool { return !stop() }
}

// exchange sends a call and reads the reply. A daemon that refuses a long body replies before it has read it all,
// and closes: so a failed write is followed by a read all the same.
func (c *conn) exchange(k call) (*http.Response, []byte, error) {
	c.out = appendHead(c.out[:0], k)
	if k.body != nil {
		c.out = append(append(append(c.out, "Content-Length: "...), strconv.Itoa(len(k.body))...), "\r\n"...)
	}
	c.out = append(c.out, "\r\n"...)
	werr := c.send(k.body)
	resp, err := c.readHead()
	if err != nil {
		return nil, nil, errors.Join(werr, err)
	}
	defer resp.Body.Close()
	body, err := readReply(resp)
	if werr != nil {
		resp.Close = true
	}
	return resp, body, err
}

// send writes the head and the body, in one system call where both are short.
func (c *conn) send(body []byte) error {
	const short = 16 << 10
	if len(body) <= short {
		c.out = append(c.out, body...)
		_, err := c.Write(c.out)
		return err
	}
	parts := net.Buffers{c.out, body}
	_, err := parts.WriteTo(c.UnixConn)
	return err
}

func appendHead(b []byte, k call) []byte {
	b = append(append(append(append(b, k.method...), ' '), k.path...), " HTTP/1.1\r\nHost: trustd\r\n"...)
	if k.key != "" {
		b = append(append(append(b, "Idempotency-Key: "...), k.key...), "\r\n"...)
	}
	if k.body != nil {
		b = append(b, "Content-Type: application/json\r\n"...)
	}
	return b
}

func (c *conn) readHead() (*http.Response, error) {
	for {
		resp, err := http.ReadResponse(c.in, nil)
		if err != nil || resp.StatusCode >= 200 {
			return resp, err
		}
	}
}

func readReply(resp *http.Response) ([]byte, error) {
	if n := resp.ContentLength; n >= 0 && n <= maxReply {
		b := make([]byte, n)
		_, err := io.ReadFull(resp.Body, b)
		return b, err
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxReply+1))
	if len(b) > maxReply {
		return nil, errors.New("the reply is too long")
	}
	return b, err
}
