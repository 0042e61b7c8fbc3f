// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"strconv"
	"strings"
)

const maxPorts = 40

// portSpec is one item of a rule's port part: a range, a name, or a type of ICMP.
type portSpec struct {
	proto       uint8 // 0 = TCP, UDP and SCTP
	first, last uint16
	name        string // lower case
	// l7 are the other members of the toPorts entry; nil = none.
	l7 *L7Ports
}

// allPorts are the port specs of a protocol without a number.
func allPorts(proto uint8) portSpec { return portSpec{proto: proto, last: maxPort} }

const maxPort = 1<<16 - 1

// portPart is what a rule says about ports. Not given = every protocol and port; given without specs = none.
type portPart struct {
	given bool
	specs []portSpec
}

func protocolName(p uint8) string {
	switch p {
	case AnyProtocol:
		return "ANY"
	case ICMP:
		return "ICMP"
	case TCP:
		return "TCP"
	case UDP:
		return "UDP"
	case ICMPv6:
		return "ICMPv6"
	case SCTP:
		return "SCTP"
	}
	return strconv.Itoa(int(p))
}

func (s portSpec) String() string {
	proto := protocolName(s.proto)
	switch {
	case s.proto == ICMP || s.proto == ICMPv6:
		return proto + " type " + strconv.Itoa(int(s.first))
	case s.name != "":
		return s.name + "/" + proto
	case s.first == 0 && s.last == maxPort:
		return "all ports/" + proto
	case s.first == s.last:
		return strconv.Itoa(int(s.first)) + "/" + proto
	}
	return strconv.Itoa(int(s.first)) + "-" + strconv.Itoa(int(s.last)) + "/" + proto
}

// protocols expands ANY.
func (s portSpec) protocols() []uint8 {
	if s.proto == AnyProtocol {
		return []uint8{TCP, UDP, SCTP}
	}
	return []uint8{s.proto}
}

func (p portPart) String() string {
	if !p.given {
		return "all ports"
	}
	if len(p.specs) == 0 {
		return "no port"
	}
	texts := make([]string, len(p.specs))
	for i, s := range p.specs {
		texts[i] = s.String()
	}
	return strings.Join(texts, ", ")
}

// isPortName reports whether a text is a service name of IANA: letters, digits, single dashes, a letter, at most 15 characters.
func isPortName(s string) bool {
	if len(s) == 0 || len(s) > 15 || s[0] == '-' || s[len(s)-1] == '-' || strings.Contains(s, "--") {
		return false
	}
	letter := false
	for _, c := range []byte(s) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z':
			letter = true
		case c >= '0' && c <= '9', c == '-':
		default:
			return false
		}
	}
	return letter
}

// protocol reads a protocol of a cilium.io policy.
func (r *reader) protocol(n node) (proto uint8, portless bool) {
	switch text := strings.ToUpper(r.str(n)); text {
	case "", "ANY":
		return AnyProtocol, false
	case "TCP":
		return TCP, false
	case "UDP":
		return UDP, false
	case "SCTP":
		return SCTP, false
	case "VRRP", "IGMP", "GRE", "IPIP", "IPV6", "ESP", "AH":
		return 0, true
	default:
		r.fail(n, "invalid protocol %q, must be { tcp | udp | sctp | vrrp | igmp | gre | ipip | ipv6 | esp | ah | any }", r.str(n))
		return 0, false
	}
}

// port reads an item of toPorts[].ports. Zero = the port is 0 or not given: all ports.
func (r *reader) port(n node, dns bool) (spec portSpec, zero bool) {
	text := r.str(n.child("port"))
	proto, portless := r.protocol(n.child("protocol"))
	end := r.integer(n.child("endPort"), 0, maxPort)
	if r.err != nil {
		return spec, false
	}
	if portless {
		if text != "" && text != "0" {
			r.fail(n.child("port"), "port must be empty or 0")
		}
		r.fail(n.child("protocol"), "protocol %s needs extended protocols, which are not enabled", r.str(n.child("protocol")))
		return spec, true
	}
	spec.proto = proto
	if text == "" {
		r.fail(n.child("port"), "port must be specified")
		return spec, false
	}
	if isPortName(text) {
		spec.name = strings.ToLower(text) // endPort is ignored
		return spec, false
	}
	number, err := strconv.ParseUint(text, 10, 16)
	if err != nil || len(text) > 1 && text[0] == '0' {
		if err == nil {
			err = &strconv.NumError{Func: "ParseUint", Num: text, Err: strconv.ErrSyntax} // others read a leading 0 as octal
		}
		r.fail(n.child("port"), "unable to parse port: %v", err)
		return spec, false
	}
	if dns && end > int64(number) {
		r.fail(n.child("endPort"), "DNS rules do not support port ranges")
	}
	if number == 0 {
		return allPorts(proto), true
	}
	spec.first, spec.last = uint16(number), max(uint16(number), uint16(end))
	return spec, false
}

// toPorts reads the list of that name of one entry.
func (r *reader) toPorts(n node, e *entryContext) portPart {
	fields := []string{"ports"}
	if !e.deny {
		fields = append(fields, "rules", "terminatingTLS", "originatingTLS", "serverNames", "listener")
	}
	items, _ := r.items(n, fields...)
	part := portPart{given: len(items) > 0}
	for i, item := range items {
		l7 := r.l7(item, e)
		l7.position = i
		ports, _ := r.items(item.child("ports"), "port", "protocol", "endPort")
		if len(ports) > maxPorts {
			r.fail(item.child("ports"), "too many ports, the max is %d", maxPorts)
		}
		var specs []portSpec
		anyZero := false
		for _, p := range ports {
			spec, zero := r.port(p, len(l7.DNS) > 0)
			anyZero = anyZero || zero
			switch {
			case l7.restricts() && len(l7.DNS) == 0 && spec.proto != TCP:
				r.fail(p.child("protocol"), "L7 rules can only apply to TCP (not %s) except for DNS rules", protocolName(spec.proto))
			case len(l7.DNS) > 0 && spec.proto == SCTP:
				r.fail(p.child("protocol"), "DNS rules can only apply to TCP and UDP (not SCTP)")
			case len(l7.ServerNames) > 0 && spec.proto != TCP:
				r.warn(p.child("protocol"), "serverNames are of TLS over TCP: the rest is not allowed by this entry")
			}
			if !l7.empty() || l7.types > 0 {
				spec.l7 = l7
			}
			specs = append(specs, spec)
		}
		r.checkL7(item, l7, e, len(ports), anyZero)
		if len(ports) > 0 && !l7.empty() {
			e.rule.L7 = append(e.rule.L7, l7)
		}
		part.specs = append(part.specs, specs...)
	}
	return part
}

// icmps reads the list of that name.
func (r *reader) icmps(n node) portPart {
	items, _ := r.items(n, "fields")
	part := portPart{given: len(items) > 0}
	for _, item := range items {
		fields, _ := r.items(item.child("fields"), "family", "type")
		if len(fields) > maxPorts {
			r.fail(item.child("fields"), "too many types, the max is %d", maxPorts)
		}
		for _, f := range fields {
			part.specs = append(part.specs, r.icmp(f))
		}
	}
	return part
}
