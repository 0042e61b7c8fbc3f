// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"cmp"
	"net/netip"

	"github.com/weirmesh/weir/services/policy/internal/object"
)

// noteNamed has the nodes looked at that use a selector with other members outside of the cluster.
func (e *Engine) noteNamed() {
	if len(e.changed.named) == 0 {
		return
	}
	for name, n := range e.view.Nodes {
		for key := range e.changed.named {
			if _, ok := n.Selectors[key]; ok {
				e.changed.nodes[name] = struct{}{}
				break
			}
		}
	}
}

// publishNode computes the subjects of a node and what it needs for them.
func (e *Engine) publishNode(name string, v *View) {
	n := e.nodes[name]
	if n == nil {
		delete(v.Nodes, name)
		return
	}
	next := &Node{
		Subjects: make(map[string]Subject, len(n.subjects)), Policies: map[string]struct{}{}, Selectors: map[string]struct{}{}, CIDRs: map[string]struct{}{},
	}
	for a := range e.apiServers {
		next.CIDRs[CIDRPrefix+netip.PrefixFrom(a, a.BitLen()).String()] = struct{}{}
	}
	for key, c := range n.subjects {
		next.Subjects[key] = Subject{Ingress: c.sides[0].key(), Egress: c.sides[1].key(), Audit: e.options.Audit}
		for i := range c.sides {
			if r := c.sides[i].resolution; r != nil {
				next.need(v.Policies[r.resolved.Key], v)
			}
		}
	}
	v.Nodes[name] = next
}

func (s *side) key() string {
	if s.resolution == nil {
		return ""
	}
	return s.resolution.resolved.Key
}

// need adds what a policy needs.
func (n *Node) need(p *Policy, v *View) {
	if _, ok := n.Policies[p.Key]; ok {
		return
	}
	n.Policies[p.Key] = struct{}{}
	for _, key := range p.Prefixes {
		n.CIDRs[key] = struct{}{}
	}
	for _, key := range p.Selectors {
		if _, ok := n.Selectors[key]; ok {
			continue
		}
		n.Selectors[key] = struct{}{}
		for _, m := range v.Selectors[key].Named {
			n.CIDRs[m] = struct{}{}
		}
	}
}

func compareObjects(a, b object.Key) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Name, b.Name))
}
