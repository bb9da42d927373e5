package tpm_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/tpm"
	softhsmtest "github.com/trustd/trustd/softhsm-test"
	"github.com/trustd/trustd/softhsm-test/tpmproxy"
)

// patience is the deadline of each call of a load: longer than a hang lasts.
const patience = 20 * time.Second

// A load has callers sign without pause, each with a key of its own, and checks that what they get is a right
// signature or an error that may be tried again.
type load struct {
	t      *testing.T
	stop   func()
	signed []atomic.Int64
	failed atomic.Int64
	mu     sync.Mutex
	denied map[fault.Code]bool // codes that are not retryable and expected
}

func newLoad(t *testing.T, keys []signer.Key) *load {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	l := &load{t: t, signed: make([]atomic.Int64, len(keys)), denied: map[fault.Code]bool{}}
	var wg sync.WaitGroup
	for i, k := range keys {
		wg.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				l.sign(i, k, fmt.Appendf(nil, "%d %d", i, n))
			}
		})
	}
	l.stop = func() { cancel(); wg.Wait() }
	t.Cleanup(l.stop)
	return l
}

func (l *load) sign(i int, k signer.Key, msg []byte) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	sig, err := k.Sign(ctx, msg)
	switch {
	case err == nil && signature.Verify(k.Public(), msg, sig) == nil:
		l.signed[i].Add(1)
		return
	case err == nil:
		l.t.Error("a wrong signature left")
	case ctx.Err() != nil:
		l.t.Errorf("not done within the deadline: %v", verbose(err))
	case fault.CodeOf(err).Retryable() && signer.ClassOf(err) != "":
	default:
		l.mu.Lock()
		if !l.denied[fault.CodeOf(err)] {
			l.t.Errorf("not a retryable error of a class: %v", verbose(err))
		}
		l.mu.Unlock()
	}
	l.failed.Add(1)
	if r := fault.From(err).RetryAfter; r > 0 { // as the error asks for
		t := time.NewTimer(min(r, 10*time.Millisecond))
		defer t.Stop()
		<-t.C
	}
}

// expect admits a code that is not retryable.
func (l *load) expect(c fault.Code) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.denied[c] = true
}

// served waits until each caller was served again.
func (l *load) served() {
	l.t.Helper()
	before := make([]int64, len(l.signed))
	for i := range before {
		before[i] = l.signed[i].Load()
	}
	until(l.t, func() bool {
		for i := range before {
			if l.signed[i].Load() < before[i]+3 {
				return false
			}
		}
		return true
	})
}

// hurt waits until some calls have failed.
func (l *load) hurt() {
	l.t.Helper()
	before := l.failed.Load()
	until(l.t, func() bool { return l.failed.Load() > before+3 })
}

func until(t testing.TB, done func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(60 * time.Second)
	for !done() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal("not in time")
		}
	}
}

// back polls until a key signs, which takes a bounded number of polls.
func back(t *testing.T, k signer.Key) {
	t.Helper()
	const polls = 100
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	var err error
	for range polls {
		if _, err = k.Sign(context.Background(), message); err == nil {
			return
		}
		<-tick.C
	}
	t.Errorf("not back after %d polls: %v", polls, verbose(err))
}

// resources are what must not grow: goroutines, file descriptors and handles on the TPM.
type resources struct{ goroutines, files, objects, sessions int }

func count(t testing.TB, p *tpmproxy.Proxy) resources {
	t.Helper()
	var r resources
	other(t, p, func(c transport.TPM) error {
		for first, n := range map[uint32]*int{0x80000000: &r.objects, 0x02000000: &r.sessions} {
			rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: first, PropertyCount: 64}.Execute(c)
			if err != nil {
				return err
			}
			list, err := rsp.CapabilityData.Data.Handles()
			if err != nil {
				return err
			}
			*n = len(list.Handle)
		}
		return nil
	})
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	r.goroutines, r.files = runtime.NumGoroutine(), len(files)
	return r
}

// other talks to the TPM beside the backend.
func other(t testing.TB, p *tpmproxy.Proxy, f func(transport.TPM) error) {
	t.Helper()
	conn, err := net.Dial("unix", p.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := f(transport.FromReadWriter(conn)); err != nil {
		t.Error(err)
	}
}

// A disaster befalls a TPM under load. end undoes what does not end by itself.
type disaster struct {
	name       string
	begin, end func(t *testing.T, m *softhsmtest.TPM, p *tpmproxy.Proxy)
	hurts      bool // calls must fail meanwhile
}

func nothing(*testing.T, *softhsmtest.TPM, *tpmproxy.Proxy) {}

func passAll(_ *testing.T, _ *softhsmtest.TPM, p *tpmproxy.Proxy) { p.Script() }

func scripted(rules ...tpmproxy.Rule) func(*testing.T, *softhsmtest.TPM, *tpmproxy.Proxy) {
	return func(t *testing.T, _ *softhsmtest.TPM, p *tpmproxy.Proxy) {
		p.Script(rules...)
		until(t, func() bool { return p.Count(tpmproxy.Sign) > 8 || p.Count(tpmproxy.Any) > 6 })
	}
}

func signal(s syscall.Signal) func(*testing.T, *softhsmtest.TPM, *tpmproxy.Proxy) {
	return func(t *testing.T, m *softhsmtest.TPM, _ *tpmproxy.Proxy) {
		if err := m.Process().Signal(s); err != nil {
			t.Fatal(err)
		}
	}
}

var disasters = []disaster{
	{name: "kill", hurts: true,
		begin: func(_ *testing.T, m *softhsmtest.TPM, _ *tpmproxy.Proxy) { m.Kill() },
		end:   func(_ *testing.T, m *softhsmtest.TPM, _ *tpmproxy.Proxy) { m.Restart() }},
	{name: "shutdown and kill", hurts: true,
		begin: func(t *testing.T, m *softhsmtest.TPM, p *tpmproxy.Proxy) {
			other(t, p, func(c transport.TPM) error {
				_, err := tpm2.Shutdown{ShutdownType: tpm2.TPMSUClear}.Execute(c)
				return err
			})
			m.Kill()
		},
		end: func(_ *testing.T, m *softhsmtest.TPM, _ *tpmproxy.Proxy) { m.Restart() }},
	{name: "restart at once", begin: func(_ *testing.T, m *softhsmtest.TPM, _ *tpmproxy.Proxy) { m.Restart() }, end: nothing},
	{name: "reset", begin: func(_ *testing.T, m *softhsmtest.TPM, _ *tpmproxy.Proxy) { m.Reset() }, end: nothing},
	{name: "hang", hurts: true, begin: signal(syscall.SIGSTOP), end: signal(syscall.SIGCONT)},
	{name: "hang and die", hurts: true, begin: signal(syscall.SIGSTOP),
		end: func(_ *testing.T, m *softhsmtest.TPM, _ *tpmproxy.Proxy) { m.Restart() }},
	{name: "connection cut", begin: func(_ *testing.T, _ *softhsmtest.TPM, p *tpmproxy.Proxy) { p.Cut() }, end: nothing},
	{name: "slots and sessions filled", begin: fill, end: nothing},
	{name: "all flushed", begin: flushAll, end: nothing},
	{name: "wrong signatures", begin: scripted(tpmproxy.Rule{Command: tpmproxy.Sign, Do: tpmproxy.CorruptSignature()}),
		end: passAll, hurts: true},
	{name: "wrong proofs", begin: scripted(tpmproxy.Rule{Do: tpmproxy.CorruptHMAC()}), end: passAll, hurts: true},
	{name: "one wrong signature in three", end: passAll, begin: scripted(
		tpmproxy.Rule{Command: tpmproxy.Sign, After: 3, Times: 1, Do: tpmproxy.CorruptSignature()},
		tpmproxy.Rule{Command: tpmproxy.Sign, After: 6, Times: 1, Do: tpmproxy.CorruptSignature()})},
	{name: "responses lost", begin: scripted(tpmproxy.Rule{Do: tpmproxy.DropAfter()}), end: passAll, hurts: true},
	{name: "commands lost", begin: scripted(tpmproxy.Rule{Do: tpmproxy.Drop()}), end: passAll, hurts: true},
	{name: "garbage", begin: scripted(tpmproxy.Rule{Do: garbage}), end: passAll, hurts: true},
	{name: "busy", begin: scripted(tpmproxy.Rule{Command: tpmproxy.Sign, Times: 9, Do: code(tpm2.TPMRCRetry)}), end: passAll},
	{name: "no room", end: passAll,
		begin: scripted(tpmproxy.Rule{Command: tpmproxy.Load, Times: 9, Do: code(tpm2.TPMRCObjectMemory)})},
	{name: "sessions gone", begin: scripted(tpmproxy.Rule{Command: tpmproxy.Sign, Do: code(tpm2.TPMRCReferenceS0)}),
		end: passAll, hurts: true},
	{name: "failure mode", begin: scripted(tpmproxy.Rule{Do: code(tpm2.TPMRCFailure)}), end: passAll, hurts: true},
	{name: "slow", begin: scripted(tpmproxy.Rule{Command: tpmproxy.Sign,
		Do: tpmproxy.Delay(tpmproxy.LogNormal(5*time.Millisecond, 20*time.Millisecond, 1))}), end: passAll},
}

// fill takes every slot and session that is left.
func fill(t *testing.T, _ *softhsmtest.TPM, p *tpmproxy.Proxy) {
	for range 5 {
		other(t, p, func(c transport.TPM) error {
			for range 100 {
				_, oerr := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(c)
				_, _, serr := tpm2.HMACSession(c, tpm2.TPMAlgSHA256, 16)
				if oerr != nil && serr != nil {
					break
				}
			}
			return nil
		})
	}
}

// flushAll flushes what others have loaded, and lets them make it anew.
func flushAll(t *testing.T, _ *softhsmtest.TPM, p *tpmproxy.Proxy) {
	other(t, p, func(c transport.TPM) error {
		for range 5 {
			for _, h := range []tpm2.TPMHandle{0x80000000, 0x80000001, 0x80000002, 0x02000000, 0x02000001} {
				_, err := tpm2.FlushContext{FlushHandle: h}.Execute(c)
				if err != nil && !errors.Is(err, tpm2.TPMRCHandle) && !errors.Is(err, tpm2.TPMRCValue) {
					return err
				}
			}
		}
		return nil
	})
}

// TestStorm has one backend, never opened anew, live through every disaster under load: no wrong signature, no call
// that ends otherwise than in success or a retryable error, service back by itself, nothing left behind.
func TestStorm(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	p := tpmproxy.New(t, m.Path())
	start := count(t, p)
	b := openWith(t, tpm.Config{Device: p.Device(), Dir: keyDir(t), CommandTimeout: 500 * time.Millisecond})
	keys := make([]signer.Key, 5) // more than slots
	for i := range keys {
		keys[i] = generate(t, b, ident.ECDSAP256)
	}
	for _, d := range disasters {
		t.Run(d.name, func(t *testing.T) {
			l := newLoad(t, keys)
			l.served()
			d.begin(t, m, p)
			if d.hurts {
				l.hurt()
			}
			d.end(t, m, p)
			back(t, keys[0])
			l.served()
			l.stop()
			mustSign(t, keys[0], message)
			if s := b.Describe(context.Background()); s.State != signer.Ready {
				t.Errorf("afterwards %s: %s", s.State, s.Problem)
			}
			if r := count(t, p); r.objects > 3 || r.sessions > 1 {
				t.Errorf("%d objects and %d sessions on the TPM", r.objects, r.sessions)
			}
		})
	}
	b.Close()
	until(t, func() bool {
		r := count(t, p)
		return r.goroutines <= start.goroutines+2 && r.files <= start.files+1
	})
	if r := count(t, p); r.objects != 0 || r.sessions != 0 {
		t.Errorf("%d objects and %d sessions are left on the TPM", r.objects, r.sessions)
	}
}

// TestEveryCode has TPM2_Sign answer each response code once, at the places where the TPM may put a number into it: the
// caller gets the signature or an error of the code's class, and the key signs afterwards without being opened anew.
func TestEveryCode(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	p := tpmproxy.New(t, m.Path())
	b := open(t, p.Device(), keyDir(t))
	k := generate(t, b, ident.ECDSAP256)
	tried := 0
	for rc := tpm2.TPMRC(0x080); rc < 0xa00; rc++ {
		if strings.Contains(rc.Error(), "unknown") || strings.Contains(rc.Error(), "unrecognized") {
			continue
		}
		class := tpm.Classify(rc)
		before := b.Failures()[class]
		p.Script(times(1, tpmproxy.Sign, code(rc)))
		sig, err := k.Sign(context.Background(), message)
		switch {
		case err == nil && signature.Verify(k.Public(), message, sig) != nil:
			t.Errorf("%v: a wrong signature", rc)
		case err != nil && (signer.ClassOf(err) != class || fault.CodeOf(err) != class.Code()):
			t.Errorf("%v: class %q, %v; want %q", rc, signer.ClassOf(err), verbose(err), class)
		}
		if b.Failures()[class] == before {
			t.Errorf("%v: not counted as %s", rc, class)
		}
		if class == signer.AuthorisationRefused {
			if _, err := k.Sign(context.Background(), message); signer.ClassOf(err) != class || p.Count(tpmproxy.Sign) != 1 {
				t.Errorf("%v: %v after %d attempts", rc, verbose(err), p.Count(tpmproxy.Sign))
			}
			if err := b.Unlock(context.Background()); err != nil {
				t.Fatalf("%v: Unlock: %v", rc, verbose(err))
			}
		}
		back(t, k)
		tried++
	}
	if tried < 100 {
		t.Errorf("only %d codes", tried)
	}
}

// swap puts another state under the TPM, or the one that was put aside back.
func swap(t *testing.T, m *softhsmtest.TPM, aside, in string) {
	t.Helper()
	state := filepath.Join(filepath.Dir(m.Path()), "state")
	m.Kill()
	if err := os.Rename(state, state+aside); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(state+in, state); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	m.Restart()
}

// TestAnotherTPM puts another TPM in the place of ours under load, and ours back: the keys are gone meanwhile, with
// that class, and nothing of them is deleted.
func TestAnotherTPM(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	p := tpmproxy.New(t, m.Path())
	dir := keyDir(t)
	b := open(t, p.Device(), dir)
	keys := []signer.Key{generate(t, b, ident.ECDSAP256), generate(t, b, ident.ECDSAP256)}
	l := newLoad(t, keys)
	l.served()
	l.expect(fault.KeyGone)
	swap(t, m, ".ours", ".other")
	until(t, func() bool {
		_, err := keys[0].Sign(context.Background(), message)
		return fault.CodeOf(err) == fault.KeyGone && signer.ClassOf(err) == signer.KeyGone
	})
	if n := b.Failures()[signer.KeyGone]; n == 0 {
		t.Error("not counted")
	}
	if _, err := b.Open(context.Background(), keys[0].Info().ID, keys[0].Public()); signer.ClassOf(err) != signer.KeyGone {
		t.Errorf("Open on another TPM: %v", verbose(err))
	}
	if d := b.Describe(context.Background()); d.State != signer.Recovering {
		t.Errorf("another TPM is %s", d.State)
	}
	mustSign(t, generate(t, b, ident.ECDSAP256), message)
	swap(t, m, ".other", ".ours")
	back(t, keys[0])
	l.served()
	l.stop()
	haveFiles(t, dir, keys...)
}

// TestClear clears the TPM by another connection under load.
func TestClear(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	p := tpmproxy.New(t, m.Path())
	dir := keyDir(t)
	b := open(t, p.Device(), dir)
	keys := []signer.Key{generate(t, b, ident.ECDSAP256), generate(t, b, ident.ECDSAP256), generate(t, b, ident.ECDSAP256)}
	l := newLoad(t, keys)
	l.served()
	l.expect(fault.KeyGone)
	other(t, p, func(c transport.TPM) error {
		_, err := tpm2.Clear{AuthHandle: tpm2.TPMRHLockout}.Execute(c)
		return err
	})
	for _, k := range keys {
		until(t, func() bool {
			_, err := k.Sign(context.Background(), message)
			return signer.ClassOf(err) == signer.KeyGone
		})
	}
	fresh := generate(t, b, ident.ECDSAP256)
	mustSign(t, fresh, message)
	l.stop()
	haveFiles(t, dir, append(keys, fresh)...)
	list, err := b.Keys(context.Background())
	if err != nil || len(list) != 4 {
		t.Fatalf("%d keys, %v", len(list), verbose(err))
	}
	for _, i := range list {
		if (i.Problem == "") != (i.ID == fresh.Info().ID) {
			t.Errorf("%s: %q", i.URI, i.Problem)
		}
	}
	if r := count(t, p); r.objects > 3 || r.sessions > 1 {
		t.Errorf("%d objects and %d sessions on the TPM", r.objects, r.sessions)
	}
}

func haveFiles(t *testing.T, dir string, keys ...signer.Key) {
	t.Helper()
	for _, k := range keys {
		for _, ext := range []string{".pub", ".priv", ".json"} {
			if _, err := os.Stat(filepath.Join(dir, k.Info().ID.String()+ext)); err != nil {
				t.Errorf("the key's files did not survive: %v", err)
			}
		}
	}
}

// TestLockout brings the TPM into its dictionary-attack lockout. Our own keys are outside its reach and sign on. A key
// of others that is not is refused once, and then by us alone until an operator unlocks it.
func TestLockout(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	provision(t, m, srk{unique: make([]byte, 32)})
	dir := keyDir(t)
	open(t, m.Device(), dir).Close() // makes the folder
	for _, id := range []string{"0a", "0b"} {
		tool(t, m, dir, "tpm2_create", "-C", "0x81000001", "-u", id+".pub", "-r", id+".priv", "-G", "ecc:ecdsa",
			"-a", "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|sign")
		tool(t, m, dir, "tpm2_flushcontext", "-t")
	}
	work := t.TempDir()
	tool(t, m, work, "tpm2_dictionarylockout", "--setup-parameters", "--max-tries=1", "--recovery-time=1000000",
		"--lockout-recovery-time=1000000")
	p := tpmproxy.New(t, m.Path())
	b := open(t, p.Device(), dir)
	ctx := context.Background()
	list, err := b.Keys(ctx)
	if err != nil || len(list) != 2 {
		t.Fatalf("%d keys, %v", len(list), verbose(err))
	}
	ours, theirs := generate(t, b, ident.ECDSAP256), make([]signer.Key, 2)
	for i, info := range list {
		if theirs[i], err = b.Open(ctx, info.ID, info.Public); err != nil {
			t.Fatal(verbose(err))
		}
		mustSign(t, theirs[i], message)
	}
	guess := func(c transport.TPM) error { // somebody guesses the password of an object of his own
		auth := []byte("right")
		obj, err := tpm2.CreatePrimary{
			PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(guarded()),
			InSensitive: tpm2.TPM2BSensitiveCreate{
				Sensitive: &tpm2.TPMSSensitiveCreate{UserAuth: tpm2.TPM2BAuth{Buffer: auth}},
			},
		}.Execute(c)
		if err != nil {
			return err
		}
		defer func() { _, _ = tpm2.FlushContext{FlushHandle: obj.ObjectHandle}.Execute(c) }()
		for range 3 {
			wrong := tpm2.PasswordAuth([]byte("wrong"))
			_, err = tpm2.Sign{
				KeyHandle:  tpm2.AuthHandle{Handle: obj.ObjectHandle, Name: obj.Name, Auth: wrong},
				Digest:     tpm2.TPM2BDigest{Buffer: make([]byte, 32)},
				Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck},
			}.Execute(c)
		}
		if !errors.Is(err, tpm2.TPMRCLockout) {
			t.Errorf("guessing ends in %v", err)
		}
		return nil
	}
	err = b.Device().Lend(ctx, func(rw io.ReadWriteCloser) error { return guess(transport.FromReadWriter(rw)) })
	if err != nil {
		t.Fatal(verbose(err))
	}
	l := newLoad(t, []signer.Key{ours})
	l.served()
	p.Script()
	l.stop()
	p.Script()
	for range 3 {
		for _, k := range theirs {
			_, err := k.Sign(ctx, message)
			if fault.CodeOf(err) != fault.AuthorisationRefused || signer.ClassOf(err) != signer.AuthorisationRefused {
				t.Errorf("in the lockout: %v", verbose(err))
			}
		}
	}
	if n := p.Count(tpmproxy.Sign); n != 2 {
		t.Errorf("the TPM was asked %d times by two keys, want 2", n)
	}
	d := b.Describe(ctx)
	if d.Limits["keys_refused"] != "2" || d.State != signer.Ready {
		t.Errorf("Describe: %+v", d)
	}
	if n := b.Failures()[signer.AuthorisationRefused]; n != 2 {
		t.Errorf("%d refusals counted, want 2", n)
	}
	p.Script()
	if err := b.Unlock(ctx); fault.CodeOf(err) != fault.AuthorisationRefused || p.Count(tpmproxy.Sign) != 1 {
		t.Errorf("Unlock in the lockout: %v, %d attempts", verbose(err), p.Count(tpmproxy.Sign))
	}
	other(t, p, func(c transport.TPM) error {
		rsp, err := c.Send([]byte{ // TPM2_DictionaryAttackLockReset by TPM_RH_LOCKOUT, with an empty password
			0x80, 2, 0, 0, 0, 27, 0, 0, 1, 0x39, 0x40, 0, 0, 10, 0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0,
		})
		if err == nil && !bytes.Equal(rsp[6:10], make([]byte, 4)) {
			t.Errorf("ending the lockout: %x", rsp)
		}
		return err
	})
	if _, err := theirs[0].Sign(ctx, message); fault.CodeOf(err) != fault.AuthorisationRefused {
		t.Errorf("before Unlock: %v", verbose(err))
	}
	if err := b.Unlock(ctx); err != nil {
		t.Fatal(verbose(err))
	}
	for _, k := range append(theirs, ours) {
		mustSign(t, k, message)
	}
	if d := b.Describe(ctx); d.Limits["keys_refused"] != "" {
		t.Errorf("Describe: %+v", d)
	}
}

// guarded is a signing key whose password the TPM guards against guessing.
func guarded() tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, SignEncrypt: true,
		},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			CurveID: tpm2.TPMECCNistP256,
			Scheme: tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgECDSA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256})},
		}),
	}
}
