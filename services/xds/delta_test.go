// SPDX-License-Identifier: Apache-2.0

package xds_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/weirmesh/weir/internal/spiffe"
)

// delta is an incremental client that says what a test says.
type delta struct {
	t      *testing.T
	stream discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
	in     chan *discoveryv3.DeltaDiscoveryResponse
	failed chan error
}

func (c *cluster) delta(node, addr string) *delta {
	c.t.Helper()
	conn := c.dial(spiffe.ID{Service: "proxy", Node: node}, addr)
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(c.t.Context())
	if err != nil {
		c.t.Fatal(err)
	}
	d := &delta{t: c.t, stream: stream, in: make(chan *discoveryv3.DeltaDiscoveryResponse, 1000), failed: make(chan error, 1)}
	go func() {
		for {
			response, err := stream.Recv()
			if err != nil {
				d.failed <- err
				return
			}
			d.in <- response
		}
	}()
	d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: clusterURL, Node: &corev3.Node{Id: node, UserAgentName: "test"}})
	d.ack(d.receive(clusterURL))
	return d
}

func (d *delta) send(r *discoveryv3.DeltaDiscoveryRequest) {
	d.t.Helper()
	if err := d.stream.Send(r); err != nil {
		d.t.Fatal(err)
	}
}

func (d *delta) receive(url string) *discoveryv3.DeltaDiscoveryResponse {
	d.t.Helper()
	select {
	case r := <-d.in:
		if r.GetTypeUrl() != url {
			d.t.Fatalf("got %s, want %s", r.GetTypeUrl(), url)
		}
		return r
	case err := <-d.failed:
		d.t.Fatalf("the stream ended: %v", err)
	case <-time.After(deadline):
		d.t.Fatalf("no response of type %s", url)
	}
	return nil
}

func (d *delta) ack(r *discoveryv3.DeltaDiscoveryResponse) {
	d.t.Helper()
	d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: r.GetTypeUrl(), ResponseNonce: r.GetNonce()})
}

func (d *delta) nack(r *discoveryv3.DeltaDiscoveryResponse, message string) {
	d.t.Helper()
	d.send(&discoveryv3.DeltaDiscoveryRequest{
		TypeUrl: r.GetTypeUrl(), ResponseNonce: r.GetNonce(), ErrorDetail: &rpcstatus.Status{Code: 3, Message: message},
	})
}

// texts are the resources of a response by name.
func texts(t *testing.T, r *discoveryv3.DeltaDiscoveryResponse) map[string]string {
	t.Helper()
	var list []*anypb.Any
	for _, resource := range r.GetResources() {
		list = append(list, resource.GetResource())
	}
	return bodies(t, list)
}

func TestDelta(t *testing.T) {
	c := newCluster(t, httpFilter("http-1", "/one"), httpFilter("http-2", "/two"), slotsOf("n1", "http-1", "http-2"))
	addr, _ := c.xds(nil)
	d := c.delta("n1", addr)
	d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: listenerURL, ResourceNamesSubscribe: []string{"*"}})
	r := d.receive(listenerURL)
	if got := namesOf(texts(t, r)); !slices.Equal(got, []string{"slot-1", "slot-2"}) {
		t.Fatalf("listeners %q", got)
	}
	d.ack(r)
	d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: routeURL, ResourceNamesSubscribe: []string{"http-1", "http-2", "none"}})
	r = d.receive(routeURL)
	if got := namesOf(texts(t, r)); !slices.Equal(got, []string{"http-1", "http-2"}) || !slices.Equal(r.GetRemovedResources(), []string{"none"}) {
		t.Fatalf("routes %q, removed %q", got, r.GetRemovedResources())
	}
	d.ack(r)

	// Only what changed is sent.
	c.policy.set(httpFilter("http-2", "/bad"))
	r = d.receive(routeURL)
	if got := namesOf(texts(t, r)); !slices.Equal(got, []string{"http-2"}) {
		t.Fatalf("routes %q", got)
	}
	d.nack(r, "no")
	r = d.receive(routeURL)
	if got := texts(t, r); len(got) != 1 || !strings.Contains(got["http-2"], "/two") {
		t.Fatalf("not the last good version: %v", got)
	}
	d.ack(r)
	if r := c.policy.report(t, "http-2"); r.GetError() == "" {
		t.Error("not reported")
	}

	// What is gone is removed.
	c.policy.set(slotsOf("n1", "http-1"))
	r = d.receive(listenerURL)
	if !slices.Equal(r.GetRemovedResources(), []string{"slot-2"}) || len(r.GetResources()) != 0 {
		t.Errorf("listeners %v", r)
	}
	d.ack(r)
	r = d.receive(routeURL)
	if !slices.Equal(r.GetRemovedResources(), []string{"http-2"}) {
		t.Errorf("routes %v", r)
	}
	d.ack(r)
}

// TestDeltaResume: a client that comes back says what it has, and gets the rest.
func TestDeltaResume(t *testing.T) {
	c := newCluster(t, httpFilter("http-1", "/one"), httpFilter("http-2", "/two"), slotsOf("n1", "http-1", "http-2"))
	addr, _ := c.xds(nil)
	d := c.delta("n1", addr)
	d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: listenerURL})
	r := d.receive(listenerURL)
	versions := map[string]string{"slot-7": "old"}
	for _, resource := range r.GetResources() {
		versions[resource.GetName()] = resource.GetVersion()
	}
	versions["slot-2"] = "old"
	again := c.delta("n1", addr)
	again.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: listenerURL, InitialResourceVersions: versions})
	r = again.receive(listenerURL)
	if got := namesOf(texts(t, r)); !slices.Equal(got, []string{"slot-2"}) || !slices.Equal(r.GetRemovedResources(), []string{"slot-7"}) {
		t.Errorf("listeners %q, removed %q", got, r.GetRemovedResources())
	}
}

// TestDeltaPipelined: a client that subscribes bit by bit and answers late loses nothing.
func TestDeltaPipelined(t *testing.T) {
	c := newCluster(t, httpFilter("http-1", "/one"), httpFilter("http-2", "/two"), slotsOf("n1", "http-1", "http-2"))
	addr, _ := c.xds(nil)
	d := c.delta("n1", addr)
	d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: routeURL, ResourceNamesSubscribe: []string{"http-1"}})
	first := d.receive(routeURL)
	d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: routeURL, ResourceNamesSubscribe: []string{"http-2"}})
	second := d.receive(routeURL)
	if got := namesOf(texts(t, second)); !slices.Equal(got, []string{"http-2"}) {
		t.Errorf("routes %q", got)
	}
	d.ack(second)
	d.nack(first, "no")
	r := d.receive(routeURL)
	if !slices.Equal(r.GetRemovedResources(), []string{"http-1"}) {
		t.Errorf("what was never taken is not left out: %v", r)
	}
	if r := c.policy.report(t, "http-1"); r.GetError() == "" {
		t.Error("not reported")
	}
}
