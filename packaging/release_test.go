package packaging_test

import (
	"bytes"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const (
	root    = ".."
	version = "v0.0.0-test"
	most    = 25 << 20 // bytes of trustd
)

// TestLongRelease makes a release in a copy of the tree and holds it to what it promises.
func TestLongRelease(t *testing.T) {
	if os.Getenv("TRUSTD_LONG") == "" {
		t.Skip("builds everything twice: set TRUSTD_LONG, or run make test-long")
	}
	tree, other := filepath.Join(t.TempDir(), "tree"), filepath.Join(t.TempDir(), "another", "folder")
	copyTree(t, root, tree)
	copyTree(t, tree, other)
	out := run(t, tree, "scripts/release.sh", version)
	if !strings.Contains(out, "two builds agree") {
		t.Errorf("the script does not say that its builds agree:\n%s", out)
	}
	dist := filepath.Join(tree, "dist")
	t.Run("reproducible", func(t *testing.T) { checkReproducible(t, other, dist) })
	t.Run("sums", func(t *testing.T) { checkSums(t, dist) })
	t.Run("sbom", func(t *testing.T) { checkSBOM(t, tree, dist) })
	t.Run("binaries", func(t *testing.T) { checkBinaries(t, dist) })
	t.Run("systemd", func(t *testing.T) { checkUnits(t, dist) })
}

// copyTree copies what a release is made of, to where no version control is.
func copyTree(t *testing.T, from, to string) {
	t.Helper()
	err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		if d.IsDir() && slices.Contains([]string{".git", ".cache", "bin", "dist"}, rel) {
			return fs.SkipDir
		}
		target := filepath.Join(to, rel)
		if d.IsDir() {
			return os.MkdirAll(target, 0o755)
		}
		if !d.Type().IsRegular() {
			return nil
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(target, b, fi.Mode().Perm())
	})
	if err != nil {
		t.Fatal(err)
	}
}

// run runs a command in a folder and returns what it prints.
func run(t *testing.T, dir, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir = dir
	if strings.Contains(name, "/") && !filepath.IsAbs(name) {
		cmd.Path = filepath.Join(dir, name)
	}
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s%s", name, args, err, out, errs.String())
	}
	return string(out)
}

func sum(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// checkReproducible builds once more in another folder, without the script.
func checkReproducible(t *testing.T, tree, dist string) {
	for name, pkg := range map[string]string{"trustd": "./cmd/trustd", "trustd-pkcs11": "./plugins/pkcs11"} {
		cgo, ldflags := "0", "-s -w -buildid= -X main.version="+version
		if name == "trustd-pkcs11" {
			cgo, ldflags = "1", ldflags+" -extldflags=-Wl,--build-id=none"
		}
		again := filepath.Join(t.TempDir(), name)
		cmd := exec.CommandContext(t.Context(),
			"go", "build", "-trimpath", "-buildvcs=false", "-ldflags", ldflags, "-o", again, pkg)
		cmd.Dir = tree
		cmd.Env = append(os.Environ(), "CGO_ENABLED="+cgo)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("building %s: %v: %s", name, err, out)
		}
		if sum(t, again) != sum(t, filepath.Join(dist, name)) {
			t.Errorf("%s is another one when it is built in another folder", name)
		}
	}
}

func checkSums(t *testing.T, dist string) {
	b, err := os.ReadFile(filepath.Join(dist, "SHA256SUMS"))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for line := range strings.Lines(string(b)) {
		want, name, ok := strings.Cut(strings.TrimSpace(line), "  ")
		if !ok || sum(t, filepath.Join(dist, filepath.Base(name))) != want {
			t.Errorf("SHA256SUMS is wrong on %q", line)
		}
		names = append(names, name)
	}
	left, err := filepath.Glob(filepath.Join(dist, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range left {
		if name := filepath.Base(path); name != "SHA256SUMS" && !slices.Contains(names, name) {
			t.Errorf("SHA256SUMS does not list %s", name)
		}
	}
	if len(names) != 3 {
		t.Errorf("SHA256SUMS lists %v", names)
	}
}

// A cycloneDX is the part of a CycloneDX document that the test looks at.
type cycloneDX struct {
	BOMFormat   string `json:"bomFormat"`
	SpecVersion string `json:"specVersion"`
	Version     int    `json:"version"`
	Metadata    struct {
		Component struct{ Name, Version string } `json:"component"`
	} `json:"metadata"`
	Components []struct {
		Type    string `json:"type"`
		Name    string `json:"name"`
		Version string `json:"version"`
		PURL    string `json:"purl"`
		BOMRef  string `json:"bom-ref"`
		Hashes  []struct{ Alg, Content string }
	} `json:"components"`
	Dependencies []struct {
		Ref       string   `json:"ref"`
		DependsOn []string `json:"dependsOn"`
	} `json:"dependencies"`
}

func checkSBOM(t *testing.T, tree, dist string) {
	text, err := os.ReadFile(filepath.Join(dist, "sbom.cdx.json"))
	if err != nil {
		t.Fatal(err)
	}
	var doc cycloneDX
	if err := json.Unmarshal(text, &doc); err != nil {
		t.Fatal(err)
	}
	if doc.BOMFormat != "CycloneDX" || doc.SpecVersion != "1.6" || doc.Version < 1 ||
		doc.Metadata.Component.Name != "trustd" || doc.Metadata.Component.Version != version {
		t.Errorf("the document is %s %s %d of %+v", doc.BOMFormat, doc.SpecVersion, doc.Version, doc.Metadata.Component)
	}
	again := run(t, tree, "go", "run", "./packaging/sbom", "-version", version, "dist/trustd", "dist/trustd-pkcs11")
	if again != string(text) {
		t.Error("the document is another one when it is made again")
	}
	refs, libraries := map[string]bool{"trustd": true}, map[string]bool{}
	for _, c := range doc.Components {
		if c.BOMRef == "" || refs[c.BOMRef] || c.Name == "" || c.Version == "" {
			t.Errorf("a component is %+v", c)
		}
		refs[c.BOMRef] = true
		switch c.Type {
		case "library":
			libraries[c.Name+" "+c.Version] = true
			if !strings.HasPrefix(c.PURL, "pkg:golang/"+c.Name+"@"+c.Version) {
				t.Errorf("%s has the package URL %s", c.Name, c.PURL)
			}
		case "application":
			if len(c.Hashes) != 1 || c.Hashes[0].Alg != "SHA-256" || c.Hashes[0].Content != sum(t, filepath.Join(dist, c.Name)) {
				t.Errorf("%s has the hashes %v", c.Name, c.Hashes)
			}
		default:
			t.Errorf("a component is of the type %s", c.Type)
		}
	}
	for _, d := range doc.Dependencies {
		for _, ref := range append(d.DependsOn, d.Ref) {
			if !refs[ref] {
				t.Errorf("%s depends on %s, which is not a component", d.Ref, ref)
			}
		}
	}
	checkModules(t, dist, libraries)
}

// checkModules holds the libraries of the document to the modules that the toolchain finds in the binaries.
func checkModules(t *testing.T, dist string, libraries map[string]bool) {
	found := map[string]bool{}
	for _, name := range []string{"trustd", "trustd-pkcs11"} {
		lines := slices.Collect(strings.Lines(run(t, dist, "go", "version", "-m", name)))
		_, goVersion, ok := strings.Cut(strings.TrimSpace(lines[0]), ": go")
		if !ok {
			t.Fatalf("%s is made by %s", name, lines[0])
		}
		found["std "+goVersion] = true
		deps := 0
		for i, line := range lines {
			f := strings.Fields(line)
			replaced := i+1 < len(lines) && strings.HasPrefix(lines[i+1], "\t=>\t")
			if len(f) >= 3 && (f[0] == "dep" && !replaced || f[0] == "=>") {
				found[f[1]+" "+f[2]] = true
				deps++
			}
		}
		if deps < 3 {
			t.Errorf("%s holds %d modules", name, deps)
		}
	}
	for module := range found {
		if !libraries[module] {
			t.Errorf("the document does not name %s", module)
		}
	}
	for module := range libraries {
		if !found[module] {
			t.Errorf("the document names %s, which is in no binary", module)
		}
	}
}

func checkBinaries(t *testing.T, dist string) {
	path := filepath.Join(dist, "trustd")
	if fi, err := os.Stat(path); err != nil || fi.Size() >= most {
		t.Errorf("trustd has more than %d bytes: %v", most, err)
	}
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	libs, err := f.ImportedLibraries()
	if err != nil || len(libs) != 0 {
		t.Errorf("trustd is not static: it needs %v, %v", libs, err)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			t.Error("trustd is not static: it names an interpreter")
		}
	}
	if out := run(t, dist, path, "version"); !strings.Contains(out, version) {
		t.Errorf("trustd is of the version %s", out)
	}
	plugin, err := elf.Open(filepath.Join(dist, "trustd-pkcs11"))
	if err != nil {
		t.Fatal(err)
	}
	defer plugin.Close()
	libs, err = plugin.ImportedLibraries()
	if err != nil {
		t.Fatal(err)
	}
	for _, lib := range libs {
		if !slices.Contains([]string{"libc.so.6", "libdl.so.2", "libpthread.so.0", "libresolv.so.2"}, lib) {
			t.Errorf("the plugin needs %s", lib)
		}
	}
}

// checkUnits has systemd read its units, with the released binary in the place of the installed one.
func checkUnits(t *testing.T, dist string) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("systemd-analyze is not installed")
	}
	units, err := filepath.Glob(filepath.Join(root, "packaging/systemd/*"))
	if err != nil || len(units) < 3 {
		t.Fatalf("the units are %v, %v", units, err)
	}
	dir := t.TempDir()
	var service string
	verify := []string{"verify", "--man=yes"}
	for _, path := range units {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		text := strings.ReplaceAll(string(b), "/usr/bin/trustd", filepath.Join(dist, "trustd"))
		unit := filepath.Join(dir, filepath.Base(path))
		if err := os.WriteFile(unit, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(unit, ".service") {
			if text == string(b) {
				t.Errorf("%s does not start /usr/bin/trustd", path)
			}
			service = unit
		}
		verify = append(verify, unit)
	}
	cmd := exec.CommandContext(t.Context(), analyze, verify...)
	if out, err := cmd.CombinedOutput(); err != nil || len(out) != 0 {
		t.Errorf("systemd-analyze verify: %v: %s", err, out)
	}
	// The exposure, from 0 to 100, of a service that must see the processes and programs of others.
	cmd = exec.CommandContext(t.Context(), analyze, "security", "--offline=true", "--no-pager", "--threshold=25", service)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("systemd-analyze security: %v: %s", err, out)
	}
}
