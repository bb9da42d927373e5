package e2e

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"

	"github.com/trustd/trustd/client"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/softhsm-test/lab"
)

// TestWrongPINIsTriedOnce is T-DEV-3. It counts the logins that reach a token whose PIN is configured wrongly: one,
// whatever is asked and whatever dies, and one more each time that an operator has it tried again.
func TestWrongPINIsTriedOnce(t *testing.T) {
	l := start(t, withFaulty(t, lab.Options{NoTPM: true, Faulty: []lab.Faulty{{Name: onFaulty, Wraps: "pkcs11"}}}))
	add(t, l, "there", "--backend", onFaulty, "--uid", "0")
	add(t, l, "beside", "--uid", "0")
	err := errors.Join(l.Stop(), l.SetPIN(onFaulty, "wrong"), l.Script(onFaulty, `{"at":"C_Login","do":"note"}`))
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Start(t.Context(), lab.Options{}); err != nil {
		t.Fatal(err)
	}
	c := client.New(l.AgentSocket)
	defer c.Close()
	refused := func(tries int) {
		t.Helper()
		for range 20 {
			if _, err := c.SignPacket(t.Context(), packetFor("there")); !errors.Is(err, fault.AuthorisationRefused) {
				t.Fatalf("with a wrong PIN: %v", err)
			}
			if _, err := c.SignPacket(t.Context(), packetFor("beside")); err != nil {
				t.Fatalf("the other backend: %v", err)
			}
		}
		if r := l.Root(t.Context(), nil, "agent", "add", "more", "--backend", onFaulty, "-o", "json"); r.Code == 0 ||
			!strings.Contains(r.Stderr, "authorisation_refused") {
			t.Errorf("making a key: exit %d: %s", r.Code, r.Stderr)
		}
		if n := l.Notes(onFaulty); n != tries {
			t.Errorf("the PIN was tried %d times, want %d", n, tries)
		}
	}
	refused(1)
	checkDoctor(t, l, 1, onFaulty)
	if b, err := client.NewAdmin(l.AdminSocket).ShowBackend(t.Context(), onFaulty); err != nil || b.State != "locked" {
		t.Errorf("the backend is %s, %v", b.State, err)
	}

	if pid := l.Child(onFaulty); pid != 0 {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		eventually(t, "waiting for the plugin's end", func() error {
			if l.Child(onFaulty) == pid {
				return errors.New("it runs")
			}
			return nil
		})
	}
	refused(1)

	if r := l.Root(t.Context(), nil, "backend", "unlock", onFaulty); r.Code == 0 {
		t.Errorf("a wrong PIN was unlocked: %s", r.Stdout)
	}
	refused(2)

	if err := l.SetPIN(onFaulty, ""); err != nil {
		t.Fatal(err)
	}
	refused(2) // the right PIN alone does nothing
	if r := l.Root(t.Context(), nil, "backend", "unlock", onFaulty); r.Code != 0 {
		t.Fatalf("unlock: exit %d: %s", r.Code, r.Stderr)
	}
	eventuallyWithin(t, "waiting for service after unlocking", bound, func() error {
		_, err := c.SignPacket(t.Context(), packetFor("there"))
		return err
	})
	if n := l.Notes(onFaulty); n != 3 {
		t.Error(fmt.Errorf("the PIN was tried %d times in all, want 3", n))
	}
}

// TestFaultyTPM runs the TPM backend inside a plugin, behind a script: the second plugin holds any backend.
func TestFaultyTPM(t *testing.T) {
	l := start(t, withFaulty(t, lab.Options{Proxy: true, Faulty: []lab.Faulty{{Name: "chip", Wraps: "tpm"}}}))
	add(t, l, "there", "--backend", "chip", "--uid", "0")
	c := client.New(l.AgentSocket)
	defer c.Close()
	sign := func() error {
		_, err := c.SignPacket(t.Context(), packetFor("there"))
		return err
	}
	if err := sign(); err != nil {
		t.Fatal(err)
	}
	for script, want := range map[string]fault.Code{
		`{"at":"TPM2_Sign","do":"return","code":"TPM_RC_FAILURE"}`:  fault.DeviceDead,
		`{"at":"TPM2_Sign","do":"return","code":"TPM_RC_LOCALITY"}`: fault.AuthorisationRefused,
		`{"at":"TPM2_*","do":"drop"}`:                               fault.DeviceLost,
		`{"token":"gone"}`:                                          fault.DeviceLost,
		`{"at":"Sign","do":"return","code":"transient_busy"}`:       fault.DeviceBusy,
	} {
		if err := l.Script("chip", script); err != nil {
			t.Fatal(err)
		}
		if err := sign(); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %s", script, err, want)
		}
		if err := l.Script("chip"); err != nil {
			t.Fatal(err)
		}
		if want == fault.AuthorisationRefused {
			if r := l.Root(t.Context(), nil, "backend", "unlock", "chip"); r.Code != 0 {
				t.Errorf("unlock: exit %d: %s", r.Code, r.Stderr)
			}
		}
		eventuallyWithin(t, "waiting for service after "+script, bound, sign)
	}
}
