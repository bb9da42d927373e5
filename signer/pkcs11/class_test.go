//go:build cgo

package pkcs11

import (
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/signer"
)

// returnValues are all CKR_* of PKCS#11 3.0 but CKR_OK, in the order of its header file, and their classes.
var returnValues = []struct {
	value uint
	class signer.Class
}{
	{0x01, signer.TransientBusy},         // CANCEL
	{0x02, signer.ResourcesExhausted},    // HOST_MEMORY
	{0x03, signer.TokenLost},             // SLOT_ID_INVALID
	{0x05, signer.TokenLost},             // GENERAL_ERROR
	{0x06, signer.TokenLost},             // FUNCTION_FAILED
	{0x07, signer.CallerError},           // ARGUMENTS_BAD
	{0x08, signer.CallerError},           // NO_EVENT
	{0x09, signer.ModuleDead},            // NEED_TO_CREATE_THREADS
	{0x0A, signer.ModuleDead},            // CANT_LOCK
	{0x10, signer.CallerError},           // ATTRIBUTE_READ_ONLY
	{0x11, signer.CallerError},           // ATTRIBUTE_SENSITIVE
	{0x12, signer.CallerError},           // ATTRIBUTE_TYPE_INVALID
	{0x13, signer.CallerError},           // ATTRIBUTE_VALUE_INVALID
	{0x1B, signer.CallerError},           // ACTION_PROHIBITED
	{0x20, signer.CallerError},           // DATA_INVALID
	{0x21, signer.CallerError},           // DATA_LEN_RANGE
	{0x30, signer.TokenLost},             // DEVICE_ERROR
	{0x31, signer.ResourcesExhausted},    // DEVICE_MEMORY
	{0x32, signer.TokenLost},             // DEVICE_REMOVED
	{0x40, signer.CallerError},           // ENCRYPTED_DATA_INVALID
	{0x41, signer.CallerError},           // ENCRYPTED_DATA_LEN_RANGE
	{0x42, signer.CallerError},           // AEAD_DECRYPT_FAILED
	{0x50, signer.TransientBusy},         // FUNCTION_CANCELED
	{0x51, signer.CallerError},           // FUNCTION_NOT_PARALLEL
	{0x54, signer.CallerError},           // FUNCTION_NOT_SUPPORTED
	{0x60, signer.HandleLost},            // KEY_HANDLE_INVALID
	{0x62, signer.CallerError},           // KEY_SIZE_RANGE
	{0x63, signer.CallerError},           // KEY_TYPE_INCONSISTENT
	{0x64, signer.CallerError},           // KEY_NOT_NEEDED
	{0x65, signer.KeyGone},               // KEY_CHANGED
	{0x66, signer.CallerError},           // KEY_NEEDED
	{0x67, signer.CallerError},           // KEY_INDIGESTIBLE
	{0x68, signer.CallerError},           // KEY_FUNCTION_NOT_PERMITTED
	{0x69, signer.CallerError},           // KEY_NOT_WRAPPABLE
	{0x6A, signer.CallerError},           // KEY_UNEXTRACTABLE
	{0x70, signer.CallerError},           // MECHANISM_INVALID
	{0x71, signer.CallerError},           // MECHANISM_PARAM_INVALID
	{0x82, signer.HandleLost},            // OBJECT_HANDLE_INVALID
	{0x90, signer.SessionLost},           // OPERATION_ACTIVE
	{0x91, signer.SessionLost},           // OPERATION_NOT_INITIALIZED
	{0xA0, signer.AuthorisationRefused},  // PIN_INCORRECT
	{0xA1, signer.AuthorisationRefused},  // PIN_INVALID
	{0xA2, signer.AuthorisationRefused},  // PIN_LEN_RANGE
	{0xA3, signer.AuthorisationRefused},  // PIN_EXPIRED
	{0xA4, signer.AuthorisationRefused},  // PIN_LOCKED
	{0xB0, signer.SessionLost},           // SESSION_CLOSED
	{0xB1, signer.ResourcesExhausted},    // SESSION_COUNT
	{0xB3, signer.SessionLost},           // SESSION_HANDLE_INVALID
	{0xB4, signer.CallerError},           // SESSION_PARALLEL_NOT_SUPPORTED
	{0xB5, signer.CallerError},           // SESSION_READ_ONLY
	{0xB6, signer.CallerError},           // SESSION_EXISTS
	{0xB7, signer.CallerError},           // SESSION_READ_ONLY_EXISTS
	{0xB8, signer.TransientBusy},         // SESSION_READ_WRITE_SO_EXISTS
	{0xC0, signer.CallerError},           // SIGNATURE_INVALID
	{0xC1, signer.CallerError},           // SIGNATURE_LEN_RANGE
	{0xD0, signer.CallerError},           // TEMPLATE_INCOMPLETE
	{0xD1, signer.CallerError},           // TEMPLATE_INCONSISTENT
	{0xE0, signer.TokenLost},             // TOKEN_NOT_PRESENT
	{0xE1, signer.TokenLost},             // TOKEN_NOT_RECOGNIZED
	{0xE2, signer.CallerError},           // TOKEN_WRITE_PROTECTED
	{0xF0, signer.CallerError},           // UNWRAPPING_KEY_HANDLE_INVALID
	{0xF1, signer.CallerError},           // UNWRAPPING_KEY_SIZE_RANGE
	{0xF2, signer.CallerError},           // UNWRAPPING_KEY_TYPE_INCONSISTENT
	{0x100, signer.CallerError},          // USER_ALREADY_LOGGED_IN
	{0x101, signer.LoginLost},            // USER_NOT_LOGGED_IN
	{0x102, signer.AuthorisationRefused}, // USER_PIN_NOT_INITIALIZED
	{0x103, signer.AuthorisationRefused}, // USER_TYPE_INVALID
	{0x104, signer.TransientBusy},        // USER_ANOTHER_ALREADY_LOGGED_IN
	{0x105, signer.TransientBusy},        // USER_TOO_MANY_TYPES
	{0x110, signer.CallerError},          // WRAPPED_KEY_INVALID
	{0x112, signer.CallerError},          // WRAPPED_KEY_LEN_RANGE
	{0x113, signer.CallerError},          // WRAPPING_KEY_HANDLE_INVALID
	{0x114, signer.CallerError},          // WRAPPING_KEY_SIZE_RANGE
	{0x115, signer.CallerError},          // WRAPPING_KEY_TYPE_INCONSISTENT
	{0x120, signer.CallerError},          // RANDOM_SEED_NOT_SUPPORTED
	{0x121, signer.CallerError},          // RANDOM_NO_RNG
	{0x130, signer.CallerError},          // DOMAIN_PARAMS_INVALID
	{0x140, signer.CallerError},          // CURVE_NOT_SUPPORTED
	{0x150, signer.CallerError},          // BUFFER_TOO_SMALL
	{0x160, signer.CallerError},          // SAVED_STATE_INVALID
	{0x170, signer.CallerError},          // INFORMATION_SENSITIVE
	{0x180, signer.CallerError},          // STATE_UNSAVEABLE
	{0x190, signer.ModuleDead},           // CRYPTOKI_NOT_INITIALIZED
	{0x191, signer.CallerError},          // CRYPTOKI_ALREADY_INITIALIZED
	{0x1A0, signer.ModuleDead},           // MUTEX_BAD
	{0x1A1, signer.ModuleDead},           // MUTEX_NOT_LOCKED
	{0x1B0, signer.AuthorisationRefused}, // NEW_PIN_MODE
	{0x1B1, signer.AuthorisationRefused}, // NEXT_OTP
	{0x1B5, signer.TransientBusy},        // EXCEEDED_MAX_ITERATIONS
	{0x1B6, signer.ModuleDead},           // FIPS_SELF_TEST_FAILED
	{0x1B7, signer.ModuleDead},           // LIBRARY_LOAD_FAILED
	{0x1B8, signer.AuthorisationRefused}, // PIN_TOO_WEAK
	{0x1B9, signer.CallerError},          // PUBLIC_KEY_INVALID
	{0x200, signer.AuthorisationRefused}, // FUNCTION_REJECTED
	{0x201, signer.ResourcesExhausted},   // TOKEN_RESOURCE_EXCEEDED
	{0x202, signer.SessionLost},          // OPERATION_CANCEL_FAILED
	{0x203, signer.KeyGone},              // KEY_EXHAUSTED, of PKCS#11 3.1
}

func TestEveryReturnValueHasAClass(t *testing.T) {
	seen := map[signer.Class]bool{}
	for _, c := range returnValues {
		v := pkcs11.Error(c.value)
		if _, listed := classes[v]; !listed {
			t.Errorf("0x%X is not in the table", c.value)
		}
		err := failed("C_Sign", v)
		if got := signer.ClassOf(err); got != c.class {
			t.Errorf("0x%X has the class %s, want %s", c.value, got, c.class)
		}
		seen[c.class] = true
		e := fault.From(public(err))
		if e.Text == "" || e.Text != texts[c.class] {
			t.Errorf("0x%X: the text %q is not the class's", c.value, e.Text)
		}
		if e.Code != c.class.Code() && (e.Code != fault.AlgorithmUnsupported || c.class != signer.CallerError) {
			t.Errorf("0x%X: code %s", c.value, e.Code)
		}
		if e.Code.Retryable() != (e.RetryAfter > 0) {
			t.Errorf("0x%X: code %s comes with retry_after %v", c.value, e.Code, e.RetryAfter)
		}
	}
	if len(classes) != len(returnValues) {
		t.Errorf("the table has %d values, the specifications %d", len(classes), len(returnValues))
	}
	for _, class := range signer.Classes() {
		if !seen[class] {
			t.Errorf("no return value has the class %s", class)
		}
	}
	for _, v := range []uint{0x204, 0x7FFFFFFF, 0x80000000, 0x80000123, 0xFFFFFFFF} { // later, and vendors' own
		if c := classOf(failed("C_Sign", pkcs11.Error(v))); c != unknownClass {
			t.Errorf("0x%X has the class %s", v, c)
		}
	}
	if failed("C_Sign", nil) != nil {
		t.Error("success has a class")
	}
}
