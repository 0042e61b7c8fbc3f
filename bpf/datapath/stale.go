// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/cilium/ebpf"
)

// Stale reports whether other maps than these are pinned now, or none: the datapath was removed, and maybe loaded anew.
func (v *View) Stale(bpffs string) (bool, error) { return stale(bpffs, v.maps) }

// Stale reports whether other maps than these are pinned now, or none.
func (n *Names) Stale(bpffs string) (bool, error) {
	return stale(bpffs, map[string]*ebpf.Map{tcMapFqdn: n.addresses, tcMapFqdnPeers: n.table.peers, tcMapFqdnRanges: n.table.blocks.m})
}

func stale(bpffs string, maps map[string]*ebpf.Map) (bool, error) {
	for name, m := range maps {
		same, err := samePin(bpffs, name, m)
		if errors.Is(err, fs.ErrNotExist) {
			return true, nil
		}
		if err != nil || !same {
			return err == nil, err
		}
	}
	return false, nil
}

// samePin compares a map with what is pinned under its name.
func samePin(bpffs, name string, m *ebpf.Map) (bool, error) {
	pinned, err := openPin(bpffs, name, &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		return false, err
	}
	now, err := mapID(pinned)
	if err = errors.Join(err, pinned.Close()); err != nil {
		return false, err
	}
	was, err := mapID(m)
	return now == was, err
}

func mapID(m *ebpf.Map) (ebpf.MapID, error) {
	info, err := m.Info()
	if err != nil {
		return 0, fmt.Errorf("map %v: %w", m, err)
	}
	id, ok := info.ID()
	if !ok {
		return 0, fmt.Errorf("map %v: the kernel does not say its id", m)
	}
	return id, nil
}
