package tpm_test

import (
	"context"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/tpm"
	softhsmtest "github.com/trustd/trustd/softhsm-test"
	"github.com/trustd/trustd/softhsm-test/tpmproxy"
)

// TestManyKeys has many more keys than the TPM has slots sign in turn.
func TestManyKeys(t *testing.T) { manyKeys(t, 100) }

// TestLongManyKeys has more keys than contexts are kept.
func TestLongManyKeys(t *testing.T) {
	if os.Getenv("TRUSTD_LONG") != "1" {
		t.Skip("TRUSTD_LONG=1 runs it")
	}
	manyKeys(t, 2*tpm.MaxSaved)
}

// manyKeys counts what a signature costs in commands and a key in memory: neither grows with the number of keys.
func manyKeys(t *testing.T, n int) {
	m := softhsmtest.NewTPM(t)
	p := tpmproxy.New(t, m.Path())
	dir := keyDir(t)
	b := open(t, p.Device(), dir)
	type known struct {
		id  signer.ID
		pub ident.PublicKey
	}
	made := make([]known, n)
	for i := range made {
		k := generate(t, b, ident.ECDSAP256)
		made[i] = known{k.Info().ID, k.Public()}
	}
	b.Close()
	b = open(t, p.Device(), dir)
	before := heap()
	keys := make([]signer.Key, n)
	// Opening a key reads its files and loads it: storage key in, key in, and as many out, each saved once.
	const opening, signing = 8, 8
	for i, k := range made {
		p.Script()
		var err error
		if keys[i], err = b.Open(context.Background(), k.id, k.pub); err != nil {
			t.Fatal(verbose(err))
		}
		if c := p.Count(tpmproxy.Any); i > 3 && c > opening {
			t.Fatalf("opening key %d costs %d commands", i, c)
		}
	}
	if each := (heap() - before) / int64(n); each > 12<<10 {
		t.Errorf("a key takes %d bytes of memory", each)
	} else {
		t.Logf("a key takes %d bytes of memory", each)
	}
	for round := range 3 {
		start := time.Now()
		for i, k := range keys {
			p.Script()
			mustSign(t, k, message)
			if c := p.Count(tpmproxy.Any); c > signing {
				t.Fatalf("signing with key %d costs %d commands", i, c)
			}
		}
		t.Logf("round %d: %v a signature", round, time.Since(start)/time.Duration(n))
	}
	if f := b.Failures(); f[signer.ResourcesExhausted] != 0 || f[signer.HandleLost] != 0 {
		t.Errorf("failures: %v", f)
	}
	if list, err := b.Keys(context.Background()); err != nil || len(list) != n {
		t.Errorf("%d keys listed, %v", len(list), verbose(err))
	}
	if r := count(t, p); r.objects > 3 || r.sessions > 1 {
		t.Errorf("%d objects and %d sessions on the TPM", r.objects, r.sessions)
	}
}

func heap() int64 {
	var s runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&s)
	return int64(s.HeapAlloc)
}
