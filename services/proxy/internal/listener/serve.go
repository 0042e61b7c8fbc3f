// SPDX-License-Identifier: Apache-2.0

package listener

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/weirmesh/weir/services/proxy/internal/hello"
	"github.com/weirmesh/weir/services/proxy/internal/model"
)

// Causes of refusal that listeners count.
const (
	CauseListener  = "listener-connections"
	CauseHello     = "client-hello"
	CauseInspect   = "slow-client"
	CauseHandshake = "tls-handshake"
	CauseNoChain   = "no-filter-chain"
	CausePanic     = "panic"
)

// headed is a connection of which the first bytes have been read already.
type headed struct {
	*net.TCPConn

	head []byte
}

// Read implements net.Conn.
func (h *headed) Read(b []byte) (int, error) {
	if len(h.head) > 0 {
		n := copy(b, h.head)
		h.head = h.head[n:]
		return n, nil
	}
	return h.TCPConn.Read(b)
}

// WriteTo keeps the first bytes in their place, which the connection's own does not know.
func (h *headed) WriteTo(w io.Writer) (int64, error) {
	n, err := w.Write(h.head)
	h.head = h.head[n:]
	if err != nil {
		return int64(n), err
	}
	rest, err := io.Copy(w, h.TCPConn)
	return int64(n) + rest, err
}

// Split implements netfilter.Headed.
func (h *headed) Split() ([]byte, *net.TCPConn) { return h.head, h.TCPConn }

// serve leads one connection through a plan, and closes it.
func (l *Listener) serve(p *plan, conn *net.TCPConn, own netip.AddrPort) {
	defer func() {
		if r := recover(); r != nil {
			// One connection's fault is not the others'.
			l.set.config.Limits.Refused(p.namespace, CausePanic)
			l.set.config.Log.Error("connection panicked", "listener", p.name, "panic", fmt.Sprint(r), "stack", stack())
			reset(conn)
		}
	}()
	c := &model.Conn{
		Listener: p.name, Namespace: p.namespace, Source: p.src,
		Remote: addrPort(conn.RemoteAddr()), Local: addrPort(conn.LocalAddr()),
	}
	c.Direct = c.Local == own || own.Addr().IsUnspecified() && c.Local.Addr().IsLoopback()
	start := time.Now()
	refuse := func(cause, flag string, why error) {
		l.set.config.Limits.Refused(p.namespace, cause)
		p.logger.Log(&model.Entry{
			Conn: c, Stream: true, Start: start, Duration: time.Since(start), Flags: []string{flag}, Details: cause + ": " + why.Error(),
		})
		reset(conn)
	}
	a := &arrival{local: c.Local, remote: c.Remote}
	var stream net.Conn = conn
	if p.inspectTLS || p.inspectHTTP {
		head, err := p.inspect(conn, a)
		if err != nil {
			cause := CauseHello
			if !errors.Is(err, hello.ErrMalformed) {
				cause = CauseInspect
			}
			refuse(cause, "DPE", err)
			return
		}
		c.ServerName = a.serverName
		stream = &headed{TCPConn: conn, head: head}
	}
	ch := p.find(a)
	if ch == nil {
		refuse(CauseNoChain, "NR", errors.New("filter_chain_not_found"))
		return
	}
	if ch.tls != nil {
		secured, err := handshake(stream, ch, c)
		if err != nil {
			refuse(CauseHandshake, "DPE", err)
			return
		}
		stream = secured
	}
	ch.run(p, stream, c, start, refuse)
	_ = stream.Close() // closed already, unless a filter forgot
}

// run does the filters of a chain.
func (ch *chain) run(p *plan, stream net.Conn, c *model.Conn, start time.Time, refuse func(cause, flag string, why error)) {
	policy := ""
	for _, r := range ch.rbacs {
		name, ok := r.Decide(c)
		if name != "" {
			policy = name
		}
		if ok {
			continue
		}
		entry := &model.Entry{
			Conn: c, Stream: true, Start: start, Duration: time.Since(start), Denied: true, Policy: name,
			Details: "rbac_access_denied_matched_policy[" + orNone(name) + "]",
		}
		// The TCP proxy behind would have told of the connection: a denial is told in the same place.
		if ch.tcp != nil {
			ch.tcp.Logger().Log(entry)
		}
		p.logger.Log(entry)
		reset(stream)
		return
	}
	if ch.tcp != nil {
		ch.tcp.Serve(ch.drain, stream, c, policy)
	} else {
		ctx, cancel := ch.life(stream, start)
		ch.http.Serve(ctx, stream, c)
		cancel()
	}
	p.logger.Log(&model.Entry{Conn: c, Stream: true, Start: start, Duration: time.Since(start), Policy: policy})
}

func orNone(name string) string {
	if name == "" {
		return "none"
	}
	// Spaces end the details in a log line.
	return strings.ReplaceAll(name, " ", "_")
}

func handshake(stream net.Conn, ch *chain, c *model.Conn) (net.Conn, error) {
	ctx := context.Background()
	if ch.within > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, ch.within)
		defer cancel()
	}
	secured := tls.Server(stream, ch.tls)
	if err := secured.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	c.TLS = true
	if name := secured.ConnectionState().ServerName; name != "" {
		c.ServerName = strings.ToLower(name)
	}
	return secured, nil
}

// firstRead is what is read at first: most ClientHellos are smaller.
const firstRead = 2048

// inspect reads as much as tells what the client speaks.
func (p *plan) inspect(conn *net.TCPConn, a *arrival) ([]byte, error) {
	if p.inspectTime > 0 {
		if err := conn.SetReadDeadline(time.Now().Add(p.inspectTime)); err != nil {
			return nil, err
		}
		defer func() { _ = conn.SetReadDeadline(time.Time{}) }() // a connection that is gone is noticed by who reads next
	}
	head := make([]byte, 0, firstRead)
	for {
		done, err := p.recognise(head, a)
		if done || err != nil {
			return head, err
		}
		if len(head) == cap(head) {
			head = append(make([]byte, 0, min(2*cap(head), hello.MaxBytes)), head...)
		}
		n, err := conn.Read(head[len(head):cap(head)])
		head = head[:len(head)+n]
		if n > 0 {
			continue
		}
		if p.carryOn && isTimeout(err) {
			return head, nil
		}
		return nil, fmt.Errorf("read what the client speaks: %w", err)
	}
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

// preface is how HTTP/2 without TLS begins.
const preface = "PRI * HTTP/2.0\r\n"

// recognise looks at the first bytes; false = more are needed.
func (p *plan) recognise(head []byte, a *arrival) (bool, error) {
	if p.inspectTLS {
		info, err := hello.Parse(head)
		switch {
		case err == nil:
			a.tls, a.serverName, a.protocols = true, info.ServerName, info.Protocols
			return true, nil
		case errors.Is(err, hello.ErrMore):
			// The first bytes of HTTP are never those of TLS, so that nothing else can be recognised yet.
			return false, nil
		case !errors.Is(err, hello.ErrNotTLS):
			return false, err
		}
	}
	if !p.inspectHTTP {
		return true, nil
	}
	if strings.HasPrefix(string(head), preface) {
		a.protocols = []string{"h2c"}
		return true, nil
	}
	if len(head) < len(preface) && strings.HasPrefix(preface, string(head)) {
		return false, nil
	}
	if line, _, ok := strings.Cut(string(head), "\r\n"); ok {
		switch {
		case strings.HasSuffix(line, " HTTP/1.1"):
			a.protocols = []string{"http/1.1"}
		case strings.HasSuffix(line, " HTTP/1.0"):
			a.protocols = []string{"http/1.0"}
		}
		return true, nil
	}
	// A request line that is longer than what is read here is no reason to wait.
	return len(head) >= 8<<10 || !printable(head), nil
}

func printable(b []byte) bool {
	for _, x := range b {
		if x < ' ' && x != '\r' || x >= 0x7f {
			return false
		}
	}
	return true
}

func addrPort(a net.Addr) netip.AddrPort {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := tcp.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// reset closes a connection with a RST.
func reset(c net.Conn) {
	switch conn := c.(type) {
	case *net.TCPConn:
		_ = conn.SetLinger(0) // without it the close is an ordinary one
	case *headed:
		_ = conn.SetLinger(0)
	}
	_ = c.Close() // nothing more is wanted of it
}
