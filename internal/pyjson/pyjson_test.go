package pyjson_test

import (
	"encoding/json"
	"math"
	"strconv"
	"strings"
	"testing"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/pyjson"
)

func read(src string, form pyjson.Form) (string, error) {
	var s pyjson.Scanner
	s.Reset(src, form)
	out, err := s.Value(nil)
	if err == nil {
		err = s.End()
	}
	return string(out), err
}

// TestFloats holds what Python's repr, pydantic 2.14 and pydantic 2.8 print.
func TestFloats(t *testing.T) {
	for _, c := range []struct {
		f                    float64
		sorted, declared, v2 string
	}{
		{0, "0.0", "0.0", "0.0"},
		{math.Copysign(0, -1), "-0.0", "-0.0", "-0.0"},
		{1, "1.0", "1.0", "1.0"},
		{-1.5, "-1.5", "-1.5", "-1.5"},
		{0.1, "0.1", "0.1", "0.1"},
		{123.456, "123.456", "123.456", "123.456"},
		{1e15, "1000000000000000.0", "1000000000000000.0", "1000000000000000.0"},
		{9007199254740993, "9007199254740992.0", "9007199254740992.0", "9007199254740992.0"},
		{1e16, "1e+16", "1e+16", "1e16"},
		{1.5e16, "1.5e+16", "1.5e+16", "1.5e16"},
		{123456789012345680, "1.2345678901234568e+17", "1.2345678901234568e+17", "1.2345678901234568e17"},
		{1e21, "1e+21", "1e+21", "1e21"},
		{1e22, "1e+22", "1e+22", "1e22"},
		{1e100, "1e+100", "1e+100", "1e100"},
		{math.MaxFloat64, "1.7976931348623157e+308", "1.7976931348623157e+308", "1.7976931348623157e308"},
		{1e-4, "0.0001", "0.0001", "0.0001"},
		{1.25e-4, "0.000125", "0.000125", "0.000125"},
		{1e-5, "1e-05", "0.00001", "0.00001"},
		{1.5e-5, "1.5e-05", "0.000015", "0.000015"},
		{1e-6, "1e-06", "1e-6", "1e-6"},
		{1.234e-6, "1.234e-06", "1.234e-6", "1.234e-6"},
		{1e-7, "1e-07", "1e-7", "1e-7"},
		{1e-10, "1e-10", "1e-10", "1e-10"},
		{5e-324, "5e-324", "5e-324", "5e-324"},
	} {
		for form, want := range []string{c.sorted, c.declared, c.v2} {
			got := string(pyjson.AppendFloat(nil, c.f, pyjson.Form(form)))
			if got != want {
				t.Errorf("%v in form %d is %s, not %s", c.f, form, got, want)
			}
		}
	}
}

func TestNumbers(t *testing.T) {
	for token, want := range map[string]string{
		"0": "0", "-0": "0", "7": "7", "-7": "-7", "100": "100", "0.0": "0.0", "-0.0": "-0.0", "0e0": "0.0",
		"-0E-0": "-0.0",
		"1e2":   "100.0", "1E+2": "100.0", "1.0": "1.0", "1.50": "1.5", "1e-400": "0.0", "1e16": "1e+16",
		"12345678901234567890123": "12345678901234567890123", "100000000000000000000.0": "1e+20",
		"0.1000000000000000055511151231257827": "0.1", "9007199254740993": "9007199254740993",
	} {
		if got, err := read(token, pyjson.Sorted); err != nil || got != want {
			t.Errorf("%s gives %s, %v; not %s", token, got, err, want)
		}
	}
	for _, token := range []string{
		"-", "+1", "01", "-01", "1.", ".1", "1.e1", "1e", "1e+", "--1", "1_000", "0x1", "1e400", "-1e400", "NaN",
		"Infinity",
		"-Infinity", "nan", "1 2", "١", strings.Repeat("1", pyjson.MaxDigits+1), "-" + strings.Repeat("1",
			pyjson.MaxDigits+1),
	} {
		if got, err := read(token, pyjson.Sorted); fault.CodeOf(err) != fault.Malformed {
			t.Errorf("%.20s gives %.20s, %v", token, got, err)
		}
	}
}

func TestStrings(t *testing.T) {
	for src, want := range map[string][2]string{ // Sorted, Declared
		`""`:                          {`""`, `""`},
		`"a b"`:                       {`"a b"`, `"a b"`},
		`"\u0041\/"`:                  {`"A/"`, `"A/"`},
		`"<&>'/"`:                     {`"<&>'/"`, `"<&>'/"`},
		`"\"\\\n\r\t\b\f"`:            {`"\"\\\n\r\t\b\f"`, `"\"\\\n\r\t\b\f"`},
		`"\u0000\u001F\u000b"`:        {`"\u0000\u001f\u000b"`, `"\u0000\u001f\u000b"`},
		"\"\x7f\u0080\u2028\"":        {`"\u007f\u0080\u2028"`, "\"\x7f\u0080\u2028\""},
		`"\u007f\u0080"`:              {`"\u007f\u0080"`, "\"\x7f\u0080\""},
		`"é\u00E9"`:                   {`"\u00e9\u00e9"`, `"éé"`},
		`"😀\ud83D\uDE00\udbff\udfff"`: {`"\ud83d\ude00\ud83d\ude00\udbff\udfff"`, "\"😀😀\U0010ffff\""},
		`"\ufffe\uffff\ufffd"`:        {`"\ufffe\uffff\ufffd"`, "\"\ufffe\uffff\ufffd\""},
		"\"\ufffd\"":                  {`"\ufffd"`, "\"\ufffd\""},
	} {
		for form, want := range want {
			if got, err := read(src, pyjson.Form(form)); err != nil || got != want {
				t.Errorf("%s in form %d gives %s, %v; not %s", src, form, got, err, want)
			}
		}
	}
	for _, src := range []string{
		`"`, `"a`, `"\`, `"\"`, `"\x"`, `"\u"`, `"\u00"`, `"\u00g0"`, `"\ud800"`, `"\ud800x"`, `"\ud800\n"`,
		`"\ud800\u0041"`,
		`"\ud800\ud800"`, `"\udc00"`, `"\udc00\ud800"`, "\"\n\"", "\"\x00\"", "\"\x1f\"", "\"\xff\"", "\"\xc3\"",
		"\"a\xc3(\"",
		"\"\xed\xa0\x80\"", "\"\xf4\x90\x80\x80\"", "\"\xc0\xaf\"", `'a'`, "\"\\n\xff\"",
	} {
		if got, err := read(src, pyjson.Sorted); fault.CodeOf(err) != fault.Malformed {
			t.Errorf("%q gives %q, %v", src, got, err)
		}
	}
}

func TestObjects(t *testing.T) {
	for src, want := range map[string][2]string{
		`{}`:                           {`{}`, `{}`},
		` { "a" : 1 , "b" : [ ] } `:    {`{"a":1,"b":[]}`, `{"a":1,"b":[]}`},
		`{"b":1,"a":2}`:                {`{"a":2,"b":1}`, `{"b":1,"a":2}`},
		`{"😀":1,"\uffee":2}`:           {`{"\uffee":2,"\ud83d\ude00":1}`, "{\"😀\":1,\"\uffee\":2}"},
		`{"b":{"z":1,"y":2},"B":1}`:    {`{"B":1,"b":{"y":2,"z":1}}`, `{"b":{"z":1,"y":2},"B":1}`},
		`{"aa":1,"a":2,"":3,"a\n":4}`:  {`{"":3,"a":2,"a\n":4,"aa":1}`, `{"aa":1,"a":2,"":3,"a\n":4}`},
		`[{"b":1,"a":{"d":[],"c":0}}]`: {`[{"a":{"c":0,"d":[]},"b":1}]`, `[{"b":1,"a":{"d":[],"c":0}}]`},
		`[1,"a",true,false,null,[[]]]`: {`[1,"a",true,false,null,[[]]]`, `[1,"a",true,false,null,[[]]]`},
	} {
		for form, want := range want {
			if got, err := read(src, pyjson.Form(form)); err != nil || got != want {
				t.Errorf("%s in form %d gives %s, %v; not %s", src, form, got, err, want)
			}
		}
	}
	for _, src := range []string{
		``, ` `, `{`, `{"a"`, `{"a":`, `{"a":1`, `{"a":1,`, `{"a":1,}`, `{,}`, `{a:1}`, `{1:1}`, `{"a" 1}`,
		`{"a":1 "b":2}`, `[`, `[1`, `[1,`,
		`[1,]`, `[,1]`, `[1 2]`, `[1}`, `{"a":1]`, `]`, `}`, `nul`, `nullx`, `tru`, `falsy`, `undefined`, `{}{}`,
		`[]]`, "\u00a0[]", "\ufeff[]",
		`{"a":1,"a":1}`, `{"b":1,"a":1,"b":1}`, `{"a":1,"\u0061":1}`, `[{"é":1,"\u00e9":1}]`,
	} {
		for _, form := range []pyjson.Form{pyjson.Sorted, pyjson.Declared} {
			if got, err := read(src, form); fault.CodeOf(err) != fault.Malformed {
				t.Errorf("%q gives %q, %v", src, got, err)
			}
		}
	}
}

// TestManyMembers makes an object whose members are many, out of order, and long.
func TestManyMembers(t *testing.T) {
	var src, want []string
	for i := 9999; i >= 0; i-- {
		src = append(src, `"`+strconv.Itoa(10000+i)+`": `+strconv.Itoa(i))
	}
	for i := range 10000 {
		want = append(want, `"`+strconv.Itoa(10000+i)+`":`+strconv.Itoa(i))
	}
	var s pyjson.Scanner
	for range 2 { // the second time with what the first left behind
		s.Reset("{"+strings.Join(src, ",")+"}", pyjson.Sorted)
		got, err := s.Value(nil)
		if err != nil || string(got) != "{"+strings.Join(want, ",")+"}" {
			t.Fatalf("%v, %d bytes", err, len(got))
		}
	}
}

func TestDepth(t *testing.T) {
	deep := func(n int) string { return strings.Repeat(`{"a":[`, n/2) + strings.Repeat("]}", n/2) }
	if _, err := read(deep(pyjson.MaxDepth), pyjson.Sorted); err != nil {
		t.Error(err)
	}
	for _, src := range []string{deep(pyjson.MaxDepth + 2), strings.Repeat("[", 1<<20), strings.Repeat(`{"a":`,
		1<<18)} {
		if _, err := read(src, pyjson.Sorted); fault.CodeOf(err) != fault.Malformed {
			t.Errorf("%d bytes: %v", len(src), err)
		}
	}
}

func TestField(t *testing.T) {
	for src, field := range map[string]string{
		`{"a":{"b":[0,NaN]}}`:                     "a.b.1",
		`{"a":{"b c":[0,NaN]}}`:                   "a.*.1",
		`{"a":{"":NaN}}`:                          "a.*",
		`{"a-b_C9":NaN}`:                          "a-b_C9",
		`{"` + strings.Repeat("k", 65) + `":NaN}`: "*",
		`NaN`:             "",
		`{"a":{},"a":{}}`: "a",
	} {
		_, err := read(src, pyjson.Sorted)
		if f := fault.From(err); f == nil || f.Field != field {
			t.Errorf("%s: %v", src, err)
		}
	}
	// A path does not grow with the depth of the input.
	name := strings.Repeat("k", 64)
	_, err := read(strings.Repeat(`{"`+name+`":`, 90)+"NaN", pyjson.Sorted)
	if f := fault.From(err); f == nil || len(f.Field) > 400 {
		t.Errorf("a path of %d bytes", len(f.Field))
	}
}

func TestInt(t *testing.T) {
	for src, want := range map[string]int64{"0": 0, "7": 7, " 100": 100} {
		var s pyjson.Scanner
		s.Reset(src, pyjson.Sorted)
		if got, err := s.Int(100); err != nil || got != want {
			t.Errorf("%s: %d, %v", src, got, err)
		}
	}
	for _, src := range []string{"", "101", "-1", "-0", "1.0", "1e0", `"1"`, "true", "null", "-", "01",
		strings.Repeat("9", 30)} {
		var s pyjson.Scanner
		s.Reset(src, pyjson.Sorted)
		if got, err := s.Int(100); fault.CodeOf(err) != fault.Malformed {
			t.Errorf("%s: %d, %v", src, got, err)
		}
	}
}

func TestLookup(t *testing.T) {
	const object = `{"a":{"b":1},"b":[2,{"c":3}],"\u00e9":"x"}`
	for key, want := range map[string]string{"a": `{"b":1}`, "b": `[2,{"c":3}]`, "é": `"x"`} {
		if got, ok := pyjson.Lookup(object, key); !ok || string(got) != want {
			t.Errorf("%s is %s, %v", key, got, ok)
		}
	}
	for _, c := range [][2]string{{object, "c"}, {object, ""}, {"{}", "a"}, {"[]", "a"}, {`{"b":nul`, "a"}, {`{"b"`,
		"a"}, {`{"b":1;`, "a"}} {
		if got, ok := pyjson.Lookup(c[0], c[1]); ok {
			t.Errorf("%s has %s: %s", c[0], c[1], got)
		}
	}
}

func FuzzPyJSON(f *testing.F) {
	for _, s := range []string{
		`{"b":1,"a":[1.0,-0,-0.0,1e16,1e-7,12345678901234567890]}`, `"\ud83d\ude00\u007f\n"`, "\"\x7f\u2028é\"",
		`[[[{}]]]`,
		`{"a":1,"a":2}`, `NaN`, `"\ud800"`, ` { "x" : null } `, `1E400`, "\"\xff\"", `{"😀":1,"\uffee":2}`,
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, src string) {
		sorted, err := read(src, pyjson.Sorted)
		for _, form := range []pyjson.Form{pyjson.Declared, pyjson.DeclaredOld} {
			declared, err2 := read(src, form)
			if (err == nil) != (err2 == nil) {
				t.Fatalf("one form reads, the other does not: %v, %v", err, err2)
			}
			if err != nil {
				continue
			}
			if again, err := read(declared, pyjson.Sorted); err != nil || again != sorted {
				t.Fatalf("%q reads back as %q, not %q: %v", declared, again, sorted, err)
			}
		}
		if err != nil {
			if c := fault.CodeOf(err); c != fault.Malformed {
				t.Fatalf("code %s", c)
			}
			return
		}
		if again, err := read(sorted, pyjson.Sorted); err != nil || again != sorted {
			t.Fatalf("%q reads back as %q: %v", sorted, again, err)
		}
		if !json.Valid([]byte(src)) || !json.Valid([]byte(sorted)) {
			t.Fatalf("%q gives %q, which the standard library does not read", src, sorted)
		}
		for i := range len(sorted) {
			if c := sorted[i]; c < 0x20 || c > 0x7e {
				t.Fatalf("%q is not printable ASCII", sorted)
			}
		}
	})
}

func BenchmarkValue(b *testing.B) {
	const src = `{"name":"planner","tags":["a","b"],"n":12345,"f":0.25,` +
		`"nested":{"z":true,"a":null,"text":"d\u00e9ploy"}}`
	var s pyjson.Scanner
	buf := make([]byte, 0, 256)
	b.SetBytes(int64(len(src)))
	b.ReportAllocs()
	for b.Loop() {
		s.Reset(src, pyjson.Sorted)
		var err error
		if buf, err = s.Value(buf[:0]); err != nil {
			b.Fatal(err)
		}
	}
}
