// SPDX-License-Identifier: Apache-2.0

package accesslog

import (
	"strconv"
	"sync"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
)

// Tags of the first entry of a message.
const (
	// TagLost is how many entries of this log were lost since the last message that told.
	TagLost = "weir.lost"
	// TagSequence is the number of the entry in this process and log, from 1, with lost ones counted: a hole shows what a broken stream swallowed.
	TagSequence = "weir.sequence"
)

// Numbers of StreamAccessLogsMessage.
const (
	messageHTTP, messageTCP protowire.Number = 2, 3
	logEntry                protowire.Number = 1
)

const (
	// headroom is what of a message comes before its first entry, at most.
	headroom = 160
	// A message is whole with so many entries, or bytes: a server takes 4 MiB at once.
	maxEntries, maxMessage = 1000, 64 << 10
	// entryOverhead is what an entry takes besides its own bytes.
	entryOverhead = 4
	// typicalChunk is the room that a message begins with.
	typicalChunk = 4096
)

// chunk is a message in the making: its entries are encoded where they are sent from. As a pool of buffers it takes back its own.
type chunk struct {
	b []byte
	// first is where the first entry ends, which has no tag nor length yet: what it says of the message comes before it.
	first  int
	count  int
	number uint64 // of the first entry
	lost   uint64 // entries to be told as lost
	size   int64  // as its entries are counted
	kicked bool   // the sender knows that it has reached the size of a batch
	out    []byte // what is sent of b
}

// chunks keeps the room of messages that have been sent.
var chunks = sync.Pool{New: func() any { return &chunk{b: make([]byte, 0, typicalChunk)} }}

func newChunk(number uint64) *chunk {
	c := chunks.Get().(*chunk) //nolint:errcheck // nothing else is put in
	*c = chunk{b: c.b[:headroom], number: number}
	return c
}

func (c *chunk) add(entry []byte) {
	if c.count > 0 {
		c.b = append(c.b, byte(logEntry<<3|2))
		c.b = protowire.AppendVarint(c.b, uint64(len(entry)))
	}
	c.b = append(c.b, entry...)
	if c.count == 0 {
		c.first = len(c.b)
	}
	c.count++
	c.size += sizeOf(entry)
}

// whole reports whether the next entry is another message's.
func (c *chunk) whole() bool { return c.count >= maxEntries || len(c.b) >= maxMessage }

// sizeOf is what an entry counts as while it waits.
func sizeOf(entry []byte) int64 { return int64(len(entry)) + entryOverhead }

// message completes the message; the first entry carries the tags. gRPC gives the buffer back when it has written it; c is not used after its last Free.
func (c *chunk) message(tcp bool) mem.Buffer {
	field := messageHTTP
	if tcp {
		field = messageTCP
	}
	// A message that comes twice is one: this adds to the first entry's own properties.
	var room [headroom]byte
	tags := encoder{b: room[:0]}
	at := tags.open(entryCommon)
	tags.pair(commonTags, TagSequence, strconv.FormatUint(c.number, 10))
	if c.lost > 0 {
		tags.pair(commonTags, TagLost, strconv.FormatUint(c.lost, 10))
	}
	tags.close(at)

	entry := len(tags.b) + c.first - headroom
	all := protowire.SizeTag(logEntry) + protowire.SizeBytes(entry) + len(c.b) - c.first
	var front [headroom]byte
	head := protowire.AppendVarint(protowire.AppendTag(front[:0], field, protowire.BytesType), uint64(all))
	head = protowire.AppendVarint(protowire.AppendTag(head, logEntry, protowire.BytesType), uint64(entry))
	head = append(head, tags.b...)
	from := headroom - len(head)
	copy(c.b[from:], head)
	c.out = c.b[from:]
	return mem.NewBuffer(&c.out, c)
}

// Get implements mem.BufferPool; nobody asks.
func (*chunk) Get(length int) *[]byte {
	b := make([]byte, length)
	return &b
}

// Put implements mem.BufferPool: the message has been written.
func (c *chunk) Put(*[]byte) {
	if cap(c.b) <= 2*maxMessage {
		chunks.Put(c)
	}
}
