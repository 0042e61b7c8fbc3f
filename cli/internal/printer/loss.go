// SPDX-License-Identifier: Apache-2.0

package printer

import (
	"fmt"
	"strings"

	"github.com/weirmesh/weir/gen/observer"
	observerv1 "github.com/weirmesh/weir/gen/weir/observer/v1"
)

// lostEvents prints Hubble's record of a loss.
func (p *Printer) lostEvents(r *observer.GetFlowsResponse) error {
	if p.opts.Format == JSON {
		return p.json(p.opts.Out, r)
	}
	e := r.GetLostEvents()
	node := Safe(r.GetNodeName())
	if node == "" {
		node = "-"
	}
	var span string
	if e.GetFirst() != nil && e.GetLast() != nil {
		span = fmt.Sprintf(" (first: %s, last: %s)", p.time(e.GetFirst()), p.time(e.GetLast()))
	}
	cpu, lost := e.GetCpu().GetValue(), e.GetNumEventsLost()
	return p.loss(loss{
		time: p.time(r.GetTime()), node: node, source: e.GetSource().String(), kind: "EVENTS LOST",
		compact: fmt.Sprintf("CPU(%d) %d%s", cpu, lost, span),
		summary: fmt.Sprintf("CPU(%d) - %d%s", cpu, lost, span),
	})
}

// gap prints Weir's record of a loss, which knows the node and the place.
func (p *Printer) gap(g *observerv1.Gap) error {
	at := g.GetFirstTime()
	if at == nil {
		at = g.GetLastTime()
	}
	if p.opts.Format == JSON {
		return p.gapJSON(g, at)
	}
	var more []string
	if g.GetLast() > 0 {
		more = append(more, fmt.Sprintf("epoch: %d, numbers: %d-%d", g.GetEpoch(), g.GetFirst(), g.GetLast()))
	}
	if g.GetFirstTime() != nil && g.GetLastTime() != nil {
		more = append(more, fmt.Sprintf("first: %s, last: %s", p.time(g.GetFirstTime()), p.time(g.GetLastTime())))
	}
	var span string
	if len(more) > 0 {
		span = " (" + strings.Join(more, ", ") + ")"
	}
	kind := "EVENTS LOST"
	if g.GetWithdrawn() {
		// They came after all: an earlier line about them is void.
		kind = "EVENTS FOUND"
	}
	place, cause := Place(g.GetPlace()), Cause(g.GetCause())
	node := Safe(g.GetNodeName())
	return p.loss(loss{
		time: p.time(at), node: node, source: node + " " + place, kind: kind,
		compact: fmt.Sprintf("%s %d%s", cause, g.GetCount(), span),
		summary: fmt.Sprintf("%s - %d%s", cause, g.GetCount(), span),
	})
}

// loss is either record, ready to print.
type loss struct {
	time, node, source, kind, compact, summary string
}

func (p *Printer) loss(l loss) error {
	line := fmt.Sprintf("%s %s: %s %s\n", l.time, l.kind, l.source, l.compact)
	var err error
	switch p.opts.Format {
	case Flat:
		// A flow on every line of the output: jq must not meet anything else there.
		return write(p.opts.Err, line)
	case Compact:
		err = write(p.opts.Out, line)
	case Dict:
		var b strings.Builder
		p.separate(&b)
		b.WriteString("  TIMESTAMP: " + l.time + "\n")
		if p.opts.NodeName {
			b.WriteString("       NODE: " + l.node + "\n")
		}
		b.WriteString("     SOURCE: " + l.source + "\n       TYPE: " + l.kind + "\n    VERDICT: -\n    SUMMARY: " + l.summary + "\n")
		err = write(p.opts.Out, b.String())
	case Table:
		err = p.row(p.withNode("NODE", flowHead...), p.withNode(l.node, l.time, l.source, "-", l.kind, "-", l.summary))
	}
	p.records++
	return err
}

// Place is a place of loss in a word: kernel, agent, spool, relay, nats, observer.
func Place(p interface{ String() string }) string {
	return word(p.String(), "PLACE_")
}

// Cause is a cause of loss in words: full, restart, slow reader.
func Cause(c interface{ String() string }) string {
	return word(c.String(), "CAUSE_")
}

func word(name, prefix string) string {
	if name == prefix+"UNSPECIFIED" {
		return "unknown"
	}
	return strings.ReplaceAll(strings.ToLower(strings.TrimPrefix(name, prefix)), "_", " ")
}
