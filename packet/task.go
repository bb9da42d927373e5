// Package packet holds the messages that agents exchange and the exact bytes under their signatures: TrustHandoff's
// SignedTaskPacket (Task) and trustd's own SignedMessage. It is pure: parsing and building, no keys, no clock.
//
// A parsed Task says nothing about who made it. Until a signature over SigningBytes has been verified against a key
// from the registry, every field is a claim.
package packet

import (
	"encoding/json"
	"time"

	"github.com/trustd/trustd/internal/pyjson"
)

// MaxTask bounds the text of one packet, in bytes.
const MaxTask = 256 << 10

// MaxName bounds packet_id, task_id, from_agent, to_agent and nonce, in bytes: they end up in stores and logs.
const MaxName = 256

// maxInt bounds the integers of the format. Those inside context are bounded by their digits alone.
const maxInt = 1<<31 - 1

// The risk levels and the lifetimes that TrustHandoff 0.4.0 gives them where ttl_seconds is absent. They are part
// of the signed bytes, not of a policy: see TTLPolicy for that.
const (
	RiskWrite = "write"
	RiskRead  = "read"

	formatWriteTTL = 120
	formatReadTTL  = 900
)

// A Task is one parsed SignedTaskPacket. Its fields are what the packet says after the defaults of the format; they
// are for reading only.
type Task struct {
	PacketID  string
	TaskID    string
	FromAgent string
	ToAgent   string
	Nonce     string
	Intent    string

	IssuedAt  Time
	ExpiresAt Time

	// RiskLevel is "read" where the packet has ttl_seconds alone; TTLSeconds is 120 or 900 where it has a known
	// risk_level alone. Both count as present then, in the signed bytes too.
	RiskLevel  Optional[string]
	TTLSeconds Optional[int64]

	Permissions  Permissions
	Constraints  Optional[Constraints]
	Provenance   Optional[Provenance]
	AIProvenance AIProvenance

	CapabilityToken Optional[string]
	TaskType        Optional[string]
	Goal            Optional[string]
	MemoryRefs      []string

	SignatureAlgo string
	SignatureText string // canonical base64; "" in a packet that is not signed yet
	PublicKeyPEM  string // what the packet says; the registry decides

	wire    string
	signing []byte
	at      [fieldCount]span // of each value in signing; for signature, where its member belongs
	older   bool             // none of the members that 0.3.3 added is on the wire
}

// An Optional is a value that may be null or absent.
type Optional[T any] struct {
	Value T
	Set   bool
}

// A Time is a moment together with the offset it was written in, which is part of the signed bytes.
type Time struct {
	Instant time.Time // in UTC
	Offset  time.Duration
	Present bool
}

// Permissions is what the receiver may do. Without MaxToolCalls the number is not limited.
type Permissions struct {
	AllowedActions []string
	MaxToolCalls   Optional[int64]
}

// Constraints limit how a task is carried out. RequiresHumanReview is false, not null, where it is absent.
type Constraints struct {
	MaxRuntimeSeconds   Optional[int64]
	DataBoundary        Optional[string]
	RequiresHumanReview Optional[bool]
}

// Provenance is what the packet says of its origin.
type Provenance struct {
	OriginWorkflow  Optional[string]
	DelegationDepth Optional[int64]
}

// AIProvenance is what the packet says of the model that wrote its payload. Source is "" unless ai_provenance has a
// member "source" that is a string.
type AIProvenance struct {
	Present bool
	Source  string
}

type span struct{ lo, hi int }

// SigningBytes returns the exact bytes that the signature covers, whatever the algorithm: the canonical form of
// TrustHandoff 0.4.0 (packet.md 1.3). The caller must not change them.
func (t *Task) SigningBytes() []byte { return t.signing }

// JSON returns the text that was parsed.
func (t *Task) JSON() []byte { return []byte(t.wire) }

// Context returns the canonical JSON of the context, {} where there is none.
func (t *Task) Context() json.RawMessage {
	at := t.at[fieldContext]
	return append(json.RawMessage(nil), t.signing[at.lo:at.hi]...)
}

// ContextValue returns the canonical JSON of one member of the context.
func (t *Task) ContextValue(key string) (json.RawMessage, bool) {
	at := t.at[fieldContext]
	return pyjson.Lookup(string(t.signing[at.lo:at.hi]), key)
}

// A field numbers the members of a packet in the order of their names, which is that of the signed bytes.
type field uint8

const (
	fieldAIProvenance field = iota
	fieldCapabilityToken
	fieldConstraints
	fieldContext
	fieldExpiresAt
	fieldFromAgent
	fieldGoal
	fieldIntent
	fieldIssuedAt
	fieldMemoryRefs
	fieldNonce
	fieldPacketID
	fieldPermissions
	fieldProvenance
	fieldPublicKey
	fieldRiskLevel
	fieldSignature
	fieldSignatureAlgo
	fieldTaskID
	fieldTaskType
	fieldToAgent
	fieldTTLSeconds
	fieldCount
)

var fieldNames = [fieldCount]string{
	"ai_provenance", "capability_token", "constraints", "context", "expires_at", "from_agent", "goal", "intent",
	"issued_at", "memory_refs", "nonce", "packet_id", "permissions", "provenance", "public_key", "risk_level",
	"signature", "signature_algo", "task_id", "task_type", "to_agent", "ttl_seconds",
}

// declared is the order in which TrustHandoff 0.3.3 and older wrote the members.
var declared = []field{
	fieldPacketID, fieldTaskID, fieldFromAgent, fieldToAgent, fieldIssuedAt, fieldExpiresAt, fieldNonce,
	fieldCapabilityToken, fieldIntent, fieldTaskType, fieldGoal, fieldContext, fieldMemoryRefs, fieldPermissions,
	fieldConstraints, fieldProvenance, fieldSignatureAlgo, fieldPublicKey, fieldRiskLevel, fieldTTLSeconds,
	fieldAIProvenance,
}

// fieldOf returns the number of a member, fieldCount where the format has none of that name.
func fieldOf(name string) field {
	switch name {
	case "ai_provenance":
		return fieldAIProvenance
	case "capability_token":
		return fieldCapabilityToken
	case "constraints":
		return fieldConstraints
	case "context":
		return fieldContext
	case "expires_at":
		return fieldExpiresAt
	case "from_agent":
		return fieldFromAgent
	case "goal":
		return fieldGoal
	case "intent":
		return fieldIntent
	case "issued_at":
		return fieldIssuedAt
	case "memory_refs":
		return fieldMemoryRefs
	case "nonce":
		return fieldNonce
	case "packet_id":
		return fieldPacketID
	case "permissions":
		return fieldPermissions
	case "provenance":
		return fieldProvenance
	case "public_key":
		return fieldPublicKey
	case "risk_level":
		return fieldRiskLevel
	case "signature":
		return fieldSignature
	case "signature_algo":
		return fieldSignatureAlgo
	case "task_id":
		return fieldTaskID
	case "task_type":
		return fieldTaskType
	case "to_agent":
		return fieldToAgent
	case "ttl_seconds":
		return fieldTTLSeconds
	}
	return fieldCount
}

// heads holds what stands before each value in the signed bytes.
var heads = func() (h [fieldCount]string) {
	for i, name := range fieldNames {
		sep := ","
		if i == 0 {
			sep = "{"
		}
		h[i] = sep + `"` + name + `":`
	}
	return h
}()

// headSize is the length of the signed bytes without the values.
var headSize = func() (n int) {
	for _, h := range heads {
		n += len(h)
	}
	return n + 1
}()
