// Package caller says who is at the other end of a Unix socket. It is the kernel's word, never the caller's:
// credentials of the connection (SO_PEERCRED), a hold on the process (SO_PEERPIDFD, or its folder in /proc), and
// the sender of each message (SO_PASSCRED).
//
// The one thing to get wrong: a Caller is what a process was when it connected. Before a request is decided on, and
// after its last byte has been read, Recheck must say that the process is still that one.
//
// What is told apart, and what cannot be, stands in docs/callers.md.
package caller

import (
	"context"
	"net"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/trustd/trustd/fault"
)

// A Caller is the process at the other end of a connection, as it was at accept. Its fields do not change and are
// for showing; what a request may do is decided by Match, which looks again. It is safe for concurrent use.
type Caller struct {
	UID    uint32
	GID    uint32
	Groups []uint32 // supplementary groups; not to be modified
	PID    int32
	Exe    string // the path that the kernel shows, which a mount namespace can choose; "" where it is hidden
	Cgroup string // in the service manager's hierarchy, or in cgroup v2
	Unit   string // of the system's service manager; "" for none, and for those of a user's own

	process *process
	conn    *Conn // nil for Self
}

// A peer is what the kernel says of the connecting end.
type peer struct {
	pid      int32
	uid, gid uint32
}

// A connector is a peer at the time of its connecting, and the kernel's hold on it.
type connector struct {
	peer
	pidfd       int // -1 for none
	groups      []uint32
	groupsKnown bool
}

// newCaller identifies a connector. It owns who.pidfd from here on.
func newCaller(h *host, who connector) (*Caller, error) {
	if who.pid <= 0 {
		closeFD(who.pidfd)
		return nil, fault.New(fault.CallerUnknown, "the process is outside the daemon's pid namespace")
	}
	p, err := openProcess(h, who)
	if err != nil {
		return nil, err
	}
	c := &Caller{UID: who.uid, GID: who.gid, PID: who.pid, process: p}
	if err := c.fill(); err != nil {
		p.close()
		return nil, err
	}
	return c, nil
}

func (c *Caller) fill() error {
	groups, err := c.process.groups()
	if err != nil {
		return err
	}
	c.Groups = slices.Clip(groups)
	g, err := c.process.group()
	if err != nil {
		return err
	}
	c.Cgroup, c.Unit = g.place, g.unit
	if c.process.exeKnown {
		if c.Exe, err = readlinkAt(c.process.dir, "exe"); err != nil {
			return c.process.lost(err)
		}
	}
	return nil
}

// Recheck says whether the caller can still be held to be what it was at accept: alive, the same user and group,
// in our user namespace, running the same program, and the only one that wrote on the connection. It returns
// caller_unknown or caller_changed. What Match looked up before is forgotten.
func (c *Caller) Recheck() error {
	if c == nil || c.process == nil {
		return fault.New(fault.CallerUnknown, "the request did not come over a socket")
	}
	if c.conn != nil {
		if err := c.conn.Err(); err != nil {
			return err
		}
	}
	c.process.mu.Lock()
	defer c.process.mu.Unlock()
	return c.process.recheck()
}

// ExeSHA256 returns the SHA-256 of the program that the caller runs, in lower-case hex. The first call for a
// program reads all of it.
func (c *Caller) ExeSHA256() (string, error) {
	if c == nil || c.process == nil {
		return "", fault.New(fault.CallerUnknown, "the request did not come over a socket")
	}
	return c.process.sum()
}

// FromConn returns the caller on a connection that a Listener of this package accepted, or why it cannot be
// identified. Any other connection has no caller: nobody checks who writes on it.
func FromConn(nc net.Conn) (*Caller, error) {
	c, ok := nc.(*Conn)
	if !ok {
		return nil, fault.New(fault.CallerUnknown, "the request did not come over a socket")
	}
	return c.caller, c.unknown
}

type contextKey struct{}

// found is what a context holds: a caller, or why there is none.
type found struct {
	caller *Caller
	err    error
}

// NewContext returns a context that carries the caller.
func NewContext(ctx context.Context, c *Caller) context.Context {
	return context.WithValue(ctx, contextKey{}, found{caller: c})
}

// ConnContext is for http.Server: it returns a context that carries the connection's caller, or why there is none.
func ConnContext(ctx context.Context, nc net.Conn) context.Context {
	c, err := FromConn(nc)
	return context.WithValue(ctx, contextKey{}, found{c, err})
}

// FromContext returns the caller that the context carries.
func FromContext(ctx context.Context) (*Caller, bool) {
	f, _ := ctx.Value(contextKey{}).(found)
	return f.caller, f.caller != nil
}

// Require returns the caller that the context carries, checked again, or why the request has none that can be
// believed.
func Require(ctx context.Context) (*Caller, error) {
	f, _ := ctx.Value(contextKey{}).(found)
	if f.err != nil {
		return nil, f.err
	}
	if err := f.caller.Recheck(); err != nil {
		return nil, err
	}
	return f.caller, nil
}

// Self returns the daemon's own process as a caller: for what the daemon asks of itself.
func Self() (*Caller, error) { return self() }

var self = sync.OnceValues(func() (*Caller, error) {
	h, err := theHost()
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "")
	}
	pid := os.Getpid()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		fd = -1
	}
	return newCaller(h, connector{peer: peer{int32(pid), uint32(os.Getuid()), uint32(os.Getgid())}, pidfd: fd})
})
