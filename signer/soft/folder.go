package soft

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/durable"
	"github.com/trustd/trustd/internal/keyfile"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
)

// The files of a folder.
const (
	vaultName = "vault.json" // the data key, sealed
	wrapName  = "wrap.key"   // what seals it where there is no passphrase: 64 hexadecimal digits
	keySuffix = ".key"       // after the id in hexadecimal digits: one private key, sealed with the data key
)

// The formats named in the files. A file of another format is not touched.
const (
	vaultFormat  = "trustd/soft-vault/v1"
	recordFormat = "trustd/soft-key/v1"
)

// maxFile bounds what is read of one file.
const maxFile = 64 << 10

// A vault is the content of vault.json.
type vault struct {
	Format string `json:"format"`
	// Exactly one of these holds the data key.
	Passphrase *keyfile.Box `json:"passphrase,omitempty"`
	KeyFile    []byte       `json:"key_file,omitempty"`
}

// A record is the content of a key's file. All of it is authenticated by Sealed.
type record struct {
	Format    string          `json:"format"`
	ID        string          `json:"id"`
	Algorithm ident.Algorithm `json:"algorithm"`
	Origin    signer.Origin   `json:"origin"`
	Public    ident.PublicKey `json:"public_key"`
	Sealed    []byte          `json:"sealed"`
}

func (r *record) aad() []byte {
	return signature.Encode(signature.Wrap, []byte("soft-key"), []byte(r.Format), []byte(r.ID),
		[]byte(r.Algorithm.String()), []byte(r.Origin), r.Public.SPKI())
}

func (r *record) info() signer.KeyInfo {
	id, _ := signer.ParseID(r.ID) // checked when the record was made
	return signer.KeyInfo{
		URI: signer.URI{Scheme: "soft", ID: id}.String(), ID: id, Public: r.Public,
		Grade: signer.Software, Origin: r.Origin, Exported: true,
	}
}

func vaultAAD(seal string) []byte {
	return signature.Encode(signature.Wrap, []byte("soft-vault"), []byte(vaultFormat), []byte(seal))
}

// openVault returns the data key of the folder, and makes folder and key where neither exists.
func (b *Backend) openVault(ctx context.Context) ([]byte, error) {
	if err := b.checkDir(); err != nil {
		return nil, err
	}
	data, err := readPrivate(b.path(vaultName))
	if errors.Is(err, fs.ErrNotExist) {
		if data, err = b.makeVault(ctx); err != nil {
			return nil, err
		}
	} else if err != nil {
		return nil, unreadable(err)
	}
	var v vault
	if err := strict(data, &v); err != nil || v.Format != vaultFormat || (v.Passphrase == nil) == (v.KeyFile == nil) {
		return nil, fault.Wrap(fault.Corrupt, err, "%s is damaged", vaultName)
	}
	switch {
	case v.Passphrase != nil && b.passphrase == nil:
		return nil, &fault.Error{Code: fault.AuthorisationRefused,
			Text: "the folder is sealed with a passphrase and none is configured",
			Hint: "Set passphrase in the backend's configuration."}
	case v.Passphrase == nil && b.passphrase != nil:
		return nil, &fault.Error{Code: fault.AuthorisationRefused,
			Text: "the folder is sealed with its key file, not with a passphrase",
			Hint: "Remove passphrase from the backend's configuration, or name an empty folder."}
	case v.Passphrase != nil:
		return b.openWithPassphrase(ctx, v.Passphrase)
	}
	return b.openWithKeyFile(v.KeyFile)
}

func (b *Backend) openWithPassphrase(ctx context.Context, box *keyfile.Box) ([]byte, error) {
	pass, err := b.passphrase(ctx)
	if err != nil {
		return nil, err
	}
	defer clear(pass)
	key, err := box.Open(pass, vaultAAD("passphrase"))
	switch {
	case fault.CodeOf(err) == fault.WrongPassphrase:
		return nil, &fault.Error{Code: fault.AuthorisationRefused, Err: err,
			Text: "the passphrase is wrong or the folder is damaged",
			Hint: "Correct the passphrase, then restart the daemon."}
	case err != nil:
		return nil, fault.Wrap(fault.Corrupt, err, "%s is damaged", vaultName)
	}
	return dataKey(key)
}

func (b *Backend) openWithKeyFile(sealed []byte) ([]byte, error) {
	text, err := readPrivate(b.path(wrapName))
	if err != nil {
		return nil, fault.Wrap(fault.Corrupt, err, "%s cannot be read", wrapName)
	}
	defer clear(text)
	wrap, err := hex.DecodeString(strings.TrimSpace(string(text)))
	if err != nil || len(wrap) != keyfile.KeySize {
		return nil, fault.New(fault.Corrupt, "%s is damaged", wrapName)
	}
	defer clear(wrap)
	key, err := keyfile.OpenWithKey(wrap, vaultAAD("key file"), sealed)
	if err != nil {
		return nil, fault.Wrap(fault.Corrupt, err, "%s does not open %s", wrapName, vaultName)
	}
	return dataKey(key)
}

func dataKey(key []byte) ([]byte, error) {
	if len(key) != keyfile.KeySize {
		return nil, fault.New(fault.Corrupt, "%s is damaged", vaultName)
	}
	return key, nil
}

// makeVault writes the vault of a new folder and returns its content. The key file is durable before the vault
// that rests on it; another process that does the same at once wins or loses as a whole.
func (b *Backend) makeVault(ctx context.Context) ([]byte, error) {
	ids, err := b.list()
	if err != nil {
		return nil, err
	}
	if len(ids) > 0 {
		return nil, fault.New(fault.Corrupt, "the folder holds keys but no %s", vaultName)
	}
	key := make([]byte, keyfile.KeySize)
	_, _ = rand.Read(key) // never fails
	defer clear(key)
	v := vault{Format: vaultFormat}
	if b.passphrase != nil {
		err = b.sealWithPassphrase(ctx, &v, key)
	} else {
		err = b.sealWithKeyFile(&v, key)
	}
	if err != nil {
		return nil, err
	}
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "")
	}
	if err := durable.CreateOn(b.fs, b.path(vaultName), data, 0o600); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, unwritable(err)
	}
	data, err = readPrivate(b.path(vaultName))
	if err != nil {
		return nil, unreadable(err)
	}
	return data, nil
}

func (b *Backend) sealWithPassphrase(ctx context.Context, v *vault, key []byte) error {
	pass, err := b.passphrase(ctx)
	if err != nil {
		return err
	}
	defer clear(pass)
	if len(pass) < keyfile.MinPassphrase {
		return fault.New(fault.AuthorisationRefused,
			"a passphrase that seals a folder has at least %d bytes", keyfile.MinPassphrase)
	}
	box, err := keyfile.Seal(pass, vaultAAD("passphrase"), key, b.cost)
	v.Passphrase = &box
	return err
}

func (b *Backend) sealWithKeyFile(v *vault, key []byte) error {
	wrap := make([]byte, keyfile.KeySize)
	_, _ = rand.Read(wrap) // never fails
	defer clear(wrap)
	err := durable.CreateOn(b.fs, b.path(wrapName), []byte(hex.EncodeToString(wrap)+"\n"), 0o600)
	if errors.Is(err, fs.ErrExist) { // left by a process that died before it wrote the vault
		text, rerr := readPrivate(b.path(wrapName))
		if rerr != nil {
			return unreadable(rerr)
		}
		old, derr := hex.DecodeString(strings.TrimSpace(string(text)))
		if derr != nil || len(old) != len(wrap) {
			return fault.New(fault.Corrupt, "%s is damaged", wrapName)
		}
		copy(wrap, old)
	} else if err != nil {
		return unwritable(err)
	}
	v.KeyFile, err = keyfile.SealWithKey(wrap, vaultAAD("key file"), key)
	return err
}

// checkDir makes the folder where it is missing, and refuses one that others may look into.
func (b *Backend) checkDir() error {
	if err := durable.MkdirAll(b.dir); err != nil {
		return unreadable(err)
	}
	info, err := os.Stat(b.dir)
	if err != nil {
		return unreadable(err)
	}
	return private(info)
}

// private refuses what others may read, or what somebody else owns.
func private(info fs.FileInfo) error {
	if info.Mode().Perm()&0o077 != 0 {
		return &fault.Error{Code: fault.InsecureSecret,
			Text: "the folder of the keys, or a file in it, is open to other users",
			Hint: "chmod 0700 the folder and 0600 the files in it."}
	}
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return &fault.Error{Code: fault.InsecureSecret,
			Text: "the folder of the keys, or a file in it, belongs to another user",
			Hint: "chown the folder to the daemon's user."}
	}
	return nil
}

// readPrivate reads a file of the folder that only its owner may read.
func readPrivate(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("reading %s: not a regular file", filepath.Base(path))
	}
	if err := private(info); err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(data) > maxFile {
		err = fmt.Errorf("reading %s: larger than %d bytes", filepath.Base(path), maxFile)
	}
	return data, err
}

func (b *Backend) path(name string) string { return filepath.Join(b.dir, name) }

func (b *Backend) keyPath(id signer.ID) string { return b.path(id.String() + keySuffix) }

// A stamp tells whether a file is still the one that was read.
type stamp struct {
	inode   uint64
	size    int64
	changed syscall.Timespec // content, mode, owner or name
}

func (b *Backend) stamp(id signer.ID) (stamp, error) {
	info, err := os.Lstat(b.keyPath(id))
	if err != nil {
		return stamp{}, err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return stamp{}, errors.New("the file system gives no inode numbers")
	}
	return stamp{st.Ino, info.Size(), st.Ctim}, nil
}

func (b *Backend) exists(id signer.ID) bool {
	_, err := os.Lstat(b.keyPath(id))
	return err == nil
}

// list returns the ids of the keys in the folder, in order. Other files are left alone.
func (b *Backend) list() ([]signer.ID, error) {
	entries, err := os.ReadDir(b.dir)
	if err != nil {
		return nil, unreadable(err)
	}
	var ids []signer.ID
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), keySuffix)
		if !ok {
			continue
		}
		if id, err := signer.ParseID(name); err == nil && id.String() == name {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids, nil
}

// load returns the key under id, from memory where its file has not changed. No key is key_not_found, a file that
// cannot be trusted is corrupt.
func (b *Backend) load(id signer.ID) (*loadedKey, error) {
	now, err := b.stamp(id)
	if errors.Is(err, fs.ErrNotExist) {
		// A folder that vanished whole is a lost device, not a destroyed key.
		if _, derr := os.Stat(b.dir); derr != nil {
			return nil, unreadable(derr)
		}
		return nil, fault.New(fault.KeyNotFound, "the folder holds no key under this id")
	}
	if err != nil {
		return nil, unreadable(err)
	}
	b.mu.RLock()
	k, ok := b.loaded[id]
	removals := b.removals
	b.mu.RUnlock()
	if ok && k.file == now {
		return k, nil
	}
	if k, err = b.read(id, now); err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	// A new file may get the inode of one just removed, within one tick of the file system's clock.
	if again, err := b.stamp(id); err == nil && again == now && b.removals == removals {
		b.loaded[id] = k
	}
	return k, nil
}

func (b *Backend) read(id signer.ID, at stamp) (*loadedKey, error) {
	data, err := readPrivate(b.keyPath(id))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fault.New(fault.KeyNotFound, "the folder holds no key under this id")
	case fault.CodeOf(err) == fault.InsecureSecret:
		return nil, fault.Wrap(fault.Corrupt, err, "the key file is open to other users")
	case err != nil:
		return nil, fault.Wrap(fault.Corrupt, err, "the key file cannot be read")
	}
	bad := func(cause error) (*loadedKey, error) {
		return nil, fault.Wrap(fault.Corrupt, cause, "the key file is damaged")
	}
	var r record
	if err := strict(data, &r); err != nil {
		return bad(err)
	}
	if r.Format != recordFormat || r.ID != id.String() {
		return bad(errors.New("the file is of another format or belongs to another id"))
	}
	der, err := keyfile.OpenWithKey(b.dataKey, r.aad(), r.Sealed)
	if err != nil {
		return bad(err)
	}
	defer clear(der)
	key, pub, err := keyfile.ParsePKCS8(der)
	if err != nil || !pub.Equal(r.Public) || pub.Algorithm() != r.Algorithm {
		return bad(err)
	}
	private, ok := key.(crypto.Signer)
	if !ok {
		return bad(errors.New("the key does not sign"))
	}
	r.Sealed = nil
	return &loadedKey{file: at, private: private, record: r, public: pub}, nil
}

// add seals a private key in a new file.
func (b *Backend) add(id signer.ID, private any, origin signer.Origin) (signer.Key, error) {
	der, pub, err := keyfile.Canonical(private)
	if err != nil {
		return nil, err
	}
	defer clear(der)
	r := record{Format: recordFormat, ID: id.String(), Algorithm: pub.Algorithm(), Origin: origin, Public: pub}
	if r.Sealed, err = keyfile.SealWithKey(b.dataKey, r.aad(), der); err != nil {
		return nil, err
	}
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "")
	}
	switch err := durable.CreateOn(b.fs, b.keyPath(id), data, 0o600); {
	case errors.Is(err, fs.ErrExist):
		return nil, taken()
	case err != nil:
		return nil, unwritable(err)
	}
	k, err := b.loadAs(id, pub) // what was written is read back
	if err != nil {
		return nil, err
	}
	return &Key{backend: b, public: pub, info: k.record.info()}, nil
}

// remove deletes the file of a key and checks that it is gone.
func (b *Backend) remove(id signer.ID) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.loaded, id)
	b.removals++
	if err := b.fs.Remove(b.keyPath(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return unwritable(err)
	}
	if err := b.fs.SyncDir(b.dir); err != nil {
		return unwritable(err)
	}
	if b.exists(id) {
		return fault.New(fault.DeviceLost, "the file of the key is still there")
	}
	return nil
}

func strict(data []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("data after the object")
	}
	return nil
}

// unreadable says that the folder is not there for now; an error that already has a code keeps it.
func unreadable(err error) error {
	var e *fault.Error
	if errors.As(err, &e) {
		return e
	}
	return &fault.Error{Code: fault.DeviceLost, Err: err, Text: "the folder of the keys cannot be read",
		Hint: "Make the folder available to the daemon's user; no restart is needed."}
}

func unwritable(err error) error {
	return &fault.Error{Code: fault.DeviceLost, Err: err, Text: "the folder of the keys cannot be written",
		Hint: "Check that the disk has room and the daemon's user may write the folder; no restart is needed."}
}
