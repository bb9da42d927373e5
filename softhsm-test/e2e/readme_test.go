package e2e

import (
	"cmp"
	"encoding/json"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/trustd/trustd/softhsm-test/lab"
)

const root = "../.."

func readDoc(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// section returns what stands under a heading, without those below it.
func section(t *testing.T, doc, heading string) string {
	t.Helper()
	_, rest, ok := strings.Cut(doc, "\n## "+heading+"\n")
	if !ok {
		t.Fatalf("the heading %q is gone", heading)
	}
	text, _, _ := strings.Cut(rest, "\n## ")
	return text
}

// fences returns the shell commands in a text, one string for each fenced block, and the lines of output that a
// block shows below its commands.
func fences(text string) (commands []string, output [][]string) {
	for _, m := range regexp.MustCompile("(?ms)^```sh\n(.*?)^```$").FindAllStringSubmatch(text, -1) {
		command, shown, found := strings.Cut(m[1], "\n{")
		commands = append(commands, command)
		var lines []string
		if found {
			lines = strings.Split(strings.TrimSpace("{"+shown), "\n")
		}
		output = append(output, lines)
	}
	return commands, output
}

// shell runs what a reader would paste, as the given Unix user.
func shell(t *testing.T, uid uint32, dir, text string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), tool(t, "bash"), "-euo", "pipefail", "-c", "umask 022\n"+text)
	cmd.Dir = dir
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid, Groups: []uint32{}}}
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("as user %d: %v: %s\n%s", uid, err, errs.String(), text)
	}
	return strings.TrimSpace(string(out))
}

// TestReadmeCurl does what README.md says under "Run it" and "The main job with curl alone", with its own commands and
// its own users, and finds the output that it shows.
func TestReadmeCurl(t *testing.T) {
	for _, name := range []string{"bash", "curl", "jq"} {
		tool(t, name)
	}
	readme := readDoc(t, "README.md")
	l := start(t, lab.Options{})
	adds := regexp.MustCompile(`(?m)^ {4}trustd (agent add .*?)(?: +#.*)?$`)
	adding := adds.FindAllStringSubmatch(section(t, readme, "Run it"), -1)
	if len(adding) != 2 {
		t.Fatalf("agents are added in %q", adding)
	}
	for _, m := range adding {
		if r := l.Root(t.Context(), nil, strings.Fields(m[1])...); r.Code != 0 {
			t.Fatalf("trustd %s: exit %d: %s", m[1], r.Code, r.Stderr)
		}
	}

	job := section(t, readme, "The main job with curl alone")
	commands, output := fences(job)
	users := regexp.MustCompile(`As user (100[12]),`).FindAllStringSubmatch(job, -1)
	if len(commands) != 2 || len(users) != 2 || users[0][1] != "1001" || users[1][1] != "1002" || len(output[1]) != 2 {
		t.Fatalf("the section holds %d blocks and shows %q, for %q", len(commands), output, users)
	}
	const socket = "S=/run/trustd/agent.sock\n"
	if !strings.HasPrefix(commands[0], socket) {
		t.Fatalf("the commands do not begin with the socket: %s", commands[0])
	}
	here := "S=" + l.AgentSocket + "\n"
	dir := filepath.Join(l.Dir, "home")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(dir, 1001, 1001); err != nil {
		t.Fatal(err)
	}
	shell(t, 1001, dir, here+strings.TrimPrefix(commands[0], socket))
	for i, want := range output[1] {
		got := shell(t, 1002, dir, here+commands[1])
		if !likeShown(t, got, want) {
			t.Errorf("run %d prints\n%s\nREADME.md shows\n%s", i+1, got, want)
		}
	}

	// The section's last word is a command, too.
	m := regexp.MustCompile("`(curl [^`]*)`").FindStringSubmatch(job)
	if m == nil {
		t.Fatal("whoami is gone from the section")
	}
	got := shell(t, 1001, dir, here+m[1])
	if !strings.Contains(got, `"uid":1001`) || !strings.Contains(got, `"explanation"`) {
		t.Errorf("%s prints %s", m[1], got)
	}
	got = shell(t, 1001, dir, here+`curl -s --unix-socket $S http://trustd/openapi.json`)
	if !json.Valid([]byte(got)) {
		t.Errorf("/openapi.json is %.200s", got)
	}
}

// likeShown compares members with what a document shows; "..." stands for anything.
func likeShown(t *testing.T, got, shown string) bool {
	t.Helper()
	var g, s map[string]any
	if err := json.Unmarshal([]byte(shown), &s); err != nil {
		t.Fatalf("what is shown is not JSON: %v: %s", err, shown)
	}
	if err := json.Unmarshal([]byte(got), &g); err != nil || len(g) != len(s) {
		return false
	}
	for name, want := range s {
		text, ok := want.(string)
		if head, _, any := strings.Cut(text, "..."); ok && any {
			if have, _ := g[name].(string); len(have) <= len(head) || !strings.HasPrefix(have, head) {
				return false
			}
		} else if g[name] != want {
			return false
		}
	}
	return true
}

// documents are the files that people read.
func documents(t *testing.T) []string {
	t.Helper()
	var out []string
	for _, pattern := range []string{"*.md", "docs/*.md", "docs/*/*.md"} {
		found, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, found...)
	}
	if len(out) < 8 {
		t.Fatalf("only %v", out)
	}
	return out
}

var (
	linkPattern    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	headingPattern = regexp.MustCompile(`(?m)^#+ +(.*)$`)
	mentionPattern = regexp.MustCompile("(?:^|[\\s`(])((?:docs|scripts|packaging)/[A-Za-z0-9_./-]*[A-Za-z0-9/])")
)

// anchors returns the names under which a document's headings are linked.
func anchors(doc string) []string {
	var out []string
	for _, m := range headingPattern.FindAllStringSubmatch(doc, -1) {
		name := regexp.MustCompile(`[^\p{L}\p{N} _-]`).ReplaceAllString(strings.ToLower(m[1]), "")
		out = append(out, strings.ReplaceAll(name, " ", "-"))
	}
	return out
}

// TestDocumentLinks: what a document points to is there.
func TestDocumentLinks(t *testing.T) {
	links := 0
	for _, path := range documents(t) {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range linkPattern.FindAllStringSubmatch(string(b), -1) {
			if strings.Contains(m[1], "://") || strings.HasPrefix(m[1], "mailto:") {
				continue
			}
			links++
			file, anchor, _ := strings.Cut(m[1], "#")
			target := path
			if file != "" {
				target = filepath.Join(filepath.Dir(path), file)
			}
			there, err := os.ReadFile(target)
			if fi, e := os.Stat(target); e == nil && fi.IsDir() {
				err = nil
			}
			if err != nil {
				t.Errorf("%s links to %s: %v", path, m[1], err)
			} else if anchor != "" && !slices.Contains(anchors(string(there)), anchor) {
				t.Errorf("%s links to %s, which has no such heading", path, m[1])
			}
		}
		for _, m := range mentionPattern.FindAllStringSubmatch(string(b), -1) {
			if _, err := os.Stat(filepath.Join(root, m[1])); err != nil {
				t.Errorf("%s speaks of %s: %v", path, m[1], err)
			}
		}
	}
	if links < 10 {
		t.Errorf("only %d links", links)
	}
}

// commandTree returns the help of every command of the binary, by its name. What cobra adds to each program, help and
// the shells of completion, is left out.
func commandTree(t *testing.T) map[string]string {
	t.Helper()
	bin, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	tree := map[string]string{}
	row := regexp.MustCompile(`(?m)^  ([a-z-]+) +\S`)
	var walk func(name string)
	walk = func(name string) {
		cmd := exec.CommandContext(t.Context(), filepath.Join(bin, "trustd"), append(strings.Fields(name), "--help")...)
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("trustd %s --help: %v", name, err)
		}
		tree[name] = string(out)
		_, below, ok := strings.Cut(string(out), "Available Commands:\n")
		if !ok || name == "completion" {
			return
		}
		below, _, _ = strings.Cut(below, "\n\n")
		for _, m := range row.FindAllStringSubmatch(below, -1) {
			if m[1] != "help" {
				walk(strings.TrimSpace(name + " " + m[1]))
			}
		}
	}
	walk("")
	return tree
}

// TestCommandDocument holds docs/cli.md to the commands and flags that there are.
func TestCommandDocument(t *testing.T) {
	tree := commandTree(t)
	table := section(t, readDoc(t, "docs/cli.md"), "Commands")
	word := regexp.MustCompile("`([^`]+)`")
	flag := regexp.MustCompile(`--[a-z][a-z-]*`)
	listed := map[string]bool{}
	for line := range strings.Lines(table) {
		cells := strings.Split(line, "|")
		if len(cells) < 4 || strings.HasPrefix(cells[1], "---") || strings.TrimSpace(cells[1]) == "command" {
			continue
		}
		names := word.FindAllStringSubmatch(cells[1], -1)
		if len(names) == 0 {
			t.Errorf("no command in %s", line)
		}
		for _, m := range names {
			var parts []string
			for _, w := range strings.Fields(m[1]) {
				if strings.ToLower(w) != w || strings.HasPrefix(w, "-") {
					break
				}
				parts = append(parts, w)
			}
			name := strings.Join(parts, " ")
			help, ok := tree[name]
			if !ok {
				t.Errorf("docs/cli.md lists %q, which is no command", name)
				continue
			}
			listed[name] = true
			for _, f := range flag.FindAllString(line, -1) {
				if !regexp.MustCompile(regexp.QuoteMeta(f) + `\b`).MatchString(help) {
					t.Errorf("docs/cli.md speaks of %s of %q, which has none", f, name)
				}
			}
		}
	}
	for name, help := range tree {
		group := strings.Contains(help, "Available Commands:") && name != "completion"
		if !group && !listed[name] {
			t.Errorf("docs/cli.md does not list %q", name)
		}
	}
	// The flags of the other table stand at every command.
	for _, f := range flag.FindAllString(section(t, readDoc(t, "docs/cli.md"), "Where it looks"), -1) {
		if !strings.Contains(tree[""], f) {
			t.Errorf("docs/cli.md speaks of %s, which trustd has not", f)
		}
	}
}

// TestReadmeCommands: what the documents tell readers to type is there to be typed.
func TestReadmeCommands(t *testing.T) {
	tree := commandTree(t)
	makefile := readDoc(t, "Makefile")
	typed := regexp.MustCompile("(?m)(?:^ {4}|`)trustd ([a-z][a-z -]*)")
	target := regexp.MustCompile("(?m)(?:^ {4}|`)make ([a-z-]+)")
	for _, path := range documents(t) {
		if strings.Contains(path, "/formats/") { // which hold no commands, but the names of formats: trustd signature history
			continue
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range typed.FindAllStringSubmatch(string(b), -1) {
			words := strings.Fields(m[1])
			name := words[0]
			if len(words) > 1 && strings.Contains(tree[name], "Available Commands:") {
				name += " " + words[1]
			}
			if _, ok := tree[name]; !ok {
				t.Errorf("%s says trustd %s, which is no command", path, m[1])
			}
		}
		for _, m := range target.FindAllStringSubmatch(string(b), -1) {
			if !strings.Contains(makefile, "\n"+m[1]+":") {
				t.Errorf("%s says make %s, which is no target", path, m[1])
			}
		}
	}
}

// TestThreatsAreProved: a test cites each threat that SECURITY.md says is defended, and the packages that it names are
// there.
func TestThreatsAreProved(t *testing.T) {
	security := readDoc(t, "SECURITY.md")
	id := regexp.MustCompile(`\bT-[A-Z]+-[0-9]+\b`)
	rows := regexp.MustCompile(`(?m)^\| (T-[A-Z]+-[0-9]+) \|.*\| ([^|]*) \|$`).FindAllStringSubmatch(security, -1)
	if len(rows) < 15 {
		t.Fatalf("SECURITY.md has %d rows", len(rows))
	}
	cited := map[string]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if name := d.Name(); d.IsDir() && path != root && (strings.HasPrefix(name, ".") || name == "bin" || name == "dist") {
			return fs.SkipDir
		}
		if !strings.HasSuffix(path, "_test.go") {
			return nil
		}
		b, err := os.ReadFile(path)
		for _, found := range id.FindAllString(string(b), -1) {
			cited[found] = cmp.Or(cited[found], path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range rows {
		if cited[row[1]] == "" {
			t.Errorf("no test cites %s, which SECURITY.md says is proved by %s", row[1], row[2])
		}
		for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(row[2], -1) {
			if fi, err := os.Stat(filepath.Join(root, m[1])); err != nil || !fi.IsDir() {
				t.Errorf("%s is proved by %s, which is not there", row[1], m[1])
			}
		}
	}
	for found, path := range cited {
		if !strings.Contains(security, "| "+found+" |") {
			t.Errorf("%s cites %s, which SECURITY.md does not have", path, found)
		}
	}
}
