package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/trustd/trustd/client"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/config"
)

// The exit codes. They are documented in docs/cli.md and never change.
const (
	exitOK          = 0
	exitError       = 1
	exitUsage       = 2
	exitRefused     = 3 // bad signature, revoked, policy
	exitWarnings    = 4
	exitUnreachable = 5
	exitDenied      = 6
	exitNotFound    = 7
)

type stdio struct {
	in       io.Reader
	out, err io.Writer
}

// An app is one invocation: its streams and the flags that every command has.
type app struct {
	stdio
	configPath  string
	agentSocket string
	adminSocket string
	output      string
}

// An exit is an error that only carries an exit code: what there was to say has been printed.
type exit int

func (e exit) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// run runs one command line and returns its exit code.
func run(ctx context.Context, args []string, std stdio) int {
	a := &app{stdio: std}
	root := a.root()
	root.SetArgs(args)
	root.SetIn(std.in)
	root.SetOut(std.out)
	root.SetErr(std.err)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	var code exit
	if errors.As(err, &code) {
		return int(code)
	}
	a.complain(err)
	return exitCode(err)
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "trustd",
		Short: "Keys of AI agents in an HSM or a TPM: sign, verify, attest, rotate, revoke",
		Long: `trustd holds the keys of AI agents in a PKCS#11 HSM or a TPM 2.0. Agents have packets signed over a local
Unix socket and never see a private key; trustd verifies what other agents send.

Start with:  trustd init, trustd serve, trustd agent add, trustd sign, trustd verify
If something does not work:  trustd doctor`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cmd.Help()
		},
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return fault.New(fault.Usage, "%s; see %s --help", err, cmd.CommandPath())
	})
	f := root.PersistentFlags()
	f.StringVar(&a.configPath, "config", "", "configuration file (default $TRUSTD_CONFIG, then "+config.DefaultPath+")")
	f.StringVar(&a.agentSocket, "socket", "", "agent socket (default $TRUSTD_SOCKET, then the configuration's)")
	f.StringVar(&a.adminSocket, "admin-socket", "", "admin socket (default $TRUSTD_ADMIN_SOCKET, then the configuration's)")
	f.StringVarP(&a.output, "output", "o", "table", "table or json")
	root.PersistentPreRunE = func(*cobra.Command, []string) error {
		if a.output != "table" && a.output != "json" {
			return fault.New(fault.Usage, "--output is table or json")
		}
		return nil
	}
	root.AddCommand(
		a.initCmd(), a.serveCmd(), a.agentCmd(), a.keyCmd(), a.backendCmd(), a.signCmd(), a.verifyCmd(), a.whoamiCmd(), a.doctorCmd(),
		a.configCmd(), a.pluginCmd(), a.versionCmd(),
	)
	return root
}

// args turns cobra's complaint about arguments into a usage error.
func args(want cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, given []string) error {
		if err := want(cmd, given); err != nil {
			return fault.New(fault.Usage, "%s; see %s --help", err, cmd.CommandPath())
		}
		return nil
	}
}

// load reads the configuration. A missing file is the default configuration unless it was asked for by name.
func (a *app) load() (*config.Config, error) {
	path := cmp.Or(a.configPath, os.Getenv("TRUSTD_CONFIG"))
	if path == "" {
		if _, err := os.Stat(config.DefaultPath); errors.Is(err, os.ErrNotExist) {
			return config.Load("")
		}
		path = config.DefaultPath
	}
	return config.Load(path)
}

// agent returns a client of agent.sock, admin one of admin.sock.
func (a *app) agent() (*client.Client, error) {
	path := cmp.Or(a.agentSocket, os.Getenv("TRUSTD_SOCKET"))
	if path == "" {
		c, err := a.load()
		if err != nil {
			return nil, err
		}
		path = c.AgentSocketPath()
	}
	return client.New(path), nil
}

func (a *app) admin() (*client.Admin, error) {
	path := cmp.Or(a.adminSocket, os.Getenv("TRUSTD_ADMIN_SOCKET"))
	if path == "" {
		c, err := a.load()
		if err != nil {
			return nil, err
		}
		path = c.AdminSocketPath()
	}
	return client.NewAdmin(path), nil
}

// exitCode maps an error to the documented exit codes.
func exitCode(err error) int {
	switch code := fault.CodeOf(err); code {
	case fault.Usage:
		return exitUsage
	case fault.Unreachable:
		return exitUnreachable
	case fault.Denied, fault.CallerUnknown, fault.CallerChanged, fault.NotAuthorised:
		return exitDenied
	case fault.NotFound, fault.KeyNotFound:
		return exitNotFound
	case fault.Malformed, fault.TooLarge:
		return exitError
	default:
		if code.Refusal() {
			return exitRefused
		}
		return exitError
	}
}

// complain prints an error and what to do about it; in JSON as {"error": problem} on standard error.
func (a *app) complain(err error) {
	var e *fault.Error
	if !errors.As(err, &e) {
		// Nothing else reaches the command line's edge but errors of this process: their text is for its user.
		if c := fault.CodeOf(err); c != fault.Internal {
			e = &fault.Error{Code: c, Text: c.Title()}
		} else {
			e = &fault.Error{Code: fault.Internal, Text: err.Error(), Hint: " "}
		}
	}
	if a.output == "json" {
		enc := json.NewEncoder(a.err)
		enc.SetIndent("", "  ")
		_ = enc.Encode(map[string]any{"error": map[string]any{
			"code": e.Code, "field": e.Field, "detail": e.Text, "hint": hint(e), "retryable": e.Code.Retryable(),
		}})
		return
	}
	text := cmp.Or(e.Text, e.Code.Title())
	where := ""
	if e.Field != "" {
		where = " in " + e.Field
	}
	fmt.Fprintf(a.err, "trustd: %s%s: %s\n", e.Code, printable(where), printableLines(text))
	if h := hint(e); h != "" {
		fmt.Fprintf(a.err, "  hint: %s\n", printableLines(h))
	}
}

// printable returns text that cannot move a terminal's cursor or forge a line of a table: names and labels come from
// packets, tokens and peers. Text that is not plain is quoted.
func printable(s string) string {
	for _, r := range s {
		if !unicode.IsPrint(r) {
			return strconv.QuoteToASCII(s)
		}
	}
	if !utf8.ValidString(s) {
		return strconv.QuoteToASCII(s)
	}
	return s
}

// printableLines is printable for texts of our own that may have several lines.
func printableLines(s string) string {
	lines := strings.Split(s, "\n")
	for i := range lines {
		lines[i] = printable(strings.ReplaceAll(lines[i], "\t", "    "))
	}
	return strings.Join(lines, "\n")
}

func hint(e *fault.Error) string { return strings.TrimSpace(cmp.Or(e.Hint, e.Code.Hint())) }

// printJSON prints v as indented JSON.
func (a *app) printJSON(v any) error {
	enc := json.NewEncoder(a.out)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// table prints rows under a head, columns aligned. Cells that are empty print as "-".
func (a *app) table(head []string, rows [][]string) error {
	w := tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, strings.Join(head, "\t"))
	for _, r := range rows {
		cells := make([]string, len(r))
		for i, c := range r {
			cells[i] = cmp.Or(printable(c), "-")
		}
		fmt.Fprintln(w, strings.Join(cells, "\t"))
	}
	return w.Flush()
}

// pairs prints name and value in two columns, leaving out values that are empty.
func (a *app) pairs(kv ...string) error {
	w := tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)
	for i := 0; i+1 < len(kv); i += 2 {
		if kv[i+1] != "" {
			fmt.Fprintf(w, "%s\t%s\n", kv[i], printable(kv[i+1]))
		}
	}
	return w.Flush()
}

// colour wraps text in an ANSI colour where a person reads it and NO_COLOR is not set.
func (a *app) colour(code, text string) string {
	f, ok := a.out.(*os.File)
	if !ok || os.Getenv("NO_COLOR") != "" || !term.IsTerminal(int(f.Fd())) {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

const (
	green  = "32"
	red    = "31"
	yellow = "33"
)

// input reads a file, or standard input for "-" or "".
func (a *app) input(name string) ([]byte, error) {
	const limit = 64 << 20
	r := a.in
	if name != "" && name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, &fault.Error{Code: fault.NotFound, Text: "the file " + name + " cannot be opened", Hint: "Check the path and its permissions.", Err: err}
		}
		defer f.Close()
		r = f
	}
	data, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, fmt.Errorf("reading input: %w", err)
	}
	if len(data) > limit {
		return nil, fault.New(fault.TooLarge, "the input is larger than %d bytes", limit)
	}
	return data, nil
}
