// SPDX-License-Identifier: Apache-2.0

// Package request queues what proxies and weir-dns saw on its way to the flows. The queue is bounded; what finds it full is counted, and told as lost.
package request

import (
	"net/netip"
	"strings"
	"sync"
	"time"

	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/flow"
)

// DefaultQueue is how many requests may wait: some 10 MB with long headers.
const DefaultQueue = 8192

// Queue takes requests from any goroutine and never waits for who takes them out, which is many at once: with a channel each cost a lock on both sides.
type Queue struct {
	mu    sync.Mutex
	ring  []*flow.Request
	head  int // where the oldest is
	count int
	taken uint64
	// Since the start, and how much of it was told.
	all, told Losses
}

// NewQueue makes a queue of that many.
func NewQueue(size int) *Queue { return &Queue{ring: make([]*flow.Request, size)} }

// Put queues a request, or counts it as dropped. Nobody changes it any more.
func (q *Queue) Put(r *flow.Request) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.count == len(q.ring) {
		q.all.Dropped++
		return
	}
	at := q.head + q.count
	if at >= len(q.ring) {
		at -= len(q.ring)
	}
	q.ring[at] = r
	q.count++
	q.taken++
}

// Take moves the oldest requests that wait to a list, as many as it has room for, and says how many these are.
func (q *Queue) Take(to []*flow.Request) int {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := min(len(to), q.count)
	for i := range n {
		to[i], q.ring[q.head] = q.ring[q.head], nil
		if q.head++; q.head == len(q.ring) {
			q.head = 0
		}
	}
	q.count -= n
	return n
}

// Lose counts what a proxy or weir-dns had no room for, Malformed what it told and nobody could read.
func (q *Queue) Lose(n uint64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.all.Lost += n
}

// Malformed counts what could not be read.
func (q *Queue) Malformed() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.all.Malformed++
}

// Losses are counts since the last TakeLosses: Dropped found the queue full, Lost did not get here, Malformed could not be read.
type Losses struct{ Dropped, Lost, Malformed uint64 }

// TakeLosses returns what was lost since the last call.
func (q *Queue) TakeLosses() Losses {
	q.mu.Lock()
	defer q.mu.Unlock()
	l := Losses{q.all.Dropped - q.told.Dropped, q.all.Lost - q.told.Lost, q.all.Malformed - q.told.Malformed}
	q.told = q.all
	return l
}

// Stats counts since the start.
type Stats struct {
	Taken uint64
	Losses
}

// Stats returns the counters.
func (q *Queue) Stats() Stats {
	q.mu.Lock()
	defer q.mu.Unlock()
	return Stats{q.taken, q.all}
}

// OfDNS turns what weir-dns saw into a request; false = it makes no sense. shift is added to its time.
func OfDNS(r *agentv1.DNSRecord, shift time.Duration) (*flow.Request, bool) {
	client, err1 := netip.ParseAddrPort(r.GetClient())
	server, err2 := netip.ParseAddrPort(r.GetServer())
	if err1 != nil || err2 != nil || client.Addr().Unmap().Is4() != server.Addr().Unmap().Is4() || !r.GetTime().IsValid() ||
		r.GetProtocol() != 6 && r.GetProtocol() != 17 {
		return nil, false
	}
	x := &flow.Request{Time: r.GetTime().AsTime().Add(shift).UnixNano(), Response: r.GetResponse(), Denied: r.GetDenied(), Latency: r.GetLatencyNs(),
		Client: unmap(client), Server: unmap(server), Proto: uint8(r.GetProtocol()), Direction: uint8(desired.Egress),
		DNS: &flow.DNS{Query: r.GetQuery(), QTypes: r.GetQtypes(), IPs: r.GetAddresses(), CNames: r.GetCnames(), RRTypes: r.GetRrtypes(), TTL: r.GetTtl(), RCode: r.GetRcode()}}
	for _, p := range r.GetRules() {
		x.Rules = append(x.Rules, ruleOf(p))
	}
	return x, true
}

func unmap(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap().WithZone(""), a.Port())
}

func ruleOf(r *policyv1.PolicyRule) desired.PolicyRule {
	return desired.PolicyRule{Kind: r.GetKind(), Namespace: r.GetNamespace(), Name: r.GetName(), UID: r.GetUid(), Spec: r.GetSpec(),
		List: r.GetList(), Index: r.GetIndex(), Log: r.GetLog(), Labels: r.GetLabels(), Implicit: r.GetImplicit()}
}

// Named lists the addresses that an answer gives a name.
func Named(r *flow.Request) (addresses []netip.Addr, name string, ttl time.Duration) {
	if r.DNS == nil || !r.Response || r.Denied || r.DNS.RCode != 0 {
		return nil, "", 0
	}
	for _, text := range r.DNS.IPs {
		if a, err := netip.ParseAddr(text); err == nil {
			addresses = append(addresses, a.Unmap().WithZone(""))
		}
	}
	return addresses, strings.TrimSuffix(r.DNS.Query, "."), time.Duration(r.DNS.TTL) * time.Second
}
