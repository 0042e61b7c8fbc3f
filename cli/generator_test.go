// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"math/rand/v2"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weirmesh/weir/gen/flow"
	"github.com/weirmesh/weir/gen/observer"
)

// generator makes random flows: any field may be set, so that a printer meets combinations that nobody thought of.
type generator struct{ r *rand.Rand }

func newGenerator(seed uint64) *generator { return &generator{rand.New(rand.NewPCG(seed, 0))} }

func (g *generator) chance(percent int) bool { return g.r.IntN(100) < percent }

func pick[T any](g *generator, list []T) T { return list[g.r.IntN(len(list))] }

// response is a flow, and now and then a loss.
func (g *generator) response() *observer.GetFlowsResponse {
	r := &observer.GetFlowsResponse{NodeName: g.text()}
	if g.chance(5) {
		e := &flow.LostEvent{}
		g.fill(e.ProtoReflect(), 3)
		r.ResponseTypes, r.Time = &observer.GetFlowsResponse_LostEvents{LostEvents: e}, g.time()
		return r
	}
	f := g.flow()
	r.ResponseTypes, r.Time = &observer.GetFlowsResponse_Flow{Flow: f}, f.GetTime()
	return r
}

func (g *generator) flow() *flow.Flow {
	f := &flow.Flow{}
	g.fill(f.ProtoReflect(), 5)
	f.Extensions = nil
	if f.EventType != nil {
		f.EventType.Type = pick(g, []int32{0, 1, 3, 4, 5, 7, 129, 200})
		f.EventType.SubType = g.r.Int32N(260)
	}
	f.PolicyMatchType %= 9
	if g.chance(70) {
		f.L7 = nil
	}
	for _, e := range []*flow.Endpoint{f.Source, f.Destination} {
		if e != nil && g.chance(50) {
			e.Identity %= 12
		}
	}
	if f.IP != nil {
		f.IP.Source = pick(g, []string{"10.0.0.1", "10.244.1.5", "fd00::1", "2001:db8::5"})
		f.IP.Destination = pick(g, []string{"10.0.0.2", "192.168.7.7", "fd00::2", "::1"})
	}
	return f
}

// fill sets each field of m with a chance of a half, messages down to a depth.
func (g *generator) fill(m protoreflect.Message, depth int) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		fd := fields.Get(i)
		if g.chance(50) || depth == 0 || fd.Message() != nil && fd.Message().FullName() == "google.protobuf.Any" {
			continue
		}
		if !fd.IsList() {
			m.Set(fd, g.value(m.NewField(fd), fd, depth))
			continue
		}
		list := m.Mutable(fd).List()
		for range g.r.IntN(3) {
			list.Append(g.value(list.NewElement(), fd, depth))
		}
	}
}

func (g *generator) value(empty protoreflect.Value, fd protoreflect.FieldDescriptor, depth int) protoreflect.Value {
	switch fd.Kind() {
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(g.chance(50))
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(g.text())
	case protoreflect.EnumKind:
		values := fd.Enum().Values()
		return protoreflect.ValueOfEnum(values.Get(g.r.IntN(values.Len())).Number())
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(g.r.Uint32() >> g.r.IntN(32))
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(g.r.Int32() >> g.r.IntN(31))
	case protoreflect.Uint64Kind:
		return protoreflect.ValueOfUint64(g.r.Uint64() >> g.r.IntN(64))
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(g.r.Int64())
	case protoreflect.MessageKind:
		if fd.Message().FullName() == "google.protobuf.Timestamp" {
			return protoreflect.ValueOfMessage(g.time().ProtoReflect())
		}
		g.fill(empty.Message(), depth-1)
		return empty
	}
	panic("no random value for " + string(fd.FullName()))
}

func (g *generator) time() *timestamppb.Timestamp {
	t := &timestamppb.Timestamp{Seconds: 1_700_000_000 + g.r.Int64N(50_000_000), Nanos: g.r.Int32N(1_000_000_000)}
	if g.chance(20) {
		t.Nanos = t.Nanos / 1_000_000 * 1_000_000
	}
	return t
}

// text has what the stock client and we show alike; other control characters are a matter of our own tests.
func (g *generator) text() string {
	return pick(g, []string{"", "a", "todoui-55674959d8-xj6tp", "default", "prod/x", "k8s:app=a", "reserved:world", "TCP Flags: SYN, ACK",
		"http://web/a?b=<c>&d", "é ü 漢字 🎉", "quote \" back \\ slash", "esc \x1b[2J cr \r end", "../up", "a//b/", "10.0.0.1", "%d %s"})
}
