// SPDX-License-Identifier: Apache-2.0

package xds_test

import (
	"slices"
	"strings"
	"testing"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/services/xds"
)

// TestPolicyReplicas: all replicas of the policy service are told what is refused.
func TestPolicyReplicas(t *testing.T) {
	state := []*policyv1.RenderResource{httpFilter("http-1", "/one"), slotsOf("n1", "http-1")}
	c := newCluster(t, state...)
	other, otherAddr, _ := c.another(state...)
	addr, _ := c.xds(func(config *xds.Config) { config.Policy = []string{c.addr, otherAddr} })
	s := c.sotw("n1", addr)
	s.ask(routeURL, "", "http-1")
	s.receive(routeURL)
	s.nack(routeURL, "no")
	for _, policy := range []*fakePolicy{c.policy, other} {
		if r := policy.report(t, "http-1"); r.GetError() == "" || r.GetNode() != "n1" {
			t.Errorf("report %v", r)
		}
	}
}

// TestPolicyTakeover: when the replica that gives the state goes, the state of the other comes into force, but for nodes of which it knows nothing yet.
func TestPolicyTakeover(t *testing.T) {
	c := newCluster(t, httpFilter("http-1", "/one"), slotsOf("n1", "http-1"))
	unknown := &policyv1.RenderResource{Resource: &policyv1.RenderResource_Node{Node: &policyv1.NodeSlots{Node: "n1", Unknown: true}}}
	// The other one begins after the first was chosen.
	otherAddr := freeAddr(t)
	addr, _ := c.xds(func(config *xds.Config) { config.Policy = []string{c.addr, otherAddr} })
	s := c.sotw("n1", addr)
	s.start("http-1")
	other, _ := c.anotherAt(otherAddr, httpFilter("http-1", "/two"), unknown)
	other.watched(t)
	c.stopPolicy()
	if got := bodies(t, s.receive(routeURL).GetResources())["http-1"]; !strings.Contains(got, "/two") {
		t.Errorf("routes %s", got)
	}
	s.ack(routeURL)
	other.set(slotsOf("n1", "http-1", "http-1"))
	if got := namesOf(bodies(t, s.receive(listenerURL).GetResources())); !slices.Equal(got, []string{"slot-1", "slot-2"}) {
		t.Errorf("listeners %q", got)
	}
}
