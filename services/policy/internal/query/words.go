// SPDX-License-Identifier: Apache-2.0

package query

import (
	"fmt"
	"slices"
	"strings"

	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/internal/reserved"
)

// peersInWords says whom selectors match: "app=web in shop", "CIDR 10.0.0.0/8", "any other peer".
func peersInWords(keys []string) string {
	if len(keys) == 0 {
		return "any other peer"
	}
	words := make([]string, len(keys))
	for i, key := range keys {
		words[i] = termInWords(key)
	}
	return strings.Join(words, " and ")
}

// termInWords shortens a selector's key.
func termInWords(key string) string {
	kind, text, ok := strings.Cut(key, ":")
	if !ok {
		return key
	}
	switch kind {
	case "fqdn", "fqdn-pattern":
		return "DNS name " + text
	case "entity":
		return "entity " + text
	case "cidr", "cidr+nodes", "cidr+pods", "cidr+nodes+pods":
		return "CIDR " + strings.ReplaceAll(text, "-(", " except (")
	case "networks":
		return "network " + text
	case "port":
		return "pods with port " + text
	case "endpoints", "labels", "nodes":
		return labelsInWords(kind, text)
	}
	return key
}

func labelsInWords(kind, text string) string {
	namespace, rest := "", []string{}
	for _, part := range strings.Split(text, ",") {
		part = strings.TrimPrefix(part, reserved.Source+":")
		switch {
		case strings.HasPrefix(part, reserved.ClusterKey+"="):
		case strings.HasPrefix(part, reserved.NamespaceKey+"="):
			namespace = " in " + strings.TrimPrefix(part, reserved.NamespaceKey+"=")
		default:
			rest = append(rest, strings.ReplaceAll(part, reserved.NamespaceLabelsKey, "namespace:"))
		}
	}
	if len(rest) == 0 {
		rest = []string{"every pod"}
		if kind == "nodes" {
			rest = []string{"every node"}
		}
	}
	prefix := ""
	if kind == "nodes" {
		prefix = "nodes "
	}
	return prefix + strings.Join(rest, ",") + namespace
}

// portsInWords is such as "8080/TCP", "8000-8080/TCP", "ICMP type 8", "all ports", "any other protocol".
func portsInWords(r policy.Range, alone bool) string {
	whole := r.First == 0 && r.Last == 65535
	switch {
	case r.Proto == policy.AnyProtocol && alone:
		return "all ports"
	case r.Proto == policy.AnyProtocol:
		return "any other protocol"
	case r.Proto == policy.ICMP || r.Proto == policy.ICMPv6:
		switch {
		case r.Last-r.First >= 255:
			return protocolName(r.Proto)
		case r.First == r.Last:
			return fmt.Sprintf("%s type %d", protocolName(r.Proto), r.First)
		}
		return fmt.Sprintf("%s types %d-%d", protocolName(r.Proto), r.First, r.Last)
	case whole:
		return "all " + protocolWords(r.Proto) + " ports"
	case r.First == r.Last:
		return fmt.Sprintf("%d/%s", r.First, protocolWords(r.Proto))
	}
	return fmt.Sprintf("%d-%d/%s", r.First, r.Last, protocolWords(r.Proto))
}

func protocolWords(proto uint8) string {
	if name := protocolName(proto); name != "any" {
		return name
	}
	return fmt.Sprintf("protocol %d", proto)
}

// difference is a range in which two decisions differ. Of both, Filter is nil unless the verdict is Allow and requests are judged.
type difference struct {
	at  policy.Range // the later one
	was policy.Range
}

// change says in which way a range differs: allowed now or not any more, or allowed with other requests.
type change uint8

const (
	denied change = iota
	allowed
	filtered
)

func (d *difference) change() change {
	switch {
	case d.at.Verdict != policy.Allow:
		return denied
	case d.was.Verdict != policy.Allow:
		return allowed
	}
	return filtered
}

// alike reports whether two decisions let the same pass.
func alike(a, b policy.Range) bool {
	if (a.Verdict == policy.Allow) != (b.Verdict == policy.Allow) {
		return false
	}
	return a.Verdict != policy.Allow || sameItems(a.Filter, b.Filter)
}

func sameItems(a, b *policy.Filter) bool {
	return a == b || slices.Equal(itemsInWords(a), itemsInWords(b))
}

// compareRanges returns where two classes let different things pass.
func compareRanges(before, after []policy.Range) []difference {
	protocols := []uint8{policy.AnyProtocol}
	for _, r := range slices.Concat(before, after) {
		protocols = append(protocols, r.Proto)
	}
	slices.Sort(protocols)
	protocols = slices.Compact(protocols)
	var all []difference
	for _, proto := range protocols {
		edges := []int{0, 65536}
		for _, r := range slices.Concat(before, after) {
			if r.Proto == proto {
				edges = append(edges, int(r.First), int(r.Last)+1)
			}
		}
		slices.Sort(edges)
		edges = slices.Compact(edges)
		for i := 0; i+1 < len(edges); i++ {
			first, last := uint16(edges[i]), uint16(edges[i+1]-1)
			was, _ := rangeAt(before, proto, first)
			is, _ := rangeAt(after, proto, first)
			if alike(was, is) {
				continue
			}
			if n := len(all); n > 0 {
				if l := &all[n-1]; l.at.Proto == proto && int(l.at.Last)+1 == int(first) && l.was.Verdict == was.Verdict && l.at.Verdict == is.Verdict &&
					sameItems(l.was.Filter, was.Filter) && sameItems(l.at.Filter, is.Filter) {
					l.at.Last = last
					continue
				}
			}
			is.Proto, is.First, is.Last = proto, first, last
			all = append(all, difference{at: is, was: was})
		}
	}
	return all
}

// everything returns the ranges of an endpoint that is not enforced.
func everything() []policy.Range {
	return []policy.Range{{Proto: policy.AnyProtocol, First: 0, Last: 65535, Verdict: policy.Allow}}
}

// verdictAt looks a port up: ranges of its protocol, if there are any, else those of any protocol.
func verdictAt(ranges []policy.Range, proto uint8, port uint16) policy.Verdict {
	r, _ := rangeAt(ranges, proto, port)
	return r.Verdict
}

// rangeAt looks a port up; without a range it is denied by default.
func rangeAt(ranges []policy.Range, proto uint8, port uint16) (policy.Range, bool) {
	named := slices.ContainsFunc(ranges, func(r policy.Range) bool { return r.Proto == proto })
	for _, r := range ranges {
		if (r.Proto == proto || !named && r.Proto == policy.AnyProtocol) && r.First <= port && port <= r.Last {
			return r, true
		}
	}
	return policy.Range{Verdict: policy.DefaultDeny}, false
}
