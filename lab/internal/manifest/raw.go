// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"encoding/json"
	"math/big"
	"reflect"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/weirmesh/weir/lab/internal/object"
)

// raw reads an object of which only the metadata is the lab's business. The rest becomes JSON as it stands: no field is added, left out
// or judged.
func (d *decoder) raw(kind object.Kind, root *yaml.Node) (Item, bool) {
	root = resolve(root)
	if metadata := child(root, "metadata"); metadata != nil {
		// As strictly as that of every object.
		d.check(metadata, reflect.TypeFor[metav1.ObjectMeta](), "metadata", 1)
	}
	content := d.exact(root, "", 0)
	if len(d.faults) > 0 {
		return Item{}, false
	}
	data, err := json.Marshal(content)
	if err != nil {
		d.fault(root.Line, "", "%v", err)
		return Item{}, false
	}
	value, err := object.NewRaw(data)
	if err != nil {
		d.fault(root.Line, "metadata", "%v", err)
		return Item{}, false
	}
	d.metadata(kind, value)
	return Item{File: d.file, Line: root.Line, Object: value}, true
}

// exact returns a node as JSON has it, nulls, empty lists and empty maps included.
func (d *decoder) exact(node *yaml.Node, path string, depth int) any {
	node = resolve(node)
	if !d.enter(node, path, depth) {
		return nil
	}
	if _, known := d.lines[path]; !known {
		d.lines[path] = node.Line
	}
	switch node.Kind {
	case yaml.MappingNode:
		result := map[string]any{}
		for i := 0; i+1 < len(node.Content); i += 2 {
			key, value := node.Content[i], node.Content[i+1]
			sub := join2(path, key.Value)
			if key.Kind != yaml.ScalarNode || key.Tag == "!!merge" {
				d.fault(key.Line, path, "expected the name of a field, got %s; merge keys are not read", describe(key))
				continue
			}
			if _, twice := result[key.Value]; twice {
				d.fault(key.Line, sub, "given twice")
				continue
			}
			result[key.Value] = d.exact(value, sub, depth+1)
		}
		return result
	case yaml.SequenceNode:
		result := []any{}
		for i, element := range node.Content {
			result = append(result, d.exact(element, path+"["+strconv.Itoa(i)+"]", depth+1))
		}
		return result
	}
	return scalar(node)
}

// scalar returns a YAML scalar as JSON has it. A number that JSON cannot write is text.
func scalar(node *yaml.Node) any {
	switch node.Tag {
	case "!!null":
		return nil
	case "!!bool":
		var v bool
		if node.Decode(&v) == nil {
			return v
		}
	case "!!int":
		// Of any size: an API server says itself what is too large.
		if v, ok := new(big.Int).SetString(strings.ReplaceAll(node.Value, "_", ""), 0); ok {
			return json.Number(v.String())
		}
	case "!!float":
		if json.Valid([]byte(node.Value)) {
			return json.Number(node.Value)
		}
		var v float64
		if node.Decode(&v) == nil {
			if data, err := json.Marshal(v); err == nil {
				return json.RawMessage(data)
			}
		}
	}
	return node.Value
}
