package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/client"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/packet"
	"github.com/trustd/trustd/signature"
)

// A Way is how a client of a Load asks for signatures.
type Way string

// The ways.
const (
	Direct    Way = "direct"    // one packet after the other, signed by itself
	Batchable Way = "batchable" // one after the other; a batch may cover it
	Batch     Way = "batch"     // lists of packets, half of which a batch may cover
	Stream    Way = "stream"    // streams of packets that a batch may cover
	Message   Way = "message"   // SignedMessages that a batch may cover
)

// Ways lists all of them.
func Ways() []Way { return []Way{Direct, Batchable, Batch, Stream, Message} }

// LoadOptions say what a Load does. The zero value asks in every way, once.
type LoadOptions struct {
	Ways     []Way         // one client each
	Deadline time.Duration // of each request; 0: 10 s
	Pause    time.Duration // of a client between two requests; 0: none
	List     int           // packets in a list or stream; 0: 16
}

// grace is how long after its deadline a request may end: what a busy machine takes to say so.
const grace = 5 * time.Second

// retryPause is what a client waits after a failure, as one that is told to retry does.
const retryPause = 20 * time.Millisecond

// A Load signs as one agent with several clients until it is stopped. It checks each signature that it is given against
// the key that the registry held when the load began, and notes what must not be. It is safe for concurrent use.
type Load struct {
	Agent string

	opts   LoadOptions
	lab    *Lab
	id     ident.AgentID
	key    ident.PublicKey
	to     string
	roots  *signature.Roots
	cancel context.CancelFunc
	done   sync.WaitGroup
	asked  atomic.Uint64 // also the number of the next packet

	mu       sync.Mutex
	numbers  map[uint64]bool // of acknowledged signatures
	modes    map[string]int
	errors   map[fault.Code]int
	broken   []string
	wrong    int
	lastGood time.Time
	took     []time.Duration // of single requests that succeeded
}

// StartLoad starts a load. It ends with Stop, or with ctx.
func (l *Lab) StartLoad(ctx context.Context, agent string, o LoadOptions) (*Load, error) {
	c := client.New(l.AgentSocket)
	defer c.Close()
	who, err := c.Identity(ctx, agent)
	if err != nil {
		return nil, fmt.Errorf("looking the agent up: %w", err)
	}
	ld := &Load{
		Agent: agent, opts: o, lab: l, to: who.Aliases[0], roots: signature.NewRoots(4096), numbers: map[uint64]bool{},
		modes: map[string]int{}, errors: map[fault.Code]int{},
	}
	if ld.key, err = ident.ParsePEM(who.PEM); err != nil {
		return nil, fmt.Errorf("reading the registered key: %w", err)
	}
	if ld.id, err = ident.ParseAgentID(agent); err != nil {
		return nil, err
	}
	if len(ld.opts.Ways) == 0 {
		ld.opts.Ways = Ways()
	}
	if ld.opts.Deadline == 0 {
		ld.opts.Deadline = 10 * time.Second
	}
	if ld.opts.List == 0 {
		ld.opts.List = 16
	}
	ctx, ld.cancel = context.WithCancel(ctx)
	for _, way := range ld.opts.Ways {
		ld.done.Go(func() { ld.work(ctx, way) })
	}
	return ld, nil
}

// Stop ends the load and waits for its clients.
func (ld *Load) Stop() {
	ld.cancel()
	ld.done.Wait()
}

// work asks in one way until ctx ends.
func (ld *Load) work(ctx context.Context, way Way) {
	c := client.New(ld.lab.AgentSocket)
	defer c.Close()
	ask := map[Way]func(context.Context, *client.Client) error{
		Direct:    func(ctx context.Context, c *client.Client) error { return ld.packet(ctx, c, false) },
		Batchable: func(ctx context.Context, c *client.Client) error { return ld.packet(ctx, c, true) },
		Batch:     ld.batch, Stream: ld.stream, Message: ld.message,
	}[way]
	for ctx.Err() == nil {
		one, cancel := context.WithTimeout(ctx, ld.opts.Deadline)
		begun := time.Now()
		err := ask(one, c)
		took := time.Since(begun)
		cancel()
		if took > ld.opts.Deadline+grace {
			ld.violated("a request by %s took %v, its deadline was %v", way, took, ld.opts.Deadline)
		}
		pause := ld.opts.Pause
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			pause = max(pause, retryPause)
			if way != Batch && way != Stream { // those note their own
				ld.failed(err)
			}
		case way == Direct || way == Batchable:
			ld.timed(took)
		}
		if pause > 0 {
			t := time.NewTimer(pause)
			select {
			case <-t.C:
			case <-ctx.Done():
				t.Stop()
			}
		}
	}
}

// request returns a new request and the name of its task.
func (ld *Load) request(batchable bool) (api.SignPacketRequest, string) {
	name := fmt.Sprintf("load-%d", ld.asked.Add(1))
	text := fmt.Appendf(nil, `{"task_id":%q,"to_agent":%q,"intent":"read",
		"permissions":{"allowed_actions":["read"]},"risk_level":"read"}`, name, ld.to)
	return api.SignPacketRequest{Agent: ld.Agent, Packet: text, Batchable: &batchable}, name
}

func (ld *Load) packet(ctx context.Context, c *client.Client, batchable bool) error {
	r, name := ld.request(batchable)
	out, err := c.SignPacket(ctx, r)
	if err == nil {
		ld.signed(name, batchable, &out)
	}
	return err
}

func (ld *Load) batch(ctx context.Context, c *client.Client) error {
	rs, names := make([]api.SignPacketRequest, ld.opts.List), make([]string, ld.opts.List)
	for i := range rs {
		rs[i], names[i] = ld.request(i%2 == 0)
	}
	var first error
	for i, r := range c.SignPackets(ctx, rs) {
		if r.Error == nil {
			ld.signed(names[i], i%2 == 0, r.SignPacketReply)
			continue
		}
		ld.failedIn(ctx, r.Error.Err())
		first = r.Error.Err()
	}
	return first
}

// stream has a list signed over a stream of its own.
func (ld *Load) stream(ctx context.Context, c *client.Client) error {
	s, err := c.SignStream(ctx)
	if err != nil {
		ld.failedIn(ctx, err)
		return err
	}
	defer s.Close()
	rs, names := make([]api.SignPacketRequest, ld.opts.List), make([]string, ld.opts.List)
	for i := range rs {
		rs[i], names[i] = ld.request(true)
	}
	var sending sync.WaitGroup
	defer sending.Wait()
	sending.Go(func() {
		for _, r := range rs {
			if s.Send(r) != nil {
				return // Recv says why
			}
		}
		_ = s.CloseSend()
	})
	var first error
	for i := range rs {
		r, err := s.Recv()
		if err == nil && r.Error == nil {
			ld.signed(names[i], true, r.SignPacketReply)
			continue
		}
		if err == nil {
			ld.failedIn(ctx, r.Error.Err())
			first = r.Error.Err()
			continue
		}
		if errors.Is(err, io.EOF) {
			ld.violated("a stream ended after %d of %d results", i, len(rs))
		}
		ld.failedIn(ctx, err)
		s.Close()
		return err
	}
	return first
}

func (ld *Load) message(ctx context.Context, c *client.Client) error {
	name, batchable := fmt.Sprintf("load-%d", ld.asked.Add(1)), true
	payload, err := json.Marshal(name)
	if err != nil {
		return err
	}
	out, err := c.SignMessage(ctx, api.SignMessageRequest{Agent: ld.Agent, Payload: payload, Batchable: &batchable})
	if err != nil {
		return err
	}
	m, err := packet.ParseMessage(out.Message)
	if err == nil {
		err = m.VerifySignature(ld.key, ld.roots)
	}
	if err == nil && string(m.Payload()) != string(payload) {
		err = errors.New("it signs another message")
	}
	if err == nil && m.Header().Seq != out.Sequence {
		err = errors.New("the reply has another number than the message")
	}
	ld.acknowledged(&out.Signed, err)
	return nil
}

// signed checks what was acknowledged.
func (ld *Load) signed(name string, batchable bool, r *api.SignPacketReply) {
	ld.acknowledged(&r.Signed, ld.verify(name, batchable, r))
}

func (ld *Load) verify(name string, batchable bool, r *api.SignPacketReply) error {
	t, err := packet.Parse(r.Packet)
	if err != nil {
		return err
	}
	if t.TaskID != name {
		return errors.New("it signs another packet")
	}
	sig, err := signature.Parse(ld.key.Algorithm(), t.SignatureText)
	if err != nil {
		return err
	}
	if string(sig.Mode()) != r.Mode || sig.Mode() == signature.Batched && !batchable {
		return errors.New("it has a mode that was not asked for")
	}
	subject := signature.Subject{Kind: signature.KindPacket, Agent: ld.id, Message: t.SigningBytes()}
	return sig.Verify(ld.key, subject, ld.roots)
}

// acknowledged notes a signature; err says what is wrong with it.
func (ld *Load) acknowledged(s *api.Signed, err error) {
	ld.mu.Lock()
	defer ld.mu.Unlock()
	if err != nil {
		ld.wrong++
		ld.breakLocked("a wrong signature left: %v", err)
	}
	if s.Sequence == 0 || ld.numbers[s.Sequence] {
		ld.breakLocked("the number %d was given out twice", s.Sequence)
	}
	ld.numbers[s.Sequence] = true
	ld.modes[s.Mode]++
	ld.lastGood = time.Now()
}

// failed notes an error that ends a request.
func (ld *Load) failed(err error) {
	ld.mu.Lock()
	defer ld.mu.Unlock()
	ld.errors[fault.CodeOf(err)]++
}

// failedIn is failed, unless the whole load is being stopped.
func (ld *Load) failedIn(ctx context.Context, err error) {
	if !errors.Is(ctx.Err(), context.Canceled) {
		ld.failed(err)
	}
}

func (ld *Load) violated(format string, args ...any) {
	ld.mu.Lock()
	defer ld.mu.Unlock()
	ld.breakLocked(format, args...)
}

// mostBroken bounds the violations that are told; the first say enough.
const mostBroken = 20

func (ld *Load) breakLocked(format string, args ...any) {
	if len(ld.broken) < mostBroken {
		ld.broken = append(ld.broken, ld.Agent+": "+fmt.Sprintf(format, args...))
	}
}

const mostTimed = 1 << 20

func (ld *Load) timed(d time.Duration) {
	ld.mu.Lock()
	defer ld.mu.Unlock()
	if len(ld.took) < mostTimed {
		ld.took = append(ld.took, d)
	}
}

// Report is what a load has seen.
type Report struct {
	Agent        string
	Asked        uint64
	Acknowledged int
	Modes        map[string]int
	Errors       map[fault.Code]int
	Wrong        int // signatures that do not verify
	Broken       []string
	Last         uint64 // highest number of a signature
	LastGood     time.Time
	P50, P99     time.Duration // of single requests that succeeded
}

// Report returns what the load has seen up to now.
func (ld *Load) Report() Report {
	ld.mu.Lock()
	defer ld.mu.Unlock()
	r := Report{
		Agent: ld.Agent, Asked: ld.asked.Load(), Acknowledged: len(ld.numbers), Modes: maps.Clone(ld.modes),
		Errors: maps.Clone(ld.errors), Wrong: ld.wrong, Broken: slices.Clone(ld.broken), LastGood: ld.lastGood,
	}
	for n := range ld.numbers {
		r.Last = max(r.Last, n)
	}
	if took := slices.Sorted(slices.Values(ld.took)); len(took) > 0 {
		r.P50, r.P99 = took[len(took)/2], took[len(took)*99/100]
	}
	return r
}

// Acknowledged returns how many signatures were acknowledged.
func (ld *Load) Acknowledged() int {
	ld.mu.Lock()
	defer ld.mu.Unlock()
	return len(ld.numbers)
}

// Failed returns how many requests failed.
func (ld *Load) Failed() int {
	ld.mu.Lock()
	defer ld.mu.Unlock()
	n := 0
	for _, m := range ld.errors {
		n += m
	}
	return n
}

// Retryable says of the errors in a report which of them must not be: those that no caller may retry.
func (r *Report) Retryable(except ...fault.Code) error {
	for code, n := range r.Errors {
		if !code.Retryable() && !slices.Contains(except, code) {
			return fmt.Errorf("%s: %d requests ended with %s, which is not retryable", r.Agent, n, code)
		}
	}
	return nil
}

// Kept asks the daemon whether the history of the key holds all that the load was given. It returns what is missing.
func (ld *Load) Kept(ctx context.Context) error {
	c := client.New(ld.lab.AgentSocket)
	defer c.Close()
	r := ld.Report() // before the history, which goes on
	h, err := c.History(ctx, ld.Agent)
	if err != nil {
		return err
	}
	if h.Size < uint64(r.Acknowledged) || h.Sequence < r.Last {
		return fmt.Errorf("%s: the history has %d leaves up to number %d; %d signatures up to number %d were given out",
			ld.Agent, h.Size, h.Sequence, r.Acknowledged, r.Last)
	}
	return nil
}
