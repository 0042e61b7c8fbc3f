// SPDX-License-Identifier: Apache-2.0

// Package plainjson writes protobuf messages as JSON for people and jq: proto
// field names, 64-bit integers as numbers, drop reasons in words. protojson,
// which this package follows in all else, writes 64-bit integers as strings.
package plainjson

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math"
	"strconv"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/weirmesh/weir/cli/internal/eventname"
)

// Field is an extra member in front of a message's own.
type Field struct {
	Name  string
	Value string
}

// Append appends m as one JSON object without line breaks, the extra fields
// first. Unset fields are left out, except those that a reader calculates
// with: l7.latency_ns and the counters of statistics.
func Append(b []byte, m proto.Message, extra ...Field) ([]byte, error) {
	b = append(b, '{')
	for i, f := range extra {
		if i > 0 {
			b = append(b, ',')
		}
		b = AppendString(b, f.Name)
		b = append(b, ':')
		b = AppendString(b, f.Value)
	}
	b, err := appendFields(b, m.ProtoReflect(), len(extra) == 0)
	if err != nil {
		return nil, err
	}
	return append(b, '}'), nil
}

// always names the fields that are written when they are zero.
var always = map[protoreflect.FullName]bool{
	"flow.Layer7.latency_ns":                     true,
	"weir.observer.v1.DirectionStats.packets":    true,
	"weir.observer.v1.DirectionStats.bytes":      true,
	"weir.observer.v1.FlowStats.final":           true,
	"weir.observer.v1.Gap.count":                 true,
	"weir.observer.v1.LossCount.count":           true,
	"weir.observer.v1.NodeCount.received":        true,
	"weir.status.v1.GetStatusResponse.ready":     true,
	"weir.agent.v1.MonitorResponse.cpu":          true,
	"weir.agent.v1.DumpServicesResponse.slot":    true,
	"weir.agent.v1.DumpIPCacheResponse.identity": true,
	"weir.agent.v1.DumpPolicyResponse.peer":      true,
	"weir.agent.v1.DumpPolicyResponse.protocol":  true,
	"weir.agent.v1.DumpPolicyResponse.first":     true,
	"weir.agent.v1.DumpPolicyResponse.last":      true,
	"weir.agent.v1.LookupPolicyResponse.policy":  true,
	"weir.agent.v1.LookupPolicyResponse.audit":   true,
	"weir.policy.v1.PolicyObject.valid":          true,
	"weir.policy.v1.PolicyObject.endpoints":      true,
	"weir.policy.v1.PolicyRule.index":            true,
	"weir.policy.v1.RuleStep.peer_matches":       true,
	"weir.policy.v1.RuleStep.port_matches":       true,
	"weir.policy.v1.RuleStep.decided":            true,
	"weir.policy.v1.Side.enforced":               true,
	"weir.policy.v1.Side.audit":                  true,
	"weir.policy.v1.Side.port":                   true,
	"weir.policy.v1.EffectiveDirection.enforced": true,
	"weir.policy.v1.EffectiveDirection.audit":    true,
}

func appendFields(b []byte, m protoreflect.Message, first bool) ([]byte, error) {
	var err error
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		fd := fields.Get(i)
		if !m.Has(fd) && !always[fd.FullName()] {
			continue
		}
		name, value := fd.TextName(), m.Get(fd)
		if fd.FullName() == "flow.Flow.drop_reason_desc" {
			// Words, as in the TYPE column: `select(.drop_reason_desc == "Authentication required")`.
			b = appendName(b, name, &first)
			b = AppendString(b, eventname.DropLabel(int32(value.Enum())))
			continue
		}
		if fd.FullName() == "flow.Flow.extensions" {
			if b, err = appendExtension(b, value.Message(), &first); err != nil {
				return nil, err
			}
			continue
		}
		b = appendName(b, name, &first)
		if b, err = appendField(b, fd, value); err != nil {
			return nil, fmt.Errorf("%s: %w", fd.FullName(), err)
		}
	}
	return b, nil
}

func appendName(b []byte, name string, first *bool) []byte {
	if !*first {
		b = append(b, ',')
	}
	*first = false
	b = AppendString(b, name)
	return append(b, ':')
}

// appendExtension writes statistics under the name "stats"; an extension that
// this program does not know keeps its type and its bytes.
func appendExtension(b []byte, m protoreflect.Message, first *bool) ([]byte, error) {
	any, ok := m.Interface().(*anypb.Any)
	if !ok {
		return nil, fmt.Errorf("extensions hold %s", m.Descriptor().FullName())
	}
	inner, err := any.UnmarshalNew()
	if err != nil {
		b = appendName(b, "extensions", first)
		b = append(b, `{"@type":`...)
		b = AppendString(b, any.GetTypeUrl())
		b = append(b, `,"value":"`...)
		b = base64.StdEncoding.AppendEncode(b, any.GetValue())
		return append(b, `"}`...), nil
	}
	name := "extensions"
	if inner.ProtoReflect().Descriptor().FullName() == "weir.observer.v1.FlowStats" {
		name = "stats"
	}
	b = appendName(b, name, first)
	return Append(b, inner)
}

func appendField(b []byte, fd protoreflect.FieldDescriptor, v protoreflect.Value) ([]byte, error) {
	switch {
	case fd.IsList():
		list := v.List()
		b = append(b, '[')
		for i := range list.Len() {
			if i > 0 {
				b = append(b, ',')
			}
			var err error
			if b, err = appendValue(b, fd, list.Get(i)); err != nil {
				return nil, err
			}
		}
		return append(b, ']'), nil
	case fd.IsMap():
		return appendMap(b, fd, v.Map())
	default:
		return appendValue(b, fd, v)
	}
}

func appendMap(b []byte, fd protoreflect.FieldDescriptor, m protoreflect.Map) ([]byte, error) {
	values := make(map[string]json.RawMessage, m.Len())
	var err error
	m.Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
		var item []byte
		if item, err = appendValue(nil, fd.MapValue(), v); err == nil {
			values[k.String()] = item
		}
		return err == nil
	})
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(values) // sorts the keys
	return append(b, text...), err
}

func appendValue(b []byte, fd protoreflect.FieldDescriptor, v protoreflect.Value) ([]byte, error) {
	switch fd.Kind() {
	case protoreflect.BoolKind:
		return strconv.AppendBool(b, v.Bool()), nil
	case protoreflect.StringKind:
		return AppendString(b, v.String()), nil
	case protoreflect.BytesKind:
		b = append(b, '"')
		b = base64.StdEncoding.AppendEncode(b, v.Bytes())
		return append(b, '"'), nil
	case protoreflect.EnumKind:
		if d := fd.Enum().Values().ByNumber(v.Enum()); d != nil {
			return AppendString(b, string(d.Name())), nil
		}
		return strconv.AppendInt(b, int64(v.Enum()), 10), nil
	case protoreflect.MessageKind, protoreflect.GroupKind:
		return appendMessage(b, v.Message())
	case protoreflect.FloatKind, protoreflect.DoubleKind:
		return appendFloat(b, v.Float()), nil
	case protoreflect.Uint32Kind, protoreflect.Uint64Kind, protoreflect.Fixed32Kind, protoreflect.Fixed64Kind:
		return strconv.AppendUint(b, v.Uint(), 10), nil
	default:
		return strconv.AppendInt(b, v.Int(), 10), nil
	}
}

// appendMessage writes the well-known types as protojson does, numbers aside.
func appendMessage(b []byte, m protoreflect.Message) ([]byte, error) {
	d := m.Descriptor()
	switch d.FullName() {
	case "google.protobuf.Timestamp":
		seconds := m.Get(d.Fields().ByName("seconds")).Int()
		nanos := m.Get(d.Fields().ByName("nanos")).Int()
		t := time.Unix(seconds, nanos).UTC()
		if nanos < 0 || nanos > 999999999 || t.Year() < 1 || t.Year() > 9999 {
			return append(b, "null"...), nil
		}
		b = append(b, '"')
		b = t.AppendFormat(b, time.RFC3339Nano)
		return append(b, '"'), nil
	case "google.protobuf.BoolValue", "google.protobuf.UInt32Value", "google.protobuf.Int32Value",
		"google.protobuf.UInt64Value", "google.protobuf.Int64Value", "google.protobuf.StringValue":
		fd := d.Fields().ByName("value")
		return appendValue(b, fd, m.Get(fd))
	}
	b = append(b, '{')
	b, err := appendFields(b, m, true)
	if err != nil {
		return nil, err
	}
	return append(b, '}'), nil
}

func appendFloat(b []byte, f float64) []byte {
	if math.IsNaN(f) || math.IsInf(f, 0) {
		return append(b, "null"...)
	}
	return strconv.AppendFloat(b, f, 'g', -1, 64)
}

// AppendString appends s as a JSON string.
func AppendString(b []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c < 0x20 || c > 0x7e || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' {
			text, _ := json.Marshal(s) // a string cannot fail
			return append(b, text...)
		}
	}
	b = append(b, '"')
	b = append(b, s...)
	return append(b, '"')
}
