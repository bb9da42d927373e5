package api

// The objects in which lists cross the socket: every request and reply is one JSON object.

// SignPacketsRequest is the body of POST /v1/packets/sign-batch.
type SignPacketsRequest struct {
	Requests []SignPacketRequest `json:"requests"` // at most MaxBatch
}

// SignPacketsReply answers it; results stand in the order of the requests.
type SignPacketsReply struct {
	Results []SignPacketResult `json:"results"`
}

// VerifyPacketsRequest is the body of POST /v1/packets/verify-batch.
type VerifyPacketsRequest struct {
	Requests []VerifyPacketRequest `json:"requests"` // at most MaxBatch
}

// VerifyPacketsReply answers it; results stand in the order of the requests.
type VerifyPacketsReply struct {
	Results []VerifyPacketResult `json:"results"`
}

// AgentList answers GET /v1/agents.
type AgentList struct {
	Agents []AgentDetail `json:"agents"`
}

// KeyList answers GET /v1/keys.
type KeyList struct {
	Keys []Key `json:"keys"`
}

// BackendList answers GET /v1/backends.
type BackendList struct {
	Backends []Backend `json:"backends"`
}

// Liveness answers GET /livez: the process serves its socket.
type Liveness struct {
	Alive bool `json:"alive"`
}

// Readiness answers GET /readyz; Checks is there where verbose was asked for.
type Readiness struct {
	Ready  bool          `json:"ready"`
	Checks []HealthCheck `json:"checks,omitempty"`
}
