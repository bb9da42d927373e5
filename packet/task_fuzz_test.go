package packet_test

import (
	"bytes"
	"testing"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/packet"
	"github.com/trustd/trustd/signature"
)

func FuzzParse(f *testing.F) {
	g := vectors(f)
	for i := range g.Packets {
		f.Add(g.signed(i))
	}
	for _, v := range legacyVectors(f) {
		f.Add([]byte(v.Wire))
	}
	base := string(g.signed(0))
	for name, c := range strictCases {
		if wire := c.apply(base, name); len(wire) < 4096 {
			f.Add([]byte(wire))
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := packet.Parse(b)
		if err != nil {
			checkRefusal(t, err)
			return
		}
		again, err := packet.Parse(p.JSON())
		if err != nil || !bytes.Equal(again.SigningBytes(), p.SigningBytes()) {
			t.Fatalf("the same text signs differently: %v", err)
		}
		// The signed bytes with the signature are the same packet in its one canonical text.
		canonical := withSignature(string(p.SigningBytes()), p.SignatureText)
		if len(canonical) <= packet.MaxTask {
			again, err := packet.Parse(canonical)
			if err != nil || !bytes.Equal(again.SigningBytes(), p.SigningBytes()) {
				t.Fatalf("the canonical text signs differently: %v\n%s", err, canonical)
			}
			if !older(p, again) {
				t.Fatal("the canonical text has other legacy bytes than the packet")
			}
		}
		_, _ = p.CheckTTL(), p.CheckAIProvenance()
		if p.PacketID == "" || p.Nonce == "" || !p.ExpiresAt.Present || !p.IssuedAt.Present || len(p.Context()) < 2 {
			t.Fatalf("a field that must be there is not: %+v", p)
		}
	})
}

// older reports whether the candidates of the canonical text are bounded by those of the packet: naming all members
// must never add a form that leaves one of them unsigned.
func older(p, canonical *packet.Task) bool {
	return len(p.LegacySigningBytes()) > 0 && len(canonical.LegacySigningBytes()) <= 2
}

func FuzzDraft(f *testing.F) {
	f.Add([]byte(minimalDraft))
	for _, members := range []string{
		`"risk_level":"write"`, `"ttl_seconds":60`, `"issued_at":"2026-03-08T14:00:00.5+02:00"`,
		`"goal":"\ud83d\ude00\u007f"`,
		`"ai_provenance":{"source":"llm","x":[1.0,1e16,{"b":1,"a":2}]}`,
		`"constraints":{},"provenance":{"delegation_depth":1}`,
		`"expires_at":"2026-03-08T12:10:00Z"`, `"nonce":"n","packet_id":"p","from_agent":"agent:planner"`,
		`"context":{"z":1,"a":-0,"😀":1,"\uffee":2}`, `"signature":"AAAA"`, `"memory_refs":["é"],"capability_token":"t"`,
	} {
		f.Add([]byte(with(members)))
	}
	fill := testFill(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := packet.ParseDraft(b)
		if err != nil {
			checkRefusal(t, err)
			return
		}
		u, err := d.Complete(fill)
		if err != nil {
			if c := fault.CodeOf(err); !c.Refusal() && c != fault.Denied {
				t.Fatalf("code %s: %v", c, err)
			}
			return
		}
		p, err := packet.Parse(u.Seal(signature.NewDirect(make([]byte, 64))))
		if err != nil {
			t.Fatalf("what was to be signed does not parse: %v", err)
		}
		if !bytes.Equal(p.SigningBytes(), u.SigningBytes()) {
			t.Fatal("what was to be signed is not what is verified")
		}
		if err := p.CheckTTL(); err != nil {
			t.Fatal(err)
		}
		if p.ExpiresAt.Instant.Sub(p.IssuedAt.Instant) > fill.TTL.Read || p.CheckAIProvenance() != nil {
			t.Fatal("the packet is against the policy")
		}
	})
}

func checkRefusal(t *testing.T, err error) {
	t.Helper()
	f := fault.From(err)
	switch {
	case f.Code == fault.TooLarge:
	case f.Code != fault.Malformed || f.Field == "" || f.Text == "" || f.Err != nil:
		t.Fatalf("a refusal without its parts: %+v", f)
	}
}
