package service_test

import (
	"testing"

	"github.com/trustd/trustd/api"
)

// BenchmarkSignPacket shows what the service adds to a software signature, its verification included.
func BenchmarkSignPacket(b *testing.B) {
	h := newHost(b)
	d := h.add("a")
	ctx := h.ctx()
	r := api.SignPacketRequest{Agent: "a", Packet: draft(d.Aliases[0])}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := h.svc.SignPacket(ctx, r); err != nil {
			b.Fatal(err)
		}
	}
}
