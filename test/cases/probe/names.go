// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"
)

// names are what name servers answer. Safe for concurrent use.
type names struct {
	mu sync.Mutex
	// known by client and name, in lower case with the trailing dot.
	known map[nameKey]nameAnswer
}

type nameKey struct {
	client netip.Addr
	name   string
}

type nameAnswer struct {
	addresses []netip.Addr
	ttl       uint32
}

func canonical(name string) string { return strings.ToLower(strings.TrimSuffix(name, ".")) + "." }

// Answer makes name servers answer a client's queries for a name.
func (n *Network) Answer(client netip.Addr, name string, addresses []netip.Addr, ttl uint32) {
	n.names.mu.Lock()
	defer n.names.mu.Unlock()
	n.names.known[nameKey{client, canonical(name)}] = nameAnswer{addresses, ttl}
}

// sourceName is the additional record in which an answer says whom the server saw asking.
var sourceName = dnsmessage.MustNewName("source.weir-cases.")

// anyAddress is what a name has of which nothing is said.
var anyAddress = netip.MustParseAddr("192.0.2.254")

// reply answers a query that came from an address; nil = it is none.
func (n *names) reply(query []byte, from netip.AddrPort) []byte {
	var p dnsmessage.Parser
	h, err := p.Start(query)
	if err != nil || h.Response {
		return nil
	}
	q, err := p.Question()
	if err != nil {
		return nil
	}
	key := nameKey{from.Addr().Unmap(), canonical(q.Name.String())}
	n.mu.Lock()
	known, ok := n.known[key]
	n.mu.Unlock()
	if !ok {
		known = nameAnswer{[]netip.Addr{anyAddress}, 3600}
	}
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: h.ID, Response: true, RecursionDesired: h.RecursionDesired, RecursionAvailable: true})
	err = errors.Join(b.StartQuestions(), b.Question(q), b.StartAnswers())
	for _, a := range known.addresses {
		resource := dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: known.ttl}
		switch {
		case a.Is4() && q.Type == dnsmessage.TypeA:
			err = errors.Join(err, b.AResource(resource, dnsmessage.AResource{A: a.As4()}))
		case a.Is6() && q.Type == dnsmessage.TypeAAAA:
			err = errors.Join(err, b.AAAAResource(resource, dnsmessage.AAAAResource{AAAA: a.As16()}))
		}
	}
	err = errors.Join(err, b.StartAdditionals(), b.TXTResource(dnsmessage.ResourceHeader{Name: sourceName, Class: q.Class}, dnsmessage.TXTResource{TXT: []string{from.String()}}))
	message, finish := b.Finish()
	if err != nil || finish != nil {
		return nil
	}
	return message
}

func (n *names) serveStream(c net.Conn, r *bufio.Reader) {
	from, err := netip.ParseAddrPort(c.RemoteAddr().String())
	if err != nil {
		return
	}
	for {
		query, err := readMessage(r)
		if err != nil {
			return
		}
		answer := n.reply(query, netip.AddrPortFrom(from.Addr().Unmap(), from.Port()))
		if answer == nil || writeMessage(c, answer) != nil {
			return
		}
	}
}

func readMessage(r io.Reader) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, fmt.Errorf("read length: %w", err)
	}
	b := make([]byte, binary.BigEndian.Uint16(size[:]))
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, fmt.Errorf("read message: %w", err)
	}
	return b, nil
}

func writeMessage(w io.Writer, b []byte) error {
	_, err := w.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...))
	return err
}

// Query is one question.
type Query struct {
	Name string
	Type dnsmessage.Type
}

// Lookup is what became of a query.
type Lookup struct {
	// Answered: an answer came, with this code and these addresses.
	Answered  bool
	RCode     dnsmessage.RCode
	Addresses []netip.Addr
	// Arrived: the answer is of a server of ours; Source is the client as that saw it.
	Arrived bool
	Source  netip.AddrPort
	Err     error
}

// Resolve asks the far end of a UDP or TCP connection. What was asked before was asked on the same socket.
func (c *Connection) Resolve(ctx context.Context, q Query) Lookup {
	var l Lookup
	name, err := dnsmessage.NewName(strings.TrimSuffix(q.Name, ".") + ".")
	if err != nil {
		l.Err = fmt.Errorf("name %q: %w", q.Name, err)
		return l
	}
	id := uint16(numbers.Add(1))
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: id, RecursionDesired: true})
	err = errors.Join(b.StartQuestions(), b.Question(dnsmessage.Question{Name: name, Type: q.Type, Class: dnsmessage.ClassINET}))
	query, finish := b.Finish()
	if l.Err = errors.Join(err, finish); l.Err != nil {
		return l
	}
	var answer []byte
	conn, err := c.queries(ctx)
	if l.Err = err; err == nil {
		answer, l.Err = c.askOn(ctx, conn, query)
	}
	if l.Err != nil {
		return l
	}
	var m dnsmessage.Message
	if l.Err = m.Unpack(answer); l.Err != nil || m.ID != id || !m.Response {
		l.Err = errors.Join(l.Err, fmt.Errorf("answer %d to query %d", m.ID, id))
		return l
	}
	l.Answered, l.RCode = true, m.RCode
	for _, r := range m.Answers {
		switch body := r.Body.(type) {
		case *dnsmessage.AResource:
			l.Addresses = append(l.Addresses, netip.AddrFrom4(body.A))
		case *dnsmessage.AAAAResource:
			l.Addresses = append(l.Addresses, netip.AddrFrom16(body.AAAA))
		}
	}
	for _, r := range m.Additionals {
		if text, ok := r.Body.(*dnsmessage.TXTResource); ok && r.Header.Name == sourceName {
			l.Arrived = true
			l.Source, l.Err = netip.ParseAddrPort(strings.Join(text.TXT, ""))
		}
	}
	return l
}

// queries is the socket that a connection's queries are made on.
func (c *Connection) queries(ctx context.Context) (net.Conn, error) {
	if c.asking != nil {
		return c.asking, nil
	}
	var err error
	if c.spec.Protocol == tcp {
		c.asking, err = c.Connect(ctx)
		return c.asking, err
	}
	fd, err := bound(c.spec.From, unix.SOCK_DGRAM, 0, c.local)
	if err != nil {
		return nil, err
	}
	if err := unix.Connect(fd, sockaddr(c.spec.To)); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("connect %s to %s: %w", c.local, c.spec.To, err)
	}
	file := os.NewFile(uintptr(fd), "query")
	defer file.Close()
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, fmt.Errorf("ask: %w", err)
	}
	c.closers = append(c.closers, conn)
	c.asking = conn
	return conn, nil
}

// askAgain is when a query over UDP is sent once more.
const askAgain = 2 * time.Second

// askOn sends a query and reads its answer, until ctx ends.
func (c *Connection) askOn(ctx context.Context, conn net.Conn, query []byte) ([]byte, error) {
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(askAgain)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) }) // ends what waits
	defer stop()
	if err := conn.SetWriteDeadline(deadline); err != nil {
		return nil, fmt.Errorf("ask: %w", err)
	}
	if c.spec.Protocol == tcp {
		if err := conn.SetReadDeadline(deadline); err != nil {
			return nil, fmt.Errorf("ask: %w", err)
		}
		if err := writeMessage(conn, query); err != nil {
			return nil, fmt.Errorf("ask: %w", err)
		}
		return readMessage(conn)
	}
	answer := make([]byte, datagramBytes)
	for ctx.Err() == nil {
		if _, err := conn.Write(query); err != nil && !errors.Is(err, unix.ECONNREFUSED) {
			return nil, fmt.Errorf("ask: %w", err)
		}
		until := time.Now().Add(askAgain)
		if until.After(deadline) {
			until = deadline
		}
		if err := conn.SetReadDeadline(until); err != nil {
			return nil, fmt.Errorf("ask: %w", err)
		}
		if ctx.Err() != nil {
			break // it ended before the deadline was set
		}
		n, err := conn.Read(answer)
		for err == nil && (n < 2 || answer[0] != query[0] || answer[1] != query[1]) {
			n, err = conn.Read(answer) // of an earlier query
		}
		if err == nil {
			return answer[:n], nil
		}
		if !time.Now().Before(deadline) {
			return nil, fmt.Errorf("ask: %w", err)
		}
	}
	return nil, fmt.Errorf("ask: %w", ctx.Err())
}
