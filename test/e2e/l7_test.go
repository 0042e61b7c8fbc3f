// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"math"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	flowpb "github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/test/e2e/cluster"
	"github.com/weirmesh/weir/test/e2e/web"
)

// l7Clients are somebody on each node and outside, who make requests with the test's own sockets.
const l7Clients = `
apiVersion: v1
kind: Pod
metadata: {name: near, labels: {app: near}, annotations: {weir.dev/ip-addresses: "10.244.1.51,fd00:10:244:1::51"}}
spec: {nodeName: node1, containers: [{name: main, image: none, command: [sleep, infinity]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: far, labels: {app: far}, annotations: {weir.dev/ip-addresses: "10.244.2.52,fd00:10:244:2::52"}}
spec: {nodeName: node2, containers: [{name: main, image: none, command: [sleep, infinity]}]}
---
apiVersion: lab.weir.dev/v1
kind: Host
metadata: {name: visitor}
spec: {addresses: [203.0.113.77, "2001:db8::77"], containers: [{name: main, command: [sleep, infinity]}]}
`

// l7Client names a client of l7Clients.
type l7Client struct {
	name   string
	v4, v6 netip.Addr
}

var l7Everywhere = []l7Client{
	{"near", netip.MustParseAddr("10.244.1.51"), netip.MustParseAddr("fd00:10:244:1::51")},
	{"far", netip.MustParseAddr("10.244.2.52"), netip.MustParseAddr("fd00:10:244:2::52")},
	{"host/visitor", netip.MustParseAddr("203.0.113.77"), netip.MustParseAddr("2001:db8::77")},
}

func (c l7Client) netns(ctx context.Context, lab *cluster.Lab) string {
	if host, ok := strings.CutPrefix(c.name, "host/"); ok {
		return lab.HostNetns(ctx, host)
	}
	return lab.Netns(ctx, "default", c.name)
}

// address is the client's of the same family as to.
func (c l7Client) address(to netip.Addr) netip.Addr {
	if to.Is4() {
		return c.v4
	}
	return c.v6
}

func (c l7Client) web(ctx context.Context, lab *cluster.Lab, to netip.AddrPort, o web.Options) *web.Client {
	return web.NewClient(c.netns(ctx, lab), c.address(to.Addr()), to, o)
}

func article(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", "articles", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func coredns(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(cluster.Root(t), "examples", "todo", "manifests", "coredns.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// podAddresses are those of the first pod with a prefix.
func podAddresses(ctx context.Context, t *testing.T, lab *cluster.Lab, namespace, prefix string) (name string, addresses []netip.Addr) {
	t.Helper()
	cluster.Eventually(t, func() error {
		for _, p := range lab.State(ctx).Pods {
			if p.Namespace == namespace && strings.HasPrefix(p.Name, prefix) && p.Status == "Running" && len(p.Addresses) > 0 {
				name, addresses = p.Name, nil
				for _, a := range p.Addresses {
					addresses = append(addresses, netip.MustParseAddr(a))
				}
				return nil
			}
		}
		return fmt.Errorf("no pod %s/%s... runs", namespace, prefix)
	})
	return name, addresses
}

// expectLines waits until `weir observe` with the flags shows a line for each pattern.
func expectLines(t *testing.T, lab *cluster.Lab, patterns map[string]string, flags ...string) {
	t.Helper()
	cluster.Eventually(t, func() error {
		out, err := lab.Weir(append([]string{"observe", "--last", "100000"}, flags...)...)
		if err != nil {
			return err
		}
		var missing []string
		for what, pattern := range patterns {
			if !regexp.MustCompile("(?m)" + pattern).MatchString(out) {
				missing = append(missing, what+": "+pattern)
			}
		}
		if len(missing) > 0 {
			return fmt.Errorf("no line shows\n%s\namong\n%s", strings.Join(missing, "\n"), out)
		}
		return nil
	})
}

// TestTodoArticle plays the first article: its application, what it shows of requests and names, and the policy that locks the page down.
func TestTodoArticle(t *testing.T) {
	t.Parallel() // with others at the end: it waits more than it works
	lab := cluster.Up(t, article(t, "todo.yaml")+"---\n"+l7Clients+"---\n"+coredns(t))
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	_, addresses := podAddresses(ctx, t, lab, "default", "todoui-")
	balancer := serviceAddress(ctx, t, lab, "todoui")

	// The published pods have no readiness probe.
	cluster.Eventually(t, func() error {
		client := l7Everywhere[0].web(ctx, lab, netip.AddrPortFrom(addresses[0], 8090), web.Options{Fresh: true})
		a, err := client.Do(ctx, http.MethodGet, "http://todoui:8090/")
		if err == nil && a.Status != http.StatusOK {
			err = fmt.Errorf("status %d", a.Status)
		}
		return err
	})
	t.Run("visible", func(t *testing.T) {
		lab := lab.For(t)
		for _, c := range l7Everywhere {
			for _, to := range append(addresses, balancer) {
				client := c.web(ctx, lab, netip.AddrPortFrom(to, 8090), web.Options{})
				a, err := client.Do(ctx, http.MethodGet, "http://"+netip.AddrPortFrom(to, 8090).String()+"/")
				if err != nil || a.Status != http.StatusOK || !strings.Contains(a.Body, "Todos") {
					t.Errorf("GET / of %s from %s: %d %.80q, %v", to, c.name, a.Status, a.Body, err)
				}
				client.Close()
			}
		}
		const ui, backend = `default/todoui-\S*`, `default/todobackend-\S*`
		expectLines(t, lab, map[string]string{
			"a request from outside":   `\(world\S*\) -> ` + ui + `:8090 \(ID:\d+\) http-request FORWARDED \(HTTP/1.1 GET http://\S+:8090/\)$`,
			"its response":             `\(world\S*\) <- ` + ui + `:8090 \(ID:\d+\) http-response FORWARDED \(HTTP/1.1 200 \d+ms \(GET http://\S+:8090/\)\)$`,
			"a DNS query":              ui + `:\d+ \(ID:\d+\) -> kube-system/coredns-\S*:53 \(ID:\d+\) dns-request proxy FORWARDED \(DNS Query todobackend.default.svc.cluster.local. A\)$`,
			"its answer":               ui + `:\d+ \(ID:\d+\) <- kube-system/coredns-\S*:53 \(ID:\d+\) dns-response proxy FORWARDED \(DNS Answer "10\.96\.\S+" TTL: \d+ \(Proxy todobackend.default.svc.cluster.local. A\)\)$`,
			"the request to backend":   ui + `:\d+ \(ID:\d+\) -> ` + backend + `:8080 \(ID:\d+\) http-request FORWARDED \(HTTP/1.1 GET http://todobackend:8080/todos/\)$`,
			"the response of backend":  ui + `:\d+ \(ID:\d+\) <- ` + backend + `:8080 \(ID:\d+\) http-response FORWARDED \(HTTP/1.1 200 \d+ms \(GET http://todobackend:8080/todos/\)\)$`,
			"a request of a pod":       `default/near:\d+ \(ID:\d+\) -> ` + ui + `:8090 \(ID:\d+\) http-request FORWARDED`,
			"a request of another pod": `default/far:\d+ \(ID:\d+\) -> ` + ui + `:8090 \(ID:\d+\) http-request FORWARDED`,
		}, "--type", "l7")
	})

	t.Run("locked-down", func(t *testing.T) {
		lab := lab.For(t)
		lab.Apply(ctx, article(t, "lock-down-todoui.yaml"))
		lab.InForce(ctx, "default/lock-down-todoui")
		for _, c := range l7Everywhere {
			for _, to := range append(addresses, balancer) {
				lockedDown(ctx, t, lab, c, to)
			}
		}
		expectLines(t, lab, map[string]string{
			"the refusal": `\(world\S*\) -> default/todoui-\S*:8090 \(ID:\d+\) http-request DROPPED \(HTTP/1.1 GET http://\S+:8090/stress/\)$`,
		}, "--type", "l7", "--verdict", "DROPPED")
	})
}

// lockedDown: GET / and nothing else, on one connection.
func lockedDown(ctx context.Context, t *testing.T, lab *cluster.Lab, c l7Client, to netip.Addr) {
	t.Helper()
	at := netip.AddrPortFrom(to, 8090)
	client := c.web(ctx, lab, at, web.Options{})
	defer client.Close()
	for _, q := range []struct {
		method, path string
		status       int
		body         string
	}{
		{"GET", "/stress/", 403, "Access denied\r\n"}, {"GET", "/", 200, ""}, {"POST", "/", 403, "Access denied\r\n"},
		{"GET", "/?x=1", 403, "Access denied\r\n"}, {"GET", "//", 200, ""}, {"GET", "/stress/..", 200, ""}, {"GET", "/%2e%2e/", 200, ""},
	} {
		a, err := client.Do(ctx, q.method, "http://"+at.String()+q.path)
		if err != nil || a.Status != q.status || q.body != "" && a.Body != q.body {
			t.Errorf("%s %s of %s from %s: %d %.80q, %v; want %d %q", q.method, q.path, to, c.name, a.Status, a.Body, err, q.status, q.body)
		}
	}
}

// serviceAddress is the balancer's address of a service, or its cluster IP.
func serviceAddress(ctx context.Context, t *testing.T, lab *cluster.Lab, name string) (address netip.Addr) {
	t.Helper()
	cluster.Eventually(t, func() error {
		for _, s := range lab.State(ctx).Services {
			if s.Name == name && s.Namespace == "default" && len(s.ExternalIps) > 0 {
				address = netip.MustParseAddr(s.ExternalIps[0])
				return nil
			}
		}
		return fmt.Errorf("service %s has no address of a load balancer", name)
	})
	return address
}

// apiPods are two versions of a service on two nodes, and who uses it.
const apiPods = `
apiVersion: v1
kind: Namespace
metadata: {name: production}
---
apiVersion: v1
kind: Pod
metadata: {name: v1, namespace: production, labels: {app: api, version: v1}, annotations: {weir.dev/ip-addresses: "10.244.1.61,fd00:10:244:1::61"}}
spec: {nodeName: node1, containers: [{name: main, image: none, command: [e2e-traffic, http, "8080"], readinessProbe: {tcpSocket: {port: 8080}}}]}
---
apiVersion: v1
kind: Pod
metadata: {name: v2, namespace: production, labels: {app: api, version: v2}, annotations: {weir.dev/ip-addresses: "10.244.2.62,fd00:10:244:2::62"}}
spec: {nodeName: node2, containers: [{name: main, image: none, command: [e2e-traffic, http, "8080"], readinessProbe: {tcpSocket: {port: 8080}}}]}
---
apiVersion: v1
kind: Pod
metadata: {name: frontend, namespace: production, labels: {app: frontend}, annotations: {weir.dev/ip-addresses: "10.244.1.63,fd00:10:244:1::63"}}
spec: {nodeName: node1, containers: [{name: main, image: none, command: [sleep, infinity]}]}
---
apiVersion: v1
kind: Service
metadata: {name: api-service, namespace: production}
spec: {selector: {app: api}, clusterIPs: [10.96.7.7, "fd00:10:96::707"], ipFamilyPolicy: RequireDualStack, ports: [{port: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: api-service-v1, namespace: production}
spec: {selector: {app: api, version: v1}, ipFamilyPolicy: RequireDualStack, ports: [{port: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: api-service-v2, namespace: production}
spec: {selector: {app: api, version: v2}, ipFamilyPolicy: RequireDualStack, ports: [{port: 8080}]}
`

var (
	apiService  = netip.MustParseAddrPort("10.96.7.7:8080")
	apiService6 = netip.MustParseAddrPort("[fd00:10:96::707]:8080")
	apiFrontend = l7Client{"frontend", netip.MustParseAddr("10.244.1.63"), netip.MustParseAddr("fd00:10:244:1::63")}
	apiV1       = netip.MustParseAddrPort("10.244.1.61:8080")
	apiV2       = netip.MustParseAddrPort("10.244.2.62:8080")
	apiV1v6     = netip.MustParseAddrPort("[fd00:10:244:1::61]:8080")
	apiV2v6     = netip.MustParseAddrPort("[fd00:10:244:2::62]:8080")
)

func frontend(ctx context.Context, lab *cluster.Lab, to netip.AddrPort, o web.Options) *web.Client {
	return web.NewClient(lab.Netns(ctx, "production", "frontend"), apiFrontend.address(to.Addr()), to, o)
}

// TestRouteArticle plays the second article's traffic split, and what policy does to a routed service.
func TestRouteArticle(t *testing.T) {
	t.Parallel() // with others at the end: it waits more than it works
	lab := cluster.Up(t, apiPods)
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	lab.Apply(ctx, article(t, "l7-traffic-split.yaml"))
	awaitRoute(ctx, t, lab)
	t.Run("split", func(t *testing.T) { split(ctx, t, lab.For(t)) })
	t.Run("client-rules", func(t *testing.T) { routedUnderRules(ctx, t, lab.For(t)) })
	t.Run("route-change", func(t *testing.T) { routeChange(ctx, t, lab.For(t)) })
}

// awaitRoute waits until a canary request goes where only the route sends it, ten times in a row.
func awaitRoute(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	t.Helper()
	cluster.Eventually(t, func() error {
		client := frontend(ctx, lab, apiService, web.Options{Fresh: true, Timeout: 2 * time.Second})
		defer client.Close()
		for range 10 {
			a, err := client.Do(ctx, "GET", "http://api-service.production:8080/", "x-canary: true")
			if err != nil {
				return err
			}
			if a.Echo == nil || a.Echo.Server != "v2" {
				return fmt.Errorf("answer %d of %+v, want v2", a.Status, a.Echo)
			}
		}
		return nil
	})
}

// split: canaries go to v2, of the rest nine in ten to v1.
func split(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	for _, to := range []netip.AddrPort{apiService, apiService6} {
		for _, o := range []web.Options{{}, {HTTP2: true}, {Fresh: true}} {
			client := frontend(ctx, lab, to, o)
			servers := map[string]int{}
			const n = 400
			for i := range n {
				a, err := client.Do(ctx, "GET", fmt.Sprintf("http://api-service.production:8080/item/%d?q=%d", i, i))
				if err != nil || a.Echo == nil {
					t.Fatalf("to %s, %+v: %d %q %v", to, o, a.Status, a.Body, err)
				}
				if a.Echo.Target != fmt.Sprintf("/item/%d?q=%d", i, i) || a.Echo.Host != "api-service.production:8080" {
					t.Fatalf("the server saw %s of %s", a.Echo.Target, a.Echo.Host)
				}
				servers[a.Echo.Server]++
			}
			if d := math.Abs(float64(servers["v2"]) - n*0.1); d > 5*math.Sqrt(n*0.1*0.9) || servers["v1"]+servers["v2"] != n {
				t.Errorf("to %s, %+v: %v, want 9 to 1", to, o, servers)
			}
			for range 20 {
				a, err := client.Do(ctx, "GET", "http://api-service.production:8080/", "X-Canary: true")
				if err != nil || a.Echo == nil || a.Echo.Server != "v2" {
					t.Errorf("canary to %s, %+v: %d %q %v", to, o, a.Status, a.Body, err)
				}
			}
			client.Close()
		}
	}
	expectLines(t, lab, map[string]string{
		"a routed request": `production/frontend:\d+ \(ID:\d+\) -> production/\S+:8080 \(\S+\) http-request FORWARDED \(HTTP/1.1 GET http://api-service.production:8080/item/\d+\)`,
	}, "--type", "l7")
}

// routedUnderRules: the client's egress rules hold for what the route chose, and v2's ingress rules too.
func routedUnderRules(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	lab.Apply(ctx, `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: frontend-egress, namespace: production}
spec:
  endpointSelector: {matchLabels: {app: frontend}}
  egress:
  - toEndpoints: [{matchLabels: {app: api}}]
    toPorts: [{ports: [{port: "8080", protocol: TCP}], rules: {http: [{method: GET, path: "/open/.*"}, {method: GET, path: "/client/.*"}]}}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: api-ingress, namespace: production}
spec:
  endpointSelector: {matchLabels: {app: api}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: frontend}}]
    toPorts: [{ports: [{port: "8080", protocol: TCP}], rules: {http: [{method: GET, path: "/open/.*"}, {method: GET, path: "/server/.*"}]}}]
`)
	lab.InForce(ctx, "production/frontend-egress", "production/api-ingress")
	for _, to := range []netip.AddrPort{apiService, apiService6, apiV1, apiV2, apiV1v6, apiV2v6} {
		for _, o := range []web.Options{{}, {HTTP2: true}, {Fresh: true}} {
			client := frontend(ctx, lab, to, o)
			for path, status := range map[string]int{"/open/x": 200, "/client/x": 403, "/server/x": 403, "/": 403} {
				for _, canary := range []string{"true", "false"} {
					a, err := client.Do(ctx, "GET", "http://api-service.production:8080"+path, "x-canary: "+canary)
					if err != nil || a.Status != status {
						t.Errorf("%s to %s, canary %s, %+v: %d %q %v, want %d", path, to, canary, o, a.Status, a.Body, err, status)
					}
				}
			}
			client.Close()
		}
	}
	lab.Expect(ctx,
		cluster.Wanted{What: "denied by the client's rules", Match: func(f *flowpb.Flow) bool {
			return f.GetVerdict() == flowpb.Verdict_DROPPED && f.GetL7().GetHttp() != nil && f.GetTrafficDirection() == flowpb.TrafficDirection_EGRESS && strings.HasSuffix(f.GetL7().GetHttp().GetUrl(), "/server/x")
		}},
		cluster.Wanted{What: "denied by the server's rules", Match: func(f *flowpb.Flow) bool {
			return f.GetVerdict() == flowpb.Verdict_DROPPED && f.GetL7().GetHttp() != nil && f.GetTrafficDirection() == flowpb.TrafficDirection_INGRESS && strings.HasSuffix(f.GetL7().GetHttp().GetUrl(), "/client/x")
		}})
	lab.Delete(ctx, "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: frontend-egress, namespace: production}\n---\napiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: api-ingress, namespace: production}\n")
}

// routeChange changes the split to and fro under load: no request fails.
func routeChange(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	client := frontend(ctx, lab, apiService, web.Options{})
	lab.InForce(ctx) // the rules of before are gone
	cluster.Eventually(t, func() error {
		a, err := client.Do(ctx, "GET", "http://api-service.production:8080/")
		if err == nil && a.Status != 200 {
			err = fmt.Errorf("status %d", a.Status)
		}
		return err
	})
	load := web.Load{Client: client, Every: 3 * time.Millisecond, Workers: 2, Requests: []web.Request{{Method: "GET", URL: "http://api-service.production:8080/", Status: 200}}}.Start(ctx)
	base := article(t, "l7-traffic-split.yaml")
	var took []time.Duration
	for i := range 6 {
		v1, v2, want := "weight: 100", "weight: 0", "v1"
		if i%2 == 0 {
			v1, v2, want = v2, v1, "v2"
		}
		begun := time.Now()
		lab.Apply(ctx, strings.Replace(strings.Replace(base, "weight: 90", v1, 1), "weight: 10\n", v2+"\n", 1))
		took = append(took, follows(ctx, t, client, want, begun))
	}
	t.Logf("all requests follow a change of the route, from the call that applies it, after %v", took)
	awaitAnswers(t, 30, map[string]*web.Running{"routed": load})
	if r := load.Stop(); r.Failures() > 0 || len(r.Wrong) > 0 {
		t.Errorf("under changes of the route: %s", r)
	}
}

// follows makes requests until 30 in a row are answered by a server, and returns how long after begun the last one was that another answered.
func follows(ctx context.Context, t *testing.T, client *web.Client, want string, begun time.Time) (last time.Duration) {
	t.Helper()
	for inRow := 0; inRow < 30; {
		a, err := client.Do(ctx, "GET", "http://api-service.production:8080/")
		if err != nil || a.Echo == nil {
			t.Fatalf("while the route changes: %d %v", a.Status, err)
		}
		if inRow++; a.Echo.Server != want {
			inRow, last = 0, time.Since(begun)
		}
		if time.Since(begun) > 20*time.Second {
			t.Fatalf("requests do not go to %s", want)
		}
	}
	return last.Round(time.Millisecond)
}
