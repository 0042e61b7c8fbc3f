// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"

	"github.com/cilium/ebpf"
)

// View reads the maps of a node's datapath from their pins, whoever has loaded it, or nobody any more. It needs no programs and writes nothing.
type View struct {
	bpffs string
	maps  map[string]*ebpf.Map
}

// EndpointPolicyWord says which policy holds in a direction; number 0 = that direction is not enforced.
type EndpointPolicyWord struct {
	Number uint32
	Audit  bool
}

// OpenView opens the maps under Config.PinPath. fs.ErrNotExist: none has been loaded yet.
func OpenView(bpffs string) (*View, error) {
	v := &View{bpffs: bpffs, maps: map[string]*ebpf.Map{}}
	for _, name := range []string{
		tcMapEndpoints, tcMapIpcache, tcMapPolicyEndpoints, tcMapPolicyPeers, tcMapPolicyRanges, tcMapPolicyGeneration,
	} {
		m, err := openPin(bpffs, name, &ebpf.LoadPinOptions{ReadOnly: true})
		if err != nil {
			return nil, errors.Join(err, v.Close())
		}
		v.maps[name] = m
	}
	return v, nil
}

// Stale says whether the pins are gone or of other maps than those that the view reads: the datapath was removed, and perhaps loaded anew.
func (v *View) Stale() (bool, error) {
	for name, m := range v.maps {
		now, err := openPin(v.bpffs, name, &ebpf.LoadPinOptions{ReadOnly: true})
		if errors.Is(err, fs.ErrNotExist) {
			return true, nil
		}
		if err != nil {
			return false, err
		}
		same, err := sameMap(m, now)
		if err := errors.Join(err, now.Close()); err != nil {
			return false, fmt.Errorf("pinned map %s: %w", name, err)
		}
		if !same {
			return true, nil
		}
	}
	return false, nil
}

func sameMap(a, b *ebpf.Map) (bool, error) {
	var ids [2]ebpf.MapID
	for i, m := range []*ebpf.Map{a, b} {
		info, err := m.Info()
		if err != nil {
			return false, err
		}
		ids[i], _ = info.ID()
	}
	return ids[0] == ids[1], nil
}

// Generation changes whenever live connections are to be decided anew (Policies.Bump): after every change of rows, of endpoints' policies, and of
// identities that matters to them.
func (v *View) Generation() (uint64, error) {
	var generation uint64
	if err := v.maps[tcMapPolicyGeneration].Lookup(uint32(0), &generation); err != nil {
		return 0, fmt.Errorf("policy generation: %w", err)
	}
	return generation, nil
}

// Close lets go of the maps.
func (v *View) Close() error { return closeMaps(v.maps) }

// Endpoint says which endpoint of this node an address is of. peer is the number that policies know it by.
func (v *View) Endpoint(a netip.Addr) (id uint16, identity, peer uint32, ok bool) {
	var row tcEndpoint
	if !a.IsValid() || v.maps[tcMapEndpoints].Lookup(addrOf(a), &row) != nil {
		return 0, 0, 0, false
	}
	if row.Peer == 0 {
		row.Peer = row.Identity
	}
	return row.Id, row.Identity, row.Peer, true
}

// Peer says who an address is to policies, as the programs see it: an endpoint of this node, what ipcache knows, or world.
func (v *View) Peer(a netip.Addr) (identity, peer uint32) {
	if _, identity, peer, ok := v.Endpoint(a); ok {
		return identity, peer
	}
	var row tcIpcacheEntry
	if a.IsValid() {
		key := tcIpcacheKey{Prefixlen: 128, Addr: a.As16()}
		if err := v.maps[tcMapIpcache].Lookup(key, &row); err != nil {
			row = tcIpcacheEntry{}
		}
	}
	if row.Identity == 0 {
		row.Identity = IdentityWorldIPv6
		if a.Unmap().Is4() {
			row.Identity = IdentityWorldIPv4
		}
	}
	if row.Peer == 0 {
		row.Peer = row.Identity
	}
	return row.Identity, row.Peer
}

// Policy returns the policies of an endpoint. What cannot be read is a policy that no row has: it denies.
func (v *View) Policy(id uint16) (ingress, egress EndpointPolicyWord) {
	var word uint64
	if err := v.maps[tcMapPolicyEndpoints].Lookup(uint32(id), &word); err != nil {
		return EndpointPolicyWord{Number: MaxPolicy}, EndpointPolicyWord{Number: MaxPolicy}
	}
	e := endpointPolicyOf(word)
	return EndpointPolicyWord{e.Ingress, e.IngressAudit}, EndpointPolicyWord{e.Egress, e.EgressAudit}
}

// Lookup returns what a policy's rows decide for a packet; the range is that of the one port. False: they could not be read, and the range denies. Names
// have no part in it.
func (v *View) Lookup(policy, peer uint32, proto uint8, port uint16) (PolicyRange, bool) {
	r, _, err := lookupRow(v.maps[tcMapPolicyPeers], v.maps[tcMapPolicyRanges], policy, peer, proto, port)
	return r, err == nil
}

// LiveRemotes returns the addresses at the far end of connections that are alive: not closed, and not silent for longer than their kind may be. It opens ct
// each time, which upgrades replace under a reader: of another layout than the agent's it cannot read it, and goes on with the rest.
func (v *View) LiveRemotes() (_ map[netip.Addr]struct{}, err error) {
	m, err := openPin(v.bpffs, tcMapCt, &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	out := map[netip.Addr]struct{}{}
	now := Now()
	err = newConntrack(m, nil).walk(func(k *tcCtKey, e *tcCtConn) bool {
		if s := ConnState(e.State); s == 0 || s == StateClosed || s > StateClosed || now > e.Expires {
			return true
		}
		far := k.Lo
		if tcCtFlags(e.Flags)&tcCtFlagsCT_LO_IS_LOCAL != 0 {
			far = k.Hi
		}
		out[far.netip()] = struct{}{}
		return true
	})
	return out, err
}
