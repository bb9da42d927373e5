//go:build cgo

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/trustd/trustd/softhsm-test/lab"
)

// The daemon takes 256 connections of one user, so that 1,024 callers are processes of four users.
const (
	crowdCommand = "crowd"
	crowdUsers   = 4
	crowdUID     = 61001 // and the next ones; they need no entry in the user database
)

// crowdUIDs returns the users of a crowd.
func crowdUIDs() []uint32 {
	out := make([]uint32, crowdUsers)
	for i := range out {
		out[i] = crowdUID + uint32(i)
	}
	return out
}

// A member is a process with callers of its own.
type member struct {
	cmd *exec.Cmd
	in  *json.Encoder
	out *json.Decoder
}

// A crowdOrder tells a member what to ask for, how long, and is answered with a crowdReport.
type crowdOrder struct {
	Body      []byte
	Warm, For time.Duration
}

type crowdReport struct {
	Rate  float64
	Took  []time.Duration
	Error string
}

// startCrowd starts the members, with so many callers each.
func startCrowd(ctx context.Context, l *lab.Lab, callers int) (_ []*member, stop func(), err error) {
	if os.Getuid() != 0 {
		return nil, nil, errors.New("callers of several users need root")
	}
	self := filepath.Join(l.Dir, "bench") // where other users may execute it
	if err := copyProgram(self); err != nil {
		return nil, nil, err
	}
	var all []*member
	stop = func() {
		for _, m := range all {
			_ = m.cmd.Process.Kill()
			_ = m.cmd.Wait() // it was killed
		}
	}
	for _, uid := range crowdUIDs() {
		cmd := exec.CommandContext(ctx, self, crowdCommand, "-socket", l.AgentSocket, "-callers", fmt.Sprint(callers))
		who := &syscall.Credential{Uid: uid, Gid: uid, Groups: []uint32{}}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: who, Pdeathsig: syscall.SIGKILL}
		cmd.Stderr = os.Stderr
		in, err1 := cmd.StdinPipe()
		out, err2 := cmd.StdoutPipe()
		if err := errors.Join(err1, err2, cmd.Start()); err != nil {
			stop()
			return nil, nil, err
		}
		all = append(all, &member{cmd, json.NewEncoder(in), json.NewDecoder(bufio.NewReader(out))})
	}
	return all, stop, nil
}

func copyProgram(to string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	data, err := os.ReadFile(self)
	if err != nil {
		return err
	}
	return os.WriteFile(to, data, 0o755)
}

// order has all members ask at the same time, and adds their figures up.
func (e *entrant) order(warm, d time.Duration) error {
	for _, m := range e.crowd {
		if err := m.in.Encode(crowdOrder{e.body, warm, d}); err != nil {
			return fmt.Errorf("%s: %w", e.name, err)
		}
	}
	rate := 0.
	for _, m := range e.crowd {
		var r crowdReport
		if err := m.out.Decode(&r); err != nil {
			return fmt.Errorf("%s: %w", e.name, err)
		}
		if r.Error != "" {
			return fmt.Errorf("%s: %s", e.name, r.Error)
		}
		rate += r.Rate
		e.took = append(e.took, r.Took...)
	}
	e.rates = append(e.rates, rate)
	return nil
}

// crowd is a member: orders come on standard input, reports go to standard output.
func crowd(args []string) int {
	flags := flag.NewFlagSet(crowdCommand, flag.ContinueOnError)
	socket := flags.String("socket", "", "of the daemon")
	callers := flags.Int("callers", 1, "each with a connection")
	if flags.Parse(args) != nil {
		return 2
	}
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	t := &traffic{socket: *socket}
	defer t.Close()
	for {
		var o crowdOrder
		if err := in.Decode(&o); errors.Is(err, io.EOF) {
			return 0
		} else if err != nil {
			fmt.Fprintln(os.Stderr, "crowd:", err)
			return 1
		}
		var r crowdReport
		e, err := t.singles("callers", *callers, o.Body)
		if err == nil {
			err = e.window(context.Background(), o.Warm, o.For)
		}
		if err != nil {
			r.Error = err.Error()
		} else {
			r.Rate, r.Took = e.rate(), e.took
		}
		if err := out.Encode(r); err != nil {
			return 1
		}
	}
}
