package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"

	"golang.org/x/term"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/keyfile"
	"github.com/trustd/trustd/internal/secret"
)

// secretFile reads a secret from a file that others cannot read.
func secretFile(ctx context.Context, path string) (string, error) {
	b, err := secret.Source{File: path}.Read(ctx)
	if err != nil {
		return "", err
	}
	return string(b), nil
}

// askPassphrase reads a passphrase from the terminal, twice, without echo.
func (a *app) askPassphrase(f *os.File) (string, error) {
	if !term.IsTerminal(int(f.Fd())) {
		return "", fault.New(fault.Usage, "name the passphrase's file with --passphrase-file")
	}
	var given [2][]byte
	for i, prompt := range []string{"Passphrase: ", "Again: "} {
		fmt.Fprint(a.err, prompt)
		b, err := term.ReadPassword(int(f.Fd()))
		fmt.Fprintln(a.err)
		if err != nil {
			return "", fmt.Errorf("reading the passphrase: %w", err)
		}
		given[i] = b
	}
	if !bytes.Equal(given[0], given[1]) || len(given[0]) == 0 {
		return "", fault.New(fault.Usage, "the two passphrases differ or are empty")
	}
	return string(given[0]), nil
}

// publicFile reads a PEM or JWK public key; the zero key where the data is neither.
func publicFile(data []byte) (ident.PublicKey, error) {
	if bytes.HasPrefix(data, []byte("-----BEGIN")) {
		return ident.ParsePEM(string(data) + "\n")
	}
	var m map[string]json.RawMessage
	if err := json.Unmarshal(data, &m); err != nil {
		return ident.PublicKey{}, fault.BadField("file", "neither JSON nor PEM")
	}
	if _, jwk := m["kty"]; jwk {
		return keyfile.ParsePublicJWK(data)
	}
	return ident.PublicKey{}, nil
}

func publicJWK(i api.Identity) ([]byte, error) {
	pub, err := ident.ParsePublicKey(i.PublicKey)
	if err != nil {
		return nil, err
	}
	b, err := keyfile.PublicJWK(pub)
	if err != nil {
		return nil, err
	}
	return append(b, '\n'), nil
}
