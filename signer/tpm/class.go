package tpm

import (
	"errors"

	"github.com/google/go-tpm/tpm2"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/tpmdev"
	"github.com/trustd/trustd/signer"
)

// classes says for each response code of a TPM which kind of failure it is (TPM 2.0 Library, Part 2, 6.6). What is
// not in the table is module_dead: a chip that answers what no specification foresees.
var classes = map[tpm2.TPMRC]signer.Class{
	// The TPM has not begun the command. tpmdev has repeated it for as long as it may take.
	tpm2.TPMRCRetry:         signer.TransientBusy,
	tpm2.TPMRCYielded:       signer.TransientBusy,
	tpm2.TPMRCTesting:       signer.TransientBusy,
	tpm2.TPMRCNeedsTest:     signer.TransientBusy,
	tpm2.TPMRCCanceled:      signer.TransientBusy,
	tpm2.TPMRCNVRate:        signer.TransientBusy,
	tpm2.TPMRCNVUnavailable: signer.TransientBusy,

	// The HMAC session is not there, or not fit for use.
	tpm2.TPMRCReferenceS0: signer.SessionLost,
	tpm2.TPMRCReferenceS1: signer.SessionLost,
	tpm2.TPMRCReferenceS2: signer.SessionLost,
	tpm2.TPMRCReferenceS3: signer.SessionLost,
	tpm2.TPMRCReferenceS4: signer.SessionLost,
	tpm2.TPMRCReferenceS5: signer.SessionLost,
	tpm2.TPMRCReferenceS6: signer.SessionLost,
	tpm2.TPMRCContextGap:  signer.SessionLost,
	tpm2.TPMRCAuthContext: signer.SessionLost,

	// An object is not there, or its saved context is from before a reset.
	tpm2.TPMRCHandle:          signer.HandleLost,
	tpm2.TPMRCReferenceH0:     signer.HandleLost,
	tpm2.TPMRCReferenceH1:     signer.HandleLost,
	tpm2.TPMRCReferenceH2:     signer.HandleLost,
	tpm2.TPMRCReferenceH3:     signer.HandleLost,
	tpm2.TPMRCReferenceH4:     signer.HandleLost,
	tpm2.TPMRCReferenceH5:     signer.HandleLost,
	tpm2.TPMRCReferenceH6:     signer.HandleLost,
	tpm2.TPMRCBadContext:      signer.HandleLost,
	tpm2.TPMRCParent:          signer.HandleLost,
	tpm2.TPMRCNVDefined:       signer.CallerError,
	tpm2.TPMRCAuthMissing:     signer.LoginLost, // the session is there, and authorises nothing any more
	tpm2.TPMRCNonce:           signer.LoginLost,
	tpm2.TPMRCExpired:         signer.LoginLost,
	tpm2.TPMRCExclusive:       signer.LoginLost,
	tpm2.TPMRCPCRChanged:      signer.LoginLost,
	tpm2.TPMRCInitialize:      signer.TokenLost, // reset, and waiting for TPM2_Startup
	tpm2.TPMRCReboot:          signer.TokenLost,
	tpm2.TPMRCFailure:         signer.ModuleDead, // failure mode: only a power cycle helps
	tpm2.TPMRCUpgrade:         signer.ModuleDead,
	tpm2.TPMRCNVUninitialized: signer.ModuleDead,

	// What we offer is refused. Never tried again: it may count towards a lockout.
	tpm2.TPMRCAuthFail:        signer.AuthorisationRefused,
	tpm2.TPMRCBadAuth:         signer.AuthorisationRefused,
	tpm2.TPMRCLockout:         signer.AuthorisationRefused,
	tpm2.TPMRCAuthType:        signer.AuthorisationRefused,
	tpm2.TPMRCAuthUnavailable: signer.AuthorisationRefused,
	tpm2.TPMRCPolicy:          signer.AuthorisationRefused,
	tpm2.TPMRCPolicyFail:      signer.AuthorisationRefused,
	tpm2.TPMRCPolicyCC:        signer.AuthorisationRefused,
	tpm2.TPMRCPCR:             signer.AuthorisationRefused,
	tpm2.TPMRCPP:              signer.AuthorisationRefused,
	tpm2.TPMRCHierarchy:       signer.AuthorisationRefused,
	tpm2.TPMRCDisabled:        signer.AuthorisationRefused,
	tpm2.TPMRCLocality:        signer.AuthorisationRefused,
	tpm2.TPMRCNVLocked:        signer.AuthorisationRefused,
	tpm2.TPMRCNVAuthorization: signer.AuthorisationRefused,

	tpm2.TPMRCObjectMemory:    signer.ResourcesExhausted,
	tpm2.TPMRCSessionMemory:   signer.ResourcesExhausted,
	tpm2.TPMRCMemory:          signer.ResourcesExhausted,
	tpm2.TPMRCSessionHandles:  signer.ResourcesExhausted,
	tpm2.TPMRCObjectHandles:   signer.ResourcesExhausted,
	tpm2.TPMRCTooManyContexts: signer.ResourcesExhausted,
	tpm2.TPMRCNVSpace:         signer.ResourcesExhausted,

	// The blob is damaged, or belongs to another TPM or to this one before it was cleared.
	tpm2.TPMRCIntegrity: signer.KeyGone,
	tpm2.TPMRCBinding:   signer.KeyGone,
	tpm2.TPMRCSensitive: signer.KeyGone,

	// What was asked does not fit this TPM or the key.
	tpm2.TPMRCAsymmetric:   signer.CallerError,
	tpm2.TPMRCAttributes:   signer.CallerError,
	tpm2.TPMRCHash:         signer.CallerError,
	tpm2.TPMRCValue:        signer.CallerError,
	tpm2.TPMRCKeySize:      signer.CallerError,
	tpm2.TPMRCMGF:          signer.CallerError,
	tpm2.TPMRCMode:         signer.CallerError,
	tpm2.TPMRCType:         signer.CallerError,
	tpm2.TPMRCKDF:          signer.CallerError,
	tpm2.TPMRCRange:        signer.CallerError,
	tpm2.TPMRCScheme:       signer.CallerError,
	tpm2.TPMRCSize:         signer.CallerError,
	tpm2.TPMRCSymmetric:    signer.CallerError,
	tpm2.TPMRCTag:          signer.CallerError,
	tpm2.TPMRCSelector:     signer.CallerError,
	tpm2.TPMRCInsufficient: signer.CallerError,
	tpm2.TPMRCSignature:    signer.CallerError,
	tpm2.TPMRCKey:          signer.CallerError,
	tpm2.TPMRCTicket:       signer.CallerError,
	tpm2.TPMRCReservedBits: signer.CallerError,
	tpm2.TPMRCCurve:        signer.CallerError,
	tpm2.TPMRCECCPoint:     signer.CallerError,
	tpm2.TPMRCUnbalanced:   signer.CallerError,
	tpm2.TPMRCCommandSize:  signer.CallerError,
	tpm2.TPMRCCommandCode:  signer.CallerError,
	tpm2.TPMRCAuthSize:     signer.CallerError,
	tpm2.TPMRCSequence:     signer.CallerError,
	tpm2.TPMRCCPHash:       signer.CallerError,
	tpm2.TPMRCNoResult:     signer.CallerError,
	tpm2.TPMRCNVRange:      signer.CallerError,
	tpm2.TPMRCNVSize:       signer.CallerError,
}

// texts says what a caller may read of each class.
var texts = map[signer.Class]string{
	signer.TransientBusy:        "the TPM is busy",
	signer.SessionLost:          "the TPM has lost its session",
	signer.HandleLost:           "the TPM has lost the loaded key",
	signer.LoginLost:            "the TPM and its session do not agree any more",
	signer.TokenLost:            "the TPM has gone",
	signer.ModuleDead:           "the TPM has failed; it needs a power cycle",
	signer.AuthorisationRefused: "the TPM refuses the authorisation",
	signer.ResourcesExhausted:   "the TPM has no room",
	signer.KeyGone:              "the key's files are not of this TPM, or damaged",
	signer.CallerError:          "the TPM cannot do that with this key",
}

// errProof says that a response was not the one that the HMAC session proves, or cannot be read at all. What it did to
// the TPM is not known then.
var errProof = errors.New("the response is not proven to be the TPM's")

// A failure is the cause inside a fault.Error, with its class.
type failure struct {
	class signer.Class
	cause error
	again bool // what was found out before: the TPM was not asked
}

func (f *failure) Error() string {
	if f.cause == nil {
		return string(f.class)
	}
	return f.cause.Error()
}

func (f *failure) Unwrap() error { return f.cause }

// SignerClass returns the class; see signer.ClassOf.
func (f *failure) SignerClass() signer.Class { return f.class }

// keyGone returns the error for a key that the TPM does not have, or has another in place of.
func keyGone(cause error, text string) *fault.Error {
	return fault.Wrap(fault.KeyGone, &failure{class: signer.KeyGone, cause: cause}, "%s", text)
}

// classify returns the class of an error of a command; "" for errors that are no device's.
func classify(err error) signer.Class {
	var rc tpm2.TPMRC
	var f *failure
	switch {
	case err == nil:
		return ""
	case errors.As(err, &f):
		return f.class
	case errors.Is(err, tpmdev.ErrLost), errors.Is(err, tpmdev.ErrHung):
		return signer.TokenLost
	case errors.Is(err, errProof):
		return signer.LoginLost
	case errors.As(err, &rc):
		return classOf(rc)
	case errors.Is(err, tpmdev.ErrAbsent):
		return signer.TokenLost
	}
	return ""
}

// classOf returns the class of a response code.
func classOf(rc tpm2.TPMRC) signer.Class {
	const formatOne, isParameter, isSession, number = 0x080, 0x040, 0x800, 0x700
	if rc&formatOne != 0 && rc&isParameter == 0 && rc&number != 0 {
		// Of a handle, or of a session. What we load is fit for its use, so a handle that is not names something else
		// by now: others have flushed ours.
		switch canonical(rc) {
		case tpm2.TPMRCValue, tpm2.TPMRCAttributes, tpm2.TPMRCType, tpm2.TPMRCKey:
			if rc&isSession != 0 {
				return signer.SessionLost
			}
			return signer.HandleLost
		}
	}
	if c, ok := classes[canonical(rc)]; ok {
		return c
	}
	return signer.ModuleDead
}

// defunct reports whether the TPM as a whole does not work: another connection, or another TPM, may.
func defunct(err error) bool {
	for _, rc := range []tpm2.TPMRC{tpm2.TPMRCFailure, tpm2.TPMRCReboot, tpm2.TPMRCUpgrade, tpm2.TPMRCNVUninitialized} {
		if errors.Is(err, rc) {
			return true
		}
	}
	return false
}

// canonical takes the number of the handle, parameter or session out of a format-one code.
func canonical(rc tpm2.TPMRC) tpm2.TPMRC {
	const formatOne, kept = 0x080, 0x0bf
	if rc&formatOne != 0 {
		return rc & kept
	}
	return rc
}

// report turns what a job returned into what callers see, with the class inside.
func report(err error) error {
	c := classify(err)
	var e *fault.Error
	var f *failure
	switch {
	case err == nil || errors.As(err, &f):
		return err
	case c == "":
		return fault.From(err)
	case !errors.As(err, &e):
		return fault.Wrap(c.Code(), &failure{class: c, cause: err}, "%s", texts[c])
	case e.Code == fault.DeviceLost && c.Code() != e.Code: // the Device has no connection, and the TPM has said why
		out := fault.Wrap(c.Code(), &failure{class: c, cause: e.Err}, "%s", texts[c])
		out.RetryAfter = e.RetryAfter
		return out
	}
	out := *e
	out.Err = &failure{class: c, cause: e.Err}
	return &out
}

// command marks the errors of a command that are neither a response code nor the connection's: go-tpm could not
// read the response, or its HMAC is wrong.
func command[R any](rsp *R, err error) (*R, error) {
	if err != nil && classify(err) == "" {
		err = errors.Join(errProof, err)
	}
	return rsp, err
}
