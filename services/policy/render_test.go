// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"context"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/internal/client"
	"github.com/weirmesh/weir/internal/spiffe"
)

// xds is a hand-driven xDS server.
type xds struct {
	t        *testing.T
	stream   grpc.BidiStreamingClient[policyv1.WatchRequest, policyv1.WatchResponse]
	state    map[string]*policyv1.RenderResource
	last     uint64
	synced   bool
	received chan renderReceived
}

type renderReceived struct {
	response *policyv1.WatchResponse
	err      error
}

func (c *cluster) render(id spiffe.ID) policyv1.RenderServiceClient {
	c.t.Helper()
	conn, err := client.New(client.Config{Addresses: []string{c.addr}, TLS: c.identity(id), Service: "policy"})
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { conn.Close() })
	return policyv1.NewRenderServiceClient(conn)
}

// watch opens a stream as an xDS server.
func (c *cluster) watch(t *testing.T) *xds {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	stream, err := c.render(spiffe.ID{Service: "xds"}).Watch(ctx, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	x := &xds{t: t, stream: stream, state: map[string]*policyv1.RenderResource{}, received: make(chan renderReceived, 10_000)}
	go func() {
		for {
			response, err := stream.Recv()
			x.received <- renderReceived{response, err}
			if err != nil {
				return
			}
		}
	}()
	x.send(&policyv1.WatchRequest{Message: &policyv1.WatchRequest_Hello{Hello: &policyv1.RenderHello{Instance: "test"}}})
	return x
}

func (x *xds) send(r *policyv1.WatchRequest) {
	x.t.Helper()
	if err := x.stream.Send(r); err != nil {
		x.t.Fatalf("send: %v", err)
	}
}

func (x *xds) report(node, resource, reason string) {
	x.t.Helper()
	x.send(&policyv1.WatchRequest{Message: &policyv1.WatchRequest_Report{Report: &policyv1.ProxyReport{Node: node, Resource: resource, Error: reason}}})
}

// takes says that a node's proxies have taken what this server was told of a filter.
func (x *xds) takes(node, filter string) {
	x.t.Helper()
	revision := x.state["filter "+filter].GetFilter().GetRevision()
	if revision == "" {
		x.t.Errorf("filter %s has no revision", filter)
	}
	for _, r := range []*policyv1.ProxyReport{{Node: node, Connected: true}, {Node: node, Resource: filter, Revision: revision}} {
		x.send(&policyv1.WatchRequest{Message: &policyv1.WatchRequest_Report{Report: r}})
	}
}

// until takes in responses until the state is as wanted.
func (x *xds) until(what string, ok func() bool) {
	x.t.Helper()
	for !ok() {
		var r renderReceived
		select {
		case r = <-x.received:
		case <-time.After(deadline):
			x.t.Fatalf("waiting for %s: nothing came; state: %v", what, slices.Sorted(maps.Keys(x.state)))
		}
		if r.err != nil {
			x.t.Fatalf("waiting for %s: %v", what, r.err)
		}
		x.take(r.response)
	}
}

func (x *xds) take(r *policyv1.WatchResponse) {
	x.t.Helper()
	if r.GetRevision() <= x.last {
		x.t.Errorf("revision %d after %d", r.GetRevision(), x.last)
	}
	x.last = r.GetRevision()
	for _, u := range r.GetUpserts() {
		x.state[renderKey(u)] = u
	}
	for _, k := range r.GetRemovals() {
		delete(x.state, strings.TrimSpace(strings.Join([]string{
			prefixed("node", k.GetNode()), prefixed("filter", k.GetFilter()), prefixed("service", k.GetService()), prefixed("config", k.GetConfig()),
		}, "")))
	}
	if r.GetSynced() && x.synced {
		x.t.Error("synced twice")
	}
	x.synced = x.synced || r.GetSynced()
}

func prefixed(prefix, name string) string {
	if name == "" {
		return ""
	}
	return prefix + " " + name
}

func renderKey(r *policyv1.RenderResource) string {
	switch r := r.GetResource().(type) {
	case *policyv1.RenderResource_Node:
		return "node " + r.Node.GetNode()
	case *policyv1.RenderResource_Filter:
		return "filter " + r.Filter.GetKey()
	case *policyv1.RenderResource_Service:
		return "service " + r.Service.GetNamespace() + "/" + r.Service.GetName()
	case *policyv1.RenderResource_Config:
		return "config " + r.Config.GetKind() + "/" + r.Config.GetNamespace() + "/" + r.Config.GetName()
	}
	return "?"
}

func (a *agent) slots(slots ...*policyv1.Slot) {
	a.t.Helper()
	a.send(&policyv1.SyncRequest{Message: &policyv1.SyncRequest_Slots{Slots: &policyv1.SlotReport{Slots: slots}}})
}

func slot(number uint32, key string) *policyv1.Slot {
	return &policyv1.Slot{Number: number, Key: key, Port: 20000 + number}
}

const fromWebHTTP = `{endpointSelector: {matchLabels: {app: api}}, ingress: [{fromEndpoints: [{matchLabels: {app: web}}],
  toPorts: [{ports: [{port: "80", protocol: TCP}], rules: {http: [{method: GET, path: "/public/.*"}]}}]}]}`

func TestRender(t *testing.T) {
	c, one, two := two(t, policyDoc(1, fromWebHTTP))
	x := c.watch(t)
	x.until("the first state", func() bool { return x.synced })
	if n := x.state["node n1"].GetNode(); !n.GetUnknown() || len(n.GetSlots()) > 0 {
		t.Errorf("n1 has reported no slots and is %v", n)
	}

	// The agent is told that requests are filtered, and not how; its slot brings the filter to proxies.
	one.until("the policy", func() bool { return one.state["subject api"].GetSubject().GetIngress() != "" })
	p := one.state["policy "+one.state["subject api"].GetSubject().GetIngress()].GetPolicy()
	if len(p.GetFilters()) != 1 {
		t.Fatalf("policy is %v", p)
	}
	filter := p.GetFilters()[0]
	if filter.GetKind() != policyv1.FilterKind_FILTER_KIND_HTTP || len(filter.GetHttp()) > 0 || filter.GetNamespace() != "default" || filter.GetKey() == "" {
		t.Errorf("the agent's filter is %v", filter)
	}
	found := slices.ContainsFunc(p.GetClasses(), func(c *policyv1.PolicyClass) bool {
		return slices.ContainsFunc(c.GetRanges(), func(r *policyv1.PolicyRange) bool { return r.GetFilter() == filter.GetKey() && r.GetFirst() == 80 })
	})
	if !found {
		t.Errorf("no range names the filter: %v", p)
	}
	two.slots()
	one.slots(slot(3, filter.GetKey()))
	x.until("the slot", func() bool {
		return len(x.state["node n1"].GetNode().GetSlots()) == 1 && !x.state["node n2"].GetNode().GetUnknown()
	})
	rendered := x.state["filter "+filter.GetKey()].GetFilter()
	if len(rendered.GetHttp()) != 1 || rendered.GetHttp()[0].GetPath() != "/public/.*" || rendered.GetHttp()[0].GetRule().GetName() != "api" {
		t.Errorf("the proxies' filter is %v", rendered)
	}

	// A node's proxy that is not there, has not taken it, or refuses it shows in the status, until it has taken it, or nobody says so any more. The
	// other node has no such pod.
	c.status("CiliumNetworkPolicy default/api", "generation 1 in force on 1/2 nodes; n1: its proxy is not connected", one, two)
	x.send(&policyv1.WatchRequest{Message: &policyv1.WatchRequest_Report{Report: &policyv1.ProxyReport{Node: "n1", Connected: true}}})
	c.status("CiliumNetworkPolicy default/api", "in force on 1/2 nodes; n1: its proxy has not taken the newest "+filter.GetKey(), one, two)
	x.takes("n1", filter.GetKey())
	c.status("CiliumNetworkPolicy default/api", "generation 1 in force on 2/2 nodes", one, two)
	x.report("n1", filter.GetKey(), "no such regex")
	c.status("CiliumNetworkPolicy default/api", "in force on 1/2 nodes; n1: its proxy refused "+filter.GetKey()+": no such regex", one, two)
	x.takes("n1", filter.GetKey())
	c.status("CiliumNetworkPolicy default/api", "generation 1 in force on 2/2 nodes", one, two)
	x.report("n1", filter.GetKey(), "again")
	c.status("CiliumNetworkPolicy default/api", "again", one, two)
	if err := x.stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	c.status("CiliumNetworkPolicy default/api", "its proxy is not connected", one, two)

	// An edit of what the rule says keeps the key.
	y := c.watch(t)
	y.until("the first state", func() bool { return y.synced })
	c.source.send(modified, policyDoc(2, strings.Replace(fromWebHTTP, "/public/.*", "/other", 1)))
	y.until("the edit", func() bool {
		f := y.state["filter "+filter.GetKey()].GetFilter()
		return len(f.GetHttp()) == 1 && f.GetHttp()[0].GetPath() == "/other"
	})
	if rendered.GetRevision() == y.state["filter "+filter.GetKey()].GetFilter().GetRevision() {
		t.Error("the edited filter has the revision of before")
	}
	// It is in force when the proxy has taken the edit, not what was before.
	one.until("the edited policy", func() bool { return one.state["subject api"].GetSubject().GetIngress() != p.GetKey() })
	y.send(&policyv1.WatchRequest{Message: &policyv1.WatchRequest_Report{Report: &policyv1.ProxyReport{
		Node: "n1", Resource: filter.GetKey(), Revision: rendered.GetRevision(),
	}}})
	c.status("CiliumNetworkPolicy default/api", "generation 2 in force on 1/2 nodes; n1: its proxy has not taken the newest", one, two)
	y.takes("n1", filter.GetKey())
	c.status("CiliumNetworkPolicy default/api", "generation 2 in force on 2/2 nodes", one, two)
	// The slot outlives the policy until the agent has given it back.
	c.source.send(deleted, policyDoc(2, fromWebHTTP))
	one.until("the end of the policy", func() bool { return one.state["subject api"].GetSubject().GetIngress() == "" })
	one.slots()
	y.until("the end of the filter", func() bool {
		return len(y.state["node n1"].GetNode().GetSlots()) == 0 && y.state["filter "+filter.GetKey()] == nil
	})
}

const envoySpec = `{services: [{name: web, namespace: default, listener: l}], resources: [
{"@type": type.googleapis.com/envoy.config.listener.v3.Listener, name: l, filter_chains: [{filters: [{name: envoy.filters.network.http_connection_manager, typed_config: {
"@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, stat_prefix: l, rds: {route_config_name: r},
http_filters: [{name: envoy.filters.http.router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}]}}]}]},
{"@type": type.googleapis.com/envoy.config.route.v3.RouteConfiguration, name: r, virtual_hosts: [{name: v, domains: ["*"],
routes: [{match: {prefix: /}, route: {cluster: default/web}}]}]}]}`

func configDoc(name, spec string) string {
	return "kind: CiliumEnvoyConfig\napiVersion: cilium.io/v2\nmetadata: {name: " + name + ", namespace: default, uid: " + name + ", generation: 5}\nspec: " + spec + "\n"
}

const webService = "kind: Service\nmetadata: {name: web, namespace: default}\nspec: {clusterIP: 10.96.0.7, ports: [{port: 80}]}\n"

func TestEnvoyConfigs(t *testing.T) {
	c, one, two := two(t, webService, configDoc("a", envoySpec), configDoc("b", envoySpec), configDoc("c", "{resources: [{}]}"))
	x := c.watch(t)
	x.until("the first state", func() bool { return x.synced })
	one.until("the service", func() bool { return one.state["service default/web"].GetService().GetPorts()[0].GetRoute() != "" })
	key := one.state["service default/web"].GetService().GetPorts()[0].GetRoute()
	one.slots(slot(1, key))
	two.slots(slot(1, key))
	x.until("the route", func() bool { return x.state["filter "+key] != nil && len(x.state["node n2"].GetNode().GetSlots()) == 1 })
	route := x.state["filter "+key].GetFilter()
	if r := route.GetRoute(); route.GetKind() != policyv1.FilterKind_FILTER_KIND_ROUTE || r.GetName() != "a" || r.GetListener() != "l" ||
		r.GetServiceName() != "web" || r.GetServicePort() != 80 || route.GetNamespace() != "default" {
		t.Errorf("route is %v", route)
	}
	if x.state["service default/web"] == nil || !strings.Contains(string(x.state["config CiliumEnvoyConfig/default/a"].GetConfig().GetSpec()), "filter_chains") {
		t.Errorf("state is %v", slices.Sorted(maps.Keys(x.state)))
	}

	x.takes("n1", key)
	c.status("CiliumEnvoyConfig default/a", "generation 5 in force on 1/2 nodes; n2: its proxy is not connected", one, two)
	x.takes("n2", key)
	c.status("CiliumEnvoyConfig default/a", "generation 5 in force on 2/2 nodes", one, two)
	if before := route.GetRevision(); before != "" {
		c.source.send(modified, configDoc("a", strings.Replace(envoySpec, "prefix: /", "prefix: /x", 1)))
		x.until("the edited configuration", func() bool { return x.state["filter "+key].GetFilter().GetRevision() != before })
	}
	c.status("CiliumEnvoyConfig default/a", "n1: its proxy has not taken the newest "+key, one, two)
	x.takes("n1", key)
	x.takes("n2", key)
	c.status("CiliumEnvoyConfig default/a", "generation 5 in force on 2/2 nodes", one, two)
	c.status("CiliumEnvoyConfig default/b", "port 80 of service default/web is routed by CiliumEnvoyConfig default/a already", one, two)
	c.status("CiliumEnvoyConfig default/c", `"type":"Valid","status":"False"`, one, two)
	c.status("CiliumEnvoyConfig default/c", "spec.resources[0]", one, two)
	// A slot that an agent cannot give, and what a proxy refuses, show in the status of the object.
	refusal := &policyv1.Refusal{
		Revision: one.last, Error: "all slots are taken", Resource: &policyv1.ResourceKey{Kind: policyv1.ResourceKind_RESOURCE_KIND_SERVICE, Key: "default/web"},
	}
	one.send(&policyv1.SyncRequest{Message: &policyv1.SyncRequest_Refusal{Refusal: refusal}})
	c.status("CiliumEnvoyConfig default/a", "n1: all slots are taken", one, two)
	x.report("n2", "CiliumEnvoyConfig/default/a", "no cluster")
	c.status("CiliumEnvoyConfig default/a", "n2: its proxy refused CiliumEnvoyConfig/default/a: no cluster", one, two)

	list, err := c.query().ListPolicies(context.Background(), &policyv1.ListPoliciesRequest{Kind: "CiliumEnvoyConfig", Name: "a"})
	if err != nil {
		t.Fatal(err)
	}
	if len(list.GetPolicies()) != 1 || !slices.Equal(list.GetPolicies()[0].GetServices(), []string{"default/web:80"}) || len(list.GetPolicies()[0].GetLagging()) != 2 {
		t.Errorf("list is %v", list)
	}
}

func TestRenderRefused(t *testing.T) {
	c := newCluster(t, nodeDoc(1))
	c.start()
	hello := &policyv1.WatchRequest{Message: &policyv1.WatchRequest_Hello{Hello: &policyv1.RenderHello{Instance: "test"}}}
	report := &policyv1.WatchRequest{Message: &policyv1.WatchRequest_Report{Report: &policyv1.ProxyReport{Node: "n1", Resource: "r"}}}
	tests := []struct {
		name     string
		id       spiffe.ID
		messages []*policyv1.WatchRequest
		want     codes.Code
	}{
		{"an agent", spiffe.ID{Service: "agent", Node: "n1"}, []*policyv1.WatchRequest{hello}, codes.PermissionDenied},
		{"a proxy", spiffe.ID{Service: "proxy", Node: "n1"}, []*policyv1.WatchRequest{hello}, codes.PermissionDenied},
		{"no hello", spiffe.ID{Service: "xds"}, []*policyv1.WatchRequest{report}, codes.InvalidArgument},
		{"hello twice", spiffe.ID{Service: "xds"}, []*policyv1.WatchRequest{hello, hello}, codes.InvalidArgument},
		{"a report of nothing", spiffe.ID{Service: "xds"}, []*policyv1.WatchRequest{hello, {Message: &policyv1.WatchRequest_Report{}}}, codes.InvalidArgument},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), deadline)
			defer cancel()
			stream, err := c.render(tt.id).Watch(ctx, grpc.WaitForReady(true))
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range tt.messages {
				_ = stream.Send(m) // the answer is in Recv
			}
			for err == nil {
				_, err = stream.Recv()
			}
			if got := grpcstatus.Code(err); got != tt.want {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
	// An agent whose report is not in order has its stream ended.
	one := c.connect("n1")
	one.until("first state", func() bool { return one.synced })
	one.slots(slot(1, "a"), slot(1, "b"))
	if got := one.end(); got != codes.InvalidArgument {
		t.Errorf("a slot twice: the stream ended with %v", got)
	}
}
