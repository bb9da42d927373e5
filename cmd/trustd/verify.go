package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/signer"
)

func (a *app) verifyCmd() *cobra.Command {
	var (
		audience, mode, key   string
		detail, message, once bool
		chain, lines          bool
		demands               api.Demands
	)
	cmd := &cobra.Command{
		Use:   "verify [FILE ...]",
		Short: "Verify a task packet, a SignedMessage, or a chain of them",
		Long: `Verify reads a signed packet or message from FILE or standard input and prints the decision. Exit code 0 means
ACCEPT, 3 means REJECT. A packet's nonce is spent by an ACCEPT: the same packet is refused the second time.

A SignedMessage is told from a packet by its members. --mode says against which key it is checked: registry (the default: the
key that the registry holds for the signer), key (one that you name with --key), or embedded (the key in the message
itself: this says that the message is whole and nothing of who sent it, so it never exits 0).`,
		Example: `  trustd verify packet.json
  trustd verify --mode key --key sha256:... message.json
  trustd verify --chain request.json approval.json`,
		RunE: func(cmd *cobra.Command, files []string) error {
			if len(files) == 0 {
				files = []string{"-"}
			}
			if demands.MinGrade != "" {
				if _, err := signer.ParseGrade(demands.MinGrade); err != nil {
					return fault.New(fault.Usage, "--min-grade: %s", fault.From(err).Text)
				}
			}
			v := verifier{app: a, cmd: cmd}
			if lines {
				for _, f := range []string{"mode", "key", "once", "detail", "message", "chain"} {
					if cmd.Flags().Changed(f) {
						return fault.New(fault.Usage, "--%s does not go with --lines: the lines are packets", f)
					}
				}
				if len(files) > 1 {
					return fault.New(fault.Usage, "verify --lines takes one file")
				}
				data, err := a.input(files[0])
				if err != nil {
					return err
				}
				return v.lines(data, api.VerifyPacketRequest{Audience: audience, Demands: demands})
			}
			docs := make([]json.RawMessage, len(files))
			for i, f := range files {
				data, err := a.input(f)
				if err != nil {
					return err
				}
				docs[i] = bytes.TrimSpace(data)
			}
			switch {
			case chain:
				for _, f := range []string{"mode", "key", "once", "audience", "detail", "message", "min-grade", "direct-only"} {
					if cmd.Flags().Changed(f) {
						return fault.New(fault.Usage, "--%s does not go with --chain: a chain is checked by the registry", f)
					}
				}
				return v.chain(api.VerifyChainRequest{Messages: docs})
			case len(docs) > 1:
				return fault.New(fault.Usage, "verify takes one file, or several with --chain")
			case message || mode != "" || key != "" || isMessage(docs[0]):
				return v.message(api.VerifyMessageRequest{
					Message: docs[0], Mode: mode, Key: key, Audience: audience, Detail: detail, Once: once, Demands: demands,
				})
			}
			return v.packet(api.VerifyPacketRequest{Packet: docs[0], Audience: audience, Detail: detail, Demands: demands})
		},
	}
	f := cmd.Flags()
	f.StringVar(&audience, "audience", "", "the local agent that received it")
	f.BoolVar(&detail, "detail", false, "print what is known of signer, key and view")
	f.BoolVar(&message, "message", false, "the input is a SignedMessage")
	f.StringVar(&mode, "mode", "", "registry, key or embedded (SignedMessage only)")
	f.StringVar(&key, "key", "", "with --mode key: fingerprint, base64 or PEM of the public key")
	f.BoolVar(&once, "once", false, "spend the message's nonce, so that a second verification refuses it")
	f.BoolVar(&lines, "lines", false, "each line of the input is a packet")
	f.StringVar(&demands.MinGrade, "min-grade", "", "demand a signer's key of at least this grade: hardware-attested, hardware-claimed or software")
	f.BoolVar(&demands.DirectOnly, "direct-only", false, "refuse batched signatures")
	f.BoolVar(&chain, "chain", false, "the files are SignedMessages, oldest first, each answering the one before")
	return cmd
}

// isMessage tells a SignedMessage from a packet by a member that only it has.
func isMessage(doc []byte) bool {
	var m map[string]json.RawMessage
	if json.Unmarshal(doc, &m) != nil {
		return false
	}
	_, ok := m["signer_id"]
	return ok
}

type verifier struct {
	*app
	cmd *cobra.Command
}

func (v verifier) packet(r api.VerifyPacketRequest) error {
	c, err := v.agent()
	if err != nil {
		return err
	}
	d, err := c.VerifyPacket(v.cmd.Context(), r)
	if err != nil {
		return err
	}
	if v.output == "json" {
		if err := v.printJSON(d); err != nil {
			return err
		}
	} else {
		v.verdict(d.Decision, d.Reason, d.Field, d.Text)
		_ = v.pairs("packet", d.PacketID, "form", d.Form)
		v.details(d.Details)
	}
	return refused(d.Decision)
}

func (v verifier) message(r api.VerifyMessageRequest) error {
	c, err := v.agent()
	if err != nil {
		return err
	}
	m, err := c.VerifyMessage(v.cmd.Context(), r)
	if err != nil {
		return err
	}
	if v.output == "json" {
		if err := v.printJSON(m); err != nil {
			return err
		}
	} else if m.SignatureValid && r.Mode == api.ModeEmbedded {
		fmt.Fprintln(v.out, v.colour(yellow, "signature valid, signer NOT checked"))
		v.details(m.Details)
	} else {
		v.verdict(m.Decision, m.Reason, m.Field, m.Text)
		_ = v.pairs("trust level", m.TrustLevel)
		v.details(m.Details)
	}
	return refused(m.Decision)
}

func (v verifier) chain(r api.VerifyChainRequest) error {
	c, err := v.agent()
	if err != nil {
		return err
	}
	ch, err := c.VerifyChain(v.cmd.Context(), r)
	if err != nil {
		return err
	}
	if v.output == "json" {
		if err := v.printJSON(ch); err != nil {
			return err
		}
	} else {
		rows := make([][]string, len(ch.Messages))
		for i, m := range ch.Messages {
			signer := ""
			if m.Details != nil {
				signer = m.Details.SignerID
			}
			rows[i] = []string{strconv.Itoa(i), signer, m.Decision, string(m.Reason)}
		}
		_ = v.table([]string{"MESSAGE", "SIGNER", "DECISION", "REASON"}, rows)
		if ch.Valid {
			fmt.Fprintln(v.out, v.colour(green, "the chain holds"))
		} else {
			fmt.Fprintln(v.out, v.colour(red, fmt.Sprintf("the chain breaks at message %d: %s", ch.At, ch.Reason)), printable(ch.Text))
		}
	}
	if !ch.Valid {
		return exit(exitRefused)
	}
	return nil
}

func (v verifier) verdict(decision string, reason fault.Code, field, text string) {
	if decision == api.Accept {
		fmt.Fprintln(v.out, v.colour(green, decision))
		return
	}
	where := ""
	if field != "" {
		where = " (" + field + ")"
	}
	fmt.Fprintf(v.out, "%s  %s%s: %s\n", v.colour(red, decision), printable(string(reason)), printable(where), printable(cmp.Or(text, reason.Title())))
	if h := reason.Hint(); h != "" {
		fmt.Fprintf(v.out, "  hint: %s\n", h)
	}
}

func (v verifier) details(d *api.Details) {
	if d == nil {
		return
	}
	_ = v.pairs("valid", strconv.FormatBool(d.Valid), "signer_id", d.SignerID, "fingerprint", d.Fingerprint, "signed_at", d.SignedAt,
		"algorithm", d.Algorithm, "payload_hash", d.PayloadHash, "reason_code", string(d.ReasonCode), "trust_level", d.TrustLevel,
		"grade", d.Grade, "key_epoch", strconv.FormatUint(d.KeyEpoch, 10), "mode", d.Mode,
		"view", fmt.Sprintf("%d records, %s", d.ViewSize, d.ViewHead))
}

func refused(decision string) error {
	if decision != api.Accept {
		return exit(exitRefused)
	}
	return nil
}
