// SPDX-License-Identifier: Apache-2.0

package policysync

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"google.golang.org/grpc"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/services/agent/internal/desired"
)

// link is the stream to one replica, opened anew whenever it breaks.
type link struct {
	client  *Client
	address string
	log     *slog.Logger
	wake    chan struct{}

	// Owned by client.applying: what this replica has said.
	view     *desired.Store
	touched  map[desired.Key]struct{} // since the last acknowledgement
	revision uint64                   // the latest
	acked    uint64
	complete bool
	refused  map[desired.Key]string // as the replica knows it

	// Owned by client.mu.
	open   bool
	outbox []*policyv1.SyncRequest
}

func newLink(c *Client, address string) *link {
	l := &link{client: c, address: address, log: c.log.With("replica", address), wake: make(chan struct{}, 1)}
	l.reset()
	return l
}

// reset forgets what the stream said.
func (l *link) reset() {
	l.view, l.touched = desired.NewStore(), map[desired.Key]struct{}{}
	l.revision, l.acked, l.complete = 0, 0, false
	l.refused = map[desired.Key]string{}
}

// take notes what the replica says.
func (l *link) take(revision uint64, upserts []desired.Upsert, removals []desired.Key) {
	l.view.Apply(upserts, removals)
	l.revision = revision
	for _, u := range upserts {
		l.touched[u.Key] = struct{}{}
	}
	for _, k := range removals {
		l.touched[k] = struct{}{}
	}
}

// acknowledge tells the replica its latest revision if the state holds what it said. A replica whose view differs from the leading one's hears nothing
// until they agree, and counts this node as late: that is the truth.
func (l *link) acknowledge(state *desired.Store) {
	if l.revision == l.acked {
		return
	}
	for k := range l.touched {
		if !desired.Equal(l.view.Get(k), state.Get(k)) {
			return
		}
		delete(l.touched, k)
	}
	l.acked = l.revision
	l.tellRefusals(l.revision)
	l.client.mu.Lock()
	defer l.client.mu.Unlock()
	l.queueLocked(&policyv1.SyncRequest{Message: &policyv1.SyncRequest_Ack{Ack: l.revision}})
}

// tellRefusals tells the replica what has changed of that which is not in force.
func (l *link) tellRefusals(revision uint64) {
	if l.client.cfg.Refusals == nil {
		return
	}
	now := l.client.cfg.Refusals()
	tell := func(k desired.Key, reason string) {
		l.client.mu.Lock()
		defer l.client.mu.Unlock()
		l.queueLocked(&policyv1.SyncRequest{Message: &policyv1.SyncRequest_Refusal{Refusal: &policyv1.Refusal{Revision: revision,
			Resource: &policyv1.ResourceKey{Kind: wireKind(k.Kind), Key: k.Name}, Error: reason}}})
	}
	for k, reason := range now {
		if l.refused[k] != reason {
			l.refused[k] = reason
			tell(k, reason)
		}
	}
	for k := range l.refused {
		if _, still := now[k]; !still {
			delete(l.refused, k)
			tell(k, "")
		}
	}
}

// queueLocked queues a message for the open stream. Without one there is no need to: a new stream begins with every registration, and endpoints
// that are not among them are gone.
func (l *link) queueLocked(r *policyv1.SyncRequest) {
	if !l.open {
		return
	}
	l.outbox = append(l.outbox, r)
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

const (
	firstBackoff = 100 * time.Millisecond
	maxBackoff   = 3 * time.Second
	// openTimeout bounds how long a replica that does not answer is waited for.
	openTimeout = 5 * time.Second
	// longLived streams begin with a short backoff again.
	longLived = 10 * time.Second
)

// run opens the stream again and again until ctx ends.
func (l *link) run(ctx context.Context) error {
	backoff := firstBackoff
	for {
		started := time.Now()
		err := l.stream(ctx)
		l.client.mu.Lock()
		if l.open {
			l.client.status.Streams--
		}
		l.open, l.outbox = false, nil
		l.client.mu.Unlock()
		l.client.ended(l)
		if ctx.Err() != nil {
			return nil
		}
		l.log.Warn("policy stream ended", "error", err)
		if time.Since(started) > longLived {
			backoff = firstBackoff
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(backoff):
		}
		backoff = min(2*backoff, maxBackoff)
	}
}

// stream runs one stream to its end.
func (l *link) stream(ctx context.Context) error {
	conn, err := l.client.cfg.Dial(l.address)
	if err != nil {
		return fmt.Errorf("dial: %w", err)
	}
	defer conn.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	patience := time.AfterFunc(openTimeout, func() { cancel(errors.New("no answer")) })
	defer patience.Stop()
	stream, err := policyv1.NewPolicyServiceClient(conn).Sync(ctx)
	if err != nil {
		return fmt.Errorf("open stream: %w", causeOr(ctx, err))
	}
	l.begin()
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		l.send(ctx, stream)
	}()
	err = causeOr(ctx, l.receive(stream, func() { patience.Stop() }))
	cancel(err)
	<-sent
	return err
}

// begin queues what every stream begins with.
func (l *link) begin() {
	c := l.client
	c.mu.Lock()
	defer c.mu.Unlock()
	l.outbox = []*policyv1.SyncRequest{{Message: &policyv1.SyncRequest_Hello{Hello: &policyv1.Hello{
		Node: c.cfg.Node, Version: c.cfg.Version, Instance: c.cfg.Instance}}}}
	if c.slots != nil {
		l.outbox = append(l.outbox, &policyv1.SyncRequest{Message: &policyv1.SyncRequest_Slots{Slots: c.slots}})
	}
	for _, e := range c.endpoints {
		l.outbox = append(l.outbox, &policyv1.SyncRequest{Message: &policyv1.SyncRequest_Register{Register: e}})
	}
	l.open = true
	c.status.Streams++
}

func causeOr(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return cause
	}
	return err
}

// send is the stream's only sender. When sending fails, the receiver has the reason.
func (l *link) send(ctx context.Context, stream grpc.BidiStreamingClient[policyv1.SyncRequest, policyv1.SyncResponse]) {
	for {
		l.client.mu.Lock()
		out := l.outbox
		l.outbox = nil
		l.client.mu.Unlock()
		for _, r := range out {
			if stream.Send(r) != nil {
				return
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-l.wake:
		}
	}
}

func (l *link) receive(stream grpc.BidiStreamingClient[policyv1.SyncRequest, policyv1.SyncResponse], opened func()) error {
	for {
		r, err := stream.Recv()
		if err != nil {
			return err
		}
		opened()
		switch m := r.GetMessage().(type) {
		case *policyv1.SyncResponse_Update:
			err = l.client.update(l, m.Update)
		case *policyv1.SyncResponse_Synced:
			err = l.client.complete(l, m.Synced.GetRevision())
		case *policyv1.SyncResponse_Spread:
			l.client.spread(l, m.Spread)
		}
		if err != nil {
			return err
		}
	}
}
