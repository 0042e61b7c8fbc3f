// SPDX-License-Identifier: Apache-2.0

package dnsrules

import (
	"sync"

	"github.com/weirmesh/weir/bpf/datapath"
)

// maxWords bounds what is remembered of rows.
const maxWords = 4096

// words remembers what policies' rows decide, for as long as the kernel's own memory of it is good: until policy has another generation. Who an address is,
// and which policy an endpoint has, change without one, and are looked up for every query.
type words struct {
	view View

	mu         sync.Mutex
	generation uint64
	known      map[wordKey]datapath.PolicyRange
}

type wordKey struct {
	policy, peer uint32
	proto        uint8
	port         uint16
}

// lookup is View.Lookup.
func (w *words) lookup(policy, peer uint32, proto uint8, port uint16) (datapath.PolicyRange, bool) {
	// Read first: rows that change while they are read are read again when their generation has come.
	generation, err := w.view.Generation()
	if err != nil {
		return w.view.Lookup(policy, peer, proto, port)
	}
	key := wordKey{policy, peer, proto, port}
	w.mu.Lock()
	if generation != w.generation || len(w.known) >= maxWords {
		w.generation, w.known = generation, map[wordKey]datapath.PolicyRange{}
	}
	word, ok := w.known[key]
	w.mu.Unlock()
	if ok {
		return word, true
	}
	if word, ok = w.view.Lookup(policy, peer, proto, port); !ok {
		return word, false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if generation == w.generation {
		w.known[key] = word
	}
	return word, true
}
