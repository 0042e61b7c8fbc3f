// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The gateways of every pod: link-local addresses that nobody holds. A permanent neighbour entry in the pod gives them the MAC of the host
// side, so that neither ARP nor neighbour discovery is ever needed.
var (
	GatewayIPv4 = netip.MustParseAddr("169.254.1.1")
	GatewayIPv6 = netip.MustParseAddr("fe80::1")
)

// Pod is the wire between a pod and its node.
type Pod struct {
	// HostName is the interface's name in the node's namespace, the calling process's own; PodName the one in the pod.
	HostName, PodName string
	HostMAC, PodMAC   net.HardwareAddr
	MTU               int
	// Addresses of the pod: at most one of each family.
	Addresses []netip.Addr
}

// RandomMAC makes a unicast, locally administered address.
func RandomMAC() net.HardwareAddr {
	mac := make(net.HardwareAddr, 6)
	_, _ = rand.Read(mac) // never fails (crypto/rand)
	mac[0] = mac[0]&^1 | 2
	return mac
}

// CreatePod makes the veth pair, both ends down, and returns the index of the host end. A half-made pair of an earlier try is replaced.
func CreatePod(ns *Namespace, p Pod) (int, error) {
	if err := DeleteLink(p.HostName); err != nil {
		return 0, err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr, attrs.TxQLen = p.HostName, p.MTU, p.HostMAC, 1000
	veth := &netlink.Veth{
		LinkAttrs:        attrs,
		PeerName:         p.PodName,
		PeerHardwareAddr: p.PodMAC,
		PeerMTU:          uint32(p.MTU),
		PeerNamespace:    netlink.NsFd(int(ns.file.Fd())),
	}
	if err := netlink.LinkAdd(veth); err != nil {
		if errors.Is(err, unix.EEXIST) {
			return 0, fmt.Errorf("create %s with %s in the pod: the pod has an interface of that name: %w", p.HostName, p.PodName, err)
		}
		return 0, fmt.Errorf("create %s with %s in the pod: %w", p.HostName, p.PodName, err)
	}
	link, err := netlink.LinkByName(p.HostName)
	if err != nil {
		return 0, fmt.Errorf("find %s: %w", p.HostName, err)
	}
	// Before it is up: no address of its own, and neither source checks nor advertisements.
	err = setSysctls(
		"ipv6/conf/"+p.HostName+"/disable_ipv6=0",
		"ipv6/conf/"+p.HostName+"/addr_gen_mode=1",
		"ipv6/conf/"+p.HostName+"/accept_ra=0",
		"ipv6/conf/"+p.HostName+"/accept_dad=0",
		"ipv6/conf/"+p.HostName+"/forwarding=1",
		"ipv4/conf/"+p.HostName+"/forwarding=1",
		"ipv4/conf/"+p.HostName+"/rp_filter=0",
		"ipv4/conf/"+p.HostName+"/send_redirects=0",
	)
	if err != nil {
		return 0, err
	}
	return link.Attrs().Index, nil
}

// ConnectPod configures the pod's side and brings both ends up. Call it when the maps and programs are in place: from here on the pod can talk.
func ConnectPod(ns *Namespace, p Pod) error {
	err := ns.Do(func() error {
		return setSysctls(
			"ipv6/conf/lo/disable_ipv6=0",
			"ipv6/conf/"+p.PodName+"/disable_ipv6=0",
			"ipv6/conf/"+p.PodName+"/addr_gen_mode=1",
			"ipv6/conf/"+p.PodName+"/accept_ra=0",
			"ipv6/conf/"+p.PodName+"/accept_dad=0",
			"ipv6/conf/"+p.PodName+"/router_solicitations=0",
			"ipv4/conf/"+p.PodName+"/rp_filter=0",
		)
	})
	if err == nil {
		err = ReservePorts(ns)
	}
	if err != nil {
		return err
	}
	h, err := ns.Netlink()
	if err != nil {
		return err
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo in the pod: %w", err)
	}
	if err := h.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring up lo in the pod: %w", err)
	}
	link, err := h.LinkByName(p.PodName)
	if err != nil {
		return fmt.Errorf("find %s in the pod: %w", p.PodName, err)
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up %s in the pod: %w", p.PodName, err)
	}
	// Routes need a carrier on some kernels, so the host's end comes up before they are set; nobody knows the pod's address yet.
	if err := SetUp(p.HostName); err != nil {
		return err
	}
	for _, a := range p.Addresses {
		if err := addPodAddress(h, link, a, p.HostMAC); err != nil {
			return err
		}
	}
	return nil
}

func addPodAddress(h *netlink.Handle, link netlink.Link, a netip.Addr, gatewayMAC net.HardwareAddr) error {
	ipNet := hostNet(a)
	address := &netlink.Addr{IPNet: ipNet}
	gateway, everything, family := GatewayIPv4, netip.MustParsePrefix("0.0.0.0/0"), netlink.FAMILY_V4
	if a.Is6() {
		gateway, everything, family = GatewayIPv6, netip.MustParsePrefix("::/0"), netlink.FAMILY_V6
		address.Flags = unix.IFA_F_NODAD
	}
	if err := h.AddrReplace(link, address); err != nil {
		return fmt.Errorf("add %s in the pod: %w", a, err)
	}
	index := link.Attrs().Index
	err := h.NeighSet(&netlink.Neigh{LinkIndex: index, Family: family, State: netlink.NUD_PERMANENT,
		IP: gateway.AsSlice(), HardwareAddr: gatewayMAC})
	if err != nil {
		return fmt.Errorf("add neighbour %s in the pod: %w", gateway, err)
	}
	err = h.RouteReplace(&netlink.Route{LinkIndex: index, Family: family, Dst: prefixNet(everything),
		Gw: gateway.AsSlice(), Flags: int(netlink.FLAG_ONLINK), Src: a.AsSlice()})
	if err != nil {
		return fmt.Errorf("add default route via %s in the pod: %w", gateway, err)
	}
	return nil
}

// CheckPod compares the pod's side with what ConnectPod made and reports every difference.
func CheckPod(ns *Namespace, p Pod) error {
	host, err := netlink.LinkByName(p.HostName)
	if err != nil {
		return fmt.Errorf("interface %s: %w", p.HostName, err)
	}
	h, err := ns.Netlink()
	if err != nil {
		return err
	}
	defer h.Close()
	link, err := h.LinkByName(p.PodName)
	if err != nil {
		return fmt.Errorf("interface %s in the pod: %w", p.PodName, err)
	}
	var errs []error
	if link.Attrs().ParentIndex != host.Attrs().Index {
		errs = append(errs, fmt.Errorf("interface %s in the pod is not the other end of %s", p.PodName, p.HostName))
	}
	for name, l := range map[string]netlink.Link{p.HostName: host, p.PodName: link} {
		if l.Attrs().Flags&net.FlagUp == 0 {
			errs = append(errs, fmt.Errorf("interface %s is down", name))
		}
	}
	if mac := link.Attrs().HardwareAddr; !bytes.Equal(mac, p.PodMAC) {
		errs = append(errs, fmt.Errorf("interface %s in the pod has MAC %s, want %s", p.PodName, mac, p.PodMAC))
	}
	present, err := h.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return errors.Join(append(errs, fmt.Errorf("list addresses in the pod: %w", err))...)
	}
	for _, want := range p.Addresses {
		found := false
		for _, a := range present {
			got, _ := netip.AddrFromSlice(a.IP)
			found = found || got.Unmap() == want
		}
		if !found {
			errs = append(errs, fmt.Errorf("address %s is missing in the pod", want))
		}
		found, err := hasDefault(h, link, want)
		if err != nil {
			errs = append(errs, err)
		} else if !found {
			errs = append(errs, fmt.Errorf("default route for %s is missing in the pod", want))
		}
	}
	return errors.Join(errs...)
}

func hasDefault(h *netlink.Handle, link netlink.Link, a netip.Addr) (bool, error) {
	family := netlink.FAMILY_V4
	if a.Is6() {
		family = netlink.FAMILY_V6
	}
	routes, err := h.RouteList(link, family)
	if err != nil {
		return false, fmt.Errorf("list routes in the pod: %w", err)
	}
	for _, r := range routes {
		ones := 0
		if r.Dst != nil {
			ones, _ = r.Dst.Mask.Size()
		}
		if ones == 0 && r.Gw != nil {
			return true, nil
		}
	}
	return false, nil
}

// AddPlainPod routes a pod that the mesh leaves alone: the kernel forwards its packets through the veth by a host route, and knows its MAC.
func AddPlainPod(p Pod) error {
	link, err := netlink.LinkByName(p.HostName)
	if err != nil {
		return fmt.Errorf("find %s: %w", p.HostName, err)
	}
	for _, a := range p.Addresses {
		family := netlink.FAMILY_V4
		if a.Is6() {
			family = netlink.FAMILY_V6
		}
		err := netlink.NeighSet(&netlink.Neigh{LinkIndex: link.Attrs().Index, Family: family, State: netlink.NUD_PERMANENT,
			IP: a.AsSlice(), HardwareAddr: p.PodMAC})
		if err != nil {
			return fmt.Errorf("add neighbour %s: %w", a, err)
		}
		err = netlink.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Family: family, Dst: hostNet(a),
			Scope: linkScope(family), Protocol: routeProtocol})
		if err != nil {
			return fmt.Errorf("add route to %s: %w", a, err)
		}
	}
	return nil
}

// RemovePlainPod undoes AddPlainPod.
func RemovePlainPod(p Pod) error {
	link, err := netlink.LinkByName(p.HostName)
	if err != nil {
		return fmt.Errorf("find %s: %w", p.HostName, err)
	}
	var errs []error
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		filter := &netlink.Route{LinkIndex: link.Attrs().Index, Protocol: routeProtocol}
		routes, err := netlink.RouteListFiltered(family, filter, netlink.RT_FILTER_OIF|netlink.RT_FILTER_PROTOCOL)
		errs = append(errs, err)
		for _, r := range routes {
			if err := netlink.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
				errs = append(errs, fmt.Errorf("remove route to %s: %w", r.Dst, err))
			}
		}
	}
	return errors.Join(errs...)
}

// SetUp brings an interface of the node up.
func SetUp(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up %s: %w", name, err)
	}
	return nil
}

// DeleteLink removes an interface of the node and so its other end. No such interface is success.
func DeleteLink(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		if isNoLink(err) {
			return nil
		}
		return fmt.Errorf("find %s: %w", name, err)
	}
	if err := netlink.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("delete %s: %w", name, err)
	}
	return nil
}

// LinkIndex returns the index of an interface of the node, or false.
func LinkIndex(name string) (int, bool) {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return 0, false
	}
	return link.Attrs().Index, true
}

// LinksWithPrefix names the interfaces of the node that begin so.
func LinksWithPrefix(prefix string) ([]string, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	var names []string
	for _, l := range links {
		if name := l.Attrs().Name; len(name) > len(prefix) && name[:len(prefix)] == prefix {
			names = append(names, name)
		}
	}
	return names, nil
}

func isNoLink(err error) bool {
	var missing netlink.LinkNotFoundError
	return errors.As(err, &missing) || errors.Is(err, unix.ENODEV)
}

func linkScope(family int) netlink.Scope {
	if family == netlink.FAMILY_V4 {
		return netlink.SCOPE_LINK
	}
	return netlink.SCOPE_UNIVERSE
}

func hostNet(a netip.Addr) *net.IPNet { return prefixNet(netip.PrefixFrom(a, a.BitLen())) }

func prefixNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
