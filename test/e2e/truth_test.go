// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sort"
	"strings"
	"testing"
	"time"

	flowpb "github.com/weirmesh/weir/gen/flow"
	observerpb "github.com/weirmesh/weir/gen/observer"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
	"github.com/weirmesh/weir/test/e2e/capture"
	"github.com/weirmesh/weir/test/e2e/cluster"
)

const truthPods = `
apiVersion: v1
kind: Pod
metadata: {name: a, labels: {app: a}, annotations: {weir.dev/ip-addresses: "10.244.1.101,fd00:10:244:1::101"}}
spec:
  nodeName: node1
  containers: [{name: main, image: none, command: [e2e-traffic, serve], readinessProbe: {exec: {command: [e2e-traffic, ready, "7002"]}, periodSeconds: 1}}]
---
apiVersion: v1
kind: Pod
metadata: {name: b, labels: {app: b}, annotations: {weir.dev/ip-addresses: "10.244.1.102,fd00:10:244:1::102"}}
spec:
  nodeName: node1
  containers: [{name: main, image: none, command: [e2e-traffic, serve], readinessProbe: {exec: {command: [e2e-traffic, ready, "7002"]}, periodSeconds: 1}}]
---
apiVersion: v1
kind: Pod
metadata: {name: c, labels: {app: c}, annotations: {weir.dev/ip-addresses: "10.244.2.103,fd00:10:244:2::103"}}
spec:
  nodeName: node2
  containers: [{name: main, image: none, command: [e2e-traffic, serve], readinessProbe: {exec: {command: [e2e-traffic, ready, "7002"]}, periodSeconds: 1}}]
`

// pod of the truth test: its node and addresses.
type pod struct {
	name, node string
	addrs      []netip.Addr
}

var truthSet = []pod{
	{"a", "node1", []netip.Addr{netip.MustParseAddr("10.244.1.101"), netip.MustParseAddr("fd00:10:244:1::101")}},
	{"b", "node1", []netip.Addr{netip.MustParseAddr("10.244.1.102"), netip.MustParseAddr("fd00:10:244:1::102")}},
	{"c", "node2", []netip.Addr{netip.MustParseAddr("10.244.2.103"), netip.MustParseAddr("fd00:10:244:2::103")}},
}

// shortTimeouts let connections end, and their final flows come, within seconds.
const shortTimeouts = "--agent-arg=--ct-timeouts=tcp-closed=1s,tcp-handshake=3s,tcp-closing=3s,udp=3s,udp-answered=3s,icmp=10s"

// TestTruth compares every connection that packet sockets inside the pods saw with the flows.
func TestTruth(t *testing.T) {
	t.Parallel() // with others at the end: it waits more than it works
	t.Run("segments", func(t *testing.T) { truth(t, false) })
	t.Run("segmentation-offload", func(t *testing.T) { truth(t, true) })
	// What a kernel without tcx uses.
	t.Run("clsact", func(t *testing.T) {
		lab := truth(t, false, "--agent-arg=--force-clsact")
		out, err := lab.Weir("status")
		for _, agent := range []string{"agent/node1", "agent/node2"} {
			if line := statusLine(out, agent); !strings.Contains(line, "kernel path clsact,") {
				t.Errorf("weir status (%v) does not name the path in use: %q", err, line)
			}
		}
	})
}

func truth(t *testing.T, offload bool, flags ...string) *cluster.Lab {
	lab := cluster.Up(t, truthPods, append(flags, shortTimeouts)...)
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	want := observe(ctx, t, lab, offload, 120, 0, func() {})
	cluster.Eventually(t, func() error {
		a, err := lab.Flows(ctx, &observerpb.GetFlowsRequest{Number: 1 << 40})
		if err != nil {
			return err
		}
		if len(a.Gaps) > 0 {
			t.Fatalf("flows were lost: %v", a.Gaps)
		}
		return compare(want, a.Flows)
	})
	return lab
}

// observe makes random traffic between all pods, spread over a time, calls meanwhile while it runs, and returns what packet sockets in the pods saw.
func observe(ctx context.Context, t *testing.T, lab *cluster.Lab, offload bool, count int, over time.Duration, meanwhile func()) sums {
	t.Helper()
	captures := map[string]*capture.Capture{}
	for _, p := range truthSet {
		if !offload {
			if _, err := lab.Exec(ctx, "default/"+p.name, "e2e-traffic", "offload-off", "eth0"); err != nil {
				t.Fatal(err)
			}
		}
		c, err := capture.Start(lab.Netns(ctx, "default", p.name), "eth0")
		if err != nil {
			t.Fatal(err)
		}
		captures[p.name] = c
	}

	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	type result struct {
		from, out string
		err       error
	}
	results := make(chan result, len(truthSet))
	for i, p := range truthSet {
		var targets []string
		for _, q := range truthSet {
			if q.name != p.name {
				for _, a := range q.addrs {
					targets = append(targets, a.String())
				}
			}
		}
		args := []string{"e2e-traffic", "run", fmt.Sprintf("--seed=%d", seed+uint64(i)), fmt.Sprintf("--count=%d", count), "--over=" + over.String(), "--targets=" + strings.Join(targets, ","), "--unanswered=172.30.0.251"}
		go func() {
			out, err := lab.Exec(ctx, "default/"+p.name, args...)
			results <- result{p.name, out, err}
		}()
	}
	meanwhile()
	for range truthSet {
		r := <-results
		if r.err != nil {
			t.Fatalf("traffic from %s: %v", r.from, r.err)
		}
		t.Logf("%s made %s", r.from, strings.TrimSpace(r.out))
	}

	want := sums{}
	for name, c := range captures {
		// The last words about the address that nobody has come when the node gives up looking for it.
		c.Settle(4*time.Second, 20*time.Second)
		conns, other, err := c.Stop()
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %d connections captured, besides %v", name, len(conns), other)
		for _, w := range conns {
			want.add(connKey(name, w.Key.Proto, w.Source, w.Destination), sum{1, w.Packets, w.Bytes, w.Flags})
		}
	}
	return want
}

// sum is what the connections of one key did together: a flow of an echo does not tell its identifier.
type sum struct {
	connections    int
	packets, bytes [2]uint64
	flags          [2]uint8
}

type sums map[string]sum

func (s sums) add(key string, w sum) {
	have := s[key]
	have.connections += w.connections
	for i := range 2 {
		have.packets[i] += w.packets[i]
		have.bytes[i] += w.bytes[i]
		have.flags[i] |= w.flags[i]
	}
	s[key] = have
}

func connKey(pod string, proto uint8, src, dst netip.AddrPort) string {
	if proto == 1 || proto == 58 {
		return fmt.Sprintf("%s %d %s>%s", pod, proto, src.Addr(), dst.Addr())
	}
	return fmt.Sprintf("%s %d %s>%s", pod, proto, src, dst)
}

// finals sums the final flows of every connection of the test's pods, by observation point.
func finals(flows []*observerpb.GetFlowsResponse) (sums, error) {
	byAddr := map[netip.Addr]pod{}
	for _, p := range truthSet {
		for _, a := range p.addrs {
			byAddr[a] = p
		}
	}
	got := sums{}
	for _, r := range flows {
		f := r.GetFlow()
		if f.GetExtensions() == nil {
			continue
		}
		stats := new(observerv1.FlowStats)
		if err := f.GetExtensions().UnmarshalTo(stats); err != nil {
			return nil, fmt.Errorf("extension: %w", err)
		}
		if !stats.Final {
			continue
		}
		l4, src, dst, err := tuple(f)
		if err != nil {
			return nil, err
		}
		at := byAddr[src.Addr()]
		if f.TrafficDirection == flowpb.TrafficDirection_INGRESS {
			at = byAddr[dst.Addr()]
		}
		if at.name == "" {
			continue // not an observation point of this test
		}
		k := connKey(at.name, l4, src, dst)
		if f.NodeName != "default/"+at.node {
			return nil, fmt.Errorf("%s %s: seen on %s, the pod is on %s", k, f.TrafficDirection, f.NodeName, at.node)
		}
		if f.GetIsReply() == nil || f.GetIsReply().GetValue() {
			return nil, fmt.Errorf("%s: is_reply of the final flow is %v, want false", k, f.GetIsReply())
		}
		fw, rv := stats.GetForward(), stats.GetReverse()
		got.add(k, sum{1, [2]uint64{fw.GetPackets(), rv.GetPackets()}, [2]uint64{fw.GetBytes(), rv.GetBytes()}, [2]uint8{uint8(fw.GetTcpFlags()), uint8(rv.GetTcpFlags())}})
	}
	return got, nil
}

// compare checks the final flows of every connection, and that nothing else was reported.
func compare(want sums, flows []*observerpb.GetFlowsResponse) error {
	got, err := finals(flows)
	if err != nil {
		return err
	}
	var faults []string
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	for k, w := range want {
		if got[k] != w {
			fault("%s: flows say %+v, captured %+v", k, got[k], w)
		}
	}
	for k := range got {
		if _, ok := want[k]; !ok {
			fault("%s: a flow, but no packet was captured: %+v", k, got[k])
		}
	}
	if len(faults) == 0 {
		return nil
	}
	sort.Strings(faults)
	n := len(faults)
	if n > 15 {
		faults = append(faults[:15], fmt.Sprintf("... and %d more", n-15))
	}
	return fmt.Errorf("%d of %d keys differ:\n%s", n, len(want), strings.Join(faults, "\n"))
}

func tuple(f *flowpb.Flow) (uint8, netip.AddrPort, netip.AddrPort, error) {
	src, err := netip.ParseAddr(f.GetIP().GetSource())
	if err != nil {
		return 0, netip.AddrPort{}, netip.AddrPort{}, fmt.Errorf("flow %s: %w", f.GetUuid(), err)
	}
	dst, err := netip.ParseAddr(f.GetIP().GetDestination())
	if err != nil {
		return 0, netip.AddrPort{}, netip.AddrPort{}, fmt.Errorf("flow: %w", err)
	}
	var p uint8
	var sp, dp uint32
	switch l4 := f.GetL4().GetProtocol().(type) {
	case *flowpb.Layer4_TCP:
		p, sp, dp = 6, l4.TCP.SourcePort, l4.TCP.DestinationPort
	case *flowpb.Layer4_UDP:
		p, sp, dp = 17, l4.UDP.SourcePort, l4.UDP.DestinationPort
	case *flowpb.Layer4_ICMPv4:
		p = 1
	case *flowpb.Layer4_ICMPv6:
		p = 58
	}
	return p, netip.AddrPortFrom(src, uint16(sp)), netip.AddrPortFrom(dst, uint16(dp)), nil
}
