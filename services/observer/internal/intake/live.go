// SPDX-License-Identifier: Apache-2.0

package intake

import (
	"github.com/weirmesh/weir/internal/batch"
	"github.com/weirmesh/weir/services/observer/internal/event"
	"github.com/weirmesh/weir/services/observer/internal/store"
)

// Memory is where live events go: flows and gaps into one store, agent events, which are rare and
// would be washed out by flows, into their own. It is a Sink; Commit makes what it took visible.
type Memory struct {
	flows, agentEvents *store.Store
	onGap              func(*event.Gap)
	flowBuf, agentBuf  []event.Event
}

// NewMemory makes the sink; onGap is told of every gap.
func NewMemory(flows, agentEvents *store.Store, onGap func(*event.Gap)) *Memory {
	return &Memory{flows: flows, agentEvents: agentEvents, onGap: onGap}
}

// Record implements Sink.
func (m *Memory) Record(source *event.Source, i int) {
	if source.Kind(i) == batch.AgentEvent {
		// A copy, so that one small event does not hold its whole batch.
		single := event.NewSource(source.Extract(i), source.StreamSeq, source.Arrival)
		m.agentBuf = append(m.agentBuf, event.Event{Source: single})
		return
	}
	m.flowBuf = append(m.flowBuf, event.Event{Source: source, Index: int32(i)})
}

// Gap implements Sink.
func (m *Memory) Gap(gap *event.Gap) {
	m.onGap(gap)
	m.flowBuf = append(m.flowBuf, event.Event{Gap: gap})
}

// Commit hands what came on to the readers.
func (m *Memory) Commit() {
	m.flows.Append(m.flowBuf)
	m.agentEvents.Append(m.agentBuf)
	clear(m.flowBuf)
	clear(m.agentBuf)
	m.flowBuf, m.agentBuf = m.flowBuf[:0], m.agentBuf[:0]
}
