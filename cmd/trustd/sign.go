package main

import (
	"encoding/json"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/fault"
)

func (a *app) signCmd() *cobra.Command {
	var (
		agent, out, prev string
		message, batched bool
		lines            bool
		audience         []string
		ttl              int64
	)
	cmd := &cobra.Command{
		Use:   "sign [FILE]",
		Short: "Sign a task packet, or any JSON as a SignedMessage",
		Long: `Sign reads a task packet without a signature from FILE or standard input, has the daemon complete and sign it, and
prints the signed packet. With --message it signs any JSON value as a SignedMessage.`,
		Example: `  trustd sign --agent planner task.json > packet.json
  trustd sign --agent planner --batchable --lines tasks.ndjson > packets.ndjson
  echo '{"approve": true}' | trustd sign --agent planner --message --audience researcher`,
		Args: args(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, given []string) error {
			for _, f := range []string{"audience", "ttl", "prev"} {
				if !message && cmd.Flags().Changed(f) {
					return fault.New(fault.Usage, "--%s goes with --message", f)
				}
			}
			data, err := a.input(first(given))
			if err != nil {
				return err
			}
			var batchable *bool
			if cmd.Flags().Changed("batchable") {
				batchable = &batched
			}
			if lines {
				if message {
					return fault.New(fault.Usage, "--lines signs packets, and does not go with --message")
				}
				return a.signLines(cmd.Context(), agent, batchable, data, out)
			}
			var signed json.RawMessage
			var how api.Signed
			var digest string
			c, err := a.agent()
			if err != nil {
				return err
			}
			if message {
				r, err := c.SignMessage(cmd.Context(), api.SignMessageRequest{
					Agent: agent, Payload: data, Audience: audience, TTL: ttl, Prev: prev, Batchable: batchable,
				})
				if err != nil {
					return err
				}
				signed, how, digest = r.Message, r.Signed, r.Digest
			} else {
				r, err := c.SignPacket(cmd.Context(), api.SignPacketRequest{Agent: agent, Packet: data, Batchable: batchable})
				if err != nil {
					return err
				}
				signed, how = r.Packet, r.Signed
			}
			if out != "" {
				if err := os.WriteFile(out, append(signed, '\n'), 0o644); err != nil {
					return fmt.Errorf("writing the signed packet: %w", err)
				}
			} else if _, err := fmt.Fprintf(a.out, "%s\n", signed); err != nil {
				return err
			}
			fmt.Fprintf(a.err, "signed as %s by %s %s (%s, %s), sequence %d\n",
				how.AgentID, how.Algorithm, how.Fingerprint, how.Grade, how.Mode, how.Sequence)
			if digest != "" {
				fmt.Fprintf(a.err, "digest, for --prev of an answer: %s\n", digest)
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVarP(&agent, "agent", "a", "", "agent to sign as; not needed where the caller may act as exactly one")
	f.StringVar(&out, "out", "", "write the result to this file instead of standard output")
	f.BoolVar(&message, "message", false, "sign any JSON as a SignedMessage instead of a task packet")
	f.StringSliceVar(&audience, "audience", nil, "with --message: who it is for")
	f.Int64Var(&ttl, "ttl", 0, "with --message: seconds until it expires")
	f.BoolVar(&batched, "batchable", false, "permit a signature that covers a batch (quicker on a busy device; Python peers cannot read it);\nleft out, the agent's own setting counts")
	f.BoolVar(&lines, "lines", false, "each line of the input is a packet; they are signed together, and each is written on a line;\nin the place of one that could not be signed stands {\"error\": ...}")
	f.StringVar(&prev, "prev", "", "with --message: digest of the message that this one answers")
	return cmd
}

func first(s []string) string {
	if len(s) == 0 {
		return ""
	}
	return s[0]
}
