// SPDX-License-Identifier: Apache-2.0

package netfilter

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/services/proxy/internal/model"
)

// Headed is a connection of which some bytes have been read already.
type Headed interface {
	net.Conn
	// Split returns those bytes, and the connection without them. Who uses it reads from the connection itself from then on.
	Split() (head []byte, conn *net.TCPConn)
}

// raw returns the TCP connection itself, whose bytes the kernel can move by itself; nil = they must be copied (TLS, unix sockets).
func raw(c net.Conn) *net.TCPConn {
	switch conn := c.(type) {
	case *net.TCPConn:
		return conn
	case *releasing:
		return raw(conn.Conn)
	case interface{ Unwrap() *net.TCPConn }:
		return conn.Unwrap()
	}
	return nil
}

// socket returns the TCP connection under TLS as well; nil = none.
func socket(c net.Conn) *net.TCPConn {
	switch conn := c.(type) {
	case *releasing:
		return socket(conn.Conn)
	case Headed:
		_, tcp := conn.Split()
		return tcp
	case interface{ NetConn() net.Conn }:
		return socket(conn.NetConn())
	}
	return raw(c)
}

// copyBuffer is what one direction of a connection takes that must be copied.
const copyBuffer = 32 << 10

var buffers = sync.Pool{New: func() any { b := make([]byte, copyBuffer); return &b }} //nolint:gochecknoglobals // a cache of memory, without state

// relay moves bytes both ways until both ends have said all, and closes both.
func (p *TCPProxy) relay(down, up net.Conn, c *model.Conn, entry *model.Entry) {
	var head []byte
	watched := socket(down)
	if headed, ok := down.(Headed); ok {
		head, _ = headed.Split()
		down = watched
	}
	if raw(down) == nil || raw(up) == nil {
		release, ok := p.env.Limits.Buffer(c.Namespace, 2*copyBuffer)
		if !ok {
			entry.Flags = []string{"OM"}
			reset(down)
			reset(up)
			return
		}
		defer release()
	}
	var once sync.Once
	var why atomic.Pointer[string]
	end := func(reason string) {
		once.Do(func() {
			if reason != "" {
				why.Store(&reason)
			}
			// The other side is told as it happened: cut off, not ended.
			reset(down)
			reset(up)
		})
	}
	stop := p.watch(watched, end)
	var group sync.WaitGroup
	group.Go(func() {
		n, err := half(up, down, head)
		entry.RequestBytes = n
		if err != nil {
			end("DC")
		}
	})
	n, err := half(down, up, nil)
	entry.ResponseBytes = n
	if err != nil {
		end("UC")
	}
	group.Wait()
	stop()
	if reason := why.Load(); reason != nil {
		entry.Flags = append(entry.Flags, *reason)
	}
	_ = down.Close() // all was said
	_ = up.Close()
}

// half moves one direction to its end and passes the end on.
func half(to, from net.Conn, head []byte) (uint64, error) {
	if len(head) > 0 {
		if _, err := to.Write(head); err != nil {
			return 0, err
		}
	}
	n, err := move(to, from)
	total := uint64(len(head)) + uint64(max(n, 0))
	if err != nil {
		return total, err
	}
	return total, closeWrite(to)
}

func move(to, from net.Conn) (int64, error) {
	if t, f := raw(to), raw(from); t != nil && f != nil {
		return t.ReadFrom(f) // splice
	}
	buffer := buffers.Get().(*[]byte) //nolint:forcetypeassert // only buffers are put
	defer buffers.Put(buffer)
	return io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, *buffer)
}

func closeWrite(c net.Conn) error {
	if r, ok := c.(*releasing); ok {
		c = r.Conn
	}
	if w, ok := c.(interface{ CloseWrite() error }); ok {
		// A peer that has gone already needs no end.
		if err := w.CloseWrite(); err != nil && !errors.Is(err, syscall.ENOTCONN) {
			return err
		}
	}
	return nil
}

// reset closes a connection with a RST.
func reset(c net.Conn) {
	if tcp := socket(c); tcp != nil {
		_ = tcp.SetLinger(0) // without it the close is an ordinary one
	}
	_ = c.Close() // nothing more is wanted of it
}

// watch ends a connection that has been idle, or open, for too long. The kernel knows when bytes last came and went, also those that it moved itself.
func (p *TCPProxy) watch(conn *net.TCPConn, end func(reason string)) (stop func()) {
	var stops []func() bool
	if p.longest > 0 {
		stops = append(stops, time.AfterFunc(p.longest, func() { end("DT") }).Stop)
	}
	if p.idle > 0 && conn != nil {
		var mu sync.Mutex
		var timer *time.Timer
		mu.Lock()
		timer = time.AfterFunc(p.idle, func() {
			rest := p.idle - idleFor(conn)
			if rest <= 0 {
				end("SI")
				return
			}
			mu.Lock()
			defer mu.Unlock()
			timer.Reset(rest)
		})
		mu.Unlock()
		stops = append(stops, timer.Stop)
	}
	return func() {
		for _, s := range stops {
			s()
		}
	}
}

// idleFor is how long no data came or went; a connection that can not be asked is not idle.
func idleFor(conn *net.TCPConn) time.Duration {
	rc, err := conn.SyscallConn()
	if err != nil {
		return 0
	}
	var idle time.Duration
	if err := rc.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.SOL_TCP, unix.TCP_INFO)
		if err != nil {
			return
		}
		idle = time.Duration(min(info.Last_data_recv, info.Last_data_sent)) * time.Millisecond
	}); err != nil {
		return 0
	}
	return idle
}
