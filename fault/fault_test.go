package fault_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/fault"
)

// declared reads the names and values of the codes out of the source.
func declared(t *testing.T) map[string]fault.Code {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "codes.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]fault.Code{}
	ast.Inspect(file, func(n ast.Node) bool {
		v, ok := n.(*ast.ValueSpec)
		if !ok {
			return true
		}
		if typ, ok := v.Type.(*ast.Ident); !ok || typ.Name != "Code" {
			return true
		}
		value, err := strconv.Unquote(v.Values[0].(*ast.BasicLit).Value)
		if err != nil {
			t.Fatal(err)
		}
		out[v.Names[0].Name] = fault.Code(value)
		return true
	})
	return out
}

func TestEveryCodeIsInTheTable(t *testing.T) {
	codes := declared(t)
	if len(codes) < 50 {
		t.Fatalf("only %d codes found in the source", len(codes))
	}
	seen := map[fault.Code]string{}
	form := regexp.MustCompile(`^[a-z][a-z0-9]*(_[a-z0-9]+)*$`)
	for name, c := range codes {
		if !c.Known() {
			t.Errorf("%s (%s) is not in the table", name, c)
			continue
		}
		if other, ok := seen[c]; ok {
			t.Errorf("%s and %s are one code", name, other)
		}
		seen[c] = name
		if !form.MatchString(string(c)) {
			t.Errorf("%s: the code %q is not in lower case with '_'", name, c)
		}
		if c.Status() < 400 || c.Status() > 599 || !strings.HasSuffix(c.Title(), ".") {
			t.Errorf("%s: status %d, title %q", name, c.Status(), c.Title())
		}
		if c.Hint() != "" && !strings.HasSuffix(c.Hint(), ".") {
			t.Errorf("%s: the hint %q is no sentence", name, c.Hint())
		}
		if c.Retryable() && c.Status() < 429 {
			t.Errorf("%s may be retried but has the status %d", name, c.Status())
		}
	}
	if len(fault.All()) != len(codes) {
		t.Errorf("the table holds %d codes, the source declares %d", len(fault.All()), len(codes))
	}
}

// TestProblemRoundTrip sends every code through the form in which it crosses a socket.
func TestProblemRoundTrip(t *testing.T) {
	for _, c := range fault.All() {
		secret := errors.New("CKR_PIN_INCORRECT at 0xdeadbeef")
		sent := &fault.Error{Code: c, Field: "a.b", Text: "text", Hint: "hint", RetryAfter: 1500 * time.Millisecond, Err: secret}
		wire, err := json.Marshal(api.NewProblem(fmt.Errorf("doing a thing: %w", sent)))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(wire), "CKR_") || strings.Contains(string(wire), "doing a thing") {
			t.Errorf("the cause is sent: %s", wire)
		}
		var p api.Problem
		if err := json.Unmarshal(wire, &p); err != nil {
			t.Fatal(err)
		}
		got := fault.From(p.Err())
		if got.Code != c || got.Field != "a.b" || got.Text != "text" || got.Hint != "hint" || got.RetryAfter != sent.RetryAfter {
			t.Errorf("%s became %+v", c, got)
		}
		if !errors.Is(p.Err(), c) || !errors.Is(sent, c) || !errors.Is(sent, secret) {
			t.Errorf("%s is not found in its error", c)
		}
		if p.Status != c.Status() || p.Title != c.Title() || p.Retryable != c.Retryable() || p.Type != api.ProblemType+string(c) {
			t.Errorf("%s: the problem is %+v", c, p)
		}
		plain := api.NewProblem(&fault.Error{Code: c})
		if plain.Hint != c.Hint() {
			t.Errorf("%s: hint %q, want the code's own", c, plain.Hint)
		}
	}
	if api.NewProblem(nil) != nil || (*api.Problem)(nil).Err() != nil {
		t.Error("no error is a problem")
	}
}

func TestFrom(t *testing.T) {
	own := fault.New(fault.Denied, "no")
	for name, c := range map[string]struct {
		err  error
		want fault.Code
	}{
		"nil":              {nil, ""},
		"own":              {own, fault.Denied},
		"wrapped":          {fmt.Errorf("a: %w", fmt.Errorf("b: %w", own)), fault.Denied},
		"joined":           {errors.Join(errors.New("x"), own), fault.Denied},
		"bare code":        {fmt.Errorf("a: %w", fault.KeyGone), fault.KeyGone},
		"deadline":         {fmt.Errorf("a: %w", context.DeadlineExceeded), fault.DeadlineExceeded},
		"canceled":         {context.Canceled, fault.Canceled},
		"foreign":          {fs.ErrPermission, fault.Internal},
		"code over cause":  {fault.Wrap(fault.DeviceLost, context.Canceled, ""), fault.DeviceLost},
		"outermost counts": {fault.Wrap(fault.WrongPassphrase, fault.New(fault.Corrupt, "x"), ""), fault.WrongPassphrase},
	} {
		if got := fault.CodeOf(c.err); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
	if e := fault.From(errors.New("panic: secret")); e.Text != "" || strings.Contains(e.Error(), "secret") {
		t.Errorf("the text of an unforeseen error is shown: %v", e)
	}
	if fault.From(nil) != nil {
		t.Error("From(nil) is an error")
	}
}

func TestErrorText(t *testing.T) {
	e := &fault.Error{Code: fault.Malformed, Field: "nonce", Text: "too long", Err: errors.New("cause")}
	if e.Error() != "malformed (nonce): too long" || e.Verbose() != "malformed (nonce): too long: cause" {
		t.Errorf("%q, %q", e.Error(), e.Verbose())
	}
	if e := fault.New(fault.Denied, ""); e.Error() != "denied" || e.Verbose() != "denied" {
		t.Errorf("%q, %q", e.Error(), e.Verbose())
	}
	if e := fault.BadField("a", "at most %d", 3); e.Field != "a" || e.Code != fault.Malformed || e.Text != "at most 3" {
		t.Errorf("%+v", e)
	}
}

func TestUnknownCode(t *testing.T) {
	c := fault.Code("from_the_future")
	if c.Known() || c.Status() != 500 || c.Retryable() || c.Refusal() || c.Title() != "" {
		t.Errorf("a code of a newer peer has status %d, title %q", c.Status(), c.Title())
	}
	p := api.Problem{Code: c, Detail: "text"}
	if !errors.Is(p.Err(), c) {
		t.Error("a code of a newer peer is lost")
	}
}

func TestRefusals(t *testing.T) {
	for _, c := range []fault.Code{fault.Malformed, fault.TooLarge, fault.InvalidSignature, fault.ReplayDetected, fault.BrokenChain} {
		if !c.Refusal() {
			t.Errorf("%s is no refusal", c)
		}
	}
	for _, c := range []fault.Code{fault.Internal, fault.Denied, fault.DeviceLost, fault.KeyGone, fault.Corrupt} {
		if c.Refusal() {
			t.Errorf("%s is a refusal of a message", c)
		}
	}
}
