//go:build cgo

package pkcs11

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
)

// together calls f from n goroutines at once and returns their errors.
func together(n int, f func() error) []error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() { errs[i] = f() })
	}
	wg.Wait()
	return errs
}

// TestWrongPINIsShownOnce has 64 callers meet a wrong PIN, at the first login and at one that was lost; each Unlock
// shows one PIN more, however many call it at once.
func TestWrongPINIsShownOnce(t *testing.T) {
	for _, late := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			f := newFake()
			b := f.backend(t, 4)
			pin, asked := "wrong", 0
			sign := func() error { _, err := b.Generate(t.Context(), "id", ident.Ed25519); return err }
			if late {
				k := generate(t, b)
				sign = func() error { _, err := k.Sign(t.Context(), []byte("m")); return err }
				f.set(func() { f.pin = "changed"; f.logout() })
			}
			b.cfg.PIN = func(context.Context) ([]byte, error) { asked++; return []byte(pin), nil }
			before := f.count("Login")
			refusedAll := func(logins int) {
				t.Helper()
				for _, err := range together(64, sign) {
					if !errors.Is(err, fault.AuthorisationRefused) {
						t.Errorf("late=%v: %v", late, err)
					}
				}
				time.Sleep(time.Minute) // of the bubble's clock: nothing goes on behind the scenes
				if d := b.Describe(t.Context()); d.State != signer.Locked || d.Limits["pin"] != "refused" || d.Remedy == "" {
					t.Errorf("late=%v: %+v", late, d)
				}
				if n := f.count("Login") - before; n != logins || asked != logins {
					t.Errorf("late=%v: %d logins, the PIN was asked for %d times, want %d", late, n, asked, logins)
				}
			}
			refusedAll(1)
			refusedAll(1)
			for _, err := range unlockTogether(t, f, b) {
				if !errors.Is(err, fault.AuthorisationRefused) {
					t.Errorf("unlocking with the wrong PIN: %v", err)
				}
			}
			refusedAll(2)
			pin = "1234"
			f.set(func() { f.pin = pin })
			for _, err := range unlockTogether(t, f, b) {
				if err != nil {
					t.Errorf("unlocking with the right PIN: %v", err)
				}
			}
			if err := sign(); err != nil || f.count("Login")-before != 3 {
				t.Errorf("after unlocking: %v, %d logins", err, f.count("Login")-before)
			}
			if d := b.Describe(t.Context()); d.State != signer.Ready {
				t.Errorf("after unlocking: %+v", d)
			}
			if n := b.Failures()[signer.AuthorisationRefused]; n != 2 {
				t.Errorf("%d refusals were counted", n)
			}
		})
	}
}

// unlockTogether makes 16 calls of Unlock that are all under way before the token answers the first.
func unlockTogether(t *testing.T, f *fakeToken, b *Backend) []error {
	release := make(chan struct{})
	f.set(func() { f.hang["Login"] = release })
	done := make(chan []error)
	go func() { done <- together(16, func() error { return b.Unlock(t.Context()) }) }()
	synctest.Wait()
	f.set(func() { delete(f.hang, "Login") })
	close(release)
	return <-done
}

// TestVagueRefusals has a module call a wrong PIN something else.
func TestVagueRefusals(t *testing.T) {
	for name, c := range map[string]struct {
		prepare func(*fakeToken)
		logins  int
	}{
		"the token says so by its flags": {func(f *fakeToken) { f.vague, f.pin = true, "other" }, 1},
		"a caller's error":               {func(f *fakeToken) { f.script["Login"] = []error{rv(pkcs11.CKR_ARGUMENTS_BAD)} }, 1},
		"a general error, again and again": {func(f *fakeToken) {
			for range 10 {
				f.script["Login"] = append(f.script["Login"], rv(pkcs11.CKR_GENERAL_ERROR))
			}
		}, unclearLimit},
		"a vendor's error, again and again": {func(f *fakeToken) {
			for range 10 {
				f.script["Login"] = append(f.script["Login"], rv(0x80000001))
			}
		}, unclearLimit},
	} {
		synctest.Test(t, func(t *testing.T) {
			f := newFake()
			c.prepare(f)
			b := f.backend(t, 2)
			for range 20 {
				_ = together(8, func() error { _, err := b.Keys(t.Context()); return err })
				time.Sleep(time.Second)
			}
			if n := f.count("Login"); n != c.logins {
				t.Errorf("%s: %d logins, want %d", name, n, c.logins)
			}
			if d := b.Describe(t.Context()); d.State != signer.Locked {
				t.Errorf("%s: %+v", name, d)
			}
		})
	}
	synctest.Test(t, func(t *testing.T) { // one that passes locks nothing
		f := newFake()
		f.next("Login", rv(pkcs11.CKR_GENERAL_ERROR))
		b := f.backend(t, 2)
		_ = b.Describe(t.Context())
		time.Sleep(time.Second)
		if d := b.Describe(t.Context()); d.State != signer.Ready {
			t.Errorf("%+v", d)
		}
	})
}

// TestLastTryIsTheOperators takes the last try before the PIN locks only when it is asked to.
func TestLastTryIsTheOperators(t *testing.T) {
	f := newFake()
	f.flags |= pkcs11.CKF_USER_PIN_FINAL_TRY
	b := f.backend(t, 1)
	d := b.Describe(t.Context())
	if d.State != signer.Locked || f.count("Login") != 0 || !strings.Contains(d.Remedy, "unlock") {
		t.Errorf("%+v, %d logins", d, f.count("Login"))
	}
	if err := b.Unlock(t.Context()); err != nil || f.count("Login") != 1 {
		t.Errorf("unlocking: %v, %d logins", err, f.count("Login"))
	}
}

func TestUnlockWithoutToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.next("Login", rv(pkcs11.CKR_PIN_INCORRECT))
		b := f.backend(t, 1)
		_ = b.Describe(t.Context())
		f.set(func() { f.gone = true })
		if err := b.Unlock(t.Context()); !errors.Is(err, fault.DeviceLost) {
			t.Errorf("unlocking without the token: %v", err)
		}
		time.Sleep(time.Minute)
		f.set(func() { f.gone = false })
		time.Sleep(time.Second)
		if d := b.Describe(t.Context()); d.State != signer.Ready || f.count("Login") != 2 {
			t.Errorf("after its return: %+v, %d logins", d, f.count("Login"))
		}
		if err := b.Unlock(t.Context()); err != nil || f.count("Login") != 2 {
			t.Errorf("unlocking what is not locked: %v, %d logins", err, f.count("Login"))
		}
	})
}

// TestLoginIsMadeOnce has 64 callers notice at once that the login was lost.
func TestLoginIsMadeOnce(t *testing.T) {
	f := newFake()
	b := f.backend(t, 8)
	k := generate(t, b)
	for range 5 {
		before := f.count("Login")
		f.set(func() { f.loggedIn = false; f.epoch++ })
		for _, err := range together(64, func() error { _, err := k.Sign(t.Context(), []byte("m")); return err }) {
			if err != nil {
				t.Fatal(fault.From(err).Verbose())
			}
		}
		if n := f.count("Login") - before; n != 1 {
			t.Errorf("%d logins", n)
		}
	}
	if b.Failures()[signer.LoginLost] == 0 || f.count("Finalize") != 0 {
		t.Errorf("failures %v, %d times finalised", b.Failures(), f.count("Finalize"))
	}
}

// TestAnotherTokenIsNoneOfOurs puts another token of the same label into the slot. It must not see the PIN, its lack
// of the key says nothing about the key, and what Describe says names both serials.
func TestAnotherTokenIsNoneOfOurs(t *testing.T) {
	for name, swap := range map[string]func(*fakeToken){
		"sessions die":       func(f *fakeToken) { f.logout() },
		"sessions live on":   func(f *fakeToken) {},
		"the login is lost":  func(f *fakeToken) { f.loggedIn = false; f.epoch++ },
		"it needs no login":  func(f *fakeToken) { f.logout(); f.flags = pkcs11.CKF_TOKEN_INITIALIZED; f.loggedIn = true },
		"the module is anew": func(f *fakeToken) { f.ready = false; f.logout() },
	} {
		synctest.Test(t, func(t *testing.T) {
			f := newFake()
			b := f.backend(t, 2)
			k := generate(t, b)
			if d := b.Describe(t.Context()); d.Limits["serial"] != "1" {
				t.Errorf("%s: limits %v", name, d.Limits)
			}
			flags, logins := f.flags, f.count("Login")
			var keys map[uint]*fakeKey
			f.set(func() { f.serial, keys, f.keys = "2", f.keys, map[uint]*fakeKey{}; swap(f) })
			for range 10 {
				for _, err := range together(16, func() error { _, err := k.Sign(t.Context(), []byte("m")); return err }) {
					if !errors.Is(err, fault.DeviceLost) {
						t.Errorf("%s: %v", name, err)
					}
				}
				if _, err := b.Open(t.Context(), k.Info().ID, k.Public()); !errors.Is(err, fault.DeviceLost) {
					t.Errorf("%s: opening: %v", name, err)
				}
				time.Sleep(time.Second)
			}
			d := b.Describe(t.Context())
			if d.State != signer.Degraded || !strings.Contains(d.Problem, "serial is 2 and not 1") || d.Limits["serial"] != "1" {
				t.Errorf("%s: %+v", name, d)
			}
			if n := f.count("Login"); n != logins {
				t.Errorf("%s: the other token saw %d logins", name, n-logins)
			}
			f.set(func() { f.serial, f.keys, f.flags = "1", keys, flags; f.logout() })
			time.Sleep(time.Second)
			if _, err := k.Sign(t.Context(), []byte("m")); err != nil {
				t.Errorf("%s: after its return: %v", name, err)
			}
		})
	}
}

// TestTokenIsChosenByItsKeys tells tokens apart that have one label and one serial number, or none.
func TestTokenIsChosenByItsKeys(t *testing.T) {
	for _, serial := range []string{"1", ""} {
		synctest.Test(t, func(t *testing.T) {
			f := newFake()
			f.serial, f.twin = serial, serial
			b := f.backend(t, 2)
			k := generate(t, b)
			f.set(func() { f.tokens, f.at = 3, 2; f.ready = false; f.logout() })
			if _, err := k.Sign(t.Context(), []byte("m")); err != nil {
				t.Errorf("serial %q: %s", serial, fault.From(err).Verbose())
			}
			f.set(func() { f.tokens = 1; f.ready = false; f.logout() }) // only another is left
			_, err := k.Sign(t.Context(), []byte("m"))
			want := fault.KeyGone // by all that can be known, it is the token
			if serial == "" {
				want = fault.DeviceLost
			}
			if fault.CodeOf(err) != want {
				t.Errorf("serial %q: %v, want %s", serial, err, want)
			}
		})
	}
}

// TestComesBackWithoutRequests: nobody asks for anything while the token is away, nor when it returns.
func TestComesBackWithoutRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		b := f.backend(t, 2)
		k := generate(t, b)
		f.set(func() { f.gone = true })
		if _, err := k.Sign(t.Context(), []byte("m")); !errors.Is(err, fault.DeviceLost) {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		before := f.count("Initialize")
		started := time.Now()
		_, err := k.Sign(t.Context(), []byte("m"))
		if e := fault.From(err); e.Code != fault.DeviceLost || e.RetryAfter == 0 || time.Since(started) > 0 {
			t.Errorf("between two tries: %v after %v", err, time.Since(started))
		}
		time.Sleep(10 * time.Second)
		if n := f.count("Initialize") - before; n < 20 || n > 30 {
			t.Errorf("%d tries in 10 s", n)
		}
		f.set(func() { f.gone = false })
		time.Sleep(longestTry + time.Millisecond)
		before = f.count("Initialize")
		if _, err := k.Sign(t.Context(), []byte("m")); err != nil || f.count("Initialize") != before {
			t.Errorf("after its return: %v", err)
		}
		if b.Failures()[signer.TokenLost] < 1000 {
			t.Errorf("failures %v", b.Failures())
		}
	})
}

// TestDescribeWhileConnecting does not wait for a module that takes its time.
func TestDescribeWhileConnecting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		b := f.backend(t, 2)
		k := generate(t, b)
		release := make(chan struct{})
		f.set(func() { f.hang["Initialize"] = release; f.ready = false; f.logout() })
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		done := make(chan error)
		go func() { _, err := k.Sign(ctx, []byte("m")); done <- err }()
		synctest.Wait()
		if d := b.Describe(t.Context()); d.State != signer.Recovering || d.Problem == "" || d.Remedy == "" {
			t.Errorf("%+v", d)
		}
		f.set(func() { delete(f.hang, "Initialize") })
		close(release)
		if err := <-done; err != nil { // a request that came meanwhile waits for the outcome
			t.Error(err)
		}
	})
}

// TestWrongSignatureIsMadeAgain flips a bit once, for good, and in one of the sessions only.
func TestWrongSignatureIsMadeAgain(t *testing.T) {
	msg := []byte("m")
	f := newFake()
	b := f.backend(t, 4)
	k := generate(t, b)
	for range 50 {
		f.set(func() { f.flips = 1 })
		opened := f.count("OpenSession")
		sig, err := k.Sign(t.Context(), msg)
		if err != nil || signature.Verify(k.Public(), msg, sig) != nil {
			t.Fatalf("after one wrong signature: %v", err)
		}
		if f.count("OpenSession") == opened {
			t.Fatal("it was made again on the same session")
		}
	}
	if n := b.Failures()[signer.ModuleDead]; n != 50 {
		t.Errorf("%d wrong signatures were counted", n)
	}
	f.set(func() { f.tamper = true })
	for _, err := range together(64, func() error { _, err := k.Sign(t.Context(), msg); return err }) {
		if !errors.Is(err, fault.DeviceDead) {
			t.Errorf("with wrong signatures: %v", err)
		}
	}
	f.set(func() { f.tamper = false })
	if n := b.Failures()[signer.ModuleDead]; n != 50+2*64 {
		t.Errorf("%d wrong signatures were counted", n)
	}
	f.set(func() { f.bad = f.anySession() })
	for range 100 {
		if sig, err := k.Sign(t.Context(), msg); err != nil || signature.Verify(k.Public(), msg, sig) != nil {
			t.Fatalf("with one bad session: %v", err)
		}
	}
}

// TestPoolShrinksAndGrows takes sessions away and gives them back.
func TestPoolShrinksAndGrows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		b := f.backend(t, 4)
		k := generate(t, b)
		sign := func() error { _, err := k.Sign(t.Context(), []byte("m")); return err }
		load := func() {
			t.Helper()
			for _, err := range together(64, sign) {
				if err != nil {
					t.Fatal(fault.From(err).Verbose())
				}
			}
		}
		load()
		f.set(func() { f.maxOpen = 3; f.logout() })
		load()
		if n := b.Parallel(); n > 2 || n < 1 {
			t.Errorf("%d sessions where there is room for 2", n)
		}
		for range 15 {
			time.Sleep(time.Second)
			load()
		}
		if n := b.Parallel(); n > 3 {
			t.Errorf("%d sessions where there is room for 2", n)
		}
		f.set(func() { f.maxOpen = 100 })
		for range 20 {
			time.Sleep(2 * time.Second)
			load()
		}
		if n := b.Parallel(); n != 4 || len(b.slots) != 4 {
			t.Errorf("%d sessions, %d slots after there is room again", n, len(b.slots))
		}
		if b.Failures()[signer.ResourcesExhausted] == 0 {
			t.Error("nothing was counted")
		}
	})
}

// TestSickTokenIsConnectedAnew has every signature fail on a token that answers, until the module is initialised.
func TestSickTokenIsConnectedAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		b := f.backend(t, 2)
		k := generate(t, b)
		time.Sleep(2 * fresh)
		f.set(func() { f.sick = true })
		finalised := f.count("Finalize")
		failures := 0
		for range 20 {
			if _, err := k.Sign(t.Context(), []byte("m")); err != nil {
				if !errors.Is(err, fault.DeviceLost) {
					t.Fatal(err)
				}
				failures++
			}
			_ = b.Describe(t.Context())
		}
		if failures > unwellLimit || f.count("Finalize") != finalised+1 {
			t.Errorf("%d failures, %d times finalised", failures, f.count("Finalize")-finalised)
		}
	})
}

// TestMissingKeyIsLookedForTwice: a token that does not show a key that it held is believed only when connections made
// for the purpose agree.
func TestMissingKeyIsLookedForTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		b := f.backend(t, 2)
		k := generate(t, b)
		f.set(func() { f.stale = true }) // the index is gone, the key is not
		if _, err := k.Sign(t.Context(), []byte("m")); err != nil {
			t.Errorf("with an empty index: %v", err)
		}
		time.Sleep(2 * fresh)
		f.set(func() { clear(f.keys) })
		before := f.count("Finalize")
		for i := range 100 {
			_, err := k.Sign(t.Context(), []byte("m"))
			if !errors.Is(err, fault.KeyGone) || signer.ClassOf(err) != signer.KeyGone {
				t.Fatalf("call %d on an emptied token: %v", i, err)
			}
			time.Sleep(100 * time.Millisecond)
		}
		if n := f.count("Finalize") - before; n > 10 { // and does not suffer from being asked
			t.Errorf("%d times finalised", n)
		}
	})
}

// TestGenerateGoesOnAfterALoss fails the token once in each call that making a key consists of: the caller gets the
// key, and the token holds one.
func TestGenerateGoesOnAfterALoss(t *testing.T) {
	for _, code := range []uint{
		pkcs11.CKR_FUNCTION_CANCELED, pkcs11.CKR_SESSION_CLOSED, pkcs11.CKR_OBJECT_HANDLE_INVALID,
		pkcs11.CKR_USER_NOT_LOGGED_IN, pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED, pkcs11.CKR_DEVICE_MEMORY,
	} {
		for _, function := range []string{
			"FindObjectsInit", "FindObjects", "GenerateKeyPair", "GetAttributeValue", "GetSessionInfo",
		} {
			f := newFake()
			b := f.backend(t, 2)
			_ = b.Describe(t.Context())
			f.next(function, rv(code))
			k, err := b.Generate(t.Context(), "id", ident.Ed25519)
			if err != nil {
				t.Errorf("0x%X in %s: %s", code, function, fault.From(err).Verbose())
				continue
			}
			if _, err := k.Sign(t.Context(), []byte("m")); err != nil || len(f.keys) != 1 {
				t.Errorf("0x%X in %s: %v, %d keys", code, function, err, len(f.keys))
			}
		}
	}
}

// TestSlowCallIsNobodysSlot: callers whose deadline passes leave nothing behind.
func TestSlowCallIsNobodysSlot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		b := f.backend(t, 3)
		k := generate(t, b)
		for range 50 {
			release := make(chan struct{})
			f.set(func() { f.hang["Sign"] = release })
			_ = together(20, func() error {
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				_, err := k.Sign(ctx, []byte("m"))
				if !errors.Is(err, fault.DeadlineExceeded) {
					t.Errorf("a call that hangs: %v", err)
				}
				return nil
			})
			f.set(func() { delete(f.hang, "Sign") })
			close(release)
			synctest.Wait()
			if n := len(b.slots); n != 3 || b.Parallel() != 3 || b.hung.Load() != 0 {
				t.Fatalf("%d slots, %d sessions, %d hang", n, b.Parallel(), b.hung.Load())
			}
		}
		f.set(func() {
			if len(f.sessions) > 4 {
				t.Errorf("%d sessions are open", len(f.sessions))
			}
		})
	})
}

// TestSecretsStayOut: neither a PIN nor a device's control characters reach what people read.
func TestSecretsStayOut(t *testing.T) {
	f := newFake()
	f.serial = "1\x1b[2J\n"
	b := f.backend(t, 1)
	d := b.Describe(t.Context())
	for _, s := range []string{d.Device, d.Limits["serial"]} {
		if bytes.ContainsAny([]byte(s), "\x1b\n") {
			t.Errorf("%q", s)
		}
	}
	f.set(func() { f.serial = "2\x1b"; f.logout() })
	if d := b.Describe(t.Context()); strings.ContainsAny(d.Device+d.Problem+d.Limits["serial"], "\x1b\n") {
		t.Errorf("%+v", d)
	}
}
