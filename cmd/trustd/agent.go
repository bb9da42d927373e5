package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/client"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/durable"
)

func (a *app) agentCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Add, list, show, set, remove, revoke, export and import agents",
		Args:  args(cobra.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.agentAddCmd(), a.agentListCmd(), a.agentShowCmd(), a.agentSetCmd(), a.agentRemoveCmd(), a.agentRevokeCmd(),
		a.agentExportCmd(), a.agentImportCmd())
	return cmd
}

// bindingFlags are the flags that say which callers may use an agent: together they make one binding.
type bindingFlags struct {
	uid, gid, group int64
	cgroup, unit    string
	exe, exeSHA256  string
	verbs           []string
	cmd             *cobra.Command
}

func (b *bindingFlags) register(cmd *cobra.Command) {
	b.cmd = cmd
	f := cmd.Flags()
	f.Int64Var(&b.uid, "uid", -1, "user id that may use the agent")
	f.Int64Var(&b.gid, "gid", -1, "primary group id that the caller must have")
	f.Int64Var(&b.group, "group", -1, "group id, primary or supplementary, that the caller must have")
	f.StringVar(&b.cgroup, "cgroup", "", "cgroup that the caller must be in")
	f.StringVar(&b.unit, "systemd-unit", "", "systemd system unit that the caller must belong to")
	f.StringVar(&b.exe, "exe", "", "program that the caller must run (only narrows the others)")
	f.StringVar(&b.exeSHA256, "exe-sha256", "", "SHA-256 of that program (only narrows the others)")
	f.StringSliceVar(&b.verbs, "verbs", nil, "what they may do: sign, verify, operate (default sign,verify)")
}

// bindings returns the one binding that the flags make; none where no flag is set.
func (b *bindingFlags) bindings() ([]api.Binding, error) {
	s := api.Selector{Cgroup: b.cgroup, SystemdUnit: b.unit, Exe: b.exe, ExeSHA256: b.exeSHA256}
	for _, n := range []struct {
		flag string
		v    int64
		to   **uint32
	}{{"uid", b.uid, &s.UID}, {"gid", b.gid, &s.GID}, {"group", b.group, &s.Group}} {
		if !b.cmd.Flags().Changed(n.flag) {
			continue
		}
		if n.v < 0 || n.v > 1<<32-2 {
			return nil, fault.New(fault.Usage, "--%s is a number from 0 to %d", n.flag, uint32(1<<32-2))
		}
		id := uint32(n.v)
		*n.to = &id
	}
	if s == (api.Selector{}) {
		if len(b.verbs) != 0 {
			return nil, fault.New(fault.Usage, "--verbs says what a caller may do; name the caller too, for example with --uid")
		}
		return nil, nil
	}
	return []api.Binding{{Selector: s, Verbs: b.verbs}}, nil
}

func (a *app) agentAddCmd() *cobra.Command {
	var (
		r       api.AddAgentRequest
		b       bindingFlags
		meta    map[string]string
		expires string
	)
	cmd := &cobra.Command{
		Use:   "add ID",
		Short: "Make a key in a backend and register an agent with it",
		Example: `  trustd agent add planner --uid 1001
  trustd agent add researcher --backend tpm --algorithm ecdsa-p256 --uid 1002 --alias agent:researcher`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, given []string) error {
			var err error
			r.AgentID, r.Metadata = given[0], meta
			if r.Bindings, err = b.bindings(); err != nil {
				return err
			}
			if expires != "" {
				t, err := time.Parse(time.RFC3339, expires)
				if err != nil {
					return fault.New(fault.Usage, "--expires is a time such as 2030-01-31T00:00:00Z")
				}
				r.ExpiresAt = &t
			}
			return a.oneAgent(func(c *client.Admin) (api.AgentDetail, error) { return c.AddAgent(cmd.Context(), r) })
		},
	}
	f := cmd.Flags()
	f.StringVar(&r.Backend, "backend", "", "backend that makes the key (default: the configuration's default)")
	f.StringVar(&r.Algorithm, "algorithm", "", "ed25519, ecdsa-p256, ecdsa-p384, rsa-2048, rsa-3072, rsa-4096 (default: the backend's)")
	f.StringVar(&r.KeyURI, "key", "", "use this key, which is on the backend already, instead of making one")
	f.StringSliceVar(&r.Aliases, "alias", nil, "TrustHandoff name, agent:<role>[:<instance>]; may be repeated")
	f.StringToStringVar(&meta, "meta", nil, "metadata, name=value; may be repeated")
	f.StringVar(&r.Level, "level", "", "trust level (default LOW; more needs an operator)")
	f.StringVar(&expires, "expires", "", "time at which the registration ends, RFC 3339")
	f.StringVar(&r.Role, "role", "", "agent (default) or operator")
	b.register(cmd)
	return cmd
}

func (a *app) agentListCmd() *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List agents",
		Args:    args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.admin()
			if err != nil {
				return err
			}
			all, err := c.ListAgents(cmd.Context())
			if err != nil {
				return err
			}
			if a.output == "json" {
				return a.printJSON(all)
			}
			rows := make([][]string, len(all))
			for i, d := range all {
				rows[i] = []string{d.AgentID, d.Role, d.Status, d.TrustLevel, d.Algorithm, cmp.Or(d.Backend, "elsewhere"), d.Grade,
					d.KeyState, short(d.Fingerprint)}
			}
			return a.table([]string{"AGENT", "ROLE", "STATUS", "LEVEL", "ALGORITHM", "BACKEND", "GRADE", "KEY", "FINGERPRINT"}, rows)
		},
	}
}

func (a *app) agentShowCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "show NAME",
		Short: "Show one agent, by id, alias or fingerprint",
		Args:  args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, given []string) error {
			return a.oneAgent(func(c *client.Admin) (api.AgentDetail, error) { return c.ShowAgent(cmd.Context(), given[0]) })
		},
	}
}

func (a *app) agentSetCmd() *cobra.Command {
	var r api.SetAgentRequest
	cmd := &cobra.Command{
		Use:     "set NAME",
		Short:   "Change how this host treats an agent",
		Example: "  trustd agent set planner --batching always",
		Args:    args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, given []string) error {
			if r == (api.SetAgentRequest{}) {
				return fault.New(fault.Usage, "name what to change: --batching")
			}
			return a.oneAgent(func(c *client.Admin) (api.AgentDetail, error) { return c.SetAgent(cmd.Context(), given[0], r) })
		},
	}
	cmd.Flags().StringVar(&r.Batching, "batching", "", "what becomes of requests that do not say whether they may be batched: on-request (signed\n"+
		"directly), always (may be batched), never (also those that may be are signed directly)")
	return cmd
}

func (a *app) agentRemoveCmd() *cobra.Command {
	var r api.RemoveAgentRequest
	cmd := &cobra.Command{
		Use:     "remove NAME",
		Aliases: []string{"rm"},
		Short:   "Decommission an agent: refuse its messages from now on and destroy its key",
		Args:    args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, given []string) error {
			return a.oneAgent(func(c *client.Admin) (api.AgentDetail, error) { return c.RemoveAgent(cmd.Context(), given[0], r) })
		},
	}
	cmd.Flags().StringVar(&r.Reason, "reason", "", "why, for the record")
	cmd.Flags().BoolVar(&r.KeepKey, "keep-key", false, "leave the private key on its device")
	return cmd
}

func (a *app) agentRevokeCmd() *cobra.Command {
	var r api.RevokeAgentRequest
	cmd := &cobra.Command{
		Use:   "revoke NAME",
		Short: "Revoke an agent: refuse its messages from now on and keep its key",
		Args:  args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, given []string) error {
			return a.oneAgent(func(c *client.Admin) (api.AgentDetail, error) { return c.RevokeAgent(cmd.Context(), given[0], r) })
		},
	}
	cmd.Flags().StringVar(&r.Code, "code", "privilege_withdrawn", "key_compromise, superseded, decommissioned or privilege_withdrawn")
	cmd.Flags().StringVar(&r.Reason, "reason", "", "why, for the record")
	return cmd
}

func (a *app) agentExportCmd() *cobra.Command {
	var (
		format, out, passFile string
		private               bool
	)
	cmd := &cobra.Command{
		Use:   "export NAME",
		Short: "Export a public identity, or a soft private key under a passphrase",
		Long: `Export prints the public identity as json (what import reads), pem or jwk. With --private it exports the private
key of a soft agent under a passphrase, as pem (PKCS#8, PBES2), jwk (inside a JWE) or raw (inside trustd's wrapper); the
file is made anew with mode 0600. The private key of an HSM or TPM cannot leave it.`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, given []string) error {
			if private {
				return a.exportPrivate(cmd, given[0], format, out, passFile)
			}
			c, err := a.admin()
			if err != nil {
				return err
			}
			d, err := c.ShowAgent(cmd.Context(), given[0])
			if err != nil {
				return err
			}
			var text []byte
			switch cmp.Or(format, "json") {
			case "json":
				if text, err = json.MarshalIndent(d.Identity, "", "  "); err != nil {
					return err
				}
				text = append(text, '\n')
			case "pem":
				text = []byte(d.PEM)
			case "jwk":
				if text, err = publicJWK(d.Identity); err != nil {
					return err
				}
			default:
				return fault.New(fault.Usage, "--format is json, pem or jwk")
			}
			if out == "" {
				_, err = a.out.Write(text)
				return err
			}
			return makeFile(out, text, 0o644)
		},
	}
	f := cmd.Flags()
	f.StringVar(&format, "format", "", "json, pem or jwk; with --private pem, jwk or raw")
	f.StringVar(&out, "out", "", "file to make; must not exist")
	f.BoolVar(&private, "private", false, "export the private key of a soft agent")
	f.StringVar(&passFile, "passphrase-file", "", "file that holds the passphrase, readable by you alone")
	return cmd
}

// makeFile makes a file that does not exist yet.
func makeFile(path string, data []byte, mode os.FileMode) error {
	err := durable.Create(path, data, mode)
	switch {
	case errors.Is(err, os.ErrExist):
		return &fault.Error{Code: fault.AlreadyExists, Text: "the file " + path + " exists", Hint: "Choose another name for --out.", Err: err}
	case err != nil:
		return &fault.Error{Code: fault.Unavailable, Text: "the file " + path + " cannot be made", Hint: "Check its folder.", Err: err}
	}
	return nil
}

func (a *app) exportPrivate(cmd *cobra.Command, name, format, out, passFile string) error {
	if out == "" {
		return fault.New(fault.Usage, "a private key goes to a file: name it with --out")
	}
	pass, err := a.passphrase(cmd.Context(), passFile)
	if err != nil {
		return err
	}
	c, err := a.admin()
	if err != nil {
		return err
	}
	r, err := c.ExportPrivate(cmd.Context(), name, api.ExportPrivateRequest{Format: cmp.Or(format, "pem"), Passphrase: pass})
	if err != nil {
		return err
	}
	if err := makeFile(out, []byte(r.Data), 0o600); err != nil {
		return err
	}
	fmt.Fprintf(a.err, "wrote %s (%s, encrypted, mode 0600)\n", out, r.Format)
	return nil
}

func (a *app) agentImportCmd() *cobra.Command {
	var (
		r        api.ImportAgentRequest
		b        bindingFlags
		private  bool
		passFile string
	)
	cmd := &cobra.Command{
		Use:   "import FILE",
		Short: "Import a public identity, or an encrypted private key",
		Long: `Import reads a public identity (what export prints, or a PEM or JWK public key with --id) and registers it, so that
messages of that agent verify here; its fingerprint is computed again. With --private it takes an encrypted private key
into a backend; a token marks it imported.`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, given []string) error {
			data, err := a.input(given[0])
			if err != nil {
				return err
			}
			if r.Bindings, err = b.bindings(); err != nil {
				return err
			}
			if private {
				if r.Passphrase, err = a.passphrase(cmd.Context(), passFile); err != nil {
					return err
				}
				r.Private = string(data)
			} else if r.Public, err = publicIdentity(data, r.AgentID); err != nil {
				return err
			}
			return a.oneAgent(func(c *client.Admin) (api.AgentDetail, error) { return c.ImportAgent(cmd.Context(), r) })
		},
	}
	f := cmd.Flags()
	f.StringVar(&r.AgentID, "id", "", "agent id (default: the one in the file)")
	f.BoolVar(&private, "private", false, "the file holds an encrypted private key")
	f.StringVar(&r.Format, "format", "", "with --private: pem (default), jwk or raw")
	f.StringVar(&passFile, "passphrase-file", "", "file that holds the passphrase, readable by you alone")
	f.StringVar(&r.Backend, "backend", "", "with --private: backend that takes the key in")
	f.StringSliceVar(&r.Aliases, "alias", nil, "TrustHandoff name; may be repeated")
	f.StringVar(&r.Level, "level", "", "trust level (default LOW; more needs an operator)")
	b.register(cmd)
	return cmd
}

// publicIdentity returns the export_public object in data: itself, or one made from a PEM or JWK public key.
func publicIdentity(data []byte, id string) (json.RawMessage, error) {
	data = bytes.TrimSpace(data)
	pub, err := publicFile(data)
	if err != nil {
		return nil, err
	}
	if pub.IsZero() { // an identity object; the daemon checks it
		return data, nil
	}
	if id == "" {
		return nil, fault.New(fault.Usage, "a bare public key names no agent: name it with --id")
	}
	return json.Marshal(map[string]any{"agent_id": id, "public_key": pub.Base64(), "fingerprint": pub.ID().String()})
}

// oneAgent asks the daemon something whose answer is one agent, and shows it.
func (a *app) oneAgent(ask func(*client.Admin) (api.AgentDetail, error)) error {
	c, err := a.admin()
	if err != nil {
		return err
	}
	d, err := ask(c)
	if err != nil {
		return err
	}
	return a.showAgent(d)
}

func (a *app) showAgent(d api.AgentDetail) error {
	if a.output == "json" {
		return a.printJSON(d)
	}
	expires := ""
	if d.ExpiresAt != nil {
		expires = d.ExpiresAt.Format(time.RFC3339)
	}
	where := "elsewhere"
	if d.Local {
		where = fmt.Sprintf("this host, backend %s, %s", d.Backend, d.KeyState)
	}
	err := a.pairs("agent_id", d.AgentID, "public_key", d.PublicKey, "fingerprint", d.Fingerprint, "metadata", metadata(d.Metadata),
		"role", d.Role, "status", d.Status, "trust level", d.TrustLevel, "algorithm", d.Algorithm, "aliases", strings.Join(d.Aliases, "  "),
		"lineage", d.Lineage, "epoch", strconv.FormatUint(d.Epoch, 10), "grade", d.Grade, "origin", d.Origin,
		"possession proved", strconv.FormatBool(d.Possession), "created", d.CreatedAt.Format(time.RFC3339), "expires", expires,
		"key", where, "key_uri", d.KeyURI, "batching", d.Batching)
	if err != nil {
		return err
	}
	for _, b := range d.Bindings {
		fmt.Fprintf(a.out, "  may be used by %s\n", describeBinding(b))
	}
	for _, w := range d.Warnings {
		fmt.Fprintln(a.out, a.colour(yellow, "warning: "+printable(w)))
	}
	return nil
}

func describeBinding(b api.Binding) string {
	var parts []string
	num := func(name string, v *uint32) {
		if v != nil {
			parts = append(parts, fmt.Sprintf("%s %d", name, *v))
		}
	}
	num("uid", b.Selector.UID)
	num("gid", b.Selector.GID)
	num("group", b.Selector.Group)
	for _, s := range [][2]string{{"cgroup", b.Selector.Cgroup}, {"systemd unit", b.Selector.SystemdUnit}, {"exe", b.Selector.Exe},
		{"exe sha256", b.Selector.ExeSHA256}} {
		if s[1] != "" {
			parts = append(parts, s[0]+" "+s[1])
		}
	}
	verbs := b.Verbs
	if len(verbs) == 0 {
		verbs = []string{api.VerbSign, api.VerbVerify}
	}
	return strings.Join(parts, " and ") + " to " + strings.Join(verbs, ", ")
}

func metadata(m map[string]string) string {
	if len(m) == 0 {
		return ""
	}
	b, err := json.Marshal(m)
	if err != nil {
		return ""
	}
	return string(b)
}

// short returns the part of a fingerprint that people compare at a glance.
func short(fp string) string {
	rest, _ := strings.CutPrefix(fp, "sha256:")
	if len(rest) < 12 {
		return fp
	}
	return rest[:12]
}

// passphrase reads a passphrase from a file that only its owner can read, or from the terminal.
func (a *app) passphrase(ctx context.Context, file string) (string, error) {
	if file != "" {
		return secretFile(ctx, file)
	}
	f, ok := a.in.(*os.File)
	if !ok {
		return "", fault.New(fault.Usage, "name the passphrase's file with --passphrase-file")
	}
	return a.askPassphrase(f)
}
