package plugins

import (
	"sync"

	"github.com/trustd/trustd/signer"
)

// A tally counts failures by class: those that were added, and what the present child says of its own.
type tally struct {
	mu    sync.Mutex
	n     map[signer.Class]uint64
	child *conn
	says  map[signer.Class]uint64 // of child
}

// follow counts what c says from now on, and keeps what the child before it said last.
func (t *tally) follow(c *conn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.merge(t.says)
	t.child, t.says = c, nil
}

// hear takes what c says. A child that was followed by another is not heard.
func (t *tally) hear(c *conn, says map[signer.Class]uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.child == c {
		t.says = says
	}
}

func (t *tally) add(c signer.Class) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.merge(map[signer.Class]uint64{c: 1})
}

func (t *tally) merge(more map[signer.Class]uint64) {
	if t.n == nil {
		t.n = map[signer.Class]uint64{}
	}
	for class, n := range more {
		t.n[class] += n
	}
}

// counts returns all ten classes.
func (t *tally) counts() map[signer.Class]uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make(map[signer.Class]uint64, len(signer.Classes()))
	for _, class := range signer.Classes() {
		out[class] = t.n[class] + t.says[class]
	}
	return out
}
