package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/internal/secret"
	"github.com/trustd/trustd/plugins"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/signertest/suite"
)

func (a *app) pluginCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "plugin",
		Short: "Look at a signer plugin, and test whether it keeps the contract",
		Args:  args(cobra.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.pluginInfoCmd(), a.pluginTestCmd())
	return cmd
}

func (a *app) pluginInfoCmd() *cobra.Command {
	var env map[string]string
	cmd := &cobra.Command{
		Use:   "info PATH",
		Short: "Show a plugin's checksum and protocol version",
		Long: `Info starts the plugin as far as the handshake and ends it again. The plugin gets no settings and no PIN and touches
no device. The lines that it prints go into the configuration.`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, given []string) error {
			path, err := filepath.Abs(given[0])
			if err != nil {
				return fmt.Errorf("finding %s: %w", given[0], err)
			}
			info, err := plugins.Inspect(plugins.Config{Name: "info", Binary: path, Env: env, Log: a.pluginLog(slog.LevelWarn)})
			if info.SHA256 == "" {
				return err
			}
			if a.output == "json" {
				if werr := a.printJSON(info); werr != nil {
					return werr
				}
				return err
			}
			speaks := "none"
			if info.Protocol != 0 {
				speaks = strconv.Itoa(info.Protocol)
			}
			if werr := a.pairs("plugin", info.Path, "sha256", info.SHA256, "protocol", speaks, "package", info.Package,
				"version", info.Version, "go", info.Go); werr != nil || err != nil {
				return errors.Join(err, werr)
			}
			fmt.Fprintf(a.out, "\nplugin = %q\nplugin_sha256 = %q\n", info.Path, info.SHA256)
			return nil
		},
	}
	cmd.Flags().StringToStringVar(&env, "env", nil, "environment variable for the plugin, NAME=VALUE; may be repeated")
	return cmd
}

// A verdict is what trustd plugin test prints as JSON.
type verdict struct {
	Plugin string         `json:"plugin"`
	Passed bool           `json:"passed"`
	Checks []suite.Result `json:"checks"`
}

func (a *app) pluginTestCmd() *cobra.Command {
	var c plugins.Config
	var settings []string
	var pinFile string
	var algorithms []string
	var verbose bool
	cmd := &cobra.Command{
		Use:   "test PATH",
		Short: "Test whether a plugin keeps the contract of a backend",
		Long: `Test runs the suite that every backend must pass on a plugin: each check is one demand of the contract, from signing
right messages to closing. It makes keys under random ids and destroys them again; other keys on the device stay as they
are. It exits with 0 only if no check fails.`,
		Example: `  trustd plugin test ./trustd-kms --setting dir=/var/lib/kms
  trustd plugin test bin/trustd-pkcs11 --setting module=/usr/lib/softhsm/libsofthsm2.so --setting token=demo \
    --pin-file /etc/trustd/pin --env SOFTHSM2_CONF=/etc/trustd/softhsm2.conf`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, given []string) error {
			path, err := filepath.Abs(given[0])
			if err != nil {
				return fmt.Errorf("finding %s: %w", given[0], err)
			}
			c.Name, c.Binary, c.Kind = "test", path, plugins.KindPlugin
			if c.Settings, err = pairsOf(settings); err != nil {
				return err
			}
			if pinFile != "" {
				file, err := filepath.Abs(pinFile)
				if err != nil {
					return fmt.Errorf("finding %s: %w", pinFile, err)
				}
				c.PIN = secret.Source{File: file}.Read
			}
			var only []ident.Algorithm
			for _, name := range algorithms {
				alg, err := ident.ParseAlgorithm(name)
				if err != nil {
					return fault.New(fault.Usage, "--algorithm: %s", fault.From(err).Text)
				}
				only = append(only, alg)
			}
			level := slog.LevelWarn
			if verbose {
				level = slog.LevelDebug
			}
			c.Log = a.pluginLog(level)
			return a.report(path, testPlugin(cmd.Context(), c, only))
		},
	}
	f := cmd.Flags()
	f.StringArrayVar(&settings, "setting", nil, "setting of the plugin, NAME=VALUE; may be repeated")
	f.StringToStringVar(&c.Env, "env", nil, "environment variable for the plugin, NAME=VALUE; may be repeated")
	f.StringVar(&pinFile, "pin-file", "", "file that holds the PIN or secret that the plugin gets, readable by you alone")
	f.StringVar(&c.SHA256, "sha256", "", "checksum that the plugin must have")
	f.StringSliceVar(&algorithms, "algorithm", nil, "test only these algorithms, such as ed25519 (default all that it offers)")
	f.BoolVarP(&verbose, "verbose", "v", false, "show what the plugin logs")
	return cmd
}

// pairsOf reads NAME=VALUE; a value may hold anything, commas too.
func pairsOf(list []string) (map[string]string, error) {
	out := map[string]string{}
	for _, s := range list {
		name, value, ok := strings.Cut(s, "=")
		if !ok || name == "" {
			return nil, fault.New(fault.Usage, "--setting is NAME=VALUE")
		}
		out[name] = value
	}
	return out, nil
}

func (a *app) pluginLog(level slog.Level) *slog.Logger {
	return slog.New(slog.NewTextHandler(a.err, &slog.HandlerOptions{Level: level}))
}

// testPlugin runs the suite, and one check that only makes sense for a process of its own.
func testPlugin(ctx context.Context, c plugins.Config, only []ident.Algorithm) []suite.Result {
	var hosts running
	defer hosts.close()
	var options []suite.Option
	if len(only) > 0 {
		options = append(options, suite.Algorithms(only...))
	}
	open := func(ctx context.Context) (signer.Backend, error) { return hosts.start(ctx, c), nil }
	results := suite.Check(ctx, open, nil, options...)
	if !slices.ContainsFunc(results, func(r suite.Result) bool { return r.Check == "Reopen" && r.Result == suite.Passed }) {
		return results // without keys that outlive the process there is nothing to restart with
	}
	restart := suite.Result{Check: "Restart", Result: suite.Passed}
	if err := checkRestart(ctx, hosts.start(ctx, c), only); err != nil {
		restart.Result, restart.Detail = suite.Failed, fault.From(err).Verbose()
	}
	return append(results, restart)
}

// running are hosts that run; the suite closes those that it opens, unless it fails.
type running struct {
	wg    sync.WaitGroup
	hosts []*plugins.Host
}

func (r *running) start(ctx context.Context, c plugins.Config) *plugins.Host {
	h := plugins.New(c)
	r.hosts = append(r.hosts, h)
	r.wg.Go(func() { _ = h.Run(ctx) }) // which returns nothing but nil
	return h
}

func (r *running) close() {
	for _, h := range r.hosts {
		_ = h.Close()
	}
	r.wg.Wait()
}

// checkRestart kills the plugin and has a key sign that it held before.
func checkRestart(ctx context.Context, h *plugins.Host, only []ident.Algorithm) error {
	d := h.Describe(ctx)
	algorithms := d.Algorithms
	if len(only) > 0 {
		algorithms = only
	}
	pid, err := strconv.Atoi(d.Limits["plugin_pid"])
	if err != nil || len(algorithms) == 0 {
		return fault.New(fault.Unavailable, "the backend is %s: %s", d.State, d.Problem)
	}
	id, err := signer.NewID([]byte("restart-" + strconv.Itoa(pid)))
	if err != nil {
		return err
	}
	key, err := h.Generate(ctx, id, algorithms[0])
	if err != nil {
		return err
	}
	defer func() { _ = h.Destroy(ctx, id) }()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		return fmt.Errorf("killing the plugin: %w", err)
	}
	msg := []byte("signed after the plugin was killed")
	sig, err := key.Sign(ctx, msg)
	for err != nil && fault.CodeOf(err).Retryable() && ctx.Err() == nil && h.Describe(ctx).State == signer.Recovering {
		sig, err = key.Sign(ctx, msg)
	}
	if err != nil {
		return err
	}
	return signature.Verify(key.Public(), msg, sig)
}

// report prints what the checks found, and returns an error where one failed.
func (a *app) report(path string, results []suite.Result) error {
	failed := 0
	for _, r := range results {
		if r.Result == suite.Failed {
			failed++
		}
	}
	passed := failed == 0 && len(results) > 0
	if a.output == "json" {
		if err := a.printJSON(verdict{Plugin: path, Passed: passed, Checks: results}); err != nil {
			return err
		}
	} else if err := a.printResults(a.out, results); err != nil {
		return err
	}
	if !passed {
		return exit(exitError)
	}
	return nil
}

func (a *app) printResults(w io.Writer, results []suite.Result) error {
	rows := make([][]string, len(results))
	for i, r := range results {
		first, more, _ := strings.Cut(r.Detail, "\n")
		if more != "" {
			first += " ..."
		}
		rows[i] = []string{r.Check, string(r.Result), first}
	}
	if err := a.table([]string{"CHECK", "RESULT", "DETAIL"}, rows); err != nil {
		return err
	}
	for _, r := range results {
		if r.Result == suite.Failed && strings.Contains(r.Detail, "\n") {
			fmt.Fprintf(w, "\n%s:\n%s\n", r.Check, printableLines(r.Detail))
		}
	}
	return nil
}
