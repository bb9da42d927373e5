package monitor_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/batch"
	"github.com/trustd/trustd/signer/monitor"
)

// A bubble is a clock inside a synctest bubble.
type bubble struct{ start time.Time }

func (b bubble) Now() time.Time      { return time.Now().UTC() }
func (b bubble) Boot() time.Duration { return time.Hour + time.Since(b.start) }
func (bubble) BootID() string        { return "bubble" }

// A device is a backend that does what a test says.
type device struct {
	mu       sync.Mutex
	keys     map[signer.ID]ed25519.PrivateKey
	fail     error // of every call to it
	hang     bool  // every call until its context ends
	state    signer.State
	serial   string
	took     time.Duration // by a signature
	describe int
	opened   int
	made     int
	signed   int
	messages [][]byte
	unlocks  int
	unlock   func() error
}

func newDevice() *device {
	return &device{keys: map[signer.ID]ed25519.PrivateKey{}, state: signer.Ready, serial: "1", took: time.Millisecond}
}

// set changes the device under its lock.
func (d *device) set(change func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	change()
}

func (d *device) count(n *int) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return *n
}

// message returns one of those that were signed.
func (d *device) message(i int) []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.messages[i]
}

// call waits where the device hangs and returns how it fails.
func (d *device) call(ctx context.Context) error {
	d.mu.Lock()
	hang, fail := d.hang, d.fail
	d.mu.Unlock()
	if hang {
		<-ctx.Done()
		return fault.From(ctx.Err())
	}
	return fail
}

func (d *device) Describe(ctx context.Context) signer.Description {
	err := d.call(ctx)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.describe++
	out := signer.Description{Kind: "soft", Device: "a device", Grade: signer.Software, State: d.state,
		Limits: map[string]string{"serial": d.serial}, Algorithms: []ident.Algorithm{ident.Ed25519}}
	if err != nil && d.state == signer.Ready {
		out.State, out.Problem, out.Remedy = signer.Degraded, "it is gone", "plug it in"
	} else if d.state != signer.Ready {
		out.Problem, out.Remedy = "as the test says", "as the test says too"
	}
	return out
}

func (d *device) Generate(ctx context.Context, id signer.ID, _ ident.Algorithm) (signer.Key, error) {
	if err := d.call(ctx); err != nil {
		return nil, err
	}
	_, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.made++
	d.keys[id] = private
	return d.key(id, private)
}

func (d *device) key(id signer.ID, private ed25519.PrivateKey) (signer.Key, error) {
	pub, err := ident.NewPublicKey(private.Public().(ed25519.PublicKey))
	return &key{d, id, pub}, err
}

func (d *device) Open(ctx context.Context, id signer.ID, pub ident.PublicKey) (signer.Key, error) {
	if err := d.call(ctx); err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.opened++
	private, ok := d.keys[id]
	if !ok {
		return nil, fault.New(fault.KeyGone, "")
	}
	k, err := d.key(id, private)
	if err == nil && !k.Public().Equal(pub) {
		err = fault.New(fault.KeyGone, "")
	}
	return k, err
}

func (d *device) Find(context.Context, signer.ID) (signer.KeyInfo, error) {
	return signer.KeyInfo{}, fault.New(fault.KeyNotFound, "")
}
func (d *device) Keys(context.Context) ([]signer.KeyInfo, error) { return nil, nil }
func (d *device) Destroy(_ context.Context, id signer.ID) error {
	d.set(func() { delete(d.keys, id) })
	return nil
}
func (d *device) Close() error { return nil }

func (d *device) Unlock(context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.unlocks++
	return d.unlock()
}

type key struct {
	d   *device
	id  signer.ID
	pub ident.PublicKey
}

func (k *key) Public() ident.PublicKey { return k.pub }
func (k *key) Info() signer.KeyInfo    { return signer.KeyInfo{ID: k.id, Public: k.pub} }

func (k *key) Sign(ctx context.Context, msg []byte) ([]byte, error) {
	if err := k.d.call(ctx); err != nil {
		return nil, err
	}
	k.d.mu.Lock()
	took := k.d.took
	k.d.mu.Unlock()
	time.Sleep(took) // in the bubble
	k.d.mu.Lock()
	defer k.d.mu.Unlock()
	private, ok := k.d.keys[k.id]
	if !ok {
		return nil, fault.New(fault.KeyGone, "")
	}
	k.d.signed++
	k.d.messages = append(k.d.messages, msg)
	return private.Sign(nil, msg, crypto.Hash(0))
}

// classed is an error of a device with a class, as backends return it.
type classed struct{ class signer.Class }

func (c classed) Error() string             { return string(c.class) }
func (c classed) SignerClass() signer.Class { return c.class }

func failed(c signer.Class) error { return fault.Wrap(c.Code(), classed{c}, "") }

// A rig is a monitor that runs over a device, inside a bubble.
type rig struct {
	*device
	t    *testing.T
	m    *monitor.Monitor
	line *batch.Device
	dir  string
	log  *bytes.Buffer
	stop func()
}

func newRig(t *testing.T, d *device, dir string) *rig {
	r := &rig{device: d, t: t, dir: dir, log: new(bytes.Buffer)}
	r.m = monitor.New(monitor.Config{
		Name: "hsm", Backend: d, Dir: dir, Clock: bubble{time.Now()}, Log: slog.New(slog.NewTextHandler(r.log, nil)),
		Line: func(target batch.Target) *batch.Key { return r.line.Key(target) },
	})
	r.line = batch.NewDevice(batch.Config{Observe: r.m.Observe})
	return r
}

// run starts the monitor and waits until it has nothing to do but to wait.
func (r *rig) run() {
	ctx, cancel := context.WithCancel(r.t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := r.m.Run(ctx); err != nil {
			r.t.Error(err)
		}
	}()
	r.stop = func() {
		cancel()
		<-done
		if err := r.line.Close(); err != nil {
			r.t.Error(err)
		}
	}
	<-r.m.Judged()
	synctest.Wait()
}

func (r *rig) wants(s signer.State) {
	r.t.Helper()
	synctest.Wait()
	if st := r.m.Status(); st.State != s {
		r.t.Errorf("state %s, want %s: %s", st.State, s, st.Problem)
	}
}

// watched runs a test over a device in a bubble.
func watched(t *testing.T, test func(t *testing.T, r *rig)) {
	dir := filepath.Join(t.TempDir(), "canaries")
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, newDevice(), dir)
		r.run()
		defer func() { r.stop() }()
		test(t, r)
	})
}

// other signs with a key of somebody else.
func (r *rig) other(batched bool) error {
	k, err := r.Generate(r.t.Context(), "other", ident.Ed25519)
	if err != nil {
		return err
	}
	items := []batch.Item{{Subject: signature.Subject{Message: []byte("a")}, Batchable: batched},
		{Subject: signature.Subject{Message: []byte("b")}, Batchable: batched}}
	return r.line.Key(batch.Plain(k)).Sign(r.t.Context(), batch.Caller{UID: 1}, items)[0].Err
}

// TestCanaryProves: a backend is ready once its canary has signed, and again every 30 seconds; real signatures stand for
// it.
func TestCanaryProves(t *testing.T) {
	watched(t, func(t *testing.T, r *rig) {
		r.wants(signer.Ready)
		if r.count(&r.made) != 1 || r.count(&r.signed) != 1 {
			t.Errorf("made %d keys and %d signatures", r.count(&r.made), r.count(&r.signed))
		}
		if m := r.message(0); !bytes.HasPrefix(m, []byte(signature.Canary)) || !bytes.Contains(m, []byte("hsm")) {
			t.Errorf("signed %q", m)
		}
		time.Sleep(10 * time.Minute)
		r.wants(signer.Ready)
		if n := r.count(&r.signed); n < 19 || n > 22 {
			t.Errorf("%d signatures in ten idle minutes", n)
		}
		if bytes.Equal(r.message(1), r.message(2)) {
			t.Error("two canaries signed the same")
		}
		before := r.m.Status().Canaries
		for range 40 {
			time.Sleep(10 * time.Second)
			if err := r.other(true); err != nil {
				t.Fatal(err)
			}
		}
		st := r.m.Status()
		if st.Canaries > before+1 {
			t.Errorf("%d canaries while others sign", st.Canaries-before)
		}
		fresh := time.Since(st.LastSignature) < time.Second
		if st.Batches != 40 || st.Batched != 80 || !fresh || st.CanaryTook != time.Millisecond {
			t.Errorf("%+v", st.Figures)
		}
		if st.CanaryKey == "" || st.CanaryPublic == "" || !r.m.IsCanary(mustID(t, st.CanaryKey)) || r.m.IsCanary("other") {
			t.Errorf("canary key %q %q", st.CanaryKey, st.CanaryPublic)
		}
	})
}

func mustID(t *testing.T, hex string) signer.ID {
	id, err := signer.ParseID(hex)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// TestLossAndReturn: what says that the device is gone ends its readiness at once, and it is ready again within a second
// of its return, for whichever class.
func TestLossAndReturn(t *testing.T) {
	for _, class := range []signer.Class{
		signer.TokenLost, signer.ModuleDead, signer.LoginLost, signer.SessionLost, signer.HandleLost,
	} {
		t.Run(string(class), func(t *testing.T) {
			watched(t, func(t *testing.T, r *rig) {
				time.Sleep(5 * time.Second)
				r.set(func() { r.fail = failed(class) })
				r.m.Observe(batch.Turn{Messages: 1, Err: failed(class)})
				if s := r.m.State(); s != signer.Degraded {
					t.Errorf("state %s at once", s)
				}
				time.Sleep(10 * time.Minute)
				r.wants(signer.Degraded)
				if st := r.m.Status(); st.Problem != "it is gone" || st.Remedy != "plug it in" || time.Since(st.Since) < 9*time.Minute {
					t.Errorf("%s (%s) since %v", st.Problem, st.Remedy, st.Since)
				}
				if n := r.m.Status().Canaries; n < 1100 || n > 1300 {
					t.Errorf("%d canaries in ten minutes", n)
				}
				r.set(func() { r.fail = nil })
				time.Sleep(time.Second)
				r.wants(signer.Ready)
				if r.count(&r.made) != 1 {
					t.Errorf("%d canary keys were made", r.count(&r.made))
				}
				if st := r.m.Status(); st.Failures[class] == 0 || st.Changes[signer.Ready] != 2 || st.Changes[signer.Degraded] != 1 {
					t.Errorf("%+v", st.Figures)
				}
				if lines := strings.Count(r.log.String(), "backend state"); lines != 3 {
					t.Errorf("%d lines of state in the log:\n%s", lines, r.log)
				}
			})
		})
	}
}

// TestFailuresOfOneRequest leave the backend as it is.
func TestFailuresOfOneRequest(t *testing.T) {
	watched(t, func(t *testing.T, r *rig) {
		for _, err := range []error{failed(signer.KeyGone), failed(signer.CallerError), failed(signer.TransientBusy),
			failed(signer.ResourcesExhausted), fault.New(fault.DeadlineExceeded, ""), context.Canceled,
			fault.New(fault.Stopping, "")} {
			r.m.Observe(batch.Turn{Messages: 1, Err: err})
			r.m.Report(err)
			r.wants(signer.Ready)
		}
		if st := r.m.Status(); st.Failures[signer.KeyGone] != 2 || len(st.Failures) != 4 {
			t.Errorf("failures %v", st.Failures)
		}
		r.m.Report(nil)
	})
}

// TestOldSuccessProvesNothing: a signature that was begun before the device was lost may come after the loss.
func TestOldSuccessProvesNothing(t *testing.T) {
	watched(t, func(t *testing.T, r *rig) {
		r.set(func() { r.fail = failed(signer.TokenLost) })
		time.Sleep(time.Second)
		r.m.Observe(batch.Turn{Messages: 1, Err: failed(signer.TokenLost)})
		time.Sleep(50 * time.Millisecond)
		r.m.Observe(batch.Turn{Messages: 1, Took: 100 * time.Millisecond})
		r.wants(signer.Degraded)
		r.m.Observe(batch.Turn{Messages: 1, Took: 10 * time.Millisecond})
		if s := r.m.State(); s != signer.Ready {
			t.Errorf("a signature begun after the loss leaves it %s", s)
		}
	})
}

// TestLocked: a device that refused the authorisation is not asked to sign until an operator has acted, and then once.
func TestLocked(t *testing.T) {
	watched(t, func(t *testing.T, r *rig) {
		r.set(func() {
			r.fail, r.state = failed(signer.AuthorisationRefused), signer.Locked
			r.unlock = func() error { return failed(signer.AuthorisationRefused) }
		})
		r.m.Observe(batch.Turn{Messages: 1, Err: failed(signer.AuthorisationRefused)})
		time.Sleep(time.Second)
		r.wants(signer.Locked)
		before := r.m.Status().Canaries
		for range 100 {
			r.m.Report(failed(signer.AuthorisationRefused)) // callers who do not know
			time.Sleep(6 * time.Second)
			r.wants(signer.Locked)
		}
		if n := r.m.Status().Canaries; n != before {
			t.Errorf("%d canaries while locked", n-before)
		}
		if err := r.m.Unlock(t.Context()); !errors.Is(err, fault.AuthorisationRefused) || r.count(&r.unlocks) != 1 {
			t.Errorf("%d attempts: %v", r.count(&r.unlocks), err)
		}
		r.wants(signer.Locked)
		r.set(func() {
			r.unlock = func() error { r.fail, r.state = nil, signer.Ready; return nil }
		})
		if err := r.m.Unlock(t.Context()); err != nil || r.count(&r.unlocks) != 2 {
			t.Errorf("%d attempts: %v", r.count(&r.unlocks), err)
		}
		r.wants(signer.Ready)
		if st := r.m.Status(); st.Changes[signer.Locked] != 1 {
			t.Errorf("it was locked %d times", st.Changes[signer.Locked])
		}
	})
}

// TestRefusalOfTheCanary locks the backend also where its own words do not.
func TestRefusalOfTheCanary(t *testing.T) {
	watched(t, func(t *testing.T, r *rig) {
		r.set(func() { r.fail = failed(signer.AuthorisationRefused) })
		r.set(func() { r.state = signer.Recovering }) // it says that it might
		time.Sleep(time.Minute)
		r.wants(signer.Locked)
		n := r.m.Status().Canaries
		time.Sleep(10 * time.Minute)
		if now := r.m.Status().Canaries; now != n {
			t.Errorf("%d more canaries", now-n)
		}
	})
}

// TestRefusalOfOneKey leaves the backend ready, because it still signs.
func TestRefusalOfOneKey(t *testing.T) {
	watched(t, func(t *testing.T, r *rig) {
		r.m.Observe(batch.Turn{Messages: 1, Err: failed(signer.AuthorisationRefused)})
		time.Sleep(time.Second)
		r.wants(signer.Ready)
		if st := r.m.Status(); st.Changes[signer.Ready] != 1 {
			t.Errorf("%+v", st.Changes)
		}
	})
}

// TestEmptiedDevice: a canary key that is gone from a healthy device is never made anew by itself; it counts again when it
// comes back, and an operator can take the device as it is.
func TestEmptiedDevice(t *testing.T) {
	watched(t, func(t *testing.T, r *rig) {
		var kept map[signer.ID]ed25519.PrivateKey
		r.set(func() { kept = r.keys })
		r.set(func() { r.keys = map[signer.ID]ed25519.PrivateKey{} })
		time.Sleep(time.Minute)
		r.wants(signer.Degraded)
		st := r.m.Status()
		if !st.CanaryGone || !strings.Contains(st.Problem, "emptied or replaced") ||
			!strings.Contains(st.Remedy, "reset-canary hsm") {
			t.Errorf("%+v", st)
		}
		time.Sleep(time.Hour)
		r.wants(signer.Degraded)
		if r.count(&r.made) != 1 {
			t.Fatalf("%d canary keys", r.count(&r.made))
		}
		if err := r.m.Prove(t.Context()); !monitor.Gone(err) {
			t.Errorf("Prove: %v", err)
		}
		r.set(func() { r.keys = kept })
		time.Sleep(time.Second)
		r.wants(signer.Ready)
		if r.m.CanaryGone() {
			t.Error("it is still gone")
		}
		// Another device, for good.
		r.set(func() { r.keys, r.serial = map[signer.ID]ed25519.PrivateKey{}, "2" })
		r.m.Refresh(t.Context(), 0)
		time.Sleep(time.Minute)
		r.wants(signer.Degraded)
		if st := r.m.Status(); !strings.Contains(st.Problem, "another device") {
			t.Errorf("%s", st.Problem)
		}
		before := r.m.Status().CanaryKey
		if err := r.m.ResetCanary(t.Context()); err != nil {
			t.Fatal(err)
		}
		r.wants(signer.Ready)
		after := r.m.Status().CanaryKey
		if r.count(&r.made) != 2 || after == before {
			t.Errorf("%d canary keys", r.count(&r.made))
		}
		if err := r.m.ResetCanary(t.Context()); err != nil || r.count(&r.made) != 2 || r.m.Status().CanaryKey != after {
			t.Errorf("a second time it changes something: %v, %d keys", err, r.count(&r.made))
		}
	})
}

// TestResetNeedsADevice: an operator's verb for a replaced device is none for one that is only away.
func TestResetNeedsADevice(t *testing.T) {
	watched(t, func(t *testing.T, r *rig) {
		key := r.m.Status().CanaryKey
		r.set(func() { r.fail = failed(signer.TokenLost) })
		if err := r.m.ResetCanary(t.Context()); !errors.Is(err, fault.DeviceLost) {
			t.Errorf("%v", err)
		}
		r.set(func() { r.fail = nil })
		time.Sleep(time.Second)
		r.wants(signer.Ready)
		if r.count(&r.made) != 1 || r.m.Status().CanaryKey != key {
			t.Errorf("%d canary keys", r.count(&r.made))
		}
	})
}

// TestHang: a device that says nothing is not ready once its proof is old, its description costs nobody more than their
// own patience, and it is ready when it answers again.
func TestHang(t *testing.T) {
	watched(t, func(t *testing.T, r *rig) {
		r.set(func() { r.hang = true })
		time.Sleep(50 * time.Second)
		r.wants(signer.Degraded)
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		r.m.Refresh(ctx, 0)
		if time.Since(start) > 300*time.Millisecond {
			t.Errorf("a Refresh took %v", time.Since(start))
		}
		r.set(func() { r.hang = false })
		time.Sleep(12 * time.Second) // what hangs ends at its deadline
		r.wants(signer.Ready)
	})
}

// TestRestart: the canary key outlives the daemon, and a device that was emptied meanwhile shows.
func TestRestart(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "canaries")
	d := newDevice()
	round := func(check func(t *testing.T, r *rig)) {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t, d, dir)
			r.run()
			defer func() { r.stop() }()
			time.Sleep(time.Second)
			check(t, r)
		})
	}
	var first string
	round(func(t *testing.T, r *rig) { first = r.m.Status().CanaryKey })
	round(func(t *testing.T, r *rig) {
		if r.m.Status().CanaryKey != first || d.count(&d.made) != 1 {
			t.Errorf("%d canary keys", d.count(&d.made))
		}
		r.wants(signer.Ready)
	})
	if problem, _ := monitor.Inspect(t.Context(), dir, "hsm", d); problem != "" {
		t.Errorf("Inspect: %s", problem)
	}
	d.set(func() { d.keys = map[signer.ID]ed25519.PrivateKey{} })
	if problem, remedy := monitor.Inspect(t.Context(), dir, "hsm", d); problem == "" || remedy == "" {
		t.Error("Inspect finds nothing")
	}
	if problem, _ := monitor.Inspect(t.Context(), dir, "another", d); problem != "" {
		t.Errorf("Inspect of one without a record: %s", problem)
	}
	round(func(t *testing.T, r *rig) {
		r.wants(signer.Degraded)
		if d.count(&d.made) != 1 {
			t.Error("it was made anew")
		}
	})
	// A file that cannot be read is no leave to make another key either.
	if err := os.WriteFile(filepath.Join(dir, "hsm.json"), []byte(`{"key_id": 1`), 0o600); err != nil {
		t.Fatal(err)
	}
	round(func(t *testing.T, r *rig) {
		r.wants(signer.Degraded)
		if st := r.m.Status(); d.count(&d.made) != 1 || !strings.Contains(st.Problem, "record") {
			t.Errorf("%d keys: %s", d.count(&d.made), st.Problem)
		}
		if err := r.m.ResetCanary(t.Context()); err != nil || d.count(&d.made) != 2 {
			t.Errorf("%d keys: %v", d.count(&d.made), err)
		}
		r.wants(signer.Ready)
	})
	if problem, _ := monitor.Inspect(t.Context(), dir, "hsm", d); problem != "" {
		t.Errorf("Inspect: %s", problem)
	}
}

// TestCrashWhileMaking: a key that a crash left between its begin and its record is destroyed.
func TestCrashWhileMaking(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "canaries")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	d := newDevice()
	if _, err := d.Generate(t.Context(), "0123456789abcdef", ident.Ed25519); err != nil {
		t.Fatal(err)
	}
	begun := `{"backend": "hsm", "key_id": "` + signer.ID("0123456789abcdef").String() + `"}`
	if err := os.WriteFile(filepath.Join(dir, "hsm.json"), []byte(begun), 0o600); err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, d, dir)
		r.run()
		defer func() { r.stop() }()
		r.wants(signer.Ready)
		d.set(func() {
			if len(d.keys) != 1 || d.keys["0123456789abcdef"] != nil {
				t.Errorf("%d keys are on the device", len(d.keys))
			}
		})
	})
}

// TestNoRoomForACanary: a device that makes no keys is asked now and then, and real signatures prove it as well.
func TestNoRoomForACanary(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "canaries")
	synctest.Test(t, func(t *testing.T) {
		d := newDevice()
		full := &fullDevice{device: d}
		r := newRig(t, d, dir)
		r.m = monitor.New(monitor.Config{
			Name: "hsm", Backend: full, Dir: dir, Clock: bubble{time.Now()}, Log: slog.New(slog.DiscardHandler),
			Line: func(target batch.Target) *batch.Key { return r.line.Key(target) },
		})
		r.line = batch.NewDevice(batch.Config{Observe: r.m.Observe})
		r.run()
		defer func() { r.stop() }()
		time.Sleep(10 * time.Minute)
		r.wants(signer.Recovering)
		if full.asked > 21 {
			t.Errorf("asked %d times in ten minutes", full.asked)
		}
		if st := r.m.Status(); !strings.Contains(st.Problem, "no room") {
			t.Errorf("%s", st.Problem)
		}
		if err := r.other(false); err != nil {
			t.Fatal(err)
		}
		r.wants(signer.Ready)
	})
}

type fullDevice struct {
	*device
	asked int
}

func (d *fullDevice) Generate(context.Context, signer.ID, ident.Algorithm) (signer.Key, error) {
	d.asked++
	return nil, fault.Wrap(fault.ResourceExhausted, classed{signer.ResourcesExhausted}, "there is no room for another key")
}

// TestStates: what the backend says of itself counts where nothing has been signed since.
func TestStates(t *testing.T) {
	for _, s := range []signer.State{signer.Degraded, signer.Locked, signer.CrashLoop, signer.Stopped} {
		t.Run(string(s), func(t *testing.T) {
			watched(t, func(t *testing.T, r *rig) {
				r.set(func() { r.state, r.fail = s, fault.New(fault.Unavailable, "") })
				r.m.Refresh(t.Context(), 0)
				if st := r.m.Status(); st.State != s || st.Problem != "as the test says" || st.Remedy == "" {
					t.Errorf("%s: %s", st.State, st.Problem)
				}
				time.Sleep(time.Second)
				r.set(func() { r.state, r.fail = signer.Ready, nil })
				if s == signer.Locked {
					r.m.Refresh(t.Context(), 0)
				}
				time.Sleep(time.Second)
				r.wants(signer.Ready)
			})
		})
	}
}

// TestBeforeRun nothing is signed, and nothing is known.
func TestBeforeRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, newDevice(), t.TempDir())
		if err := r.m.Prove(t.Context()); !errors.Is(err, fault.Unavailable) {
			t.Errorf("Prove: %v", err)
		}
		if err := r.m.ResetCanary(t.Context()); !errors.Is(err, fault.Unavailable) {
			t.Errorf("ResetCanary: %v", err)
		}
		if st := r.m.Status(); st.State != signer.Recovering || st.Described || r.count(&r.made) != 0 {
			t.Errorf("%+v", st)
		}
		r.run()
		if err := r.m.Run(t.Context()); err == nil {
			t.Error("it runs twice")
		}
		r.stop()
	})
}

// TestProveTogether: those who ask at once share a signature.
func TestProveTogether(t *testing.T) {
	watched(t, func(t *testing.T, r *rig) {
		r.set(func() { r.took = 100 * time.Millisecond })
		before := r.count(&r.signed)
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				if err := r.m.Prove(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if n := r.count(&r.signed) - before; n > 2 {
			t.Errorf("%d signatures", n)
		}
	})
}
