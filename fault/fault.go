// Package fault holds trustd's error and refusal codes.
//
// A code is part of the wire contract: it is stable, lower case, and append-only, and the table below is the only
// place where codes are declared. What an Error may say to a caller (Code, Field, Text, Hint) is kept apart from
// its cause (Err), which stays in the log: text from a device, a parser or the run time never reaches a caller or
// a signed field.
package fault

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// A Code names one kind of failure. A Code is itself an error, so that errors.Is(err, fault.Denied) holds on both
// sides of a socket.
type Code string

// Error returns the code's text.
func (c Code) Error() string { return string(c) }

// Status returns the HTTP status that goes with the code; 500 for a code of a newer peer.
func (c Code) Status() int {
	if e, ok := table[c]; ok {
		return e.status
	}
	return 500
}

// Retryable reports whether the same request may succeed later, unchanged.
func (c Code) Retryable() bool { return table[c].retryable }

// Title returns one sentence on what the code means, for problem documents and docs/reasons.md.
func (c Code) Title() string { return table[c].title }

// Hint returns what to do about it; "" where there is nothing general to say.
func (c Code) Hint() string { return table[c].hint }

// Refusal reports whether the code is a reason for which a message is refused by the acceptance gate.
func (c Code) Refusal() bool { return table[c].family == refusal }

// Known reports whether this build knows the code.
func (c Code) Known() bool { _, ok := table[c]; return ok }

// An Error is a failure that may cross a socket, a plugin boundary or a log line.
type Error struct {
	Code       Code
	Field      string        // the input field at fault, as a dotted path; never its value
	Text       string        // safe to send: no secrets, no input values, no device text
	Hint       string        // overrides the code's own hint
	RetryAfter time.Duration // when a retry makes sense; 0 = unknown
	Err        error         // the cause, for the log only; never sent
}

// Error returns code, field and text, without the cause.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(string(e.Code))
	if e.Field != "" {
		b.WriteString(" (" + e.Field + ")")
	}
	if e.Text != "" {
		b.WriteString(": " + e.Text)
	}
	return b.String()
}

// Unwrap makes both the code and the cause visible to errors.Is and errors.As.
func (e *Error) Unwrap() []error {
	if e.Err == nil {
		return []error{e.Code}
	}
	return []error{e.Code, e.Err}
}

// Verbose returns the error with its cause, for logs.
func (e *Error) Verbose() string {
	if e.Err == nil {
		return e.Error()
	}
	return e.Error() + ": " + e.Err.Error()
}

// New returns an error with a text that may be sent.
func New(c Code, format string, args ...any) *Error {
	return &Error{Code: c, Text: fmt.Sprintf(format, args...)}
}

// Wrap returns an error with a text that may be sent and a cause that may not.
func Wrap(c Code, cause error, format string, args ...any) *Error {
	return &Error{Code: c, Text: fmt.Sprintf(format, args...), Err: cause}
}

// BadField returns a malformed error that names the field and never its value.
func BadField(field, format string, args ...any) *Error {
	return &Error{Code: Malformed, Field: field, Text: fmt.Sprintf(format, args...)}
}

// From returns err as an *Error: itself where it is one, a context's end as DeadlineExceeded or Canceled, and
// anything else as Internal with no text, so that nothing unforeseen is ever sent.
func From(err error) *Error {
	if err == nil {
		return nil
	}
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	var c Code
	switch {
	case errors.As(err, &c):
		return &Error{Code: c, Err: err}
	case errors.Is(err, context.DeadlineExceeded):
		return &Error{Code: DeadlineExceeded, Err: err}
	case errors.Is(err, context.Canceled):
		return &Error{Code: Canceled, Err: err}
	}
	return &Error{Code: Internal, Err: err}
}

// CodeOf returns the code of err: "" for nil, Internal for an error that carries none.
func CodeOf(err error) Code {
	if err == nil {
		return ""
	}
	return From(err).Code
}
