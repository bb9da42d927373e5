package main

import (
	"cmp"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/trustd/trustd/internal/config"
)

func (a *app) configCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Check the configuration, or print what is in force",
		Args:  args(cobra.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(
		&cobra.Command{
			Use:   "check [FILE]",
			Short: "Check a configuration file: form, names, values",
			Args:  args(cobra.MaximumNArgs(1)),
			RunE: func(_ *cobra.Command, given []string) error {
				path := cmp.Or(first(given), a.configPath, os.Getenv("TRUSTD_CONFIG"), config.DefaultPath)
				if _, err := config.Load(path); err != nil {
					return err
				}
				if a.output == "json" {
					return a.printJSON(map[string]any{"file": path, "valid": true})
				}
				_, err := fmt.Fprintf(a.out, "%s: valid\n", path)
				return err
			},
		},
		&cobra.Command{
			Use:   "print",
			Short: "Print the configuration in force, defaults included; secrets are references and stay so",
			Args:  args(cobra.NoArgs),
			RunE: func(*cobra.Command, []string) error {
				c, err := a.load()
				if err != nil {
					return err
				}
				if a.output == "json" {
					return a.printJSON(c)
				}
				return c.Print(a.out)
			},
		},
	)
	return cmd
}
