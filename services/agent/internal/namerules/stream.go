// SPDX-License-Identifier: Apache-2.0

package namerules

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
)

// stream is one weir-dns. Its fields are guarded by the server's mu.
type stream struct {
	server *Server
	wake   chan struct{}
	// To be sent: everything, or what is named.
	whole    bool
	filters  map[uint16]struct{}
	policies map[uint32]struct{}
	acked    uint64
	changed  chan struct{} // closed and replaced when acked rises; closed for good when the stream ends
	ended    bool
	late     bool
}

// signal wakes the sender. The caller holds mu.
func (st *stream) signal() {
	select {
	case st.wake <- struct{}{}:
	default:
	}
}

// await waits until weir-dns holds a revision; a stream that ends is not waited for.
func (st *stream) await(ctx context.Context, revision uint64) bool {
	for {
		st.server.mu.Lock()
		done, changed := st.ended || st.acked >= revision, st.changed
		st.server.mu.Unlock()
		if done {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-changed:
		}
	}
}

// next takes what is to be sent.
func (st *stream) next() *agentv1.SyncDNSResponse {
	s := st.server
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.complete || !st.whole && len(st.filters)+len(st.policies) == 0 {
		return nil
	}
	m := &agentv1.SyncDNSResponse{Revision: s.revision}
	if st.whole {
		m.Synced = true
		for _, f := range s.filters {
			m.Filters = append(m.Filters, f)
		}
		for _, p := range s.policies {
			m.Policies = append(m.Policies, p)
		}
	} else {
		st.changes(m)
	}
	st.whole = false
	clear(st.filters)
	clear(st.policies)
	return m
}

func (st *stream) changes(m *agentv1.SyncDNSResponse) {
	for slot := range st.filters {
		if f := st.server.filters[slot]; f != nil {
			m.Filters = append(m.Filters, f)
		} else {
			m.RemovedFilters = append(m.RemovedFilters, uint32(slot))
		}
	}
	for number := range st.policies {
		if p := st.server.policies[number]; p != nil {
			m.Policies = append(m.Policies, p)
		} else {
			m.RemovedPolicies = append(m.RemovedPolicies, number)
		}
	}
}

// SyncDNS implements DNSService.
func (s *Server) SyncDNS(g grpc.BidiStreamingServer[agentv1.SyncDNSRequest, agentv1.SyncDNSResponse]) error {
	first, err := g.Recv()
	if err != nil {
		return err
	}
	if first.GetHello() == nil {
		return status.Error(codes.InvalidArgument, "hello: it must come first")
	}
	st := &stream{server: s, wake: make(chan struct{}, 1), whole: true, filters: map[uint16]struct{}{}, policies: map[uint32]struct{}{}, changed: make(chan struct{})}
	s.mu.Lock()
	s.streams[st] = struct{}{}
	s.status.Version = first.GetHello().GetVersion()
	st.signal()
	s.mu.Unlock()
	s.log.Info("weir-dns is connected", "version", first.GetHello().GetVersion())
	defer s.leave(st)

	received := make(chan error, 1)
	go func() { received <- s.receive(g, st) }()
	for {
		select {
		case err := <-received:
			return err
		case <-g.Context().Done():
			return g.Context().Err()
		case <-s.cfg.Draining:
			return status.Error(codes.Unavailable, "the agent is stopping")
		case <-st.wake:
		}
		if m := st.next(); m != nil {
			if err := g.Send(m); err != nil {
				return err
			}
		}
	}
}

func (s *Server) leave(st *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.streams, st)
	st.ended = true
	close(st.changed)
	s.log.Warn("weir-dns is gone; what it has written stays")
}

func (s *Server) receive(g grpc.BidiStreamingServer[agentv1.SyncDNSRequest, agentv1.SyncDNSResponse], st *stream) error {
	for {
		r, err := g.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		s.mu.Lock()
		switch m := r.GetMessage().(type) {
		case *agentv1.SyncDNSRequest_Ack:
			if m.Ack > st.acked && m.Ack <= s.revision && !st.ended {
				st.acked = m.Ack
				st.late = st.late && st.acked < s.revision
				close(st.changed)
				st.changed = make(chan struct{})
			}
		case *agentv1.SyncDNSRequest_Status:
			s.status.Names, s.status.Addresses, s.status.Evicted = m.Status.GetNames(), m.Status.GetAddresses(), m.Status.GetEvicted()
		}
		s.mu.Unlock()
	}
}

// SendRecords implements DNSService.
func (s *Server) SendRecords(g grpc.BidiStreamingServer[agentv1.SendRecordsRequest, agentv1.SendRecordsResponse]) error {
	came := make(chan *agentv1.SendRecordsRequest)
	ended := make(chan error, 1)
	go func() {
		for {
			r, err := g.Recv()
			if err != nil {
				ended <- err
				return
			}
			select {
			case came <- r:
			case <-g.Context().Done():
				return
			}
		}
	}()
	for {
		select {
		case r := <-came:
			if err := g.Send(&agentv1.SendRecordsResponse{Last: s.take(r)}); err != nil {
				return err
			}
		case err := <-ended:
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		case <-s.cfg.Draining:
			return status.Error(codes.Unavailable, "the agent is stopping") // what is not acknowledged comes again
		}
	}
}

// take hands records on, less those that came before: what was not acknowledged when a stream ended comes twice.
func (s *Server) take(r *agentv1.SendRecordsRequest) (last uint64) {
	s.mu.Lock()
	if r.GetFirst() == 1 {
		s.last = 0 // a new weir-dns counts anew
	}
	seen := s.last
	last = seen
	if r.GetFirst() > 0 {
		last = max(seen, r.GetFirst()+uint64(len(r.GetRecords()))-1)
	}
	s.last = last
	s.status.Lost += r.GetLost()
	s.mu.Unlock()
	if r.GetLost() > 0 {
		s.cfg.Lost(r.GetLost())
	}
	for i, record := range r.GetRecords() {
		if r.GetFirst()+uint64(i) <= seen || record == nil {
			continue
		}
		s.mu.Lock()
		s.status.Records++
		s.mu.Unlock()
		s.cfg.Record(record)
	}
	return last
}
