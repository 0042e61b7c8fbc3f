// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"encoding/json"
	"strconv"
)

// icmpType is the number of a message's name (spec 9.6).
func icmpType(proto uint8, name string) (uint16, bool) {
	if proto == ICMP {
		switch name {
		case "EchoReply":
			return 0, true
		case "DestinationUnreachable":
			return 3, true
		case "Redirect":
			return 5, true
		case "Echo", "EchoRequest":
			return 8, true
		case "RouterAdvertisement":
			return 9, true
		case "RouterSelection":
			return 10, true
		case "TimeExceeded":
			return 11, true
		case "ParameterProblem":
			return 12, true
		case "Timestamp":
			return 13, true
		case "TimestampReply":
			return 14, true
		case "Photuris":
			return 40, true
		case "ExtendedEchoRequest":
			return 42, true
		case "ExtendedEchoReply":
			return 43, true
		}
		return 0, false
	}
	return icmpv6Type(name)
}

func icmpv6Type(name string) (uint16, bool) {
	for _, named := range []struct {
		number uint16
		name   string
	}{
		{1, "DestinationUnreachable"}, {2, "PacketTooBig"}, {3, "TimeExceeded"}, {4, "ParameterProblem"},
		{128, "EchoRequest"}, {129, "EchoReply"},
		{130, "MulticastListenerQuery"}, {131, "MulticastListenerReport"}, {132, "MulticastListenerDone"},
		{133, "RouterSolicitation"}, {134, "RouterAdvertisement"}, {135, "NeighborSolicitation"}, {136, "NeighborAdvertisement"},
		{137, "RedirectMessage"}, {138, "RouterRenumbering"},
		{139, "ICMPNodeInformationQuery"}, {140, "ICMPNodeInformationResponse"},
		{141, "InverseNeighborDiscoverySolicitation"}, {142, "InverseNeighborDiscoveryAdvertisement"},
		{144, "HomeAgentAddressDiscoveryRequest"}, {145, "HomeAgentAddressDiscoveryReply"},
		{146, "MobilePrefixSolicitation"}, {147, "MobilePrefixAdvertisement"},
		{157, "DuplicateAddressRequestCodeSuffix"}, {158, "DuplicateAddressConfirmationCodeSuffix"},
		{160, "ExtendedEchoRequest"}, {161, "ExtendedEchoReply"},
	} {
		if named.name == name {
			return named.number, true
		}
	}
	return 0, false
}

// icmp reads one field of an icmps block.
func (r *reader) icmp(n node) portSpec {
	var spec portSpec
	family := r.str(n.child("family"))
	switch family {
	case "", "IPv4":
		family, spec.proto = "IPv4", ICMP
	case "IPv6":
		spec.proto = ICMPv6
	default:
		r.fail(n.child("family"), "wrong family: %s", family)
	}
	var text string
	switch v := n.child("type").v.(type) {
	case string:
		text = v
	case json.Number:
		text = v.String()
	default:
		r.fail(n.child("type"), "type must be a number from 0 to 255 or a name")
		return spec
	}
	number, ok := icmpType(spec.proto, text)
	if !ok {
		small, err := strconv.ParseUint(text, 10, 8)
		if err != nil {
			r.fail(n.child("type"), "ICMP type %s not found in %s", text, family)
		}
		number = uint16(small)
	}
	spec.first, spec.last = number, number
	return spec
}
