// SPDX-License-Identifier: Apache-2.0

package differential

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/weirmesh/weir/test/reference"
	"github.com/weirmesh/weir/test/reference/random"
)

// connectionsOfLab is how many connections each lab makes.
const connectionsOfLab = 14

// TestLab plays random worlds on live labs with real sockets, by the program that plays case files: from the manifest through the policy service and the
// agents to the kernel. Its budget is a minute for three worlds; -labs asks for more.
func TestLab(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root: it makes network namespaces and loads eBPF")
	}
	program := filepath.Join(*bin, "weir-cases")
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("%s is missing: run make build", program)
	}
	folder := t.TempDir()
	s, connections := *seed, 0
	for made := 0; made < *labs; s++ {
		c := caseOf(random.New(s, 4*connectionsOfLab))
		if len(c.Expect) < connectionsOfLab {
			continue
		}
		raw, err := yaml.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(folder, c.ID+".yaml"), raw, 0o600); err != nil {
			t.Fatal(err)
		}
		made++
		connections += len(c.Expect)
	}
	t.Logf("seeds %d to %d: %d connections", *seed, s-1, connections)
	out, err := exec.Command(program, folder).CombinedOutput()
	t.Logf("%s", out)
	if err == nil {
		return
	}
	t.Errorf("weir-cases: %v", err)
	for line := range strings.Lines(string(out)) {
		for made := *seed; made < s; made++ {
			id := caseID(made)
			if raw, err := os.ReadFile(filepath.Join(folder, id+".yaml")); err == nil && strings.HasPrefix(line, "FAIL") && strings.Contains(line, id) {
				t.Logf("%s", raw)
			}
		}
	}
}

func caseID(seed uint64) string { return fmt.Sprintf("random-%d", seed) }

// caseOf writes a world as a case file, with what the reference evaluator expects.
func caseOf(w *random.World) *reference.Case {
	c := &reference.Case{ID: caseID(w.Seed), Title: "a random world", Area: []string{"random"}, Cluster: *w.Cluster}
	seen := map[reference.Packet]bool{}
	for _, p := range w.Packets {
		outside := strings.HasPrefix(p.From, "ip:") || strings.HasPrefix(p.To, "ip:")
		icmp := p.Protocol == "ICMP" || p.Protocol == "ICMPv6"
		switch {
		case len(c.Expect) == connectionsOfLab || seen[p] || p.From == p.To:
			continue
		case p.V6 && !outside && p.Protocol != "ICMPv6": // names of ends do not say the family
			continue
		case strings.HasPrefix(p.From, "ip:") && strings.HasPrefix(p.To, "ip:"), !outside && onSameHost(w.Cluster, p):
			continue
		case icmp && p.Port != 8 && p.Port != 128: // a socket sends echo requests
			continue
		}
		egress, ingress := w.Cluster.Decide(p)
		seen[p] = true
		e := reference.Expect{From: p.From, To: p.To, Protocol: p.Protocol, Port: p.Port, Verdict: "allow", Reason: p.String()}
		if icmp {
			e.Port, e.ICMP = 0, &reference.ICMP{Type: p.Port}
		}
		switch {
		case w.Cluster.Config.PolicyAuditMode: // told, not dropped
		case egress != reference.Allow:
			e.Verdict, e.Direction = "deny", "egress"
		case ingress != reference.Allow:
			e.Verdict, e.Direction = "deny", "ingress"
		}
		c.Expect = append(c.Expect, e)
	}
	return c
}

// onSameHost: both ends are in one node's own network namespace; or one is, and the other is a pod that the mesh leaves alone, between which and its node no
// program stands.
func onSameHost(c *reference.Cluster, p reference.Packet) bool {
	host := func(end string) string {
		if name, ok := strings.CutPrefix(end, "node:"); ok {
			return name
		}
		for _, pod := range c.Pods {
			if pod.HostNetwork && pod.Namespace+"/"+pod.Name == end {
				return pod.Node
			}
		}
		return ""
	}
	const unmanaged = "entity:unmanaged"
	if p.From == unmanaged && host(p.To) != "" || p.To == unmanaged && host(p.From) != "" {
		return true
	}
	return host(p.From) != "" && host(p.From) == host(p.To)
}
