package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/trustd/trustd/fault"
)

// maxFile bounds a configuration file in bytes.
const maxFile = 1 << 20

// The environment variables that stand above the file. TRUSTD_CONFIG, which names the file, is the caller's to read.
const (
	StateDirVariable = "TRUSTD_STATE_DIR"
	RunDirVariable   = "TRUSTD_RUN_DIR"
)

// Load reads and checks the file at path, over which the environment stands. With the path "" it is Default that the
// environment stands over. A file that others may write is refused: it says which code the daemon loads.
func Load(path string) (*Config, error) {
	c := Default()
	if path != "" {
		data, err := readFile(path)
		if err != nil {
			return nil, err
		}
		if c, err = decode(data, path); err != nil {
			return nil, err
		}
	}
	c.Overlay(os.Getenv)
	if err := c.Validate(); err != nil {
		return nil, err
	}
	return c, nil
}

// Parse reads and checks the content of a configuration file; name is what errors call it. It reads no environment.
func Parse(data []byte, name string) (*Config, error) {
	c, err := decode(data, name)
	if err != nil {
		return nil, err
	}
	if err := c.Validate(); err != nil {
		return nil, err
	}
	return c, nil
}

// Overlay puts the environment above the file.
func (c *Config) Overlay(getenv func(string) string) {
	for name, field := range map[string]*string{StateDirVariable: &c.StateDir, RunDirVariable: &c.RunDir} {
		if v := getenv(name); v != "" {
			*field = v
		}
	}
}

func readFile(path string) ([]byte, error) {
	unusable := func(err error, text string) error {
		code := fault.Usage
		if errors.Is(err, fs.ErrNotExist) {
			code = fault.NotFound
		}
		return &fault.Error{Code: code, Field: "config", Text: text, Err: err,
			Hint: "Check the path and the mode of the configuration file."}
	}
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, unusable(err, "the configuration file cannot be opened")
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return nil, unusable(err, "the configuration is not a regular file")
	}
	if info.Mode().Perm()&0o022 != 0 {
		return nil, unusable(nil, "the configuration file can be written by other users")
	}
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return nil, unusable(nil, "the configuration file belongs to another user")
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, unusable(err, "the configuration file cannot be read")
	}
	return data, nil
}

// decode reads data over the defaults.
func decode(data []byte, name string) (c *Config, err error) {
	if len(data) > maxFile {
		return nil, fault.New(fault.TooLarge, "a configuration file has at most %d bytes", maxFile)
	}
	defer func() {
		// The file comes from an operator, but the parser is not ours: its panic must not be the daemon's.
		if p := recover(); p != nil {
			c, err = nil, &fault.Error{Code: fault.Malformed, Field: "config", Text: name + ": not valid TOML",
				Err: fmt.Errorf("parsing TOML: %v", p)}
		}
	}()
	c = Default()
	dec := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields()
	err = dec.Decode(c)
	var unknown *toml.StrictMissingError
	var single *toml.DecodeError
	switch {
	case err == nil:
		if err := checkCase(data, name); err != nil {
			return nil, err
		}
		return c, nil
	case errors.As(err, &unknown):
		var all problems
		for i := range unknown.Errors {
			all.place(name, &unknown.Errors[i], unknownKey(unknown.Errors[i].Key()))
		}
		return nil, all.err()
	case errors.As(err, &single):
		var all problems
		all.place(name, single, describe(data, single))
		return nil, all.err()
	}
	return nil, &fault.Error{Code: fault.Malformed, Field: "config", Err: err,
		Text: fmt.Sprintf("%s:%s %s", name, lineOf(data), ownText(err))}
}

// UnmarshalText reads a duration.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return fault.BadField("", `a duration is a number and a unit in quotes, such as "30s" or "1m30s"`)
	}
	d.d = v
	return nil
}

// MarshalText writes what UnmarshalText reads.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.d.String()), nil }
