// SPDX-License-Identifier: Apache-2.0

package accesslog

import (
	"sync"
	"time"
)

// sink gathers the entries of one stream.
type sink struct {
	stream stream
	kick   chan struct{}

	mu sync.Mutex
	// open takes the next entry, nil = there is none yet; full are the messages before it.
	open *chunk
	full []*chunk
	// begun are the requests whose beginnings wait for the end, oldest first.
	begun  ring
	ending encoded // the entry at hand

	bytes   int64
	next    uint64 // number of the newest entry
	lost    uint64 // since last told
	flush   time.Duration
	batch   int
	running bool
}

func newSink(at stream) *sink {
	k := &sink{stream: at, kick: make(chan struct{}, 1)}
	k.begun.init()
	return k
}

// empty reports whether nothing waits.
func (k *sink) empty() bool { return k.open == nil && len(k.full) == 0 && k.begun.empty() }

// add appends an entry to the open message, for which there is room; true = the sender should know.
func (k *sink) add(entry []byte) (kick bool) {
	k.next++
	if k.open == nil {
		k.open = newChunk(k.next)
	}
	c := k.open
	c.add(entry)
	if c.whole() {
		k.full, k.open = append(k.full, c), nil
		return true
	}
	if c.kicked || len(c.b) < k.batch+headroom {
		return false
	}
	c.kicked = true
	return true
}

// wake tells the sender; that it knows already is as good.
func (k *sink) wake() {
	select {
	case k.kick <- struct{}{}:
	default:
	}
}

// take takes a message out of a sink, nil = none. timed: the beginnings that wait are told too. idle: if it is empty its sender ends.
func (k *sink) take(timed, idle bool) *chunk {
	k.mu.Lock()
	defer k.mu.Unlock()
	if timed {
		k.tellBegun()
	}
	var c *chunk
	switch {
	case len(k.full) > 0:
		c = k.full[0]
		if k.full = k.full[1:]; len(k.full) == 0 {
			k.full = nil
		}
	case k.open != nil:
		c, k.open = k.open, nil
	default:
		if idle && k.empty() {
			k.running = false
		}
		return nil
	}
	// What it holds stays counted until it is sent: a server that does not read makes the sink full.
	c.lost, k.lost = k.lost, 0
	if len(k.full) > 0 || timed && k.open != nil {
		k.wake()
	}
	return c
}

// abandon gives up all that waits, and returns how many entries that were.
func (k *sink) abandon() (entries uint64, bytes int64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.tellBegun()
	all := k.full
	if k.open != nil {
		all = append(all, k.open)
	}
	k.full, k.open = nil, nil
	for _, c := range all {
		entries += uint64(c.count)
		bytes += c.size
	}
	k.bytes -= bytes
	return entries, bytes
}

// beginning is the entry of a request that has begun. It waits for the end, for as long as entries may: most ends come before that and repeat all that the
// beginning says, which then is not sent. So a request is one entry more often than two.
type beginning struct {
	logger *logger
	entry  encoded
	// told: it was sent, because its time was over.
	told       bool
	prev, next *beginning
}

// typicalEntry is the room that an entry begins with, maxKept the largest that is kept for other entries.
const typicalEntry, maxKept = 512, 4096

// beginnings that nobody has any more.
var beginnings = sync.Pool{New: func() any { return &beginning{entry: encoded{encoder: encoder{b: make([]byte, 0, typicalEntry)}}} }}

func newBeginning(l *logger) *beginning {
	b := beginnings.Get().(*beginning) //nolint:errcheck // nothing else is put in
	*b = beginning{logger: l, entry: b.entry.emptied()}
	return b
}

// recycle keeps a beginning's room for another request.
func (b *beginning) recycle() {
	if b.logger = nil; cap(b.entry.b) <= maxKept {
		beginnings.Put(b)
	}
}

// tellBegun moves the beginnings that wait to where they are sent.
func (k *sink) tellBegun() {
	for b := k.begun.first(); b != nil; b = k.begun.first() {
		k.begun.remove(b)
		b.told = true
		k.add(b.entry.b)
	}
}

// ring is a list of beginnings.
type ring struct{ root beginning }

func (r *ring) init() { r.root.prev, r.root.next = &r.root, &r.root }

func (r *ring) empty() bool { return r.root.next == &r.root }

// first returns the oldest; nil = there is none.
func (r *ring) first() *beginning {
	if r.empty() {
		return nil
	}
	return r.root.next
}

func (r *ring) push(b *beginning) {
	b.prev, b.next = r.root.prev, &r.root
	b.prev.next, r.root.prev = b, b
}

func (r *ring) remove(b *beginning) {
	b.prev.next, b.next.prev = b.next, b.prev
	b.prev, b.next = nil, nil
}
