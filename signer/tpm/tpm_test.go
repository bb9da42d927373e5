package tpm_test

import (
	"context"
	"crypto/rand"
	"path/filepath"
	"testing"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/signertest"
	"github.com/trustd/trustd/signer/tpm"
	softhsmtest "github.com/trustd/trustd/softhsm-test"
)

func TestConformance(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	dir := keyDir(t)
	again := func(t testing.TB) signer.Backend { return open(t, m.Device(), dir) }
	signertest.Run(t, again, signertest.Reopen(again))
}

func open(t testing.TB, device, dir string) *tpm.Backend {
	t.Helper()
	return openWith(t, tpm.Config{Device: device, Dir: dir})
}

func openWith(t testing.TB, conf tpm.Config) *tpm.Backend {
	t.Helper()
	b, err := tpm.Open(conf)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

func keyDir(t testing.TB) string { return filepath.Join(t.TempDir(), "keys") }

func newID(t testing.TB) signer.ID {
	t.Helper()
	raw := make([]byte, 16)
	_, _ = rand.Read(raw)
	id, err := signer.NewID(raw)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func generate(t testing.TB, b *tpm.Backend, alg ident.Algorithm) signer.Key {
	t.Helper()
	k, err := b.Generate(context.Background(), newID(t), alg)
	if err != nil {
		t.Fatal(fault.From(err).Verbose())
	}
	return k
}

func mustSign(t testing.TB, k signer.Signer, msg []byte) []byte {
	t.Helper()
	sig, err := k.Sign(context.Background(), msg)
	if err != nil {
		t.Fatal(fault.From(err).Verbose())
	}
	if err := signature.Verify(k.Public(), msg, sig); err != nil {
		t.Fatal(err)
	}
	return sig
}
