//go:build cgo

package main

import (
	"fmt"
	"os"
	"sync"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/client"
	"github.com/trustd/trustd/signer/tpm"
	softhsmtest "github.com/trustd/trustd/softhsm-test"
	"github.com/trustd/trustd/softhsm-test/lab"
)

// tpm measures signing on a swtpm over the socket beside TPM2_Sign and a verification on another swtpm: one
// connection is all that a swtpm takes.
func (b *bench) tpm() error {
	l, err := b.lab(lab.Options{})
	if err != nil {
		return err
	}
	defer l.Close()
	dir, err := os.MkdirTemp("", "trustd-bench-tpm-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	device, err := softhsmtest.StartTPM(dir)
	if err != nil {
		return err
	}
	defer device.Stop()
	raw, err := tpm.OpenRaw(device.Path())
	if err != nil {
		return err
	}
	defer raw.Close()
	uid := uint32(os.Getuid())
	d, err := client.NewAdmin(l.AdminSocket).AddAgent(b.ctx, api.AddAgentRequest{AgentID: "chip", Backend: "tpm", Algorithm: "ecdsa-p256",
		Bindings: []api.Binding{{Selector: api.Selector{UID: &uid}}}})
	if err != nil {
		return err
	}
	agent, msg, draft := client.New(l.AgentSocket), make([]byte, 800), task(d.Aliases[0])
	request := api.SignPacketRequest{Agent: "chip", Packet: draft}
	one := func() error { _, err := agent.SignPacket(b.ctx, request); return err }
	const callers, each = 4, 16
	reqs := make([]api.SignPacketRequest, perCall)
	for i := range reqs {
		reqs[i] = request
	}
	c := newContest()
	c.enter("raw", func() error {
		for range callers * each {
			if err := raw.SignAndVerify(msg); err != nil {
				return err
			}
		}
		return nil
	})
	c.enter("single", func() error {
		for range callers * each {
			if err := one(); err != nil {
				return err
			}
		}
		return nil
	})
	c.enter("callers", func() error {
		var wg sync.WaitGroup
		errs := make([]error, callers)
		for i := range errs {
			wg.Go(func() {
				for range each {
					if errs[i] = one(); errs[i] != nil {
						return
					}
				}
			})
		}
		wg.Wait()
		for _, err := range errs {
			if err != nil {
				return err
			}
		}
		return nil
	})
	c.enter("batch", func() error {
		for _, r := range agent.SignPackets(b.ctx, reqs) {
			if r.Error != nil {
				return r.Error.Err()
			}
		}
		return nil
	})
	if err := c.run(12, 2); err != nil {
		return err
	}
	base := c.rate("raw", callers*each)
	b.add("tpm/raw-sign-verify-loop/ecdsa-p256/rate", base, "1/s", "itself", base, "", nil)
	for _, r := range []struct{ row, name string }{
		{"tpm/socket/sign/ecdsa-p256/1-caller/rate", "single"},
		{fmt.Sprintf("tpm/socket/sign/ecdsa-p256/%d-callers/rate", callers), "callers"},
		{"tpm/socket/sign/ecdsa-p256/batch64/rate", "batch"},
	} {
		got := c.rate(r.name, callers*each)
		b.add(r.row, got, "1/s", "loop of TPM2_Sign + verify", base, ">= 75 % of the loop", met(got >= 0.75*base))
	}
	return nil
}
