package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/fault"
	"github.com/trustd/trustd/internal/daemon"
)

func (a *app) doctorCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "doctor",
		Short: "Find out what is wrong, also with the daemon down, and say what to do",
		Long: `Doctor checks the configuration, files and their permissions, devices and, where it answers, the running daemon.
Exit code 0: all is well. 4: there are warnings. 1: something is broken.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			checks := a.diagnose(cmd)
			worst := exitOK
			for _, c := range checks {
				switch c.Status {
				case daemon.Failure:
					worst = exitError
				case daemon.Warning:
					if worst == exitOK {
						worst = exitWarnings
					}
				}
			}
			if a.output == "json" {
				if err := a.printJSON(map[string]any{"checks": checks, "healthy": worst == exitOK}); err != nil {
					return err
				}
			} else {
				a.showChecks(checks)
			}
			if worst != exitOK {
				return exit(worst)
			}
			return nil
		},
	}
}

func (a *app) diagnose(cmd *cobra.Command) []api.HealthCheck {
	c, err := a.load()
	if err != nil {
		return []api.HealthCheck{{Name: "configuration", Status: daemon.Failure, Text: err.Error(),
			Remedy: "Correct the file; trustd config check says where."}}
	}
	checks := []api.HealthCheck{{Name: "configuration", Status: daemon.OK}}
	admin, err := a.admin()
	if err != nil {
		return append(checks, api.HealthCheck{Name: "admin socket", Status: daemon.Failure, Text: err.Error()})
	}
	h, err := admin.Health(cmd.Context())
	if errors.Is(err, fault.Denied) {
		return append(checks, api.HealthCheck{Name: "admin socket", Status: daemon.Failure, Text: "this user may not open it",
			Remedy: "Run trustd doctor as the daemon's user, usually root."})
	}
	if err == nil {
		checks = append(checks, api.HealthCheck{Name: "daemon", Status: daemon.OK, Text: "answers; version " + h.Version})
		return append(checks, h.Checks...)
	}
	checks = append(checks, api.HealthCheck{Name: "daemon", Status: daemon.Warning, Text: "does not answer on " + c.AdminSocketPath(),
		Remedy: "Start it: trustd serve, or systemctl start trustd. Only root can reach the admin socket."})
	return append(checks, daemon.Diagnose(cmd.Context(), c)...)
}

func (a *app) showChecks(checks []api.HealthCheck) {
	for _, c := range checks {
		mark := a.colour(green, "ok     ")
		switch c.Status {
		case daemon.Warning:
			mark = a.colour(yellow, "warning")
		case daemon.Failure:
			mark = a.colour(red, "failure")
		}
		fmt.Fprintf(a.out, "%s  %-24s %s\n", mark, printable(c.Name), printableLines(c.Text))
		if c.Remedy != "" && c.Status != daemon.OK {
			fmt.Fprintf(a.out, "         %-24s %s\n", "", "-> "+printableLines(c.Remedy))
		}
	}
}
