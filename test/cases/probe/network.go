// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"crypto/tls"
	"fmt"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"
)

// Far is somebody who serves: where, and at which address and port.
type Far struct {
	Place Place
	Addr  netip.AddrPort
}

// Network has what listens and waits in all places of a lab. Close it at the end. Safe for concurrent use.
type Network struct {
	mail   *mailbox
	visits visits
	names  names

	certificateOnce  sync.Once
	certificateValue tls.Certificate
	certificateErr   error

	mu      sync.Mutex
	servers map[serverKey]func()
	port    uint16
	closed  bool
	wait    sync.WaitGroup
}

type serverKey struct {
	place    string
	protocol int
	addr     netip.AddrPort
}

// NewNetwork makes a network without listeners.
func NewNetwork() *Network {
	return &Network{
		mail: newMailbox(), servers: map[serverKey]func(){}, visits: visits{m: map[string]visit{}},
		names: names{known: map[nameKey]nameAnswer{}},
	}
}

// Changed is closed when the next message arrives anywhere.
func (n *Network) Changed() <-chan struct{} { return n.mail.watch() }

// Close ends all listeners.
func (n *Network) Close() {
	n.mu.Lock()
	n.closed = true
	for _, end := range n.servers {
		end()
	}
	n.mu.Unlock()
	n.wait.Wait()
}

// serve makes a listener once; open returns what ends it.
func (n *Network) serve(key serverKey, open func() (func(), error)) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return fmt.Errorf("serve %s: the network is closed", key.addr)
	}
	if n.servers[key] != nil {
		return nil
	}
	end, err := open()
	if err != nil {
		return err
	}
	n.servers[key] = end
	return nil
}

// Ports of clients: clear of the kernel's own choices for listeners, and of the range in which a node masquerades.
const firstPort, lastPort = 20001, 31999

// IsClientPort reports whether a port is one that connections are made from.
func IsClientPort(p uint16) bool { return p >= firstPort && p <= lastPort }

// clientPort gives each connection another port: several places may share a namespace.
func (n *Network) clientPort() uint16 {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.port++; n.port < firstPort || n.port > lastPort {
		n.port = firstPort
	}
	return n.port
}

// Protocol numbers.
const (
	tcp   = unix.IPPROTO_TCP
	udp   = unix.IPPROTO_UDP
	sctp  = unix.IPPROTO_SCTP
	icmp4 = unix.IPPROTO_ICMP
	icmp6 = unix.IPPROTO_ICMPV6
)
