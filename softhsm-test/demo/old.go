package main

import (
	"crypto/ed25519"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/packet"
	"github.com/trustd/trustd/signature"
)

// oldPacket returns a packet that was right an hour ago. Its sender is an agent of another host, whose key is made
// here and whose public identity is imported, since the daemon itself signs nothing that has expired.
func oldPacket(d *demo, to agent) string {
	pub, priv, err := ed25519.GenerateKey(nil)
	if err != nil {
		d.row("import a peer", "root", "imported", err.Error(), "")
		return ""
	}
	key, err := ident.NewPublicKey(pub)
	if err != nil {
		d.row("import a peer", "root", "imported", err.Error(), "")
		return ""
	}
	file := filepath.Join(d.Dir, "peer.pem")
	if err := os.WriteFile(file, []byte(key.PEM()), 0o600); err != nil {
		d.row("import a peer", "root", "imported", err.Error(), "")
		return ""
	}
	r := d.Root(d.ctx, nil, "agent", "import", file, "--id", "peer", "-o", "json")
	got := "imported"
	if r.Code != 0 {
		got = fmt.Sprintf("exit %d", r.Code)
	}
	d.row("import a peer", "root", "imported", got, "public key only, of an agent on another host")

	draft, err := packet.ParseDraft([]byte(fmt.Sprintf(
		`{"task_id":"task-8","to_agent":%q,"intent":"too late","permissions":{"allowed_actions":["read"]},"risk_level":"write"}`, to.Alias)))
	if err != nil {
		d.row("make an old packet", "peer", "made", err.Error(), "")
		return ""
	}
	self := ident.DerivedAlias(key).String()
	u, err := draft.Complete(packet.Fill{
		FromAgent: self, AllowedFrom: func(a string) bool { return a == self }, PublicKey: key,
		Nonce: "nonce-of-an-hour-ago", PacketID: "pk-old", Now: time.Now().Add(-time.Hour).UTC(), TTL: packet.DefaultTTL(),
	})
	if err != nil {
		d.row("make an old packet", "peer", "made", err.Error(), "")
		return ""
	}
	return string(u.Seal(signature.NewDirect(ed25519.Sign(priv, u.SigningBytes()))))
}
