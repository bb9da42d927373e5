// Package api says what a trustd does. Agent is what agents may ask over agent.sock, Admin what operators may ask
// over admin.sock; the daemon implements both, package client implements Agent over HTTP, and a call means the
// same in process and over the wire. The package imports only the standard library and the codes.
//
// Every request and reply is one JSON object. Unknown members are refused. Times are RFC 3339 in UTC with
// microseconds at most; byte strings are standard base64 unless a field says otherwise. Errors are RFC 9457
// problem documents (Problem).
package api

import (
	"context"
	"encoding/json"
	"time"

	"github.com/trustd/trustd/fault"
)

// MaxBody bounds one packet, message or request body in bytes; a batch may hold MaxBatch of them and MaxBatchBody
// bytes in all.
const (
	MaxBody      = 256 << 10
	MaxBatch     = 1024
	MaxBatchBody = 8 << 20
)

// Agent is what agents ask. The caller is the process at the other end of the socket (caller.FromContext); no
// method takes its word for who it is.
type Agent interface {
	// SignPacket completes and signs one TrustHandoff task packet.
	SignPacket(ctx context.Context, r SignPacketRequest) (SignPacketReply, error)
	// SignPackets signs many; results stand in the order of the requests, each with its own error.
	SignPackets(ctx context.Context, rs []SignPacketRequest) []SignPacketResult
	// VerifyPacket decides on one packet. A refusal is a Decision, not an error; an error means that nothing was decided.
	VerifyPacket(ctx context.Context, r VerifyPacketRequest) (Decision, error)
	// VerifyPackets decides on many, in order.
	VerifyPackets(ctx context.Context, rs []VerifyPacketRequest) []VerifyPacketResult
	// SignMessage signs arbitrary JSON as a SignedMessage.
	SignMessage(ctx context.Context, r SignMessageRequest) (SignMessageReply, error)
	// VerifyMessage checks a SignedMessage in one of three modes.
	VerifyMessage(ctx context.Context, r VerifyMessageRequest) (MessageVerdict, error)
	// VerifyChain checks that messages, oldest first, form a chain.
	VerifyChain(ctx context.Context, r VerifyChainRequest) (ChainVerdict, error)
	// Whoami says what the daemon sees of the caller and which agents it may act as.
	Whoami(ctx context.Context, explain bool) (Whoami, error)
	// Capabilities says what this daemon can do.
	Capabilities(ctx context.Context) (Capabilities, error)
	// Identity looks up an agent by id, alias or fingerprint.
	Identity(ctx context.Context, name string) (Identity, error)
	// History returns the signature history of one of the agent's keys: sequence number, size and root.
	History(ctx context.Context, name string) (History, error)
	// Health says whether the daemon and each of its parts can serve.
	Health(ctx context.Context) (Health, error)
}

// Admin is what operators ask of the local host.
type Admin interface {
	AddAgent(ctx context.Context, r AddAgentRequest) (AgentDetail, error)
	ListAgents(ctx context.Context) ([]AgentDetail, error)
	ShowAgent(ctx context.Context, name string) (AgentDetail, error)
	// RemoveAgent decommissions the agent: its key is destroyed, its messages are refused from then on.
	RemoveAgent(ctx context.Context, name string, r RemoveAgentRequest) (AgentDetail, error)
	// RevokeAgent refuses the agent's messages from now on and keeps its key.
	RevokeAgent(ctx context.Context, name string, r RevokeAgentRequest) (AgentDetail, error)
	ImportAgent(ctx context.Context, r ImportAgentRequest) (AgentDetail, error)
	// ExportPrivate returns a soft key under a passphrase; a hardware key answers not_exportable.
	ExportPrivate(ctx context.Context, name string, r ExportPrivateRequest) (ExportPrivateReply, error)
	// SetAgent changes how this host treats one of its agents; it is no record.
	SetAgent(ctx context.Context, name string, r SetAgentRequest) (AgentDetail, error)
	ListKeys(ctx context.Context) ([]Key, error)
	// RecheckKey has an agent's key sign a test. An orphaned key that does is used again.
	RecheckKey(ctx context.Context, name string) (AgentDetail, error)
	Backends(ctx context.Context) ([]Backend, error)
	ShowBackend(ctx context.Context, name string) (Backend, error)
	// UnlockBackend has a backend try the authorisation that its device refused, exactly once.
	UnlockBackend(ctx context.Context, name string) (Backend, error)
	// ResetCanary takes a device as it is: where it does not hold the backend's canary key any more, another is made.
	ResetCanary(ctx context.Context, name string) (Backend, error)
}

// SignPacketRequest asks for a signature on a task packet.
type SignPacketRequest struct {
	// Agent is the id or an alias of the agent to sign as; "" where the caller may act as exactly one.
	Agent string `json:"agent,omitempty"`
	// Packet is a SignedTaskPacket without signature. from_agent, public_key, signature_algo, nonce, packet_id, issued_at and expires_at
	// are filled in where they are absent; where they are present they must be right.
	Packet json.RawMessage `json:"packet"`
	// Batchable permits a signature that covers a batch of messages (trustd-batch/v1), which is quicker where the device
	// is busy; the Python peers cannot read those. Absent: as the agent's own setting says.
	Batchable *bool `json:"batchable,omitempty"`
}

// SignPacketReply is a signed packet and what made it.
type SignPacketReply struct {
	Packet json.RawMessage `json:"packet"` // the complete SignedTaskPacket, ready to send
	Signed
}

// Signed says how a signature was made.
type Signed struct {
	AgentID     string `json:"agent_id"`
	Fingerprint string `json:"fingerprint"`
	Algorithm   string `json:"algorithm"` // ed25519, ecdsa-p256, ...
	Grade       string `json:"grade"`     // hardware-attested, hardware-claimed or software
	Mode        string `json:"mode"`      // direct or batched
	Epoch       uint64 `json:"epoch"`
	Sequence    uint64 `json:"sequence"` // of this key; gaps are possible, repeats are not
	BatchSize   int    `json:"batch_size,omitempty"`
}

// SignPacketResult is one result of a batch: a reply or a problem.
type SignPacketResult struct {
	*SignPacketReply
	Error *Problem `json:"error,omitempty"`
}

// VerifyPacketRequest asks for a decision on a packet.
type VerifyPacketRequest struct {
	Packet json.RawMessage `json:"packet"`
	// Audience is the id or alias of the local agent that received the packet; "" for any that the caller may verify for.
	Audience string `json:"audience,omitempty"`
	Detail   bool   `json:"detail,omitempty"`
	Demands
}

// Demands are what one request asks of a signature on top of the host's policy.
type Demands struct {
	// MinGrade is the lowest grade of the signer's key: hardware-attested, hardware-claimed or software.
	MinGrade string `json:"min_grade,omitempty"`
	// DirectOnly refuses batched signatures.
	DirectOnly bool `json:"direct_only,omitempty"`
}

// The two decisions.
const (
	Accept = "ACCEPT"
	Reject = "REJECT"
)

// Decision is the answer of the acceptance gate. The first four members are TrustHandoff's PacketDecision.
type Decision struct {
	PacketID string     `json:"packet_id,omitempty"`
	Decision string     `json:"decision"`
	Reason   fault.Code `json:"reason,omitempty"` // why not; "" on ACCEPT
	Details  *Details   `json:"details,omitempty"`
	// Field names the part of the packet that is malformed; Text adds to the reason. Neither holds a value of the packet.
	Field string `json:"field,omitempty"`
	Text  string `json:"text,omitempty"`
	// Form is "th-0.4" or "th-0.3.3" (packets of TrustHandoff 0.3.3 and older, where policy admits them).
	Form string `json:"form,omitempty"`
}

// Details are IATP's verify_detailed keys and, after them, ours.
type Details struct {
	Valid       bool   `json:"valid"`
	SignerID    string `json:"signer_id"`
	Fingerprint string `json:"fingerprint"`
	SignedAt    string `json:"signed_at"`
	Algorithm   string `json:"algorithm"`
	PayloadHash string `json:"payload_hash"`

	ReasonCode fault.Code `json:"reason_code,omitempty"`
	KeyEpoch   uint64     `json:"key_epoch"`
	TrustLevel string     `json:"trust_level"`
	Grade      string     `json:"grade,omitempty"`
	ViewHead   string     `json:"view_head"` // of the registry at the time of the decision
	ViewSize   uint64     `json:"view_size"`
	Mode       string     `json:"mode"` // direct or batched
}

// VerifyPacketResult is one result of a batch.
type VerifyPacketResult struct {
	*Decision
	Error *Problem `json:"error,omitempty"`
}

// SignMessageRequest asks for a SignedMessage.
type SignMessageRequest struct {
	Agent    string          `json:"agent,omitempty"`
	Payload  json.RawMessage `json:"payload"`            // any JSON value in RFC 8785's reach
	Audience []string        `json:"audience,omitempty"` // at most 16 names
	TTL      int64           `json:"ttl_seconds,omitempty"`
	Prev     string          `json:"prev,omitempty"` // "sha256:..." digest of the message this one answers
	Nonce    string          `json:"nonce,omitempty"`
	// Batchable is as in SignPacketRequest.
	Batchable *bool `json:"batchable,omitempty"`
}

// SignMessageReply is a SignedMessage.
type SignMessageReply struct {
	Message json.RawMessage `json:"message"`
	Digest  string          `json:"digest"` // what a next message names as prev
	Signed
}

// The modes of VerifyMessage.
const (
	ModeRegistry = "registry" // the default: the registry says which key speaks for the signer
	ModeKey      = "key"      // against a key that the caller names
	ModeEmbedded = "embedded" // against the key in the message: the signer is NOT checked
)

// VerifyMessageRequest asks for a verdict on a SignedMessage.
type VerifyMessageRequest struct {
	Message  json.RawMessage `json:"message"`
	Mode     string          `json:"mode,omitempty"`
	Key      string          `json:"key,omitempty"`      // mode key: fingerprint, base64 SPKI or PEM
	Audience string          `json:"audience,omitempty"` // must be among the message's audience, where it names one
	Detail   bool            `json:"detail,omitempty"`
	// Once spends the message's nonce, so that the same message is refused a second time.
	Once bool `json:"once,omitempty"`
	Demands
}

// MessageVerdict is the answer to VerifyMessage. SignerChecked is false in mode embedded: the signature is valid,
// but it may be anybody's.
type MessageVerdict struct {
	SignatureValid bool       `json:"signature_valid"`
	SignerChecked  bool       `json:"signer_checked"`
	SignerTrusted  bool       `json:"signer_trusted"`
	TrustLevel     string     `json:"trust_level"`
	Decision       string     `json:"decision"` // ACCEPT only if valid, checked and trusted
	Reason         fault.Code `json:"reason,omitempty"`
	Field          string     `json:"field,omitempty"`
	Text           string     `json:"text,omitempty"`
	Details        *Details   `json:"details,omitempty"`
}

// VerifyChainRequest holds messages, oldest first. Each but the first names the digest of the one before in prev,
// or holds it whole as a member of its payload.
type VerifyChainRequest struct {
	Messages []json.RawMessage `json:"messages"`
}

// ChainVerdict is the answer to VerifyChain.
type ChainVerdict struct {
	Valid    bool             `json:"valid"`
	Reason   fault.Code       `json:"reason,omitempty"`
	At       int              `json:"at,omitempty"` // index of the first message refused
	Text     string           `json:"text,omitempty"`
	Messages []MessageVerdict `json:"messages"`
}

// Whoami is what the daemon sees of its caller.
type Whoami struct {
	UID         uint32   `json:"uid"`
	GID         uint32   `json:"gid"`
	Groups      []uint32 `json:"groups"`
	PID         int32    `json:"pid"`
	Exe         string   `json:"exe,omitempty"`
	ExeSHA256   string   `json:"exe_sha256,omitempty"`
	Cgroup      string   `json:"cgroup,omitempty"`
	SystemdUnit string   `json:"systemd_unit,omitempty"`
	Agents      []Grant  `json:"agents"`
	// Explanation is one line a selector, with whether it is a boundary or only narrows, and whether it can be believed.
	Explanation []string `json:"explanation,omitempty"`
}

// Grant is an agent that the caller may act as.
type Grant struct {
	AgentID string   `json:"agent_id"`
	Verbs   []string `json:"verbs"`
}

// Capabilities is what the daemon can do.
type Capabilities struct {
	Version    string           `json:"version"`
	ClusterID  string           `json:"cluster_id"`
	Algorithms []string         `json:"algorithms"`
	Backends   []Backend        `json:"backends"`
	Formats    []string         `json:"formats"`
	Limits     map[string]int64 `json:"limits"`
}

// Identity is an agent as the registry shows it. The first four members are IATP's export_public.
type Identity struct {
	AgentID     string            `json:"agent_id"`
	PublicKey   string            `json:"public_key"` // base64 of the DER SubjectPublicKeyInfo
	Fingerprint string            `json:"fingerprint"`
	Metadata    map[string]string `json:"metadata"`

	Algorithm  string     `json:"algorithm"`
	Aliases    []string   `json:"aliases"`
	Lineage    string     `json:"lineage"` // fingerprint of the first key
	Epoch      uint64     `json:"epoch"`
	TrustLevel string     `json:"trust_level"` // NONE, LOW, MEDIUM, HIGH, ADMIN
	Status     string     `json:"status"`      // active, revoked, removed, expired
	Role       string     `json:"role"`        // agent, operator, node
	Grade      string     `json:"grade,omitempty"`
	Origin     string     `json:"origin,omitempty"`
	Possession bool       `json:"possession"` // the key's holder proved that it holds it
	CreatedAt  time.Time  `json:"created_at"`
	ExpiresAt  *time.Time `json:"expires_at,omitempty"`
	Version    uint64     `json:"version"`
	PEM        string     `json:"pem"`
}

// History is the state of one key's signature history.
type History struct {
	AgentID     string `json:"agent_id"`
	Fingerprint string `json:"fingerprint"`
	Sequence    uint64 `json:"sequence"` // last number given out
	Size        uint64 `json:"size"`     // leaves of the Merkle log
	Root        string `json:"root"`     // "sha256:..." of the Merkle log (RFC 6962 hashing)
}

// Health says whether the daemon can serve.
type Health struct {
	Ready    bool          `json:"ready"`
	Version  string        `json:"version"`
	Uptime   int64         `json:"uptime_seconds"`
	Checks   []HealthCheck `json:"checks"`
	Registry RegistryHead  `json:"registry"`
}

// HealthCheck is the state of one part.
type HealthCheck struct {
	Name   string `json:"name"`
	Status string `json:"status"` // ok, warning, failure
	Text   string `json:"text,omitempty"`
	Remedy string `json:"remedy,omitempty"`
}

// RegistryHead names the state of the registry.
type RegistryHead struct {
	ClusterID string `json:"cluster_id"`
	Size      uint64 `json:"size"`
	Root      string `json:"root"`
}

// A Selector lists what a caller must be. All members given must match; at least one must be a boundary (uid,
// gid, group, cgroup, systemd_unit). exe and exe_sha256 only narrow and are refused alone.
type Selector struct {
	UID         *uint32 `json:"uid,omitempty" toml:"uid,omitempty"`
	GID         *uint32 `json:"gid,omitempty" toml:"gid,omitempty"`
	Group       *uint32 `json:"group,omitempty" toml:"group,omitempty"` // supplementary or primary
	Cgroup      string  `json:"cgroup,omitempty" toml:"cgroup,omitempty"`
	SystemdUnit string  `json:"systemd_unit,omitempty" toml:"systemd_unit,omitempty"`
	Exe         string  `json:"exe,omitempty" toml:"exe,omitempty"`
	ExeSHA256   string  `json:"exe_sha256,omitempty" toml:"exe_sha256,omitempty"`
}

// The settings of an agent's batching: what becomes of requests to sign that do not say whether they may be batched.
const (
	BatchingOnRequest = "on-request" // the default: they are signed directly
	BatchingAlways    = "always"     // they may be batched
	BatchingNever     = "never"      // they, and those that may be, are signed directly
)

// The verbs of a Binding.
const (
	VerbSign    = "sign"
	VerbVerify  = "verify"
	VerbOperate = "operate"
)

// A Binding says which callers may use an agent, and for what. Verbs is sign and verify where it is empty.
type Binding struct {
	Selector Selector `json:"selector"`
	Verbs    []string `json:"verbs,omitempty"`
}

// AddAgentRequest makes a key and registers an agent.
type AddAgentRequest struct {
	AgentID   string            `json:"agent_id"`
	Backend   string            `json:"backend,omitempty"`   // name in the configuration; "" for the default
	Algorithm string            `json:"algorithm,omitempty"` // "" for the backend's default
	KeyURI    string            `json:"key_uri,omitempty"`   // adopt this key, made by others, instead of making one
	Aliases   []string          `json:"aliases,omitempty"`
	Metadata  map[string]string `json:"metadata,omitempty"`
	Level     string            `json:"trust_level,omitempty"` // "" is LOW; more needs the verb operate
	Bindings  []Binding         `json:"bindings,omitempty"`
	ExpiresAt *time.Time        `json:"expires_at,omitempty"`
	Role      string            `json:"role,omitempty"` // agent (default) or operator
}

// AgentDetail is an Identity and what this host knows of it.
type AgentDetail struct {
	Identity
	Local    bool      `json:"local"` // this host holds the private key
	Backend  string    `json:"backend,omitempty"`
	KeyURI   string    `json:"key_uri,omitempty"`
	KeyState string    `json:"key_state,omitempty"` // that of the backend, or orphaned
	Batching string    `json:"batching,omitempty"`  // on-request, always, never
	Bindings []Binding `json:"bindings,omitempty"`
	Warnings []string  `json:"warnings,omitempty"`
}

// SetAgentRequest changes what is given and leaves the rest.
type SetAgentRequest struct {
	Batching string `json:"batching,omitempty"` // on-request, always, never
}

// RemoveAgentRequest decommissions an agent.
type RemoveAgentRequest struct {
	Reason  string `json:"reason,omitempty"`
	KeepKey bool   `json:"keep_key,omitempty"`
}

// RevokeAgentRequest revokes an agent.
type RevokeAgentRequest struct {
	Code   string `json:"code,omitempty"` // key_compromise, superseded, decommissioned, privilege_withdrawn
	Reason string `json:"reason,omitempty"`
}

// ImportAgentRequest takes in an identity: public only, or with its private key.
type ImportAgentRequest struct {
	AgentID string `json:"agent_id,omitempty"` // required unless Public names it
	// Public is an IATP export_public object; its fingerprint is computed again and must agree.
	Public json.RawMessage `json:"public,omitempty"`
	// Private is an encrypted private key: PKCS#8 PBES2 PEM, a JWK inside a JWE, or trustd's raw wrapper.
	Private    string            `json:"private,omitempty"`
	Format     string            `json:"format,omitempty"` // pem, jwk, raw
	Passphrase string            `json:"passphrase,omitempty"`
	Backend    string            `json:"backend,omitempty"`
	Aliases    []string          `json:"aliases,omitempty"`
	Metadata   map[string]string `json:"metadata,omitempty"`
	Level      string            `json:"trust_level,omitempty"`
	Bindings   []Binding         `json:"bindings,omitempty"`
}

// ExportPrivateRequest asks for a private key under a passphrase.
type ExportPrivateRequest struct {
	Format     string `json:"format,omitempty"` // pem (default), jwk, raw
	Passphrase string `json:"passphrase"`
}

// ExportPrivateReply is an encrypted private key.
type ExportPrivateReply struct {
	Format string `json:"format"`
	Data   string `json:"data"`
}

// Key is a key on a backend.
type Key struct {
	URI         string `json:"key_uri"`
	Backend     string `json:"backend"`
	Fingerprint string `json:"fingerprint,omitempty"`
	Algorithm   string `json:"algorithm,omitempty"`
	Label       string `json:"label,omitempty"`
	Grade       string `json:"grade"`
	Origin      string `json:"origin"`
	Sensitive   bool   `json:"sensitive"`
	NeverLeft   bool   `json:"never_left"` // always sensitive, never extractable
	Extractable bool   `json:"extractable"`
	UsedBy      string `json:"used_by,omitempty"` // agent id, or UsedByCanary
	State       string `json:"state"`             // ready, orphaned, unused, unreadable
	Problem     string `json:"problem,omitempty"`
}

// UsedByCanary stands in Key.UsedBy for the canary key of a backend. It is no agent id.
const UsedByCanary = "(canary)"

// Backend is a key backend and its device.
type Backend struct {
	Name       string            `json:"name"`
	Kind       string            `json:"kind"`
	Device     string            `json:"device"`
	Default    bool              `json:"default"`
	State      string            `json:"state"`           // ready, degraded, recovering, locked, crash-loop, stopped
	Since      *time.Time        `json:"since,omitempty"` // State
	Grade      string            `json:"grade"`
	Algorithms []string          `json:"algorithms"`
	Mechanisms []string          `json:"mechanisms,omitempty"`
	Limits     map[string]string `json:"limits,omitempty"`
	Problem    string            `json:"problem,omitempty"`
	Remedy     string            `json:"remedy,omitempty"`

	// The rest is for operators, and counts since the daemon started.

	LastSignature *time.Time       `json:"last_signature,omitempty"`
	Waiting       int64            `json:"waiting,omitempty"`  // requests in the device's queue
	Failures      map[string]int64 `json:"failures,omitempty"` // of the device, by class
	Restarts      int64            `json:"restarts,omitempty"` // of the backend's process
	Signatures    *SignatureCounts `json:"signatures,omitempty"`
	Canary        *Canary          `json:"canary,omitempty"`
}

// SignatureCounts counts what a device has signed.
type SignatureCounts struct {
	Direct  int64 `json:"direct"`  // signatures of one message each, those of the canary included
	Batches int64 `json:"batches"` // signatures of batches
	Batched int64 `json:"batched"` // messages that those cover
}

// Canary is a backend's own key, which signs where nobody else has asked for a signature for a while.
type Canary struct {
	KeyID       string `json:"key_id,omitempty"` // in hexadecimal digits; absent until it is made
	Fingerprint string `json:"fingerprint,omitempty"`
	Gone        bool   `json:"gone"` // the device was emptied or replaced: an operator must act
	Signed      int64  `json:"signed"`
	Failed      int64  `json:"failed"`
	Took        int64  `json:"took_us,omitempty"` // by the last one, the wait for its turn included
}

// Problem is an RFC 9457 problem document.
type Problem struct {
	Type       string     `json:"type"` // ProblemType and the code
	Title      string     `json:"title"`
	Status     int        `json:"status"`
	Code       fault.Code `json:"code"`
	Detail     string     `json:"detail,omitempty"`
	Field      string     `json:"field,omitempty"`
	Hint       string     `json:"hint,omitempty"`
	Retryable  bool       `json:"retryable"`
	RetryAfter int64      `json:"retry_after_ms,omitempty"`
	RequestID  string     `json:"request_id,omitempty"`
}

// ProblemType is the prefix of Problem.Type; the code follows it.
const ProblemType = "urn:trustd:error:"

// NewProblem returns err as it may be sent: its code, field, text and hint, never its cause.
func NewProblem(err error) *Problem {
	if err == nil {
		return nil
	}
	e := fault.From(err)
	hint := e.Hint
	if hint == "" {
		hint = e.Code.Hint()
	}
	return &Problem{
		Type: ProblemType + string(e.Code), Title: e.Code.Title(), Status: e.Code.Status(), Code: e.Code,
		Detail: e.Text, Field: e.Field, Hint: hint, Retryable: e.Code.Retryable(), RetryAfter: e.RetryAfter.Milliseconds(),
	}
}

// Err returns the problem as an error that errors.Is(err, code) recognises.
func (p *Problem) Err() error {
	if p == nil {
		return nil
	}
	return &fault.Error{
		Code: p.Code, Field: p.Field, Text: p.Detail, Hint: p.Hint,
		RetryAfter: time.Duration(p.RetryAfter) * time.Millisecond,
	}
}

// IdempotencyKey returns a context that sends the key with a call that changes state; a retry with the same key
// and body has no second effect. Keys have 1 to 64 bytes and are scoped to caller and route.
func IdempotencyKey(ctx context.Context, key string) context.Context {
	return context.WithValue(ctx, idempotencyKey{}, key)
}

// IdempotencyKeyOf returns the key in ctx, or "".
func IdempotencyKeyOf(ctx context.Context) string {
	k, _ := ctx.Value(idempotencyKey{}).(string)
	return k
}

type idempotencyKey struct{}
