// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// addVxlan makes a VXLAN device with a fixed VNI and peer, or one that takes both from each packet when peer is not valid.
func addVxlan(name, text string, vni int, peer netip.Addr) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	mac, err := net.ParseMAC(text)
	if err != nil {
		return err
	}
	attrs.HardwareAddr = mac
	link := &netlink.Vxlan{LinkAttrs: attrs, Port: 8472, FlowBased: true}
	if peer.IsValid() {
		link.FlowBased, link.VxlanId, link.Group = false, vni, peer.AsSlice()
	}
	if err := netlink.LinkAdd(link); err != nil {
		return fmt.Errorf("vxlan %s: %w", name, err)
	}
	return linkUp(name)
}

// overlayWorld is a node with a VXLAN device, and beside it a host that plays another node: one device for each VNI that it sends or gets.
func overlayWorld(t *testing.T, underlay int) (*world, *pod, netip.Addr) {
	w := newWorld(t, func(c *Config) {
		if err := addVxlan("weir_vxlan", macHost, 0, netip.Addr{}); err != nil {
			t.Fatal(err)
		}
		l, err := netlink.LinkByName("weir_vxlan")
		if err != nil {
			t.Fatal(err)
		}
		c.Routing, c.OverlayIfIndex = RoutingVXLAN, uint32(l.Attrs().Index)
		c.NodeIPv4, c.NodeIPv6 = node4, node6
	})
	w.do(w.AttachOverlay("weir_vxlan"))
	a := w.plug("a", epA, idA, podA4, podA6)
	own, other := node4, w.out.v4
	if underlay == 6 {
		own, other = node6, w.out.v6
	}
	w.do(inside(w.out.ns, func() error {
		for name, value := range map[string]string{"net/ipv4/conf/all/rp_filter": "0", "net/ipv4/conf/default/rp_filter": "0"} {
			sysctl(t, name, value)
		}
		for vni, mac := range map[int]string{idA: macHost, idFar: "02:00:00:00:00:77", int(IdentityRemoteNode): macHost} {
			if err := addVxlan(fmt.Sprintf("vx%d", vni), mac, vni, own); err != nil {
				return err
			}
		}
		l, err := netlink.LinkByName(fmt.Sprintf("vx%d", idFar))
		if err != nil {
			return err
		}
		errs := []error{addAddr("lo", far4.String()+"/32"), addAddr("lo", far6.String()+"/128")}
		for _, r := range []struct{ pod, far netip.Addr }{{podA4, far4}, {podA6, far6}} {
			_, dst, err := net.ParseCIDR(netip.PrefixFrom(r.pod, r.pod.BitLen()).String())
			errs = append(errs, err, netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: dst, Src: r.far.AsSlice(), Scope: netlink.SCOPE_LINK}),
				neighbour(l.Attrs().Name, r.pod.String()))
		}
		return errors.Join(errs...)
	}))
	for _, far := range []netip.Addr{far4, far6} {
		w.do(w.IPCache().Upsert(netip.PrefixFrom(far, far.BitLen()), IPCacheEntry{Identity: idFar, NodeAddr: other}))
	}
	w.do(w.IPCache().Upsert(netip.PrefixFrom(other, other.BitLen()), IPCacheEntry{Identity: IdentityRemoteNode}))
	return w, a, other
}

func (w *world) setPolicy(number uint32, rows rows) {
	w.Helper()
	for peer, ranges := range rows {
		w.do(w.Policies().SetPeer(number, peer, ranges))
	}
	w.do(w.Policies().Bump())
}

// waitRecord returns the first record that is wanted.
func (w *world) waitRecord(what string, want func(*Record) bool) Record {
	w.Helper()
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		for _, r := range w.records() {
			if want(&r) {
				return r
			}
		}
	}
	w.Fatalf("no record of %s", what)
	return Record{}
}

// send sends one datagram.
func send(w *world, from *pod, to netip.AddrPort) {
	w.Helper()
	w.do(inside(from.ns, func() error {
		c, err := net.Dial("udp", to.String())
		if err != nil {
			return err
		}
		_, err = c.Write([]byte("datagram"))
		return errors.Join(err, c.Close())
	}))
}

func TestOverlay(t *testing.T) {
	for _, underlay := range []int{4, 6} {
		t.Run(fmt.Sprintf("over IPv%d", underlay), func(t *testing.T) {
			w, a, other := overlayWorld(t, underlay)
			tcpPort := func(port uint16, rule uint32) []PolicyRange {
				return []PolicyRange{allowPort(unix.IPPROTO_TCP, port, rule)}
			}
			w.setPolicy(5, rows{0: nothing, idFar: tcpPort(8080, 1)})
			w.setPolicy(6, rows{0: nothing, idFar: tcpPort(9090, 2)})
			w.do(w.Policies().SetEndpoint(epA, EndpointPolicy{Ingress: 5, Egress: 6}), w.Policies().Bump())
			for _, f := range []struct{ pod, far netip.Addr }{{podA4, far4}, {podA6, far6}} {
				echoServer(w, a, at(f.pod, 8080))
				echoServer(w, w.out, at(f.far, 9090))
				exchange(w, w.out, at(f.pod, 8080), "from another node's pod")
				exchange(w, a, at(f.far, 9090), "to another node's pod")
				r := w.waitRecord("the connection from the other node", func(r *Record) bool {
					return r.Type == RecordVerdict && r.Direction == DirectionIngress && r.SrcAddr() == f.far
				})
				if r.SrcIdentity != idFar || r.Rule != 1 {
					t.Errorf("verdict %+v, want identity %d by rule 1", r, idFar)
				}
				// The identity comes with the packet, also when the node does not know the address.
				w.do(w.IPCache().Delete(netip.PrefixFrom(f.far, f.far.BitLen())))
				send(w, w.out, at(f.pod, 53))
				r = w.waitRecord("a datagram of an unknown address", func(r *Record) bool { return r.Type == RecordDrop && r.Dport == 53 })
				if r.SrcIdentity != idFar || r.Reason != DropPolicy || r.Endpoint != epA {
					t.Errorf("drop %+v, want by policy, of identity %d", r, idFar)
				}
				w.do(w.IPCache().Upsert(netip.PrefixFrom(f.far, f.far.BitLen()), IPCacheEntry{Identity: idFar, NodeAddr: other}))
			}
			// Who is no node is not believed.
			w.do(w.IPCache().Upsert(netip.PrefixFrom(other, other.BitLen()), IPCacheEntry{Identity: IdentityWorldIPv4}))
			send(w, w.out, at(podA4, 54))
			r := w.waitRecord("a datagram of no node", func(r *Record) bool { return r.Type == RecordDrop && r.Dport == 54 })
			if r.Reason != DropInvalidSourceIP {
				t.Errorf("drop %+v, want reason %d", r, DropInvalidSourceIP)
			}
			// Nor is a pod's address that comes past the tunnel.
			w.do(inside(w.out.ns, func() error {
				l, err := netlink.LinkByName("outside")
				if err != nil {
					return err
				}
				_, dst, err := net.ParseCIDR(podA4.String() + "/32")
				if err != nil {
					return err
				}
				return netlink.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: dst, Gw: node4.AsSlice(), Src: far4.AsSlice(), Flags: int(netlink.FLAG_ONLINK)})
			}))
			send(w, w.out, at(podA4, 55))
			r = w.waitRecord("a datagram past the tunnel", func(r *Record) bool { return r.Type == RecordDrop && r.Dport == 55 })
			if r.Reason != DropInvalidSourceIP {
				t.Errorf("drop %+v, want reason %d", r, DropInvalidSourceIP)
			}
		})
	}
}

// The node's processes reach other nodes' pods through the tunnel, as a remote node, and get what these send them.
func TestOverlayHost(t *testing.T) {
	w, _, other := overlayWorld(t, 4)
	host := &pod{name: "node", ns: w.node, v4: node4, v6: node6}
	w.do(addRoute(far4.String()+"/32", "weir_vxlan", ""), neighbour("weir_vxlan", far4.String()))
	// The other node answers through the tunnel as well.
	w.do(inside(w.out.ns, func() error {
		l, err := netlink.LinkByName(fmt.Sprintf("vx%d", idFar))
		if err != nil {
			return err
		}
		rule := netlink.NewRule()
		rule.Family, rule.Priority, rule.Table = netlink.FAMILY_V4, 50, 100
		rule.Src = &net.IPNet{IP: far4.AsSlice(), Mask: net.CIDRMask(32, 32)}
		return errors.Join(netlink.RuleAdd(rule), neighbour(l.Attrs().Name, node4.String()),
			netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Table: 100, Dst: &net.IPNet{IP: node4.AsSlice(), Mask: net.CIDRMask(32, 32)}, Scope: netlink.SCOPE_LINK}))
	}))
	w.setPolicy(3, rows{0: nothing, idFar: {allowPort(unix.IPPROTO_TCP, 9090, 3)}})
	w.setPolicy(4, rows{0: nothing, idFar: {allowPort(unix.IPPROTO_TCP, 7070, 4)}})
	w.do(w.Policies().SetEndpoint(HostEndpoint, EndpointPolicy{Egress: 3, Ingress: 4}), w.Policies().Bump())
	echoServer(w, w.out, at(far4, 9090))
	exchange(w, host, at(far4, 9090), "from the node")
	send(w, host, at(far4, 53))
	r := w.waitRecord("a datagram that host policy refuses", func(r *Record) bool { return r.Type == RecordDrop && r.Dport == 53 })
	if r.Reason != DropPolicy || r.Endpoint != HostEndpoint || r.DstIdentity != idFar {
		t.Errorf("drop %+v, want by policy of the host", r)
	}
	send(w, host, at(other, 53)) // the underlay is the host's own traffic, too
	r = w.waitRecord("a datagram to the other node", func(r *Record) bool { return r.Type == RecordDrop && r.DstAddr() == other })
	if r.Reason != DropPolicy || r.DstIdentity != IdentityRemoteNode {
		t.Errorf("drop %+v, want by policy of the host", r)
	}
}

// What a node forwards to a service's backend on another node goes there by the tunnel, as the node's own; the answers come past it.
func TestOverlayNodePort(t *testing.T) {
	w, _, _ := overlayWorld(t, 4)
	uplink, err := netlink.LinkByName("eth0")
	w.do(err)
	w.do(inside(w.out.ns, func() error {
		// A real node's from_overlay takes packets whatever their MAC; this one's stack does not.
		l, err := netlink.LinkByName(fmt.Sprintf("vx%d", IdentityRemoteNode))
		if err != nil {
			return err
		}
		return errors.Join(netlink.LinkSetHardwareAddr(l, uplink.Attrs().HardwareAddr), owned(far6))
	}))
	id := uint32(0)
	for family, f := range lbFamilies {
		seen := server(w, in(w.out), at(f.far, 8080))
		for network, proto := range networks {
			t.Run(family+" "+network, func(t *testing.T) {
				id++
				w.do(w.Services().Upsert(Service{Frontend: Frontend{f.any, 30080, proto}, Kind: NodePort, ID: id, Backends: backends(at(f.far, 8080))}))
				if _, err := talk(in(w.out), network, at(f.node, 30080)); err != nil {
					t.Fatalf("%v; records %+v", err, w.records())
				}
				if got := <-seen; got.Addr().Unmap() != f.node || got.Port() < 61000 {
					t.Errorf("the backend sees %v, want %v and a claimed port", got, f.node)
				}
				for network == "udp" && len(seen) > 0 {
					<-seen
				}
			})
		}
	}
}
