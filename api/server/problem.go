package server

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/api/wire"
	"github.com/trustd/trustd/fault"
)

// fail ends the exchange with an error: this is the only place where one becomes a reply. Where a part of the
// reply has left already, the connection is cut instead, so that nobody takes the part for the whole.
func (x *exchange) fail(err error) {
	p := x.problem(err)
	x.code = p.Code
	x.log(err, p)
	if x.started {
		panic(http.ErrAbortHandler)
	}
	x.writeProblem(p)
}

func (x *exchange) problem(err error) *api.Problem {
	p := api.NewProblem(err)
	p.RequestID = x.id
	if _, ok := err.(*methodError); ok {
		p.Status = http.StatusMethodNotAllowed
	}
	return p
}

func (x *exchange) writeProblem(p *api.Problem) {
	body, err := wire.AppendJSON(nil, p)
	if err != nil { // a Problem holds strings and numbers only
		panic(http.ErrAbortHandler)
	}
	header := x.w.Header()
	if p.RetryAfter > 0 {
		seconds := (time.Duration(p.RetryAfter)*time.Millisecond + time.Second - 1) / time.Second
		header.Set("Retry-After", strconv.FormatInt(int64(seconds), 10))
	}
	switch p.Code {
	case fault.CallerChanged, fault.CallerUnknown, fault.Stopping:
		header.Set("Connection", "close")
	}
	x.write(p.Status, typeProblem, append(body, '\n'))
}

// log writes the cause once: what is ours to repair as an error or a warning, refusals of callers for those who
// watch them, and what a caller did wrong only where somebody debugs.
func (x *exchange) log(err error, p *api.Problem) {
	level := slog.LevelDebug
	switch {
	case p.Code == fault.Internal || p.Code == fault.Corrupt:
		level = slog.LevelError
	case p.Code == fault.Canceled || p.Code == fault.Stopping:
	case p.Status >= 500:
		level = slog.LevelWarn
	case p.Code == fault.Denied || p.Code == fault.CallerChanged || p.Code == fault.CallerUnknown:
		level = slog.LevelInfo
	}
	log := x.handler.Log
	ctx := context.WithoutCancel(x.r.Context())
	if !log.Enabled(ctx, level) {
		return
	}
	attrs := []slog.Attr{
		slog.String("request_id", x.id), slog.String("socket", x.handler.socket), slog.String("route", x.route.name()),
		slog.String("code", string(p.Code)), slog.String("cause", causeOf(err)),
	}
	if level == slog.LevelInfo {
		ok, before := x.handler.refusals.admit(x.handler.Clock.Boot())
		if !ok {
			return
		}
		if before > 0 {
			attrs = append(attrs, slog.Int64("left_out_before", before))
		}
	}
	if p.Field != "" {
		attrs = append(attrs, slog.String("field", p.Field))
	}
	if x.caller != nil {
		attrs = append(attrs, slog.Uint64("uid", uint64(x.caller.UID)), slog.Int64("pid", int64(x.caller.PID)))
	}
	log.LogAttrs(ctx, level, "request failed", attrs...)
}

// causeOf returns an error with all that it wraps, for the log.
func causeOf(err error) string {
	if e := fault.From(err); e.Err != nil {
		return e.Verbose()
	}
	return err.Error()
}

// panicked returns a panic's value as an error whose cause, with the stack, is for the log.
func panicked(p any) error {
	if p == http.ErrAbortHandler {
		panic(p)
	}
	return fault.Wrap(fault.Internal, fmt.Errorf("panic: %v\n%s", p, debug.Stack()), "")
}

// A methodError is the one error whose status is not its code's: HTTP wants 405 and the list of what is allowed.
type methodError struct{ cause *fault.Error }

func (e *methodError) Error() string { return e.cause.Error() }
func (e *methodError) Unwrap() error { return e.cause }

// noRoute answers a path or method that no route has.
var noRoute = route{method: "ANY", path: "other"}

func init() { noRoute.work = refuseRoute }

func refuseRoute(x *exchange) (any, error) {
	var allowed []string
	elsewhere := false
	for i := range table {
		rt := &table[i]
		if !matches(rt.path, x.r.URL.EscapedPath()) {
			continue
		}
		if rt.admin && x.admin == nil {
			elsewhere = true
			continue
		}
		allowed = append(allowed, rt.method)
	}
	switch {
	case len(allowed) > 0:
		x.w.Header().Set("Allow", strings.Join(slices.Compact(slices.Sorted(slices.Values(allowed))), ", "))
		return nil, &methodError{&fault.Error{
			Code: fault.Unsupported, Text: "the path does not take this method", Hint: "See the Allow header and /openapi.json.",
		}}
	case elsewhere:
		return nil, &fault.Error{Code: fault.NotFound, Text: "admin.sock has this path", Hint: "Call it there."}
	}
	return nil, &fault.Error{Code: fault.NotFound, Text: "there is no such path", Hint: "See /openapi.json."}
}

// matches reports whether a path matches a pattern in which {name} stands for one segment.
func matches(pattern, path string) bool {
	p, q := strings.Split(pattern, "/"), strings.Split(path, "/")
	if len(p) != len(q) {
		return false
	}
	for i := range p {
		if p[i] != q[i] && (p[i] != "{name}" || q[i] == "") {
			return false
		}
	}
	return true
}

// refusalsPerSecond is how many refusals of callers are logged a second: enough to see an attack, too few for the
// attacker to bury the rest of the log under it.
const refusalsPerSecond = 20

// A throttle counts lines of the log by the second.
type throttle struct {
	mu      sync.Mutex
	second  time.Duration
	logged  int
	leftOut int64
}

// admit says whether a line may be logged now, and how many were left out before it.
func (t *throttle) admit(now time.Duration) (ok bool, before int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s := now.Truncate(time.Second); s != t.second {
		t.second, t.logged = s, 0
	}
	if t.logged >= refusalsPerSecond {
		t.leftOut++
		return false, 0
	}
	t.logged++
	before, t.leftOut = t.leftOut, 0
	return true, before
}
