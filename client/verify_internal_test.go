package client

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/packet"
	"github.com/trustd/trustd/signature"
)

// corpus returns the inputs of a fuzz target of package packet.
func corpus(tb testing.TB, target string) [][]byte {
	tb.Helper()
	files, err := filepath.Glob("../packet/testdata/fuzz/" + target + "/*")
	if err != nil || len(files) < 20 {
		tb.Fatalf("%d files, %v", len(files), err)
	}
	var all [][]byte
	for _, f := range files {
		raw, err := os.ReadFile(f)
		if err != nil {
			tb.Fatal(err)
		}
		for line := range strings.Lines(string(raw)) {
			quoted, ok := strings.CutPrefix(strings.TrimSpace(line), "[]byte(")
			if !ok {
				continue
			}
			text, err := strconv.Unquote(strings.TrimSuffix(quoted, ")"))
			if err != nil {
				tb.Fatal(err)
			}
			all = append(all, []byte(text))
		}
	}
	return all
}

// testSigner is an agent with a key whose secret is known.
type testSigner struct {
	agent  ident.AgentID
	pub    ident.PublicKey
	secret ed25519.PrivateKey
}

func newTestSigner(tb testing.TB) testSigner {
	tb.Helper()
	secret := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, ed25519.SeedSize))
	pub, err := ident.NewPublicKey(secret.Public())
	if err != nil {
		tb.Fatal(err)
	}
	agent, err := ident.ParseAgentID("planner-1")
	if err != nil {
		tb.Fatal(err)
	}
	return testSigner{agent, pub, secret}
}

// sign signs a subject directly, or as leaf 1 of a batch of 3.
func (s testSigner) sign(of signature.Subject, mode signature.Mode) signature.Signature {
	if mode == signature.Direct {
		return signature.NewDirect(ed25519.Sign(s.secret, of.Message))
	}
	salt := signature.Salt{1, 2, 3}
	tree := signature.NewTree([]signature.Hash{{1}, signature.Leaf(of, salt), {2}})
	return tree.Sign(1, salt, ed25519.Sign(s.secret, signature.Statement(s.pub, tree.Size(), tree.Root())))
}

func (s testSigner) packet(tb testing.TB, draft string, mode signature.Mode) []byte {
	tb.Helper()
	d, err := packet.ParseDraft([]byte(draft))
	if err != nil {
		tb.Fatalf("%v\n%s", err, draft)
	}
	u, err := d.Complete(packet.Fill{
		FromAgent: ident.DerivedAlias(s.pub).String(), PublicKey: s.pub, Nonce: "nonce-1", PacketID: "packet-1",
		Now: time.Date(2026, 3, 8, 12, 0, 0, 0, time.UTC), TTL: packet.DefaultTTL(),
	})
	if err != nil {
		tb.Fatalf("%v\n%s", err, draft)
	}
	of := signature.Subject{Kind: signature.KindPacket, Agent: s.agent, Message: u.SigningBytes()}
	return u.Seal(s.sign(of, mode))
}

func (s testSigner) message(tb testing.TB, payload string, mode signature.Mode) []byte {
	tb.Helper()
	u, err := packet.NewMessage(packet.MessageHeader{
		SignerID: s.agent, Fingerprint: s.pub.ID(), Algorithm: s.pub.Algorithm(), Seq: 7, Nonce: "n-0001", Grade: "software",
		Timestamp: time.Date(2026, 3, 8, 12, 0, 0, 123456000, time.UTC), ExpiresAt: time.Date(2026, 3, 8, 12, 10, 0, 0, time.UTC),
		Audience: []string{"planner", "agent:x"}, KeyEpoch: 1, ViewSize: 3,
		ViewHead: "sha256:" + strings.Repeat("0", 63) + "1", Prev: "sha256:" + strings.Repeat("ab", 32),
	}, json.RawMessage(payload))
	if err != nil {
		tb.Fatalf("%v\n%s", err, payload)
	}
	m, err := u.Seal(s.sign(u.Subject(), mode), s.pub)
	if err != nil {
		tb.Fatal(err)
	}
	text, err := m.JSON()
	if err != nil {
		tb.Fatal(err)
	}
	return text
}

const fullDraft = `{"task_id":"task-1","to_agent":"agent:peer","intent":"d\u00e9ploy \"x\"","goal":"g","task_type":null,
	"permissions":{"allowed_actions":["read","write"],"max_tool_calls":5},"risk_level":"write","ttl_seconds":120,
	"constraints":{"max_runtime_seconds":30,"data_boundary":"eu"},"provenance":{"delegation_depth":1},
	"ai_provenance":{"source":"llm","x":[1.0,1e16,{"b":1,"a":2}]},"memory_refs":["m1"],
	"context":{"z":1,"a":-0,"f":1e-7,"\ud83d\ude00":1,"\uffee":[2,"\u007f\n"],"human_approval":"alice"},
	"issued_at":"2026-03-08T14:00:00.5+02:00"}`

// payload is the same with numbers that a SignedMessage may hold.
var payload = strings.Replace(fullDraft, "1e16", "1e15", 1)

// oddities are what a bent text may have in the place of a value.
var oddities = strings.Fields(`null true false 0 -0 1 5 -1 1.0 5.0 1e2 1E-7 -0.0 1e400 2147483647 2147483648 9007199254740991
	9007199254740992 9007199254740993 0.1 0.30000000000000004
	0.1000000000000000055511151231257827 123456789012345680000
	"" "x" "5" "\ud800" "\ud83d\ude00" "\u0000" "\u007f" "é" "2026-03-08T12:00:00Z" "2026-02-29T12:00:00Z"
	"2024-02-29T12:00:00Z"
	"2026-03-08T12:00:00+00:00" "2026-03-08T12:00:00-00:00" "2026-03-08T12:00:00.1+02:30" "2026-03-08T12:00:60Z"
	"2026-03-08T24:00:00Z"
	"0000-01-01T00:00:00Z" "0001-01-01T00:00:00Z" "9999-12-31T23:59:59.999999Z" "1969-12-31T23:59:59.999999Z"
	"1970-01-01T00:00:00.000000Z"
	"0001-01-01T00:00:00.000000Z" "2026-03-08T12:00:00.000000+00:00" "2026-03-08T12:00:00,000000Z"
	"2026-03-08T12:00:00.1234567Z"
	"2026-03-08T12:00:00+24:00" "2026-03-08T12:00:00+23:59" "read" "write" "other" [] {} [null] ["a","a"] ["a","b"] [1]
	{"a":1,"a":2}
	{"allowed_actions":null} {"allowed_actions":["x"]} {"max_tool_calls":null} {"source":""} {"requires_human_review":null}
	{"requires_human_review":true} [[[[1]]]] NaN Infinity 01 +1 .5 1. 'a' "a b" "application/json" "text/x+json" "a/+json"
	"+json" "A/b+json"
	"application/json;x" "software" "hardware" 1e15 1e16 1.5e300 1e-320 0e9999999 1e9999999999 "Ed25519" "ed25519"`)

// bend changes a JSON text at random: a value, a member, a byte.
func bend(r *rand.Rand, text string) string {
	for range 1 + r.IntN(2) {
		colons := []int{}
		for i := range len(text) {
			if text[i] == ':' && i > 0 && text[i-1] == '"' {
				colons = append(colons, i)
			}
		}
		if len(text) < 2 || len(colons) == 0 {
			return text
		}
		at := colons[r.IntN(len(colons))] + 1
		end := at + valueEnd(text[at:])
		start := max(strings.LastIndexByte(text[:at-2], '"'), 0)
		switch r.IntN(7) {
		case 0, 1:
			text = text[:at] + oddities[r.IntN(len(oddities))] + text[end:]
		case 2: // a member less
			text = text[:start] + strings.TrimPrefix(text[end:], ",")
		case 3: // a member twice
			text = text[:end] + "," + text[start:end] + text[end:]
		case 4:
			i := r.IntN(len(text))
			text = text[:i] + string(rune(r.IntN(128))) + text[i+1:]
		case 5:
			i := r.IntN(len(text))
			text = text[:i] + []string{" ", "\n", "\t", "\u00a0", "\ufeff", "\x00", "\\u0041", ",", `"`}[r.IntN(9)] + text[i:]
		case 6: // another name
			text = text[:start] + []string{`"x"`, `"Nonce"`, `"signature"`, `"v"`, `"prev"`, `"ttl_seconds"`}[r.IntN(6)] + text[at-1:]
		}
	}
	return text
}

// valueEnd returns about where a value ends.
func valueEnd(s string) int {
	depth, inside := 0, false
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case inside && c == '\\':
			i++
		case c == '"':
			inside = !inside
		case inside:
		case c == '{' || c == '[':
			depth++
		case (c == ',' || c == '}' || c == ']') && depth == 0:
			return i
		case c == '}' || c == ']':
			depth--
		}
	}
	return len(s)
}

// randomJSON returns a random value that survives both canonical forms.
func randomJSON(r *rand.Rand, depth int) string {
	text := func() string {
		alphabet := []rune("ab\"\\/<>&\x7f\n\t\b\u0000\u001féü中\u0080\u2028\ufeff\ufffd\uffee\ue000\U0001f600\U0010ffff")
		s := make([]rune, r.IntN(6))
		for i := range s {
			s[i] = alphabet[r.IntN(len(alphabet))]
		}
		b, _ := json.Marshal(string(s))
		return string(b)
	}
	switch kind := r.IntN(8); {
	case kind < 2 && depth > 0:
		var b strings.Builder
		seen := map[string]bool{}
		for range r.IntN(5) {
			k := text()
			if seen[k] {
				continue
			}
			if seen[k] = true; b.Len() > 0 {
				b.WriteByte(',')
			}
			b.WriteString(k + ":" + randomJSON(r, depth-1))
		}
		return "{" + b.String() + "}"
	case kind == 2 && depth > 0:
		items := make([]string, r.IntN(4))
		for i := range items {
			items[i] = randomJSON(r, depth-1)
		}
		return "[" + strings.Join(items, ",") + "]"
	case kind < 5:
		f := math.Float64frombits(r.Uint64())
		if r.IntN(2) == 0 {
			f = (r.Float64() - 0.5) * math.Pow(10, float64(r.IntN(30)-15))
		}
		for math.IsNaN(f) || math.Abs(f) > maxExact {
			f = math.Mod(math.Float64frombits(r.Uint64()), 1e9)
		}
		return strconv.FormatFloat(f, []byte("efg")[r.IntN(3)], -1, 64)
	case kind == 5:
		return strconv.FormatInt(r.Int64N(2*maxExact)-maxExact, 10)
	case kind == 6:
		return text()
	}
	return []string{"null", "true", "false"}[r.IntN(3)]
}

// samePacket compares readPacket with packet.Parse.
func samePacket(t *testing.T, text []byte) {
	t.Helper()
	got, err := readPacket(text)
	want, wantErr := packet.Parse(text)
	if wantErr != nil {
		// What Parse checks of these two is for the Verifier's later steps: the key's text, the signature's form.
		if field := fault.From(wantErr).Field; err == nil && field != "public_key" && field != "signature" {
			t.Errorf("package packet refuses with %v\n%s", wantErr, text)
		}
		return
	}
	if err != nil {
		t.Errorf("%v\n%s", err, text)
		return
	}
	if !bytes.Equal(got.signed, want.SigningBytes()) || got.signature != want.SignatureText ||
		got.publicKey != want.PublicKeyPEM || got.algorithm != want.SignatureAlgo {
		t.Errorf("read another way:\n%s\n%s", got.signed, want.SigningBytes())
	}
}

// sameMessage compares readMessage with packet.ParseMessage.
func sameMessage(t *testing.T, text []byte) {
	t.Helper()
	got, err := readMessage(text)
	want, wantErr := packet.ParseMessage(text)
	if wantErr != nil {
		switch field := fault.From(wantErr).Field; field {
		case "public_key", "fingerprint", "algorithm", "signature": // likewise
		default:
			if err == nil {
				t.Errorf("package packet refuses with %v\n%s", wantErr, text)
			}
		}
		return
	}
	if err != nil {
		t.Errorf("%v\n%s", err, text)
		return
	}
	if !bytes.Equal(got.signed, want.SigningBytes()) || got.text("signature") != want.Signature().Text() ||
		got.text("public_key") != want.PublicKey().Base64() {
		t.Errorf("read another way:\n%s\n%s", got.signed, want.SigningBytes())
	}
}

// TestReadsAsPackagePacket holds the two readers of each format against each other: over the corpora of package packet,
// over random values, and over texts that are bent.
func TestReadsAsPackagePacket(t *testing.T) {
	s := newTestSigner(t)
	r := rand.New(rand.NewPCG(4, 4))
	for _, text := range corpus(t, "FuzzParse") {
		samePacket(t, text)
	}
	for _, text := range corpus(t, "FuzzParseMessage") {
		sameMessage(t, text)
	}
	full, message := string(s.packet(t, fullDraft, signature.Batched)), string(s.message(t, payload, signature.Batched))
	for range 1500 {
		samePacket(t, []byte(bend(r, full)))
		sameMessage(t, []byte(bend(r, message)))
	}
	for range 150 {
		value := randomJSON(r, 5)
		draft := strings.Replace(fullDraft, `"human_approval"`, `"value":`+value+`,"human_approval"`, 1)
		samePacket(t, s.packet(t, draft, signature.Direct))
		text := s.message(t, value, signature.Direct)
		sameMessage(t, text)
		sameMessage(t, bytes.Replace(text, []byte(`"payload":`), []byte(`"payload" : `), 1))
	}
	for depth := 60; depth < 104; depth++ {
		nested := strings.Repeat("[", depth) + strings.Repeat("]", depth)
		samePacket(t, []byte(strings.Replace(full, `"context":{`, `"context":{"deep":`+nested+`,`, 1)))
		sameMessage(t, []byte(strings.Replace(message, `"payload":`, `"payload":{"deep":`+nested+`},"x":`, 1)))
		sameMessage(t, []byte(strings.Replace(message, `"payload":{`, `"payload":{"deep":`+nested+`,`, 1)))
	}
	for _, size := range []int{maxPayload - 10, maxPayload, maxPayload + 10, maxMessage, maxMessage + 10} {
		long := strings.Repeat("x", size)
		samePacket(t, []byte(strings.Replace(full, `"context":{`, `"context":{"long":"`+long+`",`, 1)))
		sameMessage(t, []byte(strings.Replace(message, `"payload":{`, `"payload":{"long":"`+long+`",`, 1)))
	}
}

func FuzzReadPacket(f *testing.F) {
	f.Add(newTestSigner(f).packet(f, fullDraft, signature.Batched))
	for _, text := range corpus(f, "FuzzParse") {
		f.Add(text)
	}
	f.Fuzz(samePacket)
}

func FuzzReadMessage(f *testing.F) {
	f.Add(newTestSigner(f).message(f, payload, signature.Batched))
	for _, text := range corpus(f, "FuzzParseMessage") {
		f.Add(text)
	}
	f.Fuzz(sameMessage)
}
