package config

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/trustd/trustd/caller"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/secret"
	"github.com/trustd/trustd/packet"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/history"
	"github.com/trustd/trustd/verify"
)

// AgentSocketPath returns the path of the socket for agents.
func (c *Config) AgentSocketPath() string {
	if c.AgentSocket != "" {
		return c.AgentSocket
	}
	return filepath.Join(c.RunDir, "agent.sock")
}

// AdminSocketPath returns the path of the socket for operators.
func (c *Config) AdminSocketPath() string {
	if c.AdminSocket != "" {
		return c.AdminSocket
	}
	return filepath.Join(c.RunDir, "admin.sock")
}

// AgentSocketAccess returns mode and group of the socket for agents; the group -1 is the daemon's own. It looks
// the group up.
func (c *Config) AgentSocketAccess() (mode fs.FileMode, gid int, err error) {
	m, err := socketMode(c.AgentSocketMode)
	if err != nil {
		return 0, 0, err
	}
	if c.AgentSocketGroup == "" {
		return fs.FileMode(m), -1, nil
	}
	if gid, err := strconv.ParseUint(c.AgentSocketGroup, 10, 31); err == nil {
		return fs.FileMode(m), int(gid), nil
	}
	g, err := user.LookupGroup(c.AgentSocketGroup)
	if err != nil {
		return 0, 0, &fault.Error{Code: fault.Malformed, Field: "agent_socket_group", Err: err,
			Text: "the host has no such group"}
	}
	gid, err = strconv.Atoi(g.Gid)
	if err != nil {
		return 0, 0, fault.Wrap(fault.Internal, err, "the group has no number")
	}
	return fs.FileMode(m), gid, nil
}

// SlogLevel returns the level as log/slog's.
func (l Log) SlogLevel() slog.Level {
	var level slog.Level
	if err := level.UnmarshalText([]byte(l.Level)); err != nil {
		return slog.LevelInfo // Validate has refused it
	}
	return level
}

// Caller returns the limits as package caller takes them.
func (l Limits) Caller() caller.Config {
	return caller.Config{Rate: l.Rate, Burst: l.Burst, Concurrent: l.Concurrent}
}

// VerifyPolicy returns what this host demands of packets and messages.
func (c *Config) VerifyPolicy() verify.Policy {
	v := &c.Verify
	return verify.Policy{
		Skew: v.Skew.Duration(), Grace: v.Grace.Duration(), MessageAge: v.MessageAge.Duration(), LegacyTH033: v.LegacyTH033,
		MinGrade: signer.Grade(v.MinGrade), DirectOnly: v.DirectOnly,
		TTL: packet.TTLPolicy{Write: v.TTLWrite.Duration(), Read: v.TTLRead.Duration(), Default: v.TTLDefault.Duration()},
	}
}

// HistoryConfig returns the settings of the signature histories.
func (c *Config) HistoryConfig() history.Config {
	return history.Config{Required: c.History.Required, SyncInterval: c.History.SyncInterval.Duration()}
}

// Guess completes a backend that is named on a command line by its device alone: kind, a name, and a PIN in
// pinFile ("" for none).
func (b *Backend) Guess(pinFile string) error {
	switch {
	case b.Module != "" && b.Device == "" && b.Dir == "":
		b.Kind = PKCS11
	case b.Device != "" && b.Module == "":
		b.Kind = TPM
	case b.Dir != "" && b.Module == "":
		b.Kind = Soft
	default:
		return fault.New(fault.Usage, "name one device: a module, a TPM or a folder")
	}
	if b.Name == "" {
		b.Name = map[string]string{PKCS11: "hsm", TPM: "tpm", Soft: "soft"}[b.Kind]
	}
	var err error
	for _, path := range []*string{&b.Module, &b.Dir, &pinFile} {
		if *path == "" {
			continue
		}
		if *path, err = filepath.Abs(*path); err != nil {
			return fault.Wrap(fault.Internal, err, "the working folder is gone")
		}
	}
	switch {
	case pinFile == "":
	case b.Kind == PKCS11:
		b.PIN = secret.Source{File: pinFile}
	case b.Kind == Soft:
		b.Passphrase = secret.Source{File: pinFile}
	default:
		return fault.New(fault.Usage, "a TPM has no PIN file")
	}
	return nil
}

// TOML returns the block that puts b into a configuration file.
func (b *Backend) TOML() string {
	var out strings.Builder
	if err := write(&out, struct {
		Backends []Backend `toml:"backend"`
	}{[]Backend{*b}}); err != nil {
		return ""
	}
	return out.String()
}

// Print writes c as a configuration file: every key with the value in force. Load reads it back as the same Config.
func (c *Config) Print(w io.Writer) error { return write(w, c) }

func write(w io.Writer, v any) error {
	var b bytes.Buffer
	enc := toml.NewEncoder(&b)
	enc.SetTablesInline(false)
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("writing the configuration: %w", err)
	}
	if _, err := w.Write(b.Bytes()); err != nil {
		return fmt.Errorf("writing the configuration: %w", err)
	}
	return nil
}
