package tpmproxy_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	softhsmtest "github.com/trustd/trustd/softhsm-test"
	"github.com/trustd/trustd/softhsm-test/tpmproxy"
)

// A chip answers each command with success, the command's code and a byte that counts.
type chip struct {
	path string
	ln   net.Listener

	mu   sync.Mutex
	seen []tpmproxy.Code
}

func newChip(t *testing.T) *chip {
	t.Helper()
	dir, err := os.MkdirTemp("", "chp")
	if err != nil {
		t.Fatal(err)
	}
	c := &chip{path: filepath.Join(dir, "s")}
	if c.ln, err = net.Listen("unix", c.path); err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := c.ln.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { c.serve(conn) })
		}
	})
	t.Cleanup(func() { c.ln.Close(); serving.Wait(); os.RemoveAll(dir) })
	return c
}

func (c *chip) serve(conn net.Conn) {
	defer conn.Close()
	for {
		cmd := make([]byte, 10)
		if _, err := io.ReadFull(conn, cmd); err != nil {
			return
		}
		c.mu.Lock()
		c.seen = append(c.seen, tpmproxy.Code(binary.BigEndian.Uint32(cmd[6:])))
		n := byte(len(c.seen))
		c.mu.Unlock()
		rsp := append([]byte{0x80, 1, 0, 0, 0, 32, 0, 0, 0, 0}, cmd[6:]...)
		rsp = append(append(rsp, make([]byte, 17)...), n)
		if _, err := conn.Write(rsp); err != nil {
			return
		}
	}
}

func (c *chip) commands() []tpmproxy.Code {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.seen)
}

func dial(t *testing.T, p *tpmproxy.Proxy) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", p.Path())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return conn
}

// ask sends a command and returns the response; an error when the proxy hangs up.
func ask(conn net.Conn, cc tpmproxy.Code) ([]byte, error) {
	cmd := binary.BigEndian.AppendUint32([]byte{0x80, 1, 0, 0, 0, 10}, uint32(cc))
	if _, err := conn.Write(cmd); err != nil {
		return nil, err
	}
	head := make([]byte, 10)
	if _, err := io.ReadFull(conn, head); err != nil {
		return nil, err
	}
	rsp := append(head, make([]byte, binary.BigEndian.Uint32(head[2:])-10)...)
	_, err := io.ReadFull(conn, rsp[10:])
	return rsp, err
}

// TestActions gives each action its one command.
func TestActions(t *testing.T) {
	whole := append(append([]byte{0x80, 1, 0, 0, 0, 32, 0, 0, 0, 0, 0, 0, 1, 0x5d}, make([]byte, 17)...), 1)
	changed := func(at int) []byte { b := bytes.Clone(whole); b[at] ^= 1; return b }
	for name, c := range map[string]struct {
		do      tpmproxy.Action
		want    []byte // nil: hung up
		reaches bool   // the chip
	}{
		"pass":      {tpmproxy.Pass(), whole, true},
		"return":    {tpmproxy.Return(0x922), []byte{0x80, 1, 0, 0, 0, 10, 0, 0, 9, 0x22}, false},
		"answer":    {tpmproxy.Answer([]byte{0x80, 1, 0, 0, 0, 10, 0, 0, 0, 0}), []byte{0x80, 1, 0, 0, 0, 10, 0, 0, 0, 0}, false},
		"drop":      {tpmproxy.Drop(), nil, false},
		"dropafter": {tpmproxy.DropAfter(), nil, true},
		"delay":     {tpmproxy.Delay(tpmproxy.Constant(time.Millisecond)), whole, true},
		"signature": {tpmproxy.CorruptSignature(), changed(28), true},
		"hmac":      {tpmproxy.CorruptHMAC(), changed(31), true},
		"truncate":  {tpmproxy.Truncate(12), []byte{0x80, 1, 0, 0, 0, 12, 0, 0, 0, 0, 0, 0}, true},
	} {
		t.Run(name, func(t *testing.T) {
			chip := newChip(t)
			p := tpmproxy.New(t, chip.path)
			p.Script(tpmproxy.Rule{Command: tpmproxy.Sign, Do: c.do, Times: 1})
			conn := dial(t, p)
			rsp, err := ask(conn, tpmproxy.Sign)
			if (err != nil) != (c.want == nil) || !bytes.Equal(rsp, c.want) && c.want != nil {
				t.Errorf("answered %x, %v; want %x", rsp, err, c.want)
			}
			if reached := len(chip.commands()) == 1; reached != c.reaches {
				t.Errorf("the command reached the TPM: %v", reached)
			}
			if p.Count(tpmproxy.Sign) != 1 {
				t.Errorf("%d commands counted", p.Count(tpmproxy.Sign))
			}
			if rsp, err = ask(dial(t, p), tpmproxy.Sign); err != nil || len(rsp) != 32 {
				t.Errorf("afterwards: %x, %v", rsp, err)
			}
		})
	}
}

// TestRules counts commands by rule: which pass first, how many meet the action, and which rule goes first.
func TestRules(t *testing.T) {
	p := tpmproxy.New(t, newChip(t).path)
	p.Script(
		tpmproxy.Rule{Command: tpmproxy.Sign, After: 1, Times: 2, Do: tpmproxy.Return(1)},
		tpmproxy.Rule{Command: tpmproxy.Any, After: 2, Times: 3, Do: tpmproxy.Return(2)},
		tpmproxy.Rule{Command: tpmproxy.Load, Do: tpmproxy.Return(3)},
	)
	conn := dial(t, p)
	for i, c := range []struct {
		cc   tpmproxy.Code
		want uint32
	}{
		{tpmproxy.Sign, 0}, {tpmproxy.Sign, 1}, {tpmproxy.Sign, 1}, {tpmproxy.Sign, 2}, {tpmproxy.Create, 2}, {tpmproxy.Create, 0},
		{tpmproxy.Load, 3}, {tpmproxy.Sign, 0}, {tpmproxy.Load, 3},
	} {
		rsp, err := ask(conn, c.cc)
		if err != nil {
			t.Fatal(err)
		}
		if got := binary.BigEndian.Uint32(rsp[6:]); got != c.want {
			t.Errorf("command %d: %d, want %d", i, got, c.want)
		}
	}
	for cc, want := range map[tpmproxy.Code]int{tpmproxy.Sign: 5, tpmproxy.Load: 2, tpmproxy.Any: 9, tpmproxy.Import: 0} {
		if got := p.Count(cc); got != want {
			t.Errorf("%d commands %#x counted, want %d", got, uint32(cc), want)
		}
	}
	p.Script()
	if p.Count(tpmproxy.Any) != 0 {
		t.Error("a new script does not begin at zero")
	}
}

// TestHang frees who hangs: by hanging up, by a new script and by Close, and nobody else notices.
func TestHang(t *testing.T) {
	chip := newChip(t)
	p := tpmproxy.New(t, chip.path)
	hang := []tpmproxy.Rule{
		{Command: tpmproxy.Sign, Do: tpmproxy.Hang()}, {Command: tpmproxy.Load, Do: tpmproxy.Delay(tpmproxy.Constant(time.Hour))},
	}
	for name, free := range map[string]func(net.Conn){
		"hang up":    func(c net.Conn) { c.Close() },
		"new script": func(net.Conn) { p.Script() },
		"cut":        func(net.Conn) { p.Cut() },
	} {
		p.Script(hang...)
		for _, cc := range []tpmproxy.Code{tpmproxy.Sign, tpmproxy.Load} {
			p.Script(hang...)
			conn, failed := dial(t, p), make(chan error, 1)
			go func() { _, err := ask(conn, cc); failed <- err }()
			await(t, func() bool { return p.Count(cc) == 1 })
			if _, err := ask(dial(t, p), tpmproxy.Create); err != nil {
				t.Errorf("%s: beside it: %v", name, err)
			}
			free(conn)
			if err := <-failed; err == nil {
				t.Errorf("%s: answered", name)
			}
		}
	}
	if n := len(chip.commands()); n != 6 {
		t.Errorf("%d commands reached the TPM, want 6", n)
	}
	p.Script(hang...)
	conn, failed := dial(t, p), make(chan error, 1)
	go func() { _, err := ask(conn, tpmproxy.Sign); failed <- err }()
	await(t, func() bool { return p.Count(tpmproxy.Sign) == 1 })
	p.Close()
	if err := <-failed; err == nil {
		t.Error("answered by a proxy that is closed")
	}
	p.Close()
	if _, err := net.Dial("unix", p.Path()); err == nil {
		t.Error("a proxy that is closed takes connections")
	}
}

// TestShared has several users at once on a TPM that serves one connection, and restarts it under them.
func TestShared(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	p := tpmproxy.New(t, m.Path())
	random := []byte{0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x7b, 0, 4}
	for range 2 {
		var users sync.WaitGroup
		for range 4 {
			conn := dial(t, p)
			users.Go(func() {
				rsp := make([]byte, 16)
				for range 25 {
					if _, err := conn.Write(random); err != nil {
						t.Error(err)
						return
					}
					if _, err := io.ReadFull(conn, rsp); err != nil || !bytes.HasPrefix(rsp, []byte{0x80, 1, 0, 0, 0, 16, 0, 0, 0, 0}) {
						t.Errorf("answered %x, %v", rsp, err)
						return
					}
				}
			})
		}
		users.Wait()
		m.Kill()
		if _, err := ask(dial(t, p), tpmproxy.ReadClock); !errors.Is(err, io.EOF) {
			t.Errorf("without a TPM: %v", err)
		}
		m.Restart()
	}
}

func TestBadMessages(t *testing.T) {
	p := tpmproxy.New(t, newChip(t).path)
	for _, s := range []string{
		"GET / HTTP/1.1\r\n\r\n", "\x80\x01\x00\x00\x00\x04\x00\x00\x00\x00", "\x80\x01\xff\xff\xff\xff\x00\x00\x00\x00",
	} {
		conn := dial(t, p)
		if _, err := io.WriteString(conn, s); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Read(make([]byte, 1)); err == nil {
			t.Errorf("%q was answered", s)
		}
	}
	if p.Count(tpmproxy.Any) != 0 {
		t.Error("counted as commands")
	}
	if _, err := tpmproxy.Listen(filepath.Join(t.TempDir(), "no", "such"), "x"); err == nil {
		t.Error("listening where there is no folder")
	}
}

// TestLogNormal draws from the distribution that was asked for.
func TestLogNormal(t *testing.T) {
	const n = 20000
	draw := func(seed uint64) []time.Duration {
		d, out := tpmproxy.LogNormal(200*time.Millisecond, 600*time.Millisecond, seed), make([]time.Duration, n)
		for i := range out {
			out[i] = d.Draw()
		}
		return out
	}
	a, b, c := draw(1), draw(1), draw(2)
	if !slices.Equal(a, b) || slices.Equal(a, c) {
		t.Error("the seed does not decide what is drawn")
	}
	slices.Sort(a)
	if m, q := a[n/2], a[n*95/100]; m < 190*time.Millisecond || m > 210*time.Millisecond ||
		q < 560*time.Millisecond || q > 640*time.Millisecond {
		t.Errorf("median %v, 95 %% quantile %v", m, q)
	}
	if d := tpmproxy.LogNormal(0, 0, 1).Draw(); d > time.Millisecond {
		t.Errorf("of nothing: %v", d)
	}
}

func await(t *testing.T, done func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(30 * time.Second); !done(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatal("not in time")
		}
	}
}
