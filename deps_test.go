package trustd_test

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"strings"
	"testing"
)

const module = "github.com/trustd/trustd/"

// layers lists our packages from the top of the house to the bottom: a package may import packages of lower layers,
// and the folders below its own.
var layers = [][]string{
	{"cmd/trustd", "softhsm-test/demo", "softhsm-test/bench", "softhsm-test/e2e", "softhsm-test/soak", "packaging"},
	{"internal/daemon", "softhsm-test/lab"},
	{"internal/service"},
	{"plugins/pkcs11", "plugins/faulty", "internal/config", "softhsm-test"},
	{"api/server", "plugins", "signer/tpm", "signer/soft", "signer/monitor", "registry/journal", "internal/keyring", "client"},
	{"caller", "internal/secret", "internal/keyfile", "signer/pkcs11", "signer/history", "signer/batch", "spend", "internal/tpmdev"},
	{"api", "verify", "signer/signertest", "softhsm-test/tpmproxy"},
	{"view"},
	{"registry"},
	{"packet", "signer"},
	{"internal/pyjson", "internal/jcs", "internal/merkle", "internal/durable", "internal/clock", "signature"},
	{"ident"},
	{"fault"},
}

type pkg struct {
	ImportPath string
	Imports    []string
	Deps       []string
	Standard   bool
}

func list(t *testing.T, args ...string) []pkg {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Imports,Deps,Standard"}, args...)...)
	out, err := cmd.Output()
	if err != nil {
		var x *exec.ExitError
		if errors.As(err, &x) {
			t.Fatalf("go list: %s", x.Stderr)
		}
		t.Fatal(err)
	}
	var all []pkg
	dec := json.NewDecoder(strings.NewReader(string(out)))
	for {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

// TestImportsPointDown keeps the layout: no package imports one that stands above it.
func TestImportsPointDown(t *testing.T) {
	level := map[string]int{}
	for i, names := range layers {
		for _, n := range names {
			level[n] = i
		}
	}
	seen := map[string]bool{}
	for _, p := range list(t, "./...") {
		from, ours := strings.CutPrefix(p.ImportPath, module)
		if !ours {
			continue
		}
		seen[from] = true
		lf, known := place(level, from)
		if !known {
			t.Errorf("%s has no place in layers", from)
			continue
		}
		for _, imp := range p.Imports {
			to, ours := strings.CutPrefix(imp, module)
			if !ours {
				continue
			}
			lt, known := place(level, to)
			if !known {
				t.Errorf("%s has no place in layers", to)
			} else if under(from, to) || under(to, from) {
				continue
			} else if lt < lf || lt == lf {
				t.Errorf("%s imports %s, which is not below it", from, to)
			}
		}
	}
	for n := range level {
		if !seen[n] {
			t.Errorf("layers names %s, which does not exist", n)
		}
	}
}

// place returns the layer of a package: its own, or that of the nearest folder above it.
func place(level map[string]int, name string) (int, bool) {
	for {
		if l, ok := level[name]; ok {
			return l, true
		}
		i := strings.LastIndexByte(name, '/')
		if i < 0 {
			return 0, false
		}
		name = name[:i]
	}
}

func under(a, b string) bool { return strings.HasPrefix(a, b+"/") }

// owners says which of our packages may import a third-party module directly. One need, one library, one importer.
var owners = map[string][]string{
	"github.com/miekg/pkcs11":                 {"signer/pkcs11"},
	"github.com/google/go-tpm":                {"signer/tpm", "internal/tpmdev"},
	"github.com/hashicorp/go-plugin":          {"plugins"},
	"github.com/hashicorp/go-hclog":           {"plugins"},
	"google.golang.org/grpc":                  {"plugins"},
	"google.golang.org/protobuf":              {"plugins"},
	"github.com/spf13/cobra":                  {"cmd/trustd"},
	"github.com/pelletier/go-toml":            {"internal/config"},
	"github.com/gowebpki/jcs":                 {"internal/jcs"},
	"github.com/go-jose/go-jose":              {"internal/keyfile"},
	"github.com/youmark/pkcs8":                {"internal/keyfile"},
	"github.com/hashicorp/go-immutable-radix": {"registry"},
	"golang.org/x/mod":                        {"internal/merkle"},
	"github.com/coreos/go-systemd":            {"internal/daemon"},
	"golang.org/x/time":                       {"caller"},
	"github.com/prometheus/client_golang":     {"api/server", "internal/daemon", "internal/service"},
	"golang.org/x/term":                       {"cmd/trustd"},
	"golang.org/x/sync":                       nil, // the standard library's waiting room
	"golang.org/x/sys":                        nil,
	"golang.org/x/crypto":                     {"internal/keyfile", "signer/soft"},
}

// TestOneImporterPerLibrary keeps third-party code behind one door each.
func TestOneImporterPerLibrary(t *testing.T) {
	for _, p := range list(t, "./...") {
		from, ours := strings.CutPrefix(p.ImportPath, module)
		if !ours {
			continue
		}
		for _, imp := range p.Imports {
			if !strings.Contains(strings.Split(imp, "/")[0], ".") || strings.HasPrefix(imp, module) {
				continue
			}
			allowed, known := false, false
			for mod, who := range owners {
				if imp != mod && !strings.HasPrefix(imp, mod+"/") {
					continue
				}
				known, allowed = true, who == nil
				for _, w := range who {
					allowed = allowed || from == w || under(from, w)
				}
			}
			switch {
			case !known:
				t.Errorf("%s imports %s, which has no owner", from, imp)
			case !allowed:
				t.Errorf("%s imports %s, which is another package's to import", from, imp)
			}
		}
	}
}

// TestPurePackages keeps time, randomness and I/O out of the packages that decide.
func TestPurePackages(t *testing.T) {
	pure := []string{"./fault", "./ident", "./signature", "./packet", "./registry", "./view", "./verify", "./internal/pyjson"}
	banned := map[string]bool{"os": true, "net": true, "net/http": true, "crypto/rand": true, "os/exec": true, "syscall": true}
	for _, p := range list(t, pure...) {
		for _, imp := range p.Imports {
			if banned[imp] {
				t.Errorf("%s imports %s", p.ImportPath, imp)
			}
		}
	}
}

// TestClientIsStandardLibrary keeps what agents import free of third-party code.
func TestClientIsStandardLibrary(t *testing.T) {
	for _, p := range list(t, "./client", "./api", "./fault") {
		for _, d := range p.Deps {
			if strings.Contains(strings.Split(d, "/")[0], ".") && !strings.HasPrefix(d, module) && !strings.HasPrefix(d, "vendor/") {
				t.Errorf("%s depends on %s", p.ImportPath, d)
			}
		}
	}
}

// TestDaemonIsFreeOfC keeps the daemon a static binary: the only package with C in it is the PKCS#11 plugin's.
func TestDaemonIsFreeOfC(t *testing.T) {
	for _, p := range list(t, "./cmd/trustd") {
		for _, d := range p.Deps {
			if d == "github.com/miekg/pkcs11" || d == module+"signer/pkcs11" {
				t.Errorf("%s depends on %s", p.ImportPath, d)
			}
		}
	}
}
