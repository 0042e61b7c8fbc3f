// SPDX-License-Identifier: Apache-2.0

package listener

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/services/proxy/internal/sockets"
)

// open makes a listening socket. Not net.Listen: the options must be set before bind, and the socket must be plain TCP, not MPTCP, for the kernel programs
// that look it up.
func open(address netip.AddrPort, spec socketSpec) (*net.TCPListener, error) {
	family := unix.AF_INET6
	if address.Addr().Is4() {
		family = unix.AF_INET
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	if err := prepare(fd, address, spec); err != nil {
		return nil, errors.Join(fmt.Errorf("listen on %s: %w", address, err), unix.Close(fd))
	}
	return adopt(os.NewFile(uintptr(fd), address.String()))
}

// adopt makes a listener of a listening socket's file, which it closes.
func adopt(file *os.File) (*net.TCPListener, error) {
	ln, err := net.FileListener(file)
	closeErr := file.Close()
	if err != nil {
		return nil, fmt.Errorf("take over %s: %w", file.Name(), err)
	}
	tcp, ok := ln.(*net.TCPListener)
	if !ok {
		return nil, errors.Join(fmt.Errorf("take over %s: it is no TCP socket", file.Name()), ln.Close())
	}
	return tcp, closeErr
}

func prepare(fd int, address netip.AddrPort, spec socketSpec) error {
	v4 := address.Addr().Is4()
	set := []sockets.Option{{Level: unix.SOL_SOCKET, Name: unix.SO_REUSEADDR, Value: 1}}
	if !v4 {
		set = append(set, sockets.Option{Level: unix.SOL_IPV6, Name: unix.IPV6_V6ONLY, Value: 1})
	}
	switch {
	case spec.transparent && v4:
		set = append(set, sockets.Option{Level: unix.SOL_IP, Name: unix.IP_TRANSPARENT, Value: 1})
	case spec.transparent:
		set = append(set, sockets.Option{Level: unix.SOL_IPV6, Name: unix.IPV6_TRANSPARENT, Value: 1})
	}
	if spec.freebind {
		set = append(set, sockets.Option{Level: unix.SOL_IP, Name: unix.IP_FREEBIND, Value: 1})
	}
	for _, o := range append(set, spec.options...) {
		if err := sockets.SetOption(fd, o); err != nil {
			return err
		}
	}
	var to unix.Sockaddr
	if v4 {
		to = &unix.SockaddrInet4{Port: int(address.Port()), Addr: address.Addr().As4()}
	} else {
		to = &unix.SockaddrInet6{Port: int(address.Port()), Addr: address.Addr().As16()}
	}
	if err := unix.Bind(fd, to); err != nil {
		return os.NewSyscallError("bind", err)
	}
	return os.NewSyscallError("listen", unix.Listen(fd, spec.backlog))
}
