// SPDX-License-Identifier: Apache-2.0

package clock_test

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/services/agent/internal/clock"
)

func TestUnixIsTheWallClockPlusShift(t *testing.T) {
	for _, shift := range []time.Duration{0, 2 * time.Second, -2 * time.Second} {
		c := clock.New(shift)
		// The reading between two wall-clock readings lies between them, but for the error of the offset.
		const slack = int64(100 * time.Millisecond)
		before := time.Now().UnixNano()
		var m unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &m); err != nil {
			t.Fatal(err)
		}
		after := time.Now().UnixNano()
		got := c.Unix(uint64(m.Nano())) - int64(shift)
		if got < before-slack || got > after+slack {
			t.Errorf("shift %s: %d is not within %d and %d", shift, got, before, after)
		}
	}
}
