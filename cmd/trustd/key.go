package main

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/client"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/config"
	"github.com/trustd/trustd/internal/daemon"
	"github.com/trustd/trustd/signer"
)

func (a *app) keyCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "key",
		Short: "List keys, show one, have a lost one checked, probe a backend",
		Args:  args(cobra.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.keyListCmd(), a.keyShowCmd(), a.keyRecheckCmd(), a.keyProbeCmd())
	return cmd
}

func (a *app) keyListCmd() *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the keys on all backends, also those that others made",
		Args:    args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			keys, err := a.keys(cmd)
			if err != nil {
				return err
			}
			if a.output == "json" {
				return a.printJSON(keys)
			}
			rows := make([][]string, len(keys))
			for i, k := range keys {
				rows[i] = []string{k.Backend, k.Algorithm, k.State, k.UsedBy, k.Grade, k.Origin, short(k.Fingerprint), k.URI}
			}
			return a.table([]string{"BACKEND", "ALGORITHM", "STATE", "USED BY", "GRADE", "ORIGIN", "FINGERPRINT", "URI"}, rows)
		},
	}
}

func (a *app) keys(cmd *cobra.Command) ([]api.Key, error) {
	c, err := a.admin()
	if err != nil {
		return nil, err
	}
	return c.ListKeys(cmd.Context())
}

func (a *app) keyShowCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "show URI|FINGERPRINT",
		Short: "Show one key and the attributes that its device reports",
		Args:  args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, given []string) error {
			keys, err := a.keys(cmd)
			if err != nil {
				return err
			}
			i := slices.IndexFunc(keys, func(k api.Key) bool { return k.URI == given[0] || k.Fingerprint == given[0] })
			if i < 0 {
				return fault.New(fault.KeyNotFound, "no backend holds a key of that URI or fingerprint")
			}
			k := keys[i]
			if a.output == "json" {
				return a.printJSON(k)
			}
			return a.pairs("key_uri", k.URI, "backend", k.Backend, "fingerprint", k.Fingerprint, "algorithm", k.Algorithm, "label", k.Label,
				"state", k.State, "used by", k.UsedBy, "grade", k.Grade, "origin", k.Origin, "sensitive", strconv.FormatBool(k.Sensitive),
				"never left the device", strconv.FormatBool(k.NeverLeft), "extractable", strconv.FormatBool(k.Extractable), "problem", k.Problem)
		},
	}
}

func (a *app) keyRecheckCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "recheck AGENT",
		Short: "Have the key of an agent sign a test, so that an orphaned one is used again",
		Long: `A key that its device lost is orphaned: its place is kept and it is not used. Once the device holds it again, recheck
finds it by its recorded public key and has it sign a test. If it does, the agent signs again.`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, given []string) error {
			return a.oneAgent(func(c *client.Admin) (api.AgentDetail, error) { return c.RecheckKey(cmd.Context(), given[0]) })
		},
	}
}

func (a *app) keyProbeCmd() *cobra.Command {
	var b config.Backend
	var pinFile string
	cmd := &cobra.Command{
		Use:   "probe",
		Short: "Show what backends can do, and a configuration block to paste",
		Long: `Probe asks the running daemon about its backends. With --module, --device or --dir it opens that module, TPM or
folder itself, without a daemon, and prints the block that puts it into the configuration.`,
		Example: `  trustd key probe
  trustd key probe --module /usr/lib/softhsm/libsofthsm2.so --token demo --pin-file /etc/trustd/pin
  trustd key probe --device device:/dev/tpmrm0`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if b.Module == "" && b.Device == "" && b.Dir == "" {
				c, err := a.admin()
				if err != nil {
					return err
				}
				all, err := c.Backends(cmd.Context())
				if err != nil {
					return err
				}
				return a.showBackends(all, nil)
			}
			if err := b.Guess(pinFile); err != nil {
				return err
			}
			d, err := daemon.Probe(cmd.Context(), b)
			if err != nil {
				return err
			}
			b.Default = b.Kind != config.Soft
			if err := a.showBackends([]api.Backend{d}, &b); err != nil {
				return err
			}
			if d.State != string(signer.Ready) {
				return exit(exitError)
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&b.Name, "name", "", "name of the backend in the block that is printed")
	f.StringVar(&b.Module, "module", "", "PKCS#11 module to open")
	f.StringVar(&b.Token, "token", "", "label of the token")
	f.StringVar(&b.Serial, "serial", "", "serial number of the token")
	f.StringVar(&pinFile, "pin-file", "", "file that holds the user PIN, readable by you alone")
	f.StringToStringVar(&b.Env, "env", nil, "environment variable that the module needs, such as SOFTHSM2_CONF=PATH; may be repeated")
	f.StringVar(&b.Device, "device", "", "TPM to open: device:/dev/tpmrm0 or swtpm:path=SOCKET")
	f.StringVar(&b.Dir, "dir", "", "folder of software keys to open")
	return cmd
}

func (a *app) showBackends(all []api.Backend, block *config.Backend) error {
	if a.output == "json" {
		return a.printJSON(all)
	}
	for i, b := range all {
		if i > 0 {
			fmt.Fprintln(a.out)
		}
		var limits []string
		for _, k := range slices.Sorted(maps.Keys(b.Limits)) {
			limits = append(limits, k+"="+b.Limits[k])
		}
		state := b.State
		if state != "ready" {
			state = a.colour(red, state)
		}
		if err := a.pairs("backend", b.Name, "kind", b.Kind, "device", b.Device, "state", state, "problem", b.Problem, "remedy", b.Remedy,
			"grade", b.Grade, "algorithms", strings.Join(b.Algorithms, " "), "limits", strings.Join(limits, " ")); err != nil {
			return err
		}
		a.showMechanisms(b.Mechanisms)
	}
	if block != nil {
		fmt.Fprintf(a.out, "\n# for the configuration file\n%s", block.TOML())
	}
	return nil
}

// showMechanisms prints the mechanisms that have a name, and how many have none.
func (a *app) showMechanisms(all []string) {
	named := slices.DeleteFunc(slices.Clone(all), func(m string) bool { return strings.HasPrefix(m, "0x") })
	if n := len(all) - len(named); n > 0 {
		named = append(named, fmt.Sprintf("and %d that trustd has no use for (-o json)", n))
	}
	const perLine = 4
	for i := 0; i < len(named); i += perLine {
		lead := "mechanisms"
		if i > 0 {
			lead = "          "
		}
		fmt.Fprintf(a.out, "%s  %s\n", lead, strings.Join(named[i:min(i+perLine, len(named))], " "))
	}
}
