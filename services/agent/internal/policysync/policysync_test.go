// SPDX-License-Identifier: Apache-2.0

package policysync

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/services/agent/internal/desired"
)

// replica is a policy service that a test drives.
type replica struct {
	policyv1.UnimplementedPolicyServiceServer
	streams chan *session
}

type session struct {
	stream grpc.BidiStreamingServer[policyv1.SyncRequest, policyv1.SyncResponse]
	got    chan *policyv1.SyncRequest
	end    chan error
}

func (r *replica) Sync(stream grpc.BidiStreamingServer[policyv1.SyncRequest, policyv1.SyncResponse]) error {
	s := &session{stream: stream, got: make(chan *policyv1.SyncRequest, 100), end: make(chan error, 1)}
	go func() {
		for {
			m, err := stream.Recv()
			if err != nil {
				return
			}
			s.got <- m
		}
	}()
	r.streams <- s
	select {
	case err := <-s.end:
		return err
	case <-stream.Context().Done():
		return stream.Context().Err()
	}
}

const patience = time.Minute

func wait[T any](t *testing.T, what string, ch <-chan T) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(patience):
		t.Fatalf("no %s", what)
		panic("unreachable")
	}
}

func (s *session) send(t *testing.T, r *policyv1.SyncResponse) {
	t.Helper()
	if err := s.stream.Send(r); err != nil {
		t.Fatal(err)
	}
}

func (s *session) update(t *testing.T, revision uint64, upserts []*policyv1.Resource, removals ...*policyv1.ResourceKey) {
	t.Helper()
	s.send(t, &policyv1.SyncResponse{Message: &policyv1.SyncResponse_Update{Update: &policyv1.Update{Revision: revision, Upserts: upserts, Removals: removals}}})
}

func (s *session) synced(t *testing.T, revision uint64) {
	t.Helper()
	s.send(t, &policyv1.SyncResponse{Message: &policyv1.SyncResponse_Synced{Synced: &policyv1.Synced{Revision: revision}}})
}

// ack waits for the acknowledgement of a revision.
func (s *session) ack(t *testing.T, revision uint64) {
	t.Helper()
	for {
		if wait(t, "acknowledgement", s.got).GetAck() == revision {
			return
		}
	}
}

// sink remembers what it was given.
type sink struct {
	mu      sync.Mutex
	changes []desired.Change
	prunes  int
	quiet   bool
	fail    error
}

func (s *sink) Apply(c []desired.Change, quiet bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		err := s.fail
		s.fail = nil
		return err
	}
	s.changes, s.quiet = append(s.changes, c...), quiet
	return nil
}

func (s *sink) Prune() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.prunes++
	return nil
}

type fixture struct {
	*Client
	replicas map[string]*replica
	sink     *sink
	store    *desired.Store
	file     string
	stop     func()
}

func start(t *testing.T, file string, run bool, names ...string) *fixture {
	t.Helper()
	f := &fixture{replicas: map[string]*replica{}, sink: &sink{}, store: desired.NewStore(), file: file}
	listeners := map[string]*bufconn.Listener{}
	for _, name := range names {
		r := &replica{streams: make(chan *session, 10)}
		ln := bufconn.Listen(1 << 20)
		server := grpc.NewServer()
		policyv1.RegisterPolicyServiceServer(server, r)
		done := make(chan struct{})
		go func() { defer close(done); _ = server.Serve(ln) }()
		t.Cleanup(func() { server.Stop(); <-done })
		f.replicas[name], listeners[name] = r, ln
	}
	f.Client = New(Config{
		Node: "node-1", Version: "v1", Instance: "i", Addresses: names, StateFile: file, Store: f.store, Sink: f.sink, Now: time.Now,
		Log: slog.New(slog.DiscardHandler),
		Dial: func(address string) (*grpc.ClientConn, error) {
			return grpc.NewClient("passthrough:"+address, grpc.WithTransportCredentials(insecure.NewCredentials()),
				grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listeners[address].DialContext(ctx) }))
		},
	})
	if err := f.Load(); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	if run {
		f.run(t)
	}
	return f
}

func (f *fixture) run(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- f.Run(ctx) }()
	f.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(f.stop)
}

func identity(n uint32, labels ...string) *policyv1.Resource {
	return &policyv1.Resource{Resource: &policyv1.Resource_Identity{Identity: &policyv1.Identity{Number: n, Labels: labels}}}
}

func node(name, address string) *policyv1.Resource {
	return &policyv1.Resource{Resource: &policyv1.Resource_Node{Node: &policyv1.Node{Name: name, Addresses: []string{address}, PodCidrs: []string{"10.1.0.0/24"}}}}
}

func endpoint(uid string) Endpoint {
	return Endpoint{Endpoint: desired.Endpoint{UID: uid, Namespace: "default", Name: "pod-" + uid, Identity: 300,
		Addresses: []netip.Addr{netip.MustParseAddr("10.1.0.5")}, Workload: desired.Workload{Kind: "Deployment", Name: "web"}}}
}

func TestStateIsAppliedAndAcknowledged(t *testing.T) {
	f := start(t, "", true, "a")
	s := wait(t, "stream", f.replicas["a"].streams)
	if h := wait(t, "hello", s.got).GetHello(); h.GetNode() != "node-1" || h.GetInstance() != "i" {
		t.Fatalf("hello %v", h)
	}
	s.update(t, 1, []*policyv1.Resource{node("node-1", "172.30.0.1"), identity(300, "k8s:b=2", "k8s:a=1")})
	s.ack(t, 1)
	s.synced(t, 2)
	s.ack(t, 2)
	s.update(t, 3, nil, &policyv1.ResourceKey{Kind: policyv1.ResourceKind_RESOURCE_KIND_IDENTITY, Key: "300"})
	s.ack(t, 3)
	if n := f.store.Node("node-1"); n == nil || len(n.PodCIDRs) != 1 || f.store.Count(desired.KindIdentity) != 0 {
		t.Errorf("node %+v, %d identities", n, f.store.Count(desired.KindIdentity))
	}
	if st := f.Status(); !st.Connected || !st.Complete || st.Revision != 3 || f.sink.prunes != 1 {
		t.Errorf("status %+v, %d prunes", st, f.sink.prunes)
	}
}

func TestUnreadableResourceDoesNotKeepOthersAway(t *testing.T) {
	f := start(t, "", true, "a")
	s := wait(t, "stream", f.replicas["a"].streams)
	s.update(t, 1, []*policyv1.Resource{node("node-2", "nonsense"), {}, node("node-1", "172.30.0.1")},
		&policyv1.ResourceKey{Kind: 99, Key: "x"})
	s.ack(t, 1)
	if f.store.Node("node-1") == nil || f.Status().Rejected != 1 {
		t.Errorf("node %v, status %+v", f.store.Node("node-1"), f.Status())
	}
}

func TestFailedMapEndsTheStreamWithoutAck(t *testing.T) {
	f := start(t, "", true, "a")
	f.sink.fail = errors.New("map is full")
	s := wait(t, "stream", f.replicas["a"].streams)
	s.update(t, 1, []*policyv1.Resource{node("node-1", "172.30.0.1")})
	// The next stream brings all of it again.
	s2 := wait(t, "second stream", f.replicas["a"].streams)
	for len(s.got) > 0 {
		if m := <-s.got; m.GetAck() != 0 {
			t.Errorf("revision %d was acknowledged", m.GetAck())
		}
	}
	s2.update(t, 1, []*policyv1.Resource{node("node-1", "172.30.0.1")})
	s2.ack(t, 1)
}

func TestWhatANewStreamDoesNotSendIsGone(t *testing.T) {
	f := start(t, "", true, "a")
	s := wait(t, "stream", f.replicas["a"].streams)
	s.update(t, 1, []*policyv1.Resource{identity(300), identity(301)})
	s.synced(t, 1)
	s.ack(t, 1)
	s.end <- status.Error(codes.Unavailable, "drain")
	s2 := wait(t, "second stream", f.replicas["a"].streams)
	s2.update(t, 1, []*policyv1.Resource{identity(301)})
	s2.ack(t, 1)
	if n := f.store.Count(desired.KindIdentity); n != 2 {
		t.Errorf("%d identities before the state is complete, want both", n)
	}
	s2.synced(t, 2)
	s2.ack(t, 2)
	if n := f.store.Count(desired.KindIdentity); n != 1 {
		t.Errorf("%d identities, want the one that was sent", n)
	}
}

// acks returns the latest revision that was acknowledged so far.
func (s *session) acks() uint64 {
	var latest uint64
	for len(s.got) > 0 {
		if m := <-s.got; m.GetAck() != 0 {
			latest = m.GetAck()
		}
	}
	return latest
}

func TestEveryReplicaIsServedAndOneLeads(t *testing.T) {
	f := start(t, "", true, "a", "b")
	a, b := wait(t, "stream", f.replicas["a"].streams), wait(t, "stream", f.replicas["b"].streams)
	f.Register(endpoint("u1"))
	for _, s := range []*session{a, b} {
		for wait(t, "registration", s.got).GetRegister().GetUid() != "u1" {
		}
	}
	a.update(t, 1, []*policyv1.Resource{identity(300, "k8s:a=1")})
	a.ack(t, 1)
	a.synced(t, 1)
	// b says the same by other revisions, then something of its own: only what the maps hold is acknowledged.
	b.update(t, 70, []*policyv1.Resource{identity(300, "k8s:a=1")})
	b.ack(t, 70)
	b.update(t, 71, []*policyv1.Resource{identity(301, "k8s:b=1")})
	b.synced(t, 71)
	a.update(t, 2, []*policyv1.Resource{node("node-1", "172.30.0.1")})
	a.ack(t, 2)
	if got := b.acks(); got != 0 {
		t.Errorf("b was told %d, its identity 301 is not in the maps", got)
	}
	if f.store.Count(desired.KindIdentity) != 1 || f.Status().Address != "a" || f.Status().Streams != 2 {
		t.Errorf("state of b was applied; status %+v", f.Status())
	}
	// Then a says it too.
	a.update(t, 3, []*policyv1.Resource{identity(301, "k8s:b=1")})
	b.ack(t, 71)

	// a dies: b leads at once, with all that it has said, and what it has not said goes.
	a.end <- status.Error(codes.Unavailable, "killed")
	b.update(t, 72, []*policyv1.Resource{identity(302)})
	b.ack(t, 72)
	if f.store.Count(desired.KindIdentity) != 3 || f.store.Node("node-1") != nil || f.Status().Address != "b" {
		t.Errorf("%d identities, node %v, status %+v", f.store.Count(desired.KindIdentity), f.store.Node("node-1"), f.Status())
	}
	// a comes back, and follows.
	a = wait(t, "stream", f.replicas["a"].streams)
	if wait(t, "hello", a.got).GetHello() == nil || wait(t, "registration", a.got).GetRegister().GetUid() != "u1" {
		t.Error("the new stream does not begin with hello and the endpoint")
	}
	a.update(t, 1, []*policyv1.Resource{identity(302)})
	a.ack(t, 1)
	if f.Status().Address != "b" {
		t.Errorf("status %+v, want b to lead on", f.Status())
	}
}

// A stream that said a part of its state while another led, and then leads, loses nothing of it.
func TestHalfSaidStateIsNotLost(t *testing.T) {
	f := start(t, "", true, "a", "b")
	a, b := wait(t, "stream", f.replicas["a"].streams), wait(t, "stream", f.replicas["b"].streams)
	a.update(t, 1, []*policyv1.Resource{identity(300)})
	a.ack(t, 1)
	b.update(t, 5, []*policyv1.Resource{identity(300), identity(301)})
	a.update(t, 2, []*policyv1.Resource{identity(301)})
	a.ack(t, 2)
	b.ack(t, 5)
	a.end <- status.Error(codes.Unavailable, "killed")
	wait(t, "second stream", f.replicas["a"].streams) // so the old one is out
	b.synced(t, 6)
	b.ack(t, 6)
	if f.store.Count(desired.KindIdentity) != 2 || f.Status().Address != "b" {
		t.Errorf("%d identities, status %+v", f.store.Count(desired.KindIdentity), f.Status())
	}
}

func TestRegistrations(t *testing.T) {
	f := start(t, "", true, "a")
	early := f.Register(endpoint("u1")) // perhaps before there is a stream
	s := wait(t, "stream", f.replicas["a"].streams)
	registered := func(s *session, uid string) *policyv1.Endpoint {
		for {
			if e := wait(t, "registration of "+uid, s.got).GetRegister(); e.GetUid() == uid {
				return e
			}
		}
	}
	if e := registered(s, "u1"); e.Node != "node-1" || e.Identity != 300 || e.Workload.GetName() != "web" || len(e.Addresses) != 1 {
		t.Errorf("registration %v", e)
	}
	spread := func(uid, refused string, late ...string) {
		s.send(t, &policyv1.SyncResponse{Message: &policyv1.SyncResponse_Spread{Spread: &policyv1.Spread{Uid: uid, LateNodes: late, Error: refused}}})
	}
	spread("u1", "the pod is not known yet; its addresses spread when it is") // says nothing final
	spread("u1", "", "node-9")
	if got := wait(t, "spread", early); len(got.LateNodes) != 1 || got.LateNodes[0] != "node-9" || got.Refused != "" {
		t.Errorf("spread %+v", got)
	}
	second := f.Register(endpoint("u2"))
	registered(s, "u2")
	spread("u2", "address is taken")
	if got := wait(t, "refusal", second); got.Refused != "address is taken" {
		t.Errorf("spread %+v", got)
	}
	f.Unregister("u2")
	for wait(t, "unregistration", s.got).GetUnregister() != "u2" {
	}
	// A new stream begins with hello and with what is there now.
	s.end <- status.Error(codes.Unavailable, "drain")
	s2 := wait(t, "second stream", f.replicas["a"].streams)
	if wait(t, "hello", s2.got).GetHello() == nil {
		t.Error("the stream does not begin with hello")
	}
	if e := wait(t, "registration", s2.got).GetRegister(); e.GetUid() != "u1" {
		t.Errorf("got %v, want u1 alone", e)
	}
}

// Slots are told to every replica, at the beginning of each stream and when they change; while they are not known, nothing is.
func TestSlots(t *testing.T) {
	f := start(t, "", true, "a", "b")
	next := func(s *session, what string) *policyv1.SlotReport {
		t.Helper()
		return wait(t, what, s.got).GetSlots()
	}
	a, b := wait(t, "stream", f.replicas["a"].streams), wait(t, "stream", f.replicas["b"].streams)
	for _, s := range []*session{a, b} {
		if wait(t, "hello", s.got).GetHello() == nil {
			t.Error("the stream does not begin with hello")
		}
	}
	f.Register(endpoint("u1"))
	if wait(t, "registration", b.got).GetRegister() == nil {
		t.Error("something else than hello came before the registration")
	}
	f.SetSlots([]Slot{{Number: 3, Key: "http-x", Port: 20003}})
	a.end <- status.Error(codes.Unavailable, "drain")
	a = wait(t, "second stream", f.replicas["a"].streams)
	if wait(t, "hello", a.got).GetHello() == nil {
		t.Error("the stream does not begin with hello")
	}
	for _, s := range []*session{b, a} {
		if r := next(s, "slots").GetSlots(); len(r) != 1 || r[0].GetNumber() != 3 || r[0].GetKey() != "http-x" || r[0].GetPort() != 20003 {
			t.Errorf("report %v", r)
		}
	}
}

func TestStateFromDisk(t *testing.T) {
	file := filepath.Join(t.TempDir(), "state")
	f := start(t, file, true, "a")
	s := wait(t, "stream", f.replicas["a"].streams)
	s.update(t, 1, []*policyv1.Resource{node("node-1", "172.30.0.1"), identity(300, "k8s:a=1"),
		{Resource: &policyv1.Resource_Service{Service: &policyv1.Service{Namespace: "default", Name: "web", ClusterIps: []string{"10.96.0.1"},
			Ports: []*policyv1.ServicePort{{Name: "http", Protocol: policyv1.Protocol_PROTOCOL_TCP, Port: 80,
				Backends: []*policyv1.Backend{{Address: "10.1.0.5", Port: 8080}}}}}}},
		{Resource: &policyv1.Resource_Pod{Pod: &policyv1.Pod{Uid: "u", Namespace: "default", Name: "p", Identity: 300}}},
		{Resource: &policyv1.Resource_Endpoint{Endpoint: &policyv1.Endpoint{Uid: "u", Node: "node-1", Name: "p", Addresses: []string{"10.1.0.5"}, Identity: 300}}},
		{Resource: &policyv1.Resource_Namespace{Namespace: &policyv1.Namespace{Name: "default"}}},
		{Resource: &policyv1.Resource_Peer{Peer: &policyv1.Peer{Key: "cidr:10.0.0.0/8", Labels: []string{"cidr:10.0.0.0/8"}, Prefixes: []string{"10.0.0.0/8"}}}},
		{Resource: &policyv1.Resource_Selector{Selector: &policyv1.Selector{Key: "s", Members: []string{"300", "cidr:10.0.0.0/8"}}}},
		{Resource: &policyv1.Resource_Policy{Policy: &policyv1.Policy{Key: "p", Direction: policyv1.Direction_DIRECTION_EGRESS, Selectors: []string{"s"},
			Rules: []*policyv1.PolicyRule{{Kind: "NetworkPolicy", Name: "n"}}, Classes: []*policyv1.PolicyClass{{}, {Selectors: []uint32{0},
				Ranges: []*policyv1.PolicyRange{{Protocol: 6, First: 1, Last: 2, Verdict: policyv1.Verdict_VERDICT_ALLOW, Rules: []uint32{0}}}}}}}},
		{Resource: &policyv1.Resource_Subject{Subject: &policyv1.Subject{Key: "u", Egress: "p"}}},
	})
	s.synced(t, 2)
	s.ack(t, 2)
	want := f.store.All()
	f.stop() // saves

	again := start(t, file, false, "a")
	got := again.store.All()
	if len(got) != len(want) || len(got) != 10 {
		t.Fatalf("%d resources from disk, want %d", len(got), len(want))
	}
	for i := range want {
		if got[i].Key != want[i].Key || got[i].Key.Kind == desired.KindPolicy && !desired.Equal(got[i].Resource, want[i].Resource) {
			t.Errorf("resource %v, want %v", got[i], want[i])
		}
	}
	if st := again.Status(); st.StateTime.IsZero() || st.Connected || !again.sink.quiet || len(again.sink.changes) != 10 {
		t.Errorf("status %+v, %d changes", st, len(again.sink.changes))
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if p, n, err := again.store.WaitPod(ctx, "node-1", "default", "p", "u"); err != nil || p.Identity != 300 || n.Name != "node-1" {
		t.Errorf("pod %v, node %v, %v", p, n, err)
	}
}

func selectorChange(key string, joined, left []string) *policyv1.SelectorChange {
	return &policyv1.SelectorChange{Key: key, Joined: joined, Left: left}
}

func (s *session) change(t *testing.T, revision uint64, changes ...*policyv1.SelectorChange) {
	t.Helper()
	s.send(t, &policyv1.SyncResponse{Message: &policyv1.SyncResponse_Update{Update: &policyv1.Update{Revision: revision, SelectorChanges: changes}}})
}

func TestSelectorChanges(t *testing.T) {
	f := start(t, "", true, "a", "b")
	a, b := wait(t, "stream", f.replicas["a"].streams), wait(t, "stream", f.replicas["b"].streams)
	s := &policyv1.Resource{Resource: &policyv1.Resource_Selector{Selector: &policyv1.Selector{Key: "s", Members: []string{"300", "7"}}}}
	for _, x := range []*session{a, b} {
		x.update(t, 1, []*policyv1.Resource{s})
		x.ack(t, 1)
	}
	members := func() []string {
		got, _ := f.store.Get(desired.Key{Kind: desired.KindSelector, Name: "s"}).(*desired.Selector)
		return got.Members
	}
	b.change(t, 2, selectorChange("s", []string{"301"}, nil), selectorChange("s", []string{"302"}, []string{"301", "9"}))
	a.change(t, 2, selectorChange("s", []string{"301", "302"}, []string{"7"}))
	a.ack(t, 2)
	if got := members(); !slices.Equal(got, []string{"300", "301", "302"}) {
		t.Errorf("members %q", got)
	}
	a.change(t, 3, selectorChange("s", []string{"7"}, []string{"301"}))
	b.ack(t, 2) // now both say the same
	// A change of what was not sent ends the stream; the next one brings it.
	a.change(t, 4, selectorChange("t", []string{"1"}, nil))
	wait(t, "second stream", f.replicas["a"].streams)
}

func TestRefusals(t *testing.T) {
	f := start(t, "", false, "a")
	key := desired.Key{Kind: desired.KindPolicy, Name: "p"}
	var mu sync.Mutex
	refused := map[desired.Key]string{key: "full"}
	f.Client.cfg.Refusals = func() map[desired.Key]string {
		mu.Lock()
		defer mu.Unlock()
		return maps.Clone(refused)
	}
	f.run(t)
	s := wait(t, "stream", f.replicas["a"].streams)
	s.update(t, 1, []*policyv1.Resource{identity(300)})
	refusal := func() *policyv1.Refusal {
		for {
			m := wait(t, "refusal", s.got)
			if m.GetAck() != 0 {
				t.Errorf("revision %d was acknowledged before the refusal came", m.GetAck())
			}
			if r := m.GetRefusal(); r != nil {
				return r
			}
		}
	}
	if r := refusal(); r.Revision != 1 || r.Resource.Kind != policyv1.ResourceKind_RESOURCE_KIND_POLICY || r.Resource.Key != "p" || r.Error != "full" {
		t.Errorf("refusal %v", r)
	}
	s.ack(t, 1)
	mu.Lock()
	delete(refused, key)
	mu.Unlock()
	f.RefusalsChanged()
	if r := refusal(); r.Resource.Key != "p" || r.Error != "" {
		t.Errorf("refusal %v, want its end", r)
	}
}
