// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/bpf/datapath"
)

func TestParseTimeouts(t *testing.T) {
	for _, tt := range []struct {
		name  string
		given map[string]string
		want  datapath.Timeouts
		err   string
	}{
		{name: "none"},
		{name: "two", given: map[string]string{"udp": "3s", "tcp-closed": "1s"}, want: datapath.Timeouts{UDP: 3 * time.Second, TCPClosed: time.Second}},
		{name: "unknown", given: map[string]string{"sctp": "1s"}, err: `"sctp" is none of icmp, tcp-closed`},
		{name: "no duration", given: map[string]string{"udp": "3"}, err: `udp: "3" is not a duration`},
		{name: "zero", given: map[string]string{"icmp": "0s"}, err: "above 0"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseTimeouts(tt.given)
			if tt.err == "" && (err != nil || got != tt.want) {
				t.Errorf("got %+v, %v; want %+v", got, err, tt.want)
			}
			if tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
				t.Errorf("error %v, want %q", err, tt.err)
			}
		})
	}
}
