package service_test

import (
	"cmp"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/service"
	"github.com/trustd/trustd/signer"
)

// watch runs the monitors until the test or the host ends.
func (h *host) watch() {
	h.t.Helper()
	h.watchAs("ready")
}

// watchAs does so where the backend is to be in another state.
func (h *host) watchAs(state string) {
	h.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	svc := h.svc
	go func() {
		defer close(done)
		if err := svc.Watch(ctx); err != nil {
			h.t.Error(err)
		}
	}()
	before := h.close
	h.close = func() {
		cancel()
		<-done
		if err := svc.Close(); err != nil {
			h.t.Error(err)
		}
		before()
	}
	h.wants(state)
}

// reopen starts the daemon anew.
func (h *host) reopen() {
	h.t.Helper()
	h.close()
	h.open()
	h.watch()
}

func (h *host) backendNow() api.Backend {
	h.t.Helper()
	b, err := h.svc.ShowBackend(h.ctx(), cmp.Or(h.name, "laptop"))
	if err != nil {
		h.t.Fatal(err)
	}
	return b
}

// wants polls until the backend is in a state.
func (h *host) wants(state string) {
	h.t.Helper()
	eventually(h.t, func() bool { b := h.backendNow(); return b.Canary != nil && b.State == state })
}

// eventually polls until a condition holds.
func eventually(t testing.TB, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-ctx.Done():
			t.Fatal("it never came true")
		case <-tick.C:
		}
	}
}

// sign signs a packet and returns the error.
func (h *host) sign(agent string) error {
	_, err := h.svc.SignPacket(h.ctx(), api.SignPacketRequest{Agent: agent, Packet: draft("agent:x")})
	return err
}

// take takes keys off the device and returns what puts them back.
func (h *host) take(ids ...signer.ID) (restore func()) {
	h.t.Helper()
	kept := map[string][]byte{}
	for _, id := range ids {
		files, err := filepath.Glob(filepath.Join(h.dir, "soft", "*"+id.String()+"*"))
		if err != nil || len(files) != 1 {
			h.t.Fatalf("files of the key: %v %v", files, err)
		}
		data, err := os.ReadFile(files[0])
		if err != nil {
			h.t.Fatal(err)
		}
		kept[files[0]] = data
		if err := os.Remove(files[0]); err != nil {
			h.t.Fatal(err)
		}
	}
	return func() {
		for path, data := range kept {
			if err := os.WriteFile(path, data, 0o600); err != nil {
				h.t.Fatal(err)
			}
		}
	}
}

func (h *host) keyOf(name string) signer.ID {
	h.t.Helper()
	e, ok := h.keyring.Get(id(h.t, name))
	if !ok {
		h.t.Fatalf("no entry of %s", name)
	}
	return e.ID()
}

func (h *host) check(name string) (api.HealthCheck, bool) {
	h.t.Helper()
	r, err := h.svc.Health(h.ctx())
	if err != nil {
		h.t.Fatal(err)
	}
	i := slices.IndexFunc(r.Checks, func(c api.HealthCheck) bool { return c.Name == name })
	if i < 0 {
		return api.HealthCheck{}, false
	}
	return r.Checks[i], true
}

func (h *host) show(name string) api.AgentDetail {
	h.t.Helper()
	d, err := h.svc.ShowAgent(h.ctx(), name)
	if err != nil {
		h.t.Fatal(err)
	}
	return d
}

// TestOrphan: a key that its device lost is refused from then on without asking the device, also after a restart; its
// place is kept, all say so, and only a recheck that sees it sign brings it back.
func TestOrphan(t *testing.T) {
	h := newHost(t)
	h.watch()
	h.add("a")
	h.add("b")
	h.reopen()
	restore := h.take(h.keyOf("a"))
	code(t, h.sign("a"), fault.KeyOrphaned)
	code(t, h.sign("a"), fault.KeyOrphaned)
	if err := h.sign("b"); err != nil {
		t.Errorf("another key: %v", err)
	}
	h.reopen()
	for name, call := range map[string]func() error{
		"packet": func() error { return h.sign("a") },
		"packets": func() error {
			return h.svc.SignPackets(h.ctx(), []api.SignPacketRequest{{Agent: "a", Packet: draft("agent:x")}})[0].Error.Err()
		},
		"message": func() error {
			_, err := h.svc.SignMessage(h.ctx(), api.SignMessageRequest{Agent: "a", Payload: json.RawMessage(`1`)})
			return err
		},
	} {
		if err := call(); fault.CodeOf(err) != fault.KeyOrphaned {
			t.Errorf("%s: %v", name, err)
		}
	}
	d := h.show("a")
	if d.KeyState != "orphaned" || d.KeyURI == "" || !strings.Contains(strings.Join(d.Warnings, "\n"), "recheck") {
		t.Errorf("shown as %+v", d)
	}
	keys, err := h.svc.ListKeys(h.ctx())
	if err != nil {
		t.Fatal(err)
	}
	states := map[string]string{}
	for _, k := range keys {
		states[k.UsedBy] = k.State
	}
	if states["a"] != "orphaned" || states["b"] != "ready" || states[api.UsedByCanary] != "ready" {
		t.Errorf("keys are listed as %v", states)
	}
	if c, ok := h.check("key orphaned"); !ok || c.Status != "failure" || !strings.Contains(c.Text, "a:") || c.Remedy == "" {
		t.Errorf("health says %+v", c)
	}
	if n := h.svc.Figures().Alerts[service.AlertKeyOrphaned]; n != 1 {
		t.Errorf("%d alerts", n)
	}
	_, err = h.svc.RecheckKey(h.ctx(), "a")
	code(t, err, fault.KeyGone)
	restore()
	code(t, h.sign("a"), fault.KeyOrphaned) // nobody has looked
	keys, err = h.svc.ListKeys(h.ctx())
	orphaned := func(k api.Key) bool { return k.UsedBy == "a" && k.State == "orphaned" }
	if err != nil || !slices.ContainsFunc(keys, orphaned) {
		t.Errorf("%v: %+v", err, keys)
	}
	for range 2 { // the second finds nothing to do
		if d, err = h.svc.RecheckKey(h.ctx(), "a"); err != nil || d.KeyState != "ready" {
			t.Fatalf("%+v: %v", d, err)
		}
	}
	if err := h.sign("a"); err != nil {
		t.Errorf("after the recheck: %v", err)
	}
	if _, ok := h.check("key orphaned"); ok {
		t.Error("health still speaks of it")
	}
	_, err = h.svc.RecheckKey(h.ctx(), "ghost")
	code(t, err, fault.NotFound)
}

// TestEmptiedDevice: where the canary key is gone too, it is the device that is missing: no key is marked, and all serve
// again once it is back.
func TestEmptiedDevice(t *testing.T) {
	h := newHost(t)
	h.watch()
	h.add("a")
	h.reopen()
	canary, err := signer.ParseID(h.backendNow().Canary.KeyID)
	if err != nil {
		t.Fatal(err)
	}
	restore := h.take(h.keyOf("a"), canary)
	code(t, h.sign("a"), fault.DeviceLost)
	h.wants("degraded")
	code(t, h.sign("a"), fault.DeviceLost)
	if d := h.show("a"); d.KeyState != "degraded" {
		t.Errorf("shown as %+v", d)
	}
	r, err := h.svc.Health(h.ctx())
	if err != nil || r.Ready {
		t.Errorf("ready without a backend: %v", err)
	}
	if c, _ := h.check("backend laptop"); c.Status != "failure" || !strings.Contains(c.Text, "emptied or replaced") ||
		!strings.Contains(c.Remedy, "reset-canary laptop") {
		t.Errorf("health says %+v", c)
	}
	alerts := h.svc.Figures().Alerts
	if alerts[service.AlertCanaryGone] != 1 || alerts[service.AlertBackendNotReady] != 1 || alerts[service.AlertKeyOrphaned] != 0 {
		t.Errorf("alerts %v", alerts)
	}
	restore()
	h.wants("ready")
	if err := h.sign("a"); err != nil {
		t.Errorf("once it is back: %v", err)
	}
	// This time for good.
	h.take(h.keyOf("a"), canary)
	h.close()
	h.open()
	h.watchAs("degraded")
	b, err := h.svc.ResetCanary(h.ctx(), "laptop")
	if err != nil || b.State != "ready" || b.Canary.Gone {
		t.Fatalf("%+v: %v", b, err)
	}
	if d := h.show("a"); d.KeyState != "orphaned" {
		t.Errorf("after the reset the lost key is shown as %s", d.KeyState)
	}
	code(t, h.sign("a"), fault.KeyOrphaned)
	code(t, h.sign("a"), fault.KeyOrphaned)
}

// TestMinGrade: keys below the grade that the configuration wants are refused before they are made, and those that are
// there raise an alert.
func TestMinGrade(t *testing.T) {
	h := newHost(t)
	h.add("old")
	out, err := h.svc.ExportPrivate(h.ctx(), "old", api.ExportPrivateRequest{Passphrase: "correct horse"})
	if err != nil {
		t.Fatal(err)
	}
	h.minGrade = signer.HardwareClaimed
	h.reopen()
	before := h.keys()
	_, err = h.svc.AddAgent(h.ctx(), api.AddAgentRequest{AgentID: "new"})
	code(t, err, fault.AssuranceTooLow)
	_, err = h.svc.ImportAgent(h.ctx(), api.ImportAgentRequest{AgentID: "in", Private: out.Data, Passphrase: "correct horse"})
	code(t, err, fault.AssuranceTooLow)
	if h.keys() != before {
		t.Errorf("%d keys, want %d", h.keys(), before)
	}
	if err := h.sign("old"); err != nil {
		t.Errorf("a key that is there: %v", err)
	}
	if n := h.svc.Figures().Alerts[service.AlertGradeTooLow]; n != 3 { // with operator and node
		t.Errorf("%d alerts", n)
	}
	if c, _ := h.check("grade too low"); c.Status != "failure" || !strings.Contains(c.Text, "3 keys: ") {
		t.Errorf("health says %+v", c)
	}
	if w := strings.Join(h.show("old").Warnings, "\n"); !strings.Contains(w, "keys.min_grade is hardware-claimed") {
		t.Errorf("warnings: %s", w)
	}
	empty := &host{t: t, dir: t.TempDir(), minGrade: signer.HardwareClaimed}
	empty.open()
	defer func() { empty.close() }()
	err = empty.svc.Found(empty.ctx(), service.Founding{Origin: "o", Operator: id(t, "operator"), Node: id(t, "node.test")})
	code(t, err, fault.AssuranceTooLow)
	if empty.keys() != 0 {
		t.Error("a key was made")
	}
}

// TestWrongBackend: a key whose backend has another name now, or is of another kind, is an alert and not silence.
func TestWrongBackend(t *testing.T) {
	h := newHost(t)
	h.add("a")
	h.name = "renamed"
	h.reopen()
	if n := h.svc.Figures().Alerts[service.AlertBackendMissing]; n != 3 {
		t.Errorf("%d alerts", n)
	}
	if c, _ := h.check("backend missing"); c.Status != "failure" || c.Remedy == "" {
		t.Errorf("health says %+v", c)
	}
	if w := strings.Join(h.show("a").Warnings, "\n"); !strings.Contains(w, "names no backend laptop") {
		t.Errorf("warnings: %s", w)
	}
	code(t, h.sign("a"), fault.Unavailable)
}

// TestKeyAlerts is the table of what can be wrong with one key.
func TestKeyAlerts(t *testing.T) {
	h := newHost(t)
	h.add("a")
	e, _ := h.keyring.Get(id(t, "a"))
	soft := func(described, opened signer.Grade) *service.Holder {
		h := &service.Holder{Kind: "soft", Opened: opened}
		if described != "" {
			h.Described = signer.Description{Kind: "soft", Grade: described, Algorithms: []ident.Algorithm{ident.Ed25519}}
		}
		return h
	}
	plugin := func(kind string) *service.Holder {
		return &service.Holder{Kind: "plugin", Described: signer.Description{Kind: kind}}
	}
	silent := &service.Holder{Kind: "soft", Described: signer.Description{Kind: "soft", Grade: signer.Software}}
	const file, claimed, attested = signer.Software, signer.HardwareClaimed, signer.HardwareAttested
	for _, c := range []struct {
		name       string
		registered signer.Grade
		least      signer.Grade
		holder     *service.Holder
		want       []string
	}{
		{"all is well", file, "", soft("", ""), nil},
		{"nobody asked yet", claimed, claimed, soft("", ""), nil},
		{"on an emulator", claimed, "", soft(file, ""), []string{service.AlertGradeLowered}},
		{"a device that did not answer", claimed, "", silent, nil},
		{"attested on a device that only claims", attested, "", soft(claimed, ""), nil},
		{"attested once", attested, "", soft("", claimed), []string{service.AlertGradeLowered}},
		{"below policy", file, claimed, soft("", ""), []string{service.AlertGradeTooLow}},
		{"below both", claimed, claimed, soft("", file), []string{service.AlertGradeLowered, service.AlertGradeTooLow}},
		{"another kind", file, "", &service.Holder{Kind: "tpm"}, []string{service.AlertKindMismatch}},
		{"a plugin of that kind", file, "", plugin("soft"), nil},
		{"a plugin of another", file, "", plugin("tpm"), []string{service.AlertKindMismatch}},
		{"a plugin that says nothing yet", file, "", plugin(""), nil},
		{"no backend", file, "", nil, []string{service.AlertBackendMissing}},
	} {
		var got []string
		for _, a := range service.KeyAlerts(e, c.registered, c.least, c.holder) {
			if got = append(got, a.Kind); a.Text == "" || a.Remedy == "" || a.Agent != "a" {
				t.Errorf("%s: %+v", c.name, a)
			}
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

// gone is a backend whose device is not there.
type gone struct{ signer.Backend }

func (gone) Describe(context.Context) signer.Description {
	return signer.Description{Kind: "tpm", State: signer.Degraded, Problem: "there is no TPM", Remedy: "load its driver"}
}

func (gone) Generate(context.Context, signer.ID, ident.Algorithm) (signer.Key, error) {
	return nil, fault.New(fault.DeviceLost, "")
}

// TestUnusedBackend: one that is not ready is a warning where no key is on it, and keeps nobody from being ready.
func TestUnusedBackend(t *testing.T) {
	h := newHost(t)
	h.more = []service.Backend{{Backend: gone{}, Name: "chip", Kind: "tpm"}}
	h.reopen()
	c, _ := h.check("backend chip")
	if c.Status != "warning" || !strings.HasPrefix(c.Text, "degraded since ") || !strings.Contains(c.Text, "there is no TPM") ||
		c.Remedy != "load its driver" {
		t.Errorf("health says %+v", c)
	}
	if r, err := h.svc.Health(h.ctx()); err != nil || !r.Ready {
		t.Errorf("not ready: %v", err)
	}
	if n := h.svc.Figures().Alerts[service.AlertBackendNotReady]; n != 0 {
		t.Errorf("%d alerts", n)
	}
	all, err := h.svc.Backends(h.ctx())
	if err != nil || len(all) != 2 || all[0].State != "ready" || all[1].State != "degraded" {
		t.Errorf("%+v: %v", all, err)
	}
	_, err = h.svc.UnlockBackend(h.ctx(), "chip")
	code(t, err, fault.Unsupported)
	_, err = h.svc.UnlockBackend(h.ctx(), "nope")
	code(t, err, fault.NotFound)
	_, err = h.svc.ShowBackend(h.ctx(), "")
	code(t, err, fault.Malformed)
	_, err = h.svc.ResetCanary(h.ctx(), "chip")
	code(t, err, fault.DeviceLost)
	caps, err := h.svc.Capabilities(h.ctx())
	if err != nil || caps.Backends[0].Canary != nil || caps.Backends[0].Failures != nil || caps.Backends[0].Limits != nil {
		t.Errorf("agents are told %+v: %v", caps.Backends, err)
	}
}

// TestCanaryIsNoAgent: the canary key cannot be adopted.
func TestCanaryIsNoAgent(t *testing.T) {
	h := newHost(t)
	h.watch()
	_, err := h.svc.AddAgent(h.ctx(), api.AddAgentRequest{AgentID: "a", KeyURI: "soft:id=" + h.backendNow().Canary.KeyID})
	code(t, err, fault.KeyReused)
}

// TestSetAgent: an operator changes an agent's setting, which counts for requests that do not say, and never for all.
func TestSetAgent(t *testing.T) {
	h := newHost(t)
	d := h.add("a")
	if d.Batching != api.BatchingOnRequest {
		t.Errorf("at first %q", d.Batching)
	}
	mode := func(asked *bool) string {
		r := api.SignPacketRequest{Agent: "a", Packet: draft("agent:x"), Batchable: asked}
		out := h.svc.SignPackets(h.ctx(), []api.SignPacketRequest{r, r})
		if err := out[0].Error.Err(); err != nil {
			t.Fatal(err)
		}
		return out[0].Mode
	}
	for _, c := range []struct{ set, silent, asked, refused string }{
		{api.BatchingOnRequest, "direct", "batched", "direct"},
		{api.BatchingAlways, "batched", "batched", "direct"},
		{api.BatchingNever, "direct", "direct", "direct"},
		{api.BatchingOnRequest, "direct", "batched", "direct"},
	} {
		for range 2 {
			if d, err := h.svc.SetAgent(h.ctx(), "a", api.SetAgentRequest{Batching: c.set}); err != nil || d.Batching != c.set {
				t.Fatalf("%s: %+v, %v", c.set, d, err)
			}
		}
		if s, a, r := mode(nil), mode(ptr(true)), mode(ptr(false)); s != c.silent || a != c.asked || r != c.refused {
			t.Errorf("%s: %s, %s, %s", c.set, s, a, r)
		}
	}
	_, err := h.svc.SetAgent(h.ctx(), "a", api.SetAgentRequest{Batching: "sometimes"})
	code(t, err, fault.Malformed)
	_, err = h.svc.SetAgent(h.ctx(), "operator", api.SetAgentRequest{Batching: api.BatchingAlways})
	code(t, err, fault.Malformed)
	_, err = h.svc.SetAgent(h.ctx(), "ghost", api.SetAgentRequest{})
	code(t, err, fault.NotFound)
}
