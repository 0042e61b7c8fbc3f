// SPDX-License-Identifier: Apache-2.0

// Command weir-cases-pod is what runs in every pod of a case: it makes sockets there, inside the pod's namespaces and control group, and hands them over a
// unix socket to whoever asks. So the sockets are the pod's to everything that looks, and yet one process plays the whole case.
package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: weir-cases-pod SOCKET")
		os.Exit(2)
	}
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "weir-cases-pod:", err)
		os.Exit(1)
	}
}

func run(path string) error {
	_ = os.Remove(path)
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		go serve(c)
	}
}

// serve answers requests of three numbers (domain, type, protocol) with an error number and, if that is 0, a socket.
func serve(c *net.UnixConn) {
	defer c.Close()
	var request [12]byte
	for {
		n, err := c.Read(request[:])
		if err != nil || n != len(request) {
			return
		}
		word := func(i int) int { return int(int32(binary.LittleEndian.Uint32(request[4*i:]))) }
		fd, err := unix.Socket(word(0), word(1)|unix.SOCK_CLOEXEC, word(2))
		var answer [4]byte
		if err != nil {
			number := unix.EIO
			_ = errors.As(err, &number)
			binary.LittleEndian.PutUint32(answer[:], uint32(number))
			if _, err := c.Write(answer[:]); err != nil {
				return
			}
			continue
		}
		_, _, err = c.WriteMsgUnix(answer[:], unix.UnixRights(fd), nil)
		unix.Close(fd)
		if err != nil {
			return
		}
	}
}
