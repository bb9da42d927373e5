package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/softhsm-test/lab"
)

// tokenNow returns what `trustd backend show` says of the token.
func tokenNow(t *testing.T, l *lab.Lab) api.Backend {
	t.Helper()
	r := l.Root(t.Context(), nil, "backend", "show", "hsm", "-o", "json")
	var b api.Backend
	if err := json.Unmarshal([]byte(r.Stdout), &b); r.Code != 0 || err != nil {
		t.Fatalf("backend show: exit %d, %v: %s", r.Code, err, r.Stderr)
	}
	return b
}

// TestOrphanedKey is T-DEV-2: it deletes one key of a real token behind the daemon's back: it is orphaned, all else goes on, its place is
// kept, and an operator brings it back together with the token's old content.
func TestOrphanedKey(t *testing.T) {
	opensc := tool(t, "pkcs11-tool")
	l := start(t, lab.Options{NoTPM: true})
	k := token{l, opensc}
	lost, kept := add(t, l, "lost", "--uid", "0"), add(t, l, "kept", "--uid", "0")
	eventually(t, "waiting for the canary", func() error {
		if b := tokenNow(t, l); b.State != "ready" || b.Canary == nil || b.Canary.Signed == 0 {
			return fmt.Errorf("%+v", b)
		}
		return nil
	})
	tokens := filepath.Join(l.Dir, "tokens")
	if out, err := exec.CommandContext(t.Context(), "cp", "-a", tokens, tokens+".before").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, kind := range []string{"privkey", "pubkey"} {
		k.run(t, "--delete-object", "--type", kind, "--id", keyID(t, lost.KeyURI).String())
	}
	eventually(t, "waiting for the key to be orphaned", func() error {
		r := l.Root(t.Context(), task(kept.Aliases[0]), "sign", "--agent", "lost", "-o", "json")
		if codeOf(r) != fault.KeyOrphaned {
			return fmt.Errorf("exit %d: %s", r.Code, r.Stderr)
		}
		return nil
	})
	signs(t, l, "kept", kept.Aliases[0], l)
	if b := tokenNow(t, l); b.State != "ready" {
		t.Errorf("the backend is %s: %s", b.State, b.Problem)
	}
	if d := show(t, l, "lost"); d.KeyState != "orphaned" || d.KeyURI != lost.KeyURI || d.Status != "active" {
		t.Errorf("shown as %+v", d)
	}
	key := keyOf(t, l, "the lost key", func(k api.Key) bool { return k.UsedBy == "lost" })
	if key.State != "orphaned" {
		t.Errorf("listed as %+v", key)
	}
	if r := l.Root(t.Context(), nil, "doctor"); r.Code != 1 || !strings.Contains(r.Stdout, "key recheck") {
		t.Errorf("doctor: exit %d: %s", r.Code, r.Stdout)
	}
	if r := l.Root(t.Context(), nil, "key", "recheck", "lost", "-o", "json"); codeOf(r) != fault.KeyGone {
		t.Errorf("recheck of a key that is not there: exit %d: %s", r.Code, r.Stderr)
	}
	if err := os.Rename(tokens, tokens+".after"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tokens+".before", tokens); err != nil {
		t.Fatal(err)
	}
	eventually(t, "waiting for the recheck", func() error {
		if r := l.Root(t.Context(), nil, "key", "recheck", "lost"); r.Code != 0 {
			return fmt.Errorf("exit %d: %s", r.Code, r.Stderr)
		}
		return nil
	})
	signs(t, l, "lost", kept.Aliases[0], l)
	if err := healthy(t, l); err != nil {
		t.Error(err)
	}
}
