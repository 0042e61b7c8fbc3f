// SPDX-License-Identifier: Apache-2.0

package mmsg

import (
	"errors"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Sender holds datagrams until they are sent with one call. It is not safe for concurrent use.
type Sender struct {
	headers []header
	vectors []unix.Iovec
	names   []unix.RawSockaddrInet6
	added   int
	sent    int
}

// NewSender makes one for so many datagrams.
func NewSender(count int) *Sender {
	s := &Sender{headers: make([]header, count), vectors: make([]unix.Iovec, count), names: make([]unix.RawSockaddrInet6, count)}
	for i := range s.headers {
		h := &s.headers[i].Msghdr
		h.Iov = &s.vectors[i]
		h.SetIovlen(1)
	}
	return s
}

// Len is how many datagrams wait.
func (s *Sender) Len() int { return s.added }

// Full reports whether no more can be added before Reset.
func (s *Sender) Full() bool { return s.added == len(s.headers) }

// Add adds a datagram, which must not be empty, and stay as it is until it is sent. to is not valid on a connected socket; a raw socket needs no port.
func (s *Sender) Add(data []byte, to netip.Addr) {
	i := s.added
	s.added++
	s.vectors[i].Base = unsafe.SliceData(data)
	s.vectors[i].SetLen(len(data))
	h := &s.headers[i].Msghdr
	switch {
	case !to.IsValid():
		h.Name, h.Namelen = nil, 0
	case to.Is4():
		v4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(&s.names[i]))
		*v4 = unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: to.As4()}
		h.Name, h.Namelen = (*byte)(unsafe.Pointer(v4)), unix.SizeofSockaddrInet4
	default:
		s.names[i] = unix.RawSockaddrInet6{Family: unix.AF_INET6, Addr: to.As16()}
		h.Name, h.Namelen = (*byte)(unsafe.Pointer(&s.names[i])), unix.SizeofSockaddrInet6
	}
}

// Send sends what waits, without waiting for room. failed is told of each that could not be sent, and says whether it is to be tried once more; the
// rest is sent all the same. False: the socket has no room now, and Send is to be called again when it has.
func (s *Sender) Send(fd uintptr, failed func(i int, err error) (again bool)) bool {
	for s.sent < s.added {
		n, errno := call(unix.SYS_SENDMMSG, fd, s.headers[s.sent:s.added])
		switch {
		case errno == 0:
			s.sent += n
		case errors.Is(errno, unix.EAGAIN):
			return false
		case !failed(s.sent, errno):
			s.sent++
		}
	}
	return true
}

// Sent is how many datagrams Send has dealt with.
func (s *Sender) Sent() int { return s.sent }

// Reset forgets all.
func (s *Sender) Reset() {
	for i := range s.vectors[:s.added] {
		s.vectors[i].Base = nil
	}
	s.added, s.sent = 0, 0
}
