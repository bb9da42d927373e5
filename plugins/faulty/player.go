package main

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/trustd/trustd/signer"
)

// A player applies the script in a file to calls. The file is read anew when it has changed, which each call looks at:
// a call that begins after the file was put in place meets the new script. It is safe for concurrent use.
type player struct {
	path  string // "" for no script
	notes string // "" for none
	log   *slog.Logger
	turn  chan struct{} // holds one token: whoever has it uses the device of a rate

	mu    sync.Mutex
	now   *script
	stamp stamp
	noted int
}

// A stamp tells one content of a file from the next.
type stamp struct {
	inode   uint64
	size    int64
	changed time.Time
}

func newPlayer(path, notes string, log *slog.Logger) *player {
	p := &player{path: path, notes: notes, log: log, turn: make(chan struct{}, 1), now: &script{}}
	p.turn <- struct{}{}
	return p
}

// script returns the script in force. One that cannot be read leaves the one before in force, and is said.
func (p *player) script() *script {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.path == "" {
		return p.now
	}
	var now stamp
	info, err := os.Stat(p.path)
	if err == nil {
		now = stamp{info.Sys().(*syscall.Stat_t).Ino, info.Size(), info.ModTime()}
	}
	if now == p.stamp {
		return p.now
	}
	p.stamp = now
	if err != nil { // taken away: nothing goes wrong any more
		p.now = &script{}
		return p.now
	}
	text, err := os.ReadFile(p.path)
	var s *script
	if err == nil {
		s, err = parseScript(text)
	}
	if err != nil {
		p.log.Error("the script is not taken", "err", err)
		return p.now
	}
	p.log.Info("a new script", "rules", len(s.rules), "token", s.token)
	p.now = s
	return s
}

// A fate is what a call still has to do after the script had its say.
type fate struct {
	code    uint32       // CKR_* or TPM_RC_* to return; 0: none
	class   signer.Class // of the error to return; "": none
	drop    bool
	corrupt bool
	token   string // gone, empty, other or ""
	err     error  // the caller's context ended first
	done    func() // ends the call
}

// Whether a wait for a new script has come to its end is looked at so often.
const lookAgain = 10 * time.Millisecond

// begin does to a call what the script says, and returns what is left to do. A device does not know its callers'
// contexts: ctx bounds only the wait for a turn.
func (p *player) begin(ctx context.Context, call string) fate {
	s := p.script()
	f := fate{token: s.token, done: func() {}}
	for _, a := range s.next(call) {
		switch a.do {
		case "delay":
			time.Sleep(a.delay.Draw())
		case "rate":
			if f.err = p.take(ctx, a.gap, &f); f.err != nil {
				return f
			}
		case "note":
			p.note(call)
		case "drop":
			f.drop = true
		case "corrupt":
			f.corrupt = true
		case "return":
			f.code, f.class = a.code, a.class
			return f
		case "hang":
			p.hang(s)
		case "freeze":
			_ = syscall.Kill(os.Getpid(), syscall.SIGSTOP)
		case "exit":
			os.Exit(a.status)
		case "crash":
			crash()
		}
	}
	return f
}

// take waits for the device and has the call last for gap in all.
func (p *player) take(ctx context.Context, gap time.Duration, f *fate) error {
	select {
	case <-p.turn:
	case <-ctx.Done():
		return ctx.Err()
	}
	end := time.Now().Add(gap)
	before := f.done
	f.done = func() {
		time.Sleep(time.Until(end))
		p.turn <- struct{}{}
		before()
	}
	return nil
}

// hang returns when the script is another one.
func (p *player) hang(s *script) {
	tick := time.NewTicker(lookAgain)
	defer tick.Stop()
	for p.script() == s {
		<-tick.C
	}
}

// noteSize is the length of a line of notes, so that the file's size says how many there are.
const noteSize = 64

// note appends a line: the process, the number of the note in it, and the call.
func (p *player) note(call string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.noted++
	line := append(fmt.Appendf(nil, "%d %d %s", os.Getpid(), p.noted, call), bytes.Repeat([]byte{' '}, noteSize)...)
	line[noteSize-1] = '\n'
	if p.notes == "" {
		return
	}
	f, err := os.OpenFile(p.notes, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err == nil {
		_, _ = f.Write(line[:noteSize])
		err = f.Close()
	}
	if err != nil {
		p.log.Error("a note is lost", "err", err)
	}
}

// crash ends the process as a fault in a module does.
func crash() {
	_ = syscall.Kill(os.Getpid(), syscall.SIGSEGV)
	select {}
}
