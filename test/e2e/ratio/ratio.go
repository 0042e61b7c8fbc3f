// SPDX-License-Identifier: Apache-2.0

// Package ratio sums up interleaved pairs of measurements: medians of ratios with their spread.
package ratio

import (
	"fmt"
	"slices"
)

// Pairs collects measurements of a subject and its baseline, taken in turn.
type Pairs struct {
	Subject, Baseline []float64
}

// Add records one pair.
func (p *Pairs) Add(subject, baseline float64) {
	p.Subject = append(p.Subject, subject)
	p.Baseline = append(p.Baseline, baseline)
}

// Summary is the median of the ratios and the spread of the middle eight tenths.
type Summary struct {
	Median, Low, High float64
	Subject, Baseline float64
	N                 int
}

// Summary computes it. It needs at least one pair.
func (p *Pairs) Summary() Summary {
	r := make([]float64, len(p.Subject))
	for i := range r {
		r[i] = p.Subject[i] / p.Baseline[i]
	}
	slices.Sort(r)
	return Summary{
		Median: middle(r), Low: r[len(r)/10], High: r[len(r)-1-len(r)/10],
		Subject: middle(slices.Sorted(slices.Values(p.Subject))), Baseline: middle(slices.Sorted(slices.Values(p.Baseline))), N: len(r),
	}
}

func middle(sorted []float64) float64 {
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

// String is one cell of a table: ratio, spread, and a remark where the spread covers 1.
func (s Summary) String() string {
	t := fmt.Sprintf("%.2f (%.2f..%.2f, n=%d)", s.Median, s.Low, s.High, s.N)
	if s.Low <= 1 && s.High >= 1 {
		t += " not distinguishable"
	}
	return t
}
