package server

import (
	"sync"

	"github.com/trustd/trustd/fault"
)

// The bytes of request bodies that the daemon holds at once. A body of firstRead or less is not counted: the bounds
// on connections hold those.
const (
	userBytes  = 32 << 20
	totalBytes = 128 << 20
)

// A Budget bounds the memory that request bodies take, for each user and in all. Sockets of one daemon share it.
// It is safe for concurrent use.
type Budget struct {
	mu    sync.Mutex
	total int64
	users map[uint32]int64 // those that hold something
}

// NewBudget returns a budget of 32 MiB for each user and 128 MiB in all.
func NewBudget() *Budget { return &Budget{users: map[uint32]int64{}} }

// take sets n more bytes aside for a user.
func (b *Budget) take(uid uint32, n int64) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.users[uid]+n > userBytes {
		return fault.New(fault.ResourceExhausted, "this user has too many large requests under way")
	}
	if b.total+n > totalBytes {
		return fault.New(fault.ResourceExhausted, "the daemon has too many large requests under way")
	}
	b.users[uid] += n
	b.total += n
	return nil
}

// give returns n bytes.
func (b *Budget) give(uid uint32, n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.total -= n
	if b.users[uid] -= n; b.users[uid] <= 0 {
		delete(b.users, uid)
	}
}
