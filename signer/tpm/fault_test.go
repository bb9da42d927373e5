package tpm_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/tpm"
	softhsmtest "github.com/trustd/trustd/softhsm-test"
)

const forever = -1

// The formats of a response code: handle 1, parameter 1, session 1 (Part 2, 6.6.3).
const (
	handle1  = 0x100
	session1 = 0x900
	param1   = 0x140
)

func flip(forward func() []byte) []byte {
	rsp := forward()
	if len(rsp) > 40 {
		rsp[40] ^= 1 // inside the signature, which the session's HMAC covers
	}
	return rsp
}

func hangUp(func() []byte) []byte { return nil }

func garbage(func() []byte) []byte { return []byte("HTTP/1.1 400 Bad Request\r\n\r\n") }

func truncated(forward func() []byte) []byte {
	rsp := forward()[:20]
	rsp[4], rsp[5] = 0, 20
	return rsp
}

// TestClasses makes the TPM fail in each of the ten ways, once and for ever: what can be repaired is, a caller sees
// the right code for what cannot, a refused authorisation is never repeated, and the backend serves afterwards.
func TestClasses(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	r := newRelay(t, m.Path())
	for _, c := range []struct {
		name    string
		class   signer.Class
		command tpm2.TPMCC
		bad     func(func() []byte) []byte
		once    fault.Code // "" = repaired
		most    int        // how often the command may come when it fails for ever; 0 = any
	}{
		{"retry", signer.TransientBusy, tpm2.TPMCCSign, code(tpm2.TPMRCRetry), "", 0},
		{"yielded", signer.TransientBusy, tpm2.TPMCCSign, code(tpm2.TPMRCYielded), "", 0},
		{"testing", signer.TransientBusy, tpm2.TPMCCSign, code(tpm2.TPMRCTesting), "", 0},
		{"canceled", signer.TransientBusy, tpm2.TPMCCSign, code(tpm2.TPMRCCanceled), fault.DeviceBusy, 1},
		{"session flushed", signer.SessionLost, tpm2.TPMCCSign, code(tpm2.TPMRCReferenceS0), "", 3},
		{"handle flushed", signer.HandleLost, tpm2.TPMCCSign, code(tpm2.TPMRCReferenceH0), "", 3},
		{"handle invalid", signer.HandleLost, tpm2.TPMCCSign, code(tpm2.TPMRCHandle + handle1), "", 3},
		{"nonce", signer.LoginLost, tpm2.TPMCCSign, code(tpm2.TPMRCNonce + session1), "", 3},
		{"forged response", signer.LoginLost, tpm2.TPMCCSign, flip, "", 3},
		{"truncated response", signer.LoginLost, tpm2.TPMCCSign, truncated, "", 3},
		{"connection broken", signer.TokenLost, tpm2.TPMCCSign, hangUp, "", 2},
		{"garbage", signer.TokenLost, tpm2.TPMCCSign, garbage, "", 2},
		{"failure mode", signer.ModuleDead, tpm2.TPMCCSign, code(tpm2.TPMRCFailure), fault.DeviceDead, 1},
		{"unknown code", signer.ModuleDead, tpm2.TPMCCSign, code(0x57f), fault.DeviceDead, 1},
		{"lockout", signer.AuthorisationRefused, tpm2.TPMCCSign, code(tpm2.TPMRCLockout), fault.AuthorisationRefused, 1},
		{"auth fail", signer.AuthorisationRefused, tpm2.TPMCCSign, code(tpm2.TPMRCAuthFail + session1),
			fault.AuthorisationRefused, 1},
		{"bad auth", signer.AuthorisationRefused, tpm2.TPMCCSign, code(tpm2.TPMRCBadAuth + session1),
			fault.AuthorisationRefused, 1},
		{"no slot", signer.ResourcesExhausted, tpm2.TPMCCLoad, code(tpm2.TPMRCObjectMemory), "", 3},
		{"no session", signer.ResourcesExhausted, tpm2.TPMCCStartAuthSession, code(tpm2.TPMRCSessionHandles), "", 3},
		{"no NV space", signer.ResourcesExhausted, tpm2.TPMCCLoad, code(tpm2.TPMRCNVSpace), "", 3},
		{"blob of another TPM", signer.KeyGone, tpm2.TPMCCLoad, code(tpm2.TPMRCIntegrity + param1), fault.KeyGone, 1},
		{"damaged blob", signer.KeyGone, tpm2.TPMCCLoad, code(tpm2.TPMRCSize + param1), fault.KeyGone, 1},
		{"caller error", signer.CallerError, tpm2.TPMCCSign, code(tpm2.TPMRCValue + param1), fault.Malformed, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			r.OnCommand(nil)
			dir := keyDir(t)
			conf := tpm.Config{Device: r.Device(), Dir: dir}
			b := openWith(t, conf)
			k := generate(t, b, ident.ECDSAP256)
			b.Close()
			for _, n := range []int{1, forever} {
				if n == forever && c.class == signer.TransientBusy {
					conf.CommandTimeout = 300 * time.Millisecond // for which it is asked again and again
				}
				b = openWith(t, conf) // so that the first signature loads the key
				want := c.once
				if n == forever && want == "" {
					want = c.class.Code()
				}
				r.OnCommand(times(n, c.command, c.bad))
				opened, err := b.Open(context.Background(), k.Info().ID, k.Public())
				if err == nil {
					_, err = opened.Sign(context.Background(), message)
				}
				if got := fault.CodeOf(err); got != want {
					t.Fatalf("failing %d times: code %q (%v), want %q", n, got, verbose(err), want)
				}
				if seen := r.Count(c.command); n == forever && c.most != 0 && seen > c.most {
					t.Errorf("the command came %d times, want at most %d", seen, c.most)
				}
				r.OnCommand(nil)
				if c.class == signer.AuthorisationRefused {
					_, err := opened.Sign(context.Background(), message)
					if fault.CodeOf(err) != fault.AuthorisationRefused || r.Count(tpm2.TPMCCSign) != 0 {
						t.Errorf("a refused authorisation was tried again: %v", verbose(err))
					}
				} else {
					eventually(t, func() error {
						k, err := b.Open(context.Background(), k.Info().ID, k.Public())
						if err != nil {
							return err
						}
						_, err = k.Sign(context.Background(), message)
						return err
					})
				}
				b.Close()
			}
			for _, ext := range []string{".pub", ".priv", ".json"} {
				if _, err := os.Stat(filepath.Join(dir, k.Info().ID.String()+ext)); err != nil {
					t.Errorf("the key's files did not survive: %v", err)
				}
			}
		})
	}
}

// TestCreateRefused has a TPM claim an algorithm and then refuse it.
func TestCreateRefused(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	r := newRelay(t, m.Path())
	b := open(t, r.Device(), keyDir(t))
	for _, rc := range []tpm2.TPMRC{tpm2.TPMRCCurve, tpm2.TPMRCValue, tpm2.TPMRCAsymmetric, tpm2.TPMRCCommandCode} {
		r.OnCommand(times(1, tpm2.TPMCCCreate, code(rc)))
		id := newID(t)
		if _, err := b.Generate(context.Background(), id, ident.ECDSAP256); fault.CodeOf(err) != fault.AlgorithmUnsupported {
			t.Errorf("%v: %v", rc, verbose(err))
		}
		if _, err := b.Find(context.Background(), id); fault.CodeOf(err) != fault.KeyNotFound {
			t.Errorf("%v: Find after a refused Generate: %v", rc, verbose(err))
		}
	}
}

// TestReset resets the TPM under an open connection, which then waits for TPM2_Startup: the request that finds out
// is served.
func TestReset(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	r := newRelay(t, m.Path())
	b := open(t, r.Device(), keyDir(t))
	k := generate(t, b, ident.ECDSAP256)
	for range 3 {
		m.Reset()
		r.OnCommand(nil)
		mustSign(t, k, message)
		if r.Count(tpm2.TPMCCStartup) != 1 || r.Count(tpm2.TPMCCLoad) != 1 {
			t.Errorf("%d starts and %d loads, want 1 and 1", r.Count(tpm2.TPMCCStartup), r.Count(tpm2.TPMCCLoad))
		}
	}
}

// TestSteadyState counts: a key in use costs one command a signature.
func TestSteadyState(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	r := newRelay(t, m.Path())
	b := open(t, r.Device(), keyDir(t))
	k := generate(t, b, ident.ECDSAP256)
	all := 0
	r.OnCommand(func(cc tpm2.TPMCC, forward func() []byte) []byte { all++; return forward() })
	for range 10 {
		mustSign(t, k, message)
	}
	if n := r.Count(tpm2.TPMCCSign); n != 10 {
		t.Errorf("%d commands TPM2_Sign for 10 signatures", n)
	}
	b.Close()
	if all > 10+4 { // Close flushes three objects and the session
		t.Errorf("%d commands for 10 signatures and Close", all)
	}
}

func verbose(err error) error {
	if err == nil {
		return nil
	}
	return errors.New(fault.From(err).Verbose())
}

// eventually repeats f until it succeeds, for as long as its errors are retryable.
func eventually(t testing.TB, f func() error) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(30 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		if !fault.CodeOf(err).Retryable() {
			t.Fatalf("not a retryable error: %v", verbose(err))
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("still failing: %v", verbose(err))
		}
	}
}
