// Package e2e runs the real binaries against a real SoftHSM token and a real swtpm, as real Unix users.
package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/client"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/softhsm-test/lab"
)

// The Unix users of the tests; they need no entry in the user database.
const (
	alice = 64111
	bob   = 64112
)

var binaries = sync.OnceValues(func() (string, error) {
	if dir := os.Getenv("TRUSTD_BIN"); dir != "" {
		if _, err := os.Stat(filepath.Join(dir, "trustd")); err == nil {
			return dir, nil
		}
	}
	dir, err := os.MkdirTemp("", "trustd-bin-")
	if err != nil {
		return "", err
	}
	for name, pkg := range map[string]string{"trustd": "cmd/trustd", "trustd-pkcs11": "plugins/pkcs11"} {
		cmd := exec.Command("go", "build", "-o", filepath.Join(dir, name), "github.com/trustd/trustd/"+pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if name == "trustd-pkcs11" {
			cmd.Env = append(os.Environ(), "CGO_ENABLED=1")
		}
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("building %s: %w: %s", name, err, out)
		}
	}
	return dir, nil
})

func required() bool { return os.Getenv("CI") != "" || os.Getenv("TRUSTD_REQUIRE_HSM") != "" }

// start boots a lab with a running daemon, which ends with the test.
func start(t *testing.T, o lab.Options) *lab.Lab {
	t.Helper()
	l := boot(t, o)
	if err := l.Start(t.Context(), lab.Options{}); err != nil {
		t.Fatal(err)
	}
	return l
}

// boot boots a lab without starting its daemon.
func boot(t *testing.T, o lab.Options) *lab.Lab {
	t.Helper()
	for _, tool := range []string{"softhsm2-util", "swtpm"} {
		if _, err := exec.LookPath(tool); err != nil {
			if required() {
				t.Fatalf("%s is missing", tool)
			}
			t.Skipf("%s is missing", tool)
		}
	}
	if os.Getuid() != 0 {
		if required() {
			t.Fatal("these tests act as several users and need root")
		}
		t.Skip("these tests act as several users and need root")
	}
	bin, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	o.Bin = bin
	l, err := lab.New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the daemon's log:\n%s", l.Log())
		}
		if err := l.Close(); err != nil {
			t.Errorf("closing the lab: %v", err)
		}
	})
	return l
}

// add registers an agent and returns it.
func add(t *testing.T, l *lab.Lab, id string, args ...string) api.AgentDetail {
	t.Helper()
	r := l.Root(t.Context(), nil, append([]string{"agent", "add", id, "-o", "json"}, args...)...)
	if r.Code != 0 {
		t.Fatalf("agent add %s: exit %d: %s", id, r.Code, r.Stderr)
	}
	var d api.AgentDetail
	if err := json.Unmarshal([]byte(r.Stdout), &d); err != nil {
		t.Fatal(err)
	}
	return d
}

func task(to string) []byte {
	return fmt.Appendf(nil, `{"task_id":"t-1","to_agent":%q,"intent":"read","permissions":{"allowed_actions":["read"]},"risk_level":"read"}`, to)
}

// eventually polls until fn returns nil.
func eventually(t *testing.T, what string, fn func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := fn()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s: %v", what, err)
		case <-tick.C:
		}
	}
}

func TestDemo(t *testing.T) {
	boot(t, lab.Options{NoTPM: true}) // for its preconditions
	bin, _ := binaries()
	tmp, err := os.MkdirTemp("", "trustd-demo-") // other users must reach it, as they cannot t.TempDir
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(tmp) })
	prog := filepath.Join(tmp, "demo")
	if out, err := exec.Command("go", "build", "-o", prog, "github.com/trustd/trustd/softhsm-test/demo").CombinedOutput(); err != nil {
		t.Fatalf("building the demonstration: %v: %s", err, out)
	}
	work := filepath.Join(tmp, "work")
	if err := os.Mkdir(work, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(prog, "-bin", bin)
	cmd.Env = append(os.Environ(), "TMPDIR="+work)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"invalid_signature", "replay_detected", "expired", "wrong_audience", "public_key_mismatch", "denied"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("the demonstration does not show %s:\n%s", want, out)
		}
	}
	left, err := os.ReadDir(work)
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

// TestTwoUsers is T-SOCK-1: each user signs as its own agent and as no other.
func TestTwoUsers(t *testing.T) {
	l := start(t, lab.Options{})
	a := add(t, l, "alice", "--uid", fmt.Sprint(alice))
	b := add(t, l, "bob", "--backend", "tpm", "--uid", fmt.Sprint(bob))
	for _, c := range []struct {
		name string
		uid  uint32
		as   string
		exit int
	}{
		{"alice as alice", alice, "alice", 0},
		{"alice by default", alice, "", 0},
		{"alice as bob", alice, "bob", 6},
		{"alice by bob's alias", alice, b.Aliases[0], 6},
		{"bob as bob", bob, "bob", 0},
		{"bob as alice", bob, "alice", 6},
		{"a stranger", 64199, "", 6},
		{"alice as the operator", alice, "operator", 6},
		{"alice as nobody", alice, "nobody", 7},
	} {
		args := []string{"sign"}
		if c.as != "" {
			args = append(args, "--agent", c.as)
		}
		if r := l.As(t.Context(), c.uid, task(a.Aliases[0]), args...); r.Code != c.exit {
			t.Errorf("%s: exit %d, want %d: %s", c.name, r.Code, c.exit, r.Stderr)
		}
	}
	// A nonce belongs to its audience: bob cannot burn what was sent to alice.
	p := l.As(t.Context(), bob, task(a.Aliases[0]), "sign").Stdout
	if r := l.As(t.Context(), bob, []byte(p), "verify"); r.Code != 3 || !strings.Contains(r.Stdout, "wrong_audience") {
		t.Errorf("bob verified a packet for alice: exit %d: %s", r.Code, r.Stdout)
	}
	if r := l.As(t.Context(), alice, []byte(p), "verify"); r.Code != 0 {
		t.Errorf("alice could not verify her packet: exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
	// Nobody but root reaches the admin socket.
	if r := l.As(t.Context(), alice, nil, "agent", "list"); r.Code != 6 {
		t.Errorf("alice on the admin socket: exit %d: %s", r.Code, r.Stdout)
	}
}

// TestExitCodes holds the command line to docs/cli.md.
func TestExitCodes(t *testing.T) {
	l := start(t, lab.Options{NoTPM: true})
	d := add(t, l, "solo", "--uid", "0")
	good := l.Root(t.Context(), task(d.Aliases[0]), "sign").Stdout
	bad := strings.Replace(good, `"intent":"read"`, `"intent":"reed"`, 1)
	message := l.Root(t.Context(), []byte(`{"n":1}`), "sign", "--message").Stdout
	for _, c := range []struct {
		name string
		in   string
		args []string
		exit int
	}{
		{"accept", good, []string{"verify"}, 0},
		{"replay", good, []string{"verify"}, 3},
		{"bad signature", bad, []string{"verify", "--detail"}, 3},
		{"malformed packet", `{"a":1}`, []string{"verify"}, 3},
		{"malformed draft", `{"a":1}`, []string{"sign"}, 1},
		{"ttl against policy", `{"task_id":"t","to_agent":"agent:x","intent":"i","permissions":{"allowed_actions":[]},"risk_level":"write","ttl_seconds":9999}`, []string{"sign"}, 3},
		{"message by the registry", message, []string{"verify"}, 0},
		{"message by its own key", message, []string{"verify", "--mode", "embedded"}, 3},
		{"message by a named key", message, []string{"verify", "--mode", "key", "--key", d.Fingerprint}, 0},
		{"unknown flag", "", []string{"agent", "list", "--nope"}, 2},
		{"unknown command", "", []string{"nope"}, 2},
		{"missing argument", "", []string{"agent", "show"}, 2},
		{"not found", "", []string{"agent", "show", "ghost"}, 7},
		{"no such key", "", []string{"key", "show", "soft:id=00"}, 7},
		{"twice", "", []string{"agent", "add", "solo"}, 1},
		{"ed25519 by name of nothing", "", []string{"agent", "add", "x", "--algorithm", "dsa"}, 1},
		{"unreachable", "", []string{"whoami", "--socket", "/nonexistent.sock"}, 5},
		{"hardware key", "", []string{"agent", "export", "solo", "--private", "--out", filepath.Join(l.Dir, "k"), "--passphrase-file", filepath.Join(l.Dir, "pin")}, 1},
		{"init twice", "", []string{"init"}, 1},
		{"doctor", "", []string{"doctor"}, 4}, // one operator
		{"config", "", []string{"config", "check", l.Config}, 0},
		{"list", "", []string{"agent", "list"}, 0},
		{"keys", "", []string{"key", "list"}, 0},
		{"probe", "", []string{"key", "probe"}, 0},
		{"explain", "", []string{"whoami", "--explain"}, 0},
		{"completion", "", []string{"completion", "bash"}, 0},
		{"version", "", []string{"version", "-o", "json"}, 0},
		{"revoke", "", []string{"agent", "revoke", "solo"}, 0},
		{"sign when revoked", string(task(d.Aliases[0])), []string{"sign", "--agent", "solo"}, 3},
		{"remove", "", []string{"agent", "remove", "solo"}, 0},
	} {
		r := l.Root(t.Context(), []byte(c.in), c.args...)
		if r.Code != c.exit {
			t.Errorf("%s: exit %d, want %d\n%s%s", c.name, r.Code, c.exit, r.Stdout, r.Stderr)
		}
		if r.Code != 0 && r.Stdout == "" && !strings.Contains(r.Stderr, "trustd: ") {
			t.Errorf("%s: an error without a code: %q", c.name, r.Stderr)
		}
	}
}

// TestCurl runs the main job with nothing but curl.
func TestCurl(t *testing.T) {
	l := start(t, lab.Options{NoTPM: true})
	d := add(t, l, "solo", "--uid", "0")
	curl := func(path, body string) string {
		t.Helper()
		args := []string{"-sS", "--fail-with-body", "--unix-socket", l.AgentSocket, "http://trustd" + path}
		if body != "" {
			args = append(args, "-H", "Content-Type: application/json", "-d", body)
		}
		out, err := exec.CommandContext(t.Context(), "curl", args...).CombinedOutput()
		if err != nil {
			t.Fatalf("curl %s: %v: %s", path, err, out)
		}
		return string(out)
	}
	var signed api.SignPacketReply
	if err := json.Unmarshal([]byte(curl("/v1/packets/sign", `{"agent":"solo","packet":`+string(task(d.Aliases[0]))+`}`)), &signed); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"ACCEPT"`, `"replay_detected"`} {
		if got := curl("/v1/packets/verify", `{"packet":`+string(signed.Packet)+`}`); !strings.Contains(got, want) {
			t.Errorf("verify: %s, want %s", got, want)
		}
	}
	for _, path := range []string{"/v1/whoami?explain=1", "/v1/capabilities", "/v1/identities/solo", "/v1/identities/solo/history",
		"/livez", "/readyz", "/metrics", "/openapi.json"} {
		if got := curl(path, ""); got == "" && path != "/livez" {
			t.Errorf("%s says nothing", path)
		}
	}
}

// A load signs and verifies until it is stopped, and notes what was acknowledged and what failed.
type load struct {
	mu       sync.Mutex
	accepted []json.RawMessage // packets whose ACCEPT was acknowledged
	failed   map[fault.Code]int
	fatal    []error // neither success nor a clear retryable error
	done     sync.WaitGroup
	stop     chan struct{}
}

func startLoad(t *testing.T, l *lab.Lab, agent, to string, workers int) *load {
	ld := &load{failed: map[fault.Code]int{}, stop: make(chan struct{})}
	for range workers {
		c := client.New(l.AgentSocket)
		ld.done.Go(func() {
			for {
				select {
				case <-ld.stop:
					return
				default:
				}
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				ld.once(ctx, c, agent, to)
				cancel()
			}
		})
	}
	return ld
}

func (ld *load) once(ctx context.Context, c *client.Client, agent, to string) {
	s, err := c.SignPacket(ctx, api.SignPacketRequest{Agent: agent, Packet: task(to)})
	if err != nil {
		ld.note(err)
		return
	}
	d, err := c.VerifyPacket(ctx, api.VerifyPacketRequest{Packet: s.Packet})
	ld.mu.Lock()
	defer ld.mu.Unlock()
	switch {
	case err != nil:
		ld.noteLocked(err)
	case d.Decision == api.Accept:
		ld.accepted = append(ld.accepted, s.Packet)
	default:
		ld.fatal = append(ld.fatal, fmt.Errorf("an honest packet was refused: %s", d.Reason))
	}
}

func (ld *load) note(err error) {
	ld.mu.Lock()
	defer ld.mu.Unlock()
	ld.noteLocked(err)
}

func (ld *load) noteLocked(err error) {
	code := fault.CodeOf(err)
	ld.failed[code]++
	if !code.Retryable() {
		ld.fatal = append(ld.fatal, err)
	}
}

func (ld *load) count() int {
	ld.mu.Lock()
	defer ld.mu.Unlock()
	return len(ld.accepted)
}

// end stops the load and demands that every request ended in success or a clear retryable error.
func (ld *load) end(t *testing.T) {
	t.Helper()
	close(ld.stop)
	ld.done.Wait()
	t.Logf("%d accepted, failed: %v", len(ld.accepted), ld.failed)
	for i, err := range ld.fatal {
		if i < 5 {
			t.Errorf("neither success nor retryable: %v", err)
		}
	}
}

// progress waits until n more packets were accepted.
func (ld *load) progress(t *testing.T, n int) {
	t.Helper()
	want := ld.count() + n
	eventually(t, "waiting for packets to be accepted", func() error {
		if have := ld.count(); have < want {
			return fmt.Errorf("%d of %d accepted, failed: %v", have, want, ld.failures())
		}
		return nil
	})
}

func (ld *load) failures() string {
	ld.mu.Lock()
	defer ld.mu.Unlock()
	return fmt.Sprint(ld.failed)
}

// TestKillDaemon: what was acknowledged survives kill -9, and no nonce opens again.
func TestKillDaemon(t *testing.T) {
	l := start(t, lab.Options{NoTPM: true})
	d := add(t, l, "solo", "--uid", "0")
	for round := range 3 {
		ld := startLoad(t, l, "solo", d.Aliases[0], 8)
		ld.progress(t, 50)
		name := fmt.Sprintf("extra-%d", round)
		add(t, l, name, "--uid", "0")
		before := history(t, l, "solo")
		l.Kill()
		ld.end(t)
		if err := l.Start(t.Context(), lab.Options{}); err != nil {
			t.Fatal(err)
		}
		c := client.New(l.AgentSocket)
		for _, p := range ld.accepted {
			v, err := c.VerifyPacket(t.Context(), api.VerifyPacketRequest{Packet: p})
			if err != nil {
				t.Fatal(err)
			}
			if v.Reason != fault.ReplayDetected {
				t.Fatalf("round %d: a nonce opened again: %s %s", round, v.Decision, v.Reason)
			}
		}
		if _, err := c.Identity(t.Context(), name); err != nil {
			t.Errorf("round %d: an agent that was acknowledged is gone: %v", round, err)
		}
		if after := history(t, l, "solo"); after.Sequence < before.Sequence || after.Size < before.Size {
			t.Errorf("round %d: the history went back: %+v, then %+v", round, before, after)
		}
	}
}

func history(t *testing.T, l *lab.Lab, agent string) api.History {
	t.Helper()
	h, err := client.New(l.AgentSocket).History(t.Context(), agent)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// child returns the daemon's plugin process.
func child(t *testing.T, l *lab.Lab) int {
	t.Helper()
	var pid int
	eventually(t, "looking for the plugin's process", func() error {
		stats, _ := filepath.Glob("/proc/[0-9]*/stat")
		for _, s := range stats {
			b, err := os.ReadFile(s)
			if err != nil {
				continue
			}
			rest := string(b[strings.LastIndexByte(string(b), ')')+2:])
			var state string
			var ppid int
			if _, err := fmt.Sscan(rest, &state, &ppid); err != nil || ppid != l.Daemon().Pid() || state == "Z" {
				continue
			}
			if _, err := fmt.Sscan(filepath.Base(filepath.Dir(s)), &pid); err == nil {
				return nil
			}
		}
		return errors.New("there is none")
	})
	return pid
}

// TestKillModuleHost is T-DEV-1: the daemon survives its module, and serves again without a restart.
func TestKillModuleHost(t *testing.T) {
	l := start(t, lab.Options{NoTPM: true})
	d := add(t, l, "solo", "--uid", "0")
	daemon := l.Daemon().Pid()
	ld := startLoad(t, l, "solo", d.Aliases[0], 8)
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGSEGV, syscall.SIGKILL} {
		ld.progress(t, 30)
		pid := child(t, l)
		if err := syscall.Kill(pid, sig); err != nil {
			t.Fatal(err)
		}
		eventually(t, "waiting for another plugin process", func() error {
			if child(t, l) == pid {
				return errors.New("it is the old one")
			}
			return nil
		})
	}
	ld.progress(t, 30)
	ld.end(t)
	if l.Daemon().Pid() != daemon {
		t.Error("the daemon was restarted")
	}
}

// TestKillTPM: a TPM that dies and comes back needs no restart of the daemon.
func TestKillTPM(t *testing.T) {
	l := start(t, lab.Options{})
	d := add(t, l, "chip", "--backend", "tpm", "--uid", "0")
	add(t, l, "solo", "--uid", "0")
	ld := startLoad(t, l, "chip", d.Aliases[0], 4)
	for range 2 {
		ld.progress(t, 20)
		l.KillTPM()
		if r := l.Root(t.Context(), task(d.Aliases[0]), "sign", "--agent", "solo"); r.Code != 0 {
			t.Errorf("without its TPM the daemon does not serve the HSM: %s", r.Stderr)
		}
		if err := l.RestartTPM(); err != nil {
			t.Fatal(err)
		}
	}
	ld.progress(t, 20)
	ld.end(t)
}

// TestPluginDiesWithDaemon: kill -9 of the daemon leaves no process that is still logged in to the token.
func TestPluginDiesWithDaemon(t *testing.T) {
	l := start(t, lab.Options{NoTPM: true})
	add(t, l, "solo", "--uid", "0")
	pid := child(t, l)
	l.Kill()
	eventually(t, "waiting for the plugin's end", func() error {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(b), ") Z ") {
			return nil
		}
		return errors.New("it still runs")
	})
}
