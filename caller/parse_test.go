package caller

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const aStatus = "Name:\tx\\nUid:\t0 0 0 0\nUmask:\t0022\nState:\tS (sleeping)\nTgid:\t42\nNgid:\t0\nPid:\t43\n" +
	"Uid:\t1000\t1001\t1002\t1003\nGid:\t1\t2\t3\t4\nFDSize:\t64\nGroups:\t4 24 27 \nVmPeak:\t 1 kB\n"

func TestParseStatus(t *testing.T) {
	got, err := parseStatus([]byte(aStatus))
	want := status{42, [4]uint32{1000, 1001, 1002, 1003}, [4]uint32{1, 2, 3, 4}, []uint32{4, 24, 27}}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("parseStatus = %+v, %v", got, err)
	}
	for name, change := range map[string][2]string{
		"no Tgid":         {"Tgid:\t42\n", ""},
		"no Uid":          {"Uid:\t1000\t1001\t1002\t1003\n", ""},
		"no Groups":       {"Groups:\t4 24 27 \n", ""},
		"Uid twice":       {"Gid:", "Uid:\t1\t1\t1\t1\nGid:"},
		"three Uids":      {"\t1003", ""},
		"five Uids":       {"\t1003", "\t1003\t5"},
		"a word for Uid":  {"1002", "root"},
		"too large a Uid": {"1002", "4294967296"},
		"negative group":  {"24", "-1"},
		"Tgid 0":          {"Tgid:\t42", "Tgid:\t0"},
		"a broken line":   {"FDSize:", "FDSize"},
	} {
		if _, err := parseStatus([]byte(strings.Replace(aStatus, change[0], change[1], 1))); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	own, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	if s, err := parseStatus(own); err != nil || int(s.tgid) != os.Getpid() || int(s.uid[1]) != os.Geteuid() {
		t.Errorf("our own status: %+v, %v", s, err)
	}
}

func FuzzStatus(f *testing.F) {
	f.Add([]byte(aStatus))
	f.Add([]byte("Tgid:\t1\nUid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\nGroups:\t\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := parseStatus(b)
		if err != nil {
			return
		}
		words := func(n []uint32) string { return strings.Trim(fmt.Sprint(n), "[]") }
		again, err := parseStatus(fmt.Appendf(nil, "Tgid:\t%d\nUid:\t%s\nGid:\t%s\nGroups:\t%s\n",
			s.tgid, words(s.uid[:]), words(s.gid[:]), words(s.groups)))
		same := again.tgid == s.tgid && again.uid == s.uid && again.gid == s.gid && slices.Equal(again.groups, s.groups)
		if err != nil || !same {
			t.Errorf("%+v is read again as %+v, %v", s, again, err)
		}
	})
}

func TestParseCgroup(t *testing.T) {
	for in, want := range map[string]string{
		"0::/system.slice/a.service\n":                           "/system.slice/a.service",
		"9:name=systemd:/a.slice/b:c.service\n8:pids:/x\n0::/\n": "/a.slice/b:c.service",
		"8:pids:/x\n0::/y\n":                                     "/y",
		"":                                                       "",
		"8:pids:/x\n":                                            "",
		"0::relative\n":                                          "",
		"0::/a\n0::/b\n":                                         "",
		"9:name=systemd:/a\n3:name=systemd:/b\n":                 "",
		"0::/a":                                                  "",
		"x::/a\n":                                                "",
		"0:/a\n":                                                 "",
		"0::\n":                                                  "",
	} {
		l, err := parseCgroup([]byte(in))
		if (err == nil) != (want != "") || l.path() != want {
			t.Errorf("%q: %q, %v", in, l.path(), err)
		}
	}
}

func FuzzCgroup(f *testing.F) {
	f.Add([]byte("9:name=systemd:/a.slice\n8:pids:/\n0::/b\n"))
	f.Add([]byte("0::/system.slice/a:b.service\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := parseCgroup(b)
		if err != nil {
			return
		}
		if !strings.HasPrefix(l.path(), "/") || strings.Contains(l.path(), "\n") {
			t.Errorf("the path is %q", l.path())
		}
		unit, at := unitOf(l.path())
		if unit != "" && (!unitName(unit) || !strings.HasPrefix(l.path()+"/", at+"/") || strings.Contains(unit, "/")) {
			t.Errorf("%q is in unit %q at %q", l.path(), unit, at)
		}
	})
}

func TestUnitOf(t *testing.T) {
	for in, want := range map[string]string{
		"/system.slice/agent.service":                          "agent.service",
		"/system.slice/agent.service/payload":                  "agent.service",
		"/system.slice/system-a.slice/a@1.service":             "a@1.service",
		"/user.slice/user-1.slice/session-2.scope":             "session-2.scope",
		"/machine.slice/docker-1.scope/system.slice/a.service": "docker-1.scope",
		"/docker/1/system.slice/agent.service":                 "",
		"/system.slice/_cpu.service":                           "cpu.service",
		"/":                                                    "",
		"/system.slice":                                        "",
		"/agent.service":                                       "agent.service",
		"/a.slice//b.service":                                  "",
		"/a.slice/.service":                                    "",
		"/a.slice/b.service (deleted)":                         "",
		"/a.slice/x y.service":                                 "",
		"/a.slice/agent.timer":                                 "",
	} {
		if got, _ := unitOf(in); got != want {
			t.Errorf("%s: unit %q, want %q", in, got, want)
		}
	}
}

func TestParseState(t *testing.T) {
	for _, name := range []string{"x", "a b", "a) R 1 (b", ")))", "(\n"} {
		if s, err := parseState([]byte("42 (" + name + ") Z 1 1 1 0 -1")); err != nil || s != 'Z' {
			t.Errorf("%q: %q, %v", name, s, err)
		}
	}
	for _, in := range []string{"", "42 (x", "42 (x)", "42 (x) S", "42 (x)S 1", "42 (x) SS 1", "42 (x) 1 1"} {
		if s, err := parseState([]byte(in)); err == nil {
			t.Errorf("%q is in state %q", in, s)
		}
	}
}

func FuzzState(f *testing.F) {
	f.Add([]byte("42 (a) b) S 1 1 1 0 -1 4194560"))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := parseState(b)
		if err != nil {
			return
		}
		// What the process chooses, its name, changes nothing that comes after it.
		i := bytes.LastIndexByte(b, ')')
		if again, err := parseState(append([]byte("1 (x) Z 0 (y"), b[i:]...)); err != nil || again != s {
			t.Errorf("%q is read again as %q, %v", s, again, err)
		}
	})
}

func TestParseMount(t *testing.T) {
	got, ok := parseMount(`36 35 98:0 /a\040b /mnt/c\134\011d rw,noatime master:1 - ext3 /dev/root rw,errors=continue`)
	if !ok || got != (mount{36, "/a b", "/mnt/c\\\td", "ext3", "rw,errors=continue"}) {
		t.Errorf("parseMount = %+v, %v", got, ok)
	}
	for _, in := range []string{
		"", "36 35 98:0 / /mnt rw", "x 35 98:0 / /mnt rw - ext3 a b", "36 35 / /mnt - ext3 a", "1 2 3 4 5 6 - a",
	} {
		if m, ok := parseMount(in); ok {
			t.Errorf("%q is read as %+v", in, m)
		}
	}
}

func FuzzMount(f *testing.F) {
	f.Add(`36 35 98:0 /a\040b /mnt/c\134\011d rw,noatime master:1 - ext3 /dev/root rw`)
	f.Add(`1 2 3:4 / / rw - cgroup2 cgroup2 rw\777`)
	f.Fuzz(func(t *testing.T, line string) {
		if m, ok := parseMount(line); ok && (m.kind == "" || m.root == "" || m.point == "") {
			t.Errorf("%q is read as %+v", line, m)
		}
	})
}

func cmsg(level, kind int32, data []byte) []byte {
	b := make([]byte, unix.CmsgSpace(len(data)))
	binary.NativeEndian.PutUint64(b, uint64(unix.CmsgLen(len(data))))
	binary.NativeEndian.PutUint32(b[8:], uint32(level))
	binary.NativeEndian.PutUint32(b[12:], uint32(kind))
	copy(b[unix.CmsgLen(0):], data)
	return b
}

func words(n ...int32) []byte {
	var b []byte
	for _, w := range n {
		b = binary.NativeEndian.AppendUint32(b, uint32(w))
	}
	return b
}

func TestParseControl(t *testing.T) {
	cred := cmsg(unix.SOL_SOCKET, unix.SCM_CREDENTIALS, words(7, 8, 9))
	rights := cmsg(unix.SOL_SOCKET, unix.SCM_RIGHTS, words(100, 101, 102))
	pidfd := cmsg(unix.SOL_SOCKET, unix.SCM_PIDFD, words(50))
	failed := cmsg(unix.SOL_SOCKET, unix.SCM_PIDFD, words(-3))
	who := peer{7, 8, 9}
	for name, c := range map[string]struct {
		in      []byte
		want    control
		dropped []int
		bad     bool
	}{
		"nothing":         {nil, control{pidfd: -1}, nil, false},
		"sender":          {cred, control{who, true, -1}, nil, false},
		"all":             {slices.Concat(cred, rights, pidfd), control{who, true, 50}, []int{100, 101, 102}, false},
		"rights first":    {slices.Concat(rights, cred), control{who, true, -1}, []int{100, 101, 102}, false},
		"two senders":     {slices.Concat(cred, cred, rights), control{who, true, -1}, []int{100, 101, 102}, true},
		"two pidfds":      {slices.Concat(pidfd, cred, pidfd), control{who, true, 50}, []int{50}, false},
		"short sender":    {cmsg(unix.SOL_SOCKET, unix.SCM_CREDENTIALS, words(7)), control{pidfd: -1}, nil, true},
		"other level":     {cmsg(41, unix.SCM_CREDENTIALS, words(7, 8, 9)), control{pidfd: -1}, nil, true},
		"cut off":         {cred[:10], control{pidfd: -1}, nil, true},
		"empty pidfd":     {cmsg(unix.SOL_SOCKET, unix.SCM_PIDFD, nil), control{pidfd: -1}, nil, true},
		"pidfd not given": {slices.Concat(cred, failed), control{who, true, -3}, nil, false},
	} {
		var dropped []int
		got, err := parseControl(c.in, func(fd int) { dropped = append(dropped, fd) })
		if got != c.want || (err != nil) != c.bad || !slices.Equal(dropped, c.dropped) {
			t.Errorf("%s: %+v, dropped %v, %v", name, got, dropped, err)
		}
	}
}

func FuzzControl(f *testing.F) {
	f.Add(cmsg(unix.SOL_SOCKET, unix.SCM_CREDENTIALS, words(7, 8, 9)))
	rights := cmsg(unix.SOL_SOCKET, unix.SCM_RIGHTS, words(3, 4))
	f.Add(slices.Concat(rights, cmsg(unix.SOL_SOCKET, unix.SCM_PIDFD, words(5))))
	f.Fuzz(func(t *testing.T, b []byte) {
		dropped := 0
		m, err := parseControl(b, func(int) { dropped++ })
		if m.named && len(b) < unix.CmsgLen(unix.SizeofUcred) {
			t.Error("a sender out of too few bytes")
		}
		all, perr := unix.ParseSocketControlMessage(b)
		if err != nil || perr != nil {
			return
		}
		rights := 0
		for _, one := range all {
			if one.Header.Level == unix.SOL_SOCKET && one.Header.Type == unix.SCM_RIGHTS {
				rights += len(one.Data) / 4
			}
		}
		if dropped < rights {
			t.Errorf("%d descriptors of %d are dropped", dropped, rights)
		}
	})
}

func TestDisbelief(t *testing.T) {
	good := file{mode: unix.S_IFREG | 0o755, links: 1}
	for name, c := range map[string]struct {
		f          file
		path, kind string
		believed   bool
	}{
		"file":        {good, "/a", "ext4", true},
		"deleted":     {file{mode: unix.S_IFREG}, "/a", "ext4", false},
		"unlinked":    {good, "/a (deleted)", "ext4", false},
		"fuse":        {good, "/a", "fuse.sshfs", false},
		"fuse block":  {good, "/a", "fuseblk", false},
		"unknown":     {good, "/a", "", false},
		"device":      {file{mode: unix.S_IFCHR, links: 1}, "/a", "ext4", false},
		"unreachable": {good, "a", "ext4", false},
	} {
		if why := disbelief(c.f, c.path, c.kind); (why == "") != c.believed {
			t.Errorf("%s: %q", name, why)
		}
	}
}

func TestHashFile(t *testing.T) {
	hash := func(path string, change func(*version)) (string, bool, error) {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		at, err := statAt(int(f.Fd()), "", unix.AT_EMPTY_PATH)
		if err != nil {
			t.Fatal(err)
		}
		v := at.version()
		change(&v)
		s, err := hashFile(f, v)
		sums.mu.Lock()
		defer sums.mu.Unlock()
		return s, sums.of[v] == s && s != "", err
	}
	young := t.TempDir() + "/young"
	if err := os.WriteFile(young, []byte("abc"), 0o600); err != nil {
		t.Fatal(err)
	}
	const abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
	if s, kept, err := hash(young, func(*version) {}); s != abc || kept || err != nil {
		t.Errorf("a young file has the hash %q (kept: %v), %v", s, kept, err)
	}
	if s, kept, err := hash("/bin/sh", func(*version) {}); !kept || err != nil {
		t.Errorf("an old file has the hash %q (kept: %v), %v", s, kept, err)
	}
	for name, change := range map[string]func(*version){
		"mtime": func(v *version) { v.mtime++ }, "ctime": func(v *version) { v.ctime++ },
		"size": func(v *version) { v.size++ }, "inode": func(v *version) { v.ino++ },
		"too large": func(v *version) { v.size = maxProgram + 1 },
	} {
		if s, kept, err := hash("/bin/sh", change); err == nil || kept {
			t.Errorf("%s: the hash is %q (kept: %v), %v", name, s, kept, err)
		}
	}
}

func TestSumsAreBounded(t *testing.T) {
	for i := range maxSums * 2 {
		keepSum(version{size: uint64(i)}, "x")
	}
	sums.mu.Lock()
	defer sums.mu.Unlock()
	if len(sums.of) > maxSums {
		t.Errorf("%d sums are kept", len(sums.of))
	}
	clear(sums.of)
}
