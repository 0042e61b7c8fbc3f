// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/weirmesh/weir/test/e2e/httpload"
	"github.com/weirmesh/weir/test/e2e/names"
	"github.com/weirmesh/weir/test/e2e/ratio"
)

// meshPods: an HTTP server under a rule, one that is only seen and one of which neither is; a name server; clients under a DNS rule and without.
const meshPods = `
apiVersion: v1
kind: Pod
metadata: {name: plain, labels: {app: plain}, annotations: {weir.dev/ip-addresses: "10.244.2.101,fd00:10:244:2::101"}}
spec: {nodeName: node2, containers: [{name: main, image: none, command: [e2e-traffic, origin, "8080"], readinessProbe: {tcpSocket: {port: 8080}}}]}
---
apiVersion: v1
kind: Pod
metadata: {name: ruled, labels: {app: ruled}, annotations: {weir.dev/ip-addresses: "10.244.2.102,fd00:10:244:2::102"}}
spec: {nodeName: node2, containers: [{name: main, image: none, command: [e2e-traffic, origin, "8080"], readinessProbe: {tcpSocket: {port: 8080}}}]}
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
	lab, down, err := own.lab(ctx, "127.0.0.1:14247")
	if err != nil {
		return err
	}
	defer down()
	for _, name := range []string{"ruled", "plain", "bound"} {
		wait := exec.CommandContext(ctx, filepath.Join(b.bin, "weir"), "policy", "wait", "default/"+name, "--lab", lab)
		if out, err := wait.CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
	}
	fmt.Println("\n# Through the mesh: pod to pod across nodes, flows and access log on; everything shares two CPUs")
	var rates, names0, p50 ratio.Pairs
	for range b.pairs {
		var r [2]httpload.Result
		for i, address := range []string{"10.244.2.101:8080", "10.244.2.102:8080"} {
			out, err := b.exec(ctx, lab, "default/free", "e2e-traffic", "http-load", address, "16", "0", (3 * b.duration).String())
			if err != nil {
				return fmt.Errorf("load on %s: %w", address, err)
			}
			if err := json.Unmarshal(out, &r[i]); err != nil {
				return fmt.Errorf("load on %s: %w", address, err)
			}
		}
		rates.Add(r[1].Rate(), r[0].Rate())
		var d [2]names.Loaded
		var slow [2]names.Loaded
		for i, pod := range []string{"default/free", "default/bound"} {
			for rate, into := range map[string]*names.Loaded{"0": &d[i], "500": &slow[i]} {
				out, err := b.exec(ctx, lab, pod, "e2e-traffic", "names-load", "10.244.1.103:53", "api.example.com", "16", rate, (2 * b.duration).String())
				if err != nil {
					return fmt.Errorf("queries of %s: %w", pod, err)
				}
				if err := json.Unmarshal(out, into); err != nil {
					return fmt.Errorf("queries of %s: %w", pod, err)
				}
			}
		}
		names0.Add(float64(d[1].Queries)/d[1].Took.Seconds(), float64(d[0].Queries)/d[0].Took.Seconds())
		p50.Add(float64(slow[1].Median)/float64(time.Microsecond), float64(slow[0].Median)/float64(time.Microsecond))
	}
	for _, row := range []struct {
		what  string
		pairs *ratio.Pairs
	}{
		{"requests/s, an HTTP rule against an L4 rule", &rates}, {"queries/s of CoreDNS, a DNS rule against none", &names0}, {"median latency of a query at 500/s, us", &p50},
	} {
		s := row.pairs.Summary()
		fmt.Printf("%-50s %10.0f %10.0f  %s\n", row.what, s.Subject, s.Baseline, s)
	}
	return nil
}
