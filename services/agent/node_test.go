// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/bpf/datapath"
	flowpb "github.com/weirmesh/weir/gen/flow"
	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	relayv1 "github.com/weirmesh/weir/gen/weir/relay/v1"
	"github.com/weirmesh/weir/internal/batch/batchtest"
	"github.com/weirmesh/weir/internal/spiffe"
	"github.com/weirmesh/weir/services/agent/internal/netdev"
	"github.com/weirmesh/weir/services/agent/internal/testns"
)

// central is a policy service with one node and its pods, and a relay that keeps what it gets.
type central struct {
	policyv1.UnimplementedPolicyServiceServer
	relayv1.UnimplementedRelayServiceServer
	pods []string

	updates chan *policyv1.Update
	acks    chan uint64
	slots   chan *policyv1.SlotReport // the latest

	mu       sync.Mutex
	pushed   []*policyv1.Resource
	revision uint64
	away     bool // the relay takes nothing
	batches  map[string]*flowv1.Batch
	changed  chan struct{}
}

func (c *central) Sync(stream grpc.BidiStreamingServer[policyv1.SyncRequest, policyv1.SyncResponse]) error {
	u := &policyv1.Update{Revision: 1, Upserts: []*policyv1.Resource{
		{Resource: &policyv1.Resource_Node{Node: &policyv1.Node{Name: "node-1", Addresses: []string{"172.30.0.11"}, PodCidrs: []string{"10.244.1.0/24"}}}},
		{Resource: &policyv1.Resource_Identity{Identity: &policyv1.Identity{Number: 300, Labels: []string{"k8s:app=test"}}}},
	}}
	subjects := []string{"health", "host"}
	for _, p := range c.pods {
		u.Upserts = append(u.Upserts, &policyv1.Resource{Resource: &policyv1.Resource_Pod{Pod: &policyv1.Pod{Uid: "uid-" + p, Namespace: "default", Name: p, Identity: 300}}})
		subjects = append(subjects, "uid-"+p)
	}
	for _, s := range subjects {
		u.Upserts = append(u.Upserts, &policyv1.Resource{Resource: &policyv1.Resource_Subject{Subject: &policyv1.Subject{Key: s}}})
	}
	c.mu.Lock()
	// What was pushed before is part of the state.
	u.Upserts = append(u.Upserts, c.pushed...)
	c.mu.Unlock()
	for _, r := range []*policyv1.SyncResponse{{Message: &policyv1.SyncResponse_Update{Update: u}},
		{Message: &policyv1.SyncResponse_Synced{Synced: &policyv1.Synced{Revision: 2}}}} {
		if err := stream.Send(r); err != nil {
			return err
		}
	}
	requests, failed := make(chan *policyv1.SyncRequest), make(chan error, 1)
	go func() {
		for {
			m, err := stream.Recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case requests <- m:
			case <-stream.Context().Done():
				return
			}
		}
	}()
	for {
		select {
		case err := <-failed:
			return err
		case u := <-c.updates:
			if err := stream.Send(&policyv1.SyncResponse{Message: &policyv1.SyncResponse_Update{Update: u}}); err != nil {
				return err
			}
		case m := <-requests:
			if r := m.GetSlots(); r != nil {
				select {
				case <-c.slots:
				default:
				}
				c.slots <- r
			}
			if ack := m.GetAck(); ack > 2 {
				c.acks <- ack
			}
			if r := m.GetRegister(); r != nil {
				err := stream.Send(&policyv1.SyncResponse{Message: &policyv1.SyncResponse_Spread{Spread: &policyv1.Spread{Uid: r.Uid}}})
				if err != nil {
					return err
				}
			}
		}
	}
}

// push sends upserts and waits until the agent has them in its maps.
func (c *central) push(t testing.TB, upserts ...*policyv1.Resource) {
	t.Helper()
	c.mu.Lock()
	c.pushed = append(c.pushed, upserts...)
	c.revision++
	u := &policyv1.Update{Revision: c.revision + 2, Upserts: upserts}
	c.mu.Unlock()
	patience := time.After(time.Minute)
	select {
	case c.updates <- u:
	case <-patience:
		t.Fatal("no agent takes an update")
	}
	for {
		select {
		case ack := <-c.acks:
			if ack >= u.Revision {
				return
			}
		case <-patience:
			t.Fatalf("revision %d was not acknowledged", u.Revision)
		}
	}
}

func (c *central) Publish(stream grpc.BidiStreamingServer[relayv1.PublishRequest, relayv1.PublishResponse]) error {
	if err := stream.SendHeader(nil); err != nil {
		return err
	}
	for {
		r, err := stream.Recv()
		if err != nil {
			return err
		}
		b, err := batchtest.Decode(r.Batch)
		if err != nil {
			return status.Error(codes.InvalidArgument, err.Error())
		}
		c.mu.Lock()
		if c.away {
			c.mu.Unlock()
			return status.Error(codes.Unavailable, "away")
		}
		c.batches[fmt.Sprint(b.Header.Epoch, "/", b.Header.First)] = b
		close(c.changed)
		c.changed = make(chan struct{})
		c.mu.Unlock()
		if err := stream.Send(&relayv1.PublishResponse{Epoch: b.Header.Epoch, First: b.Header.First}); err != nil {
			return err
		}
	}
}

func (c *central) setAway(away bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.away = away
}

// account is what the relay has received.
type account struct {
	flows, kernelLost uint64
	epochs            map[uint64]uint64 // numbers received
	restarts          map[uint64]uint64 // last number, by old epoch
	high              map[uint64]uint64 // highest number received
	named             map[string]int    // flows by source and destination pod
	decided           []*flowpb.Flow    // drops and verdicts
	requests          []*flowpb.Flow    // of proxies
	notices           map[string]int    // events of our own kinds
	started           int
}

func (c *central) account(t testing.TB) account {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	a := account{epochs: map[uint64]uint64{}, restarts: map[uint64]uint64{}, high: map[uint64]uint64{}, named: map[string]int{}, notices: map[string]int{}}
	for _, b := range c.batches {
		a.epochs[b.Header.Epoch] += uint64(b.Header.Count)
		a.high[b.Header.Epoch] = max(a.high[b.Header.Epoch], b.Header.First+uint64(b.Header.Count)-1)
		for _, r := range b.Records {
			switch x := r.Item.(type) {
			case *flowv1.Record_Flow:
				a.flows++
				f := &flowpb.Flow{}
				if err := proto.Unmarshal(x.Flow, f); err != nil {
					t.Fatal(err)
				}
				a.named[f.Source.PodName+">"+f.Destination.PodName]++
				switch f.EventType.Type {
				case 1, 5:
					a.decided = append(a.decided, f)
				case 129:
					a.requests = append(a.requests, f)
				}
			case *flowv1.Record_AgentEvent:
				e := &flowpb.AgentEvent{}
				if proto.Unmarshal(x.AgentEvent, e) == nil && e.Type == flowpb.AgentEventType_AGENT_STARTED {
					a.started++
				}
				if u := e.GetUnknown(); u != nil {
					a.notices[u.Type]++
				}
			case *flowv1.Record_Loss:
				switch {
				case x.Loss.Place == flowv1.Place_PLACE_KERNEL:
					a.kernelLost += x.Loss.Count
				case x.Loss.Cause == flowv1.Cause_CAUSE_RESTART:
					a.restarts[x.Loss.Epoch] = x.Loss.Last
				}
			}
		}
	}
	return a
}

// until waits until what the relay has fulfils a condition.
func (c *central) until(t testing.TB, what string, done func(account) bool) account {
	t.Helper()
	patience := time.After(time.Minute)
	for {
		c.mu.Lock()
		changed := c.changed
		c.mu.Unlock()
		a := c.account(t)
		if done(a) {
			return a
		}
		select {
		case <-changed:
		case <-patience:
			t.Fatalf("%s: it did not come to that: %+v", what, a)
		}
	}
}

// cluster is one node with a real datapath, whose agent is a process.
type cluster struct {
	t       testing.TB
	central *central
	args    []string
	socket  string
	metrics string
	agent   *exec.Cmd
	pods    map[string]*netdev.Namespace
	address map[string]string
}

// newCluster must run on a thread in the node's namespace.
func newCluster(t testing.TB, extra ...string) *cluster {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "up0"
	must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "far0"}))
	for _, name := range []string{"lo", "up0", "far0"} {
		must(netdev.SetUp(name))
	}
	up, err := netlink.LinkByName("up0")
	must(err)
	addr, err := netlink.ParseAddr("172.30.0.11/24")
	must(err)
	must(netlink.AddrAdd(up, addr))

	dir := t.TempDir()
	ca, err := spiffe.NewCA("test")
	must(err)
	must(os.WriteFile(filepath.Join(dir, "ca"), ca.CertPEM(), 0o600))
	issue := func(id spiffe.ID) spiffe.Files {
		cert, key, err := ca.Issue(id, time.Hour)
		must(err)
		f := spiffe.Files{Cert: filepath.Join(dir, id.Service+".crt"), Key: filepath.Join(dir, id.Service+".key"), CA: filepath.Join(dir, "ca")}
		must(os.WriteFile(f.Cert, cert, 0o600))
		must(os.WriteFile(f.Key, key, 0o600))
		return f
	}
	c := &cluster{t: t, socket: filepath.Join(dir, "agent.sock"), pods: map[string]*netdev.Namespace{}, address: map[string]string{},
		central: &central{pods: []string{"a", "b"}, updates: make(chan *policyv1.Update), acks: make(chan uint64, 100), slots: make(chan *policyv1.SlotReport, 1),
			batches: map[string]*flowv1.Batch{}, changed: make(chan struct{})}}
	serve := func(service string, register func(*grpc.Server)) string {
		source, err := spiffe.Load(issue(spiffe.ID{TrustDomain: "test", Service: service}))
		must(err)
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		must(err)
		s := grpc.NewServer(grpc.Creds(source.ServerCredentials()))
		register(s)
		done := make(chan struct{})
		go func() { defer close(done); _ = s.Serve(ln) }()
		t.Cleanup(func() { s.Stop(); <-done })
		return ln.Addr().String()
	}
	policy := serve("policy", func(s *grpc.Server) { policyv1.RegisterPolicyServiceServer(s, c.central) })
	relay := serve("relay", func(s *grpc.Server) { relayv1.RegisterRelayServiceServer(s, c.central) })
	own := issue(spiffe.ID{TrustDomain: "test", Service: "agent", Node: "node-1"})

	var random [6]byte
	_, _ = rand.Read(random[:])
	pins := "/sys/fs/bpf/weir-test-" + hex.EncodeToString(random[:])
	t.Cleanup(func() {
		if err := datapath.Remove(pins); err != nil {
			t.Error(err)
		}
		_ = os.Remove(pins)
	})
	free, err := net.Listen("tcp", "127.0.0.1:0")
	must(err)
	c.metrics = free.Addr().String()
	must(free.Close())
	c.args = append([]string{"--node=node-1", "--policy=" + policy, "--relay=" + relay, "--socket=" + c.socket, "--uplink=up0",
		"--state-dir=" + filepath.Join(dir, "state"), "--bpffs=" + pins, "--metrics-listen=" + c.metrics,
		"--tls-cert=" + own.Cert, "--tls-key=" + own.Key, "--tls-ca=" + own.CA}, extra...)
	return c
}

// start runs an agent in the calling thread's namespace and waits until it is ready.
func (c *cluster) start() {
	c.t.Helper()
	c.agent = exec.Command(os.Args[0], c.args...)
	c.agent.Env = append(os.Environ(), asAgent+"=1")
	c.agent.Stderr = os.Stderr
	c.agent.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := c.agent.Start(); err != nil {
		c.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(c.t.Context(), time.Minute)
	defer cancel()
	conn := c.dial()
	defer conn.Close()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		_, err := agentv1.NewCNIServiceClient(conn).Ready(ctx, &agentv1.ReadyRequest{}, grpc.WaitForReady(true))
		if err == nil {
			return
		}
		if ctx.Err() != nil {
			c.t.Fatalf("agent is not ready: %v", err)
		}
		<-tick.C
	}
}

func (c *cluster) dial() *grpc.ClientConn {
	c.t.Helper()
	conn, err := grpc.NewClient("unix:"+c.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		c.t.Fatal(err)
	}
	return conn
}

// kill ends the agent as a crash would.
func (c *cluster) kill() {
	_ = c.agent.Process.Kill()
	_ = c.agent.Wait() // says that it was killed
}

func (c *cluster) plug(name string) {
	c.t.Helper()
	path := testns.New(c.t)
	conn := c.dial()
	defer conn.Close()
	r, err := agentv1.NewCNIServiceClient(conn).Add(c.t.Context(), &agentv1.AddRequest{ContainerId: "c-" + name, Netns: path, Ifname: "eth0",
		PodNamespace: "default", PodName: name, PodUid: "uid-" + name})
	if err != nil {
		c.t.Fatal(err)
	}
	ns, err := netdev.OpenNamespace(path)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { ns.Close() })
	c.pods[name], c.address[name] = ns, strings.TrimSuffix(r.Addresses[0], "/32")
}

// counters reads the kernel's counters from the agent's metrics; the caller's thread is in the node's namespace.
func (c *cluster) counters() (written, lost, created uint64) {
	c.t.Helper()
	conn, err := net.Dial("tcp", c.metrics)
	if err != nil {
		c.t.Fatal(err)
	}
	client := http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return conn, nil }, DisableKeepAlives: true}}
	response, err := client.Get("http://agent/metrics")
	if err != nil {
		c.t.Fatal(err)
	}
	defer response.Body.Close()
	lines := bufio.NewScanner(response.Body)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), " ")
		n, err := strconv.ParseFloat(value, 64)
		if err != nil {
			continue
		}
		name, _, _ = strings.Cut(name, "{")
		switch name {
		case "weir_agent_kernel_records_written_total":
			written += uint64(n)
		case "weir_agent_kernel_records_lost_total":
			lost += uint64(n)
		case "weir_agent_connections_created_total":
			created += uint64(n)
		}
	}
	return written, lost, created
}

// send makes pod a send n datagrams to as many ports of pod b, each a connection of its own.
func (c *cluster) send(n int) {
	c.t.Helper()
	err := c.pods["a"].Do(func() error {
		conn, err := net.ListenUDP("udp4", nil)
		if err != nil {
			return err
		}
		defer conn.Close()
		for i := range n {
			to := &net.UDPAddr{IP: net.ParseIP(c.address["b"]), Port: 1024 + i%60000}
			if _, err := conn.WriteTo([]byte("x"), to); err != nil && !strings.Contains(err.Error(), "refused") {
				return err
			}
		}
		return nil
	})
	if err != nil {
		c.t.Fatal(err)
	}
}
