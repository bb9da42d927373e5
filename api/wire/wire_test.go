package wire_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/api/wire"
	"github.com/trustd/trustd/fault"
)

var details = &api.Details{Valid: true, SignerID: "a", Fingerprint: "f", KeyEpoch: 3, ViewSize: math.MaxUint64}

func signReply() api.SignPacketReply {
	return api.SignPacketReply{
		Packet: json.RawMessage(`{"a":[1,2.50,"\u00e9é\u2028"]}`),
		Signed: api.Signed{
			AgentID: "a\"\\\n\x01é\u2028<>&😀", Fingerprint: "sha256:00", Algorithm: "ed25519", Grade: "software",
			Mode: "batched", Epoch: 1, Sequence: math.MaxUint64, BatchSize: 16384,
		},
	}
}

// TestAppendReplyIsJSON: what is written by hand says what encoding/json would.
func TestAppendReplyIsJSON(t *testing.T) {
	reply := signReply()
	problem := api.NewProblem(fault.BadField("packet.nonce", "text"))
	accept := api.Decision{PacketID: "p", Decision: api.Accept, Form: "th-0.4"}
	reject := api.Decision{Decision: api.Reject, Reason: fault.Malformed, Field: "f", Text: "t", Details: details}
	for _, v := range []any{
		&reply, &accept, &reject,
		&api.SignPacketResult{SignPacketReply: &reply}, &api.SignPacketResult{Error: problem}, &api.SignPacketResult{},
		&api.VerifyPacketResult{Decision: &reject}, &api.VerifyPacketResult{Error: problem}, &api.VerifyPacketResult{},
		&api.SignPacketsReply{Results: []api.SignPacketResult{{SignPacketReply: &reply}, {Error: problem}}},
		&api.VerifyPacketsReply{
			Results: []api.VerifyPacketResult{{Decision: &accept}, {Decision: &reject}, {Error: problem}},
		},
	} {
		got, err := wire.AppendReply([]byte("before "), v)
		if err != nil {
			t.Fatal(err)
		}
		want, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		text, ok := bytes.CutPrefix(got, []byte("before "))
		if !ok || !sameJSON(t, text, want) || bytes.Contains(text, []byte("\n")) {
			t.Errorf("%T:\n%s\nencoding/json:\n%s", v, got, want)
		}
	}
}

func sameJSON(t *testing.T, a, b []byte) bool {
	t.Helper()
	var x, y any
	if err := errors.Join(decodeAny(a, &x), decodeAny(b, &y)); err != nil {
		t.Fatalf("%v:\n%s\n%s", err, a, b)
	}
	return reflect.DeepEqual(x, y)
}

func decodeAny(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	return d.Decode(v)
}

// TestListsAreNeverNull, and what they came from is left alone.
func TestListsAreNeverNull(t *testing.T) {
	shared := []api.Backend{{Name: "b"}}
	for _, v := range []any{
		&api.SignPacketsReply{}, &api.VerifyPacketsReply{}, &api.AgentList{},
		&api.AgentList{Agents: make([]api.AgentDetail, 1)},
		&api.Whoami{Agents: make([]api.Grant, 1)}, &api.Capabilities{Backends: shared}, &api.Health{}, &api.ChainVerdict{},
	} {
		got, err := wire.AppendReply(nil, v)
		if err != nil || bytes.Contains(got, []byte("null")) {
			t.Errorf("%T: %v: %s", v, err, got)
		}
	}
	if shared[0].Algorithms != nil {
		t.Error("the daemon's own value was changed")
	}
}

func TestRawThatWouldTearALine(t *testing.T) {
	reply := api.SignPacketReply{Packet: json.RawMessage("{\n \"a\": 1\n}")}
	got, err := wire.AppendReply(nil, &reply)
	if err != nil || bytes.Contains(got, []byte("\n")) || !bytes.Contains(got, []byte(`{"packet":{"a":1},`)) {
		t.Errorf("%v: %s", err, got)
	}
	if _, err := wire.AppendReply(nil, &api.SignMessageReply{Message: json.RawMessage("{")}); err == nil {
		t.Error("text that is no JSON was sent")
	}
}

func TestDecodeReply(t *testing.T) {
	reply := signReply()
	at := time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC)
	for _, want := range []any{
		&reply, &api.SignPacketResult{SignPacketReply: &reply}, &api.SignPacketResult{Error: api.NewProblem(fault.Denied)},
		&api.VerifyPacketResult{Decision: &api.Decision{Decision: api.Reject, Reason: fault.Expired, Details: details}},
		&api.AgentList{Agents: []api.AgentDetail{{
			Identity: api.Identity{
				AgentID: "a", Metadata: map[string]string{"k": "v"}, Aliases: []string{"x"}, CreatedAt: at, ExpiresAt: &at,
			},
			Local: true, Bindings: []api.Binding{{Selector: api.Selector{UID: new(uint32)}}},
		}}},
		&api.Capabilities{
			Algorithms: []string{"a"}, Backends: []api.Backend{}, Formats: []string{}, Limits: map[string]int64{"x": -1},
		},
		&api.Whoami{PID: -1, Groups: []uint32{1}, Agents: []api.Grant{{AgentID: "a", Verbs: []string{}}}},
		&api.ChainVerdict{At: 3, Messages: []api.MessageVerdict{{SignatureValid: true, Details: details}}},
	} {
		text, err := json.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		got := reflect.New(reflect.TypeOf(want).Elem())
		if err := wire.DecodeReply(text, got.Interface()); err != nil {
			t.Errorf("%T: %v", want, err)
		} else if !reflect.DeepEqual(got.Interface(), want) {
			t.Errorf("%T:\n%+v\nwant\n%+v", want, got.Elem(), want)
		}
	}
}

// TestRepliesOfNewerDaemons: members that are new are passed over, and null is nothing.
func TestRepliesOfNewerDaemons(t *testing.T) {
	var h api.History
	err := wire.DecodeReply([]byte(` {"new":{"a":[1,{"b":null}]},"agent_id":"a","root":null,"size":7} `), &h)
	if err != nil || h.AgentID != "a" || h.Size != 7 || h.Root != "" {
		t.Errorf("%v: %+v", err, h)
	}
	for _, bad := range []string{`{"new":}`, `{"new":1`, `{"size":-1}`, `[]`, `{} {}`, `{"agent_id":"a","agent_id":"b"}`} {
		if err := wire.DecodeReply([]byte(bad), &h); err == nil {
			t.Errorf("%s is taken", bad)
		}
	}
}

func TestRawMembersCannotGrow(t *testing.T) {
	body := []byte(`{"packet":{"a":1},"agent":"x"}`)
	r, err := wire.DecodeRequest[api.SignPacketRequest](body)
	if err != nil {
		t.Fatal(err)
	}
	_ = append(r.Packet, "!!!!"...)
	if string(body) != `{"packet":{"a":1},"agent":"x"}` {
		t.Errorf("appending to a member wrote %s", body)
	}
}

func TestAppendRequests(t *testing.T) {
	packet := json.RawMessage(`{ "a" : 1.0 , "a":"é" }`)
	yes := true
	sign := api.SignPacketRequest{Agent: "a\"b", Packet: packet, Batchable: &yes}
	text, err := wire.AppendSign(nil, &sign)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := wire.DecodeRequest[api.SignPacketRequest](text); err != nil || !reflect.DeepEqual(got, sign) {
		t.Errorf("%v: %+v", err, got)
	}
	verify := api.VerifyPacketRequest{Audience: "x", Detail: true, Packet: packet,
		Demands: api.Demands{MinGrade: "hardware-claimed", DirectOnly: true}}
	if text, err = wire.AppendVerify(nil, &verify); err != nil {
		t.Fatal(err)
	}
	if got, err := wire.DecodeRequest[api.VerifyPacketRequest](text); err != nil || !reflect.DeepEqual(got, verify) {
		t.Errorf("%v: %+v", err, got)
	}
	deep := strings.Repeat("[", 1000) + strings.Repeat("]", 1000)
	for _, bad := range []string{"", "{}, \"agent\":\"other\"", "{}}", "{", "\xff", deep} {
		sign.Packet = json.RawMessage(bad)
		if _, err := wire.AppendSign(nil, &sign); !errors.Is(err, fault.Malformed) {
			t.Errorf("%.20q: %v", bad, err)
		}
	}
}

// FuzzRequest: whatever is taken is one object in JSON, with the members that were read and no others, none of
// them twice; and nothing panics.
func FuzzRequest(f *testing.F) {
	for _, s := range []string{
		`{"agent":"a","packet":{"x":[1,-2.5e+3,"\u00e9\ud83d\ude00",null,true]}}`, `{"packet":{},"packet":{}}`,
		`{"Packet":{}}`,
		`{"agent_id":"a","bindings":[{"selector":{"uid":1},"verbs":["sign"]}],"expires_at":"2026-01-01T00:00:00.000001Z"}`,
		`{"agent_id":"a","metadata":{"k":"v","\u006b":"w"}}`, `{"messages":[1,[],{}]}`, `{"requests":[{"packet":1}]}`,
		`{}`, ` {} `,
		`{"packet":1}{}`, `{"agent":"\ud800","packet":0}`, `{"packet":01}`, "{\"agent\":\"\xff\"}",
		`{"ttl_seconds":-0,"payload":""}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		checkRequest[api.SignPacketRequest](t, b)
		checkRequest[api.SignPacketsRequest](t, b)
		checkRequest[api.VerifyPacketRequest](t, b)
		checkRequest[api.SignMessageRequest](t, b)
		checkRequest[api.VerifyMessageRequest](t, b)
		checkRequest[api.VerifyChainRequest](t, b)
		checkRequest[api.AddAgentRequest](t, b)
		checkRequest[api.RemoveAgentRequest](t, b)
		checkRequest[api.ImportAgentRequest](t, b)
		if valid := wire.Valid(b); valid && !json.Valid(b) {
			t.Errorf("%q is called JSON", b)
		}
		var d api.AgentList
		if wire.DecodeReply(b, &d) == nil && !json.Valid(b) {
			t.Errorf("%q is read as a reply", b)
		}
	})
}

func checkRequest[T any](t *testing.T, b []byte) {
	got, err := wire.DecodeRequest[T](bytes.Clone(b))
	if err != nil {
		if !errors.Is(err, fault.Malformed) && !errors.Is(err, fault.TooLarge) {
			t.Errorf("%q: %v", b, err)
		}
		return
	}
	// encoding/json, told to be as strict as it can be, reads the same.
	var want T
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&want); err != nil {
		t.Fatalf("%q is taken; encoding/json says %v", b, err)
	}
	x, err1 := json.Marshal(got)
	y, err2 := json.Marshal(want)
	if err1 != nil || err2 != nil || !bytes.Equal(x, y) {
		t.Errorf("%q is read as\n%s, by encoding/json as\n%s (%v, %v)", b, x, y, err1, err2)
	}
}

// FuzzString: a string is written so that it is read back, and as encoding/json reads it.
func FuzzString(f *testing.F) {
	for _, s := range []string{"", "a", "\"\\\x00\x1f\x7f", "é\u2028😀", "\xff\xc0", "a\xe2\x80"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var got, std string
		text := wire.AppendString(nil, s)
		if err := json.Unmarshal(text, &got); err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		quoted, _ := json.Marshal(s)
		if err := json.Unmarshal(quoted, &std); err != nil || got != std {
			t.Errorf("%q is read back as %q, from encoding/json as %q", s, got, std)
		}
		r, err := wire.DecodeRequest[api.RemoveAgentRequest]([]byte(`{"reason":` + string(quoted) + `}`))
		if err != nil || r.Reason != std {
			t.Errorf("%s is read as %q, %v", quoted, r.Reason, err)
		}
	})
}

func BenchmarkDecodeRequest(b *testing.B) {
	text := strings.Repeat("lorem ipsum ", 60)
	body := []byte(`{"agent":"planner","packet":{"context":{"x":"` + text + `","n":[1,2,3,4,5]}}}`)
	b.SetBytes(int64(len(body)))
	for b.Loop() {
		if _, err := wire.DecodeRequest[api.SignPacketRequest](body); err != nil {
			b.Fatal(err)
		}
	}
}
