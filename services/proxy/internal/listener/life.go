// SPDX-License-Identifier: Apache-2.0

package listener

import (
	"context"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// firstRequest is how long a new connection has to send its first request, however its chain is drained: nothing on the wire tells a client that it
// connected in the very moment of an upgrade. As long at most, a drain waits for what a client has sent to be read.
const firstRequest = 2 * time.Second

// look is how often a connection that a drain waits for is looked at.
const look = 10 * time.Millisecond

// life is the context of one connection: it ends with the chain's, but not while the connection has its first request still to send.
func (ch *chain) life(conn net.Conn, accepted time.Time) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.Background())
	stop := context.AfterFunc(ch.drain, func() {
		begun := time.Now()
		var again func()
		again = func() {
			if ctx.Err() == nil && waits(conn, time.Since(accepted), time.Since(begun)) {
				time.AfterFunc(look, again)
				return
			}
			cancel()
		}
		again()
	})
	return ctx, func() { stop(); cancel() }
}

// waits reports whether a connection of some age is given more time, some time after the drain began.
func waits(conn net.Conn, age, drained time.Duration) bool {
	var tcp *net.TCPConn
	switch c := conn.(type) {
	case *net.TCPConn:
		tcp = c
	case *headed:
		tcp = c.TCPConn
	default:
		// Of a TLS connection the kernel can not tell what was a request.
		return age < firstRequest
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return false
	}
	var received uint64
	var unread int
	if err := raw.Control(func(fd uintptr) {
		if info, err := unix.GetsockoptTCPInfo(int(fd), unix.SOL_TCP, unix.TCP_INFO); err == nil {
			received = info.Bytes_received
		}
		if n, err := unix.IoctlGetInt(int(fd), unix.SIOCINQ); err == nil {
			unread = n
		}
	}); err != nil {
		return false // it is closed
	}
	return received == 0 && age < firstRequest || unread > 0 && drained < firstRequest
}
