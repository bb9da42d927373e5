package client

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"mime"
	"net/http"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/api/wire"
	"github.com/trustd/trustd/fault"
)

// maxReply bounds what is read of a reply.
const maxReply = 64 << 20

// The pauses between tries.
const (
	firstPause = 20 * time.Millisecond
	maxPause   = 2 * time.Second
)

// A call is one request to the daemon.
type call struct {
	method, path string
	body         []byte
	key          string // Idempotency-Key
	again        bool   // sending it twice does no harm
}

func (c *Client) get(ctx context.Context, path string, out any) error {
	return c.do(ctx, call{method: "GET", path: path, again: true}, out)
}

func (c *Client) post(ctx context.Context, k call, in, out any) error {
	body, err := marshal(in)
	if err != nil {
		return err
	}
	k.method, k.body = "POST", body
	return c.do(ctx, k, out)
}

func marshal(in any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(in); err != nil {
		return nil, fault.Wrap(fault.Malformed, err, "the request cannot be written as JSON")
	}
	return b.Bytes(), nil
}

// do makes a call, again if it may and fails for a reason that may pass.
func (c *Client) do(ctx context.Context, k call, out any) error {
	pause := firstPause
	for try := 0; ; try++ {
		err := c.once(ctx, k, out)
		if err == nil || try == c.retries || !err.retry {
			return err.orNil()
		}
		wait := pause/2 + mathrand.N(pause)
		if after := fault.From(err.err).RetryAfter; after > wait {
			wait = after
		}
		pause = min(2*pause, maxPause)
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return err.err
		case <-timer.C:
		}
	}
}

// A failure is an error and whether the same call may succeed without harm.
type failure struct {
	err   error
	retry bool
}

func (f *failure) orNil() error {
	if f == nil {
		return nil
	}
	return f.err
}

// once makes a call one time and reads the reply into out.
func (c *Client) once(ctx context.Context, k call, out any) *failure {
	resp, body, err := c.pool.roundTrip(ctx, k)
	if err != nil {
		err, sent := c.transportError(ctx, err)
		return &failure{err, fault.CodeOf(err) == fault.Unreachable && (!sent || k.again)}
	}
	if p, ok := problemIn(resp, body); ok {
		return &failure{problemError(p), p.Retryable}
	}
	if err := wire.DecodeReply(body, out); err != nil || !isJSON(resp) {
		return &failure{errStranger(resp, err), false}
	}
	return nil
}

func mediaType(resp *http.Response) string {
	switch t := resp.Header.Get("Content-Type"); t {
	case "application/json", "application/problem+json", "application/x-ndjson":
		return t
	default:
		kind, _, _ := mime.ParseMediaType(t)
		return kind
	}
}

// isJSON reports whether a reply is an answer: also one with another status, such as the health of a daemon that
// cannot serve.
func isJSON(resp *http.Response) bool { return mediaType(resp) == "application/json" }

func problemIn(resp *http.Response, body []byte) (*api.Problem, bool) {
	if mediaType(resp) != "application/problem+json" {
		return nil, false
	}
	var p api.Problem
	if err := wire.DecodeReply(body, &p); err != nil || p.Code == "" {
		return nil, false
	}
	return &p, true
}

// problemError returns a problem as an error that errors.Is(err, code) recognises. The request's id is in its cause.
func problemError(p *api.Problem) error {
	e := fault.From(p.Err())
	if p.RequestID != "" {
		e.Err = fmt.Errorf("request %s", p.RequestID)
	}
	return e
}

// errStranger is returned for replies that no trustd would send.
func errStranger(resp *http.Response, cause error) error {
	return &fault.Error{
		Code: fault.Unreachable, Text: "what answers on the socket is not a trustd",
		Hint: "Look at what listens there.", Err: errors.Join(fmt.Errorf("status %d", resp.StatusCode), cause),
	}
}

// batches sends requests in calls of at most api.MaxBatch and api.MaxBatchBody, and puts the results together. A
// call that fails stands as its error in each of its results.
func batches[Q, Reply, R any](
	c *Client, ctx context.Context, k call, rs []Q, write func([]byte, *Q) ([]byte, error),
	results func(*Reply) []R, refuse func(*api.Problem) R,
) []R {
	out := make([]R, 0, len(rs))
	for len(rs) > 0 {
		body, n, bad := packBatch(rs, write)
		if n > 0 {
			out = append(out, oneBatch(c, ctx, k, body, n, results, refuse)...)
		}
		if bad != nil {
			out = append(out, refuse(api.NewProblem(bad)))
			n++
		}
		rs = rs[n:]
	}
	return out
}

// packBatch writes as many of the requests as one call may hold. bad is why the request after those cannot be sent.
func packBatch[Q any](rs []Q, write func([]byte, *Q) ([]byte, error)) (body []byte, n int, bad error) {
	const head, tail = `{"requests":[`, `]}`
	body = append(body, head...)
	for ; n < len(rs) && n < api.MaxBatch; n++ {
		before := len(body)
		if n > 0 {
			body = append(body, ',')
		}
		grown, err := write(body, &rs[n])
		if err != nil {
			body, bad = body[:before], err
			break
		}
		if n > 0 && len(grown)+len(tail) > api.MaxBatchBody {
			body = grown[:before]
			break
		}
		body = grown
	}
	return append(body, tail...), n, bad
}

func oneBatch[Reply, R any](
	c *Client, ctx context.Context, k call, body []byte, n int, results func(*Reply) []R, refuse func(*api.Problem) R,
) []R {
	k.body = body
	var reply Reply
	err := c.do(ctx, k, &reply)
	if rs := results(&reply); err == nil && len(rs) == n {
		return rs
	} else if err == nil {
		err = &fault.Error{Code: fault.Unreachable, Text: "the daemon did not answer each request of the batch"}
	}
	out := make([]R, n)
	for i := range out {
		out[i] = refuse(api.NewProblem(err))
	}
	return out
}

// keyOf returns the idempotency key of ctx. A client that tries again makes one where there is none.
func (c *Client) keyOf(ctx context.Context) (string, error) {
	key := api.IdempotencyKeyOf(ctx)
	if key == "" && c.retries > 0 {
		return rand.Text(), nil
	}
	for i := range len(key) {
		if key[i] <= ' ' || key[i] > '~' { // it goes into a header as it is
			return "", fault.BadField("Idempotency-Key", "a key is made of visible ASCII characters")
		}
	}
	return key, nil
}
