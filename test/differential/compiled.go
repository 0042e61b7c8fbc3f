// SPDX-License-Identifier: Apache-2.0

// Package differential compares the compiler of policy, and the datapath that its results are loaded into, with the reference evaluator, on random worlds.
// It stands where the policy service and the agent stand: it gives ends their labels and peers, and shares that with neither side.
package differential

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	"github.com/weirmesh/weir/internal/labelset"
	"github.com/weirmesh/weir/internal/policy"
	"github.com/weirmesh/weir/test/reference"
)

// Compiled is a world in the compiler's terms. It is not safe for concurrent use.
type Compiled struct {
	cluster *reference.Cluster
	options policy.Options
	objects []*policy.Object
	rules   []*policy.Rule

	numbers  map[string]uint32 // label sets of pods
	resolved map[resolvedKey]*policy.Resolved
	prefixes []netip.Prefix // of all policies: what the addresses outside are told apart by
	// conflicts are the sides whose rules contradict each other: their policies are not there.
	conflicts map[resolvedKey]error
	keys      map[string]bool // of labels that make identities: those that policies name
	names     map[string]bool // of ports that tell addresses apart
}

type resolvedKey struct {
	end       string
	direction policy.Direction
}

// Compile parses the objects of a cluster, each as the document that a user would write.
func Compile(c *reference.Cluster) (*Compiled, error) {
	out := &Compiled{cluster: c, options: options(c.Config), numbers: map[string]uint32{}, resolved: map[resolvedKey]*policy.Resolved{},
		keys: map[string]bool{}, names: map[string]bool{}, conflicts: map[resolvedKey]error{}}
	for _, o := range c.Policies {
		raw, err := json.Marshal(o)
		if err != nil {
			return nil, err
		}
		parsed, err := policy.Parse(raw, out.options)
		if err != nil {
			return nil, fmt.Errorf("parse %s: %w", raw, err)
		}
		out.objects = append(out.objects, parsed)
		out.rules = append(out.rules, parsed.Rules...)
		out.name(parsed)
	}
	for _, s := range out.subjects() {
		for _, d := range []policy.Direction{policy.Ingress, policy.Egress} {
			subject := out.subject(s)
			r, err := policy.Resolve(out.options, subject, d, out.rules, out)
			if err != nil && strings.HasPrefix(err.Error(), "cannot merge ") {
				out.conflicts[resolvedKey{s, d}] = err
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("resolve %s of %s: %w", directionName(d), s, err)
			}
			out.resolved[resolvedKey{s, d}] = r
			out.prefixes = append(out.prefixes, r.Prefixes()...)
			for _, name := range r.NamedPorts() {
				out.names[name] = true
			}
		}
	}
	for _, x := range c.Externals {
		if a := netip.MustParseAddr(x.IP); x.KubeAPIServer {
			out.prefixes = append(out.prefixes, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	return out, nil
}

// name notes the label keys that an object names: an identity may lack all others.
func (c *Compiled) name(o *policy.Object) {
	for _, k := range o.LabelKeys() {
		c.keys[k] = true
	}
	if o.UsesServices() {
		for _, s := range c.cluster.Services {
			for k := range s.Selector {
				c.keys[k] = true
			}
		}
	}
}

func directionName(d policy.Direction) string {
	if d == policy.Ingress {
		return "ingress"
	}
	return "egress"
}

func options(f reference.Config) policy.Options {
	o := policy.Options{
		ClusterName: f.ClusterName, AllClusters: f.PolicyDefaultLocalCluster != nil && !*f.PolicyDefaultLocalCluster, Audit: f.PolicyAuditMode,
		LocalhostNeedsRule: f.AllowLocalhost == "policy", HostFirewall: f.HostFirewall, NodeSelectorLabels: f.EnableNodeSelectorLabels,
		CIDRMatchesNodes: slices.Contains(f.PolicyCIDRMatchMode, "nodes"), CIDRMatchesPods: slices.Contains(f.PolicyCIDRMatchMode, "pods"),
		AlwaysDefaultDeny: f.EnableNonDefaultDenyPolicies != nil && !*f.EnableNonDefaultDenyPolicies, DualStack: len(f.IPFamilies) > 1,
	}
	switch f.PolicyEnforcement {
	case "always":
		o.Enforcement = policy.ModeAlways
	case "never":
		o.Enforcement = policy.ModeNever
	}
	return o
}

// subjects are the ends that have policies of their own; the host network's pods are their nodes.
func (c *Compiled) subjects() []string {
	out := []string{"entity:health", "entity:ingress", "entity:init"}
	for _, n := range c.cluster.Nodes {
		if c.options.HostFirewall {
			out = append(out, "node:"+n.Name)
		}
	}
	for _, p := range c.cluster.Pods {
		if !p.HostNetwork && p.Cluster == "" {
			out = append(out, p.Namespace+"/"+p.Name)
		}
	}
	return out
}

// canonical is the end that an end really is: host-network pods are nodes, known addresses are who has them.
func (c *Compiled) canonical(end string) string {
	if address, ok := strings.CutPrefix(end, "ip:"); ok {
		for _, p := range c.cluster.Pods {
			if !p.HostNetwork && (p.IP == address || p.IP6 == address) {
				return p.Namespace + "/" + p.Name
			}
		}
		for _, n := range c.cluster.Nodes {
			if n.IP == address || n.IP6 == address {
				return "node:" + n.Name
			}
		}
		return end
	}
	if p := c.pod(end); p != nil && p.HostNetwork {
		return "node:" + p.Node
	}
	return end
}

func (c *Compiled) pod(end string) *reference.Pod {
	for i, p := range c.cluster.Pods {
		if p.Namespace+"/"+p.Name == end {
			return &c.cluster.Pods[i]
		}
	}
	return nil
}

func (c *Compiled) node(name string) reference.Node {
	for _, n := range c.cluster.Nodes {
		if n.Name == name {
			return n
		}
	}
	panic("no node is named " + name)
}

// nodeOf an end inside; "" outside. Entities live on the first node.
func (c *Compiled) nodeOf(end string) string {
	kind, name, ok := strings.Cut(end, ":")
	switch {
	case ok && kind == "node":
		return name
	case ok && kind == "entity":
		return c.cluster.Nodes[0].Name
	case ok:
		return ""
	}
	return c.pod(end).Node
}

func set(labels map[string]string) labelset.Set {
	var out labelset.Set
	for k, v := range labels {
		out = append(out, k+"="+v)
	}
	slices.Sort(out)
	return out
}

func (c *Compiled) clusterName() string {
	if c.options.ClusterName == "" {
		return "default"
	}
	return c.options.ClusterName
}

func (c *Compiled) podLabels(p *reference.Pod) labelset.Set {
	labels := map[string]string{
		"k8s:io.kubernetes.pod.namespace": p.Namespace, "k8s:io.cilium.k8s.policy.serviceaccount": "default", "k8s:io.cilium.k8s.policy.cluster": c.clusterName(),
		"k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name": p.Namespace,
	}
	if p.ServiceAccount != "" {
		labels["k8s:io.cilium.k8s.policy.serviceaccount"] = p.ServiceAccount
	}
	if p.Cluster != "" {
		labels["k8s:io.cilium.k8s.policy.cluster"] = p.Cluster
	}
	for k, v := range p.Labels {
		if c.keys[k] {
			labels["k8s:"+k] = v
		}
	}
	for _, ns := range c.cluster.Namespaces {
		for k, v := range ns.Labels {
			if ns.Name == p.Namespace && c.keys["io.cilium.k8s.namespace.labels."+k] {
				labels["k8s:io.cilium.k8s.namespace.labels."+k] = v
			}
		}
	}
	return set(labels)
}

func sourced(source string, labels map[string]string) labelset.Set {
	out := map[string]string{}
	for k, v := range labels {
		out[source+":"+k] = v
	}
	return set(out)
}

func namedPorts(p *reference.Pod) []policy.NamedPort {
	var out []policy.NamedPort
	for _, port := range p.Ports {
		out = append(out, policy.NamedPort{Name: strings.ToLower(port.Name), Proto: protocols[port.Protocol], Port: uint16(port.Port)})
	}
	slices.SortFunc(out, compareNamed)
	return slices.Compact(out)
}

func compareNamed(a, b policy.NamedPort) int {
	if n := strings.Compare(a.Name, b.Name); n != 0 {
		return n
	}
	return (int(a.Proto)<<16 | int(a.Port)) - (int(b.Proto)<<16 | int(b.Port))
}

var protocols = map[string]uint8{"": policy.TCP, "TCP": policy.TCP, "UDP": policy.UDP, "SCTP": policy.SCTP}

func (c *Compiled) subject(end string) *policy.Subject {
	kind, name, special := strings.Cut(end, ":")
	switch {
	case special && kind == "node":
		return &policy.Subject{Host: true, Labels: sourced("k8s", c.node(name).Labels)}
	case special:
		return &policy.Subject{Labels: labelset.Set{"reserved:" + name}, Node: sourced("k8s", c.cluster.Nodes[0].Labels)}
	}
	p := c.pod(end)
	return &policy.Subject{Labels: c.podLabels(p), NamedPorts: namedPorts(p), Node: sourced("k8s", c.node(p.Node).Labels), Visibility: visibility(p)}
}

// visibility is what a pod's annotation asks for; a bad one asks for nothing.
func visibility(p *reference.Pod) []policy.Visibility {
	text, ok := p.Annotations[policy.VisibilityAnnotation]
	if !ok {
		text = p.Annotations[policy.VisibilityAnnotationAlias]
	}
	v, err := policy.ParseVisibility(text)
	if err != nil {
		return nil
	}
	return v
}

// address of an end in one family; invalid if it has none.
func (c *Compiled) address(end string, v6 bool) netip.Addr {
	kind, name, special := strings.Cut(end, ":")
	var v4text, v6text string
	switch {
	case special && kind == "ip":
		return netip.MustParseAddr(name)
	case special && kind == "node":
		v4text, v6text = c.node(name).IP, c.node(name).IP6
	case !special:
		v4text, v6text = c.pod(end).IP, c.pod(end).IP6
	}
	if v6 {
		v4text = v6text
	}
	a, _ := netip.ParseAddr(v4text)
	return a
}

// peer is how an end looks to policies of subjects on a node, where `networks` must be told apart.
func (c *Compiled) peer(end, viewer string, v6 bool, networks []netip.Prefix) *policy.Peer {
	address := c.address(end, v6)
	p := &policy.Peer{}
	kind, name, special := strings.Cut(end, ":")
	switch {
	case special && kind == "ip":
		p = c.outside(address)
		for _, l := range c.cluster.Learnt {
			if l.Addr == address && l.Node == viewer {
				p.Names = append(p.Names, l.Name)
			}
		}
		return p
	case special && kind == "entity":
		p.Key = map[string]string{"health": "4", "init": "5", "ingress": "8", "unmanaged": "3"}[name]
		p.Labels = labelset.Set{"reserved:" + name}
	case special && kind == "node":
		c.nodePeer(p, name, viewer)
	default:
		pod := c.pod(end)
		p.Labels = c.podLabels(pod)
		for _, n := range namedPorts(pod) {
			if c.names[n.Name] {
				p.NamedPorts = append(p.NamedPorts, n)
			}
		}
		p.Key = fmt.Sprint(c.number(p.Labels))
	}
	var variant []string
	for _, n := range p.NamedPorts {
		variant = append(variant, fmt.Sprintf("%s=%d/%d", n.Name, n.Port, n.Proto))
	}
	for _, n := range networks {
		if address.IsValid() && n.Contains(address) {
			p.Networks = append(p.Networks, n)
			variant = append(variant, n.String())
		}
	}
	if len(variant) > 0 {
		p.Key += "/" + strings.Join(variant, ";")
	}
	return p
}

func (c *Compiled) number(labels labelset.Set) uint32 {
	n, ok := c.numbers[labels.Key()]
	if !ok {
		n = 256 + uint32(len(c.numbers))
		c.numbers[labels.Key()] = n
	}
	return n
}

func (c *Compiled) nodePeer(p *policy.Peer, name, viewer string) {
	n := c.node(name)
	var more labelset.Set
	switch {
	case name == viewer:
		p.Key, p.Labels = "1", labelset.Set{"reserved:host"}
	case c.options.NodeSelectorLabels:
		p.Key, p.Labels = "node:"+name, labelset.Set{"reserved:remote-node", "k8s:io.cilium.k8s.policy.cluster=" + c.clusterName()}
		more = sourced("node", n.Labels)
	case n.KubeAPIServer:
		p.Key, p.Labels = "7", labelset.Set{"reserved:remote-node"}
	default:
		p.Key, p.Labels = "6", labelset.Set{"reserved:remote-node"}
	}
	if n.KubeAPIServer {
		more = append(more, "reserved:kube-apiserver")
	}
	p.Labels = append(p.Labels, more...)
	slices.Sort(p.Labels)
}

// outside is the most specific peer that holds an address.
func (c *Compiled) outside(a netip.Addr) *policy.Peer {
	prefix := netip.PrefixFrom(a, 0).Masked()
	for _, p := range c.prefixes {
		if p.Contains(a) && p.Bits() > prefix.Bits() {
			prefix = p
		}
	}
	return c.prefixPeer(prefix)
}

// prefixPeer is everybody outside for whom this prefix is the most specific one.
func (c *Compiled) prefixPeer(prefix netip.Prefix) *policy.Peer {
	p := &policy.Peer{Key: "2", Prefix: prefix, Labels: labelset.Set{"reserved:world"}}
	if c.options.DualStack {
		p.Key, p.Labels = "9", labelset.Set{"reserved:world-ipv4"}
		if prefix.Addr().Is6() {
			p.Key, p.Labels = "10", labelset.Set{"reserved:world-ipv6"}
		}
	}
	if prefix.Bits() > 0 {
		p.Key = "cidr:" + prefix.String()
		p.Labels = append(p.Labels, p.Key)
	}
	for _, x := range c.cluster.Externals {
		if a := netip.MustParseAddr(x.IP); x.KubeAPIServer && netip.PrefixFrom(a, a.BitLen()) == prefix {
			p.Labels = append(p.Labels, "reserved:kube-apiserver")
		}
	}
	slices.Sort(p.Labels)
	return p
}

// Services implements policy.World.
func (c *Compiled) Services(namespace, name string, selector *policy.Selector) []policy.Service {
	var out []policy.Service
	for _, s := range c.cluster.Services {
		labels := sourced("k8s", s.Labels)
		if namespace != "" && namespace != s.Namespace || name != "" && name != s.Name || selector != nil && !selector.Matches(labels) {
			continue
		}
		v := policy.Service{Namespace: s.Namespace, Name: s.Name, Labels: labels, Selector: s.Selector}
		for _, a := range s.Endpoints {
			v.Addresses = append(v.Addresses, netip.MustParseAddr(a))
		}
		out = append(out, v)
	}
	return out
}

// CIDRGroups implements policy.World.
func (c *Compiled) CIDRGroups(name string, selector *policy.Selector) []netip.Prefix {
	var out []netip.Prefix
	for _, o := range c.objects {
		if g := o.CIDRGroup; g != nil && (name == "" || name == g.Name) && (selector == nil || selector.Matches(g.Labels)) {
			out = append(out, g.Prefixes...)
		}
	}
	return out
}

// NamedPorts implements policy.World.
func (c *Compiled) NamedPorts(name string) []policy.NamedPort {
	var out []policy.NamedPort
	for i := range c.cluster.Pods {
		for _, p := range namedPorts(&c.cluster.Pods[i]) {
			if p.Name == name {
				out = append(out, p)
			}
		}
	}
	slices.SortFunc(out, compareNamed)
	return slices.Compact(out)
}

// Decide says what both sides of a packet say, and how: the compiler's Decide and the lookup in the class of the peer must agree, else the error tells.
func (c *Compiled) Decide(p reference.Packet) (egress, ingress reference.Verdict, err error) {
	from, to := c.canonical(p.From), c.canonical(p.To)
	if from == to {
		return reference.Allow, reference.Allow, nil
	}
	if egress, err = c.side(from, to, policy.Egress, p); err != nil {
		return 0, 0, err
	}
	ingress, err = c.side(to, from, policy.Ingress, p)
	return egress, ingress, err
}

func (c *Compiled) side(subject, peer string, d policy.Direction, p reference.Packet) (reference.Verdict, error) {
	decision, err := c.decision(subject, peer, d, p)
	return reference.Verdict(decision.Verdict), err
}

// decision of one side, in which Decide, the class and the explanation agree.
func (c *Compiled) decision(subject, peer string, d policy.Direction, p reference.Packet) (policy.Decision, error) {
	r := c.resolved[resolvedKey{subject, d}]
	if r == nil || r.Key == "" {
		return policy.Decision{Verdict: policy.Allow}, nil
	}
	who := c.peer(peer, c.nodeOf(subject), p.V6, r.Networks())
	number, port := p.ProtocolNumber(), uint16(p.Port)
	decision := r.Decide(who, number, port)
	if verdict, filter := lookup(r.Class(r.Match(who)), number, port); verdict != decision.Verdict || !reflect.DeepEqual(filter, decision.Filter) {
		return decision, fmt.Errorf("%s of %s: Decide says %v, the class of %v (terms %v) says %v", directionName(d), subject, decision.Verdict, who.Key, r.Match(who), verdict)
	}
	if e := r.Explain(who, number, port); !reflect.DeepEqual(e.Decision, decision) {
		return decision, fmt.Errorf("%s of %s: Decide says %v, Explain %v", directionName(d), subject, decision, e.Decision)
	}
	return decision, nil
}

// lookup reads a class as its documentation says.
func lookup(ranges []policy.Range, protocol uint8, port uint16) (policy.Verdict, *policy.Filter) {
	rest, named := policy.DefaultDeny, false
	for _, r := range ranges {
		switch {
		case r.Proto == policy.AnyProtocol:
			rest = r.Verdict
		case r.Proto == protocol && r.First <= port && port <= r.Last:
			return r.Verdict, r.Filter
		case r.Proto == protocol:
			named = true
		}
	}
	if named {
		return policy.DefaultDeny, nil
	}
	return rest, nil
}
