// SPDX-License-Identifier: Apache-2.0

// Package request queues what proxies and weir-dns saw on its way to the flows. The queue is bounded; what finds it full is counted, and told as lost.
package request

import (
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	agentv1 "github.com/weirmesh/weir/gen/weir/agent/v1"
	policyv1 "github.com/weirmesh/weir/gen/weir/policy/v1"
	"github.com/weirmesh/weir/services/agent/internal/desired"
	"github.com/weirmesh/weir/services/agent/internal/flow"
)

// DefaultQueue is how many requests may wait: some 10 MB with long headers.
const DefaultQueue = 8192

// Queue takes requests from any goroutine and never blocks.
type Queue struct {
	ch                     chan *flow.Request
	dropped, lost, invalid atomic.Uint64
	taken, lostAll, badAll atomic.Uint64
	droppedAll             atomic.Uint64
}

// NewQueue makes a queue of that many.
func NewQueue(size int) *Queue { return &Queue{ch: make(chan *flow.Request, size)} }

// Put queues a request, or counts it as dropped. Nobody changes it any more.
func (q *Queue) Put(r *flow.Request) {
	select {
	case q.ch <- r:
		q.taken.Add(1)
	default:
		q.dropped.Add(1)
		q.droppedAll.Add(1)
	}
}

// Next returns a request, or false when none waits.
func (q *Queue) Next() (*flow.Request, bool) {
	select {
	case r := <-q.ch:
		return r, true
	default:
		return nil, false
	}
}

// Lose counts what a proxy or weir-dns had no room for, Malformed what it told and nobody could read.
func (q *Queue) Lose(n uint64) {
	q.lost.Add(n)
	q.lostAll.Add(n)
}

// Malformed counts what could not be read.
func (q *Queue) Malformed() {
	q.invalid.Add(1)
	q.badAll.Add(1)
}

// Losses are counts since the last TakeLosses: Dropped found the queue full, Lost did not get here, Malformed could not be read.
type Losses struct{ Dropped, Lost, Malformed uint64 }

// TakeLosses returns what was lost since the last call.
func (q *Queue) TakeLosses() Losses {
	return Losses{q.dropped.Swap(0), q.lost.Swap(0), q.invalid.Swap(0)}
}

// Stats counts since the start.
type Stats struct {
	Taken uint64
	Losses
}

// Stats returns the counters.
func (q *Queue) Stats() Stats {
	return Stats{q.taken.Load(), Losses{q.droppedAll.Load(), q.lostAll.Load(), q.badAll.Load()}}
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
