// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"math"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/test/e2e/cluster"
	"github.com/weirmesh/weir/test/e2e/netns"
	"github.com/weirmesh/weir/test/e2e/traffic"
)

// webService is a service with every kind of front, and its backends, which serve for 2 s after they are told to end.
func webService(replicas int) string {
	return fmt.Sprintf(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: %d
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 6
      containers: [{name: main, image: none, command: [sh, -c, "e2e-traffic serve & p=$!; trap 'sleep 2; kill $p; exit 0' TERM; wait $p"], readinessProbe: {exec: {command: [e2e-traffic, ready, "7002"]}, periodSeconds: 1}}]
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: LoadBalancer
  selector: {app: web}
  clusterIPs: [10.96.5.5, "fd00:10:96::505"]
  ipFamilyPolicy: RequireDualStack
  loadBalancerIP: 198.18.0.50
  externalIPs: [203.0.113.200, "2001:db8::200"]
  ports: [{name: tcp, port: 80, targetPort: 7002, nodePort: 30080}, {name: udp, port: 80, targetPort: 7002, protocol: UDP, nodePort: 30081}]
`, replicas)
}

const serviceHost = `
apiVersion: lab.weir.dev/v1
kind: Host
metadata: {name: outside}
spec: {addresses: [203.0.113.10, "2001:db8::10"], containers: [` + serving + `]}
`

// fronts are the addresses of web, without those of the nodes.
var fronts = []string{"10.96.5.5:80", "[fd00:10:96::505]:80", "198.18.0.50:80", "203.0.113.200:80", "[2001:db8::200]:80"}

func nodePorts(network string) []string {
	port := "30080"
	if strings.HasPrefix(network, "udp") {
		port = "30081"
	}
	return []string{"172.30.0.11:" + port, "172.30.0.12:" + port, "[fd30::11]:" + port, "[fd30::12]:" + port}
}

// TestServices: every front of a service from everywhere; backends that come and go under load; how connections spread.
func TestServices(t *testing.T) {
	t.Parallel() // with others at the end: it waits more than it works
	lab := cluster.Up(t, truthPods+"---"+serviceHost+"---"+webService(4), "--separate")
	ctx, cancel := context.WithTimeout(context.Background(), 6*time.Minute)
	defer cancel()
	awaitPods(ctx, t, lab, "web", 4)
	t.Run("fronts", func(t *testing.T) { everyFront(ctx, t, lab.For(t)) })
	t.Run("spread", func(t *testing.T) { spread(ctx, t, lab.For(t)) })
	t.Run("hairpin", func(t *testing.T) { hairpin(ctx, t, lab.For(t)) })
	t.Run("backends-come-and-go", func(t *testing.T) { scale(ctx, t, lab.For(t)) })
}

func everyFront(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	for _, network := range []string{"tcp", "udp", "udp-unconnected"} {
		all := append(append([]string{}, fronts...), nodePorts(network)...)
		for _, front := range all {
			to := netip.MustParseAddrPort(front)
			check := func(from string, a traffic.Asked, err error) {
				if err != nil {
					t.Errorf("%s from %s to %s: %v", network, from, front, err)
					return
				}
				if !strings.HasPrefix(a.Server, "web-") {
					t.Errorf("%s from %s to %s: %q answers", network, from, front, a.Server)
				}
				if network == "udp-unconnected" && a.Source != to {
					t.Errorf("%s from %s to %s: the answer comes from %s", network, from, front, a.Source)
				}
			}
			// At the socket: programs of a pod. By packet: this process, which is in no cgroup of the mesh, inside the pod's namespace.
			for _, from := range []string{"default/a", "default/c", "host/outside"} {
				a, err := lab.Ask(ctx, from, network, to, 3*time.Second)
				check(from, a, err)
			}
			for _, pod := range []string{"a", "c"} {
				var a traffic.Asked
				err := netns.Do(lab.Netns(ctx, "default", pod), func() (err error) {
					a, err = traffic.Ask(network, to, 3*time.Second)
					return err
				})
				check("packets of "+pod, a, err)
			}
		}
	}
}

// spread: 4 backends get a quarter each, within 5 standard deviations.
func spread(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	const n = 600
	for from, front := range map[string]string{"default/a": fronts[0], "host/outside": nodePorts("tcp")[0]} {
		a, err := lab.AskMany(ctx, from, netip.MustParseAddrPort(front), "--count=600", "--over=60s", "--parallel=4")
		if err != nil {
			t.Fatal(err)
		}
		if a.Failed > 0 || len(a.Servers) != 4 {
			t.Fatalf("from %s to %s: %d failed, servers %v, errors %q", from, front, a.Failed, a.Servers, a.Errors)
		}
		const p = 0.25
		for server, got := range a.Servers {
			if d := math.Abs(float64(got) - n*p); d > 5*math.Sqrt(n*p*(1-p)) {
				t.Errorf("from %s to %s: %s got %d of %d connections", from, front, server, got, n)
			}
		}
	}
}

// hairpin: a backend that asks the service is answered, by itself too.
func hairpin(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	pod := awaitPods(ctx, t, lab, "web", 4)[0]
	for _, front := range []string{fronts[0], fronts[1]} {
		a, err := lab.AskMany(ctx, "default/"+pod.Name, netip.MustParseAddrPort(front), "--count=60", "--over=30s")
		if err != nil {
			t.Fatal(err)
		}
		if a.Failed > 0 || a.Servers[pod.Name] == 0 {
			t.Errorf("%s to %s: %d failed (%q), itself answered %d times of %v", pod.Name, front, a.Failed, a.Errors, a.Servers[pod.Name], a.Servers)
		}
	}
}

// scale changes the number of backends under load: no connection fails, and new backends get theirs.
func scale(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	type result struct {
		from string
		asks traffic.Asks
		err  error
	}
	results := make(chan result)
	clients := []struct{ from, network, front string }{
		{"default/a", "tcp", fronts[0]}, {"default/c", "udp", fronts[1]}, {"host/outside", "tcp", nodePorts("tcp")[1]}, {"host/outside", "tcp", fronts[4]},
	}
	for _, c := range clients {
		go func() {
			a, err := lab.AskMany(ctx, c.from, netip.MustParseAddrPort(c.front), "--network="+c.network, "--over=24s")
			results <- result{c.from + " " + c.network + " " + c.front, a, err}
		}()
	}
	for _, n := range []int{6, 2, 5, 1, 4} {
		lab.Apply(ctx, webService(n))
		time.Sleep(4 * time.Second) // load at this size
	}
	for range clients {
		r := <-results
		if r.err != nil {
			t.Errorf("%s: %v", r.from, r.err)
			continue
		}
		total := 0
		for _, n := range r.asks.Servers {
			total += n
		}
		t.Logf("%s: %d answers of %d backends, %d asked again", r.from, total, len(r.asks.Servers), r.asks.Resent)
		if r.asks.Resent > 8 {
			t.Errorf("%s: %d of %d questions had to be asked again: 8 backends ended, and at most one can wait in the queue of each", r.from, r.asks.Resent, total)
		}
		if r.asks.Failed > 0 {
			t.Errorf("%s: %d of %d connections failed: %q", r.from, r.asks.Failed, total+r.asks.Failed, r.asks.Errors)
		}
		if len(r.asks.Servers) < 6 {
			t.Errorf("%s: only %d backends answered, there were 6 at a time", r.from, len(r.asks.Servers))
		}
	}
}
