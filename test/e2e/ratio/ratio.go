// SPDX-License-Identifier: Apache-2.0

// Package ratio sums up interleaved pairs of measurements: medians of ratios and of differences, with their spread.
package ratio

import (
	"fmt"
	"math"
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
	Spread
	Subject, Baseline float64
	N                 int
}

// Summary computes it. It needs at least one pair.
func (p *Pairs) Summary() Summary {
	return Summary{
		Spread:  SpreadOf(p.each(func(subject, baseline float64) float64 { return subject / baseline })),
		Subject: SpreadOf(p.Subject).Median, Baseline: SpreadOf(p.Baseline).Median, N: len(p.Subject),
	}
}

// Difference is by how much the subject is above its baseline, pair by pair. It needs at least one pair.
func (p *Pairs) Difference() Spread {
	return SpreadOf(p.each(func(subject, baseline float64) float64 { return subject - baseline }))
}

func (p *Pairs) each(f func(subject, baseline float64) float64) []float64 {
	out := make([]float64, len(p.Subject))
	for i := range out {
		out[i] = f(p.Subject[i], p.Baseline[i])
	}
	return out
}

// Spread is a median with the bounds of the middle eight tenths.
type Spread struct {
	Median, Low, High float64
}

// SpreadOf computes it from at least one value, in any order.
func SpreadOf(values []float64) Spread {
	v := slices.Sorted(slices.Values(values))
	n := len(v)
	return Spread{Median: (v[(n-1)/2] + v[n/2]) / 2, Low: v[n/10], High: v[n-1-n/10]}
}

// Covers says whether the spread leaves open on which side of a value the truth is.
func (s Spread) Covers(value float64) bool { return s.Low <= value && value <= s.High }

// String is one cell of a table: ratio, spread, and a remark where the spread covers 1.
func (s Summary) String() string {
	t := fmt.Sprintf("%.2f (%.2f..%.2f, n=%d)", s.Median, s.Low, s.High, s.N)
	if s.Covers(1) {
		t += " not distinguishable"
	}
	return t
}

// Quantile is the smallest of the values, which are in rising order, that at least that part of them does not exceed; 0 of none.
func Quantile[T any](sorted []T, q float64) (value T) {
	if len(sorted) == 0 {
		return value
	}
	return sorted[min(len(sorted), max(1, int(math.Ceil(q*float64(len(sorted))))))-1]
}
