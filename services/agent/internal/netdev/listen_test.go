// SPDX-License-Identifier: Apache-2.0

package netdev_test

import (
	"net"
	"testing"

	"github.com/weirmesh/weir/services/agent/internal/netdev"
	"github.com/weirmesh/weir/services/agent/internal/testns"
)

func TestListeningTCP(t *testing.T) {
	testns.Do(t, func() {
		if err := netdev.SetUp("lo"); err != nil {
			t.Fatal(err)
		}
		listens := func(port uint16) bool {
			t.Helper()
			all, err := netdev.ListeningTCP()
			if err != nil {
				t.Fatal(err)
			}
			_, ok := all[port]
			return ok
		}
		ln, err := net.Listen("tcp4", "127.0.0.1:20007")
		if err != nil {
			t.Fatal(err)
		}
		other, err := net.Listen("tcp4", "127.0.0.2:20008")
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		conn, err := net.Dial("tcp4", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if !listens(20007) || listens(20008) || listens(uint16(conn.LocalAddr().(*net.TCPAddr).Port)) {
			t.Error("want 20007 alone: neither another address nor a connection's port")
		}
		if err := ln.Close(); err != nil {
			t.Fatal(err)
		}
		if listens(20007) {
			t.Error("20007 is closed")
		}
	})
}
