package fault

// The codes. Append only: peers of other versions and stored records hold these names.
const (
	// Requests.

	Internal          Code = "internal"
	Malformed         Code = "malformed"
	TooLarge          Code = "too_large"
	NotFound          Code = "not_found"
	AlreadyExists     Code = "already_exists"
	Conflict          Code = "conflict"
	Denied            Code = "denied"
	CallerUnknown     Code = "caller_unknown"
	CallerChanged     Code = "caller_changed"
	ResourceExhausted Code = "resource_exhausted"
	Unavailable       Code = "unavailable"
	DeadlineExceeded  Code = "deadline_exceeded"
	Canceled          Code = "canceled"
	Unsupported       Code = "unsupported"
	Stopping          Code = "stopping"
	Usage             Code = "usage"
	Unreachable       Code = "unreachable"

	// Keys and devices. The ten classes of a backend's errors map to these; see signer.Class.

	DeviceBusy           Code = "device_busy"
	DeviceLost           Code = "device_lost"
	DeviceDead           Code = "device_dead"
	AuthorisationRefused Code = "authorisation_refused"
	KeyGone              Code = "key_gone"
	KeyNotFound          Code = "key_not_found"
	AlgorithmUnsupported Code = "algorithm_unsupported"
	NotExportable        Code = "not_exportable"
	NoPrivateKey         Code = "no_private_key"
	FingerprintMismatch  Code = "fingerprint_mismatch"
	WrongPassphrase      Code = "wrong_passphrase"
	KeyReused            Code = "key_reused"
	InsecureSecret       Code = "insecure_secret"
	KeyOrphaned          Code = "key_orphaned"

	// Records and state.

	NotAuthorised  Code = "not_authorised"
	NotInitialised Code = "not_initialised"
	Corrupt        Code = "corrupt"
	StaleVersion   Code = "stale_version"

	// Refusals by the acceptance gate, in the order in which it checks. Malformed and TooLarge are also refusals.

	WrongAudience        Code = "wrong_audience"
	UnknownAgent         Code = "unknown_agent"
	AlgorithmMismatch    Code = "algorithm_mismatch"
	PublicKeyMismatch    Code = "public_key_mismatch"
	InvalidSignature     Code = "invalid_signature"
	LegacyRefused        Code = "legacy_refused"
	AgentRevoked         Code = "agent_revoked"
	AgentRemoved         Code = "agent_removed"
	AgentExpired         Code = "agent_expired"
	KeyRetired           Code = "key_retired"
	MalformedTimeWindow  Code = "malformed_time_window"
	IssuedInFuture       Code = "issued_in_future"
	UnsupportedRiskLevel Code = "unsupported_risk_level"
	TTLPolicyMismatch    Code = "ttl_policy_mismatch"
	TTLTooLong           Code = "ttl_too_long"
	Expired              Code = "expired"
	InvalidAIProvenance  Code = "invalid_ai_provenance"
	ReplayDetected       Code = "replay_detected"
	ReplayStoreFull      Code = "replay_store_full"
	ReplayStoreFailed    Code = "replay_store_failed"
	BrokenChain          Code = "broken_chain"
	AssuranceTooLow      Code = "assurance_too_low"
)

type family uint8

const (
	request family = iota
	device
	state
	refusal
)

type entry struct {
	family    family
	status    int
	retryable bool
	title     string
	hint      string
}

var table = map[Code]entry{
	Internal:          {request, 500, false, "The daemon failed in a way it did not foresee.", "Look in the daemon's log for the request id."},
	Malformed:         {refusal, 400, false, "The input does not have the form that its specification demands.", "Correct the field that is named."},
	TooLarge:          {refusal, 413, false, "The input is larger than the limit.", "Send less; the limit stands in /v1/capabilities."},
	NotFound:          {request, 404, false, "There is no such thing.", "List what there is: trustd agent list, trustd key list."},
	AlreadyExists:     {request, 409, false, "A thing of that name exists.", "Choose another name; ids and aliases of removed agents stay theirs."},
	Conflict:          {request, 409, false, "The idempotency key was used with another body.", "Use a new idempotency key for a new request."},
	Denied:            {request, 403, false, "This caller may not do this.", "See what the daemon sees of you: trustd whoami --explain."},
	CallerUnknown:     {request, 403, false, "The process at the other end of the socket cannot be identified.", "Call from a live process in the host's user namespace."},
	CallerChanged:     {request, 403, false, "Another process wrote on this connection.", "Open a connection of your own."},
	ResourceExhausted: {request, 429, true, "A limit of this caller or of the daemon is reached.", "Slow down and retry."},
	Unavailable:       {request, 503, true, "The daemon or a part of it cannot serve at the moment.", "Retry; trustd doctor says what is wrong."},
	DeadlineExceeded:  {request, 504, true, "The work was not done in time.", "Retry with a longer deadline."},
	Canceled:          {request, 499, true, "The caller went away.", ""},
	Unsupported:       {request, 501, false, "This daemon does not do that.", "See GET /v1/capabilities."},
	Stopping:          {request, 503, true, "The daemon is stopping.", "Retry once it is back."},
	Usage:             {request, 400, false, "The command line is wrong.", "See --help."},
	Unreachable:       {request, 503, true, "The daemon does not answer on its socket.", "Start it with trustd serve, or name its socket with --socket."},

	DeviceBusy:           {device, 503, true, "The device has no room at the moment.", "Retry."},
	DeviceLost:           {device, 503, true, "The token or TPM has gone.", "Plug it in or restart it; no restart of the daemon is needed."},
	DeviceDead:           {device, 503, true, "The module or its host process died.", "It is restarted by itself; retry."},
	AuthorisationRefused: {device, 503, false, "The device refused the PIN or the authorisation; it is not tried again.", "Correct the PIN source, then run trustd backend unlock NAME."},
	KeyGone:              {device, 503, false, "The device no longer holds this key, or holds another in its place.", "Restore the token; the mapping is kept."},
	KeyNotFound:          {device, 404, false, "No backend holds that key.", "List keys: trustd key list."},
	AlgorithmUnsupported: {device, 422, false, "The backend cannot make or use keys of that algorithm.", "See what it can do: trustd key probe."},
	NotExportable:        {device, 409, false, "The private key cannot leave its device.", "Export the public identity instead."},
	NoPrivateKey:         {device, 409, false, "This host does not hold the private key of that agent.", "Sign on the host that holds it."},
	FingerprintMismatch:  {device, 422, false, "The fingerprint is not that of the public key beside it.", "Do not trust this export."},
	WrongPassphrase:      {device, 422, false, "The passphrase is wrong or the file is damaged.", ""},
	KeyReused:            {device, 409, false, "This public key already has a role.", "Use a key of its own for each role."},
	KeyOrphaned:          {device, 503, false, "The device lost this key; it is not used until an operator has looked.", "Restore the token or TPM, then run trustd key recheck AGENT."},
	InsecureSecret:       {device, 422, false, "The file that holds a secret can be read by others.", "chmod 0600 the file and own it."},

	NotAuthorised:  {state, 403, false, "The record is not signed by those who may make such a change.", "Have an operator sign it."},
	NotInitialised: {state, 409, false, "There is no genesis record yet.", "Run trustd init."},
	Corrupt:        {state, 500, false, "A file of the daemon's state fails its checksum.", "Do not delete it; restore from a backup. trustd doctor names the file."},
	StaleVersion:   {state, 409, false, "The thing has changed since it was read.", "Read it again and repeat."},

	WrongAudience:        {refusal, 403, false, "The packet is not addressed to an agent that this caller may verify for.", "Send it to the agent named in to_agent."},
	UnknownAgent:         {refusal, 403, false, "The registry knows no such agent.", "Register or import the sender's public identity."},
	AlgorithmMismatch:    {refusal, 403, false, "The algorithm named is not that of the registered key.", "The sender must use the key it registered."},
	PublicKeyMismatch:    {refusal, 403, false, "The key in the message is not one that the registry holds for the signer.", "The sender must use the key it registered."},
	InvalidSignature:     {refusal, 403, false, "The signature is not one by the registered key over these bytes.", "The message was altered, or signed by another key."},
	LegacyRefused:        {refusal, 403, false, "The packet has the old TrustHandoff form, which the policy does not admit.", "Upgrade the sender, or set verify.legacy_th033."},
	AgentRevoked:         {refusal, 403, false, "The agent or its key is revoked.", ""},
	AgentRemoved:         {refusal, 403, false, "The agent was removed from the registry.", ""},
	AgentExpired:         {refusal, 403, false, "The agent's registration has expired.", "Register it anew."},
	KeyRetired:           {refusal, 403, false, "The key was no longer the agent's when the packet was issued.", "Sign with the agent's current key."},
	MalformedTimeWindow:  {refusal, 403, false, "The packet expires before it was issued.", ""},
	IssuedInFuture:       {refusal, 403, false, "The packet was issued in the future.", "Check the clocks of both hosts."},
	UnsupportedRiskLevel: {refusal, 403, false, "The risk level is neither write nor read.", "Use write, read, or none."},
	TTLPolicyMismatch:    {refusal, 403, false, "The validity does not agree with the policy for the risk level.", "Leave expires_at and ttl_seconds out, or make them agree."},
	TTLTooLong:           {refusal, 403, false, "The packet is valid for longer than this verifier allows.", "Issue it with a shorter validity."},
	Expired:              {refusal, 403, false, "The packet has expired.", "Sign a new one."},
	InvalidAIProvenance:  {refusal, 403, false, "ai_provenance names no source.", "Name the source."},
	ReplayDetected:       {refusal, 403, false, "This nonce was spent before.", "Sign a new packet."},
	ReplayStoreFull:      {refusal, 503, true, "The store of spent nonces is full.", "Wait for entries to expire, or raise verify.max_nonces."},
	ReplayStoreFailed:    {refusal, 503, true, "The store of spent nonces could not be written.", "Check the disk."},
	AssuranceTooLow:      {refusal, 403, false, "The key or the way it signed does not give the assurance that is asked for.", "The sender must sign with a key of the grade, and in the mode, that this verifier demands."},
	BrokenChain:          {refusal, 403, false, "The messages do not form a chain.", "Send them in order, each naming the one before."},
}

// All returns every code, in no order.
func All() []Code {
	out := make([]Code, 0, len(table))
	for c := range table {
		out = append(out, c)
	}
	return out
}
