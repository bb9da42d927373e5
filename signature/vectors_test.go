package signature_test

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/ident"
	"github.com/trustd/trustd/signature"
)

// hexBytes is bytes that stand as hexadecimal digits.
type hexBytes []byte

func (h *hexBytes) UnmarshalText(text []byte) (err error) {
	*h, err = hex.DecodeString(string(text))
	return err
}

// batchVectors is testdata/batch-v1.json, which never changes.
type batchVectors struct {
	Comment string
	Keys    []struct {
		Name, Algorithm, Fingerprint string
		PublicKey                    string `json:"public_key"`
	}
	Worked struct {
		Key, Kind, Agent, Message, Text               string
		Index, Size                                   int
		Bytes, Salt, Signature, Leaf, Root, Statement hexBytes
		LeafInput                                     hexBytes `json:"leaf_input"`
		Path, Nodes                                   []hexBytes
	} `json:"worked_example"`
	Cases []batchCase
}

type batchCase struct {
	Name             string
	Valid            bool
	Key, Kind, Agent string
	Message          hexBytes `json:"message_hex"`
	Text, Mode       string
	Index, Size      int
	Leaf, Root       hexBytes
}

func loadVectors(t *testing.T) (v batchVectors, keys map[string]ident.PublicKey) {
	t.Helper()
	raw, err := os.ReadFile("testdata/batch-v1.json")
	if err != nil {
		t.Fatal(err)
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&v); err != nil {
		t.Fatal(err)
	}
	keys = map[string]ident.PublicKey{}
	for _, k := range v.Keys {
		pub, err := ident.ParsePublicKey(k.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		if pub.ID().String() != k.Fingerprint || pub.Algorithm().String() != k.Algorithm {
			t.Errorf("%s is %s %s", k.Name, pub.Algorithm(), pub.ID())
		}
		keys[k.Name] = pub
	}
	return v, keys
}

// TestVectors: the frozen signatures of all algorithms verify, and the bent ones do not.
func TestVectors(t *testing.T) {
	v, keys := loadVectors(t)
	roots := signature.NewRoots(64)
	count, sizes := map[bool]int{}, map[int]bool{}
	for _, c := range v.Cases {
		pub := keys[c.Key]
		agent, err := ident.ParseAgentID(c.Agent)
		if err != nil {
			t.Fatal(err)
		}
		s := signature.Subject{Kind: signature.Kind(c.Kind), Agent: agent, Message: c.Message}
		count[c.Valid]++
		sig, err := signature.Parse(pub.Algorithm(), c.Text)
		if err != nil && (c.Valid || fault.CodeOf(err) != fault.Malformed) {
			t.Errorf("%s: %v", c.Name, err)
		}
		if err != nil {
			continue
		}
		for _, cache := range []*signature.Roots{nil, roots, roots} {
			err := sig.Verify(pub, s, cache)
			if (err == nil) != c.Valid || err != nil && fault.CodeOf(err) != fault.InvalidSignature {
				t.Errorf("%s: %v, want valid %v", c.Name, err, c.Valid)
			}
		}
		if !c.Valid {
			continue
		}
		at, size := sig.Place()
		if string(sig.Mode()) != c.Mode || at != c.Index || size != c.Size || sig.Text() != c.Text {
			t.Errorf("%s: %s, %d of %d", c.Name, sig.Mode(), at, size)
		}
		if sizes[size] = true; sig.Mode() == signature.Direct {
			continue
		}
		b := bytesOf(t, c.Text)
		if leaf := signature.Leaf(s, signature.Salt(b[4:head])); !bytes.Equal(leaf[:], c.Leaf) {
			t.Errorf("%s: the leaf is %x", c.Name, leaf)
		}
		if root, _ := sig.Claims(s); !bytes.Equal(root[:], c.Root) {
			t.Errorf("%s: the root is %x", c.Name, root)
		}
	}
	if count[true] != 94 || count[false] != 329 || len(keys) != len(ident.Algorithms()) ||
		!slices.Equal(slices.Sorted(maps.Keys(sizes)), []int{0, 2, 3, 5, 64, 300}) {
		t.Errorf("%d valid, %d not, %d keys, sizes %v", count[true], count[false], len(keys), sizes)
	}
}

var (
	hexRun   = regexp.MustCompile(`[0-9a-f]{8,}`)
	rowLabel = regexp.MustCompile(`(?m)^ {4}[a-z]+ ?[a-z]*  +`) // what a line of values begins with
)

// TestWorkedExample: the document's example is the one of the vectors, each value of it is right, and the document shows
// them all.
func TestWorkedExample(t *testing.T) {
	v, keys := loadVectors(t)
	w, pub := v.Worked, keys[v.Worked.Key]
	agent, err := ident.ParseAgentID(w.Agent)
	if err != nil {
		t.Fatal(err)
	}
	s := signature.Subject{Kind: signature.Kind(w.Kind), Agent: agent, Message: []byte(w.Message)}
	if !bytes.Equal(leafBytes(s, signature.Salt(w.Salt)), w.LeafInput) {
		t.Error("leaf_input is not what the leaf is the hash of")
	}
	if leaf := signature.Leaf(s, signature.Salt(w.Salt)); !bytes.Equal(leaf[:], w.Leaf) {
		t.Error("leaf is not the leaf")
	}
	if !bytes.Equal(signature.Statement(pub, w.Size, signature.Hash(w.Root)), w.Statement) {
		t.Error("statement is not the statement")
	}
	if err := signature.Verify(pub, w.Statement, w.Signature); err != nil {
		t.Error(err)
	}
	sig, err := signature.Parse(pub.Algorithm(), w.Text)
	if err != nil {
		t.Fatal(err)
	}
	if at, size := sig.Place(); at != w.Index || size != w.Size || !bytes.Equal(sig.Raw(), w.Signature) {
		t.Errorf("%d of %d", at, size)
	}
	if err := sig.Verify(pub, s, nil); err != nil {
		t.Error(err)
	}
	if !bytes.Equal(slices.Concat(w.Bytes[:4], w.Salt, w.Path[0], w.Path[1], w.Path[2], w.Signature), w.Bytes) ||
		!bytes.Equal(bytesOf(t, w.Text), w.Bytes) || !bytes.Equal(w.Nodes[2], w.Root) {
		t.Error("the parts are not the whole")
	}

	raw, err := os.ReadFile("../docs/formats/batch.md")
	if err != nil {
		t.Fatal(err)
	}
	_, doc, found := strings.Cut(string(raw), "## Worked example")
	if !found {
		t.Fatal("the document has no worked example")
	}
	solid := strings.Join(strings.Fields(rowLabel.ReplaceAllString(doc, "")), "")
	want := map[string]string{
		"the text": w.Text, "the key": pub.Base64(), "the agent": w.Agent, "the message": strings.ReplaceAll(w.Message, " ", ""),
	}
	known := hex.EncodeToString(pub.SPKI())
	for name, b := range map[string]hexBytes{
		"salt": w.Salt, "path 0": w.Path[0], "path 1": w.Path[1], "path 2": w.Path[2], "signature": w.Signature,
		"leaf_input": w.LeafInput, "leaf": w.Leaf, "node 0": w.Nodes[0], "node 1": w.Nodes[1], "root": w.Root,
		"statement": w.Statement,
	} {
		want[name] = hex.EncodeToString(b)
		known += hex.EncodeToString(b)
	}
	id := pub.ID()
	known += hex.EncodeToString(id[:])
	for name, text := range want {
		if !strings.Contains(solid, text) {
			t.Errorf("%s is not in the document", name)
		}
	}
	for _, run := range hexRun.FindAllString(strings.ReplaceAll(doc, w.Text, ""), -1) {
		if !strings.Contains(known, run) {
			t.Errorf("%s is in the document and not in the vectors", run)
		}
	}
}
