// SPDX-License-Identifier: Apache-2.0

// Package policysync is the agent's end of the policy service's streams, one to every replica. Registrations of local endpoints go to all of them; state
// comes from one, the leading stream, and another takes the lead when it breaks. A revision is acknowledged, on each stream, when the maps hold what that
// stream has said. The last state is kept on disk for the time when no replica answers.
package policysync

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
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
	// Refusals, if set, returns what of the state is not in force, and why. It must not call the client.
	Refusals func() map[desired.Key]string
	// Changed, if set, is called when Status changes. It must not call the client.
	Changed func(Status)
	Now     func() time.Time
	Log     *slog.Logger
}

// Status says how things stand with the policy service.
type Status struct {
	// Connected: there is a leading stream. Address is its replica, Streams counts all that are open.
	Connected bool
	Address   string
	Streams   int
	// Revision of the leading stream that the maps hold.
	Revision uint64
	// Complete: this process has had the whole state from a policy service.
	Complete bool
	// StateTime is when the state in use was last known to be current; zero = there is none.
	StateTime time.Time
	// Rejected counts resources that could not be read, Failed writes to maps that failed.
	Rejected, Failed uint64
}

// Client is safe for concurrent use.
type Client struct {
	cfg   Config
	log   *slog.Logger
	links []*link

	// applying makes changes of the state one after the other; it is taken before mu.
	applying sync.Mutex
	lead     *link // owned by applying

	mu        sync.Mutex
	status    Status
	endpoints map[string]*policyv1.Endpoint // registered, by uid
	waiting   map[string]chan Spread        // by uid: who waits for Spread
	slots     *policyv1.SlotReport          // nil = not known
	dirty     bool
}

// New makes a client.
func New(cfg Config) *Client {
	c := &Client{cfg: cfg, log: cfg.Log.With("component", "policysync"), endpoints: map[string]*policyv1.Endpoint{},
		waiting: map[string]chan Spread{}}
	for _, a := range cfg.Addresses {
		c.links = append(c.links, newLink(c, a))
	}
	return c
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

func (c *Client) setStatus(f func(*Status)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f(&c.status)
	if c.cfg.Changed != nil {
		c.cfg.Changed(c.status)
	}
}

// Run keeps a stream to each of the replicas until ctx ends.
func (c *Client) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, l := range c.links {
		group.Go(func() error { return l.run(ctx) })
	}
	group.Go(func() error { return c.keepSaved(ctx) })
	return group.Wait()
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

// Register tells every replica, now and after every reconnection, that an endpoint is ready. The channel yields once, if and when the leading
// replica answers.
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
	for _, l := range c.links {
		l.queueLocked(&policyv1.SyncRequest{Message: &policyv1.SyncRequest_Register{Register: r}})
	}
	return ch
}

// Unregister tells every replica that an endpoint is gone.
func (c *Client) Unregister(uid string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.endpoints, uid)
	delete(c.waiting, uid)
	for _, l := range c.links {
		l.queueLocked(&policyv1.SyncRequest{Message: &policyv1.SyncRequest_Unregister{Unregister: uid}})
	}
}

// Slot is a number of this node's proxies in use.
type Slot struct {
	Number, Port uint16
	// Key of its filter.
	Key string
}

// SetSlots tells every replica, now and after every reconnection, which slots are in use: all of them. Before the first call nothing is told, and the
// node's proxy keeps what it has.
func (c *Client) SetSlots(list []Slot) {
	report := &policyv1.SlotReport{}
	for _, s := range list {
		report.Slots = append(report.Slots, &policyv1.Slot{Number: uint32(s.Number), Key: s.Key, Port: uint32(s.Port)})
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.slots = report
	for _, l := range c.links {
		l.queueLocked(&policyv1.SyncRequest{Message: &policyv1.SyncRequest_Slots{Slots: report}})
	}
}

// spread takes a replica's answer to a registration. The leading one knows best which nodes hold an address; what another refuses is only logged.
func (c *Client) spread(l *link, s *policyv1.Spread) {
	if strings.Contains(s.GetError(), notYet) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	leading := !c.status.Connected || c.status.Address == l.address
	if ch := c.waiting[s.GetUid()]; ch != nil && leading {
		delete(c.waiting, s.GetUid())
		ch <- Spread{LateNodes: s.GetLateNodes(), Refused: s.GetError()}
		return
	}
	if s.GetError() != "" {
		c.log.Error("an endpoint does not spread", "uid", s.GetUid(), "replica", l.address, "reason", s.GetError())
	}
}

// update takes a message of a stream into its view and, if the stream leads, into the state.
func (c *Client) update(l *link, u *policyv1.Update) error {
	c.applying.Lock()
	defer c.applying.Unlock()
	upserts, removals, err := convert(u)
	changed, lost := changedSelectors(u.GetSelectorChanges(), upserts, l.view)
	if lost != nil {
		// Whoever is in that set is not known any more: the next stream says it all again.
		return lost
	}
	upserts = append(upserts, changed...)
	if err != nil {
		// A resource that cannot be read is left out and counted; it must not keep the others away.
		c.log.Error("policy service sent what cannot be read", "replica", l.address, "error", err)
		c.setStatus(func(s *Status) { s.Rejected++ })
	}
	l.take(u.GetRevision(), upserts, removals)
	switch c.lead {
	case nil:
		return c.apply(l, c.follow(l), false)
	case l:
		return c.apply(l, c.cfg.Store.Apply(upserts, removals), false)
	}
	l.acknowledge(c.cfg.Store)
	return nil
}

// complete ends the first state of a stream.
func (c *Client) complete(l *link, revision uint64) error {
	c.applying.Lock()
	defer c.applying.Unlock()
	l.take(revision, nil, nil)
	l.complete = true
	var changes []desired.Change
	switch c.lead {
	case nil:
		changes = c.follow(l)
	case l:
	default:
		l.acknowledge(c.cfg.Store)
		return nil
	}
	return c.apply(l, append(changes, c.cfg.Store.Complete()...), true)
}

// apply takes changes of the leading stream into the maps and acknowledges them, and what other streams said of the same. A map that cannot be
// written ends the stream: the revision is not acknowledged, and the next stream brings everything again.
func (c *Client) apply(l *link, changes []desired.Change, complete bool) error {
	err := c.cfg.Sink.Apply(changes, false)
	if err == nil && complete {
		err = c.cfg.Sink.Prune()
	}
	if err != nil {
		c.setStatus(func(s *Status) { s.Failed++ })
		return fmt.Errorf("apply revision %d: %w", l.revision, err)
	}
	c.setStatus(func(s *Status) {
		s.Revision = l.revision
		s.Complete = s.Complete || complete
	})
	c.mu.Lock()
	c.dirty = true
	c.mu.Unlock()
	for _, other := range c.links {
		other.acknowledge(c.cfg.Store)
	}
	if complete {
		c.log.Info("state is complete", "replica", l.address, "revision", l.revision)
	}
	return nil
}

// follow makes a stream the leading one, and the state what it has said so far.
func (c *Client) follow(l *link) []desired.Change {
	c.lead = l
	c.cfg.Store.Begin()
	c.setStatus(func(s *Status) { s.Connected, s.Address, s.Revision = true, l.address, 0 })
	return c.cfg.Store.Apply(l.view.All(), nil)
}

// ended takes a stream out. If it led, another one that has the whole state takes over at once; else the next message of any does.
func (c *Client) ended(l *link) {
	c.applying.Lock()
	defer c.applying.Unlock()
	l.reset()
	if c.lead != l {
		return
	}
	c.lead = nil
	c.setStatus(func(s *Status) {
		if s.Complete {
			s.StateTime = c.cfg.Now()
		}
		s.Connected, s.Address = false, ""
	})
	for _, other := range c.links {
		if !other.complete {
			continue
		}
		changes := append(c.follow(other), c.cfg.Store.Complete()...)
		if err := c.apply(other, changes, true); err != nil {
			// The mirror tries again by itself; this stream's next message is not acknowledged before it succeeded.
			c.log.Error("state of another replica was not applied", "replica", other.address, "error", err)
		}
		return
	}
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

// changedSelectors makes whole selectors of changes. Upserts of the same update come first.
func changedSelectors(changes []*policyv1.SelectorChange, upserts []desired.Upsert, view *desired.Store) ([]desired.Upsert, error) {
	var out []desired.Upsert
	pending := map[string]*desired.Selector{}
	if len(changes) > 0 {
		for _, u := range upserts {
			if s, ok := u.Resource.(*desired.Selector); ok {
				pending[s.Key] = s
			}
		}
	}
	for _, x := range changes {
		key := desired.Key{Kind: desired.KindSelector, Name: x.GetKey()}
		old := pending[x.GetKey()]
		if old == nil {
			old, _ = view.Get(key).(*desired.Selector)
		}
		if old == nil {
			return nil, fmt.Errorf("policy service changed selector %q, which it has not sent", x.GetKey())
		}
		s := old.Change(x.GetJoined(), x.GetLeft())
		pending[s.Key] = s
		out = append(out, desired.Upsert{Key: key, Resource: s})
	}
	return out, nil
}

// RefusalsChanged tells the replicas what is not in force any more, or again.
func (c *Client) RefusalsChanged() {
	c.applying.Lock()
	defer c.applying.Unlock()
	for _, l := range c.links {
		if l.acked != 0 {
			l.tellRefusals(l.acked)
		}
	}
}
