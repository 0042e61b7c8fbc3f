// SPDX-License-Identifier: Apache-2.0

// Package mmsg receives and sends datagrams many at a time: recvmmsg(2) and sendmmsg(2) on sockets that do not block. x/net's batches allocate an address
// for each datagram and tell the scheduler of each call, which then hands the processor to another thread while the kernel walks a packet to its
// receiver: in weir-dns that was a quarter of a query.
package mmsg

import (
	"encoding/binary"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// header is struct mmsghdr.
type header struct {
	unix.Msghdr
	length uint32
	_      uint32
}

// call is a system call that does not sleep: the scheduler need not know of it.
func call(number, fd uintptr, headers []header) (int, unix.Errno) {
	for {
		n, _, errno := syscall.RawSyscall6(number, fd, uintptr(unsafe.Pointer(unsafe.SliceData(headers))), uintptr(len(headers)), unix.MSG_DONTWAIT, 0, 0)
		if errno != unix.EINTR {
			return int(n), errno
		}
	}
}

// Receiver holds what one call received. It is not safe for concurrent use.
type Receiver struct {
	headers []header
	names   []unix.RawSockaddrInet6
	data    []byte
	control []byte
	size    int
	space   int
	used    int // headers that the kernel has written since they were prepared
}

// NewReceiver makes one for so many datagrams of at most size bytes, with space for control messages.
func NewReceiver(count, size, space int) *Receiver {
	r := &Receiver{
		headers: make([]header, count), names: make([]unix.RawSockaddrInet6, count), data: make([]byte, count*size), control: make([]byte, count*space),
		size: size, space: space, used: count,
	}
	vectors := make([]unix.Iovec, count)
	for i := range r.headers {
		vectors[i].Base = &r.data[i*size]
		vectors[i].SetLen(size)
		h := &r.headers[i].Msghdr
		h.Iov, h.Name = &vectors[i], (*byte)(unsafe.Pointer(&r.names[i]))
		h.SetIovlen(1)
		if space > 0 {
			h.Control = &r.control[i*space]
		}
	}
	return r
}

// Receive takes what has come, without waiting. What it took before is gone. With no error there is at least one; fewer than the receiver holds say
// that no more had come.
func (r *Receiver) Receive(fd uintptr) (int, error) {
	for i := range r.headers[:r.used] {
		h := &r.headers[i].Msghdr
		h.Namelen = unix.SizeofSockaddrInet6
		h.SetControllen(r.space)
	}
	n, errno := call(unix.SYS_RECVMMSG, fd, r.headers)
	if errno != 0 {
		r.used = 0
		return 0, errno
	}
	r.used = n
	return n, nil
}

// Len is how many it holds at most.
func (r *Receiver) Len() int { return len(r.headers) }

// Data is the content of a datagram that was received; it is there until the next Receive.
func (r *Receiver) Data(i int) []byte {
	return r.data[i*r.size : i*r.size+int(r.headers[i].length)]
}

// Whole reports whether all of a datagram and of its control messages was received.
func (r *Receiver) Whole(i int) bool {
	return r.headers[i].Flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) == 0
}

// Control are the control messages of a datagram.
func (r *Receiver) Control(i int) []byte {
	return r.control[i*r.space : i*r.space+int(r.headers[i].Controllen)]
}

// From is who sent a datagram; the zero value for other families than IPv4 and IPv6.
func (r *Receiver) From(i int) netip.AddrPort {
	switch name := &r.names[i]; name.Family {
	case unix.AF_INET:
		v4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(name))
		return netip.AddrPortFrom(netip.AddrFrom4(v4.Addr), hostOrder(v4.Port))
	case unix.AF_INET6:
		return netip.AddrPortFrom(netip.AddrFrom16(name.Addr).Unmap(), hostOrder(name.Port))
	}
	return netip.AddrPort{}
}

// hostOrder turns a port of a socket address, which is in network order, and turns it back.
func hostOrder(port uint16) uint16 {
	var b [2]byte
	binary.NativeEndian.PutUint16(b[:], port)
	return binary.BigEndian.Uint16(b[:])
}
