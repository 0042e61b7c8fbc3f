// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"fmt"

	"github.com/cilium/ebpf"
)

// RecordCounts counts records by type.
type RecordCounts struct {
	Trace, Drop, Translation, Final, Verdict uint64
}

// PolicyCounts counts decisions of policy by direction: a connection is decided when it begins, and at the first packet after a change.
// A packet of a connection that may not begin is a decision each. What audit lets pass is counted as allowed.
type PolicyCounts struct {
	AllowedIngress, AllowedEgress, DeniedIngress, DeniedEgress uint64
}

// ProxyCounts counts what goes through the node's proxy, and what does not get there.
type ProxyCounts struct {
	// Redirected connections began on a slot.
	Redirected uint64
	// NoListener counts packets that would have begun a connection on a slot without listener, and were dropped. NotSeen counts connections that were
	// only to be seen, and went straight on.
	NoListener, NotSeen uint64
	// Lost packets belong to connections that the proxy has no socket for any more: dropped, and answered by a reset.
	Lost uint64
	// Moved packets met a change of their connection's slot: dropped, and both ends reset.
	Moved uint64
	// Upstream packets were answers to the proxy's upstream sockets.
	Upstream uint64
}

// Total returns the sum.
func (c RecordCounts) Total() uint64 { return c.Trace + c.Drop + c.Translation + c.Final + c.Verdict }

// Counters are totals since the maps were made, over all CPUs. They survive the process.
//
// ConnsCreated = Written.Final + ConnsUnreported + live entries. Records of all rows of Drops + DropsOverflow = Written.Drop + Lost.Drop.
type Counters struct {
	// Written records, and Lost ones that found the ring full. Losses by CPU are in LostByCPU.
	Written, Lost RecordCounts
	LostByCPU     []RecordCounts
	// ConnsCreated counts entries made in ct.
	ConnsCreated uint64
	// ConnsRefused counts packets dropped since ct was full.
	ConnsRefused uint64
	// ConnsUnreported counts entries taken over while the ring was full, with their packets and bytes: totals that no final record has.
	ConnsUnreported, UnreportedPackets, UnreportedBytes uint64
	// UncountedPackets met an entry in the moment of its deletion; they were forwarded and are in no total.
	UncountedPackets, UncountedBytes uint64
	// DropsOverflow counts drops that found no room in the map of drops.
	DropsOverflow uint64
	// Packets of pods that make no flow: ARP and neighbour discovery pass, multicast control is dropped.
	ARP, NeighbourDiscovery, MulticastControl uint64
	// Bypassed packets came round to a pod past all ingress hooks and were dropped.
	Bypassed uint64
	// NATClaimed counts ports claimed for masquerading.
	NATClaimed uint64
	// Policy counts what policy decided, where a direction is enforced.
	Policy PolicyCounts
	// Proxy counts what concerns the node's proxy.
	Proxy ProxyCounts
}

// Counters reads what the programs count.
func (d *Datapath) Counters() (Counters, error) {
	m := d.coll.Maps[tcMapMetrics]
	rows := make([][]tcMetricValue, tcMetricMETRICS)
	for i := range rows {
		if err := m.Lookup(uint32(i), &rows[i]); err != nil {
			return Counters{}, fmt.Errorf("metric %d: %w", i, err)
		}
	}
	count := func(i tcMetric) (n uint64) {
		for _, v := range rows[i] {
			n += v.Count
		}
		return n
	}
	bytes := func(i tcMetric) (n uint64) {
		for _, v := range rows[i] {
			n += v.Bytes
		}
		return n
	}
	c := Counters{
		Written: RecordCounts{
			Trace: count(tcMetricMETRIC_WRITTEN_TRACE), Drop: count(tcMetricMETRIC_WRITTEN_DROP),
			Translation: count(tcMetricMETRIC_WRITTEN_TRANSLATION), Final: count(tcMetricMETRIC_WRITTEN_FINAL),
			Verdict: count(tcMetricMETRIC_WRITTEN_VERDICT),
		},
		Lost: RecordCounts{
			Trace: count(tcMetricMETRIC_LOST_TRACE), Drop: count(tcMetricMETRIC_LOST_DROP),
			Translation: count(tcMetricMETRIC_LOST_TRANSLATION), Final: count(tcMetricMETRIC_LOST_FINAL),
			Verdict: count(tcMetricMETRIC_LOST_VERDICT),
		},
		ConnsCreated:       count(tcMetricMETRIC_CT_CREATED),
		ConnsRefused:       count(tcMetricMETRIC_CT_FULL),
		ConnsUnreported:    count(tcMetricMETRIC_CT_UNREPORTED),
		UnreportedPackets:  count(tcMetricMETRIC_CT_UNREPORTED_TRAFFIC),
		UnreportedBytes:    bytes(tcMetricMETRIC_CT_UNREPORTED_TRAFFIC),
		UncountedPackets:   count(tcMetricMETRIC_CT_UNCOUNTED),
		UncountedBytes:     bytes(tcMetricMETRIC_CT_UNCOUNTED),
		DropsOverflow:      count(tcMetricMETRIC_DROPS_OVERFLOW),
		ARP:                count(tcMetricMETRIC_ARP),
		NeighbourDiscovery: count(tcMetricMETRIC_ND),
		MulticastControl:   count(tcMetricMETRIC_MULTICAST_CONTROL),
		Bypassed:           count(tcMetricMETRIC_BYPASSED),
		NATClaimed:         count(tcMetricMETRIC_NAT_CLAIMED),
		Policy: PolicyCounts{
			AllowedIngress: count(tcMetricMETRIC_POLICY_ALLOWED_IN), AllowedEgress: count(tcMetricMETRIC_POLICY_ALLOWED_OUT),
			DeniedIngress: count(tcMetricMETRIC_POLICY_DENIED_IN), DeniedEgress: count(tcMetricMETRIC_POLICY_DENIED_OUT),
		},
		Proxy: ProxyCounts{
			Redirected: count(tcMetricMETRIC_PROXY_REDIRECTED), NoListener: count(tcMetricMETRIC_PROXY_NO_LISTENER),
			NotSeen: count(tcMetricMETRIC_PROXY_NOT_SEEN), Lost: count(tcMetricMETRIC_PROXY_LOST), Moved: count(tcMetricMETRIC_PROXY_MOVED),
			Upstream: count(tcMetricMETRIC_PROXY_UPSTREAM),
		},
	}
	for cpu := range rows[0] {
		c.LostByCPU = append(c.LostByCPU, RecordCounts{
			Trace:       rows[tcMetricMETRIC_LOST_TRACE][cpu].Count,
			Drop:        rows[tcMetricMETRIC_LOST_DROP][cpu].Count,
			Translation: rows[tcMetricMETRIC_LOST_TRANSLATION][cpu].Count,
			Final:       rows[tcMetricMETRIC_LOST_FINAL][cpu].Count,
			Verdict:     rows[tcMetricMETRIC_LOST_VERDICT][cpu].Count,
		})
	}
	return c, nil
}

// DropRow counts dropped packets of one kind.
type DropRow struct {
	Endpoint     uint16
	Direction    uint8
	PeerIdentity uint32
	// Port is the packet's destination port. When the map is full, new kinds are counted in rows without port, protocol and identity.
	Port   uint16
	Proto  uint8
	Reason uint8
	Rule   uint32
	// Records is how many drops there were, each with a record that was written or lost.
	Records uint64
	// Packets are segments as on the wire.
	Packets, Bytes uint64
}

// Drops reads the rows of dropped traffic, which only grow.
func (d *Datapath) Drops() ([]DropRow, error) { return listDrops(d.coll.Maps[tcMapDrops]) }

func listDrops(m *ebpf.Map) ([]DropRow, error) {
	var rows []DropRow
	var k tcDropKey
	var v tcDropValue
	it := m.Iterate()
	for it.Next(&k, &v) {
		rows = append(rows, DropRow{
			Endpoint: k.Endpoint, Direction: k.Direction, PeerIdentity: k.PeerIdentity, Port: port16(k.Port), Proto: k.Proto,
			Reason: k.Reason, Rule: k.Rule, Records: v.Records, Packets: v.Packets, Bytes: v.Bytes,
		})
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("list drops: %w", err)
	}
	return rows, nil
}
