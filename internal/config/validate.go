package config

import (
	"fmt"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/secret"
	"github.com/trustd/trustd/registry"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/verify"
)

// maxSocketPath is what fits into a Unix socket address (sun_path) with its final NUL.
const maxSocketPath = 107

// Bounds of the verification policy; TrustHandoff clamps to the same skew and grace.
const (
	maxSkew  = verify.MaxSkew
	maxGrace = verify.MaxGrace
	maxTTL   = 24 * time.Hour
	maxAge   = 365 * 24 * time.Hour
)

// Validate reports everything that is wrong with c.
func (c *Config) Validate() error {
	var p problems
	c.checkPaths(&p)
	c.checkLog(&p)
	c.checkVerify(&p)
	c.checkLimits(&p)
	c.checkBackends(&p)
	return p.err()
}

func (c *Config) checkPaths(p *problems) {
	absolute(p, "state_dir", c.StateDir, true)
	absolute(p, "run_dir", c.RunDir, true)
	absolute(p, "agent_socket", c.AgentSocket, false)
	absolute(p, "admin_socket", c.AdminSocket, false)
	for name, path := range map[string]string{"agent_socket": c.AgentSocketPath(), "admin_socket": c.AdminSocketPath()} {
		if len(path) > maxSocketPath {
			p.add(name, "Choose a shorter run_dir.", "the path of a Unix socket has at most %d bytes", maxSocketPath)
		}
	}
	if c.ClusterID != "" {
		if _, err := registry.ParseClusterID(c.ClusterID); err != nil {
			p.add("cluster_id", "trustd init and GET /v1/capabilities show it.", "a cluster id is sha256: and 64 hexadecimal digits")
		}
	}
	if c.AgentSocketPath() == c.AdminSocketPath() {
		p.add("admin_socket", "", "the two sockets have one path")
	}
	if _, err := socketMode(c.AgentSocketMode); err != nil {
		p.add("agent_socket_mode", "", "the mode of the socket is 0600, 0660 or 0666")
	}
	if strings.ContainsAny(c.AgentSocketGroup, ":\n\x00") {
		p.add("agent_socket_group", "", "not the name or the number of a group")
	}
}

// absolute checks a path; "" passes unless it is required.
func absolute(p *problems, field, path string, required bool) {
	switch {
	case path == "" && !required:
	case !filepath.IsAbs(path) || strings.ContainsRune(path, 0):
		p.add(field, "Begin it with '/'.", "the path is not absolute")
	case field == "state_dir" && filepath.Clean(path) == "/":
		p.add(field, "", "the root folder cannot be the state folder")
	}
}

func (c *Config) checkLog(p *problems) {
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, c.Log.Level) {
		p.add("log.level", "", "a level is debug, info, warn or error")
	}
	if c.Log.Format != "text" && c.Log.Format != "json" {
		p.add("log.format", "", "a format is text or json")
	}
}

func (c *Config) checkVerify(p *problems) {
	v := &c.Verify
	for _, d := range []struct {
		field    string
		value    Duration
		min, max time.Duration
	}{
		{"verify.skew", v.Skew, 0, maxSkew},
		{"verify.grace", v.Grace, 0, maxGrace},
		{"verify.ttl_write", v.TTLWrite, time.Second, maxTTL},
		{"verify.ttl_read", v.TTLRead, time.Second, maxTTL},
		{"verify.ttl_default", v.TTLDefault, time.Second, maxTTL},
		{"verify.message_age", v.MessageAge, 0, maxAge},
		{"history.sync_interval", c.History.SyncInterval, time.Millisecond, time.Minute},
	} {
		if d.value.Duration() < d.min || d.value.Duration() > d.max {
			p.add(d.field, "", "the duration is not within %v and %v", d.min, d.max)
		} else if strings.HasPrefix(d.field, "verify.ttl_") && d.value.Duration()%time.Second != 0 {
			p.add(d.field, "", "the duration is not in whole seconds")
		}
	}
	if _, err := signer.ParseGrade(v.MinGrade); v.MinGrade != "" && err != nil {
		p.add("verify.min_grade", "", "%s", fault.From(err).Text)
	}
	if _, err := signer.ParseGrade(c.Keys.MinGrade); c.Keys.MinGrade != "" && err != nil {
		p.add("keys.min_grade", "", "%s", fault.From(err).Text)
	}
	if v.MaxNonces < 1000 || v.MaxNonces > 100_000_000 {
		p.add("verify.max_nonces", "", "the number is not within 1000 and 100000000")
	}
}

func (c *Config) checkLimits(p *problems) {
	if l := c.Limits; !(l.Rate >= 0 && l.Rate <= 1e9) { // which NaN is not
		p.add("limits.rate", "", "the rate is not within 0 and 1e9")
	}
	if c.Limits.Burst < 0 || c.Limits.Burst > 1e9 {
		p.add("limits.burst", "", "the burst is not within 0 and 1e9")
	}
	if c.Limits.Concurrent < 0 || c.Limits.Concurrent > 1e6 {
		p.add("limits.concurrent", "", "the number is not within 0 and 1e6")
	}
}

func (c *Config) checkBackends(p *problems) {
	names := map[string]bool{}
	first := ""
	for i := range c.Backends {
		b := &c.Backends[i]
		field := "backend." + b.Name
		if !backendName.MatchString(b.Name) {
			field = fmt.Sprintf("backend[%d]", i)
			p.add(field+".name", "", "a name has 1 to 32 lower-case letters, digits and '-', and starts with a letter")
		} else if names[b.Name] {
			p.add(field+".name", "", "two backends have this name")
		}
		names[b.Name] = true
		if b.Default && first != "" {
			p.add(field+".default", "", "backend %s is the default already", first)
		}
		if b.Default {
			first = b.Name
		}
		b.check(p, field)
	}
	if c.Node.Backend != "" && !names[c.Node.Backend] {
		p.add("node.backend", "", "no backend has this name")
	}
}

var (
	backendName = regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}$`)
	envVariable = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,254}$`)
	settingName = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,64}$`)
	sha256Text  = regexp.MustCompile(`^[0-9a-f]{64}$`)
)

// check reports what is wrong with one backend.
func (b *Backend) check(p *problems, field string) {
	if d := b.Deadline.Duration(); d != 0 && (d < 100*time.Millisecond || d > 10*time.Minute) {
		p.add(field+".deadline", "", "the duration is not within 100ms and 10m")
	}
	allowed := map[string][]string{
		PKCS11: append([]string{"module", "token", "serial"}, pluginKeys...),
		TPM:    {"device", "dir"},
		Soft:   {"dir", "passphrase"},
		Plugin: append([]string{"settings"}, pluginKeys...),
	}[b.Kind]
	if allowed == nil {
		p.add(field+".kind", "", "a kind is pkcs11, tpm, soft or plugin")
		return
	}
	for _, key := range b.set() {
		if !slices.Contains(allowed, key) {
			p.add(field+"."+key, "", "a backend of the kind %s has no such key", b.Kind)
		}
	}
	switch b.Kind {
	case PKCS11:
		b.checkPKCS11(p, field)
	case Plugin:
		absolute(p, field+".plugin", b.Plugin, true)
		b.checkPlugin(p, field)
	case TPM:
		if !deviceName(b.Device) {
			p.add(field+".device", "", "a device is device:/dev/tpmrm0 or swtpm:path=/path/of/socket")
		}
		absolute(p, field+".dir", b.Dir, false)
	case Soft:
		if b.Default {
			p.add(field+".default", "", "a soft backend is used only where it is named")
		}
		absolute(p, field+".dir", b.Dir, false)
		checkSecret(p, field+".passphrase", b.Passphrase)
	}
}

// pluginKeys are the keys of every kind whose backend lives in a plugin.
var pluginKeys = []string{"pin", "plugin", "plugin_sha256", "dev", "env", "memory_limit", "open_files"}

// set returns the keys that not all kinds have and that are given.
func (b *Backend) set() []string {
	var keys []string
	v := reflect.ValueOf(*b)
	for i := range v.NumField() {
		key, _, _ := strings.Cut(v.Type().Field(i).Tag.Get("toml"), ",")
		if !slices.Contains([]string{"name", "kind", "default", "deadline"}, key) && !v.Field(i).IsZero() {
			keys = append(keys, key)
		}
	}
	return keys
}

func (b *Backend) checkPKCS11(p *problems, field string) {
	absolute(p, field+".module", b.Module, true)
	absolute(p, field+".plugin", b.Plugin, false)
	b.checkPlugin(p, field)
	if b.Token == "" && b.Serial == "" {
		p.add(field+".token", "List the tokens: trustd key probe --module PATH.",
			"the token is named by its label or serial number")
	}
	if b.PIN.IsZero() {
		p.add(field+".pin", "", "the PIN is missing: say where it is, such as {file = \"/etc/trustd/pin\"}")
	}
}

// Bounds of what a plugin may use. Less than the least is not enough to start one.
const (
	leastMemory = 64 // MiB
	mostMemory  = 1 << 20
	leastFiles  = 32
	mostFiles   = 1 << 16
	maxSettings = 64
	maxSetting  = 4096
)

// checkPlugin checks what all kinds have in common whose backend lives in a plugin.
func (b *Backend) checkPlugin(p *problems, field string) {
	checkSecret(p, field+".pin", b.PIN)
	switch {
	case b.PluginSHA256 != "" && !sha256Text.MatchString(b.PluginSHA256):
		p.add(field+".plugin_sha256", "", "a SHA-256 has 64 lower-case hexadecimal digits")
	case b.Dev && b.PluginSHA256 != "":
		p.add(field+".dev", "", "a plugin has either a checksum or dev = true")
	case b.Plugin != "" && b.PluginSHA256 == "" && !b.Dev:
		p.add(field+".plugin_sha256", "trustd plugin info PATH prints it; dev = true does without while you write a plugin.",
			"the checksum of the plugin is missing")
	}
	if b.MemoryLimit != 0 && (b.MemoryLimit < leastMemory || b.MemoryLimit > mostMemory) {
		p.add(field+".memory_limit", "", "the number of MiB is not within %d and %d", leastMemory, mostMemory)
	}
	if b.OpenFiles != 0 && (b.OpenFiles < leastFiles || b.OpenFiles > mostFiles) {
		p.add(field+".open_files", "", "the number is not within %d and %d", leastFiles, mostFiles)
	}
	if len(b.Settings) > maxSettings {
		p.add(field+".settings", "", "there are at most %d settings", maxSettings)
	}
	for name, value := range b.Settings {
		if !settingName.MatchString(name) || len(value) > maxSetting || !utf8.ValidString(value) || strings.ContainsRune(value, 0) {
			p.add(field+".settings", "", "a setting has a name of 1 to 64 letters, digits, '_', '-' and '.', and at most %d bytes of text",
				maxSetting)
			break
		}
	}
	for name, value := range b.Env {
		switch {
		case !envVariable.MatchString(name) || strings.ContainsRune(value, 0):
			p.add(field+".env", "", "not the name and value of an environment variable")
		case strings.HasPrefix(name, "LD_"):
			p.add(field+".env", "", "variables that change what the plugin loads (LD_...) are not passed on")
		}
	}
}

func checkSecret(p *problems, field string, s secret.Source) {
	if s.IsZero() {
		return
	}
	if err := s.Validate(); err != nil {
		p.add(field, "", "%s", fault.From(err).Text)
	}
}

func deviceName(s string) bool {
	for _, prefix := range []string{"device:", "swtpm:path="} {
		if path, ok := strings.CutPrefix(s, prefix); ok {
			return filepath.IsAbs(path) && !strings.ContainsRune(path, 0)
		}
	}
	return false
}

func socketMode(s string) (uint32, error) {
	m, err := strconv.ParseUint(s, 8, 32)
	if err != nil || m != 0o600 && m != 0o660 && m != 0o666 {
		return 0, fault.BadField("agent_socket_mode", "the mode of the socket is 0600, 0660 or 0666")
	}
	return uint32(m), nil
}
