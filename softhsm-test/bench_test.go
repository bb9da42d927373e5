//go:build cgo

package softhsmtest_test

import (
	"context"
	"crypto/rand"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/pkcs11"
	softhsmtest "github.com/trustd/trustd/softhsm-test"
)

const batch = 64

// BenchmarkSign compares a loop of C_Sign with the Signer in this process and with the one in the plugin. All but
// raw verify each signature; raw-verify is the loop that they are measured against. Batches count per message.
func BenchmarkSign(b *testing.B) {
	k := softhsmtest.New(b)
	b.Setenv(softhsmtest.EnvConf, k.ConfPath)
	inside := pkcs11.New(pkcs11.Config{
		Module: k.Module, TokenLabel: k.Label, TokenSerial: k.Serial,
		PIN: func(context.Context) ([]byte, error) { return k.PIN(), nil },
	})
	defer inside.Close()
	across := start(b, k, softhsmtest.Build(b, "plugins/pkcs11", true))
	for _, alg := range []ident.Algorithm{ident.Ed25519, ident.ECDSAP256} {
		b.Run(alg.String(), func(b *testing.B) { benchmarkKey(b, inside, across, alg) })
	}
}

func benchmarkKey(b *testing.B, inside *pkcs11.Backend, across signer.Backend, alg ident.Algorithm) {
	ctx := context.Background()
	id := newID(b)
	key, err := inside.Generate(ctx, id, alg)
	if err != nil {
		b.Fatal(fault.From(err).Verbose())
	}
	remote, err := across.Open(ctx, id, key.Public())
	if err != nil {
		b.Fatal(fault.From(err).Verbose())
	}
	msg := make([]byte, 1024)
	msgs := make([][]byte, batch)
	for i := range msgs {
		msgs[i] = msg
	}
	for _, sessions := range []int{1, 2} {
		for _, verified := range []bool{false, true} {
			name := map[bool]string{false: "raw", true: "raw-verify"}[verified] + map[int]string{1: "/1", 2: "/2"}[sessions]
			b.Run(name, func(b *testing.B) { benchmarkRaw(b, inside, key, sessions, verified, msg) })
		}
	}
	for name, k := range map[string]signer.Key{"inside": key, "across": remote} {
		b.Run(name+"/single", func(b *testing.B) {
			var took []time.Duration
			for b.Loop() {
				began := time.Now()
				if _, err := k.Sign(ctx, msg); err != nil {
					b.Fatal(err)
				}
				took = append(took, time.Since(began))
			}
			report(b, took)
		})
		b.Run(name+"/batch", func(b *testing.B) {
			for n := 0; n < b.N; n += batch {
				for _, r := range signer.SignAll(ctx, k, msgs[:min(batch, b.N-n)]) {
					if r.Err != nil {
						b.Fatal(r.Err)
					}
				}
			}
		})
	}
}

func benchmarkRaw(b *testing.B, inside *pkcs11.Backend, key signer.Key, sessions int, verified bool, msg []byte) {
	raws := make([]*pkcs11.Raw, sessions)
	for i := range raws {
		var err error
		if raws[i], err = inside.OpenRaw(context.Background(), key.Info().ID); err != nil {
			b.Fatal(err)
		}
	}
	b.ResetTimer()
	var took []time.Duration
	var wg sync.WaitGroup
	for i, r := range raws {
		share := b.N / sessions
		if i == 0 {
			share += b.N % sessions
		}
		wg.Go(func() {
			for range share {
				began := time.Now()
				sig, err := r.Sign(msg)
				if err == nil && verified {
					err = signature.Verify(key.Public(), msg, sig)
				}
				if err != nil {
					b.Error(err)
					return
				}
				if i == 0 {
					took = append(took, time.Since(began))
				}
			}
		})
	}
	wg.Wait()
	report(b, took)
}

// report adds the median, which a busy machine disturbs less than the mean.
func report(b *testing.B, took []time.Duration) {
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Nanoseconds()), "p50-ns")
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
