//go:build cgo

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	softhsmtest "github.com/trustd/trustd/softhsm-test"
	"github.com/trustd/trustd/softhsm-test/lab"
	"github.com/trustd/trustd/softhsm-test/tpmproxy"
)

// A chip is a swtpm that a proxy stands before.
type chip struct {
	dir   string
	tpm   *softhsmtest.Process
	proxy *tpmproxy.Proxy
}

func startChip() (_ *chip, err error) {
	dir, err := os.MkdirTemp("", "trustd-chip-")
	if err != nil {
		return nil, err
	}
	c := &chip{dir: dir}
	defer func() {
		if err != nil {
			c.stop()
		}
	}()
	if c.tpm, err = softhsmtest.StartTPM(dir); err != nil {
		return nil, err
	}
	c.proxy, err = tpmproxy.Listen(filepath.Join(dir, "proxy.sock"), c.tpm.Path())
	return c, err
}

func (c *chip) stop() {
	if c.proxy != nil {
		c.proxy.Close()
	}
	if c.tpm != nil {
		c.tpm.Stop()
	}
	os.RemoveAll(c.dir)
}

// backend returns the chip's part of a configuration.
func (c *chip) backend(name string) string {
	return fmt.Sprintf("\n[[backend]]\nname = %q\nkind = \"tpm\"\ndevice = %q\n", name, c.proxy.Device())
}

// slow measures the daemon with TPMs whose every signature takes 200 and 20 ms.
func (b *bench) slow() error {
	speeds := []int{5, 50}
	extra, chips := "", map[int]*chip{}
	for _, n := range speeds {
		c, err := startChip()
		if err != nil {
			return err
		}
		defer c.stop()
		chips[n] = c
		extra += c.backend(fmt.Sprintf("slow-%d", n))
	}
	l, err := b.boot(lab.Options{NoTPM: true, Extra: extra})
	if err != nil {
		return err
	}
	defer l.Close()
	for _, n := range speeds {
		name := fmt.Sprintf("slow-%d", n)
		draft, err := enrol(b, l, name, name, "ecdsa-p256")
		if err != nil {
			return err
		}
		each := time.Second / time.Duration(n)
		chips[n].proxy.Script(tpmproxy.Rule{Command: tpmproxy.Sign, Do: tpmproxy.Delay(tpmproxy.Constant(each))})
		if b.wants("throttled/socket/") {
			if err := b.slowRates(l, name, n, draft); err != nil {
				return err
			}
		}
		if b.wants("fairness/") {
			if err := b.fairness(l, name, n, draft); err != nil {
				return err
			}
		}
	}
	return nil
}

// slowRates measures what a slow TPM gives in batches through the socket.
func (b *bench) slowRates(l *lab.Lab, name string, perSecond int, draft []byte) error {
	each := time.Second / time.Duration(perSecond)
	direct, err := signing(name, draft, false)
	if err != nil {
		return err
	}
	may, err := signing(name, draft, true)
	if err != nil {
		return err
	}
	// Enough requests under way for 20,000 a second where each waits for a turn and then has its own. Requests at work
	// are counted by the limits, 64 to one, and so stay below the default.
	conns, window, span, enough := 36, streamWindow, 6*time.Second, 20000.
	if perSecond > 5 {
		conns, span, enough = 6, 2*time.Second, 0
	}
	t := &traffic{socket: l.AgentSocket}
	defer t.Close()
	alone, err := t.singles("alone", 1, direct)
	if err != nil {
		return err
	}
	full, err := t.streams("streams", conns, window, may)
	if err != nil {
		return err
	}
	if err := turns(b.ctx, 2, 6*each, span/2, alone, full); err != nil {
		return err
	}
	since := len(b.rows)
	b.slowRows(fmt.Sprintf("throttled/socket/%d-a-second", perSecond), each, alone, full, enough)
	b.note(since, fmt.Sprintf("a swtpm behind a delay of %v for each TPM2_Sign; %d streams with %d requests under way each",
		each, conns, window))
	return nil
}

// fairness measures what one client waits for, alone and beside another process that asks as fast as it can.
func (b *bench) fairness(l *lab.Lab, name string, perSecond int, draft []byte) error {
	each := time.Second / time.Duration(perSecond)
	rounds, samples := 4, 20
	if perSecond > 5 {
		samples = 50
	}
	t := &traffic{socket: l.AgentSocket}
	defer t.Close()
	for _, batchable := range []bool{false, true} {
		mode := map[bool]string{false: "direct", true: "batchable"}[batchable]
		if !b.wants(fmt.Sprintf("fairness/%d-a-second/%s", perSecond, mode)) {
			continue
		}
		body, err := signing(name, draft, batchable)
		if err != nil {
			return err
		}
		victim, err := t.wire(0)
		if err != nil {
			return err
		}
		request := prepare("/v1/packets/sign", body)
		alone, beside := &entrant{name: "alone"}, &entrant{name: "beside"}
		ask := func(e *entrant) error {
			for range samples {
				start := time.Now()
				if err := victim.call(request, 1); err != nil {
					return fmt.Errorf("%s: %w", e.name, err)
				}
				e.took = append(e.took, time.Since(start))
			}
			return nil
		}
		for range rounds {
			if err := ask(alone); err != nil {
				return err
			}
			stop, err := startFlood(b.ctx, l.AgentSocket, body)
			if err != nil {
				return err
			}
			err = ask(beside)
			if err := errors.Join(err, stop()); err != nil {
				return err
			}
			// What the flood left behind is done before the victim is alone again.
			if err := quiet(b.ctx, victim, request, 3*each/2); err != nil {
				return err
			}
		}
		since := len(b.rows)
		at := fmt.Sprintf("fairness/%d-a-second/%s", perSecond, mode)
		for _, q := range []struct {
			name string
			q    float64
		}{{"p50", 0.5}, {"p99", 0.99}} {
			got, base := beside.quantile(q.q), alone.quantile(q.q)
			target, ok := "", (*bool)(nil)
			if q.name == "p99" {
				target, ok = "<= 2.5 x alone", met(got <= 2.5*base)
			}
			b.add(at+"/"+q.name, got, "us", "the same client alone", base, target, ok)
		}
		b.note(since, fmt.Sprintf("%d signatures each; beside a process with %d callers, %d streams and lists of %d on the same "+
			"key", rounds*samples, floodCallers, floodStreams, floodList))
	}
	return nil
}

// quiet asks until an answer takes no longer than what one takes that nobody stands before.
func quiet(ctx context.Context, w *wired, request []byte, most time.Duration) error {
	for range 100 {
		start := time.Now()
		if err := w.call(request, 1); err != nil {
			return err
		}
		if time.Since(start) <= most {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	return errors.New("the device does not come to rest")
}

// A flood is a process of its own, because callers are told apart by process.
const (
	floodCommand = "flood"
	floodCallers = 64
	floodStreams = 2
	floodList    = 256
)

// startFlood starts a process that asks for signatures as fast as it can. It returns once the first were made.
func startFlood(ctx context.Context, socket string, body []byte) (stop func() error, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, self, floodCommand, "-socket", socket)
	cmd.Stdin = strings.NewReader(string(body))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	stop = func() error {
		_ = cmd.Process.Kill()
		var killed *exec.ExitError
		if err := cmd.Wait(); !errors.As(err, &killed) || killed.ExitCode() > 0 {
			return fmt.Errorf("the flood ended by itself: %w", err)
		}
		return nil
	}
	if _, err := io.ReadFull(out, make([]byte, 1)); err != nil {
		return nil, errors.Join(errors.New("the flood does not begin"), stop())
	}
	return stop, nil
}

// flood is the other process: its request is read from standard input, and a byte goes out with the first answer.
func flood(args []string) int {
	flags := flag.NewFlagSet(floodCommand, flag.ContinueOnError)
	socket := flags.String("socket", "", "of the daemon")
	if flags.Parse(args) != nil {
		return 2
	}
	if err := floodFrom(*socket, os.Stdin); err != nil {
		fmt.Fprintln(os.Stderr, "flood:", err)
		return 1
	}
	return 0
}

func floodFrom(socket string, in io.Reader) error {
	body, err := io.ReadAll(in)
	if err != nil {
		return err
	}
	one, err := (&traffic{socket: socket}).singles("singles", floodCallers, body)
	if err != nil {
		return err
	}
	many, err := (&traffic{socket: socket}).streams("streams", floodStreams, streamWindow, body)
	if err != nil {
		return err
	}
	list, err := (&traffic{socket: socket}).batches("list", 1, floodList, body)
	if err != nil {
		return err
	}
	var on atomic.Bool
	var begun sync.Once
	failed := make(chan error)
	for _, w := range append(append(one.workers, many.workers...), list.workers...) {
		go func() {
			r := &recorder{on: &on}
			for {
				if err := w.step(r); err != nil {
					failed <- err
					return
				}
				begun.Do(func() { fmt.Print(".") })
			}
		}()
	}
	return <-failed
}
