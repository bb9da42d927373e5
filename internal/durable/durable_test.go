package durable_test

import (
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"pgregory.net/rapid"

	"github.com/trustd/trustd/internal/durable"
	"github.com/trustd/trustd/internal/durable/durabletest"
)

func TestFilesOnDisk(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b", "c")
	if err := durable.MkdirAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := durable.MkdirAll(dir); err != nil {
		t.Errorf("making a folder that exists: %v", err)
	}
	for d := dir; filepath.Base(d) != "a"; d = filepath.Dir(d) {
		if info, err := os.Stat(d); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("%s: mode %v, %v; want 0700", d, info.Mode(), err)
		}
	}
	path := filepath.Join(dir, "file")
	for _, text := range []string{"one", "two, longer", ""} {
		if err := durable.WriteFile(path, []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != text {
			t.Errorf("read %q, %v; want %q", got, err, text)
		}
	}
	if info, _ := os.Stat(path); info.Mode().Perm() != 0o640 {
		t.Errorf("mode %v, want 0640", info.Mode())
	}
	if err := durable.Create(path, []byte("x"), 0o600); !errors.Is(err, fs.ErrExist) {
		t.Errorf("making a file that exists: %v", err)
	}
	if err := durable.Remove(path); err != nil {
		t.Error(err)
	}
	if err := durable.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("removing a file that is gone: %v", err)
	}
	if err := durable.Create(path, []byte("x"), 0o600); err != nil {
		t.Error(err)
	}
	if err := durable.MkdirAll(filepath.Join(path, "sub")); err == nil {
		t.Error("a folder was made below a file")
	}
	if names, _ := os.ReadDir(dir); len(names) != 1 {
		t.Errorf("files left behind: %v", names)
	}
}

func TestSweepRemovesOnlyTemporaryFiles(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{".a.json.tmp-0011", "a.json", ".hidden", "b.tmp-1"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := durable.Sweep(dir); err != nil {
		t.Fatal(err)
	}
	left, err := durable.Disk.ReadDir(dir)
	if err != nil || strings.Join(left, " ") != ".hidden a.json b.tmp-1" {
		t.Errorf("left %q, %v", left, err)
	}
}

// TestWriteFileFaults fails each call in turn: the old content stays, and nothing else is left in the folder.
func TestWriteFileFaults(t *testing.T) {
	for _, tc := range []struct {
		name  string
		fault durabletest.Fault
		old   bool // the old content must still be there
	}{
		{"open", durabletest.Fault{Op: durabletest.Open}, true},
		{"write", durabletest.Fault{Op: durabletest.Write, Err: syscall.ENOSPC}, true},
		{"short write", durabletest.Fault{Op: durabletest.Write, Err: syscall.ENOSPC, Short: 2}, true},
		{"sync", durabletest.Fault{Op: durabletest.Sync}, true},
		{"sync that worked", durabletest.Fault{Op: durabletest.Sync, Persist: true}, true},
		{"rename", durabletest.Fault{Op: durabletest.Rename}, true},
		{"folder", durabletest.Fault{Op: durabletest.SyncDir}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := durabletest.New()
			m.SetContent("/d/f", []byte("old"))
			m.Inject(tc.fault)
			err := durable.WriteFileOn(m, "/d/f", []byte("new text"), 0o600)
			if err == nil {
				t.Fatal("no error")
			}
			if tc.fault.Err != nil && !errors.Is(err, tc.fault.Err) {
				t.Errorf("the cause is lost: %v", err)
			}
			if got := string(m.Content("/d/f")); tc.old && got != "old" {
				t.Errorf("content %q", got)
			}
			if names := m.Names(); len(names) != 1 {
				t.Errorf("files left behind: %q", names)
			}
		})
	}
}

func TestCreateFaults(t *testing.T) {
	for _, op := range []durabletest.Op{durabletest.Open, durabletest.Write, durabletest.Sync, durabletest.Link} {
		m := durabletest.New()
		m.Inject(durabletest.Fault{Op: op})
		if err := durable.CreateOn(m, "/d/f", []byte("x"), 0o600); err == nil {
			t.Errorf("%s: no error", op)
		}
		if names := m.Names(); len(names) != 0 {
			t.Errorf("%s: files left behind: %q", op, names)
		}
	}
}

// TestWriteFilePowerLoss: what WriteFile returned from is there after the loss of power; before that, the old
// content is, or the new.
func TestWriteFilePowerLoss(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := durabletest.New()
		r := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		want, maybe := "", ""
		for i := range rapid.IntRange(1, 5).Draw(t, "writes") {
			text := strings.Repeat("x", i) + "!"
			if rapid.Bool().Draw(t, "fail") {
				op := rapid.SampledFrom([]durabletest.Op{
					durabletest.Write, durabletest.Sync, durabletest.Rename, durabletest.SyncDir,
				}).Draw(t, "op")
				m.Inject(durabletest.Fault{Op: op, Persist: rapid.Bool().Draw(t, "persist")})
			}
			maybe = text
			if durable.WriteFileOn(m, "/d/f", []byte(text), 0o600) == nil {
				want = text
			}
			m.Heal()
			if want != maybe {
				break // what an error leaves is old or new
			}
		}
		got := string(m.PowerLoss(r, rapid.Bool().Draw(t, "holes")).Content("/d/f"))
		if got != want && got != maybe {
			t.Fatalf("content %q, want %q or %q", got, want, maybe)
		}
	})
}
