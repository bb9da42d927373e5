package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/client"
	"github.com/trustd/trustd/softhsm-test/lab"
)

// TestMissingDevices: what is missing is reported with its remedy, and the rest serves.
func TestMissingDevices(t *testing.T) {
	l := boot(t, lab.Options{NoTPM: true, Extra: `
[[backend]]
name = "laptop"
kind = "soft"

[[backend]]
name = "nolib"
kind = "pkcs11"
module = "/nonexistent/module.so"
token = "x"
pin = { env = "HOME" }

[[backend]]
name = "notoken"
kind = "pkcs11"
module = "/usr/lib/softhsm/libsofthsm2.so"
token = "no such token"
pin = { env = "HOME" }
env = { SOFTHSM2_CONF = "/dev/null" }

[[backend]]
name = "notpm"
kind = "tpm"
device = "swtpm:path=/nonexistent/tpm.sock"
`})
	// With the daemon down, doctor opens the devices itself.
	checkDoctor(t, l, 4, "nolib", "notoken", "notpm") // no key is on them
	if err := l.Start(t.Context(), lab.Options{}); err != nil {
		t.Fatal(err)
	}
	checkDoctor(t, l, 4, "nolib", "notoken", "notpm")
	d := add(t, l, "solo", "--backend", "laptop", "--uid", "0")
	if d.Grade != "software" {
		t.Errorf("a soft key has the grade %s", d.Grade)
	}
	if r := l.Root(t.Context(), task(d.Aliases[0]), "sign"); r.Code != 0 {
		t.Errorf("the soft backend does not serve: %s", r.Stderr)
	}
	for _, b := range []string{"nolib", "notoken", "notpm"} {
		if r := l.Root(t.Context(), nil, "agent", "add", "on-"+b, "--backend", b, "--algorithm", "ecdsa-p256"); r.Code == 0 {
			t.Errorf("a key was made on %s", b)
		}
	}
	if r := l.Root(t.Context(), nil, "agent", "list", "-o", "json"); strings.Contains(r.Stdout, "on-no") {
		t.Errorf("a failed agent was left behind: %s", r.Stdout)
	}
}

// checkDoctor demands that doctor ends with this code and names these backends, on which no key is where that code stands
// for warnings.
func checkDoctor(t *testing.T, l *lab.Lab, exit int, broken ...string) {
	t.Helper()
	status := "failure"
	if exit == 4 {
		status = "warning"
	}
	r := l.Root(t.Context(), nil, "doctor", "-o", "json")
	if r.Code != exit {
		t.Errorf("doctor: exit %d, want %d: %s%s", r.Code, exit, r.Stdout, r.Stderr)
	}
	var report struct{ Checks []api.HealthCheck }
	if err := json.Unmarshal([]byte(r.Stdout), &report); err != nil {
		t.Fatal(err)
	}
	for _, b := range broken {
		found := false
		for _, c := range report.Checks {
			if c.Name == "backend "+b {
				found = true
				if c.Status != status || c.Text == "" || c.Remedy == "" {
					t.Errorf("doctor on %s: %+v", b, c)
				}
			}
		}
		if !found {
			t.Errorf("doctor says nothing of %s: %+v", b, report.Checks)
		}
	}
}

// TestWrongPIN is T-PIN-1: a refused PIN stops its backend, is said, and is not tried again.
func TestWrongPIN(t *testing.T) {
	l := boot(t, lab.Options{NoTPM: true})
	pin := filepath.Join(l.Dir, "pin")
	if err := os.WriteFile(pin, []byte("wrong\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := l.Start(t.Context(), lab.Options{}); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		r := l.Root(t.Context(), nil, "agent", "add", "solo", "-o", "json")
		if r.Code == 0 || !strings.Contains(r.Stderr, "authorisation_refused") {
			t.Fatalf("exit %d: %s", r.Code, r.Stderr)
		}
	}
	checkDoctor(t, l, 1, "hsm")
	if log := l.Log(); strings.Contains(log, "wrong\n") || strings.Contains(log, "pin=") {
		t.Error("the log speaks of the PIN")
	}
}

// TestReadablePIN: a secret that others can read is refused.
func TestReadablePIN(t *testing.T) {
	l := boot(t, lab.Options{NoTPM: true})
	if err := os.Chmod(filepath.Join(l.Dir, "pin"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := l.Start(t.Context(), lab.Options{}); err != nil {
		t.Fatal(err)
	}
	r := l.Root(t.Context(), nil, "agent", "add", "solo", "-o", "json")
	if r.Code == 0 || !strings.Contains(r.Stderr, "insecure_secret") {
		t.Errorf("exit %d: %s", r.Code, r.Stderr)
	}
	checkDoctor(t, l, 1, "hsm")
}

// TestSocketActivation takes both sockets from a service manager and tells it when it is ready and when it stops.
func TestSocketActivation(t *testing.T) {
	l := boot(t, lab.Options{NoTPM: true})
	dir := t.TempDir()
	notices, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer notices.Close()
	cmd := exec.Command("sh", "-c", `LISTEN_PID=$$ exec "$0" serve --config "$1"`, filepath.Join(l.Dir, "trustd"), l.Config)
	cmd.Env = append(os.Environ(), "LISTEN_FDS=2", "LISTEN_FDNAMES=agent:admin", "NOTIFY_SOCKET="+filepath.Join(dir, "notify"))
	var paths []string
	for _, name := range []string{"agent", "admin"} {
		path := filepath.Join(dir, name)
		sock, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		defer sock.Close()
		f, err := sock.File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
		paths = append(paths, path)
	}
	var log strings.Builder
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill() }()
	expect := func(want string) {
		t.Helper()
		buf := make([]byte, 256)
		n, err := notices.Read(buf)
		if err != nil || string(buf[:n]) != want {
			t.Fatalf("notice %q, %v; want %q\n%s", buf[:n], err, want, log.String())
		}
	}
	expect("READY=1")
	if _, err := client.New(paths[0]).Whoami(t.Context(), false); err != nil {
		t.Error(err)
	}
	if _, err := client.NewAdmin(paths[1]).ListAgents(t.Context()); err != nil {
		t.Error(err)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	expect("STOPPING=1")
	if err := cmd.Wait(); err != nil {
		t.Errorf("the daemon ended with %v\n%s", err, log.String())
	}
}

// TestGracefulStop: requests in flight when the daemon is told to stop are finished.
func TestGracefulStop(t *testing.T) {
	l := start(t, lab.Options{NoTPM: true})
	d := add(t, l, "solo", "--uid", "0")
	// A request whose body is still on its way is in flight.
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", l.AgentSocket)
	}}
	body, send := io.Pipe()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://trustd/v1/packets/sign", body)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	type answer struct {
		status int
		err    error
	}
	answers := make(chan answer, 1)
	go func() {
		r, err := transport.RoundTrip(req)
		if err != nil {
			answers <- answer{0, err}
			return
		}
		defer r.Body.Close()
		_, err = io.Copy(io.Discard, r.Body)
		answers <- answer{r.StatusCode, err}
	}()
	text := `{"agent":"solo","packet":` + string(task(d.Aliases[0])) + `}`
	if _, err := io.WriteString(send, text[:20]); err != nil {
		t.Fatal(err)
	}
	inFlight := func() error {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://trustd/metrics", nil)
		if err != nil {
			return err
		}
		resp, err := transport.RoundTrip(r)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(b)) {
			if strings.Contains(line, "in_flight") && strings.Contains(line, "packets/sign\"") && strings.HasSuffix(strings.TrimSpace(line), " 1") {
				return nil
			}
		}
		return errors.New("the request is not in flight yet")
	}
	eventually(t, "waiting for the request to arrive", inFlight)
	daemon := l.Daemon()
	if err := syscall.Kill(daemon.Pid(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	eventually(t, "waiting for the daemon to refuse new connections", func() error {
		c, err := net.Dial("unix", l.AgentSocket)
		if err != nil {
			return nil
		}
		c.Close()
		return errors.New("it still accepts")
	})
	if _, err := io.WriteString(send, text[20:]); err != nil {
		t.Fatal(err)
	}
	send.Close()
	if a := <-answers; a.err != nil || a.status != http.StatusOK {
		t.Errorf("the request in flight ended with %d, %v", a.status, a.err)
	}
	<-daemon.Done()
	if _, err := os.Stat(l.AgentSocket); err == nil {
		t.Error("the socket was left behind")
	}
}

// TestPinnedCluster is T-DISK-3: with its cluster id in the configuration the daemon takes no other registry.
func TestPinnedCluster(t *testing.T) {
	l := start(t, lab.Options{NoTPM: true})
	caps, err := client.New(l.AgentSocket).Capabilities(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Stop(); err != nil {
		t.Fatal(err)
	}
	conf, err := os.ReadFile(l.Config)
	if err != nil {
		t.Fatal(err)
	}
	pin := func(id string) {
		t.Helper()
		if err := os.WriteFile(l.Config, append([]byte("cluster_id = \""+id+"\"\n"), conf...), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	pin("sha256:" + strings.Repeat("0", 64))
	if r := l.Root(t.Context(), nil, "serve"); r.Code == 0 || !strings.Contains(r.Stderr, "cluster_id") {
		t.Errorf("another authority's registry was taken: exit %d: %s", r.Code, r.Stderr)
	}
	pin(caps.ClusterID)
	if err := l.Start(t.Context(), lab.Options{}); err != nil {
		t.Error(err)
	}
}

// TestSocketModes is T-SOCK-5.
func TestSocketModes(t *testing.T) {
	l := start(t, lab.Options{NoTPM: true})
	for path, want := range map[string]os.FileMode{l.AgentSocket: 0o666, l.AdminSocket: 0o600} {
		fi, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if fi.Mode().Perm() != want {
			t.Errorf("%s has mode %o, want %o", filepath.Base(path), fi.Mode().Perm(), want)
		}
	}
	var open []string
	err := filepath.Walk(filepath.Join(l.Dir, "state"), func(path string, fi os.FileInfo, err error) error {
		if err == nil && fi.Mode().Perm()&0o077 != 0 {
			open = append(open, fmt.Sprintf("%s %o", path, fi.Mode().Perm()))
		}
		return err
	})
	if err != nil || len(open) != 0 {
		t.Errorf("state that others can reach: %v %v", open, err)
	}
}
