// Package signer says what a key backend is: a device, or a file that stands in for one, that makes keys, keeps
// them and signs with them. The packages below it are the backends; signertest is the suite that each must pass.
package signer

import (
	"context"
	"encoding/hex"
	"errors"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
)

// A Signer signs messages with one key.
//
// Implementations are safe for concurrent use. They hash the message themselves where the algorithm does, and
// they verify each signature against Public before they return it, because a wrong one may be a fault attack.
// Errors carry one of the codes of Class.
type Signer interface {
	// Public returns the public key. It never talks to the device.
	Public() ident.PublicKey
	// Sign returns a raw signature of msg: r||s of fixed width for ECDSA.
	Sign(ctx context.Context, msg []byte) ([]byte, error)
}

// A Key is a Signer with an address and a history of where it came from.
type Key interface {
	Signer
	Info() KeyInfo
}

// A Backend holds keys. All methods are safe for concurrent use and bounded by their context; none retries a
// refused PIN; none fails because another key or token is broken. A Backend whose device is missing still answers
// Describe, and answers device_lost to the rest until the device is back.
type Backend interface {
	// Describe probes the device. The probe itself failing is reported inside the Description.
	Describe(ctx context.Context) Description
	// Generate makes a key under the given id, which must be unused, and returns it once it is durable.
	Generate(ctx context.Context, id ID, alg ident.Algorithm) (Key, error)
	// Open finds the key with this id and checks that its public key is pub. Another key under the id, or none on a
	// healthy device, is key_gone.
	Open(ctx context.Context, id ID, pub ident.PublicKey) (Key, error)
	// Find returns what the backend knows of the key with this id, without checking it against a public key.
	Find(ctx context.Context, id ID) (KeyInfo, error)
	// Keys lists all keys on the device that trustd can use, also those that others made. A key that cannot be read
	// is listed with Problem set, and never hides the rest.
	Keys(ctx context.Context) ([]KeyInfo, error)
	// Destroy deletes a key and reads back that it is gone. A key that is not there is no error.
	Destroy(ctx context.Context, id ID) error
	// Close releases the device. It waits for what is in flight.
	Close() error
}

// An Importer can take in a private key made elsewhere. The key is marked OriginImported.
type Importer interface {
	// Import stores the PKCS#8 DER private key under id.
	Import(ctx context.Context, id ID, pkcs8 []byte) (Key, error)
}

// An Exporter can give a private key out. Only the software backend is one.
type Exporter interface {
	// Export returns the PKCS#8 DER private key. The caller must protect it before it leaves the process.
	Export(ctx context.Context, id ID) ([]byte, error)
}

// A BatchSigner signs several messages in one call to its device or process. Results stand in the order of the
// messages.
type BatchSigner interface {
	Signer
	SignBatch(ctx context.Context, msgs [][]byte) []Result
}

// A Result is one signature of a batch, or why there is none.
type Result struct {
	Signature []byte
	Err       error
}

// SignAll signs every message with s, in one batch where s can.
func SignAll(ctx context.Context, s Signer, msgs [][]byte) []Result {
	if b, ok := s.(BatchSigner); ok {
		return b.SignBatch(ctx, msgs)
	}
	out := make([]Result, len(msgs))
	for i, m := range msgs {
		out[i].Signature, out[i].Err = s.Sign(ctx, m)
	}
	return out
}

// An ID names a key inside its backend: CKA_ID on a token, a file name elsewhere. trustd makes random ids of 16
// bytes; a token may hold keys of others with ids of 1 to 64 bytes.
type ID string

// NewID returns the id of the given raw bytes.
func NewID(raw []byte) (ID, error) {
	if len(raw) == 0 || len(raw) > 64 {
		return "", fault.BadField("key_id", "a key id has 1 to 64 bytes")
	}
	return ID(raw), nil
}

// ParseID reads an id written as hexadecimal digits.
func ParseID(s string) (ID, error) {
	raw, err := hex.DecodeString(s)
	if err != nil {
		return "", fault.BadField("key_id", "a key id is written in hexadecimal digits")
	}
	return NewID(raw)
}

// Bytes returns the raw bytes.
func (id ID) Bytes() []byte { return []byte(id) }

// String returns the id in hexadecimal digits.
func (id ID) String() string { return hex.EncodeToString([]byte(id)) }

// A Grade says what a relying party may conclude about where a key lives.
type Grade string

const (
	HardwareAttested Grade = "hardware-attested" // the device proved it (TPM2_Certify, vendor attestation)
	HardwareClaimed  Grade = "hardware-claimed"  // the device says so
	Software         Grade = "software"          // a file, or an emulation that says what it is
)

// AtLeast reports whether g is as good as least. "" is lower than any grade, and so is a name that is none.
func (g Grade) AtLeast(least Grade) bool { return g.rank() >= least.rank() }

func (g Grade) rank() int {
	switch g {
	case HardwareAttested:
		return 3
	case HardwareClaimed:
		return 2
	case Software:
		return 1
	}
	return 0
}

// ParseGrade reads the name of a grade.
func ParseGrade(s string) (Grade, error) {
	if g := Grade(s); g.rank() > 0 {
		return g, nil
	}
	return "", fault.BadField("grade", "a grade is hardware-attested, hardware-claimed or software")
}

// An Origin says where a private key was made.
type Origin string

const (
	OriginDevice   Origin = "generated_on_device"
	OriginImported Origin = "imported"
	OriginUnknown  Origin = "unknown"
)

// KeyInfo describes one key of a backend.
type KeyInfo struct {
	URI       string          // pkcs11:..., tpm:..., soft:...; see ParseURI
	ID        ID              // inside the backend
	Label     string          // for people; never used to find a key
	Public    ident.PublicKey // zero when Problem is set
	Grade     Grade
	Origin    Origin
	Sensitive bool // the private key never leaves the device in the clear (CKA_SENSITIVE, fixedTPM)
	Always    bool // and never could (CKA_ALWAYS_SENSITIVE and CKA_NEVER_EXTRACTABLE, sensitiveDataOrigin)
	Exported  bool // the backend would give the private key out
	Problem   string
}

// A backend may also say how it fares. The daemon asks for these by assertion.
type (
	// Parallel says how many signatures the device makes at once; 1 where a backend does not say.
	Parallel interface{ Parallel() int }
	// FailureCounter counts the device's failures by class since the backend was opened, repaired ones included.
	FailureCounter interface{ Failures() map[Class]uint64 }
	// Unlocker forgets that the device refused the authorisation and tries it once more: an operator's verb. The PIN
	// is read anew.
	Unlocker interface {
		Unlock(ctx context.Context) error
	}
)

// ClassOf returns the class of a device's failure, on either side of a process boundary; "" where err has none.
func ClassOf(err error) Class {
	var c interface{ SignerClass() Class }
	if errors.As(err, &c) {
		return c.SignerClass()
	}
	return ""
}

// Classes returns the ten classes.
func Classes() []Class {
	return []Class{TransientBusy, SessionLost, HandleLost, LoginLost, TokenLost, ModuleDead, AuthorisationRefused,
		ResourcesExhausted, KeyGone, CallerError}
}

// A Description is what a backend says of its device.
type Description struct {
	Kind       string            // pkcs11, tpm or soft
	Device     string            // for people: token label and serial, TPM manufacturer and firmware
	Algorithms []ident.Algorithm // that Generate takes, best default first
	Mechanisms []string          // as the device names them
	Limits     map[string]string // sessions, slots, PIN state and the like
	Grade      Grade
	State      State
	Problem    string // why State is not Ready: safe to show
	Remedy     string // what to do about it
}

// A State says whether a backend can sign.
type State string

const (
	Ready      State = "ready"
	Degraded   State = "degraded"   // gone for now; comes back by itself
	Recovering State = "recovering" // back, or being brought back: no signature has proved it yet
	Locked     State = "locked"     // the device refused the authorisation: an operator must act
	CrashLoop  State = "crash-loop" // the module or its process dies again and again; tried at growing intervals
	Stopped    State = "stopped"    // cannot work as configured: a module or plugin that is not there or not the pinned one
)

// States returns the six states.
func States() []State { return []State{Ready, Degraded, Recovering, Locked, CrashLoop, Stopped} }

// A Class is one of the ten kinds of failure that every backend tells apart and acts on.
type Class string

const (
	TransientBusy        Class = "transient_busy"
	SessionLost          Class = "session_lost"
	HandleLost           Class = "handle_lost"
	LoginLost            Class = "login_lost"
	TokenLost            Class = "token_lost"
	ModuleDead           Class = "module_dead"
	AuthorisationRefused Class = "authorisation_refused"
	ResourcesExhausted   Class = "resources_exhausted"
	KeyGone              Class = "key_gone"
	CallerError          Class = "caller_error"
)

// Code returns the code that callers see for a class. Session, handle and login losses are repaired inside the
// backend; a caller sees them only when the repair failed, as device_lost.
func (c Class) Code() fault.Code {
	switch c {
	case TransientBusy:
		return fault.DeviceBusy
	case SessionLost, HandleLost, LoginLost, TokenLost:
		return fault.DeviceLost
	case ModuleDead:
		return fault.DeviceDead
	case AuthorisationRefused:
		return fault.AuthorisationRefused
	case ResourcesExhausted:
		return fault.ResourceExhausted
	case KeyGone:
		return fault.KeyGone
	case CallerError:
		return fault.Malformed
	}
	return fault.Internal
}
