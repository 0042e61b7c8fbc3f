// SPDX-License-Identifier: Apache-2.0

package ads

import (
	"context"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/weirmesh/weir/internal/spiffe"
	"github.com/weirmesh/weir/services/xds/internal/render"
)

// callbacks is what go-control-plane's server tells of streams. For a request it calls OnStream(Delta)Request and then, unless the request is stale,
// Create(Delta)Watch, both in the stream's goroutine.
type callbacks struct{ hub *Hub }

// maxNames is how many resources one request may name.
const maxNames = 20_000

// OnStreamOpen implements sotw.Callbacks.
func (c callbacks) OnStreamOpen(ctx context.Context, id int64, _ string) error {
	return c.hub.open(ctx, streamKey{id: id})
}

// OnDeltaStreamOpen implements delta.Callbacks.
func (c callbacks) OnDeltaStreamOpen(ctx context.Context, id int64, _ string) error {
	return c.hub.open(ctx, streamKey{delta: true, id: id})
}

// OnStreamClosed implements sotw.Callbacks.
func (c callbacks) OnStreamClosed(id int64, _ *corev3.Node) { c.hub.closed(streamKey{id: id}) }

// OnDeltaStreamClosed implements delta.Callbacks.
func (c callbacks) OnDeltaStreamClosed(id int64, _ *corev3.Node) {
	c.hub.closed(streamKey{delta: true, id: id})
}

// OnStreamRequest implements sotw.Callbacks.
func (c callbacks) OnStreamRequest(id int64, req *discoveryv3.DiscoveryRequest) error {
	return c.hub.request(streamKey{id: id}, req, request{
		node: req.GetNode(), url: req.GetTypeUrl(), nonce: req.GetResponseNonce(), names: len(req.GetResourceNames()),
		refusal: req.GetErrorDetail().GetMessage(), refused: req.GetErrorDetail() != nil,
	})
}

// OnStreamDeltaRequest implements delta.Callbacks.
func (c callbacks) OnStreamDeltaRequest(id int64, req *discoveryv3.DeltaDiscoveryRequest) error {
	return c.hub.request(streamKey{delta: true, id: id}, req, request{
		node: req.GetNode(), url: req.GetTypeUrl(), nonce: req.GetResponseNonce(),
		names:   len(req.GetResourceNamesSubscribe()) + len(req.GetInitialResourceVersions()),
		refusal: req.GetErrorDetail().GetMessage(), refused: req.GetErrorDetail() != nil,
	})
}

// OnStreamResponse implements sotw.Callbacks.
func (c callbacks) OnStreamResponse(_ context.Context, id int64, _ *discoveryv3.DiscoveryRequest, r *discoveryv3.DiscoveryResponse) {
	c.hub.sent(streamKey{id: id}, r.GetTypeUrl(), r, r.GetNonce())
}

// OnStreamDeltaResponse implements delta.Callbacks.
func (c callbacks) OnStreamDeltaResponse(id int64, _ *discoveryv3.DeltaDiscoveryRequest, r *discoveryv3.DeltaDiscoveryResponse) {
	c.hub.sent(streamKey{delta: true, id: id}, r.GetTypeUrl(), r, r.GetNonce())
}

// OnFetchRequest implements rest.Callbacks.
func (callbacks) OnFetchRequest(context.Context, *discoveryv3.DiscoveryRequest) error {
	return status.Error(codes.Unimplemented, "only streams are served")
}

// OnFetchResponse implements rest.Callbacks.
func (callbacks) OnFetchResponse(*discoveryv3.DiscoveryRequest, *discoveryv3.DiscoveryResponse) {}

// request is what both protocols' requests have.
type request struct {
	node       *corev3.Node
	url, nonce string
	names      int
	refusal    string
	refused    bool
}

func (h *Hub) open(ctx context.Context, key streamKey) error {
	peer, ok := spiffe.PeerID(ctx)
	if !ok || peer.Node == "" {
		return status.Error(codes.PermissionDenied, "the certificate names no node")
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	n := h.node(peer.Node)
	if len(n.streams) >= h.config.NodeStreams {
		h.forget(n)
		return status.Errorf(codes.ResourceExhausted, "node %s has %d streams, the most that it may", peer.Node, len(n.streams))
	}
	s := &stream{key: key, peer: peer, waived: map[string]bool{}}
	h.streams[key] = s
	n.streams[s] = true
	h.metrics.streams.WithLabelValues(protocol(key)).Inc()
	return nil
}

func protocol(key streamKey) string {
	if key.delta {
		return "delta"
	}
	return "sotw"
}

func (h *Hub) closed(key streamKey) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.streams[key]
	if s == nil {
		return // it was refused
	}
	s.types = [4]exchange{}
	delete(h.streams, key)
	delete(h.requests, s.request)
	if s.patience != nil {
		s.patience.Stop()
	}
	n := h.node(s.peer.Node)
	delete(n.streams, s)
	if s.node != nil {
		n.take() // there may be one less that has to
		h.report(n)
	}
	if s.client != nil {
		s.client.streams--
	}
	h.metrics.streams.WithLabelValues(protocol(key)).Dec()
	h.forget(n)
}

// forget drops clients without streams, when they are too many, and a node that nobody knows.
func (h *Hub) forget(n *node) {
	for name, c := range n.clients {
		if len(n.clients) > maxClients && c.streams == 0 {
			delete(n.clients, name)
		}
	}
	if len(n.streams) == 0 && n.snapshot == nil {
		delete(h.nodes, n.name)
	}
}

func (h *Hub) request(key streamKey, req any, r request) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.streams[key]
	if s == nil {
		return status.Error(codes.Internal, "the stream is not known")
	}
	if err := h.identify(s, r.node); err != nil {
		return err
	}
	t, ok := typeOf(r.url)
	if !ok && !unserved(r.url) {
		return status.Errorf(codes.InvalidArgument, "%.200q is no type of resource", r.url)
	}
	if r.names > maxNames {
		return status.Errorf(codes.InvalidArgument, "%d names in one request, more than %d", r.names, maxNames)
	}
	delete(h.requests, s.request) // of a request that the library found stale
	s.request = req
	h.requests[req] = s
	if !ok {
		return nil
	}
	h.metrics.requests.WithLabelValues(t.String()).Inc()
	h.answer(s, t, r)
	return nil
}

// identify takes the client from its first request and holds it to it.
func (h *Hub) identify(s *stream, n *corev3.Node) error {
	if n != nil && n.GetId() != "" && n.GetId() != s.peer.Node {
		return status.Errorf(codes.PermissionDenied, "node id %.200q is not the certificate's %q", n.GetId(), s.peer.Node)
	}
	if s.node != nil {
		return nil
	}
	if n.GetId() == "" {
		return status.Error(codes.InvalidArgument, "the first request has no node id")
	}
	access, err := render.AccessLogCluster(accessLogPath(n))
	if err != nil {
		return status.Errorf(codes.InvalidArgument, "metadata weir.access_log: %v", err)
	}
	s.accessLog = access
	s.node = h.node(s.peer.Node)
	name := clientName(n)
	c := s.node.clients[name]
	if c == nil {
		c = newClient(name)
		s.node.clients[name] = c
	}
	c.streams++
	s.client = c
	h.forget(s.node)
	return nil
}

func clientName(n *corev3.Node) string {
	version := n.GetUserAgentVersion()
	if v := n.GetUserAgentBuildVersion().GetVersion(); v != nil {
		version = strings.Join([]string{itoa(v.GetMajorNumber()), itoa(v.GetMinorNumber()), itoa(v.GetPatch())}, ".")
	}
	name := strings.TrimSpace(n.GetUserAgentName() + " " + version)
	if name == "" {
		name = "unknown client"
	}
	return clean(name, 100)
}

// accessLogPath reads metadata {"weir": {"access_log": path}}, or {"weir.access_log": path}.
func accessLogPath(n *corev3.Node) string {
	fields := n.GetMetadata().GetFields()
	path := fields["weir"].GetStructValue().GetFields()["access_log"].GetStringValue()
	if path == "" {
		path = fields["weir.access_log"].GetStringValue()
	}
	if len(path) > 107 || !strings.HasPrefix(path, "/") {
		return "" // a socket can not have it
	}
	return path
}

// sent notes what went out.
func (h *Hub) sent(key streamKey, url string, response any, nonce string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.streams[key]
	t, ok := typeOf(url)
	if s == nil || !ok {
		return
	}
	x := &s.types[t]
	if x.queued == nil || x.queued.response != response {
		return
	}
	m := x.queued
	x.queued = nil
	m.nonce = nonce
	x.known = m.versions
	x.lose()
	x.wait(m)
}

// answer takes an acknowledgement or a refusal of a response.
func (h *Hub) answer(s *stream, t render.Type, r request) {
	if r.refused {
		h.metrics.nacks.WithLabelValues(t.String()).Inc()
	}
	if r.nonce == "" {
		return // a new subscription
	}
	x := &s.types[t]
	m := x.answered(r.nonce, !s.key.delta)
	if m == nil {
		if !s.key.delta || r.refused {
			h.metrics.stale.WithLabelValues(t.String()).Inc()
		}
		return
	}
	holdings := s.client.types[t]
	if r.refused {
		h.refused(s, t, m, clean(r.refusal, maxMessage))
		return
	}
	for name := range m.sent {
		x.confirm(name)
	}
	x.ack(m.sent)
	cleared := holdings.took(s.own(t, m.sent))
	if holdings.try(func(name string) *render.Resource { return s.node.snapshot.Find(t, name) }) {
		h.pumpClient(s)
	}
	if s.node.take() || cleared {
		h.report(s.node)
	}
}

func (h *Hub) refused(s *stream, t render.Type, m *message, text string) {
	found := s.client.types[t].refused(s.own(t, m.sent), text)
	h.config.Log.Warn("a client refused resources", "node", s.node.name, "client", s.client.name, "type", t.String(), "resources", found, "error", text)
	if len(found) > 0 {
		h.report(s.node)
	}
	h.pumpClient(s)
}

// pumpClient sends the other streams of a client what changed for it; the stream at hand is about to ask by itself.
func (h *Hub) pumpClient(s *stream) {
	for other := range s.node.streams {
		if other != s && other.client == s.client {
			h.pump(other)
		}
	}
}

// clean makes a client's text fit for logs and reports.
func clean(text string, limit int) string {
	text = strings.ToValidUTF8(text, "?")
	text = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, text)
	if len(text) > limit {
		text = strings.ToValidUTF8(text[:limit], "") + "..."
	}
	return text
}

func itoa(n uint32) string {
	digits := []byte{}
	for {
		digits = append(digits, byte('0'+n%10))
		if n /= 10; n == 0 {
			slices.Reverse(digits)
			return string(digits)
		}
	}
}
