// Package signertest runs the suite that every signer.Backend must pass as a test. A backend's test is one line:
//
//	func TestConformance(t *testing.T) { signertest.Run(t, openBackend) }
package signertest

import (
	"testing"

	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signer"
	"github.com/trustd/trustd/signer/signertest/suite"
)

// An Option changes what Run does.
type Option = suite.Option

// Algorithms limits the suite to some of the backend's algorithms, for devices on which others are too slow. At
// least one must be left.
func Algorithms(algs ...ident.Algorithm) Option { return suite.Algorithms(algs...) }

// Reopen lets the suite check that keys outlive the process: open opens the same device again, after the first
// backend was closed.
func Reopen(open func(t testing.TB) signer.Backend) Option { return suite.Reopen(adapt(open)) }

// Run opens a backend and checks that it keeps the contract of package signer. The backend is open once at any
// time: open is called once, and Reopen's function after the first backend was closed.
func Run(t *testing.T, open func(t testing.TB) signer.Backend, opts ...Option) {
	t.Helper()
	suite.Run(test{t}, adapt(open), opts...)
}

func adapt(open func(testing.TB) signer.Backend) func(suite.T) signer.Backend {
	return func(t suite.T) signer.Backend { return open(t.(test).T) }
}

// A test is a *testing.T that the suite takes.
type test struct{ *testing.T }

// Run implements suite.T.
func (t test) Run(name string, f func(suite.T)) bool {
	return t.T.Run(name, func(t *testing.T) { f(test{t}) })
}
