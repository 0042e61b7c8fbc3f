// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/weirmesh/weir/lab/internal/object"
)

// decoder reads one object. It walks the YAML beside the Go type, so that every fault has its line, and only then lets the JSON decoder
// fill the object.
type decoder struct {
	file   string
	faults []Fault
	// lines has the line of each field that was given, by path.
	lines map[string]int
	nodes int
	// given up: the object is larger than anybody writes, or has more faults than anybody reads.
	gaveUp bool
}

// maxFaults of one object are reported.
const maxFaults = 50

func (d *decoder) fault(line int, path, format string, args ...any) {
	if len(d.faults) >= maxFaults {
		d.gaveUp = true
		return
	}
	d.faults = append(d.faults, Fault{File: d.file, Line: line, Field: path, Expected: fmt.Sprintf(format, args...)})
}

// at reports a fault of a field; a field that was not given has the line of the nearest one around it.
func (d *decoder) at(path, format string, args ...any) {
	d.fault(d.line(path), path, format, args...)
}

func (d *decoder) line(path string) int {
	for {
		if line, ok := d.lines[path]; ok {
			return line
		}
		cut := max(strings.LastIndexByte(path, '.'), strings.LastIndexByte(path, '['))
		if cut < 0 {
			return d.lines[""]
		}
		path = path[:cut]
	}
}

// kind finds out what a document is.
func (d *decoder) kind(root *yaml.Node) (object.Kind, bool) {
	root = resolve(root)
	d.lines[""] = root.Line
	if root.Kind != yaml.MappingNode {
		d.fault(root.Line, "", "expected an object with apiVersion, kind and metadata, got %s", describe(root))
		return object.Kind{}, false
	}
	name, version := child(root, "kind"), child(root, "apiVersion")
	if text(name) == "" {
		d.fault(root.Line, "kind", "required: one of %s", strings.Join(object.Manifests(), ", "))
		return object.Kind{}, false
	}
	kind, known := object.ByName(text(name))
	switch {
	case !known:
		d.fault(name.Line, "kind", "%s (%s) is not a kind of the lab; it has %s", text(name), text(version), strings.Join(object.Manifests(), ", "))
	case kind.Derived:
		d.fault(name.Line, "kind", "%s is made by the lab itself; it cannot be in a manifest", kind.Name)
	case version == nil:
		d.fault(root.Line, "apiVersion", "required: %s for kind %s", kind.APIVersion, kind.Name)
	case !kind.Accepts(text(version)):
		d.fault(version.Line, "apiVersion", "expected %s for kind %s, got %q", kind.APIVersion, kind.Name, text(version))
	default:
		return kind, true
	}
	return object.Kind{}, false
}

// object reads a whole object.
func (d *decoder) object(root *yaml.Node) (Item, bool) {
	kind, ok := d.kind(root)
	if !ok {
		return Item{}, false
	}
	if kind.Raw {
		return d.raw(kind, root)
	}
	value := kind.New()
	generic := d.check(root, reflect.TypeOf(value), "", 0)
	if len(d.faults) > 0 {
		return Item{}, false
	}
	data, err := json.Marshal(generic)
	if err == nil {
		err = json.Unmarshal(data, value)
	}
	if err != nil {
		// What the walk let pass and the decoder does not: said with the decoder's own words.
		d.fault(root.Line, "", "%v", err)
		return Item{}, false
	}
	notes := d.validate(kind, value)
	return Item{File: d.file, Line: resolve(root).Line, Object: value, Notes: notes}, true
}

// keyOnly reads what a deletion needs.
func (d *decoder) keyOnly(root *yaml.Node) (Item, bool) {
	kind, ok := d.kind(root)
	if !ok {
		return Item{}, false
	}
	value := kind.New()
	metadata := child(resolve(root), "metadata")
	value.SetName(text(child(metadata, "name")))
	value.SetNamespace(text(child(metadata, "namespace")))
	if value.GetName() == "" {
		d.fault(resolve(root).Line, "metadata.name", "required")
		return Item{}, false
	}
	d.namespace(kind, value)
	return Item{File: d.file, Line: resolve(root).Line, Object: value}, true
}

var unmarshaler = reflect.TypeFor[json.Unmarshaler]()

// check compares a node with the Go type that it is to fill, and returns it as what encoding/json makes of equal JSON.
func (d *decoder) check(node *yaml.Node, t reflect.Type, path string, depth int) any {
	node = resolve(node)
	if !d.enter(node, path, depth) {
		return nil
	}
	if line, ok := d.lines[path]; !ok || line == 0 {
		d.lines[path] = node.Line
	}
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if node.Kind == yaml.ScalarNode && node.Tag == "!!null" {
		return nil
	}
	if reflect.PointerTo(t).Implements(unmarshaler) {
		return d.checkCustom(node, t, path, depth)
	}
	switch t.Kind() {
	case reflect.Struct:
		return d.checkStruct(node, t, path, depth)
	case reflect.Map:
		return d.checkMap(node, t, path, depth)
	case reflect.Slice:
		if t.Elem().Kind() == reflect.Uint8 {
			return d.checkBytes(node, path)
		}
		return d.checkSlice(node, t, path, depth)
	case reflect.Interface:
		return d.generic(node, path, depth)
	}
	return d.checkScalar(node, t, path)
}

// enter counts a node; false = there is no use in reading on.
func (d *decoder) enter(node *yaml.Node, path string, depth int) bool {
	if d.nodes++; !d.gaveUp && (d.nodes > maxNodes || depth > maxDepth) {
		d.fault(node.Line, path, "the object is too large or too deep")
		d.gaveUp = true
	}
	return !d.gaveUp
}

func (d *decoder) checkStruct(node *yaml.Node, t reflect.Type, path string, depth int) any {
	if node.Kind != yaml.MappingNode {
		d.fault(node.Line, path, "expected an object with fields, got %s", describe(node))
		return nil
	}
	fields := fieldsOf(t)
	result := map[string]any{}
	given := map[string]int{}
	for i := 0; i+1 < len(node.Content); i += 2 {
		key, value := node.Content[i], node.Content[i+1]
		name := key.Value
		sub := join2(path, name)
		if key.Kind != yaml.ScalarNode || key.Tag == "!!merge" {
			d.fault(key.Line, path, "expected the name of a field, got %s; merge keys are not read", describe(key))
			continue
		}
		field, ok := fields[name]
		if !ok {
			d.fault(key.Line, sub, "unknown field%s", suggest(name, fields))
			continue
		}
		if first, twice := given[name]; twice {
			d.fault(key.Line, sub, "given twice, first in line %d", first)
			continue
		}
		given[name] = key.Line
		d.lines[sub] = key.Line
		if v := d.check(value, field, sub, depth+1); v != nil {
			result[name] = v
		}
	}
	return result
}

func (d *decoder) checkMap(node *yaml.Node, t reflect.Type, path string, depth int) any {
	if node.Kind != yaml.MappingNode {
		d.fault(node.Line, path, "expected a map of names and values, got %s", describe(node))
		return nil
	}
	result := map[string]any{}
	given := map[string]int{}
	for i := 0; i+1 < len(node.Content); i += 2 {
		key, value := node.Content[i], node.Content[i+1]
		if key.Kind != yaml.ScalarNode || key.Tag == "!!merge" {
			d.fault(key.Line, path, "expected a name, got %s; merge keys are not read", describe(key))
			continue
		}
		sub := join2(path, key.Value)
		if first, twice := given[key.Value]; twice {
			d.fault(key.Line, sub, "given twice, first in line %d", first)
			continue
		}
		given[key.Value] = key.Line
		d.lines[sub] = key.Line
		result[key.Value] = d.check(value, t.Elem(), sub, depth+1)
		if result[key.Value] == nil && t.Elem().Kind() == reflect.String {
			result[key.Value] = ""
		}
	}
	return result
}

func (d *decoder) checkSlice(node *yaml.Node, t reflect.Type, path string, depth int) any {
	if node.Kind != yaml.SequenceNode {
		d.fault(node.Line, path, "expected a list, got %s", describe(node))
		return nil
	}
	result := []any{}
	for i, element := range node.Content {
		result = append(result, d.check(element, t.Elem(), path+"["+strconv.Itoa(i)+"]", depth+1))
	}
	return result
}

func (d *decoder) checkBytes(node *yaml.Node, path string) any {
	if _, err := base64.StdEncoding.DecodeString(node.Value); node.Kind != yaml.ScalarNode || err != nil {
		d.fault(node.Line, path, "expected base64, got %s", describe(node))
		return nil
	}
	return node.Value
}

// checkCustom asks the type's own decoder, as for quantities, times and "number or name".
func (d *decoder) checkCustom(node *yaml.Node, t reflect.Type, path string, depth int) any {
	value := d.generic(node, path, depth)
	data, err := json.Marshal(value)
	if err == nil {
		err = json.Unmarshal(data, reflect.New(t).Interface())
	}
	if err != nil {
		d.fault(node.Line, path, "expected %s, got %s", customName(t), describe(node))
		return nil
	}
	return value
}

func customName(t reflect.Type) string {
	switch t.Name() {
	case "IntOrString":
		return "a number or a name"
	case "Quantity":
		return "a quantity such as 100m or 64Mi"
	case "Time", "MicroTime":
		return "a time such as 2006-01-02T15:04:05Z"
	case "Duration":
		return "a duration such as 30s"
	}
	return "a " + t.Name()
}

func (d *decoder) checkScalar(node *yaml.Node, t reflect.Type, path string) any {
	if node.Kind != yaml.ScalarNode {
		d.fault(node.Line, path, "expected %s, got %s", scalarName(t), describe(node))
		return nil
	}
	switch t.Kind() {
	case reflect.String:
		// A date without quotes is text where text is wanted.
		if node.Tag == "!!str" || node.Tag == "!!timestamp" {
			return node.Value
		}
		d.fault(node.Line, path, "expected text, got %s; put it in quotes: %q", describe(node), node.Value)
		return nil
	case reflect.Bool:
		var v bool
		if node.Tag == "!!bool" && node.Decode(&v) == nil {
			return v
		}
	case reflect.Int, reflect.Int32, reflect.Int64:
		var v int64
		if node.Tag == "!!int" && node.Decode(&v) == nil && !reflect.Zero(t).OverflowInt(v) {
			return v
		}
	case reflect.Float64:
		var v float64
		if (node.Tag == "!!float" || node.Tag == "!!int") && node.Decode(&v) == nil && !math.IsNaN(v) && !math.IsInf(v, 0) {
			return v
		}
	}
	d.fault(node.Line, path, "expected %s, got %s", scalarName(t), describe(node))
	return nil
}

func scalarName(t reflect.Type) string {
	switch t.Kind() {
	case reflect.String:
		return "text"
	case reflect.Bool:
		return "true or false"
	case reflect.Int, reflect.Int32, reflect.Int64:
		return "a whole number"
	case reflect.Float64:
		return "a number"
	}
	return "a " + t.Kind().String()
}

// generic returns a node without a type.
func (d *decoder) generic(node *yaml.Node, path string, depth int) any {
	node = resolve(node)
	if !d.enter(node, path, depth) {
		return nil
	}
	switch node.Kind {
	case yaml.MappingNode:
		result := map[string]any{}
		for i := 0; i+1 < len(node.Content); i += 2 {
			result[node.Content[i].Value] = d.generic(node.Content[i+1], join2(path, node.Content[i].Value), depth+1)
		}
		return result
	case yaml.SequenceNode:
		result := []any{}
		for i, element := range node.Content {
			result = append(result, d.generic(element, path+"["+strconv.Itoa(i)+"]", depth+1))
		}
		return result
	}
	switch node.Tag {
	case "!!bool":
		var v bool
		if node.Decode(&v) == nil {
			return v
		}
	case "!!int":
		var v int64
		if node.Decode(&v) == nil {
			return v
		}
	case "!!float":
		var v float64
		if node.Decode(&v) == nil && !math.IsNaN(v) && !math.IsInf(v, 0) {
			return v
		}
	case "!!null":
		return nil
	}
	return node.Value
}

// describe says what a node is, for a fault.
func describe(node *yaml.Node) string {
	switch node.Kind {
	case yaml.MappingNode:
		return "a map"
	case yaml.SequenceNode:
		return "a list"
	}
	value := node.Value
	if len(value) > 40 {
		value = value[:40] + "..."
	}
	switch node.Tag {
	case "!!int", "!!float":
		return "the number " + value
	case "!!bool":
		return "the truth value " + value
	case "!!null":
		return "nothing"
	}
	return strconv.Quote(value)
}

func join2(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

// fieldsOf returns the JSON fields of a struct, those of inlined structs included.
func fieldsOf(t reflect.Type) map[string]reflect.Type {
	fields := map[string]reflect.Type{}
	for field := range t.Fields() {
		name, options, _ := strings.Cut(field.Tag.Get("json"), ",")
		switch {
		case name == "-" || !field.IsExported() && !field.Anonymous:
		case name == "" && (field.Anonymous || strings.Contains(options, "inline")):
			inner := field.Type
			for inner.Kind() == reflect.Pointer {
				inner = inner.Elem()
			}
			maps.Copy(fields, fieldsOf(inner))
		default:
			fields[name] = field.Type
		}
	}
	return fields
}

// suggest names the field that was probably meant.
func suggest(name string, fields map[string]reflect.Type) string {
	for _, candidate := range slices.Sorted(maps.Keys(fields)) {
		if distance(strings.ToLower(name), strings.ToLower(candidate)) <= 2 {
			return fmt.Sprintf("; did you mean %s?", candidate)
		}
	}
	return ""
}

// distance is the Levenshtein distance; names that differ much in length are not compared.
func distance(a, b string) int {
	if len(a) > len(b)+2 || len(b) > len(a)+2 {
		return math.MaxInt
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diagonal := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			diagonal, row[j] = row[j], min(row[j]+1, row[j-1]+1, diagonal+cost)
		}
	}
	return row[len(b)]
}
