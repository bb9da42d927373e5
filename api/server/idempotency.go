package server

import (
	"container/list"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"net/http"
	"sync"
	"time"

	"github.com/trustd/trustd/api/wire"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/clock"
)

// The bounds of the store of replies.
const (
	maxReplies  = 1024
	keepReplies = 10 * time.Minute
	maxKey      = 64
)

// replies keeps the replies to requests that carried an Idempotency-Key, so that a request sent again has no second
// effect. A key belongs to one user and one route. Failures that a retry may mend are not kept.
//
// Replies live in memory: after a restart of the daemon a key is new. What guards against a second effect then is
// the registry itself, which is durable: an agent's name is taken once and for all, so that a second registration or
// import is already_exists and makes no key, and a second removal or revocation finds it done.
type replies struct {
	clock  clock.Clock
	secret [sha256.Size]byte // bodies may hold passphrases: their digests must be worth nothing outside

	mu    sync.Mutex
	byKey map[replyKey]*list.Element // of *kept
	order *list.List                 // oldest first
}

type replyKey struct {
	uid         uint32
	method, url string
	key         string
}

// A kept is a reply, or the promise of one until done is closed.
type kept struct {
	key    replyKey
	digest [sha256.Size]byte
	at     time.Duration // boot clock
	done   chan struct{}
	status int // 0: the request came to nothing that counts
	kind   []string
	body   []byte
}

func newReplies(c clock.Clock) *replies {
	r := &replies{clock: c, byKey: map[replyKey]*list.Element{}, order: list.New()}
	rand.Read(r.secret[:]) // never fails
	return r
}

func (r *replies) digest(body []byte) (d [sha256.Size]byte) {
	mac := hmac.New(sha256.New, r.secret[:])
	mac.Write(body)
	mac.Sum(d[:0])
	return d
}

// claim returns the reply kept under a key, or a new promise that the caller must settle (mine). It waits while
// another request with the key is at work.
func (r *replies) claim(ctx context.Context, key replyKey, body []byte) (k *kept, mine bool, err error) {
	digest := r.digest(body)
	for {
		k, mine, err := r.lookup(key, digest)
		if err != nil || mine {
			return k, mine, err
		}
		select {
		case <-k.done:
		case <-ctx.Done():
			return nil, false, ctx.Err()
		}
		if k.status != 0 {
			return k, false, nil
		}
	}
}

func (r *replies) lookup(key replyKey, digest [sha256.Size]byte) (*kept, bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.expireLocked()
	if e, ok := r.byKey[key]; ok {
		k := e.Value.(*kept)
		if k.digest != digest {
			return nil, false, &fault.Error{Code: fault.Conflict, Field: "Idempotency-Key"}
		}
		return k, false, nil
	}
	if len(r.byKey) >= maxReplies && !r.evictLocked() {
		return nil, false, fault.New(fault.ResourceExhausted, "too many requests with an Idempotency-Key are at work")
	}
	k := &kept{key: key, digest: digest, at: r.clock.Boot(), done: make(chan struct{})}
	r.byKey[key] = r.order.PushBack(k)
	return k, true, nil
}

// settle ends a promise: with a reply, or with status 0 so that the next request with the key tries anew.
func (r *replies) settle(k *kept, status int, kind []string, body []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	k.status, k.kind, k.body = status, kind, body
	if status == 0 {
		r.dropLocked(r.byKey[k.key])
	}
	close(k.done)
}

func (r *replies) expireLocked() {
	limit := r.clock.Boot() - keepReplies
	for e := r.order.Front(); e != nil; {
		next := e.Next()
		k := e.Value.(*kept)
		if k.at > limit {
			return
		}
		if settled(k) {
			r.dropLocked(e)
		}
		e = next
	}
}

// evictLocked drops the oldest reply; promises stay.
func (r *replies) evictLocked() bool {
	for e := r.order.Front(); e != nil; e = e.Next() {
		if settled(e.Value.(*kept)) {
			r.dropLocked(e)
			return true
		}
	}
	return false
}

func (r *replies) dropLocked(e *list.Element) {
	delete(r.byKey, e.Value.(*kept).key)
	r.order.Remove(e)
}

func settled(k *kept) bool {
	select {
	case <-k.done:
		return true
	default:
		return false
	}
}

// perform does the route's work and replies, once for each Idempotency-Key.
func (x *exchange) perform() error {
	if key := x.r.Header["Idempotency-Key"]; x.route.mutates && len(key) > 0 {
		if err := checkKey(key); err != nil {
			return err
		}
		return x.performOnce(key[0])
	}
	v, err := x.route.work(x)
	if err != nil {
		return err
	}
	return x.reply(v)
}

func (x *exchange) performOnce(key string) error {
	body, err := x.body()
	if err != nil {
		return err
	}
	rs := x.handler.replies
	k, mine, err := rs.claim(x.ctx, replyKey{x.caller.UID, x.r.Method, x.r.URL.RequestURI(), key}, body)
	if err != nil {
		return err
	}
	if !mine {
		x.w.Header().Set("Idempotency-Replayed", "true")
		x.write(k.status, k.kind, k.body)
		return nil
	}
	settled := false
	defer func() {
		if !settled { // a panic
			rs.settle(k, 0, nil, nil)
		}
	}()
	// A caller that loses its connection comes back with the key for the reply, so the work goes on without it.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(x.ctx), x.handler.Timeout)
	defer cancel()
	x.ctx = ctx
	status, kind, reply, err := x.outcome()
	settled = true
	rs.settle(k, status, kind, reply)
	if err != nil {
		return err
	}
	x.write(status, kind, reply)
	return nil
}

// outcome does the work and returns what is to be kept of it: nothing (status 0) for failures that may pass.
func (x *exchange) outcome() (status int, kind []string, reply []byte, err error) {
	v, err := x.route.work(x)
	if err == nil {
		if reply, err = wire.AppendReply(nil, v); err == nil {
			return http.StatusOK, typeJSON, append(reply, '\n'), nil
		}
	}
	p := x.problem(err)
	if p.Retryable || p.Status >= 500 {
		return 0, nil, nil, err
	}
	if reply, kept := wire.AppendJSON(nil, p); kept == nil {
		return p.Status, typeProblem, append(reply, '\n'), err
	}
	return 0, nil, nil, err
}

func checkKey(keys []string) error {
	k := keys[0]
	ok := len(keys) == 1 && k != "" && len(k) <= maxKey
	for i := range len(k) {
		ok = ok && k[i] > 0x20 && k[i] < 0x7f
	}
	if !ok {
		return fault.BadField("Idempotency-Key", "a key has 1 to %d visible ASCII characters", maxKey)
	}
	return nil
}
