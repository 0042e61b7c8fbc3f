// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// bpffs mounts a bpf file system of the test's own.
func bpffs(t testing.TB) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("these tests load eBPF programs and make network namespaces: run them as root")
	}
	dir := t.TempDir()
	if err := unix.Mount("bpf", dir, "bpf", 0, ""); err != nil {
		t.Fatalf("mount bpf file system: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount bpf file system: %v", err)
		}
	})
	return filepath.Join(dir, "node")
}

func smallConfig(pin string) Config {
	cfg := DefaultConfig()
	cfg.PinPath = pin
	cfg.RingBytes = 2 << 20
	cfg.ConntrackMax = 4096
	cfg.IPCacheMax = 1024
	cfg.EndpointsMax = 64
	cfg.ServicesMax = 64
	cfg.BackendsMax = 256
	cfg.SourceRangesMax, cfg.MaglevMax, cfg.MaglevTableSize, cfg.AffinityMax = 64, 16, 251, 64
	cfg.ServiceConnectionsMax = 256
	cfg.DropsMax = 64
	return cfg
}

func load(t testing.TB, cfg Config) *Datapath {
	t.Helper()
	d, err := Load(cfg, slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError})))
	if err != nil {
		var ve *ebpf.VerifierError
		if errors.As(err, &ve) {
			t.Fatalf("load: %+v", ve)
		}
		t.Fatalf("load: %v", err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return d
}

// Addresses of the unit tests' cluster.
var (
	podA4, podA6 = netip.MustParseAddr("10.244.1.5"), netip.MustParseAddr("fd00:10:244:1::5")
	podB4, podB6 = netip.MustParseAddr("10.244.1.6"), netip.MustParseAddr("fd00:10:244:1::6")
	far4, far6   = netip.MustParseAddr("10.244.2.7"), netip.MustParseAddr("fd00:10:244:2::7")
	out4, out6   = netip.MustParseAddr("192.0.2.80"), netip.MustParseAddr("2001:db8::80")
	node4, node6 = netip.MustParseAddr("172.30.0.11"), netip.MustParseAddr("fd30::11")
	gone4        = netip.MustParseAddr("10.244.1.99")
	vip4         = netip.MustParseAddr("10.96.0.10")
)

const (
	epA, epB   = 7, 8
	idA, idB   = 1000, 2000
	idFar      = 3000
	macPodText = "02:00:00:00:00:0a"
)

// bench is a loaded datapath with two pods behind two interfaces of a network namespace, driven by program runs.
type bench struct {
	testing.TB
	*Datapath
	ns               netns.NsHandle
	ifA, ifB, uplink uint32
}

// inNetns runs the rest of the test on a thread of its own network namespace.
func inNetns(t testing.TB) netns.NsHandle {
	t.Helper()
	runtime.LockOSThread()
	host, err := netns.Get()
	if err != nil {
		t.Fatalf("network namespace: %v", err)
	}
	ns, err := netns.New()
	if err != nil {
		t.Fatalf("new network namespace: %v", err)
	}
	t.Cleanup(func() {
		if err := netns.Set(host); err != nil {
			t.Errorf("leave network namespace: %v", err)
		}
		ns.Close()
		host.Close()
		runtime.UnlockOSThread()
	})
	return ns
}

// inside runs f in a network namespace, on a thread that goes nowhere else meanwhile: subtests are goroutines of their own.
func inside(ns netns.NsHandle, f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	was, err := netns.Get()
	if err != nil {
		return err
	}
	defer was.Close()
	if err := netns.Set(ns); err != nil {
		return err
	}
	return errors.Join(f(), netns.Set(was))
}

func addVeth(t testing.TB, name, peer string) uint32 {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: peer}); err != nil {
		t.Fatalf("veth %s: %v", name, err)
	}
	l, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatalf("veth %s: %v", name, err)
	}
	return uint32(l.Attrs().Index)
}

func newBench(t testing.TB, change func(*Config)) *bench {
	t.Helper()
	pin := bpffs(t)
	ns := inNetns(t)
	cfg := smallConfig(pin)
	if change != nil {
		change(&cfg)
	}
	b := &bench{TB: t, Datapath: load(t, cfg), ns: ns}
	b.ifA, b.ifB, b.uplink = addVeth(t, "wra", "pa"), addVeth(t, "wrb", "pb"), addVeth(t, "up", "upp")
	mac, _ := net.ParseMAC(macPodText)
	for _, ep := range []struct {
		addr netip.Addr
		ep   Endpoint
	}{
		{podA4, Endpoint{ID: epA, Identity: idA, IfIndex: b.ifA, MAC: mac}},
		{podA6, Endpoint{ID: epA, Identity: idA, IfIndex: b.ifA, MAC: mac}},
		{podB4, Endpoint{ID: epB, Identity: idB, IfIndex: b.ifB, MAC: mac}},
		{podB6, Endpoint{ID: epB, Identity: idB, IfIndex: b.ifB, MAC: mac}},
	} {
		if err := b.Endpoints().Upsert(ep.addr, ep.ep); err != nil {
			t.Fatal(err)
		}
	}
	for prefix, entry := range map[string]IPCacheEntry{
		"10.244.1.0/24":        {Identity: 3, Flags: IPCacheLocalPods},
		"fd00:10:244:1::/64":   {Identity: 3, Flags: IPCacheLocalPods},
		"10.244.1.5/32":        {Identity: idA},
		"10.244.1.6/32":        {Identity: idB},
		"fd00:10:244:1::5/128": {Identity: idA},
		"fd00:10:244:1::6/128": {Identity: idB},
		"10.244.2.7/32":        {Identity: idFar, NodeAddr: netip.MustParseAddr("172.30.0.12")},
		"fd00:10:244:2::7/128": {Identity: idFar, NodeAddr: netip.MustParseAddr("fd30::12")},
		"172.30.0.11/32":       {Identity: IdentityHost},
		"fd30::11/128":         {Identity: IdentityHost},
		"10.96.0.0/16":         {Identity: IdentityWorldIPv4, Flags: IPCacheServices},
		"fd00:10:96::/112":     {Identity: IdentityWorldIPv6, Flags: IPCacheServices},
	} {
		if err := b.IPCache().Upsert(netip.MustParsePrefix(prefix), entry); err != nil {
			t.Fatal(err)
		}
	}
	return b
}

// skbuff is struct __sk_buff, for the context of a program run.
type skbuff struct {
	Len, PktType, Mark, QueueMapping, Protocol, VlanPresent, VlanTCI, VlanProto, Priority uint32
	IngressIfindex, Ifindex, TCIndex                                                      uint32
	CB                                                                                    [5]uint32
	Hash, TCClassid, Data, DataEnd, NapiID, Family, RemoteIP4, LocalIP4                   uint32
	RemoteIP6, LocalIP6                                                                   [4]uint32
	RemotePort, LocalPort, DataMeta                                                       uint32
	FlowKeys                                                                              uint64
	Tstamp                                                                                uint64
	WireLen, GSOSegs                                                                      uint32
	SK                                                                                    uint64
	GSOSize                                                                               uint32
	TstampType                                                                            uint32
	HWTstamp                                                                              uint64
}

// verdict is what a run gave.
type verdict struct {
	code     uint32
	redirect uint32 // ifindex
	mark     uint32
	out      []byte
}

const (
	actOK       = 0
	actShot     = 2
	actRedirect = 7
)

type runOption func(*skbuff)

func gso(size, segs uint32) runOption {
	return func(s *skbuff) { s.GSOSize, s.GSOSegs = size, segs }
}

func withMark(m uint32) runOption { return func(s *skbuff) { s.Mark = m } }

// run sends a packet through a program as if it had come at an interface.
func (b *bench) run(program string, ifindex uint32, packet []byte, opts ...runOption) verdict {
	b.Helper()
	in := skbuff{Ifindex: ifindex, IngressIfindex: ifindex}
	for _, o := range opts {
		o(&in)
	}
	var out skbuff
	data := make([]byte, len(packet)+256)
	ro := &ebpf.RunOptions{Data: packet, DataOut: data, Context: &in, ContextOut: &out}
	var code uint32
	err := inside(b.ns, func() (err error) {
		code, err = b.coll.Programs[program].Run(ro)
		return err
	})
	if err != nil {
		b.Fatalf("run %s: %v", program, err)
	}
	v := verdict{code: code, mark: out.Mark, out: ro.DataOut}
	if code == actRedirect {
		v.redirect = out.CB[0]
	}
	return v
}

// records drains the rings.
func (b *bench) records() []Record {
	var out []Record
	b.Rings().Drain(1<<20, func(_ int, r *Record, _ uint64) {
		if r == nil {
			b.Error("undecodable record")
			return
		}
		out = append(out, *r)
	})
	if err := b.Rings().Commit(b.Rings().Positions()); err != nil {
		b.Fatal(err)
	}
	return out
}

func (b *bench) counters() Counters {
	b.Helper()
	c, err := b.Counters()
	if err != nil {
		b.Fatal(err)
	}
	return c
}

func (b *bench) conns() []Conn {
	b.Helper()
	var out []Conn
	if err := b.Conntrack().List(func(c Conn) bool { out = append(out, c); return true }); err != nil {
		b.Fatal(err)
	}
	return out
}

// packet serialises layers behind an Ethernet header.
func packet(t testing.TB, ls ...gopacket.SerializableLayer) []byte {
	t.Helper()
	eth := &layers.Ethernet{
		SrcMAC: net.HardwareAddr{2, 0, 0, 0, 0, 0xa}, DstMAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, EthernetType: layers.EthernetTypeIPv4,
	}
	switch ls[0].(type) {
	case *layers.IPv6:
		eth.EthernetType = layers.EthernetTypeIPv6
	case *layers.ARP:
		eth.EthernetType = layers.EthernetTypeARP
	}
	buf := gopacket.NewSerializeBuffer()
	opts := gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}
	if err := gopacket.SerializeLayers(buf, opts, append([]gopacket.SerializableLayer{eth}, ls...)...); err != nil {
		t.Fatalf("serialise packet: %v", err)
	}
	return buf.Bytes()
}

// ip returns the IP layer between two addresses of one family.
func ip(src, dst netip.Addr, proto layers.IPProtocol) gopacket.SerializableLayer {
	if src.Is4() {
		return &layers.IPv4{Version: 4, IHL: 5, TTL: 64, Id: 1, Protocol: proto, SrcIP: src.AsSlice(), DstIP: dst.AsSlice()}
	}
	return &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: proto, SrcIP: src.AsSlice(), DstIP: dst.AsSlice()}
}

// tcp makes a segment; flags are as in the header.
func tcp(t testing.TB, src, dst netip.AddrPort, flags uint8, seq, ack uint32, payload int) []byte {
	t.Helper()
	l := &layers.TCP{
		SrcPort: layers.TCPPort(src.Port()), DstPort: layers.TCPPort(dst.Port()), Seq: seq, Ack: ack, Window: 1000,
		FIN: flags&1 != 0, SYN: flags&2 != 0, RST: flags&4 != 0, PSH: flags&8 != 0, ACK: flags&16 != 0,
	}
	network := ip(src.Addr(), dst.Addr(), layers.IPProtocolTCP)
	if err := l.SetNetworkLayerForChecksum(network.(gopacket.NetworkLayer)); err != nil {
		t.Fatal(err)
	}
	return packet(t, network, l, gopacket.Payload(make([]byte, payload)))
}

func udp(t testing.TB, src, dst netip.AddrPort, payload int) []byte {
	t.Helper()
	l := &layers.UDP{SrcPort: layers.UDPPort(src.Port()), DstPort: layers.UDPPort(dst.Port())}
	network := ip(src.Addr(), dst.Addr(), layers.IPProtocolUDP)
	if err := l.SetNetworkLayerForChecksum(network.(gopacket.NetworkLayer)); err != nil {
		t.Fatal(err)
	}
	return packet(t, network, l, gopacket.Payload(make([]byte, payload)))
}

const (
	fin = 1
	syn = 2
	rst = 4
	psh = 8
	ack = 16
)

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

// sysctl sets a value of the current network namespace, through the thread's own view of /proc.
func sysctl(t testing.TB, name, value string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0o644); err != nil {
		t.Fatalf("sysctl: %v", err)
	}
}
