package secret_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/secret"
)

func write(t *testing.T, text string, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "pin")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil { // which the umask does not touch
		t.Fatal(err)
	}
	return path
}

func wantCode(t *testing.T, what string, err error, code fault.Code) {
	t.Helper()
	if fault.CodeOf(err) != code {
		t.Errorf("%s: %v, want %s", what, err, code)
	}
}

func TestFile(t *testing.T) {
	for name, c := range map[string]struct {
		content string
		mode    os.FileMode
		want    string
		code    fault.Code
	}{
		"plain":              {"1234", 0o600, "1234", ""},
		"read-only":          {"1234", 0o400, "1234", ""},
		"newline":            {"1234\n", 0o600, "1234", ""},
		"CRLF":               {"1234\r\n", 0o600, "1234", ""},
		"one newline only":   {"1234\n\n", 0o600, "1234\n", ""},
		"spaces stay":        {" 12 34 \n", 0o600, " 12 34 ", ""},
		"binary":             {"\x00\xff\n", 0o600, "\x00\xff", ""},
		"longest":            {strings.Repeat("x", secret.MaxSize), 0o600, strings.Repeat("x", secret.MaxSize), ""},
		"too long":           {strings.Repeat("x", secret.MaxSize+1), 0o600, "", fault.TooLarge},
		"empty":              {"", 0o600, "", fault.Unavailable},
		"only a newline":     {"\n", 0o600, "", fault.Unavailable},
		"readable by group":  {"1234", 0o640, "", fault.InsecureSecret},
		"readable by others": {"1234", 0o604, "", fault.InsecureSecret},
		"writable by others": {"1234", 0o602, "", fault.InsecureSecret},
		"executable":         {"1234", 0o601, "", fault.InsecureSecret},
	} {
		got, err := secret.Source{File: write(t, c.content, c.mode)}.Read(t.Context())
		wantCode(t, name, err, c.code)
		if string(got) != c.want {
			t.Errorf("%s: %q", name, got)
		}
		if err != nil && strings.Contains(err.Error(), "1234") {
			t.Errorf("%s: the error quotes the secret", name)
		}
	}
}

func TestFileKinds(t *testing.T) {
	dir := t.TempDir()
	good := write(t, "1234", 0o600)
	link, dangling, fifo := filepath.Join(dir, "link"), filepath.Join(dir, "dangling"), filepath.Join(dir, "fifo")
	for _, err := range []error{os.Symlink(good, link), os.Symlink("nowhere", dangling), syscall.Mkfifo(fifo, 0o600)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if got, err := (secret.Source{File: link}).Read(t.Context()); err != nil || string(got) != "1234" {
		t.Errorf("a link: %q, %v", got, err)
	}
	if err := os.Chmod(good, 0o644); err != nil {
		t.Fatal(err)
	}
	_, err := secret.Source{File: link}.Read(t.Context())
	wantCode(t, "a link to an open file", err, fault.InsecureSecret)
	for name, path := range map[string]string{"missing": dir + "/no", "dangling": dangling, "folder": dir, "fifo": fifo, "device": "/dev/zero"} {
		_, err := secret.Source{File: path}.Read(t.Context())
		wantCode(t, name, err, fault.Unavailable)
		if err != nil && strings.Contains(err.Error(), path) {
			t.Errorf("%s: the error quotes the path: %v", name, err)
		}
	}
	if os.Geteuid() == 0 {
		path := write(t, "1234", 0o600)
		if err := os.Chown(path, 65534, 65534); err != nil {
			t.Fatal(err)
		}
		_, err := secret.Source{File: path}.Read(t.Context())
		wantCode(t, "another's file", err, fault.InsecureSecret)
	}
}

func TestCredential(t *testing.T) {
	s := secret.Source{Credential: "hsm-pin"}
	t.Setenv("CREDENTIALS_DIRECTORY", "")
	_, err := s.Read(t.Context())
	wantCode(t, "no folder", err, fault.Unavailable)
	dir := t.TempDir()
	t.Setenv("CREDENTIALS_DIRECTORY", dir)
	_, err = s.Read(t.Context())
	wantCode(t, "no such credential", err, fault.Unavailable)
	path := filepath.Join(dir, "hsm-pin")
	if err := os.WriteFile(path, []byte("1234\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for mode, code := range map[os.FileMode]fault.Code{0o400: "", 0o440: "", 0o444: fault.InsecureSecret} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		_, err := s.Read(t.Context())
		wantCode(t, fmt.Sprintf("mode %o", mode), err, code)
	}
}

func TestEnv(t *testing.T) {
	t.Setenv("TRUSTD_TEST_PIN", "1234\n")
	if got, err := (secret.Source{Env: "TRUSTD_TEST_PIN"}).Read(t.Context()); err != nil || string(got) != "1234" {
		t.Errorf("%q, %v", got, err)
	}
	_, err := secret.Source{Env: "TRUSTD_TEST_NO_PIN"}.Read(t.Context())
	wantCode(t, "not set", err, fault.Unavailable)
	t.Setenv("TRUSTD_TEST_PIN", "")
	_, err = secret.Source{Env: "TRUSTD_TEST_PIN"}.Read(t.Context())
	wantCode(t, "empty", err, fault.Unavailable)
}

// pipe returns the descriptor of a pipe's reading end, as a parent would leave it open for the daemon.
func pipe(t *testing.T) (fd int, w *os.File) {
	t.Helper()
	var fds [2]int
	if err := syscall.Pipe(fds[:]); err != nil {
		t.Fatal(err)
	}
	syscall.CloseOnExec(fds[1])
	w = os.NewFile(uintptr(fds[1]), "pipe")
	t.Cleanup(func() { _ = w.Close() })
	defer syscall.Close(fds[0])
	return unused(t, fds[0], unix.F_DUPFD), w
}

var lowest atomic.Int64

// unused gives a descriptor a number that no other test has had: what is read stays with the number.
func unused(t *testing.T, fd, how int) int {
	t.Helper()
	n, err := unix.FcntlInt(uintptr(fd), how, int(200+10*lowest.Add(1)))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestDescriptor(t *testing.T) {
	fd, w := pipe(t)
	if _, err := w.WriteString("1234\n"); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	s := secret.Source{FD: fd}
	var wg sync.WaitGroup
	for range 4 { // a backend that starts anew asks again
		wg.Go(func() {
			got, err := s.Read(context.Background())
			if err != nil || string(got) != "1234" {
				t.Errorf("%q, %v", got, err)
			}
			secret.Zero(got) // which must not change what the next reader gets
		})
	}
	wg.Wait()
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err == nil {
		t.Error("the descriptor is still open")
	}
}

func TestDescriptorThatIsNotOurs(t *testing.T) {
	f, err := os.Open("/dev/null") // close-on-exec, as all that the daemon opens
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd := unused(t, int(f.Fd()), unix.F_DUPFD_CLOEXEC)
	_, err = secret.Source{FD: fd}.Read(t.Context())
	wantCode(t, "a descriptor of the daemon's own", err, fault.Unavailable)
	if err := syscall.Close(fd); err != nil {
		t.Errorf("it was closed: %v", err)
	}
	_, err = secret.Source{FD: 987654}.Read(t.Context())
	wantCode(t, "no such descriptor", err, fault.Unavailable)
}

func TestDescriptorThatBlocks(t *testing.T) {
	fd, w := pipe(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := secret.Source{FD: fd}.Read(ctx)
		done <- err
	}()
	cancel()
	wantCode(t, "canceled", <-done, fault.Canceled)
	if err := w.Close(); err != nil { // ends the reader that stayed behind
		t.Fatal(err)
	}
}

func TestCanceled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := secret.Source{File: write(t, "1234", 0o600)}.Read(ctx)
	wantCode(t, "canceled", err, fault.Canceled)
}

func TestValidate(t *testing.T) {
	for _, s := range []secret.Source{{File: "/etc/pin"}, {FD: 3}, {Credential: "hsm-pin"}, {Env: "HSM_PIN"}, {Env: "_P1"}} {
		if err := s.Validate(); err != nil || s.IsZero() {
			t.Errorf("%v: %v", s, err)
		}
	}
	for _, s := range []secret.Source{
		{}, {File: "/etc/pin", Env: "PIN"}, {FD: 3, Credential: "x"}, {File: "pin"}, {FD: -1}, {FD: 1}, {FD: 2}, {Credential: "../pin"},
		{Credential: ".."}, {Credential: "a\x00"}, {Env: "1PIN"}, {Env: "my pin"}, {Env: "hunter2"}, {Env: "A=B"}, {Env: strings.Repeat("A", 256)},
	} {
		err := s.Validate()
		wantCode(t, s.String(), err, fault.Malformed)
		if _, rerr := s.Read(t.Context()); fault.CodeOf(rerr) != fault.Malformed {
			t.Errorf("%v is read: %v", s, rerr)
		}
		if err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("the error quotes what may be a secret: %v", err)
		}
	}
}

func TestLiteralIsRefused(t *testing.T) {
	var v struct{ PIN secret.Source }
	err := json.Unmarshal([]byte(`{"PIN":"hunter2"}`), &v)
	if err == nil || !strings.Contains(err.Error(), "file") || strings.Contains(err.Error(), "hunter2") || !v.PIN.IsZero() {
		t.Errorf("%v, %v", v, err)
	}
}

func TestSourceMayBeLogged(t *testing.T) {
	var b bytes.Buffer
	log := slog.New(slog.NewTextHandler(&b, nil))
	for s, want := range map[secret.Source]string{
		{File: "/etc/pin"}: "file:/etc/pin", {FD: 7}: "fd:7", {Credential: "c"}: "credential:c", {Env: "PIN"}: "env:PIN", {}: "none",
	} {
		b.Reset()
		log.Info("m", "source", s)
		if s.String() != want || !strings.Contains(b.String(), "source="+want) {
			t.Errorf("%q, %s", s, b.String())
		}
	}
}

func TestZero(t *testing.T) {
	b := []byte("1234")
	secret.Zero(b)
	if !bytes.Equal(b, make([]byte, 4)) {
		t.Error("the secret is still there")
	}
	secret.Zero(nil)
}
