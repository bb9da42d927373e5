//go:build cgo

package pkcs11

import (
	"errors"
	"os"
	"strings"
	"sync"

	"github.com/miekg/pkcs11"

	"github.com/trustd/trustd/signer"
)

// Numbers of PKCS#11 3.0 that the binding does not name.
const (
	ckmEdwardsKeyPairGen = 0x1055
	ckmEdDSA             = 0x1057
)

// Cryptoki is the part of PKCS#11 that this package uses. Each method is the C function of its name and fails with a
// pkcs11.Error (github.com/miekg/pkcs11), the function's CKR_* value. Methods are called from many goroutines at once.
type Cryptoki interface {
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

// A library is a loaded shared object. PKCS#11 has one state per process and library, so that Backends of one library
// share it: only the last user may finalise. A token that came back without its index is found again only after
// that, so that a Backend recovers for certain only where it is the library's one user.
type library struct {
	cryptoki Cryptoki
	mu       sync.Mutex
	users    int
}

var libraries struct {
	sync.Mutex
	loaded map[string]*library
}

// load returns the library at path. It is never unloaded: many do not survive that.
func load(path string) (*library, error) {
	libraries.Lock()
	defer libraries.Unlock()
	if m := libraries.loaded[path]; m != nil {
		return m, nil
	}
	if _, err := os.Stat(path); err != nil {
		return nil, &failure{class: signer.TokenLost, op: "loading the module", cause: errors.Join(errNoModule, err)}
	}
	ctx := pkcs11.New(path)
	if ctx == nil {
		return nil, &failure{class: signer.TokenLost, op: "loading the module", cause: errNotAModule}
	}
	m := &library{cryptoki: ctx}
	if libraries.loaded == nil {
		libraries.loaded = map[string]*library{}
	}
	libraries.loaded[path] = m
	return m, nil
}

// A module is a library as one Backend sees it: behind what Config.Wrap put around it.
type module struct {
	Cryptoki
	shared *library
}

// enter makes the caller a user of the library and initialises it.
func (m *module) enter() error {
	m.shared.mu.Lock()
	defer m.shared.mu.Unlock()
	err := m.Initialize()
	if err != nil && !errors.Is(err, pkcs11.Error(pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED)) {
		return failed("C_Initialize", err)
	}
	m.shared.users++
	return nil
}

// leave ends one use; the last user finalises, which also closes all sessions.
func (m *module) leave() error {
	m.shared.mu.Lock()
	defer m.shared.mu.Unlock()
	m.shared.users--
	if m.shared.users > 0 {
		return nil
	}
	return failed("C_Finalize", m.Finalize())
}

var (
	errNoModule   = errors.New("no such module")
	errNotAModule = errors.New("not a PKCS#11 module, or one that cannot be loaded")
	errNoToken    = errors.New("no token with that label and serial is present")
	errTwoTokens  = errors.New("several tokens have that label and serial")
	errNoSerial   = errors.New("a token without a serial number holds none of the keys that were used")
	errHangs      = errors.New("a call into the module does not come back")
)

// An otherToken says that the token's label was found, on a token with another serial number.
type otherToken struct{ want, found string }

func (o *otherToken) Error() string {
	return "a token with that label is present, but its serial is " + printable(o.found) + " and not " + printable(o.want)
}

// printable returns a text of the device without what a terminal or a log would act on.
func printable(s string) string {
	clean := strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, s)
	if clean == "" {
		return "empty"
	}
	return clean
}
