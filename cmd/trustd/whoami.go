package main

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
)

func (a *app) whoamiCmd() *cobra.Command {
	var explain bool
	cmd := &cobra.Command{
		Use:   "whoami",
		Short: "Show what the daemon sees of this process and which agents it may act as",
		Args:  args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.agent()
			if err != nil {
				return err
			}
			w, err := c.Whoami(cmd.Context(), explain)
			if err != nil {
				return err
			}
			if a.output == "json" {
				return a.printJSON(w)
			}
			groups := make([]string, len(w.Groups))
			for i, g := range w.Groups {
				groups[i] = strconv.FormatUint(uint64(g), 10)
			}
			if err := a.pairs("uid", strconv.Itoa(int(w.UID)), "gid", strconv.Itoa(int(w.GID)), "groups", strings.Join(groups, " "),
				"pid", strconv.Itoa(int(w.PID)), "exe", w.Exe, "exe_sha256", w.ExeSHA256, "cgroup", w.Cgroup,
				"systemd_unit", w.SystemdUnit); err != nil {
				return err
			}
			for _, line := range w.Explanation {
				fmt.Fprintf(a.out, "  %s\n", printable(line))
			}
			fmt.Fprintln(a.out)
			if len(w.Agents) == 0 {
				fmt.Fprintln(a.out, "This caller may act as no agent.")
				return nil
			}
			rows := make([][]string, len(w.Agents))
			for i, g := range w.Agents {
				rows[i] = []string{g.AgentID, strings.Join(g.Verbs, ",")}
			}
			return a.table([]string{"AGENT", "MAY"}, rows)
		},
	}
	cmd.Flags().BoolVar(&explain, "explain", false, "say of each selector whether it is a boundary and whether it can be believed")
	return cmd
}
