// SPDX-License-Identifier: Apache-2.0

package ingest

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/weirmesh/weir/internal/bus"
	"github.com/weirmesh/weir/internal/spiffe"
)

// Publisher sends a message that nobody stores; *nats.Conn is one.
type Publisher interface {
	Publish(subject string, data []byte) error
}

// Presence tells the observers which agents are connected to this relay.
type Presence struct {
	cluster string
	relay   string
	bus     Publisher
	log     *slog.Logger

	mu    sync.Mutex
	nodes map[string]*present
}

type present struct {
	word    bus.Presence
	streams int
}

// NewPresence makes it; relay must differ between relays.
func NewPresence(cluster, relay string, b Publisher, log *slog.Logger) *Presence {
	return &Presence{cluster: cluster, relay: relay, bus: b, log: log.With("component", "presence"), nodes: map[string]*present{}}
}

// Enter says that an agent opened a stream; call the result when the stream ends.
func (p *Presence) Enter(id spiffe.ID, address string) (leave func()) {
	p.mu.Lock()
	n := p.nodes[id.Node]
	if n == nil {
		n = &present{}
		p.nodes[id.Node] = n
	}
	n.streams++
	n.word = bus.Presence{Cluster: p.cluster, Node: id.Node, Relay: p.relay, Address: address, ServerName: id.String(), Connected: true}
	word := n.word
	p.mu.Unlock()
	p.say(word)
	return func() {
		p.mu.Lock()
		n.streams--
		gone := n.streams == 0
		if gone {
			delete(p.nodes, id.Node)
		}
		word := n.word
		p.mu.Unlock()
		if gone {
			word.Connected = false
			p.say(word)
		}
	}
}

// Count returns the number of connected agents.
func (p *Presence) Count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.nodes)
}

// Run repeats the word of every connected agent until ctx ends.
func (p *Presence) Run(ctx context.Context) error {
	tick := time.NewTicker(bus.PresenceInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		p.mu.Lock()
		words := make([]bus.Presence, 0, len(p.nodes))
		for _, node := range slices.Sorted(maps.Keys(p.nodes)) {
			words = append(words, p.nodes[node].word)
		}
		p.mu.Unlock()
		for _, word := range words {
			p.say(word)
		}
	}
}

// say publishes a word. One that is lost is repeated soon.
func (p *Presence) say(word bus.Presence) {
	data, err := word.Encode()
	if err == nil {
		err = p.bus.Publish(bus.NodeSubject(word.Node), data)
	}
	if err != nil {
		p.log.Debug("presence was not published", "node", word.Node, "error", err)
	}
}
