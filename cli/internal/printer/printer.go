// SPDX-License-Identifier: Apache-2.0

// Package printer shows flows and events in the formats of `weir observe`.
// compact, dict, table and json are byte for byte what Hubble's command line
// prints; flat is the bare flow for jq.
//
// Everything that came over the wire is made safe for a terminal field by
// field, before the printer adds its own colours and line ends.
package printer

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/weirmesh/weir/gen/observer"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
)

// Format is an output format.
type Format int

// The formats of `--output`.
const (
	Compact Format = iota
	Dict
	Table
	JSON
	Flat
)

// ParseFormat reads a value of --output.
func ParseFormat(s string) (Format, error) {
	switch s {
	case "compact":
		return Compact, nil
	case "dict":
		return Dict, nil
	case "table", "tab":
		return Table, nil
	case "json", "JSON", "jsonpb":
		return JSON, nil
	case "flat":
		return Flat, nil
	}
	return 0, fmt.Errorf("invalid output format: %s", s)
}

// Options say how to print. The zero value is compact, names for addresses, UTC, no colours.
type Options struct {
	Format Format
	// Out takes flows and events, Err node states, and in flat also losses. Nil Err = not shown.
	Out, Err io.Writer
	// Layout of times; empty = StampMilli.
	Layout string
	// Location of times; nil = UTC.
	Location *time.Location
	// Color switches ANSI colours on. They appear in compact and dict only.
	Color bool
	// NodeName shows where a flow was seen, PolicyNames which policies decided it.
	NodeName, PolicyNames bool
	// Stats appends packets, bytes and round trips of the connection to the summary.
	Stats bool
	// Numeric shows addresses in place of names.
	Numeric bool
	// Debug shows all node states; otherwise only those that mean missing flows.
	Debug bool
}

// Printer writes what a stream brings, in order. It is not safe for concurrent
// use. Close flushes; the table format shows nothing before.
type Printer struct {
	opts  Options
	paint painter
	table *tabwriter.Writer
	// records counts what went out, for header and separators.
	records int
	buf     []byte
}

// New returns a printer.
func New(opts Options) *Printer {
	if opts.Layout == "" {
		opts.Layout = time.StampMilli
	}
	if opts.Location == nil {
		opts.Location = time.UTC
	}
	p := &Printer{opts: opts}
	switch opts.Format {
	case Table:
		p.table = tabwriter.NewWriter(opts.Out, 2, 0, 3, ' ', 0)
	case Compact, Dict:
		p.paint.on = opts.Color
	}
	return p
}

// Close writes what is held back.
func (p *Printer) Close() error {
	if p.table != nil {
		return p.table.Flush()
	}
	return nil
}

// Response prints one answer of observer.Observer/GetFlows: a flow, a loss or a node's state.
func (p *Printer) Response(r *observer.GetFlowsResponse) error {
	switch r.GetResponseTypes().(type) {
	case *observer.GetFlowsResponse_Flow:
		return p.flow(r)
	case *observer.GetFlowsResponse_LostEvents:
		return p.lostEvents(r)
	case *observer.GetFlowsResponse_NodeStatus:
		return p.nodeStatus(r)
	}
	return nil
}

// Gap prints a record of missing flows.
func (p *Printer) Gap(g *observerv1.Gap) error { return p.gap(g) }

// Record prints either kind of answer of weir.observer.v1.ObserverService/GetFlows.
func (p *Printer) Record(r *observerv1.GetFlowsResponse) error {
	switch item := r.GetItem().(type) {
	case *observerv1.GetFlowsResponse_Response:
		return p.Response(item.Response)
	case *observerv1.GetFlowsResponse_Gap:
		return p.Gap(item.Gap)
	}
	return nil
}

func (p *Printer) time(t *timestamppb.Timestamp) string {
	if !t.IsValid() { // nil is not
		return "N/A"
	}
	return t.AsTime().In(p.opts.Location).Format(p.opts.Layout)
}

// separate begins a record of the dict format.
func (p *Printer) separate(b *strings.Builder) {
	if p.records > 0 {
		b.WriteString("------------\n")
	}
}

func write(w io.Writer, s string) error {
	if w == nil {
		return nil
	}
	if _, err := io.WriteString(w, s); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

// row writes cells into the table, the head of the table first.
func (p *Printer) row(head, cells []string) error {
	if p.records == 0 {
		if err := write(p.table, strings.Join(head, "\t")+"\n"); err != nil {
			return err
		}
	}
	return write(p.table, strings.Join(cells, "\t")+"\n")
}

// withNode inserts the node behind the first cell when it is asked for.
func (p *Printer) withNode(node string, cells ...string) []string {
	if !p.opts.NodeName {
		return cells
	}
	return append([]string{cells[0], node}, cells[1:]...)
}
