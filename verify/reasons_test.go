package verify_test

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"slices"
	"testing"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/verify"
)

var update = flag.Bool("update", false, "write docs/reasons.md anew")

const reasonsFile = "../docs/reasons.md"

// TestReasonsDocument makes docs/reasons.md from the tables and the codes, and fails where the file says otherwise.
func TestReasonsDocument(t *testing.T) {
	want := reasonsDocument()
	if *update {
		if err := os.WriteFile(reasonsFile, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(reasonsFile)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("docs/reasons.md is stale: run make generate")
	}
}

// TestReasonsAreComplete: a code that counts as a refusal is one that something refuses for, and the other way round.
func TestReasonsAreComplete(t *testing.T) {
	listed := append(verify.Reasons(), verify.MessageReasons()...)
	for _, c := range fault.All() {
		if c.Refusal() != slices.Contains(listed, c) {
			t.Errorf("%s: refusal %v, listed %v", c, c.Refusal(), slices.Contains(listed, c))
		}
	}
	for _, list := range [][]fault.Code{verify.Reasons(), verify.MessageReasons()} {
		for i, c := range list {
			if slices.Contains(list[:i], c) {
				t.Errorf("%s stands twice", c)
			}
			if c.Title() == "" {
				t.Errorf("%s has no title", c)
			}
		}
	}
}

func reasonsDocument() []byte {
	var b bytes.Buffer
	b.WriteString(`# Why a packet or message is refused

Made from the tables in ` + "`verify`" + ` and the codes in ` + "`fault`" + ` by ` + "`make generate`" + `; do not edit.

The checks run in the order of the rows and stop at the first that fails: its reason is the answer. Nothing is used
up before every check has passed; the nonce is spent last. A reason is stable: it is never renamed, and it means the
same in every version.

`)
	section(&b, "Task packets", verify.Reasons())
	section(&b, "Signed messages", verify.MessageReasons())
	b.WriteString("`unknown_agent` also covers signers that are registered and may sign neither: operators, nodes, and agents\n" +
		"of the trust level NONE. A SignedMessage in the mode `embedded` is never accepted: with a valid signature the\n" +
		"reason is `unknown_agent`, because nobody has said whose key it is. `broken_chain` concerns chains alone.\n" +
		"Nonces of messages are spent only where the one who verifies asks for it.\n")
	return b.Bytes()
}

func section(b *bytes.Buffer, title string, reasons []fault.Code) {
	fmt.Fprintf(b, "## %s\n\n| | reason | means | what to do | retry |\n|---|---|---|---|---|\n", title)
	for i, c := range reasons {
		retry := "no"
		if c.Retryable() {
			retry = "yes"
		}
		fmt.Fprintf(b, "| %d | `%s` | %s | %s | %s |\n", i+1, c, c.Title(), c.Hint(), retry)
	}
	b.WriteString("\n")
}
