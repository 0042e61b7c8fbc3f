// SPDX-License-Identifier: Apache-2.0

package printer

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/weirmesh/weir/gen/observer"
	"github.com/weirmesh/weir/gen/relay"
)

// nodeNamesWidth is the width up to which node names are listed.
const nodeNamesWidth = 50

// nodeStatus tells on stderr which nodes a stream reaches.
func (p *Printer) nodeStatus(r *observer.GetFlowsResponse) error {
	s := r.GetNodeStatus()
	state := s.GetStateChange()
	if !p.opts.Debug && state != relay.NodeState_NODE_ERROR && state != relay.NodeState_NODE_UNAVAILABLE {
		return nil
	}
	names := joinShort(safeAll(s.GetNodeNames()))
	switch p.opts.Format {
	case JSON:
		return p.json(p.opts.Err, r)
	case Dict:
		message := "N/A"
		if s.GetMessage() != "" {
			message = strconv.Quote(s.GetMessage())
		}
		var b strings.Builder
		p.separate(&b)
		// The next flow needs its separator, whichever stream came first on the screen.
		if p.records == 0 {
			p.records++
		}
		b.WriteString("  TIMESTAMP: " + p.time(r.GetTime()) + "\n      STATE: " + state.String() + "\n      NODES: " + names + "\n    MESSAGE: " + message + "\n")
		return write(p.opts.Err, b.String())
	}
	count := len(s.GetNodeNames())
	var text string
	switch state {
	case relay.NodeState_NODE_CONNECTED:
		text = fmt.Sprintf("Receiving flows from %d nodes: %s", count, names)
	case relay.NodeState_NODE_UNAVAILABLE:
		text = fmt.Sprintf("%d nodes are unavailable: %s", count, names)
	case relay.NodeState_NODE_GONE:
		text = fmt.Sprintf("%d nodes removed from cluster: %s", count, names)
	case relay.NodeState_NODE_ERROR:
		text = fmt.Sprintf("Error %q on %d nodes: %s", s.GetMessage(), count, names)
	default:
		text = fmt.Sprintf("unknown node status %s of %d nodes: %s", state, count, names)
	}
	return write(p.opts.Err, fmt.Sprintf("%s [%s]: %s\n", p.time(r.GetTime()), Safe(r.GetNodeName()), text))
}

// joinShort lists names up to a width, but at least one, and counts the rest.
func joinShort(names []string) string {
	width := 0
	for i, name := range names {
		width += len(name) + len(", ")
		if width > nodeNamesWidth && i > 0 {
			return fmt.Sprintf("%s (and %d more)", strings.Join(names[:i], ", "), len(names)-i)
		}
	}
	return strings.Join(names, ", ")
}
