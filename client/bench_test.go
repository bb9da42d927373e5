package client_test

import (
	"context"
	"io"
	"sync"
	"testing"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/api/server"
	"github.com/trustd/trustd/api/server/servertest"
	"github.com/trustd/trustd/client"
	"github.com/trustd/trustd/internal/clock"
)

// echo answers at once, so that what is left is the cost of the socket.
type echo struct{ api.Agent }

func (echo) SignPacket(_ context.Context, r api.SignPacketRequest) (api.SignPacketReply, error) {
	return api.SignPacketReply{Packet: r.Packet, Signed: api.Signed{AgentID: r.Agent}}, nil
}

func (e echo) SignPackets(ctx context.Context, rs []api.SignPacketRequest) []api.SignPacketResult {
	out := make([]api.SignPacketResult, len(rs))
	for i, r := range rs {
		reply, _ := e.SignPacket(ctx, r)
		out[i].SignPacketReply = &reply
	}
	return out
}

func benchmarkSocket(b *testing.B) (*client.Client, []byte) {
	m := servertest.NewMemory(clock.System())
	servertest.MustAdd(b, m, "planner", "agent:planner")
	servertest.MustAdd(b, m, "researcher", "agent:researcher")
	signed, err := m.SignPacket(context.Background(), api.SignPacketRequest{Agent: "planner", Packet: []byte(task)})
	if err != nil {
		b.Fatal(err)
	}
	c := client.New(servertest.Start(b, server.Config{Agent: echo{m}}).Path)
	b.Cleanup(c.Close)
	return c, signed.Packet
}

// BenchmarkSocket is what the socket adds to a call: one after the other, in batches of 64, and on a stream.
func BenchmarkSocket(b *testing.B) {
	ctx := context.Background()
	b.Run("single", func(b *testing.B) {
		c, p := benchmarkSocket(b)
		for b.Loop() {
			if _, err := c.Sign(ctx, "planner", p); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("batch64", func(b *testing.B) {
		c, p := benchmarkSocket(b)
		ps := make([]any, 64)
		for i := range ps {
			ps[i] = p
		}
		for b.Loop() {
			rs, err := c.SignBatch(ctx, "planner", ps...)
			if err != nil || rs[63].Error != nil {
				b.Fatal(err, rs[63].Error)
			}
		}
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(64*b.N), "ns/packet")
	})
	b.Run("stream", func(b *testing.B) {
		c, p := benchmarkSocket(b)
		s, err := c.SignStream(ctx)
		if err != nil {
			b.Fatal(err)
		}
		defer s.Close()
		var sending sync.WaitGroup
		sending.Go(func() {
			for range b.N {
				if s.Send(api.SignPacketRequest{Agent: "planner", Packet: p}) != nil {
					return
				}
			}
			s.CloseSend()
		})
		for {
			r, err := s.Recv()
			if err == io.EOF {
				break
			}
			if err != nil || r.Error != nil {
				b.Fatal(err, r.Error)
			}
		}
		sending.Wait()
	})
}
