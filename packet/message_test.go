package packet_test

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/packet"
	"github.com/trustd/trustd/signature"
)

// messageSeed is the secret key of RFC 8032 section 7.1, test 1.
const messageSeed = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"

var zeroHead = "sha256:" + strings.Repeat("0", 63) + "1"

func messageKey(t testing.TB) (ed25519.PrivateKey, ident.PublicKey) {
	t.Helper()
	seed, err := hex.DecodeString(messageSeed)
	if err != nil {
		t.Fatal(err)
	}
	priv := ed25519.NewKeyFromSeed(seed)
	pub, err := ident.NewPublicKey(priv.Public())
	if err != nil {
		t.Fatal(err)
	}
	return priv, pub
}

func messageHeader(t testing.TB) packet.MessageHeader {
	t.Helper()
	_, pub := messageKey(t)
	id, err := ident.ParseAgentID("research-agent")
	if err != nil {
		t.Fatal(err)
	}
	return packet.MessageHeader{
		SignerID: id, Fingerprint: pub.ID(), Algorithm: pub.Algorithm(),
		Timestamp: time.Date(2026, 3, 8, 12, 0, 0, 123456000, time.UTC),
		ExpiresAt: time.Date(2026, 3, 8, 12, 10, 0, 0, time.UTC),
		Seq:       7, Nonce: "n-0001", Audience: []string{"planner", "agent:vwGcRV8F51znTKAq"},
		Grade: "software", KeyEpoch: 1, ViewHead: zeroHead, ViewSize: 3,
	}
}

func signMessage(t testing.TB, h packet.MessageHeader, payload string) *packet.Message {
	t.Helper()
	priv, pub := messageKey(t)
	u, err := packet.NewMessage(h, json.RawMessage(payload))
	if err != nil {
		t.Fatal(err)
	}
	m, err := u.Seal(signature.NewDirect(ed25519.Sign(priv, u.SigningBytes())), pub)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func messageText(t testing.TB, m *packet.Message) []byte {
	t.Helper()
	b, err := m.JSON()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestMessageVector reads a message whose bytes do not change, and builds its signed bytes by hand from
// docs/formats/signed-message.md.
func TestMessageVector(t *testing.T) {
	raw, err := os.ReadFile("testdata/signed-message-v1.json")
	if err != nil {
		t.Fatal(err)
	}
	var vec struct {
		Message      json.RawMessage `json:"message"`
		SigningBytes string          `json:"signing_bytes_hex"`
		Digest       string          `json:"digest"`
		PayloadHash  string          `json:"payload_hash"`
	}
	if err := json.Unmarshal(raw, &vec); err != nil {
		t.Fatal(err)
	}
	m, err := packet.ParseMessage(vec.Message)
	if err != nil {
		t.Fatal(err)
	}
	if got := hex.EncodeToString(m.SigningBytes()); got != vec.SigningBytes {
		t.Errorf("signed bytes\n got %s\nwant %s", got, vec.SigningBytes)
	}
	if m.Digest() != vec.Digest || m.PayloadHash() != vec.PayloadHash {
		t.Errorf("digest %s, payload hash %s", m.Digest(), m.PayloadHash())
	}
	_, pub := messageKey(t)
	if err := m.VerifySignature(pub, nil); err != nil {
		t.Error(err)
	}
	if got := messageText(t, m); !bytes.Equal(got, vec.Message) {
		t.Errorf("wire form\n got %s\nwant %s", got, vec.Message)
	}
	if got := handEncoded(pub); !bytes.Equal(got, m.SigningBytes()) {
		t.Errorf("bytes built by hand differ:\n got %q\nwant %q", got, m.SigningBytes())
	}
	if got := messageText(t, signMessage(t, vectorHeader(t), vectorPayload)); !bytes.Equal(got, vec.Message) {
		t.Errorf("signing anew gives\n %s", got)
	}
}

// TestMessageDocument reads the worked example of docs/formats/signed-message.md: its fields, put together, are the
// frozen bytes.
func TestMessageDocument(t *testing.T) {
	doc, err := os.ReadFile("../docs/formats/signed-message.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(doc), "```\n")
	example, _, _ := strings.Cut(rest, "```")
	var got []byte
	for line := range strings.Lines(example) {
		for _, part := range strings.Fields(line)[1:] {
			if strings.HasPrefix(part, `"`) {
				got = append(got, strings.Trim(part, `"`)...)
				continue
			}
			raw, err := hex.DecodeString(part)
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, raw...)
		}
	}
	m := signMessage(t, vectorHeader(t), vectorPayload)
	if !bytes.Equal(got, m.SigningBytes()) {
		t.Errorf("the document's example gives\n %q\nwant\n %q", got, m.SigningBytes())
	}
	sig := m.Signature().Text()
	if !strings.Contains(string(doc), m.Digest()) || !strings.Contains(string(doc), sig) {
		t.Error("the document has another digest or signature")
	}
}

const vectorPayload = `{"note": "h\u00e9 <&>\u2028", "amount": 150.00, "ok":true}`

func vectorHeader(t testing.TB) packet.MessageHeader {
	h := messageHeader(t)
	h.Prev = "sha256:" + strings.Repeat("ab", 32)
	return h
}

func handEncoded(pub ident.PublicKey) []byte {
	var b bytes.Buffer
	b.WriteString("trustd/msg/v1\x00")
	field := func(s string) {
		_ = binary.Write(&b, binary.BigEndian, uint32(len(s)))
		b.WriteString(s)
	}
	field("\x00\x00\x00\x00\x00\x00\x00\x01")
	field("research-agent")
	field(pub.ID().String())
	field("ed25519")
	field("2026-03-08T12:00:00.123456Z")
	field("2026-03-08T12:10:00.000000Z")
	field("\x00\x00\x00\x00\x00\x00\x00\x07")
	field("n-0001")
	field("\x00\x00\x00\x07planner\x00\x00\x00\x16agent:vwGcRV8F51znTKAq")
	field("application/json")
	field("software")
	field("\x00\x00\x00\x00\x00\x00\x00\x01")
	field(zeroHead)
	field("\x00\x00\x00\x00\x00\x00\x00\x03")
	field("sha256:" + strings.Repeat("ab", 32))
	field("{\"amount\":150,\"note\":\"h\u00e9 <&>\u2028\",\"ok\":true}")
	return b.Bytes()
}

// TestMessageRoundTrip signs payloads of all kinds; what comes back is the same message, however it is laid out.
func TestMessageRoundTrip(t *testing.T) {
	payloads := []string{
		`null`, `true`, `""`, `0`, `-0`, `[]`, `{}`, `150.00`, `0.1`, `9007199254740991`, `-9007199254740991`, `1e15`,
		`5e-324`, `1.5e-7`, `{"b":1,"a":[{"z":null,"y":"\ud83d\ude00"}]}`, `"<>&\u2028\u007f\/"`, `"\u0000"`,
		`{"\uffee":1,"\ud83d\ude00":2}`, strings.Repeat("[", 63) + strings.Repeat("]", 63),
	}
	_, pub := messageKey(t)
	for _, p := range payloads {
		m := signMessage(t, messageHeader(t), p)
		text := messageText(t, m)
		var spaced bytes.Buffer
		if err := json.Indent(&spaced, text, " ", "\t"); err != nil {
			t.Fatal(err)
		}
		for _, form := range [][]byte{text, spaced.Bytes()} {
			got, err := packet.ParseMessage(form)
			if err != nil {
				t.Errorf("%s: %v", p, err)
				continue
			}
			if err := got.VerifySignature(pub, nil); err != nil {
				t.Errorf("%s: %v", p, err)
			}
			if got.Digest() != m.Digest() || !bytes.Equal(messageText(t, got), text) {
				t.Errorf("%s: another message came back", p)
			}
			if got.Header().Nonce != "n-0001" || !got.PublicKey().Equal(pub) || len(got.Signature().Raw()) != 64 {
				t.Errorf("%s: header or key lost", p)
			}
		}
	}
}

// TestNewMessageRefuses checks that no bytes come out of a header or payload that a reader would refuse.
func TestNewMessageRefuses(t *testing.T) {
	type change func(h *packet.MessageHeader)
	keep := func(*packet.MessageHeader) {}
	long := strings.Repeat("x", 129)
	cases := []struct {
		name, field string
		change      change
		payload     string
	}{
		{"no payload", "payload", keep, ""},
		{"blank payload", "payload", keep, " \n"},
		{"not JSON", "payload", keep, "{"},
		{"two values", "payload", keep, "1 2"},
		{"duplicate", "payload", keep, `{"a":1,"a":2}`},
		{"duplicate by escape", "payload", keep, `{"a":1,"\u0061":2}`},
		{"duplicate inside", "payload", keep, `[{"b":{"a":1,"a":1}}]`},
		{"lone surrogate", "payload", keep, `"\ud800"`},
		{"low surrogate", "payload", keep, `"\udc00"`},
		{"not UTF-8", "payload", keep, "\"\xff\""},
		{"control character", "payload", keep, "\"\x01\""},
		{"NaN", "payload", keep, "NaN"},
		{"2^53", "payload", keep, "9007199254740992"},
		{"-2^53", "payload", keep, "[-9007199254740992]"},
		{"1e300", "payload", keep, "1e300"},
		{"1e400", "payload", keep, "1e400"},
		{"underflow", "payload", keep, "1e-400"},
		{"huge exponent", "payload", keep, "0e99999999999999999999"},
		{"too many digits", "payload", keep, "0.1000000000000000055511151231257827"},
		{"nested", "payload", keep, strings.Repeat("[", 64) + strings.Repeat("]", 64)},
		{"no signer", "signer_id", func(h *packet.MessageHeader) { h.SignerID = ident.AgentID{} }, "1"},
		{"no key", "fingerprint", func(h *packet.MessageHeader) { h.Fingerprint = ident.KeyID{} }, "1"},
		{"no algorithm", "algorithm", func(h *packet.MessageHeader) { h.Algorithm = 0 }, "1"},
		{"no time", "timestamp", func(h *packet.MessageHeader) { h.Timestamp = time.Time{} }, "1"},
		{"nanoseconds", "timestamp", func(h *packet.MessageHeader) { h.Timestamp = h.Timestamp.Add(1) }, "1"},
		{"nanoseconds", "expires_at", func(h *packet.MessageHeader) { h.ExpiresAt = h.ExpiresAt.Add(1) }, "1"},
		{"year", "expires_at", func(h *packet.MessageHeader) { h.ExpiresAt = h.ExpiresAt.AddDate(8000, 0, 0) }, "1"},
		{"seq", "seq", func(h *packet.MessageHeader) { h.Seq = 1 << 53 }, "1"},
		{"epoch", "key_epoch", func(h *packet.MessageHeader) { h.KeyEpoch = 1 << 53 }, "1"},
		{"size", "view_size", func(h *packet.MessageHeader) { h.ViewSize = 1 << 63 }, "1"},
		{"no nonce", "nonce", func(h *packet.MessageHeader) { h.Nonce = "" }, "1"},
		{"long nonce", "nonce", func(h *packet.MessageHeader) { h.Nonce = long }, "1"},
		{"nonce with a space", "nonce", func(h *packet.MessageHeader) { h.Nonce = "a b" }, "1"},
		{"17 names", "aud", func(h *packet.MessageHeader) { h.Audience = strings.Split("abcdefghijklmnopq", "") }, "1"},
		{"empty name", "aud", func(h *packet.MessageHeader) { h.Audience = []string{""} }, "1"},
		{"name twice", "aud", func(h *packet.MessageHeader) { h.Audience = []string{"a", "b", "a"} }, "1"},
		{"content type", "content_type", func(h *packet.MessageHeader) { h.ContentType = "text/html" }, "1"},
		{"content type", "content_type", func(h *packet.MessageHeader) { h.ContentType = "application/+json" }, "1"},
		{"content type", "content_type", func(h *packet.MessageHeader) { h.ContentType = "Application/json" }, "1"},
		{"grade", "grade", func(h *packet.MessageHeader) { h.Grade = "" }, "1"},
		{"head", "view_head", func(h *packet.MessageHeader) { h.ViewHead = "" }, "1"},
		{"prev", "prev", func(h *packet.MessageHeader) { h.Prev = "sha256:ABCD" }, "1"},
	}
	for _, c := range cases {
		h := messageHeader(t)
		c.change(&h)
		_, err := packet.NewMessage(h, json.RawMessage(c.payload))
		wantField(t, c.name, err, fault.Malformed, c.field)
	}
	big := `"` + strings.Repeat("x", packet.MaxPayload-1) + `"`
	_, err := packet.NewMessage(messageHeader(t), json.RawMessage(big))
	wantField(t, "one byte too large", err, fault.TooLarge, "")
	grows := "[" + strings.Repeat("1e15,", packet.MaxPayload/10) + "1]"
	_, err = packet.NewMessage(messageHeader(t), json.RawMessage(grows))
	wantField(t, "too large in canonical form", err, fault.TooLarge, "")
}

func wantField(t *testing.T, name string, err error, code fault.Code, field string) {
	t.Helper()
	var e *fault.Error
	if !errors.As(err, &e) || e.Code != code || e.Field != field {
		t.Errorf("%s: got %v, want %s (%s)", name, err, code, field)
	}
}

// TestLargestMessage seals the largest payload under the largest header; the result is still readable.
func TestLargestMessage(t *testing.T) {
	h := messageHeader(t)
	h.Audience = nil
	for i := range packet.MaxAudience {
		h.Audience = append(h.Audience, strings.Repeat(`\`, 127)+string(rune('a'+i)))
	}
	h.Nonce = strings.Repeat(`"`, 128)
	h.Prev = zeroHead
	m := signMessage(t, h, `"`+strings.Repeat("x", packet.MaxPayload-2)+`"`)
	if _, err := packet.ParseMessage(messageText(t, m)); err != nil {
		t.Error(err)
	}
	room := packet.MaxMessage - len(messageText(t, m))
	if rsaExtra := 2 * 1024; room < rsaExtra {
		t.Errorf("only %d bytes are left for an RSA key and signature", room)
	}
}

// TestParseMessageRefuses changes one thing of a good text at a time.
func TestParseMessageRefuses(t *testing.T) {
	h := vectorHeader(t)
	good := string(messageText(t, signMessage(t, h, `{"a":1}`)))
	sub := func(old, new string) string {
		t.Helper()
		if !strings.Contains(good, old) {
			t.Fatalf("the good text does not hold %s", old)
		}
		return strings.Replace(good, old, new, 1)
	}
	_, pub := messageKey(t)
	raw32 := base64.StdEncoding.EncodeToString(pub.SPKI()[12:])
	var sig struct {
		Signature string `json:"signature"`
	}
	if err := json.Unmarshal([]byte(good), &sig); err != nil {
		t.Fatal(err)
	}
	cases := []struct{ name, field, text string }{
		{"nothing", "", ""},
		{"null", "", "null"},
		{"array", "", "[]"},
		{"two", "", good + good},
		{"trailing comma", "", good[:len(good)-1] + ",}"},
		{"unknown member", "", sub(`"v":1`, `"v":1,"caps":[]`)},
		{"other case", "", sub(`"nonce"`, `"Nonce"`)},
		{"duplicate", "", sub(`"v":1`, `"v":1,"v":1`)},
		{"duplicate by escape", "", sub(`"v":1`, `"v":1,"\u0076":1`)},
		{"missing", "seq", sub(`"seq":7,`, ``)},
		{"missing payload", "payload", sub(`"payload":{"a":1},`, ``)},
		{"version 2", "v", sub(`"v":1`, `"v":2`)},
		{"version as text", "v", sub(`"v":1`, `"v":"1"`)},
		{"version as float", "v", sub(`"v":1`, `"v":1.0`)},
		{"negative", "seq", sub(`"seq":7`, `"seq":-7`)},
		{"exponent", "seq", sub(`"seq":7`, `"seq":7e0`)},
		{"seq null", "seq", sub(`"seq":7`, `"seq":null`)},
		{"seq 2^53", "", sub(`"seq":7`, `"seq":9007199254740992`)},
		{"expires null", "expires_at", sub(`"2026-03-08T12:10:00.000000Z"`, `null`)},
		{"expires empty", "expires_at", sub(`"2026-03-08T12:10:00.000000Z"`, `""`)},
		{"expires in year 1", "expires_at", sub(`2026-03-08T12:10:00.000000Z`, `0001-01-01T00:00:00.000000Z`)},
		{"short fraction", "timestamp", sub(`12:00:00.123456Z`, `12:00:00.123Z`)},
		{"comma", "timestamp", sub(`12:00:00.123456Z`, `12:00:00,123456Z`)},
		{"offset", "timestamp", sub(`12:00:00.123456Z`, `12:00:00.123456+00:00`)},
		{"leap second", "timestamp", sub(`12:00:00.123456Z`, `12:00:60.123456Z`)},
		{"prev empty", "prev", sub(`"sha256:`+strings.Repeat("ab", 32)+`"`, `""`)},
		{"prev upper case", "prev", sub(strings.Repeat("ab", 32), strings.Repeat("AB", 32))},
		{"aud text", "aud", sub(`["planner","agent:vwGcRV8F51znTKAq"]`, `"planner"`)},
		{"aud null", "aud", sub(`["planner","agent:vwGcRV8F51znTKAq"]`, `null`)},
		{"aud holds null", "aud", sub(`"planner"`, `null`)},
		{"aud twice", "aud", sub(`"agent:vwGcRV8F51znTKAq"`, `"planner"`)},
		{"signer", "signer_id", sub(`"research-agent"`, `"a:b"`)},
		{"algorithm", "algorithm", sub(`"ed25519"`, `"Ed25519"`)},
		{"other algorithm", "algorithm", sub(`"ed25519"`, `"ecdsa-p256"`)},
		{"fingerprint", "fingerprint", sub(pub.ID().String(), zeroHead)},
		{"fingerprint upper case", "fingerprint", sub(pub.ID().String(), strings.ToUpper(pub.ID().String()))},
		{"raw key", "public_key", sub(pub.Base64(), raw32)},
		{"key with line break", "public_key", sub(pub.Base64(), pub.Base64()[:8]+`\n`+pub.Base64()[8:])},
		{"signature short", "signature", sub(sig.Signature, sig.Signature[4:])},
		{"signature with break", "signature", sub(sig.Signature, `\n`+sig.Signature[1:])},
		{"signature url-safe", "signature", sub(sig.Signature, strings.Repeat("_", 86)+"==")},
		{"signature trailing bits", "signature", sub(sig.Signature, sig.Signature[:85]+"B==")},
		{"grade", "grade", sub(`"software"`, `"hardware"`)},
		{"payload number", "", sub(`"payload":{"a":1}`, `"payload":{"a":1e300}`)},
		{"payload surrogate", "", sub(`"payload":{"a":1}`, `"payload":"\ud800"`)},
	}
	for _, c := range cases {
		_, err := packet.ParseMessage([]byte(c.text))
		wantField(t, c.name, err, fault.Malformed, c.field)
	}
	_, err := packet.ParseMessage([]byte(good + strings.Repeat(" ", packet.MaxMessage)))
	wantField(t, "too large", err, fault.TooLarge, "")
	if _, err := packet.ParseMessage([]byte(good)); err != nil {
		t.Errorf("the good text: %v", err)
	}
}

// TestEveryFieldIsSigned changes each member of the wire form to another well-formed value; the signature fails.
func TestEveryFieldIsSigned(t *testing.T) {
	good := messageText(t, signMessage(t, vectorHeader(t), `{"a":1}`))
	_, pub := messageKey(t)
	other := map[string]any{
		"signer_id": "other", "timestamp": "2026-03-08T12:00:00.123457Z", "expires_at": "2036-03-08T12:10:00.000000Z",
		"seq": 8, "nonce": "n-0002", "aud": []string{"planneragent:vwGcRV8F51znTKAq"},
		"content_type": "application/x+json",
		"payload":      map[string]any{"a": 2}, "grade": "hardware-attested", "key_epoch": 2,
		"view_head": "sha256:" + strings.Repeat("cd", 32), "view_size": 4, "prev": zeroHead,
	}
	covered := map[string]bool{"v": true, "signature": true}
	for name, value := range other {
		covered[name] = true
		m := change(t, good, name, value)
		if err := m.VerifySignature(pub, nil); !errors.Is(err, fault.InvalidSignature) {
			t.Errorf("%s changed: %v", name, err)
		}
	}
	for _, name := range []string{"expires_at", "prev"} {
		if err := change(t, good, name, nil).VerifySignature(pub, nil); !errors.Is(err, fault.InvalidSignature) {
			t.Errorf("%s removed: %v", name, err)
		}
	}
	// The last three go together: ParseMessage demands that they agree.
	otherPub, err := ident.NewPublicKey(ed25519.NewKeyFromSeed(make([]byte, 32)).Public())
	if err != nil {
		t.Fatal(err)
	}
	var members map[string]any
	if err := json.Unmarshal(good, &members); err != nil {
		t.Fatal(err)
	}
	members["public_key"], members["fingerprint"] = otherPub.Base64(), otherPub.ID().String()
	swapped, err := json.Marshal(members)
	if err != nil {
		t.Fatal(err)
	}
	m, err := packet.ParseMessage(swapped)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.VerifySignature(pub, nil); !errors.Is(err, fault.InvalidSignature) {
		t.Errorf("key swapped: %v", err)
	}
	covered["public_key"], covered["fingerprint"], covered["algorithm"] = true, true, true
	for name := range members {
		if !covered[name] {
			t.Errorf("no case for member %s", name)
		}
	}
}

// change returns the message with one member set, or removed where value is nil.
func change(t *testing.T, text []byte, name string, value any) *packet.Message {
	t.Helper()
	var members map[string]any
	if err := json.Unmarshal(text, &members); err != nil {
		t.Fatal(err)
	}
	members[name] = value
	if value == nil {
		delete(members, name)
	}
	b, err := json.Marshal(members)
	if err != nil {
		t.Fatal(err)
	}
	m, err := packet.ParseMessage(b)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return m
}

func TestSealChecksItsKey(t *testing.T) {
	u, err := packet.NewMessage(messageHeader(t), json.RawMessage(`1`))
	if err != nil {
		t.Fatal(err)
	}
	priv, pub := messageKey(t)
	other, err := ident.NewPublicKey(ed25519.NewKeyFromSeed(make([]byte, 32)).Public())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := u.Seal(signature.NewDirect(ed25519.Sign(priv, u.SigningBytes())), other); err == nil {
		t.Error("sealed under another key")
	}
	if _, err := u.Seal(signature.NewDirect(make([]byte, 63)), pub); err == nil {
		t.Error("sealed with 63 bytes")
	}
}

func TestHolds(t *testing.T) {
	first := signMessage(t, messageHeader(t), `{"question":"<&>\u2028 \ud83d\ude00"}`)
	text := string(messageText(t, first))
	var spaced bytes.Buffer
	if err := json.Indent(&spaced, []byte(text), "", "  "); err != nil {
		t.Fatal(err)
	}
	cases := []struct {
		name, payload string
		want          bool
	}{
		{"member", `{"original":` + text + `,"answer":1}`, true},
		{"member, laid out otherwise", `{"original":` + spaced.String() + `}`, true},
		{"deeper", `{"x":{"original":` + text + `}}`, false},
		{"array", `[` + text + `]`, false},
		{"the payload itself", text, false},
		{"changed", `{"original":` + strings.Replace(text, `"seq":7`, `"seq":8`, 1) + `}`, false},
		{"as text", `{"original":"` + first.Digest() + `"}`, false},
	}
	for _, c := range cases {
		if got := signMessage(t, messageHeader(t), c.payload).Holds(first); got != c.want {
			t.Errorf("%s: Holds = %v", c.name, got)
		}
	}
}

// FuzzParseMessage: what parses is written and read back as the same message, and json.Valid agrees that it is JSON.
func FuzzParseMessage(f *testing.F) {
	m := signMessage(f, vectorHeader(f), `{"a":[1,0.5,"\u00fc",null]}`)
	text := messageText(f, m)
	f.Add(text)
	f.Add(messageText(f, signMessage(f, messageHeader(f), `{"m":`+string(text)+`}`)))
	f.Add([]byte(`{"v":1}`))
	f.Add([]byte(`{"payload":1e15}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := packet.ParseMessage(b)
		if err != nil {
			if code := fault.CodeOf(err); code != fault.Malformed && code != fault.TooLarge &&
				code != fault.AlgorithmUnsupported {
				t.Fatalf("code %s", code)
			}
			return
		}
		if !json.Valid(b) {
			t.Fatal("parsed what is not JSON")
		}
		text, err := m.JSON()
		if err != nil {
			t.Fatal(err)
		}
		again, err := packet.ParseMessage(text)
		if err != nil {
			t.Fatalf("own text: %v", err)
		}
		if !bytes.Equal(again.SigningBytes(), m.SigningBytes()) || again.Signature().Text() != m.Signature().Text() {
			t.Fatal("another message came back")
		}
		if !bytes.HasPrefix(m.SigningBytes(), []byte(signature.Message)) {
			t.Fatal("no domain")
		}
	})
}
