// SPDX-License-Identifier: Apache-2.0

// Package yamltext writes JSON as YAML for people: members in their order, and
// nothing changed on the way, absent, null, {} and [] included.
package yamltext

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// maxDepth bounds the nesting of a document.
const maxDepth = 200

// FromJSON returns one JSON document as YAML.
func FromJSON(data []byte) ([]byte, error) {
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	node, err := value(d, 0)
	if err != nil {
		return nil, err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("more than one document")
	}
	var b bytes.Buffer
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	if err := errors.Join(e.Encode(node), e.Close()); err != nil {
		return nil, fmt.Errorf("encode YAML: %w", err)
	}
	return escaped(b.Bytes()), nil
}

func value(d *json.Decoder, depth int) (*yaml.Node, error) {
	if depth > maxDepth {
		return nil, fmt.Errorf("nested deeper than %d", maxDepth)
	}
	token, err := d.Token()
	if err != nil {
		return nil, fmt.Errorf("decode JSON: %w", err)
	}
	switch t := token.(type) {
	case json.Delim:
		n := &yaml.Node{Kind: yaml.MappingNode, Tag: "!!map"}
		if t == '[' {
			n = &yaml.Node{Kind: yaml.SequenceNode, Tag: "!!seq"}
		}
		for d.More() {
			if t == '{' {
				key, err := d.Token()
				if err != nil {
					return nil, fmt.Errorf("decode JSON: %w", err)
				}
				text, _ := key.(string)
				n.Content = append(n.Content, str(text))
			}
			item, err := value(d, depth+1)
			if err != nil {
				return nil, err
			}
			n.Content = append(n.Content, item)
		}
		if _, err := d.Token(); err != nil {
			return nil, fmt.Errorf("decode JSON: %w", err)
		}
		return n, nil
	case string:
		return str(t), nil
	case json.Number:
		return &yaml.Node{Kind: yaml.ScalarNode, Value: t.String()}, nil
	case bool:
		return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!bool", Value: fmt.Sprint(t)}, nil
	}
	return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!null", Value: "null"}, nil
}

// str makes a string, in quotes where a reader of any version of YAML could take it for something else. What could disturb a terminal is in
// double quotes, where it can be escaped.
func str(s string) *yaml.Node {
	n := &yaml.Node{}
	if n.Encode(s) != nil || n.Kind != yaml.ScalarNode {
		n = &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: s, Style: yaml.DoubleQuotedStyle}
	}
	if strings.ContainsFunc(s, disturbs) {
		n.Style = yaml.DoubleQuotedStyle
	}
	return n
}

func disturbs(r rune) bool {
	return unicode.IsControl(r) && r != '\n' || unicode.Is(unicode.Bidi_Control, r)
}

// escaped writes what the encoder leaves as it is, though a terminal heeds it. It stands in double quotes only.
func escaped(text []byte) []byte {
	var out []byte
	for _, r := range string(text) {
		if disturbs(r) {
			out = fmt.Appendf(out, "\\u%04X", r)
			continue
		}
		out = utf8.AppendRune(out, r)
	}
	return out
}
