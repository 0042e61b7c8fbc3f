// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// proxyRules makes what the proxy needs in a node's namespace, as README.md says.
func proxyRules() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	host, err := netlink.LinkByName("weir_host")
	if err != nil {
		return err
	}
	var errs []error
	for _, f := range []struct {
		family int
		all    string
	}{{netlink.FAMILY_V4, "0.0.0.0/0"}, {netlink.FAMILY_V6, "::/0"}} {
		_, all, err := net.ParseCIDR(f.all)
		errs = append(errs, err)
		for _, r := range []struct {
			mark, mask      uint32
			table, priority int
			route           netlink.Route
		}{
			{MarkProxy, MarkMask, 200, 9, netlink.Route{LinkIndex: lo.Attrs().Index, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST}},
			{MarkRoutePassed, MarkRoutePassed, 201, 8, netlink.Route{LinkIndex: host.Attrs().Index, Scope: netlink.SCOPE_LINK}},
		} {
			rule := netlink.NewRule()
			rule.Family, rule.Priority, rule.Table, rule.Mark, rule.Mask = f.family, r.priority, r.table, r.mark, &r.mask
			r.route.Table, r.route.Dst, r.route.Family = r.table, all, f.family
			errs = append(errs, netlink.RuleAdd(rule), netlink.RouteAdd(&r.route))
		}
	}
	return errors.Join(errs...)
}

// proxied is a connection that a test's proxy has taken: who began it, and to where.
type proxied struct {
	slot             uint16
	client, original netip.AddrPort
}

// tproxy is a transparent proxy: a listener a slot, each with the mark of the stage that it stands for.
type tproxy struct {
	w    *world
	seen chan proxied
	// target says where a connection goes on to, if not where the client wanted to. It is set while connections of before may still be read.
	target atomic.Pointer[func(slot uint16, original netip.AddrPort) netip.AddrPort]

	ctx   context.Context
	end   context.CancelFunc
	mu    sync.Mutex
	socks map[io.Closer]struct{}
	wg    sync.WaitGroup
	conns sync.WaitGroup
}

func newProxy(w *world) *tproxy {
	w.Helper()
	p := &tproxy{w: w, seen: make(chan proxied, 256), socks: map[io.Closer]struct{}{}}
	p.ctx, p.end = context.WithCancel(context.Background())
	w.do(inside(w.node, func() error {
		sysctl(w, "net/ipv4/conf/weir_net/accept_local", "1")
		return proxyRules()
	}))
	w.Cleanup(p.kill)
	return p
}

// redirect says where connections go on to from now on.
func (p *tproxy) redirect(target func(slot uint16, original netip.AddrPort) netip.AddrPort) {
	p.target.Store(&target)
}

// keep notes a socket, so that kill closes it.
func (p *tproxy) keep(c io.Closer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.socks[c] = struct{}{}
}

// kill closes every socket at once, as the end of the process does.
func (p *tproxy) kill() {
	p.mu.Lock()
	for c := range p.socks {
		if t, ok := c.(*net.TCPConn); ok {
			t.SetLinger(0)
		}
		c.Close()
	}
	clear(p.socks)
	p.end()
	p.mu.Unlock()
	p.wg.Wait()
}

// control sets what a transparent socket needs; mark 0 = none.
func control(mark int, upstream bool) func(network, _ string, c syscall.RawConn) error {
	return func(network, _ string, c syscall.RawConn) error {
		var errs []error
		err := c.Control(func(raw uintptr) {
			fd := int(raw)
			set := func(level, name, value int) { errs = append(errs, unix.SetsockoptInt(fd, level, name, value)) }
			set(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
			if network[len(network)-1] == '6' {
				set(unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)
				set(unix.SOL_IPV6, unix.IPV6_RECVORIGDSTADDR, 1)
			} else {
				set(unix.SOL_IP, unix.IP_TRANSPARENT, 1)
				set(unix.SOL_IP, unix.IP_RECVORIGDSTADDR, 1)
			}
			if mark != 0 {
				set(unix.SOL_SOCKET, unix.SO_MARK, mark)
			}
			if upstream {
				const localPortRange = 51
				set(unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
				set(unix.SOL_IP, localPortRange, UpstreamPortMax<<16|UpstreamPortMin)
			}
		})
		return errors.Join(append(errs, err)...)
	}
}

var localhosts = []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("::1")}

// listen makes the listener of a slot.
func (p *tproxy) listen(slot uint16, mark int) {
	p.w.Helper()
	p.listenOnly(slot, mark)
	p.w.do(p.w.Slots().Set(slot, ProxyPortBase+slot))
}

func (p *tproxy) listenOnly(slot uint16, mark int) {
	p.w.Helper()
	for _, home := range localhosts {
		var l net.Listener
		p.w.do(inside(p.w.node, func() (err error) {
			lc := net.ListenConfig{Control: control(0, false)}
			l, err = lc.Listen(context.Background(), "tcp", at(home, ProxyPortBase+slot).String())
			return err
		}))
		p.keep(l)
		p.wg.Add(1)
		go func() {
			defer p.wg.Done()
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				p.keep(c)
				p.wg.Add(1)
				p.conns.Add(1)
				go func() {
					defer p.wg.Done()
					defer p.conns.Done()
					p.serve(slot, mark, c.(*net.TCPConn))
				}()
			}
		}()
	}
}

func addrPort(a net.Addr) netip.AddrPort {
	ap := netip.MustParseAddrPort(a.String())
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// serve joins a connection to one that has the client's address and goes where the client wanted to.
func (p *tproxy) serve(slot uint16, mark int, down *net.TCPConn) {
	defer down.Close()
	client, original := addrPort(down.RemoteAddr()), addrPort(down.LocalAddr())
	to := original
	if target := p.target.Load(); target != nil {
		to = (*target)(slot, original)
	}
	var up net.Conn
	err := inside(p.w.node, func() (err error) {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: client.Addr().AsSlice()}, Control: control(mark, true)}
		up, err = d.DialContext(p.ctx, "tcp", to.String())
		return err
	})
	p.seen <- proxied{slot, client, original}
	if err != nil {
		down.SetLinger(0)
		return
	}
	defer up.Close()
	p.keep(up)
	done := make(chan struct{})
	go func() {
		defer close(done)
		join(up.(*net.TCPConn), down)
	}()
	join(down, up.(*net.TCPConn))
	<-done
}

// join copies until the end, which it passes on: a reset as a reset.
func join(to, from *net.TCPConn) {
	_, err := io.Copy(to, from)
	switch {
	case errors.Is(err, unix.ECONNRESET):
		to.SetLinger(0)
		to.Close()
	case !errors.Is(err, net.ErrClosed): // that is the proxy's death
		to.CloseWrite()
	}
}

// next returns the connections that were proxied since, by slot.
func (p *tproxy) next(n int) []proxied {
	out := make([]proxied, 0, n)
	for range n {
		out = append(out, <-p.seen)
	}
	return out
}

// expectSeen checks that one connection passed the slots in this order, as from and to.
func (p *tproxy) expectSeen(what string, from netip.Addr, to netip.AddrPort, slots ...uint16) {
	p.w.Helper()
	if n := len(p.seen); n != len(slots) {
		p.w.Errorf("%s: the proxy had %d connections, want %d", what, n, len(slots))
	}
	for _, got := range p.next(min(len(p.seen), len(slots))) {
		if got.client.Addr() != from || got.original != to {
			p.w.Errorf("%s: slot %d had %v -> %v, want %v -> %v", what, got.slot, got.client, got.original, from, to)
		}
		found := false
		for i, s := range slots {
			if s == got.slot {
				slots, found = append(slots[:i:i], slots[i+1:]...), true
				break
			}
		}
		if !found {
			p.w.Errorf("%s: slot %d had a connection", what, got.slot)
		}
	}
}

// settled waits until every TCP connection has closed, so that none is there when policy changes, and forgets them.
func (w *world) settled() {
	w.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		open := 0
		var last Conn
		w.do(w.Conntrack().List(func(c Conn) bool {
			if c.Proto == unix.IPPROTO_TCP && c.State != StateClosed {
				open++
				last = c
			}
			return true
		}))
		if open == 0 {
			break
		}
		if time.Now().After(deadline) {
			w.Fatalf("%d connections have not closed, the last of them %+v", open, last)
		}
	}
	w.records()
}

// rejectDrops fails on every drop: the test did not want one.
func (w *world) rejectDrops(what string) {
	w.Helper()
	for _, r := range w.records() {
		if r.Type == RecordDrop && !r.DstAddr().IsMulticast() {
			w.Errorf("%s: dropped %v -> %v flags %02x for reason %d, endpoint %d", what, at(r.SrcAddr(), r.Sport), at(r.DstAddr(), r.Dport),
				r.TcpFlags, r.Reason, r.Endpoint)
		}
	}
}

func redirectPort(proto uint8, port uint16, slot uint16, rule uint32) PolicyRange {
	return PolicyRange{Proto: proto, First: port, Last: port, Verdict: PolicyRedirect, Slot: slot, Rule: rule}
}

func visiblePort(proto uint8, port uint16, slot uint16, rule uint32) PolicyRange {
	return PolicyRange{Proto: proto, First: port, Last: port, Verdict: PolicyVisible, Slot: slot, Rule: rule}
}
