// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/weirmesh/weir/internal/reserved"
)

// entryContext is what an entry of a direction list must know about where it stands.
type entryContext struct {
	rule *Rule
	deny bool
	host bool // subjects are nodes
	init bool // the subject selector names reserved:init
}

func (e *entryContext) ingress() bool { return e.rule.Direction == Ingress }

// cilium reads spec and specs of a CiliumNetworkPolicy or CiliumClusterwideNetworkPolicy.
func (r *reader) cilium(doc node) []*Rule {
	spec, specs := doc.child("spec"), doc.child("specs")
	list, ok := r.list(specs)
	if spec.absent() && (!ok || len(list) == 0) {
		r.fail(doc.child("spec"), "Invalid %s spec(s): empty policy", r.ref.Kind)
		return nil
	}
	var rules []*Rule
	first := 0
	if !spec.absent() {
		r.prefix = "Invalid " + r.ref.Kind + " spec: "
		rules = r.ruleObject(spec, 0)
		first = 1
	}
	r.prefix = "Invalid " + r.ref.Kind + " specs: "
	for i, item := range list {
		if item.absent() {
			item.v = map[string]any{}
		}
		rules = append(rules, r.ruleObject(item, first+i)...)
	}
	return rules
}

// ruleObject reads one rule object (spec 2.2).
func (r *reader) ruleObject(n node, position int) []*Rule {
	if !r.object(n, "endpointSelector", "nodeSelector", "ingress", "ingressDeny", "egress", "egressDeny", "enableDefaultDeny", "labels",
		"description", "log") {
		return nil
	}
	subject, host := r.subject(n)
	if r.err != nil {
		return nil
	}
	r.str(n.child("description"))
	labels := append(r.derivedLabels(), r.ruleLabels(n.child("labels"))...)
	log := r.log(n.child("log"))
	defaultDeny := n.child("enableDefaultDeny")
	r.object(defaultDeny, "ingress", "egress")

	var rules []*Rule
	for _, l := range []struct {
		name      string
		direction Direction
		deny      bool
	}{{"ingress", Ingress, false}, {"ingressDeny", Ingress, true}, {"egress", Egress, false}, {"egressDeny", Egress, true}} {
		entries, _ := r.list(n.child(l.name))
		for i, item := range entries {
			rule := &Rule{
				Ref: r.ref, Spec: position, List: l.name, Index: i,
				Direction: l.direction, Tier: TierPolicy, Action: ActionAllow, Deny: l.deny, DefaultDeny: true,
				Log: log, Labels: labels, subject: subject, host: host, path: item.path,
			}
			if l.deny {
				rule.Action = ActionDeny
			}
			side := "ingress"
			if l.direction == Egress {
				side = "egress"
			}
			if on := r.boolean(defaultDeny.child(side)); on != nil && !*on && !r.o.AlwaysDefaultDeny {
				rule.DefaultDeny = false
			}
			r.entry(item, &entryContext{rule: rule, deny: l.deny, host: host, init: subject.mentions(namesInit)})
			rules = append(rules, rule)
		}
	}
	for _, side := range []string{"ingress", "egress"} {
		r.boolean(defaultDeny.child(side))
	}
	if len(rules) == 0 {
		r.fail(n, "rule must have at least one of Ingress, IngressDeny, Egress, EgressDeny")
	}
	return rules
}

func namesInit(q requirement) bool { return q.source == reservedSource && q.key == "init" }

// subject reads endpointSelector or nodeSelector.
func (r *reader) subject(n node) (s *Selector, host bool) {
	endpoints, nodes := n.child("endpointSelector"), n.child("nodeSelector")
	switch {
	case endpoints.absent() && nodes.absent():
		r.fail(n, "rule must have one of EndpointSelector or NodeSelector")
	case !endpoints.absent() && !nodes.absent():
		r.fail(nodes, "rule cannot have both EndpointSelector and NodeSelector")
	case !nodes.absent() && r.ref.Namespace != "":
		r.fail(nodes, "rule cannot have NodeSelector")
	case !nodes.absent():
		if !r.o.HostFirewall {
			r.warn(nodes, "the host firewall is off: the policy has no effect")
		}
		return r.selector(nodes, sourced), true
	}
	requirements, ok := r.requirements(endpoints, sourced)
	if !ok {
		return nil, false
	}
	return r.subjectScope(endpoints, requirements), false
}

func (r *reader) derivedLabels() []string {
	const prefix = "k8s:io.cilium.k8s.policy."
	labels := []string{prefix + "derived-from=" + r.ref.Kind, prefix + "name=" + r.ref.Name}
	if r.ref.Namespace != "" {
		labels = append(labels, prefix+"namespace="+r.ref.Namespace)
	}
	if r.ref.UID != "" {
		labels = append(labels, prefix+"uid="+r.ref.UID)
	}
	return labels
}

func (r *reader) ruleLabels(n node) []string {
	items, _ := r.items(n, "key", "value", "source")
	var labels []string
	for _, item := range items {
		source, key := r.str(item.child("source")), r.str(item.child("key"))
		if key == "" {
			r.fail(item.child("key"), "a label needs a key")
		}
		if source == "" {
			source = "unspec"
		}
		label := source + ":" + key
		if v := r.str(item.child("value")); v != "" {
			label += "=" + v
		}
		labels = append(labels, label)
	}
	return labels
}

func (r *reader) log(n node) string {
	if !r.object(n, "value") {
		return ""
	}
	text := r.str(n.child("value"))
	if utf8.RuneCountInString(text) > 32 || strings.ContainsFunc(text, func(c rune) bool { return !unicode.IsPrint(c) }) {
		r.fail(n.child("value"), "log.value must be at most 32 printable characters")
	}
	return text
}

// entry reads one entry of a direction list (spec 2.3).
func (r *reader) entry(n node, e *entryContext) {
	if n.absent() {
		n.v = map[string]any{}
	}
	side, mirror := "from", "From"
	fields := []string{"toPorts", "icmps"}
	if !e.ingress() {
		side, mirror = "to", "To"
		fields = append(fields, "toServices")
		if !e.deny {
			fields = append(fields, "toFQDNs")
		}
	}
	if !e.deny {
		fields = append(fields, "authentication")
	}
	kinds := []string{"Endpoints", "CIDR", "CIDRSet", "Entities", "Nodes", "Groups"}
	for _, k := range append(kinds, "Requires") {
		fields = append(fields, side+k)
	}
	if !r.object(n, fields...) {
		return
	}
	if !e.ingress() {
		kinds = append(kinds, "Services", "FQDNs")
	}
	r.onePeerKind(n, side, mirror, kinds)
	if items, _ := r.list(n.child(side + "Requires")); len(items) > 0 {
		r.fail(n.child(side+"Requires"), "%sRequires: Too many: %d: must have at most 0 items", side, len(items))
	}
	if ports, _ := r.list(n.child("toPorts")); len(ports) > 0 {
		if icmps, _ := r.list(n.child("icmps")); len(icmps) > 0 {
			r.fail(n.child("icmps"), "the ICMPs block may only be present without ToPorts. Define a separate rule to use ToPorts")
		}
	}
	r.peers(n, side, e)
	e.rule.ports = r.toPorts(n.child("toPorts"), e)
	if icmps := r.icmps(n.child("icmps")); icmps.given {
		e.rule.ports = icmps
	}
	if auth := n.child("authentication"); !e.deny && r.object(auth, "mode") {
		e.rule.Authentication = r.str(auth.child("mode"))
		r.oneOf(auth.child("mode"), e.rule.Authentication, "required", "disabled", "test-always-fail")
	}
	// Neither peer nor port: nothing (spec 1, rule 10).
	e.rule.nothing = e.rule.peers.absent && !e.rule.ports.given
}

func (r *reader) onePeerKind(n node, side, mirror string, kinds []string) {
	seen := ""
	for _, k := range kinds {
		items, _ := r.list(n.child(side + k))
		if len(items) == 0 {
			continue
		}
		if seen != "" {
			r.fail(n.child(side+k), "combining %s and %s is not supported yet", mirror+seen, mirror+k)
		}
		seen = k
	}
}

// peers reads the peer members of an entry.
func (r *reader) peers(n node, side string, e *entryContext) {
	p := &e.rule.peers
	p.absent = true
	given := func(field string) node {
		at := n.child(side + field)
		p.absent = p.absent && at.absent()
		return at
	}
	endpoints, _ := r.items(given("Endpoints"), "matchLabels", "matchExpressions")
	for _, item := range endpoints {
		if s := r.selector(item, sourced); s != nil {
			p.terms = append(p.terms, endpointsTerm(r.peerScope(s, e.init)))
		}
	}
	entities, _ := r.list(given("Entities"))
	for _, item := range entities {
		t, everybody := r.entity(item)
		p.any = p.any || everybody
		if t != nil {
			p.terms = append(p.terms, t)
		}
	}
	static := r.cidrList(given("CIDR"))
	set, groups := r.cidrSet(given("CIDRSet"))
	p.cidrs, p.groups = append(static, set...), groups
	r.nodes(given("Nodes"), p)
	r.groups(given("Groups"), p)
	if !e.ingress() {
		r.services(given("Services"), p)
		if !e.deny {
			r.names(given("FQDNs"), e.rule)
			for _, s := range e.rule.FQDNs {
				p.terms = append(p.terms, nameTerm(s))
			}
		}
	}
	p.finish(r.o)
}

func (r *reader) nodes(n node, p *peerPart) {
	items, _ := r.items(n, "matchLabels", "matchExpressions")
	if len(items) > 0 && !r.o.NodeSelectorLabels {
		r.fail(n, `FromNodes/ToNodes rules can only be applied when the "enable-node-selector-labels" flag is set`)
	}
	for _, item := range items {
		if s := r.selector(item, sourced); s != nil {
			p.terms = append(p.terms, r.remoteNodes(s))
		}
	}
}

// remoteNodes is a term for nodes of this cluster, unless the selector names clusters.
func (r *reader) remoteNodes(s *Selector) *Term {
	if !r.o.AllClusters && !s.mentions(func(q requirement) bool { return q.key == reserved.ClusterKey }) {
		return nodesTerm(s, r.o.cluster())
	}
	return nodesTerm(s, "")
}

// groups reads fromGroups: there is no provider, so that they match nothing (spec 7.4).
func (r *reader) groups(n node, p *peerPart) {
	items, _ := r.items(n, "aws")
	for _, item := range items {
		aws := item.child("aws")
		r.object(aws, "labels", "securityGroupsIds", "securityGroupsNames", "region")
		r.strings(aws.child("securityGroupsIds"))
		r.strings(aws.child("securityGroupsNames"))
		r.str(aws.child("region"))
		if labels, ok := aws.child("labels").v.(map[string]any); ok {
			for k, v := range labels {
				r.str(node{aws.child("labels").path + "[" + k + "]", v})
			}
		} else if l := aws.child("labels"); !l.absent() {
			r.wrongType(l, "an object")
		}
	}
	if len(items) > 0 {
		r.warn(n, "no provider of groups is there: it matches nothing")
	}
}

func (r *reader) services(n node, p *peerPart) {
	items, _ := r.items(n, "k8sService", "k8sServiceSelector")
	for _, item := range items {
		byName, bySelector := item.child("k8sService"), item.child("k8sServiceSelector")
		if byName.absent() && bySelector.absent() {
			r.fail(item, "one of k8sService or k8sServiceSelector is required")
		}
		if r.object(byName, "serviceName", "namespace") {
			p.services = append(p.services, serviceRef{namespace: r.str(byName.child("namespace")), name: r.str(byName.child("serviceName"))})
			if r.str(byName.child("serviceName")) == "" {
				r.fail(byName.child("serviceName"), "serviceName must be specified")
			}
		}
		if r.object(bySelector, "selector", "namespace") {
			s := r.selector(bySelector.child("selector"), sourced)
			if s == nil {
				r.fail(bySelector.child("selector"), "selector must be specified")
			}
			p.services = append(p.services, serviceRef{namespace: r.str(bySelector.child("namespace")), selector: s})
		}
	}
}

func (r *reader) names(n node, rule *Rule) {
	items, _ := r.items(n, "matchName", "matchPattern")
	for _, item := range items {
		s := r.name(item)
		if (s.MatchName == "") == (s.MatchPattern == "") {
			r.fail(item, "only one of MatchName or MatchPattern is allowed in an FQDNSelector")
		}
		rule.FQDNs = append(rule.FQDNs, s)
	}
	rule.fqdnPath = n.path
}

// cidrGroup reads spec of a CiliumCIDRGroup.
func (r *reader) cidrGroup(doc node) *CIDRGroup {
	r.prefix = "Invalid CiliumCIDRGroup spec: "
	spec := doc.child("spec")
	r.object(spec, "externalCIDRs")
	if spec.absent() {
		r.fail(spec, "spec must be specified")
	}
	g := &CIDRGroup{Name: r.ref.Name}
	for _, item := range r.cidrList(spec.child("externalCIDRs")) {
		g.Prefixes = append(g.Prefixes, item.prefix)
	}
	slices.SortFunc(g.Prefixes, comparePrefixes)
	g.Prefixes = slices.Compact(g.Prefixes)
	labels := doc.child("metadata").child("labels")
	if m, ok := labels.v.(map[string]any); ok {
		for k, v := range m {
			g.Labels = append(g.Labels, groupSource+":"+k+"="+r.str(node{labels.path + "[" + k + "]", v}))
		}
	}
	slices.Sort(g.Labels)
	return g
}
