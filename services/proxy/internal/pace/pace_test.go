// SPDX-License-Identifier: Apache-2.0

package pace_test

import (
	"slices"
	"testing"
	"time"

	"github.com/weirmesh/weir/services/proxy/internal/pace"
)

// clock is a time that work and pauses move.
type clock struct {
	now    time.Time
	pauses []time.Duration
}

func (c *clock) sleep(d time.Duration) {
	c.pauses = append(c.pauses, d)
	c.now = c.now.Add(d)
}

func TestPauses(t *testing.T) {
	for _, tt := range []struct {
		name  string
		idle  bool
		steps []time.Duration
		want  []time.Duration
	}{
		{"short work has none", false, []time.Duration{100 * time.Microsecond, 200 * time.Microsecond}, nil},
		{"as long as the work", false, []time.Duration{300 * time.Microsecond, 300 * time.Microsecond, 300 * time.Microsecond, 200 * time.Microsecond},
			[]time.Duration{600 * time.Microsecond, 500 * time.Microsecond}},
		{"long steps", false, []time.Duration{4 * time.Millisecond, 100 * time.Microsecond}, []time.Duration{4 * time.Millisecond}},
		{"bounded", false, []time.Duration{time.Second}, []time.Duration{10 * time.Millisecond}},
		{"nothing is served", true, []time.Duration{time.Millisecond, time.Second}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := &clock{now: time.Unix(1, 0)}
			p := pace.NewWith(func() bool { return !tt.idle }, func() time.Time { return c.now }, c.sleep)
			c.now = c.now.Add(time.Hour)
			p.Begin()
			for _, worked := range tt.steps {
				c.now = c.now.Add(worked)
				p.Step()
			}
			if !slices.Equal(c.pauses, tt.want) {
				t.Errorf("pauses %v, want %v", c.pauses, tt.want)
			}
		})
	}
}

// What was done while nothing was served does not count when something is.
func TestServingBegins(t *testing.T) {
	c, serves := &clock{now: time.Unix(1, 0)}, false
	p := pace.NewWith(func() bool { return serves }, func() time.Time { return c.now }, c.sleep)
	c.now = c.now.Add(time.Second)
	p.Step()
	serves = true
	c.now = c.now.Add(time.Microsecond)
	p.Step()
	if len(c.pauses) > 0 {
		t.Errorf("pauses %v", c.pauses)
	}
}
