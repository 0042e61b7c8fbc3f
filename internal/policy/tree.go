// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"sigs.k8s.io/yaml"
)

// Bounds of a document.
const (
	maxDocument = 4 << 20
	maxDepth    = 64
)

// node is a place in a document: objects, lists, strings, json.Number, bool and nil. Null and absent are the same, `[]` and `{}` are not.
type node struct {
	path string
	v    any
}

func (n node) absent() bool { return n.v == nil }

func (n node) child(key string) node {
	m, _ := n.v.(map[string]any)
	path := key
	if n.path != "" {
		path = n.path + "." + key
	}
	return node{path, m[key]}
}

// has reports whether an object has any field with a value.
func (n node) has(keys ...string) bool {
	m, _ := n.v.(map[string]any)
	return slices.ContainsFunc(keys, func(k string) bool { return m[k] != nil })
}

func (n node) keys() []string {
	m, _ := n.v.(map[string]any)
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// decode reads one document.
func decode(raw []byte) (any, error) {
	if len(raw) > maxDocument {
		return nil, fmt.Errorf("the document has %d bytes, more than %d", len(raw), maxDocument)
	}
	if t := bytes.TrimSpace(raw); len(t) > 0 && t[0] == '{' {
		// JSON is also YAML, but much faster as JSON; what only YAML allows (`{a: b}`) is tried below.
		if v, err := decodeJSON(t); err == nil {
			return v, nil
		}
	}
	if manyDocuments(raw) {
		return nil, errors.New("more than one document")
	}
	j, err := yaml.YAMLToJSONStrict(raw)
	if err != nil {
		return nil, err
	}
	return decodeJSON(j)
}

func decodeJSON(raw []byte) (any, error) {
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	v, err := value(d, 0)
	if err != nil {
		return nil, err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("more than one document")
	}
	return v, nil
}

// value reads one value; other than json.Unmarshal it refuses repeated keys.
func value(d *json.Decoder, depth int) (any, error) {
	if depth > maxDepth {
		return nil, fmt.Errorf("nested deeper than %d", maxDepth)
	}
	t, err := d.Token()
	if err != nil {
		return nil, err
	}
	switch t {
	case json.Delim('{'):
		m := map[string]any{}
		for d.More() {
			k, err := d.Token()
			if err != nil {
				return nil, err
			}
			key, ok := k.(string)
			if !ok {
				return nil, fmt.Errorf("a key is %v, not a string", k)
			}
			if _, ok := m[key]; ok {
				return nil, fmt.Errorf("key %q is repeated", key)
			}
			if m[key], err = value(d, depth+1); err != nil {
				return nil, err
			}
		}
		_, err := d.Token()
		return m, err
	case json.Delim('['):
		l := []any{}
		for d.More() {
			v, err := value(d, depth+1)
			if err != nil {
				return nil, err
			}
			l = append(l, v)
		}
		_, err := d.Token()
		return l, err
	}
	return t, nil
}

// manyDocuments reports whether a YAML text has content after a second document marker: the YAML library would pass over it.
func manyDocuments(raw []byte) bool {
	content := false
	ended := false
	for line := range bytes.Lines(raw) {
		line = bytes.TrimRight(line, " \t\r\n")
		rest, marker := bytes.CutPrefix(line, []byte("---"))
		switch {
		case marker && (len(rest) == 0 || rest[0] == ' ' || rest[0] == '\t'):
			ended = content
			line = rest
		case bytes.Equal(line, []byte("...")):
			ended = content
			continue
		}
		if t := bytes.TrimSpace(line); len(t) == 0 || t[0] == '#' || t[0] == '%' && !content {
			continue
		}
		if ended {
			return true
		}
		content = true
	}
	return false
}

// reader reads a document field by field, and keeps the first error. After an error its results mean nothing.
type reader struct {
	o        Options
	ref      Ref
	prefix   string // of messages: "Invalid CiliumNetworkPolicy spec: "
	warnings []string
	err      *Error
}

func (r *reader) fail(n node, format string, args ...any) {
	if r.err == nil {
		r.err = &Error{Ref: r.ref, Field: n.path, Message: r.prefix + fmt.Sprintf(format, args...)}
	}
}

func (r *reader) warn(n node, format string, args ...any) {
	r.warnings = append(r.warnings, n.path+": "+fmt.Sprintf(format, args...))
}

// object checks that a node is an object with these fields only. False = absent, or an error.
func (r *reader) object(n node, fields ...string) bool {
	if n.absent() || r.err != nil {
		return false
	}
	if _, ok := n.v.(map[string]any); !ok {
		r.wrongType(n, "an object")
		return false
	}
	for _, k := range n.keys() {
		if !slices.Contains(fields, k) {
			r.fail(n.child(k), "unknown field %q", k)
			return false
		}
	}
	return true
}

// list returns the items, and whether the list is there: absent and empty differ.
func (r *reader) list(n node) ([]node, bool) {
	if n.absent() || r.err != nil {
		return nil, false
	}
	l, ok := n.v.([]any)
	if !ok {
		r.wrongType(n, "a list")
		return nil, false
	}
	items := make([]node, len(l))
	for i, v := range l {
		items[i] = node{n.path + "[" + strconv.Itoa(i) + "]", v}
	}
	return items, true
}

// items is list with an object in each place; null is an empty object there.
func (r *reader) items(n node, fields ...string) ([]node, bool) {
	items, ok := r.list(n)
	for i := range items {
		if items[i].absent() {
			items[i].v = map[string]any{}
		}
		if !r.object(items[i], fields...) {
			return nil, false
		}
	}
	return items, ok
}

func (r *reader) str(n node) string {
	if n.absent() {
		return ""
	}
	s, ok := n.v.(string)
	if !ok {
		r.wrongType(n, "a string")
	}
	return s
}

func (r *reader) strings(n node) ([]string, bool) {
	items, ok := r.list(n)
	texts := make([]string, len(items))
	for i, item := range items {
		if item.absent() {
			r.wrongType(item, "a string")
		}
		texts[i] = r.str(item)
	}
	return texts, ok
}

// boolean returns a value that may be absent.
func (r *reader) boolean(n node) *bool {
	if n.absent() {
		return nil
	}
	b, ok := n.v.(bool)
	if !ok {
		r.wrongType(n, "true or false")
	}
	return &b
}

// integer returns a number within bounds; absent is 0.
func (r *reader) integer(n node, lowest, highest int64) int64 {
	if n.absent() {
		return 0
	}
	number, ok := n.v.(json.Number)
	if !ok {
		r.wrongType(n, "a number")
		return 0
	}
	i, err := strconv.ParseInt(number.String(), 10, 64)
	if err != nil || i < lowest || i > highest {
		r.fail(n, "%s must be a whole number from %d to %d, not %s", last(n.path), lowest, highest, number)
		return 0
	}
	return i
}

func (r *reader) oneOf(n node, text string, allowed ...string) {
	if !slices.Contains(allowed, text) {
		r.fail(n, "unsupported value %q of %s: must be one of %s", text, last(n.path), strings.Join(allowed, ", "))
	}
}

func (r *reader) wrongType(n node, want string) {
	got := "an object"
	switch n.v.(type) {
	case nil:
		got = "null"
	case []any:
		got = "a list"
	case string:
		got = "a string"
	case json.Number:
		got = "a number"
	case bool:
		got = "true or false"
	}
	r.fail(n, "%s must be %s, not %s", last(n.path), want, got)
}

// last returns the last field of a path, without an index or a label's key.
func last(path string) string {
	if strings.HasSuffix(path, "]") {
		path = path[:strings.LastIndexByte(path, '[')]
	}
	return path[strings.LastIndexByte(path, '.')+1:]
}
