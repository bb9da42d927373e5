package tpm

import (
	"errors"
	"log/slog"
	"sync/atomic"

	"github.com/google/go-tpm/tpm2"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/tpmdev"
	"github.com/trustd/trustd/signer"
)

// notes is what a Backend remembers of how its TPM fares, whatever the epoch. It is safe for concurrent use.
type notes struct {
	log     *slog.Logger
	counts  map[signer.Class]*atomic.Uint64
	refused atomic.Pointer[fault.Error] // the storage hierarchy refused us; only an operator's Unlock asks it again

	losses atomic.Uint64 // how often the TPM went away or failed
	proved atomic.Uint64 // losses as of the last signature that verified
}

func newNotes(log *slog.Logger) *notes {
	n := &notes{log: log, counts: map[signer.Class]*atomic.Uint64{}}
	for _, c := range signer.Classes() {
		n.counts[c] = &atomic.Uint64{}
	}
	return n
}

// device counts a failure that the Device met below a job.
func (n *notes) device(err error) { n.count(classify(err)) }

// command counts the failure of a command inside a job, and returns its class. What the Device has counted, and what
// was known before the command, does not count again.
func (n *notes) command(err error) signer.Class {
	c := classify(err)
	var f *failure
	if !counted(err) && !(errors.As(err, &f) && f.again) {
		n.count(c)
	}
	return c
}

// counted reports whether it was the Device that met the failure.
func counted(err error) bool {
	for _, below := range []error{tpmdev.ErrLost, tpmdev.ErrHung, tpmdev.ErrAbsent, tpm2.TPMRCInitialize} {
		if errors.Is(err, below) {
			return true
		}
	}
	return false
}

func (n *notes) count(c signer.Class) {
	if p := n.counts[c]; p != nil {
		p.Add(1)
	}
	if c == signer.TokenLost || c == signer.ModuleDead {
		n.losses.Add(1)
	}
}

// prove notes that a signature made after this many losses verified.
func (n *notes) prove(losses uint64) {
	for old := n.proved.Load(); old < losses && !n.proved.CompareAndSwap(old, losses); old = n.proved.Load() {
	}
}

// recovering reports whether the TPM has gone since the last signature that verified.
func (n *notes) recovering() bool { return n.losses.Load() != n.proved.Load() }

// known returns a refusal as it is told to those who ask afterwards.
func known(err error) *fault.Error {
	c := classify(err)
	return fault.Wrap(c.Code(), &failure{class: c, cause: err, again: true}, "%s", texts[c])
}

// Failures returns how often the TPM failed in each way since the backend was opened, repaired or not.
func (b *Backend) Failures() map[signer.Class]uint64 {
	out := make(map[signer.Class]uint64, len(b.notes.counts))
	for c, p := range b.notes.counts {
		out[c] = p.Load()
	}
	return out
}

var _ signer.FailureCounter = (*Backend)(nil)
