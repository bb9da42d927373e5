package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/trustd/trustd/fault"
)

// report prints every now and then how it goes.
func (s *soak) report(ctx context.Context, length time.Duration) {
	tick := time.NewTicker(min(max(length/20, 5*time.Second), 30*time.Second))
	defer tick.Stop()
	begun := time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		s.mu.Lock()
		faults := 0
		for _, times := range s.recoveries {
			faults += len(times)
		}
		line := fmt.Sprintf("soak: %4.0f s, %d faults;", time.Since(begun).Seconds(), faults)
		for _, backend := range slices.Sorted(maps.Keys(s.now)) {
			line += fmt.Sprintf(" %s %d signed, %d failed;", backend, s.now[backend].Acknowledged(), s.now[backend].Failed())
		}
		s.mu.Unlock()
		fmt.Println(strings.TrimSuffix(line, ";"))
	}
}

// table prints what came of it, and returns an error where that is not as it must be.
func (s *soak) table(before, after size, length time.Duration, seed uint64) error {
	var asked uint64
	acknowledged, wrong := 0, 0
	codes := map[fault.Code]int{}
	modes := map[string]int{}
	var broken []string
	for _, ld := range s.loads {
		r := ld.Report()
		asked += r.Asked
		acknowledged += r.Acknowledged
		wrong += r.Wrong
		for c, n := range r.Errors {
			codes[c] += n
		}
		for m, n := range r.Modes {
			modes[m] += n
		}
		broken = append(broken, r.Broken...)
		if err := r.Retryable(); err != nil {
			broken = append(broken, err.Error())
		}
	}
	lost := 0
	for _, f := range s.failures {
		if strings.HasPrefix(f, "lost: ") {
			lost++
		}
	}
	grown := after.growth(before)

	w := tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0)
	row := func(name string, format string, args ...any) {
		fmt.Fprintf(w, "%s\t%s\n", name, fmt.Sprintf(format, args...))
	}
	fmt.Fprintln(w)
	row("time", "%v, seed %d", length, seed)
	row("requests", "%d", asked)
	row("acknowledged", "%d (%d direct, %d batched)", acknowledged, modes["direct"], modes["batched"])
	row("lost", "%d", lost)
	row("wrong", "%d", wrong)
	for _, c := range slices.Sorted(maps.Keys(codes)) {
		row("errors: "+string(c), "%d", codes[c])
	}
	slow := s.recoveryRows(row)
	row("recoveries beyond "+recoveryTarget.String(), "%d", slow)
	row("at the start", "%v", before)
	row("at the end", "%v", after)
	row("growth", "%s", cmp.Or(strings.Join(grown, "; "), "none"))
	if err := w.Flush(); err != nil {
		return err
	}
	problems := slices.Concat(s.failures, broken, grown)
	if len(problems) == 0 {
		fmt.Println("soak: passed")
		return nil
	}
	return errors.New(strings.Join(problems, "\n  "))
}

// recoveryRows prints the times of recovery by fault and returns how many were beyond the target.
func (s *soak) recoveryRows(row func(string, string, ...any)) (slow int) {
	total := 0
	for _, name := range slices.Sorted(maps.Keys(s.recoveries)) {
		times := slices.Sorted(slices.Values(s.recoveries[name]))
		total += len(times)
		for _, t := range times {
			if t > recoveryTarget {
				slow++
			}
		}
		row("back after "+name, "%d times, median %v, most %v", len(times), times[len(times)/2].Round(time.Millisecond),
			times[len(times)-1].Round(time.Millisecond))
	}
	row("recoveries", "%d", total)
	return slow
}
