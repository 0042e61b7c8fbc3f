// SPDX-License-Identifier: Apache-2.0

package format

import (
	"math"
)

const (
	// briefly is how long a case may take in full.
	briefly = 20
	// apart is how far, in seconds, expectations must stay from the end of a TTL or of a connection.
	apart = 3
)

// paces are tried in this order.
var paces = []float64{0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9}

// Quicken shortens the times of a case with names: TTLs and all moments alike, so that everything happens in the same order, and nothing near the end of a
// TTL that was not near it. It does nothing to a case that is brief, or that cannot be shortened so.
func (c *Case) Quicken() {
	if c.Lasts() <= briefly {
		return
	}
	for _, pace := range paces {
		if c.holds(pace) {
			c.scale(pace)
			return
		}
	}
}

// Lasts is how many seconds of time a case is about; 0 = its times are only an order.
func (c *Case) Lasts() (last float64) {
	if c.HasTimes() {
		for _, m := range c.moments() {
			last = max(last, m)
		}
	}
	return last
}

// moments are the times at which something is tried or asked.
func (c *Case) moments() []float64 {
	all := c.nameTimes()
	for i := range c.Expect {
		all = append(all, c.Expect[i].At)
	}
	for i := range c.Changes {
		all = append(all, c.Changes[i].At)
	}
	return all
}

// shorter is a TTL at a pace; TTLs are whole seconds.
func shorter(ttl, pace float64) float64 {
	if ttl <= 0 {
		return ttl
	}
	return max(1, math.Round(ttl*pace))
}

// holds reports whether nothing changes at a pace: what is tried after the end of a TTL stays after it, and far enough.
func (c *Case) holds(pace float64) bool {
	type end struct{ was, is float64 }
	var ends []end
	for _, a := range c.DNSAnswers {
		least := float64(c.Config.ToFQDNsMinTTL)
		ends = append(ends, end{a.At + max(a.TTL, least), a.At*pace + max(shorter(a.TTL, pace), shorter(least, pace))})
	}
	for _, k := range c.Connections {
		if k.CloseAt != nil {
			ends = append(ends, end{*k.CloseAt, *k.CloseAt * pace})
		}
	}
	for _, e := range ends {
		for i := range c.Expect {
			at := c.Expect[i].At
			was, is := at-e.was, at*pace-e.is
			if was == 0 {
				continue // the order of things at one time is not of time
			}
			if was > 0 != (is > 0) || math.Abs(is) < min(apart, math.Abs(was)) {
				return false
			}
		}
	}
	return true
}

func (c *Case) scale(pace float64) {
	for i := range c.DNSAnswers {
		c.DNSAnswers[i].At *= pace
		c.DNSAnswers[i].TTL = shorter(c.DNSAnswers[i].TTL, pace)
	}
	c.Config.ToFQDNsMinTTL = int(shorter(float64(c.Config.ToFQDNsMinTTL), pace))
	for i := range c.Connections {
		c.Connections[i].OpenAt *= pace
		if at := c.Connections[i].CloseAt; at != nil {
			closed := *at * pace
			c.Connections[i].CloseAt = &closed
		}
	}
	for i := range c.Changes {
		c.Changes[i].At *= pace
	}
	for i := range c.Expect {
		c.Expect[i].At *= pace
	}
}
