// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"fmt"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"

	"github.com/weirmesh/weir/services/proxy/internal/fields"
)

// outlier says after how many failures in a row an endpoint is left out for a while. The statistical detections of Envoy (success rate, failure percentage)
// are not done: their fields are read past, as they only ever choose among endpoints that all are allowed.
type outlier struct {
	failures, localFailures uint32 // 0 = not looked at
	split                   bool   // failures to connect count apart
	base, longest           time.Duration
	maxPercent              uint32
}

func compileOutlier(path string, in *clusterv3.OutlierDetection) (*outlier, error) {
	if in == nil {
		return nil, nil //nolint:nilnil // no detection
	}
	if len(in.GetMonitors()) > 0 {
		return nil, fields.NotSupported(path + ".monitors")
	}
	o := &outlier{failures: 5, localFailures: 5, split: in.GetSplitExternalLocalOriginErrors(), maxPercent: 10}
	number := func(to *uint32, from interface{ GetValue() uint32 }, present bool) {
		if present {
			*to = from.GetValue()
		}
	}
	number(&o.failures, in.GetConsecutive_5Xx(), in.GetConsecutive_5Xx() != nil)
	number(&o.localFailures, in.GetConsecutiveLocalOriginFailure(), in.GetConsecutiveLocalOriginFailure() != nil)
	number(&o.maxPercent, in.GetMaxEjectionPercent(), in.GetMaxEjectionPercent() != nil)
	if v := in.GetEnforcingConsecutive_5Xx(); v != nil && v.GetValue() == 0 {
		o.failures = 0
	}
	if v := in.GetEnforcingConsecutiveLocalOriginFailure(); v != nil && v.GetValue() == 0 || !o.split {
		o.localFailures = 0
	}
	if o.maxPercent > 100 {
		return nil, fmt.Errorf("%s.max_ejection_percent is above 100", path)
	}
	o.base, o.longest = 30*time.Second, 300*time.Second
	if d := in.GetBaseEjectionTime(); d != nil {
		o.base = d.AsDuration()
	}
	if d := in.GetMaxEjectionTime(); d != nil {
		o.longest = d.AsDuration()
	}
	return o, nil
}

// report tells a host's detection how one attempt went: to connect (local), or a whole request.
func (c *Cluster) report(h *host, local, ok bool) {
	o := c.config.outlier
	if o == nil || h == nil {
		return
	}
	streak, limit := &h.failures, o.failures
	if local && o.split {
		streak, limit = &h.localFailures, o.localFailures
	}
	if ok {
		streak.Store(0)
		return
	}
	if limit == 0 || streak.Add(1) < limit {
		return
	}
	streak.Store(0)
	c.eject(h)
}

// eject leaves a host out, unless too many are.
func (c *Cluster) eject(h *host) {
	o, now := c.config.outlier, c.now()
	c.ejecting.Lock()
	defer c.ejecting.Unlock()
	if h.ejected(now) {
		return
	}
	all, out := 0, 0
	for _, t := range c.endpoints.Load().tiers {
		for _, other := range t.hosts {
			all++
			if other.ejected(now) {
				out++
			}
		}
	}
	// One may always be left out, as in Envoy.
	if out > 0 && (out+1)*100 > all*int(o.maxPercent) {
		return
	}
	times := h.ejections.Add(1)
	h.ejectedUntil.Store(now.Add(min(time.Duration(times)*o.base, o.longest)).UnixNano())
	c.counters.Ejections.Add(1)
}
