// SPDX-License-Identifier: Apache-2.0

// Package fields refuses configuration that is not implemented, by the path of the field: what would be ignored in silence would be a rule that nobody keeps.
package fields

import (
	"errors"
	"fmt"
	"slices"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Only returns an error for each field of m that is set and not among names; path is where m stands.
func Only(m proto.Message, path string, names ...string) error {
	var errs []error
	m.ProtoReflect().Range(func(f protoreflect.FieldDescriptor, _ protoreflect.Value) bool {
		if !slices.Contains(names, string(f.Name())) {
			errs = append(errs, NotSupported(Join(path, string(f.Name()))))
		}
		return true
	})
	return errors.Join(errs...)
}

// NotSupported is the error of a field that is not implemented.
func NotSupported(path string) error { return fmt.Errorf("%s: not supported", path) }

// Join appends a field's name to a path.
func Join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

// Index appends an index to a path.
func Index(path, name string, i int) string { return fmt.Sprintf("%s[%d]", Join(path, name), i) }

// Key appends a map's key to a path.
func Key(path, name, key string) string { return fmt.Sprintf("%s[%q]", Join(path, name), key) }
