// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"net/netip"
	"slices"
	"strings"
)

// clusterDialect is how a kind of policy.networking.k8s.io is written (spec 17).
type clusterDialect struct {
	fixedTier  bool // the kind says the tier
	tier       Tier
	noPriority bool
	actions    []string // allow first
	ports      string   // name of the list
	maxRules   int
	maxPeers   int
}

func dialectOf(kind string) clusterDialect {
	switch kind {
	case "AdminNetworkPolicy":
		return clusterDialect{true, TierAdmin, false, []string{"Allow", "Deny", "Pass"}, "ports", 100, 100}
	case "BaselineAdminNetworkPolicy":
		return clusterDialect{true, TierBaseline, true, []string{"Allow", "Deny"}, "ports", 100, 100}
	default:
		return clusterDialect{actions: []string{"Accept", "Deny", "Pass"}, ports: "protocols", maxRules: 25, maxPeers: 25}
	}
}

// clusterPolicy reads ClusterNetworkPolicy, AdminNetworkPolicy and BaselineAdminNetworkPolicy.
func (r *reader) clusterPolicy(doc node) []*Rule {
	r.prefix = "Invalid " + r.ref.Kind + " spec: "
	d := dialectOf(r.ref.Kind)
	spec := doc.child("spec")
	fields := []string{"subject", "ingress", "egress"}
	if !d.noPriority {
		fields = append(fields, "priority")
	} else if r.ref.Name != "default" {
		r.fail(node{path: "metadata.name"}, "the name must be default")
	}
	if !d.fixedTier {
		fields = append(fields, "tier")
	}
	if spec.absent() {
		r.fail(spec, "spec must be specified")
	}
	r.object(spec, fields...)
	if !d.fixedTier {
		tier := r.str(spec.child("tier"))
		r.oneOf(spec.child("tier"), tier, "Admin", "Baseline")
		if tier == "Baseline" {
			d.tier = TierBaseline
		}
	}
	if !d.noPriority && spec.child("priority").absent() {
		r.fail(spec.child("priority"), "priority must be specified")
	}
	priority := int(r.integer(spec.child("priority"), 0, 1000))
	subject, known := r.clusterSubject(spec.child("subject"))

	var rules []*Rule
	for _, l := range []struct {
		name, peers string
		direction   Direction
	}{{"ingress", "from", Ingress}, {"egress", "to", Egress}} {
		items, _ := r.items(spec.child(l.name), "name", "action", l.peers, d.ports)
		if len(items) > d.maxRules {
			r.fail(spec.child(l.name), "too many rules, the max is %d", d.maxRules)
		}
		for i, item := range items {
			rule := &Rule{
				Ref: r.ref, List: l.name, Index: i, Direction: l.direction, Tier: d.tier, Priority: priority,
				Labels: r.derivedLabels(), subject: subject, path: item.path,
			}
			if !r.clusterRule(item, item.child(l.peers), rule, d) || !known {
				failClosed(rule)
			}
			rules = append(rules, rule)
		}
	}
	return rules
}

// failClosed is for a rule that says something that a newer schema knows: what it allows is nothing, what it denies or passes on is denied whole.
func failClosed(r *Rule) {
	if r.Action == ActionAllow {
		r.nothing = true
		return
	}
	r.Action, r.Deny = ActionDeny, true
	r.peers = peerPart{any: true}
	r.ports = portPart{}
}

// clusterRule reads one rule. False = it names a peer in a way that is not known.
func (r *reader) clusterRule(n, peers node, rule *Rule, d clusterDialect) bool {
	name, action := r.str(n.child("name")), r.str(n.child("action"))
	if len(name) > 100 {
		r.fail(n.child("name"), "name must have at most 100 characters")
	}
	r.oneOf(n.child("action"), action, d.actions...)
	rule.Action = Action(max(0, slices.Index(d.actions, action)))
	rule.Deny = rule.Action == ActionDeny
	rule.ports = r.clusterPorts(n.child(d.ports), d)
	items, _ := r.list(peers)
	if len(items) == 0 || len(items) > d.maxPeers {
		r.fail(peers, "%s must have 1 to %d items", last(peers.path), d.maxPeers)
	}
	named := slices.ContainsFunc(rule.ports.specs, func(s portSpec) bool { return s.name != "" })
	known := true
	for _, item := range items {
		known = r.clusterPeer(item, rule, named) && known
	}
	rule.peers.finish(r.o)
	return known
}

// oneField checks that exactly one of the fields is set. False = none, and perhaps one that is not known.
func (r *reader) oneField(n node, fields ...string) bool {
	if n.absent() {
		return false
	}
	if _, ok := n.v.(map[string]any); !ok {
		r.wrongType(n, "an object")
		return false
	}
	if !n.has(fields...) {
		return false
	}
	r.object(n, fields...)
	set := slices.DeleteFunc(slices.Clone(fields), func(k string) bool { return n.child(k).absent() })
	if len(set) > 1 {
		r.fail(n, "exactly one of %s may be set, not %s", strings.Join(fields, ", "), strings.Join(set, " and "))
	}
	return true
}

func (r *reader) clusterSubject(n node) (*Selector, bool) {
	if n.absent() {
		r.fail(n, "subject must be specified")
	}
	if !r.oneField(n, "namespaces", "pods") {
		// Its rules fail closed, for every pod.
		return newSelector([]requirement{inAnyNamespace()}), false
	}
	return newSelector(r.clusterPods(n)), true
}

// clusterPods reads namespaces or pods of a subject or peer.
func (r *reader) clusterPods(n node) []requirement {
	all := []requirement{inAnyNamespace()}
	if namespaces := n.child("namespaces"); !namespaces.absent() {
		of, _ := r.requirements(namespaces, namespaceKeys)
		return append(all, of...)
	}
	pods := n.child("pods")
	r.object(pods, "namespaceSelector", "podSelector")
	for _, k := range []string{"namespaceSelector", "podSelector"} {
		if pods.child(k).absent() {
			r.fail(pods.child(k), "%s must be specified", k)
		}
	}
	of, _ := r.requirements(pods.child("namespaceSelector"), namespaceKeys)
	own, _ := r.requirements(pods.child("podSelector"), plainKeys)
	return append(append(all, of...), own...)
}

func (r *reader) clusterPeer(n node, rule *Rule, named bool) bool {
	fields := []string{"namespaces", "pods"}
	if rule.Direction == Egress {
		fields = append(fields, "networks", "nodes", "domainNames")
	}
	if !r.oneField(n, fields...) {
		return false
	}
	if rule.Direction == Egress && named && n.has("networks", "nodes", "domainNames") {
		r.fail(n, "networks, nodes and domainNames cannot be combined with named ports")
	}
	p := &rule.peers
	switch {
	case n.has("networks"):
		r.networks(n.child("networks"), p)
	case n.has("nodes"):
		r.clusterNodes(n.child("nodes"), p)
	case n.has("domainNames"):
		r.domainNames(n.child("domainNames"), rule)
	default:
		p.terms = append(p.terms, endpointsTerm(r.clusterScope(newSelector(r.clusterPods(n)))))
	}
	return true
}

func (r *reader) networks(n node, p *peerPart) {
	items, _ := r.list(n)
	if len(items) == 0 || len(items) > 25 {
		r.fail(n, "networks must have 1 to 25 items")
	}
	p.networks = true
	for _, item := range items {
		p.cidrs = append(p.cidrs, cidrItem{prefix: r.cidrRule(item)})
	}
}

// clusterNodes reads a selector of nodes, the subject's own included.
func (r *reader) clusterNodes(n node, p *peerPart) {
	s := r.selector(n, sourced)
	if s == nil {
		return
	}
	if s.Key() != "" && !r.o.NodeSelectorLabels {
		r.fail(n, `FromNodes/ToNodes rules can only be applied when the "enable-node-selector-labels" flag is set`)
	}
	p.terms = append(p.terms, r.remoteNodes(s))
	p.anyNode = append(p.anyNode, s)
}

func (r *reader) domainNames(n node, rule *Rule) {
	if rule.Action != ActionAllow {
		r.fail(n, "domainNames may only be used with action Accept")
	}
	names, _ := r.strings(n)
	if len(names) == 0 || len(names) > 25 {
		r.fail(n, "domainNames must have 1 to 25 items")
	}
	for i, name := range names {
		at := node{path: n.path + "[" + itoa(i) + "]"}
		rest, wild := strings.CutPrefix(name, "*.")
		if rest == "" {
			r.fail(at, "a domain name must not be empty")
		}
		r.characters(at, "domainNames", rest, false)
		if wild {
			rule.FQDNs = append(rule.FQDNs, NameSelector{MatchPattern: "**." + rest})
		} else {
			rule.FQDNs = append(rule.FQDNs, NameSelector{MatchName: rest})
		}
	}
	rule.fqdnPath = n.path
}

// clusterPorts reads protocols or ports: absent is all traffic.
func (r *reader) clusterPorts(n node, d clusterDialect) portPart {
	items, given := r.list(n)
	if given && (len(items) == 0 || len(items) > 100) {
		r.fail(n, "%s must have 1 to 100 items", last(n.path))
	}
	part := portPart{given: given}
	fields := []string{"tcp", "udp", "sctp", "destinationNamedPort"}
	if d.ports == "ports" {
		fields = []string{"portNumber", "portRange", "namedPort"}
	}
	for _, item := range items {
		if !r.oneField(item, fields...) {
			for _, k := range item.keys() {
				r.fail(item.child(k), "unknown field %q", k)
			}
			r.fail(item, "exactly one of %s must be set", strings.Join(fields, ", "))
			break
		}
		if d.ports == "ports" {
			part.specs = append(part.specs, r.adminPort(item))
		} else {
			part.specs = append(part.specs, r.clusterPort(item))
		}
	}
	return part
}

func (r *reader) clusterPort(n node) portSpec {
	if name := n.child("destinationNamedPort"); !name.absent() {
		return portSpec{name: strings.ToLower(r.portName(name, r.str(name)))}
	}
	for _, p := range []struct {
		field string
		proto uint8
	}{{"tcp", TCP}, {"udp", UDP}, {"sctp", SCTP}} {
		of := n.child(p.field)
		if of.absent() {
			continue
		}
		spec := allPorts(p.proto)
		r.object(of, "destinationPort")
		port := of.child("destinationPort")
		if port.absent() {
			return spec
		}
		if !r.oneField(port, "number", "range") {
			r.fail(port, "exactly one of number, range must be set")
			return spec
		}
		if number := port.child("number"); !number.absent() {
			spec.first = uint16(r.integer(number, 1, maxPort))
			spec.last = spec.first
			return spec
		}
		r.object(port.child("range"), "start", "end")
		spec.first, spec.last = r.portRange(port.child("range"))
		return spec
	}
	return portSpec{}
}

func (r *reader) portRange(n node) (first, last uint16) {
	for _, k := range []string{"start", "end"} {
		if n.child(k).absent() {
			r.fail(n.child(k), "%s must be specified", k)
		}
	}
	first, last = uint16(r.integer(n.child("start"), 1, maxPort)), uint16(r.integer(n.child("end"), 1, maxPort))
	if first >= last {
		r.fail(n, "start %d must be less than end %d", first, last)
	}
	return first, last
}

// adminPort reads an item of ports of the older kinds.
func (r *reader) adminPort(n node) portSpec {
	if name := n.child("namedPort"); !name.absent() {
		return portSpec{name: strings.ToLower(r.portName(name, r.str(name)))}
	}
	if at := n.child("portNumber"); !at.absent() {
		r.object(at, "protocol", "port")
		if at.child("port").absent() {
			r.fail(at.child("port"), "port must be specified")
		}
		port := uint16(r.integer(at.child("port"), 1, maxPort))
		return portSpec{proto: r.kubernetesProtocol(at.child("protocol")), first: port, last: port}
	}
	at := n.child("portRange")
	r.object(at, "protocol", "start", "end")
	spec := portSpec{proto: r.kubernetesProtocol(at.child("protocol"))}
	spec.first, spec.last = r.portRange(at)
	return spec
}

// localNode is the term for the subject's own node, if a `nodes` selector means it.
func localNode(selectors []*Selector, s *Subject) *Term {
	if slices.ContainsFunc(selectors, func(n *Selector) bool { return n.Matches(s.Node) }) {
		return hostTerm()
	}
	return nil
}

func hostTerm() *Term { return entityTerm("host") }

// addressItem is the prefix of one address.
func addressItem(a netip.Addr) cidrItem {
	a = a.Unmap()
	return cidrItem{prefix: netip.PrefixFrom(a, a.BitLen())}
}
