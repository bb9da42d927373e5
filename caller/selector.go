package caller

import (
	"path"
	"slices"
	"strings"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/fault"
)

// CheckSelector says whether a selector can be used: each member has its form, and at least one is a boundary. The
// program alone is none, because whoever runs as a user decides what the user's programs do.
func CheckSelector(s api.Selector) error {
	for _, id := range []struct {
		field string
		value *uint32
	}{{"uid", s.UID}, {"gid", s.GID}, {"group", s.Group}} {
		if id.value != nil && *id.value == 1<<32-1 {
			return fault.BadField(id.field, "not the number of a user or group")
		}
	}
	if s.Cgroup != "" {
		switch {
		case !cleanPath(s.Cgroup) || strings.HasPrefix(s.Cgroup, "/../"):
			return fault.BadField("cgroup", "not an absolute path in its shortest form")
		case s.Cgroup == "/":
			return fault.BadField("cgroup", "the root of all control groups sets nobody apart")
		case delegated(s.Cgroup):
			return fault.BadField("cgroup", "below a user's own service manager, the user decides who is in a control group")
		}
	}
	if s.SystemdUnit != "" && (!unitName(s.SystemdUnit) || delegated(s.SystemdUnit)) {
		return fault.BadField("systemd_unit", "not the name of a system unit that holds processes")
	}
	if s.Exe != "" && (!cleanPath(s.Exe) || s.Exe == "/" || strings.HasSuffix(s.Exe, deletedSuffix)) {
		return fault.BadField("exe", "not an absolute path in its shortest form")
	}
	if s.ExeSHA256 != "" && !hexSum(s.ExeSHA256) {
		return fault.BadField("exe_sha256", "not 64 lower-case hexadecimal digits")
	}
	if bounded(s) {
		return nil
	}
	field := "selector"
	switch {
	case s.Exe != "":
		field = "exe"
	case s.ExeSHA256 != "":
		field = "exe_sha256"
	}
	return fault.BadField(field, "a selector needs one of uid, gid, group, cgroup, systemd_unit; a program only narrows")
}

// bounded says whether a selector sets anybody apart.
func bounded(s api.Selector) bool {
	return s.UID != nil || s.GID != nil || s.Group != nil || s.Cgroup != "" || s.SystemdUnit != ""
}

func cleanPath(p string) bool {
	control := func(r rune) bool { return r < ' ' }
	return strings.HasPrefix(p, "/") && path.Clean(p) == p && !strings.ContainsFunc(p, control)
}

func hexSum(s string) bool {
	return len(s) == 64 && strings.Trim(s, "0123456789abcdef") == ""
}

// Match says whether a caller is one that the selector means, and else why not. All members must match; what they
// are compared with is as of the last Recheck, which must come first. The reason is for the log and for the
// operator; it holds no value of either side.
func Match(s api.Selector, c *Caller) (bool, string) {
	if c == nil || c.process == nil {
		return false, "the caller is not known"
	}
	if !bounded(s) {
		return false, "the selector names no boundary"
	}
	if s.UID != nil && *s.UID != c.UID {
		return false, "the process is another user's"
	}
	if s.GID != nil && *s.GID != c.GID {
		return false, "the process has another group"
	}
	if s.Group != nil && *s.Group != c.GID {
		groups, err := c.process.groups()
		if err != nil {
			return false, reason(err)
		}
		if !slices.Contains(groups, *s.Group) {
			return false, "the process is not in the group"
		}
	}
	if ok, why := c.matchGroup(s); !ok {
		return false, why
	}
	return c.matchProgram(s)
}

// matchGroup compares the control group and the unit.
func (c *Caller) matchGroup(s api.Selector) (bool, string) {
	if s.Cgroup == "" && s.SystemdUnit == "" {
		return true, ""
	}
	g, err := c.process.group()
	if err != nil {
		return false, reason(err)
	}
	if s.SystemdUnit != "" && s.SystemdUnit != g.unit {
		if g.problem != "" {
			return false, g.problem
		}
		return false, "the process is in another unit"
	}
	if s.Cgroup == "" {
		return true, ""
	}
	if s.Cgroup == "/" {
		return false, "the root of all control groups sets nobody apart"
	}
	return g.within(c.process.host, s.Cgroup)
}

// matchProgram comes last: only a caller within the boundaries makes the daemon look at a file. The path is the
// selector's by then, so that no caller chooses what the daemon looks at.
func (c *Caller) matchProgram(s api.Selector) (bool, string) {
	if s.Exe == "" && s.ExeSHA256 == "" {
		return true, ""
	}
	g, err := c.process.program()
	if err != nil {
		return false, reason(err)
	}
	if g.problem != "" {
		return false, g.problem
	}
	if s.Exe != "" {
		if g.path != s.Exe {
			return false, "the process runs another program"
		}
		if why := g.hosts(); why != "" {
			return false, why
		}
	}
	if s.ExeSHA256 != "" {
		sum, err := c.process.sum()
		if err != nil {
			return false, reason(err)
		}
		if sum != s.ExeSHA256 {
			return false, "the program has another content"
		}
	}
	return true, ""
}

func reason(err error) string {
	if e := fault.From(err); e.Text != "" {
		return e.Text
	}
	return fault.CodeOf(err).Title()
}

// MatchAny says whether one of the bindings lets the caller use the verb. A binding without verbs is one for sign
// and verify.
func MatchAny(bindings []api.Binding, c *Caller, verb string) bool {
	for i := range bindings {
		if allows(bindings[i].Verbs, verb) {
			if ok, _ := Match(bindings[i].Selector, c); ok {
				return true
			}
		}
	}
	return false
}

func allows(verbs []string, verb string) bool {
	if len(verbs) == 0 {
		return verb == api.VerbSign || verb == api.VerbVerify
	}
	return slices.Contains(verbs, verb)
}
