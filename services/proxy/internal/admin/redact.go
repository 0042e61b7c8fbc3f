// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"github.com/cncf/xds/go/udpa/annotations"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
)

// hidden stands for what is not shown.
const hidden = "[redacted]"

// redact hides what the protocol's authors marked as sensitive, also inside packed messages. What can not be unpacked is hidden whole.
func redact(m protoreflect.Message) {
	if a, ok := m.Interface().(*anypb.Any); ok {
		redactAny(a)
		return
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if sensitive(f) {
			blank(m, f, v)
			return true
		}
		each(f, v, redact)
		return true
	})
}

func redactAny(a *anypb.Any) {
	inner, err := a.UnmarshalNew()
	if err != nil {
		a.TypeUrl, a.Value = "", nil
		return
	}
	redact(inner.ProtoReflect())
	if packed, err := anypb.New(inner); err == nil {
		a.Value = packed.GetValue()
	} else {
		a.TypeUrl, a.Value = "", nil
	}
}

func sensitive(f protoreflect.FieldDescriptor) bool {
	marked, ok := proto.GetExtension(f.Options(), annotations.E_Sensitive).(bool)
	return ok && marked
}

// each calls do for the messages in a field.
func each(f protoreflect.FieldDescriptor, v protoreflect.Value, do func(protoreflect.Message)) {
	switch {
	case f.IsMap():
		if f.MapValue().Message() != nil {
			v.Map().Range(func(_ protoreflect.MapKey, one protoreflect.Value) bool {
				do(one.Message())
				return true
			})
		}
	case f.Message() == nil:
	case f.IsList():
		for i := range v.List().Len() {
			do(v.List().Get(i).Message())
		}
	default:
		do(v.Message())
	}
}

// blank hides a field: texts are replaced, numbers removed, messages blanked field by field.
func blank(m protoreflect.Message, f protoreflect.FieldDescriptor, v protoreflect.Value) {
	switch {
	case f.Message() != nil && !f.IsMap():
		each(f, v, func(inner protoreflect.Message) {
			inner.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
				blank(inner, f, v)
				return true
			})
		})
	case f.IsList() || f.IsMap():
		m.Clear(f)
	case f.Kind() == protoreflect.StringKind:
		m.Set(f, protoreflect.ValueOfString(hidden))
	case f.Kind() == protoreflect.BytesKind:
		m.Set(f, protoreflect.ValueOfBytes([]byte(hidden)))
	default:
		m.Clear(f)
	}
}
