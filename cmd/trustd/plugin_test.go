package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/trustd/trustd/internal/config"
	"github.com/trustd/trustd/signer/signertest/suite"
)

// block returns the first code block of docs/plugins.md in a language.
func block(t *testing.T, language string) string {
	t.Helper()
	text, err := os.ReadFile("../../docs/plugins.md")
	if err != nil {
		t.Fatal(err)
	}
	_, code, ok := strings.Cut(string(text), "\n```"+language+"\n")
	code, _, closed := strings.Cut(code, "\n```\n")
	if !ok || !closed {
		t.Fatalf("docs/plugins.md has no block of %s", language)
	}
	return code + "\n"
}

// buildPlugin builds a plugin of one file.
func buildPlugin(t *testing.T, source string) string {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "trustd-kms")
	if err := os.WriteFile(filepath.Join(dir, "main.go"), []byte(source), 0o600); err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "build", "-o", path, filepath.Join(dir, "main.go"))
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the plugin: %v\n%s", err, out)
	}
	return path
}

func command(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(t.Context(), args, stdio{strings.NewReader(""), &out, &errs})
	return code, out.String(), errs.String()
}

// TestPluginGuide builds the plugin of docs/plugins.md and has it tested, as the guide tells its reader to.
func TestPluginGuide(t *testing.T) {
	path := buildPlugin(t, block(t, "go"))
	dir := t.TempDir()
	code, out, errs := command(t, "plugin", "test", path, "--setting", "dir="+dir)
	if code != exitOK {
		t.Fatalf("exit code %d\n%s%s", code, out, errs)
	}
	for _, check := range []string{"Describe", "Sign", "Concurrency", "Reopen", "Restart"} {
		if !strings.Contains(out, "\n"+check+" ") {
			t.Errorf("no check %s in\n%s", check, out)
		}
	}
	if strings.Contains(out, "failed") || !strings.Contains(out, "Import       skipped") {
		t.Errorf("the table:\n%s", out)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("the test leaves %v, %v", left, err)
	}

	code, out, errs = command(t, "plugin", "test", path, "--setting", "dir="+filepath.Join(dir, "none"), "--output", "json")
	var v verdict
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		t.Fatalf("%v\n%s%s", err, out, errs)
	}
	if code != exitError || v.Passed || len(v.Checks) != 1 || v.Checks[0].Result != suite.Failed ||
		!strings.Contains(v.Checks[0].Detail, "the key service does not answer") {
		t.Errorf("without its folder: exit code %d, %+v", code, v)
	}

	code, out, errs = command(t, "plugin", "test", path, "--setting", "dir="+dir, "--sha256", strings.Repeat("00", 32))
	if code != exitError || !strings.Contains(out, "not the one whose checksum is pinned") {
		t.Errorf("with another checksum: exit code %d\n%s%s", code, out, errs)
	}

	code, out, errs = command(t, "plugin", "info", path)
	if code != exitOK || !strings.Contains(out, "plugin_sha256 = \"") || !strings.Contains(out, "protocol") {
		t.Errorf("info: exit code %d\n%s%s", code, out, errs)
	}
	_, lines, _ := strings.Cut(out, "\n\n")
	if _, err := config.Parse([]byte("[[backend]]\nname = \"kms\"\nkind = \"plugin\"\n"+lines), "info"); err != nil {
		t.Errorf("the lines to paste: %v\n%s", err, lines)
	}
	if _, err := config.Parse([]byte(block(t, "toml")), "the guide"); err != nil {
		t.Errorf("the guide's configuration: %v", err)
	}
}

// TestPluginTestFinds has a plugin that breaks the contract in one place.
func TestPluginTestFinds(t *testing.T) {
	source := block(t, "go")
	broken := strings.Replace(source, "err == nil && !k.public.Equal(pub)", "err != nil", 1)
	if broken == source {
		t.Fatal("the guide's plugin has changed")
	}
	code, out, errs := command(t, "plugin", "test", buildPlugin(t, broken), "--setting", "dir="+t.TempDir())
	if code != exitError || !strings.Contains(out, "Open         failed") || !strings.Contains(out, "Sign         passed") {
		t.Errorf("exit code %d\n%s%s", code, out, errs)
	}
}

func TestPluginUsage(t *testing.T) {
	for _, c := range []struct {
		code int
		args []string
	}{
		{exitUsage, []string{"plugin", "test"}},
		{exitUsage, []string{"plugin", "test", "/x", "--setting", "novalue"}},
		{exitUsage, []string{"plugin", "test", "/x", "--algorithm", "rot13"}},
		{exitError, []string{"plugin", "test", filepath.Join(t.TempDir(), "none")}},
		{exitNotFound, []string{"plugin", "info", filepath.Join(t.TempDir(), "none")}},
		{exitError, []string{"plugin", "info", "/bin/true"}},
	} {
		if code, out, errs := command(t, c.args...); code != c.code {
			t.Errorf("%v: exit code %d\n%s%s", c.args, code, out, errs)
		}
	}
	if _, out, _ := command(t, "--help"); strings.Contains(out, "test.") {
		t.Errorf("flags of package testing are in the help:\n%s", out)
	}
}
