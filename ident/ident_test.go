package ident_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
)

func wantMalformed(t testing.TB, err error, field string) {
	t.Helper()
	if fault.CodeOf(err) != fault.Malformed || fault.From(err).Field != field {
		t.Errorf("error %v, want malformed in %s", err, field)
	}
}

var agentIDs = map[string]bool{
	"a": true, "A": true, "0": true, "planner": true, "planner-1": true, "a.b_c-d": true, "a--b": true, "a..b": true,
	strings.Repeat("a", 128): true,

	"": false, strings.Repeat("a", 129): false, ".a": false, "a.": false, "-a": false, "a-": false, "_": false, "a_": false,
	"a b": false, " a": false, "a\n": false, "a\x00": false, "a/b": false, "a:b": false, "partner:agent": false, "a*": false,
	"a%41": false, "a@b": false, "a+b": false, "a\\b": false, "..": false, ".": false,
	"pl\u0430nner":  false, // Cyrillic a
	"planner\u200b": false, // zero-width space
	"plan\u00adner": false, // soft hyphen
	"\uff41gent":    false, // full-width a
	"agent\u0301":   false, // combining accent
	"\u202eagent":   false, // right-to-left override
	"agent\u212a":   false, // Kelvin sign, which folds to k
	"\xff":          false, "a\xc0\xafb": false,
}

func TestParseAgentID(t *testing.T) {
	for s, ok := range agentIDs {
		id, err := ident.ParseAgentID(s)
		if !ok {
			wantMalformed(t, err, "agent_id")
			if !id.IsZero() {
				t.Errorf("%q: refused and returned", s)
			}
			if len(s) > 3 && strings.Contains(err.Error(), s) {
				t.Errorf("the error quotes the value: %v", err)
			}
			continue
		}
		if err != nil || id.String() != s || id.IsZero() {
			t.Errorf("%q: %v, %v", s, id, err)
		}
	}
}

func TestAgentIDText(t *testing.T) {
	var v struct{ ID ident.AgentID }
	if err := json.Unmarshal([]byte(`{"ID":"a:b"}`), &v); fault.CodeOf(err) != fault.Malformed || !v.ID.IsZero() {
		t.Errorf("a bad id in JSON: %v, %v", v.ID, err)
	}
	for _, s := range []string{`{"ID":""}`, `{"ID":"planner"}`} {
		if err := json.Unmarshal([]byte(s), &v); err != nil {
			t.Fatal(err)
		}
		if b, err := json.Marshal(v); err != nil || string(b) != s {
			t.Errorf("%s became %s, %v", s, b, err)
		}
	}
	if a, _ := ident.ParseAgentID("Planner"); a == mustAgent(t, "planner") {
		t.Error("ids that differ in case are one")
	}
}

func mustAgent(t testing.TB, s string) ident.AgentID {
	t.Helper()
	a, err := ident.ParseAgentID(s)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestParseAlias(t *testing.T) {
	for s, want := range map[string]struct{ ok, derived bool }{
		"agent:planner":               {true, false},
		"agent:planner:eu-1":          {true, false},
		"agent:fy2e0LcbjlpsXPMO":      {true, true},
		"agent:abc+/123ABCabc9":       {false, false}, // 15 characters
		"agent:abc+/123ABCabc90":      {true, true},
		"agent:abcdefghijklmnop":      {true, true}, // a role of 16 letters has the derived form, and counts as such
		"agent:abcdefghijklmno":       {true, false},
		"agent:abcdefghijklmnopq":     {true, false},
		"agent:":                      {},
		"agent":                       {},
		"":                            {},
		"planner":                     {},
		"Agent:planner":               {},
		"agent::x":                    {},
		"agent:a:":                    {},
		"agent:a:b:c":                 {},
		"agent:abc=/123ABCabc90":      {},
		"agent:pl\u0430nner":          {},
		"agent: planner":              {},
		"agent:planner\n":             {},
		"agent:" + long("a", 122):     {true, false},
		"agent:" + long("a", 123):     {},
		"agent:a:" + long("b", 121):   {},
		"partner:abcdefghijklmnop":    {},
		"agent:agent:planner":         {true, false}, // the role "agent", which is only a role
		"agent:fy2e0LcbjlpsXPMO:eu-1": {true, false},
	} {
		a, err := ident.ParseAlias(s)
		if !want.ok {
			wantMalformed(t, err, "alias")
			continue
		}
		if err != nil || a.String() != s || a.Derived() != want.derived {
			t.Errorf("%q: %v, derived %v, %v", s, a, a.Derived(), err)
		}
	}
}

func long(s string, n int) string { return strings.Repeat(s, n) }

func TestParseKeyID(t *testing.T) {
	good := "sha256:" + long("0a", 32)
	id, err := ident.ParseKeyID(good)
	if err != nil || id.String() != good || id.IsZero() || id.Short() != long("0a", 6) {
		t.Fatalf("%v, %v", id, err)
	}
	for _, bad := range []string{
		"", "sha256:", long("0a", 32), "sha256:" + long("0A", 32), "SHA256:" + long("0a", 32), "sha256:" + long("0a", 31) + "0",
		"sha256:" + long("0a", 33), "sha256: " + long("0a", 32), good + "\n", "sha256:" + long("0g", 32), "sha512:" + long("0a", 32),
		"sha256:" + long("\u0660", 32), // Arabic digits, two bytes each
	} {
		id, err := ident.ParseKeyID(bad)
		wantMalformed(t, err, "fingerprint")
		if !id.IsZero() {
			t.Errorf("%q: refused and returned", bad)
		}
	}
	var back ident.KeyID
	text, _ := id.MarshalText()
	if err := back.UnmarshalText(text); err != nil || back != id {
		t.Errorf("the text %s does not read back: %v", text, err)
	}
}

func FuzzParseAgentID(f *testing.F) {
	for s := range agentIDs {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ident.ParseAgentID(s)
		if err != nil {
			if fault.CodeOf(err) != fault.Malformed || !id.IsZero() {
				t.Errorf("%q: %v, %v", s, id, err)
			}
			return
		}
		if id.String() != s || len(s) > ident.MaxAgentID || strings.ContainsAny(s, ":/*% \n\x00") {
			t.Errorf("%q passes", s)
		}
		if _, err := ident.ParseAlias("agent:" + s); err != nil && len(s) <= ident.MaxAgentID-len("agent:") {
			t.Errorf("%q is an id but no role: %v", s, err)
		}
	})
}

func FuzzParseAlias(f *testing.F) {
	for _, s := range []string{"agent:a", "agent:a:b", "agent:fy2e0LcbjlpsXPMO", "agent::", "x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, err := ident.ParseAlias(s)
		if (err == nil) == a.IsZero() {
			t.Fatalf("%q: %v, %v", s, a, err)
		}
		if err != nil {
			return
		}
		if _, err := ident.ParseAgentID(s); err == nil {
			t.Errorf("%q is an alias and a local id", s)
		}
		var back ident.Alias
		if text, _ := a.MarshalText(); back.UnmarshalText(text) != nil || back != a {
			t.Errorf("%q does not read back", s)
		}
	})
}

func FuzzParseKeyID(f *testing.F) {
	f.Add("sha256:" + long("0a", 32))
	f.Add("sha256:" + long("0A", 32))
	f.Fuzz(func(t *testing.T, s string) {
		if id, err := ident.ParseKeyID(s); err == nil && id.String() != s {
			t.Errorf("%q is another text of %v", s, id)
		}
	})
}
