package monitor

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/durable"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/batch"
)

// A record is what is kept of a canary key: its file is written before the key is made and again after, so that a crash
// leaves no key that nobody knows. It is never written anew because a device looks empty.
type record struct {
	Backend string          `json:"backend"`
	KeyID   string          `json:"key_id"`              // signer.ID in hexadecimal digits
	Public  ident.PublicKey `json:"public_key,omitzero"` // zero: begun, perhaps not made
	Serial  string          `json:"serial,omitempty"`    // of the device, where it has one
	MadeAt  time.Time       `json:"made_at,omitzero"`
}

// A canary is the monitor's own key on the device.
type canary struct {
	m    *Monitor
	turn chan struct{} // held by who uses the key; record and line are changed by its holder

	// Guarded by Monitor.mu.
	record *record
	read   bool          // record is what the file holds
	began  time.Duration // when the last one was asked to sign
	signed time.Duration // began, of the last one that did

	line *batch.Key // nil until the device has shown the key
	// Where a device has no room for the key, or no leave to make it, it is not asked twice a second.
	refusal error
	again   time.Duration // boot clock
}

const (
	textGone     = "the device no longer holds its canary key: it was emptied or replaced"
	textReplaced = "another device is in its place, which does not hold its canary key"
	textCorrupt  = "the record of its canary key cannot be read"
)

// Prove has the canary key sign now, and returns why it did not. Calls at the same time share one that began after them.
func (m *Monitor) Prove(ctx context.Context) error {
	if !m.Running() {
		return fault.New(fault.Unavailable, "the backend is not watched")
	}
	asked := m.cfg.Clock.Boot()
	release, err := m.canary.hold(ctx)
	if err != nil {
		return err
	}
	defer release()
	m.mu.Lock()
	shared := m.canary.signed > 0 && m.canary.signed >= asked
	m.mu.Unlock()
	if shared {
		return nil
	}
	return m.canary.sign(ctx)
}

func (c *canary) hold(ctx context.Context) (release func(), err error) {
	select {
	case c.turn <- struct{}{}:
		return func() { <-c.turn }, nil
	case <-ctx.Done():
		return nil, fault.From(ctx.Err())
	}
}

// exists reports whether a canary key was made.
func (c *canary) exists() bool {
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	return c.record != nil && !c.record.Public.IsZero()
}

// sign makes one signature, in the device's queue, and judges its failure.
func (c *canary) sign(ctx context.Context) error {
	m := c.m
	began := m.cfg.Clock.Boot()
	m.mu.Lock()
	c.began = began
	m.figures.Canaries++
	m.mu.Unlock()
	err := c.try(ctx)
	now := m.cfg.Clock.Boot()
	m.mu.Lock()
	defer m.mu.Unlock()
	defer m.judgeLocked()
	if err == nil {
		c.signed, m.figures.CanaryTook, m.gone, m.hindered = began, now-began, "", nil
		return nil
	}
	m.figures.CanariesFailed++
	if ctx.Err() != nil && errors.Is(err, fault.Canceled) { // whoever asked went away
		return err
	}
	m.hindered = fault.From(err)
	switch class := classOf(err); {
	case class == signer.AuthorisationRefused:
		m.lostLocked(now, m.hindered)
		m.refused = true
	case class == signer.KeyGone:
		m.gone = c.goneLocked()
	case class == "" && m.proof < began && errors.Is(err, fault.DeadlineExceeded):
		m.lostLocked(now, m.hindered) // the device hangs: nothing came out of it meanwhile
	}
	return err
}

// goneLocked says in what way the key is gone.
func (c *canary) goneLocked() string {
	now := c.m.seen.Limits["serial"]
	if c.record != nil && c.record.Serial != "" && now != "" && now != c.record.Serial {
		return textReplaced
	}
	return textGone
}

func (c *canary) try(ctx context.Context) error {
	if err := c.open(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, canaryLimit)
	defer cancel()
	var salt [16]byte
	_, _ = rand.Read(salt[:]) // never fails (crypto/rand)
	msg := signature.Encode(signature.Canary, []byte(c.m.cfg.Name), salt[:])
	out := c.line.Sign(ctx, batch.Caller{}, []batch.Item{{Subject: signature.Subject{Message: msg}}})
	if out[0].Err != nil {
		c.line = nil // the next one looks for the key anew
	}
	return out[0].Err
}

// open finds the key on the device, or makes it where there never was one.
func (c *canary) open(ctx context.Context) error {
	if c.line != nil {
		return nil
	}
	if err := c.load(); err != nil {
		return err
	}
	if c.record == nil || c.record.Public.IsZero() {
		return c.make(ctx)
	}
	ctx, cancel := context.WithTimeout(ctx, canaryLimit)
	defer cancel()
	id, err := signer.ParseID(c.record.KeyID)
	if err != nil {
		return err
	}
	key, err := c.m.cfg.Backend.Open(ctx, id, c.record.Public)
	if err != nil {
		c.m.Report(err)
		return err
	}
	c.line = c.m.cfg.Line(batch.Plain(key))
	return nil
}

// load reads the record once.
func (c *canary) load() error {
	if c.read {
		return nil
	}
	r, err := readRecord(c.m.cfg.Dir, c.m.cfg.Name)
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	if err != nil {
		c.m.gone = textCorrupt
		return err
	}
	c.record, c.read = r, true
	return nil
}

func path(dir, name string) string { return filepath.Join(dir, name+".json") }

// readRecord returns the record of a backend's canary key, nil where there is none.
func readRecord(dir, name string) (*record, error) {
	data, err := os.ReadFile(path(dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault.Wrap(fault.Corrupt, err, textCorrupt)
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	var r record
	if err := dec.Decode(&r); err != nil {
		return nil, fault.Wrap(fault.Corrupt, err, textCorrupt)
	}
	if _, err := signer.ParseID(r.KeyID); err != nil || r.Backend != name {
		return nil, fault.Wrap(fault.Corrupt, err, textCorrupt)
	}
	return &r, nil
}

// put makes a record durable.
func (c *canary) put(r record) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("encoding the record of a canary key: %w", err)
	}
	if err := durable.MkdirAll(c.m.cfg.Dir); err != nil {
		return fmt.Errorf("making the folder of canary keys: %w", err)
	}
	if err := durable.WriteFile(path(c.m.cfg.Dir, c.m.cfg.Name), append(data, '\n'), 0o600); err != nil {
		return fmt.Errorf("writing the record of a canary key: %w", err)
	}
	c.m.mu.Lock()
	c.record, c.read = &r, true
	c.m.mu.Unlock()
	return nil
}

// make makes the key, on a device that says it is ready.
func (c *canary) make(ctx context.Context) error {
	c.m.mu.Lock()
	d, seen := c.m.seen, c.m.seenAt > 0
	c.m.mu.Unlock()
	if now := c.m.cfg.Clock.Boot(); c.refusal != nil && now < c.again {
		return c.refusal
	}
	if !seen || !answers(d) {
		return fault.New(fault.DeviceLost, "the device is not ready for a canary key")
	}
	if len(d.Algorithms) == 0 {
		return fault.New(fault.AlgorithmUnsupported, "the device makes no keys, not even a canary key")
	}
	ctx, cancel := context.WithTimeout(ctx, makeLimit)
	defer cancel()
	backend := c.m.cfg.Backend
	if c.record != nil { // begun, and nobody knows how far it came
		id, err := signer.ParseID(c.record.KeyID)
		if err != nil {
			return err
		}
		if err := backend.Destroy(ctx, id); err != nil {
			c.m.Report(err)
			return err
		}
	}
	var raw [16]byte
	_, _ = rand.Read(raw[:])
	id, err := signer.NewID(raw[:])
	if err != nil {
		return err
	}
	r := record{Backend: c.m.cfg.Name, KeyID: id.String()}
	if err := c.put(r); err != nil {
		return err
	}
	key, err := backend.Generate(ctx, id, d.Algorithms[0])
	if err != nil {
		c.m.Report(err)
		c.refusal, c.again = err, c.m.cfg.Clock.Boot()
		if !fault.CodeOf(err).Retryable() || classOf(err) == signer.ResourcesExhausted {
			c.again += proofEvery
		}
		return err
	}
	c.refusal = nil
	r.Public, r.Serial, r.MadeAt = key.Public(), d.Limits["serial"], c.m.cfg.Clock.Now()
	if err := c.put(r); err != nil {
		return err
	}
	c.line = c.m.cfg.Line(batch.Plain(key))
	c.m.cfg.Log.Info("made a canary key", "key_id", r.KeyID, "algorithm", d.Algorithms[0].String())
	return nil
}

// ResetCanary takes the device as it is: an operator's verb. Where the canary key is gone for good another is made; where
// it signs nothing changes; and a device that cannot say which of the two it is keeps its record.
func (m *Monitor) ResetCanary(ctx context.Context) error {
	if !m.Running() {
		return fault.New(fault.Unavailable, "the backend is not watched")
	}
	m.Refresh(ctx, 0)
	release, err := m.canary.hold(ctx)
	if err != nil {
		return err
	}
	defer release()
	defer m.Wake()
	c := &m.canary
	err = c.sign(ctx)
	switch {
	case err == nil:
		return nil
	case !Gone(err) && !errors.Is(err, fault.Corrupt):
		return err
	}
	m.mu.Lock()
	before := c.record
	c.record, c.read, m.gone = nil, true, ""
	m.mu.Unlock()
	c.refusal = nil
	if err := c.make(ctx); err != nil {
		m.mu.Lock()
		if c.record == nil { // nothing was written
			c.record, c.read, m.gone = before, before != nil, textGone
		}
		m.mu.Unlock()
		return err
	}
	m.cfg.Log.Warn("an operator took the device as it is, with another canary key")
	return c.sign(ctx)
}

// Inspect says what is wrong with the canary key of a backend that nobody watches; "" where nothing is known to be. It
// signs nothing and changes nothing.
func Inspect(ctx context.Context, dir, name string, b signer.Backend) (problem, remedy string) {
	r, err := readRecord(dir, name)
	switch {
	case err != nil:
		return textCorrupt, remedyGone + name
	case r == nil || r.Public.IsZero():
		return "", ""
	}
	id, err := signer.ParseID(r.KeyID)
	if err != nil {
		return textCorrupt, remedyGone + name
	}
	if _, err := b.Open(ctx, id, r.Public); Gone(err) {
		return textGone, remedyGone + name
	}
	return "", ""
}

// IsCanary reports whether a key of the backend is its canary key.
func (m *Monitor) IsCanary(id signer.ID) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.canary.record != nil && m.canary.record.KeyID == id.String()
}
