// SPDX-License-Identifier: Apache-2.0

package differential

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/bpf/datapath"
)

// slots is how many local endpoints a node has: the pods of a world, and those that are no pods.
const slots = 12

// node is a loaded datapath in a network namespace of the test's own. Packets go through its programs by test runs; nothing is on its wires.
type node struct {
	testing.TB
	*datapath.Datapath
	programs     map[string]*ebpf.Program
	ifaces       [slots]uint32
	uplink, host uint32
	context      skbuff
}

func newNode(t testing.TB) *node {
	t.Helper()
	pin := bpffs(t)
	inNetns(t)
	cfg := datapath.DefaultConfig()
	cfg.PinPath, cfg.RingBytes, cfg.ConntrackMax, cfg.IPCacheMax, cfg.EndpointsMax = pin, 2<<20, 4096, 4096, 64
	cfg.NodeIPv4, cfg.NodeIPv6 = netip.MustParseAddr("172.30.0.11"), netip.MustParseAddr("fd30::11")
	d, err := datapath.Load(cfg, slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError})))
	if err != nil {
		t.Fatalf("load: %v", err)
	}
	t.Cleanup(func() {
		if err := errors.Join(d.Close(), datapath.Remove(pin)); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	n := &node{TB: t, Datapath: d, programs: map[string]*ebpf.Program{}}
	for i := range n.ifaces {
		n.ifaces[i] = addVeth(t, fmt.Sprintf("wr%d", i))
	}
	n.uplink, n.host = addVeth(t, "up"), addVeth(t, "weir_net")
	for _, err := range []error{d.AttachPod("wr0"), d.AttachUplink("up"), d.AttachHost("weir_net")} {
		if err != nil {
			t.Fatal(err)
		}
	}
	n.findPrograms(filepath.Join(pin, "links"))
	return n
}

// findPrograms opens the attached programs through their pinned links.
func (n *node) findPrograms(folder string) {
	pins, err := os.ReadDir(folder)
	if err != nil {
		n.Fatal(err)
	}
	for _, pin := range pins {
		l, err := link.LoadPinnedLink(filepath.Join(folder, pin.Name()), nil)
		if err != nil {
			n.Fatalf("link %s: %v", pin.Name(), err)
		}
		info, err := l.Info()
		if err != nil {
			n.Fatalf("link %s: %v", pin.Name(), err)
		}
		p, err := ebpf.NewProgramFromID(info.Program)
		if err != nil {
			n.Fatalf("program of link %s: %v", pin.Name(), err)
		}
		about, err := p.Info()
		if err != nil {
			n.Fatal(err)
		}
		n.programs[about.Name] = p
		if err := l.Close(); err != nil {
			n.Error(err)
		}
		n.Cleanup(func() { p.Close() })
	}
	for _, name := range []string{"from_pod", "from_network", "from_host", "to_network"} {
		if n.programs[name] == nil {
			n.Fatalf("no link of %s in %s", name, folder)
		}
	}
}

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

// inNetns runs the rest of the test on a thread of its own network namespace.
func inNetns(t testing.TB) {
	t.Helper()
	runtime.LockOSThread()
	was, err := netns.Get()
	if err != nil {
		t.Fatalf("network namespace: %v", err)
	}
	ns, err := netns.New()
	if err != nil {
		t.Fatalf("new network namespace: %v", err)
	}
	t.Cleanup(func() {
		if err := errors.Join(netns.Set(was), ns.Close(), was.Close()); err != nil {
			t.Errorf("leave network namespace: %v", err)
		}
		runtime.UnlockOSThread()
	})
}

func addVeth(t testing.TB, name string) uint32 {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: name + "p"}); err != nil {
		t.Fatalf("veth %s: %v", name, err)
	}
	l, err := net.InterfaceByName(name)
	if err != nil {
		t.Fatalf("veth %s: %v", name, err)
	}
	return uint32(l.Index)
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

// What a tc program returns.
const (
	actOK       = 0
	actShot     = 2
	actRedirect = 7
)

// run sends a packet through a program as if it had come at an interface.
func (n *node) run(program string, ifindex uint32, packet []byte) uint32 {
	n.context = skbuff{Ifindex: ifindex, IngressIfindex: ifindex}
	code, err := n.programs[program].Run(&ebpf.RunOptions{Data: packet, Context: &n.context})
	if err != nil {
		n.Fatalf("run %s: %v", program, err)
	}
	return code
}

// told is what a verdict record says.
type told struct {
	verdict datapath.PolicyVerdict
	rule    uint32
}

// at is where a verdict was made.
type at struct {
	endpoint  uint16
	direction uint8
}

// drain takes all records; it returns the verdicts of policy, and the reasons of drops.
func (n *node) drain() (verdicts map[at]told, drops []uint8) {
	verdicts = map[at]told{}
	n.Rings().Drain(1<<20, func(_ int, r *datapath.Record, _ uint64) {
		switch {
		case r == nil:
			n.Error("undecodable record")
		case r.Type == datapath.RecordVerdict:
			verdicts[at{r.Endpoint, r.Direction}] = told{datapath.PolicyVerdict(r.Verdict), r.Rule}
		case r.Type == datapath.RecordDrop:
			drops = append(drops, r.Reason)
		}
	})
	if err := n.Rings().Commit(n.Rings().Positions()); err != nil {
		n.Fatal(err)
	}
	return verdicts, drops
}
