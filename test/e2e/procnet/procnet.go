// SPDX-License-Identifier: Apache-2.0

// Package procnet reads the kernel's tables of sockets: proc(5), /proc/net/tcp and its kin.
package procnet

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
)

// Served are the local addresses, of the calling thread's network namespace, at which a TCP socket listens (network tcp) or a UDP socket that is
// connected to nobody is bound (udp).
func Served(network string) ([]netip.AddrPort, error) {
	// States by include/net/tcp_states.h: TCP_LISTEN, and TCP_CLOSE, which is that of an unconnected UDP socket.
	state := map[string]string{"tcp": "0A", "udp": "07"}[network]
	if state == "" {
		return nil, fmt.Errorf("network %q: want tcp or udp", network)
	}
	var all []netip.AddrPort
	for _, table := range []string{network, network + "6"} {
		file := "/proc/thread-self/net/" + table
		data, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(string(data)) {
			fields := strings.Fields(line)
			if len(fields) < 4 || fields[3] != state {
				continue
			}
			a, err := addrPort(fields[1])
			if err != nil {
				return nil, fmt.Errorf("%s: %w", file, err)
			}
			all = append(all, a)
		}
	}
	return all, nil
}

// addrPort reads an address: hexadecimal words in the machine's order, then the port.
func addrPort(text string) (netip.AddrPort, error) {
	host, port, _ := strings.Cut(text, ":")
	b, err := hex.DecodeString(host)
	if err != nil || len(b)%4 != 0 {
		return netip.AddrPort{}, fmt.Errorf("address %q", text)
	}
	for i := 0; i < len(b); i += 4 {
		binary.NativeEndian.PutUint32(b[i:], binary.BigEndian.Uint32(b[i:]))
	}
	a, ok := netip.AddrFromSlice(b)
	n, err := strconv.ParseUint(port, 16, 16)
	if !ok || err != nil {
		return netip.AddrPort{}, fmt.Errorf("address %q", text)
	}
	return netip.AddrPortFrom(a.Unmap(), uint16(n)), nil
}
