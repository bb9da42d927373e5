package spend

import "sync"

// An id names a spent nonce: 128 bits of SHA-256.
type id [16]byte

// An entry is an id and until when it is kept.
type entry struct {
	id    id
	until deadline
}

const (
	shards     = 64
	sweepEvery = 16 // seconds between sweeps of one shard
	sweepFrom  = 64 // entries below which a shard is left alone
)

// A set holds entries in memory, in shards that are swept one at a time so that nobody waits long.
type set [shards]shard

type shard struct {
	mu      sync.Mutex
	entries map[id]deadline
	peak    int    // entries since the map was made: a map never shrinks by itself
	next    uint32 // second of the next sweep
}

func (s *set) init() {
	for i := range s {
		s[i].entries = map[id]deadline{}
	}
}

func (s *set) shard(d id) *shard { return &s[d[0]%shards] }

// insert adds an entry unless its id is held and unexpired. It returns how many expired entries it dropped.
func (s *set) insert(e entry, now instant) (fresh bool, dropped int64) {
	sh := s.shard(e.id)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if old, held := sh.entries[e.id]; held {
		if !now.past(old) {
			return false, 0
		}
		delete(sh.entries, e.id)
		dropped++
	}
	if now.second() >= sh.next && len(sh.entries) >= sweepFrom {
		dropped += sh.sweepLocked(now)
	}
	sh.entries[e.id] = e.until
	sh.peak = max(sh.peak, len(sh.entries))
	return true, dropped
}

// put adds an entry while the store is being loaded and reports whether its id is new.
func (s *set) put(e entry) bool {
	sh := s.shard(e.id)
	old, held := sh.entries[e.id]
	e.until.extend(old)
	sh.entries[e.id] = e.until
	sh.peak = max(sh.peak, len(sh.entries))
	return !held
}

func (s *set) holds(d id, now instant) bool {
	sh := s.shard(d)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	until, held := sh.entries[d]
	return held && !now.past(until)
}

// remove takes back an entry whose writing failed.
func (s *set) remove(e entry) {
	sh := s.shard(e.id)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	delete(sh.entries, e.id)
}

// sweep drops all expired entries and returns how many.
func (s *set) sweep(now instant) (dropped int64) {
	for i := range s {
		s[i].mu.Lock()
		dropped += s[i].sweepLocked(now)
		s[i].mu.Unlock()
	}
	return dropped
}

func (sh *shard) sweepLocked(now instant) int64 {
	sh.next = now.second() + sweepEvery
	before := len(sh.entries)
	for d, until := range sh.entries {
		if now.past(until) {
			delete(sh.entries, d)
		}
	}
	if live := len(sh.entries); sh.peak > 1024 && live < sh.peak/4 {
		smaller := make(map[id]deadline, live)
		for d, until := range sh.entries {
			smaller[d] = until
		}
		sh.entries, sh.peak = smaller, live
	}
	return int64(before - len(sh.entries))
}
