//go:build cgo

// Command bench measures trustd beside the raw device and library calls that it rests on, in one run, and prints
// each figure with its ratio and whether its target is met. Compared figures are taken in turns, so that a busy
// machine slows both. SoftHSM and swtpm are far faster than real devices: the ratios are what carries over.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/trustd/trustd/softhsm-test/lab"
)

// A row is one figure. Names are paths and stay as they are once they have landed.
type row struct {
	Name     string  `json:"name"`
	Value    float64 `json:"value"`
	Unit     string  `json:"unit"`
	Baseline string  `json:"baseline"`
	Base     float64 `json:"baseline_value"`
	Ratio    float64 `json:"ratio"`
	Target   string  `json:"target"`
	Met      *bool   `json:"met"`
	Note     string  `json:"note,omitempty"` // under what conditions, where that is not plain from the name
}

type bench struct {
	ctx    context.Context
	bin    string
	prefix string // of the rows that are asked for
	rows   []row

	agents    int // at most
	hsmAgents int // of these, on SoftHSM
}

// wants reports whether any row with one of these prefixes is asked for.
func (b *bench) wants(prefixes ...string) bool {
	return slices.ContainsFunc(prefixes, func(p string) bool {
		return strings.HasPrefix(p, b.prefix) || strings.HasPrefix(b.prefix, p)
	})
}

// add notes a figure. met is nil where there is no target.
func (b *bench) add(name string, value float64, unit, baseline string, base float64, target string, met *bool) {
	r := row{Name: name, Value: value, Unit: unit, Baseline: baseline, Base: base, Target: target, Met: met}
	if base != 0 {
		r.Ratio = value / base
	}
	b.rows = append(b.rows, r)
	fmt.Fprintf(os.Stderr, "  %-52s %10.1f %s\n", name, value, unit)
}

// note says under what conditions the figures since the given row were taken.
func (b *bench) note(since int, text string) {
	for i := range b.rows[since:] {
		b.rows[since+i].Note = text
	}
}

func met(ok bool) *bool { return &ok }

// A section measures the rows under its prefixes.
type section struct {
	prefixes []string
	run      func(*bench) error
}

var sections = []section{
	{[]string{"size/"}, (*bench).size},
	{[]string{"inprocess/"}, (*bench).inProcess},
	{[]string{"verify/", "batch/proof-size/"}, (*bench).proofs},
	{[]string{"batch/inprocess/", "batch/one-caller/"}, (*bench).batching},
	{[]string{"throttled/inprocess/"}, (*bench).throttled},
	{[]string{"batch/socket/"}, (*bench).batchSocket},
	{[]string{"throttled/socket/", "fairness/"}, (*bench).slow},
	{[]string{"isolation/"}, (*bench).isolation},
	{[]string{"tpm/"}, (*bench).tpm},
	{[]string{"hsm/", "socket/", "memory/"}, (*bench).hsm},
	{[]string{"flat/tpm/"}, func(b *bench) error { return b.flatness("tpm") }},
	{[]string{"flat/hsm/"}, func(b *bench) error { return b.flatness("hsm") }},
}

func main() {
	if len(os.Args) > 1 {
		switch os.Args[1] { // processes of this one
		case floodCommand:
			os.Exit(flood(os.Args[2:]))
		case crowdCommand:
			os.Exit(crowd(os.Args[2:]))
		}
	}
	bin := flag.String("bin", "bin", "folder that holds trustd and trustd-pkcs11")
	agents := flag.Int("agents", 1000, "the most agents to register; fewer is quicker")
	hsm := flag.Int("hsm-agents", 1000, "the most of them on SoftHSM, which looks at all of its objects for each new one")
	rows := flag.String("rows", "", "measure only what has rows with this prefix")
	out := flag.String("out", "", "write the rows as JSON to this file")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(&bench{ctx: ctx, bin: *bin, agents: *agents, hsmAgents: *hsm, prefix: *rows}, *out)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(b *bench, out string) error {
	for _, s := range sections {
		if !b.wants(s.prefixes...) {
			continue
		}
		fmt.Fprintf(os.Stderr, "measuring %s ...\n", strings.Join(s.prefixes, " "))
		if err := s.run(b); err != nil {
			return err
		}
	}
	b.rows = slices.DeleteFunc(b.rows, func(r row) bool { return !strings.HasPrefix(r.Name, b.prefix) })
	b.print()
	if out == "" {
		return nil
	}
	data, err := json.MarshalIndent(b.rows, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(out, append(data, '\n'), 0o644)
}

func (b *bench) print() {
	w := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "\nROW\tVALUE\tUNIT\tBASELINE\t\tRATIO\tTARGET\tMET")
	var notes []string
	for _, r := range b.rows {
		verdict := "-"
		if r.Met != nil {
			verdict = map[bool]string{true: "yes", false: "NO"}[*r.Met]
		}
		target := r.Target
		if target == "" {
			target = "-"
		}
		mark := ""
		if r.Note != "" {
			if !slices.Contains(notes, r.Note) {
				notes = append(notes, r.Note)
			}
			mark = fmt.Sprintf(" [%d]", slices.Index(notes, r.Note)+1)
		}
		fmt.Fprintf(w, "%s\t%.1f\t%s\t%s\t%.1f\t%.2f\t%s\t%s%s\n",
			r.Name, r.Value, r.Unit, r.Baseline, r.Base, r.Ratio, target, verdict, mark)
	}
	w.Flush()
	for i, n := range notes {
		fmt.Printf("[%d] %s\n", i+1, n)
	}
}

// size reports the daemon's binary, which must be static.
func (b *bench) size() error {
	fi, err := os.Stat(b.bin + "/trustd")
	if err != nil {
		return err
	}
	mb := float64(fi.Size()) / 1e6
	static, err := isStatic(b.bin + "/trustd")
	if err != nil {
		return err
	}
	b.add("size/trustd", mb, "MB", "limit", 25, "< 25 MB, static", met(mb < 25 && static))
	return nil
}

// lab boots a set-up without limits on callers.
func (b *bench) lab(o lab.Options) (*lab.Lab, error) {
	o.Extra = "[limits]\nrate = 0\nconcurrent = 0\n" + o.Extra
	return b.boot(o)
}

// boot boots a set-up and starts its daemon.
func (b *bench) boot(o lab.Options) (*lab.Lab, error) {
	o.Bin = b.bin
	l, err := lab.New(b.ctx, o)
	if err != nil {
		return nil, err
	}
	if err := l.Start(b.ctx, lab.Options{}); err != nil {
		return nil, fmt.Errorf("%w; %w", err, l.Close())
	}
	return l, nil
}

// A contest runs its entrants in turns and keeps every single time.
type contest struct {
	names []string
	once  map[string]func() error
	took  map[string][]time.Duration
}

func newContest() *contest {
	return &contest{once: map[string]func() error{}, took: map[string][]time.Duration{}}
}

func (c *contest) enter(name string, once func() error) {
	c.names = append(c.names, name)
	c.once[name] = once
}

// run gives each entrant n calls a round.
func (c *contest) run(rounds, n int) error {
	for r := range rounds + 1 {
		for _, name := range c.names {
			for range n {
				start := time.Now()
				if err := c.once[name](); err != nil {
					return fmt.Errorf("%s: %w", name, err)
				}
				if r > 0 { // the first round warms up
					c.took[name] = append(c.took[name], time.Since(start))
				}
			}
		}
	}
	return nil
}

// p50 returns the median in microseconds.
func (c *contest) p50(name string) float64 {
	t := slices.Clone(c.took[name])
	if len(t) == 0 {
		return 0
	}
	slices.Sort(t)
	return float64(t[len(t)/2].Nanoseconds()) / 1e3
}

// rate returns calls a second, of the median call times per.
func (c *contest) rate(name string, per int) float64 {
	if p := c.p50(name); p > 0 {
		return float64(per) * 1e6 / p
	}
	return 0
}
