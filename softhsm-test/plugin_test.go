package softhsmtest_test

import (
	"context"
	"testing"
	"time"

	"github.com/trustd/trustd/plugins"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/signertest"
	softhsmtest "github.com/trustd/trustd/softhsm-test"
)

// start runs a host on the token until the test ends.
func start(t testing.TB, k *softhsmtest.Token, binary string) *plugins.Host {
	return run(t, plugins.PKCS11Config{
		Name: "hsm", Binary: binary, Module: k.Module, TokenLabel: k.Label, TokenSerial: k.Serial, Env: k.Env(),
		PIN:      func(context.Context) ([]byte, error) { return k.PIN(), nil },
		Deadline: 5 * time.Second,
	})
}

func run(t testing.TB, cfg plugins.PKCS11Config) *plugins.Host {
	h := plugins.NewPKCS11(cfg)
	ended := make(chan error, 1)
	go func() { ended <- h.Run(context.Background()) }()
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Errorf("closing: %v", err)
		}
		if err := <-ended; err != nil {
			t.Errorf("running: %v", err)
		}
	})
	return h
}

func TestConformance(t *testing.T) {
	k := softhsmtest.New(t)
	binary := softhsmtest.Build(t, "plugins/pkcs11", true)
	signertest.Run(t, func(t testing.TB) signer.Backend { return start(t, k, binary) },
		signertest.Reopen(func(t testing.TB) signer.Backend { return start(t, k, binary) }))
}
