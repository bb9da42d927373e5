package signature_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"math/big"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signature"
)

func agentOf(tb testing.TB, id string) ident.AgentID {
	tb.Helper()
	a, err := ident.ParseAgentID(id)
	if err != nil {
		tb.Fatal(err)
	}
	return a
}

func subjectOf(tb testing.TB, message string) signature.Subject {
	tb.Helper()
	return signature.Subject{Kind: signature.KindPacket, Agent: agentOf(tb, "planner"), Message: []byte(message)}
}

// A lot is a batch with all that went into it.
type lot struct {
	key      pair
	subjects []signature.Subject
	salts    []signature.Salt
	tree     *signature.Tree
	raw      []byte
}

// newLot signs a batch of n subjects. Salts are those of a generator with a fixed seed.
func newLot(tb testing.TB, key string, n int) lot {
	tb.Helper()
	l := unsigned(tb, n)
	l.key = pairs()[key]
	l.raw = l.key.sign(signature.Statement(l.key.public, n, l.tree.Root()))
	return l
}

// unsigned returns a batch whose device signature is 64 bytes of nothing.
func unsigned(tb testing.TB, n int) lot {
	tb.Helper()
	random := rand.New(rand.NewPCG(1, uint64(n)))
	l := lot{key: pairs()["ed25519"], raw: make([]byte, 64)}
	leaves := make([]signature.Hash, n)
	for i := range n {
		var salt signature.Salt
		binary.BigEndian.PutUint64(salt[:], random.Uint64())
		binary.BigEndian.PutUint64(salt[8:], random.Uint64())
		s := subjectOf(tb, "message "+string(rune('a'+i%26))+strings.Repeat("x", i%200))
		l.subjects, l.salts = append(l.subjects, s), append(l.salts, salt)
		leaves[i] = signature.Leaf(s, salt)
	}
	l.tree = signature.NewTree(leaves)
	return l
}

func (l lot) sign(i int) signature.Signature { return l.tree.Sign(i, l.salts[i], l.raw) }

// bytesOf returns what the text of a batched signature encodes.
func bytesOf(tb testing.TB, text string) []byte {
	tb.Helper()
	b, err := base64.RawURLEncoding.DecodeString(strings.TrimPrefix(text, signature.BatchPrefix))
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

func textOf(b []byte) string { return signature.BatchPrefix + base64.RawURLEncoding.EncodeToString(b) }

// head is the length of index, size and salt in the bytes of a batched signature.
const head = 2 + 2 + 16

// verdict parses a text and verifies it with the key.
func verdict(k pair, text string, s signature.Subject, roots *signature.Roots) error {
	sig, err := signature.Parse(k.public.Algorithm(), text)
	if err != nil {
		return err
	}
	return sig.Verify(k.public, s, roots)
}

func wantRefused(t *testing.T, what string, err error) {
	t.Helper()
	if c := fault.CodeOf(err); c != fault.InvalidSignature && c != fault.Malformed {
		t.Errorf("%s: %v, want a refusal", what, err)
	}
}

func TestBatchVerifies(t *testing.T) {
	for _, name := range []string{"ed25519", "p256", "p384", "rsa"} {
		t.Run(name, func(t *testing.T) {
			for _, n := range []int{2, 3, 7, 64, 300} {
				l, roots := newLot(t, name, n), signature.NewRoots(8)
				for i := range n {
					sig := l.sign(i)
					if at, size := sig.Place(); sig.Mode() != signature.Batched || at != i || size != n || !bytes.Equal(sig.Raw(), l.raw) {
						t.Fatalf("%d of %d: %v at %d of %d", i, n, sig.Mode(), at, size)
					}
					if err := sig.Verify(l.key.public, l.subjects[i], roots); err != nil {
						t.Fatalf("%d of %d, as it was made: %v", i, n, err)
					}
					if err := verdict(l.key, sig.Text(), l.subjects[i], roots); err != nil {
						t.Fatalf("%d of %d, from its text: %v", i, n, err)
					}
				}
				if roots.Len() != 1 {
					t.Errorf("%d roots for one batch", roots.Len())
				}
				if err := verdict(l.key, l.sign(n/2).Text(), l.subjects[n/2], nil); err != nil {
					t.Errorf("without a cache: %v", err)
				}
			}
		})
	}
}

// TestEveryBit changes every bit of a signature's bytes, of the message, the salt, the agent and the kind, and asks the
// key each time.
func TestEveryBit(t *testing.T) {
	for _, c := range []struct {
		name string
		n, i int
	}{{"ed25519", 2, 1}, {"ed25519", 7, 6}, {"p256", 3, 2}, {"ed25519", 300, 299}} {
		l, roots := newLot(t, c.name, c.n), signature.NewRoots(8)
		s, b := l.subjects[c.i], bytesOf(t, l.sign(c.i).Text())
		if err := verdict(l.key, textOf(b), s, roots); err != nil {
			t.Fatal(err)
		}
		for bit := range 8 * len(b) {
			if testing.Short() && bit%7 != 0 {
				continue
			}
			b[bit/8] ^= 1 << (bit % 8)
			wantRefused(t, "a bit of the signature", verdict(l.key, textOf(b), s, roots))
			b[bit/8] ^= 1 << (bit % 8)
		}
		for bit := range 8 * len(s.Message) {
			other := s
			other.Message = bytes.Clone(s.Message)
			other.Message[bit/8] ^= 1 << (bit % 8)
			wantInvalid(t, "a bit of the message", verdict(l.key, textOf(b), other, roots))
		}
		for name, change := range map[string]func(*signature.Subject){
			"no message":      func(s *signature.Subject) { s.Message = nil },
			"a shorter one":   func(s *signature.Subject) { s.Message = s.Message[:len(s.Message)-1] },
			"a longer one":    func(s *signature.Subject) { s.Message = append(bytes.Clone(s.Message), 0) },
			"another agent":   func(s *signature.Subject) { s.Agent = agentOf(t, "planneR") },
			"a longer agent":  func(s *signature.Subject) { s.Agent = agentOf(t, "planner0") },
			"no agent":        func(s *signature.Subject) { s.Agent = ident.AgentID{} },
			"another kind":    func(s *signature.Subject) { s.Kind = signature.KindMessage },
			"an audit record": func(s *signature.Subject) { s.Kind = signature.KindAudit },
			"no kind":         func(s *signature.Subject) { s.Kind = "" },
		} {
			other := s
			change(&other)
			wantInvalid(t, name, verdict(l.key, textOf(b), other, roots))
		}
		for name, k := range pairs() {
			if !k.public.Equal(l.key.public) {
				wantInvalid(t, name, l.sign(c.i).Verify(k.public, s, roots))
			}
		}
		wantInvalid(t, "no key", l.sign(c.i).Verify(ident.PublicKey{}, s, roots))
		if roots.Len() != 1 {
			t.Errorf("%d roots are remembered, of one that is good", roots.Len())
		}
	}
}

// TestEveryLeaf takes every leaf of every size up to 300: its proof leads to the root, and with a bit changed it leads
// elsewhere or is no proof. What leads elsewhere was not signed: TestEveryBit asks the key, and
// TestEveryBitOfEveryLeafLong takes every bit.
func TestEveryLeaf(t *testing.T) {
	random := rand.New(rand.NewPCG(2, 2))
	for n := signature.MinBatch; n <= 300; n++ {
		l := unsigned(t, n)
		for i := range n {
			b := bytesOf(t, l.sign(i).Text())
			if !leads(t, l, b, i) {
				t.Fatalf("the proof of %d of %d does not lead to the root", i, n)
			}
			oneBit(t, l, b, i, random.IntN(8*(len(b)-len(l.raw))))
		}
	}
}

// TestEveryBitOfEveryLeafLong is TestEveryLeaf with every bit. It takes two minutes of CPU time.
func TestEveryBitOfEveryLeafLong(t *testing.T) {
	if os.Getenv("TRUSTD_LONG") != "1" {
		t.Skip("TRUSTD_LONG=1 runs this")
	}
	var all sync.WaitGroup
	for part := range 2 {
		all.Go(func() {
			for n := signature.MinBatch + part; n <= 300; n += 2 {
				l := unsigned(t, n)
				for i := range n {
					b := bytesOf(t, l.sign(i).Text())
					for bit := range 8 * head {
						oneBit(t, l, b, i, bit)
					}
					sig, leaf, root := l.sign(i), signature.Leaf(l.subjects[i], l.salts[i]), l.tree.Root()
					for bit := range 8 * (len(b) - head - len(l.raw)) {
						if sig.Climb(leaf, bit) == root {
							t.Errorf("bit %d of the path of %d of %d does not matter", bit, i, n)
						}
					}
				}
			}
		})
	}
	all.Wait()
}

// leads reports whether the bytes are a proof of leaf i, and of the batch.
func leads(t *testing.T, l lot, b []byte, i int) bool {
	sig, err := signature.Parse(ident.Ed25519, textOf(b))
	if err != nil {
		if fault.CodeOf(err) != fault.Malformed || !sig.IsZero() {
			t.Errorf("refused with %v", err)
		}
		return false
	}
	root, size := sig.Claims(l.subjects[i])
	return root == l.tree.Root() && size == l.tree.Size()
}

func oneBit(t *testing.T, l lot, b []byte, i, bit int) {
	b[bit/8] ^= 1 << (bit % 8)
	if leads(t, l, b, i) {
		t.Errorf("bit %d of %d of %d does not matter", bit, i, l.tree.Size())
	}
	b[bit/8] ^= 1 << (bit % 8)
}

// TestPlaces: a path is good for one index in one size alone.
func TestPlaces(t *testing.T) {
	const most = 20
	for n := signature.MinBatch; n <= most; n++ {
		l := unsigned(t, n)
		for i := range n {
			b := bytesOf(t, l.sign(i).Text())
			for size := range most + 1 {
				for at := range most + 1 {
					binary.BigEndian.PutUint16(b, uint16(at))
					binary.BigEndian.PutUint16(b[2:], uint16(size))
					if leads(t, l, b, i) != (at == i && size == n) {
						t.Fatalf("%d of %d passes for %d of %d", i, n, at, size)
					}
				}
			}
		}
	}
}

// TestPathLength: a path has the one length of its place, and a batch 2 to 16,384 leaves.
func TestPathLength(t *testing.T) {
	l := newLot(t, "ed25519", 5)
	for i, want := range []int{3, 3, 3, 3, 1} {
		b := bytesOf(t, l.sign(i).Text())
		for hashes := range 16 {
			path := bytes.Repeat([]byte{7}, 32*hashes)
			copy(path, b[head:len(b)-64])
			text := textOf(slices.Concat(b[:head], path, l.raw))
			if err := verdict(l.key, text, l.subjects[i], nil); (err == nil) != (hashes == want) {
				t.Errorf("a path of %d hashes for leaf %d of 5: %v", hashes, i, err)
			}
		}
	}
	for _, c := range []struct{ at, size, hashes int }{
		{0, 0, 0}, {0, 1, 0}, {1, 1, 0}, {2, 2, 1}, {3, 2, 1}, {5, 5, 1}, {65535, 5, 3},
		{0, 16385, 15}, {16384, 16385, 1}, {0, 32768, 15}, {0, 65535, 16}, {65534, 65535, 16}, {16384, 16384, 14},
	} {
		b := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, uint16(c.at)), uint16(c.size))
		b = append(b, make([]byte, 16+32*c.hashes+64)...)
		if _, err := signature.Parse(ident.Ed25519, textOf(b)); fault.CodeOf(err) != fault.Malformed {
			t.Errorf("leaf %d of %d: %v", c.at, c.size, err)
		}
	}
	short := bytesOf(t, l.sign(0).Text())
	for n := range len(short) {
		if _, err := signature.Parse(ident.Ed25519, textOf(short[:n])); err == nil {
			t.Errorf("%d bytes of %d parse", n, len(short))
		}
		if _, err := signature.Parse(ident.Ed25519, textOf(append(bytes.Clone(short), make([]byte, n+1)...))); err == nil {
			t.Errorf("%d bytes too many parse", n+1)
		}
	}
}

// TestSecondPreimage is T-SIG-4: it offers nodes as leaves, leaves as nodes, and parts of a tree as a tree.
func TestSecondPreimage(t *testing.T) {
	l := newLot(t, "ed25519", 8)
	leaf := make([]signature.Hash, 8)
	for i := range leaf {
		leaf[i] = signature.Leaf(l.subjects[i], l.salts[i])
	}
	inner := func(a, b signature.Hash) []byte { return slices.Concat([]byte{1}, a[:], b[:]) }
	hash := func(b []byte) signature.Hash { return sha256.Sum256(b) }
	n01, n23 := hash(inner(leaf[0], leaf[1])), hash(inner(leaf[2], leaf[3]))
	n47 := hash(inner(hash(inner(leaf[4], leaf[5])), hash(inner(leaf[6], leaf[7]))))
	if root := hash(inner(hash(inner(n01, n23)), n47)); root != l.tree.Root() {
		t.Fatal("the tree is not what this test takes it for")
	}
	forge := func(at, size int, salt signature.Salt, path ...signature.Hash) string {
		b := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, uint16(at)), uint16(size))
		b = append(b, salt[:]...)
		for _, h := range path {
			b = append(b, h[:]...)
		}
		return textOf(append(b, l.raw...))
	}
	var opening signature.Salt // the start of a node's bytes
	copy(opening[:], inner(leaf[0], leaf[1]))
	as := func(message []byte) signature.Subject { return subjectOf(t, string(message)) }
	bits, own := inner(leaf[0], leaf[1]), leafBytes(l.subjects[0], l.salts[0])
	for name, c := range map[string]struct {
		text    string
		subject signature.Subject
	}{
		"a node's bytes as a message of half the batch": {forge(0, 4, signature.Salt{}, n23, n47), as(bits)},
		"the same in the whole batch":                   {forge(0, 8, signature.Salt{}, n23, n47, leaf[0]), as(bits)},
		"a node's bytes, from the salt on":              {forge(0, 4, opening, n23, n47), as(bits[16:])},
		"a leaf hash as a message":                      {forge(0, 8, l.salts[0], leaf[1], n23, n47), as(leaf[0][:])},
		"a leaf's own bytes as a message":               {forge(0, 8, signature.Salt{}, leaf[1], n23, n47), as(own)},
		"a neighbour":                                   {forge(0, 8, l.salts[0], leaf[1], n23, n47), l.subjects[1]},
		"itself as its sibling":                         {forge(1, 8, l.salts[0], leaf[0], n23, n47), l.subjects[0]},
		"left and right exchanged":                      {forge(1, 8, l.salts[0], leaf[1], n23, n47), l.subjects[0]},
		"the half as the batch":                         {forge(0, 4, l.salts[0], leaf[1], n23), l.subjects[0]},
		"the root as a leaf's sibling":                  {forge(0, 2, l.salts[0], l.tree.Root()), l.subjects[0]},
	} {
		wantRefused(t, name, verdict(l.key, c.text, c.subject, nil))
	}
	if err := verdict(l.key, forge(0, 8, l.salts[0], leaf[1], n23, n47), l.subjects[0], nil); err != nil {
		t.Errorf("the true signature, made the same way: %v", err)
	}
}

// leafBytes is what a leaf hashes, written out once more from docs/formats/batch.md.
func leafBytes(s signature.Subject, salt signature.Salt) []byte {
	b := []byte{0x10}
	b = append(binary.BigEndian.AppendUint16(b, uint16(len(s.Kind))), s.Kind...)
	b = append(binary.BigEndian.AppendUint16(b, uint16(len(s.Agent.String()))), s.Agent.String()...)
	b = append(b, salt[:]...)
	return append(binary.BigEndian.AppendUint64(b, uint64(len(s.Message))), s.Message...)
}

// TestLeafBytes: a leaf is the SHA-256 of its bytes, whatever their length.
func TestLeafBytes(t *testing.T) {
	seen := map[signature.Hash]int{}
	for _, n := range []int{0, 1, 63, 64, 1024, 1980, 1981, 1982, 1983, 2000, 2047, 2048, 2049, 4096, 1 << 18} {
		s := subjectOf(t, strings.Repeat("m", n))
		got := signature.Leaf(s, signature.Salt{1, 2, 3})
		if got != sha256.Sum256(leafBytes(s, signature.Salt{1, 2, 3})) {
			t.Errorf("the leaf of a message of %d bytes", n)
		}
		if was, ok := seen[got]; ok {
			t.Errorf("messages of %d and %d bytes have one leaf", was, n)
		}
		seen[got] = n
	}
}

// TestDirectAndBatched: a signature of one mode never passes for one of the other.
func TestDirectAndBatched(t *testing.T) {
	for _, name := range []string{"ed25519", "p256", "rsa"} {
		l := newLot(t, name, 4)
		statement := signature.Statement(l.key.public, 4, l.tree.Root())
		direct := signature.NewDirect(l.key.sign(l.subjects[0].Message))
		if direct.Mode() != signature.Direct || direct.IsZero() {
			t.Errorf("%v, zero %v", direct.Mode(), direct.IsZero())
		}
		if at, size := direct.Place(); at != 0 || size != 0 {
			t.Errorf("a direct signature at %d of %d", at, size)
		}
		if err := verdict(l.key, direct.Text(), l.subjects[0], nil); err != nil {
			t.Error(err)
		}
		b := bytesOf(t, l.sign(0).Text())
		inside := append(bytes.Clone(b[:len(b)-len(l.raw)]), direct.Raw()...)
		wantInvalid(t, "a direct signature in a proof", verdict(l.key, textOf(inside), l.subjects[0], signature.NewRoots(4)))
		wantInvalid(t, "the batch's signature by itself", verdict(l.key, signature.EncodeText(l.raw), l.subjects[0], nil))
		root := l.tree.Root()
		wantInvalid(t, "of the root alone", signature.Verify(l.key.public, root[:], l.raw))
		if err := signature.Verify(l.key.public, statement, l.raw); err != nil {
			t.Error(err)
		}
		for _, text := range []string{signature.EncodeText(l.raw), direct.Text()} {
			if strings.HasPrefix(text, signature.BatchPrefix) || strings.Contains(text, ":") {
				t.Errorf("a direct text with a colon: %s", text)
			}
		}
	}
	var none signature.Signature
	wantInvalid(t, "no signature", none.Verify(pairs()["ed25519"].public, subjectOf(t, ""), nil))
	if !none.IsZero() || none.Mode() != signature.Direct {
		t.Error("the zero value is a signature")
	}
}

// TestStatement: every part of a statement matters, as does its domain.
func TestStatement(t *testing.T) {
	l := newLot(t, "ed25519", 2)
	id := l.key.public.ID()
	root := l.tree.Root()
	size := func(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }
	want := signature.Encode(signature.Batch, id[:], []byte("ed25519"), size(2), root[:])
	if got := signature.Statement(l.key.public, 2, root); !bytes.Equal(got, want) {
		t.Fatalf("%x", got)
	}
	b := bytesOf(t, l.sign(0).Text())
	other := pairs()["p256"].public.ID()
	for name, statement := range map[string][]byte{
		"another domain":      signature.Encode(signature.Message, id[:], []byte("ed25519"), size(2), root[:]),
		"no domain":           signature.Encode("", id[:], []byte("ed25519"), size(2), root[:]),
		"another key":         signature.Encode(signature.Batch, other[:], []byte("ed25519"), size(2), root[:]),
		"another algorithm":   signature.Encode(signature.Batch, id[:], []byte("ecdsa-p256"), size(2), root[:]),
		"the wire's name":     signature.Encode(signature.Batch, id[:], []byte("Ed25519"), size(2), root[:]),
		"another size":        signature.Encode(signature.Batch, id[:], []byte("ed25519"), size(3), root[:]),
		"a short size":        signature.Encode(signature.Batch, id[:], []byte("ed25519"), []byte{0, 2}, root[:]),
		"the root alone":      root[:],
		"the hash of it":      func() []byte { h := sha256.Sum256(want); return h[:] }(),
		"a field more":        signature.Encode(signature.Batch, id[:], []byte("ed25519"), size(2), root[:], nil),
		"fields without ends": slices.Concat([]byte(signature.Batch), id[:], []byte("ed25519"), size(2), root[:]),
	} {
		bent := append(bytes.Clone(b[:len(b)-64]), l.key.sign(statement)...)
		wantInvalid(t, name, verdict(l.key, textOf(bent), l.subjects[0], nil))
	}
}

// TestBatchText: a batched signature has one text.
func TestBatchText(t *testing.T) {
	for _, name := range []string{"ed25519", "p384", "rsa"} {
		l := newLot(t, name, 5)
		text := l.sign(4).Text()
		rest := strings.TrimPrefix(text, signature.BatchPrefix)
		if strings.ContainsAny(rest, "+/=") {
			t.Errorf("not base64url: %s", text)
		}
		for what, bad := range map[string]string{
			"nothing after the prefix": signature.BatchPrefix,
			"no prefix":                rest,
			"a prefix too many":        signature.BatchPrefix + text,
			"another case":             "Trustd-batch.v1:" + rest,
			"another version":          "trustd-batch.v2:" + rest,
			"half a prefix":            "trustd-batch.v1" + rest,
			"a space before":           " " + text,
			"a space after":            text + " ",
			"a line feed after":        text + "\n",
			"a line feed for a byte":   text[:40] + "\n" + text[41:],
			"a CR for a byte":          text[:40] + "\r" + text[41:],
			"a line feed inside":       text[:40] + "\n" + text[40:],
			"CRLF inside":              text[:40] + "\r\n" + text[40:],
			"a line feed in front":     signature.BatchPrefix + "\n" + rest,
			"padding":                  text + "=",
			"more padding":             text + "==",
			"a NUL":                    text + "\x00",
			"standard alphabet":        signature.BatchPrefix + strings.Repeat("+", 4) + rest[4:],
			"not ASCII":                text[:40] + "é" + text[42:],
			"a character less":         text[:len(text)-1],
			"a character more":         text + "A",
			"too long":                 signature.BatchPrefix + strings.Repeat("A", signature.MaxText),
		} {
			if sig, err := signature.Parse(l.key.public.Algorithm(), bad); fault.CodeOf(err) != fault.Malformed || !sig.IsZero() {
				t.Errorf("%s: %s parses: %v", name, what, err)
			}
		}
		const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
		last, same := strings.IndexByte(alphabet, text[len(text)-1]), 0
		for i := range alphabet {
			bent := text[:len(text)-1] + alphabet[i:i+1]
			if sig, err := signature.Parse(l.key.public.Algorithm(), bent); err == nil {
				same++
				if sig.Text() != bent {
					t.Errorf("%s: %c for %c at the end is another text", name, alphabet[i], alphabet[last])
				}
			}
		}
		if n := len(bytesOf(t, text)) % 3; n != 0 && same != 64>>(2*(3-n)) {
			t.Errorf("%s: %d last characters pass, of %d bytes", name, same, n)
		}
	}
	for _, alg := range []ident.Algorithm{0, 7, 255} {
		if _, err := signature.Parse(alg, unsigned(t, 2).sign(0).Text()); fault.CodeOf(err) != fault.Malformed {
			t.Errorf("algorithm %d: %v", alg, err)
		}
	}
}

// TestProofSize: the sizes that the format promises.
func TestProofSize(t *testing.T) {
	at := func(alg ident.Algorithm, n int) string {
		tree := signature.NewTree(benchLeaves(n))
		longest := ""
		for _, i := range []int{0, 1, n / 2, n - 1} {
			if text := tree.Sign(i, signature.Salt{}, make([]byte, alg.SignatureSize())).Text(); len(text) > len(longest) {
				longest = text
			}
		}
		return longest
	}
	if text := at(ident.Ed25519, 4096); len(bytesOf(t, text)) > 480 || len(text) > 660 {
		t.Errorf("at 4,096: %d bytes, %d characters", len(bytesOf(t, text)), len(text))
	}
	for _, alg := range ident.Algorithms() {
		text := at(alg, signature.MaxBatch)
		if sig, err := signature.Parse(alg, text); len(text) > signature.MaxText || err != nil || sig.Text() != text {
			t.Errorf("%v at %d: %d characters, %v", alg, signature.MaxBatch, len(text), err)
		}
	}
}

// TestLargestBatch verifies every leaf of the largest batch.
func TestLargestBatch(t *testing.T) {
	l, roots := newLot(t, "ed25519", signature.MaxBatch), signature.NewRoots(2)
	for i := range signature.MaxBatch {
		if err := verdict(l.key, l.sign(i).Text(), l.subjects[i], roots); err != nil {
			t.Fatalf("leaf %d: %v", i, err)
		}
		if i%1000 == 0 {
			wantInvalid(t, "a neighbour", verdict(l.key, l.sign(i).Text(), l.subjects[i+1], roots))
		}
	}
}

// TestAgainstTlog builds the same trees with golang.org/x/mod/sumdb/tlog out of the same leaf hashes: roots and proofs
// are the same, to the byte.
func TestAgainstTlog(t *testing.T) {
	sizes := []int{511, 512, 513, 1000, 1024, 4097, signature.MaxBatch - 1, signature.MaxBatch}
	for n := signature.MinBatch; n <= 300; n++ {
		sizes = append(sizes, n)
	}
	var stored []tlog.Hash
	reader := tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		out := make([]tlog.Hash, len(indexes))
		for i, at := range indexes {
			out[i] = stored[at]
		}
		return out, nil
	})
	leaves := benchLeaves(signature.MaxBatch)
	for i := range leaves {
		add, err := tlog.StoredHashesForRecordHash(int64(i), tlog.Hash(leaves[i]), reader)
		if err != nil {
			t.Fatal(err)
		}
		stored = append(stored, add...)
	}
	for _, n := range sizes {
		tree := signature.NewTree(slices.Clone(leaves[:n]))
		want, err := tlog.TreeHash(int64(n), reader)
		if err != nil {
			t.Fatal(err)
		}
		if tlog.Hash(tree.Root()) != want {
			t.Fatalf("another root for %d leaves", n)
		}
		step := 1 + n/301 // every leaf up to 300
		for i := 0; i < n; i += step {
			proof, err := tlog.ProveRecord(int64(n), int64(i), reader)
			if err != nil {
				t.Fatal(err)
			}
			b := bytesOf(t, tree.Sign(i, signature.Salt{}, make([]byte, 64)).Text())
			var path []byte
			for _, h := range proof {
				path = append(path, h[:]...)
			}
			if !bytes.Equal(b[head:len(b)-64], path) {
				t.Fatalf("another proof for %d of %d", i, n)
			}
			if err := tlog.CheckRecord(proof, int64(n), want, int64(i), tlog.Hash(leaves[i])); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// malleated returns the other ECDSA signature that anybody can make out of one: (r, n-s).
func malleated(k pair, sig []byte) []byte {
	n := k.public.Key().(*ecdsa.PublicKey).Params().N
	half := len(sig) / 2
	s := new(big.Int).Sub(n, new(big.Int).SetBytes(sig[half:]))
	return fixed(len(sig), new(big.Int).SetBytes(sig[:half]), s)
}

// TestMalleated: ECDSA has two signatures where it has one. Both are good, in both modes; in the cache neither answers
// for the other, and neither pushes the other out.
func TestMalleated(t *testing.T) {
	for _, name := range []string{"p256", "p384"} {
		l, roots := newLot(t, name, 3), signature.NewRoots(8)
		twin := malleated(l.key, l.raw)
		if bytes.Equal(twin, l.raw) {
			t.Fatal("the twin is the same")
		}
		for round := range 3 {
			if err := l.sign(0).Verify(l.key.public, l.subjects[0], roots); err != nil {
				t.Error(err)
			}
			if err := l.tree.Sign(1, l.salts[1], twin).Verify(l.key.public, l.subjects[1], roots); err != nil {
				t.Error(err)
			}
			if roots.Len() != 2 {
				t.Errorf("round %d: %d roots", round, roots.Len())
			}
		}
		bent := bytes.Clone(twin)
		bent[len(bent)-1] ^= 1
		wantInvalid(t, "neither", l.tree.Sign(0, l.salts[0], bent).Verify(l.key.public, l.subjects[0], roots))
		direct := l.key.sign(l.subjects[0].Message)
		if err := signature.Verify(l.key.public, l.subjects[0].Message, malleated(l.key, direct)); err != nil {
			t.Errorf("direct: %v", err)
		}
	}
}

// TestFormsOfTheRaw: the device's signature inside a batched one has the same one form as a direct one.
func TestFormsOfTheRaw(t *testing.T) {
	for _, name := range []string{"rsa, other salt", "rsa, PKCS#1 v1.5"} {
		l := newLot(t, name, 3)
		wantInvalid(t, name, verdict(l.key, l.sign(0).Text(), l.subjects[0], nil))
	}
}
