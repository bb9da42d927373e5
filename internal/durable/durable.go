// Package durable is the only writer of files. What one of its functions has returned from without an error
// survives the death of the process and the loss of power; what it was interrupted in has not happened.
//
// A new file is written under a temporary name, synced, renamed into place, and its folder synced. Log is a file
// that grows: see there for what an error of Append means.
package durable

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// WriteFile replaces the file at path, or makes it. At every moment path holds the old content or the new one.
func WriteFile(path string, data []byte, perm fs.FileMode) error {
	return WriteFileOn(Disk, path, data, perm)
}

// WriteFileOn is WriteFile on another file system.
func WriteFileOn(fsys FS, path string, data []byte, perm fs.FileMode) error {
	tmp, err := writeTemp(fsys, path, data, perm)
	if err != nil {
		return err
	}
	if err := fsys.Rename(tmp, path); err != nil {
		return errors.Join(fmt.Errorf("putting %s in place: %w", filepath.Base(path), err), fsys.Remove(tmp))
	}
	return syncDir(fsys, filepath.Dir(path))
}

// Create makes a file that must not exist yet: an error for which errors.Is(err, fs.ErrExist) holds says that it
// does. The file appears with its whole content or not at all.
func Create(path string, data []byte, perm fs.FileMode) error {
	return CreateOn(Disk, path, data, perm)
}

// CreateOn is Create on another file system.
func CreateOn(fsys FS, path string, data []byte, perm fs.FileMode) error {
	tmp, err := writeTemp(fsys, path, data, perm)
	if err != nil {
		return err
	}
	// link(2) refuses an existing name, which rename(2) does not. A crash here leaves a second name for the file,
	// which Sweep removes.
	err = fsys.Link(tmp, path)
	if rm := fsys.Remove(tmp); err == nil && rm != nil {
		err = rm
	}
	if err != nil {
		return fmt.Errorf("making %s: %w", filepath.Base(path), err)
	}
	return syncDir(fsys, filepath.Dir(path))
}

// MkdirAll makes a folder and those above it that are missing, all of them private (0700). What exists is left as
// it is.
func MkdirAll(path string) error {
	path = filepath.Clean(path)
	switch info, err := os.Stat(path); {
	case err == nil && info.IsDir():
		return nil
	case err == nil:
		return fmt.Errorf("making the folder %s: %w", path, fs.ErrExist)
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("making the folder %s: %w", path, err)
	}
	parent := filepath.Dir(path)
	if err := MkdirAll(parent); err != nil {
		return err
	}
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("making a folder: %w", err)
	}
	return syncDir(Disk, parent)
}

// Remove deletes a file. A file that is not there is an error for which errors.Is(err, fs.ErrNotExist) holds.
func Remove(path string) error {
	if err := Disk.Remove(path); err != nil {
		return fmt.Errorf("removing a file: %w", err)
	}
	return syncDir(Disk, filepath.Dir(path))
}

const tempMark = ".tmp-"

// Sweep deletes the temporary files that interrupted writes left in a folder. Nobody may be writing there.
func Sweep(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("sweeping a folder: %w", err)
	}
	for _, e := range entries {
		if !e.Type().IsRegular() || !strings.HasPrefix(e.Name(), ".") || !strings.Contains(e.Name(), tempMark) {
			continue
		}
		if err := Remove(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// writeTemp writes a synced temporary file beside path and returns its name. The name starts with a dot and ends
// in random digits, so that no reader of the folder takes it for the file.
func writeTemp(fsys FS, path string, data []byte, perm fs.FileMode) (string, error) {
	name := filepath.Base(path)
	tmp := tempName(path)
	f, err := fsys.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
	if err != nil {
		return "", fmt.Errorf("writing %s: %w", name, err)
	}
	_, err = f.WriteAt(data, 0)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		_ = fsys.Remove(tmp) // the first error is the one to report; Sweep takes what remains
		return "", fmt.Errorf("writing %s: %w", name, err)
	}
	return tmp, nil
}

func tempName(path string) string {
	var r [8]byte
	_, _ = rand.Read(r[:]) // never fails
	return filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+tempMark+hex.EncodeToString(r[:]))
}

func syncDir(fsys FS, dir string) error {
	if err := fsys.SyncDir(dir); err != nil {
		return fmt.Errorf("syncing the folder %s: %w", dir, err)
	}
	return nil
}
