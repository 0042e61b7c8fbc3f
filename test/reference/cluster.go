// SPDX-License-Identifier: Apache-2.0

package reference

import (
	"fmt"
	"net/netip"
	"strings"
)

// Cluster is a closed world, in the words of case files.
type Cluster struct {
	Config     Config           `yaml:"config,omitempty"`
	Namespaces []Namespace      `yaml:"namespaces,omitempty"`
	Nodes      []Node           `yaml:"nodes,omitempty"`
	Pods       []Pod            `yaml:"pods,omitempty"`
	Services   []Service        `yaml:"services,omitempty"`
	Externals  []External       `yaml:"externals,omitempty"`
	Policies   []map[string]any `yaml:"policies"`
	// Learnt are the names of addresses that nodes know, from answers that their proxies saw.
	Learnt []Learnt `yaml:"-"`
}

// Learnt is a name of an address, as a node knows it.
type Learnt struct {
	Node, Name string
	Addr       netip.Addr
}

// Config holds the options that change verdicts.
type Config struct {
	PolicyEnforcement         string   `yaml:"policy_enforcement,omitempty"`
	PolicyAuditMode           bool     `yaml:"policy_audit_mode,omitempty"`
	AllowLocalhost            string   `yaml:"allow_localhost,omitempty"`
	HostFirewall              bool     `yaml:"host_firewall,omitempty"`
	IPFamilies                []string `yaml:"ip_families,omitempty,flow"`
	SCTP                      bool     `yaml:"sctp,omitempty"`
	EnableNodeSelectorLabels  bool     `yaml:"enable_node_selector_labels,omitempty"`
	ClusterName               string   `yaml:"cluster_name,omitempty"`
	PolicyDefaultLocalCluster *bool    `yaml:"policy_default_local_cluster,omitempty"`
	// Not in the shared format: the other two options of the specification.
	PolicyCIDRMatchMode          []string `yaml:"policy_cidr_match_mode,omitempty,flow"`
	EnableNonDefaultDenyPolicies *bool    `yaml:"enable_non_default_deny_policies,omitempty"`
	ToFQDNsMinTTL                float64  `yaml:"tofqdns_min_ttl,omitempty"`
}

// Namespace of Kubernetes.
type Namespace struct {
	Name   string            `yaml:"name"`
	Labels map[string]string `yaml:"labels,omitempty,flow"`
}

// Node of the cluster.
type Node struct {
	Name          string            `yaml:"name"`
	IP            string            `yaml:"ip,omitempty"`
	IP6           string            `yaml:"ip6,omitempty"`
	Labels        map[string]string `yaml:"labels,omitempty,flow"`
	KubeAPIServer bool              `yaml:"kube_apiserver,omitempty"`
}

// Port of a container.
type Port struct {
	Name     string `yaml:"name"`
	Port     int    `yaml:"port"`
	Protocol string `yaml:"protocol,omitempty"`
}

// Pod of this cluster or of another one of the mesh.
type Pod struct {
	Name           string            `yaml:"name"`
	Namespace      string            `yaml:"namespace"`
	Labels         map[string]string `yaml:"labels,omitempty,flow"`
	IP             string            `yaml:"ip,omitempty"`
	IP6            string            `yaml:"ip6,omitempty"`
	Node           string            `yaml:"node,omitempty"`
	ServiceAccount string            `yaml:"service_account,omitempty"`
	Ports          []Port            `yaml:"ports,omitempty,flow"`
	Annotations    map[string]string `yaml:"annotations,omitempty"`
	HostNetwork    bool              `yaml:"host_network,omitempty"`
	Cluster        string            `yaml:"cluster,omitempty"`
}

// Service of Kubernetes; without a selector, Endpoints are its addresses.
type Service struct {
	Name      string            `yaml:"name"`
	Namespace string            `yaml:"namespace"`
	Labels    map[string]string `yaml:"labels,omitempty,flow"`
	ClusterIP string            `yaml:"cluster_ip,omitempty"`
	Selector  map[string]string `yaml:"selector,omitempty,flow"`
	Endpoints []string          `yaml:"endpoints,omitempty,flow"`
	Ports     []ServicePort     `yaml:"ports,omitempty,flow"`
}

// ServicePort of a service.
type ServicePort struct {
	Name       string `yaml:"name,omitempty"`
	Port       int    `yaml:"port"`
	TargetPort any    `yaml:"target_port,omitempty"`
	Protocol   string `yaml:"protocol,omitempty"`
}

// External is an outside address with properties.
type External struct {
	IP            string `yaml:"ip"`
	KubeAPIServer bool   `yaml:"kube_apiserver,omitempty"`
}

type endKind int

const (
	outsideEnd endKind = iota
	podEnd
	nodeEnd
	entityEnd
)

// end of a packet.
type end struct {
	kind      endKind
	pod       *Pod
	node      string // the node that it is, or on which it is; "" outside
	entity    string
	addr      netip.Addr // invalid for entities
	apiServer bool
}

func (e end) same(o end) bool {
	return e.kind == o.kind && (e.kind == podEnd && e.pod == o.pod || e.kind == nodeEnd && e.node == o.node)
}

// end finds the end that a text names. An address of a pod or node is that pod or node; a pod in the host network is its node (spec 5.3).
func (c *Cluster) end(name string, v6 bool) end {
	address := func(v4text, v6text string) netip.Addr {
		if v6 {
			v4text = v6text
		}
		a, _ := netip.ParseAddr(v4text)
		return a
	}
	kind, rest, ok := strings.Cut(name, ":")
	switch {
	case ok && kind == "entity":
		return end{kind: entityEnd, entity: rest, node: c.firstNode()}
	case ok && kind == "node":
		for _, n := range c.Nodes {
			if n.Name == rest {
				return end{kind: nodeEnd, node: n.Name, addr: address(n.IP, n.IP6), apiServer: n.KubeAPIServer}
			}
		}
		if len(c.Nodes) == 0 && rest == "n1" {
			return end{kind: nodeEnd, node: "n1"}
		}
	case ok && kind == "ip":
		return c.endOfAddress(netip.MustParseAddr(rest))
	default:
		for i := range c.Pods {
			pod := &c.Pods[i]
			if pod.Namespace+"/"+pod.Name != name {
				continue
			}
			if pod.HostNetwork {
				return c.end("node:"+pod.nodeName(), v6)
			}
			return end{kind: podEnd, pod: pod, node: pod.nodeName(), addr: address(pod.IP, pod.IP6)}
		}
	}
	panic(fmt.Sprintf("no end is named %q", name))
}

func (c *Cluster) endOfAddress(a netip.Addr) end {
	for i := range c.Pods {
		pod := &c.Pods[i]
		if !pod.HostNetwork && (pod.IP == a.String() || pod.IP6 == a.String()) {
			return end{kind: podEnd, pod: pod, node: pod.nodeName(), addr: a}
		}
	}
	for _, n := range c.Nodes {
		if n.IP == a.String() || n.IP6 == a.String() {
			return end{kind: nodeEnd, node: n.Name, addr: a, apiServer: n.KubeAPIServer}
		}
	}
	e := end{kind: outsideEnd, addr: a}
	for _, x := range c.Externals {
		e.apiServer = e.apiServer || x.KubeAPIServer && x.IP == a.String()
	}
	return e
}

func (c *Cluster) firstNode() string {
	if len(c.Nodes) > 0 {
		return c.Nodes[0].Name
	}
	return "n1"
}

func (c *Cluster) clusterName() string {
	if c.Config.ClusterName != "" {
		return c.Config.ClusterName
	}
	return "default"
}

func (p *Pod) nodeName() string {
	if p.Node != "" {
		return p.Node
	}
	return "n1"
}

func (p *Pod) clusterName(c *Cluster) string {
	if p.Cluster != "" {
		return p.Cluster
	}
	return c.clusterName()
}

// namespaceLabels includes the one that the API server gives.
func (c *Cluster) namespaceLabels(name string) map[string]string {
	labels := map[string]string{"kubernetes.io/metadata.name": name}
	for _, ns := range c.Namespaces {
		if ns.Name == name {
			for k, v := range ns.Labels {
				labels[k] = v
			}
		}
	}
	return labels
}

func (c *Cluster) nodeLabels(name string) map[string]string {
	for _, n := range c.Nodes {
		if n.Name == name {
			return n.Labels
		}
	}
	return nil
}

// label has a source (spec 3.1).
type label struct{ source, key, value string }

// labels of an end, as a subject on node `viewer` sees them.
func (c *Cluster) labels(e end, viewer string) []label {
	var out []label
	reserved := func(name string) { out = append(out, label{"reserved", name, ""}) }
	switch e.kind {
	case podEnd:
		for k, v := range e.pod.Labels {
			out = append(out, label{"k8s", k, v})
		}
		for k, v := range c.namespaceLabels(e.pod.Namespace) {
			out = append(out, label{"k8s", "io.cilium.k8s.namespace.labels." + k, v})
		}
		account := e.pod.ServiceAccount
		if account == "" {
			account = "default"
		}
		out = append(out, label{"k8s", namespaceKey, e.pod.Namespace}, label{"k8s", "io.cilium.k8s.policy.serviceaccount", account},
			label{"k8s", clusterKey, e.pod.clusterName(c)})
	case nodeEnd:
		if e.node == viewer {
			reserved("host")
			break
		}
		reserved("remote-node")
		if c.Config.EnableNodeSelectorLabels {
			for k, v := range c.nodeLabels(e.node) {
				out = append(out, label{"node", k, v})
			}
			out = append(out, label{"k8s", clusterKey, c.clusterName()})
		}
	case entityEnd:
		reserved(e.entity)
	case outsideEnd:
		switch {
		case len(c.Config.IPFamilies) < 2:
			reserved("world")
		case e.addr.Is4():
			reserved("world-ipv4")
		default:
			reserved("world-ipv6")
		}
	}
	if e.apiServer {
		reserved("kube-apiserver")
	}
	return out
}
