// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/weirmesh/weir/internal/labelset"
)

// resolve puts documents in force on the pod web in namespace shop.
func resolve(t testing.TB, o Options, s *Subject, d Direction, docs ...string) *Resolved {
	t.Helper()
	var rules []*Rule
	for _, doc := range docs {
		rules = append(rules, parse(t, doc, o).Rules...)
	}
	r, err := Resolve(o, s, d, rules, worldOf{})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func web() *Subject {
	return &Subject{Labels: podLabels("shop", "web"), NamedPorts: []NamedPort{{"http", TCP, 8080}, {"http", UDP, 8081}}}
}

// text writes ranges, such as `TCP 80-90 allow [0]`.
func text(ranges []Range) string {
	words := map[Verdict]string{Allow: "allow", DefaultDeny: "none", Deny: "deny"}
	var all []string
	for _, r := range ranges {
		all = append(all, fmt.Sprintf("%s %d-%d %s %v", protocolName(r.Proto), r.First, r.Last, words[r.Verdict], r.Rules))
	}
	return strings.Join(all, "; ")
}

func TestClass(t *testing.T) {
	cli := &Peer{Labels: podLabels("shop", "cli")}
	host := &Peer{Labels: labelset.Set{"reserved:host"}}
	const all = "0-65535"
	tests := []struct {
		name string
		o    Options
		peer *Peer
		docs []string
		want string
	}{
		{"nothing enforced", Options{}, cli, nil, "ANY 0-65535 allow []"},
		{"never", Options{Enforcement: ModeNever}, cli, []string{in("{}")}, "ANY 0-65535 allow []"},
		{"always", Options{Enforcement: ModeAlways}, cli, nil, ""},
		{"always, host", Options{Enforcement: ModeAlways}, host, nil, "ANY 0-65535 allow [0]"},
		{"an empty entry", Options{}, cli, []string{in("{}")}, ""},
		{"host passes it", Options{}, host, []string{in("{}")}, "ANY 0-65535 allow [1]"},
		{"host needs a rule", Options{LocalhostNeedsRule: true}, host, []string{in("{}")}, ""},
		{"a deny for the host", Options{}, host, []string{inDeny("{fromEntities: [host]}")}, "ANY 0-65535 deny [0]"},
		{"a deny of a port", Options{}, host, []string{inDeny(`{fromEntities: [all], toPorts: [{ports: [{port: "1", protocol: TCP}]}]}`)},
			"ANY 0-65535 allow [1]; TCP 0-0 allow [1]; TCP 1-1 deny [0]; TCP 2-65535 allow [1]"},
		{"all ports of ANY", Options{}, cli, []string{inPort(`{ports: [{port: "0"}]}`)}, "TCP 0-65535 allow [0]; UDP 0-65535 allow [0]; SCTP 0-65535 allow [0]"},
		{"neighbours merge", Options{}, cli, []string{inPort(`{ports: [{port: "80", endPort: 89, protocol: TCP}, {port: "90", protocol: TCP}, {port: "92", protocol: TCP}]}`)},
			"TCP 80-90 allow [0]; TCP 92-92 allow [0]"},
		{"two rules on a range", Options{}, cli, []string{inPort(`{ports: [{port: "80", endPort: 89, protocol: TCP}]}`), strings.Replace(inPort(`{ports: [{port: "85", protocol: TCP}]}`), "name: p", "name: q", 1)},
			"TCP 80-84 allow [0]; TCP 85-85 allow [0 1]; TCP 86-89 allow [0]"},
		{"L3 and a port", Options{}, cli, []string{in(`{fromEndpoints: [{}]}, {toPorts: [{ports: [{port: "80", protocol: TCP}]}]}`)},
			"ANY 0-65535 allow [0]; TCP 0-79 allow [0]; TCP 80-80 allow [0 1]; TCP 81-65535 allow [0]"},
		{"deny beats allow", Options{}, cli, []string{cnp(`{endpointSelector: {}, ingress: [{fromEndpoints: [{}], toPorts: [{ports: [{port: "80", endPort: 82, protocol: TCP}]}]}], ingressDeny: [{toPorts: [{ports: [{port: "81", protocol: TCP}]}]}]}`)},
			"TCP 80-80 allow [0]; TCP 81-81 deny [1]; TCP 82-82 allow [0]"},
		{"named ports of the subject", Options{}, cli, []string{inPort(`{ports: [{port: HTTP}, {port: missing}]}`)}, "TCP 8080-8080 allow [0]; UDP 8081-8081 allow [0]"},
		{"types", Options{}, cli, []string{in(`{icmps: [{fields: [{type: 0}, {type: "8"}, {family: IPv6, type: EchoRequest}]}]}`)},
			"ICMP 0-0 allow [0]; ICMP 8-8 allow [0]; ICMPv6 128-128 allow [0]"},
		{"default deny off", Options{}, cli, []string{cnp(`{endpointSelector: {}, enableDefaultDeny: {ingress: false}, ingress: [{fromEntities: [world]}]}`)}, "ANY 0-65535 allow [1]"},
		{"default deny off, not with the option", Options{AlwaysDefaultDeny: true}, cli, []string{cnp(`{endpointSelector: {}, enableDefaultDeny: {ingress: false}, ingress: [{fromEntities: [world]}]}`)}, ""},
		{"default deny off, always enforced", Options{Enforcement: ModeAlways}, cli, []string{cnp(`{endpointSelector: {}, enableDefaultDeny: {ingress: false}, ingress: [{fromEntities: [world]}]}`)}, ""},
		{"a protocol left to default deny", Options{}, cli, []string{
			cluster("{tier: Admin, priority: 1, subject: {namespaces: {}}, ingress: [{action: Pass, from: [{namespaces: {}}], protocols: [{tcp: {}}]}, {action: Accept, from: [{namespaces: {}}]}]}"), in("{}"),
		}, "ANY 0-65535 allow [1]; TCP 0-65535 none []"},
		{"newer peer", Options{}, cli, []string{
			cluster("{tier: Admin, priority: 1, subject: {namespaces: {}}, ingress: [{action: Accept, from: [{newer: {}}]}, {action: Pass, from: [{newer: {}}], protocols: [{tcp: {}}]}]}"),
		}, "ANY 0-65535 deny [1]"},
		{"KNP entry", Options{}, cli, []string{knp("{ingress: [{}]}")}, "ANY " + all + " allow [0]"},
		{"KNP ports", Options{}, cli, []string{knp("{ingress: [{ports: [{}, {port: 53, endPort: 54, protocol: UDP}, {port: http}]}]}")}, "TCP " + all + " allow [0]; UDP 53-54 allow [0]"},
		{"older kinds", Options{}, cli, []string{
			strings.NewReplacer("AdminNetwork", "BaselineAdminNetwork", "priority: 5, ", "", "name: p", "name: default").Replace(admin("{action: Deny, from: [{namespaces: {}}]}")),
			admin("{action: Allow, from: [{pods: {namespaceSelector: {}, podSelector: {}}}], ports: [{portRange: {protocol: UDP, start: 1, end: 2}}, {namedPort: http}]}"),
		}, "ANY 0-65535 deny [1]; TCP 0-8079 deny [1]; TCP 8080-8080 allow [0]; TCP 8081-65535 deny [1]; UDP 0-0 deny [1]; UDP 1-2 allow [0]; UDP 3-8080 deny [1]; UDP 8081-8081 allow [0]; UDP 8082-65535 deny [1]"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := resolve(t, tt.o, web(), Ingress, tt.docs...)
			if got := text(r.Class(r.Match(tt.peer))); got != tt.want {
				t.Errorf("got  %s\nwant %s\nrules %v", got, tt.want, r.Rules)
			}
		})
	}
}

func TestEnforcement(t *testing.T) {
	init := &Subject{Labels: labelset.Set{"reserved:init"}}
	node := &Subject{Labels: labelset.Set{"k8s:pool=a", "reserved:host"}, Host: true}
	elsewhere := web()
	elsewhere.Labels = slices.DeleteFunc(slices.Clone(elsewhere.Labels), func(l string) bool { return strings.HasPrefix(l, "k8s:io.cilium.k8s.policy.cluster=") })
	elsewhere.Labels = append(elsewhere.Labels, "k8s:io.cilium.k8s.policy.cluster=west")
	slices.Sort(elsewhere.Labels)
	hostPolicy := ccnp("{nodeSelector: {}, ingress: [{fromEntities: [cluster]}]}")
	tests := []struct {
		name      string
		o         Options
		s         *Subject
		d         Direction
		docs      []string
		enforced  bool
		deny      bool
		by        string
		implicits string
	}{
		{"no rule", Options{}, web(), Ingress, []string{out("{}")}, false, false, "[]", ""},
		{"allow", Options{}, web(), Ingress, []string{in("{}")}, true, true, "[CiliumNetworkPolicy shop/p]", "allow-localhost"},
		{"egress", Options{}, web(), Egress, []string{out("{}")}, true, true, "[CiliumNetworkPolicy shop/p]", ""},
		{"deny only", Options{}, web(), Ingress, []string{inDeny("{}")}, true, true, "[CiliumNetworkPolicy shop/p]", "allow-localhost"},
		{"switch off", Options{}, web(), Ingress, []string{cnp("{endpointSelector: {}, enableDefaultDeny: {ingress: false}, ingress: [{}]}")}, true, false, "[]", "default-deny-off"},
		{"switch on without entries", Options{}, web(), Egress, []string{cnp("{endpointSelector: {}, enableDefaultDeny: {egress: true}, ingress: [{}]}")}, false, false, "[]", ""},
		{"KNP without entries", Options{}, web(), Ingress, []string{knp("{}")}, true, true, "[NetworkPolicy shop/p]", "allow-localhost"},
		{"KNP defaults egress off", Options{}, web(), Egress, []string{knp("{egress: []}")}, false, false, "[]", ""},
		{"KNP defaults egress on", Options{}, web(), Egress, []string{knp("{egress: [{}]}")}, true, true, "[NetworkPolicy shop/p]", ""},
		{"KNP egress listed", Options{}, web(), Egress, []string{knp("{policyTypes: [Egress]}")}, true, true, "[NetworkPolicy shop/p]", ""},
		{"cluster policy", Options{}, web(), Egress, []string{clusterOut("{action: Deny, to: [{namespaces: {}}]}")}, true, false, "[]", "default-allow"},
		{"init", Options{}, init, Ingress, nil, true, true, "[reserved:init]", "allow-localhost"},
		{"init, never", Options{Enforcement: ModeNever}, init, Ingress, nil, false, false, "[]", ""},
		{"pod of another cluster", Options{}, elsewhere, Ingress, []string{in("{}")}, false, false, "[]", ""},
		{"pod of another cluster, always", Options{Enforcement: ModeAlways}, elsewhere, Egress, nil, false, false, "[]", ""},
		{"pod of another cluster, which is this one", Options{ClusterName: "west"}, elsewhere, Ingress, []string{in("{}")}, true, true, "[CiliumNetworkPolicy shop/p]", "allow-localhost"},
		{"always", Options{Enforcement: ModeAlways}, web(), Egress, nil, true, true, "[policy-enforcement=always]", ""},
		{"host policy, firewall off", Options{}, node, Ingress, []string{hostPolicy}, false, false, "[]", ""},
		{"host policy", Options{HostFirewall: true}, node, Ingress, []string{hostPolicy}, true, true, "[CiliumClusterwideNetworkPolicy p]", ""},
		{"host without policy, always, firewall off", Options{Enforcement: ModeAlways}, node, Ingress, nil, false, false, "[]", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := resolve(t, tt.o, tt.s, tt.d, tt.docs...)
			var implicits []string
			for _, n := range r.Rules {
				if n.Implicit != "" {
					implicits = append(implicits, n.Implicit)
				}
			}
			if r.Enforced != tt.enforced || r.DefaultDeny != tt.deny || fmt.Sprint(r.EnforcedBy) != tt.by || strings.Join(implicits, ",") != tt.implicits || (r.Key == "") == tt.enforced {
				t.Errorf("got %t, %t, %v, %v, key %q", r.Enforced, r.DefaultDeny, r.EnforcedBy, implicits, r.Key)
			}
		})
	}
}

func TestNeeds(t *testing.T) {
	docs := []string{
		out(`{toCIDRSet: [{cidr: 10.0.0.0/8, except: [10.1.0.0/16]}], toPorts: [{ports: [{port: Web}]}]}`),
		clusterOut("{action: Deny, to: [{networks: [172.16.0.0/12]}]}"),
	}
	tests := []struct {
		o                  Options
		networks, prefixes string
	}{
		{Options{}, "[172.16.0.0/12]", "[10.0.0.0/8 10.1.0.0/16 172.16.0.0/12]"},
		{Options{CIDRMatchesNodes: true}, "[10.0.0.0/8 10.1.0.0/16 172.16.0.0/12]", "[10.0.0.0/8 10.1.0.0/16 172.16.0.0/12]"},
	}
	for _, tt := range tests {
		r := resolve(t, tt.o, web(), Egress, docs...)
		if got := fmt.Sprint(r.Networks()); got != tt.networks {
			t.Errorf("networks %s, want %s", got, tt.networks)
		}
		if got := fmt.Sprint(r.Prefixes()); got != tt.prefixes {
			t.Errorf("prefixes %s, want %s", got, tt.prefixes)
		}
		if got := fmt.Sprint(r.NamedPorts()); got != "[web]" {
			t.Errorf("named ports %s", got)
		}
	}
}

func TestCIDRModes(t *testing.T) {
	item := []cidrItem{{prefix: netip.MustParsePrefix("10.0.0.0/8"), except: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}}}
	inside, hole := []netip.Prefix{item[0].prefix}, []netip.Prefix{item[0].prefix, item[0].except[0]}
	pod, node := podLabels("shop", "web"), labelset.Set{"reserved:remote-node"}
	tests := []struct {
		name string
		term *Term
		peer Peer
		want bool
	}{
		{"pod, default", cidrTerm(Options{}, item), Peer{Labels: pod, Networks: inside}, false},
		{"pod", cidrTerm(Options{CIDRMatchesPods: true}, item), Peer{Labels: pod, Networks: inside}, true},
		{"pod in the hole", cidrTerm(Options{CIDRMatchesPods: true}, item), Peer{Labels: pod, Networks: hole}, false},
		{"pod elsewhere", cidrTerm(Options{CIDRMatchesPods: true}, item), Peer{Labels: pod}, false},
		{"pod, mode nodes", cidrTerm(Options{CIDRMatchesNodes: true}, item), Peer{Labels: pod, Networks: inside}, false},
		{"node", cidrTerm(Options{CIDRMatchesNodes: true}, item), Peer{Labels: node, Networks: inside}, true},
		{"node, mode pods", cidrTerm(Options{CIDRMatchesPods: true}, item), Peer{Labels: node, Networks: inside}, false},
		{"host, networks", networksTerm(item), Peer{Labels: labelset.Set{"reserved:host"}, Networks: inside}, true},
		{"world", cidrTerm(Options{}, []cidrItem{{prefix: netip.MustParsePrefix("0.0.0.0/0")}}), Peer{Labels: labelset.Set{"reserved:world-ipv4"}}, true},
		{"other world", cidrTerm(Options{}, []cidrItem{{prefix: netip.MustParsePrefix("0.0.0.0/0")}}), Peer{Labels: labelset.Set{"reserved:world-ipv6"}}, false},
		{"the only world", cidrTerm(Options{}, []cidrItem{{prefix: netip.MustParsePrefix("::/0")}}), Peer{Labels: labelset.Set{"reserved:world"}}, true},
		{"the only world, with its family", cidrTerm(Options{}, []cidrItem{{prefix: netip.MustParsePrefix("::/0")}}),
			Peer{Labels: labelset.Set{"reserved:world"}, Prefix: netip.MustParsePrefix("0.0.0.0/0")}, false},
		{"the only world is not in a prefix", cidrTerm(Options{}, item), Peer{Labels: labelset.Set{"reserved:world"}}, false},
		{"a narrower prefix", cidrTerm(Options{}, item), Peer{Labels: labelset.Set{"reserved:world"}, Prefix: netip.MustParsePrefix("10.2.3.0/24")}, true},
		{"a wider prefix", cidrTerm(Options{}, item), Peer{Labels: labelset.Set{"reserved:world"}, Prefix: netip.MustParsePrefix("0.0.0.0/1")}, false},
	}
	for _, tt := range tests {
		if tt.term.Matches(&tt.peer) != tt.want {
			t.Errorf("%s: want %t", tt.name, tt.want)
		}
	}
}

// TestLocalNode: a `nodes` peer may mean the subject's own node, which depends on where it runs.
func TestLocalNode(t *testing.T) {
	o := Options{NodeSelectorLabels: true}
	doc := clusterOut("{action: Deny, to: [{nodes: {matchLabels: {pool: a}}}]}")
	host := &Peer{Labels: labelset.Set{"reserved:host"}}
	for pool, want := range map[string]Verdict{"a": Deny, "b": Allow} {
		s := web()
		s.Node = labelset.Set{"k8s:pool=" + pool}
		if got := resolve(t, o, s, Egress, doc).Decide(host, TCP, 80).Verdict; got != want {
			t.Errorf("pool %s: %d, want %d", pool, got, want)
		}
	}
	remote := &Peer{Labels: labelset.Set{"node:pool=a", "reserved:remote-node"}}
	if got := resolve(t, o, web(), Egress, doc).Decide(remote, TCP, 80).Verdict; got != Deny {
		t.Errorf("remote: %d", got)
	}
}

func TestResolvedKey(t *testing.T) {
	doc := in(`{fromEndpoints: [{}], toPorts: [{ports: [{port: http}]}]}`)
	base := resolve(t, Options{}, web(), Ingress, doc)
	other := web()
	other.Labels = podLabels("shop", "db")
	if got := resolve(t, Options{}, other, Ingress, doc); got.Key != base.Key {
		t.Error("another subject with the same rules has another key")
	}
	other.NamedPorts = []NamedPort{{"http", TCP, 9090}}
	for name, r := range map[string]*Resolved{
		"named port": resolve(t, Options{}, other, Ingress, doc),
		"option":     resolve(t, Options{LocalhostNeedsRule: true}, web(), Ingress, doc),
		"uid":        resolve(t, Options{}, web(), Ingress, strings.Replace(doc, "name: p", "name: p, uid: u1", 1)),
		"rule":       resolve(t, Options{}, web(), Ingress, doc, knp("{}")),
	} {
		if r.Key == base.Key {
			t.Errorf("another %s has the same key", name)
		}
	}
}

func TestObject(t *testing.T) {
	doc := `{"apiVersion":"cilium.io/v2","kind":"CiliumNetworkPolicy","metadata":{"name":"p","namespace":"shop","uid":"u","generation":7,"managedFields":[{}]},
		"spec":{"endpointSelector":{},"ingress":[{}],"log":{"value":"why"},"labels":[{"key":"team","value":"a","source":"own"}],"description":"d"},
		"specs":[{"endpointSelector":{},"egressDeny":[{"toServices":[{"k8sService":{"serviceName":"s"}}]}]}],"status":{"conditions":[]}}`
	o := parse(t, doc, Options{})
	if o.Ref != (Ref{"CiliumNetworkPolicy", "shop", "p", "u"}) || o.Generation != 7 || len(o.Rules) != 2 || !o.UsesServices() {
		t.Fatalf("got %+v", o)
	}
	first, second := o.Rules[0].Name(), o.Rules[1].Name()
	labels := []string{
		"k8s:io.cilium.k8s.policy.derived-from=CiliumNetworkPolicy", "k8s:io.cilium.k8s.policy.name=p", "k8s:io.cilium.k8s.policy.namespace=shop",
		"k8s:io.cilium.k8s.policy.uid=u", "own:team=a",
	}
	if first.String() != "CiliumNetworkPolicy shop/p ingress[0]" || first.Log != "why" || !slices.Equal(first.Labels, labels) {
		t.Errorf("got %+v", first)
	}
	if second.String() != "CiliumNetworkPolicy shop/p rule 1 egressDeny[0]" || second.Log != "" {
		t.Errorf("got %+v", second)
	}
	g := parse(t, strings.Replace(group("{externalCIDRs: [10.1.2.3/8, 192.0.2.1, 10.0.0.0/8]}"), "name: g", "name: g, labels: {a: b}", 1), Options{})
	if got := fmt.Sprint(g.CIDRGroup); got != "&{g [cidrgroup:a=b] [10.0.0.0/8 192.0.2.1/32]}" {
		t.Errorf("got %s", got)
	}
	for doc, want := range map[string]string{
		in("{fromGroups: [{aws: {region: x}}]}"):                                                        "spec.ingress[0].fromGroups: no provider of groups is there: it matches nothing",
		cnp(`{endpointSelector: {matchLabels: {"k8s:io.kubernetes.pod.namespace": a}}, ingress: [{}]}`): "spec.endpointSelector: the policy applies in its own namespace shop, not in a",
		ccnp("{nodeSelector: {}, ingress: [{}]}"):                                                       "spec.nodeSelector: the host firewall is off: the policy has no effect",
		knp("{ingress: [{from: [{}]}]}"):                                                                "spec.ingress[0].from[0]: exactly one of ipBlock and selectors must be given: it selects nobody",
	} {
		if got := parse(t, doc, Options{}).Warnings; !slices.Equal(got, []string{want}) {
			t.Errorf("%s\nwarnings %q, want %q", doc, got, want)
		}
	}
	_, err := Parse([]byte(in("{fromEntities: [x]}")), Options{})
	if want := "CiliumNetworkPolicy shop/p: spec.ingress[0].fromEntities[0]: Invalid CiliumNetworkPolicy spec: unsupported entity: x"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

// TestHostIsTracked: with the host firewall on, a node that no policy selects has a policy that allows everything, so that the kernel knows its connections when
// one comes.
func TestHostIsTracked(t *testing.T) {
	host := &Subject{Labels: labelset.Set{"reserved:host"}, Host: true}
	for _, on := range []bool{false, true} {
		for _, d := range []Direction{Ingress, Egress} {
			r, err := Resolve(Options{HostFirewall: on}, host, d, nil, nil)
			if err != nil || r.Enforced != on || r.DefaultDeny {
				t.Fatalf("host firewall %t, direction %d: enforced %t, default deny %t, %v", on, d, r.Enforced, r.DefaultDeny, err)
			}
			if got := r.Decide(&Peer{Labels: labelset.Set{"reserved:world"}}, TCP, 22).Verdict; on && got != Allow {
				t.Errorf("direction %d: verdict %d, want allow", d, got)
			}
		}
	}
}
