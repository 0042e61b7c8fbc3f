// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	flowv1 "github.com/weirmesh/weir/gen/weir/flow/v1"
	"github.com/weirmesh/weir/internal/version"
	"github.com/weirmesh/weir/services/agent/internal/batch"
	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/flow"
	"github.com/weirmesh/weir/services/agent/internal/losses"
	"github.com/weirmesh/weir/services/agent/internal/pipeline"
	"github.com/weirmesh/weir/services/agent/internal/publish"
	"github.com/weirmesh/weir/services/agent/internal/statefile"
)

const (
	sweepInterval = time.Second
	// retryInterval of map writes that failed.
	retryInterval = 5 * time.Second
	// healthRetry is when a health endpoint that could not be made is tried again.
	healthRetry = 15 * time.Second
	// drainTimeout is how long an agent that ends waits for the relay to take what is left.
	drainTimeout = 2 * time.Second
)

// sweeps is what the conntrack collector last saw.
type sweeps struct {
	live, halfOpen, left, failed atomic.Int64
	services                     atomic.Int64 // connections that are translated packet by packet
	collected                    atomic.Uint64
}

// flowEnd is the watermark on disk that a clean end leaves.
type flowEnd struct{ path string }

const (
	flowEndKind    = "flow-end"
	flowEndVersion = 1
)

func (f flowEnd) read() (pipeline.Ended, error) {
	var e pipeline.Ended
	b, err := statefile.Read(f.path, flowEndKind, flowEndVersion)
	if errors.Is(err, fs.ErrNotExist) {
		return e, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &e)
	}
	return e, err
}

func (f flowEnd) write(e pipeline.Ended) error {
	b, err := json.Marshal(e)
	if err != nil {
		return err
	}
	return statefile.Write(f.path, flowEndKind, flowEndVersion, b)
}

func (n *node) setUpFlows() error {
	state, err := n.datapath.Rings().LoadState()
	if err != nil {
		return fmt.Errorf("load flow state: %w", err)
	}
	tracker, err := losses.New(n.path("losses"), n.datapath.Counters, state.Epoch == 0)
	if err != nil {
		// What the last agent told is told again: too much rather than too little.
		n.log.Error("losses told by the last agent are not known", "error", err)
	}
	n.flowEnd = flowEnd{n.path("flow-end")}
	ended, err := n.flowEnd.read()
	if err != nil {
		n.log.Warn("the end of the last agent's flows is not known", "error", err)
	}
	n.pipeline = pipeline.New(pipeline.Config{
		Node: n.config.Node, Cluster: n.config.ClusterName, Rings: n.datapath.Rings(), Losses: tracker, Encoder: n.encoder, Spool: n.spool,
		Events: n.events, Requests: n.requests, Ended: ended, Observe: n.monitor.Observe, Lost: n.lost, Now: n.clock.Now, Log: n.log,
	})
	n.publisher = publish.New(publish.Config{
		Addresses: n.config.Relay, Dial: n.dialer("relay"), Spool: n.spool, Log: n.log,
		Acked: func(b *batch.Sealed) {
			if err := tracker.Stored(b); err != nil {
				n.log.Error("told losses were not saved", "error", err)
			}
		},
	})
	return nil
}

// flowNode is what all flows of this node have in common; d may be nil, when the policy service has not named the node.
func (n *node) flowNode(d *desired.Node) flow.Node {
	f := flow.Node{Cluster: n.config.ClusterName, Name: n.config.Node, Version: strings.TrimPrefix(version.Version, "v"), IPv4: n.uplink.IPv4, IPv6: n.uplink.IPv6}
	if d != nil {
		for _, k := range slices.Sorted(maps.Keys(d.Labels)) {
			f.Labels = append(f.Labels, k+"="+d.Labels[k])
		}
	}
	return f
}

// lost counts a loss for status and metrics.
func (n *node) lost(place flowv1.Place, cause flowv1.Cause, count uint64) {
	n.report.Loss(word(place.String(), "PLACE_"), word(cause.String(), "CAUSE_")).Add(count)
}

// sweep collects connections that have ended; their final records come by the rings.
func (n *node) sweep(ctx context.Context) error {
	tick := time.NewTicker(sweepInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		st, err := n.datapath.Conntrack().Sweep()
		if err != nil {
			n.sweeps.failed.Add(1)
			n.log.Error("connections were not collected", "error", err)
			continue
		}
		n.sweeps.live.Store(int64(st.Live))
		n.sweeps.halfOpen.Store(int64(st.HalfOpen))
		n.sweeps.left.Store(int64(st.Left))
		n.sweeps.collected.Add(uint64(st.Collected))
		n.directory.Expire()
	}
}

// health keeps the node's health endpoint. A node without one serves its pods all the same.
func (n *node) health(ctx context.Context) error {
	for ctx.Err() == nil {
		if err := n.endpoints.RunHealth(ctx); err != nil {
			n.log.Error("no health endpoint", "error", err)
			select {
			case <-ctx.Done():
			case <-time.After(healthRetry):
			}
		}
	}
	return nil
}

// retry writes again what the maps or routes refused.
func (n *node) retry(ctx context.Context) error {
	tick := time.NewTicker(retryInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			if err := n.sink().retry(); err != nil {
				n.log.Error("maps do not hold the desired state", "error", err)
			}
			n.policy.RefusalsChanged()
			n.slots.Proxy()
			n.slots.Settle()
			n.warnOfPressure()
			if st, err := n.datapath.Services().Sweep(); err != nil {
				n.log.Error("connections of services were not collected", "error", err)
			} else {
				n.sweeps.services.Store(int64(st.Live))
			}
		}
	}
}

// drain lets the publisher carry the last batches, and leaves a watermark if it did.
func (n *node) drain(stopSending context.CancelFunc) {
	deadline := time.Now().Add(drainTimeout)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for n.spool.Stats().Batches > 0 && time.Now().Before(deadline) {
		<-tick.C
	}
	stopSending()
	st := n.pipeline.Stats()
	ended := pipeline.Ended{Epoch: st.Epoch, Last: n.spool.Stats().FirstWaiting - 1}
	if err := n.flowEnd.write(ended); err != nil {
		n.log.Error("the end of the flows was not saved", "error", err)
	}
	n.log.Info("agent ends; pods and their traffic go on", "epoch", ended.Epoch, "acknowledged", ended.Last, "next", st.Next)
}
