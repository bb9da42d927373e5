package caller

import "testing"

// AsOldKernel makes the package behave as on a kernel without SO_PEERPIDFD and PIDFD_GET_INFO until the test ends.
func AsOldKernel(t *testing.T) {
	withoutPidfd = true
	noPidfdInfo.Store(true)
	t.Cleanup(func() {
		withoutPidfd = false
		noPidfdInfo.Store(false)
	})
}

// WithoutPidfdInfo makes the package behave as on a kernel without PIDFD_GET_INFO until the test ends.
func WithoutPidfdInfo(t *testing.T) {
	noPidfdInfo.Store(true)
	t.Cleanup(func() { noPidfdInfo.Store(false) })
}
