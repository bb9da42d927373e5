// Package clock is the only reader of time. Wall time comes in UTC with microseconds, because no format of trustd
// carries more; the boot clock counts suspended time too, because a nonce must not outlive its sleep.
package clock

import (
	"crypto/rand"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A Clock tells the time. Implementations are safe for concurrent use.
type Clock interface {
	// Now returns the wall time: UTC, whole microseconds, no monotonic reading.
	Now() time.Time
	// Boot returns the time since the machine started, sleep included. It never runs backwards while BootID stays
	// the same.
	Boot() time.Duration
	// BootID names the current boot of the machine. It is never empty.
	BootID() string
}

const bootIDFile = "/proc/sys/kernel/random/boot_id"

type system struct{ bootID string }

// System returns the machine's clock. Where the kernel does not tell the boot's name (no /proc/sys in a sandbox), the
// process gets a name of its own: each start then counts as a reboot, which is the safe side.
func System() Clock {
	raw, err := os.ReadFile(bootIDFile)
	id := strings.TrimSpace(string(raw))
	if err != nil || id == "" {
		id = "process-" + rand.Text()
	}
	return system{bootID: id}
}

func (system) Now() time.Time { return time.Now().UTC().Truncate(time.Microsecond) }

func (system) Boot() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic("clock: no CLOCK_BOOTTIME") // Linux has it since 2.6.39; without it no nonce could age
	}
	return time.Duration(ts.Nano())
}

func (s system) BootID() string { return s.bootID }
