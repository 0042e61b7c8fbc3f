// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/pflag"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/weirmesh/weir/bpf/datapath"
	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	"github.com/weirmesh/weir/services/agent/internal/netdev"
)

// childEnv makes the test's binary a weir-dns: a process is in a network namespace as a whole, goroutines are not.
const childEnv = "WEIR_TEST_IS_DNS"

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) == "" {
		os.Exit(m.Run())
	}
	config := DefaultConfig()
	set := pflag.NewFlagSet("weir-dns", pflag.ExitOnError)
	config.Add(set)
	_ = set.Parse(os.Args[1:]) // it exits
	service, err := New(config, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err == nil {
		ctx, cancel := context.WithCancel(context.Background())
		end := make(chan os.Signal, 1)
		go func() { <-end; cancel() }()
		notify(end)
		err = service.Run(ctx)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// world is a node in a network namespace with the real datapath, two pods, a host outside of the cluster, and a weir-dns.
type world struct {
	testing.TB
	*datapath.Datapath
	pin, dir   string
	namespaces []netns.NsHandle
	node       netns.NsHandle
	client     *host // a pod
	server     *host // a pod
	outside    *host
	agent      *fakeAgent
	dns        *process
	unload     func()
}

type host struct {
	ns     netns.NsHandle
	v4, v6 netip.Addr
	// Of a pod.
	device   string
	endpoint datapath.Endpoint
}

func (h *host) addr(v6 bool) netip.Addr {
	if v6 {
		return h.v6
	}
	return h.v4
}

const (
	clientID, serverID             = 5, 6
	clientIdentity, serverIdentity = 1005, 1006
	policyNumber                   = 7
	slot                           = 3
	dnsPort                        = 10053
	macHost                        = "02:00:00:00:00:01"
	macPod                         = "02:00:00:00:00:02"
)

func newWorld(t testing.TB) *world {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("these tests load eBPF programs and make network namespaces: run them as root")
	}
	w := &world{TB: t, dir: t.TempDir()}
	mount := t.TempDir()
	w.do(unix.Mount("bpf", mount, "bpf", 0, ""))
	t.Cleanup(func() { w.do(unix.Unmount(mount, unix.MNT_DETACH)) })
	w.pin = filepath.Join(mount, "node")
	runtime.LockOSThread()
	home, err := netns.Get()
	w.do(err)
	t.Cleanup(func() {
		// After the datapath: devices that vanish would get in its way.
		for _, ns := range w.namespaces {
			w.do(ns.Close())
		}
		w.do(netns.Set(home), home.Close())
		runtime.UnlockOSThread()
	})
	w.node = w.namespace()
	w.load()
	sysctls := map[string]string{"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1", "net/ipv4/conf/all/rp_filter": "0",
		"net/ipv4/conf/default/rp_filter": "0", "net/ipv6/conf/default/accept_dad": "0", "net/ipv6/conf/all/accept_dad": "0"}
	w.do(setSysctls(sysctls), linkUp("lo"))
	w.plugOutside()
	uplink, err := netdev.FindUplink("eth0")
	w.do(err, netdev.SetupNode(uplink), netdev.SetupProxy(), running(netdev.HostLink))
	w.do(addRoute("10.244.1.0/24", "weir_host", ""), addRoute("fd00:10:244:1::/64", "weir_host", ""))
	w.attachNode()
	w.client = w.plug("client", clientID, clientIdentity, "10.244.1.5", "fd00:10:244:1::5")
	w.server = w.plug("server", serverID, serverIdentity, "10.244.1.6", "fd00:10:244:1::6")
	w.do(w.Slots().Set(slot, dnsPort))
	w.policy()
	w.agent = newFakeAgent(w)
	w.dns = w.start()
	return w
}

// reload removes the datapath and puts a new one in its place, as an agent does that was cleaned up.
func (w *world) reload() {
	w.Helper()
	w.unload()
	w.load()
	w.do(netns.Set(w.node))
	w.attachNode()
	w.do(w.AttachUplink("eth0"))
	w.attachPod(w.client)
	w.attachPod(w.server)
	w.do(w.Slots().Set(slot, dnsPort))
	w.policy()
}

// attachNode makes what the maps say of the node itself.
func (w *world) attachNode() {
	w.Helper()
	w.do(w.AttachHost(netdev.NetLink))
	for prefix, entry := range map[string]datapath.IPCacheEntry{
		"10.244.1.0/24": {Flags: datapath.IPCacheLocalPods}, "fd00:10:244:1::/64": {Flags: datapath.IPCacheLocalPods},
		"172.30.0.11/32": {Identity: datapath.IdentityHost}, "fd30::11/128": {Identity: datapath.IdentityHost},
	} {
		w.do(w.IPCache().Upsert(netip.MustParsePrefix(prefix), entry))
	}
}

func (w *world) load() {
	w.Helper()
	cfg := datapath.DefaultConfig()
	cfg.PinPath, cfg.RingBytes, cfg.ConntrackMax = w.pin, 2<<20, 16384
	cfg.NodeIPv4, cfg.NodeIPv6 = netip.MustParseAddr("172.30.0.11"), netip.MustParseAddr("fd30::11")
	d, err := datapath.Load(cfg, slog.New(slog.DiscardHandler))
	w.do(err)
	w.Datapath = d
	w.unload = sync.OnceFunc(func() { w.do(d.Close(), datapath.Remove(w.pin)) })
	w.Cleanup(w.unload)
}

// policy makes the client's: DNS to the pod and to outside through the slot, by any protocol; nothing else.
func (w *world) policy() {
	w.Helper()
	var ranges []datapath.PolicyRange
	for _, proto := range []uint8{protoTCP, protoUDP} {
		ranges = append(ranges, datapath.PolicyRange{Proto: proto, First: 53, Last: 53, Verdict: datapath.PolicyRedirect, Slot: slot, Rule: 1})
	}
	w.do(w.Policies().SetPeer(policyNumber, 0, ranges), w.Policies().SetEndpoint(clientID, datapath.EndpointPolicy{Egress: policyNumber}),
		w.Policies().Bump())
}

const (
	protoTCP = 6
	protoUDP = 17
)

// do fails the test on the first error.
func (w *world) do(errs ...error) {
	w.Helper()
	for _, err := range errs {
		if err != nil {
			w.Fatal(err)
		}
	}
}

// namespace makes a network namespace; the thread is in it afterwards.
func (w *world) namespace() netns.NsHandle {
	w.Helper()
	ns, err := netns.New()
	w.do(err)
	w.namespaces = append(w.namespaces, ns)
	return ns
}

// inside runs f in a network namespace.
func inside(ns netns.NsHandle, f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	was, err := netns.Get()
	if err != nil {
		return err
	}
	defer func() { _ = was.Close() }()
	if err := netns.Set(ns); err != nil {
		return err
	}
	return errors.Join(f(), netns.Set(was))
}

func (w *world) plugOutside() {
	w.Helper()
	ns := w.namespace()
	w.do(netns.Set(w.node), addPair("eth0", "outside"))
	l, err := netlink.LinkByName("outside")
	w.do(err, netlink.LinkSetNsFd(l, int(ns)), linkUp("eth0"), addAddr("eth0", "172.30.0.11/24"), addAddr("eth0", "fd30::11/64"))
	w.outside = &host{ns: ns, v4: netip.MustParseAddr("172.30.0.80"), v6: netip.MustParseAddr("fd30::80")}
	w.do(inside(ns, func() error {
		return errors.Join(linkUp("lo"), linkUp("outside"), addAddr("outside", "172.30.0.80/24"), addAddr("outside", "fd30::80/64"),
			addAddr("outside", "172.30.0.81/24"), addAddr("outside", "fd30::81/64"),
			addRoute("10.244.1.0/24", "outside", "172.30.0.11"), addRoute("fd00:10:244:1::/64", "outside", "fd30::11"))
	}))
	w.do(w.AttachUplink("eth0"), running("eth0"), inside(ns, func() error { return running("outside") }))
}

func (w *world) plug(name string, id uint16, identity uint32, v4, v6 string) *host {
	w.Helper()
	ns := w.namespace()
	device := "wr" + name
	w.do(netns.Set(w.node), addPair(device, "tmp"+name))
	inner, err := netlink.LinkByName("tmp" + name)
	w.do(err, netlink.LinkSetNsFd(inner, int(ns)), linkUp(device))
	var cookie uint64
	w.do(inside(ns, func() error {
		if cookie, err = datapath.NetnsCookie(); err != nil {
			return err
		}
		l, err := netlink.LinkByName("tmp" + name)
		if err != nil {
			return err
		}
		mac, err := net.ParseMAC(macPod)
		if err != nil {
			return err
		}
		for _, f := range []func() error{
			func() error {
				return setSysctls(map[string]string{"net/ipv6/conf/default/accept_dad": "0", "net/ipv4/ip_local_reserved_ports": "52000-60999"})
			},
			func() error { return netlink.LinkSetName(l, "eth0") }, func() error { return netlink.LinkSetHardwareAddr(l, mac) },
			func() error { return linkUp("lo") }, func() error { return linkUp("eth0") },
			func() error { return addAddr("eth0", v4+"/32") }, func() error { return addAddr("eth0", v6+"/128") },
			func() error { return neighbour("eth0", "169.254.1.1") }, func() error { return neighbour("eth0", "fe80::1") },
			func() error { return addRoute("0.0.0.0/0", "eth0", "169.254.1.1") }, func() error { return addRoute("::/0", "eth0", "fe80::1") },
			func() error { return running("eth0") },
		} {
			if err := f(); err != nil {
				return err
			}
		}
		return nil
	}))
	l, err := netlink.LinkByName(device)
	w.do(err)
	mac, err := net.ParseMAC(macHost)
	w.do(err, netlink.LinkSetHardwareAddr(l, mac))
	h := &host{ns: ns, v4: netip.MustParseAddr(v4), v6: netip.MustParseAddr(v6), device: device,
		endpoint: datapath.Endpoint{ID: id, Identity: identity, IfIndex: uint32(l.Attrs().Index), NetnsCookie: cookie}}
	w.attachPod(h)
	return h
}

func (w *world) attachPod(h *host) {
	w.Helper()
	w.do(w.AttachPod(h.device))
	for _, a := range []netip.Addr{h.v4, h.v6} {
		w.do(w.Endpoints().Upsert(a, h.endpoint))
		w.do(w.IPCache().Upsert(netip.PrefixFrom(a, a.BitLen()), datapath.IPCacheEntry{Identity: h.endpoint.Identity}))
	}
}

// process is a running weir-dns.
type process struct {
	*exec.Cmd
	ended chan error
}

// start runs a weir-dns in the node's namespace and waits until it serves.
func (w *world) start(args ...string) *process {
	w.Helper()
	exe, err := os.Executable()
	w.do(err)
	socket := filepath.Join(w.dir, "dns.sock")
	args = append([]string{"--node", "n1", "--bpffs", w.pin, "--agent", w.agent.path, "--state-dir", filepath.Join(w.dir, "state"), "--socket", socket}, args...)
	p := &process{Cmd: exec.Command(exe, args...), ended: make(chan error, 1)}
	p.Env = append(os.Environ(), childEnv+"=1")
	p.Stderr = &logWriter{TB: w}
	p.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	w.do(inside(w.node, p.Start))
	go func() { p.ended <- p.Wait() }()
	w.Cleanup(func() { w.stop(p, syscall.SIGKILL) })
	w.until("weir-dns listens", func() bool {
		var c net.Conn
		err := inside(w.node, func() (err error) {
			c, err = net.Dial("tcp", fmt.Sprintf("[::1]:%d", dnsPort))
			return err
		})
		if err == nil {
			_ = c.Close()
		}
		return err == nil
	})
	return p
}

// stop ends a process by a signal.
func (w *world) stop(p *process, s syscall.Signal) {
	w.Helper()
	if err := p.Process.Signal(s); errors.Is(err, os.ErrProcessDone) {
		return
	}
	if err := <-p.ended; err != nil && s != syscall.SIGKILL {
		w.Errorf("weir-dns ended: %v", err)
	}
}

// until waits for something to become true.
func (w *world) until(what string, f func() bool) {
	w.Helper()
	for deadline := time.Now().Add(time.Minute); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			w.Fatalf("waited 15 s until %s", what)
		}
	}
}

// logWriter shows the log of a process if the test fails.
type logWriter struct {
	testing.TB
	mu   sync.Mutex
	over bool
}

func (l *logWriter) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.over {
		l.Log(strings.TrimSuffix(string(b), "\n"))
	}
	return len(b), nil
}

// fakeAgent is the agent's end.
type fakeAgent struct {
	agentv1.UnimplementedDNSServiceServer
	w    *world
	path string

	mu      sync.Mutex
	server  *grpc.Server
	rules   *agentv1.SyncDNSResponse // sent to every new stream, as the whole
	streams map[chan *agentv1.SyncDNSResponse]struct{}
	acked   uint64
	last    uint64
	records []*agentv1.DNSRecord
	lost    uint64
}

func newFakeAgent(w *world) *fakeAgent {
	a := &fakeAgent{w: w, path: filepath.Join(w.dir, "agent.sock"), streams: map[chan *agentv1.SyncDNSResponse]struct{}{},
		rules: &agentv1.SyncDNSResponse{Revision: 1, Synced: true}}
	a.serve()
	w.Cleanup(a.stop)
	return a
}

func (a *fakeAgent) serve() {
	ln, err := net.Listen("unix", a.path)
	a.w.do(err)
	s := grpc.NewServer()
	agentv1.RegisterDNSServiceServer(s, a)
	a.mu.Lock()
	a.server = s
	a.mu.Unlock()
	go func() { _ = s.Serve(ln) }() // it ends with stop
}

func (a *fakeAgent) stop() {
	a.mu.Lock()
	s := a.server
	a.mu.Unlock()
	s.Stop()
}

// set changes the rules and waits until weir-dns says that the maps hold them.
func (a *fakeAgent) set(filters []*agentv1.DNSFilter, policies []*agentv1.DNSPolicy) {
	a.w.Helper()
	a.mu.Lock()
	revision := a.rules.GetRevision() + 1
	change := &agentv1.SyncDNSResponse{Revision: revision, Filters: filters, Policies: policies}
	for _, f := range a.rules.GetFilters() {
		if !slices.ContainsFunc(filters, func(x *agentv1.DNSFilter) bool { return x.GetSlot() == f.GetSlot() }) {
			change.RemovedFilters = append(change.RemovedFilters, f.GetSlot())
		}
	}
	for _, p := range a.rules.GetPolicies() {
		if !slices.ContainsFunc(policies, func(x *agentv1.DNSPolicy) bool { return x.GetPolicy() == p.GetPolicy() }) {
			change.RemovedPolicies = append(change.RemovedPolicies, p.GetPolicy())
		}
	}
	a.rules = &agentv1.SyncDNSResponse{Revision: revision, Filters: filters, Policies: policies, Synced: true}
	for s := range a.streams {
		s <- change
	}
	a.mu.Unlock()
	a.w.until(fmt.Sprintf("revision %d is acknowledged", revision), func() bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		return a.acked >= revision
	})
}

// SyncDNS implements the service.
func (a *fakeAgent) SyncDNS(stream agentv1.DNSService_SyncDNSServer) error {
	changes := make(chan *agentv1.SyncDNSResponse, 16)
	a.mu.Lock()
	a.streams[changes] = struct{}{}
	changes <- a.rules
	a.mu.Unlock()
	go func() {
		for {
			m, err := stream.Recv()
			if err != nil {
				a.mu.Lock()
				delete(a.streams, changes)
				close(changes)
				a.mu.Unlock()
				return
			}
			a.mu.Lock()
			a.acked = max(a.acked, m.GetAck())
			a.mu.Unlock()
		}
	}()
	for m := range changes {
		if err := stream.Send(m); err != nil {
			return err
		}
	}
	return nil
}

// SendRecords implements the service.
func (a *fakeAgent) SendRecords(stream agentv1.DNSService_SendRecordsServer) error {
	for {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		last := m.GetFirst() + uint64(len(m.GetRecords())) - 1
		a.mu.Lock()
		for i, r := range m.GetRecords() {
			if m.GetFirst()+uint64(i) > a.last {
				a.records = append(a.records, r)
			}
		}
		a.last = max(a.last, last)
		a.lost += m.GetLost()
		a.mu.Unlock()
		if err := stream.Send(&agentv1.SendRecordsResponse{Last: last}); err != nil {
			return err
		}
	}
}

// take waits for n records and returns and forgets them.
func (a *fakeAgent) take(n int) []*agentv1.DNSRecord {
	a.w.Helper()
	a.w.until(fmt.Sprintf("there are %d records", n), func() bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		return len(a.records) >= n
	})
	a.mu.Lock()
	defer a.mu.Unlock()
	out := a.records
	a.records = nil
	return out
}

// drops shows what the kernel dropped.
func (w *world) drops() {
	w.Rings().Drain(1<<20, func(_ int, r *datapath.Record, _ uint64) {
		if r != nil && r.Type == datapath.RecordDrop {
			w.Logf("dropped %v:%d -> %v:%d, protocol %d, reason %d, endpoint %d, point %d", r.SrcAddr(), r.Sport, r.DstAddr(), r.Dport, r.Proto, r.Reason, r.Endpoint, r.Point)
		}
	})
	w.do(w.Rings().Commit(w.Rings().Positions()))
}
