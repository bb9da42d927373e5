package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/client"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/softhsm-test/lab"
)

// long skips a test that takes its time, except in make test-long.
func long(t *testing.T) {
	t.Helper()
	if os.Getenv("TRUSTD_LONG") == "" {
		t.Skip("runs for long: set TRUSTD_LONG, or run make test-long")
	}
}

// nemesisTime is how long faults are made.
const nemesisTime = 50 * time.Second

// nemesisStall bounds how long one request may take under any fault, before it counts as lost.
const nemesisStall = 30 * time.Second

// A ledger notes what the daemon acknowledged, and what it should not have.
type ledger struct {
	mu        sync.Mutex
	sequences map[string]map[uint64]bool // of each key
	spent     map[string]json.RawMessage // packets whose ACCEPT was acknowledged, by packet id
	failed    map[fault.Code]int
	broken    []string
}

func newLedger() *ledger {
	return &ledger{
		sequences: map[string]map[uint64]bool{}, spent: map[string]json.RawMessage{}, failed: map[fault.Code]int{},
	}
}

func (b *ledger) signed(r api.SignPacketReply) {
	b.mu.Lock()
	defer b.mu.Unlock()
	seen := b.sequences[r.Fingerprint]
	if seen == nil {
		seen = map[uint64]bool{}
		b.sequences[r.Fingerprint] = seen
	}
	if seen[r.Sequence] {
		b.broken = append(b.broken, fmt.Sprintf("the number %d of %s was given out twice", r.Sequence, r.AgentID))
	}
	seen[r.Sequence] = true
}

// decided notes a verdict on an honest packet; mayBeSpent where an earlier request's reply was lost.
func (b *ledger) decided(d api.Decision, packet json.RawMessage, mayBeSpent bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	_, twice := b.spent[d.PacketID]
	switch {
	case d.Decision == api.Accept && twice:
		b.broken = append(b.broken, "a nonce was accepted twice: "+d.PacketID)
	case d.Decision == api.Accept:
		b.spent[d.PacketID] = packet
	case d.Reason == fault.ReplayDetected && (twice || mayBeSpent):
	default:
		b.broken = append(b.broken, fmt.Sprintf("an honest packet was refused: %s %s %s", d.Reason, d.Field, d.Text))
	}
}

// failure notes an error; one that is not retryable breaks the rules.
func (b *ledger) failure(what string, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	code := fault.CodeOf(err)
	b.failed[code]++
	if !code.Retryable() {
		b.broken = append(b.broken, fmt.Sprintf("%s: neither success nor retryable: %v", what, err))
	}
}

func (b *ledger) accepted() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.spent)
}

// check reports what was against the rules. Nobody may write to the ledger any more.
func (b *ledger) check(t *testing.T) {
	t.Helper()
	t.Logf("%d accepted, failed: %v", len(b.spent), b.failed)
	for i, text := range b.broken {
		if i == 10 {
			t.Errorf("and %d more", len(b.broken)-i)
			break
		}
		t.Error(text)
	}
}

// work signs as agent and verifies until ctx ends. A packet is verified again and again until there is a verdict,
// some also after it.
func (b *ledger) work(ctx context.Context, c *client.Client, agent, to string) {
	for n := 0; ctx.Err() == nil; n++ {
		var s api.SignPacketReply
		if !b.call(ctx, "sign as "+agent, func(ctx context.Context) (err error) {
			s, err = c.SignPacket(ctx, api.SignPacketRequest{Agent: agent, Packet: task(to)})
			return err
		}) {
			continue
		}
		b.signed(s)
		for tries, verdicts := 0, 0; ctx.Err() == nil && verdicts < 1+n%2; tries++ {
			if b.call(ctx, "verify", func(ctx context.Context) error {
				d, err := c.VerifyPacket(ctx, api.VerifyPacketRequest{Packet: s.Packet})
				if err == nil {
					b.decided(d, s.Packet, tries > verdicts)
				}
				return err
			}) {
				verdicts++
			}
		}
	}
}

// call makes a request and notes its failure. The end of the test is none, that of the request's own time is.
func (b *ledger) call(ctx context.Context, what string, fn func(context.Context) error) bool {
	one, cancel := context.WithTimeoutCause(ctx, nemesisStall, errors.New("a request hangs"))
	defer cancel()
	err := fn(one)
	switch {
	case err == nil:
		return true
	case ctx.Err() != nil:
	case one.Err() != nil:
		b.mu.Lock()
		defer b.mu.Unlock()
		b.broken = append(b.broken, fmt.Sprintf("%s: no answer in %v", what, nemesisStall))
	default:
		b.failure(what, err)
		pause(ctx, 20*time.Millisecond) // as a client that is told to retry would
	}
	return false
}

// pause waits, or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

// tpmPid returns the process of the lab's swtpm, which its command line tells from others.
func tpmPid(t *testing.T, l *lab.Lab) int {
	t.Helper()
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range files {
		b, err := os.ReadFile(f)
		args := strings.Split(string(b), "\x00")
		if err != nil || filepath.Base(args[0]) != "swtpm" || !strings.Contains(string(b), l.Dir+"/") {
			continue
		}
		var pid int
		if _, err := fmt.Sscan(filepath.Base(filepath.Dir(f)), &pid); err == nil {
			return pid
		}
	}
	t.Fatal("swtpm does not run")
	return 0
}

// A nemesis makes faults, one after the other, each healed before the next.
type nemesis struct {
	*lab.Lab
	random *rand.Rand
}

// freeze stops a process for up to the given time.
func (n nemesis) freeze(t *testing.T, pid int, most time.Duration) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	pause(t.Context(), time.Duration(n.random.Int64N(int64(most))))
	// A plugin that hangs is killed, and then there is nothing to wake.
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil && !errors.Is(err, syscall.ESRCH) {
		t.Fatal(err)
	}
}

// hang stops the plugin for good: the daemon must end it and start another.
func (n nemesis) hang(t *testing.T) {
	t.Helper()
	pid := child(t, n.Lab)
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "waiting for a plugin in the place of the one that hangs", func() error {
		if child(t, n.Lab) == pid {
			return errors.New("it is still there")
		}
		return nil
	})
}

func (n nemesis) faults() map[string]func(*testing.T) {
	return map[string]func(*testing.T){
		"kill the daemon": func(t *testing.T) {
			n.Kill()
			if err := n.Start(t.Context(), lab.Options{}); err != nil {
				t.Fatal(err)
			}
		},
		"kill the plugin": func(t *testing.T) {
			if err := syscall.Kill(child(t, n.Lab), syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
				t.Fatal(err)
			}
		},
		"kill the TPM": func(t *testing.T) {
			n.KillTPM()
			pause(t.Context(), time.Duration(n.random.Int64N(int64(time.Second))))
			if err := n.RestartTPM(); err != nil {
				t.Fatal(err)
			}
		},
		"freeze the plugin": func(t *testing.T) { n.freeze(t, child(t, n.Lab), 4*time.Second) },
		"freeze the TPM":    func(t *testing.T) { n.freeze(t, tpmPid(t, n.Lab), 4*time.Second) },
		"kill all": func(t *testing.T) {
			plugin := child(t, n.Lab)
			n.KillTPM()
			_ = syscall.Kill(plugin, syscall.SIGKILL) // it may have ended
			n.Kill()
			if err := errors.Join(n.RestartTPM(), n.Start(t.Context(), lab.Options{})); err != nil {
				t.Fatal(err)
			}
		},
	}
}

// TestLongNemesis kills and freezes the daemon, its module's process and its TPM under load, at random. Whatever
// happens, a request succeeds or may be retried, no nonce is accepted twice, no number of a signature repeats, no
// signature is missing in the history, and no agent that was acknowledged is lost (T-DISK-1, T-DEV-1, T-PKT-3).
func TestLongNemesis(t *testing.T) {
	long(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	l := start(t, lab.Options{})
	agents := map[string]string{} // id -> fingerprint
	d := add(t, l, "planner", "--uid", "0")
	chip := add(t, l, "chip", "--backend", "tpm", "--uid", "0")
	agents["planner"], agents["chip"] = d.Fingerprint, chip.Fingerprint

	book := newLedger()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var workers sync.WaitGroup
	for range 6 {
		workers.Go(func() { book.work(ctx, client.New(l.AgentSocket), "planner", chip.Aliases[0]) })
		workers.Go(func() { book.work(ctx, client.New(l.AgentSocket), "chip", d.Aliases[0]) })
	}
	registered := make(chan map[string]string, 1)
	go func() { registered <- register(ctx, l, book) }()

	n := nemesis{l, rand.New(rand.NewPCG(seed, 0))}
	faults := n.faults()
	names := slices.Sorted(maps.Keys(faults))
	done, last := map[string]int{}, ""
	for end := time.Now().Add(nemesisTime); time.Now().Before(end) && !t.Failed(); {
		name := names[n.random.IntN(len(names))]
		done[name]++
		last = name
		faults[name](t)
		if strings.HasSuffix(name, "daemon") || strings.HasSuffix(name, "plugin") || name == "kill all" {
			loggedIn(t, l)
		}
		// Between faults there is either hardly any time or enough to heal.
		pause(t.Context(), time.Duration(n.random.Int64N(int64(300*time.Millisecond))))
		if n.random.IntN(2) == 0 {
			before := book.accepted()
			eventually(t, "waiting for the daemon to serve again after "+name, func() error {
				if now := book.accepted(); now < before+20 {
					return fmt.Errorf("%d accepted, then %d", before, now)
				}
				return nil
			})
		}
	}
	loggedIn(t, l)
	n.hang(t)
	loggedIn(t, l)
	stop()
	workers.Wait()
	maps.Copy(agents, <-registered)
	t.Logf("faults: %v, the last to %s; %d agents registered", done, last, len(agents))
	book.check(t)
	checkHealed(t, l)
	checkKept(t, l, book, agents)
	// The same must hold for what is on the disk.
	l.Kill()
	if err := l.Start(t.Context(), lab.Options{}); err != nil {
		t.Fatal(err)
	}
	checkKept(t, l, book, agents)
}

// loggedIn waits until the plugin has signed. SoftHSM 2.6 writes the token's own file anew, in place, at each login: a
// process that is killed right then leaves a token that no process can find again, whatever uses it.
func loggedIn(t *testing.T, l *lab.Lab) {
	t.Helper()
	c := client.New(l.AgentSocket)
	defer c.Close()
	eventually(t, "waiting for the plugin to log in", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), nemesisStall)
		defer cancel()
		_, err := c.SignMessage(ctx, api.SignMessageRequest{Agent: "planner", Payload: json.RawMessage(`{}`)})
		return err
	})
}

// register adds agents until ctx ends and returns those that the daemon acknowledged.
func register(ctx context.Context, l *lab.Lab, book *ledger) map[string]string {
	out := map[string]string{}
	admin := client.NewAdmin(l.AdminSocket)
	defer admin.Close()
	for n := 0; ctx.Err() == nil; n++ {
		r := api.AddAgentRequest{AgentID: fmt.Sprintf("extra-%d", n), Backend: []string{"hsm", "tpm"}[n%2]}
		book.call(ctx, "agent add", func(ctx context.Context) error {
			d, err := admin.AddAgent(ctx, r)
			if err == nil {
				out[d.AgentID] = d.Fingerprint
			}
			return err
		})
		pause(ctx, 200*time.Millisecond)
	}
	return out
}

// checkHealed demands that both devices serve when nothing troubles them any more.
func checkHealed(t *testing.T, l *lab.Lab) {
	t.Helper()
	c := client.New(l.AgentSocket)
	defer c.Close()
	for _, agent := range []string{"planner", "chip"} {
		eventually(t, "waiting for "+agent+" to sign", func() error {
			_, err := c.SignPacket(t.Context(), api.SignPacketRequest{Agent: agent, Packet: task("agent:x")})
			return err
		})
	}
	eventually(t, "waiting for a healthy report", func() error { return healthy(t, l) })
}

// checkKept demands that nothing which was acknowledged is lost.
func checkKept(t *testing.T, l *lab.Lab, book *ledger, agents map[string]string) {
	t.Helper()
	c := client.New(l.AgentSocket)
	defer c.Close()
	ids := slices.Sorted(maps.Keys(book.spent))
	rs := make([]api.VerifyPacketRequest, len(ids))
	for i, id := range ids {
		rs[i].Packet = book.spent[id]
	}
	for i, v := range c.VerifyPackets(t.Context(), rs) {
		if v.Error != nil {
			t.Fatal(v.Error.Err())
		}
		if v.Reason != fault.ReplayDetected {
			t.Fatalf("the nonce of %s opened again: %s %s", ids[i], v.Decision.Decision, v.Reason)
		}
	}
	known, err := client.NewAdmin(l.AdminSocket).ListAgents(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for id, fingerprint := range agents {
		i := slices.IndexFunc(known, func(d api.AgentDetail) bool { return d.AgentID == id })
		if i < 0 || known[i].Fingerprint != fingerprint || known[i].Status != "active" || known[i].KeyState != "ready" {
			t.Errorf("the agent %s was acknowledged and is lost: %d of %d", id, i, len(known))
		}
	}
	for _, id := range []string{"planner", "chip"} {
		h := history(t, l, id)
		seen := book.sequences[agents[id]]
		if h.Size < uint64(len(seen)) {
			t.Errorf("the history of %s has %d leaves, %d signatures were acknowledged", id, h.Size, len(seen))
		}
		if last := slices.Max(slices.Collect(maps.Keys(seen))); h.Sequence < last {
			t.Errorf("the history of %s ends with %d, the number %d was given out", id, h.Sequence, last)
		}
	}
}

// TestLongBurst: a thousand clients at once are all served, those that were told to retry included.
func TestLongBurst(t *testing.T) {
	long(t)
	const clients = 1000
	l := start(t, lab.Options{NoTPM: true})
	d := add(t, l, "solo", "--uid", "0")
	book := newLedger()
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	open := make(chan struct{})
	var all sync.WaitGroup
	for range clients {
		c := client.New(l.AgentSocket)
		all.Go(func() {
			defer c.Close()
			<-open
			var s api.SignPacketReply
			for done := false; !done && ctx.Err() == nil; {
				done = book.call(ctx, "sign", func(ctx context.Context) (err error) {
					s, err = c.SignPacket(ctx, api.SignPacketRequest{Agent: "solo", Packet: task(d.Aliases[0])})
					return err
				})
			}
			if ctx.Err() == nil {
				book.signed(s)
			}
			for done := false; !done && ctx.Err() == nil; {
				done = book.call(ctx, "verify", func(ctx context.Context) error {
					v, err := c.VerifyPacket(ctx, api.VerifyPacketRequest{Packet: s.Packet})
					if err == nil {
						book.decided(v, s.Packet, false)
					}
					return err
				})
			}
		})
	}
	close(open)
	all.Wait()
	book.check(t)
	if n := len(book.spent); n != clients {
		t.Errorf("%d of %d clients were served", n, clients)
	}
	if h := history(t, l, "solo"); h.Size < clients {
		t.Errorf("the history has %d leaves", h.Size)
	}
	if err := healthy(t, l); err != nil {
		t.Error(err)
	}
}

// TestLongStream sends ten thousand packets through the streams, and finds each reply in its place.
func TestLongStream(t *testing.T) {
	long(t)
	const packets = 10_000
	l := start(t, lab.Options{NoTPM: true})
	d := add(t, l, "solo", "--uid", "0", "--algorithm", "ed25519")
	c := client.New(l.AgentSocket)
	book := newLedger()

	signing, err := c.SignStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer signing.Close()
	signed := make([]api.VerifyPacketRequest, 0, packets)
	through(t, signing, packets, func(i int) api.SignPacketRequest {
		name := fmt.Sprintf("t-%d", i)
		text := strings.Replace(string(task(d.Aliases[0])), "t-1", name, 1)
		return api.SignPacketRequest{Agent: "solo", Packet: []byte(text)}
	}, func(i int, r api.SignPacketResult) {
		if r.Error != nil {
			t.Fatalf("packet %d: %v", i, r.Error.Err())
		}
		if !strings.Contains(string(r.Packet), fmt.Sprintf(`"task_id":"t-%d"`, i)) {
			t.Fatalf("packet %d is %s", i, r.Packet)
		}
		book.signed(*r.SignPacketReply)
		signed = append(signed, api.VerifyPacketRequest{Packet: r.Packet})
	})

	verifying, err := c.VerifyStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer verifying.Close()
	// Every tenth is a forgery, so that a verdict in another's place shows.
	forged := func(i int) bool { return i%10 == 3 }
	through(t, verifying, packets, func(i int) api.VerifyPacketRequest {
		if forged(i) {
			text := strings.Replace(string(signed[i].Packet), `"intent":"read"`, `"intent":"reed"`, 1)
			return api.VerifyPacketRequest{Packet: []byte(text)}
		}
		return signed[i]
	}, func(i int, r api.VerifyPacketResult) {
		var p struct {
			PacketID string `json:"packet_id"`
		}
		if err := json.Unmarshal(signed[i].Packet, &p); err != nil {
			t.Fatal(err)
		}
		switch {
		case r.Error != nil:
			t.Fatalf("packet %d: %v", i, r.Error.Err())
		case r.PacketID != p.PacketID:
			t.Fatalf("in the place of packet %d is the verdict on %s", i, r.PacketID)
		case forged(i):
			if r.Reason != fault.InvalidSignature {
				t.Fatalf("the forged packet %d: %s %s", i, r.Decision.Decision, r.Reason)
			}
		default:
			book.decided(*r.Decision, signed[i].Packet, false)
		}
	})
	book.check(t)
	if h := history(t, l, "solo"); h.Size < packets {
		t.Errorf("the history has %d leaves", h.Size)
	}
}

// through sends n requests into a stream and hands out their results in the order in which they come.
func through[Q, R any](t *testing.T, s *client.Stream[Q, R], n int, request func(int) Q, result func(int, R)) {
	t.Helper()
	sent := make(chan error, 1)
	go func() {
		for i := range n {
			if err := s.Send(request(i)); err != nil {
				sent <- fmt.Errorf("sending request %d: %w", i, err)
				return
			}
		}
		sent <- s.CloseSend()
	}()
	for i := range n {
		r, err := s.Recv()
		if err != nil {
			t.Fatalf("result %d: %v", i, err)
		}
		result(i, r)
	}
	if _, err := s.Recv(); err != io.EOF {
		t.Errorf("after the last result: %v", err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
}
