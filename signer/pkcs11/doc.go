// Package pkcs11 is the key backend for PKCS#11 tokens. It needs cgo and is empty without it: it runs inside the
// plugin process trustd-pkcs11, never inside the daemon, because a vendor's module may crash or hang.
//
// A Backend keeps one login and as many sessions as there are cores, caches object handles by key id, and repairs
// what a module loses: a session, a handle, the login, the token, the module's own state. A PIN that the token
// refused is never tried again by the same Backend.
package pkcs11
