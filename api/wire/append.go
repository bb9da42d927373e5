// Package wire is the JSON of the sockets: strict reading of requests, forgiving reading of replies, and quick
// writing of both. It is pure.
//
// encoding/json would do for most of it, but it takes the last of two equal members, takes names in any case, and
// scans and copies the packet inside a request or reply three times over.
package wire

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strconv"
	"unicode/utf8"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/fault"
)

// What is sent for every packet is written by hand, everything else by encoding/json. A test holds the two to the
// same members.

// AppendReply appends v as one JSON object on one line.
func AppendReply(b []byte, v any) ([]byte, error) {
	switch v := v.(type) {
	case *api.SignPacketReply:
		return append(appendSignPacketReply(append(b, '{'), v), '}'), nil
	case *api.Decision:
		b, err := appendDecision(append(b, '{'), v)
		return append(b, '}'), err
	case *api.SignPacketResult:
		return appendSignPacketResult(b, v)
	case *api.VerifyPacketResult:
		return appendVerifyPacketResult(b, v)
	case *api.SignPacketsReply:
		return appendResults(b, v.Results, appendSignPacketResult)
	case *api.VerifyPacketsReply:
		return appendResults(b, v.Results, appendVerifyPacketResult)
	}
	return AppendJSON(b, v)
}

func appendResults[R any](b []byte, rs []R, one func([]byte, *R) ([]byte, error)) ([]byte, error) {
	b = append(b, `{"results":[`...)
	for i := range rs {
		if i > 0 {
			b = append(b, ',')
		}
		var err error
		if b, err = one(b, &rs[i]); err != nil {
			return b, err
		}
	}
	return append(b, `]}`...), nil
}

func appendSignPacketResult(b []byte, r *api.SignPacketResult) ([]byte, error) {
	b = append(b, '{')
	if r.SignPacketReply != nil && r.Error == nil {
		b = appendSignPacketReply(b, r.SignPacketReply)
	}
	b, err := appendProblem(b, r.Error)
	return append(b, '}'), err
}

func appendVerifyPacketResult(b []byte, r *api.VerifyPacketResult) (out []byte, err error) {
	b = append(b, '{')
	if r.Decision != nil && r.Error == nil {
		if b, err = appendDecision(b, r.Decision); err != nil {
			return b, err
		}
	}
	b, err = appendProblem(b, r.Error)
	return append(b, '}'), err
}

func appendProblem(b []byte, p *api.Problem) ([]byte, error) {
	if p == nil {
		return b, nil
	}
	return AppendJSON(append(b, `"error":`...), p)
}

func appendSignPacketReply(b []byte, r *api.SignPacketReply) []byte {
	b = appendRaw(append(b, `"packet":`...), r.Packet)
	b = AppendString(append(b, `,"agent_id":`...), r.AgentID)
	b = AppendString(append(b, `,"fingerprint":`...), r.Fingerprint)
	b = AppendString(append(b, `,"algorithm":`...), r.Algorithm)
	b = AppendString(append(b, `,"grade":`...), r.Grade)
	b = AppendString(append(b, `,"mode":`...), r.Mode)
	b = strconv.AppendUint(append(b, `,"epoch":`...), r.Epoch, 10)
	b = strconv.AppendUint(append(b, `,"sequence":`...), r.Sequence, 10)
	if r.BatchSize == 0 {
		return b
	}
	return strconv.AppendInt(append(b, `,"batch_size":`...), int64(r.BatchSize), 10)
}

func appendDecision(b []byte, d *api.Decision) ([]byte, error) {
	b = AppendString(append(b, `"decision":`...), d.Decision)
	b = appendOptional(b, `,"packet_id":`, d.PacketID)
	b = appendOptional(b, `,"reason":`, string(d.Reason))
	b = appendOptional(b, `,"field":`, d.Field)
	b = appendOptional(b, `,"text":`, d.Text)
	b = appendOptional(b, `,"form":`, d.Form)
	if d.Details == nil {
		return b, nil
	}
	return AppendJSON(append(b, `,"details":`...), d.Details)
}

func appendOptional(b []byte, name, value string) []byte {
	if value == "" {
		return b
	}
	return AppendString(append(b, name...), value)
}

// appendRaw appends JSON that our own packages made. It is sent as it is, unless a line break in it would tear a
// line of a stream.
func appendRaw(b []byte, raw json.RawMessage) []byte {
	if len(raw) == 0 {
		return append(b, "null"...)
	}
	if bytes.IndexByte(raw, '\n') < 0 {
		return append(b, raw...)
	}
	var flat bytes.Buffer
	if json.Compact(&flat, raw) != nil {
		return append(b, "null"...)
	}
	return append(b, flat.Bytes()...)
}

const hexDigits = "0123456789abcdef"

// AppendString appends s as a JSON string. Bytes that are not UTF-8 become U+FFFD, as in encoding/json.
func AppendString(b []byte, s string) []byte {
	b = append(b, '"')
	start := 0
	for i := 0; i < len(s); {
		c := s[i]
		if c >= 0x20 && c < utf8.RuneSelf && c != '"' && c != '\\' {
			i++
			continue
		}
		if c >= utf8.RuneSelf {
			r, n := utf8.DecodeRuneInString(s[i:])
			if r == utf8.RuneError && n == 1 {
				b = append(append(b, s[start:i]...), "\ufffd"...)
				start = i + n
			}
			i += n
			continue
		}
		b = append(b, s[start:i]...)
		if c == '"' || c == '\\' {
			b = append(b, '\\', c)
		} else {
			b = append(b, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
		}
		i++
		start = i
	}
	return append(append(b, s[start:]...), '"')
}

// AppendJSON appends v as encoding/json writes it, with empty lists and objects where v has nil ones: a reply has
// no null where its schema says array.
func AppendJSON(b []byte, v any) ([]byte, error) {
	w := bytes.NewBuffer(b)
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(filled(reflect.ValueOf(v)).Interface()); err != nil {
		return b, err
	}
	return bytes.TrimSuffix(w.Bytes(), []byte{'\n'}), nil
}

// filled returns v with empty slices and maps in place of nil ones. It copies what it walks through: replies may
// share memory with the daemon's state.
func filled(v reflect.Value) reflect.Value {
	switch v.Kind() {
	case reflect.Pointer:
		if v.IsNil() {
			return v
		}
		p := reflect.New(v.Type().Elem())
		p.Elem().Set(filled(v.Elem()))
		return p
	case reflect.Struct:
		if v.Type() == timeType {
			return v
		}
		c := reflect.New(v.Type()).Elem()
		for i := range v.NumField() {
			c.Field(i).Set(filled(v.Field(i)))
		}
		return c
	case reflect.Slice:
		if v.Type() == rawType {
			return v
		}
		c := reflect.MakeSlice(v.Type(), v.Len(), v.Len())
		for i := range v.Len() {
			c.Index(i).Set(filled(v.Index(i)))
		}
		return c
	case reflect.Map:
		if v.IsNil() {
			return reflect.MakeMap(v.Type())
		}
	}
	return v
}

// AppendSign appends a request to sign around the packet's own text, of which each byte is the daemon's to judge.
func AppendSign(b []byte, r *api.SignPacketRequest) ([]byte, error) {
	b = append(b, '{')
	if r.Agent != "" {
		b = append(AppendString(append(b, `"agent":`...), r.Agent), ',')
	}
	if r.Batchable != nil {
		b = append(strconv.AppendBool(append(b, `"batchable":`...), *r.Batchable), ',')
	}
	return appendPacket(b, r.Packet)
}

// AppendVerify appends a request to verify, likewise.
func AppendVerify(b []byte, r *api.VerifyPacketRequest) ([]byte, error) {
	b = append(b, '{')
	if r.Audience != "" {
		b = append(AppendString(append(b, `"audience":`...), r.Audience), ',')
	}
	if r.Detail {
		b = append(b, `"detail":true,`...)
	}
	if r.MinGrade != "" {
		b = append(AppendString(append(b, `"min_grade":`...), r.MinGrade), ',')
	}
	if r.DirectOnly {
		b = append(b, `"direct_only":true,`...)
	}
	return appendPacket(b, r.Packet)
}

// appendPacket appends the member packet and ends the object. Text that is not one JSON value is refused here: it
// could reach into the request around it.
func appendPacket(b []byte, packet json.RawMessage) ([]byte, error) {
	if !Valid(packet) {
		return nil, fault.BadField("packet", "not JSON")
	}
	return append(append(append(b, `"packet":`...), packet...), '}'), nil
}
