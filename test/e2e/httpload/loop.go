// SPDX-License-Identifier: Apache-2.0

package httpload

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// loop is a generator of requests: one thread, one epoll, and a timer without the slack of a sleep. Goroutines that sleep would begin up to a millisecond
// late, which at a low rate is more than what a proxy adds.
type loop struct {
	address      netip.AddrPort
	request      []byte
	epoll, timer int
	clients      []client
	begun        time.Time

	// At a rate: the time between two requests, how many there are to be, and how many were due so far. Request k is the concern of client k modulo
	// their number, and due k times every after the beginning.
	every        time.Duration
	planned, due int

	answered, failed int
	failure          error
	latencies, late  []time.Duration
	took             time.Duration
}

// client is one connection, with at most one request under way.
type client struct {
	fd   int // -1 = none
	buf  []byte
	have int
	busy bool
	// index of the request under way, or of the next; owed are due and not sent.
	index, owed int
}

// answerRoom holds any answer of the servers that are measured.
const answerRoom = 16 << 10

func newLoop(ctx context.Context, address string, connections int, path string) (l *loop, err error) {
	l = &loop{request: []byte("GET " + path + " HTTP/1.1\r\nHost: server.example\r\nUser-Agent: httpload\r\nAccept: */*\r\n\r\n"), epoll: -1, timer: -1}
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	if l.address, err = netip.ParseAddrPort(address); err != nil {
		return nil, err
	}
	if l.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("epoll: %w", err)
	}
	if l.timer, err = unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK); err != nil {
		return nil, fmt.Errorf("timer: %w", err)
	}
	if err := l.watch(l.timer, -1); err != nil {
		return nil, err
	}
	l.clients = make([]client, connections)
	for i := range l.clients {
		l.clients[i] = client{fd: -1, buf: make([]byte, answerRoom), index: i}
	}
	for i := range l.clients {
		if err := errors.Join(l.connect(i), ctx.Err()); err != nil {
			return nil, err
		}
	}
	return l, nil
}

func (l *loop) close() {
	for i := range l.clients {
		_ = unix.Close(l.clients[i].fd)
	}
	_ = unix.Close(l.timer)
	_ = unix.Close(l.epoll)
}

func (l *loop) watch(fd, id int) error {
	if err := unix.EpollCtl(l.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(id)}); err != nil { //nolint:gosec // few clients
		return fmt.Errorf("epoll: %w", err)
	}
	return nil
}

// connectTime bounds how long all others wait for one connection that had to be made anew.
const connectTime = time.Second

func (l *loop) connect(i int) error {
	family, to := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Port: int(l.address.Port()), Addr: l.address.Addr().As16()})
	if l.address.Addr().Is4() {
		family, to = unix.AF_INET, &unix.SockaddrInet4{Port: int(l.address.Port()), Addr: l.address.Addr().As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	limit := unix.NsecToTimeval(connectTime.Nanoseconds())
	err = errors.Join(unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1), unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit))
	if err == nil {
		err = unix.Connect(fd, to)
	}
	if err == nil {
		err = errors.Join(unix.SetNonblock(fd, true), l.watch(fd, i))
	}
	if err != nil {
		_ = unix.Close(fd)
		return fmt.Errorf("connect: %w", err)
	}
	l.clients[i].fd, l.clients[i].have, l.clients[i].busy = fd, 0, false
	return nil
}

// run makes the requests of a time, and takes their answers.
func (l *loop) run(ctx context.Context, over time.Duration) error {
	events := make([]unix.EpollEvent, len(l.clients)+1)
	l.begun = time.Now()
	if l.every == 0 {
		if err := l.arm(over); err != nil {
			return err
		}
		for i := range l.clients {
			l.send(i)
		}
	}
	for {
		passed := time.Since(l.begun)
		l.took = min(passed, over)
		if l.every == 0 && passed >= over {
			return nil
		}
		if l.every > 0 {
			l.demand(passed)
			if l.answered+l.failed >= l.planned {
				return nil
			}
			if passed > over+grace {
				l.fail(fmt.Errorf("no answer %s after the last request", grace), l.planned-l.answered-l.failed)
				return nil
			}
			if err := l.arm(over); err != nil {
				return err
			}
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := unix.EpollWait(l.epoll, events, -1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("epoll: %w", err)
		}
		for _, e := range events[:max(n, 0)] {
			if e.Fd >= 0 {
				l.read(int(e.Fd))
			}
		}
	}
}

// demand sends what has become due.
func (l *loop) demand(passed time.Duration) {
	for ; l.due < l.planned && time.Duration(l.due)*l.every <= passed; l.due++ {
		i := l.due % len(l.clients)
		c := &l.clients[i]
		c.owed++
		if c.busy {
			continue
		}
		l.late = append(l.late, max(0, time.Since(l.begun)-time.Duration(l.due)*l.every))
		l.send(i)
	}
}

// arm sets the timer to when there is something to do without an answer.
func (l *loop) arm(over time.Duration) error {
	next := over
	switch {
	case l.every > 0 && l.due < l.planned:
		next = time.Duration(l.due) * l.every
	case l.every > 0:
		next = over + grace
	}
	wait := max(time.Nanosecond, next-time.Since(l.begun)) // nothing at all would stop it
	return unix.TimerfdSettime(l.timer, 0, &unix.ItimerSpec{Value: unix.NsecToTimespec(wait.Nanoseconds())}, nil)
}

// send makes the next request of a client.
func (l *loop) send(i int) {
	c := &l.clients[i]
	c.busy = true
	n, err := unix.Write(c.fd, l.request)
	if err == nil && n < len(l.request) {
		err = unix.EAGAIN // nothing else is under way on it: there must be room
	}
	if err != nil {
		l.again(i, fmt.Errorf("send: %w", err))
	}
}

// read takes what there is of an answer.
func (l *loop) read(i int) {
	c := &l.clients[i]
	n, err := unix.Read(c.fd, c.buf[c.have:])
	switch {
	case errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR):
		return
	case err != nil:
		l.again(i, fmt.Errorf("read: %w", err))
		return
	case n == 0:
		l.again(i, errClosed)
		return
	}
	c.have += n
	size, err := answerSize(c.buf[:c.have])
	if err == nil && (!c.busy || size > len(c.buf) || size > 0 && size < c.have || size == 0 && c.have == len(c.buf)) {
		err = errAnswer // unasked for, too large, or more than an answer
	}
	if err != nil {
		l.again(i, err)
		return
	}
	if size == 0 || size > c.have {
		return // more comes
	}
	c.have, c.busy = 0, false
	l.answered++
	if l.every == 0 {
		l.send(i)
		return
	}
	l.latencies = append(l.latencies, time.Since(l.begun)-time.Duration(c.index)*l.every)
	l.settle(i)
}

// settle ends the request under way, and begins the next if it is due already.
func (l *loop) settle(i int) {
	c := &l.clients[i]
	c.index += len(l.clients)
	if c.owed--; c.owed > 0 {
		l.send(i)
	}
}

// again counts a failure and connects anew.
func (l *loop) again(i int, why error) {
	c := &l.clients[i]
	_ = unix.Close(c.fd)
	c.fd = -1
	wasBusy := c.busy
	c.have, c.busy = 0, false
	if wasBusy {
		l.fail(why, 1)
	}
	if err := l.connect(i); err != nil {
		l.fail(err, 0) // the next write fails, and comes back here
	}
	switch {
	case wasBusy && l.every > 0:
		l.settle(i)
	case wasBusy && c.fd >= 0:
		l.send(i)
	}
}

func (l *loop) fail(why error, n int) {
	l.failed += n
	if l.failure == nil {
		l.failure = why
	}
}
