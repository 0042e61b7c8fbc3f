// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/weirmesh/weir/internal/labelset"
	"sigs.k8s.io/yaml"
)

// A case is a closed world with expected verdicts, in the format of the project's case files.
type caseFile struct {
	Config struct {
		Enforcement  string   `json:"policy_enforcement"`
		Audit        bool     `json:"policy_audit_mode"`
		Localhost    string   `json:"allow_localhost"`
		HostFirewall bool     `json:"host_firewall"`
		Families     []string `json:"ip_families"`
		NodeLabels   bool     `json:"enable_node_selector_labels"`
		Cluster      string   `json:"cluster_name"`
		LocalCluster *bool    `json:"policy_default_local_cluster"`
		CIDRMatch    any      `json:"policy_cidr_match_mode"`
		NonDefault   *bool    `json:"enable_non_default_deny_policies"`
		MinTTL       float64  `json:"tofqdns_min_ttl"`
	} `json:"config"`
	Namespaces []caseMeta `json:"namespaces"`
	Nodes      []struct {
		caseMeta
		IP, IP6 string
		API     bool `json:"kube_apiserver"`
	} `json:"nodes"`
	Pods []struct {
		caseMeta
		IP, IP6, Node, Cluster string
		Account                string `json:"service_account"`
		HostNetwork            bool   `json:"host_network"`
		Annotations            map[string]string
		Ports                  []struct {
			Name     string
			Port     uint16
			Protocol string
		}
	} `json:"pods"`
	Services []struct {
		caseMeta
		Selector  map[string]string
		Endpoints []string
		Ports     []struct {
			RawPort   uint16 `json:"port"`
			RawTarget uint16 `json:"target_port"`
		}
	} `json:"services"`
	Externals []struct {
		IP  string
		API bool `json:"kube_apiserver"`
	} `json:"externals"`
	Policies   []json.RawMessage `json:"policies"`
	Changes    []caseChange      `json:"policy_changes"`
	Validation []struct {
		Policy     string
		Valid      *bool
		Endpoint   string
		OrEnforced bool   `json:"or_enforced"`
		Message    string `json:"message_contains"`
	} `json:"validation"`
	Expect      []caseExpect     `json:"expect"`
	Answers     []caseAnswer     `json:"dns_answers"`
	Connections []caseConnection `json:"connections"`
}

type caseChange struct {
	At          float64
	Add, Remove []json.RawMessage
}

type caseMeta struct {
	Name, Namespace string
	Labels          map[string]string
}

type caseExpect struct {
	From, To, Protocol string
	Port               uint16
	ICMP               *struct{ Type, Code uint16 }
	At                 float64
	Verdict, Reason    string
	L7                 string
	OrAllow            bool `json:"or_allow"`
	HTTP               *struct {
		Method, Path, Host string
		Headers            any
	}
	DNS           *struct{ Query string }
	TLS           *struct{ SNI string }
	Authenticated any
	Reply         any `json:"reply_of"`
	Related       any `json:"related_to"`
}

// end is one end of a flow.
type end struct {
	name     string
	labels   labelset.Set // of its identity, as seen from its own node
	ip       []netip.Addr
	node     string // of pods and nodes
	isNode   bool
	nodeMeta labelset.Set
	api      bool
	subject  bool
	outside  bool
	ports    []NamedPort
	visible  []Visibility
}

type caseWorld struct {
	c       *caseFile
	o       Options
	groups  []*CIDRGroup
	rules   []*Rule
	ends    map[string]*end
	refused map[string]*Error
	learnt  []learntName
	at      float64
}

func (w *caseWorld) Services(namespace, name string, s *Selector) []Service {
	var found []Service
	for _, x := range w.c.Services {
		labels := k8sLabels("k8s", x.Labels)
		if namespace != "" && namespace != x.Namespace || name != "" && name != x.Name || s != nil && !s.Matches(labels) {
			continue
		}
		service := Service{Namespace: x.Namespace, Name: x.Name, Labels: labels, Selector: x.Selector}
		for _, a := range x.Endpoints {
			service.Addresses = append(service.Addresses, netip.MustParseAddr(a))
		}
		found = append(found, service)
	}
	return found
}

func (w *caseWorld) CIDRGroups(name string, s *Selector) []netip.Prefix {
	var all []netip.Prefix
	for _, g := range w.groups {
		if (name == "" || name == g.Name) && (s == nil || s.Matches(g.Labels)) {
			all = append(all, g.Prefixes...)
		}
	}
	return all
}

func (w *caseWorld) NamedPorts(name string) []NamedPort {
	var all []NamedPort
	for _, e := range w.ends {
		for _, p := range e.ports {
			if p.Name == name && !slices.Contains(all, p) {
				all = append(all, p)
			}
		}
	}
	return all
}

func k8sLabels(source string, m map[string]string) labelset.Set {
	set := labelset.Set{}
	for _, k := range slices.Sorted(maps.Keys(m)) {
		set = append(set, source+":"+k+"="+m[k])
	}
	slices.Sort(set)
	return set
}

func addresses(texts ...string) []netip.Addr {
	var all []netip.Addr
	for _, t := range texts {
		if t != "" {
			all = append(all, netip.MustParseAddr(t))
		}
	}
	return all
}

func protocolNumber(name string) uint8 {
	return map[string]uint8{"": TCP, "TCP": TCP, "UDP": UDP, "SCTP": SCTP, "ICMP": ICMP, "ICMPv6": ICMPv6}[name]
}

func newCaseWorld(c *caseFile) *caseWorld {
	w := &caseWorld{c: c, ends: map[string]*end{}, refused: map[string]*Error{}}
	match := fmt.Sprint(c.Config.CIDRMatch)
	w.o = Options{
		ClusterName: c.Config.Cluster, AllClusters: c.Config.LocalCluster != nil && !*c.Config.LocalCluster,
		Enforcement: map[string]Mode{"always": ModeAlways, "never": ModeNever}[c.Config.Enforcement],
		Audit:       c.Config.Audit, LocalhostNeedsRule: c.Config.Localhost == "policy", HostFirewall: c.Config.HostFirewall,
		NodeSelectorLabels: c.Config.NodeLabels, CIDRMatchesNodes: strings.Contains(match, "nodes"), CIDRMatchesPods: strings.Contains(match, "pods"),
		AlwaysDefaultDeny: c.Config.NonDefault != nil && !*c.Config.NonDefault, DualStack: len(c.Config.Families) == 2,
	}
	for _, n := range c.Nodes {
		w.ends["node:"+n.Name] = &end{isNode: true, subject: w.o.HostFirewall, node: n.Name, api: n.API, ip: addresses(n.IP, n.IP6), nodeMeta: k8sLabels("k8s", n.Labels)}
	}
	if len(c.Nodes) == 0 {
		w.ends["node:n1"] = &end{isNode: true, subject: w.o.HostFirewall, node: "n1"}
	}
	for _, name := range []string{"health", "ingress", "init", "unmanaged"} {
		w.ends["entity:"+name] = &end{labels: labelset.Set{"reserved:" + name}, subject: name != "unmanaged", node: "n1"}
	}
	for _, p := range c.Pods {
		if p.Node == "" {
			p.Node = "n1"
		}
		if p.HostNetwork {
			w.ends[p.Namespace+"/"+p.Name] = w.ends["node:"+p.Node]
			continue
		}
		w.ends[p.Namespace+"/"+p.Name] = w.pod(p.caseMeta, p.Account, p.Cluster)
		e := w.ends[p.Namespace+"/"+p.Name]
		e.node, e.ip, e.visible = p.Node, addresses(p.IP, p.IP6), visibilityOf(p.Annotations)
		for _, port := range p.Ports {
			e.ports = append(e.ports, NamedPort{strings.ToLower(port.Name), protocolNumber(port.Protocol), port.Port})
		}
	}
	for name, e := range w.ends {
		e.name = name
		if n := w.ends["node:"+e.node]; n != nil {
			e.nodeMeta = n.nodeMeta
		}
	}
	return w
}

func (w *caseWorld) pod(p caseMeta, account, cluster string) *end {
	labels := maps.Clone(p.Labels)
	if labels == nil {
		labels = map[string]string{}
	}
	if account == "" {
		account = "default"
	}
	if cluster == "" {
		cluster = w.o.cluster()
	}
	labels["io.kubernetes.pod.namespace"] = p.Namespace
	labels["io.cilium.k8s.policy.serviceaccount"] = account
	labels["io.cilium.k8s.policy.cluster"] = cluster
	labels["io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name"] = p.Namespace
	for _, n := range w.c.Namespaces {
		if n.Name == p.Namespace {
			for k, v := range n.Labels {
				labels["io.cilium.k8s.namespace.labels."+k] = v
			}
		}
	}
	return &end{labels: k8sLabels("k8s", labels), subject: true}
}

// load parses policies; a refused one is remembered. It reports a field that is not enforced yet.
func (w *caseWorld) load(raw []json.RawMessage) (notYet string) {
	for _, doc := range raw {
		o, err := Parse(doc, w.o)
		var e *Error
		if errors.As(err, &e) {
			w.refused[strings.TrimPrefix(e.Ref.Namespace+"/"+e.Ref.Name, "/")] = e
			if e.NotYet {
				notYet = e.Field
			}
			continue
		}
		w.remove(o.Ref)
		w.rules = append(w.rules, o.Rules...)
		if o.CIDRGroup != nil {
			w.groups = append(w.groups, o.CIDRGroup)
		}
	}
	return notYet
}

func (w *caseWorld) end(name string) *end {
	if text, ok := strings.CutPrefix(name, "ip:"); ok {
		e := &end{name: name, outside: true, ip: addresses(text)}
		for _, x := range w.c.Externals {
			e.api = e.api || x.IP == text && x.API
		}
		return e
	}
	return w.ends[name]
}

// peer is how an end looks from another one, for a resolved policy.
func (w *caseWorld) peer(e, from *end, v6 bool, r *Resolved) *Peer {
	p := &Peer{Key: e.name, Labels: e.labels, NamedPorts: e.ports}
	switch {
	case e.outside:
		w.outside(e, r, p)
		p.Names = w.namesOf(e.ip[0], from.node)
	case e.isNode && e.node == from.node:
		p.Labels = labelset.Set{"reserved:host"}
	case e.isNode:
		p.Labels = labelset.Set{"reserved:remote-node"}
		for _, l := range e.nodeMeta {
			if w.o.NodeSelectorLabels {
				p.Labels = append(p.Labels, "node"+strings.TrimPrefix(l, "k8s"))
			}
		}
	}
	if e.api {
		p.Labels = append(slices.Clone(p.Labels), "reserved:kube-apiserver")
	}
	p.Labels = slices.Clone(p.Labels)
	slices.Sort(p.Labels)
	for _, n := range r.Networks() {
		for _, a := range e.ip {
			if !e.outside && a.Is6() == v6 && n.Contains(a) {
				p.Networks = append(p.Networks, n)
			}
		}
	}
	return p
}

func (w *caseWorld) outside(e *end, r *Resolved, p *Peer) {
	a := e.ip[0]
	p.Prefix, _ = a.Prefix(0)
	world := "reserved:world"
	if w.o.DualStack {
		world += map[bool]string{true: "-ipv6", false: "-ipv4"}[a.Is6()]
	}
	p.Labels = labelset.Set{world}
	for _, n := range r.Prefixes() {
		if n.Contains(a) && n.Bits() > p.Prefix.Bits() {
			p.Prefix = n
		}
	}
	if e.api {
		p.Prefix, _ = a.Prefix(a.BitLen())
	}
	if p.Prefix.Bits() > 0 {
		p.Labels = append(p.Labels, "cidr:"+p.Prefix.String())
	}
}

// side decides one end, and checks that the class and the explanation say the same.
func (w *caseWorld) side(t *testing.T, subject, other *end, d Direction, proto uint8, port uint16, v6 bool) Decision {
	if !subject.subject {
		return Decision{Verdict: Allow}
	}
	s := &Subject{Labels: subject.labels, Host: subject.isNode, NamedPorts: subject.ports, Node: subject.nodeMeta, Visibility: subject.visible}
	if s.Host {
		s.Labels = append(slices.Clone(subject.nodeMeta), "reserved:host")
	}
	r, err := Resolve(w.o, s, d, w.rules, w)
	if err != nil {
		t.Fatal(err)
	}
	p := w.peer(other, subject, v6, r)
	got := r.Decide(p, proto, port)
	if c := lookup(r.Class(r.Match(p)), proto, port); r.Key != "" && !reflect.DeepEqual(c, got) {
		t.Errorf("class of %s says %+v, decide says %+v", p.Key, c, got)
	}
	if x := r.Explain(p, proto, port); x.Verdict != got.Verdict {
		t.Errorf("explain says %d, decide says %d", x.Verdict, got.Verdict)
	}
	if w.o.Audit && got.Verdict != Allow {
		return Decision{Verdict: Allow}
	}
	return got
}

// lookup finds what ranges say about a port, as the wire defines it.
func lookup(ranges []Range, proto uint8, port uint16) Decision {
	named := slices.ContainsFunc(ranges, func(r Range) bool { return r.Proto == proto })
	for _, r := range ranges {
		if r.Proto == proto && r.First <= port && port <= r.Last || !named && r.Proto == AnyProtocol {
			return Decision{Verdict: r.Verdict, Rules: r.Rules, Filter: r.Filter}
		}
	}
	return Decision{Verdict: DefaultDeny}
}

func (w *caseWorld) check(t *testing.T, x caseExpect) {
	from := w.end(x.From)
	if x.Reply != nil || x.Related != nil {
		return // the datapath's
	}
	for _, v := range w.c.Validation {
		if v.Endpoint != "" && (v.Endpoint == x.From || v.Endpoint == x.To) {
			return // its rules contradict each other: who computes policies keeps the last good one
		}
	}
	proto, port := protocolNumber(x.Protocol), x.Port
	if x.ICMP != nil {
		port = x.ICMP.Type
		if proto == ICMP && port == 3 && x.ICMP.Code == 4 || proto == ICMPv6 && port == 2 {
			return // always passes: the datapath's
		}
	}
	tos := []*end{w.end(x.To)}
	if strings.HasPrefix(x.To, "svc:") {
		tos, port = w.backends(strings.TrimPrefix(x.To, "svc:"), port)
	}
	for _, to := range tos {
		if from == nil || to == nil {
			t.Fatalf("no end %s or %s", x.From, x.To)
		}
		v6 := len(to.ip) > 0 && to.ip[0].Is6() || len(from.ip) > 0 && from.ip[0].Is6() || proto == ICMPv6
		verdict, passes := "allow", true
		if from != to {
			egress, ingress := w.side(t, from, to, Egress, proto, port, v6), w.side(t, to, from, Ingress, proto, port, v6)
			switch {
			case egress.Verdict != Allow || ingress.Verdict != Allow:
				verdict = "deny"
			case egress.Filter != nil || ingress.Filter != nil:
				verdict, passes = "redirect", x.passes(egress.Filter) && x.passes(ingress.Filter)
			}
		}
		wrong := verdict != x.Verdict && !(x.OrAllow && verdict == "allow") || verdict == "redirect" && x.L7 != "" && passes != (x.L7 == "allow")
		if wrong {
			t.Errorf("%s -> %s %d/%s: %s, passes %t, want %s %s (%s)", x.From, x.To, port, x.Protocol, verdict, passes, x.Verdict, x.L7, x.Reason)
		}
	}
}

func (w *caseWorld) backends(name string, port uint16) ([]*end, uint16) {
	var found []*end
	for _, s := range w.c.Services {
		if s.Namespace+"/"+s.Name != name {
			continue
		}
		for _, p := range s.Ports {
			if p.RawPort == port && p.RawTarget != 0 {
				port = p.RawTarget
				break
			}
		}
		for _, a := range s.Endpoints {
			found = append(found, w.end("ip:"+a))
		}
		for _, p := range w.c.Pods {
			if len(s.Selector) > 0 && p.Namespace == s.Namespace && !slices.ContainsFunc(slices.Collect(maps.Keys(s.Selector)), func(k string) bool { return p.Labels[k] != s.Selector[k] }) {
				found = append(found, w.ends[p.Namespace+"/"+p.Name])
			}
		}
	}
	return found, port
}

func runCase(t *testing.T, file string) {
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var c caseFile
	if err := yaml.Unmarshal(raw, &c); err != nil {
		t.Fatal(err)
	}
	w := newCaseWorld(&c)
	notYet := w.load(c.Policies)
	for _, v := range c.Validation {
		if v.Policy == "" {
			continue
		}
		e := w.refused[v.Policy]
		if v.OrEnforced && (e == nil || e.NotYet) {
			continue
		}
		if (e == nil) != (v.Valid == nil || *v.Valid) || e != nil && !e.NotYet && !strings.Contains(e.Message, v.Message) {
			t.Errorf("%s: got %v, want %q", v.Policy, e, v.Message)
		}
	}
	now := 0.0
	for _, change := range append(c.Changes, caseChange{At: 1e9}) {
		if notYet == "" {
			w.learn(t, now, change.At)
		}
		for _, x := range c.Expect {
			if x.At >= now && x.At < change.At && notYet == "" {
				w.at = x.At
				w.check(t, x)
			}
		}
		notYet += w.load(change.Add)
		w.unload(t, change.Remove)
		now = change.At
	}
	if notYet != "" {
		t.Logf("not yet: %s", notYet)
	}
}

// TestCases runs the case files of this package.
func TestCases(t *testing.T) { runFolder(t, "testdata/cases") }

// TestCaseFolder runs the case files of a folder that the environment names.
func TestCaseFolder(t *testing.T) {
	if folder := os.Getenv("WEIR_POLICY_CASES"); folder != "" {
		runFolder(t, folder)
	}
}

func runFolder(t *testing.T, folder string) {
	files, err := filepath.Glob(filepath.Join(folder, "*.yaml"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no cases in %s: %v", folder, err)
	}
	for _, f := range files {
		t.Run(strings.TrimSuffix(filepath.Base(f), ".yaml"), func(t *testing.T) { runCase(t, f) })
	}
}
