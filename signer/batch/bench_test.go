package batch_test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"sync"
	"testing"

	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/batch"
)

// free signs for nothing, so that what is left is the price of the queue.
type free struct{ pub ident.PublicKey }

func (f free) Public() ident.PublicKey { return f.pub }

func (free) SignEach(_ context.Context, msgs [][]byte, _ []uint64) []signer.Result {
	out := make([]signer.Result, len(msgs))
	for i := range out {
		out[i].Signature = make([]byte, 64)
	}
	return out
}

func (free) SignOver(context.Context, [][sha256.Size]byte, []uint64, []byte) ([]byte, error) {
	return make([]byte, 64), nil
}

// BenchmarkQueue is what the queue, the tree and the proof cost a message of 1 KiB, beside nothing at all.
func BenchmarkQueue(b *testing.B) {
	pub := newTarget(b, 1, 0).pub
	for _, callers := range []int{1, 64, 1024} {
		b.Run(fmt.Sprint(callers), func(b *testing.B) {
			key := batch.NewDevice(batch.Config{}).Key(free{pub})
			items := []batch.Item{{Subject: signature.Subject{Kind: signature.KindPacket, Agent: agent, Message: make([]byte, 1024)}, Batchable: true}}
			b.ReportAllocs()
			var wg sync.WaitGroup
			for c := range callers {
				wg.Go(func() {
					for range b.N/callers + 1 {
						if r := key.Sign(context.Background(), batch.Caller{UID: uint32(c)}, items)[0]; r.Err != nil {
							b.Error(r.Err)
						}
					}
				})
			}
			wg.Wait()
		})
	}
}
