// Command skew is a plugin of another version of the protocol, for tests.
package main

import (
	"context"

	"github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"
)

func main() {
	plugin.Serve(&plugin.ServeConfig{
		HandshakeConfig: plugin.HandshakeConfig{
			ProtocolVersion: 41, MagicCookieKey: "TRUSTD_PLUGIN", MagicCookieValue: "signer",
		},
		VersionedPlugins: map[int]plugin.PluginSet{41: {"signer": nothing{}}, 42: {"signer": nothing{}}},
		GRPCServer:       plugin.DefaultGRPCServer,
	})
}

type nothing struct{ plugin.NetRPCUnsupportedPlugin }

func (nothing) GRPCServer(*plugin.GRPCBroker, *grpc.Server) error { return nil }

func (nothing) GRPCClient(context.Context, *plugin.GRPCBroker, *grpc.ClientConn) (any, error) {
	return nil, nil
}
