package tpm_test

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/google/go-tpm/tpm2"
)

// A relay stands between the backend and a TPM and does what failing hardware does.
type relay struct {
	path   string
	device string // of the TPM behind
	ln     net.Listener

	mu   sync.Mutex
	hook func(cc tpm2.TPMCC, forward func() []byte) []byte
	seen map[tpm2.TPMCC]int
}

// newRelay starts a relay before the TPM at the socket path behind.
func newRelay(t testing.TB, behind string) *relay {
	t.Helper()
	dir, err := os.MkdirTemp("", "rly")
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{path: filepath.Join(dir, "tpm.sock"), device: behind, seen: map[tpm2.TPMCC]int{}}
	if r.ln, err = net.Listen("unix", r.path); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { defer close(ended); r.serve() }()
	t.Cleanup(func() { r.ln.Close(); <-ended; os.RemoveAll(dir) })
	return r
}

// Device returns the relay's address.
func (r *relay) Device() string { return "swtpm:path=" + r.path }

// OnCommand has f answer each command: with what forward returns, with another response, or with nil to hang up.
func (r *relay) OnCommand(f func(cc tpm2.TPMCC, forward func() []byte) []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.hook, r.seen = f, map[tpm2.TPMCC]int{}
}

// Count returns how often a command came since OnCommand.
func (r *relay) Count(cc tpm2.TPMCC) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.seen[cc]
}

func (r *relay) serve() {
	for {
		c, err := r.ln.Accept()
		if err != nil {
			return
		}
		r.pump(c)
	}
}

// pump serves one connection, as swtpm does.
func (r *relay) pump(c net.Conn) {
	defer c.Close()
	up, err := net.Dial("unix", r.device)
	if err != nil {
		return
	}
	defer up.Close()
	for {
		cmd, err := readMessage(c)
		if err != nil {
			return
		}
		forward := func() []byte {
			if _, err := up.Write(cmd); err != nil {
				return nil
			}
			rsp, _ := readMessage(up) // nil hangs up
			return rsp
		}
		cc := tpm2.TPMCC(binary.BigEndian.Uint32(cmd[6:]))
		r.mu.Lock()
		hook := r.hook
		r.seen[cc]++
		r.mu.Unlock()
		rsp := []byte(nil)
		if hook != nil {
			rsp = hook(cc, forward)
		} else {
			rsp = forward()
		}
		if rsp == nil {
			return
		}
		if _, err := c.Write(rsp); err != nil {
			return
		}
	}
}

// readMessage reads one command or response.
func readMessage(r io.Reader) ([]byte, error) {
	head := make([]byte, 10)
	if _, err := io.ReadFull(r, head); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head[2:])
	if n < 10 || n > 4096 {
		return nil, errors.New("not a TPM message")
	}
	all := append(head, make([]byte, n-10)...)
	_, err := io.ReadFull(r, all[10:])
	return all, err
}

// answer returns a response that is a code alone.
func answer(rc tpm2.TPMRC) []byte {
	return binary.BigEndian.AppendUint32([]byte{0x80, 0x01, 0, 0, 0, 10}, uint32(rc))
}

// times answers the first n commands cc by bad, and lets the rest pass.
func times(n int, cc tpm2.TPMCC, bad func(forward func() []byte) []byte) func(tpm2.TPMCC, func() []byte) []byte {
	return func(got tpm2.TPMCC, forward func() []byte) []byte { // the relay serves one command at a time
		if got != cc || n == 0 {
			return forward()
		}
		n--
		return bad(forward)
	}
}

// code answers with a response code.
func code(rc tpm2.TPMRC) func(func() []byte) []byte {
	return func(func() []byte) []byte { return answer(rc) }
}
