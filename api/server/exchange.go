package server

import (
	"errors"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/api/wire"
	"github.com/trustd/trustd/fault"
)

// maxName bounds a name in a path: the longest id, alias or fingerprint has 128 bytes.
const maxName = 256

// body returns the request's body. It belongs to the request for good: what decode cuts out of it may be kept.
func (x *exchange) body() ([]byte, error) {
	if x.hasRaw {
		return x.raw, nil
	}
	if err := x.jsonType(); err != nil {
		return nil, err
	}
	if x.r.ContentLength > x.route.limit {
		return nil, x.tooLarge()
	}
	raw, err := x.readAll(http.MaxBytesReader(x.w, x.r.Body, x.route.limit))
	var over *http.MaxBytesError
	switch {
	case errors.Is(err, fault.ResourceExhausted):
		x.w.Header().Set("Connection", "close") // rather than read what is to be thrown away
		return nil, err
	case errors.As(err, &over):
		return nil, x.tooLarge()
	case x.r.Context().Err() != nil:
		return nil, fault.Wrap(fault.Canceled, x.r.Context().Err(), "")
	case err != nil:
		return nil, fault.Wrap(fault.Malformed, err, "the body did not arrive whole")
	}
	x.raw, x.hasRaw = raw, true
	return raw, x.recheck()
}

func (x *exchange) tooLarge() error {
	x.w.Header().Set("Connection", "close") // rather than read what is to be thrown away
	return fault.New(fault.TooLarge, "at most %d bytes", x.route.limit)
}

// firstRead is what is set aside for a body before any of it has come, whatever length it claims to have.
const firstRead = 32 << 10

// readAll reads a body, setting bytes aside as they come. They are given back at the end of the request.
func (x *exchange) readAll(r io.Reader) ([]byte, error) {
	size := int64(512)
	if x.r.ContentLength >= 0 {
		size = min(x.r.ContentLength, firstRead) + 1 // one more, so that the last read sees the end
	}
	b := make([]byte, 0, size)
	for {
		n, err := r.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
		if err == io.EOF {
			return b, nil
		}
		if err != nil {
			return nil, err
		}
		if len(b) < cap(b) {
			continue
		}
		if more := int64(cap(b)); more >= firstRead {
			if err := x.handler.Budget.take(x.caller.UID, more); err != nil {
				return nil, err
			}
			x.held += more
		}
		b = slices.Grow(b, cap(b))
	}
}

// jsonType refuses bodies that say they are something else: a browser can send those without asking first.
func (x *exchange) jsonType() error {
	types := x.r.Header["Content-Type"]
	if len(types) == 0 {
		return nil
	}
	kind, _, _ := strings.Cut(types[0], ";")
	switch kind = strings.ToLower(strings.TrimSpace(kind)); {
	case len(types) > 1:
	case kind == "application/json":
		return nil
	case kind == "application/x-ndjson" && x.route.stream:
		return nil
	}
	return &fault.Error{
		Code: fault.Malformed, Field: "Content-Type", Text: "the body must be JSON",
		Hint: "Send Content-Type: application/json (curl --json).",
	}
}

// noBody refuses a body where the route takes none.
func (x *exchange) noBody() error {
	if x.r.ContentLength == 0 || x.route.limit > 0 || x.route.stream || x.route == &noRoute {
		return nil
	}
	return fault.BadField("", "this request takes no body")
}

// query returns the parameters, each of which must be known and stand once.
func (x *exchange) query(known ...string) (url.Values, error) {
	if x.r.URL.RawQuery == "" {
		return nil, nil
	}
	q, err := url.ParseQuery(x.r.URL.RawQuery)
	if err != nil {
		return nil, fault.BadField("query", "not a query string")
	}
next:
	for name, values := range q {
		for _, k := range known {
			if name == k && len(values) == 1 {
				continue next
			}
		}
		return nil, fault.BadField("query."+wire.SafeName(name), "there is no such parameter, or it stands here twice")
	}
	return q, nil
}

func (x *exchange) noQuery() error {
	_, err := x.query()
	return err
}

// flag reads a parameter that is on when it is there: name, name=1 or name=true; name=0 or name=false is off.
func (x *exchange) flag(name string) (bool, error) {
	q, err := x.query(name)
	if err != nil || !q.Has(name) {
		return false, err
	}
	switch q.Get(name) {
	case "", "1", "true":
		return true, nil
	case "0", "false":
		return false, nil
	}
	return false, fault.BadField("query."+name, "not 1 or 0")
}

// name returns the agent's name in the path: an id, an alias or a fingerprint, not yet looked at.
func (x *exchange) name() (string, error) {
	if err := x.noQuery(); err != nil {
		return "", err
	}
	n := x.r.PathValue("name")
	if n == "" || len(n) > maxName {
		return "", fault.BadField("name", "a name has 1 to %d bytes", maxName)
	}
	return n, nil
}

// countItems counts what became of the items of a batch.
func (x *exchange) countItems(n int, problem func(i int) *api.Problem) {
	for i := range n {
		var c fault.Code
		if p := problem(i); p != nil {
			c = p.Code
		}
		x.stats.item(c)
	}
}
