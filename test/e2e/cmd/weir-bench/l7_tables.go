// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"text/tabwriter"

	"github.com/weirmesh/weir/test/e2e/ratio"
)

// table begins a table on standard output; its cells end with tabs.
func table() *tabwriter.Writer { return tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0) }

// difference is a cell: by how much a subject is above another, round by round, and a remark where that may be nothing.
func difference(subject, baseline []float64) string {
	p := ratio.Pairs{Subject: subject, Baseline: baseline}
	d := p.Difference()
	t := spread(d)
	if d.Covers(0) {
		t += " not distinguishable"
	}
	return t
}

func spread(s ratio.Spread) string { return fmt.Sprintf("%.0f (%.0f..%.0f)", s.Median, s.Low, s.High) }

// quotient is a cell: a subject as a part of another, round by round.
func quotient(subject, baseline []float64) string {
	p := ratio.Pairs{Subject: subject, Baseline: baseline}
	return p.Summary().String()
}

func printL7(subjects []subject, rows map[string]*l7Row) {
	floor := rows[noProxy]
	fmt.Println("\n# L7: proxies, one thread on one CPU; servers and loads on the other; medians of", len(floor.rate), "rounds (middle 80 %)")
	fmt.Printf("\nlatency at %d requests/s on %d connections, us, counted from when a request was due; the generator's own p99 of sending late: %s\n",
		l7Rate, l7Connections, spread(ratio.SpreadOf(floor.late)))
	t := table()
	fmt.Fprintln(t, "proxy\tp50\tp99\tadded p50\tadded p99\tp50 above HAProxy's\tp99 above HAProxy's\t")
	for _, s := range subjects {
		row := rows[s.name]
		fmt.Fprintf(t, "%s\t%s\t%s\t", s.name, spread(ratio.SpreadOf(row.p50)), spread(ratio.SpreadOf(row.p99)))
		if s.start != nil {
			fmt.Fprintf(t, "%s\t%s\t", difference(row.p50, floor.p50), difference(row.p99, floor.p99))
		}
		if s.against != "" {
			than := rows[s.against]
			fmt.Fprintf(t, "%s\t%s\t", difference(row.p50, than.p50), difference(row.p99, than.p99))
		}
		fmt.Fprintln(t)
	}
	_ = t.Flush() // standard output
	fmt.Printf("\nas fast as answers come on %d connections\n", l7Connections)
	t = table()
	fmt.Fprintln(t, "proxy\trequests/s\tof HAProxy's\tCPU us/request\trequests per CPU second, of HAProxy's\tlog entries a request (one, or two if it takes long)\t")
	for _, s := range subjects {
		row := rows[s.name]
		fmt.Fprintf(t, "%s\t%s\t", s.name, spread(ratio.SpreadOf(row.rate)))
		cells := [4]string{}
		if s.start != nil {
			cpu := ratio.SpreadOf(row.cpu)
			cells[1] = fmt.Sprintf("%.1f (%.1f..%.1f)", cpu.Median, cpu.Low, cpu.High)
		}
		if s.against != "" {
			cells[0], cells[2] = quotient(row.rate, rows[s.against].rate), quotient(rows[s.against].cpu, row.cpu)
		}
		if row.lines > 0 {
			cells[3] = fmt.Sprintf("%.2f", float64(row.lines)/float64(row.requests))
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t\n", cells[0], cells[1], cells[2], cells[3])
	}
	_ = t.Flush() // standard output
}
