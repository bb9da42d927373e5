package main

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/plugins"
	"github.com/trustd/trustd/signer"
)

// openSoft opens the backend of software keys. It tries the PIN at once, as a token would at its first login.
func openSoft(s plugins.Settings) *backend {
	pin, err := s.PIN(context.Background())
	if note := os.Getenv("FAULTY_NOTE"); note != "" { // one line for each time a PIN was tried
		appendLine(note, fmt.Sprintf("%d %x", os.Getpid(), sha256.Sum256(pin)))
	}
	b := &backend{keys: map[signer.ID]*key{}, file: cmp.Or(s.Values["keys"], s.Values["serial"])}
	b.load()
	switch {
	case err != nil:
		b.broken = fault.Wrap(fault.AuthorisationRefused, err, "no PIN")
	case s.Values["module"] == "refuse-pin":
		b.broken = refused()
	}
	return b
}

func refused() error {
	cause := &classed{signer.AuthorisationRefused}
	return fault.Wrap(fault.AuthorisationRefused, cause, "the token refused the authorisation")
}

// backend holds keys in memory, and in a file in the clear, so that they outlive the process. The content of a message to
// sign may say what happens during that call; see key.Sign.
type backend struct {
	file   string
	broken error

	mu   sync.Mutex
	keys map[signer.ID]*key
}

func (b *backend) load() {
	text, err := os.ReadFile(b.file)
	if err != nil {
		return
	}
	for line := range strings.Lines(string(text)) {
		var id, seed []byte
		if n, _ := fmt.Sscanf(line, "%x %x", &id, &seed); n == 2 && len(seed) == ed25519.SeedSize {
			b.keys[signer.ID(id)] = b.key(signer.ID(id), seed)
		}
	}
}

func (b *backend) save() {
	var text strings.Builder
	for id, k := range b.keys {
		fmt.Fprintf(&text, "%x %x\n", id.Bytes(), k.private.Seed())
	}
	_ = os.WriteFile(b.file, []byte(text.String()), 0o600)
}

func appendLine(path, line string) {
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err == nil {
		_, _ = fmt.Fprintln(f, line)
		_ = f.Close()
	}
}

func (b *backend) Describe(context.Context) signer.Description {
	d := signer.Description{
		Kind: "soft", Device: "software keys for tests", Algorithms: []ident.Algorithm{ident.Ed25519},
		Mechanisms: []string{"NONE"}, Limits: map[string]string{}, Grade: signer.Software, State: signer.Ready,
	}
	if b.broken != nil {
		d.State, d.Problem, d.Remedy = signer.Stopped, "the token refused the PIN", "correct it"
		d.Limits["pin"] = "refused"
	}
	return d
}

func (b *backend) Generate(_ context.Context, id signer.ID, alg ident.Algorithm) (signer.Key, error) {
	if b.broken != nil {
		return nil, b.broken
	}
	if _, err := signer.NewID(id.Bytes()); err != nil {
		return nil, err
	}
	if alg != ident.Ed25519 {
		return nil, fault.New(fault.AlgorithmUnsupported, "this backend makes ed25519 keys")
	}
	if string(id) == idThatCrashes {
		crash()
	}
	seed := make([]byte, ed25519.SeedSize)
	_, _ = rand.Read(seed) // never fails
	return b.put(id, seed, signer.OriginDevice)
}

func (b *backend) put(id signer.ID, seed []byte, from signer.Origin) (signer.Key, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.keys[id] != nil {
		return nil, fault.New(fault.AlreadyExists, "the id is taken")
	}
	k := b.key(id, seed)
	k.origin = from
	b.keys[id] = k
	b.save()
	return k, nil
}

// idThatCrashes is the id of a key that cannot be made.
const idThatCrashes = "crash"

func (b *backend) Open(_ context.Context, id signer.ID, pub ident.PublicKey) (signer.Key, error) {
	if b.broken != nil {
		return nil, b.broken
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if k := b.keys[id]; k != nil && k.Public().Equal(pub) {
		return k, nil
	}
	return nil, fault.Wrap(fault.KeyGone, &classed{signer.KeyGone}, "no such key")
}

func (b *backend) Find(_ context.Context, id signer.ID) (signer.KeyInfo, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if k := b.keys[id]; k != nil {
		return k.Info(), nil
	}
	return signer.KeyInfo{}, fault.New(fault.KeyNotFound, "no such key")
}

func (b *backend) Keys(context.Context) ([]signer.KeyInfo, error) {
	if b.broken != nil {
		return nil, b.broken
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	var out []signer.KeyInfo
	for _, id := range slices.Sorted(maps.Keys(b.keys)) {
		out = append(out, b.keys[id].Info())
	}
	return out, nil
}

func (b *backend) Destroy(_ context.Context, id signer.ID) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.keys, id)
	b.save()
	return nil
}

func (b *backend) Import(_ context.Context, id signer.ID, pkcs8 []byte) (signer.Key, error) {
	k, err := x509.ParsePKCS8PrivateKey(pkcs8)
	if err != nil {
		return nil, fault.BadField("private_key", "not PKCS#8")
	}
	private, ok := k.(ed25519.PrivateKey)
	if !ok {
		return nil, fault.New(fault.AlgorithmUnsupported, "this backend holds ed25519 keys")
	}
	return b.put(id, private.Seed(), signer.OriginImported)
}

func (b *backend) Close() error { return nil }

type key struct {
	in      *backend
	id      signer.ID
	private ed25519.PrivateKey
	public  ident.PublicKey
	origin  signer.Origin
}

func (b *backend) key(id signer.ID, seed []byte) *key {
	private := ed25519.NewKeyFromSeed(seed)
	public, err := ident.NewPublicKey(private.Public())
	if err != nil {
		panic(err) // a key made of a seed is a key
	}
	return &key{b, id, private, public, signer.OriginUnknown}
}

func (k *key) Public() ident.PublicKey { return k.public }

func (k *key) Info() signer.KeyInfo {
	return signer.KeyInfo{
		URI: signer.URI{Scheme: "soft", ID: k.id}.String(), ID: k.id, Public: k.public, Grade: signer.Software,
		Origin: k.origin,
	}
}

func (k *key) Sign(_ context.Context, msg []byte) ([]byte, error) {
	k.in.mu.Lock()
	now := k.in.keys[k.id]
	k.in.mu.Unlock()
	if now == nil || !now.public.Equal(k.public) {
		return nil, fault.Wrap(fault.KeyGone, &classed{signer.KeyGone}, "no such key")
	}
	command, argument, _ := strings.Cut(string(msg[:min(len(msg), 256)]), " ")
	switch command {
	case "crash":
		crash()
	case "crash-once": // argument: a file that says that it happened
		if _, err := os.Stat(argument); err != nil {
			appendLine(argument, "crashed")
			crash()
		}
	case "exit":
		os.Exit(7)
	case "hang":
		select {}
	case "freeze":
		_ = syscall.Kill(os.Getpid(), syscall.SIGSTOP)
		select {} // other threads may run on for a moment
	case "slow":
		if d, err := time.ParseDuration(argument); err == nil {
			time.Sleep(d)
		}
	case "class":
		c := signer.Class(argument)
		return nil, fault.Wrap(c.Code(), &classed{c}, "scripted")
	case "environ":
		return []byte(strings.Join(os.Environ(), "\n")), nil
	case "nothing":
		return nil, nil
	}
	return ed25519.Sign(k.private, msg), nil
}
