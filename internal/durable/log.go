package durable

import (
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/trustd/trustd/fault"
)

const (
	// MaxRecord bounds one record of a Log. Larger lengths in a file are damage, never an allocation.
	MaxRecord = 16 << 20
	// DefaultSyncInterval is how long what AppendAsync wrote may stay in the page cache alone.
	DefaultSyncInterval = 100 * time.Millisecond

	frameHead = 8 // length and checksum
)

// A LogConfig says how to open a Log. Path alone is enough.
type LogConfig struct {
	Path string
	// Purpose stands in the header; a file with another one is refused. Default: the last element of Path.
	Purpose string
	// Initial holds what a file that is made here begins with. It appears with these records or not at all.
	Initial [][]byte
	// SyncInterval bounds how long a record of AppendAsync stays unsynced. Default: DefaultSyncInterval.
	SyncInterval time.Duration
	// FS is where the file lives. Default: Disk.
	FS FS
}

// A Log is a file of checksummed records to which records are added at the end.
//
// Append returns once its records are on the disk; appenders that overlap share one sync. AppendAsync returns once
// the record is in the page cache, where it survives the death of this process but not the loss of power, and
// starts a timer after which it is synced. Records are replayed in the order in which they were added. A failed
// sync is final: the log then refuses everything until it is opened again, because the kernel may have dropped
// what it could not write. A failed write, of a full disk say, is taken back and may be repeated.
//
// All methods are safe for concurrent use. A Log has no goroutine of its own; while something is being synced one
// runs, and Close waits for it.
type Log struct {
	cfg LogConfig

	mu      sync.Mutex // guards what follows; held across write(2), across a sync only to take back a failed write
	f       File
	end     int64 // where the next frame goes
	synced  int64 // what is known to be on the disk
	err     error // final; nil while the log works
	closed  bool
	slot    int    // where the last mark went; only one is ever unsynced
	running bool   // a goroutine is syncing
	next    *round // what the next sync will cover; nil when nobody waits
	timer   *time.Timer
	idle    *sync.Cond // signalled when running turns false
	frame   []byte     // scratch
}

// A round is one sync and those who wait for it.
type round struct {
	done chan struct{}
	err  error
}

// OpenLog opens the log at path, making it where it is missing, and calls fn for each record in it. The slice is
// fn's only during the call. An error of fn is returned, and the log is not opened.
//
// An incomplete or damaged end that was never acknowledged is cut off. Damage to anything that was is
// fault.Corrupt and leaves the file as it is. fault.Unavailable says that another process holds the file.
func OpenLog(path string, fn func(rec []byte) error) (*Log, error) {
	return LogConfig{Path: path}.Open(fn)
}

// Open is OpenLog with settings.
func (c LogConfig) Open(fn func(rec []byte) error) (*Log, error) {
	if c.Purpose == "" {
		c.Purpose = filepath.Base(c.Path)
	}
	if len(c.Purpose) > maxPurpose {
		return nil, fault.New(fault.Internal, "the purpose of a log has at most %d bytes", maxPurpose)
	}
	if c.SyncInterval <= 0 {
		c.SyncInterval = DefaultSyncInterval
	}
	if c.FS == nil {
		c.FS = Disk
	}
	f, err := c.openLocked()
	if err != nil {
		return nil, err
	}
	l := &Log{cfg: c, f: f}
	l.idle = sync.NewCond(&l.mu)
	if err := l.recover(fn); err != nil {
		_ = f.Close()
		return nil, err
	}
	return l, nil
}

// openLocked returns the file, made if need be, with its lock held.
func (c LogConfig) openLocked() (File, error) {
	for range 8 { // another process may be replacing the file
		f, err := c.FS.OpenFile(c.Path, os.O_RDWR, 0)
		if errors.Is(err, fs.ErrNotExist) {
			err = CreateOn(c.FS, c.Path, c.fresh(), 0o600)
			if err == nil || errors.Is(err, fs.ErrExist) {
				continue
			}
		}
		if err != nil {
			return nil, c.failed(err, "opened")
		}
		if err := f.Lock(); err != nil {
			_ = f.Close()
			if errors.Is(err, ErrLocked) {
				return nil, fault.Wrap(fault.Unavailable, err, "another process uses the file %s",
					filepath.Base(c.Path))
			}
			return nil, c.failed(err, "locked")
		}
		switch ok, err := f.Current(c.Path); {
		case err != nil:
			_ = f.Close()
			return nil, c.failed(err, "opened")
		case ok:
			return f, nil
		}
		_ = f.Close()
	}
	return nil, fault.New(fault.Unavailable, "the file %s keeps being replaced", filepath.Base(c.Path))
}

// fresh returns the content of a new file.
func (c LogConfig) fresh() []byte {
	var frames []byte
	if len(c.Initial) > 0 {
		frames = appendFrame(nil, headerSize, c.Initial)
	}
	return append(header(c.Purpose, int64(headerSize+len(frames))), frames...)
}

// failed returns an error for the disk's refusal to do something with the file.
func (c LogConfig) failed(cause error, done string) error {
	name := filepath.Base(c.Path)
	if errors.Is(cause, syscall.ENOSPC) || errors.Is(cause, syscall.EDQUOT) {
		return fault.Wrap(fault.Unavailable, cause, "the disk is full: the file %s cannot be %s", name, done)
	}
	return fault.Wrap(fault.Unavailable, cause, "the file %s cannot be %s", name, done)
}

// Append adds records and returns once they are durable. The records of one call are replayed all or none, and
// stand together.
//
// After an error the log is as before, unless Err has one too or ctx ended: then it is not known whether the records
// will be there when the log is opened again.
func (l *Log) Append(ctx context.Context, recs ...[]byte) error {
	if err := ctx.Err(); err != nil {
		return fault.From(err)
	}
	l.mu.Lock()
	if err := l.writeLocked(recs); err != nil {
		l.mu.Unlock()
		return err
	}
	r := l.joinLocked()
	l.mu.Unlock()
	return l.wait(ctx, r)
}

// AppendAsync adds records, as Append does, and returns once they are in the page cache. They are synced within the
// interval.
func (l *Log) AppendAsync(recs ...[]byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.writeLocked(recs); err != nil {
		return err
	}
	if l.timer == nil {
		l.timer = time.AfterFunc(l.cfg.SyncInterval, l.tick)
	}
	return nil
}

// tick syncs what AppendAsync wrote. An error stays in l.err, where the next call finds it.
func (l *Log) tick() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.timer = nil
	if !l.closed && l.err == nil && l.synced < l.end {
		l.joinLocked()
	}
}

// Sync makes everything added so far durable.
func (l *Log) Sync(ctx context.Context) error {
	l.mu.Lock()
	if err := l.usableLocked(); err != nil {
		l.mu.Unlock()
		return err
	}
	if l.synced == l.end {
		l.mu.Unlock()
		return nil
	}
	r := l.joinLocked()
	l.mu.Unlock()
	return l.wait(ctx, r)
}

// Err returns why the log refuses to work, or nil.
func (l *Log) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// Size returns the length of the file.
func (l *Log) Size() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.end
}

func (l *Log) usableLocked() error {
	if l.closed {
		return fault.New(fault.Stopping, "the file %s is closed", filepath.Base(l.cfg.Path))
	}
	return l.err
}

// writeLocked writes the records behind the last one, as one frame, or leaves the file as it was.
func (l *Log) writeLocked(recs [][]byte) error {
	if err := l.usableLocked(); err != nil {
		return err
	}
	size := 0
	for _, r := range recs {
		if len(r) == 0 {
			return fault.New(fault.Internal, "a record of a log is not empty")
		}
		size += 4 + len(r)
	}
	if size == 0 || size > MaxRecord {
		return fault.New(fault.TooLarge, "a log takes 1 to %d bytes at once", MaxRecord)
	}
	l.frame = appendFrame(l.frame[:0], l.end, recs)
	n := int64(len(l.frame))
	_, err := l.f.WriteAt(l.frame, l.end)
	if cap(l.frame) > 1<<16 {
		l.frame = nil
	}
	if err != nil {
		err = l.cfg.failed(err, "written")
		terr := l.f.Truncate(l.end)
		if terr == nil {
			// What was written of the frame must not come back with the power. That this is done under the lock is the
			// price of a disk that fails.
			terr = l.f.Sync()
		}
		if terr != nil {
			l.err = fault.Wrap(fault.Unavailable, errors.Join(err, terr),
				"the file %s could not be repaired after a failed write", filepath.Base(l.cfg.Path))
		}
		return err
	}
	l.end += n
	return nil
}

// joinLocked returns the round whose sync covers everything written so far, and sees to it that one runs.
func (l *Log) joinLocked() *round {
	if l.next == nil {
		l.next = &round{done: make(chan struct{})}
	}
	if !l.running {
		l.running = true
		go l.run()
	}
	return l.next
}

// run syncs, round after round, until nobody waits.
func (l *Log) run() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.next != nil {
		r, f, target := l.next, l.f, l.end
		l.next = nil
		if r.err = l.err; r.err == nil {
			l.mu.Unlock()
			err := f.Sync()
			l.mu.Lock()
			r.err = l.syncedLocked(target, err)
		}
		close(r.done)
	}
	l.running = false
	l.idle.Broadcast()
}

// syncedLocked notes the outcome of a sync that covered target bytes.
func (l *Log) syncedLocked(target int64, err error) error {
	if err != nil {
		l.err = l.cfg.failed(err, "synced")
		return l.err
	}
	l.synced = target
	// The mark goes to the page cache: the next sync takes it along. Until then it claims less than there is,
	// which is safe; see recover.
	l.slot ^= 1
	if _, err := l.f.WriteAt(mark(target), markOffsets[l.slot]); err != nil {
		l.err = l.cfg.failed(err, "written")
	}
	return nil
}

func (l *Log) wait(ctx context.Context, r *round) error {
	select {
	case <-r.done:
		return r.err
	case <-ctx.Done():
		return fault.From(ctx.Err())
	}
}

// Rewrite replaces the records by those that each yields, in one step: after a crash the log holds the old records
// or the new. Appenders wait; the caller sees to it that what it yields covers every record already added. An
// error before the switch leaves the log as it was.
func (l *Log) Rewrite(each func(yield func(rec []byte) bool)) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.running {
		l.idle.Wait()
	}
	if err := l.usableLocked(); err != nil {
		return err
	}
	tmp := tempName(l.cfg.Path)
	f, err := l.cfg.FS.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return l.cfg.failed(err, "rewritten")
	}
	end, err := l.fill(f, each)
	if err == nil {
		err = l.cfg.FS.Rename(tmp, l.cfg.Path)
	}
	if err != nil {
		_ = f.Close()
		_ = l.cfg.FS.Remove(tmp)
		return l.cfg.failed(err, "rewritten")
	}
	// From here on the new file is the log, whatever else fails.
	_ = l.f.Close()
	l.f, l.end, l.synced = f, end, end
	if err := l.cfg.FS.SyncDir(filepath.Dir(l.cfg.Path)); err != nil {
		l.err = l.cfg.failed(err, "synced")
	}
	return l.err
}

// fill writes a whole log to an empty file, locked and synced.
func (l *Log) fill(f File, each func(yield func(rec []byte) bool)) (int64, error) {
	if err := f.Lock(); err != nil {
		return 0, err
	}
	end := int64(headerSize)
	var buf []byte
	var err error
	flush := func(limit int) {
		if err == nil && len(buf) > limit {
			_, err = f.WriteAt(buf, end-int64(len(buf)))
			buf = buf[:0]
		}
	}
	each(func(rec []byte) bool {
		if len(rec) == 0 || len(rec)+4 > MaxRecord {
			err = fault.New(fault.TooLarge, "a log takes 1 to %d bytes at once", MaxRecord)
		} else {
			before := len(buf)
			buf = appendFrame(buf, end, [][]byte{rec})
			end += int64(len(buf) - before)
			flush(1 << 16)
		}
		return err == nil
	})
	flush(0)
	if err == nil {
		_, err = f.WriteAt(header(l.cfg.Purpose, end), 0)
	}
	if err == nil {
		err = f.Sync()
	}
	return end, err
}

// Close syncs what is unsynced and releases the file. Only the first call does anything.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	if l.timer != nil {
		l.timer.Stop()
	}
	for l.running {
		l.idle.Wait()
	}
	err := l.err
	if err == nil && l.synced < l.end {
		err = l.syncedLocked(l.end, l.f.Sync())
	}
	if err == nil {
		err = l.f.Sync() // the mark
	}
	if cerr := l.f.Close(); err == nil {
		err = cerr
	}
	return err
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// appendFrame adds the frame that holds recs at offset: length and checksum, then each record behind its length.
// The checksum covers the offset, so that a block that the disk put elsewhere is not taken for a frame.
func appendFrame(b []byte, offset int64, recs [][]byte) []byte {
	start := len(b)
	b = append(b, make([]byte, frameHead)...)
	for _, r := range recs {
		b = binary.BigEndian.AppendUint32(b, uint32(len(r)))
		b = append(b, r...)
	}
	payload := b[start+frameHead:]
	binary.BigEndian.PutUint32(b[start:], uint32(len(payload)))
	binary.BigEndian.PutUint32(b[start+4:], frameSum(offset, payload))
	return b
}

func frameSum(offset int64, payload []byte) uint32 {
	var pos [12]byte
	binary.BigEndian.PutUint64(pos[:], uint64(offset))
	binary.BigEndian.PutUint32(pos[8:], uint32(len(payload)))
	return crc32.Update(crc32.Checksum(pos[:], castagnoli), castagnoli, payload)
}
