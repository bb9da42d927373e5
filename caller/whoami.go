package caller

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/trustd/trustd/api"
)

// Whoami says what the daemon sees of the caller as of the last Recheck; its agents are for others to fill in.
// explain adds the hash of the program, for which the program may have to be read, and a line for each selector.
func (c *Caller) Whoami(explain bool) api.Whoami {
	w := api.Whoami{Groups: []uint32{}, Agents: []api.Grant{}}
	if c == nil {
		return w
	}
	w.UID, w.GID, w.PID = c.UID, c.GID, c.PID
	w.Exe, w.Cgroup, w.SystemdUnit = c.Exe, c.Cgroup, c.Unit
	w.Groups = append(w.Groups, c.Groups...)
	if !explain || c.process == nil {
		return w
	}
	w.ExeSHA256, _ = c.ExeSHA256()
	w.Explanation = c.explain()
	return w
}

const (
	isBoundary = "boundary"
	narrows    = "narrows only"
)

func (c *Caller) explain() []string {
	lines := []string{
		fmt.Sprintf("uid %d: %s", c.UID, isBoundary),
		fmt.Sprintf("gid %d: %s", c.GID, isBoundary),
		c.explainGroups(),
	}
	lines = append(lines, c.explainCgroup()...)
	return append(lines, c.explainProgram()...)
}

func (c *Caller) explainGroups() string {
	groups, err := c.process.groups()
	if err != nil {
		return "group: cannot be believed: " + reason(err)
	}
	all := []string{strconv.FormatUint(uint64(c.GID), 10)}
	for _, g := range groups {
		if g != c.GID {
			all = append(all, strconv.FormatUint(uint64(g), 10))
		}
	}
	return "group " + strings.Join(all, " or ") + ": " + isBoundary
}

func (c *Caller) explainCgroup() []string {
	g, err := c.process.group()
	if err != nil {
		return []string{"cgroup: cannot be believed: " + reason(err)}
	}
	name, unit := "cgroup "+shown(g.place), "systemd_unit: none"
	if g.unit != "" {
		unit = "systemd_unit " + shown(g.unit) + ": " + isBoundary
	}
	if ok, why := g.within(c.process.host, g.place); !ok {
		return []string{name + ": does not count: " + why, unit}
	}
	return []string{name + ": " + isBoundary, unit}
}

func (c *Caller) explainProgram() []string {
	g, err := c.process.program()
	if err != nil {
		return []string{"exe: cannot be believed: " + reason(err)}
	}
	exe, why := "exe "+shown(g.path), g.problem
	if why != "" {
		return []string{exe + ": cannot be believed: " + why}
	}
	if why = g.hosts(); why != "" {
		exe += ": cannot be believed: " + why
	} else {
		exe += ": " + narrows
	}
	sum, err := c.process.sum()
	if err != nil {
		return []string{exe, "exe_sha256: cannot be believed: " + reason(err)}
	}
	return []string{exe, "exe_sha256 " + sum + ": " + narrows}
}

// shown quotes a name that a terminal should not see as it is: callers choose the names of their programs.
func shown(s string) string {
	if q := strconv.QuoteToASCII(s); q != `"`+s+`"` {
		return q
	}
	return s
}
