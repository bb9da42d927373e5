//go:build cgo

package pkcs11

import (
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signer"
)

type (
	sessionHandle = pkcs11.SessionHandle
	objectHandle  = pkcs11.ObjectHandle
	attribute     = pkcs11.Attribute
)

// A link is one connection to the token: from C_Initialize and C_Login to their end. Object handles live as long.
type link struct {
	mod        *module
	slot       uint
	info       pkcs11.TokenInfo
	mechanisms map[uint]pkcs11.MechanismInfo
	algorithms []ident.Algorithm
	since      time.Time
	login      sessionHandle // kept open, because the login ends with the last session; guarded by Backend.repair
	open       bool          // login is; guarded by Backend.repair
	sessions   atomic.Int32  // open sessions besides the login's
	generation atomic.Uint32 // sessions of an earlier one are not used any more
	unwell     atomic.Int32  // calls in a row that failed although the token answers

	known   *known
	mu      sync.Mutex
	handles map[keyRef]objectHandle // private keys
}

const sessionFlags = pkcs11.CKF_SERIAL_SESSION | pkcs11.CKF_RW_SESSION

// probe reads what the token can do.
func (l *link) probe() error {
	list, err := l.mod.GetMechanismList(l.slot)
	if err != nil {
		return failed("C_GetMechanismList", err)
	}
	l.mechanisms = map[uint]pkcs11.MechanismInfo{}
	for _, m := range list {
		info, err := l.mod.GetMechanismInfo(l.slot, []*pkcs11.Mechanism{m})
		if err != nil {
			continue
		}
		l.mechanisms[m.Mechanism] = info
	}
	for _, alg := range preferred {
		if l.makes(alg) {
			l.algorithms = append(l.algorithms, alg)
		}
	}
	return nil
}

// preferred lists the algorithms, best default first.
var preferred = []ident.Algorithm{
	ident.Ed25519, ident.ECDSAP256, ident.ECDSAP384, ident.RSA4096, ident.RSA3072, ident.RSA2048,
}

func (l *link) makes(alg ident.Algorithm) bool {
	has := func(mech uint) bool { _, ok := l.mechanisms[mech]; return ok }
	sized := func(mech, bits uint) bool {
		m, ok := l.mechanisms[mech]
		return ok && (m.MaxKeySize == 0 || m.MinKeySize <= bits && bits <= m.MaxKeySize)
	}
	switch alg {
	case ident.Ed25519:
		return has(ckmEdDSA) && has(ckmEdwardsKeyPairGen)
	case ident.ECDSAP256:
		return sized(pkcs11.CKM_ECDSA, 256) && sized(pkcs11.CKM_EC_KEY_PAIR_GEN, 256)
	case ident.ECDSAP384:
		return sized(pkcs11.CKM_ECDSA, 384) && sized(pkcs11.CKM_EC_KEY_PAIR_GEN, 384)
	case ident.RSA2048, ident.RSA3072, ident.RSA4096:
		return (has(pkcs11.CKM_RSA_PKCS_PSS) || has(pkcs11.CKM_SHA256_RSA_PKCS_PSS)) &&
			sized(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, rsaBits[alg])
	}
	return false
}

var rsaBits = map[ident.Algorithm]uint{ident.RSA2048: 2048, ident.RSA3072: 3072, ident.RSA4096: 4096}

// A keyRef names a private key as its callers know it: another key under the same id is another key.
type keyRef struct {
	id     signer.ID
	public ident.KeyID
}

func refOf(info signer.KeyInfo) keyRef { return keyRef{info.ID, info.Public.ID()} }

func (l *link) handle(k keyRef) (objectHandle, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	h, ok := l.handles[k]
	return h, ok
}

func (l *link) remember(k keyRef, h objectHandle) {
	l.known.add(k)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.handles[k] = h
}

// forget drops the handles of all keys that had this id.
func (l *link) forget(id signer.ID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for k := range l.handles {
		if k.id == id {
			delete(l.handles, k)
		}
	}
}

func (l *link) forgetAll() {
	l.mu.Lock()
	defer l.mu.Unlock()
	clear(l.handles)
}

// distrust makes every slot open a new session, and the key's handle be looked for again, because a session of this
// generation gave a wrong signature.
func (l *link) distrust(id signer.ID, generation uint32) {
	l.generation.CompareAndSwap(generation, generation+1)
	l.forget(id)
}

// right returns nil where the token in the link's slot answers and is the link's.
func (l *link) right() error {
	info, err := l.mod.GetTokenInfo(l.slot)
	if err != nil {
		return failed("C_GetTokenInfo", err)
	}
	return l.same(info)
}

func (l *link) same(info pkcs11.TokenInfo) error {
	if info.Label == l.info.Label && info.SerialNumber == l.info.SerialNumber {
		return nil
	}
	if info.Label != l.info.Label {
		return &failure{class: signer.TokenLost, op: "looking at the token", cause: errNoToken}
	}
	return &failure{class: signer.TokenLost, op: "looking at the token",
		cause: &otherToken{want: l.info.SerialNumber, found: info.SerialNumber}}
}

// loggedIn reports whether the session sees private objects: to one that does not, the token looks empty.
func (l *link) loggedIn(s *slot) (bool, error) {
	if l.info.Flags&pkcs11.CKF_LOGIN_REQUIRED == 0 {
		return true, nil
	}
	info, err := l.mod.GetSessionInfo(s.session)
	if err != nil {
		return false, failed("C_GetSessionInfo", err)
	}
	return slices.Contains([]uint{pkcs11.CKS_RW_USER_FUNCTIONS, pkcs11.CKS_RO_USER_FUNCTIONS}, info.State), nil
}

func isEmpty(err error) bool {
	var f *failure
	return errors.As(err, &f) && f.empty
}

// known are the keys that were used, on any connection. They tell tokens apart that have one serial number, or none,
// and a key that is gone from one that was never there.
type known struct {
	mu      sync.Mutex
	keys    map[signer.ID]ident.KeyID
	missing map[signer.ID]absence // "": all of them
}

// An absence is the last connection that did not show a key, and how many in a row.
type absence struct {
	link *link
	n    int
}

// absences is how many connections must agree that a known key is gone.
const absences = 3

func (n *known) add(k keyRef) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.keys == nil {
		n.keys, n.missing = map[signer.ID]ident.KeyID{}, map[signer.ID]absence{}
	}
	n.keys[k.id] = k.public
}

// found notes that a key was shown.
func (n *known) found(id signer.ID) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.missing) > 0 {
		delete(n.missing, id)
		delete(n.missing, "")
	}
}

// remove forgets a key that was destroyed here.
func (n *known) remove(id signer.ID) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.keys, id)
	delete(n.missing, id)
}

// suspects notes that l does not show a key and reports whether it is to be looked for on another connection.
func (n *known) suspects(id signer.ID, l *link) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, used := n.keys[id]; !used && (id != "" || len(n.keys) == 0) {
		return false
	}
	a := n.missing[id]
	if a.n < absences && a.link != l {
		a = absence{l, a.n + 1}
		n.missing[id] = a
	}
	return a.n < absences
}

// some returns at most limit keys.
func (n *known) some(limit int) []keyRef {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []keyRef
	for id, public := range n.keys {
		if len(out) == limit {
			break
		}
		out = append(out, keyRef{id, public})
	}
	return out
}

// verbose returns an error's text with its cause, for the log.
func verbose(err error) string {
	var e *fault.Error
	if errors.As(err, &e) {
		return e.Verbose()
	}
	return err.Error()
}
