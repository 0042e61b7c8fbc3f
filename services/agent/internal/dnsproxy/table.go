// SPDX-License-Identifier: Apache-2.0

package dnsproxy

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"sync"
	"time"

	"github.com/weirmesh/weir/services/agent/internal/dnswire"
)

// table holds the queries that wait for one server on one socket, by the number that they were sent with. Numbers are random and say nothing of the
// clients'. The zero table is ready.
type table struct {
	mu      sync.Mutex
	queries map[uint16]*query
}

// maxTable leaves numbers to guess.
const maxTable = 4096

var errTableFull = errors.New("too many queries wait for one server")

// add gives a query a number.
func (t *table) add(q *query) (uint16, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.queries == nil {
		t.queries = map[uint16]*query{}
	}
	if len(t.queries) >= maxTable {
		return 0, errTableFull
	}
	for {
		var b [2]byte
		_, _ = rand.Read(b[:]) // never fails
		id := binary.NativeEndian.Uint16(b[:])
		if _, taken := t.queries[id]; !taken {
			q.since = time.Now()
			t.queries[id] = q
			return id, nil
		}
	}
}

// drop forgets a query that was not sent.
func (t *table) drop(id uint16) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.queries, id)
}

// take finds the query that a message answers, by number and question, and makes the number the client's. nil: it answers none; whoever waits for the
// number waits on.
func (t *table) take(msg []byte) *query {
	if len(msg) < dnswire.HeaderSize {
		return nil
	}
	id := dnswire.ID(msg)
	t.mu.Lock()
	defer t.mu.Unlock()
	q := t.queries[id]
	if q == nil {
		return nil
	}
	head, err := dnswire.ReadAnswerHead(msg, q.Name)
	if err != nil {
		return nil
	}
	// Later messages of a zone transfer may go without a question.
	if !head.Answers(q.Wire) && (!q.transfer() || len(head.Wire) > 0) {
		return nil
	}
	if q.transfer() {
		q.since = time.Now()
	} else {
		delete(t.queries, id)
	}
	dnswire.SetID(msg, q.ID)
	return q
}

// overdue takes the queries that have waited since before a time.
func (t *table) overdue(before time.Time, out []*query) []*query {
	t.mu.Lock()
	defer t.mu.Unlock()
	for id, q := range t.queries {
		if q.since.Before(before) {
			delete(t.queries, id)
			out = append(out, q)
		}
	}
	return out
}

// clear takes all.
func (t *table) clear() []*query {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]*query, 0, len(t.queries))
	for _, q := range t.queries {
		out = append(out, q)
	}
	t.queries = nil
	return out
}

func (t *table) len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.queries)
}
