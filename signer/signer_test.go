package signer_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signer"
)

func TestParseURI(t *testing.T) {
	for s, want := range map[string]signer.URI{
		"soft:id=00ff":                         {Scheme: "soft", ID: "\x00\xff"},
		"tpm:id=0102030405060708090a0b0c":      {Scheme: "tpm", ID: "\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c"},
		"pkcs11:id=%00%FF":                     {Scheme: "pkcs11", ID: "\x00\xff"},
		"pkcs11:token=a;serial=b;id=%01":       {Scheme: "pkcs11", Token: "a", Serial: "b", ID: "\x01"},
		"pkcs11:token=My%20token;id=%01":       {Scheme: "pkcs11", Token: "My token", ID: "\x01"},
		"pkcs11:token=a%3Bid%3D%2502;id=%01":   {Scheme: "pkcs11", Token: "a;id=%02", ID: "\x01"},
		"pkcs11:object=label;token=t;id=%01":   {Scheme: "pkcs11", Token: "t", Object: "label", ID: "\x01"},
		"pkcs11:token=%C3%BC;id=%01":           {Scheme: "pkcs11", Token: "ü", ID: "\x01"},
		"pkcs11:id=abc":                        {Scheme: "pkcs11", ID: "abc"},
		"pkcs11:id=" + strings.Repeat("a", 64): {Scheme: "pkcs11", ID: signer.ID(strings.Repeat("a", 64))},
	} {
		u, err := signer.ParseURI(s)
		if err != nil || u != want {
			t.Errorf("%s: %+v, %v", s, u, err)
			continue
		}
		if again, err := signer.ParseURI(u.String()); err != nil || again != u {
			t.Errorf("%s: its text %s reads back as %+v, %v", s, u, again, err)
		}
	}
}

func TestParseURIRefuses(t *testing.T) {
	for name, s := range map[string]string{
		"nothing":             "",
		"no scheme":           "id=00",
		"other scheme":        "file:id=00",
		"upper-case scheme":   "SOFT:id=00",
		"only a scheme":       "soft:",
		"no id":               "pkcs11:token=a",
		"label alone":         "pkcs11:object=key",
		"empty id":            "soft:id=",
		"odd digits":          "soft:id=0",
		"no digits":           "soft:id=zz",
		"percent in hex id":   "soft:id=%00",
		"twice":               "pkcs11:id=%01;id=%02",
		"unknown attribute":   "pkcs11:id=%01;slot-id=0",
		"PIN in query":        "pkcs11:id=%01?pin-value=1234",
		"PIN as attribute":    "pkcs11:id=%01;pin-value=1234",
		"module in query":     "pkcs11:id=%01?module-path=/tmp/evil.so",
		"token in soft":       "soft:token=a;id=00",
		"broken escape":       "pkcs11:id=%0",
		"broken escape 2":     "pkcs11:id=%zz",
		"no equals sign":      "pkcs11:id",
		"empty attribute":     "pkcs11:;id=%01",
		"trailing separator":  "pkcs11:id=%01;",
		"id of 65 bytes":      "pkcs11:id=" + strings.Repeat("a", 65),
		"hex id of 65 bytes":  "soft:id=" + strings.Repeat("00", 65),
		"longer than allowed": "pkcs11:id=%01;token=" + strings.Repeat("a", 1024),
	} {
		u, err := signer.ParseURI(s)
		if fault.CodeOf(err) != fault.Malformed || u != (signer.URI{}) {
			t.Errorf("%s: %+v, %v", name, u, err)
		}
		if err != nil && strings.Contains(err.Error(), "1234") {
			t.Errorf("%s: the error quotes a value: %v", name, err)
		}
	}
}

func FuzzParseURI(f *testing.F) {
	for _, s := range []string{"soft:id=00ff", "tpm:id=01", "pkcs11:token=My%20token;serial=1;object=x;id=%00%FF", "pkcs11:id=abc",
		"pkcs11:id=%01?pin-value=1", "soft:id=0"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := signer.ParseURI(s)
		if err != nil {
			if fault.CodeOf(err) != fault.Malformed || u != (signer.URI{}) {
				t.Errorf("%q: %+v, %v", s, u, err)
			}
			return
		}
		text := u.String()
		if len(text) > 1024 {
			return // escaping made it longer than what is read
		}
		again, err := signer.ParseURI(text)
		if err != nil || again != u || again.String() != text {
			t.Errorf("%q has the text %q, which reads back as %+v, %v", s, text, again, err)
		}
	})
}

func TestID(t *testing.T) {
	for _, n := range []int{1, 16, 64} {
		id, err := signer.NewID(make([]byte, n))
		if err != nil || len(id.Bytes()) != n || len(id.String()) != 2*n {
			t.Errorf("%d bytes: %v, %v", n, id, err)
		}
		if back, err := signer.ParseID(id.String()); err != nil || back != id {
			t.Errorf("%v reads back as %v, %v", id, back, err)
		}
	}
	for _, n := range []int{0, 65} {
		if _, err := signer.NewID(make([]byte, n)); fault.CodeOf(err) != fault.Malformed {
			t.Errorf("an id of %d bytes: %v", n, err)
		}
		if _, err := signer.ParseID(strings.Repeat("00", n)); fault.CodeOf(err) != fault.Malformed {
			t.Errorf("the text of an id of %d bytes: %v", n, err)
		}
	}
	if _, err := signer.ParseID("0x00"); fault.CodeOf(err) != fault.Malformed {
		t.Error("0x00 is an id")
	}
}

func TestClassCodes(t *testing.T) {
	for class, want := range map[signer.Class]fault.Code{
		signer.TransientBusy: fault.DeviceBusy, signer.SessionLost: fault.DeviceLost, signer.HandleLost: fault.DeviceLost,
		signer.LoginLost: fault.DeviceLost, signer.TokenLost: fault.DeviceLost, signer.ModuleDead: fault.DeviceDead,
		signer.AuthorisationRefused: fault.AuthorisationRefused, signer.ResourcesExhausted: fault.ResourceExhausted,
		signer.KeyGone: fault.KeyGone, signer.CallerError: fault.Malformed, "": fault.Internal, "new": fault.Internal,
	} {
		if got := class.Code(); got != want {
			t.Errorf("%q has the code %s, want %s", class, got, want)
		}
	}
}

type oneByOne struct{ fail string }

func (oneByOne) Public() ident.PublicKey { return ident.PublicKey{} }

func (o oneByOne) Sign(_ context.Context, msg []byte) ([]byte, error) {
	if string(msg) == o.fail {
		return nil, errors.New("failed")
	}
	return append([]byte("signed "), msg...), nil
}

type inBatch struct{ oneByOne }

func (inBatch) SignBatch(_ context.Context, msgs [][]byte) []signer.Result {
	return []signer.Result{{Signature: []byte("batch")}}
}

func TestSignAll(t *testing.T) {
	msgs := [][]byte{[]byte("a"), []byte("b"), []byte("c")}
	out := signer.SignAll(t.Context(), oneByOne{fail: "b"}, msgs)
	if len(out) != 3 || string(out[0].Signature) != "signed a" || out[1].Err == nil || out[1].Signature != nil || string(out[2].Signature) != "signed c" {
		t.Errorf("%+v", out)
	}
	if out := signer.SignAll(t.Context(), inBatch{}, msgs); len(out) != 1 || string(out[0].Signature) != "batch" {
		t.Errorf("a signer of batches is asked one by one: %+v", out)
	}
}
