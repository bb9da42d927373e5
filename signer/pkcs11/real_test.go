//go:build cgo

package pkcs11_test

import (
	"encoding/hex"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/pkcs11"
	softhsmtest "github.com/trustd/trustd/softhsm-test"
)

// byLabel leaves the serial number to be learnt.
func byLabel(cfg *pkcs11.Config) { cfg.TokenSerial = "" }

// twin puts a new token with the label of k into its folder, and returns its serial number.
func twin(t *testing.T, k *softhsmtest.Token) (serial string) {
	t.Helper()
	run := func(args ...string) string {
		cmd := exec.Command(softhsmtest.Tool(t, "softhsm2-util"), args...)
		cmd.Env = append(os.Environ(), softhsmtest.EnvConf+"="+k.ConfPath)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("softhsm2-util %s: %v\n%s", args[0], err, out)
		}
		return string(out)
	}
	run("--init-token", "--free", "--label", k.Label, "--pin", string(k.PIN()), "--so-pin", "12345678")
	for slot := range strings.SplitSeq(run("--show-slots"), "\nSlot ") {
		if _, rest, found := strings.Cut(slot, "Serial number:"); found && strings.Contains(slot, k.Label) {
			return strings.Fields(rest)[0]
		}
	}
	t.Fatal("no serial number")
	return ""
}

// TestTokenGoesAndComes takes the token's files away under load, leaves nothing, an empty folder or another token in
// their place, and puts them back, without opening the backend anew. A lost token is never a lost key.
func TestTokenGoesAndComes(t *testing.T) {
	b, _, k := wrapped(t, byLabel)
	one, two := generate(t, b), generate(t, b)
	l := startLoad(t, 16, retryable, one, two)
	for name, c := range map[string]struct {
		replace func(t *testing.T) (problem string)
	}{
		"renamed away": {func(t *testing.T) string {
			if err := os.Remove(k.Dir); err != nil {
				t.Fatal(err)
			}
			return ""
		}},
		"an empty folder": {func(*testing.T) string { return "no token with that label" }},
		"another token of the same label": {func(t *testing.T) string {
			return "serial is " + twin(t, k) + " and not " + k.Serial
		}},
	} {
		t.Run(name, func(t *testing.T) {
			l.signs(100)
			before := b.Failures()[signer.TokenLost]
			restore := k.Vanish(t)
			problem := c.replace(t)
			poll(t, "the loss is reported", func() bool {
				d := b.Describe(t.Context())
				return d.State == signer.Degraded && strings.Contains(d.Problem, problem) && d.Remedy != "" &&
					d.Limits["serial"] == k.Serial
			})
			failed := l.failed.Load()
			poll(t, "requests fail meanwhile", func() bool { return l.failed.Load() > failed+20 })
			if _, err := b.Open(t.Context(), one.Info().ID, one.Public()); !errors.Is(err, fault.DeviceLost) {
				t.Errorf("opening a key on a lost token: %v", err)
			}
			restore()
			returned := time.Now()
			l.signs(1)
			t.Logf("serves again %v after the return", time.Since(returned))
			l.signs(100)
			if b.Failures()[signer.TokenLost] == before {
				t.Error("the loss was not counted")
			}
		})
	}
	l.stop()
	if d := b.Describe(t.Context()); d.State != signer.Ready || d.Limits["serial"] != k.Serial {
		t.Errorf("%+v", d)
	}
}

// TestTokenFlickers takes the token away and puts it back at once, again and again.
func TestTokenFlickers(t *testing.T) {
	b, _, k := wrapped(t, byLabel)
	l := startLoad(t, 8, retryable, generate(t, b), generate(t, b))
	for range 30 {
		l.signs(20)
		k.Vanish(t)()
	}
	l.signs(20)
	l.stop()
	t.Logf("%d signed, %d failed, %v", l.signed.Load(), l.failed.Load(), b.Failures())
}

const (
	envVictims = "TRUSTD_TEST_VICTIMS" // ids of keys to destroy, separated by commas
	envToken   = "TRUSTD_TEST_TOKEN"   // module, label and PIN, one a line
)

// TestSecondProcess is no test: it is what destroyElsewhere runs.
func TestSecondProcess(t *testing.T) {
	victims := os.Getenv(envVictims)
	if victims == "" {
		t.Skip("is run by other tests")
	}
	token := strings.Split(os.Getenv(envToken), "\n")
	k := &softhsmtest.Token{Module: token[0], Label: token[1]}
	cfg := config(k)
	cfg.PIN = fixed(token[2])
	b := pkcs11.New(cfg)
	defer b.Close()
	for id := range strings.SplitSeq(victims, ",") {
		raw, err := hex.DecodeString(id)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Destroy(t.Context(), signer.ID(raw)); err != nil {
			t.Fatal(fault.From(err).Verbose())
		}
	}
}

// destroyElsewhere destroys keys from another process.
func destroyElsewhere(t *testing.T, k *softhsmtest.Token, keys ...signer.Key) {
	t.Helper()
	ids := make([]string, len(keys))
	for i, k := range keys {
		ids[i] = k.Info().ID.String()
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestSecondProcess$")
	cmd.Env = append(os.Environ(), envVictims+"="+strings.Join(ids, ","),
		envToken+"="+strings.Join([]string{k.Module, k.Label, string(k.PIN())}, "\n"))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("destroying keys in another process: %v\n%s", err, out)
	}
}

// TestKeyIsDeletedByAnother has another process delete one key and then all of them: the keys that are gone are
// key_gone, the others sign on, and an empty token still makes keys.
func TestKeyIsDeletedByAnother(t *testing.T) {
	b, i, k := wrapped(t, byLabel)
	one, two, three := generate(t, b), generate(t, b), generate(t, b)
	gone := func(key signer.Key) {
		t.Helper()
		poll(t, "the key is reported as gone", func() bool {
			_, err := key.Sign(t.Context(), []byte("m"))
			return errors.Is(err, fault.KeyGone) && signer.ClassOf(err) == signer.KeyGone
		})
		if _, err := b.Open(t.Context(), key.Info().ID, key.Public()); !errors.Is(err, fault.KeyGone) {
			t.Errorf("opening it: %v", err)
		}
	}
	goneToo := func(err error) bool { return retryable(err) || errors.Is(err, fault.KeyGone) }
	others := startLoad(t, 8, retryable, two, three)
	victim := startLoad(t, 4, goneToo, one)
	destroyElsewhere(t, k, one)
	gone(one)
	others.signs(100)
	others.stop()
	all := startLoad(t, 8, goneToo, two, three)
	destroyElsewhere(t, k, two, three)
	for _, key := range []signer.Key{one, two, three} {
		gone(key)
	}
	signed := all.signed.Load() + victim.signed.Load()
	failed := all.failed.Load()
	poll(t, "requests for lost keys fail", func() bool { return all.failed.Load() > failed+100 })
	if now := all.signed.Load() + victim.signed.Load(); now != signed {
		t.Errorf("%d signatures by keys that are gone", now-signed)
	}
	if d := b.Describe(t.Context()); d.State != signer.Ready && d.State != signer.Recovering {
		t.Errorf("a healthy token without keys: %+v", d)
	}
	logins := i.logins.Load()
	fresh := generate(t, b)
	startLoad(t, 8, retryable, fresh).signs(100)
	all.stop()
	victim.stop()
	if n := i.logins.Load() - logins; n > 20 {
		t.Errorf("%d logins while keys were gone", n)
	}
	t.Logf("%d logins in all, failures %v", i.logins.Load(), b.Failures())
}
