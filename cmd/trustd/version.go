package main

import (
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// version is set by the release build; a build from a checkout says "dev".
var version = "dev"

func (a *app) versionCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version and what it was built from",
		Args:  args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			v := map[string]string{"version": version, "go": runtime.Version(), "platform": runtime.GOOS + "/" + runtime.GOARCH}
			if info, ok := debug.ReadBuildInfo(); ok {
				for _, s := range info.Settings {
					switch s.Key {
					case "vcs.revision", "vcs.time", "CGO_ENABLED":
						v[s.Key] = s.Value
					}
				}
			}
			if a.output == "json" {
				return a.printJSON(v)
			}
			return a.pairs("trustd", v["version"], "go", v["go"], "platform", v["platform"], "commit", v["vcs.revision"],
				"committed", v["vcs.time"], "cgo", v["CGO_ENABLED"])
		},
	}
}
