// SPDX-License-Identifier: Apache-2.0

package flags_test

import (
	"runtime/debug"
	"testing"

	"github.com/weirmesh/weir/internal/flags"
)

func TestCollector(t *testing.T) {
	percent, memory := debug.SetGCPercent(100), debug.SetMemoryLimit(-1)
	defer func() {
		debug.SetGCPercent(percent)
		debug.SetMemoryLimit(memory)
	}()
	for _, tt := range []struct {
		gogc, gomemlimit string
		percent          int
		memory           int64
		want             int
		wantMemory       int64
	}{
		{"", "", 400, 256 << 20, 400, 256 << 20},
		{"", "", 0, 0, 100, 1 << 40},
		{"50", "1GiB", 400, 256 << 20, 100, 1 << 40}, // the runtime took these at the start
	} {
		t.Setenv("GOGC", tt.gogc)
		t.Setenv("GOMEMLIMIT", tt.gomemlimit)
		debug.SetGCPercent(100)
		debug.SetMemoryLimit(1 << 40)
		flags.Collector(tt.percent, tt.memory)
		if got := debug.SetGCPercent(100); got != tt.want {
			t.Errorf("%+v: collects at %d %%", tt, got)
		}
		if got := debug.SetMemoryLimit(-1); got != tt.wantMemory {
			t.Errorf("%+v: %d bytes", tt, got)
		}
	}
}
