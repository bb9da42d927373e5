package plugins

import (
	"slices"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/plugins/signerpb"
	"github.com/trustd/trustd/signer"
)

// maxCause bounds the text of a cause that crosses the boundary, for the log.
const maxCause = 1 << 10

// A remoteError is the cause of an error that happened in the plugin process.
type remoteError struct {
	class signer.Class
	text  string
}

func (e *remoteError) Error() string { return e.text }

// SignerClass returns the class of failure.
func (e *remoteError) SignerClass() signer.Class { return e.class }

func encodeError(err error) *signerpb.Error {
	if err == nil {
		return nil
	}
	e := fault.From(err)
	out := &signerpb.Error{
		Code: string(e.Code), Class: string(signer.ClassOf(err)), Field: e.Field, Text: e.Text, Hint: e.Hint,
		RetryAfterMs: e.RetryAfter.Milliseconds(),
	}
	if e.Err != nil {
		text := e.Err.Error()
		out.Cause = string([]rune(text[:min(len(text), maxCause)]))
	}
	return out
}

func decodeError(p *signerpb.Error) error {
	if p == nil {
		return nil
	}
	code := fault.Code(p.Code)
	if !code.Known() {
		code = fault.Internal
	}
	out := &fault.Error{
		Code: code, Field: p.Field, Text: p.Text, Hint: p.Hint, RetryAfter: time.Duration(p.RetryAfterMs) * time.Millisecond,
	}
	if p.Cause != "" || p.Class != "" {
		out.Err = &remoteError{signer.Class(p.Class), p.Cause}
	}
	return out
}

func encodeInfo(k signer.KeyInfo) *signerpb.KeyInfo {
	out := &signerpb.KeyInfo{
		Uri: k.URI, Id: k.ID.Bytes(), Label: valid(k.Label), Grade: string(k.Grade), Origin: string(k.Origin),
		Sensitive: k.Sensitive, Always: k.Always, Exported: k.Exported, Problem: k.Problem,
	}
	if !k.Public.IsZero() {
		out.Spki = k.Public.SPKI()
	}
	return out
}

// valid makes text that a token gave fit for the wire and for people.
func valid(s string) string { return string([]rune(s)) }

func decodeInfo(p *signerpb.KeyInfo) signer.KeyInfo {
	out := signer.KeyInfo{
		URI: p.GetUri(), ID: signer.ID(p.GetId()), Label: p.GetLabel(), Grade: signer.Grade(p.GetGrade()),
		Origin: signer.Origin(p.GetOrigin()), Sensitive: p.GetSensitive(), Always: p.GetAlways(), Exported: p.GetExported(),
		Problem: p.GetProblem(),
	}
	if len(p.GetSpki()) > 0 {
		pub, err := ident.ParseSPKI(p.GetSpki())
		if err != nil {
			out.Problem = "the plugin returned a public key that cannot be read"
		}
		out.Public = pub
	}
	return out
}

func encodeDescription(d signer.Description) *signerpb.DescribeResponse {
	out := &signerpb.DescribeResponse{
		Kind: d.Kind, Device: valid(d.Device), Mechanisms: d.Mechanisms, Limits: d.Limits, Grade: string(d.Grade),
		State: string(d.State), Problem: d.Problem, Remedy: d.Remedy,
	}
	for _, a := range d.Algorithms {
		out.Algorithms = append(out.Algorithms, a.String())
	}
	return out
}

func decodeDescription(p *signerpb.DescribeResponse) signer.Description {
	out := signer.Description{
		Kind: p.GetKind(), Device: p.GetDevice(), Mechanisms: slices.Clone(p.GetMechanisms()), Limits: map[string]string{},
		Grade: signer.Grade(p.GetGrade()), State: signer.State(p.GetState()), Problem: p.GetProblem(), Remedy: p.GetRemedy(),
	}
	for k, v := range p.GetLimits() {
		out.Limits[k] = v
	}
	for _, name := range p.GetAlgorithms() {
		if a, err := ident.ParseAlgorithm(name); err == nil {
			out.Algorithms = append(out.Algorithms, a)
		}
	}
	return out
}
