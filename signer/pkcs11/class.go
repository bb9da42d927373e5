//go:build cgo

package pkcs11

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/signer"
)

// Return values of PKCS#11 3.x that the binding does not name.
const (
	ckrActionProhibited      = 0x1B
	ckrCurveNotSupported     = 0x140
	ckrFIPSSelfTestFailed    = 0x1B6
	ckrLibraryLoadFailed     = 0x1B7
	ckrPINTooWeak            = 0x1B8
	ckrTokenResourceExceeded = 0x201
	ckrOperationCancelFailed = 0x202
	ckrKeyExhausted          = 0x203
)

// classes says what each return value means for the connection. What is not listed is a caller error, or, from
// 0x80000000 on (vendor defined), a lost token: the repair of that includes all others.
var classes = map[pkcs11.Error]signer.Class{
	pkcs11.CKR_CANCEL:                         signer.TransientBusy,
	pkcs11.CKR_FUNCTION_CANCELED:              signer.TransientBusy,
	pkcs11.CKR_USER_ANOTHER_ALREADY_LOGGED_IN: signer.TransientBusy,
	pkcs11.CKR_USER_TOO_MANY_TYPES:            signer.TransientBusy,
	pkcs11.CKR_SESSION_READ_WRITE_SO_EXISTS:   signer.TransientBusy,

	pkcs11.CKR_SESSION_CLOSED:            signer.SessionLost,
	pkcs11.CKR_SESSION_HANDLE_INVALID:    signer.SessionLost,
	pkcs11.CKR_OPERATION_ACTIVE:          signer.SessionLost, // left over by a call that failed
	pkcs11.CKR_OPERATION_NOT_INITIALIZED: signer.SessionLost,
	ckrOperationCancelFailed:             signer.SessionLost,

	pkcs11.CKR_OBJECT_HANDLE_INVALID: signer.HandleLost,
	pkcs11.CKR_KEY_HANDLE_INVALID:    signer.HandleLost,

	pkcs11.CKR_USER_NOT_LOGGED_IN: signer.LoginLost,

	pkcs11.CKR_SLOT_ID_INVALID:      signer.TokenLost,
	pkcs11.CKR_GENERAL_ERROR:        signer.TokenLost,
	pkcs11.CKR_FUNCTION_FAILED:      signer.TokenLost,
	pkcs11.CKR_DEVICE_ERROR:         signer.TokenLost,
	pkcs11.CKR_DEVICE_REMOVED:       signer.TokenLost,
	pkcs11.CKR_TOKEN_NOT_PRESENT:    signer.TokenLost,
	pkcs11.CKR_TOKEN_NOT_RECOGNIZED: signer.TokenLost,

	pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED: signer.ModuleDead,
	pkcs11.CKR_NEED_TO_CREATE_THREADS:   signer.ModuleDead,
	pkcs11.CKR_CANT_LOCK:                signer.ModuleDead,
	pkcs11.CKR_MUTEX_BAD:                signer.ModuleDead,
	pkcs11.CKR_MUTEX_NOT_LOCKED:         signer.ModuleDead,
	ckrFIPSSelfTestFailed:               signer.ModuleDead,
	ckrLibraryLoadFailed:                signer.ModuleDead,

	pkcs11.CKR_PIN_INCORRECT:            signer.AuthorisationRefused,
	pkcs11.CKR_PIN_INVALID:              signer.AuthorisationRefused,
	pkcs11.CKR_PIN_LEN_RANGE:            signer.AuthorisationRefused,
	pkcs11.CKR_PIN_EXPIRED:              signer.AuthorisationRefused,
	pkcs11.CKR_PIN_LOCKED:               signer.AuthorisationRefused,
	ckrPINTooWeak:                       signer.AuthorisationRefused,
	pkcs11.CKR_USER_PIN_NOT_INITIALIZED: signer.AuthorisationRefused,
	pkcs11.CKR_USER_TYPE_INVALID:        signer.AuthorisationRefused,
	pkcs11.CKR_NEW_PIN_MODE:             signer.AuthorisationRefused,
	pkcs11.CKR_NEXT_OTP:                 signer.AuthorisationRefused,
	pkcs11.CKR_FUNCTION_REJECTED:        signer.AuthorisationRefused,

	pkcs11.CKR_HOST_MEMORY:   signer.ResourcesExhausted,
	pkcs11.CKR_DEVICE_MEMORY: signer.ResourcesExhausted,
	pkcs11.CKR_SESSION_COUNT: signer.ResourcesExhausted,
	ckrTokenResourceExceeded: signer.ResourcesExhausted,

	pkcs11.CKR_KEY_CHANGED: signer.KeyGone,
	ckrKeyExhausted:        signer.KeyGone,
}

const vendorDefined pkcs11.Error = 0x80000000

// texts are what a caller may read of a failure.
var texts = map[signer.Class]string{
	signer.TransientBusy:        "the token is busy",
	signer.SessionLost:          "the session with the token was lost and could not be made again",
	signer.HandleLost:           "the handle of the key was lost and could not be found again",
	signer.LoginLost:            "the login to the token was lost and could not be made again",
	signer.TokenLost:            "the token does not answer",
	signer.ModuleDead:           "the PKCS#11 module does not work",
	signer.AuthorisationRefused: "the token refused the authorisation",
	signer.ResourcesExhausted:   "the token or its module has no room left",
	signer.KeyGone:              "the token no longer holds this key, or holds another in its place",
	signer.CallerError:          "the token refused the request",
}

// A failure is one error of the module with its class. It is the cause inside a fault.Error, for the log.
type failure struct {
	class signer.Class
	op    string
	cause error
	empty bool // a key was looked for and not found
}

func (f *failure) Error() string {
	if f.cause == nil {
		return f.op + ": " + string(f.class)
	}
	return f.op + ": " + f.cause.Error()
}

func (f *failure) Unwrap() error { return f.cause }

// SignerClass returns the class, so that it can cross the plugin boundary.
func (f *failure) SignerClass() signer.Class { return f.class }

// failed gives an error of the module its class; nil stays nil.
func failed(op string, err error) error {
	if err == nil {
		return nil
	}
	var f *failure
	if errors.As(err, &f) {
		return err
	}
	var rv pkcs11.Error
	if !errors.As(err, &rv) {
		return err
	}
	class, ok := classes[rv]
	if !ok {
		class = signer.CallerError
		if rv >= vendorDefined {
			class = signer.TokenLost
		}
	}
	return &failure{class: class, op: op, cause: rv}
}

func failing(class signer.Class, op, format string, args ...any) error {
	return &failure{class: class, op: op, cause: fmt.Errorf(format, args...)}
}

func classOf(err error) signer.Class {
	var f *failure
	if errors.As(err, &f) {
		return f.class
	}
	return ""
}

// public turns any error of this package into the one that callers see.
func public(err error) error {
	if err == nil {
		return nil
	}
	var e *fault.Error
	if errors.As(err, &e) {
		return e
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return fault.From(err)
	}
	var f *failure
	if !errors.As(err, &f) {
		return fault.From(err)
	}
	code := f.class.Code()
	if rv := pkcs11.Error(0); errors.As(f.cause, &rv) && unsupported[rv] {
		code = fault.AlgorithmUnsupported
	}
	out := fault.Wrap(code, f, "%s", texts[f.class])
	if code == fault.DeviceBusy {
		out.RetryAfter = busyRetry
	}
	return out
}

const busyRetry = 50 * time.Millisecond

// unsupported are the caller errors that say that the token cannot do the algorithm.
var unsupported = map[pkcs11.Error]bool{
	pkcs11.CKR_MECHANISM_INVALID:          true,
	pkcs11.CKR_MECHANISM_PARAM_INVALID:    true,
	pkcs11.CKR_KEY_SIZE_RANGE:             true,
	pkcs11.CKR_DOMAIN_PARAMS_INVALID:      true,
	ckrCurveNotSupported:                  true,
	pkcs11.CKR_KEY_TYPE_INCONSISTENT:      true,
	pkcs11.CKR_FUNCTION_NOT_SUPPORTED:     true,
	pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED: true,
	ckrActionProhibited:                   true,
}
