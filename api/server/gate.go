package server

import (
	"time"

	"github.com/trustd/trustd/caller"
	"github.com/trustd/trustd/fault"
)

// admit lets a request in that comes from a process, not from a web page, while its user is within its limits.
// Who calls is looked at again once the body has been read: see recheck.
func (x *exchange) admit() error {
	if x.handler.stopping() && !x.route.free {
		return fault.New(fault.Stopping, "")
	}
	if err := x.refuseBrowsers(); err != nil {
		return err
	}
	if err := x.noBody(); err != nil {
		return err
	}
	x.caller, _ = caller.FromContext(x.ctx)
	if x.caller == nil {
		_, err := caller.Require(x.ctx)
		return err
	}
	if !x.route.free {
		release, err := x.handler.Limiter.Acquire(x.caller, 1)
		if err != nil {
			return err
		}
		x.release = release
	}
	if x.route.limit == 0 {
		return x.recheck()
	}
	return nil
}

// recheck says whether the caller is still who it was, now that all of what it sent has been read.
func (x *exchange) recheck() error {
	_, err := caller.Require(x.r.Context())
	return err
}

// charge counts a batch as what it is, n operations, where admit counted one.
func (x *exchange) charge(n int) error {
	if n <= 1 {
		return nil
	}
	x.release()
	x.release = func() {}
	release, err := x.handler.Limiter.Acquire(x.caller, n-1)
	if err != nil {
		return err
	}
	x.release = release
	return nil
}

// admitLines lets n lines of a stream in. A stream over its limits is slowed down: it waits, and what stands behind
// it waits too, up to the caller's own writes. Only where that does not help in time are the lines refused.
func (x *exchange) admitLines(done <-chan struct{}, n int) (release func(), err error) {
	var waited time.Duration
	for {
		if err := x.recheck(); err != nil {
			return nil, err
		}
		release, err := x.handler.Limiter.Acquire(x.caller, n)
		if err == nil {
			return release, nil
		}
		wait := fault.From(err).RetryAfter
		if wait <= 0 || waited+wait > x.handler.Timeout {
			return nil, err
		}
		waited += wait
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-done:
			timer.Stop()
			return nil, fault.New(fault.Canceled, "")
		}
	}
}

// refuseBrowsers refuses what a page in a browser could make somebody's proxy of the socket send: requests that
// carry an origin, and those for a host that only a name server knows. No client of a Unix socket sends either.
func (x *exchange) refuseBrowsers() error {
	for _, name := range [...]string{"Origin", "Sec-Fetch-Site"} {
		if _, ok := x.r.Header[name]; ok {
			return &fault.Error{
				Code: fault.Denied, Field: name, Text: "web pages may not call this socket", Hint: "Leave the header out.",
			}
		}
	}
	for _, c := range []byte(x.r.Host) {
		if c == '.' || c == ':' {
			return &fault.Error{
				Code: fault.Denied, Field: "Host", Text: "a socket has no host name with a domain or port",
				Hint: "Call http://localhost/ or http://trustd/.",
			}
		}
	}
	return nil
}
