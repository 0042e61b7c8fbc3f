// SPDX-License-Identifier: Apache-2.0

package eventname

import (
	"testing"

	"github.com/weirmesh/weir/gen/flow"
)

func TestTypesAndSubtypes(t *testing.T) {
	for name, want := range map[string]int32{"drop": 1, "debug": 2, "capture": 3, "trace": 4, "policy-verdict": 5, "trace-sock": 7, "l7": 129, "agent": 130} {
		if n, ok := TypeNumber(name); !ok || n != want {
			t.Errorf("TypeNumber(%s) = %d, %v, want %d", name, n, ok, want)
		}
	}
	for _, tt := range []struct {
		typ  int32
		name string
		want int32
		ok   bool
	}{
		{TypeTrace, "to-endpoint", 0, true},
		{TypeTrace, "from-endpoint", 5, true},
		{TypeTrace, "to-network", 11, true},
		{TypeTrace, "to-crypto", 13, true},
		{TypeTrace, "nowhere", -1, false},
		// The monitor's numbers, not those of flow.AgentEventType.
		{TypeAgent, "policy-updated", 5, true},
		{TypeAgent, "ipcache-deleted", 10, true},
		{TypeDrop, "to-endpoint", -1, false},
	} {
		if n, ok := SubtypeNumber(tt.typ, tt.name); ok != tt.ok || ok && n != tt.want {
			t.Errorf("SubtypeNumber(%d, %s) = %d, %v", tt.typ, tt.name, n, ok)
		}
	}
	for sub, want := range map[int32]string{0: "to-endpoint", 4: "to-overlay", 13: "to-crypto", 14: "14", 101: "101", 256: "to-endpoint"} {
		if got := TracePoint(sub); got != want {
			t.Errorf("TracePoint(%d) = %s, want %s", sub, got, want)
		}
	}
}

func TestDropReasons(t *testing.T) {
	for code, want := range map[int32]string{0: "Success", 133: "Policy denied", 136: "Fragmentation needed", 189: "Authentication required", 205: "Punt to proxy", 159: "159, 0"} {
		if got := DropLabel(code); got != want {
			t.Errorf("DropLabel(%d) = %q, want %q", code, got, want)
		}
	}
	// Every reason that a flow can carry has words.
	for code := range flow.DropReason_name {
		if _, ok := dropLabels[uint8(code)]; !ok {
			t.Errorf("drop reason %d (%v) has no label", code, flow.DropReason(code))
		}
	}
	for in, want := range map[string]flow.DropReason{
		"POLICY_DENIED": 133, "policy_denied": 133, "Policy denied": 133, "authentication required": 189, "DROP_REASON_UNKNOWN": 0,
	} {
		if got, ok := DropReason(in); !ok || got != want {
			t.Errorf("DropReason(%q) = %v, %v, want %v", in, got, ok, want)
		}
	}
	for _, in := range []string{"", "nonsense", "Interface", "133"} {
		if got, ok := DropReason(in); ok {
			t.Errorf("DropReason(%q) = %v, want none", in, got)
		}
	}
}

func TestIdentities(t *testing.T) {
	for n, want := range map[uint32]string{0: "unknown", 2: "world", 10: "world-ipv6", 11: "ID:11", 12345: "ID:12345", 16777217: "ID:16777217"} {
		if got := Identity(n); got != want {
			t.Errorf("Identity(%d) = %s, want %s", n, got, want)
		}
	}
	for in, want := range map[string]uint32{"host": 1, "world-ipv4": 9, "overlay-to-encrypt": 11, "0x10": 16, "4294967295": 4294967295, "0": 0} {
		if got, err := ParseIdentity(in); err != nil || got != want {
			t.Errorf("ParseIdentity(%s) = %d, %v, want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "unknown", "4294967296", "-1", "World"} {
		if got, err := ParseIdentity(in); err == nil {
			t.Errorf("ParseIdentity(%q) = %d, want an error", in, got)
		}
	}
}
