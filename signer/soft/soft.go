// Package soft keeps private keys in encrypted files. It stands in for a device on laptops and in tests: it is
// chosen by name only, and everything that it shows is marked signer.Software.
//
// Each key is one file, sealed with a data key that is the same for all keys of the folder. The data key is sealed
// in vault.json: under a passphrase where one is configured, and otherwise under wrap.key, a random key in a file
// beside it. What that gives:
//
//   - With a passphrase, whoever copies the folder must still guess the passphrase.
//   - With wrap.key, whoever can read the whole folder has the keys. It protects a single key file that leaks, and
//     a backup that leaves wrap.key out, and nothing else.
//   - In both cases the keys are in the memory of the daemon in the clear, and whoever can read that memory or act
//     as its user has them.
package soft

import (
	"context"
	"crypto"
	"path/filepath"
	"runtime"
	"sync"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/durable"
	"github.com/trustd/trustd/internal/keyfile"
	"github.com/trustd/trustd/signer"
)

// Config says where the keys are.
type Config struct {
	// Dir is the folder, an absolute path. It is made, with mode 0700, where it does not exist; one that others may
	// read is refused.
	Dir string
	// Passphrase gives the passphrase that seals the folder, such as secret.Source.Read; nil seals the folder with a
	// key file beside the keys.
	Passphrase func(context.Context) ([]byte, error)
	// Cost of deriving a key from the passphrase of a new folder; the zero value is keyfile.DefaultCost.
	Cost keyfile.Cost
}

// A Backend is a folder of keys. It implements signer.Backend, signer.Importer and signer.Exporter, and its keys
// signer.BatchSigner.
type Backend struct {
	dir        string
	passphrase func(context.Context) ([]byte, error)
	cost       keyfile.Cost
	fs         durable.FS // what files are written through

	// inFlight is held for reading by every call and for writing by Close.
	inFlight sync.RWMutex
	closed   bool

	// unlocking guards what follows: set once the folder is open, or once its passphrase was refused.
	unlocking sync.Mutex
	dataKey   []byte
	refusal   error

	// mu guards what is remembered of the folder's files.
	mu       sync.RWMutex
	loaded   map[signer.ID]*loadedKey
	removals int // how many files this backend has removed
}

// loadedKey is a decrypted key and the file that it came from. It is immutable.
type loadedKey struct {
	file    stamp
	private crypto.Signer
	record  record
	public  ident.PublicKey
}

// Open returns the backend of a folder. It touches the disk only when it is first used: a folder that cannot be
// used shows in Describe, as with any device that is missing.
func Open(c Config) (*Backend, error) {
	if !filepath.IsAbs(c.Dir) {
		return nil, fault.BadField("dir", "the folder of a soft backend is an absolute path")
	}
	if c.Cost == (keyfile.Cost{}) {
		c.Cost = keyfile.DefaultCost
	}
	return &Backend{
		dir: filepath.Clean(c.Dir), passphrase: c.Passphrase, cost: c.Cost, fs: durable.Disk,
		loaded: map[signer.ID]*loadedKey{},
	}, nil
}

// Describe implements signer.Backend.
func (b *Backend) Describe(ctx context.Context) signer.Description {
	d := signer.Description{
		Kind:       "soft",
		Device:     "encrypted files in " + b.dir,
		Algorithms: ident.Algorithms(),
		Grade:      signer.Software,
		State:      signer.Ready,
		Limits:     map[string]string{"sealed_by": "key file"},
	}
	for _, a := range d.Algorithms {
		d.Mechanisms = append(d.Mechanisms, a.Wire()+" ("+a.String()+")")
	}
	if b.passphrase != nil {
		d.Limits["sealed_by"] = "passphrase"
	}
	release, err := b.begin(ctx)
	if err != nil {
		e := fault.From(err)
		d.State, d.Problem, d.Remedy = stateOf(e.Code), e.Text, e.Hint
		if d.Problem == "" {
			d.Problem = e.Code.Title()
		}
		if d.Remedy == "" {
			d.Remedy = e.Code.Hint()
		}
		return d
	}
	release()
	return d
}

// stateOf says whether a backend that fails with this code comes back by itself.
func stateOf(c fault.Code) signer.State {
	switch c {
	case fault.DeviceLost, fault.Canceled, fault.DeadlineExceeded:
		return signer.Degraded
	}
	return signer.Stopped
}

// Parallel returns the number of cores: a software signature is arithmetic.
func (b *Backend) Parallel() int { return runtime.NumCPU() }

// begin starts a call: the folder is open, the context lives, and Close waits until release is called.
func (b *Backend) begin(ctx context.Context) (release func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, fault.From(err)
	}
	b.inFlight.RLock()
	if b.closed {
		b.inFlight.RUnlock()
		return nil, fault.New(fault.Stopping, "the backend is closed")
	}
	if err := b.unlock(ctx); err != nil {
		b.inFlight.RUnlock()
		return nil, err
	}
	return b.inFlight.RUnlock, nil
}

// unlock opens the folder on first use. A passphrase that was refused is not tried again.
func (b *Backend) unlock(ctx context.Context) error {
	b.unlocking.Lock()
	defer b.unlocking.Unlock()
	if b.dataKey != nil {
		return nil
	}
	if b.refusal != nil {
		return b.refusal
	}
	key, err := b.openVault(ctx)
	if fault.CodeOf(err) == fault.AuthorisationRefused {
		b.refusal = err
	}
	b.dataKey = key
	return err
}

// Generate implements signer.Backend.
func (b *Backend) Generate(ctx context.Context, id signer.ID, alg ident.Algorithm) (signer.Key, error) {
	if _, err := signer.NewID(id.Bytes()); err != nil {
		return nil, err
	}
	release, err := b.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	if !alg.Valid() {
		return nil, fault.New(fault.AlgorithmUnsupported,
			"a soft backend makes keys of ed25519, ecdsa-p256, ecdsa-p384, rsa-2048, rsa-3072 and rsa-4096")
	}
	if b.exists(id) {
		return nil, taken()
	}
	private, err := generate(ctx, alg)
	if err != nil {
		return nil, err
	}
	return b.add(id, private, signer.OriginDevice)
}

// Import implements signer.Importer.
func (b *Backend) Import(ctx context.Context, id signer.ID, pkcs8 []byte) (signer.Key, error) {
	if _, err := signer.NewID(id.Bytes()); err != nil {
		return nil, err
	}
	release, err := b.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	private, _, err := keyfile.ParsePKCS8(pkcs8)
	if err != nil {
		return nil, err
	}
	return b.add(id, private, signer.OriginImported)
}

// Export implements signer.Exporter.
func (b *Backend) Export(ctx context.Context, id signer.ID) ([]byte, error) {
	release, err := b.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	k, err := b.load(id)
	if err != nil {
		return nil, err
	}
	der, _, err := keyfile.Canonical(k.private)
	return der, err
}

// Open implements signer.Backend.
func (b *Backend) Open(ctx context.Context, id signer.ID, pub ident.PublicKey) (signer.Key, error) {
	release, err := b.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	k, err := b.loadAs(id, pub)
	if err != nil {
		return nil, err
	}
	return &Key{backend: b, public: pub, info: k.record.info()}, nil
}

// loadAs loads the key under id, which must be pub.
func (b *Backend) loadAs(id signer.ID, pub ident.PublicKey) (*loadedKey, error) {
	k, err := b.load(id)
	if fault.CodeOf(err) == fault.KeyNotFound {
		return nil, fault.New(fault.KeyGone, "the folder holds no key under this id")
	}
	if err != nil {
		return nil, err
	}
	if !k.public.Equal(pub) {
		return nil, fault.New(fault.KeyGone, "the folder holds another key under this id")
	}
	return k, nil
}

// Find implements signer.Backend.
func (b *Backend) Find(ctx context.Context, id signer.ID) (signer.KeyInfo, error) {
	release, err := b.begin(ctx)
	if err != nil {
		return signer.KeyInfo{}, err
	}
	defer release()
	k, err := b.load(id)
	switch fault.CodeOf(err) {
	case "":
		return k.record.info(), nil
	case fault.Corrupt:
		return damaged(id, err), nil
	}
	return signer.KeyInfo{}, err
}

// Keys implements signer.Backend.
func (b *Backend) Keys(ctx context.Context) ([]signer.KeyInfo, error) {
	release, err := b.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	ids, err := b.list()
	if err != nil {
		return nil, err
	}
	infos := make([]signer.KeyInfo, 0, len(ids))
	for _, id := range ids {
		if err := ctx.Err(); err != nil {
			return nil, fault.From(err)
		}
		k, err := b.load(id)
		switch {
		case err == nil:
			infos = append(infos, k.record.info())
		case fault.CodeOf(err) != fault.KeyNotFound: // destroyed since the folder was read
			infos = append(infos, damaged(id, err))
		}
	}
	return infos, nil
}

// damaged is what can be said of a key whose file cannot be read.
func damaged(id signer.ID, err error) signer.KeyInfo {
	problem := fault.From(err).Text
	if problem == "" {
		problem = fault.CodeOf(err).Title()
	}
	return signer.KeyInfo{
		URI: signer.URI{Scheme: "soft", ID: id}.String(), ID: id,
		Grade: signer.Software, Origin: signer.OriginUnknown, Problem: problem,
	}
}

// Destroy implements signer.Backend. Keys that were opened before stop signing with it.
func (b *Backend) Destroy(ctx context.Context, id signer.ID) error {
	release, err := b.begin(ctx)
	if err != nil {
		return err
	}
	defer release()
	return b.remove(id)
}

// Close implements signer.Backend.
func (b *Backend) Close() error {
	b.inFlight.Lock()
	defer b.inFlight.Unlock()
	b.closed = true
	clear(b.dataKey)
	b.dataKey = nil
	b.loaded = map[signer.ID]*loadedKey{}
	return nil
}

func taken() error { return fault.New(fault.AlreadyExists, "a key with this id exists") }

var (
	_ signer.Backend     = (*Backend)(nil)
	_ signer.Importer    = (*Backend)(nil)
	_ signer.Exporter    = (*Backend)(nil)
	_ signer.BatchSigner = (*Key)(nil)
	_ signer.Key         = (*Key)(nil)
)
