// SPDX-License-Identifier: Apache-2.0

package state

import (
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/services/policy/internal/engine"
	"github.com/weirmesh/weir/services/policy/internal/object"
)

// diffPolicy compares what policies make of two snapshots, as far as it is the same for all nodes.
func (c *Change) diffPolicy() {
	old, new := c.old.Policy(), c.new.Policy()
	if old == new {
		return
	}
	for key, s := range new.Selectors {
		if before, ok := old.Selectors[key]; ok && before != s {
			joined, left := s.Since(before)
			if len(joined)+len(left) > 0 {
				c.Selectors = append(c.Selectors, SelectorChange{key, joined, left})
			}
		}
	}
	for key, p := range new.Policies {
		if before, ok := old.Policies[key]; ok && before != p {
			c.policies = append(c.policies, changePolicy(before, p))
		}
	}
	for key, p := range new.CIDRs {
		if before, ok := old.CIDRs[key]; ok && before != p {
			c.cidrs = append(c.cidrs, cidrPeer(p))
		}
	}
}

func changePolicy(old, new *engine.Policy) policyChange {
	all := new.With(old)
	c := policyChange{key: new.Key, early: all}
	if len(all.Classes) == len(new.Classes) {
		return c
	}
	c.late = new
	if len(all.Classes) == len(old.Classes) {
		c.early = nil
	}
	return c
}

func cidrPeer(p *policy.Peer) Peer {
	return Peer{Name: p.Key, Labels: p.Labels, At: []PeerPrefix{{Prefix: p.Prefix}}}
}

var noNode = &engine.Node{}

func nodeOf(v *engine.View, name string) *engine.Node {
	if n := v.Nodes[name]; n != nil {
		return n
	}
	return noNode
}

// addPolicy adds what of policies concerns a node: what it needs now and did not need before, and what changed of the rest.
func (c Change) addPolicy(name string, mine *Change) {
	before, after := c.old.Policy(), c.new.Policy()
	if before == after {
		return
	}
	old, new := nodeOf(before, name), nodeOf(after, name)
	both := func(a, b map[string]struct{}, key string) bool {
		_, in := a[key]
		_, still := b[key]
		return in && still
	}
	// What the node needs no more is in force until its subjects have something else: it must know new peers until then.
	for _, s := range c.Selectors {
		if both(old.Selectors, new.Selectors, s.Key) {
			mine.Selectors = append(mine.Selectors, s)
		} else if _, had := old.Selectors[s.Key]; had && len(s.Joined) > 0 {
			mine.Selectors = append(mine.Selectors, SelectorChange{Key: s.Key, Joined: s.Joined})
		}
	}
	for _, p := range c.policies {
		_, had := old.Policies[p.key]
		_, has := new.Policies[p.key]
		if had && p.early != nil {
			mine.Upserts = append(mine.Upserts, Policy{p.early})
		}
		if had && has && p.late != nil {
			mine.Late = append(mine.Late, Policy{p.late})
		}
	}
	for _, p := range c.cidrs {
		if both(old.CIDRs, new.CIDRs, p.Name) {
			mine.Upserts = append(mine.Upserts, p)
		}
	}
	if old == new {
		return
	}
	mine.exchange(KindSelector, old.Selectors, new.Selectors, func(key string) Resource { return Selector{after.Selectors[key]} })
	mine.exchange(KindPolicy, old.Policies, new.Policies, func(key string) Resource { return Policy{after.Policies[key]} })
	mine.exchange(KindPeer, old.CIDRs, new.CIDRs, func(key string) Resource { return cidrPeer(after.CIDRs[key]) })
	for key, s := range new.Subjects {
		if b, ok := old.Subjects[key]; !ok || b != s {
			mine.Upserts = append(mine.Upserts, Subject{key, name, s})
		}
	}
	for key := range old.Subjects {
		if _, ok := new.Subjects[key]; !ok {
			mine.Removals = append(mine.Removals, Removal{Key{KindSubject, key}, name})
		}
	}
}

func (c *Change) exchange(kind Kind, old, new map[string]struct{}, get func(string) Resource) {
	for key := range new {
		if _, ok := old[key]; !ok {
			c.Upserts = append(c.Upserts, get(key))
		}
	}
	for key := range old {
		if _, ok := new[key]; !ok {
			c.Removals = append(c.Removals, Removal{Key: Key{kind, key}})
		}
	}
}

// addNear leaves out of services the backends that are not for a node, by its zone and name.
func (c Change) addNear(name string, mine *Change) {
	zone, moved := c.new.zone(name), false
	if before, known := c.old.parts[KindNode].get()[name]; known && zoneOf(before) != zone {
		moved = true
	}
	for i, r := range mine.Upserts {
		if s, ok := r.(Service); ok {
			mine.Upserts[i] = s.near(name, zone)
		}
	}
	if !moved {
		return
	}
	for key, r := range c.new.parts[KindService].get() {
		s, ok := r.(Service)
		if ok && s.Distribution != object.Anywhere && !slices.ContainsFunc(mine.Upserts, func(r Resource) bool { return r.Key() == Key{KindService, key} }) {
			mine.Upserts = append(mine.Upserts, s.near(name, zone))
		}
	}
}

func (s *Snapshot) zone(node string) string {
	r, ok := s.parts[KindNode].get()[node]
	if !ok {
		return ""
	}
	return zoneOf(r)
}

func zoneOf(r Resource) string {
	n, _ := r.(Node)
	return n.Labels[corev1.LabelTopologyZone]
}

// near returns the service with the backends that a node should use.
func (r Service) near(node, zone string) Service {
	if r.Distribution == object.Anywhere {
		return r
	}
	ports := slices.Clone(r.Ports)
	for i := range ports {
		ports[i].Backends = choose(r.Distribution, ports[i].Backends, node, zone)
	}
	r.Ports = ports
	return r
}

// choose returns the nearest backends that are asked for and there. A family has a choice of its own; without a ready one there is no choice.
func choose(d object.Distribution, all []Backend, node, zone string) []Backend {
	var kept []Backend
	for _, v4 := range []bool{true, false} {
		family := filter(all, func(b Backend) bool { return b.Address.Is4() == v4 })
		kept = append(kept, chooseOf(d, family, node, zone)...)
	}
	slices.SortStableFunc(kept, readyFirst)
	return kept
}

func chooseOf(d object.Distribution, all []Backend, node, zone string) []Backend {
	near := func(hints func(Backend) []string, name string) []Backend {
		ready := filter(all, func(b Backend) bool { return !b.Terminating })
		if name == "" || slices.ContainsFunc(ready, func(b Backend) bool { return len(hints(b)) == 0 }) {
			return nil // as the hints' inventors have it: all or none
		}
		if !slices.ContainsFunc(ready, func(b Backend) bool { return slices.Contains(hints(b), name) }) {
			return nil
		}
		// Terminating ones stay: what is connected to them must find its way.
		return filter(all, func(b Backend) bool { return b.Terminating || slices.Contains(hints(b), name) })
	}
	if d == object.SameNode {
		if kept := near(func(b Backend) []string { return b.Nodes }, node); kept != nil {
			return kept
		}
	}
	if kept := near(func(b Backend) []string { return b.Zones }, zone); kept != nil {
		return kept
	}
	return all
}

// WireName is the name of a resource as agents know it.
func (k Key) WireName() string {
	if k.Kind == KindIdentity {
		name, _, _ := strings.Cut(k.Name, "@")
		return name
	}
	return k.Name
}

// Near returns the backends of a service's port that a node uses, those for new connections first.
func (s *Snapshot) Near(service Service, node string, port ServicePort) []Backend {
	if service.Distribution == object.Anywhere {
		return port.Backends
	}
	return choose(service.Distribution, port.Backends, node, s.zone(node))
}
