// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"io/fs"
	"os"
	"testing"

	"github.com/cilium/ebpf"
)

// The services of the earlier layout are there when the first hook has new programs; what the new maps hold counts more.
func TestServicesUpgrade(t *testing.T) {
	b := newBench(t, nil)
	rows := b.oldMap(tcMapServices, ebpf.Hash, servicesLayoutBefore, 16)
	slots := b.oldMap(tcMapBackends, ebpf.Hash, servicesLayoutBefore, 24)
	one, two, empty := Frontend{vip4, 80, 6}, Frontend{vip6, 81, 17}, Frontend{vip4, 82, 6}
	b.upsert(Service{Frontend: one, ID: 1, Backends: backends(at(podB4, 9))})
	for _, err := range []error{
		slots.Put(tcBackendKey{Set: 5, Slot: 0}, backendBefore{Addr: addrOf(podA4), Port: port16(1)}),
		slots.Put(tcBackendKey{Set: 6, Slot: 0}, backendBefore{Addr: addrOf(podA6), Port: port16(2)}),
		slots.Put(tcBackendKey{Set: 6, Slot: 1}, backendBefore{Addr: addrOf(podB6), Port: port16(3)}),
		rows.Put(one.key(), serviceBefore{ID: 1, Set: 5, Count: 1}),
		rows.Put(two.key(), serviceBefore{ID: 2, Set: 6, Count: 2}),
		rows.Put(empty.key(), serviceBefore{ID: 3, Set: 7}),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	again := load(t, b.cfg)
	checkServices(t, again, Service{Frontend: one, ID: 1, Backends: backends(at(podB4, 9))},
		Service{Frontend: two, ID: 2, Backends: backends(at(podA6, 2), at(podB6, 3))}, Service{Frontend: empty, ID: 3})
	for _, name := range []string{tcMapServices, tcMapBackends} {
		if _, err := os.Stat(b.oldPin(name, servicesLayoutBefore)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: the old pin: %v", name, err)
		}
	}
}
