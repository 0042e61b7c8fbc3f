// SPDX-License-Identifier: Apache-2.0

package printer

import (
	"fmt"
	"net"
	"strconv"
	"strings"

	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/weirmesh/weir/cli/internal/plainjson"
	"github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/gen/observer"
)

// AgentEvent prints one answer of GetAgentEvents.
func (p *Printer) AgentEvent(r *observer.GetAgentEventsResponse) error {
	e := r.GetAgentEvent()
	if e == nil {
		return nil
	}
	node, typ := Safe(r.GetNodeName()), e.GetType().String()
	var err error
	switch p.opts.Format {
	case JSON:
		return p.json(p.opts.Out, r)
	case Flat:
		return p.plain(e, plainjson.Field{Name: "node_name", Value: r.GetNodeName()}, p.timeField(r.GetTime()))
	case Compact:
		if p.opts.NodeName {
			node = " [" + node + "]"
		} else {
			node = ""
		}
		err = write(p.opts.Out, fmt.Sprintf("%s%s: %s (%s)\n", p.time(r.GetTime()), node, typ, p.details(e)))
	case Dict:
		err = p.dictEvent(p.time(r.GetTime()), node, "       TYPE: ", typ, "    DETAILS: ", p.details(e))
	case Table:
		err = p.row(p.withNode("NODE", "TIMESTAMP", "TYPE", "DETAILS"),
			p.withNode(node, p.time(r.GetTime()), typ, p.details(e)))
	}
	p.records++
	return err
}

// DebugEvent prints one answer of GetDebugEvents.
func (p *Printer) DebugEvent(r *observer.GetDebugEventsResponse) error {
	e := r.GetDebugEvent()
	if e == nil {
		return nil
	}
	node, typ, message := Safe(r.GetNodeName()), e.GetType().String(), Safe(e.GetMessage())
	from, mark, cpu := endpoint(e.GetSource()), hexadecimal(e.GetHash()), cpuNumber(e.GetCpu())
	var err error
	switch p.opts.Format {
	case JSON:
		return p.json(p.opts.Out, r)
	case Flat:
		return p.plain(e, plainjson.Field{Name: "node_name", Value: r.GetNodeName()}, p.timeField(r.GetTime()))
	case Compact:
		if p.opts.NodeName {
			node = " [" + node + "]"
		} else {
			node = ""
		}
		err = write(p.opts.Out, fmt.Sprintf("%s%s: %s %s MARK: %s CPU: %s (%s)\n", p.time(r.GetTime()), node, from, typ, mark, cpu, message))
	case Dict:
		err = p.dictEvent(p.time(r.GetTime()), node, "       TYPE: ", typ, "       FROM: ", from,
			"       MARK: ", mark, "        CPU: ", cpu, "    MESSAGE: ", message)
	case Table:
		// Hubble's table has an empty column behind FROM.
		err = p.row(p.withNode("NODE", "TIMESTAMP", "FROM", "", "TYPE", "CPU/MARK", "MESSAGE"),
			p.withNode(node, p.time(r.GetTime()), from, "", typ, cpu+" "+mark, message))
	}
	p.records++
	return err
}

func (p *Printer) dictEvent(at, node string, pairs ...string) error {
	var b strings.Builder
	p.separate(&b)
	b.WriteString("  TIMESTAMP: " + at + "\n")
	if p.opts.NodeName {
		b.WriteString("       NODE: " + node + "\n")
	}
	for i := 0; i < len(pairs); i += 2 {
		b.WriteString(pairs[i] + pairs[i+1] + "\n")
	}
	return write(p.opts.Out, b.String())
}

// details tells what an agent event carries.
func (p *Printer) details(e *flow.AgentEvent) string {
	var l detailList
	switch n := e.GetNotification().(type) {
	case *flow.AgentEvent_Unknown:
		l.add("type", n.Unknown.GetType())
		l.add("notification", n.Unknown.GetNotification())
	case *flow.AgentEvent_AgentStart:
		l.add("start time", p.time(n.AgentStart.GetTime()))
	case *flow.AgentEvent_PolicyUpdate:
		l.addList("labels", n.PolicyUpdate.GetLabels())
		l.add("revision", n.PolicyUpdate.GetRevision())
		l.add("count", n.PolicyUpdate.GetRuleCount())
	case *flow.AgentEvent_EndpointRegenerate:
		l.add("id", n.EndpointRegenerate.GetId())
		l.addList("labels", n.EndpointRegenerate.GetLabels())
		l.addSet("error", n.EndpointRegenerate.GetError())
	case *flow.AgentEvent_EndpointUpdate:
		l.add("id", n.EndpointUpdate.GetId())
		l.addSet("namespace", n.EndpointUpdate.GetNamespace())
		l.addSet("pod name", n.EndpointUpdate.GetPodName())
	case *flow.AgentEvent_IpcacheUpdate:
		l.add("cidr", n.IpcacheUpdate.GetCidr())
		l.add("identity", n.IpcacheUpdate.GetIdentity())
		if old := n.IpcacheUpdate.GetOldIdentity(); old != nil {
			l.add("old identity", old.GetValue())
		}
		l.addSet("host ip", n.IpcacheUpdate.GetHostIp())
		l.addSet("old host ip", n.IpcacheUpdate.GetOldHostIp())
		l.add("encrypt key", n.IpcacheUpdate.GetEncryptKey())
	case *flow.AgentEvent_ServiceUpsert:
		serviceDetails(&l, n.ServiceUpsert)
	case *flow.AgentEvent_ServiceDelete:
		l.add("id", n.ServiceDelete.GetId())
	}
	if len(l) == 0 || !fits(e) {
		return "UNKNOWN"
	}
	return strings.Join(l, ", ")
}

// fits says whether an event carries the kind of notification that its type names.
func fits(e *flow.AgentEvent) bool {
	switch e.GetType() {
	case flow.AgentEventType_AGENT_EVENT_UNKNOWN:
		return e.GetUnknown() != nil
	case flow.AgentEventType_AGENT_STARTED:
		return e.GetAgentStart() != nil
	case flow.AgentEventType_POLICY_UPDATED, flow.AgentEventType_POLICY_DELETED:
		return e.GetPolicyUpdate() != nil
	case flow.AgentEventType_ENDPOINT_REGENERATE_SUCCESS, flow.AgentEventType_ENDPOINT_REGENERATE_FAILURE:
		return e.GetEndpointRegenerate() != nil
	case flow.AgentEventType_ENDPOINT_CREATED, flow.AgentEventType_ENDPOINT_DELETED:
		return e.GetEndpointUpdate() != nil
	case flow.AgentEventType_IPCACHE_UPSERTED, flow.AgentEventType_IPCACHE_DELETED:
		return e.GetIpcacheUpdate() != nil
	case flow.AgentEventType_SERVICE_UPSERTED:
		return e.GetServiceUpsert() != nil
	case flow.AgentEventType_SERVICE_DELETED:
		return e.GetServiceDelete() != nil
	}
	return false
}

func serviceDetails(l *detailList, s *flow.ServiceUpsertNotification) {
	address := func(a *flow.ServiceUpsertNotificationAddr) string {
		return net.JoinHostPort(a.GetIp(), strconv.FormatUint(uint64(a.GetPort()), 10))
	}
	l.add("id", s.GetId())
	if s.GetFrontendAddress() != nil {
		l.add("frontend", address(s.GetFrontendAddress()))
	}
	if len(s.GetBackendAddresses()) > 0 {
		var backends []string
		for _, b := range s.GetBackendAddresses() {
			backends = append(backends, address(b))
		}
		l.addList("backends", backends)
	}
	l.addSet("type", s.GetType())
	l.addSet("traffic policy", s.GetTrafficPolicy())
	l.addSet("namespace", s.GetNamespace())
	l.addSet("name", s.GetName())
}

// detailList collects "name: value".
type detailList []string

func (l *detailList) add(name string, value any) {
	*l = append(*l, name+": "+Safe(fmt.Sprint(value)))
}

func (l *detailList) addSet(name, value string) {
	if value != "" {
		l.add(name, value)
	}
}

func (l *detailList) addList(name string, values []string) {
	l.add(name, "["+strings.Join(values, ",")+"]")
}

func endpoint(e *flow.Endpoint) string {
	if e == nil {
		return "N/A"
	}
	id := fmt.Sprintf("ID: %d", e.GetID())
	if e.GetNamespace() != "" && e.GetPodName() != "" {
		return fmt.Sprintf("%s/%s (%s)", Safe(e.GetNamespace()), Safe(e.GetPodName()), id)
	}
	if labels := e.GetLabels(); len(labels) == 1 && strings.HasPrefix(labels[0], "reserved:") {
		return fmt.Sprintf("%s (%s)", Safe(labels[0]), id)
	}
	return id
}

func hexadecimal(v *wrapperspb.UInt32Value) string {
	if v == nil {
		return "N/A"
	}
	return fmt.Sprintf("0x%x", v.GetValue())
}

func cpuNumber(v *wrapperspb.Int32Value) string {
	if v == nil {
		return "N/A"
	}
	return fmt.Sprintf("%02d", v.GetValue())
}
