// Command clumsy is a plugin for tests: software keys whose owner does one thing wrong, named by the setting "do", or
// by the message to sign.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/plugins"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/soft"
)

func main() { os.Exit(plugins.Serve(open)) }

func open(s plugins.Settings) signer.Backend {
	inner, err := soft.Open(soft.Config{Dir: s.Values["dir"]})
	if err != nil {
		fmt.Fprintln(os.Stderr, "clumsy:", err)
		os.Exit(5)
	}
	b := &backend{Backend: inner, Settings: s}
	note(s, "opened %s", s.Values["serial"])
	switch s.Values["do"] {
	case "talk":
		b.talk()
	case "flood":
		for range 5000 {
			_, _ = syscall.Write(2, []byte("again and again\n"))
		}
	case "last try":
		return &patient{b}
	case "parallel":
		return &counting{b}
	}
	return b
}

// note appends a line to the file that the setting "notes" names.
func note(s plugins.Settings, format string, args ...any) {
	f, err := os.OpenFile(s.Values["notes"], os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err == nil {
		fmt.Fprintf(f, format+"\n", args...)
		f.Close()
	}
}

type backend struct {
	*soft.Backend
	plugins.Settings
	refused atomic.Bool
	ate     [][]byte
}

// talk writes in each way in which a plugin can.
func (b *backend) talk() {
	b.Log.Warn("by the log", "colour", "green", "time", "mine", "msg", 1, "@level", 2)
	b.Log.Debug("in detail")
	_, _ = syscall.Write(2, []byte("by the module\x1b[2J\n"))
	_, _ = syscall.Write(1, []byte("by the module's printf\n"))
	fmt.Fprintln(os.Stderr, "by the run time")
}

// login shows the PIN to a device that takes "right".
func (b *backend) login() error {
	pin, err := b.PIN(context.Background())
	if err != nil {
		return err
	}
	note(b.Settings, "pin %s", pin)
	switch {
	case b.Values["do"] == "die with the PIN" && string(pin) != "right":
		os.Exit(9)
	case string(pin) != "right":
		b.refused.Store(true)
		return plugins.Fail(signer.AuthorisationRefused, errors.New("wrong"), "the device refused the secret")
	}
	return nil
}

func (b *backend) Describe(ctx context.Context) signer.Description {
	d := b.Backend.Describe(ctx)
	d.Limits["serial"] = b.Values["reports"]
	do := b.Values["do"]
	if do == "log in" || do == "die with the PIN" { // at each probe, refused or not: it is the host that stops it
		_ = b.login()
	}
	if b.refused.Load() {
		d.State, d.Problem, d.Remedy = signer.Locked, "refused", "correct it"
	}
	if _, err := os.Stat(b.Values["crash if"]); err == nil && b.Values["crash if"] != "" {
		_ = syscall.Kill(os.Getpid(), syscall.SIGSEGV)
		select {}
	}
	return d
}

func (b *backend) Generate(ctx context.Context, id signer.ID, alg ident.Algorithm) (signer.Key, error) {
	k, err := b.Backend.Generate(ctx, id, alg)
	return b.wrap(k, err)
}

func (b *backend) Open(ctx context.Context, id signer.ID, pub ident.PublicKey) (signer.Key, error) {
	k, err := b.Backend.Open(ctx, id, pub)
	return b.wrap(k, err)
}

func (b *backend) wrap(k signer.Key, err error) (signer.Key, error) {
	if err != nil {
		return nil, err
	}
	return &key{k, b}, nil
}

type key struct {
	signer.Key
	in *backend
}

func (k *key) Sign(ctx context.Context, msg []byte) ([]byte, error) {
	what, argument, _ := strings.Cut(string(msg[:min(len(msg), 100)]), " ")
	switch what {
	case "busy":
		return nil, plugins.Fail(signer.TransientBusy, errors.New("busy"), "the device is busy")
	case "eat":
		k.in.eat(argument == "fast")
	case "corrupt", "corrupt-once":
		sig, err := k.Key.Sign(ctx, msg)
		if err == nil && (what == "corrupt" || k.in.refused.CompareAndSwap(false, true)) {
			sig[5] ^= 1
		}
		return sig, err
	case "fork": // a process that outlives its parent and holds its standard error
		files := []*os.File{nil, nil, os.NewFile(2, "stderr")}
		proc, err := os.StartProcess("/bin/sleep", []string{"sleep", "600"}, &os.ProcAttr{Files: files})
		if err != nil {
			return nil, fault.Wrap(fault.Internal, err, "no child")
		}
		note(k.in.Settings, "child %d", proc.Pid)
	}
	return k.Key.Sign(ctx, msg)
}

// eat takes memory until somebody stops it: in small bites, or more than there is at once.
func (b *backend) eat(fast bool) {
	size := 8 << 20
	if fast {
		size = 4 << 30
	}
	for {
		bite, err := syscall.Mmap(-1, 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANON)
		if err != nil {
			panic("no more memory: " + err.Error())
		}
		for i := 0; i < len(bite); i += 4096 {
			bite[i] = 1
		}
		b.ate = append(b.ate, bite)
		time.Sleep(5 * time.Millisecond)
	}
}

// A patient backend shows the secret to the device only when an operator says so: one try is left.
type patient struct{ *backend }

func (p *patient) Describe(ctx context.Context) signer.Description {
	p.refused.Store(p.Values["unlocked"] == "")
	return p.backend.Describe(ctx)
}

func (p *patient) Unlock(context.Context) error {
	p.refused.Store(false)
	if err := p.login(); err != nil {
		return err
	}
	p.Values["unlocked"] = "yes"
	return nil
}

// A counting backend says how it fares.
type counting struct{ *backend }

func (*counting) Parallel() int { return 7 }

func (*counting) Failures() map[signer.Class]uint64 {
	return map[signer.Class]uint64{signer.SessionLost: 3, "of a later release": 5}
}
