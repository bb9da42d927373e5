package durable

import (
	"errors"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// An FS is the part of a file system that this package needs. Disk is the real one; durabletest has one that
// fails on order and loses power.
type FS interface {
	// OpenFile opens or makes a file; the flags are those of package os.
	OpenFile(name string, flag int, perm fs.FileMode) (File, error)
	// Rename replaces to by from. It is durable once the folder is synced, and atomic before that.
	Rename(from, to string) error
	// Link gives the file a second name, which must not be taken.
	Link(from, to string) error
	// Remove takes a name away.
	Remove(name string) error
	// ReadDir returns the names in a folder, in their order.
	ReadDir(name string) ([]string, error)
	// SyncDir makes the names in a folder durable.
	SyncDir(name string) error
}

// A File is an open file.
type File interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	// Size returns the present length.
	Size() (int64, error)
	// Truncate changes the length.
	Truncate(size int64) error
	// Sync makes content and length durable. After an error nothing is known of what was written since the last
	// Sync: the kernel may have dropped the pages and marked them clean.
	Sync() error
	// Lock takes the file for this process, or returns an error for which errors.Is(err, ErrLocked) holds. Close
	// releases it.
	Lock() error
	// Current reports whether name still leads to this file.
	Current(name string) (bool, error)
}

// ErrLocked says that another process, or another part of this one, holds a file.
var ErrLocked = errors.New("the file is in use")

// Disk is the file system of the host.
var Disk FS = disk{}

type disk struct{}

func (disk) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	f, err := os.OpenFile(name, flag|unix.O_CLOEXEC|unix.O_NOFOLLOW, perm)
	if err != nil {
		return nil, err
	}
	return diskFile{f}, nil
}

func (disk) Rename(from, to string) error { return os.Rename(from, to) }
func (disk) Link(from, to string) error   { return os.Link(from, to) }
func (disk) Remove(name string) error     { return os.Remove(name) }

func (disk) ReadDir(name string) ([]string, error) {
	entries, err := os.ReadDir(name)
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, err
}

func (disk) SyncDir(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	err = d.Sync()
	if cerr := d.Close(); err == nil {
		err = cerr
	}
	return err
}

type diskFile struct{ *os.File }

func (f diskFile) Size() (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

// Sync is fdatasync(2): it writes the length too where it has changed, and spares the time stamps.
func (f diskFile) Sync() error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = raw.Control(func(fd uintptr) {
		for {
			if serr = unix.Fdatasync(int(fd)); !errors.Is(serr, unix.EINTR) {
				return
			}
		}
	})
	return errors.Join(err, serr)
}

func (f diskFile) Lock() error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var lerr error
	err = raw.Control(func(fd uintptr) { lerr = unix.Flock(int(fd), unix.LOCK_EX|unix.LOCK_NB) })
	if errors.Is(lerr, unix.EWOULDBLOCK) {
		return ErrLocked
	}
	return errors.Join(err, lerr)
}

func (f diskFile) Current(name string) (bool, error) {
	mine, err := f.Stat()
	if err != nil {
		return false, err
	}
	there, err := os.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil && os.SameFile(mine, there), err
}
