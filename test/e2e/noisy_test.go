// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/test/e2e/cluster"
	"github.com/weirmesh/weir/test/e2e/web"
)

// tenantPods are a server under a rule on node2 and a client on node1, in a namespace.
func tenantPods(namespace string, n int) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Namespace
metadata: {name: %[1]s}
---
apiVersion: v1
kind: Pod
metadata: {name: server, namespace: %[1]s, labels: {app: server}, annotations: {weir.dev/ip-addresses: "10.244.2.%[2]d,fd00:10:244:2::%[2]d"}}
spec: {nodeName: node2, containers: [{name: main, image: none, command: [e2e-traffic, http, "8080"], readinessProbe: {tcpSocket: {port: 8080}}}]}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: %[1]s, labels: {app: client}, annotations: {weir.dev/ip-addresses: "10.244.1.%[2]d,fd00:10:244:1::%[2]d"}}
spec: {nodeName: node1, containers: [{name: main, image: none, command: [sleep, infinity]}]}
---
apiVersion: v1
kind: Service
metadata: {name: server, namespace: %[1]s}
spec: {selector: {app: server}, ports: [{port: 8080}]}
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: rules, namespace: %[1]s}
spec:
  endpointSelector: {matchLabels: {app: server}}
  ingress:
  - fromEndpoints: [{}]
    toPorts: [{ports: [{port: "8080", protocol: TCP}], rules: {http: [{method: GET, path: "/.*"}]}}]
`, namespace, n)
}

// hugeConfig is an Envoy configuration with that many routes, each with a regular expression of its own.
func hugeConfig(namespace string, routes int) string {
	var b strings.Builder
	fmt.Fprintf(&b, `apiVersion: cilium.io/v2
kind: CiliumEnvoyConfig
metadata: {name: huge, namespace: %s}
spec:
  services: [{name: server, namespace: %s}]
  resources:
  - "@type": type.googleapis.com/envoy.config.listener.v3.Listener
    name: huge
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: huge
          http_filters: [{name: envoy.filters.http.router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}]
          route_config:
            name: huge
            virtual_hosts:
            - name: huge
              domains: ["*"]
              routes:
`, namespace, namespace)
	for i := range routes {
		fmt.Fprintf(&b, "              - {match: {safe_regex: {regex: \"/(a|b|c)*x{1,100}[0-9]+/%d/.*\"}}, route: {cluster: %s/server}}\n", i, namespace)
	}
	return b.String()
}

// TestNoisyNeighbour: one tenant floods its part of the shared proxy and gives it configurations that are broken or huge; none of the other tenant's
// requests fails, its changes come through, and metrics name the culprit.
func TestNoisyNeighbour(t *testing.T) {
	lab := cluster.Up(t, tenantPods("noisy", 21)+"---"+tenantPods("quiet", 22), "--proxy-arg=--tenant-connections=64", "--proxy-arg=--tenant-accept-rate=200")
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	lab.InForce(ctx, "noisy/rules", "quiet/rules")
	quietAt, noisyAt := netip.MustParseAddrPort("10.244.2.22:8080"), netip.MustParseAddrPort("10.244.2.21:8080")
	client := func(fresh bool) *web.Client {
		return web.NewClient(lab.Netns(ctx, "quiet", "client"), netip.MustParseAddr("10.244.1.22"), quietAt, web.Options{Fresh: fresh})
	}
	request := []web.Request{{Method: "GET", URL: "http://server.quiet:8080/x", Status: 200}}
	kept, fresh := client(false), client(true)
	cluster.Eventually(t, func() error {
		_, err := kept.Do(ctx, "GET", "http://server.quiet:8080/x")
		return err
	})
	loads := map[string]*web.Running{
		"on a kept connection": web.Load{Client: kept, Every: 5 * time.Millisecond, Requests: request}.Start(ctx),
		"on new connections":   web.Load{Client: fresh, Every: 20 * time.Millisecond, Requests: request}.Start(ctx),
	}
	flooding, stopFlood := context.WithCancel(ctx)
	flooded := make(chan int)
	netns := lab.Netns(ctx, "noisy", "client")
	for range 8 {
		go func() { flooded <- floodProxy(flooding, lab, netns, noisyAt) }()
	}
	lab.Apply(ctx, hugeConfig("noisy", 12000))
	lab.Apply(ctx, strings.Replace(strings.Replace(hugeConfig("noisy", 1), "name: huge, namespace", "name: broken, namespace", 1), "noisy/server", "quiet/server", 1))
	for i, method := range []string{"GET|HEAD", "GET|POST", "GET"} {
		lab.Apply(ctx, strings.Replace(policyOf(tenantPods("quiet", 22)), "method: GET", `method: "`+method+`"`, 1))
		want := map[bool]int{true: 200, false: 403}[strings.Contains(method, "POST")]
		cluster.Eventually(t, func() error {
			a, err := kept.Do(ctx, "POST", "http://server.quiet:8080/x")
			if err == nil && a.Status != want {
				err = fmt.Errorf("change %d of the quiet tenant's rule: POST is answered with %d, want %d", i, a.Status, want)
			}
			return err
		})
	}
	awaitAnswers(t, 50, loads)
	stopFlood()
	made := 0
	for range 8 {
		made += <-flooded
	}
	for name, load := range loads {
		if r := load.Stop(); r.Failures() > 0 || len(r.Wrong) > 0 {
			t.Errorf("the quiet tenant, %s, beside %d connections of the other: %s", name, made, r)
		}
	}
	m, err := lab.Scrape(ctx, "node2", 9901, "/stats/prometheus")
	if err != nil {
		t.Fatal(err)
	}
	if m.Sum("weir_proxy_refused_total", `namespace="noisy"`) == 0 {
		t.Error("no metric names the noisy tenant")
	}
	if n := m.Sum("weir_proxy_refused_total", `namespace="quiet"`); n > 0 {
		t.Errorf("%.0f of the quiet tenant's were refused", n)
	}
	out, err := lab.Weir("policy", "get", "--kind", "CiliumEnvoyConfig", "noisy/broken")
	if err != nil || !strings.Contains(out, "cluster") {
		t.Errorf("the broken configuration says nothing of its cluster: %v\n%s", err, out)
	}
}

// policyOf is the policy among documents.
func policyOf(documents string) string {
	for doc := range strings.SplitSeq(documents, "---") {
		if strings.Contains(doc, "CiliumNetworkPolicy") {
			return doc
		}
	}
	return ""
}

// floodProxy opens connections as fast as it can, and sends on each the beginning of a request with much in it.
func floodProxy(ctx context.Context, lab *cluster.Lab, netns string, to netip.AddrPort) (made int) {
	var open []net.Conn
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	head := []byte("GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + strings.Repeat("a", 8000))
	for ctx.Err() == nil {
		dial, cancel := context.WithTimeout(ctx, time.Second)
		conn, err := lab.Dial(dial, netns, "tcp", to.String())
		cancel()
		if err != nil {
			continue
		}
		made++
		_ = conn.SetDeadline(time.Now().Add(time.Second))
		_, _ = conn.Write(head) // refused ones are what this is about
		if open = append(open, conn); len(open) > 200 {
			open[0].Close()
			open = open[1:]
		}
	}
	return made
}
