package config_test

import (
	"bytes"
	"reflect"
	"strings"
	"testing"

	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/config"
	"github.com/trustd/trustd/internal/secret"
)

const kms = "[[backend]]\nname = \"kms\"\nkind = \"plugin\"\nplugin = \"/usr/libexec/trustd-kms\"\n"

var sum = "plugin_sha256 = \"" + strings.Repeat("5a", 32) + "\"\n"

func TestPluginBackend(t *testing.T) {
	text := kms + sum + `pin = { file = "/etc/trustd/kms" }
settings = { endpoint = "https://kms.example", "key.ring" = "agents" }
env = { HTTPS_PROXY = "http://proxy.example:3128" }
memory_limit = 512
open_files = 1024
deadline = "3s"
`
	c := parse(t, text)
	want := config.Backend{
		Name: "kms", Kind: config.Plugin, Plugin: "/usr/libexec/trustd-kms", PluginSHA256: strings.Repeat("5a", 32),
		PIN:      secret.Source{File: "/etc/trustd/kms"},
		Settings: map[string]string{"endpoint": "https://kms.example", "key.ring": "agents"},
		Env:      map[string]string{"HTTPS_PROXY": "http://proxy.example:3128"}, MemoryLimit: 512, OpenFiles: 1024,
	}
	got := c.Backends[0]
	got.Deadline = config.Duration{}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v\nwant %+v", got, want)
	}
	var b bytes.Buffer
	if err := c.Print(&b); err != nil {
		t.Fatal(err)
	}
	if again := parse(t, b.String()); !reflect.DeepEqual(again, c) {
		t.Errorf("printed and read again: %+v", again)
	}
	parse(t, kms+"dev = true\n")
	parse(t, minimal+"plugin = \"/p\"\n"+sum)
	parse(t, minimal+"plugin = \"/p\"\ndev = true\n")
}

func TestPluginBackendRefused(t *testing.T) {
	for name, c := range map[string]struct{ text, field string }{
		"no checksum":             {kms, "backend.kms.plugin_sha256"},
		"no checksum of pkcs11":   {minimal + "plugin = \"/p\"", "backend.hsm.plugin_sha256"},
		"checksum and dev":        {kms + sum + "dev = true", "backend.kms.dev"},
		"no plugin":               {"[[backend]]\nname = \"kms\"\nkind = \"plugin\"\n" + sum, "backend.kms.plugin"},
		"relative plugin":         {strings.Replace(kms+sum, "/usr/", "usr/", 1), "backend.kms.plugin"},
		"module":                  {kms + sum + "module = \"/m.so\"", "backend.kms.module"},
		"settings of pkcs11":      {minimal + "settings = {a = \"b\"}", "backend.hsm.settings"},
		"odd name":                {kms + sum + "settings = {\"a b\" = \"c\"}", "backend.kms.settings"},
		"long value":              {kms + sum + "settings = {a = \"" + strings.Repeat("b", 4097) + "\"}", "backend.kms.settings"},
		"NUL in a value":          {kms + sum + "settings = {a = \"\\u0000\"}", "backend.kms.settings"},
		"little memory":           {kms + sum + "memory_limit = 63", "backend.kms.memory_limit"},
		"negative memory":         {kms + sum + "memory_limit = -1", "backend.kms.memory_limit"},
		"few files":               {kms + sum + "open_files = 8", "backend.kms.open_files"},
		"dev of software":         {"[[backend]]\nname = \"a\"\nkind = \"soft\"\ndev = true", "backend.a.dev"},
		"preloaded library":       {kms + sum + "env = {LD_PRELOAD = \"/x.so\"}", "backend.kms.env"},
		"a secret that is no ref": {kms + sum + "pin = \"73915561\"", ""},
	} {
		_, err := config.Parse([]byte(c.text), "t")
		if err == nil {
			t.Errorf("%s passes", name)
			continue
		}
		if e := fault.From(err); c.field != "" && e.Field != c.field {
			t.Errorf("%s: the error is about %q: %v", name, e.Field, err)
		}
		if strings.Contains(err.Error(), "73915561") {
			t.Errorf("%s: the error quotes the secret", name)
		}
	}
}
