// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// Tuple is what flows say of a connection. Ports are 0 for ICMP, whose flows name type and code of the message.
type Tuple struct {
	Protocol           int
	Src, Dst           netip.AddrPort
	ICMPType, ICMPCode int
}

// Reverse is the same connection seen from the other end.
func (t Tuple) Reverse() Tuple {
	t.Src, t.Dst = t.Dst, t.Src
	return t
}

// Spec says what connection to make.
type Spec struct {
	Protocol int
	From     Place
	// Source is the client's address.
	Source netip.Addr
	// To is what the client addresses: the far end, or a service before it.
	To netip.AddrPort
	// Far are those who may get it: the far end, or the backends of a service.
	Far []Far
	// ICMPType and ICMPCode of the message, for ICMP.
	ICMPType, ICMPCode byte
}

// Connection is one connection. Its methods send one message each.
type Connection struct {
	spec   Spec
	net    *Network
	number uint32
	local  netip.AddrPort
	places []string

	// closers are connections for requests and queries.
	closers []io.Closer
	// asking is that of queries.
	asking net.Conn
	stream *stream
	file   *os.File
	packet net.PacketConn
	opened bool
	// taken: somebody of the lab's own listens at the far end, so that a connection that stands is all that can be seen.
	taken bool
}

// Message is one that was sent: whether it came, where, and whether an answer came back.
type Message struct {
	n       *Network
	token   token
	to      []string
	answers []string
	// Tuples are those under which flows may tell of the message.
	Tuples []Tuple
	stands func() bool
	// WantsAnswer says that the far end answers.
	WantsAnswer bool
}

// Arrived reports whether the message came to an end that may get it.
func (m *Message) Arrived() bool {
	if m.stands != nil && m.stands() {
		return true
	}
	_, ok := m.n.mail.arrivedAt(m.token, m.to)
	return ok
}

// Answered reports whether the answer came back.
func (m *Message) Answered() bool {
	_, ok := m.n.mail.arrivedAt(m.token.as(answer), m.answers)
	return ok
}

// New prepares both ends of a connection; nothing is sent yet.
func (n *Network) New(s Spec) (*Connection, error) {
	c := &Connection{spec: s, net: n, number: numbers.Add(1)}
	c.local = netip.AddrPortFrom(s.Source, 0)
	for _, f := range s.Far {
		c.places = append(c.places, f.Place.Name())
		err := c.serve(f)
		if s.Protocol == tcp && errors.Is(err, unix.EADDRINUSE) {
			c.taken = true
			continue
		}
		if err != nil {
			return nil, err
		}
	}
	switch s.Protocol {
	case tcp, udp, sctp:
		c.local = netip.AddrPortFrom(s.Source, n.clientPort())
	case icmp4, icmp6:
		if err := n.serveICMP(s.From, s.Source); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("protocol %d cannot be sent", s.Protocol)
	}
	return c, nil
}

func (c *Connection) serve(f Far) error {
	switch c.spec.Protocol {
	case tcp:
		return c.net.serveTCP(f)
	case udp:
		return c.net.serveUDP(f)
	case sctp:
		return c.net.serveSCTP(f)
	default:
		return c.net.serveICMP(f.Place, f.Addr.Addr())
	}
}

// Tuples are all under which flows may tell of the connection, in both directions.
func (c *Connection) Tuples() []Tuple {
	forward := c.tuples(c.spec.ICMPType, c.spec.ICMPCode)
	back := forward
	if c.isICMP() {
		_, reply := echoTypes(c.spec.Protocol == icmp4)
		back = c.tuples(reply, 0)
	}
	all := slices.Clone(forward)
	for _, t := range back {
		all = append(all, t.Reverse())
	}
	return all
}

// tuples of the forward direction: towards what was addressed, and towards each that may get it.
func (c *Connection) tuples(icmpType, icmpCode byte) []Tuple {
	base := Tuple{Protocol: c.spec.Protocol, Src: c.local, Dst: c.spec.To}
	if c.isICMP() {
		base.ICMPType, base.ICMPCode = int(icmpType), int(icmpCode)
		base.Src, base.Dst = portless(base.Src), portless(base.Dst)
	}
	all := []Tuple{base}
	for _, f := range c.spec.Far {
		t := base
		t.Dst = f.Addr
		if c.isICMP() {
			t.Dst = portless(t.Dst)
		}
		if t != base {
			all = append(all, t)
		}
	}
	return all
}

func portless(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr(), 0) }

func (c *Connection) isICMP() bool { return c.spec.Protocol == icmp4 || c.spec.Protocol == icmp6 }

// rest is an echo's identifier and sequence: the same for all of a connection.
func (c *Connection) rest() [4]byte {
	if ask, reply := echoTypes(c.spec.Protocol == icmp4); c.spec.ICMPType != ask && c.spec.ICMPType != reply {
		return [4]byte{}
	}
	return [4]byte{byte(c.number >> 8), byte(c.number), 0, 1}
}

// Forward sends the next message of the client; the first one opens the connection.
func (c *Connection) Forward() (*Message, error) {
	t := newToken(request, c.spec.ICMPType, c.number)
	m := &Message{n: c.net, token: t, to: c.places, answers: []string{c.spec.From.Name()}, Tuples: c.tuples(c.spec.ICMPType, c.spec.ICMPCode), WantsAnswer: true}
	first := !c.opened
	c.opened = true
	var err error
	switch c.spec.Protocol {
	case tcp:
		if first {
			if c.stream, err = c.net.dialTCP(c.spec.From, c.local, c.spec.To); err != nil {
				return nil, err
			}
		}
		c.stream.write(t[:])
		if c.taken {
			m.stands, m.WantsAnswer = c.stream.stands.Load, false
		}
	case udp:
		if first {
			if c.file, err = c.net.dialUDP(c.spec.From, c.local, c.spec.To); err != nil {
				return nil, err
			}
		}
		if _, err := c.file.Write(t[:]); err != nil {
			// An ICMP error about an earlier packet; the packet itself goes out at the second try.
			_, err = c.file.Write(t[:])
			return m, err
		}
	case sctp:
		chunk := byte(chunkData)
		if first {
			chunk = chunkInit
			if c.packet, err = packetConn(c.spec.From, unix.SOCK_RAW, sctp, portless(c.local)); err != nil {
				return nil, err
			}
			c.net.wait.Go(func() { c.net.readSCTP(c.packet, c.spec.From.Name(), c.local.Port()) })
		}
		_, err = c.packet.WriteTo(sctpPacket(c.local.Port(), c.spec.To.Port(), chunk, t), ipAddr(c.spec.To.Addr()))
	default:
		ask, _ := echoTypes(c.spec.Protocol == icmp4)
		m.WantsAnswer = c.spec.ICMPType == ask
		err = c.sendICMP(t)
	}
	return m, err
}

// Again is Forward for a connection whose first message could not be sent.
func (c *Connection) Again() (*Message, error) {
	c.opened = false
	return c.Forward()
}

func ipAddr(a netip.Addr) *net.IPAddr { return &net.IPAddr{IP: a.AsSlice()} }

// sendICMP sends the message of the spec. An error quotes a packet that the other end might have sent.
func (c *Connection) sendICMP(t token) error {
	body := t[:]
	v4 := c.spec.Protocol == icmp4
	if quotes(v4, c.spec.ICMPType) {
		inner := c.net.clientPort()
		body = innerPacket(tcp, netip.AddrPortFrom(c.spec.To.Addr(), inner), netip.AddrPortFrom(c.spec.Source, 80), [4]byte{}, t)
	}
	return c.net.sendRaw(c.spec.From, c.spec.Source, c.spec.To.Addr(), icmpMessage(v4, c.spec.ICMPType, c.spec.ICMPCode, c.rest(), body))
}

// quotes reports whether a message is about another packet.
func quotes(v4 bool, icmpType byte) bool {
	if !v4 {
		return icmpType < 128
	}
	return icmpType == 3 || icmpType == 4 || icmpType == 5 || icmpType == 11 || icmpType == 12
}

// sendRaw sends an ICMP message by a socket of its own.
func (n *Network) sendRaw(p Place, from, to netip.Addr, b []byte) error {
	c, err := packetConn(p, unix.SOCK_RAW, icmpProtocol(from), netip.AddrPortFrom(from, 0))
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.WriteTo(b, ipAddr(to)); err != nil {
		return fmt.Errorf("send from %s to %s in %s: %w", from, to, p.Name(), err)
	}
	return nil
}

// Reply sends a message from the server to the client, of its own accord.
func (c *Connection) Reply() (*Message, error) {
	t := newToken(push, 0, c.number)
	m := &Message{n: c.net, to: []string{c.spec.From.Name()}}
	if c.isICMP() {
		_, reply := echoTypes(c.spec.Protocol == icmp4)
		t = newToken(push, reply, c.number)
		m.token = t
		for _, u := range c.tuples(reply, 0) {
			m.Tuples = append(m.Tuples, u.Reverse())
		}
		if len(c.spec.Far) == 0 {
			return nil, fmt.Errorf("nobody to reply")
		}
		f := c.spec.Far[0]
		return m, c.net.sendRaw(f.Place, f.Addr.Addr(), c.spec.Source, icmpMessage(c.spec.Protocol == icmp4, reply, 0, c.rest(), t[:]))
	}
	m.token = t
	for _, u := range c.tuples(0, 0) {
		m.Tuples = append(m.Tuples, u.Reverse())
	}
	back := c.net.mail.wayBack(c.number)
	if back == nil {
		return nil, fmt.Errorf("the connection never reached its server")
	}
	return m, back(t[:])
}

// Related sends an ICMP error about the connection from an address in a place to one of the ends, the client unless it says otherwise.
func (c *Connection) Related(p Place, from netip.Addr, to Far, icmpType, icmpCode byte) (*Message, error) {
	v4 := from.Is4()
	t := newToken(report, icmpType, c.number)
	src, dst := c.local, c.spec.To
	if len(c.spec.Far) > 0 {
		dst = c.spec.Far[0].Addr
	}
	if to.Addr.Addr() != c.local.Addr() {
		src, dst = dst, src // about a packet of the server
	}
	m := &Message{n: c.net, token: t, to: []string{to.Place.Name()}}
	protocol := icmpProtocol(from)
	m.Tuples = []Tuple{{Protocol: protocol, Src: netip.AddrPortFrom(from, 0), Dst: portless(to.Addr), ICMPType: int(icmpType), ICMPCode: int(icmpCode)}}
	if err := c.net.serveICMP(to.Place, to.Addr.Addr()); err != nil {
		return nil, err
	}
	inner := innerPacket(c.spec.Protocol, src, dst, c.rest(), t)
	var rest [4]byte
	if v4 && icmpType == 3 && icmpCode == 4 || !v4 && icmpType == 2 {
		rest = [4]byte{0, 0, 1400 >> 8, 1400 & 0xff}
	}
	return m, c.net.sendRaw(p, from, to.Addr.Addr(), icmpMessage(v4, icmpType, icmpCode, rest, inner))
}

// CloseRequests closes what requests and queries were made on.
func (c *Connection) CloseRequests() {
	for _, one := range c.closers {
		one.Close()
	}
	c.closers, c.asking = nil, nil
}

// Close ends the client's side.
func (c *Connection) Close() {
	c.CloseRequests()
	if c.stream != nil {
		c.stream.close()
	}
	if c.file != nil {
		c.file.Close()
	}
	if c.packet != nil {
		c.packet.Close()
	}
}
