//go:build cgo

// Package intercept stands between the PKCS#11 backend and a module, and does to single calls what failing tokens and
// modules do. Tests put it into pkcs11.Config.Wrap.
package intercept

import (
	"sync"

	miekg "github.com/miekg/pkcs11"

	"github.com/trustd/trustd/signer/pkcs11"
)

// A Token says where the token seems to be.
type Token string

const (
	Gone  Token = "gone"  // unplugged
	Empty Token = "empty" // there, and without any key
	Other Token = "other" // another one of the same label, without any key
)

// A Fate is what happens to one call. The zero value lets it pass.
type Fate struct {
	Return  uint // the CKR_* that the call returns; the module does not see it. 0: none
	Drop    bool // all sessions are closed first
	Corrupt bool // one bit of the signature changes
	Token   Token
	Done    func() // called when the call ends; may be nil
}

// Wrap returns module behind fate, which is asked at each call, by the name of the C function.
func Wrap(module pkcs11.Cryptoki, fate func(function string) Fate) pkcs11.Cryptoki {
	return &cryptoki{Cryptoki: module, fate: fate, open: map[miekg.SessionHandle]bool{}}
}

type cryptoki struct {
	pkcs11.Cryptoki
	fate  func(string) Fate
	using sync.RWMutex // held for writing while sessions are closed that nobody may be using: SoftHSM crashes else

	mu   sync.Mutex
	open map[miekg.SessionHandle]bool
}

// around runs one call of the module, unless its fate is another.
func (c *cryptoki) around(function string, run func(Fate) error) error {
	f := c.fate(function)
	if f.Done != nil {
		defer f.Done()
	}
	if f.Drop {
		c.drop()
	}
	c.using.RLock()
	defer c.using.RUnlock()
	switch {
	case f.Return != 0:
		return miekg.Error(f.Return)
	case f.Token == Gone && function != "C_Initialize" && function != "C_Finalize" && function != "C_GetSlotList":
		return miekg.Error(miekg.CKR_TOKEN_NOT_PRESENT)
	}
	return run(f)
}

// drop closes all sessions behind the caller's back, which also ends the login.
func (c *cryptoki) drop() {
	c.using.Lock()
	defer c.using.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	for s := range c.open {
		_ = c.Cryptoki.CloseSession(s) // one that was closed already is lost as well
	}
	clear(c.open)
}

// hidden reports whether the token shows no keys.
func (f Fate) hidden() bool { return f.Token == Empty || f.Token == Other }

func (c *cryptoki) Initialize(opts ...miekg.InitializeOption) error {
	return c.around("C_Initialize", func(Fate) error { return c.Cryptoki.Initialize(opts...) })
}

func (c *cryptoki) Finalize() error {
	return c.around("C_Finalize", func(Fate) error {
		c.mu.Lock()
		clear(c.open)
		c.mu.Unlock()
		return c.Cryptoki.Finalize()
	})
}

func (c *cryptoki) GetSlotList(present bool) (out []uint, err error) {
	err = c.around("C_GetSlotList", func(f Fate) (err error) {
		if f.Token != Gone {
			out, err = c.Cryptoki.GetSlotList(present)
		}
		return err
	})
	return out, err
}

func (c *cryptoki) GetTokenInfo(slot uint) (out miekg.TokenInfo, err error) {
	err = c.around("C_GetTokenInfo", func(f Fate) (err error) {
		if out, err = c.Cryptoki.GetTokenInfo(slot); f.Token == Other {
			out.SerialNumber = "0123456789abcdef"
		}
		return err
	})
	return out, err
}

func (c *cryptoki) GetMechanismList(slot uint) (out []*miekg.Mechanism, err error) {
	err = c.around("C_GetMechanismList", func(Fate) (err error) {
		out, err = c.Cryptoki.GetMechanismList(slot)
		return err
	})
	return out, err
}

func (c *cryptoki) GetMechanismInfo(slot uint, m []*miekg.Mechanism) (out miekg.MechanismInfo, err error) {
	err = c.around("C_GetMechanismInfo", func(Fate) (err error) {
		out, err = c.Cryptoki.GetMechanismInfo(slot, m)
		return err
	})
	return out, err
}

func (c *cryptoki) OpenSession(slot, flags uint) (s miekg.SessionHandle, err error) {
	err = c.around("C_OpenSession", func(Fate) (err error) {
		if s, err = c.Cryptoki.OpenSession(slot, flags); err == nil {
			c.mu.Lock()
			c.open[s] = true
			c.mu.Unlock()
		}
		return err
	})
	return s, err
}

func (c *cryptoki) CloseSession(s miekg.SessionHandle) error {
	return c.around("C_CloseSession", func(Fate) error {
		c.mu.Lock()
		delete(c.open, s)
		c.mu.Unlock()
		return c.Cryptoki.CloseSession(s)
	})
}

func (c *cryptoki) GetSessionInfo(s miekg.SessionHandle) (out miekg.SessionInfo, err error) {
	err = c.around("C_GetSessionInfo", func(Fate) (err error) {
		out, err = c.Cryptoki.GetSessionInfo(s)
		return err
	})
	return out, err
}

func (c *cryptoki) Login(s miekg.SessionHandle, user uint, pin string) error {
	return c.around("C_Login", func(Fate) error { return c.Cryptoki.Login(s, user, pin) })
}

func (c *cryptoki) FindObjectsInit(s miekg.SessionHandle, template []*miekg.Attribute) error {
	return c.around("C_FindObjectsInit", func(Fate) error { return c.Cryptoki.FindObjectsInit(s, template) })
}

func (c *cryptoki) FindObjects(s miekg.SessionHandle, most int) (out []miekg.ObjectHandle, more bool, err error) {
	err = c.around("C_FindObjects", func(f Fate) (err error) {
		if !f.hidden() {
			out, more, err = c.Cryptoki.FindObjects(s, most)
		}
		return err
	})
	return out, more, err
}

func (c *cryptoki) FindObjectsFinal(s miekg.SessionHandle) error {
	return c.around("C_FindObjectsFinal", func(Fate) error { return c.Cryptoki.FindObjectsFinal(s) })
}

func (c *cryptoki) GetAttributeValue(s miekg.SessionHandle, o miekg.ObjectHandle, a []*miekg.Attribute) (
	out []*miekg.Attribute, err error) {
	err = c.around("C_GetAttributeValue", func(f Fate) (err error) {
		if f.hidden() {
			return miekg.Error(miekg.CKR_OBJECT_HANDLE_INVALID)
		}
		out, err = c.Cryptoki.GetAttributeValue(s, o, a)
		return err
	})
	return out, err
}

func (c *cryptoki) GenerateKeyPair(s miekg.SessionHandle, m []*miekg.Mechanism, public, private []*miekg.Attribute) (
	pub, key miekg.ObjectHandle, err error) {
	err = c.around("C_GenerateKeyPair", func(f Fate) (err error) {
		if f.hidden() { // the key would not be on the token that seems to be there
			return miekg.Error(miekg.CKR_TOKEN_WRITE_PROTECTED)
		}
		pub, key, err = c.Cryptoki.GenerateKeyPair(s, m, public, private)
		return err
	})
	return pub, key, err
}

func (c *cryptoki) CreateObject(s miekg.SessionHandle, template []*miekg.Attribute) (o miekg.ObjectHandle, err error) {
	err = c.around("C_CreateObject", func(f Fate) (err error) {
		if f.hidden() {
			return miekg.Error(miekg.CKR_TOKEN_WRITE_PROTECTED)
		}
		o, err = c.Cryptoki.CreateObject(s, template)
		return err
	})
	return o, err
}

func (c *cryptoki) DestroyObject(s miekg.SessionHandle, o miekg.ObjectHandle) error {
	return c.around("C_DestroyObject", func(f Fate) error {
		if f.hidden() {
			return miekg.Error(miekg.CKR_OBJECT_HANDLE_INVALID)
		}
		return c.Cryptoki.DestroyObject(s, o)
	})
}

func (c *cryptoki) SignInit(s miekg.SessionHandle, m []*miekg.Mechanism, o miekg.ObjectHandle) error {
	return c.around("C_SignInit", func(f Fate) error {
		if f.hidden() {
			return miekg.Error(miekg.CKR_OBJECT_HANDLE_INVALID)
		}
		return c.Cryptoki.SignInit(s, m, o)
	})
}

func (c *cryptoki) Sign(s miekg.SessionHandle, msg []byte) (sig []byte, err error) {
	err = c.around("C_Sign", func(f Fate) (err error) {
		if sig, err = c.Cryptoki.Sign(s, msg); err == nil && f.Corrupt && len(sig) > 0 {
			sig[len(sig)/2] ^= 1
		}
		return err
	})
	return sig, err
}
