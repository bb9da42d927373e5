//go:build cgo

// Command trustd-pkcs11 is the plugin process in which a PKCS#11 module lives. The daemon starts and watches it.
package main

import (
	"os"

	"github.com/trustd/trustd/plugins"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/pkcs11"
)

func main() {
	os.Exit(plugins.Serve(func(s plugins.Settings) signer.Backend {
		return pkcs11.New(pkcs11.Config{
			Module: s.Values["module"], TokenLabel: s.Values["token"], TokenSerial: s.Values["serial"],
			PIN: s.PIN, Sessions: s.Sessions, Log: s.Log,
		})
	}))
}
