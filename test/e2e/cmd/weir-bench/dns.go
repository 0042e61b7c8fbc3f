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

	"github.com/weirmesh/weir/test/e2e/l7bench"
	"github.com/weirmesh/weir/test/e2e/names"
	"github.com/weirmesh/weir/test/e2e/ratio"
)

// dnsPods: the server that all proxies ask, on the CPU of the load; the same alone, and a forwarder to it, on the CPU of what is measured; clients that
// weir-dns does not see, sees, and judges.
const dnsPods = `
apiVersion: v1
kind: Pod
metadata: {name: upstream, labels: {app: upstream}, annotations: {weir.dev/ip-addresses: "10.244.1.103,fd00:10:244:1::103"}}
spec:
  nodeName: node1
  containers: [{name: main, image: none, command: [coredns, -conf, FOLDER/upstream.conf], readinessProbe: {tcpSocket: {port: 53}}}]
---
apiVersion: v1
kind: Pod
metadata: {name: alone, labels: {app: alone}, annotations: {weir.dev/ip-addresses: "10.244.1.104,fd00:10:244:1::104"}}
spec:
  nodeName: node1
  containers: [{name: main, image: none, command: [coredns, -conf, FOLDER/alone.conf], readinessProbe: {tcpSocket: {port: 53}}}]
---
apiVersion: v1
kind: Pod
metadata: {name: forward, labels: {app: forward}, annotations: {weir.dev/ip-addresses: "10.244.1.105,fd00:10:244:1::105"}}
spec:
  nodeName: node1
  containers: [{name: main, image: none, command: [coredns, -conf, FOLDER/forward.conf], readinessProbe: {tcpSocket: {port: 53}}}]
---
apiVersion: v1
kind: Pod
metadata: {name: free, labels: {app: free}, annotations: {weir.dev/ip-addresses: "10.244.1.106,fd00:10:244:1::106"}}
spec: {nodeName: node1, containers: [{name: main, image: none, command: [sleep, infinity]}]}
---
apiVersion: v1
kind: Pod
metadata:
  name: seen
  labels: {app: seen}
  annotations: {weir.dev/ip-addresses: "10.244.1.107,fd00:10:244:1::107", policy.cilium.io/proxy-visibility: "<Egress/53/UDP/DNS>"}
spec: {nodeName: node1, containers: [{name: main, image: none, command: [sleep, infinity]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: named, labels: {app: named}, annotations: {weir.dev/ip-addresses: "10.244.1.108,fd00:10:244:1::108"}}
spec: {nodeName: node1, containers: [{name: main, image: none, command: [sleep, infinity]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: opened, labels: {app: opened}, annotations: {weir.dev/ip-addresses: "10.244.1.109,fd00:10:244:1::109"}}
spec: {nodeName: node1, containers: [{name: main, image: none, command: [sleep, infinity]}]}
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: named}
spec:
  endpointSelector: {matchLabels: {app: named}}
  egress: [{toPorts: [{ports: [{port: "53", protocol: ANY}], rules: {dns: [{matchName: api.example.com}]}}]}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: opened}
spec:
  endpointSelector: {matchLabels: {app: opened}}
  egress:
  - toPorts: [{ports: [{port: "53", protocol: ANY}], rules: {dns: [{matchName: api.example.com}]}}]
  - toFQDNs: [{matchName: api.example.com}]
    toPorts: [{ports: [{port: "443", protocol: TCP}]}]
`

const dnsUpstream = "10.244.1.103:53"

// dnsSubject is a DNS server in one setting: who asks, whom, and the process that is measured.
type dnsSubject struct {
	name, pod, server string
	process           l7bench.Running
}

// dns compares weir-dns with CoreDNS: each alone on one CPU; load, upstream server and all else of the mesh on the other.
func (b bench) dns(ctx context.Context) (err error) {
	unpin, err := l7bench.Pin(loadCPU)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unpin()) }()
	folder, err := os.MkdirTemp("", "weir-bench-dns")
	if err != nil {
		return err
	}
	defer os.RemoveAll(folder)
	own := b
	own.manifests = folder
	if err := own.dnsFiles(); err != nil {
		return err
	}
	lab, down, err := own.lab(ctx, "127.0.0.1:14248")
	if err != nil {
		return err
	}
	defer down()
	for _, name := range []string{"named", "opened"} {
		wait := exec.CommandContext(ctx, filepath.Join(b.bin, "weir"), "policy", "wait", "default/"+name, "--lab", lab)
		if out, err := wait.CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
	}
	subjects, err := dnsSubjects(lab, folder)
	if err != nil {
		return err
	}
	return b.dnsCompare(ctx, lab, subjects)
}

func (b bench) dnsFiles() error {
	file := fmt.Sprintf(". {\n  file %s example.com\n}\n", filepath.Join(b.manifests, "example.zone"))
	for name, text := range map[string]string{
		"example.zone": meshZone, "upstream.conf": file, "alone.conf": file, "forward.conf": ". {\n  forward . " + dnsUpstream + "\n}\n",
		"pods.yaml": strings.ReplaceAll(dnsPods, "FOLDER", b.manifests),
	} {
		if err := os.WriteFile(filepath.Join(b.manifests, name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// dnsSubjects puts what is measured on its CPU; the first is what the others are compared with.
func dnsSubjects(lab, folder string) ([]dnsSubject, error) {
	alone, err := l7bench.Find("coredns", filepath.Join(folder, "alone.conf"))
	if err != nil {
		return nil, err
	}
	forward, err := l7bench.Find("coredns", filepath.Join(folder, "forward.conf"))
	if err != nil {
		return nil, err
	}
	weir, err := l7bench.Find("weir-dns", lab, "--node\x00node1\x00")
	if err != nil {
		return nil, err
	}
	for _, p := range []l7bench.Running{alone, forward, weir} {
		if err := p.Pin(proxyCPU); err != nil {
			return nil, err
		}
	}
	return []dnsSubject{
		{"CoreDNS alone", "default/free", "10.244.1.104:53", alone},
		{"CoreDNS, forward", "default/free", "10.244.1.105:53", forward},
		{"weir-dns, seen only", "default/seen", dnsUpstream, weir},
		{"weir-dns, matchName", "default/named", dnsUpstream, weir},
		{"weir-dns, and toFQDNs", "default/opened", dnsUpstream, weir},
	}, nil
}

// dnsShot is what one round measures of a subject.
type dnsShot struct {
	rate, perCore float64 // queries/s: of the clock, and of the CPU time of the server's process
	slow          names.Loaded
}

// dnsRow collects the rounds of a subject: against the first subject, the second one, and the upstream server asked directly.
type dnsRow struct {
	rate, ofAlone, ofForward, p50, p99 ratio.Pairs
}

func (b bench) dnsCompare(ctx context.Context, lab string, subjects []dnsSubject) error {
	fmt.Println("\n# DNS: each server alone on a CPU, 32 sockets; load, upstream CoreDNS and the rest of the mesh on the other; UDP")
	rows, shots := make([]dnsRow, len(subjects)), make([]dnsShot, len(subjects))
	for range b.pairs {
		direct, err := b.askNames(ctx, lab, dnsSubject{name: "upstream", pod: "default/free", server: dnsUpstream}, "1000")
		if err != nil {
			return err
		}
		for i, s := range subjects {
			if shots[i], err = b.dnsMeasure(ctx, lab, s); err != nil {
				return err
			}
		}
		for i, x := range shots {
			r := &rows[i]
			r.rate.Add(x.rate, shots[0].rate)
			r.ofAlone.Add(x.perCore, shots[0].perCore)
			r.ofForward.Add(x.perCore, shots[1].perCore)
			r.p50.Add(float64(x.slow.Median.Microseconds()), float64(direct.Median.Microseconds()))
			r.p99.Add(float64(x.slow.P99.Microseconds()), float64(direct.P99.Microseconds()))
		}
	}
	printNames(subjects, rows)
	return nil
}

func (b bench) dnsMeasure(ctx context.Context, lab string, s dnsSubject) (x dnsShot, err error) {
	before, err := s.process.CPU()
	if err != nil {
		return x, err
	}
	full, err := b.askNames(ctx, lab, s, "0")
	if err != nil {
		return x, err
	}
	after, err := s.process.CPU()
	if err != nil {
		return x, err
	}
	x.rate, x.perCore = float64(full.Queries)/full.Took.Seconds(), float64(full.Queries)/(after-before).Seconds()
	x.slow, err = b.askNames(ctx, lab, s, "1000")
	return x, err
}

func printNames(subjects []dnsSubject, rows []dnsRow) {
	fmt.Printf("%-24s %10s %12s %12s   %-28s %-28s %18s %18s\n", "server", "reached/s", "/s per core", "us CPU each", "of CoreDNS alone", "of the forwarder",
		"p50 at 1,000/s, us", "p99, us")
	for i, s := range subjects {
		r := &rows[i]
		perCore, forward, p50, p99 := r.ofAlone.Summary(), r.ofForward.Summary(), r.p50.Summary(), r.p99.Summary()
		cells := []string{perCore.String(), forward.String()}
		for k := i; k < len(cells); k++ {
			cells[k] = "-" // itself, or no proxy
		}
		fmt.Printf("%-24s %10.0f %12.0f %12.1f   %-28s %-28s %18s %18s\n", s.name, r.rate.Summary().Subject, perCore.Subject, 1e6/perCore.Subject,
			cells[0], cells[1], fmt.Sprintf("%.0f (%+.0f)", p50.Subject, p50.Subject-p50.Baseline), fmt.Sprintf("%.0f (%+.0f)", p99.Subject, p99.Subject-p99.Baseline))
	}
	fmt.Println("/s per core: queries by CPU time of the server's process; in brackets: above the upstream server asked directly")
}

// askNames asks for one name as fast as can be (rate 0), or at a rate.
func (b bench) askNames(ctx context.Context, lab string, s dnsSubject, rate string) (names.Loaded, error) {
	var l names.Loaded
	out, err := b.exec(ctx, lab, s.pod, "e2e-traffic", "names-load", s.server, "api.example.com", "32", rate, (2 * b.duration).String())
	if err == nil {
		err = json.Unmarshal(out, &l)
	}
	if err == nil && l.Failed > l.Queries/1000+1 {
		err = fmt.Errorf("%d of %d queries failed", l.Failed, l.Queries)
	}
	if err != nil {
		return l, fmt.Errorf("%s, asked by %s: %w", s.name, s.pod, err)
	}
	return l, nil
}
