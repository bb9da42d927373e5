package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/trustd/trustd/signer"
)

// TestScriptRefuses holds the parser to its grammar.
func TestScriptRefuses(t *testing.T) {
	for _, line := range []string{
		`x`, `[]`, `{}`, `{"at":"Sign"}`, `{"do":"hang"}`, `{"at":"Sign","do":"explode"}`, `{"at":"Sing","do":"hang"}`,
		`{"at":"Sign","do":"hang"} {}`, `{"at":"Sign","do":"hang"`, `{"at":"Sign","do":"hang","at":"Sign"}`,
		`{"At":"Sign","do":"hang"}`, `{"at":"Sign","do":"hang","why":1}`, `{"at":"Sign","do":"hang","code":"CKR_CANCEL"}`,
		`{"at":["Sign"],"do":"hang"}`, `{"at":"Sign","do":"hang","nth":"1"}`, `{"at":"Sign","do":"hang","nth":0}`,
		`{"at":"Sign","do":"hang","nth":-1}`, `{"at":"Sign","do":"hang","nth":1.5}`,
		`{"at":"Sign","do":"hang","nth":1,"times":2}`,
		`{"at":"Sign","do":"hang","p":0}`, `{"at":"Sign","do":"hang","p":1.1}`, `{"at":"Sign","do":"hang","p":null}`,
		`{"at":"Sign","do":"delay"}`, `{"at":"Sign","do":"delay","ms":0}`,
		`{"at":"Sign","do":"delay","ms":1,"p50_ms":1,"p95_ms":2}`,
		`{"at":"Sign","do":"delay","p50_ms":1}`,
		`{"at":"Sign","do":"delay","p50_ms":2,"p95_ms":1}`, `{"at":"Sign","do":"delay","ms":1e99}`,
		`{"at":"Sign","do":"rate"}`, `{"at":"Open","do":"rate","per_second":5}`, `{"at":"Sign","do":"rate","per_second":0}`,
		`{"at":"Open","do":"corrupt"}`, `{"at":"Sign","do":"drop"}`, `{"at":"Sign","do":"return"}`,
		`{"at":"Sign","do":"return","code":"CKR_CANCEL"}`, `{"at":"C_Sign","do":"return","code":"CKR_OK"}`,
		`{"at":"C_Sign","do":"return","code":"TPM_RC_LOCKOUT"}`, `{"at":"TPM2_Sign","do":"return","code":"CKR_CANCEL"}`,
		`{"at":"C_Sign","do":"return","code":"0x"}`, `{"at":"C_Sign","do":"return","code":"0x0"}`,
		`{"at":"C_Sign","do":"return","code":"0x100000000"}`, `{"at":"Sign","do":"exit","status":256}`,
		`{"token":"lost"}`, `{"token":1}`, `{"token":"gone","do":"hang"}`, "{\"token\":\"gone\"}\n{\"token\":\"empty\"}",
		`{"at":"X*","do":"hang"}`,
	} {
		if s, err := parseScript([]byte("# fine\n\n" + line)); err == nil || !strings.HasPrefix(err.Error(), "line ") {
			t.Errorf("%s: %v, %v", line, s, err)
		}
	}
	if _, err := parseScript(make([]byte, maxScript+1)); err == nil {
		t.Error("a script without bounds")
	}
	if _, err := parseScript([]byte(strings.Repeat(`{"at":"Sign","do":"note"}`+"\n", maxRules+1))); err == nil {
		t.Error("rules without bounds")
	}
}

// TestWhen counts calls.
func TestWhen(t *testing.T) {
	for rule, want := range map[string][]int{ // of ten calls
		``:                    {1, 2, 3, 4, 5, 6, 7, 8, 9, 10},
		`"nth":3`:             {3},
		`"every":4`:           {4, 8},
		`"after":7`:           {8, 9, 10},
		`"times":2`:           {1, 2},
		`"after":2,"times":3`: {3, 4, 5},
		`"after":1,"every":3`: {4, 7, 10},
		`"every":2,"times":2`: {2, 4},
		`"p":1`:               {1, 2, 3, 4, 5, 6, 7, 8, 9, 10},
	} {
		if rule != "" {
			rule += ","
		}
		s, err := parseScript([]byte(`{"at":"C_Sign",` + rule + `"do":"return","code":"CKR_DEVICE_ERROR"}`))
		if err != nil {
			t.Errorf("%s: %v", rule, err)
			continue
		}
		var got []int
		for n := 1; n <= 10; n++ {
			s.next("C_SignInit") // another call
			if a := s.next("C_Sign"); len(a) > 0 && a[0].code == 0x30 {
				got = append(got, n)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s acts on %v, want %v", rule, got, want)
		}
	}
}

// TestProbability: the seed decides, and the share is that of p.
func TestProbability(t *testing.T) {
	draw := func(seed int) (out []int) {
		s, err := parseScript(fmt.Appendf(nil, `{"at":"*","do":"note","p":0.3,"seed":%d}`, seed))
		if err != nil {
			t.Fatal(err)
		}
		for n := range 2000 {
			if len(s.next("Sign")) > 0 {
				out = append(out, n)
			}
		}
		return out
	}
	a, b, c := draw(1), draw(1), draw(2)
	if !slices.Equal(a, b) || slices.Equal(a, c) || len(a) < 500 || len(a) > 700 {
		t.Errorf("%d, %d and %d of 2000", len(a), len(b), len(c))
	}
}

// TestEveryCode accepts each code by name and by number.
func TestEveryCode(t *testing.T) {
	for at, codes := range map[string]map[string]uint32{"C_Login": returnValues, "TPM2_Load": responseCodes} {
		for name, code := range codes {
			for _, text := range []string{name, fmt.Sprintf("%#x", code)} {
				s, err := parseScript(fmt.Appendf(nil, `{"at":%q,"do":"return","code":%q}`, at, text))
				if err != nil {
					t.Errorf("%s: %v", text, err)
				} else if a := s.next(at); len(a) != 1 || a[0].code != code {
					t.Errorf("%s: %+v", text, a)
				}
			}
		}
	}
	for _, class := range signer.Classes() {
		if _, err := parseScript(fmt.Appendf(nil, `{"at":"Sign","do":"return","code":%q}`, class)); err != nil {
			t.Errorf("%s: %v", class, err)
		}
	}
}

// put puts a script in place as a whole.
func put(t *testing.T, path, text string) {
	t.Helper()
	if err := errors.Join(os.WriteFile(path+".new", []byte(text), 0o600), os.Rename(path+".new", path)); err != nil {
		t.Fatal(err)
	}
}

// TestPlayer changes the script while calls run.
func TestPlayer(t *testing.T) {
	path, notes := filepath.Join(t.TempDir(), "script"), filepath.Join(t.TempDir(), "notes")
	p := newPlayer(path, notes, slog.New(slog.DiscardHandler))
	play := func(call string) fate {
		f := p.begin(t.Context(), call)
		f.done()
		return f
	}
	if f := play("Sign"); f.class != "" || f.corrupt {
		t.Errorf("without a script: %+v", f)
	}
	put(t, path, `{"at":"Sign","do":"note"}`+"\n"+`{"at":"Sign","do":"return","code":"session_lost","every":2}`)
	for n, want := range []signer.Class{"", signer.SessionLost, "", signer.SessionLost} {
		if f := play("Sign"); f.class != want {
			t.Errorf("call %d: %+v", n, f)
		}
	}
	put(t, path, `nonsense`) // what was in force stays
	if f := play("Open"); f.class != "" {
		t.Errorf("%+v", f)
	}
	if f := play("Sign"); f.class != "" {
		t.Errorf("the fifth call: %+v", f)
	}
	put(t, path, `{"token":"gone"}`+"\n"+`{"at":"C_Sign","do":"hang"}`)
	hanging := make(chan fate)
	go func() { hanging <- p.begin(context.Background(), "C_Sign") }()
	if f := play("Sign"); f.token != "gone" {
		t.Errorf("%+v", f)
	}
	select {
	case <-hanging:
		t.Error("it does not hang")
	default:
	}
	put(t, path, `{"at":"Sign","do":"corrupt"}`)
	<-hanging
	if f := play("Sign"); !f.corrupt || f.token != "" {
		t.Errorf("%+v", f)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if f := play("Sign"); f.corrupt {
		t.Errorf("without a script again: %+v", f)
	}
	text, err := os.ReadFile(notes)
	if err != nil || len(text) != 5*noteSize || strings.Count(string(text), " Sign ") != 5 {
		t.Errorf("notes: %q, %v", text, err)
	}
}

// TestRate: one at a time, and who gives up leaves the line.
func TestRate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "script")
	put(t, path, `{"at":"Sign","do":"rate","per_second":200}`)
	p := newPlayer(path, "", slog.New(slog.DiscardHandler))
	begun := time.Now()
	first := p.begin(t.Context(), "Sign")
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if f := p.begin(gone, "Sign"); !errors.Is(f.err, context.Canceled) {
		t.Errorf("a second one has the device: %+v", f)
	}
	first.done()
	for range 3 {
		p.begin(t.Context(), "Sign").done()
	}
	if took := time.Since(begun); took < 20*time.Millisecond { // a bound from below depends on no machine
		t.Errorf("four signatures took %v", took)
	}
}

func FuzzScript(f *testing.F) {
	for _, line := range []string{
		`{"at":"C_Sign","nth":3,"do":"return","code":"CKR_DEVICE_ERROR"}`,
		`{"at":"Sign","do":"delay","p50_ms":200,"p95_ms":600,"seed":7}`,
		`{"at":"TPM2_*","every":10,"after":5,"do":"drop"}`, `{"at":"Sign","do":"rate","per_second":5}`, `{"token":"other"}`,
		`{"at":"C_Login","p":0.5,"do":"exit","status":7}`, "# nothing\n\n",
	} {
		f.Add([]byte(line))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := parseScript(text)
		if err != nil {
			return
		}
		for _, call := range []string{"Sign", "C_Sign", "TPM2_Sign", "C_Login"} {
			for _, a := range s.next(call) {
				if _, known := members[a.do]; !known {
					t.Errorf("the action %q", a.do)
				}
				if a.do == "delay" && (a.delay.Draw() < 0 || a.delay.Draw() > maxWait) {
					t.Error("a delay out of its bounds")
				}
			}
		}
	})
}
