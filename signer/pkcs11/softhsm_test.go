//go:build cgo

package pkcs11_test

import (
	"context"
	gocrypto "crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"testing"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/pkcs11"
	"github.com/trustd/trustd/signer/signertest"
	softhsmtest "github.com/trustd/trustd/softhsm-test"
)

func config(k *softhsmtest.Token) pkcs11.Config {
	return pkcs11.Config{
		Module: k.Module, TokenLabel: k.Label, TokenSerial: k.Serial,
		PIN: func(context.Context) ([]byte, error) { return k.PIN(), nil },
	}
}

// open boots a token and returns its backend. The module reads its configuration once per process and
// initialisation, so that tests on tokens run one after the other.
func open(t testing.TB) (*pkcs11.Backend, *softhsmtest.Token) {
	k := softhsmtest.New(t)
	t.Setenv(softhsmtest.EnvConf, k.ConfPath)
	b := pkcs11.New(config(k))
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Errorf("closing: %v", err)
		}
	})
	return b, k
}

func newID(t testing.TB) signer.ID {
	raw := make([]byte, 16)
	if _, err := rand.Read(raw); err != nil {
		t.Fatal(err)
	}
	id, err := signer.NewID(raw)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func TestAlgorithms(t *testing.T) {
	b, k := open(t)
	ctx := t.Context()
	d := b.Describe(ctx)
	if d.State != signer.Ready || d.Grade != signer.Software {
		t.Fatalf("description %+v", d)
	}
	for _, alg := range []ident.Algorithm{
		ident.Ed25519, ident.ECDSAP256, ident.ECDSAP384, ident.RSA2048, ident.RSA3072, ident.RSA4096,
	} {
		t.Run(alg.String(), func(t *testing.T) {
			id := newID(t)
			key, err := b.Generate(ctx, id, alg)
			if err != nil {
				t.Fatal(fault.From(err).Verbose())
			}
			info := key.Info()
			if !info.Sensitive || !info.Always || info.Exported || info.Origin != signer.OriginDevice {
				t.Errorf("attributes %+v", info)
			}
			u, err := signer.ParseURI(info.URI)
			if err != nil || u.ID != id || u.Token != k.Label || u.Serial != k.Serial {
				t.Errorf("uri %q: %+v, %v", info.URI, u, err)
			}
			for _, n := range []int{0, 1, 1024, 256 << 10} {
				msg := make([]byte, n)
				sig, err := key.Sign(ctx, msg)
				if err != nil {
					t.Fatalf("signing %d bytes: %s", n, fault.From(err).Verbose())
				}
				if err := signature.Verify(key.Public(), msg, sig); err != nil {
					t.Errorf("%d bytes: %v", n, err)
				}
			}
			again, err := b.Open(ctx, id, key.Public())
			if err != nil {
				t.Fatal(err)
			}
			for i, r := range again.(signer.BatchSigner).SignBatch(ctx, [][]byte{{1}, {2}, {3}, {4}, {5}}) {
				if r.Err != nil || signature.Verify(key.Public(), []byte{byte(i + 1)}, r.Signature) != nil {
					t.Errorf("batch entry %d: %v", i, r.Err)
				}
			}
		})
	}
}

func TestImport(t *testing.T) {
	b, _ := open(t)
	ctx := t.Context()
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	p256, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	rsa2048, _ := rsa.GenerateKey(rand.Reader, 2048)
	for name, k := range map[string]any{"ed25519": ed, "ecdsa-p256": p256, "ecdsa-p384": p384, "rsa-2048": rsa2048} {
		t.Run(name, func(t *testing.T) {
			der, err := x509.MarshalPKCS8PrivateKey(k)
			if err != nil {
				t.Fatal(err)
			}
			id := newID(t)
			key, err := b.Import(ctx, id, der)
			if err != nil {
				t.Fatal(fault.From(err).Verbose())
			}
			info := key.Info()
			if info.Origin != signer.OriginImported || info.Always || !info.Sensitive {
				t.Errorf("attributes %+v", info)
			}
			want, _ := ident.NewPublicKey(k.(gocrypto.Signer).Public())
			if !key.Public().Equal(want) {
				t.Error("the imported key has another public key")
			}
			sig, err := key.Sign(ctx, []byte("m"))
			if err != nil || signature.Verify(want, []byte("m"), sig) != nil {
				t.Errorf("signing: %v", err)
			}
			if _, err := b.Import(ctx, id, der); !errors.Is(err, fault.AlreadyExists) {
				t.Errorf("importing twice: %v", err)
			}
		})
	}
	for _, der := range [][]byte{nil, {0x30}, make([]byte, 64)} {
		if _, err := b.Import(ctx, newID(t), der); !errors.Is(err, fault.Malformed) {
			t.Errorf("importing garbage: %v", err)
		}
	}
}

func TestTokenVanishesAndReturns(t *testing.T) {
	b, k := open(t)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	key, err := b.Generate(ctx, newID(t), ident.Ed25519)
	if err != nil {
		t.Fatal(err)
	}
	restore := k.Vanish(t)
	if _, err := key.Sign(ctx, []byte("m")); !errors.Is(err, fault.DeviceLost) {
		t.Fatalf("signing on a lost token: %v", err)
	}
	if _, err := b.Open(ctx, key.Info().ID, key.Public()); !errors.Is(err, fault.DeviceLost) {
		t.Fatalf("opening on a lost token: %v", err)
	}
	if err := b.Destroy(ctx, key.Info().ID); !errors.Is(err, fault.DeviceLost) {
		t.Fatalf("destroying on a lost token: %v", err)
	}
	if d := b.Describe(ctx); d.State != signer.Degraded || d.Remedy == "" {
		t.Errorf("description of a lost token: %+v", d)
	}
	restore()
	for {
		if _, err = key.Sign(ctx, []byte("m")); err == nil {
			return
		}
		if !errors.Is(err, fault.DeviceLost) {
			t.Fatalf("while it returns: %v", fault.From(err).Verbose())
		}
	}
}

func TestWrongPINIsTriedOnce(t *testing.T) {
	k := softhsmtest.New(t)
	t.Setenv(softhsmtest.EnvConf, k.ConfPath)
	asked := 0
	cfg := config(k)
	cfg.PIN = func(context.Context) ([]byte, error) { asked++; return []byte("not the pin"), nil }
	b := pkcs11.New(cfg)
	defer b.Close()
	for range 5 {
		if _, err := b.Generate(t.Context(), newID(t), ident.Ed25519); !errors.Is(err, fault.AuthorisationRefused) {
			t.Fatalf("with a wrong PIN: %v", err)
		}
		if d := b.Describe(t.Context()); d.State != signer.Locked || d.Remedy == "" {
			t.Fatalf("description: %+v", d)
		}
	}
	if asked != 1 {
		t.Errorf("the PIN was asked for %d times", asked)
	}
}

func TestConformance(t *testing.T) {
	signertest.Run(t, func(t testing.TB) signer.Backend { b, _ := open(t); return b })
}

func fixed(pin string) func(context.Context) ([]byte, error) {
	return func(context.Context) ([]byte, error) { return []byte(pin), nil }
}
