// Package view holds what a verifier decides by: one immutable picture of the registry, replaced as a whole when a
// record changes it and read without a lock. A decision loads the View once and uses nothing else.
package view

import (
	"sync/atomic"

	"github.com/trustd/trustd/registry"
)

// A View is one picture. Nothing in it is ever written.
type View struct {
	Registry *registry.State
}

// A Holder holds the current View. The zero value holds none; all methods may be called from any goroutine.
type Holder struct{ current atomic.Pointer[View] }

// Load returns the current View: an empty registry, which knows nobody, until the first Store.
func (h *Holder) Load() *View {
	if v := h.current.Load(); v != nil {
		return v
	}
	return empty
}

// Store replaces the View. The caller must not change it afterwards.
func (h *Holder) Store(v *View) { h.current.Store(v) }

var empty = &View{Registry: registry.New()}
