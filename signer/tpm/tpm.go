// Package tpm is the key backend on a TPM 2.0: keys are made by the chip under its storage root key, kept as blobs
// that only this chip can open, and loaded into its few slots when they sign.
package tpm

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/tpmdev"
	"github.com/trustd/trustd/signer"
)

// Config says which TPM to use and where the key blobs lie. The durations and Queue may be zero.
type Config struct {
	Device         string        // device:/dev/tpmrm0 or swtpm:path=/run/swtpm.sock
	Dir            string        // folder of the key blobs, 0700; made if missing
	CommandTimeout time.Duration // after which a TPM counts as hung
	KeyTimeout     time.Duration // the same for making a key
	Queue          int           // requests that may wait
	Log            *slog.Logger
}

// A Backend is one TPM. It implements signer.Backend.
//
// A TPM that is not there, or goes away, costs the requests of that moment an error with the code device_lost; the
// Backend connects again by itself and loads its keys anew.
type Backend struct {
	dev   *tpmdev.Device
	store *store
	log   *slog.Logger
	chip  *chip // touched inside a job of dev only
	notes *notes

	badPSS atomic.Bool // this chip's PSS salts do not have the length that we verify

	mu     sync.Mutex
	keys   map[signer.ID]*key          // what Generate and Open have handed out
	locked map[*key]struct{}           // those whose authorisation the TPM refused
	busy   map[signer.ID]chan struct{} // ids under which something is being made, opened or destroyed
}

// Open returns the backend. It checks the folder and does not touch the TPM, so that a TPM that is missing cannot
// keep the daemon from starting. One goroutine runs until Close.
func Open(conf Config) (*Backend, error) {
	if conf.Log == nil {
		conf.Log = slog.New(slog.DiscardHandler)
	}
	st, err := openStore(conf.Dir)
	if err != nil {
		return nil, err
	}
	n := newNotes(conf.Log)
	dev, err := tpmdev.Open(tpmdev.Config{
		Device: conf.Device, CommandTimeout: conf.CommandTimeout, KeyTimeout: conf.KeyTimeout,
		Queue: conf.Queue, Log: conf.Log, OnFailure: n.device,
	})
	if err != nil {
		return nil, err
	}
	b := &Backend{
		dev: dev, store: st, log: conf.Log, chip: &chip{notes: n}, notes: n,
		keys: map[signer.ID]*key{}, locked: map[*key]struct{}{}, busy: map[signer.ID]chan struct{}{},
	}
	dev.OnRelease(b.chip.release)
	return b, nil
}

// Device returns the TPM, for other users of the same chip.
func (b *Backend) Device() *tpmdev.Device { return b.dev }

// Close finishes what is in flight, flushes what is loaded and lets the TPM go.
func (b *Backend) Close() error { return b.dev.Close() }

// do runs f on the TPM. A connection that turns out to have broken since it was last used, or on which the TPM and we
// do not understand each other any more, is made anew, once. f may still run when do returns an error.
func (b *Backend) do(ctx context.Context, f func(*chip) error) error {
	run := func(c *tpmdev.Conn) error { return b.chip.run(c, f) }
	err := b.dev.Do(ctx, run)
	if errors.Is(err, errProof) || errors.Is(err, tpmdev.ErrLost) && !errors.Is(err, tpmdev.ErrAbsent) {
		err = b.dev.Do(ctx, run)
	}
	return report(err)
}

// ask is do for a job with a result.
func ask[R any](ctx context.Context, b *Backend, f func(*chip) (R, error)) (R, error) {
	var out, none R
	err := b.do(ctx, func(ch *chip) error {
		r, err := f(ch)
		out = r
		return err
	})
	if err != nil {
		return none, err
	}
	return out, nil
}

// Generate makes a key on the TPM. Its first signature is made and verified before the key is kept: a chip may
// claim an algorithm and use it in a way that nobody else verifies.
func (b *Backend) Generate(ctx context.Context, id signer.ID, alg ident.Algorithm) (signer.Key, error) {
	done, err := b.claim(ctx, id)
	if err != nil {
		return nil, err
	}
	defer done()
	return b.enrol(ctx, id, alg, func(ch *chip) (*object, error) {
		return ch.create(kinds[alg].template())
	})
}

// probe is what a key signs to show that it can.
var probe = []byte("trustd: the first signature of a key\x00")

// A maker brings a new key into being on the TPM.
type maker func(*chip) (*object, error)

// enrol makes a key, tries it out and stores it. The caller has claimed the id.
func (b *Backend) enrol(ctx context.Context, id signer.ID, alg ident.Algorithm, create maker) (*key, error) {
	if used, err := b.store.has(id); err != nil {
		return nil, err
	} else if used {
		return nil, fault.New(fault.AlreadyExists, "the TPM backend has a key of this id")
	}
	var made *object
	var grade signer.Grade
	var sig []byte
	err := b.do(ctx, func(ch *chip) error {
		if !ch.facts.offers(alg) || alg.Wire() == "PS256" && b.badPSS.Load() {
			return b.unsupported(ch.facts, alg)
		}
		o, err := create(ch)
		if classify(err) == signer.CallerError {
			return fault.Wrap(fault.AlgorithmUnsupported, err, "this TPM refuses %s keys, against what it says of itself", alg)
		}
		if err != nil {
			return err
		}
		s, err := ch.sign(o, alg, digest(alg, probe))
		made, sig, grade = o, s, ch.facts.grade(b.dev.Address())
		return err
	})
	if err != nil {
		return nil, err
	}
	pub, err := publicKey(&made.area)
	if err != nil || pub.Algorithm() != alg {
		return nil, fault.Wrap(fault.DeviceDead, err, "the TPM made another key than it was asked for")
	}
	k := &key{backend: b, id: id, object: made, pub: pub, grade: grade, origin: signer.OriginDevice}
	if !made.area.ObjectAttributes.SensitiveDataOrigin {
		k.origin = signer.OriginImported
	}
	if err := k.tryOut(probe, sig); err != nil {
		b.discard(ctx, made)
		return nil, err
	}
	if err := b.store.put(id, stored{object: made, pub: pub, origin: k.origin}); err != nil {
		b.discard(ctx, made)
		return nil, err
	}
	return b.keep(k), nil
}

// unsupported names what this TPM can do instead.
func (b *Backend) unsupported(f *facts, alg ident.Algorithm) error {
	return fault.New(fault.AlgorithmUnsupported, "this TPM cannot make %s keys; it can make %s", alg, names(b.offered(f)))
}

// offered lists the algorithms of the TPM, best default first, without those that it has shown to do otherwise.
func (b *Backend) offered(f *facts) []ident.Algorithm {
	var out []ident.Algorithm
	for _, a := range f.algorithms {
		if a.Wire() != "PS256" || !b.badPSS.Load() {
			out = append(out, a)
		}
	}
	return out
}

// discard unloads an object that is not kept. If it fails, the next epoch forgets the object.
func (b *Backend) discard(ctx context.Context, o *object) {
	_ = b.do(ctx, func(ch *chip) error { return ch.forget(o) })
}

// Open finds a key in the folder and loads it.
func (b *Backend) Open(ctx context.Context, id signer.ID, pub ident.PublicKey) (signer.Key, error) {
	if pub.IsZero() {
		return nil, fault.BadField("public_key", "a key is opened by its id and its public key")
	}
	done, err := b.claim(ctx, id)
	if err != nil {
		return nil, err
	}
	defer done()
	k, err := b.opened(id)
	if err == nil && !k.pub.Equal(pub) {
		err = keyGone(nil, "another key stands under this id")
	}
	if err != nil {
		if perr := b.present(ctx); perr != nil { // an absent TPM comes first: the key's files may be as absent as it is
			return nil, perr
		}
		err = gone(err)
		b.notes.command(err)
		return nil, err
	}
	var grade signer.Grade
	err = b.do(ctx, func(ch *chip) error {
		grade = ch.facts.grade(b.dev.Address())
		return ch.load(k.object)
	})
	if err != nil {
		return nil, err
	}
	if k.grade == "" {
		k.grade = grade
	}
	return b.keep(k), nil
}

// opened returns the key that was handed out under the id, or a new one from the files. Either way the files must
// be there still.
func (b *Backend) opened(id signer.ID) (*key, error) {
	s, err := b.store.get(id)
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if k, ok := b.keys[id]; ok && k.pub.Equal(s.pub) {
		return k, nil
	}
	return &key{backend: b, id: id, object: s.object, pub: s.pub, origin: s.origin}, nil
}

// gone says of a key that is not in the folder, or not whole, that it is gone.
func gone(err error) error {
	switch fault.CodeOf(err) {
	case fault.KeyNotFound, fault.Corrupt, fault.Malformed, fault.AlgorithmUnsupported:
		return keyGone(err, fault.From(err).Text)
	}
	return err
}

// present asks the TPM for a sign of life.
func (b *Backend) present(ctx context.Context) error {
	return b.do(ctx, func(ch *chip) error { return ch.ping() })
}

// Find reads a key's files.
func (b *Backend) Find(ctx context.Context, id signer.ID) (signer.KeyInfo, error) {
	var f *facts
	err := b.do(ctx, func(ch *chip) error {
		f = ch.facts
		return ch.ping()
	})
	if err != nil {
		return signer.KeyInfo{}, err
	}
	s, err := b.store.get(id)
	if err != nil {
		return signer.KeyInfo{}, err
	}
	return info(id, s.object, s.pub, s.origin, f.grade(b.dev.Address())), nil
}

// Keys lists the folder. Whether the TPM can open each blob shows when it is opened; here it is judged by the
// storage key that its record names.
func (b *Backend) Keys(ctx context.Context) ([]signer.KeyInfo, error) {
	var grade signer.Grade
	var parents []*object
	err := b.do(ctx, func(ch *chip) error {
		grade = ch.facts.grade(b.dev.Address())
		all, err := ch.allParents()
		parents = all
		if err != nil {
			return err
		}
		return ch.ping()
	})
	if err != nil {
		return nil, err
	}
	ids, err := b.store.ids()
	if err != nil {
		return nil, err
	}
	out := make([]signer.KeyInfo, 0, len(ids))
	for _, id := range ids {
		s, err := b.store.get(id)
		switch {
		case err != nil:
			out = append(out, signer.KeyInfo{
				URI: uri(id), ID: id, Grade: grade, Origin: signer.OriginUnknown, Problem: fault.From(err).Text,
			})
		case !s.object.under(parents):
			out = append(out, signer.KeyInfo{URI: uri(id), ID: id, Grade: grade, Origin: s.origin,
				Problem: "the key belongs to another TPM, or to this one before it was cleared"})
		default:
			out = append(out, info(id, s.object, s.pub, s.origin, grade))
		}
	}
	return out, nil
}

// Destroy deletes a key's files and unloads it. The blob is all there is of a key outside the chip, so without the
// files the key is gone.
func (b *Backend) Destroy(ctx context.Context, id signer.ID) error {
	done, err := b.claim(ctx, id)
	if err != nil {
		return err
	}
	defer done()
	if err := b.present(ctx); err != nil {
		return err
	}
	if err := b.store.remove(id); err != nil {
		return err
	}
	b.mu.Lock()
	k := b.keys[id]
	delete(b.keys, id)
	b.mu.Unlock()
	if k == nil {
		return nil
	}
	k.destroyed.Store(true)
	b.mu.Lock()
	delete(b.locked, k)
	b.mu.Unlock()
	b.discard(ctx, k.object)
	return nil
}

// claim checks an id and waits until nobody else makes, opens or destroys a key under it, until done is called.
func (b *Backend) claim(ctx context.Context, id signer.ID) (done func(), err error) {
	if _, err := signer.NewID(id.Bytes()); err != nil {
		return nil, err
	}
	mine := make(chan struct{})
	for {
		if err := ctx.Err(); err != nil {
			return nil, fault.From(err)
		}
		b.mu.Lock()
		theirs, busy := b.busy[id]
		if !busy {
			b.busy[id] = mine
		}
		b.mu.Unlock()
		if !busy {
			break
		}
		select {
		case <-theirs:
		case <-ctx.Done():
		}
	}
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.busy, id)
		close(mine)
	}, nil
}

// keep notes the key as the one handed out under its id.
func (b *Backend) keep(k *key) *key {
	b.mu.Lock()
	defer b.mu.Unlock()
	if old, ok := b.keys[k.id]; ok && old.pub.Equal(k.pub) {
		return old
	}
	b.keys[k.id] = k
	return k
}

var _ signer.Backend = (*Backend)(nil)
