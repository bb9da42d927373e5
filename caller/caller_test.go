package caller_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/caller"
	"github.com/trustd/trustd/fault"
)

func ptr(n uint32) *uint32 { return &n }

func listen(t testing.TB, dir string) *caller.Listener {
	t.Helper()
	l, err := caller.Listen(filepath.Join(dir, "agent.sock"), 0o666, -1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// accept returns the next connection, or fails after a while.
func accept(t testing.TB, l *caller.Listener) *caller.Conn {
	t.Helper()
	type result struct {
		nc  net.Conn
		err error
	}
	got := make(chan result, 1)
	go func() {
		nc, err := l.Accept()
		got <- result{nc, err}
	}()
	select {
	case r := <-got:
		if r.err != nil {
			t.Fatal(r.err)
		}
		t.Cleanup(func() { r.nc.Close() })
		r.nc.SetDeadline(time.Now().Add(20 * time.Second))
		return r.nc.(*caller.Conn)
	case <-time.After(20 * time.Second):
		t.Fatal("nobody connected")
		return nil
	}
}

// hear reads exactly text.
func hear(t testing.TB, c *caller.Conn, text string) {
	t.Helper()
	b := make([]byte, len(text))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != text {
		t.Fatalf("read %q, %v; want %q", b, err, text)
	}
}

func identified(t testing.TB, c *caller.Conn) *caller.Caller {
	t.Helper()
	who, err := caller.FromConn(c)
	if err != nil {
		t.Fatalf("identifying the caller: %v", fault.From(err).Verbose())
	}
	return who
}

func wantCode(t testing.TB, err error, code fault.Code) {
	t.Helper()
	if !errors.Is(err, code) {
		t.Fatalf("error %v, want %s", err, code)
	}
}

// bindings give the planner's agent to the planner's user and the researcher's to the researcher's.
var bindings = map[string][]api.Binding{
	"planner":    {{Selector: api.Selector{UID: ptr(planner)}}},
	"researcher": {{Selector: api.Selector{UID: ptr(researcher)}}},
}

// kernels runs a test as on this kernel and as on older ones.
func kernels(t *testing.T, f func(t *testing.T)) {
	t.Run("pidfd", f)
	t.Run("pidfd without info", func(t *testing.T) { caller.WithoutPidfdInfo(t); f(t) })
	t.Run("proc alone", func(t *testing.T) { caller.AsOldKernel(t); f(t) })
}

// TestEachUserIsItself covers caller-1 of docs/callers.md; the tests below name the others that they cover.
func TestEachUserIsItself(t *testing.T) {
	needRoot(t)
	kernels(t, func(t *testing.T) {
		dir := folder(t)
		l, exe := listen(t, dir), program(t, dir, "agent", "")
		for name, uid := range map[string]int{"planner": planner, "researcher": researcher} {
			ch := launch(t, exe, uid, nil)
			ch.do("dial", l.Addr().String())
			conn := accept(t, l)
			who := identified(t, conn)
			ch.write("hello")
			hear(t, conn, "hello")
			if err := who.Recheck(); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if int(who.UID) != uid || int(who.GID) != uid || int(who.PID) != ch.pid() || who.Exe != exe {
				t.Errorf("%s is seen as %+v", name, who)
			}
			for agent, b := range bindings {
				for _, verb := range []string{api.VerbSign, api.VerbVerify} {
					if got := caller.MatchAny(b, who, verb); got != (agent == name) {
						t.Errorf("%s may %s as %s: %v", name, verb, agent, got)
					}
				}
				if caller.MatchAny(b, who, api.VerbOperate) {
					t.Errorf("%s may operate as %s", name, agent)
				}
			}
		}
	})
}

// TestOtherUserOnPassedDescriptor covers caller-2.
//
// This is T-SOCK-2.
func TestOtherUserOnPassedDescriptor(t *testing.T) {
	needRoot(t)
	kernels(t, func(t *testing.T) {
		dir := folder(t)
		l, exe := listen(t, dir), program(t, dir, "agent", "")
		a, b := pair(t)
		mine := launch(t, exe, planner, func(c *exec.Cmd) { c.ExtraFiles = []*os.File{a} })
		other := launch(t, exe, researcher, func(c *exec.Cmd) { c.ExtraFiles = []*os.File{b} })
		mine.do("dial", l.Addr().String())
		conn := accept(t, l)
		who := identified(t, conn)
		mine.write("GET ")
		hear(t, conn, "GET ")
		mine.do("pass")
		other.do("take")
		other.write("/secret")
		buf := make([]byte, 16)
		n, err := conn.Read(buf)
		wantCode(t, err, fault.CallerChanged)
		if n != 0 || bytes.Count(buf, []byte{0}) != len(buf) {
			t.Errorf("%d bytes of the second sender come through: %q", n, buf)
		}
		wantCode(t, conn.Err(), fault.CallerChanged)
		wantCode(t, who.Recheck(), fault.CallerChanged)
		// From here on nobody is heard, the rightful caller included, and nobody is told anything but why.
		mine.write("more")
		_, err = conn.Read(make([]byte, 16))
		wantCode(t, err, fault.CallerChanged)
		_, err = conn.Write([]byte("the reply"))
		wantCode(t, err, fault.CallerChanged)
		conn.Close()
		wantRefusal(t, mine.read())
	})
}

// wantRefusal checks that a raw reply is the problem document for a second sender, and nothing else.
func wantRefusal(t *testing.T, got string) {
	t.Helper()
	head, body, _ := strings.Cut(got, "\r\n\r\n")
	if !strings.HasPrefix(head, "HTTP/1.1 403 ") || !strings.Contains(head, "application/problem+json") ||
		!strings.Contains(body, `"code":"caller_changed"`) || strings.Contains(body, "HTTP/1.1") {
		t.Errorf("the reply is %q", got)
	}
}

func TestPassedBeforeTheFirstMessage(t *testing.T) {
	needRoot(t)
	dir := folder(t)
	l, exe := listen(t, dir), program(t, dir, "agent", "")
	a, b := pair(t)
	mine := launch(t, exe, planner, func(c *exec.Cmd) { c.ExtraFiles = []*os.File{a} })
	other := launch(t, exe, researcher, func(c *exec.Cmd) { c.ExtraFiles = []*os.File{b} })
	mine.do("dial", l.Addr().String())
	mine.do("pass")
	other.do("take")
	other.write("hello")
	conn := accept(t, l)
	_, err := conn.Read(make([]byte, 16))
	wantCode(t, err, fault.CallerChanged)
}

// TestForkedWriter covers caller-2.
//
// This is T-SOCK-2.
func TestForkedWriter(t *testing.T) {
	needRoot(t)
	for name, uid := range map[string]int{"other user": researcher, "same user": 0} {
		t.Run(name, func(t *testing.T) {
			dir := folder(t)
			l, exe := listen(t, dir), program(t, dir, "agent", "")
			connector := planner
			if uid != 0 {
				connector = 0 // only root can fork into another user
			}
			ch := launch(t, exe, connector, nil)
			ch.do("dial", l.Addr().String())
			conn := accept(t, l)
			ch.write("a")
			hear(t, conn, "a")
			ch.do("fork", strconv.Itoa(uid), "b")
			_, err := conn.Read(make([]byte, 1))
			wantCode(t, err, fault.CallerChanged)
		})
	}
}

// TestRecycledPID covers caller-3.
//
// This is T-SOCK-3.
func TestRecycledPID(t *testing.T) {
	needRoot(t)
	kernels(t, func(t *testing.T) {
		dir := folder(t)
		l, exe := listen(t, dir), program(t, dir, "agent", "")
		a, b := pair(t)
		first := launch(t, exe, planner, func(c *exec.Cmd) { c.ExtraFiles = []*os.File{a} })
		first.do("dial", l.Addr().String())
		conn := accept(t, l)
		who := identified(t, conn)
		first.do("write", strconv.Quote("a"))
		hear(t, conn, "a")
		if err := who.Recheck(); err != nil {
			t.Fatal(err)
		}
		first.do("pass")
		fd, err := receiveFD(int(b.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		kept := os.NewFile(uintptr(fd), "conn")
		defer kept.Close()
		first.end()
		wantCode(t, who.Recheck(), fault.CallerUnknown)

		second := reuse(t, exe, first.pid(), planner, kept)
		second.do("adopt", "3")
		second.write("b")
		// The number and the user are those of the connector: only the hold on the process tells them apart.
		hear(t, conn, "b")
		wantCode(t, who.Recheck(), fault.CallerUnknown)
		if ok, _ := caller.Match(api.Selector{UID: ptr(planner), Exe: exe}, who); ok {
			t.Error("the program of a process that is gone still matches")
		}
	})
}

// TestRecycledBeforeTheFirstMessage lets a process with the connector's number and user write first.
func TestRecycledBeforeTheFirstMessage(t *testing.T) {
	needRoot(t)
	dir := folder(t)
	l, exe := listen(t, dir), program(t, dir, "agent", "")
	a, b := pair(t)
	first := launch(t, exe, planner, func(c *exec.Cmd) { c.ExtraFiles = []*os.File{a} })
	first.do("dial", l.Addr().String())
	conn := accept(t, l)
	identified(t, conn)
	first.do("pass")
	fd, err := receiveFD(int(b.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	kept := os.NewFile(uintptr(fd), "conn")
	defer kept.Close()
	first.end()
	second := reuse(t, exe, first.pid(), planner, kept)
	second.do("adopt", "3")
	second.write("b")
	_, err = conn.Read(make([]byte, 1))
	wantCode(t, err, fault.CallerChanged)
}

// reuse starts a process until it gets the number.
func reuse(t *testing.T, exe string, pid, uid int, conn *os.File) *child {
	t.Helper()
	for range 300 {
		if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(pid-1)), 0); err != nil {
			t.Fatal(err)
		}
		ch := launch(t, exe, uid, func(c *exec.Cmd) { c.ExtraFiles = []*os.File{conn} })
		if ch.pid() == pid {
			return ch
		}
		ch.end()
	}
	t.Fatal("the number was not given out again")
	return nil
}

func sumOf(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}

// TestProgramSelectors covers caller-4.
func TestProgramSelectors(t *testing.T) {
	needRoot(t)
	kernels(t, func(t *testing.T) {
		dir := folder(t)
		l, exe := listen(t, dir), program(t, dir, "agent", "")
		other := program(t, dir, "other", "x")
		ch := launch(t, exe, planner, nil)
		ch.do("dial", l.Addr().String())
		conn := accept(t, l)
		who := identified(t, conn)
		for name, c := range map[string]struct {
			s    api.Selector
			want bool
		}{
			"path":               {api.Selector{UID: ptr(planner), Exe: exe}, true},
			"hash":               {api.Selector{UID: ptr(planner), ExeSHA256: sumOf(t, exe)}, true},
			"both":               {api.Selector{UID: ptr(planner), Exe: exe, ExeSHA256: sumOf(t, exe)}, true},
			"other path":         {api.Selector{UID: ptr(planner), Exe: other}, false},
			"other hash":         {api.Selector{UID: ptr(planner), ExeSHA256: sumOf(t, other)}, false},
			"other user":         {api.Selector{UID: ptr(researcher), Exe: exe}, false},
			"path, but no user":  {api.Selector{Exe: exe}, false},
			"hash, but no user":  {api.Selector{ExeSHA256: sumOf(t, exe)}, false},
			"nothing":            {api.Selector{}, false},
			"own group":          {api.Selector{Group: ptr(planner)}, true},
			"other group":        {api.Selector{Group: ptr(researcher)}, false},
			"primary group":      {api.Selector{GID: ptr(planner)}, true},
			"other gid":          {api.Selector{UID: ptr(planner), GID: ptr(researcher)}, false},
			"no unit":            {api.Selector{UID: ptr(planner), SystemdUnit: "agent.service"}, false},
			"root of all groups": {api.Selector{UID: ptr(planner), Cgroup: "/"}, false},
		} {
			if got, why := caller.Match(c.s, who); got != c.want || got == (why != "") {
				t.Errorf("%s: %v (%s)", name, got, why)
			}
		}

		// The same connection, another program.
		byHash := []api.Binding{{Selector: api.Selector{UID: ptr(planner), ExeSHA256: sumOf(t, exe)}}}
		if err := who.Recheck(); err != nil || !caller.MatchAny(byHash, who, api.VerbSign) {
			t.Fatalf("refused before exec: %v", err)
		}
		ch.tell("exec", other)
		ch.write("b")
		hear(t, conn, "b")
		wantCode(t, who.Recheck(), fault.CallerChanged)
		if caller.MatchAny(byHash, who, api.VerbSign) {
			t.Error("another program matches the hash")
		}
		if sum, err := who.ExeSHA256(); err == nil {
			t.Errorf("a changed program has the hash %s", sum)
		}
	})
}

// TestDeletedProgram covers caller-5.
func TestDeletedProgram(t *testing.T) {
	needRoot(t)
	dir := folder(t)
	l, exe := listen(t, dir), program(t, dir, "agent", "")
	sum := sumOf(t, exe)
	ch := launch(t, exe, planner, nil)
	ch.do("dial", l.Addr().String())
	who := identified(t, accept(t, l))
	selectors := []api.Selector{{UID: ptr(planner), Exe: exe}, {UID: ptr(planner), ExeSHA256: sum}}
	for _, s := range selectors {
		if ok, why := caller.Match(s, who); !ok {
			t.Fatalf("refused before it was deleted: %s", why)
		}
	}
	for _, again := range []bool{false, true} {
		if again { // another file in its place, with the same content
			program(t, dir, "agent", "")
		} else if err := os.Remove(exe); err != nil {
			t.Fatal(err)
		}
		if err := who.Recheck(); err != nil {
			t.Fatal(err)
		}
		for _, s := range append(selectors, api.Selector{UID: ptr(planner), Exe: exe + " (deleted)"}) {
			if ok, _ := caller.Match(s, who); ok {
				t.Errorf("a deleted program matches %+v (another in its place: %v)", s, again)
			}
		}
	}
	if ok, why := caller.Match(api.Selector{UID: ptr(planner)}, who); !ok {
		t.Errorf("the user no longer matches: %s", why)
	}
}

// TestReplacedProgram covers a file that keeps its links: renamed away, and another put in its place.
func TestReplacedProgram(t *testing.T) {
	needRoot(t)
	dir := folder(t)
	l, exe := listen(t, dir), program(t, dir, "agent", "")
	other := program(t, dir, "other", "x")
	ch := launch(t, other, planner, nil)
	ch.do("dial", l.Addr().String())
	who := identified(t, accept(t, l))
	if err := os.Rename(other, filepath.Join(dir, "away")); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(exe, other); err != nil {
		t.Fatal(err)
	}
	if err := who.Recheck(); err != nil {
		t.Fatal(err)
	}
	if ok, _ := caller.Match(api.Selector{UID: ptr(planner), Exe: other}, who); ok {
		t.Error("a program matches the path that it was moved away from")
	}
}

// TestMountNamespace shows a path that is another file in the caller's mount namespace (caller-5).
//
// This is T-SOCK-4.
func TestMountNamespace(t *testing.T) {
	needRoot(t)
	dir := folder(t)
	l, good := listen(t, dir), program(t, dir, "agent", "")
	evil := program(t, dir, "evil", "x")
	ch := launch(t, evil, 0, func(c *exec.Cmd) { c.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS })
	ch.do("bind", evil, good)
	ch.do("become", strconv.Itoa(planner))
	ch.tell("exec", good)
	ch.do("dial", l.Addr().String())
	who := identified(t, accept(t, l))
	if who.Exe != good {
		t.Fatalf("the kernel shows %s: the mount namespace does not do what this test is about", who.Exe)
	}
	if err := who.Recheck(); err != nil {
		t.Fatal(err)
	}
	for _, s := range []api.Selector{
		{UID: ptr(planner), Exe: good}, {UID: ptr(planner), Exe: evil}, {UID: ptr(planner), ExeSHA256: sumOf(t, good)},
	} {
		if ok, _ := caller.Match(s, who); ok {
			t.Errorf("a bind mount passes for %+v", s)
		}
	}
	if ok, why := caller.Match(api.Selector{UID: ptr(planner)}, who); !ok {
		t.Errorf("the user does not match: %s", why)
	}
	w := who.Whoami(true)
	if !strings.Contains(strings.Join(w.Explanation, "\n"), "the host has another file at that path") {
		t.Errorf("the explanation does not say so: %q", w.Explanation)
	}
}

// TestOtherUserNamespace covers caller-6.
func TestOtherUserNamespace(t *testing.T) {
	needRoot(t)
	one := func(inside, outside, size int) []syscall.SysProcIDMap {
		return []syscall.SysProcIDMap{{ContainerID: inside, HostID: outside, Size: size}}
	}
	for name, c := range map[string]struct {
		maps  []syscall.SysProcIDMap
		clone uintptr
	}{
		"root of its own":       {one(0, planner, 1), syscall.CLONE_NEWUSER},
		"with mount namespace":  {one(0, planner, 1), syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS},
		"the same user inside":  {one(planner, planner, 1), syscall.CLONE_NEWUSER},
		"all users as they are": {one(0, 0, 1<<31-1), syscall.CLONE_NEWUSER},
		"no users at all":       {nil, syscall.CLONE_NEWUSER},
	} {
		t.Run(name, func(t *testing.T) {
			dir := folder(t)
			l, exe := listen(t, dir), program(t, dir, "agent", "")
			ch := launch(t, exe, 0, func(cmd *exec.Cmd) {
				cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: c.clone, UidMappings: c.maps, GidMappings: c.maps}
				if len(c.maps) > 0 {
					in := uint32(c.maps[0].ContainerID)
					if c.maps[0].Size > 1 {
						in = planner
					}
					cmd.SysProcAttr.Credential = &syscall.Credential{Uid: in, Gid: in, NoSetGroups: true}
				}
			})
			if c.clone&syscall.CLONE_NEWNS != 0 {
				ch.do("bind", program(t, dir, "evil", "x"), exe)
			}
			ch.do("dial", l.Addr().String())
			who, err := caller.FromConn(accept(t, l))
			wantCode(t, err, fault.CallerUnknown)
			for agent, b := range bindings {
				if caller.MatchAny(b, who, api.VerbSign) {
					t.Errorf("matches as %s", agent)
				}
			}
			ctx := caller.ConnContext(t.Context(), nil)
			if _, ok := caller.FromContext(ctx); ok {
				t.Error("a context without a connection has a caller")
			}
		})
	}
}

func TestUnsettledUser(t *testing.T) {
	needRoot(t)
	dir := folder(t)
	l, exe := listen(t, dir), program(t, dir, "agent", "")
	ch := launch(t, exe, 0, nil)
	ch.do("effective", strconv.Itoa(planner))
	ch.do("dial", l.Addr().String())
	_, err := caller.FromConn(accept(t, l))
	if err == nil {
		t.Fatal("a process of two users at once is identified")
	}
	ch = launch(t, exe, 0, nil)
	ch.do("dial", l.Addr().String())
	conn := accept(t, l)
	who := identified(t, conn)
	ch.do("become", strconv.Itoa(planner))
	wantCode(t, who.Recheck(), fault.CallerChanged)
	ch.write("x")
	_, err = conn.Read(make([]byte, 1))
	wantCode(t, err, fault.CallerChanged)
}

func TestDeadBeforeAccept(t *testing.T) {
	needRoot(t)
	kernels(t, func(t *testing.T) {
		dir := folder(t)
		l, exe := listen(t, dir), program(t, dir, "agent", "")
		ch := launch(t, exe, planner, nil)
		ch.do("dial", l.Addr().String())
		ch.write("hello")
		ch.end()
		// A later one is served.
		ch = launch(t, exe, planner, nil)
		ch.do("dial", l.Addr().String())
		conn := accept(t, l)
		if _, err := caller.FromConn(conn); err != nil {
			conn = accept(t, l) // the dead one was still given a connection
		}
		if who := identified(t, conn); int(who.PID) != ch.pid() {
			t.Errorf("the caller is %d, want %d", who.PID, ch.pid())
		}
	})
}

// TestUnprivilegedDaemon listens as an ordinary user, who may look at no more of other users' processes than
// anybody may.
func TestUnprivilegedDaemon(t *testing.T) {
	needRoot(t)
	dir := folder(t)
	exe := program(t, dir, "agent", "")
	run := filepath.Join(dir, "run")
	if err := os.Mkdir(run, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(run, daemonUser, daemonUser); err != nil {
		t.Fatal(err)
	}
	daemon := launch(t, exe, daemonUser, nil)
	daemon.do("listen", filepath.Join(run, "s"))
	ch := launch(t, exe, planner, nil)
	ch.do("dial", filepath.Join(run, "s"))
	if got := daemon.do("accept"); got != fmt.Sprintf("%d %d", planner, ch.pid()) {
		t.Fatalf("the caller is %s", got)
	}
	for _, c := range []struct{ exe, want string }{
		{"", "true "},
		{exe, "false the daemon may not look at the program of the process"},
	} {
		if got := daemon.do("match", strconv.Itoa(planner), c.exe); got != c.want {
			t.Errorf("program %q: %s, want %s", c.exe, got, c.want)
		}
	}
	// The dead are told from the living before they are reaped, too.
	if err := ch.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	waitZombie(t, ch.pid())
	if got := daemon.do("recheck"); got != "caller_unknown" {
		t.Errorf("a zombie is %q", got)
	}
	ch.end()
	if got := daemon.do("recheck"); got != "caller_unknown" {
		t.Errorf("a process that has gone is %q", got)
	}

	for name, maps := range map[string][]syscall.SysProcIDMap{
		"other map": {{ContainerID: 0, HostID: planner, Size: 1}}, "no map": nil,
	} {
		stranger := launch(t, exe, 0, func(cmd *exec.Cmd) {
			cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: maps, GidMappings: maps}
		})
		stranger.do("dial", filepath.Join(run, "s"))
		if got := daemon.do("accept"); got != "caller_unknown" {
			t.Errorf("%s: the caller is %s", name, got)
		}
	}
}

// waitZombie waits until a process has ended, with all its threads, and leaves it unreaped.
func waitZombie(t *testing.T, pid int) {
	t.Helper()
	for {
		err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		return
	}
}

func TestContext(t *testing.T) {
	me, err := caller.Self()
	if err != nil {
		t.Fatal(err)
	}
	if got, ok := caller.FromContext(caller.NewContext(t.Context(), me)); !ok || got != me {
		t.Errorf("FromContext = %v, %v", got, ok)
	}
	if got, err := caller.Require(caller.NewContext(t.Context(), me)); err != nil || got != me {
		t.Errorf("Require = %v, %v", got, err)
	}
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	for name, ctx := range map[string]context.Context{
		"empty":         t.Context(),
		"no caller":     caller.NewContext(t.Context(), nil),
		"made up":       caller.NewContext(t.Context(), &caller.Caller{UID: 0}),
		"no connection": caller.ConnContext(t.Context(), a),
	} {
		_, err := caller.Require(ctx)
		if !errors.Is(err, fault.CallerUnknown) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if ok, _ := caller.Match(api.Selector{UID: ptr(0)}, &caller.Caller{UID: 0}); ok {
		t.Error("a caller without a process matches")
	}
}

func TestClosedConnectionHasNoCaller(t *testing.T) {
	l := listen(t, folder(t))
	dial(t, l)
	conn := accept(t, l)
	who := identified(t, conn)
	conn.Close()
	wantCode(t, who.Recheck(), fault.CallerUnknown)
	if _, err := who.ExeSHA256(); err == nil {
		t.Error("a closed connection has a program")
	}
	if ok, _ := caller.Match(api.Selector{UID: &who.UID, Exe: who.Exe}, who); ok {
		t.Error("a closed connection matches a program")
	}
}

func TestWhoami(t *testing.T) {
	needRoot(t)
	dir := folder(t)
	l, exe := listen(t, dir), program(t, dir, "agent\x1b[31m", "")
	ch := launch(t, exe, planner, func(c *exec.Cmd) { c.SysProcAttr.Credential.Groups = []uint32{7, 9} })
	ch.do("dial", l.Addr().String())
	who := identified(t, accept(t, l))
	short := who.Whoami(false)
	if short.UID != planner || short.Exe != exe || short.ExeSHA256 != "" || len(short.Explanation) != 0 ||
		fmt.Sprint(short.Groups) != "[7 9]" || short.Agents == nil {
		t.Errorf("whoami is %+v", short)
	}
	w := who.Whoami(true)
	if w.ExeSHA256 != sumOf(t, exe) {
		t.Errorf("the hash is %q", w.ExeSHA256)
	}
	all := strings.Join(w.Explanation, "\n")
	for _, want := range []string{
		"uid 64101: boundary", "gid 64101: boundary", "group 64101 or 7 or 9: boundary",
		"systemd_unit: none", "\\x1b[31m\": narrows only", "exe_sha256 " + w.ExeSHA256 + ": narrows only",
	} {
		if !strings.Contains(all, want) {
			t.Errorf("the explanation lacks %q:\n%s", want, all)
		}
	}
	if strings.Contains(all, "\x1b") {
		t.Error("the explanation holds a control character of the caller's choice")
	}
	for _, g := range []uint32{7, 9, planner} {
		if ok, why := caller.Match(api.Selector{Group: &g}, who); !ok {
			t.Errorf("group %d: %s", g, why)
		}
	}
}
