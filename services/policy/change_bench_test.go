// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	sourcev1 "github.com/weirmesh/weir/gen/weir/source/v1"
	"github.com/weirmesh/weir/internal/client"
	"github.com/weirmesh/weir/internal/flags"
	"github.com/weirmesh/weir/internal/spiffe"
)

// serviceEnv makes a process of this test binary a policy service, configured by its environment.
const serviceEnv = "WEIR_TEST_SERVICE"

func TestMain(m *testing.M) {
	if os.Getenv(serviceEnv) == "" {
		os.Exit(m.Run())
	}
	if err := runService(); err != nil {
		fmt.Fprintln(os.Stderr, "policy service:", err)
		os.Exit(1)
	}
}

func runService() error {
	config := DefaultConfig()
	set := pflag.NewFlagSet("weir-policy", pflag.ContinueOnError)
	config.Add(set)
	if err := flags.Parse(set, nil, os.LookupEnv); err != nil {
		return err
	}
	service, err := New(config, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	return service.Run(ctx)
}

const (
	podsPerNode = 10
	identities  = 1000
	selectors   = 100
)

// BenchmarkChange is a policy service in a process of its own, with a source of 1,000 identities on the one side and simulated agents on the other, which
// acknowledge what they get at once; all over gRPC with mutual TLS on loopback. Measured is the time from the moment that the source sends a change until
// the last agent that it concerns has acknowledged it, and what it costs the service: CPU time, and bytes on the agents' connections.
//
// 10 nodes have 100 pods; the pods of the other 900 identities are on one node more.
func BenchmarkChange(b *testing.B) {
	for _, nodes := range []int{10, 100, 1000} {
		b.Run(fmt.Sprintf("%d nodes", nodes), func(b *testing.B) {
			f := newFleet(b, nodes)
			// In this order: policies of earlier versions stay for minutes, for agents that lag, and make what follows dearer.
			b.Run("identity that 100 selectors match", func(b *testing.B) {
				f.measure(b, len(f.agents), func(i int) string {
					return fmt.Sprintf("kind: Pod\nmetadata: {name: new%d, namespace: default, uid: new%d, labels: {app: newcomer, new: %s}}\nspec: {nodeName: n0}\n", i, i, marker(i))
				})
			})
			b.Run("rule of one pod", func(b *testing.B) {
				f.measure(b, 1, func(i int) string { return editDoc("single", "{matchLabels: {single: one}}", i) })
				f.inForce(b, "single")
			})
			b.Run("rule of all pods", func(b *testing.B) {
				f.measure(b, len(f.agents), func(i int) string { return editDoc("everywhere", "{}", i) })
				f.inForce(b, "everywhere")
			})
		})
	}
}

func marker(i int) string { return fmt.Sprintf("marker-%d-marker", i) }

// editDoc is version i of a policy with one rule.
func editDoc(name, selector string, i int) string {
	return fmt.Sprintf(`kind: CiliumNetworkPolicy
apiVersion: cilium.io/v2
metadata: {name: %s, namespace: default, uid: %s, generation: %d}
spec: {endpointSelector: %s, log: {value: %s}, ingress: [{fromEndpoints: [{matchLabels: {app: app1}}], toPorts: [{ports: [{port: "%d", protocol: TCP}]}]}]}
`, name, name, i+1, selector, marker(i), 1000+i%50000)
}

// fleetDocs are the objects of a cluster: each policy of the 100 selects the pods of one place in each node, and has a selector of its own that newcomers match.
func fleetDocs(nodes int) (docs []string, names []string, pods map[string][]*policyv1.Endpoint) {
	pods = map[string][]*policyv1.Endpoint{}
	docs = []string{"kind: Namespace\nmetadata: {name: default}\n"}
	node := func(i int) string {
		name := fmt.Sprint("n", i)
		names = append(names, name)
		docs = append(docs, fmt.Sprintf("kind: Node\nmetadata: {name: %s}\nspec: {podCIDRs: [\"10.%d.%d.0/21\"]}\nstatus: {addresses: [{type: InternalIP, address: 172.16.%d.%d}]}\n",
			name, i/32, i%32*8, i/250, 1+i%250))
		return name
	}
	pod := func(node string, i, identity int) {
		name := fmt.Sprintf("p-%s-%d", node, i)
		number, _ := strconv.Atoi(node[1:])
		address := fmt.Sprintf("10.%d.%d.%d", number/32, number%32*8+i/200, 10+i%200)
		single := ""
		if node == "n1" && i == 0 {
			single = ", single: one"
		}
		docs = append(docs, fmt.Sprintf("kind: Pod\nmetadata: {name: %s, namespace: default, uid: %s, labels: {app: app%d, place: p%d%s}}\nspec: {nodeName: %s}\nstatus: {podIPs: [{ip: %s}]}\n",
			name, name, identity, i%podsPerNode, single, node, address))
		pods[node] = append(pods[node], &policyv1.Endpoint{Uid: name, Node: node, Addresses: []string{address}})
	}
	for i := range nodes {
		name := node(i)
		for j := range podsPerNode {
			pod(name, j, (i*podsPerNode+j)%identities)
		}
	}
	if rest := identities - nodes*podsPerNode; rest > 0 {
		name := node(nodes)
		for j := range rest {
			pod(name, j, nodes*podsPerNode+j)
		}
	}
	for i := range selectors {
		docs = append(docs, fmt.Sprintf(`kind: CiliumNetworkPolicy
apiVersion: cilium.io/v2
metadata: {name: s%d, namespace: default, uid: s%d, generation: 1}
spec: {endpointSelector: {matchLabels: {place: p%d}}, ingress: [{fromEndpoints: [{matchExpressions: [{key: app, operator: In, values: [newcomer, app%d, app%d]}]}], toPorts: [{ports: [{port: "%d"}]}]}]}
`, i, i, i%podsPerNode, i, i+selectors, 8000+i))
	}
	return append(docs, editDoc("everywhere", "{}", 1<<20), editDoc("single", "{matchLabels: {single: one}}", 1<<20)), names, pods
}

// fleet is a policy service and its simulated agents.
type fleet struct {
	*cluster
	service *exec.Cmd
	agents  []*simulated
	next    int // number of the next change
	round   atomic.Pointer[round]
	bytes   atomic.Int64 // to agents
}

// round is a change under way.
type round struct {
	marker []byte
	left   atomic.Int64
	done   chan struct{}
}

func newFleet(b *testing.B, nodes int) *fleet {
	b.Helper()
	docs, names, pods := fleetDocs(nodes)
	f := &fleet{cluster: newCluster(b, docs...)}
	go func() {
		for range f.source.wrote { // nobody else wants to know
		}
	}()
	f.startProcess(b)
	var group errgroup.Group
	group.SetLimit(16)
	var mu sync.Mutex
	for _, name := range names {
		identity := f.identity(spiffe.ID{Service: "agent", Node: name})
		group.Go(func() error {
			a, err := f.connectSimulated(b, name, identity, pods[name])
			if err != nil {
				return fmt.Errorf("agent %s: %w", name, err)
			}
			mu.Lock()
			defer mu.Unlock()
			f.agents = append(f.agents, a)
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		b.Fatal(err)
	}
	f.inForce(b, "everywhere")
	return f
}

func (f *fleet) startProcess(b *testing.B) {
	b.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	f.addr = ln.Addr().String()
	if err := ln.Close(); err != nil {
		b.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	f.service = exec.Command(self)
	f.service.Stderr = os.Stderr
	f.service.Env = append(os.Environ(), serviceEnv+"=1", "WEIR_LISTEN="+f.addr, "WEIR_SOCKET="+f.socket, "WEIR_SOURCE="+f.config.Source, "WEIR_IDENTITY="+f.config.Identity[0],
		"WEIR_TLS_CERT="+f.config.TLS.Cert, "WEIR_TLS_KEY="+f.config.TLS.Key, "WEIR_TLS_CA="+f.config.TLS.CA)
	if err := f.service.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = f.service.Process.Kill() // it may have ended
		_ = f.service.Wait()
	})
}

// simulated is an agent that looks at nothing of what it gets but the revision and the round's marker.
type simulated struct {
	fleet  *fleet
	stream grpc.ClientStream
	synced chan struct{}
	failed chan error
}

// frame is a message as it came.
type frame []byte

// frames is the codec that leaves messages alone.
type frames struct{}

// Name implements encoding.CodecV2.
func (frames) Name() string { return "proto" }

// Marshal implements encoding.CodecV2.
func (frames) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.(frame))}, nil
}

// Unmarshal implements encoding.CodecV2.
func (frames) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*frame) = data.Materialize()
	return nil
}

// countedConn counts what is read.
type countedConn struct {
	net.Conn
	bytes *atomic.Int64
}

// Read implements net.Conn.
func (c countedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.bytes.Add(int64(n))
	return n, err
}

// connectSimulated begins an agent's stream, registers its pods and waits for the first state.
func (f *fleet) connectSimulated(b *testing.B, node string, identity *spiffe.Source, pods []*policyv1.Endpoint) (*simulated, error) {
	conn, err := client.New(client.Config{Addresses: []string{f.addr}, TLS: identity, Service: "policy", Options: []grpc.DialOption{
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			var d net.Dialer
			c, err := d.DialContext(ctx, "tcp", addr)
			return countedConn{c, &f.bytes}, err
		}),
	}})
	if err != nil {
		return nil, err
	}
	b.Cleanup(func() { conn.Close() })
	ctx, cancel := context.WithCancel(context.Background())
	b.Cleanup(cancel)
	a := &simulated{fleet: f, synced: make(chan struct{}), failed: make(chan error, 1)}
	a.stream, err = conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, policyv1.PolicyService_Sync_FullMethodName, grpc.ForceCodecV2(frames{}), grpc.WaitForReady(true))
	if err != nil {
		return nil, err
	}
	messages := []*policyv1.SyncRequest{{Message: &policyv1.SyncRequest_Hello{Hello: &policyv1.Hello{Node: node, Instance: "simulated"}}}}
	for _, e := range pods {
		messages = append(messages, &policyv1.SyncRequest{Message: &policyv1.SyncRequest_Register{Register: e}})
	}
	for _, m := range messages {
		data, err := proto.Marshal(m)
		if err != nil {
			return nil, err
		}
		if err := a.stream.SendMsg(frame(data)); err != nil {
			return nil, err
		}
	}
	go func() { a.failed <- a.run() }()
	select {
	case <-a.synced:
		return a, nil
	case err := <-a.failed:
		return nil, err
	case <-time.After(5 * time.Minute):
		return nil, fmt.Errorf("no first state")
	}
}

// Numbers of the fields that a simulated agent knows.
const (
	fieldUpdate   = 1 // of SyncResponse
	fieldSynced   = 2
	fieldRevision = 1 // of Update
	fieldAck      = 4 // of SyncRequest
)

func (a *simulated) run() error {
	for {
		var m frame
		if err := a.stream.RecvMsg(&m); err != nil {
			return err
		}
		field, _, n := protowire.ConsumeTag(m)
		if n < 0 {
			return protowire.ParseError(n)
		}
		switch field {
		case fieldSynced:
			close(a.synced)
			continue
		case fieldUpdate:
		default:
			continue
		}
		body, n := protowire.ConsumeBytes(m[n:])
		if n < 0 {
			return protowire.ParseError(n)
		}
		if field, _, n = protowire.ConsumeTag(body); field != fieldRevision {
			return fmt.Errorf("an update begins with field %d", field)
		}
		revision, n := protowire.ConsumeVarint(body[n:])
		if n < 0 {
			return protowire.ParseError(n)
		}
		if err := a.stream.SendMsg(frame(protowire.AppendVarint(protowire.AppendTag(nil, fieldAck, protowire.VarintType), revision))); err != nil {
			return err
		}
		if r := a.fleet.round.Load(); r != nil && bytes.Contains(body, r.marker) && r.left.Add(-1) == 0 {
			close(r.done)
		}
	}
}

// measure makes changes one after the other, each of which concerns so many agents.
func (f *fleet) measure(b *testing.B, concerned int, change func(int) string) {
	var times []time.Duration
	one := func() {
		i := f.next
		f.next++
		doc := event(sourcev1.WatchResponse_TYPE_MODIFIED, change(i))
		r := &round{marker: []byte(marker(i)), done: make(chan struct{})}
		r.left.Store(int64(concerned))
		f.round.Store(r)
		start := time.Now()
		f.source.sendEvent(doc)
		select {
		case <-r.done:
			times = append(times, time.Since(start))
		case <-time.After(time.Minute):
			b.Fatalf("change %d: %d agents have not acknowledged it", i, r.left.Load())
		}
	}
	for range 3 {
		one()
	}
	times = nil
	cpu, received := processCPU(b, f.service.Process.Pid), f.bytes.Load()
	for b.Loop() {
		one()
	}
	n := float64(len(times))
	slices.Sort(times)
	b.ReportMetric(float64((processCPU(b, f.service.Process.Pid)-cpu).Microseconds())/1000/n, "server-cpu-ms")
	b.ReportMetric(float64(f.bytes.Load()-received)/n, "bytes")
	b.ReportMetric(float64(times[len(times)/2].Microseconds())/1000, "median-ms")
	b.ReportMetric(float64(times[(len(times)*99+99)/100-1].Microseconds())/1000, "p99-ms")
	b.ReportMetric(processMiB(b, f.service.Process.Pid), "server-MiB")
	b.ReportMetric(0, "ns/op")
}

// inForce waits until the service says that the newest version of a policy is in force on every node.
func (f *fleet) inForce(b *testing.B, name string) {
	b.Helper()
	conn, err := grpc.NewClient("unix://"+f.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for {
		r, err := policyv1.NewPolicyQueryServiceClient(conn).ListPolicies(ctx, &policyv1.ListPoliciesRequest{Name: name}, grpc.WaitForReady(true))
		if err != nil {
			b.Fatal(err)
		}
		if len(r.Policies) == 1 && r.Policies[0].Valid && r.Policies[0].EnforcedGeneration == r.Policies[0].Generation && int(r.Policies[0].EnforcingNodes) == len(f.agents) {
			return
		}
		if ctx.Err() != nil {
			b.Fatalf("policy %s is not in force on %d nodes: %v", name, len(f.agents), r.Policies)
		}
	}
}

// processCPU is the user and system time of a process so far.
func processCPU(b *testing.B, pid int) time.Duration {
	b.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+2:]))
	user, err1 := strconv.Atoi(fields[11])
	system, err2 := strconv.Atoi(fields[12])
	if err1 != nil || err2 != nil {
		b.Fatalf("/proc/%d/stat: %s", pid, data)
	}
	return time.Duration(user+system) * 10 * time.Millisecond // USER_HZ is 100
}

// processMiB is the resident memory of a process.
func processMiB(b *testing.B, pid int) float64 {
	b.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		b.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(data))[1])
	if err != nil {
		b.Fatal(err)
	}
	return float64(pages*os.Getpagesize()) / (1 << 20)
}
