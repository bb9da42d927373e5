package client

import (
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/pyjson"
)

// The bounds of a packet, as in package packet, which depends on more than the standard library.
const (
	maxPacket = 256 << 10
	maxName   = 256
	maxInt    = 1<<31 - 1
)

// A readablePacket is what the signature of a packet covers, and what the key has to agree with.
type readablePacket struct {
	signed                          []byte // the canonical form of TrustHandoff 0.4.0
	algorithm, publicKey, signature string
}

// A shape reads one value and appends its canonical form.
type shape func(s *pyjson.Scanner, dst []byte) ([]byte, error)

// A member of an object of the format. One that is absent has the canonical form absent; "" means that it must be there.
type member struct {
	name   string
	read   shape
	absent string
	null   bool // null stands for itself
}

const null = "null"

// The objects of the format, their members in the order of their names, which is that of the canonical form.
var (
	permissionsMembers = []member{{"allowed_actions", texts, "[]", false}, {"max_tool_calls", integer, null, true}}
	constraintsMembers = []member{
		{"data_boundary", anyText, null, true}, {"max_runtime_seconds", integer, null, true},
		{"requires_human_review", boolean, "false", true},
	}
	provenanceMembers = []member{{"delegation_depth", integer, null, true}, {"origin_workflow", anyText, null, true}}
	packetMembers     = []member{
		{"ai_provenance", free, null, true},
		{"capability_token", anyText, null, true},
		{"constraints", fixed(constraintsMembers), null, true},
		{"context", free, "{}", false},
		{"expires_at", moment, "", false},
		{"from_agent", name, "", false},
		{"goal", anyText, null, true},
		{"intent", anyText, "", false},
		{"issued_at", moment, "", false},
		{"memory_refs", texts, "[]", false},
		{"nonce", name, "", false},
		{"packet_id", name, "", false},
		{"permissions", fixed(permissionsMembers), "", false},
		{"provenance", fixed(provenanceMembers), null, true},
		{"public_key", anyText, "", false},
		{"risk_level", anyText, null, true},
		{"signature", anyText, "", false},
		{"signature_algo", name, "", false},
		{"task_id", name, "", false},
		{"task_type", anyText, null, true},
		{"to_agent", name, "", false},
		{"ttl_seconds", integer, null, true},
	}
)

func readPacket(text []byte) (p readablePacket, err error) {
	if len(text) > maxPacket {
		return p, fault.New(fault.TooLarge, "a packet has at most %d bytes", maxPacket)
	}
	var s pyjson.Scanner
	s.Reset(string(text), pyjson.Sorted)
	values, err := readMembers(&s, packetMembers)
	if err == nil {
		err = s.End()
	}
	if err != nil {
		return p, err
	}
	value := map[string]string{}
	for i, m := range packetMembers {
		value[m.name] = string(values[i])
	}
	// What TrustHandoff fills in before it builds the signed bytes.
	if value["ttl_seconds"] != null && value["risk_level"] == null {
		value["risk_level"] = `"read"`
	}
	lifetimes := map[string]string{`"write"`: "120", `"read"`: "900"}
	if ttl := lifetimes[value["risk_level"]]; ttl != "" && value["ttl_seconds"] == null {
		value["ttl_seconds"] = ttl
	}
	sep := byte('{')
	for _, m := range packetMembers {
		if m.name == "signature" {
			continue
		}
		p.signed = append(append(append(append(p.signed, sep, '"'), m.name...), `":`...), value[m.name]...)
		sep = ','
	}
	p.signed = append(p.signed, '}')
	p.algorithm = decoded(value["signature_algo"])
	p.publicKey = decoded(value["public_key"])
	p.signature = decoded(value["signature"])
	return p, nil
}

// decoded returns the string of a canonical form.
func decoded(canonical string) string {
	var s pyjson.Scanner
	s.Reset(canonical, pyjson.Sorted)
	v, _ := s.Text()
	return v
}

// readMembers reads an object and returns the canonical forms of its members, in their order.
func readMembers(s *pyjson.Scanner, members []member) ([][]byte, error) {
	values := make([][]byte, len(members))
	if err := s.Open('{'); err != nil {
		return nil, err
	}
	for first := true; ; first = false {
		more, err := s.Next(first, '}')
		if err != nil {
			return nil, err
		}
		if !more {
			break
		}
		key, err := s.Key()
		if err != nil {
			return nil, err
		}
		i := place(members, key)
		if i < 0 {
			return nil, pyjson.At(fault.BadField("", "the format has no such field"), key)
		}
		if values[i] != nil {
			return nil, fault.BadField(key, "the field occurs twice")
		}
		if values[i], err = members[i].value(s); err != nil {
			return nil, pyjson.At(err, key)
		}
	}
	for i, m := range members {
		if values[i] != nil {
			continue
		}
		if m.absent == "" {
			return nil, fault.BadField(m.name, "the field is missing")
		}
		values[i] = []byte(m.absent)
	}
	return values, nil
}

func place(members []member, name string) int {
	for i := range members {
		if members[i].name == name {
			return i
		}
	}
	return -1
}

func (m *member) value(s *pyjson.Scanner) ([]byte, error) {
	if m.null {
		if is, err := s.Null(); is || err != nil {
			return []byte(null), err
		}
	}
	return m.read(s, nil)
}

// fixed is the shape of an object with these members.
func fixed(members []member) shape {
	return func(s *pyjson.Scanner, dst []byte) ([]byte, error) {
		values, err := readMembers(s, members)
		if err != nil {
			return dst, err
		}
		sep := byte('{')
		for i, m := range members {
			dst = append(append(append(append(dst, sep, '"'), m.name...), `":`...), values[i]...)
			sep = ','
		}
		return append(dst, '}'), nil
	}
}

func free(s *pyjson.Scanner, dst []byte) ([]byte, error) { return s.Object(dst) }

func anyText(s *pyjson.Scanner, dst []byte) ([]byte, error) {
	dst, _, err := s.AppendText(dst)
	return dst, err
}

// name is the shape of a string that names something.
func name(s *pyjson.Scanner, dst []byte) ([]byte, error) {
	dst, v, err := s.AppendText(dst)
	if err == nil && (v == "" || len(v) > maxName) {
		err = fault.BadField("", "not a string of 1 to %d bytes", maxName)
	}
	return dst, err
}

func integer(s *pyjson.Scanner, dst []byte) ([]byte, error) {
	n, err := s.Int(maxInt)
	return strconv.AppendInt(dst, n, 10), err
}

func boolean(s *pyjson.Scanner, dst []byte) ([]byte, error) {
	v, err := s.Bool()
	return strconv.AppendBool(dst, v), err
}

func texts(s *pyjson.Scanner, dst []byte) ([]byte, error) {
	if err := s.Open('['); err != nil {
		return dst, err
	}
	dst = append(dst, '[')
	for n := 0; ; n++ {
		more, err := s.Next(n == 0, ']')
		if err != nil {
			return dst, err
		}
		if !more {
			return append(dst, ']'), nil
		}
		if n > 0 {
			dst = append(dst, ',')
		}
		if dst, err = anyText(s, dst); err != nil {
			return dst, pyjson.At(err, strconv.Itoa(n))
		}
	}
}

var momentForm = regexp.MustCompile(
	`^([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,6}))?(Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])$`)

// moment is the shape of a time with an offset: the canonical form keeps the offset, writes a zero offset as Z, and six
// digits of a fraction or none.
func moment(s *pyjson.Scanner, dst []byte) ([]byte, error) {
	v, err := s.Text()
	if err != nil {
		return dst, err
	}
	part := momentForm.FindStringSubmatch(v)
	if part == nil || part[1] < "0001" {
		return dst, fault.BadField("", "not a time like 2026-03-08T12:00:00.000000Z or with an offset like +02:00")
	}
	if _, err := time.Parse("2006-01-02T15:04:05", part[1]); err != nil {
		return dst, fault.BadField("", "not a time that there is")
	}
	dst = append(append(dst, '"'), part[1]...)
	if micros := part[2] + strings.Repeat("0", 6-len(part[2])); micros != "000000" {
		dst = append(append(dst, '.'), micros...)
	}
	zone := part[3]
	if zone == "+00:00" || zone == "-00:00" {
		zone = "Z"
	}
	return append(append(dst, zone...), '"'), nil
}
