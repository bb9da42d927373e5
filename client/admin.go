package client

import (
	"context"

	"github.com/trustd/trustd/api"
)

// An Admin calls the daemon over admin.sock, which serves all that agent.sock does as well.
type Admin struct{ *Client }

var (
	_ api.Agent = (*Admin)(nil)
	_ api.Admin = (*Admin)(nil)
)

// NewAdmin returns a client of the admin socket at the given path; "" is $TRUSTD_ADMIN_SOCKET or DefaultAdminSocket.
func NewAdmin(socket string, options ...Option) *Admin {
	return &Admin{New(pick(socket, EnvAdminSocket, DefaultAdminSocket), options...)}
}

// change makes a call that changes state, under the idempotency key of ctx (api.IdempotencyKey).
func (a *Admin) change(ctx context.Context, method, path string, in, out any) error {
	body, err := marshal(in)
	if err != nil {
		return err
	}
	key, err := a.keyOf(ctx)
	if err != nil {
		return err
	}
	return a.do(ctx, call{method: method, path: path, body: body, key: key, again: key != ""}, out)
}

// AddAgent makes a key and registers an agent.
func (a *Admin) AddAgent(ctx context.Context, r api.AddAgentRequest) (out api.AgentDetail, err error) {
	err = a.change(ctx, "POST", "/v1/agents", r, &out)
	return out, err
}

// ListAgents lists the agents that the registry knows.
func (a *Admin) ListAgents(ctx context.Context) ([]api.AgentDetail, error) {
	var out api.AgentList
	err := a.get(ctx, "/v1/agents", &out)
	return out.Agents, err
}

// ShowAgent returns one agent by id, alias or fingerprint.
func (a *Admin) ShowAgent(ctx context.Context, name string) (out api.AgentDetail, err error) {
	path, err := under("/v1/agents/", name, "")
	if err != nil {
		return out, err
	}
	err = a.get(ctx, path, &out)
	return out, err
}

// RemoveAgent decommissions an agent and destroys its key.
func (a *Admin) RemoveAgent(
	ctx context.Context, name string, r api.RemoveAgentRequest,
) (out api.AgentDetail, err error) {
	path, err := under("/v1/agents/", name, "")
	if err != nil {
		return out, err
	}
	err = a.change(ctx, "DELETE", path, r, &out)
	return out, err
}

// RevokeAgent refuses an agent's messages from now on.
func (a *Admin) RevokeAgent(
	ctx context.Context, name string, r api.RevokeAgentRequest,
) (out api.AgentDetail, err error) {
	path, err := under("/v1/agents/", name, "/revoke")
	if err != nil {
		return out, err
	}
	err = a.change(ctx, "POST", path, r, &out)
	return out, err
}

// ImportAgent takes in an identity.
func (a *Admin) ImportAgent(ctx context.Context, r api.ImportAgentRequest) (out api.AgentDetail, err error) {
	err = a.change(ctx, "POST", "/v1/agents/import", r, &out)
	return out, err
}

// ExportPrivate returns a soft key under a passphrase.
func (a *Admin) ExportPrivate(
	ctx context.Context, name string, r api.ExportPrivateRequest,
) (out api.ExportPrivateReply, err error) {
	path, err := under("/v1/agents/", name, "/export-private")
	if err != nil {
		return out, err
	}
	err = a.post(ctx, call{path: path, again: true}, r, &out)
	return out, err
}

// SetAgent changes how the host treats one of its agents.
func (a *Admin) SetAgent(ctx context.Context, name string, r api.SetAgentRequest) (out api.AgentDetail, err error) {
	path, err := under("/v1/agents/", name, "/set")
	if err != nil {
		return out, err
	}
	err = a.change(ctx, "POST", path, r, &out)
	return out, err
}

// RecheckKey has an agent's key sign a test. An orphaned key that does is used again.
func (a *Admin) RecheckKey(ctx context.Context, name string) (out api.AgentDetail, err error) {
	err = a.act(ctx, "/v1/agents/", name, "/recheck", &out)
	return out, err
}

// act makes a call that changes state and has no body.
func (a *Admin) act(ctx context.Context, base, name, verb string, out any) error {
	path, err := under(base, name, verb)
	if err != nil {
		return err
	}
	key, err := a.keyOf(ctx)
	if err != nil {
		return err
	}
	return a.do(ctx, call{method: "POST", path: path, key: key, again: key != ""}, out)
}

// ListKeys lists the keys on all backends.
func (a *Admin) ListKeys(ctx context.Context) ([]api.Key, error) {
	var out api.KeyList
	err := a.get(ctx, "/v1/keys", &out)
	return out.Keys, err
}

// Backends lists the key backends.
func (a *Admin) Backends(ctx context.Context) ([]api.Backend, error) {
	var out api.BackendList
	err := a.get(ctx, "/v1/backends", &out)
	return out.Backends, err
}

// ShowBackend returns one key backend.
func (a *Admin) ShowBackend(ctx context.Context, name string) (out api.Backend, err error) {
	path, err := under("/v1/backends/", name, "")
	if err != nil {
		return out, err
	}
	err = a.get(ctx, path, &out)
	return out, err
}

// UnlockBackend has a backend try the authorisation that its device refused, exactly once.
func (a *Admin) UnlockBackend(ctx context.Context, name string) (out api.Backend, err error) {
	err = a.act(ctx, "/v1/backends/", name, "/unlock", &out)
	return out, err
}

// ResetCanary takes a backend's device as it is.
func (a *Admin) ResetCanary(ctx context.Context, name string) (out api.Backend, err error) {
	err = a.act(ctx, "/v1/backends/", name, "/reset-canary", &out)
	return out, err
}
