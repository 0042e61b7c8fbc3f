// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/weirmesh/weir/test/e2e/httpload"
	"github.com/weirmesh/weir/test/e2e/names"
	"github.com/weirmesh/weir/test/e2e/ratio"
)

// meshPods: HTTP servers under an L4 rule and under an HTTP rule; a name server; clients under a DNS rule and without.
const meshPods = `
apiVersion: v1
kind: Pod
metadata: {name: plain, labels: {app: plain}, annotations: {weir.dev/ip-addresses: "10.244.2.101,fd00:10:244:2::101"}}
spec: {nodeName: node2, containers: [{name: main, image: none, command: [e2e-traffic, origin, ":8080"], readinessProbe: {tcpSocket: {port: 8080}}}]}
---
apiVersion: v1
kind: Pod
metadata: {name: ruled, labels: {app: ruled}, annotations: {weir.dev/ip-addresses: "10.244.2.102,fd00:10:244:2::102"}}
spec: {nodeName: node2, containers: [{name: main, image: none, command: [e2e-traffic, origin, ":8080"], readinessProbe: {tcpSocket: {port: 8080}}}]}
---
apiVersion: v1
kind: Pod
metadata: {name: dns, labels: {app: dns}, annotations: {weir.dev/ip-addresses: "10.244.1.103,fd00:10:244:1::103"}}
spec:
  nodeName: node1
  containers: [{name: main, image: none, command: [sh, -c, "printf '. {\n  file %s example.com\n}\n' \"$ZONE\" | exec coredns -conf stdin"], env: [{name: ZONE, value: ZONEFILE}], readinessProbe: {tcpSocket: {port: 53}}}]
---
apiVersion: v1
kind: Pod
metadata: {name: free, labels: {app: free}, annotations: {weir.dev/ip-addresses: "10.244.1.104,fd00:10:244:1::104"}}
spec: {nodeName: node1, containers: [{name: main, image: none, command: [sleep, infinity]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: bound, labels: {app: bound}, annotations: {weir.dev/ip-addresses: "10.244.1.105,fd00:10:244:1::105"}}
spec: {nodeName: node1, containers: [{name: main, image: none, command: [sleep, infinity]}]}
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: ruled}
spec:
  endpointSelector: {matchLabels: {app: ruled}}
  ingress: [{toPorts: [{ports: [{port: "8080", protocol: TCP}], rules: {http: [{method: "GET|HEAD", path: "/.*"}]}}]}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: plain}
spec:
  endpointSelector: {matchLabels: {app: plain}}
  ingress: [{toPorts: [{ports: [{port: "8080", protocol: TCP}]}]}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: bound}
spec:
  endpointSelector: {matchLabels: {app: bound}}
  egress: [{toPorts: [{ports: [{port: "53", protocol: ANY}], rules: {dns: [{matchPattern: "*.example.com"}]}}]}]
`

const meshZone = `$ORIGIN example.com.
@ 3600 IN SOA ns.example.com. admin.example.com. 1 7200 3600 1209600 3600
@ 3600 IN NS ns.example.com.
ns 3600 IN A 192.0.2.1
api 3600 IN A 192.0.2.2
`

// mesh measures requests and queries through the whole mesh against the same without rules.
func (b bench) mesh(ctx context.Context) error {
	zone := filepath.Join(b.manifests, "example.zone")
	if err := os.WriteFile(zone, []byte(meshZone), 0o644); err != nil {
		return err
	}
	folder, err := os.MkdirTemp("", "weir-bench-mesh")
	if err != nil {
		return err
	}
	defer os.RemoveAll(folder)
	if err := os.WriteFile(filepath.Join(folder, "pods.yaml"), []byte(strings.ReplaceAll(meshPods, "ZONEFILE", zone)), 0o600); err != nil {
		return err
	}
	own := b
	own.manifests = folder
	const observer = "127.0.0.1:14247"
	lab, down, err := own.lab(ctx, observer)
	if err != nil {
		return err
	}
	defer down()
	conn, err := grpc.NewClient(observer, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	for _, name := range []string{"ruled", "plain", "bound"} {
		wait := exec.CommandContext(ctx, filepath.Join(b.bin, "weir"), "policy", "wait", "default/"+name, "--lab", lab)
		if out, err := wait.CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
	}
	if err := b.meshRounds(ctx, lab); err != nil {
		return err
	}
	lost, received, err := account(ctx, conn)
	if err != nil {
		return err
	}
	fmt.Printf("\nflows of all rounds: %d came to the observer, %d were lost on the way\n", received, lost)
	return nil
}

// meshRounds takes the rounds; who goes first alternates. All rounds at a rate come before those as fast as may be: of these, agents, NATS and observer
// have flows left to carry for a while, which would be in the latencies.
func (b bench) meshRounds(ctx context.Context, lab string) error {
	addresses, pods := []string{"10.244.2.101:8080", "10.244.2.102:8080"}, []string{"default/free", "default/bound"}
	var rates, p50, p99, queries, queryP50 ratio.Pairs
	for round := range 2 * b.pairs {
		rate, queryRate := float64(l7Rate), 500.0
		if round >= b.pairs {
			rate, queryRate = 0, 0
		}
		var requests [2]httpload.Result
		var asked [2]names.Loaded
		for i := range 2 {
			i = (i + round) % 2
			if err := errors.Join(b.meshLoad(ctx, lab, addresses[i], rate, 3*b.duration, &requests[i]), b.meshAsk(ctx, lab, pods[i], queryRate, &asked[i])); err != nil {
				return err
			}
		}
		if rate == 0 {
			rates.Add(requests[1].Rate(), requests[0].Rate())
			queries.Add(float64(asked[1].Queries)/asked[1].Took.Seconds(), float64(asked[0].Queries)/asked[0].Took.Seconds())
			continue
		}
		p50.Add(micros(requests[1].Median), micros(requests[0].Median))
		p99.Add(micros(requests[1].P99), micros(requests[0].P99))
		queryP50.Add(micros(asked[1].Median), micros(asked[0].Median))
	}
	fmt.Printf("\n# Through the mesh: pod to pod across nodes, flows and access log on, everything on the same two CPUs; medians of %d rounds (middle 80 %%)\n", b.pairs)
	t := table()
	fmt.Fprintln(t, "what\twith\twithout\twith / without\twith - without\t")
	for _, row := range []struct {
		what  string
		pairs ratio.Pairs
	}{
		{"requests/s, an HTTP rule against an L4 rule", rates},
		{"latency of a request at 1,000/s on 50 connections, us: p50", p50}, {"the same: p99", p99},
		{"queries/s of CoreDNS, a DNS rule against none", queries}, {"median latency of a query at 500/s, us", queryP50},
	} {
		s := row.pairs.Summary()
		fmt.Fprintf(t, "%s\t%.0f\t%.0f\t%s\t%s\t\n", row.what, s.Subject, s.Baseline, s, difference(row.pairs.Subject, row.pairs.Baseline))
	}
	return t.Flush()
}

// meshLoad makes requests from a pod.
func (b bench) meshLoad(ctx context.Context, lab, address string, rate float64, over time.Duration, into *httpload.Result) error {
	out, err := b.exec(ctx, lab, "default/free", "e2e-traffic", "http-load", address, fmt.Sprint(l7Connections), fmt.Sprint(rate), over.String())
	if err == nil {
		err = json.Unmarshal(out, into)
	}
	if err == nil && into.Failed > 0 {
		err = fmt.Errorf("%d requests failed: %s", into.Failed, into.First)
	}
	if err != nil {
		return fmt.Errorf("load on %s: %w", address, err)
	}
	return nil
}

// meshAsk asks for a name from a pod.
func (b bench) meshAsk(ctx context.Context, lab, pod string, rate float64, into *names.Loaded) error {
	out, err := b.exec(ctx, lab, pod, "e2e-traffic", "names-load", "10.244.1.103:53", "api.example.com", "16", fmt.Sprint(rate), (2 * b.duration).String())
	if err == nil {
		err = json.Unmarshal(out, into)
	}
	if err != nil {
		return fmt.Errorf("queries of %s: %w", pod, err)
	}
	return nil
}
