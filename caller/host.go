package caller

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// A host is what callers are compared with: our own view of processes, users and control groups. It does not
// change while we run.
type host struct {
	proc    int    // O_PATH of /proc, kept for good
	userNS  string // our user namespace, as the kernel's links name it
	uidMap  []byte // of our user namespace, as shown to us
	whole   bool   // every id of the machine has a name here: we are in the machine's own user namespace
	nobody  uint32 // what an id without a name here looks like
	systemd string // where the service manager's own hierarchy is mounted; "" where it is not
	unified string // where cgroup v2 is mounted
}

var theHost = sync.OnceValues(openHost)

func openHost() (*host, error) {
	fd, err := openAt(unix.AT_FDCWD, "/proc", unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	h := &host{proc: fd}
	if err := h.read(); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("looking at our own process: %w", err)
	}
	return h, nil
}

func (h *host) read() error {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(h.proc, &fs); err != nil {
		return err
	}
	if fs.Type != unix.PROC_SUPER_MAGIC {
		return errors.New("/proc is not the kernel's")
	}
	// A /proc of another pid namespace would show other processes under our callers' numbers.
	if self, err := readlinkAt(h.proc, "self"); err != nil || self != strconv.Itoa(os.Getpid()) {
		return errors.New("/proc belongs to another pid namespace")
	}
	var err error
	if h.userNS, err = readlinkAt(h.proc, "self/ns/user"); err != nil {
		return err
	}
	if h.uidMap, err = readAt(h.proc, "self/uid_map", maxCgroup); err != nil {
		return err
	}
	h.whole = string(bytes.Join(bytes.Fields(h.uidMap), []byte{' '})) == "0 0 4294967295"
	over, err := readAt(h.proc, "sys/kernel/overflowuid", maxStat)
	if err != nil {
		return err
	}
	n, ok := number(bytes.TrimSpace(over), 1<<32-1)
	if !ok {
		return errForm
	}
	h.nobody = uint32(n)
	mounts, err := readAt(h.proc, "self/mountinfo", maxMounts)
	if err != nil {
		return err
	}
	h.findCgroups(string(mounts))
	return nil
}

func (h *host) findCgroups(mountinfo string) {
	for line := range strings.Lines(mountinfo) {
		m, ok := parseMount(line)
		switch {
		case !ok || m.root != "/":
		case m.kind == "cgroup2" && h.unified == "":
			h.unified = m.point
		case m.kind == "cgroup" && h.systemd == "" && hasOption(m.options, "name=systemd"):
			h.systemd = m.point
		}
	}
}

func hasOption(options, want string) bool {
	for o := range strings.SplitSeq(options, ",") {
		if o == want {
			return true
		}
	}
	return false
}

// rootOwned says why the name of the control group at p cannot be believed; "" where it can: each group above it
// belongs to root alone, so that nobody else chose the name or decides who goes in.
func (h *host) rootOwned(l lineage, p string) string {
	mounted := h.unified
	if l.systemd != "" {
		mounted = h.systemd
	}
	if mounted == "" {
		return "the control groups are not mounted where the daemon runs"
	}
	if !h.whole {
		return "the daemon runs in a user namespace of its own"
	}
	for dir := path.Dir(p); ; dir = path.Dir(dir) {
		f, err := statAt(unix.AT_FDCWD, path.Join(mounted, dir), unix.AT_SYMLINK_NOFOLLOW)
		if err != nil {
			return "the control group above it cannot be looked at"
		}
		if f.uid != 0 || f.mode&0o022 != 0 || f.mode&unix.S_IFMT != unix.S_IFDIR {
			return "it lies in a subtree that is delegated to a user"
		}
		if dir == "/" {
			return ""
		}
	}
}
