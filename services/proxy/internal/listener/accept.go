// SPDX-License-Identifier: Apache-2.0

package listener

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// finish stops accepting, when what is queued was taken, and then drains the chains.
func (l *Listener) finish() {
	l.ending.Do(func() {
		l.mu.Lock()
		for address, ln := range l.socks {
			l.set.retire(ln)
			delete(l.socks, address)
		}
		l.mu.Unlock()
		l.set.active.Go(func() {
			l.accepting.Wait()
			for _, c := range l.plan.Load().all() {
				c.end()
			}
		})
	})
}

// cut closes the connections that are left.
func (l *Listener) cut() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	for conn := range l.conns {
		reset(conn)
	}
	return len(l.conns)
}

// pauses between attempts when the process is out of descriptors.
const (
	minPause = 5 * time.Millisecond
	maxPause = time.Second
)

// accept takes connections until its socket is closed.
func (l *Listener) accept(ln *net.TCPListener) {
	own, pause := addrPort(ln.Addr()), minPause
	for {
		conn, err := ln.AcceptTCP()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				l.mu.Lock()
				_, given := l.given[ln]
				l.mu.Unlock()
				if !given {
					l.takeQueued(ln, own)
				}
				l.set.closeSocket(ln)
				return
			}
			l.set.config.Log.Warn("listener does not accept", "listener", l.name, "error", err)
			time.Sleep(pause)
			pause = min(2*pause, maxPause)
			continue
		}
		pause = minPause
		l.admit(conn, own)
	}
}

// maxQueued is how many connections are taken from a socket that is about to be closed.
const maxQueued = 4096

// takeQueued accepts what is in a socket's queue, without waiting for more. The runtime would not accept at all after the deadline.
func (l *Listener) takeQueued(ln *net.TCPListener, own netip.AddrPort) {
	raw, err := ln.SyscallConn()
	if err != nil {
		return
	}
	for range maxQueued {
		fd := -1
		if err := raw.Control(func(s uintptr) { fd, _, err = unix.Accept4(int(s), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC) }); err != nil || fd < 0 {
			return
		}
		file := os.NewFile(uintptr(fd), "accepted")
		conn, err := net.FileConn(file)
		_ = file.Close() // the connection has a copy
		if tcp, ok := conn.(*net.TCPConn); ok && err == nil {
			l.admit(tcp, own)
		}
	}
}

// admit counts a connection against the limits and begins it.
func (l *Listener) admit(conn *net.TCPConn, own netip.AddrPort) {
	p := l.plan.Load()
	limits := l.set.config.Limits
	if n := l.count.Add(1); l.set.config.MaxConnections > 0 && n > l.set.config.MaxConnections {
		l.count.Add(-1)
		limits.Refused(p.namespace, CauseListener)
		reset(conn)
		return
	}
	release, ok := limits.Connection(p.namespace)
	if !ok {
		l.count.Add(-1)
		reset(conn)
		return
	}
	l.total.Add(1)
	l.mu.Lock()
	l.conns[conn] = struct{}{}
	l.mu.Unlock()
	l.set.active.Go(func() {
		defer func() {
			l.mu.Lock()
			delete(l.conns, conn)
			l.mu.Unlock()
			l.count.Add(-1)
			release()
		}()
		l.serve(p, conn, own)
	})
}
