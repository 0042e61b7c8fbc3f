// SPDX-License-Identifier: Apache-2.0

package maglev

import (
	"fmt"
	"slices"
	"testing"
)

func names(n int) [][]byte {
	var out [][]byte
	for i := range n {
		out = append(out, fmt.Appendf(nil, "10.244.%d.%d:8080", i/250, i%250))
	}
	return out
}

// Each backend has the same number of slots, but for one percent of them when the table is big enough.
func TestShares(t *testing.T) {
	for _, c := range []struct{ size, backends int }{{251, 1}, {251, 2}, {1021, 10}, {16381, 100}, {1021, 300}} {
		table := Table(names(c.backends), c.size)
		count := make([]int, c.backends)
		for _, b := range table {
			count[b]++
		}
		low, high := slices.Min(count), slices.Max(count)
		// The backends take turns: nobody is more than one slot ahead.
		if len(table) != c.size || high-low > 1 {
			t.Errorf("%d backends in %d slots have %d to %d", c.backends, len(table), low, high)
		}
	}
	if Table(nil, 251) != nil {
		t.Error("a table without backends")
	}
}

// The table is the same wherever it is made.
func TestStable(t *testing.T) {
	if got, want := fmt.Sprint(Table(names(5), 251)[:12]), "[0 4 4 4 3 4 4 0 4 3 1 1]"; got != want {
		t.Errorf("%s, want %s: nodes of two versions would disagree", got, want)
	}
}

// When a backend goes, its slots must change; few others do: the paper's figure 12 shows under 2.5 percent of all slots for tables a hundred
// times as big as there are backends.
func TestDisruption(t *testing.T) {
	for _, c := range []struct {
		size, backends, removed int
		most                    float64 // share of the slots of backends that stayed
	}{{1021, 10, 1, 0.03}, {16381, 100, 1, 0.025}, {16381, 100, 10, 0.04}, {16381, 10, 1, 0.025}} {
		all := names(c.backends)
		before := Table(all, c.size)
		gone := map[uint16]bool{}
		var left [][]byte
		index := map[uint16]uint16{} // before -> after
		for i := range all {
			if i%(c.backends/c.removed) == 0 {
				gone[uint16(i)] = true
				continue
			}
			index[uint16(i)] = uint16(len(left))
			left = append(left, all[i])
		}
		after := Table(left, c.size)
		moved := 0
		for slot, b := range before {
			if !gone[b] && after[slot] != index[b] {
				moved++
			}
		}
		share := float64(moved) / float64(c.size)
		t.Logf("%d slots, %d of %d backends removed: %.2f%% of the slots moved without need", c.size, c.removed, c.backends, 100*share)
		if share > c.most {
			t.Errorf("%d slots, %d of %d removed: %.3f moved, want at most %.3f", c.size, c.removed, c.backends, share, c.most)
		}
	}
}

func TestValidSize(t *testing.T) {
	for size, want := range map[int]bool{0: false, 2: false, 251: true, 1021: true, 1022: false, MaxSize: true, 32749: false} {
		if ValidSize(size) != want {
			t.Errorf("size %d: %v", size, !want)
		}
	}
}

func BenchmarkTable(b *testing.B) {
	for _, backends := range []int{10, 100} {
		b.Run(fmt.Sprint(backends), func(b *testing.B) {
			n := names(backends)
			for b.Loop() {
				Table(n, 1021)
			}
		})
	}
}
