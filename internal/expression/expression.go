// SPDX-License-Identifier: Apache-2.0

// Package expression tells what the regular expressions of a configuration cost a proxy.
package expression

import (
	"errors"
	"fmt"
	"regexp/syntax"

	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/anypb"
)

// MaxInstructions is what the expressions of one resource, and by default those of one namespace on one node, may have together.
// An instruction takes up to 300 bytes of a proxy's memory and is visited once for each byte of a text.
const MaxInstructions = 200_000

// Instructions returns the length of the program that an expression is compiled to (RE2 syntax), without compiling it. Large classes of characters count for
// several instructions.
func Instructions(expression string) (int, error) {
	tree, err := syntax.Parse(expression, syntax.Perl)
	if err != nil {
		return 0, err
	}
	return Size(tree), nil
}

// Size is Instructions of what was parsed already.
func Size(tree *syntax.Regexp) int {
	const failAndMatch = 2
	s := sizeOf(tree)
	return s.instructions + s.classes + failAndMatch
}

// Cost returns the instructions of all expressions in a message and in what is packed in it. It stops counting above MaxInstructions.
func Cost(m proto.Message) (int, error) { return CostBy(m, Instructions) }

// CostBy is Cost for who knows, or remembers, the instructions of an expression.
func CostBy(m proto.Message, instructions func(expression string) (int, error)) (int, error) {
	c := cost{of: instructions}
	err := c.add(m.ProtoReflect())
	return c.instructions, err
}

type cost struct {
	of           func(string) (int, error)
	instructions int
}

func (c *cost) add(r protoreflect.Message) error {
	if c.instructions > MaxInstructions {
		return nil
	}
	switch m := r.Interface().(type) {
	case *matcherv3.RegexMatcher:
		n, err := c.of(m.GetRegex())
		c.instructions += n
		return err
	case *anypb.Any:
		inner, err := m.UnmarshalNew()
		if errors.Is(err, protoregistry.NotFound) {
			return nil // whoever compiles the message says what it does not know
		}
		if err != nil {
			return fmt.Errorf("unpack %s: %w", m.GetTypeUrl(), err)
		}
		return c.add(inner.ProtoReflect())
	}
	var err error
	r.Range(func(field protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case field.IsMap():
			if field.MapValue().Message() != nil {
				v.Map().Range(func(_ protoreflect.MapKey, item protoreflect.Value) bool {
					err = c.add(item.Message())
					return err == nil
				})
			}
		case field.Message() == nil:
		case field.IsList():
			for i := 0; i < v.List().Len() && err == nil; i++ {
				err = c.add(v.List().Get(i).Message())
			}
		default:
			err = c.add(v.Message())
		}
		return err == nil
	})
	return err
}
