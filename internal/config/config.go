// Package config reads the daemon's configuration: one TOML file in which every key is known, plus two environment
// variables for the folders. docs/config.md is made from the comments in this file.
//
// A configuration holds no secret; where one is needed it names a secret.Source. So it can be printed whole.
package config

import (
	"time"

	"github.com/trustd/trustd/internal/secret"
)

// DefaultPath is where the configuration file is looked for when nobody says otherwise.
const DefaultPath = "/etc/trustd/trustd.toml"

// Config is the content of the configuration file. A key that is left out has the value that Default gives it.
type Config struct {
	// Absolute path of the folder that holds what must outlive the daemon: registry, keyring, signature histories,
	// spent nonces, soft and TPM keys, the records of canary keys. It is private to the daemon's user.
	StateDir string `toml:"state_dir" json:"state_dir"`
	// Absolute path of the folder of the sockets.
	RunDir string `toml:"run_dir" json:"run_dir"`
	// Path of the socket for agents. Empty is agent.sock in run_dir.
	AgentSocket string `toml:"agent_socket" json:"agent_socket"`
	// Mode of that socket, in octal digits: 0600, 0660 or 0666. Whoever can connect can ask; what an agent's bindings
	// do not allow is refused to any caller, so that 0666 opens no key to anyone.
	AgentSocketMode string `toml:"agent_socket_mode" json:"agent_socket_mode"`
	// Group of that socket, by name or number. Empty is the daemon's own.
	AgentSocketGroup string `toml:"agent_socket_group" json:"agent_socket_group"`
	// Path of the socket for operators, which only the daemon's user may open. Empty is admin.sock in run_dir.
	AdminSocket string `toml:"admin_socket" json:"admin_socket"`

	// Cluster id that trustd init printed. With it the daemon starts on the registry of that authority and on no other,
	// whatever lies in state_dir. Empty is any.
	ClusterID string `toml:"cluster_id" json:"cluster_id"`

	Log      Log       `toml:"log" json:"log"`
	Verify   Verify    `toml:"verify" json:"verify"`
	Limits   Limits    `toml:"limits" json:"limits"`
	History  History   `toml:"history" json:"history"`
	Node     Node      `toml:"node" json:"node"`
	Keys     Keys      `toml:"keys" json:"keys"`
	Backends []Backend `toml:"backend,omitempty" json:"backend,omitempty"`
}

// Log says what the daemon writes to standard error.
type Log struct {
	// The least severe messages to write: debug, info, warn or error.
	Level string `toml:"level" json:"level"`
	// text or json.
	Format string `toml:"format" json:"format"`
}

// Verify is this host's policy for the packets and messages that it is asked to accept.
type Verify struct {
	// How far in the future a packet may have been issued, for clocks that disagree. At most 5m.
	Skew Duration `toml:"skew" json:"skew"`
	// How long after its end a packet is still accepted. At most 1m.
	Grace Duration `toml:"grace" json:"grace"`
	// The validity of a packet with the risk level write: what is signed gets it, and nothing longer is accepted. Whole
	// seconds, as for the next two.
	TTLWrite Duration `toml:"ttl_write" json:"ttl_write"`
	// The same for the risk level read.
	TTLRead Duration `toml:"ttl_read" json:"ttl_read"`
	// The longest validity of a packet without a risk level.
	TTLDefault Duration `toml:"ttl_default" json:"ttl_default"`
	// How long after its timestamp a message is accepted. 0 leaves that to the message.
	MessageAge Duration `toml:"message_age" json:"message_age"`
	// Accept packets in the form of TrustHandoff 0.3.3 and older. They are never signed.
	LegacyTH033 bool `toml:"legacy_th033" json:"legacy_th033"`
	// The lowest grade of a signer's key that is accepted: hardware-attested, hardware-claimed or software. Empty is any,
	// also that of a key of which nobody has said where it lives.
	MinGrade string `toml:"min_grade" json:"min_grade"`
	// Refuse signatures that cover a batch of messages (trustd-batch/v1).
	DirectOnly bool `toml:"direct_only" json:"direct_only"`
	// How many spent nonces are kept. At this number packets are refused until old ones expire; none is evicted.
	MaxNonces int `toml:"max_nonces" json:"max_nonces"`
}

// Limits bounds what one Unix user may ask of the daemon, so that none keeps the others from being served.
type Limits struct {
	// Operations a second in the long run; one packet of a batch is one operation. 0 is no limit.
	Rate float64 `toml:"rate" json:"rate"`
	// Operations at once. 0 is one second's worth.
	Burst int `toml:"burst" json:"burst"`
	// Requests at once. 0 is no limit.
	Concurrent int `toml:"concurrent" json:"concurrent"`
}

// History says how the history of each key's signatures is kept.
type History struct {
	// Release a signature only once its place in the history is on the disk. Without it a loss of power may lose the
	// last sync_interval of the history; sequence numbers are never repeated either way.
	Required bool `toml:"required" json:"required"`
	// How long the history of a signature may be in memory alone.
	SyncInterval Duration `toml:"sync_interval" json:"sync_interval"`
}

// Node is this host's own identity.
type Node struct {
	// Name of the backend that holds the host's key. Empty is the default backend.
	Backend string `toml:"backend" json:"backend"`
}

// Keys is this host's policy for the keys that it holds.
type Keys struct {
	// The lowest grade that they may have: hardware-attested, hardware-claimed or software. trustd init, agent add and
	// agent import --private refuse lower ones, and one that is there all the same raises an alert. Empty is any.
	MinGrade string `toml:"min_grade" json:"min_grade"`
}

// The kinds of backends.
const (
	PKCS11 = "pkcs11"
	TPM    = "tpm"
	Soft   = "soft"
	Plugin = "plugin"
)

// Backend is one device that holds keys, written as [[backend]].
type Backend struct {
	// Name by which agents are put on this backend: lower-case letters, digits and '-'.
	Name string `toml:"name" json:"name"`
	// pkcs11, tpm, soft or plugin.
	Kind string `toml:"kind" json:"kind"`
	// Use this backend where none is named. At most one says so; a soft backend never does.
	Default bool `toml:"default,omitempty" json:"default,omitempty"`
	// How long one operation of the device may take. 0 is the kind's own bound.
	Deadline Duration `toml:"deadline,omitzero" json:"deadline,omitzero"`

	// pkcs11: absolute path of the vendor's module.
	Module string `toml:"module,omitempty" json:"module,omitempty"`
	// pkcs11: label of the token. A token is never chosen by its slot.
	Token string `toml:"token,omitempty" json:"token,omitempty"`
	// pkcs11: serial number of the token, where labels are not unique.
	Serial string `toml:"serial,omitempty" json:"serial,omitempty"`
	// pkcs11: where the user PIN is. plugin: where the secret is that the plugin gets, if it needs one.
	PIN secret.Source `toml:"pin,omitzero" json:"pin,omitzero"`
	// plugin: absolute path of the plugin. pkcs11: the same of the one that loads the module; empty is trustd-pkcs11 beside
	// the trustd binary, whose checksum is pinned when the daemon starts it first.
	Plugin string `toml:"plugin,omitempty" json:"plugin,omitempty"`
	// pkcs11 and plugin: SHA-256 of the plugin, in 64 lower-case hexadecimal digits, as trustd plugin info prints it. A
	// plugin with another sum is not started. Where plugin is given, this is too, unless dev is true.
	PluginSHA256 string `toml:"plugin_sha256,omitempty" json:"plugin_sha256,omitempty"`
	// pkcs11 and plugin: start whatever lies at the path of the plugin, without a checksum. For those who are writing a
	// plugin, and for nobody else: whoever can change the file has the keys sign.
	Dev bool `toml:"dev,omitempty" json:"dev,omitempty"`
	// plugin: what the plugin wants to know, by names that its documentation has. This is no place for a secret.
	Settings map[string]string `toml:"settings,omitempty" json:"settings,omitempty"`
	// pkcs11 and plugin: environment variables for the plugin, such as SOFTHSM2_CONF; the daemon's own are not passed on.
	// This is no place for a secret.
	Env map[string]string `toml:"env,omitempty" json:"env,omitempty"`
	// pkcs11 and plugin: how many MiB of memory the plugin may hold, from 64 on. One that has more is ended and started
	// again. 0 is 1024.
	MemoryLimit int `toml:"memory_limit,omitempty" json:"memory_limit,omitempty"`
	// pkcs11 and plugin: how many files and connections the plugin may have open, from 32 on. 0 is 256.
	OpenFiles int `toml:"open_files,omitempty" json:"open_files,omitempty"`

	// tpm: device:/dev/tpmrm0 or swtpm:path=/run/swtpm.sock.
	Device string `toml:"device,omitempty" json:"device,omitempty"`

	// tpm and soft: absolute path of the folder of the key files. Empty is a folder with the backend's name in state_dir.
	Dir string `toml:"dir,omitempty" json:"dir,omitempty"`
	// soft: where the passphrase is that seals the key files. Without one they are sealed with a key file that lies
	// beside them.
	Passphrase secret.Source `toml:"passphrase,omitzero" json:"passphrase,omitzero"`
}

// Default returns the configuration of an empty file. It has no backend.
func Default() *Config {
	return &Config{
		StateDir: "/var/lib/trustd", RunDir: "/run/trustd", AgentSocketMode: "0666",
		Log: Log{Level: "info", Format: "text"},
		Verify: Verify{
			Skew: Lasting(30 * time.Second), TTLWrite: Lasting(120 * time.Second), TTLRead: Lasting(900 * time.Second),
			TTLDefault: Lasting(900 * time.Second), MaxNonces: 1_000_000,
		},
		Limits:  Limits{Rate: 100_000, Burst: 200_000, Concurrent: 256},
		History: History{SyncInterval: Lasting(100 * time.Millisecond)},
	}
}

// A Duration is written as text, such as "30s" or "1m30s". It is no integer, so that a number without a unit is not
// taken for nanoseconds.
type Duration struct{ d time.Duration }

// Lasting returns d as a Duration.
func Lasting(d time.Duration) Duration { return Duration{d} }

// Duration returns d as the standard library's type.
func (d Duration) Duration() time.Duration { return d.d }
