// SPDX-License-Identifier: Apache-2.0

// Package capture counts the packets of an interface by connection, straight from a packet socket: the truth that
// flows are compared with. It shares nothing with the datapath.
package capture

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/test/e2e/netns"
)

// Key names a connection, whichever side sent first. In ICMP echo the port of the one that asks is the identifier, the other's is 0: both sides
// may ask with one identifier.
type Key struct {
	Proto  uint8
	Lo, Hi netip.AddrPort
}

// Totals is what one connection did, as seen on one interface.
type Totals struct {
	Key
	// Source sent the first packet.
	Source, Destination netip.AddrPort
	// Index 0 is originator to responder. A packet that the kernel would still cut counts as its segments, each with its own headers.
	Packets, Bytes [2]uint64
	Flags          [2]uint8
	First, Last    time.Time
}

// Capture counts packets until Stop.
type Capture struct {
	fd   int
	done chan struct{}

	mu    sync.Mutex
	conns map[Key]*Totals
	order []Key
	frags map[fragKey]ports
	// Everything that is no connection, by kind.
	other map[string]int
	last  time.Time
	err   error
	// segment is the payload of each segment that the packet at hand will be cut into; 0 = it is one.
	segment int
}

// vnetHeader is the size of struct virtio_net_hdr; its gso_size is at offset 4 (linux/virtio_net.h).
const vnetHeader = 10

type fragKey struct {
	src, dst netip.Addr
	id       uint32
	proto    uint8
}

type ports struct{ src, dst uint16 }

// Start begins to count on ifname inside the network namespace at nsPath.
func Start(nsPath, ifname string) (*Capture, error) {
	var fd int
	err := netns.Do(nsPath, func() error {
		var err error
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("packet socket: %w", err)
		}
		// A large buffer: a lost packet would make the truth false. Drops are checked in Stop.
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20); err != nil {
			return fmt.Errorf("receive buffer: %w", err)
		}
		// Before each packet the kernel then tells how it would be segmented.
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
			return fmt.Errorf("segmentation headers: %w", err)
		}
		link, err := linkIndex(fd, ifname)
		if err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: link})
	})
	if err != nil {
		return nil, fmt.Errorf("capture %s in %s: %w", ifname, nsPath, err)
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50000}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("capture: receive timeout: %w", err)
	}
	c := &Capture{fd: fd, done: make(chan struct{}), conns: map[Key]*Totals{}, frags: map[fragKey]ports{}, other: map[string]int{}}
	stopped := make(chan struct{})
	go func() { c.run(stopped) }()
	c.done = stopped
	return c, nil
}

func linkIndex(fd int, name string) (int, error) {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return 0, fmt.Errorf("interface %s: %w", name, err)
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ifr); err != nil {
		return 0, fmt.Errorf("index of %s: %w", name, err)
	}
	return int(ifr.Uint32()), nil
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

func (c *Capture) run(stopped chan struct{}) {
	defer close(stopped)
	buf := make([]byte, 1<<17)
	for {
		n, _, err := unix.Recvfrom(c.fd, buf, 0)
		switch {
		case err == unix.EAGAIN || err == unix.EINTR:
			c.mu.Lock()
			stop := c.err != nil
			c.mu.Unlock()
			if stop {
				return
			}
		case err != nil:
			c.fail(err)
			return
		default:
			c.mu.Lock()
			c.last = time.Now()
			if n < vnetHeader {
				c.other["short"]++
			} else {
				c.segment = int(binary.NativeEndian.Uint16(buf[4:]))
				c.packet(buf[vnetHeader:n], time.Now())
			}
			c.mu.Unlock()
		}
	}
}

var errStopped = fmt.Errorf("stopped")

func (c *Capture) fail(err error) {
	c.mu.Lock()
	if c.err == nil {
		c.err = err
	}
	c.mu.Unlock()
}

// Settle waits until no packet has come for quiet, at most for limit.
func (c *Capture) Settle(quiet, limit time.Duration) {
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(quiet / 20) {
		c.mu.Lock()
		idle := time.Since(c.last)
		c.mu.Unlock()
		if idle >= quiet {
			return
		}
	}
}

// Stop ends the capture and returns the connections in the order of their first packet, and the count of
// packets that belong to none, by kind. It fails when the packet socket lost packets: then there is no truth.
func (c *Capture) Stop() ([]Totals, map[string]int, error) {
	c.fail(errStopped)
	<-c.done
	stats, err := unix.GetsockoptTpacketStats(c.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	unix.Close(c.fd)
	if err != nil {
		return nil, nil, fmt.Errorf("capture statistics: %w", err)
	}
	if stats.Drops > 0 {
		return nil, nil, fmt.Errorf("capture lost %d of %d packets", stats.Drops, stats.Packets)
	}
	out := make([]Totals, 0, len(c.order))
	for _, k := range c.order {
		out = append(out, *c.conns[k])
	}
	return out, c.other, nil
}

func (c *Capture) packet(p []byte, now time.Time) {
	if len(p) < 14 {
		return
	}
	switch binary.BigEndian.Uint16(p[12:]) {
	case 0x0800:
		c.ipv4(p[14:], now)
	case 0x86dd:
		c.ipv6(p[14:], now)
	default:
		c.other["not-ip"]++
	}
}

func (c *Capture) ipv4(p []byte, now time.Time) {
	if len(p) < 20 {
		c.other["short"]++
		return
	}
	total := int(binary.BigEndian.Uint16(p[2:]))
	hlen := int(p[0]&15) * 4
	src, _ := netip.AddrFromSlice(p[12:16])
	dst, _ := netip.AddrFromSlice(p[16:20])
	frag := binary.BigEndian.Uint16(p[6:])
	f := fragKey{src, dst, uint32(binary.BigEndian.Uint16(p[4:])), p[9]}
	end := min(total, len(p))
	if hlen > end {
		c.other["short"]++
		return
	}
	c.transport(p[9], src, dst, p[hlen:end], total, frag&0x1fff != 0, frag&0x2000 != 0, f, now)
}

func (c *Capture) ipv6(p []byte, now time.Time) {
	if len(p) < 40 {
		c.other["short"]++
		return
	}
	total := int(binary.BigEndian.Uint16(p[4:])) + 40
	src, _ := netip.AddrFromSlice(p[8:24])
	dst, _ := netip.AddrFromSlice(p[24:40])
	next, rest := p[6], p[40:min(total, len(p))]
	var f fragKey
	var later, more bool
	for {
		switch next {
		case 0, 43, 60:
			if len(rest) < 8 || len(rest) < int(rest[1])*8+8 {
				c.other["short"]++
				return
			}
			next, rest = rest[0], rest[int(rest[1])*8+8:]
			continue
		case 44:
			if len(rest) < 8 {
				c.other["short"]++
				return
			}
			off := binary.BigEndian.Uint16(rest[2:])
			later, more = off>>3 != 0, off&1 != 0
			next = rest[0]
			f = fragKey{src, dst, binary.BigEndian.Uint32(rest[4:]), next}
			rest = rest[8:]
			continue
		}
		break
	}
	c.transport(next, src, dst, rest, total, later, more, f, now)
}

func (c *Capture) transport(proto uint8, src, dst netip.Addr, l4 []byte, length int, laterFragment, more bool, f fragKey, now time.Time) {
	var sp, dp uint16
	var flags uint8
	switch {
	case laterFragment:
		known, ok := c.frags[f]
		if !ok {
			c.other["unknown-fragment"]++
			return
		}
		sp, dp = known.src, known.dst
	case (proto == unix.IPPROTO_TCP && len(l4) >= 20) || (proto == unix.IPPROTO_UDP && len(l4) >= 8) || (proto == unix.IPPROTO_SCTP && len(l4) >= 12):
		sp, dp = binary.BigEndian.Uint16(l4), binary.BigEndian.Uint16(l4[2:])
		if proto == unix.IPPROTO_TCP {
			flags = l4[13]
		}
	case proto == unix.IPPROTO_ICMP && len(l4) >= 8 && (l4[0] == 0 || l4[0] == 8),
		proto == unix.IPPROTO_ICMPV6 && len(l4) >= 8 && (l4[0] == 128 || l4[0] == 129):
		sp = binary.BigEndian.Uint16(l4[4:])
		if l4[0] == 0 || l4[0] == 129 {
			sp, dp = 0, sp
		}
	case proto == unix.IPPROTO_ICMPV6 && len(l4) > 0 && (l4[0] >= 130):
		c.other["icmpv6-neighbour-or-multicast"]++
		return
	case proto == unix.IPPROTO_ICMP || proto == unix.IPPROTO_ICMPV6:
		if len(l4) < 2 { // an error: one way, a connection of its own
			c.other["short"]++
			return
		}
		sp, dp = 1, binary.BigEndian.Uint16(l4) // 1: so that it is no answer to an echo
	default:
		c.other[fmt.Sprintf("proto-%d", proto)]++
		return
	}
	if more && !laterFragment {
		c.frags[f] = ports{sp, dp}
	}
	a, b := netip.AddrPortFrom(src, sp), netip.AddrPortFrom(dst, dp)
	k := Key{proto, a, b}
	if b.Compare(a) < 0 {
		k = Key{proto, b, a}
	}
	t := c.conns[k]
	if t == nil {
		t = &Totals{Key: k, Source: a, Destination: b, First: now}
		c.conns[k] = t
		c.order = append(c.order, k)
	}
	dir := 0
	if a != t.Source {
		dir = 1
	}
	packets, bytes := 1, length
	if c.segment > 0 && proto == unix.IPPROTO_TCP {
		headers := length - len(l4) + int(l4[12]>>4)*4
		packets = max(1, (length-headers+c.segment-1)/c.segment)
		bytes = length + (packets-1)*headers
	}
	t.Packets[dir] += uint64(packets)
	t.Bytes[dir] += uint64(bytes)
	t.Flags[dir] |= flags
	t.Last = now
}
