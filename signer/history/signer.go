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

var _ signer.Signer = (*Signer)(nil)

// Wrap returns a Signer over base. Nobody else may sign with base.
func (s *Store) Wrap(base signer.Signer) *Signer {
	return &Signer{store: s, base: base, key: base.Public().ID()}
}

// Public returns the public key.
func (s *Signer) Public() ident.PublicKey { return s.base.Public() }

// Reserve returns the key's next sequence number, for a message that holds it.
func (s *Signer) Reserve() (uint64, error) { return s.store.Reserve(s.key) }

// Note puts a message that holds a number from Reserve into the history, so that it may be signed. It answers
// ErrLapsed where too much was reserved meanwhile.
func (s *Signer) Note(number uint64, msg []byte) error {
	return s.store.Record(s.key, number, sha256.Sum256(msg))
}

// Sign signs a message that holds no sequence number.
func (s *Signer) Sign(ctx context.Context, msg []byte) ([]byte, error) {
	out := s.SignEach(ctx, [][]byte{msg}, make([]uint64, 1))
	return out[0].Signature, out[0].Err
}

// SignEach signs messages. numbers has one place for each: that of a message that Note has put into the history, or
// 0; then the message is put there first and its number into its place, which stays 0 where that failed.
func (s *Signer) SignEach(ctx context.Context, msgs [][]byte, numbers []uint64) []signer.Result {
	digests := make([][sha256.Size]byte, len(msgs))
	for i, msg := range msgs {
		if numbers[i] == 0 {
			digests[i] = sha256.Sum256(msg)
		}
	}
	if err := s.enter(ctx, digests, numbers); err != nil {
		out := make([]signer.Result, len(msgs))
		for i := range out {
			out[i].Err = err
		}
		return out
	}
	return signer.SignAll(ctx, s.base, msgs)
}

// SignOver signs a statement that stands for messages, which are numbered as by SignEach. Of each message that is not
// in the history yet, digests has the SHA-256. The statement itself is no entry: who holds its signature can show
// none but these messages by it.
func (s *Signer) SignOver(ctx context.Context, digests [][sha256.Size]byte, numbers []uint64, statement []byte) ([]byte, error) {
	if err := s.enter(ctx, digests, numbers); err != nil {
		return nil, err
	}
	return s.base.Sign(ctx, statement)
}

// enter puts what has no number yet into the history, as many messages at a time as that takes.
func (s *Signer) enter(ctx context.Context, digests [][sha256.Size]byte, numbers []uint64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	chunk := make([][sha256.Size]byte, 0, min(len(digests), MaxEnter))
	at := make([]int, 0, cap(chunk))
	flush := func() error {
		seqs, err := s.store.Enter(s.key, chunk)
		if err != nil {
			return err
		}
		for i, n := range seqs {
			numbers[at[i]] = n
		}
		chunk, at = chunk[:0], at[:0]
		return nil
	}
	for i := range digests {
		if numbers[i] != 0 {
			continue
		}
		if chunk, at = append(chunk, digests[i]), append(at, i); len(chunk) == cap(chunk) {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	return flush()
}
