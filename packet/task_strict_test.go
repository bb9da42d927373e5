package packet_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/packet"
	"github.com/trustd/trustd/signature"
)

// A strictCase is one change to the wire text of TH-P1. Each line of docs/compat-trusthandoff.md names one.
type strictCase struct {
	old, new string // what is replaced, by what
	field    string // refused as malformed, naming this field; "" = accepted
	verifies bool   // an accepted text still has the signature of TH-P1
}

// signatureText is the signature of TH-P1.
const signatureText = `"FgC+EEXTmOQy14VObcw6YPC+6+/kQvzOp3Ms1fORbal9evpZWyo97WrWgrpmurI4pfddsAsU/Vp5Mf0lWk1IDw=="`

const (
	calls  = "permissions.max_tool_calls"
	review = "constraints.requires_human_review"
)

var strictCases = map[string]strictCase{
	"calls-text":        {`"max_tool_calls":5`, `"max_tool_calls":"5"`, calls, false},
	"calls-spaced-text": {`"max_tool_calls":5`, `"max_tool_calls":" 5 "`, calls, false},
	"calls-float":       {`"max_tool_calls":5`, `"max_tool_calls":5.0`, calls, false},
	"calls-exponent":    {`"max_tool_calls":5`, `"max_tool_calls":5e0`, calls, false},
	"calls-fraction":    {`"max_tool_calls":5`, `"max_tool_calls":5.5`, calls, false},
	"calls-true":        {`"max_tool_calls":5`, `"max_tool_calls":true`, calls, false},
	"calls-negative":    {`"max_tool_calls":5`, `"max_tool_calls":-1`, calls, false},
	"calls-minus-zero":  {`"max_tool_calls":5`, `"max_tool_calls":-0`, calls, false},
	"calls-huge":        {`"max_tool_calls":5`, `"max_tool_calls":1` + strings.Repeat("0", 30), calls, false},
	"calls-over":        {`"max_tool_calls":5`, `"max_tool_calls":2147483648`, calls, false},
	"calls-most":        {`"max_tool_calls":5`, `"max_tool_calls":2147483647`, "", false},
	"calls-zero":        {`"max_tool_calls":5`, `"max_tool_calls":0`, "", false},

	"unknown-field":     {`{"ai_prov`, `{"extra":1,"ai_prov`, "extra", false},
	"unknown-nested":    {`"max_tool_calls":5`, `"max_tool_calls":5,"extra":1`, "permissions.extra", false},
	"unknown-odd-name":  {`{"ai_prov`, `{"a b\n":1,"ai_prov`, "*", false},
	"unknown-case":      {`"nonce":`, `"Nonce":`, "Nonce", false},
	"nulls-left-out":    {`"ai_provenance":null,"capability_token":null,"constraints":null,`, ``, "", true},
	"defaults-left-out": {`"memory_refs":[],`, ``, "", true},
	"calls-left-out":    {`,"max_tool_calls":5`, ``, "", false},
	"actions-left-out":  {`"allowed_actions":["read","search"],`, ``, "", false},
	"permissions-absent": {`"permissions":{"allowed_actions":["read","search"],"max_tool_calls":5},`, ``,
		"permissions", false},
	"field-absent":     {`"nonce":"nonce-001",`, ``, "nonce", false},
	"signature-absent": {`,"signature":` + signatureText, ``, "signature", false},

	"date-offset-zero":   {`12:00:00Z"`, `12:00:00+00:00"`, "", true},
	"date-minus-zero":    {`12:00:00Z"`, `12:00:00-00:00"`, "", true},
	"date-other-offset":  {`12:00:00Z"`, `14:00:00+02:00"`, "", false},
	"date-micros":        {`12:00:00Z"`, `12:00:00.123456Z"`, "", false},
	"date-zero-micros":   {`12:00:00Z"`, `12:00:00.000Z"`, "", true},
	"date-no-colon":      {`12:00:00Z"`, `12:00:00+0000"`, "issued_at", false},
	"date-lower-t":       {`08T12:00:00Z"`, `08t12:00:00Z"`, "issued_at", false},
	"date-lower-z":       {`12:00:00Z"`, `12:00:00z"`, "issued_at", false},
	"date-space":         {`08T12:00:00Z"`, `08 12:00:00Z"`, "issued_at", false},
	"date-no-seconds":    {`12:00:00Z"`, `12:00Z"`, "issued_at", false},
	"date-epoch":         {`"2026-03-08T12:00:00Z"`, `1772971200`, "issued_at", false},
	"date-epoch-text":    {`"2026-03-08T12:00:00Z"`, `"1772971200"`, "issued_at", false},
	"date-epoch-float":   {`"2026-03-08T12:00:00Z"`, `1772971200.5`, "issued_at", false},
	"date-comma":         {`12:00:00Z"`, `12:00:00,5Z"`, "issued_at", false},
	"date-seven-digits":  {`12:00:00Z"`, `12:00:00.1234567Z"`, "issued_at", false},
	"date-no-digits":     {`12:00:00Z"`, `12:00:00.Z"`, "issued_at", false},
	"date-only":          {`2026-03-08T12:00:00Z"`, `2026-03-08"`, "issued_at", false},
	"date-leap-second":   {`12:00:00Z"`, `12:00:60Z"`, "issued_at", false},
	"date-hour-24":       {`T12:00:00Z"`, `T24:00:00Z"`, "issued_at", false},
	"date-trailing":      {`12:00:00Z"`, `12:00:00Z "`, "issued_at", false},
	"date-naive":         {`12:00:00Z"`, `12:00:00"`, "issued_at", false},
	"date-naive-micros":  {`12:00:00Z"`, `12:00:00.123456"`, "issued_at", false},
	"date-no-such-day":   {`2026-03-08T12:00`, `2026-02-29T12:00`, "issued_at", false},
	"date-wide-offset":   {`12:00:00Z"`, `12:00:00+24:00"`, "issued_at", false},
	"date-offset-second": {`12:00:00Z"`, `12:00:00+02:00:00"`, "issued_at", false},
	"date-year-zero":     {`"2026-03-08T12:00`, `"0000-03-08T12:00`, "issued_at", false},
	"date-signed-year":   {`"2026-03-08T12:00`, `"+026-03-08T12:00`, "issued_at", false},
	"expires-null":       {`"2026-03-08T12:10:00Z"`, `null`, "expires_at", false},
	"expires-absent":     {`"expires_at":"2026-03-08T12:10:00Z",`, ``, "expires_at", false},

	"text-number":       {`"pk-001"`, `1`, "packet_id", false},
	"text-null":         {`"pk-001"`, `null`, "packet_id", false},
	"context-null":      {`{"company":"Example Corp"}`, `null`, "context", false},
	"context-array":     {`{"company":"Example Corp"}`, `[]`, "context", false},
	"list-text":         {`["read","search"]`, `"read"`, "permissions.allowed_actions", false},
	"list-null":         {`["read","search"]`, `null`, "permissions.allowed_actions", false},
	"list-mixed":        {`["read","search"]`, `["read",1]`, "permissions.allowed_actions.1", false},
	"refs-null":         {`"memory_refs":[]`, `"memory_refs":null`, "memory_refs", false},
	"empty-packet-id":   {`"pk-001"`, `""`, "packet_id", false},
	"empty-nonce":       {`"nonce-001"`, `""`, "nonce", false},
	"long-nonce":        {`"nonce-001"`, `"` + strings.Repeat("n", 257) + `"`, "nonce", false},
	"longest-nonce":     {`"nonce-001"`, `"` + strings.Repeat("n", 256) + `"`, "", false},
	"empty-agent":       {`"agent:vwGcRV8F51znTKAq"`, `""`, "to_agent", false},
	"empty-intent":      {`"Research company background"`, `""`, "", false},
	"actions-reordered": {`["read","search"]`, `["search","read"]`, "", false},
	"actions-duplicate": {`["read","search"]`, `["read","read"]`, "", false},
	"review-text":       {`"constraints":null`, `"constraints":{"requires_human_review":"yes"}`, review, false},
	"review-number":     {`"constraints":null`, `"constraints":{"requires_human_review":1}`, review, false},
	"review-null":       {`"constraints":null`, `"constraints":{"requires_human_review":null}`, "", false},
	"constraints-empty": {`"constraints":null`, `"constraints":{}`, "", false},
	"constraints-list":  {`"constraints":null`, `"constraints":[]`, "constraints", false},
	"provenance-empty":  {`"provenance":null`, `"provenance":{}`, "", false},
	"provenance-float": {`"provenance":null,"pub`, `"provenance":{"delegation_depth":1.0},"pub`,
		"provenance.delegation_depth", false},
	"ttl-negative":       {`"ttl_seconds":null`, `"ttl_seconds":-1`, "ttl_seconds", false},
	"ttl-text":           {`"ttl_seconds":null`, `"ttl_seconds":"600"`, "ttl_seconds", false},
	"risk-number":        {`"risk_level":null`, `"risk_level":1`, "risk_level", false},
	"ai-text":            {`"ai_provenance":null`, `"ai_provenance":"llm"`, "ai_provenance", false},
	"key-crlf":           {`KEY-----\nMCow`, `KEY-----\r\nMCow`, "public_key", false},
	"key-no-newline":     {`-----END PUBLIC KEY-----\n`, `-----END PUBLIC KEY-----`, "public_key", false},
	"key-trailing-space": {`-----END PUBLIC KEY-----\n`, `-----END PUBLIC KEY-----\n `, "public_key", false},
	"key-private":        {`BEGIN PUBLIC`, `BEGIN PRIVATE`, "public_key", false},
	"algorithm-changed":  {`"Ed25519"`, `"ES256"`, "", false},

	"signature-junk":       {`"FgC+`, `"FgC!+`, "signature", false},
	"signature-newline":    {`"FgC+`, `"FgC\n+`, "signature", false},
	"signature-space":      {`"FgC+`, `"FgC +`, "signature", false},
	"signature-more-pad":   {`IDw=="`, `IDw==="`, "signature", false},
	"signature-after-pad":  {`IDw=="`, `IDw==AAAA"`, "signature", false},
	"signature-other-bits": {`IDw=="`, `IDx=="`, "signature", false},
	"signature-urlsafe":    {`"FgC+EEX`, `"FgC-EEX`, "signature", false},
	"signature-unpadded":   {`IDw=="`, `IDw"`, "signature", false},
	"signature-empty":      {signatureText, `""`, "signature", false},
	"signature-null":       {signatureText, `null`, "signature", false},

	"duplicate-field":   {`"goal":null`, `"goal":null,"goal":null`, "goal", false},
	"duplicate-escaped": {`"goal":null`, `"goal":null,"\u0067oal":null`, "goal", false},
	"duplicate-nested":  {`"max_tool_calls":5`, `"max_tool_calls":5,"max_tool_calls":5`, calls, false},
	"duplicate-context": {`{"company":"Example Corp"}`, `{"a":1,"b":2,"a":1}`, "context.a", false},
	"duplicate-deep":    {`"Example Corp"`, `[{"x":{"y":1,"y":2}}]`, "context.company.0.x.y", false},
	"duplicate-provenance": {`"ai_provenance":null`, `"ai_provenance":{"source":"a","source":"b"}`,
		"ai_provenance.source", false},
	"nan":                 {`"Example Corp"`, `NaN`, "context.company", false},
	"infinity":            {`"Example Corp"`, `Infinity`, "context.company", false},
	"minus-infinity":      {`"Example Corp"`, `-Infinity`, "context.company", false},
	"float-overflow":      {`"Example Corp"`, `1e400`, "context.company", false},
	"float-underflow":     {`"Example Corp"`, `1e-400`, "", false},
	"digits-most":         {`"Example Corp"`, strings.Repeat("9", 4300), "", false},
	"digits-most-signed":  {`"Example Corp"`, "-" + strings.Repeat("9", 4300), "", false},
	"digits-over":         {`"Example Corp"`, strings.Repeat("9", 4301), "context.company", false},
	"number-leading-zero": {`"Example Corp"`, `01`, "context.company", false},
	"number-plus":         {`"Example Corp"`, `+1`, "context.company", false},
	"number-no-fraction":  {`"Example Corp"`, `1.`, "context.company", false},
	"number-no-whole":     {`"Example Corp"`, `.5`, "context.company", false},
	"number-hex":          {`"Example Corp"`, `0x10`, "context", false},
	"literal-case":        {`"Example Corp"`, `True`, "context.company", false},
	"single-quotes":       {`"Example Corp"`, `'x'`, "context.company", false},
	"comment":             {`"Example Corp"`, `/*x*/1`, "context.company", false},
	"trailing-comma":      {`"Example Corp"}`, `1,}`, "context", false},
	"missing-comma":       {`"nonce":"nonce-001",`, `"nonce":"nonce-001"`, "packet", false},
	"depth-most":          {`"Example Corp"`, nested(98), "", false},
	"depth-over":          {`"Example Corp"`, nested(99), "context.company" + strings.Repeat(".0", 98), false},
	"lone-high-surrogate": {`Example Corp`, `\ud83d`, "context.company", false},
	"lone-low-surrogate":  {`Example Corp`, `\ude00`, "context.company", false},
	"swapped-surrogates":  {`Example Corp`, `\ude00\ud83d`, "context.company", false},
	"surrogate-key":       {`"company"`, `"\ud800"`, "context", false},
	"surrogate-pair":      {`Example Corp`, `\uD83D\uDE00`, "", false},
	"utf8-malformed":      {`Example Corp`, "\xff", "context.company", false},
	"utf8-overlong":       {`Example Corp`, "\xc0\x80", "context.company", false},
	"utf8-surrogate":      {`Example Corp`, "\xed\xa0\x80", "context.company", false},
	"utf8-key":            {`"company"`, "\"\xfe\"", "context", false},
	"utf8-in-name":        {`"pk-001"`, "\"\xff\"", "packet_id", false},
	"control-character":   {`Example Corp`, "a\nb", "context.company", false},
	"bad-escape":          {`Example Corp`, `\x41`, "context.company", false},
	"short-escape":        {`Example Corp`, `\u12`, "context.company", false},
	"other-escapes":       {`Example Corp`, `\u0045xample\u0020Corp`, "", true},
	"white-space":         {`,"nonce":`, " ,\n\t\"nonce\" :\r\n ", "", true},
	"no-break-space":      {`,"nonce":`, ",\u00a0\"nonce\":", "packet", false},
}

// apply changes the packet. The dates of TH-P1 are alike: a case for one changes issued_at, behind expires_at.
func (c strictCase) apply(base, name string) string {
	at := 0
	if strings.HasPrefix(name, "date-") {
		at = strings.Index(base, `"issued_at"`)
	}
	return base[:at] + strings.Replace(base[at:], c.old, c.new, 1)
}

func nested(levels int) string { return strings.Repeat("[", levels) + strings.Repeat("]", levels) }

func TestStrict(t *testing.T) {
	g := vectors(t)
	pub, base := g.key(t, 0), string(g.signed(0))
	for _, name := range slices.Sorted(maps.Keys(strictCases)) {
		c := strictCases[name]
		t.Run(name, func(t *testing.T) {
			if n := strings.Count(base, c.old); n < 1 {
				t.Fatal("the case changes nothing")
			}
			wire := c.apply(base, name)
			p, err := packet.Parse([]byte(wire))
			if c.field != "" {
				wantMalformed(t, err, c.field)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			sig, err := signature.ParseText(ident.Ed25519, p.SignatureText)
			if err != nil {
				t.Fatal(err)
			}
			if ok := signature.Verify(pub, p.SigningBytes(), sig) == nil; ok != c.verifies {
				t.Errorf("the signature of the untouched packet verifies: %v", ok)
			}
		})
	}
}

// wantMalformed checks code and field, and that nothing of the input is in what may be sent.
func wantMalformed(t *testing.T, err error, field string) {
	t.Helper()
	var f *fault.Error
	if !errors.As(err, &f) {
		t.Fatalf("error is %v", err)
	}
	if f.Code != fault.Malformed || f.Field != field {
		t.Errorf("refused as %s of %q (%s), not malformed of %q", f.Code, f.Field, f.Text, field)
	}
	for _, value := range []string{"pk-001", "nonce-001", "Example", "MCow", "9999", "FgC"} {
		if strings.Contains(f.Error(), value) {
			t.Errorf("%q repeats the input", f.Error())
		}
	}
}

func TestAfterThePacket(t *testing.T) {
	base := string(vectors(t).signed(0))
	for _, tail := range []string{"x", "{}", ",", "\x00", base, "\u00a0"} {
		_, err := packet.Parse([]byte(base + tail))
		wantMalformed(t, err, "packet")
	}
	for _, head := range []string{"\ufeff", "\x00", "[", "//\n"} {
		_, err := packet.Parse([]byte(head + base))
		wantMalformed(t, err, "packet")
	}
	if _, err := packet.Parse([]byte(" \r\n\t" + base + " \r\n\t")); err != nil {
		t.Error(err)
	}
}

// TestTruncated cuts the packet everywhere: no prefix of it is a packet.
func TestTruncated(t *testing.T) {
	base := vectors(t).signed(1)
	for n := range base {
		if _, err := packet.Parse(base[:n]); fault.CodeOf(err) != fault.Malformed {
			t.Fatalf("%d bytes of %d: %v", n, len(base), err)
		}
	}
}

func TestTooLarge(t *testing.T) {
	base := string(vectors(t).signed(0))
	pad := func(n int) []byte {
		return []byte(strings.Replace(base, "Example Corp", strings.Repeat("x", n-len(base)+len("Example Corp")), 1))
	}
	if _, err := packet.Parse(pad(packet.MaxTask)); err != nil {
		t.Errorf("a packet of exactly the limit: %v", err)
	}
	for _, parse := range []func([]byte) error{
		func(b []byte) error { _, err := packet.Parse(b); return err },
		func(b []byte) error { _, err := packet.ParseDraft(b); return err },
	} {
		if err := parse(pad(packet.MaxTask + 1)); fault.CodeOf(err) != fault.TooLarge {
			t.Errorf("one byte more: %v", err)
		}
	}
}

// TestDatesAsPython walks the dates of the vectors: what is accepted is written as pydantic writes it.
func TestDatesAsPython(t *testing.T) {
	g := vectors(t)
	accepted := 0
	for _, d := range g.Dates {
		wire := strings.Replace(string(g.signed(0)), `"2026-03-08T12:10:00Z"`, string(d[0]), 1)
		p, err := packet.Parse([]byte(wire))
		if err != nil {
			wantMalformed(t, err, "expires_at")
			continue
		}
		accepted++
		if want := `"expires_at":` + string(d[1]); !strings.Contains(string(p.SigningBytes()), want) {
			t.Errorf("%s gives %s, not %s", d[0], p.ExpiresAt, d[1])
		}
	}
	if accepted != 7 {
		t.Errorf("%d of 15 forms accepted, not 7", accepted)
	}
}

// TestNumbersAsPython puts the values of the vectors into the context: Python wrote them as they are signed here.
func TestNumbersAsPython(t *testing.T) {
	g, checked := vectors(t), 0
	for _, n := range g.Numbers {
		value, ok := strings.CutPrefix(n[1], `{"v":`)
		if !ok {
			continue // the lone surrogate, which is refused: TestStrict
		}
		value = strings.TrimSuffix(value, "}")
		p, err := packet.Parse([]byte(strings.Replace(string(g.signed(0)), `"Example Corp"`, " "+value+" ", 1)))
		if err != nil {
			t.Errorf("%s: %v", n[0], err)
			continue
		}
		if got, _ := p.ContextValue("company"); string(got) != value {
			t.Errorf("%s is signed as %s, not %s", n[0], got, value)
		}
		checked++
	}
	if checked != 21 {
		t.Errorf("%d values checked", checked)
	}
}

// TestTTLAsPython is what TrustHandoff fills in after it has parsed: it is in the signed bytes.
func TestTTLAsPython(t *testing.T) {
	for _, c := range []struct {
		name, risk, ttl   string
		wantRisk, wantTTL string
		checked           fault.Code
		field             string
	}{
		{"neither", `null`, `null`, `null`, `null`, "", ""},
		{"write", `"write"`, `null`, `"write"`, `120`, fault.TTLPolicyMismatch, "expires_at"},
		{"read", `"read"`, `null`, `"read"`, `900`, fault.TTLPolicyMismatch, "expires_at"},
		{"ttl-alone", `null`, `600`, `"read"`, `600`, "", ""},
		{"both", `"write"`, `600`, `"write"`, `600`, "", ""},
		{"off", `"write"`, `601`, `"write"`, `601`, fault.TTLPolicyMismatch, "expires_at"},
		{"unknown", `"urgent"`, `null`, `"urgent"`, `null`, fault.UnsupportedRiskLevel, "risk_level"},
		{"unknown-ttl", `"urgent"`, `600`, `"urgent"`, `600`, fault.UnsupportedRiskLevel, "risk_level"},
		{"empty", `""`, `600`, `""`, `600`, fault.UnsupportedRiskLevel, "risk_level"},
		{"upper-case", `"Write"`, `null`, `"Write"`, `null`, fault.UnsupportedRiskLevel, "risk_level"},
	} {
		t.Run(c.name, func(t *testing.T) {
			wire := strings.NewReplacer(`"risk_level":null`, `"risk_level":`+c.risk, `"ttl_seconds":null`,
				`"ttl_seconds":`+c.ttl).Replace(string(vectors(t).signed(0)))
			p, err := packet.Parse([]byte(wire))
			if err != nil {
				t.Fatal(err)
			}
			var got struct {
				Risk json.RawMessage `json:"risk_level"`
				TTL  json.RawMessage `json:"ttl_seconds"`
			}
			if err := json.Unmarshal(p.SigningBytes(), &got); err != nil {
				t.Fatal(err)
			}
			if string(got.Risk) != c.wantRisk || string(got.TTL) != c.wantTTL {
				t.Errorf("signed as %s, %s", got.Risk, got.TTL)
			}
			err = p.CheckTTL()
			if fault.CodeOf(err) != c.checked {
				t.Fatalf("CheckTTL: %v", err)
			}
			if err != nil && fault.From(err).Field != c.field {
				t.Errorf("field is %s", fault.From(err).Field)
			}
		})
	}
}

func TestAIProvenance(t *testing.T) {
	for value, ok := range map[string]bool{
		`null`: true, `{"source":"llm"}`: true, `{"model":"m","source":"é"}`: true, `{"sourc\u0065":"llm"}`: true,
		`{}`: false, `{"model":"m"}`: false, `{"source":""}`: false, `{"source":null}`: false, `{"source":1}`: false,
		`{"Source":"llm"}`: false, `{"x":{"source":"llm"}}`: false,
	} {
		wire := strings.Replace(string(vectors(t).signed(0)), `"ai_provenance":null`, `"ai_provenance":`+value, 1)
		p, err := packet.Parse([]byte(wire))
		if err != nil {
			t.Fatalf("%s: %v", value, err)
		}
		err = p.CheckAIProvenance()
		if ok != (err == nil) || !ok && fault.CodeOf(err) != fault.InvalidAIProvenance {
			t.Errorf("%s: %v", value, err)
		}
	}
}

// TestBytesAreCopied keeps a packet whole when its text is overwritten, as a server's buffers are.
func TestBytesAreCopied(t *testing.T) {
	wire := vectors(t).signed(1)
	p, err := packet.Parse(wire)
	if err != nil {
		t.Fatal(err)
	}
	before := fmt.Sprint(p, string(p.JSON()), string(p.SigningBytes()))
	clear(wire)
	if fmt.Sprint(p, string(p.JSON()), string(p.SigningBytes())) != before {
		t.Error("the packet changed with the bytes it was parsed from")
	}
	p.JSON()[0], p.Context()[0] = 'x', 'x'
	if p.JSON()[0] != '{' || p.Context()[0] != '{' {
		t.Error("what the packet returns is the packet's own")
	}
}
