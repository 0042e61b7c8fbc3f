// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	flowpb "github.com/weirmesh/weir/gen/flow"
	observerpb "github.com/weirmesh/weir/gen/observer"
	"github.com/weirmesh/weir/test/e2e/cluster"
	"github.com/weirmesh/weir/test/e2e/netns"
	"github.com/weirmesh/weir/test/e2e/pulse"
)

// Sizes of node2's maps, small enough to fill in a moment.
const (
	peersMax    = 200
	rangesMax   = 300
	servicesMax = 12
	backendsMax = 60
	ctMax       = 500
)

// server allows a and nobody else, whatever comes.
const limitsPolicy = `{endpointSelector: {matchLabels: {app: server}}, ingress: [{fromEndpoints: [{matchLabels: {app: a}}]}]}`

// full is a lab whose tables are small, with traffic that must pass and traffic that must not.
type full struct {
	*cluster.Lab
	server *pulse.Server
}

// TestLimits fills each table: it warns at 80 %, what does not fit is named and comes into force when there is room, what was in force stays, and
// nothing forbidden passes.
func TestLimits(t *testing.T) {
	t.Parallel() // with others at the end: it waits more than it works
	lab := cluster.Up(t, strings.ReplaceAll(policyPods, "command: [sleep, infinity]", "command: [e2e-traffic, serve]")+"---\n"+cnp("main", limitsPolicy),
		"--agent-arg=--metrics-listen=127.0.0.1:9962", "--agent-arg=--ct-timeouts=tcp-closed=1s,tcp-handshake=3s,tcp-closing=3s,udp=3s,udp-answered=3s,icmp=3s",
		fmt.Sprintf("--agent-arg=node2:--policy-peers-max=%d", peersMax), fmt.Sprintf("--agent-arg=node2:--policy-ranges-max=%d", rangesMax),
		fmt.Sprintf("--agent-arg=--services-max=%d", servicesMax), fmt.Sprintf("--agent-arg=--backends-max=%d", backendsMax), fmt.Sprintf("--agent-arg=node2:--ct-max=%d", ctMax))
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	f := &full{Lab: lab}
	lab.InForce(ctx, "default/main")
	var err error
	if f.server, err = pulse.Listen(lab.Netns(ctx, "default", "server"), pulsePort); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.server.Close)
	load := func(pod string, connect time.Duration) *pulse.Client {
		c, err := pulse.Start(ctx, pulse.Load{From: lab.Netns(ctx, "default", pod), To: netip.AddrPortFrom(addrServer, pulsePort), Every: 10 * time.Millisecond, Connect: connect, Hopeless: connect > 0})
		if err != nil {
			t.Fatalf("load of %s: %v", pod, err)
		}
		return c
	}
	friend, foe := load("a", 0), load("b", 50*time.Millisecond)

	t.Run("policy", func(t *testing.T) { (&full{lab.For(t), f.server}).policies(ctx, t) })
	t.Run("services", func(t *testing.T) { (&full{lab.For(t), f.server}).services(ctx, t) })
	t.Run("connections", func(t *testing.T) { (&full{lab.For(t), f.server}).connections(ctx, t) })

	tried, made := foe.Stop(), friend.Stop()
	for _, err := range made.Errors {
		t.Errorf("traffic of a, which is always allowed: %v", err)
	}
	if n := f.server.Connections(addrB) + f.server.Datagrams(addrB) + tried.Connections; n != 0 || tried.Datagrams == 0 {
		t.Errorf("%d of the forbidden client's packets and connections came through, of %d datagrams and many SYNs", n, tried.Datagrams)
	}
	t.Logf("allowed: %d datagrams beside the kept connection; forbidden: %d datagrams", made.Datagrams, tried.Datagrams)
}

// warned waits until a map's fill is told as event, metric and in `weir status`.
func (f *full) warned(ctx context.Context, t *testing.T, name string) {
	t.Helper()
	cluster.Eventually(t, func() error {
		m, err := f.Metrics(ctx, "node2", 9962)
		if err != nil {
			return err
		}
		label := fmt.Sprintf("map=%q", name)
		if have, most := m.Sum("weir_agent_map_entries", label), m.Sum("weir_agent_map_entries_max", label); most == 0 || have < 0.8*most {
			return fmt.Errorf("metric of map %s: %v of %v", name, have, most)
		}
		if _, err := f.notice(ctx, "map-pressure", fmt.Sprintf(`"map":%q`, name)); err != nil {
			return err
		}
		return f.status("map " + name)
	})
}

// notice finds an event of node2's agent by its kind and a part of its text.
func (f *full) notice(ctx context.Context, kind, text string) (string, error) {
	stream, err := observerpb.NewObserverClient(f.Conn()).GetAgentEvents(ctx, &observerpb.GetAgentEventsRequest{Number: 1 << 20})
	if err != nil {
		return "", err
	}
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return "", fmt.Errorf("no event %s with %s", kind, text)
		}
		if err != nil {
			return "", err
		}
		if e := m.GetAgentEvent().GetUnknown(); m.NodeName == "default/node2" && e.GetType() == kind && strings.Contains(e.GetNotification(), text) {
			return e.GetNotification(), nil
		}
	}
}

// status wants texts in node2's line of `weir status`.
func (f *full) status(texts ...string) error {
	out, err := f.Weir("status")
	if err != nil {
		return err
	}
	line := statusLine(out, "agent/node2")
	for _, text := range texts {
		if !strings.Contains(line, text) {
			return fmt.Errorf("weir status does not say %q: %s", text, line)
		}
	}
	return nil
}

// refused waits until the status of a policy names node2, and no other node, with a reason.
func (f *full) refused(ctx context.Context, t *testing.T, name, reason string) {
	t.Helper()
	cluster.Eventually(t, func() error {
		all, err := f.Policies(ctx)
		if err != nil {
			return err
		}
		for _, p := range all {
			if p.Name != name {
				continue
			}
			if len(p.Lagging) != 1 || p.Lagging[0].Node != "node2" || !strings.Contains(p.Lagging[0].Reason, reason) || p.EnforcingNodes != 1 {
				return fmt.Errorf("policy %s is in force on %d nodes, not on %v; want it refused by node2: %s", name, p.EnforcingNodes, p.Lagging, reason)
			}
			return nil
		}
		return fmt.Errorf("policy %s is not there", name)
	})
	cluster.Eventually(t, func() error {
		if _, err := f.notice(ctx, "policy-refused", "/"+name); err != nil {
			return err
		}
		return f.status("policy refused", name, reason)
	})
}

// expect says whether a pod reaches an address, once it does or does not for good.
func (f *full) expect(ctx context.Context, t *testing.T, what, pod string, to netip.AddrPort, want bool) {
	t.Helper()
	if !want {
		if connects(ctx, f.Lab, pod, to, 700*time.Millisecond) == nil {
			t.Errorf("%s: %s reaches %s", what, pod, to)
		}
		return
	}
	cluster.Eventually(t, func() error {
		if err := connects(ctx, f.Lab, pod, to, 700*time.Millisecond); err != nil {
			return fmt.Errorf("%s: %s does not reach %s: %w", what, pod, to, err)
		}
		return nil
	})
}

// prefixes is a CNP's list of n prefixes.
func prefixes(third, n int) string {
	var all []string
	for i := range n {
		all = append(all, fmt.Sprintf("198.51.%d.%d/32", third+i/100, 2*(i%100)))
	}
	return "[" + strings.Join(all, ", ") + "]"
}

// manyPorts is a CNP's list of rules with n ports that do not touch, from c.
func manyPorts(n int) string {
	var rules, ports []string
	for i := range n {
		ports = append(ports, fmt.Sprintf(`{port: "%d"}`, 8000+2*i))
		if len(ports) == 40 || i == n-1 {
			rules = append(rules, fmt.Sprintf(`{fromEndpoints: [{matchLabels: {app: c}}], toPorts: [{ports: [%s]}]}`, strings.Join(ports, ", ")))
			ports = nil
		}
	}
	return strings.Join(rules, ", ")
}

func (f *full) policies(ctx context.Context, t *testing.T) {
	atServer := netip.AddrPortFrom(addrServer, pulsePort)
	atLate := netip.MustParseAddrPort("10.244.2.111:7002")
	c := netip.MustParseAddr("10.244.1.103")

	// Four fifths of the rows, for a pod that has no part in what follows.
	filler := cnp("filler", fmt.Sprintf("{endpointSelector: {matchLabels: {app: b}}, ingress: [{fromCIDR: %s}]}", prefixes(100, peersMax*4/5)))
	f.Apply(ctx, filler)
	f.InForce(ctx, "default/main", "default/filler")
	f.warned(ctx, t, "policy_peers")

	// Nobody's old policy falls for one that does not fit, and nobody starts without one.
	const late = `
apiVersion: v1
kind: Pod
metadata: {name: late, labels: {app: late}, annotations: {weir.dev/ip-addresses: "10.244.2.111,fd00:10:244:2::111"}}
spec: {nodeName: node2, terminationGracePeriodSeconds: 0, containers: [{name: main, image: none, command: [e2e-traffic, serve]}]}
`
	rows := cnp("rows", fmt.Sprintf("{endpointSelector: {matchExpressions: [{key: app, operator: In, values: [server, late]}]}, ingress: [{fromEndpoints: [{matchLabels: {app: c}}]}, {fromCIDR: %s}]}", prefixes(110, peersMax/4)))
	f.Apply(ctx, rows)
	f.refused(ctx, t, "rows", "policy_peers is full")
	f.Apply(ctx, late)
	awaitPods(ctx, t, f.Lab, "late", 1)
	f.expect(ctx, t, "the policy before holds", "a", atServer, true)
	f.expect(ctx, t, "the policy that does not fit", "c", atServer, false)
	f.expect(ctx, t, "the policy that does not fit", "c", atLate, false)
	f.expect(ctx, t, "a pod without a policy in force", "a", atLate, false)
	if n := f.server.Connections(c); n != 0 {
		t.Errorf("%d connections of c, which no policy in force allows", n)
	}

	// Room comes, and with it the policy.
	f.Delete(ctx, filler)
	f.InForce(ctx, "default/main", "default/rows")
	f.expect(ctx, t, "in force now", "c", atServer, true)
	f.expect(ctx, t, "in force now", "c", atLate, true)
	f.expect(ctx, t, "not selected", "a", atLate, false)
	f.Delete(ctx, rows)
	f.Delete(ctx, late)
	f.InForce(ctx, "default/main")
	f.expect(ctx, t, "forbidden again", "c", atServer, false)

	// Ports fill another map.
	ports := cnp("ports", "{endpointSelector: {matchLabels: {app: server}}, ingress: ["+manyPorts(rangesMax)+"]}")
	few := cnp("ports", "{endpointSelector: {matchLabels: {app: server}}, ingress: ["+manyPorts(rangesMax/10)+"]}")
	f.Apply(ctx, ports)
	f.refused(ctx, t, "ports", "policy_ranges is full")
	f.expect(ctx, t, "the policy before holds", "a", atServer, true)
	f.Apply(ctx, few)
	f.InForce(ctx, "default/main", "default/ports")
	f.Delete(ctx, few)
	f.InForce(ctx, "default/main")
}

func limitService(i int) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Service\nmetadata: {name: limit%d}\nspec: {clusterIP: 10.96.77.%d, ipFamilies: [IPv4], selector: {app: server}, ports: [{port: 80, targetPort: 7002}]}\n", i, 10+i)
}

func limitAddress(i int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96, 77, byte(10 + i)}), 80)
}

// crowdedService has n backends, which nobody is.
func crowdedService(n int) string {
	var s strings.Builder
	s.WriteString("apiVersion: v1\nkind: Service\nmetadata: {name: crowded}\nspec: {clusterIP: 10.96.77.9, ipFamilies: [IPv4], ports: [{name: p, port: 80, targetPort: 7002}]}\n---\n")
	s.WriteString("apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: crowded, labels: {kubernetes.io/service-name: crowded}}\naddressType: IPv4\nports: [{name: p, port: 7002, protocol: TCP}]\nendpoints:\n")
	for i := range n {
		fmt.Fprintf(&s, "- {addresses: [198.51.100.%d], conditions: {ready: true}}\n", 1+i)
	}
	return s.String()
}

func (f *full) services(ctx context.Context, t *testing.T) {
	m, err := f.Metrics(ctx, "node2", 9962)
	if err != nil {
		t.Fatal(err)
	}
	fits := servicesMax - int(m.Sum("weir_agent_map_entries", `map="services"`))
	if fits < 3 {
		t.Fatalf("room for %d services before the test", fits)
	}
	for i := range fits {
		f.Apply(ctx, limitService(i))
	}
	f.expect(ctx, t, "the last that fits", "a", limitAddress(fits-1), true)

	f.Apply(ctx, limitService(fits))
	f.serviceRefused(ctx, t, fmt.Sprintf("default/limit%d", fits), "map is full")
	f.warned(ctx, t, "services")
	f.expect(ctx, t, "the service that does not fit", "a", limitAddress(fits), false)
	f.expect(ctx, t, "another service", "a", limitAddress(0), true)
	var wg sync.WaitGroup
	for i := range fits + 1 {
		wg.Go(func() { f.expect(ctx, t, "a forbidden client", "b", limitAddress(i), false) })
	}
	wg.Wait()
	f.Delete(ctx, limitService(0))
	f.expect(ctx, t, "room for the service", "a", limitAddress(fits), true)
	f.expect(ctx, t, "the service that is gone", "a", limitAddress(0), false)

	// A service with too many backends, when there is room for it.
	f.Delete(ctx, limitService(1))
	f.Apply(ctx, crowdedService(backendsMax+1))
	f.serviceRefused(ctx, t, "default/crowded", "map is full")
	f.expect(ctx, t, "another service", "a", limitAddress(2), true)
	f.Delete(ctx, crowdedService(backendsMax+1))
	f.unrefused(ctx, t)
}

// serviceRefused waits until node2 says of a service that it does not fit.
func (f *full) serviceRefused(ctx context.Context, t *testing.T, name, reason string) {
	t.Helper()
	cluster.Eventually(t, func() error {
		m, err := f.Metrics(ctx, "node2", 9962)
		if err != nil {
			return err
		}
		if n := m.Sum("weir_agent_services_refused", ""); n != 1 {
			return fmt.Errorf("%v services are refused, want %s", n, name)
		}
		if _, err := f.notice(ctx, "service-refused", fmt.Sprintf(`"service":%q`, name)); err != nil {
			return err
		}
		return f.status("service refused "+name, reason)
	})
}

// unrefused waits until nothing is refused.
func (f *full) unrefused(ctx context.Context, t *testing.T) {
	t.Helper()
	cluster.Eventually(t, func() error {
		m, err := f.Metrics(ctx, "node2", 9962)
		if err == nil && m.Sum("weir_agent_services_refused", "")+m.Sum("weir_agent_policies_refused", "") != 0 {
			err = errors.New("something is refused")
		}
		return err
	})
}

// connections fills node2's table of connections from a, and holds it full.
func (f *full) connections(ctx context.Context, t *testing.T) {
	atServer := netip.AddrPortFrom(addrServer, pulsePort)
	flood, err := startFlood(f.Netns(ctx, "default", "a"), atServer, ctMax+100)
	if err != nil {
		t.Fatal(err)
	}
	defer flood.stop()
	f.warned(ctx, t, "ct")
	cluster.Eventually(t, func() error {
		m, err := f.Metrics(ctx, "node2", 9962)
		if err != nil {
			return err
		}
		if m["weir_agent_connections_refused_total"] == 0 || m.Sum("weir_agent_drops_total", `reason="CT_MAP_INSERTION_FAILED"`) == 0 {
			return errors.New("metrics tell of no refused connection")
		}
		return f.status("connections refused")
	})
	// What was told refused was: of so many clients at a time, the server saw no more than the table holds.
	if n := flood.answered(); n == 0 || n >= ctMax {
		t.Errorf("%d clients were answered, the table holds %d", n, ctMax)
	}
	const reason = flowpb.DropReason_CT_MAP_INSERTION_FAILED
	f.Expect(ctx, cluster.Wanted{What: "a drop flow of a refused connection", Match: func(x *flowpb.Flow) bool {
		return x.NodeName == "default/node2" && x.Verdict == flowpb.Verdict_DROPPED && x.DropReasonDesc == reason && x.GetIP().GetSource() == addrA.String()
	}})
	flood.stop()
	f.expect(ctx, t, "room in the table", "a", atServer, true)
}

// flood holds many UDP connections at a time.
type flood struct {
	conns   []net.Conn
	got     []atomic.Uint64 // answers, by connection
	done    chan struct{}
	wg      sync.WaitGroup
	stopped sync.Once
}

func startFlood(path string, to netip.AddrPort, n int) (*flood, error) {
	f := &flood{got: make([]atomic.Uint64, n), done: make(chan struct{})}
	err := netns.Do(path, func() error {
		for range n {
			c, err := net.Dial("udp", to.String())
			if err != nil {
				return err
			}
			f.conns = append(f.conns, c)
		}
		return nil
	})
	if err != nil {
		f.stop()
		return nil, err
	}
	for i, c := range f.conns {
		f.wg.Go(func() {
			b := make([]byte, 100)
			for {
				_, err := c.Read(b)
				if errors.Is(err, net.ErrClosed) {
					return
				}
				if err == nil {
					f.got[i].Add(1)
				}
			}
		})
	}
	f.wg.Go(func() {
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			for _, c := range f.conns {
				_, _ = c.Write([]byte("flood")) // an error for an earlier one
			}
			select {
			case <-f.done:
				return
			case <-tick.C:
			}
		}
	})
	return f, nil
}

// answered counts the connections that ever got an answer.
func (f *flood) answered() (n int) {
	for i := range f.got {
		if f.got[i].Load() > 0 {
			n++
		}
	}
	return n
}

func (f *flood) stop() {
	f.stopped.Do(func() {
		close(f.done)
		for _, c := range f.conns {
			c.Close()
		}
		f.wg.Wait()
	})
}
