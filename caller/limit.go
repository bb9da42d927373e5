package caller

import (
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/trustd/trustd/fault"
)

// Config bounds what one user may ask.
type Config struct {
	Rate       float64 // operations a second, in the long run; 0 for no bound
	Burst      int     // operations at once; 0 is one second's worth, and one at least
	Concurrent int     // requests at once; 0 for no bound
	MaxCallers int     // users that are kept in mind; 0 is 4096
	// Now tells the time; nil is time.Now.
	Now func() time.Time
}

// A Limiter bounds what each user asks, so that none can keep the others from being served. Users are told apart,
// not processes, of which a user can make as many as it likes. It is safe for concurrent use.
type Limiter struct {
	config Config

	mu    sync.Mutex
	users map[uint32]*share
}

// A share is what one user has used.
type share struct {
	bucket  *rate.Limiter // nil for no bound
	running int
}

const (
	defaultMaxCallers = 4096
	// busyRetry is when a retry makes sense after a bound on requests at once, of which nobody knows when they end.
	busyRetry = 10 * time.Millisecond
)

// NewLimiter returns a limiter.
func NewLimiter(c Config) *Limiter {
	if c.Burst <= 0 {
		c.Burst = max(1, int(c.Rate))
	}
	if c.MaxCallers <= 0 {
		c.MaxCallers = defaultMaxCallers
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return &Limiter{config: c, users: make(map[uint32]*share)}
}

// Acquire admits a request of n operations, or returns resource_exhausted with the time to wait. release must be
// called when the request is done; more than once does no harm. A request larger than the burst is admitted when
// the burst is full, and what it takes beyond that is paid for by waiting before the next.
func (l *Limiter) Acquire(c *Caller, n int) (release func(), err error) {
	if l == nil {
		return func() {}, nil
	}
	if c == nil {
		return nil, fault.New(fault.CallerUnknown, "the request did not come over a socket")
	}
	now := l.config.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	s, err := l.share(c.UID, now)
	if err != nil {
		return nil, err
	}
	if l.config.Concurrent > 0 && s.running >= l.config.Concurrent {
		return nil, exhausted("this user has too many requests under way", busyRetry)
	}
	if wait := s.charge(max(n, 1), now); wait > 0 {
		return nil, exhausted("this user asks too often", wait)
	}
	s.running++
	var once sync.Once
	return func() {
		once.Do(func() {
			l.mu.Lock()
			s.running--
			l.mu.Unlock()
		})
	}, nil
}

func exhausted(text string, wait time.Duration) error {
	return &fault.Error{Code: fault.ResourceExhausted, Text: text, RetryAfter: max(wait, time.Millisecond)}
}

// share returns the user's share. The caller holds l.mu.
func (l *Limiter) share(uid uint32, now time.Time) (*share, error) {
	if s, ok := l.users[uid]; ok {
		return s, nil
	}
	if len(l.users) >= l.config.MaxCallers {
		l.sweep(now)
	}
	if len(l.users) >= l.config.MaxCallers {
		return nil, exhausted("too many users ask at once", time.Second)
	}
	s := &share{}
	if l.config.Rate > 0 {
		s.bucket = rate.NewLimiter(rate.Limit(l.config.Rate), l.config.Burst)
	}
	l.users[uid] = s
	return s, nil
}

// sweep forgets users about whom there is nothing to remember: nothing runs, nothing is owed.
func (l *Limiter) sweep(now time.Time) {
	for uid, s := range l.users {
		if s.running == 0 && (s.bucket == nil || s.bucket.TokensAt(now) >= float64(l.config.Burst)) {
			delete(l.users, uid)
		}
	}
}

// charge takes n operations from the bucket, or returns how long to wait for them.
func (s *share) charge(n int, now time.Time) (wait time.Duration) {
	if s.bucket == nil {
		return 0
	}
	burst := s.bucket.Burst()
	first := s.bucket.ReserveN(now, min(n, burst))
	if wait = first.DelayFrom(now); wait > 0 {
		first.CancelAt(now)
		return wait
	}
	for n -= min(n, burst); n > 0; n -= min(n, burst) {
		s.bucket.ReserveN(now, min(n, burst))
	}
	return 0
}
