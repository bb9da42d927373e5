package main

import (
	"bytes"
	"context"
	"encoding/json"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/api/server"
	"github.com/trustd/trustd/api/server/servertest"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/clock"
)

// A fleet is a daemon whose backends are in every state.
type fleet struct {
	*servertest.Memory

	mu    sync.Mutex
	asked []string
}

var noon = time.Date(2026, 3, 8, 12, 0, 0, 0, time.UTC)

func (f *fleet) Backends(context.Context) ([]api.Backend, error) {
	at := func(d time.Duration) *time.Time { t := noon.Add(d); return &t }
	return []api.Backend{
		{Name: "hsm", Kind: "pkcs11", Device: "demo (serial 1)", Default: true, State: "ready", Since: at(0),
			Grade: "hardware-claimed", Algorithms: []string{"ed25519", "ecdsa-p256"}, Limits: map[string]string{"sessions": "2", "pin": "ok"},
			LastSignature: at(time.Minute), Waiting: 3, Failures: map[string]int64{"token_lost": 2, "transient_busy": 1},
			Restarts: 1, Mechanisms: []string{"CKM_EDDSA"},
			Signatures: &api.SignatureCounts{Direct: 7, Batches: 2, Batched: 90},
			Canary:     &api.Canary{KeyID: "00ff", Signed: 5, Failed: 1, Took: 1500}},
		{Name: "chip", Kind: "tpm", Device: "device:/dev/tpmrm0", State: "locked", Since: at(time.Second), Problem: "refused",
			Remedy: "Unlock it.", Canary: &api.Canary{}},
		{Name: "old", Kind: "soft", Device: "files", State: "degraded", Since: at(2 * time.Second), Problem: "emptied",
			Canary: &api.Canary{KeyID: "01", Gone: true}},
	}, nil
}

func (f *fleet) ShowBackend(ctx context.Context, name string) (api.Backend, error) {
	all, err := f.Backends(ctx)
	for _, b := range all {
		if b.Name == name {
			return b, err
		}
	}
	return api.Backend{}, fault.New(fault.NotFound, "no backend has that name")
}

func (f *fleet) ask(what string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked = append(f.asked, what)
}

func (f *fleet) UnlockBackend(ctx context.Context, name string) (api.Backend, error) {
	f.ask("unlock " + name)
	if name == "chip" {
		return api.Backend{}, fault.New(fault.AuthorisationRefused, "")
	}
	return f.ShowBackend(ctx, name)
}

func (f *fleet) ResetCanary(ctx context.Context, name string) (api.Backend, error) {
	f.ask("reset-canary " + name)
	return f.ShowBackend(ctx, name)
}

// onSocket runs a command line against the daemon and returns what it prints.
func onSocket(t *testing.T, socket string, line ...string) (code int, out, errs string) {
	t.Helper()
	var o, e bytes.Buffer
	code = run(t.Context(), append(line, "--admin-socket", socket), stdio{strings.NewReader(""), &o, &e})
	return code, o.String(), e.String()
}

func newFleet(t *testing.T) (*fleet, string) {
	t.Helper()
	f := &fleet{Memory: servertest.NewMemory(clock.System())}
	servertest.MustAdd(t, f, "planner")
	return f, servertest.Start(t, server.Config{Agent: f, Admin: f}).Path
}

func TestBackendTables(t *testing.T) {
	_, socket := newFleet(t)
	for _, c := range []struct {
		line string
		code int
		want string
	}{
		{"backend list", exitOK, `
BACKEND  KIND    STATE     SINCE                 LAST SIGNATURE        FAILURES  WAITING  DEVICE
hsm      pkcs11  ready     2026-03-08T12:00:00Z  2026-03-08T12:01:00Z  3         3        demo (serial 1)
chip     tpm     locked    2026-03-08T12:00:01Z  -                     0         0        device:/dev/tpmrm0
old      soft    degraded  2026-03-08T12:00:02Z  -                     0         0        files
`},
		{"backend show hsm", exitOK, `
backend                  hsm
kind                     pkcs11
device                   demo (serial 1)
default                  true
state                    ready since 2026-03-08T12:00:00Z
grade                    hardware-claimed
algorithms               ed25519 ecdsa-p256
last signature           2026-03-08T12:01:00Z
waiting                  3
signatures               7 direct, 2 batched of 90 messages
restarts                 1
failures transient_busy  1
failures token_lost      2
canary                   5 signed, 1 failed, the last in 1.5ms
canary key               00ff
limit pin                ok
limit sessions           2
mechanisms  CKM_EDDSA
`},
		{"backend show chip", exitOK, `
backend   chip
kind      tpm
device    device:/dev/tpmrm0
default   false
state     locked since 2026-03-08T12:00:01Z
problem   refused
remedy    Unlock it.
waiting   0
restarts  0
canary    not made yet
`},
		{"backend reset-canary old", exitOK, `
backend     old
kind        soft
device      files
default     false
state       degraded since 2026-03-08T12:00:02Z
problem     emptied
waiting     0
restarts    0
canary      gone from the device
canary key  01
`},
		{"backend show nope", exitNotFound, "\n"},
		{"backend unlock chip", exitError, "\n"},
		{"backend unlock", exitUsage, "\n"},
		{"agent set planner", exitUsage, "\n"},
		{"agent set planner --batching sometimes", exitError, "\n"},
		{"key recheck nobody", exitNotFound, "\n"},
	} {
		code, out, errs := onSocket(t, socket, strings.Fields(c.line)...)
		if code != c.code || out != c.want[1:] {
			t.Errorf("%s: exit %d\n%s%s\nwant exit %d\n%s", c.line, code, out, errs, c.code, c.want[1:])
		}
		if (errs == "") != (code == exitOK) {
			t.Errorf("%s: exit %d says %q", c.line, code, errs)
		}
	}
}

// TestBackendJSON: each command prints the object that the socket gives.
func TestBackendJSON(t *testing.T) {
	f, socket := newFleet(t)
	for _, line := range []string{"backend show hsm", "backend unlock hsm", "backend reset-canary hsm"} {
		var b api.Backend
		code, out, errs := onSocket(t, socket, append(strings.Fields(line), "-o", "json")...)
		err := json.Unmarshal([]byte(out), &b)
		if code != exitOK || err != nil || b.Name != "hsm" || b.Failures["token_lost"] != 2 || b.Canary == nil {
			t.Errorf("%s: exit %d, %v: %s%s", line, code, err, out, errs)
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if got := strings.Join(f.asked, ", "); got != "unlock hsm, reset-canary hsm" {
		t.Errorf("the daemon was asked %s", got)
	}
	var all []api.Backend
	code, out, _ := onSocket(t, socket, "backend", "list", "-o", "json")
	if code != exitOK || json.Unmarshal([]byte(out), &all) != nil || len(all) != 3 {
		t.Errorf("backend list: exit %d: %s", code, out)
	}
	for _, line := range []string{"agent set planner --batching never", "key recheck planner"} {
		var d api.AgentDetail
		code, out, errs := onSocket(t, socket, append(strings.Fields(line), "-o", "json")...)
		err := json.Unmarshal([]byte(out), &d)
		if code != exitOK || err != nil || d.AgentID != "planner" || d.Batching != "never" {
			t.Errorf("%s: exit %d, %v: %s%s", line, code, err, out, errs)
		}
	}
	code, out, _ = onSocket(t, socket, "agent", "show", "planner")
	if code != exitOK || !strings.Contains(out, "\nbatching ") {
		t.Errorf("agent show: exit %d: %s", code, out)
	}
}
