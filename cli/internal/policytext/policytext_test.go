// SPDX-License-Identifier: Apache-2.0

package policytext

import (
	"strings"
	"testing"
	"time"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
)

func TestRule(t *testing.T) {
	for want, r := range map[string]*policyv1.PolicyRule{
		"CiliumNetworkPolicy default/api ingress[2]":           {Kind: "CiliumNetworkPolicy", Namespace: "default", Name: "api", List: "ingress", Index: 2},
		"ClusterNetworkPolicy all egress[0]":                   {Kind: "ClusterNetworkPolicy", Name: "all", List: "egress"},
		"CiliumNetworkPolicy default/api rule 3 egressDeny[0]": {Kind: "CiliumNetworkPolicy", Namespace: "default", Name: "api", Spec: 3, List: "egressDeny"},
		"allow-localhost": {Implicit: "allow-localhost"},
	} {
		if got := Rule(r); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

func TestPorts(t *testing.T) {
	for _, tt := range []struct {
		protocol, first, last uint32
		want                  string
	}{
		{6, 80, 80, "80"}, {6, 80, 90, "80-90"}, {17, 0, 65535, "all"}, {0, 0, 65535, "all"}, {1, 8, 8, "type 8"}, {1, 0, 255, "all"}, {58, 1, 4, "type 1-4"}, {6, 0, 0, "0"},
		{1, 0, 65535, "all"}, {6, 0, 255, "0-255"},
	} {
		if got := Ports(tt.protocol, tt.first, tt.last); got != tt.want {
			t.Errorf("%+v: %s", tt, got)
		}
	}
}

func TestAge(t *testing.T) {
	now := time.Date(2024, 5, 6, 7, 0, 0, 0, time.UTC)
	for ago, want := range map[time.Duration]string{
		-time.Hour: "0s", 0: "0s", 119 * time.Second: "119s", 2 * time.Minute: "2m", 119 * time.Minute: "119m", 2 * time.Hour: "2h", 47 * time.Hour: "47h", 48 * time.Hour: "2d", 240 * time.Hour: "10d",
	} {
		if got := Age(now, now.Add(-ago)); got != want {
			t.Errorf("%s: %s, want %s", ago, got, want)
		}
	}
	if got := Age(now, time.Time{}); got != "-" {
		t.Errorf("unknown: %s", got)
	}
}

// Only what is as everywhere is left out.
func TestLabels(t *testing.T) {
	in := []string{
		"k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name=shop", "k8s:io.cilium.k8s.namespace.labels.team=x", "k8s:io.cilium.k8s.policy.cluster=west",
		"k8s:io.cilium.k8s.policy.serviceaccount=leia", "k8s:io.kubernetes.pod.namespace=shop", "k8s:app=web", "reserved:host",
	}
	if got, want := strings.Join(Labels(in), " "), "k8s:app=web reserved:host (namespace shop) (namespace has team=x) (cluster west) (service account leia)"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	in = []string{"k8s:io.cilium.k8s.policy.cluster=default", "k8s:io.cilium.k8s.policy.serviceaccount=default", "k8s:app=web"}
	if got := strings.Join(Labels(in), " "); got != "k8s:app=web" {
		t.Errorf("got %s", got)
	}
}

func TestEverywhere(t *testing.T) {
	whole := func() *policyv1.PolicyObject {
		return &policyv1.PolicyObject{Valid: true, Generation: 3, EnforcedGeneration: 3, EnforcingNodes: 2, Nodes: 2}
	}
	if !Everywhere(whole(), 3) || Everywhere(whole(), 4) {
		t.Error("generation 3 is in force everywhere, 4 is not")
	}
	for name, change := range map[string]func(*policyv1.PolicyObject){
		"not valid":  func(p *policyv1.PolicyObject) { p.Valid = false },
		"older":      func(p *policyv1.PolicyObject) { p.EnforcedGeneration = 2 },
		"some nodes": func(p *policyv1.PolicyObject) { p.EnforcingNodes = 1 },
		"a laggard":  func(p *policyv1.PolicyObject) { p.Lagging = []*policyv1.NodeLag{{Node: "n1"}} },
	} {
		p := whole()
		change(p)
		if Everywhere(p, 0) {
			t.Errorf("%s: in force everywhere", name)
		}
	}
}

// Long label sets go on below, and nothing that came from outside moves the cursor.
func TestWriteWraps(t *testing.T) {
	var labels []string
	for range 8 {
		labels = append(labels, "k8s:a-rather-long-label=\x1b[31m")
	}
	e := &Explanation{Source: "a/b\x1b", Destination: "c/d", Port: 1, Protocol: "TCP", Kernels: make([]Kernel, 1), Answer: &policyv1.ExplainConnectionResponse{
		Verdict: policyv1.Verdict_VERDICT_ALLOW,
		Sides:   []*policyv1.Side{{Direction: policyv1.Direction_DIRECTION_EGRESS, Endpoint: "a/b\n", Node: "n\r", Labels: labels, Verdict: policyv1.Verdict_VERDICT_ALLOW, Protocol: 6, Port: 1}},
	}}
	var b strings.Builder
	e.Write(&b)
	if strings.ContainsAny(b.String(), "\x1b\r") || !strings.Contains(b.String(), "\n              k8s:a-rather-long-label=^[[31m ") {
		t.Errorf("%s", b.String())
	}
	for line := range strings.Lines(b.String()) {
		if len(line) > 130 {
			t.Errorf("%d characters: %s", len(line), line)
		}
	}
}

func TestEffectiveRequests(t *testing.T) {
	allow := policyv1.Verdict_VERDICT_ALLOW
	r := &policyv1.GetEffectivePolicyResponse{Directions: []*policyv1.EffectiveDirection{
		{Direction: policyv1.Direction_DIRECTION_INGRESS, Enforced: true, Rows: []*policyv1.EffectiveRow{
			{Peers: "app=web", Ports: "80/TCP", Verdict: allow, Requests: []string{"GET /public/.*", "POST"}},
			{Peers: "app=web", Ports: "81/TCP", Verdict: allow, Visibility: true},
			{Peers: "app=db", Ports: "all ports", Verdict: allow},
		}},
		{Direction: policyv1.Direction_DIRECTION_EGRESS, Enforced: true, Rows: []*policyv1.EffectiveRow{{Peers: "app=db", Ports: "all ports", Verdict: allow}}},
	}}
	var b strings.Builder
	if err := Effective(&b, "shop/api", r); err != nil {
		t.Fatal(err)
	}
	got := strings.Join(strings.Fields(b.String()), " ")
	for _, want := range []string{
		"VERDICT PEERS PORTS REQUESTS NOW BY", "allow app=web 80/TCP GET /public/.*, POST - -", "allow app=web 81/TCP all, seen by a proxy - -",
		"allow app=db all ports - - -", "VERDICT PEERS PORTS NOW BY allow app=db all ports - -",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, b.String())
		}
	}
}
