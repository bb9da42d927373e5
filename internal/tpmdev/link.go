package tpmdev

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/trustd/trustd/fault"
)

// An Address names a TPM in the way of tpm2-tools: device:/dev/tpmrm0, or swtpm:path=/run/swtpm.sock for the Unix
// socket of an emulator.
type Address struct {
	Path   string
	Socket bool
}

// ParseAddress reads an address. The path is absolute.
func ParseAddress(s string) (Address, error) {
	var a Address
	if path, ok := strings.CutPrefix(s, "device:"); ok {
		a = Address{Path: path}
	} else if path, ok := strings.CutPrefix(s, "swtpm:path="); ok {
		a = Address{Path: path, Socket: true}
	} else {
		return a, fault.BadField("device", "a TPM is device:/dev/tpmrm0 or swtpm:path=/path/of/socket")
	}
	if !filepath.IsAbs(a.Path) || strings.ContainsAny(a.Path, ",\x00") {
		return Address{}, fault.BadField("device", "the path of a TPM is absolute and holds no comma")
	}
	return a, nil
}

// String returns the address as ParseAddress reads it.
func (a Address) String() string {
	if a.Socket {
		return "swtpm:path=" + a.Path
	}
	return "device:" + a.Path
}

// Managed reports whether the kernel's resource manager stands behind the path.
func (a Address) Managed() bool {
	return !a.Socket && strings.HasPrefix(filepath.Base(a.Path), "tpmrm")
}

// A link carries commands and responses. exchange returns an error that wraps os.ErrDeadlineExceeded when the
// deadline passed.
type link interface {
	exchange(cmd []byte, deadline time.Time) ([]byte, error)
	close()
}

func (a Address) dial(timeout time.Duration) (link, error) {
	if a.Socket {
		c, err := net.DialTimeout("unix", a.Path, timeout)
		if err != nil {
			return nil, fmt.Errorf("connecting to the TPM socket: %w", err)
		}
		return &socketLink{conn: c}, nil
	}
	fd, err := unix.Open(a.Path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("opening the TPM device: %w", &os.PathError{Op: "open", Path: a.Path, Err: err})
	}
	return &deviceLink{fd: fd}, nil
}

// A socketLink is the data channel of an emulator: a byte stream.
type socketLink struct {
	conn net.Conn
	buf  [maxResponse]byte
}

func (l *socketLink) exchange(cmd []byte, deadline time.Time) ([]byte, error) {
	if err := l.conn.SetDeadline(deadline); err != nil {
		return nil, err
	}
	if _, err := l.conn.Write(cmd); err != nil {
		return nil, fmt.Errorf("sending a TPM command: %w", err)
	}
	n, err := io.ReadAtLeast(l.conn, l.buf[:], headerSize)
	if err != nil {
		return nil, fmt.Errorf("reading a TPM response: %w", err)
	}
	size, err := responseSize(l.buf[:n])
	if err != nil || size < n {
		return nil, errMalformed
	}
	if _, err := io.ReadFull(l.conn, l.buf[n:size]); err != nil {
		return nil, fmt.Errorf("reading a TPM response: %w", err)
	}
	return append([]byte(nil), l.buf[:size]...), nil
}

func (l *socketLink) close() { l.conn.Close() }

// A deviceLink is a character device of the kernel: one write is one command, one read is its response. A read
// before the response is there returns nothing instead of waiting, so it polls first.
type deviceLink struct {
	fd  int
	buf [maxResponse]byte
}

func (l *deviceLink) exchange(cmd []byte, deadline time.Time) ([]byte, error) {
	n, err := retryIntr(func() (int, error) { return unix.Write(l.fd, cmd) })
	if err != nil {
		return nil, fmt.Errorf("sending a TPM command: %w", err)
	}
	if n != len(cmd) {
		return nil, errors.New("the device took only a part of a command")
	}
	if err := l.await(deadline); err != nil {
		return nil, err
	}
	n, err = retryIntr(func() (int, error) { return unix.Read(l.fd, l.buf[:]) })
	if err != nil {
		return nil, fmt.Errorf("reading a TPM response: %w", err)
	}
	if size, err := responseSize(l.buf[:n]); err != nil || size != n {
		return nil, errMalformed
	}
	return append([]byte(nil), l.buf[:n]...), nil
}

func (l *deviceLink) await(deadline time.Time) error {
	for {
		left := time.Until(deadline)
		if left <= 0 {
			return os.ErrDeadlineExceeded
		}
		fds := []unix.PollFd{{Fd: int32(l.fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, int(left.Milliseconds())+1)
		switch {
		case errors.Is(err, unix.EINTR) || err == nil && n == 0:
			continue
		case err != nil:
			return fmt.Errorf("waiting for the TPM: %w", err)
		case fds[0].Revents&unix.POLLIN != 0:
			return nil
		default:
			return errors.New("the TPM device was removed")
		}
	}
}

// close does not wait: closing a TPM that hangs lasts until the kernel gives up on it.
func (l *deviceLink) close() { go unix.Close(l.fd) }

var errMalformed = errors.New("the response is not one of a TPM")

func responseSize(head []byte) (int, error) {
	if len(head) < headerSize {
		return 0, errMalformed
	}
	size := binary.BigEndian.Uint32(head[2:])
	if size < headerSize || size > maxResponse {
		return 0, errMalformed
	}
	return int(size), nil
}

func retryIntr(f func() (int, error)) (int, error) {
	for {
		n, err := f()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}
