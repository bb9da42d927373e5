package signature

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"math/bits"
	"strings"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
)

// The scheme trustd-batch/v1: one device signature over the root of a Merkle tree whose leaves are messages.
// docs/formats/batch.md is written so that it can be verified from there alone.

// The bounds of a batch. A batch of one is no batch: its message is signed directly.
const (
	MinBatch = 2
	MaxBatch = 16384
)

// BatchPrefix opens the text of a batched signature; base64url without padding follows. No base64 text of a direct
// signature holds a colon.
const BatchPrefix = "trustd-batch.v1:"

// MaxText bounds the text of any signature, in bytes.
const MaxText = 2048

// A Kind says what a leaf of a batch stands for, so that none can pass for another. Append only. What is not listed
// is never batched: JWTs, SSH signatures, records, rotation links.
type Kind string

const (
	KindPacket  Kind = "packet"  // a TrustHandoff task packet
	KindMessage Kind = "message" // a SignedMessage
	KindAudit   Kind = "audit"   // an audit record
)

// valid reports whether k is one of the kinds above.
func (k Kind) valid() bool { return k == KindPacket || k == KindMessage || k == KindAudit }

// A Subject is what a signature speaks of. Kind and Agent come from whoever verifies, never from the signature.
type Subject struct {
	Kind    Kind
	Agent   ident.AgentID // the signer, as the registry names it
	Message []byte        // the signed bytes of the kind's own format
}

// A Mode says how a signature was made.
type Mode string

const (
	Direct  Mode = "direct"  // the device signed the message itself
	Batched Mode = "batched" // the device signed a batch that holds the message
)

// A Salt, random for each leaf, makes a leaf unguessable to those who hold its neighbours' proofs.
type Salt [16]byte

// A Hash is a SHA-256 hash of a leaf or of a node of a batch's tree.
type Hash = [sha256.Size]byte

const leafPrefix, nodePrefix = 0x10, 0x01

// Leaf returns the hash of a subject in a batch.
func Leaf(s Subject, salt Salt) Hash {
	agent := s.Agent.String()
	// The bytes of most subjects fit on the stack: one call hashes them, and nothing is allocated.
	var buf [2048]byte
	b := append(buf[:0], leafPrefix)
	b = append(binary.BigEndian.AppendUint16(b, uint16(len(s.Kind))), s.Kind...)
	b = append(binary.BigEndian.AppendUint16(b, uint16(len(agent))), agent...)
	b = append(b, salt[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(len(s.Message)))
	if len(b)+len(s.Message) <= len(buf) {
		return sha256.Sum256(append(b, s.Message...))
	}
	h := sha256.New()
	h.Write(b)
	h.Write(s.Message)
	var out Hash
	h.Sum(out[:0])
	return out
}

func node(l, r *Hash) Hash {
	var b [1 + 2*sha256.Size]byte
	b[0] = nodePrefix
	copy(b[1:], l[:])
	copy(b[1+sha256.Size:], r[:])
	return sha256.Sum256(b[:])
}

// Statement returns what the device signs for a batch. Verifiers build it from the registered key and the root that
// they computed; nothing of it is read from a signature.
func Statement(pub ident.PublicKey, size int, root Hash) []byte {
	id := pub.ID()
	return Encode(Batch, id[:], []byte(pub.Algorithm().String()), binary.BigEndian.AppendUint32(nil, uint32(size)), root[:])
}

// A Tree is the Merkle tree over the leaves of one batch, shaped as in RFC 6962 section 2.1. It does not change.
type Tree struct {
	levels [][]Hash // leaves first, the root alone last
}

// NewTree returns the tree over the leaves, MinBatch to MaxBatch of them, which it keeps.
func NewTree(leaves []Hash) *Tree {
	t := &Tree{levels: [][]Hash{leaves}}
	rest := make([]Hash, 0, len(leaves)+bits.Len(uint(len(leaves)))+1)
	for cur := leaves; len(cur) > 1; {
		start := len(rest)
		for i := 0; i+1 < len(cur); i += 2 {
			rest = append(rest, node(&cur[i], &cur[i+1]))
		}
		if len(cur)%2 == 1 { // a lone node moves up as it is
			rest = append(rest, cur[len(cur)-1])
		}
		cur = rest[start:len(rest):len(rest)]
		t.levels = append(t.levels, cur)
	}
	return t
}

// Size returns the number of leaves.
func (t *Tree) Size() int { return len(t.levels[0]) }

// Root returns the root.
func (t *Tree) Root() Hash { return t.levels[len(t.levels)-1][0] }

// path appends the proof of leaf i to out: the siblings from the leaf up.
func (t *Tree) path(out []byte, i int) []byte {
	for _, level := range t.levels[:len(t.levels)-1] {
		if s := i ^ 1; s < len(level) {
			out = append(out, level[s][:]...)
		}
		i >>= 1
	}
	return out
}

// pathLen returns how many hashes the proof of a leaf has.
func pathLen(index, size int) int {
	n := 0
	for last := size - 1; last > 0; index, last = index>>1, last>>1 {
		if index^1 <= last {
			n++
		}
	}
	return n
}

// climb returns the root that a leaf and its proof lead to. The proof has the right length.
func climb(leaf Hash, index, size int, path []byte) Hash {
	h := leaf
	for last := size - 1; last > 0; index, last = index>>1, last>>1 {
		if index^1 > last {
			continue
		}
		sibling := Hash(path[:sha256.Size])
		path = path[sha256.Size:]
		if index&1 == 1 {
			h = node(&sibling, &h)
		} else {
			h = node(&h, &sibling)
		}
	}
	return h
}

// A Signature is a signature of a message, made directly or in a batch. The zero value is none, and never valid. It
// does not change and is safe for concurrent use.
type Signature struct {
	raw  []byte // by the device: of the message, or of the batch's statement
	size int    // of the batch; 0 for a direct signature
	at   int    // index of the leaf
	salt Salt
	path []byte // hashes from the leaf up; nil where tree holds them
	tree *Tree  // of a signature made here, so that its path is only put together where it is asked for
}

// NewDirect returns a signature of the message itself.
func NewDirect(raw []byte) Signature { return Signature{raw: raw} }

// Sign returns the signature of the leaf at index i, 0 to Size-1, given the device's signature of the tree's statement.
// The result holds on to the tree and to raw.
func (t *Tree) Sign(i int, salt Salt, raw []byte) Signature {
	return Signature{raw: raw, size: t.Size(), at: i, salt: salt, tree: t}
}

// appendPath appends the proof to out.
func (s Signature) appendPath(out []byte) []byte {
	if s.tree != nil {
		return s.tree.path(out, s.at)
	}
	return append(out, s.path...)
}

// Mode says how the signature was made.
func (s Signature) Mode() Mode {
	if s.size > 0 {
		return Batched
	}
	return Direct
}

// IsZero reports whether s is no signature.
func (s Signature) IsZero() bool { return len(s.raw) == 0 }

// Raw returns the device's signature, which is over the batch's statement where Mode is Batched.
func (s Signature) Raw() []byte { return bytes.Clone(s.raw) }

// Place returns where in its batch the message stands; 0 and 0 for a direct signature.
func (s Signature) Place() (index, size int) { return s.at, s.size }

// Text returns the signature's text: padded standard base64, or BatchPrefix and base64url.
func (s Signature) Text() string {
	if s.size == 0 {
		return EncodeText(s.raw)
	}
	// Both buffers hold a signature by any key but a large RSA key out of a batch of any size.
	var bytes [768]byte
	b := binary.BigEndian.AppendUint16(bytes[:0], uint16(s.at))
	b = binary.BigEndian.AppendUint16(b, uint16(s.size))
	b = append(s.appendPath(append(b, s.salt[:]...)), s.raw...)
	var text [len(BatchPrefix) + len(bytes)*4/3]byte
	return string(base64url.AppendEncode(append(text[:0], BatchPrefix...), b))
}

// base64url is the one encoding of a batched signature. Like all decoders of encoding/base64 it skips line ends.
var base64url = base64.RawURLEncoding.Strict()

// batchHead is what stands before the path: index, size and salt.
const batchHead = 2 + 2 + len(Salt{})

// Parse reads the text of a signature, direct or batched, by a key of the given algorithm. Only the one canonical
// text of a signature passes.
func Parse(alg ident.Algorithm, text string) (Signature, error) {
	rest, batched := strings.CutPrefix(text, BatchPrefix)
	if !batched {
		raw, err := ParseText(alg, text)
		return Signature{raw: raw}, err
	}
	bad := func(why string) (Signature, error) { return Signature{}, fault.BadField("signature", "%s", why) }
	if !alg.Valid() || len(text) > MaxText || hasLineEnd(rest) { // the decoder would skip these
		return bad("not the base64url of a batched signature")
	}
	b, err := base64url.DecodeString(rest)
	if err != nil || len(b) < batchHead {
		return bad("not the base64url of a batched signature")
	}
	s := Signature{at: int(binary.BigEndian.Uint16(b)), size: int(binary.BigEndian.Uint16(b[2:])), salt: Salt(b[4:batchHead])}
	if s.size < MinBatch || s.size > MaxBatch || s.at >= s.size {
		return bad("a batch has 2 to 16384 leaves, and this is none of them")
	}
	path := sha256.Size * pathLen(s.at, s.size)
	if len(b) != batchHead+path+alg.SignatureSize() {
		return bad("the proof does not have the length that its place asks for")
	}
	s.path, s.raw = b[batchHead:batchHead+path], b[batchHead+path:]
	return s, nil
}

// Verify checks that pub signed the subject, directly or in a batch. roots may be nil; with it, a root that pub's
// signature was found good for before costs no public-key operation. The subject of a batched signature must have an
// agent and a kind that is listed. The error has the code invalid_signature.
func (s Signature) Verify(pub ident.PublicKey, of Subject, roots *Roots) error {
	if s.size == 0 {
		return Verify(pub, of.Message, s.raw)
	}
	path := s.path
	if s.tree != nil {
		path = s.appendPath(nil)
	}
	if of.Agent.IsZero() || !of.Kind.valid() || len(path) != sha256.Size*pathLen(s.at, s.size) {
		return fault.New(fault.InvalidSignature, "")
	}
	root := climb(Leaf(of, s.salt), s.at, s.size, path)
	if roots.holds(pub, s.size, root, s.raw) {
		return nil
	}
	if err := Verify(pub, Statement(pub, s.size, root), s.raw); err != nil {
		return err
	}
	roots.keep(pub, s.size, root, s.raw)
	return nil
}
