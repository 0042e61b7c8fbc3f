// SPDX-License-Identifier: Apache-2.0

package dnsproxy

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/weirmesh/weir/services/agent/internal/dnswire"
)

const (
	protoTCP = 6
	protoUDP = 17
)

// query is one on its way.
type query struct {
	dnswire.Query
	wire           []byte // as the client sent it
	client, server netip.AddrPort
	proto          uint8
	began          time.Time
	judgement      Judgement
	stream         *stream // the client's connection; nil = UDP
	settled        atomic.Bool
	since          time.Time // it was sent, or last answered; the table's
	told           bool      // of a transfer: its first answer is; the stream reader's
}

// transfer: the answer is many messages.
func (q *query) transfer() bool {
	return q.proto == protoTCP && (q.Type == dnswire.TypeAXFR || q.Type == dnswire.TypeIXFR)
}

// ended tells the client's connection that nothing comes for this query any more.
func (q *query) ended() {
	if q.stream != nil {
		q.stream.flying.Add(-1)
	}
}

// receive reads and judges a message of a client. It returns nil when the matter is settled: nothing is to be sent to the server. wire is used
// as long as the query lives.
func (p *Proxy) receive(wire []byte, client, server netip.AddrPort, proto uint8, s *stream) *query {
	q := &query{wire: wire, client: client, server: server, proto: proto, began: time.Now(), stream: s}
	if proto == protoTCP {
		p.counters.QueriesTCP.Add(1)
	} else {
		p.counters.Queries.Add(1)
	}
	var err error
	q.Query, err = dnswire.ReadQuery(wire)
	if errors.Is(err, dnswire.ErrIgnore) {
		p.counters.Malformed.Add(1)
		return nil
	}
	q.judgement = p.cfg.Judge.Judge(client.Addr(), server, proto, q.Name)
	if q.judgement.Endpoint == 0 {
		// Whoever it is came by another way than the kernel's.
		p.counters.Unknown.Add(1)
		return nil
	}
	if err != nil {
		p.counters.Malformed.Add(1)
		code := dnswire.RCodeFormatError
		if errors.Is(err, dnswire.ErrNotImplemented) {
			code = dnswire.RCodeNotImplemented
		}
		p.reply(q, code)
		return nil
	}
	if q.judgement.Verdict != Pass {
		p.counters.Refused.Add(1)
		p.record(q, nil, true)
		p.reply(q, p.cfg.RejectCode)
		return nil
	}
	switch p.flights.begin(client.Addr(), p.cfg.MaxQueries, p.cfg.MaxQueriesPerClient) {
	case fullForAll:
		p.counters.Overload.Add(1)
		p.reply(q, dnswire.RCodeServerFailure)
		return nil
	case fullForClient:
		p.counters.ClientOverload.Add(1)
		p.reply(q, dnswire.RCodeServerFailure)
		return nil
	}
	p.record(q, nil, false)
	return q
}

func (p *Proxy) record(q *query, a *dnswire.Answer, denied bool) {
	r := Record{
		Time: q.began, Client: q.client, Server: q.server, Proto: q.proto, Denied: denied, Query: q.Name, Type: q.Type, Slot: q.judgement.Slot,
		Answer: a,
	}
	if !denied {
		r.Rules = q.judgement.Rules
	}
	if a != nil {
		r.Time = time.Now()
		r.Latency = r.Time.Sub(q.began)
	}
	p.cfg.Record(r)
}

// settle ends a query; false: it has ended already.
func (p *Proxy) settle(q *query) bool {
	if q.settled.Swap(true) {
		return false
	}
	p.flights.end(q.client.Addr())
	return true
}

// fail ends a query with an answer of the proxy's own.
func (p *Proxy) fail(q *query, rcode int) {
	if p.settle(q) {
		p.record(q, &dnswire.Answer{RCode: rcode}, false)
		p.reply(q, rcode)
		q.ended()
	}
}

// reply sends an answer of the proxy's own.
func (p *Proxy) reply(q *query, rcode int) {
	p.send(q, dnswire.AppendReply(nil, q.wire, &q.Query, rcode))
}

// send gives a message to the client, in the server's name.
func (p *Proxy) send(q *query, msg []byte) {
	if q.stream != nil {
		q.stream.send(msg)
		return
	}
	if err := p.answers.send(q.server, q.client, msg); err != nil {
		p.unsent(q, err)
	}
}

// unsent is told of a UDP answer that was not sent. One that is too long for a packet sends the client to TCP.
func (p *Proxy) unsent(q *query, err error) {
	if errors.Is(err, syscall.EMSGSIZE) {
		p.counters.Truncated.Add(1)
		err = p.answers.send(q.server, q.client, dnswire.AppendTruncated(nil, q.wire, &q.Query))
	}
	if err != nil {
		p.counters.Unsent.Add(1)
		p.log.Debug("answer was not sent", "client", q.client, "error", err)
	}
}

// answered takes the server's answer to a query, whose number is the client's again. msg is the callee's only until it returns. What may go to the client
// at once goes by out; nil = it is sent now.
func (p *Proxy) answered(q *query, msg []byte, out *answers) {
	answer, err := dnswire.ReadAnswer(msg, q.Name)
	if err != nil {
		p.counters.MalformedAnswers.Add(1)
		p.fail(q, dnswire.RCodeServerFailure)
		return
	}
	if q.transfer() {
		p.transferred(q, msg, &answer)
		return
	}
	if answer.RCode != dnswire.RCodeSuccess || len(answer.Addresses) == 0 {
		p.release(q, msg, &answer, out)
		return
	}
	var kept []byte
	p.waiting.mu.Lock()
	// The lock keeps done from looking for the query and its message before they are there.
	if p.cfg.Names.Learn(q.judgement.Endpoint, q.Name, answer.Addresses, time.Duration(answer.TTL)*time.Second, func(err error) {
		p.learnt(q, &kept, &answer, err)
	}) {
		p.waiting.mu.Unlock()
		p.release(q, msg, &answer, out)
		return
	}
	kept = append([]byte(nil), msg...)
	p.waiting.queries[q] = time.Now().Add(p.cfg.NamesTimeout)
	p.waiting.mu.Unlock()
}

// learnt is called by whoever writes the maps. kept is guarded by waiting.mu until then.
func (p *Proxy) learnt(q *query, kept *[]byte, answer *dnswire.Answer, err error) {
	p.waiting.mu.Lock()
	delete(p.waiting.queries, q)
	msg := *kept
	p.waiting.mu.Unlock()
	if err != nil {
		p.counters.NamesFailed.Add(1)
		p.fail(q, dnswire.RCodeServerFailure)
		return
	}
	p.release(q, msg, answer, nil)
}

// release gives an answer to the client, by out or at once.
func (p *Proxy) release(q *query, msg []byte, answer *dnswire.Answer, out *answers) {
	if !p.settle(q) {
		return
	}
	// Told first: the client's next query is not to be told before it.
	p.count(q, answer)
	if out == nil || !out.add(q, msg) {
		p.send(q, msg)
	}
	q.ended()
}

// transferred passes on a message of a zone transfer, of which nothing is learnt. The query ends with its connection, or when nothing comes any more.
func (p *Proxy) transferred(q *query, msg []byte, answer *dnswire.Answer) {
	if !q.told {
		q.told = true
		p.count(q, answer)
	}
	q.stream.sendAll(msg)
}

func (p *Proxy) count(q *query, answer *dnswire.Answer) {
	p.counters.Answers.Add(1)
	took := time.Since(q.began)
	p.counters.LatencySum.Add(int64(took))
	i := 0
	for i < len(Buckets) && took > Buckets[i] {
		i++
	}
	p.counters.Latency[i].Add(1)
	p.record(q, answer, false)
}

// waiting are queries whose answers wait for the maps.
type waiting struct {
	mu      sync.Mutex
	queries map[*query]time.Time // until when
}

func (w *waiting) overdue(now time.Time) []*query {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []*query
	for q, until := range w.queries {
		if now.After(until) {
			out = append(out, q)
			delete(w.queries, q)
		}
	}
	return out
}

const sweepInterval = 100 * time.Millisecond

// sweep ends what has waited too long.
func (p *Proxy) sweep(ctx context.Context) {
	ticker := time.NewTicker(sweepInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-ticker.C:
			for _, q := range p.waiting.overdue(now) {
				p.counters.NamesFailed.Add(1)
				p.fail(q, dnswire.RCodeServerFailure)
			}
			for _, q := range p.upstreams.overdue(now, p.cfg.Timeout) {
				p.timeout(q)
			}
			for _, q := range p.streams.overdue(now, p.cfg.Timeout) {
				p.timeout(q)
			}
		}
	}
}

// timeout ends a query that its server does not answer. The client has its own idea of when to ask again.
func (p *Proxy) timeout(q *query) {
	if !p.settle(q) {
		return
	}
	q.ended()
	if !q.transfer() {
		p.counters.Timeouts.Add(1)
	}
}

// lost ends a query whose socket is closed or whose server is said not to be there.
func (p *Proxy) lost(q *query) {
	if q.transfer() {
		if p.settle(q) {
			q.ended() // the client sees the end of its connection
		}
		return
	}
	p.counters.Unreachable.Add(1)
	p.fail(q, dnswire.RCodeServerFailure)
}

// flights counts queries on their way.
type flights struct {
	mu      sync.Mutex
	clients map[netip.Addr]int
	all     int
}

type fullness uint8

const (
	room fullness = iota
	fullForAll
	fullForClient
)

func (f *flights) begin(client netip.Addr, maxAll, maxClient int) fullness {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.clients[client] >= maxClient:
		return fullForClient
	case f.all >= maxAll:
		return fullForAll
	}
	f.clients[client]++
	f.all++
	return room
}

func (f *flights) end(client netip.Addr) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.all--
	if f.clients[client]--; f.clients[client] == 0 {
		delete(f.clients, client)
	}
}

func (f *flights) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.all
}
