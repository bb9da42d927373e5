package api_test

import (
	"encoding/json"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/fault"
)

type schema struct {
	Ref                  string            `json:"$ref"`
	Type                 string            `json:"type"`
	Format               string            `json:"format"`
	Description          string            `json:"description"`
	Properties           map[string]schema `json:"properties"`
	Required             []string          `json:"required"`
	Items                *schema           `json:"items"`
	AdditionalProperties json.RawMessage   `json:"additionalProperties"`
	Enum                 []string          `json:"enum"`
	MaxItems             int               `json:"maxItems"`
}

func schemas(t *testing.T) map[string]schema {
	t.Helper()
	var doc struct {
		OpenAPI    string `json:"openapi"`
		Components struct {
			Schemas map[string]schema `json:"schemas"`
		} `json:"components"`
	}
	if err := json.Unmarshal(api.OpenAPI(), &doc); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(doc.OpenAPI, "3.1.") {
		t.Errorf("openapi is %q", doc.OpenAPI)
	}
	return doc.Components.Schemas
}

// messages are all types that cross a socket. Those that are requests are refused with unknown members.
var messages = []struct {
	value   any
	request bool
}{
	{api.SignPacketRequest{}, true}, {api.SignPacketReply{}, false}, {api.SignPacketResult{}, false},
	{api.SignPacketsRequest{}, true}, {api.SignPacketsReply{}, false},
	{api.VerifyPacketRequest{}, true}, {api.Decision{}, false}, {api.VerifyPacketResult{}, false},
	{api.VerifyPacketsRequest{}, true}, {api.VerifyPacketsReply{}, false}, {api.Details{}, false},
	{api.SignMessageRequest{}, true}, {api.SignMessageReply{}, false},
	{api.VerifyMessageRequest{}, true}, {api.MessageVerdict{}, false},
	{api.VerifyChainRequest{}, true}, {api.ChainVerdict{}, false},
	{api.Whoami{}, false}, {api.Grant{}, false}, {api.Capabilities{}, false}, {api.Identity{}, false},
	{api.History{}, false}, {api.Health{}, false}, {api.HealthCheck{}, false}, {api.RegistryHead{}, false},
	{api.Liveness{}, false}, {api.Readiness{}, false}, {api.Selector{}, true}, {api.Binding{}, true},
	{api.AddAgentRequest{}, true}, {api.AgentDetail{}, false}, {api.RemoveAgentRequest{}, true},
	{api.SetAgentRequest{}, true}, {api.SignatureCounts{}, false}, {api.Canary{}, false},
	{api.RevokeAgentRequest{}, true}, {api.ImportAgentRequest{}, true}, {api.ExportPrivateRequest{}, true},
	{api.ExportPrivateReply{}, false}, {api.Key{}, false}, {api.Backend{}, false}, {api.AgentList{}, false},
	{api.KeyList{}, false}, {api.BackendList{}, false}, {api.Problem{}, false},
}

// TestSchemasAreTheTypes holds each schema to its Go type: the same members, of the same types, required where the
// type has no omitempty.
func TestSchemasAreTheTypes(t *testing.T) {
	all := schemas(t)
	seen := map[string]bool{"Code": true}
	for _, m := range messages {
		typ := reflect.TypeOf(m.value)
		seen[typ.Name()] = true
		s, ok := all[typ.Name()]
		if !ok {
			t.Errorf("%s has no schema", typ.Name())
			continue
		}
		fields := map[string]reflect.Type{}
		var required []string
		members(typ, false, fields, &required)
		if got, want := sorted(maps.Keys(s.Properties)), sorted(maps.Keys(fields)); !slices.Equal(got, want) {
			t.Errorf("%s: the schema has the members\n%v, the type\n%v", typ.Name(), got, want)
		}
		if got, want := sorted(slices.Values(s.Required)), sorted(slices.Values(required)); !slices.Equal(got, want) {
			t.Errorf("%s: the schema requires\n%v, the type\n%v", typ.Name(), got, want)
		}
		for name, f := range fields {
			if p := s.Properties[name]; !fits(p, f) {
				t.Errorf("%s.%s is a %s, which the schema calls %+v", typ.Name(), name, f, p)
			}
		}
		if closed := string(s.AdditionalProperties) == "false"; closed != m.request {
			t.Errorf("%s: closed to other members: %t, a request: %t", typ.Name(), closed, m.request)
		}
		if s.Description == "" {
			t.Errorf("%s has no description", typ.Name())
		}
	}
	for name := range all {
		if !seen[name] {
			t.Errorf("the schema %s is of no type", name)
		}
	}
}

func sorted(names func(func(string) bool)) []string { return slices.Sorted(names) }

// members collects the JSON members of a struct. Those of an embedded pointer are there or not as a whole.
func members(t reflect.Type, optional bool, fields map[string]reflect.Type, required *[]string) {
	for i := range t.NumField() {
		f := t.Field(i)
		if f.Anonymous {
			if f.Type.Kind() == reflect.Pointer {
				members(f.Type.Elem(), true, fields, required)
			} else {
				members(f.Type, optional, fields, required)
			}
			continue
		}
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		fields[name] = f.Type
		if options != "omitempty" && !optional {
			*required = append(*required, name)
		}
	}
}

func fits(s schema, t reflect.Type) bool {
	switch t {
	case reflect.TypeFor[json.RawMessage]():
		return s.Type == "" && s.Ref == "" || s.Type == "object"
	case reflect.TypeFor[time.Time]():
		return s.Type == "string" && s.Format == "date-time"
	case reflect.TypeFor[fault.Code]():
		return s.Ref == "#/components/schemas/Code"
	}
	switch t.Kind() {
	case reflect.Pointer:
		return fits(s, t.Elem())
	case reflect.Struct:
		return s.Ref == "#/components/schemas/"+t.Name()
	case reflect.Slice:
		return s.Type == "array" && s.Items != nil && fits(*s.Items, t.Elem())
	case reflect.Map:
		var of schema
		return s.Type == "object" && json.Unmarshal(s.AdditionalProperties, &of) == nil && fits(of, t.Elem())
	case reflect.String:
		return s.Type == "string"
	case reflect.Bool:
		return s.Type == "boolean"
	}
	return s.Type == "integer"
}

func TestSchemaListsEachCode(t *testing.T) {
	var want []string
	for _, c := range fault.All() {
		want = append(want, string(c))
	}
	slices.Sort(want)
	if got := sorted(slices.Values(schemas(t)["Code"].Enum)); !slices.Equal(got, want) {
		t.Errorf("the schema has the codes\n%v, the package\n%v", got, want)
	}
}

func TestSchemaStatesTheLimits(t *testing.T) {
	for _, name := range []string{"SignPacketsRequest", "VerifyPacketsRequest"} {
		if got := schemas(t)[name].Properties["requests"].MaxItems; got != api.MaxBatch {
			t.Errorf("%s takes %d requests", name, got)
		}
	}
	if got := schemas(t)["VerifyChainRequest"].Properties["messages"].MaxItems; got != api.MaxBatch {
		t.Errorf("a chain takes %d messages", got)
	}
}

// TestReferencesLead somewhere.
func TestReferencesLead(t *testing.T) {
	var doc any
	if err := json.Unmarshal(api.OpenAPI(), &doc); err != nil {
		t.Fatal(err)
	}
	var walk func(v any)
	walk = func(v any) {
		switch v := v.(type) {
		case map[string]any:
			if ref, ok := v["$ref"].(string); ok && !leads(doc, ref) {
				t.Errorf("%s leads nowhere", ref)
			}
			for _, e := range v {
				walk(e)
			}
		case []any:
			for _, e := range v {
				walk(e)
			}
		}
	}
	walk(doc)
}

func leads(doc any, ref string) bool {
	path, ok := strings.CutPrefix(ref, "#/")
	for _, step := range strings.Split(path, "/") {
		m, isMap := doc.(map[string]any)
		if doc, ok = m[step]; !isMap || !ok {
			return false
		}
	}
	return ok
}
