package keyring_test

import (
	"crypto/ed25519"
	"errors"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/keyring"
)

func entry(t *testing.T, name string) keyring.Entry {
	t.Helper()
	id, err := ident.ParseAgentID(name)
	if err != nil {
		t.Fatal(err)
	}
	public, _, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := ident.NewPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	return keyring.Entry{AgentID: id, Role: "agent", Backend: "hsm", KeyID: "00ff", URI: "soft:id=00ff", Public: pub}
}

// TestUpdate: a change is made to the entry as it stands, is durable, and leaves no trace where there is nothing to change.
func TestUpdate(t *testing.T) {
	dir := t.TempDir()
	k, err := keyring.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	e := entry(t, "a")
	if _, err := k.Update(e.AgentID, func(*keyring.Entry) bool { return true }); !errors.Is(err, fault.NoPrivateKey) {
		t.Errorf("without an entry: %v", err)
	}
	if err := k.Put(e); err != nil {
		t.Fatal(err)
	}
	at := time.Date(2026, 3, 8, 12, 0, 0, 0, time.UTC)
	before, _ := k.Get(e.AgentID)
	now, err := k.Update(e.AgentID, func(e *keyring.Entry) bool {
		e.Orphaned, e.Batching = &keyring.Orphan{Reason: "gone", At: at}, "always"
		return true
	})
	if err != nil || now.Orphaned.Reason != "gone" || before.Orphaned != nil {
		t.Fatalf("%+v, %+v: %v", before, now, err)
	}
	same, err := k.Update(e.AgentID, func(e *keyring.Entry) bool { e.Batching = "never"; return false })
	if err != nil || same != now {
		t.Errorf("nothing to change: %+v, %v", same, err)
	}
	again, err := keyring.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	read, _ := again.Get(e.AgentID)
	if !reflect.DeepEqual(read.Orphaned, now.Orphaned) || read.Batching != "always" || !read.Public.Equal(e.Public) {
		t.Errorf("read back as %+v", read)
	}
}

// TestUpdatesDoNotUndoEachOther when they come at once.
func TestUpdatesDoNotUndoEachOther(t *testing.T) {
	k, err := keyring.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	e := entry(t, "a")
	if err := k.Put(e); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if _, err := k.Update(e.AgentID, func(e *keyring.Entry) bool { e.Grade += "x"; return true }); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if now, _ := k.Get(e.AgentID); now.Grade != strings.Repeat("x", 50) {
		t.Errorf("%d of 50 updates are left", len(now.Grade))
	}
}
