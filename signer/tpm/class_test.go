package tpm_test

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/tpmdev"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/tpm"
	softhsmtest "github.com/trustd/trustd/softhsm-test"
)

func TestClassify(t *testing.T) {
	for _, c := range []struct {
		err  error
		want signer.Class
	}{
		{nil, ""},
		{errors.New("ours"), ""},
		{tpmdev.ErrLost, signer.TokenLost},
		{fmt.Errorf("signing: %w", errors.Join(tpmdev.ErrHung, os.ErrDeadlineExceeded)), signer.TokenLost},
		{tpmdev.ErrAbsent, signer.TokenLost},
		{fmt.Errorf("signing: %w", tpm2.TPMRCRetry), signer.TransientBusy},
		{tpm2.TPMRC(0x9a2), signer.AuthorisationRefused}, // BAD_AUTH, session 1
		{tpm2.TPMRC(0x98e), signer.AuthorisationRefused}, // AUTH_FAIL, session 1
		{tpm2.TPMRC(0x18b), signer.HandleLost},           // HANDLE, handle 1
		{tpm2.TPMRC(0x1df), signer.KeyGone},              // INTEGRITY, parameter 1
		{tpm2.TPMRC(0x2c4), signer.CallerError},          // VALUE, parameter 2
		{tpm2.TPMRC(0x184), signer.HandleLost},           // VALUE, handle 1
		{tpm2.TPMRC(0x984), signer.SessionLost},          // VALUE, session 1
		{tpm2.TPMRC(0x182), signer.HandleLost},           // ATTRIBUTES, handle 1
		{tpm2.TPMRC(0x1c2), signer.CallerError},          // ATTRIBUTES, parameter 1
		{tpm2.TPMRC(0x902), signer.ResourcesExhausted},   // OBJECT_MEMORY
		{tpm2.TPMRC(0x921), signer.AuthorisationRefused}, // LOCKOUT
		{tpm2.TPMRC(0x100), signer.TokenLost},            // INITIALIZE
		{tpm2.TPMRC(0x101), signer.ModuleDead},           // FAILURE
		{tpm2.TPMRC(0x01e), signer.ModuleDead},           // TPM 1.2: BAD_TAG
		{tpm2.TPMRC(0xffffffff), signer.ModuleDead},
	} {
		if got := tpm.Classify(c.err); got != c.want {
			t.Errorf("%v: %q, want %q", c.err, got, c.want)
		}
	}
	// Every code that go-tpm has a description of has a class of its own choice.
	for rc := tpm2.TPMRC(0x080); rc < 0xa00; rc++ {
		known := !strings.Contains(rc.Error(), "unknown") && !strings.Contains(rc.Error(), "unrecognized")
		dead := tpm.Classify(rc) == signer.ModuleDead
		deliberate := rc == tpm2.TPMRCFailure || rc == tpm2.TPMRCUpgrade || rc == tpm2.TPMRCNVUninitialized ||
			rc == tpm2.TPMRCPrivate || rc == tpm2.TPMRCHMAC // these two: "not currently used"
		if known && dead && !deliberate {
			t.Errorf("%#x (%v) has no class", uint32(rc), rc)
		}
	}
}

// TestPSSSalt has a chip make RSA-PSS signatures with the largest salt that fits, as old ones do.
func TestPSSSalt(t *testing.T) {
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := ident.NewPublicKey(&private.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	d := sha256.Sum256(message)
	for salt, want := range map[int]fault.Code{
		32: "", rsa.PSSSaltLengthAuto: fault.AlgorithmUnsupported, 20: fault.AlgorithmUnsupported,
	} {
		opts := &rsa.PSSOptions{SaltLength: salt, Hash: crypto.SHA256}
		sig, err := rsa.SignPSS(rand.Reader, private, crypto.SHA256, d[:], opts)
		if err != nil {
			t.Fatal(err)
		}
		offered, err := tpm.TryOut(pub, message, sig)
		if fault.CodeOf(err) != want || offered != (want == "") {
			t.Errorf("salt %d: %v, RSA offered: %v", salt, err, offered)
		}
		sig[7] ^= 1
		if offered, err = tpm.TryOut(pub, message, sig); fault.CodeOf(err) != fault.DeviceDead || !offered {
			t.Errorf("a wrong signature: %v, RSA offered: %v", err, offered)
		}
	}
}

// TestUnsupported asks for what no TPM and what this TPM has not.
func TestUnsupported(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	b := open(t, m.Device(), keyDir(t))
	for _, alg := range []ident.Algorithm{ident.Ed25519, ident.RSA4096} {
		_, err := b.Generate(t.Context(), newID(t), alg)
		e := fault.From(err)
		if e == nil || e.Code != fault.AlgorithmUnsupported || !strings.Contains(e.Text, alg.String()) ||
			!strings.Contains(e.Text, "ecdsa-p256, ecdsa-p384, rsa-3072, rsa-2048") {
			t.Errorf("%v: %v", alg, err)
		}
	}
}

// TestDescribe checks that an emulator does not pass for hardware.
func TestDescribe(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	b := open(t, m.Device(), keyDir(t))
	d := b.Describe(t.Context())
	if d.Grade != signer.Software || !strings.Contains(d.Device, "emulator") || !strings.Contains(d.Device, "IBM") {
		t.Errorf("Describe: %+v", d)
	}
	if d.Algorithms[0] != ident.ECDSAP256 || len(d.Mechanisms) != len(d.Algorithms) || d.Limits["loaded_objects"] != "3" {
		t.Errorf("Describe: %+v", d)
	}
	if k := generate(t, b, ident.ECDSAP256).Info(); k.Grade != signer.Software || !k.Sensitive || !k.Always || k.Exported {
		t.Errorf("Info: %+v", k)
	}
}

// TestFolder refuses a folder that others can read.
func TestFolder(t *testing.T) {
	dir := t.TempDir()
	for _, mode := range []os.FileMode{0o750, 0o705, 0o777} {
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		_, err := tpm.Open(tpm.Config{Device: "device:/dev/tpmrm0", Dir: dir})
		if fault.CodeOf(err) != fault.InsecureSecret {
			t.Errorf("a folder of mode %o: %v", mode, err)
		}
	}
	for _, c := range []tpm.Config{{Device: "device:/dev/tpmrm0", Dir: "keys"}, {Device: "tpm0", Dir: keyDir(t)}} {
		if _, err := tpm.Open(c); fault.CodeOf(err) != fault.Malformed {
			t.Errorf("%+v: %v", c, err)
		}
	}
	b := open(t, "device:"+filepath.Join(dir, "none"), keyDir(t)) // as on a host without a TPM
	if d := b.Describe(t.Context()); d.State != signer.Degraded || d.Remedy == "" || d.Grade != signer.HardwareClaimed {
		t.Errorf("Describe: %+v", d)
	}
}

// TestFolderVanished fails to write a key's files: the key does not exist afterwards.
func TestFolderVanished(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	dir := keyDir(t)
	b := open(t, m.Device(), dir)
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	id := newID(t)
	if _, err := b.Generate(t.Context(), id, ident.ECDSAP256); fault.CodeOf(err) != fault.Internal {
		t.Errorf("Generate without a folder: %v", verbose(err))
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Find(t.Context(), id); fault.CodeOf(err) != fault.KeyNotFound {
		t.Errorf("Find: %v", verbose(err))
	}
	mustSign(t, generate(t, b, ident.ECDSAP256), message)
}

// FuzzParseKey feeds the reader of key files. Whatever it takes, it takes the same way again.
func FuzzParseKey(f *testing.F) {
	for _, ext := range []string{"p256", "rsa2048"} {
		var files [3][]byte
		for i, kind := range []string{".pub", ".priv", ".json"} {
			b, err := os.ReadFile(filepath.Join("testdata", ext+kind))
			if err != nil {
				f.Fatal(err)
			}
			files[i] = b
		}
		f.Add(files[0], files[1], files[2], true)
		f.Add(files[0], files[1], []byte(nil), false)
	}
	f.Fuzz(func(t *testing.T, public, private, record []byte, hasRecord bool) {
		if !hasRecord {
			record = nil
		}
		pub, err := tpm.ParseKey(public, private, record)
		if err == nil && pub.IsZero() {
			t.Error("neither a key nor an error")
		}
		if err != nil && fault.CodeOf(err) == fault.Internal {
			t.Errorf("an error without a code: %v", err)
		}
	})
}
