package client

import (
	"context"
	"fmt"
	"io/fs"
	"net"
	"os"
	"syscall"
	"testing"

	"github.com/trustd/trustd/fault"
)

// TestSocketThatMayNotBeOpened is the caller's to repair, not the daemon's. Root opens any, so the kernel's answer
// is made here.
func TestSocketThatMayNotBeOpened(t *testing.T) {
	c := New("/run/x")
	refused := &net.OpError{Op: "dial", Net: "unix", Err: os.NewSyscallError("connect", syscall.EACCES)}
	err, sent := c.transportError(context.Background(), &dialError{refused})
	if fault.CodeOf(err) != fault.Denied || fault.From(err).Hint == "" || sent {
		t.Errorf("%v, sent %t", err, sent)
	}
	gone := &net.OpError{Op: "dial", Net: "unix", Err: fs.ErrNotExist}
	if err, sent := c.transportError(context.Background(), fmt.Errorf("calling: %w", &dialError{gone})); sent ||
		fault.CodeOf(err) != fault.Unreachable {
		t.Errorf("%v, sent %t", err, sent)
	}
}

// TestIdleConnectionsAreBounded: the longest idle is closed.
func TestIdleConnectionsAreBounded(t *testing.T) {
	l, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	p := pool{socket: l.Addr().String()}
	defer p.close()
	var first *conn
	for i := range maxIdle + 1 {
		c, err := p.dial(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			first = c
		}
		p.put(c)
	}
	if len(p.idle) != maxIdle {
		t.Errorf("%d connections are kept", len(p.idle))
	}
	if _, err := first.Write([]byte("x")); err == nil {
		t.Error("the longest idle is still open")
	}
}
