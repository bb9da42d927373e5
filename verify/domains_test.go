package verify_test

import (
	"encoding/hex"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/trustd/trustd/signature"
)

var domainRow = regexp.MustCompile("(?m)^\\| ([^|]+) \\| `([^`]+)`( [0-9a-f]+)? \\|")

// openings returns the openings that docs/formats/domains.md lists, by kind.
func openings(t *testing.T) map[string]string {
	t.Helper()
	doc, err := os.ReadFile("../docs/formats/domains.md")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, row := range domainRow.FindAllStringSubmatch(string(doc), -1) {
		tail, err := hex.DecodeString(strings.TrimSpace(row[3]))
		if err != nil {
			t.Fatal(err)
		}
		out[row[1]] = row[2] + string(tail)
	}
	return out
}

// TestDomains (T-SIG-1): no two kinds of signed bytes have one in common, because no opening starts with another, every
// domain is in the table, and what is signed opens as the table says.
func TestDomains(t *testing.T) {
	table := openings(t)
	for a, x := range table {
		for b, y := range table {
			if a != b && strings.HasPrefix(x, y) {
				t.Errorf("the opening of %q starts with that of %q", a, b)
			}
		}
	}
	listed := map[string]bool{}
	for _, opening := range table {
		listed[opening] = true
	}
	for _, d := range signature.Domains() {
		if !listed[string(d)] {
			t.Errorf("domain %q is not in the table", string(d))
		}
		if !strings.HasSuffix(string(d), "\x00") || strings.Count(string(d), "\x00") != 1 {
			t.Errorf("domain %q does not end in its only NUL", string(d))
		}
	}
	if want := len(signature.Domains()) + 2; len(table) != want {
		t.Errorf("%d openings, want %d", len(table), want)
	}
	w := newWorld(t)
	p := sealed(t, w.packetFields(), w.alice, current)
	samples := map[string][][]byte{
		"SignedMessage":   {message(t, header(t, "alice", w.alice), w.alice, `{"packet_id":1}`).SigningBytes()},
		"task packet":     {p.SigningBytes()},
		"old task packet": p.LegacySigningBytes(),
	}
	for kind, all := range samples {
		for _, msg := range all {
			for other, opening := range table {
				if strings.HasPrefix(string(msg), opening) != (other == kind) {
					t.Errorf("bytes of a %s open like a %s", kind, other)
				}
			}
		}
		if len(all) == 0 {
			t.Errorf("no bytes of a %s", kind)
		}
	}
}
