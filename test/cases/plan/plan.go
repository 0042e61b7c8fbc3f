// SPDX-License-Identifier: Apache-2.0

// Package plan turns a case into a lab: flags, manifests, and where the ends of flows are.
package plan

import (
	"bytes"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"go.yaml.in/yaml/v3"

	"github.com/weirmesh/weir/test/cases/format"
)

// Names of what a plan adds to the world of a case.
const (
	// OutsideHost has all addresses outside of the cluster.
	OutsideHost = "weircases-outside"
	// standInNamespace has the pods that stand for entities.
	standInNamespace = "weircases"
)

// Plan is how a lab plays a case.
type Plan struct {
	// Flags of `weir-lab up`.
	Flags []string
	// Manifests hold everything but policies.
	Manifests []byte
	Pods      map[string]Pod
	Nodes     map[string]Node
	Services  map[string]Service
	// Outside are the addresses of OutsideHost.
	Outside []netip.Addr
	// Entities are the pods that stand for "entity:NAME".
	Entities map[string]string
}

// Pod is where a pod is.
type Pod struct {
	Node        string
	Addrs       []netip.Addr
	HostNetwork bool
	Foreign     bool
}

// Node is a node of the lab.
type Node struct{ Addrs []netip.Addr }

// Service is how a service is reached.
type Service struct {
	Addrs []netip.Addr
	Ports []ServicePort
}

// ServicePort is one port of a service, and the ends that serve it.
type ServicePort struct {
	Protocol string
	Port     int
	Backends []Backend
}

// Backend serves a port of a service: a pod, or an address that has no pod.
type Backend struct {
	Pod  string
	Addr netip.Addr
	Port int
}

// New plans a case. Socket says where the helper of a pod listens, command what runs in a pod for that.
func New(c *format.Case, command func(pod string) []string) (*Plan, error) {
	b := &builder{
		c: c, command: command,
		Plan:  Plan{Pods: map[string]Pod{}, Nodes: map[string]Node{}, Services: map[string]Service{}, Entities: map[string]string{}},
		taken: map[netip.Addr]bool{}, missing: c.MissingServers(),
	}
	b.flags()
	b.claim()
	b.namespaces()
	b.pods()
	b.nodes()
	if err := b.services(); err != nil {
		return nil, err
	}
	b.apiServer()
	b.outside()
	b.Manifests = b.out.Bytes()
	return &b.Plan, b.err
}

type builder struct {
	Plan
	c       *format.Case
	command func(pod string) []string
	// missing are name servers that the case does not show.
	missing []format.Pod
	taken   map[netip.Addr]bool
	next    int
	out     bytes.Buffer
	err     error
}

// object adds a manifest.
func (b *builder) object(o map[string]any) {
	data, err := yaml.Marshal(o)
	if err != nil && b.err == nil {
		b.err = fmt.Errorf("dump manifest: %w", err)
	}
	b.out.WriteString("---\n")
	b.out.Write(data)
}

func (b *builder) flags() {
	c := &b.c.Config
	families := ""
	for _, f := range []string{format.IPv4, format.IPv6} {
		if b.c.HasFamily(f) {
			if families != "" {
				families += ","
			}
			families += f
		}
	}
	b.Flags = append(b.Flags, "--ip-families="+families,
		// The far end sees the addresses that the case gives.
		"--agent-arg=--masquerade=false",
		"--policy-arg=--stand-ins")
	policy := func(flag, value string) { b.Flags = append(b.Flags, "--policy-arg=--"+flag+"="+value) }
	if c.PolicyEnforcement != "" {
		policy("policy-enforcement", c.PolicyEnforcement)
	}
	if c.PolicyAuditMode {
		policy("policy-audit-mode", "true")
	}
	if c.AllowLocalhost != "" {
		policy("allow-localhost", c.AllowLocalhost)
	}
	if c.HostFirewall {
		policy("host-firewall", "true")
	}
	if c.EnableNodeSelectorLabels {
		policy("enable-node-selector-labels", "true")
	}
	if c.ClusterName != "" {
		b.Flags = append(b.Flags, "--cluster-name="+c.ClusterName)
	}
	if c.PolicyDefaultLocalCluster != nil {
		policy("policy-default-local-cluster", strconv.FormatBool(*c.PolicyDefaultLocalCluster))
	}
	if c.EnableNonDefaultDenyPolicy != nil {
		policy("enable-non-default-deny-policies", strconv.FormatBool(*c.EnableNonDefaultDenyPolicy))
	}
	if c.ToFQDNsMinTTL > 0 {
		b.Flags = append(b.Flags, "--dns-arg=--tofqdns-min-ttl="+strconv.Itoa(c.ToFQDNsMinTTL))
	}
	for _, m := range c.PolicyCIDRMatchMode {
		policy("policy-cidr-match-mode", m)
	}
}

// claim notes every address that the case gives.
func (b *builder) claim() {
	note := func(texts ...string) {
		for _, t := range texts {
			if a, err := netip.ParseAddr(t); err == nil {
				b.taken[a] = true
			}
		}
	}
	for _, n := range b.c.Nodes {
		note(n.IP, n.IP6)
	}
	for _, p := range b.c.Pods {
		note(p.IP, p.IP6)
	}
	for _, e := range b.c.Externals {
		note(e.IP)
	}
	for _, s := range b.c.Services {
		note(s.ClusterIP)
		note(s.Endpoints...)
	}
	for _, f := range b.flows() {
		for _, end := range []string{f.From, f.To} {
			if e, err := format.ParseEnd(end); err == nil && e.Kind == format.AddressEnd {
				b.taken[e.Addr] = true
			}
		}
	}
}

func (b *builder) flows() []format.Flow {
	var flows []format.Flow
	for i := range b.c.Expect {
		e := &b.c.Expect[i]
		flows = append(flows, e.Flow)
		if k, err := b.c.Connection(&e.ReplyOf, e); err == nil && k != nil {
			flows = append(flows, k.Flow)
		}
		if k, err := b.c.Connection(&e.RelatedTo, e); err == nil && k != nil {
			flows = append(flows, k.Flow)
		}
	}
	for i := range b.c.Connections {
		flows = append(flows, b.c.Connections[i].Flow)
	}
	for _, d := range b.c.DNSAnswers {
		listed, usual := b.c.Servers(d.Client)
		for _, s := range append(listed, usual...) {
			flows = append(flows, format.Flow{From: d.Client, To: s.End, Port: s.Port, Protocol: format.UDP})
		}
	}
	return flows
}

// Ranges of addresses that a plan gives where the case gives none.
var (
	pool4 = netip.MustParseAddr("100.127.200.0")
	pool6 = netip.MustParseAddr("fd00:ca5e:c8::")
)

// fresh returns addresses of the case's families that nobody has.
func (b *builder) fresh(families ...string) []netip.Addr {
	b.next++
	var addrs []netip.Addr
	for _, f := range families {
		if !b.c.HasFamily(f) {
			continue
		}
		base := pool4
		if f == format.IPv6 {
			base = pool6
		}
		raw := base.AsSlice()
		raw[len(raw)-1], raw[len(raw)-2] = byte(b.next), raw[len(raw)-2]+byte(b.next>>8)
		a, _ := netip.AddrFromSlice(raw)
		addrs = append(addrs, a)
	}
	return addrs
}

// objects are all policy objects that the case ever has.
func (b *builder) objects() []*yaml.Node {
	var all []*yaml.Node
	for i := range b.c.Policies {
		all = append(all, &b.c.Policies[i])
	}
	for _, change := range b.c.Changes {
		for i := range change.Add {
			all = append(all, &change.Add[i])
		}
	}
	return all
}

func (b *builder) namespaces() {
	labels := map[string]map[string]string{}
	var order []string
	add := func(name string, set map[string]string) {
		if labels[name] == nil {
			labels[name] = map[string]string{"kubernetes.io/metadata.name": name}
			order = append(order, name)
		}
		for k, v := range set {
			labels[name][k] = v
		}
	}
	for _, n := range b.c.Namespaces {
		add(n.Name, n.Labels)
	}
	for _, p := range append(slices.Clone(b.c.Pods), b.missing...) {
		add(p.Namespace, nil)
	}
	for _, s := range b.c.Services {
		add(s.Namespace, nil)
	}
	for _, o := range b.objects() {
		if ns := format.RefOf(o).Namespace; ns != "" {
			add(ns, nil)
		}
	}
	add("default", nil)
	add(standInNamespace, nil)
	for _, name := range order {
		b.object(map[string]any{"apiVersion": "v1", "kind": "Namespace", "metadata": map[string]any{"name": name, "labels": labels[name]}})
	}
}

func (b *builder) pods() {
	for _, p := range append(slices.Clone(b.c.Pods), b.missing...) {
		addrs := b.addrs(p.IP, p.IP6)
		switch {
		case p.HostNetwork:
			addrs = nil
		case len(addrs) == 0:
			addrs = b.fresh(b.c.Config.IPFamilies...)
		}
		b.pod(p, addrs)
	}
	for _, f := range b.flows() {
		for _, text := range []string{f.From, f.To} {
			if end, err := format.ParseEnd(text); err == nil && end.Kind == format.EntityEnd {
				b.standIn(end.Name)
			}
		}
	}
}

// standIn makes the pod that stands for an entity, once. Health endpoints are there without.
func (b *builder) standIn(entity string) {
	annotations := map[string]map[string]string{
		"unmanaged": {"weir.dev/unmanaged": "true"},
		"init":      {reservedAnnotation: entity},
		"ingress":   {reservedAnnotation: entity},
	}[entity]
	if annotations == nil || b.Entities[entity] != "" {
		return
	}
	b.Entities[entity] = standInNamespace + "/" + entity
	b.pod(format.Pod{Name: entity, Namespace: standInNamespace, Node: b.c.Nodes[0].Name, Annotations: annotations}, b.standInAddrs())
}

// standInAddrs are the next addresses from the end of the first node's own range.
func (b *builder) standInAddrs() []netip.Addr {
	host := 255 - len(b.Entities)
	var addrs []netip.Addr
	if b.c.HasFamily(format.IPv4) {
		addrs = append(addrs, netip.AddrFrom4([4]byte{100, 127, 1, byte(host)}))
	}
	if b.c.HasFamily(format.IPv6) {
		raw := netip.MustParseAddr("fd00:ca5e:1::").As16()
		raw[15] = byte(host)
		addrs = append(addrs, netip.AddrFrom16(raw))
	}
	return addrs
}

func (b *builder) addrs(texts ...string) []netip.Addr {
	var addrs []netip.Addr
	for _, t := range texts {
		if a, err := netip.ParseAddr(t); err == nil {
			addrs = append(addrs, a)
		}
	}
	return addrs
}

// Annotations of the lab and the policy service.
const (
	addressesAnnotation = "weir.dev/ip-addresses"
	clusterAnnotation   = "weir.dev/cluster"
	reservedAnnotation  = "weir.dev/reserved"
)

func (b *builder) pod(p format.Pod, addrs []netip.Addr) {
	name := p.Namespace + "/" + p.Name
	annotations := map[string]string{}
	for k, v := range p.Annotations {
		annotations[k] = v
	}
	if len(addrs) > 0 {
		text := ""
		for i, a := range addrs {
			if i > 0 {
				text += ","
			}
			text += a.String()
		}
		annotations[addressesAnnotation] = text
	}
	local := b.c.Config.ClusterName
	if local == "" {
		local = "default"
	}
	foreign := p.Cluster != "" && p.Cluster != local
	if foreign {
		annotations[clusterAnnotation] = p.Cluster
	}
	container := map[string]any{"name": "main", "image": "none", "command": b.command(name)}
	var ports []any
	for _, port := range p.Ports {
		entry := map[string]any{"containerPort": port.Port}
		if port.Name != "" {
			entry["name"] = port.Name
		}
		if port.Protocol != "" {
			entry["protocol"] = port.Protocol
		}
		ports = append(ports, entry)
	}
	if ports != nil {
		container["ports"] = ports
	}
	spec := map[string]any{"nodeName": p.Node, "containers": []any{container}}
	if p.HostNetwork {
		spec["hostNetwork"] = true
	}
	if p.ServiceAccount != "" {
		spec["serviceAccountName"] = p.ServiceAccount
	}
	meta := map[string]any{"name": p.Name, "namespace": p.Namespace}
	if len(p.Labels) > 0 {
		meta["labels"] = p.Labels
	}
	if len(annotations) > 0 {
		meta["annotations"] = annotations
	}
	b.Pods[name] = Pod{Node: p.Node, Addrs: addrs, HostNetwork: p.HostNetwork, Foreign: foreign}
	b.object(map[string]any{"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec})
}

func (b *builder) nodes() {
	for i, n := range b.c.Nodes {
		addrs := b.addrs(n.IP, n.IP6)
		for _, family := range []string{format.IPv4, format.IPv6} {
			if b.c.HasFamily(family) && !slices.ContainsFunc(addrs, func(a netip.Addr) bool { return a.Is4() == (family == format.IPv4) }) {
				addrs = append(addrs, b.fresh(family)...)
			}
		}
		// For the mesh's own endpoints. Pods have the addresses that the case gives, which need not be of any range.
		var cidrs []string
		if b.c.HasFamily(format.IPv4) {
			cidrs = append(cidrs, fmt.Sprintf("100.127.%d.0/24", i+1))
		}
		if b.c.HasFamily(format.IPv6) {
			cidrs = append(cidrs, fmt.Sprintf("fd00:ca5e:%d::/64", i+1))
		}
		var status []any
		for _, a := range addrs {
			status = append(status, map[string]any{"type": "InternalIP", "address": a.String()})
		}
		meta := map[string]any{"name": n.Name}
		if len(n.Labels) > 0 {
			meta["labels"] = n.Labels
		}
		b.Nodes[n.Name] = Node{addrs}
		b.object(map[string]any{
			"apiVersion": "v1", "kind": "Node", "metadata": meta,
			"spec": map[string]any{"podCIDRs": cidrs}, "status": map[string]any{"addresses": status},
		})
	}
	for name, p := range b.Pods {
		if p.HostNetwork {
			p.Addrs = b.Nodes[p.Node].Addrs
			b.Pods[name] = p
		}
	}
}

// outside makes the host that has all addresses of nobody else.
func (b *builder) outside() {
	owned := map[netip.Addr]bool{}
	for _, p := range b.Pods {
		for _, a := range p.Addrs {
			owned[a] = true
		}
	}
	for _, n := range b.Nodes {
		for _, a := range n.Addrs {
			owned[a] = true
		}
	}
	for _, s := range b.Services {
		for _, a := range s.Addrs {
			owned[a] = true
		}
	}
	add := func(a netip.Addr) {
		if a.IsValid() && !owned[a] {
			owned[a] = true
			b.Outside = append(b.Outside, a)
		}
	}
	for _, e := range b.c.Externals {
		a, _ := netip.ParseAddr(e.IP)
		add(a)
	}
	for _, s := range b.Services {
		for _, p := range s.Ports {
			for _, backend := range p.Backends {
				if backend.Pod == "" {
					add(backend.Addr)
				}
			}
		}
	}
	for _, f := range b.flows() {
		for _, text := range []string{f.From, f.To} {
			end, err := format.ParseEnd(text)
			if err != nil {
				continue
			}
			if end.Kind == format.AddressEnd {
				add(end.Addr)
			}
		}
	}
	if len(b.Outside) == 0 {
		return
	}
	slices.SortFunc(b.Outside, netip.Addr.Compare)
	var addresses []string
	for _, a := range b.Outside {
		addresses = append(addresses, a.String())
	}
	b.object(map[string]any{"apiVersion": "lab.weir.dev/v1", "kind": "Host", "metadata": map[string]any{"name": OutsideHost}, "spec": map[string]any{"addresses": addresses}})
}
