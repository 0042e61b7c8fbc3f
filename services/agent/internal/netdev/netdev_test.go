// SPDX-License-Identifier: Apache-2.0

package netdev_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/weirmesh/weir/services/agent/internal/netdev"
	"github.com/weirmesh/weir/services/agent/internal/testns"
)

// node makes an uplink in the present namespace and sets the node up.
func node(t *testing.T) netdev.Uplink {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = "up0", 1400
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "far0"}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"up0", "far0", "lo"} {
		if err := netdev.SetUp(name); err != nil {
			t.Fatal(err)
		}
	}
	link, err := netlink.LinkByName("up0")
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range []string{"172.30.0.11/24", "fd30::11/64"} {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			t.Fatal(err)
		}
		addr.Flags = 2 // IFA_F_NODAD
		if err := netlink.AddrAdd(link, addr); err != nil {
			t.Fatal(err)
		}
	}
	u, err := netdev.FindUplink("up0")
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time changes nothing
		if err := netdev.SetupNode(u); err != nil {
			t.Fatal(err)
		}
	}
	return u
}

func open(t *testing.T, path string) *netdev.Namespace {
	t.Helper()
	ns, err := netdev.OpenNamespace(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

func pod(t *testing.T, name string, addresses ...string) netdev.Pod {
	t.Helper()
	p := netdev.Pod{HostName: name, PodName: "eth0", HostMAC: netdev.RandomMAC(), PodMAC: netdev.RandomMAC(), MTU: 1400}
	for _, a := range addresses {
		p.Addresses = append(p.Addresses, netip.MustParseAddr(a))
	}
	return p
}

func plug(t *testing.T, ns *netdev.Namespace, p netdev.Pod) {
	t.Helper()
	if _, err := netdev.CreatePod(ns, p); err != nil {
		t.Fatal(err)
	}
	if err := netdev.ConnectPod(ns, p); err != nil {
		t.Fatal(err)
	}
}

func TestFindUplink(t *testing.T) {
	testns.Do(t, func() {
		u := node(t)
		if u.MTU != 1400 || u.IPv4.String() != "172.30.0.11" || u.IPv6.String() != "fd30::11" {
			t.Errorf("uplink %+v", u)
		}
		if _, err := netdev.FindUplink("far0"); err == nil {
			t.Error("an uplink without an address was taken")
		}
		if _, err := netdev.FindUplink("none"); err == nil || !strings.Contains(err.Error(), "none") {
			t.Errorf("missing uplink: %v", err)
		}
	})
}

func TestSetupNode(t *testing.T) {
	testns.Do(t, func() {
		node(t)
		host, err := netlink.LinkByName(netdev.HostLink)
		if err != nil {
			t.Error(err)
			return
		}
		if host.Attrs().RawFlags&0x80 == 0 /* IFF_NOARP */ || host.Attrs().Flags&net.FlagUp == 0 || host.Attrs().MTU != 1400 {
			t.Errorf("weir_host: %+v", host.Attrs())
		}
		for name, want := range map[string]string{"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1", "ipv4/conf/weir_net/rp_filter": "0"} {
			if b, err := os.ReadFile("/proc/sys/net/" + name); err != nil || strings.TrimSpace(string(b)) != want {
				t.Errorf("%s is %q, %v; want %s", name, b, err, want)
			}
		}
		if list, err := netlink.AddrList(host, netlink.FAMILY_ALL); err != nil || len(list) != 0 {
			t.Errorf("weir_host has addresses %v, %v; want none", list, err)
		}
	})
}

func TestPlainPodsTalk(t *testing.T) {
	testns.Do(t, func() {
		node(t)
		a, b := pod(t, "wr0000000001", "10.244.1.2", "fd00:10:244:1::2"), pod(t, "wr0000000002", "10.244.1.3", "fd00:10:244:1::3")
		nsA, nsB := open(t, testns.New(t)), open(t, testns.New(t))
		for _, x := range []struct {
			ns *netdev.Namespace
			p  netdev.Pod
		}{{nsA, a}, {nsB, b}} {
			plug(t, x.ns, x.p)
			if err := netdev.AddPlainPod(x.p); err != nil {
				t.Error(err)
				return
			}
			if err := netdev.CheckPod(x.ns, x.p); err != nil {
				t.Errorf("check: %v", err)
			}
		}
		for _, address := range []string{"10.244.1.3", "fd00:10:244:1::3"} {
			if err := talk(nsA, nsB, address); err != nil {
				t.Errorf("pod to pod by %s: %v", address, err)
			}
		}
	})
}

// talk sends a line over TCP from one namespace to an address in another.
func talk(from, to *netdev.Namespace, address string) error {
	var ln net.Listener
	err := to.Do(func() (err error) {
		ln, err = net.Listen("tcp", net.JoinHostPort(address, "0"))
		return err
	})
	if err != nil {
		return err
	}
	defer ln.Close()
	echoed := make(chan error, 1)
	go func() {
		c, err := ln.Accept()
		if err == nil {
			_, err = c.Write([]byte("hello"))
			c.Close()
		}
		echoed <- err
	}()
	err = from.Do(func() error {
		c, err := net.DialTimeout("tcp", ln.Addr().String(), 3*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		var b [5]byte
		if _, err := c.Read(b[:]); err != nil || string(b[:]) != "hello" {
			return fmt.Errorf("read %q: %w", b, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return <-echoed
}

func TestCheckPodNamesWhatIsWrong(t *testing.T) {
	testns.Do(t, func() {
		node(t)
		ns := open(t, testns.New(t))
		p := pod(t, "wr00000000aa", "10.244.1.2", "fd00:10:244:1::2")
		plug(t, ns, p)
		steps := []struct {
			name   string
			damage func(h *netlink.Handle, l netlink.Link) error
			want   string
		}{
			{"whole", func(*netlink.Handle, netlink.Link) error { return nil }, ""},
			{"no route", func(h *netlink.Handle, l netlink.Link) error {
				return h.RouteDel(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}, Gw: netdev.GatewayIPv4.AsSlice()})
			}, "default route for 10.244.1.2"},
			{"no address", func(h *netlink.Handle, l netlink.Link) error {
				a, _ := netlink.ParseAddr("fd00:10:244:1::2/128")
				return h.AddrDel(l, a)
			}, "address fd00:10:244:1::2 is missing"},
			{"down", func(h *netlink.Handle, l netlink.Link) error { return h.LinkSetDown(l) }, "eth0 is down"},
			{"gone", func(h *netlink.Handle, l netlink.Link) error { return h.LinkDel(l) }, "wr00000000aa"},
		}
		for _, s := range steps {
			h, err := ns.Netlink()
			if err != nil {
				t.Error(err)
				return
			}
			l, err := h.LinkByName("eth0")
			if err == nil {
				err = s.damage(h, l)
			}
			h.Close()
			if err != nil {
				t.Errorf("%s: %v", s.name, err)
			}
			err = netdev.CheckPod(ns, p)
			if s.want == "" && err != nil || s.want != "" && (err == nil || !strings.Contains(err.Error(), s.want)) {
				t.Errorf("%s: %v, want %q", s.name, err, s.want)
			}
		}
		// Deleting what is gone is success, and the place is free again.
		if err := netdev.DeleteLink(p.HostName); err != nil {
			t.Error(err)
		}
		plug(t, ns, p)
	})
}

func TestSyncRoutes(t *testing.T) {
	testns.Do(t, func() {
		u := node(t)
		list := func() []string {
			var all []string
			for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
				routes, err := netlink.RouteListFiltered(family, &netlink.Route{Protocol: 0x77}, netlink.RT_FILTER_PROTOCOL)
				if err != nil {
					t.Error(err)
				}
				for _, r := range routes {
					l, err := netlink.LinkByIndex(r.LinkIndex)
					if err != nil {
						t.Error(err)
						continue
					}
					all = append(all, strings.TrimSuffix(fmt.Sprintf("%s dev %s via %s src %s", r.Dst, l.Attrs().Name, r.Gw, r.Src), ""))
				}
			}
			slices.Sort(all)
			return all
		}
		prefix := netip.MustParsePrefix
		local := []netdev.Route{
			{Prefix: prefix("10.244.1.0/24"), Source: u.IPv4}, {Prefix: prefix("fd00:10:244:1::/64"), Source: u.IPv6},
		}
		remote := []netdev.Route{
			{Prefix: prefix("10.244.2.0/24"), Via: netip.MustParseAddr("172.30.0.12")},
			{Prefix: prefix("fd00:10:244:2::/64"), Via: netip.MustParseAddr("fd30::12")},
		}
		for range 2 {
			if err := netdev.SyncRoutes(u, slices.Concat(local, remote)); err != nil {
				t.Error(err)
			}
			want := []string{
				"10.244.1.0/24 dev weir_host via <nil> src 172.30.0.11", "10.244.2.0/24 dev up0 via 172.30.0.12 src <nil>",
				"fd00:10:244:1::/64 dev weir_host via <nil> src fd30::11", "fd00:10:244:2::/64 dev up0 via fd30::12 src <nil>",
			}
			if got := list(); !slices.Equal(got, want) {
				t.Errorf("routes\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
		}
		if err := netdev.SyncRoutes(u, local); err != nil {
			t.Error(err)
		}
		if got := list(); len(got) != 2 {
			t.Errorf("routes of a node that is gone are left: %q", got)
		}
	})
}

func TestOpenNamespaceRefuses(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, filepath.Join(t.TempDir(), "missing"), "/proc/self/ns/mnt"} {
		if _, err := netdev.OpenNamespace(path); !errors.Is(err, netdev.ErrNoNamespace) {
			t.Errorf("%s: %v, want ErrNoNamespace", path, err)
		}
	}
}
