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
