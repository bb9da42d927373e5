package client_test

import (
	"bytes"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/trustd/trustd/client"
	"github.com/trustd/trustd/fault"
)

// TestPythonReadsAsGo holds trustd_verify.py against the Verifier: the same bytes under the same texts, the same verdict,
// the same code of a refusal that is not about the form.
func TestPythonReadsAsGo(t *testing.T) {
	p := startPython(t)
	same := func(op string, text []byte) {
		t.Helper()
		read := map[string]func([]byte) ([]byte, error){"packet bytes": client.ReadPacket, "message bytes": client.ReadMessage}[op]
		want, err := read(text)
		a := p.Ask(map[string]any{"op": op, "data": text})
		if string(fault.CodeOf(err)) != a.Code || !bytes.Equal(a.Signed, want) {
			t.Errorf("%s: here %v %s\nPython %s %s\n%.1000s", op, err, want, a.Code, a.Signed, text)
		}
	}
	for _, text := range client.Corpus(t, "FuzzParse") {
		same("packet bytes", text)
	}
	for _, text := range client.Corpus(t, "FuzzParseMessage") {
		same("message bytes", text)
	}
	packet, message, agent, key := client.Samples(t)
	v := verifierOf(t, agent, key)
	verdict := func(op string, text []byte) (valid bool) {
		t.Helper()
		verify := v.VerifyPacket
		if op == "message" {
			verify = v.VerifyMessage
		}
		mode, err := verify(text)
		a := p.Ask(map[string]any{"op": op, "key": key, "agent": agent, "data": text})
		if string(mode) != a.Mode || string(fault.CodeOf(err)) != a.Code {
			t.Errorf("%s: here %s %v, Python %+v\n%.1000s", op, mode, err, a, text)
		}
		return err == nil
	}
	if !verdict("packet", packet) || !verdict("message", message) {
		t.Fatal("the samples are not valid")
	}
	r := rand.New(rand.NewPCG(5, 5))
	valid := map[string]int{}
	const rounds = 600
	for range rounds {
		for op, text := range map[string][]byte{"packet": packet, "message": message} {
			bent := []byte(client.Bend(r, string(text)))
			same(op+" bytes", bent)
			if verdict(op, bent) {
				valid[op]++
			}
		}
	}
	for op, n := range valid { // white space, and what does not change the meaning
		if n == 0 || n > rounds/2 {
			t.Errorf("%d of %d bent texts of a %s are valid", n, rounds, op)
		}
	}
	for range 100 {
		value := client.RandomJSON(r, 5)
		same("packet bytes", []byte(strings.Replace(string(packet), `"context":{`, `"context":{"value":`+value+`,`, 1)))
		same("message bytes", []byte(strings.Replace(string(message), `"payload":{`, `"payload":{"value":`+value+`,`, 1)))
	}
	for _, depth := range []int{60, 61, 62, 63, 97, 98, 99, 100, 20000} {
		nested := strings.Repeat("[", depth) + strings.Repeat("]", depth)
		same("packet bytes", []byte(strings.Replace(string(packet), `"context":{`, `"context":{"deep":`+nested+`,`, 1)))
		same("message bytes", []byte(strings.Replace(string(message), `"payload":{`, `"payload":{"deep":`+nested+`,`, 1)))
	}
	for _, hostile := range []string{ // that a reader must not spend much time on
		strings.Repeat(`\"`, 1<<17), `"` + strings.Repeat(`\"`, 1<<17-1), strings.Repeat(`"`, 1<<18),
		strings.Repeat(`{"a":`, 1<<15), strings.Repeat("[", 1<<18), strings.Repeat("9", 1<<18),
		`{"a":` + strings.Repeat("9", 1<<17) + "}", `{"a":1e` + strings.Repeat("9", 1<<17) + "}",
		`{"a":` + strings.Repeat("9", 1<<17) + ".5}",
	} {
		for _, op := range []string{"packet bytes", "message bytes"} {
			same(op, []byte(hostile))
		}
	}
}
