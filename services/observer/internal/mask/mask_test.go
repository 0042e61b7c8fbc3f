// SPDX-License-Identifier: Apache-2.0

package mask

import (
	"errors"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/services/observer/internal/testflow"
)

// stock is what the stock command line sends.
var stock = strings.Fields(`time verdict ethernet IP l4 source.identity source.namespace source.pod_name destination.identity
	destination.namespace destination.pod_name Type node_name l7 event_type source_service destination_service is_reply Summary ip_trace_id`)

// slow is the oracle: decode, copy by reflection, as Hubble does it.
func slow(paths []string, f *flow.Flow) *flow.Flow {
	type tree map[string]tree
	root := tree{}
	for _, path := range paths {
		at := root
		names := strings.Split(path, ".")
		for i, name := range names {
			if sub, ok := at[name]; ok && sub == nil {
				break // a parent is kept whole
			}
			if i == len(names)-1 {
				at[name] = nil
				break
			}
			if at[name] == nil {
				at[name] = tree{}
			}
			at = at[name]
		}
	}
	var copyTree func(dst, src protoreflect.Message, t tree)
	copyTree = func(dst, src protoreflect.Message, t tree) {
		for name, sub := range t {
			fd := dst.Descriptor().Fields().ByName(protoreflect.Name(name))
			if sub == nil {
				if src.Has(fd) {
					dst.Set(fd, src.Get(fd))
				}
				continue
			}
			copyTree(dst.Mutable(fd).Message(), src.Get(fd).Message(), sub)
		}
	}
	out := &flow.Flow{}
	copyTree(out.ProtoReflect(), f.ProtoReflect(), root)
	return out
}

func check(t *testing.T, paths []string, f *flow.Flow) {
	t.Helper()
	data, err := proto.Marshal(f)
	if err != nil {
		t.Fatal(err)
	}
	m, err := New(&fieldmaskpb.FieldMask{Paths: paths})
	if err != nil {
		t.Fatalf("%v: %v", paths, err)
	}
	var got flow.Flow
	if err := proto.Unmarshal(m.Append(nil, data), &got); err != nil {
		t.Fatalf("%v: %v", paths, err)
	}
	if diff := cmp.Diff(slow(paths, f), &got, protocmp.Transform()); diff != "" {
		t.Errorf("%v (-want +got):\n%s", paths, diff)
	}
}

func TestMask(t *testing.T) {
	full := testflow.Flow("node-1", 1, testflow.Base)
	full.L7 = &flow.Layer7{Type: flow.L7FlowType_REQUEST, LatencyNs: 5, Record: &flow.Layer7_Http{Http: &flow.HTTP{Url: strings.Repeat("x", 300)}}}
	long := testflow.Flow("node-1", 2, testflow.Base)
	long.Source.Namespace = strings.Repeat("n", 20000) // its length takes three bytes
	flows := map[string]*flow.Flow{"full": full, "empty": {}, "long": long, "negative": {Verdict: -1, Summary: "x"}}
	masks := map[string][]string{
		"stock":                stock,
		"one":                  {"uuid"},
		"nested":               {"source.pod_name"},
		"nested, absent":       {"tunnel.IP.source", "file.name"},
		"parent after child":   {"source.pod_name", "source"},
		"child after parent":   {"source", "source.pod_name"},
		"deep":                 {"l7.http.url", "l4.TCP.flags.SYN", "trace_context.parent.trace_id"},
		"high numbers":         {"Summary", "extensions", "egress_allowed_by"},
		"repeated":             {"source.labels", "source.workloads"},
		"part of the time":     {"time.seconds"},
		"wrapper":              {"is_reply.value"},
		"everything but a bit": {"time", "source.namespace", "destination", "l7.latency_ns"},
	}
	for name, f := range flows {
		for maskName, paths := range masks {
			t.Run(name+" "+maskName, func(t *testing.T) { check(t, paths, f) })
		}
	}
}

// TestRandom compares with the oracle for random masks.
func TestRandom(t *testing.T) {
	f := testflow.Flow("node-1", 1, testflow.Base)
	var all []string
	var walk func(prefix string, d protoreflect.MessageDescriptor, depth int)
	walk = func(prefix string, d protoreflect.MessageDescriptor, depth int) {
		for i := range d.Fields().Len() {
			fd := d.Fields().Get(i)
			path := prefix + string(fd.Name())
			// Of a oneof one mask may name only one: setting two leaves the one that came last.
			if fd.ContainingOneof() == nil || fd.Name() == "TCP" {
				all = append(all, path)
				if fd.Message() != nil && !fd.IsList() && depth < 3 {
					walk(path+".", fd.Message(), depth+1)
				}
			}
		}
	}
	walk("", f.ProtoReflect().Descriptor(), 0)
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 3))
		var paths []string
		for range r.IntN(12) + 1 {
			paths = append(paths, all[r.IntN(len(all))])
		}
		check(t, paths, f)
	}
}

func TestNew(t *testing.T) {
	if m, err := New(nil); m != nil || err != nil {
		t.Errorf("no mask: %v, %v", m, err)
	}
	if m, err := New(&fieldmaskpb.FieldMask{}); m != nil || err != nil {
		t.Errorf("empty mask: %v, %v", m, err)
	}
	for _, bad := range []string{"nope", "source.nope", "source.", "", "uuid.x", "source.workloads.name", "source.labels.x"} {
		if _, err := New(&fieldmaskpb.FieldMask{Paths: []string{"time", bad}}); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestKeeps(t *testing.T) {
	m := Paths("time.seconds", "node_name")
	for _, tt := range []struct {
		path []string
		want bool
	}{
		{[]string{"node_name"}, true}, {[]string{"uuid"}, false}, {[]string{"time", "seconds"}, true},
		{[]string{"time", "nanos"}, false}, {[]string{"time"}, false},
	} {
		if got := m.Keeps(tt.path...); got != tt.want {
			t.Errorf("keeps %v = %t", tt.path, got)
		}
	}
	if !(*Mask)(nil).Keeps("uuid") || !Paths("time").Keeps("time", "nanos") {
		t.Error("a whole field is not kept")
	}
}

// FuzzAppend: broken flows do no harm, and whole ones agree with the oracle.
func FuzzAppend(f *testing.F) {
	data, err := proto.Marshal(testflow.Flow("node-1", 1, testflow.Base))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	m := Paths(stock...)
	f.Fuzz(func(t *testing.T, data []byte) {
		out := m.Append(nil, data)
		var in, got flow.Flow
		if proto.Unmarshal(data, &in) != nil {
			return
		}
		if err := proto.Unmarshal(out, &got); err != nil {
			t.Fatalf("a good flow became bad: %v", err)
		}
		discard(in.ProtoReflect())
		discard(got.ProtoReflect())
		if want := slow(stock, &in); !proto.Equal(want, &got) {
			t.Fatalf("want %v\ngot  %v", want, &got)
		}
	})
}

// discard removes unknown fields, which the oracle does not copy within a part.
func discard(m protoreflect.Message) {
	m.SetUnknown(nil)
	m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case fd.Message() == nil:
		case fd.IsList():
			for i := range v.List().Len() {
				discard(v.List().Get(i).Message())
			}
		default:
			discard(v.Message())
		}
		return true
	})
}

func BenchmarkMask(b *testing.B) {
	data, err := proto.Marshal(testflow.Flow("node-1", 1, time.Now()))
	if err != nil {
		b.Fatal(err)
	}
	m := Paths(stock...)
	var buf []byte
	b.Run("wire", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			buf = m.Append(buf[:0], data)
		}
	})
	b.Run("library", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			var f flow.Flow
			if err := proto.Unmarshal(data, &f); err != nil {
				b.Fatal(err)
			}
			if buf, err = (proto.MarshalOptions{}).MarshalAppend(buf[:0], slow(stock, &f)); err != nil {
				b.Fatal(err)
			}
		}
	})
}
