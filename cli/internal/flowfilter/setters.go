// SPDX-License-Identifier: Apache-2.0

package flowfilter

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/weirmesh/weir/cli/internal/eventname"
	"github.com/weirmesh/weir/gen/flow"
)

// setter applies the value of one flag to a list.
type setter func(l *list, value string) error

// setters has a row for each filter flag.
var setters = map[string]setter{
	"pod":           either(sourcePod, destinationPod),
	"from-pod":      both(sourcePod),
	"to-pod":        both(destinationPod),
	"service":       either(sourceService, destinationService),
	"from-service":  both(sourceService),
	"to-service":    both(destinationService),
	"label":         either(sourceLabel, destinationLabel),
	"from-label":    both(sourceLabel),
	"to-label":      both(destinationLabel),
	"ip":            either(sourceIP, destinationIP),
	"from-ip":       both(sourceIP),
	"to-ip":         both(destinationIP),
	"fqdn":          either(sourceFQDN, destinationFQDN),
	"from-fqdn":     both(sourceFQDN),
	"to-fqdn":       both(destinationFQDN),
	"port":          either(sourcePort, destinationPort),
	"from-port":     both(sourcePort),
	"to-port":       both(destinationPort),
	"cluster":       either(sourceCluster, destinationCluster),
	"from-cluster":  both(sourceCluster),
	"to-cluster":    both(destinationCluster),
	"workload":      either(sourceWorkload, destinationWorkload),
	"from-workload": both(sourceWorkload),
	"to-workload":   both(destinationWorkload),
	"identity":      either(sourceIdentity, destinationIdentity),
	"from-identity": both(sourceIdentity),
	"to-identity":   both(destinationIdentity),

	"namespace":           func(l *list, v string) error { l.either = append(l.either, v); return nil },
	"from-namespace":      func(l *list, v string) error { l.source = append(l.source, v); return nil },
	"to-namespace":        func(l *list, v string) error { l.destination = append(l.destination, v); return nil },
	"all-namespaces":      bare(func(l *list) { l.either = append(l.either, "") }),
	"from-all-namespaces": bare(func(l *list) { l.source = append(l.source, "") }),
	"to-all-namespaces":   bare(func(l *list) { l.destination = append(l.destination, "") }),

	"snat-ip":        both(func(f *flow.FlowFilter, v string) error { f.SourceIpXlated = append(f.SourceIpXlated, v); return nil }),
	"protocol":       both(func(f *flow.FlowFilter, v string) error { f.Protocol = append(f.Protocol, v); return nil }),
	"http-status":    both(func(f *flow.FlowFilter, v string) error { f.HttpStatusCode = append(f.HttpStatusCode, v); return nil }),
	"http-method":    both(func(f *flow.FlowFilter, v string) error { f.HttpMethod = append(f.HttpMethod, v); return nil }),
	"http-path":      both(func(f *flow.FlowFilter, v string) error { f.HttpPath = append(f.HttpPath, v); return nil }),
	"http-url":       both(func(f *flow.FlowFilter, v string) error { f.HttpUrl = append(f.HttpUrl, v); return nil }),
	"http-header":    both(httpHeader),
	"trace-id":       both(func(f *flow.FlowFilter, v string) error { f.TraceId = append(f.TraceId, v); return nil }),
	"ip-trace-id":    both(ipTraceID),
	"uuid":           both(func(f *flow.FlowFilter, v string) error { f.Uuid = append(f.Uuid, v); return nil }),
	"node-name":      both(func(f *flow.FlowFilter, v string) error { f.NodeName = append(f.NodeName, v); return nil }),
	"node-label":     both(func(f *flow.FlowFilter, v string) error { f.NodeLabels = append(f.NodeLabels, v); return nil }),
	"interface":      both(networkInterface),
	"cel-expression": both(celExpression),

	"ip-version": both(ipVersion),
	"ipv4": both(func(f *flow.FlowFilter, _ string) error {
		f.IpVersion = append(f.IpVersion, flow.IPVersion_IPv4)
		return nil
	}),
	"ipv6": both(func(f *flow.FlowFilter, _ string) error {
		f.IpVersion = append(f.IpVersion, flow.IPVersion_IPv6)
		return nil
	}),
	"tcp-flags":         both(tcpFlags),
	"type":              both(eventType),
	"verdict":           both(verdict),
	"drop-reason-desc":  both(dropReason),
	"traffic-direction": both(trafficDirection),
	"encrypted":         bare(func(l *list) { l.both(func(f *flow.FlowFilter) { f.Encrypted = append(f.Encrypted, true) }) }),
	"unencrypted":       bare(func(l *list) { l.both(func(f *flow.FlowFilter) { f.Encrypted = append(f.Encrypted, false) }) }),
}

// field appends a value to one field of a filter.
type field func(f *flow.FlowFilter, value string) error

// both is a flag that means the same in left and right.
func both(set field) setter { return either(set, set) }

// either is a flag for either side: the source in left, the destination in right.
func either(left, right field) setter {
	return func(l *list, value string) error {
		if err := left(l.left, value); err != nil {
			return err
		}
		return right(l.right, value)
	}
}

// bare is a flag without value.
func bare(set func(*list)) setter {
	return func(l *list, value string) error {
		if value != "true" {
			return errors.New("this filter takes no value; --not in front of it negates")
		}
		set(l)
		return nil
	}
}

func sourcePod(f *flow.FlowFilter, v string) error { f.SourcePod = append(f.SourcePod, v); return nil }
func destinationPod(f *flow.FlowFilter, v string) error {
	f.DestinationPod = append(f.DestinationPod, v)
	return nil
}

func sourceService(f *flow.FlowFilter, v string) error {
	f.SourceService = append(f.SourceService, v)
	return nil
}

func destinationService(f *flow.FlowFilter, v string) error {
	f.DestinationService = append(f.DestinationService, v)
	return nil
}

func sourceLabel(f *flow.FlowFilter, v string) error {
	f.SourceLabel = append(f.SourceLabel, v)
	return nil
}

func destinationLabel(f *flow.FlowFilter, v string) error {
	f.DestinationLabel = append(f.DestinationLabel, v)
	return nil
}

func sourceIP(f *flow.FlowFilter, v string) error { f.SourceIp = append(f.SourceIp, v); return nil }
func destinationIP(f *flow.FlowFilter, v string) error {
	f.DestinationIp = append(f.DestinationIp, v)
	return nil
}

func sourceFQDN(f *flow.FlowFilter, v string) error {
	f.SourceFqdn = append(f.SourceFqdn, v)
	return nil
}

func destinationFQDN(f *flow.FlowFilter, v string) error {
	f.DestinationFqdn = append(f.DestinationFqdn, v)
	return nil
}

func sourcePort(f *flow.FlowFilter, v string) error {
	f.SourcePort = append(f.SourcePort, v)
	return nil
}

func destinationPort(f *flow.FlowFilter, v string) error {
	f.DestinationPort = append(f.DestinationPort, v)
	return nil
}

func sourceCluster(f *flow.FlowFilter, v string) error {
	f.SourceClusterName = append(f.SourceClusterName, v)
	return nil
}

func destinationCluster(f *flow.FlowFilter, v string) error {
	f.DestinationClusterName = append(f.DestinationClusterName, v)
	return nil
}

func sourceWorkload(f *flow.FlowFilter, v string) error {
	f.SourceWorkload = append(f.SourceWorkload, workload(v))
	return nil
}

func destinationWorkload(f *flow.FlowFilter, v string) error {
	f.DestinationWorkload = append(f.DestinationWorkload, workload(v))
	return nil
}

// workload reads "name", "Kind/name" or "Kind/".
func workload(s string) *flow.Workload {
	kind, name, ok := strings.Cut(s, "/")
	if !ok {
		return &flow.Workload{Name: s}
	}
	return &flow.Workload{Kind: kind, Name: name}
}

func sourceIdentity(f *flow.FlowFilter, v string) error {
	n, err := eventname.ParseIdentity(v)
	f.SourceIdentity = append(f.SourceIdentity, n)
	return err
}

func destinationIdentity(f *flow.FlowFilter, v string) error {
	n, err := eventname.ParseIdentity(v)
	f.DestinationIdentity = append(f.DestinationIdentity, n)
	return err
}

func httpHeader(f *flow.FlowFilter, v string) error {
	key, value, ok := strings.Cut(v, ":")
	if !ok {
		return fmt.Errorf("invalid http-header value %q, expected name:value", v)
	}
	f.HttpHeader = append(f.HttpHeader, &flow.HTTPHeader{Key: key, Value: value})
	return nil
}

func ipTraceID(f *flow.FlowFilter, v string) error {
	n, err := strconv.ParseUint(v, 10, 64)
	if err != nil {
		return fmt.Errorf("invalid --ip-trace-id value: %w", err)
	}
	if n == 0 {
		return errors.New("invalid --ip-trace-id value; must be greater than 0")
	}
	f.IpTraceId = append(f.IpTraceId, n)
	return nil
}

func networkInterface(f *flow.FlowFilter, v string) error {
	f.Interface = append(f.Interface, &flow.NetworkInterface{Name: v})
	return nil
}

func celExpression(f *flow.FlowFilter, v string) error {
	if f.Experimental == nil {
		f.Experimental = &flow.FlowFilter_Experimental{}
	}
	f.Experimental.CelExpression = append(f.Experimental.CelExpression, v)
	return nil
}

func ipVersion(f *flow.FlowFilter, v string) error {
	version := flow.IPVersion_IP_NOT_USED
	switch strings.ToLower(v) {
	case "4", "v4", "ip4", "ipv4":
		version = flow.IPVersion_IPv4
	case "6", "v6", "ip6", "ipv6":
		version = flow.IPVersion_IPv6
	}
	f.IpVersion = append(f.IpVersion, version)
	return nil
}

func tcpFlags(f *flow.FlowFilter, v string) error {
	set := &flow.TCPFlags{}
	bits := map[string]*bool{
		"SYN": &set.SYN, "ACK": &set.ACK, "RST": &set.RST, "FIN": &set.FIN, "PSH": &set.PSH,
		"URG": &set.URG, "ECE": &set.ECE, "CWR": &set.CWR, "NS": &set.NS,
	}
	for name := range strings.SplitSeq(v, ",") {
		bit, ok := bits[strings.ToUpper(strings.TrimSpace(name))]
		if !ok {
			return fmt.Errorf("unknown tcp flag: %s", name)
		}
		*bit = true
	}
	f.TcpFlags = append(f.TcpFlags, set)
	return nil
}

func eventType(f *flow.FlowFilter, v string) error {
	name, sub, hasSub := strings.Cut(v, ":")
	filter := &flow.EventTypeFilter{}
	typ, named := eventname.TypeNumber(name)
	if !named {
		n, err := strconv.ParseUint(name, 10, 31)
		if err != nil {
			return fmt.Errorf("unable to parse type '%s', not a known type name and unable to parse as numeric value: %w", name, err)
		}
		typ = int32(n)
	}
	filter.Type = typ
	if hasSub {
		n, ok := eventname.SubtypeNumber(typ, sub)
		if !ok {
			u, err := strconv.ParseUint(sub, 10, 31)
			if err != nil {
				return fmt.Errorf("unable to parse event sub-type '%s', not a known sub-type name and unable to parse as numeric value: %w", sub, err)
			}
			n = int32(u)
		}
		filter.MatchSubType, filter.SubType = true, n
	}
	f.EventType = append(f.EventType, filter)
	return nil
}

func verdict(f *flow.FlowFilter, v string) error {
	n, ok := flow.Verdict_value[strings.ToUpper(v)]
	if !ok {
		return fmt.Errorf("invalid --verdict value: %v", v)
	}
	f.Verdict = append(f.Verdict, flow.Verdict(n))
	return nil
}

func dropReason(f *flow.FlowFilter, v string) error {
	if v == "" {
		return errors.New("empty --drop-reason-desc value")
	}
	reason, ok := eventname.DropReason(v)
	if !ok {
		return fmt.Errorf("invalid --drop-reason-desc value: %v", v)
	}
	f.DropReasonDesc = append(f.DropReasonDesc, reason)
	return nil
}

func trafficDirection(f *flow.FlowFilter, v string) error {
	switch strings.ToLower(v) {
	case "ingress":
		f.TrafficDirection = append(f.TrafficDirection, flow.TrafficDirection_INGRESS)
	case "egress":
		f.TrafficDirection = append(f.TrafficDirection, flow.TrafficDirection_EGRESS)
	default:
		return fmt.Errorf("%s: invalid traffic direction, expected ingress or egress", strings.ToLower(v))
	}
	return nil
}
