package clock

import (
	"sync"
	"time"
)

// A Fake is a Clock that stands still until it is told otherwise. It is for tests; it is safe for concurrent use.
type Fake struct {
	mu   sync.Mutex
	wall time.Time
	boot time.Duration
	id   string
}

// NewFake returns a clock that shows the given wall time, one hour after a boot named "boot-1".
func NewFake(wall time.Time) *Fake {
	return &Fake{wall: wall.UTC().Truncate(time.Microsecond), boot: time.Hour, id: "boot-1"}
}

// Now returns the wall time that was set.
func (f *Fake) Now() time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.wall
}

// Boot returns the boot clock's reading.
func (f *Fake) Boot() time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.boot
}

// BootID returns the name of the boot.
func (f *Fake) BootID() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.id
}

// Advance moves wall and boot clock forward together, as time does.
func (f *Fake) Advance(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.wall, f.boot = f.wall.Add(d), f.boot+d
}

// SetWall sets the wall clock alone, as an administrator or NTP does.
func (f *Fake) SetWall(t time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.wall = t.UTC().Truncate(time.Microsecond)
}

// Reboot starts a new boot of the given name: the boot clock begins again, the wall clock shows wall.
func (f *Fake) Reboot(id string, wall time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.id, f.boot, f.wall = id, 0, wall.UTC().Truncate(time.Microsecond)
}
