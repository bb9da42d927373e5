package tpm

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/go-tpm/tpm2"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/durable"
	"github.com/trustd/trustd/signer"
)

// A store is the folder with the key blobs. A key is up to three files named by its id in hexadecimal digits: ID.json,
// our record, then ID.pub and ID.priv, the TPM2B_PUBLIC and TPM2B_PRIVATE that tpm2_load reads. ID.priv is written last
// and deleted first: a key is there when it is. A pair without a record is a key that others made.
type store struct {
	dir string
}

const (
	extPublic, extPrivate, extRecord = ".pub", ".priv", ".json"
	maxBlob                          = 8 << 10 // a TPM's largest buffer is 4 KiB
	recordVersion                    = 1
)

// A record is what ID.json holds.
type record struct {
	Version   int             `json:"version"`
	Algorithm ident.Algorithm `json:"algorithm"`
	PublicKey ident.PublicKey `json:"public_key"`
	Origin    signer.Origin   `json:"origin"`
	Parent    string          `json:"parent"` // name of the storage key above, in hexadecimal digits
	Private   string          `json:"private_sha256"`
}

// A stored is one key of the folder.
type stored struct {
	object *object
	pub    ident.PublicKey
	origin signer.Origin
}

// openStore makes the folder, or checks that nobody else can read it, and sweeps what a crash left half written.
func openStore(dir string) (*store, error) {
	if !filepath.IsAbs(dir) {
		return nil, fault.BadField("dir", "the folder for TPM keys is an absolute path")
	}
	if err := durable.MkdirAll(dir); err != nil {
		return nil, fault.Wrap(fault.Internal, err, "the folder for TPM keys cannot be made")
	}
	info, err := os.Stat(dir)
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "the folder for TPM keys cannot be read")
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, &fault.Error{Code: fault.InsecureSecret, Field: "dir", Text: "the folder for TPM keys is open to others",
			Hint: "chmod 0700 the folder and own it."}
	}
	if err := durable.Sweep(dir); err != nil {
		return nil, fault.Wrap(fault.Internal, err, "the folder for TPM keys cannot be swept")
	}
	return &store{dir: dir}, nil
}

func (s *store) path(id signer.ID, ext string) string { return filepath.Join(s.dir, id.String()+ext) }

// has reports whether any file stands under the id.
func (s *store) has(id signer.ID) (bool, error) {
	for _, ext := range []string{extPublic, extPrivate, extRecord} {
		_, err := os.Lstat(s.path(id, ext))
		if err == nil {
			return true, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return false, fault.Wrap(fault.Internal, err, "the folder for TPM keys cannot be read")
		}
	}
	return false, nil
}

// put writes a key. After a crash, the key is there, or nothing that counts as one; Destroy clears it away.
func (s *store) put(id signer.ID, k stored) error {
	rec, err := json.Marshal(record{
		Version: recordVersion, Algorithm: k.pub.Algorithm(), PublicKey: k.pub, Origin: k.origin,
		Parent: hex.EncodeToString(k.object.parent), Private: checksum(k.object.private),
	})
	if err != nil {
		return err
	}
	for _, f := range []struct {
		ext  string
		data []byte
	}{
		{extRecord, append(rec, '\n')},
		{extPublic, tpm2.Marshal(tpm2.BytesAs2B[tpm2.TPMTPublic](k.object.public))},
		{extPrivate, tpm2.Marshal(tpm2.TPM2BPrivate{Buffer: k.object.private})},
	} {
		err := durable.Create(s.path(id, f.ext), f.data, 0o600)
		if errors.Is(err, fs.ErrExist) {
			return fault.New(fault.AlreadyExists, "a key of this id is in the folder")
		}
		if err != nil {
			return fault.Wrap(fault.Internal, err, "the key's files cannot be written")
		}
	}
	return nil
}

// get reads a key. It is key_not_found when there are no blobs under the id, and corrupt when they are not what the
// record says.
func (s *store) get(id signer.ID) (stored, error) {
	private, err := s.read(id, extPrivate)
	if err != nil {
		return stored{}, err
	}
	public, err := s.read(id, extPublic)
	if err != nil {
		return stored{}, err
	}
	rec, err := s.read(id, extRecord)
	if fault.CodeOf(err) == fault.KeyNotFound {
		return parseKey(public, private, nil)
	}
	if err != nil {
		return stored{}, err
	}
	return parseKey(public, private, rec)
}

func (s *store) read(id signer.ID, ext string) ([]byte, error) {
	path := s.path(id, ext)
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.KeyNotFound, "no key of this id is in the folder")
	}
	if err == nil && (!info.Mode().IsRegular() || info.Size() > maxBlob) {
		return nil, fault.New(fault.Corrupt, "a file of the key is not a file of a key")
	}
	var b []byte
	if err == nil {
		b, err = os.ReadFile(path)
	}
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "a file of the key cannot be read")
	}
	return b, nil
}

// parseKey reads the files of a key. rec is nil for a key that others made.
func parseKey(public, private, rec []byte) (stored, error) {
	pub2B, err := unwrap(public)
	if err != nil {
		return stored{}, err
	}
	priv2B, err := unwrap(private)
	if err != nil {
		return stored{}, err
	}
	o, err := newObject(pub2B, priv2B, nil)
	if err != nil {
		return stored{}, fault.Wrap(fault.Corrupt, err, "the key's public area cannot be read")
	}
	if !bytes.Equal(tpm2.Marshal(o.area), pub2B) {
		return stored{}, fault.New(fault.Corrupt, "the key's public area is not canonical")
	}
	pub, err := publicKey(&o.area)
	if err != nil {
		return stored{}, err
	}
	k := stored{object: o, pub: pub, origin: signer.OriginUnknown}
	if a := o.area.ObjectAttributes; a.FixedTPM && a.SensitiveDataOrigin {
		k.origin = signer.OriginDevice // a TPM gives no other key both
	}
	if rec == nil {
		return k, nil
	}
	return k.checked(rec)
}

// checked returns the key with what its record adds, once the record fits the blobs.
func (k stored) checked(text []byte) (stored, error) {
	var r record
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	err := dec.Decode(&r)
	if err != nil || dec.InputOffset() != int64(len(bytes.TrimRight(text, "\n"))) || r.Version != recordVersion {
		return stored{}, fault.Wrap(fault.Corrupt, err, "the key's record cannot be read")
	}
	parent, err := hex.DecodeString(r.Parent)
	if err != nil || len(parent) == 0 {
		return stored{}, fault.Wrap(fault.Corrupt, err, "the key's record names no storage key")
	}
	if !r.PublicKey.Equal(k.pub) || r.Algorithm != k.pub.Algorithm() || r.Private != checksum(k.object.private) {
		return stored{}, fault.New(fault.Corrupt, "the key's blobs are not those that its record names")
	}
	if r.Origin == signer.OriginImported {
		k.origin = signer.OriginImported
	}
	k.object.parent = parent
	return k, nil
}

// unwrap takes the length off a TPM2B.
func unwrap(b []byte) ([]byte, error) {
	if len(b) < 3 || int(b[0])<<8|int(b[1]) != len(b)-2 {
		return nil, fault.New(fault.Corrupt, "a key blob does not have the length that it names")
	}
	return b[2:], nil
}

// ids lists the ids in the folder, in order. Files of other names are not ours to judge.
func (s *store) ids() ([]signer.ID, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fault.Wrap(fault.Internal, err, "the folder for TPM keys cannot be read")
	}
	var out []signer.ID
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), extPrivate)
		if !ok {
			continue
		}
		if id, err := signer.ParseID(name); err == nil && id.String() == name {
			out = append(out, id)
		}
	}
	return slices.Compact(out), nil
}

// remove deletes a key's files, the private blob first, and reads back that they are gone.
func (s *store) remove(id signer.ID) error {
	for _, ext := range []string{extPrivate, extPublic, extRecord} {
		if err := durable.Remove(s.path(id, ext)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fault.Wrap(fault.Internal, err, "a file of the key cannot be deleted")
		}
	}
	if still, err := s.has(id); still || err != nil {
		return fault.Wrap(fault.Internal, err, "the key's files are still there")
	}
	return nil
}

func checksum(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
