package tpm_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/tpm"
	softhsmtest "github.com/trustd/trustd/softhsm-test"
	"github.com/trustd/trustd/softhsm-test/tpmproxy"
)

const forever = -1

// The formats of a response code: handle 1, parameter 1, session 1 (Part 2, 6.6.3).
const (
	handle1  = 0x100
	session1 = 0x900
	param1   = 0x140
)

// code answers with a response code.
func code(rc tpm2.TPMRC) tpmproxy.Action { return tpmproxy.Return(uint32(rc)) }

// times has the first n commands cc meet an action; forever is all of them.
func times(n int, cc tpmproxy.Code, do tpmproxy.Action) tpmproxy.Rule {
	return tpmproxy.Rule{Command: cc, Times: max(n, 0), Do: do}
}

var garbage = tpmproxy.Answer([]byte("HTTP/1.1 400 Bad Request\r\n\r\n"))

// TestClasses makes the TPM fail in each of the ten ways, once and for ever: what can be repaired is, a caller sees
// the right code for what cannot, a refused authorisation is never repeated, and the backend serves afterwards.
func TestClasses(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	r := tpmproxy.New(t, m.Path())
	for _, c := range []struct {
		name    string
		class   signer.Class
		command tpmproxy.Code
		bad     tpmproxy.Action
		once    fault.Code // "" = repaired
		most    int        // how often the command may come when it fails for ever; 0 = any
	}{
		{"retry", signer.TransientBusy, tpmproxy.Sign, code(tpm2.TPMRCRetry), "", 0},
		{"yielded", signer.TransientBusy, tpmproxy.Sign, code(tpm2.TPMRCYielded), "", 0},
		{"testing", signer.TransientBusy, tpmproxy.Sign, code(tpm2.TPMRCTesting), "", 0},
		{"canceled", signer.TransientBusy, tpmproxy.Sign, code(tpm2.TPMRCCanceled), fault.DeviceBusy, 1},
		{"session flushed", signer.SessionLost, tpmproxy.Sign, code(tpm2.TPMRCReferenceS0), "", 3},
		{"handle flushed", signer.HandleLost, tpmproxy.Sign, code(tpm2.TPMRCReferenceH0), "", 3},
		{"handle invalid", signer.HandleLost, tpmproxy.Sign, code(tpm2.TPMRCHandle + handle1), "", 3},
		{"nonce", signer.LoginLost, tpmproxy.Sign, code(tpm2.TPMRCNonce + session1), "", 3},
		{"forged response", signer.LoginLost, tpmproxy.Sign, tpmproxy.CorruptSignature(), "", 3},
		{"forged proof", signer.LoginLost, tpmproxy.Sign, tpmproxy.CorruptHMAC(), "", 2},
		{"forged load", signer.LoginLost, tpmproxy.Load, tpmproxy.CorruptHMAC(), "", 2},
		{"truncated response", signer.LoginLost, tpmproxy.Sign, tpmproxy.Truncate(20), "", 3},
		{"connection broken", signer.TokenLost, tpmproxy.Sign, tpmproxy.Drop(), "", 2},
		{"response lost", signer.TokenLost, tpmproxy.Sign, tpmproxy.DropAfter(), "", 2},
		{"garbage", signer.TokenLost, tpmproxy.Sign, garbage, "", 2},
		{"failure mode", signer.ModuleDead, tpmproxy.Sign, code(tpm2.TPMRCFailure), fault.DeviceDead, 1},
		{"unknown code", signer.ModuleDead, tpmproxy.Sign, code(0x57f), fault.DeviceDead, 1},
		{"lockout", signer.AuthorisationRefused, tpmproxy.Sign, code(tpm2.TPMRCLockout), fault.AuthorisationRefused, 1},
		{"auth fail", signer.AuthorisationRefused, tpmproxy.Sign, code(tpm2.TPMRCAuthFail + session1),
			fault.AuthorisationRefused, 1},
		{"bad auth", signer.AuthorisationRefused, tpmproxy.Sign, code(tpm2.TPMRCBadAuth + session1),
			fault.AuthorisationRefused, 1},
		{"no slot", signer.ResourcesExhausted, tpmproxy.Load, code(tpm2.TPMRCObjectMemory), "", 3},
		{"no session", signer.ResourcesExhausted, tpmproxy.StartAuthSession, code(tpm2.TPMRCSessionHandles), "", 3},
		{"no NV space", signer.ResourcesExhausted, tpmproxy.Load, code(tpm2.TPMRCNVSpace), "", 3},
		{"blob of another TPM", signer.KeyGone, tpmproxy.Load, code(tpm2.TPMRCIntegrity + param1), fault.KeyGone, 1},
		{"damaged blob", signer.KeyGone, tpmproxy.Load, code(tpm2.TPMRCSize + param1), fault.KeyGone, 1},
		{"caller error", signer.CallerError, tpmproxy.Sign, code(tpm2.TPMRCValue + param1), fault.Malformed, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			r.Script()
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
				r.Script(times(n, c.command, c.bad))
				opened, err := b.Open(context.Background(), k.Info().ID, k.Public())
				if err == nil {
					_, err = opened.Sign(context.Background(), message)
				}
				if got := fault.CodeOf(err); got != want {
					t.Fatalf("failing %d times: code %q (%v), want %q", n, got, verbose(err), want)
				}
				if class := signer.ClassOf(err); err != nil && class != c.class {
					t.Errorf("failing %d times: class %q, want %q", n, class, c.class)
				}
				for class, counted := range b.Failures() {
					if (counted > 0) != (class == c.class) || n == 1 && counted > 1 {
						t.Errorf("failing %d times: %d failures of the class %q counted", n, counted, class)
					}
				}
				if seen := r.Count(c.command); n == forever && c.most != 0 && seen > c.most {
					t.Errorf("the command came %d times, want at most %d", seen, c.most)
				}
				r.Script()
				if c.class == signer.AuthorisationRefused {
					_, err := opened.Sign(context.Background(), message)
					if fault.CodeOf(err) != fault.AuthorisationRefused || r.Count(tpmproxy.Sign) != 0 {
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

// TestWrongSignature has the TPM prove responses whose signature is then another: it never leaves, the key is loaded
// anew and asked once more, and no oftener.
func TestWrongSignature(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	r := tpmproxy.New(t, m.Path())
	b := open(t, r.Device(), keyDir(t))
	k := generate(t, b, ident.ECDSAP256)
	for wrong, want := range map[int]fault.Code{1: "", 2: fault.DeviceDead} {
		if err := tpm.Tamper(b, wrong); err != nil {
			t.Fatal(verbose(err))
		}
		before := b.Failures()[signer.ModuleDead]
		r.Script()
		sig, err := k.Sign(context.Background(), message)
		if fault.CodeOf(err) != want || err == nil && signature.Verify(k.Public(), message, sig) != nil {
			t.Errorf("%d wrong signatures: %v", wrong, verbose(err))
		}
		if err != nil && signer.ClassOf(err) != signer.ModuleDead {
			t.Errorf("the class is %q", signer.ClassOf(err))
		}
		if n := b.Failures()[signer.ModuleDead] - before; n != uint64(wrong) || r.Count(tpmproxy.Sign) != 2 {
			t.Errorf("%d wrong signatures: %d counted, %d attempts", wrong, n, r.Count(tpmproxy.Sign))
		}
		if d := b.Describe(context.Background()); (d.State == signer.Recovering) != (err != nil) {
			t.Errorf("after %d wrong signatures: %s", wrong, d.State)
		}
		mustSign(t, k, message)
		if d := b.Describe(context.Background()); d.State != signer.Ready {
			t.Errorf("after a right signature: %s", d.State)
		}
	}
}

// FuzzSplitResponse feeds the reader of responses to TPM2_Sign: what it takes is the whole response and nothing else.
func FuzzSplitResponse(f *testing.F) {
	head := []byte{0x80, 2, 0, 0, 0, 0, 0, 0, 0, 0}
	f.Add(append(bytes.Clone(head), 0, 0, 0, 2, 9, 9, 0, 1, 7, 1, 0, 1, 8))
	f.Add(append(bytes.Clone(head), 0, 0, 0, 0, 0, 0, 1, 0, 0))
	f.Add(append(bytes.Clone(head), 0xff, 0xff, 0xff, 0xff))
	f.Add([]byte{0x80, 1, 0, 0, 0, 10, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, rsp []byte) {
		params, nonce, mac, err := tpm.SplitResponse(rsp)
		if err == nil && len(rsp) != 10+4+len(params)+2+len(nonce)+1+2+len(mac) {
			t.Errorf("%x is taken apart into %x, %x and %x", rsp, params, nonce, mac)
		}
		if err != nil && tpm.Classify(err) != signer.LoginLost {
			t.Errorf("an error without its class: %v", err)
		}
	})
}

// TestCreateRefused has a TPM claim an algorithm and then refuse it.
func TestCreateRefused(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	r := tpmproxy.New(t, m.Path())
	b := open(t, r.Device(), keyDir(t))
	for _, rc := range []tpm2.TPMRC{tpm2.TPMRCCurve, tpm2.TPMRCValue, tpm2.TPMRCAsymmetric, tpm2.TPMRCCommandCode} {
		r.Script(times(1, tpmproxy.Create, code(rc)))
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
	r := tpmproxy.New(t, m.Path())
	b := open(t, r.Device(), keyDir(t))
	k := generate(t, b, ident.ECDSAP256)
	for range 3 {
		m.Reset()
		r.Script()
		mustSign(t, k, message)
		if r.Count(tpmproxy.Startup) != 1 || r.Count(tpmproxy.Load) != 1 {
			t.Errorf("%d starts and %d loads, want 1 and 1", r.Count(tpmproxy.Startup), r.Count(tpmproxy.Load))
		}
	}
}

// TestSteadyState counts: a key in use costs one command a signature.
func TestSteadyState(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	r := tpmproxy.New(t, m.Path())
	b := open(t, r.Device(), keyDir(t))
	k := generate(t, b, ident.ECDSAP256)
	r.Script()
	for range 10 {
		mustSign(t, k, message)
	}
	if n := r.Count(tpmproxy.Sign); n != 10 {
		t.Errorf("%d commands TPM2_Sign for 10 signatures", n)
	}
	b.Close()
	if all := r.Count(tpmproxy.Any); all > 10+4 { // Close flushes three objects and the session
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
