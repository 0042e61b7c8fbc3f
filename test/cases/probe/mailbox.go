// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"bytes"
	"encoding/binary"
	"sync"
	"sync/atomic"
)

// token is what packets carry, so that whoever gets one knows what it is: magic, kind, the type of the ICMP message it was sent in, number of the
// connection, number of the message.
type token [tokenSize]byte

const tokenSize = 16

var magic = []byte("wrcs")

// Kinds of messages.
const (
	request = 'q' // forward, wants an answer
	answer  = 'a' // to a request
	push    = 'p' // in the reply direction, of the server's own accord
	report  = 'e' // an ICMP error about the connection
)

var numbers atomic.Uint32

func newToken(kind, icmpType byte, connection uint32) token {
	var t token
	copy(t[:], magic)
	t[4], t[5] = kind, icmpType
	binary.BigEndian.PutUint32(t[8:], connection)
	binary.BigEndian.PutUint32(t[12:], numbers.Add(1))
	return t
}

func (t token) kind() byte { return t[4] }

func (t token) connection() uint32 { return binary.BigEndian.Uint32(t[8:]) }

// as is the same message as another kind.
func (t token) as(kind byte) token {
	t[4] = kind
	return t
}

// findToken looks for a token anywhere in a packet.
func findToken(b []byte) (t token, ok bool) {
	i := bytes.Index(b, magic)
	if i < 0 || len(b) < i+tokenSize {
		return t, false
	}
	copy(t[:], b[i:])
	return t, true
}

// arrival is a message that came to a place.
type arrival struct {
	place   string
	message token
}

// mailbox knows what arrived. Safe for concurrent use.
type mailbox struct {
	mu   sync.Mutex
	came map[arrival]bool
	// back sends a message to the client of a connection.
	back    map[uint32]func([]byte) error
	changed chan struct{}
}

func newMailbox() *mailbox {
	return &mailbox{came: map[arrival]bool{}, back: map[uint32]func([]byte) error{}, changed: make(chan struct{})}
}

func (m *mailbox) deliver(place string, t token) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.came[arrival{place, t}] = true
	m.wake()
}

// notify wakes those that watch: something changed that they look at elsewhere.
func (m *mailbox) notify() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.wake()
}

func (m *mailbox) wake() {
	close(m.changed)
	m.changed = make(chan struct{})
}

// arrivedAt returns the first of the places that got the message.
func (m *mailbox) arrivedAt(t token, places []string) (string, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range places {
		if m.came[arrival{p, t}] {
			return p, true
		}
	}
	return "", false
}

// watch is closed at the next delivery.
func (m *mailbox) watch() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.changed
}

// remember notes the way back to a client; the first stays.
func (m *mailbox) remember(connection uint32, back func([]byte) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.back[connection] == nil {
		m.back[connection] = back
	}
}

func (m *mailbox) wayBack(connection uint32) func([]byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.back[connection]
}
