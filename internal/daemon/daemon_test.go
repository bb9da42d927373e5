package daemon_test

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/client"
	"github.com/trustd/trustd/internal/config"
	"github.com/trustd/trustd/internal/daemon"
)

// newConfig returns the configuration of a daemon on software keys, with a genesis record.
func newConfig(t *testing.T) *config.Config {
	t.Helper()
	c := config.Default()
	dir, err := os.MkdirTemp("", "trustd-") // the path of a socket must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	c.StateDir, c.RunDir = filepath.Join(dir, "state"), filepath.Join(dir, "run")
	c.Backends = []config.Backend{{Name: "laptop", Kind: config.Soft}}
	_, err = daemon.Init(t.Context(), c, slog.New(slog.DiscardHandler), daemon.InitOptions{
		Origin: "test.example", Operator: "operator", Node: "node.test", Backend: "laptop",
		OperatorUIDs: []uint32{uint32(os.Getuid())},
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// serve runs the daemon and returns a client of it and what stops it.
func serve(t *testing.T, c *config.Config) (admin *client.Admin, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() {
		done <- daemon.Run(ctx, c, daemon.Options{
			Version: "test", Log: slog.New(slog.DiscardHandler), Ready: func() { close(ready) },
		})
	}()
	select {
	case <-ready:
	case err := <-done:
		t.Fatal(err)
	}
	a := client.NewAdmin(c.AdminSocketPath())
	return a, func() {
		a.Close()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func check(checks []api.HealthCheck, name string) api.HealthCheck {
	i := slices.IndexFunc(checks, func(c api.HealthCheck) bool { return c.Name == name })
	if i < 0 {
		return api.HealthCheck{}
	}
	return checks[i]
}

// eventually polls until a condition holds.
func eventually(t *testing.T, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-ctx.Done():
			t.Fatal("it never came true")
		case <-tick.C:
		}
	}
}

func metrics(t *testing.T, socket string) string {
	t.Helper()
	h := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	defer h.CloseIdleConnections()
	resp, err := h.Get("http://trustd/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestDoctorAndMetrics: with the daemon up and down, all say of an emptied device what is wrong and what to do.
func TestDoctorAndMetrics(t *testing.T) {
	c := newConfig(t)
	down := daemon.Diagnose(t.Context(), c)
	if b := check(down, "backend laptop"); b.Status != daemon.OK {
		t.Errorf("before the first start: %+v", b)
	}
	admin, stop := serve(t, c)
	var b api.Backend
	eventually(t, func() bool {
		var err error
		if b, err = admin.ShowBackend(t.Context(), "laptop"); err != nil {
			t.Fatal(err)
		}
		return b.State == "ready" && b.Canary != nil && b.Canary.KeyID != ""
	})
	text := metrics(t, c.AdminSocketPath())
	for _, want := range []string{
		`trustd_backend_state{backend="laptop",state="ready"} 1`, `trustd_backend_state{backend="laptop",state="locked"} 0`,
		`trustd_backend_canaries_total{backend="laptop",result="ok"} 1`,
		`trustd_backend_signatures_total{backend="laptop",mode="direct"} `,
		`trustd_backend_failures_total{backend="laptop",class="token_lost"} 0`,
		`trustd_backend_waiting_requests{backend="laptop"} 0`,
		`trustd_backend_last_signature_timestamp_seconds{backend="laptop"} `, `trustd_alerts{kind="canary_gone"} 0`,
		`trustd_alerts{kind="key_orphaned"} 0`, "trustd_agents 2\n", "trustd_keys 2\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the metrics do not show %s", want)
		}
	}
	stop()

	files, err := filepath.Glob(filepath.Join(c.StateDir, "soft", "laptop", b.Canary.KeyID+"*"))
	if err != nil || len(files) != 1 {
		t.Fatalf("the canary key's file: %v %v", files, err)
	}
	if err := os.Remove(files[0]); err != nil {
		t.Fatal(err)
	}
	down = daemon.Diagnose(t.Context(), c)
	admin, stop = serve(t, c)
	defer func() { stop() }()
	eventually(t, func() bool {
		b, err := admin.ShowBackend(t.Context(), "laptop")
		return err == nil && b.State == "degraded"
	})
	h, err := admin.Health(t.Context())
	if err != nil || h.Ready {
		t.Errorf("ready: %v", err)
	}
	if text := metrics(t, c.AdminSocketPath()); !strings.Contains(text, `trustd_alerts{kind="canary_gone"} 1`) {
		t.Error("the metrics do not show that the canary key is gone")
	}
	for name, checks := range map[string][]api.HealthCheck{"down": down, "up": h.Checks} {
		now := check(checks, "backend laptop")
		if now.Status != daemon.Failure || !strings.Contains(now.Text, "canary key") ||
			!strings.Contains(now.Remedy, "reset-canary laptop") {
			t.Errorf("with the daemon %s: %+v", name, now)
		}
	}
}

// TestDoctorOnKeys: with the daemon down too, a key that is not where or as it should be is said.
func TestDoctorOnKeys(t *testing.T) {
	c := newConfig(t)
	c.Keys.MinGrade = "hardware-claimed"
	low := check(daemon.Diagnose(t.Context(), c), "grade too low")
	if low.Status != daemon.Failure || !strings.Contains(low.Text, "2 keys: ") || low.Remedy == "" {
		t.Errorf("%+v", low)
	}
	c.Keys.MinGrade, c.Backends[0].Name = "", "renamed"
	checks := daemon.Diagnose(t.Context(), c)
	if missing := check(checks, "backend missing"); missing.Status != daemon.Failure || missing.Remedy == "" {
		t.Errorf("%+v", missing)
	}
	c.Backends = []config.Backend{
		{Name: "laptop", Kind: config.Soft}, {Name: "chip", Kind: config.TPM, Device: "swtpm:path=/nonexistent"},
	}
	chip := check(daemon.Diagnose(t.Context(), c), "backend chip")
	if chip.Status != daemon.Warning || !strings.HasPrefix(chip.Text, "degraded: ") {
		t.Errorf("a backend that nobody uses: %+v", chip)
	}
}
