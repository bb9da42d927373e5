//go:build cgo

package pkcs11

import (
	"errors"
	"os"
	"sync"

	"github.com/miekg/pkcs11"

	"github.com/trustd/trustd/signer"
)

// Numbers of PKCS#11 3.0 that the binding does not name.
const (
	ckmEdwardsKeyPairGen = 0x1055
	ckmEdDSA             = 0x1057
)

// cryptoki is the part of PKCS#11 that this package uses. *pkcs11.Ctx is one; tests script another.
type cryptoki interface {
	Initialize(opts ...pkcs11.InitializeOption) error
	Finalize() error
	GetSlotList(tokenPresent bool) ([]uint, error)
	GetTokenInfo(slot uint) (pkcs11.TokenInfo, error)
	GetMechanismList(slot uint) ([]*pkcs11.Mechanism, error)
	GetMechanismInfo(slot uint, m []*pkcs11.Mechanism) (pkcs11.MechanismInfo, error)
	OpenSession(slot uint, flags uint) (pkcs11.SessionHandle, error)
	CloseSession(s pkcs11.SessionHandle) error
	GetSessionInfo(s pkcs11.SessionHandle) (pkcs11.SessionInfo, error)
	Login(s pkcs11.SessionHandle, user uint, pin string) error
	FindObjectsInit(s pkcs11.SessionHandle, template []*pkcs11.Attribute) error
	FindObjects(s pkcs11.SessionHandle, max int) ([]pkcs11.ObjectHandle, bool, error)
	FindObjectsFinal(s pkcs11.SessionHandle) error
	GetAttributeValue(s pkcs11.SessionHandle, o pkcs11.ObjectHandle, a []*pkcs11.Attribute) ([]*pkcs11.Attribute, error)
	GenerateKeyPair(s pkcs11.SessionHandle, m []*pkcs11.Mechanism, public, private []*pkcs11.Attribute) (
		pkcs11.ObjectHandle, pkcs11.ObjectHandle, error)
	CreateObject(s pkcs11.SessionHandle, template []*pkcs11.Attribute) (pkcs11.ObjectHandle, error)
	DestroyObject(s pkcs11.SessionHandle, o pkcs11.ObjectHandle) error
	SignInit(s pkcs11.SessionHandle, m []*pkcs11.Mechanism, o pkcs11.ObjectHandle) error
	Sign(s pkcs11.SessionHandle, msg []byte) ([]byte, error)
}

// A module is a loaded shared object. PKCS#11 has one state per process and module, so that backends of one
// module share it: only the last user may finalise.
type module struct {
	cryptoki
	mu    sync.Mutex
	users int
}

var modules struct {
	sync.Mutex
	loaded map[string]*module
}

// load returns the module at path. A module is never unloaded: many of them do not survive that.
func load(path string) (*module, error) {
	modules.Lock()
	defer modules.Unlock()
	if m := modules.loaded[path]; m != nil {
		return m, nil
	}
	if _, err := os.Stat(path); err != nil {
		return nil, &failure{class: signer.TokenLost, op: "loading the module", cause: errors.Join(errNoModule, err)}
	}
	ctx := pkcs11.New(path)
	if ctx == nil {
		return nil, &failure{class: signer.TokenLost, op: "loading the module", cause: errNotAModule}
	}
	m := &module{cryptoki: ctx}
	if modules.loaded == nil {
		modules.loaded = map[string]*module{}
	}
	modules.loaded[path] = m
	return m, nil
}

// enter makes the caller a user of the module and initialises it.
func (m *module) enter() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	err := m.Initialize()
	if err != nil && !errors.Is(err, pkcs11.Error(pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED)) {
		return failed("C_Initialize", err)
	}
	m.users++
	return nil
}

// leave ends one use; the last user finalises, which also closes all sessions.
func (m *module) leave() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.users--
	if m.users == 0 {
		_ = m.Finalize() // a module that cannot even finalise is initialised again or left alone
	}
}

var (
	errNoModule   = errors.New("no such module")
	errNotAModule = errors.New("not a PKCS#11 module, or one that cannot be loaded")
	errNoToken    = errors.New("no token with that label and serial is present")
	errTwoTokens  = errors.New("several tokens have that label and serial")
	errHangs      = errors.New("a call into the module does not come back")
)
