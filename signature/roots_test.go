package signature_test

import (
	"bytes"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signature"
)

// nothing is a signature that no key has made, so that only the cache can take it for good.
var nothing = make([]byte, 64)

// TestRootsAnswer: the cache answers for what was put in, and for nothing that differs in key, size, root or signature.
func TestRootsAnswer(t *testing.T) {
	l := unsigned(t, 6)
	pub, other := l.key.public, pairs()["p256"].public // its signatures have the same length
	roots := signature.NewRoots(4)
	wantInvalid(t, "before", l.sign(2).Verify(pub, l.subjects[2], roots))
	roots.Keep(pub, 6, l.tree.Root(), nothing)
	for i := range 6 {
		if err := l.sign(i).Verify(pub, l.subjects[i], roots); err != nil {
			t.Errorf("leaf %d of a root that is known: %v", i, err)
		}
	}
	wantInvalid(t, "another key", l.sign(2).Verify(other, l.subjects[2], roots))
	wantInvalid(t, "no key", l.sign(2).Verify(ident.PublicKey{}, l.subjects[2], roots))
	wantInvalid(t, "another message", l.sign(2).Verify(pub, l.subjects[3], roots))
	for i := range nothing {
		bent := bytes.Clone(nothing)
		bent[i] = 1
		wantInvalid(t, "another signature", l.tree.Sign(2, l.salts[2], bent).Verify(pub, l.subjects[2], roots))
	}
	wantInvalid(t, "a shorter signature", l.tree.Sign(2, l.salts[2], nothing[:63]).Verify(pub, l.subjects[2], roots))
	wantInvalid(t, "no signature", l.tree.Sign(2, l.salts[2], nil).Verify(pub, l.subjects[2], roots))
	wantInvalid(t, "another cache", l.sign(2).Verify(pub, l.subjects[2], signature.NewRoots(4)))
	wantInvalid(t, "no cache", l.sign(2).Verify(pub, l.subjects[2], nil))
	size := signature.NewRoots(4)
	size.Keep(pub, 7, l.tree.Root(), nothing)
	wantInvalid(t, "another size", l.sign(2).Verify(pub, l.subjects[2], size))
	wantInvalid(t, "a direct signature", signature.NewDirect(nothing).Verify(pub, l.subjects[2], roots))
	if roots.Len() != 1 {
		t.Errorf("%d roots are remembered", roots.Len())
	}
}

// TestRootsDoNotAlias: what is remembered is not what the caller goes on writing to.
func TestRootsDoNotAlias(t *testing.T) {
	l, roots := unsigned(t, 2), signature.NewRoots(4)
	raw := bytes.Clone(nothing)
	roots.Keep(l.key.public, 2, l.tree.Root(), raw)
	raw[0] = 1
	wantInvalid(t, "changed after it was kept", l.tree.Sign(0, l.salts[0], raw).Verify(l.key.public, l.subjects[0], roots))
	if err := l.sign(0).Verify(l.key.public, l.subjects[0], roots); err != nil {
		t.Error(err)
	}
}

// TestRootsAreBounded: the cache holds no more than it was made for, and keeps what is in use.
func TestRootsAreBounded(t *testing.T) {
	if (*signature.Roots)(nil).Len() != 0 {
		t.Error("no cache remembers something")
	}
	l := unsigned(t, 2)
	used := func(r *signature.Roots) error { return l.sign(0).Verify(l.key.public, l.subjects[0], r) }
	for _, n := range []int{-1, 0, 1, 2, 3, 10, 64} {
		r := signature.NewRoots(n)
		r.Keep(l.key.public, 2, l.tree.Root(), nothing)
		for i := range 1000 {
			r.Keep(l.key.public, 2, signature.Hash{byte(i), byte(i >> 8), 1}, nothing)
			r.Keep(l.key.public, 2, signature.Hash{byte(i), byte(i >> 8), 1}, nothing)
			if r.Len() > max(n, 2) {
				t.Fatalf("a cache of %d holds %d", n, r.Len())
			}
			if err := used(r); n >= 4 && err != nil {
				t.Fatalf("a cache of %d forgot, after %d others, what is used all the time: %v", n, i, err)
			}
		}
		for i := range 2 * max(n, 2) {
			r.Keep(l.key.public, 2, signature.Hash{byte(i), 2}, nothing)
		}
		wantInvalid(t, "not used for long", used(r))
	}
}

// TestRootsAtOnce has many goroutines verify true and false signatures with one small cache.
func TestRootsAtOnce(t *testing.T) {
	var lots []lot
	for _, key := range []string{"ed25519", "p256", "rsa"} {
		lots = append(lots, newLot(t, key, 4), newLot(t, key, 300))
	}
	roots := signature.NewRoots(4)
	var all sync.WaitGroup
	for g := range 8 {
		all.Go(func() {
			random := rand.New(rand.NewPCG(3, uint64(g)))
			for range 200 {
				l := lots[random.IntN(len(lots))]
				i := random.IntN(len(l.subjects))
				if err := verdict(l.key, l.sign(i).Text(), l.subjects[i], roots); err != nil {
					t.Errorf("a true signature: %v", err)
				}
				b := bytesOf(t, l.sign(i).Text())
				b[random.IntN(len(b))] ^= 1 << random.IntN(8)
				wantRefused(t, "a false signature", verdict(l.key, textOf(b), l.subjects[i], roots))
				if n := roots.Len(); n > 4 {
					t.Errorf("%d roots", n)
				}
			}
		})
	}
	all.Wait()
}
