package server

import (
	"context"
	"net/http"
	"strings"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/api/wire"
	"github.com/trustd/trustd/fault"
)

// A Route is one operation of the socket, as /openapi.json describes it.
type Route struct {
	Method string
	Path   string
	Admin  bool // on admin.sock only
}

// Routes lists every operation.
func Routes() []Route {
	out := make([]Route, 0, len(table))
	for i := range table {
		out = append(out, Route{table[i].method, table[i].path, table[i].admin})
	}
	return out
}

// A work answers one request: with a reply, which serve writes, or with an error. A stream writes for itself and
// returns no reply.
type work func(x *exchange) (reply any, err error)

type route struct {
	method, path string
	admin        bool
	limit        int64 // of the body in bytes; 0 takes none
	optional     bool  // the body may be empty
	mutates      bool  // honours Idempotency-Key
	free         bool  // not counted against the caller's limits
	stream       bool
	work         work
}

// name returns the label that stands for the route in metrics and logs.
func (r *route) name() string { return r.method + " " + r.path }

var table = []route{
	{method: "POST", path: "/v1/packets/sign", limit: api.MaxBody, work: ask(signPacket)},
	{method: "POST", path: "/v1/packets/sign-batch", limit: api.MaxBatchBody, work: ask(signPackets)},
	{method: "POST", path: "/v1/packets/sign-stream", stream: true, work: signStream},
	{method: "POST", path: "/v1/packets/verify", limit: api.MaxBody, work: ask(verifyPacket)},
	{method: "POST", path: "/v1/packets/verify-batch", limit: api.MaxBatchBody, work: ask(verifyPackets)},
	{method: "POST", path: "/v1/packets/verify-stream", stream: true, work: verifyStream},
	{method: "POST", path: "/v1/messages/sign", limit: api.MaxBody, work: ask(signMessage)},
	{method: "POST", path: "/v1/messages/verify", limit: api.MaxBody, work: ask(verifyMessage)},
	{method: "POST", path: "/v1/messages/verify-chain", limit: api.MaxBatchBody, work: ask(verifyChain)},
	{method: "GET", path: "/v1/whoami", work: whoami},
	{method: "GET", path: "/v1/capabilities", work: capabilities},
	{method: "GET", path: "/v1/identities/{name}", work: identity},
	{method: "GET", path: "/v1/identities/{name}/history", work: history},
	{method: "GET", path: "/livez", free: true, work: livez},
	{method: "GET", path: "/readyz", work: readyz},
	{method: "GET", path: "/healthz", work: healthz},
	{method: "GET", path: "/metrics", work: metricsText},
	{method: "GET", path: "/openapi.json", work: openAPI},

	{method: "POST", path: "/v1/agents", admin: true, limit: api.MaxBody, mutates: true, work: ask(addAgent)},
	{method: "GET", path: "/v1/agents", admin: true, work: listAgents},
	{method: "POST", path: "/v1/agents/import", admin: true, limit: api.MaxBody, mutates: true, work: ask(importAgent)},
	{method: "GET", path: "/v1/agents/{name}", admin: true, work: showAgent},
	{method: "DELETE", path: "/v1/agents/{name}", admin: true, limit: api.MaxBody, optional: true, mutates: true,
		work: ask(removeAgent)},
	{method: "POST", path: "/v1/agents/{name}/revoke", admin: true, limit: api.MaxBody, mutates: true,
		work: ask(revokeAgent)},
	{method: "POST", path: "/v1/agents/{name}/export-private", admin: true, limit: api.MaxBody,
		work: ask(exportPrivate)},
	{method: "POST", path: "/v1/agents/{name}/set", admin: true, limit: api.MaxBody, mutates: true, work: ask(setAgent)},
	{method: "POST", path: "/v1/agents/{name}/recheck", admin: true, mutates: true, work: on(api.Admin.RecheckKey)},
	{method: "GET", path: "/v1/keys", admin: true, work: listKeys},
	{method: "GET", path: "/v1/backends", admin: true, work: listBackends},
	{method: "GET", path: "/v1/backends/{name}", admin: true, work: on(api.Admin.ShowBackend)},
	{method: "POST", path: "/v1/backends/{name}/unlock", admin: true, mutates: true, work: on(api.Admin.UnlockBackend)},
	{method: "POST", path: "/v1/backends/{name}/reset-canary", admin: true, mutates: true,
		work: on(api.Admin.ResetCanary)},
}

// ask makes the work of a route whose body is a Q.
func ask[Q any](f func(x *exchange, q Q) (any, error)) work {
	wire.CheckRequest[Q]()
	return func(x *exchange) (any, error) {
		if err := x.noQuery(); err != nil {
			return nil, err
		}
		q, err := body[Q](x)
		if err != nil {
			return nil, err
		}
		return f(x, q)
	}
}

// on makes the work of a route that is about what its path names and takes no body.
func on[R any](f func(a api.Admin, ctx context.Context, name string) (R, error)) work {
	return func(x *exchange) (any, error) {
		name, err := x.name()
		if err != nil {
			return nil, err
		}
		r, err := f(x.admin, x.ctx, name)
		return &r, err
	}
}

func body[Q any](x *exchange) (Q, error) {
	raw, err := x.body()
	if err != nil || len(raw) == 0 && x.route.optional {
		var none Q
		return none, err
	}
	return wire.DecodeRequest[Q](raw)
}

func signPacket(x *exchange, q api.SignPacketRequest) (any, error) {
	r, err := x.agent.SignPacket(x.ctx, q)
	return &r, err
}

func signPackets(x *exchange, q api.SignPacketsRequest) (any, error) {
	if err := x.charge(len(q.Requests)); err != nil {
		return nil, err
	}
	rs := x.agent.SignPackets(x.ctx, q.Requests)
	x.countItems(len(rs), func(i int) *api.Problem { return rs[i].Error })
	return &api.SignPacketsReply{Results: rs}, nil
}

func verifyPacket(x *exchange, q api.VerifyPacketRequest) (any, error) {
	r, err := x.agent.VerifyPacket(x.ctx, q)
	return &r, err
}

func verifyPackets(x *exchange, q api.VerifyPacketsRequest) (any, error) {
	if err := x.charge(len(q.Requests)); err != nil {
		return nil, err
	}
	rs := x.agent.VerifyPackets(x.ctx, q.Requests)
	x.countItems(len(rs), func(i int) *api.Problem { return rs[i].Error })
	return &api.VerifyPacketsReply{Results: rs}, nil
}

func signMessage(x *exchange, q api.SignMessageRequest) (any, error) {
	r, err := x.agent.SignMessage(x.ctx, q)
	return &r, err
}

func verifyMessage(x *exchange, q api.VerifyMessageRequest) (any, error) {
	r, err := x.agent.VerifyMessage(x.ctx, q)
	return &r, err
}

func verifyChain(x *exchange, q api.VerifyChainRequest) (any, error) {
	if err := x.charge(len(q.Messages)); err != nil {
		return nil, err
	}
	r, err := x.agent.VerifyChain(x.ctx, q)
	return &r, err
}

func whoami(x *exchange) (any, error) {
	explain, err := x.flag("explain")
	if err != nil {
		return nil, err
	}
	r, err := x.agent.Whoami(x.ctx, explain)
	return &r, err
}

func capabilities(x *exchange) (any, error) {
	if err := x.noQuery(); err != nil {
		return nil, err
	}
	r, err := x.agent.Capabilities(x.ctx)
	return &r, err
}

func identity(x *exchange) (any, error) {
	name, err := x.name()
	if err != nil {
		return nil, err
	}
	r, err := x.agent.Identity(x.ctx, name)
	return &r, err
}

func history(x *exchange) (any, error) {
	name, err := x.name()
	if err != nil {
		return nil, err
	}
	r, err := x.agent.History(x.ctx, name)
	return &r, err
}

func livez(x *exchange) (any, error) {
	return &api.Liveness{Alive: true}, x.noQuery()
}

// readyz answers 503 with the names of the parts that fail. It is for probes; people read /healthz.
func readyz(x *exchange) (any, error) {
	verbose, err := x.flag("verbose")
	if err != nil {
		return nil, err
	}
	h, err := x.agent.Health(x.ctx)
	if err != nil {
		return nil, err
	}
	if !h.Ready {
		var failed []string
		for _, c := range h.Checks {
			if c.Status == "failure" {
				failed = append(failed, c.Name)
			}
		}
		return nil, fault.New(fault.Unavailable, "not ready: %s", strings.Join(failed, ", "))
	}
	r := &api.Readiness{Ready: true}
	if verbose {
		r.Checks = h.Checks
	}
	return r, nil
}

// healthz answers with the whole Health in either case, with status 503 where the daemon is not ready.
func healthz(x *exchange) (any, error) {
	if err := x.noQuery(); err != nil {
		return nil, err
	}
	h, err := x.agent.Health(x.ctx)
	if err == nil && !h.Ready {
		x.status = http.StatusServiceUnavailable
	}
	return &h, err
}

func metricsText(x *exchange) (any, error) {
	if err := x.noQuery(); err != nil {
		return nil, err
	}
	x.started = true
	x.handler.metrics.text.ServeHTTP(x.w, x.r)
	return nil, nil
}

func openAPI(x *exchange) (any, error) {
	if err := x.noQuery(); err != nil {
		return nil, err
	}
	x.write(http.StatusOK, typeJSON, api.OpenAPI())
	return nil, nil
}

func addAgent(x *exchange, q api.AddAgentRequest) (any, error) {
	r, err := x.admin.AddAgent(x.ctx, q)
	return &r, err
}

func listAgents(x *exchange) (any, error) {
	if err := x.noQuery(); err != nil {
		return nil, err
	}
	r, err := x.admin.ListAgents(x.ctx)
	return &api.AgentList{Agents: r}, err
}

func showAgent(x *exchange) (any, error) {
	name, err := x.name()
	if err != nil {
		return nil, err
	}
	r, err := x.admin.ShowAgent(x.ctx, name)
	return &r, err
}

func removeAgent(x *exchange, q api.RemoveAgentRequest) (any, error) {
	name, err := x.name()
	if err != nil {
		return nil, err
	}
	r, err := x.admin.RemoveAgent(x.ctx, name, q)
	return &r, err
}

func revokeAgent(x *exchange, q api.RevokeAgentRequest) (any, error) {
	name, err := x.name()
	if err != nil {
		return nil, err
	}
	r, err := x.admin.RevokeAgent(x.ctx, name, q)
	return &r, err
}

func setAgent(x *exchange, q api.SetAgentRequest) (any, error) {
	name, err := x.name()
	if err != nil {
		return nil, err
	}
	r, err := x.admin.SetAgent(x.ctx, name, q)
	return &r, err
}

func importAgent(x *exchange, q api.ImportAgentRequest) (any, error) {
	r, err := x.admin.ImportAgent(x.ctx, q)
	return &r, err
}

func exportPrivate(x *exchange, q api.ExportPrivateRequest) (any, error) {
	name, err := x.name()
	if err != nil {
		return nil, err
	}
	r, err := x.admin.ExportPrivate(x.ctx, name, q)
	return &r, err
}

func listKeys(x *exchange) (any, error) {
	if err := x.noQuery(); err != nil {
		return nil, err
	}
	r, err := x.admin.ListKeys(x.ctx)
	return &api.KeyList{Keys: r}, err
}

func listBackends(x *exchange) (any, error) {
	if err := x.noQuery(); err != nil {
		return nil, err
	}
	r, err := x.admin.Backends(x.ctx)
	return &api.BackendList{Backends: r}, err
}
