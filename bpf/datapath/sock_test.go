// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ownCgroup moves this process into a cgroup of its own for the test.
func ownCgroup(t testing.TB) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	var root string
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 2 && f[2] == "cgroup2" {
			root = f[1]
		}
	}
	if root == "" {
		t.Fatal("no cgroup v2 is mounted: the socket hooks need one")
	}
	was, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	home := root
	for line := range strings.Lines(string(was)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			home = filepath.Join(root, path)
		}
	}
	dir, err := os.MkdirTemp(root, "weir-test-")
	if err != nil {
		t.Fatal(err)
	}
	enter := func(path string) error {
		return os.WriteFile(filepath.Join(path, "cgroup.procs"), fmt.Appendf(nil, "%d", os.Getpid()), 0o644)
	}
	if err := enter(dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := enter(home); err != nil {
			t.Errorf("leave cgroup: %v", err)
		}
		if err := os.Remove(dir); err != nil {
			t.Errorf("remove cgroup: %v", err)
		}
	})
	return dir
}

const serviceID = 77

var vip6 = netip.MustParseAddr("fd00:10:96::a")

// serviceWorld is two pods, a client and a server, and a service in front of the server.
func serviceWorld(t testing.TB) (w *world, client, server *pod) {
	t.Helper()
	dir := ownCgroup(t)
	w = newWorld(t, nil)
	w.do(w.AttachCgroup(dir))
	client = w.plug("a", epA, idA, podA4, podA6)
	server = w.plug("b", epB, idB, podB4, podB6)
	for _, p := range []string{"10.96.0.0/16", "fd00:10:96::/112"} {
		w.do(w.IPCache().Upsert(netip.MustParsePrefix(p), IPCacheEntry{Flags: IPCacheServices}))
	}
	for _, proto := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		w.do(w.Services().Upsert(Service{Frontend: Frontend{vip4, 80, proto}, ID: serviceID, Backends: backends(at(podB4, 8080))}))
		w.do(w.Services().Upsert(Service{Frontend: Frontend{vip6, 80, proto}, ID: serviceID, Backends: backends(at(podB6, 8080))}))
	}
	return w, client, server
}

// checkService checks that the records tell of the translation and that the connection carries the service.
func checkService(w *world, t *testing.T, vip, backend netip.AddrPort, proto uint8, local netip.Addr) {
	t.Helper()
	var translations, named int
	for _, r := range w.records() {
		switch {
		case r.Type == RecordTranslation:
			translations++
			if at(r.DstAddr(), r.Dport) != vip || at(r.XlatedAddr(), r.XlatedPort) != backend || r.Proto != proto || r.Service != serviceID {
				t.Errorf("translation of %v:%d to %v:%d proto %d service %d", r.DstAddr(), r.Dport, r.XlatedAddr(), r.XlatedPort, r.Proto, r.Service)
			}
			if r.SrcAddr() != local || r.Endpoint != epA || r.SrcIdentity != idA || r.SocketCookie == 0 {
				t.Errorf("translation by %v endpoint %d identity %d cookie %d", r.SrcAddr(), r.Endpoint, r.SrcIdentity, r.SocketCookie)
			}
		case r.Type == RecordTrace && r.Endpoint == epA && (at(r.DstAddr(), r.Dport) == backend || at(r.SrcAddr(), r.Sport) == backend):
			named++
			if r.Service != serviceID {
				t.Errorf("record of %v -> %v: service %d, want %d", r.SrcAddr(), r.DstAddr(), r.Service, serviceID)
			}
		}
	}
	if translations != 1 || named == 0 {
		t.Errorf("%d translations and %d records of the connection, want 1 and some", translations, named)
	}
}

func TestServiceTCP(t *testing.T) {
	w, client, server := serviceWorld(t)
	echoServer(w, server, at(podB4, 8080))
	echoServer(w, server, at(podB6, 8080))
	seen := map[uint64]bool{}
	for _, c := range []struct {
		name, network string
		dial          netip.AddrPort
		vip, backend  netip.AddrPort
		local         netip.Addr
	}{
		{"v4", "tcp4", at(vip4, 80), at(vip4, 80), at(podB4, 8080), podA4},
		{"v6", "tcp6", at(vip6, 80), at(vip6, 80), at(podB6, 8080), podA6},
		{"v4 mapped", "mapped", at(vip4, 80), at(vip4, 80), at(podB4, 8080), podA4},
	} {
		t.Run(c.name, func(t *testing.T) {
			var peer netip.AddrPort
			if c.network == "mapped" {
				peer = mappedExchange(w, t, client, c.dial)
			} else {
				w.do(inside(client.ns, func() error {
					conn, err := net.DialTimeout(c.network, c.dial.String(), 5*time.Second)
					if err != nil {
						return err
					}
					defer conn.Close()
					conn.SetDeadline(time.Now().Add(5 * time.Second))
					if _, err := conn.Write([]byte("hello")); err != nil {
						return err
					}
					if _, err := io.ReadFull(conn, make([]byte, 5)); err != nil {
						return err
					}
					sys, err := conn.(*net.TCPConn).SyscallConn()
					if err != nil {
						return err
					}
					var sa unix.Sockaddr
					if cerr := sys.Control(func(fd uintptr) { sa, err = unix.Getpeername(int(fd)) }); cerr != nil || err != nil {
						return fmt.Errorf("getpeername: %w", errors.Join(cerr, err))
					}
					peer = sockaddr(sa)
					return nil
				}))
			}
			if peer != c.vip {
				t.Errorf("peer name %v, want %v", peer, c.vip)
			}
			checkService(w, t, c.vip, c.backend, unix.IPPROTO_TCP, c.local)
			found := false
			w.do(w.Conntrack().List(func(conn Conn) bool {
				if conn.Endpoint == epA && conn.Destination == c.backend && !seen[conn.ID] {
					seen[conn.ID] = true
					found = true
					if conn.Service != serviceID || conn.Known&KnownSRTT == 0 || conn.SRTTUs == 0 || conn.Known&KnownRetransmissions == 0 {
						t.Errorf("entry %+v: want service, srtt and retransmissions", conn)
					}
				}
				return true
			}))
			if !found {
				t.Error("no entry at the client's observation point")
			}
		})
	}
}

func sockaddr(sa unix.Sockaddr) netip.AddrPort {
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr).Unmap(), uint16(a.Port))
	}
	return netip.AddrPort{}
}

// mappedExchange uses an IPv6 socket with an IPv4-mapped address, and returns its peer's name.
func mappedExchange(w *world, t *testing.T, client *pod, to netip.AddrPort) (peer netip.AddrPort) {
	t.Helper()
	w.do(inside(client.ns, func() error {
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
			return err
		}
		if err := unix.Connect(fd, &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}); err != nil {
			return err
		}
		if _, err := unix.Write(fd, []byte("hello")); err != nil {
			return err
		}
		if _, err := unix.Read(fd, make([]byte, 5)); err != nil {
			return err
		}
		sa, err := unix.Getpeername(fd)
		if err != nil {
			return err
		}
		peer = sockaddr(sa)
		return nil
	}))
	return peer
}

// udpEcho answers datagrams.
func udpEcho(w *world, p *pod, addr netip.AddrPort) {
	w.Helper()
	var c net.PacketConn
	w.do(inside(p.ns, func() (err error) {
		c, err = net.ListenPacket("udp", addr.String())
		return err
	}))
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 65536)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			c.WriteTo(buf[:n], from)
		}
	}()
	w.Cleanup(func() { c.Close(); <-done })
}

func TestServiceUDP(t *testing.T) {
	w, client, server := serviceWorld(t)
	udpEcho(w, server, at(podB4, 8080))
	udpEcho(w, server, at(podB6, 8080))
	for _, c := range []struct {
		name         string
		family       int
		connected    bool
		vip, backend netip.AddrPort
		local        netip.Addr
	}{
		{"v4 connected", unix.AF_INET, true, at(vip4, 80), at(podB4, 8080), podA4},
		{"v4 unconnected", unix.AF_INET, false, at(vip4, 80), at(podB4, 8080), podA4},
		{"v6 connected", unix.AF_INET6, true, at(vip6, 80), at(podB6, 8080), podA6},
		{"v6 unconnected", unix.AF_INET6, false, at(vip6, 80), at(podB6, 8080), podA6},
		{"v4 mapped connected", unix.AF_INET6, true, at(vip4, 80), at(podB4, 8080), podA4},
		{"v4 mapped unconnected", unix.AF_INET6, false, at(vip4, 80), at(podB4, 8080), podA4},
	} {
		t.Run(c.name, func(t *testing.T) {
			var sa unix.Sockaddr = &unix.SockaddrInet6{Port: int(c.vip.Port()), Addr: c.vip.Addr().As16()}
			if c.family == unix.AF_INET {
				sa = &unix.SockaddrInet4{Port: int(c.vip.Port()), Addr: c.vip.Addr().As4()}
			}
			w.do(inside(client.ns, func() error {
				fd, err := unix.Socket(c.family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
				if err != nil {
					return err
				}
				defer unix.Close(fd)
				if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
					return err
				}
				send := func() error { return unix.Sendto(fd, []byte("hello"), 0, sa) }
				if c.connected {
					if err := unix.Connect(fd, sa); err != nil {
						return err
					}
					send = func() error { _, err := unix.Write(fd, []byte("hello")); return err }
				}
				// Twice: the second datagram of a socket makes no second translation.
				for range 2 {
					if err := send(); err != nil {
						return err
					}
					_, from, err := unix.Recvfrom(fd, make([]byte, 100), 0)
					if err != nil {
						return fmt.Errorf("answer: %w", err)
					}
					if got := sockaddr(from); got != c.vip {
						t.Errorf("answer from %v, want %v", got, c.vip)
					}
				}
				return nil
			}))
			checkService(w, t, c.vip, c.backend, unix.IPPROTO_UDP, c.local)
		})
	}
}

// An unconnected socket stays with its backend until the set of backends changes.
func TestServiceChanges(t *testing.T) {
	w, client, server := serviceWorld(t)
	udpEcho(w, server, at(podB4, 8080))
	udpEcho(w, server, at(podB4, 8081))
	f := Frontend{vip4, 80, unix.IPPROTO_UDP}
	w.do(inside(client.ns, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
			return err
		}
		for _, backend := range []uint16{8080, 8081, 8080} {
			if err := w.Services().Upsert(Service{Frontend: f, ID: serviceID, Backends: backends(at(podB4, backend))}); err != nil {
				return err
			}
			w.records()
			for range 3 {
				if err := unix.Sendto(fd, []byte("hello"), 0, &unix.SockaddrInet4{Port: 80, Addr: vip4.As4()}); err != nil {
					return err
				}
				_, from, err := unix.Recvfrom(fd, make([]byte, 100), 0)
				if err != nil {
					return fmt.Errorf("answer of %d: %w", backend, err)
				}
				if got := sockaddr(from); got != at(vip4, 80) {
					t.Errorf("answer from %v", got)
				}
			}
			translations := 0
			for _, r := range w.records() {
				if r.Type == RecordTranslation {
					translations++
					if r.XlatedPort != backend {
						t.Errorf("translated to port %d, want %d", r.XlatedPort, backend)
					}
				}
			}
			if translations != 1 {
				t.Errorf("backend %d: %d translations, want 1", backend, translations)
			}
		}
		return nil
	}))
}

// What the local socket sends again is in its entry, also of a connection that never comes to be.
func TestRetransmissions(t *testing.T) {
	w, client, _ := serviceWorld(t)
	// The host outside does not know the way back.
	w.do(inside(w.out.ns, func() error {
		l, err := netlink.LinkByName("outside")
		if err != nil {
			return err
		}
		_, dst, _ := net.ParseCIDR("10.244.1.0/24")
		return netlink.RouteDel(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: dst})
	}))
	w.do(inside(client.ns, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.Connect(fd, &unix.SockaddrInet4{Port: 9, Addr: w.out.v4.As4()}); !errors.Is(err, unix.EINPROGRESS) {
			return fmt.Errorf("connect: %w", err)
		}
		for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
			var conn Conn
			w.do(w.Conntrack().List(func(c Conn) bool { conn = c; return c.Destination.Addr() != w.out.v4 }))
			if conn.Forward.Packets < 2 {
				continue
			}
			if conn.Known&KnownRetransmissions == 0 || uint64(conn.Retransmissions) != conn.Forward.Packets-1 {
				// The socket counts just after the packet went.
				continue
			}
			if conn.State != StateSynSent {
				t.Errorf("state %v, want syn-sent", conn.State)
			}
			return nil
		}
		return errors.New("no retransmission in the entry within 10 seconds")
	}))
}
