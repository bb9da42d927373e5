package view_test

import (
	"sync"
	"testing"

	"github.com/trustd/trustd/registry"
	"github.com/trustd/trustd/view"
)

func TestHolder(t *testing.T) {
	var h view.Holder
	v := h.Load()
	if v == nil || v.Registry == nil || v.Registry.Initialised() {
		t.Fatal("a new Holder must hold an empty registry")
	}
	if _, known := v.Registry.ByAlias("agent:anyone"); known {
		t.Error("an empty registry knows somebody")
	}
	next := &view.View{Registry: registry.New()}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() { h.Store(next) })
		wg.Go(func() { h.Load().Registry.Head() })
	}
	wg.Wait()
	if h.Load() != next {
		t.Error("Load does not return what was stored")
	}
}
