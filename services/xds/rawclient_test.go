// SPDX-License-Identifier: Apache-2.0

package xds_test

import (
	"context"
	"errors"
	"io"
	"slices"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/weirmesh/weir/internal/client"
	"github.com/weirmesh/weir/internal/spiffe"
)

const (
	clusterURL  = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	endpointURL = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
	listenerURL = "type.googleapis.com/envoy.config.listener.v3.Listener"
	routeURL    = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
)

func (c *cluster) dial(id spiffe.ID, addr string) *grpc.ClientConn {
	c.t.Helper()
	conn, err := client.New(client.Config{
		Addresses: []string{addr}, TLS: c.source(id), Service: "xds",
		Options: []grpc.DialOption{grpc.WithDefaultCallOptions(grpc.WaitForReady(true))},
	})
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// sotw is a client that says what a test says.
type sotw struct {
	t      *testing.T
	stream discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesClient
	in     chan *discoveryv3.DiscoveryResponse
	failed chan error
	last   map[string]*discoveryv3.DiscoveryResponse
	names  map[string][]string
	node   *corev3.Node
	cancel context.CancelFunc
}

func (c *cluster) sotw(node, addr string) *sotw {
	c.t.Helper()
	conn := c.dial(spiffe.ID{Service: "proxy", Node: node}, addr)
	ctx, cancel := context.WithCancel(context.Background())
	c.t.Cleanup(cancel)
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).StreamAggregatedResources(ctx)
	if err != nil {
		c.t.Fatal(err)
	}
	s := &sotw{
		t: c.t, stream: stream, in: make(chan *discoveryv3.DiscoveryResponse, 1000), failed: make(chan error, 1), cancel: cancel,
		last: map[string]*discoveryv3.DiscoveryResponse{}, names: map[string][]string{},
		node: &corev3.Node{Id: node, UserAgentName: "test"},
	}
	go func() {
		for {
			response, err := stream.Recv()
			if err != nil {
				s.failed <- err
				return
			}
			s.in <- response
		}
	}()
	return s
}

func (s *sotw) send(r *discoveryv3.DiscoveryRequest) {
	s.t.Helper()
	r.Node = s.node
	if err := s.stream.Send(r); err != nil {
		s.t.Fatal(err)
	}
}

// ask subscribes; version is what the client claims to have.
func (s *sotw) ask(url, version string, names ...string) {
	s.t.Helper()
	s.names[url] = names
	s.send(&discoveryv3.DiscoveryRequest{TypeUrl: url, VersionInfo: version, ResourceNames: names, ResponseNonce: s.last[url].GetNonce()})
}

// receive waits for the next response, which must be of a type.
func (s *sotw) receive(url string) *discoveryv3.DiscoveryResponse {
	s.t.Helper()
	select {
	case r := <-s.in:
		if r.GetTypeUrl() != url {
			s.t.Fatalf("got %s, want %s", r.GetTypeUrl(), url)
		}
		s.last[url] = r
		return r
	case err := <-s.failed:
		s.t.Fatalf("the stream ended: %v", err)
	case <-time.After(deadline):
		s.t.Fatalf("no response of type %s", url)
	}
	return nil
}

func (s *sotw) ack(url string) {
	s.t.Helper()
	r := s.last[url]
	s.send(&discoveryv3.DiscoveryRequest{TypeUrl: url, VersionInfo: r.GetVersionInfo(), ResponseNonce: r.GetNonce(), ResourceNames: s.names[url]})
}

func (s *sotw) nack(url, message string) {
	s.t.Helper()
	s.send(&discoveryv3.DiscoveryRequest{
		TypeUrl: url, ResponseNonce: s.last[url].GetNonce(), ResourceNames: s.names[url],
		ErrorDetail: &rpcstatus.Status{Code: int32(codes.InvalidArgument), Message: message},
	})
}

// quiet proves that the server has nothing to say before it answers another subscription: it works one stream off in order.
func (s *sotw) quiet() {
	s.t.Helper()
	s.ask(clusterURL, "")
	s.receive(clusterURL)
	s.ack(clusterURL)
}

// start subscribes as a proxy does: all listeners, and the routes by name.
func (s *sotw) start(routes ...string) {
	s.t.Helper()
	s.ask(listenerURL, "")
	s.receive(listenerURL)
	s.ack(listenerURL)
	s.ask(routeURL, "", routes...)
	s.receive(routeURL)
	s.ack(routeURL)
}

// ends waits for the end of the stream, with a code; OK is the end by a server that drains.
func (s *sotw) ends(want codes.Code) {
	s.t.Helper()
	select {
	case err := <-s.failed:
		if errors.Is(err, io.EOF) {
			err = nil
		}
		if status.Code(err) != want {
			s.t.Errorf("the stream ended with %v, want %v", err, want)
		}
	case <-time.After(deadline):
		s.t.Fatal("the stream did not end")
	}
}

// bodies are the resources of a response by their name, as text that tests look into.
func bodies(t *testing.T, list []*anypb.Any) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, a := range list {
		m, err := a.UnmarshalNew()
		if err != nil {
			t.Fatal(err)
		}
		named, ok := m.(interface{ GetName() string })
		if !ok {
			t.Fatalf("%s has no name", a.GetTypeUrl())
		}
		all[named.GetName()] = m.(interface{ String() string }).String()
	}
	return all
}

func namesOf(m map[string]string) []string {
	var names []string
	for name := range m {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
