// SPDX-License-Identifier: Apache-2.0

package httpproxy

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/weirmesh/weir/services/proxy/internal/strict"
)

// switchProtocols makes a tunnel of the two connections: the request that asked for it was judged, what follows is another protocol.
func (w *forwarding) switchProtocols(a *answer) {
	x := w.x
	defer func() {
		a.resp.Body.Close()
		a.release(false)
		a.done(true)
	}()
	server, ok := a.resp.Body.(io.ReadWriteCloser)
	if !ok || x.upgrade == "" || x.s.guard == nil {
		x.reply(http.StatusBadGateway, "", "UPE", "upgrade_not_asked_for")
		return
	}
	h := x.w.Header()
	clear(h)
	for name, values := range a.resp.Header {
		h[name] = values
	}
	protocol := h["Upgrade"]
	strict.HopByHop(h)
	x.match.MutateResponse(h, &x.q)
	h["Connection"], h["Upgrade"] = []string{"Upgrade"}, protocol
	delete(h, "Content-Length")

	client, _, err := http.NewResponseController(x.w).Hijack()
	if err != nil {
		x.reply(http.StatusInternalServerError, "", "", "hijack")
		return
	}
	defer client.Close()
	x.entry.Status, x.replied = http.StatusSwitchingProtocols, true
	x.s.guard.Opaque()
	var head bytes.Buffer
	head.WriteString("HTTP/1.1 101 Switching Protocols\r\n")
	if err := h.Write(&head); err != nil {
		return
	}
	head.WriteString("\r\n")
	if _, err := client.Write(head.Bytes()); err != nil {
		x.flag("DC")
		return
	}
	x.timer.deadline(time.Now(), deadlineResponse, 0)
	w.tunnel(client, server)
}

// tunnel copies both ways until one side has ended, or nothing moved for too long.
func (w *forwarding) tunnel(client net.Conn, server io.ReadWriteCloser) {
	x := w.x
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		n, err := x.pipe(server, client)
		x.tunnelled = n
		endDirection(server, err)
	}()
	// A drain leaves tunnels alone: they have no request that could be finished, and last until their connection is closed.
	stop := context.AfterFunc(x.stream.context(), func() {
		client.Close()
		server.Close()
	})
	defer stop()
	n, err := x.pipe(client, server)
	x.sent += n
	endDirection(client, err)
	<-ended
}

// endDirection passes an end on: what comes the other way may still matter.
func endDirection(to io.Closer, err error) {
	if cw, ok := to.(interface{ CloseWrite() error }); ok && atEnd(err) && cw.CloseWrite() == nil {
		return
	}
	to.Close()
}

// pipe copies one way.
func (x *exchange) pipe(to io.Writer, from io.Reader) (uint64, error) {
	buf := x.s.m.buffers.get()
	defer x.s.m.buffers.put(buf)
	var total uint64
	for {
		n, err := from.Read(buf[:])
		x.timer.touch()
		if n > 0 {
			m, werr := to.Write(buf[:n])
			total += uint64(m)
			if werr != nil {
				return total, werr
			}
			x.timer.touch()
		}
		if err != nil {
			return total, err
		}
	}
}
