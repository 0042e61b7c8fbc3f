// SPDX-License-Identifier: Apache-2.0

package envoyconfig

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/dynamicpb"
)

const typePrefix = "type.googleapis.com/"

// decodeResource reads one resource: every type and field of it is on the list, then it is decoded.
func decodeResource(path string, raw []byte) (proto.Message, error) {
	tree, err := decodeTree(path, raw)
	if err != nil {
		return nil, err
	}
	m, err := typed(path, "", tree)
	if err != nil {
		return nil, err
	}
	d := decoder{sets: map[protoreflect.FullName][]string{}}
	body := without(tree, "@type")
	if err := d.message(path, m.ProtoReflect().Descriptor(), body, 0); err != nil {
		return nil, err
	}
	if err := unmarshal(body, m); err != nil {
		return nil, locate(path, m.ProtoReflect().Descriptor(), body, err)
	}
	return m, nil
}

// decodeTree reads JSON in the one way that its users agree on: no name twice in an object, nothing behind the value.
func decodeTree(path string, raw []byte) (map[string]any, error) {
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	v, err := readValue(d, path, 0)
	if err != nil {
		return nil, err
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, fail(path, "something follows the value")
	}
	tree, ok := v.(map[string]any)
	if !ok {
		return nil, fail(path, "is not an object")
	}
	return tree, nil
}

func readValue(d *json.Decoder, path string, depth int) (any, error) {
	if depth > MaxDepth {
		return nil, fail(path, "is nested deeper than %d", MaxDepth)
	}
	token, err := d.Token()
	if err != nil {
		return nil, decodeError(path, err)
	}
	switch token {
	case json.Delim('{'):
		return readObject(d, path, depth)
	case json.Delim('['):
		list := []any{}
		for d.More() {
			v, err := readValue(d, fmt.Sprintf("%s[%d]", path, len(list)), depth+1)
			if err != nil {
				return nil, err
			}
			list = append(list, v)
		}
		_, err := d.Token()
		return list, err
	}
	return token, nil
}

func readObject(d *json.Decoder, path string, depth int) (any, error) {
	object := map[string]any{}
	for d.More() {
		token, err := d.Token()
		if err != nil {
			return nil, decodeError(path, err)
		}
		key, ok := token.(string)
		if !ok {
			return nil, fail(path, "has a name that is no string")
		}
		if _, twice := object[key]; twice {
			return nil, fail(path+"."+key, "is there twice")
		}
		if object[key], err = readValue(d, path+"."+key, depth+1); err != nil {
			return nil, err
		}
	}
	_, err := d.Token()
	return object, err
}

// typed returns an empty message of the type that the object names, if that may stand there.
func typed(path string, at place, tree map[string]any) (proto.Message, error) {
	url, ok := tree["@type"].(string)
	if !ok {
		return nil, fail(path, "has no @type")
	}
	name := url[strings.LastIndexByte(url, '/')+1:]
	m, ok := typeAt(at, name)
	if !ok {
		return nil, fail(path, "type %s is not allowed here", name)
	}
	if url != typePrefix+name {
		return nil, fail(path, "@type %q is not %s%s", url, typePrefix, name)
	}
	return m, nil
}

// decoder checks trees against the list of fields.
type decoder struct {
	sets map[protoreflect.FullName][]string
}

func (d *decoder) mayHave(field protoreflect.FieldDescriptor) bool {
	owner := field.ContainingMessage().FullName()
	set, ok := d.sets[owner]
	if !ok {
		set = strings.Fields(fields[owner])
		d.sets[owner] = set
	}
	return slices.Contains(set, string(field.Name()))
}

// message checks an object that stands for a message.
func (d *decoder) message(path string, md protoreflect.MessageDescriptor, tree map[string]any, depth int) error {
	seen := map[protoreflect.FieldNumber]bool{}
	for _, key := range sortedKeys(tree) {
		field := fieldOf(md, key)
		if field == nil {
			return fail(path+"."+key, "%s has no such field", md.Name())
		}
		at := path + "." + string(field.Name())
		if tree[key] == nil {
			continue // null = absent, as protojson has it
		}
		if !d.mayHave(field) {
			return fail(at, "is not allowed in a configuration that others share a proxy with (%s)", field.FullName())
		}
		if seen[field.Number()] {
			return fail(at, "is there twice")
		}
		seen[field.Number()] = true
		if err := d.field(at, field, tree[key], depth+1); err != nil {
			return err
		}
	}
	return nil
}

// fieldOf finds a field by either of its names.
func fieldOf(md protoreflect.MessageDescriptor, key string) protoreflect.FieldDescriptor {
	if f := md.Fields().ByJSONName(key); f != nil {
		return f
	}
	return md.Fields().ByTextName(key)
}

func (d *decoder) field(path string, field protoreflect.FieldDescriptor, v any, depth int) error {
	switch {
	case field.IsMap():
		object, ok := v.(map[string]any)
		if !ok {
			return fail(path, "is not an object")
		}
		for _, key := range sortedKeys(object) {
			if err := d.value(fmt.Sprintf("%s[%q]", path, key), field.FullName(), field.MapValue(), object[key], depth); err != nil {
				return err
			}
		}
		return nil
	case field.IsList():
		list, ok := v.([]any)
		if !ok {
			return fail(path, "is not a list")
		}
		for i, item := range list {
			if err := d.value(fmt.Sprintf("%s[%d]", path, i), field.FullName(), field, item, depth); err != nil {
				return err
			}
		}
		return nil
	}
	return d.value(path, field.FullName(), field, v, depth)
}

// value checks what is a message; scalars are protojson's.
func (d *decoder) value(path string, at place, field protoreflect.FieldDescriptor, v any, depth int) error {
	md := field.Message()
	if md == nil || isValue(md) {
		return nil
	}
	object, ok := v.(map[string]any)
	if !ok {
		return fail(path, "is not an object")
	}
	if md.FullName() != "google.protobuf.Any" {
		return d.message(path, md, object, depth)
	}
	m, err := typed(path, at, object)
	if err != nil {
		return err
	}
	return d.message(path, m.ProtoReflect().Descriptor(), without(object, "@type"), depth)
}

// unmarshal decodes a checked tree; only types that may stand somewhere are known to it.
func unmarshal(tree map[string]any, into proto.Message) error {
	raw, err := json.Marshal(tree)
	if err != nil {
		return err
	}
	return protojson.UnmarshalOptions{RecursionLimit: 2 * MaxDepth, Resolver: resolver{}}.Unmarshal(raw, into)
}

// resolver finds the types of the list and no others.
type resolver struct{}

func (resolver) FindMessageByURL(url string) (protoreflect.MessageType, error) {
	name, ok := strings.CutPrefix(url, typePrefix)
	if ok {
		for _, at := range places() {
			if m, ok := typeAt(at, name); ok {
				return m.ProtoReflect().Type(), nil
			}
		}
	}
	return nil, protoregistry.NotFound
}

func (r resolver) FindMessageByName(name protoreflect.FullName) (protoreflect.MessageType, error) {
	return r.FindMessageByURL(typePrefix + string(name))
}

func (resolver) FindExtensionByName(protoreflect.FullName) (protoreflect.ExtensionType, error) {
	return nil, protoregistry.NotFound
}

func (resolver) FindExtensionByNumber(protoreflect.FullName, protoreflect.FieldNumber) (protoreflect.ExtensionType, error) {
	return nil, protoregistry.NotFound
}

// locate finds the smallest part of a tree that can not be decoded; err is what was said of the whole.
func locate(path string, md protoreflect.MessageDescriptor, tree map[string]any, err error) error {
	for _, key := range sortedKeys(tree) {
		field := fieldOf(md, key)
		if field == nil || tree[key] == nil {
			continue
		}
		partErr := unmarshal(map[string]any{key: tree[key]}, dynamicpb.NewMessage(md))
		if partErr == nil {
			continue
		}
		return locateValue(path+"."+string(field.Name()), field, tree[key], partErr)
	}
	return fail(path, "%s", protoMessage(err))
}

func locateValue(path string, field protoreflect.FieldDescriptor, v any, err error) error {
	if object, ok := v.(map[string]any); ok && field.Message() != nil && !field.IsMap() {
		return locateMessage(path, field, object, err)
	}
	if object, ok := v.(map[string]any); ok && field.IsMap() && field.MapValue().Message() != nil {
		for _, key := range sortedKeys(object) {
			part, ok := object[key].(map[string]any)
			partErr := unmarshal(map[string]any{field.JSONName(): map[string]any{key: object[key]}}, dynamicpb.NewMessage(field.ContainingMessage()))
			if ok && partErr != nil {
				return locateMessage(fmt.Sprintf("%s[%q]", path, key), field.MapValue(), part, partErr)
			}
		}
	}
	if list, ok := v.([]any); ok && field.IsList() {
		for i, item := range list {
			partErr := unmarshal(map[string]any{field.JSONName(): []any{item}}, dynamicpb.NewMessage(field.ContainingMessage()))
			if partErr == nil {
				continue
			}
			at := fmt.Sprintf("%s[%d]", path, i)
			if object, ok := item.(map[string]any); ok && field.Message() != nil {
				return locateMessage(at, field, object, partErr)
			}
			return fail(at, "%s", protoMessage(partErr))
		}
	}
	return fail(path, "%s", protoMessage(err))
}

func locateMessage(path string, field protoreflect.FieldDescriptor, object map[string]any, err error) error {
	md := field.Message()
	if md.FullName() == "google.protobuf.Any" {
		url, _ := object["@type"].(string)
		t, findErr := resolver{}.FindMessageByURL(url)
		if findErr != nil {
			return fail(path, "%s", protoMessage(err))
		}
		md, object = t.Descriptor(), without(object, "@type")
	}
	return locate(path, md, object, err)
}

// protoMessage takes an error of protojson down to what it says of the value.
func protoMessage(err error) string {
	text := strings.ReplaceAll(err.Error(), "\u00a0", " ") // it varies its blanks on purpose
	text = strings.TrimPrefix(text, "proto: ")
	if rest, ok := strings.CutPrefix(text, "(line "); ok {
		if _, after, ok := strings.Cut(rest, "): "); ok {
			text = after
		}
	}
	if rest, ok := strings.CutPrefix(text, "syntax error (line "); ok {
		if _, after, ok := strings.Cut(rest, "): "); ok {
			text = after
		}
	}
	return text
}

func without(tree map[string]any, key string) map[string]any {
	rest := make(map[string]any, len(tree))
	for k, v := range tree {
		if k != key {
			rest[k] = v
		}
	}
	return rest
}
