package packet_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/packet"
	"github.com/trustd/trustd/signature"
)

const compatDocument = "../docs/compat-trusthandoff.md"

// compatCell is one test as the document names it: package, function, and for TestStrict the case.
var compatCell = regexp.MustCompile("`([a-z0-9/]+) ((?:Test|Fuzz)[A-Za-z0-9]+)(?:/([a-z0-9-]+))?`")

// compatRows returns the rows of the document's tables, cell by cell.
func compatRows(t *testing.T) [][]string {
	t.Helper()
	b, err := os.ReadFile(compatDocument)
	if err != nil {
		t.Fatal(err)
	}
	var rows [][]string
	for line := range strings.Lines(string(b)) {
		if !strings.HasPrefix(line, "| ") {
			continue
		}
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		if last := strings.TrimSpace(cells[len(cells)-1]); last != "Proof" {
			rows = append(rows, cells)
		}
	}
	return rows
}

// TestCompatDocument checks that each row of docs/compat-trusthandoff.md names tests, and that they exist.
func TestCompatDocument(t *testing.T) {
	rows, seen := compatRows(t), map[string]map[string]bool{}
	if len(rows) < 40 {
		t.Fatalf("%d rows", len(rows))
	}
	for _, row := range rows {
		last := row[len(row)-1]
		tests := compatCell.FindAllStringSubmatch(last, -1)
		if len(tests) == 0 || len(tests) != strings.Count(last, "`")/2 {
			t.Errorf("%s: no test, or one that cannot be read: %s", row[0], last)
		}
		for _, m := range tests {
			dir, name, sub := m[1], m[2], m[3]
			if seen[dir] == nil {
				seen[dir] = testFunctions(t, filepath.Join("..", dir))
			}
			if !seen[dir][name] {
				t.Errorf("%s: package %s has no %s", row[0], dir, name)
			}
			if _, ok := strictCases[sub]; sub != "" && (name != "TestStrict" || !ok) {
				t.Errorf("%s: %s has no case %s", row[0], name, sub)
			}
		}
	}
}

// testFunctions returns the tests and fuzz targets of a package's folder.
func testFunctions(t *testing.T, dir string) map[string]bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]bool{}
	for _, name := range files {
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil {
				out[fn.Name.Name] = true
			}
		}
	}
	return out
}

// compatCases returns the cases of TestStrict that the document names.
func compatCases(t *testing.T) map[string]bool {
	out := map[string]bool{}
	for _, row := range compatRows(t) {
		for _, m := range compatCell.FindAllStringSubmatch(row[len(row)-1], -1) {
			out[m[3]] = true
		}
	}
	return out
}

// otherKeys returns one key of each algorithm that TrustHandoff does not have.
func otherKeys(t *testing.T) []ident.PublicKey {
	t.Helper()
	var keys []crypto.PublicKey
	for _, c := range []elliptic.Curve{elliptic.P256(), elliptic.P384()} {
		k, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, k.Public())
	}
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	var out []ident.PublicKey
	for _, k := range append(keys, k.Public()) {
		pub, err := ident.NewPublicKey(k)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, pub)
	}
	return out
}

// TestOtherAlgorithms: other keys use the same members and the same form of the signed bytes.
func TestOtherAlgorithms(t *testing.T) {
	for _, pub := range otherKeys(t) {
		f := testFill(t)
		f.PublicKey = pub
		u, err := complete(minimalDraft, f)
		if err != nil {
			t.Fatal(err)
		}
		sig := make([]byte, pub.Algorithm().SignatureSize())
		p, err := packet.Parse(u.Seal(signature.NewDirect(sig)))
		if err != nil {
			t.Fatalf("%s: %v", pub.Algorithm(), err)
		}
		if p.SignatureAlgo != pub.Algorithm().Wire() || p.PublicKeyPEM != pub.PEM() ||
			p.SignatureText != base64.StdEncoding.EncodeToString(sig) ||
			string(p.SigningBytes()) != string(u.SigningBytes()) {
			t.Errorf("%s: %+v", pub.Algorithm(), p)
		}
	}
}
