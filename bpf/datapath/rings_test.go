// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"testing"
	"time"
	"unsafe"
)

// fill makes n records by packets that each make one.
func (b *bench) fill(n int) {
	b.Helper()
	for range n {
		b.run(tcProgFromPod, b.ifA, udp(b, at(podB4, 9), at(far4, 2), 10)) // a spoofed source: one drop record, no entry
	}
}

// Records come out whole and in order, many times round the ring.
func TestRingWraps(t *testing.T) {
	b := newBench(t, func(c *Config) { c.RingBytes = 2 * 4096 })
	perRing := b.Rings().Bytes() / (RecordSize + ringHeader)
	var total, last uint64
	for range 20 {
		b.fill(perRing - 1) // on whatever CPUs; none can be too full
		b.Rings().Drain(1<<20, func(_ int, r *Record, _ uint64) {
			if r == nil || r.Type != RecordDrop || r.Dport != 2 || r.SrcAddr() != podB4 {
				t.Fatalf("record %+v", r)
			}
			if r.Time < last {
				t.Errorf("record of time %d after %d", r.Time, last)
			}
			last = r.Time
			total++
		})
		if err := b.Rings().Commit(b.Rings().Positions()); err != nil {
			t.Fatal(err)
		}
	}
	c := b.counters()
	if c.Lost.Total() != 0 || total != c.Written.Drop || total != uint64(20*(perRing-1)) {
		t.Errorf("%d read, %d written, %d lost, want %d", total, c.Written.Drop, c.Lost.Total(), 20*(perRing-1))
	}
}

// What was read keeps its room until it is committed, and is there again for another process; what a sealed batch covers is not.
func TestResume(t *testing.T) {
	pin := bpffs(t)
	ns := inNetns(t)
	open := func() *bench {
		d, err := Load(smallConfig(pin), slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		return &bench{TB: t, Datapath: d, ns: ns}
	}
	b := open()
	b.ifA = addVeth(t, "wra", "pa")
	b.fill(10)
	read := func() (n int) {
		return b.Rings().Drain(100, func(_ int, r *Record, _ uint64) {})
	}
	if n := read(); n != 10 {
		t.Fatalf("%d records, want 10", n)
	}
	// Died before sealing: all again.
	restart := func() {
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		ifA := b.ifA
		b = open()
		b.ifA = ifA
	}
	restart()
	positions := make([]uint64, b.Rings().Count())
	n := b.Rings().Drain(4, func(cpu int, _ *Record, pos uint64) { positions[cpu] = pos })
	if n != 4 {
		t.Fatalf("%d records, want 4", n)
	}
	// Sealed four and died before committing: six are left.
	if err := b.Rings().SaveState(State{Epoch: 7, NextSequence: 5, Positions: positions}); err != nil {
		t.Fatal(err)
	}
	restart()
	s, err := b.Rings().LoadState()
	if err != nil || s.Epoch != 7 || s.NextSequence != 5 {
		t.Errorf("state %+v (%v), want epoch 7 and sequence 5", s, err)
	}
	if n := read(); n != 6 {
		t.Errorf("%d records after the restart, want 6", n)
	}
	if err := b.Rings().Commit(b.Rings().Positions()); err != nil {
		t.Fatal(err)
	}
	restart()
	if n := read(); n != 0 {
		t.Errorf("%d records after a commit, want none", n)
	}
	if err := b.Rings().Commit(make([]uint64, 1+b.Rings().Count())); err == nil {
		t.Error("commit took positions of another number of rings")
	}
	over := b.Rings().Positions()
	over[0]++
	if err := b.Rings().Commit(over); err == nil {
		t.Error("commit took a position that was not read")
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}

// Read waits, hands over in order, holds back what is too young, and ends with its context.
func TestRead(t *testing.T) {
	b := newBench(t, nil)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	b.fill(5)
	var got int
	var last uint64
	for got < 5 {
		n, err := b.Rings().Read(ctx, 2, func(_ int, r *Record, _ uint64) {
			if r.Time < last || r.Time > Now()-uint64(holdBack) {
				t.Errorf("record of time %d after %d at %d", r.Time, last, Now())
			}
			last = r.Time
		})
		if err != nil {
			t.Fatal(err)
		}
		if n > 2 {
			t.Errorf("%d records, want at most 2", n)
		}
		got += n
	}
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := b.Rings().Read(ended, 2, func(int, *Record, uint64) {}); !errors.Is(err, context.Canceled) {
		t.Errorf("read with an ended context: %v", err)
	}
}

// madeRing lays records out as the kernel does, and returns a reader of them. A nil record is a discarded one.
func madeRing(size int, start uint64, records ...[]byte) *ring {
	control, producer, data := make([]byte, 4096), make([]byte, 4096), make([]byte, size)
	pos := start
	for _, r := range records {
		n := len(r)
		header := uint32(n)
		if r == nil {
			n, header = 64, 64|ringDiscard
		}
		rec := make([]byte, (n+ringHeader+7)&^7)
		binary.NativeEndian.PutUint32(rec, header)
		copy(rec[ringHeader:], r)
		for i, c := range rec {
			data[(int(pos)+i)%size] = c
		}
		pos += uint64(len(rec))
	}
	binary.NativeEndian.PutUint64(control, start)
	binary.NativeEndian.PutUint64(producer, pos)
	r := newRing(control, producer, data, size)
	r.resume(0)
	r.refresh()
	return r
}

func bytesOf(r *Record) []byte { return unsafe.Slice((*byte)(unsafe.Pointer(r)), RecordSize) }

func TestRingLayout(t *testing.T) {
	good := bytesOf(&Record{Type: RecordTrace, Time: 9})
	badType := bytesOf(&Record{Type: 99})
	r := madeRing(1024, 1024-100, good, nil, badType, []byte("short"), good) // across the end
	for i, want := range []bool{true, false, false, true} {
		if !r.peek() {
			t.Fatalf("record %d: not found", i)
		}
		rec, _ := r.take()
		if (rec != nil) != want {
			t.Errorf("record %d: decoded %v, want %v", i, rec != nil, want)
		}
		if want && string(bytesOf(rec)) != string(good) {
			t.Errorf("record %d: %+v", i, rec)
		}
	}
	if r.peek() {
		t.Error("a record too many")
	}
	// A record that is being written ends the reading.
	r = madeRing(1024, 0, good, good)
	*(*uint32)(unsafe.Pointer(&r.data[RecordSize+ringHeader])) |= ringBusy
	if !r.peek() {
		t.Fatal("no first record")
	}
	r.take()
	if r.peek() {
		t.Error("a busy record was handed over")
	}
}

func FuzzDecodeRecord(f *testing.F) {
	f.Add(bytesOf(&Record{Type: RecordTrace, Time: 1}))
	f.Add(bytesOf(&Record{Type: 200}))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := DecodeRecord(b)
		if err != nil {
			return
		}
		if len(b) != RecordSize || r.Type < RecordTrace || r.Type > RecordFinal {
			t.Fatalf("decoded %d bytes of type %d", len(b), r.Type)
		}
		_, _, _ = r.SrcAddr().String(), r.DstAddr().String(), r.XlatedAddr().String()
		if again := bytesOf(&r); string(again) != string(b) {
			t.Fatal("a record changed on the way")
		}
	})
}

// Whatever lies in a ring, the reader ends and stays within it.
func FuzzRing(f *testing.F) {
	f.Add(bytesOf(&Record{Type: RecordTrace}), uint32(RecordSize), uint16(0))
	f.Add([]byte{1, 2, 3}, uint32(3|ringDiscard), uint16(1000))
	f.Add([]byte{}, uint32(1<<29), uint16(8))
	f.Fuzz(func(t *testing.T, body []byte, header uint32, start uint16) {
		r := madeRing(4096, uint64(start)&^7, body[:min(len(body), 2048)])
		binary.NativeEndian.PutUint32(r.data[r.read&r.mask:], header)
		for range 10 {
			if !r.peek() {
				return
			}
			before := r.read
			if rec, pos := r.take(); pos <= before || rec != nil && rec.check() != nil {
				t.Fatalf("record %+v, position %d after %d", rec, pos, before)
			}
		}
	})
}
