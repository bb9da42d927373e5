package signerpb_test

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestGeneratedCodeIsCurrent notices a change of the protocol without its generated code, without any tool.
func TestGeneratedCodeIsCurrent(t *testing.T) {
	source, err := os.ReadFile("signer.proto")
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("sha256:%x", sha256.Sum256(source))
	for _, name := range []string{"signer.pb.go", "signer_grpc.pb.go"} {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if first, _, _ := strings.Cut(string(text), "\n"); !strings.HasSuffix(first, want) {
			t.Errorf("%s is stale; run: go run -C tools ./genproto", name)
		}
	}
}

// TestGeneratedCodeIsWhatTheToolsWrite runs the generators, which also notices edits of the generated code.
func TestGeneratedCodeIsWhatTheToolsWrite(t *testing.T) {
	run := func(args ...string) ([]byte, error) {
		cmd := exec.Command("go", args...)
		cmd.Dir = "../../tools"
		return cmd.CombinedOutput()
	}
	if out, err := run("mod", "download"); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatalf("fetching the generators: %v\n%s", err, out)
		}
		t.Skipf("the generators cannot be fetched here: %v", err)
	}
	if out, err := run("run", "./genproto", "-check"); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
