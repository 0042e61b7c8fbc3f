// SPDX-License-Identifier: Apache-2.0

package state

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/services/policy/internal/engine"
)

// slots reports the slots of a node.
func (r *runner) slots(node string, lines []string) {
	r.t.Helper()
	snapshot := r.commit()
	var all []Slot
	want := ""
	for _, line := range lines {
		line, fault, _ := strings.Cut(line, "=")
		if want == "" {
			want = strings.TrimSpace(fault)
		}
		words := strings.Fields(line)
		number, err := strconv.ParseUint(words[0], 10, 16)
		if err != nil || len(words) != 2 {
			r.t.Fatalf("slot %q", line)
		}
		all = append(all, Slot{Number: uint16(number), Key: r.filterKey(snapshot, words[1]), Port: uint16(20000 + number)})
	}
	err := r.state.SetSlots(node, all)
	if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
		r.t.Errorf("slots of %s: %v, want %q", node, err, want)
	}
}

var kindWords = map[policy.FilterKind]string{policy.FilterHTTP: "http", policy.FilterTLS: "tls", policy.FilterDNS: "dns"}

// filterKey finds a key by what it stands for.
func (r *runner) filterKey(snapshot *Snapshot, text string) string {
	r.t.Helper()
	kind, which, ok := strings.Cut(text, "@")
	if !ok {
		return text
	}
	if kind == "route" {
		for key, route := range r.state.routing.byKey {
			if fmt.Sprintf("%s:%d", route.Service, route.Port) == which {
				return key
			}
		}
		r.t.Fatalf("nothing routes %s", which)
	}
	n, err := strconv.Atoi(which)
	if err != nil {
		r.t.Fatalf("filter %q: %v", text, err)
	}
	for _, key := range slices.Sorted(maps.Keys(snapshot.Policy().Filters)) {
		if kindWords[snapshot.Policy().Filters[key].Kind] != kind {
			continue
		}
		if n--; n < 0 {
			return key
		}
	}
	r.t.Fatalf("there is no filter %q among %d", text, len(snapshot.Policy().Filters))
	return ""
}

// dumpRender writes a change in the order in which it is applied.
func dumpRender(c RenderChange) string {
	var b strings.Builder
	for _, r := range c.Upserts {
		switch r := r.(type) {
		case Config:
			fmt.Fprintf(&b, "config %s generation=%d\n", r.Config.Key(), r.Generation)
		case RoutedService:
			fmt.Fprintln(&b, describe(r.Service))
		case ProxyFilter:
			if r.Of != nil {
				fmt.Fprintf(&b, "filter %s\n", describeFilter(r.Of))
			} else {
				fmt.Fprintf(&b, "filter %s %+v\n", r.Key, *r.Route)
			}
		case NodeSlots:
			fmt.Fprintf(&b, "slots %s", r.Node)
			if r.Unknown {
				fmt.Fprint(&b, " unknown")
			}
			for _, s := range r.Slots {
				fmt.Fprintf(&b, " %d=%s@%d", s.Number, s.Key, s.Port)
			}
			fmt.Fprintln(&b)
		}
	}
	for _, k := range c.Removals {
		fmt.Fprintf(&b, "gone %s %s\n", [renderKinds]string{"config", "service", "filter", "slots"}[k.Kind], k.Name)
	}
	return b.String()
}

// describeFilter writes a filter with its items.
func describeFilter(f *engine.Filter) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s kind=%s direction=%d namespace=%s", f.Key, kindWords[f.Kind], f.Direction, f.Namespace)
	if f.Visibility {
		fmt.Fprint(&b, " visibility")
	}
	for _, i := range f.HTTP {
		fmt.Fprintf(&b, " [%d: %s %s host=%s", i.Rule, i.Method, i.Path, i.Host)
		for _, c := range i.Conditions() {
			fmt.Fprintf(&b, " %s=%s %s", c.Name, c.Value, c.Mismatch)
		}
		fmt.Fprint(&b, "]")
	}
	for _, i := range f.DNS {
		fmt.Fprintf(&b, " [%d: %s%s]", i.Rule, i.MatchName, i.MatchPattern)
	}
	for _, i := range f.TLS {
		fmt.Fprintf(&b, " [%d: %v any=%t]", i.Rule, i.ServerNames, i.Any)
	}
	return b.String()
}
