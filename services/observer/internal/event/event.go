// SPDX-License-Identifier: Apache-2.0

// Package event holds what flows through the observer: records of batches, still encoded, and gaps.
package event

import (
	"github.com/weirmesh/weir/internal/batch"

	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
)

// Source is a batch as it was read from the stream. It is not changed once events refer to it,
// except Live, which belongs to the store.
type Source struct {
	*batch.Batch
	// StreamSeq is the batch's place in JetStream.
	StreamSeq uint64
	// Arrival is when JetStream stored it, Unix nanoseconds by the clock of the NATS server.
	Arrival int64
	// NodeName is cluster/node.
	NodeName string
	// Live counts the events in the store that refer to it.
	Live int
}

// NewSource wraps a batch.
func NewSource(b *batch.Batch, streamSeq uint64, arrival int64) *Source {
	return &Source{Batch: b, StreamSeq: streamSeq, Arrival: arrival, NodeName: NodeName(b.Cluster, b.Node)}
}

// NodeName returns cluster/node, Hubble's name of a node.
func NodeName(cluster, node string) string { return cluster + "/" + node }

// Gap says that records are missing, or, Withdrawn, that they came after all.
type Gap struct {
	NodeName string
	Place    flowv1.Place
	Cause    flowv1.Cause
	// CPU is the kernel ring's CPU; -1 = not a ring.
	CPU int32
	// Epoch and range of numbers; First 0 = they never had numbers.
	Epoch, First, Last uint64
	Count              uint64
	// FirstTime and LastTime bound when the lost records would have been; 0 = unknown.
	FirstTime, LastTime int64
	Withdrawn           bool
	// StreamSeq is the message whose reading told of it.
	StreamSeq uint64
}

// Event is one record of a batch, or a gap.
type Event struct {
	Source *Source
	Gap    *Gap
	Index  int32
}

// Time returns the record's time, or when the gap was first felt; Unix nanoseconds.
func (e Event) Time() int64 {
	if e.Gap != nil {
		return e.Gap.FirstTime
	}
	return e.Source.Time(int(e.Index))
}

// StreamSeq returns the event's place in JetStream.
func (e Event) StreamSeq() uint64 {
	if e.Gap != nil {
		return e.Gap.StreamSeq
	}
	return e.Source.StreamSeq
}
