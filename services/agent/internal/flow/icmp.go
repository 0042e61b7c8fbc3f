// SPDX-License-Identifier: Apache-2.0

package flow

import "fmt"

// icmpNames are gopacket's names of types, as Hubble's summaries have them; codes in the order of their numbers.
type icmpName struct {
	name  string
	codes []string
}

var icmp4Names = map[uint8]icmpName{
	0: {name: "EchoReply"},
	3: {"DestinationUnreachable", []string{"Net", "Host", "Protocol", "Port", "FragmentationNeeded", "SourceRoutingFailed", "NetUnknown", "HostUnknown", "SourceIsolated",
		"NetAdminProhibited", "HostAdminProhibited", "NetTOS", "HostTOS", "CommAdminProhibited", "HostPrecedence", "PrecedenceCutoff"}},
	4:  {name: "SourceQuench"},
	5:  {"Redirect", []string{"Net", "Host", "TOS+Net", "TOS+Host"}},
	8:  {name: "EchoRequest"},
	9:  {name: "RouterAdvertisement"},
	10: {name: "RouterSolicitation"},
	11: {"TimeExceeded", []string{"TTLExceeded", "FragmentReassemblyTimeExceeded"}},
	12: {"ParameterProblem", []string{"PointerIndicatesError", "MissingOption", "BadLength"}},
	13: {name: "TimestampRequest"},
	14: {name: "TimestampReply"},
	15: {name: "InfoRequest"},
	16: {name: "InfoReply"},
	17: {name: "AddressMaskRequest"},
	18: {name: "AddressMaskReply"},
}

var icmp6Names = map[uint8]icmpName{
	1: {"DestinationUnreachable", []string{"NoRouteToDst", "AdminProhibited", "BeyondScopeOfSrc", "AddressUnreachable", "PortUnreachable", "SrcAddressFailedPolicy", "RejectRouteToDst"}},
	2: {name: "PacketTooBig"},
	3: {"TimeExceeded", []string{"HopLimitExceeded", "FragmentReassemblyTimeExceeded"}},
	4: {"ParameterProblem", []string{"ErroneousHeaderField", "UnrecognizedNextHeader", "UnrecognizedIPv6Option"}},

	128: {name: "EchoRequest"},
	129: {name: "EchoReply"},
	133: {name: "RouterSolicitation"},
	134: {name: "RouterAdvertisement"},
	135: {name: "NeighborSolicitation"},
	136: {name: "NeighborAdvertisement"},
	137: {name: "Redirect"},
}

func icmpSummary(six bool, typ, code uint8) string {
	family, names := "ICMPv4 ", icmp4Names
	if six {
		family, names = "ICMPv6 ", icmp6Names
	}
	n, ok := names[typ]
	switch {
	case !ok:
		return fmt.Sprintf("%s%d(%d)", family, typ, code)
	case n.codes == nil && code == 0:
		return family + n.name
	case int(code) < len(n.codes):
		return family + n.name + "(" + n.codes[code] + ")"
	}
	return fmt.Sprintf("%s%s(Code: %d)", family, n.name, code)
}
