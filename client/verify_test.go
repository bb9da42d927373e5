package client_test

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/trustd/trustd/client"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/signature"
)

// A vector is a case of signature/testdata/batch-v1.json.
type vector struct {
	Name    string `json:"name"`
	Valid   bool   `json:"valid"`
	Key     string `json:"key"`
	Kind    string `json:"kind"`
	Agent   string `json:"agent"`
	Message string `json:"message_hex"`
	Text    string `json:"text"`
	Mode    string `json:"mode"`
	Index   int    `json:"index"`
	Size    int    `json:"size"`
}

func readJSON(t *testing.T, path string, into any) {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(raw, into)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// batchVectors returns the cases of the frozen batches, and the keys' public_key by their names.
func batchVectors(t *testing.T) (cases []vector, keys map[string]string) {
	t.Helper()
	var file struct {
		Keys []struct {
			Name      string `json:"name"`
			PublicKey string `json:"public_key"`
		}
		Cases []vector
	}
	readJSON(t, "../signature/testdata/batch-v1.json", &file)
	keys = map[string]string{}
	for _, k := range file.Keys {
		keys[k.Name] = k.PublicKey
	}
	return file.Cases, keys
}

func verifierOf(t *testing.T, agent, key string) *client.Verifier {
	t.Helper()
	v, err := client.NewVerifier(agent, key)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestVerifierOnVectors(t *testing.T) {
	cases, keys := batchVectors(t)
	verifiers := map[string]*client.Verifier{}
	for _, c := range cases {
		v := verifiers[c.Agent+c.Key]
		if v == nil {
			v = verifierOf(t, c.Agent, keys[c.Key])
			verifiers[c.Agent+c.Key] = v
		}
		message, err := hex.DecodeString(c.Message)
		if err != nil {
			t.Fatal(err)
		}
		for range 2 { // the second time with its root remembered
			mode, err := v.VerifySignature(signature.Kind(c.Kind), message, c.Text)
			if (err == nil) != c.Valid || string(mode) != c.Mode {
				t.Errorf("%s: %q, %v", c.Name, mode, err)
			}
		}
	}
}

// TestVerifierOnPackets takes the packets that TrustHandoff itself signed.
func TestVerifierOnPackets(t *testing.T) {
	var g struct {
		Identities []struct {
			PEM string `json:"pub_pem"`
		} `json:"identities"`
		Packets []struct {
			Name      string `json:"name"`
			Signed    string `json:"signing_bytes"`
			Signature string `json:"signature"`
		} `json:"packets"`
	}
	readJSON(t, "../packet/testdata/trusthandoff-0.4.0.json", &g)
	v, other := verifierOf(t, "planner", g.Identities[0].PEM), verifierOf(t, "planner", g.Identities[1].PEM)
	_, keys := batchVectors(t)
	for _, p := range g.Packets {
		text := strings.Replace(p.Signed, `,"signature_algo"`, `,"signature":"`+p.Signature+`","signature_algo"`, 1)
		if mode, err := v.VerifyPacket([]byte(text)); err != nil || mode != signature.Direct {
			t.Errorf("%s: %q, %v", p.Name, mode, err)
		}
		for want, bad := range map[fault.Code]string{
			fault.InvalidSignature:  strings.Replace(text, `"packet_id":"pk-`, `"packet_id":"pq-`, 1),
			fault.Malformed:         strings.Replace(text, `"signature":"`, `"signature":" `, 1),
			fault.AlgorithmMismatch: strings.Replace(text, `"signature_algo":"Ed25519"`, `"signature_algo":"ES256"`, 1),
			fault.TooLarge:          text + strings.Repeat(" ", 256<<10),
		} {
			if mode, err := v.VerifyPacket([]byte(bad)); fault.CodeOf(err) != want || mode != "" {
				t.Errorf("%s: %q, %v, want %s", p.Name, mode, err, want)
			}
		}
		if _, err := other.VerifyPacket([]byte(text)); fault.CodeOf(err) != fault.PublicKeyMismatch {
			t.Errorf("%s: with another key %v", p.Name, err)
		}
		_, err := verifierOf(t, "planner", keys["ecdsa-p256"]).VerifyPacket([]byte(text))
		if fault.CodeOf(err) != fault.AlgorithmMismatch {
			t.Errorf("%s: with a key of another algorithm %v", p.Name, err)
		}
	}
}

func TestVerifierOnMessage(t *testing.T) {
	var g struct {
		Message json.RawMessage `json:"message"`
	}
	readJSON(t, "../packet/testdata/signed-message-v1.json", &g)
	var m struct {
		PublicKey string `json:"public_key"`
	}
	if err := json.Unmarshal(g.Message, &m); err != nil {
		t.Fatal(err)
	}
	v := verifierOf(t, "research-agent", m.PublicKey)
	if mode, err := v.VerifyMessage(g.Message); err != nil || mode != signature.Direct {
		t.Fatalf("%q, %v", mode, err)
	}
	_, keys := batchVectors(t)
	for _, c := range []struct {
		agent, key string
		want       fault.Code
	}{
		{"planner", m.PublicKey, fault.UnknownAgent},
		{"research-agent", keys["ed25519"], fault.PublicKeyMismatch},
		{"research-agent", keys["rsa-2048"], fault.AlgorithmMismatch},
	} {
		if _, err := verifierOf(t, c.agent, c.key).VerifyMessage(g.Message); fault.CodeOf(err) != c.want {
			t.Errorf("%v, want %s", err, c.want)
		}
	}
	for name, c := range map[string]struct {
		old, new string
		want     fault.Code
	}{
		"payload":     {`"amount":150`, `"amount":151`, fault.InvalidSignature},
		"seq":         {`"seq":7`, `"seq":8`, fault.InvalidSignature},
		"grade":       {`"grade":"software"`, `"grade":"hardware-attested"`, fault.InvalidSignature},
		"fingerprint": {`"sha256:06`, `"sha256:16`, fault.PublicKeyMismatch},
		"version":     {`"v":1`, `"v":2`, fault.Malformed},
		"unknown":     {`"v":1`, `"v":1,"x":1`, fault.Malformed},
		"twice":       {`"v":1`, `"v":1,"v":1`, fault.Malformed},
	} {
		bent := bytes.Replace(g.Message, []byte(c.old), []byte(c.new), 1)
		if mode, err := v.VerifyMessage(bent); fault.CodeOf(err) != c.want || mode != "" {
			t.Errorf("%s: %q, %v, want %s", name, mode, err, c.want)
		}
	}
}

func TestNewVerifierRefuses(t *testing.T) {
	_, keys := batchVectors(t)
	good := keys["ed25519"]
	for name, c := range map[string][2]string{
		"no agent":      {"", good},
		"an alias":      {"agent:planner", good},
		"no key":        {"planner", ""},
		"a key cut off": {"planner", good[:len(good)-4]},
		"a line end":    {"planner", good + "\n"},
		"loose PEM":     {"planner", "-----BEGIN PUBLIC KEY-----\n" + good + "\n-----END PUBLIC KEY-----"},
	} {
		if v, err := client.NewVerifier(c[0], c[1]); err == nil || v != nil {
			t.Errorf("%s passes", name)
		}
	}
}

// TestVerifierAtOnce uses one verifier from several goroutines.
func TestVerifierAtOnce(t *testing.T) {
	cases, keys := batchVectors(t)
	v := verifierOf(t, "planner-1", keys["ecdsa-p256"])
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for _, c := range cases {
				if c.Key != "ecdsa-p256" || c.Agent != "planner-1" {
					continue
				}
				message, _ := hex.DecodeString(c.Message)
				if _, err := v.VerifySignature(signature.Kind(c.Kind), message, c.Text); (err == nil) != c.Valid {
					t.Errorf("%s: %v", c.Name, err)
				}
			}
		})
	}
	all.Wait()
}

// pythonOf returns the interpreter of the virtual environment that TRUSTD_PEER_VENV names. Without one the test is
// skipped, but never in continuous integration.
func pythonOf(t *testing.T) string {
	t.Helper()
	venv := os.Getenv("TRUSTD_PEER_VENV")
	python := filepath.Join(venv, "bin", "python")
	if _, err := os.Stat(python); venv == "" || err != nil {
		if os.Getenv("CI") != "" || os.Getenv("TRUSTD_REQUIRE_HSM") != "" {
			t.Fatalf("no Python peer at TRUSTD_PEER_VENV=%q: run make setup-peer", venv)
		}
		t.Skip("no Python peer: run make setup-peer and set TRUSTD_PEER_VENV")
	}
	return python
}

// A Python is clients/python/trustd_verify.py at the end of a pipe.
type Python struct {
	t   testing.TB
	in  io.Writer
	out *bufio.Reader
}

// PythonAnswer is what testdata/verify_peer.py answers.
type PythonAnswer struct {
	Mode   string `json:"mode"`
	Index  int    `json:"index"`
	Size   int    `json:"size"`
	Signed []byte `json:"signed"`
	Code   string `json:"code"`
	Error  string `json:"error"`
}

func startPython(t *testing.T) *Python {
	t.Helper()
	cmd := exec.Command(pythonOf(t), "-B", "testdata/verify_peer.py", "../clients/python")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close() // ends its loop
		if err := cmd.Wait(); err != nil {
			t.Errorf("Python ended with %v: %s", err, stderr.String())
		}
	})
	return &Python{t, in, bufio.NewReader(out)}
}

// Ask sends one question. An exception other than a refusal is a failure.
func (p *Python) Ask(question map[string]any) (a PythonAnswer) {
	p.t.Helper()
	line, err := json.Marshal(question)
	if err != nil {
		p.t.Fatal(err)
	}
	if _, err := p.in.Write(append(line, '\n')); err != nil {
		p.t.Fatal(err)
	}
	reply, err := p.out.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(reply, &a)
	}
	if err != nil {
		p.t.Fatal(err)
	}
	if a.Error != "" {
		p.t.Errorf("Python on %.2000v: %s", question, a.Error)
	}
	return a
}

func TestPythonOnVectors(t *testing.T) {
	p := startPython(t)
	cases, keys := batchVectors(t)
	for _, c := range cases {
		message, err := hex.DecodeString(c.Message)
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			a := p.Ask(map[string]any{
				"op": "signature", "key": keys[c.Key], "agent": c.Agent, "kind": c.Kind, "message": message, "text": c.Text,
			})
			if (a.Code == "") != c.Valid || a.Mode != c.Mode || a.Index != c.Index || a.Size != c.Size {
				t.Errorf("%s: %+v", c.Name, a)
			}
		}
	}
}

// TestPythonCommand runs trustd_verify.py from the command line.
func TestPythonCommand(t *testing.T) {
	python := pythonOf(t)
	var g struct {
		Message json.RawMessage `json:"message"`
	}
	readJSON(t, "../packet/testdata/signed-message-v1.json", &g)
	var m struct {
		PublicKey string `json:"public_key"`
	}
	if err := json.Unmarshal(g.Message, &m); err != nil {
		t.Fatal(err)
	}
	cases, keys := batchVectors(t)
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	pem := "-----BEGIN PUBLIC KEY-----\n" + m.PublicKey + "\n-----END PUBLIC KEY-----\n" // an Ed25519 key has one line
	key, other, batched := file("key.pem", pem), file("other.b64", keys["ed25519"]+"\n"), vector{}
	for _, c := range cases {
		if c.Valid && c.Key == "ed25519" && c.Mode == "batched" {
			batched = c
		}
	}
	signed, err := hex.DecodeString(batched.Message)
	if err != nil {
		t.Fatal(err)
	}
	as := func(what, key, agent string, more ...string) []string {
		return append([]string{what, "--key", key, "--agent", agent}, more...)
	}
	bent := bytes.Replace(g.Message, []byte("150"), []byte("151"), 1)
	for name, c := range map[string]struct {
		input     []byte
		arguments []string
		code      int
		says      string
	}{
		"valid":           {g.Message, as("message", key, "research-agent"), 0, `"mode": "direct"`},
		"altered":         {bent, as("message", key, "research-agent"), 1, `"code": "invalid_signature"`},
		"another agent":   {g.Message, as("message", key, "planner"), 1, `"code": "unknown_agent"`},
		"another key":     {g.Message, as("message", other, "research-agent"), 1, `"code": "public_key_mismatch"`},
		"no packet":       {g.Message, as("packet", key, "research-agent"), 1, `"code": "malformed"`},
		"nothing":         {nil, as("packet", key, "research-agent"), 1, `"valid": false`},
		"no such key":     {g.Message, as("message", key+"x", "a"), 2, ""},
		"no agent id":     {g.Message, as("message", key, "agent:a"), 2, ""},
		"kind missing":    {signed, as("signature", other, batched.Agent, "--text", batched.Text), 2, ""},
		"kind not wanted": {g.Message, as("message", key, "research-agent", "--kind", "message"), 2, ""},
		"batched": {
			signed, as("signature", other, batched.Agent, "--kind", batched.Kind, "--text", batched.Text), 0, `"mode": "batched"`,
		},
	} {
		cmd := exec.Command(python, append([]string{"-B", "../clients/python/trustd_verify.py"}, c.arguments...)...)
		cmd.Stdin = bytes.NewReader(c.input)
		out, err := cmd.Output()
		if code := cmd.ProcessState.ExitCode(); code != c.code || !strings.Contains(string(out), c.says) {
			t.Errorf("%s: exit code %d, %s %v", name, code, out, err)
		}
	}
}
