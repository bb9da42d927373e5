//go:build cgo

package pkcs11

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"slices"
	"sync"
	"testing"

	"github.com/miekg/pkcs11"
)

// fakeToken is a PKCS#11 module with one token of Ed25519 keys. It keeps the rules that matter for recovery: object
// handles die with the login, private objects need one, sessions die with the module. Failures are scripted.
type fakeToken struct {
	mu       sync.Mutex
	script   map[string][]error // next results of a function; nil entries succeed
	calls    map[string]int
	hang     map[string]chan struct{} // a function waits here before it answers
	tamper   bool                     // signatures come out wrong
	flips    int                      // so many of them
	bad      pkcs11.SessionHandle     // this session's do
	sick     bool                     // signing fails until the module is initialised anew
	gone     bool                     // pulled out
	stale    bool                     // back, but its index is empty until the module is initialised anew
	flags    uint
	label    string
	serial   string
	twin     string // serial of the other tokens with the same label, which hold no keys
	at       uint   // the slot of the token with the keys
	maker    string
	tokens   int // with the same label
	pin      string
	vague    bool // a wrong PIN is called a failed function
	maxOpen  int
	ready    bool
	loggedIn bool
	epoch    uint // of the login: part of each object handle
	last     uint
	sessions map[pkcs11.SessionHandle][]pkcs11.ObjectHandle // and what is left of their search
	slotOf   map[pkcs11.SessionHandle]uint
	signing  map[pkcs11.SessionHandle]uint
	keys     map[uint]*fakeKey
}

type fakeKey struct {
	attrs   map[uint][]byte
	pub     map[uint][]byte
	private ed25519.PrivateKey
}

func newFake() *fakeToken {
	return &fakeToken{
		script: map[string][]error{}, calls: map[string]int{}, hang: map[string]chan struct{}{}, label: "fake",
		serial: "1", twin: "1", maker: "ACME", tokens: 1, pin: "1234", maxOpen: 100,
		flags:    pkcs11.CKF_TOKEN_INITIALIZED | pkcs11.CKF_LOGIN_REQUIRED,
		sessions: map[pkcs11.SessionHandle][]pkcs11.ObjectHandle{}, signing: map[pkcs11.SessionHandle]uint{},
		slotOf: map[pkcs11.SessionHandle]uint{}, keys: map[uint]*fakeKey{},
	}
}

// backend returns a backend on the fake with n sessions.
func (f *fakeToken) backend(t testing.TB, n int) *Backend {
	m := &library{cryptoki: f}
	b := newBackend(Config{
		TokenLabel: "fake", Sessions: n, PIN: func(context.Context) ([]byte, error) { return []byte("1234"), nil },
	})
	b.load = func() (*library, error) { return m, nil }
	t.Cleanup(func() { _ = b.Close() })
	return b
}

// next scripts the results of the coming calls of a function.
func (f *fakeToken) next(function string, results ...error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.script[function] = append(f.script[function], results...)
}

func (f *fakeToken) count(function string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[function]
}

// set changes the fake under its lock.
func (f *fakeToken) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func rv(code uint) error { return pkcs11.Error(code) }

// enter begins a call: it returns the scripted result, or what the module's state demands.
func (f *fakeToken) enter(function string) error {
	f.mu.Lock()
	wait := f.hang[function]
	f.mu.Unlock()
	if wait != nil {
		<-wait
	}
	f.mu.Lock()
	f.calls[function]++
	if s := f.script[function]; len(s) > 0 {
		f.script[function] = s[1:]
		if s[0] != nil {
			return s[0]
		}
	}
	if !f.ready && function != "Initialize" {
		return rv(pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED)
	}
	return nil
}

func (f *fakeToken) session(s pkcs11.SessionHandle) error {
	if _, ok := f.sessions[s]; !ok {
		return rv(pkcs11.CKR_SESSION_HANDLE_INVALID)
	}
	return nil
}

func (f *fakeToken) Initialize(...pkcs11.InitializeOption) error {
	err := f.enter("Initialize")
	defer f.mu.Unlock()
	if err == nil && f.ready {
		err = rv(pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED)
	}
	if err == nil {
		f.ready, f.stale, f.sick = true, f.gone, false
	}
	return err
}

func (f *fakeToken) Finalize() error {
	err := f.enter("Finalize")
	defer f.mu.Unlock()
	if err == nil {
		f.ready = false
		f.logout()
	}
	return err
}

// anySession returns one that is open.
func (f *fakeToken) anySession() pkcs11.SessionHandle {
	last := pkcs11.SessionHandle(0)
	for s := range f.sessions {
		last = max(last, s)
	}
	return last
}

// logout ends all sessions, and with them the login and the object handles.
func (f *fakeToken) logout() {
	clear(f.sessions)
	f.loggedIn = false
	f.epoch++
}

func (f *fakeToken) GetSlotList(bool) ([]uint, error) {
	err := f.enter("GetSlotList")
	defer f.mu.Unlock()
	if f.gone {
		return nil, err
	}
	out := make([]uint, f.tokens)
	for i := range out {
		out[i] = uint(i)
	}
	return out, err
}

func (f *fakeToken) GetTokenInfo(slot uint) (pkcs11.TokenInfo, error) {
	err := f.enter("GetTokenInfo")
	defer f.mu.Unlock()
	if err == nil && f.gone {
		err = rv(pkcs11.CKR_GENERAL_ERROR)
	}
	serial := f.serial
	if slot != f.at {
		serial = f.twin
	}
	return pkcs11.TokenInfo{Label: f.label, SerialNumber: serial, ManufacturerID: f.maker, Flags: f.flags}, err
}

func (f *fakeToken) GetMechanismList(uint) ([]*pkcs11.Mechanism, error) {
	err := f.enter("GetMechanismList")
	defer f.mu.Unlock()
	return []*pkcs11.Mechanism{pkcs11.NewMechanism(ckmEdDSA, nil), pkcs11.NewMechanism(ckmEdwardsKeyPairGen, nil)}, err
}

func (f *fakeToken) GetMechanismInfo(uint, []*pkcs11.Mechanism) (pkcs11.MechanismInfo, error) {
	return pkcs11.MechanismInfo{}, nil
}

func (f *fakeToken) OpenSession(slot uint, _ uint) (pkcs11.SessionHandle, error) {
	err := f.enter("OpenSession")
	defer f.mu.Unlock()
	if err == nil && len(f.sessions) >= f.maxOpen {
		err = rv(pkcs11.CKR_SESSION_COUNT)
	}
	if err != nil {
		return 0, err
	}
	f.last++
	f.sessions[pkcs11.SessionHandle(f.last)] = nil
	f.slotOf[pkcs11.SessionHandle(f.last)] = slot
	return pkcs11.SessionHandle(f.last), nil
}

func (f *fakeToken) CloseSession(s pkcs11.SessionHandle) error {
	err := f.enter("CloseSession")
	defer f.mu.Unlock()
	if err == nil {
		err = f.session(s)
	}
	delete(f.sessions, s)
	if len(f.sessions) == 0 {
		f.logout()
	}
	return err
}

func (f *fakeToken) GetSessionInfo(s pkcs11.SessionHandle) (pkcs11.SessionInfo, error) {
	err := f.enter("GetSessionInfo")
	defer f.mu.Unlock()
	if err == nil {
		err = f.session(s)
	}
	state := uint(pkcs11.CKS_RW_PUBLIC_SESSION)
	if f.loggedIn {
		state = pkcs11.CKS_RW_USER_FUNCTIONS
	}
	return pkcs11.SessionInfo{State: state}, err
}

func (f *fakeToken) Login(s pkcs11.SessionHandle, _ uint, pin string) error {
	err := f.enter("Login")
	defer f.mu.Unlock()
	switch {
	case err != nil:
	case f.session(s) != nil:
		err = f.session(s)
	case f.loggedIn:
		err = rv(pkcs11.CKR_USER_ALREADY_LOGGED_IN)
	case pin != f.pin && f.vague:
		f.flags |= pkcs11.CKF_USER_PIN_COUNT_LOW
		err = rv(pkcs11.CKR_FUNCTION_FAILED)
	case pin != f.pin:
		err = rv(pkcs11.CKR_PIN_INCORRECT)
	default:
		f.loggedIn = true
		f.epoch++
	}
	return err
}

const (
	fakePublic = 500 // added to a private key's number
	fakeEpoch  = 1000
)

// object returns the attributes behind a handle.
func (f *fakeToken) object(o pkcs11.ObjectHandle) (map[uint][]byte, uint, error) {
	if uint(o)/fakeEpoch != f.epoch || f.gone || f.stale {
		return nil, 0, rv(pkcs11.CKR_OBJECT_HANDLE_INVALID)
	}
	n := uint(o) % fakeEpoch
	if k := f.keys[n%fakePublic]; k != nil {
		if n >= fakePublic {
			return k.pub, n % fakePublic, nil
		}
		return k.attrs, n, nil
	}
	return nil, 0, rv(pkcs11.CKR_OBJECT_HANDLE_INVALID)
}

func (f *fakeToken) FindObjectsInit(s pkcs11.SessionHandle, template []*pkcs11.Attribute) error {
	err := f.enter("FindObjectsInit")
	defer f.mu.Unlock()
	if err == nil {
		err = f.session(s)
	}
	if err != nil {
		return err
	}
	var found []pkcs11.ObjectHandle
	for n, k := range f.keys {
		for i, attrs := range []map[uint][]byte{k.attrs, k.pub} {
			private := i == 0
			matches := !f.gone && !f.stale && f.slotOf[s] == f.at && (!private || f.loggedIn)
			for _, a := range template {
				matches = matches && bytes.Equal(attrs[a.Type], a.Value)
			}
			if matches {
				found = append(found, pkcs11.ObjectHandle(f.epoch*fakeEpoch+n+uint(i)*fakePublic))
			}
		}
	}
	slices.Sort(found)
	f.sessions[s] = found
	return nil
}

func (f *fakeToken) FindObjects(s pkcs11.SessionHandle, max int) ([]pkcs11.ObjectHandle, bool, error) {
	err := f.enter("FindObjects")
	defer f.mu.Unlock()
	found := f.sessions[s]
	n := min(max, len(found))
	if err == nil {
		f.sessions[s] = found[n:]
	}
	return found[:n], false, err
}

func (f *fakeToken) FindObjectsFinal(pkcs11.SessionHandle) error {
	err := f.enter("FindObjectsFinal")
	defer f.mu.Unlock()
	return err
}

func (f *fakeToken) GetAttributeValue(_ pkcs11.SessionHandle, o pkcs11.ObjectHandle, want []*pkcs11.Attribute) (
	[]*pkcs11.Attribute, error) {
	err := f.enter("GetAttributeValue")
	defer f.mu.Unlock()
	if err != nil {
		return nil, err
	}
	attrs, _, err := f.object(o)
	if err != nil {
		return nil, err
	}
	var out []*pkcs11.Attribute
	for _, a := range want {
		v, ok := attrs[a.Type]
		if !ok {
			return nil, rv(pkcs11.CKR_ATTRIBUTE_TYPE_INVALID)
		}
		out = append(out, &pkcs11.Attribute{Type: a.Type, Value: v})
	}
	return out, nil
}

func (f *fakeToken) GenerateKeyPair(s pkcs11.SessionHandle, _ []*pkcs11.Mechanism,
	public, private []*pkcs11.Attribute) (pkcs11.ObjectHandle, pkcs11.ObjectHandle, error) {
	err := f.enter("GenerateKeyPair")
	defer f.mu.Unlock()
	if err == nil {
		err = f.session(s)
	}
	if err != nil {
		return 0, 0, err
	}
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return 0, 0, err
	}
	k := &fakeKey{attrs: map[uint][]byte{}, pub: map[uint][]byte{}, private: key}
	for _, a := range private {
		k.attrs[a.Type] = a.Value
	}
	for _, a := range public {
		k.pub[a.Type] = a.Value
	}
	yes, typ := []byte{1}, pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, keyTypeEdwards).Value
	k.attrs[pkcs11.CKA_KEY_TYPE], k.pub[pkcs11.CKA_KEY_TYPE] = typ, typ
	for _, t := range []uint{pkcs11.CKA_LOCAL, pkcs11.CKA_ALWAYS_SENSITIVE, pkcs11.CKA_NEVER_EXTRACTABLE} {
		k.attrs[t] = yes
	}
	k.pub[pkcs11.CKA_EC_POINT] = append([]byte{4, 32}, pub...)
	f.last++
	n := f.last % fakePublic
	f.keys[n] = k
	h := pkcs11.ObjectHandle(f.epoch*fakeEpoch + n)
	return h + fakePublic, h, nil
}

func (f *fakeToken) CreateObject(pkcs11.SessionHandle, []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	err := f.enter("CreateObject")
	defer f.mu.Unlock()
	if err == nil {
		err = rv(pkcs11.CKR_TEMPLATE_INCONSISTENT)
	}
	return 0, err
}

func (f *fakeToken) DestroyObject(_ pkcs11.SessionHandle, o pkcs11.ObjectHandle) error {
	err := f.enter("DestroyObject")
	defer f.mu.Unlock()
	if err != nil {
		return err
	}
	attrs, n, err := f.object(o)
	if err == nil && attrs[pkcs11.CKA_LOCAL] != nil { // the private one takes its public key along
		delete(f.keys, n)
	}
	if err != nil {
		return nil
	}
	return err
}

func (f *fakeToken) SignInit(s pkcs11.SessionHandle, _ []*pkcs11.Mechanism, o pkcs11.ObjectHandle) error {
	err := f.enter("SignInit")
	defer f.mu.Unlock()
	if err == nil {
		err = f.session(s)
	}
	if err != nil {
		return err
	}
	_, n, err := f.object(o)
	f.signing[s] = n
	return err
}

func (f *fakeToken) Sign(s pkcs11.SessionHandle, msg []byte) ([]byte, error) {
	err := f.enter("Sign")
	defer f.mu.Unlock()
	if err == nil && f.sick {
		err = rv(pkcs11.CKR_DEVICE_ERROR)
	}
	if err != nil {
		return nil, err
	}
	sig := ed25519.Sign(f.keys[f.signing[s]].private, msg)
	if f.tamper || f.flips > 0 || f.bad == s {
		sig[0] ^= 1
		f.flips = max(0, f.flips-1)
	}
	return sig, nil
}
