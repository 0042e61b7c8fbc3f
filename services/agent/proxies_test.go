// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	datav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	statusv1 "github.com/weirmesh/weir/gen/weir/status/v1"
	"github.com/weirmesh/weir/services/agent/internal/netdev"
	"github.com/weirmesh/weir/services/agent/internal/testns"
)

// filtered are policies by which identity 300 passes a filter to reach port 8080 of pod b, and pod a one for its queries, and reaches *.test.
func filtered() []*policyv1.Resource {
	rule := func(list string) *policyv1.PolicyRule {
		return &policyv1.PolicyRule{Kind: "CiliumNetworkPolicy", Namespace: "default", Name: "web", List: list}
	}
	allow := func(proto, port uint32, filter string) *policyv1.PolicyRange {
		return &policyv1.PolicyRange{Protocol: proto, First: port, Last: port, Verdict: policyv1.Verdict_VERDICT_ALLOW, Rules: []uint32{0}, Filter: filter}
	}
	return []*policyv1.Resource{
		{Resource: &policyv1.Resource_Selector{Selector: &policyv1.Selector{Key: "app=test", Members: []string{"300"}}}},
		{Resource: &policyv1.Resource_Policy{Policy: &policyv1.Policy{Key: "in", Direction: policyv1.Direction_DIRECTION_INGRESS, Selectors: []string{"app=test"},
			Rules: []*policyv1.PolicyRule{rule("ingress")}, Filters: []*policyv1.Filter{{Key: "http-x", Kind: policyv1.FilterKind_FILTER_KIND_HTTP}},
			Classes: []*policyv1.PolicyClass{{}, {Selectors: []uint32{0}, Ranges: []*policyv1.PolicyRange{allow(6, 8080, "http-x")}}}}}},
		{Resource: &policyv1.Resource_Policy{Policy: &policyv1.Policy{Key: "out", Direction: policyv1.Direction_DIRECTION_EGRESS, Selectors: []string{"app=test"},
			Rules:   []*policyv1.PolicyRule{rule("egress")},
			Filters: []*policyv1.Filter{{Key: "dns-x", Kind: policyv1.FilterKind_FILTER_KIND_DNS, Dns: []*policyv1.DNSRule{{Rule: rule("egress"), MatchPattern: "*.test"}}}},
			Classes: []*policyv1.PolicyClass{{}, {Selectors: []uint32{0}, Ranges: []*policyv1.PolicyRange{allow(17, 53, "dns-x")}}},
			Names:   []*policyv1.PolicyName{{MatchPattern: "*.test", Ranges: []*policyv1.PolicyRange{allow(6, 443, "")}}}}}},
		{Resource: &policyv1.Resource_Subject{Subject: &policyv1.Subject{Key: "uid-a", Egress: "out"}}},
		{Resource: &policyv1.Resource_Subject{Subject: &policyv1.Subject{Key: "uid-b", Ingress: "in"}}},
	}
}

// nodeNamespace is the namespace of the calling thread.
func nodeNamespace(t *testing.T) *netdev.Namespace {
	t.Helper()
	ns, err := netdev.OpenNamespace("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

func listenIn(ns *netdev.Namespace, port uint32) (ln net.Listener, err error) {
	err = ns.Do(func() error {
		ln, err = net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", port))
		return err
	})
	return ln, err
}

// lookup says what the kernel has for port 8080 of pod b, or for queries of pod a.
func lookup(ctx context.Context, client agentv1.AgentServiceClient, queries bool) string {
	r := &agentv1.LookupPolicyRequest{Endpoint: "default/b", Direction: policyv1.Direction_DIRECTION_INGRESS, Peer: "300", Protocol: 6, Port: 8080}
	if queries {
		r = &agentv1.LookupPolicyRequest{Endpoint: "default/a", Direction: policyv1.Direction_DIRECTION_EGRESS, Peer: "300", Protocol: 17, Port: 53}
	}
	a, err := client.LookupPolicy(ctx, r)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%s %s slot %d %s port %d", a.PolicyKey, a.Verdict, a.Slot, a.Filter, a.ListenerPort)
}

// A policy with filters comes into force listener first and weir-dns first, and what the proxies see becomes flows. A new agent has the same slots.
func TestProxiesOfARunningAgent(t *testing.T) {
	testns.Do(t, func() {
		c := newCluster(t)
		c.start()
		c.plug("a")
		c.plug("b")
		err := c.pods["a"].Do(func() error {
			b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_reserved_ports")
			if text := strings.TrimSpace(string(b)); text != "52000-60999" {
				t.Errorf("a pod has reserved %q: want the ports of upstream sockets", text)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		ns := nodeNamespace(t)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		conn := c.dial()
		defer conn.Close()
		client := agentv1.NewAgentServiceClient(conn)
		admin, err := listenIn(ns, 9901)
		if err != nil {
			t.Fatal(err)
		}
		defer admin.Close()
		if first := <-c.central.slots; len(first.Slots) != 0 {
			t.Errorf("first slots %v", first)
		}

		seen := make(chan string, 10)
		proxy := make(chan net.Listener, 1)
		go func() { // the proxy
			report := <-c.central.slots
			seen <- fmt.Sprintf("%d slots, then %s", len(report.Slots), lookup(ctx, client, false))
			ln, err := listenIn(ns, report.Slots[0].Port)
			if err != nil {
				seen <- err.Error()
			}
			proxy <- ln
		}()
		dns, err := agentv1.NewDNSServiceClient(conn).SyncDNS(ctx)
		if err == nil {
			err = dns.Send(&agentv1.SyncDNSRequest{Message: &agentv1.SyncDNSRequest_Hello{Hello: &agentv1.DNSHello{}}})
		}
		if err != nil {
			t.Fatal(err)
		}
		if r, err := dns.Recv(); err != nil || !r.Synced {
			t.Fatalf("weir-dns is told %v, %v: want the empty state", r, err)
		}
		names := make(chan *agentv1.SyncDNSResponse, 1)
		go func() { // weir-dns
			r, err := dns.Recv()
			if err == nil {
				seen <- "weir-dns, then " + lookup(ctx, client, true)
				err = dns.Send(&agentv1.SyncDNSRequest{Message: &agentv1.SyncDNSRequest_Ack{Ack: r.Revision}})
			}
			if err != nil {
				seen <- err.Error()
			}
			names <- r
		}()
		c.central.push(t, filtered()...)
		defer (<-proxy).Close()
		for _, want := range []string{"2 slots, then  VERDICT_ALLOW slot 0  port 0", "weir-dns, then  VERDICT_ALLOW slot 0  port 0"} {
			if got := <-seen; got != want {
				t.Errorf("%q, want %q: nothing is in force before", got, want)
			}
		}
		check := func(when string) {
			t.Helper()
			if got, want := lookup(ctx, client, false), "in VERDICT_ALLOW slot 1 http-x port 20001"; got != want {
				t.Errorf("%s: %s, want %s", when, got, want)
			}
			if got, want := lookup(ctx, client, true), "out VERDICT_ALLOW slot 2 dns-x port 10053"; got != want {
				t.Errorf("%s: %s, want %s", when, got, want)
			}
		}
		check("in force")
		r := <-names
		if len(r.Filters) != 1 || r.Filters[0].Slot != 2 || len(r.Policies) != 1 || r.Policies[0].Names[0].MatchPattern != "*.test" || r.Policies[0].Names[0].Ranges[0].First != 443 {
			t.Errorf("weir-dns is told %v", r)
		}
		slots, err := client.ListSlots(ctx, &agentv1.ListSlotsRequest{})
		if err != nil || len(slots.Slots) != 2 || !slots.Slots[0].Listening || slots.Slots[1].Listening || slots.Slots[1].KernelPort != 10053 ||
			!slices.Equal(slots.Slots[0].Users, []string{"in"}) {
			t.Errorf("slots %v, %v", slots, err)
		}
		c.tellRequests(ctx, conn)
		st, err := statusv1.NewStatusServiceClient(conn).GetStatus(ctx, &statusv1.GetStatusRequest{})
		if err != nil || !slices.ContainsFunc(st.Details, func(d *statusv1.Detail) bool { return d.Name == "proxy" && d.Value == "listens" }) {
			t.Errorf("status %v, %v", st, err)
		}

		c.kill()
		c.start()
		if report := <-c.central.slots; len(report.Slots) != 2 || report.Slots[0].Key != "http-x" || report.Slots[0].Number != 1 || report.Slots[1].Port != 10053 {
			t.Errorf("a new agent's slots %v", report)
		}
		check("a new agent")
		c.kill()
	})
}

// tellRequests is what the proxy and weir-dns see, and looks for the flows.
func (c *cluster) tellRequests(ctx context.Context, conn *grpc.ClientConn) {
	t := c.t
	t.Helper()
	logs, err := grpc.NewClient("unix:"+filepath.Join(filepath.Dir(c.socket), "accesslog.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer logs.Close()
	address := func(ip string, port uint32) *corev3.Address {
		return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{Address: ip, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port}}}}
	}
	log, err := accesslogv3.NewAccessLogServiceClient(logs).StreamAccessLogs(ctx)
	if err == nil {
		err = log.Send(&accesslogv3.StreamAccessLogsMessage{Identifier: &accesslogv3.StreamAccessLogsMessage_Identifier{LogName: "slot-1"},
			LogEntries: &accesslogv3.StreamAccessLogsMessage_HttpLogs{HttpLogs: &accesslogv3.StreamAccessLogsMessage_HTTPAccessLogEntries{
				LogEntry: []*datav3.HTTPAccessLogEntry{{CommonProperties: &datav3.AccessLogCommon{DownstreamRemoteAddress: address(c.address["a"], 41000),
					DownstreamLocalAddress: address(c.address["b"], 8080), StartTime: timestamppb.Now()},
					Request:  &datav3.HTTPRequestProperties{RequestMethod: corev3.RequestMethod_GET, Authority: "b", Path: "/"},
					Response: &datav3.HTTPResponseProperties{ResponseCode: wrapperspb.UInt32(200)}}}}}})
	}
	if err != nil {
		t.Fatal(err)
	}
	records, err := agentv1.NewDNSServiceClient(conn).SendRecords(ctx)
	if err == nil {
		client := netip.AddrPortFrom(netip.MustParseAddr(c.address["a"]), 4000).String()
		err = records.Send(&agentv1.SendRecordsRequest{First: 1, Records: []*agentv1.DNSRecord{
			{Time: timestamppb.Now(), Client: client, Server: "192.0.2.53:53", Protocol: 17, Query: "x.test.", Qtypes: []string{"A"}},
			{Time: timestamppb.Now(), Client: client, Server: "192.0.2.53:53", Protocol: 17, Query: "x.test.", Qtypes: []string{"A"}, Response: true,
				Addresses: []string{"192.0.2.53"}, Ttl: 30}}})
	}
	if err == nil {
		_, err = records.Recv()
	}
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"EGRESS a>:x.test FORWARDED DNS Query x.test. A", "EGRESS :x.test>a FORWARDED DNS Answer \"192.0.2.53\" TTL: 30 (Proxy x.test. A)",
		"INGRESS a>b: FORWARDED HTTP/1.1 GET http://b/", "INGRESS b:>a FORWARDED HTTP/1.1 200 0ms (GET http://b/)"}
	c.central.until(t, "flows of requests", func(a account) bool {
		var got []string
		for _, f := range a.requests {
			names := [2]string{f.Source.PodName, f.Destination.PodName}
			server := 1
			if f.IsReply.GetValue() {
				server = 0
			}
			names[server] += ":" + strings.Join(slices.Concat(f.SourceNames, f.DestinationNames), ",")
			got = append(got, fmt.Sprintf("%s %s>%s %s %s", f.TrafficDirection, names[0], names[1], f.Verdict, f.Summary)) //nolint:staticcheck // what the command line shows
		}
		slices.Sort(got)
		return slices.Equal(got, slices.Sorted(slices.Values(want)))
	})
}
