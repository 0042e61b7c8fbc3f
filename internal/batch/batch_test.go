// SPDX-License-Identifier: Apache-2.0

package batch

import (
	"bytes"
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/s2"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
)

func sample() *flowv1.Batch {
	return &flowv1.Batch{
		Header: &flowv1.BatchHeader{
			Node: "node-1", Epoch: 7, First: 11, Count: 4, MinTime: 100, MaxTime: 400,
			Namespaces: []string{"", "prod"}, Verdicts: 6, EventTypes: 1<<4 | 1<<31, Cluster: "blue",
		},
		Records: []*flowv1.Record{
			{Time: 100, Item: &flowv1.Record_Flow{Flow: []byte("flow one")}, Stats: []byte("stats")},
			{Time: 300, Item: &flowv1.Record_AgentEvent{AgentEvent: []byte("event")}},
			{Time: 200, Item: &flowv1.Record_Loss{Loss: &flowv1.Loss{Count: 3}}},
			{Item: &flowv1.Record_Flow{Flow: []byte{}}},
		},
	}
}

func encode(t testing.TB, b *flowv1.Batch) []byte {
	t.Helper()
	data, err := proto.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestParse(t *testing.T) {
	want := sample()
	b, err := Parse(encode(t, want))
	if err != nil {
		t.Fatal(err)
	}
	header := Header{Node: "node-1", Cluster: "blue", Epoch: 7, First: 11, Count: 4, MinTime: 100, MaxTime: 400,
		Namespaces: []string{"", "prod"}, Verdicts: 6, EventTypes: 1<<4 | 1<<31}
	if diff := cmp.Diff(header, b.Header); diff != "" {
		t.Errorf("header (-want +got):\n%s", diff)
	}
	if b.Len() != 4 || b.Last() != 14 || b.ID() != "node-1/7/11" || b.Ordered() {
		t.Errorf("len %d, last %d, id %s, ordered %t", b.Len(), b.Last(), b.ID(), b.Ordered())
	}
	loss, err := proto.Marshal(want.GetRecords()[2].GetLoss())
	if err != nil {
		t.Fatal(err)
	}
	for i, w := range []struct {
		time  int64
		kind  Kind
		item  []byte
		stats string
	}{
		{100, Flow, []byte("flow one"), "stats"},
		{300, AgentEvent, []byte("event"), ""},
		{200, Loss, loss, ""},
		{400, Flow, nil, ""}, // a record without time counts as the latest
	} {
		if b.Time(i) != w.time || b.Kind(i) != w.kind || !bytes.Equal(b.Item(i), w.item) || string(b.Stats(i)) != w.stats {
			t.Errorf("record %d = %d %d %q %q, want %v", i, b.Time(i), b.Kind(i), b.Item(i), b.Stats(i), w)
		}
	}
	single := b.Extract(0)
	if single.Len() != 1 || single.First != 11 || string(single.Item(0)) != "flow one" || string(single.Stats(0)) != "stats" || single.Time(0) != 100 {
		t.Errorf("extract = %+v", single)
	}
	if single = b.Extract(1); single.First != 12 || string(single.Item(0)) != "event" || len(single.Stats(0)) != 0 {
		t.Errorf("extract = %+v", single)
	}
}

func TestDefaultCluster(t *testing.T) {
	b := sample()
	b.Header.Cluster = ""
	h, err := Check(encode(t, b))
	if err != nil || h.Cluster != "default" {
		t.Errorf("cluster %q, %v", h.Cluster, err)
	}
}

// TestTimesOfRecords: readers skip batches by the header's times, so a header that lies is corrected.
func TestTimesOfRecords(t *testing.T) {
	b := sample()
	b.Header.MinTime, b.Header.MaxTime = 250, 260
	got, err := Parse(encode(t, b))
	if err != nil || got.MinTime != 100 || got.MaxTime != 300 {
		t.Errorf("times %d..%d, %v; want 100..300", got.MinTime, got.MaxTime, err)
	}
}

func TestRefused(t *testing.T) {
	change := func(f func(*flowv1.Batch)) []byte {
		b := sample()
		f(b)
		return encode(t, b)
	}
	good := encode(t, sample())
	headerLess := encode(t, &flowv1.Batch{Records: sample().Records})
	extra := protowire.AppendVarint(protowire.AppendTag(bytes.Clone(good), 9, protowire.VarintType), 1)
	tests := []struct {
		name string
		data []byte
		want string
	}{
		{"empty", nil, "does not begin with its header"},
		{"no header", headerLess, "does not begin with its header"},
		{"cut in the header", good[:10], "batch header"},
		{"cut in a record", good[:len(good)-3], "batch"},
		{"unknown field", extra, "field 9 where records are"},
		{"no node", change(func(b *flowv1.Batch) { b.Header.Node = "" }), "node is empty"},
		{"long node", change(func(b *flowv1.Batch) { b.Header.Node = strings.Repeat("a", 254) }), "too long"},
		{"no count", change(func(b *flowv1.Batch) { b.Header.Count = 0 }), "count is 0"},
		{"large count", change(func(b *flowv1.Batch) { b.Header.Count = MaxRecords + 1 }), "more than"},
		{"count above", change(func(b *flowv1.Batch) { b.Header.Count = 5 }), "4 records"},
		{"count below", change(func(b *flowv1.Batch) { b.Header.Count = 3 }), "records"},
		{"no first", change(func(b *flowv1.Batch) { b.Header.First = 0 }), "first is 0"},
		{"large first", change(func(b *flowv1.Batch) { b.Header.First = math.MaxUint64 - 1 }), "too large"},
		{"times", change(func(b *flowv1.Batch) { b.Header.MinTime = 500 }), "min_time is after"},
		{"large header", change(func(b *flowv1.Batch) { b.Header.Namespaces = []string{strings.Repeat("a", maxHeader)} }), "more than"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := Check(tt.data); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Check: %v, want %q in it", err, tt.want)
			}
			if _, err := Parse(tt.data); err == nil {
				t.Error("Parse takes it")
			}
		})
	}
	large := change(func(b *flowv1.Batch) { b.Records[0].Stats = make([]byte, MaxBytes) })
	if _, err := Check(large); err == nil {
		t.Error("a batch that is too large for the bus is taken")
	}
	itemless := change(func(b *flowv1.Batch) { b.Records[1].Item = nil })
	if _, err := Parse(itemless); err == nil || !strings.Contains(err.Error(), "record 1: it has no item") {
		t.Errorf("a record without an item: %v", err)
	}
}

// TestFieldNumbers compares our numbers with the descriptors.
func TestFieldNumbers(t *testing.T) {
	for _, tt := range []struct {
		message proto.Message
		fields  map[protoreflect.Name]protowire.Number
	}{
		{&flowv1.Batch{}, map[protoreflect.Name]protowire.Number{
			"header": fieldHeader, "records": fieldRecords, "compressed_records": fieldPacked}},
		{&flowv1.BatchHeader{}, map[protoreflect.Name]protowire.Number{
			"node": fieldNode, "epoch": fieldEpoch, "first": fieldFirst, "count": fieldCount, "min_time": fieldMinTime, "max_time": fieldMaxTime,
			"namespaces": fieldNamespaces, "verdicts": fieldVerdicts, "event_types": fieldEventTypes, "cluster": fieldCluster}},
		{&flowv1.Record{}, map[protoreflect.Name]protowire.Number{
			"time": fieldTime, "flow": fieldFlow, "agent_event": fieldAgentEvent, "loss": fieldLoss, "stats": fieldStats}},
	} {
		fields := tt.message.ProtoReflect().Descriptor().Fields()
		if fields.Len() != len(tt.fields) {
			t.Errorf("%T has %d fields, we know %d", tt.message, fields.Len(), len(tt.fields))
		}
		for name, number := range tt.fields {
			if got := fields.ByName(name); got == nil || got.Number() != number {
				t.Errorf("%T.%s is not %d", tt.message, name, number)
			}
		}
	}
}

// FuzzHeader: whatever comes, the header is refused or within its bounds, as the library reads it.
func FuzzHeader(f *testing.F) {
	f.Add(encode(f, sample()))
	f.Add([]byte{0x0a, 0x00})
	f.Fuzz(func(t *testing.T, data []byte) {
		h, rest, err := ParseHeader(data)
		if err != nil {
			return
		}
		if h.Count == 0 || h.Count > MaxRecords || h.First == 0 || h.Last() < h.First || h.Node == "" || h.Cluster == "" {
			t.Fatalf("header out of bounds: %+v", h)
		}
		var want flowv1.Batch
		if proto.Unmarshal(data[:len(data)-len(rest)], &want) != nil {
			return // the library looks further into the header's unknown parts
		}
		w := want.GetHeader()
		if w.GetNode() != h.Node || w.GetEpoch() != h.Epoch || w.GetFirst() != h.First || w.GetMinTime() != h.MinTime || w.GetMaxTime() != h.MaxTime ||
			!cmp.Equal(append([]string(nil), w.GetNamespaces()...), h.Namespaces) {
			t.Fatalf("header %+v, the library reads %v", h, w)
		}
	})
}

// FuzzParse: whatever comes, every record lies within the bytes, as the library reads it.
func FuzzParse(f *testing.F) {
	f.Add(encode(f, sample()))
	one := sample()
	one.Header.Count, one.Records = 1, one.Records[:1]
	f.Add(encode(f, one))
	f.Add(pack(f, large(f)))
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := Parse(bytes.Clone(data))
		if err != nil {
			return
		}
		if _, err := Check(data); err != nil && len(data) <= MaxBytes {
			t.Fatalf("Parse takes what Check refuses: %v", err)
		}
		var want flowv1.Batch
		err = proto.Unmarshal(data, &want)
		if block := want.GetCompressedRecords(); len(block) > 0 && err == nil {
			records, err1 := s2.Decode(nil, block)
			if err1 != nil {
				t.Fatalf("the library does not decode it: %v", err1)
			}
			err = proto.UnmarshalOptions{Merge: true}.Unmarshal(records, &want)
		}
		for i := range b.Len() {
			item, stats := b.Item(i), b.Stats(i)
			if err != nil {
				continue // such as a broken Loss, which we do not look into
			}
			r := want.GetRecords()[i]
			switch b.Kind(i) {
			case Flow:
				if !bytes.Equal(item, r.GetFlow()) {
					t.Fatalf("record %d: %q, the library reads %q", i, item, r.GetFlow())
				}
			case AgentEvent:
				if !bytes.Equal(item, r.GetAgentEvent()) {
					t.Fatalf("record %d: %q, the library reads %q", i, item, r.GetAgentEvent())
				}
			case Loss:
				if r.GetLoss() == nil {
					t.Fatalf("record %d: the library reads no loss", i)
				}
			default:
				t.Fatalf("record %d: kind %d", i, b.Kind(i))
			}
			if !bytes.Equal(stats, r.GetStats()) {
				t.Fatalf("record %d: stats %q, the library reads %q", i, stats, r.GetStats())
			}
		}
	})
}

func BenchmarkCheck(b *testing.B) {
	data := large(b)
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		if _, err := Check(data); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkParse(b *testing.B) {
	data := large(b)
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Parse(data); err != nil {
			b.Fatal(err)
		}
	}
}

// large is a batch of 512 records of the size of a flow.
func large(t testing.TB) []byte {
	b := &flowv1.Batch{Header: &flowv1.BatchHeader{Node: "node-1", Epoch: 1, First: 1, Count: 512, MinTime: 1, MaxTime: 512, Namespaces: []string{"default", "prod"}}}
	for i := range 512 {
		b.Records = append(b.Records, &flowv1.Record{Time: int64(i + 1), Item: &flowv1.Record_Flow{Flow: make([]byte, 600)}, Stats: make([]byte, 60)})
	}
	return encode(t, b)
}
