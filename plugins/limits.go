package plugins

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Limits bound what a plugin process may use. A zero is the default.
//
// There is no bound on the number of processes: the kernel counts those of the user, not of the plugin. Threads are
// counted instead, by the host.
type Limits struct {
	// Memory is what the process may hold in bytes, resident or swapped out (1 GiB). The host kills a process that has
	// more; what grows faster than the host looks meets a limit of the kernel at twice that and 256 MiB.
	Memory int64
	// OpenFiles is the number of file descriptors (256).
	OpenFiles uint64
}

const (
	defaultMemory    = 1 << 30
	defaultOpenFiles = 256
	memorySlack      = 256 << 20
	maxThreads       = 1000
	weighEvery       = 50 * time.Millisecond
)

func (l Limits) orDefault() Limits {
	if l.Memory <= 0 {
		l.Memory = defaultMemory
	}
	if l.OpenFiles == 0 {
		l.OpenFiles = defaultOpenFiles
	}
	return l
}

// impose sets the kernel's limits on a process. The run time of a Go program raises the limit on files to what it was
// when it started, so that this is done once more after the handshake.
func (l Limits) impose(pid int) error {
	data := 2*uint64(l.Memory) + memorySlack
	for _, r := range []struct {
		what     string
		resource int
		limit    uint64
	}{
		{"core dumps", unix.RLIMIT_CORE, 0},
		{"open files", unix.RLIMIT_NOFILE, l.OpenFiles},
		// Not the address space, of which Go and C libraries reserve far more than they use.
		{"data", unix.RLIMIT_DATA, data},
	} {
		if err := unix.Prlimit(pid, r.resource, &unix.Rlimit{Cur: r.limit, Max: r.limit}, nil); err != nil {
			return fmt.Errorf("limiting the plugin's %s: %w", r.what, err)
		}
	}
	return nil
}

// exceeded returns why a process is too large; nil where it is not, or is gone.
func (l Limits) exceeded(pid int) error {
	f, err := os.Open("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return nil
	}
	defer f.Close()
	var memory, threads int64
	for lines := bufio.NewScanner(f); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), ":")
		number, _, _ := strings.Cut(strings.TrimSpace(value), " ")
		n, _ := strconv.ParseInt(number, 10, 64)
		switch name {
		case "VmRSS", "VmSwap":
			memory += n << 10
		case "Threads":
			threads = n
		}
	}
	switch {
	case memory > l.Memory:
		return &excess{fmt.Sprintf("it held more than %d MiB of memory", l.Memory>>20)}
	case threads > maxThreads:
		return &excess{fmt.Sprintf("it had more than %d threads", maxThreads)}
	}
	return nil
}

// An excess is the reason for which the host kills a process that uses too much.
type excess struct{ text string }

func (e *excess) Error() string { return e.text }
