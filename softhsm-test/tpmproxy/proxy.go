// Package tpmproxy stands between a TPM 2.0 emulator's Unix socket and its users, and does by script what failing
// hardware does: it answers with any response code, delays, hangs, drops connections, and corrupts what the TPM says.
//
// An emulator serves one connection at a time. A Proxy serves many over one, command by command, as a chip without a
// resource manager does that several programs share: all of them see, use up and flush the same handles.
package tpmproxy

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
)

// A Code is a command code (TPM 2.0 Library, Part 2, 6.5.2).
type Code uint32

// Commands that scripts name.
const (
	Any              Code = 0
	Create           Code = 0x153
	CreatePrimary    Code = 0x131
	ContextLoad      Code = 0x161
	ContextSave      Code = 0x162
	FlushContext     Code = 0x165
	GetCapability    Code = 0x17a
	Import           Code = 0x156
	Load             Code = 0x157
	ReadClock        Code = 0x181
	ReadPublic       Code = 0x173
	Sign             Code = 0x15d
	StartAuthSession Code = 0x176
	Startup          Code = 0x144
	TestParms        Code = 0x18a
)

// A Call is one command on its way.
type Call struct {
	Command []byte          // from the tag on
	Forward func() []byte   // asks the TPM, once; nil when it does not answer
	Gone    <-chan struct{} // closed when its caller hung up, the script was replaced or the Proxy closed
}

// An Action answers a call: with what Forward returns, with other bytes, or with nil to hang up on the caller.
type Action func(*Call) []byte

// A Rule says which commands meet which fate. The first rule of a script that is due acts; a command that none is due
// for passes.
type Rule struct {
	Command Code   // Any for each command
	After   int    // how many such commands pass first
	Times   int    // how many meet the action then; 0 = all
	Do      Action // see the actions of this package
}

// A Proxy is a scripted TPM. All methods are safe for concurrent use.
type Proxy struct {
	path, behind string
	ln           net.Listener
	serving      sync.WaitGroup

	mu      sync.Mutex // guards what follows
	rules   []ruleState
	counts  map[Code]int
	changed chan struct{} // closed when the script is replaced
	clients map[net.Conn]struct{}
	closed  bool

	upMu sync.Mutex // one command at a time
	up   net.Conn   // to the TPM; nil when there is none
}

type ruleState struct {
	Rule
	seen int
}

// Listen starts a Proxy on the socket path, before the TPM at the socket behind, which need not be there yet.
func Listen(path, behind string) (*Proxy, error) {
	ln, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listening for users of the TPM: %w", err)
	}
	p := &Proxy{
		path: path, behind: behind, ln: ln,
		counts: map[Code]int{}, changed: make(chan struct{}), clients: map[net.Conn]struct{}{},
	}
	p.serving.Go(p.accept)
	return p, nil
}

// A TB is a test or a benchmark.
type TB interface {
	Helper()
	Fatal(args ...any)
	Cleanup(f func())
}

// New is Listen in a folder of its own, for the length of a test.
func New(t TB, behind string) *Proxy {
	t.Helper()
	dir, err := os.MkdirTemp("", "tpx") // t.TempDir is too long for a socket's path
	if err != nil {
		t.Fatal(err)
	}
	p, err := Listen(filepath.Join(dir, "tpm.sock"), behind)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close(); os.RemoveAll(dir) })
	return p
}

// Path returns the path of the Proxy's socket.
func (p *Proxy) Path() string { return p.path }

// Device returns the Proxy's address as trustd's configuration and tpm2-tools write it.
func (p *Proxy) Device() string { return "swtpm:path=" + p.path }

// Script replaces the script and sets the counts to zero. What hangs or waits by the old script is hung up on. No rules
// let all pass.
func (p *Proxy) Script(rules ...Rule) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rules = nil
	for _, r := range rules {
		p.rules = append(p.rules, ruleState{Rule: r})
	}
	p.counts = map[Code]int{}
	close(p.changed)
	p.changed = make(chan struct{})
}

// Count returns how many such commands came since the script began, whatever became of them; Any counts all.
func (p *Proxy) Count(c Code) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c != Any {
		return p.counts[c]
	}
	all := 0
	for _, n := range p.counts {
		all += n
	}
	return all
}

// Cut hangs up on everybody who is connected.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.clients {
		c.Close()
	}
}

// Close hangs up and stops listening. The TPM stays.
func (p *Proxy) Close() {
	p.mu.Lock()
	if !p.closed {
		p.closed = true
		close(p.changed)
		p.changed = make(chan struct{})
	}
	p.mu.Unlock()
	p.ln.Close()
	p.Cut()
	p.hangUp() // frees who waits for a TPM that hangs
	p.serving.Wait()
}

func (p *Proxy) accept() {
	for {
		c, err := p.ln.Accept()
		if err != nil {
			return
		}
		p.mu.Lock()
		if p.closed {
			c.Close()
		} else {
			p.clients[c] = struct{}{}
			p.serving.Go(func() { p.serve(c) })
		}
		p.mu.Unlock()
	}
}

// serve answers one user until one of both hangs up.
func (p *Proxy) serve(c net.Conn) {
	done := make(chan struct{}) // the user is gone, or told to go
	cmds := make(chan []byte)
	var reading sync.WaitGroup
	reading.Go(func() {
		defer close(cmds)
		for {
			cmd, err := readMessage(c)
			if err != nil {
				return
			}
			select {
			case cmds <- cmd:
			case <-done:
				return
			}
		}
	})
	defer func() {
		p.mu.Lock()
		delete(p.clients, c)
		if len(p.clients) == 0 { // whoever wants the TPM without us may have it
			p.dropUpstream()
		}
		p.mu.Unlock()
		c.Close()
		close(done)
		reading.Wait()
	}()
	for cmd := range cmds {
		action, changed := p.due(cmd)
		if action == nil {
			action = Pass()
		}
		gone, free := p.watch(cmds, changed)
		call := &Call{Command: cmd, Forward: func() []byte { return p.forward(cmd) }, Gone: gone}
		rsp := action(call)
		if !free() || rsp == nil {
			return
		}
		if _, err := c.Write(rsp); err != nil {
			return
		}
	}
}

// watch returns a channel that closes when the user hangs up or the script changes, and a function that ends the watch
// and reports whether the user is still there. A user that sends before it was answered is no user of a TPM.
func (p *Proxy) watch(cmds <-chan []byte, changed <-chan struct{}) (<-chan struct{}, func() bool) {
	gone, stop, left := make(chan struct{}), make(chan struct{}), make(chan bool, 1)
	go func() {
		select {
		case <-cmds:
			close(gone)
			left <- true
		case <-changed:
			close(gone)
			left <- false
		case <-stop:
			left <- false
		}
	}()
	return gone, func() bool { close(stop); return !<-left }
}

// due counts a command and returns the action that is its fate, if any.
func (p *Proxy) due(cmd []byte) (Action, <-chan struct{}) {
	cc := Code(binary.BigEndian.Uint32(cmd[6:]))
	p.mu.Lock()
	defer p.mu.Unlock()
	p.counts[cc]++
	var act Action
	for i := range p.rules {
		r := &p.rules[i]
		if r.Command != Any && r.Command != cc {
			continue
		}
		r.seen++
		if act == nil && r.seen > r.After && (r.Times == 0 || r.seen <= r.After+r.Times) {
			act = r.Do
		}
	}
	return act, p.changed
}

// forward asks the TPM. A connection that breaks is made anew by the next command.
func (p *Proxy) forward(cmd []byte) []byte {
	p.upMu.Lock()
	defer p.upMu.Unlock()
	up, err := p.upstream()
	if err != nil {
		return nil
	}
	if _, err := up.Write(cmd); err == nil {
		if rsp, err := readMessage(up); err == nil {
			return rsp
		}
	}
	p.hangUp()
	p.Cut() // as a TPM that went away does to all of its users
	return nil
}

func (p *Proxy) upstream() (net.Conn, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, net.ErrClosed
	}
	if p.up == nil {
		up, err := net.Dial("unix", p.behind)
		if err != nil {
			return nil, err
		}
		p.up = up
	}
	return p.up, nil
}

func (p *Proxy) hangUp() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dropUpstream()
}

func (p *Proxy) dropUpstream() {
	if p.up != nil {
		p.up.Close()
		p.up = nil
	}
}

const (
	headerSize = 10
	maxMessage = 4096
)

var errMessage = errors.New("not a TPM message")

// readMessage reads one command or response.
func readMessage(r io.Reader) ([]byte, error) {
	b := make([]byte, headerSize, 512)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(b[2:])
	if n < headerSize || n > maxMessage {
		return nil, errMessage
	}
	b = append(b, make([]byte, n-headerSize)...)
	_, err := io.ReadFull(r, b[headerSize:])
	return b, err
}
