//go:build cgo

package pkcs11

import (
	"context"
	"errors"
	"slices"
	"time"
	"unsafe"

	"github.com/miekg/pkcs11"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signer"
)

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
	if err := b.detach(ctx, func() error { return b.connect(ctx) }); err != nil {
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
	if t := b.trouble.Load(); t != nil && !b.connecting.Load() && time.Now().Before(t.next) {
		return t.err // without queueing behind whoever holds the lock
	}
	unlock, err := b.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if b.link.Load() != nil {
		return nil
	}
	return b.connectLocked()
}

func (b *Backend) connectLocked() error {
	if b.closed.Load() {
		return errClosed()
	}
	if f := b.refused.Load(); f != nil { // while this caller waited for the lock
		return f
	}
	if t := b.trouble.Load(); t != nil && time.Now().Before(t.next) {
		return t.err
	}
	return b.try(false)
}

// try makes the connection anew. operator says that an operator asked for it: then a refused authorisation is
// forgotten, and the token's last try at a PIN is taken.
func (b *Backend) try(operator bool) error {
	b.connecting.Store(true)
	defer b.connecting.Store(false)
	was := b.refused.Load()
	l, err := b.dial(operator)
	if operator {
		b.refused.CompareAndSwap(was, nil) // unless it was refused anew
	}
	if err == nil {
		serial := l.info.SerialNumber
		b.serial.CompareAndSwap(nil, &serial)
		b.trouble.Store(nil)
		b.link.Store(l)
		b.cfg.Log.Info("connected to the token", "token", l.info.Label, "serial", l.info.SerialNumber)
		return nil
	}
	b.failures.add(err)
	t := b.trouble.Load()
	next := &trouble{err: err, wait: firstWait}
	if t != nil {
		longest := longestTry
		if state, _, _ := diagnose(err); state == signer.Stopped {
			longest = slowestTry
		}
		next.wait = min(2*t.wait, longest)
	}
	next.next = time.Now().Add(next.wait)
	b.trouble.Store(next)
	if t == nil || verbose(t.err) != verbose(err) {
		b.cfg.Log.Warn("no connection to the token", "err", verbose(err))
	}
	if b.refused.Load() == nil && !b.keeping && !b.closed.Load() {
		b.keeping = true
		b.background.Go(b.keep)
	}
	return err
}

// keep tries to connect until there is a connection, so that the token's return is noticed without a request.
func (b *Backend) keep() {
	for {
		<-b.repair
		t := b.trouble.Load()
		if b.closed.Load() || b.refused.Load() != nil || b.link.Load() != nil || t == nil {
			b.keeping = false
			b.repair <- struct{}{}
			return
		}
		pause := time.Until(t.next)
		if pause <= 0 {
			_ = b.try(false) // what fails is in b.trouble
		}
		b.repair <- struct{}{}
		wait(b.life, pause)
	}
}

// reconnect repairs a lost token or a dead module: it finalises and initialises the module and logs in anew, once
// for all callers that noticed. A token that answers is left alone at first: modules return their general error also
// when two calls got in each other's way, and the second try is enough.
func (b *Backend) reconnect(ctx context.Context, l *link, cause error) error {
	unlock, err := b.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	switch now := b.link.Load(); {
	case now == nil:
		return b.connectLocked()
	case now != l:
		return nil // someone else has
	}
	switch {
	case isEmpty(cause):
		// The token serves others: it is not connected anew for each key that somebody misses.
		since := time.Now().Add(-fresh)
		b.doubts = slices.DeleteFunc(b.doubts, func(t time.Time) bool { return t.Before(since) })
		if len(b.doubts) >= absences-1 {
			return cause
		}
		b.doubts = append(b.doubts, time.Now())
	case classOf(cause) == signer.TokenLost && l.right() == nil:
		if l.unwell.Add(1) < unwellLimit || time.Since(l.since) < fresh {
			return nil
		}
		b.cfg.Log.Warn("the token answers, but no call succeeds")
	}
	b.cfg.Log.Warn("the token is lost: connecting again", "err", verbose(cause))
	b.link.Store(nil)
	return b.connectLocked()
}

const (
	// unwellLimit is how many calls in a row may fail on a token that answers before it is connected anew.
	unwellLimit = 5
	// fresh is how old a connection is at least before that happens to it, and how long doubts count.
	fresh = time.Second
)

// disconnect takes all slots, so that no call is inside the module, closes their sessions and leaves the module.
func (b *Backend) disconnect(limit time.Duration) error {
	b.link.Store(nil)
	if !b.inside {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
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
		case <-b.fewer: // one that is waited for may not come any more
		case <-ctx.Done():
			return &failure{class: signer.ModuleDead, op: "waiting for calls", cause: errHangs}
		}
	}
	if b.hung.Load() > 0 {
		return &failure{class: signer.ModuleDead, op: "waiting for calls", cause: errHangs}
	}
	for _, s := range taken {
		b.closeSession(s)
	}
	if l := b.current; l != nil && l.open {
		_ = l.mod.CloseSession(l.login) // where others use the module it is not finalised
	}
	for len(taken) < b.cfg.Sessions { // those given up when the token had no room
		taken = append(taken, new(slot))
	}
	b.size.Store(int32(len(taken)))
	b.failures.add(b.mod.leave()) // a module that cannot even finalise is initialised again or left alone
	b.inside, b.current = false, nil
	return nil
}

// dial leaves the module if it was entered, initialises it, finds the token and logs in.
func (b *Backend) dial(operator bool) (*link, error) {
	if err := b.disconnect(drainLimit); err != nil {
		return nil, err
	}
	if b.mod == nil {
		shared, err := b.load()
		if err != nil {
			return nil, err
		}
		m := &module{Cryptoki: shared.cryptoki, shared: shared}
		if b.cfg.Wrap != nil {
			m.Cryptoki = b.cfg.Wrap(m.Cryptoki)
		}
		b.mod = m
	}
	if err := b.mod.enter(); err != nil {
		return nil, err
	}
	l := &link{mod: b.mod, since: time.Now(), handles: map[keyRef]objectHandle{}, known: &b.known}
	b.inside, b.current = true, l
	if err := b.findToken(l); err != nil {
		return nil, err
	}
	if err := l.probe(); err != nil {
		return nil, err
	}
	if err := l.openLogin(); err != nil {
		return nil, err
	}
	if err := b.login(l, operator); err != nil {
		return nil, err
	}
	return l, nil
}

func (l *link) openLogin() (err error) {
	l.login, err = l.mod.OpenSession(l.slot, sessionFlags)
	l.open = err == nil
	return failed("C_OpenSession", err)
}

// wanted returns the serial that the token must have; nil while any will do.
func (b *Backend) wanted() *string {
	if b.cfg.TokenSerial != "" {
		return &b.cfg.TokenSerial
	}
	return b.serial.Load()
}

type candidate struct {
	slot uint
	info pkcs11.TokenInfo
}

// findToken chooses the token by label and serial; slots move. Where these do not decide, the keys do that were used
// before.
func (b *Backend) findToken(l *link) error {
	slots, err := l.mod.GetSlotList(true)
	if err != nil {
		return failed("C_GetSlotList", err)
	}
	lost := func(cause error) error {
		return &failure{class: signer.TokenLost, op: "choosing the token", cause: cause}
	}
	serial := b.wanted()
	var found []candidate
	missing := errNoToken
	for _, id := range slots {
		info, err := l.mod.GetTokenInfo(id)
		if err != nil || info.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			continue // another token's trouble is not ours
		}
		switch {
		case b.cfg.TokenLabel != "" && info.Label != b.cfg.TokenLabel:
		case serial != nil && info.SerialNumber != *serial:
			if b.cfg.TokenLabel != "" {
				missing = &otherToken{want: *serial, found: info.SerialNumber}
			}
		default:
			found = append(found, candidate{id, info})
		}
	}
	known := b.known.some(64)
	unnamed := serial != nil && *serial == "" && len(known) > 0
	if len(found) > 1 || unnamed && len(found) == 1 {
		holders := slices.DeleteFunc(slices.Clone(found), func(c candidate) bool { return !b.holds(l, c, known) })
		switch {
		case len(holders) > 0:
			found = holders
		case unnamed:
			return lost(errNoSerial)
		}
	}
	switch len(found) {
	case 0:
		return lost(missing)
	case 1:
		l.slot, l.info = found[0].slot, found[0].info
		return nil
	}
	return lost(errTwoTokens)
}

// holds reports whether a token shows the public key of one of the keys.
func (b *Backend) holds(l *link, c candidate, keys []keyRef) bool {
	h, err := l.mod.OpenSession(c.slot, sessionFlags)
	if err != nil {
		b.failures.add(failed("C_OpenSession", err))
		return false
	}
	s := &slot{session: h}
	defer func() { _ = l.mod.CloseSession(h) }()
	for _, k := range keys {
		found, err := l.find(s, 0, publicTemplate(k.id.Bytes())...)
		if err != nil {
			b.failures.add(err)
			return false
		}
		for _, o := range found {
			if pub, err := l.readPublic(s, o); err == nil && pub.ID() == k.public {
				return true
			}
		}
	}
	return false
}

func (l *link) readPublic(s *slot, o objectHandle) (ident.PublicKey, error) {
	a, err := l.read(s, o, publicAttributes)
	if err != nil {
		return ident.PublicKey{}, err
	}
	keyType, _ := a.number(pkcs11.CKA_KEY_TYPE)
	return rawPublic{
		keyType: keyType, params: a[pkcs11.CKA_EC_PARAMS], point: a[pkcs11.CKA_EC_POINT],
		modulus: a[pkcs11.CKA_MODULUS], exponent: a[pkcs11.CKA_PUBLIC_EXPONENT],
	}.parse()
}

// relogin logs in again on a connection that is otherwise sound, once for all callers that noticed.
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
	if err := l.right(); err != nil { // a PIN is for one token
		b.failures.add(err)
		b.link.Store(nil)
		return b.connectLocked()
	}
	if _, err := l.mod.GetSessionInfo(l.login); err != nil {
		if l.open {
			_ = l.mod.CloseSession(l.login)
		}
		if err := l.openLogin(); err != nil {
			b.failures.add(err)
			if classOf(err) == signer.ResourcesExhausted { // the slots' sessions took the login's place
				b.link.Store(nil)
				return b.connectLocked()
			}
			return err
		}
	}
	err = b.login(l, false)
	b.failures.add(err)
	return err
}

var (
	errPINLocked = errors.New("the PIN is locked: not tried")
	errLastTry   = errors.New("one try is left before the PIN locks: not tried")
)

// unclearLimit is how many logins in a row may fail without the token's word on the PIN before that counts as a
// refusal: there are modules that call a wrong PIN a general error, and a token that gives three tries must keep one.
const unclearLimit = 2

// login logs in where the token wants it and the session is not yet. A refusal is remembered until Unlock; a token
// that would lock at the next wrong PIN is tried only for an operator. Errors are classed, or those of the PIN's
// source.
func (b *Backend) login(l *link, operator bool) error {
	info, err := l.mod.GetTokenInfo(l.slot)
	if err != nil {
		return failed("C_GetTokenInfo", err)
	}
	if err := l.same(info); err != nil {
		return err
	}
	if info.Flags&pkcs11.CKF_LOGIN_REQUIRED == 0 {
		return nil
	}
	if s, err := l.mod.GetSessionInfo(l.login); err == nil && s.State == pkcs11.CKS_RW_USER_FUNCTIONS {
		return nil
	}
	switch {
	case info.Flags&pkcs11.CKF_USER_PIN_LOCKED != 0:
		return b.refuse(&failure{class: signer.AuthorisationRefused, op: "logging in", cause: errPINLocked})
	case info.Flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0 && !operator:
		return b.refuse(&failure{class: signer.AuthorisationRefused, op: "logging in", cause: errLastTry})
	}
	pin, err := b.pin()
	if err != nil {
		return err
	}
	defer clear(pin)
	l.forgetAll() // handles die with their login
	// The string shares the bytes, so that clearing them leaves no copy on the heap.
	err = failed("C_Login", l.mod.Login(l.login, pkcs11.CKU_USER, unsafe.String(&pin[0], len(pin))))
	if err == nil || errors.Is(err, pkcs11.Error(pkcs11.CKR_USER_ALREADY_LOGGED_IN)) {
		b.unclear = 0
		return nil
	}
	switch classOf(err) {
	case signer.AuthorisationRefused:
		return b.refuse(err)
	case signer.CallerError: // what the token does not take it will not take the next time
		return b.refuse(&failure{class: signer.AuthorisationRefused, op: "C_Login", cause: errors.Unwrap(err)})
	case signer.TokenLost:
		now, gone := l.mod.GetTokenInfo(l.slot)
		if gone != nil {
			return err
		}
		b.unclear++
		if now.Flags&^info.Flags&pkcs11.CKF_USER_PIN_COUNT_LOW != 0 || b.unclear >= unclearLimit {
			return b.refuse(&failure{class: signer.AuthorisationRefused, op: "C_Login", cause: errors.Unwrap(err)})
		}
	}
	return err
}

func (b *Backend) pin() ([]byte, error) {
	if b.cfg.PIN == nil {
		return nil, fault.New(fault.AuthorisationRefused, "no PIN is configured")
	}
	ctx, cancel := context.WithTimeout(b.life, pinLimit)
	defer cancel()
	pin, err := b.cfg.PIN(ctx)
	if err != nil {
		if e := (*fault.Error)(nil); errors.As(err, &e) {
			return nil, e
		}
		return nil, fault.Wrap(fault.AuthorisationRefused, err, "the PIN cannot be read")
	}
	if len(pin) == 0 {
		return nil, fault.New(fault.AuthorisationRefused, "the PIN is empty")
	}
	return pin, nil
}

// refuse remembers that the token refused the authorisation, and returns err. A person's refusal of one signature
// (CKR_FUNCTION_REJECTED) is only that.
func (b *Backend) refuse(err error) error {
	var f *failure
	if !errors.As(err, &f) || errors.Is(err, pkcs11.Error(pkcs11.CKR_FUNCTION_REJECTED)) && f.op != "C_Login" {
		return err
	}
	b.unclear = 0
	b.refused.Store(f)
	b.cfg.Log.Error("the token refused the authorisation; it is not tried again until it is unlocked", "err", f.Error())
	return err
}

var _ signer.Unlocker = (*Backend)(nil)

// Unlock implements signer.Unlocker: it forgets that the token refused the authorisation, reads the PIN anew and
// makes one attempt, also where it is the last before the PIN locks. Calls at the same time share the attempt. Where
// the token is not there, the attempt is made when it is back, and Unlock returns device_lost. Without a refusal it
// only reports whether there is a connection.
func (b *Backend) Unlock(ctx context.Context) error {
	was := b.refused.Load()
	if was == nil {
		_, err := b.connected(ctx)
		return public(err)
	}
	return public(b.detach(ctx, func() error {
		unlock, err := b.lock(ctx)
		if err != nil {
			return err
		}
		defer unlock()
		if b.closed.Load() {
			return errClosed()
		}
		switch now := b.refused.Load(); {
		case now == was:
			return b.try(true)
		case now != nil:
			return now
		}
		if t := b.trouble.Load(); t != nil {
			return t.err
		}
		return nil
	}))
}
