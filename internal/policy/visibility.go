// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Annotations of a pod that ask for visibility; the first that is there counts.
const (
	VisibilityAnnotation      = "policy.cilium.io/proxy-visibility"
	VisibilityAnnotationAlias = "io.cilium.proxy-visibility"
)

// maxVisibility bounds an annotation's parts.
const maxVisibility = 128

// ParseVisibility reads a proxy-visibility annotation (spec 15); an empty one asks for nothing. What it returns is sorted, and what a proxy can read: HTTP
// over TCP and DNS over TCP and UDP. Other combinations are valid, and lead to nothing. After an error the annotation has no effect.
func ParseVisibility(text string) ([]Visibility, error) {
	if strings.TrimSpace(text) == "" {
		return nil, nil
	}
	parts := strings.Split(text, ",")
	if len(parts) > maxVisibility {
		return nil, fmt.Errorf("%d parts, the max is %d", len(parts), maxVisibility)
	}
	seen := map[visiblePort]string{}
	var all []Visibility
	for _, part := range parts {
		ports, protocol, err := visibilityPart(strings.TrimSpace(part))
		if err != nil {
			return nil, fmt.Errorf("visibility %q: %w", strings.TrimSpace(part), err)
		}
		for _, p := range ports {
			if before, ok := seen[p]; ok && before != protocol {
				return nil, fmt.Errorf("visibility %q: the same port is to be read as %s and as %s", strings.TrimSpace(part), before, protocol)
			}
			seen[p] = protocol
			v := Visibility{Direction: p.direction, Port: p.port, Proto: p.proto}
			switch {
			case protocol == "HTTP" && p.proto == TCP:
				v.Kind = FilterHTTP
			case protocol == "DNS" && p.proto != SCTP:
				v.Kind = FilterDNS
			default:
				continue
			}
			all = append(all, v)
		}
	}
	slices.SortFunc(all, compareVisibility)
	return slices.Compact(all), nil
}

type visiblePort struct {
	direction Direction
	port      uint16
	proto     uint8
}

func visibilityPart(text string) (ports []visiblePort, protocol string, err error) {
	inner, ok := strings.CutPrefix(text, "<")
	if ok {
		inner, ok = strings.CutSuffix(inner, ">")
	}
	fields := strings.Split(inner, "/")
	if !ok || len(fields) != 4 {
		return nil, "", errors.New("want <direction/port/L4/L7>, such as <ingress/8080/TCP/HTTP>")
	}
	var direction Direction
	switch strings.ToLower(fields[0]) {
	case "ingress":
		direction = Ingress
	case "egress":
		direction = Egress
	default:
		return nil, "", fmt.Errorf("direction %q is not ingress or egress", fields[0])
	}
	port, err := strconv.ParseUint(fields[1], 10, 16)
	if err != nil || port == 0 || fields[1][0] == '0' || fields[1][0] == '+' {
		return nil, "", fmt.Errorf("port %q is not a number from 1 to 65535", fields[1])
	}
	var protos []uint8
	switch strings.ToUpper(fields[2]) {
	case "TCP":
		protos = []uint8{TCP}
	case "UDP":
		protos = []uint8{UDP}
	case "SCTP":
		protos = []uint8{SCTP}
	case "ANY":
		protos = []uint8{TCP, UDP}
	default:
		return nil, "", fmt.Errorf("protocol %q is not TCP, UDP, SCTP or ANY", fields[2])
	}
	protocol = strings.ToUpper(fields[3])
	switch {
	case protocol == "HTTP", protocol == "DNS" && direction == Egress, protocol == "KAFKA" && direction == Ingress:
	case protocol == "DNS", protocol == "KAFKA":
		return nil, "", fmt.Errorf("%s cannot be seen on %s", fields[3], strings.ToLower(fields[0]))
	default:
		return nil, "", fmt.Errorf("L7 protocol %q is not HTTP, DNS or Kafka", fields[3])
	}
	for _, p := range protos {
		ports = append(ports, visiblePort{direction, uint16(port), p})
	}
	return ports, protocol, nil
}

func compareVisibility(a, b Visibility) int {
	return int(a.order()) - int(b.order())
}

func (v Visibility) order() uint32 {
	return uint32(v.Direction)<<28 | uint32(v.Proto)<<20 | uint32(v.Port)
}
