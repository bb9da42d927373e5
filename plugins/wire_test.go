package plugins

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"google.golang.org/protobuf/proto"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/plugins/signerpb"
	"github.com/trustd/trustd/signer"
)

// TestErrorsSurviveTheBoundary sends every code with every class there and back.
func TestErrorsSurviveTheBoundary(t *testing.T) {
	classes := []signer.Class{
		"", signer.TransientBusy, signer.SessionLost, signer.HandleLost, signer.LoginLost, signer.TokenLost,
		signer.ModuleDead,
		signer.AuthorisationRefused, signer.ResourcesExhausted, signer.KeyGone, signer.CallerError,
	}
	for _, code := range fault.All() {
		for _, class := range classes {
			in := &fault.Error{Code: code, Field: "f", Text: "t", Hint: "h", RetryAfter: 250 * time.Millisecond}
			if class != "" {
				in.Err = &remoteError{class, "cause"}
			}
			wire, err := proto.Marshal(encodeError(in))
			if err != nil {
				t.Fatal(err)
			}
			var p signerpb.Error
			if err := proto.Unmarshal(wire, &p); err != nil {
				t.Fatal(err)
			}
			out := decodeError(&p)
			var e *fault.Error
			if !errors.As(out, &e) || !reflect.DeepEqual(in, e) || !errors.Is(out, code) || signer.ClassOf(out) != class {
				t.Errorf("%s/%s arrives as %+v", code, class, e)
			}
		}
	}
	if encodeError(nil) != nil || decodeError(nil) != nil {
		t.Error("no error is one")
	}
	if err := decodeError(&signerpb.Error{Code: "of a newer release"}); !errors.Is(err, fault.Internal) {
		t.Errorf("an unknown code: %v", err)
	}
	if err := decodeError(encodeError(context.DeadlineExceeded)); !errors.Is(err, fault.DeadlineExceeded) {
		t.Errorf("a deadline: %v", err)
	}
	long := encodeError(fault.Wrap(fault.Internal, errors.New(strings.Repeat("x", 1<<20)+"\xff"), "t"))
	if len(long.Cause) > maxCause {
		t.Errorf("a cause of %d bytes", len(long.Cause))
	}
}

func TestInfoSurvivesTheBoundary(t *testing.T) {
	pub, err := ident.ParsePublicKey("11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=")
	if err != nil {
		t.Fatal(err)
	}
	for _, in := range []signer.KeyInfo{
		{
			URI: "u", ID: "id\x00\xff", Label: "l", Public: pub, Grade: signer.Software, Origin: signer.OriginImported,
			Sensitive: true,
		},
		{Always: true, Exported: true, Problem: "p"},
	} {
		if out := decodeInfo(encodeInfo(in)); !reflect.DeepEqual(in, out) {
			t.Errorf("%+v arrives as %+v", in, out)
		}
	}
	if _, err := proto.Marshal(encodeInfo(signer.KeyInfo{Label: "\xff"})); err != nil {
		t.Errorf("a label that is no text: %v", err)
	}
	if out := decodeInfo(&signerpb.KeyInfo{Spki: []byte("noise")}); out.Problem == "" || !out.Public.IsZero() {
		t.Errorf("a key that cannot be read: %+v", out)
	}
	in := signer.Description{
		Kind: "k", Device: "d", Algorithms: ident.Algorithms(), Mechanisms: []string{"m"},
		Limits: map[string]string{"a": "b"},
		Grade:  signer.HardwareClaimed, State: signer.Degraded, Problem: "p", Remedy: "r",
	}
	if out := decodeDescription(encodeDescription(in)); !reflect.DeepEqual(in, out) {
		t.Errorf("%+v arrives as %+v", in, out)
	}
}

// TestLog checks the way of a line from hclog to slog.
func TestLog(t *testing.T) {
	var out bytes.Buffer
	l := &hclogger{log: slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}))}
	sub := l.With("a", 1).Named("n").Named("m")
	sub.Error("bad", "b", hclog.Fmt("%d-%d", 1, 2), "odd")
	sub.Trace("never seen")
	line := out.String()
	for _, want := range []string{"level=WARN", "msg=bad", "a=1", "b=1-2", "extra=odd"} {
		if !strings.Contains(line, want) {
			t.Errorf("%q lacks %s", line, want)
		}
	}
	if strings.Contains(line, "never") || sub.Name() != "n.m" || sub.IsTrace() || !sub.IsDebug() ||
		sub.GetLevel() != hclog.Debug {
		t.Errorf("%q, %s, level %v", line, sub.Name(), sub.GetLevel())
	}
}
