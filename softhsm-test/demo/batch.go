package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/trustd/trustd/softhsm-test/lab"
)

const inBatch = 64

// batches shows one signature of the TPM over many packets, and what a verifier makes of it.
func (d *demo) batches(planner agent) {
	task := fmt.Sprintf(`{"task_id":"task-8","to_agent":%q,"intent":"Fetch one page","permissions":{"allowed_actions":["read"]}}`+"\n", planner.Alias)
	signed := d.As(d.ctx, researcherUID, []byte(strings.Repeat(task, inBatch)), "sign", "--agent", "researcher", "--batchable", "--lines")
	packets := strings.SplitAfter(strings.TrimSuffix(signed.Stdout, "\n"), "\n")
	d.row(fmt.Sprintf("sign %d packets at once", inBatch), "researcher", fmt.Sprint(inBatch), fmt.Sprint(len(packets)), lastLine(signed.Stderr))
	if len(packets) != inBatch {
		return
	}
	altered := strings.Replace(packets[0], `"signature":"trustd-batch.v1:AAA`, `"signature":"trustd-batch.v1:AAE`, 1)
	d.verify("proof altered", "REJECT", "invalid_signature", []byte(altered), plannerUID, "planner")
	strict := d.As(d.ctx, plannerUID, []byte(packets[0]), "verify", "--direct-only", "-o", "json")
	d.row("direct signatures only", "planner", "assurance_too_low", reason(strict), "what this verifier asks for, on top of the host's policy")
	all := d.As(d.ctx, plannerUID, []byte(signed.Stdout), "verify", "--lines")
	d.row(fmt.Sprintf("verify all %d", inBatch), "planner", "0", fmt.Sprint(all.Code), lastLine(all.Stdout))
}

// faults takes the TPM and then the token away, and gives each back, under a daemon that goes on running.
func (d *demo) faults(planner, researcher agent) {
	try := func(uid uint32, to agent) lab.Result {
		task := fmt.Sprintf(`{"task_id":"task-9","to_agent":%q,"intent":"Go on","permissions":{"allowed_actions":["read"]}}`, to.Alias)
		return d.As(d.ctx, uid, []byte(task), "sign", "-o", "json")
	}
	pid := d.Daemon().Pid()
	d.KillTPM()
	d.row("kill the TPM, sign", "researcher", "device_lost", code(try(researcherUID, planner)), "retryable; the planner's token is not concerned")
	d.row("sign meanwhile", "planner", "signed", signedOr(try(plannerUID, researcher)), "")
	if err := d.RestartTPM(); err != nil {
		d.row("start the TPM again", "", "started", err.Error(), "")
		return
	}
	d.row("start it again, sign", "researcher", "signed", d.back(func() lab.Result { return try(researcherUID, planner) }), "no restart of the daemon")

	tokens := filepath.Join(d.Dir, "tokens")
	if err := os.Rename(tokens, tokens+".away"); err != nil {
		d.row("take the token away", "", "away", err.Error(), "")
		return
	}
	gone := code(try(plannerUID, researcher))
	d.row("take the token away, sign", "planner", "device_lost", gone, "retryable; nothing is forgotten")
	if err := os.Rename(tokens+".away", tokens); err != nil {
		d.row("give it back", "", "back", err.Error(), "")
		return
	}
	d.row("give it back, sign", "planner", "signed", d.back(func() lab.Result { return try(plannerUID, researcher) }), fmt.Sprintf("same daemon: %v", d.Daemon().Pid() == pid))
}

// back repeats a command until it succeeds, for a while.
func (d *demo) back(try func() lab.Result) string {
	end := time.Now().Add(15 * time.Second)
	for {
		r := try()
		if r.Code == 0 || time.Now().After(end) || d.ctx.Err() != nil {
			return signedOr(r)
		}
		select {
		case <-d.ctx.Done():
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// reason returns why a command's document says REJECT.
func reason(r lab.Result) string {
	var v struct{ Reason string }
	_ = json.Unmarshal(bytes.TrimSpace([]byte(r.Stdout)), &v)
	return v.Reason
}
