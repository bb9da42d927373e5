package suite_test

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/signertest/suite"
	"github.com/trustd/trustd/signer/soft"
)

// A broken backend lists no keys, and panics where it is to find one.
type broken struct{ *soft.Backend }

func (*broken) Keys(context.Context) ([]signer.KeyInfo, error) { return nil, errors.New("no list") }

func (*broken) Find(context.Context, signer.ID) (signer.KeyInfo, error) { panic("nothing is found") }

func check(t *testing.T, wrap func(*soft.Backend) signer.Backend) map[string]suite.Result {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "keys")
	var order []string
	results := suite.Check(t.Context(), func(context.Context) (signer.Backend, error) {
		b, err := soft.Open(soft.Config{Dir: dir})
		if err != nil {
			return nil, err
		}
		return wrap(b), nil
	}, func(r suite.Result) { order = append(order, r.Check) }, suite.Algorithms(ident.Ed25519))
	out := map[string]suite.Result{}
	var names []string
	for _, r := range results {
		out[r.Check] = r
		names = append(names, r.Check)
	}
	if !slices.Equal(names, order) || len(out) != len(names) {
		t.Errorf("reported %v, returned %v", order, names)
	}
	return out
}

func TestCheck(t *testing.T) {
	for name, r := range check(t, func(b *soft.Backend) signer.Backend { return b }) {
		if r.Result != suite.Passed || r.Detail != "" {
			t.Errorf("%s: %+v", name, r)
		}
	}
	got := check(t, func(b *soft.Backend) signer.Backend { return &broken{b} })
	for name, detail := range map[string]string{"Find": "panic: nothing is found", "Keys": "no list", "Destroy": "panic"} {
		if r := got[name]; r.Result != suite.Failed || !strings.Contains(r.Detail, detail) {
			t.Errorf("%s: %+v", name, r)
		}
	}
	for _, name := range []string{"Describe", "Sign", "Open"} {
		if r := got[name]; r.Result != suite.Passed {
			t.Errorf("%s: %+v", name, r)
		}
	}
}

// TestCheckWithoutBackend says why there was nothing to check.
func TestCheckWithoutBackend(t *testing.T) {
	open := func(context.Context) (signer.Backend, error) { return nil, errors.New("no device") }
	results := suite.Check(t.Context(), open, nil)
	if len(results) != 1 || results[0].Result != suite.Failed || !strings.Contains(results[0].Detail, "no device") {
		t.Errorf("%+v", results)
	}
}
