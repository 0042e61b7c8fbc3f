// SPDX-License-Identifier: Apache-2.0

package netdev_test

import (
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/weirmesh/weir/services/agent/internal/netdev"
	"github.com/weirmesh/weir/services/agent/internal/testns"
)

// ours lists the rules and routes of the proxy's tables.
func ours(t *testing.T) []string {
	t.Helper()
	var all []string
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rules, err := netlink.RuleList(family)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range rules {
			if r.Table == 200 || r.Table == 201 {
				all = append(all, fmt.Sprintf("%d: mark %#x/%#x table %d", r.Priority, r.Mark, *r.Mask, r.Table))
			}
		}
		for _, table := range []int{200, 201} {
			routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: table}, netlink.RT_FILTER_TABLE)
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range routes {
				link, err := netlink.LinkByIndex(r.LinkIndex)
				if err != nil {
					t.Fatal(err)
				}
				ones, _ := r.Dst.Mask.Size()
				all = append(all, fmt.Sprintf("table %d: type %d /%d dev %s", table, r.Type, ones, link.Attrs().Name))
			}
		}
	}
	slices.Sort(all)
	return all
}

func TestProxyRules(t *testing.T) {
	testns.Do(t, func() {
		node(t)
		want := []string{"8: mark 0x100/0x100 table 201", "9: mark 0x200/0xf00 table 200", "table 200: type 2 /0 dev lo", "table 201: type 1 /0 dev weir_host"}
		want = slices.Sorted(slices.Values(slices.Concat(want, want)))
		mask := uint32(0xffff)
		stale := netlink.NewRule()
		stale.Family, stale.Priority, stale.Table, stale.Mark, stale.Mask = netlink.FAMILY_V4, 7, 200, 1, &mask
		if err := netlink.RuleAdd(stale); err != nil {
			t.Fatal(err)
		}
		for range 2 { // the second time changes nothing
			if err := netdev.SetupProxy(); err != nil {
				t.Fatal(err)
			}
			if got := ours(t); !slices.Equal(got, want) {
				t.Fatalf("%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
		}
		for range 2 {
			if err := netdev.RemoveProxy(); err != nil {
				t.Fatal(err)
			}
			if got := ours(t); len(got) != 0 {
				t.Errorf("left: %q", got)
			}
		}
	})
}

func TestReservedPorts(t *testing.T) {
	ns, err := netdev.OpenNamespace(testns.New(t))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	for _, tt := range []struct{ before, want string }{
		{"", "52000-60999"}, {"52000-60999", "52000-60999"}, {"8080,30000-30010", "8080,30000-30010,52000-60999"}, {"50000-65000", "50000-65000"},
		{"52000-60998", "52000-60999"},
	} {
		var got string
		err := ns.Do(func() error {
			return os.WriteFile("/proc/sys/net/ipv4/ip_local_reserved_ports", []byte(tt.before+"\n"), 0)
		})
		if err == nil {
			err = netdev.ReservePorts(ns)
		}
		if err != nil {
			t.Fatal(err)
		}
		err = ns.Do(func() error {
			b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_reserved_ports")
			got = strings.TrimSpace(string(b))
			return err
		})
		if err != nil || got != tt.want {
			t.Errorf("%q: %q, %v, want %q", tt.before, got, err, tt.want)
		}
	}
}

// Ports are chosen evenly from what is left: TCP sockets that bind an address alone get no port much more often than others.
func TestPortRange(t *testing.T) {
	ns, err := netdev.OpenNamespace(testns.New(t))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	const file = "/proc/sys/net/ipv4/ip_local_port_range"
	for _, tt := range []struct{ before, want string }{
		{"1024 65535", "1024 65535"}, {"55000 60999", "55000 60999"}, {"20000 30000", "20000 30000"}, {"32768 60999", "32768 51999"}, {"32768 51999", "32768 51999"},
	} {
		err := ns.Do(func() error { return os.WriteFile(file, []byte(tt.before), 0) })
		if err == nil {
			err = netdev.ReservePorts(ns)
		}
		if err != nil {
			t.Fatal(err)
		}
		err = ns.Do(func() error {
			b, err := os.ReadFile(file)
			if got := strings.Join(strings.Fields(string(b)), " "); got != tt.want {
				t.Errorf("%q: %q, want %q", tt.before, got, tt.want)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	chosen := map[int]int{}
	err = ns.Do(func() error {
		for range 1000 {
			ln, err := net.Listen("tcp4", "0.0.0.0:0")
			if err != nil {
				return err
			}
			chosen[ln.Addr().(*net.TCPAddr).Port]++ //nolint:forcetypeassert // a TCP listener's
			ln.Close()
		}
		return nil
	})
	for port, n := range chosen {
		if n > 50 || port >= 52000 {
			t.Errorf("port %d was chosen %d times of 1,000", port, n)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
}
