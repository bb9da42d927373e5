package soft

import "github.com/trustd/trustd/internal/durable"

// WriteThrough makes b write through another file system from now on.
func (b *Backend) WriteThrough(fs durable.FS) { b.fs = fs }
