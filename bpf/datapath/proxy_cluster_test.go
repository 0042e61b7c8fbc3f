// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// cluster is two nodes on one wire, with a pod on each.
type cluster struct {
	one, two *world
	a, b     *pod // on one, on two
}

// remote is the pod of the second node.
var remote4, remote6 = far4, far6

func nodeAddr(n int) (netip.Addr, netip.Addr) {
	return netip.MustParseAddr(fmt.Sprintf("172.30.0.1%d", n)), netip.MustParseAddr(fmt.Sprintf("fd30::1%d", n))
}

func newCluster(t *testing.T, routing Routing) *cluster {
	t.Helper()
	node := func(n int) *world {
		return newNode(t, n, func(c *Config) {
			c.NodeIPv4, c.NodeIPv6 = nodeAddr(n)
			if routing != RoutingVXLAN {
				return
			}
			if err := addVxlan("weir_vxlan", "02:00:00:00:00:02", 0, netip.Addr{}); err != nil {
				t.Fatal(err)
			}
			l, err := netlink.LinkByName("weir_vxlan")
			if err := errors.Join(err, netlink.LinkSetARPOff(l)); err != nil {
				t.Fatal(err)
			}
			c.Routing, c.OverlayIfIndex = RoutingVXLAN, uint32(l.Attrs().Index)
		})
	}
	c := &cluster{one: node(1)}
	c.two = node(2) // the thread is there now
	c.wire()
	c.a = c.one.plug("a", epA, idA, podA4, podA6)
	c.b = c.two.plug("b", epB, idFar, remote4, remote6)
	if routing == RoutingVXLAN {
		c.shrink()
	}
	for n, w := range []*world{c.one, c.two} {
		other := []*pod{c.b, c.a}[n]
		identity := []uint32{idFar, idA}[n]
		own4, own6 := nodeAddr(n + 1)
		peer4, peer6 := nodeAddr(2 - n)
		for _, x := range []struct{ pod, own, peer netip.Addr }{{other.v4, own4, peer4}, {other.v6, own6, peer6}} {
			w.do(w.IPCache().Upsert(netip.PrefixFrom(x.pod, x.pod.BitLen()), IPCacheEntry{Identity: identity, NodeAddr: x.peer}))
			w.do(w.IPCache().Upsert(netip.PrefixFrom(x.own, x.own.BitLen()), IPCacheEntry{Identity: IdentityHost}))
			w.do(w.IPCache().Upsert(netip.PrefixFrom(x.peer, x.peer.BitLen()), IPCacheEntry{Identity: IdentityRemoteNode}))
		}
		w.do(inside(w.node, func() error {
			cidrs := []string{fmt.Sprintf("10.244.%d.0/24", 2-n), fmt.Sprintf("fd00:10:244:%d::/64", 2-n)}
			if routing == RoutingVXLAN {
				return errors.Join(w.AttachOverlay("weir_vxlan"), addRoute(cidrs[0], "weir_vxlan", ""), addRoute(cidrs[1], "weir_vxlan", ""))
			}
			return errors.Join(addRoute(cidrs[0], "eth0", peer4.String()), addRoute(cidrs[1], "eth0", peer6.String()))
		}))
	}
	return c
}

// shrink makes room for the tunnel's headers.
func (c *cluster) shrink() {
	mtu := func(name string) error {
		l, err := netlink.LinkByName(name)
		return errors.Join(err, netlink.LinkSetMTU(l, 1430))
	}
	for _, p := range []*pod{c.a, c.b} {
		c.one.do(inside(p.ns, func() error { return mtu("eth0") }))
	}
	for _, w := range []*world{c.one, c.two} {
		w.do(inside(w.node, func() error { return errors.Join(mtu("weir_host"), mtu("weir_net"), mtu("weir_vxlan")) }))
	}
}

// wire joins the nodes' uplinks.
func (c *cluster) wire() {
	w := c.two
	w.do(addPair("eth0", "peer"))
	l, err := netlink.LinkByName("peer")
	w.do(err, netlink.LinkSetNsFd(l, int(c.one.node)))
	w.do(inside(c.one.node, func() error {
		l, err := netlink.LinkByName("peer")
		return errors.Join(err, netlink.LinkSetName(l, "eth0"))
	}))
	for n, w := range []*world{c.one, c.two} {
		v4, v6 := nodeAddr(n + 1)
		w.do(inside(w.node, func() error {
			return errors.Join(addAddr("eth0", v4.String()+"/24"), addAddr("eth0", v6.String()+"/64"), linkUp("eth0"))
		}))
	}
	for _, w := range []*world{c.one, c.two} {
		w.do(inside(w.node, func() error { return errors.Join(running("eth0"), w.AttachUplink("eth0")) }))
	}
}

// Across two nodes a connection passes the client's slot on its node and the server's on the other; source and destination are kept, and both
// endpoints count what went.
func TestProxyAcrossNodes(t *testing.T) {
	for _, routing := range []Routing{RoutingNative, RoutingVXLAN} {
		c := newCluster(t, routing)
		one, two := newProxy(c.one), newProxy(c.two)
		one.listen(5, MarkEgressPassed)
		two.listen(6, MarkIngressPassed)
		c.one.setPolicy(5, rows{idFar: {redirectPort(unix.IPPROTO_TCP, 8080, 5, 1)}})
		c.two.setPolicy(6, rows{idA: {redirectPort(unix.IPPROTO_TCP, 8080, 6, 1)}})
		for _, f := range []struct {
			name         string
			client, serv netip.Addr
		}{{"IPv4", podA4, remote4}, {"IPv6", podA6, remote6}} {
			to := at(f.serv, 8080)
			seen := server(c.two, in(c.b), to)
			for _, x := range []struct {
				name            string
				egress, ingress uint32
			}{{"egress", 5, 0}, {"ingress", 0, 6}, {"both", 5, 6}} {
				t.Run(fmt.Sprintf("%v %s %s", routing, f.name, x.name), func(t *testing.T) {
					c.settled()
					c.one.do(c.one.Policies().SetEndpoint(epA, EndpointPolicy{Egress: x.egress}), c.one.Policies().Bump())
					c.two.do(c.two.Policies().SetEndpoint(epB, EndpointPolicy{Ingress: x.ingress}), c.two.Policies().Bump())
					local, err := talk(in(c.a), "tcp", to)
					if err != nil {
						c.one.rejectDrops("first node")
						c.two.rejectDrops("second node")
						t.Fatal(err)
					}
					if got := <-seen; got.Addr() != f.client || got.Port() < UpstreamPortMin || got.Port() > UpstreamPortMax {
						t.Errorf("the server sees %v", got)
					}
					if x.egress != 0 {
						one.expectSeen("first node", f.client, to, 5)
					}
					if x.ingress != 0 {
						two.expectSeen("second node", f.client, to, 6)
					}
					c.settled()
					c.balanced(local, to)
				})
			}
		}
	}
}

func (c *cluster) settled() {
	c.one.rejectDrops("first node")
	c.two.rejectDrops("second node")
	c.one.settled()
	c.two.settled()
}

// balanced checks that every connection's entry has data of both directions: 200,010 bytes.
func (c *cluster) balanced(client, to netip.AddrPort) {
	for _, w := range []*world{c.one, c.two} {
		found := 0
		w.do(w.Conntrack().List(func(x Conn) bool {
			if x.Source == client && x.Destination == to {
				found++
				if x.Forward.Bytes < 200010 || x.Reverse.Bytes < 200010 || x.Slot == 0 && w == c.one && x.Verdict == PolicyRedirect {
					w.Errorf("entry %+v has not all of both directions", x)
				}
			}
			return true
		}))
		if w == c.one && found != 1 {
			w.Errorf("%d entries of %v -> %v at the client, want one", found, client, to)
		}
	}
	for _, w := range []*world{c.one, c.two} {
		for _, id := range []uint16{epA, epB} {
			_, err := w.Conntrack().Purge(id)
			w.do(err)
		}
		w.records()
	}
}

// A connection between nodes that gets a slot is reset at both ends, whoever meets the change.
func TestProxySlotChangesAcrossNodes(t *testing.T) {
	for _, routing := range []Routing{RoutingNative, RoutingVXLAN} {
		c := newCluster(t, routing)
		two := newProxy(c.two)
		two.listen(6, MarkIngressPassed)
		c.two.do(c.two.Policies().SetEndpoint(epB, EndpointPolicy{Ingress: 6}))
		for _, f := range []struct {
			name string
			serv netip.Addr
		}{{"IPv4", remote4}, {"IPv6", remote6}} {
			to := at(f.serv, 8080)
			accepted := acceptOne(c.two, c.b, to)
			for _, first := range []string{"client", "server"} {
				t.Run(fmt.Sprintf("%v %s %s", routing, f.name, first), func(t *testing.T) {
					c.two.setPolicy(6, rows{0: {allowPort(unix.IPPROTO_TCP, 8080, 1)}})
					client := c.one.dial(c.a, to)
					server := <-accepted
					go func() { _, _ = server.Write([]byte("hello")) }()
					if _, err := io.ReadFull(client, make([]byte, 5)); err != nil {
						t.Fatal(err)
					}
					c.two.setPolicy(6, rows{0: {redirectPort(unix.IPPROTO_TCP, 8080, 6, 2)}})
					from := map[string]net.Conn{"client": client, "server": server}[first]
					if _, err := from.Write(make([]byte, 5000)); err != nil {
						t.Fatal(err)
					}
					for end, conn := range map[string]net.Conn{"client": client, "server": server} {
						if _, err := io.Copy(io.Discard, conn); !errors.Is(err, syscall.ECONNRESET) {
							t.Errorf("%s: %v, want a reset", end, err)
						}
					}
				})
			}
		}
	}
}
