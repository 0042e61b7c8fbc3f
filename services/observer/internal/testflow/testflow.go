// SPDX-License-Identifier: Apache-2.0

// Package testflow makes flows and batches for tests and benchmarks: what an agent would seal.
package testflow

import (
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/weirmesh/weir/gen/flow"
	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
)

// Base is the time of the first record that Flow makes.
var Base = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// Flow returns a realistic flow; n tells it from others, and its uuid is "flow-<n>".
func Flow(node string, n int, at time.Time) *flow.Flow {
	reply := n%2 == 1
	f := &flow.Flow{
		Time:     timestamppb.New(at),
		Uuid:     fmt.Sprintf("flow-%d", n),
		Emitter:  &flow.Emitter{Name: "Weir", Version: "0.1.0"},
		Verdict:  flow.Verdict_FORWARDED,
		Ethernet: &flow.Ethernet{Source: "02:00:00:00:00:01", Destination: "02:00:00:00:00:02"},
		IP:       &flow.IP{Source: "10.244.1.5", Destination: "10.244.2.7", IpVersion: flow.IPVersion_IPv4},
		L4: &flow.Layer4{Protocol: &flow.Layer4_TCP{TCP: &flow.TCP{
			SourcePort: uint32(32768 + n%28000), DestinationPort: 8080, Flags: &flow.TCPFlags{ACK: true, PSH: true},
		}}},
		Source: &flow.Endpoint{
			ID: 11, Identity: 12345, ClusterName: "default", Namespace: "default", PodName: "client-6f9c4-abcde",
			Labels:    []string{"k8s:app=client", "k8s:io.cilium.k8s.policy.cluster=default", "k8s:io.kubernetes.pod.namespace=default"},
			Workloads: []*flow.Workload{{Name: "client", Kind: "Deployment"}},
		},
		Destination: &flow.Endpoint{
			Identity: 23456, ClusterName: "default", Namespace: "prod", PodName: "server-7d8f-vwxyz",
			Labels:    []string{"k8s:app=server", "k8s:io.cilium.k8s.policy.cluster=default", "k8s:io.kubernetes.pod.namespace=prod"},
			Workloads: []*flow.Workload{{Name: "server", Kind: "Deployment"}},
		},
		Type:                  flow.FlowType_L3_L4,
		NodeName:              "default/" + node,
		NodeLabels:            []string{"kubernetes.io/hostname=" + node},
		EventType:             &flow.CiliumEventType{Type: 4},
		TrafficDirection:      flow.TrafficDirection_EGRESS,
		TraceObservationPoint: flow.TraceObservationPoint_TO_ENDPOINT,
		TraceReason:           flow.TraceReason_ESTABLISHED,
		IsReply:               wrapperspb.Bool(reply),
		Interface:             &flow.NetworkInterface{Index: 7, Name: "wr0123456789"},
		Summary:               "TCP Flags: ACK, PSH",
	}
	if reply {
		f.Source, f.Destination = f.Destination, f.Source
	}
	return f
}

// Record returns a record of a flow, with statistics.
func Record(f *flow.Flow) *flowv1.Record {
	return &flowv1.Record{
		Time: f.GetTime().AsTime().UnixNano(),
		Item: &flowv1.Record_Flow{Flow: encode(f)},
		Stats: encode(&observerv1.FlowStats{
			Connection: 42, Forward: &observerv1.DirectionStats{Packets: 3, Bytes: 300}, Reverse: &observerv1.DirectionStats{Packets: 2, Bytes: 200},
		}),
	}
}

// LossRecord returns a record of a loss.
func LossRecord(at time.Time, l *flowv1.Loss) *flowv1.Record {
	return &flowv1.Record{Time: at.UnixNano(), Item: &flowv1.Record_Loss{Loss: l}}
}

// AgentEventRecord returns a record of an agent event.
func AgentEventRecord(at time.Time, e *flow.AgentEvent) *flowv1.Record {
	return &flowv1.Record{Time: at.UnixNano(), Item: &flowv1.Record_AgentEvent{AgentEvent: encode(e)}}
}

// Batch seals records.
func Batch(node string, epoch, first uint64, records ...*flowv1.Record) *flowv1.Batch {
	h := &flowv1.BatchHeader{Node: node, Epoch: epoch, First: first, Count: uint32(len(records))}
	for i, r := range records {
		if i == 0 || r.GetTime() < h.MinTime {
			h.MinTime = r.GetTime()
		}
		if i == 0 || r.GetTime() > h.MaxTime {
			h.MaxTime = r.GetTime()
		}
		var f flow.Flow
		if r.GetFlow() == nil {
			continue
		}
		if err := proto.Unmarshal(r.GetFlow(), &f); err != nil {
			continue // a test wants it broken
		}
		h.Verdicts |= 1 << f.GetVerdict()
		if t := f.GetEventType().GetType(); t == 129 {
			h.EventTypes |= 1 << 31
		} else {
			h.EventTypes |= 1 << t
		}
		for _, e := range []*flow.Endpoint{f.GetSource(), f.GetDestination()} {
			if !slices.Contains(h.Namespaces, e.GetNamespace()) {
				h.Namespaces = append(h.Namespaces, e.GetNamespace())
			}
		}
	}
	slices.Sort(h.Namespaces)
	return &flowv1.Batch{Header: h, Records: records}
}

// Flows seals count flows, a millisecond apart, that are numbered from first on.
func Flows(node string, epoch, first uint64, count int, at time.Time) *flowv1.Batch {
	var records []*flowv1.Record
	for i := range count {
		records = append(records, Record(Flow(node, int(first)+i, at.Add(time.Duration(i)*time.Millisecond))))
	}
	return Batch(node, epoch, first, records...)
}

// Encode returns the bytes of a batch.
func Encode(b *flowv1.Batch) []byte { return encode(b) }

func encode(m proto.Message) []byte {
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic(err) // a message that we made
	}
	return data
}
