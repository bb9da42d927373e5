//go:build cgo

package softhsmtest_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/eclipse-keypont/crypto11"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/plugins"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
	softhsmtest "github.com/trustd/trustd/softhsm-test"
)

// pkcs11Tool runs OpenSC's pkcs11-tool on the token. The PIN goes by environment.
func pkcs11Tool(t testing.TB, k *softhsmtest.Token, args ...string) string {
	t.Helper()
	tool := softhsmtest.Tool(t, "pkcs11-tool")
	cmd := exec.Command(tool, append([]string{
		"--module", k.Module, "--token-label", k.Label, "--login", "--pin", "env:TOKEN_PIN"}, args...)...)
	cmd.Env = append(os.Environ(), softhsmtest.EnvConf+"="+k.ConfPath, "TOKEN_PIN="+string(k.PIN()))
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("pkcs11-tool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// TestPKCS11ToolUsesOurKeys lists a key of each kind and signs with it, and checks the signature with openssl.
func TestPKCS11ToolUsesOurKeys(t *testing.T) {
	k := softhsmtest.New(t)
	h := start(t, k, softhsmtest.Build(t, "plugins/pkcs11", true))
	openssl := softhsmtest.Tool(t, "openssl")
	for _, c := range []struct {
		alg       ident.Algorithm
		mechanism string
		listed    string
		digest    bool
	}{
		{ident.Ed25519, "EDDSA", "EC_EDWARDS", false},
		{ident.ECDSAP256, "ECDSA", "EC_POINT 256 bits", true},
	} {
		t.Run(c.alg.String(), func(t *testing.T) {
			id := newID(t)
			key, err := h.Generate(t.Context(), id, c.alg)
			if err != nil {
				t.Fatal(fault.From(err).Verbose())
			}
			list := pkcs11Tool(t, k, "--list-objects")
			for _, want := range []string{id.String(), key.Info().Label, c.listed, "never extractable", "local"} {
				if !strings.Contains(list, want) {
					t.Errorf("pkcs11-tool does not list %q:\n%s", want, list)
				}
			}
			dir := t.TempDir()
			msg, in, out := []byte("a message"), filepath.Join(dir, "in"), filepath.Join(dir, "sig")
			pub := filepath.Join(dir, "pub.pem")
			input := msg
			if c.digest {
				sum := sha256.Sum256(msg)
				input = sum[:]
			}
			write(t, in, input)
			write(t, pub, []byte(key.Public().PEM()))
			pkcs11Tool(t, k, "--sign", "--mechanism", c.mechanism, "--id", id.String(), "--input-file", in, "--output-file", out)
			sig, err := os.ReadFile(out)
			if err != nil {
				t.Fatal(err)
			}
			if err := signature.Verify(key.Public(), msg, sig); err != nil {
				t.Errorf("the signature by pkcs11-tool: %v", err)
			}
			// And ours, by openssl.
			if sig, err = key.Sign(t.Context(), msg); err != nil {
				t.Fatal(err)
			}
			if c.alg != ident.Ed25519 {
				sig = der(t, sig)
			}
			write(t, out, sig)
			args := []string{"pkeyutl", "-verify", "-pubin", "-inkey", pub, "-sigfile", out, "-in", in}
			if !c.digest {
				args = append(args, "-rawin")
			}
			if text, err := exec.Command(openssl, args...).CombinedOutput(); err != nil {
				t.Errorf("openssl: %v\n%s", err, text)
			}
		})
	}
}

func der(t testing.TB, raw []byte) []byte {
	t.Helper()
	integer := func(b []byte) []byte {
		for len(b) > 1 && b[0] == 0 {
			b = b[1:]
		}
		if b[0] >= 0x80 {
			b = append([]byte{0}, b...)
		}
		return append([]byte{2, byte(len(b))}, b...)
	}
	body := append(integer(raw[:len(raw)/2]), integer(raw[len(raw)/2:])...)
	return append([]byte{0x30, byte(len(body))}, body...)
}

// TestWeUsePKCS11ToolsKeys signs with keys that pkcs11-tool made.
func TestWeUsePKCS11ToolsKeys(t *testing.T) {
	k := softhsmtest.New(t)
	h := start(t, k, softhsmtest.Build(t, "plugins/pkcs11", true))
	for kind, alg := range map[string]ident.Algorithm{
		"EC:edwards25519": ident.Ed25519, "EC:prime256v1": ident.ECDSAP256, "EC:secp384r1": ident.ECDSAP384,
		"rsa:2048": ident.RSA2048,
	} {
		id := newID(t)
		pkcs11Tool(t, k, "--keypairgen", "--key-type", kind, "--id", id.String(), "--label", "made elsewhere", "--usage-sign")
		info, err := h.Find(t.Context(), id)
		if err != nil || info.Problem != "" {
			t.Errorf("%s: %+v, %v", kind, info, err)
			continue
		}
		if info.Public.Algorithm() != alg || info.Label != "made elsewhere" || info.Origin != signer.OriginDevice {
			t.Errorf("%s: %+v", kind, info)
		}
		signs(t, h, info)
	}
	keys, err := h.Keys(t.Context())
	if err != nil || len(keys) != 4 {
		t.Errorf("%d keys listed, %v", len(keys), err)
	}
}

func signs(t testing.TB, h signer.Backend, info signer.KeyInfo) {
	t.Helper()
	key, err := h.Open(t.Context(), info.ID, info.Public)
	if err != nil {
		t.Errorf("opening: %s", fault.From(err).Verbose())
		return
	}
	sig, err := key.Sign(t.Context(), []byte("m"))
	if err != nil {
		t.Errorf("signing: %s", fault.From(err).Verbose())
		return
	}
	if err := signature.Verify(info.Public, []byte("m"), sig); err != nil {
		t.Error(err)
	}
}

// TestCrypto11 has each side use the other's ECDSA key. crypto11 knows no Ed25519, and one such key on the token
// makes it unable to list any: ours stand on tokens of their own.
func TestCrypto11(t *testing.T) {
	k := softhsmtest.New(t)
	t.Setenv(softhsmtest.EnvConf, k.ConfPath)
	h := start(t, k, softhsmtest.Build(t, "plugins/pkcs11", true))
	ours := newID(t)
	key, err := h.Generate(t.Context(), ours, ident.ECDSAP256)
	if err != nil {
		t.Fatal(fault.From(err).Verbose())
	}
	ctx, err := crypto11.Configure(&crypto11.Config{
		Path: k.Module, TokenLabel: k.Label, Pin: string(k.PIN()), MaxSessions: 4,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer ctx.Close()

	theirs := newID(t)
	made, err := ctx.GenerateECDSAKeyPairWithLabel(theirs.Bytes(), []byte("crypto11"), elliptic.P256())
	if err != nil {
		t.Fatal(err)
	}
	info, err := h.Find(t.Context(), theirs)
	if err != nil || info.Problem != "" {
		t.Fatalf("crypto11's key: %+v, %v", info, err)
	}
	if pub, err := ident.NewPublicKey(made.Public()); err != nil || !pub.Equal(info.Public) {
		t.Errorf("crypto11's key reads as another: %v", err)
	}
	signs(t, h, info)

	found, err := ctx.FindKeyPair(ours.Bytes(), nil)
	if err != nil || found == nil {
		t.Fatalf("crypto11 does not find our key: %v", err)
	}
	digest := sha256.Sum256([]byte("m"))
	sig, err := found.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil || !ecdsa.VerifyASN1(key.Public().Key().(*ecdsa.PublicKey), digest[:], sig) {
		t.Errorf("crypto11 signs with our key: %v", err)
	}
}

// TestKilledUnderLoad kills the module's process while eight callers sign on a real token. Every call ends with a
// good signature or a retryable error, and the next ones work.
func TestKilledUnderLoad(t *testing.T) {
	k := softhsmtest.New(t)
	h := start(t, k, softhsmtest.Build(t, "plugins/pkcs11", true))
	keys := make([]signer.Key, 2)
	for i, alg := range []ident.Algorithm{ident.Ed25519, ident.ECDSAP256} {
		var err error
		if keys[i], err = h.Generate(t.Context(), newID(t), alg); err != nil {
			t.Fatal(fault.From(err).Verbose())
		}
	}
	var signed, retryable atomic.Int64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				msg, key := fmt.Appendf(nil, "%d/%d", g, i), keys[i%2]
				sig, err := key.Sign(t.Context(), msg)
				switch {
				case err == nil && signature.Verify(key.Public(), msg, sig) == nil:
					signed.Add(1)
				case err != nil && fault.CodeOf(err).Retryable():
					retryable.Add(1)
				default:
					t.Errorf("a wrong signature, or %v", fault.From(err).Verbose())
				}
			}
		})
	}
	for range 3 {
		old := childOf(t, h)
		if err := syscall.Kill(old, syscall.SIGKILL); err != nil {
			t.Error(err)
		}
		poll(t, "another child", func() bool { return childOf(t, h) != old })
		before := signed.Load()
		poll(t, "signatures", func() bool { return signed.Load() > before+20 })
	}
	close(stop)
	wg.Wait()
	t.Logf("%d signed, %d retryable errors", signed.Load(), retryable.Load())
}

func childOf(t testing.TB, h *plugins.Host) int {
	t.Helper()
	n, _ := strconv.Atoi(h.Describe(t.Context()).Limits["plugin_pid"])
	return n
}

func poll(t testing.TB, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for limit := time.After(time.Minute); !ok(); {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("never: %s", what)
		}
	}
}

// TestWrongPIN has the host stop at a wrong PIN: after many calls and a crash the token has seen one wrong PIN, and
// the right one still works.
func TestWrongPIN(t *testing.T) {
	k := softhsmtest.New(t)
	binary := softhsmtest.Build(t, "plugins/pkcs11", true)
	asked := atomic.Int64{}
	h := run(t, plugins.PKCS11Config{
		Name: "hsm", Binary: binary, Module: k.Module, TokenLabel: k.Label, TokenSerial: k.Serial, Env: k.Env(),
		PIN: func(context.Context) ([]byte, error) { asked.Add(1); return []byte("wrong"), nil },
	})
	refused := func() {
		t.Helper()
		if _, err := h.Generate(t.Context(), newID(t), ident.Ed25519); !errors.Is(err, fault.AuthorisationRefused) {
			t.Errorf("with a wrong PIN: %v", err)
		}
		if d := h.Describe(t.Context()); d.State != signer.Locked || d.Remedy == "" || strings.Contains(d.Problem, "CKR_") {
			t.Errorf("%+v", d)
		}
	}
	refused()
	refused()
	if err := syscall.Kill(childOf(t, h), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	poll(t, "the host stops", func() bool { return childOf(t, h) == 0 })
	refused()
	if n := asked.Load(); n != 1 {
		t.Errorf("the PIN was asked for %d times", n)
	}
	if d := start(t, k, binary).Describe(t.Context()); d.State != signer.Ready {
		t.Errorf("with the right PIN: %+v", d)
	}
}

// TestTokenVanishes takes the token away under a running plugin and brings it back.
func TestTokenVanishes(t *testing.T) {
	k := softhsmtest.New(t)
	h := start(t, k, softhsmtest.Build(t, "plugins/pkcs11", true))
	key, err := h.Generate(t.Context(), newID(t), ident.Ed25519)
	if err != nil {
		t.Fatal(fault.From(err).Verbose())
	}
	child := childOf(t, h)
	restore := k.Vanish(t)
	if _, err := key.Sign(t.Context(), []byte("m")); !errors.Is(err, fault.DeviceLost) {
		t.Errorf("without the token: %v", err)
	}
	if _, err := h.Open(t.Context(), key.Info().ID, key.Public()); !errors.Is(err, fault.DeviceLost) {
		t.Errorf("opening without the token: %v", err)
	}
	restore()
	poll(t, "it signs again", func() bool { _, err := key.Sign(t.Context(), []byte("m")); return err == nil })
	if childOf(t, h) != child {
		t.Error("the child was restarted for it")
	}
}

// TestMissing starts without a module and without a token, and recovers when they appear.
func TestMissing(t *testing.T) {
	k := softhsmtest.New(t)
	binary := softhsmtest.Build(t, "plugins/pkcs11", true)
	module := filepath.Join(t.TempDir(), "module.so")
	h := run(t, plugins.PKCS11Config{
		Name: "hsm", Binary: binary, Module: module, TokenLabel: k.Label, Env: k.Env(),
		PIN: func(context.Context) ([]byte, error) { return k.PIN(), nil },
	})
	if d := h.Describe(t.Context()); d.State != signer.Stopped || !strings.Contains(d.Remedy, "install") {
		t.Errorf("without a module: %+v", d)
	}
	if _, err := h.Keys(t.Context()); !errors.Is(err, fault.DeviceLost) {
		t.Errorf("without a module: %v", err)
	}
	if err := os.Symlink(k.Module, module); err != nil {
		t.Fatal(err)
	}
	poll(t, "the module is found", func() bool { return h.Describe(t.Context()).State == signer.Ready })

	h = run(t, plugins.PKCS11Config{
		Name: "hsm", Binary: binary, Module: k.Module, TokenLabel: "no such token", Env: k.Env(),
		PIN: func(context.Context) ([]byte, error) { return k.PIN(), nil },
	})
	if d := h.Describe(t.Context()); d.State != signer.Degraded || d.Remedy == "" {
		t.Errorf("without a token: %+v", d)
	}
}

// TestToken checks the token's own files.
func TestToken(t *testing.T) {
	k := softhsmtest.New(t)
	info, err := os.Stat(k.PINFile)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("PIN file: %v, %v", info, err)
	}
	if text, err := os.ReadFile(k.PINFile); err != nil || strings.TrimSpace(string(text)) != string(k.PIN()) {
		t.Errorf("PIN file holds something else: %v", err)
	}
	if _, err := hex.DecodeString(k.Serial); err != nil || k.Label == "" {
		t.Errorf("serial %q, label %q", k.Serial, k.Label)
	}
}

func write(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}
