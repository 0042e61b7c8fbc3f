// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	flowpb "github.com/weirmesh/weir/gen/flow"
	labv1 "github.com/weirmesh/weir/gen/weir/lab/v1"
	"github.com/weirmesh/weir/test/e2e/cluster"
	"github.com/weirmesh/weir/test/e2e/names"
	"github.com/weirmesh/weir/test/e2e/pulse"
	"github.com/weirmesh/weir/test/e2e/web"
)

// namesWorld: who asks, a name server on each node, and what is outside.
const namesWorld = `
apiVersion: v1
kind: Namespace
metadata: {name: kube-system}
---
apiVersion: v1
kind: Pod
metadata: {name: dns-near, namespace: kube-system, labels: {k8s-app: kube-dns}, annotations: {weir.dev/ip-addresses: "10.244.1.53,fd00:10:244:1::53"}}
spec: {nodeName: node1, containers: [{name: main, image: none, command: [e2e-traffic, names, ` + namesRecords + `], readinessProbe: {tcpSocket: {port: 53}}}]}
---
apiVersion: v1
kind: Pod
metadata: {name: dns-far, namespace: kube-system, labels: {k8s-app: kube-dns}, annotations: {weir.dev/ip-addresses: "10.244.2.53,fd00:10:244:2::53"}}
spec: {nodeName: node2, containers: [{name: main, image: none, command: [e2e-traffic, names, ` + namesRecords + `], readinessProbe: {tcpSocket: {port: 53}}}]}
---
apiVersion: v1
kind: Service
metadata: {name: kube-dns, namespace: kube-system}
spec:
  selector: {k8s-app: kube-dns}
  clusterIPs: [10.96.0.10, "fd00:10:96::a"]
  ipFamilyPolicy: RequireDualStack
  ports: [{name: dns, port: 53, protocol: UDP}, {name: dns-tcp, port: 53, protocol: TCP}]
---
apiVersion: v1
kind: Pod
metadata: {name: app, labels: {app: app}, annotations: {weir.dev/ip-addresses: "10.244.1.71,fd00:10:244:1::71"}}
spec: {nodeName: node1, containers: [{name: main, image: none, command: [sleep, infinity]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: free, labels: {app: free}, annotations: {weir.dev/ip-addresses: "10.244.1.72,fd00:10:244:1::72"}}
spec: {nodeName: node1, containers: [{name: main, image: none, command: [sleep, infinity]}]}
---
apiVersion: lab.weir.dev/v1
kind: Host
metadata: {name: api}
spec: {addresses: [203.0.113.80, "2001:db8::80"], containers: [{name: main, command: [e2e-traffic, http, "80", "81"]}]}
---
apiVersion: lab.weir.dev/v1
kind: Host
metadata: {name: other}
spec: {addresses: [203.0.113.81, "2001:db8::81"], containers: [{name: main, command: [e2e-traffic, http, "80"]}]}
`

const namesRecords = `"api.example.com=203.0.113.80,2001:db8::80/600", "www.example.com=api.example.com./600", "other.example.com=203.0.113.81,2001:db8::81/600", "brief.example.com=203.0.113.81/2", "new.example.com=203.0.113.81/600", "evil.test=203.0.113.81/600"`

const namesPolicy = `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: app-egress}
spec:
  endpointSelector: {matchLabels: {app: app}}
  egress:
  - toEndpoints: [{matchLabels: {"k8s:io.kubernetes.pod.namespace": kube-system, k8s-app: kube-dns}}]
    toPorts: [{ports: [{port: "53", protocol: ANY}], rules: {dns: [{matchPattern: "*.example.com"}]}}]
  - toFQDNs: [{matchName: api.example.com}, {matchPattern: "brie*.example.com"}, {matchName: www.example.com}, {matchName: new.example.com}]
    toPorts: [{ports: [{port: "80", protocol: TCP}]}]
`

var (
	nameServers = []netip.AddrPort{
		netip.MustParseAddrPort("10.96.0.10:53"), netip.MustParseAddrPort("[fd00:10:96::a]:53"),
		netip.MustParseAddrPort("10.244.1.53:53"), netip.MustParseAddrPort("[fd00:10:244:1::53]:53"),
		netip.MustParseAddrPort("10.244.2.53:53"), netip.MustParseAddrPort("[fd00:10:244:2::53]:53"),
	}
	apiHost    = netip.MustParseAddrPort("203.0.113.80:80")
	apiHost6   = netip.MustParseAddrPort("[2001:db8::80]:80")
	otherHost  = netip.MustParseAddrPort("203.0.113.81:80")
	otherHost6 = netip.MustParseAddrPort("[2001:db8::81]:80")
)

// TestNames: DNS rules, and what may be reached by name.
func TestNames(t *testing.T) {
	t.Parallel() // with others at the end: it waits more than it works
	lab := cluster.Up(t, namesWorld, "--agent-arg=--masquerade")
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	lab.Apply(ctx, namesPolicy)
	lab.InForce(ctx, "default/app-egress")
	t.Run("rules", func(t *testing.T) { dnsRules(ctx, t, lab.For(t)) })
	t.Run("by-name", func(t *testing.T) { byName(ctx, t, lab.For(t)) })
	t.Run("expiry", func(t *testing.T) { expiry(ctx, t, lab.For(t)) })
	t.Run("agent-away", func(t *testing.T) { namesWithoutAgent(ctx, t, lab.For(t)) })
	t.Run("dns-away", func(t *testing.T) { namesWithoutDNS(ctx, t, lab.For(t)) })
}

// connects says whether a pod reaches an address within a limit.
func connects(ctx context.Context, lab *cluster.Lab, pod string, to netip.AddrPort, limit time.Duration) error {
	from := lab.Netns(ctx, "default", pod)
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	conn, err := lab.Dial(ctx, from, "tcp", to.String())
	if err != nil {
		return err
	}
	return conn.Close()
}

// connectsAtOnce wants a pod to reach an address with its first packet.
func connectsAtOnce(ctx context.Context, lab *cluster.Lab, pod string, to netip.AddrPort) error {
	conn, err := lab.Dial(ctx, lab.Netns(ctx, "default", pod), "tcp", to.String())
	if err != nil {
		return err
	}
	defer conn.Close()
	if n := pulse.Retransmitted(conn); n > 0 {
		return fmt.Errorf("connected, but %d segments were sent again", n)
	}
	return nil
}

func dnsRules(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	app, free := lab.Netns(ctx, "default", "app"), lab.Netns(ctx, "default", "free")
	for _, server := range nameServers {
		for _, network := range []string{"udp", "tcp"} {
			f, err := names.Ask(app, network, server, "other.example.com", dnsmessage.TypeA, 5*time.Second)
			if err != nil || f.RCode != 0 || len(f.Addresses) != 1 || f.Addresses[0] != otherHost.Addr() {
				t.Errorf("%s %s: other.example.com: %+v, %v", network, server, f, err)
			}
			f, err = names.Ask(app, network, server, "evil.test", dnsmessage.TypeA, 5*time.Second)
			if err != nil || f.RCode != dnsmessage.RCodeRefused || len(f.Addresses) != 0 {
				t.Errorf("%s %s: evil.test: %+v, %v; want REFUSED", network, server, f, err)
			}
			f, err = names.Ask(free, network, server, "evil.test", dnsmessage.TypeA, 5*time.Second)
			if err != nil || f.RCode != 0 || len(f.Addresses) != 1 {
				t.Errorf("%s %s: evil.test, of a pod without rules: %+v, %v", network, server, f, err)
			}
		}
	}
	lab.Expect(ctx,
		cluster.Wanted{What: "a refused query", Match: func(f *flowpb.Flow) bool {
			return f.GetVerdict() == flowpb.Verdict_DROPPED && f.GetL7().GetDns().GetQuery() == "evil.test." && f.GetSource().GetPodName() == "app"
		}},
		cluster.Wanted{What: "an answer", Match: func(f *flowpb.Flow) bool {
			d := f.GetL7().GetDns()
			return f.GetL7().GetType() == flowpb.L7FlowType_RESPONSE && d.GetQuery() == "other.example.com." && len(d.GetIps()) == 1 && d.GetTtl() > 0 && d.GetRcode() == 0
		}})
}

func byName(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	app := lab.Netns(ctx, "default", "app")
	for _, to := range []netip.AddrPort{apiHost, apiHost6, otherHost, otherHost6} {
		if err := connects(ctx, lab, "app", to, 1500*time.Millisecond); err == nil {
			t.Errorf("%s is reached before it has a name that may be", to)
		}
	}
	// The first connection after the answer gets through, each time: the maps hold the address before the client has it.
	for _, q := range []struct {
		name string
		kind dnsmessage.Type
		to   netip.AddrPort
	}{{"www.example.com", dnsmessage.TypeA, apiHost}, {"api.example.com", dnsmessage.TypeAAAA, apiHost6}} {
		if _, err := names.Ask(app, "udp", nameServers[0], q.name, q.kind, 5*time.Second); err != nil {
			t.Fatal(err)
		}
		if err := connectsAtOnce(ctx, lab, "app", q.to); err != nil {
			t.Errorf("%s after the answer for %s: %v", q.to, q.name, err)
		}
		if err := connects(ctx, lab, "app", netip.AddrPortFrom(q.to.Addr(), 81), 900*time.Millisecond); err == nil {
			t.Errorf("%s: port 81 is reached, only 80 is allowed", q.to)
		}
	}
	for _, to := range []netip.AddrPort{otherHost, otherHost6} {
		if err := connects(ctx, lab, "app", to, 900*time.Millisecond); err == nil {
			t.Errorf("%s is reached, its name other.example.com may only be asked for", to)
		}
	}
	lab.Expect(ctx, cluster.Wanted{What: "the name of an address in a flow", Match: func(f *flowpb.Flow) bool {
		return f.GetSource().GetPodName() == "app" && f.GetIP().GetDestination() == apiHost6.Addr().String() && len(f.GetDestinationNames()) > 0
	}})
}

// expiry: an address leaves after its TTL, unless a live connection uses it.
func expiry(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	app := lab.Netns(ctx, "default", "app")
	ask := func() {
		t.Helper()
		f, err := names.Ask(app, "udp", nameServers[0], "brief.example.com", dnsmessage.TypeA, 5*time.Second)
		if err != nil || len(f.Addresses) != 1 {
			t.Fatalf("brief.example.com: %+v, %v", f, err)
		}
	}
	gone := func() error {
		if err := connects(ctx, lab, "app", otherHost, 300*time.Millisecond); err == nil {
			return errors.New("the address is still reached")
		}
		return nil
	}
	ask()
	if err := connectsAtOnce(ctx, lab, "app", otherHost); err != nil {
		t.Fatalf("brief.example.com is not reached: %v", err)
	}
	cluster.Eventually(t, gone)
	ask()
	conn, err := lab.Dial(ctx, app, "tcp", otherHost.String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	r := bufio.NewReader(conn)
	for range 8 { // for longer than the TTL and the collector's rounds
		if err := exchangeHTTP(conn, r); err != nil {
			t.Fatalf("the live connection: %v", err)
		}
		time.Sleep(time.Second)
	}
	if err := connectsAtOnce(ctx, lab, "app", otherHost); err != nil {
		t.Errorf("an address that a live connection uses is gone: %v", err)
	}
}

// exchangeHTTP makes one request on a connection.
func exchangeHTTP(conn net.Conn, r *bufio.Reader) error {
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	if _, err := fmt.Fprint(conn, "HEAD / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		return err
	}
	for {
		line, err := r.ReadString('\n')
		if err != nil || line == "\r\n" {
			return err
		}
	}
}

// namesWithoutAgent: new names work while the agent is away.
func namesWithoutAgent(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	app := lab.Netns(ctx, "default", "app")
	lab.Control(ctx, "agent/node1", labv1.ControlPartRequest_ACTION_KILL)
	f, err := names.Ask(app, "udp", nameServers[2], "new.example.com", dnsmessage.TypeA, 5*time.Second)
	if err != nil || len(f.Addresses) != 1 {
		t.Errorf("new.example.com without an agent: %+v, %v", f, err)
	}
	if err := connectsAtOnce(ctx, lab, "app", otherHost); err != nil {
		t.Errorf("new.example.com is not reached: %v", err)
	}
	if f, err := names.Ask(app, "udp", nameServers[2], "evil.test", dnsmessage.TypeA, 5*time.Second); err != nil || f.RCode != dnsmessage.RCodeRefused {
		t.Errorf("evil.test without an agent: %+v, %v", f, err)
	}
	lab.Control(ctx, "agent/node1", labv1.ControlPartRequest_ACTION_START)
	cluster.Eventually(t, func() error {
		_, err := lab.Details(ctx, "nodes/node1/agent.sock")
		return err
	})
}

// namesWithoutDNS: cached names and live connections go on while weir-dns is away, new names wait, and what it knew it knows again.
func namesWithoutDNS(ctx context.Context, t *testing.T, lab *cluster.Lab) {
	app := lab.Netns(ctx, "default", "app")
	if _, err := names.Ask(app, "udp", nameServers[0], "api.example.com", dnsmessage.TypeA, 5*time.Second); err != nil {
		t.Fatal(err)
	}
	client := web.NewClient(app, netip.Addr{}, apiHost, web.Options{})
	fresh := web.NewClient(app, netip.Addr{}, apiHost, web.Options{Fresh: true})
	load := []web.Request{{Method: "GET", URL: "http://api.example.com/", Status: 200}}
	loads := map[string]*web.Running{
		"live": web.Load{Client: client, Every: 5 * time.Millisecond, Requests: load}.Start(ctx),
		"new":  web.Load{Client: fresh, Every: 20 * time.Millisecond, Requests: load}.Start(ctx),
	}
	lab.Control(ctx, "dns/node1", labv1.ControlPartRequest_ACTION_KILL)
	if f, err := names.Ask(app, "udp", nameServers[0], "new.example.com", dnsmessage.TypeA, time.Second); err == nil {
		t.Errorf("a query without weir-dns is answered: %+v", f)
	}
	awaitAnswers(t, 20, loads)
	killed := time.Now()
	lab.Control(ctx, "dns/node1", labv1.ControlPartRequest_ACTION_START)
	cluster.Eventually(t, func() error {
		_, err := names.Ask(app, "udp", nameServers[0], "new.example.com", dnsmessage.TypeA, time.Second)
		return err
	})
	t.Logf("weir-dns answers %s after its start", time.Since(killed).Round(time.Millisecond))
	awaitAnswers(t, 20, loads)
	for kind, load := range loads {
		if r := load.Stop(); r.Failures() > 0 || len(r.Wrong) > 0 {
			t.Errorf("%s connections by a cached name: %s", kind, r)
		}
	}
	if err := connectsAtOnce(ctx, lab, "app", apiHost6); err != nil {
		t.Errorf("a name of before is gone: %v", err)
	}
}
