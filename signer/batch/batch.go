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
	// Queue bounds the requests that wait. A caller may hold no more of it than what is left to the others.
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
)

// A Device schedules the signatures of one device. It is safe for concurrent use and owns no goroutine while idle.
type Device struct {
	cfg Config

	working atomic.Bool // a hint: running > 0

	mu      sync.Mutex
	running int            // turns under way
	ready   order[*Key]    // keys with requests that wait
	waiting int            // requests, of all keys
	held    map[Caller]int // of those, whose
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
	return &Device{cfg: cfg, held: map[Caller]int{}, idle: make(chan struct{})}
}

// Key returns the line in front of one key of the device. There must be one Key for each key.
func (d *Device) Key(t Target) *Key {
	return &Key{device: d, target: t, flows: map[Caller]*flow{}}
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
	flows    map[Caller]*flow // exactly those in order
	order    order[*flow]
}

// stop fails all that waits for the key.
func (k *Key) stop() {
	for f, _, ok := k.order.pop(); ok; f, _, ok = k.order.pop() {
		for _, calls := range f.calls {
			for _, c := range calls {
				k.device.drop(c, fault.New(fault.Stopping, ""))
			}
		}
		delete(k.flows, f.caller)
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

// A flow is what one caller has asked of one key, by kind, oldest first.
type flow struct {
	caller Caller
	calls  [kinds][]*call
	last   kind // that had its turn
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
	if room := d.cfg.Queue - d.waiting; d.busy(width) && d.held[c.caller]+n > room {
		e := fault.New(fault.DeviceBusy, "too many requests wait for the device")
		e.RetryAfter = min(max(d.turn*time.Duration(d.ready.len()+1), 10*time.Millisecond), 5*time.Second)
		return e
	}
	d.waiting += n
	d.held[c.caller] += n
	for kind := range kinds {
		c.key.waiting[kind] += len(c.rest[kind])
	}
	return nil
}

// release counts items out of the queue.
func (d *Device) release(c *call, kind kind, n int) {
	d.waiting -= n
	c.key.waiting[kind] -= n
	if d.held[c.caller] -= n; d.held[c.caller] <= 0 {
		delete(d.held, c.caller)
	}
}

// push puts a call into its line.
func (k *Key) push(c *call) {
	f := k.flows[c.caller]
	if f == nil {
		f = &flow{caller: c.caller}
		k.flows[c.caller] = f
		k.order.add(f)
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
// they may be batched, those of all others join in.
func (k *Key) take() *turn {
	for {
		f, fresh, ok := k.order.pop()
		if !ok {
			return nil
		}
		kind, ok := f.turn(k.device)
		if !ok {
			delete(k.flows, f.caller)
			continue
		}
		if k.batching && kind == batched {
			if kind = direct; !f.live(k.device, direct) {
				if k.order.settle(f, true, fresh); k.gathering() {
					return nil
				}
				continue
			}
		}
		t := &turn{key: k}
		if f.last = kind; kind == direct {
			t.items = f.pull(k.device, direct, k.directShare(), nil)
			k.settle(f, fresh)
			return t
		}
		k.gather(t, f, fresh)
		t.batch = len(t.items) > 1
		k.batching = t.batch
		return t
	}
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

// gather fills a batch: an equal share to each caller, in their order, and again while there is room. For whom there
// is none stays where it is.
func (k *Key) gather(t *turn, first *flow, fresh bool) {
	d := k.device
	share := max(d.cfg.MaxBatch/(k.order.len()+1), 1)
	var flows []*flow
	var news []bool
	for f, ok := first, true; ok; {
		flows, news = append(flows, f), append(news, fresh)
		t.items = f.pull(d, batched, min(share, d.cfg.MaxBatch-len(t.items)), t.items)
		if len(t.items) == d.cfg.MaxBatch {
			break
		}
		f, fresh, ok = k.order.pop()
	}
	for willing := flows; len(t.items) < d.cfg.MaxBatch && len(willing) > 0; {
		room := d.cfg.MaxBatch - len(t.items)
		share := max(room/len(willing), 1)
		var again []*flow
		for _, f := range willing {
			t.items = f.pull(d, batched, min(share, d.cfg.MaxBatch-len(t.items)), t.items)
			if f.live(d, batched) {
				again = append(again, f)
			}
		}
		willing = again
	}
	for i, f := range flows {
		k.settle(f, news[i])
	}
}

// settle puts a flow back in line, or forgets it.
func (k *Key) settle(f *flow, fresh bool) {
	if _, more := f.turn(k.device); !k.order.settle(f, more, fresh) {
		delete(k.flows, f.caller)
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
	var out []Result
	if t.batch {
		out = t.signBatch(ctx)
	} else {
		out = t.signEach(ctx)
	}
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
	if r.n == len(r.buf) {
		bigger := make([]T, max(2*len(r.buf), 4))
		for i := range r.n {
			bigger[i] = r.buf[(r.head+i)%len(r.buf)]
		}
		r.buf, r.head = bigger, 0
	}
	r.buf[(r.head+r.n)%len(r.buf)] = v
	r.n++
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
