// Package secret reads PINs and passphrases from where the configuration says that they are. A configuration holds
// no secret, only a Source; a Source may be printed and logged, what it reads may not.
package secret

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/trustd/trustd/fault"
)

// MaxSize bounds a secret in bytes.
const MaxSize = 4096

// A Source says where a secret is. Exactly one of its members is set; the zero value is no source.
type Source struct {
	// File is the absolute path of a file that only its owner may read, owned by the daemon's user or root.
	File string `toml:"file,omitempty" json:"file,omitempty"`
	// FD is the number of a file descriptor, 3 or more, that whoever starts the daemon leaves open for it. It is
	// read once, to its end, and closed.
	FD int `toml:"fd,omitempty" json:"fd,omitempty"`
	// Credential is the name of a systemd credential (LoadCredential=, LoadCredentialEncrypted=).
	Credential string `toml:"credential,omitempty" json:"credential,omitempty"`
	// Env is the name of an environment variable. Its value stays visible to the daemon's user in /proc.
	Env string `toml:"env,omitempty" json:"env,omitempty"`
}

// credentialsDir is the variable in which systemd names the folder of a unit's credentials.
const credentialsDir = "CREDENTIALS_DIRECTORY"

// IsZero reports whether s names no source.
func (s Source) IsZero() bool { return s == Source{} }

// UnmarshalText refuses every text: a secret that is written where a source belongs must not be taken for one.
func (s *Source) UnmarshalText([]byte) error {
	return fault.BadField("", "a secret is not written here: say where it is, as "+forms)
}

const forms = `{file = "/path"}, {fd = 3}, {credential = "name"} or {env = "NAME"}`

// Validate reports what is wrong with s.
func (s Source) Validate() error {
	bad := func(text string) error { return fault.BadField("", "%s", text) }
	set := 0
	for _, is := range []bool{s.File != "", s.FD != 0, s.Credential != "", s.Env != ""} {
		if is {
			set++
		}
	}
	switch {
	case set != 1:
		return bad("a secret comes from exactly one source: " + forms)
	case s.File != "" && !filepath.IsAbs(s.File):
		return bad("the file of a secret is an absolute path")
	case s.FD < 0 || s.FD > 0 && s.FD < 3:
		return bad("the file descriptor of a secret is 3 or more")
	case s.Credential != "" && !credentialName(s.Credential):
		return bad("the name of a credential is a file name")
	case s.Env != "" && !envName(s.Env):
		return bad("env is the name of an environment variable, not its value: upper-case letters, digits and '_'")
	}
	return nil
}

func credentialName(s string) bool {
	return s != "." && s != ".." && len(s) <= 255 && !strings.ContainsAny(s, "/\x00")
}

// envName is narrower than what the kernel takes, so that most secrets do not pass for a name.
func envName(s string) bool {
	for i := 0; i < len(s); i++ {
		c := s[i]
		if !(c >= 'A' && c <= 'Z' || c == '_' || i > 0 && c >= '0' && c <= '9') {
			return false
		}
	}
	return len(s) <= 255
}

// String names the source. It holds nothing secret.
func (s Source) String() string {
	switch {
	case s.File != "":
		return "file:" + s.File
	case s.FD != 0:
		return "fd:" + strconv.Itoa(s.FD)
	case s.Credential != "":
		return "credential:" + s.Credential
	case s.Env != "":
		return "env:" + s.Env
	}
	return "none"
}

// LogValue implements slog.LogValuer.
func (s Source) LogValue() slog.Value { return slog.StringValue(s.String()) }

// Read returns the secret without its trailing newline. The caller owns the bytes and clears them after use with
// Zero. A file that others may read is insecure_secret; a secret that is not there is unavailable.
func (s Source) Read(ctx context.Context) ([]byte, error) {
	if err := s.Validate(); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, fault.From(err)
	}
	var data []byte
	var err error
	switch {
	case s.File != "":
		data, err = readFile(s.File, 0o077)
	case s.FD != 0:
		data, err = inherited.read(ctx, s.FD)
	case s.Credential != "":
		data, err = readCredential(s.Credential)
	default:
		value, ok := os.LookupEnv(s.Env)
		if !ok {
			err = missing(nil, "the environment variable of a secret is not set")
		}
		data = []byte(value)
	}
	if err != nil {
		Zero(data)
		return nil, err
	}
	return trim(data)
}

// trim takes one line end off, because editors and echo leave one.
func trim(data []byte) ([]byte, error) {
	out := bytes.TrimSuffix(bytes.TrimSuffix(data, []byte("\n")), []byte("\r"))
	switch {
	case len(out) == 0:
		return nil, missing(nil, "the secret is empty")
	case len(data) > MaxSize:
		Zero(data)
		return nil, fault.New(fault.TooLarge, "a secret has at most %d bytes", MaxSize)
	}
	return out, nil
}

// readFile reads a file on which none of the mode bits in forbidden is set. A symbolic link is followed: what it
// leads to is what is checked.
func readFile(path string, forbidden fs.FileMode) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, missing(err, "the file of a secret cannot be opened")
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, missing(err, "the file of a secret cannot be read")
	}
	if !info.Mode().IsRegular() {
		return nil, missing(nil, "the file of a secret is not a regular file")
	}
	if info.Mode().Perm()&forbidden != 0 {
		return nil, fault.New(fault.InsecureSecret, "the file of a secret is open to other users")
	}
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return nil, fault.New(fault.InsecureSecret, "the file of a secret belongs to another user")
	}
	data, err := io.ReadAll(io.LimitReader(f, MaxSize+1))
	if err != nil {
		Zero(data)
		return nil, missing(err, "the file of a secret cannot be read")
	}
	return data, nil
}

// readCredential reads a systemd credential. systemd may give the service's user access by an ACL, whose mask shows
// as the group's bits, so those do not count here; systemd.exec(5) says who can reach the folder.
func readCredential(name string) ([]byte, error) {
	dir := os.Getenv(credentialsDir)
	if !filepath.IsAbs(dir) {
		return nil, missing(nil, "the daemon was started without systemd credentials")
	}
	return readFile(filepath.Join(dir, name), 0o007)
}

// inherited reads secrets from inherited file descriptors. A pipe can be read once, and a secret may be asked for
// again when a backend starts anew, so what was read stays in memory.
var inherited = descriptors{seen: map[int][]byte{}}

type descriptors struct {
	mu   sync.Mutex // guards seen; held while a descriptor is read
	seen map[int][]byte
}

func (d *descriptors) read(ctx context.Context, fd int) ([]byte, error) {
	type result struct {
		data []byte
		err  error
	}
	done := make(chan result, 1)
	go func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		data, ok := d.seen[fd]
		if ok {
			done <- result{bytes.Clone(data), nil}
			return
		}
		data, err := readDescriptor(fd)
		if err == nil {
			d.seen[fd] = data
		}
		done <- result{bytes.Clone(data), err}
	}()
	select {
	case <-ctx.Done():
		return nil, fault.From(ctx.Err())
	case r := <-done:
		return r.data, r.err
	}
}

// readDescriptor reads and closes a descriptor that the daemon inherited. One that the daemon opened itself is
// close-on-exec; to read it, or close it, would break something else.
func readDescriptor(fd int) ([]byte, error) {
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
	if err != nil || flags&unix.FD_CLOEXEC != 0 {
		return nil, missing(err, "the file descriptor of a secret was not passed to the daemon")
	}
	f := os.NewFile(uintptr(fd), "secret")
	if f == nil {
		return nil, missing(nil, "the file descriptor of a secret is not open")
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, MaxSize+1))
	if err != nil {
		Zero(data)
		return nil, missing(err, "the file descriptor of a secret cannot be read")
	}
	return data, nil
}

func missing(err error, text string) error {
	hint := "Check where the configuration says that the secret is."
	if errors.Is(err, fs.ErrPermission) {
		hint = "Let the daemon's user own the file."
	}
	return &fault.Error{Code: fault.Unavailable, Text: text, Hint: hint, Err: err}
}

// Zero overwrites a secret after use. Copies that the runtime or a library made remain.
func Zero(b []byte) { clear(b) }
