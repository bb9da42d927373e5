package plugins_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
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

// builds are the test plugins by their folder, each built once.
var builds sync.Map

// binary returns the path of a test plugin, as a file of the test's own.
func binary(t testing.TB, folder string) string {
	t.Helper()
	once, _ := builds.LoadOrStore(folder, sync.OnceValues(func() ([]byte, error) {
		dir, err := os.MkdirTemp("", "trustd-test-plugin-*")
		if err != nil {
			return nil, err
		}
		defer os.RemoveAll(dir)
		path := filepath.Join(dir, "plugin")
		build := exec.Command("go", "build", "-o", path, "./"+folder)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("%w\n%s", err, out)
		}
		return os.ReadFile(path)
	}))
	text, err := once.(func() ([]byte, error))()
	if err != nil {
		t.Fatalf("building %s: %v", folder, err)
	}
	path := filepath.Join(t.TempDir(), filepath.Base(folder))
	put(t, path, text, 0o755)
	return path
}

func put(t testing.TB, path string, text []byte, mode os.FileMode) {
	t.Helper()
	temp := path + ".new"
	if err := errors.Join(os.WriteFile(temp, text, 0o600), os.Chmod(temp, mode), os.Rename(temp, path)); err != nil {
		t.Fatal(err)
	}
}

// clumsy is the configuration of a clumsy plugin, and the file of its notes.
func clumsy(t testing.TB, do string) (plugins.Config, string) {
	dir := t.TempDir()
	notes := filepath.Join(dir, "notes")
	return plugins.Config{
		Name: "clumsy", Binary: binary(t, "testdata/clumsy"), Deadline: 5 * time.Second,
		Settings: map[string]string{"dir": filepath.Join(dir, "keys"), "notes": notes, "do": do},
	}, notes
}

func count(t testing.TB, notes, what string) int {
	t.Helper()
	text, err := os.ReadFile(notes)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	n := 0
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, what) {
			n++
		}
	}
	return n
}

func state(t testing.TB, h *plugins.Host, want signer.State, problem string) signer.Description {
	t.Helper()
	var d signer.Description
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for limit := time.After(time.Minute); ; {
		d = h.Describe(t.Context())
		if d.State == want && strings.Contains(d.Problem, problem) {
			if want != signer.Ready && d.Remedy == "" {
				t.Errorf("%s without a remedy: %+v", want, d)
			}
			return d
		}
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("never %s (%q): %+v", want, problem, d)
		}
	}
}

// TestGenericPlugin runs the suite on a plugin of the kind that everybody may write.
func TestGenericPlugin(t *testing.T) {
	t.Parallel()
	cfg, _ := clumsy(t, "")
	open := func(t testing.TB) signer.Backend { return start(t, cfg) }
	signertest.Run(t, open, signertest.Reopen(open), signertest.Algorithms(ident.Ed25519, ident.ECDSAP256))
}

// TestVersionSkew starts a plugin of another protocol version, and puts the right one in its place.
func TestVersionSkew(t *testing.T) {
	t.Parallel()
	cfg, _ := clumsy(t, "")
	right, err := os.ReadFile(cfg.Binary)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Binary = binary(t, "testdata/skew")
	h := start(t, cfg)
	want := fmt.Sprintf("speaks version 41 of the plugin protocol and this trustd version %d", plugins.Protocol)
	d := state(t, h, signer.Stopped, want)
	if !strings.Contains(d.Remedy, "one release") {
		t.Errorf("%+v", d)
	}
	if _, err := h.Keys(t.Context()); !errors.Is(err, fault.DeviceDead) {
		t.Errorf("a call: %v", err)
	}
	if n := h.Failures()[signer.ModuleDead]; n != 0 {
		t.Errorf("a plugin that does not fit counts as %d deaths", n)
	}
	put(t, cfg.Binary, right, 0o755)
	state(t, h, signer.Ready, "")
}

func TestInspect(t *testing.T) {
	t.Parallel()
	cfg, _ := clumsy(t, "")
	cfg.Log = slog.New(slog.DiscardHandler)
	info, err := plugins.Inspect(cfg)
	if err != nil || info.Protocol != plugins.Protocol || len(info.SHA256) != 64 || !strings.HasSuffix(info.Package, "clumsy") {
		t.Errorf("%+v, %v", info, err)
	}
	cfg.Binary = binary(t, "testdata/skew")
	if info, err = plugins.Inspect(cfg); err == nil || info.Protocol != 41 || info.SHA256 == "" {
		t.Errorf("%+v, %v", info, err)
	}
	cfg.Binary = "/bin/true"
	if info, err = plugins.Inspect(cfg); err == nil || info.Protocol != 0 || info.SHA256 == "" {
		t.Errorf("%+v, %v", info, err)
	}
	cfg.Binary = filepath.Join(t.TempDir(), "none")
	if info, err = plugins.Inspect(cfg); !errors.Is(err, fault.NotFound) || info.SHA256 != "" {
		t.Errorf("%+v, %v", info, err)
	}
}

// TestCrashLoop has the child die at each start, until the reason goes away.
func TestCrashLoop(t *testing.T) {
	t.Parallel()
	cfg, notes := clumsy(t, "")
	mark := filepath.Join(t.TempDir(), "mark")
	cfg.Settings["crash if"] = mark
	put(t, mark, nil, 0o600)
	h := start(t, cfg)
	d := state(t, h, signer.CrashLoop, "it crashed (SIGSEGV)")
	if !strings.Contains(d.Problem, "times in a row") {
		t.Errorf("%+v", d)
	}
	if n := h.Failures()[signer.ModuleDead]; n < 3 {
		t.Errorf("%d deaths are counted", n)
	}
	eventually(t, "another start", func() bool { return count(t, notes, "opened") > 4 })
	if err := os.Remove(mark); err != nil {
		t.Fatal(err)
	}
	state(t, h, signer.Recovering, "no signature has proved it")
	mustSign(t, generate(t, h), "proof")
	state(t, h, signer.Ready, "")
}

// TestReady has a child that was started again become ready without a signature too.
func TestReady(t *testing.T) {
	t.Parallel()
	cfg, _ := clumsy(t, "")
	h := start(t, cfg)
	state(t, h, signer.Ready, "")
	before := h.Failures()[signer.ModuleDead]
	if err := syscall.Kill(pid(t, h), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	state(t, h, signer.Recovering, "")
	state(t, h, signer.Ready, "")
	if n := h.Failures()[signer.ModuleDead] - before; n != 1 {
		t.Errorf("%d deaths are counted", n)
	}
}

// TestMemory ends a plugin that eats memory, slowly or at once, and nobody else notices.
func TestMemory(t *testing.T) {
	for _, how := range []string{"slowly", "fast"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			cfg, _ := clumsy(t, "")
			cfg.Limits.Memory = 192 << 20
			h := start(t, cfg)
			k := generate(t, h)
			old := pid(t, h)
			if _, err := k.Sign(t.Context(), []byte("eat "+how)); !errors.Is(err, fault.DeviceDead) {
				t.Errorf("the call that eats: %v", err)
			}
			mustSign(t, k, "after")
			if pid(t, h) == old {
				t.Error("the child is the same")
			}
			if n := h.Failures()[signer.ModuleDead]; n != 2 { // the call was repeated once
				t.Errorf("%d deaths are counted", n)
			}
		})
	}
}

// TestLimits reads what the kernel holds the child to.
func TestLimits(t *testing.T) {
	t.Parallel()
	cfg, _ := clumsy(t, "")
	cfg.Limits = plugins.Limits{Memory: 100 << 20, OpenFiles: 77}
	h := start(t, cfg)
	state(t, h, signer.Ready, "")
	proc := "/proc/" + strconv.Itoa(pid(t, h))
	text, err := os.ReadFile(proc + "/limits")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"Max open files            77                   77 ", "Max core file size        0                    0 ",
		"Max data size             478150656            478150656 ",
	} {
		if !strings.Contains(string(text), want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	if adj, err := os.ReadFile(proc + "/oom_score_adj"); err != nil || strings.TrimSpace(string(adj)) != "500" {
		t.Errorf("oom_score_adj is %q, %v", adj, err)
	}
}

// TestNoProcessStays kills a child that has started a process of its own.
func TestNoProcessStays(t *testing.T) {
	t.Parallel()
	cfg, notes := clumsy(t, "")
	h := start(t, cfg)
	k := generate(t, h)
	mustSign(t, k, "fork")
	text, err := os.ReadFile(notes)
	if err != nil {
		t.Fatal(err)
	}
	var child int
	if _, after, ok := strings.Cut(string(text), "child "); !ok {
		t.Fatalf("no child: %s", text)
	} else if _, err := fmt.Sscan(after, &child); err != nil || !alive(child) {
		t.Fatalf("no child: %v", err)
	}
	if err := syscall.Kill(pid(t, h), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the child's child is gone", func() bool { return !alive(child) })
	mustSign(t, k, "after")
}

// TestWrongSignature has the host verify what a plugin did not.
func TestWrongSignature(t *testing.T) {
	t.Parallel()
	cfg, _ := clumsy(t, "")
	h := start(t, cfg)
	k := generate(t, h)
	msgs := [][]byte{[]byte("good"), []byte("corrupt-once"), []byte("corrupt"), nil}
	for i, r := range signer.SignAll(t.Context(), k, msgs) {
		if i == 2 {
			if !errors.Is(r.Err, fault.DeviceDead) || signer.ClassOf(r.Err) != signer.ModuleDead || r.Signature != nil {
				t.Errorf("a wrong signature: %x, %v", r.Signature, r.Err)
			}
		} else if r.Err != nil || signature.Verify(k.Public(), msgs[i], r.Signature) != nil {
			t.Errorf("message %d: %v", i, r.Err)
		}
	}
	if n := h.Failures()[signer.ModuleDead]; n != 3 {
		t.Errorf("%d wrong signatures are counted", n)
	}
}

// TestStanding reads what a backend says of itself, or the boundary of one that says nothing.
func TestStanding(t *testing.T) {
	t.Parallel()
	cfg, _ := clumsy(t, "parallel")
	h := plugins.New(cfg)
	if h.Parallel() != runtime.NumCPU() {
		t.Errorf("before the first start %d at once", h.Parallel())
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	h = start(t, cfg)
	state(t, h, signer.Ready, "")
	if got := h.Failures(); h.Parallel() != 7 || got[signer.SessionLost] != 3 || len(got) != len(signer.Classes()) {
		t.Errorf("%d at once, failures %v", h.Parallel(), got)
	}
	if err := syscall.Kill(pid(t, h), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the counts are added up", func() bool { return h.Failures()[signer.SessionLost] == 6 })
	if got := h.Failures(); h.Parallel() != 7 || got[signer.ModuleDead] != 1 {
		t.Errorf("after a death %d at once, failures %v", h.Parallel(), got)
	}

	cfg, _ = clumsy(t, "")
	h = start(t, cfg)
	k := generate(t, h)
	for range 3 {
		if _, err := k.Sign(t.Context(), []byte("busy")); !errors.Is(err, fault.DeviceBusy) {
			t.Errorf("a busy device: %v", err)
		}
	}
	eventually(t, "the failures are counted", func() bool { return h.Failures()[signer.TransientBusy] == 3 })
	if h.Parallel() != runtime.NumCPU() {
		t.Errorf("%d at once", h.Parallel())
	}
}

// TestSerial gives a later child the serial that the first one reported, and keeps a configured one.
func TestSerial(t *testing.T) {
	t.Parallel()
	for configured, want := range map[string]string{"": "opened 4711", "0815": "opened 0815"} {
		cfg, notes := clumsy(t, "")
		cfg.Settings["reports"], cfg.Settings["serial"] = "4711", configured
		h := start(t, cfg)
		state(t, h, signer.Ready, "")
		if err := syscall.Kill(pid(t, h), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the next child", func() bool { return count(t, notes, "opened") == 2 })
		text, err := os.ReadFile(notes)
		if err != nil || strings.Count(string(text), want) == 0 || !strings.HasSuffix(string(text), want+"\n") {
			t.Errorf("configured %q: %s%v", configured, text, err)
		}
	}
}

// pin is a source whose PIN changes, and which counts how often it is asked.
type pin struct {
	value atomic.Pointer[string]
	asked atomic.Int32
}

func (p *pin) set(s string) { p.value.Store(&s) }

func (p *pin) read(context.Context) ([]byte, error) {
	p.asked.Add(1)
	return []byte(*p.value.Load()), nil
}

// TestUnlock counts the PINs that reach the device: one until an operator acts, whatever callers do and however often
// the child dies, and one for each time that an operator does.
func TestUnlock(t *testing.T) {
	t.Parallel()
	cfg, notes := clumsy(t, "log in")
	var source pin
	source.set("wrong")
	cfg.PIN = source.read
	h := start(t, cfg)
	pins := func() int { return count(t, notes, "pin") }
	hammer := func() {
		t.Helper()
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for range 8 {
					if _, err := h.Generate(t.Context(), "id", ident.Ed25519); !errors.Is(err, fault.AuthorisationRefused) {
						t.Errorf("with a refused PIN: %v", err)
					}
					if d := h.Describe(t.Context()); d.State != signer.Locked || d.Remedy == "" {
						t.Errorf("%+v", d)
					}
				}
			})
		}
		wg.Wait()
	}
	hammer()
	old := pid(t, h)
	if err := syscall.Kill(old, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the child is gone", func() bool { return h.Describe(t.Context()).Limits["plugin_pid"] == "" })
	hammer()
	if pins() != 1 {
		t.Fatalf("%d PINs reached the device", pins())
	}

	if err := h.Unlock(t.Context()); !errors.Is(err, fault.AuthorisationRefused) {
		t.Errorf("unlocking with a wrong PIN: %v", err)
	}
	hammer()
	if pins() != 2 {
		t.Fatalf("%d PINs reached the device after one unlock", pins())
	}
	// Several operators at once share the attempt, while the child lives. One that comes after it is an attempt more.
	var wg sync.WaitGroup
	source.set("wrong too")
	for range 4 {
		wg.Go(func() {
			if err := h.Unlock(t.Context()); !errors.Is(err, fault.AuthorisationRefused) {
				t.Errorf("unlocking with a wrong PIN: %v", err)
			}
		})
	}
	wg.Wait()
	if n := pins(); n < 3 || n > 6 || n != int(source.asked.Load()) {
		t.Fatalf("%d PINs reached the device, %d were read", n, source.asked.Load())
	}
	before := pins()
	source.set("right")
	if err := h.Unlock(t.Context()); err != nil {
		t.Fatal(err)
	}
	mustSign(t, generate(t, h), "unlocked")
	state(t, h, signer.Ready, "")
	if got := pins() - before; got < 1 { // the clumsy plugin shows it at each probe
		t.Errorf("%d PINs", got)
	}
	if err := h.Unlock(t.Context()); err != nil {
		t.Errorf("unlocking what is not locked: %v", err)
	}
}

// TestLastTry has a backend that spares the last try take it for an operator.
func TestLastTry(t *testing.T) {
	t.Parallel()
	cfg, notes := clumsy(t, "last try")
	var source pin
	source.set("right")
	cfg.PIN = source.read
	h := start(t, cfg)
	state(t, h, signer.Locked, "")
	if n := count(t, notes, "pin"); n != 0 {
		t.Fatalf("%d PINs reached the device by themselves", n)
	}
	if err := h.Unlock(t.Context()); err != nil {
		t.Error(err)
	}
	if n := count(t, notes, "pin"); n != 1 {
		t.Errorf("%d PINs reached the device", n)
	}
	mustSign(t, generate(t, h), "unlocked")
}

// TestDiesWithPIN has the plugin die while the device has a PIN of which nobody knows whether it is right: that is not
// tried again and again.
func TestDiesWithPIN(t *testing.T) {
	t.Parallel()
	cfg, notes := clumsy(t, "die with the PIN")
	var source pin
	source.set("wrong")
	cfg.PIN = source.read
	h := start(t, cfg)
	state(t, h, signer.Locked, "")
	if n := count(t, notes, "pin"); n != 2 {
		t.Errorf("%d PINs reached the device", n)
	}
	if err := h.Unlock(t.Context()); !errors.Is(err, fault.AuthorisationRefused) {
		t.Errorf("unlocking: %v", err)
	}
	if n := count(t, notes, "pin"); n != 3 {
		t.Errorf("%d PINs reached the device after an unlock", n)
	}
	source.set("right")
	if err := h.Unlock(t.Context()); err != nil {
		t.Errorf("unlocking with the right PIN: %v", err)
	}
	mustSign(t, generate(t, h), "unlocked")
}

// logged runs a plugin until its log holds want, and returns how often each line stands there.
func logged(t *testing.T, do, want string) map[string]int {
	t.Helper()
	cfg, _ := clumsy(t, do)
	var mu sync.Mutex
	var text bytes.Buffer
	cfg.Log = slog.New(slog.NewJSONHandler(&locked{&mu, &text}, nil))
	h := start(t, cfg)
	state(t, h, signer.Ready, "")
	if want != "" {
		eventually(t, want, func() bool {
			mu.Lock()
			defer mu.Unlock()
			return strings.Contains(text.String(), want)
		})
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	seen := map[string]int{}
	for line := range strings.Lines(text.String()) {
		var m map[string]any
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		seen[fmt.Sprint(m["level"], " ", m["msg"], " ", m["text"])]++
		if m["backend"] != "clumsy" || strings.Count(line, "\"level\"") != 1 || strings.Contains(line, "timestamp") {
			t.Errorf("a line of another form: %s", line)
		}
		if m["msg"] == "by the log" && (m["colour"] != "green" || m["plugin_time"] != "mine" || m["@level"] != nil) {
			t.Errorf("attributes are missing: %s", line)
		}
	}
	return seen
}

// TestLogs looks at what of a plugin's output stands in the daemon's log.
func TestLogs(t *testing.T) {
	t.Parallel()
	seen := logged(t, "talk", "by the run time")
	for want, n := range map[string]int{
		"WARN by the log <nil>": 1, "INFO plugin output by the module [2J": 1, "INFO plugin output by the module's printf": 1,
		"INFO plugin output by the run time": 1, "INFO in detail <nil>": 0,
	} {
		if seen[want] != n {
			t.Errorf("%q stands there %d times, not %d", want, seen[want], n)
		}
	}
	seen = logged(t, "flood", "")
	if n := seen["INFO plugin output again and again"]; n == 0 || n > 400 {
		t.Errorf("what was written 5000 times stands there %d times", n)
	}
	if n := seen["WARN the plugin writes too much; lines were left out <nil>"]; n == 0 {
		t.Error("the log does not say that lines are missing")
	}
}

type locked struct {
	mu *sync.Mutex
	w  *bytes.Buffer
}

func (l *locked) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

// TestDev takes a binary as it is, over restarts.
func TestDev(t *testing.T) {
	t.Parallel()
	cfg, _ := clumsy(t, "")
	cfg.Dev = true
	h := start(t, cfg)
	k := generate(t, h)
	text, err := os.ReadFile(cfg.Binary)
	if err != nil {
		t.Fatal(err)
	}
	put(t, cfg.Binary, append(text, 0), 0o755)
	if err := syscall.Kill(pid(t, h), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	mustSign(t, k, "with another binary")
}

// TestAbsentPIN: a PIN that cannot be read stops the backend with a reason, costs callers no wait and the host no haste,
// and the PIN is taken once it is there.
func TestAbsentPIN(t *testing.T) {
	t.Parallel()
	cfg, _ := clumsy(t, "log in")
	var there atomic.Bool
	var asked atomic.Int64
	cfg.PIN = func(context.Context) ([]byte, error) {
		asked.Add(1)
		if there.Load() {
			return []byte("right"), nil
		}
		return nil, fault.New(fault.Unavailable, "the file of a secret cannot be opened")
	}
	h := start(t, cfg)
	eventually(t, "the backend stops", func() bool {
		d := h.Describe(t.Context())
		return d.State == signer.Stopped && strings.Contains(d.Problem, "cannot be opened") && strings.Contains(d.Remedy, "PIN source")
	})
	for range 100 {
		if _, err := h.Keys(t.Context()); fault.CodeOf(err) != fault.Unavailable {
			t.Fatalf("without a PIN: %v", err)
		}
	}
	if n := asked.Load(); n > 10 {
		t.Errorf("the PIN was asked for %d times", n)
	}
	there.Store(true)
	eventually(t, "the PIN is taken", func() bool { return h.Describe(t.Context()).State == signer.Ready })
}
