package packet_test

import (
	"crypto/ed25519"
	"testing"

	"github.com/trustd/trustd/packet"
	"github.com/trustd/trustd/signature"
)

// BenchmarkParse is a packet of the usual size up to its signing bytes.
func BenchmarkParse(b *testing.B) {
	wire := vectors(b).signed(0)
	b.ReportAllocs()
	b.SetBytes(int64(len(wire)))
	for b.Loop() {
		t, err := packet.Parse(wire)
		if err != nil {
			b.Fatal(err)
		}
		_ = t.SigningBytes()
	}
}

// BenchmarkParseEverything is a packet that needs each kind of conversion.
func BenchmarkParseEverything(b *testing.B) {
	wire := vectors(b).signed(1)
	b.ReportAllocs()
	b.SetBytes(int64(len(wire)))
	for b.Loop() {
		if _, err := packet.Parse(wire); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkVerify compares parsing and verifying a packet with verifying the signature alone.
func BenchmarkVerify(b *testing.B) {
	v := vectors(b)
	wire, pub := v.signed(0), v.key(b, 0).Key().(ed25519.PublicKey)
	b.Run("packet", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			t, err := packet.Parse(wire)
			if err != nil {
				b.Fatal(err)
			}
			sig, err := signature.ParseText(1, t.SignatureText)
			if err != nil || !ed25519.Verify(pub, t.SigningBytes(), sig) {
				b.Fatal("the vector does not verify")
			}
		}
	})
	b.Run("raw", func(b *testing.B) {
		msg := []byte(v.Packets[0].SigningBytes)
		sig, err := signature.ParseText(1, v.Packets[0].Signature)
		if err != nil {
			b.Fatal(err)
		}
		for b.Loop() {
			if !ed25519.Verify(pub, msg, sig) {
				b.Fatal("the vector does not verify")
			}
		}
	})
}

// BenchmarkComplete is the way from a caller's draft to the bytes to sign.
func BenchmarkComplete(b *testing.B) {
	text, fill := minimalDraft, testFill(b)
	b.ReportAllocs()
	for b.Loop() {
		d, err := packet.ParseDraft([]byte(text))
		if err != nil {
			b.Fatal(err)
		}
		if _, err := d.Complete(fill); err != nil {
			b.Fatal(err)
		}
	}
}
