package service_test

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/packet"
	"github.com/trustd/trustd/signature"
)

func ptr[T any](v T) *T { return &v }

// TestBatchedPackets: a list that may be batched is signed once and verified by each packet alone; numbers are those
// of the key's history, whatever the mode.
func TestBatchedPackets(t *testing.T) {
	h := newHost(t)
	d := h.add("a")
	requests := make([]api.SignPacketRequest, 40)
	for i := range requests {
		requests[i] = api.SignPacketRequest{Agent: "a", Packet: draft(d.Aliases[0]), Batchable: ptr(i%4 != 0)}
	}
	signed := h.svc.SignPackets(h.ctx(), requests)
	verify := make([]api.VerifyPacketRequest, len(signed))
	var numbers []uint64
	for i, r := range signed {
		if r.Error != nil {
			t.Fatal(r.Error.Err())
		}
		want, size := "batched", 30
		if i%4 == 0 {
			want, size = "direct", 0
		}
		if r.Mode != want || r.BatchSize != size {
			t.Errorf("packet %d is %s of %d", i, r.Mode, r.BatchSize)
		}
		numbers = append(numbers, r.Sequence)
		verify[i] = api.VerifyPacketRequest{Packet: r.Packet, Detail: true}
	}
	slices.Sort(numbers)
	if n := len(slices.Compact(numbers)); n != len(signed) {
		t.Errorf("%d numbers for %d packets", n, len(signed))
	}
	hist, err := h.svc.History(h.ctx(), "a")
	if err != nil || hist.Sequence != numbers[len(numbers)-1] {
		t.Errorf("history at %d, last number %d: %v", hist.Sequence, numbers[len(numbers)-1], err)
	}
	for i, v := range h.svc.VerifyPackets(h.ctx(), verify) {
		if v.Error != nil || v.Decision.Decision != api.Accept || v.Details.Mode != signed[i].Mode {
			t.Errorf("packet %d: %+v", i, v)
		}
	}
}

// TestDemands: what one request demands counts on top of the policy.
func TestDemands(t *testing.T) {
	h := newHost(t)
	d := h.add("a")
	pair := make([]api.SignPacketRequest, 2)
	for i := range pair {
		pair[i] = api.SignPacketRequest{Agent: "a", Packet: draft(d.Aliases[0]), Batchable: ptr(true)}
	}
	signed := h.svc.SignPackets(h.ctx(), pair)
	for name, c := range map[string]struct {
		demands api.Demands
		want    fault.Code
	}{
		"only direct ones": {api.Demands{DirectOnly: true}, fault.AssuranceTooLow},
		"hardware":         {api.Demands{MinGrade: "hardware-claimed"}, fault.AssuranceTooLow},
		"software":         {api.Demands{MinGrade: "software"}, ""},
	} {
		out, err := h.svc.VerifyPacket(h.ctx(), api.VerifyPacketRequest{Packet: signed[0].Packet, Demands: c.demands})
		if err != nil || out.Reason != c.want {
			t.Errorf("%s: %+v, %v", name, out, err)
		}
	}
	_, err := h.svc.VerifyPacket(h.ctx(), api.VerifyPacketRequest{Packet: signed[1].Packet, Demands: api.Demands{MinGrade: "gold"}})
	code(t, err, fault.Malformed)
}

// TestBatchedMessages: messages of several callers at once hold their numbers and verify in every mode.
func TestBatchedMessages(t *testing.T) {
	h := newHost(t)
	h.add("a")
	const n = 64
	replies := make(chan api.SignMessageReply, n)
	for range n {
		go func() {
			r, err := h.svc.SignMessage(h.ctx(), api.SignMessageRequest{Agent: "a", Payload: json.RawMessage(`{"x":1}`), Batchable: ptr(true)})
			if err != nil {
				t.Error(err)
			}
			replies <- r
		}()
	}
	seen := map[uint64]bool{}
	for range n {
		r := <-replies
		m, err := packet.ParseMessage(r.Message)
		if err != nil {
			t.Fatal(err)
		}
		if m.Header().Seq != r.Sequence || seen[r.Sequence] {
			t.Errorf("number %d in the reply, %d in the message", r.Sequence, m.Header().Seq)
		}
		seen[r.Sequence] = true
		for _, mode := range []string{api.ModeRegistry, api.ModeKey} {
			q := api.VerifyMessageRequest{Message: r.Message, Mode: mode, Detail: true}
			if mode == api.ModeKey {
				q.Key = r.Fingerprint
			}
			v, err := h.svc.VerifyMessage(h.ctx(), q)
			if err != nil || v.Decision != api.Accept || v.Details.Mode != r.Mode {
				t.Errorf("%s: %+v, %v", mode, v, err)
			}
		}
	}
}

// TestBatchingSetting: what becomes of requests that say, and of those that do not.
func TestBatchingSetting(t *testing.T) {
	h := newHost(t)
	d := h.add("a")
	for _, c := range []struct {
		setting string
		asked   *bool
		want    signature.Mode
	}{
		{"", nil, signature.Direct},
		{"", ptr(true), signature.Batched},
		{"", ptr(false), signature.Direct},
		{api.BatchingAlways, nil, signature.Batched},
		{api.BatchingAlways, ptr(false), signature.Direct},
		{api.BatchingNever, nil, signature.Direct},
		{api.BatchingNever, ptr(true), signature.Direct},
	} {
		e, _ := h.keyring.Get(id(t, "a"))
		changed := *e
		changed.Batching = c.setting
		if err := h.keyring.Put(changed); err != nil {
			t.Fatal(err)
		}
		r := api.SignPacketRequest{Agent: "a", Packet: draft(d.Aliases[0]), Batchable: c.asked}
		for _, out := range h.svc.SignPackets(h.ctx(), []api.SignPacketRequest{r, r}) {
			if out.Error != nil || out.Mode != string(c.want) {
				t.Errorf("%q, asked %v: %+v", c.setting, c.asked, out)
			}
		}
	}
}

// TestBatchedPacketKeepsItsBound: a packet that a batched signature's text would make too large is signed directly.
func TestBatchedPacketKeepsItsBound(t *testing.T) {
	h := newHost(t)
	d := h.add("a")
	long := draft(d.Aliases[0], `,"context":{"x":"`+strings.Repeat("x", packet.MaxTask-2200)+`"}`)
	r := api.SignPacketRequest{Agent: "a", Packet: long, Batchable: ptr(true)}
	for _, out := range h.svc.SignPackets(h.ctx(), []api.SignPacketRequest{r, r}) {
		if out.Error != nil {
			t.Fatal(out.Error.Err())
		}
		if out.Mode != "direct" {
			t.Errorf("%s of %d bytes", out.Mode, len(out.Packet))
		}
		if v, err := h.svc.VerifyPacket(h.ctx(), api.VerifyPacketRequest{Packet: out.Packet}); err != nil || v.Decision != api.Accept {
			t.Errorf("%+v, %v", v, err)
		}
	}
}
