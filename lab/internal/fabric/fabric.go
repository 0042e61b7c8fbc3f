// SPDX-License-Identifier: Apache-2.0

// Package fabric builds the lab's wires: a bridge in a namespace of its own, and a link from it into each namespace that joins. Nothing
// of it is in the machine's own network namespace, so two labs may use the same addresses.
package fabric

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"

	"github.com/vishvananda/netlink"
	nl "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/lab/internal/netns"
)

// Bridge is the name of the bridge; Uplink the name of a member's end of its link.
const (
	Bridge = "br0"
	Uplink = "eth0"
)

// Management is the name of a member's second link, and ManagementBridge that of the bridge that it leads to. The bridge has no address: it is no
// way to anywhere else.
const (
	Management       = "mgmt0"
	ManagementBridge = "br1"
)

// Sysctls of every namespace that the lab makes: duplicate address detection would keep fresh IPv6 addresses unusable for a second or two.
var quiet = map[string]string{
	"ipv6/conf/all/accept_dad":     "0",
	"ipv6/conf/default/accept_dad": "0",
	"ipv6/conf/all/accept_ra":      "0",
	"ipv6/conf/default/accept_ra":  "0",
	// A router on the link may be asked for what the link has; nobody is to remember the shorter way.
	"ipv6/conf/all/accept_redirects":     "0",
	"ipv6/conf/default/accept_redirects": "0",
	"ipv4/conf/all/rp_filter":            "0",
	"ipv4/conf/default/rp_filter":        "0",
	"ipv4/conf/all/send_redirects":       "0",
	"ipv4/ping_group_range":              "0 2147483647",
	"ipv4/ip_unprivileged_port_start":    "0",
}

var forwarding = map[string]string{
	"ipv4/ip_forward":                  "1",
	"ipv6/conf/all/forwarding":         "1",
	"ipv4/conf/default/send_redirects": "0",
}

// Fabric is one lab's wires. Safe for concurrent use.
type Fabric struct {
	netns string
	mtu   int

	mu   sync.Mutex
	next int
}

// Router are the addresses of the fabric itself, where members send what they have no route for.
type Router struct{ V4, V6 netip.Prefix }

// Create builds the bridge in the namespace called name, which must exist.
func Create(name string, router Router, mtu int) (*Fabric, error) {
	f := &Fabric{netns: name, mtu: mtu}
	if err := Prepare(name, true); err != nil {
		return nil, fmt.Errorf("create fabric: %w", err)
	}
	err := within(name, func(h *netlink.Handle) error {
		if err := addBridge(h, Bridge, mtu, router.V4, router.V6); err != nil {
			return err
		}
		return addBridge(h, ManagementBridge, mtu)
	})
	if err != nil {
		return nil, fmt.Errorf("create fabric: %w", err)
	}
	return f, nil
}

func addBridge(h *netlink.Handle, name string, mtu int, addresses ...netip.Prefix) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	attrs.MTU = mtu
	// Snooping would withhold neighbour solicitations until the first membership reports.
	snooping := false
	bridge := &netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snooping}
	if err := h.LinkAdd(bridge); err != nil {
		return fmt.Errorf("add bridge: %w", err)
	}
	for _, prefix := range addresses {
		if err := addAddress(h, bridge, prefix); err != nil {
			return err
		}
	}
	return h.LinkSetUp(bridge)
}

// Prepare sets the kernel settings of a new namespace; router turns forwarding on.
func Prepare(name string, router bool) error {
	if err := netns.Sysctl(netns.Path(name), quiet); err != nil {
		return err
	}
	if !router {
		return nil
	}
	return netns.Sysctl(netns.Path(name), forwarding)
}

// Join links the namespace called name to the bridge: eth0 with these addresses, up.
func (f *Fabric) Join(name string, addresses []netip.Prefix) error {
	return f.join(name, Bridge, Uplink, addresses)
}

// JoinManagement links the namespace to the management bridge: mgmt0 with these addresses, up.
func (f *Fabric) JoinManagement(name string, addresses []netip.Prefix) error {
	return f.join(name, ManagementBridge, Management, addresses)
}

func (f *Fabric) join(name, bridgeName, uplink string, addresses []netip.Prefix) error {
	f.mu.Lock()
	f.next++
	port := "p" + strconv.Itoa(f.next)
	f.mu.Unlock()
	target, err := nl.GetFromPath(netns.Path(name))
	if err != nil {
		return fmt.Errorf("join %s: %w", name, err)
	}
	defer target.Close()
	err = within(f.netns, func(h *netlink.Handle) error {
		bridge, err := h.LinkByName(bridgeName)
		if err != nil {
			return fmt.Errorf("find bridge: %w", err)
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name = port
		attrs.MTU = f.mtu
		attrs.MasterIndex = bridge.Attrs().Index
		link := &netlink.Veth{LinkAttrs: attrs, PeerName: uplink, PeerNamespace: netlink.NsFd(int(target))}
		if err := h.LinkAdd(link); err != nil {
			return fmt.Errorf("add link: %w", err)
		}
		return h.LinkSetUp(link)
	})
	if err != nil {
		return fmt.Errorf("join %s: %w", name, err)
	}
	err = within(name, func(h *netlink.Handle) error {
		link, err := h.LinkByName(uplink)
		if err != nil {
			return fmt.Errorf("find uplink: %w", err)
		}
		if err := h.LinkSetMTU(link, f.mtu); err != nil {
			return fmt.Errorf("set mtu: %w", err)
		}
		for _, prefix := range addresses {
			if err := addAddress(h, link, prefix); err != nil {
				return err
			}
		}
		return h.LinkSetUp(link)
	})
	if err != nil {
		return fmt.Errorf("join %s: %w", name, err)
	}
	return nil
}

// Route is a way out of a member's link.
type Route struct {
	To netip.Prefix
	// Via has the gateways, each taken equally; none = the destination is on the link.
	Via []netip.Addr
	// Source is the address to send from; the zero value leaves it to the kernel.
	Source netip.Addr
	// Table is the routing table; 0 = the main one.
	Table int
}

// OwnTraffic makes packets of the namespace's own processes, and no others, look at a routing table first.
func OwnTraffic(name string, table int) error {
	err := within(name, func(h *netlink.Handle) error {
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			rule := netlink.NewRule()
			rule.Family, rule.IifName, rule.Table, rule.Priority = family, "lo", table, table
			if err := h.RuleAdd(rule); err != nil {
				return fmt.Errorf("add rule: %w", err)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("rules of %s: %w", name, err)
	}
	return nil
}

// SetRoutes puts routes into the namespace called name, out of link.
func SetRoutes(name, link string, routes []Route) error {
	err := within(name, func(h *netlink.Handle) error {
		device, err := h.LinkByName(link)
		if err != nil {
			return fmt.Errorf("find %s: %w", link, err)
		}
		for _, route := range routes {
			if err := h.RouteReplace(route.netlink(device.Attrs().Index)); err != nil {
				return fmt.Errorf("route to %s: %w", route.To, err)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("routes of %s: %w", name, err)
	}
	return nil
}

// DeleteRoutes takes routes out again; those that do not exist are no error.
func DeleteRoutes(name, link string, routes []Route) error {
	err := within(name, func(h *netlink.Handle) error {
		device, err := h.LinkByName(link)
		if err != nil {
			return fmt.Errorf("find %s: %w", link, err)
		}
		for _, route := range routes {
			if err := h.RouteDel(route.netlink(device.Attrs().Index)); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("delete route to %s: %w", route.To, err)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("routes of %s: %w", name, err)
	}
	return nil
}

func (r Route) netlink(index int) *netlink.Route {
	route := &netlink.Route{LinkIndex: index, Dst: ipNet(r.To), Table: r.Table}
	if r.Source.IsValid() {
		route.Src = net.IP(r.Source.AsSlice())
	}
	switch len(r.Via) {
	case 0:
		route.Scope = netlink.SCOPE_LINK
	case 1:
		route.Gw = net.IP(r.Via[0].AsSlice())
		route.Flags = int(netlink.FLAG_ONLINK)
	default:
		route.LinkIndex = 0
		for _, via := range r.Via {
			route.MultiPath = append(route.MultiPath, &netlink.NexthopInfo{LinkIndex: index, Gw: net.IP(via.AsSlice()), Flags: int(netlink.FLAG_ONLINK)})
		}
	}
	return route
}

func ipNet(prefix netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: net.IP(prefix.Addr().AsSlice()), Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen())}
}

func addAddress(h *netlink.Handle, link netlink.Link, prefix netip.Prefix) error {
	address := &netlink.Addr{IPNet: ipNet(prefix)}
	if prefix.Addr().Is6() {
		address.Flags = unix.IFA_F_NODAD
	}
	if err := h.AddrAdd(link, address); err != nil && !errors.Is(err, os.ErrExist) && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add address %s: %w", prefix, err)
	}
	return nil
}

// within runs f with a netlink handle of the namespace called name.
func within(name string, f func(*netlink.Handle) error) error {
	handle, err := nl.GetFromPath(netns.Path(name))
	if err != nil {
		return fmt.Errorf("open namespace %s: %w", name, err)
	}
	defer handle.Close()
	h, err := netlink.NewHandleAt(handle, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink in %s: %w", name, err)
	}
	defer h.Close()
	return f(h)
}
