// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"unsafe"

	"github.com/cilium/ebpf"
)

// older lists the maps whose layout has changed, with the layout that is converted and what a value was long. In each the old value is
// the beginning of the new one, which fix completes.
var older = []struct {
	name      string
	layout    int
	valueSize uint32
	fix       func(value []byte)
}{
	{tcMapIpcache, 1, 24, nil},
	{tcMapEndpoints, 1, 16, nil},
	{tcMapInterfaces, 1, 16, nil},
	{tcMapCt, ctBefore.layout, ctBefore.valueSize, ctBefore.fix},
}

// olderLayout is a layout that is converted.
type olderLayout struct {
	layout    int
	valueSize uint32
	fix       func(value []byte)
}

// metricsLayoutsBefore are layouts of metrics that had fewer rows.
var metricsLayoutsBefore = []int{1, 2}

// takeover is what an earlier version's maps held when they were copied. Its programs go on with them until every hook has the new ones.
type takeover struct {
	maps    map[string]*ebpf.Map
	conns   map[tcCtKey]copied
	metrics []tcMetricValue // sums over CPUs
}

type copied struct {
	connection uint64
	dir        [2]tcTraffic
}

func (t *takeover) close() error { return closeMaps(t.maps) }

func closeMaps(maps map[string]*ebpf.Map) error {
	var errs []error
	for _, m := range maps {
		errs = append(errs, m.Close())
	}
	return errors.Join(errs...)
}

// earlierConns shows the new programs the connections of the earlier ones: while hooks are replaced, a connection may begin at the one and its answers
// come to the other.
func (d *Datapath) earlierConns(spec *ebpf.CollectionSpec) (map[string]*ebpf.Map, error) {
	m := spec.Maps[tcMapCtEarlier]
	old, err := d.openLayout(tcMapCt, ctBefore.layout, m.KeySize, ctBefore.valueSize)
	if err != nil || old == nil {
		return nil, err
	}
	m.ValueSize, m.MaxEntries, m.Flags = old.ValueSize(), old.MaxEntries(), old.Flags()
	if err := errors.Join(spec.Variables[tcVarCfgCtEarlier].Set(uint32(ctBefore.layout)), spec.Variables[tcVarCtTakeover].Set(uint32(1))); err != nil {
		return nil, errors.Join(fmt.Errorf("connections of layout %d: %w", ctBefore.layout, err), old.Close())
	}
	return map[string]*ebpf.Map{tcMapCtEarlier: old}, nil
}

func (d *Datapath) oldPin(name string, layout int) string {
	return filepath.Join(d.cfg.PinPath, fmt.Sprintf("%s_v%d", name, layout))
}

// openOld opens a map of an earlier layout; nil means that there is none.
func (d *Datapath) openOld(name string, layout int, valueSize uint32) (*ebpf.Map, error) {
	return d.openLayout(name, layout, d.coll.Maps[name].KeySize(), valueSize)
}

func (d *Datapath) openLayout(name string, layout int, keySize, valueSize uint32) (*ebpf.Map, error) {
	m, err := ebpf.LoadPinnedMap(d.oldPin(name, layout), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("map %s of layout %d: %w", name, layout, err)
	}
	if m.ValueSize() != valueSize || m.KeySize() != keySize {
		return nil, errors.Join(fmt.Errorf("map %s of layout %d: %w: values of %d bytes", name, layout, ErrIncompatible, m.ValueSize()), m.Close())
	}
	return m, nil
}

// copyOld fills the maps of this layout from those of an earlier one, before any hook has the new programs.
func (d *Datapath) copyOld() (*takeover, error) {
	t := &takeover{maps: map[string]*ebpf.Map{}, conns: map[tcCtKey]copied{}}
	for _, o := range older {
		old, err := d.openOld(o.name, o.layout, o.valueSize)
		if err != nil {
			return t, err
		}
		if old == nil {
			continue
		}
		t.maps[o.name] = old
		rows, err := d.convert(old, d.coll.Maps[o.name], o.fix, func(key, value []byte) {
			if o.name == tcMapCt {
				e := (*tcCtEntry)(unsafe.Pointer(&value[0]))
				t.conns[*(*tcCtKey)(unsafe.Pointer(&key[0]))] = copied{e.Conn.Connection, e.Conn.Dir}
			}
		})
		if err != nil {
			return t, fmt.Errorf("convert %s: %w", o.name, err)
		}
		d.log.Info("map of an earlier layout is taken over", "map", o.name, "layout", o.layout, "rows", rows)
	}
	var old *ebpf.Map
	for _, layout := range metricsLayoutsBefore {
		var err error
		if old, err = d.openOld(tcMapMetrics, layout, uint32(unsafe.Sizeof(tcMetricValue{}))); err != nil {
			return t, err
		}
		if old != nil {
			break
		}
	}
	if old == nil {
		return t, nil
	}
	t.maps[tcMapMetrics] = old
	var err error
	if t.metrics, err = sums(old); err != nil {
		return t, err
	}
	for i, v := range t.metrics {
		if err := d.adopt(&tcAdoptRequest{Kind: uint8(tcAdoptKindADOPT_METRIC), Metric: uint32(i), Count: v.Count, Bytes: v.Bytes}); err != nil {
			return t, fmt.Errorf("metric %d: %w", i, err)
		}
	}
	return t, nil
}

// convert copies rows that the new map does not have.
func (d *Datapath) convert(old, fresh *ebpf.Map, fix func([]byte), note func(key, value []byte)) (int, error) {
	var key, value []byte
	rows := 0
	it := old.Iterate()
	for it.Next(&key, &value) {
		full := make([]byte, fresh.ValueSize())
		copy(full, value)
		if fix != nil {
			fix(full)
		}
		note(key, full)
		rows++
		err := fresh.Update(key, full, ebpf.UpdateNoExist)
		if err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
			return rows, fullError(fresh, "the new map", err)
		}
	}
	return rows, it.Err()
}

// adoptRest brings what copyOld has copied up to date, after every hook has the new programs, and lets go of the old maps.
func (d *Datapath) adoptRest(t *takeover) error {
	if len(t.maps) == 0 {
		return nil
	}
	if err := d.coll.Variables[tcVarCtTakeover].Set(uint32(0)); err != nil {
		return fmt.Errorf("end of the takeover: %w", err)
	}
	if err := waitForPrograms(); err != nil {
		return err
	}
	if old := t.maps[tcMapCt]; old != nil {
		if err := d.adoptConns(t, old); err != nil {
			return err
		}
		// The new programs keep the map until they are replaced themselves. Filters of clsact may still be the old ones.
		if d.tcx {
			if err := empty(old); err != nil {
				return err
			}
		}
	}
	if old := t.maps[tcMapMetrics]; old != nil {
		now, err := sums(old)
		if err != nil {
			return err
		}
		for i, v := range now {
			was := t.metrics[i]
			if v == was {
				continue
			}
			r := &tcAdoptRequest{Kind: uint8(tcAdoptKindADOPT_METRIC), Metric: uint32(i), Count: v.Count - was.Count, Bytes: v.Bytes - was.Bytes}
			if err := d.adopt(r); err != nil {
				return fmt.Errorf("metric %d: %w", i, err)
			}
		}
	}
	var errs []error
	for _, o := range older {
		errs = append(errs, removeIfThere(d.oldPin(o.name, o.layout)))
	}
	for _, layout := range metricsLayoutsBefore {
		errs = append(errs, removeIfThere(d.oldPin(tcMapMetrics, layout)))
	}
	return errors.Join(errs...)
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (d *Datapath) adoptConns(t *takeover, old *ebpf.Map) error {
	fresh := d.coll.Maps[tcMapCt]
	var fix func([]byte)
	for _, o := range older {
		if o.name == tcMapCt {
			fix = o.fix
		}
	}
	var key, value []byte
	it := old.Iterate()
	for it.Next(&key, &value) {
		full := make([]byte, fresh.ValueSize())
		copy(full, value)
		fix(full)
		e := (*tcCtEntry)(unsafe.Pointer(&full[0]))
		k := *(*tcCtKey)(unsafe.Pointer(&key[0]))
		was, known := t.conns[k]
		if known && was.connection == e.Conn.Connection && was.dir == e.Conn.Dir {
			continue
		}
		r := &tcAdoptRequest{Kind: uint8(tcAdoptKindADOPT_CONN), Key: k, Conn: e.Conn, Added: e.Conn.Dir}
		if known && was.connection == e.Conn.Connection {
			for i := range r.Added {
				r.Last[i] = was.dir[i].Last
				r.Added[i].Packets -= was.dir[i].Packets
				r.Added[i].Bytes -= was.dir[i].Bytes
			}
		}
		err := d.adopt(r)
		if errors.Is(err, errAbsent) {
			if err = fresh.Update(key, full, ebpf.UpdateNoExist); errors.Is(err, ebpf.ErrKeyExist) {
				err = d.adopt(r) // a packet has just begun one
			}
		}
		if err != nil {
			return fmt.Errorf("take over a connection: %w", fullError(fresh, tcMapCt, err))
		}
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("list ct of the earlier layout: %w", err)
	}
	return nil
}

// empty deletes all rows.
func empty(m *ebpf.Map) error {
	var key, value []byte
	var keys [][]byte
	it := m.Iterate()
	for it.Next(&key, &value) {
		keys = append(keys, key)
		key = nil
	}
	errs := []error{it.Err()}
	for _, k := range keys {
		if err := m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("empty a map of an earlier layout: %w", err))
			break
		}
	}
	return errors.Join(errs...)
}

var errAbsent = errors.New("no such entry")

// adopt runs the program of that name.
func (d *Datapath) adopt(r *tcAdoptRequest) error {
	ret, err := d.coll.Programs[tcProgAdopt].Run(&ebpf.RunOptions{Data: unsafe.Slice((*byte)(unsafe.Pointer(r)), unsafe.Sizeof(*r))})
	if err != nil {
		return err
	}
	switch tcAdoptResult(ret) {
	case tcAdoptResultADOPT_DONE:
		return nil
	case tcAdoptResultADOPT_ABSENT:
		return errAbsent
	}
	return fmt.Errorf("adopt: result %d", ret)
}

// sums reads a map of metrics, summed over CPUs.
func sums(m *ebpf.Map) ([]tcMetricValue, error) {
	out := make([]tcMetricValue, m.MaxEntries())
	for i := range out {
		var cpus [][]byte
		if err := m.Lookup(uint32(i), &cpus); err != nil {
			return nil, fmt.Errorf("metric %d: %w", i, err)
		}
		for _, v := range cpus {
			out[i].Count += binary.NativeEndian.Uint64(v)
			out[i].Bytes += binary.NativeEndian.Uint64(v[8:])
		}
	}
	return out, nil
}
