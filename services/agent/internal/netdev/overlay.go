// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"bytes"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
)

const (
	// OverlayLink is the tunnel device between nodes.
	OverlayLink = "weir_vxlan"
	// OverlayPort is its UDP port.
	OverlayPort = 8472
	// What the tunnel adds to a packet: outer Ethernet is not counted, inner Ethernet, VXLAN, UDP and the outer IP header are.
	overheadIPv4 = 50
	overheadIPv6 = 70
)

// overlayMAC is the same on all nodes, so that a node's stack takes what arrives by the tunnel, whoever sent it.
var overlayMAC = net.HardwareAddr{0x02, 'w', 'e', 'i', 'r', 0x02}

// OverlayMTU is what a packet of a pod may have so that it fits the uplink.
func OverlayMTU(u Uplink) int {
	if u.IPv6.IsValid() {
		return u.MTU - overheadIPv6
	}
	return u.MTU - overheadIPv4
}

// SetupOverlay makes the tunnel device and returns its index. What tunnel a packet takes is said packet by packet; the device itself knows no other
// node, asks for no neighbour and has no address.
func SetupOverlay(u Uplink) (int, error) {
	mtu := OverlayMTU(u)
	link, err := netlink.LinkByName(OverlayLink)
	if err != nil && !isNoLink(err) {
		return 0, fmt.Errorf("find %s: %w", OverlayLink, err)
	}
	if err == nil {
		v, ok := link.(*netlink.Vxlan)
		if !ok || !v.FlowBased || v.Port != OverlayPort || !bytes.Equal(v.HardwareAddr, overlayMAC) {
			if err := netlink.LinkDel(link); err != nil {
				return 0, fmt.Errorf("delete %s, which is not as it should be: %w", OverlayLink, err)
			}
			link = nil
		}
	} else {
		link = nil
	}
	if link == nil {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU, attrs.HardwareAddr, attrs.TxQLen = OverlayLink, mtu, overlayMAC, 1000
		if err := netlink.LinkAdd(&netlink.Vxlan{LinkAttrs: attrs, FlowBased: true, Port: OverlayPort}); err != nil {
			return 0, fmt.Errorf("create %s: %w", OverlayLink, err)
		}
		if link, err = netlink.LinkByName(OverlayLink); err != nil {
			return 0, fmt.Errorf("find %s: %w", OverlayLink, err)
		}
	}
	if link.Attrs().MTU != mtu {
		if err := netlink.LinkSetMTU(link, mtu); err != nil {
			return 0, fmt.Errorf("set MTU of %s: %w", OverlayLink, err)
		}
	}
	if err := netlink.LinkSetARPOff(link); err != nil {
		return 0, fmt.Errorf("switch ARP off on %s: %w", OverlayLink, err)
	}
	// Without addresses and neighbours, IPv6 on it is there for routes alone.
	err = setSysctls(
		"ipv6/conf/"+OverlayLink+"/disable_ipv6=0",
		"ipv6/conf/"+OverlayLink+"/addr_gen_mode=1",
		"ipv6/conf/"+OverlayLink+"/accept_ra=0",
		"ipv6/conf/"+OverlayLink+"/accept_dad=0",
		"ipv6/conf/"+OverlayLink+"/router_solicitations=0",
		"ipv6/conf/"+OverlayLink+"/forwarding=1",
		"ipv4/conf/"+OverlayLink+"/forwarding=1",
		"ipv4/conf/"+OverlayLink+"/rp_filter=0",
		"ipv4/conf/"+OverlayLink+"/send_redirects=0",
	)
	if err != nil {
		return 0, err
	}
	return link.Attrs().Index, SetUp(OverlayLink)
}
