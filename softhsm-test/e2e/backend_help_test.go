package e2e

import (
	"context"
	"testing"
	"time"

	"github.com/trustd/trustd/api"
)

// packetFor returns a request to sign a packet as an agent, to itself.
func packetFor(agent string) api.SignPacketRequest {
	return api.SignPacketRequest{Agent: agent, Packet: task("agent:nobody")}
}

// eventuallyWithin polls until fn returns nil, for as long as limit.
func eventuallyWithin(t *testing.T, what string, limit time.Duration, fn func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := fn()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s: not within %v: %v", what, limit, err)
		case <-tick.C:
		}
	}
}
