package service

import (
	"context"
	"crypto/sha256"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/caller"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/packet"
	"github.com/trustd/trustd/registry"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/spend"
	"github.com/trustd/trustd/verify"
)

// VerifyPacket decides on one packet and spends its nonce where it accepts.
func (s *Service) VerifyPacket(ctx context.Context, r api.VerifyPacketRequest) (api.Decision, error) {
	out := s.VerifyPackets(ctx, []api.VerifyPacketRequest{r})
	if out[0].Error != nil {
		return api.Decision{}, out[0].Error.Err()
	}
	return *out[0].Decision, nil
}

// VerifyPackets decides on many packets; their nonces become durable together.
func (s *Service) VerifyPackets(ctx context.Context, rs []api.VerifyPacketRequest) []api.VerifyPacketResult {
	out := make([]api.VerifyPacketResult, len(rs))
	var failed failures
	defer func() { failed.log(s.cfg.Log) }()
	var (
		nonces []spend.Nonce
		at     []int
	)
	accepted := make([]*verify.Accepted, len(rs))
	parallel(len(rs), func(i int) {
		d, acc, err := s.judge(ctx, rs[i])
		if err != nil {
			out[i].Error = failed.problem(err)
			return
		}
		out[i].Decision, accepted[i] = &d, acc
	})
	for i, acc := range accepted {
		if acc != nil {
			nonces = append(nonces, spend.Nonce{Key: acc.KeyID(), Nonce: acc.Nonce(), Keep: acc.Until().Sub(s.cfg.Clock.Now())})
			at = append(at, i)
		}
	}
	if len(nonces) == 0 {
		return out
	}
	for n, err := range s.cfg.Spend.Commit(ctx, nonces) {
		d := out[at[n]].Decision
		if err == nil {
			continue
		}
		e := fault.From(err)
		if !e.Code.Refusal() { // the context ended: the nonce may or may not be spent, and nothing was decided
			out[at[n]] = api.VerifyPacketResult{Error: failed.problem(e)}
			continue
		}
		refuse(d, e)
	}
	return out
}

// parallel calls fn for each of n things, on all cores where there are several: most of a verification is one
// public-key operation.
func parallel(n int, fn func(int)) {
	workers := min(runtime.GOMAXPROCS(0), n)
	if workers <= 1 {
		for i := range n {
			fn(i)
		}
		return
	}
	var next atomic.Int64
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				fn(i)
			}
		})
	}
	wg.Wait()
}

// judge parses a packet and runs the table of checks. It returns a decision and, where all checks passed, what is
// left to commit.
func (s *Service) judge(ctx context.Context, r api.VerifyPacketRequest) (api.Decision, *verify.Accepted, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return api.Decision{}, nil, err
	}
	v := s.cfg.Views.Load()
	may, err := s.audience(c, v.Registry, r.Audience)
	if err != nil {
		return api.Decision{}, nil, err
	}
	policy, err := s.tightened(r.Demands)
	if err != nil {
		return api.Decision{}, nil, err
	}
	t, err := packet.Parse(r.Packet)
	if err != nil {
		d := api.Decision{Decision: api.Reject}
		refuse(&d, fault.From(err))
		return d, nil, nil
	}
	d := api.Decision{PacketID: t.PacketID, Decision: api.Accept, Form: formCurrent}
	now := s.cfg.Clock.Now()
	acc, refusal := verify.Check(verify.Input{Packet: t, MayReceive: may, View: v, Policy: policy, Roots: s.roots, Now: now})
	if refusal != nil {
		refuse(&d, refusal)
	} else if acc.Legacy() {
		d.Form = formLegacy
	}
	if r.Detail {
		d.Details = s.details(t, v.Registry, now)
		d.Details.ReasonCode = d.Reason
		d.Details.Valid = refusal == nil
	}
	if refusal != nil {
		return d, nil, nil
	}
	return d, &acc, nil
}

// tightened returns the host's policy with what one request demands on top.
func (s *Service) tightened(d api.Demands) (verify.Policy, error) {
	if d.MinGrade == "" {
		return s.cfg.Policy.Tightened("", d.DirectOnly), nil
	}
	g, err := signer.ParseGrade(d.MinGrade)
	if err != nil {
		return verify.Policy{}, fault.BadField("min_grade", "%s", fault.From(err).Text)
	}
	return s.cfg.Policy.Tightened(g, d.DirectOnly), nil
}

// The forms of a packet's signing bytes.
const (
	formCurrent = "th-0.4"
	formLegacy  = "th-0.3.3"
)

func refuse(d *api.Decision, e *fault.Error) {
	d.Decision, d.Reason, d.Field, d.Text = api.Reject, e.Code, e.Field, e.Text
	if d.Details != nil {
		d.Details.Valid, d.Details.ReasonCode = false, e.Code
	}
}

// audience returns the test for whom the caller may receive. A nonce is spent for its audience alone: another
// process on the host cannot burn it.
func (s *Service) audience(c *caller.Caller, st *registry.State, name string) (func(ident.AgentID) bool, error) {
	receives := func(id ident.AgentID) bool {
		e, held := s.cfg.Keyring.Get(id)
		return held && caller.MatchAny(e.Bindings, c, api.VerbVerify)
	}
	if name == "" {
		return receives, nil
	}
	a, err := resolve(st, name)
	if err != nil {
		return nil, err
	}
	if !receives(a.ID) {
		return nil, fault.New(fault.Denied, "this caller may not verify for that agent")
	}
	return func(id ident.AgentID) bool { return id == a.ID }, nil
}

// details says what is known of the packet's signer, whatever the decision was.
func (s *Service) details(t *packet.Task, st *registry.State, now time.Time) *api.Details {
	sum := sha256.Sum256(t.SigningBytes())
	size, root := st.Head()
	d := &api.Details{
		SignedAt: t.IssuedAt.Instant.Format(time.RFC3339Nano), PayloadHash: digestText(sum), ViewSize: size, ViewHead: digestText(root),
		Mode: string(signature.Direct),
	}
	if strings.HasPrefix(t.SignatureText, signature.BatchPrefix) {
		d.Mode = string(signature.Batched)
	}
	if a, ok := st.ByAlias(t.FromAgent); ok {
		signerDetails(d, a, a.Current())
	}
	return d
}

func signerDetails(d *api.Details, a registry.Agent, k registry.KeyEpoch) {
	d.SignerID, d.Fingerprint, d.Algorithm = a.ID.String(), k.Public.ID().String(), k.Public.Algorithm().String()
	d.KeyEpoch, d.Grade, d.TrustLevel = k.Epoch, k.Grade, a.Level.String()
}
