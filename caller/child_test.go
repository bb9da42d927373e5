package caller_test

import (
	"bufio"
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

	"golang.org/x/sys/unix"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/caller"
	"github.com/trustd/trustd/fault"
)

// The users that the tests act as. They need no entry in the user database.
const (
	planner    = 64101
	researcher = 64102
	daemonUser = 64103
)

const childEnv = "TRUSTD_CALLER_CHILD"

// TestMain lets the test binary stand in for callers: with childEnv set it does what its standard input says.
func TestMain(m *testing.M) {
	switch os.Getenv(childEnv) {
	case "":
		os.Exit(m.Run())
	case "writer":
		os.Exit(writeOnce())
	default:
		os.Exit((&actor{}).run())
	}
}

// writeOnce writes its argument on the connection that it inherited.
func writeOnce() int {
	if _, err := unix.Write(3, []byte(os.Args[1])); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// An actor is the child's end of the protocol: a command a line, a reply a line.
type actor struct {
	conn     int // descriptor of the connection, 0 for none
	listener *caller.Listener
	who      *caller.Caller // on the connection accepted last
}

func (a *actor) run() int {
	if s := os.Getenv("TRUSTD_CALLER_CONN"); s != "" {
		a.conn, _ = strconv.Atoi(s)
	}
	for {
		line, err := readLine()
		if err != nil {
			return 0
		}
		reply, err := a.do(strings.Split(line, "\t"))
		if err != nil {
			reply = "error " + strconv.Quote(err.Error())
		}
		fmt.Println(reply)
	}
}

// readLine reads no further than its line, because what follows may be for the program that we exec.
func readLine() (string, error) {
	var line []byte
	for {
		var b [1]byte
		if _, err := io.ReadFull(os.Stdin, b[:]); err != nil {
			return "", err
		}
		if b[0] == '\n' {
			return string(line), nil
		}
		line = append(line, b[0])
	}
}

func (a *actor) do(w []string) (string, error) {
	arg := func(i int) string { return append(w, "", "", "")[i] }
	num := func(i int) int { n, _ := strconv.Atoi(arg(i)); return n }
	switch arg(0) {
	case "dial":
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return "", err
		}
		a.conn = fd
		return "ok", unix.Connect(fd, &unix.SockaddrUnix{Name: arg(1)})
	case "adopt":
		a.conn = num(1)
		return "ok", nil
	case "write":
		text, err := strconv.Unquote(arg(1))
		if err != nil {
			return "", err
		}
		_, err = unix.Write(a.conn, []byte(text))
		return "ok", err
	case "read":
		var all []byte
		buf := make([]byte, 4096)
		for {
			n, err := unix.Read(a.conn, buf)
			if n <= 0 || err != nil {
				return strconv.Quote(string(all)), nil
			}
			all = append(all, buf[:n]...)
		}
	case "some":
		buf := make([]byte, 4096)
		n, err := unix.Read(a.conn, buf)
		return strconv.Quote(string(buf[:max(n, 0)])), err
	case "pass":
		return "ok", unix.Sendmsg(3, []byte{1}, unix.UnixRights(a.conn), nil, 0)
	case "take":
		fd, err := receiveFD(3)
		a.conn = fd
		return "ok", err
	case "exec":
		if _, err := unix.FcntlInt(uintptr(a.conn), unix.F_SETFD, 0); err != nil {
			return "", err
		}
		return "", unix.Exec(arg(1), os.Args, append(os.Environ(), "TRUSTD_CALLER_CONN="+strconv.Itoa(a.conn)))
	case "fork":
		return a.fork(num(1), arg(2))
	case "bind":
		return "ok", unix.Mount(arg(1), arg(2), "", unix.MS_BIND, "")
	case "become":
		if err := syscall.Setgroups(nil); err != nil {
			return "", err
		}
		if err := syscall.Setresgid(num(1), num(1), num(1)); err != nil {
			return "", err
		}
		return "ok", syscall.Setresuid(num(1), num(1), num(1))
	case "listen":
		var err error
		a.listener, err = caller.Listen(arg(1), 0o666, -1)
		return "ok", err
	case "accept":
		nc, err := a.listener.Accept()
		if err != nil {
			return "", err
		}
		if a.who, err = caller.FromConn(nc); err != nil {
			return string(fault.CodeOf(err)), nil
		}
		return fmt.Sprint(a.who.UID, a.who.PID), nil
	case "match":
		uid := uint32(num(1))
		ok, why := caller.Match(api.Selector{UID: &uid, Exe: arg(2)}, a.who)
		return fmt.Sprint(ok, " ", why), nil
	case "recheck":
		return string(fault.CodeOf(a.who.Recheck())), nil
	case "effective":
		return "ok", syscall.Setreuid(-1, num(1))
	}
	return "", fmt.Errorf("unknown command %q", arg(0))
}

// fork writes from a child process of another user.
func (a *actor) fork(uid int, text string) (string, error) {
	f := os.NewFile(uintptr(a.conn), "conn")
	cmd := exec.Command(os.Args[0], text)
	cmd.Path = "/proc/self/exe"
	cmd.Env = []string{childEnv + "=writer", "GORACE=atexit_sleep_ms=0"}
	cmd.ExtraFiles = []*os.File{f}
	cmd.Stderr = os.Stderr
	if uid > 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	}
	return "ok", cmd.Run()
}

func receiveFD(sock int) (int, error) {
	b, oob := make([]byte, 1), make([]byte, 64)
	_, n, _, _, err := unix.Recvmsg(sock, b, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return -1, err
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return -1, fmt.Errorf("%d control messages: %w", len(msgs), err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return -1, fmt.Errorf("%d descriptors: %w", len(fds), err)
	}
	return fds[0], nil
}

// A child is the test's end of the protocol.
type child struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// launch starts program as a user; change may ask for more.
func launch(t *testing.T, program string, uid int, change func(*exec.Cmd)) *child {
	t.Helper()
	cmd := exec.Command(program)
	cmd.Env = []string{childEnv + "=actor", "GORACE=atexit_sleep_ms=0"}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	if change != nil {
		change(cmd)
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c := &child{t: t, cmd: cmd, in: in, out: bufio.NewReader(out)}
	t.Cleanup(c.end)
	return c
}

// end lets the child go and waits for it.
func (c *child) end() {
	c.in.Close()
	_ = c.cmd.Wait()
}

// do sends a command and returns the reply.
func (c *child) do(words ...string) string {
	c.t.Helper()
	c.tell(words...)
	return c.reply()
}

func (c *child) tell(words ...string) {
	c.t.Helper()
	if _, err := fmt.Fprintln(c.in, strings.Join(words, "\t")); err != nil {
		c.t.Fatalf("telling the child %q: %v", words[0], err)
	}
}

func (c *child) reply() string {
	c.t.Helper()
	line, err := c.out.ReadString('\n')
	if err != nil {
		c.t.Fatalf("hearing from the child: %v", err)
	}
	if strings.HasPrefix(line, "error ") {
		c.t.Fatalf("the child failed: %s", line)
	}
	return strings.TrimSuffix(line, "\n")
}

func (c *child) write(text string) {
	c.t.Helper()
	c.do("write", strconv.Quote(text))
}

// read returns what the child hears until the connection ends.
func (c *child) read() string {
	c.t.Helper()
	s, err := strconv.Unquote(c.do("read"))
	if err != nil {
		c.t.Fatal(err)
	}
	return s
}

// readSome returns what the child hears next.
func (c *child) readSome() string {
	c.t.Helper()
	s, err := strconv.Unquote(c.do("some"))
	if err != nil || s == "" {
		c.t.Fatalf("the child hears %q, %v", s, err)
	}
	return s
}

func (c *child) pid() int { return c.cmd.Process.Pid }

// needRoot ends a test that cannot act as other users: where tests must be complete it fails.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") != "" || os.Getenv("TRUSTD_REQUIRE_HSM") == "1" {
		t.Fatal("this test acts as other users and must run as root")
	}
	t.Skip("this test acts as other users and must run as root")
}

// folder returns a folder that other users can enter, which those of testing are not.
func folder(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "caller")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// program copies the test binary to where other users can run it, with a tail that changes its hash only.
func program(t testing.TB, dir, name, tail string) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	to := filepath.Join(dir, name)
	if err := os.WriteFile(to, append(b, tail...), 0o755); err != nil {
		t.Fatal(err)
	}
	return to
}

// pair returns two connected sockets, to pass descriptors over.
func pair(t *testing.T) (a, b *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	a, b = os.NewFile(uintptr(fds[0]), "a"), os.NewFile(uintptr(fds[1]), "b")
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

func dial(t testing.TB, l net.Listener) *net.UnixConn {
	t.Helper()
	nc, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	return nc.(*net.UnixConn)
}
