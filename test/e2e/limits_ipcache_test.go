// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/test/e2e/cluster"
	"github.com/weirmesh/weir/test/e2e/pulse"
)

// ipcacheMax of node2; what policies name may fill nine tenths of it.
const ipcacheMax = 100

// visitor has an address of the prefixes of the policy that does not fit.
const visitor = `
apiVersion: lab.weir.dev/v1
kind: Host
metadata: {name: visitor}
spec: {addresses: [198.51.110.4]}
`

// TestLimitOfPrefixes fills the table of addresses: it warns at 80 %, a policy that names a prefix without room is refused by name and comes into force when
// there is room, the one before it stays, and pods come and go all the while.
func TestLimitOfPrefixes(t *testing.T) {
	t.Parallel() // with others at the end: it waits more than it works
	lab := cluster.Up(t, strings.ReplaceAll(policyPods, "command: [sleep, infinity]", "command: [e2e-traffic, serve]")+"---\n"+cnp("main", limitsPolicy)+"---"+visitor,
		"--agent-arg=--metrics-listen=127.0.0.1:9962", fmt.Sprintf("--agent-arg=node2:--ipcache-max=%d", ipcacheMax))
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	f := &full{Lab: lab}
	lab.InForce(ctx, "default/main")
	server, err := pulse.Listen(lab.Netns(ctx, "default", "server"), pulsePort)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Close)
	atServer := netip.AddrPortFrom(addrServer, pulsePort)
	foe, err := pulse.Start(ctx, pulse.Load{From: lab.HostNetns(ctx, "visitor"), To: atServer, Every: 10 * time.Millisecond, Connect: 50 * time.Millisecond, Hopeless: true})
	if err != nil {
		t.Fatal(err)
	}

	m, err := lab.Metrics(ctx, "node2", 9962)
	if err != nil {
		t.Fatal(err)
	}
	have := int(m.Sum("weir_agent_map_entries", `map="ipcache"`))
	filler := cnp("filler", fmt.Sprintf("{endpointSelector: {matchLabels: {app: b}}, ingress: [{fromCIDR: %s}]}", prefixes(100, ipcacheMax*85/100-have)))
	lab.Apply(ctx, filler)
	lab.InForce(ctx, "default/main", "default/filler")
	f.warned(ctx, t, "ipcache")

	wide := cnp("wide", fmt.Sprintf("{endpointSelector: {matchLabels: {app: server}}, ingress: [{fromCIDR: %s}]}", prefixes(110, ipcacheMax/5)))
	lab.Apply(ctx, wide)
	f.refused(ctx, t, "wide", "no room for 198.51.110.")
	f.expect(ctx, t, "the policy before holds", "a", atServer, true)
	lab.Apply(ctx, `
apiVersion: v1
kind: Pod
metadata: {name: late, labels: {app: a}, annotations: {weir.dev/ip-addresses: "10.244.1.111,fd00:10:244:1::111"}}
spec: {nodeName: node1, terminationGracePeriodSeconds: 0, containers: [{name: main, image: none, command: [sleep, infinity]}]}
`)
	awaitPods(ctx, t, lab, "late", 1)
	f.expect(ctx, t, "a new pod, while policies find no room", "late", atServer, true)

	// Until now nothing allowed the visitor.
	tried := foe.Stop()
	if n := server.Datagrams(netip.MustParseAddr("198.51.110.4")) + tried.Connections; n != 0 || tried.Datagrams == 0 {
		t.Errorf("%d of the visitor's packets and connections came through, of %d datagrams and many SYNs", n, tried.Datagrams)
	}
	lab.Delete(ctx, filler)
	lab.InForce(ctx, "default/main", "default/wide")
	visitor := lab.HostNetns(ctx, "visitor")
	cluster.Eventually(t, func() error {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		c, err := lab.Dial(ctx, visitor, "tcp", atServer.String())
		if err != nil {
			return err
		}
		return c.Close()
	})
}
