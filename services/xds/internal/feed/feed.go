// SPDX-License-Identifier: Apache-2.0

// Package feed keeps the rendered state in step with the policy service, and tells it what proxies made of it.
package feed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
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
	Client    policyv1.RenderServiceClient
	Publisher Publisher
	Reports   *Reports
	State     *render.State
	Instance  string
	// OnSynced is told when the state is complete, and when the stream to the policy service is lost.
	OnSynced func(bool)
	Log      *slog.Logger
}

// Feed follows the policy service. While it is away, what was published stays.
type Feed struct {
	config   Config
	revision atomic.Uint64
}

// New returns a feed; Run does the work.
func New(config Config) *Feed { return &Feed{config: config} }

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
	retry := firstRetry
	for {
		began := time.Now()
		err := f.watch(ctx)
		if ctx.Err() != nil {
			return nil
		}
		f.config.OnSynced(false)
		f.config.Log.Warn("the stream of the policy service ended", "error", err)
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

func (f *Feed) watch(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	stream, err := f.config.Client.Watch(ctx)
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
	group.Go(func() error { return f.apply(ctx, responses) })
	group.Go(func() error {
		return f.config.Reports.send(ctx, func(report *policyv1.ProxyReport) error {
			return stream.Send(&policyv1.WatchRequest{Message: &policyv1.WatchRequest_Report{Report: report}})
		})
	})
	return group.Wait()
}

// apply takes responses: first a whole state, then changes.
func (f *Feed) apply(ctx context.Context, responses <-chan *policyv1.WatchResponse) error {
	sync := &firstState{seen: map[string]bool{}}
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
		f.take(batch, sync)
	}
}

// firstState is what a new stream has sent so far.
type firstState struct {
	complete bool
	seen     map[string]bool
}

func keyText(k *policyv1.RenderKey) string {
	text, _ := proto.MarshalOptions{Deterministic: true}.Marshal(k) // names that were received are valid text
	return string(text)
}

func (f *Feed) take(batch []*policyv1.WatchResponse, sync *firstState) {
	affected, gone := map[string]bool{}, map[string]bool{}
	state := f.config.State
	var revision uint64
	for _, r := range batch {
		state.Apply(r.GetUpserts(), r.GetRemovals())
		revision = r.GetRevision()
		switch {
		case !sync.complete:
			for _, u := range r.GetUpserts() {
				sync.seen[keyText(render.KeyOf(u))] = true
			}
			for _, k := range r.GetRemovals() {
				delete(sync.seen, keyText(k))
			}
			if r.GetSynced() {
				f.sweep(sync, gone)
				for _, name := range state.Nodes() {
					affected[name] = true
				}
			}
		default:
			for _, name := range state.Affected(r.GetUpserts(), r.GetRemovals()) {
				affected[name] = true
			}
			for _, k := range r.GetRemovals() {
				if name := k.GetNode(); name != "" {
					gone[name] = true
				}
			}
		}
	}
	if !sync.complete {
		return
	}
	f.publish(affected, gone)
	f.revision.Store(revision)
	f.config.OnSynced(true)
}

// sweep drops what is from before the stream and was not sent.
func (f *Feed) sweep(sync *firstState, gone map[string]bool) {
	var removals []*policyv1.RenderKey
	for _, k := range f.config.State.Keys() {
		if !sync.seen[keyText(k)] {
			removals = append(removals, k)
			if k.GetNode() != "" {
				gone[k.GetNode()] = true
			}
		}
	}
	f.config.State.Apply(nil, removals)
	sync.complete, sync.seen = true, nil
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
