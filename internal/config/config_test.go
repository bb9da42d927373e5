package config_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/trustd/trustd/caller"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/config"
	"github.com/trustd/trustd/internal/secret"
)

// full sets every key.
const full = `
state_dir = "/var/lib/t"
run_dir = "/run/t"
agent_socket = "/run/t/a.sock"
agent_socket_mode = "0660"
agent_socket_group = "0"
admin_socket = "/run/t/b.sock"

[log]
level = "debug"
format = "json"

[verify]
skew = "1m"
grace = "10s"
ttl_write = "1m0s"
ttl_read = "2m"
ttl_default = "3m"
message_age = "1h"
legacy_th033 = true
max_nonces = 5000

[limits]
rate = 1.5
burst = 7
concurrent = 9

[history]
required = true
sync_interval = "1s"

[node]
backend = "chip"

[keys]
min_grade = "hardware-claimed"

[[backend]]
name = "hsm"
kind = "pkcs11"
default = true
deadline = "5s"
module = "/usr/lib/softhsm/libsofthsm2.so"
token = "demo"
serial = "0123"
pin = { credential = "hsm-pin" }
plugin = "/usr/libexec/trustd-pkcs11"
plugin_sha256 = "0000000000000000000000000000000000000000000000000000000000000000"
env = { SOFTHSM2_CONF = "/etc/softhsm2.conf" }

[[backend]]
name = "chip"
kind = "tpm"
device = "device:/dev/tpmrm0"
dir = "/var/lib/t/chip"

[[backend]]
name = "laptop"
kind = "soft"
dir = "/var/lib/t/keys"
[backend.passphrase]
file = "/etc/trustd/pass"
`

func parse(t testing.TB, text string) *config.Config {
	t.Helper()
	c, err := config.Parse([]byte(text), "trustd.toml")
	if err != nil {
		t.Fatalf("%v: %v", err, errors.Unwrap(err))
	}
	return c
}

func TestParseFull(t *testing.T) {
	c := parse(t, full)
	want := config.Config{
		StateDir: "/var/lib/t", RunDir: "/run/t", AgentSocket: "/run/t/a.sock", AgentSocketMode: "0660", AgentSocketGroup: "0",
		AdminSocket: "/run/t/b.sock",
		Log:         config.Log{Level: "debug", Format: "json"},
		Verify: config.Verify{Skew: config.Lasting(time.Minute), Grace: config.Lasting(10 * time.Second),
			TTLWrite: config.Lasting(time.Minute), TTLRead: config.Lasting(2 * time.Minute), TTLDefault: config.Lasting(3 * time.Minute),
			MessageAge: config.Lasting(time.Hour), LegacyTH033: true, MaxNonces: 5000},
		Limits:  config.Limits{Rate: 1.5, Burst: 7, Concurrent: 9},
		History: config.History{Required: true, SyncInterval: config.Lasting(time.Second)},
		Node:    config.Node{Backend: "chip"},
		Keys:    config.Keys{MinGrade: "hardware-claimed"},
		Backends: []config.Backend{
			{Name: "hsm", Kind: config.PKCS11, Default: true, Deadline: config.Lasting(5 * time.Second),
				Module: "/usr/lib/softhsm/libsofthsm2.so", Token: "demo", Serial: "0123", PIN: secret.Source{Credential: "hsm-pin"},
				Plugin: "/usr/libexec/trustd-pkcs11", PluginSHA256: strings.Repeat("0", 64),
				Env: map[string]string{"SOFTHSM2_CONF": "/etc/softhsm2.conf"}},
			{Name: "chip", Kind: config.TPM, Device: "device:/dev/tpmrm0", Dir: "/var/lib/t/chip"},
			{Name: "laptop", Kind: config.Soft, Dir: "/var/lib/t/keys", Passphrase: secret.Source{File: "/etc/trustd/pass"}},
		},
	}
	if !reflect.DeepEqual(*c, want) {
		t.Errorf("%+v\nwant %+v", *c, want)
	}
}

func TestPrintReadsBack(t *testing.T) {
	for name, c := range map[string]*config.Config{"full": parse(t, full), "default": config.Default()} {
		var b bytes.Buffer
		if err := c.Print(&b); err != nil {
			t.Fatal(err)
		}
		again, err := config.Parse(b.Bytes(), name)
		if err != nil {
			t.Fatalf("%s: %v\n%s", name, err, b.String())
		}
		if !reflect.DeepEqual(again, c) {
			t.Errorf("%s reads back as %+v", name, again)
		}
	}
	if _, err := json.Marshal(parse(t, full)); err != nil {
		t.Error(err)
	}
	if err := config.Default().Print(failing{}); err == nil {
		t.Error("a failed write is no error")
	}
}

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, errors.New("full") }

func TestDefaultIsValid(t *testing.T) {
	c := config.Default()
	if err := c.Validate(); err != nil {
		t.Error(err)
	}
	if got := parse(t, ""); !reflect.DeepEqual(got, c) {
		t.Errorf("an empty file is %+v", got)
	}
	if len(c.Backends) != 0 {
		t.Error("a key backend is chosen by default")
	}
	if c.AgentSocketPath() != "/run/trustd/agent.sock" || c.AdminSocketPath() != "/run/trustd/admin.sock" {
		t.Errorf("%s, %s", c.AgentSocketPath(), c.AdminSocketPath())
	}
}

const minimal = "[[backend]]\nname = \"hsm\"\nkind = \"pkcs11\"\nmodule = \"/m.so\"\ntoken = \"t\"\npin = {file = \"/pin\"}\n"

// TestRefused holds, for each text, the field or the place that the error must name.
func TestRefused(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"not TOML":               {"state_dir", "trustd.toml:1:"},
		"broken table":           {"\n\n[[backend]\n", "trustd.toml:3:10"},
		"unknown key":            {"\nstate_dri = \"/x\"", "trustd.toml:2:1: unknown key state_dri; did you mean state_dir?"},
		"unknown table":          {"[raft]\n", "trustd.toml:1:2: unknown key raft"},
		"unknown key in table":   {"[verify]\nskwe = \"1s\"", "trustd.toml:2:1: unknown key verify.skwe; did you mean skew?"},
		"unknown key in backend": {minimal + "modul = \"/x\"", "unknown key backend.modul; did you mean module?"},
		"unknown key in secret":  {strings.Replace(minimal, "file", "flie", 1), "trustd.toml:6:8: unknown key backend"},
		"upper-case key":         {"State_Dir = \"/x\"", "trustd.toml:1:1: unknown key State_Dir"},
		"case in a table":        {"[Log]\nlevel = \"info\"", "trustd.toml:1:2: unknown key Log"},
		"case in a backend":      {minimal + "Plugin = \"/x\"", "unknown key backend.Plugin; did you mean plugin?"},
		"case in a secret":       {strings.Replace(minimal, "file", "File", 1), "trustd.toml:6:8: unknown key backend.pin.File"},
		"one key in two cases":   {"state_dir = \"/a\"\nSTATE_DIR = \"/b\"", "trustd.toml:2:1: unknown key STATE_DIR"},
		"key twice":              {"state_dir = \"/a\"\nstate_dir = \"/b\"", "trustd.toml:2:1"},
		"wrong type":             {"state_dir = 3", "trustd.toml:1:13: a value of the type integer does not fit this key"},
		"two problems at once":   {"a = 1\nb = 2", "trustd.toml:2:1"},

		"number for a duration":  {"[verify]\nskew = 30", "trustd.toml:2: a duration is a number and a unit"},
		"duration without unit":  {"[verify]\nskew = \"30\"", "trustd.toml:2:8: a duration is a number and a unit"},
		"negative duration":      {"[verify]\nskew = \"-1s\"", "verify.skew"},
		"skew too long":          {"[verify]\nskew = \"5m1s\"", "verify.skew"},
		"grace too long":         {"[verify]\ngrace = \"61s\"", "verify.grace"},
		"no ttl":                 {"[verify]\nttl_write = \"0s\"", "verify.ttl_write"},
		"ttl in fractions":       {"[verify]\nttl_read = \"1500ms\"", "verify.ttl_read"},
		"few nonces":             {"[verify]\nmax_nonces = 0", "verify.max_nonces"},
		"negative rate":          {"[limits]\nrate = -1", "limits.rate"},
		"rate nan":               {"[limits]\nrate = nan", "limits.rate"},
		"rate inf":               {"[limits]\nrate = inf", "limits.rate"},
		"negative burst":         {"[limits]\nburst = -1", "limits.burst"},
		"negative concurrent":    {"[limits]\nconcurrent = -1", "limits.concurrent"},
		"sync never":             {"[history]\nsync_interval = \"0s\"", "history.sync_interval"},
		"log level":              {"[log]\nlevel = \"verbose\"", "log.level"},
		"log format":             {"[log]\nformat = \"xml\"", "log.format"},
		"relative state_dir":     {"state_dir = \"state\"", "state_dir"},
		"empty state_dir":        {"state_dir = \"\"", "state_dir"},
		"root state_dir":         {"state_dir = \"//\"", "state_dir"},
		"NUL in run_dir":         {"run_dir = \"/a\\u0000\"", "run_dir"},
		"long run_dir":           {"run_dir = \"/" + strings.Repeat("a", 120) + "\"", "agent_socket"},
		"one path for two":       {"agent_socket = \"/run/x\"\nadmin_socket = \"/run/x\"", "admin_socket"},
		"socket mode":            {"agent_socket_mode = \"0777\"", "agent_socket_mode"},
		"socket mode in decimal": {"agent_socket_mode = \"438\"", "agent_socket_mode"},
		"node without backend":   {"[node]\nbackend = \"hsm\"", "node.backend"},

		"backend without name": {"[[backend]]\nkind = \"soft\"", "backend[0].name"},
		"bad backend name":     {"[[backend]]\nname = \"My HSM\"\nkind = \"soft\"", "backend[0].name"},
		"backend twice":        {minimal + minimal, "backend.hsm.name"},
		"two defaults":         {minimal + "default = true\n" + strings.Replace(minimal, "hsm", "hsm2", 1) + "default = true", "backend.hsm2.default"},
		"no kind":              {"[[backend]]\nname = \"a\"", "backend.a.kind"},
		"other kind":           {"[[backend]]\nname = \"a\"\nkind = \"kms\"", "backend.a.kind"},
		"soft by default":      {"[[backend]]\nname = \"a\"\nkind = \"soft\"\ndefault = true", "backend.a.default"},
		"no module":            {strings.Replace(minimal, "module = \"/m.so\"\n", "", 1), "backend.hsm.module"},
		"relative module":      {strings.Replace(minimal, "/m.so", "m.so", 1), "backend.hsm.module"},
		"no token":             {strings.Replace(minimal, "token = \"t\"\n", "", 1), "backend.hsm.token"},
		"no PIN":               {strings.Replace(minimal, "pin = {file = \"/pin\"}\n", "", 1), "backend.hsm.pin"},
		"PIN file and env":     {strings.Replace(minimal, "\"/pin\"", "\"/pin\", env = \"PIN\"", 1), "backend.hsm.pin"},
		"relative PIN file":    {strings.Replace(minimal, "/pin", "pin", 1), "backend.hsm.pin"},
		"relative plugin":      {minimal + "plugin = \"x\"", "backend.hsm.plugin"},
		"short plugin sum":     {minimal + "plugin_sha256 = \"00\"", "backend.hsm.plugin_sha256"},
		"preloaded library":    {minimal + "env = {LD_PRELOAD = \"/x.so\"}", "backend.hsm.env"},
		"odd variable":         {minimal + "env = {\"A=B\" = \"x\"}", "backend.hsm.env"},
		"TPM key in pkcs11":    {minimal + "device = \"device:/dev/tpm0\"", "backend.hsm.device"},
		"module in tpm":        {"[[backend]]\nname = \"a\"\nkind = \"tpm\"\ndevice = \"device:/dev/tpm0\"\nmodule = \"/m\"", "backend.a.module"},
		"no device":            {"[[backend]]\nname = \"a\"\nkind = \"tpm\"", "backend.a.device"},
		"device without kind":  {"[[backend]]\nname = \"a\"\nkind = \"tpm\"\ndevice = \"/dev/tpm0\"", "backend.a.device"},
		"device over TCP":      {"[[backend]]\nname = \"a\"\nkind = \"tpm\"\ndevice = \"mssim:host=x\"", "backend.a.device"},
		"relative dir":         {"[[backend]]\nname = \"a\"\nkind = \"soft\"\ndir = \"keys\"", "backend.a.dir"},
		"short deadline":       {minimal + "deadline = \"1ms\"", "backend.hsm.deadline"},
	} {
		c2, err := config.Parse([]byte(c.text), "trustd.toml")
		if err == nil || c2 != nil {
			t.Errorf("%s passes", name)
			continue
		}
		if fault.CodeOf(err) != fault.Malformed || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q in it", name, err, c.want)
		}
	}
	_, err := config.Parse(bytes.Repeat([]byte("\n"), 1<<20+1), "trustd.toml")
	if fault.CodeOf(err) != fault.TooLarge {
		t.Errorf("a file of more than 1 MiB: %v", err)
	}
}

func TestAllProblemsAtOnce(t *testing.T) {
	_, err := config.Parse([]byte("state_dir = \"x\"\n[log]\nlevel = \"y\"\n[[backend]]\nname = \"a\"\nkind = \"soft\"\ndefault = true\n"), "t")
	for _, want := range []string{"3 problems", "state_dir", "Begin it with", "log.level", "backend.a.default"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not name %q", err, want)
		}
	}
	// Each problem can also be had alone.
	var all interface{ Unwrap() []error }
	fields := map[string]bool{}
	if e := fault.From(err); errors.As(e.Err, &all) {
		for _, p := range all.Unwrap() {
			fields[fault.From(p).Field] = true
		}
	}
	if !fields["state_dir"] || !fields["log.level"] || !fields["backend.a.default"] {
		t.Errorf("fields %v", fields)
	}
}

// TestSecretsAreNotQuoted puts a PIN where it does not belong.
func TestSecretsAreNotQuoted(t *testing.T) {
	head := "[[backend]]\nname = \"hsm\"\nkind = \"pkcs11\"\n"
	for _, line := range []string{
		`pin = "73915561"`, `pin = 73915561`, `pin = 73915561739155617391556`, `pin = 7391.5561`, `pin = 73915561x`, `pin = '73915561'`,
		`pin = ["73915561"]`, `pin = { value = "73915561" }`, `pin = { file = 73915561 }`, `pin = { fd = "73915561" }`,
		`pin = { fd = 73915561739155617391556 }`, `pin = { file = "73915561" }`, `pin = { env = "73915561" }`, `pin = { env = "x73915561" }`,
		`pin = """73915561"""`, `pin = 0x73915561zz`, `pin = 73915561-01-01`, `pin = true73915561`, `pin = "73915561`, `pin = {73915561}`,
		`pin.file.x = "73915561"`, `token = 73915561`, `passphrase = "73915561"`, `env = "73915561"`, `env = {PIN = 73915561}`,
		`deadline = "73915561"`, `deadline = 73915561`, `default = "73915561"`, `plugin_sha256 = "73915561"`,
	} {
		_, err := config.Parse([]byte(head+line+"\n"), "trustd.toml")
		if err == nil {
			t.Errorf("%s passes", line)
			continue
		}
		if text := err.Error() + fault.From(err).Text + fault.From(err).Hint; strings.Contains(text, "739155") || strings.Contains(text, "5561") {
			t.Errorf("%s: the error quotes the secret: %v", line, err)
		}
		if strings.HasPrefix(line, "pin = \"73915561\"") && !strings.Contains(err.Error(), `{file = "/path"}`) {
			t.Errorf("%s: the error does not say what to write: %v", line, err)
		}
	}
}

func load(t *testing.T, text string, mode os.FileMode) (*config.Config, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "trustd.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
	return config.Load(path)
}

func TestLoad(t *testing.T) {
	c, err := load(t, full, 0o644)
	if err != nil || c.StateDir != "/var/lib/t" {
		t.Fatalf("%v, %v", c, err)
	}
	t.Setenv(config.StateDirVariable, "/elsewhere")
	t.Setenv(config.RunDirVariable, "/run/elsewhere")
	if c, err = load(t, full, 0o644); err != nil || c.StateDir != "/elsewhere" || c.RunDir != "/run/elsewhere" {
		t.Errorf("the environment does not stand above the file: %+v, %v", c, err)
	}
	if c, err = config.Load(""); err != nil || c.StateDir != "/elsewhere" || c.AgentSocketPath() != "/run/elsewhere/agent.sock" {
		t.Errorf("the environment does not stand above the default: %+v, %v", c, err)
	}
	t.Setenv(config.StateDirVariable, "relative")
	if _, err := load(t, full, 0o644); fault.From(err).Field != "state_dir" {
		t.Errorf("the environment is not checked: %v", err)
	}
}

func TestLoadRefuses(t *testing.T) {
	for _, mode := range []os.FileMode{0o664, 0o646} {
		if _, err := load(t, "", mode); fault.CodeOf(err) != fault.Usage {
			t.Errorf("a file of mode %o: %v", mode, err)
		}
	}
	dir := t.TempDir()
	if _, err := config.Load(filepath.Join(dir, "no.toml")); fault.CodeOf(err) != fault.NotFound {
		t.Errorf("no file: %v", err)
	}
	if _, err := config.Load(dir); fault.CodeOf(err) != fault.Usage {
		t.Errorf("a folder: %v", err)
	}
	if os.Geteuid() == 0 {
		path := filepath.Join(dir, "t.toml")
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(path, 65534, 65534); err != nil {
			t.Fatal(err)
		}
		if _, err := config.Load(path); fault.CodeOf(err) != fault.Usage {
			t.Errorf("another user's file: %v", err)
		}
	}
}

func TestAgentSocketAccess(t *testing.T) {
	c := config.Default()
	if mode, gid, err := c.AgentSocketAccess(); mode != 0o666 || gid != -1 || err != nil {
		t.Errorf("%o, %d, %v", mode, gid, err)
	}
	c.AgentSocketMode, c.AgentSocketGroup = "0660", "1234"
	if mode, gid, err := c.AgentSocketAccess(); mode != 0o660 || gid != 1234 || err != nil {
		t.Errorf("%o, %d, %v", mode, gid, err)
	}
	c.AgentSocketGroup = "root"
	if _, gid, err := c.AgentSocketAccess(); gid != 0 || err != nil {
		t.Errorf("%d, %v", gid, err)
	}
	for _, group := range []string{"no-such-group", "-1", "4294967296"} {
		c.AgentSocketGroup = group
		if _, _, err := c.AgentSocketAccess(); fault.From(err).Field != "agent_socket_group" {
			t.Errorf("%s: %v", group, err)
		}
	}
}

func TestConversions(t *testing.T) {
	c := parse(t, full)
	if p := c.VerifyPolicy(); p.Skew != time.Minute || p.Grace != 10*time.Second || p.TTL.Write != time.Minute || p.TTL.Read != 2*time.Minute ||
		p.TTL.Default != 3*time.Minute || p.MessageAge != time.Hour || !p.LegacyTH033 {
		t.Errorf("%+v", p)
	}
	if l := c.Limits.Caller(); !reflect.DeepEqual(l, caller.Config{Rate: 1.5, Burst: 7, Concurrent: 9}) {
		t.Errorf("%+v", l)
	}
	if h := c.HistoryConfig(); !h.Required || h.SyncInterval != time.Second {
		t.Errorf("%+v", h)
	}
	for level, want := range map[string]slog.Level{"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn,
		"error": slog.LevelError, "": slog.LevelInfo} {
		if got := (config.Log{Level: level}).SlogLevel(); got != want {
			t.Errorf("%s is %v", level, got)
		}
	}
}

// TestGuess completes backends from flags, and checks that the block printed for each can be pasted.
func TestGuess(t *testing.T) {
	for _, c := range []struct {
		given config.Backend
		pin   string
		kind  string
	}{
		{config.Backend{Module: "/m.so", Token: "t"}, "/pin", config.PKCS11},
		{config.Backend{Device: "device:/dev/tpmrm0"}, "", config.TPM},
		{config.Backend{Device: "swtpm:path=/s", Dir: "/d"}, "", config.TPM},
		{config.Backend{Dir: "/d"}, "", config.Soft},
		{config.Backend{Dir: "d"}, "pass", config.Soft},
	} {
		b := c.given
		if err := b.Guess(c.pin); err != nil || b.Kind != c.kind || b.Name == "" {
			t.Errorf("%+v: %+v, %v", c.given, b, err)
			continue
		}
		read, err := config.Parse([]byte(b.TOML()), "block")
		if err != nil || len(read.Backends) != 1 || !reflect.DeepEqual(read.Backends[0], b) {
			t.Errorf("%+v prints\n%s%v", b, b.TOML(), err)
		}
	}
	for _, b := range []config.Backend{{}, {Module: "/m", Device: "device:/d"}, {Module: "/m", Dir: "/d"}} {
		if err := b.Guess(""); fault.CodeOf(err) != fault.Usage {
			t.Errorf("%+v: %v", b, err)
		}
	}
	b := config.Backend{Device: "device:/dev/tpmrm0"}
	if err := b.Guess("/pin"); fault.CodeOf(err) != fault.Usage {
		t.Errorf("a TPM with a PIN: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"", full, minimal, "[verify]\nskew = 30", "a = 1", "[[backend]]\npin = \"1234\"", "state_dir = \"\\u0000\"", "x = [", "\xff"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := config.Parse(slices.Clone(data), "fuzz")
		if (err == nil) == (c == nil) {
			t.Fatalf("%v, %v", c, err)
		}
		if err != nil {
			if code := fault.CodeOf(err); code != fault.Malformed && code != fault.TooLarge {
				t.Errorf("%v", err)
			}
			return
		}
		var b bytes.Buffer
		if err := c.Print(&b); err != nil {
			t.Fatal(err)
		}
		again, err := config.Parse(b.Bytes(), "again")
		if err != nil {
			t.Fatalf("what was printed is refused: %v\n%s", err, b.String())
		}
		var c2 bytes.Buffer
		if err := again.Print(&c2); err != nil || !bytes.Equal(b.Bytes(), c2.Bytes()) {
			t.Errorf("printed twice:\n%s\n%s", b.String(), c2.String())
		}
	})
}
