// Package pkcs11 is the key backend for PKCS#11 tokens. It needs cgo and is empty without it: it runs inside the
// plugin process trustd-pkcs11, never inside the daemon, because a vendor's module may crash or hang.
//
// A Backend keeps one login and as many sessions as there are cores, caches object handles by key id, and repairs
// what a module loses. What it does about a failure follows from the class of the module's return value (see
// classified; signer.Class):
//
//	transient_busy          up to 5 more tries within the deadline, with pauses of 10 ms, 20 ms, ... 160 ms
//	session_lost            the session is dropped, one more try on a new one
//	handle_lost             the key is looked for again, once
//	login_lost              one login for all callers that noticed, then one more try
//	token_lost              where the token does not answer, or is another: C_Finalize, C_Initialize, the token of the
//	                        same label and serial, login; where it answers, one more try
//	module_dead             the same, always; a wrong signature is made once more, on a new session
//	authorisation_refused   nothing is tried until Unlock
//	resources_exhausted     a session is given up, then as for transient_busy; the pool grows again later
//	key_gone                said only of the right token, logged in, and of a key that was used before only when three
//	                        connections in a row do not show it; until then it is token_lost
//	caller_error            none
//
// What a caller sees after that is a fault.Error whose code is the class's; all but key_gone, authorisation_refused and
// caller errors are retryable.
package pkcs11
