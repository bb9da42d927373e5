package main

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/client"
	"github.com/trustd/trustd/signer"
)

func (a *app) backendCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "backend",
		Short: "List key backends, show one, unlock one, take a replaced device",
		Args:  args(cobra.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(
		a.backendListCmd(),
		a.oneBackendCmd("show NAME", "Show a backend: state, problem and remedy, failures, limits", "",
			func(cmd *cobra.Command, c *client.Admin, name string) (api.Backend, error) {
				return c.ShowBackend(cmd.Context(), name)
			}),
		a.oneBackendCmd("unlock NAME", "Try a refused PIN or authorisation once more",
			`Unlock reads the PIN anew and shows it to the device exactly once. Correct the PIN source first: a device locks for good
after a few wrong tries. A refusal stands, and nothing is tried again until the next unlock.`,
			func(cmd *cobra.Command, c *client.Admin, name string) (api.Backend, error) {
				return c.UnlockBackend(cmd.Context(), name)
			}),
		a.oneBackendCmd("reset-canary NAME", "Take a device as it is, although it does not hold the canary key any more",
			`The daemon proves that a backend works with a key of its own on its device. Where that key is gone, the device was
emptied or replaced, and the backend counts as degraded. Reset-canary says that this is meant to be so: another key is
made. Where the key still signs, nothing changes. Agents' keys that went with it stay lost.`,
			func(cmd *cobra.Command, c *client.Admin, name string) (api.Backend, error) {
				return c.ResetCanary(cmd.Context(), name)
			}),
	)
	return cmd
}

func (a *app) backendListCmd() *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the key backends and how they fare",
		Args:    args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.admin()
			if err != nil {
				return err
			}
			all, err := c.Backends(cmd.Context())
			if err != nil {
				return err
			}
			if a.output == "json" {
				return a.printJSON(all)
			}
			rows := make([][]string, len(all))
			for i, b := range all {
				var failures int64
				for _, n := range b.Failures {
					failures += n
				}
				rows[i] = []string{b.Name, b.Kind, b.State, timeText(b.Since), timeText(b.LastSignature),
					strconv.FormatInt(failures, 10), strconv.FormatInt(b.Waiting, 10), b.Device}
			}
			return a.table([]string{"BACKEND", "KIND", "STATE", "SINCE", "LAST SIGNATURE", "FAILURES", "WAITING", "DEVICE"}, rows)
		},
	}
}

// oneBackendCmd makes a command that asks the daemon something whose answer is one backend, and shows it.
func (a *app) oneBackendCmd(
	use, short, long string, ask func(*cobra.Command, *client.Admin, string) (api.Backend, error),
) *cobra.Command {
	return &cobra.Command{
		Use:   use,
		Short: short,
		Long:  long,
		Args:  args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, given []string) error {
			c, err := a.admin()
			if err != nil {
				return err
			}
			b, err := ask(cmd, c, given[0])
			if err != nil {
				return err
			}
			return a.showBackend(b)
		},
	}
}

func (a *app) showBackend(b api.Backend) error {
	if a.output == "json" {
		return a.printJSON(b)
	}
	state := b.State
	if b.Since != nil {
		state += " since " + timeText(b.Since)
	}
	kv := []string{"backend", b.Name, "kind", b.Kind, "device", b.Device, "default", strconv.FormatBool(b.Default),
		"state", state, "problem", b.Problem, "remedy", b.Remedy, "grade", b.Grade, "algorithms", strings.Join(b.Algorithms, " "),
		"last signature", timeText(b.LastSignature), "waiting", strconv.FormatInt(b.Waiting, 10)}
	if s := b.Signatures; s != nil {
		kv = append(kv, "signatures", fmt.Sprintf("%d direct, %d batched of %d messages", s.Direct, s.Batches, s.Batched))
	}
	kv = append(kv, "restarts", strconv.FormatInt(b.Restarts, 10))
	for _, class := range signer.Classes() {
		if n := b.Failures[string(class)]; n > 0 {
			kv = append(kv, "failures "+string(class), strconv.FormatInt(n, 10))
		}
	}
	if c := b.Canary; c != nil {
		kv = append(kv, "canary", canaryText(c), "canary key", c.KeyID)
	}
	for _, name := range slices.Sorted(maps.Keys(b.Limits)) {
		kv = append(kv, "limit "+name, b.Limits[name])
	}
	if err := a.pairs(kv...); err != nil {
		return err
	}
	a.showMechanisms(b.Mechanisms)
	return nil
}

func canaryText(c *api.Canary) string {
	switch {
	case c.Gone:
		return "gone from the device"
	case c.KeyID == "":
		return "not made yet"
	}
	return fmt.Sprintf("%d signed, %d failed, the last in %v", c.Signed, c.Failed, time.Duration(c.Took)*time.Microsecond)
}

// timeText returns a time as it is shown in tables; "" for none.
func timeText(t *time.Time) string {
	if t == nil {
		return ""
	}
	return t.Format(time.RFC3339)
}
