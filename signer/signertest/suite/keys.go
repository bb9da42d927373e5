package suite

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"strings"
	"sync"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signer"
)

func (s *suite) testGenerate(t T) {
	for _, alg := range s.algs {
		t.Run(alg.String(), func(t T) {
			k := s.key(t, alg)
			if got := k.Public().Algorithm(); got != alg {
				t.Fatalf("Generate(%v) made a key of %v", alg, got)
			}
			info := k.Info()
			s.checkInfo(t, info, info.ID, k.Public())
			if info.Origin != signer.OriginDevice {
				t.Errorf("Origin = %q, want %q", info.Origin, signer.OriginDevice)
			}
			_, err := s.backend.Generate(t.Context(), info.ID, s.fast)
			wantCode(t, err, fault.AlreadyExists)
			again, err := s.backend.Open(t.Context(), info.ID, k.Public())
			if err != nil {
				t.Fatalf("Open after a refused Generate: %v", cause(err))
			}
			mustSign(t, again, []byte("the first key is still there"))
		})
	}
	t.Run("same id at once", func(t T) {
		id := s.freshID(t)
		errs := make([]error, 4)
		keys := make([]signer.Key, len(errs))
		var wg sync.WaitGroup
		for i := range errs {
			wg.Go(func() { keys[i], errs[i] = s.backend.Generate(t.Context(), id, s.fast) })
		}
		wg.Wait()
		won := 0
		for i, err := range errs {
			if err != nil {
				wantCode(t, err, fault.AlreadyExists)
				continue
			}
			won++
			mustSign(t, keys[i], []byte("winner"))
		}
		if won != 1 {
			t.Errorf("%d of %d calls made a key under one id", won, len(errs))
		}
	})
}

func (s *suite) testOpen(t T) {
	ctx := t.Context()
	k := s.key(t, s.fast)
	id := k.Info().ID
	for _, alg := range s.algs {
		want := s.key(t, alg)
		got, err := s.backend.Open(ctx, want.Info().ID, want.Public())
		if err != nil {
			t.Errorf("Open(%v): %v", alg, cause(err))
			continue
		}
		if !got.Public().Equal(want.Public()) {
			t.Errorf("Open(%v) returned another key", alg)
		}
		s.checkInfo(t, got.Info(), want.Info().ID, want.Public())
		mustSign(t, got, []byte("opened"))
	}
	other := otherKey(t, k.Public())
	_, err := s.backend.Open(ctx, id, other)
	wantCode(t, err, fault.KeyGone)
	_, err = s.backend.Open(ctx, id, ident.PublicKey{})
	wantCode(t, err, fault.KeyGone, fault.Malformed)
	_, err = s.backend.Open(ctx, newID(t), k.Public())
	wantCode(t, err, fault.KeyGone)
	if _, err := s.backend.Open(ctx, id, k.Public()); err != nil {
		t.Errorf("Open after Open with a wrong key: %v", cause(err))
	}
}

// otherKey returns a public key of the same algorithm, where that is cheap, that is not pub.
func otherKey(t T, pub ident.PublicKey) ident.PublicKey {
	t.Helper()
	var other any
	switch pub.Algorithm() {
	case ident.ECDSAP256, ident.ECDSAP384:
		k, err := ecdsa.GenerateKey(pub.Key().(*ecdsa.PublicKey).Curve, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		other = &k.PublicKey
	default:
		k, _, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		other = k
	}
	p, err := ident.NewPublicKey(other)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (s *suite) testFind(t T) {
	for _, alg := range s.algs {
		k := s.key(t, alg)
		info, err := s.backend.Find(t.Context(), k.Info().ID)
		if err != nil {
			t.Errorf("Find(%v): %v", alg, cause(err))
			continue
		}
		s.checkInfo(t, info, k.Info().ID, k.Public())
		if want := k.Info(); info.URI != want.URI || info.Origin != want.Origin || info.Grade != want.Grade ||
			info.Sensitive != want.Sensitive || info.Always != want.Always || info.Exported != want.Exported {
			t.Errorf("Find says %+v, the key %+v", info, want)
		}
	}
	_, err := s.backend.Find(t.Context(), newID(t))
	wantCode(t, err, fault.KeyNotFound)
}

func (s *suite) testKeys(t T) {
	for _, alg := range s.algs {
		s.key(t, alg)
	}
	list, err := s.backend.Keys(t.Context())
	if err != nil {
		t.Fatalf("Keys: %v", cause(err))
	}
	byID := map[signer.ID]signer.KeyInfo{}
	uris := map[string]bool{}
	for _, info := range list {
		if uris[info.URI] {
			t.Errorf("%s is listed twice", info.URI)
		}
		uris[info.URI] = true
		byID[info.ID] = info
		if info.Problem == "" && info.Public.IsZero() {
			t.Errorf("%s has neither a public key nor a problem", info.URI)
		}
	}
	for alg, k := range s.keys {
		info, ok := byID[k.Info().ID]
		if !ok {
			t.Errorf("the key of %v is not listed", alg)
			continue
		}
		s.checkInfo(t, info, k.Info().ID, k.Public())
	}
}

// testIDs checks ids of all lengths and with bytes that a careless backend would take for something else.
func (s *suite) testIDs(t T) {
	suffix := newID(t).Bytes()
	for name, raw := range map[string][]byte{
		"longest":       bytes.Repeat(suffix, 4),
		"leading zero":  append([]byte{0, 0}, suffix...),
		"trailing zero": append(bytes.Clone(suffix), 0, 0),
		"path":          append([]byte("../../"), suffix...),
		"uri":           append([]byte("%41;id=&?"), suffix...),
		"not utf-8":     append([]byte{0xff, 0xfe}, suffix...),
	} {
		t.Run(name, func(t T) {
			id, err := signer.NewID(raw)
			if err != nil {
				t.Fatal(err)
			}
			s.track(id)
			k, err := s.backend.Generate(t.Context(), id, s.fast)
			if err != nil {
				t.Fatalf("Generate: %v", cause(err))
			}
			s.checkInfo(t, k.Info(), id, k.Public())
			if _, err := s.backend.Open(t.Context(), id, k.Public()); err != nil {
				t.Errorf("Open: %v", cause(err))
			}
			if err := s.backend.Destroy(t.Context(), id); err != nil {
				t.Errorf("Destroy: %v", cause(err))
			}
		})
	}
	for _, bad := range []signer.ID{"", signer.ID(strings.Repeat("x", 65))} {
		_, err := s.backend.Generate(t.Context(), bad, s.fast)
		wantCode(t, err, fault.Malformed)
	}
}

func (s *suite) testUnsupported(t T) {
	offered := map[ident.Algorithm]bool{}
	for _, a := range s.desc.Algorithms {
		offered[a] = true
	}
	for _, a := range append(ident.Algorithms(), 0, 7, 255) {
		if offered[a] {
			continue
		}
		id := s.freshID(t)
		_, err := s.backend.Generate(t.Context(), id, a)
		wantCode(t, err, fault.AlgorithmUnsupported)
		if err != nil && !strings.Contains(fault.From(err).Text, s.desc.Algorithms[0].String()) {
			t.Errorf("the refusal of %v does not name what the backend can do: %q", a, fault.From(err).Text)
		}
		_, err = s.backend.Find(t.Context(), id)
		wantCode(t, err, fault.KeyNotFound)
	}
}

func (s *suite) testDestroy(t T) {
	ctx := t.Context()
	id := s.freshID(t)
	k, err := s.backend.Generate(ctx, id, s.fast)
	if err != nil {
		t.Fatalf("Generate: %v", cause(err))
	}
	mustSign(t, k, []byte("before"))
	for range 2 { // a key that is not there is no error
		if err := s.backend.Destroy(ctx, id); err != nil {
			t.Fatalf("Destroy: %v", cause(err))
		}
		_, err = s.backend.Find(ctx, id)
		wantCode(t, err, fault.KeyNotFound)
		_, err = s.backend.Open(ctx, id, k.Public())
		wantCode(t, err, fault.KeyGone)
		_, err = k.Sign(ctx, []byte("after"))
		wantCode(t, err, fault.KeyGone)
	}
	if !k.Public().Equal(k.Info().Public) {
		t.Error("the public key went with the private one")
	}
	// The id is free again, and the old Key does not sign with the new key.
	next, err := s.backend.Generate(ctx, id, s.fast)
	if err != nil {
		t.Fatalf("Generate under the id of a destroyed key: %v", cause(err))
	}
	mustSign(t, next, []byte("next"))
	_, err = k.Sign(ctx, []byte("old key, new private key"))
	wantCode(t, err, fault.KeyGone)
	_, err = s.backend.Open(ctx, id, k.Public())
	wantCode(t, err, fault.KeyGone)
	mustSign(t, s.key(t, s.fast), []byte("other keys are untouched"))
}

func (s *suite) testImport(t T) {
	imp, ok := s.backend.(signer.Importer)
	if !ok {
		t.Skip("the backend imports no keys")
	}
	der, _ := softKey(t, s.fast)
	id := s.freshID(t)
	if _, err := imp.Import(t.Context(), id, der); errors.Is(err, fault.Unsupported) {
		_, err = s.backend.Find(t.Context(), id)
		wantCode(t, err, fault.KeyNotFound)
		t.Skip("the backend imports no keys")
	}
	for _, alg := range s.algs {
		if alg == ident.RSA3072 || alg == ident.RSA4096 {
			continue // the same path as RSA2048, at a price
		}
		t.Run(alg.String(), func(t T) { s.importOne(t, imp, alg) })
	}
	for name, der := range map[string][]byte{
		"nothing": nil, "noise": []byte("not a key"), "public key": s.key(t, s.fast).Public().SPKI(),
	} {
		id := s.freshID(t)
		_, err := imp.Import(t.Context(), id, der)
		wantCode(t, err, fault.Malformed)
		if err == nil {
			t.Errorf("Import took %s for a key", name)
		}
		_, err = s.backend.Find(t.Context(), id)
		wantCode(t, err, fault.KeyNotFound)
	}
	foreign, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, err = imp.Import(t.Context(), s.freshID(t), marshal(t, foreign))
	wantCode(t, err, fault.AlgorithmUnsupported)
}

func (s *suite) importOne(t T, imp signer.Importer, alg ident.Algorithm) {
	der, pub := softKey(t, alg)
	id := s.freshID(t)
	k, err := imp.Import(t.Context(), id, der)
	if err != nil {
		t.Fatalf("Import: %v", cause(err))
	}
	if !k.Public().Equal(pub) {
		t.Fatal("Import returned another key")
	}
	info, err := s.backend.Find(t.Context(), id)
	if err != nil {
		t.Fatalf("Find: %v", cause(err))
	}
	for _, i := range []signer.KeyInfo{k.Info(), info} {
		s.checkInfo(t, i, id, pub)
		if i.Origin != signer.OriginImported {
			t.Errorf("Origin = %q, want %q", i.Origin, signer.OriginImported)
		}
	}
	mustSign(t, k, []byte("imported"))
	_, err = imp.Import(t.Context(), id, der)
	wantCode(t, err, fault.AlreadyExists)
	_, err = s.backend.Generate(t.Context(), id, alg)
	wantCode(t, err, fault.AlreadyExists)
	opened, err := s.backend.Open(t.Context(), id, pub)
	if err != nil {
		t.Fatalf("Open: %v", cause(err))
	}
	mustSign(t, opened, []byte("imported and opened"))
	if err := s.backend.Destroy(t.Context(), id); err != nil {
		t.Errorf("Destroy: %v", cause(err))
	}
}

// softKey makes a private key in memory.
func softKey(t T, alg ident.Algorithm) (pkcs8 []byte, pub ident.PublicKey) {
	t.Helper()
	var key any
	var err error
	switch alg {
	case ident.Ed25519:
		_, key, err = ed25519.GenerateKey(rand.Reader)
	case ident.ECDSAP256:
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case ident.ECDSAP384:
		key, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	default:
		key, err = rsa.GenerateKey(rand.Reader, 8*alg.SignatureSize())
	}
	if err != nil {
		t.Fatal(err)
	}
	pub, err = ident.NewPublicKey(publicOf(key))
	if err != nil {
		t.Fatal(err)
	}
	return marshal(t, key), pub
}

func marshal(t T, private any) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func (s *suite) testExport(t T) {
	exp, ok := s.backend.(signer.Exporter)
	for _, alg := range s.algs {
		k := s.key(t, alg)
		if !ok {
			if k.Info().Exported {
				t.Errorf("the key of %v is Exported, but the backend is no Exporter", alg)
			}
			continue
		}
		der, err := exp.Export(t.Context(), k.Info().ID)
		if err != nil {
			t.Errorf("Export(%v): %v", alg, cause(err))
			continue
		}
		private, err := x509.ParsePKCS8PrivateKey(der)
		if err != nil {
			t.Errorf("Export(%v) is no PKCS#8: %v", alg, err)
			continue
		}
		pub, err := ident.NewPublicKey(publicOf(private))
		if err != nil || !pub.Equal(k.Public()) {
			t.Errorf("Export(%v) returned another key", alg)
		}
	}
	if ok {
		_, err := exp.Export(context.Background(), newID(t))
		wantCode(t, err, fault.KeyNotFound)
	}
}

func publicOf(private any) any {
	switch k := private.(type) {
	case ed25519.PrivateKey:
		return k.Public()
	case *ecdsa.PrivateKey:
		return k.Public()
	case *rsa.PrivateKey:
		return k.Public()
	}
	return nil
}
