// SPDX-License-Identifier: Apache-2.0

package dnsrules

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
)

const (
	retryInterval  = 500 * time.Millisecond
	statusInterval = time.Second
)

// Sync keeps the stream of rules to the agent. Make it with NewSync, call Run once.
type Sync struct {
	rules     *Rules
	client    agentv1.DNSServiceClient
	hello     *agentv1.DNSHello
	status    func() *agentv1.DNSStatus
	changed   func(connected bool)
	connected atomic.Bool
}

// NewSync makes a stream's keeper. status is what the agent is told once a second, when it has changed; changed is called when the stream is complete
// or ends.
func NewSync(rules *Rules, conn grpc.ClientConnInterface, hello *agentv1.DNSHello, status func() *agentv1.DNSStatus, changed func(bool)) *Sync {
	return &Sync{rules: rules, client: agentv1.NewDNSServiceClient(conn), hello: hello, status: status, changed: changed}
}

// Connected reports whether the agent has said all on a stream that is open.
func (s *Sync) Connected() bool { return s.connected.Load() }

// Run keeps a stream until ctx ends. The rules hold while there is none.
func (s *Sync) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		err := s.stream(ctx)
		if s.connected.Swap(false) {
			s.rules.log.Warn("stream of rules ended; the last ones hold", "error", err)
			s.changed(false)
		}
		select {
		case <-ctx.Done():
		case <-time.After(retryInterval):
		}
	}
	return nil
}

// acks carries the last revision that the maps hold.
type acks struct {
	mu   sync.Mutex
	last uint64
	any  bool
	wake chan struct{}
}

func (a *acks) put(revision uint64) {
	a.mu.Lock()
	a.last, a.any = max(a.last, revision), true
	a.mu.Unlock()
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

func (a *acks) take() (uint64, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	was := a.any
	a.any = false
	return a.last, was
}

func (s *Sync) stream(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := s.client.SyncDNS(ctx, grpc.WaitForReady(true))
	if err != nil {
		return fmt.Errorf("open the stream of rules: %w", err)
	}
	if err := stream.Send(&agentv1.SyncDNSRequest{Message: &agentv1.SyncDNSRequest_Hello{Hello: s.hello}}); err != nil {
		return fmt.Errorf("say hello: %w", err)
	}
	pending := &acks{wake: make(chan struct{}, 1)}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		defer cancel()
		return s.receive(stream, pending)
	})
	group.Go(func() error { return s.send(ctx, stream, pending) })
	return group.Wait()
}

func (s *Sync) receive(stream agentv1.DNSService_SyncDNSClient, pending *acks) error {
	state := newSession()
	for {
		m, err := stream.Recv()
		if err != nil {
			if errors.Is(err, io.EOF) {
				return errors.New("the agent closed the stream of rules")
			}
			return fmt.Errorf("receive rules: %w", err)
		}
		if err := s.rules.apply(state, m, func() { pending.put(m.GetRevision()) }); err != nil {
			// The rest holds; what was left out allows nothing.
			s.rules.log.Error("agent sent what cannot be read", "revision", m.GetRevision(), "error", err)
		}
		if m.GetSynced() && !s.connected.Swap(true) {
			filters, policies, _ := s.rules.Counts()
			s.rules.log.Info("rules are complete", "revision", m.GetRevision(), "filters", filters, "policies", policies)
			s.changed(true)
		}
	}
}

func (s *Sync) send(ctx context.Context, stream agentv1.DNSService_SyncDNSClient, pending *acks) error {
	ticker := time.NewTicker(statusInterval)
	defer ticker.Stop()
	var told *agentv1.DNSStatus
	for {
		var m *agentv1.SyncDNSRequest
		select {
		case <-ctx.Done():
			return nil
		case <-pending.wake:
			if revision, ok := pending.take(); ok {
				m = &agentv1.SyncDNSRequest{Message: &agentv1.SyncDNSRequest_Ack{Ack: revision}}
			}
		case <-ticker.C:
			if now := s.status(); !proto.Equal(now, told) {
				told = now
				m = &agentv1.SyncDNSRequest{Message: &agentv1.SyncDNSRequest_Status{Status: now}}
			}
		}
		if m == nil {
			continue
		}
		if err := stream.Send(m); err != nil {
			return fmt.Errorf("send to the agent: %w", err)
		}
	}
}
