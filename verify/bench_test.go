package verify_test

import (
	"crypto/ed25519"
	"slices"
	"testing"
	"time"

	"github.com/trustd/trustd/packet"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/verify"
)

// BenchmarkGate compares what a packet costs from its text to the decision with the bare signature check in it. The
// two alternate and their medians are shown, so that a noisy machine disturbs both alike; "ratio" is their quotient.
func BenchmarkGate(b *testing.B) {
	w, raw := goldenWorld(b)
	p, err := packet.Parse(raw)
	if err != nil {
		b.Fatal(err)
	}
	pub := seedKey(b, seed1).pub
	key := pub.Key().(ed25519.PublicKey)
	sig, err := signature.ParseText(pub.Algorithm(), p.SignatureText)
	if err != nil {
		b.Fatal(err)
	}
	in := goldenInput(w, nil)
	b.ReportAllocs()
	var bare, gate []time.Duration
	for b.Loop() {
		t0 := time.Now()
		ok := ed25519.Verify(key, p.SigningBytes(), sig)
		t1 := time.Now()
		in.Packet, err = packet.Parse(raw)
		if err != nil {
			b.Fatal(err)
		}
		_, refusal := verify.Check(in)
		t2 := time.Now()
		if !ok || refusal != nil {
			b.Fatal(ok, refusal)
		}
		bare, gate = append(bare, t1.Sub(t0)), append(gate, t2.Sub(t1))
	}
	b.ReportMetric(median(bare), "ns/raw")
	b.ReportMetric(median(gate), "ns/gate")
	b.ReportMetric(median(gate)/median(bare), "ratio")
}

func median(d []time.Duration) float64 {
	slices.Sort(d)
	return float64(d[len(d)/2].Nanoseconds())
}
