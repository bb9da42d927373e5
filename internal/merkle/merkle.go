// Package merkle hashes append-only lists into RFC 6962 tree heads, over golang.org/x/mod/sumdb/tlog.
//
// A Tree knows only the right edge of its tree: enough to append and to tell the root, in a few hundred bytes
// whatever the size. A List keeps every hash and can prove what it holds.
package merkle

import (
	"crypto/sha256"
	"encoding/binary"
	"math/bits"
	"slices"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/trustd/trustd/fault"
)

// A Hash is a SHA-256 hash of a leaf or of a tree.
type Hash = [32]byte

// LeafHash returns the hash of a leaf: SHA-256 of a zero byte and the data.
func LeafHash(data []byte) Hash {
	var b [64]byte // most leaves are short, and are hashed without allocating
	if len(data) < len(b) {
		return sha256.Sum256(append(append(b[:0], 0), data...))
	}
	return Hash(tlog.RecordHash(data))
}

// A Tree is the right edge of a growing tree. The zero value is the empty tree. It is not safe for concurrent use;
// an assignment copies it only if neither copy is appended to any more: use Clone.
type Tree struct {
	size uint64
	edge []Hash // the roots of the complete subtrees, largest first: one for each bit set in size
}

// Append adds a leaf by its hash.
func (t *Tree) Append(leaf Hash) {
	h := leaf
	for n := t.size; n&1 == 1; n >>= 1 {
		last := len(t.edge) - 1
		h = Hash(tlog.NodeHash(tlog.Hash(t.edge[last]), tlog.Hash(h)))
		t.edge = t.edge[:last]
	}
	t.edge = append(t.edge, h)
	t.size++
}

// Size returns the number of leaves.
func (t *Tree) Size() uint64 { return t.size }

// emptyRoot is the SHA-256 of nothing, RFC 6962 section 2.1.
var emptyRoot = Hash{
	0xe3, 0xb0, 0xc4, 0x42, 0x98, 0xfc, 0x1c, 0x14, 0x9a, 0xfb, 0xf4, 0xc8, 0x99, 0x6f, 0xb9, 0x24,
	0x27, 0xae, 0x41, 0xe4, 0x64, 0x9b, 0x93, 0x4c, 0xa4, 0x95, 0x99, 0x1b, 0x78, 0x52, 0xb8, 0x55,
}

// Root returns the hash of the tree.
func (t *Tree) Root() Hash {
	if t.size == 0 {
		return emptyRoot
	}
	last := len(t.edge) - 1
	h := t.edge[last]
	for i := last - 1; i >= 0; i-- {
		h = Hash(tlog.NodeHash(tlog.Hash(t.edge[i]), tlog.Hash(h)))
	}
	return h
}

// Clone returns a copy that shares nothing with t.
func (t *Tree) Clone() Tree { return Tree{size: t.size, edge: slices.Clone(t.edge)} }

// AppendBinary adds the size as 64 bits, big endian, and the edge, largest subtree first.
func (t *Tree) AppendBinary(b []byte) ([]byte, error) {
	b = binary.BigEndian.AppendUint64(b, t.size)
	for _, h := range t.edge {
		b = append(b, h[:]...)
	}
	return b, nil
}

// MarshalBinary returns what UnmarshalBinary reads.
func (t *Tree) MarshalBinary() ([]byte, error) { return t.AppendBinary(nil) }

// UnmarshalBinary reads a tree. The bytes must hold exactly one.
func (t *Tree) UnmarshalBinary(b []byte) error {
	if len(b) < 8 {
		return fault.New(fault.Malformed, "a tree has at least 8 bytes")
	}
	size := binary.BigEndian.Uint64(b)
	if b = b[8:]; len(b) != 32*bits.OnesCount64(size) {
		return fault.New(fault.Malformed, "a tree has one hash for each bit of its size")
	}
	edge := make([]Hash, len(b)/32)
	for i := range edge {
		edge[i] = Hash(b[32*i:])
	}
	*t = Tree{size: size, edge: edge}
	return nil
}

// A List is a tree with all its hashes: two for each leaf. The zero value is the empty list. It is not safe for
// concurrent use.
type List struct {
	stored []tlog.Hash
	size   int64
}

// Append adds a leaf by its hash.
func (l *List) Append(leaf Hash) {
	more, err := tlog.StoredHashesForRecordHash(l.size, tlog.Hash(leaf), l.reader())
	if err != nil { // the reader holds every hash below size
		panic("merkle: " + err.Error())
	}
	l.stored = append(l.stored, more...)
	l.size++
}

// Size returns the number of leaves.
func (l *List) Size() uint64 { return uint64(l.size) }

// Root returns the hash of the tree of the first size leaves.
func (l *List) Root(size uint64) (Hash, error) {
	if size > l.Size() {
		return Hash{}, fault.New(fault.NotFound, "the tree has fewer leaves")
	}
	if size == 0 {
		return emptyRoot, nil
	}
	h, err := tlog.TreeHash(int64(size), l.reader())
	return Hash(h), err
}

// Inclusion proves that the leaf at index is in the tree of the first size leaves.
func (l *List) Inclusion(index, size uint64) ([]Hash, error) {
	if size > l.Size() || index >= size {
		return nil, fault.New(fault.NotFound, "the tree has fewer leaves")
	}
	p, err := tlog.ProveRecord(int64(size), int64(index), l.reader())
	return hashes(p), err
}

// Consistency proves that the tree of the first size leaves begins with that of the first old.
func (l *List) Consistency(old, size uint64) ([]Hash, error) {
	if size > l.Size() || old > size || old == 0 {
		return nil, fault.New(fault.NotFound, "the tree has fewer leaves")
	}
	p, err := tlog.ProveTree(int64(size), int64(old), l.reader())
	return hashes(p), err
}

func (l *List) reader() tlog.HashReader {
	return tlog.HashReaderFunc(func(at []int64) ([]tlog.Hash, error) {
		out := make([]tlog.Hash, len(at))
		for i, n := range at {
			out[i] = l.stored[n]
		}
		return out, nil
	})
}

func hashes(p []tlog.Hash) []Hash {
	out := make([]Hash, len(p))
	for i, h := range p {
		out[i] = Hash(h)
	}
	return out
}

// VerifyInclusion checks a proof of Inclusion.
func VerifyInclusion(root Hash, size uint64, leaf Hash, index uint64, proof []Hash) error {
	if size > 1<<62 || index >= size {
		return fault.New(fault.Malformed, "no such leaf")
	}
	if tlog.CheckRecord(path(proof), int64(size), tlog.Hash(root), int64(index), tlog.Hash(leaf)) != nil {
		return fault.New(fault.InvalidSignature, "the inclusion proof does not lead to the root")
	}
	return nil
}

// VerifyConsistency checks a proof of Consistency.
func VerifyConsistency(root Hash, size uint64, oldRoot Hash, old uint64, proof []Hash) error {
	if size > 1<<62 || old > size || old == 0 {
		return fault.New(fault.Malformed, "no such tree")
	}
	if tlog.CheckTree(path(proof), int64(size), tlog.Hash(root), int64(old), tlog.Hash(oldRoot)) != nil {
		return fault.New(fault.InvalidSignature, "the consistency proof does not lead to the roots")
	}
	return nil
}

func path(p []Hash) []tlog.Hash {
	out := make([]tlog.Hash, len(p))
	for i, h := range p {
		out[i] = tlog.Hash(h)
	}
	return out
}
