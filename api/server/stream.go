package server

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/api/wire"
	"github.com/trustd/trustd/fault"
)

// The bounds of a stream. What is read ahead waits for its turn in lines; what is at work is in lots.
const (
	streamBytes  = 1 << 20          // of lines whose results are not written yet
	streamWindow = 256              // lines read ahead
	maxLot       = 64               // lines handed on together
	maxLots      = 4                // lots at work or waiting to be written
	writeGrace   = 60 * time.Second // for a caller that does not read its results
)

func signStream(x *exchange) (any, error) {
	return nil, serveLines(x, x.agent.SignPackets,
		func(p *api.Problem) api.SignPacketResult { return api.SignPacketResult{Error: p} },
		func(r *api.SignPacketResult) *api.Problem { return r.Error })
}

func verifyStream(x *exchange) (any, error) {
	return nil, serveLines(x, x.agent.VerifyPackets,
		func(p *api.Problem) api.VerifyPacketResult { return api.VerifyPacketResult{Error: p} },
		func(r *api.VerifyPacketResult) *api.Problem { return r.Error })
}

// A lines is one stream: a request on each line in, a result on each line out, in order. There are no timers: while
// lots are at work, lines gather, and the next lot takes what has gathered; a lone line is a lot of its own.
//
// Three goroutines, each the only one to send on its channel: read cuts the body into lines, gather makes lots and
// starts their work, and the handler's own writes. The bounds above make a caller that does not read its results
// stop the whole line, up to the daemon's read from the socket.
type lines[Q, R any] struct {
	x      *exchange
	rc     *http.ResponseController
	ctx    context.Context // ends when nobody is left to read results
	cancel context.CancelFunc
	run    func(context.Context, []Q) []R
	refuse func(*api.Problem) R
	error  func(*R) *api.Problem
	read   chan line[Q]
	lots   chan *lot[R]
	held   *semaphore.Weighted // bytes of lines whose results are not written yet
}

// A line is a request, or why it is none.
type line[Q any] struct {
	request Q
	err     error
	size    int64
}

// A lot is the results of some lines that follow each other; they are there once done is closed.
type lot[R any] struct {
	size    int64 // of its lines
	results []R
	done    chan struct{}
}

func serveLines[Q, R any](
	x *exchange, run func(context.Context, []Q) []R, refuse func(*api.Problem) R, problem func(*R) *api.Problem,
) error {
	if err := x.noQuery(); err != nil {
		return err
	}
	if err := x.jsonType(); err != nil {
		return err
	}
	rc := http.NewResponseController(x.w)
	if !x.r.ProtoAtLeast(1, 1) || rc.EnableFullDuplex() != nil {
		return fault.New(fault.Unsupported, "a stream needs HTTP/1.1")
	}
	if err := rc.SetReadDeadline(time.Time{}); err != nil {
		return fault.Wrap(fault.Internal, err, "")
	}
	// The server ends the request's context when it stops reading, also at a drain; the work goes on until its
	// results cannot be delivered.
	ctx, cancel := context.WithCancel(context.WithoutCancel(x.ctx))
	x.release() // each lot is admitted by itself
	s := &lines[Q, R]{
		x: x, rc: rc, ctx: ctx, cancel: cancel, run: run, refuse: refuse, error: problem,
		read: make(chan line[Q], streamWindow), lots: make(chan *lot[R], maxLots), held: semaphore.NewWeighted(streamBytes),
	}
	return s.serve()
}

func (s *lines[Q, R]) serve() error {
	x := s.x
	x.started = true
	header := x.w.Header()
	header["Content-Type"] = typeLines
	header["Connection"] = []string{"close"}
	s.extend()
	x.w.WriteHeader(http.StatusOK)
	if err := s.rc.Flush(); err != nil {
		s.cancel()
		return fault.Wrap(fault.Canceled, err, "")
	}
	var all sync.WaitGroup
	over := make(chan struct{})
	all.Go(s.cut)
	all.Go(s.gather)
	all.Go(func() { s.interrupt(over) })
	err := s.write()
	s.cancel()
	close(over)
	all.Wait() // nothing may touch the request once the handler has returned
	return err
}

// interrupt ends the reading when the daemon stops or the stream is over, whichever comes first.
func (s *lines[Q, R]) interrupt(over <-chan struct{}) {
	select {
	case <-over:
	case <-s.x.handler.Draining:
	case <-s.x.handler.shutdown:
	}
	_ = s.rc.SetReadDeadline(time.Unix(1, 0)) // fails only where the connection is gone
}

// cut reads the body line by line until it ends, the daemon stops, or a line is too long to find its end.
func (s *lines[Q, R]) cut() {
	defer close(s.read)
	in := bufio.NewReaderSize(s.x.r.Body, 32<<10)
	for {
		text, err := readLine(in)
		if len(bytes.TrimSpace(text)) > 0 || fault.CodeOf(err) == fault.TooLarge {
			l := line[Q]{size: int64(len(text))}
			if l.err = err; err == nil || err == io.EOF {
				l.request, l.err = wire.DecodeRequest[Q](text)
			}
			if !s.pass(l) {
				return
			}
		}
		switch {
		case err == nil:
		case err == io.EOF || errors.Is(err, os.ErrDeadlineExceeded) || fault.CodeOf(err) == fault.TooLarge:
			return
		default: // the connection broke
			s.cancel()
			return
		}
	}
}

func (s *lines[Q, R]) pass(l line[Q]) bool {
	if s.held.Acquire(s.ctx, l.size) != nil {
		return false
	}
	select {
	case s.read <- l:
		return true
	case <-s.ctx.Done():
		return false
	}
}

// readLine returns the next line in memory of its own. With an error other than io.EOF the line is not whole.
func readLine(in *bufio.Reader) ([]byte, error) {
	var text []byte
	for {
		part, err := in.ReadSlice('\n')
		if len(text)+len(part) > api.MaxBody+1 {
			return nil, fault.New(fault.TooLarge, "at most %d bytes a line; the stream ends here", api.MaxBody)
		}
		text = append(text, part...)
		switch err {
		case bufio.ErrBufferFull:
		case nil, io.EOF:
			return text, err
		default:
			return nil, err
		}
	}
}

// gather takes the lines that are there, and has the lot worked on while it takes the next.
func (s *lines[Q, R]) gather() {
	defer close(s.lots)
	var work sync.WaitGroup
	defer work.Wait()
	for first := range s.read {
		batch := append(make([]line[Q], 0, maxLot), first)
	more:
		for len(batch) < maxLot {
			select {
			case l, ok := <-s.read:
				if !ok {
					break more
				}
				batch = append(batch, l)
			default:
				break more
			}
		}
		l := &lot[R]{done: make(chan struct{})}
		for i := range batch {
			l.size += batch[i].size
		}
		select {
		case s.lots <- l:
		case <-s.ctx.Done():
			return
		}
		requests, at := s.sort(batch)
		release, err := s.admit(len(requests))
		work.Go(func() {
			defer close(l.done)
			defer release()
			l.results = s.answer(batch, requests, at, err)
		})
	}
}

// sort picks the lines that are requests, and their places in the lot.
func (s *lines[Q, R]) sort(batch []line[Q]) (requests []Q, at []int) {
	requests, at = make([]Q, 0, len(batch)), make([]int, 0, len(batch))
	for i := range batch {
		if batch[i].err == nil {
			requests, at = append(requests, batch[i].request), append(at, i)
		}
	}
	return requests, at
}

func (s *lines[Q, R]) admit(n int) (release func(), err error) {
	if n == 0 {
		return func() {}, nil
	}
	release, err = s.x.admitLines(s.ctx.Done(), n)
	if err != nil {
		return func() {}, err
	}
	return release, nil
}

// answer returns one result for each line of a lot, in order. err is why its requests were not let in.
func (s *lines[Q, R]) answer(batch []line[Q], requests []Q, at []int, err error) []R {
	out := make([]R, len(batch))
	for i := range batch {
		if batch[i].err != nil {
			out[i] = s.refuse(s.x.problem(batch[i].err))
		}
	}
	if len(requests) == 0 {
		return out
	}
	var results []R
	if err == nil {
		results, err = s.work(requests)
	}
	if err != nil {
		s.x.log(err, s.x.problem(err))
	}
	for j, i := range at {
		if err != nil {
			out[i] = s.refuse(s.x.problem(err))
		} else {
			out[i] = results[j]
		}
	}
	return out
}

// work has the requests of a lot done. A panic in it is its own goroutine's to catch.
func (s *lines[Q, R]) work(requests []Q) (results []R, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = panicked(p)
		}
	}()
	ctx, cancel := context.WithTimeout(s.ctx, s.x.handler.Timeout)
	defer cancel()
	results = s.run(ctx, requests)
	if len(results) != len(requests) {
		return nil, fault.Wrap(fault.Internal, errors.New("not one result for each request"), "")
	}
	return results, nil
}

// write sends the lots in order. It hands what it has to the connection whenever it must wait.
func (s *lines[Q, R]) write() error {
	for {
		var l *lot[R]
		ok := true
		select {
		case l, ok = <-s.lots:
		default:
			if err := s.flush(); err != nil {
				return err
			}
			l, ok = <-s.lots
		}
		if !ok {
			return s.flush()
		}
		select {
		case <-l.done:
		default:
			if err := s.flush(); err != nil {
				return err
			}
			<-l.done
		}
		if err := s.send(l.results); err != nil {
			return err
		}
		s.held.Release(l.size)
	}
}

func (s *lines[Q, R]) send(results []R) error {
	b := borrowBuffer()
	defer returnBuffer(b)
	for i := range results {
		var err error
		if *b, err = wire.AppendReply(*b, &results[i]); err != nil {
			return fault.Wrap(fault.Internal, err, "")
		}
		*b = append(*b, '\n')
		var c fault.Code
		if p := s.error(&results[i]); p != nil {
			c = p.Code
		}
		s.x.stats.item(c)
	}
	s.extend()
	if _, err := s.x.w.Write(*b); err != nil {
		return fault.Wrap(fault.Canceled, err, "")
	}
	return nil
}

func (s *lines[Q, R]) flush() error {
	s.extend()
	if err := s.rc.Flush(); err != nil {
		return fault.Wrap(fault.Canceled, err, "")
	}
	return nil
}

// extend gives the next write its time.
func (s *lines[Q, R]) extend() {
	_ = s.rc.SetWriteDeadline(s.x.handler.Clock.Now().Add(writeGrace)) // fails only where the connection is gone
}
