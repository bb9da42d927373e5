package spend

import (
	"math"
	"time"

	"github.com/trustd/trustd/internal/clock"
)

// An instant is a reading of both clocks. age is the store's own timeline: time since the folder was first used,
// by the boot clock within a boot and by the wall clock's gain across one. It never runs backwards.
type instant struct {
	age  time.Duration
	wall time.Time
}

// A deadline is the last second of an entry on each clock; it is over only when both have passed.
type deadline struct {
	age  uint32 // of the timeline
	wall uint32 // since 2020, which lasts until 2156
}

var wallEpoch = time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC).Unix()

func (i instant) second() uint32 { return clamp(int64(i.age / time.Second)) }

func (i instant) wallSecond() uint32 { return clamp(i.wall.Unix() - wallEpoch) }

// add returns the deadline d from now, rounded up to a full second.
func (i instant) add(d time.Duration) deadline {
	up := d + time.Second - 1
	return deadline{age: clamp(int64((i.age + up) / time.Second)), wall: clamp(i.wall.Add(up).Unix() - wallEpoch)}
}

func (i instant) past(d deadline) bool { return i.second() > d.age && i.wallSecond() > d.wall }

func (d *deadline) extend(o deadline) { d.age, d.wall = max(d.age, o.age), max(d.wall, o.wall) }

func clamp(s int64) uint32 { return uint32(min(max(s, 0), math.MaxUint32)) }

// A mark is what a file says of the time at which a batch was written.
type mark struct {
	bootID string
	boot   time.Duration
	age    time.Duration
	wall   int64 // the highest reading seen so far, in microseconds since 1970; 0 where nothing was ever written
}

// A timeline continues that of the last mark.
type timeline struct {
	clock clock.Clock
	age   time.Duration // at boot
	boot  time.Duration
	id    string
	floor int64 // highest wall reading before this process
}

// resume finds where the timeline stands now.
func resume(c clock.Clock, last mark) timeline {
	t := timeline{clock: c, boot: c.Boot(), id: c.BootID(), floor: last.wall, age: last.age}
	var gone time.Duration
	switch {
	case last.wall == 0: // a new folder
	case last.bootID == t.id:
		gone = t.boot - last.boot
	default:
		gone = c.Now().Sub(time.UnixMicro(last.wall))
	}
	t.age += max(gone, 0)
	return t
}

func (t *timeline) now() instant {
	return instant{age: t.age + max(t.clock.Boot()-t.boot, 0), wall: t.clock.Now()}
}

// mark describes an instant. The floor it states rises with the wall clock and is never lowered: replay takes the
// highest of all marks.
func (t *timeline) mark(i instant) mark {
	return mark{bootID: t.id, boot: t.boot + i.age - t.age, age: i.age, wall: max(t.floor, i.wall.UnixMicro())}
}
