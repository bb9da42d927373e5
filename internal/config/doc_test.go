package config_test

import (
	"bytes"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/trustd/trustd/internal/config"
	"github.com/trustd/trustd/internal/secret"
)

var update = flag.Bool("update", false, "write docs/config.md anew")

const docPath = "../../docs/config.md"

// TestDocumentation makes docs/config.md out of the comments of Config and the values of Default.
func TestDocumentation(t *testing.T) {
	want := document(t)
	if *update {
		if err := os.WriteFile(docPath, want, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	got, err := os.ReadFile(docPath)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s is stale; run go test ./internal/config -update", filepath.Clean(docPath))
	}
}

const preamble = `# Configuration

<!-- Generated from internal/config/config.go by go test ./internal/config -update. -->

trustd reads one TOML file: the one named by ` + "`--config`" + `, else by the environment variable ` + "`TRUSTD_CONFIG`" + `, else
` + "`" + config.DefaultPath + "`" + `. Flags stand above the environment, the environment above the file, the file above the defaults
below. ` + "`" + config.StateDirVariable + "` and `" + config.RunDirVariable + "`" + ` stand above state_dir and run_dir.

Every key must be known, in its exact case; the first one that is not is named with its line and column. The file must belong
to root or the daemon's user, and only its owner may write it. ` + "`trustd config check`" + ` checks a file, ` + "`trustd config print`" + `
shows what is in force. Durations are text such as "30s" or "1m30s".
`

const secretPreamble = `
## Secrets

A PIN or a passphrase is never written into the file. A key that needs one says where it is, by exactly one of:

| key | type | meaning |
|---|---|---|
`

const example = "\n## Example\n\n```toml\n" + `[[backend]]
name = "hsm"
kind = "pkcs11"
default = true
module = "/usr/lib/softhsm/libsofthsm2.so"
token = "agents"
pin = { credential = "hsm-pin" }
env = { SOFTHSM2_CONF = "/etc/trustd/softhsm2.conf" }

[[backend]]
name = "tpm"
kind = "tpm"
device = "device:/dev/tpmrm0"
` + "```\n"

func document(t *testing.T) []byte {
	t.Helper()
	if _, err := config.Parse([]byte(strings.Trim(example[strings.Index(example, "[["):], "`\n")), "example"); err != nil {
		t.Fatalf("the example of the documentation: %v", err)
	}
	comments := commentsOf(t, "config.go")
	var b bytes.Buffer
	b.WriteString(preamble)
	def := reflect.ValueOf(*config.Default())
	b.WriteString("\n## Top level\n\n")
	table(t, &b, def, comments)
	for i := range def.NumField() {
		f := def.Type().Field(i)
		name := key(f)
		switch {
		case f.Type.Kind() == reflect.Struct && f.Type != reflect.TypeFor[config.Duration]():
			fmt.Fprintf(&b, "\n## [%s]\n\n%s\n\n", name, about(t, comments, f.Type.Name()))
			table(t, &b, def.Field(i), comments)
		case f.Type.Kind() == reflect.Slice:
			fmt.Fprintf(&b, "\n## [[%s]]\n\n%s\n\n", name, about(t, comments, f.Type.Elem().Name()))
			table(t, &b, reflect.New(f.Type.Elem()).Elem(), comments)
		}
	}
	b.WriteString(secretPreamble)
	rows(t, &b, reflect.TypeFor[secret.Source](), commentsOf(t, "../secret/secret.go"), func(i int, typ, doc string) string {
		return fmt.Sprintf("| `%s` | %s | %s |\n", key(reflect.TypeFor[secret.Source]().Field(i)), typ, doc)
	})
	b.WriteString(example)
	return b.Bytes()
}

// about returns the comment of a type, which begins with its name.
func about(t *testing.T, comments map[string]string, name string) string {
	t.Helper()
	if !strings.HasPrefix(comments[name], name+" ") {
		t.Errorf("the comment of %s does not begin with its name", name)
	}
	return comments[name]
}

func table(t *testing.T, b *bytes.Buffer, v reflect.Value, comments map[string]string) {
	t.Helper()
	b.WriteString("| key | type | default | meaning |\n|---|---|---|---|\n")
	rows(t, b, v.Type(), comments, func(i int, typ, doc string) string {
		return fmt.Sprintf("| `%s` | %s | %s | %s |\n", key(v.Type().Field(i)), typ, value(v.Field(i)), doc)
	})
}

// rows writes a row for each field that is a key and no table of its own.
func rows(t *testing.T, b *bytes.Buffer, typ reflect.Type, comments map[string]string, row func(i int, typ, doc string) string) {
	t.Helper()
	for i := range typ.NumField() {
		f := typ.Field(i)
		name := typeName(f.Type)
		if name == "" {
			continue
		}
		doc := comments[typ.Name()+"."+f.Name]
		if doc == "" {
			t.Errorf("%s.%s has no comment", typ.Name(), f.Name)
		}
		if rest, ok := strings.CutPrefix(doc, f.Name+" is "); ok {
			doc = strings.ToUpper(rest[:1]) + rest[1:]
		}
		b.WriteString(row(i, name, strings.ReplaceAll(doc, "|", "\\|")))
	}
}

func key(f reflect.StructField) string {
	name, _, _ := strings.Cut(f.Tag.Get("toml"), ",")
	return name
}

// typeName returns what a value is called in the documentation; "" for what has a table of its own.
func typeName(t reflect.Type) string {
	switch {
	case t == reflect.TypeFor[config.Duration]():
		return "duration"
	case t == reflect.TypeFor[secret.Source]():
		return "secret"
	case t.Kind() == reflect.Map:
		return "table of text"
	case t.Kind() == reflect.Bool:
		return "true or false"
	case t.Kind() == reflect.Int || t.Kind() == reflect.Float64:
		return "number"
	case t.Kind() == reflect.String:
		return "text"
	}
	return ""
}

func value(v reflect.Value) string {
	if d, ok := v.Interface().(config.Duration); ok {
		text, _ := d.MarshalText()
		return "`\"" + string(text) + "\"`"
	}
	switch v.Kind() {
	case reflect.String:
		if v.String() == "" {
			return ""
		}
		return fmt.Sprintf("`%q`", v.String())
	case reflect.Bool, reflect.Int:
		return fmt.Sprintf("`%v`", v.Interface())
	case reflect.Float64:
		return fmt.Sprintf("`%g`", v.Float())
	}
	return ""
}

// commentsOf returns the comments of the types in a file by name, and of their fields by type and name.
func commentsOf(t *testing.T, path string) map[string]string {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, d := range file.Decls {
		g, ok := d.(*ast.GenDecl)
		if !ok || g.Tok != token.TYPE {
			continue
		}
		for _, spec := range g.Specs {
			s := spec.(*ast.TypeSpec)
			out[s.Name.Name] = line(g.Doc)
			st, ok := s.Type.(*ast.StructType)
			if !ok {
				continue
			}
			for _, f := range st.Fields.List {
				for _, n := range f.Names {
					out[s.Name.Name+"."+n.Name] = line(f.Doc)
				}
			}
		}
	}
	return out
}

func line(c *ast.CommentGroup) string { return strings.Join(strings.Fields(c.Text()), " ") }
