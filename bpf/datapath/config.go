// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/weirmesh/weir/bpf/maglev"
)

// Aggregation says which packets of a connection make a record.
type Aggregation uint8

const (
	// AggregationMedium records new connections, new TCP flags, every SYN, FIN and RST, and one packet a report interval and direction.
	AggregationMedium Aggregation = iota
	// AggregationNone records every packet.
	AggregationNone
)

// ParseAggregation reads the word of a flag: "none" or "medium".
func ParseAggregation(word string) (Aggregation, error) {
	switch word {
	case "none":
		return AggregationNone, nil
	case "medium":
		return AggregationMedium, nil
	}
	return 0, fmt.Errorf("aggregation %q: want none or medium", word)
}

// String returns the word of the flag.
func (a Aggregation) String() string {
	if a == AggregationNone {
		return "none"
	}
	return "medium"
}

// Routing says how packets get to pods of other nodes.
type Routing uint8

const (
	// RoutingNative leaves it to the node's routes.
	RoutingNative Routing = iota
	// RoutingVXLAN sends them to the node that IPCache names, with the sender's identity as VNI.
	RoutingVXLAN
)

// ParseRouting reads the word of a flag: "native" or "vxlan".
func ParseRouting(word string) (Routing, error) {
	switch word {
	case "native":
		return RoutingNative, nil
	case "vxlan":
		return RoutingVXLAN, nil
	}
	return 0, fmt.Errorf("routing %q: want native or vxlan", word)
}

// String returns the word of the flag.
func (r Routing) String() string {
	if r == RoutingVXLAN {
		return "vxlan"
	}
	return "native"
}

// Timeouts says how long a connection may be silent before its entry is collected.
type Timeouts struct {
	// TCPHandshake: SYN or SYN+ACK without an answer. Default 60s.
	TCPHandshake time.Duration
	// TCPEstablished: default 6h.
	TCPEstablished time.Duration
	// TCPClosing: one side has closed. Default 2m.
	TCPClosing time.Duration
	// TCPClosed: both have, or a reset was seen. Default 10s.
	TCPClosed time.Duration
	// UDP: packets went one way only; also SCTP's handshake and closing. Default 60s.
	UDP time.Duration
	// UDPAnswered: packets went both ways. Default 3m.
	UDPAnswered time.Duration
	// ICMP: default 60s.
	ICMP time.Duration
}

// Config is what Load needs. Sizes are fixed when a map is first made: a later Load keeps what is pinned and logs the difference.
type Config struct {
	// PinPath is a folder in a bpf file system; Load makes it. All that outlives the process is there.
	PinPath string
	// RingBytes is the total size of all rings. Each CPU gets an equal share, rounded down to a power of two, at least one page. Default 8 MiB.
	RingBytes int
	// ConntrackMax bounds the connections of all endpoints together; a full table refuses new ones. Default 262144.
	ConntrackMax int
	// IPCacheMax bounds prefixes. Default 65536.
	IPCacheMax int
	// EndpointsMax bounds addresses of local endpoints. Default 1024.
	EndpointsMax int
	// ServicesMax bounds service frontends. Default 65536.
	ServicesMax int
	// BackendsMax bounds the backends of all sets; frontends with equal backends share one. A change needs room for the old and the new set.
	// Default 262144.
	BackendsMax int
	// SourceRangesMax bounds the source ranges of all frontends. Default 65536.
	SourceRangesMax int
	// MaglevMax bounds Maglev tables; each takes two bytes a slot. Default 16384.
	MaglevMax int
	// MaglevTableSize is the number of slots of a table: a prime, 100 times the backends of a service or more for shares within one percent.
	// Default 1021.
	MaglevTableSize int
	// AffinityMax bounds remembered clients of services with affinity; the longest unused are forgotten first. Default 65536.
	AffinityMax int
	// NATMax bounds masqueraded connections, two rows each; the longest unused are forgotten first. Default 65536 rows.
	NATMax int
	// FragmentsMax bounds fragmented datagrams under way; the longest unused are forgotten first. Default 8192.
	FragmentsMax int
	// DropsMax bounds rows of dropped traffic. Default 16384.
	DropsMax int
	// PolicyPeersMax bounds rows of policies: one for each policy and peer that it decides apart. Default 262144.
	PolicyPeersMax int
	// PolicyRangesMax bounds the port ranges of all different rows of policies together; 8 bytes each. Default 262144.
	PolicyRangesMax int
	// NamesMax bounds addresses that policies know by name. Default 65536.
	NamesMax int
	// NamePoliciesMax bounds rows of policies for sets of names. Default 65536.
	NamePoliciesMax int
	// NameRangesMax bounds the port ranges of all different ones of these rows; 8 bytes each. Default 131072.
	NameRangesMax int
	// ServiceConnectionsMax bounds connections that are translated packet by packet; the longest unused are forgotten first. Default 65536.
	ServiceConnectionsMax int
	// Aggregation: default medium.
	Aggregation Aggregation
	// ReportInterval of a live connection, per direction. Default 5s.
	ReportInterval time.Duration
	// Timeouts of connections; a zero field means its default.
	Timeouts Timeouts
	// Masquerade gives packets of pods that leave the cluster the node's address.
	Masquerade bool
	// NodeIPv4 and NodeIPv6 are the node's addresses, used by Masquerade; invalid = none of that family.
	NodeIPv4, NodeIPv6 netip.Addr
	// NATPortMin and NATPortMax bound the ports that masquerading claims on the node's addresses. They must lie outside of the
	// ip_local_port_range of the node. Default 61000 to 65535.
	NATPortMin, NATPortMax uint16
	// WorldIPv4 and WorldIPv6 are the identities of addresses that IPCache does not know. Default 9 and 10.
	WorldIPv4, WorldIPv6 uint32
	// Routing says how packets get to pods of other nodes. Default native: by the node's routes.
	Routing Routing
	// OverlayIfIndex is the VXLAN device (external mode, VNI per packet), needed with RoutingVXLAN; see AttachOverlay.
	OverlayIfIndex uint32
	// OverlayPort is its UDP port, which host policy leaves alone. Default 8472.
	OverlayPort uint16
	// ForceClsact attaches by clsact filters even where the kernel has tcx.
	ForceClsact bool
}

// DefaultConfig returns the defaults; PinPath is left empty.
func DefaultConfig() Config {
	return Config{
		RingBytes:      8 << 20,
		ConntrackMax:   262144,
		IPCacheMax:     65536,
		EndpointsMax:   1024,
		ServicesMax:    65536,
		BackendsMax:    262144,
		AffinityMax:    65536,
		NATMax:         65536,
		FragmentsMax:   8192,
		DropsMax:       16384,
		PolicyPeersMax: 262144, PolicyRangesMax: 262144,
		NamesMax: 65536, NamePoliciesMax: 65536, NameRangesMax: 131072,
		ServiceConnectionsMax: 65536, SourceRangesMax: 65536, MaglevMax: 16384, MaglevTableSize: 1021,
		ReportInterval: 5 * time.Second,
		Timeouts:       defaultTimeouts(),
		NATPortMin:     61000,
		NATPortMax:     65535,
		WorldIPv4:      IdentityWorldIPv4,
		WorldIPv6:      IdentityWorldIPv6,
		OverlayPort:    8472,
	}
}

func defaultTimeouts() Timeouts {
	return Timeouts{
		TCPHandshake:   time.Minute,
		TCPEstablished: 6 * time.Hour,
		TCPClosing:     2 * time.Minute,
		TCPClosed:      10 * time.Second,
		UDP:            time.Minute,
		UDPAnswered:    3 * time.Minute,
		ICMP:           time.Minute,
	}
}

func (t *Timeouts) fill() {
	d := defaultTimeouts()
	for _, f := range []struct {
		have *time.Duration
		def  time.Duration
	}{
		{&t.TCPHandshake, d.TCPHandshake}, {&t.TCPEstablished, d.TCPEstablished}, {&t.TCPClosing, d.TCPClosing},
		{&t.TCPClosed, d.TCPClosed}, {&t.UDP, d.UDP}, {&t.UDPAnswered, d.UDPAnswered}, {&t.ICMP, d.ICMP},
	} {
		if *f.have == 0 {
			*f.have = f.def
		}
	}
}

// Validate returns every fault, joined.
func (c Config) Validate() error {
	var errs []error
	if c.PinPath == "" {
		errs = append(errs, errors.New("pin path is empty"))
	}
	for _, f := range []struct {
		name     string
		value    int
		min, max int
	}{
		{"ring bytes", c.RingBytes, 4096, 1 << 30},
		{"conntrack max", c.ConntrackMax, 1, 1 << 26},
		{"ipcache max", c.IPCacheMax, 1, 1 << 24},
		{"endpoints max", c.EndpointsMax, 1, 1 << 16},
		{"services max", c.ServicesMax, 1, 1 << 24},
		{"backends max", c.BackendsMax, 1, 1 << 24},
		{"nat max", c.NATMax, 2, 1 << 24},
		{"fragments max", c.FragmentsMax, 1, 1 << 24},
		{"drops max", c.DropsMax, 1, 1 << 24},
		{"source ranges max", c.SourceRangesMax, 1, 1 << 24},
		{"maglev tables max", c.MaglevMax, 1, 1 << 20},
		{"service connections max", c.ServiceConnectionsMax, 1, 1 << 23},
		{"affinity max", c.AffinityMax, 1, 1 << 24},
		{"policy peers max", c.PolicyPeersMax, 1, 1 << 24},
		{"policy ranges max", c.PolicyRangesMax, 1, 1 << 24},
		{"names max", c.NamesMax, 1, 1 << 24},
		{"name policies max", c.NamePoliciesMax, 1, 1 << 24},
		{"name ranges max", c.NameRangesMax, 1, 1 << 24},
	} {
		if f.value < f.min || f.value > f.max {
			errs = append(errs, fmt.Errorf("%s %d: want %d to %d", f.name, f.value, f.min, f.max))
		}
	}
	if !maglev.ValidSize(c.MaglevTableSize) {
		errs = append(errs, fmt.Errorf("maglev table size %d: want a prime, %d at most", c.MaglevTableSize, maglev.MaxSize))
	}
	if c.ReportInterval <= 0 {
		errs = append(errs, fmt.Errorf("report interval %v: want more than 0", c.ReportInterval))
	}
	if c.Aggregation > AggregationNone {
		errs = append(errs, fmt.Errorf("aggregation %d: unknown", c.Aggregation))
	}
	if c.Routing > RoutingVXLAN {
		errs = append(errs, fmt.Errorf("routing %d: unknown", c.Routing))
	}
	if c.Routing == RoutingVXLAN && (c.OverlayIfIndex == 0 || c.OverlayPort == 0) {
		errs = append(errs, errors.New("routing vxlan: the device and its port are needed"))
	}
	if c.NATPortMin == 0 || c.NATPortMax < c.NATPortMin {
		errs = append(errs, fmt.Errorf("nat ports %d to %d: not a range", c.NATPortMin, c.NATPortMax))
	}
	if c.NodeIPv4.IsValid() && !c.NodeIPv4.Unmap().Is4() {
		errs = append(errs, fmt.Errorf("node IPv4 address %v: not IPv4", c.NodeIPv4))
	}
	if c.NodeIPv6.IsValid() && (!c.NodeIPv6.Is6() || c.NodeIPv6.Is4In6()) {
		errs = append(errs, fmt.Errorf("node IPv6 address %v: not IPv6", c.NodeIPv6))
	}
	return errors.Join(errs...)
}
