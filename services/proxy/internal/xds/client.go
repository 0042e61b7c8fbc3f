// SPDX-License-Identifier: Apache-2.0

// Package xds is the client of the xDS server: one aggregated stream in the incremental protocol. It knows no resource's meaning: a Handler does, whose
// refusals it tells the server by name.
package xds

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/anypb"
)

// Types of resources.
const (
	Listener = "type.googleapis.com/envoy.config.listener.v3.Listener"
	Route    = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
	Cluster  = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	Endpoint = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
)

// Resource is one resource as it came.
type Resource struct {
	Name, Version string
	Body          *anypb.Any
}

// Handler takes resources. Its methods are called by one goroutine.
type Handler interface {
	// Apply takes what is new and what has gone, and returns what it refuses by name.
	Apply(typeURL string, changed []Resource, removed []string) map[string]error
	// Names are the resources of a type that are wanted, for the types that are not taken whole.
	Names(typeURL string) []string
}

// Config of a client.
type Config struct {
	Conn    grpc.ClientConnInterface
	Node    *corev3.Node
	Handler Handler
	Log     *slog.Logger
}

const (
	// MaxMessage is the largest response that is read. One tenant's huge resource must not end the stream, which is everyone's.
	MaxMessage = 256 << 20
	// maxResource is the largest resource that is taken.
	maxResource = 16 << 20
	// maxReason bounds what a NACK says.
	maxReason = 8 << 10
)

// Client keeps the stream. Make it with New and call Run once.
type Client struct {
	config Config
	kick   chan struct{}
	types  []*subscription

	connected        atomic.Bool
	responses, nacks atomic.Uint64
	failures         atomic.Uint64
}

// subscription is what is had and wanted of one type.
type subscription struct {
	typeURL  string
	whole    bool              // all resources of the type are wanted
	versions map[string]string // of what was accepted last
	names    map[string]bool   // subscribed on this stream
	sent     bool              // a first request was made on this stream
	answered atomic.Bool
}

// New makes a client.
func New(config Config) *Client {
	c := &Client{config: config, kick: make(chan struct{}, 1)}
	// What is led to comes before what leads there.
	for _, t := range []struct {
		url   string
		whole bool
	}{{Cluster, true}, {Endpoint, false}, {Listener, true}, {Route, false}} {
		c.types = append(c.types, &subscription{typeURL: t.url, whole: t.whole, versions: map[string]string{}})
	}
	return c
}

// Kick makes the client ask its handler for the wanted names anew.
func (c *Client) Kick() {
	select {
	case c.kick <- struct{}{}:
	default:
	}
}

// Stats is what the client did.
type Stats struct {
	Connected                bool
	Configured               bool // clusters and listeners have come
	Responses, Nacks, Broken uint64
}

// Stats returns what the client did.
func (c *Client) Stats() Stats {
	return Stats{
		Connected: c.connected.Load(), Configured: c.Configured(),
		Responses: c.responses.Load(), Nacks: c.nacks.Load(), Broken: c.failures.Load(),
	}
}

// Configured reports whether the server has answered for clusters and listeners.
func (c *Client) Configured() bool {
	for _, s := range c.types {
		if s.whole && !s.answered.Load() {
			return false
		}
	}
	return true
}

// Bounds of the pause between streams.
const (
	minPause  = 100 * time.Millisecond
	maxPause  = 5 * time.Second
	goodAfter = 10 * time.Second
)

// Run keeps a stream until ctx ends.
func (c *Client) Run(ctx context.Context) error {
	pause := minPause
	for {
		begun := time.Now()
		err := c.stream(ctx)
		c.connected.Store(false)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // the stream ended because it was told to
		}
		c.failures.Add(1)
		if time.Since(begun) > goodAfter {
			pause = minPause
		}
		c.config.Log.Warn("xDS stream broke; the last configuration stays in force", "error", err, "again_in", pause)
		timer := time.NewTimer(pause/2 + rand.N(pause/2)) //nolint:gosec // jitter
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
		pause = min(2*pause, maxPause)
	}
}

type adsStream = discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient

// stream is the life of one stream.
func (c *Client) stream(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(c.config.Conn).
		DeltaAggregatedResources(ctx, grpc.WaitForReady(true), grpc.MaxCallRecvMsgSize(MaxMessage))
	if err != nil {
		return err
	}
	node := c.config.Node
	send := func(r *discoveryv3.DeltaDiscoveryRequest) error {
		// Only the first request says who we are.
		r.Node, node = node, nil
		return stream.Send(r)
	}
	for _, s := range c.types {
		s.names, s.sent = map[string]bool{}, false
		if err := c.subscribe(s, send); err != nil {
			return err
		}
	}
	responses := make(chan *discoveryv3.DeltaDiscoveryResponse)
	received := make(chan error, 1)
	go func() { received <- receive(ctx, stream, responses) }()
	for {
		select {
		case err := <-received:
			return err
		case r := <-responses:
			c.connected.Store(true)
			if err := c.answer(r, send); err != nil {
				return err
			}
		case <-c.kick:
		}
		for _, s := range c.types {
			if err := c.subscribe(s, send); err != nil {
				return err
			}
		}
	}
}

func receive(ctx context.Context, stream adsStream, to chan<- *discoveryv3.DeltaDiscoveryResponse) error {
	for {
		r, err := stream.Recv()
		if err != nil {
			return err
		}
		select {
		case to <- r:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// subscribe tells the server what is wanted now and was not, and the other way round.
func (c *Client) subscribe(s *subscription, send func(*discoveryv3.DeltaDiscoveryRequest) error) error {
	r := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: s.typeURL}
	if s.whole {
		if s.sent {
			return nil
		}
		s.sent = true
		r.InitialResourceVersions = s.versions
		return send(r)
	}
	wanted := map[string]bool{}
	for _, name := range c.config.Handler.Names(s.typeURL) {
		wanted[name] = true
		if !s.names[name] {
			r.ResourceNamesSubscribe = append(r.ResourceNamesSubscribe, name)
		}
	}
	for name := range s.names {
		if !wanted[name] {
			r.ResourceNamesUnsubscribe = append(r.ResourceNamesUnsubscribe, name)
		}
	}
	// What was not asked for again on a new stream has gone as well.
	var gone []string
	for name := range s.versions {
		if !wanted[name] {
			gone = append(gone, name)
			delete(s.versions, name)
		}
	}
	if len(gone) > 0 {
		c.config.Handler.Apply(s.typeURL, nil, gone)
	}
	if len(r.GetResourceNamesSubscribe())+len(r.GetResourceNamesUnsubscribe()) == 0 {
		return nil
	}
	slices.Sort(r.GetResourceNamesSubscribe())
	slices.Sort(r.GetResourceNamesUnsubscribe())
	if !s.sent {
		r.InitialResourceVersions = s.versions
		s.sent = true
	}
	s.names = wanted
	return send(r)
}

// answer applies a response and says what came of it.
func (c *Client) answer(r *discoveryv3.DeltaDiscoveryResponse, send func(*discoveryv3.DeltaDiscoveryRequest) error) error {
	c.responses.Add(1)
	ack := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: r.GetTypeUrl(), ResponseNonce: r.GetNonce()}
	i := slices.IndexFunc(c.types, func(s *subscription) bool { return s.typeURL == r.GetTypeUrl() })
	if i < 0 {
		ack.ErrorDetail = nack(map[string]error{r.GetTypeUrl(): errors.New("type was not asked for")})
		c.nacks.Add(1)
		return send(ack)
	}
	s := c.types[i]
	refused := map[string]error{}
	var changed []Resource
	for _, in := range r.GetResources() {
		switch {
		case in.GetResource() == nil:
			// A heartbeat.
		case in.GetResource().GetTypeUrl() != s.typeURL:
			refused[in.GetName()] = fmt.Errorf("it is a %s", in.GetResource().GetTypeUrl())
		case len(in.GetResource().GetValue()) > maxResource:
			refused[in.GetName()] = fmt.Errorf("%d bytes, above %d", len(in.GetResource().GetValue()), maxResource)
		default:
			changed = append(changed, Resource{Name: in.GetName(), Version: in.GetVersion(), Body: in.GetResource()})
		}
	}
	for name, err := range c.config.Handler.Apply(s.typeURL, changed, r.GetRemovedResources()) {
		refused[name] = err
	}
	for _, name := range r.GetRemovedResources() {
		delete(s.versions, name)
	}
	for _, in := range changed {
		// What was refused keeps the version of what is in force, so that the server sends it again on another stream.
		if refused[in.Name] == nil {
			s.versions[in.Name] = in.Version
		}
	}
	s.answered.Store(true)
	if len(refused) > 0 {
		c.nacks.Add(1)
		ack.ErrorDetail = nack(refused)
		c.config.Log.Warn("configuration refused", "type", s.typeURL, "reason", ack.GetErrorDetail().GetMessage())
	}
	return send(ack)
}

func nack(refused map[string]error) *rpcstatus.Status {
	names := make([]string, 0, len(refused))
	for name := range refused {
		names = append(names, name)
	}
	slices.Sort(names)
	var reasons []string
	size := 0
	for i, name := range names {
		text := strconv.Quote(name) + ": " + refused[name].Error()
		if size += len(text); size > maxReason {
			if i == 0 {
				reasons = append(reasons, strings.ToValidUTF8(text[:maxReason], ""))
				i++
			}
			reasons = append(reasons, fmt.Sprintf("and %d more", len(names)-i))
			break
		}
		reasons = append(reasons, text)
	}
	return &rpcstatus.Status{Code: int32(codes.InvalidArgument), Message: strings.ToValidUTF8(strings.Join(reasons, "; "), "")}
}
