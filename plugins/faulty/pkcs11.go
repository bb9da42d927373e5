//go:build cgo

package main

import (
	"context"

	"github.com/trustd/trustd/plugins"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/pkcs11"
	"github.com/trustd/trustd/signer/pkcs11/intercept"
)

// openPKCS11 opens the PKCS#11 backend with the script between it and the module.
func openPKCS11(s plugins.Settings, p *player) signer.Backend {
	return pkcs11.New(pkcs11.Config{
		Module: s.Values["module"], TokenLabel: s.Values["token"], TokenSerial: s.Values["serial"],
		PIN: s.PIN, Sessions: s.Sessions, Log: s.Log,
		Wrap: func(module pkcs11.Cryptoki) pkcs11.Cryptoki {
			return intercept.Wrap(module, func(function string) intercept.Fate {
				f := p.begin(context.Background(), function)
				return intercept.Fate{
					Return: uint(f.code), Drop: f.drop, Corrupt: f.corrupt, Token: intercept.Token(f.token), Done: f.done,
				}
			})
		},
	})
}
