// SPDX-License-Identifier: Apache-2.0

package printer

import (
	"testing"

	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/gen/observer"
)

func agentEvents() []*observer.GetAgentEventsResponse {
	var out []*observer.GetAgentEventsResponse
	for _, e := range []*flow.AgentEvent{
		{Type: flow.AgentEventType_AGENT_STARTED, Notification: &flow.AgentEvent_AgentStart{AgentStart: &flow.TimeNotification{Time: at}}},
		{Type: flow.AgentEventType_POLICY_UPDATED, Notification: &flow.AgentEvent_PolicyUpdate{PolicyUpdate: &flow.PolicyUpdateNotification{Labels: []string{"k8s:a=b", "k8s:c=d"}, Revision: 7, RuleCount: 2}}},
		{Type: flow.AgentEventType_ENDPOINT_REGENERATE_FAILURE, Notification: &flow.AgentEvent_EndpointRegenerate{EndpointRegenerate: &flow.EndpointRegenNotification{Id: 9, Labels: []string{"k8s:a=b"}, Error: "x"}}},
		{Type: flow.AgentEventType_ENDPOINT_CREATED, Notification: &flow.AgentEvent_EndpointUpdate{EndpointUpdate: &flow.EndpointUpdateNotification{Id: 9, Namespace: "ns", PodName: "p"}}},
		{Type: flow.AgentEventType_IPCACHE_UPSERTED, Notification: &flow.AgentEvent_IpcacheUpdate{IpcacheUpdate: &flow.IPCacheNotification{
			Cidr: "10.0.0.1/32", Identity: 5, OldIdentity: wrapperspb.UInt32(4), HostIp: "1.1.1.1", OldHostIp: "2.2.2.2", EncryptKey: 3}}},
		{Type: flow.AgentEventType_AGENT_EVENT_UNKNOWN, Notification: &flow.AgentEvent_Unknown{Unknown: &flow.AgentEventUnknown{Type: "a", Notification: "b\n"}}},
		{Type: flow.AgentEventType_SERVICE_UPSERTED, Notification: &flow.AgentEvent_ServiceUpsert{ServiceUpsert: &flow.ServiceUpsertNotification{
			Id: 1, FrontendAddress: &flow.ServiceUpsertNotificationAddr{Ip: "fd00::1", Port: 80}, BackendAddresses: []*flow.ServiceUpsertNotificationAddr{{Ip: "1.1.1.1", Port: 1}, {Ip: "1.1.1.2", Port: 2}},
			Type: "ClusterIP", Name: "n", Namespace: "ns"}}},
		{Type: flow.AgentEventType_SERVICE_DELETED, Notification: &flow.AgentEvent_ServiceDelete{ServiceDelete: &flow.ServiceDeleteNotification{Id: 1}}},
		{Type: flow.AgentEventType_AGENT_STARTED},
	} {
		out = append(out, &observer.GetAgentEventsResponse{AgentEvent: e, NodeName: "default/worker-1", Time: at})
	}
	return out
}

func TestAgentEvents(t *testing.T) {
	all := func(p *Printer) error {
		for _, r := range agentEvents() {
			if err := p.AgentEvent(r); err != nil {
				return err
			}
		}
		return nil
	}
	first := func(p *Printer) error { return p.AgentEvent(agentEvents()[0]) }
	tests := []struct {
		name  string
		opts  Options
		print func(*Printer) error
		want  string
	}{
		{"compact", Options{}, all, `May  6 07:08:09.123: AGENT_STARTED (start time: May  6 07:08:09.123)
May  6 07:08:09.123: POLICY_UPDATED (labels: [k8s:a=b,k8s:c=d], revision: 7, count: 2)
May  6 07:08:09.123: ENDPOINT_REGENERATE_FAILURE (id: 9, labels: [k8s:a=b], error: x)
May  6 07:08:09.123: ENDPOINT_CREATED (id: 9, namespace: ns, pod name: p)
May  6 07:08:09.123: IPCACHE_UPSERTED (cidr: 10.0.0.1/32, identity: 5, old identity: 4, host ip: 1.1.1.1, old host ip: 2.2.2.2, encrypt key: 3)
May  6 07:08:09.123: AGENT_EVENT_UNKNOWN (type: a, notification: b\n)
May  6 07:08:09.123: SERVICE_UPSERTED (id: 1, frontend: [fd00::1]:80, backends: [1.1.1.1:1,1.1.1.2:2], type: ClusterIP, namespace: ns, name: n)
May  6 07:08:09.123: SERVICE_DELETED (id: 1)
May  6 07:08:09.123: AGENT_STARTED (UNKNOWN)
`},
		{"node", Options{NodeName: true}, first, "May  6 07:08:09.123 [default/worker-1]: AGENT_STARTED (start time: May  6 07:08:09.123)\n"},
		{"table", Options{Format: Table, NodeName: true}, first, `TIMESTAMP             NODE               TYPE            DETAILS
May  6 07:08:09.123   default/worker-1   AGENT_STARTED   start time: May  6 07:08:09.123
`},
		{"dict", Options{Format: Dict}, func(p *Printer) error {
			if err := first(p); err != nil {
				return err
			}
			return p.AgentEvent(agentEvents()[3])
		}, `  TIMESTAMP: May  6 07:08:09.123
       TYPE: AGENT_STARTED
    DETAILS: start time: May  6 07:08:09.123
------------
  TIMESTAMP: May  6 07:08:09.123
       TYPE: ENDPOINT_CREATED
    DETAILS: id: 9, namespace: ns, pod name: p
`},
		{"json", Options{Format: JSON}, first, `{"agent_event":{"type":"AGENT_STARTED","agent_start":{"time":"2024-05-06T07:08:09.123456789Z"}},"node_name":"default/worker-1","time":"2024-05-06T07:08:09.123456789Z"}` + "\n"},
		{"flat", Options{Format: Flat}, first, `{"node_name":"default/worker-1","time":"2024-05-06T07:08:09.123456789Z","type":"AGENT_STARTED","agent_start":{"time":"2024-05-06T07:08:09.123456789Z"}}` + "\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got, _ := run(t, tt.opts, tt.print); got != tt.want {
				t.Errorf("got\n%swant\n%s", got, tt.want)
			}
		})
	}
}

func TestDebugEvents(t *testing.T) {
	full := &observer.GetDebugEventsResponse{NodeName: "default/worker-1", Time: at, DebugEvent: &flow.DebugEvent{
		Type: flow.DebugEventType_DBG_CT_LOOKUP4_1, Source: &flow.Endpoint{ID: 11, Namespace: "default", PodName: "client-abc"},
		Hash: wrapperspb.UInt32(0xabcdef), Cpu: wrapperspb.Int32(1), Message: "Conntrack lookup 1/2"}}
	bare := &observer.GetDebugEventsResponse{Time: at, DebugEvent: &flow.DebugEvent{}}
	reserved := &observer.GetDebugEventsResponse{Time: at, DebugEvent: &flow.DebugEvent{Source: &flow.Endpoint{ID: 5, Labels: []string{"reserved:host"}}}}
	all := func(p *Printer) error {
		for _, r := range []*observer.GetDebugEventsResponse{full, bare, reserved, {}} {
			if err := p.DebugEvent(r); err != nil {
				return err
			}
		}
		return nil
	}
	for name, tt := range map[string]struct {
		opts Options
		want string
	}{
		"compact": {Options{}, `May  6 07:08:09.123: default/client-abc (ID: 11) DBG_CT_LOOKUP4_1 MARK: 0xabcdef CPU: 01 (Conntrack lookup 1/2)
May  6 07:08:09.123: N/A DBG_EVENT_UNKNOWN MARK: N/A CPU: N/A ()
May  6 07:08:09.123: reserved:host (ID: 5) DBG_EVENT_UNKNOWN MARK: N/A CPU: N/A ()
`},
		"table": {Options{Format: Table}, "TIMESTAMP             FROM                             TYPE                CPU/MARK      MESSAGE\n" +
			"May  6 07:08:09.123   default/client-abc (ID: 11)      DBG_CT_LOOKUP4_1    01 0xabcdef   Conntrack lookup 1/2\n" +
			"May  6 07:08:09.123   N/A                              DBG_EVENT_UNKNOWN   N/A N/A       \n" +
			"May  6 07:08:09.123   reserved:host (ID: 5)            DBG_EVENT_UNKNOWN   N/A N/A       \n"},
	} {
		t.Run(name, func(t *testing.T) {
			if got, _ := run(t, tt.opts, all); got != tt.want {
				t.Errorf("got\n%swant\n%s", got, tt.want)
			}
		})
	}
}
