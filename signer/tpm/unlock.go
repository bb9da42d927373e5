package tpm

import (
	"context"

	"github.com/trustd/trustd/signer"
)

// Unlock asks the TPM once more for what it has refused: first its storage hierarchy, then one of the keys whose own
// authorisation it refused. What it grants is forgotten as a refusal, for the other keys too, each of which then asks
// once for itself. A refusal ends it and stands, so that one call costs one attempt at most. Any other failure leaves
// all as it was.
func (b *Backend) Unlock(ctx context.Context) error {
	b.mu.Lock()
	locked := make([]*key, 0, len(b.locked))
	for k := range b.locked {
		locked = append(locked, k)
	}
	b.mu.Unlock()
	err := b.do(ctx, func(ch *chip) error {
		if err := ch.unlock(); err != nil {
			return err
		}
		for _, k := range locked {
			_, err := ch.sign(k.object, k.pub.Algorithm(), digest(k.pub.Algorithm(), probe))
			if classify(err) == signer.KeyGone {
				continue // it says nothing of the others
			}
			if err != nil {
				return err
			}
			break
		}
		return ch.ping()
	})
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, k := range locked {
		k.refused.Store(nil)
		delete(b.locked, k)
	}
	return nil
}

// unlock uses the storage hierarchy again that was refused: it makes a key that is not kept. Whatever keeps it from
// finding out, the refusal stands until it was granted.
func (ch *chip) unlock() error {
	old := ch.notes.refused.Swap(nil)
	if old == nil {
		return nil
	}
	_, err := ch.create(kinds[preferred[0]].template()) // notes a refusal anew
	if err != nil {
		ch.notes.refused.CompareAndSwap(nil, old)
	}
	return err
}

// lock notes that the TPM refused the key's own authorisation.
func (b *Backend) lock(k *key, err error) {
	k.refused.Store(known(err))
	b.mu.Lock()
	b.locked[k] = struct{}{}
	b.mu.Unlock()
	b.log.Error("the TPM refuses a key's authorisation; it is not asked again until an operator unlocks it",
		"key", k.id.String(), "cause", err)
}

var (
	_ signer.Unlocker = (*Backend)(nil)
	_ signer.Parallel = (*Backend)(nil)
)

// Parallel returns 1: a TPM does one thing at a time.
func (b *Backend) Parallel() int { return 1 }
