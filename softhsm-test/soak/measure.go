package main

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// A size is how large the daemon and what it uses are.
type size struct {
	heap       float64 // bytes that live
	resident   float64 // bytes of the process
	goroutines float64
	files      float64 // open ones, of the daemon
	children   int     // processes that the daemon has started
	childFiles int     // open ones, of those
	objects    int     // transient objects in the TPM
	sessions   int     // loaded and saved ones in the TPM
}

func (z size) String() string {
	return fmt.Sprintf("heap %.1f MiB, resident %.1f MiB, %v goroutines, %v files; "+
		"%d children, %d files; TPM: %d objects, %d sessions",
		z.heap/(1<<20), z.resident/(1<<20), z.goroutines, z.files, z.children, z.childFiles, z.objects, z.sessions)
}

// What a daemon may differ by between two moments of rest.
const (
	moreHeap       = 8 << 20
	moreResident   = 48 << 20 // the run time gives memory back late
	moreGoroutines = 8
	moreFiles      = 4
)

// growth lists what is larger in z than it was in before.
func (z size) growth(before size) []string {
	var out []string
	check := func(what string, was, is, more float64) {
		if is > was+more {
			out = append(out, fmt.Sprintf("%s grew from %.0f to %.0f", what, was, is))
		}
	}
	check("the heap", before.heap, z.heap, max(moreHeap, before.heap/2))
	check("resident memory", before.resident, z.resident, max(moreResident, before.resident/2))
	check("the number of goroutines", before.goroutines, z.goroutines, moreGoroutines)
	check("the number of open files", before.files, z.files, moreFiles)
	check("the number of children", float64(before.children), float64(z.children), 0)
	check("the number of the children's open files", float64(before.childFiles), float64(z.childFiles), 2*moreFiles)
	check("the number of objects in the TPM", float64(before.objects), float64(z.objects), 0)
	check("the number of sessions in the TPM", float64(before.sessions), float64(z.sessions), 0)
	return out
}

// The times of settling.
const (
	lightLoad = 6 * time.Second
	rest      = 3 * time.Second
	sampling  = 100 * time.Millisecond
)

// settle brings the daemon to rest and measures it: first under a light load, under which the garbage collector runs
// often, so that the least heap that is seen is what lives, then idle.
func (s *soak) settle(ctx context.Context) (size, error) {
	s.unload()
	if err := s.load(ctx, 10*time.Millisecond); err != nil {
		return size{}, err
	}
	busy, err := s.least(ctx, lightLoad)
	s.unload()
	if err != nil {
		return size{}, err
	}
	z, err := s.least(ctx, rest)
	if err != nil {
		return size{}, err
	}
	z.heap = min(z.heap, busy.heap)
	z.children, z.childFiles = s.processes()
	if z.objects, err = s.handles(ctx, "handles-transient"); err != nil {
		return size{}, err
	}
	for _, kind := range []string{"handles-loaded-session", "handles-saved-session"} {
		n, err := s.handles(ctx, kind)
		if err != nil {
			return size{}, err
		}
		z.sessions += n
	}
	return z, nil
}

// least samples the metrics for a while and returns the least of each figure.
func (s *soak) least(ctx context.Context, d time.Duration) (size, error) {
	var z size
	for end := time.Now().Add(d); time.Now().Before(end) && ctx.Err() == nil; pause(ctx, sampling) {
		m, err := s.metrics(ctx)
		if err != nil {
			return size{}, err
		}
		for name, into := range map[string]*float64{
			"go_memstats_heap_alloc_bytes": &z.heap, "process_resident_memory_bytes": &z.resident,
			"go_goroutines": &z.goroutines, "process_open_fds": &z.files,
		} {
			v, ok := m[name]
			if !ok {
				return size{}, fmt.Errorf("/metrics has no %s", name)
			}
			if *into == 0 || v < *into {
				*into = v
			}
		}
	}
	return z, ctx.Err()
}

// metrics reads the daemon's metrics that have no labels.
func (s *soak) metrics(ctx context.Context) (map[string]float64, error) {
	c := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", s.AdminSocket)
		},
	}}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://trustd/metrics", nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.Do(r)
	if err != nil {
		return nil, fmt.Errorf("reading the metrics: %w", err)
	}
	defer resp.Body.Close()
	out := map[string]float64{}
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		name, value, ok := strings.Cut(lines.Text(), " ")
		if v, err := strconv.ParseFloat(value, 64); ok && err == nil && !strings.ContainsAny(name, "#{") {
			out[name] = v
		}
	}
	return out, lines.Err()
}

// processes returns how many processes the daemon has started that are left, zombies too, and their open files.
func (s *soak) processes() (n, files int) {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		var state string
		var parent int
		rest := string(b[strings.LastIndexByte(string(b), ')')+2:])
		if _, err := fmt.Sscan(rest, &state, &parent); err != nil || parent != s.Daemon().Pid() {
			continue
		}
		n++
		open, _ := os.ReadDir(filepath.Join(filepath.Dir(path), "fd"))
		files += len(open)
	}
	return n, files
}

// handles counts the handles of a kind in the TPM.
func (s *soak) handles(ctx context.Context, kind string) (int, error) {
	out, err := s.TPMOutput(ctx, "tpm2_getcap", kind)
	return strings.Count(out, "0x"), err
}
