// SPDX-License-Identifier: Apache-2.0

package cluster_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/weirmesh/weir/lab/internal/cluster"
	"github.com/weirmesh/weir/lab/internal/manifest"
	"github.com/weirmesh/weir/lab/internal/object"
)

func newCluster(t *testing.T) *cluster.Cluster {
	t.Helper()
	clock := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	return cluster.New(cluster.Config{
		Nodes: []cluster.NodeConfig{
			{Name: "node1", Addresses: []netip.Addr{netip.MustParseAddr("172.30.0.11")}, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}},
			{Name: "node2", Addresses: []netip.Addr{netip.MustParseAddr("172.30.0.12")}, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.2.0/24")}},
		},
		ServiceV4: netip.MustParsePrefix("10.96.0.0/16"), ServiceV6: netip.MustParsePrefix("fd00:10:96::/112"),
		DNSV4: netip.MustParseAddr("10.96.0.10"), DNSV6: netip.MustParseAddr("fd00:10:96::a"),
		Reserved: []string{"fabric"}, WatchLimit: 100,
		Now: func() time.Time { clock = clock.Add(time.Second); return clock },
	})
}

func apply(t *testing.T, c *cluster.Cluster, text string) []string {
	t.Helper()
	items, err := manifest.Parse("f.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	results, err := c.Apply(items)
	if err != nil {
		t.Fatal(err)
	}
	return results
}

func podYAML(name, more string) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: %s, labels: {app: %s}}\nspec:\n  containers: [{name: a, command: [a], ports: [{name: http, containerPort: 8080}]}]\n%s", name, name, more)
}

func serviceYAML(name, spec string) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Service\nmetadata: {name: %s}\nspec: {%s}\n", name, spec)
}

func deploymentYAML(name string, replicas int, command string) string {
	return fmt.Sprintf(`apiVersion: apps/v1
kind: Deployment
metadata: {name: %[1]s}
spec:
  replicas: %[2]d
  selector: {matchLabels: {app: %[1]s}}
  template:
    metadata: {labels: {app: %[1]s}}
    spec: {containers: [{name: a, command: [%[3]s], ports: [{name: http, containerPort: 8080}]}]}
`, name, replicas, command)
}

func pods(c *cluster.Cluster) []*corev1.Pod { return cluster.List[*corev1.Pod](c) }

// run makes a pod ready, as its runner would.
func run(c *cluster.Cluster, pod *corev1.Pod, addresses ...string) {
	c.SetPodStatus(pod.UID, func(status *corev1.PodStatus) {
		status.Phase = corev1.PodRunning
		status.PodIPs = nil
		for _, address := range addresses {
			status.PodIPs = append(status.PodIPs, corev1.PodIP{IP: address})
		}
		cluster.SetCondition(status, corev1.PodReady, true, "", "", metav1.Now())
	})
}

func TestDeployment(t *testing.T) {
	c := newCluster(t)
	apply(t, c, deploymentYAML("web", 4, "one"))
	all := pods(c)
	if len(all) != 4 {
		t.Fatalf("%d pods, want 4", len(all))
	}
	sets := cluster.List[*appsv1.ReplicaSet](c)
	if len(sets) != 1 {
		t.Fatalf("%d replica sets, want 1", len(sets))
	}
	byNode := map[string]int{}
	for _, pod := range all {
		byNode[pod.Spec.NodeName]++
		owner := metav1.GetControllerOf(pod)
		if owner.Kind != "ReplicaSet" || owner.UID != sets[0].UID {
			t.Errorf("pod %s is owned by %s %s", pod.Name, owner.Kind, owner.Name)
		}
		hash := pod.Labels["pod-template-hash"]
		if hash == "" || !strings.HasPrefix(pod.Name, "web-"+hash+"-") || sets[0].Name != "web-"+hash {
			t.Errorf("pod %s, set %s, hash %s", pod.Name, sets[0].Name, hash)
		}
	}
	if byNode["node1"] != 2 || byNode["node2"] != 2 {
		t.Errorf("spread over nodes: %v", byNode)
	}

	apply(t, c, deploymentYAML("web", 2, "one"))
	ending := 0
	for _, pod := range pods(c) {
		if pod.DeletionTimestamp != nil {
			ending++
			c.PodGone(pod.UID)
		}
	}
	if ending != 2 || len(pods(c)) != 2 {
		t.Fatalf("%d pods ended, %d left, want 2 and 2", ending, len(pods(c)))
	}

	// A new template: the old pods stay until the new ones are ready.
	apply(t, c, deploymentYAML("web", 2, "two"))
	if n := len(pods(c)); n != 4 {
		t.Fatalf("%d pods while rolling, want 4", n)
	}
	for _, pod := range pods(c) {
		if pod.Spec.Containers[0].Command[0] == "two" {
			run(c, pod, "10.244.1.9")
		}
	}
	for _, pod := range pods(c) {
		if old := pod.Spec.Containers[0].Command[0] == "one"; old != (pod.DeletionTimestamp != nil) {
			t.Errorf("pod of template %s: deletion %v", pod.Spec.Containers[0].Command[0], pod.DeletionTimestamp)
		}
		if pod.DeletionTimestamp != nil {
			c.PodGone(pod.UID)
		}
	}
	if n := len(cluster.List[*appsv1.ReplicaSet](c)); n != 1 || len(pods(c)) != 2 {
		t.Errorf("%d sets and %d pods after rolling, want 1 and 2", n, len(pods(c)))
	}

	c.Delete([]object.Key{{Kind: "Deployment", Namespace: "default", Name: "web"}})
	for _, pod := range pods(c) {
		c.PodGone(pod.UID)
	}
	if n := len(cluster.List[*appsv1.ReplicaSet](c)); n != 0 || len(pods(c)) != 0 {
		t.Errorf("%d sets and %d pods are left", n, len(pods(c)))
	}
}

func TestScheduling(t *testing.T) {
	c := newCluster(t)
	apply(t, c, "apiVersion: v1\nkind: Node\nmetadata: {name: node2, labels: {disk: fast}}\n---\n"+
		podYAML("chosen", "  nodeName: node2\n")+"---\n"+podYAML("labelled", "  nodeSelector: {disk: fast}\n")+"---\n"+podYAML("nowhere", "  nodeSelector: {disk: none}\n")+"---\n"+podYAML("free", ""))
	want := map[string]string{"chosen": "node2", "labelled": "node2", "nowhere": "", "free": "node1"}
	for _, pod := range pods(c) {
		if pod.Spec.NodeName != want[pod.Name] {
			t.Errorf("pod %s is on %q, want %q", pod.Name, pod.Spec.NodeName, want[pod.Name])
		}
		if pod.Name == "nowhere" && (len(pod.Status.Conditions) == 0 || pod.Status.Conditions[0].Reason != "Unschedulable") {
			t.Errorf("pod nowhere does not say why: %+v", pod.Status)
		}
	}
	// When the label comes, so does the pod.
	apply(t, c, "apiVersion: v1\nkind: Node\nmetadata: {name: node1, labels: {disk: none}}\n")
	pod, _ := cluster.Get[*corev1.Pod](c, object.Key{Kind: "Pod", Namespace: "default", Name: "nowhere"})
	if pod.Spec.NodeName != "node1" {
		t.Errorf("pod nowhere is on %q, want node1", pod.Spec.NodeName)
	}
}

func TestServices(t *testing.T) {
	c := newCluster(t)
	apply(t, c, podYAML("web", "")+`---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: http}]}
---
apiVersion: v1
kind: Service
metadata: {name: six}
spec: {ipFamilies: [IPv6], selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: none}
spec: {clusterIP: None, selector: {app: web}}
---
apiVersion: v1
kind: Service
metadata: {name: fixed}
spec: {clusterIP: 10.96.7.8, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: kube-dns, namespace: kube-system}
spec: {ports: [{port: 53, protocol: UDP}]}
`)
	for name, want := range map[string]string{
		"web": "10.96.1.0 fd00:10:96::100", "six": "fd00:10:96::101", "none": "None", "fixed": "10.96.7.8 fd00:10:96::708",
	} {
		service, _ := cluster.Get[*corev1.Service](c, object.Key{Kind: "Service", Namespace: "default", Name: name})
		if got := strings.Join(service.Spec.ClusterIPs, " "); got != want {
			t.Errorf("service %s has %s, want %s", name, got, want)
		}
	}
	dns, _ := cluster.Get[*corev1.Service](c, object.Key{Kind: "Service", Namespace: "kube-system", Name: "kube-dns"})
	if got := strings.Join(dns.Spec.ClusterIPs, " "); got != "10.96.0.10 fd00:10:96::a" {
		t.Errorf("kube-dns has %s", got)
	}

	endpoints := func(slice string) string {
		s, ok := cluster.Get[*discoveryv1.EndpointSlice](c, object.Key{Kind: "EndpointSlice", Namespace: "default", Name: slice})
		if !ok {
			return "no slice"
		}
		var all []string
		for _, e := range s.Endpoints {
			port := int32(0)
			if len(s.Ports) > 0 {
				port = *s.Ports[0].Port
			}
			all = append(all, fmt.Sprintf("%s:%d ready=%v", e.Addresses[0], port, *e.Conditions.Ready))
		}
		return strings.Join(all, ", ")
	}
	if got := endpoints("web-ipv4"); got != "" {
		t.Errorf("endpoints before the pod has an address: %s", got)
	}
	pod := pods(c)[0]
	run(c, pod, "10.244.1.5", "fd00:10:244:1::5")
	for slice, want := range map[string]string{
		"web-ipv4": "10.244.1.5:8080 ready=true", "web-ipv6": "fd00:10:244:1::5:8080 ready=true",
		"six-ipv4": "no slice", "six-ipv6": "fd00:10:244:1::5:8080 ready=true", "none-ipv4": "10.244.1.5:0 ready=true",
	} {
		if got := endpoints(slice); got != want {
			t.Errorf("%s: %s, want %s", slice, got, want)
		}
	}
	c.Delete([]object.Key{object.KeyOf(pod)})
	if got := endpoints("web-ipv4"); got != "10.244.1.5:8080 ready=false" {
		t.Errorf("endpoints of an ending pod: %s", got)
	}
	c.PodGone(pod.UID)
	if got := endpoints("web-ipv4"); got != "" {
		t.Errorf("endpoints of a pod that is gone: %s", got)
	}
	c.Delete([]object.Key{{Kind: "Service", Namespace: "default", Name: "web"}})
	if got := endpoints("web-ipv4"); got != "no slice" {
		t.Errorf("endpoints of a service that is gone: %s", got)
	}
}

func TestApplyAgain(t *testing.T) {
	c := newCluster(t)
	first := podYAML("web", "")
	if got := apply(t, c, first); !slices.Equal(got, []string{"pod/web created"}) {
		t.Errorf("%v", got)
	}
	pod := pods(c)[0]
	run(c, pod, "10.244.1.5")
	if got := apply(t, c, first); !slices.Equal(got, []string{"pod/web unchanged"}) {
		t.Errorf("%v", got)
	}
	// Labels change in place.
	if got := apply(t, c, strings.Replace(first, "app: web", "app: other", 1)); !slices.Equal(got, []string{"pod/web configured"}) {
		t.Errorf("%v", got)
	}
	if now := pods(c)[0]; now.UID != pod.UID || now.Labels["app"] != "other" || len(now.Status.PodIPs) != 1 {
		t.Errorf("after a change of labels: %s %v %v", now.UID, now.Labels, now.Status)
	}
	// Anything else takes a new pod, when the old one is gone.
	if got := apply(t, c, strings.Replace(first, "command: [a]", "command: [b]", 1)); !slices.Equal(got, []string{"pod/web replaced"}) {
		t.Errorf("%v", got)
	}
	if now := pods(c)[0]; now.UID != pod.UID || now.DeletionTimestamp == nil {
		t.Errorf("the old pod does not end: %+v", now.ObjectMeta)
	}
	c.PodGone(pod.UID)
	now := pods(c)[0]
	if now.UID == pod.UID || now.Spec.Containers[0].Command[0] != "b" || len(now.Status.PodIPs) != 0 || now.Spec.NodeName == "" {
		t.Errorf("the new pod: %+v", now)
	}
	if got := c.Delete([]object.Key{object.KeyOf(now), {Kind: "Pod", Namespace: "default", Name: "nobody"}}); !slices.Equal(got, []string{"pod/web deleted", "pod/nobody not found"}) {
		t.Errorf("%v", got)
	}
}

func TestAdmission(t *testing.T) {
	for _, tt := range []struct{ name, text, want string }{
		{"namespace", "apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: shop}\nspec: {containers: [{name: a, command: [a]}]}\n",
			"f.yaml:1: metadata.namespace: namespace shop does not exist; add a Namespace object"},
		{"node", podYAML("a", "  nodeName: node7\n"), "f.yaml:1: spec.nodeName: node7 is not a node of this lab"},
		{"unknown node", "apiVersion: v1\nkind: Node\nmetadata: {name: node7}\n", "f.yaml:1: metadata.name: node7 is not a node of this lab, which has 2"},
		{"moved node", "apiVersion: v1\nkind: Node\nmetadata: {name: node1}\nstatus: {addresses: [{type: InternalIP, address: 1.2.3.4}]}\n",
			"f.yaml:1: metadata.name: address 1.2.3.4: a node's addresses are fixed when the lab starts"},
		{"address of another", serviceYAML("a", "clusterIP: 10.97.0.1, ports: [{port: 1}]") + "---\n" + serviceYAML("b", "clusterIP: 10.97.0.1, ports: [{port: 1}]"),
			"f.yaml:6: spec.clusterIP: 10.97.0.1 belongs to Service/default/a"},
		{"node port of another", serviceYAML("a", "type: NodePort, ports: [{port: 1, nodePort: 30001}]") + "---\n" + serviceYAML("b", "type: NodePort, ports: [{port: 1, nodePort: 30001}]"),
			"f.yaml:6: spec.ports[0].nodePort: 30001/TCP belongs to Service/default/a"},
		{"load balancer of another", serviceYAML("a", "type: LoadBalancer, loadBalancerIP: 192.0.2.1, ports: [{port: 1}]") + "---\n" + serviceYAML("b", "type: LoadBalancer, loadBalancerIP: 192.0.2.1, ports: [{port: 1}]"),
			"f.yaml:6: spec.loadBalancerIP: 192.0.2.1 belongs to Service/default/a"},
		{"reserved name", "apiVersion: lab.weir.dev/v1\nkind: Host\nmetadata: {name: fabric}\nspec: {addresses: [1.2.3.4]}\n",
			"f.yaml:1: metadata.name: fabric is a name of the lab's own"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newCluster(t)
			items, err := manifest.Parse("f.yaml", []byte(tt.text+"---\n"+podYAML("good", "")))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := c.Apply(items); err == nil || err.Error() != tt.want {
				t.Errorf("got  %v\nwant %s", err, tt.want)
			}
			if len(pods(c)) != 0 {
				t.Error("a part of a broken set was applied")
			}
		})
	}
}

func TestNamespaceTakesAllWithIt(t *testing.T) {
	c := newCluster(t)
	apply(t, c, "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n---\n"+
		strings.Replace(deploymentYAML("web", 1, "a"), "{name: web}", "{name: web, namespace: shop}", 1)+"---\n"+
		"apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\nspec: {selector: {app: web}, ports: [{port: 1}]}\n")
	c.Delete([]object.Key{{Kind: "Namespace", Name: "shop"}})
	for _, pod := range pods(c) {
		c.PodGone(pod.UID)
	}
	watch := c.Watch()
	defer watch.Close()
	events, err := watch.Next(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, event := range events {
		if event.Object != nil && (event.Object.GetNamespace() == "shop" || event.Object.GetName() == "shop") {
			t.Errorf("%s is left", object.KeyOf(event.Object))
		}
	}
}

func TestWatch(t *testing.T) {
	c := newCluster(t)
	apply(t, c, podYAML("a", ""))
	watch := c.Watch("Pod")
	defer watch.Close()
	next := func() string {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		events, err := watch.Next(ctx)
		if err != nil {
			t.Fatal(err)
		}
		var all []string
		for _, event := range events {
			text := map[cluster.EventType]string{cluster.Added: "added", cluster.Modified: "modified", cluster.Deleted: "deleted", cluster.Synced: "synced"}[event.Type]
			if event.Object != nil {
				text += " " + event.Object.GetName()
			}
			all = append(all, text)
		}
		return strings.Join(all, ", ")
	}
	if got := next(); got != "added a, synced" {
		t.Errorf("at first: %s", got)
	}
	apply(t, c, podYAML("b", "")+"---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\n")
	if got := next(); got != "added b, modified b" {
		t.Errorf("after a new pod and its scheduling: %s", got)
	}
	pod := pods(c)[0]
	c.Delete([]object.Key{object.KeyOf(pod)})
	c.PodGone(pod.UID)
	if got := next(); got != "modified a, deleted a" {
		t.Errorf("after a deletion: %s", got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := watch.Next(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("after the end: %v", err)
	}
}

// TestWatchBehind: a reader that does not read is cut off, instead of holding all of history.
func TestWatchBehind(t *testing.T) {
	c := newCluster(t)
	apply(t, c, podYAML("a", ""))
	watch := c.Watch("Pod")
	defer watch.Close()
	pod := pods(c)[0]
	for i := range 200 {
		c.SetPodStatus(pod.UID, func(status *corev1.PodStatus) { status.Message = fmt.Sprint(i) })
	}
	if _, err := watch.Next(t.Context()); !errors.Is(err, cluster.ErrBehind) {
		t.Errorf("got %v, want ErrBehind", err)
	}
}
