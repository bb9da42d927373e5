package tpm_test

import (
	"encoding/asn1"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
	softhsmtest "github.com/trustd/trustd/softhsm-test"
)

// raw talks to the TPM on a connection of its own. No backend is connected meanwhile.
func raw(t testing.TB, m *softhsmtest.TPM, f func(transport.TPM) error) {
	t.Helper()
	conn, err := net.Dial("unix", m.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := f(transport.FromReadWriter(struct {
		io.Reader
		io.Writer
	}{conn, conn})); err != nil {
		t.Fatal(err)
	}
}

// An srk says how to make a storage root key persistent.
type srk struct {
	owner    []byte // the owner hierarchy's password
	password []byte // the new key's
	unique   []byte // in the template; the TCG's has 32 zero bytes, other values give other keys
}

// provision does what provisioning tools do: it keeps a storage root key at 0x81000001.
func provision(t testing.TB, m *softhsmtest.TPM, s srk) {
	t.Helper()
	raw(t, m, func(c transport.TPM) error {
		area := tpm2.ECCSRKTemplate
		area.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: s.unique}, Y: tpm2.TPM2BECCParameter{Buffer: make([]byte, 32)},
		})
		auth := tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(s.owner)}
		srk, err := tpm2.CreatePrimary{
			PrimaryHandle: auth, InPublic: tpm2.New2B(area),
			InSensitive: tpm2.TPM2BSensitiveCreate{
				Sensitive: &tpm2.TPMSSensitiveCreate{UserAuth: tpm2.TPM2BAuth{Buffer: s.password}},
			},
		}.Execute(c)
		if err != nil {
			return err
		}
		_, err = tpm2.EvictControl{
			Auth: auth, ObjectHandle: &tpm2.NamedHandle{Handle: srk.ObjectHandle, Name: srk.Name}, PersistentHandle: 0x81000001,
		}.Execute(c)
		if err != nil {
			return err
		}
		_, err = tpm2.FlushContext{FlushHandle: srk.ObjectHandle}.Execute(c)
		return err
	})
}

// tool runs a program against the TPM, in a folder.
func tool(t testing.TB, m *softhsmtest.TPM, dir, name string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if os.Getenv("CI") != "" || os.Getenv("TRUSTD_REQUIRE_HSM") == "1" {
			t.Fatalf("%s is not installed (apt-get install tpm2-tools openssl)", name)
		}
		t.Skipf("%s is not installed (apt-get install tpm2-tools openssl)", name)
	}
	cmd := exec.Command(path, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "TPM2TOOLS_TCTI="+m.Device())
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return string(out)
}

// TestTools has tpm2-tools and openssl accept our signatures, and tpm2-tools load our blobs and sign with them.
func TestTools(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	provision(t, m, srk{unique: make([]byte, 32)})
	dir, work := keyDir(t), t.TempDir()
	for _, alg := range []ident.Algorithm{ident.ECDSAP256, ident.ECDSAP384, ident.RSA2048} {
		t.Run(alg.String(), func(t *testing.T) {
			b := open(t, m.Device(), dir)
			k := generate(t, b, alg)
			sig := mustSign(t, k, message)
			b.Close() // the TPM serves one connection
			theirs := sig
			if alg.Wire() != "PS256" {
				theirs = derOf(t, sig)
			}
			write(t, work, "msg", message)
			write(t, work, "sig", theirs)
			write(t, work, "pub.pem", []byte(k.Public().PEM()))
			blob := filepath.Join(dir, k.Info().ID.String())
			hash, scheme := "sha256", "ecdsa"
			opts := []string{}
			switch alg {
			case ident.ECDSAP384:
				hash = "sha384"
			case ident.RSA2048:
				scheme = "rsapss"
				opts = []string{"-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:32"}
			}
			tool(t, m, work, "openssl", append([]string{"dgst", "-" + hash, "-verify", "pub.pem", "-signature", "sig"},
				append(opts, "msg")...)...)
			tool(t, m, work, "tpm2_flushcontext", "-t")
			tool(t, m, work, "tpm2_loadexternal", "-C", "o", "-u", blob+".pub", "-c", "ext.ctx")
			tool(t, m, work, "tpm2_verifysignature", "-c", "ext.ctx", "-g", hash, "-f", scheme, "-m", "msg", "-s", "sig")
			tool(t, m, work, "tpm2_flushcontext", "-t")
			tool(t, m, work, "tpm2_load", "-C", "0x81000001", "-u", blob+".pub", "-r", blob+".priv", "-c", "key.ctx")
			tool(t, m, work, "tpm2_sign", "-c", "key.ctx", "-g", hash, "-s", scheme, "-f", "plain", "-o", "out", "msg")
			out, err := os.ReadFile(filepath.Join(work, "out"))
			if err != nil {
				t.Fatal(err)
			}
			if alg.Wire() != "PS256" {
				out = fixedOf(t, out, alg.SignatureSize())
			}
			if err := signature.Verify(k.Public(), message, out); err != nil {
				t.Errorf("the signature that tpm2_sign made with our blob: %v", err)
			}
			// What the tools left loaded does not disturb us.
			b = open(t, m.Device(), dir)
			again, err := b.Open(t.Context(), k.Info().ID, k.Public())
			if err != nil {
				t.Fatal(verbose(err))
			}
			mustSign(t, again, message)
			b.Close()
		})
	}
}

// TestForeignKey takes in a pair of blobs that tpm2_create made.
func TestForeignKey(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	provision(t, m, srk{unique: make([]byte, 32)})
	dir := keyDir(t)
	open(t, m.Device(), dir).Close() // makes the folder
	for id, args := range map[string][]string{
		"0a": {"-G", "ecc:ecdsa", "-a", "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|sign"},
		"0b": {"-G", "ecc", "-a", "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|decrypt"},
		"0c": {"-G", "ecc", "-a", "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|sign", "-p", "secret"},
	} {
		args = append([]string{"-C", "0x81000001", "-u", id + ".pub", "-r", id + ".priv"}, args...)
		tool(t, m, dir, "tpm2_create", args...)
	}
	tool(t, m, dir, "tpm2_flushcontext", "-t")
	b := open(t, m.Device(), dir)
	list, err := b.Keys(t.Context())
	if err != nil || len(list) != 3 {
		t.Fatalf("%d keys, %v", len(list), verbose(err))
	}
	byID := map[string]signer.KeyInfo{}
	for _, i := range list {
		byID[i.ID.String()] = i
	}
	if byID["0b"].Problem == "" {
		t.Error("a key that cannot sign is listed without a problem")
	}
	if i := byID["0a"]; i.Problem != "" || !i.Sensitive || !i.Always || i.Origin != signer.OriginDevice {
		t.Errorf("the foreign key: %+v", i)
	}
	k, err := b.Open(t.Context(), byID["0a"].ID, byID["0a"].Public)
	if err != nil {
		t.Fatal(verbose(err))
	}
	mustSign(t, k, message)
	// A key with a password is refused, once: each try would count towards the TPM's lockout.
	k, err = b.Open(t.Context(), byID["0c"].ID, byID["0c"].Public)
	if err != nil {
		t.Fatal(verbose(err))
	}
	for range 5 {
		if _, err := k.Sign(t.Context(), message); fault.CodeOf(err) != fault.AuthorisationRefused {
			t.Errorf("signing with a key that has a password: %v", verbose(err))
		}
	}
	if n := b.Describe(t.Context()).Limits["lockout_counter"]; n != "1" {
		t.Errorf("the lockout counter is %s after a refused password, want 1", n)
	}
}

func write(t testing.TB, dir, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func derOf(t testing.TB, sig []byte) []byte {
	t.Helper()
	half := len(sig) / 2
	der, err := asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(sig[:half]), new(big.Int).SetBytes(sig[half:])})
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func fixedOf(t testing.TB, der []byte, size int) []byte {
	t.Helper()
	var s struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(der, &s); err != nil {
		t.Fatal(err)
	}
	out := make([]byte, size)
	s.R.FillBytes(out[:size/2])
	s.S.FillBytes(out[size/2:])
	return out
}

// damages are ways to spoil the files at path+".pub" and so on; other is the path of an intact key.
var damages = map[string]func(t *testing.T, path, other string){
	"no private blob":    func(t *testing.T, path, _ string) { spoil(t, path+".priv", nil) },
	"no public blob":     func(t *testing.T, path, _ string) { remove(t, path+".pub") },
	"blob bit flipped":   func(t *testing.T, path, _ string) { flipBit(t, path+".priv") },
	"public bit flipped": func(t *testing.T, path, _ string) { flipBit(t, path+".pub") },
	"record of another":  func(t *testing.T, path, other string) { copyFile(t, path+".json", other+".json") },
	"pair of another": func(t *testing.T, path, other string) {
		copyFile(t, path+".pub", other+".pub")
		copyFile(t, path+".priv", other+".priv")
	},
	"record torn": func(t *testing.T, path, _ string) { spoil(t, path+".json", []byte(`{"version":1,"al`)) },
	"huge file":   func(t *testing.T, path, _ string) { spoil(t, path+".priv", make([]byte, 1<<20)) },
	"symlink": func(t *testing.T, path, other string) {
		remove(t, path+".priv")
		if err := os.Symlink(other+".priv", path+".priv"); err != nil {
			t.Fatal(err)
		}
	},
}

func spoil(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

func copyFile(t *testing.T, to, from string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	spoil(t, to, b)
}

func flipBit(t *testing.T, path string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	spoil(t, path, b)
}
