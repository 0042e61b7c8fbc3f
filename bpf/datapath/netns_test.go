// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// world is a node in a network namespace with real pods behind real veth pairs. The test's thread is in the node's namespace.
type world struct {
	testing.TB
	*Datapath
	cfg  Config
	node netns.NsHandle
	pods map[string]*pod
	out  *pod // a host outside of the cluster, on the uplink's network
}

type pod struct {
	name   string
	ns     netns.NsHandle
	host   string // host-side interface
	v4, v6 netip.Addr
	id     uint16
}

const (
	gateway4 = "169.254.1.1"
	gateway6 = "fe80::1"
	macHost  = "02:00:00:00:00:01"
)

func newWorld(t testing.TB, change func(*Config)) *world {
	t.Helper()
	w := newNode(t, 1, change)
	w.uplink()
	w.do(w.IPCache().Upsert(netip.MustParsePrefix("172.30.0.11/32"), IPCacheEntry{Identity: IdentityHost}))
	w.do(w.IPCache().Upsert(netip.MustParsePrefix("fd30::11/128"), IPCacheEntry{Identity: IdentityHost}))
	return w
}

// newNode makes a node without uplink, whose pods have 10.244.<number>.0/24 and fd00:10:244:<number>::/64.
func newNode(t testing.TB, number int, change func(*Config)) *world {
	t.Helper()
	pin := bpffs(t)
	node := inNetns(t)
	cfg := smallConfig(pin)
	if change != nil {
		change(&cfg)
	}
	w := &world{TB: t, cfg: cfg, node: node, pods: map[string]*pod{}}
	w.Datapath = load(t, cfg)
	t.Cleanup(func() {
		if err := Remove(pin); err != nil {
			t.Errorf("remove: %v", err)
		}
		for _, p := range w.pods {
			p.ns.Close()
		}
	})
	for name, value := range map[string]string{
		"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1", "net/ipv4/conf/all/rp_filter": "0",
		"net/ipv4/conf/default/rp_filter": "0", "net/ipv6/conf/default/accept_dad": "0", "net/ipv6/conf/all/accept_dad": "0",
	} {
		sysctl(t, name, value)
	}
	w.do(linkUp("lo"))
	// The node's own pair: what its stack sends to pods. Without ARP the kernel fills in the device's own MAC, which is the other end's as well.
	w.do(addPair("weir_host", "weir_net"))
	mac, err := net.ParseMAC(macHost)
	w.do(err)
	for _, name := range []string{"weir_host", "weir_net"} {
		l, err := netlink.LinkByName(name)
		w.do(err, netlink.LinkSetHardwareAddr(l, mac), netlink.LinkSetARPOff(l))
	}
	w.do(linkUp("weir_net"), linkUp("weir_host"), running("weir_net"), running("weir_host"), w.AttachHost("weir_net"))
	for _, cidr := range []string{fmt.Sprintf("10.244.%d.0/24", number), fmt.Sprintf("fd00:10:244:%d::/64", number)} {
		w.do(addRoute(cidr, "weir_host", ""), w.IPCache().Upsert(netip.MustParsePrefix(cidr), IPCacheEntry{Flags: IPCacheLocalPods}))
	}
	return w
}

// do fails the test on the first error.
func (w *world) do(errs ...error) {
	w.Helper()
	for _, err := range errs {
		if err != nil {
			w.Fatal(err)
		}
	}
}

// uplink joins the node to a host outside of the cluster.
func (w *world) uplink() {
	w.Helper()
	ns, err := netns.New()
	w.do(err, netns.Set(w.node), addPair("eth0", "outside"))
	l, err := netlink.LinkByName("outside")
	w.do(err, netlink.LinkSetNsFd(l, int(ns)), linkUp("eth0"), addAddr("eth0", "172.30.0.11/24"), addAddr("eth0", "fd30::11/64"))
	w.out = &pod{name: "outside", ns: ns, v4: netip.MustParseAddr("172.30.0.80"), v6: netip.MustParseAddr("fd30::80")}
	w.pods["outside"] = w.out
	w.do(inside(ns, func() error {
		return errors.Join(linkUp("lo"), linkUp("outside"), addAddr("outside", "172.30.0.80/24"), addAddr("outside", "fd30::80/64"),
			addRoute("10.244.1.0/24", "outside", "172.30.0.11"), addRoute("fd00:10:244:1::/64", "outside", "fd30::11"))
	}))
	w.do(w.AttachUplink("eth0"), running("eth0"), inside(ns, func() error { return running("outside") }))
}

// plug makes a pod.
func (w *world) plug(name string, id uint16, identity uint32, v4, v6 netip.Addr) *pod {
	w.Helper()
	ns, err := netns.New()
	w.do(err, netns.Set(w.node))
	p := &pod{name: name, ns: ns, host: "wr" + name, v4: v4, v6: v6, id: id}
	w.pods[name] = p
	w.do(addPair(p.host, "tmp"+name))
	inner, err := netlink.LinkByName("tmp" + name)
	w.do(err, netlink.LinkSetNsFd(inner, int(ns)), linkUp(p.host))
	var cookie uint64
	w.do(inside(ns, func() error {
		if cookie, err = NetnsCookie(); err != nil {
			return err
		}
		sysctl(w, "net/ipv6/conf/default/accept_dad", "0")
		sysctl(w, "net/ipv4/ip_local_reserved_ports", fmt.Sprintf("%d-%d", UpstreamPortMin, UpstreamPortMax))
		l, err := netlink.LinkByName("tmp" + name)
		if err != nil {
			return err
		}
		mac, _ := net.ParseMAC(macPodText)
		for _, err := range []error{
			netlink.LinkSetName(l, "eth0"), netlink.LinkSetHardwareAddr(l, mac), linkUp("lo"), linkUp("eth0"),
			addAddr("eth0", v4.String()+"/32"), addAddr("eth0", v6.String()+"/128"),
			neighbour("eth0", gateway4), neighbour("eth0", gateway6),
			addRoute("0.0.0.0/0", "eth0", gateway4), addRoute("::/0", "eth0", gateway6),
		} {
			if err != nil {
				return err
			}
		}
		return nil
	}))
	w.do(inside(ns, func() error { return running("eth0") }))
	l, err := netlink.LinkByName(p.host)
	w.do(err)
	mac, _ := net.ParseMAC(macHost)
	w.do(netlink.LinkSetHardwareAddr(l, mac), w.AttachPod(p.host))
	for _, a := range []netip.Addr{v4, v6} {
		w.do(w.Endpoints().Upsert(a, Endpoint{ID: id, Identity: identity, IfIndex: uint32(l.Attrs().Index), NetnsCookie: cookie}))
		w.do(w.IPCache().Upsert(netip.PrefixFrom(a, a.BitLen()), IPCacheEntry{Identity: identity}))
	}
	return p
}

func (w *world) records() []Record {
	var out []Record
	w.Rings().Drain(1<<20, func(_ int, r *Record, _ uint64) {
		if r == nil {
			w.Error("undecodable record")
			return
		}
		out = append(out, *r)
	})
	w.do(w.Rings().Commit(w.Rings().Positions()))
	return out
}

func addPair(name, peer string) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: peer}); err != nil {
		return fmt.Errorf("veth %s: %w", name, err)
	}
	return nil
}

func linkUp(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("link %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("up %s: %w", name, err)
	}
	return nil
}

// running waits until an interface sends: one that came up before its peer drops what it is given until the kernel's link watch has seen to it.
func running(name string) error {
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("link %s: %w", name, err)
		}
		if l.Attrs().OperState == netlink.OperUp {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("link %s: %v after 5 seconds", name, l.Attrs().OperState)
		}
	}
}

func addAddr(name, cidr string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("link %s: %w", name, err)
	}
	a, err := netlink.ParseAddr(cidr)
	if err != nil {
		return err
	}
	const ifaFNodad = 2
	a.Flags = ifaFNodad
	if err := netlink.AddrAdd(l, a); err != nil {
		return fmt.Errorf("address %s: %w", cidr, err)
	}
	return nil
}

func addRoute(cidr, dev, via string) error {
	l, err := netlink.LinkByName(dev)
	if err != nil {
		return fmt.Errorf("link %s: %w", dev, err)
	}
	_, dst, err := net.ParseCIDR(cidr)
	if err != nil {
		return err
	}
	r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: dst}
	if via != "" {
		r.Gw = net.ParseIP(via)
		r.Flags = int(netlink.FLAG_ONLINK)
	} else {
		r.Scope = netlink.SCOPE_LINK
	}
	if err := netlink.RouteAdd(r); err != nil {
		return fmt.Errorf("route %s: %w", cidr, err)
	}
	return nil
}

func neighbour(dev, addr string) error {
	l, err := netlink.LinkByName(dev)
	if err != nil {
		return fmt.Errorf("link %s: %w", dev, err)
	}
	mac, err := net.ParseMAC(macHost)
	if err != nil {
		return err
	}
	n := &netlink.Neigh{LinkIndex: l.Attrs().Index, State: netlink.NUD_PERMANENT, IP: net.ParseIP(addr), HardwareAddr: mac}
	if err := netlink.NeighSet(n); err != nil {
		return fmt.Errorf("neighbour %s: %w", addr, err)
	}
	return nil
}

// echoServer accepts one connection at a time and sends back what comes; it ends with its listener.
func echoServer(w *world, p *pod, addr netip.AddrPort) net.Listener {
	w.Helper()
	var l net.Listener
	w.do(inside(p.ns, func() (err error) {
		l, err = net.Listen("tcp", addr.String())
		return err
	}))
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			io.Copy(c, c)
			c.Close()
		}
	}()
	w.Cleanup(func() { l.Close(); <-done })
	return l
}

// exchange connects, sends text, closes its side and reads the echo.
func exchange(w *world, from *pod, to netip.AddrPort, text string) (local netip.AddrPort) {
	w.Helper()
	var c net.Conn
	w.do(inside(from.ns, func() (err error) {
		c, err = net.DialTimeout("tcp", to.String(), 5*time.Second)
		return err
	}))
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	_, err := io.Copy(c, strings.NewReader(text))
	w.do(err, c.(*net.TCPConn).CloseWrite())
	got, err := io.ReadAll(c)
	w.do(err)
	if string(got) != text {
		w.Fatalf("echo of %d bytes: got %d", len(text), len(got))
	}
	return netip.MustParseAddrPort(c.LocalAddr().String())
}

// One TCP connection has, at each of its two observation points, its flags in order and the same totals, which end in one final record.
func TestTCPBetweenPods(t *testing.T) {
	w := newWorld(t, nil)
	a := w.plug("a", epA, idA, podA4, podA6)
	b := w.plug("b", epB, idB, podB4, podB6)
	const size = 50000
	for _, to := range []netip.AddrPort{at(podB4, 8080), at(podB6, 8080)} {
		t.Run(to.String(), func(t *testing.T) {
			echoServer(w, b, to)
			local := exchange(w, a, to, strings.Repeat("weir ", size/5))
			for _, ep := range []uint16{epA, epB} {
				stats, err := w.Conntrack().Purge(ep)
				w.do(err)
				if stats.Collected != 1 {
					t.Errorf("endpoint %d: %d entries collected, want 1", ep, stats.Collected)
				}
			}
			finals := map[uint16]Record{}
			flags := map[uint16]map[bool]uint8{epA: {}, epB: {}}
			for _, r := range w.records() {
				src, dst := at(r.SrcAddr(), r.Sport), at(r.DstAddr(), r.Dport)
				if r.IsReply() {
					src, dst = dst, src
				}
				if src != local || dst != to {
					t.Errorf("record of %v -> %v, want %v -> %v", src, dst, local, to)
				}
				if want := map[uint16]uint8{epA: DirectionEgress, epB: DirectionIngress}[r.Endpoint]; r.Direction != want {
					t.Errorf("endpoint %d: direction %d, want %d", r.Endpoint, r.Direction, want)
				}
				switch r.Type {
				case RecordFinal:
					finals[r.Endpoint] = r
				case RecordTrace:
					flags[r.Endpoint][r.IsReply()] |= r.TcpFlags
					sent := (r.Endpoint == epA) != r.IsReply()
					if want := map[bool]uint8{true: PointFromEndpoint, false: PointToEndpoint}[sent]; r.Point != want {
						t.Errorf("endpoint %d reply %v: point %d, want %d", r.Endpoint, r.IsReply(), r.Point, want)
					}
				}
			}
			fa, fb := finals[epA], finals[epB]
			if fa.Forward.Packets == 0 || fa.Forward.Packets != fb.Forward.Packets || fa.Forward.Bytes != fb.Forward.Bytes ||
				fa.Reverse.Packets != fb.Reverse.Packets || fa.Reverse.Bytes != fb.Reverse.Bytes {
				t.Errorf("totals differ: %+v %+v, %+v %+v", fa.Forward, fa.Reverse, fb.Forward, fb.Reverse)
			}
			// Every segment has at least 40 bytes of headers, and the data crossed once each way.
			for _, d := range []Traffic{fa.Forward, fa.Reverse} {
				if d.Bytes < size+40*d.Packets {
					t.Errorf("%d bytes in %d packets carry no %d bytes", d.Bytes, d.Packets, size)
				}
			}
			for ep, f := range flags {
				for reply, seen := range f {
					if seen&(syn|ack|fin) != syn|ack|fin {
						t.Errorf("endpoint %d reply %v: flags %02x, want SYN, ACK and FIN", ep, reply, seen)
					}
				}
			}
			if fa.State != uint8(StateClosed) || fa.Known&KnownHandshake == 0 || fa.HandshakeUs == 0 {
				t.Errorf("state %d known %x handshake %d us, want closed and a handshake", fa.State, fa.Known, fa.HandshakeUs)
			}
			if fa.SrcIdentity != idA || fa.DstIdentity != idB || fb.SrcIdentity != idA || fb.DstIdentity != idB {
				t.Errorf("identities %d -> %d and %d -> %d, want %d -> %d", fa.SrcIdentity, fa.DstIdentity, fb.SrcIdentity, fb.DstIdentity, idA, idB)
			}
		})
	}
}

// A packet too big for the way is told to the pod by the node's own stack, through from_host: the connection finds the size that fits.
func TestTooBig(t *testing.T) {
	w := newWorld(t, nil)
	a := w.plug("a", epA, idA, podA4, podA6)
	l, err := netlink.LinkByName("eth0")
	w.do(err, netlink.LinkSetMTU(l, 1400))
	for _, to := range []netip.AddrPort{at(w.out.v4, 9000), at(w.out.v6, 9000)} {
		seenBy(w, "tcp", to)
		exchange(w, a, to, strings.Repeat("weir ", 40000))
		told := false
		for _, r := range w.records() {
			if r.Type == RecordDrop {
				t.Errorf("dropped %v -> %v for reason %d", r.SrcAddr(), r.DstAddr(), r.Reason)
			}
			if r.Type == RecordTrace && r.Reason == TraceRelated && r.Direction == DirectionIngress && r.SrcIdentity == IdentityHost {
				told = true
			}
		}
		if !told {
			t.Errorf("%v: no related record of the node's answer", to)
		}
	}
}
