package server_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/api/server"
	"github.com/trustd/trustd/fault"
)

type document struct {
	Paths      map[string]map[string]operation `json:"paths"`
	Components struct {
		Schemas map[string]map[string]any `json:"schemas"`
	} `json:"components"`
}

type operation struct {
	OperationID string   `json:"operationId"`
	Tags        []string `json:"tags"`
	RequestBody *struct{ Content map[string]media }
	Responses   map[string]struct{ Content map[string]media }
}

type media struct{ Schema map[string]any }

func openAPI(t *testing.T) document {
	t.Helper()
	var d document
	if err := json.Unmarshal(api.OpenAPI(), &d); err != nil {
		t.Fatal(err)
	}
	return d
}

// TestEachRouteIsDocumented, on the socket where it is, and nothing else is.
func TestEachRouteIsDocumented(t *testing.T) {
	doc := openAPI(t)
	ids := map[string]bool{}
	var described, served []string
	for path, ops := range doc.Paths {
		for method, op := range ops {
			admin := "agent.sock"
			if slices.Equal(op.Tags, []string{"admin.sock"}) {
				admin = "admin.sock"
			}
			described = append(described, strings.ToUpper(method)+" "+path+" "+admin)
			if op.OperationID == "" || ids[op.OperationID] {
				t.Errorf("%s %s: the operation id %q is empty or not its own", method, path, op.OperationID)
			}
			ids[op.OperationID] = true
			if _, ok := op.Responses["default"]; !ok {
				t.Errorf("%s %s says nothing of errors", method, path)
			}
		}
	}
	for _, r := range server.Routes() {
		admin := "agent.sock"
		if r.Admin {
			admin = "admin.sock"
		}
		served = append(served, r.Method+" "+r.Path+" "+admin)
	}
	slices.Sort(described)
	slices.Sort(served)
	if !slices.Equal(described, served) {
		t.Errorf("described:\n%s\nserved:\n%s", strings.Join(described, "\n"), strings.Join(served, "\n"))
	}
}

// conforms checks v against a schema: the part of JSON Schema that our document uses.
func (d document) conforms(t *testing.T, at string, s map[string]any, v any) {
	t.Helper()
	if ref, ok := s["$ref"].(string); ok {
		d.conforms(t, at, d.Components.Schemas[strings.TrimPrefix(ref, "#/components/schemas/")], v)
		return
	}
	if enum, ok := s["enum"].([]any); ok && !slices.Contains(enum, v) {
		t.Errorf("%s: %v is not in %v", at, v, enum)
	}
	ok := true
	switch s["type"] {
	case "string":
		_, ok = v.(string)
	case "boolean":
		_, ok = v.(bool)
	case "integer":
		var f float64
		f, ok = v.(float64)
		ok = ok && f == float64(int64(f))
	case "array":
		var list []any
		list, ok = v.([]any)
		for _, e := range list {
			d.conforms(t, at+"[]", s["items"].(map[string]any), e)
		}
	case "object":
		var m map[string]any
		m, ok = v.(map[string]any)
		d.membersConform(t, at, s, m)
	}
	if !ok {
		t.Errorf("%s: %v is no %s", at, v, s["type"])
	}
}

func (d document) membersConform(t *testing.T, at string, s, m map[string]any) {
	t.Helper()
	props, _ := s["properties"].(map[string]any)
	required, _ := s["required"].([]any)
	for _, r := range required {
		if _, ok := m[r.(string)]; !ok {
			t.Errorf("%s: %s is missing", at, r)
		}
	}
	for name, e := range m {
		p, known := props[name].(map[string]any)
		if known {
			d.conforms(t, at+"."+name, p, e)
		} else if more, ok := s["additionalProperties"].(map[string]any); ok {
			d.conforms(t, at+"."+name, more, e)
		} else if props != nil {
			t.Errorf("%s: %s is not described", at, name)
		}
	}
}

// happy returns for each route a path and a body that it answers with 200.
func happy(s *socket) map[string][2]string {
	s.t.Helper()
	ctx := s.t.Context()
	signed, err := s.mem.SignPacket(ctx, api.SignPacketRequest{Agent: "planner", Packet: []byte(task)})
	if err != nil {
		s.t.Fatal(err)
	}
	msg, err := s.mem.SignMessage(ctx, api.SignMessageRequest{Agent: "planner", Payload: []byte(`{"a":[1]}`)})
	if err != nil {
		s.t.Fatal(err)
	}
	id, err := s.mem.Identity(ctx, "planner")
	if err != nil {
		s.t.Fatal(err)
	}
	verify := `{"packet":` + string(signed.Packet) + `,"audience":"researcher","detail":true}`
	public := `{"agent_id":"elsewhere","public_key":"` + otherKey + `","fingerprint":"` + otherFingerprint + `"}`
	once := `{"once":true,"message":` + string(msg.Message) + `}`
	batch := `{"requests":[` + signBody(task) + `,` + signBody("{}") + `]}`
	message := `{"agent":"planner","payload":[1],"audience":["x"],"ttl_seconds":60}`
	return map[string][2]string{
		"POST /v1/packets/sign":                 {"/v1/packets/sign", signBody(task)},
		"POST /v1/packets/sign-batch":           {"/v1/packets/sign-batch", batch},
		"POST /v1/packets/sign-stream":          {"/v1/packets/sign-stream", signBody(task)},
		"POST /v1/packets/verify":               {"/v1/packets/verify", verify},
		"POST /v1/packets/verify-batch":         {"/v1/packets/verify-batch", `{"requests":[` + verify + `]}`},
		"POST /v1/packets/verify-stream":        {"/v1/packets/verify-stream", verify},
		"POST /v1/messages/sign":                {"/v1/messages/sign", message},
		"POST /v1/messages/verify":              {"/v1/messages/verify", once},
		"POST /v1/messages/verify-chain":        {"/v1/messages/verify-chain", `{"messages":[` + string(msg.Message) + `]}`},
		"GET /v1/whoami":                        {"/v1/whoami?explain=1", ""},
		"GET /v1/capabilities":                  {"/v1/capabilities", ""},
		"GET /v1/identities/{name}":             {"/v1/identities/agent:planner:1", ""},
		"GET /v1/identities/{name}/history":     {"/v1/identities/" + id.Fingerprint + "/history", ""},
		"GET /livez":                            {"/livez", ""},
		"GET /readyz":                           {"/readyz?verbose", ""},
		"GET /healthz":                          {"/healthz", ""},
		"GET /metrics":                          {"/metrics", ""},
		"GET /openapi.json":                     {"/openapi.json", ""},
		"POST /v1/agents":                       {"/v1/agents", addBody},
		"GET /v1/agents":                        {"/v1/agents", ""},
		"POST /v1/agents/import":                {"/v1/agents/import", `{"public":` + public + `,"metadata":{"a":"b"}}`},
		"GET /v1/agents/{name}":                 {"/v1/agents/planner", ""},
		"DELETE /v1/agents/{name}":              {"/v1/agents/planner", `{"reason":"over"}`},
		"POST /v1/agents/{name}/revoke":         {"/v1/agents/planner/revoke", `{"code":"superseded"}`},
		"POST /v1/agents/{name}/export-private": {"/v1/agents/planner/export-private", `{"passphrase":"sesame"}`},
		"GET /v1/keys":                          {"/v1/keys", ""},
		"POST /v1/agents/{name}/set":            {"/v1/agents/planner/set", `{"batching":"always"}`},
		"POST /v1/agents/{name}/recheck":        {"/v1/agents/planner/recheck", ""},
		"GET /v1/backends":                      {"/v1/backends", ""},
		"GET /v1/backends/{name}":               {"/v1/backends/memory", ""},
		"POST /v1/backends/{name}/unlock":       {"/v1/backends/memory/unlock", ""},
		"POST /v1/backends/{name}/reset-canary": {"/v1/backends/memory/reset-canary", ""},
	}
}

const addBody = `{"agent_id":"writer","aliases":["agent:writer"],"metadata":{"team":"x"},` +
	`"expires_at":"2099-01-01T00:00:00Z","bindings":[{"selector":{"uid":1000,"exe":"/usr/bin/true"},"verbs":["sign"]}]}`

// The public key of RFC 8032's first test vector.
const (
	otherKey         = "MCowBQYDK2VwAyEA11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="
	otherFingerprint = "sha256:06e3fd8fda29bb60ab59557de61edb0aecdb231134be30e75b455f8e1b792fa9"
)

// TestEachRouteAnswers with what the document says.
func TestEachRouteAnswers(t *testing.T) {
	doc := openAPI(t)
	tried := map[string]bool{}
	for _, r := range server.Routes() {
		name := r.Method + " " + r.Path
		tried[name] = true
		t.Run(name, func(t *testing.T) {
			s := newSocket(t, nil)
			try, ok := happy(s)[name]
			if !ok {
				t.Fatal("there is no request for this route")
			}
			got := s.do(r.Method, try[0], try[1])
			if got.status != http.StatusOK || got.header.Get("X-Request-Id") == "" {
				t.Fatalf("status %d, request %q: %s", got.status, got.header.Get("X-Request-Id"), got.body)
			}
			if got.header.Get("Server") != "trustd/1.2.3" {
				t.Errorf("Server is %q", got.header.Get("Server"))
			}
			kind, _, _ := strings.Cut(got.header.Get("Content-Type"), ";")
			said, ok := doc.Paths[r.Path][strings.ToLower(r.Method)].Responses["200"].Content[kind]
			if !ok {
				t.Fatalf("the document does not say %q", kind)
			}
			if kind == "text/plain" {
				return
			}
			var v any
			if err := json.Unmarshal(got.body, &v); err != nil {
				t.Fatalf("%v: %s", err, got.body)
			}
			doc.conforms(t, "reply", said.Schema, v)
			if strings.Contains(string(got.body), "null") && !strings.Contains(r.Path, "packets") && r.Path != "/openapi.json" {
				t.Errorf("there is a null in %s", got.body)
			}
		})
	}
	for name := range happy(newSocket(t, nil)) {
		if !tried[name] {
			t.Errorf("%s is no route", name)
		}
	}
}

// TestBadBodies sends each route that takes one all that a body must not be.
func TestBadBodies(t *testing.T) {
	optional := "DELETE /v1/agents/{name}"
	for name := range happy(newSocket(t, nil)) {
		s := newSocket(t, nil)
		try := happy(s)[name]
		method, path, _ := strings.Cut(name, " ")
		if try[1] == "" || strings.HasSuffix(path, "-stream") {
			continue
		}
		first := strings.SplitN(try[1], `"`, 3)[1]
		limit := api.MaxBody
		if strings.HasSuffix(path, "-batch") || strings.HasSuffix(path, "-chain") {
			limit = api.MaxBatchBody
		}
		t.Run(name, func(t *testing.T) {
			for what, c := range map[string]struct {
				body  string
				code  fault.Code
				field string
			}{
				"trailing":  {try[1] + "{}", fault.Malformed, ""},
				"cut short": {try[1][:len(try[1])-1], fault.Malformed, ""},
				"array":     {"[" + try[1] + "]", fault.Malformed, ""},
				"null":      {"null", fault.Malformed, ""},
				"comment":   {"/**/" + try[1], fault.Malformed, ""},
				"mark":      {"\ufeff" + try[1], fault.Malformed, ""},
				"not UTF-8": {strings.Replace(try[1], `"`, "\"\xff", 1), fault.Malformed, ""},
				"unknown":   {strings.Replace(try[1], `{`, `{"zz-9":1,`, 1), fault.Malformed, "zz-9"},
				"case":      {strings.Replace(try[1], first, strings.ToUpper(first), 1), fault.Malformed, strings.ToUpper(first)},
				"twice":     {try[1][:len(try[1])-1] + `,"` + first + `":0}`, fault.Malformed, first},
				"escaped twice": {
					try[1][:len(try[1])-1] + `,"\u00` + hex(first[0]) + first[1:] + `":0}`, fault.Malformed, first,
				},
				"one over the limit": {try[1] + strings.Repeat(" ", limit+1-len(try[1])), fault.TooLarge, ""},
			} {
				got := s.do(method, try[0], c.body)
				if p := got.problem(t); p.Code != c.code || p.Field != c.field {
					t.Errorf("%s: %s (%s): %s", what, p.Code, p.Field, p.Detail)
				}
				if strings.Contains(string(got.body), "\xff") {
					t.Errorf("%s: the value is in %s", what, got.body)
				}
			}
			if name != optional {
				s.do(method, try[0], "").wants(t, fault.Malformed, "")
			}
			for _, kind := range []string{"text/plain", "application/x-www-form-urlencoded"} {
				s.do(method, try[0], try[1], "Content-Type", kind).wants(t, fault.Malformed, "Content-Type")
			}
			s.do(method, try[0]+"?x=1", try[1]).wants(t, fault.Malformed, "query.x")
			full := try[1] + strings.Repeat(" ", limit-len(try[1]))
			got := s.do(method, try[0], full, "Content-Type", "application/json; charset=utf-8")
			if got.status != http.StatusOK {
				t.Errorf("at the limit: %s", got.body)
			}
		})
	}
}

func hex(c byte) string { return string("0123456789abcdef"[c>>4]) + string("0123456789abcdef"[c&15]) }

func TestFieldsAreNamed(t *testing.T) {
	s := newSocket(t, nil)
	for _, c := range []struct{ path, body, field string }{
		{"/v1/packets/sign", `{"agent":"planner"}`, "packet"},
		{"/v1/packets/sign", `{"packet":{},"agent":5}`, "agent"},
		{"/v1/packets/sign", `{"packet":{},"agent":null}`, "agent"},
		{"/v1/packets/sign", `{"packet":{},"agent":"\ud800"}`, "agent"},
		{"/v1/packets/sign", `{"packet":{},"agent":"` + "\x01" + `"}`, "agent"},
		{"/v1/packets/sign", `{"packet":{"a":01}}`, "packet"},
		{"/v1/packets/sign", `{"packet":{"a":1.}}`, "packet"},
		{"/v1/packets/sign", `{"packet":{"a":"\x"}}`, "packet"},
		{"/v1/packets/sign", `{"packet":{"a":tru}}`, "packet"},
		{"/v1/packets/sign", `{"packet":` + strings.Repeat("[", 300) + strings.Repeat("]", 300) + `}`, "packet"},
		{"/v1/packets/sign", `{"sec ret\n":1}`, "?"},
		{"/v1/packets/sign-batch", `{"requests":[` + signBody(task) + `,{"packet":{},"x":0}]}`, "requests.1.x"},
		{"/v1/packets/sign-batch", `{"requests":{}}`, "requests"},
		{"/v1/packets/verify", `{"packet":{},"detail":"yes"}`, "detail"},
		{"/v1/messages/sign", `{"payload":1,"ttl_seconds":1.5}`, "ttl_seconds"},
		{"/v1/messages/sign", `{"payload":1,"ttl_seconds":99999999999999999999}`, "ttl_seconds"},
		{"/v1/messages/sign", `{"payload":1,"audience":["a",2]}`, "audience.1"},
		{"/v1/messages/verify-chain", `{"messages":[{},[}]}`, "messages.1"},
		{"/v1/agents", `{"agent_id":"a","metadata":{"k":1}}`, "metadata.k"},
		{"/v1/agents", `{"agent_id":"a","metadata":{"k":"1","k":"2"}}`, "metadata.k"},
		{"/v1/agents", `{"agent_id":"a","expires_at":"2030-01-01"}`, "expires_at"},
		{"/v1/agents", `{"agent_id":"a","expires_at":"2030-01-01T00:00:00"}`, "expires_at"},
		{"/v1/agents", `{"agent_id":"a","expires_at":"2030-01-01T00:00:00+01:00"}`, "expires_at"},
		{"/v1/agents", `{"agent_id":"a","expires_at":"2030-01-01T00:00:00.0000001Z"}`, "expires_at"},
		{"/v1/agents", `{"agent_id":"a","bindings":[{"selector":{"uid":-1}}]}`, "bindings.0.selector.uid"},
		{"/v1/agents", `{"agent_id":"a","bindings":[{"selector":{"uid":4294967296}}]}`, "bindings.0.selector.uid"},
		{"/v1/agents", `{"agent_id":"a","bindings":[{"selector":{"uid":0,"uid":1}}]}`, "bindings.0.selector.uid"},
		{"/v1/agents", `{"agent_id":"a","bindings":[{}]}`, "bindings.0.selector"},
	} {
		got := s.do("POST", c.path, c.body)
		if p := got.problem(t); p.Code != fault.Malformed || p.Field != c.field {
			t.Errorf("%s %.60s: %s (%s): %s", c.path, c.body, p.Code, p.Field, p.Detail)
		}
	}
}

// TestPartsHaveLimits of their own inside a batch.
func TestPartsHaveLimits(t *testing.T) {
	s := newSocket(t, nil)
	long := `{"context":{"x":"` + strings.Repeat("x", api.MaxBody) + `"}}`
	s.do("POST", "/v1/packets/sign-batch", `{"requests":[`+signBody(task)+`,`+signBody(long)+`]}`).
		wants(t, fault.TooLarge, "requests.1.packet")
	many := strings.Repeat(`{"packet":{}},`, api.MaxBatch) + `{"packet":{}}`
	s.do("POST", "/v1/packets/verify-batch", `{"requests":[`+many+`]}`).wants(t, fault.TooLarge, "requests")
	var out api.VerifyPacketsReply
	s.do("POST", "/v1/packets/verify-batch", `{"requests":[`+strings.TrimPrefix(many, `{"packet":{}},`)+`]}`).into(t, &out)
	if len(out.Results) != api.MaxBatch {
		t.Errorf("%d results", len(out.Results))
	}
	s.do("POST", "/v1/packets/sign-batch", `{"requests":[]}`).into(t, &out)
	if out.Results == nil || len(out.Results) != 0 {
		t.Errorf("an empty batch gives %v", out.Results)
	}
}

func TestUnknownPathsAndMethods(t *testing.T) {
	s := newSocket(t, nil)
	for _, path := range []string{
		"/", "/v1", "/v1/", "/v1/whoami/", "//v1/whoami", "/v1//whoami", "/v1/../v1/whoami", "/v1/./whoami", "/v2/whoami",
		"/v1/identities/", "/v1/identities/a/b", "/v1/agents/a/b", "/debug/pprof/", "/v1/identities/%2e%2e/x",
	} {
		s.do("GET", path, "").wants(t, fault.NotFound, "")
	}
	for _, r := range server.Routes() {
		path := strings.ReplaceAll(r.Path, "{name}", "planner")
		got := s.do("PATCH", path, "")
		p := got.problem(t)
		allow := strings.Split(got.header.Get("Allow"), ", ")
		if got.status != http.StatusMethodNotAllowed || p.Code != fault.Unsupported || !slices.Contains(allow, r.Method) {
			t.Errorf("PATCH %s: %d, Allow %q: %s", path, got.status, allow, got.body)
		}
	}
	s.do("GET", "/v1/packets/sign", "").wants(t, fault.Unsupported, "")
	if got := s.do("GET", "/v1/agents/import", ""); got.status != http.StatusNotFound {
		t.Errorf("an agent may be called import: %s", got.body)
	}
	if got := s.do("HEAD", "/v1/whoami", ""); got.status != http.StatusOK || len(got.body) != 0 {
		t.Errorf("HEAD: %d %q", got.status, got.body)
	}
}

// TestAdminRoutesAreNotOnAgentSocket, and the answer says where they are.
func TestAdminRoutesAreNotOnAgentSocket(t *testing.T) {
	s := newSocket(t, func(c *server.Config) { c.Admin = nil })
	for _, r := range server.Routes() {
		if !r.Admin {
			continue
		}
		path := strings.ReplaceAll(r.Path, "{name}", "planner")
		got := s.do(r.Method, path, "")
		if p := got.problem(t); p.Code != fault.NotFound || !strings.Contains(p.Detail, "admin.sock") {
			t.Errorf("%s %s: %s", r.Method, path, got.body)
		}
	}
	if d, err := s.mem.ShowAgent(t.Context(), "planner"); err != nil || d.Status != "active" {
		t.Errorf("planner is %q, %v", d.Status, err)
	}
}

func TestNamesInPaths(t *testing.T) {
	s := newSocket(t, nil)
	alias := ""
	for i := 0; !strings.ContainsAny(alias, "/") || !strings.ContainsAny(alias, "+"); i++ {
		d, err := s.mem.AddAgent(t.Context(), api.AddAgentRequest{AgentID: fmt.Sprint("n", i)})
		if err != nil {
			t.Fatal(err)
		}
		alias = d.Aliases[0]
	}
	escaped := strings.NewReplacer(":", "%3A", "/", "%2F", "+", "%2B").Replace(alias)
	var id api.Identity
	s.do("GET", "/v1/identities/"+escaped, "").into(t, &id)
	if !slices.Contains(id.Aliases, alias) {
		t.Errorf("%s leads to %v", alias, id.Aliases)
	}
	s.do("GET", "/v1/identities/"+strings.Repeat("a", 257), "").wants(t, fault.Malformed, "name")
	s.do("GET", "/v1/identities/planner?full=1", "").wants(t, fault.Malformed, "query.full")
	s.do("GET", "/v1/identities/nobody", "").wants(t, fault.NotFound, "")
	s.do("GET", "/v1/whoami?explain=1&explain=1", "").wants(t, fault.Malformed, "query.explain")
	s.do("GET", "/v1/whoami?explain=maybe", "").wants(t, fault.Malformed, "query.explain")
	s.do("GET", "/v1/whoami?%zz", "").wants(t, fault.Malformed, "query")
	s.do("GET", "/v1/whoami", "{}").wants(t, fault.Malformed, "")
	for query, want := range map[string]bool{"": false, "?explain": true, "?explain=true": true, "?explain=0": false} {
		var w api.Whoami
		s.do("GET", "/v1/whoami"+query, "").into(t, &w)
		if got := len(w.Explanation) > 0; got != want {
			t.Errorf("whoami%s explains: %t", query, got)
		}
	}
}

// TestBatchResultsStandInOrder, each with its own error.
func TestBatchResultsStandInOrder(t *testing.T) {
	s := newSocket(t, nil)
	var out api.SignPacketsReply
	body := `{"requests":[` + numbered(0) + `,` + signBody("{}") + `,` + numbered(2) + `]}`
	s.do("POST", "/v1/packets/sign-batch", body).into(t, &out)
	if len(out.Results) != 3 || out.Results[1].Error == nil || out.Results[1].SignPacketReply != nil {
		t.Fatalf("the results are %+v", out.Results)
	}
	if got := taskID(t, out.Results[0].Packet) + taskID(t, out.Results[2].Packet); got != "t-0t-2" {
		t.Errorf("the results are of %s", got)
	}
}
