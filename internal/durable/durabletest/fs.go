// Package durabletest has a file system in memory that fails on order and loses power, for tests of what is
// written through package durable.
package durabletest

import (
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/trustd/trustd/internal/durable"
)

// A Fault makes one call fail.
type Fault struct {
	Op    Op
	Match string // the call fails whose file name contains this
	After int    // so many matching calls succeed first
	Err   error  // default: EIO
	// Persist has the call take effect although it reports an error; with Short, so many bytes of it.
	Persist bool
	Short   int
	Always  bool // every later call fails too
}

// An Op is a kind of call.
type Op string

const (
	Open     Op = "open"
	Write    Op = "write"
	Sync     Op = "sync"
	Truncate Op = "truncate"
	Rename   Op = "rename"
	Link     Op = "link"
	Remove   Op = "remove"
	SyncDir  Op = "syncdir"
	Read     Op = "read"
)

// FS is a durable.FS in memory. A file's content is what was synced and, behind that, the writes since; a name is
// durable once its folder was synced.
type FS struct {
	// OnSync, where it is set, is called at the begin of each sync of a file. Set it while nobody writes.
	OnSync func()

	mu     sync.Mutex
	names  map[string]*inode // as the running system sees them
	synced map[string]*inode // as the disk has them
	faults []*Fault
	counts map[Op]int
}

var _ durable.FS = (*FS)(nil)

// An inode is a file, whatever it is called.
type inode struct {
	now     []byte
	disk    []byte
	pending []change // since the last sync
	locked  bool
}

// A change is a write at an offset, or with nil data a truncation to it.
type change struct {
	at   int64
	data []byte
}

// New returns an empty file system. It panics outside of tests.
func New() *FS {
	if !testing.Testing() {
		panic("durabletest: used outside of a test")
	}
	return &FS{names: map[string]*inode{}, synced: map[string]*inode{}, counts: map[Op]int{}}
}

// Inject adds a fault.
func (m *FS) Inject(f Fault) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if f.Err == nil {
		f.Err = syscall.EIO
	}
	m.faults = append(m.faults, &f)
}

// Heal removes all faults.
func (m *FS) Heal() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.faults = nil
}

// Count returns how many calls of a kind there were.
func (m *FS) Count(op Op) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.counts[op]
}

// Names returns the names of all files, in their order.
func (m *FS) Names() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []string
	for n := range m.names {
		out = append(out, n)
	}
	slices.Sort(out)
	return out
}

// Content returns a copy of a file.
func (m *FS) Content(name string) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	if i := m.names[name]; i != nil {
		return slices.Clone(i.now)
	}
	return nil
}

// SetContent puts a file in place, as if it had been there since before the boot.
func (m *FS) SetContent(name string, data []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	i := &inode{now: slices.Clone(data), disk: slices.Clone(data)}
	m.names[name], m.synced[name] = i, i
}

// Kill returns the file system as the next process finds it after this one died: nothing is lost but locks and
// faults.
func (m *FS) Kill() *FS {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := New()
	out.copyFrom(m.names, m.synced)
	return out
}

func (m *FS) copyFrom(names, synced map[string]*inode) {
	seen := map[*inode]*inode{}
	dup := func(i *inode) *inode {
		if seen[i] == nil {
			seen[i] = &inode{now: slices.Clone(i.now), disk: slices.Clone(i.disk), pending: slices.Clone(i.pending)}
		}
		return seen[i]
	}
	for n, i := range names {
		m.names[n] = dup(i)
	}
	for n, i := range synced {
		m.synced[n] = dup(i)
	}
}

// PowerLoss returns the file system as the next boot finds it: what was synced is there, and of the rest whatever
// the disk happened to have written. Unsynced changes arrive in order up to some point, the last of them perhaps in
// part; with holes, any subset of them arrives.
func (m *FS) PowerLoss(r *rand.Rand, holes bool) *FS {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := New()
	out.copyFrom(m.names, m.synced)
	names := map[string]*inode{}
	for n, i := range out.synced {
		names[n] = i
	}
	for _, n := range sortedKeys(out.names) { // a name that was not synced may be on the disk all the same
		if i := out.names[n]; out.synced[n] != i && r.IntN(2) == 0 {
			names[n] = i
		}
	}
	done := map[*inode]bool{}
	for _, n := range sortedKeys(names) {
		if i := names[n]; !done[i] {
			done[i] = true
			i.settle(r, holes)
		}
	}
	out.names, out.synced = names, map[string]*inode{}
	for n, i := range names {
		out.synced[n] = i
	}
	return out
}

func sortedKeys(m map[string]*inode) []string {
	var out []string
	for n := range m {
		out = append(out, n)
	}
	slices.Sort(out)
	return out
}

func (i *inode) settle(r *rand.Rand, holes bool) {
	keep := r.IntN(len(i.pending) + 1)
	for k, c := range i.pending {
		switch {
		case holes && r.IntN(2) == 0:
			continue
		case !holes && k > keep:
			continue
		case !holes && k == keep && len(c.data) > 0:
			c.data = c.data[:r.IntN(len(c.data)+1)]
			if len(c.data) == 0 {
				continue
			}
		case !holes && k == keep:
			continue
		}
		i.disk = c.apply(i.disk)
	}
	i.now, i.pending = slices.Clone(i.disk), nil
}

func (c change) apply(b []byte) []byte {
	end := c.at + int64(len(c.data))
	if int64(len(b)) < end || c.data == nil {
		grown := make([]byte, end)
		copy(grown, b)
		b = grown
	}
	copy(b[c.at:], c.data)
	return b
}

// fault returns the fault that a call meets, if any.
func (m *FS) fault(op Op, name string) *Fault {
	m.counts[op]++
	for k, f := range m.faults {
		if f.Op != op || !strings.Contains(name, f.Match) {
			continue
		}
		if f.After > 0 {
			f.After--
			continue
		}
		if !f.Always {
			m.faults = slices.Delete(m.faults, k, k+1)
		}
		return f
	}
	return nil
}

// OpenFile opens or makes a file.
func (m *FS) OpenFile(name string, flag int, _ fs.FileMode) (durable.File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if f := m.fault(Open, name); f != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: f.Err}
	}
	i := m.names[name]
	switch {
	case i == nil && flag&os.O_CREATE == 0:
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	case i != nil && flag&os.O_EXCL != 0:
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrExist}
	case i == nil:
		i = &inode{}
		m.names[name] = i
	}
	return &file{fs: m, inode: i, name: name}, nil
}

// Rename moves a file.
func (m *FS) Rename(from, to string) error {
	return m.change(Rename, from, func() error {
		i := m.names[from]
		if i == nil {
			return fs.ErrNotExist
		}
		delete(m.names, from)
		m.names[to] = i
		return nil
	})
}

// Link gives a file another name.
func (m *FS) Link(from, to string) error {
	return m.change(Link, to, func() error {
		if m.names[to] != nil {
			return fs.ErrExist
		}
		if m.names[from] == nil {
			return fs.ErrNotExist
		}
		m.names[to] = m.names[from]
		return nil
	})
}

// Remove takes a name away.
func (m *FS) Remove(name string) error {
	return m.change(Remove, name, func() error {
		if m.names[name] == nil {
			return fs.ErrNotExist
		}
		delete(m.names, name)
		return nil
	})
}

func (m *FS) change(op Op, name string, do func() error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := m.fault(op, name)
	var err error
	if f == nil || f.Persist {
		err = do()
	}
	if f != nil {
		err = f.Err
	}
	if err != nil {
		return &fs.PathError{Op: string(op), Path: name, Err: err}
	}
	return nil
}

// ReadDir returns the names in a folder.
func (m *FS) ReadDir(dir string) ([]string, error) {
	var out []string
	for _, n := range m.Names() {
		if filepath.Dir(n) == filepath.Clean(dir) {
			out = append(out, filepath.Base(n))
		}
	}
	return out, nil
}

// SyncDir makes the names in a folder durable.
func (m *FS) SyncDir(dir string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := m.fault(SyncDir, dir)
	if f == nil || f.Persist {
		in := func(n string) bool { return filepath.Dir(n) == filepath.Clean(dir) }
		for n := range m.synced {
			if in(n) && m.names[n] == nil {
				delete(m.synced, n)
			}
		}
		for n, i := range m.names {
			if in(n) {
				m.synced[n] = i
			}
		}
	}
	if f != nil {
		return &fs.PathError{Op: "sync", Path: dir, Err: f.Err}
	}
	return nil
}

// A file is an open file of an FS.
type file struct {
	fs     *FS
	inode  *inode
	name   string
	lock   bool
	closed bool
}

func (f *file) ReadAt(p []byte, off int64) (int, error) {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if e := f.fs.fault(Read, f.name); e != nil {
		return 0, e.Err
	}
	if off >= int64(len(f.inode.now)) {
		return 0, io.EOF
	}
	n := copy(p, f.inode.now[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *file) WriteAt(p []byte, off int64) (int, error) {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if f.closed {
		return 0, fs.ErrClosed
	}
	e := f.fs.fault(Write, f.name)
	n := len(p)
	if e != nil {
		n = min(e.Short, n)
		if e.Persist && e.Short == 0 {
			n = len(p)
		}
	}
	if n > 0 {
		f.inode.do(change{off, slices.Clone(p[:n])})
	}
	if e != nil {
		return n, e.Err
	}
	return n, nil
}

func (i *inode) do(c change) {
	i.now = c.apply(i.now)
	i.pending = append(i.pending, c)
}

func (f *file) Truncate(size int64) error {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if e := f.fs.fault(Truncate, f.name); e != nil {
		return e.Err
	}
	f.inode.do(change{size, nil})
	return nil
}

// Sync makes the content durable. A Sync that fails forgets the changes, as Linux does: they are in the page cache,
// marked clean, and no later Sync writes them. With Persist they did reach the disk.
func (f *file) Sync() error {
	if f.fs.OnSync != nil {
		f.fs.OnSync()
	}
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if f.closed {
		return fs.ErrClosed
	}
	e := f.fs.fault(Sync, f.name)
	if e == nil || e.Persist {
		for _, c := range f.inode.pending {
			f.inode.disk = c.apply(f.inode.disk)
		}
	}
	f.inode.pending = nil
	if e != nil {
		return e.Err
	}
	return nil
}

func (f *file) Size() (int64, error) {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	return int64(len(f.inode.now)), nil
}

func (f *file) Lock() error {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if f.inode.locked {
		return durable.ErrLocked
	}
	f.inode.locked, f.lock = true, true
	return nil
}

func (f *file) Current(name string) (bool, error) {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	return f.fs.names[name] == f.inode, nil
}

func (f *file) Close() error {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if f.closed {
		return fmt.Errorf("closing twice: %w", fs.ErrClosed)
	}
	f.closed = true
	if f.lock {
		f.inode.locked = false
	}
	return nil
}
