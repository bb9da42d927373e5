package plugins

import (
	"debug/buildinfo"
	"encoding/hex"
	"errors"
	"os"
	"runtime"

	"github.com/trustd/trustd/fault"
)

// An Inspection is what one learns of a plugin binary without a device.
type Inspection struct {
	Path     string `json:"path"`
	SHA256   string `json:"sha256"`
	Protocol int    `json:"protocol"`          // version of the plugin protocol; 0 where it shook no hands
	Package  string `json:"package,omitempty"` // of the main function; with what follows, what a Go binary says of itself
	Version  string `json:"version,omitempty"`
	Go       string `json:"go,omitempty"`
}

// Inspect starts a plugin as far as the handshake, and ends it. It gives the plugin neither settings nor PIN. What it
// learned before an error is returned with it.
func Inspect(c Config) (Inspection, error) {
	out := Inspection{Path: c.Binary}
	f, err := openBinary(c.Binary)
	if err != nil {
		return out, public(err)
	}
	defer f.Close()
	sum, err := sumOf(f)
	if err != nil {
		return out, public(err)
	}
	out.SHA256 = hex.EncodeToString(sum)
	if info, err := buildinfo.ReadFile(c.Binary); err == nil {
		out.Package, out.Version, out.Go = info.Path, info.Main.Version, info.GoVersion
	}
	runtime.LockOSThread() // of the child's life; see Run
	defer runtime.UnlockOSThread()
	child, err := New(c).open()
	var other *skew
	if errors.As(err, &other) {
		out.Protocol = other.theirs
	}
	if err != nil {
		return out, public(err)
	}
	child.stop(true)
	out.Protocol = Protocol
	return out, nil
}

// public makes an error of the start fit for a person.
func public(err error) error {
	_, problem, remedy := diagnose(err)
	code := fault.DeviceDead
	if errors.Is(err, errNoBinary) && errors.Is(err, os.ErrNotExist) {
		code = fault.NotFound
	}
	return &fault.Error{Code: code, Text: problem, Hint: remedy, Err: err}
}
