package tpmdev

import (
	"context"
	"time"
)

// A TestLink answers commands in place of a TPM.
type TestLink func(cmd []byte) ([]byte, error)

func (l TestLink) exchange(cmd []byte, _ time.Time) ([]byte, error) { return l(cmd) }
func (l TestLink) close()                                           {}

// Prepare brings a connection over the link to a known state, as after each reconnect.
func Prepare(l TestLink) error {
	conf := Config{CommandTimeout: time.Millisecond, KeyTimeout: time.Millisecond, OnFailure: func(error) {}}
	d := &Device{conf: conf, log: discard}
	c := &Conn{link: l, dev: d, ctx: context.Background()}
	return c.prepare()
}

// ExchangeOn sends a command over a file descriptor as if it were a TPM's device file.
func ExchangeOn(fd int, cmd []byte, deadline time.Time) ([]byte, error) {
	return (&deviceLink{fd: fd}).exchange(cmd, deadline)
}
