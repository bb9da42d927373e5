package caller

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"

	"golang.org/x/sync/singleflight"
	"golang.org/x/sys/unix"

	"github.com/trustd/trustd/fault"
)

// deletedSuffix is what the kernel adds to the path of a file that no longer has that name.
const deletedSuffix = " (deleted)"

// A program is the file that a process runs, as its own mount namespace shows it.
type program struct {
	file
	path    string
	problem string // why neither path nor content can be believed; "" where they may be
}

// program returns what the process runs now.
func (p *process) program() (*program, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, errGone
	}
	if p.now.program == nil {
		g, err := p.lookProgram()
		if err != nil {
			return nil, err
		}
		p.now.program = g
	}
	return p.now.program, nil
}

func (p *process) lookProgram() (*program, error) {
	if !p.exeKnown {
		return nil, fault.New(fault.CallerUnknown, "the daemon may not look at the program of the process")
	}
	path, err := readlinkAt(p.dir, "exe")
	if err != nil {
		return nil, p.lost(err)
	}
	f, err := statAt(p.dir, "exe", 0)
	if err != nil {
		return nil, p.lost(err)
	}
	if f.fileID != p.exe {
		return nil, errExec
	}
	if p.exeKind == "" {
		p.exeKind = p.mountKind(f.mount)
	}
	return &program{file: f, path: path, problem: disbelief(f, path, p.exeKind)}, nil
}

// disbelief says why a program can be compared with nothing; "" where it can. kind is the type of its file system:
// what a user's own process serves (FUSE) may have another content each time it is read.
func disbelief(f file, path, kind string) string {
	switch {
	case f.links == 0 || strings.HasSuffix(path, deletedSuffix):
		return "the file of the program has been deleted"
	case f.mode&unix.S_IFMT != unix.S_IFREG:
		return "the program is no regular file"
	case !strings.HasPrefix(path, "/"):
		return "the program has no path"
	case kind == "":
		return "the file system of the program is not known"
	case strings.HasPrefix(kind, "fuse"):
		return "the file system of the program is served by a process"
	}
	return ""
}

// mountKind returns the type of the file system behind a mount that the process sees.
func (p *process) mountKind(id uint64) string {
	b, err := readAt(p.dir, "mountinfo", maxMounts)
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		if m, ok := parseMount(line); ok && m.id == id {
			return m.kind
		}
	}
	return ""
}

// hosts says why the host's file at the program's path is another than the one that runs; "" where they are one.
// A mount namespace can show any file at any path.
func (g *program) hosts() string {
	f, err := statAt(unix.AT_FDCWD, g.path, 0)
	if err != nil {
		return "the host has no file at that path"
	}
	if f.fileID != g.fileID {
		return "the host has another file at that path"
	}
	return ""
}

// A version names the content of a file: any write changes one of its members, except within the grain of the
// file system's clock, for which see hashFile.
type version struct {
	fileID
	size         uint64
	mtime, ctime int64 // nanoseconds
}

func (f file) version() version {
	return version{f.fileID, f.size, nanos(f.mtime), nanos(f.ctime)}
}

func nanos(t unix.StatxTimestamp) int64 { return t.Sec*1e9 + int64(t.Nsec) }

// The sums of programs, shared by all connections. Any one goes when there are too many: a sum is cheap to get
// again, and an attacker who fills the table wins nothing.
var sums struct {
	mu    sync.Mutex
	of    map[version]string
	calls singleflight.Group
}

const (
	maxSums    = 256
	maxProgram = 1 << 30
	// clockGrain is longer than the coarsest clock that stamps files here.
	clockGrain = int64(2e9)
)

// sum returns the SHA-256 of the program in lower-case hex.
func (p *process) sum() (string, error) {
	g, err := p.program()
	if err != nil {
		return "", err
	}
	if g.problem != "" {
		return "", fault.New(fault.CallerUnknown, "%s", g.problem)
	}
	v := g.version()
	sums.mu.Lock()
	s, ok := sums.of[v]
	sums.mu.Unlock()
	if ok {
		return s, nil
	}
	got, err, _ := sums.calls.Do(fmt.Sprint(v), func() (any, error) { return p.hashProgram(v) })
	if err != nil {
		return "", fault.Wrap(fault.CallerUnknown, err, "the daemon cannot read the program of the process")
	}
	return got.(string), nil
}

// hashProgram opens the program that runs, whatever its path leads to by now, and reads it without a lock held.
func (p *process) hashProgram(v version) (string, error) {
	p.mu.Lock()
	fd, err := -1, error(errGone)
	if !p.closed {
		fd, err = openAt(p.dir, "exe", unix.O_RDONLY|unix.O_NOCTTY|unix.O_NONBLOCK)
	}
	p.mu.Unlock()
	if err != nil {
		return "", err
	}
	f := os.NewFile(uintptr(fd), "exe")
	defer f.Close()
	return hashFile(f, v)
}

var errRewritten = errors.New("the file changed while it was read")

// hashFile reads the file of that version. A sum is kept only if the file is older than the grain of the clock
// that stamps it: a write within one tick of the last would leave no trace in the version.
func hashFile(f *os.File, v version) (string, error) {
	if v.size > maxProgram {
		return "", unix.EFBIG
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, io.LimitReader(f, maxProgram+1)); err != nil {
		return "", err
	}
	after, err := statAt(int(f.Fd()), "", unix.AT_EMPTY_PATH)
	if err != nil {
		return "", err
	}
	if after.version() != v {
		return "", errRewritten
	}
	s := hex.EncodeToString(sum.Sum(nil))
	var now unix.Timespec // the kernel's own clock, which stamps files
	if err := unix.ClockGettime(unix.CLOCK_REALTIME, &now); err == nil && now.Nano()-max(v.mtime, v.ctime) > clockGrain {
		keepSum(v, s)
	}
	return s, nil
}

func keepSum(v version, s string) {
	sums.mu.Lock()
	defer sums.mu.Unlock()
	if sums.of == nil {
		sums.of = make(map[version]string)
	}
	for old := range sums.of {
		if len(sums.of) < maxSums {
			break
		}
		delete(sums.of, old)
	}
	sums.of[v] = s
}
