package tpm_test

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/tpmdev"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/tpm"
	softhsmtest "github.com/trustd/trustd/softhsm-test"
	"github.com/trustd/trustd/softhsm-test/tpmproxy"
)

// TestMoreKeysThanSlots uses ten keys of three algorithms at once on a TPM with three slots.
func TestMoreKeysThanSlots(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	b := open(t, m.Device(), keyDir(t))
	var keys []signer.Key
	for i := range 10 {
		alg := ident.ECDSAP256
		if i%3 == 1 {
			alg = ident.ECDSAP384
		}
		keys = append(keys, generate(t, b, alg))
	}
	keys = append(keys, generate(t, b, ident.RSA2048))
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 2 * len(keys) {
				k, msg := keys[(i*(g+1))%len(keys)], fmt.Appendf(nil, "%d %d", g, i)
				sig, err := k.Sign(t.Context(), msg)
				if err != nil {
					t.Errorf("signing: %v", verbose(err))
				} else if signature.Verify(k.Public(), msg, sig) != nil {
					t.Error("a signature by another key")
				}
			}
		})
	}
	wg.Wait()
}

// TestKill kills the TPM under load and starts it again on the same state, five times. What is in flight ends in a
// right signature or a retryable error, and every caller is served again, without the backend being opened anew.
func TestKill(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	b := open(t, m.Device(), keyDir(t))
	const callers = 6
	keys := make([]signer.Key, callers)
	for i := range keys {
		keys[i] = generate(t, b, ident.ECDSAP256)
	}
	ctx, stop := context.WithCancel(t.Context())
	var signed [callers]atomic.Int64
	var failed atomic.Int64
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	for i, k := range keys {
		wg.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				msg := fmt.Appendf(nil, "%d %d", i, n)
				sig, err := k.Sign(context.Background(), msg)
				switch {
				case err == nil && signature.Verify(k.Public(), msg, sig) == nil:
					signed[i].Add(1)
				case err == nil:
					t.Error("a wrong signature")
				case fault.CodeOf(err) != fault.DeviceLost || !fault.CodeOf(err).Retryable():
					t.Errorf("not a retryable loss: %v", verbose(err))
					return
				default:
					failed.Add(1)
				}
			}
		})
	}
	more := func() {
		var before [callers]int64
		for i := range before {
			before[i] = signed[i].Load()
		}
		eventually(t, func() error {
			for i := range before {
				if signed[i].Load() < before[i]+3 {
					return fault.New(fault.DeviceLost, "caller %d is not served", i)
				}
			}
			return nil
		})
	}
	more()
	for range 5 {
		m.Kill()
		lost := failed.Load()
		eventually(t, func() error {
			if failed.Load() < lost+callers {
				return fault.New(fault.DeviceLost, "no failure yet")
			}
			return nil
		})
		m.Restart()
		more()
	}
}

// TestRestartBetweenRequests power-cycles the TPM while nobody uses it: the next request does not notice.
func TestRestartBetweenRequests(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	b := open(t, m.Device(), keyDir(t))
	k := generate(t, b, ident.ECDSAP256)
	for range 3 {
		m.Restart()
		mustSign(t, k, message)
	}
}

// TestAbsent opens the backend before there is a TPM.
func TestAbsent(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	dir := keyDir(t)
	b := open(t, m.Device(), dir)
	k := generate(t, b, ident.ECDSAP256)
	b.Close()
	m.Kill()

	b = open(t, m.Device(), dir)
	ctx, id := t.Context(), k.Info().ID
	d := b.Describe(ctx)
	if d.State != signer.Degraded || d.Problem == "" || d.Remedy == "" || d.Device != m.Device() {
		t.Errorf("Describe without a TPM: %+v", d)
	}
	_, gerr := b.Generate(ctx, newID(t), ident.ECDSAP256)
	_, oerr := b.Open(ctx, id, k.Public())
	_, nerr := b.Open(ctx, newID(t), k.Public())
	_, ferr := b.Find(ctx, id)
	_, kerr := b.Keys(ctx)
	for name, err := range map[string]error{
		"Generate": gerr, "Open": oerr, "Open of none": nerr, "Find": ferr, "Keys": kerr, "Destroy": b.Destroy(ctx, id),
	} {
		if fault.CodeOf(err) != fault.DeviceLost {
			t.Errorf("%s without a TPM: %v", name, verbose(err))
		}
	}
	m.Restart()
	eventually(t, func() error { _, err := b.Open(ctx, id, k.Public()); return err })
	k, err := b.Open(ctx, id, k.Public())
	if err != nil {
		t.Fatal(verbose(err))
	}
	mustSign(t, k, message)
	if d := b.Describe(ctx); d.State != signer.Ready {
		t.Errorf("Describe with a TPM: %+v", d)
	}
}

// TestHang stops the TPM in its tracks: a request ends in device_lost once its command is overdue, others do not
// wait as long again, and all is well when the TPM goes on, or is replaced by a fresh process.
func TestHang(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	dir := keyDir(t)
	b := open(t, m.Device(), dir)
	k := generate(t, b, ident.ECDSAP256)
	b.Close()
	b = openWith(t, tpm.Config{Device: m.Device(), Dir: dir, CommandTimeout: 300 * time.Millisecond})
	id, pub := k.Info().ID, k.Public()
	eventually(t, func() (err error) { k, err = b.Open(t.Context(), id, pub); return err })
	for name, wake := range map[string]func(){
		"goes on": func() {
			if err := m.Process().Signal(syscall.SIGCONT); err != nil {
				t.Fatal(err)
			}
		},
		"restarted": m.Restart,
	} {
		if err := m.Process().Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if _, err := k.Sign(t.Context(), message); fault.CodeOf(err) != fault.DeviceLost {
				t.Errorf("%s: signing on a TPM that hangs: %v", name, verbose(err))
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		if _, err := k.Sign(ctx, message); err == nil {
			t.Errorf("%s: a signature by a TPM that hangs", name)
		}
		cancel()
		wake()
		eventually(t, func() error { _, err := k.Sign(t.Context(), message); return err })
	}
}

// TestReplaced puts another TPM in the place of the one that made the key: the key is gone, its files stay, and it
// is back when its TPM is.
func TestReplaced(t *testing.T) {
	m, other := softhsmtest.NewTPM(t), softhsmtest.NewTPM(t)
	dir := keyDir(t)
	b := open(t, m.Device(), dir)
	k := generate(t, b, ident.ECDSAP256)
	id := k.Info().ID
	b.Close()

	b = open(t, other.Device(), dir)
	if _, err := b.Open(t.Context(), id, k.Public()); fault.CodeOf(err) != fault.KeyGone {
		t.Errorf("Open on another TPM: %v", verbose(err))
	}
	list, err := b.Keys(t.Context())
	if err != nil || len(list) != 1 || list[0].Problem == "" || list[0].ID != id {
		t.Errorf("Keys on another TPM: %+v, %v", list, verbose(err))
	}
	b.Close()
	b = open(t, m.Device(), dir)
	if k, err = b.Open(t.Context(), id, k.Public()); err != nil {
		t.Fatal(verbose(err))
	}
	mustSign(t, k, message)

	m.Replace() // under the open backend
	if _, err := k.Sign(t.Context(), message); fault.CodeOf(err) != fault.KeyGone {
		t.Errorf("signing after the TPM was replaced: %v", verbose(err))
	}
	mustSign(t, generate(t, b, ident.ECDSAP256), message)
}

// TestOwnerPassword gives the owner hierarchy a password: without a persistent storage root key the backend stops
// and does not ask again; with one it does not need the owner.
func TestOwnerPassword(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	b := open(t, m.Device(), keyDir(t))
	setOwnerPassword(t, b)
	b.Close()

	r := tpmproxy.New(t, m.Path())
	b = open(t, r.Device(), keyDir(t))
	for range 3 {
		if _, err := b.Generate(t.Context(), newID(t), ident.ECDSAP256); fault.CodeOf(err) != fault.AuthorisationRefused {
			t.Errorf("Generate without the owner's password: %v", verbose(err))
		}
	}
	if d := b.Describe(t.Context()); d.State != signer.Locked || d.Remedy == "" {
		t.Errorf("Describe: %+v", d)
	}
	if n := r.Count(tpmproxy.CreatePrimary); n != 1 {
		t.Errorf("the owner's authorisation was tried %d times", n)
	}
	if n := b.Failures()[signer.AuthorisationRefused]; n != 1 {
		t.Errorf("%d refusals counted, want 1", n)
	}
	r.Cut() // a new connection is no reason to ask again
	_, err := b.Generate(t.Context(), newID(t), ident.ECDSAP256)
	if fault.CodeOf(err) != fault.AuthorisationRefused || r.Count(tpmproxy.CreatePrimary) != 1 {
		t.Errorf("after a reconnect: %v, %d attempts", verbose(err), r.Count(tpmproxy.CreatePrimary))
	}
	if err := b.Unlock(t.Context()); fault.CodeOf(err) != fault.AuthorisationRefused || r.Count(tpmproxy.CreatePrimary) != 2 {
		t.Errorf("Unlock: %v, %d attempts", verbose(err), r.Count(tpmproxy.CreatePrimary))
	}
	other(t, r, func(c transport.TPM) error {
		_, err := tpm2.HierarchyChangeAuth{
			AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth([]byte("owner"))},
		}.Execute(c)
		return err
	})
	if _, err := b.Generate(t.Context(), newID(t), ident.ECDSAP256); fault.CodeOf(err) != fault.AuthorisationRefused {
		t.Errorf("before Unlock: %v", verbose(err))
	}
	if err := b.Unlock(t.Context()); err != nil {
		t.Errorf("Unlock: %v", verbose(err))
	}
	mustSign(t, generate(t, b, ident.ECDSAP256), message)
	setOwnerPassword(t, b)
	b.Close()

	provision(t, m, srk{owner: []byte("owner"), unique: make([]byte, 32)})
	b = open(t, m.Device(), keyDir(t))
	for range 4 { // more than fit beside a persistent parent
		mustSign(t, generate(t, b, ident.ECDSAP256), message)
	}
}

// TestStorageKeyPassword gives the persistent storage root key a password, which is asked for once.
func TestStorageKeyPassword(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	provision(t, m, srk{password: []byte("srk"), unique: make([]byte, 32)})
	r := tpmproxy.New(t, m.Path())
	b := open(t, r.Device(), keyDir(t))
	for range 3 {
		if _, err := b.Generate(t.Context(), newID(t), ident.ECDSAP256); fault.CodeOf(err) != fault.AuthorisationRefused {
			t.Errorf("Generate without the storage key's password: %v", verbose(err))
		}
	}
	if n := r.Count(tpmproxy.Create); n != 1 {
		t.Errorf("the storage key's authorisation was tried %d times", n)
	}
	if d := b.Describe(t.Context()); d.State != signer.Locked {
		t.Errorf("Describe: %+v", d)
	}
}

// TestLend lends the TPM between signatures.
func TestLend(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	b := open(t, m.Device(), keyDir(t))
	k := generate(t, b, ident.ECDSAP256)
	var wg sync.WaitGroup
	wg.Go(func() {
		for range 20 {
			if _, err := k.Sign(t.Context(), message); err != nil {
				t.Errorf("signing beside a loan: %v", verbose(err))
			}
		}
	})
	for range 5 {
		err := b.Device().Lend(t.Context(), func(rw io.ReadWriteCloser) error {
			c := transport.FromReadWriter(rw)
			for range 3 { // all slots are free
				_, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(c)
				if err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Error(verbose(err))
		}
	}
	wg.Wait()
}

func setOwnerPassword(t *testing.T, b *tpm.Backend) {
	t.Helper()
	err := b.Device().Do(t.Context(), func(c *tpmdev.Conn) error {
		_, err := tpm2.HierarchyChangeAuth{
			AuthHandle: tpm2.TPMRHOwner, NewAuth: tpm2.TPM2BAuth{Buffer: []byte("owner")},
		}.Execute(c)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestProvisionedLater makes the storage root key persistent after a key was made, under another derivation: the
// old key still signs under the primary, a new one goes under the persistent key.
func TestProvisionedLater(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	dir := keyDir(t)
	b := open(t, m.Device(), dir)
	old := generate(t, b, ident.ECDSAP256)
	b.Close()
	provision(t, m, srk{unique: []byte{7}})
	b = open(t, m.Device(), dir)
	again, err := b.Open(t.Context(), old.Info().ID, old.Public())
	if err != nil {
		t.Fatal(verbose(err))
	}
	fresh := generate(t, b, ident.ECDSAP256)
	for range 3 {
		mustSign(t, again, message)
		mustSign(t, fresh, message)
	}
	list, err := b.Keys(t.Context())
	if err != nil {
		t.Fatal(verbose(err))
	}
	for _, i := range list {
		if i.Problem != "" {
			t.Errorf("%s: %s", i.URI, i.Problem)
		}
	}
}

// TestKeyDamaged changes the files of a key: it is gone, listed with its problem, and hides no other.
func TestKeyDamaged(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	dir := keyDir(t)
	b := open(t, m.Device(), dir)
	good := generate(t, b, ident.ECDSAP256)
	for name, damage := range damages {
		bad := generate(t, b, ident.ECDSAP256)
		damage(t, filepath.Join(dir, bad.Info().ID.String()), filepath.Join(dir, good.Info().ID.String()))
		b.Close()
		b = open(t, m.Device(), dir)
		if _, err := b.Open(t.Context(), bad.Info().ID, bad.Public()); fault.CodeOf(err) != fault.KeyGone {
			t.Errorf("%s: Open: %v", name, verbose(err))
		}
		list, err := b.Keys(t.Context())
		if err != nil {
			t.Fatal(verbose(err))
		}
		for _, i := range list {
			if i.ID == good.Info().ID && i.Problem != "" {
				t.Errorf("%s: the good key has the problem %q", name, i.Problem)
			}
			if i.ID == bad.Info().ID && i.Problem == "" {
				t.Errorf("%s: the damaged key is listed without a problem", name)
			}
		}
		if err := b.Destroy(t.Context(), bad.Info().ID); err != nil {
			t.Errorf("%s: Destroy: %v", name, verbose(err))
		}
	}
	k, err := b.Open(t.Context(), good.Info().ID, good.Public())
	if err != nil {
		t.Fatal(verbose(err))
	}
	mustSign(t, k, message)
}
