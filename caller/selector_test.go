package caller_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/trustd/trustd/api"
	"github.com/trustd/trustd/caller"
	"github.com/trustd/trustd/fault"
)

func TestCheckSelector(t *testing.T) {
	sum := strings.Repeat("0af", 21) + "1"
	for name, c := range map[string]struct {
		s     api.Selector
		field string // "" where it is good
	}{
		"uid":    {api.Selector{UID: ptr(0)}, ""},
		"gid":    {api.Selector{GID: ptr(5)}, ""},
		"group":  {api.Selector{Group: ptr(5)}, ""},
		"cgroup": {api.Selector{Cgroup: "/system.slice/a.service"}, ""},
		"unit":   {api.Selector{SystemdUnit: "a@b.service"}, ""},
		"all": {api.Selector{UID: ptr(1), GID: ptr(2), Group: ptr(3), Cgroup: "/a", SystemdUnit: "a.service",
			Exe: "/bin/a", ExeSHA256: sum}, ""},
		"nothing":          {api.Selector{}, "selector"},
		"exe alone":        {api.Selector{Exe: "/bin/a"}, "exe"},
		"hash alone":       {api.Selector{ExeSHA256: sum}, "exe_sha256"},
		"exe and hash":     {api.Selector{Exe: "/bin/a", ExeSHA256: sum}, "exe"},
		"uid -1":           {api.Selector{UID: ptr(1<<32 - 1)}, "uid"},
		"gid -1":           {api.Selector{GID: ptr(1<<32 - 1)}, "gid"},
		"group -1":         {api.Selector{Group: ptr(1<<32 - 1)}, "group"},
		"root cgroup":      {api.Selector{Cgroup: "/"}, "cgroup"},
		"relative cgroup":  {api.Selector{Cgroup: "a"}, "cgroup"},
		"unclean cgroup":   {api.Selector{Cgroup: "/a/../b"}, "cgroup"},
		"outer cgroup":     {api.Selector{Cgroup: "/../b"}, "cgroup"},
		"ending in slash":  {api.Selector{Cgroup: "/a/"}, "cgroup"},
		"delegated cgroup": {api.Selector{Cgroup: "/user.slice/user-1.slice/user@1.service/a"}, "cgroup"},
		"user manager":     {api.Selector{SystemdUnit: "user@1000.service"}, "systemd_unit"},
		"slice":            {api.Selector{SystemdUnit: "a.slice"}, "systemd_unit"},
		"path as unit":     {api.Selector{SystemdUnit: "a/b.service"}, "systemd_unit"},
		"bare unit":        {api.Selector{SystemdUnit: ".service"}, "systemd_unit"},
		"relative exe":     {api.Selector{UID: ptr(1), Exe: "a"}, "exe"},
		"unclean exe":      {api.Selector{UID: ptr(1), Exe: "/a//b"}, "exe"},
		"deleted exe":      {api.Selector{UID: ptr(1), Exe: "/a (deleted)"}, "exe"},
		"exe with newline": {api.Selector{UID: ptr(1), Exe: "/a\nb"}, "exe"},
		"short hash":       {api.Selector{UID: ptr(1), ExeSHA256: sum[1:]}, "exe_sha256"},
		"upper-case hash":  {api.Selector{UID: ptr(1), ExeSHA256: strings.ToUpper(sum)}, "exe_sha256"},
		"hash with prefix": {api.Selector{UID: ptr(1), ExeSHA256: "sha256:" + sum[7:]}, "exe_sha256"},
	} {
		err := caller.CheckSelector(c.s)
		if c.field == "" {
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		var e *fault.Error
		if !errors.As(err, &e) || e.Code != fault.Malformed || e.Field != c.field {
			t.Errorf("%s: %v, want field %s", name, err, c.field)
		}
	}
}

func TestVerbs(t *testing.T) {
	me, err := caller.Self()
	if err != nil {
		t.Fatal(err)
	}
	mine := api.Selector{UID: &me.UID}
	for name, c := range map[string]struct {
		bindings []api.Binding
		verb     string
		want     bool
	}{
		"default sign":    {[]api.Binding{{Selector: mine}}, api.VerbSign, true},
		"default verify":  {[]api.Binding{{Selector: mine}}, api.VerbVerify, true},
		"default operate": {[]api.Binding{{Selector: mine}}, api.VerbOperate, false},
		"named":           {[]api.Binding{{Selector: mine, Verbs: []string{api.VerbOperate}}}, api.VerbOperate, true},
		"only the named":  {[]api.Binding{{Selector: mine, Verbs: []string{api.VerbVerify}}}, api.VerbSign, false},
		"the second":      {[]api.Binding{{Selector: mine, Verbs: []string{"x"}}, {Selector: mine}}, api.VerbSign, true},
		"none":            {nil, api.VerbSign, false},
		"empty verb":      {[]api.Binding{{Selector: mine}}, "", false},
		"no boundary":     {[]api.Binding{{Selector: api.Selector{Exe: me.Exe}}}, api.VerbSign, false},
	} {
		if got := caller.MatchAny(c.bindings, me, c.verb); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// hierarchy returns where the control groups are mounted that the service manager would use.
func hierarchy(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	found := ""
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		switch {
		case strings.Contains(line, " - cgroup ") && strings.Contains(line, "name=systemd"):
			return f[4]
		case strings.Contains(line, " - cgroup2 "):
			found = f[4]
		}
	}
	return found
}

// cgroup makes a control group, with the groups above it, that goes away with the test.
func cgroup(t *testing.T, root, path string) string {
	t.Helper()
	at := root
	for c := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
		at = filepath.Join(at, c)
		made := at
		err := os.Mkdir(made, 0o755)
		if errors.Is(err, os.ErrExist) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := os.Remove(made); err != nil {
				t.Errorf("removing a control group: %v", err)
			}
		})
	}
	return at
}

// TestControlGroups covers caller-7.
func TestControlGroups(t *testing.T) {
	needRoot(t)
	root := hierarchy(t)
	if root == "" {
		t.Fatal("there are no control groups here")
	}
	dir := folder(t)
	l, exe := listen(t, dir), program(t, dir, "agent", "")
	top := "/trustdtest" + strconv.Itoa(os.Getpid()) + ".slice"
	place := func(path string) *caller.Caller {
		at := cgroup(t, root, top+path)
		ch := launch(t, exe, planner, nil)
		if err := os.WriteFile(filepath.Join(at, "cgroup.procs"), []byte(strconv.Itoa(ch.pid())), 0); err != nil {
			t.Fatal(err)
		}
		ch.do("dial", l.Addr().String())
		who := identified(t, accept(t, l))
		if who.Cgroup != top+path {
			t.Fatalf("the process is in %s, want %s", who.Cgroup, top+path)
		}
		return who
	}
	for _, p := range []string{"/given", "/given/agent.service"} {
		cgroup(t, root, top+p)
	}
	if err := os.Chown(filepath.Join(root, top, "given"), planner, planner); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		path, unit string
		cgroups    map[string]bool
		explained  string
	}{
		"unit": {"/agent.service", "agent.service", map[string]bool{
			top + "/agent.service": true, top: true, top + "/agent": false, top + "/agent.service/x": false, "/": false,
		}, "systemd_unit agent.service: boundary"},
		"below a unit": {"/agent.service/x/other.service", "agent.service", map[string]bool{
			top + "/agent.service": true, top + "/agent.service/x/other.service": true,
		}, "systemd_unit agent.service: boundary"},
		"a user's own": {"/user@64101.service/app.slice/agent.service", "", map[string]bool{
			top: false, top + "/user@64101.service/app.slice/agent.service": false,
		}, "does not count: it lies in a subtree that is delegated to a user"},
		"a user's folder": {"/given/agent.service", "", map[string]bool{
			top + "/given/agent.service": false, top + "/given": true,
		}, "does not count: it lies in a subtree that is delegated to a user"},
		"no unit": {"/box/agent.service", "", map[string]bool{top + "/box": true}, "systemd_unit: none"},
	} {
		t.Run(name, func(t *testing.T) {
			who := place(c.path)
			if who.Unit != c.unit {
				t.Errorf("the unit is %q, want %q", who.Unit, c.unit)
			}
			for _, unit := range []string{"agent.service", "other.service", "user@64101.service"} {
				if got, why := caller.Match(api.Selector{SystemdUnit: unit}, who); got != (unit == c.unit) {
					t.Errorf("unit %s: %v (%s)", unit, got, why)
				}
			}
			for g, want := range c.cgroups {
				if got, why := caller.Match(api.Selector{Cgroup: g}, who); got != want {
					t.Errorf("cgroup %s: %v (%s)", g, got, why)
				}
			}
			if all := strings.Join(who.Whoami(true).Explanation, "\n"); !strings.Contains(all, c.explained) {
				t.Errorf("the explanation lacks %q:\n%s", c.explained, all)
			}
		})
	}
}

// TestMovedToAnotherGroup moves a process between two requests.
func TestMovedToAnotherGroup(t *testing.T) {
	needRoot(t)
	root := hierarchy(t)
	dir := folder(t)
	l, exe := listen(t, dir), program(t, dir, "agent", "")
	top := "/trustdmove" + strconv.Itoa(os.Getpid()) + ".slice"
	move := func(unit string, pid int) {
		at := cgroup(t, root, top+"/"+unit)
		if err := os.WriteFile(filepath.Join(at, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
			t.Fatal(err)
		}
	}
	cgroup(t, root, top+"/a.service")
	cgroup(t, root, top+"/b.service")
	ch := launch(t, exe, planner, func(*exec.Cmd) {})
	move("a.service", ch.pid())
	ch.do("dial", l.Addr().String())
	who := identified(t, accept(t, l))
	for _, unit := range []string{"a.service", "b.service"} {
		move(unit, ch.pid())
		if err := who.Recheck(); err != nil {
			t.Fatal(err)
		}
		for _, s := range []string{"a.service", "b.service"} {
			if got, why := caller.Match(api.Selector{SystemdUnit: s}, who); got != (s == unit) {
				t.Errorf("in %s, selector %s: %v (%s)", unit, s, got, why)
			}
		}
	}
}
