// SPDX-License-Identifier: Apache-2.0

package dnsproxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/services/agent/internal/dnswire"
	"github.com/weirmesh/weir/services/agent/internal/mmsg"
)

const (
	// maxQuery is far more than a query needs.
	maxQuery = 4096
	// controlSpace is more than the kernel tells of a datagram.
	controlSpace = 128
	// queryBatch and answerBatch are how many datagrams are taken from a socket at once, if so many have come.
	queryBatch, answerBatch = 32, 16
)

// readQueries serves clients' datagrams until the socket is closed.
func (p *Proxy) readQueries(ctx context.Context, c *net.UDPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return fmt.Errorf("read queries: %w", err)
	}
	in, out := mmsg.NewReceiver(queryBatch, maxQuery+1, controlSpace), newOutbox(p)
	var n int
	var readErr error
	read := func(fd uintptr) bool {
		n, readErr = in.Receive(fd)
		return !errors.Is(readErr, unix.EAGAIN)
	}
	for {
		if err := errors.Join(raw.Read(read), readErr); err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			return fmt.Errorf("read queries: %w", err)
		}
		for i := range n {
			wire := in.Data(i)
			server, ok := destinationOf(in.Control(i))
			if !ok || !in.Whole(i) || len(wire) > maxQuery {
				p.counters.Malformed.Add(1)
				continue
			}
			if q := p.receive(append([]byte(nil), wire...), in.From(i), server, protoUDP, nil); q != nil {
				p.forward(ctx, q, wire, out)
			}
		}
		out.flush()
	}
}

// forward has a query sent to its server, by the outbox's next flush. wire may be changed, and stays until then.
func (p *Proxy) forward(ctx context.Context, q *query, wire []byte, out *outbox) {
	u, err := p.upstream(ctx, upstreamKey{q.client.Addr(), q.server})
	if err != nil {
		if errors.Is(err, errSocketsFull) {
			p.counters.SocketsFull.Add(1)
		} else {
			p.counters.Unreachable.Add(1)
		}
		p.fail(q, dnswire.RCodeServerFailure)
		return
	}
	id, err := u.table.add(q)
	if err != nil {
		p.counters.ClientOverload.Add(1)
		p.fail(q, dnswire.RCodeServerFailure)
		return
	}
	dnswire.SetID(wire, id)
	q.LimitSize(wire, p.cfg.UDPSize)
	out.add(u, q, id, wire)
}

// outbox gathers the queries of one client to one server, which are sent with one call.
type outbox struct {
	proxy   *Proxy
	to      *upstream
	sender  *mmsg.Sender
	queries []numbered
	refused int // the last one that was refused, and tried once more; from 1
	try     func(fd uintptr) bool
}

// numbered is a query that waits in a table.
type numbered struct {
	*query
	id uint16
}

func newOutbox(p *Proxy) *outbox {
	o := &outbox{proxy: p, sender: mmsg.NewSender(queryBatch)}
	failed := o.failed
	o.try = func(fd uintptr) bool { return o.sender.Send(fd, failed) }
	return o
}

// add adds a query that is in the table of an upstream: it is not closed before.
func (o *outbox) add(u *upstream, q *query, id uint16, wire []byte) {
	if o.to != u || o.sender.Full() {
		o.flush()
	}
	o.to = u
	o.sender.Add(wire, netip.Addr{})
	o.queries = append(o.queries, numbered{q, id})
}

// flush sends what was added.
func (o *outbox) flush() {
	if o.to == nil {
		return
	}
	if err := o.to.raw.Write(o.try); err != nil {
		for i := o.sender.Sent(); i < len(o.queries); i++ {
			o.drop(i)
		}
	}
	o.sender.Reset()
	clear(o.queries)
	o.to, o.queries, o.refused = nil, o.queries[:0], 0
}

func (o *outbox) failed(i int, err error) bool {
	if errors.Is(err, unix.ECONNREFUSED) && o.refused != i+1 {
		o.refused = i + 1 // that was said of an earlier query
		return true
	}
	o.drop(i)
	return false
}

func (o *outbox) drop(i int) {
	q := o.queries[i]
	o.to.table.drop(q.id)
	o.proxy.counters.Unreachable.Add(1)
	o.proxy.fail(q.query, dnswire.RCodeServerFailure)
}

// desk is where answers are read and passed on. A socket has one only while there are answers.
type desk struct {
	in  *mmsg.Receiver
	out *answers
}

// desks are those that nobody sits at.
var desks = sync.Pool{New: func() any {
	return &desk{in: mmsg.NewReceiver(answerBatch, dnswire.MaxSize, 0), out: newAnswers(answerBatch)}
}}

// readAnswers serves a server's datagrams until the socket is closed.
func (p *Proxy) readAnswers(u *upstream) {
	// It returns only at the end: between two calls of Read the poller forgets what has come, and the socket would have to be asked once more.
	_ = u.raw.Read(func(fd uintptr) bool {
		d, _ := desks.Get().(*desk)
		defer desks.Put(d)
		for {
			n, err := d.in.Receive(fd)
			if errors.Is(err, unix.EAGAIN) {
				return false
			}
			if err != nil {
				p.unreachable(u)
				continue
			}
			for i := range n {
				p.datagram(u, d.in.Data(i), d.out)
			}
			p.answers.flush(d.out, p.unsent)
			if n < d.in.Len() {
				return false
			}
		}
	})
	p.unreachable(u)
}

// unreachable ends what waits for a server that is said not to be there.
func (p *Proxy) unreachable(u *upstream) {
	for _, q := range u.table.clear() {
		p.lost(q)
	}
}

func (p *Proxy) datagram(u *upstream, msg []byte, out *answers) {
	q := u.table.take(msg)
	if q == nil {
		p.counters.Mismatched.Add(1)
		return
	}
	p.answered(q, msg, out)
}
