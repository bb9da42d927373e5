package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/trustd/trustd/client"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/softhsm-test/lab"
)

// faultyDir is the folder of the plugin that faultyPlugin built; TestMain removes it.
var faultyDir string

// faultyPlugin builds the plugin that fails by script.
var faultyPlugin = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "trustd-faulty-")
	if err != nil {
		return "", err
	}
	faultyDir = dir
	path := filepath.Join(dir, "faulty")
	cmd := exec.Command("go", "build", "-o", path, "github.com/trustd/trustd/plugins/faulty")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building the faulty plugin: %w: %s", err, out)
	}
	return path, nil
})

// withFaulty completes options that have Faulty backends.
func withFaulty(t *testing.T, o lab.Options) lab.Options {
	t.Helper()
	path, err := faultyPlugin()
	if err != nil {
		t.Fatal(err)
	}
	o.Plugin = path
	return o
}

// onFaulty is the backend of a rig that runs in the faulty plugin, over a SoftHSM token of its own.
const onFaulty = "faulty"

// recovery is the target for the time from a device's return to the next signature; bound is what a test allows.
const (
	recovery = time.Second
	bound    = 10 * recovery
)

// A rig is a daemon with load on each of its backends.
type rig struct {
	*lab.Lab
	loads  map[string]*lab.Load // by backend
	others []*lab.Load          // of agents that were replaced
	pid    int
}

func newRig(t *testing.T) *rig {
	t.Helper()
	if _, err := exec.LookPath("tpm2_clear"); err != nil {
		if required() {
			t.Fatal("tpm2-tools are missing")
		}
		t.Skip("tpm2-tools are missing")
	}
	l := start(t, withFaulty(t, lab.Options{
		Proxy: true, Deadline: 2 * time.Second,
		Faulty: []lab.Faulty{{Name: onFaulty, Wraps: "pkcs11", Deadline: 2 * time.Second}},
	}))
	r := &rig{Lab: l, loads: map[string]*lab.Load{}, pid: l.Daemon().Pid()}
	t.Cleanup(r.stop)
	for _, backend := range []string{lab.HSM, onFaulty, lab.TPM} {
		r.load(t, backend, "on-"+backend)
	}
	return r
}

// moderate is the load on each backend: in every way, and not so much that the machine is what is slow.
var moderate = lab.LoadOptions{Pause: 10 * time.Millisecond, Deadline: 8 * time.Second}

// load adds an agent on the backend and puts load on it.
func (r *rig) load(t *testing.T, backend, agent string) {
	t.Helper()
	add(t, r.Lab, agent, "--backend", backend, "--uid", "0")
	ld, err := r.StartLoad(context.Background(), agent, moderate)
	if err != nil {
		t.Fatal(err)
	}
	r.loads[backend] = ld
}

func (r *rig) stop() {
	for _, ld := range r.loads {
		ld.Stop()
	}
	for _, ld := range r.others {
		ld.Stop()
	}
}

// run has the daemon meet one fault, and asserts what must hold.
func (r *rig) run(t *testing.T, s lab.Fault) {
	ctx := t.Context()
	hit := r.loads[s.Backend]
	for backend, ld := range r.loads {
		r.progress(t, backend, 5, ld.Acknowledged)
	}
	failed := map[string]int{}
	for backend, ld := range r.loads {
		failed[backend] = ld.Failed()
	}
	struck := time.Now()
	before := hit.Acknowledged()
	if err := s.Begin(ctx, r.Lab); err != nil {
		t.Fatal(err)
	}
	if s.Unseen { // requests go on, through the fault or around it
		r.progressFrom(t, s.Backend, before+30, hit.Acknowledged)
	} else {
		r.progressFrom(t, s.Backend, failed[s.Backend]+5, hit.Failed)
	}
	for backend, ld := range r.loads { // the others go on meanwhile
		if backend != s.Backend {
			r.progress(t, backend, 5, ld.Acknowledged)
		}
	}
	if s.End != nil {
		if err := s.End(ctx, r.Lab); err != nil {
			t.Fatal(err)
		}
	}
	back := time.Now()
	one := client.New(r.AgentSocket)
	defer one.Close()
	eventuallyWithin(t, "waiting for service after the device's return", bound, func() error {
		_, err := one.SignPacket(ctx, packetFor(hit.Agent))
		return err
	})
	took := time.Since(back)
	r.progress(t, s.Backend, 10, hit.Acknowledged)
	if s.End != nil {
		t.Logf("back %v after the device's return; the target is %v", took.Round(time.Millisecond), recovery)
	}
	t.Logf("well %v after the fault began; %d requests failed: %v", time.Since(struck).Round(time.Millisecond),
		hit.Failed()-failed[s.Backend], hit.Report().Errors)
	for backend, ld := range r.loads {
		rep := ld.Report()
		for _, text := range rep.Broken {
			t.Error(text)
		}
		switch {
		case backend == s.Backend:
			if err := rep.Retryable(); err != nil {
				t.Error(err)
			}
		case ld.Failed() != failed[backend]:
			t.Errorf("the backend %s noticed: %v", backend, rep.Errors)
		}
		if err := ld.Kept(ctx); err != nil {
			t.Error(err)
		}
	}
	select {
	case <-r.Daemon().Done():
		t.Fatal("the daemon ended")
	default:
	}
	if t.Failed() { // the next fault is to be judged by itself
		r.reset(t, s.Backend)
	}
}

// counted waits until the daemon shows failures of the classes of the faults, each on its backend.
func (r *rig) counted(t *testing.T, all []lab.Fault) {
	t.Helper()
	admin := client.NewAdmin(r.AdminSocket)
	defer admin.Close()
	eventuallyWithin(t, "waiting for failures to be counted", bound, func() error {
		for _, s := range all {
			b, err := admin.ShowBackend(t.Context(), s.Backend)
			if err != nil {
				return err
			}
			if s.Class != "" && b.Failures[string(s.Class)] == 0 {
				return fmt.Errorf("%s counts no %s after %q: %v", s.Backend, s.Class, s.Name, b.Failures)
			}
		}
		return nil
	})
}

// reset replaces the load of a backend by a new one.
func (r *rig) reset(t *testing.T, backend string) {
	t.Helper()
	old := r.loads[backend]
	r.others = append(r.others, old)
	old.Stop()
	ld, err := r.StartLoad(context.Background(), old.Agent, moderate)
	if err != nil {
		t.Fatal(err)
	}
	r.loads[backend] = ld
}

// progress waits until n more are counted.
func (r *rig) progress(t *testing.T, backend string, n int, count func() int) {
	t.Helper()
	r.progressFrom(t, backend, count()+n, count)
}

func (r *rig) progressFrom(t *testing.T, backend string, want int, count func() int) {
	t.Helper()
	eventually(t, "waiting for requests on "+backend, func() error {
		if have := count(); have < want {
			return fmt.Errorf("%d of %d, failed: %v", have, want, r.loads[backend].Report().Errors)
		}
		return nil
	})
}

// clear clears the TPM for good: no key is left. What the agent asks fails, its entry stays, other backends never notice,
// and a new agent's key is made on the TPM as it is now.
func (r *rig) clear(t *testing.T) {
	hit := r.loads[lab.TPM]
	if err := r.TPMTool(t.Context(), "tpm2_clear", "-c", "p"); err != nil {
		t.Fatal(err)
	}
	r.progress(t, lab.TPM, 10, hit.Failed)
	eventuallyWithin(t, "waiting for a key on the TPM that was cleared", bound, func() error {
		res := r.Root(t.Context(), nil, "agent", "add", "after-clear", "--backend", lab.TPM, "--uid", "0")
		if res.Code != 0 {
			return errors.New(res.Stderr)
		}
		return nil
	})
	one := client.New(r.AgentSocket)
	defer one.Close()
	eventuallyWithin(t, "waiting for the new key to sign", bound, func() error {
		_, err := one.SignPacket(t.Context(), packetFor("after-clear"))
		return err
	})
	signed := hit.Acknowledged()
	r.progress(t, lab.TPM, 10, hit.Failed)
	if now := hit.Acknowledged(); now != signed {
		t.Errorf("a key that is gone signed %d times", now-signed)
	}
	// The daemon takes the TPM for an emptied one, whose keys may come back, until an operator says otherwise.
	admin := client.NewAdmin(r.AdminSocket)
	defer admin.Close()
	eventuallyWithin(t, "waiting for the TPM to count as emptied", bound, func() error {
		b, err := admin.ShowBackend(t.Context(), lab.TPM)
		if err == nil && (b.Canary == nil || !b.Canary.Gone || b.State == string(signer.Ready)) {
			err = fmt.Errorf("%s, canary %+v", b.State, b.Canary)
		}
		return err
	})
	rep := hit.Report()
	if err := rep.Retryable(fault.KeyGone); err != nil {
		t.Error(err)
	}
	if res := r.Root(t.Context(), nil, "backend", "reset-canary", lab.TPM); res.Code != 0 {
		t.Errorf("reset-canary: exit %d: %s", res.Code, res.Stderr)
	}
	eventuallyWithin(t, "waiting for the key that is gone to be orphaned", bound, func() error {
		if rep := hit.Report(); rep.Errors[fault.KeyOrphaned] == 0 {
			return fmt.Errorf("requests end with %v", rep.Errors)
		}
		return nil
	})
	if b, err := admin.ShowBackend(t.Context(), lab.TPM); err != nil || b.State != string(signer.Ready) {
		t.Errorf("the TPM is %s, %v", b.State, err)
	}
	for _, text := range rep.Broken {
		t.Error(text)
	}
	d, err := admin.ShowAgent(t.Context(), hit.Agent)
	if err != nil || d.Status != "active" || !d.Local {
		t.Errorf("the agent whose key is gone: %+v, %v", d, err)
	}
	for _, backend := range []string{lab.HSM, onFaulty} {
		r.progress(t, backend, 5, r.loads[backend].Acknowledged)
	}
}

func allFaults() []lab.Fault {
	return slices.Concat(lab.ScriptFaults(onFaulty), lab.TokenFaults(), lab.TPMFaults())
}

// strikes runs those of the faults that belong to the size of the test, one after the other, on one daemon.
func strikes(t *testing.T, all []lab.Fault, long bool) {
	r := newRig(t)
	all = slices.DeleteFunc(all, func(s lab.Fault) bool { return s.Long != long })
	for _, s := range all {
		t.Run(s.Name, func(t *testing.T) { r.run(t, s) })
	}
	r.counted(t, all)
	if !long {
		t.Run("TPM2_Clear", r.clear)
	}
	r.stop()
	for backend, ld := range r.loads {
		rep := ld.Report()
		t.Logf("%s: %d asked, %d acknowledged %v, p50 %v, p99 %v, failed %v", backend, rep.Asked, rep.Acknowledged,
			rep.Modes, rep.P50.Round(time.Microsecond), rep.P99.Round(time.Microsecond), rep.Errors)
	}
	if pid := r.Daemon().Pid(); pid != r.pid {
		t.Errorf("the daemon was restarted: %d, then %d", r.pid, pid)
	}
}

// TestBackendFaults is T-DEV-1 and T-DEV-2. It has a daemon under load on three backends meet one fault after the
// other: no wrong signature leaves, nothing that was acknowledged is lost, requests end in success or a retryable error
// in time, service is back by itself, and the other backends never notice.
func TestBackendFaults(t *testing.T) {
	strikes(t, allFaults(), false)
}

// TestLongBackendFaults is the same with a return value of each class at each call that signs.
func TestLongBackendFaults(t *testing.T) {
	long(t)
	strikes(t, allFaults(), true)
}
