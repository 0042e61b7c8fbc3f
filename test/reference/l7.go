// SPDX-License-Identifier: Apache-2.0

package reference

import (
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Answer of one side to a connection with a request.
type Answer struct {
	Verdict Verdict
	// Proxy that an allowed connection goes through: "" (none), "http", "tls" or "dns". Visible: only to be seen.
	Proxy   string
	Visible bool
	// Passes: the request does. Without a proxy, or where it only looks, every request does.
	Passes bool
	// Headers of an HTTP request that goes on.
	Headers []string
}

// Ask returns what both sides say of a connection and of the request on it.
func (c *Cluster) Ask(p Packet, q Request) (egress, ingress Answer) {
	verdictOut, verdictIn := c.Decide(p)
	from, to := c.end(p.From, p.V6), c.end(p.To, p.V6)
	if from.same(to) {
		return Answer{Verdict: Allow, Passes: true}, Answer{Verdict: Allow, Passes: true}
	}
	return c.ask(verdictOut, Egress, from, to, p, q), c.ask(verdictIn, Ingress, to, from, p, q)
}

func (c *Cluster) ask(verdict Verdict, side Side, subject, peer end, p Packet, q Request) Answer {
	if verdict != Allow {
		return Answer{Verdict: verdict}
	}
	a := Answer{Verdict: Allow, Passes: true}
	if q.HTTP != nil {
		a.Headers = q.HTTP.Headers
	}
	switch {
	case !c.isSubject(subject) || c.Config.PolicyEnforcement == "never" || c.localhost(side, subject, peer):
		return a
	case c.tier("Admin", side, subject, peer, p) == Allow: // it bypasses requests (spec 17)
	default:
		c.requests(&a, side, subject, peer, p, q)
	}
	if a.Proxy == "" {
		if a.Proxy = visible(subject, side, p); a.Proxy != "" {
			a.Visible = true
		}
	}
	return a
}

// cover is one way in which a rule allows the packet: by one of its selectors, through one of its port items.
type cover struct {
	selector string
	port     string // the range as rules are merged by; "" = the rule has no ports
	exact    bool   // one port
	item     map[string]any
}

// rules of the item, of one kind.
func (v cover) rules(kind string) []any { return list(object(v.item["rules"])[kind]) }

func (v cover) serverNames() []string { return texts(v.item["serverNames"]) }

// sameItem: both are of one item of toPorts.
func (v cover) sameItem(o cover) bool {
	return reflect.ValueOf(v.item).Pointer() == reflect.ValueOf(o.item).Pointer()
}

// kind of the item: what its rules speak; "" = it has none.
func (v cover) kind() string {
	switch {
	case len(v.rules("http")) > 0:
		return "http"
	case len(v.serverNames()) > 0:
		return "tls"
	case len(v.rules("dns")) > 0:
		return "dns"
	}
	return ""
}

// emptyList: the item has a list of rules with nothing in it.
func (v cover) emptyList() bool {
	for _, l := range object(v.item["rules"]) {
		if l != nil && v.kind() == "" {
			return true
		}
	}
	return false
}

// requests is spec 9.2 to 9.5: R are all allow rules that cover the peer and port.
func (c *Cluster) requests(a *Answer, side Side, subject, peer end, p Packet, q Request) {
	var r []cover
	for _, o := range c.Policies {
		switch text(o["kind"]) {
		case "NetworkPolicy":
			var one pot
			c.networkPolicy(o, side, subject, peer, p, &one)
			if one.allowed {
				r = append(r, c.networkCovers(o, side, subject, peer, p)...)
			}
		case "CiliumNetworkPolicy", "CiliumClusterwideNetworkPolicy":
			for _, spec := range specsOf(o) {
				if c.ciliumSelects(o, spec, subject) {
					for _, e := range list(spec[string(side)]) {
						r = append(r, c.covers(o, spec, object(e), side, subject, peer, p)...)
					}
				}
			}
		}
	}
	for _, kind := range []string{"http", "tls", "dns"} {
		if a.Proxy == "" && slices.ContainsFunc(r, func(v cover) bool { return v.kind() == kind }) {
			a.Proxy = kind
		}
	}
	if a.Proxy == "" {
		return
	}
	// spec 4: where no rule switches default deny on, rules for requests are completed by one that allows all of their kind.
	enforced := c.pot(side, subject, peer, p).enforced || c.Config.PolicyEnforcement == "always" || subject.entity == "init"
	if !enforced {
		r = append(r, cover{selector: anybody, exact: true})
	}
	var changes []headerChange
	a.Passes, changes = passes(a.Proxy, r, q)
	if q.HTTP != nil {
		a.Headers = changed(q.HTTP.Headers, changes)
	}
}

// refusedAnyway: what no rule can let through: a path that is not judged.
func refusedAnyway(proxy string, q Request) bool {
	if proxy == "http" && q.HTTP != nil {
		_, redirected := Normalise(q.HTTP.Path)
		return redirected
	}
	return false
}

// passes: any rule in R accepts the request; one without rules for requests accepts all.
func passes(proxy string, r []cover, q Request) (ok bool, changes []headerChange) {
	if refusedAnyway(proxy, q) {
		return false, nil
	}
	lists := slices.ContainsFunc(r, func(v cover) bool { return v.kind() == "tls" })
	for n, v := range r {
		switch kind := v.kind(); {
		case kind != "" && slices.ContainsFunc(r[:n], v.sameItem): // several peers or ports of one rule cover the packet: it is judged once
		case kind == "":
			ok = ok || !moot(v, r) && (proxy != "dns" || v.exact) && (proxy != "http" || q.TLS == nil || lists)
		case kind == "tls" && proxy != "dns":
			ok = ok || q.TLS != nil && slices.ContainsFunc(v.serverNames(), func(pattern string) bool { return serverName(pattern, q.TLS.SNI) })
		case kind == "http" && proxy == "http" && q.HTTP != nil && q.TLS == nil:
			for _, i := range v.rules("http") {
				did, matches := httpItem(object(i), q.HTTP)
				ok = ok || matches
				changes = append(changes, did...)
			}
		case kind == "dns" && proxy == "dns" && q.DNS != nil:
			ok = ok || slices.ContainsFunc(v.rules("dns"), func(i any) bool { return nameItem(object(i), q.DNS.Name) })
		}
	}
	return ok, changes
}

// moot: a plain cover that counts for nothing, since the same selector and port has a list of server names, or has rules where this one has an empty list
// (spec 9.4, 9.5).
func moot(v cover, r []cover) bool {
	return v.port != "" && slices.ContainsFunc(r, func(o cover) bool {
		return o.selector == v.selector && o.port == v.port && (o.kind() == "tls" || v.emptyList() && o.kind() != "")
	})
}

// Conflicts reports whether rules that select one end speak differently of one selector and port, whoever the peer is: peers are tried one by one.
func (c *Cluster) Conflicts(side Side, subject, peer string, p Packet) bool {
	s, other := c.end(subject, p.V6), c.end(peer, p.V6)
	if !c.isSubject(s) || c.Config.PolicyEnforcement == "never" {
		return false
	}
	var r []cover
	for _, o := range c.Policies {
		if kind := text(o["kind"]); kind == "CiliumNetworkPolicy" || kind == "CiliumClusterwideNetworkPolicy" {
			for _, spec := range specsOf(o) {
				if c.ciliumSelects(o, spec, s) {
					for _, e := range list(spec[string(side)]) {
						r = append(r, c.covers(o, spec, object(e), side, s, other, p)...)
					}
				}
			}
		}
	}
	for _, v := range r {
		for _, o := range r {
			if v.kind() != "" && o.kind() != "" && v.kind() != o.kind() && v.selector == o.selector && v.port == o.port {
				return true
			}
		}
	}
	return false
}

// covers are the ways in which an entry allows a packet.
func (c *Cluster) covers(o, spec, entry map[string]any, side Side, subject, peer end, p Packet) []cover {
	present, selectors := c.ciliumSelectors(o, spec, entry, side, subject, peer)
	toPorts, icmps := list(entry["toPorts"]), list(entry["icmps"])
	switch {
	case !present && len(toPorts)+len(icmps) == 0, present && len(selectors) == 0:
		return nil
	case !present:
		selectors = []string{anybody}
	}
	var out []cover
	for _, s := range selectors {
		if len(toPorts)+len(icmps) == 0 {
			out = append(out, cover{selector: s})
		}
		for _, tp := range toPorts {
			item := object(tp)
			for _, port := range list(item["ports"]) {
				if readable(item, p) && ciliumPort(object(port), side, subject, peer, p) {
					first, last := span(object(port), p)
					out = append(out, cover{s, fmt.Sprint(first, "-", last), first == last, item})
				}
			}
		}
	}
	return out
}

// span is the range that a port item stands for; a name stands for the packet's port.
func span(port map[string]any, p Packet) (first, last int) {
	first, err := strconv.Atoi(text(port["port"]))
	switch {
	case err != nil:
		return p.Port, p.Port
	case first == 0:
		return 0, 65535
	}
	return first, max(first, number(port["endPort"]))
}

// readable: what an item wants to read is there to be read. HTTP and TLS are over TCP, DNS over TCP and UDP; the rest is not allowed by it.
func readable(item map[string]any, p Packet) bool {
	switch v := (cover{item: item}); v.kind() {
	case "http", "tls":
		return strings.EqualFold(p.Protocol, "TCP")
	case "dns":
		return strings.EqualFold(p.Protocol, "TCP") || strings.EqualFold(p.Protocol, "UDP")
	}
	return true
}

// networkCovers are the ways in which a NetworkPolicy allows a packet: it has no rules for requests. Its selectors are those of its namespace or of labels
// of namespaces.
func (c *Cluster) networkCovers(o map[string]any, side Side, subject, peer end, p Packet) []cover {
	namespace := metadata(o, "namespace")
	var out []cover
	for _, e := range list(object(o["spec"])[string(side)]) {
		rule := object(e)
		peers := list(rule[map[Side]string{Ingress: "from", Egress: "to"}[side]])
		var selectors []string
		if len(peers) == 0 {
			selectors = []string{anybody}
		}
		for _, item := range peers {
			if c.kubernetesPeers([]any{item}, namespace, subject, peer) {
				selectors = append(selectors, c.kubernetesName(object(item), namespace))
			}
		}
		for _, s := range selectors {
			ports := list(rule["ports"])
			if len(ports) == 0 {
				out = append(out, cover{selector: s})
			}
			for _, port := range ports {
				if kubernetesPorts([]any{port}, side, subject, peer, p) {
					item := object(port)
					first, last := 0, 65535
					if item["port"] != nil {
						first, last = span(item, p)
					}
					out = append(out, cover{selector: s, port: fmt.Sprint(first, "-", last), exact: first == last})
				}
			}
		}
	}
	return out
}

func (c *Cluster) kubernetesName(item map[string]any, namespace string) string {
	if block := object(item["ipBlock"]); block != nil {
		return nameOfPrefix(text(block["cidr"]), texts(block["except"]))
	}
	var ts []term
	for _, t := range terms(item["podSelector"]) {
		ts = append(ts, term{"k8s", t.key, t.operator, t.values})
	}
	if s := item["namespaceSelector"]; s != nil {
		for _, t := range terms(s) {
			ts = append(ts, term{"k8s", namespaceLabelsStem + t.key, t.operator, t.values})
		}
		ts = append(ts, term{"k8s", namespaceKey, "Exists", nil})
	} else {
		ts = append(ts, term{"k8s", namespaceKey, "In", []string{namespace}})
	}
	if !mentions(ts, isOf(clusterKey)) {
		ts = append(ts, term{"k8s", clusterKey, "In", []string{c.clusterName()}})
	}
	return "labels " + nameOf(ts)
}

// learnt: does the subject's node know a name of the peer's address that an item of toFQDNs matches? Only what is outside has names (spec 8.2).
func (c *Cluster) learnt(item map[string]any, subject, peer end) bool {
	return peer.kind == outsideEnd && slices.ContainsFunc(c.Learnt, func(l Learnt) bool {
		return l.Addr == peer.addr && l.Node == subject.node && nameItem(item, l.Name)
	})
}

var visibilityPart = regexp.MustCompile(`^<(?i:(ingress|egress))/([1-9][0-9]{0,4})/(?i:(TCP|UDP|SCTP|ANY))/(?i:(HTTP|DNS|Kafka))>$`)

// visible: what a pod's annotation asks to see of a packet; "" = nothing (spec 15).
func visible(subject end, side Side, p Packet) string {
	if subject.kind != podEnd {
		return ""
	}
	annotation, ok := subject.pod.Annotations["policy.cilium.io/proxy-visibility"]
	if !ok {
		annotation = subject.pod.Annotations["io.cilium.proxy-visibility"]
	}
	if strings.TrimSpace(annotation) == "" {
		return ""
	}
	found := ""
	said := map[string]string{}
	for _, part := range strings.Split(annotation, ",") {
		m := visibilityPart.FindStringSubmatch(strings.TrimSpace(part))
		if m == nil || number(m[2]) > 65535 {
			return ""
		}
		direction, l4, l7 := strings.ToLower(m[1]), strings.ToUpper(m[3]), strings.ToLower(m[4])
		if l7 == "dns" && direction == "ingress" || l7 == "kafka" && direction == "egress" {
			return ""
		}
		protocols := []string{l4}
		if l4 == "ANY" {
			protocols = []string{"TCP", "UDP"}
		}
		for _, protocol := range protocols {
			key := direction + m[2] + protocol
			if before, ok := said[key]; ok && before != l7 {
				return ""
			}
			said[key] = l7
			seen := l7 == "http" && protocol == "TCP" || l7 == "dns" && protocol != "SCTP"
			if seen && direction == string(side) && number(m[2]) == p.Port && strings.EqualFold(protocol, p.Protocol) {
				found = l7
			}
		}
	}
	return found
}
