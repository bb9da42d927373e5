package config

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/trustd/trustd/fault"
)

// ownText returns the text of an error of our own UnmarshalText methods.
func ownText(err error) string {
	var e *fault.Error
	if errors.As(err, &e) {
		return e.Text
	}
	return "not valid TOML"
}

// lineOf finds the line at which decoding fails with an error that says no place, which is how the parser passes on
// errors about numbers: it is the last line of the shortest beginning of the file that fails so.
func lineOf(data []byte) string {
	end := 0
	for n := 1; n <= 2000; n++ {
		i := bytes.IndexByte(data[end:], '\n')
		if i < 0 {
			return fmt.Sprintf("%d:", n)
		}
		end += i + 1
		err := toml.Unmarshal(data[:end], Default())
		var placed *toml.DecodeError
		if err != nil && !errors.As(err, &placed) {
			return fmt.Sprintf("%d:", n)
		}
	}
	return ""
}

// describe returns the parser's message in our words and without anything of the line that it is about: a PIN that
// somebody wrote into the file must not reach a log.
func describe(data []byte, e *toml.DecodeError) string {
	if key := e.Key(); len(key) > 0 && slices.Contains([]string{"pin", "passphrase"}, key[len(key)-1]) {
		return noLiteral
	}
	text := strings.TrimPrefix(strings.TrimPrefix(e.Error(), "toml: "), "malformed: ")
	text = characters.ReplaceAllString(text, "")
	text = goTypes.ReplaceAllString(text, "a value of the type $1 does not fit this key")
	row, _ := e.Position()
	lines := bytes.Split(data, []byte("\n"))
	if row < 1 || row > len(lines) {
		return "not valid TOML"
	}
	_, value, ok := strings.Cut(string(lines[row-1]), "=")
	if !ok {
		value = string(lines[row-1])
	}
	for _, word := range words.FindAllString(value, -1) {
		if strings.Contains(text, word) {
			return "not a valid value"
		}
	}
	return text
}

const noLiteral = "a secret is not written here: say where it is, as " +
	`{file = "/path"}, {fd = 3}, {credential = "name"} or {env = "NAME"}`

var (
	characters = regexp.MustCompile(`( but got)? U\+[0-9A-F]+( '.*')?`)
	goTypes    = regexp.MustCompile(`^cannot decode TOML ([a-z ]+) into .*$`)
	words      = regexp.MustCompile(`[^\s"'{}\[\],=]{3,}`)
)

// unknownKey describes a key that Config does not have, with the nearest that stands in the same table.
func unknownKey(key toml.Key) string {
	text := "unknown key " + strings.Join(key, ".")
	if len(key) == 0 {
		return text
	}
	last, best := key[len(key)-1], ""
	distance := min(len(last)/2+1, 3)
	for _, known := range keysOf(reflect.TypeFor[Config](), key[:len(key)-1]) {
		if d := editDistance(last, known); d < distance {
			best, distance = known, d
		}
	}
	if best != "" {
		text += "; did you mean " + best + "?"
	}
	return text
}

// keysOf returns the keys of the table at path below a struct.
func keysOf(t reflect.Type, path []string) []string {
	var names []string
	for f := range t.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("toml"), ",")
		if name == "" {
			continue
		}
		names = append(names, name)
		ft := f.Type
		if ft.Kind() == reflect.Slice {
			ft = ft.Elem()
		}
		if len(path) > 0 && path[0] == name && ft.Kind() == reflect.Struct {
			return keysOf(ft, path[1:])
		}
	}
	if len(path) > 0 {
		return nil
	}
	return names
}

// checkCase refuses keys that differ from a known one in case, which the decoder takes for it, so that one key
// could stand twice with two values.
func checkCase(data []byte, name string) error {
	var all problems
	var doc map[string]any
	if err := toml.Unmarshal(data, &doc); err != nil {
		return &fault.Error{Code: fault.Malformed, Field: "config", Text: name + ": not valid TOML", Err: err}
	}
	var walk func(table map[string]any, path []string)
	walk = func(table map[string]any, path []string) {
		known := keysOf(reflect.TypeFor[Config](), path)
		for _, key := range slices.Sorted(maps.Keys(table)) {
			at := append(slices.Clone(path), key)
			if known != nil && !slices.Contains(known, key) {
				all.add(strings.Join(at, "."), "", "%s:%s %s", name, find(data, key), unknownKey(at))
				continue
			}
			switch v := table[key].(type) {
			case map[string]any:
				walk(v, at)
			case []any:
				for _, item := range v {
					if t, ok := item.(map[string]any); ok {
						walk(t, at)
					}
				}
			}
		}
	}
	walk(doc, nil)
	return all.err()
}

// find returns line and column at which a key first stands.
func find(data []byte, key string) string {
	pattern := regexp.MustCompile(`(?:^|[\n{,.\[])[ \t]*["']?(` + regexp.QuoteMeta(key) + `)["']?[ \t]*[.=\]]`)
	m := pattern.FindSubmatchIndex(data)
	if m == nil {
		return ""
	}
	before := data[:m[2]]
	return fmt.Sprintf("%d:%d:", bytes.Count(before, []byte("\n"))+1, len(before)-bytes.LastIndexByte(before, '\n'))
}

// editDistance is the number of characters to change, add or drop between two short words; 3 stands for more.
func editDistance(a, b string) int {
	if len(a) > 64 || len(a)-len(b) > 2 || len(b)-len(a) > 2 {
		return 3
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// problems collects what is wrong, so that an operator sees all of it at once.
type problems []error

// add notes a problem with a key.
func (p *problems) add(field, hint, format string, args ...any) {
	*p = append(*p, &fault.Error{Code: fault.Malformed, Field: field, Text: fmt.Sprintf(format, args...), Hint: hint})
}

// place notes a problem at a place in the file.
func (p *problems) place(name string, e *toml.DecodeError, text string) {
	row, column := e.Position()
	p.add(strings.Join(e.Key(), "."), "", "%s:%d:%d: %s", name, row, column, text)
}

// err returns nil, the one problem, or an error whose text names them all and which joins them.
func (p problems) err() error {
	switch len(p) {
	case 0:
		return nil
	case 1:
		return p[0]
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%d problems", len(p))
	for _, err := range p {
		e := fault.From(err)
		b.WriteString("\n  ")
		if e.Field != "" {
			b.WriteString(e.Field + ": ")
		}
		b.WriteString(e.Text)
		if e.Hint != "" {
			b.WriteString(" (" + strings.TrimSuffix(e.Hint, ".") + ")")
		}
	}
	return &fault.Error{Code: fault.Malformed, Field: "config", Text: b.String(), Hint: "Correct the keys that are named.",
		Err: errors.Join(p...)}
}
