//go:build cgo

package pkcs11

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

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
	sessions   atomic.Int32  // open sessions besides the login's

	mu      sync.Mutex
	handles map[keyRef]objectHandle // private keys
}

// fresh is how long after connecting an empty search is believed without connecting again.
const fresh = time.Second

const sessionFlags = pkcs11.CKF_SERIAL_SESSION | pkcs11.CKF_RW_SESSION

// connected returns the connection, and makes it where there is none and it is time to try.
func (b *Backend) connected(ctx context.Context) (*link, error) {
	if f := b.refused.Load(); f != nil {
		return nil, f
	}
	if b.closed.Load() {
		return nil, errClosed()
	}
	if l := b.link.Load(); l != nil {
		return l, nil
	}
	if err := b.detach(ctx, b.connect); err != nil {
		return nil, err
	}
	if l := b.link.Load(); l != nil {
		return l, nil
	}
	return nil, failing(signer.TokenLost, "connecting", "lost again at once")
}

// lock takes the right to connect and repair.
func (b *Backend) lock(ctx context.Context) (unlock func(), err error) {
	select {
	case <-b.repair:
		return func() { b.repair <- struct{}{} }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// connect makes the connection unless there is one, or it is too early to try again.
func (b *Backend) connect(ctx context.Context) error {
	unlock, err := b.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if b.link.Load() != nil {
		return nil
	}
	return b.connectLocked(ctx)
}

func (b *Backend) connectLocked(ctx context.Context) error {
	if b.closed.Load() {
		return errClosed()
	}
	t := b.trouble.Load()
	if t != nil && time.Now().Before(t.next) {
		return t.err
	}
	err := b.disconnect(ctx)
	if err == nil {
		var l *link
		if l, err = b.dial(ctx); err == nil {
			b.trouble.Store(nil)
			b.link.Store(l)
			b.cfg.Log.Info("connected to the token", "token", l.info.Label, "serial", l.info.SerialNumber)
			return nil
		}
	}
	if ctx.Err() != nil { // the caller's haste says nothing about the token
		return err
	}
	wait := firstWait
	if t != nil {
		wait = min(2*t.wait, longestTry)
	}
	b.trouble.Store(&trouble{err: err, wait: wait, next: time.Now().Add(wait)})
	b.cfg.Log.Warn("no connection to the token", "err", verbose(err), "retry_after", wait)
	return err
}

// reconnect repairs a lost token or a dead module: it finalises and initialises the module and logs in anew, once
// for all callers that noticed. A token that answers is left alone: modules return their general error also when
// two calls got in each other's way, and the second try is enough.
func (b *Backend) reconnect(ctx context.Context, l *link, cause error) error {
	unlock, err := b.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	switch now := b.link.Load(); {
	case now == nil:
		return b.connectLocked(ctx)
	case now != l:
		return nil // someone else has
	}
	if classOf(cause) == signer.TokenLost && b.healthy(l) {
		switch {
		case !isEmpty(cause):
			return nil // the token is there: it was the call
		case time.Since(l.since) < fresh:
			return failing(signer.KeyGone, "finding the key", "no such object")
		}
	}
	b.cfg.Log.Warn("the token is lost: connecting again", "err", verbose(cause))
	b.link.Store(nil)
	return b.connectLocked(ctx)
}

// healthy reports whether the token still answers and is the same one.
func (b *Backend) healthy(l *link) bool {
	info, err := l.mod.GetTokenInfo(l.slot)
	return err == nil && info.Label == l.info.Label && info.SerialNumber == l.info.SerialNumber
}

// disconnect takes all slots, so that no call is inside the module, closes their sessions and leaves the module.
func (b *Backend) disconnect(ctx context.Context) error {
	b.link.Store(nil)
	if b.mod == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, drainLimit)
	defer cancel()
	var taken []*slot
	defer func() {
		for _, s := range taken {
			b.slots <- s
		}
	}()
	for len(taken) < int(b.size.Load()) {
		select {
		case s := <-b.slots:
			taken = append(taken, s)
		case <-ctx.Done():
			return &failure{class: signer.ModuleDead, op: "waiting for calls", cause: errHangs}
		}
	}
	if b.hung.Load() > 0 {
		return &failure{class: signer.ModuleDead, op: "waiting for calls", cause: errHangs}
	}
	for _, s := range taken {
		if s.link != nil {
			_ = s.link.mod.CloseSession(s.session) // it is lost either way
			s.link = nil
		}
	}
	for len(taken) < b.cfg.Sessions { // those given up when the token had no room
		taken = append(taken, new(slot))
	}
	b.size.Store(int32(len(taken)))
	b.mod.leave()
	b.mod = nil
	return nil
}

// dial initialises the module, finds the token and logs in. It sets b.mod once the module is entered.
func (b *Backend) dial(ctx context.Context) (*link, error) {
	m, err := b.load()
	if err != nil {
		return nil, err
	}
	if err := m.enter(); err != nil {
		return nil, err
	}
	b.mod = m
	l := &link{mod: m, since: time.Now(), handles: map[keyRef]objectHandle{}}
	if err := b.findToken(l); err != nil {
		return nil, err
	}
	if err := l.probe(); err != nil {
		return nil, err
	}
	if l.login, err = m.OpenSession(l.slot, sessionFlags); err != nil {
		return nil, failed("C_OpenSession", err)
	}
	if err := b.login(ctx, l); err != nil {
		return nil, err
	}
	return l, nil
}

// findToken chooses the token by label and serial; slots move.
func (b *Backend) findToken(l *link) error {
	slots, err := l.mod.GetSlotList(true)
	if err != nil {
		return failed("C_GetSlotList", err)
	}
	found := 0
	for _, id := range slots {
		info, err := l.mod.GetTokenInfo(id)
		if err != nil || info.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			continue // another token's trouble is not ours
		}
		if (b.cfg.TokenLabel == "" || info.Label == b.cfg.TokenLabel) &&
			(b.cfg.TokenSerial == "" || info.SerialNumber == b.cfg.TokenSerial) {
			l.slot, l.info = id, info
			found++
		}
	}
	switch found {
	case 0:
		return &failure{class: signer.TokenLost, op: "choosing the token", cause: errNoToken}
	case 1:
		return nil
	}
	return &failure{class: signer.TokenLost, op: "choosing the token", cause: errTwoTokens}
}

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

// relogin logs in again on a connection that is otherwise sound.
func (b *Backend) relogin(ctx context.Context, l *link) error {
	unlock, err := b.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if b.link.Load() != l {
		return nil
	}
	if f := b.refused.Load(); f != nil {
		return f
	}
	if _, err := l.mod.GetSessionInfo(l.login); err != nil {
		if l.login, err = l.mod.OpenSession(l.slot, sessionFlags); err != nil {
			return failed("C_OpenSession", err)
		}
	}
	l.forgetAll() // handles die with their login
	return b.login(ctx, l)
}

// login logs in. A refusal is remembered for good; a token that would lock at the next wrong PIN is not tried.
func (b *Backend) login(ctx context.Context, l *link) error {
	info, err := l.mod.GetTokenInfo(l.slot)
	if err != nil {
		return failed("C_GetTokenInfo", err)
	}
	if info.Flags&pkcs11.CKF_LOGIN_REQUIRED == 0 {
		return nil
	}
	if s, err := l.mod.GetSessionInfo(l.login); err == nil && s.State == pkcs11.CKS_RW_USER_FUNCTIONS {
		return nil
	}
	switch {
	case info.Flags&pkcs11.CKF_USER_PIN_LOCKED != 0:
		return failing(signer.AuthorisationRefused, "logging in", "the PIN is locked: not tried")
	case info.Flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0:
		return failing(signer.AuthorisationRefused, "logging in", "one try is left before the PIN locks: not tried")
	}
	pin, err := b.cfg.PIN(ctx)
	if err != nil {
		var e *fault.Error
		if errors.As(err, &e) {
			return e
		}
		return fault.Wrap(fault.AuthorisationRefused, err, "the PIN cannot be read")
	}
	defer clear(pin)
	if len(pin) == 0 {
		return fault.New(fault.AuthorisationRefused, "the PIN is empty")
	}
	// The string shares the bytes, so that clearing them leaves no copy on the heap.
	err = failed("C_Login", l.mod.Login(l.login, pkcs11.CKU_USER, unsafe.String(&pin[0], len(pin))))
	if err == nil || errors.Is(err, pkcs11.Error(pkcs11.CKR_USER_ALREADY_LOGGED_IN)) {
		return nil
	}
	var f *failure
	if errors.As(err, &f) && f.class == signer.AuthorisationRefused {
		b.refused.Store(f)
		b.cfg.Log.Error("the token refused the PIN; it is not tried again", "err", f.Error())
	}
	return err
}

// errShrunk says that a slot left circulation, because the token has no session for it.
var errShrunk = errors.New("the token gives no more sessions")

// open gives the slot a session of l. While the caller holds the slot, l stands: a repair needs all slots.
func (b *Backend) open(l *link, s *slot) error {
	if b.link.Load() != l { // a repair came between
		return failing(signer.SessionLost, "opening a session", "the connection was replaced")
	}
	if s.link == l {
		return nil
	}
	h, err := l.mod.OpenSession(l.slot, sessionFlags)
	if err == nil {
		s.link, s.session = l, h
		l.sessions.Add(1)
		return nil
	}
	err = failed("C_OpenSession", err)
	if classOf(err) == signer.ResourcesExhausted && l.sessions.Load() > 0 && b.shrink() {
		b.cfg.Log.Warn("the token gives no more sessions", "sessions", b.size.Load())
		return errShrunk
	}
	return err
}

// shrink takes one slot, the caller's, out of circulation, unless it is the last.
func (b *Backend) shrink() bool {
	for {
		n := b.size.Load()
		if n <= 1 {
			return false
		}
		if b.size.CompareAndSwap(n, n-1) {
			return true
		}
	}
}

// closeSession closes the slot's session if its connection still stands; otherwise its handle may by now be
// another's.
func (b *Backend) closeSession(s *slot) {
	if s.link != nil && s.link == b.link.Load() {
		_ = s.link.mod.CloseSession(s.session)
		s.link.sessions.Add(-1)
	}
	s.link = nil
}

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

// verbose returns an error's text with its cause, for the log.
func verbose(err error) string {
	var e *fault.Error
	if errors.As(err, &e) {
		return e.Verbose()
	}
	return err.Error()
}
