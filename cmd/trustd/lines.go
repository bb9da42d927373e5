package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/fault"
)

var errNoLines = fault.New(fault.Malformed, "there is no packet on any line")

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

// A linePrinter reports what is wrong with lines, those that follow each other with the same in one.
type linePrinter struct {
	out         io.Writer
	what        string
	first, last int
}

func (p *linePrinter) add(line int, what string) {
	if p.what == what && line == p.last+1 {
		p.last = line
		return
	}
	p.flush()
	p.what, p.first, p.last = what, line, line
}

func (p *linePrinter) flush() {
	switch {
	case p.what == "":
	case p.first == p.last:
		fmt.Fprintf(p.out, "line %d: %s\n", p.first, printable(p.what))
	default:
		fmt.Fprintf(p.out, "lines %d-%d: %s\n", p.first, p.last, printable(p.what))
	}
	p.what = ""
}

// signLines signs a packet on each line and writes each on a line of its own. In the place of one that could not be
// signed stands {"error": ...}, so that lines keep their numbers.
func (a *app) signLines(ctx context.Context, agent string, batchable *bool, data []byte, out string) error {
	c, err := a.agent()
	if err != nil {
		return err
	}
	var signed bytes.Buffer
	var failed error
	wrong := linePrinter{out: a.err}
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
				wrong.add(from+i+1, failed.Error())
				if err := json.NewEncoder(&signed).Encode(map[string]*api.Problem{"error": r.Error}); err != nil {
					return fmt.Errorf("writing an error: %w", err)
				}
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
	wrong.flush()
	batches := ""
	if largest > 0 {
		batches = fmt.Sprintf(" (batches of up to %d)", largest)
	}
	fmt.Fprintf(a.err, "signed %d of %d packets: %d batched%s, %d direct\n", n, len(docs), modes["batched"], batches, modes["direct"])
	if len(docs) == 0 {
		return errNoLines
	}
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
	wrong := linePrinter{out: v.err}
	rows, accepted := make([][]string, len(results)), 0
	for i, res := range results {
		switch {
		case res.Error != nil:
			failed = res.Error.Err()
			wrong.add(i+1, failed.Error())
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
	wrong.flush()
	if len(docs) == 0 {
		return errNoLines
	}
	return failed
}
