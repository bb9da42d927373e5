package service

import (
	"context"
	"log/slog"
	"sync"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/caller"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/keyring"
	"github.com/trustd/trustd/packet"
	"github.com/trustd/trustd/registry"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer/batch"
	"github.com/trustd/trustd/signer/monitor"
)

// A job is one message on its way through a device.
type job struct {
	entry *keyring.Entry
	agent registry.Agent
	who   batch.Caller
	item  batch.Item
}

// whose returns in whose line a caller's requests stand.
func whose(c *caller.Caller) batch.Caller { return batch.Caller{UID: c.UID, PID: c.PID} }

// batchable says whether a request may be signed in a batch: as it says, or else as its agent's setting says.
func batchable(asked *bool, e *keyring.Entry) bool {
	switch {
	case e.Batching == api.BatchingNever:
		return false
	case asked != nil:
		return *asked
	}
	return e.Batching == api.BatchingAlways
}

// SignPacket completes and signs one packet.
func (s *Service) SignPacket(ctx context.Context, r api.SignPacketRequest) (api.SignPacketReply, error) {
	j, u, err := s.preparePacket(ctx, r)
	if err != nil {
		return api.SignPacketReply{}, err
	}
	key, err := s.open(ctx, j.entry)
	if err != nil {
		return api.SignPacketReply{}, err
	}
	res := key.line.Sign(ctx, j.who, []batch.Item{j.item})[0]
	if res.Err != nil {
		return api.SignPacketReply{}, s.signFailed(j, s.lost(ctx, j.entry, res.Err))
	}
	return api.SignPacketReply{Packet: u.Seal(res.Signature), Signed: j.signed(res)}, nil
}

// A packetJob is a packet of a batch and its place in it.
type packetJob struct {
	job
	at     int
	packet *packet.Unsigned
}

// SignPackets signs many packets: those of one key go to its device together.
func (s *Service) SignPackets(ctx context.Context, rs []api.SignPacketRequest) []api.SignPacketResult {
	out := make([]api.SignPacketResult, len(rs))
	var failed failures
	defer func() { failed.log(s.cfg.Log) }()
	jobs := make([]packetJob, len(rs))
	parallel(len(rs), func(i int) {
		j, u, err := s.preparePacket(ctx, rs[i])
		if err != nil {
			out[i].Error = failed.problem(err)
			return
		}
		jobs[i] = packetJob{j, i, u}
	})
	groups := map[ident.AgentID][]packetJob{}
	for _, j := range jobs {
		if j.packet != nil {
			groups[j.agent.ID] = append(groups[j.agent.ID], j)
		}
	}
	var wg sync.WaitGroup
	for _, g := range groups {
		wg.Go(func() { s.signGroup(ctx, g, out, &failed) })
	}
	wg.Wait()
	return out
}

// signGroup signs the packets of one agent and puts each result into its place.
func (s *Service) signGroup(ctx context.Context, g []packetJob, out []api.SignPacketResult, failed *failures) {
	key, err := s.open(ctx, g[0].entry)
	if err != nil {
		for _, j := range g {
			out[j.at].Error = failed.problem(err)
		}
		return
	}
	items := make([]batch.Item, len(g))
	for i := range g {
		items[i] = g[i].item
	}
	var gone error
	for i, res := range key.line.Sign(ctx, g[0].who, items) {
		j := &g[i]
		if res.Err != nil {
			err := res.Err
			if monitor.Gone(err) { // looked into once for all
				if gone == nil {
					gone = s.lost(ctx, j.entry, err)
				}
				err = gone
			}
			out[j.at].Error = failed.problem(s.signFailed(j.job, err))
			continue
		}
		out[j.at].SignPacketReply = &api.SignPacketReply{Packet: j.packet.Seal(res.Signature), Signed: j.signed(res)}
	}
}

// A failures collects why items of one list failed. It is safe for concurrent use.
type failures struct {
	mu    sync.Mutex
	count map[fault.Code]int
	first map[fault.Code]string
}

// problem returns an error of one item of a list as it may be sent, and notes its cause for the log where it is ours
// to repair.
func (f *failures) problem(err error) *api.Problem {
	p := api.NewProblem(err)
	if p.Status < 500 || p.Code == fault.Canceled {
		return p
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.count == nil {
		f.count, f.first = map[fault.Code]int{}, map[fault.Code]string{}
	}
	if f.count[p.Code]++; f.count[p.Code] == 1 {
		f.first[p.Code] = fault.From(err).Verbose()
	}
	return p
}

// log writes one line for each code, however many items failed with it.
func (f *failures) log(log *slog.Logger) {
	for c, n := range f.count {
		log.Warn("items of a list failed", "code", string(c), "items", n, "first_cause", f.first[c])
	}
}

// preparePacket does all that comes before the device: who asks, as whom, and is the packet whole and right.
func (s *Service) preparePacket(ctx context.Context, r api.SignPacketRequest) (job, *packet.Unsigned, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return job{}, nil, err
	}
	e, a, err := s.actor(ctx, r.Agent, api.VerbSign)
	if err != nil {
		return job{}, nil, err
	}
	if e.Role != roleAgent {
		return job{}, nil, fault.New(fault.Denied, "only agents sign packets")
	}
	if err := s.usable(a); err != nil {
		return job{}, nil, err
	}
	d, err := packet.ParseDraft(r.Packet)
	if err != nil {
		return job{}, nil, err
	}
	u, err := d.Complete(packet.Fill{
		FromAgent:   ident.DerivedAlias(e.Public).String(),
		AllowedFrom: hasAlias(a),
		PublicKey:   e.Public,
		Nonce:       randomText(18),
		PacketID:    "pk-" + randomText(12),
		Now:         s.cfg.Clock.Now(),
		TTL:         s.cfg.Policy.TTL,
	})
	if err != nil {
		return job{}, nil, err
	}
	j := job{entry: e, agent: a, who: whose(c), item: batch.Item{
		Subject: signature.Subject{Kind: signature.KindPacket, Agent: a.ID, Message: u.SigningBytes()},
		// The text of a batched signature is longer, and the packet must not outgrow its bound by it.
		Batchable: batchable(r.Batchable, e) && len(u.SigningBytes())+signature.MaxText < packet.MaxTask,
	}}
	return j, u, nil
}

// signed says how the signature was made.
func (j job) signed(r batch.Result) api.Signed {
	_, size := r.Signature.Place()
	return api.Signed{
		AgentID: j.agent.ID.String(), Fingerprint: j.entry.Public.ID().String(), Algorithm: j.entry.Public.Algorithm().String(),
		Grade: j.entry.Grade, Mode: string(r.Signature.Mode()), Epoch: j.agent.Current().Epoch, Sequence: r.Number, BatchSize: size,
	}
}

// signFailed drops the cached key after a failure of its device, so that a key that was moved or replaced is
// looked for anew.
func (s *Service) signFailed(j job, err error) error {
	switch fault.CodeOf(err) {
	case fault.Canceled, fault.DeadlineExceeded, fault.DeviceBusy, fault.ResourceExhausted, fault.Stopping:
	default:
		s.forget(j.agent.ID)
	}
	return err
}
