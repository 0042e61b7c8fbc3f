// SPDX-License-Identifier: Apache-2.0

// Package format reads policy cases: closed worlds of nodes, pods, services and policies with the verdicts that are expected of them. It is strict: a key
// that it does not know is an error that names it, since a key that is passed over makes a case say something else than it was written to say.
package format

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"go.yaml.in/yaml/v3"
)

// Case is one file.
type Case struct {
	ID          string       `yaml:"id"`
	Title       string       `yaml:"title"`
	Area        Strings      `yaml:"area"`
	Config      Config       `yaml:"config"`
	Namespaces  []Namespace  `yaml:"namespaces"`
	Nodes       []Node       `yaml:"nodes"`
	Pods        []Pod        `yaml:"pods"`
	Services    []Service    `yaml:"services"`
	Externals   []External   `yaml:"externals"`
	DNSAnswers  []DNSAnswer  `yaml:"dns_answers"`
	Connections []Connection `yaml:"connections"`
	// Policies are objects of the Kubernetes API, passed on as they are written: see Document.
	Policies   []yaml.Node   `yaml:"policies"`
	Changes    []Change      `yaml:"policy_changes"`
	Validation []Validation  `yaml:"validation"`
	Expect     []Expectation `yaml:"expect"`
}

// Config are the cluster's options.
type Config struct {
	PolicyEnforcement          string  `yaml:"policy_enforcement"`
	PolicyAuditMode            bool    `yaml:"policy_audit_mode"`
	AllowLocalhost             string  `yaml:"allow_localhost"`
	HostFirewall               bool    `yaml:"host_firewall"`
	IPFamilies                 Strings `yaml:"ip_families"`
	SCTP                       bool    `yaml:"sctp"`
	EnableNodeSelectorLabels   bool    `yaml:"enable_node_selector_labels"`
	ClusterName                string  `yaml:"cluster_name"`
	PolicyDefaultLocalCluster  *bool   `yaml:"policy_default_local_cluster"`
	ToFQDNsMinTTL              int     `yaml:"tofqdns_min_ttl"`
	PolicyCIDRMatchMode        Strings `yaml:"policy_cidr_match_mode"`
	EnableNonDefaultDenyPolicy *bool   `yaml:"enable_non_default_deny_policies"`
}

// Namespace is a Kubernetes namespace.
type Namespace struct {
	Name   string            `yaml:"name"`
	Labels map[string]string `yaml:"labels"`
}

// Node is a node of the cluster.
type Node struct {
	Name          string            `yaml:"name"`
	IP            string            `yaml:"ip"`
	IP6           string            `yaml:"ip6"`
	Labels        map[string]string `yaml:"labels"`
	KubeAPIServer bool              `yaml:"kube_apiserver"`
}

// Pod is a pod.
type Pod struct {
	Name           string            `yaml:"name"`
	Namespace      string            `yaml:"namespace"`
	Labels         map[string]string `yaml:"labels"`
	IP             string            `yaml:"ip"`
	IP6            string            `yaml:"ip6"`
	Node           string            `yaml:"node"`
	ServiceAccount string            `yaml:"service_account"`
	Ports          []ContainerPort   `yaml:"ports"`
	Annotations    map[string]string `yaml:"annotations"`
	HostNetwork    bool              `yaml:"host_network"`
	Cluster        string            `yaml:"cluster"`
}

// ContainerPort is a port that a pod declares.
type ContainerPort struct {
	Name     string `yaml:"name"`
	Port     int    `yaml:"port"`
	Protocol string `yaml:"protocol"`
}

// Service is a Kubernetes service.
type Service struct {
	Name      string            `yaml:"name"`
	Namespace string            `yaml:"namespace"`
	Labels    map[string]string `yaml:"labels"`
	ClusterIP string            `yaml:"cluster_ip"`
	Selector  map[string]string `yaml:"selector"`
	Endpoints []string          `yaml:"endpoints"`
	Ports     []ServicePort     `yaml:"ports"`
}

// ServicePort is a port of a service. TargetPort is a number or a name; empty = Port.
type ServicePort struct {
	Name       string `yaml:"name"`
	Port       int    `yaml:"port"`
	TargetPort string `yaml:"target_port"`
	Protocol   string `yaml:"protocol"`
}

// External is an outside address of which something is known.
type External struct {
	IP            string `yaml:"ip"`
	KubeAPIServer bool   `yaml:"kube_apiserver"`
}

// DNSAnswer is an answer that came back to a client.
type DNSAnswer struct {
	Client string   `yaml:"client"`
	Name   string   `yaml:"name"`
	IPs    []string `yaml:"ips"`
	TTL    float64  `yaml:"ttl"`
	At     float64  `yaml:"at"`
}

// Flow says which packets.
type Flow struct {
	From     string `yaml:"from"`
	To       string `yaml:"to"`
	Port     int    `yaml:"port"`
	Protocol string `yaml:"protocol"`
	ICMP     *ICMP  `yaml:"icmp"`
}

// ICMP is a message.
type ICMP struct {
	Type int `yaml:"type"`
	Code int `yaml:"code"`
}

// Connection lives from OpenAt to CloseAt; without CloseAt to the end.
type Connection struct {
	Flow    `yaml:",inline"`
	ID      string   `yaml:"id"`
	Name    string   `yaml:"name"`
	OpenAt  float64  `yaml:"open_at"`
	CloseAt *float64 `yaml:"close_at"`
}

// Change adds objects at a time.
type Change struct {
	At  float64     `yaml:"at"`
	Add []yaml.Node `yaml:"add"`
	// Remove names objects like Add; it is for cases of our own.
	Remove []yaml.Node `yaml:"remove"`
}

// Validation is what must become of an object, or of an endpoint's policy.
type Validation struct {
	Policy          string `yaml:"policy"`
	Valid           *bool  `yaml:"valid"`
	MessageContains string `yaml:"message_contains"`
	OrEnforced      bool   `yaml:"or_enforced"`
	Endpoint        string `yaml:"endpoint"`
	PolicyComputed  *bool  `yaml:"policy_computed"`
	Reason          string `yaml:"reason"`
}

// Expectation is a flow and what must become of it.
type Expectation struct {
	Flow            `yaml:",inline"`
	HTTP            yaml.Node `yaml:"http"`
	DNS             yaml.Node `yaml:"dns"`
	TLS             yaml.Node `yaml:"tls"`
	At              float64   `yaml:"at"`
	Established     bool      `yaml:"established"`
	ReplyOf         yaml.Node `yaml:"reply_of"`
	RelatedTo       yaml.Node `yaml:"related_to"`
	Authenticated   bool      `yaml:"authenticated"`
	Verdict         string    `yaml:"verdict"`
	L7              string    `yaml:"l7"`
	OrAllow         bool      `yaml:"or_allow"`
	Direction       string    `yaml:"direction"`
	RCode           yaml.Node `yaml:"rcode"`
	Status          yaml.Node `yaml:"status"`
	Body            yaml.Node `yaml:"body"`
	UpstreamHeaders yaml.Node `yaml:"upstream_headers"`
	FlowVerdict     string    `yaml:"flow_verdict"`
	FlowPolicyLog   Strings   `yaml:"flow_policy_log"`
	Reason          string    `yaml:"reason"`
}

// Strings is a list of texts, or one.
type Strings []string

// UnmarshalYAML reads a scalar or a sequence of scalars.
func (s *Strings) UnmarshalYAML(n *yaml.Node) error {
	var one string
	if n.Kind == yaml.ScalarNode {
		if n.Tag == "!!null" {
			return nil
		}
		if err := n.Decode(&one); err != nil {
			return err
		}
		*s = Strings{one}
		return nil
	}
	var many []string
	if err := n.Decode(&many); err != nil {
		return err
	}
	*s = many
	return nil
}

// maxBytes bounds a file.
const maxBytes = 4 << 20

// Read reads all cases of a folder (files *.yaml and *.yml, by name), or one file. Files that cannot be used are joined in the error; the others are returned.
func Read(path string) ([]*Case, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("read cases: %w", err)
	}
	files := []string{path}
	if info.IsDir() {
		files = files[:0]
		entries, err := os.ReadDir(path)
		if err != nil {
			return nil, fmt.Errorf("read cases: %w", err)
		}
		for _, e := range entries {
			if ext := filepath.Ext(e.Name()); !e.IsDir() && (ext == ".yaml" || ext == ".yml") {
				files = append(files, filepath.Join(path, e.Name()))
			}
		}
	}
	var cases []*Case
	var errs []error
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		c, err := Parse(data)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", filepath.Base(file), err))
			continue
		}
		if c.ID == "" {
			c.ID = filepath.Base(file)
		}
		cases = append(cases, c)
	}
	return cases, errors.Join(errs...)
}

// Parse reads one case and checks it.
func Parse(data []byte) (*Case, error) {
	if len(data) > maxBytes {
		return nil, fmt.Errorf("case has %d bytes, more than %d", len(data), maxBytes)
	}
	d := yaml.NewDecoder(bytes.NewReader(data))
	d.KnownFields(true)
	c := new(Case)
	if err := d.Decode(c); err != nil {
		return nil, fmt.Errorf("case: %w", err)
	}
	if err := d.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, errors.New("case: more than one document")
	}
	if err := c.fill(); err != nil {
		return nil, err
	}
	return c, c.check()
}

// fill puts defaults in and takes aliases out of what is passed on.
func (c *Case) fill() error {
	if len(c.Nodes) == 0 {
		c.Nodes = []Node{{Name: "n1"}}
	}
	// Nodes that only pods name are nodes.
	for _, p := range c.Pods {
		if p.Node != "" && !slices.ContainsFunc(c.Nodes, func(n Node) bool { return n.Name == p.Node }) {
			c.Nodes = append(c.Nodes, Node{Name: p.Node})
		}
	}
	for i := range c.Pods {
		if c.Pods[i].Node == "" {
			c.Pods[i].Node = c.Nodes[0].Name
			if slices.ContainsFunc(c.Nodes, func(n Node) bool { return n.Name == "n1" }) {
				c.Pods[i].Node = "n1"
			}
		}
		if c.Pods[i].Namespace == "" {
			c.Pods[i].Namespace = "default"
		}
	}
	for i := range c.Services {
		if c.Services[i].Namespace == "" {
			c.Services[i].Namespace = "default"
		}
	}
	if len(c.Config.IPFamilies) == 0 {
		c.Config.IPFamilies = Strings{IPv4}
	}
	budget := nodeBudget
	lists := [][]yaml.Node{c.Policies}
	for i := range c.Changes {
		lists = append(lists, c.Changes[i].Add, c.Changes[i].Remove)
	}
	for _, list := range lists {
		for i := range list {
			n, err := plain(&list[i], 0, &budget)
			if err != nil {
				return err
			}
			list[i] = *n
		}
	}
	for i := range c.Expect {
		c.Expect[i].Protocol = protocol(c.Expect[i].Flow)
	}
	for i := range c.Connections {
		c.Connections[i].Protocol = protocol(c.Connections[i].Flow)
	}
	return nil
}

// Families of ip_families.
const (
	IPv4 = "IPv4"
	IPv6 = "IPv6"
)

// HasFamily reports whether the cluster of the case has a family.
func (c *Case) HasFamily(family string) bool { return slices.Contains(c.Config.IPFamilies, family) }

func (c *Case) check() error {
	var errs []error
	fault := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	for _, f := range c.Config.IPFamilies {
		if f != IPv4 && f != IPv6 {
			fault("config.ip_families: expected IPv4 or IPv6, got %q", f)
		}
	}
	address := func(where, text string) {
		if text == "" {
			return
		}
		if a, err := netip.ParseAddr(text); err != nil || a.Zone() != "" {
			fault("%s: expected an address, got %q", where, text)
		}
	}
	nodes := map[string]bool{}
	for i, n := range c.Nodes {
		if n.Name == "" || nodes[n.Name] {
			fault("nodes[%d].name: empty, or twice: %q", i, n.Name)
		}
		nodes[n.Name] = true
		address(fmt.Sprintf("nodes[%d].ip", i), n.IP)
		address(fmt.Sprintf("nodes[%d].ip6", i), n.IP6)
	}
	pods := map[string]bool{}
	for i, p := range c.Pods {
		name := p.Namespace + "/" + p.Name
		if p.Name == "" || pods[name] {
			fault("pods[%d].name: empty, or twice: %q", i, name)
		}
		pods[name] = true
		address(fmt.Sprintf("pods[%d].ip", i), p.IP)
		address(fmt.Sprintf("pods[%d].ip6", i), p.IP6)
	}
	for i, e := range c.Externals {
		if e.IP == "" {
			fault("externals[%d].ip: required", i)
		}
		address(fmt.Sprintf("externals[%d].ip", i), e.IP)
	}
	for i := range c.Expect {
		e := &c.Expect[i]
		at := fmt.Sprintf("expect[%d]", i)
		errs = append(errs, c.checkFlow(at, e.Flow)...)
		if !slices.Contains([]string{Allow, Deny, Redirect, AuthRequired}, e.Verdict) {
			fault("%s.verdict: expected allow, redirect, deny or auth-required, got %q", at, e.Verdict)
		}
		if e.Direction != "" && e.Direction != "ingress" && e.Direction != "egress" {
			fault("%s.direction: expected ingress or egress, got %q", at, e.Direction)
		}
		for key, ref := range map[string]yaml.Node{"reply_of": e.ReplyOf, "related_to": e.RelatedTo} {
			if _, err := c.Connection(&ref, e); err != nil {
				fault("%s.%s: %w", at, key, err)
			}
		}
	}
	for i := range c.Connections {
		errs = append(errs, c.checkFlow(fmt.Sprintf("connections[%d]", i), c.Connections[i].Flow)...)
	}
	for i, v := range c.Validation {
		if (v.Policy == "") == (v.Endpoint == "") {
			fault("validation[%d]: expected policy or endpoint", i)
		}
		if v.Policy != "" && v.Valid == nil || v.Endpoint != "" && v.PolicyComputed == nil {
			fault("validation[%d]: expected valid with policy, policy_computed with endpoint", i)
		}
	}
	return errors.Join(errs...)
}
