package client

import "testing"

// What tests of package client_test take from those of package client.
var (
	Bend       = bend
	RandomJSON = randomJSON
	Corpus     = corpus
)

// ReadPacket and ReadMessage return what the signature covers.
func ReadPacket(text []byte) ([]byte, error) {
	p, err := readPacket(text)
	return p.signed, err
}

func ReadMessage(text []byte) ([]byte, error) {
	m, err := readMessage(text)
	if err != nil {
		return nil, err
	}
	return m.signed, nil
}

// Samples are a packet and a message by one signer, both batched, and its agent id and key.
var Samples = func(tb testing.TB) (packet, message []byte, agent, key string) {
	s := newTestSigner(tb)
	return s.packet(tb, fullDraft, "batched"), s.message(tb, payload, "batched"), s.agent.String(), s.pub.Base64()
}
