// SPDX-License-Identifier: Apache-2.0

package netdev_test

import (
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/weirmesh/weir/services/agent/internal/netdev"
	"github.com/weirmesh/weir/services/agent/internal/testns"
)

func TestOverlay(t *testing.T) {
	testns.Do(t, func() {
		// Another device has the name.
		attrs := netlink.NewLinkAttrs()
		attrs.Name = netdev.OverlayLink
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "other"}); err != nil {
			t.Error(err)
			return
		}
		u := netdev.Uplink{Name: "eth0", MTU: 1500}
		first := 0
		for i, tt := range []struct {
			v6   netip.Addr
			want int
		}{{netip.Addr{}, 1450}, {netip.Addr{}, 1450}, {netip.MustParseAddr("fd30::1"), 1430}} {
			u.IPv6 = tt.v6
			index, err := netdev.SetupOverlay(u)
			if err != nil {
				t.Error(err)
				return
			}
			if i == 0 {
				first = index
			} else if index != first {
				t.Errorf("the device was made anew: %d, then %d", first, index)
			}
			link, err := netlink.LinkByIndex(index)
			if err != nil {
				t.Error(err)
				return
			}
			v, ok := link.(*netlink.Vxlan)
			if !ok || !v.FlowBased || v.Port != netdev.OverlayPort || v.MTU != tt.want || v.HardwareAddr.String() != "02:77:65:69:72:02" {
				t.Errorf("device %+v, want an external one of MTU %d", link, tt.want)
			}
		}
		u.Overlay = first
		routes := []netdev.Route{{Prefix: netip.MustParsePrefix("10.244.2.0/24"), Via: netip.MustParseAddr("172.30.0.2")},
			{Prefix: netip.MustParsePrefix("10.1.0.21/32"), Via: netip.MustParseAddr("172.30.0.2")}}
		for _, want := range [][]netdev.Route{routes, routes, routes[:1]} {
			if err := netdev.SyncRoutes(u, want); err != nil {
				t.Error(err)
			}
			have, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{LinkIndex: first}, netlink.RT_FILTER_OIF)
			if err != nil || len(have) != len(want) {
				t.Errorf("routes %v, %v, want %d", have, err, len(want))
			}
		}
	})
}
