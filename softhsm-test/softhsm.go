// Package softhsmtest boots SoftHSM tokens in temporary folders, for tests and benchmarks. It needs no cgo.
package softhsmtest

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// A Token is an initialised SoftHSM token in a folder of its own.
type Token struct {
	Module   string // path of the PKCS#11 module
	ConfPath string // value of SOFTHSM2_CONF
	Dir      string // where the token's files are
	Label    string
	Serial   string
	PINFile  string // mode 0600
	pin      []byte
}

// EnvConf is the environment variable that names SoftHSM's configuration. The module reads it when it is initialised.
const EnvConf = "SOFTHSM2_CONF"

// modulePaths are where distributions put SoftHSM.
var modulePaths = []string{
	"/usr/lib/softhsm/libsofthsm2.so",
	"/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
	"/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
	"/usr/lib64/pkcs11/libsofthsm2.so",
	"/usr/local/lib/softhsm/libsofthsm2.so",
}

// New boots a token. Where SoftHSM is not installed the test is skipped, or fails when Required.
func New(t testing.TB) *Token {
	t.Helper()
	tool := Tool(t, "softhsm2-util")
	module := ""
	for _, p := range modulePaths {
		if _, err := os.Stat(p); err == nil {
			module = p
			break
		}
	}
	if module == "" {
		Missing(t, "libsofthsm2.so")
	}
	dir := t.TempDir()
	k := &Token{
		Module: module, ConfPath: filepath.Join(dir, "softhsm2.conf"), Dir: filepath.Join(dir, "tokens"),
		Label: "trustd-test-" + random(t, 4), PINFile: filepath.Join(dir, "pin"), pin: []byte(random(t, 8)),
	}
	if err := os.Mkdir(k.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	conf := "directories.tokendir = " + k.Dir +
		"\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n"
	write(t, k.ConfPath, []byte(conf))
	write(t, k.PINFile, append(bytes.Clone(k.pin), '\n'))
	k.util(t, tool, "--init-token", "--free", "--label", k.Label, "--pin", string(k.pin), "--so-pin", random(t, 8))
	k.Serial = k.serial(t, tool)
	return k
}

// PIN returns a copy of the PIN.
func (k *Token) PIN() []byte { return bytes.Clone(k.pin) }

// Env returns the environment that a process needs to find the token.
func (k *Token) Env() map[string]string { return map[string]string{EnvConf: k.ConfPath} }

// Vanish takes the token's files away until the returned function puts them back.
func (k *Token) Vanish(t testing.TB) (restore func()) {
	t.Helper()
	away := k.Dir + ".away"
	if err := os.Rename(k.Dir, away); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(k.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		if err := os.RemoveAll(k.Dir); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(away, k.Dir); err != nil {
			t.Fatal(err)
		}
	}
}

var serialLine = regexp.MustCompile(`(?m)^\s*Serial number:\s*(\S+)`)

func (k *Token) serial(t testing.TB, tool string) string {
	out := k.util(t, tool, "--show-slots")
	for slot := range strings.SplitSeq(out, "\nSlot ") {
		if strings.Contains(slot, k.Label) {
			if m := serialLine.FindStringSubmatch(slot); m != nil {
				return m[1]
			}
		}
	}
	t.Fatal("softhsm2-util shows no serial number for the new token")
	return ""
}

func (k *Token) util(t testing.TB, tool string, args ...string) string {
	t.Helper()
	cmd := exec.Command(tool, args...)
	cmd.Env = append(os.Environ(), EnvConf+"="+k.ConfPath)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("softhsm2-util %s: %v\n%s", args[0], err, out)
	}
	return string(out)
}

// Tool returns the path of a program; where there is none the test is skipped, or fails when Required.
func Tool(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		Missing(t, name)
	}
	return path
}

// Required reports whether a missing device emulator fails a test, as it does on CI, instead of skipping it.
func Required() bool { return os.Getenv("CI") != "" || os.Getenv("TRUSTD_REQUIRE_HSM") == "1" }

// Missing ends a test that needs something that is not installed.
func Missing(t testing.TB, what string) {
	t.Helper()
	if Required() {
		t.Fatalf("%s is not installed; run scripts/setup.sh", what)
	}
	t.Skipf("%s is not installed; run scripts/setup.sh", what)
}

// Build compiles a command of this module and returns the binary's path; cgo says whether with a C compiler.
func Build(t testing.TB, pkg string, cgo bool) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), filepath.Base(pkg))
	cmd := exec.Command("go", "build", "-o", bin, "github.com/trustd/trustd/"+pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if cgo {
		cmd.Env = append(os.Environ(), "CGO_ENABLED=1")
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building %s: %v\n%s", pkg, err, out)
	}
	return bin
}

func random(t testing.TB, n int) string {
	b := make([]byte, n)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(b)
}

func write(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}
