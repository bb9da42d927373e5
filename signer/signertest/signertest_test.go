package signertest_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/signertest"
	"github.com/trustd/trustd/signer/soft"
)

// A bad backend is a good one with one defect.
type bad struct {
	*soft.Backend
	defect string
}

// defects names each defect and a subtest of Run that must fail for it.
var defects = map[string]string{
	"none":                         "",
	"no algorithms":                "Describe",
	"not ready":                    "Describe",
	"second key under an id":       "Generate",
	"another algorithm":            "Unsupported",
	"signs another message":        "Sign",
	"changes the message":          "Sign",
	"drops leading zeros":          "FixedWidth",
	"batch in reverse":             "Batch",
	"opens any key":                "Open",
	"unknown key is not found":     "Open",
	"finds nothing":                "Find",
	"lists nothing":                "Keys",
	"lists twice":                  "Keys",
	"foreign URI":                  "Generate",
	"sensitive and exported":       "Generate",
	"destroys nothing":             "Destroy",
	"missing key is an error":      "Destroy",
	"signs when destroyed":         "Destroy",
	"import is unmarked":           "Import",
	"exports another key":          "Export",
	"ignores the context":          "Context",
	"quotes the device":            "Open",
	"signs for another under load": "Concurrency",
	"does not close":               "Close",
	"forgets":                      "Reopen",
}

func (b *bad) is(defect string) bool { return b.defect == defect }

func (b *bad) wrap(k signer.Key, err error) (signer.Key, error) {
	if err != nil {
		if b.is("quotes the device") {
			err = &fault.Error{Code: fault.CodeOf(err), Text: "CKR_DEVICE_ERROR"}
		}
		return nil, err
	}
	return &badKey{k.(*soft.Key), b, nil}, nil
}

func (b *bad) info(i signer.KeyInfo) signer.KeyInfo {
	switch b.defect {
	case "foreign URI":
		i.URI = strings.Replace(i.URI, "soft:", "tpm:", 1)
	case "sensitive and exported":
		i.Sensitive = true
	case "import is unmarked":
		i.Origin = signer.OriginDevice
	}
	return i
}

func (b *bad) Describe(ctx context.Context) signer.Description {
	d := b.Backend.Describe(ctx)
	switch b.defect {
	case "no algorithms":
		d.Algorithms = nil
	case "not ready":
		d.State = signer.Degraded
	}
	return d
}

func (b *bad) Generate(ctx context.Context, id signer.ID, alg ident.Algorithm) (signer.Key, error) {
	if b.is("second key under an id") {
		_ = b.Backend.Destroy(ctx, id)
	}
	if b.is("another algorithm") && !alg.Valid() {
		alg = ident.Ed25519
	}
	return b.wrap(b.Backend.Generate(ctx, id, alg))
}

func (b *bad) Import(ctx context.Context, id signer.ID, der []byte) (signer.Key, error) {
	return b.wrap(b.Backend.Import(ctx, id, der))
}

func (b *bad) Open(ctx context.Context, id signer.ID, pub ident.PublicKey) (signer.Key, error) {
	k, err := b.Backend.Open(ctx, id, pub)
	switch {
	case err != nil && b.is("opens any key"):
		if info, ferr := b.Backend.Find(ctx, id); ferr == nil {
			k, err = b.Backend.Open(ctx, id, info.Public)
		}
	case fault.CodeOf(err) == fault.KeyGone && b.is("unknown key is not found"):
		err = fault.New(fault.KeyNotFound, "")
	}
	return b.wrap(k, err)
}

func (b *bad) Find(ctx context.Context, id signer.ID) (signer.KeyInfo, error) {
	if b.is("finds nothing") {
		return signer.KeyInfo{}, fault.New(fault.KeyNotFound, "")
	}
	i, err := b.Backend.Find(ctx, id)
	return b.info(i), err
}

func (b *bad) Keys(ctx context.Context) ([]signer.KeyInfo, error) {
	list, err := b.Backend.Keys(ctx)
	for i := range list {
		list[i] = b.info(list[i])
	}
	switch b.defect {
	case "lists nothing":
		list = nil
	case "lists twice":
		list = append(list, list...)
	}
	return list, err
}

func (b *bad) Export(ctx context.Context, id signer.ID) ([]byte, error) {
	if b.is("exports another key") {
		list, err := b.Backend.Keys(ctx)
		if err != nil {
			return nil, err
		}
		for _, i := range list {
			if i.ID != id {
				return b.Backend.Export(ctx, i.ID)
			}
		}
	}
	return b.Backend.Export(ctx, id)
}

func (b *bad) Destroy(ctx context.Context, id signer.ID) error {
	switch b.defect {
	case "destroys nothing":
		return nil
	case "missing key is an error":
		if _, err := b.Backend.Find(ctx, id); err != nil {
			return err
		}
	}
	return b.Backend.Destroy(ctx, id)
}

func (b *bad) Close() error {
	if b.is("does not close") {
		return nil
	}
	return b.Backend.Close()
}

type badKey struct {
	*soft.Key
	backend *bad
	last    []byte
}

func (k *badKey) Info() signer.KeyInfo { return k.backend.info(k.Key.Info()) }

func (k *badKey) Sign(ctx context.Context, msg []byte) ([]byte, error) {
	switch k.backend.defect {
	case "signs another message":
		if len(msg) > 100_000 {
			msg = msg[:100_000]
		}
	case "changes the message":
		if len(msg) > 0 {
			defer func(c byte) { msg[0] = c + 1 }(msg[0])
		}
	case "signs for another under load":
		if strings.HasPrefix(string(msg), "goroutine 3") {
			msg = []byte("goroutine 4")
		}
	case "ignores the context":
		ctx = context.WithoutCancel(ctx)
	}
	sig, err := k.Key.Sign(ctx, msg)
	if k.backend.is("signs when destroyed") {
		if err != nil && fault.CodeOf(err) == fault.KeyGone {
			return k.last, nil
		}
		k.last = sig
	}
	return sig, err
}

func (k *badKey) SignBatch(ctx context.Context, msgs [][]byte) []signer.Result {
	out := k.Key.SignBatch(ctx, msgs)
	for i := range out {
		s := out[i].Signature
		if k.backend.is("drops leading zeros") && len(s) > 0 && s[len(s)/2] == 0 {
			out[i].Signature = slices.Delete(s, len(s)/2, len(s)/2+1)
		}
	}
	if k.backend.is("batch in reverse") {
		slices.Reverse(out)
	}
	return out
}

const variable = "SIGNERTEST_DEFECT"

// TestDefect runs the suite on the backend that the environment names. TestSuiteFinds starts it.
func TestDefect(t *testing.T) {
	defect := os.Getenv(variable)
	if defect == "" {
		defect = "none"
	}
	dir := t.TempDir()
	start := func(sub string) func(testing.TB) signer.Backend {
		return func(t testing.TB) signer.Backend {
			b, err := soft.Open(soft.Config{Dir: filepath.Join(dir, sub)})
			if err != nil {
				t.Fatal(err)
			}
			return &bad{b, defect}
		}
	}
	second := "keys"
	if defect == "forgets" {
		second = "other"
	}
	signertest.Run(t, start("keys"), signertest.Reopen(start(second)),
		signertest.Algorithms(ident.Ed25519, ident.ECDSAP256))
}

// TestSuiteFinds runs the suite, in processes of their own, on a backend with each defect in turn.
func TestSuiteFinds(t *testing.T) {
	for defect, subtest := range defects {
		t.Run(defect, func(t *testing.T) {
			t.Parallel()
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestDefect$")
			cmd.Env = append(os.Environ(), variable+"="+defect)
			out, err := cmd.CombinedOutput()
			if subtest == "" {
				if err != nil {
					t.Errorf("a good backend fails: %v\n%s", err, out)
				}
				return
			}
			if err == nil || !strings.Contains(string(out), "--- FAIL: TestDefect/"+subtest) {
				t.Errorf("the defect passes %s: %v\n%s", subtest, err, out)
			}
			if strings.Contains(string(out), "panic:") {
				t.Errorf("the suite panics:\n%s", out)
			}
		})
	}
}
