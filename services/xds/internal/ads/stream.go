// SPDX-License-Identifier: Apache-2.0

package ads

import (
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"

	"github.com/weirmesh/weir/internal/spiffe"
	"github.com/weirmesh/weir/services/xds/internal/render"
)

// streamKey: the library numbers streams of each protocol by itself.
type streamKey struct {
	delta bool
	id    int64
}

// stream is one client's stream. All of it is guarded by the hub's lock.
type stream struct {
	key    streamKey
	peer   spiffe.ID
	node   *node // nil until the first request
	client *client
	// request is the last one, between the two calls in which the library tells of it.
	request   any
	accessLog *render.Resource
	types     [4]exchange
	// retired are clusters and endpoints that are not wanted any more, and stay until the listeners and routes that named them are replaced.
	retired [4]render.Set
	// patience ends the waiting of listeners and routes for clusters, and of clusters for routes.
	patience  *time.Timer
	impatient bool
	// waived are names that were waited for in vain.
	waived map[string]bool
}

// exchange is the state of one type on one stream.
type exchange struct {
	watch   *watch
	started bool
	// wildcard: the last subscription was for everything.
	wildcard bool
	// known are the versions that the client was sent, confirmed the names that it took (or that nobody waits for any more).
	known     map[string]string
	confirmed map[string]bool
	// acked are the versions that the client has taken on this stream, or had when it began.
	acked map[string]string
	// queued was handed to the library, unanswered was sent.
	queued     *message
	unanswered []*message
}

// message is a response and what is in it.
type message struct {
	response any
	nonce    string
	sent     render.Set
	versions map[string]string // that the client knows once it has it
}

// watch is a subscription that waits for something to send; it serves once.
type watch struct {
	subscription cache.Subscription
	version      string // that a client of SotW says it has, on its first request
	sotw         *discoveryv3.DiscoveryRequest
	delta        *discoveryv3.DeltaDiscoveryRequest
	responses    chan cache.Response
	deltas       chan cache.DeltaResponse
}

// visible returns what the stream's subscription should see now.
func (s *stream) visible(t render.Type) render.Set {
	sub := s.types[t].watch.subscription
	set := render.Set{}
	if sub.IsWildcard() {
		for name, r := range s.node.snapshot.Sets[t] {
			if e := s.client.types[t].effective(r); e != nil {
				set[name] = e
			}
		}
		for name, r := range s.retired[t] {
			if set[name] == nil {
				set[name] = r
			}
		}
		if t == render.Cluster && s.accessLog != nil {
			set[s.accessLog.Name] = s.accessLog
		}
	}
	for name := range sub.SubscribedResources() {
		if r := s.find(t, name); r != nil {
			set[name] = r
		}
	}
	return set
}

func (s *stream) find(t render.Type, name string) *render.Resource {
	if t == render.Cluster && s.accessLog != nil && name == s.accessLog.Name {
		return s.accessLog
	}
	if r := s.node.snapshot.Find(t, name); r != nil {
		return s.client.types[t].effective(r)
	}
	return s.retired[t][name]
}

// changes compares what a subscription should see with what the client was sent.
func (x *exchange) changes(visible render.Set) (changed render.Set, removed []string) {
	changed = render.Set{}
	for name, r := range visible {
		if version, ok := x.known[name]; !ok || version != r.Version {
			changed[name] = r
		}
	}
	subscribed := x.watch.subscription.SubscribedResources()
	for name, version := range x.known {
		if visible[name] == nil && version != "" {
			removed = append(removed, name)
		}
	}
	if x.watch.delta != nil {
		for name := range subscribed {
			if _, told := x.known[name]; !told && visible[name] == nil {
				removed = append(removed, name) // it does not exist: say so once
			}
		}
	}
	return changed, removed
}

// forgetUnsubscribed: what a client does not ask for any more it will want anew when it does.
func (x *exchange) forgetUnsubscribed() {
	sub := x.watch.subscription
	if sub.IsWildcard() {
		return
	}
	for name := range x.known {
		if _, ok := sub.SubscribedResources()[name]; !ok {
			delete(x.known, name)
			delete(x.confirmed, name)
			delete(x.acked, name)
		}
	}
}

// ack notes what the client has, as far as it was not sent or told anything else since.
func (x *exchange) ack(set render.Set) {
	if x.acked == nil {
		x.acked = make(map[string]string, len(set))
	}
	for name, r := range set {
		if x.known[name] == r.Version {
			x.acked[name] = r.Version
		}
	}
}

// lose forgets what the client was told to drop: when it comes again, it must be taken again.
func (x *exchange) lose() {
	for name := range x.acked {
		if x.known[name] == "" {
			delete(x.acked, name)
		}
	}
}

// proxies reports whether a stream is a proxy's: it wants all listeners.
func (s *stream) proxies() bool { return s.client != nil && s.types[render.Listener].wildcard }

// due makes the response that an open watch is owed; nil = none.
func (s *stream) due(t render.Type) *message {
	x := &s.types[t]
	visible := s.visible(t)
	changed, removed := x.changes(visible)
	first := !x.started
	if !first && len(changed) == 0 && len(removed) == 0 {
		return nil
	}
	if x.watch.delta != nil {
		return x.deltaMessage(t, visible, changed, removed, first)
	}
	named := !x.watch.subscription.IsWildcard() && (t == render.Endpoint || t == render.Route)
	if first && named && len(visible) == 0 {
		return nil // to say nothing is to say: wait
	}
	version := visible.Version()
	if first && x.watch.version == version {
		// Another replica, or this one before, sent just this.
		x.started = true
		x.known = versionsOf(visible)
		for name := range visible {
			x.confirmed[name] = true
		}
		x.ack(visible)
		s.client.types[t].took(s.own(t, visible))
		return nil
	}
	response := &discoveryv3.DiscoveryResponse{VersionInfo: version, TypeUrl: t.URL()}
	for _, name := range visible.Names() {
		response.Resources = append(response.Resources, visible[name].Body)
	}
	return &message{response: response, sent: visible, versions: versionsOf(visible)}
}

// own leaves out what is not of the present snapshot, and the stream's own cluster.
func (s *stream) own(t render.Type, set render.Set) render.Set {
	own := make(render.Set, len(set))
	for name, r := range set {
		if s.retired[t][name] == nil && r != s.accessLog {
			own[name] = r
		}
	}
	return own
}

// maxUnanswered responses of one type may wait for their answer; of older ones nothing is learned.
const maxUnanswered = 64

// wait notes that a response went out.
func (x *exchange) wait(m *message) {
	x.unanswered = append(x.unanswered, m)
	if len(x.unanswered) > maxUnanswered {
		x.unanswered = x.unanswered[1:]
	}
}

// answered returns the response that a nonce names. In SotW those before it are answered with it; nil = it is none of the last.
func (x *exchange) answered(nonce string, sotw bool) *message {
	for i, m := range x.unanswered {
		if m.nonce != nonce {
			continue
		}
		if sotw {
			x.unanswered = x.unanswered[i+1:]
		} else {
			x.unanswered = append(x.unanswered[:i:i], x.unanswered[i+1:]...)
		}
		return m
	}
	return nil
}

func versionsOf(set render.Set) map[string]string {
	versions := make(map[string]string, len(set))
	for name, r := range set {
		versions[name] = r.Version
	}
	return versions
}

func (x *exchange) deltaMessage(t render.Type, visible, changed render.Set, removed []string, first bool) *message {
	if len(changed) == 0 && len(removed) == 0 && !(first && x.watch.subscription.IsWildcard() && len(x.known) == 0) {
		x.started = true
		return nil
	}
	response := &discoveryv3.DeltaDiscoveryResponse{SystemVersionInfo: visible.Version(), TypeUrl: t.URL(), RemovedResources: removed}
	for _, name := range changed.Names() {
		response.Resources = append(response.Resources, &discoveryv3.Resource{Name: name, Version: changed[name].Version, Resource: changed[name].Body})
	}
	versions := versionsOf(visible)
	for name := range x.watch.subscription.SubscribedResources() {
		if visible[name] == nil {
			versions[name] = "" // told that it does not exist
		}
	}
	return &message{response: response, sent: changed, versions: versions}
}

// send hands a response to the library, which sends it from another goroutine; false = there is no room, which its buffers rule out.
func (x *exchange) send(m *message) bool {
	w := x.watch
	switch response := m.response.(type) {
	case *discoveryv3.DiscoveryResponse:
		select {
		case w.responses <- &cache.PassthroughResponse{Request: w.sotw, DiscoveryResponse: response, ReturnedResources: map[string]string{}}:
		default:
			return false
		}
	case *discoveryv3.DeltaDiscoveryResponse:
		select {
		case w.deltas <- &cache.DeltaPassthroughResponse{
			DeltaRequest: w.delta, DeltaDiscoveryResponse: response, NextVersionMap: map[string]string{},
		}:
		default:
			return false
		}
	}
	x.watch, x.queued, x.started = nil, m, true
	return true
}

// bytes of a response.
func (m *message) bytes() int {
	n := 0
	for _, r := range m.sent {
		n += len(r.Body.GetValue())
	}
	return n
}
