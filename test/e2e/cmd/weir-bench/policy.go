// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/test/e2e/ratio"
)

// policyRules selects both ends and allows what the measurements do, beside much that they do not.
func policyRules() string {
	var s strings.Builder
	for _, side := range []struct{ name, pod, list, peers, cidr string }{
		{"client", "a", "egress", "toEndpoints", "toCIDR"}, {"server", "c", "ingress", "fromEndpoints", "fromCIDR"}, {"near", "b", "ingress", "fromEndpoints", "fromCIDR"},
	} {
		fmt.Fprintf(&s, "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: %s, namespace: default}\nspec:\n  endpointSelector: {matchLabels: {app: %s}}\n  %s:\n", side.name, side.pod, side.list)
		for i := range 20 {
			fmt.Fprintf(&s, "  - {%s: [{matchLabels: {app: other%d}}], toPorts: [{ports: [{port: \"%d\", protocol: TCP}]}]}\n", side.peers, i, 8000+i)
			fmt.Fprintf(&s, "  - {%s: [198.51.100.%d/32]}\n", side.cidr, i)
		}
		fmt.Fprintf(&s, "  - {%s: [{}], toPorts: [{ports: [{port: \"7000\", endPort: 7200, protocol: TCP}]}]}\n---\n", side.peers)
	}
	return s.String()
}

// policy is what enforcing policies costs a connection, and how long a change takes.
func (b bench) policy(ctx context.Context) error {
	lab, down, err := b.lab(ctx, "127.0.0.1:14245")
	if err != nil {
		return err
	}
	defer down()
	file := filepath.Join(b.manifests, "policy.txt") // not a manifest of the lab's own
	if err := os.WriteFile(file, []byte(policyRules()), 0o600); err != nil {
		return err
	}
	weirLab := filepath.Join(b.bin, "weir-lab")
	change := func(what string) error {
		cmd := exec.CommandContext(ctx, weirLab, what, "--name", lab, "-f", file)
		cmd.Stderr = os.Stderr
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("weir lab %s: %w", what, err)
		}
		return nil
	}
	fmt.Println("pod to pod with policies enforced at both ends, against the same pods without policies")
	fmt.Printf("%-14s %-12s %14s %14s   %s\n", "what", "path", "with", "without", "with / without: median (middle 80 %)")
	for _, path := range []struct{ name, to string }{{"same node", "10.244.1.102"}, {"across nodes", "10.244.2.103"}} {
		for _, what := range []string{"rtt", "connections"} {
			measure := func(verb string, force bool) (float64, error) {
				if err := change(verb); err != nil {
					return 0, err
				}
				if err := inForce(ctx, lab, force); err != nil {
					return 0, err
				}
				return number(b.exec(ctx, lab, "default/a", b.tool(), "measure", what, path.to, b.duration.String()))
			}
			s, err := b.interleaved(func() (float64, error) { return measure("apply", true) }, func() (float64, error) { return measure("delete", false) })
			if err != nil {
				return err
			}
			fmt.Printf("%-14s %-12s %14.1f %14.1f   %s\n", what, path.name, s.Subject, s.Baseline, s)
		}
	}
	return b.changes(ctx, lab, change)
}

// changes is how long it takes from the moment that an object is handed in until both nodes have acknowledged it.
func (b bench) changes(ctx context.Context, lab string, change func(string) error) error {
	var times ratio.Pairs
	_ = change("delete") // it may be there or not
	for range 10 * b.pairs {
		for _, verb := range []string{"apply", "delete"} {
			start := time.Now()
			if err := change(verb); err != nil {
				return err
			}
			handed := time.Since(start) // starting the command line is in both
			if err := inForce(ctx, lab, verb == "apply"); err != nil {
				return err
			}
			if verb == "apply" {
				times.Add(float64(time.Since(start).Microseconds())/1000, float64(handed.Microseconds())/1000)
			}
		}
	}
	s := times.Summary()
	fmt.Printf("3 policies applied until both nodes enforce them: median %.1f ms, of which the command line %.1f ms (n=%d)\n", s.Subject, s.Baseline, s.N)
	return nil
}

// inForce waits until the three policies are in force on all nodes, or gone.
func inForce(ctx context.Context, lab string, there bool) error {
	conn, err := grpc.NewClient("unix:///run/weir/"+lab+"/policy.sock", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	client := policyv1.NewPolicyQueryServiceClient(conn)
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		r, err := client.ListPolicies(ctx, &policyv1.ListPoliciesRequest{})
		if err != nil {
			return err
		}
		done := there == (len(r.Policies) == 3) && (there || len(r.Policies) == 0)
		for _, p := range r.Policies {
			done = done && p.Valid && p.EnforcedGeneration == p.Generation && p.EnforcingNodes == p.Nodes
		}
		if done {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("policies are not in force after 20 s: %v", r.Policies)
		}
	}
}
