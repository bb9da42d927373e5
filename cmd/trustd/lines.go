package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strconv"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/fault"
)

// documents cuts a file into its lines, each of which is a document; empty ones do not count.
func documents(data []byte) []json.RawMessage {
	var out []json.RawMessage
	for line := range bytes.Lines(data) {
		if line = bytes.TrimSpace(line); len(line) > 0 {
			out = append(out, line)
		}
	}
	return out
}

// inLots hands the documents on in lots that one request may hold.
func inLots(docs []json.RawMessage, do func(from int, lot []json.RawMessage) error) error {
	for from := 0; from < len(docs); {
		to, size := from, 0
		for to < len(docs) && to-from < api.MaxBatch && (to == from || size+len(docs[to]) <= api.MaxBatchBody/2) {
			size += len(docs[to])
			to++
		}
		if err := do(from, docs[from:to]); err != nil {
			return err
		}
		from = to
	}
	return nil
}

// signLines signs a packet on each line and writes each on a line of its own. A line that cannot be signed is
// reported and leaves none.
func (a *app) signLines(ctx context.Context, agent string, batchable *bool, data []byte, out string) error {
	c, err := a.agent()
	if err != nil {
		return err
	}
	var signed bytes.Buffer
	var failed error
	modes, largest, n := map[string]int{}, 0, 0
	docs := documents(data)
	err = inLots(docs, func(from int, lot []json.RawMessage) error {
		requests := make([]api.SignPacketRequest, len(lot))
		for i, d := range lot {
			requests[i] = api.SignPacketRequest{Agent: agent, Packet: d, Batchable: batchable}
		}
		for i, r := range c.SignPackets(ctx, requests) {
			if r.Error != nil {
				failed = r.Error.Err()
				fmt.Fprintf(a.err, "line %d: %s\n", from+i+1, printable(failed.Error()))
				continue
			}
			signed.Write(r.Packet)
			signed.WriteByte('\n')
			modes[r.Mode]++
			largest = max(largest, r.BatchSize)
			n++
		}
		return nil
	})
	if err != nil {
		return err
	}
	if out != "" {
		err = os.WriteFile(out, signed.Bytes(), 0o644)
	} else {
		_, err = a.out.Write(signed.Bytes())
	}
	if err != nil {
		return fmt.Errorf("writing the signed packets: %w", err)
	}
	fmt.Fprintf(a.err, "signed %d of %d packets: %d batched (batches of up to %d), %d direct\n", n, len(docs), modes["batched"], largest, modes["direct"])
	return failed
}

// lines verifies the packet on each line.
func (v verifier) lines(data []byte, r api.VerifyPacketRequest) error {
	c, err := v.agent()
	if err != nil {
		return err
	}
	docs := documents(data)
	results := make([]api.VerifyPacketResult, 0, len(docs))
	err = inLots(docs, func(_ int, lot []json.RawMessage) error {
		requests := make([]api.VerifyPacketRequest, len(lot))
		for i, d := range lot {
			requests[i] = r
			requests[i].Packet = d
		}
		results = append(results, c.VerifyPackets(v.cmd.Context(), requests)...)
		return nil
	})
	if err != nil {
		return err
	}
	var failed error
	rows, accepted := make([][]string, len(results)), 0
	for i, res := range results {
		switch {
		case res.Error != nil:
			failed = res.Error.Err()
			rows[i] = []string{strconv.Itoa(i + 1), "", "", string(res.Error.Code)}
		default:
			rows[i] = []string{strconv.Itoa(i + 1), res.PacketID, res.Decision.Decision, string(res.Reason)}
			if res.Decision.Decision == api.Accept {
				accepted++
			} else if failed == nil {
				failed = exit(exitRefused)
			}
		}
	}
	if v.output == "json" {
		if err := v.printJSON(api.VerifyPacketsReply{Results: results}); err != nil {
			return err
		}
	} else {
		_ = v.table([]string{"LINE", "PACKET", "DECISION", "REASON"}, rows)
		fmt.Fprintf(v.out, "%d of %d accepted\n", accepted, len(results))
	}
	if len(docs) == 0 {
		return fault.New(fault.Malformed, "there is no packet on any line")
	}
	return failed
}
