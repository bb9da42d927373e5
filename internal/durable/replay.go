package durable

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"path/filepath"

	"github.com/trustd/trustd/fault"
)

// The header of a log fills its first block: magic, format version, purpose and a checksum at 0, and two marks, at
// 1024 and 2048, which are written in turn. A mark says up to where the file was synced. Each lies in a sector of
// its own, so that the loss of power in the middle of writing one leaves the other.
const (
	headerSize    = 4096
	headerMagic   = "trustd\x00L"
	formatVersion = 1
	maxPurpose    = 255
	staticSize    = len(headerMagic) + 2 + 1 + maxPurpose + 4
	markSize      = 8 + 4
)

var markOffsets = [2]int64{1024, 2048}

func mark(synced int64) []byte {
	b := binary.BigEndian.AppendUint64(nil, uint64(synced))
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// header returns the first block of a log that is synced up to the given length.
func header(purpose string, synced int64) []byte {
	b := make([]byte, headerSize)
	n := copy(b, headerMagic)
	binary.BigEndian.PutUint16(b[n:], formatVersion)
	b[n+2] = byte(len(purpose))
	copy(b[n+3:], purpose)
	binary.BigEndian.PutUint32(b[staticSize-4:], crc32.Checksum(b[:staticSize-4], castagnoli))
	for _, at := range markOffsets {
		copy(b[at:], mark(synced))
	}
	return b
}

// readHeader returns how far the file was synced for certain.
func (l *Log) readHeader() (int64, error) {
	name := filepath.Base(l.cfg.Path)
	b := make([]byte, headerSize)
	if _, err := l.f.ReadAt(b, 0); err != nil {
		if errors.Is(err, io.EOF) {
			return 0, fault.New(fault.Corrupt, "the file %s has no header", name)
		}
		return 0, l.cfg.failed(err, "read")
	}
	if !bytes.HasPrefix(b, []byte(headerMagic)) ||
		crc32.Checksum(b[:staticSize-4], castagnoli) != binary.BigEndian.Uint32(b[staticSize-4:]) {
		return 0, fault.New(fault.Corrupt, "the header of the file %s is damaged", name)
	}
	n := len(headerMagic)
	if v := binary.BigEndian.Uint16(b[n:]); v != formatVersion {
		return 0, fault.New(fault.Unsupported, "the file %s has version %d of its format, and this build reads %d",
			name, v, formatVersion)
	}
	if string(b[n+3:n+3+int(b[n+2])]) != l.cfg.Purpose {
		return 0, fault.New(fault.Corrupt, "the file %s is a log of another purpose", name)
	}
	synced := int64(-1)
	for i, at := range markOffsets {
		m := b[at : at+markSize]
		if crc32.Checksum(m[:8], castagnoli) != binary.BigEndian.Uint32(m[8:]) {
			continue
		}
		if v := int64(binary.BigEndian.Uint64(m)); v > synced {
			synced, l.slot = v, i // the next mark goes to the other place
		}
	}
	if synced < headerSize {
		return 0, fault.New(fault.Corrupt, "the header of the file %s is damaged", name)
	}
	return synced, nil
}

// recover replays the file and leaves it ready for the next record.
//
// A frame that does not check out below the mark had been synced: that is damage, and the log does not open. At
// or above the mark it is what a crash left of a write that nobody was told had succeeded, or that was told so
// only by AppendAsync; it is cut off, with what follows. A sync that had returned may miss from the mark, but not
// from the disk: its frames check out and are kept.
func (l *Log) recover(fn func(rec []byte) error) error {
	synced, err := l.readHeader()
	if err != nil {
		return err
	}
	size, err := l.f.Size()
	if err != nil {
		return l.cfg.failed(err, "read")
	}
	r := &frameReader{f: l.f, pos: headerSize, size: size}
	for {
		payload, ok, err := r.next()
		if err != nil {
			return l.cfg.failed(err, "read")
		}
		if !ok {
			break
		}
		if err := split(payload, fn); err != nil {
			return err
		}
	}
	if r.pos < synced {
		return fault.New(fault.Corrupt, "the file %s is damaged at byte %d of %d that were written",
			filepath.Base(l.cfg.Path), r.pos, synced)
	}
	l.end = r.pos
	return l.settle(synced, size)
}

// settle cuts off what recover did not take and makes durable what it did: frames above the mark may be in the page
// cache alone, and the caller is about to act on them. They are written again first. After a failed sync the kernel
// holds them as clean, and another sync would say that all is well without writing them.
func (l *Log) settle(synced, size int64) error {
	if size > l.end {
		if err := l.f.Truncate(l.end); err != nil {
			return l.cfg.failed(err, "repaired")
		}
	}
	buf := make([]byte, min(l.end-synced, 1<<20))
	for at := synced; at < l.end; {
		chunk := buf[:min(int64(len(buf)), l.end-at)]
		if n, err := l.f.ReadAt(chunk, at); n < len(chunk) {
			return l.cfg.failed(err, "read")
		}
		if _, err := l.f.WriteAt(chunk, at); err != nil {
			return l.cfg.failed(err, "repaired")
		}
		at += int64(len(chunk))
	}
	if err := l.f.Sync(); err != nil {
		return l.cfg.failed(err, "synced")
	}
	if err := l.syncedLocked(l.end, nil); err != nil {
		return err
	}
	return l.err
}

// errFrame says that a frame with a good checksum does not hold records, which only a bug can bring about.
var errFrame = fault.New(fault.Corrupt, "a log holds a frame that holds no records")

// split calls fn for each record of a frame.
func split(payload []byte, fn func(rec []byte) error) error {
	for len(payload) > 0 {
		if len(payload) < 4 {
			return errFrame
		}
		n := binary.BigEndian.Uint32(payload)
		if n == 0 || uint64(n) > uint64(len(payload)-4) {
			return errFrame
		}
		if err := fn(payload[4 : 4+n : 4+n]); err != nil {
			return err
		}
		payload = payload[4+n:]
	}
	return nil
}

// A frameReader reads frames through a buffer.
type frameReader struct {
	f         File
	pos, size int64
	buf       []byte // the file's bytes from bufAt on
	bufAt     int64
}

// next returns the payload of the frame at pos and moves behind it, or ok = false where there is no good frame. An
// error is one of the disk.
func (r *frameReader) next() (payload []byte, ok bool, err error) {
	if r.size-r.pos < frameHead {
		return nil, false, nil
	}
	head, err := r.bytes(r.pos, frameHead)
	if err != nil {
		return nil, false, err
	}
	n, sum := int64(binary.BigEndian.Uint32(head)), binary.BigEndian.Uint32(head[4:])
	if n == 0 || n > MaxRecord || n > r.size-r.pos-frameHead {
		return nil, false, nil
	}
	payload, err = r.bytes(r.pos+frameHead, int(n))
	if err != nil || frameSum(r.pos, payload) != sum {
		return nil, false, err
	}
	r.pos += frameHead + n
	return payload, true, nil
}

// bytes returns n bytes at offset, which lie inside the file; they stay as they are until the next call.
func (r *frameReader) bytes(offset int64, n int) ([]byte, error) {
	const window = 1 << 16
	if from := offset - r.bufAt; from >= 0 && from+int64(n) <= int64(len(r.buf)) {
		return r.buf[from : from+int64(n)], nil
	}
	want := min(max(int64(n), window), r.size-offset)
	if int64(cap(r.buf)) < want {
		r.buf = make([]byte, want)
	}
	r.buf, r.bufAt = r.buf[:want], offset
	if m, err := r.f.ReadAt(r.buf, offset); err != nil && (m < n || !errors.Is(err, io.EOF)) {
		return nil, err
	}
	return r.buf[:n], nil
}
