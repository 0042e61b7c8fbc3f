// SPDX-License-Identifier: Apache-2.0

package httpload

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"strconv"
)

// body is what the server answers: some of what an API says.
const body = `{"id":4711,"name":"a thing","price":12.5,"tags":["one","two","three"],"stock":{"here":3,"there":14},"note":"0123456789012345678901234567890123456789"}`

// ServeOrigin serves requests as cheaply as may be, so that it is the proxy that is measured: every request on a connection gets the same answer.
// Requests must have no body.
func ServeOrigin(ctx context.Context, address string) error {
	var lc net.ListenConfig
	listener, err := lc.Listen(ctx, "tcp", address)
	if err != nil {
		return fmt.Errorf("serve origin: %w", err)
	}
	context.AfterFunc(ctx, func() { listener.Close() })
	answer := []byte("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: " + strconv.Itoa(len(body)) + "\r\n\r\n" + body)
	for {
		conn, err := listener.Accept()
		if err != nil {
			return nil
		}
		go func() {
			defer conn.Close()
			r := bufio.NewReader(conn)
			for {
				for {
					line, err := r.ReadSlice('\n')
					if err != nil {
						return
					}
					if len(line) <= 2 {
						break
					}
				}
				if _, err := conn.Write(answer); err != nil {
					return
				}
			}
		}()
	}
}
