// SPDX-License-Identifier: Apache-2.0

package format

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Name servers outside of the cluster, for clients that may ask no other.
var (
	outsideServer4 = netip.MustParseAddr("198.51.100.53")
	outsideServer6 = netip.MustParseAddr("2001:db8:53::53")
)

// Server is a name server that a client may have asked.
type Server struct {
	// End is where it is, as flows name it.
	End  string
	Port int
}

// serverRules is what is read of a policy to find the servers that its lists of names are for.
type serverRules struct {
	Metadata struct {
		Namespace string `yaml:"namespace"`
	} `yaml:"metadata"`
	Spec  *serverRule  `yaml:"spec"`
	Specs []serverRule `yaml:"specs"`
}

type serverRule struct {
	EndpointSelector serverSelector `yaml:"endpointSelector"`
	Egress           []serverEntry  `yaml:"egress"`
}

type serverEntry struct {
	ToEndpoints []serverSelector `yaml:"toEndpoints"`
	ToEntities  []string         `yaml:"toEntities"`
	ToCIDR      []string         `yaml:"toCIDR"`
	ToCIDRSet   []struct {
		CIDR string `yaml:"cidr"`
	} `yaml:"toCIDRSet"`
	ToPorts []serverPorts `yaml:"toPorts"`
}

type serverPorts struct {
	Ports []struct {
		Port string `yaml:"port"`
	} `yaml:"ports"`
	Rules struct {
		DNS []yaml.Node `yaml:"dns"`
	} `yaml:"rules"`
}

type serverSelector struct {
	MatchLabels      map[string]string `yaml:"matchLabels"`
	MatchExpressions []struct {
		Key      string   `yaml:"key"`
		Operator string   `yaml:"operator"`
		Values   []string `yaml:"values"`
	} `yaml:"matchExpressions"`
}

const (
	dnsPort      = 53
	namespaceKey = "io.kubernetes.pod.namespace"
)

// serverRules calls each with the rules of all policies that the case ever has.
func (c *Case) serverRules(each func(namespace string, r *serverRule)) {
	objects := slices.Clone(c.Policies)
	for _, change := range c.Changes {
		objects = append(objects, change.Add...)
	}
	for i := range objects {
		var o serverRules
		if objects[i].Decode(&o) != nil {
			continue // a policy that is no policy leads to nobody
		}
		if o.Spec != nil {
			each(o.Metadata.Namespace, o.Spec)
		}
		for j := range o.Specs {
			each(o.Metadata.Namespace, &o.Specs[j])
		}
	}
}

// Servers are those that a client may have asked: first those that lists of names are for which select it, then the usual ones. A case says that an answer
// came, and not from where.
func (c *Case) Servers(client string) (listed, usual []Server) {
	pod := c.Pod(client)
	c.serverRules(func(namespace string, r *serverRule) {
		if pod == nil || !r.EndpointSelector.may(pod, namespace) {
			return
		}
		for i := range r.Egress {
			for _, s := range c.serversOf(&r.Egress[i], namespace) {
				if !slices.Contains(listed, s) && s.End != client {
					listed = append(listed, s)
				}
			}
		}
	})
	for _, p := range append(slices.Clone(c.Pods), c.MissingServers()...) {
		if name := p.Namespace + "/" + p.Name; !p.HostNetwork && name != client && (p.Labels["k8s-app"] == "kube-dns" || strings.Contains(p.Name, "dns")) {
			usual = append(usual, Server{name, dnsPort})
		}
	}
	return listed, append(usual, c.outsideServers(dnsPort)...)
}

func (c *Case) outsideServers(port int) []Server {
	var all []Server
	if c.HasFamily(IPv4) {
		all = append(all, Server{"ip:" + outsideServer4.String(), port})
	}
	if c.HasFamily(IPv6) {
		all = append(all, Server{"ip:" + outsideServer6.String(), port})
	}
	return all
}

// serversOf are those that the lists of names of an entry are for.
func (c *Case) serversOf(e *serverEntry, namespace string) []Server {
	var ends []string
	for i := range e.ToEndpoints {
		for _, p := range append(slices.Clone(c.Pods), c.MissingServers()...) {
			if e.ToEndpoints[i].may(&p, namespace) && !p.HostNetwork {
				ends = append(ends, p.Namespace+"/"+p.Name)
			}
		}
	}
	cidrs := slices.Clone(e.ToCIDR)
	for _, set := range e.ToCIDRSet {
		cidrs = append(cidrs, set.CIDR)
	}
	for _, text := range cidrs {
		if a := serverIn(text); a.IsValid() {
			ends = append(ends, "ip:"+a.String())
		}
	}
	if len(ends) == 0 || len(e.ToEntities) > 0 {
		for _, p := range c.Pods {
			if p.Labels["k8s-app"] == "kube-dns" && !p.HostNetwork {
				ends = append(ends, p.Namespace+"/"+p.Name)
			}
		}
		for _, s := range c.outsideServers(dnsPort) {
			ends = append(ends, s.End)
		}
	}
	var all []Server
	for _, to := range e.ToPorts {
		if len(to.Rules.DNS) == 0 {
			continue
		}
		for _, p := range to.Ports {
			port, err := strconv.Atoi(p.Port)
			if err != nil || port <= 0 {
				port = dnsPort // a name
			}
			for _, end := range ends {
				all = append(all, Server{end, port})
			}
		}
	}
	return all
}

// serverIn is an address of a range.
func serverIn(cidr string) netip.Addr {
	if a, err := netip.ParseAddr(cidr); err == nil {
		return a
	}
	p, err := netip.ParsePrefix(cidr)
	switch {
	case err != nil:
		return netip.Addr{}
	case p.Contains(outsideServer4):
		return outsideServer4
	case p.Contains(outsideServer6):
		return outsideServer6
	}
	if next := p.Masked().Addr().Next(); p.Contains(next) && !p.IsSingleIP() {
		return next
	}
	return p.Addr()
}

// plainKey is a key without its source.
func plainKey(key string) string {
	return strings.TrimPrefix(strings.TrimPrefix(key, "k8s:"), "any:")
}

// may reports whether a selector of a policy in a namespace selects a pod, as far as pods' own labels say.
func (s *serverSelector) may(p *Pod, namespace string) bool {
	value := func(key string) (string, bool, bool) {
		if key == namespaceKey {
			return p.Namespace, true, true
		}
		v, ok := p.Labels[key]
		return v, ok, !strings.HasPrefix(key, "io.")
	}
	for key, want := range s.MatchLabels {
		key = plainKey(key)
		if key == namespaceKey {
			namespace = ""
		}
		if got, has, known := value(key); known && (!has || got != want) {
			return false
		}
	}
	for _, e := range s.MatchExpressions {
		key := plainKey(e.Key)
		if key == namespaceKey {
			namespace = ""
		}
		got, has, known := value(key)
		in := has && slices.Contains(e.Values, got)
		if known && (e.Operator == "In" && !in || e.Operator == "NotIn" && in || e.Operator == "Exists" && !has || e.Operator == "DoesNotExist" && has) {
			return false
		}
	}
	return namespace == "" || p.Namespace == namespace
}

// MissingServers are pods that lists of names are for and that the case does not show, though it says that answers came.
func (c *Case) MissingServers() []Pod {
	var missing []Pod
	if len(c.DNSAnswers) == 0 {
		return nil
	}
	c.serverRules(func(namespace string, r *serverRule) {
		for i := range r.Egress {
			e := &r.Egress[i]
			if !slices.ContainsFunc(e.ToPorts, func(p serverPorts) bool { return len(p.Rules.DNS) > 0 }) {
				continue
			}
			for j := range e.ToEndpoints {
				p, ok := e.ToEndpoints[j].pod(namespace)
				selects := func(q Pod) bool { return e.ToEndpoints[j].may(&q, namespace) }
				if !ok || slices.ContainsFunc(c.Pods, selects) || slices.ContainsFunc(missing, selects) {
					continue
				}
				p.Name, p.Node = "weircases-dns"+strconv.Itoa(len(missing)), c.Nodes[0].Name
				missing = append(missing, p)
			}
		}
	})
	return missing
}

// pod makes up a pod that a selector selects, if its labels say all.
func (s *serverSelector) pod(namespace string) (Pod, bool) {
	p := Pod{Namespace: namespace, Labels: map[string]string{}}
	for key, value := range s.MatchLabels {
		key = plainKey(key)
		switch {
		case key == namespaceKey:
			p.Namespace = value
		case strings.HasPrefix(key, "io.") || strings.Contains(key, ":"):
			return p, false
		default:
			p.Labels[key] = value
		}
	}
	if p.Namespace == "" {
		p.Namespace = "kube-system"
	}
	return p, len(p.Labels) > 0 && len(s.MatchExpressions) == 0
}
