package suite

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
)

// maxMessage is the largest message that the daemon takes (api.MaxBody).
const maxMessage = 256 << 10

func (s *suite) testSign(t T) {
	for _, alg := range s.algs {
		t.Run(alg.String(), func(t T) {
			k := s.key(t, alg)
			pub := k.Public()
			for name, msg := range map[string][]byte{
				"nil": nil, "empty": {}, "one byte": {0}, "short": []byte("hello"),
				"block": bytes.Repeat([]byte{0x80}, 64), "largest": bytes.Repeat([]byte("trustd"), maxMessage/6+1)[:maxMessage],
			} {
				before := bytes.Clone(msg)
				sig := mustSign(t, k, msg)
				if !bytes.Equal(before, msg) {
					t.Errorf("%s: Sign changed the message", name)
				}
				if signature.Verify(pub, append(before, 'x'), sig) == nil {
					t.Errorf("%s: the signature holds for another message", name)
				}
				clear(sig) // the caller owns the signature
			}
			mustSign(t, k, []byte("after the signatures were cleared"))
			if !k.Public().Equal(pub) {
				t.Error("Public changed")
			}
		})
	}
}

// testFixedWidth signs until r and s of an ECDSA signature have each begun with a zero byte, which is where
// conversions from DER or from integers go wrong: one signature in 256.
func (s *suite) testFixedWidth(t T) {
	for _, alg := range s.algs {
		t.Run(alg.String(), func(t T) {
			k := s.key(t, alg)
			zeroR, zeroS, enough, atMost := true, true, 16, 16
			if alg == ident.ECDSAP256 || alg == ident.ECDSAP384 {
				zeroR, zeroS, enough, atMost = false, false, 64, 8192
			}
			for i := 0; i < atMost && (i < enough || !zeroR || !zeroS); i += 16 {
				msgs := make([][]byte, 16)
				for j := range msgs {
					msgs[j] = fmt.Appendf(nil, "message %d", i+j)
				}
				for j, r := range signer.SignAll(t.Context(), k, msgs) {
					if r.Err != nil {
						t.Fatalf("message %d: %v", i+j, cause(r.Err))
					}
					if len(r.Signature) != alg.SignatureSize() {
						t.Fatalf("message %d: a signature of %d bytes, want %d", i+j, len(r.Signature), alg.SignatureSize())
					}
					if err := signature.Verify(k.Public(), msgs[j], r.Signature); err != nil {
						t.Fatalf("message %d: %v", i+j, err)
					}
					zeroR = zeroR || r.Signature[0] == 0
					zeroS = zeroS || r.Signature[len(r.Signature)/2] == 0
				}
			}
			if !zeroR || !zeroS {
				t.Errorf("no r or no s that begins with a zero byte in %d signatures", atMost)
			}
		})
	}
}

func (s *suite) testBatch(t T) {
	k := s.key(t, s.fast)
	b, ok := k.(signer.BatchSigner)
	if !ok {
		t.Skip("the backend signs one message at a time")
	}
	for _, n := range []int{0, 1, 2, 65} {
		msgs := make([][]byte, n)
		for i := range msgs {
			msgs[i] = fmt.Appendf(nil, "%d of a batch of %d", i, n)
		}
		if n > 1 {
			msgs[1] = nil
		}
		results := b.SignBatch(t.Context(), msgs)
		if len(results) != n {
			t.Fatalf("%d results for %d messages", len(results), n)
		}
		for i, r := range results {
			if r.Err != nil {
				t.Errorf("message %d of %d: %v", i, n, cause(r.Err))
			} else if err := signature.Verify(k.Public(), msgs[i], r.Signature); err != nil {
				t.Errorf("result %d of %d is not the signature of message %d: %v", i, n, i, err)
			}
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	results := b.SignBatch(ctx, [][]byte{{1}, {2}, {3}})
	if len(results) != 3 {
		t.Fatalf("%d results for 3 messages", len(results))
	}
	for _, r := range results {
		wantCode(t, r.Err, fault.Canceled)
		if r.Signature != nil {
			t.Error("a result has both a signature and an error")
		}
	}
}

func (s *suite) testContext(t T) {
	k := s.key(t, s.fast)
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	late, cancelLate := context.WithDeadline(t.Context(), time.Unix(0, 0))
	defer cancelLate()
	for _, c := range []struct {
		ctx  context.Context
		code fault.Code
	}{{canceled, fault.Canceled}, {late, fault.DeadlineExceeded}} {
		_, err := k.Sign(c.ctx, []byte("x"))
		wantCode(t, err, c.code)
		id := s.freshID(t)
		_, err = s.backend.Generate(c.ctx, id, s.fast)
		wantCode(t, err, c.code)
		_, err = s.backend.Find(t.Context(), id)
		wantCode(t, err, fault.KeyNotFound)
		_, err = s.backend.Open(c.ctx, k.Info().ID, k.Public())
		wantCode(t, err, c.code)
		_, err = s.backend.Find(c.ctx, k.Info().ID)
		wantCode(t, err, c.code)
		_, err = s.backend.Keys(c.ctx)
		wantCode(t, err, c.code)
		wantCode(t, s.backend.Destroy(c.ctx, k.Info().ID), c.code)
		mustSign(t, k, []byte("no damage"))
	}
	s.cancelMidway(t, k)
	mustSign(t, k, []byte("no damage"))
}

// cancelMidway ends contexts while the device is at work: each call answers with a right signature or with
// canceled.
func (s *suite) cancelMidway(t T, k signer.Key) {
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 8 {
				ctx, cancel := context.WithCancel(t.Context())
				stopped := make(chan struct{})
				go func() { defer close(stopped); cancel() }()
				msg := fmt.Appendf(nil, "%d %d", i, j)
				sig, err := k.Sign(ctx, msg)
				<-stopped
				if err != nil {
					wantCode(t, err, fault.Canceled)
				} else if err := signature.Verify(k.Public(), msg, sig); err != nil {
					t.Errorf("a call whose context ended returned a wrong signature: %v", err)
				}
			}
		})
	}
	wg.Wait()
}

// testConcurrency signs with several keys from 16 goroutines while others list, open, make and destroy keys.
func (s *suite) testConcurrency(t T) {
	var keys []signer.Key
	for _, alg := range s.algs {
		if alg != ident.RSA3072 && alg != ident.RSA4096 {
			keys = append(keys, s.key(t, alg))
		}
	}
	keys = append(keys, s.key(t, s.fast))
	var wg sync.WaitGroup
	for g := range 16 {
		wg.Go(func() {
			for i := range 6 {
				k := keys[(g+i)%len(keys)]
				msg := fmt.Appendf(nil, "goroutine %d message %d", g, i)
				sig, err := k.Sign(t.Context(), msg)
				if err != nil {
					t.Errorf("Sign(%v): %v", k.Public().Algorithm(), cause(err))
				} else if err := signature.Verify(k.Public(), msg, sig); err != nil {
					t.Errorf("the signature by %v belongs to another call: %v", k.Public().Algorithm(), err)
				}
			}
		})
	}
	for range 2 {
		wg.Go(func() { s.churn(t) })
	}
	wg.Wait()
}

// churn makes, lists, opens and destroys a key of its own.
func (s *suite) churn(t T) {
	for range 3 {
		id := s.freshID(t)
		k, err := s.backend.Generate(t.Context(), id, s.fast)
		if err != nil {
			t.Errorf("Generate: %v", cause(err))
			return
		}
		if _, err := s.backend.Open(t.Context(), id, k.Public()); err != nil {
			t.Errorf("Open: %v", cause(err))
		}
		if _, err := s.backend.Keys(t.Context()); err != nil {
			t.Errorf("Keys: %v", cause(err))
		}
		if d := s.backend.Describe(t.Context()); d.State != signer.Ready {
			t.Errorf("State = %q under load", d.State)
		}
		if err := s.backend.Destroy(t.Context(), id); err != nil {
			t.Errorf("Destroy: %v", cause(err))
		}
		_, err = k.Sign(t.Context(), []byte("gone"))
		wantCode(t, err, fault.KeyGone)
	}
}

// closedCodes are what a closed backend may answer.
var closedCodes = []fault.Code{fault.Stopping, fault.Unavailable, fault.DeviceLost, fault.DeviceDead}

func (s *suite) testClose(t T) {
	k := s.key(t, s.fast)
	var started, wg sync.WaitGroup
	for i := range 8 {
		started.Add(1)
		wg.Go(func() {
			msg := fmt.Appendf(nil, "in flight %d", i)
			started.Done()
			sig, err := k.Sign(t.Context(), msg)
			if err != nil {
				wantCode(t, err, closedCodes...)
			} else if err := signature.Verify(k.Public(), msg, sig); err != nil {
				t.Errorf("a signature in flight at Close is wrong: %v", err)
			}
		})
	}
	started.Wait()
	if err := s.backend.Close(); err != nil {
		t.Errorf("Close: %v", cause(err))
	}
	wg.Wait()
	ctx := t.Context()
	_, err := k.Sign(ctx, []byte("closed"))
	wantCode(t, err, closedCodes...)
	_, err = s.backend.Generate(ctx, newID(t), s.fast)
	wantCode(t, err, closedCodes...)
	_, err = s.backend.Open(ctx, k.Info().ID, k.Public())
	wantCode(t, err, closedCodes...)
	_, err = s.backend.Find(ctx, k.Info().ID)
	wantCode(t, err, closedCodes...)
	_, err = s.backend.Keys(ctx)
	wantCode(t, err, closedCodes...)
	wantCode(t, s.backend.Destroy(ctx, k.Info().ID), closedCodes...)
	if d := s.backend.Describe(ctx); d.State == signer.Ready || d.Problem == "" {
		t.Errorf("a closed backend is %q with the problem %q", d.State, d.Problem)
	}
	if !k.Public().Equal(k.Info().Public) || k.Public().IsZero() {
		t.Error("Public needs the device")
	}
	if err := s.backend.Close(); err != nil {
		t.Errorf("Close again: %v", cause(err))
	}
}

// testReopen checks that keys outlive the backend that made them.
func (s *suite) testReopen(t T) {
	s.backend = s.reopen(t)
	defer func() {
		if err := s.backend.Close(); err != nil {
			t.Errorf("Close: %v", cause(err))
		}
	}()
	for alg, old := range s.keys {
		k, err := s.backend.Open(t.Context(), old.Info().ID, old.Public())
		if err != nil {
			t.Errorf("Open(%v) after reopening: %v", alg, cause(err))
			continue
		}
		s.checkInfo(t, k.Info(), old.Info().ID, old.Public())
		mustSign(t, k, []byte("reopened"))
	}
	s.destroyAll(t)
	for alg, old := range s.keys {
		_, err := s.backend.Find(t.Context(), old.Info().ID)
		wantCode(t, err, fault.KeyNotFound)
		if err == nil {
			t.Errorf("the key of %v is still there", alg)
		}
	}
}
