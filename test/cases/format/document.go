// SPDX-License-Identifier: Apache-2.0

package format

import (
	"errors"
	"fmt"

	"go.yaml.in/yaml/v3"
)

// nodeBudget and maxDepth bound what aliases may blow up.
const (
	nodeBudget = 200_000
	maxDepth   = 200
)

// plain copies a tree with its aliases replaced by what they stand for: a document dumped by itself has no anchors of its neighbours.
func plain(n *yaml.Node, depth int, budget *int) (*yaml.Node, error) {
	if depth > maxDepth {
		return nil, errors.New("objects are nested too deeply")
	}
	if *budget--; *budget < 0 {
		return nil, errors.New("objects have too many nodes")
	}
	if n.Kind == yaml.AliasNode {
		if n.Alias == nil {
			return nil, fmt.Errorf("line %d: alias of nothing", n.Line)
		}
		return plain(n.Alias, depth+1, budget)
	}
	c := *n
	c.Anchor = ""
	c.Content = nil
	for _, child := range n.Content {
		p, err := plain(child, depth+1, budget)
		if err != nil {
			return nil, err
		}
		c.Content = append(c.Content, p)
	}
	return &c, nil
}

// Document dumps an object as a YAML document of its own, from the tree and not from Go values: `[]`, `{}`, null and absent keys stay what they are.
func Document(n *yaml.Node) ([]byte, error) {
	data, err := yaml.Marshal(n)
	if err != nil {
		return nil, fmt.Errorf("dump object: %w", err)
	}
	return data, nil
}

// Ref names an object.
type Ref struct{ Kind, Namespace, Name string }

// String is how messages and cases name it.
func (r Ref) String() string {
	if r.Namespace == "" {
		return r.Name
	}
	return r.Namespace + "/" + r.Name
}

// RefOf reads the names of an object; what it lacks is empty.
func RefOf(n *yaml.Node) Ref {
	r := Ref{Kind: text(n, "kind")}
	if meta := field(n, "metadata"); meta != nil {
		r.Namespace, r.Name = text(meta, "namespace"), text(meta, "name")
	}
	return r
}

func field(n *yaml.Node, key string) *yaml.Node {
	if n.Kind != yaml.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return n.Content[i+1]
		}
	}
	return nil
}

func text(n *yaml.Node, key string) string {
	if f := field(n, key); f != nil && f.Kind == yaml.ScalarNode && f.Tag != "!!null" {
		return f.Value
	}
	return ""
}
