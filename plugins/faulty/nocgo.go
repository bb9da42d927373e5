//go:build !cgo

package main

import (
	"errors"

	"github.com/trustd/trustd/plugins"
	"github.com/trustd/trustd/signer"
)

func openPKCS11(plugins.Settings, *player) signer.Backend {
	refuse("wraps pkcs11", errors.New("this plugin was built without cgo"))
	return nil
}
