// SPDX-License-Identifier: Apache-2.0

// Package policysync is the agent's end of the policy service's stream. It hands the state to a Sink, acknowledges each revision after the sink
// has taken it, registers the local endpoints anew on every stream, and keeps the last state on disk for the time when no policy service answers.
//
// One stream is open at a time; when it breaks, the next address of the list is tried.
package policysync

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/services/agent/internal/desired"
)

// Sink takes the state into the maps.
type Sink interface {
	// Apply makes the maps hold the changes.
	Apply(changes []desired.Change, quiet bool) error
	// Prune removes what is not part of the state; the state is complete.
	Prune() error
}

// Config says how to reach the policy service.
type Config struct {
	// Node, Version and Instance introduce the agent.
	Node, Version, Instance string
	// Addresses of the policy service's replicas.
	Addresses []string
	// Dial opens a connection.
	Dial func(address string) (*grpc.ClientConn, error)
	// StateFile keeps the last state; empty = nowhere.
	StateFile string
	Store     *desired.Store
	Sink      Sink
	// Changed, if set, is called when Status changes.
	Changed func(Status)
	Now     func() time.Time
	Log     *slog.Logger
}

// Status says how things stand with the policy service.
type Status struct {
	Connected bool
	// Address of the replica.
	Address string
	// Revision that the maps hold, of this stream.
	Revision uint64
	// Complete: this process has had the whole state from a policy service.
	Complete bool
	// Since when the stream has been up or down.
	Since time.Time
	// StateTime is when the state in use was last known to be current; zero = there is none.
	StateTime time.Time
	// Rejected counts resources that could not be read, Failed writes to maps that failed.
	Rejected, Failed uint64
}

// Client is safe for concurrent use.
type Client struct {
	cfg Config
	log *slog.Logger

	mu        sync.Mutex
	status    Status
	endpoints map[string]*policyv1.Endpoint // registered, by uid
	waiting   map[string]chan Spread        // by uid: who waits for Spread
	outbox    []*policyv1.SyncRequest
	wake      chan struct{}
	dirty     bool
}

// New makes a client.
func New(cfg Config) *Client {
	return &Client{cfg: cfg, log: cfg.Log.With("component", "policysync"), endpoints: map[string]*policyv1.Endpoint{},
		waiting: map[string]chan Spread{}, wake: make(chan struct{}, 1), status: Status{Since: cfg.Now()}}
}

// Status returns how things stand.
func (c *Client) Status() Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.status
	if s.Connected && s.Complete {
		s.StateTime = c.cfg.Now()
	}
	return s
}

// Endpoint is what a registration says.
type Endpoint struct {
	desired.Endpoint
	NamedPorts map[string]uint32
}

// Spread says how far a registered endpoint has spread.
type Spread struct {
	// LateNodes had not taken its addresses when the policy service's wait ended.
	LateNodes []string
	// Refused says why the endpoint does not spread; empty = it does.
	Refused string
}

// notYet is the one refusal that ends by itself.
const notYet = "not known yet"

// Register tells the policy service, now and after every reconnection, that an endpoint is ready. The channel yields once, if and when the policy
// service answers.
func (c *Client) Register(e Endpoint) <-chan Spread {
	r := &policyv1.Endpoint{Uid: e.UID, Node: c.cfg.Node, Namespace: e.Namespace, Name: e.Name, Identity: e.Identity, NamedPorts: e.NamedPorts}
	for _, a := range e.Addresses {
		r.Addresses = append(r.Addresses, a.String())
	}
	if e.Workload.Name != "" {
		r.Workload = &policyv1.Workload{Kind: e.Workload.Kind, Name: e.Workload.Name}
	}
	ch := make(chan Spread, 1)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.endpoints[e.UID] = r
	c.waiting[e.UID] = ch
	c.sendLocked(&policyv1.SyncRequest{Message: &policyv1.SyncRequest_Register{Register: r}})
	return ch
}

// Unregister tells the policy service that an endpoint is gone.
func (c *Client) Unregister(uid string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.endpoints, uid)
	delete(c.waiting, uid)
	c.sendLocked(&policyv1.SyncRequest{Message: &policyv1.SyncRequest_Unregister{Unregister: uid}})
}

// sendLocked queues a message for the open stream. Without one there is no need to: a new stream begins with every registration, and
// endpoints that are not among them are gone.
func (c *Client) sendLocked(r *policyv1.SyncRequest) {
	if !c.status.Connected {
		return
	}
	c.outbox = append(c.outbox, r)
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func (c *Client) setStatus(f func(*Status)) {
	c.mu.Lock()
	f(&c.status)
	s := c.status
	c.mu.Unlock()
	if c.cfg.Changed != nil {
		c.cfg.Changed(s)
	}
}

// Run keeps a stream to one of the replicas until ctx ends.
func (c *Client) Run(ctx context.Context) error {
	saver := make(chan struct{})
	go func() {
		defer close(saver)
		c.keepSaved(ctx)
	}()
	defer func() { <-saver }()
	backoff := firstBackoff
	for i := 0; ; i++ {
		address := c.cfg.Addresses[i%len(c.cfg.Addresses)]
		started := c.cfg.Now()
		err := c.stream(ctx, address)
		if ctx.Err() != nil {
			return nil
		}
		c.setStatus(func(s *Status) {
			if s.Connected {
				s.Connected, s.Since = false, c.cfg.Now()
				if s.Complete {
					s.StateTime = c.cfg.Now()
				}
			}
		})
		c.log.Warn("policy stream ended", "address", address, "error", err)
		if c.cfg.Now().Sub(started) > 10*time.Second {
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

const (
	firstBackoff = 100 * time.Millisecond
	maxBackoff   = 3 * time.Second
	// openTimeout bounds how long an address that does not answer is waited for.
	openTimeout = 5 * time.Second
)

// stream runs one stream to its end.
func (c *Client) stream(ctx context.Context, address string) error {
	conn, err := c.cfg.Dial(address)
	if err != nil {
		return fmt.Errorf("dial: %w", err)
	}
	defer conn.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	open := time.AfterFunc(openTimeout, func() { cancel(errors.New("no answer")) })
	defer open.Stop()
	stream, err := policyv1.NewPolicyServiceClient(conn).Sync(ctx)
	if err != nil {
		return fmt.Errorf("open stream: %w", causeOr(ctx, err))
	}
	c.cfg.Store.Begin()
	c.mu.Lock()
	c.outbox = []*policyv1.SyncRequest{{Message: &policyv1.SyncRequest_Hello{Hello: &policyv1.Hello{
		Node: c.cfg.Node, Version: c.cfg.Version, Instance: c.cfg.Instance}}}}
	for _, e := range c.endpoints {
		c.outbox = append(c.outbox, &policyv1.SyncRequest{Message: &policyv1.SyncRequest_Register{Register: e}})
	}
	c.status.Connected, c.status.Address, c.status.Revision, c.status.Since = true, address, 0, c.cfg.Now()
	c.mu.Unlock()

	sendDone := make(chan error, 1)
	go func() { sendDone <- c.send(ctx, stream) }()
	err = c.receive(ctx, stream, func() { open.Stop() })
	cancel(err)
	return errors.Join(causeOr(ctx, err), <-sendDone)
}

func causeOr(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return cause
	}
	return err
}

// send is the stream's only sender.
func (c *Client) send(ctx context.Context, stream grpc.BidiStreamingClient[policyv1.SyncRequest, policyv1.SyncResponse]) error {
	for {
		c.mu.Lock()
		out := c.outbox
		c.outbox = nil
		c.mu.Unlock()
		for _, r := range out {
			if err := stream.Send(r); err != nil {
				return nil // the receiver has the reason
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-c.wake:
		}
	}
}

func (c *Client) receive(ctx context.Context, stream grpc.BidiStreamingClient[policyv1.SyncRequest, policyv1.SyncResponse], opened func()) error {
	for {
		r, err := stream.Recv()
		if err != nil {
			return err
		}
		opened()
		switch m := r.GetMessage().(type) {
		case *policyv1.SyncResponse_Update:
			if err := c.update(ctx, m.Update); err != nil {
				return err
			}
		case *policyv1.SyncResponse_Synced:
			changes := c.cfg.Store.Complete()
			err := errors.Join(c.cfg.Sink.Apply(changes, false), c.cfg.Sink.Prune())
			if err != nil {
				return fmt.Errorf("complete state: %w", err)
			}
			c.setStatus(func(s *Status) { s.Complete, s.Revision = true, m.Synced.GetRevision() })
			c.ack(m.Synced.GetRevision())
			c.log.Info("state is complete", "address", c.Status().Address, "revision", m.Synced.GetRevision())
		case *policyv1.SyncResponse_Spread:
			c.spread(m.Spread)
		}
	}
}

func (c *Client) spread(s *policyv1.Spread) {
	if strings.Contains(s.GetError(), notYet) {
		return
	}
	c.mu.Lock()
	ch := c.waiting[s.GetUid()]
	delete(c.waiting, s.GetUid())
	c.mu.Unlock()
	if ch != nil {
		ch <- Spread{LateNodes: s.GetLateNodes(), Refused: s.GetError()}
	} else if s.GetError() != "" {
		c.log.Error("an endpoint does not spread", "uid", s.GetUid(), "reason", s.GetError())
	}
}

// update applies one update. A resource that cannot be read is left out and counted; it must not keep the others away. A map that cannot be
// written ends the stream: the revision is not acknowledged, and the next stream brings everything again.
func (c *Client) update(ctx context.Context, u *policyv1.Update) error {
	upserts, removals, err := convert(u)
	if err != nil {
		c.log.Error("policy service sent what cannot be read", "error", err)
		c.setStatus(func(s *Status) { s.Rejected++ })
	}
	changes := c.cfg.Store.Apply(upserts, removals)
	if err := c.cfg.Sink.Apply(changes, false); err != nil {
		c.setStatus(func(s *Status) { s.Failed++ })
		return fmt.Errorf("apply revision %d: %w", u.GetRevision(), err)
	}
	c.setStatus(func(s *Status) { s.Revision = u.GetRevision() })
	c.ack(u.GetRevision())
	return ctx.Err()
}

func convert(u *policyv1.Update) ([]desired.Upsert, []desired.Key, error) {
	var errs []error
	var upserts []desired.Upsert
	for _, r := range u.GetUpserts() {
		x, err := upsertOf(r)
		if err != nil {
			errs = append(errs, err)
		}
		if x.Key.Name != "" {
			upserts = append(upserts, x)
		}
	}
	var removals []desired.Key
	for _, k := range u.GetRemovals() {
		key, err := keyOf(k)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		removals = append(removals, key)
	}
	return upserts, removals, errors.Join(errs...)
}

func (c *Client) ack(revision uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dirty = true
	c.sendLocked(&policyv1.SyncRequest{Message: &policyv1.SyncRequest_Ack{Ack: revision}})
}
