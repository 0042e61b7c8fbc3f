// SPDX-License-Identifier: Apache-2.0

package ratio

import "testing"

func TestSummary(t *testing.T) {
	for _, tt := range []struct {
		name              string
		subject, baseline []float64
		want              string
	}{
		{"one pair", []float64{3}, []float64{2}, "1.50 (1.50..1.50, n=1)"},
		{"outliers are left out", []float64{9, 2, 2, 2, 2, 2, 2, 2, 2, 1}, []float64{1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, "2.00 (2.00..2.00, n=10)"},
		{"covers one", []float64{1, 2, 0.5}, []float64{1, 1, 1}, "1.00 (0.50..2.00, n=3) not distinguishable"},
		{"even count", []float64{2, 4}, []float64{1, 1}, "3.00 (2.00..4.00, n=2)"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := Pairs{Subject: tt.subject, Baseline: tt.baseline}
			if got := p.Summary().String(); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestSpread(t *testing.T) {
	for _, tt := range []struct {
		name   string
		values []float64
		want   Spread
	}{
		{"one", []float64{7}, Spread{7, 7, 7}},
		{"nine: all", []float64{9, 8, 7, 6, 5, 4, 3, 2, 1}, Spread{5, 1, 9}},
		{"ten: the middle eight", []float64{100, 9, 8, 7, 6, 5, 4, 3, 2, -100}, Spread{5.5, 2, 9}},
		{"twenty: the middle sixteen", []float64{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20}, Spread{10.5, 3, 18}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := SpreadOf(tt.values); got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
	p := Pairs{Subject: []float64{5, 1, 4}, Baseline: []float64{4, 3, 1}}
	if got, want := p.Difference(), (Spread{1, -2, 3}); got != want || !got.Covers(0) || got.Covers(4) {
		t.Errorf("difference: got %v, want %v", got, want)
	}
}

func TestQuantile(t *testing.T) {
	hundred := make([]int, 100)
	for i := range hundred {
		hundred[i] = i + 1
	}
	for _, tt := range []struct {
		name   string
		sorted []int
		q      float64
		want   int
	}{
		{"none", nil, 0.5, 0},
		{"one", []int{7}, 0.99, 7},
		{"median of an odd number", []int{1, 2, 3}, 0.5, 2},
		{"median of an even number is the lower", []int{1, 2, 3, 4}, 0.5, 2},
		{"99 of 100", hundred, 0.99, 99},
		{"just above", hundred, 0.991, 100},
		{"all", hundred, 1, 100},
		{"least", hundred, 0, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := Quantile(tt.sorted, tt.q); got != tt.want {
				t.Errorf("got %d, want %d", got, tt.want)
			}
		})
	}
}
