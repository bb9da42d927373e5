package tpmdev

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/trustd/trustd/fault"
)

// A Conn is the TPM for the length of one job. It implements go-tpm's transport.TPM.
type Conn struct {
	link   link
	dev    *Device
	ctx    context.Context // of the job that runs
	epoch  uint64
	broken error // why the connection cannot be used any more
}

// Epoch returns a number that is another one whenever handles and sessions of before are gone: after each
// reconnect, reset and loan.
func (c *Conn) Epoch() uint64 { return c.epoch }

// Managed reports whether a resource manager (the kernel's) stands between us and the TPM. It gives each connection
// its own handles, so there is nothing of others to clean up.
func (c *Conn) Managed() bool { return c.dev.addr.Managed() }

const (
	headerSize  = 10
	maxResponse = 4096
	rcInit      = uint32(tpm2.TPMRCInitialize)
)

// Abandon has the connection closed when the job ends, and made anew for the next one: for a user who cannot tell any
// more what is loaded on the TPM, or whether it works. cause is what commands return until then.
func (c *Conn) Abandon(cause error) {
	if c.broken == nil {
		c.broken = cause
	}
}

// Send sends one command and returns the whole response. A TPM that says it is busy gets the same bytes again, for
// as long as the command may take and somebody waits for it: it did not begin the command, so session nonces still
// hold.
func (c *Conn) Send(cmd []byte) ([]byte, error) {
	if len(cmd) < headerSize || int(binary.BigEndian.Uint32(cmd[2:])) != len(cmd) {
		return nil, fault.New(fault.Internal, "not a TPM command")
	}
	deadline := time.Now().Add(c.dev.timeout(cmd))
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		rsp, err := c.exchange(cmd, deadline)
		if err != nil {
			return nil, err
		}
		rc := binary.BigEndian.Uint32(rsp[6:])
		if rc == rcInit && commandCode(cmd) != tpm2.TPMCCStartup {
			return rsp, c.restarted()
		}
		if !busy(tpm2.TPMRC(rc)) {
			return rsp, nil
		}
		c.dev.report(tpm2.TPMRC(rc))
		if time.Now().Add(pause).After(deadline) || !wait(c.ctx, pause) {
			return rsp, nil
		}
	}
}

// wait pauses at the device's own pace, for nobody else could use it meanwhile, and reports whether ctx still holds.
func wait(ctx context.Context, pause time.Duration) bool {
	t := time.NewTimer(pause)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// exchange sends one command once. Any failure breaks the connection for good: a late answer would be taken for
// the answer to the next command.
func (c *Conn) exchange(cmd []byte, deadline time.Time) ([]byte, error) {
	if c.broken != nil {
		return nil, c.broken
	}
	rsp, err := c.link.exchange(cmd, deadline)
	switch {
	case err == nil:
		return rsp, nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		c.broken = errors.Join(ErrHung, err)
	default:
		c.broken = errors.Join(ErrLost, err)
	}
	c.dev.report(c.broken)
	return nil, c.broken
}

// lost returns the error for callers of a broken connection.
func (c *Conn) lost() error {
	text := "the connection to the TPM is lost"
	if errors.Is(c.broken, ErrHung) {
		text = "the TPM does not answer; it hangs, or another program holds its socket"
	}
	return fault.Wrap(fault.DeviceLost, c.broken, "%s", text)
}

// restarted handles a TPM that was reset under an open connection and waits for TPM2_Startup. The command that
// found out was not begun; its response says so, and the new epoch tells the user to begin afresh.
func (c *Conn) restarted() error {
	c.dev.report(tpm2.TPMRCInitialize)
	_, err := (tpm2.Startup{StartupType: tpm2.TPMSUClear}).Execute(c)
	if err != nil && !errors.Is(err, tpm2.TPMRCInitialize) { // which says here that somebody else was faster
		return c.readable(err)
	}
	c.dev.log.Warn("TPM was reset", "device", c.dev.addr.String())
	c.dev.epoch++
	c.epoch = c.dev.epoch
	return nil
}

// prepare brings a fresh connection to a known state: the TPM started, and free of what an earlier connection left
// loaded. Handles survive reconnects on a TPM without a resource manager; where there is none, we are it.
func (c *Conn) prepare() error {
	clock, err := tpm2.ReadClock{}.Execute(c)
	if errors.Is(err, tpm2.TPMRCInitialize) { // Send has started it
		clock, err = tpm2.ReadClock{}.Execute(c)
	}
	if err != nil {
		return c.readable(err)
	}
	if n := clock.CurrentTime.ClockInfo.ResetCount; c.dev.epoch > 0 && n != c.dev.resets {
		c.dev.log.Warn("TPM was reset", "device", c.dev.addr.String(), "resets", n)
	}
	c.dev.resets = clock.CurrentTime.ClockInfo.ResetCount
	if c.Managed() {
		return nil
	}
	_, err = c.FlushAll()
	return err
}

// FlushAll flushes every transient object of this connection. On a TPM without a resource manager it flushes the loaded
// sessions as well, and what is everybody's, of whom there can be none but us. The kernel's resource manager shows
// only our objects, but everybody's sessions, so there sessions stay. It returns how many handles it found.
func (c *Conn) FlushAll() (int, error) {
	found := 0
	kinds := []tpm2.TPMHandle{transientFirst, sessionFirst}
	if c.Managed() {
		kinds = kinds[:1]
	}
	for _, first := range kinds {
		handles, err := c.handles(first)
		if err != nil {
			return found, err
		}
		found += len(handles)
		for _, h := range handles {
			_, err := (tpm2.FlushContext{FlushHandle: h}).Execute(c)
			if c.broken != nil {
				return found, err
			}
			if err != nil {
				c.dev.log.Warn("flushing a TPM handle failed", "cause", err)
			}
		}
	}
	return found, nil
}

const (
	transientFirst = tpm2.TPMHandle(0x80000000)
	sessionFirst   = tpm2.TPMHandle(0x02000000) // TPM_HT_LOADED_SESSION, whatever the kind of session
	handlesAsked   = 254
)

func (c *Conn) handles(first tpm2.TPMHandle) ([]tpm2.TPMHandle, error) {
	rsp, err := tpm2.GetCapability{
		Capability: tpm2.TPMCapHandles, Property: uint32(first), PropertyCount: handlesAsked,
	}.Execute(c)
	if err != nil {
		return nil, c.readable(err)
	}
	list, err := rsp.CapabilityData.Data.Handles()
	if err != nil {
		return nil, c.readable(err)
	}
	return list.Handle, nil
}

// readable gives the connection up when err is no response code: what answers does not speak as a TPM does.
func (c *Conn) readable(err error) error {
	var rc tpm2.TPMRC
	if c.broken == nil && !errors.As(err, &rc) {
		c.broken = errors.Join(ErrLost, err)
		c.dev.report(c.broken)
	}
	return err
}

// busy reports whether the TPM did not begin the command and asks for it again.
func busy(rc tpm2.TPMRC) bool {
	switch rc {
	case tpm2.TPMRCRetry, tpm2.TPMRCYielded, tpm2.TPMRCTesting, tpm2.TPMRCNVRate, tpm2.TPMRCNVUnavailable:
		return true
	}
	return false
}

func commandCode(cmd []byte) tpm2.TPMCC { return tpm2.TPMCC(binary.BigEndian.Uint32(cmd[6:])) }

func (d *Device) timeout(cmd []byte) time.Duration {
	switch commandCode(cmd) {
	case tpm2.TPMCCCreate, tpm2.TPMCCCreatePrimary, tpm2.TPMCCCreateLoaded:
		return d.conf.KeyTimeout
	}
	return d.conf.CommandTimeout
}

// A stream is the TPM as a borrower sees it: it writes a command, then reads its response.
type stream struct {
	conn *Conn
	rsp  []byte
}

func (s *stream) Write(cmd []byte) (int, error) {
	rsp, err := s.conn.Send(cmd)
	if err != nil {
		return 0, err
	}
	s.rsp = rsp
	return len(cmd), nil
}

func (s *stream) Read(p []byte) (int, error) {
	if len(s.rsp) == 0 {
		return 0, io.EOF
	}
	n := copy(p, s.rsp)
	s.rsp = s.rsp[n:]
	return n, nil
}

// Close gives the TPM back; the Device keeps its connection.
func (s *stream) Close() error { return nil }
