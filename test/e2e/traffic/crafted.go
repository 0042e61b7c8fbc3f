// SPDX-License-Identifier: Apache-2.0

package traffic

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Spoof sends n UDP packets whose source address is not this pod's.
func Spoof(n int, to netip.Addr) error {
	return raw(n, to, func(i int, p []byte) []byte {
		copy(p[12:], []byte{203, 0, 113, byte(i%250 + 1)})
		p[9] = unix.IPPROTO_UDP
		return append(p, 0x30, 0x39, 0x1b, 0x59, 0, 8, 0, 0)
	})
}

// OrphanFragments sends n second fragments whose first ones were never sent.
func OrphanFragments(n int, to netip.Addr) error {
	return raw(n, to, func(i int, p []byte) []byte {
		binary.BigEndian.PutUint16(p[4:], uint16(i+1))
		binary.BigEndian.PutUint16(p[6:], 100)
		p[9] = unix.IPPROTO_UDP
		return append(p, make([]byte, 32)...)
	})
}

// raw sends packets with a header of our own; the kernel fills in length, checksum and, when it is zero, the source.
func raw(n int, to netip.Addr, build func(i int, header []byte) []byte) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return fmt.Errorf("raw socket: %w", err)
	}
	defer unix.Close(fd)
	for i := range n {
		p := make([]byte, 20, 64)
		p[0], p[8] = 0x45, 64
		d := to.As4()
		copy(p[16:], d[:])
		if err := unix.Sendto(fd, build(i, p), 0, &unix.SockaddrInet4{Addr: d}); err != nil {
			return fmt.Errorf("send packet %d: %w", i, err)
		}
	}
	return nil
}

// Fill tries to hold n TCP connections to the test server at a time, for a moment; connections that are refused are no error.
func Fill(n int, to netip.Addr) (made int) {
	var wg sync.WaitGroup
	var mu sync.Mutex
	for range n {
		wg.Go(func() {
			c, err := net.DialTimeout("tcp", netip.AddrPortFrom(to, TCPPort).String(), 2*time.Second)
			if err != nil {
				return
			}
			defer c.Close()
			mu.Lock()
			made++
			mu.Unlock()
			time.Sleep(time.Second) // holds its place in the table
		})
	}
	wg.Wait()
	return made
}
