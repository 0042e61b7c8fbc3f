// SPDX-License-Identifier: Apache-2.0

// Package sockets makes the sockets by which the proxy reaches servers: in the client's name where a listener says so, with a source port of the range
// that no pod uses.
package sockets

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// Option is a socket option as a configuration names it.
type Option struct {
	Level, Name int
	// Value is set if Bytes is nil.
	Value int
	Bytes []byte
}

// ipLocalPortRange is IP_LOCAL_PORT_RANGE (kernel 6.3).
const ipLocalPortRange = 51

// Spec says how one connection is made.
type Spec struct {
	// Source is the client's address (its port does not count); invalid = the node's own.
	Source netip.Addr
	// Mark of the socket; 0 = none.
	Mark uint32
	// PortMin and PortMax bound the source port; 0 = the kernel's own range.
	PortMin, PortMax uint16
	// Options are set before the socket is bound.
	Options []Option
}

// PortRange takes the port range out of a configuration's socket options, so that it can be kept on kernels without the option.
func PortRange(options []Option) (rest []Option, low, high uint16) {
	for _, o := range options {
		if o.Level == unix.SOL_IP && o.Name == ipLocalPortRange && o.Bytes == nil {
			low, high = uint16(o.Value&0xffff), uint16(uint32(o.Value)>>16) //nolint:gosec // the option is two 16-bit halves
			continue
		}
		rest = append(rest, o)
	}
	return rest, low, high
}

// Dialer makes upstream connections. Safe for concurrent use.
type Dialer struct {
	// noRange: the kernel does not know IP_LOCAL_PORT_RANGE, so that the dialer chooses ports itself.
	noRange atomic.Bool
	net     net.Dialer
}

// New makes a dialer.
func New() *Dialer {
	return &Dialer{net: net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true}}}
}

// ChoosePorts makes the dialer choose source ports itself, as it does on kernels older than 6.3.
func (d *Dialer) ChoosePorts() { d.noRange.Store(true) }

// DialUnix connects to a unix socket.
func (d *Dialer) DialUnix(ctx context.Context, path string) (net.Conn, error) {
	return d.net.DialContext(ctx, "unix", path)
}

// attempts is how many ports are tried before the dialer gives up: a range of thousands that is nearly full of connections to the same server.
const attempts = 128

// Dial connects to an address.
func (d *Dialer) Dial(ctx context.Context, spec Spec, to netip.AddrPort) (net.Conn, error) {
	ranged := spec.PortMin != 0 && spec.PortMax >= spec.PortMin
	if !ranged || !d.noRange.Load() {
		conn, err := d.dialOnce(ctx, spec, to, 0)
		if err == nil || !errors.Is(err, errNoRange) {
			return conn, err
		}
		d.noRange.Store(true)
	}
	width := uint32(spec.PortMax-spec.PortMin) + 1
	first := rand.Uint32N(width) //nolint:gosec // which port is no secret
	var err error
	for i := range min(width, attempts) {
		port := spec.PortMin + uint16((first+i)%width) //nolint:gosec // below 65536 by construction
		var conn net.Conn
		conn, err = d.dialOnce(ctx, spec, to, port)
		if err == nil || !errors.Is(err, unix.EADDRINUSE) && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return conn, err
		}
	}
	return nil, err
}

// errNoRange: setting IP_LOCAL_PORT_RANGE failed because the kernel has no such option.
var errNoRange = errors.New("the kernel has no IP_LOCAL_PORT_RANGE")

// dialOnce makes one attempt; port 0 leaves the choice to the kernel.
func (d *Dialer) dialOnce(ctx context.Context, spec Spec, to netip.AddrPort, port uint16) (net.Conn, error) {
	dialer := d.net
	dialer.Control = func(_, _ string, raw syscall.RawConn) error {
		var err error
		if ctlErr := raw.Control(func(fd uintptr) { err = prepare(int(fd), spec, to.Addr(), port) }); ctlErr != nil {
			return ctlErr
		}
		return err
	}
	return dialer.DialContext(ctx, "tcp", to.String())
}

// prepare sets the options and binds the socket.
func prepare(fd int, spec Spec, to netip.Addr, port uint16) error {
	for _, o := range spec.Options {
		if err := SetOption(fd, o); err != nil {
			return err
		}
	}
	set := func(level, name, value int, what string) error {
		return os.NewSyscallError("setsockopt "+what, unix.SetsockoptInt(fd, level, name, value))
	}
	if spec.Mark != 0 {
		if err := set(unix.SOL_SOCKET, unix.SO_MARK, int(spec.Mark), "SO_MARK"); err != nil {
			return err
		}
	}
	v4 := to.Unmap().Is4()
	if spec.Source.IsValid() {
		if err := setTransparent(fd, v4); err != nil {
			return err
		}
	}
	switch {
	case port != 0:
		// Several connections to different servers may have the same port.
		if err := set(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1, "SO_REUSEADDR"); err != nil {
			return err
		}
	case spec.PortMin != 0 && spec.PortMax >= spec.PortMin:
		err := unix.SetsockoptInt(fd, unix.SOL_IP, ipLocalPortRange, int(spec.PortMax)<<16|int(spec.PortMin))
		if errors.Is(err, unix.ENOPROTOOPT) {
			return errNoRange
		}
		if err != nil {
			return os.NewSyscallError("setsockopt IP_LOCAL_PORT_RANGE", err)
		}
	}
	return bind(fd, spec, v4, port)
}

// bind binds a socket to the client's address, to a port, or not at all.
func bind(fd int, spec Spec, v4 bool, port uint16) error {
	if !spec.Source.IsValid() && port == 0 {
		return nil
	}
	if port == 0 {
		// The port is chosen at connect, among those free for this very server.
		if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); err != nil {
			return os.NewSyscallError("setsockopt IP_BIND_ADDRESS_NO_PORT", err)
		}
	}
	source := spec.Source.Unmap()
	if source.IsValid() && source.Is4() != v4 {
		return fmt.Errorf("bind: the client %s and its server are of two families", source)
	}
	if v4 {
		address := &unix.SockaddrInet4{Port: int(port)}
		if source.IsValid() {
			address.Addr = source.As4()
		}
		return os.NewSyscallError("bind", unix.Bind(fd, address))
	}
	address := &unix.SockaddrInet6{Port: int(port)}
	if source.IsValid() {
		address.Addr = source.As16()
	}
	return os.NewSyscallError("bind", unix.Bind(fd, address))
}

func setTransparent(fd int, v4 bool) error {
	if v4 {
		return os.NewSyscallError("setsockopt IP_TRANSPARENT", unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1))
	}
	return os.NewSyscallError("setsockopt IPV6_TRANSPARENT", unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1))
}

// SetOption sets one option of a socket.
func SetOption(fd int, o Option) error {
	var err error
	if o.Bytes != nil {
		err = unix.SetsockoptString(fd, o.Level, o.Name, string(o.Bytes))
	} else {
		err = unix.SetsockoptInt(fd, o.Level, o.Name, o.Value)
	}
	return os.NewSyscallError(fmt.Sprintf("setsockopt %d/%d", o.Level, o.Name), err)
}
