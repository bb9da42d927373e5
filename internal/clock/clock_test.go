package clock_test

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/trustd/trustd/internal/clock"
)

func TestSystem(t *testing.T) {
	c := clock.System()
	now := c.Now()
	if now.Location() != time.UTC || now.Nanosecond()%1000 != 0 {
		t.Errorf("Now() = %v: not UTC in whole microseconds", now)
	}
	if strings.Contains(now.String(), "m=") {
		t.Errorf("Now() = %v carries a monotonic reading", now)
	}
	a := c.Boot()
	if b := c.Boot(); a <= 0 || b < a {
		t.Errorf("Boot() = %v, then %v", a, b)
	}
	raw, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := c.BootID(), strings.TrimSpace(string(raw)); got != want || got == "" {
		t.Errorf("BootID() = %q, want %q", got, want)
	}
}

func TestFake(t *testing.T) {
	start := time.Date(2026, 3, 8, 12, 0, 0, 1999, time.FixedZone("", 7200))
	f := clock.NewFake(start)
	var c clock.Clock = f
	if got := c.Now(); got.Nanosecond() != 1000 || got.Hour() != 10 || got.Location() != time.UTC {
		t.Errorf("Now() = %v", got)
	}
	w, b := c.Now(), c.Boot()
	f.Advance(time.Minute)
	if c.Now().Sub(w) != time.Minute || c.Boot()-b != time.Minute {
		t.Error("Advance moved the two clocks differently")
	}
	f.SetWall(w)
	if c.Boot()-b != time.Minute || !c.Now().Equal(w) {
		t.Error("SetWall must move the wall clock alone")
	}
	id := c.BootID()
	f.Reboot("another", w.Add(time.Hour))
	if c.Boot() != 0 || c.BootID() == id || !c.Now().Equal(w.Add(time.Hour)) {
		t.Error("Reboot did not start anew")
	}
}
