//go:build cgo

package pkcs11

import (
	"context"

	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
)

// A Raw signs with nothing around C_SignInit and C_Sign: no verification, no repair, no deadline. It is what
// benchmarks compare a Signer with, and never signs for anybody.
type Raw struct {
	link *link
	slot slot
	alg  ident.Algorithm
	key  objectHandle
}

// OpenRaw opens a session of its own for one key of a connected backend. Use it from one goroutine.
func (b *Backend) OpenRaw(ctx context.Context, id signer.ID) (*Raw, error) {
	r, err := do(ctx, b, func(s *slot) (*Raw, error) {
		e, err := s.link.lookup(s, id)
		if err != nil {
			return nil, err
		}
		h, err := s.link.mod.OpenSession(s.link.slot, sessionFlags)
		if err != nil {
			return nil, failed("C_OpenSession", err)
		}
		return &Raw{link: s.link, slot: slot{session: h}, alg: e.info.Public.Algorithm(), key: e.handle}, nil
	})
	return r, err
}

// Sign returns an unverified signature.
func (r *Raw) Sign(msg []byte) ([]byte, error) {
	return r.link.sign(&r.slot, r.alg, r.key, signature.Digest(r.alg, msg))
}
