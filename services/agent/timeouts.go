// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/weirmesh/weir/bpf/datapath"
)

// timeoutFields are the names that --ct-timeouts knows.
func timeoutFields(t *datapath.Timeouts) map[string]*time.Duration {
	return map[string]*time.Duration{
		"tcp-handshake": &t.TCPHandshake, "tcp-established": &t.TCPEstablished, "tcp-closing": &t.TCPClosing, "tcp-closed": &t.TCPClosed,
		"udp": &t.UDP, "udp-answered": &t.UDPAnswered, "icmp": &t.ICMP,
	}
}

func timeoutNames() string {
	return strings.Join(slices.Sorted(maps.Keys(timeoutFields(new(datapath.Timeouts)))), ", ")
}

// parseTimeouts reads --ct-timeouts; what is not named keeps its default (zero).
func parseTimeouts(given map[string]string) (datapath.Timeouts, error) {
	var t datapath.Timeouts
	fields := timeoutFields(&t)
	for _, name := range slices.Sorted(maps.Keys(given)) {
		field, ok := fields[name]
		if !ok {
			return t, fmt.Errorf("ct-timeouts: %q is none of %s", name, timeoutNames())
		}
		d, err := time.ParseDuration(given[name])
		if err != nil || d <= 0 {
			return t, fmt.Errorf("ct-timeouts: %s: %q is not a duration above 0, such as 30s", name, given[name])
		}
		*field = d
	}
	return t, nil
}
