// SPDX-License-Identifier: Apache-2.0

package envoyconfig

import (
	"fmt"
	"slices"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
)

// Visit is told each message of a tree, the inner ones first, with its path. Root: it stood in an Any, or is the whole tree. It may change the message.
type Visit func(path string, m proto.Message, root bool) error

// Walk visits a message and all that it holds, also inside of Any, which is packed again. It ends at the first error.
func Walk(path string, m proto.Message, visit Visit) error {
	return walk(path, m, true, visit)
}

func walk(path string, m proto.Message, root bool, visit Visit) error {
	r := m.ProtoReflect()
	// Changes are made after the range, in the order of the fields: the first error is always the same one.
	var set []protoreflect.FieldDescriptor
	r.Range(func(field protoreflect.FieldDescriptor, _ protoreflect.Value) bool {
		if field.Message() != nil {
			set = append(set, field)
		}
		return true
	})
	slices.SortFunc(set, func(a, b protoreflect.FieldDescriptor) int { return a.Index() - b.Index() })
	for _, field := range set {
		if err := walkField(path+"."+string(field.Name()), field, r.Get(field), visit); err != nil {
			return err
		}
	}
	return visit(path, m, root)
}

func walkField(path string, field protoreflect.FieldDescriptor, v protoreflect.Value, visit Visit) error {
	switch {
	case field.IsMap():
		if field.MapValue().Message() == nil {
			return nil
		}
		entries := map[string]proto.Message{}
		v.Map().Range(func(key protoreflect.MapKey, value protoreflect.Value) bool {
			entries[key.String()] = value.Message().Interface()
			return true
		})
		for _, key := range sortedKeys(entries) {
			if err := walkAny(fmt.Sprintf("%s[%q]", path, key), entries[key], visit); err != nil {
				return err
			}
		}
		return nil
	case field.IsList():
		for i := range v.List().Len() {
			if err := walkAny(fmt.Sprintf("%s[%d]", path, i), v.List().Get(i).Message().Interface(), visit); err != nil {
				return err
			}
		}
		return nil
	}
	return walkAny(path, v.Message().Interface(), visit)
}

func walkAny(path string, m proto.Message, visit Visit) error {
	packed, ok := m.(*anypb.Any)
	if !ok {
		return walk(path, m, false, visit)
	}
	inner, err := anypb.UnmarshalNew(packed, proto.UnmarshalOptions{Resolver: resolver{}})
	if err != nil {
		return fail(path, "%s", protoMessage(err))
	}
	if err := walk(path, inner, true, visit); err != nil {
		return err
	}
	return anypb.MarshalFrom(packed, inner, proto.MarshalOptions{Deterministic: true})
}
