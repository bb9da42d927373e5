package soft_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/durable"
	"github.com/trustd/trustd/internal/keyfile"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/signertest"
	"github.com/trustd/trustd/signer/soft"
)

// cheap keeps the tests from spending their time in scrypt.
var cheap = keyfile.Cost{LogN: 4, R: 8, P: 1}

func passphrase(s string) func(context.Context) ([]byte, error) {
	return func(context.Context) ([]byte, error) { return []byte(s), nil }
}

func open(t testing.TB, c soft.Config) *soft.Backend {
	t.Helper()
	b, err := soft.Open(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

func TestConformance(t *testing.T) {
	c := soft.Config{Dir: filepath.Join(t.TempDir(), "keys")}
	start := func(t testing.TB) signer.Backend { return open(t, c) }
	signertest.Run(t, start, signertest.Reopen(start))
}

func TestConformanceUnderPassphrase(t *testing.T) {
	c := soft.Config{Dir: filepath.Join(t.TempDir(), "keys"), Passphrase: passphrase("correct horse"), Cost: cheap}
	start := func(t testing.TB) signer.Backend { return open(t, c) }
	signertest.Run(t, start, signertest.Reopen(start), signertest.Algorithms(ident.Ed25519, ident.ECDSAP256))
}

func newKey(t testing.TB, b *soft.Backend, id signer.ID) signer.Key {
	t.Helper()
	k, err := b.Generate(t.Context(), id, ident.Ed25519)
	if err != nil {
		t.Fatal(verbose(err))
	}
	return k
}

func verbose(err error) string { return fault.From(err).Verbose() }

func wantCode(t testing.TB, err error, code fault.Code) {
	t.Helper()
	if fault.CodeOf(err) != code {
		t.Errorf("error %v, want %s", err, code)
	}
}

func TestFilesArePrivateAndSealed(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "keys")
	b := open(t, soft.Config{Dir: dir, Passphrase: passphrase("correct horse"), Cost: cheap})
	newKey(t, b, "k1")
	der, err := b.Export(t.Context(), "k1")
	if err != nil {
		t.Fatal(err)
	}
	seed := der[len(der)-32:]
	err = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has the mode %v", d.Name(), info.Mode())
		}
		if d.IsDir() {
			return nil
		}
		data, err := os.ReadFile(path)
		if bytes.Contains(data, seed) || bytes.Contains(data, fmt.Appendf(nil, "%x", seed)) || bytes.Contains(data, []byte("horse")) {
			t.Errorf("%s holds a secret in the clear", d.Name())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestWrongPassphraseIsNotRetried(t *testing.T) {
	dir := t.TempDir()
	chmod(t, dir, 0o700)
	newKey(t, open(t, soft.Config{Dir: dir, Passphrase: passphrase("correct horse"), Cost: cheap}), "k1")
	asked := 0
	b := open(t, soft.Config{Dir: dir, Passphrase: func(context.Context) ([]byte, error) {
		asked++
		return []byte("wrong horse"), nil
	}})
	for range 3 {
		_, err := b.Keys(t.Context())
		wantCode(t, err, fault.AuthorisationRefused)
		d := b.Describe(t.Context())
		if d.State != signer.Stopped || d.Problem == "" || d.Remedy == "" {
			t.Errorf("Describe = %+v", d)
		}
	}
	_, err := b.Generate(t.Context(), "k2", ident.Ed25519)
	wantCode(t, err, fault.AuthorisationRefused)
	if asked != 1 {
		t.Errorf("the passphrase was tried %d times", asked)
	}
	if got := open(t, soft.Config{Dir: dir, Passphrase: passphrase("correct horse")}).Describe(t.Context()); got.State != signer.Ready {
		t.Errorf("the right passphrase: %+v", got)
	}
}

func TestSealMustMatchConfiguration(t *testing.T) {
	sealed, plain := filepath.Join(t.TempDir(), "a"), filepath.Join(t.TempDir(), "b")
	newKey(t, open(t, soft.Config{Dir: sealed, Passphrase: passphrase("correct horse"), Cost: cheap}), "k1")
	newKey(t, open(t, soft.Config{Dir: plain}), "k1")
	for _, c := range []soft.Config{{Dir: sealed}, {Dir: plain, Passphrase: passphrase("correct horse")}} {
		d := open(t, c).Describe(t.Context())
		if d.State != signer.Stopped || !strings.Contains(d.Remedy, "passphrase") {
			t.Errorf("Describe = %+v", d)
		}
	}
	_, err := open(t, soft.Config{Dir: filepath.Join(t.TempDir(), "c"), Passphrase: passphrase("short"), Cost: cheap}).Keys(t.Context())
	wantCode(t, err, fault.AuthorisationRefused)
}

// TestSecretErrors checks that a passphrase that cannot be had is asked for again: it was never tried.
func TestSecretErrors(t *testing.T) {
	var fail error = fault.New(fault.InsecureSecret, "the file of a secret is open to other users")
	b := open(t, soft.Config{Dir: filepath.Join(t.TempDir(), "keys"), Cost: cheap, Passphrase: func(context.Context) ([]byte, error) {
		return []byte("correct horse"), fail
	}})
	_, err := b.Keys(t.Context())
	wantCode(t, err, fault.InsecureSecret)
	if d := b.Describe(t.Context()); d.State != signer.Stopped || d.Problem != "the file of a secret is open to other users" {
		t.Errorf("Describe = %+v", d)
	}
	fail = nil
	if _, err := b.Keys(t.Context()); err != nil {
		t.Errorf("after the secret was put right: %s", verbose(err))
	}
}

func TestOpenFolders(t *testing.T) {
	dir := t.TempDir()
	chmod(t, dir, 0o755)
	d := open(t, soft.Config{Dir: dir}).Describe(t.Context())
	if d.State != signer.Stopped || !strings.Contains(d.Remedy, "chmod") {
		t.Errorf("a folder that others may read: %+v", d)
	}
	if _, err := soft.Open(soft.Config{Dir: "relative"}); fault.CodeOf(err) != fault.Malformed {
		t.Errorf("a relative folder: %v", err)
	}
	file := filepath.Join(t.TempDir(), "file")
	write(t, file, "x")
	d = open(t, soft.Config{Dir: file}).Describe(t.Context())
	if d.State != signer.Degraded || d.Problem == "" {
		t.Errorf("a file in place of the folder: %+v", d)
	}
}

func chmod(t testing.TB, path string, mode os.FileMode) {
	t.Helper()
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func write(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func keyPath(dir string, id signer.ID) string { return filepath.Join(dir, id.String()+".key") }

// edit changes members of a key's file.
func edit(t testing.TB, path string, change func(map[string]any)) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]any{}
	if err := json.Unmarshal(data, &m); err != nil {
		t.Fatal(err)
	}
	change(m)
	if data, err = json.Marshal(m); err != nil {
		t.Fatal(err)
	}
	write(t, path, string(data))
}

// TestDamagedFiles damages a key's file in every way and checks that the others still serve.
func TestDamagedFiles(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	b := open(t, soft.Config{Dir: dir})
	good := newKey(t, b, "good")
	other := newKey(t, b, "other")
	for name, damage := range map[string]func(path string){
		"empty":       func(p string) { write(t, p, "") },
		"no JSON":     func(p string) { write(t, p, "{") },
		"text after":  func(p string) { data, _ := os.ReadFile(p); write(t, p, string(data)+"{}") },
		"huge":        func(p string) { write(t, p, strings.Repeat(" ", 1<<20)) },
		"readable":    func(p string) { chmod(t, p, 0o644) },
		"link":        func(p string) { os.Remove(p); _ = os.Symlink(keyPath(dir, "good"), p) },
		"folder":      func(p string) { os.Remove(p); _ = os.Mkdir(p, 0o700) },
		"origin":      func(p string) { edit(t, p, func(m map[string]any) { m["origin"] = "imported" }) },
		"algorithm":   func(p string) { edit(t, p, func(m map[string]any) { m["algorithm"] = "ecdsa-p256" }) },
		"format":      func(p string) { edit(t, p, func(m map[string]any) { m["format"] = "trustd/soft-key/v2" }) },
		"public key":  func(p string) { edit(t, p, func(m map[string]any) { m["public_key"] = other.Public().Base64() }) },
		"new member":  func(p string) { edit(t, p, func(m map[string]any) { m["x"] = 1 }) },
		"short":       func(p string) { edit(t, p, func(m map[string]any) { m["sealed"] = "AAAA" }) },
		"another key": func(p string) { data, _ := os.ReadFile(keyPath(dir, "other")); write(t, p, string(data)) },
		"other's key": func(p string) {
			edit(t, p, func(m map[string]any) {
				edit(t, keyPath(dir, "other"), func(o map[string]any) { m["sealed"] = o["sealed"] })
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			id := signer.ID("bad " + name)
			k := newKey(t, b, id)
			damage(keyPath(dir, id))
			_, err := k.Sign(t.Context(), []byte("m"))
			wantCode(t, err, fault.Corrupt)
			_, err = b.Open(t.Context(), id, k.Public())
			wantCode(t, err, fault.Corrupt)
			info, err := b.Find(t.Context(), id)
			if err != nil || info.Problem == "" || info.ID != id || info.Grade != signer.Software || !info.Public.IsZero() {
				t.Errorf("Find = %+v, %v", info, err)
			}
			_, err = b.Generate(t.Context(), id, ident.Ed25519)
			wantCode(t, err, fault.AlreadyExists)
			list, err := b.Keys(t.Context())
			if err != nil {
				t.Fatal(verbose(err))
			}
			found := map[signer.ID]bool{}
			for _, i := range list {
				found[i.ID] = i.Problem == ""
			}
			if healthy, listed := found[id]; !listed || healthy || !found["good"] || !found["other"] {
				t.Errorf("Keys = %+v", list)
			}
			if _, err := good.Sign(t.Context(), []byte("m")); err != nil {
				t.Errorf("a healthy key: %s", verbose(err))
			}
			if name != "folder" {
				if err := b.Destroy(t.Context(), id); err != nil {
					t.Errorf("Destroy: %s", verbose(err))
				}
			} else if err := os.Remove(keyPath(dir, id)); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestForeignFilesAreLeftAlone(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	b := open(t, soft.Config{Dir: dir})
	newKey(t, b, "k1")
	for _, name := range []string{"notes.txt", "XYZ.key", ".key", "ABCD.key", ".6b31.key.tmp-00"} {
		write(t, filepath.Join(dir, name), "mine")
	}
	list, err := b.Keys(t.Context())
	if err != nil || len(list) != 1 {
		t.Errorf("Keys = %+v, %v", list, err)
	}
}

// TestFolderComesAndGoes takes the folder away under a running backend.
func TestFolderComesAndGoes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	b := open(t, soft.Config{Dir: dir})
	k := newKey(t, b, "k1")
	away := dir + ".away"
	if err := os.Rename(dir, away); err != nil {
		t.Fatal(err)
	}
	_, err := k.Sign(t.Context(), nil)
	wantCode(t, err, fault.DeviceLost)
	_, err = b.Open(t.Context(), "k1", k.Public())
	wantCode(t, err, fault.DeviceLost)
	_, err = b.Keys(t.Context())
	wantCode(t, err, fault.DeviceLost)
	if err := os.Rename(away, dir); err != nil {
		t.Fatal(err)
	}
	if _, err := k.Sign(t.Context(), nil); err != nil {
		t.Errorf("after the folder is back: %s", verbose(err))
	}
}

// TestFileTakenAway checks that a key in memory does not outlive its file.
func TestFileTakenAway(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	b := open(t, soft.Config{Dir: dir})
	k := newKey(t, b, "k1")
	if err := os.Rename(keyPath(dir, "k1"), keyPath(dir, "k1")+".old"); err != nil {
		t.Fatal(err)
	}
	_, err := k.Sign(t.Context(), nil)
	wantCode(t, err, fault.KeyGone)
	if err := os.Rename(keyPath(dir, "k1")+".old", keyPath(dir, "k1")); err != nil {
		t.Fatal(err)
	}
	if _, err := k.Sign(t.Context(), nil); err != nil {
		t.Errorf("after the file is back: %s", verbose(err))
	}
}

func TestVaultDamage(t *testing.T) {
	for name, damage := range map[string]func(dir string){
		"vault gone":     func(dir string) { os.Remove(filepath.Join(dir, "vault.json")) },
		"vault cut":      func(dir string) { write(t, filepath.Join(dir, "vault.json"), "{") },
		"vault open":     func(dir string) { chmod(t, filepath.Join(dir, "vault.json"), 0o644) },
		"key file gone":  func(dir string) { os.Remove(filepath.Join(dir, "wrap.key")) },
		"key file open":  func(dir string) { chmod(t, filepath.Join(dir, "wrap.key"), 0o640) },
		"key file cut":   func(dir string) { write(t, filepath.Join(dir, "wrap.key"), "00") },
		"key file wrong": func(dir string) { write(t, filepath.Join(dir, "wrap.key"), strings.Repeat("00", 32)) },
	} {
		dir := filepath.Join(t.TempDir(), "keys")
		newKey(t, open(t, soft.Config{Dir: dir}), "k1")
		damage(dir)
		b := open(t, soft.Config{Dir: dir})
		if d := b.Describe(t.Context()); d.State != signer.Stopped || d.Problem == "" || d.Remedy == "" {
			t.Errorf("%s: Describe = %+v", name, d)
		}
		if _, err := b.Generate(t.Context(), "k2", ident.Ed25519); err == nil {
			t.Errorf("%s: a key was made beside keys that cannot be read", name)
		}
		if _, err := os.Stat(keyPath(dir, "k1")); err != nil {
			t.Errorf("%s: the key's file is gone: %v", name, err)
		}
	}
}

// TestVaultCostIsBounded checks that a vault cannot make the daemon take gigabytes.
func TestVaultCostIsBounded(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	c := soft.Config{Dir: dir, Passphrase: passphrase("correct horse"), Cost: cheap}
	newKey(t, open(t, c), "k1")
	edit(t, filepath.Join(dir, "vault.json"), func(m map[string]any) { m["passphrase"].(map[string]any)["log_n"] = 30 })
	if d := open(t, c).Describe(t.Context()); d.State != signer.Stopped {
		t.Errorf("Describe = %+v", d)
	}
}

// TestTwoProcesses opens a new folder from several backends at once: they must agree on one data key.
func TestTwoProcesses(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	backends := make([]*soft.Backend, 6)
	keys := make([]signer.Key, len(backends))
	for i := range backends {
		backends[i] = open(t, soft.Config{Dir: dir})
	}
	var wg sync.WaitGroup
	for i, b := range backends {
		wg.Go(func() {
			k, err := b.Generate(context.Background(), signer.ID([]byte{byte(i)}), ident.Ed25519)
			if err != nil {
				t.Error(verbose(err))
				return
			}
			keys[i] = k
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	for i, b := range backends {
		for j, k := range keys {
			got, err := b.Open(t.Context(), signer.ID([]byte{byte(j)}), k.Public())
			if err != nil {
				t.Errorf("backend %d cannot open the key of backend %d: %s", i, j, verbose(err))
				continue
			}
			sig, err := got.Sign(t.Context(), []byte("m"))
			if err != nil || signature.Verify(k.Public(), []byte("m"), sig) != nil {
				t.Errorf("backend %d cannot sign with the key of backend %d: %v", i, j, err)
			}
		}
	}
}

// A failingDisk refuses one kind of work and does the rest.
type failingDisk struct {
	durable.FS
	open, link, remove, sync bool
}

var errDisk = errors.New("no space left on device")

func (d *failingDisk) OpenFile(name string, flag int, perm os.FileMode) (durable.File, error) {
	if d.open {
		return nil, errDisk
	}
	return d.FS.OpenFile(name, flag, perm)
}

func (d *failingDisk) Link(from, to string) error {
	if d.link {
		return errDisk
	}
	return d.FS.Link(from, to)
}

func (d *failingDisk) Remove(name string) error {
	if d.remove {
		return errDisk
	}
	return d.FS.Remove(name)
}

func (d *failingDisk) SyncDir(name string) error {
	if d.sync {
		return errDisk
	}
	return d.FS.SyncDir(name)
}

func TestDiskFails(t *testing.T) {
	for name, disk := range map[string]*failingDisk{
		"cannot write": {open: true}, "cannot link": {link: true}, "cannot sync": {sync: true}, "cannot remove": {remove: true},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "keys")
			b := open(t, soft.Config{Dir: dir})
			k := newKey(t, b, "k1")
			disk.FS = durable.Disk
			b.WriteThrough(disk)
			_, err := b.Generate(t.Context(), "k2", ident.Ed25519)
			wantCode(t, err, fault.DeviceLost)
			if strings.Contains(err.Error(), "no space") {
				t.Errorf("the error quotes the disk: %v", err)
			}
			if disk.remove || disk.sync {
				wantCode(t, b.Destroy(t.Context(), "k1"), fault.DeviceLost)
			}
			if disk.remove {
				if _, err := k.Sign(t.Context(), nil); err != nil {
					t.Errorf("a key that could not be destroyed: %s", verbose(err))
				}
			}
			b.WriteThrough(durable.Disk)
			// What a failed call left is destroyed as a key that is not there would be.
			if err := b.Destroy(t.Context(), "k2"); err != nil {
				t.Errorf("Destroy: %s", verbose(err))
			}
			newKey(t, b, "k2")
		})
	}
}

func TestNewFolderOnFailingDisk(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	b := open(t, soft.Config{Dir: dir})
	disk := &failingDisk{FS: durable.Disk, link: true}
	b.WriteThrough(disk)
	_, err := b.Keys(t.Context())
	wantCode(t, err, fault.DeviceLost)
	if d := b.Describe(t.Context()); d.State != signer.Degraded {
		t.Errorf("Describe = %+v", d)
	}
	disk.link = false
	newKey(t, b, "k1")
}

func TestErrorsSayNothingOfPaths(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "secret-project")
	b := open(t, soft.Config{Dir: dir})
	newKey(t, b, "k1")
	write(t, keyPath(dir, "k1"), "x")
	_, err := b.Export(t.Context(), "k1")
	if err == nil || strings.Contains(err.Error(), "secret-project") || !errors.Is(err, fault.Corrupt) {
		t.Errorf("Export: %v", err)
	}
}
