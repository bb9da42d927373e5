// Command sbom prints a CycloneDX 1.6 bill of materials of Go binaries, from the build information in them.
package main

import (
	"cmp"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
)

type hash struct {
	Alg     string `json:"alg"`
	Content string `json:"content"`
}

type component struct {
	Type    string `json:"type"`
	Name    string `json:"name"`
	Version string `json:"version"`
	PURL    string `json:"purl,omitempty"`
	BOMRef  string `json:"bom-ref"`
	Hashes  []hash `json:"hashes,omitempty"`
}

type dependency struct {
	Ref       string   `json:"ref"`
	DependsOn []string `json:"dependsOn"`
}

type bom struct {
	Format       string         `json:"bomFormat"`
	SpecVersion  string         `json:"specVersion"`
	Version      int            `json:"version"`
	Metadata     map[string]any `json:"metadata"`
	Components   []component    `json:"components"`
	Dependencies []dependency   `json:"dependencies"`
}

func main() {
	version := flag.String("version", "dev", "version of the release")
	flag.Parse()
	if err := run(*version, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "sbom:", err)
		os.Exit(1)
	}
}

func run(version string, binaries []string) error {
	b := bom{Format: "CycloneDX", SpecVersion: "1.6", Version: 1, Metadata: map[string]any{
		"component": component{Type: "application", Name: "trustd", Version: version, BOMRef: "trustd"},
	}}
	modules := map[string]component{}
	for _, path := range binaries {
		info, err := buildinfo.ReadFile(path)
		if err != nil {
			return fmt.Errorf("reading the build information: %w", err)
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		sum := sha256.Sum256(data)
		ref := "file:" + filepath.Base(path)
		b.Components = append(b.Components, component{Type: "application", Name: filepath.Base(path), Version: version, BOMRef: ref,
			Hashes: []hash{{"SHA-256", hex.EncodeToString(sum[:])}}})
		dep := dependency{Ref: ref}
		std := component{Type: "library", Name: "std", Version: strings.TrimPrefix(info.GoVersion, "go"),
			PURL: "pkg:golang/std@" + strings.TrimPrefix(info.GoVersion, "go")}
		std.BOMRef = std.PURL
		modules[std.PURL] = std
		dep.DependsOn = append(dep.DependsOn, std.PURL)
		for _, m := range info.Deps {
			if m.Replace != nil {
				m = m.Replace
			}
			c := library(m)
			modules[c.PURL] = c
			dep.DependsOn = append(dep.DependsOn, c.PURL)
		}
		slices.Sort(dep.DependsOn)
		b.Dependencies = append(b.Dependencies, dep)
	}
	for _, c := range modules {
		b.Components = append(b.Components, c)
	}
	slices.SortFunc(b.Components, func(x, y component) int {
		return cmp.Or(cmp.Compare(x.Type, y.Type), cmp.Compare(x.BOMRef, y.BOMRef))
	})
	enc := json.NewEncoder(os.Stdout)
	enc.SetIndent("", "  ")
	return enc.Encode(b)
}

// library returns the component of a module. A go.sum hash (h1:) is the SHA-256 of a list of file hashes, which
// CycloneDX has no name for; it is left in the package URL's qualifiers.
func library(m *debug.Module) component {
	purl := fmt.Sprintf("pkg:golang/%s@%s", m.Path, m.Version)
	if raw, ok := strings.CutPrefix(m.Sum, "h1:"); ok {
		if sum, err := base64.StdEncoding.DecodeString(raw); err == nil {
			purl += "?h1=" + hex.EncodeToString(sum)
		}
	}
	return component{Type: "library", Name: m.Path, Version: m.Version, PURL: purl, BOMRef: purl}
}
