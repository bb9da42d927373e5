package plugins

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-plugin/runner"
	"golang.org/x/sys/unix"
)

// A process is the child process, as go-plugin runs it. Beside what go-plugin's own does, it keeps the first line of
// the handshake, from which alone one learns the version of a plugin that does not fit; writes all else that comes
// out to the log once; is limited; and takes what the child has started along when it ends.
type process struct {
	cmd    *exec.Cmd // not started
	log    *output
	limits Limits

	hello  *io.PipeReader // the handshake, for go-plugin
	dead   chan struct{}  // closed when the process has ended
	exited chan struct{}  // closed when all that it wrote is read as well

	mu     sync.Mutex
	line   string // of the handshake
	killed bool   // by the host
	err    error  // of Wait; set before exited is closed
}

var _ runner.Runner = (*process)(nil)

const (
	maxLine = 8 << 10
	dying   = 20 * time.Millisecond
)

func newProcess(cmd *exec.Cmd, log *output, limits Limits) *process {
	return &process{cmd: cmd, log: log, limits: limits, dead: make(chan struct{}), exited: make(chan struct{})}
}

// Start implements runner.Runner.
func (p *process) Start(context.Context) error {
	stdout, theirOut, err := os.Pipe()
	if err != nil {
		return err
	}
	defer theirOut.Close()
	stderr, theirErr, err := os.Pipe()
	if err != nil {
		stdout.Close()
		return err
	}
	defer theirErr.Close()
	p.cmd.Stdout, p.cmd.Stderr = theirOut, theirErr
	if err := p.cmd.Start(); err != nil {
		stdout.Close()
		stderr.Close()
		return err
	}
	limited := p.limits.impose(p.cmd.Process.Pid)
	var readers sync.WaitGroup
	hello, w := io.Pipe()
	p.hello = hello
	readers.Go(func() { p.readStdout(stdout, w) })
	readers.Go(func() { p.log.read("stderr", bufio.NewReaderSize(stderr, maxLine)) })
	go func() {
		p.reap()
		// What the child started may have left its group and hold the pipes open.
		late := time.Now().Add(time.Second)
		_ = stdout.SetReadDeadline(late)
		_ = stderr.SetReadDeadline(late)
		readers.Wait()
		stdout.Close()
		stderr.Close()
		w.Close()
		close(p.exited)
	}()
	if limited != nil && !errors.Is(limited, unix.ESRCH) { // gone already: the handshake will say so
		p.kill()
		hello.Close() // nobody is going to read it
		return limited
	}
	return nil
}

// readStdout hands the handshake to go-plugin and all that follows to the log.
func (p *process) readStdout(stdout io.Reader, hello io.Writer) {
	r := bufio.NewReaderSize(stdout, maxLine)
	line, err := r.ReadSlice('\n')
	p.mu.Lock()
	p.line = strings.TrimSpace(string(line))
	p.mu.Unlock()
	_, _ = hello.Write(line)
	if err == nil {
		p.log.read("stdout", r)
	}
}

// reap waits for the process. Before its number is free again, it kills what is left of its process group.
func (p *process) reap() {
	pid := p.cmd.Process.Pid
	for {
		if err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	close(p.dead)
	_ = syscall.Kill(-pid, syscall.SIGKILL)
	err := p.cmd.Wait()
	p.mu.Lock()
	p.err = err
	p.mu.Unlock()
}

// kill ends the process at once. One that is about to end by itself gets a moment to do so, so that the reason is known.
func (p *process) kill() {
	if p.cmd.Process != nil {
		select {
		case <-p.dead:
			return
		case <-time.After(dying):
		}
	}
	p.mu.Lock()
	p.killed = true
	p.mu.Unlock()
	if p.cmd.Process != nil {
		_ = p.cmd.Process.Kill()
	}
}

// reason says how the process ended; "" while it runs, and where the host killed it.
func (p *process) reason() string {
	select {
	case <-p.exited:
	default:
		return ""
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	status, ok := p.cmd.ProcessState.Sys().(syscall.WaitStatus)
	switch {
	case !ok:
		return ""
	case status.Signaled() && status.Signal() == syscall.SIGKILL:
		if p.killed {
			return ""
		}
		return "it was killed (SIGKILL), by somebody or for want of memory"
	case status.Signaled():
		return "it crashed (" + unix.SignalName(status.Signal()) + ")"
	}
	if crash := p.log.crashed(); crash != "" && status.ExitStatus() == 2 { // how Go ends after a signal or a panic
		return "it crashed (" + crash + ")"
	}
	return fmt.Sprintf("it ended with exit status %d", status.ExitStatus())
}

// handshake returns the line that the process wrote first.
func (p *process) handshake() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.line
}

// Wait implements runner.AttachedRunner.
func (p *process) Wait(context.Context) error {
	<-p.exited
	return p.err
}

// Kill implements runner.AttachedRunner.
func (p *process) Kill(context.Context) error {
	p.kill()
	return nil
}

// ID implements runner.AttachedRunner.
func (p *process) ID() string {
	if p.cmd.Process == nil {
		return ""
	}
	return strconv.Itoa(p.cmd.Process.Pid)
}

// Name implements runner.Runner.
func (p *process) Name() string { return p.cmd.Args[0] }

// Stdout implements runner.Runner.
func (p *process) Stdout() io.ReadCloser { return p.hello }

// Stderr implements runner.Runner: what comes there goes to the log on another way.
func (p *process) Stderr() io.ReadCloser { return io.NopCloser(strings.NewReader("")) }

// Diagnose implements runner.Runner.
func (p *process) Diagnose(context.Context) string { return "" }

// PluginToHost implements runner.AddrTranslator.
func (p *process) PluginToHost(network, address string) (string, string, error) {
	return network, address, nil
}

// HostToPlugin implements runner.AddrTranslator.
func (p *process) HostToPlugin(network, address string) (string, string, error) {
	return network, address, nil
}
