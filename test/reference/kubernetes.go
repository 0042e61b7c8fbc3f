// SPDX-License-Identifier: Apache-2.0

package reference

import (
	"slices"
	"strconv"
	"strings"
)

// networkPolicy adds what one NetworkPolicy says (spec 13).
func (c *Cluster) networkPolicy(o map[string]any, side Side, subject, peer end, p Packet, out *pot) {
	spec := object(o["spec"])
	namespace := metadata(o, "namespace")
	if subject.kind != podEnd || subject.pod.Namespace != namespace {
		return
	}
	if s := spec["podSelector"]; s != nil && !plain(s, subject.pod.Labels) {
		return
	}
	types := texts(spec["policyTypes"])
	if len(types) == 0 {
		types = []string{"Ingress"}
		if len(list(spec["egress"])) > 0 {
			types = append(types, "Egress")
		}
	}
	if !slices.ContainsFunc(types, func(t string) bool { return strings.EqualFold(t, string(side)) }) {
		return
	}
	out.enforced = true
	peers := map[Side]string{Ingress: "from", Egress: "to"}[side]
	for _, r := range list(spec[string(side)]) {
		rule := object(r)
		out.allowed = out.allowed || c.kubernetesPeers(list(rule[peers]), namespace, subject, peer) &&
			kubernetesPorts(list(rule["ports"]), side, subject, peer, p)
	}
}

// kubernetesPeers: absent or empty is any peer.
func (c *Cluster) kubernetesPeers(items []any, namespace string, subject, peer end) bool {
	for _, i := range items {
		item := object(i)
		switch {
		case item["ipBlock"] != nil && (item["podSelector"] != nil || item["namespaceSelector"] != nil):
			// Invalid; if one gets through, it selects nobody.
		case item["ipBlock"] != nil:
			block := object(item["ipBlock"])
			if c.cidr(text(block["cidr"]), texts(block["except"]), subject, peer) {
				return true
			}
		case item["podSelector"] != nil || item["namespaceSelector"] != nil:
			if c.kubernetesSelectors(item, namespace, peer) {
				return true
			}
		}
	}
	return len(items) == 0
}

func (c *Cluster) kubernetesSelectors(item map[string]any, namespace string, peer end) bool {
	if peer.kind != podEnd {
		return false
	}
	if s := item["namespaceSelector"]; s != nil && !plain(s, c.namespaceLabels(peer.pod.Namespace)) || s == nil && peer.pod.Namespace != namespace {
		return false
	}
	// Labels of source k8s, which name the cluster too.
	labels := map[string]string{}
	for _, l := range c.labels(peer, "") {
		if l.source == "k8s" {
			labels[l.key] = l.value
		}
	}
	s := item["podSelector"]
	if s != nil && !plain(s, labels) {
		return false
	}
	return mentions(terms(s), isOf(clusterKey)) || peer.pod.clusterName(c) == c.clusterName()
}

// kubernetesPorts: absent or empty is any port and protocol.
func kubernetesPorts(items []any, side Side, subject, peer end, p Packet) bool {
	for _, i := range items {
		item := object(i)
		protocol := strings.ToUpper(text(item["protocol"]))
		if protocol == "" {
			protocol = "TCP"
		}
		written := text(item["port"])
		first, err := strconv.Atoi(written)
		switch {
		case written == "":
			if transport(protocol, p) {
				return true
			}
		case err != nil:
			if namedPort(written, protocol, side, subject, peer, p) {
				return true
			}
		default:
			if transport(protocol, p) && first <= p.Port && p.Port <= max(first, number(item["endPort"])) {
				return true
			}
		}
	}
	return len(items) == 0
}

// tier evaluates the cluster-wide policies of one tier: by priority, then in order; the first match decides (spec 17). 0 = go on to the next tier.
func (c *Cluster) tier(name string, side Side, subject, peer end, p Packet) Verdict {
	if subject.kind != podEnd {
		return 0
	}
	var policies []map[string]any
	for _, o := range c.Policies {
		spec := object(o["spec"])
		kind := text(o["kind"])
		in := kind == "ClusterNetworkPolicy" && text(spec["tier"]) == name ||
			kind == "AdminNetworkPolicy" && name == "Admin" || kind == "BaselineAdminNetworkPolicy" && name == "Baseline"
		if in && (c.tierPods(object(spec["subject"]), subject) || unknown(object(spec["subject"]), "namespaces", "pods")) {
			policies = append(policies, spec)
		}
	}
	slices.SortStableFunc(policies, func(a, b map[string]any) int { return number(a["priority"]) - number(b["priority"]) })
	for _, spec := range policies {
		for _, r := range list(spec[string(side)]) {
			rule := object(r)
			if unknown(object(spec["subject"]), "namespaces", "pods") || unknownPeer(rule, side) { // of a newer schema: closed
				if action := text(rule["action"]); action == "Accept" || action == "Allow" {
					continue
				}
				return Deny
			}
			if !c.tierPeers(rule, side, peer) || !tierPorts(rule, side, subject, peer, p) {
				continue
			}
			switch text(rule["action"]) {
			case "Accept", "Allow":
				return Allow
			case "Deny":
				return Deny
			case "Pass":
				return 0
			}
			panic("action " + text(rule["action"]))
		}
	}
	return 0
}

// tierPods is a subject or a peer by namespaces or pods; pods in the host network are never matched.
func (c *Cluster) tierPods(by map[string]any, e end) bool {
	if e.kind != podEnd {
		return false
	}
	labels := c.namespaceLabels(e.pod.Namespace)
	if s := by["namespaces"]; s != nil {
		return plain(s, labels)
	}
	pods := object(by["pods"])
	return pods != nil && plain(pods["namespaceSelector"], labels) && plain(pods["podSelector"], e.pod.Labels)
}

// unknownPeer: some peer has none of the fields that are known.
func unknownPeer(rule map[string]any, side Side) bool {
	if side == Ingress {
		return slices.ContainsFunc(list(rule["from"]), func(i any) bool { return unknown(object(i), "namespaces", "pods") })
	}
	return slices.ContainsFunc(list(rule["to"]), func(i any) bool { return unknown(object(i), "namespaces", "pods", "networks", "nodes") })
}

func unknown(item map[string]any, fields ...string) bool {
	return !slices.ContainsFunc(fields, func(f string) bool { return item[f] != nil })
}

func (c *Cluster) tierPeers(rule map[string]any, side Side, peer end) bool {
	for _, i := range list(rule[map[Side]string{Ingress: "from", Egress: "to"}[side]]) {
		item := object(i)
		if c.tierPods(item, peer) {
			return true
		}
		if s := item["nodes"]; s != nil && peer.kind == nodeEnd && plain(s, c.nodeLabels(peer.node)) {
			return true
		}
		for _, network := range texts(item["networks"]) {
			if inPrefix(network, peer.addr) { // pods too
				return true
			}
		}
	}
	return false
}

// tierPorts reads protocols (v1alpha2) and ports (v1alpha1); absent is all traffic.
func tierPorts(rule map[string]any, side Side, subject, peer end, p Packet) bool {
	within := func(protocol string, first, last any) bool {
		return transport(strings.ToUpper(protocol), p) && number(first) <= p.Port && p.Port <= number(last)
	}
	protocols, ports := list(rule["protocols"]), list(rule["ports"])
	for _, i := range protocols {
		item := object(i)
		if name := text(item["destinationNamedPort"]); name != "" && namedPort(name, "ANY", side, subject, peer, p) {
			return true
		}
		for _, protocol := range []string{"tcp", "udp", "sctp"} {
			if item[protocol] == nil {
				continue
			}
			port := object(object(item[protocol])["destinationPort"])
			between := object(port["range"])
			switch {
			case port == nil:
				if transport(strings.ToUpper(protocol), p) {
					return true
				}
			case between != nil:
				if within(protocol, between["start"], between["end"]) {
					return true
				}
			default:
				if within(protocol, port["number"], port["number"]) {
					return true
				}
			}
		}
	}
	for _, i := range ports {
		item := object(i)
		one, between := object(item["portNumber"]), object(item["portRange"])
		if one != nil && within(protocolOr(one), one["port"], one["port"]) || between != nil && within(protocolOr(between), between["start"], between["end"]) {
			return true
		}
		if name := text(item["namedPort"]); name != "" && namedPort(name, "ANY", side, subject, peer, p) {
			return true
		}
	}
	return len(protocols)+len(ports) == 0
}

func protocolOr(m map[string]any) string {
	if p := text(m["protocol"]); p != "" {
		return p
	}
	return "TCP"
}
