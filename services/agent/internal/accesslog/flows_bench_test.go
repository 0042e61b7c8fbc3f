// SPDX-License-Identifier: Apache-2.0

package accesslog

import (
	"fmt"
	"net/netip"
	"strconv"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	datav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/weirmesh/weir/services/agent/internal/batch"
	"github.com/weirmesh/weir/services/agent/internal/flow"
	requests "github.com/weirmesh/weir/services/agent/internal/request"
)

// proxied is how many entries weir-proxy puts into a message under load.
const proxied = 32

// ended is the one entry of a request that weir-proxy sends: number i of a message, on one of eight connections.
func (f *fixture) ended(i int) *datav3.HTTPAccessLogEntry {
	client := address("10.0.0.1:" + strconv.Itoa(41000+i%8))
	c := &datav3.AccessLogCommon{
		DownstreamRemoteAddress: client, DownstreamLocalAddress: address("10.0.0.2:8080"), DownstreamDirectRemoteAddress: client,
		UpstreamRemoteAddress: address("10.0.0.2:8080"), UpstreamCluster: "shop/api", RouteName: "shop/api/ingress[1]",
		StartTime: timestamppb.New(f.now.Add(-time.Duration(proxied-i) * time.Millisecond)), AccessLogType: datav3.AccessLogType_DownstreamEnd,
		TimeToLastDownstreamTxByte: durationpb.New(1234567), Duration: durationpb.New(1234567), UpstreamRequestAttemptCount: 1,
		Metadata: &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{httpRBAC: {Fields: map[string]*structpb.Value{
			"shadow_effective_policy_id": structpb.NewStringValue("shop/api/ingress[1]#0"), "shadow_engine_result": structpb.NewStringValue("allowed")}}}},
	}
	if i == 0 {
		c.CustomTags = map[string]string{"weir.sequence": "1"}
	}
	return &datav3.HTTPAccessLogEntry{CommonProperties: c, ProtocolVersion: datav3.HTTPAccessLogEntry_HTTP11,
		Request: &datav3.HTTPRequestProperties{RequestMethod: corev3.RequestMethod_GET, Scheme: "http", Authority: "api.shop.svc.cluster.local:8080",
			Path: fmt.Sprintf("/v1/orders/%d/items?page=2", 7000+i), UserAgent: "Go-http-client/1.1", RequestId: fmt.Sprintf("4bf92f35-77b3-4da6-a3ce-929d0e0e%04d", i),
			RequestHeadersBytes: 240, RequestHeaders: map[string]string{"accept": "application/json", "accept-encoding": "gzip", "x-canary": "false"}},
		Response: &datav3.HTTPResponseProperties{ResponseCode: wrapperspb.UInt32(200), ResponseHeadersBytes: 130, ResponseBodyBytes: 512,
			ResponseHeaders: map[string]string{"content-type": "application/json", "content-length": "512"}}}
}

// BenchmarkFlows is all that an agent does of a message of requests that have ended: both flows of each, in batches as they are published.
func BenchmarkFlows(b *testing.B) {
	queue := requests.NewQueue(requests.DefaultQueue)
	f := start(func(c *Config) { c.Put, c.Headers = queue.Put, NewHeaders(nil, DefaultRedacted()) })
	var entries []*datav3.HTTPAccessLogEntry
	for i := range proxied {
		entries = append(entries, f.ended(i))
	}
	raw, err := proto.Marshal(logs("slot-1", entries...))
	if err != nil {
		b.Fatal(err)
	}
	encoder := flow.NewEncoder(shop(f), nil, flow.Node{Cluster: "default", Name: "node-1", Version: "0.4.0", Labels: []string{"kubernetes.io/hostname=node-1"}})
	sealer := batch.NewSealer("node-1", "default", 1)
	st := f.newStream()
	room := make([]*flow.Request, 2*proxied)
	sealed, flows := 0, 0
	b.ReportAllocs()
	for b.Loop() {
		if err := st.take(raw); err != nil {
			b.Fatal(err)
		}
		for _, r := range room[:queue.Take(room)] {
			if sealer.Full() {
				s, _ := sealer.Seal()
				sealed += len(s.Bytes)
			}
			x, ok := encoder.EncodeRequest(r)
			if !ok {
				b.Fatal("a request makes no sense")
			}
			sealer.AddFlow(x.Time, x.Body, x.Stats, x.Meta)
			flows++
		}
	}
	if want := 2 * proxied * b.N; flows != want {
		b.Fatalf("%d flows, want %d", flows, want)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/proxied, "ns/request")
	b.ReportMetric(float64(sealed)/float64(b.N)/proxied, "published-B/request")
}

// shop is a directory of who is in the entries, as pods of a cluster are.
func shop(f *fixture) *flow.Directory {
	d := flow.NewDirectory("default", func() time.Time { return f.now })
	for i, name := range []string{"web", "api"} {
		identity := f.cfg.Identity(netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 1)}))
		d.SetIdentity(identity, []string{"k8s:app=" + name, "k8s:io.kubernetes.pod.namespace=shop", "k8s:io.cilium.k8s.policy.cluster=default",
			"k8s:io.cilium.k8s.policy.serviceaccount=default", "k8s:pod-template-hash=5d4f8c7b9"})
		d.SetPeer(netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 1)}), flow.Peer{EndpointID: uint32(i), Identity: identity, Namespace: "shop",
			Pod: name + "-5d4f8c7b9-x2x4z", WorkloadName: name, WorkloadKind: "Deployment"})
	}
	d.SetService(7, flow.Frontend{Addr: netip.MustParseAddr("10.96.0.10"), Port: 80, Proto: protoTCP}, flow.ServiceName{Namespace: "shop", Name: "api"})
	return d
}
