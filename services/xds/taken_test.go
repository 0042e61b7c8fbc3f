// SPDX-License-Identifier: Apache-2.0

package xds_test

import (
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

// revised is a filter with a revision, which is its path.
func revised(key, path string) *policyv1.RenderResource {
	r, _ := proto.Clone(httpFilter(key, path)).(*policyv1.RenderResource)
	r.GetFilter().Revision = path
	return r
}

// taken waits for reports until those of some resources are as wanted; "" is the proxies themselves: connected or nothing.
func (p *fakePolicy) taken(t *testing.T, when string, want map[string]string) {
	t.Helper()
	timeout := time.After(deadline)
	for left := len(want); left > 0; {
		select {
		case r := <-p.reports:
			got := r.GetRevision()
			if r.GetConnected() {
				got = "connected"
			}
			if w, ok := want[r.GetResource()]; !ok || w != got || r.GetNode() != "n1" || r.GetError() != "" {
				t.Fatalf("%s: report %v, want one of %v", when, r, want)
			}
			left--
		case <-timeout:
			t.Fatalf("%s: %d of the reports %v did not come", when, left, want)
		}
	}
}

// TestTaken: the policy service is told which revision of a filter every proxy of a node has taken, once, and of an edit only that.
func TestTaken(t *testing.T) {
	c := newCluster(t, revised("http-1", "/one"), revised("http-2", "/one"), slotsOf("n1", "http-1", "http-2"))
	addr, _ := c.xds(nil)
	s := c.sotw("n1", addr)
	s.ask(listenerURL, "")
	s.receive(listenerURL)
	c.policy.taken(t, "begun", map[string]string{"": "connected"})
	s.ack(listenerURL)
	s.ask(routeURL, "", "http-1")
	s.receive(routeURL)
	s.ack(routeURL)
	c.policy.taken(t, "one has its routes", map[string]string{"http-1": "/one"})
	s.ask(routeURL, "", "http-1", "http-2")
	s.receive(routeURL)
	s.ack(routeURL)
	c.policy.taken(t, "both", map[string]string{"http-2": "/one"})

	// An edit is taken when it is acknowledged.
	c.policy.set(revised("http-2", "/two"))
	s.receive(routeURL)
	s.ack(routeURL)
	c.policy.taken(t, "edited", map[string]string{"http-2": "/two"})

	// A second proxy, as in a hot restart, takes nothing back; of the next edit both must have had it.
	d := c.delta("n1", addr)
	d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: listenerURL})
	d.ack(d.receive(listenerURL))
	d.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: routeURL, ResourceNamesSubscribe: []string{"http-1", "http-2"}})
	d.ack(d.receive(routeURL))
	c.policy.set(revised("http-1", "/two"))
	s.receive(routeURL)
	s.ack(routeURL)
	s.quiet()
	r := d.receive(routeURL)
	if n := len(c.policy.reports); n != 0 {
		t.Errorf("%d reports before both have taken it", n)
	}
	d.ack(r)
	c.policy.taken(t, "both proxies", map[string]string{"http-1": "/two"})

	// A refused edit is not taken, and is told.
	c.policy.set(revised("http-1", "/three"))
	s.receive(routeURL)
	s.nack(routeURL, "no")
	if r := c.policy.report(t, "http-1"); r.GetError() == "" || r.GetRevision() != "/two" {
		t.Errorf("report %v", r)
	}
	d.ack(d.receive(routeURL)) // a program of the same version takes it after all
	c.policy.taken(t, "one of them has it", map[string]string{"http-1": "/two"})

	// What has no slot any more is taken no longer.
	c.policy.set(slotsOf("n1", "http-2"))
	if r := c.policy.report(t, "http-1"); r.GetRevision() != "" {
		t.Errorf("report %v", r)
	}
	s.cancel()
	_ = d.stream.CloseSend() // the server sees it
	c.policy.taken(t, "no proxy", map[string]string{"": "", "http-2": ""})
}

// TestTakenBefore: what a proxy has from another server, or this one before, counts at once.
func TestTakenBefore(t *testing.T) {
	c := newCluster(t, revised("http-1", "/one"), slotsOf("n1", "http-1"))
	addr, _ := c.xds(nil)
	first := c.delta("n1", addr)
	first.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: listenerURL})
	listeners := first.receive(listenerURL)
	first.ack(listeners)
	first.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: routeURL, ResourceNamesSubscribe: []string{"http-1"}})
	routes := first.receive(routeURL)
	first.ack(routes)
	c.policy.taken(t, "first", map[string]string{"": "connected", "http-1": "/one"})
	_ = first.stream.CloseSend() // the server sees it
	c.policy.taken(t, "gone", map[string]string{"": "", "http-1": ""})

	versions := func(r *discoveryv3.DeltaDiscoveryResponse) map[string]string {
		all := map[string]string{}
		for _, x := range r.GetResources() {
			all[x.GetName()] = x.GetVersion()
		}
		return all
	}
	again := c.delta("n1", addr)
	again.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: listenerURL, InitialResourceVersions: versions(listeners)})
	again.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: routeURL, ResourceNamesSubscribe: []string{"http-1"}, InitialResourceVersions: versions(routes)})
	c.policy.taken(t, "again", map[string]string{"": "connected", "http-1": "/one"})
}
