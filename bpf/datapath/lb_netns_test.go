// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// lbWorld is a node with two pods and a host outside that is also "another node": it has a pod's address there. The socket hooks are
// attached if a cgroup is given.
func lbWorld(t testing.TB, cgroup string) (w *world, a, b *pod) {
	t.Helper()
	w = newWorld(t, func(c *Config) { c.NodeIPv4, c.NodeIPv6, c.Masquerade = node4, node6, true })
	if cgroup != "" {
		w.do(w.AttachCgroup(cgroup))
	}
	a, b = w.plug("a", epA, idA, podA4, podA6), w.plug("b", epB, idB, podB4, podB6)
	w.do(inside(w.out.ns, func() error {
		return errors.Join(addAddr("lo", far4.String()+"/32"), addAddr("lo", far6.String()+"/128"),
			addRoute("198.51.100.7/32", "outside", node4.String()), addRoute("2001:db8:100::7/128", "outside", node6.String()), owned(far6))
	}))
	w.do(addRoute("10.244.2.0/24", "eth0", w.out.v4.String()), addRoute("fd00:10:244:2::/64", "eth0", w.out.v6.String()))
	for _, p := range []string{"10.244.2.7/32", "fd00:10:244:2::7/128"} {
		w.do(w.IPCache().Upsert(netip.MustParsePrefix(p), IPCacheEntry{Identity: idFar}))
	}
	for _, p := range []string{"10.96.0.0/16", "fd00:10:96::/112", "198.51.100.7/32", "2001:db8:100::7/128"} {
		w.do(w.IPCache().Upsert(netip.MustParsePrefix(p), IPCacheEntry{Flags: IPCacheServices}))
	}
	return w, a, b
}

// owned waits until an address is the current network namespace's: the kernel makes an IPv6 address's route later than the address.
func owned(a netip.Addr) error {
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		routes, err := netlink.RouteGet(a.AsSlice())
		if err == nil && len(routes) == 1 && routes[0].Type == unix.RTN_LOCAL {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("address %v: no local route after 5 seconds: %w", a, err)
		}
	}
}

// server echoes on TCP and UDP and tells whom it saw. ns is nil for the node itself.
func server(w *world, ns func(func() error) error, addr netip.AddrPort) <-chan netip.AddrPort {
	w.Helper()
	seen := make(chan netip.AddrPort, 64)
	var l net.Listener
	var c *net.UDPConn
	w.do(ns(func() (err error) {
		if l, err = net.Listen("tcp", addr.String()); err != nil {
			return err
		}
		c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(addr))
		return err
	}))
	done := make(chan struct{}, 2)
	go func() {
		defer func() { done <- struct{}{} }()
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			seen <- netip.MustParseAddrPort(conn.RemoteAddr().String())
			io.Copy(conn, conn)
			conn.Close()
		}
	}()
	go func() {
		defer func() { done <- struct{}{} }()
		buf := make([]byte, 65536)
		for {
			n, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			seen <- from
			c.WriteToUDPAddrPort(buf[:n], from)
		}
	}()
	w.Cleanup(func() { l.Close(); c.Close(); <-done; <-done })
	return seen
}

func in(p *pod) func(func() error) error {
	return func(f func() error) error { return inside(p.ns, f) }
}

func (w *world) onNode(f func() error) error { return inside(w.node, f) }

// talk exchanges some data; of UDP one datagram that fits and one that is fragmented.
func talk(from func(func() error) error, network string, to netip.AddrPort) (local netip.AddrPort, err error) {
	err = from(func() error {
		c, err := net.DialTimeout(network, to.String(), 5*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(10 * time.Second))
		local = netip.MustParseAddrPort(c.LocalAddr().String())
		sizes := []int{10, 4000}
		if network == "tcp" {
			sizes = []int{10, 200000}
		}
		for _, size := range sizes {
			want := bytes.Repeat([]byte("weir "), size/5)
			sent := make(chan error, 1)
			go func() { _, err := c.Write(want); sent <- err }()
			got := make([]byte, len(want))
			if network == "tcp" {
				_, err = io.ReadFull(c, got)
			} else {
				_, err = c.Read(got)
			}
			if err := errors.Join(err, <-sent); err != nil {
				return err
			}
			if !bytes.Equal(got, want) {
				return fmt.Errorf("echo of %d bytes differs", len(want))
			}
		}
		return nil
	})
	return local, err
}

var networks = map[string]uint8{"tcp": unix.IPPROTO_TCP, "udp": unix.IPPROTO_UDP}

// Clients outside reach node ports and load balancer addresses, wherever the backend is.
func TestFromOutside(t *testing.T) {
	w, _, b := lbWorld(t, "")
	id := uint32(0)
	for family, f := range lbFamilies {
		out, far := w.out.v4, far4
		if family == "v6" {
			out, far = w.out.v6, far6
		}
		backends := []struct {
			name    string
			backend Backend
			seen    <-chan netip.AddrPort
			client  netip.Addr // as the backend sees it
		}{
			{"here", Backend{at(f.b, 8080), true, false}, server(w, in(b), at(f.b, 8080)), out},
			{"there", Backend{at(far, 8080), false, false}, server(w, in(w.out), at(far, 8080)), f.node},
			{"process", Backend{at(f.node, 8080), true, false}, server(w, w.onNode, at(f.node, 8080)), out},
		}
		for network, proto := range networks {
			for i, c := range backends {
				for _, way := range []struct {
					name string
					kind FrontendKind
					addr netip.Addr
					dial netip.Addr
				}{{"node port", NodePort, f.any, f.node}, {"load balancer", LoadBalancer, f.lb, f.lb}} {
					t.Run(fmt.Sprintf("%s %s, %s, backend %s", family, network, way.name, c.name), func(t *testing.T) {
						id++
						port := uint16(30000 + i)
						w.do(w.Services().Upsert(Service{Frontend: Frontend{way.addr, port, proto}, Kind: way.kind, ID: id, Backends: []Backend{c.backend}}))
						local, err := talk(in(w.out), network, at(way.dial, port))
						if err != nil {
							t.Fatalf("%v; records %+v", err, w.records())
						}
						seen := <-c.seen
						if seen.Addr().Unmap() != c.client || c.client != f.node && seen.Port() != local.Port() {
							t.Errorf("the backend sees %v, want %v (port %d)", seen, c.client, local.Port())
						}
						for network == "udp" && len(c.seen) > 0 {
							<-c.seen
						}
						for _, r := range w.records() {
							if r.Type == RecordDrop {
								t.Errorf("drop %d: %v -> %v", r.Reason, r.SrcAddr(), r.DstAddr())
							}
						}
					})
				}
			}
		}
	}
	// All of it is collected in the end.
	stats, err := w.Services().Sweep()
	w.do(err)
	if stats.Live != int(id) || stats.Collected != 0 {
		t.Errorf("sweep %+v, want %d live", stats, id)
	}
	claims := w.natRows()
	if claims == 0 {
		t.Error("no claims")
	}
	var keys []tcNatKey
	var values []tcLbEntry
	w.do(walkMap(w.coll.Maps[tcMapLb], func(k tcNatKey, v tcLbEntry) { v.Expires = 1; keys, values = append(keys, k), append(values, v) }))
	for i := range keys {
		w.do(w.coll.Maps[tcMapLb].Put(keys[i], values[i]))
	}
	stats, err = w.Services().Sweep()
	w.do(err)
	if stats.Live != 0 || stats.Collected != int(id) {
		t.Errorf("sweep %+v, want %d collected", stats, id)
	}
	if n := w.natRows(); n != 0 {
		t.Errorf("%d claims left", n)
	}
}

// Pods whose sockets no hook sees reach services as well: others, themselves, and processes of the node.
func TestPodWithoutHooks(t *testing.T) {
	w, a, b := lbWorld(t, "")
	id := uint32(0)
	for family, f := range lbFamilies {
		for name, backend := range map[string]struct {
			at   netip.AddrPort
			seen <-chan netip.AddrPort
			as   netip.Addr
		}{
			"another pod":    {at(f.b, 8080), server(w, in(b), at(f.b, 8080)), f.a},
			"itself":         {at(f.a, 8080), server(w, in(a), at(f.a, 8080)), f.vip},
			"a node process": {at(f.node, 8080), server(w, w.onNode, at(f.node, 8080)), f.a},
			"far":            {at(f.far, 8080), server(w, in(w.out), at(f.far, 8080)), f.a},
		} {
			for network, proto := range networks {
				t.Run(family+" "+network+" "+name, func(t *testing.T) {
					id++
					port := uint16(1000 + id)
					w.do(w.Services().Upsert(Service{Frontend: Frontend{f.vip, port, proto}, ID: id, Backends: backends(backend.at)}))
					if _, err := talk(in(a), network, at(f.vip, port)); err != nil {
						t.Fatalf("%v; records %+v", err, w.records())
					}
					if seen := <-backend.seen; seen.Addr().Unmap() != backend.as {
						t.Errorf("the backend sees %v, want %v", seen, backend.as)
					}
					for network == "udp" && len(backend.seen) > 0 {
						<-backend.seen
					}
					w.records()
				})
			}
		}
	}
}

// Nobody waits for a service that has no backend: not by the socket hooks, and not by packets.
func TestNoBackends(t *testing.T) {
	cgroup := ownCgroup(t)
	for _, hooks := range []string{"", cgroup} {
		w, a, _ := lbWorld(t, hooks)
		for family, f := range lbFamilies {
			for network, proto := range networks {
				w.do(w.Services().Upsert(
					Service{Frontend: Frontend{f.vip, 80, proto}, ID: 1 + uint32(proto)}, Service{Frontend: Frontend{f.any, 30000, proto}, Kind: NodePort, ID: 100 + uint32(proto)}))
				for _, c := range []struct {
					name string
					from *pod
					to   netip.AddrPort
				}{{"pod to ClusterIP", a, at(f.vip, 80)}, {"pod to node port", a, at(f.node, 30000)}, {"outside to node port", w.out, at(f.node, 30000)}} {
					t.Run(fmt.Sprintf("hooks %v, %s %s, %s", hooks != "", family, network, c.name), func(t *testing.T) {
						w.records()
						began := time.Now()
						err := inside(c.from.ns, func() error {
							conn, err := net.DialTimeout(network, c.to.String(), 5*time.Second)
							if err != nil {
								return err
							}
							defer conn.Close()
							conn.SetDeadline(time.Now().Add(5 * time.Second))
							if _, err := conn.Write([]byte("hello")); err != nil {
								return err
							}
							_, err = conn.Read(make([]byte, 1))
							return err
						})
						if !errors.Is(err, unix.ECONNREFUSED) {
							t.Errorf("%v after %v, want connection refused", err, time.Since(began))
						}
						t.Logf("refused after %v", time.Since(began))
						drops := 0
						for _, r := range w.records() {
							if r.Type == RecordDrop && r.Reason == DropNoBackend && at(r.DstAddr(), r.Dport) == c.to && r.Proto == proto && r.Service != 0 {
								drops++
								if c.from == a && (r.Endpoint != epA || r.SrcIdentity != idA || r.SrcAddr() != f.a) {
									t.Errorf("drop of endpoint %d identity %d address %v", r.Endpoint, r.SrcIdentity, r.SrcAddr())
								}
							}
						}
						if drops != 1 {
							t.Errorf("%d records of it, want 1", drops)
						}
					})
				}
			}
		}
	}
}

// An unconnected UDP socket is refused as well.
func TestNoBackendsSendto(t *testing.T) {
	w, a, _ := lbWorld(t, ownCgroup(t))
	w.do(w.Services().Upsert(Service{Frontend: Frontend{vip4, 80, unix.IPPROTO_UDP}, ID: 1}))
	err := inside(a.ns, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, []byte("hello"), 0, &unix.SockaddrInet4{Port: 80, Addr: vip4.As4()})
	})
	if !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("%v, want connection refused", err)
	}
}

// UDP clients of a backend that is removed go on with another one, sockets that were connected once and for all too; a backend that comes or
// stays moves nobody.
func TestUDPMoves(t *testing.T) {
	cgroup := ownCgroup(t)
	w, a, b := lbWorld(t, cgroup)
	for family, f := range lbFamilies {
		near, far := server(w, in(b), at(f.b, 8080)), server(w, in(w.out), at(f.far, 8080))
		_ = far
		for _, connected := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s connected %v", family, connected), func(t *testing.T) {
				svc := Service{Frontend: Frontend{f.vip, 80, unix.IPPROTO_UDP}, ID: 7}
				set := func(list ...netip.AddrPort) { svc.Backends = backends(list...); w.do(w.Services().Upsert(svc)) }
				set(at(f.b, 8080))
				w.do(inside(a.ns, func() error {
					laddr := (*net.UDPAddr)(nil)
					var c *net.UDPConn
					var err error
					if connected {
						c, err = net.DialUDP("udp", laddr, net.UDPAddrFromAddrPort(at(f.vip, 80)))
					} else {
						c, err = net.ListenUDP("udp"+family[1:], nil)
					}
					if err != nil {
						return err
					}
					defer c.Close()
					ask := func(step string, want <-chan netip.AddrPort) {
						t.Helper()
						c.SetDeadline(time.Now().Add(5 * time.Second))
						if connected {
							_, err = c.Write([]byte("hello"))
						} else {
							_, err = c.WriteToUDPAddrPort([]byte("hello"), at(f.vip, 80))
						}
						if err != nil {
							t.Errorf("%s: %v", step, err)
							return
						}
						_, from, err := c.ReadFromUDPAddrPort(make([]byte, 10))
						if err != nil {
							t.Errorf("%s: %v", step, err)
							for _, r := range w.records() {
								t.Logf("type %d %v:%d -> %v:%d endpoint %d point %d reason %d icmp %d/%d", r.Type, r.SrcAddr(), r.Sport, r.DstAddr(), r.Dport, r.Endpoint, r.Point, r.Reason, r.IcmpType, r.IcmpCode)
							}
							return
						}
						if netip.AddrPortFrom(from.Addr().Unmap(), from.Port()) != at(f.vip, 80) {
							t.Errorf("%s: answer from %v", step, from)
						}
						select {
						case <-want:
						default:
							t.Errorf("%s: another backend has answered", step)
						}
					}
					ask("first", near)
					set(at(f.b, 8080), at(f.far, 8080))
					for range 5 {
						ask("one has come", near)
					}
					set(at(f.far, 8080))
					for range 3 {
						ask("the first is gone", far)
					}
					set(at(f.far, 8080), at(f.a, 1))
					for range 3 {
						ask("another has come", far)
					}
					return nil
				}))
			})
		}
	}
}

// A pod is one client to a service with affinity, by sockets and by packets.
func TestSocketAffinity(t *testing.T) {
	w, a, b := lbWorld(t, ownCgroup(t))
	one, two := server(w, in(b), at(podB4, 8080)), server(w, in(b), at(podB4, 8081))
	w.do(w.Services().Upsert(Service{Frontend: Frontend{vip4, 80, unix.IPPROTO_TCP}, ID: 1, Affinity: time.Hour, Backends: backends(at(podB4, 8080), at(podB4, 8081))}))
	for range 12 {
		if _, err := talk(in(a), "tcp", at(vip4, 80)); err != nil {
			t.Fatal(err)
		}
	}
	if len(one) != 12 && len(two) != 12 {
		t.Errorf("backends have %d and %d connections, want all at one", len(one), len(two))
	}
	w.do(w.Services().Upsert(Service{Frontend: Frontend{vip4, 80, unix.IPPROTO_TCP}, ID: 1, Backends: backends(at(podB4, 8080), at(podB4, 8081))}))
	for range 30 {
		if _, err := talk(in(a), "tcp", at(vip4, 80)); err != nil {
			t.Fatal(err)
		}
	}
	if len(one) == 0 || len(two) == 0 {
		t.Errorf("without affinity backends have %d and %d connections", len(one), len(two))
	}
}
