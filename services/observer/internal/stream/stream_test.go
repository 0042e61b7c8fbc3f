// SPDX-License-Identifier: Apache-2.0

package stream

import "testing"

// Reading is tested against a server in services/observer.

// TestStart: where reading begins.
func TestStart(t *testing.T) {
	for _, tt := range []struct {
		name      string
		state     State
		replay    uint64
		seq       uint64
		fromStart bool
	}{
		{"a new stream", State{}, 100, 1, true},
		{"an emptied stream", State{FirstSeq: 8, LastSeq: 7}, 100, 8, false},
		{"all of it", State{FirstSeq: 1, LastSeq: 10, Messages: 10, Bytes: 100}, 100, 1, true},
		{"all that is left", State{FirstSeq: 5, LastSeq: 10, Messages: 6, Bytes: 60}, 100, 5, false},
		{"the end", State{FirstSeq: 1, LastSeq: 1000, Messages: 1000, Bytes: 10000}, 100, 991, false},
		{"less than one message", State{FirstSeq: 1, LastSeq: 1000, Messages: 1000, Bytes: 1_000_000}, 100, 1001, false},
	} {
		if seq, fromStart := tt.state.Start(tt.replay); seq != tt.seq || fromStart != tt.fromStart {
			t.Errorf("%s: %d, %t; want %d, %t", tt.name, seq, fromStart, tt.seq, tt.fromStart)
		}
	}
}
