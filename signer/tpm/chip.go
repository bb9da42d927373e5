package tpm

import (
	"bytes"
	"container/list"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/tpmdev"
	"github.com/trustd/trustd/signer"
)

// A chip is what is loaded on the TPM: an HMAC session, the storage root key and the keys used last. It belongs to
// the Device's jobs and is touched inside one only. Nothing in it survives a change of epoch.
type chip struct {
	notes   *notes
	conn    *tpmdev.Conn // of the job that runs
	epoch   uint64
	facts   *facts
	slots   int       // that we use: as many as the TPM names, fewer once it had no room for them
	parents []*object // the storage keys found; new keys go under the first
	session tpm2.Session
	loaded  []*object // least recently used first
	saved   list.List // objects with a saved context, least recently used first
}

// maxSaved bounds the saved contexts, each of one to two kilobytes, which stay in our memory. A key without one is
// loaded from its blob.
const maxSaved = 1024

// An object is a key that can be loaded into one of the TPM's few slots.
type object struct {
	area    tpm2.TPMTPublic
	public  []byte // TPMT_PUBLIC
	private []byte // encrypted by the TPM; nil for a storage key
	parent  []byte // name of the storage key above; nil when not known
	name    tpm2.TPM2BName

	// Owned by the chip, and good in one epoch.
	epoch      uint64
	handle     tpm2.TPMHandle // 0 = not loaded
	persistent bool
	context    *tpm2.TPMSContext // loads faster than the blob, and without the parent
	saved      *list.Element     // in the chip's list of contexts
}

func newObject(public, private, parent []byte) (*object, error) {
	area, err := tpm2.Unmarshal[tpm2.TPMTPublic](public)
	if err != nil {
		return nil, fmt.Errorf("reading a public area: %w", err)
	}
	name, err := tpm2.ObjectName(area)
	if err != nil {
		return nil, fmt.Errorf("naming a public area: %w", err)
	}
	return &object{area: *area, public: public, private: private, parent: parent, name: *name}, nil
}

// repairs bounds how often one job begins anew after each kind of loss that the chip can repair.
func repairs() map[signer.Class]int {
	return map[signer.Class]int{
		signer.SessionLost: 1, signer.LoginLost: 1, signer.HandleLost: 1, signer.TokenLost: 1, signer.ResourcesExhausted: 2,
	}
}

// run does f, and does it again after it put right what was lost: a session, handles, room.
func (ch *chip) run(conn *tpmdev.Conn, f func(*chip) error) error {
	ch.conn = conn
	var left map[signer.Class]int
	for {
		err := ch.begin()
		if err == nil {
			err = f(ch)
		}
		if err == nil {
			return nil
		}
		c := ch.notes.command(err)
		again := ch.repair(c, err) // what is lost is dropped even at the last
		if left == nil {
			left = repairs()
		}
		if left[c]--; !again || left[c] < 0 {
			return err
		}
	}
}

// begin forgets what an earlier epoch knew.
func (ch *chip) begin() error {
	if ch.epoch != ch.conn.Epoch() {
		ch.dropContexts()
		*ch = chip{notes: ch.notes, conn: ch.conn, epoch: ch.conn.Epoch()}
	}
	if ch.facts != nil {
		return nil
	}
	f, err := readFacts(ch.conn)
	if err != nil {
		return err
	}
	ch.facts, ch.slots = f, f.slots
	return nil
}

// repair puts right what a failure of this class says is wrong, and reports whether trying again makes sense.
func (ch *chip) repair(c signer.Class, err error) bool {
	switch c {
	case signer.SessionLost:
		ch.endSession()
	case signer.LoginLost:
		if errors.Is(err, errProof) { // whether the command was done, and what it left loaded, is not known
			ch.conn.Abandon(err)
			return false
		}
		ch.endSession()
	case signer.HandleLost:
		ch.clear()
	case signer.ResourcesExhausted:
		held := len(ch.loaded)
		ch.clear()
		foreign, ferr := ch.conn.FlushAll()
		if ferr == nil && foreign == 0 && noSlot(err) { // all that was loaded was ours: it has fewer slots than it says
			ch.slots = max(min(ch.slots, held), fewestSlots)
		}
		return ferr == nil
	case signer.TokenLost, signer.ModuleDead:
		if defunct(err) {
			ch.conn.Abandon(err)
		}
		return ch.epoch != ch.conn.Epoch() // reset and started again under an open connection
	default:
		return false
	}
	return true
}

// noSlot reports whether the TPM had no room for an object.
func noSlot(err error) bool {
	return errors.Is(err, tpm2.TPMRCObjectMemory) || errors.Is(err, tpm2.TPMRCObjectHandles) || errors.Is(err, tpm2.TPMRCMemory)
}

// clear flushes and forgets all that is loaded. Handles that are gone already are no reason to stop.
func (ch *chip) clear() {
	for _, o := range ch.loaded {
		_, _ = tpm2.FlushContext{FlushHandle: o.handle}.Execute(ch.conn)
		ch.dropContext(o)
		o.handle = 0
	}
	ch.loaded, ch.parents = nil, nil
	ch.endSession()
}

func (ch *chip) endSession() {
	if ch.session != nil {
		_, _ = tpm2.FlushContext{FlushHandle: ch.session.Handle()}.Execute(ch.conn)
		ch.session = nil
	}
}

// release is clear for the Device, between jobs.
func (ch *chip) release(conn *tpmdev.Conn) {
	ch.conn = conn
	if ch.epoch == conn.Epoch() {
		ch.clear()
	}
}

// doubtRefusal looks at whose handle it was that refused us. The session's HMAC covers the key's name, so a handle
// that names another object since a reset looks like a wrong authorisation.
func (ch *chip) doubtRefusal(o *object, err error) error {
	if classify(err) != signer.AuthorisationRefused {
		return err
	}
	rsp, rerr := command(tpm2.ReadPublic{ObjectHandle: o.handle}.Execute(ch.conn))
	if rerr != nil {
		return errors.Join(rerr, err)
	}
	if !bytes.Equal(rsp.Name.Buffer, o.name.Buffer) {
		return errors.Join(tpm2.TPMRCHandle, err)
	}
	return fmt.Errorf("%w: %w", errKeyRefused, err)
}

// create makes a key under the storage root key.
func (ch *chip) create(template tpm2.TPMTPublic) (*object, error) {
	if err := ch.startSession(); err != nil {
		return nil, err
	}
	parent, err := ch.parent(nil)
	if err != nil {
		return nil, err
	}
	if err := ch.room(parent); err != nil {
		return nil, err
	}
	rsp, err := command(tpm2.Create{ParentHandle: ch.authorised(parent), InPublic: tpm2.New2B(template)}.Execute(ch.conn))
	if err != nil {
		return nil, ch.noteRefusal(fmt.Errorf("creating a key: %w", err))
	}
	return newObject(rsp.OutPublic.Bytes(), rsp.OutPrivate.Buffer, parent.name.Buffer)
}

// load brings a key into a slot: from its saved context, else from its blob through its parent.
func (ch *chip) load(o *object) error {
	if ch.resident(o) {
		return nil
	}
	if ok, err := ch.loadContext(o); ok || err != nil {
		return err
	}
	if err := ch.startSession(); err != nil {
		return err
	}
	parent, err := ch.parent(o)
	if err != nil {
		return err
	}
	if err := ch.room(parent); err != nil {
		return err
	}
	rsp, err := command(tpm2.Load{
		ParentHandle: ch.authorised(parent),
		InPrivate:    tpm2.TPM2BPrivate{Buffer: o.private},
		InPublic:     tpm2.BytesAs2B[tpm2.TPMTPublic](o.public),
	}.Execute(ch.conn))
	if classify(err) == signer.CallerError {
		return keyGone(err, "the key's files are damaged")
	}
	if err != nil {
		return ch.noteRefusal(fmt.Errorf("loading a key: %w", err))
	}
	ch.occupy(o, rsp.ObjectHandle)
	if !bytes.Equal(rsp.Name.Buffer, o.name.Buffer) {
		return errProof
	}
	return nil
}

// loadContext brings an object back that was evicted, and reports whether it could. A context that the TPM does
// not take is forgotten: there is another way.
func (ch *chip) loadContext(o *object) (bool, error) {
	if o.epoch != ch.epoch || o.context == nil {
		return false, nil
	}
	if err := ch.room(nil); err != nil {
		return false, err
	}
	rsp, err := command(tpm2.ContextLoad{Context: *o.context}.Execute(ch.conn))
	switch {
	case err == nil:
		ch.occupy(o, rsp.LoadedHandle)
		ch.saved.MoveToBack(o.saved)
		return true, nil
	case classify(err) == signer.TokenLost, errors.Is(err, errProof):
		return false, err
	}
	ch.notes.command(err)
	ch.dropContext(o)
	return false, nil
}

// keepContext notes the saved context of o, in place of the one that was of no use for longest.
func (ch *chip) keepContext(o *object, c *tpm2.TPMSContext) {
	o.context, o.saved = c, ch.saved.PushBack(o)
	if ch.saved.Len() > maxSaved {
		ch.dropContext(ch.saved.Front().Value.(*object))
	}
}

func (ch *chip) dropContext(o *object) {
	if o.context != nil && o.epoch == ch.epoch {
		ch.saved.Remove(o.saved)
	}
	o.context, o.saved = nil, nil
}

// dropContexts forgets all saved contexts.
func (ch *chip) dropContexts() {
	for e := ch.saved.Front(); e != nil; e = e.Next() {
		o := e.Value.(*object)
		o.context, o.saved = nil, nil
	}
	ch.saved.Init()
}

// occupy notes that o was loaded.
func (ch *chip) occupy(o *object, h tpm2.TPMHandle) {
	o.epoch, o.handle = ch.epoch, h // contexts of an earlier epoch were dropped with it
	ch.loaded = append(ch.loaded, o)
}

// resident reports whether o is loaded, and notes the use.
func (ch *chip) resident(o *object) bool {
	if o.epoch != ch.epoch || o.handle == 0 {
		return false
	}
	if i := slices.Index(ch.loaded, o); i >= 0 {
		copy(ch.loaded[i:], ch.loaded[i+1:])
		ch.loaded[len(ch.loaded)-1] = o
	}
	return true
}

// room frees a slot for a command that makes an object, and one more when the command works through a persistent
// key: that occupies a slot while in use. parent, which is loaded, stays.
func (ch *chip) room(parent *object) error {
	need, keep := 1, 0
	switch {
	case parent != nil && parent.persistent:
		need = 2
	case parent != nil:
		keep = 1
		ch.resident(parent) // the last to go
	}
	for len(ch.loaded) > max(ch.slots-need, keep) {
		if err := ch.evict(ch.loaded[0]); err != nil {
			return err
		}
	}
	return nil
}

// evict flushes the object, saving its context the first time.
func (ch *chip) evict(o *object) error {
	if o.context == nil {
		rsp, err := command(tpm2.ContextSave{SaveHandle: o.handle}.Execute(ch.conn))
		if err == nil {
			ch.keepContext(o, &rsp.Context)
		} else if c := classify(err); c != signer.CallerError {
			return fmt.Errorf("saving a key's context: %w", err)
		}
	}
	return ch.flush(o)
}

// flush takes the object out of its slot.
func (ch *chip) flush(o *object) error {
	if _, err := command(tpm2.FlushContext{FlushHandle: o.handle}.Execute(ch.conn)); err != nil {
		return fmt.Errorf("flushing a key: %w", err)
	}
	ch.loaded = slices.DeleteFunc(ch.loaded, func(x *object) bool { return x == o })
	o.handle = 0
	return nil
}

// forget drops a key that was destroyed.
func (ch *chip) forget(o *object) error {
	if o.epoch == ch.epoch && o.handle != 0 {
		if err := ch.flush(o); err != nil {
			return err
		}
	}
	ch.dropContext(o)
	return nil
}

// authorised returns the handle of a loaded object together with the session that proves command and response.
func (ch *chip) authorised(o *object) tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: o.handle, Name: o.name, Auth: ch.session}
}

// startSession starts the HMAC session, unless there is one. It is salted to the storage root key: only the TPM
// that holds that key can know the session's, so what sits between us and the chip can neither alter a command nor
// fake a response. No command of ours carries a secret in the clear, so nothing is encrypted. Starting needs the
// storage root key in a slot; so it comes before the key that is to be used is loaded.
func (ch *chip) startSession() error {
	if ch.session != nil {
		return nil
	}
	srk, err := ch.parent(nil)
	if err != nil {
		return err
	}
	if srk.persistent {
		if err := ch.room(srk); err != nil {
			return err
		}
	}
	s, _, err := tpm2.HMACSession(ch.conn, tpm2.TPMAlgSHA256, 16, tpm2.Salted(srk.handle, srk.area))
	if _, err = command(&s, err); err != nil {
		return fmt.Errorf("starting a session: %w", err)
	}
	ch.session = s
	return nil
}

// parent returns the storage key above o, loaded; for nil the one that new keys go under. A key whose storage key
// this TPM does not have was made by another TPM, or before this one was cleared.
func (ch *chip) parent(o *object) (*object, error) {
	if e := ch.notes.refused.Load(); e != nil {
		return nil, e
	}
	for i := 0; ; i++ {
		if i == len(ch.parents) {
			p, err := ch.findParent(i)
			if err != nil {
				return nil, ch.noteRefusal(err)
			}
			if p == nil {
				if err := ch.ping(); err != nil { // all storage keys may be from memory, and the TPM another since
					return nil, err
				}
				return nil, keyGone(nil, "the key belongs to another TPM, or to this one before it was cleared")
			}
			ch.parents = append(ch.parents, p)
		}
		p := ch.parents[i]
		if o != nil && o.parent != nil && !bytes.Equal(o.parent, p.name.Buffer) {
			continue
		}
		if p.persistent {
			return p, nil
		}
		return p, ch.loadPrimary(p)
	}
}

// noteRefusal remembers that the hierarchy or the storage key in it refused us. It is not asked again until an
// operator says so, whatever connection or TPM is there then.
func (ch *chip) noteRefusal(err error) error {
	if classify(err) == signer.AuthorisationRefused {
		ch.notes.refused.CompareAndSwap(nil, known(err))
		ch.notes.log.Error("the TPM refuses its storage hierarchy; it is not asked again until an operator unlocks it",
			"cause", err)
	}
	return err
}

// allParents returns all storage keys of ours that the TPM has.
func (ch *chip) allParents() ([]*object, error) {
	_, err := ch.parent(&object{parent: []byte("none")}) // looks at each
	if fault.CodeOf(err) == fault.KeyGone {
		err = nil
	}
	return slices.Clone(ch.parents), err
}

// under reports whether one of the storage keys is the one above o, as far as is known.
func (o *object) under(parents []*object) bool {
	return o.parent == nil || slices.ContainsFunc(parents, func(p *object) bool {
		return bytes.Equal(p.name.Buffer, o.parent)
	})
}

// ping asks for something cheap.
func (ch *chip) ping() error {
	_, err := command(tpm2.ReadClock{}.Execute(ch.conn))
	return err
}

// findParent returns the storage keys that a TPM may have, one by one: the persistent one where provisioning made
// one of the TCG's template, then the primary that anyone with the owner's authorisation can derive again.
func (ch *chip) findParent(i int) (*object, error) {
	switch {
	case i == 0:
		p, err := ch.persistentSRK()
		if p != nil || err != nil {
			return p, err
		}
		return ch.primary()
	case i == 1 && ch.parents[0].persistent:
		return ch.primary()
	}
	return nil, nil
}

// persistentSRK returns the storage root key at its well-known handle, or nil where there is none that fits.
func (ch *chip) persistentSRK() (*object, error) {
	rsp, err := command(tpm2.ReadPublic{ObjectHandle: srkHandle}.Execute(ch.conn))
	switch c := classify(err); {
	case c == signer.HandleLost || c == signer.CallerError:
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("reading the persistent storage root key: %w", err)
	}
	o, err := newObject(rsp.OutPublic.Bytes(), nil, nil)
	if err != nil || !bytes.Equal(o.name.Buffer, rsp.Name.Buffer) {
		return nil, errors.Join(errProof, err)
	}
	if !isSRK(o.area) {
		return nil, nil
	}
	o.epoch, o.handle, o.persistent = ch.epoch, srkHandle, true
	return o, nil
}

// primary derives the storage root key from the TPM's seed and returns it, loaded.
func (ch *chip) primary() (*object, error) {
	if err := ch.room(nil); err != nil {
		return nil, err
	}
	rsp, err := command(tpm2.CreatePrimary{
		PrimaryHandle: tpm2.TPMRHOwner,
		InPublic:      tpm2.New2B(tpm2.ECCSRKTemplate),
	}.Execute(ch.conn))
	if err != nil {
		return nil, fmt.Errorf("deriving the storage root key: %w", err)
	}
	o, err := newObject(rsp.OutPublic.Bytes(), nil, nil)
	if err != nil {
		return nil, errors.Join(errProof, err)
	}
	ch.occupy(o, rsp.ObjectHandle)
	return o, nil
}

// loadPrimary brings a primary that was evicted back.
func (ch *chip) loadPrimary(o *object) error {
	if ch.resident(o) {
		return nil
	}
	if ok, err := ch.loadContext(o); ok || err != nil {
		return err
	}
	fresh, err := ch.primary()
	if err != nil {
		return err
	}
	if !bytes.Equal(fresh.name.Buffer, o.name.Buffer) { // TPM2_Clear gave the hierarchy another seed
		return tpm2.TPMRCHandle
	}
	ch.loaded[len(ch.loaded)-1] = o
	o.handle = fresh.handle
	return nil
}
