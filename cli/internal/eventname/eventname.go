// SPDX-License-Identifier: Apache-2.0

// Package eventname holds the names that Hubble's API and command line give to
// numbers which are no protobuf enums: event types, trace points, drop codes,
// policy matches and reserved identities. Flags are parsed and flows are
// printed by the same tables.
package eventname

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/weirmesh/weir/gen/flow"
)

// Event types (flow.CiliumEventType.type).
const (
	TypeDrop          = 1
	TypeDebug         = 2
	TypeCapture       = 3
	TypeTrace         = 4
	TypePolicyVerdict = 5
	TypeTraceSock     = 7
	TypeL7            = 129
	TypeAgent         = 130
)

var typeNumbers = map[string]int32{
	"drop":           TypeDrop,
	"debug":          TypeDebug,
	"capture":        TypeCapture,
	"trace":          TypeTrace,
	"policy-verdict": TypePolicyVerdict,
	"trace-sock":     TypeTraceSock,
	"l7":             TypeL7,
	"agent":          TypeAgent,
}

// tracePoints is indexed by sub_type of a trace event.
var tracePoints = [...]string{
	"to-endpoint", "to-proxy", "to-host", "to-stack", "to-overlay",
	"from-endpoint", "from-proxy", "from-host", "from-stack", "from-overlay",
	"from-network", "to-network", "from-crypto", "to-crypto",
}

// agentSubtypes is indexed by the monitor's number of an agent notification,
// which differs from flow.AgentEventType.
var agentSubtypes = [...]string{
	"unspecified", "message", "agent-started", "endpoint-regenerate-success",
	"endpoint-regenerate-failure", "policy-updated", "policy-deleted",
	"endpoint-created", "endpoint-deleted", "ipcache-upserted", "ipcache-deleted",
}

// policyMatches is indexed by flow.policy_match_type.
var policyMatches = [...]string{"none", "L3-Only", "L3-L4", "L4-Only", "all", "L3-Proto", "Proto-Only"}

// identities is indexed by number. 11 can be named in a filter, but prints as a number.
var identities = [...]string{
	"unknown", "host", "world", "unmanaged", "health", "init", "remote-node",
	"kube-apiserver", "ingress", "world-ipv4", "world-ipv6",
}

const encryptedOverlay = 11

// FlowTypes are the event types that `--type` completes, in the order of the help text.
func FlowTypes() []string {
	return []string{"capture", "drop", "l7", "policy-verdict", "trace", "trace-sock"}
}

// TracePoints lists the names of all trace points.
func TracePoints() []string { return slices.Clone(tracePoints[:]) }

// TypeNumber returns the number of an event type.
func TypeNumber(name string) (int32, bool) {
	n, ok := typeNumbers[name]
	return n, ok
}

// SubtypeNumber returns the number of a named sub-type of the event type typ.
func SubtypeNumber(typ int32, name string) (int32, bool) {
	var names []string
	switch typ {
	case TypeTrace:
		names = tracePoints[:]
	case TypeAgent:
		names = agentSubtypes[:]
	}
	i := slices.Index(names, name)
	return int32(i), i >= 0
}

// TracePoint is the name of a trace event's sub_type; unknown ones are shown as numbers.
func TracePoint(subType int32) string {
	n := uint8(subType) // The datapath's code has eight bits; Hubble prints no more.
	if int(n) < len(tracePoints) {
		return tracePoints[n]
	}
	return strconv.Itoa(int(n))
}

// DropLabel is the text for a drop event's sub_type.
func DropLabel(subType int32) string {
	if s, ok := dropLabels[uint8(subType)]; ok {
		return s
	}
	return fmt.Sprintf("%d, 0", uint8(subType))
}

// DropReason finds a drop reason by its enum name or by its words, whatever the case.
func DropReason(s string) (flow.DropReason, bool) {
	if v, ok := flow.DropReason_value[strings.ToUpper(s)]; ok {
		return flow.DropReason(v), true
	}
	for code, label := range dropLabels {
		if _, known := flow.DropReason_name[int32(code)]; known && code != 0 && strings.EqualFold(label, s) {
			return flow.DropReason(code), true
		}
	}
	return 0, false
}

// PolicyMatch is the name of a policy_match_type.
func PolicyMatch(n uint32) string {
	if n < uint32(len(policyMatches)) {
		return policyMatches[n]
	}
	return "unknown"
}

// Identity is how a numeric identity is shown: a reserved name or "ID:n".
func Identity(n uint32) string {
	if n < uint32(len(identities)) {
		return identities[n]
	}
	return "ID:" + strconv.FormatUint(uint64(n), 10)
}

// Identities lists the reserved names that a filter takes.
func Identities() []string { return slices.Clone(identities[1:]) }

// ParseIdentity reads a reserved name or a number, 0x notation included.
func ParseIdentity(s string) (uint32, error) {
	if i := slices.Index(identities[1:], s); i >= 0 {
		return uint32(i + 1), nil
	}
	if s == "overlay-to-encrypt" {
		return encryptedOverlay, nil
	}
	n, err := strconv.ParseUint(s, 0, 32)
	if err != nil {
		return 0, fmt.Errorf("invalid security identity, expected one of %v or a numeric value", Identities())
	}
	return uint32(n), nil
}
