package signature

import (
	"sync"

	"github.com/trustd/trustd/ident"
)

// Roots remembers, up to a bound, the roots of batches whose signature was found good. It says nothing about whether
// the key may be believed: that is asked anew each time. It is safe for concurrent use; nil remembers nothing.
type Roots struct {
	half int

	mu  sync.RWMutex
	cur map[checked]struct{}
	old map[checked]struct{} // the generation before: what is used again moves to cur
}

// checked is a statement, by its parts, and the device's signature of it. The signature is part of the name because a
// statement may have several that are good: with ECDSA anybody makes a second one out of the first (r, n-s). Neither
// answers for the other, and none pushes the other out.
type checked struct {
	key  ident.KeyID
	root Hash
	size int
	raw  string
}

// NewRoots returns a cache of at most n roots, and never fewer than two.
func NewRoots(n int) *Roots {
	return &Roots{half: max(n/2, 1), cur: map[checked]struct{}{}}
}

func (r *Roots) holds(pub ident.PublicKey, size int, root Hash, raw []byte) bool {
	if r == nil {
		return false
	}
	r.mu.RLock()
	_, ok := r.cur[checked{pub.ID(), root, size, string(raw)}]
	aged := false
	if !ok && len(r.old) > 0 {
		_, aged = r.old[checked{pub.ID(), root, size, string(raw)}]
	}
	r.mu.RUnlock()
	if aged {
		r.keep(pub, size, root, raw)
	}
	return ok || aged
}

func (r *Roots) keep(pub ident.PublicKey, size int, root Hash, raw []byte) {
	if r == nil {
		return
	}
	k := checked{pub.ID(), root, size, string(raw)}
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.cur[k]; ok { // by another goroutine, meanwhile
		return
	}
	if len(r.cur) >= r.half {
		r.old, r.cur = r.cur, make(map[checked]struct{}, r.half)
	}
	r.cur[k] = struct{}{}
	delete(r.old, k)
}

// Len returns how many roots are remembered.
func (r *Roots) Len() int {
	if r == nil {
		return 0
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	return len(r.cur) + len(r.old)
}
