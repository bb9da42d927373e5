// Package client talks to the trustd of this host over its Unix sockets. A Client is an api.Agent and an Admin is
// an api.Admin: a call means the same as in the daemon's own process, and an error carries the same code, so that
// errors.Is(err, fault.Denied) holds. It needs the standard library alone.
//
// A verdict that refuses is an answer and no error: look at Decision.
package client

import (
	"context"
	"encoding/json"
	"errors"
	"net/url"
	"os"
	"strconv"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/api/wire"
	"github.com/trustd/trustd/fault"
)

// Where the daemon's sockets are, and the variables of the environment that say otherwise.
const (
	DefaultSocket      = "/run/trustd/agent.sock"
	DefaultAdminSocket = "/run/trustd/admin.sock"
	EnvSocket          = "TRUSTD_SOCKET"
	EnvAdminSocket     = "TRUSTD_ADMIN_SOCKET"
)

// A Client calls the daemon over agent.sock. It keeps connections open between calls and is safe for concurrent use.
type Client struct {
	pool    pool
	retries int
}

var _ api.Agent = (*Client)(nil)

// An Option changes a Client as it is made.
type Option func(*Client)

// WithRetry sends a call up to n times more when it fails for a reason that may pass. A verification whose reply
// was lost is not sent again, because it may have spent the packet's nonce; a call that changes state is, under
// an idempotency key.
func WithRetry(n int) Option { return func(c *Client) { c.retries = max(n, 0) } }

// New returns a client of the socket at the given path; "" is $TRUSTD_SOCKET or DefaultSocket. It does not connect
// yet.
func New(socket string, options ...Option) *Client {
	c := &Client{pool: pool{socket: pick(socket, EnvSocket, DefaultSocket)}}
	for _, o := range options {
		o(c)
	}
	return c
}

func pick(socket, env, fallback string) string {
	if socket == "" {
		socket = os.Getenv(env)
	}
	if socket == "" {
		socket = fallback
	}
	return socket
}

// Socket returns the path of the socket that the client calls.
func (c *Client) Socket() string { return c.pool.socket }

// Close closes idle connections. The client may be used again.
func (c *Client) Close() { c.pool.close() }

// A dialError says that nothing was sent.
type dialError struct{ err error }

func (e *dialError) Error() string { return e.err.Error() }
func (e *dialError) Unwrap() error { return e.err }

// Sign completes and signs one task packet as the given agent; "" where this process may act as exactly one.
// packet is JSON text ([]byte, string or json.RawMessage) or a value that encoding/json writes.
func (c *Client) Sign(ctx context.Context, agent string, packet any) (api.SignPacketReply, error) {
	raw, err := rawJSON(packet)
	if err != nil {
		return api.SignPacketReply{}, err
	}
	return c.SignPacket(ctx, api.SignPacketRequest{Agent: agent, Packet: raw})
}

// SignBatch signs many packets as one agent; results stand in their order, each with its own error.
func (c *Client) SignBatch(ctx context.Context, agent string, packets ...any) ([]api.SignPacketResult, error) {
	rs := make([]api.SignPacketRequest, len(packets))
	for i, p := range packets {
		raw, err := rawJSON(p)
		if err != nil {
			return nil, inRequest(i, err)
		}
		rs[i] = api.SignPacketRequest{Agent: agent, Packet: raw}
	}
	return c.SignPackets(ctx, rs), nil
}

// Verify decides on one packet that the given agent received; "" for any agent that this process may verify for.
func (c *Client) Verify(ctx context.Context, audience string, packet any) (api.Decision, error) {
	raw, err := rawJSON(packet)
	if err != nil {
		return api.Decision{}, err
	}
	return c.VerifyPacket(ctx, api.VerifyPacketRequest{Packet: raw, Audience: audience})
}

// VerifyBatch decides on many packets; results stand in their order.
func (c *Client) VerifyBatch(ctx context.Context, audience string, packets ...any) ([]api.VerifyPacketResult, error) {
	rs := make([]api.VerifyPacketRequest, len(packets))
	for i, p := range packets {
		raw, err := rawJSON(p)
		if err != nil {
			return nil, inRequest(i, err)
		}
		rs[i] = api.VerifyPacketRequest{Packet: raw, Audience: audience}
	}
	return c.VerifyPackets(ctx, rs), nil
}

func inRequest(i int, err error) error {
	e := *fault.From(err)
	e.Field = "requests." + strconv.Itoa(i) + "." + e.Field
	return &e
}

// rawJSON returns text as it is, so that the daemon judges each byte of it, and other values as JSON.
func rawJSON(v any) (json.RawMessage, error) {
	switch v := v.(type) {
	case json.RawMessage:
		return v, nil
	case []byte:
		return v, nil
	case string:
		return json.RawMessage(v), nil
	}
	raw, err := json.Marshal(v)
	if err != nil {
		return nil, fault.Wrap(fault.Malformed, err, "the packet cannot be written as JSON")
	}
	return raw, nil
}

// SignPacket is Sign for a whole request.
func (c *Client) SignPacket(ctx context.Context, r api.SignPacketRequest) (out api.SignPacketReply, err error) {
	body, err := wire.AppendSign(nil, &r)
	if err == nil {
		err = c.do(ctx, call{method: "POST", path: "/v1/packets/sign", body: body, again: true}, &out)
	}
	return out, err
}

// SignPackets signs many, in as many calls as the daemon's limits ask for.
func (c *Client) SignPackets(ctx context.Context, rs []api.SignPacketRequest) []api.SignPacketResult {
	return batches(c, ctx, call{method: "POST", path: "/v1/packets/sign-batch", again: true}, rs, wire.AppendSign,
		func(r *api.SignPacketsReply) []api.SignPacketResult { return r.Results },
		func(p *api.Problem) api.SignPacketResult { return api.SignPacketResult{Error: p} })
}

// VerifyPacket is Verify for a whole request.
func (c *Client) VerifyPacket(ctx context.Context, r api.VerifyPacketRequest) (out api.Decision, err error) {
	body, err := wire.AppendVerify(nil, &r)
	if err == nil {
		err = c.do(ctx, call{method: "POST", path: "/v1/packets/verify", body: body}, &out)
	}
	return out, err
}

// VerifyPackets decides on many, in as many calls as the daemon's limits ask for.
func (c *Client) VerifyPackets(ctx context.Context, rs []api.VerifyPacketRequest) []api.VerifyPacketResult {
	return batches(c, ctx, call{method: "POST", path: "/v1/packets/verify-batch"}, rs, wire.AppendVerify,
		func(r *api.VerifyPacketsReply) []api.VerifyPacketResult { return r.Results },
		func(p *api.Problem) api.VerifyPacketResult { return api.VerifyPacketResult{Error: p} })
}

// SignMessage signs arbitrary JSON as a SignedMessage.
func (c *Client) SignMessage(ctx context.Context, r api.SignMessageRequest) (out api.SignMessageReply, err error) {
	err = c.post(ctx, call{path: "/v1/messages/sign", again: true}, r, &out)
	return out, err
}

// VerifyMessage checks a SignedMessage.
func (c *Client) VerifyMessage(ctx context.Context, r api.VerifyMessageRequest) (out api.MessageVerdict, err error) {
	err = c.post(ctx, call{path: "/v1/messages/verify", again: !r.Once}, r, &out)
	return out, err
}

// VerifyChain checks that messages, oldest first, form a chain.
func (c *Client) VerifyChain(ctx context.Context, r api.VerifyChainRequest) (out api.ChainVerdict, err error) {
	err = c.post(ctx, call{path: "/v1/messages/verify-chain", again: true}, r, &out)
	return out, err
}

// Whoami says what the daemon sees of this process.
func (c *Client) Whoami(ctx context.Context, explain bool) (out api.Whoami, err error) {
	path := "/v1/whoami"
	if explain {
		path += "?explain=1"
	}
	err = c.get(ctx, path, &out)
	return out, err
}

// Capabilities says what the daemon can do.
func (c *Client) Capabilities(ctx context.Context) (out api.Capabilities, err error) {
	err = c.get(ctx, "/v1/capabilities", &out)
	return out, err
}

// Identity looks up an agent by id, alias or fingerprint.
func (c *Client) Identity(ctx context.Context, name string) (out api.Identity, err error) {
	path, err := under("/v1/identities/", name, "")
	if err != nil {
		return out, err
	}
	err = c.get(ctx, path, &out)
	return out, err
}

// History returns the signature history of the agent's key.
func (c *Client) History(ctx context.Context, name string) (out api.History, err error) {
	path, err := under("/v1/identities/", name, "/history")
	if err != nil {
		return out, err
	}
	err = c.get(ctx, path, &out)
	return out, err
}

// Health says whether the daemon and each of its parts can serve; Ready is false where it cannot.
func (c *Client) Health(ctx context.Context) (out api.Health, err error) {
	err = c.get(ctx, "/healthz", &out)
	return out, err
}

// under returns the path of a named thing. A name of dots alone would be taken for a step in the path.
func under(prefix, name, suffix string) (string, error) {
	if name == "" || name == "." || name == ".." {
		return "", fault.BadField("name", "not a name")
	}
	return prefix + url.PathEscape(name) + suffix, nil
}

// errGone is returned for replies that never came.
func errGone(cause error) error {
	return &fault.Error{
		Code: fault.Unreachable, Text: "the connection to the daemon broke before its reply came", Err: cause,
		Hint: "Retry; what was asked may or may not have been done.",
	}
}

// transportError returns why a call got no reply, and whether it may have reached the daemon.
func (c *Client) transportError(ctx context.Context, err error) (e error, sent bool) {
	var d *dialError
	sent = !errors.As(err, &d)
	switch {
	case ctx.Err() != nil:
		return fault.From(context.Cause(ctx)), sent
	case sent:
		return errGone(err), true
	case errors.Is(err, os.ErrPermission):
		return &fault.Error{
			Code: fault.Denied, Text: "this user may not open the daemon's socket", Err: err,
			Hint: "Ask as a user who may open " + c.pool.socket + "; an admin socket is root's alone.",
		}, false
	}
	return &fault.Error{
		Code: fault.Unreachable, Text: "no daemon answers on " + c.pool.socket, Err: err,
		Hint: "Start it with trustd serve, or name the right socket: " + EnvSocket + " or " + EnvAdminSocket + ", --socket or --admin-socket.",
	}, false
}
