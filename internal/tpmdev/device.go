// Package tpmdev owns one TPM 2.0: one connection, one job at a time that talks on it, one queue in front. Everything
// that uses the TPM goes through Device.Do; a second connection to a TPM without a resource manager would hang, and
// a command half sent would poison it, so nobody else ever holds the connection.
//
// The TPM may go away and come back at any time. The Device reconnects, and tells its users by a new Conn.Epoch
// that every handle and session they knew is gone.
package tpmdev

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/go-tpm/tpm2/transport"

	"github.com/trustd/trustd/fault"
)

// Limits of a Device; Config overrides the first three.
const (
	// DefaultCommandTimeout bounds a command. Chips sign in 20 to 500 ms; a self-test may come first.
	DefaultCommandTimeout = 10 * time.Second
	// DefaultKeyTimeout bounds a command that makes a key: chips search RSA primes for a minute or two.
	DefaultKeyTimeout = 3 * time.Minute
	// DefaultQueue bounds the jobs that wait. At 50 ms a signature it is half a minute of work.
	DefaultQueue = 512
	// minBackoff and maxBackoff bound the pause between two attempts to reach a TPM that is gone. The longer one is
	// well below the second within which service is to be back once the TPM is.
	minBackoff = 25 * time.Millisecond
	maxBackoff = 250 * time.Millisecond
)

var (
	// ErrLost says that the connection broke; what was asked may or may not have been done.
	ErrLost = errors.New("the connection to the TPM is lost")
	// ErrHung says that the TPM did not answer in time. The connection is closed, because the answer may still come.
	ErrHung = errors.New("the TPM did not answer in time")
	// ErrAbsent says that no connection could be made.
	ErrAbsent = errors.New("the TPM cannot be reached")
)

// Config says which TPM to own and within which limits. Zero values choose the defaults.
type Config struct {
	Device         string // see ParseAddress
	CommandTimeout time.Duration
	KeyTimeout     time.Duration
	Queue          int
	Log            *slog.Logger
	// OnFailure is told what goes wrong below the jobs, repaired or not: a busy answer (its TPMRC), a reset
	// (TPM_RC_INITIALIZE), a connection that broke, hung or could not be made. It is called inside a job.
	OnFailure func(error)
}

// A Device is one TPM with its queue. All methods are safe for concurrent use.
type Device struct {
	conf Config
	addr Address
	log  *slog.Logger
	stop chan struct{} // closed when own has ended

	mu       sync.RWMutex // guards closed against sends on queue
	closed   bool
	queue    chan *job
	releases []func(*Conn)
	pending  atomic.Int64 // jobs queued or being served from the queue

	// Held by whoever runs a job; what follows is its alone.
	turn     sync.Mutex
	conn     *Conn
	epoch    uint64
	resets   uint32 // the TPM's reset count when last seen
	backoff  time.Duration
	retryAt  time.Time
	lastFail error
}

var discard = slog.New(slog.DiscardHandler)

type job struct {
	ctx  context.Context
	run  func(*Conn) error
	done chan error
}

// Open returns the Device and starts the goroutine of its queue, which Close ends. It does not touch the TPM: a TPM that is
// missing shows when it is used, and does not stay missing once it is there.
func Open(conf Config) (*Device, error) {
	addr, err := ParseAddress(conf.Device)
	if err != nil {
		return nil, err
	}
	if conf.CommandTimeout <= 0 {
		conf.CommandTimeout = DefaultCommandTimeout
	}
	if conf.KeyTimeout <= 0 {
		conf.KeyTimeout = max(DefaultKeyTimeout, conf.CommandTimeout)
	}
	if conf.Queue <= 0 {
		conf.Queue = DefaultQueue
	}
	if conf.Log == nil {
		conf.Log = discard
	}
	if conf.OnFailure == nil {
		conf.OnFailure = func(error) {}
	}
	d := &Device{conf: conf, addr: addr, log: conf.Log, stop: make(chan struct{}), queue: make(chan *job, conf.Queue)}
	go d.own()
	return d, nil
}

func (d *Device) report(cause error) { d.conf.OnFailure(cause) }

// Address returns the TPM's address.
func (d *Device) Address() Address { return d.addr }

// Do runs f alone on the TPM, after all that was queued before. It returns f's error, resource_exhausted when the
// queue is full, stopping after Close, and device_lost when the TPM cannot be reached.
//
// When ctx ends first, Do returns its error while f may still run: a TPM command cannot be taken back, and hanging
// up for one caller would cost all others their handles. So f writes nothing that the caller reads after an error.
// With a ctx that never ends, and a TPM that nobody waits for, f runs on the caller's goroutine: handing it to another
// one costs as much as a tenth of a signature by a fast TPM.
func (d *Device) Do(ctx context.Context, f func(*Conn) error) error {
	if ctx.Done() == nil && d.pending.Load() == 0 && d.turn.TryLock() {
		defer d.turn.Unlock()
		if d.isClosed() {
			return errClosed()
		}
		return d.serve(ctx, f)
	}
	j := &job{ctx: ctx, run: f, done: make(chan error, 1)}
	if err := d.enqueue(j); err != nil {
		return err
	}
	select {
	case err := <-j.done:
		return err
	case <-ctx.Done():
		return fault.From(ctx.Err())
	}
}

func (d *Device) enqueue(j *job) error {
	if err := j.ctx.Err(); err != nil {
		return fault.From(err)
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.closed {
		return errClosed()
	}
	select {
	case d.queue <- j:
		d.pending.Add(1)
		return nil
	default:
		return fault.New(fault.ResourceExhausted, "the queue of the TPM is full")
	}
}

func errClosed() error { return fault.New(fault.Stopping, "the TPM backend is closed") }

func (d *Device) isClosed() bool {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.closed
}

// Waiting returns how many jobs wait for the TPM.
func (d *Device) Waiting() int { return len(d.queue) }

// OnRelease registers f, which flushes the objects and sessions that a user of the Device holds on the TPM and
// forgets them. It runs before the TPM is lent and before it is closed, with no job beside it.
func (d *Device) OnRelease(f func(*Conn)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.releases = append(d.releases, f)
}

// Lend gives the TPM to f, which wants the raw stream and expects all slots free. What f leaves loaded is flushed
// afterwards. f must not keep the stream.
func (d *Device) Lend(ctx context.Context, f func(io.ReadWriteCloser) error) error {
	return d.Do(ctx, func(c *Conn) error {
		d.release(c)
		err := f(&stream{conn: c})
		if c.broken != nil {
			return errors.Join(err, c.lost())
		}
		if _, ferr := c.FlushAll(); ferr != nil {
			return errors.Join(err, ferr)
		}
		d.epoch++
		c.epoch = d.epoch
		return err
	})
}

// Close finishes what is queued, releases what users hold on the TPM and ends the goroutine of the queue.
func (d *Device) Close() error {
	d.mu.Lock()
	if !d.closed {
		d.closed = true
		close(d.queue)
	}
	d.mu.Unlock()
	<-d.stop
	return nil
}

// own serves the queue until Close.
func (d *Device) own() {
	defer close(d.stop)
	for j := range d.queue {
		j.done <- d.take(j)
		d.pending.Add(-1)
	}
	d.turn.Lock() // for good
	if d.conn != nil {
		d.conn.ctx = context.Background()
		d.release(d.conn)
		d.hangUp()
	}
}

// take serves a job of the queue, unless nobody waits for it any more.
func (d *Device) take(j *job) error {
	d.turn.Lock()
	defer d.turn.Unlock()
	if err := j.ctx.Err(); err != nil {
		return fault.From(err)
	}
	return d.serve(j.ctx, j.run)
}

// serve runs f on a connection that works, as far as is known.
func (d *Device) serve(ctx context.Context, f func(*Conn) error) error {
	if d.conn == nil {
		if err := d.connect(ctx); err != nil {
			return err
		}
	}
	d.conn.ctx = ctx
	err := f(d.conn)
	if d.conn.broken == nil {
		d.backoff = 0 // only now: a TPM that takes connections and fails at work is not back
		return err
	}
	d.log.Warn("TPM connection lost", "device", d.addr.String(), "cause", d.conn.broken)
	lost := d.conn.lost()
	d.failed(d.conn.broken)
	d.hangUp()
	if err == nil || errors.Is(err, ErrLost) || errors.Is(err, ErrHung) {
		return lost
	}
	return err
}

// connect makes a connection and clears the TPM of what an earlier connection left behind. While the last attempt
// is fresh it fails at once: a TPM that hangs would otherwise cost each waiting request a timeout.
func (d *Device) connect(ctx context.Context) error {
	if wait := time.Until(d.retryAt); wait > 0 {
		return absent(d.lastFail, wait)
	}
	l, err := d.addr.dial(d.conf.CommandTimeout)
	if err != nil {
		err = errors.Join(ErrAbsent, err)
		d.report(err)
		d.failed(err)
		return absent(err, d.backoff)
	}
	c := &Conn{link: l, dev: d, ctx: ctx}
	if err := c.prepare(); err != nil {
		l.close()
		d.failed(err)
		if c.broken == nil {
			d.report(err)
			return err // the TPM answered, and refuses to work: the code says why
		}
		return c.lost()
	}
	if d.epoch > 0 {
		d.log.Info("TPM connection restored", "device", d.addr.String())
	}
	d.epoch++
	c.epoch = d.epoch
	d.conn, d.retryAt = c, time.Time{}
	return nil
}

// failed notes a failure and sets the earliest next attempt: at once after the first, then with growing pauses.
func (d *Device) failed(cause error) {
	d.lastFail = cause
	d.retryAt = time.Now().Add(d.backoff)
	d.backoff = min(max(2*d.backoff, minBackoff), maxBackoff)
}

func (d *Device) hangUp() {
	d.conn.link.close()
	d.conn = nil
}

func (d *Device) release(c *Conn) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	for _, f := range d.releases {
		f(c)
	}
}

func absent(cause error, wait time.Duration) error {
	e := fault.Wrap(fault.DeviceLost, errors.Join(ErrAbsent, cause), "the TPM cannot be reached")
	e.RetryAfter = wait
	return e
}

var _ transport.TPM = (*Conn)(nil)
