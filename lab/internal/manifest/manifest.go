// SPDX-License-Identifier: Apache-2.0

// Package manifest reads Kubernetes manifests strictly: what it does not know, or would not act upon in a way that changes what a
// workload means, is refused with file, line, field and what was expected there.
package manifest

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/weirmesh/weir/lab/internal/object"
)

// Limits on what is read: aliases make a small file large.
const (
	maxBytes = 4 << 20
	maxNodes = 100_000
	maxDepth = 60
)

// Item is an object of a file.
type Item struct {
	File   string
	Line   int
	Object object.Object
	// Notes tell of fields that were read and have no effect in a lab.
	Notes []string
}

// Key returns the object's key.
func (i Item) Key() object.Key { return object.KeyOf(i.Object) }

// Fault is one thing wrong with a file.
type Fault struct {
	File string
	Line int
	// Field is the path of the field, such as spec.containers[0].image; empty = the document itself.
	Field string
	// Expected says what should be there, or what is wrong.
	Expected string
}

// Error is the fault as one line: file:line: field: what was expected.
func (f Fault) Error() string {
	if f.Field == "" {
		return fmt.Sprintf("%s:%d: %s", f.File, f.Line, f.Expected)
	}
	return fmt.Sprintf("%s:%d: %s: %s", f.File, f.Line, f.Field, f.Expected)
}

// Parse reads all documents of a file. The error joins every Fault found; with one, no item is returned.
func Parse(file string, data []byte) ([]Item, error) {
	items, faults := parse(file, data, (*decoder).object)
	return items, join(faults)
}

// ParseKeys reads which objects a file names, for a deletion: only apiVersion, kind, namespace and name count.
func ParseKeys(file string, data []byte) ([]object.Key, error) {
	items, faults := parse(file, data, (*decoder).keyOnly)
	var keys []object.Key
	for _, item := range items {
		keys = append(keys, item.Key())
	}
	return keys, join(faults)
}

func join(faults []Fault) error {
	// In the order of the file, whichever check found them.
	slices.SortStableFunc(faults, func(a, b Fault) int { return cmp.Or(a.Line-b.Line, strings.Compare(a.Field, b.Field)) })
	var errs []error
	for _, fault := range faults {
		errs = append(errs, fault)
	}
	return errors.Join(errs...)
}

func parse(file string, data []byte, read func(*decoder, *yaml.Node) (Item, bool)) ([]Item, []Fault) {
	if len(data) > maxBytes {
		return nil, []Fault{{File: file, Line: 1, Expected: fmt.Sprintf("the file has %d bytes, at most %d are read", len(data), maxBytes)}}
	}
	var items []Item
	var faults []Fault
	seen := map[object.Key]int{}
	documents := yaml.NewDecoder(strings.NewReader(string(data)))
	for {
		var document yaml.Node
		err := documents.Decode(&document)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			faults = append(faults, syntaxFault(file, err))
			break
		}
		for _, root := range roots(&document) {
			d := &decoder{file: file, lines: map[string]int{}}
			item, ok := read(d, root)
			faults = append(faults, d.faults...)
			if !ok || len(d.faults) > 0 {
				continue
			}
			if first, twice := seen[item.Key()]; twice {
				faults = append(faults, Fault{file, item.Line, "metadata.name", fmt.Sprintf("%s is already in line %d of this file", item.Key(), first)})
			}
			seen[item.Key()] = item.Line
			items = append(items, item)
		}
	}
	if len(faults) > 0 {
		return nil, faults
	}
	return items, nil
}

// roots returns the objects of a document: none for an empty one, the items of a List.
func roots(document *yaml.Node) []*yaml.Node {
	if document.Kind != yaml.DocumentNode || len(document.Content) == 0 {
		return nil
	}
	root := document.Content[0]
	if root.Kind == yaml.ScalarNode && root.Tag == "!!null" {
		return nil
	}
	if items := child(root, "items"); items != nil && text(child(root, "kind")) == "List" && items.Kind == yaml.SequenceNode {
		return items.Content
	}
	return []*yaml.Node{root}
}

// syntaxFault makes a fault of the YAML reader's error, which has the line in its text.
func syntaxFault(file string, err error) Fault {
	message := strings.TrimPrefix(err.Error(), "yaml: ")
	var line int
	if n, scanErr := fmt.Sscanf(message, "line %d:", &line); n == 1 && scanErr == nil {
		_, message, _ = strings.Cut(message, ": ")
	}
	return Fault{File: file, Line: max(line, 1), Expected: "not YAML: " + message}
}

// child returns the value of a mapping's key.
func child(node *yaml.Node, key string) *yaml.Node {
	if node == nil || node.Kind != yaml.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(node.Content); i += 2 {
		if node.Content[i].Value == key {
			return resolve(node.Content[i+1])
		}
	}
	return nil
}

// text returns a scalar's text.
func text(node *yaml.Node) string {
	if node == nil || node.Kind != yaml.ScalarNode {
		return ""
	}
	return node.Value
}

func resolve(node *yaml.Node) *yaml.Node {
	// YAML allows no alias of an alias.
	if node.Kind == yaml.AliasNode && node.Alias != nil {
		return node.Alias
	}
	return node
}
