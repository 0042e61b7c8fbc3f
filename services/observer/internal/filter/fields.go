// SPDX-License-Identifier: Apache-2.0

package filter

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/weirmesh/weir/gen/flow"
)

// everything, as a path, says that the whole flow must be decoded.
const everything = "*"

// field is one row of the table: a field of flow.FlowFilter (or a pair that is decided alike), the
// paths of flow.Flow that it reads, and its compiler, which returns nil when the request leaves it out.
type field struct {
	name    string
	paths   []string
	compile func(*flow.FlowFilter) (Match, error)
}

// fields is the table of all filter fields. A test walks the descriptor and fails when one is missing.
func fields() []field {
	return slices.Concat(flowFields(), endpointFields(), layer4Fields(), layer7Fields())
}

// listed makes a compiler of a field that matches when a value of the flow is among the listed ones.
func listed[T comparable](get func(*flow.FlowFilter) []T, of func(*flow.Flow) (T, bool)) func(*flow.FlowFilter) (Match, error) {
	return func(f *flow.FlowFilter) (Match, error) {
		list := get(f)
		if len(list) == 0 {
			return nil, nil
		}
		return func(fl *flow.Flow) bool {
			value, ok := of(fl)
			return ok && slices.Contains(list, value)
		}, nil
	}
}

func flowFields() []field {
	return []field{
		{"uuid", []string{"uuid"}, listed((*flow.FlowFilter).GetUuid,
			func(fl *flow.Flow) (string, bool) { return fl.GetUuid(), true })},
		{"verdict", []string{"verdict"}, listed((*flow.FlowFilter).GetVerdict,
			func(fl *flow.Flow) (flow.Verdict, bool) { return fl.GetVerdict(), true })},
		{"traffic_direction", []string{"traffic_direction"}, listed((*flow.FlowFilter).GetTrafficDirection,
			func(fl *flow.Flow) (flow.TrafficDirection, bool) { return fl.GetTrafficDirection(), true })},
		{"drop_reason_desc", []string{"drop_reason_desc", "verdict"}, listed((*flow.FlowFilter).GetDropReasonDesc,
			func(fl *flow.Flow) (flow.DropReason, bool) {
				return fl.GetDropReasonDesc(), fl.GetVerdict() == flow.Verdict_DROPPED
			})},
		// A flow that does not say is no match, except a dropped one: hubble-ui asks for reply=false
		// and wants to see drops.
		{"reply", []string{"is_reply", "verdict"}, listed((*flow.FlowFilter).GetReply,
			func(fl *flow.Flow) (bool, bool) {
				return fl.GetIsReply().GetValue(), fl.GetIsReply() != nil || fl.GetVerdict() == flow.Verdict_DROPPED
			})},
		{"event_type", []string{"event_type"}, compileEventTypes},
		{"interface", []string{"interface"}, compileInterfaces},
		{"node_name", []string{"node_name"}, func(f *flow.FlowFilter) (Match, error) {
			if len(f.GetNodeName()) == 0 {
				return nil, nil
			}
			re, err := compileNodeNames(f.GetNodeName())
			if err != nil {
				return nil, err
			}
			return func(fl *flow.Flow) bool { return re.MatchString(fl.GetNodeName()) }, nil
		}},
		{"node_labels", []string{"node_labels"}, func(f *flow.FlowFilter) (Match, error) {
			return compileLabels(f.GetNodeLabels(), "node", (*flow.Flow).GetNodeLabels)
		}},
		{"trace_id", []string{"trace_context"}, listed((*flow.FlowFilter).GetTraceId,
			func(fl *flow.Flow) (string, bool) {
				id := fl.GetTraceContext().GetParent().GetTraceId()
				return id, id != ""
			})},
		{"ip_trace_id", []string{"ip_trace_id"}, listed((*flow.FlowFilter).GetIpTraceId,
			func(fl *flow.Flow) (uint64, bool) { return fl.GetIpTraceId().GetTraceId(), true })},
		{"experimental", []string{everything}, compileCEL},
	}
}

func compileEventTypes(f *flow.FlowFilter) (Match, error) {
	list := f.GetEventType()
	if len(list) == 0 {
		return nil, nil
	}
	return func(fl *flow.Flow) bool {
		has := fl.GetEventType()
		if has == nil {
			return false
		}
		return slices.ContainsFunc(list, func(want *flow.EventTypeFilter) bool {
			return (want.GetType() == 0 || want.GetType() == has.GetType()) &&
				(!want.GetMatchSubType() || want.GetSubType() == has.GetSubType())
		})
	}, nil
}

func compileInterfaces(f *flow.FlowFilter) (Match, error) {
	list := f.GetInterface()
	if len(list) == 0 {
		return nil, nil
	}
	return func(fl *flow.Flow) bool {
		has := fl.GetInterface()
		return has != nil && slices.ContainsFunc(list, func(want *flow.NetworkInterface) bool {
			return (want.GetIndex() == 0 || want.GetIndex() == has.GetIndex()) &&
				(want.GetName() == "" || want.GetName() == has.GetName())
		})
	}, nil
}

// side is one end of a flow: everything about endpoints comes in pairs.
type side struct {
	name     string
	endpoint func(*flow.Flow) *flow.Endpoint
	ip       func(*flow.IP) string
	names    func(*flow.Flow) []string
	service  func(*flow.Flow) *flow.Service
	port     func(ports) uint32

	wantIP, wantPod, wantFQDN, wantLabel, wantService, wantCluster, wantPort func(*flow.FlowFilter) []string
	wantWorkload                                                             func(*flow.FlowFilter) []*flow.Workload
	wantIdentity                                                             func(*flow.FlowFilter) []uint32
}

func sides() []side {
	return []side{{
		name:         "source",
		endpoint:     (*flow.Flow).GetSource,
		ip:           (*flow.IP).GetSource,
		names:        (*flow.Flow).GetSourceNames,
		service:      (*flow.Flow).GetSourceService,
		port:         ports.GetSourcePort,
		wantIP:       (*flow.FlowFilter).GetSourceIp,
		wantPod:      (*flow.FlowFilter).GetSourcePod,
		wantFQDN:     (*flow.FlowFilter).GetSourceFqdn,
		wantLabel:    (*flow.FlowFilter).GetSourceLabel,
		wantService:  (*flow.FlowFilter).GetSourceService,
		wantCluster:  (*flow.FlowFilter).GetSourceClusterName,
		wantPort:     (*flow.FlowFilter).GetSourcePort,
		wantWorkload: (*flow.FlowFilter).GetSourceWorkload,
		wantIdentity: (*flow.FlowFilter).GetSourceIdentity,
	}, {
		name:         "destination",
		endpoint:     (*flow.Flow).GetDestination,
		ip:           (*flow.IP).GetDestination,
		names:        (*flow.Flow).GetDestinationNames,
		service:      (*flow.Flow).GetDestinationService,
		port:         ports.GetDestinationPort,
		wantIP:       (*flow.FlowFilter).GetDestinationIp,
		wantPod:      (*flow.FlowFilter).GetDestinationPod,
		wantFQDN:     (*flow.FlowFilter).GetDestinationFqdn,
		wantLabel:    (*flow.FlowFilter).GetDestinationLabel,
		wantService:  (*flow.FlowFilter).GetDestinationService,
		wantCluster:  (*flow.FlowFilter).GetDestinationClusterName,
		wantPort:     (*flow.FlowFilter).GetDestinationPort,
		wantWorkload: (*flow.FlowFilter).GetDestinationWorkload,
		wantIdentity: (*flow.FlowFilter).GetDestinationIdentity,
	}}
}

func endpointFields() []field {
	all := []field{{"source_ip_xlated", []string{"IP.source_xlated"}, func(f *flow.FlowFilter) (Match, error) {
		return compileIPs(f.GetSourceIpXlated(), (*flow.IP).GetSourceXlated)
	}}}
	for _, s := range sides() {
		all = append(all,
			field{s.name + "_ip", []string{"IP." + s.name}, func(f *flow.FlowFilter) (Match, error) {
				return compileIPs(s.wantIP(f), s.ip)
			}},
			field{s.name + "_pod", []string{s.name + ".namespace", s.name + ".pod_name"}, func(f *flow.FlowFilter) (Match, error) {
				return compileNames(s.wantPod(f), func(fl *flow.Flow) (string, string) {
					return s.endpoint(fl).GetNamespace(), s.endpoint(fl).GetPodName()
				})
			}},
			field{s.name + "_service", []string{s.name + "_service"}, func(f *flow.FlowFilter) (Match, error) {
				m, err := compileNames(s.wantService(f), func(fl *flow.Flow) (string, string) {
					return s.service(fl).GetNamespace(), s.service(fl).GetName()
				})
				if err != nil {
					return nil, fmt.Errorf("invalid %s service filter: %w", s.name, err)
				}
				return m, nil
			}},
			field{s.name + "_fqdn", []string{s.name + "_names"}, func(f *flow.FlowFilter) (Match, error) {
				return compileFQDNs(s.wantFQDN(f), s.names)
			}},
			field{s.name + "_label", []string{s.name + ".labels"}, func(f *flow.FlowFilter) (Match, error) {
				return compileLabels(s.wantLabel(f), s.name, func(fl *flow.Flow) []string { return s.endpoint(fl).GetLabels() })
			}},
			field{s.name + "_workload", []string{s.name + ".workloads"}, func(f *flow.FlowFilter) (Match, error) {
				return compileWorkloads(s.wantWorkload(f), s.endpoint)
			}},
			field{s.name + "_cluster_name", []string{s.name + ".cluster_name"}, func(f *flow.FlowFilter) (Match, error) {
				return compileClusters(s.wantCluster(f), s.endpoint)
			}},
			// The path of one field makes the endpoint present in a masked flow even when it was
			// absent; here that matters, so the whole endpoint is read.
			field{s.name + "_identity", []string{s.name}, listed(s.wantIdentity, func(fl *flow.Flow) (uint32, bool) {
				return s.endpoint(fl).GetIdentity(), s.endpoint(fl) != nil
			})},
			field{s.name + "_port", []string{"l4"}, func(f *flow.FlowFilter) (Match, error) {
				m, err := compilePorts(s.wantPort(f), s.port)
				if err != nil {
					return nil, fmt.Errorf("invalid %s port filter: %w", s.name, err)
				}
				return m, nil
			}},
		)
	}
	return all
}

func compileWorkloads(list []*flow.Workload, of func(*flow.Flow) *flow.Endpoint) (Match, error) {
	if len(list) == 0 {
		return nil, nil
	}
	return func(fl *flow.Flow) bool {
		return slices.ContainsFunc(of(fl).GetWorkloads(), func(has *flow.Workload) bool {
			return slices.ContainsFunc(list, func(want *flow.Workload) bool {
				return (want.GetName() == "" || want.GetName() == has.GetName()) &&
					(want.GetKind() == "" || want.GetKind() == has.GetKind())
			})
		})
	}, nil
}

func compileClusters(list []string, of func(*flow.Flow) *flow.Endpoint) (Match, error) {
	if len(list) == 0 {
		return nil, nil
	}
	if slices.Contains(list, "") {
		return nil, errEmptyName
	}
	return func(fl *flow.Flow) bool { return slices.Contains(list, of(fl).GetClusterName()) }, nil
}

// ports is a layer 4 header that has ports.
type ports interface {
	GetSourcePort() uint32
	GetDestinationPort() uint32
}

// portsOf returns the ports of TCP, UDP or SCTP; nil = there are none.
func portsOf(l4 *flow.Layer4) ports {
	switch {
	case l4.GetTCP() != nil:
		return l4.GetTCP()
	case l4.GetUDP() != nil:
		return l4.GetUDP()
	case l4.GetSCTP() != nil:
		return l4.GetSCTP()
	}
	return nil
}

func compilePorts(list []string, of func(ports) uint32) (Match, error) {
	if len(list) == 0 {
		return nil, nil
	}
	var want []uint32
	for _, text := range list {
		port, err := strconv.ParseUint(text, 10, 16)
		if err != nil {
			return nil, fmt.Errorf("invalid port %q: %w", text, err)
		}
		want = append(want, uint32(port))
	}
	return func(fl *flow.Flow) bool {
		p := portsOf(fl.GetL4())
		return p != nil && slices.Contains(want, of(p))
	}, nil
}

func layer4Fields() []field {
	return []field{
		{"protocol", []string{"l4", "l7"}, compileProtocols},
		{"tcp_flags", []string{"l4"}, compileTCPFlags},
		{"ip_version", []string{"IP.ipVersion"}, listed((*flow.FlowFilter).GetIpVersion,
			func(fl *flow.Flow) (flow.IPVersion, bool) { return fl.GetIP().GetIpVersion(), true })},
		{"encrypted", []string{"IP.encrypted"}, listed((*flow.FlowFilter).GetEncrypted,
			func(fl *flow.Flow) (bool, bool) { return fl.GetIP().GetEncrypted(), true })},
	}
}

// protocols are the values of the protocol filter.
func protocols() map[string]func(*flow.Flow) bool {
	return map[string]func(*flow.Flow) bool{
		"icmp":   func(fl *flow.Flow) bool { return fl.GetL4().GetICMPv4() != nil || fl.GetL4().GetICMPv6() != nil },
		"icmpv4": func(fl *flow.Flow) bool { return fl.GetL4().GetICMPv4() != nil },
		"icmpv6": func(fl *flow.Flow) bool { return fl.GetL4().GetICMPv6() != nil },
		"tcp":    func(fl *flow.Flow) bool { return fl.GetL4().GetTCP() != nil },
		"udp":    func(fl *flow.Flow) bool { return fl.GetL4().GetUDP() != nil },
		"sctp":   func(fl *flow.Flow) bool { return fl.GetL4().GetSCTP() != nil },
		"vrrp":   func(fl *flow.Flow) bool { return fl.GetL4().GetVRRP() != nil },
		"igmp":   func(fl *flow.Flow) bool { return fl.GetL4().GetIGMP() != nil },
		"dns":    func(fl *flow.Flow) bool { return fl.GetL7().GetDns() != nil },
		"http":   func(fl *flow.Flow) bool { return fl.GetL7().GetHttp() != nil },
		"kafka":  func(fl *flow.Flow) bool { return fl.GetL7().GetKafka() != nil },
	}
}

func compileProtocols(f *flow.FlowFilter) (Match, error) {
	if len(f.GetProtocol()) == 0 {
		return nil, nil
	}
	table := protocols()
	var want []func(*flow.Flow) bool
	for _, name := range f.GetProtocol() {
		is, ok := table[strings.ToLower(name)]
		if !ok {
			return nil, fmt.Errorf("invalid protocol filter: unknown protocol: %q", name)
		}
		want = append(want, is)
	}
	return func(fl *flow.Flow) bool {
		for _, is := range want {
			if is(fl) {
				return true
			}
		}
		return false
	}, nil
}

func flagBits(f *flow.TCPFlags) (bits uint16) {
	for i, set := range []bool{f.GetFIN(), f.GetSYN(), f.GetRST(), f.GetPSH(), f.GetACK(), f.GetURG(), f.GetECE(), f.GetCWR(), f.GetNS()} {
		if set {
			bits |= 1 << i
		}
	}
	return bits
}

func compileTCPFlags(f *flow.FlowFilter) (Match, error) {
	if len(f.GetTcpFlags()) == 0 {
		return nil, nil
	}
	var want []uint16
	for _, flags := range f.GetTcpFlags() {
		want = append(want, flagBits(flags))
	}
	return func(fl *flow.Flow) bool {
		flags := fl.GetL4().GetTCP().GetFlags()
		if flags == nil {
			return false
		}
		has := flagBits(flags)
		return slices.ContainsFunc(want, func(w uint16) bool { return has&w == w })
	}, nil
}
