// SPDX-License-Identifier: Apache-2.0

// Package feed keeps the rendered state in step with the policy service, and tells it what proxies made of it.
package feed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/internal/version"
	"github.com/weirmesh/weir/services/xds/internal/render"
)

// Publisher takes snapshots, and the names of nodes that are gone.
type Publisher interface {
	Publish(snapshots []*render.Snapshot, gone []string)
}

// Config connects a feed.
type Config struct {
	// Clients are the policy service's replicas. Each is watched, since each wants the reports; one at a time gives the state.
	Clients   []policyv1.RenderServiceClient
	Publisher Publisher
	Reports   *Reports
	State     *render.State
	Instance  string
	// OnSynced is told when a state is complete.
	OnSynced func()
	Log      *slog.Logger
}

// Feed follows the policy service. While it is away, what was published stays.
type Feed struct {
	config   Config
	revision atomic.Uint64

	mu       sync.Mutex
	replicas []*replica
	// source is the replica whose state is in force; nil = none.
	source *replica
}

// replica is what one replica of the policy service says. Guarded by the feed's lock.
type replica struct {
	client   policyv1.RenderServiceClient
	number   int
	synced   bool
	revision uint64
	// mirror is its whole state, so that it can take another replica's place at once.
	mirror map[string]*policyv1.RenderResource
}

// New returns a feed; Run does the work.
func New(config Config) *Feed {
	f := &Feed{config: config}
	for i, client := range config.Clients {
		f.replicas = append(f.replicas, &replica{client: client, number: i})
	}
	return f
}

// Revision is that of the last published state.
func (f *Feed) Revision() uint64 { return f.revision.Load() }

const (
	firstRetry = 100 * time.Millisecond
	lastRetry  = 2 * time.Second
	// ahead is how many responses may be read while one is rendered; they are rendered together.
	ahead = 64
)

// Run follows the policy service until ctx ends.
func (f *Feed) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, r := range f.replicas {
		group.Go(func() error { return f.follow(ctx, r) })
	}
	return group.Wait()
}

func (f *Feed) follow(ctx context.Context, r *replica) error {
	retry := firstRetry
	for {
		began := time.Now()
		err := f.watch(ctx, r)
		f.lost(r)
		if ctx.Err() != nil {
			return nil
		}
		f.config.Log.Warn("the stream of a policy service ended", "replica", r.number, "error", err)
		if time.Since(began) > lastRetry {
			retry = firstRetry
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(retry):
		}
		retry = min(2*retry, lastRetry)
	}
}

func (f *Feed) watch(ctx context.Context, r *replica) error {
	group, ctx := errgroup.WithContext(ctx)
	stream, err := r.client.Watch(ctx)
	if err != nil {
		return fmt.Errorf("watch: %w", err)
	}
	hello := &policyv1.RenderHello{Version: version.Version, Instance: f.config.Instance}
	if err := stream.Send(&policyv1.WatchRequest{Message: &policyv1.WatchRequest_Hello{Hello: hello}}); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("watch: %w", err)
	}
	responses := make(chan *policyv1.WatchResponse, ahead)
	group.Go(func() error {
		for {
			response, err := stream.Recv()
			if err != nil {
				return fmt.Errorf("receive: %w", err)
			}
			select {
			case responses <- response:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	})
	group.Go(func() error { return f.apply(ctx, r, responses) })
	group.Go(func() error {
		return f.config.Reports.send(ctx, func(report *policyv1.ProxyReport) error {
			return stream.Send(&policyv1.WatchRequest{Message: &policyv1.WatchRequest_Report{Report: report}})
		})
	})
	return group.Wait()
}

// apply takes responses, all that are there at once.
func (f *Feed) apply(ctx context.Context, r *replica, responses <-chan *policyv1.WatchResponse) error {
	for {
		var batch []*policyv1.WatchResponse
		select {
		case <-ctx.Done():
			return ctx.Err()
		case response := <-responses:
			batch = append(batch, response)
		}
		for more := true; more && len(batch) < ahead; {
			select {
			case response := <-responses:
				batch = append(batch, response)
			default:
				more = false
			}
		}
		f.take(r, batch)
	}
}

func keyText(k *policyv1.RenderKey) string {
	text, _ := proto.MarshalOptions{Deterministic: true}.Marshal(k) // names that were received are valid text
	return string(text)
}

// take notes what a replica said; if it is the source, that is put in force.
func (f *Feed) take(r *replica, batch []*policyv1.WatchResponse) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.mirror == nil {
		r.mirror = map[string]*policyv1.RenderResource{}
	}
	for _, response := range batch {
		for _, u := range response.GetUpserts() {
			r.mirror[keyText(render.KeyOf(u))] = u
		}
		for _, k := range response.GetRemovals() {
			delete(r.mirror, keyText(k))
		}
		r.revision = response.GetRevision()
		r.synced = r.synced || response.GetSynced()
	}
	switch {
	case f.source == r:
		f.change(batch)
		f.revision.Store(r.revision)
	case f.source == nil && r.synced:
		f.choose(r)
	}
}

// lost forgets what a replica said. If it was the source another one takes its place, or what is in force stays.
func (f *Feed) lost(r *replica) {
	f.mu.Lock()
	defer f.mu.Unlock()
	r.synced, r.mirror = false, nil
	if f.source != r {
		return
	}
	f.source = nil
	for _, other := range f.replicas {
		if other.synced {
			f.choose(other)
			return
		}
	}
}

// choose puts the whole state of a replica in force.
func (f *Feed) choose(r *replica) {
	f.source = r
	state := f.config.State
	upserts := make([]*policyv1.RenderResource, 0, len(r.mirror))
	for _, u := range r.mirror {
		upserts = append(upserts, u)
	}
	var removals []*policyv1.RenderKey
	gone := map[string]bool{}
	for _, k := range state.Keys() {
		if _, sent := r.mirror[keyText(k)]; !sent {
			removals = append(removals, k)
			if k.GetNode() != "" {
				gone[k.GetNode()] = true
			}
		}
	}
	state.Apply(upserts, removals)
	affected := map[string]bool{}
	for _, name := range state.Nodes() {
		affected[name] = true
	}
	f.publish(affected, gone)
	f.revision.Store(r.revision)
	f.config.Log.Info("the state of a policy service is in force", "replica", r.number, "revision", r.revision, "resources", len(r.mirror))
	f.config.OnSynced()
}

// change puts the source's changes in force.
func (f *Feed) change(batch []*policyv1.WatchResponse) {
	affected, gone := map[string]bool{}, map[string]bool{}
	state := f.config.State
	for _, r := range batch {
		state.Apply(r.GetUpserts(), r.GetRemovals())
		for _, name := range state.Affected(r.GetUpserts(), r.GetRemovals()) {
			affected[name] = true
		}
		for _, k := range r.GetRemovals() {
			if name := k.GetNode(); name != "" {
				gone[name] = true
			}
		}
	}
	f.publish(affected, gone)
}

func (f *Feed) publish(affected, gone map[string]bool) {
	var snapshots []*render.Snapshot
	known := map[string]bool{}
	for _, name := range f.config.State.Nodes() {
		known[name] = true
		if affected[name] {
			snapshots = append(snapshots, f.config.State.Snapshot(name))
		}
	}
	var names []string
	for name := range gone {
		if !known[name] {
			names = append(names, name)
		}
	}
	f.config.Publisher.Publish(snapshots, names)
}
