// SPDX-License-Identifier: Apache-2.0

package reference

import (
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
)

// ClusterAt is the world of a case at a time: the policies that are there, and the names that nodes know of addresses.
func (c *Case) ClusterAt(t float64) *Cluster {
	out := c.Cluster
	out.Policies = c.policiesAt(t)
	out.Learnt = nil
	for _, a := range c.DNSAnswers {
		if a.At > t || !c.seen(a) {
			continue
		}
		for _, ip := range a.IPs {
			l := Learnt{Node: c.end(a.Client, false).node, Name: a.Name, Addr: netip.MustParseAddr(ip)}
			if t < c.usedUntil(l, a.At+max(a.TTL, c.Config.ToFQDNsMinTTL)) {
				out.Learnt = append(out.Learnt, l)
			}
		}
	}
	return &out
}

func (c *Case) policiesAt(t float64) []map[string]any {
	out := slices.Clone(c.Policies)
	for _, change := range c.Changes {
		if change.At > t {
			continue
		}
		for _, o := range slices.Concat(change.Add, change.Remove) {
			out = slices.DeleteFunc(out, func(old map[string]any) bool { return objectName(old) == objectName(o) })
		}
		out = append(out, change.Add...)
	}
	return out
}

func objectName(o map[string]any) string {
	return fmt.Sprint(o["kind"], " ", metadata(o, "namespace"), "/", metadata(o, "name"))
}

// seen: did the node's proxy see an answer, that is, did the client's policy lead the question there and let it pass (spec 8.2)? The case does not say whom
// the client asked: anybody in it whom policy lets it ask through the proxy will do.
func (c *Case) seen(a DNSAnswer) bool {
	now := c.Cluster
	now.Policies, now.Learnt = c.policiesAt(a.At), nil
	ports, servers := []int{53}, []string{"ip:8.8.8.8", "ip:1.1.1.1"}
	for _, o := range now.Policies {
		for _, spec := range specsOf(o) {
			for _, e := range list(spec["egress"]) {
				servers = append(servers, outsideServers(object(e))...)
				for _, tp := range list(object(e)["toPorts"]) {
					for _, port := range list(object(tp)["ports"]) {
						if n := number(object(port)["port"]); n > 0 && len(list(object(object(tp)["rules"])["dns"])) > 0 {
							ports = append(ports, n)
						}
					}
				}
			}
		}
	}
	// The cluster's name server, which a case need not show.
	now.Pods = append(slices.Clone(now.Pods), Pod{
		Name: "not-shown", Namespace: "kube-system", Labels: map[string]string{"k8s-app": "kube-dns"}, Node: "n1", IP: "100.64.53.53", IP6: "fd64::5353",
	})
	for _, p := range now.Pods {
		for _, port := range p.Ports {
			ports = append(ports, port.Port)
		}
		servers = append(servers, p.Namespace+"/"+p.Name)
	}
	for _, n := range c.Nodes {
		servers = append(servers, "node:"+n.Name)
	}
	for _, server := range servers {
		for _, port := range ports {
			for _, protocol := range []string{"UDP", "TCP"} {
				egress, ingress := now.Ask(Packet{From: a.Client, To: server, Protocol: protocol, Port: port}, Request{DNS: &DNSQuery{a.Name}})
				if egress.Verdict == Allow && egress.Proxy == "dns" && egress.Passes && ingress.Verdict == Allow && server != a.Client {
					return true
				}
			}
		}
	}
	return false
}

// outsideServers are addresses that a rule names by prefix: one of them may be a name server.
func outsideServers(rule map[string]any) []string {
	var out []string
	add := func(v any) {
		if p, err := netip.ParsePrefix(fmt.Sprint(v)); err == nil {
			out = append(out, "ip:"+p.Addr().String())
		}
	}
	for _, v := range list(rule["toCIDR"]) {
		add(v)
	}
	for _, v := range list(rule["toCIDRSet"]) {
		add(object(v)["cidr"])
	}
	return out
}

// usedUntil is when a name leaves an address: when its time runs out and no connection of the node uses it (spec 8.2).
func (c *Case) usedUntil(l Learnt, until float64) float64 {
	for {
		later := until
		for _, conn := range c.Connections {
			if strings.TrimPrefix(conn.To, "ip:") != l.Addr.String() || c.end(conn.From, false).node != l.Node || conn.OpenAt >= later {
				continue
			}
			if conn.CloseAt == nil {
				return math.Inf(1)
			}
			later = max(later, *conn.CloseAt)
		}
		if later == until {
			return until
		}
		until = later
	}
}

// Request of an expectation.
func (e *Expect) Request() Request {
	var q Request
	if h := e.HTTP; h != nil {
		q.HTTP = &HTTPRequest{Method: h.Method, Path: h.Path, Host: h.Host, Headers: caseHeaders(h.Headers)}
		if q.HTTP.Method == "" {
			q.HTTP.Method = "GET"
		}
		if q.HTTP.Path == "" {
			q.HTTP.Path = "/"
		}
	}
	if e.DNS != nil {
		q.DNS = &DNSQuery{e.DNS.Query}
	}
	if e.TLS != nil {
		q.TLS = &TLSHello{e.TLS.SNI}
	}
	return q
}

func caseHeaders(v any) []string {
	var out []string
	switch headers := v.(type) {
	case map[string]any:
		for name, value := range headers {
			if values, ok := value.([]any); ok {
				for _, one := range values {
					out = append(out, name+": "+text(one))
				}
				continue
			}
			out = append(out, name+": "+text(value))
		}
		slices.Sort(out)
	case []any:
		for _, h := range headers {
			item, ok := h.(map[string]any)
			switch name, named := item["name"]; {
			case !ok:
				out = append(out, text(h))
			case named:
				out = append(out, text(name)+": "+text(item["value"]))
			default:
				out = append(out, caseHeaders(item)...)
			}
		}
	}
	return out
}

// Disagreement says how answers differ from what a case expects; "" = they do not.
func (e *Expect) Disagreement(egress, ingress Answer, audit bool) string {
	got := "allow"
	passes := egress.Passes && ingress.Passes
	switch {
	case !audit && (egress.Verdict != Allow || ingress.Verdict != Allow):
		got = "deny"
	case egress.Proxy != "" || ingress.Proxy != "":
		got = "redirect"
	}
	if got == "redirect" && e.Verdict == "allow" && (egress.Visible || ingress.Visible) && passes {
		got = "allow" // what is only seen passes, whatever it speaks
	}
	switch {
	case got != e.Verdict && !(e.OrAllow && got == "allow"):
		return got
	case e.Direction == "egress" && e.Verdict == "deny" && egress.Verdict == Allow, e.Direction == "ingress" && e.Verdict == "deny" && ingress.Verdict == Allow:
		return got + " by the other side"
	case got == "redirect" && e.L7 != "" && passes != (e.L7 == "allow"):
		return fmt.Sprint("redirect, and the request passes: ", passes)
	}
	if got != "redirect" || !passes {
		return ""
	}
	q := HTTPRequest{Headers: ingress.Headers}
	if egress.Proxy != "" {
		q.Headers = egress.Headers
	}
	for name, want := range e.Upstream {
		values := texts(list(want))
		if have, _ := q.header(name); have != strings.Join(values, ",") {
			return fmt.Sprintf("header %s goes on as %q", name, have)
		}
	}
	return ""
}
