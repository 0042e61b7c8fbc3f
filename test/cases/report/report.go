// SPDX-License-Identifier: Apache-2.0

// Package report counts outcomes and prints them.
package report

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/weirmesh/weir/test/cases/runner"
)

// Report collects results. Not safe for concurrent use.
type Report struct {
	out     io.Writer
	verbose bool

	cases, brokeOff int
	total           counts
	areas           map[string]*counts
	how             map[runner.How]int
	notYet          []string
	wrongAllows     []string
	unread          []string
	failed          bool
	slowest         time.Duration
}

type counts map[runner.Class]int

func (c counts) sum() (n int) {
	for _, v := range c {
		n += v
	}
	return n
}

// New makes a report that prints to out; verbose also prints what passed.
func New(out io.Writer, verbose bool) *Report {
	return &Report{out: out, verbose: verbose, total: counts{}, areas: map[string]*counts{}, how: map[runner.How]int{}}
}

// Unreadable notes cases that could not be read at all; that is a failure.
func (r *Report) Unreadable(err error) {
	r.failed = true
	for line := range strings.Lines(err.Error()) {
		r.unread = append(r.unread, strings.TrimSuffix(line, "\n"))
	}
}

// Add prints what failed in a case, and counts it.
func (r *Report) Add(result *runner.Result) {
	r.cases++
	r.slowest = max(r.slowest, result.Took)
	id := result.Case.ID
	if result.Err != nil {
		r.brokeOff++
		fmt.Fprintf(r.out, "FAIL %s: broke off: %v\n", id, result.Err)
	}
	for _, line := range result.NotYet {
		r.notYet = append(r.notYet, id+": "+line)
	}
	for _, o := range result.Outcomes {
		r.count(result, o)
	}
	if result.Failed() {
		r.failed = true
		if result.Lab != "" {
			fmt.Fprintf(r.out, "     %s: lab %s is kept: weir-lab status --name %s\n", id, result.Lab, result.Lab)
		}
		if result.Logs != "" && (r.verbose || result.Err != nil) {
			fmt.Fprintf(r.out, "     %s: logs:\n%s", id, indent(result.Logs))
		}
	} else if r.verbose {
		var phases []string
		for _, p := range result.Phases {
			phases = append(phases, fmt.Sprintf("%s %s", p.Name, p.Took.Round(10*time.Millisecond)))
		}
		fmt.Fprintf(r.out, "ok   %s: %d expectations in %s: %s\n", id, len(result.Outcomes), result.Took.Round(10*time.Millisecond), strings.Join(phases, ", "))
	}
}

func (r *Report) count(result *runner.Result, o runner.Outcome) {
	r.total[o.Class]++
	areas := result.Case.Area
	if len(areas) == 0 {
		areas = []string{"(none)"}
	}
	for _, area := range areas {
		if r.areas[area] == nil {
			r.areas[area] = &counts{}
		}
		(*r.areas[area])[o.Class]++
	}
	if o.Class != runner.NotYet && o.Class != runner.NotRun {
		r.how[o.How]++
	}
	line := fmt.Sprintf("%s %s: want %s, got %s: %s", result.Case.ID, o.What, o.Want, o.Got, o.Detail)
	if o.Reason != "" {
		line += fmt.Sprintf(" (%s)", o.Reason)
	}
	switch {
	case o.Class == runner.WrongAllow:
		r.wrongAllows = append(r.wrongAllows, line)
		fmt.Fprintf(r.out, "FAIL %s: %s\n", o.Class, line)
	case o.Class == runner.NotRun && result.Err != nil:
		// Said once for the case.
	case o.Class != runner.Passed && o.Class != runner.NotYet:
		fmt.Fprintf(r.out, "FAIL %s: %s\n", o.Class, line)
	case r.verbose:
		fmt.Fprintf(r.out, "     %s: %s\n", o.Class, line)
	}
}

func indent(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		b.WriteString("       " + line)
	}
	return b.String()
}

// Print prints the summary, and reports whether everything is as it should be.
func (r *Report) Print(took time.Duration) bool {
	for _, line := range r.unread {
		fmt.Fprintf(r.out, "FAIL not readable: %s\n", line)
	}
	fmt.Fprintln(r.out)
	w := tabwriter.NewWriter(r.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "AREA\tEXPECTATIONS\tPASSED\tWRONG ALLOW\tWRONG DENY\tWRONG\tNOT RUN\tNOT YET")
	row := func(name string, c counts) {
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\t%d\t%d\t%d\n", name, c.sum(), c[runner.Passed], c[runner.WrongAllow], c[runner.WrongDeny], c[runner.Wrong], c[runner.NotRun], c[runner.NotYet])
	}
	for _, area := range slices.Sorted(maps.Keys(r.areas)) {
		row(area, *r.areas[area])
	}
	row("all (a case may have several areas)", r.total)
	w.Flush()
	if len(r.wrongAllows) > 0 {
		fmt.Fprintf(r.out, "\nWrong allows, each a hole:\n")
		for _, line := range r.wrongAllows {
			fmt.Fprintf(r.out, "  %s\n", line)
		}
	}
	if len(r.notYet) > 0 {
		fmt.Fprintf(r.out, "\nNot yet: policies that Weir refuses because of a field that it cannot enforce yet:\n")
		for _, line := range r.notYet {
			fmt.Fprintf(r.out, "  %s\n", line)
		}
	}
	var ways []string
	for _, how := range slices.Sorted(maps.Keys(r.how)) {
		ways = append(ways, fmt.Sprintf("%s %d", how, r.how[how]))
	}
	fmt.Fprintf(r.out, "\n%d cases (%d broke off, %d not readable) in %s, slowest %s; tried: %s\n",
		r.cases, r.brokeOff, len(r.unread), took.Round(100*time.Millisecond), r.slowest.Round(10*time.Millisecond), strings.Join(ways, ", "))
	wrong := r.total.sum() - r.total[runner.Passed] - r.total[runner.NotYet]
	fmt.Fprintf(r.out, "%d of %d expectations passed, %d not yet, %d failed (%d wrong allows, %d wrong denies)\n",
		r.total[runner.Passed], r.total.sum(), r.total[runner.NotYet], wrong, r.total[runner.WrongAllow], r.total[runner.WrongDeny])
	return !r.failed
}
