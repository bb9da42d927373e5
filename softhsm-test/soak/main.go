// Command soak runs a daemon under load on three backends for a long time, a SoftHSM token, the same behind a script and a
// TPM, and has their devices fail at random. It prints how it goes, and at the end a table. It exits 1 where an
// acknowledged signature is lost, a signature is wrong, a backend does not come back, or the daemon has grown.
package main

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/client"
	"github.com/trustd/trustd/softhsm-test/lab"
)

// scriptedBackend is the name of the backend that fails by script.
const scriptedBackend = "faulty"

// The bounds of a recovery: it is asked for again and again until recoveryLimit, and reported as slow beyond
// recoveryTarget.
const (
	recoveryTarget = time.Second
	recoveryLimit  = 60 * time.Second
)

func main() {
	bin := flag.String("bin", "bin", "folder that holds trustd and trustd-pkcs11")
	plugin := flag.String("plugin", "", "plugins/faulty, built with cgo (default: faulty in the folder of -bin)")
	length := flag.Duration("time", 10*time.Minute, "how long devices fail")
	seed := flag.Uint64("seed", uint64(time.Now().UnixNano()), "of the choice of faults")
	flag.Parse()
	if *plugin == "" {
		*plugin = filepath.Join(*bin, "faulty")
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, lab.Options{
		Bin: *bin, Plugin: *plugin, Proxy: true, Deadline: 2 * time.Second,
		Faulty: []lab.Faulty{{Name: scriptedBackend, Wraps: "pkcs11", Deadline: 2 * time.Second}},
	}, *length, *seed)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		os.Exit(1)
	}
}

// A soak is one run.
type soak struct {
	*lab.Lab
	agents map[string]string // by backend

	mu         sync.Mutex
	now        map[string]*lab.Load // by backend
	loads      []*lab.Load          // all that ever ran
	recoveries map[string][]time.Duration
	failures   []string
}

func run(ctx context.Context, o lab.Options, length time.Duration, seed uint64) (err error) {
	fmt.Printf("soak: %v, seed %d\n", length, seed)
	l, err := lab.New(ctx, o)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := l.Close(); err == nil {
			err = cerr
		}
	}()
	if err := l.Start(ctx, lab.Options{}); err != nil {
		return err
	}
	s := &soak{Lab: l, agents: map[string]string{}, now: map[string]*lab.Load{}, recoveries: map[string][]time.Duration{}}
	if err := s.addAgents(ctx); err != nil {
		return err
	}
	pid := l.Daemon().Pid()

	// Each fault once, so that what is made when it is first needed counts as there from the start.
	fmt.Println("soak: warming up, each fault once")
	if err := s.load(ctx, 0); err != nil {
		return err
	}
	s.faults(ctx, func(backend string, all []lab.Fault, _ *rand.Rand) {
		for _, f := range all {
			s.strike(ctx, f, 500*time.Millisecond)
		}
	}, seed)
	before, err := s.settle(ctx)
	if err != nil {
		return err
	}
	fmt.Println("soak: at the start:", before)

	if err := s.load(ctx, 0); err != nil {
		return err
	}
	end := time.Now().Add(length)
	progress, cancel := context.WithDeadline(ctx, end)
	go s.report(progress, length)
	s.faults(ctx, func(backend string, all []lab.Fault, random *rand.Rand) {
		for time.Now().Before(end) && ctx.Err() == nil {
			s.strike(ctx, all[random.IntN(len(all))], time.Duration(random.Int64N(int64(2*time.Second))))
			pause(ctx, time.Duration(random.Int64N(int64(2*time.Second))))
		}
	}, seed+1)
	cancel()
	after, err := s.settle(ctx)
	if err != nil {
		return err
	}
	fmt.Println("soak: at the end:  ", after)
	if now := l.Daemon().Pid(); now != pid {
		s.fail("the daemon was restarted")
	}
	s.kept(ctx)
	// The same must hold for what is on the disk.
	l.Kill()
	if err := l.Start(ctx, lab.Options{}); err != nil {
		return err
	}
	s.kept(ctx)
	return s.table(before, after, length, seed)
}

// addAgents makes an agent on each backend.
func (s *soak) addAgents(ctx context.Context) error {
	admin := client.NewAdmin(s.AdminSocket)
	defer admin.Close()
	uid := uint32(os.Getuid())
	for _, backend := range []string{lab.HSM, scriptedBackend, lab.TPM} {
		agent := "on-" + backend
		r := api.AddAgentRequest{AgentID: agent, Backend: backend, Bindings: []api.Binding{
			{Selector: api.Selector{UID: &uid}, Verbs: []string{"sign"}},
		}}
		if _, err := admin.AddAgent(ctx, r); err != nil {
			return fmt.Errorf("adding %s: %w", agent, err)
		}
		s.agents[backend] = agent
	}
	return nil
}

// load puts load on all backends; a pause makes it light.
func (s *soak) load(ctx context.Context, pause time.Duration) error {
	o := lab.LoadOptions{Pause: max(pause, 5*time.Millisecond), Deadline: 10 * time.Second}
	if pause > 0 {
		o.Ways = []lab.Way{lab.Direct, lab.Batch}
	}
	for backend, agent := range s.agents {
		ld, err := s.StartLoad(ctx, agent, o)
		if err != nil {
			return err
		}
		s.mu.Lock()
		s.now[backend] = ld
		s.loads = append(s.loads, ld)
		s.mu.Unlock()
	}
	return nil
}

// unload ends the load.
func (s *soak) unload() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, ld := range s.now {
		ld.Stop()
	}
	clear(s.now)
}

// faults runs strike for each backend at once, with the faults of that backend.
func (s *soak) faults(ctx context.Context, strike func(string, []lab.Fault, *rand.Rand), seed uint64) {
	all := slices.Concat(lab.ScriptFaults(scriptedBackend), lab.TokenFaults(), lab.TPMFaults())
	var each sync.WaitGroup
	for i, backend := range []string{lab.HSM, scriptedBackend, lab.TPM} {
		mine := slices.DeleteFunc(slices.Clone(all), func(f lab.Fault) bool { return f.Backend != backend })
		each.Go(func() { strike(backend, mine, rand.New(rand.NewPCG(seed, uint64(i)))) })
	}
	each.Wait()
}

// strike makes one fault, heals it after a while and waits until the backend signs again.
func (s *soak) strike(ctx context.Context, f lab.Fault, hold time.Duration) {
	if ctx.Err() != nil {
		return
	}
	if err := f.Begin(ctx, s.Lab); err != nil {
		s.failf("%s: %v", f.Name, err)
		return
	}
	pause(ctx, hold)
	if f.End != nil {
		if err := f.End(ctx, s.Lab); err != nil {
			s.failf("after %s: %v", f.Name, err)
			return
		}
	}
	took, err := s.recover(ctx, s.agents[f.Backend])
	if err != nil {
		s.failf("after %s: no service within %v: %v", f.Name, recoveryLimit, err)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.recoveries[f.Name] = append(s.recoveries[f.Name], took)
}

// recover asks for a signature until there is one, and returns how long that took.
func (s *soak) recover(ctx context.Context, agent string) (time.Duration, error) {
	c := client.New(s.AgentSocket)
	defer c.Close()
	begun := time.Now()
	for {
		one, cancel := context.WithTimeout(ctx, 10*time.Second)
		_, err := c.SignMessage(one, api.SignMessageRequest{Agent: agent, Payload: []byte(`"back"`)})
		cancel()
		took := time.Since(begun)
		if err == nil || took > recoveryLimit || ctx.Err() != nil {
			return took, err
		}
		pause(ctx, 10*time.Millisecond)
	}
}

// kept asks for what the histories hold.
func (s *soak) kept(ctx context.Context) {
	for _, ld := range s.loads {
		if err := ld.Kept(ctx); err != nil {
			s.failf("lost: %v", err)
		}
	}
}

func (s *soak) fail(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fmt.Println("soak: FAILURE:", text)
	s.failures = append(s.failures, text)
}

func (s *soak) failf(format string, args ...any) { s.fail(fmt.Sprintf(format, args...)) }

// pause waits, or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
