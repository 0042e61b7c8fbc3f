// SPDX-License-Identifier: Apache-2.0

package state_test

import (
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/weirmesh/weir/services/proxy/internal/state"
	"github.com/weirmesh/weir/services/proxy/internal/xds"
)

// fake remembers what it was told.
type fake struct {
	mu        sync.Mutex
	told      []string
	reachable map[string]bool
}

func (f *fake) tell(s string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.told = append(f.told, s)
	if strings.HasSuffix(s, " bad") {
		return errors.New("it is bad")
	}
	if strings.HasSuffix(s, " panic") {
		panic("it panics")
	}
	return nil
}

func (f *fake) has(s string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Contains(f.told, s)
}

type clusters struct{ *fake }

func (c clusters) Put(in *clusterv3.Cluster) error { return c.tell("put " + in.GetName()) }
func (c clusters) Remove(name string)              { _ = c.tell("remove " + name) }
func (c clusters) Unassign(name string)            { _ = c.tell("unassign " + name) }
func (c clusters) EDSNames() []string              { return nil }
func (c clusters) Assign(in *endpointv3.ClusterLoadAssignment) error {
	return c.tell("assign " + in.GetClusterName())
}

func (c clusters) Reachable(name string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.reachable[name]
}

type listeners struct{ *fake }

func (l listeners) Put(in *listenerv3.Listener) error { return l.tell("put " + in.GetName()) }
func (l listeners) Remove(name string)                { _ = l.tell("remove " + name) }
func (l listeners) Arrived()                          {}
func (l listeners) RouteNames() []string              { return nil }

// routes lead to the cluster that has their virtual host's name.
type routes struct{ cluster string }

func (r *routes) Clusters() []string { return []string{r.cluster} }

func newState(hold time.Duration) (*state.State[*routes], *fake) {
	f := &fake{reachable: map[string]bool{}}
	return state.New(state.Config[*routes]{
		Clusters: clusters{f}, Listeners: listeners{f}, Hold: hold, Log: slog.New(slog.DiscardHandler),
		Compile: func(in *routev3.RouteConfiguration) (*routes, error) {
			return &routes{cluster: in.GetVirtualHosts()[0].GetName()}, nil
		},
	}), f
}

func resource(t *testing.T, name string, m proto.Message) xds.Resource {
	t.Helper()
	body, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return xds.Resource{Name: name, Version: "1", Body: body}
}

func TestEachAlone(t *testing.T) {
	s, f := newState(time.Minute)
	var all []xds.Resource
	for _, name := range []string{"a", "b bad", "c panic", "d"} {
		all = append(all, resource(t, name, &clusterv3.Cluster{Name: name}))
	}
	all = append(all, resource(t, "e", &clusterv3.Cluster{Name: "other"}),
		xds.Resource{Name: "f", Body: &anypb.Any{TypeUrl: xds.Cluster, Value: []byte{0xff}}})
	refused := s.Apply(xds.Cluster, all, nil)
	for name, want := range map[string]string{"b bad": "it is bad", "c panic": "it panics", "e": `"other"`, "f": "proto"} {
		if err := refused[name]; err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
	if len(refused) != 4 || !f.has("put a") || !f.has("put d") {
		t.Errorf("refused %v, told %v", refused, f.told)
	}
	dump := s.Dump()
	if len(dump) != 6 || dump[0].Body == nil || dump[1].Body != nil || dump[1].Refused != "it is bad" {
		t.Errorf("dump %v", dump)
	}
}

// TestTooDear: what would cost the neighbours too much is refused before it is compiled, and what was in force stays.
func TestTooDear(t *testing.T) {
	s, f := newState(time.Minute)
	f.reachable["one"], f.reachable["two"] = true, true
	s.Apply(xds.Route, []xds.Resource{resource(t, "r", configuration("one"))}, nil)
	dear := configuration("two")
	for range 1_000 {
		dear.VirtualHosts[0].Routes = append(dear.VirtualHosts[0].Routes, &routev3.Route{Match: &routev3.RouteMatch{
			PathSpecifier: &routev3.RouteMatch_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: "/(a|b|c)*x{1,100}[0-9]+/.*"}},
		}})
	}
	refused := s.Apply(xds.Route, []xds.Resource{resource(t, "r", dear)}, nil)
	if err := refused["r"]; err == nil || !strings.Contains(err.Error(), "200000 instructions") {
		t.Errorf("refused %v", refused)
	}
	if r, ok := s.Routes("r"); !ok || r.cluster != "one" {
		t.Errorf("routes %v", r)
	}
}

func configuration(cluster string) *routev3.RouteConfiguration {
	return &routev3.RouteConfiguration{Name: "r", VirtualHosts: []*routev3.VirtualHost{{Name: cluster}}}
}

// TestRoutesWaitForClusters: those in force stay until what the new ones lead to is there, or for a while.
func TestRoutesWaitForClusters(t *testing.T) {
	s, f := newState(time.Minute)
	f.reachable["one"] = true
	in := func(want string) {
		t.Helper()
		if r, ok := s.Routes("r"); !ok || r.cluster != want {
			t.Fatalf("routes %v, want %s", r, want)
		}
	}
	s.Apply(xds.Route, []xds.Resource{resource(t, "r", configuration("one"))}, nil)
	in("one")
	s.Apply(xds.Route, []xds.Resource{resource(t, "r", configuration("two"))}, nil)
	in("one")
	f.mu.Lock()
	f.reachable["two"] = true
	f.mu.Unlock()
	s.Apply(xds.Endpoint, nil, nil)
	in("two")
	s.Apply(xds.Route, []xds.Resource{resource(t, "r", configuration("never"))}, nil)
	in("two")
	s.Release(time.Now().Add(2 * time.Minute))
	in("never")
}

// TestRemovalWaits: who still leads to a removed cluster has it for a while, and a cluster that comes back is not removed.
func TestRemovalWaits(t *testing.T) {
	s, f := newState(50 * time.Millisecond)
	for _, name := range []string{"gone", "back"} {
		s.Apply(xds.Cluster, []xds.Resource{resource(t, name, &clusterv3.Cluster{Name: name})}, nil)
	}
	s.Apply(xds.Cluster, nil, []string{"gone", "back"})
	s.Apply(xds.Cluster, []xds.Resource{resource(t, "back", &clusterv3.Cluster{Name: "back"})}, nil)
	if f.has("remove gone") {
		t.Error("removed at once")
	}
	deadline := time.Now().Add(10 * time.Second)
	for !f.has("remove gone") {
		if time.Now().After(deadline) {
			t.Fatal("never removed")
		}
		time.Sleep(time.Millisecond) // the pause of a poll
	}
	if f.has("remove back") {
		t.Error("what came back was removed")
	}
}
