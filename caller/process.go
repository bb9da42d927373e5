package caller

import (
	"bytes"
	"errors"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/trustd/trustd/fault"
)

// A process is a hold on one process, which its number is not: the kernel gives the number to another once the
// process is gone. Both the pidfd and the folder stay with the process they were opened for.
type process struct {
	host *host
	uid  uint32
	gid  uint32

	mu     sync.Mutex
	closed bool
	pidfd  int // -1 where the kernel has no SO_PEERPIDFD
	dir    int // O_PATH of /proc/PID

	exe      fileID // the program at accept
	exeKnown bool   // the daemon may look at it
	exeKind  string // the file system that the program comes from; "" until it is asked for
	nsKnown  bool   // the daemon may look at its namespaces

	now observation
}

// An observation holds what was looked up since the last Recheck.
type observation struct {
	groups   []uint32
	groupsOK bool
	cgroup   *cgroup
	program  *program
}

// noPidfdInfo is set once the kernel (before 6.13) is seen not to know PIDFD_GET_INFO.
var noPidfdInfo atomic.Bool

var (
	errGone    = fault.New(fault.CallerUnknown, "the process has ended")
	errChanged = fault.New(fault.CallerChanged, "the process has changed its user or group since it connected")
	errExec    = fault.New(fault.CallerChanged, "the process has started another program since it connected")
	errUserNS  = fault.New(fault.CallerUnknown, "the process is in another user namespace than the daemon")
)

const hidden = "the daemon cannot look at the process"

// openProcess takes hold of the process behind a number. It owns who.pidfd from here on. The order matters: the
// folder is opened by number, then the process is seen to live still, so the number was its own.
func openProcess(h *host, who connector) (*process, error) {
	p := &process{host: h, uid: who.uid, gid: who.gid, pidfd: who.pidfd, dir: -1}
	p.now.groups, p.now.groupsOK = who.groups, who.groupsKnown
	dir, err := openAt(h.proc, strconv.Itoa(int(who.pid)), unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		p.close()
		if errors.Is(err, unix.ENOENT) && p.pidfd < 0 {
			return nil, errGone
		}
		return nil, fault.Wrap(fault.CallerUnknown, err, "%s", hidden)
	}
	p.dir = dir
	if err := p.begin(who.pid); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// begin notes what must not change on the connection.
func (p *process) begin(pid int32) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.alive(); err != nil {
		return err
	}
	if err := p.credentials(pid); err != nil {
		return err
	}
	if err := p.namespace(true); err != nil {
		return err
	}
	exe, err := statAt(p.dir, "exe", 0)
	p.exe, p.exeKnown = exe.fileID, err == nil
	return p.alive()
}

// recheck says whether the process is still what it was at accept. The caller holds p.mu.
func (p *process) recheck() error {
	if p.closed {
		return errGone
	}
	p.now = observation{}
	if err := p.alive(); err != nil {
		return err
	}
	if err := p.credentials(0); err != nil {
		return err
	}
	if err := p.namespace(false); err != nil {
		return err
	}
	if !p.exeKnown {
		return nil
	}
	exe, err := statAt(p.dir, "exe", 0)
	if err != nil {
		return fault.Wrap(fault.CallerUnknown, err, "%s", hidden)
	}
	if exe.fileID != p.exe {
		return errExec
	}
	return nil
}

// alive says whether the process runs, which a zombie does not. The folder stands for the process as well as a
// pidfd does: once the process is gone nothing in it can be read, whoever has the number by then.
func (p *process) alive() error {
	if p.pidfd < 0 {
		b, err := readAt(p.dir, "stat", maxStat)
		if err != nil {
			return p.lost(err)
		}
		if state, err := parseState(b); err != nil || state == 'Z' || state == 'X' {
			return errGone
		}
		return nil
	}
	fds := [1]unix.PollFd{{Fd: int32(p.pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds[:], 0)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return fault.Wrap(fault.CallerUnknown, err, "%s", hidden)
		case n != 0:
			return errGone
		default:
			return nil
		}
	}
}

// credentials says whether the process still has the user and group that it connected with, and the number pid
// where that is not 0.
func (p *process) credentials(pid int32) error {
	if p.pidfd >= 0 && !noPidfdInfo.Load() {
		info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_CREDS}
		err := unix.IoctlPidfdInfo(p.pidfd, &info)
		switch {
		case err == nil && info.Mask&unix.PIDFD_INFO_CREDS != 0:
			if pid != 0 && info.Tgid != uint32(pid) {
				return fault.New(fault.CallerUnknown, "%s", hidden)
			}
			return p.sameUser(info.Ruid, info.Euid, info.Rgid, info.Egid)
		case err == unix.ESRCH:
			return errGone
		case err == unix.ENOTTY || err == unix.EINVAL:
			noPidfdInfo.Store(true)
		}
	}
	s, err := p.status()
	if err != nil {
		return err
	}
	if pid != 0 && s.tgid != pid {
		return fault.New(fault.CallerUnknown, "%s", hidden)
	}
	p.now.groups, p.now.groupsOK = s.groups, true
	return p.sameUser(s.uid[0], s.uid[1], s.gid[0], s.gid[1])
}

// sameUser also refuses a process whose real and effective users differ: SO_PEERCRED shows the one and each
// message the other, and neither says alone who decides what the process does.
func (p *process) sameUser(ruid, euid, rgid, egid uint32) error {
	if ruid != p.uid || euid != p.uid || rgid != p.gid || egid != p.gid {
		return errChanged
	}
	return nil
}

// namespace says whether the process is in our user namespace. In one of its own it would hold capabilities, and
// its users might be others than they seem. Where the daemon may not look at the namespace itself, the mapping of
// users must be ours, and whole.
func (p *process) namespace(first bool) error {
	ns, err := readlinkAt(p.dir, "ns/user")
	switch {
	case err == nil:
		if first {
			p.nsKnown = true
		}
		if ns != p.host.userNS {
			return errUserNS
		}
		return p.named()
	case !first && p.nsKnown || !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EPERM):
		return p.lost(err)
	}
	m, err := readAt(p.dir, "uid_map", maxCgroup)
	if err != nil {
		return p.lost(err)
	}
	if !p.host.whole || !bytes.Equal(m, p.host.uidMap) {
		return errUserNS
	}
	return nil
}

// named refuses ids that have no name in our user namespace: they all look the same.
func (p *process) named() error {
	if !p.host.whole && (p.uid == p.host.nobody || p.gid == p.host.nobody) {
		return errUserNS
	}
	return nil
}

func (p *process) status() (status, error) {
	b, err := readAt(p.dir, "status", maxStatus)
	if err != nil {
		return status{}, p.lost(err)
	}
	s, err := parseStatus(b)
	if err != nil {
		return status{}, p.lost(err)
	}
	return s, nil
}

// lost tells a process that has ended from one that is hidden from us.
func (p *process) lost(err error) error {
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) {
		return errGone
	}
	return fault.Wrap(fault.CallerUnknown, err, "%s", hidden)
}

// groups returns the supplementary groups that the process has now.
func (p *process) groups() ([]uint32, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, errGone
	}
	if !p.now.groupsOK {
		s, err := p.status()
		if err != nil {
			return nil, err
		}
		p.now.groups, p.now.groupsOK = s.groups, true
	}
	return p.now.groups, nil
}

// A cgroup is where a process stands, and whether that says anything.
type cgroup struct {
	lineage
	place   string // path in the service manager's hierarchy
	unit    string // of the system's service manager; "" for none
	problem string // why place is no boundary; "" where it is one
}

// group returns the control group that the process is in now.
func (p *process) group() (*cgroup, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, errGone
	}
	if p.now.cgroup == nil {
		b, err := readAt(p.dir, "cgroup", maxCgroup)
		if err != nil {
			return nil, p.lost(err)
		}
		l, err := parseCgroup(b)
		if err != nil {
			return nil, p.lost(err)
		}
		p.now.cgroup = newCgroup(p.host, l)
	}
	return p.now.cgroup, nil
}

func newCgroup(h *host, l lineage) *cgroup {
	g := &cgroup{lineage: l, place: l.path()}
	switch {
	case g.place == "/":
		g.problem = "the root of all control groups sets nobody apart"
	case strings.Contains(g.place+"/", "/../"):
		g.problem = "it lies outside what the daemon can see"
	case strings.HasSuffix(g.place, deletedSuffix):
		g.problem = "the control group has been removed"
	case delegated(g.place):
		g.problem = "it lies in a subtree that is delegated to a user"
	}
	if g.problem != "" {
		return g
	}
	unit, at := unitOf(g.place)
	if unit != "" && h.rootOwned(l, at) == "" {
		g.unit = unit
	}
	return g
}

// within says whether the process is in the control group at want or below it, and why that is no boundary.
func (g *cgroup) within(h *host, want string) (bool, string) {
	if g.problem != "" {
		return false, g.problem
	}
	if g.place != want && !strings.HasPrefix(g.place, want+"/") {
		return false, "the process is in another control group"
	}
	if why := h.rootOwned(g.lineage, want); why != "" {
		return false, why
	}
	return true, ""
}

// delegated says whether a path lies in or below the service manager of a user, who moves processes about in there
// and chooses the names.
func delegated(p string) bool {
	for c := range strings.SplitSeq(p, "/") {
		if strings.HasPrefix(c, "user@") && strings.HasSuffix(c, ".service") {
			return true
		}
	}
	return false
}

// unitOf returns the unit that the system's service manager put a process in, and the unit's own path: the first
// component that is no slice. What stands below it was named by the unit itself (a container, say).
func unitOf(p string) (unit, at string) {
	rest := strings.TrimPrefix(p, "/")
	for rest != "" {
		c, tail, _ := strings.Cut(rest, "/")
		at += "/" + c
		name := strings.TrimPrefix(c, "_") // the service manager's escape for names that the kernel uses
		if !strings.HasSuffix(name, ".slice") {
			if !unitName(name) {
				return "", ""
			}
			return name, at
		}
		rest = tail
	}
	return "", ""
}

// unitName says whether a name is one of a unit that holds processes.
func unitName(s string) bool {
	dot := strings.LastIndexByte(s, '.')
	if dot <= 0 || len(s) > 255 {
		return false
	}
	switch s[dot+1:] {
	case "service", "scope", "socket", "mount", "swap":
	default:
		return false
	}
	for _, c := range []byte(s) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', strings.IndexByte(`:-_.\@`, c) >= 0:
		default:
			return false
		}
	}
	return true
}

// samePidfd says whether two pidfds are of one process. The second result is false where the kernel (before 6.9)
// gives all pidfds one inode.
func samePidfd(a, b int) (same, known bool) {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(a, &fs); err != nil || fs.Type != unix.PID_FS_MAGIC {
		return false, false
	}
	var x, y unix.Stat_t
	if unix.Fstat(a, &x) != nil || unix.Fstat(b, &y) != nil {
		return false, true
	}
	return x.Dev == y.Dev && x.Ino == y.Ino, true
}

// is says whether a pidfd that came with a message is that of the process.
func (p *process) is(pidfd int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.pidfd < 0 {
		return !p.closed
	}
	same, known := samePidfd(p.pidfd, pidfd)
	return same || !known
}

func (p *process) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	p.closed = true
	for _, fd := range []int{p.pidfd, p.dir} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}
