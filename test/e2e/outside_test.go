// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	flowpb "github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/test/e2e/capture"
	"github.com/weirmesh/weir/test/e2e/cluster"
	"github.com/weirmesh/weir/test/e2e/traffic"
)

const narrowMTU = 1300

// mtu: a node whose route to somebody is narrower than the pods' links says so to the pods, which then send less at a time.
func mtu(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	var wanted []cluster.Wanted
	for _, v6 := range []bool{false, true} {
		for _, c := range []struct {
			where, to string
			via       string // the node behind which it is; empty = on the link
		}{{"to an outside host", "narrow", ""}, {"to the other node", "c", "host2"}} {
			to := pathAddresses[c.to][index(v6)]
			name := fmt.Sprintf("IPv6 %t, %s", v6, c.where)
			var gateway netip.Addr
			if c.via != "" {
				gateway = pathAddresses[c.via][index(v6)]
			}
			narrow(t, lab.NodeNetns(ctx, "node1"), to, gateway)
			// The pods learn from messages about packets of their own: each only once, so TCP and UDP begin on pods of their own.
			if _, err := lab.Exec(ctx, "default/a", "e2e-traffic", "transfer", to.String(), "200000"); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			typ, code := uint8(3), uint8(4)
			if v6 {
				typ, code = 2, 0
			}
			want := []traffic.Datagram{{Answered: true}, {TooBig: true, Type: typ, Code: code, MTU: narrowMTU}, {Refused: true}, {Answered: true}}
			out, err := lab.Exec(ctx, "default/b", "e2e-traffic", "path-mtu", to.String(), fmt.Sprint(narrowMTU), "1500", fmt.Sprint(narrowMTU+1), fmt.Sprint(narrowMTU))
			var saw []traffic.Datagram
			if err != nil {
				t.Errorf("%s: %v: saw %s", name, err, out)
			} else if err := json.Unmarshal([]byte(out), &saw); err != nil || !reflect.DeepEqual(saw, want) {
				t.Errorf("%s: datagrams: %s (%v), want %+v", name, out, err, want)
			}
			for _, pod := range []string{"a", "b"} {
				wanted = append(wanted, cluster.Wanted{What: name + ": too-big to " + pod, Match: func(f *flowpb.Flow) bool {
					_, src, dst, err := tuple(f)
					if err != nil || dst.Addr() != pathAddresses[pod][index(v6)] || src.Addr() == to || f.TraceReason != flowpb.TraceReason_RELATED || f.GetDestination().GetPodName() != pod {
						return false
					}
					if v6 {
						return f.GetL4().GetICMPv6().GetType() == uint32(typ) && f.GetL4().GetICMPv6().GetCode() == uint32(code)
					}
					return f.GetL4().GetICMPv4().GetType() == uint32(typ) && f.GetL4().GetICMPv4().GetCode() == uint32(code)
				}})
			}
		}
	}
	lab.Expect(ctx, wanted...)
}

// narrow gives a node a route of a small MTU to one address, until the test's end.
func narrow(t *testing.T, nsPath string, to, gateway netip.Addr) {
	t.Helper()
	ns, err := netns.GetFromPath(nsPath)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns)
	if err != nil {
		t.Fatal(err)
	}
	link, err := h.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	// A metric of its own: it goes before the lab's own route for the address, which stays as it is.
	route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: &net.IPNet{IP: to.AsSlice(), Mask: net.CIDRMask(to.BitLen(), to.BitLen())}, MTU: narrowMTU, Priority: 1}
	if gateway.IsValid() {
		route.Gw = gateway.AsSlice()
	} else if to.Is4() {
		route.Scope = netlink.SCOPE_LINK
		// The lab's route has metric 0, the best there is: take its place instead.
		route.Priority = 0
	}
	if err := h.RouteReplace(route); err != nil {
		t.Fatalf("route to %s: %v", to, err)
	}
	t.Cleanup(func() {
		defer h.Close()
		wide := *route
		wide.MTU = 0
		if gateway.IsValid() || to.Is6() {
			err = h.RouteDel(route)
		} else {
			err = h.RouteReplace(&wide)
		}
		if err != nil {
			t.Errorf("route to %s: %v", to, err)
		}
	})
}

// fullPackets: packets as large as the fabric takes pass uncut between pods, on one node and across.
func fullPackets(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	want := []traffic.Datagram{{Answered: true}, {Refused: true}}
	for _, v6 := range []bool{false, true} {
		// Not a, b to c, whose paths the test before made narrow.
		for _, c := range []struct{ from, to string }{{"a", "b"}, {"c", "a"}, {"a", "outside"}} {
			out, err := lab.Exec(ctx, "default/"+c.from, "e2e-traffic", "path-mtu", pathAddresses[c.to][index(v6)].String(), "1500", "1501")
			var saw []traffic.Datagram
			if err == nil {
				err = json.Unmarshal([]byte(out), &saw)
			}
			if err != nil || !reflect.DeepEqual(saw, want) {
				t.Errorf("IPv6 %t, %s to %s: %s (%v), want %+v", v6, c.from, c.to, out, err, want)
			}
		}
	}
}

// masquerade: an outside host sees the node's address, and the flow tells that it was put in.
func masquerade(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	seen, err := capture.Start(lab.HostNetns(ctx, "outside"), "eth0")
	if err != nil {
		t.Fatal(err)
	}
	var wanted []cluster.Wanted
	for _, v6 := range []bool{false, true} {
		for pod, node := range map[string]string{"a": "host1", "c": "host2"} {
			self, as, outside := pathAddresses[pod][index(v6)], pathAddresses[node][index(v6)], pathAddresses["outside"][index(v6)]
			world := uint32(9)
			if v6 {
				world = 10
			}
			for _, network := range []string{"tcp", "udp", "udp-unconnected"} {
				name := fmt.Sprintf("%s, IPv6 %t, %s to outside", network, v6, pod)
				to := netip.AddrPortFrom(outside, traffic.WhoPort)
				saw := ask(ctx, t, lab, "default/"+pod, network, to)
				if saw.Client.Addr() != as {
					t.Errorf("%s: the host sees %s, want %s", name, saw.Client, as)
				}
				same := tupleOf(netip.AddrPortFrom(self, saw.Local.Port()), to)
				wanted = append(wanted, cluster.Wanted{What: name, Match: func(f *flowpb.Flow) bool {
					return same(f) && !f.GetIsReply().GetValue() && f.GetIP().GetSourceXlated() == as.String() && f.GetDestination().GetIdentity() == world &&
						f.TraceObservationPoint == flowpb.TraceObservationPoint_TO_NETWORK && f.GetSource().GetPodName() == pod
				}}, cluster.Wanted{What: name + ": answer", Match: func(f *flowpb.Flow) bool {
					return same(f) && f.GetIsReply().GetValue() && f.GetSource().GetIdentity() == world && f.TraceObservationPoint == flowpb.TraceObservationPoint_TO_ENDPOINT
				}})
			}
			if _, err := lab.Exec(ctx, "default/"+pod, "e2e-traffic", "ping", outside.String()); err != nil {
				t.Errorf("IPv6 %t: %v", v6, err)
			}
			wanted = append(wanted, cluster.Wanted{What: fmt.Sprintf("IPv6 %t, %s: echo", v6, pod), Match: func(f *flowpb.Flow) bool {
				p, src, dst, err := tuple(f)
				return err == nil && (p == 1 || p == 58) && src.Addr() == self && dst.Addr() == outside && f.GetIP().GetSourceXlated() == as.String()
			}})
		}
	}
	lab.Expect(ctx, wanted...)
	conns, _, err := seen.Stop()
	if err != nil {
		t.Fatal(err)
	}
	echoes := map[netip.Addr]bool{}
	for _, c := range conns {
		if c.Proto == 1 || c.Proto == 58 {
			echoes[c.Source.Addr()] = true
		}
		for _, pod := range []string{"a", "c"} {
			for _, a := range pathAddresses[pod] {
				if c.Source.Addr() == a || c.Destination.Addr() == a {
					t.Errorf("the outside host saw a pod's address: %s to %s", c.Source, c.Destination)
				}
			}
		}
	}
	for _, node := range []string{"host1", "host2"} {
		for _, a := range pathAddresses[node] {
			if !echoes[a] {
				t.Errorf("the outside host saw no echo of %s; it saw those of %v", a, echoes)
			}
		}
	}
}

// fromOutside: who comes from outside keeps its address.
func fromOutside(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	identities := identitiesOf(ctx, t, lab)
	var wanted []cluster.Wanted
	for _, v6 := range []bool{false, true} {
		for _, pod := range []string{"a", "c"} {
			world := uint32(9)
			if v6 {
				world = 10
			}
			for _, network := range []string{"tcp", "udp"} {
				name := fmt.Sprintf("%s, IPv6 %t, outside to %s", network, v6, pod)
				to := netip.AddrPortFrom(pathAddresses[pod][index(v6)], traffic.WhoPort)
				saw := ask(ctx, t, lab, "host/outside", network, to)
				client := netip.AddrPortFrom(pathAddresses["outside"][index(v6)], saw.Local.Port())
				if saw.Client != client {
					t.Errorf("%s: the pod sees %s, want %s", name, saw.Client, client)
				}
				same := tupleOf(client, to)
				wanted = append(wanted, cluster.Wanted{What: name, Match: func(f *flowpb.Flow) bool {
					return same(f) && !f.GetIsReply().GetValue() && ends(f, world, identities[pod]) && f.GetIP().GetSourceXlated() == ""
				}}, cluster.Wanted{What: name + ": answer", Match: func(f *flowpb.Flow) bool {
					return same(f) && f.GetIsReply().GetValue() && ends(f, identities[pod], world) && f.GetIP().GetSourceXlated() == ""
				}})
			}
			if _, err := lab.Exec(ctx, "host/outside", "e2e-traffic", "ping", pathAddresses[pod][index(v6)].String()); err != nil {
				t.Errorf("IPv6 %t: %v", v6, err)
			}
		}
	}
	lab.Expect(ctx, wanted...)
}

// nodeItself: a process of the node, in no pod, reaches pods; it is the host, or a remote node.
func nodeItself(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	var wanted []cluster.Wanted
	for node, address := range map[string]string{"node1": "host1", "node2": "host2"} {
		for _, v6 := range []bool{false, true} {
			to := netip.AddrPortFrom(pathAddresses["a"][index(v6)], traffic.WhoPort)
			conn, err := lab.Dial(ctx, lab.NodeNetns(ctx, node), "tcp", to.String())
			if err != nil {
				t.Errorf("%s to a, IPv6 %t: %v", node, v6, err)
				continue
			}
			local := conn.LocalAddr().(*net.TCPAddr).AddrPort()
			conn.Close()
			if unmap(local).Addr() != pathAddresses[address][index(v6)] {
				t.Errorf("%s speaks to a pod from %s, want %s", node, local, pathAddresses[address][index(v6)])
			}
			identity := uint32(1)
			if node == "node2" {
				identity = 6
			}
			same := tupleOf(unmap(local), to)
			wanted = append(wanted, cluster.Wanted{What: fmt.Sprintf("%s to a, IPv6 %t", node, v6), Match: func(f *flowpb.Flow) bool {
				return same(f) && !f.GetIsReply().GetValue() && f.NodeName == "default/node1" && f.GetSource().GetIdentity() == identity && f.GetDestination().GetPodName() == "a"
			}})
		}
	}
	lab.Expect(ctx, wanted...)
}

// health: pods reach the health endpoints of both nodes, by HTTP and echo, and see them as such.
func health(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	var wanted []cluster.Wanted
	endpoints := 0
	for _, e := range endpointList(t, lab) {
		if e.UID != "health" {
			continue
		}
		endpoints++
		for _, address := range e.Addresses {
			netnsOfA := lab.Netns(ctx, "default", "a")
			var local netip.AddrPort
			client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				conn, err := lab.Dial(ctx, netnsOfA, network, addr)
				if err == nil {
					local = unmap(conn.LocalAddr().(*net.TCPAddr).AddrPort())
				}
				return conn, err
			}}}
			server := netip.AddrPortFrom(address, 4240)
			resp, err := client.Get("http://" + server.String() + "/healthz")
			if err != nil {
				t.Errorf("health of %s: %v", e.Node, err)
				continue
			}
			resp.Body.Close()
			if resp.StatusCode != http.StatusOK {
				t.Errorf("health of %s: %s", e.Node, resp.Status)
			}
			if _, err := lab.Exec(ctx, "default/a", "e2e-traffic", "ping", address.String()); err != nil {
				t.Error(err)
			}
			same := tupleOf(local, server)
			for _, at := range []string{"node1", e.Node} {
				wanted = append(wanted, cluster.Wanted{What: fmt.Sprintf("a to health of %s, %s, at %s", e.Node, address, at), Match: func(f *flowpb.Flow) bool {
					return same(f) && !f.GetIsReply().GetValue() && f.NodeName == "default/"+at && f.GetDestination().GetIdentity() == 4 && hasLabel(f.GetDestination(), "reserved:health") &&
						f.GetSource().GetPodName() == "a"
				}})
			}
		}
	}
	if endpoints != 2 {
		t.Errorf("%d health endpoints, want one a node", endpoints)
	}
	lab.Expect(ctx, wanted...)
}

// endpointLine is one of `weir endpoint list -o json`.
type endpointLine struct {
	Node      string       `json:"node"`
	UID       string       `json:"uid"`
	Pod       string       `json:"pod_name"`
	Namespace string       `json:"namespace"`
	Identity  uint32       `json:"identity"`
	State     string       `json:"state"`
	Addresses []netip.Addr `json:"addresses"`
}

func endpointList(t *testing.T, lab *cluster.Lab) []endpointLine {
	t.Helper()
	out, err := lab.Weir("endpoint", "list", "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	var list []endpointLine
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatalf("weir endpoint list: %v in %s", err, out)
	}
	return list
}

// identitiesOf are the identities of the mesh's pods, by name.
func identitiesOf(_ context.Context, t *testing.T, lab *cluster.Lab) map[string]uint32 {
	t.Helper()
	identities := map[string]uint32{}
	for _, e := range endpointList(t, lab) {
		identities[e.Pod] = e.Identity
	}
	return identities
}
