package suite

import (
	"context"
	"fmt"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/trustd/trustd/signer"
)

// A Result is what one check of the suite found.
type Result struct {
	Check  string        `json:"check"`
	Result Outcome       `json:"result"`
	Detail string        `json:"detail,omitempty"` // what failed, a line each, or why the check does not apply
	Took   time.Duration `json:"-"`
}

// An Outcome is how a check ended.
type Outcome string

const (
	Passed  Outcome = "passed"
	Failed  Outcome = "failed"
	Skipped Outcome = "skipped"
)

// Check runs the suite without go test and returns what each of its checks found, in their order. open opens the device,
// and opens it again after the first backend was closed. checked is called after each check. A check that panics
// has failed; when ctx ends, so has what is left.
func Check(ctx context.Context, open func(context.Context) (signer.Backend, error), checked func(Result),
	opts ...Option) []Result {
	r := &report{checked: checked}
	opener := func(t T) signer.Backend {
		b, err := open(ctx)
		if err != nil {
			t.Fatalf("opening the backend: %v", cause(err))
		}
		return b
	}
	r.run(ctx, "Open", func(t *check) { Run(t, opener, append(opts, Reopen(opener))...) })
	return r.results
}

// A report collects the results of the checks on the first level below the whole.
type report struct {
	checked func(Result)
	results []Result
}

// A check is one test below a report. The suite's checks run one after the other; what a check says may come from
// several goroutines.
type check struct {
	in   *report // nil below the first level
	ctx  context.Context
	name string

	mu      sync.Mutex
	said    []string
	failed  bool
	skipped bool
}

var _ T = (*check)(nil)

// maxSaid bounds what one check says: a backend that fails fails often.
const maxSaid = 20

// run runs the whole suite as f.
func (r *report) run(ctx context.Context, name string, f func(*check)) {
	c := &check{in: r, ctx: ctx, name: name}
	c.do(func() { f(c) })
	if c.failed && len(c.said) > 0 { // outside of any check, such as opening the backend
		r.add(c, 0)
	}
}

func (r *report) add(c *check, took time.Duration) {
	out := Result{Check: c.name, Result: Passed, Detail: strings.Join(c.said, "\n"), Took: took}
	switch {
	case c.failed:
		out.Result = Failed
	case c.skipped:
		out.Result = Skipped
	}
	r.results = append(r.results, out)
	if r.checked != nil {
		r.checked(out)
	}
}

// do runs f in a goroutine of its own, which Fatal ends, and waits for it.
func (c *check) do(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			if p := recover(); p != nil {
				c.Errorf("panic: %v\n%s", p, debug.Stack())
			}
		}()
		f()
	}()
	<-done
}

func (c *check) Run(name string, f func(T)) bool {
	ctx, cancel := context.WithCancel(c.ctx)
	defer cancel()
	below := &check{ctx: ctx, name: name}
	began := time.Now()
	below.do(func() { f(below) })
	below.mu.Lock()
	defer below.mu.Unlock()
	if c.in != nil {
		c.in.add(below, time.Since(began))
		if below.failed {
			c.fail()
		}
		return !below.failed
	}
	if below.failed {
		c.fail()
		for _, s := range below.said {
			c.say(name + ": " + s)
		}
	}
	return !below.failed
}

func (c *check) fail() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.failed = true
}

func (c *check) say(text string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case len(c.said) < maxSaid:
		c.said = append(c.said, text)
	case len(c.said) == maxSaid:
		c.said = append(c.said, "and more")
	}
}

func (c *check) Helper() {}

func (c *check) Context() context.Context { return c.ctx }

func (c *check) Error(args ...any) {
	c.fail()
	c.say(strings.TrimSuffix(fmt.Sprintln(args...), "\n"))
}

func (c *check) Errorf(format string, args ...any) {
	c.fail()
	c.say(fmt.Sprintf(format, args...))
}

func (c *check) Fatal(args ...any) {
	c.Error(args...)
	runtime.Goexit()
}

func (c *check) Fatalf(format string, args ...any) {
	c.Errorf(format, args...)
	runtime.Goexit()
}

func (c *check) Skip(args ...any) {
	c.mu.Lock()
	c.skipped = true
	c.mu.Unlock()
	c.say(strings.TrimSuffix(fmt.Sprintln(args...), "\n"))
	runtime.Goexit()
}
