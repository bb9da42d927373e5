package e2e

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/client"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/softhsm-test/lab"
)

const (
	peerScript  = "../../packet/testdata/interop/peer.py"
	peerPackets = 256 // random packets each way
	peerBatch   = 32  // so many at once: the shortest of them lives for a minute
)

// A pythonPeer is the Python package TrustHandoff at the end of a pipe.
type pythonPeer struct {
	in  io.Writer
	out *bufio.Reader
}

func startPythonPeer(t *testing.T) *pythonPeer {
	t.Helper()
	venv := os.Getenv("TRUSTD_PEER_VENV")
	python := filepath.Join(venv, "bin", "python")
	if _, err := os.Stat(python); venv == "" || err != nil {
		if required() {
			t.Fatalf("no Python peer at TRUSTD_PEER_VENV=%q: run make setup-peer", venv)
		}
		t.Skip("no Python peer: run make setup-peer and set TRUSTD_PEER_VENV")
	}
	cmd := exec.Command(python, "-B", peerScript)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close() // ends the peer's loop
		if err := cmd.Wait(); err != nil {
			t.Errorf("the peer ended with %v: %s", err, stderr.String())
		}
	})
	return &pythonPeer{in, bufio.NewReader(out)}
}

type pythonAnswer struct {
	TrustHandoff string `json:"trusthandoff"`
	AgentID      string `json:"agent_id"`
	PublicKey    string `json:"public_key"`
	Draft        string `json:"draft"`
	Packet       string `json:"packet"`
	Verified     bool   `json:"verified"`
	VerifiedJSON bool   `json:"verified_json"`
	Valid        bool   `json:"valid"`
	Reason       string `json:"reason"`
	Refusal      string `json:"refusal"`
	Error        string `json:"error"`
}

func (p *pythonPeer) ask(t *testing.T, request map[string]any) (a pythonAnswer) {
	t.Helper()
	line, err := json.Marshal(request)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.in.Write(append(line, '\n')); err != nil {
		t.Fatal(err)
	}
	reply, err := p.out.ReadBytes('\n')
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(reply, &a); err != nil {
		t.Fatal(err)
	}
	if a.Error != "" {
		t.Fatalf("the peer on %.2000v: %s", request, a.Error)
	}
	return a
}

// drafts returns one batch of random packets to the given audience, without what their signer fills in.
func (p *pythonPeer) drafts(t *testing.T, first int, to string) []string {
	t.Helper()
	out := make([]string, peerBatch)
	for i := range out {
		out[i] = p.ask(t, map[string]any{"op": "generate", "seed": first + i, "to_agent": to}).Draft
	}
	return out
}

func (p *pythonPeer) check(t *testing.T) {
	t.Helper()
	if v := p.ask(t, map[string]any{"op": "versions"}); v.TrustHandoff != "0.4.0" {
		t.Fatalf("the peer is TrustHandoff %s", v.TrustHandoff)
	}
}

// valueOf finds where the text of these values begins in a signed packet, however it is laid out.
var valueOf = []struct {
	name string
	at   *regexp.Regexp
}{
	{"packet_id", regexp.MustCompile(`"packet_id": ?"`)},
	{"nonce", regexp.MustCompile(`"nonce": ?"`)},
	{"task_id", regexp.MustCompile(`"task_id": ?"`)},
	{"intent", regexp.MustCompile(`"intent": ?"`)},
	{"signature", regexp.MustCompile(`"signature": ?"`)},
}

// alter returns the n-th of a forger's changes to a packet.
func alter(t *testing.T, n int, packet string) (name, altered string) {
	t.Helper()
	v := valueOf[n%len(valueOf)]
	at := v.at.FindStringIndex(packet)
	if at == nil {
		t.Fatalf("the packet has no %s:\n%.2000s", v.name, packet)
	}
	before, after := packet[:at[1]], packet[at[1]:]
	switch {
	case v.name != "signature":
		return v.name, before + "x" + after
	case after[0] == 'A':
		return v.name, before + "B" + after[1:]
	}
	return v.name, before + "A" + after[1:]
}

// TestPeerReadsOurs: what an agent in the HSM signs, TrustHandoff 0.4.0 itself accepts, and nothing that was altered.
func TestPeerReadsOurs(t *testing.T) {
	p := startPythonPeer(t)
	p.check(t)
	l := start(t, lab.Options{NoTPM: true})
	d := add(t, l, "planner", "--uid", "0", "--algorithm", "ed25519")
	c := client.New(l.AgentSocket)
	defer c.Close()
	for first := 0; first < peerPackets; first += peerBatch {
		drafts := p.drafts(t, first, "agent:python")
		rs := make([]api.SignPacketRequest, len(drafts))
		for i, text := range drafts {
			rs[i] = api.SignPacketRequest{Agent: "planner", Packet: json.RawMessage(text)}
		}
		for i, signed := range c.SignPackets(t.Context(), rs) {
			n := first + i
			if signed.Error != nil {
				t.Fatalf("packet %d: %v\n%.2000s", n, signed.Error.Err(), drafts[i])
			}
			text := string(signed.Packet)
			q := map[string]any{"op": "verify", "packet": text, "agent": d.Aliases[0], "pem": d.PEM}
			if a := p.ask(t, q); !a.Verified || !a.VerifiedJSON || !a.Valid {
				t.Fatalf("packet %d: TrustHandoff refuses: %+v\n%.2000s", n, a, text)
			}
			name, altered := alter(t, n, text)
			q["packet"] = altered
			if a := p.ask(t, q); a.Verified || a.VerifiedJSON {
				t.Fatalf("packet %d: TrustHandoff accepts it with another %s: %+v", n, name, a)
			}
		}
	}
}

// TestPeerIsRead: what TrustHandoff 0.4.0 signs, in all its ways of writing, the daemon accepts for the agent it is
// addressed to, once, and nothing that was altered.
func TestPeerIsRead(t *testing.T) {
	p := startPythonPeer(t)
	p.check(t)
	l := start(t, lab.Options{NoTPM: true})
	d := add(t, l, "planner", "--uid", "0", "--algorithm", "ed25519")
	add(t, l, "other", "--uid", "0")
	seed := hex.EncodeToString(bytes.Repeat([]byte{9}, 32))
	me := p.ask(t, map[string]any{"op": "identity", "key": seed})
	file := filepath.Join(t.TempDir(), "python.pem")
	if err := os.WriteFile(file, []byte(me.PublicKey), 0o600); err != nil {
		t.Fatal(err)
	}
	c := client.New(l.AgentSocket)
	defer c.Close()

	draft := p.drafts(t, 0, d.Aliases[0])[0]
	stranger := p.ask(t, map[string]any{"op": "sign", "key": seed, "draft": draft}).Packet
	decide(t, c, "before the import", "planner", stranger, fault.UnknownAgent)
	r := l.Root(t.Context(), nil, "agent", "import", file, "--id", "python", "-o", "json")
	var imported api.AgentDetail
	if err := json.Unmarshal([]byte(r.Stdout), &imported); err != nil {
		t.Fatalf("agent import: exit %d: %s", r.Code, r.Stderr)
	}
	if imported.Local || len(imported.Aliases) == 0 || imported.Aliases[0] != me.AgentID || imported.PEM != me.PublicKey {
		t.Fatalf("imported as %+v, TrustHandoff says %s", imported, me.AgentID)
	}
	decide(t, c, "after the import", "planner", stranger, "")

	for first := 0; first < peerPackets; first += peerBatch {
		for i, draft := range p.drafts(t, first, d.Aliases[0]) {
			n := first + i
			text := p.ask(t, map[string]any{"op": "sign", "key": seed, "draft": draft, "style": n % 4}).Packet
			name, altered := alter(t, n, text)
			// The forgery first: it must not spend the nonce of the true one.
			decide(t, c, fmt.Sprintf("packet %d with another %s", n, name), "planner", altered, fault.InvalidSignature)
			decide(t, c, fmt.Sprintf("packet %d for another", n), "other", text, fault.WrongAudience)
			decide(t, c, fmt.Sprintf("packet %d", n), "planner", text, "")
			decide(t, c, fmt.Sprintf("packet %d again", n), "planner", text, fault.ReplayDetected)
		}
	}
}

// decide demands that the daemon refuses the packet for the given reason, or accepts it where there is none.
func decide(t *testing.T, c *client.Client, what, audience, packet string, reason fault.Code) {
	t.Helper()
	v, err := c.VerifyPacket(t.Context(), api.VerifyPacketRequest{Packet: json.RawMessage(packet), Audience: audience})
	want := api.Accept
	if reason != "" {
		want = api.Reject
	}
	if err != nil || v.Decision != want || v.Reason != reason {
		t.Fatalf("%s: %+v, %v; want %s %s\n%.2000s", what, v, err, want, reason, packet)
	}
}
