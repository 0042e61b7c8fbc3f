// SPDX-License-Identifier: Apache-2.0

// Package probe makes connections between places of a lab with packets of all kinds, and says what arrived where.
package probe

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/test/e2e/netns"
)

// Place is where sockets are made: a pod, a node, a host outside. Safe for concurrent use.
type Place interface {
	Name() string
	// Socket makes a socket there. The caller closes it.
	Socket(domain, kind, protocol int) (int, error)
}

// Namespace is a place by the path of its network namespace alone.
type Namespace struct{ Title, Path string }

// Name is for messages.
func (n Namespace) Name() string { return n.Title }

// Socket makes a socket in the namespace.
func (n Namespace) Socket(domain, kind, protocol int) (fd int, err error) {
	err = netns.Do(n.Path, func() error {
		fd, err = unix.Socket(domain, kind|unix.SOCK_CLOEXEC, protocol)
		return err
	})
	if err != nil {
		return -1, fmt.Errorf("socket in %s: %w", n.Title, err)
	}
	return fd, nil
}

// Pod is a place where weir-cases-pod runs: sockets are made in the pod's control group too, as the translation of services at the socket needs.
type Pod struct {
	title, path string

	mu   sync.Mutex
	conn *net.UnixConn
}

// NewPod makes the place of a pod whose helper listens on path.
func NewPod(title, path string) *Pod { return &Pod{title: title, path: path} }

// Name is for messages.
func (p *Pod) Name() string { return p.title }

// Close leaves the helper.
func (p *Pod) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.conn != nil {
		p.conn.Close()
		p.conn = nil
	}
}

// Socket makes a socket in the pod.
func (p *Pod) Socket(domain, kind, protocol int) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	fd, err := p.ask(domain, kind, protocol)
	if err != nil {
		return -1, fmt.Errorf("socket in %s: %w", p.title, err)
	}
	return fd, nil
}

// A pod runs from when its process does; when the helper in it listens is seen by trying.
const helperLimit, helperRetry = 5 * time.Second, 5 * time.Millisecond

func (p *Pod) dial() (*net.UnixConn, error) {
	for deadline := time.Now().Add(helperLimit); ; time.Sleep(helperRetry) {
		conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: p.path, Net: "unixpacket"})
		if err == nil || time.Now().After(deadline) {
			return conn, err
		}
	}
}

func (p *Pod) ask(domain, kind, protocol int) (int, error) {
	if p.conn == nil {
		conn, err := p.dial()
		if err != nil {
			return -1, err
		}
		p.conn = conn
	}
	var request [12]byte
	for i, v := range []int{domain, kind, protocol} {
		binary.LittleEndian.PutUint32(request[4*i:], uint32(int32(v)))
	}
	if _, err := p.conn.Write(request[:]); err != nil {
		return -1, err
	}
	var answer [4]byte
	rights := make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := p.conn.ReadMsgUnix(answer[:], rights)
	if err != nil {
		return -1, err
	}
	if number := binary.LittleEndian.Uint32(answer[:]); n != len(answer) || number != 0 {
		return -1, unix.Errno(number)
	}
	messages, err := unix.ParseSocketControlMessage(rights[:oobn])
	if err != nil || len(messages) != 1 {
		return -1, fmt.Errorf("answer without a socket: %w", err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return -1, fmt.Errorf("answer without a socket: %w", err)
	}
	unix.CloseOnExec(fds[0])
	return fds[0], nil
}

func family(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

// bound makes a socket bound to an address.
func bound(p Place, kind, protocol int, local netip.AddrPort) (int, error) {
	fd, err := p.Socket(family(local.Addr()), kind|unix.SOCK_NONBLOCK, protocol)
	if err != nil {
		return -1, err
	}
	if kind != unix.SOCK_RAW {
		// The port of a connection that ended a moment ago may be taken again.
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			unix.Close(fd)
			return -1, fmt.Errorf("socket in %s: reuse address: %w", p.Name(), err)
		}
	}
	if err := unix.Bind(fd, sockaddr(local)); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("bind %s in %s: %w", local, p.Name(), err)
	}
	return fd, nil
}
