package e2e

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/client"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/softhsm-test/lab"
)

// tool finds a program that the test cannot do without.
func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if required() {
			t.Fatalf("%s is missing", name)
		}
		t.Skipf("%s is missing", name)
	}
	return path
}

// A token is the lab's token as others see it: by OpenSC, through the same module, without trustd.
type token struct {
	*lab.Lab
	opensc string
}

func (k token) run(t *testing.T, args ...string) string {
	t.Helper()
	pin, err := os.ReadFile(filepath.Join(k.Dir, "pin"))
	if err != nil {
		t.Fatal(err)
	}
	args = append([]string{"--module", k.Module, "--token-label", "lab", "--login", "--pin", "env:LAB_PIN"}, args...)
	cmd := exec.CommandContext(t.Context(), k.opensc, args...)
	conf := filepath.Join(k.Dir, "softhsm2.conf")
	cmd.Env = append(os.Environ(), "SOFTHSM2_CONF="+conf, "LAB_PIN="+strings.TrimSpace(string(pin)))
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("pkcs11-tool %v: %v: %s", args, err, out)
	}
	return string(out)
}

// holds reports whether the token holds a private key of that id.
func (k token) holds(t *testing.T, id signer.ID) bool {
	t.Helper()
	for object := range strings.SplitSeq(k.run(t, "--list-objects", "--type", "privkey"), "Private Key Object") {
		for line := range strings.Lines(object) {
			name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
			if name == "ID" && strings.EqualFold(strings.TrimSpace(value), id.String()) {
				return true
			}
		}
	}
	return false
}

// sign has the token sign what is given, and returns the signature.
func (k token) sign(t *testing.T, id signer.ID, mechanism string, data []byte) []byte {
	t.Helper()
	in, out := filepath.Join(t.TempDir(), "in"), filepath.Join(t.TempDir(), "out")
	if err := os.WriteFile(in, data, 0o600); err != nil {
		t.Fatal(err)
	}
	k.run(t, "--sign", "--id", id.String(), "--mechanism", mechanism, "--input-file", in, "--output-file", out)
	sig, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return sig
}

func keyID(t *testing.T, uri string) signer.ID {
	t.Helper()
	u, err := signer.ParseURI(uri)
	if err != nil {
		t.Fatalf("%s: %v", uri, err)
	}
	return u.ID
}

// rawVerify checks a signature with the standard library alone: EdDSA over data, or r || s over its SHA-256.
func rawVerify(t *testing.T, text string, data, sig []byte) bool {
	t.Helper()
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		t.Fatalf("not PEM: %s", text)
	}
	pub, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	switch pub := pub.(type) {
	case ed25519.PublicKey:
		return ed25519.Verify(pub, data, sig)
	case *ecdsa.PublicKey:
		sum := sha256.Sum256(data)
		half := len(sig) / 2
		return ecdsa.Verify(pub, sum[:], new(big.Int).SetBytes(sig[:half]), new(big.Int).SetBytes(sig[half:]))
	}
	t.Fatalf("a key of type %T", pub)
	return false
}

// listKeys returns what `trustd key list` shows.
func listKeys(t *testing.T, l *lab.Lab) []api.Key {
	t.Helper()
	r := l.Root(t.Context(), nil, "key", "list", "-o", "json")
	var keys []api.Key
	if err := json.Unmarshal([]byte(r.Stdout), &keys); r.Code != 0 || err != nil {
		t.Fatalf("key list: exit %d, %v: %s", r.Code, err, r.Stderr)
	}
	return keys
}

// keyOf returns the one key for which pick holds.
func keyOf(t *testing.T, l *lab.Lab, what string, pick func(api.Key) bool) api.Key {
	t.Helper()
	var found []api.Key
	for _, k := range listKeys(t, l) {
		if pick(k) {
			found = append(found, k)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%s: %d keys of %+v", what, len(found), listKeys(t, l))
	}
	return found[0]
}

func show(t *testing.T, l *lab.Lab, name string) api.AgentDetail {
	t.Helper()
	r := l.Root(t.Context(), nil, "agent", "show", name, "-o", "json")
	var d api.AgentDetail
	if err := json.Unmarshal([]byte(r.Stdout), &d); r.Code != 0 || err != nil {
		t.Fatalf("agent show %s: exit %d, %v: %s", name, r.Code, err, r.Stderr)
	}
	return d
}

// signs demands that the agent signs a packet to the given audience, which the verifier's daemon accepts.
func signs(t *testing.T, l *lab.Lab, agent, to string, verifier *lab.Lab) {
	t.Helper()
	r := l.Root(t.Context(), task(to), "sign", "--agent", agent)
	if r.Code != 0 {
		t.Fatalf("sign as %s: exit %d: %s", agent, r.Code, r.Stderr)
	}
	if v := verifier.Root(t.Context(), []byte(r.Stdout), "verify"); v.Code != 0 {
		t.Errorf("what %s signed: exit %d: %s%s", agent, v.Code, v.Stdout, v.Stderr)
	}
	forged := strings.Replace(r.Stdout, `"intent":"read"`, `"intent":"reed"`, 1)
	if v := verifier.Root(t.Context(), []byte(forged), "verify"); v.Code != 3 {
		t.Errorf("what %s did not sign: exit %d: %s%s", agent, v.Code, v.Stdout, v.Stderr)
	}
}

func codeOf(r lab.Result) fault.Code {
	var e struct{ Error struct{ Code fault.Code } }
	if json.Unmarshal([]byte(r.Stderr), &e) != nil {
		return fault.Code("not a JSON error: " + r.Stderr)
	}
	return e.Error.Code
}

// TestOwnKeysOnToken: the keys that trustd makes are ordinary keys of the token, which others list and use (T-KEY-1:
// and cannot read), and which are gone when their agent is.
func TestOwnKeysOnToken(t *testing.T) {
	opensc := tool(t, "pkcs11-tool")
	l := start(t, lab.Options{NoTPM: true})
	k := token{l, opensc}
	for _, c := range []struct{ id, alg, mechanism string }{
		{"edward", "ed25519", "EDDSA"}, {"curve", "ecdsa-p256", "ECDSA"},
	} {
		d := add(t, l, c.id, "--algorithm", c.alg, "--uid", "0")
		id := keyID(t, d.KeyURI)
		if !k.holds(t, id) {
			t.Fatalf("%s: the token does not list %s", c.alg, d.KeyURI)
		}
		var access string
		for object := range strings.SplitSeq(k.run(t, "--list-objects", "--type", "privkey"), "Private Key Object") {
			if strings.Contains(strings.ToLower(object), id.String()) {
				access = object
			}
		}
		for _, want := range []string{"sensitive", "always sensitive", "never extractable", "local"} {
			if !strings.Contains(access, want) {
				t.Errorf("%s: others do not see it as %s:%s", c.alg, want, access)
			}
		}
		text, data := []byte("a text of others"), []byte("a text of others")
		if c.mechanism == "ECDSA" { // which takes a digest
			sum := sha256.Sum256(text)
			data = sum[:]
		}
		if !rawVerify(t, d.PEM, text, k.sign(t, id, c.mechanism, data)) {
			t.Errorf("%s: the signature of others does not verify under the agent's key", c.alg)
		}
		signs(t, l, c.id, d.Aliases[0], l)
		if r := l.Root(t.Context(), nil, "agent", "remove", c.id); r.Code != 0 {
			t.Fatalf("agent remove: exit %d: %s", r.Code, r.Stderr)
		}
		if k.holds(t, id) {
			t.Errorf("%s: the key of a removed agent is still on the token", c.alg)
		}
	}
	kept := add(t, l, "kept", "--uid", "0")
	if r := l.Root(t.Context(), nil, "agent", "remove", "kept", "--keep-key"); r.Code != 0 {
		t.Fatalf("agent remove --keep-key: exit %d: %s", r.Code, r.Stderr)
	}
	if !k.holds(t, keyID(t, kept.KeyURI)) {
		t.Error("--keep-key destroyed the key")
	}
}

// TestAdoptKeys: a key that others made is adopted, signs, and outlives its agent.
func TestAdoptKeys(t *testing.T) {
	opensc := tool(t, "pkcs11-tool")
	l := start(t, lab.Options{NoTPM: true})
	k := token{l, opensc}
	audience := add(t, l, "audience", "--uid", "0").Aliases[0]
	for _, c := range []struct{ kind, id, alg string }{
		{"EC:edwards25519", "e1d2", "ed25519"}, {"EC:prime256v1", "e2c2", "ecdsa-p256"},
	} {
		k.run(t, "--keypairgen", "--key-type", c.kind, "--id", c.id, "--label", "others-"+c.id, "--usage-sign")
		key := keyOf(t, l, c.kind, func(k api.Key) bool { return k.Label == "others-"+c.id })
		if key.Algorithm != c.alg || key.UsedBy != "" || key.State != "unused" {
			t.Fatalf("%s is listed as %+v", c.kind, key)
		}
		d := add(t, l, "adopts-"+c.id, "--key", key.URI, "--uid", "0")
		if d.Fingerprint != key.Fingerprint || d.Algorithm != c.alg || !d.Possession {
			t.Fatalf("%s is adopted as %+v", c.kind, d)
		}
		now := keyOf(t, l, c.kind, func(k api.Key) bool { return k.URI == key.URI })
		if now.UsedBy != d.AgentID || now.State != "ready" {
			t.Errorf("%s in use is listed as %+v", c.kind, now)
		}
		signs(t, l, d.AgentID, audience, l)
		r := l.Root(t.Context(), nil, "agent", "add", "second-"+c.id, "--key", key.URI, "-o", "json")
		if codeOf(r) != fault.KeyReused {
			t.Errorf("%s is adopted twice: exit %d: %s", c.kind, r.Code, r.Stderr)
		}
		if r := l.Root(t.Context(), nil, "agent", "remove", d.AgentID); r.Code != 0 {
			t.Fatalf("agent remove: exit %d: %s", r.Code, r.Stderr)
		}
		if !k.holds(t, keyID(t, key.URI)) {
			t.Errorf("%s: an adopted key was destroyed with its agent", c.kind)
		}
	}
	r := l.Root(t.Context(), nil, "agent", "add", "ghost", "--key", "pkcs11:token=lab;id=%00%01%02", "-o", "json")
	if codeOf(r) != fault.KeyNotFound {
		t.Errorf("a key that is not there is adopted: exit %d: %s", r.Code, r.Stderr)
	}
}

// softBackend adds software keys to a lab.
const softBackend = "\n[[backend]]\nname = \"laptop\"\nkind = \"soft\"\n"

// TestMovePrivateKeys takes software keys out of one host under a passphrase and into the token of another.
func TestMovePrivateKeys(t *testing.T) {
	from := start(t, lab.Options{NoTPM: true, Extra: softBackend})
	to := start(t, lab.Options{NoTPM: true})
	audience := add(t, to, "audience", "--uid", "0").Aliases[0]
	pass := filepath.Join(t.TempDir(), "passphrase")
	wrong := filepath.Join(t.TempDir(), "wrong")
	for path, text := range map[string]string{pass: "correct horse battery\n", wrong: "incorrect horse battery\n"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct{ format, alg string }{{"pem", "ed25519"}, {"jwk", "ecdsa-p256"}, {"raw", "rsa-2048"}} {
		t.Run(c.format, func(t *testing.T) {
			id := "moves-" + c.format
			d := add(t, from, id, "--backend", "laptop", "--algorithm", c.alg, "--uid", "0")
			file := filepath.Join(t.TempDir(), "key")
			export := []string{"agent", "export", id, "--private", "--format", c.format, "--out", file,
				"--passphrase-file", pass}
			if r := from.Root(t.Context(), nil, export...); r.Code != 0 || r.Stdout != "" {
				t.Fatalf("export: exit %d: %s%s", r.Code, r.Stdout, r.Stderr)
			}
			checkPrivateFile(t, from, file, export)
			if c.format == "pem" {
				checkOpenSSL(t, file, pass, d.PEM)
			}
			take := []string{"agent", "import", file, "--private", "--format", c.format, "--backend", "hsm", "--id", id,
				"--uid", "0", "-o", "json"}
			r := to.Root(t.Context(), nil, append(take, "--passphrase-file", wrong)...)
			if codeOf(r) != fault.WrongPassphrase {
				t.Errorf("with the wrong passphrase: exit %d: %s", r.Code, r.Stderr)
			}
			r = to.Root(t.Context(), nil, append(take, "--passphrase-file", pass)...)
			var moved api.AgentDetail
			if err := json.Unmarshal([]byte(r.Stdout), &moved); r.Code != 0 || err != nil {
				t.Fatalf("import: exit %d, %v: %s", r.Code, err, r.Stderr)
			}
			if moved.Fingerprint != d.Fingerprint || !moved.Local || moved.Backend != "hsm" || moved.Origin != "imported" {
				t.Errorf("imported as %+v", moved)
			}
			key := keyOf(t, to, c.format, func(k api.Key) bool { return k.Fingerprint == d.Fingerprint })
			if key.Origin != "imported" || key.NeverLeft || key.UsedBy != id || key.Extractable {
				t.Errorf("the token's key is listed as %+v", key)
			}
			signs(t, to, id, audience, to)
		})
	}
}

// checkPrivateFile demands that nobody else reads an exported key, and that nothing is written over it.
func checkPrivateFile(t *testing.T, l *lab.Lab, file string, export []string) {
	t.Helper()
	fi, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	if fi.Mode() != 0o600 {
		t.Errorf("the file of a private key has mode %v", fi.Mode())
	}
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	link := file + "-link"
	if err := os.Symlink(file+"-target", link); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, link} {
		args := append([]string{}, export...)
		for i, a := range args {
			if a == file {
				args[i] = path
			}
		}
		if r := l.Root(t.Context(), nil, args...); r.Code != 1 {
			t.Errorf("export over %s: exit %d: %s", filepath.Base(path), r.Code, r.Stderr)
		}
	}
	after, err := os.ReadFile(file)
	if err != nil || !bytes.Equal(before, after) {
		t.Errorf("a second export wrote over the first: %v", err)
	}
	if _, err := os.Lstat(file + "-target"); err == nil {
		t.Error("the export followed a link")
	}
	left, err := filepath.Glob(filepath.Join(filepath.Dir(file), "*"))
	if err != nil || len(left) != 2 { // the key and the link
		t.Errorf("left beside the key: %v %v", left, err)
	}
}

// checkOpenSSL demands that OpenSSL reads an exported PEM with the passphrase, and not without.
func checkOpenSSL(t *testing.T, file, pass, public string) {
	t.Helper()
	openssl := tool(t, "openssl")
	out, err := exec.CommandContext(t.Context(), openssl, "pkey", "-in", file, "-passin", "file:"+pass, "-pubout").Output()
	if err != nil || string(out) != public {
		t.Errorf("OpenSSL reads %s, %v; want %s", out, err, public)
	}
	if exec.CommandContext(t.Context(), openssl, "pkey", "-in", file, "-passin", "pass:", "-noout").Run() == nil {
		t.Error("OpenSSL reads the key without its passphrase")
	}
}

// TestMovePublicIdentities: an identity that one host prints in any format is known on another, which then accepts
// what its agent signs.
func TestMovePublicIdentities(t *testing.T) {
	from, to := start(t, lab.Options{}), start(t, lab.Options{NoTPM: true})
	audience := add(t, to, "audience", "--uid", "0").Aliases[0]
	for _, c := range []struct{ format, alg, backend string }{
		{"json", "ed25519", "hsm"}, {"pem", "ecdsa-p256", "tpm"}, {"jwk", "ecdsa-p384", "hsm"}, {"json", "rsa-2048", "hsm"},
	} {
		id := "seen-" + c.format + "-" + c.alg
		d := add(t, from, id, "--backend", c.backend, "--algorithm", c.alg, "--uid", "0")
		file := filepath.Join(t.TempDir(), "identity")
		export := []string{"agent", "export", id, "--format", c.format, "--out", file}
		if r := from.Root(t.Context(), nil, export...); r.Code != 0 {
			t.Fatalf("%s: export: exit %d: %s", id, r.Code, r.Stderr)
		}
		printed := from.Root(t.Context(), nil, "agent", "export", id, "--format", c.format).Stdout
		if text, err := os.ReadFile(file); err != nil || string(text) != printed || strings.Contains(printed, "PRIVATE") {
			t.Errorf("%s: in the file %s, %v; printed %s", id, text, err, printed)
		}
		if r := from.Root(t.Context(), nil, export...); r.Code != 1 {
			t.Errorf("%s: a second export: exit %d: %s", id, r.Code, r.Stderr)
		}
		take := []string{"agent", "import", file, "-o", "json"}
		if c.format != "json" { // which names its agent
			take = append(take, "--id", id)
		}
		r := to.Root(t.Context(), nil, take...)
		var known api.AgentDetail
		if err := json.Unmarshal([]byte(r.Stdout), &known); r.Code != 0 || err != nil {
			t.Fatalf("%s: import: exit %d, %v: %s", id, r.Code, err, r.Stderr)
		}
		if known.AgentID != id || known.Fingerprint != d.Fingerprint || known.PublicKey != d.PublicKey || known.Local ||
			known.KeyURI != "" {
			t.Errorf("%s is known as %+v", id, known)
		}
		signs(t, from, id, audience, to)
		if r := to.Root(t.Context(), task(audience), "sign", "--agent", id); r.Code == 0 {
			t.Errorf("%s: a host signs with a key that it does not have", id)
		}
	}
}

// TestSwappedIdentity is T-KEY-2: an export whose key and fingerprint differ is refused.
func TestSwappedIdentity(t *testing.T) {
	from, to := start(t, lab.Options{NoTPM: true}), start(t, lab.Options{NoTPM: true})
	add(t, from, "honest", "--uid", "0")
	other := add(t, from, "other", "--uid", "0")
	text := from.Root(t.Context(), nil, "agent", "export", "honest").Stdout
	var export map[string]any
	if err := json.Unmarshal([]byte(text), &export); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]map[string]any{
		"fingerprint": {"fingerprint": other.Fingerprint},
		"public_key":  {"public_key": other.PublicKey},
		"pem":         {"pem": other.PEM},
		"algorithm":   {"algorithm": "ecdsa-p256"},
		"nothing":     {"public_key": base64.StdEncoding.EncodeToString([]byte("not a key"))},
	} {
		forged := map[string]any{}
		for _, m := range []map[string]any{export, change} {
			for k, v := range m {
				forged[k] = v
			}
		}
		b, err := json.Marshal(forged)
		if err != nil {
			t.Fatal(err)
		}
		r := to.Root(t.Context(), b, "agent", "import", "-", "-o", "json")
		if c := codeOf(r); r.Code != 1 || c != fault.FingerprintMismatch && (name != "nothing" || c != fault.Malformed) {
			t.Errorf("another %s: exit %d: %s", name, r.Code, r.Stderr)
		}
	}
	if r := to.Root(t.Context(), nil, "agent", "show", "honest"); r.Code != 7 {
		t.Errorf("a refused import left an agent: exit %d: %s", r.Code, r.Stdout)
	}
}

// TestHardwareKeysStay is T-KEY-1: no key leaves an HSM or a TPM by any of the formats.
func TestHardwareKeysStay(t *testing.T) {
	l := start(t, lab.Options{})
	pass := filepath.Join(t.TempDir(), "passphrase")
	if err := os.WriteFile(pass, []byte("correct horse battery"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, backend := range []string{"hsm", "tpm"} {
		add(t, l, "on-"+backend, "--backend", backend, "--algorithm", "ecdsa-p256", "--uid", "0")
		for _, format := range []string{"pem", "jwk", "raw"} {
			file := filepath.Join(t.TempDir(), "key")
			r := l.Root(t.Context(), nil, "agent", "export", "on-"+backend, "--private", "--format", format, "--out", file,
				"--passphrase-file", pass, "-o", "json")
			if codeOf(r) != fault.NotExportable || r.Code != 1 {
				t.Errorf("%s as %s: exit %d: %s", backend, format, r.Code, r.Stderr)
			}
			if _, err := os.Lstat(file); err == nil {
				t.Errorf("%s as %s: a file was made", backend, format)
			}
		}
	}
}

// healthy returns what doctor finds to be wrong. That a lab has one operator is as it should be.
func healthy(t *testing.T, l *lab.Lab) error {
	t.Helper()
	r := l.Root(t.Context(), nil, "doctor", "-o", "json")
	var report struct{ Checks []api.HealthCheck }
	if err := json.Unmarshal([]byte(r.Stdout), &report); err != nil {
		return fmt.Errorf("doctor: exit %d, %w: %s", r.Code, err, r.Stderr)
	}
	var errs []error
	for _, c := range report.Checks {
		if c.Status != "ok" && c.Name != "operators" {
			errs = append(errs, fmt.Errorf("doctor: %+v", c))
		}
	}
	if len(report.Checks) < 4 {
		errs = append(errs, fmt.Errorf("doctor checks only %+v", report.Checks))
	}
	return errors.Join(errs...)
}

// TestTokenLost: a token that is pulled out is reported, its agents keep their keys' names, and it serves again once it
// is back, without a restart of the daemon.
func TestTokenLost(t *testing.T) {
	l := start(t, lab.Options{})
	d := add(t, l, "planner", "--uid", "0")
	chip := add(t, l, "chip", "--backend", "tpm", "--uid", "0")
	daemon := l.Daemon().Pid()
	c := client.New(l.AgentSocket)
	defer c.Close()
	sign := func(agent string) error {
		_, err := c.SignPacket(t.Context(), api.SignPacketRequest{Agent: agent, Packet: task(d.Aliases[0])})
		return err
	}
	tokens, away := filepath.Join(l.Dir, "tokens"), filepath.Join(l.Dir, "tokens-away")
	for round := range 2 {
		if err := sign("planner"); err != nil {
			t.Fatalf("round %d: before the loss: %v", round, err)
		}
		if err := os.Rename(tokens, away); err != nil {
			t.Fatal(err)
		}
		eventually(t, "waiting for the loss to be seen", func() error {
			err := sign("planner")
			if err == nil {
				return errors.New("it still signs")
			}
			if code := fault.CodeOf(err); !code.Retryable() && code != fault.DeviceLost {
				t.Fatalf("round %d: without its token: %v", round, err)
			}
			return nil
		})
		eventually(t, "waiting for agent list to say so", func() error {
			if now := show(t, l, "planner"); now.KeyState == "ready" || now.KeyURI != d.KeyURI || now.Status != "active" {
				return fmt.Errorf("it says %+v", now)
			}
			return nil
		})
		checkDoctor(t, l, 1, "hsm")
		if err := sign("chip"); err != nil {
			t.Errorf("round %d: the other backend does not serve: %v", round, err)
		}
		if now := show(t, l, "chip"); now.KeyState != "ready" || now.KeyURI != chip.KeyURI {
			t.Errorf("round %d: the other backend's agent: %+v", round, now)
		}
		if err := os.Rename(away, tokens); err != nil {
			t.Fatal(err)
		}
		eventually(t, "waiting for the token to serve again", func() error { return sign("planner") })
		if now := show(t, l, "planner"); now.KeyState != "ready" || now.KeyURI != d.KeyURI {
			t.Errorf("round %d: after its return: %+v", round, now)
		}
		if err := healthy(t, l); err != nil {
			t.Errorf("round %d: after its return: %v", round, err)
		}
	}
	if l.Daemon().Pid() != daemon {
		t.Error("the daemon was restarted")
	}

	// A daemon that starts without the token knows its agents, and finds their keys when it comes.
	l.Kill()
	if err := os.Rename(tokens, away); err != nil {
		t.Fatal(err)
	}
	if err := l.Start(t.Context(), lab.Options{}); err != nil {
		t.Fatal(err)
	}
	if now := show(t, l, "planner"); now.KeyState == "ready" || now.KeyURI != d.KeyURI || now.Status != "active" {
		t.Errorf("started without its token: %+v", now)
	}
	checkDoctor(t, l, 1, "hsm")
	if err := os.Rename(away, tokens); err != nil {
		t.Fatal(err)
	}
	eventually(t, "waiting for the token that came late", func() error { return sign("planner") })
	if k := keyOf(t, l, "the planner's key", func(k api.Key) bool { return k.URI == d.KeyURI }); k.UsedBy != "planner" {
		t.Errorf("the key is listed as %+v", k)
	}
}
