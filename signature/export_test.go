package signature

import "github.com/trustd/trustd/ident"

// Claims returns the root and the size that a batched signature has for a subject: what the device must have signed.
func (s Signature) Claims(of Subject) (Hash, int) {
	return climb(Leaf(of, s.salt), s.at, s.size, s.appendPath(nil)), s.size
}

// Climb returns the root that a leaf leads to with one bit of the path changed.
func (s Signature) Climb(leaf Hash, bit int) Hash {
	path := s.appendPath(make([]byte, 0, 512))
	path[bit/8] ^= 1 << (bit % 8)
	return climb(leaf, s.at, s.size, path)
}

// Keep has the cache believe a signature of a root.
func (r *Roots) Keep(pub ident.PublicKey, size int, root Hash, raw []byte) {
	r.keep(pub, size, root, raw)
}
