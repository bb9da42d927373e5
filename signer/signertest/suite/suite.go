// Package suite is the suite that every signer.Backend must pass, for callers that are not go test as well: signertest
// runs it as a test, and trustd plugin test on a plugin binary.
//
// The suite makes keys under random ids, tolerates keys of others on the device, and destroys its own at the end;
// without Reopen, one key stays, because closing is tested last.
package suite

import (
	"context"
	"crypto/rand"
	"errors"
	"slices"
	"strings"
	"sync"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
)

// A T is what the suite wants of a test: a part of *testing.T. Fatal ends the goroutine that calls it.
type T interface {
	Helper()
	Context() context.Context
	Error(args ...any)
	Errorf(format string, args ...any)
	Fatal(args ...any)
	Fatalf(format string, args ...any)
	// Skip says that the backend does not claim to do what is tested.
	Skip(args ...any)
	// Run runs f as a test below this one, and reports whether it passed.
	Run(name string, f func(T)) bool
}

// An Option changes what Run does.
type Option func(*suite)

// Algorithms limits the suite to some of the backend's algorithms, for devices on which others are too slow. At
// least one must be left.
func Algorithms(algs ...ident.Algorithm) Option {
	return func(s *suite) { s.only = algs }
}

// Reopen lets the suite check that keys outlive the process: open opens the same device again, after the first
// backend was closed.
func Reopen(open func(T) signer.Backend) Option {
	return func(s *suite) { s.reopen = open }
}

// suite is what the tests of one Run share: the backend and one key per algorithm, because making a key may take
// seconds.
type suite struct {
	only   []ident.Algorithm
	reopen func(T) signer.Backend

	backend signer.Backend
	desc    signer.Description
	algs    []ident.Algorithm
	fast    ident.Algorithm // the cheapest of algs

	mu   sync.Mutex
	keys map[ident.Algorithm]signer.Key
	made []signer.ID // all ids the suite used, to be destroyed at the end
}

// Run opens a backend and checks that it keeps the contract of package signer. The backend is open once at any
// time: open is called once, and Reopen's function after the first backend was closed.
func Run(t T, open func(T) signer.Backend, opts ...Option) {
	t.Helper()
	s := &suite{keys: map[ident.Algorithm]signer.Key{}}
	for _, o := range opts {
		o(s)
	}
	s.backend = open(t)
	closed := false
	defer func() {
		if !closed {
			_ = s.backend.Close()
		}
	}()
	if !t.Run("Describe", s.testDescribe) {
		return // without algorithms there is nothing to test
	}
	t.Run("Generate", s.testGenerate)
	t.Run("Sign", s.testSign)
	t.Run("FixedWidth", s.testFixedWidth)
	t.Run("Batch", s.testBatch)
	t.Run("Open", s.testOpen)
	t.Run("Find", s.testFind)
	t.Run("Keys", s.testKeys)
	t.Run("IDs", s.testIDs)
	t.Run("Unsupported", s.testUnsupported)
	t.Run("Destroy", s.testDestroy)
	t.Run("Import", s.testImport)
	t.Run("Export", s.testExport)
	t.Run("Context", s.testContext)
	t.Run("Concurrency", s.testConcurrency)
	if s.reopen == nil {
		s.destroyAll(t, s.key(t, s.fast).Info().ID)
	}
	t.Run("Close", func(t T) {
		closed = true
		s.testClose(t)
	})
	if s.reopen != nil {
		t.Run("Reopen", s.testReopen)
	}
}

func (s *suite) testDescribe(t T) {
	d := s.backend.Describe(t.Context())
	if !slices.Contains([]string{"pkcs11", "tpm", "soft", "plugin"}, d.Kind) {
		t.Errorf("Kind = %q", d.Kind)
	}
	if d.State != signer.Ready {
		t.Fatalf("State = %q (%s; %s), want ready", d.State, d.Problem, d.Remedy)
	}
	if d.Problem != "" {
		t.Errorf("a ready backend has the problem %q", d.Problem)
	}
	if d.Device == "" {
		t.Error("Device is empty")
	}
	checkGrade(t, d.Grade)
	seen := map[ident.Algorithm]bool{}
	for _, a := range d.Algorithms {
		if !a.Valid() || seen[a] {
			t.Errorf("Algorithms holds %v twice, or it is not valid", a)
		}
		seen[a] = true
		if len(s.only) == 0 || slices.Contains(s.only, a) {
			s.algs = append(s.algs, a)
		}
	}
	for _, a := range s.only {
		if !seen[a] {
			t.Errorf("the test asks for %v, which the backend does not offer", a)
		}
	}
	if len(s.algs) == 0 {
		t.Fatal("no algorithm to test")
	}
	s.desc = d
	s.fast = fastest(s.algs)
}

// fastest returns the algorithm whose keys are cheapest to make.
func fastest(algs []ident.Algorithm) ident.Algorithm {
	for _, a := range []ident.Algorithm{ident.Ed25519, ident.ECDSAP256, ident.ECDSAP384, ident.RSA2048} {
		if slices.Contains(algs, a) {
			return a
		}
	}
	return algs[0]
}

// key returns the suite's key of an algorithm, making it on first use.
func (s *suite) key(t T, alg ident.Algorithm) signer.Key {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if k, ok := s.keys[alg]; ok {
		return k
	}
	id := newID(t)
	s.made = append(s.made, id)
	k, err := s.backend.Generate(t.Context(), id, alg)
	if err != nil {
		t.Fatalf("Generate(%v): %v", alg, cause(err))
	}
	s.keys[alg] = k
	return k
}

// freshID returns an unused id, and has what is made under it destroyed at the end.
func (s *suite) freshID(t T) signer.ID {
	id := newID(t)
	s.track(id)
	return id
}

func (s *suite) track(id signer.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.made = append(s.made, id)
}

// destroyAll leaves the device as it was found, but for the keys in keep.
func (s *suite) destroyAll(t T, keep ...signer.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range s.made {
		if slices.Contains(keep, id) {
			continue
		}
		if err := s.backend.Destroy(context.Background(), id); err != nil {
			t.Errorf("destroying the suite's key %v: %v", id, cause(err))
		}
	}
}

func newID(t T) signer.ID {
	t.Helper()
	raw := make([]byte, 16)
	_, _ = rand.Read(raw) // never fails
	id, err := signer.NewID(raw)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// wantCode checks that err carries one of the codes and says nothing that must stay in the log.
func wantCode(t T, err error, codes ...fault.Code) {
	t.Helper()
	if err == nil {
		t.Errorf("no error, want %v", codes)
		return
	}
	if !slices.Contains(codes, fault.CodeOf(err)) {
		t.Errorf("error %v has the code %s, want %v", cause(err), fault.CodeOf(err), codes)
	}
	for _, leak := range []string{"CKR_", "TPM_RC", "TPM2_RC", "0x", "goroutine ", "rpc error"} {
		if strings.Contains(fault.From(err).Text, leak) {
			t.Errorf("the text %q of an error quotes the device", fault.From(err).Text)
		}
	}
}

// cause returns an error whose text includes what stays in the log, for the output of a failing test.
func cause(err error) error {
	var e *fault.Error
	if errors.As(err, &e) {
		return errors.New(e.Verbose())
	}
	return err
}

// mustSign signs and verifies.
func mustSign(t T, k signer.Signer, msg []byte) []byte {
	t.Helper()
	sig, err := k.Sign(context.Background(), msg)
	if err != nil {
		t.Fatalf("Sign(%v, %d bytes): %v", k.Public().Algorithm(), len(msg), cause(err))
	}
	if err := signature.Verify(k.Public(), msg, sig); err != nil {
		t.Fatalf("the signature by %v of %d bytes does not verify: %v", k.Public().Algorithm(), len(msg), err)
	}
	return sig
}

func checkGrade(t T, g signer.Grade) {
	t.Helper()
	if !slices.Contains([]signer.Grade{signer.HardwareAttested, signer.HardwareClaimed, signer.Software}, g) {
		t.Errorf("Grade = %q", g)
	}
}

// checkInfo checks what a KeyInfo says of the key pub under id.
func (s *suite) checkInfo(t T, info signer.KeyInfo, id signer.ID, pub ident.PublicKey) {
	t.Helper()
	if info.ID != id {
		t.Errorf("ID = %v, want %v", info.ID, id)
	}
	if info.Problem != "" {
		t.Errorf("Problem = %q", info.Problem)
	}
	if !info.Public.Equal(pub) {
		t.Errorf("Public of %v is another key", id)
	}
	u, err := signer.ParseURI(info.URI)
	switch {
	case err != nil:
		t.Errorf("URI %q: %v", info.URI, err)
	case u.ID != id || u.Scheme != s.desc.Kind:
		t.Errorf("URI %q does not name key %v of kind %s", info.URI, id, s.desc.Kind)
	case u.String() != info.URI:
		t.Errorf("URI %q is not in its canonical form %q", info.URI, u)
	}
	s.checkFlags(t, info)
}

// checkFlags checks that the flags of a KeyInfo do not contradict each other.
func (s *suite) checkFlags(t T, info signer.KeyInfo) {
	t.Helper()
	checkGrade(t, info.Grade)
	if !slices.Contains([]signer.Origin{signer.OriginDevice, signer.OriginImported, signer.OriginUnknown}, info.Origin) {
		t.Errorf("Origin = %q", info.Origin)
	}
	if info.Always && !info.Sensitive {
		t.Error("Always without Sensitive")
	}
	if info.Always && info.Origin == signer.OriginImported {
		t.Error("an imported key was outside the device, so it is not Always")
	}
	if info.Exported && (info.Sensitive || info.Grade != signer.Software) {
		t.Error("a key that can be exported claims to be sensitive or in hardware")
	}
	if _, ok := s.backend.(signer.Exporter); info.Exported && !ok {
		t.Error("Exported, but the backend is no Exporter")
	}
	if s.desc.Grade == signer.Software && info.Grade != signer.Software {
		t.Errorf("a software backend calls a key %q", info.Grade)
	}
}
