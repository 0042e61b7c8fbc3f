// SPDX-License-Identifier: Apache-2.0

package reference

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// specsOf returns the rule objects of a policy: spec, then specs (spec 2.1).
func specsOf(o map[string]any) []map[string]any {
	var out []map[string]any
	if o["spec"] != nil {
		out = append(out, object(o["spec"]))
	}
	for _, s := range list(o["specs"]) {
		out = append(out, object(s))
	}
	return out
}

func metadata(o map[string]any, key string) string { return text(object(o["metadata"])[key]) }

func clusterwide(o map[string]any) bool { return text(o["kind"]) == "CiliumClusterwideNetworkPolicy" }

// ciliumRule adds what one rule object says.
func (c *Cluster) ciliumRule(o, spec map[string]any, side Side, subject, peer end, p Packet, out *pot) {
	allows, denies := list(spec[string(side)]), list(spec[string(side)+"Deny"])
	if len(allows)+len(denies) == 0 || !c.ciliumSelects(o, spec, subject) {
		return
	}
	// spec 4: the switch, and the option that ignores it.
	ignored := c.Config.EnableNonDefaultDenyPolicies != nil && !*c.Config.EnableNonDefaultDenyPolicies
	if object(spec["enableDefaultDeny"])[string(side)] != false || ignored {
		out.enforced = true
	}
	for _, e := range allows {
		out.allowed = out.allowed || c.ciliumEntry(o, spec, object(e), side, subject, peer, p)
	}
	for _, e := range denies {
		out.denied = out.denied || c.ciliumEntry(o, spec, object(e), side, subject, peer, p)
	}
}

// ciliumSelects: the subjects of a rule object (spec 2.2, 3.4, 6.3).
func (c *Cluster) ciliumSelects(o, spec map[string]any, subject end) bool {
	if s := spec["nodeSelector"]; s != nil {
		var labels []label
		for k, v := range c.nodeLabels(subject.node) {
			labels = append(labels, label{"k8s", k, v})
		}
		return clusterwide(o) && subject.kind == nodeEnd && all(terms(s), labels)
	}
	if subject.kind == nodeEnd {
		return false
	}
	s := object(spec["endpointSelector"])
	labels := c.labels(subject, subject.node)
	if clusterwide(o) {
		return all(terms(s), labels)
	}
	// The namespace is forced; an entry spelled exactly so is overwritten, any other stays.
	if _, ok := object(s["matchLabels"])["k8s:"+namespaceKey]; ok {
		rest := map[string]any{}
		for k, v := range object(s["matchLabels"]) {
			if k != "k8s:"+namespaceKey {
				rest[k] = v
			}
		}
		s = map[string]any{"matchLabels": rest, "matchExpressions": s["matchExpressions"]}
	}
	ts := append(terms(s), term{"k8s", namespaceKey, "In", []string{metadata(o, "namespace")}})
	return all(ts, labels)
}

// ciliumEntry: does one entry of a direction list cover the packet? Peer AND port (spec 1, rules 7 to 11; 5.1).
func (c *Cluster) ciliumEntry(o, spec, entry map[string]any, side Side, subject, peer end, p Packet) bool {
	present, matches := c.ciliumPeer(o, spec, entry, side, subject, peer)
	toPorts, icmps := list(entry["toPorts"]), list(entry["icmps"])
	ports := len(toPorts)+len(icmps) > 0
	switch {
	case !present && !ports:
		return false // allows nothing, denies nothing
	case present && !matches:
		return false
	case !ports:
		return true
	}
	for _, tp := range toPorts {
		for _, port := range list(object(tp)["ports"]) {
			if readable(object(tp), p) && ciliumPort(object(port), side, subject, peer, p) {
				return true
			}
		}
	}
	for _, i := range icmps {
		for _, f := range list(object(i)["fields"]) {
			if icmpField(object(f), p) {
				return true
			}
		}
	}
	return false
}

// ciliumPeer: is there a peer member, and does it select the peer? A member that is there and empty selects nobody.
func (c *Cluster) ciliumPeer(o, spec, entry map[string]any, side Side, subject, peer end) (present, matches bool) {
	present, names := c.ciliumSelectors(o, spec, entry, side, subject, peer)
	return present, len(names) > 0
}

// ciliumSelectors names the selectors of the peer members that match, so that equal ones of two rules have one name: what rules are merged by (spec 9.5).
func (c *Cluster) ciliumSelectors(o, spec, entry map[string]any, side Side, subject, peer end) (present bool, matching []string) {
	stem := map[Side]string{Ingress: "from", Egress: "to"}[side]
	member := func(name string) []any {
		v := entry[stem+name]
		present = present || v != nil
		return list(v)
	}
	add := func(matches bool, name string) {
		if matches {
			matching = append(matching, name)
		}
	}
	for _, s := range member("Endpoints") {
		add(c.endpointPeer(o, spec, s, subject, peer), "labels "+nameOf(c.endpointTerms(o, spec, s)))
	}
	for _, e := range member("Entities") {
		name := text(e)
		if name == "all" {
			name = anybody
		}
		add(c.entity(text(e), subject, peer), name)
	}
	for _, prefix := range member("CIDR") {
		add(c.cidr(text(prefix), nil, subject, peer), nameOfPrefix(text(prefix), nil))
	}
	for _, s := range member("CIDRSet") {
		set := object(s)
		for _, prefix := range c.cidrsOf(set) {
			add(c.cidr(prefix, texts(set["except"]), subject, peer), nameOfPrefix(prefix, texts(set["except"])))
		}
	}
	for _, s := range member("Nodes") {
		add(c.remoteNode(s, subject, peer), "nodes "+nameOf(terms(s)))
	}
	member("Groups") // without a provider: nothing (spec 7.4)
	for _, s := range member("Services") {
		add(c.service(object(s), subject, peer), fmt.Sprint("service ", s))
	}
	for _, s := range member("FQDNs") {
		item := object(s)
		add(c.learnt(item, subject, peer), "name "+plainName(text(item["matchName"])+text(item["matchPattern"])))
	}
	return present, matching
}

// anybody is the name of the selector of rules without a peer member, and of the entity `all`.
const anybody = "anybody"

func nameOf(ts []term) string {
	var all []string
	for _, t := range ts {
		values := slices.Clone(t.values)
		slices.Sort(values)
		all = append(all, fmt.Sprint(t.source, ":", t.key, " ", t.operator, " ", slices.Compact(values)))
	}
	slices.Sort(all)
	return strings.Join(slices.Compact(all), ", ")
}

func nameOfPrefix(prefix string, except []string) string {
	if !strings.Contains(prefix, "/") {
		a := netip.MustParseAddr(prefix)
		prefix = netip.PrefixFrom(a, a.BitLen()).String()
	}
	var holes []string
	for _, e := range except {
		holes = append(holes, netip.MustParsePrefix(e).Masked().String())
	}
	slices.Sort(holes)
	return fmt.Sprint("prefix ", netip.MustParsePrefix(prefix).Masked(), slices.Compact(holes))
}

// endpointPeer is spec 3.4, 5.3 and 5.4.
func (c *Cluster) endpointPeer(o, spec map[string]any, selector any, subject, peer end) bool {
	if !mentions(terms(selector), isReserved) && peer.kind != podEnd && peer.kind != entityEnd {
		return false // addresses outside and nodes are reached by a reserved key only
	}
	return all(c.endpointTerms(o, spec, selector), c.labels(peer, subject.node))
}

// endpointTerms adds what the scope of the policy adds.
func (c *Cluster) endpointTerms(o, spec map[string]any, selector any) []term {
	ts := terms(selector)
	if !mentions(ts, isReserved) {
		switch {
		case mentions(ts, isOf(namespaceKey)) || mentions(ts, isNamespaceLabel):
		case !clusterwide(o):
			ts = append(ts, term{"k8s", namespaceKey, "In", []string{metadata(o, "namespace")}})
		case !mentions(terms(spec["endpointSelector"]), func(t term) bool { return isReserved(t) && t.key == "init" }):
			ts = append(ts, term{"k8s", namespaceKey, "Exists", nil})
		}
	}
	return c.inLocalCluster(ts)
}

// inLocalCluster adds the default of spec 3.4.
func (c *Cluster) inLocalCluster(ts []term) []term {
	if c.allClusters() || mentions(ts, isReserved) || mentions(ts, isOf(clusterKey)) {
		return ts
	}
	return append(ts, term{"k8s", clusterKey, "In", []string{c.clusterName()}})
}

func (c *Cluster) allClusters() bool {
	return c.Config.PolicyDefaultLocalCluster != nil && !*c.Config.PolicyDefaultLocalCluster
}

// entity is the table of spec 6.2.
func (c *Cluster) entity(name string, subject, peer end) bool {
	local := peer.kind == nodeEnd && peer.node == subject.node
	switch name {
	case "all":
		return true
	case "none":
		return false
	case "world":
		return peer.kind == outsideEnd
	case "world-ipv4":
		return peer.kind == outsideEnd && peer.addr.Is4()
	case "world-ipv6":
		return peer.kind == outsideEnd && !peer.addr.Is4()
	case "host":
		return local
	case "remote-node":
		return peer.kind == nodeEnd && !local
	case "kube-apiserver":
		return peer.apiServer
	case "ingress", "health", "init", "unmanaged":
		return peer.kind == entityEnd && peer.entity == name
	case "cluster":
		return peer.kind == podEnd && peer.pod.clusterName(c) == c.clusterName() || peer.kind == nodeEnd || peer.kind == entityEnd || peer.apiServer
	case "cluster-mesh":
		return peer.kind != outsideEnd || peer.apiServer
	}
	panic("entity " + name)
}

// cidr: addresses outside of the cluster only, unless an option widens it (spec 7.1, 7.2).
func (c *Cluster) cidr(prefix string, except []string, subject, peer end) bool {
	switch peer.kind {
	case outsideEnd:
	case podEnd:
		if !slices.Contains(c.Config.PolicyCIDRMatchMode, "pods") {
			return false
		}
	case nodeEnd:
		if !slices.Contains(c.Config.PolicyCIDRMatchMode, "nodes") {
			return false
		}
	default:
		return false
	}
	if !inPrefix(prefix, peer.addr) {
		return false
	}
	for _, hole := range except {
		if inPrefix(hole, peer.addr) {
			return false
		}
	}
	return true
}

// cidrsOf returns the prefixes of one item of fromCIDRSet or toCIDRSet (spec 7.3).
func (c *Cluster) cidrsOf(set map[string]any) []string {
	if set["cidr"] != nil {
		return []string{text(set["cidr"])}
	}
	var out []string
	for _, o := range c.Policies {
		if text(o["kind"]) != "CiliumCIDRGroup" {
			continue
		}
		var labels []label
		for k, v := range object(object(o["metadata"])["labels"]) {
			labels = append(labels, label{"", k, text(v)})
		}
		if set["cidrGroupRef"] != nil && metadata(o, "name") == text(set["cidrGroupRef"]) ||
			set["cidrGroupSelector"] != nil && all(terms(set["cidrGroupSelector"]), labels) {
			out = append(out, texts(object(o["spec"])["externalCIDRs"])...)
		}
	}
	return out
}

// remoteNode is fromNodes and toNodes (spec 6.4).
func (c *Cluster) remoteNode(selector any, subject, peer end) bool {
	if peer.kind != nodeEnd || peer.node == subject.node {
		return false
	}
	return all(c.inLocalCluster(terms(selector)), c.labels(peer, subject.node))
}

// service is one item of toServices (spec 8.1).
func (c *Cluster) service(item map[string]any, subject, peer end) bool {
	for _, s := range c.Services {
		var namespace string
		if by := object(item["k8sService"]); by != nil {
			if text(by["serviceName"]) != s.Name {
				continue
			}
			namespace = text(by["namespace"])
		} else {
			by := object(item["k8sServiceSelector"])
			var labels []label
			for k, v := range s.Labels {
				labels = append(labels, label{"", k, v})
			}
			if !all(terms(by["selector"]), labels) {
				continue
			}
			namespace = text(by["namespace"])
		}
		if namespace != "" && namespace != s.Namespace {
			continue
		}
		if c.behind(s, subject, peer) {
			return true
		}
	}
	return false
}

// behind: is the peer one of a service's?
func (c *Cluster) behind(s Service, subject, peer end) bool {
	if len(s.Selector) == 0 {
		for _, a := range s.Endpoints {
			addr := netip.MustParseAddr(a)
			if c.cidr(netip.PrefixFrom(addr, addr.BitLen()).String(), nil, subject, peer) {
				return true
			}
		}
		return false
	}
	if peer.kind != podEnd || peer.pod.Namespace != s.Namespace || peer.pod.clusterName(c) != c.clusterName() && !c.allClusters() {
		return false // like toEndpoints
	}
	for k, v := range s.Selector {
		if have, ok := peer.pod.Labels[k]; !ok || have != v {
			return false
		}
	}
	return true
}

// ciliumPort is one item of toPorts[].ports (spec 9.1).
func ciliumPort(port map[string]any, side Side, subject, peer end, p Packet) bool {
	protocol := strings.ToUpper(text(port["protocol"]))
	if protocol == "" {
		protocol = "ANY"
	}
	first, err := strconv.Atoi(text(port["port"]))
	if err != nil {
		return namedPort(text(port["port"]), protocol, side, subject, peer, p)
	}
	if !transport(protocol, p) {
		return false
	}
	last := max(first, number(port["endPort"]))
	return first == 0 || first <= p.Port && p.Port <= last
}

// transport: ANY is TCP, UDP and SCTP, and never ICMP.
func transport(protocol string, p Packet) bool {
	switch packet := strings.ToUpper(p.Protocol); packet {
	case "TCP", "UDP", "SCTP":
		return protocol == "ANY" || protocol == packet
	}
	return false
}

// namedPort: the port of the destination pod that has this name; the destination is the subject at ingress, the peer at egress.
func namedPort(name, protocol string, side Side, subject, peer end, p Packet) bool {
	destination := subject
	if side == Egress {
		destination = peer
	}
	if destination.kind != podEnd {
		return false
	}
	for _, have := range destination.pod.Ports {
		if strings.EqualFold(have.Name, name) && have.Port == p.Port && transport(protocol, p) && transport(have.protocol(), p) {
			return true
		}
	}
	return false
}

func (p Port) protocol() string {
	if p.Protocol == "" {
		return "TCP"
	}
	return strings.ToUpper(p.Protocol)
}

// icmpField is one item of icmps[].fields (spec 9.6).
func icmpField(f map[string]any, p Packet) bool {
	want, names := "ICMP", icmpTypes4
	if text(f["family"]) == "IPv6" {
		want, names = "ICMPV6", icmpTypes6
	}
	if strings.ToUpper(p.Protocol) != want {
		return false
	}
	written := text(f["type"])
	n, err := strconv.Atoi(written)
	if err != nil {
		var ok bool
		if n, ok = names[written]; !ok {
			panic("ICMP type " + written)
		}
	}
	return n == p.Port
}

// ICMPTypes lists the names of a family's types.
func ICMPTypes(v6 bool) []string {
	names := icmpTypes4
	if v6 {
		names = icmpTypes6
	}
	return slices.Sorted(maps.Keys(names))
}

var icmpTypes4 = map[string]int{
	"EchoReply": 0, "DestinationUnreachable": 3, "Redirect": 5, "Echo": 8, "EchoRequest": 8, "RouterAdvertisement": 9, "RouterSelection": 10,
	"TimeExceeded": 11, "ParameterProblem": 12, "Timestamp": 13, "TimestampReply": 14, "Photuris": 40, "ExtendedEchoRequest": 42,
	"ExtendedEchoReply": 43,
}

var icmpTypes6 = map[string]int{
	"DestinationUnreachable": 1, "PacketTooBig": 2, "TimeExceeded": 3, "ParameterProblem": 4, "EchoRequest": 128, "EchoReply": 129,
	"MulticastListenerQuery": 130, "MulticastListenerReport": 131, "MulticastListenerDone": 132, "RouterSolicitation": 133,
	"RouterAdvertisement": 134, "NeighborSolicitation": 135, "NeighborAdvertisement": 136, "RedirectMessage": 137, "RouterRenumbering": 138,
	"ICMPNodeInformationQuery": 139, "ICMPNodeInformationResponse": 140, "InverseNeighborDiscoverySolicitation": 141,
	"InverseNeighborDiscoveryAdvertisement": 142, "HomeAgentAddressDiscoveryRequest": 144, "HomeAgentAddressDiscoveryReply": 145,
	"MobilePrefixSolicitation": 146, "MobilePrefixAdvertisement": 147, "DuplicateAddressRequestCodeSuffix": 157,
	"DuplicateAddressConfirmationCodeSuffix": 158, "ExtendedEchoRequest": 160, "ExtendedEchoReply": 161,
}
