//go:build cgo

package pkcs11

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/signer"
)

// Return values that the binding does not name: of PKCS#11 3.0, and CKR_KEY_EXHAUSTED of 3.1.
const (
	ckrAEADDecryptFailed     = 0x42
	ckrTokenResourceExceeded = 0x201
	ckrOperationCancelFailed = 0x202
	ckrKeyExhausted          = 0x203
)

// classified lists every return value of PKCS#11 3.0 but CKR_OK by what it means for the connection.
var classified = map[signer.Class][]pkcs11.Error{
	signer.TransientBusy: {
		pkcs11.CKR_CANCEL, pkcs11.CKR_FUNCTION_CANCELED, pkcs11.CKR_USER_ANOTHER_ALREADY_LOGGED_IN,
		pkcs11.CKR_USER_TOO_MANY_TYPES, pkcs11.CKR_SESSION_READ_WRITE_SO_EXISTS, pkcs11.CKR_EXCEEDED_MAX_ITERATIONS,
	},
	signer.SessionLost: {
		pkcs11.CKR_SESSION_CLOSED, pkcs11.CKR_SESSION_HANDLE_INVALID,
		pkcs11.CKR_OPERATION_ACTIVE, // left over by a call that failed
		pkcs11.CKR_OPERATION_NOT_INITIALIZED, ckrOperationCancelFailed,
	},
	signer.HandleLost: {pkcs11.CKR_OBJECT_HANDLE_INVALID, pkcs11.CKR_KEY_HANDLE_INVALID},
	signer.LoginLost:  {pkcs11.CKR_USER_NOT_LOGGED_IN},
	signer.TokenLost: {
		pkcs11.CKR_SLOT_ID_INVALID, pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_FUNCTION_FAILED, pkcs11.CKR_DEVICE_ERROR,
		pkcs11.CKR_DEVICE_REMOVED, pkcs11.CKR_TOKEN_NOT_PRESENT, pkcs11.CKR_TOKEN_NOT_RECOGNIZED,
	},
	signer.ModuleDead: {
		pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED, pkcs11.CKR_NEED_TO_CREATE_THREADS, pkcs11.CKR_CANT_LOCK,
		pkcs11.CKR_MUTEX_BAD, pkcs11.CKR_MUTEX_NOT_LOCKED, pkcs11.CKR_FIPS_SELF_TEST_FAILED,
		pkcs11.CKR_LIBRARY_LOAD_FAILED,
	},
	signer.AuthorisationRefused: {
		pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_INVALID, pkcs11.CKR_PIN_LEN_RANGE, pkcs11.CKR_PIN_EXPIRED,
		pkcs11.CKR_PIN_LOCKED, pkcs11.CKR_PIN_TOO_WEAK, pkcs11.CKR_USER_PIN_NOT_INITIALIZED,
		pkcs11.CKR_USER_TYPE_INVALID, pkcs11.CKR_NEW_PIN_MODE, pkcs11.CKR_NEXT_OTP, pkcs11.CKR_FUNCTION_REJECTED,
	},
	signer.ResourcesExhausted: {
		pkcs11.CKR_HOST_MEMORY, pkcs11.CKR_DEVICE_MEMORY, pkcs11.CKR_SESSION_COUNT, ckrTokenResourceExceeded,
	},
	signer.KeyGone: {pkcs11.CKR_KEY_CHANGED, ckrKeyExhausted},
	signer.CallerError: {
		pkcs11.CKR_ARGUMENTS_BAD, pkcs11.CKR_NO_EVENT, pkcs11.CKR_ATTRIBUTE_READ_ONLY, pkcs11.CKR_ATTRIBUTE_SENSITIVE,
		pkcs11.CKR_ATTRIBUTE_TYPE_INVALID, pkcs11.CKR_ATTRIBUTE_VALUE_INVALID, pkcs11.CKR_ACTION_PROHIBITED,
		pkcs11.CKR_DATA_INVALID, pkcs11.CKR_DATA_LEN_RANGE, pkcs11.CKR_ENCRYPTED_DATA_INVALID,
		pkcs11.CKR_ENCRYPTED_DATA_LEN_RANGE, ckrAEADDecryptFailed, pkcs11.CKR_FUNCTION_NOT_PARALLEL,
		pkcs11.CKR_FUNCTION_NOT_SUPPORTED, pkcs11.CKR_KEY_SIZE_RANGE, pkcs11.CKR_KEY_TYPE_INCONSISTENT,
		pkcs11.CKR_KEY_NOT_NEEDED, pkcs11.CKR_KEY_NEEDED, pkcs11.CKR_KEY_INDIGESTIBLE,
		pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED, pkcs11.CKR_KEY_NOT_WRAPPABLE, pkcs11.CKR_KEY_UNEXTRACTABLE,
		pkcs11.CKR_MECHANISM_INVALID, pkcs11.CKR_MECHANISM_PARAM_INVALID, pkcs11.CKR_SESSION_PARALLEL_NOT_SUPPORTED,
		pkcs11.CKR_SESSION_READ_ONLY, pkcs11.CKR_SESSION_EXISTS, pkcs11.CKR_SESSION_READ_ONLY_EXISTS,
		pkcs11.CKR_SIGNATURE_INVALID, pkcs11.CKR_SIGNATURE_LEN_RANGE, pkcs11.CKR_TEMPLATE_INCOMPLETE,
		pkcs11.CKR_TEMPLATE_INCONSISTENT, pkcs11.CKR_TOKEN_WRITE_PROTECTED, pkcs11.CKR_UNWRAPPING_KEY_HANDLE_INVALID,
		pkcs11.CKR_UNWRAPPING_KEY_SIZE_RANGE, pkcs11.CKR_UNWRAPPING_KEY_TYPE_INCONSISTENT,
		pkcs11.CKR_USER_ALREADY_LOGGED_IN, pkcs11.CKR_WRAPPED_KEY_INVALID, pkcs11.CKR_WRAPPED_KEY_LEN_RANGE,
		pkcs11.CKR_WRAPPING_KEY_HANDLE_INVALID, pkcs11.CKR_WRAPPING_KEY_SIZE_RANGE,
		pkcs11.CKR_WRAPPING_KEY_TYPE_INCONSISTENT, pkcs11.CKR_RANDOM_SEED_NOT_SUPPORTED, pkcs11.CKR_RANDOM_NO_RNG,
		pkcs11.CKR_DOMAIN_PARAMS_INVALID, pkcs11.CKR_CURVE_NOT_SUPPORTED, pkcs11.CKR_BUFFER_TOO_SMALL,
		pkcs11.CKR_SAVED_STATE_INVALID, pkcs11.CKR_INFORMATION_SENSITIVE, pkcs11.CKR_STATE_UNSAVEABLE,
		pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED, pkcs11.CKR_PUBLIC_KEY_INVALID,
	},
}

// unknownClass is that of a value that no table lists: a vendor's own (from 0x80000000 on), or a later version's. The
// repair of a lost token includes all others, and leaves a token that answers alone.
const unknownClass = signer.TokenLost

var classes = func() map[pkcs11.Error]signer.Class {
	out := map[pkcs11.Error]signer.Class{}
	for class, values := range classified {
		for _, v := range values {
			out[v] = class
		}
	}
	return out
}()

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
	empty bool // the token answers and does not show a key that it held
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
		class = unknownClass
	}
	return &failure{class: class, op: op, cause: rv}
}

func failing(class signer.Class, op, format string, args ...any) error {
	return &failure{class: class, op: op, cause: fmt.Errorf(format, args...)}
}

// rvOf returns the module's return value; 0 where the error is none.
func rvOf(err error) pkcs11.Error {
	var rv pkcs11.Error
	if err != nil {
		errors.As(err, &rv)
	}
	return rv
}

// said reports whether the failure is a return value of the module, and not what this package concludes.
func said(err error) bool { return rvOf(err) != 0 }

func classOf(err error) signer.Class {
	if err == nil {
		return ""
	}
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
	if f.class == signer.CallerError && unsupported[rvOf(f)] {
		code = fault.AlgorithmUnsupported
	}
	text := texts[f.class]
	if errors.As(f.cause, new(*otherToken)) {
		text = "another token stands where this key's token was"
	}
	out := fault.Wrap(code, f, "%s", text)
	switch code {
	case fault.DeviceBusy, fault.ResourceExhausted:
		out.RetryAfter = busyRetry
	case fault.DeviceLost, fault.DeviceDead:
		out.RetryAfter = lostRetry
	}
	return out
}

// When a caller's retry makes sense.
const (
	busyRetry = 50 * time.Millisecond
	lostRetry = longestTry / 2
)

// unsupported are the caller errors that say that the token cannot do the algorithm.
var unsupported = map[pkcs11.Error]bool{
	pkcs11.CKR_MECHANISM_INVALID:          true,
	pkcs11.CKR_MECHANISM_PARAM_INVALID:    true,
	pkcs11.CKR_KEY_SIZE_RANGE:             true,
	pkcs11.CKR_DOMAIN_PARAMS_INVALID:      true,
	pkcs11.CKR_CURVE_NOT_SUPPORTED:        true,
	pkcs11.CKR_KEY_TYPE_INCONSISTENT:      true,
	pkcs11.CKR_FUNCTION_NOT_SUPPORTED:     true,
	pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED: true,
	pkcs11.CKR_ACTION_PROHIBITED:          true,
}

// A counter counts failures by class.
type counter struct {
	counts map[signer.Class]*atomic.Uint64 // all ten; the map never changes
}

func newCounter() counter {
	c := counter{counts: map[signer.Class]*atomic.Uint64{}}
	for _, class := range signer.Classes() {
		c.counts[class] = new(atomic.Uint64)
	}
	return c
}

// add counts err where it has a class.
func (c counter) add(err error) {
	if n := c.counts[classOf(err)]; n != nil {
		n.Add(1)
	}
}

var _ signer.FailureCounter = (*Backend)(nil)

// Failures implements signer.FailureCounter. It returns all ten classes. A failure counts each time the module shows
// it, also when the repeated call succeeded.
func (b *Backend) Failures() map[signer.Class]uint64 {
	out := make(map[signer.Class]uint64, len(b.failures.counts))
	for class, n := range b.failures.counts {
		out[class] = n.Load()
	}
	return out
}
