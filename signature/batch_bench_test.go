package signature_test

import (
	"bytes"
	"crypto/ed25519"
	"strconv"
	"testing"

	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signature"
)

func benchSubject(tb testing.TB) signature.Subject {
	tb.Helper()
	agent, err := ident.ParseAgentID("research-agent")
	if err != nil {
		tb.Fatal(err)
	}
	return signature.Subject{Kind: signature.KindPacket, Agent: agent, Message: bytes.Repeat([]byte{'x'}, 1024)}
}

// BenchmarkLeaf hashes a subject of 1 KiB.
func BenchmarkLeaf(b *testing.B) {
	s := benchSubject(b)
	b.ReportAllocs()
	for b.Loop() {
		signature.Leaf(s, signature.Salt{1})
	}
}

func benchLeaves(n int) []signature.Hash {
	leaves := make([]signature.Hash, n)
	for i := range leaves {
		leaves[i][0], leaves[i][1] = byte(i), byte(i>>8)
	}
	return leaves
}

// BenchmarkTree builds a tree over hashed leaves and takes every signature out of it.
func BenchmarkTree(b *testing.B) {
	raw := make([]byte, 64)
	for _, n := range []int{64, 1024, 16384} {
		leaves := benchLeaves(n)
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				t := signature.NewTree(leaves)
				for i := range n {
					t.Sign(i, signature.Salt{}, raw)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(n*b.N), "ns/leaf")
		})
	}
}

// BenchmarkVerifyCachedRoot verifies one packet of 1 KiB out of a batch of 4,096 whose root is known, from its text on,
// and beside it what it stands for: ed25519.Verify of the packet.
func BenchmarkVerifyCachedRoot(b *testing.B) {
	k := pairs()["ed25519"]
	s := benchSubject(b)
	leaves := benchLeaves(4096)
	leaves[1234] = signature.Leaf(s, signature.Salt{9})
	tree := signature.NewTree(leaves)
	text := tree.Sign(1234, signature.Salt{9}, k.sign(signature.Statement(k.public, tree.Size(), tree.Root()))).Text()
	roots := signature.NewRoots(64)
	verify := func(b *testing.B) {
		sig, err := signature.Parse(ident.Ed25519, text)
		if err == nil {
			err = sig.Verify(k.public, s, roots)
		}
		if err != nil {
			b.Fatal(err)
		}
	}
	b.Run("cached", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			verify(b)
		}
	})
	b.Run("parsed", func(b *testing.B) {
		sig, err := signature.Parse(ident.Ed25519, text)
		if err != nil {
			b.Fatal(err)
		}
		b.ReportAllocs()
		for b.Loop() {
			if err := sig.Verify(k.public, s, roots); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("parallel", func(b *testing.B) {
		b.RunParallel(func(p *testing.PB) {
			for p.Next() {
				verify(b)
			}
		})
	})
	b.Run("ed25519", func(b *testing.B) {
		pub, sig := k.public.Key().(ed25519.PublicKey), k.sign(s.Message)
		b.ReportAllocs()
		for b.Loop() {
			if !ed25519.Verify(pub, s.Message, sig) {
				b.Fatal("invalid")
			}
		}
	})
}

// BenchmarkText writes the text of a signature out of a batch of 4,096.
func BenchmarkText(b *testing.B) {
	sig := signature.NewTree(benchLeaves(4096)).Sign(1234, signature.Salt{}, make([]byte, 64))
	b.ReportAllocs()
	for b.Loop() {
		_ = sig.Text()
	}
}
