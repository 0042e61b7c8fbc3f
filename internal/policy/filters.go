// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
)

// draft is a filter whose range is not known yet.
type draft struct {
	kind FilterKind
	// visible: policy has none of its own there.
	visible bool
	parts   []part
	// signature is equal for neighbouring ports that have one filter.
	signature string
}

// part is a port range of an entry that covers a port, or all ports of an entry that names none.
type part struct {
	entry int
	port  *portRange // nil = every protocol and port
	// moot: it counts for nothing, since every selector of the entry that matches the peer has the same ports with a list of server names, or with rules
	// beside its empty list (spec 9.4, 9.5).
	moot bool
}

func (p part) l7() *L7Ports {
	if p.port == nil {
		return nil
	}
	return p.port.l7
}

// exact: it is for one port; DNS counts no others.
func (p part) exact() bool { return p.port != nil && p.port.first == p.port.last }

// kind is what its rules speak; 0 = it has none.
func (l *L7Ports) kind() FilterKind {
	switch {
	case l == nil:
		return 0
	case len(l.HTTP) > 0:
		return FilterHTTP
	case len(l.ServerNames) > 0:
		return FilterTLS
	case len(l.DNS) > 0:
		return FilterDNS
	}
	return 0
}

// reads reports whether what it says can be read of a protocol at all; where not, the entry allows nothing.
func (l *L7Ports) reads(proto uint8) bool {
	switch l.kind() {
	case FilterHTTP, FilterTLS:
		return proto == TCP
	case FilterDNS:
		return proto == TCP || proto == UDP
	}
	return true
}

func (l *L7Ports) order() int {
	if l == nil {
		return -1
	}
	return l.position
}

// visibility notes what the subject's annotation asks for in this direction, and whose filters they are.
func (r *Resolved) visibility(s *Subject, selected []*Rule) {
	if !s.Host {
		for _, v := range s.Visibility {
			if v.Direction == r.Direction {
				r.visible = append(r.visible, v)
			}
		}
		slices.SortFunc(r.visible, compareVisibility)
	}
	if len(r.visible) > 0 || slices.ContainsFunc(selected, func(rule *Rule) bool { return len(rule.L7) > 0 }) {
		r.identity = s.Labels
	}
}

// mergedBySelector reports whether it matters which selectors rules share: where a plain rule may count for nothing beside another of its selector, and
// where rules may conflict (spec 9.3 to 9.5). Then each peer of a rule counts as a selector of its own, each prefix and those beside `all` too.
func mergedBySelector(rules []*Rule) bool {
	kinds := map[FilterKind]bool{} // 0: a list with nothing in it
	for _, rule := range rules {
		for i := range rule.ports.specs {
			if l := rule.ports.specs[i].l7; l != nil {
				kinds[l.kind()] = true
			}
		}
	}
	return kinds[FilterTLS] || len(kinds) > 1
}

// selectorPort is a peer selector and a range of ports, as rules merge by.
type selectorPort struct {
	selector    int // term; -1 = any peer
	proto       uint8
	first, last uint16
}

// conflict returns the error for rules that speak differently of the same selector and port (spec 9.3, 9.5).
func (r *Resolved) conflict() error {
	if !r.filtered {
		return nil
	}
	first := map[selectorPort]part{}
	for i := range r.entries {
		e := &r.entries[i]
		if e.action != ActionAllow || e.tier != TierPolicy {
			continue
		}
		for j := range e.ports {
			p := part{entry: i, port: &e.ports[j]}
			if p.l7().kind() == 0 {
				continue
			}
			for _, s := range e.selectors(nil) {
				key := selectorPort{s, p.port.proto, p.port.first, p.port.last}
				if before, ok := first[key]; !ok {
					first[key] = p
				} else if before.l7().kind() != p.l7().kind() {
					return r.conflictError(s, before, p)
				}
			}
		}
	}
	return nil
}

func (r *Resolved) conflictError(selector int, a, b part) error {
	between := fmt.Sprintf("%s and %s", r.Rules[r.entries[a.entry].rule], r.Rules[r.entries[b.entry].rule])
	kinds := []FilterKind{a.l7().kind(), b.l7().kind()}
	if slices.Contains(kinds, FilterTLS) && slices.Contains(kinds, FilterHTTP) {
		name := "any peer"
		if selector >= 0 {
			name = r.Terms[selector].Key
		}
		return fmt.Errorf("cannot merge L7 rules for cached selector %s with SNI filtering without TLS termination: %s", name, between)
	}
	return fmt.Errorf("cannot merge conflicting L7 parsers (%s/%s): %s", kinds[0], kinds[1], between)
}

// String is the name of a kind in errors and keys.
func (k FilterKind) String() string {
	switch k {
	case FilterHTTP:
		return "http"
	case FilterTLS:
		return "tls"
	case FilterDNS:
		return "dns"
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// selectors are the terms of an entry that are matched (nil = all are looked at), and -1 for any peer.
func (e *entry) selectors(set termSet) []int {
	var all []int
	if e.any {
		all = append(all, -1)
	}
	for _, t := range e.terms {
		if set == nil || set[t] {
			all = append(all, t)
		}
	}
	return all
}

// place is one port, as a class of peers meets it. The zero place is that of protocols that no rule names.
type place struct {
	set   termSet
	proto uint8
	port  uint16
}

// draftOf returns the filter of a port that entries allow; nil = it has none (spec 9.2, 9.3).
func (r *Resolved) draftOf(allows []int, at place) *draft {
	if !r.filtered || at.proto == AnyProtocol {
		return nil
	}
	d := &draft{}
	for _, i := range allows {
		e := &r.entries[i]
		if e.anyPort {
			d.parts = append(d.parts, part{entry: i})
			continue
		}
		for j := range e.ports {
			if p := &e.ports[j]; p.covers(at) {
				d.parts = append(d.parts, part{entry: i, port: p})
			}
		}
	}
	for _, kind := range []FilterKind{FilterHTTP, FilterTLS, FilterDNS} {
		if slices.ContainsFunc(d.parts, func(p part) bool { return p.l7().kind() == kind }) {
			d.kind = kind
			break
		}
	}
	if d.kind == 0 {
		return nil
	}
	var s digest
	s.number(int(d.kind))
	for i := range d.parts {
		p := &d.parts[i]
		p.moot = r.moot(p, d.parts, at.set)
		s.number(p.entry)
		s.number(p.l7().order())
		s.flag(p.exact())
		s.flag(p.moot)
		if p.port != nil {
			s.text(p.port.name)
		}
	}
	d.signature = string(s)
	return d
}

func (p *portRange) covers(at place) bool {
	return p.proto == at.proto && p.first <= at.port && at.port <= p.last && p.appliesTo(at.set)
}

// moot reports whether a part without rules counts for nothing beside other parts.
func (r *Resolved) moot(p *part, parts []part, set termSet) bool {
	if p.port == nil || p.l7().kind() != 0 {
		return false
	}
	beside := func(selector int) bool {
		return slices.ContainsFunc(parts, func(q part) bool {
			if q.port == nil || q.port.first != p.port.first || q.port.last != p.port.last {
				return false
			}
			kind := q.l7().kind()
			return (kind == FilterTLS || kind != 0 && p.l7() != nil) && slices.Contains(r.entries[q.entry].selectors(set), selector)
		})
	}
	return !slices.ContainsFunc(r.entries[p.entry].selectors(set), func(s int) bool { return !beside(s) })
}

// visibleAt returns the filter of a port that policy lets through without one.
func (r *Resolved) visibleAt(at place) *draft {
	for _, v := range r.visible {
		if v.Proto == at.proto && v.Port == at.port && at.proto != AnyProtocol {
			return &draft{kind: v.Kind, visible: true, signature: fmt.Sprint("visible ", v.Port)}
		}
	}
	return nil
}

// filter makes the filter of a range of ports.
func (r *Resolved) filter(d *draft, proto uint8, first, last uint16) *Filter {
	if d == nil {
		return nil
	}
	f := &Filter{Key: r.filterKey(d, proto, first, last), Kind: d.kind, Direction: r.Direction, Visibility: d.visible}
	if d.visible {
		return f
	}
	tls := slices.ContainsFunc(d.parts, func(p part) bool { return p.l7().kind() == FilterTLS })
	for i, p := range d.parts {
		rule, l7 := r.entries[p.entry].rule, p.l7()
		if l7.kind() != 0 && slices.ContainsFunc(d.parts[:i], func(q part) bool { return q.l7() == l7 }) {
			continue // another range of the same list: a request is judged by an item once
		}
		switch kind := l7.kind(); {
		case kind == 0 && !p.moot:
			f.plain(rule, tls, p.exact())
		case kind == FilterHTTP:
			for _, h := range l7.HTTP {
				f.HTTP = append(f.HTTP, HTTPItem{Rule: rule, HTTPRule: h})
			}
		case kind == FilterTLS && d.kind != FilterDNS:
			names := make([]string, len(l7.ServerNames))
			for i, name := range l7.ServerNames {
				names[i] = plainName(name)
			}
			f.TLS = append(f.TLS, TLSItem{Rule: rule, ServerNames: names})
		case kind == FilterDNS && d.kind == FilterDNS:
			for _, s := range l7.DNS {
				if s != (NameSelector{}) { // it matches nothing, and an empty item everything
					f.DNS = append(f.DNS, DNSItem{Rule: rule, NameSelector: s})
				}
			}
		}
	}
	if !r.DefaultDeny {
		f.plain(r.fallback, tls, true) // spec 4: rules that deny nothing by default refuse no request
	}
	return f
}

// plain adds the item of a rule without rules for requests: it accepts all.
func (f *Filter) plain(rule int, tls, exact bool) {
	switch {
	case f.Kind == FilterHTTP && !slices.ContainsFunc(f.HTTP, func(i HTTPItem) bool { return i.Rule == rule && i.everything() }):
		f.HTTP = append(f.HTTP, HTTPItem{Rule: rule})
	case f.Kind == FilterDNS && exact && !slices.Contains(f.DNS, DNSItem{Rule: rule}):
		f.DNS = append(f.DNS, DNSItem{Rule: rule})
	}
	if tls && f.Kind != FilterDNS && !slices.ContainsFunc(f.TLS, func(i TLSItem) bool { return i.Rule == rule && i.Any }) {
		f.TLS = append(f.TLS, TLSItem{Rule: rule, Any: true})
	}
}

// words says what a rule that allows does for requests.
func (f *Filter) words(rule int) string {
	http, names, servers := 0, 0, 0
	everything := false
	for i := range f.HTTP {
		if item := &f.HTTP[i]; item.Rule == rule {
			http++
			everything = everything || item.everything()
		}
	}
	for _, item := range f.DNS {
		if item.Rule == rule {
			names++
			everything = everything || item.NameSelector == NameSelector{}
		}
	}
	for _, item := range f.TLS {
		if item.Rule == rule {
			servers += len(item.ServerNames)
			everything = everything || item.Any
		}
	}
	switch {
	case everything:
		return "it allows, whatever is asked"
	case http > 0:
		return "it allows the requests that its HTTP rules match"
	case names > 0:
		return "it allows queries for the names that its DNS rules match"
	case servers > 0:
		return "it allows TLS connections with its server names"
	case f.Kind == FilterDNS:
		return "it allows the port, but DNS queries only pass by rules for exactly this port and protocol"
	}
	return "it allows the port, but adds nothing to what other rules say of its requests"
}

// everything: the item accepts every request, and does nothing to it.
func (h *HTTPRule) everything() bool {
	return h.Method == "" && h.Path == "" && h.Host == "" && len(h.Headers) == 0 && len(h.HeaderMatches) == 0
}

// filterKey names a filter by where it is and by the names of its rules. What rules say is no part of it, but for what tells classes of peers of the same
// rules apart: which ports they have by name, and which rules count for nothing there.
func (r *Resolved) filterKey(d *draft, proto uint8, first, last uint16) string {
	h := digest(make([]byte, 0, 512))
	h.number(1) // of this form
	h.texts(r.identity)
	for _, n := range [...]int{int(d.kind), int(r.Direction), int(proto), int(first), int(last)} {
		h.number(n)
	}
	h.flag(d.visible)
	for i := 0; i < len(d.parts); {
		n := &r.Rules[r.entries[d.parts[i].entry].rule]
		for _, text := range [...]string{n.Ref.Kind, n.Ref.Namespace, n.Ref.Name, n.List} {
			h.text(text)
		}
		h.number(n.Spec)
		h.number(n.Index)
		moot := true
		var names []string
		entry := d.parts[i].entry
		for ; i < len(d.parts) && d.parts[i].entry == entry; i++ {
			p := &d.parts[i]
			moot = moot && p.moot
			if p.port != nil && p.port.name != "" {
				names = append(names, p.port.name)
			}
		}
		slices.Sort(names)
		h.flag(moot)
		h.texts(slices.Compact(names))
	}
	sum := sha256.Sum256(h)
	return d.kind.String() + "-" + hex.EncodeToString(sum[:16])
}

// requests says all of what an entry wants of requests.
func (d *digest) requests(l *L7Ports) {
	if l == nil {
		d.number(-1)
		return
	}
	d.number(l.position)
	d.number(len(l.HTTP))
	for i := range l.HTTP {
		h := &l.HTTP[i]
		for _, text := range [...]string{h.Method, h.Path, h.Host} {
			d.text(text)
		}
		d.texts(h.Headers)
		d.number(len(h.HeaderMatches))
		for _, m := range h.HeaderMatches {
			s := cmp.Or(m.Secret, &SecretRef{})
			for _, text := range [...]string{m.Name, m.Value, m.Mismatch, s.Namespace, s.Name} {
				d.text(text)
			}
		}
	}
	d.number(len(l.DNS))
	for _, s := range l.DNS {
		d.text(s.MatchName)
		d.text(s.MatchPattern)
	}
	d.texts(l.ServerNames)
}
