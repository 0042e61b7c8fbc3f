// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

const (
	diagByFamily = 20      // SOCK_DIAG_BY_FAMILY
	tcpListen    = 1 << 10 // state TCP_LISTEN as a bit
	diagPort     = 4       // of struct inet_diag_msg: source port, big endian
	diagSource   = 8       // its source address
	diagMessage  = 72
)

// diagRequest is struct inet_diag_req_v2 without a socket: all of a state.
type diagRequest struct{ family, protocol uint8 }

func (r *diagRequest) Len() int { return 56 }

func (r *diagRequest) Serialize() []byte {
	b := make([]byte, r.Len())
	b[0], b[1] = r.family, r.protocol
	binary.NativeEndian.PutUint32(b[4:], tcpListen)
	return b
}

// ListeningTCP returns the ports at which a TCP socket takes connections to 127.0.0.1, in the calling thread's namespace. The kernel walks its
// listeners alone, however many connections there are.
func ListeningTCP() (map[uint16]struct{}, error) {
	r := nl.NewNetlinkRequest(diagByFamily, unix.NLM_F_DUMP)
	r.AddData(&diagRequest{unix.AF_INET, unix.IPPROTO_TCP})
	messages, err := r.Execute(unix.NETLINK_INET_DIAG, 0)
	if err != nil {
		return nil, fmt.Errorf("list listening sockets: %w", err)
	}
	ports := map[uint16]struct{}{}
	for _, m := range messages {
		if len(m) < diagMessage {
			continue
		}
		a := netip.AddrFrom4([4]byte(m[diagSource:]))
		if a.IsUnspecified() || a == netip.AddrFrom4([4]byte{127, 0, 0, 1}) {
			ports[binary.BigEndian.Uint16(m[diagPort:])] = struct{}{}
		}
	}
	return ports, nil
}
