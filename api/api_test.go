package api_test

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/fault"
)

// TestProblemRoundTrip holds every code to what an error must keep across a socket, and to what it must not.
func TestProblemRoundTrip(t *testing.T) {
	for _, code := range fault.All() {
		cause := errors.New("CKR_DEVICE_ERROR at slot 7")
		sent := &fault.Error{
			Code: code, Field: "packet.nonce", Text: "a text", Hint: "a hint", RetryAfter: 1500 * time.Millisecond, Err: cause,
		}
		text, err := json.Marshal(api.NewProblem(sent))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(text), "CKR_") {
			t.Errorf("%s: the cause is in %s", code, text)
		}
		var p api.Problem
		if err := json.Unmarshal(text, &p); err != nil {
			t.Fatal(err)
		}
		got := p.Err()
		if !errors.Is(got, code) || errors.Is(got, cause) {
			t.Errorf("%s arrives as %v", code, got)
		}
		e := fault.From(got)
		if e.Field != sent.Field || e.Text != sent.Text || e.Hint != sent.Hint || e.RetryAfter != sent.RetryAfter {
			t.Errorf("%s arrives as %+v", code, e)
		}
		if p.Status != code.Status() || p.Title != code.Title() || p.Retryable != code.Retryable() ||
			p.Type != api.ProblemType+string(code) {
			t.Errorf("%s: the problem is %+v", code, p)
		}
	}
}

// TestProblemOfTheUnforeseen says nothing of what nobody has looked at.
func TestProblemOfTheUnforeseen(t *testing.T) {
	for err, want := range map[error]fault.Code{
		errors.New("open /var/lib/trustd/pin: permission denied"): fault.Internal,
		context.DeadlineExceeded:                                  fault.DeadlineExceeded,
		context.Canceled:                                          fault.Canceled,
	} {
		p := api.NewProblem(err)
		if p.Code != want || p.Detail != "" {
			t.Errorf("%v becomes %+v", err, p)
		}
	}
	if api.NewProblem(nil) != nil || (*api.Problem)(nil).Err() != nil {
		t.Error("no error is not no problem")
	}
}

func TestProblemKeepsTheCodesOfNewerDaemons(t *testing.T) {
	p := &api.Problem{Code: "some_new_code", Status: 418, Retryable: true}
	if got := fault.CodeOf(p.Err()); got != "some_new_code" {
		t.Errorf("the code is %q", got)
	}
}

func TestIdempotencyKeyTravelsInTheContext(t *testing.T) {
	ctx := api.IdempotencyKey(context.Background(), "k-1")
	if got := api.IdempotencyKeyOf(ctx); got != "k-1" {
		t.Errorf("the key is %q", got)
	}
	if got := api.IdempotencyKeyOf(context.Background()); got != "" {
		t.Errorf("without a key it is %q", got)
	}
}
