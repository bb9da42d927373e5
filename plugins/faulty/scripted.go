package main

import (
	"context"
	"maps"
	"slices"
	"sync"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signer"
)

// scripted is a backend whose operations meet the script.
type scripted struct {
	signer.Backend
	player   *player
	parallel int // 0: as many as the backend says
	// loses says that the token's place is the script's matter here; other layers have their own way.
	loses bool

	mu     sync.Mutex
	counts map[signer.Class]uint64 // of the failures that the script made here
}

var (
	_ signer.Importer       = (*scripted)(nil)
	_ signer.Parallel       = (*scripted)(nil)
	_ signer.FailureCounter = (*scripted)(nil)
	_ signer.Unlocker       = (*scripted)(nil)
)

// classed is an error of a class, as devices have them.
type classed struct{ class signer.Class }

func (c *classed) Error() string             { return "scripted " + string(c.class) }
func (c *classed) SignerClass() signer.Class { return c.class }

// failing returns what a caller sees of a failure of this class.
func failing(c signer.Class) error { return fault.Wrap(c.Code(), &classed{c}, "scripted") }

// begin plays an operation. The operation ends with done, or at once with err.
func (b *scripted) begin(ctx context.Context, operation string) (f fate, err error) {
	f = b.player.begin(ctx, operation)
	class := f.class
	if b.loses && class == "" {
		switch {
		case f.token == "gone":
			class = signer.TokenLost
		case f.token != "" && slices.Contains([]string{"Sign", "Open"}, operation):
			class = signer.KeyGone
		}
	}
	switch {
	case f.err != nil:
		err = fault.From(f.err)
	case class != "":
		b.mu.Lock()
		b.counts[class]++
		b.mu.Unlock()
		err = failing(class)
	}
	if err != nil {
		f.done()
	}
	return f, err
}

// play runs an operation that the script may fail.
func play[T any](ctx context.Context, b *scripted, operation string, run func(fate) (T, error)) (T, error) {
	f, err := b.begin(ctx, operation)
	if err != nil {
		var zero T
		return zero, err
	}
	defer f.done()
	return run(f)
}

// Describe implements signer.Backend.
func (b *scripted) Describe(ctx context.Context) signer.Description {
	d := b.Backend.Describe(ctx)
	if b.loses && b.player.script().token == "gone" {
		d.State, d.Problem, d.Remedy = signer.Degraded, "the token is gone", "plug it in"
	}
	return d
}

func (b *scripted) wrap(k signer.Key, err error) (signer.Key, error) {
	if err != nil {
		return nil, err
	}
	return &scriptedKey{k, b}, nil
}

// Generate implements signer.Backend.
func (b *scripted) Generate(ctx context.Context, id signer.ID, alg ident.Algorithm) (signer.Key, error) {
	return play(ctx, b, "Generate", func(fate) (signer.Key, error) { return b.wrap(b.Backend.Generate(ctx, id, alg)) })
}

// Open implements signer.Backend.
func (b *scripted) Open(ctx context.Context, id signer.ID, pub ident.PublicKey) (signer.Key, error) {
	return play(ctx, b, "Open", func(fate) (signer.Key, error) { return b.wrap(b.Backend.Open(ctx, id, pub)) })
}

// Find implements signer.Backend.
func (b *scripted) Find(ctx context.Context, id signer.ID) (signer.KeyInfo, error) {
	return play(ctx, b, "Find", func(f fate) (signer.KeyInfo, error) {
		if b.loses && f.token != "" {
			return signer.KeyInfo{}, fault.New(fault.KeyNotFound, "no such key")
		}
		return b.Backend.Find(ctx, id)
	})
}

// Keys implements signer.Backend.
func (b *scripted) Keys(ctx context.Context) ([]signer.KeyInfo, error) {
	return play(ctx, b, "Keys", func(f fate) ([]signer.KeyInfo, error) {
		if b.loses && f.token != "" {
			return nil, nil
		}
		return b.Backend.Keys(ctx)
	})
}

// Destroy implements signer.Backend.
func (b *scripted) Destroy(ctx context.Context, id signer.ID) error {
	_, err := play(ctx, b, "Destroy", func(fate) (struct{}, error) { return struct{}{}, b.Backend.Destroy(ctx, id) })
	return err
}

// Import implements signer.Importer.
func (b *scripted) Import(ctx context.Context, id signer.ID, pkcs8 []byte) (signer.Key, error) {
	return play(ctx, b, "Import", func(fate) (signer.Key, error) {
		i, ok := b.Backend.(signer.Importer)
		if !ok {
			return nil, fault.New(fault.Unsupported, "this backend imports no keys")
		}
		return b.wrap(i.Import(ctx, id, pkcs8))
	})
}

// Parallel implements signer.Parallel.
func (b *scripted) Parallel() int {
	if p, ok := b.Backend.(signer.Parallel); ok && b.parallel == 0 {
		return p.Parallel()
	}
	return max(b.parallel, 1)
}

// Failures implements signer.FailureCounter: those of the backend, and those that the script made.
func (b *scripted) Failures() map[signer.Class]uint64 {
	out := map[signer.Class]uint64{}
	if c, ok := b.Backend.(signer.FailureCounter); ok {
		maps.Copy(out, c.Failures())
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for class, n := range b.counts {
		out[class] += n
	}
	return out
}

// Unlock implements signer.Unlocker.
func (b *scripted) Unlock(ctx context.Context) error {
	if u, ok := b.Backend.(signer.Unlocker); ok {
		return u.Unlock(ctx)
	}
	return fault.New(fault.Unsupported, "this backend is never locked")
}

type scriptedKey struct {
	signer.Key
	in *scripted
}

// Sign implements signer.Signer, but may return what is no signature.
func (k *scriptedKey) Sign(ctx context.Context, msg []byte) ([]byte, error) {
	return play(ctx, k.in, "Sign", func(f fate) ([]byte, error) {
		sig, err := k.Key.Sign(ctx, msg)
		if f.corrupt && len(sig) > 0 {
			sig[len(sig)/2] ^= 1
		}
		return sig, err
	})
}
