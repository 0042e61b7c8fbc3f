// SPDX-License-Identifier: Apache-2.0

// Package fakexds is an xDS server for tests: it serves what it is told to, remembers what clients say, and misbehaves on request.
package fakexds

import (
	"errors"
	"maps"
	"net"
	"slices"
	"strconv"
	"sync"
	"testing"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// Server serves the incremental protocol.
type Server struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer

	mu        sync.Mutex
	resources map[string]map[string]*discoveryv3.Resource // by type and name
	version   int
	changed   chan struct{} // closed at each change
	requests  []*discoveryv3.DeltaDiscoveryRequest
	streams   int
	cut       chan struct{} // closed to end all streams
}

// New makes a server without resources.
func New() *Server {
	return &Server{resources: map[string]map[string]*discoveryv3.Resource{}, changed: make(chan struct{}), cut: make(chan struct{})}
}

// Serve serves on a listener until the test ends or stop is called.
func (s *Server) Serve(t testing.TB, ln net.Listener, options ...grpc.ServerOption) (stop func()) {
	t.Helper()
	server := grpc.NewServer(append(options, grpc.MaxRecvMsgSize(64<<20))...)
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(server, s)
	var group sync.WaitGroup
	group.Go(func() {
		if err := server.Serve(ln); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Errorf("fake xDS server: %v", err)
		}
	})
	stop = sync.OnceFunc(func() {
		server.Stop()
		group.Wait()
	})
	t.Cleanup(stop)
	return stop
}

// Set adds or changes resources.
func (s *Server) Set(t testing.TB, name string, m proto.Message) {
	t.Helper()
	body, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	s.SetAny(name, body.GetTypeUrl(), body)
}

// SetAny adds or changes a resource that need not be one.
func (s *Server) SetAny(name, typeURL string, body *anypb.Any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.resources[typeURL] == nil {
		s.resources[typeURL] = map[string]*discoveryv3.Resource{}
	}
	s.version++
	s.resources[typeURL][name] = &discoveryv3.Resource{Name: name, Version: strconv.Itoa(s.version), Resource: body}
	s.wake()
}

// Delete removes a resource.
func (s *Server) Delete(typeURL, name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.resources[typeURL], name)
	s.wake()
}

func (s *Server) wake() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// Cut ends all streams.
func (s *Server) Cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.cut)
	s.cut = make(chan struct{})
}

// Requests returns what clients said so far.
func (s *Server) Requests() []*discoveryv3.DeltaDiscoveryRequest {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.requests)
}

// Nacks returns the reasons of all refusals so far.
func (s *Server) Nacks() []string {
	var all []string
	for _, r := range s.Requests() {
		if r.GetErrorDetail() != nil {
			all = append(all, r.GetErrorDetail().GetMessage())
		}
	}
	return all
}

// Streams returns how many streams were begun.
func (s *Server) Streams() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.streams
}

// watch is what one stream wants of one type.
type watch struct {
	whole bool
	names map[string]bool
	has   map[string]string // versions
	first bool
}

// DeltaAggregatedResources implements the service.
func (s *Server) DeltaAggregatedResources(stream discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	s.mu.Lock()
	s.streams++
	cut := s.cut
	s.mu.Unlock()
	requests := make(chan *discoveryv3.DeltaDiscoveryRequest)
	go func() {
		defer close(requests)
		for {
			r, err := stream.Recv()
			if err != nil {
				return
			}
			select {
			case requests <- r:
			case <-stream.Context().Done():
				return
			}
		}
	}()
	watches := map[string]*watch{}
	for {
		s.mu.Lock()
		changed := s.changed
		s.mu.Unlock()
		for _, typeURL := range slices.Sorted(maps.Keys(watches)) {
			if r := s.difference(typeURL, watches[typeURL]); r != nil {
				if err := stream.Send(r); err != nil {
					return err
				}
			}
		}
		select {
		case <-cut:
			return nil
		case <-changed:
		case r, ok := <-requests:
			if !ok {
				return nil
			}
			s.heard(r, watches)
		}
	}
}

func (s *Server) heard(r *discoveryv3.DeltaDiscoveryRequest, watches map[string]*watch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests = append(s.requests, r)
	w := watches[r.GetTypeUrl()]
	if w == nil {
		w = &watch{
			whole: len(r.GetResourceNamesSubscribe()) == 0, names: map[string]bool{}, has: maps.Clone(r.GetInitialResourceVersions()), first: true,
		}
		if w.has == nil {
			w.has = map[string]string{}
		}
		watches[r.GetTypeUrl()] = w
	}
	for _, name := range r.GetResourceNamesSubscribe() {
		w.names[name] = true
	}
	for _, name := range r.GetResourceNamesUnsubscribe() {
		delete(w.names, name)
		delete(w.has, name)
	}
}

// difference is what a watch lacks; nil = nothing.
func (s *Server) difference(typeURL string, w *watch) *discoveryv3.DeltaDiscoveryResponse {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: typeURL, Nonce: strconv.Itoa(s.version) + "/" + strconv.Itoa(len(s.requests))}
	have := s.resources[typeURL]
	for _, name := range slices.Sorted(maps.Keys(have)) {
		if (w.whole || w.names[name]) && w.has[name] != have[name].GetVersion() {
			r.Resources = append(r.Resources, have[name])
			w.has[name] = have[name].GetVersion()
		}
	}
	for name := range w.has {
		if have[name] == nil {
			r.RemovedResources = append(r.RemovedResources, name)
			delete(w.has, name)
		}
	}
	if len(r.GetResources())+len(r.GetRemovedResources()) == 0 && (!w.first || !w.whole) {
		return nil
	}
	w.first = false
	return r
}
