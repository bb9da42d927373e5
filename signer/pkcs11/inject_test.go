//go:build cgo

package pkcs11_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	binding "github.com/miekg/pkcs11"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/pkcs11"
	softhsmtest "github.com/trustd/trustd/softhsm-test"
)

// An injector stands between a Backend and SoftHSM. It fails calls on command, and counts logins and open sessions.
type injector struct {
	pkcs11.Cryptoki
	before atomic.Pointer[func(function string) error] // called before each function; an error is its result
	after  atomic.Pointer[func(sig []byte)]            // sees each signature

	logins   atomic.Int64
	injected atomic.Int64
	mu       sync.Mutex
	open     map[binding.SessionHandle]bool
}

// inject sets what happens before each call; nil: nothing.
func (i *injector) inject(f func(function string) error) { i.before.Store(&f) }

func (i *injector) enter(function string) error {
	if f := i.before.Load(); f != nil && *f != nil {
		if err := (*f)(function); err != nil {
			i.injected.Add(1)
			return err
		}
	}
	return nil
}

func (i *injector) sessions() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return len(i.open)
}

func (i *injector) Initialize(o ...binding.InitializeOption) error {
	if err := i.enter("Initialize"); err != nil {
		return err
	}
	return i.Cryptoki.Initialize(o...)
}

func (i *injector) Finalize() error {
	if err := i.enter("Finalize"); err != nil {
		return err
	}
	err := i.Cryptoki.Finalize()
	i.mu.Lock()
	defer i.mu.Unlock()
	clear(i.open)
	return err
}

func (i *injector) GetSlotList(present bool) ([]uint, error) {
	if err := i.enter("GetSlotList"); err != nil {
		return nil, err
	}
	return i.Cryptoki.GetSlotList(present)
}

func (i *injector) GetTokenInfo(slot uint) (binding.TokenInfo, error) {
	if err := i.enter("GetTokenInfo"); err != nil {
		return binding.TokenInfo{}, err
	}
	return i.Cryptoki.GetTokenInfo(slot)
}

func (i *injector) OpenSession(slot, flags uint) (binding.SessionHandle, error) {
	if err := i.enter("OpenSession"); err != nil {
		return 0, err
	}
	h, err := i.Cryptoki.OpenSession(slot, flags)
	if err == nil {
		i.mu.Lock()
		defer i.mu.Unlock()
		i.open[h] = true
	}
	return h, err
}

func (i *injector) CloseSession(h binding.SessionHandle) error {
	i.mu.Lock()
	delete(i.open, h)
	i.mu.Unlock()
	return i.Cryptoki.CloseSession(h)
}

func (i *injector) GetSessionInfo(h binding.SessionHandle) (binding.SessionInfo, error) {
	if err := i.enter("GetSessionInfo"); err != nil {
		return binding.SessionInfo{}, err
	}
	return i.Cryptoki.GetSessionInfo(h)
}

func (i *injector) Login(h binding.SessionHandle, user uint, pin string) error {
	i.logins.Add(1)
	if err := i.enter("Login"); err != nil {
		return err
	}
	return i.Cryptoki.Login(h, user, pin)
}

func (i *injector) FindObjectsInit(h binding.SessionHandle, t []*binding.Attribute) error {
	if err := i.enter("FindObjectsInit"); err != nil {
		return err
	}
	return i.Cryptoki.FindObjectsInit(h, t)
}

func (i *injector) FindObjects(h binding.SessionHandle, max int) ([]binding.ObjectHandle, bool, error) {
	if err := i.enter("FindObjects"); err != nil {
		return nil, false, err
	}
	return i.Cryptoki.FindObjects(h, max)
}

func (i *injector) GetAttributeValue(h binding.SessionHandle, o binding.ObjectHandle, a []*binding.Attribute) (
	[]*binding.Attribute, error) {
	if err := i.enter("GetAttributeValue"); err != nil {
		return nil, err
	}
	return i.Cryptoki.GetAttributeValue(h, o, a)
}

func (i *injector) SignInit(h binding.SessionHandle, m []*binding.Mechanism, o binding.ObjectHandle) error {
	if err := i.enter("SignInit"); err != nil {
		return err
	}
	return i.Cryptoki.SignInit(h, m, o)
}

func (i *injector) Sign(h binding.SessionHandle, msg []byte) ([]byte, error) {
	if err := i.enter("Sign"); err != nil {
		return nil, err
	}
	sig, err := i.Cryptoki.Sign(h, msg)
	if f := i.after.Load(); f != nil && err == nil {
		(*f)(sig)
	}
	return sig, err
}

// wrapped opens a backend on a new token, with an injector in between.
func wrapped(t testing.TB, change func(*pkcs11.Config)) (*pkcs11.Backend, *injector, *softhsmtest.Token) {
	t.Helper()
	k := softhsmtest.New(t)
	t.Setenv(softhsmtest.EnvConf, k.ConfPath)
	i := &injector{open: map[binding.SessionHandle]bool{}}
	cfg := config(k)
	cfg.Wrap = func(c pkcs11.Cryptoki) pkcs11.Cryptoki { i.Cryptoki = c; return i }
	if change != nil {
		change(&cfg)
	}
	b := pkcs11.New(cfg)
	t.Cleanup(func() {
		i.inject(nil)
		if err := b.Close(); err != nil {
			t.Errorf("closing: %v", err)
		}
	})
	return b, i, k
}

// A load is concurrent signing that goes on until it is stopped. Each call must end within its deadline, in a correct
// signature or in an error that allowed accepts.
type load struct {
	t       *testing.T
	end     chan struct{}
	callers sync.WaitGroup
	signed  atomic.Int64
	failed  atomic.Int64
	allowed func(error) bool
}

const (
	callDeadline = 5 * time.Second
	grace        = 2 * time.Second // of a busy machine
)

func retryable(err error) bool { return fault.CodeOf(err).Retryable() }

func startLoad(t *testing.T, callers int, allowed func(error) bool, keys ...signer.Key) *load {
	l := &load{t: t, end: make(chan struct{}), allowed: allowed}
	for c := range callers {
		l.callers.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-l.end:
					return
				default:
				}
				l.call(keys[(c+n)%len(keys)], []byte(strconv.Itoa(c)+"/"+strconv.Itoa(n)), n%2 == 0)
			}
		})
	}
	t.Cleanup(l.stop)
	return l
}

func (l *load) call(k signer.Key, msg []byte, bounded bool) {
	ctx := context.Background()
	if bounded {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, callDeadline)
		defer cancel()
	}
	before := bytes.Clone(msg)
	began := time.Now()
	sig, err := k.Sign(ctx, msg)
	if took := time.Since(began); took > callDeadline+grace {
		l.t.Errorf("a call took %v", took)
	}
	switch {
	case err == nil && signature.Verify(k.Public(), before, sig) != nil:
		l.t.Error("a wrong signature came out")
	case err == nil:
		l.signed.Add(1)
	case !l.allowed(err):
		l.t.Errorf("a call failed with %s", fault.From(err).Verbose())
	default:
		l.failed.Add(1)
		if after := fault.From(err).RetryAfter; after > 0 { // as a polite caller does
			<-time.After(after / 10)
		}
	}
}

// signs waits until n more signatures were made.
func (l *load) signs(n int64) {
	l.t.Helper()
	want := l.signed.Load() + n
	poll(l.t, strconv.FormatInt(n, 10)+" signatures", func() bool { return l.signed.Load() >= want })
}

func (l *load) stop() {
	select {
	case <-l.end:
	default:
		close(l.end)
	}
	l.callers.Wait()
}

// poll waits for a condition.
func poll(t testing.TB, what string, holds func() bool) {
	t.Helper()
	end := time.Now().Add(30 * time.Second)
	for !holds() {
		if time.Now().After(end) {
			t.Fatalf("%s: not within 30 s", what)
		}
		<-time.After(time.Millisecond)
	}
}

func generate(t testing.TB, b *pkcs11.Backend) signer.Key {
	t.Helper()
	k, err := b.Generate(t.Context(), newID(t), ident.ECDSAP256)
	if err != nil {
		t.Fatal(fault.From(err).Verbose())
	}
	return k
}

// TestInjectedFaults fails one call in twenty with each return value in turn, in every function, while 16 callers sign.
func TestInjectedFaults(t *testing.T) {
	b, i, _ := wrapped(t, nil)
	k := generate(t, b)
	for _, c := range []struct {
		value   uint
		class   signer.Class
		allowed func(error) bool
	}{
		{binding.CKR_FUNCTION_CANCELED, signer.TransientBusy, retryable},
		{binding.CKR_SESSION_HANDLE_INVALID, signer.SessionLost, retryable},
		{binding.CKR_OPERATION_ACTIVE, signer.SessionLost, retryable},
		{binding.CKR_KEY_HANDLE_INVALID, signer.HandleLost, retryable},
		{binding.CKR_USER_NOT_LOGGED_IN, signer.LoginLost, retryable},
		{binding.CKR_GENERAL_ERROR, signer.TokenLost, retryable},
		{binding.CKR_DEVICE_REMOVED, signer.TokenLost, retryable},
		{0x80000001, signer.TokenLost, retryable},
		{binding.CKR_CRYPTOKI_NOT_INITIALIZED, signer.ModuleDead, retryable},
		{binding.CKR_SESSION_COUNT, signer.ResourcesExhausted, retryable},
		{binding.CKR_DEVICE_MEMORY, signer.ResourcesExhausted, retryable},
		{binding.CKR_KEY_CHANGED, signer.KeyGone, func(err error) bool { return retryable(err) || errors.Is(err, fault.KeyGone) }},
		{binding.CKR_DATA_LEN_RANGE, signer.CallerError,
			func(err error) bool { return retryable(err) || errors.Is(err, fault.Malformed) }},
	} {
		t.Run(binding.Error(c.value).Error(), func(t *testing.T) {
			counted, injected, logins := b.Failures()[c.class], i.injected.Load(), i.logins.Load()
			i.inject(func(function string) error {
				if function == "Login" || rand.IntN(20) > 0 { // a refused PIN is another test
					return nil
				}
				return binding.Error(c.value)
			})
			l := startLoad(t, 16, c.allowed, k)
			poll(t, "faults are injected", func() bool { return i.injected.Load() > injected+100 })
			i.inject(nil)
			l.signs(200)
			l.stop()
			if b.Failures()[c.class] == counted {
				t.Errorf("none of %d failures was counted: %v", i.injected.Load()-injected, b.Failures())
			}
			poll(t, "the backend is ready", func() bool { return b.Describe(t.Context()).State == signer.Ready })
			t.Logf("%d signed, %d failed, %d faults, %d logins", l.signed.Load(), l.failed.Load(),
				i.injected.Load()-injected, i.logins.Load()-logins)
		})
	}
}

// TestInjectedWrongSignatures flips one bit in each third signature, at any place in it.
func TestInjectedWrongSignatures(t *testing.T) {
	b, i, _ := wrapped(t, nil)
	k := generate(t, b)
	var n atomic.Int64
	flip := func(sig []byte) {
		if n.Add(1)%3 == 0 {
			sig[rand.IntN(len(sig))] ^= 1 << rand.IntN(8)
		}
	}
	i.after.Store(&flip)
	l := startLoad(t, 16, retryable, k)
	l.signs(1000)
	l.stop()
	if got, want := b.Failures()[signer.ModuleDead], uint64(n.Load()/3); got != want {
		t.Errorf("%d wrong signatures were counted, want %d", got, want)
	}
}

// TestWrongPINUnderLoad: 64 callers at once, one attempt of the PIN on the token, and one more for each Unlock.
func TestWrongPINUnderLoad(t *testing.T) {
	var asked atomic.Int64
	var right atomic.Bool
	var k *softhsmtest.Token
	b, i, k := wrapped(t, func(cfg *pkcs11.Config) {
		cfg.PIN = func(context.Context) ([]byte, error) {
			asked.Add(1)
			if right.Load() {
				return k.PIN(), nil
			}
			return []byte("not the pin"), nil
		}
	})
	refusedAll := func(attempts int64) {
		t.Helper()
		var wg sync.WaitGroup
		for range 64 {
			wg.Go(func() {
				for range 20 {
					if _, err := b.Keys(t.Context()); !errors.Is(err, fault.AuthorisationRefused) || retryable(err) {
						t.Errorf("with a wrong PIN: %v", err)
					}
				}
			})
		}
		wg.Wait()
		if d := b.Describe(t.Context()); d.State != signer.Locked || d.Limits["pin"] != "refused" {
			t.Errorf("%+v", d)
		}
		if i.logins.Load() != attempts || asked.Load() != attempts {
			t.Errorf("%d logins, the PIN was asked for %d times, want %d", i.logins.Load(), asked.Load(), attempts)
		}
	}
	refusedAll(1)
	if err := b.Unlock(t.Context()); !errors.Is(err, fault.AuthorisationRefused) {
		t.Errorf("unlocking with the wrong PIN: %v", err)
	}
	refusedAll(2)
	right.Store(true)
	if err := b.Unlock(t.Context()); err != nil || i.logins.Load() != 3 {
		t.Fatalf("unlocking with the right PIN: %v, %d logins", err, i.logins.Load())
	}
	if _, err := generate(t, b).Sign(t.Context(), []byte("m")); err != nil {
		t.Error(err)
	}
}

func TestNothingLeaks(t *testing.T) { testNothingLeaks(t, 1500) }

func TestNothingLeaksLong(t *testing.T) {
	if os.Getenv("TRUSTD_LONG") != "1" {
		t.Skip("takes half a minute; set TRUSTD_LONG=1")
	}
	testNothingLeaks(t, 10_000)
}

// testNothingLeaks injects faults of all kinds, with callers that leave before their calls end, and counts what is left
// of them.
func testNothingLeaks(t *testing.T, faults int64) {
	b, i, _ := wrapped(t, func(cfg *pkcs11.Config) { cfg.Sessions = 4 })
	keys := []signer.Key{generate(t, b), generate(t, b), generate(t, b)}
	goroutines := runtime.NumGoroutine()
	values := []uint{
		binding.CKR_SESSION_CLOSED, binding.CKR_OBJECT_HANDLE_INVALID, binding.CKR_USER_NOT_LOGGED_IN,
		binding.CKR_DEVICE_ERROR, binding.CKR_DATA_INVALID, binding.CKR_OPERATION_NOT_INITIALIZED, 0x80000001,
	}
	rare := []uint{ // those that take their time
		binding.CKR_CRYPTOKI_NOT_INITIALIZED, binding.CKR_SESSION_COUNT, binding.CKR_FUNCTION_CANCELED,
	}
	i.inject(func(function string) error {
		n := rand.IntN(1000)
		switch sign := function == "Sign" || function == "SignInit"; {
		case function == "Login":
			return nil
		case n == 0 || n < 3 && sign:
			return binding.Error(rare[rand.IntN(len(rare))])
		case n == 3 && sign:
			<-time.After(3 * time.Millisecond) // longer than some callers wait
			return nil
		case n < 3 || sign && n < 400:
			return binding.Error(values[rand.IntN(len(values))])
		}
		return nil
	})
	var callers sync.WaitGroup
	for range 16 {
		callers.Go(func() {
			for i.injected.Load() < faults {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(1+rand.IntN(50))*time.Millisecond)
				k := keys[rand.IntN(len(keys))]
				sig, err := k.Sign(ctx, []byte("m"))
				switch {
				case err == nil && signature.Verify(k.Public(), []byte("m"), sig) != nil:
					t.Error("a wrong signature came out")
				case err != nil && !retryable(err) && !errors.Is(err, fault.Malformed):
					t.Error(fault.From(err).Verbose())
				}
				cancel()
			}
		})
	}
	callers.Wait()
	i.inject(nil)
	poll(t, "all keys sign again", func() bool {
		for _, k := range keys {
			if _, err := k.Sign(t.Context(), []byte("m")); err != nil {
				return false
			}
		}
		return true
	})
	poll(t, "all sessions are there again", func() bool {
		_ = signer.SignAll(t.Context(), keys[0], make([][]byte, 64))
		return b.Parallel() == 4
	})
	poll(t, "goroutines end", func() bool { return runtime.NumGoroutine() <= goroutines })
	if n := i.sessions(); n > 5 { // the login's, and four
		t.Errorf("%d sessions are open", n)
	}
	if d := b.Describe(t.Context()); d.State != signer.Ready || d.Limits["hanging_calls"] != "0" {
		t.Errorf("%+v", d)
	}
	t.Logf("%d logins; failures %v", i.logins.Load(), b.Failures())
}
