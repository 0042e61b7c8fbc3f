// SPDX-License-Identifier: Apache-2.0

// Package dnsrecord brings records of queries and answers to the agent: numbered, in order, from a bounded queue. What finds no room, or was sent twice and
// not acknowledged, is counted, and the count is brought to the agent as well.
package dnsrecord

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
)

const (
	maxBatch      = 256
	retryInterval = 500 * time.Millisecond
	// gather is how long records wait for others to be sent with: a message for each costs more than the query.
	gather = 5 * time.Millisecond
)

// Queue is safe for concurrent use. Make it with New.
type Queue struct {
	max  int
	wake chan struct{}

	mu      sync.Mutex
	records []*agentv1.DNSRecord // not acknowledged, in order
	first   uint64               // number of records[0]
	sent    int                  // of records, on this stream
	resent  uint64               // records before this number have been sent on an earlier stream
	untold  uint64               // lost, and the agent was not told
	telling []told               // on this stream, and not acknowledged
	lost    uint64               // since the start
	total   uint64
}

// told is a count of losses in a message that ended with a record's number.
type told struct {
	last, lost uint64
}

// New makes a queue that holds at most size records. Numbers begin at first; a later process must begin above, so that the agent can tell.
func New(size int, first uint64) *Queue {
	return &Queue{max: size, wake: make(chan struct{}, 1), first: max(first, 1)}
}

// Add queues a record, or counts it as lost. It does not block.
func (q *Queue) Add(r *agentv1.DNSRecord) {
	q.mu.Lock()
	q.total++
	if len(q.records) >= q.max {
		q.lost++
		q.untold++
		q.mu.Unlock()
		return
	}
	q.records = append(q.records, r)
	q.mu.Unlock()
	q.kick()
}

func (q *Queue) kick() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// Stats returns how many records there were, wait, and were lost.
func (q *Queue) Stats() (total, waiting, lost uint64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.total, uint64(len(q.records)), q.lost
}

// Run sends to the agent until ctx ends; then it gives what is queued a second.
func (q *Queue) Run(ctx context.Context, conn grpc.ClientConnInterface) error {
	client := agentv1.NewDNSServiceClient(conn)
	for ctx.Err() == nil {
		if err := q.stream(ctx, client); err != nil && ctx.Err() == nil {
			select {
			case <-ctx.Done():
			case <-time.After(retryInterval):
			}
		}
	}
	return nil
}

// lastWait is how long Run goes on for what is queued.
const lastWait = time.Second

func (q *Queue) stream(ctx context.Context, client agentv1.DNSServiceClient) error {
	streamCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	stop := context.AfterFunc(ctx, func() {
		time.AfterFunc(lastWait, cancel)
		q.kick() // to see that nothing waits
	})
	defer stop()
	stream, err := client.SendRecords(streamCtx)
	if err != nil {
		return fmt.Errorf("open the stream of records: %w", err)
	}
	q.begin()
	group, streamCtx := errgroup.WithContext(streamCtx)
	group.Go(func() error {
		for {
			m, err := stream.Recv()
			if err != nil {
				cancel()
				return fmt.Errorf("receive acknowledgements: %w", err)
			}
			q.acknowledge(m.GetLast())
			if ctx.Err() != nil && q.empty() {
				cancel()
			}
		}
	})
	group.Go(func() error {
		for {
			for m := q.next(); m != nil; m = q.next() {
				if err := stream.Send(m); err != nil {
					return fmt.Errorf("send records: %w", err)
				}
			}
			if ctx.Err() != nil && q.empty() {
				cancel()
			}
			select {
			case <-streamCtx.Done():
			case <-ctx.Done():
			case <-time.After(gather):
			}
			select {
			case <-streamCtx.Done():
				return errors.New("the stream of records ended")
			case <-q.wake:
			case <-ctx.Done():
				select {
				case <-streamCtx.Done():
					return nil
				case <-q.wake:
				}
			}
		}
	})
	return group.Wait()
}

func (q *Queue) empty() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.records) == 0 && q.untold == 0 && len(q.telling) == 0
}

// begin makes a new stream begin with what the last one did not get through. What was sent on two streams is lost.
func (q *Queue) begin() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.resent > q.first {
		n := min(int(q.resent-q.first), len(q.records))
		q.lost += uint64(n)
		q.untold += uint64(n)
		q.dropLocked(n)
	}
	q.resent = max(q.resent, q.first+uint64(q.sent))
	q.sent = 0
	for _, t := range q.telling {
		q.untold += t.lost
	}
	q.telling = nil
}

func (q *Queue) dropLocked(n int) {
	clear(q.records[:n])
	q.records = q.records[n:]
	q.first += uint64(n)
	q.sent = max(q.sent-n, 0)
}

// next is the next message, or nil.
func (q *Queue) next() *agentv1.SendRecordsRequest {
	q.mu.Lock()
	defer q.mu.Unlock()
	batch := q.records[q.sent:min(len(q.records), q.sent+maxBatch)]
	if len(batch) == 0 && q.untold == 0 {
		return nil
	}
	m := &agentv1.SendRecordsRequest{First: q.first + uint64(q.sent), Records: append([]*agentv1.DNSRecord(nil), batch...), Lost: q.untold}
	q.sent += len(batch)
	if q.untold > 0 {
		q.telling = append(q.telling, told{q.first + uint64(q.sent) - 1, q.untold})
		q.untold = 0
	}
	return m
}

func (q *Queue) acknowledge(last uint64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if last >= q.first {
		q.dropLocked(min(int(last-q.first)+1, q.sent))
	}
	for len(q.telling) > 0 && q.telling[0].last <= last {
		q.telling = q.telling[1:]
	}
}
