// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"io/fs"
	"math/bits"
	"os"
	"path/filepath"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
)

// layouts gives the layout version of every pinned map. A change of a key or value type raises the number, so that two versions never share a
// pin by accident.
var layouts = map[string]int{
	tcMapCt:         ctLayout,
	tcMapEndpoints:  2,
	tcMapInterfaces: 2,
	tcMapIpcache:    2,
	tcMapDrops:      1,
	tcMapServices:   2,
	tcMapBackends:   2,
	tcMapSvcconn:    1,
	tcMapFrags:      1,
	tcMapNetns:      1,
	tcMapNat:        1,
	sockMapSockrev:  1,
	tcMapMetrics:    3,
	tcMapEvents:     1,
	tcMapFlowstate:  1,

	tcMapMembers:      1,
	tcMapSourceRanges: 1,
	tcMapMaglev:       1,
	tcMapAffinity:     1,
	tcMapChoices:      1,
	tcMapLb:           1,
	tcMapLbHost:       1,

	tcMapPolicyEndpoints:  1,
	tcMapPolicyPeers:      1,
	tcMapPolicyRanges:     1,
	tcMapPolicyGeneration: 1,

	tcMapSlots:      1,
	tcMapFqdn:       1,
	tcMapFqdnPeers:  1,
	tcMapFqdnRanges: 1,
}

// maxRings is MAX_RINGS of lib/events.h.
const maxRings = len(tcFlowstate{}.Positions)

func pinName(name string) string { return fmt.Sprintf("%s_v%d", name, layouts[name]) }

func (d *Datapath) linkDir() string { return filepath.Join(d.cfg.PinPath, "links") }

func (d *Datapath) ringPin(cpu int) string {
	return filepath.Join(d.cfg.PinPath, fmt.Sprintf("ring_v%d_%d", layouts[tcMapEvents], cpu))
}

// ringBytes is one CPU's share of the configured total.
func ringBytes(total, cpus int) int {
	share := max(total/cpus, os.Getpagesize())
	return 1 << (bits.Len(uint(share)) - 1)
}

func (d *Datapath) loadCollections() error {
	spec, err := loadTc()
	if err != nil {
		return fmt.Errorf("read tc programs: %w", err)
	}
	if err := d.setSizes(spec); err != nil {
		return err
	}
	shared, err := d.earlierConns(spec)
	if err != nil {
		return err
	}
	if d.coll, err = d.loadCollection(spec, shared); err != nil {
		return errors.Join(fmt.Errorf("load tc programs: %w", err), closeMaps(shared))
	}
	if err := closeMaps(shared); err != nil {
		return err
	}
	if spec, err = loadSock(); err != nil {
		return fmt.Errorf("read socket hooks: %w", err)
	}
	shared = map[string]*ebpf.Map{}
	for name, m := range spec.Maps {
		if have := d.coll.Maps[name]; have != nil && layouts[name] != 0 {
			shared[name] = have
			m.MaxEntries, m.ValueSize = have.MaxEntries(), have.ValueSize()
			if m.InnerMap != nil {
				m.InnerMap.MaxEntries = uint32(ringBytes(d.cfg.RingBytes, ebpf.MustPossibleCPU()))
			}
		}
	}
	if d.sock, err = d.loadCollection(spec, shared); err != nil {
		return fmt.Errorf("load socket hooks: %w", err)
	}
	return nil
}

// loadCollection sets the constants of a spec and loads it; its maps with a layout version are pinned.
func (d *Datapath) loadCollection(spec *ebpf.CollectionSpec, shared map[string]*ebpf.Map) (*ebpf.Collection, error) {
	if err := d.configure(spec); err != nil {
		return nil, err
	}
	for name, m := range spec.Maps {
		if layouts[name] == 0 || shared[name] != nil {
			continue
		}
		if err := d.pinMap(name, m); err != nil {
			return nil, err
		}
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{
		Maps: ebpf.MapOptions{PinPath: d.cfg.PinPath}, MapReplacements: shared,
	})
	if errors.Is(err, ebpf.ErrMapIncompatible) {
		return nil, fmt.Errorf("%w (%s): %w", ErrIncompatible, d.cfg.PinPath, err)
	}
	return coll, err
}

// configure sets the load-time constants.
func (d *Datapath) configure(spec *ebpf.CollectionSpec) error {
	flag := func(b bool) uint32 {
		if b {
			return 1
		}
		return 0
	}
	ns := func(t time.Duration) uint64 { return uint64(t.Nanoseconds()) }
	var node4, node6 tcAddr
	if d.cfg.NodeIPv4.IsValid() {
		node4 = addrOf(d.cfg.NodeIPv4)
	}
	if d.cfg.NodeIPv6.IsValid() {
		node6 = addrOf(d.cfg.NodeIPv6)
	}
	ring := ringBytes(d.cfg.RingBytes, ebpf.MustPossibleCPU())
	t := d.cfg.Timeouts
	var tunnelDevice, tunnelPort uint32
	if d.cfg.Routing == RoutingVXLAN {
		tunnelDevice, tunnelPort = d.cfg.OverlayIfIndex, uint32(d.cfg.OverlayPort)
	}
	for name, value := range map[string]any{
		tcVarCfgReportInterval: ns(d.cfg.ReportInterval),
		tcVarCfgTcpHandshake:   ns(t.TCPHandshake),
		tcVarCfgTcpEstablished: ns(t.TCPEstablished),
		tcVarCfgTcpClosing:     ns(t.TCPClosing),
		tcVarCfgTcpClosed:      ns(t.TCPClosed),
		tcVarCfgUdp:            ns(t.UDP),
		tcVarCfgUdpAnswered:    ns(t.UDPAnswered),
		tcVarCfgIcmp:           ns(t.ICMP),
		tcVarCfgEveryPacket:    flag(d.cfg.Aggregation == AggregationNone),
		tcVarCfgMasquerade:     flag(d.cfg.Masquerade),
		tcVarCfgWakeupBytes:    uint32(min(ring/4, 65536)),
		tcVarCfgWorldV4:        d.cfg.WorldIPv4,
		tcVarCfgWorldV6:        d.cfg.WorldIPv6,
		tcVarCfgNatPortMin:     uint32(d.cfg.NATPortMin),
		tcVarCfgNatPortMax:     uint32(d.cfg.NATPortMax),
		tcVarCfgTunnelIfindex:  tunnelDevice,
		tcVarCfgTunnelPort:     tunnelPort,
		tcVarCfgMaglevSize:     uint32(d.cfg.MaglevTableSize),
		sockVarCfgSetRetval:    flag(features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnSetRetval) == nil),
		tcVarCfgNodeV4:         node4,
		tcVarCfgNodeV6:         node6,
	} {
		v := spec.Variables[name]
		if v == nil {
			continue // not used by these programs
		}
		if err := v.Set(value); err != nil {
			return fmt.Errorf("constant %s: %w", name, err)
		}
	}
	return nil
}

// setSizes sizes the maps.
func (d *Datapath) setSizes(spec *ebpf.CollectionSpec) error {
	cpus := ebpf.MustPossibleCPU()
	if cpus > maxRings {
		return fmt.Errorf("%d possible CPUs: %d are supported", cpus, maxRings)
	}
	for name, size := range map[string]int{
		tcMapCt:         d.cfg.ConntrackMax,
		tcMapIpcache:    d.cfg.IPCacheMax,
		tcMapEndpoints:  d.cfg.EndpointsMax,
		tcMapInterfaces: d.cfg.EndpointsMax,
		tcMapNetns:      d.cfg.EndpointsMax,
		tcMapServices:   d.cfg.ServicesMax,
		tcMapBackends:   d.cfg.BackendsMax,
		tcMapMembers:    d.cfg.BackendsMax,

		tcMapSourceRanges: d.cfg.SourceRangesMax,
		tcMapMaglev:       d.cfg.MaglevMax,
		tcMapAffinity:     d.cfg.AffinityMax,
		tcMapLb:           2 * d.cfg.ServiceConnectionsMax,
		tcMapFrags:        d.cfg.FragmentsMax,
		tcMapDrops:        d.cfg.DropsMax,
		tcMapNat:          d.cfg.NATMax,
		tcMapEvents:       cpus,

		tcMapPolicyPeers:  d.cfg.PolicyPeersMax,
		tcMapPolicyRanges: d.cfg.PolicyRangesMax,
		tcMapFqdn:         d.cfg.NamesMax,
		tcMapFqdnPeers:    d.cfg.NamePoliciesMax,
		tcMapFqdnRanges:   d.cfg.NameRangesMax,
	} {
		spec.Maps[name].MaxEntries = uint32(size)
	}
	spec.Maps[tcMapMaglev].ValueSize = uint32(2 * d.cfg.MaglevTableSize)
	spec.Maps[tcMapEvents].InnerMap.MaxEntries = uint32(ringBytes(d.cfg.RingBytes, cpus))
	return nil
}

// pinMap gives a map its pin. One that is pinned already keeps its size, since connections and records in it are worth more than a flag.
func (d *Datapath) pinMap(name string, m *ebpf.MapSpec) error {
	m.Name = pinName(name)
	m.Pinning = ebpf.PinByName
	pinned, err := ebpf.LoadPinnedMap(filepath.Join(d.cfg.PinPath, m.Name), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("pinned map %s: %w", m.Name, err)
	}
	if name == tcMapMaglev && pinned.ValueSize() != m.ValueSize {
		// Tables of another size: they are made anew, and the programs that have the old map are replaced.
		return errors.Join(pinned.Unpin(), pinned.Close())
	}
	if have := pinned.MaxEntries(); have != m.MaxEntries {
		d.log.Warn("pinned map keeps its size", "map", m.Name, "size", have, "configured", m.MaxEntries)
		m.MaxEntries = have
	}
	if err := pinned.Close(); err != nil {
		return fmt.Errorf("pinned map %s: %w", m.Name, err)
	}
	return nil
}

// openRings takes the pinned ring of each CPU, or makes it.
func (d *Datapath) openRings() error {
	events := d.coll.Maps[tcMapEvents]
	size := ringBytes(d.cfg.RingBytes, ebpf.MustPossibleCPU())
	for cpu := range int(events.MaxEntries()) {
		pin := d.ringPin(cpu)
		ring, err := ebpf.LoadPinnedMap(pin, nil)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			if ring, err = d.makeRing(cpu, size, pin); err != nil {
				return fmt.Errorf("ring of cpu %d: %w", cpu, err)
			}
		case err != nil:
			return fmt.Errorf("ring of cpu %d: %w", cpu, err)
		case int(ring.MaxEntries()) != size:
			d.log.Warn("pinned ring keeps its size", "cpu", cpu, "size", ring.MaxEntries(), "configured", size)
		}
		d.rings = append(d.rings, ring)
	}
	return nil
}

func (d *Datapath) makeRing(cpu, size int, pin string) (*ebpf.Map, error) {
	ring, err := ebpf.NewMap(&ebpf.MapSpec{Name: fmt.Sprintf("ring_%d", cpu), Type: ebpf.RingBuf, MaxEntries: uint32(size)})
	if err != nil {
		return nil, err
	}
	// In the array first: a pin without its place in the array would never be put there.
	if err := d.coll.Maps[tcMapEvents].Put(uint32(cpu), ring); err != nil {
		return nil, errors.Join(err, ring.Close())
	}
	if err := ring.Pin(pin); err != nil {
		return nil, errors.Join(err, ring.Close())
	}
	return ring, nil
}
