package plugins_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/plugins"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/signertest"
)

// faulty is the path of the plugin that fails on command.
var faulty string

func TestMain(m *testing.M) {
	if os.Getenv("TRUSTD_TEST_PARENT") != "" {
		parent()
		return
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "trustd-faulty-*")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	faulty = filepath.Join(dir, "faulty")
	build := exec.Command("go", "build", "-o", faulty, "./faulty")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building the faulty plugin: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// config is that of a faulty plugin whose keys outlive it.
func config(t testing.TB) plugins.Config {
	return plugins.Config{
		Name: "faulty", Binary: faulty, Kind: "soft", Verified: true,
		Settings: map[string]string{"serial": filepath.Join(t.TempDir(), "keys")},
		PIN:      func(context.Context) ([]byte, error) { return []byte("1234"), nil },
		Deadline: 2 * time.Second, Env: map[string]string{},
	}
}

func start(t testing.TB, cfg plugins.Config) *plugins.Host {
	h := plugins.New(cfg)
	ended := make(chan error, 1)
	go func() { ended <- h.Run(context.Background()) }()
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Errorf("closing: %v", err)
		}
		if err := <-ended; err != nil {
			t.Errorf("running: %v", err)
		}
	})
	return h
}

func generate(t testing.TB, h *plugins.Host) signer.Key {
	t.Helper()
	k, err := h.Generate(t.Context(), "key", ident.Ed25519)
	if err != nil {
		t.Fatal(fault.From(err).Verbose())
	}
	return k
}

func pid(t testing.TB, h *plugins.Host) int {
	t.Helper()
	n, err := strconv.Atoi(h.Describe(t.Context()).Limits["plugin_pid"])
	if err != nil {
		t.Fatalf("no pid: %v", err)
	}
	return n
}

// alive reports whether a process exists and is no zombie.
func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	return rest != "" && rest[0] != 'Z' && rest[0] != 'X'
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for limit := time.After(time.Minute); !ok(); {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("never: %s", what)
		}
	}
}

func mustSign(t testing.TB, k signer.Key, msg string) {
	t.Helper()
	sig, err := k.Sign(t.Context(), []byte(msg))
	if err != nil {
		t.Fatalf("signing: %s", fault.From(err).Verbose())
	}
	if err := signature.Verify(k.Public(), []byte(msg), sig); err != nil {
		t.Fatal(err)
	}
}

func TestConformance(t *testing.T) {
	cfg := config(t)
	signertest.Run(t, func(t testing.TB) signer.Backend { return start(t, cfg) },
		signertest.Reopen(func(t testing.TB) signer.Backend { return start(t, cfg) }))
}

// TestChildFails makes the child fail in each way during a call. The call ends with a signature or a retryable
// error, and the next one works in another child.
func TestChildFails(t *testing.T) {
	for _, how := range []string{"crash", "exit", "hang", "freeze", "crash-once"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			h := start(t, config(t))
			k := generate(t, h)
			before := pid(t, h)
			msg := how
			if how == "crash-once" {
				msg += " " + filepath.Join(t.TempDir(), "mark")
			}
			sig, err := k.Sign(t.Context(), []byte(msg))
			if how == "crash-once" {
				if err != nil || signature.Verify(k.Public(), []byte(msg), sig) != nil {
					t.Errorf("the call was not repeated in the next child: %v", err)
				}
			} else if !errors.Is(err, fault.DeviceDead) || !fault.CodeOf(err).Retryable() {
				t.Errorf("the call that killed two children: %v", err)
			}
			mustSign(t, k, "after")
			if pid(t, h) == before {
				t.Error("the child is the same")
			}
			eventually(t, "the old child is gone", func() bool { return !alive(before) })
		})
	}
}

// TestSizes signs messages on both sides of what fits into a packet, alone and in one batch.
func TestSizes(t *testing.T) {
	h := start(t, config(t))
	k := generate(t, h)
	var batch [][]byte
	for _, n := range []int{0, 1, 16 << 10, 64<<10 - 1, 64 << 10, 64<<10 + 1, 256 << 10, 5 << 20} {
		msg := bytes.Repeat([]byte("m"), n)
		mustSign(t, k, string(msg))
		batch = append(batch, msg)
	}
	for range 500 {
		batch = append(batch, []byte("small"))
	}
	for i, r := range signer.SignAll(t.Context(), k, batch) {
		if r.Err != nil || signature.Verify(k.Public(), batch[i], r.Signature) != nil {
			t.Errorf("entry %d of %d bytes: %v", i, len(batch[i]), r.Err)
		}
	}
	if _, err := k.Sign(t.Context(), make([]byte, 16<<20+1)); !errors.Is(err, fault.TooLarge) {
		t.Errorf("beyond the limit: %v", err)
	}
	if got := signer.SignAll(t.Context(), k, nil); len(got) != 0 {
		t.Errorf("an empty batch gives %v", got)
	}
}

// TestInnocentsSurvive kills the child while many sign: each call gets a signature.
func TestInnocentsSurvive(t *testing.T) {
	h := start(t, config(t))
	k := generate(t, h)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	signed := make([]int, 8)
	for g := range signed {
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				msgs := [][]byte{fmt.Appendf(nil, "%d/%d", g, i), []byte("slow 1ms")}
				for n, r := range signer.SignAll(t.Context(), k, msgs) {
					if r.Err != nil && !fault.CodeOf(r.Err).Retryable() {
						t.Errorf("not retryable: %v", fault.From(r.Err).Verbose())
					} else if r.Err == nil && signature.Verify(k.Public(), msgs[n], r.Signature) != nil {
						t.Error("a signature of another message")
					}
				}
				signed[g]++
			}
		})
	}
	for range 3 {
		old := pid(t, h)
		if err := syscall.Kill(old, syscall.SIGKILL); err != nil {
			t.Error(err)
		}
		eventually(t, "another child", func() bool {
			now := h.Describe(t.Context()).Limits["plugin_pid"]
			return now != "" && now != strconv.Itoa(old)
		})
		mustSign(t, k, "next")
	}
	close(stop)
	wg.Wait()
	for g, n := range signed {
		if n == 0 {
			t.Errorf("caller %d never came to its end", g)
		}
	}
}

// TestHangBlocksNobody lets one call hang while others sign, and the hanging call's own context end.
func TestHangBlocksNobody(t *testing.T) {
	cfg := config(t)
	cfg.Deadline = time.Minute
	h := start(t, cfg)
	k := generate(t, h)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := k.Sign(ctx, []byte("hang")); !errors.Is(err, fault.DeadlineExceeded) {
		t.Errorf("the hanging call: %v", err)
	}
	mustSign(t, k, "beside it")
}

func TestGenerateDiesWithTheChild(t *testing.T) {
	h := start(t, config(t))
	if _, err := h.Generate(t.Context(), "crash", ident.Ed25519); !errors.Is(err, fault.DeviceDead) {
		t.Errorf("making a key in a child that dies: %v", err)
	}
	mustSign(t, generate(t, h), "after")
}

// TestClassesCross sends an error of each class across.
func TestClassesCross(t *testing.T) {
	h := start(t, config(t))
	k := generate(t, h)
	for _, class := range []signer.Class{
		signer.TransientBusy, signer.SessionLost, signer.HandleLost, signer.LoginLost, signer.TokenLost, signer.ModuleDead,
		signer.ResourcesExhausted, signer.KeyGone, signer.CallerError, signer.AuthorisationRefused,
	} {
		_, err := k.Sign(t.Context(), []byte("class "+string(class)))
		if fault.CodeOf(err) != class.Code() || signer.ClassOf(err) != class {
			t.Errorf("%s: arrived as %v of class %q", class, err, signer.ClassOf(err))
		}
		if strings.Contains(fault.From(err).Error(), string(class)) && class.Code() != fault.Code(class) {
			t.Errorf("%s: the device's own text is in what callers see: %v", class, err)
		}
	}
}

// TestRefusedPINIsNotTriedAgain counts the PINs that reach a child, over crashes of the child.
func TestRefusedPINIsNotTriedAgain(t *testing.T) {
	cfg := config(t)
	cfg.Settings["module"] = "refuse-pin"
	note := filepath.Join(t.TempDir(), "note")
	cfg.Env["FAULTY_NOTE"] = note
	h := start(t, cfg)
	for range 3 {
		if _, err := h.Generate(t.Context(), "id", ident.Ed25519); !errors.Is(err, fault.AuthorisationRefused) {
			t.Errorf("with a refused PIN: %v", err)
		}
		if d := h.Describe(t.Context()); d.State != signer.Locked || d.Remedy == "" {
			t.Errorf("%+v", d)
		}
	}
	if err := syscall.Kill(pid(t, h), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the host stops", func() bool { return h.Describe(t.Context()).Limits["plugin_pid"] == "" })
	if _, err := h.Generate(t.Context(), "id", ident.Ed25519); !errors.Is(err, fault.AuthorisationRefused) {
		t.Errorf("after the crash: %v", err)
	}
	if d := h.Describe(t.Context()); d.State != signer.Locked || d.Remedy == "" {
		t.Errorf("after the crash: %+v", d)
	}
	text, err := os.ReadFile(note)
	if err != nil || strings.Count(string(text), "\n") != 1 {
		t.Errorf("PINs tried:\n%s%v", text, err)
	}
}

// TestBinary covers what can be wrong with the binary, and that the host gets over what is put right.
func TestBinary(t *testing.T) {
	text, err := os.ReadFile(faulty)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "plugin")
	put := func(b []byte, mode os.FileMode) {
		t.Helper()
		temp := path + ".new"
		if err := os.WriteFile(temp, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(os.Chmod(temp, mode), os.Rename(temp, path)); err != nil {
			t.Fatal(err)
		}
	}
	cfg := config(t)
	cfg.Binary = path
	h := start(t, cfg)
	says := func(problem string) {
		t.Helper()
		eventually(t, problem, func() bool {
			d := h.Describe(t.Context())
			return d.State == signer.Stopped && strings.Contains(d.Problem, problem) && d.Remedy != ""
		})
		if _, err := h.Keys(t.Context()); !errors.Is(err, fault.DeviceDead) {
			t.Errorf("%s: a call answers %v", problem, err)
		}
	}
	says("not there")
	put(text, 0o777)
	says("changed by every user")
	put(text, 0o755)
	eventually(t, "ready", func() bool { return h.Describe(t.Context()).State == signer.Ready })
	k := generate(t, h)
	mustSign(t, k, "m")

	put(append(text[:len(text):len(text)], 0), 0o755) // an upgrade under a running daemon, or an attack
	if err := syscall.Kill(pid(t, h), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	says("checksum")
	put(text, 0o755)
	eventually(t, "ready again", func() bool { return h.Describe(t.Context()).State == signer.Ready })
	mustSign(t, k, "m")
}

func TestPinnedChecksum(t *testing.T) {
	for sum, problem := range map[string]string{strings.Repeat("00", 32): "pinned", "xyz": "hexadecimal"} {
		cfg := config(t)
		cfg.SHA256 = sum
		h := start(t, cfg)
		eventually(t, problem, func() bool {
			d := h.Describe(t.Context())
			return d.State == signer.Stopped && strings.Contains(d.Problem, problem) && d.Remedy != ""
		})
	}
}

// TestStartFails covers children that never shake hands.
func TestStartFails(t *testing.T) {
	for _, how := range []string{"exit", "noise"} {
		t.Run(how, func(t *testing.T) {
			cfg := config(t)
			cfg.Env["FAULTY_START"] = how
			h := start(t, cfg)
			eventually(t, "a crash loop", func() bool {
				d := h.Describe(t.Context())
				return d.State == signer.CrashLoop && d.Remedy != "" && strings.Contains(d.Problem, "times in a row")
			})
		})
	}
}

func TestPINSource(t *testing.T) {
	cfg := config(t)
	var mu sync.Mutex
	broken := errors.New("no such file")
	cfg.PIN = func(context.Context) ([]byte, error) {
		mu.Lock()
		defer mu.Unlock()
		return []byte("1234"), broken
	}
	h := start(t, cfg)
	eventually(t, "stopped", func() bool { return h.Describe(t.Context()).State == signer.Stopped })
	if _, err := h.Keys(t.Context()); !errors.Is(err, fault.AuthorisationRefused) {
		t.Errorf("without a PIN: %v", err)
	}
	mu.Lock()
	broken = nil
	mu.Unlock()
	eventually(t, "ready", func() bool { return h.Describe(t.Context()).State == signer.Ready })
}

// TestHygiene looks at what of the daemon the child can see.
func TestHygiene(t *testing.T) {
	t.Setenv("LISTEN_FDS", "1")
	t.Setenv("NOTIFY_SOCKET", "/run/notify")
	t.Setenv("SECRET_OF_THE_DAEMON", "swordfish")
	cfg := config(t)
	cfg.Env["FOR_THE_MODULE"] = "yes"
	cfg.Env["PLUGIN_UNIX_SOCKET_DIR"] = "/tmp"
	h := start(t, cfg)
	k := generate(t, h)
	environ, err := k.Sign(t.Context(), []byte("environ"))
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]string{}
	for line := range strings.SplitSeq(string(environ), "\n") {
		name, value, _ := strings.Cut(line, "=")
		seen[name] = value
	}
	for _, name := range []string{"LISTEN_FDS", "NOTIFY_SOCKET", "SECRET_OF_THE_DAEMON", "PATH", "HOME"} {
		if _, ok := seen[name]; ok {
			t.Errorf("the child sees %s", name)
		}
	}
	if seen["FOR_THE_MODULE"] != "yes" {
		t.Error("the child does not see what the module needs")
	}
	dir := seen["PLUGIN_UNIX_SOCKET_DIR"]
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 || dir == "/tmp" {
		t.Errorf("the socket's folder: %q, %v, %v", dir, info, err)
	}
	proc := fmt.Sprintf("/proc/%d/", pid(t, h))
	for _, file := range []string{"cmdline", "environ"} {
		if text, err := os.ReadFile(proc + file); err != nil || strings.Contains(string(text), "1234") {
			t.Errorf("%s: %q, %v", file, text, err)
		}
	}
	if target, err := os.Readlink(proc + "fd/0"); err != nil || target != os.DevNull {
		t.Errorf("standard input is %q, %v", target, err)
	}
	if name, err := os.ReadFile(proc + "comm"); err != nil || strings.TrimSpace(string(name)) != "faulty" {
		t.Errorf("the child's name is %q, %v", name, err)
	}
	limits, err := os.ReadFile(proc + "limits")
	if err != nil || !strings.Contains(string(limits), "Max core file size        0") {
		t.Errorf("core dumps: %v", err)
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket's folder is still there: %v", err)
	}
}

func TestLongSocketDir(t *testing.T) {
	cfg := config(t)
	cfg.SocketDir = filepath.Join(t.TempDir(), strings.Repeat("d", 120))
	if err := os.Mkdir(cfg.SocketDir, 0o700); err != nil {
		t.Fatal(err)
	}
	mustSign(t, generate(t, start(t, cfg)), "m")
}

// TestCloseLeavesNothing checks that the child goes with Close, and with the end of Run's context.
func TestCloseLeavesNothing(t *testing.T) {
	h := start(t, config(t))
	k := generate(t, h)
	n := pid(t, h)
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	if alive(n) {
		t.Error("the child outlives Close")
	}
	if _, err := k.Sign(t.Context(), []byte("m")); err == nil {
		t.Error("a closed backend signs")
	}

	h = plugins.New(config(t))
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- h.Run(ctx) }()
	k = generate(t, h)
	n = pid(t, h)
	slow := make(chan error, 1)
	go func() { _, err := k.Sign(context.Background(), []byte("slow 200ms")); slow <- err }()
	eventually(t, "the slow call is under way", func() bool { return h.Calls() > 0 })
	cancel()
	if err := <-ended; err != nil || alive(n) {
		t.Errorf("Run returned %v; child alive: %v", err, alive(n))
	}
	if err := <-slow; err != nil {
		t.Errorf("what was in flight: %v", err)
	}
	if err := h.Close(); err != nil {
		t.Error(err)
	}
}

// TestChildDiesWithItsParent kills the host's process without any chance to clean up.
func TestChildDiesWithItsParent(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	dir := t.TempDir() // also of the socket, which nobody is left to remove
	cmd.Env = append(os.Environ(), "TMPDIR="+dir, "TRUSTD_TEST_PARENT="+faulty,
		"TRUSTD_TEST_KEYS="+filepath.Join(dir, "keys"))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var child int
	if _, err := fmt.Fscan(out, &child); err != nil || !alive(child) {
		t.Fatalf("the parent has no child: %v", err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	eventually(t, "the child died with its parent", func() bool { return !alive(child) })
}

// parent is the process that TestChildDiesWithItsParent kills: it prints its child's pid and waits.
func parent() {
	h := plugins.New(plugins.Config{
		Binary: os.Getenv("TRUSTD_TEST_PARENT"), Settings: map[string]string{"serial": os.Getenv("TRUSTD_TEST_KEYS")},
		PIN: func(context.Context) ([]byte, error) { return []byte("1234"), nil },
	})
	go func() { _ = h.Run(context.Background()) }()
	fmt.Println(h.Describe(context.Background()).Limits["plugin_pid"])
	select {}
}
