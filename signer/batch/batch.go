// Package batch shares a slow device among its keys and their callers. While the device is busy, requests queue, and
// the next signature of a key covers all of that key's requests that allow it (trustd-batch/v1, package signature).
// There are no timers: a request that finds the device idle is signed at once and directly, and so is one that finds
// itself alone when its turn comes. While a batch of a key is being signed, what may be batched gathers for the next,
// also where the device could sign two at once: one signature over all costs less than two over half.
package batch

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signature"
	"github.com/trustd/trustd/signer"
)

// A Target is one key on the device, together with its signature history. *history.Signer is one.
type Target interface {
	Public() ident.PublicKey
	// SignEach signs each message itself. Where numbers[i] is 0 it notes the message first and puts its number there.
	SignEach(ctx context.Context, msgs [][]byte, numbers []uint64) []signer.Result
	// SignOver signs a statement that stands for messages of which the SHA-256 are given, and numbers them likewise.
	SignOver(ctx context.Context, digests [][sha256.Size]byte, numbers []uint64, statement []byte) ([]byte, error)
}

// Plain returns a Target without a history, for keys whose signatures nobody outside is given.
func Plain(s signer.Signer) Target { return plain{s} }

type plain struct{ signer.Signer }

func (p plain) SignEach(ctx context.Context, msgs [][]byte, _ []uint64) []signer.Result {
	return signer.SignAll(ctx, p.Signer, msgs)
}

func (p plain) SignOver(ctx context.Context, _ [][sha256.Size]byte, _ []uint64, statement []byte) ([]byte, error) {
	return p.Sign(ctx, statement)
}

// A Caller is whose requests stand in line behind each other; those of different callers take turns.
type Caller struct {
	UID uint32
	PID int32
}

// An Item is one message to sign.
type Item struct {
	Subject signature.Subject
	// Batchable says that a batched signature will do. It is a permission: a direct one may come back.
	Batchable bool
	// Number is the message's place in the key's history where it stands there already, because it holds its own
	// number; else 0.
	Number uint64
}

// A Result is what became of one Item.
type Result struct {
	Signature signature.Signature
	Number    uint64 // the message's place in the key's history
	Err       error
}

// Config is how a Device works. Zero values choose the defaults.
type Config struct {
	// Parallel says how many signatures the device makes at once. Default: 1.
	Parallel func() int
	// MaxBatch bounds a batch. Default and most: signature.MaxBatch.
	MaxBatch int
	// Queue bounds the requests that wait. A user may hold no more of it than what is left to the others.
	// Default: 65,536.
	Queue int
	// Observe is told of each turn of the device. It must not block.
	Observe func(Turn)
}

// A Turn is one use of the device.
type Turn struct {
	Took     time.Duration
	Messages int
	Batched  bool
	Err      error // of the first message that failed
}

const (
	defaultQueue = 1 << 16
	// A turn of direct signatures lasts about so long, so that no caller keeps the others waiting for its whole list.
	shareTurn = 10 * time.Millisecond
	aloneTurn = 30 * time.Millisecond // where nobody else waits
	maxDirect = 256                   // messages in such a turn
	firstTurn = 1                     // before the device's pace is known
	floor     = 64                    // places that a user may hold however full the queue is
)

// A Device schedules the signatures of one device. It is safe for concurrent use and owns no goroutine while idle.
type Device struct {
	cfg Config

	working atomic.Bool // a hint: running > 0

	mu      sync.Mutex
	running int            // turns under way
	ready   order[*Key]    // keys with requests that wait
	waiting int            // requests, of all keys
	held    map[uint32]int // of those, whose, by user
	pace    time.Duration  // of one direct signature, smoothed; 0: not known
	turn    time.Duration  // of one turn, smoothed
	closed  bool
	idle    chan struct{} // closed when closed and nothing runs
}

// NewDevice returns a Device.
func NewDevice(cfg Config) *Device {
	if cfg.Parallel == nil {
		cfg.Parallel = func() int { return 1 }
	}
	if cfg.MaxBatch <= 0 || cfg.MaxBatch > signature.MaxBatch {
		cfg.MaxBatch = signature.MaxBatch
	}
	if cfg.Queue <= 0 {
		cfg.Queue = defaultQueue
	}
	return &Device{cfg: cfg, held: map[uint32]int{}, idle: make(chan struct{})}
}

// Key returns the line in front of one key of the device. There must be one Key for each key.
func (d *Device) Key(t Target) *Key {
	return &Key{device: d, target: t, users: map[uint32]*user{}}
}

// Waiting returns how many requests wait for the device.
func (d *Device) Waiting() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.waiting
}

// Close refuses new requests, fails those that wait with the code stopping, and waits for the turns under way.
func (d *Device) Close() error {
	d.mu.Lock()
	if !d.closed {
		d.closed = true
		for k, _, ok := d.ready.pop(); ok; k, _, ok = d.ready.pop() {
			k.queued = false
			k.stop()
		}
		if d.running == 0 {
			close(d.idle)
		}
	}
	d.mu.Unlock()
	<-d.idle
	return nil
}

// A Key is the line in front of one key.
type Key struct {
	device *Device
	target Target

	// Guarded by device.mu.
	queued   bool // in device.ready
	batching bool // a batch is being signed: what may be batched gathers for the next one
	waiting  [kinds]int
	users    map[uint32]*user // exactly those in order
	order    order[*user]
}

// stop fails all that waits for the key.
func (k *Key) stop() {
	for u, _, ok := k.order.pop(); ok; u, _, ok = k.order.pop() {
		for f, _, ok := u.order.pop(); ok; f, _, ok = u.order.pop() {
			for _, calls := range f.calls {
				for _, c := range calls {
					k.device.drop(c, fault.New(fault.Stopping, ""))
				}
			}
		}
		delete(k.users, u.uid)
	}
}

// Public returns the public key.
func (k *Key) Public() ident.PublicKey { return k.target.Public() }

// A kind is one of the two sorts of items, which never share a turn.
type kind uint8

const (
	direct kind = iota
	batched
	kinds
)

func kindOf(it *Item) kind {
	if it.Batchable {
		return batched
	}
	return direct
}

// A user is one Unix user among those who ask for a key. A user makes as many processes as it likes, so the turns are
// the users', and each user's processes share them.
type user struct {
	uid   uint32
	flows map[int32]*flow // exactly those in order
	order order[*flow]
}

// A flow is what one process has asked of one key, by kind, oldest first.
type flow struct {
	pid   int32
	calls [kinds][]*call
	dead  [kinds]int // of those, calls that have ended
	last  kind       // that had its turn
	fresh bool       // while it is out of the order
}

// A call is one use of Key.Sign.
type call struct {
	ctx    context.Context
	key    *Key
	caller Caller
	items  []Item

	leaves  []leaf // made before the items queue; nil for those that were signed at once
	results []Result
	one     [1]Result // the results and leaves of most calls
	oneLeaf [1]leaf

	// Guarded by Device.mu until done is closed.
	rest    [kinds][]int32 // the items that no turn has taken
	pending int            // items without a result
	gone    bool           // nobody reads the results any more
	done    chan struct{}
}

// A leaf is what a batch needs of an item.
type leaf struct {
	salt   signature.Salt
	hash   signature.Hash
	digest [sha256.Size]byte
}

// Sign signs the items, all for one caller. Results stand in the order of the items; each has a signature or an error:
// device_busy where the queue is full, the context's where it ended first, else the device's. What was not signed when
// the context ended is not signed later.
func (k *Key) Sign(ctx context.Context, who Caller, items []Item) []Result {
	if len(items) == 0 {
		return nil
	}
	c := &call{ctx: ctx, key: k, caller: who, items: items, pending: len(items)}
	if c.results = c.one[:]; len(items) > 1 {
		c.results = make([]Result, len(items))
	}
	c.sort()
	if err := ctx.Err(); err != nil {
		return c.failAll(fault.From(err))
	}
	d := k.device
	width := d.parallel()
	if d.working.Load() || len(items) > 1 {
		c.prepare() // on this goroutine, while the device works
	}
	d.mu.Lock()
	if c.done == nil && (d.busy(width) || k.batching) {
		d.mu.Unlock()
		c.prepare()
		d.mu.Lock()
	}
	if err := d.admit(c, width); err != nil {
		d.mu.Unlock()
		return c.failAll(err)
	}
	k.push(c)
	var mine *turn // first of all the caller's own where nobody waits
	for d.running < width {
		t := d.take()
		if t == nil {
			break
		}
		d.running++
		d.working.Store(true)
		if mine == nil {
			mine = t
			continue
		}
		go d.work(t)
	}
	d.mu.Unlock()
	if mine != nil { // on this goroutine: the device was idle
		d.run(mine)
		d.mu.Lock()
		if next := d.after(); next != nil {
			go d.work(next)
		}
		d.mu.Unlock()
	}
	return c.wait(d)
}

func (c *call) wait(d *Device) []Result {
	if c.done == nil {
		return c.results // signed at once, on this goroutine
	}
	select {
	case <-c.done:
		return c.results
	case <-c.ctx.Done():
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if c.pending == 0 {
		return c.results
	}
	d.discard(c)
	c.gone = true
	c.key.bury(c)
	out := make([]Result, len(c.results))
	for i, r := range c.results {
		if out[i] = r; r.Err == nil && r.Signature.IsZero() {
			out[i].Err = fault.From(c.ctx.Err())
		}
	}
	return out
}

// first is the list of a call's only item. Lists are cut, and never written to.
var first = []int32{0}

// sort puts each item into the list of its kind.
func (c *call) sort() {
	if len(c.items) == 1 {
		c.rest[kindOf(&c.items[0])] = first
		return
	}
	var n [kinds]int
	for i := range c.items {
		n[kindOf(&c.items[i])]++
	}
	all := make([]int32, len(c.items))
	c.rest[direct], c.rest[batched] = all[:0:n[direct]], all[n[direct]:n[direct]]
	for i := range c.items {
		k := kindOf(&c.items[i])
		c.rest[k] = append(c.rest[k], int32(i))
	}
}

func (c *call) failAll(err error) []Result {
	for i := range c.results {
		c.results[i].Err = err
	}
	return c.results
}

// prepare makes what a call needs that queues: a channel, and the leaves of the items that may be batched.
func (c *call) prepare() {
	c.done = make(chan struct{})
	if c.leaves = c.oneLeaf[:]; len(c.items) > 1 {
		c.leaves = make([]leaf, len(c.items))
	}
	for i := range c.items {
		if c.items[i].Batchable {
			c.leaves[i] = newLeaf(&c.items[i])
		}
	}
}

func newLeaf(it *Item) (l leaf) {
	l.salt = newSalt()
	l.hash = signature.Leaf(it.Subject, l.salt)
	if it.Number == 0 {
		l.digest = sha256.Sum256(it.Subject.Message)
	}
	return l
}

// saltBox holds random salts, read many at a time: one by one they would cost as much as the leaf.
type saltBox struct {
	salts [64 * len(signature.Salt{})]byte
	left  int // bytes
}

var saltBoxes = sync.Pool{New: func() any { return new(saltBox) }}

func newSalt() signature.Salt {
	b := saltBoxes.Get().(*saltBox)
	defer saltBoxes.Put(b)
	if b.left == 0 {
		_, _ = rand.Read(b.salts[:]) // never fails (crypto/rand)
		b.left = len(b.salts)
	}
	b.left -= len(signature.Salt{})
	rest := b.salts[b.left:][:len(signature.Salt{})]
	s := signature.Salt(rest)
	clear(rest)
	return s
}

func (d *Device) parallel() int { return max(d.cfg.Parallel(), 1) }

// busy reports whether a request that came now would queue.
func (d *Device) busy(width int) bool { return d.waiting > 0 || d.running >= width }

// admit counts the call's items in, or says why not.
func (d *Device) admit(c *call, width int) error {
	if d.closed {
		return fault.New(fault.Stopping, "")
	}
	n := len(c.items)
	if room := d.cfg.Queue - d.waiting; d.busy(width) && !d.fits(c.caller, n, room) {
		e := fault.New(fault.DeviceBusy, "too many requests wait for the device")
		e.RetryAfter = min(max(d.turn*time.Duration(d.ready.len()+1), 10*time.Millisecond), 5*time.Second)
		return e
	}
	d.waiting += n
	d.held[c.caller.UID] += n
	for kind := range kinds {
		c.key.waiting[kind] += len(c.rest[kind])
	}
	return nil
}

// fits reports whether a caller may have n more places where room is what is left. A user may hold no more than is
// left to the others, but floor places in any case; the daemon's own requests are not refused before the queue is twice
// as long as it may be.
func (d *Device) fits(who Caller, n, room int) bool {
	switch {
	case room+d.cfg.Queue < n:
		return false
	case who == Caller{}:
		return true
	}
	held := d.held[who.UID] + n
	return held <= room || held <= floor
}

// release counts items out of the queue.
func (d *Device) release(c *call, kind kind, n int) {
	d.waiting -= n
	c.key.waiting[kind] -= n
	if d.held[c.caller.UID] -= n; d.held[c.caller.UID] <= 0 {
		delete(d.held, c.caller.UID)
	}
}

// push puts a call into its line.
func (k *Key) push(c *call) {
	u := k.users[c.caller.UID]
	if u == nil {
		u = &user{uid: c.caller.UID, flows: map[int32]*flow{}}
		k.users[u.uid] = u
		k.order.add(u)
	}
	f := u.flows[c.caller.PID]
	if f == nil {
		f = &flow{pid: c.caller.PID}
		u.flows[f.pid] = f
		u.order.add(f)
	}
	for kind := range kinds {
		if len(c.rest[kind]) > 0 {
			f.calls[kind] = append(f.calls[kind], c)
		}
	}
	if !k.queued {
		k.queued = true
		k.device.ready.add(k)
	}
}

// bury takes a call whose caller has gone out of its line: with many such, the line must not keep what they held.
func (k *Key) bury(c *call) {
	u := k.users[c.caller.UID]
	if u == nil || u.flows[c.caller.PID] == nil {
		return
	}
	f := u.flows[c.caller.PID]
	for kind := range kinds {
		if f.dead[kind]++; 2*f.dead[kind] >= len(f.calls[kind]) {
			f.calls[kind] = slices.DeleteFunc(f.calls[kind], func(c *call) bool { return len(c.rest[kind]) == 0 })
			f.dead[kind] = 0
		}
	}
}

// drop ends a call's items that no turn has taken.
func (d *Device) drop(c *call, err error) {
	for _, rest := range c.rest {
		for _, i := range rest {
			c.results[i].Err = err
		}
	}
	if n := d.discard(c); n > 0 {
		c.finish(n)
	}
}

// discard takes a call's items out of the queue, and returns how many there were.
func (d *Device) discard(c *call) (n int) {
	for kind := range kinds {
		n += len(c.rest[kind])
		d.release(c, kind, len(c.rest[kind]))
	}
	c.rest = [kinds][]int32{}
	return n
}

func (c *call) finish(n int) {
	if c.pending -= n; c.pending == 0 && c.done != nil {
		close(c.done)
	}
}

// A turn is what the device does next for one key.
type turn struct {
	key   *Key
	items []place
	batch bool
}

// A place is one item of a call.
type place struct {
	call *call
	at   int
}

// take picks the next turn: keys come in turn, and for each key its callers. It returns nil where nobody waits.
func (d *Device) take() *turn {
	for {
		k, fresh, ok := d.ready.pop()
		if !ok {
			return nil
		}
		if k.queued = !k.gathering(); !k.queued { // until its batch is signed
			continue
		}
		t := k.take()
		k.queued = d.ready.settle(k, k.order.len() > 0, fresh)
		if t != nil {
			return t
		}
	}
}

// take picks the key's next turn. The caller who is next decides its kind, in turn where it has items of both; where
// they may be batched, those of all others join in. It returns nil where there is nothing to sign now.
func (k *Key) take() *turn {
	for {
		u, fresh, ok := k.order.pop()
		if !ok {
			return nil
		}
		f, kind, ok := u.next(k)
		t := &turn{key: k}
		switch {
		case !ok:
			k.settle(u, fresh)
		case kind == direct:
			t.items = f.pull(k.device, direct, k.directShare(), nil)
			u.settle(k, f)
			k.settle(u, fresh)
		default:
			k.gather(t, u, fresh)
		}
		if len(t.items) > 0 { // their callers may all have gone just now
			t.batch = len(t.items) > 1 && kind == batched
			k.batching = k.batching || t.batch
			return t
		}
		if k.gathering() {
			return nil
		}
	}
}

// next returns the user's next process that has something to sign now, and of which kind. The flow of a direct turn is
// out of the order, and settle must be told; that of a batch is in it.
func (u *user) next(k *Key) (f *flow, kind kind, ok bool) {
	for range u.order.len() {
		f, fresh, ok := u.order.pop()
		if !ok {
			break
		}
		kind, live := f.turn(k.device)
		switch {
		case !live:
			delete(u.flows, f.pid)
			continue
		case kind == batched && !k.batching:
			f.last = batched
			u.order.unpop(f, fresh)
			return f, batched, true
		case f.live(k.device, direct):
			f.last = direct
			f.fresh = fresh
			return f, direct, true
		}
		u.order.round.push(f) // it gathers
	}
	return nil, 0, false
}

// gathering reports whether the key has nothing to sign until its batch is signed.
func (k *Key) gathering() bool { return k.batching && k.waiting[direct] == 0 }

// gathered puts the key back in line when its batch is signed.
func (k *Key) gathered() {
	k.batching = false
	switch {
	case k.device.closed:
		k.stop()
	case !k.queued && k.order.len() > 0:
		k.queued = true
		k.device.ready.round.push(k)
	}
}

// directShare returns how many direct signatures one turn makes.
func (k *Key) directShare() int {
	d := k.device
	if d.pace <= 0 {
		return firstTurn
	}
	length := shareTurn
	if k.order.len() == 0 && d.ready.len() == 0 {
		length = aloneTurn
	}
	return min(max(int(length/d.pace), 1), maxDirect)
}

// gather fills a batch: an equal share to each user, in their order, and again while there is room. For whom there is
// none stays where it is.
func (k *Key) gather(t *turn, first *user, fresh bool) {
	d := k.device
	share := max(d.cfg.MaxBatch/(k.order.len()+1), 1)
	var users []*user
	var news []bool
	for u, ok := first, true; ok; {
		users, news = append(users, u), append(news, fresh)
		t.items = u.pull(k, min(share, d.cfg.MaxBatch-len(t.items)), t.items)
		if len(t.items) == d.cfg.MaxBatch {
			break
		}
		u, fresh, ok = k.order.pop()
	}
	for willing := users; len(t.items) < d.cfg.MaxBatch && len(willing) > 0; {
		share := max((d.cfg.MaxBatch-len(t.items))/len(willing), 1)
		var again []*user
		for _, u := range willing {
			before := len(t.items)
			if t.items = u.pull(k, min(share, d.cfg.MaxBatch-before), t.items); len(t.items) > before {
				again = append(again, u)
			}
		}
		willing = again
	}
	for i, u := range users {
		k.settle(u, news[i])
	}
}

// pull takes up to n items that may be batched, of all processes of the user alike.
func (u *user) pull(k *Key, n int, out []place) []place {
	for n > 0 && u.order.len() > 0 {
		share, before := max(n/u.order.len(), 1), len(out)
		for range u.order.len() {
			f, fresh, ok := u.order.pop()
			if !ok || n == 0 {
				if ok {
					u.order.unpop(f, fresh)
				}
				break
			}
			had := len(out)
			out = f.pull(k.device, batched, min(share, n), out)
			n -= len(out) - had
			f.fresh = fresh
			u.settle(k, f)
		}
		if len(out) == before {
			break
		}
	}
	return out
}

// settle puts a user back in line, or forgets it.
func (k *Key) settle(u *user, fresh bool) {
	if !k.order.settle(u, u.order.len() > 0, fresh) {
		delete(k.users, u.uid)
	}
}

// settle puts a flow back in line, or forgets it.
func (u *user) settle(k *Key, f *flow) {
	if _, more := f.turn(k.device); !u.order.settle(f, more, f.fresh) {
		delete(u.flows, f.pid)
	}
}

// turn returns the kind of the flow's next turn, false where nothing is left.
func (f *flow) turn(d *Device) (kind, bool) {
	other := batched - f.last
	if f.live(d, other) {
		return other, true
	}
	return f.last, f.live(d, f.last)
}

// live drops what has ended from the head of one list of the flow, and reports whether anything is left.
func (f *flow) live(d *Device, k kind) bool {
	for calls := f.calls[k]; len(calls) > 0; {
		c := calls[0]
		if len(c.rest[k]) > 0 {
			err := c.ctx.Err()
			if err == nil {
				return true
			}
			d.drop(c, fault.From(err))
		}
		calls[0] = nil
		calls = calls[1:]
		f.calls[k] = calls
		f.dead[k] = max(f.dead[k]-1, 0)
	}
	return false
}

// pull takes up to n items of one kind from the head of the flow.
func (f *flow) pull(d *Device, k kind, n int, out []place) []place {
	for n > 0 && f.live(d, k) {
		c := f.calls[k][0]
		some := min(n, len(c.rest[k]))
		for _, i := range c.rest[k][:some] {
			out = append(out, place{c, int(i)})
		}
		c.rest[k] = c.rest[k][some:]
		d.release(c, k, some)
		n -= some
	}
	return out
}

// work does turns until nobody waits.
func (d *Device) work(t *turn) {
	for t != nil {
		d.run(t)
		d.mu.Lock()
		t = d.after()
		d.mu.Unlock()
	}
}

// after returns the next turn for whoever has just ended one, or nil where there is none and the place is given up.
func (d *Device) after() *turn {
	if d.running <= d.parallel() {
		if t := d.take(); t != nil {
			return t
		}
	}
	if d.running--; d.running == 0 {
		d.working.Store(false)
		if d.closed {
			close(d.idle)
		}
	}
	return nil
}

// run has the device sign, and hands out what it made.
func (d *Device) run(t *turn) {
	ctx, cancel := t.context()
	start := time.Now()
	out := t.sign(ctx)
	took := time.Since(start)
	cancel()
	var failed error
	for i := range out {
		if out[i].Err != nil {
			failed = out[i].Err
			break
		}
	}
	if d.cfg.Observe != nil {
		d.cfg.Observe(Turn{Took: took, Messages: len(out), Batched: t.batch, Err: failed})
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if each := took / time.Duration(len(out)); failed != nil && !t.batch && each > d.pace {
		d.pace = each // it has slowed down: the next turn is shorter
	}
	if failed == nil {
		d.turn = smooth(d.turn, took)
		if !t.batch || d.pace == 0 {
			made := len(out)
			if t.batch {
				made = 1
			}
			d.pace = smooth(d.pace, took/time.Duration(made))
		}
	}
	if t.batch {
		t.key.gathered()
	}
	for i, p := range t.items {
		if p.call.gone {
			continue
		}
		p.call.results[p.at] = out[i]
		p.call.finish(1)
	}
}

func smooth(old, now time.Duration) time.Duration {
	if old == 0 {
		return now
	}
	return (7*old + now) / 8
}

// context returns what the device's work is bound to: the caller's own context where there is one caller, else the
// latest of their deadlines.
func (t *turn) context() (context.Context, context.CancelFunc) {
	first := t.items[0].call
	var latest time.Time
	alone, bounded := true, true
	for _, p := range t.items {
		if p.call == first && !latest.IsZero() {
			continue
		}
		alone = alone && p.call == first
		end, ok := p.call.ctx.Deadline()
		bounded = bounded && ok
		if end.After(latest) {
			latest = end
		}
	}
	if alone {
		return first.ctx, func() {}
	}
	if !bounded {
		return context.Background(), func() {}
	}
	return context.WithDeadline(context.Background(), latest)
}

// sign has the turn's messages signed. A panic in a backend costs the turn, and nobody else.
func (t *turn) sign(ctx context.Context) (out []Result) {
	defer func() {
		if p := recover(); p != nil {
			out = make([]Result, len(t.items))
			for i := range out {
				out[i].Err = fault.Wrap(fault.Internal, fmt.Errorf("panic: %v\n%s", p, debug.Stack()), "")
			}
		}
	}()
	if t.batch {
		return t.signBatch(ctx)
	}
	return t.signEach(ctx)
}

// signEach has each message signed by itself.
func (t *turn) signEach(ctx context.Context) []Result {
	msgs, numbers := make([][]byte, len(t.items)), make([]uint64, len(t.items))
	for i, p := range t.items {
		it := &p.call.items[p.at]
		msgs[i], numbers[i] = it.Subject.Message, it.Number
	}
	signed := t.key.target.SignEach(ctx, msgs, numbers)
	out := make([]Result, len(t.items))
	for i, s := range signed {
		if s.Err != nil {
			out[i].Err = fault.From(s.Err)
			continue
		}
		out[i] = Result{Signature: signature.NewDirect(s.Signature), Number: numbers[i]}
	}
	return out
}

// signBatch has the root of a tree over the messages signed.
func (t *turn) signBatch(ctx context.Context) []Result {
	hashes, digests, numbers := make([]signature.Hash, len(t.items)), make([][sha256.Size]byte, len(t.items)), make([]uint64, len(t.items))
	for i, p := range t.items {
		l := &p.call.leaves[p.at]
		hashes[i], digests[i], numbers[i] = l.hash, l.digest, p.call.items[p.at].Number
	}
	tree := signature.NewTree(hashes)
	out := make([]Result, len(t.items))
	raw, err := t.key.target.SignOver(ctx, digests, numbers, signature.Statement(t.key.Public(), tree.Size(), tree.Root()))
	for i, p := range t.items {
		if err != nil {
			out[i].Err = fault.From(err)
			continue
		}
		out[i] = Result{Signature: tree.Sign(i, p.call.leaves[p.at].salt, raw), Number: numbers[i]}
	}
	return out
}

// An order says who is next. Who comes anew goes before those who have been waiting for more than one turn, so that
// one request costs its sender no whole round; and having had its turn it stays in the round once, empty or not, so
// that nobody comes anew twice while others wait for their turn (as in RFC 8290, section 4.2).
type order[T any] struct {
	fresh ring[T]
	round ring[T]
}

func (o *order[T]) len() int { return o.fresh.len() + o.round.len() }

// add puts in somebody who is not in it.
func (o *order[T]) add(v T) { o.fresh.push(v) }

// pop takes out who is next. What comes of it, settle must be told.
func (o *order[T]) pop() (v T, fresh, ok bool) {
	if v, ok = o.fresh.pop(); ok {
		return v, true, true
	}
	v, ok = o.round.pop()
	return v, false, ok
}

// unpop puts back who was taken out, as if it had not been.
func (o *order[T]) unpop(v T, fresh bool) {
	if fresh {
		o.fresh.pushFront(v)
		return
	}
	o.round.pushFront(v)
}

// settle puts back who was taken out, unless it has nothing more to ask and has been through the round. It reports
// whether v is in the order.
func (o *order[T]) settle(v T, more, fresh bool) bool {
	if !more && !fresh {
		return false
	}
	o.round.push(v)
	return true
}

// A ring is a queue that reuses its memory.
type ring[T any] struct {
	buf  []T
	head int
	n    int
}

func (r *ring[T]) len() int { return r.n }

func (r *ring[T]) push(v T) {
	r.grow()
	r.buf[(r.head+r.n)%len(r.buf)] = v
	r.n++
}

func (r *ring[T]) pushFront(v T) {
	r.grow()
	r.head = (r.head - 1 + len(r.buf)) % len(r.buf)
	r.buf[r.head] = v
	r.n++
}

// grow makes room for one more.
func (r *ring[T]) grow() {
	if r.n < len(r.buf) {
		return
	}
	bigger := make([]T, max(2*len(r.buf), 4))
	for i := range r.n {
		bigger[i] = r.buf[(r.head+i)%len(r.buf)]
	}
	r.buf, r.head = bigger, 0
}

func (r *ring[T]) pop() (v T, ok bool) {
	if r.n == 0 {
		return v, false
	}
	var zero T
	v, r.buf[r.head] = r.buf[r.head], zero
	r.head = (r.head + 1) % len(r.buf)
	r.n--
	return v, true
}
