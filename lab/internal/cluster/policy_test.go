// SPDX-License-Identifier: Apache-2.0

package cluster_test

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/weirmesh/weir/lab/internal/cluster"
	"github.com/weirmesh/weir/lab/internal/object"
)

var denyKey = object.Key{Kind: "NetworkPolicy", Namespace: "default", Name: "deny"}

func denyYAML(spec string) string {
	return "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: deny, generation: 70}\nspec: " + spec + "\n"
}

func deny(t *testing.T, c *cluster.Cluster) *object.Raw {
	t.Helper()
	policy, ok := cluster.Get[*object.Raw](c, denyKey)
	if !ok {
		t.Fatal("no policy")
	}
	return policy
}

// TestPolicies: the generation counts changes of content; the status is the writer's, and nobody else's business.
func TestPolicies(t *testing.T) {
	c := newCluster(t)
	step := func(text, result string, generation int64) {
		t.Helper()
		if got := apply(t, c, text); !slices.Equal(got, []string{"networkpolicy/deny " + result}) {
			t.Errorf("%v, want %s", got, result)
		}
		if got := deny(t, c).Generation; got != generation {
			t.Errorf("generation %d, want %d", got, generation)
		}
	}
	step(denyYAML("{podSelector: {}}"), "created", 1)
	first := deny(t, c)
	if first.UID == "" || first.CreationTimestamp.IsZero() {
		t.Errorf("metadata %+v", first.ObjectMeta)
	}
	if err := c.UpdateStatus(denyKey, first.UID, []byte(`{"conditions": [{"type": "Valid", "status": "True"}], "x": {"a": 1, "b": 2}}`)); err != nil {
		t.Fatal(err)
	}
	step(denyYAML("{podSelector: {}}"), "unchanged", 1)
	step(denyYAML("{podSelector: {}, ingress: []}"), "configured", 2)
	step(strings.Replace(denyYAML("{podSelector: {}, ingress: []}"), "name: deny", "labels: {a: b}, name: deny", 1), "configured", 2)
	now := deny(t, c)
	if now.UID != first.UID || !strings.Contains(string(now.Status), "Valid") {
		t.Errorf("after a change: uid %s, status %s", now.UID, now.Status)
	}

	watch := c.Watch("NetworkPolicy")
	defer watch.Close()
	// next returns the types of the events that wait.
	next := func() []cluster.EventType {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		events, err := watch.Next(ctx)
		if err != nil {
			t.Fatal(err)
		}
		var types []cluster.EventType
		for _, event := range events {
			types = append(types, event.Type)
		}
		return types
	}
	next()
	// Merged: what is null goes, what is not named stays. A patch without effect is no event.
	for range 2 {
		if err := c.UpdateStatus(denyKey, "", []byte(`{"x": {"a": null, "c": 3}}`)); err != nil {
			t.Fatal(err)
		}
	}
	if got := next(); !slices.Equal(got, []cluster.EventType{cluster.Modified}) {
		t.Errorf("events %v, want one change", got)
	}
	if got := deny(t, c); got.Generation != 2 || string(got.Status) != `{"conditions":[{"status":"True","type":"Valid"}],"x":{"b":2,"c":3}}` {
		t.Errorf("generation %d, status %s", got.Generation, got.Status)
	}
	for _, tt := range []struct {
		name  string
		key   object.Key
		uid   string
		patch string
		found bool
	}{
		{"another uid", denyKey, "other", "{}", false},
		{"nobody", object.Key{Kind: "NetworkPolicy", Namespace: "default", Name: "nobody"}, "", "{}", false},
		{"not JSON", denyKey, "", "{", true},
		{"not an object", denyKey, "", "[]", true},
	} {
		err := c.UpdateStatus(tt.key, "", []byte(tt.patch))
		if tt.uid != "" {
			err = c.UpdateStatus(tt.key, "other", []byte(tt.patch))
		}
		if err == nil || errors.Is(err, cluster.ErrNotFound) == tt.found {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	// A kind with a type has its own.
	apply(t, c, serviceYAML("web", "ports: [{port: 1}]"))
	web := object.Key{Kind: "Service", Namespace: "default", Name: "web"}
	if err := c.UpdateStatus(web, "", []byte(`{"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}}`)); err != nil {
		t.Fatal(err)
	}
	if service, _ := cluster.Get[*corev1.Service](c, web); len(service.Status.LoadBalancer.Ingress) != 1 || service.Spec.Ports[0].Port != 1 {
		t.Errorf("service %+v", service)
	}
}

func TestLease(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	c := cluster.New(cluster.Config{
		ServiceV4: netip.MustParsePrefix("10.96.0.0/16"), ServiceV6: netip.MustParsePrefix("fd00:10:96::/112"), Now: func() time.Time { return now },
	})
	for _, tt := range []struct {
		after  time.Duration
		holder string
		want   string
	}{
		{0, "a", "a"}, {time.Second, "b", "a"}, {5 * time.Second, "a", "a"}, {9 * time.Second, "b", "a"}, {time.Second, "b", "b"}, {time.Second, "a", "b"},
	} {
		now = now.Add(tt.after)
		if got, err := c.AcquireLease("writer", tt.holder, 10*time.Second); got != tt.want || err != nil {
			t.Errorf("at %s %s asks: %s has it (%v), want %s", now, tt.holder, got, err, tt.want)
		}
	}
	if got, err := c.AcquireLease("other", "a", time.Second); got != "a" || err != nil {
		t.Errorf("another lease: %s, %v", got, err)
	}
	for _, d := range []time.Duration{0, 301 * time.Second} {
		if _, err := c.AcquireLease("writer", "a", d); err == nil {
			t.Errorf("a lease of %s was given", d)
		}
	}
}

// TestClear: what came with the cluster stays, and a pod stays until it is gone, without grace.
func TestClear(t *testing.T) {
	c := newCluster(t)
	apply(t, c, "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {a: b}}\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: default, labels: {a: b}}\n---\n"+
		"apiVersion: v1\nkind: Node\nmetadata: {name: node1, labels: {a: b}}\n---\n"+denyYAML("{}")+"---\n"+podYAML("web", "")+"---\n"+deploymentYAML("many", 2, "one")+"---\n"+
		serviceYAML("web", "type: NodePort, selector: {app: web}, ports: [{port: 1, nodePort: 30001}]"))
	c.Clear()
	for _, pod := range pods(c) {
		if pod.DeletionTimestamp == nil || pod.DeletionGracePeriodSeconds == nil || *pod.DeletionGracePeriodSeconds != 0 {
			t.Errorf("pod %s: %+v", pod.Name, pod.ObjectMeta)
		}
		c.PodGone(pod.UID)
	}
	var left []string
	for _, kind := range []string{"Namespace", "Node", "Pod", "Deployment", "ReplicaSet", "Service", "EndpointSlice", "NetworkPolicy"} {
		for _, o := range c.Objects(kind, "", "") {
			left = append(left, object.KeyOf(o).String())
			if o.GetLabels()["a"] != "" {
				t.Errorf("%s keeps its labels", object.KeyOf(o))
			}
		}
	}
	if want := []string{"Namespace/default", "Namespace/kube-system", "Node/node1", "Node/node2"}; !slices.Equal(left, want) {
		t.Errorf("left: %v, want %v", left, want)
	}
	// Its ports and names are free again.
	if got := apply(t, c, serviceYAML("other", "type: NodePort, ports: [{port: 1, nodePort: 30001}]")); !slices.Equal(got, []string{"service/other created"}) {
		t.Errorf("%v", got)
	}
}

func service(t *testing.T, c *cluster.Cluster, name string) *corev1.Service {
	t.Helper()
	found, ok := cluster.Get[*corev1.Service](c, object.Key{Kind: "Service", Namespace: "default", Name: name})
	if !ok {
		t.Fatalf("no service %s", name)
	}
	return found
}

func TestServicesOnTheOutside(t *testing.T) {
	c := cluster.New(cluster.Config{
		ServiceV4: netip.MustParsePrefix("10.96.0.0/16"), ServiceV6: netip.MustParsePrefix("fd00:10:96::/112"),
		BalancerV4: netip.MustParsePrefix("198.18.0.0/30"), BalancerV6: netip.MustParsePrefix("fd00:198:18::/112"),
		Families: []corev1.IPFamily{corev1.IPv4Protocol}, Now: time.Now,
	})
	apply(t, c, serviceYAML("node", "type: NodePort, ports: [{name: a, port: 1, nodePort: 30000}, {name: b, port: 2}]")+"---\n"+
		serviceYAML("pool", "type: LoadBalancer, externalTrafficPolicy: Local, ports: [{port: 1}]")+"---\n"+
		serviceYAML("given", "type: LoadBalancer, loadBalancerIP: 192.0.2.1, allocateLoadBalancerNodePorts: false, ports: [{port: 1}]"))
	node, pool, given := service(t, c, "node"), service(t, c, "pool"), service(t, c, "given")
	if p := node.Spec.Ports; p[0].NodePort != 30000 || p[1].NodePort <= 30000 || p[1].NodePort > 32767 {
		t.Errorf("node ports %+v", p)
	}
	if pool.Spec.HealthCheckNodePort == 0 || pool.Spec.Ports[0].NodePort == 0 || pool.Status.LoadBalancer.Ingress[0].IP != "198.18.0.1" || len(pool.Status.LoadBalancer.Ingress) != 1 {
		t.Errorf("pool %+v %+v", pool.Spec, pool.Status)
	}
	if given.Spec.Ports[0].NodePort != 0 || given.Status.LoadBalancer.Ingress[0].IP != "192.0.2.1" {
		t.Errorf("given %+v %+v", given.Spec, given.Status)
	}
	if !slices.Equal(node.Spec.ClusterIPs, []string{node.Spec.ClusterIP}) {
		t.Errorf("a cluster of one family gives %v", node.Spec.ClusterIPs)
	}
	// What a service had it keeps.
	apply(t, c, serviceYAML("pool", "type: LoadBalancer, externalTrafficPolicy: Local, selector: {a: b}, ports: [{port: 1}]"))
	again := service(t, c, "pool")
	if again.Spec.HealthCheckNodePort != pool.Spec.HealthCheckNodePort || again.Spec.Ports[0].NodePort != pool.Spec.Ports[0].NodePort ||
		again.Status.LoadBalancer.Ingress[0].IP != "198.18.0.1" {
		t.Errorf("after a change: %+v %+v", again.Spec, again.Status)
	}
	// What it no longer asks for is free, and gone from its status.
	apply(t, c, serviceYAML("pool", "ports: [{port: 1}]"))
	if plain := service(t, c, "pool"); len(plain.Status.LoadBalancer.Ingress) != 0 || plain.Spec.Ports[0].NodePort != 0 {
		t.Errorf("as ClusterIP: %+v %+v", plain.Spec, plain.Status)
	}
	apply(t, c, serviceYAML("next", "type: LoadBalancer, ports: [{port: 1}]"))
	if ip := service(t, c, "next").Status.LoadBalancer.Ingress[0].IP; ip != "198.18.0.1" {
		t.Errorf("the freed address was not given again, but %s", ip)
	}
}

func TestSlices(t *testing.T) {
	c := newCluster(t)
	apply(t, c, "apiVersion: v1\nkind: Node\nmetadata: {name: node1, labels: {topology.kubernetes.io/zone: z1}}\n---\n"+podYAML("web", "  nodeName: node1\n")+"---\n"+
		strings.Replace(podYAML("far", "  nodeName: node1\n"), "labels: {app: far}", "labels: {app: web}, annotations: {weir.dev/cluster: c2}", 1)+"---\n"+
		serviceYAML("web", "ipFamilies: [IPv4], trafficDistribution: PreferSameNode, selector: {app: web}, ports: [{port: 1, targetPort: 2}]")+"---\n"+
		serviceYAML("hand", "ports: [{port: 1}]")+"---\n"+
		"apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: web-ipv4, labels: {kubernetes.io/service-name: hand}}\naddressType: IPv4\nports: [{port: 9}]\nendpoints: [{addresses: [192.0.2.1]}]\n")
	for _, pod := range pods(c) {
		run(c, pod, "10.244.1.9")
	}
	hand, ok := cluster.Get[*discoveryv1.EndpointSlice](c, object.Key{Kind: "EndpointSlice", Namespace: "default", Name: "web-ipv4"})
	if !ok || hand.Endpoints[0].Addresses[0] != "192.0.2.1" || *hand.Ports[0].Protocol != corev1.ProtocolTCP {
		t.Fatalf("hand-made slice: %+v", hand)
	}
	own := func() discoveryv1.Endpoint {
		t.Helper()
		slice, ok := cluster.Get[*discoveryv1.EndpointSlice](c, object.Key{Kind: "EndpointSlice", Namespace: "default", Name: "web-ipv4-lab"})
		if !ok || len(slice.Endpoints) != 1 {
			t.Fatalf("slice of a service with a selector: %+v", slice)
		}
		return slice.Endpoints[0]
	}
	e := own()
	if *e.Zone != "z1" || *e.NodeName != "node1" || e.TargetRef.Name != "web" || !*e.Conditions.Ready || e.Hints == nil || e.Hints.ForNodes[0].Name != "node1" || e.Hints.ForZones[0].Name != "z1" {
		t.Errorf("endpoint %+v", e)
	}
	// While its pod drains, an endpoint serves and is terminating.
	c.Delete([]object.Key{{Kind: "Pod", Namespace: "default", Name: "web"}})
	if e = own(); *e.Conditions.Ready || !*e.Conditions.Serving || !*e.Conditions.Terminating || e.Hints != nil {
		t.Errorf("endpoint of a pod that ends: %+v", e)
	}
	if got := c.Delete([]object.Key{object.KeyOf(hand)}); !slices.Equal(got, []string{"endpointslice/web-ipv4 deleted"}) {
		t.Errorf("%v", got)
	}
}

// FuzzUpdateStatus: whatever a patch holds, the object's content and generation stay, and the same patch again changes nothing.
func FuzzUpdateStatus(f *testing.F) {
	for _, patch := range []string{`{}`, `null`, `{"a": {"b": null, "c": [1, {}]}}`, `{"conditions": [{"type": "Valid"}]}`, `{"a": 1e999}`, `[`} {
		f.Add([]byte(patch))
	}
	f.Fuzz(func(t *testing.T, patch []byte) {
		c := newCluster(t)
		apply(t, c, denyYAML("{podSelector: {}}"))
		if err := c.UpdateStatus(denyKey, "", patch); err != nil {
			return
		}
		first := deny(t, c)
		if err := c.UpdateStatus(denyKey, "", patch); err != nil {
			t.Fatalf("the second time: %v", err)
		}
		second := deny(t, c)
		if second.ResourceVersion != first.ResourceVersion {
			t.Errorf("the same patch changed %s to %s", first.Status, second.Status)
		}
		if first.Generation != 1 || string(first.Fields["spec"]) != `{"podSelector":{}}` {
			t.Errorf("generation %d, spec %s", first.Generation, first.Fields["spec"])
		}
		if _, err := object.JSON(second); err != nil {
			t.Error(err)
		}
	})
}
