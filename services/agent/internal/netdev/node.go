// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The node's own veth pair. What the node's stack sends to local pods is routed into HostLink and comes out at NetLink, whose program delivers it.
const (
	HostLink = "weir_host"
	NetLink  = "weir_net"
)

// routeProtocol marks the routes that are ours, so that a new agent finds what an old one left. 0x77 is unassigned (rt_protos).
const routeProtocol = 0x77

// Uplink is the interface that leads to the other nodes.
type Uplink struct {
	Name  string
	Index int
	MTU   int
	// First global address of each family; invalid = none.
	IPv4, IPv6 netip.Addr
	// PodMTU is the MTU of pods: the uplink's, less what a tunnel takes.
	PodMTU int
	// Overlay is the index of the tunnel device; 0 = pods' packets are routed natively.
	Overlay int
}

// FindUplink reads the uplink's MTU and addresses.
func FindUplink(name string) (Uplink, error) {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return Uplink{}, fmt.Errorf("find uplink %s: %w", name, err)
	}
	u := Uplink{Name: name, Index: link.Attrs().Index, MTU: link.Attrs().MTU, PodMTU: link.Attrs().MTU}
	addresses, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return Uplink{}, fmt.Errorf("list addresses of %s: %w", name, err)
	}
	for _, a := range addresses {
		ip, ok := netip.AddrFromSlice(a.IP)
		ip = ip.Unmap()
		if !ok || a.Scope != int(netlink.SCOPE_UNIVERSE) {
			continue
		}
		if ip.Is4() && !u.IPv4.IsValid() {
			u.IPv4 = ip
		} else if ip.Is6() && !u.IPv6.IsValid() {
			u.IPv6 = ip
		}
	}
	if !u.IPv4.IsValid() && !u.IPv6.IsValid() {
		return Uplink{}, fmt.Errorf("uplink %s has no global address", name)
	}
	return u, nil
}

// SetupNode makes the node's veth pair and sets what forwarding of pods needs.
func SetupNode(u Uplink) error {
	if err := ensureHostPair(u.PodMTU); err != nil {
		return err
	}
	err := setSysctls(
		"ipv4/ip_forward=1",
		// The proxy's upstream sockets share some 9,000 ports for each client and server.
		"ipv4/tcp_tw_reuse=1",
		"ipv6/conf/all/disable_ipv6=0",
		"ipv6/conf/all/forwarding=1",
		// The higher of "all" and the interface's own value counts.
		"ipv4/conf/all/rp_filter=0",
		"ipv4/conf/default/rp_filter=0",
		"ipv4/conf/"+u.Name+"/rp_filter=0",
		"ipv4/conf/all/send_redirects=0",
		"ipv4/conf/"+u.Name+"/send_redirects=0",
	)
	for _, name := range []string{HostLink, NetLink} {
		err = errors.Join(err, setSysctls(
			"ipv6/conf/"+name+"/disable_ipv6=0",
			"ipv6/conf/"+name+"/addr_gen_mode=1",
			"ipv6/conf/"+name+"/accept_ra=0",
			"ipv6/conf/"+name+"/accept_dad=0",
			"ipv4/conf/"+name+"/rp_filter=0",
			"ipv4/conf/"+name+"/forwarding=1",
			"ipv4/conf/"+name+"/send_redirects=0",
		))
	}
	// What the node's own processes send to a pod, and what goes to the proxy instead, has the node's own source.
	err = errors.Join(err, setSysctls("ipv4/conf/"+NetLink+"/accept_local=1"))
	if err != nil {
		return err
	}
	for _, name := range []string{HostLink, NetLink} {
		if err := SetUp(name); err != nil {
			return err
		}
	}
	return nil
}

func ensureHostPair(mtu int) error {
	host, err := netlink.LinkByName(HostLink)
	if err == nil {
		peer, peerErr := netlink.LinkByName(NetLink)
		if peerErr == nil && host.Attrs().ParentIndex == peer.Attrs().Index {
			for _, l := range []netlink.Link{host, peer} {
				if l.Attrs().MTU == mtu {
					continue
				}
				if err := netlink.LinkSetMTU(l, mtu); err != nil {
					return fmt.Errorf("set MTU of %s: %w", l.Attrs().Name, err)
				}
			}
			return nil
		}
	} else if !isNoLink(err) {
		return fmt.Errorf("find %s: %w", HostLink, err)
	}
	for _, name := range []string{HostLink, NetLink} {
		if err := DeleteLink(name); err != nil {
			return err
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.TxQLen = HostLink, mtu, 1000
	// The kernel fills in a NOARP device's own MAC as destination, so both ends bear the same one: what arrives is then addressed to this host.
	mac := net.HardwareAddr{0x02, 'w', 'e', 'i', 'r', 0x01}
	attrs.HardwareAddr = mac
	err = netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: NetLink, PeerHardwareAddr: mac, PeerMTU: uint32(mtu)})
	if err != nil {
		return fmt.Errorf("create %s: %w", HostLink, err)
	}
	for _, name := range []string{HostLink, NetLink} {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("find %s: %w", name, err)
		}
		if err := netlink.LinkSetARPOff(link); err != nil {
			return fmt.Errorf("switch ARP off on %s: %w", name, err)
		}
	}
	return nil
}

// Route leads to a prefix: through the node's pair when Via is invalid (a local pod CIDR, with Source as the node's own address), else
// to another node by its address.
type Route struct {
	Prefix netip.Prefix
	Via    netip.Addr
	Source netip.Addr
}

// SyncRoutes makes the node's routes to pod CIDRs and to pods outside of them exactly these. Host routes of plain pods are left alone.
func SyncRoutes(u Uplink, want []Route) error {
	host, ok := LinkIndex(HostLink)
	if !ok && slices.ContainsFunc(want, func(r Route) bool { return !r.Via.IsValid() }) {
		return fmt.Errorf("%s is missing", HostLink)
	}
	present := map[netip.Prefix]netlink.Route{}
	var errs []error
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := netlink.RouteListFiltered(family, &netlink.Route{Protocol: routeProtocol}, netlink.RT_FILTER_PROTOCOL)
		if err != nil {
			errs = append(errs, fmt.Errorf("list routes: %w", err))
			continue
		}
		for _, r := range list {
			// A route through a pod's own interface is a plain pod's.
			if p, good := prefixOf(r.Dst); good && (r.LinkIndex == u.Index || ok && r.LinkIndex == host || u.Overlay != 0 && r.LinkIndex == u.Overlay) {
				present[p] = r
			}
		}
	}
	for _, r := range want {
		have, ok := present[r.Prefix]
		delete(present, r.Prefix)
		route := r.netlink(u, host)
		if ok && have.LinkIndex == route.LinkIndex && have.Gw.Equal(route.Gw) && have.Src.Equal(route.Src) && have.MTU == route.MTU {
			continue
		}
		if err := netlink.RouteReplace(route); err != nil {
			errs = append(errs, fmt.Errorf("set route to %s: %w", r.Prefix, err))
		}
	}
	for p, r := range present {
		if err := netlink.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("remove route to %s: %w", p, err))
		}
	}
	return errors.Join(errs...)
}

// netlink is the kernel's form of a route.
func (r Route) netlink(u Uplink, hostLink int) *netlink.Route {
	route := &netlink.Route{Family: netlink.FAMILY_V6, Dst: prefixNet(r.Prefix), Protocol: routeProtocol}
	if r.Prefix.Addr().Is4() {
		route.Family = netlink.FAMILY_V4
	}
	if r.Source.IsValid() {
		route.Src = r.Source.AsSlice()
	}
	switch {
	case r.Via.IsValid() && u.Overlay != 0:
		// The tunnel's other end comes from ipcache, packet by packet.
		route.LinkIndex, route.Scope = u.Overlay, linkScope(route.Family)
	case r.Via.IsValid():
		route.LinkIndex, route.Gw = u.Index, r.Via.AsSlice()
	default:
		route.LinkIndex, route.Scope = hostLink, linkScope(route.Family)
	}
	return route
}

func prefixOf(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), ones), ok
}
