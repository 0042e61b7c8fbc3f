// SPDX-License-Identifier: Apache-2.0

package xds_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/internal/server"
	"github.com/weirmesh/weir/internal/spiffe"
	"github.com/weirmesh/weir/services/xds"
)

const trustDomain = "test.local"

// deadline ends what would wait for ever.
const deadline = time.Minute

// cluster is a policy service that says what a test says, and xDS servers.
type cluster struct {
	t      *testing.T
	ca     *spiffe.CA
	dir    string
	policy *fakePolicy
	addr   string // of the policy service

	stopPolicy func()
}

func newCluster(t *testing.T, resources ...*policyv1.RenderResource) *cluster {
	t.Helper()
	ca, err := spiffe.NewCA(trustDomain)
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{t: t, ca: ca, dir: t.TempDir()}
	c.policy, c.addr, c.stopPolicy = c.another(resources...)
	return c
}

// another starts a second replica of the policy service.
func (c *cluster) another(resources ...*policyv1.RenderResource) (policy *fakePolicy, addr string, stop func()) {
	c.t.Helper()
	addr = freeAddr(c.t)
	policy, stop = c.anotherAt(addr, resources...)
	return policy, addr, stop
}

// freeAddr is an address that nobody listens on.
func freeAddr(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

func (c *cluster) anotherAt(addr string, resources ...*policyv1.RenderResource) (policy *fakePolicy, stop func()) {
	c.t.Helper()
	policy = newFakePolicy(resources)
	s := server.New(server.Config{
		Name: "policy", TLS: c.source(spiffe.ID{Service: "policy"}),
		Authorize: server.Table{"/" + policyv1.RenderService_ServiceDesc.ServiceName + "/": {"xds"}},
		Drain:     time.Millisecond,
	})
	policyv1.RegisterRenderServiceServer(s.GRPC(), policy)
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		c.t.Fatal(err)
	}
	return policy, run(c.t, func(ctx context.Context) error { return s.Serve(ctx, ln) })
}

// run runs something until the test ends, or stop is called.
func run(t *testing.T, f func(context.Context) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func (c *cluster) files(id spiffe.ID) spiffe.Files {
	c.t.Helper()
	id.TrustDomain = trustDomain
	cert, key, err := c.ca.Issue(id, time.Hour)
	if err != nil {
		c.t.Fatal(err)
	}
	name := filepath.Join(c.dir, id.Service+"-"+id.Node)
	f := spiffe.Files{Cert: name + ".crt", Key: name + ".key", CA: name + ".ca"}
	for path, data := range map[string][]byte{f.Cert: cert, f.Key: key, f.CA: c.ca.CertPEM()} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			c.t.Fatal(err)
		}
	}
	return f
}

func (c *cluster) source(id spiffe.ID) *spiffe.Source {
	c.t.Helper()
	s, err := spiffe.Load(c.files(id))
	if err != nil {
		c.t.Fatal(err)
	}
	return s
}

// xds starts an xDS server and returns its address and how to stop it.
func (c *cluster) xds(change func(*xds.Config)) (addr string, stop func()) {
	c.t.Helper()
	config := xds.DefaultConfig()
	config.Listen = "127.0.0.1:0"
	config.Policy = []string{c.addr}
	config.TLS = c.files(spiffe.ID{Service: "xds"})
	if change != nil {
		change(&config)
	}
	service, err := xds.New(config, slog.New(slog.DiscardHandler))
	if err != nil {
		c.t.Fatal(err)
	}
	return service.Addr().String(), run(c.t, service.Run)
}

// fakePolicy streams a state that tests change.
type fakePolicy struct {
	policyv1.UnimplementedRenderServiceServer
	reports chan *policyv1.ProxyReport
	synced  chan struct{} // once for each stream that got the whole state

	mu       sync.Mutex
	state    map[string]*policyv1.RenderResource
	revision uint64
	changed  chan struct{} // closed at each change
	changes  []*policyv1.WatchResponse
}

func newFakePolicy(resources []*policyv1.RenderResource) *fakePolicy {
	p := &fakePolicy{
		reports: make(chan *policyv1.ProxyReport, 1000), synced: make(chan struct{}, 1000),
		state: map[string]*policyv1.RenderResource{}, changed: make(chan struct{}),
	}
	for _, r := range resources {
		p.state[keyOf(r)] = r
	}
	return p
}

func keyOf(r *policyv1.RenderResource) string {
	switch r := r.GetResource().(type) {
	case *policyv1.RenderResource_Node:
		return "node " + r.Node.GetNode()
	case *policyv1.RenderResource_Filter:
		return "filter " + r.Filter.GetKey()
	case *policyv1.RenderResource_Service:
		return "service " + r.Service.GetNamespace() + "/" + r.Service.GetName()
	case *policyv1.RenderResource_Config:
		return "config " + r.Config.GetNamespace() + "/" + r.Config.GetName()
	}
	return ""
}

// set changes the state.
func (p *fakePolicy) set(resources ...*policyv1.RenderResource) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, r := range resources {
		p.state[keyOf(r)] = r
	}
	p.revision++
	p.changes = append(p.changes, &policyv1.WatchResponse{Revision: p.revision, Upserts: resources})
	close(p.changed)
	p.changed = make(chan struct{})
}

func (p *fakePolicy) Watch(stream policyv1.RenderService_WatchServer) error {
	if first, err := stream.Recv(); err != nil || first.GetHello() == nil {
		return fmt.Errorf("no hello: %w", err)
	}
	go func() {
		for {
			request, err := stream.Recv()
			if err != nil {
				return
			}
			p.reports <- request.GetReport()
		}
	}()
	p.mu.Lock()
	whole := &policyv1.WatchResponse{Revision: p.revision, Synced: true}
	for _, r := range p.state {
		whole.Upserts = append(whole.Upserts, r)
	}
	next := len(p.changes)
	p.mu.Unlock()
	if err := stream.Send(whole); err != nil {
		return err
	}
	p.synced <- struct{}{}
	for {
		p.mu.Lock()
		changes, changed := p.changes[next:], p.changed
		next = len(p.changes)
		p.mu.Unlock()
		for _, c := range changes {
			if err := stream.Send(c); err != nil {
				return err
			}
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return nil
		}
	}
}

// watched waits until a stream got the whole state.
func (p *fakePolicy) watched(t *testing.T) {
	t.Helper()
	select {
	case <-p.synced:
	case <-time.After(deadline):
		t.Fatal("nobody watches")
	}
}

// report waits for a report about a resource.
func (p *fakePolicy) report(t *testing.T, resource string) *policyv1.ProxyReport {
	t.Helper()
	timeout := time.After(deadline)
	for {
		select {
		case r := <-p.reports:
			if r.GetResource() == resource {
				return r
			}
		case <-timeout:
			t.Fatalf("no report of %s", resource)
		}
	}
}

func filterOf(f *policyv1.Filter) *policyv1.RenderResource {
	return &policyv1.RenderResource{Resource: &policyv1.RenderResource_Filter{Filter: f}}
}

func configOf(c *policyv1.EnvoyConfig) *policyv1.RenderResource {
	return &policyv1.RenderResource{Resource: &policyv1.RenderResource_Config{Config: c}}
}

func slotsOf(node string, keys ...string) *policyv1.RenderResource {
	n := &policyv1.NodeSlots{Node: node}
	for i, key := range keys {
		n.Slots = append(n.Slots, &policyv1.Slot{Number: uint32(i + 1), Key: key, Port: uint32(20001 + i)})
	}
	return &policyv1.RenderResource{Resource: &policyv1.RenderResource_Node{Node: n}}
}

// httpFilter allows one path.
func httpFilter(key, path string) *policyv1.RenderResource {
	return filterOf(&policyv1.Filter{
		Key: key, Kind: policyv1.FilterKind_FILTER_KIND_HTTP, Direction: policyv1.Direction_DIRECTION_INGRESS, Namespace: "default",
		Http: []*policyv1.HTTPRule{{Rule: &policyv1.PolicyRule{Namespace: "default", Name: key, List: "ingress"}, Method: "GET", Path: path}},
	})
}

// published is the configuration of the article with its route filter; change edits the text of its spec.
func published(t *testing.T, change func(spec string) string) []*policyv1.RenderResource {
	t.Helper()
	text, err := os.ReadFile("../../internal/envoyconfig/testdata/api-traffic-split.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		text = []byte(change(string(text)))
	}
	var object struct {
		Kind     string
		Metadata struct{ Namespace, Name string }
		Spec     json.RawMessage
	}
	if err := yaml.Unmarshal(text, &object); err != nil {
		t.Fatal(err)
	}
	return []*policyv1.RenderResource{
		configOf(&policyv1.EnvoyConfig{Kind: object.Kind, Namespace: object.Metadata.Namespace, Name: object.Metadata.Name, Spec: object.Spec}),
		filterOf(&policyv1.Filter{
			Key: "route-1", Kind: policyv1.FilterKind_FILTER_KIND_ROUTE, Namespace: "production",
			Route: &policyv1.Route{
				Kind: object.Kind, Namespace: "production", Name: "api-traffic-split", Listener: "api-listener",
				ServiceNamespace: "production", ServiceName: "api-service", ServicePort: 80,
			},
		}),
	}
}

// serviceOf is a service with these backends (host:port).
func serviceOf(t *testing.T, name string, backends ...string) *policyv1.RenderResource {
	t.Helper()
	port := &policyv1.ServicePort{Name: "grpc", Protocol: policyv1.Protocol_PROTOCOL_TCP, Port: 80}
	for _, b := range backends {
		addr, err := net.ResolveTCPAddr("tcp", b)
		if err != nil {
			t.Fatal(err)
		}
		port.Backends = append(port.Backends, &policyv1.Backend{Address: addr.IP.String(), Port: uint32(addr.Port), Node: "n1"})
	}
	return &policyv1.RenderResource{Resource: &policyv1.RenderResource_Service{
		Service: &policyv1.Service{Namespace: "production", Name: name, Ports: []*policyv1.ServicePort{port}},
	}}
}
