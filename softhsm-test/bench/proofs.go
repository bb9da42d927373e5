//go:build cgo

package main

import (
	"crypto/ed25519"
	"errors"
	"fmt"

	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signature"
)

// proofSize is how large the batch is whose proofs are weighed and checked.
const proofSize = 4096

// proofs measures what a batched signature weighs, and what it costs to check one whose root is known, beside
// ed25519.Verify of the same message of 1 KiB.
func (b *bench) proofs() error {
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		return err
	}
	pub, err := ident.NewPublicKey(public)
	if err != nil {
		return err
	}
	agent, err := ident.ParseAgentID("agent")
	if err != nil {
		return err
	}
	subject := signature.Subject{Kind: signature.KindPacket, Agent: agent, Message: make([]byte, 1024)}
	hashes := make([]signature.Hash, proofSize)
	salt := func(i int) signature.Salt { return signature.Salt{byte(i), byte(i >> 8)} }
	for i := range hashes {
		hashes[i] = signature.Leaf(subject, salt(i))
	}
	tree := signature.NewTree(hashes)
	raw := ed25519.Sign(private, signature.Statement(pub, tree.Size(), tree.Root()))
	direct := ed25519.Sign(private, subject.Message)
	roots := signature.NewRoots(16)
	sigs, texts, longest := make([]signature.Signature, proofSize), make([]string, proofSize), 0
	for i := range sigs {
		sigs[i] = tree.Sign(i, salt(i), raw)
		texts[i] = sigs[i].Text()
		longest = max(longest, len(texts[i]))
		if err := sigs[i].Verify(pub, subject, roots); err != nil {
			return fmt.Errorf("leaf %d: %w", i, err)
		}
	}
	// base64url without padding, after the prefix.
	bytes := float64((longest - len(signature.BatchPrefix)) * 3 / 4)
	b.add("batch/proof-size/4096/bytes", bytes, "B", "limit", 480, "<= 480 bytes", met(bytes <= 480))
	b.add("batch/proof-size/4096/text", float64(longest), "chars", "limit", 660, "<= 660 characters", met(longest <= 660))

	at := 0
	each := func(n int, check func(i int) error) func() error {
		return func() error {
			for range n {
				at = (at + 1) % proofSize
				if err := check(at); err != nil {
					return err
				}
			}
			return nil
		}
	}
	const some = 256
	c := newContest()
	c.enter("raw", each(some, func(int) error {
		if !ed25519.Verify(public, subject.Message, direct) {
			return errors.New("the raw signature does not verify")
		}
		return nil
	}))
	c.enter("cached", each(some, func(i int) error { return sigs[i].Verify(pub, subject, roots) }))
	c.enter("text", each(some, func(i int) error {
		s, err := signature.Parse(ident.Ed25519, texts[i])
		if err != nil {
			return err
		}
		return s.Verify(pub, subject, roots)
	}))
	c.enter("first", each(some, func(i int) error { return sigs[i].Verify(pub, subject, nil) }))
	if err := c.run(40, 2); err != nil {
		return err
	}
	base := c.p50("raw") / some
	for _, r := range []struct {
		name, row, target string
		most              float64
	}{
		{"cached", "verify/cached-root/4096/signature", ">= 15 x faster than ed25519.Verify", 1. / 15},
		{"text", "verify/cached-root/4096/text", ">= 15 x faster than ed25519.Verify", 1. / 15},
		{"first", "verify/new-root/4096/signature", "", 0},
	} {
		got := c.p50(r.name) / some
		var ok *bool
		if r.target != "" {
			ok = met(got <= r.most*base)
		}
		b.add(r.row, got, "us", "ed25519.Verify", base, r.target, ok)
	}
	return nil
}
