// SPDX-License-Identifier: Apache-2.0

package event_test

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	flowpb "github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/services/agent/internal/event"
)

func TestEvents(t *testing.T) {
	now := time.Unix(1000, 0)
	q := event.NewQueue(func() time.Time { return now })
	a, b := netip.MustParseAddrPort("10.96.0.1:80"), netip.MustParseAddrPort("10.244.1.5:8080")
	q.Started(now)
	q.EndpointCreated(event.Endpoint{ID: 7, Namespace: "default", Pod: "web", Labels: []string{"k8s:app=web"}})
	q.EndpointDeleted(event.Endpoint{ID: 7, Namespace: "default", Pod: "web"})
	q.IdentityAllocated(b.Addr(), 300, netip.MustParseAddr("172.30.0.2"), "default", "web")
	q.ServiceUpserted(3, "default", "web", "ClusterIP", a, []netip.AddrPort{b})
	q.ServiceDeleted(3)
	want := []*flowpb.AgentEvent{
		{Type: flowpb.AgentEventType_AGENT_STARTED, Notification: &flowpb.AgentEvent_AgentStart{AgentStart: &flowpb.TimeNotification{Time: timestamppb.New(now)}}},
		{Type: flowpb.AgentEventType_ENDPOINT_CREATED, Notification: &flowpb.AgentEvent_EndpointUpdate{EndpointUpdate: &flowpb.EndpointUpdateNotification{
			Id: 7, Labels: []string{"k8s:app=web"}, PodName: "web", Namespace: "default"}}},
		{Type: flowpb.AgentEventType_ENDPOINT_DELETED, Notification: &flowpb.AgentEvent_EndpointUpdate{EndpointUpdate: &flowpb.EndpointUpdateNotification{
			Id: 7, PodName: "web", Namespace: "default"}}},
		{Type: flowpb.AgentEventType_IPCACHE_UPSERTED, Notification: &flowpb.AgentEvent_IpcacheUpdate{IpcacheUpdate: &flowpb.IPCacheNotification{
			Cidr: "10.244.1.5/32", Identity: 300, HostIp: "172.30.0.2", Namespace: "default", PodName: "web"}}},
		{Type: flowpb.AgentEventType_SERVICE_UPSERTED, Notification: &flowpb.AgentEvent_ServiceUpsert{ServiceUpsert: &flowpb.ServiceUpsertNotification{
			Id: 3, Namespace: "default", Name: "web", Type: "ClusterIP",
			FrontendAddress:  &flowpb.ServiceUpsertNotificationAddr{Ip: "10.96.0.1", Port: 80},
			BackendAddresses: []*flowpb.ServiceUpsertNotificationAddr{{Ip: "10.244.1.5", Port: 8080}}}}},
		{Type: flowpb.AgentEventType_SERVICE_DELETED, Notification: &flowpb.AgentEvent_ServiceDelete{ServiceDelete: &flowpb.ServiceDeleteNotification{Id: 3}}},
	}
	for i, w := range want {
		e, ok := q.Next()
		got := &flowpb.AgentEvent{}
		if !ok || e.Time != now || proto.Unmarshal(e.Body, got) != nil {
			t.Fatalf("event %d: %v, %t", i, e, ok)
		}
		if diff := cmp.Diff(w, got, protocmp.Transform()); diff != "" {
			t.Errorf("event %d (-want +got):\n%s", i, diff)
		}
	}
	if _, ok := q.Next(); ok {
		t.Error("one more event")
	}
}

func TestFullQueueCounts(t *testing.T) {
	q := event.NewQueue(time.Now)
	const n = 5000
	for range n {
		q.ServiceDeleted(1)
	}
	got := uint64(0)
	for _, ok := q.Next(); ok; _, ok = q.Next() {
		got++
	}
	if dropped := q.TakeDropped(); dropped == 0 || got+dropped != n || q.TakeDropped() != 0 {
		t.Errorf("%d events and %d dropped, want %d in all", got, dropped, n)
	}
}
