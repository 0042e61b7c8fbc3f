// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"encoding/json"
	"slices"
	"strings"
)

// networkPolicy reads a NetworkPolicy of networking.k8s.io (spec 13).
func (r *reader) networkPolicy(doc node) []*Rule {
	r.prefix = "Invalid NetworkPolicy spec: "
	spec := doc.child("spec")
	r.object(spec, "podSelector", "policyTypes", "ingress", "egress")
	requirements, _ := r.requirements(spec.child("podSelector"), plainKeys)
	subject := newSelector(append(requirements, inNamespace(r.ref.Namespace)))

	types, _ := r.strings(spec.child("policyTypes"))
	for i, t := range types {
		r.oneOf(node{path: spec.child("policyTypes").path + "[" + itoa(i) + "]"}, t, "Ingress", "Egress")
	}
	egress, _ := r.list(spec.child("egress"))
	on := map[string]bool{"ingress": slices.Contains(types, "Ingress"), "egress": slices.Contains(types, "Egress")}
	if len(types) == 0 {
		on["ingress"], on["egress"] = true, len(egress) > 0
	}
	var rules []*Rule
	for _, l := range []struct {
		name, peers string
		direction   Direction
	}{{"ingress", "from", Ingress}, {"egress", "to", Egress}} {
		entries, _ := r.items(spec.child(l.name), l.peers, "ports")
		read := make([]*Rule, len(entries), len(entries)+1)
		for i, item := range entries {
			read[i] = &Rule{List: l.name, Index: i, path: item.path}
			r.networkPeers(item.child(l.peers), read[i])
			read[i].ports = r.networkPorts(item.child("ports"))
		}
		if !on[l.name] {
			continue // its rules are checked, and ignored
		}
		if len(read) == 0 {
			read = append(read, &Rule{List: l.name, path: spec.child(l.name).path, nothing: true})
		}
		for _, rule := range read {
			rule.Ref, rule.Direction, rule.Tier, rule.DefaultDeny = r.ref, l.direction, TierPolicy, true
			rule.Labels, rule.subject = r.derivedLabels(), subject
		}
		rules = append(rules, read...)
	}
	return rules
}

// networkPeers reads from or to: absent and empty are any peer.
func (r *reader) networkPeers(n node, rule *Rule) {
	items, _ := r.items(n, "podSelector", "namespaceSelector", "ipBlock")
	rule.peers.any = len(items) == 0
	for _, item := range items {
		pods, namespaces, block := item.child("podSelector"), item.child("namespaceSelector"), item.child("ipBlock")
		selectors := !pods.absent() || !namespaces.absent()
		s := r.podPeers(pods, namespaces)
		c := r.ipBlock(block)
		switch {
		case selectors == !block.absent():
			r.warn(item, "exactly one of ipBlock and selectors must be given: it selects nobody")
		case selectors:
			rule.peers.terms = append(rule.peers.terms, endpointsTerm(s))
		default:
			rule.peers.cidrs = append(rule.peers.cidrs, c)
		}
	}
	rule.peers.finish(r.o)
}

// podPeers joins a pod selector and a namespace selector; without the latter pods are those of the policy's namespace.
func (r *reader) podPeers(pods, namespaces node) *Selector {
	all, _ := r.requirements(pods, plainKeys)
	if namespaces.absent() {
		all = append(all, inNamespace(r.ref.Namespace))
	} else {
		of, _ := r.requirements(namespaces, namespaceKeys)
		all = append(append(all, of...), inAnyNamespace())
	}
	s := newSelector(all)
	if s.mentions(namesCluster) {
		return s
	}
	return s.with(r.inLocalCluster()) // whatever AllClusters says (spec 13)
}

func (r *reader) ipBlock(n node) cidrItem {
	if !r.object(n, "cidr", "except") {
		return cidrItem{}
	}
	c := cidrItem{prefix: r.cidrRule(n.child("cidr"))}
	holes, _ := r.list(n.child("except"))
	for _, h := range holes {
		c.except = append(c.except, r.cidrRule(h))
	}
	r.holes(holes, c.prefix, c.except)
	return c
}

// networkPorts reads ports: absent and empty are every port and protocol.
func (r *reader) networkPorts(n node) portPart {
	items, _ := r.items(n, "protocol", "port", "endPort")
	part := portPart{given: len(items) > 0}
	for _, item := range items {
		part.specs = append(part.specs, r.networkPort(item))
	}
	return part
}

func (r *reader) networkPort(n node) portSpec {
	spec := allPorts(r.kubernetesProtocol(n.child("protocol")))
	port, end := n.child("port"), n.child("endPort")
	number, numeric := uint16(0), false
	switch v := port.v.(type) {
	case nil:
	case string:
		spec.name = r.portName(port, v)
	case json.Number:
		number, numeric = uint16(r.integer(port, 1, maxPort)), true
		spec.first, spec.last = number, number
	default:
		r.wrongType(port, "a number or a name")
	}
	if end.absent() {
		return spec
	}
	last := uint16(r.integer(end, 1, maxPort))
	switch {
	case !numeric:
		r.fail(end, "endPort may not be specified when port is not specified or not a number")
	case last < number:
		r.fail(end, "endPort must be greater than or equal to port")
	}
	spec.last = last
	return spec
}

func (r *reader) kubernetesProtocol(n node) uint8 {
	switch text := r.str(n); text {
	case "", "TCP":
		return TCP
	case "UDP":
		return UDP
	case "SCTP":
		return SCTP
	default:
		r.fail(n, "unsupported value %q of protocol: must be one of TCP, UDP, SCTP", text)
		return 0
	}
}

func (r *reader) portName(n node, text string) string {
	if !isPortName(text) {
		r.fail(n, "port name %q must be at most 15 letters, digits and single dashes, with at least one letter", text)
	}
	return strings.ToLower(text)
}
