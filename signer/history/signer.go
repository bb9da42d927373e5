package history

import (
	"context"
	"crypto/sha256"

	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signer"
)

// A Signer signs with a key and puts every message into the key's history before its signature is made.
type Signer struct {
	store *Store
	base  signer.Signer
	key   ident.KeyID
}

var _ signer.BatchSigner = (*Signer)(nil)

// Wrap returns a Signer over base. Nobody else may sign with base.
func (s *Store) Wrap(base signer.Signer) *Signer {
	return &Signer{store: s, base: base, key: base.Public().ID()}
}

// Public returns the public key.
func (s *Signer) Public() ident.PublicKey { return s.base.Public() }

// Reserve returns the key's next sequence number, for a message that holds it.
func (s *Signer) Reserve() (uint64, error) { return s.store.Reserve(s.key) }

// Sign signs a message that holds no sequence number.
func (s *Signer) Sign(ctx context.Context, msg []byte) ([]byte, error) {
	out := s.SignBatch(ctx, [][]byte{msg})
	return out[0].Signature, out[0].Err
}

// SignAs signs a message under a number from Reserve.
func (s *Signer) SignAs(ctx context.Context, seq uint64, msg []byte) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := s.store.Record(s.key, seq, sha256.Sum256(msg)); err != nil {
		return nil, err
	}
	return s.base.Sign(ctx, msg)
}

// SignBatch signs messages that hold no sequence numbers.
func (s *Signer) SignBatch(ctx context.Context, msgs [][]byte) []signer.Result {
	_, out := s.SignNumbered(ctx, msgs)
	return out
}

// SignNumbered is SignBatch, and says under which number each message stands in the history; 0 for one that did not
// get there.
func (s *Signer) SignNumbered(ctx context.Context, msgs [][]byte) ([]uint64, []signer.Result) {
	seqs, out := make([]uint64, 0, len(msgs)), make([]signer.Result, 0, len(msgs))
	// A batch may be larger than a block of numbers, or than what the log takes at once.
	for chunk := min(1024, int(s.store.cfg.Block)); len(msgs) > 0; {
		n := min(len(msgs), chunk)
		numbers, results := s.signChunk(ctx, msgs[:n])
		seqs, out = append(seqs, numbers...), append(out, results...)
		msgs = msgs[n:]
	}
	return seqs, out
}

func (s *Signer) signChunk(ctx context.Context, msgs [][]byte) ([]uint64, []signer.Result) {
	if err := ctx.Err(); err != nil {
		return make([]uint64, len(msgs)), failed(len(msgs), err)
	}
	digests := make([][sha256.Size]byte, len(msgs))
	for i, msg := range msgs {
		digests[i] = sha256.Sum256(msg)
	}
	seqs, err := s.store.Enter(s.key, digests)
	if err != nil {
		return make([]uint64, len(msgs)), failed(len(msgs), err)
	}
	return seqs, signer.SignAll(ctx, s.base, msgs)
}

func failed(n int, err error) []signer.Result {
	out := make([]signer.Result, n)
	for i := range out {
		out[i].Err = err
	}
	return out
}
