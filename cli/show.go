// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/cli/internal/listing"
)

// show prints what agents sent, each row behind its node. When no agent gave anything but an error, that error is all there is to see.
func show[T proto.Message](a *app, f *nodeFlags, items []fromNode[T], err error, head []string, row func(T) []string) error {
	if err != nil && len(items) == 0 {
		return nil
	}
	if f.output == "json" {
		list := make([]listing.Item, 0, len(items))
		for _, i := range items {
			list = append(list, listing.Item{Message: i.value, Node: i.node})
		}
		return listing.JSON(a.Out, list)
	}
	rows := make([][]string, 0, len(items))
	for _, i := range items {
		rows = append(rows, append([]string{i.node}, row(i.value)...))
	}
	return listing.Table(a.Out, head, rows)
}
