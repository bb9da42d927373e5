package caller

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/trustd/trustd/fault"
)

// Connections that a Listener holds at once unless Limit says otherwise. Each takes three descriptors.
const (
	defaultPerUser = 256
	defaultTotal   = 4096
)

// A Listener accepts connections and identifies who connects. Accept returns a *Conn.
type Listener struct {
	ul   *net.UnixListener
	host *host
	addr net.Addr
	path string // ours to remove; "" where another made the socket
	made fileID

	mu      sync.Mutex
	perUser int
	total   int
	open    map[uint32]int
	sum     int
}

// Listen makes a socket at path and listens on it. The socket is born in a folder that only we can enter, gets its
// group (-1 for our own) and mode there, and only then takes its place, so that nobody can connect to it before
// those are right. A socket that a dead daemon left is replaced; one that answers is already_exists. The folder of
// path must not let others rename what is in it.
func Listen(path string, mode os.FileMode, gid int) (*Listener, error) {
	h, err := theHost()
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "the daemon cannot look at its own process")
	}
	dir := filepath.Dir(path)
	unlock, err := lockFolder(dir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := vacant(path); err != nil {
		return nil, err
	}
	private, err := os.MkdirTemp(dir, ".s")
	if err != nil {
		return nil, fmt.Errorf("making a private folder for the socket: %w", err)
	}
	defer os.RemoveAll(private)
	born := filepath.Join(private, "s")
	ul, err := bind(born, mode, gid)
	if err != nil {
		return nil, err
	}
	f, err := statAt(unix.AT_FDCWD, born, unix.AT_SYMLINK_NOFOLLOW)
	if err == nil {
		err = os.Rename(born, path)
	}
	if err != nil {
		ul.Close()
		return nil, fmt.Errorf("putting the socket in its place: %w", err)
	}
	l := newListener(h, ul)
	l.addr, l.path, l.made = &net.UnixAddr{Name: path, Net: "unix"}, path, f.fileID
	return l, nil
}

// bind makes a socket that carries the sender of each message from its first connection on.
func bind(path string, mode os.FileMode, gid int) (*net.UnixListener, error) {
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		return passCredentials(raw)
	}}
	l, err := config.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, fmt.Errorf("making the socket: %w", err)
	}
	ul := l.(*net.UnixListener)
	ul.SetUnlinkOnClose(false)
	err = os.Chown(path, -1, gid)
	if err == nil {
		err = os.Chmod(path, mode.Perm())
	}
	if err != nil {
		ul.Close()
		return nil, fmt.Errorf("setting the mode of the socket: %w", err)
	}
	return ul, nil
}

// lockFolder keeps two daemons from replacing each other's socket at the same time.
func lockFolder(dir string) (unlock func(), err error) {
	fd, err := openAt(unix.AT_FDCWD, dir, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, fmt.Errorf("opening the folder of the socket: %w", err)
	}
	f, err := statAt(fd, "", unix.AT_EMPTY_PATH)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	if f.mode&0o022 != 0 && f.mode&unix.S_ISVTX == 0 {
		unix.Close(fd)
		return nil, fault.New(fault.InsecureSecret, "others can replace the socket: its folder is writable by them")
	}
	if err := unix.Flock(fd, unix.LOCK_EX); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("locking the folder of the socket: %w", err)
	}
	return func() { unix.Close(fd) }, nil
}

// vacant says whether path is free, or holds a socket that nobody serves.
func vacant(path string) error {
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("looking for a socket: %w", err)
	}
	if fi.Mode().Type() != fs.ModeSocket {
		return fault.New(fault.AlreadyExists, "there is a file in the place of the socket, which is no socket")
	}
	nc, err := net.Dial("unix", path)
	if err == nil {
		nc.Close()
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fault.Wrap(fault.AlreadyExists, err, "another process serves the socket")
	}
	return nil
}

// FromListener takes over a socket that another made and passed on, a service manager say. Connections that wait
// on it already were made before we asked for senders: what they sent before they are accepted may carry none,
// and then they end with caller_changed and the caller connects again. A socket unit avoids that with
// PassCredentials=yes.
func FromListener(l net.Listener) (*Listener, error) {
	h, err := theHost()
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "the daemon cannot look at its own process")
	}
	ul, ok := l.(*net.UnixListener)
	if !ok || ul.Addr().Network() != "unix" {
		return nil, fault.New(fault.Unsupported, "the socket that was passed is no Unix stream socket")
	}
	raw, err := ul.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("taking the socket: %w", err)
	}
	if err := passCredentials(raw); err != nil {
		return nil, err
	}
	ul.SetUnlinkOnClose(false)
	return newListener(h, ul), nil
}

func newListener(h *host, ul *net.UnixListener) *Listener {
	return &Listener{
		ul: ul, host: h, addr: ul.Addr(), perUser: defaultPerUser, total: defaultTotal, open: make(map[uint32]int),
	}
}

// Limit bounds the connections that are open at once, of one user and of all. 0 leaves a bound as it is.
func (l *Listener) Limit(perUser, total int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if perUser > 0 {
		l.perUser = perUser
	}
	if total > 0 {
		l.total = total
	}
}

// Accept returns the next connection, a *Conn. A caller that cannot be identified gets a connection all the same,
// on which FromConn says why; one that has too many is told so and sent away.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		uc, err := l.ul.AcceptUnix()
		if err != nil {
			return nil, err
		}
		c, err := l.identify(uc)
		if err != nil {
			sendNow(uc, problemReply(err))
			uc.Close()
			continue
		}
		return c, nil
	}
}

// identify asks the kernel who connected.
func (l *Listener) identify(uc *net.UnixConn) (*Conn, error) {
	raw, err := uc.SyscallConn()
	if err != nil {
		return nil, fault.Wrap(fault.CallerUnknown, err, "")
	}
	var who connector
	var failed error
	err = raw.Control(func(fd uintptr) { who, failed = connectorOf(int(fd)) })
	if err = errors.Join(err, failed); err != nil {
		if errors.Is(err, errGone) {
			return nil, errGone
		}
		return nil, fault.Wrap(fault.CallerUnknown, err, "")
	}
	if err := l.take(who.uid); err != nil {
		closeFD(who.pidfd)
		return nil, err
	}
	c := &Conn{uc: uc, who: who.peer, room: pidfdControl, onClose: func() { l.release(who.uid) }}
	if c.caller, c.unknown = newCaller(l.host, who); c.caller != nil {
		c.caller.conn = c
	}
	return c, nil
}

// connectorOf asks an accepted socket who connected.
func connectorOf(fd int) (connector, error) {
	// An accepted socket has the listener's options, except where it waited before they were set.
	if err := passCredentialsFD(fd); err != nil {
		return connector{}, err
	}
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return connector{}, fmt.Errorf("asking who connected: %w", err)
	}
	who := connector{peer: peer{cred.Pid, cred.Uid, cred.Gid}}
	who.groups, who.groupsKnown = peerGroups(fd)
	who.pidfd, err = peerPidfd(fd)
	return who, err
}

// peerGroups returns the connector's supplementary groups; false where there are more than usual, or where the
// kernel (before 4.13) does not tell, and the process's status has to.
func peerGroups(fd int) ([]uint32, bool) {
	var all [64]uint32
	size := uint32(unsafe.Sizeof(all))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
		uintptr(unsafe.Pointer(&all)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return nil, false
	}
	return slices.Clone(all[:size/4]), true
}

// withoutPidfd makes peerPidfd behave as kernels before 6.5, for tests.
var withoutPidfd bool

// peerPidfd returns a hold on the connector, or -1 where the kernel has none to give. A connector that has gone is
// errGone: then there is no fallback, because its number may be another's.
func peerPidfd(fd int) (int, error) {
	if withoutPidfd {
		return -1, nil
	}
	pidfd, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	switch {
	case err == nil:
		return pidfd, nil
	case err == unix.ENOPROTOOPT:
		return -1, nil
	case err == unix.ESRCH || err == unix.EINVAL || err == unix.ENODATA:
		return -1, errGone
	}
	return -1, fmt.Errorf("taking hold of the connecting process: %w", err)
}

func passCredentials(raw syscall.RawConn) error {
	var failed error
	if err := raw.Control(func(fd uintptr) { failed = passCredentialsFD(int(fd)) }); err != nil {
		return fmt.Errorf("setting the options of the socket: %w", err)
	}
	return failed
}

func passCredentialsFD(fd int) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSCRED, 1); err != nil {
		return fmt.Errorf("asking for the sender of each message: %w", err)
	}
	// Kernels before 6.5 have none; numbers and Recheck are enough then, see Conn.check.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSPIDFD, 1); err != nil && err != unix.ENOPROTOOPT {
		return fmt.Errorf("asking for a hold on the sender of each message: %w", err)
	}
	return nil
}

func setOption(uc *net.UnixConn, option, value int) error {
	raw, err := uc.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := raw.Control(func(fd uintptr) {
		failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, option, value)
	}); err != nil {
		return err
	}
	if failed == unix.ENOPROTOOPT && value == 0 {
		return nil
	}
	return failed
}

// take counts a connection of a user.
func (l *Listener) take(uid uint32) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.sum >= l.total {
		return fault.New(fault.ResourceExhausted, "the daemon has too many connections")
	}
	if l.open[uid] >= l.perUser {
		return fault.New(fault.ResourceExhausted, "this user has too many connections")
	}
	l.open[uid]++
	l.sum++
	return nil
}

func (l *Listener) release(uid uint32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sum--
	if l.open[uid]--; l.open[uid] == 0 {
		delete(l.open, uid)
	}
}

// Addr returns the place of the socket.
func (l *Listener) Addr() net.Addr { return l.addr }

// Close stops listening and removes the socket, if it is still the one that Listen made.
func (l *Listener) Close() error {
	err := l.ul.Close()
	if l.path == "" || err != nil {
		return err
	}
	f, serr := statAt(unix.AT_FDCWD, l.path, unix.AT_SYMLINK_NOFOLLOW)
	if serr != nil || f.fileID != l.made {
		return nil
	}
	if rerr := os.Remove(l.path); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
		return fmt.Errorf("removing the socket: %w", rerr)
	}
	return nil
}
