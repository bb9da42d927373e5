package main

import (
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"

	"github.com/trustd/trustd/plugins"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/tpm"
	"github.com/trustd/trustd/softhsm-test/tpmproxy"
)

// proxied is a TPM backend together with the proxy in front of its chip.
type proxied struct {
	*tpm.Backend
	proxy *tpmproxy.Proxy
	dir   string
}

// Close implements signer.Backend.
func (b *proxied) Close() error {
	err := b.Backend.Close()
	b.proxy.Close()
	_ = os.RemoveAll(b.dir)
	return err
}

// openTPM opens the TPM backend with the script between it and the chip.
func openTPM(s plugins.Settings, p *player) signer.Backend {
	dir, err := os.MkdirTemp("", "faulty")
	if err != nil {
		refuse("making a folder", err)
	}
	path := filepath.Join(dir, "tpm.sock")
	proxy, err := tpmproxy.Listen(path, strings.TrimPrefix(s.Values["device"], "swtpm:path="))
	if err != nil {
		refuse("starting the proxy", err)
	}
	proxy.Script(tpmproxy.Rule{Command: tpmproxy.Any, Do: p.command})
	b, err := tpm.Open(tpm.Config{Device: "swtpm:path=" + path, Dir: s.Values["dir"], Log: s.Log})
	if err != nil {
		refuse("opening the TPM", err)
	}
	return &proxied{b, proxy, dir}
}

// rcIntegrity is what a TPM with other seeds says of a key's blob: TPM_RC_INTEGRITY of the first parameter.
const rcIntegrity = 0x1df

// command does to one command what the script says.
func (p *player) command(c *tpmproxy.Call) []byte {
	name := commandName(c.Command)
	f := p.begin(context.Background(), name)
	defer f.done()
	switch {
	case f.drop || f.token == "gone":
		return tpmproxy.Drop()(c)
	case f.code != 0:
		return tpmproxy.Return(f.code)(c)
	case f.token != "" && name == "TPM2_Load":
		return tpmproxy.Return(rcIntegrity)(c)
	case f.corrupt:
		return tpmproxy.CorruptSignature()(c)
	}
	return c.Forward()
}

func commandName(cmd []byte) string {
	code := binary.BigEndian.Uint32(cmd[6:])
	for name, c := range commands {
		if c == code {
			return name
		}
	}
	return "TPM2_?"
}
