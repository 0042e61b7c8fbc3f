// SPDX-License-Identifier: Apache-2.0

package httpload

import (
	"context"
	"fmt"
	"io"
	"net"
)

// Idle opens connections, each with one request behind it, and keeps them until close.
func Idle(ctx context.Context, address string, connections int) (closeAll func(), err error) {
	var all []net.Conn
	closeAll = func() {
		for _, c := range all {
			c.Close()
		}
	}
	for range connections {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "tcp", address)
		if err != nil {
			return closeAll, fmt.Errorf("idle connections: %w", err)
		}
		all = append(all, conn)
		if err := exchange(conn); err != nil {
			return closeAll, fmt.Errorf("idle connections: %w", err)
		}
	}
	return closeAll, nil
}

// exchange makes one request and reads its answer.
func exchange(conn net.Conn) error {
	if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: server.example\r\n\r\n"); err != nil {
		return err
	}
	buf := make([]byte, answerRoom)
	for have := 0; ; {
		n, err := conn.Read(buf[have:])
		if err != nil {
			return err
		}
		have += n
		size, err := answerSize(buf[:have])
		switch {
		case err != nil || size > 0 && size == have:
			return err
		case size > len(buf) || have == len(buf):
			return errAnswer
		}
	}
}
