package tpmdev_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/sys/unix"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/tpmdev"
	softhsmtest "github.com/trustd/trustd/softhsm-test"
	"github.com/trustd/trustd/softhsm-test/tpmproxy"
)

func open(t testing.TB, conf tpmdev.Config) *tpmdev.Device {
	t.Helper()
	d, err := tpmdev.Open(conf)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func random(c *tpmdev.Conn) error {
	_, err := tpm2.GetRandom{BytesRequested: 8}.Execute(c)
	return err
}

func transient(c *tpmdev.Conn) (tpm2.TPMHandle, error) {
	rsp, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(c)
	if err != nil {
		return 0, err
	}
	return rsp.ObjectHandle, nil
}

func loaded(c *tpmdev.Conn) (int, error) {
	n := 0
	for _, first := range []uint32{0x80000000, 0x02000000} {
		rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: first, PropertyCount: 64}.Execute(c)
		if err != nil {
			return 0, err
		}
		list, err := rsp.CapabilityData.Data.Handles()
		if err != nil {
			return 0, err
		}
		n += len(list.Handle)
	}
	return n, nil
}

func TestParseAddress(t *testing.T) {
	for s, ok := range map[string]bool{
		"device:/dev/tpmrm0": true, "device:/dev/tpm0": true, "swtpm:path=/run/swtpm/a.sock": true,
		"": false, "/dev/tpmrm0": false, "device:": false, "device:dev/tpmrm0": false, "swtpm:/run/a": false,
		"swtpm:path=": false, "swtpm:path=/a,port=1": false, "swtpm:host=localhost": false, "mssim:": false,
		"device:/a\x00b": false,
	} {
		a, err := tpmdev.ParseAddress(s)
		if (err == nil) != ok {
			t.Errorf("ParseAddress(%q): %v", s, err)
		}
		if err != nil && fault.CodeOf(err) != fault.Malformed {
			t.Errorf("ParseAddress(%q) has the code %s", s, fault.CodeOf(err))
		}
		if err == nil && a.String() != s {
			t.Errorf("ParseAddress(%q) is %q", s, a)
		}
	}
	for s, managed := range map[string]bool{
		"device:/dev/tpmrm0": true, "device:/dev/tpmrm1": true, "device:/dev/tpm0": false, "swtpm:path=/tmp/tpmrm0": false,
	} {
		if a, _ := tpmdev.ParseAddress(s); a.Managed() != managed {
			t.Errorf("%s: Managed() = %v", s, a.Managed())
		}
	}
}

func FuzzParseAddress(f *testing.F) {
	f.Add("device:/dev/tpmrm0")
	f.Add("swtpm:path=/run/a.sock")
	f.Fuzz(func(t *testing.T, s string) {
		a, err := tpmdev.ParseAddress(s)
		if err == nil && a.String() != s {
			t.Errorf("%q is read as %q", s, a)
		}
	})
}

// TestQueue holds the TPM and looks at what happens to those who wait: they are served in their order, one too many
// is refused, and one whose context ended is skipped.
func TestQueue(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	d := open(t, tpmdev.Config{Device: m.Device(), Queue: 3})
	held, release := make(chan struct{}), make(chan struct{})
	first := make(chan error, 1)
	go func() {
		first <- d.Do(t.Context(), func(*tpmdev.Conn) error { close(held); <-release; return nil })
	}()
	<-held
	var order []int // written by the owner, read after all are done
	waiting := make(chan error, 3)
	ctx, cancel := context.WithCancel(t.Context())
	for i, c := range []context.Context{t.Context(), ctx, t.Context()} {
		entered := make(chan struct{})
		go func() {
			close(entered)
			waiting <- d.Do(c, func(*tpmdev.Conn) error { order = append(order, i); return nil })
		}()
		<-entered
		awaitQueued(t, d, i+1)
	}
	if err := d.Do(t.Context(), random); fault.CodeOf(err) != fault.ResourceExhausted {
		t.Errorf("one too many: %v", err)
	}
	cancel()
	if err := <-waiting; fault.CodeOf(err) != fault.Canceled {
		t.Errorf("a cancelled job: %v", err)
	}
	close(release)
	for _, c := range []chan error{first, waiting, waiting} {
		if err := <-c; err != nil {
			t.Error(err)
		}
	}
	if len(order) != 2 || order[0] != 0 || order[1] != 2 {
		t.Errorf("order = %v, want [0 2]", order)
	}
}

func awaitQueued(t *testing.T, d *tpmdev.Device, n int) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for range tick.C {
		if d.Waiting() == n {
			return
		}
		if t.Context().Err() != nil {
			t.Fatal("the test ended")
		}
	}
}

// TestImpatient ends a context while the job runs: the caller is free at once, and the job ends undisturbed.
func TestImpatient(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	d := open(t, tpmdev.Config{Device: m.Device()})
	ctx, cancel := context.WithCancel(t.Context())
	release, ended := make(chan struct{}), make(chan error, 1)
	err := d.Do(ctx, func(c *tpmdev.Conn) error {
		cancel()
		<-release
		ended <- random(c)
		return nil
	})
	if fault.CodeOf(err) != fault.Canceled {
		t.Errorf("Do: %v", err)
	}
	close(release)
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if err := d.Do(ctx, func(*tpmdev.Conn) error { t.Error("ran"); return nil }); fault.CodeOf(err) != fault.Canceled {
		t.Errorf("Do with an ended context: %v", err)
	}
}

// TestAlone mixes callers whose context never ends, who run on their own goroutine where they can, with others: never
// two at once, and none after Close.
func TestAlone(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	d := open(t, tpmdev.Config{Device: m.Device()})
	running, served := 0, 0 // without a lock: the race detector watches
	var callers sync.WaitGroup
	for i := range 6 {
		ctx := t.Context()
		if i%2 == 0 {
			ctx = context.Background()
		}
		callers.Go(func() {
			for range 50 {
				err := d.Do(ctx, func(c *tpmdev.Conn) error {
					if running++; running != 1 {
						t.Error("two at once")
					}
					defer func() { running-- }()
					served++
					return random(c)
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	callers.Wait()
	if served != 300 {
		t.Errorf("%d jobs were served, want 300", served)
	}
	d.Close()
	err := d.Do(context.Background(), func(*tpmdev.Conn) error { t.Error("ran"); return nil })
	if fault.CodeOf(err) != fault.Stopping {
		t.Errorf("Do after Close: %v", err)
	}
}

// TestBusyForNobody gives up asking a busy TPM again when nobody waits for it any more.
func TestBusyForNobody(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	p := tpmproxy.New(t, m.Path())
	busy := 0
	d := open(t, tpmdev.Config{Device: p.Device(), CommandTimeout: time.Hour, OnFailure: func(err error) {
		if errors.Is(err, tpm2.TPMRCRetry) {
			busy++
		}
	}})
	if err := d.Do(t.Context(), random); err != nil {
		t.Fatal(err)
	}
	p.Script(tpmproxy.Rule{Do: tpmproxy.Return(uint32(tpm2.TPMRCRetry))})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- d.Do(ctx, random) }()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for p.Count(tpmproxy.Any) < 3 {
		<-tick.C
	}
	cancel()
	if err := <-ended; fault.CodeOf(err) != fault.Canceled {
		t.Errorf("Do: %v", err)
	}
	p.Script()
	if err := d.Do(t.Context(), random); err != nil { // within the hour
		t.Error(err)
	}
	if err := d.Do(t.Context(), func(*tpmdev.Conn) error {
		if busy < 3 {
			t.Errorf("%d busy answers were told of", busy)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

func TestClose(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	d := open(t, tpmdev.Config{Device: m.Device()})
	released := false
	d.OnRelease(func(*tpmdev.Conn) { released = true })
	if err := d.Do(t.Context(), random); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	if !released {
		t.Error("Close did not have its user release what it holds")
	}
	if err := d.Do(t.Context(), random); fault.CodeOf(err) != fault.Stopping {
		t.Errorf("Do after Close: %v", err)
	}
}

// TestLeftovers leaves objects and a session on the TPM, as a daemon does that was killed: the next connection finds
// all slots free.
func TestLeftovers(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	first := open(t, tpmdev.Config{Device: m.Device()})
	err := first.Do(t.Context(), func(c *tpmdev.Conn) error {
		for range 3 {
			if _, err := transient(c); err != nil {
				return err
			}
		}
		_, _, err := tpm2.HMACSession(c, tpm2.TPMAlgSHA256, 16)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	first.Close()
	var n int
	second := open(t, tpmdev.Config{Device: m.Device()})
	err = second.Do(t.Context(), func(c *tpmdev.Conn) (err error) { n, err = loaded(c); return err })
	if err != nil || n != 0 {
		t.Errorf("%d handles are left over, %v", n, err)
	}
}

// TestLend lends the TPM: the borrower finds it free, what it leaves is swept, and users see another epoch.
func TestLend(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	d := open(t, tpmdev.Config{Device: m.Device()})
	var mine tpm2.TPMHandle
	d.OnRelease(func(c *tpmdev.Conn) { _, _ = tpm2.FlushContext{FlushHandle: mine}.Execute(c) })
	var before, after uint64
	err := d.Do(t.Context(), func(c *tpmdev.Conn) (err error) {
		before = c.Epoch()
		mine, err = transient(c)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	err = d.Lend(t.Context(), func(rw io.ReadWriteCloser) error {
		defer rw.Close()
		for range 3 {
			if _, err := rw.Write([]byte{0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x7b, 0, 4}); err != nil {
				return err
			}
			rsp, err := io.ReadAll(rw)
			if err != nil || len(rsp) != 16 {
				return errors.New("not the response to TPM2_GetRandom(4)")
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	err = d.Do(t.Context(), func(c *tpmdev.Conn) (err error) {
		after = c.Epoch()
		n, err := loaded(c)
		if n != 0 {
			t.Errorf("%d handles are left over", n)
		}
		return err
	})
	if err != nil || before == after {
		t.Errorf("epochs %d and %d, %v", before, after, err)
	}
	broken := errors.New("broken")
	if err := d.Lend(t.Context(), func(io.ReadWriteCloser) error { return broken }); !errors.Is(err, broken) {
		t.Errorf("Lend: %v", err)
	}
}

// TestEpoch counts the ways in which handles are lost.
func TestEpoch(t *testing.T) {
	m := softhsmtest.NewTPM(t)
	d := open(t, tpmdev.Config{Device: m.Device()})
	epoch := func() (e uint64) {
		t.Helper()
		for range 2 { // the first may find the connection broken
			err := d.Do(t.Context(), func(c *tpmdev.Conn) error { err := random(c); e = c.Epoch(); return err })
			if err == nil {
				return e
			}
		}
		t.Fatal("the TPM does not come back")
		return 0
	}
	seen := map[uint64]bool{epoch(): true}
	if !seen[epoch()] {
		t.Error("another epoch without a loss")
	}
	for name, lose := range map[string]func(){"reset": m.Reset, "restart": m.Restart} {
		lose()
		e := epoch()
		if seen[e] {
			t.Errorf("no new epoch after a %s", name)
		}
		seen[e] = true
	}
}

// TestBackoff counts the connections to a TPM that hangs up: a burst of requests does not become a burst of them.
func TestBackoff(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var accepted atomic.Int64
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			accepted.Add(1)
			c.Close()
		}
	}()
	d := open(t, tpmdev.Config{Device: "swtpm:path=" + path})
	hinted := false
	for range 500 {
		err := d.Do(t.Context(), random)
		if fault.CodeOf(err) != fault.DeviceLost {
			t.Fatal(err)
		}
		hinted = hinted || fault.From(err).RetryAfter > 0
	}
	if n := accepted.Load(); n > 100 {
		t.Errorf("%d connections for 500 requests", n)
	}
	if !hinted {
		t.Error("no error says when to try again")
	}
}

// TestBadSocket has something answer that is no TPM.
func TestBadSocket(t *testing.T) {
	for name, answer := range map[string]string{
		"http": "HTTP/1.1 400 Bad Request\r\n\r\n", "nothing": "", "short": "\x80\x01\x00\x00",
		"tiny size": "\x80\x01\x00\x00\x00\x04\x00\x00\x00\x00",
		"huge size": "\x80\x01\xff\xff\xff\xff\x00\x00\x00\x00", "trailing": "\x80\x01\x00\x00\x00\x0a\x00\x00\x00\x00more",
		"cut": "\x80\x01\x00\x00\x00\x20\x00\x00\x00\x00", "no parameters": "\x80\x01\x00\x00\x00\x0a\x00\x00\x00\x00",
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(shortDir(t), "s")
			ln, err := net.Listen("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			go func() {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				_, _ = c.Read(make([]byte, 4096))
				_, _ = io.WriteString(c, answer)
				c.Close()
			}()
			d := open(t, tpmdev.Config{Device: "swtpm:path=" + path})
			if err := d.Do(t.Context(), random); err == nil {
				t.Error("no error")
			}
		})
	}
}

func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "tpd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// TestDeviceFile speaks to a file descriptor with the manners of the kernel's: a packet each way, and a read before
// the response is there would not wait.
func TestDeviceFile(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	cmd := []byte{0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x7b, 0, 4}
	want := []byte{0x80, 1, 0, 0, 0, 12, 0, 0, 0, 0, 1, 2}
	for name, c := range map[string]struct {
		rsp []byte
		ok  bool
	}{
		"whole": {want, true}, "size too large": {want[:11], false}, "size too small": {append(bytes.Clone(want), 0), false},
		"short": {want[:4], false},
	} {
		answered := make(chan error, 1)
		go func() {
			_, err := unix.Poll([]unix.PollFd{{Fd: int32(fds[1]), Events: unix.POLLIN}}, 10000)
			got := make([]byte, 4096)
			if err == nil {
				_, err = unix.Read(fds[1], got)
			}
			if err == nil {
				_, err = unix.Write(fds[1], c.rsp)
			}
			answered <- err
		}()
		rsp, err := tpmdev.ExchangeOn(fds[0], cmd, time.Now().Add(10*time.Second))
		if (err == nil) != c.ok || c.ok && !bytes.Equal(rsp, want) {
			t.Errorf("%s: %x, %v", name, rsp, err)
		}
		if err := <-answered; err != nil {
			t.Fatal(err)
		}
	}
	_, err = tpmdev.ExchangeOn(fds[0], cmd, time.Now().Add(time.Millisecond))
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a device that hangs: %v", err)
	}
	unix.Close(fds[1])
	if _, err := tpmdev.ExchangeOn(fds[0], cmd, time.Now().Add(10*time.Second)); err == nil {
		t.Error("a device that was removed: no error")
	}
	unix.Close(fds[0])
	if _, err := tpmdev.ExchangeOn(fds[0], cmd, time.Now().Add(time.Second)); err == nil {
		t.Error("a closed device: no error")
	}
}

// FuzzResponses answers each command with bytes of the fuzzer, behind a proper header: no answer brings us down.
func FuzzResponses(f *testing.F) {
	f.Add([]byte{}, uint32(0), true)
	f.Add([]byte{0, 0, 0, 0, 1, 0, 0, 0, 2, 0x80, 0, 0, 0, 0x80, 0, 0, 1}, uint32(0), false)
	f.Add(make([]byte, 25), uint32(tpm2.TPMRCInitialize), true)
	f.Add(make([]byte, 25), uint32(0x922), true)
	f.Fuzz(func(t *testing.T, body []byte, rc uint32, first bool) {
		calls := 0
		_ = tpmdev.Prepare(func([]byte) ([]byte, error) {
			if calls++; calls > 1000 {
				return nil, io.EOF
			}
			b := body
			if first && calls == 1 {
				b = make([]byte, 25) // a TPMS_TIME_INFO, so that what follows is reached
			}
			rsp := append([]byte{0x80, 1, 0, 0, 0, 0, 0, 0, 0, 0}, b...)
			binary.BigEndian.PutUint32(rsp[2:], uint32(len(rsp)))
			if calls > 1 || !first {
				binary.BigEndian.PutUint32(rsp[6:], rc)
			}
			return rsp, nil
		})
	})
}
