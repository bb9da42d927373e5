// Package keyring is what this host knows of its own keys: which backend holds the key of which agent, who on this
// host may use it, and which keys were begun and not yet registered.
//
// The registry says which key speaks for whom; the keyring only says where that key lives. An entry is never
// deleted because a device looks empty: the file of a lost token's key waits for the token.
package keyring

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/durable"
	"github.com/trustd/trustd/signer"
)

// An Entry maps an agent to the key that signs for it.
type Entry struct {
	AgentID  ident.AgentID   `json:"agent_id"`
	Role     string          `json:"role"` // agent, operator, node
	Backend  string          `json:"backend"`
	KeyID    string          `json:"key_id"` // signer.ID in hexadecimal digits
	URI      string          `json:"key_uri"`
	Public   ident.PublicKey `json:"public_key"`
	Grade    string          `json:"grade"`
	Origin   string          `json:"origin"`
	Adopted  bool            `json:"adopted,omitempty"` // the key is not ours to destroy
	Bindings []api.Binding   `json:"bindings"`
	// Batching is "always" or "never" where requests that do not say whether they may be batched, or all, are to be
	// treated so; "" leaves it to the request.
	Batching string `json:"batching,omitempty"`
	// Orphaned is set where the device lost the key, which is not used then. Only an operator clears it.
	Orphaned *Orphan `json:"orphaned,omitempty"`
	// Leaving is set before the removal record is submitted, so that a crash after it can finish the work.
	Leaving bool `json:"leaving,omitempty"`
}

// An Orphan says since when a key is lost, and in what way.
type Orphan struct {
	Reason string    `json:"reason"` // safe to show
	At     time.Time `json:"at"`
}

// ID returns the key's id inside its backend.
func (e *Entry) ID() signer.ID {
	id, err := signer.ParseID(e.KeyID)
	if err != nil { // checked when the file was read
		panic("keyring: entry with an unreadable key id")
	}
	return id
}

// A Staged key was begun under an id and is not yet known to be registered.
type Staged struct {
	AgentID ident.AgentID `json:"agent_id"`
	Backend string        `json:"backend"`
	KeyID   string        `json:"key_id"`
}

// A Keyring is a folder with one file an entry and one file a staged key. It is safe for concurrent use; readers
// never wait.
type Keyring struct {
	dir string

	mu      sync.Mutex // serialises writers; guards the files and the swap of entries
	entries atomic.Pointer[map[ident.AgentID]*Entry]
}

const (
	entryDir  = "agents"
	stagedDir = "staged"
)

// Open reads the folder, which it makes where it is missing.
func Open(dir string) (*Keyring, error) {
	for _, d := range []string{dir, filepath.Join(dir, entryDir), filepath.Join(dir, stagedDir)} {
		if err := durable.MkdirAll(d); err != nil {
			return nil, fmt.Errorf("making the keyring folder: %w", err)
		}
	}
	k := &Keyring{dir: dir}
	m := map[ident.AgentID]*Entry{}
	err := k.each(entryDir, func(name string, data []byte) error {
		var e Entry
		if err := strict(data, &e); err != nil {
			return err
		}
		if e.AgentID.String() != name || e.Public.IsZero() {
			return errors.New("the entry does not belong to its file")
		}
		if _, err := signer.ParseID(e.KeyID); err != nil {
			return err
		}
		m[e.AgentID] = &e
		return nil
	})
	if err != nil {
		return nil, err
	}
	k.entries.Store(&m)
	return k, nil
}

// each reads the JSON files of a folder. A file that cannot be read stops the daemon: guessing about keys is worse.
func (k *Keyring) each(sub string, fn func(name string, data []byte) error) error {
	dir := filepath.Join(k.dir, sub)
	files, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("reading the keyring: %w", err)
	}
	for _, f := range files {
		name, ok := strings.CutSuffix(f.Name(), ".json")
		if !ok {
			continue // a temporary file of an interrupted write
		}
		data, err := os.ReadFile(filepath.Join(dir, f.Name()))
		if err != nil {
			return fmt.Errorf("reading the keyring: %w", err)
		}
		if err := fn(name, data); err != nil {
			return fault.Wrap(fault.Corrupt, err, "the keyring file %s cannot be read", filepath.Join(sub, f.Name()))
		}
	}
	return nil
}

func strict(data []byte, v any) error {
	dec := json.NewDecoder(strings.NewReader(string(data)))
	dec.DisallowUnknownFields()
	return dec.Decode(v)
}

// Get returns the entry of an agent. The entry must not be changed.
func (k *Keyring) Get(id ident.AgentID) (*Entry, bool) {
	e, ok := (*k.entries.Load())[id]
	return e, ok
}

// All returns every entry, in the order of the agents' ids. The entries must not be changed.
func (k *Keyring) All() []*Entry {
	m := *k.entries.Load()
	out := slices.Collect(maps.Values(m))
	slices.SortFunc(out, func(a, b *Entry) int { return strings.Compare(a.AgentID.String(), b.AgentID.String()) })
	return out
}

// Put writes an entry and returns once it is durable.
func (k *Keyring) Put(e Entry) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.write(entryDir, e.AgentID.String(), e); err != nil {
		return err
	}
	next := maps.Clone(*k.entries.Load())
	next[e.AgentID] = &e
	k.entries.Store(&next)
	return nil
}

// Update changes an entry as it stands now, durably, and returns what it has become. change gets a copy, whose lists it
// must not write to, and returns whether there is anything to write. Without an entry it is no_private_key.
func (k *Keyring) Update(id ident.AgentID, change func(e *Entry) bool) (*Entry, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	now, ok := (*k.entries.Load())[id]
	if !ok {
		return nil, fault.New(fault.NoPrivateKey, "")
	}
	e := *now
	if !change(&e) {
		return now, nil
	}
	if err := k.write(entryDir, id.String(), e); err != nil {
		return nil, err
	}
	next := maps.Clone(*k.entries.Load())
	next[id] = &e
	k.entries.Store(&next)
	return &e, nil
}

// Delete removes an entry; one that is not there is no error.
func (k *Keyring) Delete(id ident.AgentID) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.remove(entryDir, id.String()); err != nil {
		return err
	}
	next := maps.Clone(*k.entries.Load())
	delete(next, id)
	k.entries.Store(&next)
	return nil
}

// Stage notes, durably, that a key is about to be made. A crash from here on leaves a note by which the key is
// found and either kept, when the registry knows it, or destroyed.
func (k *Keyring) Stage(s Staged) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.write(stagedDir, s.KeyID, s)
}

// Unstage drops the note.
func (k *Keyring) Unstage(keyID string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.remove(stagedDir, keyID)
}

// Staged returns the notes that are left.
func (k *Keyring) Staged() ([]Staged, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var out []Staged
	err := k.each(stagedDir, func(name string, data []byte) error {
		var s Staged
		if err := strict(data, &s); err != nil {
			return err
		}
		if s.KeyID != name {
			return errors.New("the note does not belong to its file")
		}
		out = append(out, s)
		return nil
	})
	return out, err
}

func (k *Keyring) write(sub, name string, v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("encoding a keyring file: %w", err)
	}
	if err := durable.WriteFile(k.path(sub, name), append(data, '\n'), 0o600); err != nil {
		return fmt.Errorf("writing a keyring file: %w", err)
	}
	return nil
}

func (k *Keyring) remove(sub, name string) error {
	if err := durable.Remove(k.path(sub, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing a keyring file: %w", err)
	}
	return nil
}

func (k *Keyring) path(sub, name string) string { return filepath.Join(k.dir, sub, name+".json") }
