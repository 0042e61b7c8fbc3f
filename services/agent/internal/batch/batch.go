// SPDX-License-Identifier: Apache-2.0

// Package batch numbers an agent's records and seals them into batches: encoded once, one node, one epoch, consecutive numbers, never
// changed afterwards.
package batch

import (
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	wire "github.com/weirmesh/weir/internal/batch"
)

// Limits of a batch: whichever is reached first makes it full.
const (
	// MaxRecords keeps a batch's delay small at high rates and its header cheap at low ones.
	MaxRecords = 512
	// MaxBytes keeps a batch well below NATS's largest message (1 MiB).
	MaxBytes = 448 << 10
	// maxNamespaces bounds the header; more are left to the next batch.
	maxNamespaces = 256
)

// Sealed is a finished batch.
type Sealed struct {
	Epoch, First uint64
	Count        uint32
	// Earliest and latest record, Unix nanoseconds.
	MinTime, MaxTime int64
	// Encoded weir.flow.v1.Batch. Nobody changes it.
	Bytes []byte
	// What the batch itself tells of losses: if the batch is dropped, this must be told again.
	Losses []*flowv1.Loss `json:"-"`
}

// Last is the number of the last record.
func (s *Sealed) Last() uint64 { return s.First + uint64(s.Count) - 1 }

// Meta is what a batch's header needs to know of a flow.
type Meta struct {
	SourceNamespace, DestinationNamespace string
	Verdict, EventType                    int32
}

// Sealer collects records. Not safe for concurrent use.
type Sealer struct {
	node, cluster string
	epoch, next   uint64

	records    []byte
	count      uint32
	min, max   int64
	namespaces []string
	lastSource string
	lastDest   string
	verdicts   uint32
	eventTypes uint32
	losses     []*flowv1.Loss
	packer     wire.Packer
}

// NewSealer begins an epoch with number 1.
func NewSealer(node, cluster string, epoch uint64) *Sealer {
	if cluster == "default" {
		cluster = "" // absent in the header
	}
	return &Sealer{node: node, cluster: cluster, epoch: epoch, next: 1, records: make([]byte, 0, MaxBytes)}
}

// Epoch is the epoch of all batches of this sealer.
func (s *Sealer) Epoch() uint64 { return s.epoch }

// Next is the number that follows the last sealed record.
func (s *Sealer) Next() uint64 { return s.next }

// Len counts the records since the last Seal.
func (s *Sealer) Len() int { return int(s.count) }

// Full says that Seal is due before the next record.
func (s *Sealer) Full() bool {
	return s.count >= MaxRecords || len(s.records) >= MaxBytes-16<<10 || len(s.namespaces) >= maxNamespaces
}

// AddFlow adds an encoded flow.Flow and its encoded FlowStats (nil = none). Both are copied.
func (s *Sealer) AddFlow(time int64, flow, stats []byte, m *Meta) {
	size := 1 + protowire.SizeVarint(uint64(time)) + 1 + protowire.SizeBytes(len(flow))
	if stats != nil {
		size += 1 + protowire.SizeBytes(len(stats))
	}
	b := append(s.records, tagRecords)
	b = protowire.AppendVarint(b, uint64(size))
	b = append(b, tagTime)
	b = protowire.AppendVarint(b, uint64(time))
	b = append(b, tagFlow)
	b = protowire.AppendBytes(b, flow)
	if stats != nil {
		b = append(b, tagStats)
		b = protowire.AppendBytes(b, stats)
	}
	s.records = b
	s.counted(time)
	if m.SourceNamespace != s.lastSource || s.count == 1 {
		s.lastSource = m.SourceNamespace
		s.addNamespace(m.SourceNamespace)
	}
	if m.DestinationNamespace != s.lastDest || s.count == 1 {
		s.lastDest = m.DestinationNamespace
		s.addNamespace(m.DestinationNamespace)
	}
	s.verdicts |= 1 << uint32(m.Verdict)
	if m.EventType < 31 {
		s.eventTypes |= 1 << uint32(m.EventType)
	} else {
		s.eventTypes |= 1 << 31
	}
}

// AddAgentEvent adds an encoded flow.AgentEvent.
func (s *Sealer) AddAgentEvent(time int64, event []byte) { s.addItem(time, tagAgentEvent, event) }

// AddLoss adds a loss.
func (s *Sealer) AddLoss(time int64, loss *flowv1.Loss) {
	b, err := proto.Marshal(loss)
	if err != nil {
		return // cannot happen: the message holds numbers alone
	}
	s.addItem(time, tagLoss, b)
	s.losses = append(s.losses, loss)
}

func (s *Sealer) addItem(time int64, tag byte, item []byte) {
	size := 1 + protowire.SizeVarint(uint64(time)) + 1 + protowire.SizeBytes(len(item))
	b := append(s.records, tagRecords)
	b = protowire.AppendVarint(b, uint64(size))
	b = append(b, tagTime)
	b = protowire.AppendVarint(b, uint64(time))
	b = append(b, tag)
	s.records = protowire.AppendBytes(b, item)
	s.counted(time)
	if s.count == 1 {
		// Forces the first flow to name its namespaces.
		s.lastSource, s.lastDest = "\x00", "\x00"
	}
}

func (s *Sealer) counted(time int64) {
	if s.count == 0 || time < s.min {
		s.min = time
	}
	if s.count == 0 || time > s.max {
		s.max = time
	}
	s.count++
}

func (s *Sealer) addNamespace(name string) {
	if i, found := slices.BinarySearch(s.namespaces, name); !found {
		s.namespaces = slices.Insert(s.namespaces, i, name)
	}
}

// Seal finishes the batch and begins the next; false when there is nothing to seal.
func (s *Sealer) Seal() (*Sealed, bool) {
	if s.count == 0 {
		return nil, false
	}
	b := s.packer.Append(protowire.AppendBytes([]byte{tagHeader}, s.header()), s.records)
	sealed := &Sealed{Epoch: s.epoch, First: s.next, Count: s.count, MinTime: s.min, MaxTime: s.max, Bytes: b, Losses: s.losses}
	s.next += uint64(s.count)
	s.records, s.count, s.namespaces, s.losses = s.records[:0], 0, s.namespaces[:0], nil
	s.verdicts, s.eventTypes = 0, 0
	return sealed, true
}

// Tags of one byte: field number << 3 | wire type (2 = bytes, 0 = varint).
const (
	tagHeader  = 1<<3 | 2
	tagRecords = 2<<3 | 2

	tagTime       = 1 << 3
	tagFlow       = 2<<3 | 2
	tagAgentEvent = 3<<3 | 2
	tagLoss       = 4<<3 | 2
	tagStats      = 5<<3 | 2
)

func (s *Sealer) header() []byte {
	h := &flowv1.BatchHeader{
		Node: s.node, Epoch: s.epoch, First: s.next, Count: s.count, MinTime: s.min, MaxTime: s.max,
		Namespaces: s.namespaces, Verdicts: s.verdicts, EventTypes: s.eventTypes, Cluster: s.cluster,
	}
	b, err := proto.Marshal(h)
	if err != nil {
		return nil // cannot happen: names are checked to be UTF-8 where they come in
	}
	return b
}
