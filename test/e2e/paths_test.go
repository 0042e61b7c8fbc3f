// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	flowpb "github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/test/e2e/capture"
	"github.com/weirmesh/weir/test/e2e/cluster"
	"github.com/weirmesh/weir/test/e2e/traffic"
)

// serving is a container that answers the tests' traffic.
const serving = `{name: main, image: none, command: [e2e-traffic, serve], readinessProbe: {exec: {command: [e2e-traffic, ready, "7002"]}, periodSeconds: 1}}`

// pathsPods adds to the truth test's pods: services, pods on the hosts' network, a pod that the mesh leaves alone, and hosts outside.
const pathsPods = truthPods + `
---
apiVersion: v1
kind: Service
metadata: {name: near}
spec: {selector: {app: b}, ports: [{name: tcp, port: 80, targetPort: 7002}, {name: udp, port: 80, targetPort: 7002, protocol: UDP}]}
---
apiVersion: v1
kind: Service
metadata: {name: far}
spec: {selector: {app: c}, ports: [{name: tcp, port: 80, targetPort: 7002}, {name: udp, port: 80, targetPort: 7002, protocol: UDP}]}
---
apiVersion: v1
kind: Service
metadata: {name: empty}
spec: {selector: {app: nobody}, ports: [{name: tcp, port: 80}, {name: udp, port: 80, protocol: UDP}]}
---
apiVersion: v1
kind: Pod
metadata: {name: host1}
spec: {nodeName: node1, hostNetwork: true, containers: [` + serving + `]}
---
apiVersion: v1
kind: Pod
metadata: {name: host2}
spec: {nodeName: node2, hostNetwork: true, containers: [` + serving + `]}
---
apiVersion: v1
kind: Pod
metadata: {name: alone, annotations: {weir.dev/unmanaged: "true", weir.dev/ip-addresses: "10.244.1.150,fd00:10:244:1::150"}}
spec: {nodeName: node1, containers: [` + serving + `]}
---
apiVersion: lab.weir.dev/v1
kind: Host
metadata: {name: outside}
spec: {addresses: [203.0.113.10, "2001:db8::10"], containers: [` + serving + `]}
---
apiVersion: lab.weir.dev/v1
kind: Host
metadata: {name: narrow}
spec: {addresses: [203.0.113.20, "2001:db8::20"], containers: [` + serving + `]}
`

// Addresses of the pods and hosts, IPv4 and IPv6.
var pathAddresses = map[string][2]netip.Addr{
	"a": pair("10.244.1.101", "fd00:10:244:1::101"), "b": pair("10.244.1.102", "fd00:10:244:1::102"), "c": pair("10.244.2.103", "fd00:10:244:2::103"),
	"alone": pair("10.244.1.150", "fd00:10:244:1::150"), "host1": pair("172.30.0.11", "fd30::11"), "host2": pair("172.30.0.12", "fd30::12"),
	"outside": pair("203.0.113.10", "2001:db8::10"), "narrow": pair("203.0.113.20", "2001:db8::20"),
}

func pair(v4, v6 string) [2]netip.Addr {
	return [2]netip.Addr{netip.MustParseAddr(v4), netip.MustParseAddr(v6)}
}

// TestPaths uses one lab for every kind of path that a packet can take, but for what the truth test covers.
func TestPaths(t *testing.T) {
	t.Parallel() // with others at the end: it waits more than it works
	lab := cluster.Up(t, pathsPods)
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	for _, test := range []struct {
		name string
		run  func(context.Context, *testing.T, *cluster.Lab)
	}{
		{"services", services}, {"service-without-backends", emptyService},
		{"mtu", mtu}, {"mtu-full", fullPackets},
		{"masquerade", masquerade}, {"from-outside", fromOutside},
		{"host-network", hostNetwork}, {"node", nodeItself}, {"health", health}, {"unmanaged", unmanaged},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(ctx, t, lab.For(t)) })
	}
}

// overlayMTU is what a pod has when nodes are joined by VXLAN over their links' 1,500 bytes, which are IPv6 as well.
const overlayMTU = 1430

// TestOverlay takes the same paths with VXLAN between the nodes; policy at the receiver goes by the identity that the tunnel carries.
func TestOverlay(t *testing.T) {
	t.Parallel() // with others at the end: it waits more than it works
	lab := cluster.Up(t, pathsPods, "--agent-arg=--routing=vxlan")
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	for _, test := range []struct {
		name string
		run  func(context.Context, *testing.T, *cluster.Lab)
	}{
		{"services", services}, {"mtu", overlayPackets}, {"masquerade", masquerade}, {"from-outside", fromOutside}, {"host-network", hostNetwork},
		{"node", nodeItself}, {"unmanaged", unmanaged}, {"policy", overlayPolicy},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(ctx, t, lab.For(t)) })
	}
}

// overlayPackets: what fits into a pod's link passes the tunnel in one piece, and what does not is refused where it is sent.
func overlayPackets(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	want := []traffic.Datagram{{Answered: true}, {Refused: true}}
	outer, err := capture.Start(lab.NodeNetns(ctx, "node1"), "eth0")
	if err != nil {
		t.Fatal(err)
	}
	for _, v6 := range []bool{false, true} {
		for _, c := range []struct{ from, to string }{{"a", "b"}, {"a", "c"}, {"c", "a"}} {
			out, err := lab.Exec(ctx, "default/"+c.from, "e2e-traffic", "path-mtu", pathAddresses[c.to][index(v6)].String(), fmt.Sprint(overlayMTU), fmt.Sprint(overlayMTU+1))
			var saw []traffic.Datagram
			if err == nil {
				err = json.Unmarshal([]byte(out), &saw)
			}
			if err != nil || !reflect.DeepEqual(saw, want) {
				t.Errorf("IPv6 %t, %s to %s: %s (%v), want %+v", v6, c.from, c.to, out, err, want)
			}
		}
	}
	conns, _, err := outer.Stop()
	if err != nil {
		t.Fatal(err)
	}
	tunnelled := false
	for _, c := range conns {
		tunnelled = tunnelled || c.Source.Port() == 8472 || c.Destination.Port() == 8472
		for _, a := range []string{"a", "c"} {
			if c.Source.Addr() == pathAddresses[a][0] || c.Source.Addr() == pathAddresses[a][1] {
				t.Errorf("a packet of %s is on the nodes' link by itself: %v", a, c.Key)
			}
		}
	}
	if !tunnelled {
		t.Error("no packet of the tunnel is on the nodes' link")
	}
}

// overlayPolicy: a may reach c, b may not.
func overlayPolicy(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	lab.Apply(ctx, cnp("only-a", "{endpointSelector: {matchLabels: {app: c}}, ingress: [{fromEndpoints: [{matchLabels: {app: a}}]}]}"))
	lab.InForce(ctx, "default/only-a")
	for _, v6 := range []bool{false, true} {
		to := netip.AddrPortFrom(pathAddresses["c"][index(v6)], traffic.WhoPort)
		if a, err := lab.Ask(ctx, "default/a", "tcp", to, 10*time.Second); err != nil || a.Server != "c" {
			t.Errorf("a to %s: %q answers, %v", to, a.Server, err)
		}
		if a, err := lab.Ask(ctx, "default/b", "tcp", to, 700*time.Millisecond); err == nil {
			t.Errorf("b to %s: %q answers, want a refusal", to, a.Server)
		}
	}
}

// tupleOf matches flows of one connection, either direction, by the ports and addresses of whom it began and whom it went to.
func tupleOf(client, server netip.AddrPort) func(*flowpb.Flow) bool {
	return func(f *flowpb.Flow) bool {
		_, src, dst, err := tuple(f)
		if err != nil {
			return false
		}
		if f.GetIsReply().GetValue() {
			src, dst = dst, src
		}
		return src == client && dst == server
	}
}

// ends says what a flow's ends must show: identity and pod.
func ends(f *flowpb.Flow, source, destination uint32) bool {
	return f.GetSource().GetIdentity() == source && f.GetDestination().GetIdentity() == destination
}

func hasLabel(e *flowpb.Endpoint, label string) bool {
	for _, l := range e.GetLabels() {
		if l == label {
			return true
		}
	}
	return false
}

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }

// ask asks and fails the test when there is no answer.
func ask(ctx context.Context, t *testing.T, lab *cluster.Lab, from, network string, to netip.AddrPort) traffic.Asked {
	t.Helper()
	saw, err := lab.Ask(ctx, from, network, to, 10*time.Second)
	if err != nil {
		t.Fatalf("%s asks %s over %s: %v", from, to, network, err)
	}
	return saw
}

// vip is the service's address of the family.
func vip(ctx context.Context, t *testing.T, lab *cluster.Lab, service string, v6 bool) netip.AddrPort {
	t.Helper()
	for _, s := range lab.State(ctx).Services {
		for _, text := range s.ClusterIps {
			if a, err := netip.ParseAddr(text); err == nil && s.Name == service && a.Is6() == v6 {
				return netip.AddrPortFrom(a, 80)
			}
		}
	}
	t.Fatalf("service %s has no such address (IPv6: %t)", service, v6)
	return netip.AddrPort{}
}

func index(v6 bool) int {
	if v6 {
		return 1
	}
	return 0
}

// services: what a client sees of a service is the service's address, whatever socket it uses and wherever the backend is, and the
// flows name the service.
func services(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	var wanted []cluster.Wanted
	for service, backend := range map[string]string{"near": "b", "far": "c"} {
		for _, network := range []string{"tcp", "udp", "udp-unconnected"} {
			for _, family := range []string{"4", "6", "-mapped"} {
				v6 := family == "6"
				to, name := vip(ctx, t, lab, service, v6), fmt.Sprintf("%s%s to %s", network, family, service)
				sent := network
				seen := to
				if family == "-mapped" {
					sent += family
					seen = netip.AddrPortFrom(netip.AddrFrom16(to.Addr().As16()), to.Port())
				}
				saw := ask(ctx, t, lab, "default/a", sent, to)
				if saw.Server != backend {
					t.Errorf("%s: %s answered, want %s", name, saw.Server, backend)
				}
				if network != "udp-unconnected" && saw.Peer != seen {
					t.Errorf("%s: getpeername is %s, want %s", name, saw.Peer, seen)
				}
				if network != "tcp" && saw.Source != seen {
					t.Errorf("%s: the answer is from %s, want %s", name, saw.Source, seen)
				}
				client := netip.AddrPortFrom(pathAddresses["a"][index(v6)], saw.Local.Port())
				if saw.Client != client {
					t.Errorf("%s: the backend sees %s, want %s", name, saw.Client, client)
				}
				server := netip.AddrPortFrom(pathAddresses[backend][index(v6)], traffic.WhoPort)
				wanted = append(wanted, serviceFlows(name, service, client, server, to, network)...)
			}
		}
	}
	lab.Expect(ctx, wanted...)
}

// serviceFlows are those of one connection to a service, at the client's pod.
func serviceFlows(name, service string, client, server, vip netip.AddrPort, network string) []cluster.Wanted {
	same := tupleOf(client, server)
	egress := func(f *flowpb.Flow) bool {
		return same(f) && f.NodeName == "default/node1" && f.Type == flowpb.FlowType_L3_L4
	}
	wanted := []cluster.Wanted{
		{What: name + ": request with destination_service", Match: func(f *flowpb.Flow) bool {
			return egress(f) && !f.GetIsReply().GetValue() && f.GetDestinationService().GetName() == service && f.GetDestinationService().GetNamespace() == "default"
		}},
		{What: name + ": answer with source_service", Match: func(f *flowpb.Flow) bool {
			return egress(f) && f.GetIsReply().GetValue() && f.GetSourceService().GetName() == service
		}},
	}
	for _, x := range []struct {
		verdict flowpb.Verdict
		to      netip.AddrPort
	}{{flowpb.Verdict_TRACED, vip}, {flowpb.Verdict_TRANSLATED, server}} {
		wanted = append(wanted, cluster.Wanted{What: name + ": translation, " + x.verdict.String(), Match: func(f *flowpb.Flow) bool {
			if f.Type != flowpb.FlowType_SOCK || f.Verdict != x.verdict || f.GetDestinationService().GetName() != service {
				return false
			}
			_, src, dst, err := tuple(f)
			// A UDP socket has no port of its own yet when it is translated.
			return err == nil && dst == x.to && src.Addr() == client.Addr() && (network != "tcp" || src == client)
		}})
	}
	return wanted
}

// emptyService: nobody waits for a service without backends, and the flows say why.
func emptyService(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	var wanted []cluster.Wanted
	for _, v6 := range []bool{false, true} {
		for _, network := range []string{"tcp", "udp"} {
			to := vip(ctx, t, lab, "empty", v6)
			if saw, err := lab.Ask(ctx, "default/a", network, to, 10*time.Second); err == nil {
				t.Errorf("%s to %s: %s answered", network, to, saw.Server)
			} else if !strings.Contains(err.Error(), "connection refused") {
				t.Errorf("%s to %s: %v, want connection refused", network, to, err)
			}
			wanted = append(wanted, cluster.Wanted{What: fmt.Sprintf("%s to %s: dropped for want of a backend", network, to), Match: func(f *flowpb.Flow) bool {
				p, src, dst, err := tuple(f)
				return err == nil && src.Addr() == pathAddresses["a"][index(v6)] && dst == to && (p == 6) == (network == "tcp") && f.Verdict == flowpb.Verdict_DROPPED &&
					f.DropReasonDesc == flowpb.DropReason_SERVICE_BACKEND_NOT_FOUND && f.GetDestinationService().GetName() == "empty" && f.GetSource().GetPodName() == "a"
			}})
		}
	}
	lab.Expect(ctx, wanted...)
}

// hostNetwork: pods on the nodes' network are their nodes: identity host on the node itself, remote-node on others.
func hostNetwork(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	const host, remote = 1, 6
	identities := identitiesOf(ctx, t, lab)
	var wanted []cluster.Wanted
	for _, v6 := range []bool{false, true} {
		for _, network := range []string{"tcp", "udp"} {
			for _, c := range []struct {
				from, to string
				identity uint32 // of the one that is a node, seen where the other is
				at       string
			}{
				{"a", "host1", host, "node1"}, {"a", "host2", remote, "node1"}, {"host1", "a", host, "node1"}, {"host2", "a", remote, "node1"},
				{"host1", "c", remote, "node2"}, {"c", "host1", remote, "node2"},
			} {
				name := fmt.Sprintf("%s, IPv6 %t: %s to %s", network, v6, c.from, c.to)
				to := netip.AddrPortFrom(pathAddresses[c.to][index(v6)], traffic.WhoPort)
				saw := ask(ctx, t, lab, "default/"+c.from, network, to)
				client := netip.AddrPortFrom(pathAddresses[c.from][index(v6)], saw.Local.Port())
				if saw.Client != client {
					t.Errorf("%s: the server sees %s, want %s", name, saw.Client, client)
				}
				source, destination := c.identity, identities[c.to]
				label := "reserved:host"
				if c.identity == remote {
					label = "reserved:remote-node"
				}
				node := (*flowpb.Flow).GetSource
				if strings.HasPrefix(c.to, "host") {
					source, destination = identities[c.from], c.identity
					node = (*flowpb.Flow).GetDestination
				}
				same := tupleOf(client, to)
				wanted = append(wanted, cluster.Wanted{What: name, Match: func(f *flowpb.Flow) bool {
					return same(f) && !f.GetIsReply().GetValue() && f.NodeName == "default/"+c.at && ends(f, source, destination) && hasLabel(node(f), label)
				}}, cluster.Wanted{What: name + ": answer", Match: func(f *flowpb.Flow) bool {
					return same(f) && f.GetIsReply().GetValue() && f.NodeName == "default/"+c.at && ends(f, destination, source)
				}})
			}
			// Services are for them too.
			if saw := ask(ctx, t, lab, "default/host1", network, vip(ctx, t, lab, "far", v6)); saw.Server != "c" || saw.Peer != vip(ctx, t, lab, "far", v6) {
				t.Errorf("%s, IPv6 %t: host1 to service far: %+v", network, v6, saw)
			}
		}
	}
	lab.Expect(ctx, wanted...)
}

// unmanaged: a pod that the mesh leaves alone talks to all, and is known by its address.
func unmanaged(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	const unmanagedIdentity = 3
	identities := identitiesOf(ctx, t, lab)
	var wanted []cluster.Wanted
	for _, v6 := range []bool{false, true} {
		for _, c := range []struct{ from, to, at string }{
			{"alone", "a", "node1"}, {"alone", "c", "node2"}, {"a", "alone", "node1"}, {"c", "alone", "node2"},
		} {
			for _, network := range []string{"tcp", "udp"} {
				name := fmt.Sprintf("%s, IPv6 %t: %s to %s", network, v6, c.from, c.to)
				to := netip.AddrPortFrom(pathAddresses[c.to][index(v6)], traffic.WhoPort)
				saw := ask(ctx, t, lab, "default/"+c.from, network, to)
				client := netip.AddrPortFrom(pathAddresses[c.from][index(v6)], saw.Local.Port())
				if saw.Server != c.to || saw.Client != client {
					t.Errorf("%s: %s sees %s, want %s", name, saw.Server, saw.Client, client)
				}
				source, destination, end := uint32(unmanagedIdentity), identities[c.to], (*flowpb.Flow).GetSource
				if c.to == "alone" {
					source, destination, end = identities[c.from], unmanagedIdentity, (*flowpb.Flow).GetDestination
				}
				same := tupleOf(client, to)
				wanted = append(wanted, cluster.Wanted{What: name, Match: func(f *flowpb.Flow) bool {
					return same(f) && !f.GetIsReply().GetValue() && f.NodeName == "default/"+c.at && ends(f, source, destination) && hasLabel(end(f), "reserved:unmanaged")
				}})
			}
		}
		if _, err := lab.Exec(ctx, "default/alone", "e2e-traffic", "ping", pathAddresses["c"][index(v6)].String()); err != nil {
			t.Error(err)
		}
	}
	lab.Expect(ctx, wanted...)
}
