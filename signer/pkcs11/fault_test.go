//go:build cgo

package pkcs11

import (
	"context"
	"crypto/ed25519"
	"crypto/elliptic"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signer"
)

func generate(t *testing.T, b *Backend) signer.Key {
	t.Helper()
	k, err := b.Generate(t.Context(), "the-key", ident.Ed25519)
	if err != nil {
		t.Fatal(fault.From(err).Verbose())
	}
	return k
}

// TestRepairs scripts one failure of each class during a signature and checks what the backend does about it and
// what the caller sees. A wrong signature among them is T-SIG-3.
func TestRepairs(t *testing.T) {
	for _, c := range []struct {
		name   string
		break_ func(*fakeToken)
		want   fault.Code     // "": the signature is made
		extra  map[string]int // calls beyond those of an undisturbed signature
	}{
		{"busy", func(f *fakeToken) { f.next("SignInit", rv(pkcs11.CKR_FUNCTION_CANCELED), rv(pkcs11.CKR_CANCEL)) }, "", nil},
		{"busy for long", func(f *fakeToken) {
			for range busyTries + 1 {
				f.next("SignInit", rv(pkcs11.CKR_FUNCTION_CANCELED))
			}
		}, fault.DeviceBusy, map[string]int{"Login": 0}},
		{"session closed", func(f *fakeToken) { f.next("SignInit", rv(pkcs11.CKR_SESSION_CLOSED)) }, "",
			map[string]int{"OpenSession": 1, "Login": 0}},
		{"operation left over", func(f *fakeToken) { f.next("SignInit", rv(pkcs11.CKR_OPERATION_ACTIVE)) }, "",
			map[string]int{"OpenSession": 1}},
		{"session lost for good", func(f *fakeToken) {
			f.next("SignInit", rv(pkcs11.CKR_SESSION_CLOSED), rv(pkcs11.CKR_SESSION_CLOSED))
		}, fault.DeviceLost, nil},
		{"handle invalid", func(f *fakeToken) { f.next("SignInit", rv(pkcs11.CKR_KEY_HANDLE_INVALID)) }, "",
			map[string]int{"OpenSession": 0, "Login": 0}},
		{"all sessions closed", func(f *fakeToken) { f.set(f.logout) }, "", map[string]int{"Login": 1}},
		{"not logged in", func(f *fakeToken) {
			f.set(func() { f.loggedIn = false })
			f.next("SignInit", rv(pkcs11.CKR_USER_NOT_LOGGED_IN))
		}, "", map[string]int{"Login": 1, "Finalize": 0}},
		{"module finalised by another", func(f *fakeToken) { f.set(func() { f.ready = false; f.logout() }) }, "",
			map[string]int{"Initialize": 1, "Login": 1}},
		{"general error on a healthy token", func(f *fakeToken) { f.next("Sign", rv(pkcs11.CKR_GENERAL_ERROR)) }, "",
			map[string]int{"Finalize": 0}},
		{"token pulled out", func(f *fakeToken) { f.set(func() { f.gone = true }) }, fault.DeviceLost,
			map[string]int{"Finalize": 1}},
		{"token back with an empty index", func(f *fakeToken) {
			f.set(func() { f.stale = true })
			f.next("GetTokenInfo", rv(pkcs11.CKR_GENERAL_ERROR))
		}, "", map[string]int{"Finalize": 1, "Login": 1}},
		{"device error, then healthy", func(f *fakeToken) {
			f.next("SignInit", rv(pkcs11.CKR_DEVICE_ERROR))
			f.next("GetTokenInfo", rv(pkcs11.CKR_DEVICE_ERROR))
		}, "", map[string]int{"Finalize": 1, "Initialize": 1}},
		{"no memory", func(f *fakeToken) { f.next("Sign", rv(pkcs11.CKR_DEVICE_MEMORY)) }, "",
			map[string]int{"OpenSession": 1, "Finalize": 0}},
		{"no memory for long", func(f *fakeToken) {
			for range busyTries + 1 {
				f.next("Sign", rv(pkcs11.CKR_DEVICE_MEMORY))
			}
		}, fault.ResourceExhausted, nil},
		{"key changed, says the module, but it is there", func(f *fakeToken) { f.next("SignInit", rv(pkcs11.CKR_KEY_CHANGED)) },
			"", map[string]int{"FindObjectsInit": 2, "Finalize": 0}},
		{"key changed for good", func(f *fakeToken) {
			f.next("SignInit", rv(pkcs11.CKR_KEY_CHANGED), rv(pkcs11.CKR_KEY_CHANGED))
		}, fault.KeyGone, nil},
		{"key may not sign, says the module of its handle", func(f *fakeToken) {
			f.next("SignInit", rv(pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED))
		}, "", map[string]int{"OpenSession": 0}},
		{"key may not sign", func(f *fakeToken) {
			f.next("SignInit", rv(pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED), rv(pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED))
		}, fault.AlgorithmUnsupported, nil},
		{"bad data", func(f *fakeToken) { f.next("Sign", rv(pkcs11.CKR_DATA_LEN_RANGE)) }, fault.Malformed, nil},
		{"key deleted by another", func(f *fakeToken) { f.set(func() { clear(f.keys) }) }, fault.KeyGone, nil},
		{"wrong signature", func(f *fakeToken) { f.set(func() { f.tamper = true }) }, fault.DeviceDead, nil},
		{"refused by a person", func(f *fakeToken) { f.next("Sign", rv(pkcs11.CKR_FUNCTION_REJECTED)) },
			fault.AuthorisationRefused, map[string]int{"Login": 0}},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFake()
			b := f.backend(t, 1)
			k := generate(t, b)
			before := map[string]int{}
			for name := range c.extra {
				before[name] = f.count(name)
			}
			c.break_(f)
			_, err := k.Sign(t.Context(), []byte("m"))
			if fault.CodeOf(err) != c.want {
				t.Fatalf("the caller sees %v, want %q", err, c.want)
			}
			for name, n := range c.extra {
				if got := f.count(name) - before[name]; got != n {
					t.Errorf("%s was called %d times, want %d", name, got, n)
				}
			}
		})
	}
}

// TestRecoversByItself pulls the token and puts it back: the backend degrades, waits longer and longer, and works
// again without being opened anew.
func TestRecoversByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		b := f.backend(t, 2)
		k := generate(t, b)
		f.set(func() { f.gone = true })
		tries := 0
		for range 200 {
			before := f.count("Initialize")
			if _, err := k.Sign(t.Context(), []byte("m")); !errors.Is(err, fault.DeviceLost) {
				t.Fatalf("signing without a token: %v", err)
			}
			tries += f.count("Initialize") - before
			time.Sleep(100 * time.Millisecond) // of the bubble's clock
		}
		if tries > 15 {
			t.Errorf("%d tries to connect in 20 s", tries)
		}
		if d := b.Describe(t.Context()); d.State != signer.Degraded || d.Problem == "" || d.Remedy == "" {
			t.Errorf("description: %+v", d)
		}
		f.set(func() { f.gone = false })
		time.Sleep(longestTry)
		if _, err := k.Sign(t.Context(), []byte("m")); err != nil {
			t.Errorf("after its return: %v", err)
		}
		if d := b.Describe(t.Context()); d.State != signer.Ready {
			t.Errorf("description: %+v", d)
		}
	})
}

// TestRefusedPINStops covers each way in which a token refuses, at the first login and at a later one.
func TestRefusedPINStops(t *testing.T) {
	for _, code := range []uint{
		pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_LOCKED, pkcs11.CKR_PIN_EXPIRED, pkcs11.CKR_PIN_LEN_RANGE,
		pkcs11.CKR_USER_PIN_NOT_INITIALIZED,
	} {
		f := newFake()
		f.next("Login", rv(code))
		b := f.backend(t, 2)
		for range 3 {
			if _, err := b.Generate(t.Context(), "id", ident.Ed25519); !errors.Is(err, fault.AuthorisationRefused) {
				t.Errorf("0x%X: %v", code, err)
			}
			if d := b.Describe(t.Context()); d.State != signer.Locked || d.Limits["pin"] != "refused" {
				t.Errorf("0x%X: %+v", code, d)
			}
		}
		if n := f.count("Login"); n != 1 {
			t.Errorf("0x%X: %d logins", code, n)
		}
	}
	f := newFake()
	b := f.backend(t, 2)
	k := generate(t, b)
	f.set(func() { f.logout(); f.pin = "changed" })
	for range 3 {
		if _, err := k.Sign(t.Context(), []byte("m")); !errors.Is(err, fault.AuthorisationRefused) {
			t.Errorf("after the PIN was changed: %v", err)
		}
	}
	if n := f.count("Login"); n != 2 {
		t.Errorf("%d logins, want the first and one more", n)
	}
}

// TestLastTryIsNotTaken keeps a restarting daemon from locking a token.
func TestLastTryIsNotTaken(t *testing.T) {
	for flag, want := range map[uint]int{
		pkcs11.CKF_USER_PIN_FINAL_TRY: 0, pkcs11.CKF_USER_PIN_LOCKED: 0, pkcs11.CKF_USER_PIN_COUNT_LOW: 1,
	} {
		f := newFake()
		f.flags |= flag
		b := f.backend(t, 1)
		d := b.Describe(t.Context())
		if ready := d.State == signer.Ready; ready != (want == 1) {
			t.Errorf("flag 0x%X: %+v", flag, d)
		}
		if n := f.count("Login"); n != want {
			t.Errorf("flag 0x%X: %d logins", flag, n)
		}
	}
}

func TestTokenWithoutLogin(t *testing.T) {
	f := newFake()
	f.flags = pkcs11.CKF_TOKEN_INITIALIZED
	f.loggedIn = true
	b := f.backend(t, 1)
	if _, err := generate(t, b).Sign(t.Context(), []byte("m")); err != nil {
		t.Error(err)
	}
	if n := f.count("Login"); n != 0 {
		t.Errorf("%d logins", n)
	}
}

func TestTokenIsChosenByLabelAlone(t *testing.T) {
	f := newFake()
	f.tokens = 2
	d := f.backend(t, 1).Describe(t.Context())
	if d.State != signer.Stopped || d.Remedy == "" {
		t.Errorf("two tokens with one label: %+v", d)
	}
	f = newFake()
	f.label = "another"
	if d := f.backend(t, 1).Describe(t.Context()); d.State != signer.Degraded || d.Remedy == "" {
		t.Errorf("another token: %+v", d)
	}
}

func TestGrade(t *testing.T) {
	for maker, want := range map[string]signer.Grade{
		"SoftHSM project": signer.Software, "Kryoptic Project": signer.Software, "ACME": signer.HardwareClaimed,
		"Microsoft": signer.HardwareClaimed,
	} {
		f := newFake()
		f.maker = maker
		if d := f.backend(t, 1).Describe(t.Context()); d.Grade != want {
			t.Errorf("%s: %s", maker, d.Grade)
		}
	}
}

// TestFewSessions lets the token give fewer sessions than there are cores.
func TestFewSessions(t *testing.T) {
	f := newFake()
	f.maxOpen = 2 // one for the login
	b := f.backend(t, 4)
	k := generate(t, b)
	for i, r := range signer.SignAll(t.Context(), k, make([][]byte, 50)) {
		if r.Err != nil {
			t.Fatalf("message %d: %v", i, r.Err)
		}
	}
	f = newFake()
	f.maxOpen = 1
	if _, err := f.backend(t, 4).Generate(t.Context(), "id", ident.Ed25519); !errors.Is(err, fault.ResourceExhausted) {
		t.Errorf("no session at all: %v", err)
	}
}

// TestHangBlocksNobody lets calls hang: their callers leave when their context ends and others go on, until there
// are too many; then everything waits, bounded by its context, and works again once the calls come back.
func TestHangBlocksNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		b := f.backend(t, 1)
		k := generate(t, b)
		release := make(chan struct{})
		for i := range maxHung + 1 {
			f.set(func() { f.hang["Sign"] = release })
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			if _, err := k.Sign(ctx, []byte("m")); !errors.Is(err, fault.DeadlineExceeded) {
				t.Fatalf("a call that hangs: %v", err)
			}
			cancel()
			f.set(func() { delete(f.hang, "Sign") })
			ctx, cancel = context.WithTimeout(t.Context(), time.Second)
			_, err := k.Sign(ctx, []byte("m"))
			cancel()
			if full := i == maxHung; full != errors.Is(err, fault.DeadlineExceeded) || !full && err != nil {
				t.Fatalf("with %d hanging calls: %v", i+1, err)
			}
		}
		f.set(f.logout) // a repair meanwhile must not finalise the module under the hanging calls
		close(release)
		synctest.Wait()
		if _, err := k.Sign(t.Context(), []byte("m")); err != nil || b.hung.Load() != 0 || len(b.slots) != 1 {
			t.Errorf("after they came back: %v, %d hang, %d slots", err, b.hung.Load(), len(b.slots))
		}
	})
}

// TestHalfMadeKeyIsRemoved fails the token between making a key and reading it back.
func TestHalfMadeKeyIsRemoved(t *testing.T) {
	f := newFake()
	b := f.backend(t, 1)
	for range busyTries + 1 {
		f.next("GetAttributeValue", rv(pkcs11.CKR_DEVICE_MEMORY))
	}
	if _, err := b.Generate(t.Context(), "id", ident.Ed25519); !errors.Is(err, fault.ResourceExhausted) {
		t.Fatal(err)
	}
	f.set(func() {
		if len(f.keys) != 0 {
			t.Error("the key is still there")
		}
	})
	if _, err := b.Generate(t.Context(), "id", ident.Ed25519); err != nil {
		t.Error(err)
	}
}

// TestGenerateIsRepeated fails the making of a key as SoftHSM does while other sessions search, and for good.
func TestGenerateIsRepeated(t *testing.T) {
	inconsistent := rv(pkcs11.CKR_TEMPLATE_INCONSISTENT)
	for failures, want := range map[int]fault.Code{1: "", generateTries - 1: "", generateTries: fault.Malformed} {
		f := newFake()
		b := f.backend(t, 1)
		for range failures {
			f.next("GenerateKeyPair", inconsistent)
		}
		if _, err := b.Generate(t.Context(), "id", ident.Ed25519); fault.CodeOf(err) != want {
			t.Errorf("after %d failures: %v, want %q", failures, err, want)
		}
	}
}

func TestKeysWithProblemsAreListed(t *testing.T) {
	f := newFake()
	b := f.backend(t, 1)
	for _, id := range []signer.ID{"good", "no-id", "no-public", "no-sign", "asks", "twin-a", "twin-b"} {
		if _, err := b.Generate(t.Context(), id, ident.Ed25519); err != nil {
			t.Fatal(err)
		}
	}
	f.set(func() {
		for _, k := range f.keys {
			switch string(k.attrs[pkcs11.CKA_ID]) {
			case "no-id":
				delete(k.attrs, pkcs11.CKA_ID)
			case "no-public":
				k.pub = map[uint][]byte{}
			case "no-sign":
				k.attrs[pkcs11.CKA_SIGN] = []byte{0}
			case "asks":
				k.attrs[pkcs11.CKA_ALWAYS_AUTHENTICATE] = []byte{1}
			case "twin-a", "twin-b":
				k.attrs[pkcs11.CKA_ID], k.pub[pkcs11.CKA_ID] = []byte("twin"), []byte("twin")
			}
		}
	})
	keys, err := b.Keys(t.Context())
	if err != nil || len(keys) != 7 {
		t.Fatalf("%d keys, %v", len(keys), err)
	}
	for _, k := range keys {
		if good := k.ID == "good"; good != (k.Problem == "") || good == k.Public.IsZero() {
			t.Errorf("key %q: %+v", k.ID, k)
		}
	}
	if _, err := b.Open(t.Context(), "twin", keys[0].Public); !errors.Is(err, fault.KeyGone) {
		t.Errorf("opening one of two keys with an id: %v", err)
	}
}

func TestPINSourceFails(t *testing.T) {
	f := newFake()
	for _, c := range []struct {
		pin  []byte
		err  error
		want fault.Code
	}{
		{nil, fault.New(fault.InsecureSecret, "readable by others"), fault.InsecureSecret},
		{nil, errors.New("no such file"), fault.AuthorisationRefused},
		{nil, nil, fault.AuthorisationRefused},
	} {
		b := f.backend(t, 1)
		b.cfg.PIN = func(context.Context) ([]byte, error) { return c.pin, c.err }
		if _, err := b.Generate(t.Context(), "id", ident.Ed25519); fault.CodeOf(err) != c.want {
			t.Errorf("%v: %v", c.err, err)
		}
		if d := b.Describe(t.Context()); d.State != signer.Stopped {
			t.Errorf("%v: %+v", c.err, d)
		}
	}
	if n := f.count("Login"); n != 0 {
		t.Errorf("%d logins without a PIN", n)
	}
}

func TestMissingModule(t *testing.T) {
	b := New(Config{Module: t.TempDir() + "/none.so", TokenLabel: "x"})
	defer b.Close()
	if _, err := b.Keys(t.Context()); !errors.Is(err, fault.DeviceLost) {
		t.Error(err)
	}
	if d := b.Describe(t.Context()); d.State != signer.Stopped || d.Remedy == "" {
		t.Errorf("%+v", d)
	}
}

// FuzzPublic feeds the parser of what tokens say of public keys.
func FuzzPublic(f *testing.F) {
	x, y := elliptic.P256().Params().Gx, elliptic.P256().Params().Gy
	raw := append(append([]byte{4}, x.FillBytes(make([]byte, 32))...), y.FillBytes(make([]byte, 32))...)
	ed := ed25519.NewKeyFromSeed(make([]byte, 32)).Public().(ed25519.PublicKey)
	f.Add(uint(keyTypeEC), paramsP256, append([]byte{4, 65}, raw...), []byte{})
	f.Add(uint(keyTypeEC), paramsP256, raw, []byte{})
	f.Add(uint(keyTypeEdwards), paramsEd25519, append([]byte{4, 32}, ed...), []byte{})
	f.Add(uint(keyTypeEdwards), paramsEdwards, append([]byte{3, 33, 0}, ed...), []byte{})
	f.Add(uint(keyTypeEdwards), paramsEdwards, []byte(ed), []byte{})
	f.Add(uint(keyTypeRSA), []byte{}, make([]byte, 256), []byte{1, 0, 1})
	f.Fuzz(func(t *testing.T, keyType uint, params, point, exponent []byte) {
		pub, err := rawPublic{keyType: keyType, params: params, point: point, modulus: point, exponent: exponent}.parse()
		if err != nil {
			if c := fault.CodeOf(err); c != fault.Malformed && c != fault.AlgorithmUnsupported {
				t.Errorf("code %s", c)
			}
			return
		}
		if again, err := ident.ParseSPKI(pub.SPKI()); err != nil || !again.Equal(pub) {
			t.Errorf("the key does not survive its own encoding: %v", err)
		}
	})
}
