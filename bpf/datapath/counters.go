// SPDX-License-Identifier: Apache-2.0

package datapath

// RecordCounts counts records by type.
type RecordCounts struct {
	Trace, Drop, Translation, Final uint64
}

// Counters are totals since the maps were made, over all CPUs. They survive the process.
//
// ConnsCreated = Written.Final + ConnsUnreported + live entries, and the packets of all rows of Drops + DropsOverflow =
// Written.Drop + Lost.Drop less the records of drops that are no packet.
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
	// Uncounted packets met an entry in the moment of its deletion; they were forwarded and are in no total.
	UncountedPackets, UncountedBytes uint64
	// DropsOverflow counts drops that found no room in the map of drops.
	DropsOverflow uint64
	// Packets of pods that make no flow: ARP, neighbour discovery (both pass), multicast control (dropped).
	ARP, NeighbourDiscovery, MulticastControl uint64
	// Bypassed packets came round to a pod past all ingress hooks and were dropped.
	Bypassed uint64
	// NATClaimed counts ports claimed for masquerading.
	NATClaimed uint64
}

// DropRow counts dropped packets of one kind.
type DropRow struct {
	Endpoint     uint16
	Direction    uint8
	PeerIdentity uint32
	// Port is the packet's destination port.
	Port   uint16
	Proto  uint8
	Reason uint8
	Rule   uint32
	// Packets are segments as on the wire.
	Packets, Bytes uint64
}
