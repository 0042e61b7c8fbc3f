// SPDX-License-Identifier: Apache-2.0

package live

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
)

// PutRow makes a row of a node's ipcache by hand: an address of an identity of which the lab has nobody. The layout is read from the map's own types.
func (l *Lab) PutRow(node string, addr netip.Addr, identity uint32) (err error) {
	pins, err := filepath.Glob(filepath.Join("/sys/fs/bpf/weir", l.Name, node, "ipcache_v*"))
	if err != nil || len(pins) != 1 {
		return fmt.Errorf("ipcache of %s: expected one pinned map, found %v", node, pins)
	}
	m, err := ebpf.LoadPinnedMap(pins[0], nil)
	if err != nil {
		return fmt.Errorf("ipcache of %s: %w", node, err)
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	value, err := rowOf(m, identity)
	if err != nil {
		return fmt.Errorf("ipcache of %s: %w", node, err)
	}
	key := make([]byte, m.KeySize())
	a := addr.As16()
	binary.NativeEndian.PutUint32(key, uint32(8*len(a)))
	copy(key[4:], a[:])
	if err := m.Put(key, value); err != nil {
		return fmt.Errorf("ipcache of %s: %s: %w", node, addr, err)
	}
	return nil
}

// rowOf is a value with nothing but an identity.
func rowOf(m *ebpf.Map, identity uint32) ([]byte, error) {
	info, err := m.Info()
	if err != nil {
		return nil, err
	}
	id, ok := info.BTFID()
	if !ok {
		return nil, errors.New("the map has no types")
	}
	handle, err := btf.NewHandleFromID(id)
	if err != nil {
		return nil, err
	}
	defer handle.Close()
	spec, err := handle.Spec(nil)
	if err != nil {
		return nil, err
	}
	var entry *btf.Struct
	if err := spec.TypeByName("ipcache_entry", &entry); err != nil {
		return nil, err
	}
	value := make([]byte, m.ValueSize())
	for _, member := range entry.Members {
		if offset := member.Offset.Bytes(); member.Name == "identity" {
			binary.NativeEndian.PutUint32(value[offset:], identity)
			return value, nil
		}
	}
	return nil, errors.New("ipcache_entry has no member identity")
}
