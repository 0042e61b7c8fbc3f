// SPDX-License-Identifier: Apache-2.0

// Package listing prints lists of things: a table for people, an array for jq.
package listing

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/cli/internal/plainjson"
	"github.com/weirmesh/weir/cli/internal/printer"
)

// Table writes rows under a head in aligned columns. Cells are made safe for a terminal.
func Table(w io.Writer, head []string, rows [][]string) error {
	tw := tabwriter.NewWriter(w, 2, 0, 3, ' ', 0)
	fmt.Fprintln(tw, strings.Join(head, "\t"))
	for _, row := range rows {
		cells := make([]string, len(row))
		for i, c := range row {
			cells[i] = printer.Safe(c)
		}
		fmt.Fprintln(tw, strings.Join(cells, "\t"))
	}
	if err := tw.Flush(); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

// Item is one element of an array: a message, and where it is from.
type Item struct {
	Message proto.Message
	// Node is written first, as "node"; empty = left out.
	Node string
}

// JSON writes an indented array of the items.
func JSON(w io.Writer, items []Item) error {
	b, err := Array(items)
	if err != nil {
		return err
	}
	return Indent(w, b)
}

// Array returns the items as a compact array.
func Array(items []Item) ([]byte, error) {
	b := []byte{'['}
	for i, item := range items {
		if i > 0 {
			b = append(b, ',')
		}
		var err error
		if b, err = plainjson.Append(b, item.Message, nodeField(item.Node)...); err != nil {
			return nil, fmt.Errorf("encode list: %w", err)
		}
	}
	return append(b, ']'), nil
}

// Line writes one item as a line of JSON.
func Line(w io.Writer, item Item) error {
	b, err := plainjson.Append(nil, item.Message, nodeField(item.Node)...)
	if err != nil {
		return fmt.Errorf("encode record: %w", err)
	}
	if _, err := w.Write(append(b, '\n')); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

func nodeField(node string) []plainjson.Field {
	if node == "" {
		return nil
	}
	return []plainjson.Field{{Name: "node", Value: node}}
}

// Indent writes JSON with an indent of two spaces and a line end.
func Indent(w io.Writer, compact []byte) error {
	var b bytes.Buffer
	if err := json.Indent(&b, compact, "", "  "); err != nil {
		return fmt.Errorf("encode list: %w", err)
	}
	b.WriteByte('\n')
	if _, err := w.Write(b.Bytes()); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}
