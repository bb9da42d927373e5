package caller

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/fault"
)

// A Conn is a connection on which one process may write: the one that connected. Credentials of a connection stay
// the connector's when it forks or passes the descriptor on, so each read asks the kernel who sent what it got. A
// second sender ends the connection: reads fail with caller_changed, and all that is still sent is one reply that
// says so, where a reply may begin.
//
// A Conn is safe for concurrent use. Descriptors that are sent along are dropped by the kernel.
type Conn struct {
	uc      *net.UnixConn
	who     peer
	caller  *Caller
	unknown error // why there is no caller
	onClose func()

	readMu  sync.Mutex
	control [firstControl]byte
	room    int // of control that is offered to the kernel

	changed  atomic.Pointer[fault.Error]
	writeMu  sync.Mutex
	begun    bool // a part of a reply may have been sent since the last ConnState(StateIdle); under writeMu
	answered bool // the refusal is sent; under writeMu
	closing  sync.Once
}

// The room for control messages: credentials alone, so that the kernel has nowhere to put descriptors and drops
// them, and at the first read those and a pidfd.
var (
	credControl  = unix.CmsgSpace(unix.SizeofUcred)
	pidfdControl = credControl + unix.CmsgSpace(4)
)

const firstControl = 64

// Err returns caller_changed once another process wrote on the connection.
func (c *Conn) Err() error {
	if e := c.changed.Load(); e != nil {
		return e
	}
	return nil
}

// Read reads what one sender sent. The kernel never joins the bytes of two.
func (c *Conn) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	c.readMu.Lock()
	defer c.readMu.Unlock()
	if err := c.Err(); err != nil {
		return 0, err
	}
	n, oobn, _, _, err := c.uc.ReadMsgUnix(b, c.control[:c.room])
	if err != nil {
		if c.room > credControl {
			parseControl(c.control[:oobn], closeFD)
		}
		if errors.Is(err, io.EOF) {
			return 0, io.EOF // which net wraps here, and readers compare
		}
		return 0, err
	}
	if e := c.check(c.control[:oobn]); e != nil {
		clear(b[:n])
		c.refuse(e)
		return 0, e
	}
	return n, nil
}

// check compares the sender of a message with the connector. Its number is enough as long as Recheck later finds
// the connector alive: while it lives, nobody else has its number. At the first read the kernel's hold on the
// sender is compared too, where there is one.
func (c *Conn) check(control []byte) *fault.Error {
	m, err := parseControl(control, closeFD)
	if m.pidfd >= 0 {
		defer closeFD(m.pidfd)
	}
	if err != nil || !m.named || m.sender != c.who {
		return fault.New(fault.CallerChanged, "")
	}
	if c.room == credControl {
		return nil
	}
	c.room = credControl
	if err := setOption(c.uc, unix.SO_PASSPIDFD, 0); err != nil {
		return fault.Wrap(fault.CallerChanged, err, "")
	}
	if m.pidfd >= 0 && c.caller != nil && !c.caller.process.is(m.pidfd) {
		return fault.New(fault.CallerChanged, "")
	}
	return nil
}

// refuse ends the conversation.
func (c *Conn) refuse(e *fault.Error) {
	c.changed.Store(e)
	// A write that is under way holds the lock for as long as the peer does not read; then there is nothing to say.
	if c.writeMu.TryLock() {
		if !c.begun {
			c.answer(e)
		}
		c.writeMu.Unlock()
	}
}

// answer sends the refusal once, if it fits into the socket's buffer. The caller holds writeMu.
func (c *Conn) answer(e *fault.Error) {
	if !c.answered {
		c.answered = true
		sendNow(c.uc, problemReply(e))
	}
}

// Write sends b. Nothing but the refusal leaves after a second sender was seen: the reply might tell it what only
// the caller may know.
func (c *Conn) Write(b []byte) (int, error) {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	if e := c.changed.Load(); e != nil {
		if !c.begun || startsReply(b) {
			c.answer(e)
		}
		return 0, e
	}
	c.begun = true
	return c.uc.Write(b)
}

func startsReply(b []byte) bool { return len(b) > 9 && string(b[:9]) == "HTTP/1.1 " }

// ConnState is for http.Server: it tells a connection of this package that a reply is complete, so that a second
// sender gets an answer between requests too.
func ConnState(nc net.Conn, s http.ConnState) {
	if c, ok := nc.(*Conn); ok && s == http.StateIdle {
		c.writeMu.Lock()
		defer c.writeMu.Unlock()
		c.begun = false
		if e := c.changed.Load(); e != nil {
			c.answer(e) // seen after the last byte of the reply before, and before we were told that it was the last
		}
	}
}

// Close closes the connection and lets go of the caller, whose Recheck fails from then on.
func (c *Conn) Close() error {
	err := c.uc.Close()
	c.closing.Do(func() {
		if c.caller != nil {
			c.caller.process.close()
		}
		if c.onClose != nil {
			c.onClose()
		}
	})
	return err
}

// CloseWrite ends our side of the conversation.
func (c *Conn) CloseWrite() error { return c.uc.CloseWrite() }

func (c *Conn) LocalAddr() net.Addr                { return c.uc.LocalAddr() }
func (c *Conn) RemoteAddr() net.Addr               { return c.uc.RemoteAddr() }
func (c *Conn) SetDeadline(t time.Time) error      { return c.uc.SetDeadline(t) }
func (c *Conn) SetReadDeadline(t time.Time) error  { return c.uc.SetReadDeadline(t) }
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.uc.SetWriteDeadline(t) }

// A control is what the kernel says beside a message.
type control struct {
	sender peer
	named  bool // sender is there
	pidfd  int  // of the sender; -1 without
}

// parseControl reads control messages and hands each descriptor that a peer sent to drop. It reads on after an
// error of meaning, so that no descriptor stays open.
func parseControl(b []byte, drop func(int)) (control, error) {
	m := control{pidfd: -1}
	var bad error
	for len(b) > 0 {
		h, data, rest, err := unix.ParseOneSocketControlMessage(b)
		if err != nil {
			return m, errForm
		}
		b = rest
		switch {
		case h.Level != unix.SOL_SOCKET:
			bad = errForm
		case h.Type == unix.SCM_CREDENTIALS:
			if m.named || len(data) < unix.SizeofUcred {
				bad = errForm
				continue
			}
			e := binary.NativeEndian
			m.sender, m.named = peer{int32(e.Uint32(data)), e.Uint32(data[4:]), e.Uint32(data[8:])}, true
		case h.Type == unix.SCM_RIGHTS:
			for ; len(data) >= 4; data = data[4:] {
				drop(int(int32(binary.NativeEndian.Uint32(data))))
			}
		case h.Type == unix.SCM_PIDFD:
			if len(data) < 4 {
				bad = errForm
				continue
			}
			if m.pidfd >= 0 {
				drop(m.pidfd)
			}
			m.pidfd = int(int32(binary.NativeEndian.Uint32(data))) // negative where the kernel could make none
		}
	}
	return m, bad
}

func closeFD(fd int) {
	if fd >= 0 {
		unix.Close(fd)
	}
}

// problemReply returns an error as a whole HTTP reply, for where there is no request to reply to.
func problemReply(err error) []byte {
	p := api.NewProblem(err)
	body, jerr := json.Marshal(p)
	if jerr != nil {
		return nil
	}
	head := fmt.Sprintf("HTTP/1.1 %d %s\r\nContent-Type: application/problem+json\r\nContent-Length: %d\r\n"+
		"Cache-Control: no-store\r\nConnection: close\r\n\r\n", p.Status, http.StatusText(p.Status), len(body))
	return append([]byte(head), body...)
}

// sendNow sends b if there is room for it and never waits: the peer may not be reading.
func sendNow(uc *net.UnixConn, b []byte) {
	raw, err := uc.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		_, _ = unix.SendmsgN(int(fd), b, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	})
}
