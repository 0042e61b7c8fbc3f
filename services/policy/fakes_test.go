// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	grpcstatus "google.golang.org/grpc/status"
	"sigs.k8s.io/yaml"

	identityv1 "github.com/weirmesh/weir/gen/weir/identity/v1"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	sourcev1 "github.com/weirmesh/weir/gen/weir/source/v1"
	"github.com/weirmesh/weir/internal/client"
	"github.com/weirmesh/weir/internal/spiffe"
)

// deadline bounds every wait of these tests; nothing is measured against it.
const deadline = time.Minute

// fakeSource serves objects as the lab does.
type fakeSource struct {
	sourcev1.UnimplementedSourceServiceServer
	mu       sync.Mutex
	initial  []*sourcev1.WatchResponse
	watchers map[chan *sourcev1.WatchResponse]bool
	statuses map[string]string // by kind namespace/name
	holder   string            // of the lease
	writes   int
	wrote    chan struct{} // gets one for each write
}

func (s *fakeSource) UpdateStatus(_ context.Context, r *sourcev1.UpdateStatusRequest) (*sourcev1.UpdateStatusResponse, error) {
	s.mu.Lock()
	s.statuses[r.GetKind()+" "+r.GetNamespace()+"/"+r.GetName()] = string(r.GetStatus())
	s.writes++
	s.mu.Unlock()
	s.wrote <- struct{}{}
	return &sourcev1.UpdateStatusResponse{}, nil
}

func (s *fakeSource) AcquireLease(_ context.Context, r *sourcev1.AcquireLeaseRequest) (*sourcev1.AcquireLeaseResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.holder == "" {
		s.holder = r.GetHolder()
	}
	return &sourcev1.AcquireLeaseResponse{Holder: s.holder, Acquired: s.holder == r.GetHolder()}, nil
}

// status waits until the status of an object holds a text; agents that are awake take in what comes meanwhile.
func (c *cluster) status(object, want string, awake ...*agent) {
	c.t.Helper()
	timeout := time.After(deadline)
	for {
		for _, a := range awake {
			a.drain()
		}
		c.source.mu.Lock()
		got := c.source.statuses[object]
		c.source.mu.Unlock()
		if strings.Contains(got, want) {
			return
		}
		select {
		case <-c.source.wrote:
		case <-timeout:
			c.t.Fatalf("status of %s is %s, want %q in it", object, got, want)
		}
	}
}

func event(kind sourcev1.WatchResponse_Type, doc string) *sourcev1.WatchResponse {
	data, err := yaml.YAMLToJSON([]byte(doc))
	if err != nil {
		panic(err)
	}
	first, _, _ := strings.Cut(doc, "\n")
	return &sourcev1.WatchResponse{Type: kind, Kind: strings.TrimPrefix(first, "kind: "), Object: data}
}

func (s *fakeSource) Watch(_ *sourcev1.WatchRequest, stream grpc.ServerStreamingServer[sourcev1.WatchResponse]) error {
	updates := make(chan *sourcev1.WatchResponse, 1000)
	s.mu.Lock()
	all := append(slices.Clone(s.initial), &sourcev1.WatchResponse{Type: sourcev1.WatchResponse_TYPE_SYNCED})
	s.watchers[updates] = true
	s.mu.Unlock()
	for _, r := range all {
		if err := stream.Send(r); err != nil {
			return err
		}
	}
	for {
		select {
		case r, ok := <-updates:
			if !ok {
				return grpcstatus.Error(codes.Unavailable, "fell behind")
			}
			if err := stream.Send(r); err != nil {
				return err
			}
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

func (s *fakeSource) send(kind sourcev1.WatchResponse_Type, doc string) {
	s.sendEvent(event(kind, doc))
}

func (s *fakeSource) sendEvent(e *sourcev1.WatchResponse) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for w := range s.watchers {
		w <- e
	}
}

// cut ends all watches and replaces what the next ones begin with.
func (s *fakeSource) cut(docs ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.initial = nil
	for _, doc := range docs {
		s.initial = append(s.initial, event(sourcev1.WatchResponse_TYPE_ADDED, doc))
	}
	for w := range s.watchers {
		close(w)
	}
	s.watchers = map[chan *sourcev1.WatchResponse]bool{}
}

// fakeBroker numbers label sets in the order of the questions, while it is up.
type fakeBroker struct {
	identityv1.UnimplementedIdentityServiceServer
	mu      sync.Mutex
	down    bool
	numbers map[string]uint32
}

func (b *fakeBroker) Allocate(_ context.Context, r *identityv1.AllocateRequest) (*identityv1.AllocateResponse, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.down {
		return nil, grpcstatus.Error(codes.Unavailable, "no quorum")
	}
	key := strings.Join(r.GetLabels(), ",")
	if b.numbers[key] == 0 {
		b.numbers[key] = 256 + uint32(len(b.numbers))
	}
	return &identityv1.AllocateResponse{Identity: &identityv1.Identity{Number: b.numbers[key], Labels: r.GetLabels()}}, nil
}

func (b *fakeBroker) Release(context.Context, *identityv1.ReleaseRequest) (*identityv1.ReleaseResponse, error) {
	return &identityv1.ReleaseResponse{}, nil
}

func (b *fakeBroker) setDown(down bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.down = down
}

// cluster is a policy service with fakes around it, all over mutual TLS on loopback.
type cluster struct {
	t      testing.TB
	ca     *spiffe.CA
	source *fakeSource
	broker *fakeBroker
	addr   string
	socket string
	config Config
}

func newCluster(t testing.TB, docs ...string) *cluster {
	t.Helper()
	ca, err := spiffe.NewCA("weir.test")
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{
		t: t, ca: ca,
		source: &fakeSource{
			watchers: map[chan *sourcev1.WatchResponse]bool{}, statuses: map[string]string{}, wrote: make(chan struct{}, 10_000),
		},
		broker: &fakeBroker{numbers: map[string]uint32{}},
		socket: filepath.Join(t.TempDir(), "policy.sock"),
	}
	c.source.cut(docs...)
	sourceAddr := c.serveFake("source", func(s *grpc.Server) { sourcev1.RegisterSourceServiceServer(s, c.source) })
	brokerAddr := c.serveFake("identity", func(s *grpc.Server) { identityv1.RegisterIdentityServiceServer(s, c.broker) })
	c.config = DefaultConfig()
	c.config.Source, c.config.Identity, c.config.Socket = sourceAddr, []string{brokerAddr}, c.socket
	c.config.TLS = c.files(spiffe.ID{Service: "policy"})
	return c
}

func (c *cluster) files(id spiffe.ID) spiffe.Files {
	c.t.Helper()
	cert, key, err := c.ca.Issue(id, time.Hour)
	if err != nil {
		c.t.Fatal(err)
	}
	dir := c.t.TempDir()
	f := spiffe.Files{Cert: filepath.Join(dir, "c"), Key: filepath.Join(dir, "k"), CA: filepath.Join(dir, "ca")}
	for path, data := range map[string][]byte{f.Cert: cert, f.Key: key, f.CA: c.ca.CertPEM()} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			c.t.Fatal(err)
		}
	}
	return f
}

func (c *cluster) identity(id spiffe.ID) *spiffe.Source {
	c.t.Helper()
	s, err := spiffe.Load(c.files(id))
	if err != nil {
		c.t.Fatal(err)
	}
	return s
}

func (c *cluster) serveFake(service string, register func(*grpc.Server)) string {
	c.t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		c.t.Fatal(err)
	}
	server := grpc.NewServer(grpc.Creds(c.identity(spiffe.ID{Service: service}).ServerCredentials()),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}))
	register(server)
	go func() { _ = server.Serve(ln) }() // ends with Stop
	c.t.Cleanup(server.Stop)
	return ln.Addr().String()
}

// start runs a policy service and returns what stops it.
func (c *cluster) start() (stop func()) {
	c.t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		c.t.Fatal(err)
	}
	config := c.config
	config.Listeners = []net.Listener{ln}
	c.addr = ln.Addr().String()
	service, err := New(config, slog.New(slog.DiscardHandler))
	if err != nil {
		c.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- service.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			c.t.Errorf("policy service: %v", err)
		}
	})
	c.t.Cleanup(stop)
	return stop
}

// agent is a hand-driven agent. It holds what it was sent, and acknowledges unless told not to.
type agent struct {
	t        testing.TB
	stream   grpc.BidiStreamingClient[policyv1.SyncRequest, policyv1.SyncResponse]
	noAck    bool
	state    map[string]*policyv1.Resource // by kind/key
	last     uint64
	synced   bool
	spreads  map[string]*policyv1.Spread
	received chan received
}

type received struct {
	response *policyv1.SyncResponse
	err      error
}

func (c *cluster) dial(id spiffe.ID) policyv1.PolicyServiceClient {
	c.t.Helper()
	conn, err := client.New(client.Config{Addresses: []string{c.addr}, TLS: c.identity(id), Service: "policy"})
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { conn.Close() })
	return policyv1.NewPolicyServiceClient(conn)
}

// connect opens a stream as a node's agent; hello is of another node if that is not empty.
func (c *cluster) connect(node string, register ...*policyv1.Endpoint) *agent {
	c.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	c.t.Cleanup(cancel)
	stream, err := c.dial(spiffe.ID{Service: "agent", Node: node}).Sync(ctx, grpc.WaitForReady(true))
	if err != nil {
		c.t.Fatal(err)
	}
	a := &agent{
		t: c.t, stream: stream, state: map[string]*policyv1.Resource{},
		spreads: map[string]*policyv1.Spread{}, received: make(chan received, 10_000),
	}
	go func() {
		for {
			response, err := stream.Recv()
			a.received <- received{response, err}
			if err != nil {
				return
			}
		}
	}()
	a.send(&policyv1.SyncRequest{Message: &policyv1.SyncRequest_Hello{Hello: &policyv1.Hello{Node: node, Instance: "test"}}})
	for _, e := range register {
		a.register(e)
	}
	return a
}

func (a *agent) send(r *policyv1.SyncRequest) {
	a.t.Helper()
	if err := a.stream.Send(r); err != nil {
		a.t.Fatalf("send: %v", err)
	}
}

func (a *agent) register(e *policyv1.Endpoint) {
	a.t.Helper()
	a.send(&policyv1.SyncRequest{Message: &policyv1.SyncRequest_Register{Register: e}})
}

func (a *agent) ack(revision uint64) {
	a.t.Helper()
	a.send(&policyv1.SyncRequest{Message: &policyv1.SyncRequest_Ack{Ack: revision}})
}

// step takes in one message, or returns the stream's end.
func (a *agent) step() error {
	a.t.Helper()
	var r received
	select {
	case r = <-a.received:
	case <-time.After(deadline):
		a.t.Fatalf("nothing came; state: %v", a.keys())
	}
	if r.err != nil {
		return r.err
	}
	switch m := r.response.GetMessage().(type) {
	case *policyv1.SyncResponse_Update:
		if m.Update.GetRevision() <= a.last {
			a.t.Errorf("revision %d after %d", m.Update.GetRevision(), a.last)
		}
		a.last = m.Update.GetRevision()
		for _, u := range m.Update.GetUpserts() {
			a.state[resourceKey(u)] = u
		}
		for _, k := range m.Update.GetRemovals() {
			delete(a.state, keyText(k.GetKind(), k.GetKey()))
		}
		if !a.noAck {
			a.ack(a.last)
		}
	case *policyv1.SyncResponse_Synced:
		a.synced = true
		if m.Synced.GetRevision() != a.last {
			a.t.Errorf("synced at revision %d, the last one was %d", m.Synced.GetRevision(), a.last)
		}
		if !a.noAck {
			a.ack(a.last)
		}
	case *policyv1.SyncResponse_Spread:
		a.spreads[m.Spread.GetUid()] = m.Spread
	}
	return nil
}

// until takes in messages until the agent's state is as wanted.
func (a *agent) until(what string, ok func() bool) {
	a.t.Helper()
	for !ok() {
		if err := a.step(); err != nil {
			a.t.Fatalf("waiting for %s: %v; state: %v", what, err, a.keys())
		}
	}
}

// end takes in messages until the stream ends and returns the code.
func (a *agent) end() codes.Code {
	a.t.Helper()
	for {
		if err := a.step(); err != nil {
			return grpcstatus.Code(err)
		}
	}
}

// drain takes in what has come.
func (a *agent) drain() {
	a.t.Helper()
	for len(a.received) > 0 {
		if err := a.step(); err != nil {
			a.t.Fatalf("the stream ended: %v", err)
		}
	}
}

func (a *agent) has(key string) bool { return a.state[key] != nil }

func (a *agent) keys() []string {
	var all []string
	for k := range a.state {
		all = append(all, k)
	}
	slices.Sort(all)
	return all
}

func keyText(kind policyv1.ResourceKind, key string) string {
	return strings.ToLower(strings.TrimPrefix(kind.String(), "RESOURCE_KIND_")) + " " + key
}

func resourceKey(r *policyv1.Resource) string {
	switch r := r.GetResource().(type) {
	case *policyv1.Resource_Node:
		return "node " + r.Node.GetName()
	case *policyv1.Resource_Namespace:
		return "namespace " + r.Namespace.GetName()
	case *policyv1.Resource_Identity:
		return "identity " + strings.Join(r.Identity.GetLabels(), ",")
	case *policyv1.Resource_Service:
		return "service " + r.Service.GetNamespace() + "/" + r.Service.GetName()
	case *policyv1.Resource_Pod:
		return "pod " + r.Pod.GetUid()
	case *policyv1.Resource_Endpoint:
		return "endpoint " + r.Endpoint.GetUid()
	case *policyv1.Resource_Peer:
		return "peer " + r.Peer.GetKey()
	case *policyv1.Resource_Selector:
		return "selector " + r.Selector.GetKey()
	case *policyv1.Resource_Policy:
		return "policy " + r.Policy.GetKey()
	case *policyv1.Resource_Subject:
		return "subject " + r.Subject.GetKey()
	}
	return "?"
}
