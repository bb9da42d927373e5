package caller

import (
	"bytes"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// Limits on what is read of a process: a status holds up to 65,536 groups, a cgroup file one path a hierarchy.
const (
	maxStatus = 1 << 20
	maxCgroup = 64 << 10
	maxStat   = 8 << 10
	maxMounts = 4 << 20
)

var errForm = errors.New("the kernel's file has another form than expected")

// A status is the part of /proc/PID/status that says who the process is.
type status struct {
	tgid     int32
	uid, gid [4]uint32 // real, effective, saved, file system
	groups   []uint32
}

// parseStatus reads /proc/PID/status. The kernel escapes line breaks in the process's name, which the process
// chooses; a field that is there twice is refused all the same.
func parseStatus(b []byte) (status, error) {
	var s status
	var tgid, uid, gid, groups int
	for line := range bytes.Lines(b) {
		key, rest, ok := bytes.Cut(line, []byte{':'})
		if !ok {
			return status{}, errForm
		}
		var err error
		switch string(key) {
		case "Tgid":
			var n [1]uint32
			err = fillNumbers(rest, n[:])
			s.tgid, tgid = int32(n[0]), tgid+1
			if s.tgid <= 0 {
				err = errForm
			}
		case "Uid":
			err, uid = fillNumbers(rest, s.uid[:]), uid+1
		case "Gid":
			err, gid = fillNumbers(rest, s.gid[:]), gid+1
		case "Groups":
			s.groups, err = appendNumbers(nil, rest)
			groups++
		}
		if err != nil {
			return status{}, err
		}
	}
	if tgid != 1 || uid != 1 || gid != 1 || groups != 1 {
		return status{}, errForm
	}
	return s, nil
}

// fillNumbers reads exactly len(out) numbers.
func fillNumbers(b []byte, out []uint32) error {
	got, err := appendNumbers(out[:0], b)
	if err != nil {
		return err
	}
	if len(got) != len(out) {
		return errForm
	}
	return nil
}

// appendNumbers reads decimal numbers separated by white space; more than cap(out), where that is not 0, is an error
// of the caller of fillNumbers, which sees the length.
func appendNumbers(out []uint32, b []byte) ([]uint32, error) {
	for f := range bytes.FieldsSeq(b) {
		n, ok := number(f, 1<<32-1)
		if !ok {
			return nil, errForm
		}
		out = append(out, uint32(n))
	}
	return out, nil
}

// number reads a decimal number of at most limit.
func number(b []byte, limit uint64) (uint64, bool) {
	if len(b) == 0 || len(b) > 20 {
		return 0, false
	}
	var n uint64
	for _, c := range b {
		d := uint64(c - '0')
		if d > 9 || n > (limit-d)/10 {
			return 0, false
		}
		n = n*10 + d
	}
	return n, true
}

// A lineage is where a process stands in the two hierarchies that systemd may manage.
type lineage struct {
	systemd, unified string // "" where there is none
}

// path returns the place in the hierarchy that the service manager uses: its own where there is one.
func (l lineage) path() string {
	if l.systemd != "" {
		return l.systemd
	}
	return l.unified
}

// parseCgroup reads /proc/PID/cgroup: lines of ID:controllers:path, where only the path may hold a colon.
func parseCgroup(b []byte) (lineage, error) {
	var l lineage
	for line := range bytes.Lines(b) {
		line, ended := bytes.CutSuffix(line, []byte{'\n'})
		id, rest, ok := bytes.Cut(line, []byte{':'})
		controllers, path, ok2 := bytes.Cut(rest, []byte{':'})
		if !ended || !ok || !ok2 || len(path) == 0 || path[0] != '/' {
			return lineage{}, errForm
		}
		if _, ok := number(id, 1<<31-1); !ok {
			return lineage{}, errForm
		}
		into := &l.unified
		switch {
		case string(id) == "0" && len(controllers) == 0:
		case string(controllers) == "name=systemd":
			into = &l.systemd
		default:
			continue
		}
		if *into != "" {
			return lineage{}, errForm
		}
		*into = string(path)
	}
	if l == (lineage{}) {
		return lineage{}, errForm
	}
	return l, nil
}

// parseState reads the state of a process from /proc/PID/stat. The name in its second field is the process's own
// choice and may hold anything, parentheses too, so the state is what follows the last one.
func parseState(b []byte) (byte, error) {
	i := bytes.LastIndexByte(b, ')')
	if i < 0 || len(b) < i+4 || b[i+1] != ' ' || b[i+2] < 'A' || b[i+2] > 'z' || b[i+3] != ' ' {
		return 0, errForm
	}
	return b[i+2], nil
}

// A mount is one line of /proc/PID/mountinfo.
type mount struct {
	id          uint64
	root, point string
	kind        string // file system type, with any subtype
	options     string // of the super block
}

// parseMount reads one line of mountinfo.
func parseMount(line string) (mount, bool) {
	left, right, ok := strings.Cut(line, " - ")
	l, r := strings.Fields(left), strings.Fields(right)
	if !ok || len(l) < 6 || len(r) < 2 {
		return mount{}, false
	}
	id, ok := number([]byte(l[0]), 1<<63-1)
	if !ok {
		return mount{}, false
	}
	m := mount{id: id, root: unescape(l[3]), point: unescape(l[4]), kind: r[0]}
	if len(r) > 2 {
		m.options = r[2]
	}
	return m, true
}

// unescape undoes the kernel's octal escapes of white space and backslashes in mountinfo.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var out strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] != '\\' || i+3 >= len(s) || !octal(s[i+1]) || s[i+1] > '3' || !octal(s[i+2]) || !octal(s[i+3]) {
			out.WriteByte(s[i])
			continue
		}
		out.WriteByte((s[i+1]-'0')<<6 | (s[i+2]-'0')<<3 | (s[i+3] - '0'))
		i += 3
	}
	return out.String()
}

func octal(c byte) bool { return c >= '0' && c <= '7' }

// readAt reads the whole of a small kernel file below dir.
func readAt(dir int, name string, limit int) ([]byte, error) {
	fd, err := openAt(dir, name, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	buf := make([]byte, 0, 2048)
	for {
		if len(buf) == cap(buf) {
			buf = append(buf, 0)[:len(buf)]
		}
		n, err := unix.Read(fd, buf[len(buf):cap(buf)])
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return nil, fmt.Errorf("reading %s: %w", name, err)
		case n == 0:
			return buf, nil
		}
		if buf = buf[:len(buf)+n]; len(buf) > limit {
			return nil, fmt.Errorf("reading %s: %w", name, unix.EFBIG)
		}
	}
}

func openAt(dir int, name string, flags int) (int, error) {
	for {
		fd, err := unix.Openat(dir, name, flags|unix.O_CLOEXEC, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return -1, fmt.Errorf("opening %s: %w", name, err)
		}
		return fd, nil
	}
}

func readlinkAt(dir int, name string) (string, error) {
	var few [256]byte
	buf := few[:]
	for {
		n, err := unix.Readlinkat(dir, name, buf)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return "", fmt.Errorf("reading the link %s: %w", name, err)
		case n < len(buf):
			return string(buf[:n]), nil
		case len(buf) > unix.PathMax:
			return "", fmt.Errorf("reading the link %s: %w", name, unix.ENAMETOOLONG)
		default:
			buf = make([]byte, 2*unix.PathMax)
		}
	}
}

// A fileID names a file for as long as somebody holds it.
type fileID struct {
	dev uint64
	ino uint64
}

// A file is what stat says of one.
type file struct {
	fileID
	mode         uint16
	links        uint32
	uid          uint32
	size         uint64
	mtime, ctime unix.StatxTimestamp
	mount        uint64
}

// statAt asks the kernel about a file without asking a file server behind it, which may be the caller's own.
func statAt(dir int, name string, flags int) (file, error) {
	var x unix.Statx_t
	const want = unix.STATX_BASIC_STATS | unix.STATX_MNT_ID
	for {
		err := unix.Statx(dir, name, flags|unix.AT_STATX_DONT_SYNC|unix.AT_NO_AUTOMOUNT, want, &x)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return file{}, fmt.Errorf("asking about %s: %w", name, err)
		}
		return file{
			fileID: fileID{uint64(x.Dev_major)<<32 | uint64(x.Dev_minor), x.Ino},
			mode:   x.Mode, links: x.Nlink, uid: x.Uid, size: x.Size, mtime: x.Mtime, ctime: x.Ctime, mount: x.Mnt_id,
		}, nil
	}
}
