// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/weirmesh/weir/internal/status"
	"github.com/weirmesh/weir/services/agent/internal/desired"
)

// pressureWarn is the fill of a map, in percent, from which it is warned of, and pressureHigh that from which it is warned of again. What does not fit is
// refused later, by name.
const (
	pressureWarn = 80
	pressureHigh = 95
)

// mapUsage is how full a kernel map is.
type mapUsage struct {
	name         string
	entries, max int
}

func (u mapUsage) percent() int {
	if u.max == 0 {
		return 0
	}
	return u.entries * 100 / u.max
}

// usage lists the maps that can be full.
func (n *node) usage() []mapUsage {
	all := []mapUsage{
		{"ct", int(n.sweeps.live.Load() + n.sweeps.left.Load()), n.config.ConntrackMax},
		{"ipcache", n.mirror.Prefixes(), n.ipcacheMax},
	}
	st := n.slots.Stats()
	all = append(all, mapUsage{"slots", st.Used, st.Max})
	for _, u := range n.policies.Stats().Usage {
		all = append(all, mapUsage{u.Map, u.Entries, u.Max})
	}
	for _, u := range n.datapath.Services().Usage() {
		all = append(all, mapUsage{u.Map, u.Entries, u.Max})
	}
	return all
}

// refusals is all that is not in force on this node, and why.
func (n *node) refusals() map[desired.Key]string {
	all := n.policies.Refusals()
	for key, reason := range n.mirror.Refused() {
		all[desired.Key{Kind: desired.KindService, Name: key}] = reason
	}
	for uid, reason := range n.mirror.RefusedPods() {
		all[desired.Key{Kind: desired.KindEndpoint, Name: uid}] = reason
	}
	return all
}

// warnOfPressure tells when a map fills, when it is nearly full, and when it has room again.
func (n *node) warnOfPressure() {
	for _, u := range n.usage() {
		level := 0
		switch {
		case u.percent() >= pressureHigh:
			level = pressureHigh
		case u.percent() >= pressureWarn:
			level = pressureWarn
		}
		before := n.pressed[u.name]
		n.pressed[u.name] = level
		if level == before || 0 < level && level < before {
			continue
		}
		kind := "map-pressure"
		if level == 0 {
			kind = "map-relieved"
		}
		n.log.Warn(kind, "map", u.name, "entries", u.entries, "max", u.max)
		n.events.Notice(kind, map[string]any{"map": u.name, "entries": u.entries, "max": u.max})
	}
}

// policyDetails is what an operator reads of policy.
func (n *node) policyDetails() []status.Detail {
	st := n.policies.Stats()
	words := fmt.Sprintf("%d in the kernel, in force for %d endpoints", st.Policies-st.Refused, st.Enforced)
	if st.Refused > 0 {
		words += fmt.Sprintf(", %d NOT in force", st.Refused)
	}
	details := []status.Detail{{Name: "policies", Value: words}}
	for key, reason := range n.refusals() {
		name := "policy refused " + n.policies.Describe(key)
		switch key.Kind {
		case desired.KindService:
			name = "service refused " + key.Name
		case desired.KindEndpoint:
			name = "pod refused " + key.Name
		}
		details = append(details, status.Detail{Name: name, Value: reason})
	}
	now := time.Now()
	for subject, p := range n.policies.Pauses() {
		target := "pod " + p.Pod
		if subject == "" {
			target = "the whole node"
		}
		value := fmt.Sprintf("%s, for another %s", target, p.Until.Sub(now).Round(time.Second))
		if p.Reason != "" {
			value += ": " + p.Reason
		}
		details = append(details, status.Detail{Name: "policy paused", Value: value})
	}
	for _, u := range n.usage() {
		if u.percent() >= pressureWarn {
			details = append(details, status.Detail{Name: "map " + u.name, Value: fmt.Sprintf("%d of %d entries, %d %% full", u.entries, u.max, u.percent())})
		}
	}
	slices.SortStableFunc(details[1:], func(a, b status.Detail) int { return strings.Compare(a.Name, b.Name) })
	return details
}
