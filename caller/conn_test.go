package caller_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/caller"
	"github.com/trustd/trustd/fault"
)

// TestDescriptorsSentToUs sends the only write end of a pipe: once the kernel has dropped it, the pipe ends
// (caller-8).
func TestDescriptorsSentToUs(t *testing.T) {
	for _, first := range []bool{true, false} {
		t.Run(fmt.Sprintf("first message %v", first), func(t *testing.T) {
			l := listen(t, folder(t))
			nc := dial(t, l)
			conn := accept(t, l)
			if !first {
				nc.Write([]byte("hello"))
				hear(t, conn, "hello")
			}
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			many := make([]int, 200)
			for i := range many {
				many[i] = int(w.Fd())
			}
			if _, _, err := nc.WriteMsgUnix([]byte("take this"), unix.UnixRights(many...), nil); err != nil {
				t.Fatal(err)
			}
			w.Close()
			before := descriptors(t)
			hear(t, conn, "take this")
			r.SetReadDeadline(time.Now().Add(20 * time.Second))
			if n, err := r.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				t.Errorf("the descriptors are still open: %d, %v", n, err)
			}
			if after := descriptors(t); after > before {
				t.Errorf("%d descriptors were open, now %d", before, after)
			}
			nc.Write([]byte("and go on"))
			hear(t, conn, "and go on")
		})
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

func TestNothingStaysOpen(t *testing.T) {
	l := listen(t, folder(t))
	before := 0
	for i := range 50 {
		nc := dial(t, l)
		conn := accept(t, l)
		nc.Write([]byte("x"))
		hear(t, conn, "x")
		conn.Close()
		nc.Close()
		if i == 10 {
			before = descriptors(t)
		}
	}
	if after := descriptors(t); after > before {
		t.Errorf("%d descriptors were open after 10 connections, %d after 50", before, after)
	}
}

func TestReadEdges(t *testing.T) {
	l := listen(t, folder(t))
	nc := dial(t, l)
	conn := accept(t, l)
	nc.Write([]byte("abc"))
	if n, err := conn.Read(nil); n != 0 || err != nil {
		t.Errorf("an empty read: %d, %v", n, err)
	}
	for _, want := range []string{"a", "bc"} { // a message is read in pieces
		hear(t, conn, want)
	}
	conn.SetReadDeadline(time.Unix(1, 0))
	_, err := conn.Read(make([]byte, 1))
	var ne net.Error
	if !errors.As(err, &ne) || !ne.Timeout() {
		t.Errorf("a late read: %v", err)
	}
	conn.SetReadDeadline(time.Time{})
	nc.CloseWrite()
	if n, err := conn.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("a read after the end: %d, %v", n, err)
	}
	if conn.Err() != nil {
		t.Errorf("an end is no change of caller: %v", conn.Err())
	}
	big := bytes.Repeat([]byte("0123456789abcdef"), 64<<10)
	go func() {
		conn.Write(big)
		conn.CloseWrite()
	}()
	if got, err := io.ReadAll(nc); err != nil || !bytes.Equal(got, big) {
		t.Errorf("%d bytes of %d came back: %v", len(got), len(big), err)
	}
}

// TestThreadsOfOneProcess writes from many goroutines, and so from many threads, of the process that connected.
func TestThreadsOfOneProcess(t *testing.T) {
	l := listen(t, folder(t))
	nc := dial(t, l)
	conn := accept(t, l)
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() { nc.Write([]byte("xy")) })
	}
	wg.Wait()
	hear(t, conn, strings.Repeat("xy", 32))
	if err := identified(t, conn).Recheck(); err != nil {
		t.Fatal(err)
	}
}

// serve runs the server that a daemon would, with a handler that signs for whom the bindings allow.
func serve(t *testing.T, l *caller.Listener, late func(*http.Request)) {
	t.Helper()
	s := &http.Server{
		ConnContext: caller.ConnContext, ConnState: caller.ConnState, ReadHeaderTimeout: 20 * time.Second,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, err := io.ReadAll(r.Body)
			if err == nil && late != nil {
				late(r)
			}
			if err == nil {
				var c *caller.Caller
				if c, err = caller.Require(r.Context()); err == nil && !caller.MatchAny(bindings["planner"], c, api.VerbSign) {
					err = fault.Denied
				}
			}
			if err != nil {
				http.Error(w, string(fault.CodeOf(err)), fault.CodeOf(err).Status())
				return
			}
			fmt.Fprintf(w, "signed %s", body)
		}),
	}
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(l) }()
	t.Cleanup(func() { s.Close(); <-done })
}

const (
	request = "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nwork"
	last    = "POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 4\r\n\r\nwork"
)

func TestOverHTTP(t *testing.T) {
	needRoot(t)
	dir := folder(t)
	l, exe := listen(t, dir), program(t, dir, "agent", "")
	serve(t, l, nil)
	for uid, want := range map[int]string{planner: "signed work", researcher: "denied"} {
		ch := launch(t, exe, uid, nil)
		ch.do("dial", l.Addr().String())
		ch.write(request)
		ch.write(last)
		if got := ch.read(); strings.Count(got, want) != 2 {
			t.Errorf("user %d hears %q", uid, got)
		}
	}
}

// TestSecondSenderOverHTTP lets another user write at each point of a conversation. It never hears more than why.
func TestSecondSenderOverHTTP(t *testing.T) {
	needRoot(t)
	half := len(request) - 2
	for name, c := range map[string]struct{ mine, theirs string }{
		"a first request":   {"", request},
		"half a head":       {request[:10], request[10:]},
		"half a body":       {request[:half], request[half:]},
		"a second request":  {request, request},
		"no whole request":  {request, "G"},
		"half a second one": {request + request[:half], request[half:]},
	} {
		t.Run(name, func(t *testing.T) {
			dir := folder(t)
			l, exe := listen(t, dir), program(t, dir, "agent", "")
			serve(t, l, nil)
			a, b := pair(t)
			mine := launch(t, exe, planner, func(c *exec.Cmd) { c.ExtraFiles = []*os.File{a} })
			other := launch(t, exe, researcher, func(c *exec.Cmd) { c.ExtraFiles = []*os.File{b} })
			mine.do("dial", l.Addr().String())
			whole := strings.Count(c.mine, "work")
			if c.mine != "" {
				mine.write(c.mine)
			}
			heard := ""
			for strings.Count(heard, "signed work") < whole { // so that it is idle, or within the second request
				heard += mine.readSome()
			}
			mine.do("pass")
			other.do("take")
			other.write(c.theirs)
			wantRefusal(t, other.read())
		})
	}
}

// TestSecondSenderDuringWork lets another user write while a request of the rightful one is under way: the work is
// cancelled, and neither hears of a result.
func TestSecondSenderDuringWork(t *testing.T) {
	needRoot(t)
	dir := folder(t)
	l, exe := listen(t, dir), program(t, dir, "agent", "")
	started := make(chan struct{})
	serve(t, l, func(r *http.Request) { close(started); <-r.Context().Done() })
	a, b := pair(t)
	mine := launch(t, exe, planner, func(c *exec.Cmd) { c.ExtraFiles = []*os.File{a} })
	other := launch(t, exe, researcher, func(c *exec.Cmd) { c.ExtraFiles = []*os.File{b} })
	mine.do("dial", l.Addr().String())
	mine.write(request)
	<-started
	mine.do("pass")
	other.do("take")
	other.write("x")
	wantRefusal(t, other.read())
}

// TestSecondSenderAfterContinue covers a reply that has begun with an interim one.
func TestSecondSenderAfterContinue(t *testing.T) {
	needRoot(t)
	dir := folder(t)
	l, exe := listen(t, dir), program(t, dir, "agent", "")
	serve(t, l, nil)
	a, b := pair(t)
	mine := launch(t, exe, planner, func(c *exec.Cmd) { c.ExtraFiles = []*os.File{a} })
	other := launch(t, exe, researcher, func(c *exec.Cmd) { c.ExtraFiles = []*os.File{b} })
	mine.do("dial", l.Addr().String())
	mine.write(strings.Replace(strings.TrimSuffix(request, "work"), "\r\n\r\n", "\r\nExpect: 100-continue\r\n\r\n", 1))
	if got := mine.readSome(); !strings.HasPrefix(got, "HTTP/1.1 100 ") {
		t.Fatalf("the interim reply is %q", got)
	}
	mine.do("pass")
	other.do("take")
	other.write("work")
	wantRefusal(t, other.read())
}

func TestListenModes(t *testing.T) {
	dir := folder(t)
	path := filepath.Join(dir, "admin.sock")
	l, err := caller.Listen(path, 0o600, -1)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	fi, err := os.Lstat(path)
	if err != nil || fi.Mode() != os.ModeSocket|0o600 {
		t.Errorf("the socket is %v, %v", fi.Mode(), err)
	}
	if l.Addr().String() != path {
		t.Errorf("the address is %s", l.Addr())
	}
	_, err = caller.Listen(path, 0o600, -1)
	wantCode(t, err, fault.AlreadyExists)
	all, err := os.ReadDir(dir)
	if err != nil || len(all) != 1 {
		t.Errorf("beside the socket there is %v, %v", all, err)
	}
	l.Close()
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket stays behind: %v", err)
	}
}

func TestListenGroup(t *testing.T) {
	needRoot(t)
	path := filepath.Join(folder(t), "agent.sock")
	l, err := caller.Listen(path, 0o660, planner)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	fi, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	if st := fi.Sys().(*syscall.Stat_t); st.Gid != planner || fi.Mode().Perm() != 0o660 {
		t.Errorf("the socket has group %d and mode %v", st.Gid, fi.Mode())
	}
}

func TestListenPlace(t *testing.T) {
	stale := func(t *testing.T, path string) {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		l.Close()
	}
	for name, c := range map[string]struct {
		prepare func(t *testing.T, path string)
		code    fault.Code // "" where it succeeds
	}{
		"free":         {func(*testing.T, string) {}, ""},
		"stale socket": {stale, ""},
		"file": {func(t *testing.T, path string) {
			if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, fault.AlreadyExists},
		"link to a stale socket": {func(t *testing.T, path string) {
			stale(t, path+"2")
			if err := os.Symlink(path+"2", path); err != nil {
				t.Fatal(err)
			}
		}, fault.AlreadyExists},
		"open folder": {func(t *testing.T, path string) {
			if err := os.Chmod(filepath.Dir(path), 0o777); err != nil {
				t.Fatal(err)
			}
		}, fault.InsecureSecret},
		"sticky folder": {func(t *testing.T, path string) {
			if err := os.Chmod(filepath.Dir(path), 0o777|os.ModeSticky); err != nil {
				t.Fatal(err)
			}
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(folder(t), "s")
			c.prepare(t, path)
			l, err := caller.Listen(path, 0o600, -1)
			if c.code != "" {
				wantCode(t, err, c.code)
				if _, err := os.Lstat(path); err != nil && c.code == fault.AlreadyExists {
					t.Errorf("what was there is gone: %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			dial(t, l).Write([]byte("x"))
			hear(t, accept(t, l), "x")
		})
	}
}

// TestCloseLeavesAnothersSocket covers a daemon that stops after its successor has taken the place.
func TestCloseLeavesAnothersSocket(t *testing.T) {
	dir := folder(t)
	l := listen(t, dir)
	path := l.Addr().String()
	if err := os.Rename(path, path+".old"); err != nil {
		t.Fatal(err)
	}
	second, err := caller.Listen(path, 0o600, -1)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	l.Close()
	dial(t, second)
}

func TestFromListener(t *testing.T) {
	path := filepath.Join(folder(t), "s")
	ul, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	early, err := net.Dial("unix", path) // waits, and has written, before we ask for senders
	if err != nil {
		t.Fatal(err)
	}
	defer early.Close()
	early.Write([]byte("early"))
	l, err := caller.FromListener(ul)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn := accept(t, l)
	// Either the kernel kept the sender, or the caller is sent away: nothing is taken from nobody.
	got := make([]byte, 5)
	if _, err := io.ReadFull(conn, got); err == nil {
		if who := identified(t, conn); int(who.PID) != os.Getpid() || string(got) != "early" {
			t.Errorf("read %q of %d", got, who.PID)
		}
	} else {
		wantCode(t, err, fault.CallerChanged)
	}
	dial(t, l).Write([]byte("late"))
	hear(t, accept(t, l), "late")

	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	_, err = caller.FromListener(tcp)
	wantCode(t, err, fault.Unsupported)
	packets, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path + "2", Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer packets.Close()
	_, err = caller.FromListener(packets)
	wantCode(t, err, fault.Unsupported)
}

func TestTooManyConnections(t *testing.T) {
	needRoot(t)
	dir := folder(t)
	l, exe := listen(t, dir), program(t, dir, "agent", "")
	l.Limit(2, 3)
	first := dial(t, l)
	a := accept(t, l)
	dial(t, l)
	b := accept(t, l)
	third := dial(t, l)
	other := launch(t, exe, planner, nil)
	other.do("dial", l.Addr().String())
	if who := identified(t, accept(t, l)); who.UID != planner { // the third is sent away, the next user is served
		t.Errorf("the next caller is user %d", who.UID)
	}
	third.SetDeadline(time.Now().Add(20 * time.Second))
	if got, _ := io.ReadAll(third); !strings.Contains(string(got), `"code":"resource_exhausted"`) {
		t.Errorf("the third hears %q", got)
	}
	a.Close()
	first.Close()
	b.Close()
	dial(t, l)
	accept(t, l)
}

func BenchmarkRead(b *testing.B) {
	l := listen(b, folder(b))
	nc := dial(b, l)
	conn := accept(b, l)
	conn.SetDeadline(time.Time{})
	out, in := bytes.Repeat([]byte("x"), 700), make([]byte, 4096)
	b.ReportAllocs()
	for b.Loop() {
		nc.Write(out)
		if _, err := conn.Read(in); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkReadPlain(b *testing.B) {
	ul, err := net.Listen("unix", filepath.Join(folder(b), "s"))
	if err != nil {
		b.Fatal(err)
	}
	defer ul.Close()
	nc := dial(b, ul)
	conn, err := ul.Accept()
	if err != nil {
		b.Fatal(err)
	}
	out, in := bytes.Repeat([]byte("x"), 700), make([]byte, 4096)
	b.ReportAllocs()
	for b.Loop() {
		nc.Write(out)
		if _, err := conn.Read(in); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkAccept(b *testing.B) {
	l := listen(b, folder(b))
	for b.Loop() {
		nc, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			b.Fatal(err)
		}
		conn, err := l.Accept()
		if err != nil {
			b.Fatal(err)
		}
		conn.Close()
		nc.Close()
	}
}

func BenchmarkRecheck(b *testing.B) {
	l := listen(b, folder(b))
	dial(b, l)
	who := identified(b, accept(b, l))
	b.ReportAllocs()
	for b.Loop() {
		if err := who.Recheck(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkMatch(b *testing.B) {
	l := listen(b, folder(b))
	dial(b, l)
	who := identified(b, accept(b, l))
	sum, err := who.ExeSHA256()
	if err != nil {
		b.Fatal(err)
	}
	for name, s := range map[string]api.Selector{
		"uid": {UID: &who.UID}, "group": {Group: ptr(4)}, "exe": {UID: &who.UID, Exe: who.Exe},
		"sha256": {UID: &who.UID, ExeSHA256: sum}, "cgroup": {Cgroup: "/none"},
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				who.Recheck()
				caller.Match(s, who)
			}
		})
	}
}

// BenchmarkHTTP asks over one connection, with and without what this package adds.
func BenchmarkHTTP(b *testing.B) {
	for _, plain := range []bool{true, false} {
		b.Run(fmt.Sprintf("plain=%v", plain), func(b *testing.B) {
			path := filepath.Join(folder(b), "s")
			mine := []api.Binding{{Selector: api.Selector{UID: ptr(uint32(os.Getuid()))}}}
			s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				if !plain {
					c, err := caller.Require(r.Context())
					if err != nil || !caller.MatchAny(mine, c, api.VerbSign) {
						b.Error(err)
					}
				}
				w.Write([]byte("done"))
			})}
			var l net.Listener
			var err error
			if plain {
				l, err = net.Listen("unix", path)
			} else {
				s.ConnContext, s.ConnState = caller.ConnContext, caller.ConnState
				l, err = caller.Listen(path, 0o600, -1)
			}
			if err != nil {
				b.Fatal(err)
			}
			go s.Serve(l)
			defer s.Close()
			nc, in := dial(b, l), make([]byte, 4096)
			for b.Loop() {
				nc.Write([]byte(request))
				if _, err := nc.Read(in); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
