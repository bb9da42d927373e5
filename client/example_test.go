package client_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/api/server"
	"github.com/trustd/trustd/api/server/servertest"
	"github.com/trustd/trustd/client"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/clock"
)

// serve starts a daemon in memory with the agents planner and researcher, and returns the path of its socket.
func serve() (socket string, stop func()) {
	dir, err := os.MkdirTemp("", "trustd")
	if err != nil {
		log.Fatal(err)
	}
	m := servertest.NewMemory(clock.System())
	for _, id := range []string{"planner", "researcher"} {
		r := api.AddAgentRequest{AgentID: id, Aliases: []string{"agent:" + id}}
		if _, err := m.AddAgent(context.Background(), r); err != nil {
			log.Fatal(err)
		}
	}
	socket = filepath.Join(dir, "s")
	_, end, err := servertest.Serve(socket, server.Config{Agent: m, Admin: m})
	if err != nil {
		log.Fatal(err)
	}
	return socket, func() {
		if err := end(); err != nil {
			log.Fatal(err)
		}
		os.RemoveAll(dir)
	}
}

const task = `{"task_id":"t-1","to_agent":"agent:researcher","intent":"search",
	"permissions":{"allowed_actions":["web.search"]},"risk_level":"read"}`

func ExampleClient_Sign() {
	socket, stop := serve()
	defer stop()

	c := client.New(socket)
	defer c.Close()
	ctx := context.Background()

	signed, err := c.Sign(ctx, "planner", task)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(signed.AgentID, signed.Algorithm, signed.Sequence)

	_, err = c.Sign(ctx, "nobody", task)
	fmt.Println(errors.Is(err, fault.Denied))
	// Output:
	// planner ed25519 1
	// true
}

func ExampleClient_SignBatch() {
	socket, stop := serve()
	defer stop()

	c := client.New(socket)
	defer c.Close()

	results, err := c.SignBatch(context.Background(), "planner", task, `{"task_id":"t-2"}`, task)
	if err != nil {
		log.Fatal(err)
	}
	for _, r := range results {
		if r.Error != nil {
			fmt.Println("refused:", r.Error.Code, r.Error.Field)
			continue
		}
		fmt.Println("signed:", r.Sequence)
	}
	// Output:
	// signed: 1
	// refused: malformed intent
	// signed: 2
}

func ExampleClient_SignStream() {
	socket, stop := serve()
	defer stop()

	c := client.New(socket)
	defer c.Close()

	s, err := c.SignStream(context.Background())
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close()
	go func() { // sends while the loop below receives
		for range 3 {
			if err := s.Send(api.SignPacketRequest{Agent: "planner", Packet: []byte(task)}); err != nil {
				return // Recv says why
			}
		}
		s.CloseSend()
	}()
	for {
		r, err := s.Recv()
		if err == io.EOF {
			break
		}
		if err != nil {
			log.Fatal(err)
		}
		if r.Error != nil {
			log.Fatal(r.Error.Err())
		}
		fmt.Println("signed:", r.Sequence)
	}
	// Output:
	// signed: 1
	// signed: 2
	// signed: 3
}

func ExampleClient_Verify() {
	socket, stop := serve()
	defer stop()

	c := client.New(socket)
	defer c.Close()
	ctx := context.Background()

	signed, err := c.Sign(ctx, "planner", task)
	if err != nil {
		log.Fatal(err)
	}
	for range 2 {
		d, err := c.Verify(ctx, "researcher", signed.Packet)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%s %q\n", d.Decision, d.Reason)
	}
	// Output:
	// ACCEPT ""
	// REJECT "replay_detected"
}

func ExampleClient_VerifyBatch() {
	socket, stop := serve()
	defer stop()

	c := client.New(socket)
	defer c.Close()
	ctx := context.Background()

	signed, err := c.Sign(ctx, "planner", task)
	if err != nil {
		log.Fatal(err)
	}
	results, err := c.VerifyBatch(ctx, "", signed.Packet, `{"packet_id":"p"}`)
	if err != nil {
		log.Fatal(err)
	}
	for _, r := range results {
		fmt.Printf("%s %q %q\n", r.Decision.Decision, r.Reason, r.Field)
	}
	// Output:
	// ACCEPT "" ""
	// REJECT "malformed" "expires_at"
}

func ExampleClient_VerifyStream() {
	socket, stop := serve()
	defer stop()

	c := client.New(socket)
	defer c.Close()
	ctx := context.Background()

	signed, err := c.Sign(ctx, "planner", task)
	if err != nil {
		log.Fatal(err)
	}
	s, err := c.VerifyStream(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close()
	for range 2 { // few enough to be sent before the first is received
		if err := s.Send(api.VerifyPacketRequest{Packet: signed.Packet}); err != nil {
			log.Fatal(err)
		}
	}
	s.CloseSend()
	for {
		r, err := s.Recv()
		if err == io.EOF {
			break
		}
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%s %q\n", r.Decision.Decision, r.Reason)
	}
	// Output:
	// ACCEPT ""
	// REJECT "replay_detected"
}

func ExampleClient_VerifyMessage() {
	socket, stop := serve()
	defer stop()

	c := client.New(socket)
	defer c.Close()
	ctx := context.Background()

	signed, err := c.SignMessage(ctx, api.SignMessageRequest{Agent: "planner", Payload: []byte(`{"found":3}`)})
	if err != nil {
		log.Fatal(err)
	}
	known, err := c.VerifyMessage(ctx, api.VerifyMessageRequest{Message: signed.Message})
	if err != nil {
		log.Fatal(err)
	}
	anyone, err := c.VerifyMessage(ctx, api.VerifyMessageRequest{Message: signed.Message, Mode: api.ModeEmbedded})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(known.Decision, known.SignatureValid, known.SignerChecked)
	fmt.Println(anyone.Decision, anyone.SignatureValid, anyone.SignerChecked)
	// Output:
	// ACCEPT true true
	// REJECT true false
}

func ExampleClient_VerifyChain() {
	socket, stop := serve()
	defer stop()

	c := client.New(socket)
	defer c.Close()
	ctx := context.Background()

	ask, err := c.SignMessage(ctx, api.SignMessageRequest{Agent: "planner", Payload: []byte(`"how many?"`)})
	if err != nil {
		log.Fatal(err)
	}
	answer, err := c.SignMessage(ctx, api.SignMessageRequest{Agent: "researcher", Payload: []byte(`3`), Prev: ask.Digest})
	if err != nil {
		log.Fatal(err)
	}
	for _, messages := range []api.VerifyChainRequest{
		{Messages: []json.RawMessage{ask.Message, answer.Message}},
		{Messages: []json.RawMessage{answer.Message, ask.Message}},
	} {
		v, err := c.VerifyChain(ctx, messages)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%t %q\n", v.Valid, v.Reason)
	}
	// Output:
	// true ""
	// false "broken_chain"
}

func ExampleClient_Whoami() {
	socket, stop := serve()
	defer stop()

	c := client.New(socket)
	defer c.Close()

	me, err := c.Whoami(context.Background(), false)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(int(me.PID) == os.Getpid())
	for _, g := range me.Agents {
		fmt.Println(g.AgentID, g.Verbs)
	}
	// Output:
	// true
	// planner [sign verify]
	// researcher [sign verify]
}

func ExampleClient_Identity() {
	socket, stop := serve()
	defer stop()

	c := client.New(socket)
	defer c.Close()
	ctx := context.Background()

	byAlias, err := c.Identity(ctx, "agent:planner")
	if err != nil {
		log.Fatal(err)
	}
	byKey, err := c.Identity(ctx, byAlias.Fingerprint)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(byAlias.AgentID, byKey.AgentID, byKey.Status)
	// Output:
	// planner planner active
}

func ExampleClient_History() {
	socket, stop := serve()
	defer stop()

	c := client.New(socket)
	defer c.Close()
	ctx := context.Background()

	if _, err := c.Sign(ctx, "planner", task); err != nil {
		log.Fatal(err)
	}
	h, err := c.History(ctx, "planner")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(h.AgentID, h.Sequence, h.Size)
	// Output:
	// planner 1 1
}

func ExampleNewAdmin() {
	socket, stop := serve()
	defer stop()

	// A retry is sent under the same idempotency key, so that it registers nothing twice.
	a := client.NewAdmin(socket, client.WithRetry(3))
	defer a.Close()
	ctx := context.Background()

	d, err := a.AddAgent(ctx, api.AddAgentRequest{AgentID: "writer"})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(d.AgentID, d.Algorithm, d.KeyState)

	_, err = a.AddAgent(ctx, api.AddAgentRequest{AgentID: "writer"})
	fmt.Println(errors.Is(err, fault.AlreadyExists))

	if _, err := a.RevokeAgent(ctx, "writer", api.RevokeAgentRequest{Code: "superseded"}); err != nil {
		log.Fatal(err)
	}
	agents, err := a.ListAgents(ctx)
	if err != nil {
		log.Fatal(err)
	}
	for _, d := range agents {
		fmt.Println(d.AgentID, d.Status)
	}
	// Output:
	// writer ed25519 ready
	// true
	// planner active
	// researcher active
	// writer revoked
}
