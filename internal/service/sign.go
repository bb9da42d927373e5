package service

import (
	"context"
	"sync"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/keyring"
	"github.com/trustd/trustd/packet"
	"github.com/trustd/trustd/registry"
)

// modeDirect says that the device signed the message itself, not a batch that holds it.
const modeDirect = "direct"

// A job is one message on its way through a device.
type job struct {
	entry *keyring.Entry
	agent registry.Agent
	bytes []byte // what is signed
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
	seqs, res := key.SignNumbered(ctx, [][]byte{j.bytes})
	if res[0].Err != nil {
		return api.SignPacketReply{}, s.signFailed(j, res[0].Err)
	}
	return api.SignPacketReply{Packet: u.Seal(res[0].Signature), Signed: j.signed(seqs[0])}, nil
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
	jobs := make([]packetJob, len(rs))
	parallel(len(rs), func(i int) {
		j, u, err := s.preparePacket(ctx, rs[i])
		if err != nil {
			out[i].Error = s.problem(err)
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
		wg.Go(func() { s.signGroup(ctx, g, out) })
	}
	wg.Wait()
	return out
}

// signGroup signs the packets of one agent and puts each result into its place.
func (s *Service) signGroup(ctx context.Context, g []packetJob, out []api.SignPacketResult) {
	fail := func(err error) {
		for _, j := range g {
			out[j.at].Error = s.problem(err)
		}
	}
	key, err := s.open(ctx, g[0].entry)
	if err != nil {
		fail(err)
		return
	}
	msgs := make([][]byte, len(g))
	for i := range g {
		msgs[i] = g[i].bytes
	}
	seqs, results := key.SignNumbered(ctx, msgs)
	for i, res := range results {
		j := g[i]
		if res.Err != nil {
			out[j.at].Error = s.problem(s.signFailed(j.job, res.Err))
			continue
		}
		out[j.at].SignPacketReply = &api.SignPacketReply{Packet: j.packet.Seal(res.Signature), Signed: j.signed(seqs[i])}
	}
}

// problem returns an error of one item of a batch as it may be sent, and writes its cause to the log where it is
// ours to repair.
func (s *Service) problem(err error) *api.Problem {
	p := api.NewProblem(err)
	if p.Status >= 500 && p.Code != fault.Canceled {
		s.cfg.Log.Warn("an item of a batch failed", "code", string(p.Code), "cause", fault.From(err).Verbose())
	}
	return p
}

// preparePacket does all that comes before the device: who asks, as whom, and is the packet whole and right.
func (s *Service) preparePacket(ctx context.Context, r api.SignPacketRequest) (job, *packet.Unsigned, error) {
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
	return job{entry: e, agent: a, bytes: u.SigningBytes()}, u, nil
}

// signed says how the signature was made. seq is its place in the key's history.
func (j job) signed(seq uint64) api.Signed {
	return api.Signed{
		AgentID: j.agent.ID.String(), Fingerprint: j.entry.Public.ID().String(), Algorithm: j.entry.Public.Algorithm().String(),
		Grade: j.entry.Grade, Mode: modeDirect, Epoch: j.agent.Current().Epoch, Sequence: seq,
	}
}

// signFailed drops the cached key after a failure of its device, so that a key that was moved or replaced is
// looked for anew.
func (s *Service) signFailed(j job, err error) error {
	switch fault.CodeOf(err) {
	case fault.Canceled, fault.DeadlineExceeded, fault.DeviceBusy, fault.ResourceExhausted:
	default:
		s.forget(j.agent.ID)
	}
	return err
}
