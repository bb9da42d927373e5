package wire

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/fault"
)

// DecodeRequest reads a request strictly: one JSON object in UTF-8, whose members are exactly those of T, each at
// most once and of its own type, with nothing after it. Members without omitempty are required. Raw members are
// cut out of b, not copied, and are valid JSON; what is inside is their own parser's to judge.
//
// Errors are *fault.Error with the path of the member and never its value.
func DecodeRequest[T any](b []byte) (T, error) {
	var v T
	err := decode(b, true, reflect.ValueOf(&v).Elem())
	return v, err
}

// DecodeReply reads a reply, which may be that of a newer daemon: members that T does not have are passed over, and
// those that are missing or null stay as they are. Raw members are cut out of b.
func DecodeReply(b []byte, out any) error {
	return decode(b, false, reflect.ValueOf(out).Elem())
}

// CheckRequest panics if T is no type of a request. It is for the start of a program.
func CheckRequest[T any]() { planFor(reflect.TypeFor[T]()) }

func decode(b []byte, strict bool, v reflect.Value) error {
	if !utf8.Valid(b) {
		return fault.BadField("", "not UTF-8")
	}
	s := scanner{data: b, strict: strict}
	if err := planFor(v.Type())(&s, v); err != nil {
		return err
	}
	s.space()
	if s.pos != len(s.data) {
		return fault.BadField("", "there is more after the JSON object")
	}
	return nil
}

// A reader reads one JSON value into a Go value of the type that it was made for.
type reader func(s *scanner, v reflect.Value) error

type member struct {
	name     string
	index    []int
	required bool
	read     reader
}

var plans sync.Map // reflect.Type -> reader

func planFor(t reflect.Type) reader {
	if r, ok := plans.Load(t); ok {
		return r.(reader)
	}
	r := newPlan(t)
	plans.Store(t, r)
	return r
}

var (
	rawType  = reflect.TypeFor[json.RawMessage]()
	timeType = reflect.TypeFor[time.Time]()
)

// newPlan panics on a type that neither requests nor replies have.
func newPlan(t reflect.Type) reader {
	switch {
	case t == rawType:
		return readRaw
	case t == timeType:
		return readTime
	}
	switch t.Kind() {
	case reflect.String:
		return readString
	case reflect.Bool:
		return readBool
	case reflect.Int, reflect.Int32, reflect.Int64:
		return readInt
	case reflect.Uint32, reflect.Uint64:
		return readUint
	case reflect.Pointer:
		return readPointer(planFor(t.Elem()))
	case reflect.Slice:
		return readSlice(planFor(t.Elem()))
	case reflect.Map:
		if t.Key().Kind() == reflect.String {
			return readMap(t, planFor(t.Elem()))
		}
	case reflect.Struct:
		return readStruct(membersOf(t))
	}
	panic(fmt.Sprintf("api/wire: no message holds a %s", t))
}

// membersOf lists the members of a struct, those of embedded structs among its own.
func membersOf(t reflect.Type) []member {
	var out []member
	for i := range t.NumField() {
		f := t.Field(i)
		if f.Anonymous {
			inner := f.Type
			if inner.Kind() == reflect.Pointer {
				inner = inner.Elem()
			}
			for _, m := range membersOf(inner) {
				m.index = append([]int{i}, m.index...)
				out = append(out, m)
			}
			continue
		}
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "" || name == "-" {
			panic(fmt.Sprintf("api/wire: %s.%s has no name", t, f.Name))
		}
		out = append(out, member{name, []int{i}, options != "omitempty", planFor(f.Type)})
	}
	if len(out) > 64 {
		panic(fmt.Sprintf("api/wire: %s has more members than readStruct can count", t))
	}
	return out
}

// place returns the field that a member is read into. It makes the embedded structs on the way.
func (m *member) place(v reflect.Value) reflect.Value {
	for _, i := range m.index[:len(m.index)-1] {
		if v = v.Field(i); v.Kind() == reflect.Pointer {
			if v.IsNil() {
				v.Set(reflect.New(v.Type().Elem()))
			}
			v = v.Elem()
		}
	}
	return v.Field(m.index[len(m.index)-1])
}

func readStruct(members []member) reader {
	return func(s *scanner, v reflect.Value) error {
		var seen uint64
		err := s.object(func(name []byte) error {
			for i := range members {
				m := &members[i]
				if m.name != string(name) {
					continue
				}
				if seen&(1<<i) != 0 {
					return fault.BadField(m.name, "the member stands here twice")
				}
				seen |= 1 << i
				if !s.strict && s.null() {
					return nil
				}
				return within(m.read(s, m.place(v)), m.name)
			}
			if !s.strict {
				return s.skip(1)
			}
			return fault.BadField(SafeName(string(name)), "there is no such member")
		})
		if err != nil || !s.strict {
			return err
		}
		for i := range members {
			if members[i].required && seen&(1<<i) == 0 {
				return fault.BadField(members[i].name, "the member is missing")
			}
		}
		return nil
	}
}

func readMap(t reflect.Type, read reader) reader {
	return func(s *scanner, v reflect.Value) error {
		m := reflect.MakeMap(t)
		err := s.object(func(name []byte) error {
			k := reflect.ValueOf(string(name)).Convert(t.Key())
			if m.MapIndex(k).IsValid() {
				return fault.BadField(SafeName(string(name)), "the member stands here twice")
			}
			if s.strict && m.Len() == api.MaxBatch {
				return fault.New(fault.TooLarge, "at most %d members", api.MaxBatch)
			}
			e := reflect.New(t.Elem()).Elem()
			if err := read(s, e); err != nil {
				return within(err, SafeName(string(name)))
			}
			m.SetMapIndex(k, e)
			return nil
		})
		v.Set(m)
		return err
	}
}

func readSlice(read reader) reader {
	return func(s *scanner, v reflect.Value) error {
		v.Set(reflect.MakeSlice(v.Type(), 0, 4))
		return s.array(func(i int) error {
			if s.strict && i == api.MaxBatch {
				return fault.New(fault.TooLarge, "at most %d elements", api.MaxBatch)
			}
			v.Grow(1)
			v.SetLen(i + 1)
			v.Index(i).SetZero()
			return within(read(s, v.Index(i)), strconv.Itoa(i))
		})
	}
}

func readPointer(read reader) reader {
	return func(s *scanner, v reflect.Value) error {
		e := reflect.New(v.Type().Elem())
		v.Set(e)
		return read(s, e.Elem())
	}
}

func readRaw(s *scanner, v reflect.Value) error {
	s.space()
	start := s.pos
	if err := s.skip(0); err != nil {
		return err
	}
	raw := s.data[start:s.pos:s.pos]
	if s.strict && len(raw) > api.MaxBody {
		return fault.New(fault.TooLarge, "at most %d bytes", api.MaxBody)
	}
	v.SetBytes(raw)
	return nil
}

func readString(s *scanner, v reflect.Value) error {
	t, err := s.str()
	v.SetString(t)
	return err
}

func readBool(s *scanner, v reflect.Value) error {
	s.space()
	switch {
	case s.literal("true"):
		v.SetBool(true)
	case s.literal("false"):
		v.SetBool(false)
	default:
		return fault.BadField("", "not true or false")
	}
	return nil
}

func readInt(s *scanner, v reflect.Value) error {
	t, err := s.number()
	if err != nil {
		return err
	}
	n, err := strconv.ParseInt(string(t), 10, v.Type().Bits())
	if err != nil {
		return fault.BadField("", "not an integer, or out of range")
	}
	v.SetInt(n)
	return nil
}

func readUint(s *scanner, v reflect.Value) error {
	t, err := s.number()
	if err != nil {
		return err
	}
	n, err := strconv.ParseUint(string(t), 10, v.Type().Bits())
	if err != nil {
		return fault.BadField("", "not a whole number, or out of range")
	}
	v.SetUint(n)
	return nil
}

// readTime reads an RFC 3339 time in UTC with microseconds at most.
func readTime(s *scanner, v reflect.Value) error {
	text, err := s.str()
	if err != nil {
		return err
	}
	at, err := time.Parse(time.RFC3339Nano, text)
	if !s.strict && err == nil {
		v.Set(reflect.ValueOf(at))
		return nil
	}
	if err != nil || !strings.HasSuffix(text, "Z") || at.Nanosecond()%1000 != 0 || strings.Contains(text, ",") {
		return fault.BadField("", "not an RFC 3339 time in UTC (...Z) with microseconds at most")
	}
	v.Set(reflect.ValueOf(at))
	return nil
}

// within puts part before the path of the member at fault.
func within(err error, part string) error {
	if err == nil {
		return nil
	}
	e := *fault.From(err)
	if e.Field == "" {
		e.Field = part
	} else {
		e.Field = part + "." + e.Field
	}
	return &e
}

// SafeName returns a member's name as it may stand in an error: a name that is no plain word came from nobody who
// meant a member, and could be anything.
func SafeName(name string) string {
	if name == "" || len(name) > 64 {
		return "?"
	}
	for i := range len(name) {
		c := name[i]
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' || c == '-') {
			return "?"
		}
	}
	return name
}
