//go:build cgo

package pkcs11

import (
	"context"
	"encoding/binary"
	"errors"

	"github.com/miekg/pkcs11"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
)

var (
	_ signer.Backend  = (*Backend)(nil)
	_ signer.Importer = (*Backend)(nil)
)

// attributes are those of one object that could be read.
type attributes map[uint][]byte

func (a attributes) is(typ uint) bool { v := a[typ]; return len(v) == 1 && v[0] == 1 }

func (a attributes) number(typ uint) (uint, bool) {
	v := a[typ]
	if len(v) != 8 {
		if len(v) != 4 {
			return 0, false
		}
		return uint(binary.NativeEndian.Uint32(v)), true
	}
	return uint(binary.NativeEndian.Uint64(v)), true
}

// read returns the attributes of an object. Those that the object has not, or does not give, are left out.
func (l *link) read(s *slot, o objectHandle, types []uint) (attributes, error) {
	query := make([]*attribute, len(types))
	for i, t := range types {
		query[i] = pkcs11.NewAttribute(t, nil)
	}
	out := attributes{}
	got, err := l.mod.GetAttributeValue(s.session, o, query)
	if err == nil {
		for _, a := range got {
			out[a.Type] = a.Value
		}
		return out, nil
	}
	if err = failed("C_GetAttributeValue", err); classOf(err) != signer.CallerError {
		return nil, err
	}
	for _, q := range query { // one attribute that cannot be read fails them all
		got, err := l.mod.GetAttributeValue(s.session, o, []*attribute{q})
		if err == nil {
			out[q.Type] = got[0].Value
			continue
		}
		if err = failed("C_GetAttributeValue", err); classOf(err) != signer.CallerError {
			return nil, err
		}
	}
	return out, nil
}

// find returns the objects that match, at most limit (0: all).
func (l *link) find(s *slot, limit int, template ...*attribute) ([]objectHandle, error) {
	if err := l.mod.FindObjectsInit(s.session, template); err != nil {
		return nil, failed("C_FindObjectsInit", err)
	}
	batch := 256
	if limit > 0 {
		batch = limit
	}
	var out []objectHandle
	for {
		some, _, err := l.mod.FindObjects(s.session, batch)
		if err != nil {
			_ = l.mod.FindObjectsFinal(s.session)
			return nil, failed("C_FindObjects", err)
		}
		out = append(out, some...)
		if len(some) == 0 || limit > 0 && len(out) >= limit {
			break
		}
	}
	return out, failed("C_FindObjectsFinal", l.mod.FindObjectsFinal(s.session))
}

// absent is the error of a search that found no key with this id ("": no key at all). Only a token that is the right
// one, answers and sees a login is believed. A key that was seen before is gone only when several connections in a row
// agree: a token that went away and came back may have lost all of its index, or a part.
func (l *link) absent(s *slot, id signer.ID) error {
	in, err := l.loggedIn(s)
	if err != nil {
		return err
	}
	if !in {
		return failing(signer.LoginLost, "finding the key", "the session is not logged in")
	}
	if id != "" { // the token may have come back meanwhile
		found, err := l.find(s, 1, append(privateTemplate(), pkcs11.NewAttribute(pkcs11.CKA_ID, id.Bytes()))...)
		if err != nil {
			return err
		}
		if len(found) > 0 {
			return &failure{class: signer.HandleLost, op: "finding the key", cause: errBack}
		}
	}
	if err := l.right(); err != nil {
		return err
	}
	if l.known.suspects(id, l) {
		return &failure{class: signer.TokenLost, op: "finding the key", cause: errNoObject, empty: true}
	}
	return &failure{class: signer.KeyGone, op: "finding the key", cause: errNoObject}
}

// belongs returns nil where the entry is a usable key with this public key, and key_gone where the right token holds
// another. Where the token shows no public key beside it, a signature has to tell: a missing public object does not
// make a key another.
func (l *link) belongs(s *slot, e entry, pub ident.PublicKey) error {
	switch {
	case e.info.Problem == "" && e.info.Public.Equal(pub):
		return nil
	case e.unread:
		signed, err := l.proves(s, e.info.ID, e.handle, pub)
		if err != nil || signed {
			return err
		}
	}
	if err := l.right(); err != nil {
		return err
	}
	return failing(signer.KeyGone, "finding the key", "another key, or one that cannot be used, has its id")
}

// proves reports whether the private key signs what the public key verifies.
func (l *link) proves(s *slot, id signer.ID, h objectHandle, pub ident.PublicKey) (bool, error) {
	msg := signature.Encode(signature.Possession, []byte("proof"), id.Bytes())
	sig, err := l.sign(s, pub.Algorithm(), h, signature.Digest(pub.Algorithm(), msg))
	return err == nil && signature.Verify(pub, msg, sig) == nil, err
}

var (
	errNoObject = errors.New("no such object")
	errBack     = errors.New("it was away and is back")
)

// An entry is a private key on the token, with its handle.
type entry struct {
	info   signer.KeyInfo
	handle objectHandle
	unread bool // the public key could not be read
}

var privateAttributes = []uint{
	pkcs11.CKA_ID, pkcs11.CKA_LABEL, pkcs11.CKA_KEY_TYPE, pkcs11.CKA_SENSITIVE, pkcs11.CKA_ALWAYS_SENSITIVE,
	pkcs11.CKA_EXTRACTABLE, pkcs11.CKA_NEVER_EXTRACTABLE, pkcs11.CKA_LOCAL, pkcs11.CKA_SIGN,
	pkcs11.CKA_ALWAYS_AUTHENTICATE,
}

var publicAttributes = []uint{
	pkcs11.CKA_KEY_TYPE, pkcs11.CKA_EC_PARAMS, pkcs11.CKA_EC_POINT, pkcs11.CKA_MODULUS, pkcs11.CKA_PUBLIC_EXPONENT,
}

const ckaPublicKeyInfo = 0x129

func privateTemplate() []*attribute {
	return []*attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
	}
}

func publicTemplate(id []byte) []*attribute {
	return []*attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_ID, id),
	}
}

// lookup returns the one private key with this id.
func (l *link) lookup(s *slot, id signer.ID) (entry, error) {
	for try := 1; ; try++ {
		found, err := l.find(s, 2, append(privateTemplate(), pkcs11.NewAttribute(pkcs11.CKA_ID, id.Bytes()))...)
		if err != nil {
			return entry{}, err
		}
		switch len(found) {
		case 0:
			if err := l.absent(s, id); !errors.Is(err, errBack) || try == 3 {
				return entry{}, err
			}
		case 1:
			return l.describe(s, found[0])
		default:
			return entry{}, failing(signer.KeyGone, "finding the key", "several private keys have this id")
		}
	}
}

// describe reads a private key and the public key beside it. What is wrong with the key goes into its Problem.
func (l *link) describe(s *slot, h objectHandle) (entry, error) {
	a, err := l.read(s, h, privateAttributes)
	if err != nil {
		return entry{}, err
	}
	info := signer.KeyInfo{
		Label:     string(a[pkcs11.CKA_LABEL]),
		Grade:     l.grade(),
		Origin:    origin(a),
		Sensitive: a.is(pkcs11.CKA_SENSITIVE),
		Always:    a.is(pkcs11.CKA_ALWAYS_SENSITIVE) && a.is(pkcs11.CKA_NEVER_EXTRACTABLE),
		Exported:  a.is(pkcs11.CKA_EXTRACTABLE),
	}
	id, err := signer.NewID(a[pkcs11.CKA_ID])
	if err != nil {
		info.Problem = "the key has no usable CKA_ID, so nothing can name it"
		return entry{info: info, handle: h}, nil
	}
	l.known.found(id)
	info.ID = id
	info.URI = signer.URI{Scheme: "pkcs11", Token: l.info.Label, Serial: l.info.SerialNumber, ID: id}.String()
	pub, err := l.public(s, h, id)
	switch {
	case classOf(err) != "":
		return entry{}, err
	case err != nil:
		info.Problem = fault.From(err).Text
	case a[pkcs11.CKA_SIGN] != nil && !a.is(pkcs11.CKA_SIGN):
		info.Problem = "the key may not sign (CKA_SIGN)"
	case a.is(pkcs11.CKA_ALWAYS_AUTHENTICATE):
		info.Problem = "the key wants the PIN for each signature (CKA_ALWAYS_AUTHENTICATE)"
	default:
		info.Public = pub
	}
	return entry{info: info, handle: h, unread: err != nil}, nil
}

func origin(a attributes) signer.Origin {
	switch {
	case a[pkcs11.CKA_LOCAL] == nil:
		return signer.OriginUnknown
	case a.is(pkcs11.CKA_LOCAL):
		return signer.OriginDevice
	}
	return signer.OriginImported
}

// public reads the public key that belongs to a private one: from the public object with the same id and type, or,
// where there is none, from the private object itself. The first signature shows whether they belong together.
func (l *link) public(s *slot, private objectHandle, id signer.ID) (ident.PublicKey, error) {
	own, err := l.read(s, private, append([]uint{ckaPublicKeyInfo}, publicAttributes...))
	if err != nil {
		return ident.PublicKey{}, err
	}
	keyType, ok := own.number(pkcs11.CKA_KEY_TYPE)
	if !ok {
		return ident.PublicKey{}, fault.New(fault.Malformed, "the key has no CKA_KEY_TYPE")
	}
	beside, err := l.find(s, 2, append(publicTemplate(id.Bytes()), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, keyType))...)
	if err != nil {
		return ident.PublicKey{}, err
	}
	from := own
	switch len(beside) {
	case 0:
	case 1:
		if from, err = l.read(s, beside[0], publicAttributes); err != nil {
			return ident.PublicKey{}, err
		}
	default:
		return ident.PublicKey{}, fault.New(fault.Malformed, "several public keys have this id")
	}
	return rawPublic{
		keyType: keyType,
		params:  first(from[pkcs11.CKA_EC_PARAMS], own[pkcs11.CKA_EC_PARAMS]),
		point:   from[pkcs11.CKA_EC_POINT], modulus: from[pkcs11.CKA_MODULUS],
		exponent: from[pkcs11.CKA_PUBLIC_EXPONENT], spki: own[ckaPublicKeyInfo],
	}.parse()
}

func first(a, b []byte) []byte {
	if len(a) > 0 {
		return a
	}
	return b
}

// Open implements signer.Backend.
func (b *Backend) Open(ctx context.Context, id signer.ID, pub ident.PublicKey) (signer.Key, error) {
	if pub.IsZero() {
		return nil, fault.BadField("public_key", "a key is opened together with its public key")
	}
	if _, err := signer.NewID(id.Bytes()); err != nil {
		return nil, err
	}
	e, err := do(ctx, b, func(s *slot) (entry, error) {
		e, err := s.link.lookup(s, id)
		if err != nil {
			return entry{}, err
		}
		if err := s.link.belongs(s, e, pub); err != nil {
			return entry{}, err
		}
		e.info.Public, e.info.Problem = pub, ""
		s.link.remember(refOf(e.info), e.handle)
		return e, nil
	})
	if err != nil {
		return nil, err
	}
	return b.key(e.info), nil
}

// Find implements signer.Backend.
func (b *Backend) Find(ctx context.Context, id signer.ID) (signer.KeyInfo, error) {
	if _, err := signer.NewID(id.Bytes()); err != nil {
		return signer.KeyInfo{}, err
	}
	e, err := do(ctx, b, func(s *slot) (entry, error) { return s.link.lookup(s, id) })
	if fault.CodeOf(err) == fault.KeyGone {
		return signer.KeyInfo{}, fault.Wrap(fault.KeyNotFound, err, "the token holds no key with this id")
	}
	return e.info, err
}

// Keys implements signer.Backend.
func (b *Backend) Keys(ctx context.Context) ([]signer.KeyInfo, error) {
	keys, err := do(ctx, b, func(s *slot) ([]signer.KeyInfo, error) {
		l := s.link
		handles, err := l.find(s, 0, privateTemplate()...)
		if err != nil {
			return nil, err
		}
		if len(handles) == 0 {
			return nil, l.absent(s, "")
		}
		out := make([]signer.KeyInfo, 0, len(handles))
		seen := map[signer.ID]int{}
		for _, h := range handles {
			e, err := l.describe(s, h)
			if classOf(err) == signer.HandleLost {
				continue // destroyed since the search
			}
			if err != nil {
				return nil, err
			}
			if i, twice := seen[e.info.ID]; twice && e.info.ID != "" {
				out[i].Problem, e.info.Problem = "several private keys have this id", "several private keys have this id"
				out[i].Public, e.info.Public = ident.PublicKey{}, ident.PublicKey{}
			}
			seen[e.info.ID] = len(out)
			out = append(out, e.info)
		}
		return out, nil
	})
	if fault.CodeOf(err) == fault.KeyGone { // an empty token, and a healthy one
		return nil, nil
	}
	return keys, err
}

// Destroy implements signer.Backend.
func (b *Backend) Destroy(ctx context.Context, id signer.ID) error {
	if _, err := signer.NewID(id.Bytes()); err != nil {
		return err
	}
	unlock, err := b.maker(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	_, err = do(ctx, b, func(s *slot) (struct{}, error) {
		l := s.link
		found, err := l.objects(s, id)
		if err != nil {
			return struct{}{}, err
		}
		if len(found) == 0 {
			return struct{}{}, l.absent(s, id)
		}
		l.forget(id)
		l.known.remove(id)
		for _, h := range found {
			if err := l.mod.DestroyObject(s.session, h); err != nil {
				return struct{}{}, failed("C_DestroyObject", err)
			}
		}
		if found, err = l.objects(s, id); err == nil && len(found) > 0 {
			err = failing(signer.CallerError, "destroying the key", "%d objects are still there", len(found))
		}
		return struct{}{}, err
	})
	if fault.CodeOf(err) == fault.KeyGone {
		return nil
	}
	return err
}

// objects returns the private keys, then the public keys, with this id.
func (l *link) objects(s *slot, id signer.ID) ([]objectHandle, error) {
	private, err := l.find(s, 0, append(privateTemplate(), pkcs11.NewAttribute(pkcs11.CKA_ID, id.Bytes()))...)
	if err != nil {
		return nil, err
	}
	pub, err := l.find(s, 0, publicTemplate(id.Bytes())...)
	return append(private, pub...), err
}

// maker takes the right to make or destroy keys, so that no two calls take one id.
func (b *Backend) maker(ctx context.Context) (unlock func(), err error) {
	if ctx.Err() != nil {
		return nil, public(ctx.Err())
	}
	select {
	case <-b.making:
		return func() { b.making <- struct{}{} }, nil
	case <-ctx.Done():
		return nil, public(ctx.Err())
	}
}
