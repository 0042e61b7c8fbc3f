// SPDX-License-Identifier: Apache-2.0

package xds_test

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/internal/spiffe"
	"github.com/weirmesh/weir/services/xds"
)

// TestRefusedByName: a refusal holds back the resource that it names; the rest moves on; a new version clears it.
func TestRefusedByName(t *testing.T) {
	c := newCluster(t, httpFilter("http-1", "/one"), httpFilter("http-2", "/two"), slotsOf("n1", "http-1", "http-2"))
	addr, _ := c.xds(nil)
	s := c.sotw("n1", addr)
	s.start("http-1", "http-2")

	c.policy.set(httpFilter("http-1", "/bad"))
	if got := bodies(t, s.receive(routeURL).GetResources()); !strings.Contains(got["http-1"], "/bad") {
		t.Fatalf("the change did not come: %v", got)
	}
	s.nack(routeURL, `routes "http-1": I will not`)
	if got := bodies(t, s.receive(routeURL).GetResources()); !strings.Contains(got["http-1"], "/one") || len(got) != 2 {
		t.Fatalf("not the last good version: %v", got)
	}
	s.ack(routeURL)
	if r := c.policy.report(t, "http-1"); r.GetNode() != "n1" || !strings.Contains(r.GetError(), "I will not") {
		t.Errorf("report %v", r)
	}

	c.policy.set(httpFilter("http-2", "/three"))
	got := bodies(t, s.receive(routeURL).GetResources())
	if !strings.Contains(got["http-1"], "/one") || !strings.Contains(got["http-2"], "/three") {
		t.Fatalf("the others do not move on: %v", got)
	}
	s.ack(routeURL)

	c.policy.set(httpFilter("http-1", "/good"))
	if got := bodies(t, s.receive(routeURL).GetResources()); !strings.Contains(got["http-1"], "/good") {
		t.Fatalf("the new version did not come: %v", got)
	}
	s.ack(routeURL)
	if r := c.policy.report(t, "http-1"); r.GetError() != "" {
		t.Errorf("the acknowledgement did not clear it: %v", r)
	}
}

// TestRefusedTakenBack: to take a refused change back is to have the last good version.
func TestRefusedTakenBack(t *testing.T) {
	c := newCluster(t, httpFilter("http-1", "/one"), slotsOf("n1", "http-1"))
	addr, _ := c.xds(nil)
	s := c.sotw("n1", addr)
	s.start("http-1")
	c.policy.set(httpFilter("http-1", "/bad"))
	s.receive(routeURL)
	s.nack(routeURL, "no")
	s.receive(routeURL)
	s.ack(routeURL)
	if r := c.policy.report(t, "http-1"); r.GetError() == "" {
		t.Error("not reported")
	}
	c.policy.set(httpFilter("http-1", "/one"))
	if r := c.policy.report(t, "http-1"); r.GetError() != "" {
		t.Errorf("not cleared: %v", r)
	}
}

// TestRefusedWithoutName: of many changes that are refused together and without a name, only the two bad ones are held back in the end.
func TestRefusedWithoutName(t *testing.T) {
	const filters = 9
	var keys []string
	var resources, changes []*policyv1.RenderResource
	for i := range filters {
		key := fmt.Sprintf("http-%d", i)
		keys = append(keys, key)
		resources = append(resources, httpFilter(key, "/old"))
		path := "/new"
		if i == 2 || i == 7 {
			path = "/bad"
		}
		changes = append(changes, httpFilter(key, path))
	}
	c := newCluster(t, append(resources, slotsOf("n1", keys...))...)
	addr, _ := c.xds(nil)
	s := c.sotw("n1", addr)
	s.start(keys...)
	c.policy.set(changes...)
	for responses := 1; ; responses++ {
		got := bodies(t, s.receive(routeURL).GetResources())
		count := map[string]int{}
		for _, body := range got {
			for _, word := range []string{"/old", "/new", "/bad"} {
				if strings.Contains(body, word) {
					count[word]++
				}
			}
		}
		if count["/bad"] > 0 {
			s.nack(routeURL, "something is wrong")
		} else {
			s.ack(routeURL)
		}
		if count["/new"] == filters-2 && count["/bad"] == 0 {
			if !strings.Contains(got["http-2"], "/old") || !strings.Contains(got["http-7"], "/old") {
				t.Errorf("the last good versions are missing: %v", got)
			}
			break
		}
		if responses > 40 {
			t.Fatalf("after %d responses: %v", responses, count)
		}
	}
	for _, key := range []string{"http-2", "http-7"} {
		if r := c.policy.report(t, key); r.GetError() == "" {
			t.Errorf("%s is not reported", key)
		}
	}
}

// TestNewAndRefused: what a client never had is left out.
func TestNewAndRefused(t *testing.T) {
	c := newCluster(t, httpFilter("http-1", "/one"), httpFilter("http-2", "/two"), slotsOf("n1", "http-1"))
	addr, _ := c.xds(nil)
	s := c.sotw("n1", addr)
	s.start("http-1")
	c.policy.set(slotsOf("n1", "http-1", "http-2"))
	s.receive(listenerURL)
	s.nack(listenerURL, "Error adding listener(s) slot-2: address in use")
	if got := namesOf(bodies(t, s.receive(listenerURL).GetResources())); !slices.Equal(got, []string{"slot-1"}) {
		t.Errorf("listeners %q", got)
	}
	s.ack(listenerURL)
	if r := c.policy.report(t, "http-2"); !strings.Contains(r.GetError(), "address in use") {
		t.Errorf("report %v", r)
	}
}

// TestStorm: one client refuses the same response a thousand times, with right and wrong nonces; it gets no answer to that, and a neighbour's updates
// come.
func TestStorm(t *testing.T) {
	c := newCluster(t, httpFilter("http-1", "/one"), httpFilter("http-2", "/two"), slotsOf("n1", "http-1"), slotsOf("n2", "http-2"))
	addr, _ := c.xds(nil)
	bad, good := c.sotw("n1", addr), c.sotw("n2", addr)
	bad.start("http-1")
	good.start("http-2")
	for range 1000 {
		bad.nack(routeURL, "no, and http-1 neither")
		bad.send(&discoveryv3.DiscoveryRequest{TypeUrl: routeURL, ResponseNonce: "999", ResourceNames: []string{"http-1"}})
		bad.send(&discoveryv3.DiscoveryRequest{TypeUrl: listenerURL, ResponseNonce: "", VersionInfo: "x"})
	}
	c.policy.set(httpFilter("http-2", "/three"))
	good.receive(routeURL)
	good.ack(routeURL)
	bad.quiet()
	c.policy.set(httpFilter("http-1", "/four"))
	bad.receive(routeURL)
}

// TestWrongClients: who is refused, and with what.
func TestWrongClients(t *testing.T) {
	c := newCluster(t, slotsOf("n1"))
	addr, _ := c.xds(nil)
	for _, test := range []struct {
		name string
		id   spiffe.ID
		node *corev3.Node
		url  string
		want codes.Code
	}{
		{"another node", spiffe.ID{Service: "proxy", Node: "n2"}, &corev3.Node{Id: "n1"}, listenerURL, codes.PermissionDenied},
		{"no node in the certificate", spiffe.ID{Service: "proxy"}, &corev3.Node{Id: "n1"}, listenerURL, codes.PermissionDenied},
		{"another service", spiffe.ID{Service: "agent", Node: "n1"}, &corev3.Node{Id: "n1"}, listenerURL, codes.PermissionDenied},
		{"no node id", spiffe.ID{Service: "proxy", Node: "n1"}, nil, listenerURL, codes.InvalidArgument},
		{"wrong type", spiffe.ID{Service: "proxy", Node: "n1"}, &corev3.Node{Id: "n1"}, "type.googleapis.com/envoy.config.bootstrap.v3.Bootstrap", codes.InvalidArgument},
		{"no type", spiffe.ID{Service: "proxy", Node: "n1"}, &corev3.Node{Id: "n1"}, "", codes.InvalidArgument},
	} {
		t.Run(test.name, func(t *testing.T) {
			conn := c.dial(test.id, addr)
			stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).StreamAggregatedResources(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if err := stream.Send(&discoveryv3.DiscoveryRequest{Node: test.node, TypeUrl: test.url}); err != nil && !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
			if _, err := stream.Recv(); status.Code(err) != test.want {
				t.Errorf("%v, want %v", err, test.want)
			}
		})
	}
}

// TestUnservedType: an Envoy that asks for what is never sent keeps its stream.
func TestUnservedType(t *testing.T) {
	c := newCluster(t, slotsOf("n1"))
	addr, _ := c.xds(nil)
	s := c.sotw("n1", addr)
	s.ask("type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret", "", "x")
	s.quiet()
}

// TestReconnectLoop: streams that come and go leave nothing behind; the number that one node may have is bounded.
func TestReconnectLoop(t *testing.T) {
	c := newCluster(t, httpFilter("http-1", "/one"), slotsOf("n1", "http-1"))
	addr, _ := c.xds(func(config *xds.Config) { config.NodeStreams = 3 })
	conn := c.dial(spiffe.ID{Service: "proxy", Node: "n1"}, addr)
	ads := discoveryv3.NewAggregatedDiscoveryServiceClient(conn)
	for range 100 {
		stream, err := ads.StreamAggregatedResources(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, url := range []string{clusterURL, listenerURL} {
			if err := stream.Send(&discoveryv3.DiscoveryRequest{Node: &corev3.Node{Id: "n1"}, TypeUrl: url}); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
		if err := stream.CloseSend(); err != nil {
			t.Fatal(err)
		}
		for err == nil {
			_, err = stream.Recv()
		}
		if !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
	}
	var open []*sotw
	for range 3 {
		s := c.sotw("n1", addr)
		s.quiet()
		open = append(open, s)
	}
	c.sotw("n1", addr).ends(codes.ResourceExhausted)
	open[0].quiet2()
}

// quiet2 proves that a stream still works.
func (s *sotw) quiet2() {
	s.t.Helper()
	s.ask(listenerURL, "")
	s.receive(listenerURL)
}

// TestReplicas: two servers give one version, so that a client that moves gets nothing that it has, and everything that it has not.
func TestReplicas(t *testing.T) {
	c := newCluster(t, httpFilter("http-1", "/one"), slotsOf("n1", "http-1"))
	first, stopFirst := c.xds(nil)
	second, _ := c.xds(nil)
	a := c.sotw("n1", first)
	a.start("http-1")
	b := c.sotw("n1", second)
	b.ask(listenerURL, a.last[listenerURL].GetVersionInfo())
	b.ask(routeURL, a.last[routeURL].GetVersionInfo(), "http-1")
	b.quiet() // nothing came of the first two
	stopFirst()
	a.ends(codes.OK)
	c.policy.set(httpFilter("http-1", "/two"))
	if got := bodies(t, b.receive(routeURL).GetResources()); !strings.Contains(got["http-1"], "/two") {
		t.Errorf("routes %v", got)
	}
	// The replica knows what the client had from the other one: a refusal brings that back.
	b.nack(routeURL, "no")
	if got := bodies(t, b.receive(routeURL).GetResources()); !strings.Contains(got["http-1"], "/one") {
		t.Errorf("routes %v", got)
	}
}

// TestRestart: a server that starts anew sends nothing before it knows everything, and a stock client does not notice.
func TestRestart(t *testing.T) {
	v1, v2 := backend(t, "v1"), backend(t, "v2")
	c := newCluster(t, append(published(t, nil),
		serviceOf(t, "api-service", v1), serviceOf(t, "api-service-v1", v1), serviceOf(t, "api-service-v2", v1), slotsOf("n1", "route-1"))...)
	addr, stop := c.xds(nil)
	conn := c.stockClient("production.api-service:80", addr)
	call(t, conn)
	stop()
	for range 20 {
		call(t, conn)
	}
	_, stop = c.xds(func(config *xds.Config) { config.Listen = addr })
	for range 20 {
		call(t, conn)
	}
	c.policy.set(serviceOf(t, "api-service-v1", v2), serviceOf(t, "api-service-v2", v2))
	follow(t, func() bool { return call(t, conn) == "v2" }, 30)
	stop()
	call(t, conn)
}

// TestOrder: routes to a new cluster wait until the client has the cluster and its endpoints, and the old cluster stays until the routes are gone.
func TestOrder(t *testing.T) {
	only := func(name string) []*policyv1.RenderResource {
		return published(t, func(spec string) string {
			return strings.ReplaceAll(strings.ReplaceAll(spec, "production/api-service-v1", name), "production/api-service-v2", name)
		})
	}
	const v1, v2 = "production/api-service-v1", "production/api-service-v2"
	c := newCluster(t, append(only(v1), serviceOf(t, "api-service-v1", "10.0.0.1:80"), serviceOf(t, "api-service-v2", "10.0.0.2:80"),
		slotsOf("n1", "route-1"))...)
	addr, _ := c.xds(func(config *xds.Config) { config.Patience = time.Hour })
	s := c.sotw("n1", addr)
	clusters := func() []string { return namesOf(bodies(t, s.receive(clusterURL).GetResources())) }
	endpoints := func(names ...string) {
		t.Helper()
		s.ask(endpointURL, s.last[endpointURL].GetVersionInfo(), names...)
		s.receive(endpointURL)
		s.ack(endpointURL)
	}
	const routes = "production/api-traffic-split/api-listener#0.0"
	s.ask(clusterURL, "")
	if got := clusters(); !slices.Equal(got, []string{"original-dst", v1, "weir-access-log"}) {
		t.Fatalf("clusters %q", got)
	}
	s.ack(clusterURL)
	s.ask(listenerURL, "")
	s.ask(routeURL, "", routes)
	endpoints(v1) // before the listeners
	s.receive(listenerURL)
	s.ack(listenerURL)
	s.receive(routeURL)
	s.ack(routeURL)

	c.policy.set(only(v2)...)
	if got := clusters(); !slices.Equal(got, []string{"original-dst", v1, v2, "weir-access-log"}) {
		t.Fatalf("clusters %q", got)
	}
	s.ack(clusterURL)
	endpoints(v1, v2) // before the routes
	if got := bodies(t, s.receive(routeURL).GetResources())[routes]; !strings.Contains(got, v2) || strings.Contains(got, v1) {
		t.Fatalf("routes %s", got)
	}
	s.ack(routeURL)
	if got := clusters(); !slices.Equal(got, []string{"original-dst", v2, "weir-access-log"}) {
		t.Fatalf("clusters %q", got)
	}
}

// TestNotWaitedFor: a client that never takes a cluster gets its listeners all the same, after a while.
func TestNotWaitedFor(t *testing.T) {
	c := newCluster(t, append(published(t, nil), httpFilter("http-1", "/one"), slotsOf("n1", "http-1"))...)
	addr, _ := c.xds(func(config *xds.Config) { config.Patience = 50 * time.Millisecond })
	s := c.sotw("n1", addr)
	s.ask(clusterURL, "")
	s.receive(clusterURL)
	s.ask(listenerURL, "")
	s.receive(listenerURL)
}
