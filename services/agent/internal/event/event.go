// SPDX-License-Identifier: Apache-2.0

// Package event makes the agent's own events, in the shapes that Hubble's API has for them, and queues them for the flow pipeline.
package event

import (
	"encoding/json"
	"net/netip"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	flowpb "github.com/weirmesh/weir/gen/flow"
)

// Event is an encoded flow.AgentEvent.
type Event struct {
	Time time.Time
	Body []byte
}

// queueLen bounds events that wait for the pipeline; what comes on top is counted.
const queueLen = 4096

// Queue takes events from any goroutine and never blocks.
type Queue struct {
	now     func() time.Time
	ch      chan Event
	dropped atomic.Uint64
}

// NewQueue makes a queue; now is the node's clock.
func NewQueue(now func() time.Time) *Queue {
	return &Queue{now: now, ch: make(chan Event, queueLen)}
}

// Next returns an event, or false when none waits.
func (q *Queue) Next() (Event, bool) {
	select {
	case e := <-q.ch:
		return e, true
	default:
		return Event{}, false
	}
}

// TakeDropped returns how many events found the queue full since the last call.
func (q *Queue) TakeDropped() uint64 { return q.dropped.Swap(0) }

func (q *Queue) put(e *flowpb.AgentEvent) {
	body, err := proto.Marshal(e)
	if err != nil {
		q.dropped.Add(1)
		return
	}
	select {
	case q.ch <- Event{Time: q.now(), Body: body}:
	default:
		q.dropped.Add(1)
	}
}

// Started says that the agent started.
func (q *Queue) Started(at time.Time) {
	q.put(&flowpb.AgentEvent{Type: flowpb.AgentEventType_AGENT_STARTED,
		Notification: &flowpb.AgentEvent_AgentStart{AgentStart: &flowpb.TimeNotification{Time: timestamppb.New(at)}}})
}

// Endpoint is what an event says of an endpoint.
type Endpoint struct {
	ID             uint16
	Namespace, Pod string
	Labels         []string
}

// EndpointCreated says that a pod is connected.
func (q *Queue) EndpointCreated(e Endpoint) { q.endpoint(flowpb.AgentEventType_ENDPOINT_CREATED, e) }

// EndpointDeleted says that a pod is gone.
func (q *Queue) EndpointDeleted(e Endpoint) { q.endpoint(flowpb.AgentEventType_ENDPOINT_DELETED, e) }

func (q *Queue) endpoint(t flowpb.AgentEventType, e Endpoint) {
	q.put(&flowpb.AgentEvent{Type: t, Notification: &flowpb.AgentEvent_EndpointUpdate{EndpointUpdate: &flowpb.EndpointUpdateNotification{
		Id: uint64(e.ID), Labels: e.Labels, Namespace: e.Namespace, PodName: e.Pod}}})
}

// PolicyUpdated says that a policy is in force on this node.
func (q *Queue) PolicyUpdated(labels []string, revision uint64, rules int) {
	q.policy(flowpb.AgentEventType_POLICY_UPDATED, labels, revision, rules)
}

// PolicyDeleted says that a policy is in force no more.
func (q *Queue) PolicyDeleted(labels []string, revision uint64, rules int) {
	q.policy(flowpb.AgentEventType_POLICY_DELETED, labels, revision, rules)
}

func (q *Queue) policy(t flowpb.AgentEventType, labels []string, revision uint64, rules int) {
	q.put(&flowpb.AgentEvent{Type: t, Notification: &flowpb.AgentEvent_PolicyUpdate{PolicyUpdate: &flowpb.PolicyUpdateNotification{
		Labels: labels, Revision: revision, RuleCount: int64(rules)}}})
}

// Notice tells what Hubble has no event for: a kind of ours, and details as JSON.
func (q *Queue) Notice(kind string, detail any) {
	b, err := json.Marshal(detail)
	if err != nil {
		q.dropped.Add(1)
		return
	}
	q.put(&flowpb.AgentEvent{Type: flowpb.AgentEventType_AGENT_EVENT_UNKNOWN,
		Notification: &flowpb.AgentEvent_Unknown{Unknown: &flowpb.AgentEventUnknown{Type: kind, Notification: string(b)}}})
}

// IdentityAllocated says that an identity came into use: the address that brought it, as Hubble has no event of its own for this.
func (q *Queue) IdentityAllocated(a netip.Addr, identity uint32, host netip.Addr, namespace, pod string) {
	n := &flowpb.IPCacheNotification{Cidr: netip.PrefixFrom(a, a.BitLen()).String(), Identity: identity, Namespace: namespace, PodName: pod}
	if host.IsValid() {
		n.HostIp = host.String()
	}
	q.put(&flowpb.AgentEvent{Type: flowpb.AgentEventType_IPCACHE_UPSERTED, Notification: &flowpb.AgentEvent_IpcacheUpdate{IpcacheUpdate: n}})
}

// ServiceUpserted says that a frontend or its backends changed. Hubble marks the message deprecated; it is still the only one there is.
func (q *Queue) ServiceUpserted(id uint32, namespace, name, kind string, frontend netip.AddrPort, backends []netip.AddrPort) {
	n := &flowpb.ServiceUpsertNotification{Id: id, Namespace: namespace, Name: name, Type: kind, FrontendAddress: address(frontend)} //nolint:staticcheck // see above
	for _, b := range backends {
		n.BackendAddresses = append(n.BackendAddresses, address(b))
	}
	q.put(&flowpb.AgentEvent{Type: flowpb.AgentEventType_SERVICE_UPSERTED, //nolint:staticcheck // see above
		Notification: &flowpb.AgentEvent_ServiceUpsert{ServiceUpsert: n}})
}

// ServiceDeleted says that a frontend is gone.
func (q *Queue) ServiceDeleted(id uint32) {
	q.put(&flowpb.AgentEvent{Type: flowpb.AgentEventType_SERVICE_DELETED, //nolint:staticcheck // see above
		Notification: &flowpb.AgentEvent_ServiceDelete{ServiceDelete: &flowpb.ServiceDeleteNotification{Id: id}}}) //nolint:staticcheck // see above
}

func address(a netip.AddrPort) *flowpb.ServiceUpsertNotificationAddr { //nolint:staticcheck // see above
	return &flowpb.ServiceUpsertNotificationAddr{Ip: a.Addr().String(), Port: uint32(a.Port())} //nolint:staticcheck // see above
}
