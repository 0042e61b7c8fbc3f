// SPDX-License-Identifier: Apache-2.0

// Package nodes keeps what the observer knows besides the flows: nodes and how far they have come,
// namespaces, rates, and what was lost.
package nodes

import (
	"cmp"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/gen/flow"
	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	"github.com/weirmesh/weir/internal/batch"
	"github.com/weirmesh/weir/internal/bus"
	"github.com/weirmesh/weir/services/observer/internal/event"
	"github.com/weirmesh/weir/services/observer/internal/mask"
)

const (
	// namespaceAge is how long a namespace is told after its last flow.
	namespaceAge = time.Hour
	// maxNamespaces bounds the table: what comes beyond it is not told.
	maxNamespaces = 100_000
	// presenceAge is how long a relay's word of an agent holds.
	presenceAge = 3 * bus.PresenceInterval
)

// LossKey is a row of the losses.
type LossKey struct {
	NodeName string
	Place    flowv1.Place
	Cause    flowv1.Cause
}

// Loss is how much was lost.
type Loss struct {
	LossKey
	Count uint64
}

// Node is what is known of a node.
type Node struct {
	// Name is cluster/node.
	Name string
	// Version is what the agent calls itself; empty = no flow came yet.
	Version string
	// Address and ServerName are of the agent's connection to a relay; empty = none is known.
	Address, ServerName string
	// Connected: its agent is connected to a relay, or records came lately.
	Connected bool
	// Started is when the newest epoch was first seen; zero = never.
	Started time.Time
	// Records and Flows are what came, each once.
	Records, Flows uint64
	Epoch, LastSeq uint64
	FlowsPerSecond float64
	LastTime       int64
	// Epochs accounts for the numbers of the newest epochs, oldest first.
	Epochs    []Epoch
	relays    map[string]int64 // relay -> until when its word holds
	lastBatch int64
	rate      rate
	started   int64
	versionOf uint64 // epoch whose version was read
}

// Epoch accounts for the numbers of one epoch of a node.
type Epoch struct {
	Number uint64
	// Received and Lost count numbers, each once; Last is the highest that is known to have been given.
	Received, Lost, Last uint64
}

// maxEpochs is how many epochs of a node are accounted for, as many as their numbers are followed.
const maxEpochs = 16

// epoch finds or begins an epoch; nil when it is older than all that are kept.
func (n *Node) epoch(number uint64) *Epoch {
	i, ok := slices.BinarySearchFunc(n.Epochs, number, func(e Epoch, number uint64) int { return cmp.Compare(e.Number, number) })
	if !ok {
		if i == 0 && len(n.Epochs) >= maxEpochs {
			return nil
		}
		n.Epochs = slices.Insert(n.Epochs, i, Epoch{Number: number})
		if len(n.Epochs) > maxEpochs {
			n.Epochs = slices.Delete(n.Epochs, 0, 1)
			i--
		}
	}
	return &n.Epochs[i]
}

// Namespace is a namespace that flows touched.
type Namespace struct{ Cluster, Name string }

// Registry holds all of it. It is safe for concurrent use.
type Registry struct {
	silence time.Duration
	now     func() time.Time
	emitter *mask.Mask // all that is decoded of a flow to learn the agent's version

	mu         sync.Mutex
	nodes      map[string]*Node
	namespaces map[Namespace]int64
	losses     map[LossKey]uint64
	flows      uint64
	rate       rate
}

// New makes a registry. A node is connected while a relay says so, or for silence after its last
// batch.
func New(silence time.Duration, now func() time.Time) *Registry {
	return &Registry{
		silence: silence, now: now, emitter: mask.Paths("emitter"),
		nodes: map[string]*Node{}, namespaces: map[Namespace]int64{}, losses: map[LossKey]uint64{},
	}
}

// Batch notes a batch with new records.
func (r *Registry) Batch(source *event.Source, fresh int) {
	flows := 0
	firstFlow := -1
	for i := range source.Len() {
		if source.Kind(i) == batch.Flow {
			if firstFlow < 0 {
				firstFlow = i
			}
			flows++
		}
	}
	flows = min(flows, fresh) // records that came before are counted then
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.node(source.NodeName)
	n.Records += uint64(fresh)
	n.Flows += uint64(flows)
	r.flows += uint64(flows)
	n.rate.add(source.Arrival, flows)
	r.rate.add(source.Arrival, flows)
	n.lastBatch = max(n.lastBatch, source.Arrival)
	n.LastTime = max(n.LastTime, source.MaxTime)
	if source.Epoch > n.Epoch {
		n.Epoch, n.LastSeq, n.started = source.Epoch, 0, source.MinTime
	}
	if source.Epoch == n.Epoch {
		n.LastSeq = max(n.LastSeq, source.Last())
	}
	if e := n.epoch(source.Epoch); e != nil {
		e.Received += uint64(fresh)
		e.Last = max(e.Last, source.Last())
	}
	if firstFlow >= 0 && n.versionOf != source.Epoch {
		n.versionOf = source.Epoch
		var fl flow.Flow
		if proto.Unmarshal(r.emitter.Append(nil, source.Item(firstFlow)), &fl) == nil && fl.GetEmitter().GetName() != "" {
			n.Version = fl.GetEmitter().GetName() + " " + fl.GetEmitter().GetVersion()
		}
	}
	for _, name := range source.Namespaces {
		if name == "" {
			continue
		}
		key := Namespace{source.Cluster, name}
		if _, ok := r.namespaces[key]; ok || len(r.namespaces) < maxNamespaces {
			r.namespaces[key] = max(r.namespaces[key], source.Arrival)
		}
	}
}

// Gap counts a gap, or takes it back.
func (r *Registry) Gap(g *event.Gap) {
	key := LossKey{g.NodeName, g.Place, g.Cause}
	r.mu.Lock()
	defer r.mu.Unlock()
	if g.Epoch != 0 { // numbers, not records that never got one
		if e := r.node(g.NodeName).epoch(g.Epoch); e != nil {
			e.Last = max(e.Last, g.Last)
			if g.Withdrawn {
				e.Lost -= min(g.Count, e.Lost)
			} else {
				e.Lost += g.Count
			}
		}
	}
	if !g.Withdrawn {
		r.losses[key] += g.Count
		return
	}
	r.losses[key] -= min(g.Count, r.losses[key])
	if r.losses[key] == 0 {
		delete(r.losses, key)
	}
}

// Presence notes a relay's word.
func (r *Registry) Presence(p bus.Presence) {
	now := r.now().UnixNano()
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.node(event.NodeName(cmp.Or(p.Cluster, batch.DefaultCluster), p.Node))
	if n.relays == nil {
		n.relays = map[string]int64{}
	}
	if !p.Connected {
		delete(n.relays, p.Relay)
		return
	}
	maps.DeleteFunc(n.relays, func(_ string, until int64) bool { return until < now })
	n.relays[p.Relay] = now + int64(presenceAge)
	n.Address, n.ServerName = p.Address, p.ServerName
}

func (r *Registry) node(name string) *Node {
	n := r.nodes[name]
	if n == nil {
		n = &Node{Name: name}
		r.nodes[name] = n
	}
	return n
}

// Nodes returns all nodes, by name.
func (r *Registry) Nodes() []Node {
	now := r.now().UnixNano()
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]Node, 0, len(r.nodes))
	for _, name := range slices.Sorted(maps.Keys(r.nodes)) {
		n := *r.nodes[name]
		n.Connected = now-n.lastBatch < int64(r.silence)
		for _, until := range n.relays {
			n.Connected = n.Connected || until >= now
		}
		n.FlowsPerSecond = n.rate.perSecond(now)
		if n.started != 0 {
			n.Started = time.Unix(0, n.started)
		}
		n.relays = nil
		n.Epochs = slices.Clone(n.Epochs)
		out = append(out, n)
	}
	return out
}

// Namespaces returns the namespaces of the last hour, by cluster and name.
func (r *Registry) Namespaces() []Namespace {
	oldest := r.now().Add(-namespaceAge).UnixNano()
	r.mu.Lock()
	defer r.mu.Unlock()
	maps.DeleteFunc(r.namespaces, func(_ Namespace, last int64) bool { return last < oldest })
	return slices.SortedFunc(maps.Keys(r.namespaces), func(a, b Namespace) int {
		return cmp.Or(cmp.Compare(a.Cluster, b.Cluster), cmp.Compare(a.Name, b.Name))
	})
}

// Losses returns what was lost, by node, place and cause.
func (r *Registry) Losses() []Loss {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]Loss, 0, len(r.losses))
	for key, count := range r.losses {
		out = append(out, Loss{key, count})
	}
	slices.SortFunc(out, func(a, b Loss) int {
		return cmp.Or(cmp.Compare(a.NodeName, b.NodeName), cmp.Compare(a.Place, b.Place), cmp.Compare(a.Cause, b.Cause))
	})
	return out
}

// Flows returns how many flows came, and how many a second in the last minute.
func (r *Registry) Flows() (seen uint64, perSecond float64) {
	now := r.now().UnixNano()
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.flows, r.rate.perSecond(now)
}

// rateSpan is the time over which rates are taken, in seconds.
const rateSpan = 60

// rate counts by the second.
type rate struct {
	counts [rateSpan + 1]uint32
	second [rateSpan + 1]int64
	begin  int64
}

func (r *rate) add(at int64, n int) {
	second := at / int64(time.Second)
	if r.begin == 0 {
		r.begin = second
	}
	slot := second % int64(len(r.counts))
	if slot < 0 {
		return
	}
	if r.second[slot] != second {
		if second < r.second[slot] {
			return // older than the span
		}
		r.second[slot], r.counts[slot] = second, 0
	}
	r.counts[slot] += uint32(n)
}

// perSecond is over the last 60 whole seconds, or over what there is of them.
func (r *rate) perSecond(now int64) float64 {
	current := now / int64(time.Second)
	var sum uint64
	for i, second := range r.second {
		if second < current && second >= current-rateSpan {
			sum += uint64(r.counts[i])
		}
	}
	span := min(current-r.begin, rateSpan)
	if r.begin == 0 || span < 1 {
		return 0
	}
	return float64(sum) / float64(span)
}
