package tpm_test

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/tpm"
	softhsmtest "github.com/trustd/trustd/softhsm-test"
)

// BenchmarkSigner compares the backend with what it stands on: TPM2_Sign with a reused HMAC session on a connection
// of its own, one signature after the other, each verified. Rounds of both take turns, so that a busy machine slows
// both; "ratio" is our rate through that of the device.
func BenchmarkSigner(b *testing.B) {
	raw := rawSigner(b)
	back := open(b, softhsmtest.NewTPM(b).Device(), keyDir(b))
	keys := make([]signer.Key, 8)
	for i := range keys {
		keys[i] = generate(b, back, ident.ECDSAP256)
	}
	const round = 64
	msgs := make([][]byte, round)
	for i := range msgs {
		msgs[i] = message
	}
	for name, sign := range map[string]func(){
		"single": func() {
			for range round {
				signOnly(b, keys[0])
			}
		},
		"callers=4": func() {
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(func() {
					for range round / 4 {
						signOnly(b, keys[0])
					}
				})
			}
			wg.Wait()
		},
		"batch=64": func() {
			for _, r := range signer.SignAll(b.Context(), keys[0], msgs) {
				if r.Err != nil {
					b.Error(r.Err)
				}
			}
		},
		"keys=8": func() {
			for i := range round {
				signOnly(b, keys[i%len(keys)])
			}
		},
	} {
		b.Run(name, func(b *testing.B) {
			var ours, theirs time.Duration
			for b.Loop() {
				start := time.Now()
				for range round {
					raw()
				}
				middle := time.Now()
				sign()
				theirs += middle.Sub(start)
				ours += time.Since(middle)
			}
			n := float64(b.N * round)
			b.ReportMetric(theirs.Seconds()*1e6/n, "raw-us")
			b.ReportMetric(ours.Seconds()*1e6/n, "ours-us")
			b.ReportMetric(theirs.Seconds()/ours.Seconds(), "ratio")
		})
	}
}

func signOnly(b *testing.B, k signer.Signer) {
	if _, err := k.Sign(context.Background(), message); err != nil {
		b.Error(err)
	}
}

// rawSigner returns a function that makes one signature with go-tpm alone, and verifies it.
func rawSigner(b *testing.B) func() {
	r, err := tpm.OpenRaw(softhsmtest.NewTPM(b).Path())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { r.Close() })
	return func() {
		if err := r.SignAndVerify(message); err != nil {
			b.Fatal(err)
		}
	}
}

var message = make([]byte, 1024)
