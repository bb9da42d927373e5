package merkle_test

import (
	"encoding/hex"
	"testing"

	"pgregory.net/rapid"

	"github.com/trustd/trustd/internal/merkle"
)

// The leaves and roots of the test vectors of Certificate Transparency.
var (
	ctLeaves = []string{
		"", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f",
	}
	ctRoots = []string{
		"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
		"6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
		"fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
		"aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
		"d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
		"4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
		"76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
		"ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
		"5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
	}
)

func TestRoots(t *testing.T) {
	var tree merkle.Tree
	var list merkle.List
	for i, want := range ctRoots {
		if i > 0 {
			leaf, err := hex.DecodeString(ctLeaves[i-1])
			if err != nil {
				t.Fatal(err)
			}
			tree.Append(merkle.LeafHash(leaf))
			list.Append(merkle.LeafHash(leaf))
		}
		if got := tree.Root(); hex.EncodeToString(got[:]) != want || tree.Size() != uint64(i) {
			t.Errorf("tree of %d leaves: %x", i, got)
		}
		if got, err := list.Root(uint64(i)); err != nil || hex.EncodeToString(got[:]) != want {
			t.Errorf("list of %d leaves: %x, %v", i, got, err)
		}
	}
}

func leaf(i int) merkle.Hash { return merkle.LeafHash([]byte{byte(i), byte(i >> 8)}) }

// TestTreeAgreesWithList compares the two at every size, through clones and marshalled copies.
func TestTreeAgreesWithList(t *testing.T) {
	var tree merkle.Tree
	var list merkle.List
	for i := range 300 {
		before := tree.Clone()
		tree.Append(leaf(i))
		list.Append(leaf(i))
		want, err := list.Root(list.Size())
		if err != nil || tree.Root() != want {
			t.Fatalf("size %d: roots differ, %v", i+1, err)
		}
		if old, _ := list.Root(uint64(i)); before.Root() != old {
			t.Fatalf("size %d: the clone changed", i)
		}
		b, err := tree.MarshalBinary()
		if err != nil {
			t.Fatal(err)
		}
		var again merkle.Tree
		if err := again.UnmarshalBinary(b); err != nil || again.Root() != want || again.Size() != tree.Size() {
			t.Fatalf("size %d: marshalling changed the tree, %v", i+1, err)
		}
	}
}

func TestProofs(t *testing.T) {
	var list merkle.List
	for i := range 64 {
		list.Append(leaf(i))
	}
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.Uint64Range(1, list.Size()).Draw(t, "size")
		index := rapid.Uint64Range(0, size-1).Draw(t, "index")
		old := rapid.Uint64Range(1, size).Draw(t, "old")
		root, _ := list.Root(size)
		oldRoot, _ := list.Root(old)
		in, err := list.Inclusion(index, size)
		if err != nil {
			t.Fatal(err)
		}
		con, err := list.Consistency(old, size)
		if err != nil {
			t.Fatal(err)
		}
		if err := merkle.VerifyInclusion(root, size, leaf(int(index)), index, in); err != nil {
			t.Fatal(err)
		}
		if err := merkle.VerifyConsistency(root, size, oldRoot, old, con); err != nil {
			t.Fatal(err)
		}
		for i := range in {
			in[i][0] ^= 1
			if merkle.VerifyInclusion(root, size, leaf(int(index)), index, in) == nil {
				t.Fatal("an inclusion proof with a flipped bit was taken")
			}
			in[i][0] ^= 1
		}
		if merkle.VerifyInclusion(root, size, leaf(int(index)+1), index, in) == nil {
			t.Fatal("an inclusion proof of another leaf was taken")
		}
		oldRoot[3] ^= 4
		if merkle.VerifyConsistency(root, size, oldRoot, old, con) == nil {
			t.Fatal("a consistency proof from another root was taken")
		}
	})
}

func TestProofsOutOfRange(t *testing.T) {
	var list merkle.List
	list.Append(leaf(0))
	root, _ := list.Root(1)
	if _, err := list.Root(2); err == nil {
		t.Error("a root beyond the end")
	}
	if _, err := list.Inclusion(1, 1); err == nil {
		t.Error("a proof beyond the end")
	}
	if _, err := list.Inclusion(0, 2); err == nil {
		t.Error("a proof in a tree that is not there yet")
	}
	for _, r := range [][2]uint64{{0, 1}, {2, 1}, {1, 2}} {
		if _, err := list.Consistency(r[0], r[1]); err == nil {
			t.Errorf("a proof from %d to %d", r[0], r[1])
		}
	}
	if merkle.VerifyInclusion(root, 1<<63, leaf(0), 0, nil) == nil || merkle.VerifyInclusion(root, 1, leaf(0), 1, nil) == nil {
		t.Error("a proof beyond the end was taken")
	}
	if merkle.VerifyConsistency(root, 1, root, 2, nil) == nil || merkle.VerifyConsistency(root, 1, root, 0, nil) == nil {
		t.Error("a proof beyond the end was taken")
	}
}

func FuzzUnmarshalTree(f *testing.F) {
	var tree merkle.Tree
	for i := range 7 {
		b, _ := tree.MarshalBinary()
		f.Add(b)
		tree.Append(leaf(i))
	}
	f.Add([]byte{1, 2})
	f.Fuzz(func(t *testing.T, b []byte) {
		var tree merkle.Tree
		if tree.UnmarshalBinary(b) != nil {
			return
		}
		if again, _ := tree.MarshalBinary(); string(again) != string(b) {
			t.Fatalf("%x became %x", b, again)
		}
		tree.Append(leaf(1))
		tree.Root()
	})
}
